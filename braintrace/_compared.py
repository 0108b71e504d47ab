"""Gradients to compare: of one rule, and of back-propagation, from the same state."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from ._arguments import loss_and_aux
from ._compile import _batch_in_place, _find, _first_sample
from ._mapped import ETraceVmap
from ._types import MultiStepData, SingleStepData

__all__ = ["CONVENTION", "Run", "arguments_of", "run_of_learner", "run_of_model", "shares_by_lag", "takes", "undone"]


class Run(NamedTuple):
    """The gradients of one loss, by back-propagation through ``call`` and by learners, as functions that are traced."""

    call: Any
    step_fn: Callable[..., Any]
    weights: Mapping[Any, brainstate.State]
    lags: tuple[int, ...]
    ends: tuple[int, ...]

    def bptt(self, sequences, mask):
        def objective():
            losses = brainstate.transform.for_loop(lambda *slices: self.step_fn(self.call, *slices), *sequences)
            return (losses * (mask / jnp.maximum(mask.sum(), 1)).astype(losses.dtype)).sum()

        return dict(brainstate.transform.grad(objective, self.weights)())

    def online(self, learner, sequences, mask):
        learner._per_sample.reset_state()
        options = {"step_fn": lambda *slices: self.step_fn(learner, *slices), "mask": mask, "weights": self.weights}
        return dict(learner.etrace_grad(*sequences, **options))

    def bptt_by_lag(self, sequences):
        """The gradient by what is added to the parameters, an own zero for each lag."""
        restart, depth = self._restart(sequences), self.lags[-1]
        places = np.searchsorted(self.lags, depth - np.arange(depth + 1))

        def shares(end):
            restart(end - depth)
            window = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, end - depth, depth + 1), sequences)
            held = {path: state.value for path, state in self.weights.items()}

            def step(added, place, slices):
                for path, state in self.weights.items():
                    state.value = jax.tree.map(lambda v, a: v + a[place], held[path], added[path])
                loss = self.step_fn(self.call, *slices)
                for path, state in self.weights.items():
                    state.value = held[path]
                return loss

            def objective(added):
                return brainstate.transform.for_loop(lambda i, x: step(added, i, x), places, window)[-1]

            return brainstate.transform.grad(objective)(self._zeros())

        return self._summed(shares)

    def online_by_lag(self, learner, sequences):
        """For each lag the gradient with traces that start so long before the loss."""
        restart = self._restart(sequences)
        loss = lambda t: self.step_fn(learner, *jax.tree.map(lambda x: x[t], sequences))  # noqa: E731

        def advance(t):
            loss(t)
            return t + 1

        def gradient(end, lag):
            restart(end - lag)
            learner._per_sample.reset_state()
            brainstate.transform.while_loop(lambda t: t < end, advance, end - lag)
            return dict(brainstate.transform.grad(lambda: loss(end), self.weights)())

        return self._summed(
            lambda end: brainstate.transform.for_loop(lambda lag: gradient(end, lag), jnp.array(self.lags))
        )

    def _restart(self, sequences):
        """A function of a step that sets all states that the model writes to their values before it."""
        with brainstate.StateTraceStack() as touched:
            self.step_fn(self.call, *jax.tree.map(lambda x: x[0], sequences))
        touched.recovery_original_values()
        states = [s for s, written in zip(touched.states, touched.been_writen) if written]

        def step(*slices):
            before = [state.value for state in states]
            self.step_fn(self.call, *slices)
            return before

        values = brainstate.transform.for_loop(step, *sequences)

        def restart(t):
            for state, value in zip(states, values):
                state.value = jax.tree.map(lambda x: x[t], value)

        return restart

    def _zeros(self):
        zeros = lambda x: jnp.zeros((len(self.lags), *jnp.shape(x)), jnp.result_type(x))  # noqa: E731
        return {path: jax.tree.map(zeros, state.value) for path, state in self.weights.items()}

    def _summed(self, f):
        def add(total, end):
            return jax.tree.map(jnp.add, total, f(end)), None

        return brainstate.transform.scan(add, self._zeros(), jnp.array(self.ends))[0]


def undone(run, *arrays):
    """``run(*arrays)`` as one program that leaves every state as it was."""

    @brainstate.transform.jit
    def program(*arrays):
        with brainstate.StateTraceStack() as touched:
            out = run(*arrays)
        touched.recovery_original_values()
        return out

    return program(*arrays)


def shares_by_lag(gradients: jax.Array) -> np.ndarray:
    """Differences of successive lags; what is within rounding of the gradient is zero."""
    eps = float(jnp.finfo(gradients.dtype).eps)
    wide = np.asarray(gradients).astype(np.complex128 if jnp.iscomplexobj(gradients) else np.float64)
    shares = np.diff(wide, axis=0, prepend=np.zeros_like(wide[:1]))
    norm = lambda x: np.linalg.norm(x.reshape(len(x), -1), axis=1)  # noqa: E731
    shares[norm(shares) <= 8 * eps * norm(wide)] = 0
    return shares


@contextlib.contextmanager
def run_of_learner(learner, step_fn, slices):
    """``(call of the plain model, {label: learner})``"""
    learner._driven()
    model = learner._per_sample.model4compile
    if isinstance(learner, ETraceVmap):
        states, out_states = learner._filters.value
        model = brainstate.nn.Vmap(
            model, learner.in_axes, learner.out_axes, states, out_states, learner.axis_name, learner.axis_size
        )
    arguments_of(model, step_fn, slices)
    yield model, {type(learner._per_sample).__name__: learner}


@contextlib.contextmanager
def run_of_model(model, step_fn, slices, rules, batch_size, vmap):
    learners = {}
    for label, (rule, options) in rules.items():
        with _noting(f"This is the rule {label!r}."):
            learners[label] = _find(rule)(model, **options)
    if vmap:
        _first_sample((), batch_size)  # says that there has to be a size
    with _as_before(model):
        if vmap:
            _initialise(model, batch_size)
            args, kwargs = arguments_of(brainstate.nn.Vmap(model, vmap_states="new"), step_fn, slices)
            _initialise(model, batch_size, learners, *_first_sample((args, kwargs), batch_size))
            mapped = {label: ETraceVmap(learner, vmap_states="new") for label, learner in learners.items()}
            yield brainstate.nn.Vmap(model, vmap_states="new"), mapped
        else:
            brainstate.nn.init_all_states(model, batch_size=batch_size)
            with _batch_in_place(batch_size, slices):
                args, kwargs = arguments_of(model, step_fn, slices)
            for learner in learners.values():
                learner.compile_graph(*args, **kwargs)
            yield model, learners


def _initialise(model, batch_size, learners=(), args=(), kwargs=None):
    @brainstate.transform.vmap_new_states(state_tag="new", axis_size=batch_size)
    def initialise():
        brainstate.nn.init_all_states(model)
        for label in learners:
            learners[label].compile_graph(*args, **kwargs)

    initialise()


@contextlib.contextmanager
def _noting(note: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if note:
            error.add_note(note)
        raise


@contextlib.contextmanager
def _as_before(model: brainstate.nn.Module) -> Iterator[None]:
    """Keep the state objects of a model, their values and the random state through an initialisation."""
    holders: dict[int, tuple[Any, Any]] = {}

    def visit(x):
        if id(x) in holders:
            return
        if isinstance(x, brainstate.State):
            holders[id(x)] = (x, x.value)
        elif isinstance(x, brainstate.graph.Node):
            visit(vars(x))
        elif isinstance(x, (dict, list, tuple)):
            if not isinstance(x, tuple):
                holders[id(x)] = (x, x.copy())
            for item in x.values() if isinstance(x, dict) else x:
                visit(item)

    visit(model)
    visit(brainstate.random.DEFAULT)
    try:
        yield
    finally:
        for x, kept in holders.values():
            if isinstance(x, brainstate.State):
                x.value = kept
            elif isinstance(x, dict):
                x.clear()
                x.update(kept)
            else:
                x[:] = kept


def arguments_of(call, step_fn, slices):
    """Shapes of what ``step_fn`` calls the model with; errors for what it does otherwise."""
    found: list[Any] = []

    def recorded(*args, **kwargs):
        wrapped = lambda x: isinstance(x, (SingleStepData, MultiStepData))  # noqa: E731
        if any(map(wrapped, jax.tree.leaves((args, kwargs), is_leaf=wrapped))):
            raise TypeError("step_fn passes on SingleStepData or MultiStepData. Pass bare arrays of one step to call.")
        abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x  # noqa: E731
        found.append(jax.tree.map(abstract, (args, kwargs)))
        return call(*args, **kwargs)

    def probe(*slices):
        loss_and_aux(step_fn(recorded, *slices), False, ())

    with _noting(f"{CONVENTION}." if takes(step_fn, len(slices)) is None else ""):
        undone(probe, *slices)
    if not found:
        raise ValueError(
            f"step_fn called neither its first argument nor the learner: nothing is compared. {CONVENTION}."
        )
    return found[0]


def takes(step_fn: Callable[..., Any], arguments: int) -> TypeError | None:
    """Why a function cannot be called with so many arguments."""
    try:
        inspect.signature(step_fn).bind(*range(arguments))
    except ValueError:  # not every callable has a signature
        return None
    except TypeError as error:
        return error
    return None


CONVENTION = (
    "step_fn(call, *slices) runs one step by its first argument, which is the learner of a rule, or the plain model "
    "for BPTT: step_fn=lambda call, x, y: loss(call(x), y)"
)
