"""What earlier calls left in the states, where no cotangent may reach them.

The traces account for the past: a cotangent that went through an entry state into an earlier call of the same
differentiated function would count it twice. So what a call leaves has a name, which stands in the trace wherever the
call does, and says which states it comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import brainstate
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ._jax import JaxprEqn, in_its_trace, is_traced_within, is_tracer, with_constants
from ._program import equations_within

__all__ = ["cut", "named"]

T = TypeVar("T")

_LEFT = "left by a call of braintrace in "


def named(tree: T, states: Iterable[brainstate.State]) -> T:
    """What a call that writes these states leaves in them, or gives."""
    name = _LEFT + " ".join(str(id(state)) for state in states)
    return jax.tree.map(lambda x: checkpoint_name(x, name) if is_tracer(x) else x, tree)


def cut(states: Sequence[brainstate.State], model: brainstate.nn.Module) -> None:
    """Make constants of what earlier calls left in these states, be it here or in another turn of a loop.

    In a loop (a branch, a jit, ...) that is all that comes from outside but for the parameters of the model.
    """
    numbers = {str(id(state)) for state in states}
    within = is_traced_within()
    parameters = model.states(brainstate.ParamState).values() if within else ()
    # As they are in this trace, without reading them: a state that is read is one that the trace depends on.
    known = {id(x) for state in parameters for x in jax.tree.leaves(state._value)}

    def is_past(value: object, eqn: JaxprEqn | None) -> bool:
        if eqn is None:  # an argument does not tell what it is made of
            return within and id(value) not in known
        return any(not numbers.isdisjoint(_states_of(e)) for e in (eqn, *equations_within(eqn)))

    def is_named(value: object, eqn: JaxprEqn | None) -> bool:
        return eqn is not None and is_past(value, eqn)

    def constant(x: jax.Array) -> jax.Array:
        if not is_tracer(x) or not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        end, differentiated = in_its_trace(x)
        return with_constants(x, end, is_named if differentiated else is_past)

    for state in states:
        state.value = jax.tree.map(constant, state.value)


def _states_of(eqn: JaxprEqn) -> list[str]:
    """The states that a name speaks of."""
    name = eqn.params.get("name") if eqn.primitive.name == "name" else None
    return name[len(_LEFT) :].split() if isinstance(name, str) and name.startswith(_LEFT) else []
