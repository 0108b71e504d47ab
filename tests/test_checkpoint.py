"""A saved run goes on as if nothing had happened, in another process too, and what does not fit is refused."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import brainstate
import braintools
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from brainstate import HiddenState, ParamState, ShortTermState

import braintrace
from braintrace import load, load_state_dict, save, state_dict

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

N_IN, N, BATCH = 2, 3, 2

# -- models -----------------------------------------------------------------------------------------------------------


class Noisy(brainstate.nn.Module):
    """Dropout, noise of the default and of an own generator, a ring buffer, and a filter beside the hidden state."""

    def __init__(self, batch=None, dtype=jnp.float32, unit=1.0):
        super().__init__()
        self.lead, self.dtype, self.unit = () if batch is None else (batch,), dtype, unit
        self.w = ParamState(jnp.asarray(0.3 * brainstate.random.randn(N_IN + N, N), dtype) * unit)
        self.readout = braintrace.nn.Linear(N, 2)
        if dtype != jnp.float32:
            self.readout.weight.value = jax.tree.map(lambda x: x.astype(dtype), self.readout.weight.value)
        self.dropout = brainstate.nn.Dropout(0.6)
        self.rng = brainstate.random.RandomState(brainstate.random.randint(0, 1000))

    def init_state(self, *_, **__):
        self.h = HiddenState(jnp.zeros((*self.lead, N), self.dtype) * self.unit)
        self.buffer = ShortTermState(jnp.zeros((3, *self.lead, N), self.dtype))
        self.at = ShortTermState(jnp.zeros((), jnp.int32))
        self.filter = braintrace.KappaFilter(jnp.zeros((*self.lead, 2)), 0.5)

    def update(self, x):
        h = u.get_mantissa(self.h.value)
        old = self.buffer.value[self.at.value]
        self.buffer.value = self.buffer.value.at[self.at.value].set(jax.lax.stop_gradient(h))
        self.at.value = (self.at.value + 1) % 3
        x = x.astype(self.dtype) + 0.1 * self.rng.randn(*x.shape).astype(self.dtype)
        y = braintrace.matmul(jnp.concatenate([x, h], -1), self.w.value)
        noise = (0.1 * brainstate.random.randn(*h.shape)).astype(self.dtype)
        self.h.value = (jnp.tanh(u.get_mantissa(y) + 0.5 * old) + noise) * self.unit
        with brainstate.environ.context(fit=True):
            out = self.readout(self.dropout(u.get_mantissa(self.h.value)))
        return out + self.filter.update(jax.lax.stop_gradient(out)).astype(out.dtype)


class Mapped(Noisy):
    """Without own generators: a mapped step draws from the default one alone."""

    def __init__(self):
        super().__init__()
        del self.rng, self.dropout

    def update(self, x):
        y = braintrace.matmul(jnp.concatenate([x, self.h.value], -1), self.w.value)
        self.h.value = jnp.tanh(y) + 0.1 * brainstate.random.randn(N)
        return self.filter.update(self.readout(self.h.value))


RULES = {
    "pp_prop": dict(decay_or_rank=0.9),
    "d_rtrl": {},
    "eprop": dict(kappa_filter_decay=0.5, feedback="random", random_feedback_key=3),
    "ostl_recurrent": {},
    "ostl_feedforward": dict(decay_or_rank=0.3),
    "uoro": {},
    "three_factor": dict(modulator=jnp.full((), 0.7)),
    "dni": {},
    "hybrid": dict(decay_or_rank={"w": 0.9, (): 0.8}),
    "snap": dict(n=2),
    "leaky": dict(decay=0.8),
}
VARIANTS = {
    "noisy": lambda: Noisy(),
    "batched": lambda: Noisy(batch=BATCH),
    "mapped": Mapped,
    "half": lambda: Noisy(dtype=jnp.bfloat16),
    "units": lambda: Noisy(unit=u.mV),
}
THOROUGH = ("pp_prop", "d_rtrl", "uoro")  # of the others, those variants that differ from rule to rule
CASES = [(rule, v) for rule in RULES for v in (VARIANTS if rule in THOROUGH else ("noisy", "mapped"))]
XS = np.random.default_rng(0).normal(size=(6, BATCH, N_IN)).astype(np.float32)


def make(rule, variant, seed=0):
    """A learner, its optimiser and the inputs of a sequence."""
    algorithms = {
        "snap": braintrace.SnAp,
        "leaky": braintrace.ETraceConfig(temporal_recursion="scalar_leak", decay=0.8),
    }
    options = {} if rule == "leaky" else RULES[rule]
    brainstate.random.seed(seed)
    model = VARIANTS[variant]()
    xs = jnp.asarray(XS if variant in ("batched", "mapped") else XS[:, 0])
    how = dict(batch_size=BATCH, vmap=True) if variant == "mapped" else {}
    learner = braintrace.compile(model, algorithms.get(rule, rule), xs[0], **how, **options)
    one = getattr(learner, "module", learner)
    if rule == "dni":
        one.attach_synthesizer(braintrace.SyntheticGradient(one.group_signal_shapes(), scale=0.3, seed=seed))
    optimizer = braintools.optim.Adam(lr=braintools.optim.StepLR(base_lr=0.1, step_size=2))
    optimizer.register_trainable_weights(one.param_states)
    return learner, optimizer, xs


class Run:
    """Training by single steps and by sequences."""

    def __init__(self, rule, variant, seed=0):
        self.learner, self.optimizer, self.xs = make(rule, variant, seed)
        one = getattr(self.learner, "module", self.learner)
        self.gradient = brainstate.transform.jit(brainstate.transform.grad(self.loss, one.param_states))
        self.whole = brainstate.transform.jit(lambda xs: self.learner.etrace_grad(xs, step_fn=self.loss))
        self.seen = []

    def loss(self, x):
        return (self.learner(x).astype(jnp.float32) ** 2).mean()

    def steps(self):
        for x in self.xs[:2]:
            self.apply(self.gradient(x))

    def sequence(self):
        self.apply(self.whole(self.xs))

    def apply(self, grads):
        self.seen += jax.tree.leaves(grads)
        self.optimizer.update(grads)
        self.optimizer.lr.step()

    def results(self):
        """All gradients since the start, and everything that there is at the end, as bits."""
        end = state_dict(self.learner, self.optimizer)
        named = {f"gradient {i}": g for i, g in enumerate(self.seen)} | end
        return {k: np.frombuffer(np.asarray(v).tobytes(), np.uint8) for k, v in named.items()}

    def rest(self, moment):
        """What comes after a checkpoint."""
        self.seen = []
        if moment == "in a loop":
            self.steps()
        self.sequence()
        return self.results()


MOMENTS = ("in a loop", "between sequences")


def first_process(folder, rule, variant):
    """Save at both moments, and keep what comes after each."""
    run, name = Run(rule, variant), f"{rule} {variant}"
    run.steps()
    run.sequence()
    run.steps()
    for moment in MOMENTS:
        save(folder / f"{name} {moment}.npz", run.learner, run.optimizer)
        if moment == MOMENTS[0]:
            expected = run.rest(moment)
            np.savez(folder / f"expected {name} {moment}.npz", **expected)
    np.savez(folder / f"expected {name} {moment}.npz", **run.rest(moment))


def second_process(folder):
    """Load the second moment first: the learner is used, and its functions are compiled, when the first one comes."""
    for rule, variant in json.loads((folder / "cases.json").read_text()):
        run, name = Run(rule, variant, seed=99), f"{rule} {variant}"
        for moment in reversed(MOMENTS):
            load(folder / f"{name} {moment}.npz", run.learner, run.optimizer)
            np.savez(folder / f"found {name} {moment}.npz", **run.rest(moment))


def python(code, *args, **more_environment):
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    cache = jax.config.jax_compilation_cache_dir
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": jax.default_backend()}
    environment |= {"JAX_COMPILATION_CACHE_DIR": cache} if cache else {}
    return [sys.executable, "-c", code, *map(str, args)], environment | more_environment


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("runs")
    wanted = sorted({i.callspec.params["case"] for i in request.session.items if "two_processes" in i.fixturenames})
    with brainstate.environ.context(dt=1.0 * u.ms):
        for case in wanted:
            first_process(folder, *case)
            jax.clear_caches()
    (folder / "cases.json").write_text(json.dumps(wanted))
    code = "import sys, pathlib, test_checkpoint as t; t.second_process(pathlib.Path(sys.argv[1]))"
    command, environment = python(code, folder)
    subprocess.run(command, env=environment, check=True, timeout=1800)
    return folder


QUICK = [("pp_prop", "noisy"), ("d_rtrl", "units"), ("uoro", "half"), ("dni", "noisy"), ("eprop", "mapped")]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES], ids=lambda c: " ".join(c)
)
def test_another_process_goes_on_bit_by_bit(two_processes, case, moment):
    rule, variant = case
    found, expected = (
        np.load(two_processes / f"{what} {rule} {variant} {moment}.npz") for what in ("found", "expected")
    )
    assert sorted(found) == sorted(expected) and sum(k.startswith("gradient") for k in found) >= 2
    different = [k for k in expected if not np.array_equal(found[k], expected[k])]
    assert not different


# -- what is saved ----------------------------------------------------------------------------------------------------


def learner_of(n=N, rule="pp_prop", model=None, **options):
    options = options or (dict(decay_or_rank=0.9) if rule == "pp_prop" else {})
    return braintrace.compile(model or braintrace.nn.ValinaRNNCell(N_IN, n), rule, jnp.zeros(N_IN), **options)


def bits(tree):
    def one(x):
        x = jax.random.key_data(x) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return np.asarray(x).tobytes(), np.shape(x), str(np.asarray(x).dtype)

    return {jax.tree_util.keystr(path): one(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def values(learner, optimizer=None):
    arrays = state_dict(learner, optimizer)
    return bits({k: v for k, v in arrays.items() if k != "description"})


def test_a_file_is_read_with_numpy_alone(tmp_path):
    model = Noisy(dtype=jnp.bfloat16, unit=u.mV)
    learner = learner_of(model=model)
    learner(jnp.ones(N_IN))
    optimizer = braintools.optim.Momentum(lr=0.1)
    optimizer.register_trainable_weights(learner.param_states)
    save(tmp_path / "run.npz", learner, optimizer, step=7)
    code = f"""
import json, sys
sys.path[:] = {sys.path!r}
import numpy
f = numpy.load({str(tmp_path / "run.npz")!r}, allow_pickle=False)
d = json.loads(f["description.json"])
complete = sorted(d["arrays"]) == sorted(set(f.files) - {{"description.json"}})
assert "jax" not in sys.modules
print(json.dumps([complete, f["model/w"].tolist(), int(f["more/step"]), d]))
"""
    out = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    complete, w, step, description = json.loads(out)
    rule, names, versions = (description[k] for k in ("learner", "arrays", "written_with"))
    assert complete and step == 7 and rule["rule"] == "pp_prop" and rule["options"]["decay"] == [0.9, 0.9]
    np.testing.assert_array_equal(np.array(w, np.uint16).view(jnp.bfloat16), model.w.value.mantissa)
    dimensions = {"m": 2, "kg": 1, "s": -3, "A": -1}
    unit = {"name": "mV", "dimensions": dimensions, "scale": -3.0, "base": 10.0, "factor": 1.0}
    assert names["model/w"] == {"kind": "jax", "shape": [5, 3], "dtype": "bfloat16", "unit": unit}
    assert versions["jax"] == jax.__version__
    assert {
        "random/default", "model/h", "model/buffer", "model/rng", "model/filter", "learner/running_index",
        "optimizer/step_count", "optimizer/_lr_scheduler/last_epoch", "optimizer/opt_state/0/trace/w",
    } <= set(names)  # fmt: skip
    assert sum(n.startswith("learner/etrace") for n in names) == 2


def test_nothing_is_pickled(tmp_path):
    save(
        tmp_path / "run.npz",
        learner_of(),
        text="hello",
        numbers={"a": [1, 2.5, None, True, 1j], "b": {3: np.float32(2)}},
    )
    with zipfile.ZipFile(tmp_path / "run.npz") as archive:
        for name in archive.namelist():
            if name.endswith(".npy"):
                with archive.open(name) as entry:
                    assert np.lib.format.read_array(entry, allow_pickle=False).dtype != object
        assert archive.testzip() is None


class Pair(tuple):
    pass


def test_what_is_given_by_name_comes_back(tmp_path):
    more = {
        "step": 7,
        "score": float("nan"),
        "big": 2**40,
        "name": "späte Läufe",
        "empty": {},
        "nothing": None,
        "tree": {"a": [1, 2.5, None, True, 1j], "b/c": (np.float64(2), np.arange(3.0))},
        "unit": {"v": jnp.ones(2) * u.mV, "rate": 3.0 / u.second, "mixed": jnp.ones(3, jnp.bfloat16) * (u.mV / u.ms)},
        "keys": [jax.random.key(3), jax.random.split(jax.random.key(1, impl="rbg"), 2)],
        "narrow": [jnp.arange(3, dtype=jnp.float8_e4m3fn), jnp.arange(3, dtype=jnp.int8), np.array(["a", "bc"])],
        "complex": jnp.array([1 + 2j]),
        "wide": np.arange(3, dtype=np.float64),
        "scalars": {"weak": jnp.asarray(0.5), "strong": jnp.float32(0.5)},
    }
    save(tmp_path / "run", learner_of(), **more)
    found = load(tmp_path / "run", learner_of())
    assert list(found) == list(more)
    assert jax.tree.structure(found) == jax.tree.structure(more)
    for old, new in zip(jax.tree.leaves(more), jax.tree.leaves(found), strict=True):
        assert type(old) is type(new) or isinstance(old, np.generic) and isinstance(new, np.ndarray)
        assert getattr(old, "weak_type", None) == getattr(new, "weak_type", None)
        assert getattr(old, "dtype", None) == getattr(new, "dtype", None)
    assert bits(found) == bits(more)


def test_pytrees_of_other_kinds_take_the_structure_of_what_is_given(tmp_path):
    learner = learner_of()
    weights = {p: s.value for p, s in learner.param_states.items()}
    tx = optax.chain(optax.clip(1.0), optax.adam(0.1))
    state = tx.update(jax.tree.map(jnp.ones_like, weights), tx.init(weights), weights)[1]
    save(tmp_path / "run.npz", learner, opt_state=state)
    found = load(tmp_path / "run.npz", learner, opt_state=tx.init(weights))["opt_state"]
    assert jax.tree.structure(found) == jax.tree.structure(state) and bits(found) == bits(state)
    plain = load(tmp_path / "run.npz", learner)["opt_state"]
    np.testing.assert_array_equal(plain[1][0]["count"], 1)
    with pytest.raises(ValueError, match=r"more/opt_state/1/0/count: was saved, and is not here"):
        load(tmp_path / "run.npz", learner, opt_state=optax.sgd(0.1, momentum=0.9).init(weights))


def test_objects_that_hold_states_are_given_their_values(tmp_path):
    smooth = braintrace.GradExpon({"w": jnp.zeros(2)}, 0.5)
    smooth.update({"w": jnp.ones(2)})
    save(tmp_path / "run.npz", learner_of(), smooth=smooth, extra={"s": ShortTermState(jnp.ones(3))}, step=1)
    other, extra = braintrace.GradExpon({"w": jnp.zeros(2)}, 0.5), {"s": ShortTermState(jnp.zeros(3))}
    assert load(tmp_path / "run.npz", learner_of(), smooth=other, extra=extra) == {"step": 1}
    assert bits(other.gradients.value) == bits(smooth.gradients.value) and (extra["s"].value == 1).all()
    with pytest.raises(ValueError, match="more/smooth/gradients/w: was saved, and is not here"):
        load(tmp_path / "run.npz", learner_of(), extra=extra)


def test_dictionaries_are_what_files_are(tmp_path):
    first, second = Run("d_rtrl", "noisy"), Run("d_rtrl", "noisy", seed=1)
    first.steps()
    arrays = state_dict(first.learner, first.optimizer, step=3)
    assert all(isinstance(v, (jax.Array, np.ndarray)) and "/" in k for k, v in arrays.items() if k != "description")
    assert load_state_dict(second.learner, arrays, second.optimizer) == {"step": 3}
    assert values(second.learner, second.optimizer) == values(first.learner, first.optimizer)
    arrays = {k: np.array(v) for k, v in arrays.items()}
    load_state_dict(second.learner, arrays, second.optimizer)
    before = values(second.learner)
    for array in arrays.values():
        array[...] = 0
    assert values(second.learner) == before


def test_states_stay_the_same_objects_and_jitted_functions_see_the_values():
    learner = learner_of()
    step = brainstate.transform.jit(learner)
    arrays, objects = state_dict(learner), {k: id(s) for k, s in learner.states().items()}
    first = step(jnp.ones(N_IN))
    assert not np.array_equal(step(jnp.ones(N_IN)), first)
    load_state_dict(learner, arrays)
    np.testing.assert_array_equal(step(jnp.ones(N_IN)), first)
    assert {k: id(s) for k, s in learner.states().items()} == objects


def test_a_generator_of_nobody_is_saved():
    rng = brainstate.random.RandomState(5)

    class Model(braintrace.nn.ValinaRNNCell):
        def update(self, x):
            return super().update(x + rng.randn(N_IN))

    learner = learner_of(model=Model(N_IN, N))
    arrays = state_dict(learner)
    first = learner(jnp.ones(N_IN))
    load_state_dict(learner, arrays)
    np.testing.assert_array_equal(learner(jnp.ones(N_IN)), first)


@pytest.mark.parametrize("make_mapped", ["compile", "Vmap", "Map"])
def test_mapped_learners(make_mapped):
    def mapped():
        x = jnp.ones((BATCH, N_IN))
        if make_mapped == "Map":
            model = brainstate.nn.Map(braintrace.nn.GRUCell(N_IN, N), init_map_size=BATCH)
            model.init_all_states()
            learner = braintrace.D_RTRL(model)
            learner.compile_graph(x)
            return learner
        learner = braintrace.compile(braintrace.nn.GRUCell(N_IN, N), "d_rtrl", x, batch_size=BATCH, vmap=True)
        return learner if make_mapped == "compile" else brainstate.nn.Vmap(learner.module, vmap_states="new")

    first, second, xs = mapped(), mapped(), jnp.asarray(XS)
    first(xs[0])
    load_state_dict(second, state_dict(first))
    assert values(second) == values(first)
    np.testing.assert_array_equal(second(xs[1]), first(xs[1]))


def test_spiking_networks_with_units():
    import models

    def spiking():
        with brainstate.environ.context(dt=1.0 * u.ms):
            return learner_of(model=models.Net(models.Spiking(N_IN, N, neuron="ALIF", out="COBA")))

    first, second = spiking(), spiking()
    with brainstate.environ.context(dt=1.0 * u.ms):
        first(jnp.ones(N_IN))
        load_state_dict(second, state_dict(first))
        assert values(second) == values(first)
        assert bits(second(jnp.ones(N_IN))) == bits(first(jnp.ones(N_IN)))
    names = [k for k in state_dict(first) if k.startswith("model/")]
    assert not any("0x" in k or "<class" in k for k in names)


def test_the_modulator_is_as_it_was():
    first, second = learner_of(rule="three_factor"), learner_of(rule="three_factor")
    first.modulator = jnp.arange(3.0)
    load_state_dict(second, state_dict(first))
    np.testing.assert_array_equal(second.modulator, first.modulator)
    with pytest.raises(ValueError, match="learner/modulator: is here, and was not saved"):
        load_state_dict(second, state_dict(learner_of(rule="three_factor")))


def test_units_are_converted_and_weak_types_kept():
    def holding(value):
        learner = learner_of()
        learner.model4compile.extra = ShortTermState(value)
        return learner

    arrays = state_dict(holding(jnp.array([1.5, 2.0]) * u.mV))
    other = holding(jnp.zeros(2) * u.volt)
    load_state_dict(other, arrays)
    extra = other.model4compile.extra
    assert extra.value.unit == u.volt and extra.value.dtype == jnp.float32
    np.testing.assert_allclose(extra.value.mantissa, [1.5e-3, 2e-3], rtol=1e-6)
    for value in (jnp.asarray(0.5), jnp.float32(0.5), 0.5, np.arange(2.0), jnp.arange(3) * 1.0):
        other = holding(jax.tree.map(jnp.zeros_like, value))
        load_state_dict(other, state_dict(holding(value)))
        new = other.model4compile.extra.value
        assert type(new) is type(value) and bits(new) == bits(value)
        assert getattr(new, "weak_type", None) == getattr(value, "weak_type", None)


# -- what is refused --------------------------------------------------------------------------------------------------


def with_extra(value):
    learner = learner_of()
    if value is not None:
        learner.model4compile.extra = ShortTermState(value)
    return learner


REFUSALS = {
    "shape": (lambda: learner_of(4), r"model/W/weight/weight: the shape \(5, 3\) was saved, here it is \(6, 4\)"),
    "traces": (lambda: learner_of(4), r"learner/etrace_dfs/W.*: the shape \(3, 1\) was saved, here it is \(4, 1\)"),
    "missing": (lambda: with_extra(jnp.zeros(2)), "model/extra: is here, and was not saved"),
    "rule": (lambda: learner_of(rule="d_rtrl"), "the rule pp_prop was saved, here it is D_RTRL"),
    "decay": (lambda: learner_of(decay_or_rank=0.8), r"option decay was \[0.9, 0.9\] .*, here it is \[0.8, 0.8\]"),
    "decays": (lambda: learner_of(decay_or_rank={(): 0.9, "W": 0.5}), r"option decays was .*0.9, 0.9.*0.5, 0.5"),
    "vjp": (lambda: learner_of(decay_or_rank=0.9, vjp_method="multi-step"), "option vjp_method was 'single-step'"),
    "policy": (
        lambda: learner_of(decay_or_rank=0.9, control_flow=braintrace.ControlFlowPolicy(scan_unroll_limit=3)),
        r"option control_flow.scan_unroll_limit was \d+ when it was saved, here it is 3",
    ),
}  # fmt: skip
EXTRAS = {
    "unexpected": (jnp.zeros(2), None, "model/extra: was saved, and is not here"),
    "dtype": (jnp.zeros(2), jnp.zeros(2, jnp.bfloat16), "extra: the dtype float32 was saved, here it is bfloat16"),
    "unit": (jnp.zeros(2) * u.mV, jnp.zeros(2) * u.mA, "extra: the unit mV was saved, here it is mA"),
    "no unit": (jnp.zeros(2) * u.mV, jnp.zeros(2), "extra: the unit mV was saved, here it is none"),
    "key": (
        jax.random.key(1),
        jax.random.key(1, impl="rbg"),
        "extra: the dtype key<threefry2x32> was saved, here",
    ),
    "tree": ({"a": 1}, {"b": 1}, "model/extra/a: was saved, and is not here"),
}


def assert_refused(learner, match, load_it, optimizer=None):
    before = values(learner, optimizer)
    with pytest.raises(ValueError, match=match) as error:
        load_it()
    assert values(learner, optimizer) == before
    return str(error.value)


@pytest.mark.parametrize("name", REFUSALS)
def test_another_learner_is_refused_as_a_whole(tmp_path, name):
    make_other, match = REFUSALS[name]
    first, other = learner_of(), make_other()
    save(tmp_path / "run.npz", first)
    text = assert_refused(other, match, lambda: load(tmp_path / "run.npz", other))
    assert "run.npz" in text and "nothing was loaded" in text
    assert_refused(other, match, lambda: load_state_dict(other, state_dict(first)))


@pytest.mark.parametrize("name", EXTRAS)
def test_another_state_is_refused_as_a_whole(name):
    old, new, match = EXTRAS[name]
    first, other = with_extra(old), with_extra(new)
    assert_refused(other, match, lambda: load_state_dict(other, state_dict(first)))


@pytest.mark.parametrize("name, pair", [("projection_key", (1, 2)), ("projection_eps", (1e-12, 1e-6))])
def test_other_options_of_a_random_projection_are_refused(name, pair):
    first, other = (learner_of(rule="uoro", **{name: value}) for value in pair)
    assert_refused(other, f"option {name}", lambda: load_state_dict(other, state_dict(first)))


def test_another_feedback_is_refused():
    keys = (1, jax.random.key(2), jax.random.key(1))
    first, second, same = (learner_of(rule="eprop", feedback="random", random_feedback_key=k) for k in keys)
    assert_refused(second, "option random_feedback_key", lambda: load_state_dict(second, state_dict(first)))
    load_state_dict(same, state_dict(first))


def test_an_optimizer_must_be_the_same_and_be_there(tmp_path):
    def with_optimizer(cls):
        learner, optimizer = learner_of(), cls(lr=0.1)
        optimizer.register_trainable_weights(learner.param_states)
        return learner, optimizer

    first, adam = with_optimizer(braintools.optim.Adam)
    save(tmp_path / "run.npz", first, adam)
    second, other = with_optimizer(braintools.optim.Momentum)
    path = tmp_path / "run.npz"
    assert_refused(second, "optimizer/opt_state/0/mu", lambda: load(path, second, other), other)
    assert "optimizer=" in assert_refused(second, "optimizer/step_count: was saved", lambda: load(path, second))
    fresh = braintools.optim.Adam(lr=0.1)
    assert_refused(second, "optimizer/opt_state/0/mu", lambda: load(path, second, fresh), fresh)
    save(path, first)
    assert_refused(second, "optimizer/step_count: is here", lambda: load(path, second, other), other)
    with pytest.raises(TypeError, match="opt_state=.*"):
        save(path, first, optax.adam(0.1).init({}))


def test_a_file_from_another_precision_is_refused(tmp_path):
    with jax.enable_x64(True), brainstate.environ.context(precision=64):
        save(tmp_path / "run.npz", learner_of())
    other, match = learner_of(), "model/h: the dtype float64 was saved, here it is float32"
    assert_refused(other, match, lambda: load(tmp_path / "run.npz", other))


def rewritten(path, change):
    """The file with another description."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    description = json.loads(entries["description.json"])
    change(description)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (entries | {"description.json": json.dumps(description).encode()}).items():
            archive.writestr(name, data)


def spoil(path, place=128):
    """Turn bits of the first array, or of its header."""
    data = bytearray(path.read_bytes())
    data[data.index(b"\x93NUMPY") + place] ^= 255
    path.write_bytes(data)


FILES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "no checkpoint, or not all of one"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "no checkpoint, or not all"),
    "empty": (lambda path: path.write_bytes(b""), "no checkpoint, or not all of one"),
    "text": (lambda path: path.write_text("hello"), "no checkpoint, or not all of one"),
    "spoilt": (spoil, "no checkpoint, or not all of one"),
    "spoilt header": (lambda path: spoil(path, 1), "no checkpoint, or not all of one"),
    "other archive": (lambda path: np.savez(path, a=np.ones(2)), "no checkpoint, or not all of one"),
    "newer": (lambda path: rewritten(path, lambda d: d.update(version=2)), "has format 2, .* reads formats up to 1"),
    "foreign": (lambda path: rewritten(path, lambda d: d.update(format="x")), "is no checkpoint. Pass what"),
    "array gone": (lambda path: rewritten(path, lambda d: d["arrays"].update(a={})), "no checkpoint, or not all"),
    "another shape": (
        lambda path: rewritten(path, lambda d: d["arrays"]["model/h"].update(shape=[4])),
        "model/h: is described, and its array is missing or of another shape",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_checkpoints(tmp_path, name):
    change, match = FILES[name]
    path = tmp_path / "run.npz"
    learner = learner_of()
    save(path, learner)
    change(path)
    assert_refused(learner, match, lambda: load(path, learner))


def test_options_that_are_unknown_here_are_no_hindrance(tmp_path):
    """A later version may know more options, and those of files that were written before are their defaults."""

    def change(description):
        options = description["learner"]["options"]
        del options["sparse_n"]
        options["later"] = 1

    save(tmp_path / "run.npz", learner_of())
    rewritten(tmp_path / "run.npz", change)
    load(tmp_path / "run.npz", learner_of())


def test_wrong_arguments(tmp_path):
    path, learner = tmp_path / "run.npz", learner_of()
    with pytest.raises(TypeError, match="must be a braintrace learner .* got GRUCell"):
        save(path, braintrace.nn.GRUCell(2, 3))
    for use in (lambda x: save(path, x), lambda x: load(path, x), state_dict):
        save(path, learner)
        with pytest.raises(ValueError, match=r"This D_RTRL is not compiled.*compile_graph\(\*example_inputs\)"):
            use(braintrace.D_RTRL(braintrace.nn.GRUCell(2, 3)))
    with pytest.raises(TypeError, match=r"more/what/a is <object .* no array, number \(of 64 bits\) or string"):
        save(path, learner, what={"a": object()})
    with pytest.raises(TypeError, match="mixed holds states beside arrays.*two names"):
        save(path, learner, mixed={"s": ShortTermState(jnp.zeros(2)), "x": jnp.ones(2)})
    with pytest.raises(TypeError, match="more/big"):
        save(path, learner, big=2**70)
    with pytest.raises(ValueError, match="random/default has no value within jit"):
        brainstate.transform.jit(lambda: (brainstate.random.rand(), save(path, learner))[0])()
    with pytest.raises(ValueError, match="The dictionary has no entry 'description'"):
        load_state_dict(learner, {"model/h": jnp.zeros(3)})
    incomplete = {k: v for k, v in state_dict(learner).items() if k != "model/h"}
    assert_refused(learner, "model/h: is described", lambda: load_state_dict(learner, incomplete))
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere", learner)
    load(path, learner)


# -- the file is whole ------------------------------------------------------------------------------------------------


def test_an_error_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path, learner = tmp_path / "run.npz", learner_of()
    save(path, learner, step=1)
    kept, write = path.read_bytes(), np.lib.format.write_array

    def full(file, array, **options):
        if array.shape == (3, 1):
            raise OSError("No space left on device")
        write(file, array, **options)

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(OSError, match="No space"):
        save(path, learner, step=2)
    assert path.read_bytes() == kept and [p.name for p in tmp_path.iterdir()] == ["run.npz"]


def test_links_are_followed_and_modes_are_those_of_new_files(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "latest.npz"
    link.symlink_to(tmp_path / "disk" / "run.npz")
    save(link, learner_of(), step=1)
    (tmp_path / "other").touch()
    assert link.is_symlink() and (tmp_path / "disk" / "run.npz").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert load(str(link), learner_of()) == {"step": 1}


def save_for_ever(path):
    learner = learner_of(n=300)
    for step in range(10**9):
        state = next(iter(learner.hidden_states.values()))
        state.value = jnp.full_like(state.value, step)
        save(path, learner, step=step)
        print(step, flush=True)


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_while_it_saves(tmp_path, times):
    path, learner = tmp_path / "run.npz", learner_of(n=300)
    command, environment = python("import sys, test_checkpoint as t; t.save_for_ever(sys.argv[1])", path)
    rng, interrupted = np.random.default_rng(0), 0
    for _ in range(times):
        before = set(tmp_path.iterdir())
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        seen = [int(child.stdout.readline())]
        time.sleep(rng.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        seen += [int(line) for line in child.stdout.read().split()]
        child.wait()
        found = load(path, learner)["step"]
        assert found in (seen[-1], seen[-1] + 1)
        assert (next(iter(learner.hidden_states.values())).value == found).all()
        interrupted += len(set(tmp_path.iterdir()) - before - {path})
    assert times < 20 or interrupted > 5
