"""Where the entries of an equation's outputs come from, primitive by primitive."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jax.typing import ArrayLike

from .._jax import JaxprEqn, Literal, Var
from .._types import Shape
from .labels import MANY, NONE
from .movement import MOVES, moved, scatter_hits

__all__ = ["ENDS", "combine", "reduce", "rule_for"]


ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp complex conj "
    "convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma "
    "igamma_grad_a igammac imag integer_pow is_finite le lgamma log log1p log2 logistic lt max min mul ne neg "
    "nextafter not one_minus_square or polygamma polynomial pow real reduce_precision regularized_incomplete_beta rem "
    "round rsqrt select_n sign sin sinh sqrt square sub tan tanh xor zeta".split()
)


SCANS = frozenset(["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"])
REDUCTIONS = frozenset(["reduce_sum", "reduce_max", "reduce_min", "reduce_prod"])
ENDS = frozenset(["stop_gradient", "etp_link"])

# Integers of the operands (`None`: of an operand that depends on nothing), shapes of the outputs -> theirs.
Rule = Callable[[Sequence[np.ndarray | None], Sequence[Shape]], list[np.ndarray]]


def combine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a is b:
        return a
    return np.where((a == b) | (b == NONE), a, np.where(a == NONE, b, MANY)).astype(np.int32)


def _filled(ids: np.ndarray | None, shape: Shape) -> np.ndarray:
    return np.full(shape, NONE, np.int32) if ids is None else ids


def reduce(ids: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    big = np.iinfo(np.int32).max
    top = ids.max(axis=axes, initial=NONE)
    low = np.where(ids == NONE, big, ids).min(axis=axes, initial=big)
    return np.where(low == big, NONE, np.where(low == top, top, MANY)).astype(np.int32)


def _elementwise(eqn: JaxprEqn) -> Rule:
    def rule(ids: Sequence[np.ndarray | None], out_shapes: Sequence[Shape]) -> list[np.ndarray]:
        known = [i for i in ids if i is not None]
        out = known[0]
        for other in known[1:]:
            if out.shape != other.shape:
                out, other = np.broadcast_to(out, out_shapes[0]), np.broadcast_to(other, out_shapes[0])
            out = combine(out, other)
        return [out if out.shape == shape else np.broadcast_to(out, shape) for shape in out_shapes]

    return rule


def _of_integers(eqn: JaxprEqn) -> Rule:
    """Data movement, which takes integers as it takes anything else."""
    return lambda ids, _: moved(eqn, [_filled(i, v.aval.shape) for i, v in zip(ids, eqn.invars)])


def _reduction(eqn: JaxprEqn) -> Rule:
    return lambda ids, out_shapes: [
        reduce(_filled(ids[0], eqn.invars[0].aval.shape), tuple(eqn.params["axes"])).reshape(out_shapes[0])
    ]


def _cumulative(eqn: JaxprEqn) -> Rule:
    axis = eqn.params["axis"]
    return lambda ids, out_shapes: [
        np.broadcast_to(np.expand_dims(reduce(_filled(ids[0], eqn.invars[0].aval.shape), (axis,)), axis), out_shapes[0])
    ]


def _dot_general(eqn: JaxprEqn) -> Rule:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]

    def rule(ids: Sequence[np.ndarray | None], out_shapes: Sequence[Shape]) -> list[np.ndarray]:
        shape = out_shapes[0]
        free = [
            [d for d in range(v.aval.ndim) if d not in (*c, *b)]
            for v, c, b in zip(eqn.invars, (lhs_contract, rhs_contract), (lhs_batch, rhs_batch))
        ]
        out: np.ndarray | None = None
        for side, (x, contract, batch) in enumerate(zip(ids, (lhs_contract, rhs_contract), (lhs_batch, rhs_batch))):
            if x is None:
                continue
            order = (*batch, *free[side], *contract)
            x = x.transpose(order)
            kept = len(batch) + len(free[side])
            x = reduce(x, tuple(range(kept, x.ndim)))
            before = 0 if side == 0 else len(free[0])
            after = len(free[1]) if side == 0 else 0
            x = x.reshape(x.shape[: len(batch)] + (1,) * before + x.shape[len(batch) :] + (1,) * after)
            x = np.broadcast_to(x, shape)
            out = x if out is None else combine(out, x)
        assert out is not None
        return [out]

    return rule


# Primitives that move data to where indices say: the operands that are data, the others being indices.
INDEXED = {
    "gather": (0,),
    "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1),
    "scatter": (0, 2),
    **{f"scatter{join}{how}": (0, 2) for join in "-_" for how in ("add", "sub", "mul", "min", "max")},
}


RULES: Mapping[str, Callable[[JaxprEqn], Rule]] = {
    **{name: _elementwise for name in ELEMENTWISE},
    **{name: _cumulative for name in SCANS},
    **{name: _reduction for name in REDUCTIONS},
    **{name: _of_integers for name in MOVES.keys() - INDEXED.keys()},
    "dot_general": _dot_general,
}


def _indexed(eqn: JaxprEqn, constants: Mapping[Var, ArrayLike]) -> Rule | None:
    """With known indices, the same movement of the integers; ``None`` where they are not known."""
    name, data = eqn.primitive.name, INDEXED[eqn.primitive.name]
    indices = {}
    for i, v in enumerate(eqn.invars):
        if i not in data:
            if not isinstance(v, Literal) and v not in constants:
                return None
            indices[i] = np.asarray(v.val if isinstance(v, Literal) else constants[v])

    def rule(ids: Sequence[np.ndarray | None], out_shapes: Sequence[Shape]) -> list[np.ndarray]:
        operands = [indices.get(i, _filled(x, v.aval.shape)) for i, (x, v) in enumerate(zip(ids, eqn.invars))]
        if not name.startswith("scatter"):
            return moved(eqn, operands, **({"fill_value": NONE} if name == "gather" else {}))
        target, index, update = operands
        base = target if name == "scatter" else np.full_like(target, NONE)
        out = MOVES["scatter"](base, index, update, **eqn.params)
        out = out if name == "scatter" else combine(target, out)
        return [np.where(scatter_hits(target, index, update, eqn.params) > 1, MANY, out).astype(np.int32)]

    return rule


def rule_for(eqn: JaxprEqn, constants: Mapping[Var, ArrayLike]) -> Rule | None:
    if eqn.primitive.name in INDEXED:
        return _indexed(eqn, constants)
    make = RULES.get(eqn.primitive.name)
    if make is None or math.prod(eqn.outvars[0].aval.shape) == 0:
        return None
    return make(eqn)
