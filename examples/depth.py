"""How much of the gradient of a lower layer online rules see.

What a lower layer did at an earlier step reaches the loss in two ways: through its own memory, which its traces
follow, and through the memory of the layers above, which only back-propagation through time follows. This script
builds stacks of recurrent layers, compares the gradients of every layer with back-propagation, and prints their
cosines, at the initial weights and after some training.

    python examples/depth.py
    python examples/depth.py --cells lru --depths 2,4,8    # about a minute each
"""

import argparse

import brainpy
import brainstate
import braintools
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

import braintrace

UNITS, INPUTS, OUTPUTS, BATCH, STEPS, DELAY = 32, 4, 4, 16, 80, 10
MASK = jnp.arange(STEPS) >= DELAY
RULES = {
    "immediate": "immediate",
    "pp_prop": ("pp_prop", dict(decay_or_rank=0.9)),
    "d_rtrl": "d_rtrl",
}


class LIFLayer(brainstate.nn.Module):
    """Recurrent leaky integrate-and-fire neurons behind exponential synapses; the output is their spikes."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.neurons = brainpy.state.LIF(
            n_out, tau=20.0 * u.ms, V_th=1.0 * u.mV, spk_fun=braintools.surrogate.ReluGrad()
        )
        self.synapses = brainpy.state.AlignPostProj(
            comm=braintrace.nn.Linear(
                n_in + n_out, n_out, w_init=braintools.init.KaimingNormal(40.0, unit=u.mS), b_init=None
            ),
            syn=brainpy.state.Expon(n_out, tau=5.0 * u.ms),
            out=brainpy.state.CUBA(scale=1.0 * u.volt),
            post=self.neurons,
        )

    def update(self, x):
        self.synapses(jnp.concatenate([x, self.neurons.get_spike()], axis=-1))
        return self.neurons()


CELLS = {"gru": braintrace.nn.GRUCell, "lif": LIFLayer, "lru": braintrace.nn.LRUCell}


def stack(cell, depth):
    layers = [CELLS[cell](UNITS, UNITS) for _ in range(depth)]
    return brainstate.nn.Sequential(braintrace.nn.Linear(INPUTS, UNITS), *layers, braintrace.nn.Linear(UNITS, OUTPUTS))


def data():
    """Random inputs, and what they were some steps ago."""
    xs = brainstate.random.uniform(-1.0, 1.0, (STEPS, BATCH, INPUTS))
    return xs, jnp.roll(xs, DELAY, axis=0)


def step_loss(call, x, target):
    return ((call(x) - target) ** 2).mean()


def cosines(cell, depth, updates, seed):
    """Rule -> the cosine to BPTT of the gradient of every layer, from the lowest."""
    brainstate.random.seed(seed)
    model = stack(cell, depth)
    train(model, updates)
    xs, targets = data()
    found = braintrace.compare(model, xs, targets, step_fn=step_loss, batch_size=BATCH, rules=RULES, mask=MASK)

    def of_layer(label, layer):
        own = [g for path, g in found.gradients[label].items() if path[:2] == ("layers", 1 + layer)]
        return np.concatenate([np.ravel(u.get_mantissa(x)) for x in jax.tree.leaves(own, is_leaf=u.math.is_quantity)])

    def cosine(a, b):
        return float(np.real(np.vdot(a, b)) / np.linalg.norm(a) / np.linalg.norm(b))

    return {r: [cosine(of_layer(r, i), of_layer("BPTT", i)) for i in range(depth)] for r in found.rules}


def train(model, updates):
    """By back-propagation, so that all rules are compared at the same weights."""
    weights = model.states(brainstate.ParamState)
    brainstate.nn.init_all_states(model, batch_size=BATCH)
    optimizer = braintools.optim.Adam(lr=3e-3)
    optimizer.register_trainable_weights(weights)

    def loss(xs, targets):
        brainstate.nn.reset_all_states(model, batch_size=BATCH)
        losses = brainstate.transform.for_loop(lambda x, y: step_loss(model, x, y), xs, targets)
        return (losses * MASK).sum() / MASK.sum()

    @brainstate.transform.jit
    def update():
        optimizer.step(brainstate.transform.grad(lambda: loss(*data()), weights)())

    for _ in range(updates):
        update()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--depths", default="1,2,4")
    parser.add_argument("--updates", default="0,300", help="of back-propagation before the comparison")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    args = parser.parse_args()
    if args.quick:
        args.cells, args.depths, args.updates, args.seeds = "lru", "2", "1", 1
    print(f"| cell | layers | updates before | layer | {' | '.join(RULES)} |")
    print("|---" * (4 + len(RULES)) + "|")
    for cell in args.cells.split(","):
        for depth in map(int, args.depths.split(",")):
            for updates in map(int, args.updates.split(",")):
                runs = [cosines(cell, depth, updates, seed) for seed in range(args.seeds)]
                for layer in range(depth):
                    shown = " | ".join(f"{np.mean([run[r][layer] for run in runs]):.2f}" for r in RULES)
                    print(f"| {cell} | {depth} | {updates} | {layer + 1} | {shown} |", flush=True)


if __name__ == "__main__":
    with brainstate.environ.context(dt=1.0 * u.ms):
        main()
