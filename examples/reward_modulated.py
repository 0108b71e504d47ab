"""Teach spiking neurons by a reward and their own noise: three factors, and no gradient of an error.

Each of four patterns of input rates calls for one of four actions: the population of neurons that fires most. In every
trial each neuron gets a constant random current. After each step a reward says whether the action is right. Where it is
better than in the other trials of the batch, the random current was good, and the weights learn to do the same: a
weight changes by its eligibility trace, times the random current of its neuron, times the reward.

`three_factor` takes the product of reward and random current as its modulator. The other rules descend the loss whose
derivative by the membrane potentials that product is; `d_rtrl` is then the same.

    python examples/reward_modulated.py --rule three_factor --out reward.png
"""

import brainpy
import brainstate
import braintools
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from training import RULES, Task, parser, run

import braintrace

N_IN, ACTIONS, STEPS, ANSWER = 40, 4, 100, 50
RATE, NOISE = 0.2, 0.3


class ActingNet(brainstate.nn.Module):
    """Recurrent LIF neurons, each of one population, and the leaky spike counts of the populations."""

    def __init__(self, n_units):
        super().__init__()
        self.neurons = brainpy.state.LIF(
            n_units, R=1.0 * u.ohm, tau=20.0 * u.ms, V_th=1.0 * u.mV, V_rest=0.0 * u.mV, V_reset=0.0 * u.mV
        )
        w_in, w_rec = (braintools.init.KaimingNormal(s, unit=u.mA) for s in (30.0, 0.1))
        self.feed = braintrace.nn.Linear(N_IN, n_units, w_init=w_in, b_init=None)
        self.recur = braintrace.nn.Linear(n_units, n_units, w_init=w_rec, b_init=None)
        self.members = jnp.eye(ACTIONS)[jnp.arange(n_units) % ACTIONS]

    def init_state(self, batch_size, **_):
        self.counts = brainstate.ShortTermState(jnp.zeros((batch_size, ACTIONS)))

    def reset_state(self, batch_size, **_):
        self.counts.value = jnp.zeros((batch_size, ACTIONS))

    def update(self, x):
        spikes, noise = x[..., :N_IN], x[..., N_IN:]
        spikes = self.neurons(self.feed(spikes) + self.recur(self.neurons.get_spike()) + noise * u.mA)
        self.counts.value = 0.97 * self.counts.value + jax.lax.stop_gradient(spikes) @ self.members
        return self.counts.value


def draw(rng, batch, n_units, noise):
    """Spikes and random currents `(STEPS, batch, N_IN + n_units)`, and the right actions `(ANSWER, batch)`."""
    patterns = np.random.default_rng(0).random((ACTIONS, N_IN))
    actions = rng.integers(ACTIONS, size=batch)
    spikes = rng.random((STEPS, batch, N_IN)) < RATE * patterns[actions]
    currents = np.broadcast_to(noise * rng.normal(size=(batch, n_units)), (STEPS, batch, n_units))
    inputs = np.concatenate([spikes, currents], axis=-1).astype(np.float32)
    return inputs, np.broadcast_to(actions.astype(np.int32), (ANSWER, batch))


def step(rule, model, call, x, action):
    reward = (model.counts.value.argmax(axis=-1) == action).astype(jnp.float32)  # for the step before
    modulator = (reward.mean() - reward)[:, None] * x[:, N_IN:] / len(reward)
    if rule == "three_factor":
        loss = call(x, modulator=modulator).sum()
    else:
        call(x)
        loss = (modulator * u.get_mantissa(model.neurons.V.value)).sum()
    return loss - jax.lax.stop_gradient(loss) - reward.mean()  # its value is the reward missed, its slope the loss's


def main():
    args = parser(__doc__.splitlines()[0], rules=("three_factor", *RULES)).parse_args()
    n_units, batch = (8, 4) if args.quick else (60, 32)
    rng = np.random.default_rng(args.seed + 1000)
    task = Task(
        name="reward-modulated",
        build=lambda: ActingNet(n_units),
        draw=lambda rng, batch, steps: draw(rng, batch, n_units, NOISE),
        held_out=lambda: [draw(rng, batch, n_units, 0.0) for _ in range(10)],
        step=lambda *given: step(args.rule, *given),
        steps=STEPS,
        answer=ANSWER,
        batch=batch,
        updates=500,
        learning_rate=1e-2,
    )
    run(task, args)


if __name__ == "__main__":
    brainstate.environ.set(dt=1.0 * u.ms)
    main()
