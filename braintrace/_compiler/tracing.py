"""A model's step, traced once: under which conditions, and with which entries of the environment as inputs."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import brainstate
import brainunit as u
import jax
import numpy as np
from jax.tree_util import PyTreeDef

from .._jax import ClosedJaxpr, Jaxpr, Literal, consts_of, is_tracer, open_jaxpr
from .._types import Path, PyTree, path_str
from .attributes import Written, kept_attributes
from .call import Call
from .diagnostics import CompilationRecord

__all__ = ["check_structure", "traced_with_numbers"]

NEEDS_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.TracerArrayConversionError,
)
_tracing: contextvars.ContextVar[bool] = contextvars.ContextVar("tracing a step", default=False)


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    if _tracing.get():
        raise NotImplementedError(
            "A model is compiled while a step of another one is traced for compilation. Compile a learner before, not "
            "within, the update of a model that is to be compiled."
        )
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


_NO_STATES = brainstate.nn.Module.init_state


@contextlib.contextmanager
def _initialised() -> Iterator[None]:
    """Say what makes the states, where a layer has none of its own."""
    try:
        yield
    except Exception as error:
        found: BaseException | None = error
        while not isinstance(found, (AttributeError, type(None))):
            found = found.__cause__  # a container says in which of its modules it was
        if found is None:
            raise
        layer: Any = found.obj
        has_states = isinstance(layer, brainstate.nn.Module) and type(layer).init_state is not _NO_STATES
        if not has_states or found.name in vars(layer):
            raise
        raise AttributeError(
            f"{found}. If that is a state, it is not initialised: call brainstate.nn.init_all_states(model) before "
            "compile_graph, or let braintrace.compile do both.",
            name=found.name,
            obj=layer,
        ) from error


@contextlib.contextmanager
def _same_states(model: brainstate.nn.Module) -> Iterator[None]:
    """Leave the states as they were even where tracing fails, and name the one that could not take its value back."""
    before = [(path, state, state._value) for path, state in model.states().items()]
    try:
        yield
    except Exception as error:
        left = [state._value for _, state, _ in before]
        for _, state, value in before:
            state._value = value
        if isinstance(error, ValueError):
            for (path, _, old), new in zip(before, left):
                check_structure(path, old, new)
        raise


class TracedStep(NamedTuple):
    """A step that is traced already.

    Attributes
    ----------
    function : StatefulFunction
    args : tuple
        What to ask it for.
    records : list of CompilationRecord
        On what it writes beside states.
    """

    function: brainstate.transform.StatefulFunction
    args: tuple[PyTree, ...]
    records: list[CompilationRecord]

    @property
    def jaxpr(self) -> Jaxpr:
        return open_jaxpr(self.function.get_jaxpr(*self.args))


def traced_with_numbers(
    model: brainstate.nn.Module, call: Call
) -> tuple[TracedStep, dict[str, PyTree], tuple[str, ...]]:
    """The traced step, and numbers of the environment: those it reads, and names of fixed ones."""
    numbers = dict(call.inputs)
    fixed: tuple[str, ...] = ()
    try:
        traced = _traced(model, call, numbers)
    except NEEDS_VALUE:
        fixed = tuple(k for k, v in numbers.items() if not any(map(is_tracer, jax.tree.leaves(v))))
        if not fixed:
            raise
        numbers = {k: v for k, v in numbers.items() if k not in fixed}
        traced = _traced(model, call, numbers)
    first, jaxpr = len(jax.tree.leaves(call.given)), traced.jaxpr
    ends = [*jaxpr.outvars, *(v for e in jaxpr.eqns for v in e.invars)]
    used = {v for v in ends if not isinstance(v, Literal)}
    variables = iter(jaxpr.invars[first:])
    read = {k: v for k, v in numbers.items() if any([next(variables) in used for _ in jax.tree.leaves(v)])}
    if len(read) < len(numbers):
        numbers = read
        traced = _traced(model, call, numbers)
    return traced, numbers, fixed


def _traced(model: brainstate.nn.Module, call: Call, numbers: Mapping[str, PyTree]) -> TracedStep:
    def step(args: tuple[PyTree, ...], keywords: Mapping[str, PyTree], numbers: Mapping[str, PyTree]) -> PyTree:
        with brainstate.environ.context(**numbers) if numbers else contextlib.nullcontext():
            return model(*args, **keywords, **call.options)

    args = jax.tree.map(_abstract, (call.args, dict(call.keywords), numbers))

    def traced() -> tuple[brainstate.transform.StatefulFunction, list[Written]]:
        function = brainstate.transform.StatefulFunction(step, return_only_write=False, name="braintrace")
        with _one_at_a_time(), _same_states(model), kept_attributes(model) as written, _initialised():
            function.make_jaxpr(*args)
        return function, written

    function, written = traced()
    program = function.get_jaxpr(*args)
    if moves := [w.put for w in written if w.put is not None]:
        # Numbers that the step has written: whether it reads them shows in the program that it is with them.
        for put in moves:
            put(True)
        is_memory = True
        try:
            is_memory = not _are_equal(traced()[0].get_jaxpr(*args), program)
        finally:
            for put in moves:
                put(not is_memory)
        written = [w for w in written if is_memory or w.put is None]
    return TracedStep(function, args, [w.record() for w in written if w.is_read(consts_of(program))])


def _are_equal(a: ClosedJaxpr, b: ClosedJaxpr) -> bool:
    consts = list(zip(consts_of(a), consts_of(b)))
    same = all(x is y or not (is_tracer(x) or is_tracer(y)) and np.array_equal(x, y) for x, y in consts)
    return same and str(open_jaxpr(a)) == str(open_jaxpr(b))


def _abstract(x: PyTree) -> PyTree:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x


def check_structure(path: Path, old: PyTree, new: PyTree) -> None:
    of_units = isinstance(old, u.Quantity) or isinstance(new, u.Quantity)
    if of_units and u.get_unit(old) != u.get_unit(new):
        raise ValueError(
            f"The state {path_str(path)!r} changes its unit within the step, from {u.get_unit(old)} to "
            f"{u.get_unit(new)}. Convert the new value before writing it."
        )
    before: PyTreeDef
    before, after = jax.tree.structure(old), jax.tree.structure(new)
    if before != after:
        raise ValueError(
            f"The state {path_str(path)!r} changes its structure within the step, from {before} to {after}. Write "
            "values of the structure that it was initialised with."
        )
