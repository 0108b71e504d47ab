"""How long does the online gradient of a whole sequence take, beside back-propagation through time?

A recurrent layer of leaky integrate-and-fire neurons with an exponential synapse and a leaky readout, a loss at every
step. Both gradients are compiled, then timed in turns in one process; the ratio is that of the fastest runs.

    python benchmarks/pp_prop_against_bptt.py --units 256 --steps 200
"""

import argparse
import time

import brainpy
import brainstate
import braintools
import brainunit as u
import jax
import jax.numpy as jnp

import braintrace


class Net(brainstate.nn.Module):
    def __init__(self, n_in, n_units, n_out):
        super().__init__()
        self.neurons = brainpy.state.LIF(n_units, tau=20.0 * u.ms, V_th=1.0 * u.mV)
        self.synapses = brainpy.state.AlignPostProj(
            comm=braintrace.nn.Linear(
                n_in + n_units, n_units, w_init=braintools.init.KaimingNormal(unit=u.mS), b_init=None
            ),
            syn=brainpy.state.Expon(n_units, tau=5.0 * u.ms),
            out=brainpy.state.CUBA(scale=1.0 * u.volt),
            post=self.neurons,
        )
        self.readout = braintrace.nn.LeakyRateReadout(n_units, n_out, tau=5.0 * u.ms)

    def update(self, spikes):
        self.synapses(jnp.concatenate([spikes, self.neurons.get_spike()], axis=-1))
        return self.readout(self.neurons())


def fastest(functions, repeats):
    """Best time in seconds of each function, called in turns."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, f in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(f())
            times[name].append(time.perf_counter() - start)
    return {name: min(ts) for name, ts in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(batch=32, inputs=100, units=256, outputs=10, steps=200, repeats=10).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()

    model = Net(args.inputs, args.units, args.outputs)
    key_x, key_y = jax.random.split(jax.random.key(0))
    spikes = (jax.random.uniform(key_x, (args.steps, args.batch, args.inputs)) < 0.1).astype(jnp.float32)
    labels = jax.random.randint(key_y, (args.batch,), 0, args.outputs)
    learner = braintrace.compile(model, "pp_prop", spikes[0], batch_size=args.batch, decay_or_rank=0.9)
    parameters = learner.param_states

    def loss(output):
        return braintools.metric.softmax_cross_entropy_with_integer_labels(output, labels).mean()

    @brainstate.transform.jit
    def online():
        brainstate.nn.reset_all_states(model, batch_size=args.batch)
        learner.reset_state()
        return learner.etrace_grad(spikes, step_fn=lambda x: loss(learner(x)))

    @brainstate.transform.jit
    def bptt():
        brainstate.nn.reset_all_states(model, batch_size=args.batch)

        def whole():
            return brainstate.transform.for_loop(lambda x: loss(model(x)), spikes).mean()

        return brainstate.transform.grad(whole, parameters)()

    functions = {"pp_prop": online, "BPTT": bptt}
    fastest(functions, 1)
    times = fastest(functions, args.repeats)
    for name, seconds in times.items():
        print(f"{name:>8}: {1e3 * seconds:8.1f} ms")
    print(f"   ratio: {times['pp_prop'] / times['BPTT']:8.2f}")


if __name__ == "__main__":
    brainstate.environ.set(dt=1.0 * u.ms)
    main()
