"""What the tasks beside this file share: gradients by several rules, training, a picture, a line of JSON."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import brainstate
import braintools
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import braintrace

RULES = ("immediate", "pp_prop", "hybrid", "d_rtrl", "bptt")
OPTIMIZERS = {  # and what their learning rate is to that of Adam
    "adam": (1.0, braintools.optim.Adam),
    "sgd": (10.0, partial(braintools.optim.SGD, momentum=0.9)),
    "rmsprop": (0.3, partial(braintools.optim.RMSprop, alpha=0.9)),
}
MEMORY_STEPS = (200, 1000, 5000)
TEST_BATCHES = 10


def cross_entropy(logits, labels):
    return braintools.metric.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits, labels):
    """Fraction of the trials that are answered right, by all steps of the answer together: their label is the same."""
    return (logits.mean(axis=0).argmax(axis=-1) == labels[0]).mean()


@dataclass
class Task:
    """A network, and trials of any length to train it on.

    `draw(rng, batch, steps)` returns inputs `(steps, batch, feature)`, and targets `(answer, batch)` of the last steps,
    those that count. `loss` takes outputs and targets of one of these steps, `score` those of all.
    """

    name: str
    build: Callable
    draw: Callable
    steps: int
    answer: int
    batch: int
    updates: int
    learning_rate: float  # of Adam
    anneal: bool = False  # whether the learning rate falls to zero along a cosine
    rates: dict = field(default_factory=dict)  # by the name of a parameter: its part of the learning rate, if not all
    loss: Callable = cross_entropy
    score: Callable = accuracy
    score_name: str = "accuracy"
    decay: Any = 0.9  # of the traces of pp_prop, and of those that hybrid leaves to it
    exact: Any = "free"  # what hybrid keeps exactly
    step: Callable | None = None  # the loss of a step as a function of model, call, input and target, if not `loss`
    held_out: Callable | None = None  # returns batches to be scored on; by default, fresh ones


def step_loss(task, model, call, x, y):
    return task.step(model, call, x, y) if task.step else task.loss(call(x), y)


def online_gradient(task, model, rule, example):
    """Carry eligibility traces forward beside the network. Nothing runs backward in time."""
    options = {
        "pp_prop": {"decay_or_rank": task.decay},
        "hybrid": {"decay_or_rank": task.decay, "exact": task.exact},
        "three_factor": {"modulator": 0.0},  # until a step brings its own
        "snap": {"n": 2},
    }
    kind = braintrace.SnAp if rule == "snap" else rule
    learner = braintrace.compile(model, kind, example, batch_size=task.batch, **options.get(rule, {}))

    def gradient(before, inputs, targets):
        learner.reset_state()
        learner.etrace_evolve(before)
        return learner.etrace_grad(
            inputs,
            targets,
            step_fn=lambda x, y: step_loss(task, model, learner, x, y),
            loss_output="scalar",
            return_value=True,
        )

    return gradient


def bptt_gradient(task, model):
    """Differentiate the whole sequence, which keeps every time step in memory."""
    brainstate.nn.init_all_states(model, batch_size=task.batch)

    def gradient(before, inputs, targets):
        def loss():
            evolve(model, before)
            step = lambda x, y: step_loss(task, model, model, x, y)  # noqa: E731
            return brainstate.transform.for_loop(step, inputs, targets).mean()

        return brainstate.transform.grad(loss, model.states(brainstate.ParamState), return_value=True)()

    return gradient


def evolve(model, inputs):
    def step(x):
        model(x)

    brainstate.transform.for_loop(step, inputs)


class Trainer:
    """A network, its gradient by one rule, and an optimiser."""

    def __init__(self, task, args):
        brainstate.random.seed(args.seed)
        self.task, self.rule = task, args.rule
        self.model = task.build()
        self.rng = np.random.default_rng(args.seed)
        if args.rule == "bptt":
            self.gradient = bptt_gradient(task, self.model)
        else:
            _, inputs, _ = self.draw(task.steps)
            self.gradient = online_gradient(task, self.model, args.rule, inputs[0])
        self.updates = args.updates or (3 if args.quick else task.updates)
        self.optimizers, self.schedules = {}, []
        weights = self.model.states(brainstate.ParamState)
        scale, kind = OPTIMIZERS[args.optimizer]
        for factor in {1.0, *task.rates.values()}:
            lr = scale * factor * (args.lr or task.learning_rate)
            if task.anneal:
                lr = braintools.optim.CosineAnnealingLR(lr, T_max=self.updates)
                self.schedules.append(lr)
            optimizer = self.optimizers[factor] = kind(lr=lr, grad_clip_norm=1.0)
            optimizer.register_trainable_weights(self.of_rate(factor, weights))
        self.losses, self.seconds = [], []

    def draw(self, steps):
        return self.parts(*self.task.draw(self.rng, self.task.batch, steps))

    def parts(self, inputs, targets):
        """Inputs before the steps that count, those of these steps, and targets: apart, as a slice would be a copy."""
        return tuple(map(jnp.asarray, (inputs[: -self.task.answer], inputs[-self.task.answer :], targets)))

    def update(self, *batch):
        brainstate.nn.reset_all_states(self.model, batch_size=self.task.batch)
        gradients, loss = self.gradient(*batch)
        for factor, optimizer in self.optimizers.items():
            optimizer.step(self.of_rate(factor, gradients))
        for schedule in self.schedules:
            schedule.step()
        return loss

    def of_rate(self, factor, values):
        return {path: v for path, v in values.items() if self.task.rates.get(path[-1], 1.0) == factor}

    def score(self, before, inputs, targets):
        brainstate.nn.reset_all_states(self.model, batch_size=self.task.batch)
        evolve(self.model, before)
        return self.task.score(brainstate.transform.for_loop(self.model, inputs), targets)

    def train(self):
        update = brainstate.transform.jit(self.update)
        progress = tqdm(range(self.updates), desc=self.rule, ncols=100, mininterval=0.5)
        for _ in progress:
            batch = self.draw(self.task.steps)
            start = time.perf_counter()
            self.losses.append(float(update(*batch)))
            self.seconds.append(time.perf_counter() - start)
            progress.set_postfix(loss=f"{self.losses[-1]:.4f}", refresh=False)

    def test(self):
        """Mean score on trials that were not trained on."""
        held_out = self.task.held_out
        batches = (
            (self.parts(*b) for b in held_out())
            if held_out
            else (self.draw(self.task.steps) for _ in range(TEST_BATCHES))
        )
        score = brainstate.transform.jit(self.score)
        return float(np.mean([score(*batch) for batch in batches]))

    def memory(self, steps):
        """MiB of the temporary arrays that XLA plans for one update on trials of this length. Nothing runs."""
        compiled = brainstate.transform.jit(self.update).compile(*self.draw(steps))
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    def picture(self, path):
        """The loss while learning, and one trial: its inputs, and what the network makes of them."""
        inputs = jnp.concatenate(self.draw(self.task.steps)[:2])
        brainstate.nn.reset_all_states(self.model, batch_size=self.task.batch)
        outputs = brainstate.transform.for_loop(self.model, inputs)

        def draw(axes):
            axes[0].plot(self.losses)
            axes[0].set(title=f"{self.task.name}, {self.rule}", xlabel="update", ylabel="loss")
            axes[1].imshow(inputs[:, 0].T, aspect="auto", cmap="gray_r", interpolation="nearest")
            axes[1].set(title="a trial", xlabel="step", ylabel="input")
            axes[2].plot(outputs[:, 0])
            axes[2].axvspan(self.task.steps - self.task.answer, self.task.steps, color="C1", alpha=0.2)
            axes[2].set(title="outputs, and the steps that count", xlabel="step")

        save(path, draw)


def save(path, draw, panels=3):
    from matplotlib.figure import Figure  # here, so that runs without a picture need no matplotlib

    figure = Figure(figsize=(4 * panels, 3.2), layout="constrained")
    draw(figure.subplots(1, panels))
    figure.savefig(path, dpi=120)


def parser(description, rules=RULES):
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--rule", choices=rules, default="d_rtrl")
    options.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    options.add_argument("--seed", type=int, default=0, help="for the initial weights and the trials")
    options.add_argument("--updates", type=int, help="how often the weights change; by default, what the task needs")
    options.add_argument("--lr", type=float, help="learning rate of Adam; those of the other optimisers follow from it")
    options.add_argument("--quick", action="store_true", help="a smoke run: three updates of a small network")
    options.add_argument("--memory", action="store_true", help=f"print the memory for {MEMORY_STEPS} steps")
    options.add_argument("--out", type=Path, help="draw the run into this file")
    return options


def report(args, task, score_name, score, updates, seconds, memory):
    """Print what a table of results needs, as one line of JSON."""
    record = dict(task=task, rule=args.rule, optimizer=args.optimizer, seed=args.seed, measure=score_name, score=score)
    record |= dict(updates=updates, seconds_per_update=seconds, temporary_mib=memory)
    print(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}))


def run(task, args):
    trainer = Trainer(task, args)
    trainer.train()
    for steps in MEMORY_STEPS if args.memory else ():
        print(f"{args.rule}: {trainer.memory(steps):.3g} MiB of temporary memory for {steps} steps")
    if args.out:
        trainer.picture(args.out)
    seconds = float(np.median(trainer.seconds))
    report(args, task.name, task.score_name, trainer.test(), trainer.updates, seconds, trainer.memory(task.steps))
