"""Which position of a source does each entry of a variable depend on?

A *label* of a variable for one source holds, for every entry of the variable, the coordinates of the single source
position that it depends on, as one integer array per source axis (and a first one that only tells whether there
is any dependence): ``NONE`` where there is none, ``MANY`` where there are several. Labels follow differentiable
dependence only: integers, booleans and ``stop_gradient`` end them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from .._jax import (
    Literal,
    bind_equation,
    call_body,
    consts_of,
    has_custom_rule,
    is_tracer,
    open_jaxpr,
    scan_operands,
    structs,
)
from .movement import MOVES, moved, scatter_hits

__all__ = [
    "MANY", "NONE", "Label", "Labels", "combine", "dependence", "is_aligned", "mixes", "moves", "no_cut", "own_label",
    "propagate", "touches_own_position", "transfer", "unaligned_axes",
]  # fmt: skip

Label = tuple[np.ndarray, ...]
Source = tuple  # a kind and what it names; of several ways that it moves, the way too
Labels = dict[Source, Label]
NONE, MANY = -1, -2

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


def own_label(shape: tuple[int, ...], axes: int) -> Label:
    """The label of a source itself: entry ``p`` depends on position ``p`` of its first ``axes`` axes."""
    grids = [np.broadcast_to(np.int32(0), shape)]
    for k in range(axes):
        index = np.arange(shape[k], dtype=np.int32).reshape([-1 if i == k else 1 for i in range(len(shape))])
        grids.append(np.broadcast_to(index, shape))
    return tuple(grids)


def unaligned_axes(label: Label, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Source axes along which some entry of a variable, of ``shape`` plus own trailing axes, depends on another
    position than its own."""
    own = own_label(label[0].shape, len(label) - 1)
    if label[0].shape[: len(shape)] != shape or len(label) - 1 != len(shape):
        return tuple(range(len(shape)))
    return tuple(k for k in range(len(shape)) if not np.all((label[k + 1] == own[k + 1]) | (label[k + 1] == NONE)))


def is_aligned(label: Label, shape: tuple[int, ...]) -> bool:
    """Whether every entry depends on its own position, or on nothing."""
    aligned_shape = label[0].shape[: len(shape)] == shape and len(label) - 1 == len(shape)
    return aligned_shape and not unaligned_axes(label, shape)


def touches_own_position(label: Label, shape: tuple[int, ...]) -> bool:
    """Whether at least one entry depends on exactly its own position."""
    if label[0].shape[: len(shape)] != shape or len(label) - 1 != len(shape):
        return False
    own = own_label(label[0].shape, len(shape))
    return bool(np.any(np.logical_and.reduce([a == b for a, b in zip(label, own)])))


def mixes(label: Label) -> bool:
    """Whether some entry depends on several positions."""
    return any(np.any(ids == MANY) for ids in label)


def dependence(eqn: Any) -> list[dict[int, Label]]:
    """For every output of an equation, its labels with each of the inputs, by number, as a source."""
    inputs: list[Labels] = [
        {("input", i): own_label(v.aval.shape, v.aval.ndim)} if _differentiable(v.aval) else {}
        for i, v in enumerate(eqn.invars)
    ]
    outs = _transfer(eqn, inputs, {}, _How())
    return [
        {i: label for (_, i), label in labels.items() if _differentiable(v.aval)}
        for v, labels in zip(eqn.outvars, outs)
    ]


def propagate(
    eqns: Iterable[Any],
    env: dict[Any, Labels],
    outputs_of: Callable[[Any, list[Labels]], list[Labels] | None],
    constants: Mapping[Any, Any] | None = None,
    _how: _How | None = None,
) -> None:
    """Run labels through equations, adding the labels of every output variable to ``env``.

    ``outputs_of(eqn, input_labels)`` may decide the output labels of an equation itself (a cut); ``None`` leaves
    them to the equation's own rule.
    """
    constants, how = constants or {}, _how or _How()
    for eqn in eqns:
        inputs = [{} if isinstance(v, Literal) else env.get(v, {}) for v in eqn.invars]
        outs = outputs_of(eqn, inputs)
        if outs is None:
            outs = _transfer(eqn, inputs, constants, how)
        for var, labels in zip(eqn.outvars, outs):
            if labels and (how.all_values or _differentiable(var.aval)):
                env[var] = {s: lab for s, lab in labels.items() if not np.all(lab[0] == NONE)}


def transfer(eqn: Any, inputs: list[Labels], constants: Mapping[Any, Any]) -> list[Labels]:
    """Labels of the outputs of one equation."""
    return _transfer(eqn, inputs, constants, _How())


def moves(eqn: Any, inputs: list[Labels], constants: Mapping[Any, Any]) -> list[Labels]:
    """As :func:`transfer`, following each way by which single positions move on its own, without those that mix them.

    So that a sum of a value and its mean, or of a value and its neighbour, still holds the value itself. Sources are
    ``(kind, name, way)`` here; there are as many of one name as there are ways.
    """
    apart = [{(*s[:2], _way(label)): label for s, label in labels.items()} for labels in inputs]
    outs: list[Labels] = []
    for labels in transfer(eqn, apart, constants):
        mixed = {s: functools.reduce(np.logical_or, [ids == MANY for ids in label]) for s, label in labels.items()}
        pure = {s: tuple(np.where(mixed[s], NONE, ids) for ids in label) for s, label in labels.items()}
        outs.append({(*s[:2], _way(label)): label for s, label in list(pure.items())[:_WAYS]})
    return outs


_WAYS = 16  # that are followed from one source to one variable: more of them are no longer a handful of terms


def _way(label: Label) -> int:
    return hash(tuple(ids.tobytes() for ids in label))


class _How(NamedTuple):
    """How deep in derivatives of equations the labels are, and whether they follow values without a derivative too."""

    depth: int = 0
    all_values: bool = False

    def derived(self) -> _How:
        return self._replace(depth=self.depth + 1)


def no_cut(eqn: Any, inputs: list[Labels]) -> None:
    del eqn, inputs


def _transfer(eqn, inputs, constants, how) -> list[Labels]:
    ends = eqn.primitive.name in ENDS and not how.all_values
    if ends or not any(inputs):
        return [{} for _ in eqn.outvars]
    if eqn.primitive.name in LOOPS:
        return LOOPS[eqn.primitive.name](eqn, inputs, how)
    body = call_body(eqn)
    if body is not None and not (has_custom_rule(eqn) and not how.all_values):
        known = {
            w: constants[v]
            for v, w in zip(eqn.invars, open_jaxpr(body).invars)
            if not isinstance(v, Literal) and v in constants
        }
        return _through(body, inputs, how, known)
    if eqn.primitive.name == "optimization_barrier":
        return [dict(labels) for labels in inputs]
    rule = _rule_for(eqn, constants)
    if rule is None:
        return _many_or_derived(eqn, inputs, how)
    sources = dict.fromkeys(s for labels in inputs for s in labels)
    out_shapes = [v.aval.shape for v in eqn.outvars]
    outs: list[Labels] = [{} for _ in eqn.outvars]
    for s in sources:
        labels = [lab.get(s) for lab in inputs]
        axes = max(len(lab) for lab in labels if lab is not None)
        columns = [rule([None if lab is None else lab[k] for lab in labels], out_shapes) for k in range(axes)]
        for i in range(len(outs)):
            outs[i][s] = tuple(column[i] for column in columns)
    return outs


def _through(body, inputs, how, known=None) -> list[Labels]:
    """Labels of the outputs of a body."""
    inner = open_jaxpr(body)
    env = {v: dict(labels) for v, labels in zip(inner.invars, inputs)}
    known = (known or {}) | {v: c for v, c in zip(inner.constvars, consts_of(body)) if not is_tracer(c)}
    propagate(inner.eqns, env, no_cut, known, how)
    return [{} if isinstance(v, Literal) else env.get(v, {}) for v in inner.outvars]


def _join(a: Labels, b: Labels) -> Labels:
    return {s: tuple(map(combine, a[s], b[s])) if s in a and s in b else a.get(s, b.get(s, ())) for s in {**a, **b}}


def _equal(a: Labels, b: Labels) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(x, y) for s in a for x, y in zip(a[s], b[s]))


def _settled(step: Callable[[list[Labels]], list[Labels]], carry: list[Labels]) -> list[Labels]:
    """The labels of a loop's carry before any of its sub-steps, whichever it is."""
    while True:
        new = [_join(a, b) for a, b in zip(carry, step(carry))]
        if all(map(_equal, carry, new)):
            return carry
        carry = new


def _through_while(eqn, inputs, how) -> list[Labels]:
    skipped, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    fixed, carry = inputs[skipped : skipped + consts], inputs[skipped + consts :]
    return _settled(lambda carry: _through(eqn.params["body_jaxpr"], [*fixed, *carry], how), carry)


def _through_scan(eqn, inputs, how) -> list[Labels]:
    n, carried = scan_operands(eqn)
    m = n + carried
    fixed, carry, xs = inputs[:n], inputs[n:m], inputs[m:]
    # A slice of a scanned operand depends on what any of its slices depends on.
    now = [{s: tuple(_reduce(ids, (0,)) for ids in label) for s, label in labels.items()} for labels in xs]
    step = lambda carry: _through(eqn.params["jaxpr"], [*fixed, *carry, *now], how)  # noqa: E731
    carry = _settled(lambda carry: step(carry)[: m - n], carry)
    outs = step(carry)
    shapes = [v.aval.shape for v in eqn.outvars[m - n :]]
    ys = [
        {s: tuple(np.broadcast_to(ids, shape) for ids in label) for s, label in labels.items()}
        for labels, shape in zip(outs[m - n :], shapes)
    ]
    return [*(carry if eqn.params["length"] == 0 else outs[: m - n]), *ys]


def _through_cond(eqn, inputs, how) -> list[Labels]:
    branches = [_through(body, inputs[1:], how) for body in eqn.params["branches"]]
    return [functools.reduce(_join, labels) for labels in zip(*branches)]


LOOPS = {"while": _through_while, "scan": _through_scan, "cond": _through_cond}


def _many_or_derived(eqn, inputs, how) -> list[Labels]:
    """An equation without a rule: look at its derivative, which is made of simpler equations.

    Forward mode does not see into a function that has a reverse rule alone. Where neither derivative tells, what its
    body reads does.
    """
    ways = (_by_vjp, _by_jvp, _by_value) if has_custom_rule(eqn) else (_by_jvp, _by_vjp)
    # The derivative of a linear primitive is made of that primitive again.
    if how.depth == 0 or (has_custom_rule(eqn) and how.depth < 8):
        for derive in ways:
            try:
                return derive(eqn, inputs, how.derived())
            except Exception:  # no such derivative: try the next way, else the safe answer below
                continue
    sources = {s: len(lab) for labels in inputs for s, lab in labels.items()}
    return [{s: _many(v.aval.shape, n) for s, n in sources.items()} for v in eqn.outvars]


def _many(shape, axes) -> Label:
    return (np.zeros(shape, np.int32), *(np.full(shape, MANY, np.int32) for _ in range(axes - 1)))


def _differentiable(aval) -> bool:
    return jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact)


def _by_value(eqn, inputs, how):
    return _through(call_body(eqn), inputs, how._replace(all_values=True))


def _by_jvp(eqn, inputs, how):
    active = [i for i, labels in enumerate(inputs) if labels and _differentiable(eqn.invars[i].aval)]

    def jvp(primals, tangents):
        def f(*xs):
            values = list(primals)
            for i, x in zip(active, xs):
                values[i] = x
            return bind_equation(eqn, values)

        return jax.jvp(f, [primals[i] for i in active], tangents)[1]

    jaxpr = open_jaxpr(jax.make_jaxpr(jvp)(structs(eqn.invars), structs([eqn.invars[i] for i in active])))
    env = {v: inputs[i] for i, v in zip(active, jaxpr.invars[len(eqn.invars) :])}
    propagate(jaxpr.eqns, env, no_cut, None, how)
    return [{} if isinstance(v, Literal) else env.get(v, {}) for v in jaxpr.outvars]


def _by_vjp(eqn, inputs, how):
    """By the reverse rule: where each cotangent of an input has a single origin, the output entry there reads it."""
    active = [i for i, labels in enumerate(inputs) if labels and _differentiable(eqn.invars[i].aval)]
    outs = [k for k, v in enumerate(eqn.outvars) if _differentiable(v.aval)]

    def vjp(primals, cotangents):
        def f(*xs):
            values = list(primals)
            for i, x in zip(active, xs):
                values[i] = x
            found = bind_equation(eqn, values)
            return [found[k] for k in outs]

        return jax.vjp(f, *[primals[i] for i in active])[1](cotangents)

    jaxpr = open_jaxpr(jax.make_jaxpr(vjp)(structs(eqn.invars), structs([eqn.outvars[k] for k in outs])))
    env = {v: {j: own_label(v.aval.shape, len(v.aval.shape))} for j, v in zip(outs, jaxpr.invars[len(eqn.invars) :])}
    propagate(jaxpr.eqns, env, no_cut, None, how)
    result: list[Labels] = [{} for _ in eqn.outvars]
    for i, cotangent in zip(active, jaxpr.outvars):
        for k, origin in ({} if isinstance(cotangent, Literal) else env.get(cotangent, {})).items():
            if mixes(origin):
                raise ValueError("mixes positions")
            shape = eqn.outvars[k].aval.shape
            read = {s: tuple(_sent(ids, origin, shape) for ids in label) for s, label in inputs[i].items()}
            result[k] = _join(result[k], read)
    return result


def _sent(ids: np.ndarray, origin: Label, shape: tuple[int, ...]) -> np.ndarray:
    """The integers of an input at the output entries that ``origin`` names for them."""
    there = (origin[0] != NONE) & (ids != NONE)
    at, big = tuple(axis[there] for axis in origin[1:]), np.iinfo(np.int32).max
    low, top = np.full(shape, big, np.int32), np.full(shape, NONE, np.int32)
    np.minimum.at(low, at, ids[there])
    np.maximum.at(top, at, ids[there])
    return np.where(low == big, NONE, np.where(low == top, top, MANY)).astype(np.int32)


# -- rules on one integer array per operand ---------------------------------------------------------------------


def combine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a is b:
        return a
    return np.where((a == b) | (b == NONE), a, np.where(a == NONE, b, MANY)).astype(np.int32)


def _filled(ids, shape) -> np.ndarray:
    return np.full(shape, NONE, np.int32) if ids is None else ids


def _reduce(ids: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    big = np.iinfo(np.int32).max
    top = ids.max(axis=axes, initial=NONE)
    low = np.where(ids == NONE, big, ids).min(axis=axes, initial=big)
    return np.where(low == big, NONE, np.where(low == top, top, MANY)).astype(np.int32)


def _elementwise(eqn):
    def rule(ids, out_shapes):
        known = [i for i in ids if i is not None]
        out = known[0]
        for other in known[1:]:
            if out.shape != other.shape:
                out, other = np.broadcast_to(out, out_shapes[0]), np.broadcast_to(other, out_shapes[0])
            out = combine(out, other)
        return [out if out.shape == shape else np.broadcast_to(out, shape) for shape in out_shapes]

    return rule


def _moving(move: Callable[..., np.ndarray]):
    """Data movement: the same movement of the integers."""

    def make(eqn):
        def rule(ids, out_shapes):
            operands = [_filled(i, v.aval.shape) for i, v in zip(ids, eqn.invars)]
            return [move(*operands, out_shape=out_shapes[0], **eqn.params)]

        return rule

    return make


def _of_integers(eqn):
    """Data movement, which takes integers as it takes anything else."""
    return lambda ids, _: moved(eqn, [_filled(i, v.aval.shape) for i, v in zip(ids, eqn.invars)])


def _broadcast_in_dim(x, *dynamic, shape, broadcast_dimensions, out_shape, **_):
    del dynamic, shape
    full = [1] * len(out_shape)
    for size, d in zip(x.shape, broadcast_dimensions):
        full[d] = size
    return np.broadcast_to(x.reshape(full), out_shape)


def _slice(x, *, start_indices, limit_indices, strides, **_):
    return x[tuple(map(slice, start_indices, limit_indices, strides or [1] * x.ndim))]


def _pad(x, value, *, padding_config, out_shape, **_):
    del value
    spread = np.full([max(0, n + (n - 1) * inner) for n, (_, _, inner) in zip(x.shape, padding_config)], NONE, np.int32)
    spread[tuple(slice(None, None, inner + 1) for _, _, inner in padding_config)] = x
    # Negative padding takes entries away.
    kept = spread[tuple(slice(max(0, -lo), n - max(0, -hi)) for n, (lo, hi, _) in zip(spread.shape, padding_config))]
    out = np.full(out_shape, NONE, np.int32)
    out[tuple(slice(max(0, lo), max(0, lo) + n) for n, (lo, _, _) in zip(kept.shape, padding_config))] = kept
    return out


def _reduction(eqn):
    return lambda ids, out_shapes: [_reduce(ids[0], tuple(eqn.params["axes"])).reshape(out_shapes[0])]


def _cumulative(eqn):
    axis = eqn.params["axis"]
    return lambda ids, out_shapes: [np.broadcast_to(np.expand_dims(_reduce(ids[0], (axis,)), axis), out_shapes[0])]


def _dot_general(eqn):
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]

    def rule(ids, out_shapes):
        shape = out_shapes[0]
        free = [
            [d for d in range(v.aval.ndim) if d not in (*c, *b)]
            for v, c, b in zip(eqn.invars, (lhs_contract, rhs_contract), (lhs_batch, rhs_batch))
        ]
        out = None
        for side, (x, contract, batch) in enumerate(zip(ids, (lhs_contract, rhs_contract), (lhs_batch, rhs_batch))):
            if x is None:
                continue
            order = (*batch, *free[side], *contract)
            x = x.transpose(order)
            kept = len(batch) + len(free[side])
            x = _reduce(x, tuple(range(kept, x.ndim)))
            before = 0 if side == 0 else len(free[0])
            after = len(free[1]) if side == 0 else 0
            x = x.reshape(x.shape[: len(batch)] + (1,) * before + x.shape[len(batch) :] + (1,) * after)
            x = np.broadcast_to(x, shape)
            out = x if out is None else combine(out, x)
        return [out]

    return rule


RULES: Mapping[str, Callable[[Any], Any]] = {
    **{name: _elementwise for name in ELEMENTWISE},
    **{name: _cumulative for name in SCANS},
    **{name: _reduction for name in REDUCTIONS},
    **{name: _of_integers for name in ("split", "stack", "tile", "unstack")},
    "broadcast_in_dim": _moving(_broadcast_in_dim),
    "reshape": _moving(lambda x, *dynamic, out_shape, **_: x.reshape(out_shape)),
    "squeeze": _moving(lambda x, *, out_shape, **_: x.reshape(out_shape)),
    "expand_dims": _moving(lambda x, *, out_shape, **_: x.reshape(out_shape)),
    "transpose": _moving(lambda x, *, permutation, **_: x.transpose(permutation)),
    "rev": _moving(lambda x, *, dimensions, **_: np.flip(x, dimensions)),
    "slice": _moving(_slice),
    "pad": _moving(_pad),
    "concatenate": _moving(lambda *xs, dimension, **_: np.concatenate(xs, dimension)),
    "dot_general": _dot_general,
}


# Primitives that move data to where indices say: the operands that are data, the others being indices.
INDEXED = {
    "gather": (0,),
    "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1),
    "scatter": (0, 2),
    "scatter-add": (0, 2),
    "scatter_add": (0, 2),
}


def _indexed(eqn, constants):
    """With known indices, the same movement of the integers; ``None`` where they are not known."""
    name, data = eqn.primitive.name, INDEXED[eqn.primitive.name]
    indices = {}
    for i, v in enumerate(eqn.invars):
        if i not in data:
            if not isinstance(v, Literal) and v not in constants:
                return None
            indices[i] = np.asarray(v.val if isinstance(v, Literal) else constants[v])

    def rule(ids, out_shapes):
        operands = [indices.get(i, _filled(x, v.aval.shape)) for i, (x, v) in enumerate(zip(ids, eqn.invars))]
        if not name.startswith("scatter"):
            return moved(eqn, operands, **({"fill_value": NONE} if name == "gather" else {}))
        target, index, update = operands
        base = target if name == "scatter" else np.full_like(target, NONE)
        out = MOVES["scatter"](base, index, update, **eqn.params)
        out = out if name == "scatter" else combine(target, out)
        return [np.where(scatter_hits(target, index, update, eqn.params) > 1, MANY, out).astype(np.int32)]

    return rule


def _rule_for(eqn, constants):
    if eqn.primitive.name in INDEXED:
        return _indexed(eqn, constants)
    make = RULES.get(eqn.primitive.name)
    if make is None or math.prod(eqn.outvars[0].aval.shape) == 0:
        return None
    return make(eqn)
