"""ThreeFactor is D_RTRL of the loss whose derivative by the new hidden values is the modulator."""

import brainstate
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from brainstate import HiddenState
from brainstate.transform import for_loop, grad, jit
from helpers import assert_close, leaf
from models import CELLS, READOUTS, SMALL, SPIKING, Problem

import braintrace
from braintrace import ThreeFactor

pytestmark = [pytest.mark.usefixtures("time_step"), pytest.mark.filterwarnings("ignore:.*relation_")]


class TwoGroups(models.ModelA):
    states = (("h",), ("b",))

    def __init__(self):
        super().__init__()
        self.V = models.Linear(2, 3)

    def init_state(self, batch_size=None, **_):
        self.h, self.b = models.zeros(self.n, batch_size), models.zeros(self.n, batch_size)

    def transition(self, x):
        super().transition(x)
        self.b.value = jnp.sin(0.8 * self.b.value + self.V(x))

    def output(self, aux):
        return self.h.value * self.b.value


ALL = CELLS | SMALL | SPIKING | {"two groups": lambda nn: [TwoGroups()]}
BATCH, STEPS = 2, 4


def pair(model, readout=None, make=ThreeFactor, **options):
    """The same network with both rules."""
    problems = [Problem(ALL[model], READOUTS.get(readout), BATCH, steps=STEPS) for _ in range(2)]
    return problems, problems[0].learner(make, **options), problems[1].learner("D_RTRL")


def draw(kind, learner):
    """Modulators of all steps: a number, one per hidden value, or one per hidden value and state of the one group."""
    rng = np.random.default_rng(3)
    (shape,) = {g.varshape for g in learner.graph.hidden_groups}
    full = {"scalar": (), "values": shape, "states": (*shape, learner.graph.hidden_groups[0].num_state)}[kind]
    return jnp.asarray(rng.standard_normal((STEPS, *full)), jnp.float32)


def weighed_states(problem, learner, m):
    """The loss that pulls at every hidden value with its modulator."""
    total = 0.0
    for g in learner.graph.hidden_groups:
        factors = m[..., None] if m.shape == g.varshape else m
        factors = jnp.broadcast_to(factors, (*g.varshape, g.num_state))
        states = [problem.net.states(HiddenState)[path] for path in g.hidden_paths]
        total += sum((leaf(s.value) * factors[..., a]).sum() for a, s in enumerate(states))
    return total


def reference(problem, learner, ms):
    def loss(x, m):
        learner(x)
        return weighed_states(problem, learner, m)

    return dict(for_loop(grad(loss, learner.param_states), problem.sequences()[0], ms))


ROWS = [
    ("ModelA", None, "scalar"),
    ("ModelB", None, "states"),
    ("ModelB", "plain", "values"),
    ("lstm", "linear", "states"),
    ("gru", "linear", "values"),
    ("Leak", None, "scalar"),
    ("lif-cuba", "linear", "scalar"),
    ("two groups", None, "values"),
]


@pytest.mark.parametrize("model, readout, kind", ROWS)
def test_the_modulator_is_the_signal(model, readout, kind):
    (ours, theirs), learner, other = pair(model, readout)
    ms = draw(kind, learner)

    def loss(x, target, m):
        return ((learner(x, modulator=m) - target) ** 2).sum()

    found = dict(for_loop(grad(loss, learner.param_states), *ours.sequences(), ms))
    expected = reference(theirs, other, ms)
    related = {path for r in learner.graph.hidden_param_op_relations for path in r.trainable_paths.values()}
    assert related
    assert_close({p: found[p] for p in related}, {p: expected[p] for p in related}, 2e-5)
    # What has no trace follows the loss.
    oracle = ours.oracle()
    first = oracle.backward(ours.sequence[0])
    for path in set(found) - related:
        assert_close({path: jax.tree.map(lambda g: g[0], found[path])}, {path: first[path]}, 2e-5)

    brainstate.nn.reset_all_states(ours.net, BATCH)
    learner.reset_state()
    summed = learner.etrace_grad(*ours.sequences(), ms, step_fn=loss, reduction="sum", trace_chunk=3)
    assert_close(dict(summed), jax.tree.map(lambda g: g.sum(0), found), 2e-5)


@pytest.mark.parametrize("model", ["ReadsOld", "Beside"])
def test_the_loss_adds_nothing(model):
    """Neither through old values nor beside the states."""
    grads = []
    for scale in (1.0, 3.0):
        problem = Problem(ALL[model], None, BATCH, steps=STEPS)
        learner = problem.learner(ThreeFactor, modulator=0.7)
        loss = lambda x, target: scale * ((learner(x) - target) ** 2).sum()  # noqa: B023, E731
        steps = dict(for_loop(grad(loss, learner.param_states), *problem.sequences()))
        brainstate.nn.reset_all_states(problem.net, BATCH)
        learner.reset_state()
        summed = learner.etrace_grad(*problem.sequences(), step_fn=loss, reduction="sum")
        assert_close(dict(summed), jax.tree.map(lambda g: g.sum(0), steps), 2e-5)
        grads.append(steps)
    assert_close(*grads, 1e-6)
    assert all(np.abs(g).max() > 1e-2 for g in jax.tree.leaves(grads[0]))


def test_another_modulator_gives_another_gradient():
    (ours, theirs), learner, other = pair("ModelB")
    ms = draw("states", learner)
    step = lambda x, m: learner(x, modulator=m).sum()  # noqa: E731
    found = dict(for_loop(grad(step, learner.param_states), ours.sequences()[0], ms))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(found, reference(theirs, other, ms[..., ::-1]), 1e-2)


@pytest.mark.parametrize("per_sample", ["scalar", "values"])
def test_mapped_samples_equal_a_batch(per_sample):
    problem, single = (
        Problem(CELLS["gru"], READOUTS["linear"], BATCH, steps=STEPS, mapped=mapped) for mapped in (None, "compile")
    )
    learner, mapped = problem.learner(ThreeFactor), single.learner(ThreeFactor)
    ms = jnp.asarray(np.random.default_rng(0).standard_normal((STEPS, BATCH, models.N)), jnp.float32)
    ms = ms[..., :1] if per_sample == "scalar" else ms
    wide = jnp.broadcast_to(ms, (STEPS, BATCH, models.N))
    results = []
    for call, modulators in ((learner, wide), (mapped, ms[..., 0] if per_sample == "scalar" else ms)):
        step = lambda x, target, m: ((call(x, modulator=m) - target) ** 2).sum()  # noqa: B023, E731
        results.append(dict(call.etrace_grad(*problem.sequences(), modulators, step_fn=step)))
    assert_close(*results, 2e-5)


def test_a_standing_modulator_is_read_by_a_jitted_step():
    problem = Problem(SMALL["ModelA"], steps=1)
    learner = problem.learner(ThreeFactor, modulator=1.0)
    x, _ = problem.sequence[0]

    @jit
    def step():
        learner.reset_state()
        brainstate.nn.reset_all_states(problem.net)
        return dict(grad(lambda: learner(x).sum(), learner.param_states)())

    first = step()
    learner.modulator = -5.0
    assert_close(step(), jax.tree.map(lambda g: -5.0 * g, first), 1e-6)
    assert float(learner.modulator) == -5.0
    (shape,) = {g.varshape for g in learner.graph.hidden_groups}
    for value in (jnp.full(shape, 7.0), 2.0):  # of another shape
        learner.modulator = value
        assert_close(step(), jax.tree.map(lambda g: float(jnp.max(value)) * g, first), 1e-6)  # noqa: B023
    learner.modulator = None
    with pytest.raises(RuntimeError, match="modulator"):
        step()


def test_a_modulator_per_sample_may_look_like_one_per_unit():
    x, cell = jnp.ones((3, 2)), braintrace.nn.ValinaRNNCell(2, 3)
    learner = braintrace.compile(cell, "three_factor", x, batch_size=3)
    rewards = jnp.array([1.0, 2.0, 4.0])

    def gradient(modulator):
        cell.reset_state(3)
        learner.reset_state()
        return grad(lambda: learner(x, modulator=modulator).sum(), learner.param_states)()

    with pytest.warns(braintrace.CompilationWarning, match=r"\(3, 1\) is taken.*each unit.*\(3, 1, 1\)"):
        per_unit = gradient(rewards[:, None])
    assert_close(per_unit, gradient(jnp.broadcast_to(rewards, (3, 3))))
    same = jax.tree.map(lambda g: g * (7.0 / 3.0), gradient(1.0))  # the samples are alike
    assert_close(gradient(rewards[:, None, None]), same)


def test_names():
    cell = braintrace.nn.GRUCell(2, 3)
    learner = braintrace.compile(cell, " Three_Factor ", jnp.zeros(2), modulator=0.5)
    assert type(learner) is ThreeFactor and issubclass(ThreeFactor, braintrace.ParamDimVjpAlgorithm)
    assert learner.config == braintrace.ETraceConfig(learning_signal="modulatory")
    positional = ThreeFactor(cell, "name", "single-step", 0.5, False, jnp.bfloat16, False, None)
    assert (positional.name, positional.modulator, positional.fast_solve) == ("name", 0.5, False)
    assert (positional.trace_dtype, positional.chunked_trace) == (jnp.dtype(jnp.bfloat16), False)


def make(**options):
    return braintrace.compile(braintrace.nn.GRUCell(2, 3), "three_factor", jnp.ones(2), **options)


ERRORS = [
    (lambda: make(vjp_method="multi-step"), ValueError, "modulatory.*vjp_method='single-step'"),
    (lambda: make(config=braintrace.ETraceConfig()), TypeError, "config"),
    (lambda: make(nonsense=1), TypeError, "nonsense"),
    (lambda: make()(jnp.ones(2)), RuntimeError, r"modulator=m"),
    (lambda: make()(jnp.ones(2), modulator=[1.0]), TypeError, "modulator.*list"),
    (lambda: make()(jnp.ones(2), modulator=jnp.ones(7)), ValueError, r"\(7,\).*\(3, 1\).*hidden_group_0.*\(3,\)"),
    (lambda: make(modulator=jnp.ones((2, 3)))(jnp.ones(2)), ValueError, r"\(2, 3\).*\(3, 1\)"),
]


@pytest.mark.parametrize("call, error, message", ERRORS)
def test_refused(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call()
