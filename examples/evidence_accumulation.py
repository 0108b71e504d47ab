"""Teach excitatory and inhibitory neurons to count cues on two sides, and to decide after a delay.

Seven cues come one after the other, each on the left or on the right. After a delay a group of input neurons asks, and
the network has to say on which side there were more. Input neurons fire a little all the time.

The network follows Dale's law: a neuron excites all others or inhibits them, by conductances that pull the membrane to
the reversal potential of their kind. Adaptation, over two seconds, is what remembers. The loss counts in the last 40 ms
only; until then traces are carried without a gradient.

    python examples/evidence_accumulation.py --rule hybrid --out evidence.png
"""

import brainpy
import brainstate
import braintools
import brainunit as u
import numpy as np
from training import Task, parser, run

import braintrace

CUES, CUE, GAP, DELAY, DECISION = 7, 25, 15, 130, 40  # steps of 1 ms; a gap follows each cue
GROUP = 10  # input neurons of a side, of the question, and of the background
RATE, BACKGROUND = 0.2, 0.01  # spikes per step


class BalancedNet(brainstate.nn.Module):
    """Four excitatory neurons for each inhibitory one, and a leaky readout of all."""

    def __init__(self, n_in, n_units, n_out):
        super().__init__()
        self.n_excitatory = n_units * 4 // 5
        self.neurons = brainpy.state.ALIF(
            n_units,
            R=1e3 * u.ohm,
            tau=20.0 * u.ms,
            tau_a=2000.0 * u.ms,
            V_th=1.0 * u.mV,
            beta=0.2 * u.mV,
            spk_fun=braintools.surrogate.ReluGrad(),
        )
        self.feed = self.connect(n_in, scale=0.2, reversal=5.0)
        self.excite = self.connect(self.n_excitatory, scale=0.02, reversal=5.0)
        self.inhibit = self.connect(n_units - self.n_excitatory, scale=0.1, reversal=-1.0)
        w_out = braintools.init.KaimingNormal(scale=0.1)
        self.readout = braintrace.nn.LeakyRateReadout(n_units, n_out, tau=20.0 * u.ms, w_init=w_out)

    def connect(self, n_pre, scale, reversal):
        n_units = self.neurons.varshape
        w_init = braintools.init.Normal(0.0 * u.mS, scale * u.mS)
        return brainpy.state.AlignPostProj(
            comm=braintrace.nn.SignedWLinear(n_pre, n_units, w_init=w_init),
            syn=brainpy.state.Expon(n_units, tau=5.0 * u.ms),
            out=brainpy.state.COBA(E=reversal * u.mV),
            post=self.neurons,
        )

    def update(self, spikes):
        old = self.neurons.get_spike()
        self.feed(spikes)
        self.excite(old[..., : self.n_excitatory])
        self.inhibit(old[..., self.n_excitatory :])
        return self.readout(self.neurons())


def draw(rng, batch, steps):
    """Trials `(steps, batch, neuron)`, and whether most cues were on the right, `(DECISION, batch)`."""
    right = rng.integers(2, size=(CUES, batch))
    rates = np.full((steps, batch, 4, GROUP), BACKGROUND, np.float32)
    for i, side in enumerate(right):
        start = i * (CUE + GAP)
        rates[start : start + CUE, np.arange(batch), side] += RATE
    rates[-DECISION:, :, 2] += RATE
    spikes = (rng.random(rates.shape, dtype=np.float32) < rates).astype(np.float32)
    answers = (right.sum(axis=0) > CUES // 2).astype(np.int32)
    return spikes.reshape(steps, batch, -1), np.broadcast_to(answers, (DECISION, batch))


def main():
    args = parser(__doc__.splitlines()[0]).parse_args()
    task = Task(
        name="evidence accumulation",
        build=lambda: BalancedNet(4 * GROUP, 20 if args.quick else 80, 2),
        draw=draw,
        steps=CUES * (CUE + GAP) + DELAY + DECISION,
        answer=DECISION,
        batch=4 if args.quick else 32,
        updates=250,
        learning_rate=1e-2,
        exact=["feed"],
    )
    run(task, args)


if __name__ == "__main__":
    brainstate.environ.set(dt=1.0 * u.ms)
    main()
