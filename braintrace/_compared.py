"""Gradients to compare: of one rule, and of back-propagation, from the same state."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from ._arguments import checked_loss
from ._compile import _batch_in_place, _find, _first_sample
from ._compiler.attributes import kept_attributes
from ._learners.base import ETraceAlgorithm
from ._mapped import ETraceVmap
from ._sequence import SequenceDriverMixin
from ._types import MultiStepData, Path, PyTree, SingleStepData

__all__ = [
    "CONVENTION", "Rules", "Run", "arguments_of", "run_of_learner", "run_of_model", "shares_by_lag", "takes", "undone",
]  # fmt: skip

Call: TypeAlias = Callable[..., PyTree]  # of the model, or of what stands for it
Arguments: TypeAlias = tuple[tuple[PyTree, ...], dict[str, PyTree]]
Gradients: TypeAlias = dict[Path, PyTree]
Rules: TypeAlias = dict[str, tuple[Any, dict[str, Any]]]  # label -> what `compile` takes for a rule, and its options
Made: TypeAlias = Iterator[tuple[Call, Mapping[str, SequenceDriverMixin]]]  # call of the plain model, label -> learner


class Run(NamedTuple):
    """The gradients of one loss, by back-propagation through ``call`` and by learners, as functions that are traced."""

    call: Call
    step_fn: Callable[..., jax.Array]
    weights: Mapping[Path, brainstate.State]
    lags: tuple[int, ...]
    ends: tuple[int, ...]

    def bptt(self, sequences: tuple[PyTree, ...], mask: jax.Array) -> Gradients:
        def objective() -> jax.Array:
            losses = brainstate.transform.for_loop(lambda *slices: self.step_fn(self.call, *slices), *sequences)
            return (losses * (mask / jnp.maximum(mask.sum(), 1)).astype(losses.dtype)).sum()

        return dict(brainstate.transform.grad(objective, self.weights)())

    def online(self, learner: SequenceDriverMixin, sequences: tuple[PyTree, ...], mask: jax.Array) -> Gradients:
        learner._per_sample.reset_state()
        loss = lambda *slices: self.step_fn(learner, *slices)  # noqa: E731
        return dict(learner.etrace_grad(*sequences, step_fn=loss, mask=mask, weights=self.weights))

    def bptt_by_lag(self, sequences: tuple[PyTree, ...]) -> Gradients:
        """The gradient by what is added to the parameters, an own zero for each lag."""
        restart, depth = self._restart(sequences), self.lags[-1]
        places = np.searchsorted(self.lags, depth - np.arange(depth + 1))

        def shares(end: jax.Array) -> Gradients:
            restart(end - depth)
            window = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, end - depth, depth + 1), sequences)
            held = {path: state.value for path, state in self.weights.items()}

            def step(added: Gradients, place: jax.Array, slices: tuple[PyTree, ...]) -> jax.Array:
                for path, state in self.weights.items():
                    state.value = jax.tree.map(lambda v, a: v + a[place], held[path], added[path])
                loss = self.step_fn(self.call, *slices)
                for path, state in self.weights.items():
                    state.value = held[path]
                return loss

            def objective(added: Gradients) -> jax.Array:
                return brainstate.transform.for_loop(lambda i, x: step(added, i, x), places, window)[-1]

            return brainstate.transform.grad(objective)(self._zeros())

        return self._summed(shares)

    def online_by_lag(self, learner: SequenceDriverMixin, sequences: tuple[PyTree, ...]) -> Gradients:
        """For each lag the gradient with traces that start so long before the loss."""
        restart = self._restart(sequences)
        loss = lambda t: self.step_fn(learner, *jax.tree.map(lambda x: x[t], sequences))  # noqa: E731

        def advance(t: jax.Array) -> jax.Array:
            loss(t)
            return t + 1

        def gradient(end: jax.Array, lag: jax.Array) -> Gradients:
            restart(end - lag)
            learner._per_sample.reset_state()
            brainstate.transform.while_loop(lambda t: t < end, advance, end - lag)
            return dict(brainstate.transform.grad(lambda: loss(end), self.weights)())

        return self._summed(
            lambda end: brainstate.transform.for_loop(lambda lag: gradient(end, lag), jnp.array(self.lags))
        )

    def _restart(self, sequences: tuple[PyTree, ...]) -> Callable[[jax.Array], None]:
        """A function of a step that sets all states that the model writes to their values before it."""
        with brainstate.StateTraceStack() as touched:
            self.step_fn(self.call, *jax.tree.map(lambda x: x[0], sequences))
        touched.recovery_original_values()
        states = [s for s, written in zip(touched.states, touched.been_writen) if written]

        def step(*slices: PyTree) -> list[PyTree]:
            before = [state.value for state in states]
            self.step_fn(self.call, *slices)
            return before

        values = brainstate.transform.for_loop(step, *sequences)

        def restart(t: jax.Array) -> None:
            for state, value in zip(states, values):
                state.value = jax.tree.map(lambda x: x[t], value)

        return restart

    def _zeros(self) -> Gradients:
        zeros = lambda x: jnp.zeros((len(self.lags), *jnp.shape(x)), jnp.result_type(x))  # noqa: E731
        return {path: jax.tree.map(zeros, state.value) for path, state in self.weights.items()}

    def _summed(self, f: Callable[[jax.Array], Gradients]) -> Gradients:
        def add(total: Gradients, end: jax.Array) -> tuple[Gradients, None]:
            return jax.tree.map(jnp.add, total, f(end)), None

        return brainstate.transform.scan(add, self._zeros(), jnp.array(self.ends))[0]


def undone(run: Callable[..., PyTree], *arrays: PyTree) -> PyTree:
    """``run(*arrays)`` as one program that leaves every state as it was."""

    @brainstate.transform.jit
    def program(*arrays: PyTree) -> PyTree:
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
def run_of_learner(learner: SequenceDriverMixin, step_fn: Callable[..., jax.Array], slices: tuple[PyTree, ...]) -> Made:
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
def run_of_model(
    model: brainstate.nn.Module,
    step_fn: Callable[..., jax.Array],
    slices: tuple[PyTree, ...],
    rules: Rules,
    batch_size: int | None,
    vmap: bool,
) -> Made:
    learners: dict[str, ETraceAlgorithm] = {}
    for label, (rule, options) in rules.items():
        with _noting(f"This is the rule {label!r}."):
            learners[label] = _find(rule)(model, **options)
    if vmap:
        _first_sample((), batch_size)  # says that there has to be a size
    with _as_before(model):
        if vmap:
            _initialise(model, batch_size)
            args, kwargs = arguments_of(brainstate.nn.Vmap(model, vmap_states="new"), step_fn, slices)
            _initialise(model, batch_size, learners.values(), *_first_sample((args, kwargs), batch_size))
            mapped = {label: ETraceVmap(learner, vmap_states="new") for label, learner in learners.items()}
            yield brainstate.nn.Vmap(model, vmap_states="new"), mapped
        else:
            brainstate.nn.init_all_states(model, batch_size=batch_size)
            with _batch_in_place(batch_size, slices):
                args, kwargs = arguments_of(model, step_fn, slices)
            for learner in learners.values():
                learner.compile_graph(*args, **kwargs)
            yield model, learners


def _initialise(
    model: brainstate.nn.Module,
    batch_size: int | None,
    learners: Iterable[ETraceAlgorithm] = (),
    args: tuple[PyTree, ...] = (),
    kwargs: Mapping[str, PyTree] | None = None,
) -> None:
    @brainstate.transform.vmap_new_states(state_tag="new", axis_size=batch_size)
    def initialise() -> None:
        brainstate.nn.init_all_states(model)
        for learner in learners:
            learner.compile_graph(*args, **(kwargs or {}))

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

    def visit(x: object) -> None:
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


def arguments_of(
    model: brainstate.nn.Module, step_fn: Callable[..., jax.Array], slices: tuple[PyTree, ...]
) -> Arguments:
    """Shapes of what ``step_fn`` calls the model with; errors for what it does otherwise."""
    found: list[Arguments] = []

    def recorded(*args: PyTree, **kwargs: PyTree) -> PyTree:
        wrapped = lambda x: isinstance(x, (SingleStepData, MultiStepData))  # noqa: E731
        if any(map(wrapped, jax.tree.leaves((args, kwargs), is_leaf=wrapped))):
            raise TypeError("step_fn passes on SingleStepData or MultiStepData. Pass bare arrays of one step to call.")
        abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x  # noqa: E731
        found.append(jax.tree.map(abstract, (args, kwargs)))
        return model(*args, **kwargs)

    def probe(*slices: PyTree) -> None:
        checked_loss("step_fn", step_fn(recorded, *slices), ())

    note = f"{CONVENTION}." if takes(step_fn, len(slices)) is None else ""
    with _noting(note), kept_attributes(model):
        undone(probe, *slices)
    if not found:
        raise ValueError(
            f"step_fn called neither its first argument nor the learner: nothing is compared. {CONVENTION}."
        )
    return found[0]


def takes(step_fn: Callable[..., PyTree], arguments: int) -> TypeError | None:
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
