"""The networks of the comparison, built from whichever braintrace the process imports."""

from functools import partial

import brainevent
import brainpy
import brainstate
import braintools
import brainunit as u
import jax.numpy as jnp
import numpy as np

import braintrace

IMAGE, CHANNELS = (16, 16, 2), 8  # what `conv` sees and how many channels it has, at every size


def dense(inputs, units):
    w_init = braintools.init.KaimingNormal(unit=u.mS)
    return braintrace.nn.Linear(inputs, units, w_init=w_init, b_init=None)


def sparse(inputs, units):
    """One connection in ten; the published package takes no units here."""
    rng = np.random.default_rng(0)
    weights = 0.3 * rng.standard_normal((inputs, units)) * (rng.random((inputs, units)) < 0.1)
    return braintrace.nn.SparseLinear(brainevent.CSR.fromdense(jnp.asarray(weights, jnp.float32)))


def gif(units, tau, V_th):
    """Generalised integrate-and-fire neurons that rest at zero, as those of LIF do."""
    constant, zero = braintools.init.Constant, 0.0 * u.mV
    start = dict(V_initializer=constant(zero), V_th_initializer=constant(V_th))
    levels = dict(V_rest=zero, V_reset=zero, V_th_inf=V_th, V_th_reset=0.5 * V_th)
    return brainpy.state.Gif(units, R=1.0 * u.ohm, tau=tau, **levels, **start)


class Spiking(brainstate.nn.Module):
    """Recurrent neurons behind exponential synapses, read by a leaky integrator."""

    def __init__(self, neurons, connect, unit, inputs, units, outputs):
        super().__init__()
        self.neurons = neurons(units, tau=20.0 * u.ms, V_th=1.0 * u.mV)
        self.synapses = brainpy.state.AlignPostProj(
            comm=connect(inputs + units, units),
            syn=brainpy.state.Expon(units, tau=5.0 * u.ms, g_initializer=braintools.init.Constant(0.0 * unit)),
            out=brainpy.state.CUBA(scale=1.0 * u.mA / unit),
            post=self.neurons,
        )
        self.readout = braintrace.nn.LeakyRateReadout(units, outputs, tau=5.0 * u.ms)

    def update(self, spikes):
        self.synapses(jnp.concatenate([spikes, self.neurons.get_spike()], axis=-1))
        return self.readout(self.neurons())


class ExcitatoryInhibitory(brainstate.nn.Module):
    """Adaptive neurons, four excitatory to one inhibitory, with conductance synapses whose weights keep their sign."""

    def __init__(self, inputs, units, outputs):
        super().__init__()
        self.excitatory = units * 4 // 5
        zero, constant = 0.0 * u.mV, braintools.init.Constant
        self.neurons = brainpy.state.ALIF(
            units, R=1.0 * u.ohm, tau=20.0 * u.ms, tau_a=100.0 * u.ms, beta=1.6 * u.mV, V_th=15.0 * u.mV,
            V_rest=zero, V_reset=zero, V_initializer=constant(zero),
        )  # fmt: skip

        def synapses(sources, reversal):
            w_init = braintools.init.KaimingNormal(0.5, unit=u.siemens)
            return brainpy.state.AlignPostProj(
                comm=braintrace.nn.SignedWLinear(sources, units, w_init=w_init),
                syn=brainpy.state.Expon(units, tau=10.0 * u.ms),
                out=brainpy.state.COBA(E=reversal),
                post=self.neurons,
            )

        self.from_input = synapses(inputs, 60.0 * u.mV)
        self.from_excitatory = synapses(self.excitatory, 60.0 * u.mV)
        self.from_inhibitory = synapses(units - self.excitatory, -20.0 * u.mV)
        self.readout = braintrace.nn.LeakyRateReadout(units, outputs, tau=100.0 * u.ms)

    def update(self, spikes):
        excitatory, inhibitory = jnp.split(self.neurons.get_spike(), [self.excitatory], axis=-1)
        self.from_input(spikes)
        self.from_excitatory(excitatory)
        self.from_inhibitory(inhibitory)
        return self.readout(self.neurons())


class Convolutional(brainstate.nn.Module):
    """A convolution to LIF neurons, read by a leaky integrator."""

    def __init__(self, inputs, units, outputs):
        super().__init__()
        neurons = (*IMAGE[:-1], CHANNELS)
        w_init = braintools.init.KaimingNormal(unit=u.mA)
        self.convolution = braintrace.nn.Conv2d(IMAGE, CHANNELS, 3, w_init=w_init)
        self.neurons = brainpy.state.LIF(neurons, tau=20.0 * u.ms, V_th=1.0 * u.mV)
        self.readout = braintrace.nn.LeakyRateReadout(int(np.prod(neurons)), outputs, tau=5.0 * u.ms)

    def update(self, spikes):
        spikes = self.neurons(self.convolution(spikes))
        return self.readout(spikes.reshape(*spikes.shape[:-3], -1))


class Gated(brainstate.nn.Module):
    """A recurrent cell read by a leaky integrator."""

    def __init__(self, cell, inputs, units, outputs):
        super().__init__()
        self.cell = cell(inputs, units)
        # Linear recurrent units give back as many channels as they are given.
        width = inputs if cell is braintrace.nn.LRUCell else units
        self.readout = braintrace.nn.LeakyRateReadout(width, outputs, tau=5.0 * u.ms)

    def update(self, x):
        return self.readout(self.cell(x))


NETWORKS = {
    "lif": partial(Spiking, brainpy.state.LIF, dense, u.mS),
    "alif": partial(Spiking, brainpy.state.ALIF, dense, u.mS),
    "gif": partial(Spiking, gif, dense, u.mS),
    "sparse": partial(Spiking, brainpy.state.LIF, sparse, u.UNITLESS),
    "ei": ExcitatoryInhibitory,
    "conv": Convolutional,
    "gru": partial(Gated, braintrace.nn.GRUCell),
    "lstm": partial(Gated, braintrace.nn.LSTMCell),
    "rnn": partial(Gated, braintrace.nn.ValinaRNNCell),
    "lru": partial(Gated, braintrace.nn.LRUCell),
}


def input_shape(name, inputs):
    return IMAGE if name == "conv" else (inputs,)
