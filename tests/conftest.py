"""Shared test setup: a time step for those who ask, quick compilation, and programs dropped now and then."""

import gc
import os
import subprocess
import sys

# Most programs run once, for a moment: to compile them well takes longer than all else. Set XLA_FLAGS to have it done.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_QUICKER = f"{_QUICK} --xla_cpu_use_fusion_emitters=false"  # a flag of some releases


def _are_known(flags):
    """Whether XLA starts with these flags: it stops at those that it does not have."""
    starts = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(starts, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True).returncode == 0


if not os.environ.get("XLA_FLAGS"):  # it is read when an import below makes the first array
    os.environ["XLA_FLAGS"] = next(filter(_are_known, (_QUICKER, _QUICK)), "")

import brainstate  # noqa: E402
import brainunit as u  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

gc.freeze()  # what the libraries made stays, and tracing makes many objects that die at once
gc.set_threshold(20_000, 20, 20)
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
