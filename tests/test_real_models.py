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
from brainstate import ParamState
from helpers import assert_close

import braintrace

pytestmark = [pytest.mark.usefixtures("time_step"), pytest.mark.filterwarnings("ignore:.*relation_")]


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    """Every program here runs once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


N_IN, N, N_OUT, BATCH, T, WARM = 4, 3, 2, 2, 6, 4
SURROGATE = braintools.surrogate.InvSquareGrad(2.0)


def weights(scale, unit, mean=0.0):
    """An initialiser that draws the same values in every test."""

    def draw(shape):
        return jnp.asarray(mean + scale * np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32) * unit

    return draw


def dense(n_in, scale, unit, mean=0.0, bias=True):
    return braintrace.nn.Linear(n_in, N, weights(scale, unit, mean), weights(0.1 * scale, unit) if bias else None)


def sparse(n_in, scale, unit, mean=0.0):
    stored = jnp.arange(n_in * N).reshape(n_in, N) % 3 > 0
    return braintrace.nn.SparseLinear(brainevent.CSR.fromdense(weights(scale, unit, mean)((n_in, N)) * stored))


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


# -- neurons, driven by a current that makes them fire

NEURONS = {  # name: (options, mean current)
    "IF": (dict(), 3.0),
    "LIF": (dict(), 3.0),
    "LIF hard": (dict(spk_reset="hard"), 3.0),
    "LIFRef": (dict(tau_ref=2.5 * u.ms), 4.0),
    "ALIF": (dict(tau_a=10 * u.ms), 4.0),
    "ExpIFRef": (dict(V_th=-55 * u.mV, tau_ref=2.5 * u.ms), 30.0),
    "AdExIF": (dict(), 30.0),
    "AdQuaIF": (dict(V_th=-45 * u.mV), 70.0),
    "Gif": (dict(a=0.05 / u.ms, A1=0.2 * u.mA, A2=-0.1 * u.mA, R1=0.5), 6.0),
    "GifRef": (dict(a=0.05 / u.ms, A1=0.2 * u.mA, A2=-0.1 * u.mA, R1=0.5, tau_ref=2.5 * u.ms), 6.0),
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


COBA = dict(E=5.0 * u.mV)  # with a resistance that turns nA into mV


def align_post(syn, out, make=dense, scale=3.0, neurons="LIF", before=()):
    coba = isinstance(out, bp.COBA) or "COBA" in str(out)
    neu = neurons_of(neurons, **(dict(R=500 * u.ohm) if coba else {}))
    return Projected(neu, bp.AlignPostProj(comm=make(N_IN, scale, u.mS, scale), syn=syn, out=out, post=neu), *before)


def delta(make=dense):
    neu = neurons_of()
    return Projected(neu, bp.DeltaProj(comm=make(N_IN, 1.0, u.mV, 1.0), post=neu))


def current(*before):
    neu = neurons_of(R=500 * u.ohm)
    return Projected(neu, bp.CurrentProj(comm=dense(N_IN, 2.0, u.mS, 4.0), out=bp.COBA(**COBA), post=neu), *before)


LAYERS = {name: lambda name=name: driven(name) for name in NEURONS if name not in ("LIF", "Gif")} | {
    "sparse Gif": lambda: driven("Gif", sparse),
    "Expon": lambda: with_synapse(bp.Expon, tau=4 * u.ms),
    "DualExpon": lambda: with_synapse(bp.DualExpon, tau_decay=5 * u.ms, tau_rise=2 * u.ms),
    "Expon CUBA merged": lambda: align_post(bp.Expon.desc(N, tau=4 * u.ms), bp.CUBA.desc()),
    "Expon COBA": lambda: align_post(bp.Expon(N, tau=4 * u.ms), bp.COBA(**COBA)),
    "Alpha COBA sparse": lambda: align_post(bp.Alpha(N, tau=4 * u.ms), bp.COBA(**COBA), sparse),
    "Alpha ALIF": lambda: align_post(bp.Alpha(N, tau=4 * u.ms), bp.CUBA(), neurons="ALIF", scale=6.0),
    "DualExpon COBA merged": lambda: align_post(bp.DualExpon.desc(N, tau_rise=2 * u.ms), bp.COBA.desc(**COBA)),
    "DualExpon GifRef": lambda: align_post(bp.DualExpon(N, tau_rise=2 * u.ms), bp.CUBA(), neurons="GifRef"),
    "DeltaProj": delta,
    "STP CurrentProj": lambda: current(bp.STP(N_IN, tau_f=20 * u.ms, tau_d=10 * u.ms)),
    "STD CurrentProj": lambda: current(bp.STD(N_IN, tau=10 * u.ms, U=0.3)),
    "STP Expon CUBA": lambda: align_post(bp.Expon(N), bp.CUBA(), before=[bp.STP(N_IN, U=0.5)], scale=6.0),
    "synapse before weights": lambda: current(bp.Expon(N_IN, tau=4 * u.ms, g_initializer=zero(u.UNITLESS))),
}


def balanced(make=dense, merged=False):
    """Conductances of two kinds, from the inputs and from the own spikes."""
    neu = neurons_of("ALIF", R=500 * u.ohm)
    wrap = lambda kind, *args, **options: (kind.desc if merged else kind)(*args, **options)  # noqa: E731

    def projection(comm, E, tau):
        syn, out = wrap(bp.Expon, N, tau=tau * u.ms), wrap(bp.COBA, E=E * u.mV)
        return bp.AlignPostProj(comm=comm, syn=syn, out=out, post=neu)

    excitation, inhibition = make(N, 1.0, u.mS, 1.0), make(N, 1.0, u.mS, 2.0)
    recurrent = [projection(excitation, 5.0, 4.0), projection(inhibition, -1.0, 6.0)]
    return Projected(neu, projection(dense(N_IN, 3.0, u.mS, 3.0), 5.0, 4.0), recurrent=recurrent)


def by_deltas():
    neu = neurons_of("Gif")
    project = lambda n: bp.DeltaProj(comm=dense(n, 2.0, u.mV, 4.0), post=neu)  # noqa: E731
    return Projected(neu, project(N_IN), recurrent=[project(N)])


def plastic():
    """Short-term plasticity of the own spikes, whose history depends on the weights that it feeds."""
    layer = balanced()
    layer.recurrent = [PlasticFirst(bp.STP(N, U=0.5, tau_d=10 * u.ms), layer.recurrent[0]), *layer.recurrent[1:]]
    return layer


class PlasticFirst(brainstate.nn.Module):
    def __init__(self, synapse, projection):
        super().__init__()
        self.synapse, self.projection = synapse, projection

    def update(self, spikes):
        self.projection(self.synapse(spikes))


RECURRENT = {
    "balanced": lambda: balanced(sparse, merged=True),
    "DeltaProj Gif": by_deltas,
    "STP": plastic,
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

        found = [dict(gradient(counted)) for counted in ((jnp.arange(T) == 0) * 1.0, jnp.ones(T))]
        self.restore()
        return found

    def losses(self):
        return brainstate.transform.for_loop(lambda *item: squares(self.net, self.net, *item), *self.items)

    def learned(self, rule, driver, **options):
        """The gradients of every step, one by one, and if asked for their sum from the driver."""
        learner = rule(self.net, **options)
        self.restore()
        learner.compile_graph(*(item[0] for item in self.items[:2]))
        loss = lambda *item: squares(self.net, learner, *item)  # noqa: E731
        step = brainstate.transform.grad(loss, learner.param_states)
        steps = dict(brainstate.transform.for_loop(step, *self.items))
        learner.reset_state()
        self.restore()
        if not driver:
            return steps, None
        chunked = learner.etrace_grad(*self.items, step_fn=loss, reduction="sum", trace_chunk=3)
        self.restore()
        return steps, dict(chunked)


IN_CHUNKS = ["LIFRef", "sparse Gif", "Alpha ALIF", "DualExpon COBA merged", "STP CurrentProj", "STP"]
RULES = {"pp_prop": dict(rule=braintrace.pp_prop, decay_or_rank=0.9), "D_RTRL": dict(rule=braintrace.D_RTRL)}


def check(start, exact, driver):
    """`exact`: whether credit flows through no weight, so that D_RTRL is back-propagation through time."""
    first, whole = start.backpropagated()
    for path, value in whole.items():
        for leaf in jax.tree.leaves(value):
            assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-4, path
    for name, options in RULES.items():
        steps, chunked = start.learned(**options, driver=driver)
        assert_close(jax.tree.map(lambda g: g[0], steps), first, 2e-5, f"{name}, first step")
        summed = jax.tree.map(lambda g: g.sum(0), steps)
        if chunked is not None:
            assert_close(chunked, summed, 2e-5, f"{name}, chunks of three steps")
        if exact and name == "D_RTRL":
            assert_close(summed, whole, 2e-5, "all steps")
        else:
            with pytest.raises(AssertionError, match="all steps"):
                assert_close(summed, whole, 1e-3, "all steps")


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_without_recurrent_weights(layer):
    check(Start(LAYERS[layer]), exact=True, driver=layer in IN_CHUNKS)


@pytest.mark.parametrize("layer", RECURRENT)
def test_layers_with_recurrent_weights(layer):
    check(Start(RECURRENT[layer]), exact=False, driver=layer in IN_CHUNKS)


@pytest.mark.parametrize("layer, states", [("LIFRef", 1), ("AdExIF", 2), ("sparse Gif", 4), ("DualExpon GifRef", 6)])
def test_all_states_of_a_neuron_and_its_synapse_are_one_group(layer, states):
    net = Start(LAYERS[layer]).net
    learner = braintrace.compile(net, "pp_prop", 0, jnp.ones((BATCH, N_IN)), batch_size=BATCH, decay_or_rank=0.9)
    assert [group.num_state for group in learner.graph.hidden_groups] == [states]
