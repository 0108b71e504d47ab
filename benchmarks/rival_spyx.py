"""Sequences of `lif` by back-propagation in spyx: one case in one process, one line of JSON as from worker.py."""

import json
import math
import sys
import time

STARTED = time.monotonic()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
import spyx  # noqa: E402
from flax import nnx  # noqa: E402

TAU_MEMBRANE, TAU_SYNAPSE, TAU_READOUT = 20.0, 5.0, 5.0


def build(inputs, units, outputs):
    """Recurrent LIF neurons behind exponential synapses, read by a leaky integrator."""
    rngs, membrane = nnx.Rngs(0), math.exp(-1 / TAU_MEMBRANE)
    # 1 - membrane is the input of the membrane's exponential Euler step.
    initial = nnx.initializers.variance_scaling(2 * (1 - membrane) ** 2, "fan_in", "normal")
    neurons = spyx.nn.RCuBaLIF((units,), alpha=math.exp(-1 / TAU_SYNAPSE), beta=membrane, rngs=rngs)
    neurons.recurrent_w[...] = initial(rngs.params(), (units, units))
    return spyx.nn.Sequential(
        nnx.Linear(inputs, units, use_bias=False, kernel_init=initial, rngs=rngs),
        neurons,
        nnx.Linear(units, outputs, use_bias=False, rngs=rngs),
        spyx.nn.LI((outputs,), beta=math.exp(-1 / TAU_READOUT), rngs=rngs),
    )


def loss(model, xs, labels):
    traces, _ = spyx.nn.run(model, xs)
    return optax.softmax_cross_entropy_with_integer_labels(traces, jnp.broadcast_to(labels, traces.shape[:2])).mean()


def main(started, steps, repeats, limit, size, **_):
    graph, parameters = nnx.split(build(size["inputs"], size["units"], size["outputs"]))
    key_x, key_y = jax.random.split(jax.random.key(0))
    xs = (jax.random.uniform(key_x, (steps, size["batch"], size["inputs"])) < 0.1).astype(jnp.float32)
    labels = jax.random.randint(key_y, (size["batch"],), 0, size["outputs"])
    start = time.perf_counter()
    gradient = jax.grad(lambda parameters, *data: loss(nnx.merge(graph, parameters), *data))
    compiled = jax.jit(gradient).lower(parameters, xs, labels).compile()
    compile_seconds = time.perf_counter() - start

    def seconds():
        start = time.perf_counter()
        jax.block_until_ready(compiled(parameters, xs, labels))
        return time.perf_counter() - start

    for _ in range(2):
        seconds()
    times = [seconds()]
    while len(times) < repeats and time.monotonic() + 2 * times[-1] < started + 0.9 * limit:
        times.append(seconds())
    return {
        "times": times,
        "compile": compile_seconds,
        "memory": compiled.memory_analysis().temp_size_in_bytes,
        "steps": steps,
        "device": f"{jax.devices()[0].device_kind}, spyx {spyx.__version__}",
    }


if __name__ == "__main__":
    print(json.dumps(main(STARTED, **json.loads(sys.argv[1]))))
