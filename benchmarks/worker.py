"""One case in one process: build, compile, warm up, time, and print one line of JSON.

`compare.py` starts it as ``worker.py JOB``. A job with `learner` false is the plain network, whose gradient of a whole
sequence is back-propagation through time.
"""

import json
import sys
import time

STARTED = time.monotonic()

import brainstate  # noqa: E402
import braintools  # noqa: E402
import brainunit as u  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import networks  # noqa: E402

import braintrace  # noqa: E402

OPTIONS = {"pp_prop": {"decay_or_rank": 0.9}, "D_RTRL": {}, "EProp": {"kappa_filter_decay": 0.5}}
# The clock of a short step starts and stops around a block of them this long.
BLOCK_SECONDS, MOST_STEPS = 0.1, 50


class Problem:
    """A network, what takes a step of it (a learner, or the network itself), and what to differentiate."""

    def __init__(self, model, size, learner, mode=None, rule=None):
        self.batch, self.inputs, self.outputs = size["batch"], size["inputs"], size["outputs"]
        self.model = networks.build(model, size["inputs"], size["units"], size["outputs"])
        if learner:
            example = jnp.zeros((self.batch, self.inputs))
            self.step = braintrace.compile(
                self.model, rule, example, batch_size=self.batch, vmap=mode == "vmap", **OPTIONS[rule]
            )
            self.learner = self.step.module if mode == "vmap" else self.step
            self.parameters = self.learner.param_states
        else:
            brainstate.nn.init_all_states(self.model, batch_size=self.batch)
            self.step, self.learner = self.model, None
            self.parameters = self.model.states(brainstate.ParamState)

    def data(self, steps):
        key_x, key_y = jax.random.split(jax.random.key(0))
        spikes = jax.random.uniform(key_x, (steps, self.batch, self.inputs)) < 0.1
        return spikes.astype(jnp.float32), jax.random.randint(key_y, (self.batch,), 0, self.outputs)

    def loss(self, x, labels):
        return braintools.metric.softmax_cross_entropy_with_integer_labels(self.step(x), labels).mean()

    def sequence(self, xs, labels):
        """Gradient of the mean loss over a whole sequence, from reset states."""
        brainstate.nn.reset_all_states(self.model, batch_size=self.batch)
        if self.learner is not None:
            self.learner.reset_state()
            return self.step.etrace_grad(xs, step_fn=lambda x: self.loss(x, labels))

        def whole():
            return brainstate.transform.for_loop(lambda x: self.loss(x, labels), xs).mean()

        return brainstate.transform.grad(whole, self.parameters)()

    def update(self, x, labels):
        """One step of the network, its gradient and one step of gradient descent."""
        gradients = brainstate.transform.grad(lambda: self.loss(x, labels), self.parameters)()
        for path, gradient in gradients.items():
            parameter = self.parameters[path]
            parameter.value = jax.tree.map(lambda p, g: p - 1e-4 * g, parameter.value, gradient)
        return [parameter.value for parameter in self.parameters.values()]


def seconds(run):
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def sequence_runner(gradient, xs, labels):
    return lambda: gradient(xs, labels), 1


def step_runner(update, xs, labels):
    """A block of steps, long enough for the clock, and their number."""
    xs = list(xs[:MOST_STEPS])
    count = round(BLOCK_SECONDS / seconds(lambda: update(xs[0], labels)))
    count = min(max(1, count), MOST_STEPS)

    def block():
        for i in range(count):
            last = update(xs[i % len(xs)], labels)
        return last

    return block, count


def timed(problem, work, steps, repeats, deadline):
    xs, labels = problem.data(steps)
    function, first, runner = {
        "sequence": (problem.sequence, xs, sequence_runner),
        "step": (problem.update, xs[0], step_runner),
    }[work]
    function = brainstate.transform.jit(function)
    start = time.perf_counter()
    compiled = function.compile(first, labels)
    compile_seconds = time.perf_counter() - start

    # Twice: states may come back from the first call with another weak type, which compiles again.
    for _ in range(2):
        jax.block_until_ready(function(first, labels))
    run, count = runner(function, xs, labels)
    times = [seconds(run)]
    while len(times) < repeats and time.monotonic() + 2 * times[-1] < deadline:
        times.append(seconds(run))
    return {
        "times": [t / count for t in times],
        "compile": compile_seconds,
        "memory": compiled.memory_analysis().temp_size_in_bytes,
        "steps": steps,
    }


def memory(problem, lengths):
    """Bytes of temporary memory of the whole-sequence gradient, for each length; nothing runs."""
    found = {}
    for steps in lengths:
        arguments = jax.eval_shape(lambda steps=steps: problem.data(steps))
        compiled = brainstate.transform.jit(problem.sequence).compile(*arguments)
        found[steps] = compiled.memory_analysis().temp_size_in_bytes
    return {"memory": found}


def main(started, work, steps, repeats, limit, **problem):
    brainstate.environ.set(dt=1.0 * u.ms)
    problem = Problem(**problem)
    result = memory(problem, steps) if work == "memory" else timed(problem, work, steps, repeats, started + 0.9 * limit)
    device = jax.devices()[0]
    return result | {"braintrace": braintrace.__version__, "jax": jax.__version__, "device": device.device_kind}


def result_of(job, started):
    try:
        return main(started, **job)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


if __name__ == "__main__":
    print(json.dumps(result_of(json.loads(sys.argv[1]), STARTED)))
