"""One operation for all gates of a cell: its output has several entries for every unit."""

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate import HiddenState, ParamState

import braintrace

N_IN, N, STEPS, BATCH = 2, 3, 5, 2


def by_split(y):
    return jnp.split(y, 4, -1)


def by_slices(y):
    return [y[..., i * N : (i + 1) * N] for i in range(4)]


def by_reshape(y):
    y = y.reshape(*y.shape[:-1], 4, N)
    return [y[..., i, :] for i in range(4)]


def interleaved(y):
    y = y.reshape(*y.shape[:-1], N, 4)
    return [y[..., i] for i in range(4)]


CUTS = [by_split, by_slices, by_reshape, interleaved]


class LSTM(brainstate.nn.Module):
    """Fused where `cut` is given; gates and weights in the same order otherwise."""

    def __init__(self, weight, bias, cut=None):
        super().__init__()
        self.cut = cut
        if cut is None:
            self.gates = [ParamState({"weight": w, "bias": b}) for w, b in zip(weight, bias)]
        else:
            axis = -1 if cut is interleaved else 1
            whole = jnp.stack(weight, axis).reshape(N_IN + N, 4 * N)
            self.fused = ParamState({"weight": whole, "bias": jnp.stack(bias, axis if axis < 0 else 0).reshape(4 * N)})

    def init_state(self, batch_size=None, **kwargs):
        shape = (N,) if batch_size is None else (batch_size, N)
        self.h, self.c = HiddenState(jnp.zeros(shape)), HiddenState(jnp.zeros(shape))

    def update(self, x):
        z = jnp.concatenate([x, self.h.value], -1)
        if self.cut is None:
            ys = [braintrace.matmul(z, g.value["weight"], g.value["bias"]) for g in self.gates]
        else:
            ys = self.cut(braintrace.matmul(z, self.fused.value["weight"], self.fused.value["bias"]))
        i, g, f, o = ys
        self.c.value = jax.nn.sigmoid(f) * self.c.value + jax.nn.sigmoid(i) * jnp.tanh(g)
        self.h.value = jax.nn.sigmoid(o) * jnp.tanh(self.c.value)
        return self.h.value


RULES = {
    "pp_prop": dict(decay_or_rank=0.9),
    "d_rtrl": {},
    "eprop": dict(kappa_filter_decay=0.6),
}


def gradients(rule, cut, batch, vmap=False, chunk=None):
    rng = np.random.default_rng(0)
    weight, bias = 0.6 * rng.standard_normal((4, N_IN + N, N)), 0.6 * rng.standard_normal((4, N))
    xs = jnp.asarray(rng.standard_normal((STEPS, *(() if batch is None else (batch,)), N_IN)), jnp.float32)
    model = LSTM(jnp.asarray(weight, jnp.float32), jnp.asarray(bias, jnp.float32), cut)
    learner = braintrace.compile(model, rule, xs[0], batch_size=batch, vmap=vmap, **RULES[rule])

    def loss(x):
        return (learner(x) ** 2 * jnp.arange(1.0, N + 1)).sum()

    if chunk:
        return learner.etrace_grad(xs, step_fn=loss, reduction="sum", trace_chunk=chunk)
    step = brainstate.transform.jit(brainstate.transform.grad(loss, model.states(ParamState)))
    return jax.tree.map(lambda *g: sum(g), *[dict(step(x)) for x in xs])


def separate(rule, batch):
    """The same network with an operation for each gate: tested against the dense recursions elsewhere."""
    found = gradients(rule, None, batch)
    leaves = [found["gates", i] for i in range(4)]
    return jnp.stack([g["weight"] for g in leaves]), jnp.stack([g["bias"] for g in leaves])


def assert_equal(found, expected, cut):
    (fused,) = found.values()
    axis = -1 if cut is interleaved else 1
    weight = jnp.stack(list(expected[0]), axis).reshape(N_IN + N, 4 * N)
    bias = jnp.stack(list(expected[1]), axis if axis < 0 else 0).reshape(4 * N)
    np.testing.assert_allclose(fused["weight"], weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fused["bias"], bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [None, BATCH])
@pytest.mark.parametrize("rule", RULES)
def test_fused_equals_separate(rule, batch):
    expected = separate(rule, batch)
    for cut in CUTS:
        assert_equal(gradients(rule, cut, batch), expected, cut)
    assert_equal(gradients(rule, by_split, batch, chunk=2), expected, by_split)
    assert_equal(gradients(rule, interleaved, batch, chunk=3), expected, interleaved)


@pytest.mark.parametrize("rule", RULES)
def test_mapped(rule):
    expected = separate(rule, BATCH)
    assert_equal(gradients(rule, by_reshape, BATCH, vmap=True, chunk=2), expected, by_reshape)
    assert_equal(gradients(rule, by_split, BATCH, vmap=True), expected, by_split)


def test_the_relation():
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((4, N_IN + N, N)), rng.standard_normal((4, N))
    learner = braintrace.compile(LSTM(weight, bias, by_split), "pp_prop", jnp.ones(N_IN), decay_or_rank=0.9)
    (relation,) = learner.graph.hidden_param_op_relations
    (group,) = relation.hidden_groups
    assert relation.residual_free and relation.fold(group).tiles == 4
    (trace,) = learner.etrace_dfs.values()
    assert trace.value.shape == (4 * N, 2)


def test_an_entry_that_acts_on_two_units_is_no_gate():
    class Doubled(LSTM):
        def update(self, x):
            y = braintrace.matmul(x, self.fused.value["weight"][:N_IN])
            i, g, f, o = by_split(y)
            self.c.value = 0.5 * self.c.value + i * g
            self.h.value = 0.5 * self.h.value + jnp.tanh(f + jnp.roll(f, 1, -1)) * o + self.c.value
            return self.h.value

    rng = np.random.default_rng(0)
    model = Doubled(rng.standard_normal((4, N_IN + N, N)), rng.standard_normal((4, N)), by_split)
    with pytest.raises(braintrace.CompilationError, match="shape_mismatch"):
        braintrace.compile(model, "pp_prop", jnp.ones(N_IN), decay_or_rank=0.9)
