"""`etrace_grad` takes the gradient of a sequence chunk by chunk: the same sums, whatever the length of the chunks.

The oracle is computed once per model, with a batch; a learner of single samples that is mapped over the batch has the
same gradient.
"""

import functools

import brainstate
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import test_operation_rules as operations
from brainstate import HiddenState, ParamState
from helpers import DRTRL, PRECISIONS, PPProp, assert_close, old, total
from models import READOUTS, Linear, Problem, cat
from test_gradients import ALL

import braintrace

pytestmark = pytest.mark.usefixtures("time_step")

T = 9
RULES = {  # how to make the learner, the oracle's rule
    "pp_prop": (lambda net: braintrace.pp_prop(net, 0.9), PPProp(0.9)),
    "pp_prop, two decays": (lambda net: braintrace.pp_prop(net, (0.8, 0.5)), PPProp(0.8, 0.5)),
    "D_RTRL": (braintrace.D_RTRL, DRTRL()),
    "EProp": (lambda net: braintrace.EProp(net, kappa_filter_decay=0.6), DRTRL(0.6)),
}


class Many(models.ModelA):
    """Up to five states per position: linear with constant coefficients, gated, and fed by two operations."""

    def __init__(self, count, n_in=2, n=3):
        super().__init__(n_in, n)
        self.R = Linear(n_in + n, n)
        self.states = (("a", "b", "c", "d", "e")[:count],)

    def init_state(self, batch_size=None, **_):
        for name in self.states[0]:
            setattr(self, name, models.zeros(self.n, batch_size))

    def transition(self, x):
        a, b, c, d = (getattr(self, name).value for name in "abcd")
        self.a.value = 0.9 * a + self.W(x)
        self.b.value = 0.8 * b + 0.3 * self.a.value
        self.c.value = jnp.tanh(0.5 * c + self.b.value + self.R(cat(x, old(c))))
        self.d.value = 0.7 * d + self.c.value * a
        if len(self.states[0]) == 5:
            self.e.value = jax.nn.sigmoid(self.d.value) * self.e.value + 0.2 * b

    def output(self, aux):
        return self.a.value * self.c.value + getattr(self, self.states[0][-1]).value


class NoMemory(models.ModelA):
    """A state that forgets: its trace is the present input."""

    def transition(self, x):
        self.h.value = self.W(x)


NETWORKS = {  # layers and readout
    "gru": (ALL["gru"], "linear"),
    "lstm": (ALL["lstm"], "leaky"),
    "lif": (ALL["lif-cuba"], "leaky"),
    "alif": (ALL["alif-coba"], "plain"),
    "lif-alif": (ALL["lif-alif"], "leaky"),
    "gru-lstm": (ALL["gru-lstm"], None),
    "four states": (lambda nn: [Many(4)], None),
    "five states": (lambda nn: [Many(5)], "linear"),
    "no memory": (lambda nn: [NoMemory()], None),
    **{
        name: (ALL[name], None)
        for name in ["ModelA", "ModelB", "Chain", "ReadsOld", "Beside", "Masked", "Shared", "Mixing", "Leak"]
    },
}


def problem_of(network, batch=2, mapped=False, **options):
    """The network, with a batch axis in its states unless it is mapped over the batch of the inputs."""
    layers, readout = NETWORKS[network]
    options = {"steps": T} | options
    problem = Problem(layers, READOUTS.get(readout), None if mapped else batch, **options)
    if mapped:
        problem.sequence = models.inputs(
            options["steps"], batch, len(problem.sequence[0][1]), dtype=options.get("dtype")
        )
    return problem


@functools.cache
def oracle(network, rule, batch=2):
    """The steps `(loss, gradient)` and the values after them."""
    problem = problem_of(network, batch)
    return _oracle_of(network, batch).online(RULES[rule][1], problem.sequence)


@functools.cache
def _oracle_of(network, batch):
    return problem_of(network, batch).oracle()  # one compiled step for all rules


def learner_of(problem, make, mapped=False):
    """A learner of the problem's network; `mapped`: of single samples, mapped over the batch of the inputs."""
    if not mapped:
        return problem.learner(make=make)
    batch = len(problem.sequence[0][0])
    sample = problem.sequence[0][0][0]

    @brainstate.transform.vmap_new_states(state_tag="new", axis_size=batch)
    def initialise():
        brainstate.nn.init_all_states(problem.net)
        learner.compile_graph(sample)

    learner = make(problem.net)
    initialise()
    return braintrace.ETraceVmap(learner, vmap_states="new")


class Learner:
    """A problem and its learner, which every call finds as it was at the start."""

    def __init__(self, problem, make, mapped=False):
        self.problem, self.driver = problem, learner_of(problem, make, mapped)
        self.inner = self.driver.module if mapped else self.driver
        self.start = self.values()

    def values(self):
        """What a step changes, traces and counter included."""
        states = self.driver.states().items()
        return {path: state.value for path, state in states if not isinstance(state, ParamState)}

    def reset(self):
        states = self.driver.states()
        for path, value in self.start.items():
            states[path].value = value

    def loss(self, *args):
        return self.problem.loss(self.problem.net, self.driver, *args)

    def chunked(self, trace_chunk, step_fn=None, sequences=None, **options):
        self.reset()
        options = {"reduction": "sum", "step_fn": step_fn or self.loss, "trace_chunk": trace_chunk} | options
        sequences = self.problem.sequences() if sequences is None else sequences
        return brainstate.transform.jit(lambda *xs: self.driver.etrace_grad(*xs, **options))(*sequences)

    def one_by_one(self, step_fn=None, sequences=None, scale=None):
        """The sum of the gradients of single calls in a plain loop."""
        self.reset()
        gradient = brainstate.transform.grad(step_fn or self.loss, self.inner.param_states)
        step = brainstate.transform.jit(lambda *args: gradient(*args))
        sequences = self.problem.sequences() if sequences is None else sequences
        scale = [1.0] * T if scale is None else scale
        slices = [jax.tree.map(lambda x, t=t: x[t], sequences) for t in range(T)]
        return total([(None, jax.tree.map(lambda g, c=c: c * g, dict(step(*args)))) for c, args in zip(scale, slices)])

    def called(self):
        """The values after single calls without a gradient."""
        self.reset()
        call = brainstate.transform.jit(lambda x: self.driver(x))
        for x, *_ in self.problem.sequence:
            call(x)
        return self.values()


def assert_same(ours, theirs, tol, what):
    assert_close(
        {k: jax.tree.leaves(v) for k, v in ours.items()}, {k: jax.tree.leaves(v) for k, v in theirs.items()}, tol, what
    )


def check(network, rule, batch=2, mapped=False, chunks=(4,), tol=2e-5):
    make, _ = RULES[rule]
    steps, after = oracle(network, rule, batch)
    learner = Learner(problem_of(network, batch, mapped), make, mapped)
    called = learner.called()
    for k in chunks:
        grads, losses = learner.chunked(k, return_value=True)
        assert_close(dict(grads), total(steps), tol, f"chunks of {k}")
        np.testing.assert_allclose(losses, [loss for loss, _ in steps], rtol=1e-5)
        assert_same(learner.values(), called, tol, f"values after chunks of {k}")
        hidden = {path: state.value for path, state in learner.problem.net.states(HiddenState).items()}
        assert_close(hidden, {path: after[path] for path in hidden}, tol, f"states after chunks of {k}")
        assert int(learner.inner.running_index.value) == T


# -- every network, every length


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("rule", ["pp_prop, two decays", "D_RTRL"])
@pytest.mark.parametrize("network", NETWORKS)
def test_networks(network, rule, mapped):
    check(network, rule, mapped=mapped)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("network", ["lstm", "alif", "ReadsOld", "Masked", "Leak"])
def test_filtered_traces(network, mapped):
    check(network, "EProp", mapped=mapped)


LENGTHS = [
    ("lif", "pp_prop", None, False),
    ("lif", "pp_prop", 2, True),
    ("gru", "EProp", 2, False),
    ("Chain", "D_RTRL", None, False),
    ("five states", "D_RTRL", 2, True),
]


@pytest.mark.parametrize("network, rule, batch, mapped", LENGTHS)
def test_every_length(network, rule, batch, mapped):
    check(network, rule, batch, mapped, chunks=(1, 2, 7, T, T + 1, None))


# -- back-propagation through time


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_d_rtrl_on_one_group_is_back_propagation(recurrent, mapped):
    """With recurrent weights: of the network whose old values are constants where they enter an operation."""
    for network in ["four states", "alif"] if recurrent else ["ModelB", "Leak"]:
        oracle = problem_of(network).oracle()
        exact = oracle.bptt(problem_of(network).sequence)[1]
        cut = oracle.bptt(problem_of(network).sequence, cut=True)[1]
        ours = dict(Learner(problem_of(network, mapped=mapped), braintrace.D_RTRL, mapped).chunked(4))
        assert_close(ours, cut, 2e-5)
        if recurrent:
            with pytest.raises(AssertionError):
                assert_close(ours, exact, 1e-2)
        else:
            assert_close(ours, exact, 2e-5)


# -- losses, options and precisions


def weighted(steps, weights):
    return total([(None, jax.tree.map(lambda g, w=w: w * g, grads)) for w, (_, grads) in zip(weights, steps)])


@pytest.mark.parametrize("network, rule, mapped", [("lif-alif", "pp_prop", False), ("Chain", "D_RTRL", True)])
@pytest.mark.parametrize("loss", models.LOSSES)
def test_losses_that_read_parameters_and_states(loss, network, rule, mapped):
    make, theirs = RULES[rule]
    problem = problem_of(network, loss=loss, steps=5)
    expected = total(problem.oracle().online(theirs, problem.sequence)[0])
    learner = Learner(problem_of(network, mapped=mapped, loss=loss, steps=5), make, mapped)
    assert_close(dict(learner.chunked(2)), expected, 2e-5)


@pytest.mark.parametrize("rule", ["pp_prop", "D_RTRL"])
def test_options(rule):
    """A mask, chosen weights under keys of one's own, auxiliary data and a pytree of sequences, all at once."""
    steps, _ = oracle("lif", rule)
    learner = Learner(problem_of("lif"), RULES[rule][0])
    xs, targets = learner.problem.sequences()
    mask = np.array([1, 0, 0.5, 1, 0, 0, 2, 1, 1], np.float32)
    net = learner.problem.net
    chosen = {"in": net.layers[0].syn.comm.weight, "out": net.layers[1].W}

    def step_fn(s, t):
        out = learner.driver(s["x"])
        return ((out - s["rest"][0]) ** 2).sum(), {"out": out, "time": t}

    grads, losses, aux = learner.chunked(
        4,
        step_fn,
        ({"x": xs, "rest": (targets,)}, jnp.arange(T)),
        mask=jnp.asarray(mask),
        reduction="mean",
        weights=chosen,
        has_aux=True,
        return_value=True,
        loss_output="masked",
    )
    paths = {id(s): path for path, s in learner.inner.param_states.items()}
    expected = weighted(steps, mask / mask.sum())
    assert_close(dict(grads), {k: expected[paths[id(s)]] for k, s in chosen.items()}, 2e-5)
    np.testing.assert_allclose(losses, mask * np.array([loss for loss, _ in steps]), rtol=1e-5)
    np.testing.assert_array_equal(aux["time"], np.arange(T))
    np.testing.assert_allclose(((aux["out"] - targets) ** 2).sum((1, 2)), [loss for loss, _ in steps], rtol=1e-5)


@pytest.mark.parametrize("precision", ["float64", "float32-x64", "bfloat16"])
@pytest.mark.parametrize("network, rule", [("gru", "D_RTRL"), ("lstm", "pp_prop"), ("Chain", "EProp")])
def test_precisions(network, rule, precision):
    p, (make, theirs) = PRECISIONS[precision], RULES[rule]
    with p():
        problem = problem_of(network, steps=p.steps, dtype=p.dtype)
        learner = Learner(problem, make)
        expected = total(problem.oracle().online(theirs, problem.sequence)[0])
        grads = learner.chunked(2)
        assert_close(dict(grads), expected, p.tol)
        for path, state in learner.inner.param_states.items():
            assert jax.tree.map(jnp.result_type, grads[path]) == jax.tree.map(jnp.result_type, state.value)


# -- windows


@pytest.mark.parametrize(
    "network, rule, k",
    [
        ("gru", "pp_prop", 2),
        ("lif", "D_RTRL", 3),
        ("lif", "pp_prop", None),
        ("ReadsOld", "EProp", 2),
        ("ReadsOld", "D_RTRL", None),
    ],
)
def test_windows(network, rule, k):
    """Chunks of windows; without `chunk_size` every step is a window of its own."""
    theirs = RULES[rule][1]
    makes = {
        "pp_prop": lambda net: braintrace.pp_prop(net, 0.9, vjp_method="multi-step"),
        "D_RTRL": lambda net: braintrace.D_RTRL(net, vjp_method="multi-step"),
        "EProp": lambda net: braintrace.EProp(net, kappa_filter_decay=0.6, vjp_method="multi-step"),
    }
    problem = problem_of(network, steps=6)
    learner = Learner(problem, makes[rule])
    expected = total(problem.oracle().windows(theirs, problem.sequence, k or 1)[0])
    called = learner.called()

    def losses(xs, targets):
        return ((learner.driver(braintrace.MultiStepData(xs)) - targets) ** 2).sum((1, 2))

    for trace_chunk in (1, 2):
        grads = learner.chunked(trace_chunk, None if k is None else losses, chunk_size=k)
        assert_close(dict(grads), expected, 2e-5, f"chunks of {trace_chunk}")
        assert_same(learner.values(), called, 2e-5, f"values after chunks of {trace_chunk}")


# -- other rules and hooks: as the gradients of single calls, and another than that of the plain rule


def io_config(recursion="jacobian", **options):
    decay = {"none": (0.9, None)}.get(recursion, (0.9, 0.8))
    return braintrace.ETraceConfig("io_factorized", ("scalar_leak", recursion), decay=decay, **options)


def param_config(**options):
    return braintrace.ETraceConfig("per_param", **options)


class HalvedSignal(braintrace.pp_prop):
    def _get_update_aux(self):
        return jnp.asarray(0.5)

    def _compute_learning_signal(self, signals, args_plus_aux):
        leaves, half = args_plus_aux
        return [half * s * (1 + leaves[0].sum()) for s in signals]


class HalvedTrace(braintrace.D_RTRL):
    def _update_etrace_data(self, running_index, old_traces, *rest):
        old_traces = jax.tree.map(lambda e: 0.5 * e, old_traces)
        return super()._update_etrace_data(running_index, old_traces, *rest)


class HalvedGradients(braintrace.pp_prop):
    def _solve_weight_gradients(self, *args):
        return jax.tree.map(lambda g: 0.5 * g, super()._solve_weight_gradients(*args))


VARIANTS = {  # the learner, and the rule that it must not equal
    "random feedback": (
        lambda net: braintrace.pp_prop(net, config=io_config(learning_signal="random_feedback"), random_feedback_key=3),
        "pp_prop",
    ),
    "EProp, random feedback": (
        lambda net: braintrace.EProp(net, feedback="random", kappa_filter_decay=0.6, random_feedback_key=3),
        "EProp",
    ),
    "pp_prop, leak": (lambda net: braintrace.pp_prop(net, config=io_config("scalar_leak")), "pp_prop"),
    "pp_prop, none": (lambda net: braintrace.pp_prop(net, config=io_config("none")), "pp_prop"),
    "D_RTRL, leak": (
        lambda net: braintrace.D_RTRL(net, config=param_config(temporal_recursion="scalar_leak", decay=0.7)),
        "D_RTRL",
    ),
    "D_RTRL, none": (
        lambda net: braintrace.D_RTRL(net, config=param_config(temporal_recursion="none")),
        "D_RTRL",
    ),
    "D_RTRL, leak and filter": (
        lambda net: braintrace.D_RTRL(
            net, config=param_config(temporal_recursion="scalar_leak", decay=0.7, trace_filter="kappa", kappa=0.4)
        ),
        "D_RTRL",
    ),
    "own signal": (lambda net: HalvedSignal(net, 0.9), "pp_prop"),
    "own trace": (HalvedTrace, "D_RTRL"),
    "own gradients": (lambda net: HalvedGradients(net, 0.9), "pp_prop"),
}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, mapped):
    make, rule = VARIANTS[variant]
    learner = Learner(problem_of("lif", mapped=mapped), make, mapped)
    expected = learner.one_by_one()
    assert_close(dict(learner.chunked(4)), expected, 2e-5)
    with pytest.raises(AssertionError):
        assert_close(expected, total(oracle("lif", rule)[0]), 1e-2)


@pytest.mark.parametrize("engine", [braintrace.pp_prop, braintrace.D_RTRL])
def test_a_modulator_of_every_call(engine):
    learner = Learner(problem_of("ModelA"), modulated(engine))

    def step_fn(x, target):
        return ((learner.driver(x, modulator=jnp.sin(target)) - target) ** 2).sum()

    assert_close(dict(learner.chunked(4, step_fn)), learner.one_by_one(step_fn), 2e-5)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("engine", [braintrace.pp_prop, braintrace.D_RTRL])
def test_a_standing_modulator_scales_the_gradient(engine, mapped):
    learner = Learner(problem_of("ModelA", mapped=mapped), modulated(engine), mapped)
    learner.inner.modulator = 0.7
    first = dict(learner.chunked(4))
    assert_close(first, learner.one_by_one(), 2e-5)
    learner.inner.modulator = -1.4
    assert_close(dict(learner.chunked(4)), jax.tree.map(lambda g: -2 * g, first), 2e-5)


def modulated(engine):
    config = io_config if engine is braintrace.pp_prop else param_config
    return functools.partial(engine, config=config(learning_signal="modulatory"))


# -- what a step may do beside one plain call


def jitted(learner, x, target):
    out = brainstate.transform.jit(lambda x: learner.driver(x))(x)
    return ((out - target) ** 2).sum()


def twice(learner, x, target):
    learner.driver(0.5 * x)
    return learner.loss(x, target)


def in_a_loop(learner, x, target):
    return brainstate.transform.for_loop(lambda x: learner.loss(x, target), jnp.stack([0.5 * x, x])).sum()


def in_a_branch(learner, x, target):
    def skip(x, target):
        return jnp.zeros(())

    return brainstate.transform.cond(x.sum() > -1e3, learner.loss, skip, x, target)


STEPS = [(jitted, T), (twice, 2 * T), (in_a_loop, 2 * T), (in_a_branch, T)]


@pytest.mark.parametrize("rule", ["pp_prop", "D_RTRL"])
@pytest.mark.parametrize("step, count", STEPS)
def test_steps_that_are_no_single_plain_call(step, count, rule):
    learner = Learner(problem_of("ModelB"), RULES[rule][0])
    step_fn = functools.partial(step, learner)
    expected = learner.one_by_one(step_fn)
    after = learner.values()
    assert_close(dict(learner.chunked(4, step_fn)), expected, 2e-5)
    assert int(learner.inner.running_index.value) == count
    assert_same(learner.values(), after, 2e-5, step.__name__)


class Noisy(models.ModelB):
    """Units drop out, and an input-like state of its own counts the steps."""

    def __init__(self):
        super().__init__()
        self.drop = brainstate.nn.Dropout(0.5)
        self.count = brainstate.ShortTermState(jnp.zeros(()))

    def transition(self, x):
        self.count.value = self.count.value + 1
        super().transition(x * jnp.cos(self.count.value))
        return self.drop(self.h.value)

    def output(self, dropped):
        return dropped + self.c.value


@pytest.mark.parametrize("rule", ["pp_prop", "D_RTRL"])
def test_random_numbers_and_other_states_inside_and_outside_of_the_step(rule):
    def step_fn(x, target):
        keep = brainstate.random.rand(*target.shape) < 0.8
        return (jnp.where(keep, learner.driver(x) - target, 0.0) ** 2).sum()

    with brainstate.environ.context(fit=True):
        learner = Learner(Problem(lambda nn: [Noisy()], None, 2, steps=T), RULES[rule][0])
        brainstate.random.seed(7)
        expected = learner.one_by_one(step_fn)
        after, drawn = learner.values(), brainstate.random.rand()
        brainstate.random.seed(7)
        assert_close(dict(learner.chunked(4, step_fn)), expected, 2e-5)
        assert_same(learner.values(), after, 2e-5, "values")
        assert brainstate.random.rand() == drawn
        brainstate.random.seed(8)
        with pytest.raises(AssertionError):
            assert_close(dict(learner.chunked(4, step_fn)), expected, 1e-2)


@pytest.mark.parametrize("vmap", [False, True])
def test_a_learner_that_is_compiled_inside_of_jit(vmap):
    """As training scripts do; and without a jit around the driver."""
    problem = problem_of("gru", mapped=vmap)
    xs, targets = problem.sequences()

    def gradient(xs, targets):
        learner = braintrace.compile(problem.net, "d_rtrl", xs[0], batch_size=2, vmap=vmap)
        step_fn = lambda x, y: ((learner(x) - y) ** 2).sum()  # noqa: E731
        return dict(learner.etrace_grad(xs, targets, step_fn=step_fn, reduction="sum", trace_chunk=4))

    expected = total(oracle("gru", "D_RTRL")[0])
    assert_close(gradient(xs, targets), expected, 2e-5)
    assert_close(brainstate.transform.jit(gradient)(xs, targets), expected, 2e-5)


# -- every operation


@pytest.mark.parametrize("name, batch", operations.CASES)
def test_operations(name, batch):
    op, dense, xs, linear, weights, _ = operations.case(name, batch)
    c, steps = operations.oracle(dense, linear, weights)
    c = c[0] if batch is None else c
    learner = braintrace.pp_prop(operations.Layer(op, jnp.zeros(c.shape), weights), operations.DECAY)
    learner.compile_graph(xs[0])
    (gradient,) = learner.etrace_grad(
        xs, step_fn=lambda x: (learner(x) * c).sum(), reduction="sum", trace_chunk=2
    ).values()
    for a, b in zip(gradient, jax.tree.map(lambda *g: sum(g), *steps), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
