"""pp_prop under other coordinates: what is contracted with the traces, and how they recur."""

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import braintrace
from braintrace import ETraceConfig

W = np.array([[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]])
XS = np.array([[1.0, 0.5], [-0.3, 0.8], [0.2, -1.0]])
LOSS = np.array([1.0, 2.0, 3.0])


class Leaky(brainstate.nn.Module):
    """``h <- tanh(.5 h + x W)``."""

    def __init__(self):
        super().__init__()
        self.w = brainstate.ParamState(jnp.asarray(W, jnp.float32))

    def init_state(self, batch_size=None, **kwargs):
        self.h = brainstate.HiddenState(jnp.zeros(3 if batch_size is None else (batch_size, 3)))

    def reset_state(self, batch_size=None, **kwargs):
        self.h.value = jnp.zeros_like(self.h.value)

    def update(self, x):
        self.h.value = jnp.tanh(0.5 * self.h.value + braintrace.matmul(x, self.w.value))
        return self.h.value


def last_gradient(**options):
    learner = braintrace.compile(Leaky(), "pp_prop", jnp.zeros(2), **options)

    def step(x):
        return brainstate.transform.grad(lambda: (learner(x) * LOSS).sum(), learner.param_states)()

    grads = [step(jnp.asarray(x, jnp.float32)) for x in XS]
    return np.asarray(grads[-1]["w",]), learner


def recursion(alpha_x, alpha_f, signal=lambda s: s, D=lambda d: d):
    """The trace equations of pp_prop on `Leaky`, in NumPy."""
    h, ex, ef = np.zeros(3), np.zeros(2), np.zeros(3)
    for x in XS:
        h = np.tanh(0.5 * h + x @ W)
        slope = 1 - h**2
        ex = alpha_x * ex + x
        ef = alpha_f * D(0.5 * slope) * ef + (1 - alpha_f) * slope
    return np.outer(ex, signal(LOSS) * ef / (1 - alpha_f ** len(XS)))


def config(recursion_f="jacobian", decay=(0.9, 0.8), **changes):
    return ETraceConfig("io_factorized", ("scalar_leak", recursion_f), decay=decay, **changes)


RECURSIONS = [
    ("jacobian", (0.9, 0.8), lambda d: d),
    ("scalar_leak", (0.9, 0.8), np.ones_like),
    ("none", (0.9, 0.0), np.zeros_like),
]


@pytest.mark.parametrize("name, decay, D", RECURSIONS, ids=[r[0] for r in RECURSIONS])
def test_recursion_of_the_sensitivity(name, decay, D):
    gradient, _ = last_gradient(config=config(name, decay))
    np.testing.assert_allclose(gradient, recursion(*decay, D=D), rtol=1e-5)


def test_recursions_differ():
    results = [recursion(*decay, D=D) for _, decay, D in RECURSIONS]
    assert not np.allclose(results[0], results[1], rtol=1e-2)
    assert not np.allclose(results[0], results[2], rtol=1e-2)


def test_decay_and_config_that_agree_or_not():
    gradient, learner = last_gradient(config=config(), decay_or_rank=(0.9, 0.8))
    assert (learner.decay_x, learner.decay_f) == (0.9, 0.8)
    np.testing.assert_allclose(gradient, recursion(0.9, 0.8), rtol=1e-5)
    with pytest.raises(ValueError, match="0.5"):
        braintrace.pp_prop(Leaky(), 0.5, config=config())


def test_random_feedback_is_a_fixed_projection_of_the_unit_signal():
    gradient, learner = last_gradient(config=config(learning_signal="random_feedback"), random_feedback_key=3)
    # Divided by the gradient of a unit signal, every row shows the changed signal.
    ratio = gradient / recursion(0.9, 0.8, signal=np.ones_like)
    np.testing.assert_allclose(ratio[0], ratio[1], rtol=1e-4)
    again, _ = last_gradient(config=config(learning_signal="random_feedback"), random_feedback_key=3)
    np.testing.assert_array_equal(gradient, again)
    other, _ = last_gradient(config=config(learning_signal="random_feedback"), random_feedback_key=4)
    assert not np.allclose(gradient, other)
    assert np.abs(ratio).max() < 1.0


def test_random_feedback_does_not_see_the_size_of_the_signal():
    def gradient(scale):
        learner = braintrace.compile(
            Leaky(),
            "pp_prop",
            jnp.zeros(2),
            config=config(learning_signal="random_feedback"),
            random_feedback_key=jax.random.key(0),
        )
        x = jnp.asarray(XS[0], jnp.float32)
        return brainstate.transform.grad(lambda: scale * (learner(x) * LOSS).sum(), learner.param_states)()["w",]

    np.testing.assert_allclose(gradient(1.0), gradient(100.0), rtol=1e-5)


def test_modulator_replaces_the_signal():
    learner = braintrace.compile(Leaky(), "pp_prop", jnp.zeros(2), config=config(learning_signal="modulatory"))
    m = jnp.asarray([0.3, -1.0, 2.0])

    @brainstate.transform.jit
    def step(x, m):
        return brainstate.transform.grad(lambda: learner(x, modulator=m).sum(), learner.param_states)()["w",]

    grads = [step(jnp.asarray(x, jnp.float32), m) for x in XS]
    np.testing.assert_allclose(grads[-1], recursion(0.9, 0.8, signal=lambda s: np.asarray(m)), rtol=1e-5)


def test_standing_modulator_is_read_by_a_jitted_step():
    learner = braintrace.compile(Leaky(), "pp_prop", jnp.zeros(2), config=config(learning_signal="modulatory"))
    x = jnp.asarray(XS[0], jnp.float32)
    learner.modulator = 1.0

    @brainstate.transform.jit
    def step():
        learner.reset_state()
        brainstate.nn.reset_all_states(learner.model4compile)
        return brainstate.transform.grad(lambda: learner(x).sum(), learner.param_states)()["w",]

    first = step()
    learner.modulator = -5.0
    np.testing.assert_allclose(step(), -5.0 * first, rtol=1e-5)


BAD_MODULATORS = [(None, RuntimeError), ([1.0], TypeError), (jnp.ones(7), ValueError)]


@pytest.mark.parametrize("modulator, error", BAD_MODULATORS)
def test_modulator_errors_leave_the_learner_as_it_was(modulator, error):
    learner = braintrace.compile(Leaky(), "pp_prop", jnp.zeros(2), config=config(learning_signal="modulatory"))
    with pytest.raises(error, match="modulator"):
        learner(jnp.ones(2), modulator=modulator)
    assert learner.running_index.value == 0
    plain = braintrace.compile(Leaky(), "pp_prop", jnp.zeros(2), decay_or_rank=0.9)
    with pytest.raises(TypeError, match="modulator"):
        plain(jnp.ones(2), modulator=1.0)


# -- EProp: outputs read hidden values, or what is made of them


def spike(v):
    return jax.nn.sigmoid(4 * (v - 0.2))


class Neurons(brainstate.nn.Module):
    """``v <- .8 v + x W``, spikes of it, and a reset behind them."""

    def __init__(self, output):
        super().__init__()
        self.output = output
        self.w = brainstate.ParamState(jnp.asarray(W, jnp.float32))
        self.v, self.z = (brainstate.HiddenState(jnp.zeros(3)) for _ in "vz")

    def update(self, x):
        v = 0.8 * self.v.value + braintrace.matmul(x, self.w.value)
        z = spike(v)
        if self.output == "spikes kept":
            self.z.value = z
            z = self.z.value
        self.v.value = v if self.output in ("voltage", "spikes") else v - 0.3 * jax.lax.stop_gradient(z)
        return self.v.value if self.output == "voltage" else z


def textbook(kappa):
    """E-prop with the filter behind the slope of the spike, in NumPy."""
    v, trace, filtered, found = np.zeros(3), np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 3))
    for x in XS:
        v = 0.8 * v + x @ W
        z = np.asarray(spike(v))
        trace = 0.8 * trace + x[:, None]
        filtered = kappa * filtered + 4 * z * (1 - z) * trace
        found = found + LOSS * filtered
        v = v - 0.3 * z
    return found


def of_neurons(output, **options):
    """The gradient of a sum of losses."""
    learner = braintrace.compile(Neurons(output), "eprop", jnp.zeros(2), **options)
    grads = learner.etrace_grad(
        jnp.asarray(XS, jnp.float32), step_fn=lambda x: (learner(x) * LOSS).sum(), reduction="sum"
    )
    return np.asarray(grads["w",])


RANDOM = dict(feedback="random", random_feedback_key=0)


@pytest.mark.filterwarnings("error::braintrace.CompilationWarning")
@pytest.mark.filterwarnings("ignore:.*state_mismatch", "ignore:etrace_grad and etrace_evolve")
@pytest.mark.parametrize(
    "output, options, kinds",
    [
        ("spikes kept", dict(kappa_filter_decay=0.6), []),
        ("spikes kept", RANDOM, []),
        ("voltage", dict(kappa_filter_decay=0.6), []),
        ("spikes", {}, []),
        ("spikes", RANDOM, []),
        ("spikes", dict(kappa_filter_decay=0.6), ["filter_misses_slope"]),
        ("before the reset", {}, []),
        ("before the reset", dict(kappa_filter_decay=0.6), ["signal_bypasses_filter"]),
        ("before the reset", RANDOM, ["signal_bypasses_filter"]),
    ],
)
def test_eprop_says_what_its_filter_and_its_matrix_do_not_see(output, options, kinds):
    if kinds:
        with pytest.raises(braintrace.CompilationWarning, match=rf"\[{kinds[0]}\] The output reads.*'v'.*HiddenState"):
            of_neurons(output, **options)
    else:
        of_neurons(output, **options)


@pytest.mark.filterwarnings("ignore::braintrace.CompilationWarning")
def test_eprop_of_spikes_that_are_kept_is_that_of_the_paper():
    np.testing.assert_allclose(of_neurons("spikes kept", kappa_filter_decay=0.6), textbook(0.6), rtol=1e-5)
    np.testing.assert_allclose(of_neurons("before the reset"), textbook(0.0), rtol=1e-5)
    for output in ("spikes", "before the reset"):
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(of_neurons(output, kappa_filter_decay=0.6), textbook(0.6), rtol=0.1)


def test_constants_among_the_outputs_have_no_slope():
    class Constants(Neurons):
        def update(self, x):
            super().update(x)
            return self.v.value, 1.0

    learner = braintrace.compile(Constants("voltage"), "eprop", jnp.zeros(2), kappa_filter_decay=0.5)
    assert learner(jnp.ones(2))[1] == 1.0
