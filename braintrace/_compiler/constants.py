"""Equations whose operands are known before the first step, computed without a compiler.

NumPy computes the usual ones, narrow types in 64 bits and rounded once: that is what XLA gives too, but for the last
digit of some transcendental functions, where XLA's own kernels differ among each other. What is not in the tables here
waits until a value is asked for; then one program computes all that has been waiting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .._jax import (
    ClosedJaxpr,
    JaxprEqn,
    Literal,
    bind_equation,
    call_body,
    consts_of,
    has_custom_rule,
    hashed,
    is_builtin,
    is_jit,
    is_remat,
    is_tracer,
    open_jaxpr,
    primitive_body,
    prune,
    reads,
    sub_jaxprs,
)
from .._program import Value, behind, environment, read, run
from .frame import is_marked
from .movement import MOVES, moved

__all__ = ["Constants", "foldable", "known_outputs"]


class _Later:
    """Stands for a value that waits."""

    value: jax.Array | None = None


class Constants:
    """Evaluates equations of known values."""

    def __init__(self) -> None:
        self._waiting: list[tuple[JaxprEqn, list[Value], list[_Later]]] = []
        self._bodies: dict[Hashable, ClosedJaxpr | None] = {}

    def outputs(self, eqn: JaxprEqn, values: Sequence[Value]) -> list[Value]:
        """The outputs of an equation, for :meth:`read`, or as operands here."""
        values = [v.value if isinstance(v, _Later) and v.value is not None else v for v in values]
        body = self._body(eqn)
        if body is not None:
            return self.run(body, values)
        outs = None if any(isinstance(v, _Later) for v in values) else _by_numpy(eqn, values)
        if outs is None:
            later = [_Later() for _ in eqn.outvars]
            self._waiting.append((eqn, values, later))
            return list(later)
        return outs

    def _body(self, eqn: JaxprEqn) -> ClosedJaxpr | None:
        """What a call, or a primitive that is a JAX function itself, runs on its operands."""
        if is_jit(eqn) or is_remat(eqn) or has_custom_rule(eqn):
            return call_body(eqn)
        if is_builtin(eqn):
            return None
        shapes = tuple((v.aval.shape, v.aval.dtype) for v in eqn.invars)
        key = hashed(eqn.primitive, tuple(eqn.params.items()), shapes)
        if key is None:
            return primitive_body(eqn)
        if key not in self._bodies:
            self._bodies[key] = primitive_body(eqn)
        return self._bodies[key]

    def run(self, closed: ClosedJaxpr, values: Sequence[Value], wanted: Sequence[int] | None = None) -> list[Value]:
        """The outputs of a closed jaxpr, or the ``wanted`` ones, of inputs that these need, as :meth:`outputs`."""
        jaxpr = open_jaxpr(closed)
        outvars = jaxpr.outvars if wanted is None else [jaxpr.outvars[i] for i in wanted]
        env = run(behind(jaxpr.eqns, outvars)[0], environment(closed, values), self.outputs)
        return [read(env, v) for v in outvars]

    def read(self, values: Sequence[Value]) -> list[Value]:
        """The values themselves."""
        if any(isinstance(v, _Later) and v.value is None for v in values):
            self._compute()
        return [v.value if isinstance(v, _Later) else v for v in values]

    def _compute(self) -> None:
        waiting, self._waiting = self._waiting, []
        known = [[None if isinstance(v, _Later) else v for v in values] for _, values, _ in waiting]

        def program(known: list[list[Value]]) -> list[jax.Array]:
            found: dict[_Later, jax.Array] = {}
            for (eqn, values, later), own in zip(waiting, known):
                operands = [found[v] if isinstance(v, _Later) else x for v, x in zip(values, own)]
                found.update(zip(later, bind_equation(eqn, operands)))
            return list(found.values())

        # Compiled ahead of the call, which then is no part of a program that is being traced.
        outs = jax.jit(program).lower(known).compile()(known)
        for later, out in zip((v for _, _, made in waiting for v in made), outs):
            later.value = out


def known_outputs(closed: ClosedJaxpr, look_inside: bool = True) -> dict[int, np.ndarray]:
    """The outputs of a closed jaxpr that do not depend on its inputs, by number.

    ``look_inside``: find those too of which only the body of a loop or call tells.
    """
    jaxpr = open_jaxpr(closed)
    no, perhaps, surely, unknowable = range(4)
    depends = dict.fromkeys(jaxpr.invars, surely)
    depends |= {v: unknowable for v, c in zip(jaxpr.constvars, consts_of(closed)) if is_tracer(c)}
    for eqn in jaxpr.eqns:
        found = max((depends.get(v, no) for v in eqn.invars if not isinstance(v, Literal)), default=no)
        if found == surely and any(True for _ in sub_jaxprs(eqn)):
            found = perhaps  # an output of a loop or call need not read every input
        depends.update(dict.fromkeys(eqn.outvars, unknowable if eqn.effects else found))
    candidates = [depends.get(v, no) if not isinstance(v, Literal) else no for v in jaxpr.outvars]
    constants, nothing = Constants(), [None] * len(jaxpr.invars)
    wanted = [i for i, found in enumerate(candidates) if found == no]
    values = dict(zip(wanted, constants.run(closed, nothing, wanted)))
    for i in [i for i, found in enumerate(candidates) if found == perhaps and look_inside]:
        alone = [j == i for j in range(len(candidates))]
        if not any(reads(closed, alone)):
            (values[i],) = constants.run(prune(closed, alone), nothing)
    read = zip(values, constants.read(list(values.values())))
    return {i: np.asarray(v, jaxpr.outvars[i].aval.dtype) for i, v in read}


def _by_numpy(eqn: JaxprEqn, values: Sequence[ArrayLike]) -> list[np.ndarray] | None:
    """The outputs of an equation that is in the tables, for a dtype, mode and values that NumPy knows as JAX does."""
    name = eqn.primitive.name
    if not any(name in table for table in (MOVES, ELEMENTWISE, REDUCTIONS, OTHERS)):
        return None
    try:
        operands = [np.asarray(x, v.aval.dtype) for x, v in zip(values, eqn.invars)]
        if name in MOVES:
            return moved(eqn, operands)
        with np.errstate(all="ignore"):
            operands = [x.astype(_wide(x.dtype)) for x in operands]
            if name in ELEMENTWISE:
                out = ELEMENTWISE[name](*operands)
            elif name in REDUCTIONS:
                out = REDUCTIONS[name](operands[0], axis=tuple(eqn.params["axes"]))
            else:
                out = OTHERS[name](*operands, eqn)
            return [np.asarray(out).astype(eqn.outvars[0].aval.dtype)]
    except Exception:
        return None


def _wide(dtype: np.dtype) -> np.dtype | type[np.number]:
    for kind, wide in ((jnp.complexfloating, np.complex128), (jnp.floating, np.float64), (jnp.integer, np.int64)):
        if jnp.issubdtype(dtype, kind) and dtype != np.uint64:
            return wide
    return dtype


def _converted(x: np.ndarray, eqn: JaxprEqn) -> np.ndarray:
    target = eqn.outvars[0].aval.dtype
    if jnp.issubdtype(target, jnp.integer) and not np.all(np.abs(x) < 2.0**31):
        raise ValueError("beyond the range of integers")
    return x.real if not jnp.issubdtype(target, jnp.complexfloating) else x


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if np.issubdtype(a.dtype, np.inexact):
        return a / b
    return np.where(b == 0, -1, (a - _remainder(a, b)) // np.where(b == 0, 1, b))


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmod(a, b) if np.issubdtype(a.dtype, np.inexact) else np.where(b == 0, a, np.fmod(a, b))


def _iota(eqn: JaxprEqn) -> np.ndarray:
    shape, k = eqn.params["shape"], eqn.params["dimension"]
    return np.broadcast_to(np.arange(shape[k]).reshape([-1 if i == k else 1 for i in range(len(shape))]), shape)


ELEMENTWISE: Mapping[str, Callable[..., ArrayLike]] = {
    "abs": np.abs, "acos": np.arccos, "add": np.add, "add_any": np.add, "and": np.bitwise_and, "asin": np.arcsin,
    "atan": np.arctan, "atan2": np.arctan2, "ceil": np.ceil, "conj": np.conj, "copy": np.asarray,
    "copy_p": np.asarray, "cos": np.cos, "cosh": np.cosh, "div": _quotient, "eq": np.equal, "exp": np.exp,
    "exp2": np.exp2, "expm1": np.expm1, "floor": np.floor, "ge": np.greater_equal, "gt": np.greater, "imag": np.imag,
    "is_finite": np.isfinite, "le": np.less_equal, "log": np.log, "log1p": np.log1p, "lt": np.less, "max": np.maximum,
    "min": np.minimum, "mul": np.multiply, "ne": np.not_equal, "neg": np.negative, "not": np.invert,
    "or": np.bitwise_or, "pow": np.power, "real": np.real, "rem": _remainder, "sign": np.sign, "sin": np.sin,
    "sinh": np.sinh, "sqrt": np.sqrt, "square": np.square, "stop_gradient": np.asarray, "sub": np.subtract,
    "tan": np.tan, "tanh": np.tanh, "xor": np.bitwise_xor,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "select_n": lambda which, *cases: np.choose(which, cases),
}  # fmt: skip
REDUCTIONS: Mapping[str, Callable[..., ArrayLike]] = {
    "reduce_and": np.all, "reduce_max": np.max, "reduce_min": np.min, "reduce_or": np.any, "reduce_prod": np.prod,
    "reduce_sum": np.sum,
}  # fmt: skip
OTHERS: Mapping[str, Callable[..., ArrayLike]] = {
    "convert_element_type": _converted,
    "integer_pow": lambda x, eqn: x ** eqn.params["y"],
    "iota": _iota,
}


def foldable(eqn: JaxprEqn, values: Iterable[Value]) -> bool:
    """Whether an equation computes a constant of moderate size: then D and df may be known before the first step."""
    sizes = [math.prod(v.aval.shape) for v in eqn.outvars]
    return not any(map(is_tracer, values)) and sum(sizes) <= 2**20 and not is_marked(eqn)
