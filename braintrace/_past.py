"""What earlier calls left in the states, where no cotangent may reach them.

The traces account for the past: a cotangent that went through an entry state into an earlier call of the same
differentiated function would count it twice.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator

import brainstate
import jax
import jax.numpy as jnp

from ._jax import derives_from, enclosing_gradient, is_computed, is_tracer
from ._types import PyTree

__all__ = ["Past"]

# Of all learners, for two may run one model. The values have no hash of their own.
_left: dict[int, weakref.ref[jax.Array]] = {}
# Functions that are differentiated, with a call inside of a loop, a branch, a jit, ...: what these give is not known.
_hidden: weakref.WeakSet[object] = weakref.WeakSet()


class Past:
    """Cuts what earlier calls left, and remembers what a call leaves, in the states that it writes."""

    def __init__(self) -> None:
        self._idle = False

    def __reduce__(self) -> tuple[type[Past], tuple[()]]:
        return Past, ()

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """While another one does it for the values outside of a map."""
        before, self._idle = self._idle, True
        try:
            yield
        finally:
            self._idle = before

    def cut(self, states: Iterable[brainstate.State]) -> None:
        """Make constants of what earlier calls left, be it in the function itself or in another turn of its loop."""
        gradient, inside = enclosing_gradient()
        if self._idle or not (inside or _left or gradient in _hidden):
            return

        def follows_a_call(x: jax.Array) -> bool:
            # Within a loop, a branch, a jit every value comes from outside, and one trace may serve several calls.
            return inside or (is_computed(x) if gradient in _hidden else derives_from(x, _left))

        for state in states:
            state.value = jax.tree.map(lambda x: _constant(x) if follows_a_call(x) else x, state.value)

    def leave(self, states: Iterable[brainstate.State], out: PyTree) -> None:
        gradient, inside = enclosing_gradient()
        if self._idle:
            return
        if inside:
            _hidden.add(gradient)
        for x in filter(is_tracer, jax.tree.leaves([out, [state.value for state in states]])):
            _left[id(x)] = weakref.ref(x, functools.partial(_forget, id(x)))


def _forget(number: int, reference: weakref.ref[jax.Array]) -> None:
    if _left.get(number) is reference:
        del _left[number]


def _constant(x: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x
