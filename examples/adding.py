"""Teach a recurrent network to add two numbers of a long sequence.

At every step the network is given a number between 0 and 1 and a mark. Two numbers are marked, one in either half of
the sequence, and after the last step the network has to say their sum. Always saying 1 has a squared error of 1/6.

The linear recurrent units (`--cell lru`) stand in one layer between two maps, so that D_RTRL is exact. A map of the
inputs in front of them would have no trace: the features that it would learn, here a number times its mark, are fixed.

    python examples/adding.py --rule d_rtrl --memory
    python examples/adding.py --cell lru --steps 1000 --out adding.png
"""

import brainstate
import jax
import numpy as np
from training import Task, parser, run

import braintrace


class AddingNet(brainstate.nn.Module):
    def __init__(self, cell, n_units, steps):
        super().__init__()
        if cell == "gru":
            self.cell = braintrace.nn.GRUCell(2, n_units)
            self.readout = braintrace.nn.Linear(n_units, 1)
        else:
            r_min, r_max, max_phase = 1 - 20 / steps, 1 - 0.2 / steps, 20 / steps
            self.cell = braintrace.nn.LRUCell(3, n_units, max(r_min, 0.0), r_max, max_phase)
            self.readout = braintrace.nn.Linear(3, 1)

    def update(self, x):
        if isinstance(self.cell, braintrace.nn.LRUCell):
            x = jax.numpy.concatenate([x, x[..., :1] * x[..., 1:]], axis=-1)
        return (x >> self.cell >> self.readout)[..., 0]


def draw(rng, batch, steps):
    """Numbers and marks `(steps, batch, 2)`, and the sums `(1, batch)`."""
    numbers, marks = rng.random((steps, batch)), np.zeros((steps, batch))
    half, samples = steps // 2, np.arange(batch)
    marks[rng.integers(half, size=batch), samples] = 1
    marks[rng.integers(half, steps, size=batch), samples] = 1
    inputs = np.stack([numbers, marks], axis=-1)
    return inputs.astype(np.float32), (numbers * marks).sum(axis=0, keepdims=True).astype(np.float32)


def squared_error(answers, sums):
    return ((answers - sums) ** 2).mean()


def main():
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--cell", choices=["gru", "lru"], default="gru")
    options.add_argument("--steps", type=int, default=50)
    args = options.parse_args()
    units = 64 if args.cell == "gru" else 32  # and trials of a batch
    task = Task(
        name=f"adding, {args.cell.upper()}, {args.steps} steps",
        build=lambda: AddingNet(args.cell, 8 if args.quick else units, args.steps),
        draw=draw,
        loss=squared_error,
        score=squared_error,
        score_name="squared error",
        steps=args.steps,
        answer=1,
        batch=4 if args.quick else units,
        updates=1000,
        learning_rate=5e-3 if args.cell == "gru" else 3e-2,
        anneal=True,
    )
    run(task, args)


if __name__ == "__main__":
    main()
