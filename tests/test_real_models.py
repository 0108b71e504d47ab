"""Layers of brainpy.state as users build them: neurons, synapses and projections, in physical units.

The oracle is reverse mode through the plain model, which runs without a learner.
"""

import brainevent

import brainstate
import braintools
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainpy import state as bp
from brainstate import HiddenState, ParamState
from helpers import assert_close

import braintrace

pytestmark = [pytest.mark.usefixtures("time_step"), pytest.mark.filterwarnings("ignore:.*relation_")]

N_IN, N, N_OUT, BATCH, T, WARM = 4, 3, 2, 2, 7, 4
SURROGATE = braintools.surrogate.InvSquareGrad(2.0)


def weights(scale, unit, mean=0.0):
    """An initialiser that draws the same values in every test."""

    def draw(shape):
        return jnp.asarray(mean + scale * np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32) * unit

    return draw


def dense(n_in, scale, unit, mean=0.0, bias=True):
    return braintrace.nn.Linear(n_in, N, weights(scale, unit, mean), weights(0.1 * scale, unit) if bias else None)


def sparse(n_in, scale, unit, mean=0.0):
    pattern = (np.arange(n_in * N).reshape(n_in, N) % 3 > 0).astype(np.float32)
    matrix = brainevent.CSR.fromdense(jnp.asarray(pattern))
    return braintrace.nn.SparseLinear(matrix.with_data(weights(scale, unit, mean)(matrix.data.shape)))


class Into(brainstate.nn.Module):
    """Weights, then synapses held as attributes, then the argument of the neurons."""

    def __init__(self, neurons, comm, *synapses):
        super().__init__()
        self.neurons, self.comm, self.synapses = neurons, comm, list(synapses)

    def update(self, x):
        x = self.comm(x)
        for synapse in self.synapses:
            x = synapse(x)
        self.neurons(x)


class Projected(brainstate.nn.Module):
    """Modules of the inputs, a projection, projections of the own spikes, then the neurons."""

    def __init__(self, neurons, projection, *before, recurrent=()):
        super().__init__()
        self.neurons, self.projection, self.before = neurons, projection, list(before)
        self.recurrent = list(recurrent)

    def update(self, x):
        for module in self.before:
            x = module(x)
        self.projection(x)
        for projection in self.recurrent:
            projection(self.neurons.get_spike())
        self.neurons()


class Net(brainstate.nn.Module):
    """`layer`, which owns `neurons`, and a readout of their spikes. The step's number is an argument, as in scripts."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.readout = braintrace.nn.Linear(N, N_OUT, weights(1.0, u.UNITLESS), weights(1.0, u.UNITLESS))

    def update(self, i, x):
        with brainstate.environ.context(i=i, t=i * brainstate.environ.get_dt()):
            self.layer(x)
            return self.readout(self.layer.neurons.get_spike())


# -- neurons, driven by a current through a dense map. `drive` is the size of the current that makes them fire.

NEURONS = {  # name: (options, mean current)
    "IF": (dict(), 3.0),
    "LIF": (dict(), 3.0),
    "LIF hard": (dict(spk_reset="hard"), 3.0),
    "LIFRef": (dict(tau_ref=2.5 * u.ms), 4.0),
    "LIFRef hard": (dict(tau_ref=2.5 * u.ms, spk_reset="hard"), 4.0),
    "ALIF": (dict(tau_a=10 * u.ms), 4.0),
    "ExpIF": (dict(V_th=-55 * u.mV), 30.0),
    "ExpIFRef": (dict(V_th=-55 * u.mV, tau_ref=2.5 * u.ms), 30.0),
    "AdExIF": (dict(), 30.0),
    "AdExIFRef": (dict(tau_ref=2.5 * u.ms), 30.0),
    "QuaIF": (dict(V_th=-45 * u.mV), 70.0),
    "AdQuaIF": (dict(V_th=-45 * u.mV), 70.0),
    "AdQuaIFRef": (dict(V_th=-45 * u.mV, tau_ref=2.5 * u.ms), 70.0),
    "Gif": (dict(a=0.05 / u.ms, A1=0.2 * u.mA, A2=-0.1 * u.mA, R1=0.5), 6.0),
    "GifRef": (dict(a=0.05 / u.ms, A1=0.2 * u.mA, A2=-0.1 * u.mA, R1=0.5, tau_ref=2.5 * u.ms), 6.0),
    "Izhikevich": (dict(), 15.0),
    "IzhikevichRef": (dict(tau_ref=2.5 * u.ms), 15.0),
}


def neurons_of(name="LIF", **options):
    return getattr(bp, name.split()[0])(N, spk_fun=SURROGATE, **{**NEURONS[name][0], **options})


def driven(name, make=dense):
    unit = u.mV / u.ms if name.startswith("Izh") else u.mA
    mean = NEURONS[name][1]
    return Into(neurons_of(name), make(N_IN, 0.5 * mean, unit, mean))


# -- synapses and projections onto LIF neurons


def zero(unit):
    return braintools.init.Constant(0.0 * unit)


def with_synapse(kind, unit=u.mA, mean=3.0, **options):
    return Into(neurons_of(), dense(N_IN, 2.0, unit, mean), kind(N, g_initializer=zero(unit), **options))


def align_post(syn, out, make=dense, scale=3.0, neurons="LIF", before=(), **options):
    neu = neurons_of(neurons, **options)
    return Projected(neu, bp.AlignPostProj(comm=make(N_IN, scale, u.mS, scale), syn=syn, out=out, post=neu), *before)


def delta(make=dense):
    neu = neurons_of()
    return Projected(neu, bp.DeltaProj(comm=make(N_IN, 1.0, u.mV, 1.0), post=neu))


def align_pre(stp=None):
    """The synapse is on the side of the inputs, in front of the weights."""
    neu = neurons_of()
    parts = dict(syn=bp.Expon(N_IN, g_initializer=zero(u.mS)), comm=dense(N_IN, 2.0, u.UNITLESS, 2.0, bias=False))
    return Projected(neu, bp.align_pre_projection(**parts, out=bp.CUBA(), post=neu, stp=stp))


def current(*before):
    neu = neurons_of()
    comm = dense(N_IN, 2.0, u.mS, 4.0)
    return Projected(neu, bp.CurrentProj(comm=comm, out=bp.COBA(E=2.0 * u.mV), post=neu), *before)


LAYERS = {name: lambda name=name: driven(name) for name in NEURONS} | {
    "sparse LIF": lambda: driven("LIF", sparse),
    "sparse Gif": lambda: driven("Gif", sparse),
    "Expon": lambda: with_synapse(bp.Expon, tau=4 * u.ms),
    "Alpha": lambda: with_synapse(bp.Alpha, tau=4 * u.ms, mean=6.0),
    "DualExpon": lambda: with_synapse(bp.DualExpon, tau_decay=5 * u.ms, tau_rise=2 * u.ms),
    "Expon CUBA": lambda: align_post(bp.Expon(N, tau=4 * u.ms), bp.CUBA()),
    "Expon CUBA sparse": lambda: align_post(bp.Expon(N, tau=4 * u.ms), bp.CUBA(), sparse),
    "Expon CUBA merged": lambda: align_post(bp.Expon.desc(N, tau=4 * u.ms), bp.CUBA.desc()),
    "Expon COBA": lambda: align_post(bp.Expon(N, tau=4 * u.ms), bp.COBA(E=5 * u.mV)),
    "Alpha COBA sparse": lambda: align_post(bp.Alpha(N, tau=4 * u.ms), bp.COBA(E=5 * u.mV), sparse),
    "Alpha ALIF": lambda: align_post(bp.Alpha(N, tau=4 * u.ms), bp.CUBA(), neurons="ALIF", scale=6.0),
    "DualExpon COBA merged": lambda: align_post(bp.DualExpon.desc(N, tau_rise=2 * u.ms), bp.COBA.desc(E=5 * u.mV)),
    "Expon AdQuaIF": lambda: align_post(bp.Expon(N, tau=4 * u.ms), bp.CUBA(), neurons="AdQuaIF", scale=20.0),
    "DualExpon GifRef": lambda: align_post(bp.DualExpon(N, tau_rise=2 * u.ms), bp.CUBA(), neurons="GifRef"),
    "DeltaProj": delta,
    "DeltaProj sparse": lambda: delta(sparse),
    "CurrentProj": current,
    "STP CurrentProj": lambda: current(bp.STP(N_IN, tau_f=20 * u.ms, tau_d=10 * u.ms)),
    "STD CurrentProj": lambda: current(bp.STD(N_IN, tau=10 * u.ms, U=0.3)),
    "STP Expon CUBA": lambda: align_post(bp.Expon(N), bp.CUBA(), before=[bp.STP(N_IN, U=0.5)], scale=6.0),
    "align-pre": align_pre,
}


# -- the checks


def squares(net, call, i, x, target):
    return ((call(i, x) - target) ** 2).sum()


def sequence(steps, seed=5):
    rng = np.random.default_rng(seed)
    xs = (rng.random((steps, BATCH, N_IN)) < 0.5).astype(np.float32)
    targets = rng.standard_normal((steps, BATCH, N_OUT)).astype(np.float32)
    return jnp.arange(steps), jnp.asarray(xs), jnp.asarray(targets)


class Start:
    """A network in the middle of its life: the values that `WARM` steps left, to which `restore` returns."""

    def __init__(self, make):
        self.net = Net(make())
        brainstate.nn.init_all_states(self.net, batch_size=BATCH)
        i, x, target = sequence(WARM + T)
        brainstate.transform.for_loop(self.net, i[:WARM], x[:WARM])
        self.values = {path: state.value for path, state in self.net.states().items()}
        self.items = (i[WARM:], x[WARM:], target[WARM:])

    def restore(self):
        for path, state in self.net.states().items():
            state.value = self.values[path]

    def backpropagated(self):
        """The gradients of the first step's loss and of the sum of all steps' losses, by reverse mode."""
        params = self.net.states(ParamState)

        @brainstate.transform.jit
        def gradient(counted):
            self.restore()
            total = lambda: (self.losses() * counted).sum()  # noqa: E731
            return brainstate.transform.grad(total, params)()

        found = [dict(gradient(counted)) for counted in (jnp.arange(T) == 0, jnp.ones(T))]
        self.restore()
        return found

    def losses(self):
        return brainstate.transform.for_loop(lambda *item: squares(self.net, self.net, *item), *self.items)

    def learned(self, rule, **options):
        """The gradients of every step, one by one, and their sum from the driver."""
        learner = rule(self.net, **options)
        self.restore()
        learner.compile_graph(*(item[0] for item in self.items[:2]))
        loss = lambda *item: squares(self.net, learner, *item)  # noqa: E731
        step = brainstate.transform.grad(loss, learner.param_states)
        steps = dict(brainstate.transform.for_loop(step, *self.items))
        learner.reset_state()
        self.restore()
        chunked = learner.etrace_grad(*self.items, step_fn=loss, reduction="sum", trace_chunk=3)
        self.restore()
        return steps, dict(chunked)


RULES = {"pp_prop": dict(rule=braintrace.pp_prop, decay_or_rank=0.9), "D_RTRL": dict(rule=braintrace.D_RTRL)}


def check(start, exact):
    """`exact`: whether credit flows through no weight, so that D_RTRL is back-propagation through time."""
    first, whole = start.backpropagated()
    for name, options in RULES.items():
        steps, chunked = start.learned(**options)
        assert_close(jax.tree.map(lambda g: g[0], steps), first, 2e-5, f"{name}, first step")
        summed = jax.tree.map(lambda g: g.sum(0), steps)
        assert_close(chunked, summed, 2e-5, f"{name}, chunks of three steps")
        if exact and name == "D_RTRL":
            assert_close(summed, whole, 2e-5, "all steps")
    for path, value in whole.items():
        for leaf in jax.tree.leaves(value):
            assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-4, path


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_without_recurrent_weights(layer):
    check(Start(LAYERS[layer]), exact=True)
