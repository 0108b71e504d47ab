"""Teach a gated recurrent network to add two numbers of a long sequence.

At every step the network is given a number between 0 and 1 and a mark. Two numbers are marked, one in either half of
the sequence, and after the last step the network has to say their sum. Always saying 1 has a squared error of 1/6.

    python examples/adding.py --method d_rtrl --memory
"""

import brainstate
import numpy as np
from training import Task, parser, run

import braintrace


class AddingNet(brainstate.nn.Module):
    def __init__(self, n_units):
        super().__init__()
        self.cell = braintrace.nn.GRUCell(2, n_units)
        self.readout = braintrace.nn.Linear(n_units, 1)

    def update(self, x):
        return (x >> self.cell >> self.readout)[..., 0]


def draw(rng, batch, steps):
    """Numbers and marks `(steps, batch, 2)`, the sums, and a mask that holds the last step alone."""
    numbers, marks = rng.random((steps, batch)), np.zeros((steps, batch))
    half, samples = steps // 2, np.arange(batch)
    marks[rng.integers(half, size=batch), samples] = 1
    marks[rng.integers(half, steps, size=batch), samples] = 1
    inputs = np.stack([numbers, marks], axis=-1).astype(np.float32)
    sums = np.broadcast_to((numbers * marks).sum(axis=0).astype(np.float32), (steps, batch))
    return inputs, sums, (np.arange(steps) == steps - 1).astype(np.float32)


def squared_error(answers, sums):
    return ((answers - sums) ** 2).mean()


def main():
    args = parser(__doc__.splitlines()[0]).parse_args()
    task = Task(
        build=lambda: AddingNet(8 if args.quick else 64),
        draw=draw,
        loss=squared_error,
        score=squared_error,
        score_name="squared error",
        steps=50,
        batch=4 if args.quick else 64,
        updates=3 if args.quick else 1000,
        learning_rate=5e-3,
        decay=0.9,
    )
    run(task, args)


if __name__ == "__main__":
    main()
