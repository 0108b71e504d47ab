"""Large traces are kept in pieces on a CPU: what comes out is what whole ones give, which the oracle judges."""

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rules import case

import braintrace
from braintrace._engines import pieces, samples
from braintrace._engines.pieces import Pieces, is_pieces
from braintrace._engines.samples import met, spread_over

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere traces are whole")

T, BATCH = 5, 3


def assert_close(ours, theirs, tol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol), ours, theirs)


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(samples, "_SMALL", 0)


@pytest.fixture
def size_of_pieces(monkeypatch):
    def set_to(size):
        monkeypatch.setattr(pieces, "_PIECE", size)

    return set_to


def count(learner):
    return sum(map(is_pieces, jax.tree.leaves(learner._get_etrace_data(), is_leaf=is_pieces)))


class Masked(brainstate.nn.Module):
    """A weight with a hook, a low-rank one, a table of embeddings and an einsum: cut after they are made."""

    def __init__(self):
        super().__init__()
        self.w, self.a, self.b, self.v, self.t = (
            brainstate.ParamState(brainstate.random.randn(*shape)) for shape in ((7, 5), (7, 2), (2, 5), (7, 5), (9, 5))
        )
        self.h = brainstate.HiddenState(jnp.zeros((BATCH, 5)))
        self.mask = brainstate.random.rand(7, 5) > 0.5

    def update(self, x):
        y = braintrace.matmul(x, self.w.value, weight_fn=lambda w: w * self.mask)
        y += braintrace.lora_matmul(x, self.a.value, self.b.value)
        y += braintrace.einsum("bi,io->bo", x, self.v.value)
        y += braintrace.embedding((x[:, 0] > 0).astype(int), self.t.value)
        self.h.value = jnp.tanh(self.h.value + y)
        return self.h.value


MODELS = {
    "gru": lambda: brainstate.nn.Sequential(braintrace.nn.GRUCell(7, 5), braintrace.nn.Linear(5, 3)),
    "lru": lambda: brainstate.nn.Sequential(braintrace.nn.LRUCell(7, 5), braintrace.nn.GRUCell(7, 5)),
}
RULES = {"d_rtrl": {}, "eprop": dict(kappa_filter_decay=0.5), "hybrid": dict(decay_or_rank=0.9, exact="all")}


def run(make, rule, vmap, **options):
    brainstate.random.seed(0)
    model, xs = make(), brainstate.random.randn(T, BATCH, 7)
    learner = braintrace.compile(model, rule, xs[0], batch_size=BATCH, vmap=vmap, **options)
    one = learner.module if vmap else learner

    def loss(x):
        return (learner(x) ** 2).sum()

    step = brainstate.transform.jit(lambda x: brainstate.transform.grad(lambda: loss(x), one.param_states)())
    steps = [step(x) for x in xs]
    whole = [learner.etrace_grad(xs, step_fn=loss)]
    learner.reset_state()
    whole.append(learner.etrace_grad(xs, step_fn=loss, trace_chunk=2))
    return count(one), (steps, whole, {k: trace.value for k, trace in one.etrace_bwg.items()})


@pytest.mark.parametrize(
    "model, rule, vmap",
    [
        ("gru", "d_rtrl", False), ("gru", "d_rtrl", True), ("gru", "eprop", False), ("gru", "hybrid", True),
        ("lru", "d_rtrl", False), ("lru", "hybrid", False),
    ],
)  # fmt: skip
def test_pieces_give_what_the_whole_gives(model, rule, vmap, size_of_pieces):
    none, whole = run(MODELS[model], rule, vmap, **RULES[rule])
    size_of_pieces(100)
    some, cut = run(MODELS[model], rule, vmap, **RULES[rule])
    assert none == 0 < some
    assert_close(whole, cut)  # which products and sums become one instruction is for the compiler to choose


def test_operations_without_rows_of_their_input(size_of_pieces):
    none, whole = run(Masked, "d_rtrl", False)
    size_of_pieces(100)
    some, cut = run(Masked, "d_rtrl", False)
    assert none == 0 and some == 5
    assert_close(whole, cut)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_traces(dtype, size_of_pieces):
    _, whole = run(MODELS["gru"], "d_rtrl", False, trace_dtype=dtype)
    size_of_pieces(100)
    some, cut = run(MODELS["gru"], "d_rtrl", False, trace_dtype=dtype)
    assert some
    assert_close(whole, cut)


def test_oracle(size_of_pieces):
    size_of_pieces(100)
    learner, _ = case("gru", "linear", rule="D_RTRL").check()
    assert count(learner.inner)


def of_batch(batch, **options):
    brainstate.random.seed(0)
    return braintrace.compile(MODELS["gru"](), "d_rtrl", jnp.ones((batch, 7)), batch_size=batch, **options)


def one_gradient(learner, batch):
    step = lambda x: (learner(x) ** 2).sum()  # noqa: E731
    return learner.etrace_grad(jnp.ones((2, batch, 7)), step_fn=step)


def test_another_batch_keeps_the_number_of_pieces(size_of_pieces):
    size_of_pieces(500)
    learner, expected = of_batch(8), one_gradient(of_batch(2), 2)
    before = jax.tree.structure(learner._get_etrace_data())
    brainstate.nn.reset_all_states(learner.model4compile, batch_size=2)
    learner.reset_state()
    assert count(learner)
    assert_close(one_gradient(learner, 2), expected)
    assert jax.tree.structure(learner._get_etrace_data()) == before


@pytest.mark.parametrize("saved, loaded", [(100, 2**30), (2**30, 100), (100, 300)])
def test_files_hold_whole_traces(saved, loaded, size_of_pieces, tmp_path):
    size_of_pieces(saved)
    first = of_batch(2)
    one_gradient(first, 2)
    braintrace.save(tmp_path / "run.npz", first)
    with np.load(tmp_path / "run.npz") as file:
        assert any(file[k].shape == (2, 12, 5) for k in file.files if k.startswith("learner/"))
    size_of_pieces(loaded)
    second = of_batch(2)
    braintrace.load(tmp_path / "run.npz", second)
    traces = [{k: t.value for k, t in one.etrace_bwg.items()} for one in (first, second)]
    jax.tree.map(np.testing.assert_array_equal, *traces)
    assert_close(one_gradient(first, 2), one_gradient(second, 2))


class Watching(braintrace.D_RTRL):
    def _update_etrace_data(self, running_index, old_traces, *rest):
        self.shapes = [a.shape for a in jax.tree.leaves(old_traces)]
        return super()._update_etrace_data(running_index, old_traces, *rest)


def test_hooks_are_given_whole_traces(size_of_pieces):
    size_of_pieces(100)
    brainstate.random.seed(0)
    learner = braintrace.compile(MODELS["gru"](), Watching, jnp.ones((2, 7)), batch_size=2)
    one_gradient(learner, 2)
    assert (2, 12, 5) in learner.shapes


# -- the sum over samples of a signal times pieces ---------------------------------------------------------------------


@pytest.fixture(params=[1, 3, 4, 9])
def operands(request):
    keys = jax.random.split(jax.random.key(0), 4)
    batch = request.param
    trace, signal = jax.random.normal(keys[0], (batch, 6, 5)), jax.random.normal(keys[1], (batch, 5))
    return trace, signal, jax.random.normal(keys[2], (6, 5)), Pieces([trace[:, :1], trace[:, 1:4], trace[:, 4:]], -2)


def test_sum_over_samples(operands):
    trace, signal, weight, cut = operands

    def ours(signal, cut):
        return met(signal, cut, 1)

    def plain(signal, trace):
        return jnp.einsum("bj,bij->ij", signal, trace)

    assert_close(ours(signal, cut), plain(signal, trace))
    (a, pieces_), (b, whole) = (
        jax.vjp(ours, signal, cut)[1](weight),
        jax.vjp(plain, signal, trace)[1](weight),
    )
    assert_close(a, b)
    assert_close(jnp.concatenate(pieces_.arrays, 1), whole)
    tangents = jax.jvp(lambda cut: ours(signal, cut), (cut,), (cut,))[1]
    assert_close(tangents, plain(signal, trace))
    # The way of a learner: a cotangent of the weight reaches the signal, and the signal's reaches the weight.
    way = jax.vjp(lambda w: spread_over(w, cut, 1, 1), weight)[1](signal)[0]
    assert_close(way, plain(signal, trace))
    assert_close(spread_over(weight, cut, 1, 1), jnp.einsum("ij,bij->bj", weight, trace))


def test_mapped_samples(operands):
    trace, signal, weight, cut = operands

    def ours(w):
        return jax.vmap(lambda cut: spread_over(w, cut, 0, 1))(cut)

    assert_close(ours(weight), jnp.einsum("ij,bij->bj", weight, trace))
    assert_close(jax.vjp(ours, weight)[1](signal)[0], jnp.einsum("bj,bij->ij", signal, trace))


def test_traces_beyond_all_pieces_are_whole():
    assert not is_pieces(pieces.zeros_in_pieces((4, 2, 3), jnp.float32, -2, samples=2**40))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_trace_is_read_as_it_is_stored(dtype):
    """XLA likes to make a whole copy in single precision first."""
    trace = jnp.ones((64, 64, 64), dtype)
    compiled = jax.jit(lambda s, e: met(s, e, 1)).lower(jnp.ones((64, 64)), trace).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < trace.nbytes / 4
