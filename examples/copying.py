"""Teach linear recurrent units to repeat symbols after a long delay.

The network is shown ten symbols out of eight, waits, and has to repeat them in order. Guessing has an accuracy of
1/8. There is one layer of units with complex values that do not read each other, so that D_RTRL is exact: it does
what back-propagation through time does, in memory that does not grow with the delay.

    python examples/copying.py --steps 1000 --rule d_rtrl --memory
"""

import brainstate
import numpy as np
from training import Task, parser, run

import braintrace

SYMBOLS, LENGTH = 8, 10


class CopyNet(brainstate.nn.Module):
    """Units whose values turn, and shrink by about a half within the delay."""

    def __init__(self, n_units, steps):
        super().__init__()
        self.cell = braintrace.nn.LRUCell(SYMBOLS + 1, n_units, r_min=1 - 1 / steps, r_max=1 - 0.1 / steps)
        self.readout = braintrace.nn.Linear(SYMBOLS + 1, SYMBOLS)

    def update(self, x):
        return x >> self.cell >> self.readout


def draw(rng, batch, steps):
    """One-hot symbols at the first steps, a mark at the last `(steps, batch, symbol)`, and the symbols again."""
    symbols = rng.integers(SYMBOLS, size=(LENGTH, batch))
    inputs = np.zeros((steps, batch, SYMBOLS + 1), np.float32)
    inputs[:LENGTH, :, :SYMBOLS] = np.eye(SYMBOLS)[symbols]
    inputs[-LENGTH:, :, SYMBOLS] = 1
    return inputs, symbols.astype(np.int32)


def fraction_right(logits, symbols):
    return (logits.argmax(axis=-1) == symbols).mean()


def main():
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=200)
    args = options.parse_args()
    task = Task(
        name=f"copying, LRU, {args.steps} steps",
        build=lambda: CopyNet(8 if args.quick else 32, args.steps),
        draw=draw,
        score=fraction_right,
        steps=args.steps,
        answer=LENGTH,
        batch=4 if args.quick else 16,
        updates=300,
        learning_rate=1e-2,
        rates={"theta_log": 2 / args.steps},  # an angle acts as often as a unit turns
    )
    run(task, args)


if __name__ == "__main__":
    main()
