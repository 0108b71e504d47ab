"""A learner is never stale: what a call depends on is what there is at the call."""

import copy
import functools
import pickle

import brainpy
import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate import HiddenState, ParamState
from brainstate.environ import context

import braintrace

B, N_IN, N, T = 2, 3, 4, 6
X = jax.random.normal(jax.random.key(0), (B, N_IN))
XS = jax.random.normal(jax.random.key(1), (T, B, N_IN))
RULES = {
    "pp_prop": dict(decay_or_rank=0.9),
    "d_rtrl": {},
    "eprop": dict(kappa_filter_decay=0.5),
    "uoro": {},
    "hybrid": dict(decay_or_rank=0.9),
}
assert_close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
rules = pytest.mark.parametrize("rule", RULES)


class Driven(brainstate.nn.Module):
    """A leaky unit that reads the environment, keyword arguments and random numbers."""

    def __init__(self):
        super().__init__()
        self.w = ParamState(0.3 * jax.random.normal(jax.random.key(2), (N_IN, N)))
        self.drop = brainstate.nn.Dropout(0.5)
        self.traced = 0

    def init_state(self, batch_size=None, **kwargs):
        self.h = HiddenState(jnp.zeros((N,) if batch_size is None else (batch_size, N)))

    def update(self, x, gain=None, train=False):
        self.traced += 1
        y = braintrace.matmul(self.drop(x), self.w.value) * (2.0 if train else 1.0)
        y = y if gain is None else gain * y
        self.h.value = 0.5 * self.h.value + y + brainstate.environ.get("t", 0.0)
        return self.h.value


@pytest.fixture(autouse=True)
def evaluation():
    with context(fit=False):
        yield


def learner_of(rule="pp_prop", x=X, batch=B, vmap=False, **options):
    return braintrace.compile(Driven(), rule, x, batch_size=batch, vmap=vmap, **RULES[rule], **options)


def initialise(model, size, vmap):
    if not vmap:
        brainstate.nn.init_all_states(model, batch_size=size)
        return

    @brainstate.transform.vmap_new_states(state_tag="new", axis_size=size)
    def make():
        brainstate.nn.init_all_states(model)

    make()


def bare(learner):
    return learner.module if isinstance(learner, braintrace.ETraceVmap) else learner


def loss(learner, x):
    return (learner(x) ** 2).sum()


def gradient(learner, x=X):
    return brainstate.transform.grad(lambda x: loss(learner, x), bare(learner).param_states)(x)


def sequence(learner, xs=XS):
    return learner.etrace_grad(xs, step_fn=lambda x: loss(learner, x), reduction="sum")


mapped = pytest.mark.parametrize("vmap", [False, True], ids=["batched", "mapped"])


@rules
@mapped
def test_numbers_of_the_environment_are_inputs(rule, vmap):
    with context(t=0.0):
        learner = learner_of(rule, vmap=vmap)
    model = bare(learner).model4compile
    count = model.traced
    for t in (7.0, jnp.asarray(3.0)):
        before = model.h.value
        with context(t=t):
            assert_close(learner(X), 0.5 * before + X @ model.w.value + t)
    assert model.traced == count
    # A loop whose time is traced, inside of which the gradient is taken.

    def step(t, x):
        with context(t=t):
            return gradient(learner, x), model.h.value

    before = model.h.value
    _, values = brainstate.transform.for_loop(step, jnp.arange(3.0), XS[:3])
    for t, x, value in zip(range(3), XS, values):
        before = 0.5 * before + x @ model.w.value + t
        assert_close(value, before)


def test_gradients_depend_on_the_environment_of_the_call():
    with context(t=0.0):
        learner, other = learner_of(), learner_of()
    with context(t=2.0):
        found = gradient(learner)["w",]
    h = X @ other.model4compile.w.value + 2.0
    assert_close(found, X.T @ (2 * h))
    with context(t=0.0):
        assert not np.allclose(found, gradient(other)["w",])


def test_a_spiking_neuron_whose_refractory_time_is_that_of_the_loop():
    """As the common loop sets it: with a time that stands still the neuron spikes once or twice and never again."""

    class Net(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.neuron = brainpy.state.LIFRef(N, tau=10 * u.ms, tau_ref=3 * u.ms, V_th=1 * u.mV, R=1 * u.ohm)
            self.comm = braintrace.nn.Linear(N_IN, N, w_init=jnp.ones, b_init=None)

        def update(self, x):
            return self.neuron(2.0 * self.comm(x) * u.mA)

    dt = 1.0 * u.ms
    with context(dt=dt, t=0.0 * u.ms, i=0):
        model, plain = Net(), Net()
        learner = braintrace.compile(model, "pp_prop", jnp.ones(N_IN), decay_or_rank=0.9)
        brainstate.nn.init_all_states(plain)
    spikes = []
    for i in range(20):
        with context(dt=dt, i=i, t=i * dt):
            pair = learner(jnp.ones(N_IN)), plain(jnp.ones(N_IN))
        np.testing.assert_array_equal(*pair)
        spikes.append(pair[0][0])
    assert sum(spikes) > 3


@rules
@mapped
def test_other_entries_and_options_make_another_step(rule, vmap):
    learner = learner_of(rule, vmap=vmap)
    model, h = bare(learner).model4compile, 0.0
    steps = [({}, {}, 1.0), ({"train": True}, {}, 2.0), ({}, {}, 1.0), ({"train": True}, {}, 2.0)]
    for options, environment, factor in steps:
        with context(**environment) if environment else context(fit=False):
            h = 0.5 * h + factor * (X @ model.w.value)
            assert_close(learner(X, **options), h)
    count = model.traced
    for options in ({}, {"train": True}):
        learner(X, **options)
    assert model.traced == count
    with context(fit=True):
        noisy = [learner(X) - 0.5 * before for before in [model.h.value]]
    assert not np.allclose(noisy[0], X @ model.w.value)


def test_keyword_arguments_with_arrays_are_inputs():
    learner = learner_of()
    model = learner.model4compile
    h = 0.0
    for gain in (2.0, 3.0):
        h = 0.5 * h + gain * (X @ model.w.value)
        assert_close(learner(X, gain=jnp.asarray(gain)), h)
    g = brainstate.transform.grad(lambda: learner(X, gain=jnp.asarray(2.0)).sum(), learner.param_states)()
    assert np.abs(g["w",]).max() > 0


@rules
def test_the_dtype_of_the_example_does_not_bind(rule):
    integers = learner_of(rule, jnp.ones((B, N_IN), int))
    floats = learner_of(rule)
    integers.model4compile.w.value = floats.model4compile.w.value
    for learner in (integers, floats):
        learner(X)
    assert_close(*(gradient(learner)["w",] for learner in (integers, floats)))


@rules
@mapped
def test_new_states_of_the_model_are_those_that_run(rule, vmap):
    learner = learner_of(rule, vmap=vmap)
    model = bare(learner).model4compile
    fresh = learner_of(rule, vmap=vmap)
    learner.etrace_evolve(XS)

    initialise(model, B, vmap)
    bare(learner).reset_state()
    assert list(bare(learner).hidden_states.values()) == [model.h]
    assert_close(sequence(learner)["w",], sequence(fresh)["w",])
    assert_close(model.h.value, bare(fresh).model4compile.h.value)
    assert np.abs(model.h.value).max() > 0


@pytest.mark.parametrize("rule", ["pp_prop", "d_rtrl", "uoro", "hybrid"])
@mapped
@pytest.mark.parametrize("explicit", [False, True])
def test_another_batch_size(rule, vmap, explicit):
    learner = learner_of(rule, vmap=vmap)
    learner(X)
    model = bare(learner).model4compile
    size, x = 5, jax.random.normal(jax.random.key(5), (T, 5, N_IN))
    fresh = learner_of(rule, x[0], size, vmap=vmap)

    initialise(model, size, vmap)
    if not vmap:
        with pytest.raises(ValueError, match=r"reset_state\(batch_size"):
            learner(x[0])
    bare(learner).reset_state(**({"batch_size": size} if explicit else {}))
    assert_close(sequence(learner, x)["w",], sequence(fresh, x)["w",])
    assert_close(gradient(learner, x[0])["w",], gradient(fresh, x[0])["w",])


def test_a_state_that_is_gone():
    learner = learner_of()
    learner.model4compile.h = brainstate.ShortTermState(jnp.zeros((B, N)))
    with pytest.raises(ValueError, match="HiddenState 'h'.*ShortTermState"):
        learner(X)
    del learner.model4compile.h
    with pytest.raises(ValueError, match="HiddenState 'h'.*no state"):
        learner(X)


def test_a_second_learner_leaves_the_first_one_its_model():
    learner = learner_of()
    second = braintrace.compile(learner.model4compile, "d_rtrl", X, batch_size=B)
    learner.reset_state()
    assert_close(learner(X), X @ learner.model4compile.w.value)
    assert learner.hidden_states["h",] is second.hidden_states["h",] is learner.model4compile.h


COPIES = {"deepcopy": copy.deepcopy, "clone": brainstate.graph.clone, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


def _pickles(model):
    try:
        pickle.dumps(model)
    except Exception:
        return False
    return True


@rules
@mapped
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_whole_and_independent(rule, vmap, how):
    learner = learner_of(rule, vmap=vmap)
    learner(X)
    if how == "pickle" and not _pickles(bare(learner).model4compile):
        pytest.skip("this release of brainstate cannot pickle a state")
    other = COPIES[how](learner)
    pair = bare(learner), bare(other)
    for kind in ("param_states", "hidden_states"):
        mine, its = (getattr(x, kind) for x in pair)
        assert mine.keys() == its.keys() and not any(mine[p] is its[p] for p in mine)
    before = jax.tree.map(np.asarray, {p: s.value for p, s in learner.states().items()})
    found = sequence(other)["w",]
    after = {p: s.value for p, s in learner.states().items()}
    assert before.keys() == after.keys()
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert_close(found, sequence(learner)["w",])
    assert [r.path for r in pair[1].graph.hidden_param_op_relations] == [("w",)]


def test_compiling_in_the_midst_of_a_jitted_function():
    learner = learner_of()

    @brainstate.transform.jit
    def step(x):
        return learner(x, train=True)

    h = step(X)
    assert_close(h, 2 * X @ learner.model4compile.w.value)
    assert_close(learner(X, train=True), 0.5 * h + 2 * X @ learner.model4compile.w.value)


def test_a_number_whose_value_is_needed_is_a_constant():
    class Repeats(Driven):
        def update(self, x):
            for _ in range(brainstate.environ.get("times")):
                self.h.value = 0.5 * self.h.value + braintrace.matmul(x, self.w.value)
            return self.h.value

    with context(times=1):
        learner = braintrace.compile(Repeats(), "pp_prop", X, batch_size=B, decay_or_rank=0.9)
        first = learner(X)
        assert_close(first, X @ learner.model4compile.w.value)


@rules
@pytest.mark.parametrize("drive", [gradient, sequence])
def test_no_traced_value_outlives_its_trace(rule, drive):
    learner = learner_of(rule)
    with jax.checking_leaks():
        found = brainstate.transform.jit(lambda: drive(learner))()
    assert np.isfinite(found["w",]).all()


@rules
def test_without_jit(rule):
    """Calls and `etrace_evolve`; brainstate's own `grad` refuses every function that writes a state there."""
    learner, other = learner_of(rule), learner_of(rule)
    with jax.disable_jit():
        learner(X)
        learner.etrace_evolve(XS)
    other(X)
    other.etrace_evolve(XS)
    for a, b in zip(*(jax.tree.leaves({p: s.value for p, s in x.states().items()}) for x in (learner, other))):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert_close(a, b)


def test_the_outputs_of_an_evolution_have_no_gradient():
    learner = learner_of()
    evolve = lambda: learner.etrace_evolve(XS, return_outputs=True)  # noqa: E731
    with pytest.raises(NotImplementedError, match="etrace_grad"):
        brainstate.transform.grad(lambda: evolve().sum(), learner.param_states)()

    def after_a_warm_up():
        return loss(learner, X), evolve()

    _, outputs = brainstate.transform.grad(after_a_warm_up, learner.param_states, has_aux=True)()
    assert outputs.shape == (T, B, N)


# -- a trace that one kind of call factorises, and another one does not


class Dropped(Driven):
    """What enters the unit is dropped at random, in training."""

    def update(self, x):
        self.h.value = 0.5 * self.h.value + self.drop(braintrace.matmul(x, self.w.value))
        return jnp.tanh(self.h.value)


PER_WEIGHT = {
    "d_rtrl": {},
    "eprop": dict(kappa_filter_decay=0.5),
    "hybrid": dict(decay_or_rank=0.9, exact="all"),
    "three_factor": dict(modulator=1.0),
}


@pytest.mark.parametrize("rule", PER_WEIGHT)
def test_a_learner_that_was_compiled_for_training_is_evaluated(rule):
    """In either mode, after a reset in either one, with the gradients of a learner of that mode."""

    def made(fit):
        with context(fit=fit):
            return braintrace.compile(Dropped(), rule, X, batch_size=B, **PER_WEIGHT[rule])

    def gradient(learner):
        learner.model4compile.init_state(B)
        return learner.etrace_grad(XS, step_fn=lambda x: (learner(x) ** 2).sum())

    both, other = made(True), made(False)
    gradient(both)  # its step is the present one when the traces are reset
    both.reset_state()
    jax.tree.map(assert_close, dict(gradient(both)), dict(gradient(other)))
    with context(fit=True):
        both.reset_state()
        brainstate.random.seed(0)
        found = gradient(both)
        brainstate.random.seed(0)
        jax.tree.map(assert_close, dict(found), dict(gradient(made(True))))


@pytest.mark.parametrize("rule", PER_WEIGHT)
def test_a_trace_that_cannot_serve_another_kind_of_call(rule):
    learner = braintrace.compile(Dropped(), rule, X, batch_size=B, **PER_WEIGHT[rule])
    before = str(learner.report)
    with (
        context(fit=True),
        pytest.raises(ValueError, match=r"trace of 'w'.*Make another learner and"),
    ):
        learner(X)
    learner.reset_state()
    assert learner(X).shape == (B, N) and str(learner.report) == before


@pytest.mark.parametrize("rule", PER_WEIGHT)
def test_traces_that_are_allocated_again_in_evaluation(rule):
    with context(fit=True):
        learner = braintrace.compile(Dropped(), rule, X, batch_size=B, **PER_WEIGHT[rule])
        learner(X)
    learner(X)
    learner.init_etrace_state()
    with context(fit=True):
        learner(X)
