"""Teach a recurrent spiking network to read handwritten digits, online.

Two scan lines cross each 8x8 digit of scikit-learn, one row and one column at a time. Each of their 16 pixels
drives one input neuron, which fires the more often the brighter the pixel. The network never sees the digit as a
whole: it has to remember what the scan lines have passed.

It is trained twice from the same initial weights, on the same batches in the same order: with `pp_prop`, whose
memory does not grow with the length of the sequence, and with back-propagation through time (BPTT).

    python examples/quickstart.py --out quickstart.png
"""

import argparse
import time
from pathlib import Path

import brainpy
import brainstate
import braintools
import brainunit as u
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import braintrace

STEPS_PER_LINE = 6  # milliseconds that the scan lines rest on one row and one column
BATCH = 60
TEST_SIZE = 6 * BATCH


class DigitNet(brainstate.nn.Module):
    """Leaky integrate-and-fire neurons that excite and inhibit each other, and a leaky readout of their spikes."""

    def __init__(self, n_in, n_units, n_out):
        super().__init__()
        self.neurons = brainpy.state.LIF(n_units, tau=20.0 * u.ms, V_th=1.0 * u.mV)
        self.synapses_in = self.connect(n_in, braintools.init.Normal(0.0 * u.mS, 2.0 * u.mS))
        self.synapses_rec = self.connect(n_units, braintools.init.KaimingNormal(scale=0.1, unit=u.mS))
        w_out = braintools.init.KaimingNormal(scale=0.1)
        self.readout = braintrace.nn.LeakyRateReadout(n_units, n_out, tau=50.0 * u.ms, w_init=w_out)

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


def encode(images):
    """Turn images `(batch, 8, 8)` with pixels in [0, 1] into evenly spaced spikes `(time, batch, 16)`."""
    lines = np.concatenate([images, images.swapaxes(1, 2)], axis=-1)  # entry i holds row i and column i
    steps = np.arange(STEPS_PER_LINE + 1)[:, None, None, None]
    counts = np.floor(steps * lines + 0.5)  # how often a pixel has fired before each step
    spikes = np.diff(counts, axis=0).transpose(2, 0, 1, 3)  # (line, step, batch, 16)
    return jnp.asarray(spikes.reshape(-1, *spikes.shape[2:]), dtype=jnp.float32)


def load_data(seed):
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        digits.images / 16.0, digits.target, test_size=TEST_SIZE, stratify=digits.target, random_state=seed
    )
    return (encode(x_train), jnp.asarray(y_train)), (encode(x_test), jnp.asarray(y_test))


def batches(order):
    """Split an order of samples into whole batches."""
    return order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)


def cross_entropy(logits, labels):
    return braintools.metric.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def pp_prop_gradient(model, n_in):
    """Carry eligibility traces forward beside the network. Nothing runs backward in time."""
    learner = braintrace.compile(model, "pp_prop", jnp.zeros((BATCH, n_in)), batch_size=BATCH, decay_or_rank=0.9)
    learner.show_graph()

    def gradient(spikes, labels):
        def step_loss(x):
            return cross_entropy(learner(x), labels)

        learner.reset_state()
        return learner.etrace_grad(spikes, step_fn=step_loss, loss_output="scalar", return_value=True)

    return gradient


def bptt_gradient(model):
    """Differentiate the whole sequence, which keeps every time step in memory."""
    brainstate.nn.init_all_states(model, batch_size=BATCH)

    def gradient(spikes, labels):
        def loss():
            return brainstate.transform.for_loop(lambda x: cross_entropy(model(x), labels), spikes).mean()

        return brainstate.transform.grad(loss, model.states(brainstate.ParamState), return_value=True)()

    return gradient


def train(method, data, args):
    """Train a network with one method. Return it with its loss and test accuracy after every epoch."""
    (x_train, y_train), (x_test, y_test) = data
    brainstate.random.seed(args.seed)
    model = DigitNet(x_train.shape[-1], args.units, 10)
    gradient = pp_prop_gradient(model, x_train.shape[-1]) if method == "pp_prop" else bptt_gradient(model)
    schedule = braintools.optim.CosineAnnealingLR(1e-2, T_max=args.epochs)
    optimizer = braintools.optim.Adam(lr=schedule, grad_clip_norm=1.0)
    optimizer.register_trainable_weights(model.states(brainstate.ParamState))

    @brainstate.transform.jit
    def train_step(spikes, labels):
        brainstate.nn.reset_all_states(model, batch_size=BATCH)
        grads, loss = gradient(spikes, labels)
        optimizer.step(grads)
        return loss

    @brainstate.transform.jit
    def is_right(spikes, labels):
        brainstate.nn.reset_all_states(model, batch_size=BATCH)
        return brainstate.transform.for_loop(model, spikes)[-1].argmax(axis=-1) == labels

    shuffle = np.random.default_rng(args.seed)
    losses, accuracies = [], []
    progress = tqdm(range(args.epochs), desc=f"{method:>7}", ncols=100, postfix="compiling")
    for _ in progress:
        order = shuffle.permutation(len(y_train))
        losses.append(np.mean([train_step(x_train[:, i], y_train[i]) for i in batches(order)]))
        accuracies.append(np.mean([is_right(x_test[:, i], y_test[i]) for i in batches(np.arange(len(y_test)))]))
        schedule.step()
        progress.set_postfix(loss=f"{losses[-1]:.3f}", test=f"{accuracies[-1]:.3f}")
    return model, losses, accuracies


def record(model, spikes):
    """Run one sample `(time, 1, 16)`. Return the answer of the network and the spikes `(time, unit)` of its neurons."""
    brainstate.nn.init_all_states(model, batch_size=1)
    readout, fired = brainstate.transform.for_loop(lambda x: (model(x), model.neurons.get_spike()), spikes)
    return readout[-1, 0].argmax(), fired[:, 0]


def draw(results, spikes, label, path):
    """Plot the course of the training runs, and one test digit `(time, 1, 16)` in the eyes of the first network."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    loss, accuracy, raster = figure.subplots(1, 3, width_ratios=[1, 1, 1.4])
    for method, (_, losses, accuracies) in results.items():
        epochs = np.arange(1, len(losses) + 1)
        loss.plot(epochs, losses, label=method)
        accuracy.plot(epochs, accuracies, label=f"{method}: {accuracies[-1]:.3f}")
    loss.set(title="training loss", xlabel="epoch", ylim=(0, 1.5))
    accuracy.set(title="test accuracy", xlabel="epoch", ylim=(0.7, 1))
    loss.legend(frameon=False)
    accuracy.legend(frameon=False, loc="lower right")

    answer, fired = record(results["pp_prop"][0], spikes)
    n_units, n_in = fired.shape[1], spikes.shape[2]
    time_step, unit = np.nonzero(fired)
    raster.scatter(time_step, unit, s=4, color="black", linewidths=0)
    time_step, unit = np.nonzero(spikes[:, 0])
    raster.scatter(time_step, n_units + 5 + unit, s=4, color="tab:red", linewidths=0)
    raster.set(title=f"spikes for a test digit {label}, read as {answer}", xlabel="time (ms)")
    raster.set_yticks([n_units / 2, n_units + 5 + n_in / 2], ["network", "input"], rotation=90, va="center")
    raster.tick_params(axis="y", length=0)
    for axis in (loss, accuracy, raster):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--units", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="for the split, the initial weights and the batches")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two epochs of fifty neurons")
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"), help="where to save the picture")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.units = 2, 50

    start = time.perf_counter()
    data = load_data(args.seed)
    results = {method: train(method, data, args) for method in ["pp_prop", "BPTT"]}
    for method, (_, losses, accuracies) in results.items():
        print(f"{method:>7}: training loss {losses[-1]:.3f}, test accuracy {accuracies[-1]:.3f}")
    x_test, y_test = data[1]
    draw(results, x_test[:, :1], y_test[0], args.out)
    print(f"{time.perf_counter() - start:.0f} s in all; the picture is in {args.out}")


if __name__ == "__main__":
    brainstate.environ.set(dt=1.0 * u.ms)
    main()
