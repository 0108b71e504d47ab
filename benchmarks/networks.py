"""The networks of the comparison, built from whichever braintrace the process imports."""

import brainpy
import brainstate
import braintools
import brainunit as u
import jax.numpy as jnp

import braintrace


class Spiking(brainstate.nn.Module):
    """Recurrent neurons behind exponential synapses, read by a leaky integrator."""

    def __init__(self, neurons, inputs, units, outputs):
        super().__init__()
        self.neurons = neurons(units, tau=20.0 * u.ms, V_th=1.0 * u.mV)
        self.synapses = brainpy.state.AlignPostProj(
            comm=braintrace.nn.Linear(
                inputs + units, units, w_init=braintools.init.KaimingNormal(unit=u.mS), b_init=None
            ),
            syn=brainpy.state.Expon(units, tau=5.0 * u.ms),
            out=brainpy.state.CUBA(scale=1.0 * u.volt),
            post=self.neurons,
        )
        self.readout = braintrace.nn.LeakyRateReadout(units, outputs, tau=5.0 * u.ms)

    def update(self, spikes):
        self.synapses(jnp.concatenate([spikes, self.neurons.get_spike()], axis=-1))
        return self.readout(self.neurons())


class Gated(brainstate.nn.Module):
    """A recurrent cell read by a leaky integrator."""

    def __init__(self, cell, inputs, units, outputs):
        super().__init__()
        self.cell = cell(inputs, units)
        self.readout = braintrace.nn.LeakyRateReadout(units, outputs, tau=5.0 * u.ms)

    def update(self, x):
        return self.readout(self.cell(x))


def build(name, inputs, units, outputs):
    network, layer = {
        "lif": (Spiking, brainpy.state.LIF),
        "alif": (Spiking, brainpy.state.ALIF),
        "gru": (Gated, braintrace.nn.GRUCell),
        "lstm": (Gated, braintrace.nn.LSTMCell),
    }[name]
    return network(layer, inputs, units, outputs)
