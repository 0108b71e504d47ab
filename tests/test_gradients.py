"""Gradients of every parameter at every step, against the dense oracle of `helpers`."""

import brainstate
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from brainstate import HiddenState, ParamState
from helpers import PRECISIONS, Oracle, PPProp, assert_close, total
from models import CELLS, MORE_CELLS, READOUTS, SMALL, SPIKING, STACKED, Problem

pytestmark = pytest.mark.usefixtures("time_step")

ALL = CELLS | MORE_CELLS | SPIKING | STACKED | SMALL
BATCHES = [None, 2]


def check(problem, rule=PPProp(0.9), tol=1e-5, **options):
    """Every step of the library equals the oracle's; the first one, with no history, equals back-propagation."""
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


@pytest.mark.parametrize("readout, batch", [("plain", None), ("linear", 2), ("leaky", None), ("leaky", 2)])
@pytest.mark.parametrize("model", CELLS | SPIKING | STACKED)
def test_models_and_readouts(model, readout, batch):
    check(Problem(ALL[model], READOUTS[readout], batch))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model", SMALL | MORE_CELLS)
def test_structures(model, batch):
    check(Problem(ALL[model], None, batch))


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
    check(Problem(FEEDFORWARD[model], READOUTS["linear"], batch, kind=kind))


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
    import braintrace

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
