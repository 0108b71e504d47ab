"""UORO against its recursions with dense Jacobians of the same step in plain JAX."""

import itertools

import brainpy
import brainstate
import braintools
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_recurrent_scopes import MODELS, WEIGHT, Model, N, Reference, agree, double, inputs, loss_of  # noqa: F401

import braintrace

EPS = 1e-12


def norm(*arrays):
    return jnp.sqrt(sum((a**2).sum() for a in arrays))


class Dense:
    """The projection of a batch of samples, sample by sample Jacobians and all."""

    def __init__(self, name, batch):
        self.net = Reference(name, jnp.eye(N))
        self.s = jnp.zeros((batch, self.net.number, N))
        self.theta = {k: jnp.zeros_like(w) for k, w in self.net.w.items()}

    def advance(self, h, x, noise):
        """``h``: (batch, S, N); ``noise`` likewise."""
        net = self.net
        carried, found = [], {k: 0.0 for k in self.theta}
        for i in range(len(x)):
            carried.append(jnp.einsum("aqbr,br->aq", jax.jacobian(net.new)(h[i], x[i]), self.s[i]))
            given = net.products(h[i], x[i])[0]
            for k in self.theta:
                jac = jax.jacobian(lambda z, k=k, i=i: net.new(h[i], x[i], shift={k: z}))(jnp.zeros(N))
                df = jnp.diagonal(jac, axis1=1, axis2=2)
                found[k] += jnp.outer(given[k], (noise[i] * df).sum(0))
        carried = jnp.stack(carried)
        rho_0 = jnp.sqrt((norm(*self.theta.values()) + EPS) / (norm(carried) + EPS))
        rho_1 = jnp.sqrt((norm(*found.values()) + EPS) / (norm(noise) + EPS))
        self.s = rho_0 * carried + rho_1 * noise
        self.theta = {k: t / rho_0 + found[k] / rho_1 for k, t in self.theta.items()}

    def credit(self, signal):
        return {k: (signal * self.s).sum() * t for k, t in self.theta.items()}


def start(number, batch):
    return jnp.stack([jnp.full((batch, N), 0.1 * (i + 1)) for i in range(number)], 1)


def signs(learner, step, batch, number):
    """The learner's own, which are no part of the contract, as (batch, S, N)."""
    state = learner.etrace_s[0].value
    drawn = learner._draw_projection(learner.projection_rng.value, jnp.int32(step), 0, state.shape, state.dtype)
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    return jnp.swapaxes(drawn, 1, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["synapse first", "gated"])
def test_single_step(name):
    batch, xs = 2, inputs(2)
    learner = braintrace.compile(Model(name), "uoro", xs[0], batch_size=batch, vjp_method="single-step")
    dense, h = Dense(name, batch), start(MODELS[name][2], batch)
    gradient = brainstate.transform.grad(lambda x: (learner(x) * WEIGHT).sum(), learner.param_states)
    for t, x in enumerate(xs):
        found = gradient(x)
        dense.advance(h, x, signs(learner, t, *h.shape[:2]))
        new = jax.vmap(dense.net.new)(h, x)
        signal = jax.grad(lambda s: sum(loss_of(list(v)) for v in s))(new)
        carried = dense.credit(signal)
        for k in carried:
            # Beside the projection: what the operation does to the loss elsewhere than through its own position.
            beside = 0.0
            if name == "gated":
                exact = jax.grad(lambda w: sum(loss_of(list(dense.net.new(a, b, w))) for a, b in zip(h, x)))(
                    dense.net.w
                )
                beside = exact[k] - direct(dense.net, k, h, x, signal)
            np.testing.assert_allclose(found["w", k], carried[k] + beside, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(learner.etrace_theta[0, ("w", k)].value, dense.theta[k], rtol=1e-9)
        h = new


def direct(net, k, h, x, signal):
    total = 0.0
    for i in range(len(x)):
        jac = jax.jacobian(lambda z, i=i: net.new(h[i], x[i], shift={k: z}))(jnp.zeros(N))
        df = jnp.diagonal(jac, axis1=1, axis2=2)
        total += jnp.outer(net.products(h[i], x[i])[0][k], (signal[i] * df).sum(0))
    return total


def test_windows():
    """Exact within a window; the projection at its entry meets the signal there."""
    name, xs = "synapse first", inputs(1)[:4]
    learner = braintrace.compile(Model(name), "uoro", xs[0], batch_size=1)
    dense, h = Dense(name, 1), start(2, 1)

    def window(w, h, xs):
        loss = 0.0
        for x in xs:
            h = jax.vmap(lambda h, x: dense.net.new(h, x, w))(h, x)
            loss += sum(loss_of(list(v)) for v in h)
        return loss, h

    for t in (0, 2):
        part = xs[t : t + 2]

        def loss(part):
            return (learner(braintrace.MultiStepData(part)) * WEIGHT).sum()

        found = brainstate.transform.grad(loss, learner.param_states)(part)
        (exact, signal), after = jax.grad(window, argnums=(0, 1), has_aux=True)(dense.net.w, h, part)
        carried = dense.credit(signal)
        agree({k[-1]: v for k, v in found.items()}, {k: exact[k] + carried[k] for k in exact})
        assert t == 0 or all(jnp.abs(v).max() > 1e-3 for v in carried.values())
        for i, x in enumerate(part):
            dense.advance(h, x, signs(learner, t + i, 1, 2))
            h = jax.vmap(dense.net.new)(h, x)
        np.testing.assert_allclose(h, after, rtol=1e-12)


class Enumerated(braintrace.UORO):
    """Takes its signs from a state."""

    def _draw_projection(self, key, step, group_index, shape, dtype):
        return self.signs.value[step].reshape(shape).astype(dtype)


def test_the_mean_over_all_signs_is_the_whole_sensitivity():
    name, xs = "recurrent", inputs()[:2]
    learner = Enumerated(Model(name), vjp_method="single-step")
    learner.signs = brainstate.ShortTermState(jnp.zeros((2, N)))
    brainstate.nn.init_all_states(learner.model4compile)
    learner.compile_graph(xs[0])

    @brainstate.transform.jit
    def gradient(signs):
        learner.signs.value = signs
        learner.model4compile.s[0].value = jnp.full(N, 0.1)
        learner.reset_state()
        learner(xs[0])
        return brainstate.transform.grad(lambda: (learner(xs[1]) * WEIGHT).sum(), learner.param_states)()

    every = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=2 * N))).reshape(-1, 2, N)
    found = [gradient(s) for s in every]
    mean = {k[-1]: sum(g[k] for g in found) / len(found) for k in found[0]}
    agree(mean, Reference(name, jnp.ones((N, N))).gradients(xs)[-1])
    assert not any(np.allclose(found[0]["w", k], mean[k], rtol=0.1) for k in mean)


def test_a_reset_learner_draws_the_same_signs():
    xs = inputs()
    results = {}
    for key in (1, 2):
        learner = braintrace.compile(Model("recurrent"), "uoro", xs[0], projection_key=key)

        def run(learner=learner):
            learner.model4compile.s[0].value = jnp.full(N, 0.1)
            learner.reset_state()
            return learner.etrace_grad(xs, step_fn=lambda x: (learner(x) * WEIGHT).sum())

        first, second = run(), run()
        assert learner.projection_step.value == len(xs)
        jax.tree.map(np.testing.assert_array_equal, first, second)
        results[key] = first["w", "in"]
    assert not np.allclose(results[1], results[2], rtol=1e-3)


def test_attributes_and_refusals():
    x = jnp.zeros((2, 3))
    learner = braintrace.compile(Model("synapse first"), braintrace.UORO, x, batch_size=2)
    assert learner.etrace_s[0].value.shape == (2, N, 2)
    assert {k: v.shape for k, v in learner.get_etrace_of(("w", "in")).items()} == {(0, ("w", "in")): (3, N)}
    learner.reset_state(batch_size=5)
    assert learner.etrace_s[0].value.shape == (5, N, 2)
    assert learner.vjp_method == "multi-step" and learner.projection_step.value.dtype == jnp.int32
    for key in (3, jax.random.key(3), jax.random.PRNGKey(3)):
        other = braintrace.compile(Model("recurrent"), "uoro", x[0], projection_key=key)
        np.testing.assert_array_equal(other.projection_rng.value, jax.random.key_data(jax.random.key(3)))
    other = braintrace.compile(Model("recurrent"), "uoro", x[0], projection_key=jax.random.key(3, impl="rbg"))
    assert jnp.all(jnp.isfinite(other(x[0])))
    for eps, error in [(0.0, ValueError), (1e-60, ValueError), (-1.0, ValueError), ("a", TypeError)]:
        with pytest.raises(error, match="projection_eps must be"):
            braintrace.UORO(Model("recurrent"), projection_eps=eps)
    with pytest.raises(TypeError, match="projection_key must be an int or a JAX key"):
        braintrace.UORO(Model("recurrent"), projection_key="a")
    with pytest.raises(TypeError, match="UORO takes no config"):
        braintrace.UORO(Model("recurrent"), config=braintrace.ETraceConfig())
    config = braintrace.ETraceConfig("random_projection", recurrence_scope="coupled")
    assert isinstance(braintrace.compile(Model("recurrent"), config, x[0]), braintrace.RandomProjectionVjpAlgorithm)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(dtype):
    """The norms do not leave the range of the numbers, at the first step least of all."""

    class Half(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = brainstate.ParamState(jnp.full((5, 3), 0.1, dtype))

        def init_state(self, batch_size=None, **_):
            self.h = brainstate.HiddenState(jnp.zeros((batch_size, 3), dtype))

        def update(self, x):
            self.h.value = jnp.tanh(braintrace.matmul(jnp.concatenate([x, self.h.value], -1), self.w.value))
            return self.h.value

    x = jnp.ones((2, 2), dtype)
    learner = braintrace.compile(Half(), "uoro", x, batch_size=2, vjp_method="single-step")
    gradient = brainstate.transform.grad(lambda: learner(x).sum(), learner.param_states)
    for _ in range(3):
        g = gradient()["w",]
        assert g.dtype == dtype and jnp.all(jnp.isfinite(g)) and jnp.any(g != 0)


class Spiking(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.neurons = brainpy.state.LIF(N, tau=20.0 * u.ms, V_th=1.0 * u.mV)
        self.synapses = brainpy.state.AlignPostProj(
            comm=braintrace.nn.Linear(3 + N, N, w_init=braintools.init.Normal(0.0 * u.mS, 3.0 * u.mS), b_init=None),
            syn=brainpy.state.Expon(N, tau=5.0 * u.ms),
            out=brainpy.state.CUBA(scale=1.0 * u.volt),
            post=self.neurons,
        )

    def update(self, x):
        self.synapses(jnp.concatenate([x, self.neurons.get_spike()], -1))
        return self.neurons()


@pytest.mark.parametrize("rule", ["uoro", "ostl_recurrent", braintrace.SnAp])
@pytest.mark.filterwarnings("ignore")
def test_spiking_neurons_with_units(rule):
    """All modes run; after one step every rule has the gradient of back-propagation."""
    xs = jax.random.uniform(jax.random.key(5), (3, 2, 3)) < 0.5
    xs = 3.0 * xs.astype(float)
    with brainstate.environ.context(dt=1.0 * u.ms):
        grads = []
        for vmap in (False, True):
            brainstate.random.seed(0)
            options = {"vjp_method": "multi-step"} if rule == "uoro" else {}
            learner = braintrace.compile(Spiking(), rule, xs[0], batch_size=2, vmap=vmap, **options)

            def step(x, learner=learner):
                return ((learner(x) - 0.3) ** 2).sum()

            weights = learner.module.param_states if vmap else learner.param_states
            grads.append(brainstate.transform.grad(step, weights)(xs[0]))
            if vmap == (rule == "uoro"):  # the sequence in one mode, a compilation is slow
                total = learner.etrace_grad(xs, step_fn=step)
                assert all(jnp.isfinite(u.get_mantissa(g)).all() for g in jax.tree.leaves(total))
    first, second = (jax.tree.leaves(g)[0] for g in grads)
    np.testing.assert_allclose(first, second, rtol=1e-9)
    assert jnp.abs(first).max() > 1e-3


def test_samples_draw_their_own_signs():
    """Mapped or not: signs that samples share would add up instead of averaging out."""
    x = jnp.ones((6, 3))
    for vmap in (False, True):
        learner = braintrace.compile(braintrace.nn.GRUCell(3, 5), "uoro", x, batch_size=6, vmap=vmap)
        of_samples = learner.module if vmap else learner
        found = []
        for _ in range(2):
            learner(x)
            found.append(np.sign(of_samples.etrace_s[0].value[..., 0]))
            learner.reset_state()
        np.testing.assert_array_equal(*found)
        assert len(np.unique(found[0], axis=0)) > 1
