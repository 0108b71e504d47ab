"""What the tasks beside this file share: gradients by three methods, training, and what an update costs.

A task is a network and a function that draws a batch of trials: inputs `(time, batch, feature)`, the right class of
each step `(time, batch)`, and which steps count `(time,)`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import brainstate
import braintools
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import braintrace

MEMORY_STEPS = (200, 1000, 5000)
TEST_BATCHES = 10


@dataclass
class Task:
    name: str
    build: Callable[[], brainstate.nn.Module]
    draw: Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray, np.ndarray]]  # rng, batch, steps
    steps: int
    batch: int
    updates: int
    learning_rate: float
    decay: float  # of the traces of pp_prop


def cross_entropy(logits, labels):
    return braintools.metric.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def online_gradient(model, rule, example, **options):
    """Carry eligibility traces forward beside the network. Nothing runs backward in time."""
    learner = braintrace.compile(model, rule, example, batch_size=len(example), **options)

    def gradient(inputs, labels, mask):
        def step_loss(x, y):
            return cross_entropy(learner(x), y)

        learner.reset_state()
        return learner.etrace_grad(
            inputs, labels, step_fn=step_loss, mask=mask, loss_output="scalar", return_value=True
        )

    return gradient


def bptt_gradient(model, batch):
    """Differentiate the whole sequence, which keeps every time step in memory."""
    brainstate.nn.init_all_states(model, batch_size=batch)

    def gradient(inputs, labels, mask):
        def loss():
            losses = brainstate.transform.for_loop(lambda x, y: cross_entropy(model(x), y), inputs, labels)
            return (losses * mask).sum() / mask.sum()

        return brainstate.transform.grad(loss, model.states(brainstate.ParamState), return_value=True)()

    return gradient


class Trainer:
    """A network, the gradient of a sequence by one method, and an optimiser."""

    def __init__(self, task, method, seed):
        brainstate.random.seed(seed)
        self.task, self.method = task, method
        self.model = task.build()
        self.rng = np.random.default_rng(seed)
        example = jnp.asarray(self.batch(1)[0][0])
        if method == "bptt":
            self.gradient = bptt_gradient(self.model, task.batch)
        else:
            options = {"decay_or_rank": task.decay} if method == "pp_prop" else {}
            self.gradient = online_gradient(self.model, method, example, **options)
        self.optimizer = braintools.optim.Adam(lr=task.learning_rate, grad_clip_norm=1.0)
        self.optimizer.register_trainable_weights(self.model.states(brainstate.ParamState))

    def batch(self, steps):
        return tuple(map(jnp.asarray, self.task.draw(self.rng, self.task.batch, steps)))

    def update(self, inputs, labels, mask):
        brainstate.nn.reset_all_states(self.model, batch_size=self.task.batch)
        gradients, loss = self.gradient(inputs, labels, mask)
        self.optimizer.step(gradients)
        return loss

    def accuracy(self, inputs, labels, mask):
        """Share of right answers among the steps that count."""
        brainstate.nn.reset_all_states(self.model, batch_size=self.task.batch)
        right = brainstate.transform.for_loop(lambda x, y: (self.model(x).argmax(axis=-1) == y).mean(), inputs, labels)
        return (right * mask).sum() / mask.sum()

    def train(self):
        """Train on fresh batches. Return the test accuracy and the median time of an update, in seconds."""
        update, accuracy = map(brainstate.transform.jit, (self.update, self.accuracy))
        seconds = []
        progress = tqdm(range(self.task.updates), desc=self.method, ncols=100)
        for _ in progress:
            batch = self.batch(self.task.steps)
            start = time.perf_counter()
            loss = float(update(*batch))
            seconds.append(time.perf_counter() - start)
            progress.set_postfix(loss=f"{loss:.3f}")
        right = np.mean([accuracy(*self.batch(self.task.steps)) for _ in range(TEST_BATCHES)])
        return right, statistics.median(seconds)

    def memory(self, steps):
        """Bytes that one update on sequences of this length allocates: its temporary arrays and its results."""
        compiled = brainstate.transform.jit(self.update).compile(*self.batch(steps))
        used = compiled.memory_analysis()
        print(used)
        return used.temp_size_in_bytes


def parse(description, updates):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--method", choices=["pp_prop", "d_rtrl", "bptt"], default="d_rtrl")
    parser.add_argument("--updates", type=int, default=updates)
    parser.add_argument("--seed", type=int, default=0, help="for the initial weights and the trials")
    parser.add_argument("--quick", action="store_true", help="a smoke run: a few updates on short trials")
    parser.add_argument("--memory", action="store_true", help=f"also print the memory for {MEMORY_STEPS} steps")
    return parser


def run(task, args):
    trainer = Trainer(task, args.method, args.seed)
    accuracy, seconds = trainer.train()
    print(f"{task.name}, {args.method}, seed {args.seed}: accuracy {accuracy:.3f}, {seconds:.3f} s per update")
    for steps in MEMORY_STEPS if args.memory else (task.steps,):
        print(f"{task.name}, {args.method}: {trainer.memory(steps) / 2**20:.1f} MiB for {steps} steps")
