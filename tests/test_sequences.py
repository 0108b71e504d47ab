"""Whole sequences: `etrace_grad` and `etrace_evolve` against the oracle and against the user's own loop."""

import gc
import warnings
from itertools import product

import brainstate
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from brainstate import HiddenState
from helpers import PRECISIONS, PPProp, assert_close, total
from models import LOSSES, SMALL, Problem
from rules import check, problem_of

import braintrace

pytestmark = pytest.mark.usefixtures("time_step")

PAIRS = [("gru", "linear"), ("lif-alif", "leaky"), ("alif-coba", "leaky"), ("ReadsOld", None), ("Beside", "leaky")]


def step_fn(problem, learner):
    return lambda x, target: problem.loss(problem.net, learner, x, target)


def hidden(net):
    return {path: state.value for path, state in net.states(HiddenState).items()}


# -- the same sum, however it is driven


@pytest.mark.parametrize(
    "model, readout, loss",
    [(*pair, models.squares) for pair in PAIRS] + list(product(["gru", "lif-alif"], ["leaky"], LOSSES)),
)
def test_whole_sequence_is_the_oracle(model, readout, loss):
    check(problem_of(model, readout, loss=loss), chunks=[None], silent=True)


def by_loop(problem, learner):
    return total(problem.online(learner))


def by_driver(problem, learner):
    return learner.etrace_grad(*problem.sequences(), step_fn=step_fn(problem, learner), reduction="sum")


def by_jitted_driver(problem, learner):
    return brainstate.transform.jit(
        lambda *xs: learner.etrace_grad(*xs, step_fn=step_fn(problem, learner), reduction="sum")
    )(*problem.sequences())


def by_two_drivers(problem, learner, at=2):
    parts = [[x[:at] for x in problem.sequences()], [x[at:] for x in problem.sequences()]]
    f = step_fn(problem, learner)
    return total([(None, dict(learner.etrace_grad(*xs, step_fn=f, reduction="sum"))) for xs in parts])


def by_driver_then_loop(problem, learner, at=3):
    head = learner.etrace_grad(
        *(x[:at] for x in problem.sequences()), step_fn=step_fn(problem, learner), reduction="sum"
    )
    step = problem.step(learner)
    return total([(None, dict(head))] + [(None, dict(step(*args)[0])) for args in problem.sequence[at:]])


def by_loop_then_driver(problem, learner, at=1):
    step = problem.step(learner)
    head = [(None, dict(step(*args)[0])) for args in problem.sequence[:at]]
    tail = learner.etrace_grad(
        *(x[at:] for x in problem.sequences()), step_fn=step_fn(problem, learner), reduction="sum"
    )
    return total([*head, (None, dict(tail))])


def by_scan(problem, learner):
    """The user's own `scan` over the gradient of a step."""
    step = brainstate.transform.grad(
        lambda *args: problem.loss(problem.net, learner, *args), learner.param_states, return_value=True
    )
    stacked, _ = brainstate.transform.for_loop(lambda *args: step(*args), *problem.sequences())
    return jax.tree.map(lambda g: g.sum(0), stacked)


WAYS = [by_loop, by_driver, by_jitted_driver, by_two_drivers, by_driver_then_loop, by_loop_then_driver, by_scan]


@pytest.mark.parametrize("model, readout", PAIRS[1:3])
def test_ways_to_drive(model, readout):
    """Every way gives the oracle's sum and leaves the learner where the others leave it, ready for one more step."""
    problem = problem_of(model, readout, steps=6)
    *problem.sequence, last = problem.sequence
    expected = total(problem.oracle().online(PPProp(0.9), problem.sequence)[0])
    (*_, (_, one_more)), after = problem.oracle().online(PPProp(0.9), [*problem.sequence, last])
    learner = problem.learner()
    for way in WAYS:
        brainstate.nn.reset_all_states(problem.net, problem.batch)
        learner.reset_state()
        assert_close(dict(way(problem, learner)), expected, what=way.__name__)
        assert int(learner.running_index.value) == len(problem.sequence), way.__name__
        assert_close(dict(problem.step(learner)(*last)[0]), one_more, what=f"{way.__name__}, one more step")
        assert_close(hidden(problem.net), {path: after[path] for path in hidden(problem.net)}, what=way.__name__)


@pytest.mark.parametrize("way", [by_loop, by_scan, by_driver])
@pytest.mark.parametrize("dtype", ["bool", "int32", "uint8"])
@pytest.mark.parametrize("batch", [None, 2])
def test_integer_spikes_leave_float_traces(dtype, way, batch):
    problem = problem_of("ModelA", None, batch, kind=dtype)
    floats = [(x.astype(jnp.float32), target) for x, target in problem.sequence]
    learner = problem.learner()
    assert all(x.value.dtype == jnp.float32 for x in learner.etrace_xs.values())
    assert_close(dict(way(problem, learner)), total(problem.oracle().online(PPProp(0.9), floats)[0]))


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32-x64", "float64"])
@pytest.mark.parametrize("way", [by_loop, by_driver])
def test_a_model_is_trained_in_its_own_dtype(precision, way):
    p = PRECISIONS[precision]
    with p():
        problem = problem_of("ModelB", None, steps=p.steps, dtype=p.dtype)
        ours = dict(way(problem, problem.learner()))
        assert {x.dtype for x in jax.tree.leaves([ours, hidden(problem.net)])} == {jnp.dtype(p.dtype)}
        assert_close(ours, total(problem.oracle().online(PPProp(0.9), problem.sequence)[0]), p.tol)


@pytest.mark.parametrize("model, readout", [("gru", "linear"), ("alif-coba", "leaky"), ("Beside", None)])
def test_mapped_learner(model, readout):
    check(problem_of(model, readout, mapped="compile"), chunks=[None], silent=True)


def test_one_step():
    problem = problem_of("lstm", "linear", steps=1)
    learner = problem.learner()
    grads = learner.etrace_grad(*problem.sequences(), step_fn=step_fn(problem, learner))
    assert_close(dict(grads), problem.oracle().bptt(problem.sequence)[1])


def test_pytree_sequences():
    problem = problem_of("gru", "linear")
    xs, targets = problem.sequences()
    learner = problem.learner()
    grads = learner.etrace_grad(
        {"x": xs, "rest": (targets,)},
        jnp.arange(len(xs)),
        step_fn=lambda s, t: (t + 1) * problem.loss(problem.net, learner, s["x"], s["rest"][0]),
        reduction="sum",
    )
    steps, _ = problem.oracle().online(PPProp(0.9), problem.sequence)
    assert_close(dict(grads), total(steps, range(1, 6)))


# -- mask, reduction, what is returned

MASKS = [None, [1, 1, 0, 1, 0], [0, 0, 0, 0, 1], [0.5, -1, 0, 2, 0.25], [0.1, 0, 0.2, 0, 0], [0, 0, 0, 0, 0]]


@pytest.fixture(scope="module")
def reference():
    """The oracle's steps for the rows below."""
    with brainstate.environ.context(dt=1.0):
        problem = problem_of("vanilla", "linear")
        return problem.oracle().online(PPProp(0.9), problem.sequence)[0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mask", MASKS)
def test_mask_and_reduction(mask, reduction, reference):
    problem = problem_of("vanilla", "linear")
    learner = problem.learner()
    weights = np.ones(5) if mask is None else np.array(mask)
    scale = 1 / max(weights.sum(), 1) if reduction == "mean" else 1.0
    raw = np.array([loss for loss, _ in reference])
    expected = total(reference, scale * weights)
    options = {} if mask is None else {"mask": jnp.array(mask, jnp.float32)}
    for output, losses in [
        (None, None),
        ("per_step", raw),
        ("masked", raw * weights),
        ("scalar", scale * (raw * weights).sum()),
    ]:
        brainstate.nn.reset_all_states(problem.net, 2)
        learner.reset_state()
        keywords = options if output is None else options | {"return_value": True, "loss_output": output}
        result = learner.etrace_grad(
            *problem.sequences(), step_fn=step_fn(problem, learner), reduction=reduction, **keywords
        )
        if output is not None:
            result, values = result
            np.testing.assert_allclose(values, losses, rtol=1e-5, atol=1e-6)
        assert_close(dict(result), expected)


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("return_value", [False, True])
def test_results(has_aux, return_value, reference):
    problem = problem_of("vanilla", "linear")
    learner = problem.learner()

    def f(x, target):
        out = learner(x)
        loss = ((out - target) ** 2).sum()
        return (loss, {"out": out, "norm": jnp.abs(out).sum()}) if has_aux else loss

    result = learner.etrace_grad(*problem.sequences(), step_fn=f, has_aux=has_aux, return_value=return_value)
    if has_aux or return_value:
        result, *rest = result
        assert len(rest) == has_aux + return_value
        if return_value:
            np.testing.assert_allclose(rest[0], [loss for loss, _ in reference], rtol=1e-5)
        if has_aux:
            assert rest[-1]["out"].shape == (5, 2, models.N_OUT) and rest[-1]["norm"].shape == (5,)
            losses = ((rest[-1]["out"] - problem.sequences()[1]) ** 2).sum((1, 2))
            np.testing.assert_allclose(losses, [loss for loss, _ in reference], rtol=1e-5)
    assert_close(dict(result), total(reference, [1 / 5] * 5))


def test_weights(reference):
    """Only the states asked for, under the keys they are given by."""
    problem = problem_of("vanilla", "linear")
    learner = problem.learner()
    chosen = {"gate": learner.param_states["layers", 0, "W", "weight"], "out": problem.net.layers[1].weight}
    grads = learner.etrace_grad(
        *problem.sequences(), step_fn=step_fn(problem, learner), weights=chosen, reduction="sum"
    )
    every = total(reference)
    expected = {"gate": every["layers", 0, "W", "weight"], "out": every["layers", 1, "weight"]}
    assert_close(dict(grads), expected)


# -- windows


WINDOWS = [
    ("gru", "linear", 2, 2),
    ("gru", "linear", 2, 6),
    *(("ModelB", None, 2, k) for k in (1, 2, 3, 6)),
    ("alif-coba", "leaky", 2, 3),
    ("ModelA", None, None, 2),
]


@pytest.mark.parametrize("model, readout, batch, k", WINDOWS)
def test_windows(model, readout, batch, k):
    """Back-propagation inside a window, the trace at its entry for what was before; one window is BPTT."""
    problem = problem_of(model, readout, batch, steps=6)
    tol = 1e-5 if batch is None else 2e-5
    learner, ((_, grads), *_) = check(problem, chunks=[None], window=k, tol=tol, silent=True)
    if k == 6:
        assert_close(grads, problem.oracle().bptt(problem.sequence)[1], tol)
    if k > 1:
        mask = jnp.array([1.0, 1.0, 0.5, 1.0, 0.0, 2.0])
        grads = learner.chunked(None, learner.window_losses, chunk_size=k, mask=mask)
        problem.sequence = [(*args, m) for args, m in zip(problem.sequence, mask)]
        problem.loss = lambda net, call, x, target, m: m * models.squares(net, call, x, target)
        assert_close(dict(grads), total(problem.oracle().windows(PPProp(0.9), problem.sequence, k)[0]), tol)


# -- etrace_evolve


@pytest.mark.parametrize(
    "vjp_method, k", [("single-step", None), ("single-step", 3), ("multi-step", 1), ("multi-step", 2)]
)
def test_evolve(vjp_method, k):
    """Everything advances, nothing is differentiated: the next gradient is that after as many steps."""
    problem = problem_of("lstm", "leaky", steps=7)
    *problem.sequence, last = problem.sequence
    learner = problem.learner(vjp_method=vjp_method)
    xs = problem.sequences()[0]
    outputs = learner.etrace_evolve(xs, chunk_size=k, return_outputs=True)
    assert outputs.shape == ((6, 2, 2) if k in (None, 1) else (6 // k, k, 2, 2))
    assert int(learner.running_index.value) == 6
    problem.sequence.append(last)
    if vjp_method == "single-step":
        steps, _ = problem.oracle().online(PPProp(0.9), problem.sequence)
    else:
        steps, _ = problem.oracle().windows(PPProp(0.9), problem.sequence, 1)
    assert_close(dict(problem.step(learner)(*last)[0]), steps[-1][1], 2e-5)
    targets = jnp.stack([target for _, target in problem.sequence[:-1]])
    losses = ((outputs.reshape(6, 2, 2) - targets) ** 2).sum((1, 2))
    np.testing.assert_allclose(losses, np.ravel([loss for loss, _ in steps[:-1]]), rtol=1e-5)


def test_evolve_returns_nothing_by_default_and_takes_a_step_fn():
    problem = problem_of("gru", "linear")
    learner = problem.learner()
    xs, targets = problem.sequences()
    assert learner.etrace_evolve(xs) is None
    brainstate.nn.reset_all_states(problem.net, 2)
    learner.reset_state()
    squares = learner.etrace_evolve(
        xs, targets, step_fn=lambda x, y: {"loss": ((learner(x) - y) ** 2).sum()}, return_outputs=True
    )
    steps, _ = problem.oracle().online(PPProp(0.9), problem.sequence)
    np.testing.assert_allclose(squares["loss"], [loss for loss, _ in steps], rtol=1e-5)


# -- errors: (what is wrong, keywords and sequences, exception). `f` is a good step_fn, `x` a good sequence.

ROWS = [
    ("no sequences", lambda g, f, x: g(step_fn=f), ValueError),
    ("empty pytree", lambda g, f, x: g({}, step_fn=f), ValueError),
    ("scalar leaf", lambda g, f, x: g(x, 1.0, step_fn=lambda x, s: f(x)), ValueError),
    ("unequal lengths", lambda g, f, x: g(x, x[:3], step_fn=lambda x, s: f(x)), ValueError),
    ("no time step", lambda g, f, x: g(x[:0], step_fn=f), ValueError),
    ("chunk_size 0", lambda g, f, x: g(x, step_fn=f, chunk_size=0), ValueError),
    ("chunk_size not dividing", lambda g, f, x: g(x, step_fn=f, chunk_size=4), ValueError),
    ("chunk_size bool", lambda g, f, x: g(x, step_fn=f, chunk_size=True), TypeError),
    ("chunk_size NumPy", lambda g, f, x: g(x, step_fn=f, chunk_size=np.int64(2)), TypeError),
    ("chunk_size float", lambda g, f, x: g(x, step_fn=f, chunk_size=2.0), TypeError),
    ("wrapped, several", lambda g, f, x: g(braintrace.MultiStepData(x), step_fn=f), TypeError),
    ("wrapped, single", lambda g, f, x: g({"a": braintrace.SingleStepData(x)}, step_fn=f), TypeError),
]
GRAD_ROWS = [
    ("no step_fn", lambda g, f, x: g(x), TypeError),
    ("mask shape", lambda g, f, x: g(x, step_fn=f, mask=jnp.ones(3)), ValueError),
    ("mask rank", lambda g, f, x: g(x, step_fn=f, mask=jnp.ones((6, 1))), ValueError),
    ("reduction", lambda g, f, x: g(x, step_fn=f, reduction="max"), ValueError),
    ("loss_output", lambda g, f, x: g(x, step_fn=f, return_value=True, loss_output="all"), ValueError),
    ("loss not scalar", lambda g, f, x: g(x, step_fn=lambda x: f(x) * jnp.ones(3)), ValueError),
]
WINDOW_ROWS = [
    ("window loss not (k,)", lambda g, f, x: g(x, step_fn=lambda w: f(w).sum(), chunk_size=2), ValueError),
    ("window loss too wide", lambda g, f, x: g(x, step_fn=lambda w: f(w)[:, None], chunk_size=2), ValueError),
]
IDS = {"ids": lambda value: value if isinstance(value, str) else ""}


@pytest.fixture(scope="module", params=["single-step", "multi-step"])
def small(request):
    problem = Problem(SMALL["ModelA"], steps=6)
    return problem.learner(vjp_method=request.param), problem.sequences()[0]


@pytest.mark.parametrize("what, call, error", ROWS, **IDS)
def test_errors_of_both_drivers(what, call, error, small):
    learner, xs = small
    for drive in (learner.etrace_grad, learner.etrace_evolve):
        with pytest.raises(error):
            call(drive, lambda x: learner(x).sum(), xs)


@pytest.mark.parametrize("what, call, error", GRAD_ROWS, **IDS)
def test_errors_of_etrace_grad(what, call, error, small):
    learner, xs = small
    with pytest.raises(error):
        call(learner.etrace_grad, lambda x: learner(x).sum(), xs)


@pytest.mark.parametrize("what, call, error", WINDOW_ROWS, **IDS)
def test_errors_of_windows(what, call, error):
    problem = Problem(SMALL["ModelA"], steps=6)
    learner = problem.learner(vjp_method="multi-step")
    with pytest.raises(error):
        call(learner.etrace_grad, lambda w: learner(braintrace.MultiStepData(w)).sum(-1), problem.sequences()[0])


def test_windows_need_multi_step():
    problem = Problem(SMALL["ModelA"], steps=6)
    learner, (xs, _) = problem.learner(), problem.sequences()
    with pytest.raises(ValueError, match="multi-step"):
        learner.etrace_grad(xs, step_fn=lambda w: learner(braintrace.MultiStepData(w)).sum(-1), chunk_size=2)


def test_windows_are_refused_under_vmap():
    problem = Problem(SMALL["ModelA"], steps=6)
    xs = jnp.stack([problem.sequences()[0]] * 2, axis=1)
    options = {"batch_size": 2, "vmap": True, "decay_or_rank": 0.9, "vjp_method": "multi-step"}
    mapped = braintrace.compile(problem.net, braintrace.pp_prop, xs[0], **options)
    for drive in (mapped.etrace_grad, mapped.etrace_evolve):
        with pytest.raises(ValueError):
            drive(xs, step_fn=lambda w: mapped(braintrace.MultiStepData(w)).sum((1, 2)), chunk_size=2)


def test_drivers_need_a_compiled_graph():
    problem = Problem(SMALL["ModelA"])
    learner = braintrace.pp_prop(problem.net, 0.9)
    xs, _ = problem.sequences()
    for drive in (learner.etrace_grad, learner.etrace_evolve):
        with pytest.raises(ValueError, match="compile_graph"):
            drive(xs, step_fn=lambda x: learner(x).sum())


# -- outside of any transformation


@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.parametrize("driver", ["etrace_grad", "etrace_evolve"])
def test_calls_outside_of_jit_leave_nothing_and_are_warned_about_once(driver, vmap):
    x = jnp.ones((2, 3))
    cell = braintrace.nn.ValinaRNNCell(3, 4)
    learner = braintrace.compile(cell, "pp_prop", x, batch_size=2, vmap=vmap, decay_or_rank=0.9)
    held = []

    def call(xs=jnp.ones((5, *x.shape))):
        getattr(learner, driver)(xs, step_fn=lambda x: learner(x).sum())

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        for number in range(5):
            call()
            gc.collect()
            held.append(sum(type(o).__name__ == "JaxprEqn" for o in gc.get_objects()))
            assert len(shown) == (number >= 2)
        brainstate.transform.jit(call)()
    assert held[1] == held[2] == held[4]
    assert (shown[0].category, shown[0].filename) == (braintrace.CompilationWarning, __file__)
    assert "brainstate.transform.jit" in str(shown[0].message)


def test_calls_inside_of_jit_are_not_warned_about():
    learner = braintrace.compile(braintrace.nn.ValinaRNNCell(3, 4), "pp_prop", jnp.ones(3), decay_or_rank=0.9)
    run = brainstate.transform.jit(lambda xs: learner.etrace_evolve(xs))
    with warnings.catch_warnings():
        warnings.simplefilter("error", braintrace.CompilationWarning)
        for length in (2, 3, 4, 5):
            run(jnp.ones((length, 3)))


def test_a_mapped_learner_answers_as_its_learner_does():
    x = jnp.ones((4, 2))
    mapped = braintrace.compile(braintrace.nn.GRUCell(2, 3), "pp_prop", x, batch_size=4, vmap=True, decay_or_rank=0.9)
    inner = mapped.module
    assert mapped.graph is inner.graph and mapped.report.counts == inner.report.counts
    for name in ("param_states", "hidden_states"):
        ours, theirs = getattr(mapped, name), getattr(inner, name)
        assert list(ours) == list(theirs) and all(ours[p] is theirs[p] for p in ours)
    mapped(x)
    traces = jax.tree.leaves(mapped.get_etrace_of(("Wz", "weight")))
    assert all(t.shape[0] == 4 for t in traces) and any(np.any(t) for t in traces)
    mapped.reset_state()
    assert not any(np.any(t) for t in jax.tree.leaves(mapped.get_etrace_of(("Wz", "weight"))))
    assert not np.any(inner.running_index.value)


@pytest.mark.parametrize("rule", ["pp_prop", "d_rtrl", "hybrid"])
def test_a_step_that_reads_the_traces_finds_those_of_its_time(rule):
    def learner_of():
        brainstate.random.seed(0)
        options = {} if rule == "d_rtrl" else {"decay_or_rank": 0.9}
        return braintrace.compile(braintrace.nn.GRUCell(3, 4), rule, xs[0], batch_size=2, **options)

    def trace_of(learner):
        return jax.tree.map(jnp.sum, learner.get_etrace_of(("Wz", "weight")))

    xs = jax.random.normal(jax.random.key(0), (7, 2, 3))
    one, whole = learner_of(), learner_of()
    each = [(one(x), trace_of(one))[1] for x in xs]
    _, found = whole.etrace_grad(xs, step_fn=lambda x: ((whole(x) ** 2).sum(), trace_of(whole)), has_aux=True)
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, *each)


class Refractory(brainstate.nn.Module):
    """A counter of integers, or a flag, says which units rest; all memory is position by position."""

    def __init__(self, dtype):
        super().__init__()
        self.w, self.dtype = brainstate.ParamState(2 * jax.random.normal(jax.random.key(1), (3, 4))), dtype

    def init_state(self, batch_size=None, **_):
        self.v = HiddenState(jnp.zeros((batch_size, 4)))
        self.rest = HiddenState(jnp.zeros((batch_size, 4), self.dtype))

    def update(self, x):
        drive = braintrace.matmul(x, self.w.value)
        self.v.value = jnp.where(self.rest.value > 0, 0.5 * self.v.value, jnp.tanh(0.9 * self.v.value + drive))
        self.rest.value = (self.v.value > 0.4).astype(self.dtype)
        return self.v.value


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_windows_of_a_model_with_integers_in_its_state(dtype):
    xs = jax.random.normal(jax.random.key(2), (6, 2, 3))
    net = Refractory(dtype)
    learner = braintrace.compile(net, "d_rtrl", xs[0], batch_size=2, vjp_method="multi-step")
    found = learner.etrace_grad(
        xs, chunk_size=2, reduction="sum", step_fn=lambda x: (learner(braintrace.MultiStepData(x)) ** 2).sum((1, 2))
    )
    brainstate.nn.init_all_states(net, batch_size=2)
    loss = lambda: brainstate.transform.for_loop(lambda x: (net(x) ** 2).sum(), xs).sum()  # noqa: E731
    exact = brainstate.transform.grad(loss, net.states(brainstate.ParamState))()
    assert_close(dict(found), exact)


# -- parameters that are not one value for all samples and steps


class Squared(brainstate.nn.Module):
    """h <- h / 2 + x w^2; the trace of w^2 meets the way back to the w of its step."""

    def __init__(self, w=0.5):
        super().__init__()
        self.w = brainstate.ParamState(jnp.full((1, 3), w))

    def init_state(self, **_):
        self.h = HiddenState(jnp.zeros(3))

    def update(self, x):
        self.h.value = 0.5 * self.h.value + braintrace.matmul(x, self.w.value**2)
        return self.h.value


def test_a_step_that_changes_a_parameter():
    net, xs = Squared(), jnp.ones((4, 1))
    learner = braintrace.compile(net, "d_rtrl", xs[0])

    def decays(x):
        loss = learner(x).sum()
        net.w.value = 0.5 * net.w.value
        return loss

    (found,) = learner.etrace_grad(xs, step_fn=decays, reduction="sum").values()
    # Traces 1, 1.5, 1.75, 1.875 and parameters 1/2, 1/4, 1/8, 1/16, whose squares have the derivatives 2 w.
    np.testing.assert_allclose(found, np.full((1, 3), 1.0 + 0.75 + 0.4375 + 0.234375), rtol=1e-6)
    np.testing.assert_allclose(net.w.value, 0.5 / 16)


@pytest.mark.parametrize("rule, options", [("d_rtrl", {}), ("pp_prop", dict(decay_or_rank=0.9))])
def test_an_ensemble(rule, options):
    """Members with parameters of their own, one sequence for all."""
    xs, sizes = brainstate.random.randn(5, 1), [0.3, 0.5, -0.8]
    made = {}

    @brainstate.transform.vmap_new_states(state_tag="member", axis_size=len(sizes))
    def initialise():
        made["net"] = Squared()
        made["learner"] = braintrace.compile(made["net"], rule, xs[0], **options)

    initialise()
    made["net"].w.value *= 2 * jnp.array(sizes)[:, None, None]
    mapped = braintrace.ETraceVmap(made["learner"], vmap_states="member", in_axes=None, axis_size=len(sizes))
    (found,) = mapped.etrace_grad(xs, step_fn=lambda x: jnp.sin(mapped(x)).sum(), reduction="sum").values()
    mapped.etrace_evolve(xs)
    for member, w in zip(found, sizes, strict=True):
        alone = braintrace.compile(Squared(w), rule, xs[0], **options)
        (expected,) = alone.etrace_grad(xs, step_fn=lambda x: jnp.sin(alone(x)).sum(), reduction="sum").values()  # noqa: B023
        np.testing.assert_allclose(member, expected, rtol=1e-5)
    assert mapped.module.running_index.value.tolist() == [2 * len(xs)] * len(sizes)


def test_a_state_that_nothing_reads_has_no_gradient():
    learner = braintrace.compile(Squared(), "d_rtrl", jnp.ones(1))
    other = {"other": brainstate.ParamState(jnp.ones(2))}
    with pytest.raises(ValueError, match=r"does not read.*\['other'\].*learner.param_states"):
        learner.etrace_grad(jnp.ones((4, 1)), step_fn=lambda x: learner(x).sum(), weights=other)
