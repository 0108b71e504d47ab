"""Paths, input wrappers and exceptions."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Hashable, Iterable
from typing import Any, TypeVar

import jax

__all__ = [
    "CompilationError", "CompilationWarning", "Held", "MultiStepData", "NotSupportedError", "Path", "PyTree", "Shape",
    "SingleStepData", "cause_of", "first_as_one", "head", "in_one_line", "lies_under", "names_of", "path_str", "quoted",
]  # fmt: skip

T = TypeVar("T")
Path = tuple[Hashable, ...]
Shape = tuple[int, ...]
PyTree = Any  # a nest of arrays, with units or without, that JAX can flatten; a single array is one


class NotSupportedError(Exception):
    """A model does something that online learning cannot express."""

    __module__ = "braintrace"


class CompilationError(Exception):
    """A model was traced, but nothing in it can be trained online."""

    __module__ = "braintrace"


class CompilationWarning(UserWarning):
    """A model is not trained as its parameters seem to ask (see :class:`CompilationRecord`), or is compiled in vain."""

    __module__ = "braintrace"


class _Data:
    __slots__ = ("data",)

    def __init__(self, data: Any):
        self.data = data

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data!r})"

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.data,), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Any]) -> Any:
        del aux
        return cls(*children)


@jax.tree_util.register_pytree_node_class
class SingleStepData(_Data):
    """Input of one time step; within a window it is repeated at every step.

    Parameters
    ----------
    data : pytree
        The input of one step, without a time axis.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> braintrace.SingleStepData(jnp.ones(3)).data.shape
    (3,)
    """


@jax.tree_util.register_pytree_node_class
class MultiStepData(_Data):
    """Input of a window of time steps: axis 0 of every leaf is time.

    Parameters
    ----------
    data : pytree
        Arrays of shape ``(T, ...)``.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> braintrace.MultiStepData(jnp.ones((10, 3))).data.shape
    (10, 3)
    """


class Held:
    """Keeps the states of a value out of those of the module that holds it."""

    def __init__(self, value: Any):
        self.value = value
        self._is_kept = False

    def of_its_own(self) -> Held:
        """Itself for the first module that keeps it, copies for others."""
        if self._is_kept:
            return Held(copy.deepcopy(self.value)).of_its_own()
        self._is_kept = True
        return self


def cause_of(error: BaseException) -> BaseException:
    """What happened first: a container of modules raises its own exception from that of one of them."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def in_one_line(error: BaseException) -> str:
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {next((line.strip() for line in lines if line.strip()), '')}"


# brainpy.state keys the synapses of a neuron by the description they were made of.
_DESCRIPTION = re.compile(r"\(<class '(?:\w+\.)*(\w+)'>.*?\)(?= // |$)")


def path_str(path: Path) -> str:
    """A parameter or state path as the attribute access that reaches it."""
    return ".".join(names_of(path))


def quoted(paths: Iterable[Path]) -> str:
    return ", ".join(repr(path_str(p)) for p in paths)


def names_of(key: Any) -> tuple[str, ...]:
    """A path or a prefix of one, given as a tuple or as a string with dots, as names."""
    if isinstance(key, str):
        return tuple(key.split(".")) if key else ()
    if isinstance(key, (tuple, list)):
        return tuple(_DESCRIPTION.sub(r"\1", str(p)) for p in key)
    raise TypeError(
        f"Parameters are named by their path or a prefix of it, such as ('cell', 'W') or 'cell.W', got {key!r}."
    )


def lies_under(path: Path, prefix: tuple[str, ...]) -> bool:
    """Whether a path begins with these names."""
    return names_of(path)[: len(prefix)] == prefix


def head(x: Any) -> Any:
    """The first entry along axis 0 of an array or of a shape."""
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x[0]


def first_as_one(tree: T, axes: int) -> T:
    """The first axes of arrays as one; others may have no entries."""
    return jax.tree.map(lambda v: v.reshape((math.prod(v.shape[:axes]), *v.shape[axes:])), tree)
