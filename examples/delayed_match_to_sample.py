"""dms"""
import argparse
import brainpy
import brainstate
import braintools
import brainunit as u
import numpy as np
from training import Task, parse, run

import braintrace

SAMPLE, TEST, RESPONSE = 50, 50, 25
PER_STIM = 10
CUE = 5

class AdaptiveNet(brainstate.nn.Module):
    def __init__(self, n_in, n_units, n_out, tau_a=1500.0 * u.ms, wscale=1.0, beta=0.1, rec=0.1):
        super().__init__()
        self.neurons = brainpy.state.ALIF(n_units, tau=20.0 * u.ms, tau_a=tau_a, V_th=1.0 * u.mV, beta=beta*u.mV, spk_fun=braintools.surrogate.ReluGrad())
        self.synapses_in = self.connect(n_in, braintools.init.Normal(0.0 * u.mS, wscale * u.mS))
        self.synapses_rec = self.connect(n_units, braintools.init.KaimingNormal(scale=rec, unit=u.mS))
        w_out = braintools.init.KaimingNormal(scale=0.1)
        self.readout = braintrace.nn.LeakyRateReadout(n_units, n_out, tau=20.0 * u.ms, w_init=w_out)

    def connect(self, n_pre, w_init):
        n_units = self.neurons.varshape
        return brainpy.state.AlignPostProj(
            comm=braintrace.nn.Linear(n_pre, n_units, w_init=w_init, b_init=None),
            syn=brainpy.state.Expon(n_units, tau=5.0 * u.ms),
            out=brainpy.state.CUBA(scale=1.0 * u.volt),
            post=self.neurons,
        )

    def update(self, spikes):
        self.synapses_in(spikes)
        self.synapses_rec(self.neurons.get_spike())
        return self.readout(self.neurons())


def draw(rng, batch, steps):
    sample, test = rng.integers(2, size=(2, batch))
    rate = np.full((steps, batch, 2*PER_STIM + CUE), 0.0)
    stim = np.repeat(np.eye(2)[:, :, None], PER_STIM, axis=2).reshape(2, -1)
    rate[:, :, :2*PER_STIM] = 0.005
    rate[:SAMPLE, :, :2*PER_STIM] += 0.1 * stim[sample]
    rate[-TEST:, :, :2*PER_STIM] += 0.1 * stim[test]
    rate[-TEST:, :, 2*PER_STIM:] = 0.1
    x = (rng.random(rate.shape) < rate).astype(np.float32)
    labels = np.broadcast_to((sample == test).astype(np.int32), (steps, batch))
    mask = (np.arange(steps) >= steps - RESPONSE).astype(np.float32)
    return x, labels, mask


if __name__ == "__main__":
    brainstate.environ.set(dt=1.0 * u.ms)
    p = parse("dms", 100)
    p.add_argument("--lr", type=float, default=1e-2)
    p.add_argument("--decay", type=float, default=0.998)
    p.add_argument("--w", type=float, default=1.0)
    p.add_argument("--beta", type=float, default=0.1)
    args = p.parse_args()
    n_in = 2 * PER_STIM + CUE
    task = Task("DMS", lambda: AdaptiveNet(n_in, 100, 2, wscale=args.w, beta=args.beta), draw, 600, 64, args.updates, args.lr, args.decay)
    run(task, args)
