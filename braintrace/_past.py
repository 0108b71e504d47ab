"""What earlier calls of a learner left in the states, where no cotangent may reach them.

The traces account for the past: a cotangent that went through an entry state into an earlier call of the same
differentiated function would count it twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import brainstate
import jax

from ._jax import is_in_differentiated_loop, is_tracer

__all__ = ["Past"]


class Past:
    """The traced values that a learner's last call wrote."""

    def __init__(self) -> None:
        self._left: list[weakref.ref[jax.Array]] = []

    def __reduce__(self) -> tuple[type[Past], tuple[()]]:
        return Past, ()

    def cut(self, states: Iterable[brainstate.State]) -> None:
        """Make constants of what an earlier call left, be it in the function itself or in another turn of its loop."""
        everything, left = is_in_differentiated_loop(), [ref() for ref in self._left]

        def constant(x: jax.Array) -> jax.Array:
            return jax.lax.stop_gradient(x) if everything or any(x is v for v in left) else x

        if everything or left:
            for state in states:
                state.value = jax.tree.map(constant, state.value)

    def leave(self, states: Iterable[brainstate.State]) -> None:
        values = [x for state in states for x in jax.tree.leaves(state.value) if is_tracer(x)]
        self._left = list(map(weakref.ref, values))
