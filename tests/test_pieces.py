"""A sequence that is read piece by piece: gradients add up, states and traces go on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate.transform import jit
from helpers import PRECISIONS, assert_close
from models import N_IN, Net, randomise

import braintrace

pytestmark = pytest.mark.filterwarnings("ignore:.*relation_")

T, BATCH = 23, 2
RULES = {
    "pp_prop": dict(decay_or_rank=0.9),
    "d_rtrl": {},
    "eprop": dict(kappa_filter_decay=0.5),
    "uoro": {},
    "windows": dict(decay_or_rank=0.9, vjp_method="multi-step"),
}


class Case:
    def __init__(self, rule, xs):
        model = Net(braintrace.nn.GRUCell(N_IN, 4), braintrace.nn.Linear(4, 1))
        name, self.windows = ("pp_prop", True) if rule == "windows" else (rule, False)
        self.learner = braintrace.compile(model, name, jnp.asarray(xs[0]), batch_size=BATCH, **RULES[rule])
        randomise(model)

    def loss(self, x):
        if self.windows:
            return (self.learner(braintrace.MultiStepData(x)) ** 2).mean((1, 2))
        return (self.learner(x) ** 2).mean()

    def gradient(self, xs):
        return self.learner.etrace_grad(
            xs, step_fn=self.loss, reduction="sum", chunk_size=5 if self.windows else None, trace_chunk=3
        )


def slices(xs, length):
    for start in range(0, len(xs), length):
        yield xs[start : start + length]


@pytest.mark.parametrize("source", ["memmap", "generator"])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_pieces_add_up(tmp_path, rule, source):
    with PRECISIONS["float64"]():
        length = 20 if rule == "windows" else T
        values = np.random.default_rng(0).normal(size=(length, BATCH, N_IN))
        xs = np.memmap(tmp_path / "xs", np.float64, "w+", shape=values.shape)
        xs[:] = values
        xs.flush()
        whole, other = Case(rule, values), Case(rule, values)
        expected = whole.gradient(jnp.asarray(values))
        piece = jit(other.gradient)
        pieces = slices(xs, 5) if source == "memmap" else (np.array(x) for x in slices(values, 5))
        total = None
        for x in pieces:
            grads = piece(jnp.asarray(x))
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        assert_close(dict(total), dict(expected), tol=1e-10)
        for a, b in zip(whole.learner.states().values(), other.learner.states().values(), strict=True):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), a.value, b.value)
        assert other.learner.running_index.value == length


def test_pieces_without_a_loss_advance_in_the_same_way():
    xs = np.random.default_rng(0).normal(size=(T, BATCH, N_IN)).astype(np.float32)
    whole, other = Case("d_rtrl", xs), Case("d_rtrl", xs)
    whole.learner.etrace_evolve(jnp.asarray(xs))
    for x in slices(xs, 5):
        other.learner.etrace_evolve(jnp.asarray(x))
    for a, b in zip(whole.learner.states().values(), other.learner.states().values(), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a.value, b.value)
    assert other.learner.running_index.value == T
