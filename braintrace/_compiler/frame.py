"""Values and origins of a jaxpr's variables while the step is flattened, and the gates of branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._jax import Atom, ClosedJaxpr, JaxprEqn, Literal, Var, consts_of, is_tracer, open_jaxpr
from .._ops.primitive import ETPPrimitive
from .._program import Value
from .._types import Path

if TYPE_CHECKING:
    from .constants import Constants

__all__ = ["Frame", "Origin", "finite", "gate", "is_marked", "origin_of"]


Gate = Callable[[jax.Array, Value], Value]  # whether the branch is taken, and what is to pass


def is_marked(eqn: JaxprEqn) -> bool:
    return isinstance(eqn.primitive, ETPPrimitive)


class Origin(NamedTuple):
    """What a value is computed from."""

    weights: frozenset[Path] = frozenset()  # paths of parameters, if of them and constants alone
    data: bool = False  # of an argument or state that is no parameter
    live: bool = False  # it carries credit to hidden states, operations or parameters
    entry: bool = False  # it is a hidden state's old value itself

    @classmethod
    def of_weight(cls, path: Path) -> Origin:
        return cls(weights=frozenset([path]), live=True)


class Frame:
    """Values and origins of one jaxpr while it is evaluated."""

    def __init__(
        self,
        closed: ClosedJaxpr,
        values: Sequence[Value],
        origins: Sequence[Origin],
        hidden_out: Sequence[bool],
        taken: jax.Array | None,
        depth: int,
        constants: Constants,
    ):
        jaxpr = open_jaxpr(closed)
        self.constants = constants
        self.env = dict(zip(jaxpr.constvars, ((c, Origin()) for c in consts_of(closed))))
        self.env |= dict(zip(jaxpr.invars, zip(values, origins)))
        self.hidden = {v for v, h in zip(jaxpr.outvars, hidden_out) if h and not isinstance(v, Literal)}
        self.used = {v for e in jaxpr.eqns for v in e.invars if not isinstance(v, Literal)}
        self.used |= {v for v in jaxpr.outvars if not isinstance(v, Literal)}
        self.taken, self.depth = taken, depth
        self.gates: dict[tuple[Var, Gate], Value] = {}

    def waiting(self, var: Atom) -> tuple[Value, Origin]:
        """As :meth:`read`; the value of a constant may not be known yet."""
        return (var.val, Origin()) if isinstance(var, Literal) else self.env[var]

    def read(self, var: Atom) -> tuple[Value, Origin]:
        value, origin = self.waiting(var)
        return self.constants.read([value])[0], origin

    def inputs(self, eqn: JaxprEqn) -> tuple[list[Value], list[Origin]]:
        pairs = [self.read(v) for v in eqn.invars]
        return [v for v, _ in pairs], [o for _, o in pairs]

    def hidden_out(self, eqn: JaxprEqn) -> list[bool]:
        return [v in self.hidden for v in eqn.outvars]

    def gate(self, var: Atom, make: Gate) -> Value:
        """A gated value, the same for everybody who asks."""
        if isinstance(var, Literal):
            return var.val
        key = (var, make)
        if key not in self.gates:
            assert self.taken is not None
            self.gates[key] = make(self.taken, self.read(var)[0])
        return self.gates[key]


def origin_of(eqn: JaxprEqn, origins: Sequence[Origin], outvar: Var) -> Origin:
    data = any(o.data for o in origins)
    weights = frozenset[Path]().union(*(o.weights for o in origins))
    if is_marked(eqn):
        return Origin(data=True, live=True)
    if not jnp.issubdtype(outvar.aval.dtype, jnp.inexact) or eqn.primitive.name == "stop_gradient":
        return Origin(data=data or bool(weights))
    return Origin(frozenset() if data else weights, data, any(o.live for o in origins))


def _is_inexact(x: ArrayLike) -> bool:
    return jnp.issubdtype(jnp.result_type(x) if not hasattr(x, "dtype") else x.dtype, jnp.inexact)


def gate(taken: jax.Array, value: Value) -> Value:
    if not (is_tracer(value) and _is_inexact(value)):
        return value
    return jax.lax.select_n(taken, jax.lax.stop_gradient(value), value)


def finite(taken: jax.Array, value: Value) -> Value:
    if not (is_tracer(value) and _is_inexact(value)):
        return value
    use = jnp.logical_or(taken, jax.lax.is_finite(jnp.abs(value)))
    return jax.lax.select_n(use, jnp.zeros_like(value), value)
