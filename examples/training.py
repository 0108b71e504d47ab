"""What the tasks beside this file share: gradients by several methods, training, and what an update costs."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import brainstate
import braintools
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import braintrace

METHODS = ("immediate", "pp_prop", "hybrid", "d_rtrl", "bptt")
MEMORY_STEPS = (200, 1000, 5000)
TRACE_CHUNK = 50  # steps; it divides the lengths above, which spares a copy of the inputs
TEST_BATCHES = 10


@dataclass
class Task:
    """A network, and trials of any length to train it on.

    `draw(rng, batch, steps)` returns inputs `(steps, batch, feature)`, targets `(steps, batch)`, and the mask
    `(steps,)` of the steps that count. `loss` and `score` take the outputs and the targets of one step.
    """

    build: Callable
    draw: Callable
    loss: Callable
    score: Callable
    score_name: str
    steps: int
    batch: int
    updates: int
    learning_rate: float
    decay: float  # of the traces of pp_prop, and of those that hybrid leaves to it


def online_gradient(task, model, rule, example):
    """Carry eligibility traces forward beside the network. Nothing runs backward in time."""
    options = {"decay_or_rank": task.decay} if rule in ("pp_prop", "hybrid") else {}
    learner = braintrace.compile(model, rule, example, batch_size=task.batch, **options)

    def gradient(inputs, targets, mask):
        def step_loss(x, y):
            return task.loss(learner(x), y)

        learner.reset_state()
        return learner.etrace_grad(
            inputs,
            targets,
            step_fn=step_loss,
            mask=mask,
            trace_chunk=TRACE_CHUNK,
            loss_output="scalar",
            return_value=True,
        )

    return gradient


def bptt_gradient(task, model):
    """Differentiate the whole sequence, which keeps every time step in memory."""
    brainstate.nn.init_all_states(model, batch_size=task.batch)

    def gradient(inputs, targets, mask):
        def loss():
            losses = brainstate.transform.for_loop(lambda x, y: task.loss(model(x), y), inputs, targets)
            return (losses * mask).sum() / mask.sum()

        return brainstate.transform.grad(loss, model.states(brainstate.ParamState), return_value=True)()

    return gradient


class Trainer:
    """A network, its gradient by one method, and an optimiser."""

    def __init__(self, task, method, seed):
        brainstate.random.seed(seed)
        self.task, self.method = task, method
        self.model = task.build()
        self.rng = np.random.default_rng(seed)
        if method == "bptt":
            self.gradient = bptt_gradient(task, self.model)
        else:
            inputs, _, _ = self.batch(task.steps)
            self.gradient = online_gradient(task, self.model, method, inputs[0])
        self.optimizer = braintools.optim.Adam(lr=task.learning_rate, grad_clip_norm=1.0)
        self.optimizer.register_trainable_weights(self.model.states(brainstate.ParamState))

    def batch(self, steps):
        return tuple(map(jnp.asarray, self.task.draw(self.rng, self.task.batch, steps)))

    def update(self, inputs, targets, mask):
        brainstate.nn.reset_all_states(self.model, batch_size=self.task.batch)
        gradients, loss = self.gradient(inputs, targets, mask)
        self.optimizer.step(gradients)
        return loss

    def score(self, inputs, targets, mask):
        """Mean score of the steps that count."""
        brainstate.nn.reset_all_states(self.model, batch_size=self.task.batch)
        scores = brainstate.transform.for_loop(lambda x, y: self.task.score(self.model(x), y), inputs, targets)
        return (scores * mask).sum() / mask.sum()

    def train(self):
        """Train on fresh trials. Return the score on other trials and the seconds of the fastest update."""
        update, score = map(brainstate.transform.jit, (self.update, self.score))
        seconds = []
        progress = tqdm(range(self.task.updates), desc=self.method, ncols=100, mininterval=0.5)
        for _ in progress:
            batch = self.batch(self.task.steps)
            start = time.perf_counter()
            loss = float(update(*batch))
            seconds.append(time.perf_counter() - start)
            progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        return np.mean([score(*self.batch(self.task.steps)) for _ in range(TEST_BATCHES)]), min(seconds)

    def memory(self, steps):
        """Bytes of the temporary arrays that XLA plans for one update on trials of this length. Nothing runs."""
        compiled = brainstate.transform.jit(self.update).compile(*self.batch(steps))
        return compiled.memory_analysis().temp_size_in_bytes


def parser(description):
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--method", choices=METHODS, default="d_rtrl")
    options.add_argument("--seed", type=int, default=0, help="for the initial weights and the trials")
    options.add_argument("--quick", action="store_true", help="a smoke run: three updates of a small network")
    options.add_argument("--memory", action="store_true", help=f"print the memory for {MEMORY_STEPS} steps")
    return options


def run(task, args):
    trainer = Trainer(task, args.method, args.seed)
    score, seconds = trainer.train()
    print(f"{args.method}, seed {args.seed}: {task.score_name} {score:.4f}, {seconds:.3f} s per update")
    for steps in MEMORY_STEPS if args.memory else [task.steps]:
        print(f"{args.method}: {trainer.memory(steps) / 2**20:.1f} MiB of temporary memory for {steps} steps")
