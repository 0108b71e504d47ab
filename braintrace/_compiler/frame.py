"""Values and origins of a jaxpr's variables while the step is flattened, and the gates of branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._jax import JaxprEqn, Literal, consts_of, is_tracer, open_jaxpr
from .._ops.primitive import ETPPrimitive
from .._types import Path

__all__ = ["Frame", "Origin", "finite", "gate", "is_marked", "origin_of"]


def is_marked(eqn: JaxprEqn) -> bool:
    return isinstance(eqn.primitive, ETPPrimitive)


class Origin(NamedTuple):
    """What a value is computed from."""

    weights: frozenset = frozenset()  # paths of parameters, if of them and constants alone
    data: bool = False  # of an argument or state that is no parameter
    live: bool = False  # it carries credit to hidden states, operations or parameters
    entry: bool = False  # it is a hidden state's old value itself

    @classmethod
    def of_weight(cls, path: Path) -> Origin:
        return cls(weights=frozenset([path]), live=True)


class Frame:
    """Values and origins of one jaxpr while it is evaluated."""

    def __init__(self, closed, values, origins, hidden_out, taken, depth, constants):
        jaxpr = open_jaxpr(closed)
        self.constants = constants
        self.env = dict(zip(jaxpr.constvars, ((c, Origin()) for c in consts_of(closed))))
        self.env |= dict(zip(jaxpr.invars, zip(values, origins)))
        self.hidden = {v for v, h in zip(jaxpr.outvars, hidden_out) if h and not isinstance(v, Literal)}
        self.used = {v for e in jaxpr.eqns for v in e.invars if not isinstance(v, Literal)}
        self.used |= {v for v in jaxpr.outvars if not isinstance(v, Literal)}
        self.taken, self.depth = taken, depth
        self.gates: dict[Any, Any] = {}

    def waiting(self, var):
        """As :meth:`read`; the value of a constant may not be known yet."""
        return (var.val, Origin()) if isinstance(var, Literal) else self.env[var]

    def read(self, var):
        value, origin = self.waiting(var)
        return self.constants.read([value])[0], origin

    def inputs(self, eqn):
        pairs = [self.read(v) for v in eqn.invars]
        return [v for v, _ in pairs], [o for _, o in pairs]

    def hidden_out(self, eqn):
        return [v in self.hidden for v in eqn.outvars]

    def gate(self, var, make):
        """A gated value, the same for everybody who asks."""
        if isinstance(var, Literal):
            return var.val
        key = (var, make)
        if key not in self.gates:
            self.gates[key] = make(self.taken, self.read(var)[0])
        return self.gates[key]


def origin_of(eqn, origins: Sequence[Origin], outvar) -> Origin:
    data = any(o.data for o in origins)
    weights: frozenset = frozenset().union(*(o.weights for o in origins))
    if is_marked(eqn):
        return Origin(data=True, live=True)
    if not jnp.issubdtype(outvar.aval.dtype, jnp.inexact) or eqn.primitive.name == "stop_gradient":
        return Origin(data=data or bool(weights))
    return Origin(frozenset() if data else weights, data, any(o.live for o in origins))


def _is_inexact(x) -> bool:
    return jnp.issubdtype(jnp.result_type(x) if not hasattr(x, "dtype") else x.dtype, jnp.inexact)


def gate(taken, value):
    if not (is_tracer(value) and _is_inexact(value)):
        return value
    return jax.lax.select_n(taken, jax.lax.stop_gradient(value), value)


def finite(taken, value):
    if not (is_tracer(value) and _is_inexact(value)):
        return value
    use = jnp.logical_or(taken, jax.lax.is_finite(jnp.abs(value)))
    return jax.lax.select_n(use, jnp.zeros_like(value), value)
