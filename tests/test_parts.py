"""The small parts of learning rules."""

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import braintrace


def test_fixed_random_feedback():
    part = braintrace.FixedRandomFeedback(3, 200, jax.random.key(0), init_scale=0.5)
    assert part.B.shape == (part.n_target, part.n_layer) == (3, 200)
    assert abs(float(part.B.std()) - 0.5) < 0.05
    y = jnp.ones((2, 4, 3))
    np.testing.assert_allclose(part.project(y_target=y), y @ part.B)
    np.testing.assert_array_equal(braintrace.FixedRandomFeedback(3, 200, key=0, init_scale=0.5).B, part.B)


def test_kappa_filter():
    part = braintrace.KappaFilter(jnp.ones((2, 3)), 0.25)
    assert isinstance(part, brainstate.ShortTermState)
    np.testing.assert_allclose(part.update(5.0 * jnp.ones((2, 3))), 0.75 * 5.0 + 0.25)
    part.reset_state()
    np.testing.assert_array_equal(part.value, np.zeros((2, 3)))
    part.reset_state(batch_size=7, unused=None)
    assert part.value.shape == (7, 3)


def test_keywords():
    assert braintrace.KappaFilter(init_value=jnp.zeros(1), kappa=0.5).update(x=jnp.ones(1)) == 0.5
    part = braintrace.SyntheticGradient(group_shapes={0: (3, 1), 2: (4, 1)}, hidden_width=5, scale=0.5, seed=3)
    estimates = part.apply(param_values=part.param_values(), group_hiddens={2: jnp.ones((4, 1))})
    np.testing.assert_allclose(estimates[2], part.weights[2].value.sum(0)[:, None], rtol=1e-6)
    # What braintrace 0.2.6 draws.
    np.testing.assert_allclose([part.weights[i].value.sum() for i in (0, 2)], [-1.28216004, -2.36273432], rtol=1e-5)


@pytest.mark.parametrize("kappa", [-0.1, 1.0])
def test_kappa_out_of_range(kappa):
    with pytest.raises(ValueError, match=str(kappa)):
        braintrace.KappaFilter(jnp.zeros(1), kappa)


def test_smoothed_gradients():
    with brainstate.environ.context(dt=1.0 * u.ms):
        part = braintrace.GradExpon({"w": jnp.zeros(2)}, 2.0 * u.ms)
    decay = np.exp(-0.5)
    for _ in range(3):
        assert part.update({"w": jnp.ones(2)}) is None
    np.testing.assert_allclose(part.gradients.value["w"], 1 + decay + decay**2, rtol=1e-6)


BAD = [
    (1.0, AssertionError),
    (0.0, AssertionError),
    ("1 ms", TypeError),
    (1, TypeError),
    (2.0 * u.ms, KeyError),
    (-1.0 * u.ms, ValueError),
    (0.0 * u.ms, ValueError),
]


@pytest.mark.parametrize("value, error", BAD, ids=str)
def test_bad_time_constants(value, error):
    with pytest.raises(error):
        braintrace.GradExpon(jnp.zeros(2), value)
