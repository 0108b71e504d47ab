"""Teach a spiking network to say whether two stimuli half a second apart are the same.

A trial is a sample, a delay and a test; sample and test are one of two groups of input neurons firing, and a third
group, the cue, fires with the test and asks for the answer. Input neurons fire a little all the time. The membranes
(20 ms) and the synapses (5 ms) have forgotten the sample when the test comes: what is left of it is the adaptation of
the neurons that it made fire, which raises their threshold for seconds.

The loss counts in the last 25 ms only, and the gradient has to reach the sample from there: through eligibility traces
that decay as slowly as the adaptation (D_RTRL), or backward through 550 steps (BPTT). The traces of pp_prop are
cheaper and shorter.

    python examples/delayed_match_to_sample.py --method d_rtrl --memory
    python examples/delayed_match_to_sample.py --method d_rtrl --tau-a 100    # fast adaptation: nothing to learn from
"""

import brainpy
import brainstate
import braintools
import brainunit as u
import numpy as np
from training import Task, parser, run

import braintrace

SAMPLE, DELAY, TEST, RESPONSE = 50, 500, 50, 25  # steps of 1 ms; the response ends with the test
GROUP = 10  # input neurons of a stimulus
CUE = 5  # input neurons of the cue
RATE, BACKGROUND = 0.1, 0.005  # spikes per step


class AdaptiveNet(brainstate.nn.Module):
    """Recurrent neurons whose threshold rises with every spike, and a leaky readout of their spikes."""

    def __init__(self, n_in, n_units, n_out, tau_a):
        super().__init__()
        self.neurons = brainpy.state.ALIF(
            n_units, tau=20.0 * u.ms, tau_a=tau_a, V_th=1.0 * u.mV, spk_fun=braintools.surrogate.ReluGrad()
        )
        self.synapses_in = self.connect(n_in, braintools.init.Normal(0.0 * u.mS, 1.0 * u.mS))
        self.synapses_rec = self.connect(n_units, braintools.init.KaimingNormal(scale=0.1, unit=u.mS))
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
    """Trials `(steps, batch, neuron)`, whether they are matches, and the response period."""
    sample, test = rng.integers(2, size=(2, batch))
    groups = np.repeat(np.eye(2), GROUP, axis=1)
    cue = np.ones((batch, CUE))
    rates = np.full((steps, batch, 2 * GROUP + CUE), BACKGROUND)
    rates[:SAMPLE, :, : 2 * GROUP] += RATE * groups[sample]
    rates[-TEST:] += RATE * np.concatenate([groups[test], cue], axis=1)
    spikes = (rng.random(rates.shape) < rates).astype(np.float32)
    is_match = np.broadcast_to((sample == test).astype(np.int32), (steps, batch))
    return spikes, is_match, (np.arange(steps) >= steps - RESPONSE).astype(np.float32)


def cross_entropy(logits, labels):
    return braintools.metric.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits, labels):
    return (logits.argmax(axis=-1) == labels).mean()


def main():
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--tau-a", type=float, default=1500.0, help="time constant of the adaptation, in ms")
    args = options.parse_args()
    n_units = 20 if args.quick else 100
    task = Task(
        build=lambda: AdaptiveNet(2 * GROUP + CUE, n_units, 2, args.tau_a * u.ms),
        draw=draw,
        loss=cross_entropy,
        score=accuracy,
        score_name="accuracy",
        steps=SAMPLE + DELAY + TEST,
        batch=4 if args.quick else 64,
        updates=3 if args.quick else 150,
        learning_rate=1e-2,
        decay=0.9,
    )
    run(task, args)


if __name__ == "__main__":
    brainstate.environ.set(dt=1.0 * u.ms)
    main()
