"""Sums over a thousand steps in half precision, which stop growing (or overflow) where they are kept in it."""

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import braintrace

STEPS, KEEP = 1000, 0.99609375  # which bfloat16 holds exactly
DTYPES = [jnp.bfloat16, jnp.float16]


class Leaky(brainstate.nn.Module):
    """``h <- KEEP h + gain (x w + b)``, all parameters zero."""

    def __init__(self, dtype, gain):
        super().__init__()
        self.dtype, self.gain = dtype, gain
        self.w = brainstate.ParamState(jnp.zeros((1, 1), dtype))
        self.b = brainstate.ParamState(jnp.zeros(1, dtype))

    def init_state(self, batch_size=None, **_):
        self.h = brainstate.HiddenState(jnp.zeros((1,) if batch_size is None else (batch_size, 1), self.dtype))

    def update(self, x):
        y = braintrace.matmul(x, self.w.value, self.b.value)
        self.h.value = KEEP * self.h.value + (y if self.gain is None else self.gain * jnp.cos(x) * y)
        return self.h.value


def pp_prop(df, alpha=0.999):
    x = f = 0.0
    for n in range(STEPS):
        x, f = alpha * x + 1, alpha * KEEP * f + (1 - alpha) * df
        yield x * f / (1 - alpha ** (n + 1))


def d_rtrl(df, kappa=0.0):
    trace = filtered = 0.0
    for _ in range(STEPS):
        trace = KEEP * trace + df
        filtered = kappa * filtered + trace
        yield filtered


RULES = {  # options of the learner; the gradient of every step for the input 1 and the loss h
    braintrace.pp_prop: (dict(decay_or_rank=0.999), pp_prop),
    braintrace.D_RTRL: ({}, d_rtrl),
    braintrace.EProp: (dict(kappa_filter_decay=0.99), lambda df: d_rtrl(df, 0.99)),
    braintrace.OSTLRecurrent: ({}, d_rtrl),
    braintrace.SnAp: (dict(n=2), d_rtrl),
}
DRIVES = ["steps", "chunks", "mapped"]


@pytest.mark.filterwarnings("ignore:.*snap_pattern")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("gain", [None, 0.5])  # a trace that factorises, and one that does not
@pytest.mark.parametrize("rule", RULES)
def test_traces_go_on_growing(rule, gain, drive, dtype):
    options, truth = RULES[rule]
    expected = list(truth(1.0 if gain is None else gain * np.cos(1.0)))
    xs = jnp.ones((STEPS, 2, 1), dtype)
    mapped = drive == "mapped"
    learner = braintrace.compile(Leaky(dtype, gain), rule, xs[0], batch_size=2, vmap=mapped, **options)
    if drive == "steps":
        brainstate.transform.for_loop(learner, xs[1:])
        found = brainstate.transform.grad(lambda: learner(xs[0])[0].sum(), learner.param_states)()
        expected = expected[-1]
    else:
        found = learner.etrace_grad(xs, step_fn=lambda x: learner(x)[0].sum())
        expected = np.mean(expected)
    for gradient in found.values():
        assert gradient.dtype == dtype
        np.testing.assert_allclose(np.ravel(gradient.astype(np.float32)), expected, rtol=1e-2)
    traces = [s.value for s in learner.states(braintrace.EligibilityTrace).values()]
    assert {leaf.dtype for leaf in jax.tree.leaves(traces)} == {jnp.dtype(jnp.float32)}


def test_a_trace_dtype_that_is_asked_for_is_kept():
    xs = jnp.ones((STEPS, 1), jnp.bfloat16)
    learner = braintrace.compile(Leaky(jnp.bfloat16, None), "d_rtrl", xs[0], trace_dtype=jnp.bfloat16)
    brainstate.transform.for_loop(learner, xs)
    (trace,) = learner.etrace_bwg.values()
    assert {v.dtype for v in trace.value.values()} == {jnp.dtype(jnp.bfloat16)}
    assert float(trace.value["weight"][0, 0, 0]) < 200  # where 251 is right


@pytest.mark.filterwarnings("ignore:.*snap_pattern")
@pytest.mark.parametrize("rule", [r for r in RULES if r is not braintrace.pp_prop])
def test_traces_in_half_precision_under_strict_promotion(rule):
    options, xs = RULES[rule][0], jax.random.normal(jax.random.key(0), (4, 2, 3))

    def gradients():
        with brainstate.random.seed_context(0):
            model = braintrace.nn.GRUCell(3, 4)
        learner = braintrace.compile(model, rule, xs[0], batch_size=2, trace_dtype=jnp.bfloat16, **options)
        loss = lambda x: jnp.square(learner(x)).sum()  # noqa: E731
        step = brainstate.transform.grad(loss, model.states(brainstate.ParamState))
        steps = [step(x) for x in xs]
        learner.etrace_evolve(xs)
        return steps, learner.etrace_grad(xs, step_fn=loss, loss_output="scalar")

    expected = gradients()
    with jax.numpy_dtype_promotion("strict"):
        found = gradients()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts(dtype):
    ones = jnp.ones(1, dtype)
    part, smooth = braintrace.KappaFilter(0 * ones, 0.999), braintrace.GradExpon({"w": ones}, 0.999)

    def step(x):
        part.update(x)
        smooth.update({"w": x})

    brainstate.transform.for_loop(step, jnp.broadcast_to(ones, (STEPS, 1)))
    left = 1 - 0.999**STEPS
    np.testing.assert_allclose(part.value, left, rtol=1e-2)
    np.testing.assert_allclose(smooth.gradients.value["w"], left / 0.001, rtol=1e-2)
