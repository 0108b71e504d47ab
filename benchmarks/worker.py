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

# What `compile` takes for the rules of cases.py: SnAp has no name.
RULES = {
    "pp_prop": ("pp_prop", {"decay_or_rank": 0.9}),
    "hybrid": ("hybrid", {"decay_or_rank": 0.9}),
    "D_RTRL": ("D_RTRL", {}),
    "D_RTRL-bf16": ("D_RTRL", {"trace_dtype": "bfloat16"}),
    "EProp": ("EProp", {"kappa_filter_decay": 0.5}),
    "OSTLRecurrent": ("ostl_recurrent", {}),
    "SnAp-2": (braintrace.SnAp, {"n": 2}),
    "UORO": ("UORO", {}),
}
# The clock of a short step starts and stops around a block of them this long.
BLOCK_SECONDS, MOST_STEPS = 0.1, 50
LATE = 40  # steps with a loss at the end of a `late` sequence


class Problem:
    """A network, what takes a step of it (a learner, or the network itself), and what to differentiate."""

    def __init__(self, model, size, learner, mode=None, rule=None):
        self.batch, self.outputs = size["batch"], size["outputs"]
        self.shape = (self.batch, *networks.input_shape(model, size["inputs"]))
        self.model = networks.NETWORKS[model](size["inputs"], size["units"], size["outputs"])
        if learner:
            rule, options = RULES[rule]
            example = jnp.zeros(self.shape)
            self.step = braintrace.compile(
                self.model, rule, example, batch_size=self.batch, vmap=mode == "vmap", **options
            )
            self.learner = self.step.module if mode == "vmap" else self.step
            self.parameters = self.learner.param_states
        else:
            brainstate.nn.init_all_states(self.model, batch_size=self.batch)
            self.step, self.learner = self.model, None
            self.parameters = self.model.states(brainstate.ParamState)

    def data(self, steps):
        key_x, key_y = jax.random.split(jax.random.key(0))
        spikes = jax.random.uniform(key_x, (steps, *self.shape)) < 0.1
        return spikes.astype(jnp.float32), jax.random.randint(key_y, (self.batch,), 0, self.outputs)

    def loss(self, x, labels):
        return braintools.metric.softmax_cross_entropy_with_integer_labels(self.step(x), labels).mean()

    def reset(self):
        brainstate.nn.reset_all_states(self.model, batch_size=self.batch)
        if self.learner is not None:
            self.learner.reset_state()

    def forward(self, xs):
        """Advance the states (with a learner: the traces too), without a loss."""
        if self.learner is not None and len(xs):
            self.step.etrace_evolve(xs)
        elif len(xs):
            brainstate.transform.for_loop(lambda x: (self.step(x), None)[1], xs)

    def gradient(self, first, last, labels):
        """Of the mean loss over the last steps, after the first ones without a loss, from reset states."""
        self.reset()
        if self.learner is not None:
            self.forward(first)
            return self.step.etrace_grad(last, step_fn=lambda x: self.loss(x, labels))

        def whole():
            self.forward(first)
            return brainstate.transform.for_loop(lambda x: self.loss(x, labels), last).mean()

        return brainstate.transform.grad(whole, self.parameters)()

    def sequence(self, xs, labels):
        return self.gradient(xs[:0], xs, labels)

    def late(self, xs, labels):
        late = min(LATE, len(xs) // 2)
        return self.gradient(xs[:-late], xs[-late:], labels)

    def evolve(self, xs, labels):
        self.reset()
        self.forward(xs)
        return [state.value for state in self.model.states(brainstate.HiddenState).values()]

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


def sequence_runner(function, xs, labels):
    return lambda: function(xs, labels), 1


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
    one = work == "step"
    runner, first = (step_runner, xs[0]) if one else (sequence_runner, xs)
    function = brainstate.transform.jit(problem.update if one else getattr(problem, work))
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
        found[str(steps)] = compiled.memory_analysis().temp_size_in_bytes
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
