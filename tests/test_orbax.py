"""A sharded run goes to disk by orbax, and comes back on another number of devices."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import flags_for

pytest.importorskip("orbax.checkpoint")

CODE = """
import sys
import brainstate, braintrace, jax, jax.numpy as jnp, numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

what, path, out = sys.argv[1:]
devices = jax.devices()
mesh = Mesh(np.array(devices), ("units",))


def sharded(value):
    divisible = value.ndim > 1 and value.shape[1] % len(devices) == 0  # units are the second axis of states and traces
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec(None, "units") if divisible else PartitionSpec()))


brainstate.random.seed(len(devices))
learner = braintrace.compile(
    braintrace.nn.GRUCell(2, 16), "pp_prop", jnp.zeros((8, 2)), batch_size=8, decay_or_rank=0.9
)
for state in learner.states().values():
    state.value = jax.tree.map(sharded, state.value)
xs = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8, 2)), jnp.float32)
gradient = lambda: learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).sum())

with ocp.StandardCheckpointer() as checkpointer:
    if what == "save":
        gradient()
        checkpointer.save(path, braintrace.state_dict(learner, step=3, name="run"))
    else:
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, braintrace.state_dict(learner, step=0, name="..."))
        shardings = {k: s.value.sharding for k, s in learner.states(braintrace.EligibilityTrace).items()}
        more = braintrace.load_state_dict(learner, checkpointer.restore(path, like))
        assert more == {"step": 3, "name": "run"} and int(learner.running_index.value) == 5, more
        assert all(s.value.sharding == shardings[k] for k, s in learner.states(braintrace.EligibilityTrace).items())
        assert any(len({str(p.index) for p in s.value.addressable_shards}) == len(devices)
                   for s in learner.states(braintrace.EligibilityTrace).values())
    arrays = {k: np.asarray(v) for k, v in braintrace.state_dict(learner).items() if k != "random/default"}
    grads = {f"gradient {k} {n}": np.asarray(g) for k, v in gradient().items() for n, g in v.items()}
    np.savez(out, **arrays, **grads)
"""


def run(devices, *args):
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags_for(devices),
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-W", "ignore", "-c", CODE, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_saved_on_eight_devices_and_restored_on_one_and_on_four(tmp_path):
    run(8, "save", tmp_path / "run", tmp_path / "8.npz")
    expected = np.load(tmp_path / "8.npz")
    for devices in (1, 4):
        run(devices, "load", tmp_path / "run", tmp_path / f"{devices}.npz")
        found = np.load(tmp_path / f"{devices}.npz")
        assert sorted(found) == sorted(expected)
        for name in expected:
            if name.startswith("gradient"):  # sums over devices are taken in another order
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
            else:
                np.testing.assert_array_equal(found[name], expected[name])
