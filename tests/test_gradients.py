"""Gradients of every parameter at every step, against the dense oracle of `helpers`."""

from itertools import product

import brainstate
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import steps
from brainstate import HiddenState, ParamState
from brainstate.transform import for_loop, grad, jit
from helpers import PRECISIONS, Oracle, PPProp, assert_close, leaf, total
from models import CELLS, MORE_CELLS, READOUTS, SMALL, SPIKING, STACKED, N, Problem
from steps import LENGTHS, MIXES, OLD_OUTPUTS, PAIRS, PREPARED, STEPS

import braintrace

pytestmark = pytest.mark.usefixtures("time_step")

ALL = CELLS | MORE_CELLS | SPIKING | STACKED | SMALL
ALONE = SMALL | MORE_CELLS | {"alif-cuba": lambda nn: [models.Spiking(models.N_IN, models.N, neuron="ALIF")]}
BATCHES = [None, 2]
SILENT = set(SPIKING) - {"lif-cuba"} | {"lif-alif"}


def check(problem, rule=PPProp(0.9), tol=1e-5, silent=False, **options):
    """Every step of the library equals the oracle's; the first one, with no history, equals back-propagation.

    Unless its neurons may be `silent`, every parameter of the model acts on the last loss.
    """
    learner = problem.learner(**(options if "make" in options else {"decay_or_rank": 0.9} | options))
    ours = problem.online(learner)
    oracle = problem.oracle()
    theirs, after = oracle.online(rule, problem.sequence)
    assert_close(ours[0][1], oracle.backward(problem.sequence[0]), tol, "step 0 against back-propagation")
    for t, ((loss, grads), (expected_loss, expected)) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(np.float64(loss), np.float64(expected_loss), rtol=tol)
        assert_close(grads, expected, tol, f"step {t}")
        for path, state in learner.param_states.items():
            assert jax.tree.map(jnp.result_type, grads[path]) == jax.tree.map(jnp.result_type, state.value)
    for path, state in problem.net.states(HiddenState).items():
        assert_close({path: state.value}, {path: after[path]}, tol, "state")
    for path, gradient in ({} if silent else ours[-1][1]).items():
        for i, g in enumerate(jax.tree.leaves(gradient)):
            assert np.abs(g).max() > 1e-4, ("too small to be compared", path, i)
    return learner, ours


@pytest.mark.parametrize(
    "model, readout, batch",
    [
        *product(CELLS | SPIKING | STACKED, ["leaky"], BATCHES),
        *((model, *more) for model in CELLS | SPIKING | STACKED for more in [("plain", None), ("linear", 2)]),
        *[("gru", "plain", 2), ("gru", "linear", None)],
    ],
)
def test_models_and_readouts(model, readout, batch):
    check(Problem(ALL[model], READOUTS[readout], batch), silent=model in SILENT)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model", ALONE)
def test_structures(model, batch):
    check(Problem(ALONE[model], None, batch))


def check_step(name, batch=2, rule=PPProp(0.9), steps=None, **options):
    problem = Problem(STEPS[name], batch=batch, steps=steps or LENGTHS[name])
    learner, ours = check(problem, rule, **options)
    sizes = [len(g) for g in problem.twin.layers[0].groups()]
    assert [g.num_state for g in learner.graph.hidden_groups] == sizes
    assert [len(g.hidden_paths) for g in learner.graph.hidden_groups] == sizes
    return learner, ours


@pytest.mark.parametrize("name, batch", steps.CASES)
def test_steps(name, batch):
    learner, _ = check_step(name, batch)
    paths = [r.path for r in learner.graph.hidden_param_op_relations]
    if name in PREPARED:
        assert paths == [("layers", 0, "w")]
    if name in PAIRS:
        assert paths == [("layers", 0, "a")] and not learner.report.excluded_weights
        for parameter in "ab":
            (x,) = learner.get_etrace_of(("layers", 0, parameter))[0].values()
            assert x.shape == (batch, models.N_IN)
    if "bias" in name:
        traced = {p for r in learner.graph.hidden_param_op_relations for p in r.trainable_paths.values()}
        assert (("layers", 0, "b") in traced) == (name == "bias of the operation")


@pytest.mark.parametrize("name", OLD_OUTPUTS)
def test_an_output_that_reads_the_old_value_credits_the_trace_before(name):
    _, ours = check_step(name, steps=4)
    assert np.abs(leaf(ours[1][1])).max() > 1e-2


# -- by hand


def one_input(step, w, **states):
    """A step of one input onto three units, `h` its hidden state."""
    return models.Plain(step, w=ParamState(w), h=HiddenState(jnp.zeros(N)), **states)


def learner_of(model, x, **options):
    learner = braintrace.pp_prop(model, **({"decay_or_rank": 0.9} | options))
    learner.compile_graph(x)
    return learner


def gradient(learner, x, loss):
    (found,) = jit(grad(lambda: loss(learner(x)), learner.param_states))().values()
    return found


def ramped(out):
    return (out * RAMP).sum()


ONE, ROW, RAMP = jnp.ones(1), jnp.array([[0.2, -0.1, 0.4]]), jnp.arange(1.0, N + 1)


def writes(f):
    def step(m, x):
        m.h.value = f(models.matmul(x, m.w.value))
        return m.h.value

    return step


def prepares(f):
    def step(m, x):
        m.h.value = models.matmul(x, f(m.w.value))
        return m.h.value

    return step


def chain_of_powers(m, x):
    """h = w, b = h^2, c = b h = w^3"""
    m.h.value = models.matmul(x, m.w.value)
    m.b.value = m.h.value**2
    m.c.value = m.b.value * m.h.value
    return m.c.value


def fan_out(m, x):
    y = models.matmul(x, m.w.value)
    m.h.value = y
    m.b.value = y + m.h.value.sum()
    return m.h.value + m.b.value


def beside(m, x):
    y = models.matmul(x, m.w.value)
    m.h.value = 0.5 * m.h.value + y
    return m.h.value + y


def permuting_hook(m, x):
    m.h.value = x + braintrace.element_wise(m.w.value[0], weight_fn=lambda w: 2 * w[::-1])
    return m.h.value


BY_HAND = {  # step, derivative by the weight of the loss that weighs the units by RAMP
    "roll": (writes(MIXES["roll"]), [2, 3, 1]),
    "cumsum": (writes(MIXES["cumsum"]), [6, 5, 3]),
    "value and sum": (writes(MIXES["value and sum"]), [7, 8, 9]),
    "mask": (prepares(lambda w: w * jnp.array([1.0, 0.0, 1.0])), [1, 0, 3]),
    "scale": (prepares(lambda w: 2 * w), [2, 4, 6]),
    "chain of powers": (chain_of_powers, 3 * ROW[0] ** 2 * RAMP),
    "fan out": (fan_out, 2 * RAMP + RAMP.sum()),
    "operation beside": (beside, [2, 4, 6]),
    "permuting hook": (permuting_hook, [6, 4, 2]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_one_step_by_hand(name):
    step, expected = BY_HAND[name]
    model = one_input(step, ROW, b=HiddenState(jnp.zeros(N)), c=HiddenState(jnp.zeros(N)))
    tol = 1e-7 if name == "operation beside" else 1e-6
    np.testing.assert_allclose(gradient(learner_of(model, ONE), ONE, ramped), [expected], rtol=tol)


def before_the_update(m, x):
    before = m.h.value
    m.h.value = jnp.tanh(before + models.matmul(x, m.w.value))
    return before


@pytest.mark.parametrize("vjp_method", ["single-step", "multi-step"])
def test_a_trace_of_one_step_is_corrected_for_one_step(vjp_method):
    """The loss of step 2 reads the state that step 1 left: no history, so its gradient is exact."""
    learner = learner_of(one_input(before_the_update, ROW), ONE, vjp_method=vjp_method)
    learner(ONE)
    np.testing.assert_allclose(gradient(learner, ONE, ramped), RAMP * (1 - jnp.tanh(ROW) ** 2), rtol=1e-5)


def test_bias_correction_lasts_beyond_a_thousand_steps():
    """h sums y: the corrected sensitivity is 1, so the gradient is the filtered input (1 - a^n) / (1 - a)."""
    decay = 0.9999

    def step(m, x):
        m.h.value = m.h.value + models.matmul(x, m.w.value)
        return m.h.value

    with PRECISIONS["float64"]():
        x = jnp.ones(1)
        learner = learner_of(one_input(step, jnp.zeros((1, N))), x, decay_or_rank=decay)
        per_step = for_loop(lambda x: gradient(learner, x, jnp.sum)[0, 0], jnp.ones((1003, 1)))
    n = np.arange(1, 1004)
    np.testing.assert_allclose(per_step, (1 - decay**n) / (1 - decay), rtol=1e-8)


class OneState(brainstate.nn.Module):
    """`ModelB` with both hidden variables in one state."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.W = braintrace.nn.Linear(models.N_IN, N)

    def init_state(self, batch_size=None, **_):
        zeros = jnp.zeros((N,) if batch_size is None else (batch_size, N))
        self.s = (
            brainstate.HiddenTreeState([zeros, zeros])
            if self.kind == "tree"
            else brainstate.HiddenGroupState(jnp.zeros((*zeros.shape, 2)))
        )

    def update(self, x):
        h, c = self.s.value[..., 0], self.s.value[..., 1]
        y = self.W(x)
        carried = 0.6 * h + 0.3 * c, 0.7 * c - 0.2 * h
        if self.kind == "product":  # of the variables of each position, as of a linear system's propagator
            carried = jnp.moveaxis(self.s.value @ jnp.array([[0.6, -0.2], [0.3, 0.7]]), -1, 0)
        new = jnp.tanh(carried[0] + y), carried[1] + 0.5 * y
        if self.kind == "tree":
            self.s.set_value(list(new))
        else:
            self.s.value = jnp.stack(new, -1)
        return self.s.value[..., 0] + self.s.value[..., 1] ** 2


@pytest.mark.parametrize("batch", [None, 2, 4])
@pytest.mark.parametrize("kind", ["group", "tree", "product"])
def test_several_variables_in_one_state_equal_several_states(kind, batch):
    separate = Problem(SMALL["ModelB"], batch=batch, steps=3)
    model = OneState(kind)
    brainstate.nn.init_all_states(model, **({} if batch is None else dict(batch_size=batch)))
    model.W.weight.value = separate.net.layers[0].W.weight.value
    learner = learner_of(model, separate.sequence[0][0])
    assert [g.num_state for g in learner.graph.hidden_groups] == [2]
    assert len(learner.graph.hidden_param_op_relations) == 1
    step = jit(grad(lambda x, target: ((learner(x) - target) ** 2).sum(), learner.param_states))
    expected_steps = separate.oracle().online(PPProp(0.9), separate.sequence)[0]
    for (_, expected), args in zip(expected_steps, separate.sequence, strict=True):
        ours = step(*args)
        assert_close({"W": ours[("W", "weight")]}, {"W": expected[("layers", 0, "W", "weight")]})


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "float32"])
@pytest.mark.parametrize("model, readout", [("gru", "linear"), ("lstm", "leaky"), ("Leak", "plain"), ("Chain", None)])
def test_precisions(model, readout, precision):
    p = PRECISIONS[precision]
    with p():
        check(Problem(ALL[model], READOUTS.get(readout), 2, steps=p.steps, dtype=p.dtype), tol=p.tol)


@pytest.mark.parametrize("precision", ["float64", "float32-x64"])
def test_spiking_precisions(precision):
    p = PRECISIONS[precision]
    with p():
        check(Problem(SPIKING["alif-coba"], READOUTS["leaky"], 2, dtype=p.dtype), tol=p.tol)


FEEDFORWARD = {
    "ModelA": SMALL["ModelA"],
    "Shared": SMALL["Shared"],
    "gru": CELLS["gru"],
    "alif": lambda nn: [models.Spiking(models.N_IN, models.N, neuron="ALIF", recurrent=False)],
}


@pytest.mark.parametrize("kind, batch", [("bool", None), ("bool", 2), ("int", 2)])
@pytest.mark.parametrize("model", FEEDFORWARD)
def test_spike_inputs(model, kind, batch):
    check(Problem(FEEDFORWARD[model], READOUTS["linear"], batch, kind=kind), silent=model == "alif")


@pytest.mark.parametrize("loss", models.LOSSES)
@pytest.mark.parametrize("model", ["gru", "lif-alif", "Chain"])
def test_losses(model, loss):
    check(Problem(ALL[model], READOUTS["leaky"], 2, loss=loss))


# -- the knobs of the rule

DECAYS = [  # decay_or_rank, the rule it means
    ((0.8, 0.5), PPProp(0.8, 0.5)),
    (19, PPProp(0.9)),
    ((3, 0.7), PPProp(0.5, 0.7)),
    (0.0, PPProp(0.0)),
    (1, PPProp(0.0)),
    (0.9999, PPProp(0.9999)),
]


@pytest.mark.parametrize("decay, rule", DECAYS)
def test_decays(decay, rule):
    problem = Problem(SMALL["ModelB"], READOUTS["plain"], 2)
    check(problem, rule, decay_or_rank=decay, tol=1e-5)


@pytest.mark.parametrize("wrong", [PPProp(0.85), PPProp(0.9, 0.85), PPProp(0.85, 0.9)])
@pytest.mark.parametrize("model", ["ModelB", "lstm"])
def test_a_wrong_decay_is_noticed(model, wrong):
    """Negative control: the comparison fails by far for a decay nearby, in later steps only."""
    problem = Problem(ALL[model], None, 2)
    ours = problem.online(problem.learner(decay_or_rank=0.9))
    theirs, _ = problem.oracle().online(wrong, problem.sequence)
    assert_close(ours[0][1], theirs[0][1])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(ours[-1][1], theirs[-1][1], 1e-3)


@pytest.mark.parametrize("decay", [0.5, 0.89])
def test_decay_changes_the_gradient(decay):
    here, there = (Problem(SMALL["ModelB"], None, 2) for _ in range(2))
    a, b = here.online(here.learner(0.9)), there.online(there.learner(decay))
    assert_close(a[0][1], b[0][1])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(a[-1][1], b[-1][1], 1e-3)


# -- the same numbers by other ways


@pytest.mark.parametrize(
    "model, readout", [("gru", "linear"), ("lif-alif", "leaky"), ("ReadsOld", None), ("Beside", None)]
)
def test_mapped_learner(model, readout):
    """`compile(vmap=True)` on a model without a batch axis equals the batched oracle."""
    batch = 2
    problem = Problem(ALL[model], READOUTS.get(readout), batch)
    single = models.build(ALL[model], READOUTS.get(readout), models.library())
    for path, state in single.states(ParamState).items():
        state.value = problem.net.states(ParamState)[path].value
    mapped = braintrace.compile(
        single, braintrace.pp_prop, problem.sequence[0][0], batch_size=batch, vmap=True, decay_or_rank=0.9
    )
    step = brainstate.transform.jit(
        brainstate.transform.grad(lambda *args: problem.loss(single, mapped, *args), mapped.module.param_states)
    )
    theirs, _ = problem.oracle().online(PPProp(0.9), problem.sequence)
    for args, (_, expected) in zip(problem.sequence, theirs):
        assert_close(dict(step(*args)), expected)


@pytest.mark.parametrize("model", ["gru", "lif-coba-hard", "ReadsOld", "Beside"])
def test_gradients_of_inputs_and_states(model):
    """Ordinary reverse mode through one step, at any step."""
    problem = Problem(ALL[model], READOUTS["leaky"], 2, steps=3)
    learner, oracle = problem.learner(0.9), problem.oracle()
    for args in problem.sequence[:-1]:
        learner(args[0])
    x, target = problem.sequence[-1]
    params, _ = oracle.values()
    now = {path: problem.net.states()[path].value for path in oracle.states}

    def expected(x, hidden):
        return oracle.run(params, now | hidden, (x, target))[0]

    dx, dh = jax.grad(expected, argnums=(0, 1))(x, {path: now[path] for path in oracle.hidden})
    f = brainstate.transform.grad(
        lambda x: problem.loss(problem.net, learner, x, target), learner.hidden_states, argnums=0
    )
    ours_h, ours_x = f(x)
    assert_close({"x": ours_x}, {"x": dx})
    assert_close(dict(ours_h), dh)


def test_sum_over_steps_is_not_bptt():
    """Negative control: with recurrent weights the online gradient is another vector than that of BPTT."""
    problem = Problem(CELLS["vanilla"], READOUTS["linear"], 2)
    ours = total(problem.online(problem.learner(0.9)))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(ours, Oracle(problem.twin, problem.loss).bptt(problem.sequence)[1], 1e-2)
