"""Shared test setup: a time step for those who ask, and compiled programs dropped now and then."""

import brainstate
import brainunit as u
import jax
import pytest

_count = 0


@pytest.fixture
def time_step():
    """1 ms; use it by `pytestmark = pytest.mark.usefixtures('time_step')`."""
    with brainstate.environ.context(dt=1.0 * u.ms):
        yield


@pytest.fixture(autouse=True)
def same_draws():
    """Every test draws the same weights, whichever tests ran before it."""
    brainstate.random.seed(2024)


@pytest.fixture(autouse=True)
def bounded_memory():
    """Compiled programs are never shared between tests: keep 40 tests' worth."""
    global _count
    yield
    _count += 1
    if _count % 40 == 0:
        jax.clear_caches()
