"""Weights that are computed in another way at every step: by random masks, inputs, states, the number of the step.

The memory is position by position, so that D_RTRL is back-propagation through time; pp_prop says that it is not.
"""

import warnings

import brainevent
import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import braintrace

N_IN, N, T = 3, 4, 6
MATRIX = brainevent.CSR.fromdense(jnp.array([[1.0, 0.0, 2.0, 0.0], [0.0, 0.5, 0.0, 1.0], [1.5, 0.0, 0.0, -1.0]]))


class Net(brainstate.nn.Module):
    def __init__(self, row):
        super().__init__()
        self.of_input, shapes = ROWS[row]
        self.w = {
            k: brainstate.ParamState(jax.random.normal(jax.random.key(i), shape))
            for i, (k, shape) in enumerate(shapes.items())
        }

    def init_state(self, batch_size=None, **_):
        self.h = brainstate.HiddenState(jnp.zeros((N,) if batch_size is None else (batch_size, N)))
        self.gain = brainstate.ShortTermState(jnp.ones(()))
        self.kept = brainstate.ShortTermState(jnp.linspace(0.5, 1.0, N))

    def update(self, x):
        old = self.h.value
        self.gain.value = -0.8 * self.gain.value
        y = self.of_input(self, {k: w.value for k, w in self.w.items()}, x)
        self.h.value = jnp.tanh(0.8 * old + y)
        return jnp.stack([self.h.value, old])


def mask(shape):
    return brainstate.random.bernoulli(0.5, shape).astype(float)


W = {"w": (N_IN, N)}
ROWS = {  # what the memory gets, shapes of the parameters
    "random mask": (lambda m, w, x: braintrace.matmul(x, w["w"] * mask((N_IN, N))), W),
    "mean of the input": (lambda m, w, x: braintrace.matmul(x, w["w"] * x.mean()), W),
    "state": (lambda m, w, x: braintrace.matmul(x, w["w"] * m.gain.value), W),
    "number of the step": (lambda m, w, x: braintrace.matmul(x, w["w"] / (1.0 + brainstate.environ.get("i"))), W),
    "bias": (lambda m, w, x: braintrace.matmul(x, w["w"], w["b"] * m.gain.value), W | {"b": (N,)}),
    "weight and bias": (
        lambda m, w, x: braintrace.matmul(x, w["w"] * m.gain.value, w["b"] * x.mean() + 1.0),
        W | {"b": (N,)},
    ),
    "gain of each output": (lambda m, w, x: braintrace.matmul(x, w["g"] * m.gain.value * w["w"]), W | {"g": (N,)}),
    "twice": (
        lambda m, w, x: braintrace.matmul(x, w["w"] * m.gain.value) + braintrace.matmul(x, w["w"]),
        W,
    ),
    "element-wise": (lambda m, w, x: x[..., :1] + braintrace.element_wise(w["b"] * m.gain.value), {"b": (N,)}),
    "sparse": (
        lambda m, w, x: braintrace.sparse_matmul(x, w["d"] * mask((6,)), sparse_mat=MATRIX),
        {"d": (6,)},
    ),
    "sign of another one": (
        lambda m, w, x: braintrace.matmul(x, m.gain.value * w["w"] * (w["v"] > 0)),
        W | {"v": (N,)},
    ),
    "norm inside": (
        lambda m, w, x: braintrace.matmul(x, m.gain.value * w["w"], weight_fn=lambda w: w / jnp.linalg.norm(w)),
        W,
    ),
    "noise, norm inside": (
        lambda m, w, x: braintrace.matmul(
            x, w["w"] + 0.5 * brainstate.random.randn(N_IN, N), weight_fn=lambda w: w / jnp.linalg.norm(w)
        ),
        W,
    ),
    "noise, tanh inside": (
        lambda m, w, x: braintrace.matmul(x, w["w"] + brainstate.random.randn(N_IN, N), weight_fn=jnp.tanh),
        W,
    ),
    "noise, low rank": (
        lambda m, w, x: braintrace.lora_matmul(x, w["b"], w["a"] + brainstate.random.randn(2, N)),
        {"b": (N_IN, 2), "a": (2, N)},
    ),
    "element-wise, reversed": (
        lambda m, w, x: x[..., :1] + braintrace.element_wise(w["w"][::-1] * m.gain.value),
        {"w": (N,)},
    ),
    "hidden values": (
        lambda m, w, x: braintrace.matmul(x, w["w"] * jax.lax.stop_gradient(1.0 + m.h.value.mean())),
        W,
    ),
    "state that stays": (lambda m, w, x: braintrace.matmul(x, w["w"] * m.kept.value), W),
    "noise": (lambda m, w, x: braintrace.matmul(x, w["w"] + brainstate.random.randn(N_IN, N)), W),
    "norm": (
        lambda m, w, x: braintrace.matmul(x, m.gain.value * w["w"] / jnp.abs(w["w"]).sum(1, keepdims=True)),
        W,
    ),
    "einsum": (lambda m, w, x: braintrace.einsum("bi,ij->bj", x, w["w"] * m.gain.value), W),
}


INEXACT = ["norm", "norm inside", "noise, norm inside", "noise, low rank", "element-wise, reversed"]


def inputs(batch):
    return jax.random.normal(jax.random.key(7), (T, *([] if batch is None else [batch]), N_IN))


def loss_of(function, i, x):
    with brainstate.environ.context(i=i):
        return (function(x) ** 2).sum()


def online(row, rule, batch, driver, **options):
    net, xs = Net(row), inputs(batch)
    with brainstate.environ.context(i=jnp.zeros(())):
        learner = braintrace.compile(net, rule, xs[0], batch_size=batch, vmap=driver == "vmap", **options)
    step = lambda i, x: loss_of(learner, i, x)  # noqa: E731
    brainstate.random.seed(3)
    if driver != "steps":
        chunk = 4 if driver == "chunks" else None
        found = learner.etrace_grad(jnp.arange(float(T)), xs, step_fn=step, reduction="sum", trace_chunk=chunk)
    else:
        gradient = brainstate.transform.grad(step, learner.param_states)
        each = [gradient(i, x) for i, x in zip(jnp.arange(float(T)), xs)]
        found = jax.tree.map(lambda *g: sum(g), *each)
    return {k[-1]: v for k, v in found.items()}


def through_time(row, batch):
    net, xs = Net(row), inputs(batch)
    brainstate.nn.init_all_states(net, **({} if batch is None else {"batch_size": batch}))
    brainstate.random.seed(3)

    def whole():
        each = brainstate.transform.for_loop(lambda i, x: loss_of(net, i, x), jnp.arange(float(T)), xs)
        return each.sum()

    found = brainstate.transform.grad(whole, net.states(brainstate.ParamState))()
    return {k[-1]: v for k, v in found.items()}


def agree(found, expected, rtol):
    return all(np.allclose(found[k], expected[k], rtol=rtol, atol=1e-5 * abs(expected[k]).max()) for k in expected)


@pytest.mark.parametrize("row, batch, driver", [(r, 2, "steps") for r in ROWS if r not in INEXACT] + [
    ("random mask", 2, "chunks"), ("weight and bias", 2, "chunks"), ("gain of each output", 2, "whole"),
    ("sparse", 2, "whole"), ("element-wise", 2, "chunks"), ("twice", None, "steps"), ("state", None, "chunks"),
])  # fmt: skip
def test_traces_of_the_parameters_are_exact(row, batch, driver):
    with warnings.catch_warnings():
        warnings.simplefilter("error", braintrace.CompilationWarning)
        found = online(row, "d_rtrl", batch, driver)
    assert agree(found, through_time(row, batch), 1e-4)


def test_pp_prop_says_that_it_takes_the_past_as_the_present():
    with pytest.warns(braintrace.CompilationWarning, match="weight_varies.*'w.w'.*D_RTRL.*exact="):
        online("state", "pp_prop", 2, "steps", decay_or_rank=0.9)
    with pytest.warns(braintrace.CompilationWarning, match="weight_varies.*'w.w'.*D_RTRL.*exact="):
        online("noise, tanh inside", "pp_prop", 2, "steps", decay_or_rank=0.9)
    with warnings.catch_warnings():  # without a memory there is no past, or the way back is the same at every step
        warnings.simplefilter("error", braintrace.CompilationWarning)
        online("state", "immediate", 2, "steps")
        for row in ("noise", "state that stays"):
            online(row, "pp_prop", 2, "steps", decay_or_rank=0.9)


@pytest.mark.parametrize("row", ["hidden values", "mean of the input", "norm inside"])
def test_pp_prop_takes_the_same_past_in_chunks(row):
    """What meets a trace before a step meets it with the weight of this step."""
    with pytest.warns(braintrace.CompilationWarning, match="weight_varies"):
        by_steps, in_chunks = (online(row, "pp_prop", 2, way, decay_or_rank=0.9) for way in ("steps", "chunks"))
    assert agree(in_chunks, by_steps, 1e-4)


def test_hidden_values_in_a_weight_are_recurrence():
    """For a rule that sees it; for D_RTRL they enter the operation as its input does."""
    ROWS["recurrence"] = (lambda m, w, x: braintrace.matmul(x, w["w"] * (1.0 + 0.5 * m.h.value.mean())), W)
    try:
        assert agree(online("recurrence", braintrace.SnAp, None, "steps", n=N), through_time("recurrence", None), 1e-4)
        assert not agree(online("recurrence", "d_rtrl", None, "steps"), through_time("recurrence", None), 1e-2)
    finally:
        del ROWS["recurrence"]


@pytest.mark.parametrize("row", INEXACT)
def test_weights_without_exact_traces(row):
    """An entry of the parameter acts on several outputs, say, in another way at every step."""
    message = r"weight_varies.*'w\.\w'.*wrong gradient from earlier steps"
    with pytest.warns(braintrace.CompilationWarning, match=message):
        found = online(row, "d_rtrl", 2, "steps")
    assert not agree(found, through_time(row, 2), 1e-2)


def test_an_operation_for_samples_that_has_no_input():
    rows = braintrace.register_primitive(
        "rows",
        lambda w, *, n: jnp.broadcast_to(jnp.tanh(w), (n, *w.shape)),
        batched=True,
        x_invar_index=None,
        trainable_invars_fn=lambda params: {"weight": 0},
    )
    ROWS["rows"] = (lambda m, w, x: x[..., :1] + rows.bind(w["b"], n=2), {"b": (N,)})
    try:
        assert agree(online("rows", "d_rtrl", 2, "steps"), through_time("rows", 2), 1e-4)
    finally:
        del ROWS["rows"]
