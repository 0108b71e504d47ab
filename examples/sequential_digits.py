"""Teach a recurrent network to read handwritten digits, pixel by pixel.

The 8x8 digits of scikit-learn come as 64 steps of one pixel, or magnified to 28x28 as 784 steps. Neurons that are
tuned to a brightness each stand between a pixel and the network. The answer is read after the last pixel.

    python examples/sequential_digits.py --rule d_rtrl --cell lru --out digits.png
    python examples/sequential_digits.py --rule bptt --cell gru
"""

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from training import RULES, Task, parser, run

import braintrace

CELLS = {"lru": "LRU", "gru": "GRU", "gru_after": "GRU with the reset gate behind the product"}
TUNED = 16  # neurons per pixel
TEST_SIZE = 360


class ResetAfterGRU(brainstate.nn.Module):
    """The gated recurrent unit of PyTorch and flax.

    The reset gate stands behind the product of the hidden state, not in front of it. So every weight acts on its own
    unit, and on the others a step later only: traces that follow all units are those of exact gradients.
    """

    def __init__(self, in_size, out_size):
        super().__init__()
        Linear, self.size = braintrace.nn.Linear, out_size
        self.Wz, self.Wr = Linear(in_size + out_size, out_size), Linear(in_size + out_size, out_size)
        self.Wx, self.Wh = Linear(in_size, out_size), Linear(out_size, out_size)

    def init_state(self, batch_size=None, **_):
        self.h = brainstate.HiddenState(jnp.zeros((self.size,) if batch_size is None else (batch_size, self.size)))

    def update(self, x):
        h = self.h.value
        xh = jnp.concatenate([x, h], -1)
        z, r = jax.nn.sigmoid(self.Wz(xh)), jax.nn.sigmoid(self.Wr(xh))
        self.h.value = (1 - z) * h + z * jnp.tanh(self.Wx(x) + r * self.Wh(h))
        return self.h.value


class DigitNet(brainstate.nn.Module):
    def __init__(self, cell, n_units, steps):
        super().__init__()
        if cell == "lru":  # as wide as its input; the units are what it keeps inside
            self.cell = braintrace.nn.LRUCell(TUNED, n_units, r_min=1 - 4 / steps, r_max=1 - 0.4 / steps)
        else:
            kind = braintrace.nn.GRUCell if cell == "gru" else ResetAfterGRU
            self.cell = kind(TUNED, n_units)
        self.readout = braintrace.nn.Linear(TUNED if cell == "lru" else n_units, 10)

    def update(self, x):
        return self.readout(jax.nn.gelu(self.cell(x)))


def load(size, seed):
    """Images `(sample, size * size)` and labels, split; magnified by bilinear interpolation."""
    digits = load_digits()
    images = jax.image.resize(digits.images / 16.0, (len(digits.images), size, size), "bilinear")
    images = np.asarray(images).reshape(len(images), -1)
    return train_test_split(images, digits.target, test_size=TEST_SIZE, stratify=digits.target, random_state=seed)


def encode(images):
    """What neurons tuned to a brightness say to each pixel, `(steps, batch, TUNED)`."""
    distance = images.T[..., None] - np.linspace(0, 1, TUNED)
    return np.exp(-((distance * TUNED / 2) ** 2)).astype(np.float32)


def main():
    options = parser(__doc__.splitlines()[0], rules=(*RULES, "snap"))
    options.add_argument("--cell", choices=CELLS, default="lru")
    options.add_argument("--size", type=int, choices=[8, 28], default=8)
    options.add_argument("--units", type=int, help="by default 64 for 8x8 pixels, 32 for 28x28")
    args = options.parse_args()
    x_train, x_test, y_train, y_test = load(args.size, args.seed)
    usual = 64 if args.size == 8 else 32
    batch, units = 4 if args.quick else 40, args.units or usual
    if args.size == 28:
        updates, learning_rate = 500, 1.5e-2
    else:
        updates, learning_rate = (1000, 5e-3) if args.cell == "lru" else (800, 1e-2)
    noise = 0.0 if args.cell == "lru" else 0.05  # in brightness: a GRU learns these few images by heart

    def draw(rng, batch, steps):
        chosen = rng.choice(len(x_train), batch, replace=False)
        images = x_train[chosen]
        if noise:
            images = images + noise * rng.standard_normal(images.shape)
        return encode(images), y_train[chosen][None].astype(np.int32)

    def held_out():
        chosen = np.arange(TEST_SIZE).reshape(-1, batch)
        return [(encode(x_test[c]), y_test[c][None].astype(np.int32)) for c in chosen]

    task = Task(
        name=f"digits, {CELLS[args.cell]}{f' of {units} units' * (units != usual)}, {args.size**2} steps",
        build=lambda: DigitNet(args.cell, 8 if args.quick else units, args.size**2),
        draw=draw,
        held_out=held_out,
        steps=args.size**2,
        answer=1,
        batch=batch,
        updates=updates,
        learning_rate=learning_rate,
        anneal=args.cell != "lru",  # so that what rules find after a number of updates does not hang on the last few
        rates={"theta_log": 10 / args.size**2},  # an angle acts as often as a unit turns
    )
    run(task, args)


if __name__ == "__main__":
    main()
