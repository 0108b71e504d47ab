"""What a chunk of `etrace_grad` may meet beside the plain calls of `test_gradients`: the sums of single calls again."""

import functools

import brainstate
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import test_operation_rules as operations
from helpers import assert_close, total
from models import Problem
from rules import Learner, problem_of, reference, same

import braintrace

pytestmark = pytest.mark.usefixtures("time_step")

T = 9
LIF = "lif-cuba", "leaky"


def lif(mapped=None):
    return problem_of(*LIF, steps=T, mapped=mapped)


# -- back-propagation through time


@pytest.mark.parametrize("mapped", [None, "by hand"])
@pytest.mark.parametrize(
    "model, readout, recurrent",
    [("ModelB", None, False), ("Leak", None, False), ("four states", None, True), ("alif-coba", "plain", True)],
)
def test_d_rtrl_on_one_group_is_back_propagation(model, readout, recurrent, mapped):
    """With recurrent weights: of the network whose old values are constants where they enter an operation."""
    problem = problem_of(model, readout, steps=T, mapped=mapped)
    oracle = problem.oracle()
    ours = dict(Learner(problem, "D_RTRL").chunked(4))
    assert_close(ours, oracle.bptt(problem.sequence, cut=True)[1], 2e-5)
    exact = oracle.bptt(problem.sequence)[1]
    if recurrent:
        with pytest.raises(AssertionError):
            assert_close(ours, exact, 1e-2)
    else:
        assert_close(ours, exact, 2e-5)


# -- options


@pytest.mark.parametrize("rule", ["pp_prop", "D_RTRL"])
def test_options(rule):
    """A mask, chosen weights under keys of one's own, auxiliary data and a pytree of sequences, all at once."""
    steps = reference(*LIF, rule=rule).steps
    learner = Learner(lif(), rule)
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
    expected = total(steps, mask / mask.sum())
    assert_close(dict(grads), {k: expected[paths[id(s)]] for k, s in chosen.items()}, 2e-5)
    np.testing.assert_allclose(losses, mask * np.array([loss for loss, _ in steps]), rtol=1e-5)
    np.testing.assert_array_equal(aux["time"], np.arange(T))
    np.testing.assert_allclose(((aux["out"] - targets) ** 2).sum((1, 2)), [loss for loss, _ in steps], rtol=1e-5)


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


class HalvedStates(braintrace.D_RTRL):
    def _assign_etrace_data(self, vals):
        super()._assign_etrace_data(jax.tree.map(lambda e: 0.5 * e, vals))


class HalvedReading(braintrace.pp_prop):
    def _get_etrace_data(self):
        return jax.tree.map(lambda e: 0.5 * e, super()._get_etrace_data())


class SignOfSignal(braintrace.D_RTRL):
    def _compute_learning_signal(self, signals, args_plus_aux):
        return [jnp.sign(s) for s in signals]


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
    "sign of the signal": (SignOfSignal, "D_RTRL"),
    "modulator": (lambda net: braintrace.ThreeFactor(net, modulator=0.3), "D_RTRL"),
    "own trace": (HalvedTrace, "D_RTRL"),
    "own states": (HalvedStates, "D_RTRL"),
    "own reading": (lambda net: HalvedReading(net, 0.9), "pp_prop"),
    "own gradients": (lambda net: HalvedGradients(net, 0.9), "pp_prop"),
}


@pytest.mark.parametrize("mapped", [None, "by hand"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, mapped):
    make, rule = VARIANTS[variant]
    learner = Learner(lif(mapped), make)
    steps, mask = learner.by_step(), np.resize([1.0, 0.0, -0.5, 2.0, 0.7], T)
    assert_close(dict(learner.chunked(4, mask=jnp.asarray(mask))), total(steps, mask), 2e-5)
    expected = total(steps)
    assert_close(dict(learner.chunked(4)), expected, 2e-5)
    with pytest.raises(AssertionError):
        assert_close(expected, total(reference(*LIF, rule=rule).steps), 1e-2)


@pytest.mark.parametrize("engine", [braintrace.pp_prop, braintrace.D_RTRL])
def test_a_modulator_of_every_call(engine):
    learner = Learner(problem_of("ModelA", steps=T), modulated(engine))

    def step_fn(x, target):
        return ((learner.driver(x, modulator=jnp.sin(target)) - target) ** 2).sum()

    assert_close(dict(learner.chunked(4, step_fn)), total(learner.by_step(step_fn)), 2e-5)


@pytest.mark.parametrize("mapped", [None, "by hand"])
@pytest.mark.parametrize("engine", [braintrace.pp_prop, braintrace.D_RTRL])
def test_a_standing_modulator_scales_the_gradient(engine, mapped):
    learner = Learner(problem_of("ModelA", steps=T, mapped=mapped), modulated(engine))
    learner.inner.modulator = 0.7
    first = dict(learner.chunked(4))
    assert_close(first, total(learner.by_step()), 2e-5)
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
    learner = Learner(problem_of("ModelB", steps=T), rule)
    step_fn = functools.partial(step, learner)
    expected = total(learner.by_step(step_fn))
    after = learner.values()
    assert_close(dict(learner.chunked(4, step_fn)), expected, 2e-5)
    assert int(learner.inner.running_index.value) == count
    same(learner.values(), after, 2e-5, step.__name__)


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
        learner = Learner(Problem(lambda nn: [Noisy()], None, 2, steps=T), rule)
        brainstate.random.seed(7)
        expected = total(learner.by_step(step_fn))
        after, drawn = learner.values(), brainstate.random.rand()
        brainstate.random.seed(7)
        assert_close(dict(learner.chunked(4, step_fn)), expected, 2e-5)
        same(learner.values(), after, 2e-5, "values")
        assert brainstate.random.rand() == drawn
        brainstate.random.seed(8)
        with pytest.raises(AssertionError):
            assert_close(dict(learner.chunked(4, step_fn)), expected, 1e-2)


@pytest.mark.parametrize("vmap", [False, True])
def test_a_learner_that_is_compiled_inside_of_jit(vmap):
    """As training scripts do; and without a jit around the driver."""
    problem = problem_of("gru", "linear", steps=T, mapped=vmap)
    xs, targets = problem.sequences()

    def gradient(xs, targets):
        learner = braintrace.compile(problem.net, "d_rtrl", xs[0], batch_size=2, vmap=vmap)
        step_fn = lambda x, y: ((learner(x) - y) ** 2).sum()  # noqa: E731
        return dict(learner.etrace_grad(xs, targets, step_fn=step_fn, reduction="sum", trace_chunk=4))

    expected = total(reference("gru", "linear", rule="D_RTRL").steps)
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
