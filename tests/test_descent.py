"""Long loops in place: the same loop unrolled, and back-propagation, are the references."""

import brainevent
import brainpy.state
import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate import HiddenState, ParamState
from brainstate.transform import for_loop, grad

import braintrace
from braintrace import ControlFlowPolicy, element_wise, matmul

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*relation_"),
    pytest.mark.filterwarnings("ignore:.*state_mismatch"),
    pytest.mark.usefixtures("x64"),
]

LENGTH = 4
IN_PLACE, UNROLLED = ControlFlowPolicy(scan_unroll_limit=LENGTH - 1), ControlFlowPolicy(scan_unroll_limit=LENGTH)
RULES = {
    "pp_prop": (braintrace.pp_prop, dict(decay_or_rank=0.9)),
    "D_RTRL": (braintrace.D_RTRL, {}),
    "EProp": (braintrace.EProp, dict(kappa_filter_decay=0.4)),
}
MODES = {"one sample": (None, False), "batched": (3, False), "vmap": (3, True)}
RAMP = np.linspace(-1.0, 1.2, LENGTH)


@pytest.fixture
def x64():
    with jax.enable_x64(True), brainstate.environ.context(precision=64, dt=1.0 * u.ms):
        yield


class Loop(brainstate.nn.Module):
    """Sub-steps of two states; `drive(model, k, x, h)` calls the operations."""

    def __init__(self, drive, length=LENGTH):
        super().__init__()
        self._drive, self.length = drive, length
        self.w = ParamState(jnp.array([[0.3, 0.4, -0.5], [0.6, -0.2, 0.1]]))
        self.r = ParamState(jnp.array([[0.2, 0.1, -0.3], [0.4, 0.3, 0.1], [-0.1, 0.2, 0.5]]))
        self.p = ParamState(jnp.array([0.3, 0.5, 0.7]))
        self.init_state()

    def init_state(self, batch_size=None, **_):
        front = () if batch_size is None else (batch_size,)
        self.h = HiddenState(jnp.full((*front, 3), 0.2))
        self.c = HiddenState(jnp.full((*front, 3), -0.1))

    def update(self, x):
        def body(carry, k):
            h, c = carry
            y = self._drive(self, k, x, h)
            c = 0.8 * c + 0.3 * y + 0.1 * h
            h = jnp.tanh(0.5 * h + c) + 0.1 * y
            return (h, c), h * c

        start = self.h.value, self.c.value
        ramp = jnp.resize(jnp.asarray(RAMP), self.length)
        (self.h.value, self.c.value), outs = jax.lax.scan(body, start, ramp)
        return self.h.value + outs[1] * outs[2]


class Cell(brainstate.nn.Module):
    """A cell that takes several steps in one, as users write it."""

    def __init__(self, cell, feed=lambda x, i: x * jnp.cos(i)):
        super().__init__()
        self.cell, self.feed = cell, feed

    def update(self, x):
        return for_loop(lambda i: self.cell(self.feed(x, i)), jnp.arange(LENGTH))[-1]


class Driven(brainstate.nn.Module):
    """`h <- tanh(h / 2 + operation(x))`, of which `settle` makes the new value."""

    def __init__(self, operation, shape, settle=lambda h: h):
        super().__init__()
        self.operation, self.shape, self._settle = operation, shape, settle

    def init_state(self, batch_size=None, **_):
        self.h = HiddenState(jnp.zeros(self.shape if batch_size is None else (batch_size, *self.shape)))

    def update(self, x):
        self.h.value = self._settle(jnp.tanh(0.5 * self.h.value + self.operation(x)))
        return self.h.value


def sparse_layer():
    return braintrace.nn.SparseLinear(brainevent.CSR.fromdense(jnp.array([[0.3, 0.0, -0.2], [0.0, 0.5, 0.4]])))


def less_its_mean(h):
    return h - 0.3 * h.mean(-1, keepdims=True)


class Spiking(brainstate.nn.Module):
    """Neurons with units."""

    def __init__(self):
        super().__init__()
        self.synapse = braintrace.nn.Linear(2, 3)
        self.neurons = brainpy.state.LIF(
            3, tau=5 * u.ms, V_th=0.5 * u.mV, V_reset=0 * u.mV, V_rest=0 * u.mV, R=1 * u.ohm
        )

    def update(self, x):
        return self.neurons(self.synapse(x) * 3 * u.mA)


DRIVES = {  # operations of a sub-step, and how many there are
    "input": (lambda m, k, x, h: matmul(k * x, m.w.value), 1),
    "the same at every sub-step": (lambda m, k, x, h: k * matmul(x, m.w.value), 1),
    "recurrent": (lambda m, k, x, h: matmul(k * x, m.w.value) + matmul(h, m.r.value), 2),
    "through another": (lambda m, k, x, h: matmul(jnp.tanh(matmul(k * x, m.w.value) + 0.1 * h), 2 * m.r.value), 1),
    "bias": (lambda m, k, x, h: matmul(k * x, m.w.value, m.p.value), 1),
    "plain parameter": (lambda m, k, x, h: m.p.value * matmul(k * x, m.w.value), 1),
    "element_wise": (lambda m, k, x, h: matmul(k * x, m.w.value) + h * element_wise(m.p.value), 2),
}
X = lambda *shape: 0.8 * np.random.default_rng(3).normal(size=(4, 3, *shape))  # noqa: E731
CELLS = {
    "GRU": (lambda: Cell(braintrace.nn.GRUCell(2, 3)), X(2)),
    "LSTM": (lambda: Cell(braintrace.nn.LSTMCell(2, 3)), X(2)),
    "two layers": (
        lambda: Cell(brainstate.nn.Sequential(braintrace.nn.ValinaRNNCell(2, 3), braintrace.nn.GRUCell(3, 3))),
        X(2),
    ),
    "convolution": (lambda: Cell(Driven(braintrace.nn.Conv2d((4, 4, 2), 3, 3), (4, 4, 3))), X(4, 4, 2)),
    "embedding": (
        lambda: Cell(Driven(braintrace.nn.Embedding(7, 3), (3,)), lambda x, i: (x + i) % 7),
        np.random.default_rng(3).integers(0, 7, (4, 3)),
    ),
    "neurons": (lambda: Cell(Spiking()), X(2)),
    "sparse": (lambda: Cell(Driven(sparse_layer(), (3,))), X(2)),
    "noise": (
        lambda: Cell(braintrace.nn.MinimalRNNCell(2, 3), lambda x, i: x * jnp.cos(i) + 0.3 * brainstate.random.rand(2)),
        X(2),
    ),
    "positions mixed": (lambda: Cell(Driven(braintrace.nn.Linear(2, 3), (3,), less_its_mean)), X(2)),
}
MODELS = {name: (lambda drive=drive: Loop(drive), X(2)) for name, (drive, _) in DRIVES.items()} | CELLS


def loss(out):
    return (out**2 * jnp.arange(1.0, 1 + out.shape[-1])).sum()


def gradients(model, rule, mode, policy, in_chunks, length=None):
    make, xs = MODELS[model] if isinstance(model, str) else model
    kind, options = RULES[rule]
    batch, vmap = MODES[mode]
    xs = jnp.asarray(xs if batch else xs[:, 0])[:length]
    brainstate.random.seed(1)
    run = braintrace.compile(make(), kind, xs[0], batch_size=batch, vmap=vmap, control_flow=policy, **options)
    learner = run.module if vmap else run
    brainstate.random.seed(2)
    if in_chunks:
        return run.etrace_grad(xs, step_fn=lambda x: loss(run(x)), trace_chunk=2), learner
    one = brainstate.transform.jit(lambda x: grad(lambda: loss(run(x)), learner.param_states)())
    return [one(x) for x in xs], learner


def backprop(model, mode, length=None):
    make, xs = MODELS[model] if isinstance(model, str) else model
    batch, _ = MODES[mode]
    xs = jnp.asarray(xs if batch else xs[:, 0])[:length]
    brainstate.random.seed(1)
    model = make()
    brainstate.nn.init_all_states(model, batch_size=batch)
    brainstate.random.seed(2)
    whole = lambda: for_loop(lambda x: loss(model(x)), xs).mean()  # noqa: E731
    return grad(whole, model.states(ParamState), check_states=False)()


def assert_close(ours, theirs, tolerance=1e-9):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * (1 + np.abs(b).max()))


def kinds_of(learner):
    return [r.kind.value for r in learner.graph.diagnostics if r.kind.value.startswith("scan")]


@pytest.mark.parametrize(
    "model, rule", [(m, r) for m in MODELS for r in RULES if m in DRIVES or r in ("pp_prop", "D_RTRL")]
)
def test_the_same_as_unrolled(model, rule):
    how = {"pp_prop": ("batched", True), "D_RTRL": ("one sample", False), "EProp": ("vmap", True)}[rule]
    ours, learner = gradients(model, rule, how[0], IN_PLACE, how[1])
    theirs, reference = gradients(model, rule, how[0], UNROLLED, how[1])
    assert_close(ours, theirs)
    kinds = [
        [r.kind.value for r in e.graph.diagnostics if r.kind.value.startswith("scan")] for e in (learner, reference)
    ]
    assert kinds == [["scan_unroll_skipped", "scan_descent_applied"], ["scan_unrolled"]]
    assert len(learner.graph.hidden_param_op_relations) < len(reference.graph.hidden_param_op_relations)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("in_chunks", [False, True])
@pytest.mark.parametrize("model", ["input", "bias", "the same at every sub-step", "convolution", "embedding"])
def test_d_rtrl_is_back_propagation_without_recurrent_operations(model, mode, in_chunks):
    ours, _ = gradients(model, "D_RTRL", mode, IN_PLACE, in_chunks)
    ours = ours if in_chunks else jax.tree.map(lambda *steps: sum(steps) / len(steps), *ours)
    expected = backprop(model, mode)
    assert_close(ours, {path: expected[path] for path in ours})
    if in_chunks and mode == "batched":  # the same comparison tells a rule that is no back-propagation apart
        approximate, _ = gradients(model, "pp_prop", mode, IN_PLACE, True)
        with pytest.raises(AssertionError):
            assert_close(approximate, {path: expected[path] for path in approximate}, 1e-3)


@pytest.mark.parametrize("rule", ["pp_prop", "EProp"])
@pytest.mark.parametrize("model", MODELS)
def test_the_first_step_is_back_propagation(model, rule):
    """Operations one after the other, parameters beside them, stacked outputs of the loop: all have their credit."""
    (ours,), _ = gradients(model, rule, "one sample", IN_PLACE, False, length=1)
    expected = backprop(model, "one sample", length=1)
    assert_close(ours, {path: expected[path] for path in ours})


def test_sizes_do_not_grow_with_the_loop():
    def compiled(length):
        make = lambda: Loop(DRIVES["recurrent"][0], length)  # noqa: E731
        learner = gradients((make, X(2)), "D_RTRL", "batched", IN_PLACE, True)[1]
        traces = [e.shape for trace in learner.etrace_bwg.values() for e in trace.value.values()]
        return len(learner.graph.module_info.jaxpr.eqns), sorted(traces)

    assert compiled(20) == compiled(2000)
    assert compiled(20)[1] == [(3, 2, 3, 2), (3, 3, 3, 2)]


def test_what_is_kept_by_pp_prop():
    _, learner = gradients("recurrent", "pp_prop", "batched", IN_PLACE, False)
    assert {e.value.shape for e in learner.etrace_xs.values()} == {(LENGTH, 3, 2), (LENGTH, 3, 3)}
    assert {e.value.shape for e in learner.etrace_dfs.values()} == {(LENGTH, 3, 3, 2)}
    learner.reset_state(batch_size=4)
    assert {e.value.shape for e in learner.etrace_dfs.values()} == {(LENGTH, 4, 3, 2)}


def test_a_relation_says_how_many_sub_steps_it_has():
    _, learner = gradients("recurrent", "D_RTRL", "one sample", IN_PLACE, False)
    for r in learner.graph.hidden_param_op_relations:
        assert (r.sub_steps, r.y.aval.shape, r.one.y.aval.shape) == (LENGTH, (LENGTH, 3), (3,))
        assert r.path_classification == {("h",): "mixed", ("c",): "mixed"}
    assert f"etp_mv x {LENGTH}" in learner.report.to_str() and f"etp_mv x {LENGTH}" in learner.report.to_mermaid()
    (record,) = learner.graph.explain(kind="scan_descent_applied")
    assert f"of length {LENGTH}" in record.message


@pytest.mark.filterwarnings("ignore:.*(scan_descent_skipped|weight_in_control_flow)")
def test_an_operand_that_changes_within_the_loop_is_refused():
    make = lambda: Loop(lambda m, k, x, h: matmul(x, k * m.w.value))  # noqa: E731
    with pytest.raises(NotImplementedError, match=rf"'weight' of etp_mv changes.*scan_unroll_limit={LENGTH}"):
        gradients((make, X(2)), "D_RTRL", "one sample", IN_PLACE, False)
    ours, _ = gradients((make, X(2)), "D_RTRL", "one sample", UNROLLED, False, length=1)
    assert_close(ours[0][("w",)], backprop((make, X(2)), "one sample", length=1)[("w",)])
