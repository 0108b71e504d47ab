"""Shared test setup: a time step for those who ask, and compiled programs dropped now and then."""

import os

import brainstate
import brainunit as u
import jax
import pytest

_count = 0


def pytest_configure(config):
    """Keep what was compiled for the next run, and for the other workers."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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
