"""A run that is spread over two processes: the numbers of one process, and what remains when one of them dies."""

import os
import subprocess
import sys
from pathlib import Path

import jaxlib
import numpy as np
import pytest
from helpers import flags_for

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "examples" / "launch.py"
LIMIT = 150  # seconds, on a machine that is busy with other things
OF_JAXLIB = [getattr(jaxlib, "_jax", None), getattr(getattr(jaxlib, "xla_client", None), "_xla", None)]

pytestmark = pytest.mark.skipif(
    not any(hasattr(module, "make_gloo_tcp_collectives") for module in OF_JAXLIB),
    reason="this jaxlib has no collectives between processes of a CPU",
)

CONNECTED = """
import argparse, os, sys
import brainstate, braintrace, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh

parser = argparse.ArgumentParser()
parser.add_argument("--processes", type=int)
parser.add_argument("--number", type=int)
parser.add_argument("--coordinator")
args = parser.parse_args()
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(args.coordinator, args.processes, args.number)
mesh = Mesh(np.array(jax.devices()), ("batch",))


def learner(seed):
    brainstate.random.seed(seed)
    return braintrace.compile(braintrace.nn.ValinaRNNCell(2, 3), "d_rtrl", jnp.zeros((2, 2)), batch_size=2)
"""

REFUSED = """
def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


same = learner(0)
braintrace.shard(same, mesh, batch="batch")
lines = [error_of(braintrace.save, "missing/run.npz", same)]
if args.number == 1:
    lines.append(error_of(braintrace.shard, learner(1), mesh, batch="batch"))
    print("\\n".join(lines), flush=True)
    os._exit(0)
print(*lines, flush=True)
error_of(braintrace.shard, learner(0), mesh, batch="batch")  # compares with a process that gives up
os._exit(0)
"""


ORBAX = """
import orbax.checkpoint as ocp

first, second = learner(0), learner(1)
for one in (first, second):
    braintrace.shard(one, mesh, batch="batch")
first.etrace_grad(jnp.ones((3, 2, 2)), step_fn=lambda x: (first(x) ** 2).mean())
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(os.path.abspath("run"), braintrace.state_dict(first, step=3))
like = jax.tree.map(ocp.utils.to_shape_dtype_struct, braintrace.state_dict(second, step=0))
with ocp.StandardCheckpointer() as checkpointer:
    found = braintrace.load_state_dict(second, checkpointer.restore(os.path.abspath("run"), like))
parts = [[p.data for x in jax.tree.leaves([s.value for s in one.states().values()]) for p in x.addressable_shards]
         for one in (first, second)]
assert len(parts[0]) == len(parts[1]) > 4 and all(map(np.array_equal, *parts))
print(found, flush=True)
os._exit(0)
"""


def run(*command, folder):
    """The standard output; nothing that was started remains, as each process notices the end of the others."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", *map(str, command)],
        cwd=folder,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "XLA_FLAGS": flags_for(1)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=LIMIT)
    finally:
        try:
            os.killpg(child.pid, 9)
        except ProcessLookupError:
            pass
    assert child.returncode == 0, err[-3000:]
    return out, err


def test_two_processes_are_one_and_one_that_dies_costs_no_more_than_a_checkpoint(tmp_path):
    script = ROOT / "examples" / "processes.py"
    run(script, "--quick", "--checkpoint", "one.npz", folder=tmp_path)
    options = ("--quick", "--checkpoint", "two.npz", "--die-at", 3)
    out, err = run(LAUNCH, script, *options, folder=tmp_path)
    lines = [line for line in out.splitlines() if line.startswith(("step", "the processes"))]
    steps = [line.split(":")[0] for line in lines]
    assert steps == ["step 2", "the processes ended with [1, 1]", "step 4", "step 6"]
    assert "process 0 ends" in err
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert sorted(one) == sorted(two)
    kinds = [{name.split("/")[0] for name in file} for file in (one, two)]
    assert kinds[0] >= {"model", "learner", "optimizer"}
    for name in one:
        if not name.endswith(".json"):  # parameters, traces, and the sum of gradients of the optimiser
            np.testing.assert_allclose(two[name], one[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_what_differs_between_processes_is_an_error_in_each(tmp_path):
    (tmp_path / "refused.py").write_text(CONNECTED + REFUSED)
    out, _ = run(LAUNCH, "--restarts", 0, "refused.py", folder=tmp_path)
    assert "FileNotFoundError: [Errno 2]" in out
    assert "OSError: Process 0, which writes for all, could not write 'missing/run.npz'" in out
    assert "ValueError" in out and "another value in this process" in out and "brainstate.random.seed" in out


def test_orbax_writes_from_two_processes(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    (tmp_path / "script.py").write_text(CONNECTED + ORBAX)
    out, _ = run(LAUNCH, "--restarts", 0, "script.py", folder=tmp_path)
    assert out.count("{'step': 3}") == 2
