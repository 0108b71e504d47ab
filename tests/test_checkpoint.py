"""A saved run goes on as if nothing had happened, in another process too, and what does not fit is refused."""

import dataclasses
import json
import os
import random
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
import ml_dtypes
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
CASES = [(rule, variant) for rule in RULES for variant in VARIANTS]
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
        self.seen = []

    def loss(self, x):
        return (self.learner(x).astype(jnp.float32) ** 2).mean()

    def steps(self):
        for x in self.xs[:2]:
            self.apply(self.gradient(x))

    def sequence(self):
        self.apply(self.learner.etrace_grad(self.xs, step_fn=self.loss))

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


QUICK = [("pp_prop", "noisy"), ("d_rtrl", "units"), ("uoro", "half"), ("dni", "batched"), ("eprop", "mapped")]


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
