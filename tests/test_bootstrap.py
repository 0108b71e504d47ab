"""DNI: an estimate of future losses enters a window where the traces do not carry credit."""

import copy

import brainpy
import brainstate
import braintools
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import braintrace
from braintrace import DNI, MultiStepData, SyntheticGradient

N, INPUTS, T, BATCH = 3, 2, 6, 2
rng = np.random.default_rng(0)
W, R, TAU = rng.normal(size=(INPUTS, N)), 0.4 * rng.normal(size=(N, N)), rng.normal(size=N)
LOSS = jnp.arange(1.0, N + 1)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True), brainstate.environ.context(precision=64):
        yield


def step(w_traced, w_plain, r, h, c, x):
    """`w` acts through an operation and plainly, `r` plainly; `c` is another state."""
    c = 0.9 * c + h
    h = jnp.tanh(w_traced(x) + 0.3 * x @ w_plain + h @ r + 0.1 * c)
    return h, c


class Model(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.r = brainstate.ParamState(jnp.asarray(W)), brainstate.ParamState(jnp.asarray(R))

    def init_state(self, batch_size=None, **_):
        self.h = brainstate.HiddenState(jnp.full((batch_size, N), 0.1))
        self.c = brainstate.ShortTermState(jnp.full((batch_size, N), 0.2))

    def update(self, x):
        marked = lambda x: braintrace.matmul(x, self.w.value)  # noqa: E731
        self.h.value, self.c.value = step(marked, self.w.value, self.r.value, self.h.value, self.c.value, x)
        return self.h.value


def learners(*rules):
    xs = jax.random.normal(jax.random.key(1), (T, BATCH, INPUTS))
    made = []
    for rule in rules:
        learner = rule(Model(), vjp_method="multi-step")
        brainstate.nn.init_all_states(learner.model4compile, batch_size=BATCH)
        learner.compile_graph(xs[0])
        made.append(learner)
    return xs, *made


def synthesizer(learner, scale):
    made = SyntheticGradient(learner.group_signal_shapes(), scale=scale)
    for state in made.biases.values():
        state.value = state.value + scale
    return made


def gradients(learner, window, states=None):
    """Of the learner's parameters, or other states, and of the window."""
    states = learner.param_states if states is None else states

    def loss(window):
        return (learner(MultiStepData(window)) * LOSS).sum()

    by_state, by_input = brainstate.transform.grad(loss, states, argnums=0)(window)
    return {**{k[-1]: v for k, v in by_state.items()}, "x": by_input}


def test_a_zero_estimate_is_d_rtrl():
    xs, dni, d_rtrl = learners(DNI, braintrace.D_RTRL)
    dni.attach_synthesizer(synthesizer(dni, 0.0))
    for t in (0, 3):
        jax.tree.map(np.testing.assert_array_equal, gradients(dni, xs[t : t + 3]), gradients(d_rtrl, xs[t : t + 3]))


def test_where_the_estimate_enters():
    xs, dni, d_rtrl = learners(DNI, braintrace.D_RTRL)
    made = synthesizer(dni, 0.5)
    dni.attach_synthesizer(made)

    def future(plain, h, c, xs):
        """The estimate at the exit times the exit, with what goes through the operation's weight held fixed."""
        for x in xs:
            h, c = step(lambda x: x @ W, plain["w"], plain["r"], h, c, x)
        estimate = made.apply(made.param_values(), {0: jax.lax.stop_gradient(h)[..., None]})[0][..., 0]
        return (jax.lax.stop_gradient(estimate) * h).sum(), (h, c)

    h, c = jnp.full((BATCH, N), 0.1), jnp.full((BATCH, N), 0.2)
    plain = {"w": jnp.asarray(W), "r": jnp.asarray(R)}
    for t in (0, 3):
        window = xs[t : t + 3]
        found, base = gradients(dni, window), gradients(d_rtrl, window)
        (more, _, _, by_input), (h, c) = jax.grad(future, argnums=(0, 1, 2, 3), has_aux=True)(plain, h, c, window)
        for k, v in {**more, "x": by_input}.items():
            assert jnp.abs(v).max() > 1e-3
            np.testing.assert_allclose(found[k] - base[k], v, rtol=1e-9, atol=1e-12)


def test_states_at_the_entry_receive_the_estimate():
    xs, dni, d_rtrl = learners(DNI, braintrace.D_RTRL)
    made = synthesizer(dni, 0.5)
    dni.attach_synthesizer(made)

    def entry(learner):
        return {("h",): learner.model4compile.h, ("c",): learner.model4compile.c}

    found, base = (gradients(learner, xs[:3], entry(learner)) for learner in (dni, d_rtrl))
    h = jnp.full((BATCH, N), 0.1)
    c = jnp.full((BATCH, N), 0.2)

    def future(h, c):
        for x in xs[:3]:
            h, c = step(lambda x: x @ W, W, R, h, c, x)
        estimate = made.apply(made.param_values(), {0: jax.lax.stop_gradient(h)[..., None]})[0][..., 0]
        return (jax.lax.stop_gradient(estimate) * h).sum()

    for k, v in zip("hc", jax.grad(future, argnums=(0, 1))(h, c)):
        np.testing.assert_allclose(found[k] - base[k], v, rtol=1e-9, atol=1e-12)


def test_sequences_are_their_windows():
    xs, one, other = learners(DNI, DNI)
    for learner in (one, other):
        learner.attach_synthesizer(synthesizer(learner, 0.5))

    def losses(window):
        return (one(MultiStepData(window)) * LOSS).sum((-2, -1))

    total = one.etrace_grad(xs, step_fn=losses, chunk_size=3, reduction="sum")
    parts = [gradients(other, xs[t : t + 3]) for t in (0, 3)]
    for k in ("w", "r"):
        np.testing.assert_allclose(total[(k,)], parts[0][k] + parts[1][k], rtol=1e-9)


def test_fitting_the_estimate():
    """Without recurrence or loss after a window nothing follows it; with both, what follows is learnt."""
    xs, dni = learners(DNI)
    dni.attach_synthesizer(SyntheticGradient(dni.group_signal_shapes()))
    before = {k: s.value for k, s in dni.param_states.items()}
    errors = braintrace.train_synthetic_gradient(dni, xs, chunk_size=2, epochs=60, lr=0.1, batch_size=BATCH)
    assert len(errors) == 60 and errors[-1] < 0.5 * errors[0]
    jax.tree.map(np.testing.assert_array_equal, before, {k: s.value for k, s in dni.param_states.items()})
    assert all(jnp.abs(s.value).max() > 0 for s in dni.synthesizer.states_dict().values())


@pytest.mark.parametrize("copied", [copy.deepcopy, brainstate.graph.clone])
def test_a_copy_has_a_synthesizer_of_its_own(copied):
    xs, dni = learners(DNI)
    dni.attach_synthesizer(synthesizer(dni, 0.5))
    other = copied(copied(dni))
    values = lambda learner: jax.tree.map(np.asarray, learner.synthesizer.param_values())  # noqa: E731
    before = values(dni)
    jax.tree.map(np.testing.assert_array_equal, values(other), before)
    braintrace.train_synthetic_gradient(other, xs, chunk_size=2, epochs=2, lr=0.1, batch_size=BATCH)
    jax.tree.map(np.testing.assert_array_equal, values(dni), before)
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(values(other)), jax.tree.leaves(before)))


def test_the_first_error_is_the_mean_square_of_the_cotangents():
    """A synthesizer of zeros that does not learn is off by the cotangents of every window, and right at the end."""
    xs, dni, d_rtrl = learners(DNI, braintrace.D_RTRL)
    dni.attach_synthesizer(SyntheticGradient(dni.group_signal_shapes()))
    (error,) = braintrace.train_synthetic_gradient(dni, xs, chunk_size=3, lr=0.0, batch_size=BATCH)
    squares = []
    for t in (0, 3):

        def loss(window):
            return (d_rtrl(MultiStepData(window)) ** 2).sum()

        bars = brainstate.transform.grad(loss, d_rtrl.hidden_states)(xs[t : t + 3])
        squares.append(float((bars["h",] ** 2).mean()))
    np.testing.assert_allclose(error, sum(squares) / 3, rtol=1e-9)


def test_an_optimiser_and_a_loss_of_ones_own():
    xs, dni = learners(DNI)
    dni.attach_synthesizer(SyntheticGradient(dni.group_signal_shapes()))
    optimizer = braintools.optim.Adam(lr=1e-2)
    optimizer.register_trainable_weights(dni.synthesizer.states_dict())
    errors = braintrace.train_synthetic_gradient(
        dni, xs, chunk_size=3, loss_fn=lambda out: (out * LOSS).sum(), optimizer=optimizer, epochs=20, batch_size=BATCH
    )
    assert errors[-1] < errors[0]
    unreset = braintrace.train_synthetic_gradient(dni, xs, reset=False, epochs=2)  # whatever the model's batch
    assert unreset[0] != unreset[1] and dni.running_index.value == 3 * T


def test_synthesizers():
    made = SyntheticGradient({0: (4, 3, 2), 2: (5, 1)}, scale=0.1, seed=3)
    assert {k: s.value.shape for k, s in made.states_dict().items()} == {
        ("synth_w", 0): (6, 6), ("synth_w", 2): (5, 5), ("synth_b", 0): (6,), ("synth_b", 2): (5,)
    }  # fmt: skip
    assert all(s.value.dtype == jnp.float32 for s in made.states_dict().values())
    values = made.param_values()
    h = jax.random.normal(jax.random.key(0), (4, 3, 2), jnp.float32)
    expected = (h.reshape(4, 6) @ values["w"][0] + values["b"][0]).reshape(4, 3, 2)
    np.testing.assert_allclose(made.apply(values, group_hiddens={0: h})[0], expected, rtol=1e-6)
    assert made.apply(values, {0: h.astype(jnp.float64)})[0].dtype == jnp.float64
    assert jnp.all(SyntheticGradient({0: (3, 1)}).weights[0].value == 0)
    with pytest.raises(ValueError, match="group 0 have shape"):
        made.apply(values, {0: h[:, :2]})
    with pytest.raises(ValueError, match="no axes of units"):
        SyntheticGradient({0: (3,)})


def test_every_epoch_begins_with_initial_states():
    """Without learning all epochs are the same; the model and the learner keep their states."""
    xs, dni = learners(DNI)
    dni.attach_synthesizer(SyntheticGradient(dni.group_signal_shapes()))
    dni(xs[0])
    first, *rest = braintrace.train_synthetic_gradient(dni, xs, chunk_size=2, lr=0.0, epochs=3, batch_size=BATCH)
    assert rest == [first, first]
    assert dni.model4compile.h is dni.hidden_states["h",] and jnp.all(jnp.isfinite(dni.model4compile.h.value))
    assert dni.running_index.value == T


def test_a_counter_among_the_hidden_states():
    class Counting(Model):
        def init_state(self, batch_size=None, **_):
            super().init_state(batch_size)
            self.n = brainstate.HiddenState(jnp.zeros((batch_size, N), int))

        def update(self, x):
            y = super().update(x)
            self.n.value = self.n.value + (y > 0)
            return y

    xs = jnp.ones((T, BATCH, INPUTS))
    dni = braintrace.compile(Counting(), "dni", xs[0], batch_size=BATCH)
    dni.attach_synthesizer(synthesizer(dni, 0.1))
    errors = braintrace.train_synthetic_gradient(dni, xs, chunk_size=3, epochs=20, lr=0.1, batch_size=BATCH)
    assert errors[-1] < errors[0]


def test_a_mask_weights_the_gradients_of_steps():
    xs, dni, other = learners(DNI, DNI)
    for learner in (dni, other):
        learner.attach_synthesizer(synthesizer(learner, 0.5))
    mask = jnp.array([0.0, 2.0, 0.0, 0.0, 1.0, 0.0])
    found = dni.etrace_grad(xs, step_fn=lambda x: (dni(x) * LOSS).sum(), mask=mask, reduction="sum")
    gradient = brainstate.transform.grad(lambda x: (other(x) * LOSS).sum(), other.param_states)
    steps = [gradient(x) for x in xs]
    for path in found:
        np.testing.assert_allclose(found[path], sum(m * g[path] for m, g in zip(mask, steps)), rtol=1e-9)


def test_a_hook_of_ones_own():
    class Tens(braintrace.ParamDimVjpAlgorithm):
        _default_config = braintrace.ETraceConfig(learning_signal="bootstrapped")

        def _inject_exit_cotangent(self, exit_hiddens, aux):
            return {p: jnp.full_like(v, 10.0) for p, v in exit_hiddens.items()}

    xs, one, other = learners(Tens, Tens)
    total = one.etrace_grad(xs, step_fn=lambda x: (one(x) * LOSS).sum(), reduction="sum")
    gradient = brainstate.transform.grad(lambda x: (other(x) * LOSS).sum(), other.param_states)
    steps = [gradient(x) for x in xs]
    for path in total:
        np.testing.assert_allclose(total[path], sum(g[path] for g in steps), rtol=1e-9)
    with pytest.raises(ValueError, match="Tens estimates what follows.*'multi-step'"):
        Tens(Model(), vjp_method="single-step")


def test_refusals():
    xs, dni, d_rtrl = learners(DNI, braintrace.D_RTRL)
    with pytest.raises(RuntimeError, match="no synthesizer.*attach_synthesizer"):
        dni(xs[0])
    with pytest.raises(RuntimeError, match="no synthesizer"):
        braintrace.train_synthetic_gradient(dni, xs)
    with pytest.raises(TypeError, match="must be a DNI, got D_RTRL"):
        braintrace.train_synthetic_gradient(d_rtrl, xs)
    with pytest.raises(TypeError, match="has the methods apply"):
        dni.attach_synthesizer(None)
    dni.attach_synthesizer(synthesizer(dni, 0.0))
    fit = braintrace.train_synthetic_gradient
    for options, error, message in [
        (dict(chunk_size=4), ValueError, "6 is no multiple of chunk_size=4"),
        (dict(chunk_size=2.0), TypeError, "chunk_size must be a Python int"),
        (dict(batch_size=5), ValueError, r"batch_size=5, '[hc]' is initialised with shape \(5, 3\).*for \(2, 3\)"),
        (dict(loss_fn=lambda out: out[0], batch_size=BATCH), ValueError, "loss_fn must return a loss of shape"),
        (
            dict(loss_fn=lambda out: None, batch_size=BATCH),
            TypeError,
            "loss_fn must return the loss as an array.*got NoneType",
        ),
    ]:
        with pytest.raises(error, match=message):
            fit(dni, xs, **options)

    class Forgetful(SyntheticGradient):
        def apply(self, param_values, hiddens):
            return {}

    dni.attach_synthesizer(Forgetful(dni.group_signal_shapes()))
    with pytest.raises(ValueError, match=r"estimate for group 0 has shape None.*\(2, 3, 1\)"):
        dni(xs[0])
    with pytest.raises(ValueError, match="vjp_method='multi-step'"):
        DNI(Model(), vjp_method="single-step")
    for engine in (braintrace.D_RTRL, braintrace.ParamDimVjpAlgorithm):
        with pytest.raises(NotImplementedError, match="'bootstrapped' needs a rule.*DNI"):
            engine(Model(), config=braintrace.ETraceConfig(learning_signal="bootstrapped"))


def test_spiking_neurons_with_units():
    class Spiking(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.neurons = brainpy.state.LIF(N, tau=20.0 * u.ms, V_th=1.0 * u.mV)
            self.synapses = brainpy.state.AlignPostProj(
                comm=braintrace.nn.Linear(
                    INPUTS, N, w_init=braintools.init.Normal(0.0 * u.mS, 3.0 * u.mS), b_init=None
                ),
                syn=brainpy.state.Expon(N, tau=5.0 * u.ms),
                out=brainpy.state.CUBA(scale=1.0 * u.volt),
                post=self.neurons,
            )
            self.readout = braintrace.nn.LeakyRateReadout(N, 2, tau=20.0 * u.ms)

        def update(self, x):
            self.synapses(x)
            return self.readout(self.neurons())

    xs = 3.0 * (jax.random.uniform(jax.random.key(5), (T, BATCH, INPUTS)) < 0.5).astype(float)
    with brainstate.environ.context(dt=1.0 * u.ms):
        for vmap in (False, True):
            mapped = braintrace.compile(Spiking(), "dni", xs[0], batch_size=BATCH, vmap=vmap)
            learner = mapped.module if vmap else mapped
            learner.attach_synthesizer(synthesizer(learner, 0.1))
            grads = mapped.etrace_grad(xs, step_fn=lambda x, f=mapped: (f(x) ** 2).sum())
            assert all(jnp.isfinite(u.get_mantissa(g)).all() for g in jax.tree.leaves(grads))
            if vmap:
                with pytest.raises(ValueError, match="it is mapped over samples"):
                    braintrace.train_synthetic_gradient(learner, xs)
            else:
                assert len(braintrace.train_synthetic_gradient(learner, xs, chunk_size=2, batch_size=BATCH)) == 1
