"""Numbers that are easy to get wrong, each against back-propagation, the dense oracle, or a value found by hand."""

import subprocess
import sys

import brainevent
import brainstate
import braintools
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from brainstate import HiddenState, ParamState
from brainstate.transform import for_loop, grad, jit
from helpers import DRTRL, PRECISIONS, PPProp, assert_close, leaf, old, total
from models import N_IN, N, Problem, matmul

import braintrace

pytestmark = pytest.mark.usefixtures("time_step")

RAMP = jnp.arange(1.0, N + 1)
W, SQUARE, UNIT = jnp.zeros((N_IN, N)), jnp.zeros((N, N)), jnp.zeros(N)  # shapes; the values are random


class Step(models.Stage):
    """A step written as a function, `transition(m, x)`; `params` by name, hidden states of shape (n,) by group."""

    def __init__(self, transition, output=None, hidden=(("h",),), **params):
        super().__init__()
        self.states = hidden
        self._transition, self._output = transition, output
        for name, value in params.items():
            setattr(self, name, ParamState(value))

    def init_state(self, batch_size=None, **_):
        for group in self.states:
            for name in group:
                setattr(self, name, models.zeros(N, batch_size))

    def transition(self, x):
        return self._transition(self, x)

    def output(self, aux):
        return self.h.value if self._output is None else self._output(self, aux)


def check(layers, batch=2, steps=3, rule=PPProp(0.9), **options):
    """Step 0 is back-propagation, and all steps are the oracle's. `layers`: a function of a namespace of layers."""
    problem = Problem(layers, batch=batch, steps=steps, **options)
    learner = problem.learner(0.9) if isinstance(rule, PPProp) else problem.learner(make=braintrace.D_RTRL)
    ours = problem.online(learner)
    oracle = problem.oracle()
    assert_close(ours[0][1], oracle.bptt(problem.sequence[:1])[1], what="one step")
    theirs, _ = oracle.online(rule, problem.sequence)
    for t, ((_, grads), (_, expected)) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(grads, expected, what=f"step {t}")
    for path, state in learner.param_states.items():
        for i, g in enumerate(jax.tree.leaves(ours[-1][1][path])):
            assert np.abs(g).max() > 1e-4, (path, i)
    return learner


def check_step(transition, output=None, hidden=(("h",),), batch=2, steps=3, rule=PPProp(0.9), **params):
    return check(lambda nn: [Step(transition, output, hidden, **params)], batch, steps, rule)


class Plain(brainstate.nn.Module):
    """A user's model without a reference: `step(m, *args)`, states and parameters as given."""

    def __init__(self, step, **states):
        super().__init__()
        self._step = step
        for name, state in states.items():
            setattr(self, name, state)

    def update(self, *args):
        return self._step(self, *args)


def learner_of(model, *args, decay=0.9, rule=braintrace.pp_prop, **options):
    learner = rule(model, *([decay] if issubclass(rule, braintrace.pp_prop) else []), **options)
    learner.compile_graph(*args)
    return learner


def gradient(learner, x, loss=jnp.sum):
    return jit(grad(lambda: loss(learner(x)), learner.param_states))()


def one_input(step, weight=None, **states):
    """A step of one input `x = [1]` onto three units, `h` its hidden state."""
    weight = jnp.array([[0.2, -0.1, 0.4]]) if weight is None else weight
    return Plain(step, w=ParamState(weight), h=HiddenState(jnp.zeros(3)), **states)


ONE = jnp.ones(1)


# -- parameters outside an operation


def unmarked_input(m, x):
    m.h.value = jnp.tanh(0.5 * m.h.value + matmul(x, m.w.value) + x @ m.v.value)


def plain_gain(m, x):
    m.h.value = jnp.tanh(0.5 * m.h.value + matmul(x, m.w.value) * m.gain.value + m.shift.value)


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("readout", models.READOUTS)
def test_a_readout_gets_its_gradient(readout, batch):
    check(lambda nn: [nn.GRUCell(N_IN, N), models.READOUTS[readout](nn)], batch, loss=two_outputs)


def two_outputs(net, call, x, target):
    return ((call(x) - target[..., : models.N_OUT]) ** 2).sum()


@pytest.mark.parametrize(
    "step, params", [(unmarked_input, dict(w=W, v=W)), (plain_gain, dict(w=W, gain=UNIT, shift=UNIT))]
)
def test_parameters_used_without_an_operation_get_their_gradient(step, params):
    check_step(step, **params)


@pytest.mark.parametrize("rule", [braintrace.pp_prop, braintrace.D_RTRL])
@pytest.mark.parametrize("batch", [None, 2])
def test_gain_and_bias_of_weight_standardisation_get_their_gradient(batch, rule):
    layer = braintrace.nn.ScaledWSLinear(3, N, w_init=jnp.array([[0.3, -0.4, 0.5], [0.1, 0.2, -0.9], [0.7, 0.1, 0.2]]))
    model = brainstate.nn.Sequential(
        layer, braintrace.nn.ValinaRNNCell(N, N, activation="tanh"), braintrace.nn.Linear(N, N)
    )
    brainstate.nn.init_all_states(model, **({} if batch is None else dict(batch_size=batch)))
    x = jnp.array([[0.5, -1.0, 0.3], [2.0, 1.0, -0.4]])
    x = x[0] if batch is None else x
    truth = grad(lambda: (model(x) * RAMP).sum(), model.states(ParamState))()
    brainstate.nn.init_all_states(model, **({} if batch is None else dict(batch_size=batch)))
    assert_close(gradient(learner_of(model, x, rule=rule), x, lambda out: (out * RAMP).sum()), truth)


# -- each path is counted once


def chain_of_two(m, x):
    m.h.value = 0.9 * m.h.value + matmul(x, m.w.value)
    m.b.value = jnp.tanh(0.8 * m.b.value + m.h.value)


def chain_of_three(m, x):
    chain_of_two(m, x)
    m.c.value = 0.7 * m.c.value + m.b.value * m.h.value


def last_of_two(m, aux):
    return m.b.value


def last_of_three(m, aux):
    return m.c.value + 0.1 * m.b.value


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize(
    "step, output, group", [(chain_of_two, last_of_two, "hb"), (chain_of_three, last_of_three, "hbc")]
)
def test_a_chain_of_states_is_credited_once(step, output, group, batch):
    learner = check_step(step, output, (tuple(group),), batch, w=W)
    assert [g.num_state for g in learner.graph.hidden_groups] == [len(group)]


def test_a_chain_of_three_by_hand():
    """h = w, b = h^2, c = b h = w^3: the derivative is 3 w^2, whichever of the paths it takes."""

    def step(m, x):
        m.h.value = matmul(x, m.w.value)
        m.b.value = m.h.value**2
        m.c.value = m.b.value * m.h.value
        return m.c.value

    model = one_input(step, b=HiddenState(jnp.zeros(3)), c=HiddenState(jnp.zeros(3)))
    grads = gradient(learner_of(model, ONE), ONE)
    np.testing.assert_allclose(grads[("w",)], 3 * model.w.value**2, rtol=1e-6)


@pytest.mark.parametrize("cell", ["LSTMCell", "URLSTMCell"])
def test_a_cell_whose_output_reads_its_new_memory_is_credited_once(cell):
    check(lambda nn: [getattr(nn, cell)(N_IN, N)])


@pytest.mark.parametrize("neuron", ["LIF", "ALIF"])
def test_a_synapse_in_front_of_a_neuron_is_credited_once(neuron):
    check(lambda nn: [models.Spiking(N_IN, N, neuron)])


def two_groups(m, x):
    y = matmul(x, m.w.value)
    m.h.value = jnp.tanh(0.5 * m.h.value + y)
    m.b.value = 0.7 * m.b.value + y + jnp.roll(m.h.value, 1, -1)


def both_groups(m, aux):
    return m.h.value + m.b.value**2


def test_one_operation_into_two_linked_groups_is_credited_once():
    learner = check_step(two_groups, both_groups, (("h",), ("b",)), w=W, steps=1)
    assert len(learner.graph.hidden_groups) == 2


def test_fan_out_by_hand():
    """h = y and b = y + sum(h), loss sum(h) + sum(b): every unit counts 1 + 1 + 3."""

    def step(m, x):
        y = matmul(x, m.w.value)
        m.h.value = y
        m.b.value = y + m.h.value.sum()
        return m.h.value + m.b.value

    model = one_input(step, b=HiddenState(jnp.zeros(3)))
    np.testing.assert_allclose(gradient(learner_of(model, ONE), ONE)[("w",)], [[5.0, 5.0, 5.0]], rtol=1e-6)


class Siblings(models.Stage):
    """Two layers of one state each, the second reading the new value of the first."""

    def __init__(self, in_a_list):
        super().__init__()
        first, second = Step(None, a=W), Step(None, a=W)
        if in_a_list:
            self.cells = [first, second]
        else:
            self.first, self.second = first, second
        self._pair = (first, second)

    def groups(self):
        return [[cell.h for cell in self._pair]]

    def transition(self, x):
        first, second = self._pair
        first.h.value = 0.5 * first.h.value + matmul(x, first.a.value)
        second.h.value = jnp.tanh(0.7 * first.h.value + 0.4 * second.h.value + matmul(x, second.a.value))

    def output(self, aux):
        return self._pair[1].h.value


@pytest.mark.parametrize("in_a_list", [False, True])
def test_coupled_layers_are_credited_once_wherever_they_live(in_a_list):
    learner = check(lambda nn: [Siblings(in_a_list)])
    assert [len(g.hidden_paths) for g in learner.graph.hidden_groups] == [2]


# -- the bias correction of the trace


def test_windows_count_time_steps():
    problem = Problem(models.SMALL["ModelA"], steps=6)
    learner = problem.learner(0.9, vjp_method="multi-step")
    x, target = problem.sequences()

    def losses(x, target):
        return ((learner(braintrace.MultiStepData(x)) - target) ** 2).sum(-1)

    grads = learner.etrace_grad(x, target, step_fn=losses, chunk_size=2, reduction="sum")
    assert learner.running_index.value == 6
    windows, _ = problem.oracle().windows(PPProp(0.9), problem.sequence, 2)
    assert_close(dict(grads), total(windows))


def test_one_call_of_six_steps_counts_six():
    problem = Problem(models.SMALL["ModelA"], steps=6)
    learner = problem.learner(0.9)
    learner(braintrace.MultiStepData(problem.sequences()[0]))
    assert learner.running_index.value == 6


def integrate(m, x):
    before = m.h.value
    m.h.value = jnp.tanh(before + matmul(x, m.w.value))
    return before


@pytest.mark.parametrize("vjp_method", ["single-step", "multi-step"])
def test_a_trace_of_one_step_is_corrected_for_one_step(vjp_method):
    """The loss of step 2 reads the state that step 1 left: no history, so its gradient is exact."""
    model = one_input(integrate)
    learner = learner_of(model, ONE, vjp_method=vjp_method)
    learner(ONE)
    truth = RAMP * (1 - jnp.tanh(model.w.value) ** 2)
    np.testing.assert_allclose(gradient(learner, ONE, lambda out: (out * RAMP).sum())[("w",)], truth, rtol=1e-5)


def test_bias_correction_lasts_beyond_a_thousand_steps():
    """h sums y: the corrected sensitivity is 1, so the gradient is the filtered input (1 - a^n) / (1 - a)."""
    decay = 0.9999

    def step(m, x):
        m.h.value = m.h.value + matmul(x, m.w.value)
        return m.h.value

    with PRECISIONS["float64"]():
        model = one_input(step)
        model.h.value, model.w.value = jnp.zeros(3), jnp.zeros((1, 3))
        x = jnp.ones(1)
        learner = learner_of(model, x, decay=decay)
        per_step = for_loop(lambda x: gradient(learner, x)[("w",)][0, 0], jnp.ones((1003, 1)))
    n = np.arange(1, 1004)
    np.testing.assert_allclose(per_step, (1 - decay**n) / (1 - decay), rtol=1e-8)


# -- an offset is a weight whose input is 1

AFFINE = braintrace.register_primitive(
    "affine_gain", lambda x, b, g: g * (x.sum() + b), trainable_invars_fn=lambda params: {"b": 1, "g": 2}
)
OFFSETS = {  # operations of an input [0] with the parameter b of shape (1,), which is 1
    "matmul": lambda x, b: braintrace.matmul(x, jnp.ones((1, 1)), b),
    "matmul, hook": lambda x, b: braintrace.matmul(x, jnp.ones((1, 1)), b, bias_fn=jnp.sin) / jnp.cos(1.0),
    "grouped": lambda x, b: braintrace.grouped_matmul(x[None], jnp.ones((1, 1, 1)), b[None]),
    "lora": lambda x, b: braintrace.lora_matmul(x, jnp.ones((1, 1)), jnp.ones((1, 1)), bias=b),
    "conv": lambda x, b: braintrace.conv(x[None], jnp.ones((1, 1, 1)), b),
    "sparse": lambda x, b: braintrace.sparse_matmul(x, jnp.ones(1), sparse_mat=ONE_ENTRY, bias=b),
    "element_wise": lambda x, b: braintrace.element_wise(b),
    "own": lambda x, b: AFFINE.bind(x, b, jnp.ones(1)),
    "own, of another form": lambda x, b: AFFINE.bind(x, jnp.ones(1), b),
    "twice, halved": lambda x, b: sum(braintrace.matmul(x, jnp.ones((1, 1)), b / 2) for _ in range(2)),
    "a row of the weight": lambda x, b: braintrace.matmul(x + 1, b[:, None]),
}
ONE_ENTRY = brainevent.CSR((jnp.ones(1), jnp.array([0]), jnp.array([0, 1])), shape=(1, 1))


class Offset(brainstate.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.operation, self.b = OFFSETS[name], ParamState(jnp.ones(1))

    def init_state(self, batch_size=None, **_):
        self.h = HiddenState(jnp.zeros_like(self.operation(jnp.zeros(1), self.b.value)))

    def update(self, x):
        self.h.value = 0.95 * self.h.value + self.operation(x, self.b.value)
        return self.h.value


@pytest.mark.filterwarnings("ignore:.*trainable_invar")
@pytest.mark.parametrize("drive", ["steps", "chunks", "mapped"])
@pytest.mark.parametrize("name", OFFSETS)
def test_an_offset_is_a_weight_whose_input_is_one(name, drive):  # K49
    x, f, expected = 0.0, 0.0, 0.0
    for n in range(200):
        x, f = 0.98 * x + 1, 0.98 * 0.95 * f + 0.02
        expected += x * f / (1 - 0.98 ** (n + 1))
    assert abs(expected - 2703) < 0.1
    lead = (2,) if drive == "mapped" else ()
    xs = jnp.zeros((200, *lead, 1))
    options = dict(vmap=True, batch_size=2) if lead else {}
    learner = braintrace.compile(Offset(name), "pp_prop", xs[0], decay_or_rank=0.98, **options)
    if drive == "steps":
        step = grad(lambda x: learner(x).sum(), learner.param_states)
        found = for_loop(step, xs)["b",].sum()
    else:
        found = learner.etrace_grad(xs, step_fn=lambda x: learner(x).mean(), reduction="sum")["b",]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# -- positions that mix


def mean_free(y):
    return y - y.mean(-1, keepdims=True)


def layer_norm(y):
    return mean_free(y) / jnp.sqrt((mean_free(y) ** 2).mean(-1, keepdims=True) + 1e-2)


MATRIX = jnp.array([[0.5, -1.0, 2.0], [0.1, 0.3, -0.7], [-0.4, 0.8, 0.6]])
TAILS = {
    "roll": lambda y: jnp.roll(y, 1, -1),
    "flip": lambda y: y[..., ::-1],
    "cumsum": lambda y: jnp.cumsum(y, -1),
    "sum": lambda y: y + y.sum(-1, keepdims=True),
    "layer norm": layer_norm,
    "softmax": lambda y: jax.nn.softmax(y, -1),
    "max": lambda y: y * y.max(-1, keepdims=True),
    "sort": lambda y: jnp.sort(y, -1),
    "constant matrix": lambda y: y @ MATRIX,
    "upper triangle": lambda y: y @ jnp.triu(MATRIX),
    "gather": lambda y: y[..., jnp.array([2, 0, 0])],
    "stack and sum": lambda y: jnp.stack([y, 2 * y[..., ::-1]], -1).sum(-1),
    "pad": lambda y: jnp.pad(y[..., 1:], [(0, 0)] * (y.ndim - 1) + [(0, 1)]),
}


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("tail", TAILS)
def test_a_tail_that_mixes_positions_is_exact_now_and_diagonal_in_the_trace(tail, batch):
    def step(m, x):
        m.h.value = jnp.tanh(0.5 * m.h.value + TAILS[tail](matmul(x, m.w.value)))

    check_step(step, batch=batch, w=W)


@pytest.mark.parametrize("tail, expected", [("roll", [2, 3, 1]), ("cumsum", [6, 5, 3]), ("sum", [7, 8, 9])])
def test_a_tail_that_mixes_positions_by_hand(tail, expected):
    def step(m, x):
        m.h.value = TAILS[tail](matmul(x, m.w.value))
        return m.h.value

    grads = gradient(learner_of(one_input(step), ONE), ONE, lambda out: (out * RAMP).sum())
    np.testing.assert_allclose(grads[("w",)], [expected], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*snap_pattern")
@pytest.mark.parametrize("rule", [braintrace.pp_prop, braintrace.D_RTRL, braintrace.SnAp])
def test_every_rule_warns_of_a_tail_that_mixes_positions(rule, recwarn):  # K31b
    def step(tail):
        def update(m, x):
            m.h.value = jnp.tanh(tail(matmul(x, m.w.value)) + matmul(m.h.value, m.v.value))
            return m.h.value

        return one_input(update, v=ParamState(jnp.eye(3)))

    kind = braintrace.DiagnosticKind.TRANSITION_TAIL_BOUNDED
    for tail, warned in [(jnp.tanh, []), (lambda y: jnp.roll(y, 1), [("w",)])]:
        recwarn.clear()
        learner = learner_of(step(tail), ONE, rule=rule)
        assert [r.weight_path for r in learner.graph.explain(kind=kind)] == warned
        assert any(kind.value in str(w.message) for w in recwarn) == bool(warned)


@pytest.mark.parametrize("mix", [name for name in TAILS if name not in ("max", "sort")])
def test_a_transition_that_mixes_positions_keeps_its_true_diagonal(mix):
    mixed = TAILS[mix]
    if "matrix" in mix or "triangle" in mix:
        mixed = lambda h: TAILS[mix](old(h))  # noqa: E731  (matrix products are cut)

    def step(m, x):
        m.h.value = jnp.tanh(0.6 * mixed(m.h.value) + matmul(x, m.w.value))

    check_step(step, w=W)


# -- weights that act through other weights, and what happens to a weight before its operation


@pytest.mark.parametrize("cell, gate", [("MGUCell", "Wf"), ("GRUCell", "Wr")])
def test_a_weight_that_acts_through_another_weight_gets_its_gradient(cell, gate):
    learner = check(lambda nn: [getattr(nn, cell)(N_IN, N)])
    assert ("layers", 0, gate, "weight") in learner.param_states


MASK = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
PREPARED = {
    "mask": (W, lambda w: w * MASK),
    "scale": (W, lambda w: 2 * w),
    "transpose": (W.T, lambda w: w.T),
    "square transpose": (SQUARE, lambda w: w.T[:N_IN]),
    "absolute": (W, jnp.abs),
    "standardised": (W, lambda w: (w - w.mean(0)) / jnp.sqrt(((w - w.mean(0)) ** 2).sum(0) + 1.0)),
    "rows of a larger one": (SQUARE, lambda w: w[1:]),
    "flat": (W.ravel(), lambda w: w.reshape(W.shape)),
    "tied rows": (UNIT, lambda w: jnp.stack([w, -0.5 * w])),
}


@pytest.mark.parametrize("how", PREPARED)
def test_a_weight_prepared_outside_the_operation(how):
    weight, prepare = PREPARED[how]

    def step(m, x):
        m.h.value = jnp.tanh(0.5 * m.h.value + matmul(x, prepare(m.w.value)))

    learner = check_step(step, w=weight)
    assert [r.path for r in learner.graph.hidden_param_op_relations] == [("layers", 0, "w")]


def test_masked_entries_have_no_gradient_and_scaled_ones_the_scaled_gradient():
    def step(prepare):
        def run(m, x):
            m.h.value = matmul(x, prepare(m.w.value))
            return m.h.value

        return run

    rows = [(lambda w: w * jnp.array([1.0, 0.0, 1.0]), [1, 0, 3]), (lambda w: 2 * w, [2, 4, 6])]
    for prepare, expected in rows:
        grads = gradient(learner_of(one_input(step(prepare)), ONE), ONE, lambda out: (out * RAMP).sum())
        np.testing.assert_allclose(grads[("w",)], [expected], rtol=1e-6)


PAIRS = {
    "sum": (W, W, lambda a, b: a + b),
    "product": (W, UNIT, lambda a, b: a * jnp.exp(b)),
    "low rank": (jnp.zeros((N_IN, 1)), jnp.zeros((1, N)), lambda a, b: a @ b),
    "rows of both": (W[:1], W[:1], lambda a, b: jnp.concatenate([a, b])),
}


@pytest.mark.parametrize("how", PAIRS)
def test_an_operand_made_of_two_parameters_trains_both(how):
    a, b, combine = PAIRS[how]

    def step(m, x):
        m.h.value = jnp.tanh(0.5 * m.h.value + matmul(x, combine(m.a.value, m.b.value)))

    learner = check_step(step, a=a, b=b)
    (relation,) = learner.graph.hidden_param_op_relations
    assert relation.path == ("layers", 0, "a") and not learner.report.excluded_weights
    for name in "ab":
        assert [x.shape for x in learner.get_etrace_of(("layers", 0, name))[0].values()] == [(2, N_IN)]


def leaky(m, x):
    m.h.value = jnp.tanh(0.5 * m.h.value + matmul(x, m.w.value))


def twice(m, x):
    m.h.value = jnp.tanh(0.5 * m.h.value + matmul(x, m.w.value) + x @ m.w.value)


def operand_and_factor(m, x):
    leak = models.element_wise(m.v.value)
    m.h.value = jnp.tanh(leak * m.h.value + matmul(x, m.w.value) + 2 * m.v.value * x.sum(-1, keepdims=True))


def tied(m, aux):
    return m.h.value @ m.w.value.T @ m.w.value


@pytest.mark.parametrize(
    "step, output, params",
    [
        (twice, None, dict(w=W)),
        (operand_and_factor, None, dict(w=W, v=UNIT)),
        (leaky, tied, dict(w=W)),
    ],
    ids=["product twice", "element-wise and plain", "tied readout"],
)
def test_a_parameter_used_in_an_operation_and_plainly_keeps_both_parts(step, output, params):
    check_step(step, output, **params)


# -- credit beside the stored value


def shows_operation(m, x):
    y = matmul(x, m.w.value)
    m.h.value = 0.5 * m.h.value + y
    return y


def returns_alias(m, x):
    y = jnp.tanh(0.5 * m.h.value + matmul(x, m.w.value))
    m.h.value = y * 1.0
    return y


@pytest.mark.parametrize(
    "step, output",
    [
        (shows_operation, lambda m, y: m.h.value + y),
        (returns_alias, lambda m, y: y),
        (shows_operation, lambda m, y: jnp.cumsum(y, -1) * m.h.value),
    ],
    ids=["operation", "alias", "product"],
)
def test_credit_beside_the_stored_value(step, output):
    check_step(step, output, w=W, steps=1)


def test_credit_beside_the_stored_value_by_hand():
    def step(m, x):
        y = matmul(x, m.w.value)
        m.h.value = 0.5 * m.h.value + y
        return m.h.value + y

    np.testing.assert_array_equal(gradient(learner_of(one_input(step), ONE), ONE)[("w",)], [[2.0, 2.0, 2.0]])


@pytest.mark.parametrize(
    "output", [lambda m, before: before, lambda m, before: m.h.value * before], ids=["old", "both"]
)
def test_an_output_that_reads_the_old_value_credits_the_trace_before(output):
    def step(m, x):
        before = m.h.value
        m.h.value = jnp.tanh(0.5 * before + matmul(x, m.w.value))
        return before

    problem = Problem(lambda nn: [Step(step, output, w=W)], steps=4)
    ours = problem.online(problem.learner(0.9))
    theirs, _ = problem.oracle().online(PPProp(0.9), problem.sequence)
    assert np.abs(leaf(ours[1][1])).max() > 1e-2
    for (_, grads), (_, expected) in zip(ours, theirs):
        assert_close(grads, expected)


# -- shapes and dtypes


class Grouped(brainstate.nn.Module):
    """`ModelB` with both hidden variables in one state."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.W = braintrace.nn.Linear(N_IN, N)

    def init_state(self, batch_size=None, **_):
        shape = (N,) if batch_size is None else (batch_size, N)
        zeros = jnp.zeros(shape)
        self.s = (
            brainstate.HiddenTreeState([zeros, zeros])
            if self.kind == "tree"
            else brainstate.HiddenGroupState(jnp.zeros((*shape, 2)))
        )

    def update(self, x):
        h, c = self.s.value[..., 0], self.s.value[..., 1]
        y = self.W(x)
        new = jnp.tanh(0.6 * h + 0.3 * c + y), 0.7 * c - 0.2 * h + 0.5 * y
        if self.kind == "tree":
            self.s.set_value(list(new))
        else:
            self.s.value = jnp.stack(new, -1)
        return self.s.value[..., 0] + self.s.value[..., 1] ** 2


@pytest.mark.parametrize("batch", [None, 2, 4])
@pytest.mark.parametrize("kind", ["group", "tree"])
def test_several_variables_in_one_state_equal_several_states(kind, batch):
    separate = Problem(models.SMALL["ModelB"], batch=batch, steps=3)
    grouped = Grouped(kind)
    brainstate.nn.init_all_states(grouped, **({} if batch is None else dict(batch_size=batch)))
    grouped.W.weight.value = separate.net.layers[0].W.weight.value
    learner = learner_of(grouped, separate.sequence[0][0])
    assert [g.num_state for g in learner.graph.hidden_groups] == [2]
    assert len(learner.graph.hidden_param_op_relations) == 1
    step = jit(grad(lambda x, target: ((learner(x) - target) ** 2).sum(), learner.param_states))
    expected_steps = separate.oracle().online(PPProp(0.9), separate.sequence)[0]
    for (_, expected), args in zip(expected_steps, separate.sequence, strict=True):
        ours = step(*args)
        assert_close({"W": ours[("W", "weight")]}, {"W": expected[("layers", 0, "W", "weight")]})


@pytest.mark.parametrize("place", ["operation", "beside"])
def test_a_bias_in_its_own_parameter(place):
    def step(m, x):
        bias = m.b.value if place == "operation" else None
        y = matmul(x, m.w.value, bias)
        m.h.value = jnp.tanh(0.5 * m.h.value + (y if place == "operation" else y + m.b.value))

    learner = check_step(step, w=W, b=UNIT)
    traced = {p for r in learner.graph.hidden_param_op_relations for p in r.trainable_paths.values()}
    assert (("layers", 0, "b") in traced) == (place == "operation")


LARGER = {
    "batch axis": ((2, N), lambda y: y),
    "repeat": ((2 * N,), lambda y: jnp.concatenate([y, y])),
}


@pytest.mark.parametrize("how", LARGER)
def test_an_output_of_another_shape_than_its_state_is_one_error_at_compile_time(how):
    shape, spread = LARGER[how]

    def step(m, x):
        m.h.value = 0.5 * m.h.value + spread(matmul(x, m.w.value))
        return m.h.value

    model = Plain(step, w=ParamState(W), h=HiddenState(jnp.zeros(shape)))
    error, message = (
        (braintrace.CompilationError, "Nothing in Plain") if how == "repeat" else (ValueError, r"\(3,\).*h")
    )
    with pytest.raises(error, match=message):
        learner_of(model, jnp.ones(N_IN))


@pytest.mark.parametrize("drive", ["loop", "scan", "etrace_grad"])
@pytest.mark.parametrize("dtype", ["bool", "int32", "uint8"])
@pytest.mark.parametrize("batch", [None, 2])
def test_integer_spikes_leave_float_traces(dtype, drive, batch):
    problem = Problem(models.SMALL["ModelA"], batch=batch, kind=dtype)
    floats = [(x.astype(jnp.float32), target) for x, target in problem.sequence]
    expected = total(problem.oracle().online(PPProp(0.9), floats)[0])
    learner = problem.learner(0.9)
    assert all(x.value.dtype == jnp.float32 for x in learner.etrace_xs.values())
    step = problem.step(learner)
    if drive == "loop":
        ours = total([(None, step(*args)[0]) for args in problem.sequence])
    elif drive == "scan":
        ours = jax.tree.map(lambda g: g.sum(0), for_loop(lambda *args: step(*args)[0], *problem.sequences()))
    else:
        ours = learner.etrace_grad(
            *problem.sequences(), step_fn=lambda *a: problem.loss(problem.net, learner, *a), reduction="sum"
        )
    assert_close(dict(ours), expected)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32-x64", "float64"])
@pytest.mark.parametrize("drive", ["loop", "etrace_grad"])
def test_a_model_is_trained_in_its_own_dtype(precision, drive):
    p = PRECISIONS[precision]
    with p():
        problem = Problem(models.SMALL["ModelB"], batch=2, steps=p.steps, dtype=p.dtype)
        learner = problem.learner(0.9)
        if drive == "loop":
            ours = total(problem.online(learner))
        else:
            ours = learner.etrace_grad(
                *problem.sequences(), step_fn=lambda *a: problem.loss(problem.net, learner, *a), reduction="sum"
            )
        assert {x.dtype for x in jax.tree.leaves(dict(ours))} == {jnp.dtype(p.dtype)}
        assert {s.value.dtype for s in problem.net.states(HiddenState).values()} == {jnp.dtype(p.dtype)}
        assert_close(dict(ours), total(problem.oracle().online(PPProp(0.9), problem.sequence)[0]), p.tol)


# -- asking for traces, resetting them


def own_bias_and_leak(m, x):
    keep = braintrace.element_wise(m.leak.value)
    m.h.value = keep * m.h.value + braintrace.matmul(x, m.w.value, m.b.value)
    return m.h.value @ m.out.value


def leaky_model(batch=None):
    shape = (N,) if batch is None else (batch, N)
    params = dict(w=W, b=UNIT, leak=UNIT, out=SQUARE, never=UNIT)
    return Plain(own_bias_and_leak, h=HiddenState(jnp.zeros(shape)), **{k: ParamState(v) for k, v in params.items()})


TRACES = {"w": [(N_IN,)], "b": [(N_IN,)], "leak": []}


@pytest.mark.filterwarnings("ignore:.*never reads")
@pytest.mark.parametrize("name", TRACES)
def test_every_trained_parameter_shows_its_trace(name):
    model = leaky_model()
    learner = learner_of(model, jnp.ones(N_IN))
    for weight in (getattr(model, name), (name,)):
        xs, dfs = learner.get_etrace_of(weight)
        assert [x.shape for x in xs.values()] == TRACES[name]
        assert [f.shape for f in dfs.values()] == [(N, 1)]


@pytest.mark.filterwarnings("ignore:.*never reads")
@pytest.mark.parametrize("path, named", [(("out",), "out"), (("never",), "never"), (("no", "such"), "no.such")])
def test_a_parameter_without_a_trace_is_named(path, named):
    learner = learner_of(leaky_model(), jnp.ones(N_IN))
    with pytest.raises(ValueError, match=f"'{named}'"):
        learner.get_etrace_of(path)
    with pytest.raises(ValueError):
        learner.get_etrace_of(ParamState(UNIT))


@pytest.mark.filterwarnings("ignore:.*never reads")
@pytest.mark.parametrize("batch, x_shape, f_shape", [(None, (N_IN,), (N, 1)), (2, (5, N_IN), (5, N, 1))])
def test_only_a_batch_axis_is_replaced_on_reset(batch, x_shape, f_shape):
    def step(m, x):
        m.h.value = 0.5 * m.h.value + braintrace.matmul(x, m.w.value)
        return m.h.value

    x = jnp.ones((N_IN,) if batch is None else (batch, N_IN))
    learner = learner_of(Plain(step, w=ParamState(W), h=HiddenState(jnp.zeros((*x.shape[:-1], N)))), x)
    learner(x)
    learner.reset_state(batch_size=5)
    assert [s.value.shape for s in learner.etrace_xs.values()] == [x_shape]
    assert [s.value.shape for s in learner.etrace_dfs.values()] == [f_shape]
    assert learner.running_index.value == 0
    assert all((s.value == 0).all() for s in [*learner.etrace_xs.values(), *learner.etrace_dfs.values()])


# -- arguments are checked, whatever the flags of the interpreter

BAD_DECAYS = {
    "1.0": ValueError,
    "-0.1": ValueError,
    "0": ValueError,
    "-1": ValueError,
    "True": TypeError,
    "np.True_": TypeError,
    "float('nan')": ValueError,
    "'0.9'": ValueError,
    "None": TypeError,
    "(0.9,)": ValueError,
    "(0.9, 1.5)": ValueError,
    "[0.9, 0.9, 0.9]": ValueError,
}
GOOD_DECAYS = {"np.float32(0.5)": 0.5, "np.int64(19)": 0.9, "np.float64(0.0)": 0.0, "1": 0.0, "[3, 3]": 0.5}


@pytest.mark.parametrize("decay", BAD_DECAYS)
def test_a_wrong_decay_or_rank_is_refused(decay):
    with pytest.raises(BAD_DECAYS[decay]):
        braintrace.pp_prop(braintrace.nn.GRUCell(2, 3), eval(decay, dict(np=np)))


@pytest.mark.parametrize("decay", GOOD_DECAYS)
def test_numpy_numbers_are_numbers(decay):
    learner = braintrace.pp_prop(braintrace.nn.GRUCell(2, 3), eval(decay, dict(np=np)))
    assert learner.decay == pytest.approx(GOOD_DECAYS[decay], abs=1e-7) and type(learner.decay) is float


UNCHECKED = """
import numpy as np, braintrace
assert False, 'asserts are on'
cell = braintrace.nn.GRUCell(2, 3)
for decay in {decays}:
    try:
        braintrace.pp_prop(cell, decay)
    except (TypeError, ValueError):
        continue
    raise SystemExit(f'accepted {{decay!r}}')
try:
    braintrace.pp_prop(cell, 0.9, vjp_method='foo')
except ValueError as e:
    print('refused', e)
"""


def test_arguments_are_checked_without_asserts():
    code = UNCHECKED.format(decays="[" + ", ".join(BAD_DECAYS) + "]")
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "'foo'" in done.stdout, done.stdout + done.stderr


# -- programs that the compiler must take


@jax.custom_vjp
def gated(y):
    return y * (y > 0)


gated.defvjp(lambda y: (gated(y), y), lambda y, cot: (cot / (1 + y**2),))


@jax.custom_vjp
def softened(y):
    return jax.nn.softmax(y, -1)


softened.defvjp(lambda y: (softened(y), y), lambda y, cot: (0.5 * cot + jnp.roll(cot, 1, -1),))


@jax.custom_jvp
def spike(v):
    return (v > 0.3).astype(v.dtype)


spike.defjvp(lambda primals, tangents: (spike(primals[0]), tangents[0] / (1 + primals[0] ** 2)))


@pytest.mark.parametrize("function", [gated, softened, spike], ids=["reverse", "reverse and mixing", "forward"])
def test_a_users_derivative_between_operation_and_state_is_used(function):
    def step(m, x):
        m.h.value = 0.5 * m.h.value + 0.3 * function(matmul(x, m.w.value) + 0.2 * m.h.value)

    check_step(step, w=W)


def test_a_users_reverse_rule_with_two_arguments():
    @jax.custom_vjp
    def blend(h, y):
        return 0.5 * h + y

    blend.defvjp(lambda h, y: (blend(h, y), y), lambda y, cot: (0.25 * cot, cot * (1 + y**2)))

    def step(m, x):
        m.h.value = jnp.tanh(blend(m.h.value, matmul(x, m.w.value)))

    check_step(step, w=W)


def test_constants_among_the_outputs():
    def step(m, x):
        m.h.value = jnp.tanh(0.5 * m.h.value + braintrace.matmul(x, m.w.value))
        return {"o": m.h.value, "n": 3, "f": 0.5, "x": x, "z": jnp.zeros(2), "nothing": None, "w": m.w.value}

    model = one_input(step)
    learner = learner_of(model, ONE)
    out = learner(ONE)
    assert (out["n"], out["f"], out["nothing"]) == (3, 0.5, None)
    np.testing.assert_array_equal(out["z"], [0.0, 0.0])
    model.h.value = jnp.zeros(3)
    truth = 1 - jnp.tanh(model.w.value) ** 2
    learner.reset_state()
    np.testing.assert_allclose(gradient(learner, ONE, lambda out: out["o"].sum())[("w",)], truth, rtol=1e-5)


def product(m, x):
    m.a.value = 0.9 * m.a.value + matmul(x, m.w.value)
    m.b.value = 0.8 * m.b.value + matmul(x, m.v.value)
    m.h.value = m.a.value * m.b.value


def product_of_old(m, x):
    a, b = m.a.value, m.b.value
    m.h.value = jnp.tanh(a * b)
    m.a.value = 0.9 * a + matmul(x, m.w.value)
    m.b.value = 0.8 * b + 0.1 * a * m.h.value + matmul(x, m.v.value)


def choice(m, x):
    m.a.value = 0.9 * m.a.value + matmul(x, m.w.value)
    m.b.value = 0.8 * m.b.value + matmul(x, m.v.value)
    m.h.value = jnp.where(m.a.value > m.b.value, m.a.value, 0.3 * m.b.value)


def all_three(m, aux):
    return m.h.value + m.a.value + m.b.value


@pytest.mark.parametrize("step", [product, product_of_old, choice])
def test_one_equation_of_two_hidden_states(step):
    check_step(step, all_three, (("a", "b", "h"),), w=W, v=W)


def test_an_operation_inside_checkpoint_is_found():
    def step(m, x):
        y = jax.checkpoint(lambda x, w: jnp.tanh(braintrace.matmul(x, w)))(x, m.w.value)
        m.h.value = 0.5 * m.h.value + y + braintrace.matmul(x, m.v.value)
        return m.h.value

    model = one_input(step, v=ParamState(jnp.ones((1, 3))))
    learner = learner_of(model, ONE)
    assert [r.path for r in learner.graph.hidden_param_op_relations] == [("w",), ("v",)]
    found = gradient(learner, ONE)
    np.testing.assert_allclose(found[("w",)], 1 / jnp.cosh(model.w.value) ** 2, rtol=1e-5)
    np.testing.assert_allclose(found[("v",)], jnp.ones((1, 3)), rtol=1e-6)


FREE_OF_WEIGHTS = {
    "cond": lambda h, x: jax.lax.cond(x.sum() > 2, lambda h: 0.5 * h, lambda h: 0.2 * h**2, h),
    "switch": lambda h, x: jax.lax.switch(x.sum().astype(int), [jnp.sin, jnp.cos, jnp.tanh], h),
    "scan": lambda h, x: jax.lax.scan(lambda h, _: (h - 0.1 * h**3, None), h, None, length=4)[0],
    "fori_loop": lambda h, x: jax.lax.fori_loop(0, 4, lambda i, h: 0.8 * h + 0.01 * i, h),
    "scan that mixes": lambda h, x: jax.lax.scan(lambda h, _: (0.5 * (h + jnp.roll(h, 1, -1)), None), h, None, 2)[0],
    "where": lambda h, x: jnp.where(h > 0, 0.5 * h, 0.2 * h),
    "nested jit": lambda h, x: jax.jit(jax.jit(jnp.tanh))(h),
}


@pytest.mark.parametrize("of", ["old value", "operation"])
@pytest.mark.parametrize("how", FREE_OF_WEIGHTS)
def test_control_flow_without_weights(how, of):
    flow = FREE_OF_WEIGHTS[how]

    def step(m, x):
        y = matmul(x, m.w.value)
        if of == "operation":
            m.h.value = 0.5 * m.h.value + flow(y, x)
        else:
            m.h.value = jnp.tanh(flow(m.h.value, x) + y)

    check_step(step, w=W)


def one_value_for_two(m, x):
    m.h.value = m.b.value = jnp.tanh(0.5 * m.h.value + 0.2 * m.b.value + matmul(x, m.w.value))


def stored_output(m, x):
    m.h.value = matmul(x, m.w.value)


def never_written(m, x):
    m.h.value = 0.5 * m.h.value + m.b.value + matmul(x, m.w.value)


def written_twice(m, x):
    m.h.value = 0.5 * m.h.value + matmul(x, m.w.value)
    m.h.value = jnp.tanh(m.h.value)


def product_of_operations(m, x):
    m.h.value = 0.5 * m.h.value + matmul(x, m.w.value) * matmul(x, m.v.value)


def parts_of_the_units(m, x):
    h, y = m.h.value, matmul(x, m.w.value)
    m.h.value = jnp.concatenate([0.5 * h[..., :1] + y[..., :1], jnp.tanh(h[..., 1:]) * y[..., 1:]], -1)


def written_in_place(m, x):
    y = matmul(x, m.w.value)
    m.h.value = jnp.tanh((0.8 * m.h.value).at[..., 0].set(0.3).at[..., 1:].add(y[..., 1:]))


@pytest.mark.parametrize(
    "step, hidden",
    [
        (one_value_for_two, "hb"),
        (stored_output, "h"),
        (never_written, "hb"),
        (written_twice, "h"),
        (product_of_operations, "h"),
        (parts_of_the_units, "h"),
        (written_in_place, "h"),
    ],
)
def test_ways_to_write_a_step(step, hidden):
    more = dict(v=W) if step is product_of_operations else {}
    check_step(
        step, (lambda m, aux: m.h.value + m.b.value**2) if "b" in hidden else None, (tuple(hidden),), w=W, **more
    )


@pytest.mark.parametrize("batch", [None, 2])
def test_a_map_of_sequences_onto_states_with_a_sequence_axis(batch):
    layer = braintrace.nn.Linear(N_IN, N)
    lead = (4,) if batch is None else (batch, 4)

    def step(m, x):
        m.h.value = jnp.tanh(0.5 * m.h.value + m.layer(x))
        return m.h.value

    model = Plain(step, layer=layer, h=HiddenState(jnp.zeros((*lead, N))))
    x = 0.3 * jnp.ones((*lead, N_IN))  # small: in float32 the slope of a saturated tanh has few digits
    w = layer.weight.value["weight"]
    learner = learner_of(model, x)
    assert len(learner.graph.hidden_param_op_relations) == 1
    truth = jax.grad(lambda w: (jnp.tanh(x @ w) * RAMP).sum())(w)
    ours = gradient(learner, x, lambda out: (out * RAMP).sum())
    np.testing.assert_allclose(ours[("layer", "weight")]["weight"], truth, rtol=1e-5)


@pytest.mark.parametrize("rule", [braintrace.pp_prop, braintrace.D_RTRL])
@pytest.mark.parametrize("shape", [(), (1,), (N,)])
def test_a_shared_element_wise_parameter_gets_its_gradient(shape, rule):
    def step(m, x):
        m.h.value = jnp.tanh(braintrace.element_wise(m.leak.value) * m.h.value + braintrace.matmul(x, m.w.value))
        return m.h.value

    model = one_input(step, leak=ParamState(jnp.full(shape, 0.7)))
    model.h.value = RAMP
    truth = grad(lambda: (model(ONE) * RAMP).sum(), model.states(ParamState))()
    model.h.value = RAMP
    assert_close(gradient(learner_of(model, ONE, rule=rule), ONE, lambda out: (out * RAMP).sum()), truth)


@pytest.mark.parametrize("rule", [braintrace.pp_prop, braintrace.D_RTRL])
@pytest.mark.parametrize("channel_first, size", [(True, (N, 4)), (True, (N, N)), (False, (4, N))])
def test_the_bias_of_a_convolution(channel_first, size, rule):
    """Also where a spatial axis is as long as that of the channels."""
    layer = braintrace.nn.Conv1d(size, N, 2, b_init=braintools.init.Normal(0.0, 1.0), channel_first=channel_first)

    def step(m, x):
        m.h.value = jnp.tanh(0.5 * m.h.value + m.layer(x))
        return m.h.value

    x = jax.random.normal(jax.random.key(0), (2, *size))
    cost = jax.random.normal(jax.random.key(1), (2, *layer.out_size))
    model = Plain(step, layer=layer, h=HiddenState(jnp.zeros((2, *layer.out_size))))
    truth = grad(lambda: (jnp.tanh(layer(x)) * cost).sum(), model.states(ParamState))()
    assert_close(gradient(learner_of(model, x, rule=rule), x, lambda out: (out * cost).sum()), truth)


@pytest.mark.parametrize("rule", [braintrace.pp_prop, braintrace.D_RTRL])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("layout, size", [("NCH", (N, 4)), ("NCH", (N, N)), ("NHC", (4, N))])
def test_a_vector_as_the_bias_of_a_convolution(layout, size, batch, rule):
    """One entry per channel, as it is given to the operation itself."""
    shape = {"NCH": (N, N, 2), "NHC": (2, N, N)}[layout]
    numbers = (layout, {"NCH": "OIH", "NHC": "HIO"}[layout], layout)
    kernel, b = (ParamState(jax.random.normal(jax.random.key(k), s)) for k, s in enumerate([shape, (N,)]))
    x = jax.random.normal(jax.random.key(2), (*batch, *size))

    def plain(x):
        y = jax.lax.conv_general_dilated(x.reshape(-1, *size), kernel.value, (1,), "SAME", dimension_numbers=numbers)
        return (y + (b.value[:, None] if layout == "NCH" else b.value)).reshape(*batch, *y.shape[1:])

    def step(m, x):
        m.h.value = jnp.tanh(0.5 * m.h.value + braintrace.conv(x, m.k.value, m.b.value, dimension_numbers=numbers))
        return m.h.value

    model = Plain(step, k=kernel, b=b, h=HiddenState(jnp.zeros(x.shape)))
    cost = jax.random.normal(jax.random.key(3), x.shape)
    truth = grad(lambda: (jnp.tanh(plain(x)) * cost).sum(), model.states(ParamState))()
    assert_close(gradient(learner_of(model, x, rule=rule), x, lambda out: (out * cost).sum()), truth)


@pytest.mark.parametrize("vmap", [False, True])
def test_a_filtered_trace_advances_without_gradients(vmap):
    """Four steps forward, then one gradient: the filter has seen all of them."""
    problem = Problem(models.SMALL["ModelA"], batch=2)
    steps, _ = problem.oracle().online(DRTRL(kappa=0.6), problem.sequence)
    net = models.build(models.SMALL["ModelA"], None, models.library(), None if vmap else 2)
    net.layers[0].W.weight.value = problem.net.layers[0].W.weight.value
    options = dict(kappa_filter_decay=0.6, batch_size=2, vmap=vmap)
    learner = braintrace.compile(net, "eprop", problem.sequence[0][0], **options)
    for x, _ in problem.sequence[:-1]:
        learner(x)
    grads = grad(lambda: problem.loss(net, learner, *problem.sequence[-1]), net.states(ParamState))()
    assert_close(dict(grads), steps[-1][1])


def test_an_element_wise_map_that_permutes_is_exact_now():
    def step(m, x):
        m.h.value = x + braintrace.element_wise(m.w.value, weight_fn=lambda w: 2 * w[::-1])
        return m.h.value

    model = one_input(step, weight=jnp.zeros(3))
    ours = gradient(learner_of(model, jnp.ones(3)), jnp.ones(3), lambda out: (out * RAMP).sum())
    np.testing.assert_allclose(ours[("w",)], [6.0, 4.0, 2.0], rtol=1e-6)


def one_hot(indices, weights):
    weight = weights["weight"]
    return jax.nn.one_hot(indices, weight.shape[0], dtype=weight.dtype)


def test_two_tables_read_by_the_same_indices_keep_their_own_inputs():
    table = braintrace.register_primitive("table", lambda i, w: w[i])
    table.register_etp_rules(pp_x_repr=one_hot, xy_to_dw=lambda x, cot, weights: {"weight": x[:, None] * cot})

    def step(m, i):
        m.h.value = 0.5 * m.h.value + table.bind(i, m.w.value) + table.bind(i, m.v.value)
        return m.h.value

    model = one_input(step, weight=jnp.zeros((5, 3)), v=ParamState(jnp.zeros((7, 3))))
    learner = learner_of(model, jnp.asarray(4))
    assert sorted(s.value.shape for s in learner.etrace_xs.values()) == [(5,), (7,)]
    learner(jnp.asarray(2))
    ours = gradient(learner, jnp.asarray(4))
    for path, size in ((("w",), 5), (("v",), 7)):
        # Trace of step 1 and 2: x = .9 onehot(2) + onehot(4), f = .9 * .5 * .1 + .1, corrected by 1 - .81.
        expected = (0.9 * np.eye(size)[2] + np.eye(size)[4])[:, None] * np.full(3, 0.145 / 0.19)
        np.testing.assert_allclose(ours[path], expected, rtol=1e-5)


def test_second_derivatives_of_parameters_are_right_or_refused():
    problem = Problem(models.SMALL["ModelA"], steps=1)
    learner = problem.learner(0.9)
    (x, target), params = problem.sequence[0], learner.param_states

    def norm():
        grads = grad(lambda: problem.loss(problem.net, learner, x, target), params)()
        return sum((g**2).sum() for g in jax.tree.leaves(grads))

    w = problem.net.layers[0].W.weight.value

    def truth(w):
        inner = jax.grad(lambda w: ((jnp.tanh(x @ w["weight"] + w["bias"]) - target) ** 2).sum())(w)
        return sum((g**2).sum() for g in jax.tree.leaves(inner))

    try:
        (ours,) = grad(norm, params)().values()
    except Exception as error:
        assert "second" in str(error) or "differentiat" in str(error), error
        return
    assert_close({"w": ours}, {"w": jax.grad(truth)(w)})


# -- the same with a trace per weight


def prepared(how):
    def step(m, x):
        m.h.value = jnp.tanh(0.5 * m.h.value + matmul(x, PREPARED[how][1](m.w.value)))

    return (step, dict(w=PREPARED[how][0]))


def paired(how):
    a, b, combine = PAIRS[how]

    def step(m, x):
        m.h.value = jnp.tanh(0.5 * m.h.value + matmul(x, combine(m.a.value, m.b.value)))

    return (step, dict(a=a, b=b))


def tailed(tail):
    def step(m, x):
        m.h.value = jnp.tanh(0.5 * m.h.value + TAILS[tail](matmul(x, m.w.value)))

    return (step, dict(w=W))


def through(function):
    def step(m, x):
        m.h.value = 0.5 * m.h.value + 0.3 * function(matmul(x, m.w.value) + 0.2 * m.h.value)

    return (step, dict(w=W))


PER_WEIGHT = {
    "plain input": (unmarked_input, dict(w=W, v=W)),
    "gain": (plain_gain, dict(w=W, gain=UNIT, shift=UNIT)),
    "chain of two": (chain_of_two, dict(w=W, output=last_of_two, hidden=(("h", "b"),))),
    "chain of three": (chain_of_three, dict(w=W, output=last_of_three, hidden=(("h", "b", "c"),))),
    "two groups": (two_groups, dict(w=W, output=both_groups, hidden=(("h",), ("b",)), steps=1)),
    "twice": (twice, dict(w=W)),
    "operand and factor": (operand_and_factor, dict(w=W, v=UNIT)),
    "tied readout": (leaky, dict(w=W, output=tied)),
    "output beside": (shows_operation, dict(w=W, output=lambda m, y: m.h.value + y, steps=1)),
    "product of states": (product, dict(w=W, v=W, output=all_three, hidden=(("a", "b", "h"),))),
    "choice of states": (choice, dict(w=W, v=W, output=all_three, hidden=(("a", "b", "h"),))),
    "written in place": (written_in_place, dict(w=W)),
    **{how: prepared(how) for how in ("mask", "square transpose", "standardised", "tied rows")},
    **{f"{how} of two": paired(how) for how in ("sum", "product")},
    **{tail: tailed(tail) for tail in ("roll", "cumsum", "layer norm", "constant matrix")},
    "reverse rule": through(gated),
    "reverse rule that mixes": through(softened),
}


@pytest.mark.parametrize("row", PER_WEIGHT)
def test_the_same_with_a_trace_per_weight(row):
    step, options = PER_WEIGHT[row]
    check_step(step, rule=DRTRL(), **options)
