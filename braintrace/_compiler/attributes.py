"""What a step writes into attributes of a model that are no states, and the states that it makes."""

from __future__ import annotations

import contextlib
import functools
import numbers
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import brainstate
import jax
import numpy as np

from .._jax import is_tracer
from .._types import path_str
from .diagnostics import CompilationRecord, DiagnosticKind, DiagnosticLevel

__all__ = ["Written", "kept_attributes"]


# A single one becomes a part of the program, not a constant.
_NUMBERS = (numbers.Number, np.generic, np.ndarray, jax.Array)


class Written(NamedTuple):
    """An attribute that a step has written, and what it held before.

    ``put(True)`` gives it what the step has written, if that are numbers, ``put(False)`` what it held before.
    """

    title: str
    kind: str  # of the module
    old: list[Any]
    put: Callable[[bool], None] | None = None

    def is_read(self, constants: Collection[object]) -> bool:
        """Whether the step may have read the old value, which is then one of its constants."""
        of_arrays = {id(c) for c in constants}
        return any(
            id(v) in of_arrays if isinstance(v, jax.Array) and v.ndim else isinstance(v, _NUMBERS) for v in self.old
        )

    def record(self) -> CompilationRecord:
        return CompilationRecord(
            DiagnosticKind.STATE_NOT_HIDDEN,
            DiagnosticLevel.WARNING,
            f"The step reads and writes the attribute {self.title!r} of {self.kind}, which is no state: every step "
            "finds there what it held before the model was compiled. What a step remembers belongs into a "
            "brainstate.HiddenState, or a ShortTermState, that init_state makes.",
        )


@contextlib.contextmanager
def kept_attributes(model: brainstate.nn.Module) -> Iterator[list[Written]]:
    """Give attributes back what they held before the model is traced; what was written is known at the end.

    Raises
    ------
    ValueError
        At the end, if there is a state that was not there before.
    """
    before = [(path, node, _Attributes(node)) for path, node in model.nodes().items()]
    states = {id(s) for s in model.states().values()}
    written: list[Written] = []
    made: list[Written] = []
    try:
        yield written
    finally:
        known = states.union((id(node) for _, node, _ in before), *(old.traced for _, _, old in before))
        for path, node, old in before:
            for name, leaves in old.changed(node, known):
                of = written if all(map(is_tracer, leaves)) else made
                put = None if leaves else functools.partial(old.put, node, name, old.copied(vars(node)[name]))
                of.append(Written(path_str((*path, name)), type(node).__name__, _leaves(old.values.get(name)), put))
                old.restore(node, name)
    if made:
        title, kind = made[0].title, made[0].kind
        raise ValueError(
            f"{title!r} is a state, or has some, and is made inside the update of {kind}, where every step would make "
            f"it anew. Make it in init_state or __init__ of {kind}, and only use it in update."
        )


class _Attributes:
    """Those of one module, and what lists and dictionaries among them hold."""

    def __init__(self, node: brainstate.nn.Module):
        self.values = dict(vars(node))
        self.inner = {k: self.copied(v) for k, v in self.values.items() if isinstance(v, (list, dict))}
        self.traced = {id(v) for value in self.values.values() for v in _leaves(value) if is_tracer(v)}

    def changed(self, node: brainstate.nn.Module, known: set[int]) -> list[tuple[str, list[Any]]]:
        """Attributes that hold states, modules with states, or traced values that are not ``known``, and these.

        And those whose numbers are others than before: counters and flags, which a compiled step does not move.
        """
        found = []
        for name, value in vars(node).items():
            new = [v for v in _leaves(value) if id(v) not in known and _is_kept(v)]
            if new or _differ(self.inner.get(name, self.values.get(name)), value):
                found.append((name, new))
        return found

    @staticmethod
    def copied(value: Any) -> Any:
        return value.copy() if isinstance(value, (list, dict)) else value

    def put(self, node: brainstate.nn.Module, name: str, new: Any, moved: bool) -> None:
        """Give an attribute a new value, in the container that it holds if it is one, or the old one."""
        self.restore(node, name)
        if moved and type(new) is type(self.values[name]) and isinstance(new, (list, dict)):
            _fill(self.values[name], new)
        elif moved:
            vars(node)[name] = new

    def restore(self, node: brainstate.nn.Module, name: str) -> None:
        if name not in self.values:
            del vars(node)[name]
            return
        value = vars(node)[name] = self.values[name]
        if name in self.inner:
            _fill(value, self.inner[name])


def _fill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)


def _is_kept(v: Any) -> bool:
    if isinstance(v, brainstate.nn.Module):
        return bool(v.states())
    return is_tracer(v) or isinstance(v, brainstate.State)


def _differ(old: Any, new: Any) -> bool:
    """Whether numbers were there, and are others now; what is filled in for the first time is no memory."""
    before, after = ([v for v in _leaves(tree) if isinstance(v, (numbers.Number, np.generic))] for tree in (old, new))
    return bool(before) and (len(before) != len(after) or not all(map(_same, before, after)))


def _same(a: Any, b: Any) -> bool:
    return a is b or a == b or (a != a and b != b)


def _leaves(value: Any) -> list[Any]:
    try:
        return jax.tree.leaves(value, is_leaf=lambda v: isinstance(v, (brainstate.State, brainstate.nn.Module)))
    except ValueError:  # keys that cannot be sorted
        return []
