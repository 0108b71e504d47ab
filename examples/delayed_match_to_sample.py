"""Teach a spiking network to say whether two directions a second apart are the same.

A trial is a sample, a delay of 1,000 steps and a test; sample and test are one of eight directions, to which input
neurons are tuned as in the visual cortex, and a cue fires with the test and asks for the answer. Input neurons fire a
little all the time. Membranes (20 ms) have forgotten the sample when the test comes: what is left of it is a slow
current that every spike of a generalised integrate-and-fire neuron adds to, and that keeps it from firing for seconds.

The loss counts in the last 25 ms only, and the gradient has to reach the sample from there: through eligibility traces
that decay as slowly as the current (D_RTRL), or backward through 1,100 steps (BPTT). The traces of pp_prop are
cheaper and shorter.

    python examples/delayed_match_to_sample.py --rule d_rtrl --memory
    python examples/delayed_match_to_sample.py --rule d_rtrl --tau-a 100    # a current that forgets
"""

import brainpy
import brainstate
import braintools
import brainunit as u
import numpy as np
from training import Task, parser, run

import braintrace

SAMPLE, DELAY, TEST, RESPONSE = 50, 1000, 50, 25  # steps of 1 ms; the response ends with the test
DIRECTIONS, TUNED, CUE = 8, 32, 5  # input neurons that are tuned to a direction, and those of the cue
RATE, BACKGROUND = 0.5, 0.002  # spikes per step


class AdaptiveNet(brainstate.nn.Module):
    """Recurrent neurons that every spike makes less excitable, and a leaky readout of their spikes."""

    def __init__(self, n_in, n_units, n_out, tau_a):
        super().__init__()
        self.neurons = brainpy.state.Gif(
            n_units,
            R=1.0 * u.ohm,
            tau=20.0 * u.ms,
            V_rest=0.0 * u.mV,
            V_reset=0.0 * u.mV,
            V_th_inf=1.0 * u.mV,
            V_th_reset=0.5 * u.mV,
            k1=1 / (tau_a * u.ms),
            R1=1.0,
            A1=-0.2 * u.mA,
            V_initializer=braintools.init.Constant(0.0 * u.mV),
            V_th_initializer=braintools.init.Constant(1.0 * u.mV),
            spk_fun=braintools.surrogate.ReluGrad(),
        )
        w_in, w_rec = braintools.init.Normal(0.0 * u.mA, 1.5 * u.mA), braintools.init.KaimingNormal(0.1, unit=u.mA)
        self.feed = braintrace.nn.Linear(n_in, n_units, w_init=w_in, b_init=None)
        self.recur = braintrace.nn.Linear(n_units, n_units, w_init=w_rec, b_init=None)
        w_out = braintools.init.KaimingNormal(scale=0.1)
        self.readout = braintrace.nn.LeakyRateReadout(n_units, n_out, tau=20.0 * u.ms, w_init=w_out)

    def update(self, spikes):
        current = self.feed(spikes) + self.recur(self.neurons.get_spike())
        return self.readout(self.neurons(current))


def draw(rng, batch, steps):
    """Trials `(steps, batch, neuron)`, half of them matches, and whether they are, `(RESPONSE, batch)`."""
    preferred = np.arange(TUNED) / TUNED
    sample, shift = rng.integers(DIRECTIONS, size=batch), rng.integers(1, DIRECTIONS, size=batch)
    is_match = rng.integers(2, size=batch)
    test = (sample + (1 - is_match) * shift) % DIRECTIONS

    def tuned(direction):
        angle = 2 * np.pi * (direction[:, None] / DIRECTIONS - preferred)
        return RATE * np.exp(6 * (np.cos(angle) - 1))

    rates = np.full((steps, batch, TUNED + CUE), BACKGROUND, np.float32)
    rates[:SAMPLE, :, :TUNED] += tuned(sample)
    rates[-TEST:, :, :TUNED] += tuned(test)
    rates[-TEST:, :, TUNED:] += RATE
    spikes = (rng.random(rates.shape, dtype=np.float32) < rates).astype(np.float32)
    return spikes, np.broadcast_to(is_match.astype(np.int32), (RESPONSE, batch))


def main():
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--tau-a", type=float, default=2000.0, help="time constant of the slow current, in ms")
    args = options.parse_args()
    n_units = 20 if args.quick else 100
    task = Task(
        name="delayed match-to-sample",
        build=lambda: AdaptiveNet(TUNED + CUE, n_units, 2, args.tau_a),
        draw=draw,
        steps=SAMPLE + (50 if args.quick else DELAY) + TEST,
        answer=RESPONSE,
        batch=4 if args.quick else 32,
        updates=350,
        learning_rate=1e-2,
    )
    run(task, args)


if __name__ == "__main__":
    brainstate.environ.set(dt=1.0 * u.ms)
    main()
