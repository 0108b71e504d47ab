"""Teach three layers of recurrent spiking neurons to tell streams of events from 700 channels apart.

The streams are generated, in the format of spoken digits from a model of the inner ear: 20 classes, 700 channels, 100
steps of 10 ms. A class is a set of four formants, paths that wander over the channels, with a strength that rises and
falls. A trial takes them at its own speed (0.8 to 1.2), shifted over up to 20 channels, with its own loudness (0.7 to
1.3); a channel near a formant fires with up to 0.5 events per step, any channel with 0.005.

    python examples/event_streams.py --rule pp_prop --out events.png
"""

import brainpy
import brainstate
import braintools
import brainunit as u
import numpy as np
from training import Task, parser, run

import braintrace

CHANNELS, CLASSES, STEPS, FORMANTS = 700, 20, 100, 4
WIDTH, SHIFT, RATE, BACKGROUND = 8.0, 20, 0.5, 0.005


class Layer(brainstate.nn.Module):
    def __init__(self, n_in, n_units, neurons, scale):
        super().__init__()
        options = dict(tau=50.0 * u.ms, V_th=1.0 * u.mV, spk_fun=braintools.surrogate.ReluGrad())
        self.neurons = (
            brainpy.state.ALIF(n_units, tau_a=500.0 * u.ms, **options)
            if neurons == "alif"
            else brainpy.state.LIF(n_units, R=1.0 * u.ohm, V_rest=0.0 * u.mV, V_reset=0.0 * u.mV, **options)
        )
        w_in, w_rec = (braintools.init.KaimingNormal(s, unit=u.mA) for s in (scale, 1.0))
        self.feed = braintrace.nn.Linear(n_in, n_units, w_init=w_in, b_init=None)
        self.recur = braintrace.nn.Linear(n_units, n_units, w_init=w_rec, b_init=None)

    def update(self, spikes):
        return self.neurons(self.feed(spikes) + self.recur(self.neurons.get_spike()))


class EventNet(brainstate.nn.Module):
    def __init__(self, n_units, neurons):
        super().__init__()
        sizes = [CHANNELS, n_units, n_units]
        self.layers = brainstate.nn.Sequential(*(Layer(n, n_units, neurons, 30.0) for n in sizes))
        self.readout = braintrace.nn.LeakyRateReadout(n_units, CLASSES, tau=500.0 * u.ms)

    def update(self, spikes):
        return spikes >> self.layers >> self.readout


class Streams:
    """The formants of all classes, drawn once and for all: where they are, and how strong, at each of 200 points."""

    def __init__(self):
        rng = np.random.default_rng(0)
        shape = (CLASSES, FORMANTS, 200)
        waves = rng.normal(size=(2, *shape[:2], 3, 1)) / np.arange(1, 4)[:, None]
        phases = np.pi * np.arange(1, 4)[:, None] * np.linspace(0, 1, shape[-1])
        wander, strength = (waves * np.cos(phases)).sum(axis=-2)
        self.centre = rng.uniform(60, CHANNELS - 60, shape[:2])[..., None] + 50 * wander
        self.strength = 1 / (1 + np.exp(-3 * strength))

    def draw(self, rng, batch, steps):
        labels = rng.integers(CLASSES, size=batch)
        speed, loud = rng.uniform(0.8, 1.2, size=batch), rng.uniform(0.7, 1.3, size=batch)
        points = (np.arange(steps)[:, None] * speed / steps * 160).astype(int)  # at most 192
        centre = self.centre[labels, :, points] + rng.uniform(-SHIFT, SHIFT, size=(batch, 1))
        strength = RATE * loud[:, None] * self.strength[labels, :, points]
        rates = np.full((steps, batch, CHANNELS), BACKGROUND, np.float32)
        channels = np.arange(CHANNELS, dtype=np.float32)
        for f in range(FORMANTS):
            distance = (channels - centre[..., f, None].astype(np.float32)) / WIDTH
            rates += strength[..., f, None].astype(np.float32) * np.exp(-0.5 * distance**2)
        events = (rng.random(rates.shape, dtype=np.float32) < rates).astype(np.float32)
        return events, np.broadcast_to(labels.astype(np.int32), (steps // 2, batch))


def main():
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--neurons", choices=["lif", "alif"], default="lif")
    args = options.parse_args()
    steps = 20 if args.quick else STEPS
    task = Task(
        name=f"event streams, {args.neurons.upper()}",
        build=lambda: EventNet(20 if args.quick else 256, args.neurons),
        draw=Streams().draw,
        steps=steps,
        answer=steps // 2,
        batch=4 if args.quick else 32,
        updates=150,
        learning_rate=3e-3,
    )
    run(task, args)


if __name__ == "__main__":
    brainstate.environ.set(dt=10.0 * u.ms)
    main()
