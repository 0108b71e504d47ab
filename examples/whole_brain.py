"""Fit the activity of a whole brain of spiking neurons, online: the size of a fruit fly's, on a laptop.

A synthetic connectome has 139,255 leaky integrate-and-fire neurons in 68 regions and a million synapses, with heavy-
tailed numbers of synapses per neuron. A hidden teacher has the same connections, but synapses into some regions are
stronger and into others weaker. The student sees only the teacher's firing rates, averaged over each region, and
corrects all of its synapses after every millisecond, with `pp_prop`: what it keeps beside the network is a few numbers
per neuron, and nothing per synapse.

    python examples/whole_brain.py --out whole_brain.png
    python examples/whole_brain.py --synapses 15000000   # needs about 6 GB of memory
"""

import argparse
import time
from pathlib import Path

import brainevent
import brainpy
import brainstate
import braintools
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import braintrace

N_REGIONS = 68
LOCAL = 0.6  # share of the synapses that stay in their region
INHIBITORY = 0.3  # share of the neurons that inhibit
RATE_TAU = 50.0 * u.ms  # firing rates are averages over this time


def make_connectome(n_neurons, n_synapses, rng):
    """Draw a connectome.

    Returns the region of every neuron (ascending), and the synapses as pointers ``(n_neurons + 1,)`` of presynaptic
    neurons into their targets ``(n_synapses,)``.
    """
    region = np.sort(rng.choice(N_REGIONS, n_neurons, p=rng.dirichlet(np.full(N_REGIONS, 3.0))))
    sends, receives = np.cumsum(np.minimum(rng.pareto([[1.3], [1.5]], (2, n_neurons)) + 0.2, 300.0), axis=1)
    receives = np.concatenate([[0.0], receives])
    borders = receives[np.searchsorted(region, np.arange(N_REGIONS + 1))]

    def draw(n):
        pre = np.searchsorted(sends, rng.uniform(0.0, sends[-1], n))
        local = rng.random(n) < LOCAL
        low = np.where(local, borders[region[pre]], 0.0)
        high = np.where(local, borders[region[pre] + 1], receives[-1])
        post = np.searchsorted(receives, rng.uniform(low, high), side="right") - 1
        return pre * n_neurons + np.minimum(post, n_neurons - 1)

    pairs = np.unique(draw(n_synapses))
    while len(pairs) < n_synapses:
        pairs = np.union1d(pairs, draw(n_synapses // 4))
    pairs = np.delete(pairs, rng.choice(len(pairs), len(pairs) - n_synapses, replace=False))
    pre, post = np.divmod(pairs, n_neurons)
    pointers = np.concatenate([[0], np.cumsum(np.bincount(pre, minlength=n_neurons))])
    return region, pointers.astype(np.int32), post.astype(np.int32)


class Brain(brainstate.nn.Module):
    """Leaky integrate-and-fire neurons with exponential synapses; the output is the firing rate of every region."""

    def __init__(self, connectome, strengths, drive):
        super().__init__()
        region, pointers, targets = connectome
        n = len(region)
        self.region, self.drive = jnp.asarray(region), drive
        self.region_size = jnp.asarray(np.bincount(region, minlength=N_REGIONS), jnp.float32)
        start = braintools.init.Uniform(-52.0 * u.mV, -45.0 * u.mV)
        self.neurons = brainpy.state.LIF(
            n, tau=20.0 * u.ms, V_rest=-52.0 * u.mV, V_reset=-52.0 * u.mV, V_th=-45.0 * u.mV, V_initializer=start
        )
        self.synapses = brainpy.state.AlignPostProj(
            comm=braintrace.nn.SparseLinear(brainevent.CSR((strengths, targets, pointers), shape=(n, n))),
            syn=brainpy.state.Expon(n, tau=5.0 * u.ms),
            out=brainpy.state.CUBA(scale=1.0 * u.volt),
            post=self.neurons,
        )
        self.spikes = brainpy.state.Expon(n, tau=RATE_TAU, g_initializer=braintools.init.Constant(0.0))

    def update(self, stimulus):
        """Advance by one step. ``stimulus`` has one entry per region, and so have the rates, in spikes per second."""
        self.synapses(self.neurons.get_spike())
        recent = self.spikes(self.neurons(self.drive + stimulus[self.region]))
        total = jax.ops.segment_sum(recent, self.region, N_REGIONS, indices_are_sorted=True)
        return (total / self.region_size / RATE_TAU).to_decimal(u.Hz)


def make_brains(args, rng):
    """A teacher and a student that differ in the strengths of the synapses into each region."""
    connectome = region, pointers, targets = make_connectome(args.neurons, args.synapses, rng)
    drive = jnp.asarray(rng.normal(6.5, 1.5, args.neurons), jnp.float32) * u.mA
    sign = np.where(rng.random(args.neurons) < INHIBITORY, -2.0, 1.0)
    n_inputs = np.bincount(targets, minlength=args.neurons)
    strengths = np.repeat(sign, np.diff(pointers)) * rng.lognormal(0.5, 0.5, args.synapses) / np.sqrt(n_inputs[targets])
    gain = rng.lognormal(0.0, 0.7, N_REGIONS)[region[targets]]
    teacher, student = (Brain(connectome, jnp.asarray(w, jnp.float32) * u.mS, drive) for w in (strengths * gain, strengths))
    return teacher, student
