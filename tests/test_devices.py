"""A batch that is spread over devices: only gradients and losses cross, and the numbers stay what they are.

Devices are virtual ones of the CPU, which a process has from its start: a child runs all cases.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import flags_for
from jax.tree import leaves

import braintrace
from braintrace._ops import pattern_of

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from crossings import bytes_crossing  # noqa: E402
from whole_brain import N_REGIONS, Brain, make_connectome  # noqa: E402

RULES = {
    "pp_prop": dict(decay_or_rank=0.9),
    "d_rtrl": {},
    "eprop": dict(kappa_filter_decay=0.5),
    "ostl_recurrent": {},
    "hybrid": dict(decay_or_rank=0.9),
}
ONE = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
BATCH, INPUTS, UNITS, STEPS = 16, 12, 24, 10
MOVES = re.compile(r"= (.*?) (all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(?:-start)?\(")


def crossings(program):
    """What a compiled program sends between devices: name of the operation, elements of the largest array."""
    found = []
    for shapes, name in MOVES.findall(program):
        sizes = [filter(None, shape.split(",")) for shape in re.findall(r"\[([\d,]*)\]", shapes)]
        found.append((name, max(math.prod(map(int, size)) for size in sizes)))
    return found


def child():
    import warnings

    import brainpy
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    warnings.simplefilter("ignore")
    brainstate.environ.set(dt=1.0 * u.ms)
    mesh = Mesh(np.array(jax.devices()), ("batch",))

    class Gated(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = braintrace.nn.GRUCell(INPUTS, UNITS)
            self.readout = braintrace.nn.LeakyRateReadout(UNITS, 3, tau=5.0 * u.ms)

        def update(self, x):
            return self.readout(self.cell(x))

    class Spiking(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.neuron = brainpy.state.ALIF(UNITS, tau=20 * u.ms, V_th=1 * u.mV, R=1 * u.ohm)
            self.comm = braintrace.nn.Linear(INPUTS + UNITS, UNITS)
            self.readout = braintrace.nn.LeakyRateReadout(UNITS, 3, tau=5.0 * u.ms)

        def update(self, x):
            z = jnp.concatenate([x, self.neuron.get_spike()], -1)
            return self.readout(self.neuron(self.comm(z) * u.mA))

    def spread(value, axis):
        """An array with the batch on that axis, over the devices; anything else on all of them."""
        there = value.ndim > axis and value.shape[axis] == BATCH
        return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*[None] * axis, "batch" if there else None)))

    def put(value, axis=0):
        return jax.tree.map(lambda v: spread(v, axis) if v.ndim else v, value)

    xs = jax.random.normal(jax.random.key(0), (STEPS, BATCH, INPUTS))
    results = {}
    for make in (Gated, Spiking):
        for rule, options in RULES.items():
            for vmap in (False, True):
                learner = braintrace.compile(make(), rule, xs[0], batch_size=BATCH, vmap=vmap, seed=0, **options)
                one = learner.module if vmap else learner
                start = {p: s.value for p, s in learner.states().items()}
                loss = lambda x: (learner(x) ** 2).mean()  # noqa: B023, E731
                drives = {
                    "step": lambda x: brainstate.transform.grad(loss, one.param_states)(x),  # noqa: B023
                    "sequence": lambda xs: learner.etrace_grad(xs, step_fn=loss),  # noqa: B023
                }
                for name, drive in drives.items():
                    found = []
                    for sharded in (False, True):
                        for p, s in learner.states().items():
                            s.value = put(start[p]) if sharded else start[p]
                        data = xs[0] if name == "step" else xs
                        data = put(data, int(name != "step")) if sharded else data
                        function = brainstate.transform.jit(drive)
                        program = function.compile(data).as_text()
                        found.append(jax.tree.map(np.asarray, dict(function(data))))
                    for p, s in learner.states().items():
                        s.value = start[p]
                    a, b = (jax.tree.leaves(f) for f in found)
                    error = max(float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-3)) for x, y in zip(a, b))
                    case = "/".join((make.__name__, rule, "mapped" if vmap else "batched", name))
                    results[case] = {"crossings": crossings(program), "error": error, "weights": len(a)}

    for rule, options in RULES.items():
        for drive in ("step", "sequence"):
            learner = braintrace.compile(Gated(), rule, xs[0], batch_size=BATCH, seed=0, **options)
            loss = lambda x: (learner(x) ** 2).mean()  # noqa: B023, E731
            step = brainstate.transform.grad(loss, learner.param_states)
            gradients = step if drive == "step" else lambda xs: learner.etrace_grad(xs, step_fn=loss)  # noqa: B023
            others = [s for s in learner.states().values() if not isinstance(s, brainstate.ParamState)]
            start, found = [s.value for s in others], []
            samples = {s: PartitionSpec(*["batch"][: jax.tree.leaves(s.value)[0].ndim]) for s in others}
            mapped = brainstate.transform.shard_map(
                lambda x: jax.tree.map(lambda g: jax.lax.pmean(g, "batch"), dict(gradients(x))),  # noqa: B023
                mesh,
                in_specs=(PartitionSpec(*[None] * (drive == "sequence"), "batch"),),
                out_specs=PartitionSpec(),
                state_in_specs=samples,
                state_out_specs=samples,
                check_vma=False,
            )
            for function in map(brainstate.transform.jit, (gradients, mapped)):
                for state, value in zip(others, start):
                    state.value = value
                data = xs if drive == "sequence" else xs[0]
                program = function.compile(data).as_text()
                grads = [function(data) for _ in range(2)][1]
                found.append(jax.tree.map(np.asarray, (dict(grads), [s.value for s in others])))
            a, b = map(jax.tree.leaves, found)
            error = max(float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-3)) for x, y in zip(a, b))
            results[f"shard_map/{rule}/{drive}"] = {"crossings": crossings(program), "error": error}

    class Cell(brainstate.nn.Module):
        """A leaky unit behind any layer from inputs and itself."""

        def __init__(self, layer, units):
            super().__init__()
            self.layer, self.units = layer, units

        def init_state(self, batch_size=None, **_):
            self.h = brainstate.HiddenState(jnp.zeros((batch_size, self.units)))

        def update(self, x):
            self.h.value = 0.8 * self.h.value + jnp.tanh(self.layer(jnp.concatenate([x, self.h.value], -1)))
            return self.h.value

    def on_cell(layer, units):
        return brainstate.nn.Sequential(Cell(layer, units), braintrace.nn.LeakyRateReadout(units, 3, tau=5.0 * u.ms))

    def sparse(units, n):
        shape, rng = (INPUTS + units, units), np.random.default_rng(0)
        rows, cols = np.divmod(rng.choice(shape[0] * shape[1], n, replace=False), units)
        matrix = u.sparse.COO((jnp.asarray(rng.normal(size=n), jnp.float32), rows, cols), shape=shape)
        return braintrace.nn.SparseLinear(braintrace.columns_in_parts(matrix, 4), b_init=jnp.zeros(units))

    models = {
        "Gated": Gated,
        "Sparse": lambda: on_cell(sparse(64, 1501), 64),
        "Thin": lambda: on_cell(sparse(256, 1001), 256),
        "LowRank": lambda: on_cell(braintrace.nn.LoRA(INPUTS + UNITS, 5, UNITS), UNITS),
    }
    grids = {
        2: Mesh(np.array(jax.devices()[:4]), ("units",)),
        BATCH: Mesh(np.array(jax.devices()).reshape(2, 4), ("batch", "units")),
    }
    for case, (model, rule, layout, drive, batch) in SPREAD.items():
        found, grid = [], grids[batch]
        data = xs[:, :batch] if drive == "sequence" else xs[0, :batch]
        for spread_out in (False, True):
            learner = braintrace.compile(
                models[model](), rule, xs[0, :batch], batch_size=batch, seed=0, **RULES.get(rule, {})
            )
            for state, value in zip(learner.param_states.values(), found[0][0] if found else ()):
                state.value = value
            values = [s.value for s in learner.param_states.values()]
            traces = learner.states(braintrace.EligibilityTrace)
            if spread_out:
                braintrace.shard(learner, grid, **layout)
                learner.reset_state()
                spec = PartitionSpec(*[None] * (drive == "sequence"), layout.get("batch"))
                data = jax.device_put(data, NamedSharding(grid, spec))
            loss = lambda x: (learner(x) ** 2).mean()  # noqa: B023, E731
            step = brainstate.transform.grad(loss, learner.param_states)
            function = brainstate.transform.jit(
                step if drive == "step" else lambda xs: learner.etrace_grad(xs, step_fn=loss)  # noqa: B023
            )
            program = function.compile(data).as_text()
            grads = [function(data) for _ in range(2)][1]  # the traces of the first call meet the second
            kept = [s.value for s in traces.values()]
            found.append((values, jax.tree.map(np.asarray, (dict(grads), kept))))
        error = max(
            float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-3))
            for x, y in zip(*(jax.tree.leaves(f[1]) for f in found))
        )
        results[case] = {
            "crossings": crossings(program),
            "error": error,
            "report": learner.report.to_str(),
            "traces": [x.sharding.spec[-1:] == ("units",) for v in traces.values() for x in jax.tree.leaves(v.value)],
            "weights": max(x.size for v in values for x in jax.tree.leaves(v)),
        }
    results["brain"] = brain(grids[2])
    results["bytes"] = bytes_crossing(
        jax.jit(
            jax.shard_map(
                lambda x: jax.lax.fori_loop(0, 5, lambda _, x: jax.lax.pmean(x, "batch"), x),
                mesh=mesh,
                in_specs=PartitionSpec(),
                out_specs=PartitionSpec(),
                check_vma=False,
            )
        )
        .lower(jnp.ones(16))
        .compile()
        .as_text()
    )
    matrix = u.sparse.coo_fromdense(jnp.ones((INPUTS + 8, 8)).at[0, 1].set(0.0))
    learner = braintrace.compile(
        on_cell(braintrace.nn.SparseLinear(matrix), 8), "pp_prop", xs[0, :2], batch_size=2, decay_or_rank=0.9
    )
    try:
        braintrace.shard(learner, grids[2], units={"layers.0": "units"})
    except ValueError as error:
        results["refused"] = str(error)
    print(json.dumps(results))


def brain(mesh):
    """The gradient of the whole brain, made small, on one device and on those of a mesh, and what crosses there."""
    n, synapses, steps, rng = 800, 12_000, 10, np.random.default_rng(0)
    connectome = make_connectome(n, synapses, rng)
    strengths = jnp.asarray(rng.normal(0.0, 2.0, synapses), jnp.float32) * u.mS
    stimulus = jnp.asarray(rng.normal(5.0, 5.0, (steps, N_REGIONS)), jnp.float32) * u.mA
    found = []
    for devices in (1, mesh.size):
        brainstate.random.seed(0)
        model = Brain(connectome, strengths, 6.5 * u.mA, devices)
        brainstate.nn.init_all_states(model)
        learner = braintrace.compile(model, "pp_prop", stimulus[0], decay_or_rank=0.9)
        if devices > 1:
            braintrace.shard(learner, mesh, units=dict.fromkeys(("neurons", "synapses", "spikes"), "units"))
        function = brainstate.transform.jit(
            lambda xs: learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).sum())  # noqa: B023
        )
        program = function.compile(stimulus).as_text()
        (gradient,) = jax.tree.leaves(function(stimulus))
        pattern, dense = pattern_of(model.synapses.comm.spar_mat), np.zeros((n, n))
        dense[pattern.rows, pattern.cols] = u.get_mantissa(gradient)[pattern.entries]
        found.append(dense)
    one, many = found
    return {
        "error": float(np.abs(one - many).max() / np.abs(one).max()),
        "trained": float((one != 0).sum() / synapses),
        "largest": max(size for _, size in crossings(program)),
        "spikes of all steps": n * steps,
        "synapses": synapses,
    }


LAYOUTS = {
    "batch": dict(batch="batch"),
    "units": dict(units={"cell": "units"}),
    "both": dict(batch="batch", units={("cell",): "units"}),
}
SPREAD = {  # model, rule, layout, drive, batch
    f"Gated/{rule}/{name}/sequence": ("Gated", rule, layout, "sequence", BATCH)
    for rule in ("pp_prop", "d_rtrl", "uoro")
    for name, layout in LAYOUTS.items()
} | {
    f"{model}/{rule}/units/{drive}": (model, rule, dict(units={"layers.0": "units"}), drive, 2)
    for model in ("Sparse", "Thin", "LowRank")
    for rule in ("pp_prop", "d_rtrl")
    for drive in ("step", "sequence")
}


@pytest.fixture(scope="module")
def results():
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "XLA_FLAGS": flags_for(8), "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


CASES = [
    f"{model}/{rule}/{mode}/{drive}"
    for model in ("Gated", "Spiking")
    for rule in RULES
    for mode in ("batched", "mapped")
    for drive in ("step", "sequence")
]


@pytest.mark.parametrize("case", CASES)
def test_only_gradients_and_losses_cross(results, case):
    found = results[case]
    assert found["error"] < 1e-4
    assert [c for c in found["crossings"] if c[0] != "all-reduce" and c[1] > 64] == []
    reductions = [c for c in found["crossings"] if c[0] == "all-reduce"]
    assert 1 <= len(reductions) <= found["weights"] + 1


@pytest.mark.parametrize("drive", ["step", "sequence"])
@pytest.mark.parametrize("rule", RULES)
def test_under_shard_map_only_the_sum_of_the_gradients_crosses(results, rule, drive):
    found = results[f"shard_map/{rule}/{drive}"]
    assert found["error"] < 1e-5
    assert found["crossings"] and {name for name, _ in found["crossings"]} == {"all-reduce"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", ["pp_prop", "d_rtrl", "uoro"])
def test_layouts(results, rule, layout):
    """Over units only activities cross: never anything of the size of a trace."""
    found = results[f"Gated/{rule}/{layout}/sequence"]
    assert found["error"] < 1e-4
    activities = 1.2 * STEPS * BATCH * (INPUTS + UNITS)
    moved = [c for c in found["crossings"] if c[0] != "all-reduce"]
    assert all(n <= activities < BATCH * UNITS * (INPUTS + UNITS) for _, n in moved)
    assert layout != "batch" or moved == []
    assert "Layout" in found["report"] and "cell.h" in found["report"]


FEW = [case for case in SPREAD if not case.startswith("Gated")]


@pytest.mark.parametrize("case", FEW)
def test_few_weights_over_units(results, case):
    """The entries of a sparse matrix and the trace of a product stay with their units, and so do their gradients."""
    found = results[case]
    model, rule, _, drive, batch = SPREAD[case]
    assert found["error"] < 1e-5
    assert any(found["traces"])
    units = {"Sparse": 64, "Thin": 256, "LowRank": UNITS}[model]
    activities = batch * (INPUTS + units)
    if drive == "step":  # a factor on the side of the inputs belongs to no unit: its gradient is a sum over devices
        on_all = 5 * (INPUTS + units) if model == "LowRank" else 0
        trace = batch * units * (INPUTS + units) if model == "LowRank" else found["weights"]
        assert max(n for _, n in found["crossings"]) <= max(activities, on_all) < trace
    else:
        assert max(n for _, n in found["crossings"]) <= STEPS * activities


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batch="rows"), "no axis 'rows'.*'batch'"),
        (dict(units={"cell": "rows"}), "no axis 'rows'"),
        (dict(units={"layer": "batch"}), "'layer'.*h"),
        (dict(batch="batch"), "no batch"),
    ],
)
def test_layouts_that_are_refused(options, message):
    learner = braintrace.compile(braintrace.nn.GRUCell(2, 3), "d_rtrl", jnp.zeros(2))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        braintrace.shard(learner, ONE, **options)
    assert learner._layout is None
    for wrong in ((learner.model4compile, ONE), (learner, 8)):
        with pytest.raises(TypeError):
            braintrace.shard(*wrong)


def test_whole_brain_made_small(results):
    found = results["brain"]
    assert found["error"] < 1e-5
    assert found["trained"] > 0.1
    assert found["largest"] <= found["spikes of all steps"] < found["synapses"]


def test_bytes_in_loops_are_counted(results):
    assert results["bytes"] == {"all-reduce": 5 * 16 * 4}


def test_sparse_entries_in_another_order_are_refused(results):
    assert re.search(r"layer.*4 devices along 'units'.*columns_in_parts\(sparse_mat, 4\)", results["refused"])


@pytest.mark.skipif(not hasattr(jax.sharding, "AxisType"), reason="this JAX knows no explicit axes")
def test_explicit_axes_are_refused():
    learner = braintrace.compile(braintrace.nn.GRUCell(2, 3), "d_rtrl", jnp.zeros(2))
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ValueError, match="Explicit.*Mesh"):
        braintrace.shard(learner, mesh, batch="batch")


def test_a_layout_before_compiling_and_after_a_reset():
    cell = braintrace.nn.GRUCell(2, 3)
    brainstate.nn.init_all_states(cell, batch_size=4)
    learner = braintrace.D_RTRL(cell)
    braintrace.shard(learner, ONE, batch="batch")
    learner.compile_graph(jnp.zeros((4, 2)))
    for _ in range(2):
        specs = [x.sharding.spec for s in learner.states(braintrace.EligibilityTrace).values() for x in leaves(s.value)]
        assert specs and all(spec[0] == "batch" for spec in specs)
        learner.reset_state()


def test_crossings_are_seen():
    program = "  %a = f32[20,1,16,24]{3,1,0,2} all-gather(%b), x\n  %c = (f32[3]{0}, f32[]) all-reduce-start(%d)"
    assert crossings(program) == [("all-gather", 7680), ("all-reduce", 3)]


def test_a_mapped_uoro_does_not_spread_a_convolution():
    """XLA gives another gradient of the kernel of every sample there."""

    class Net(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = braintrace.nn.Conv1d((6, 2), 3, 3)

        def init_state(self, batch_size=None, **_):
            self.h = brainstate.HiddenState(jnp.zeros((6, 3) if batch_size is None else (batch_size, 6, 3)))

        def update(self, x):
            self.h.value = jnp.tanh(0.5 * self.h.value + self.convolution(x))
            return self.h.value

    x = jnp.ones((4, 6, 2))
    for rule, vmap in (("uoro", True), ("uoro", False), ("d_rtrl", True)):
        learner = braintrace.compile(Net(), rule, x, batch_size=4, vmap=vmap)
        if (rule, vmap) == ("uoro", True):
            with pytest.raises(NotImplementedError, match="'convolution.weight'.*without vmap"):
                braintrace.shard(learner, ONE, batch="batch")
            assert learner.module._layout is None
        else:
            braintrace.shard(learner, ONE, batch="batch")


if __name__ == "__main__":
    child()
