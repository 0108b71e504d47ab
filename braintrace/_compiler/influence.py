"""Which variables of a step a small change of others changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp

from .._jax import Atom, JaxprEqn, Literal, Var, sub_jaxprs
from .._program import variables
from .._types import Path
from .flow import Flow, is_product
from .module_info import ModuleInfo
from .positions import dependence

__all__ = ["Influence", "differentiable"]


class Influence:
    """Which variables of a step a small change of others changes, up to the new hidden values."""

    def __init__(self, info: ModuleInfo, flow: Flow):
        self.eqns, self.flow = info.jaxpr.eqns, flow
        self.opaque = {op.position for op in flow.ops if not op.primitive.gradient_enabled}
        self.ways = [_ways(eqn) for eqn in self.eqns]

    def of(self, starts: Iterable[Atom], blocked: Callable[[int], bool] = lambda position: False) -> set[Var]:
        """``blocked`` tells which equations, by position, are not passed; new hidden values are not passed either."""
        found = {v for v in starts if not isinstance(v, Literal)}
        changed = set(found)
        for position, ways in enumerate(self.ways):
            if changed.isdisjoint(v for _, inputs in ways for v in inputs) or blocked(position):
                continue
            new = {v for v, inputs in ways if not changed.isdisjoint(inputs)}
            found |= new
            changed |= {v for v in new if v not in self.flow.members}
        return found

    def untraced(self, starts: Iterable[Atom]) -> set[Var]:
        """What no operation and no product of positions lies before: a trace would follow all of it."""
        return self.of(starts, lambda position: position in self.opaque or is_product(self.eqns[position]))

    @functools.cached_property
    def leading(self) -> frozenset[Var]:
        """What changes a new hidden value with no operation in between; these values are among it."""
        found = set(self.flow.members)
        for position in reversed(range(len(self.eqns))):
            if position not in self.opaque:
                found.update(v for out, inputs in self.ways[position] if out in found for v in inputs)
        return frozenset(found)

    def driven(self, changed: set[Var]) -> tuple[Path, ...]:
        """The hidden states whose new values are among the variables."""
        return tuple(p for v, paths in self.flow.members.items() if v in changed for p in paths)

    def products(self, changed: set[Var]) -> list[JaxprEqn]:
        """Products that variables enter on their way to hidden states."""
        entered = [e for e in self.eqns if is_product(e) and not changed.isdisjoint(variables(e.invars))]
        return [e for e in entered if not self.leading.isdisjoint(e.outvars)]


def differentiable(atoms: Sequence[Atom]) -> list[Var]:
    return [v for v in variables(atoms) if jnp.issubdtype(v.aval.dtype, jnp.inexact)]


def _ways(eqn: JaxprEqn) -> list[tuple[Var, list[Var]]]:
    """Every output with the inputs that change it."""
    outs, inputs = differentiable(eqn.outvars), differentiable(eqn.invars)
    if not outs or not inputs or eqn.primitive.name == "stop_gradient":
        return []
    if len(eqn.outvars) > 1 and any(sub_jaxprs(eqn)):
        found = zip(eqn.outvars, dependence(eqn))
        return [(v, differentiable([eqn.invars[i] for i in labels])) for v, labels in found if v in outs]
    return [(v, inputs) for v in outs]
