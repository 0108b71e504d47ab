"""What one step leaves for the traces, and how it is named.

Arrays have no units. With S hidden variables per position, sums over them are written out, so that XLA fuses them and
only the entries of D that can be non-zero cost anything.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .._binding import Fixed, Gradients, Operands, Signals
from .._compiler.graph import ETraceGraph
from .._compiler.groups import HiddenGroup
from .._compiler.jacobian import Coefficient, Entry
from .._compiler.relations import HiddenParamOpRelation
from .._compiler.step import StepRecord
from .._jax import Var, struct, where_compiled
from .._precision import widened
from .._types import PyTree, Shape, path_str

__all__ = [
    "Coefficient", "Jacobian", "Sensitivity", "add", "contraction", "instantaneous", "over_groups", "pair_key",
    "placed", "read_record", "relation_name", "spread", "unbroadcast", "weighted_sum", "x_aval", "x_keys",
]  # fmt: skip

T = TypeVar("T")

_SMALL = 2**15  # elements


class Jacobian(NamedTuple):
    """D of one group at one step: ``entries[a][b]`` is an array, a number, or ``None`` for a known zero."""

    entries: tuple[tuple[Coefficient, ...], ...]

    def dense(self, varshape: Shape, dtype: DTypeLike) -> jax.Array:
        """The array of shape ``V + (S, S)``."""
        rows = [jnp.stack([spread(e, varshape, dtype) for e in row], -1) for row in self.entries]
        return jnp.stack(rows, -2)


class Sensitivity(NamedTuple):
    """df of one relation and group at one step; as :class:`Jacobian`, one entry per hidden variable."""

    entries: tuple[Coefficient, ...]


def spread(entry: Coefficient, shape: Shape, dtype: DTypeLike) -> jax.Array:
    return jnp.zeros(shape, dtype) if entry is None else jnp.broadcast_to(jnp.asarray(entry, dtype), shape)


def unbroadcast(value: jax.Array, shape: Shape) -> jax.Array:
    """Sum over the axes that broadcasting from ``shape`` added or stretched."""
    value = value.sum(tuple(range(value.ndim - len(shape))))
    stretched = tuple(k for k, n in enumerate(shape) if n == 1 != value.shape[k])
    return value.sum(stretched, keepdims=True) if stretched else value


def relation_name(relation: HiddenParamOpRelation) -> str:
    path, call = relation.key
    return f"{path_str(path)}#{relation.op_index}.{call}"


def pair_key(relation: HiddenParamOpRelation, group_index: int) -> str:
    return f"{relation_name(relation)}/hidden_group_{group_index}"


def x_keys(graph: ETraceGraph, filters: Mapping[int, float]) -> dict[int, str]:
    """Relation number -> key of its x-trace; what reads one value in one way, with equal filters, shares one."""
    keys: dict[int, str] = {}
    shared: dict[Hashable, str] = {}
    for i, decay in filters.items():
        r = graph.hidden_param_op_relations[i]
        if r.x_var is None:
            continue
        shapes = tuple((k, v.aval.shape, v.aval.dtype) for k, v in r.weight_vars.items())
        # An own representation (one-hot, say) depends on the weight's shape; the input itself does not.
        how: Hashable = None if r.primitive.rules.pp_x_repr is None else (r.primitive.rules.pp_x_repr, shapes)
        if how is None and not jnp.issubdtype(r.x_var.aval.dtype, jnp.inexact):
            how = (x_aval(r).dtype,)
        keys[i] = shared.setdefault((r.x_var, how, decay), f"x of {relation_name(r)}")
    return keys


def x_aval(relation: HiddenParamOpRelation) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the linear representation of a relation's input."""
    weights = {k: struct(v) for k, v in relation.trainable_vars.items()}
    var: Var = relation.x_var
    x = struct(var)
    if relation.primitive.rules.pp_x_repr is None and jnp.issubdtype(x.dtype, jnp.inexact):
        return x  # the input itself
    return jax.eval_shape(relation.x_repr, x, weights)


def read_record(
    graph: ETraceGraph, record: StepRecord, operands: Sequence[Operands], keys: Mapping[int, str]
) -> tuple[dict[str, jax.Array], dict[str, Sensitivity], list[Jacobian]]:
    """Of one step: inputs by the ``keys`` of relations' x-traces, df by relation and group, D per group."""
    relations = graph.hidden_param_op_relations
    xs: dict[str, jax.Array] = {}
    for i, key in keys.items():
        if key not in xs:
            xs[key] = relations[i].x_repr(record.x[i], operands[i])

    def read(entry: Entry, group: int) -> Coefficient:
        return entry.read(record.varying[group])

    dfs = {
        pair_key(r, g.index): Sensitivity(tuple(read(e, g.index) for e in g.jacobian.df[r.op_index]))
        for r in relations
        for g in r.hidden_groups
    }
    traced = graph.traced
    nothing = Jacobian(())
    Ds = [
        Jacobian(tuple(tuple(read(e, g.index) for e in row) for row in g.jacobian.D)) if g.index in traced else nothing
        for g in graph.hidden_groups
    ]
    return xs, dfs, Ds


def weighted_sum(
    terms: Sequence[tuple[Coefficient, Coefficient]], product: Callable[[PyTree, PyTree], PyTree] = operator.mul
) -> PyTree:
    """Sum of products, leaving out known zeros; ``None`` where nothing is left."""
    return add([product(a, b) for a, b in terms if a is not None and b is not None])


def add(terms: Sequence[T | None]) -> T | None:
    """Sum of arrays, or of trees of one structure, leaving out known zeros; ``None`` where nothing is left."""
    total: T | None = None
    for term in terms:
        if term is not None:
            total = term if total is None else jax.tree.map(jnp.add, total, term)
    return total


def instantaneous(
    relation: HiddenParamOpRelation, dfs: Mapping[str, Sensitivity], signals: Signals
) -> jax.Array | None:
    """``sum_a df_a signal_a``, shaped like y: the position-wise part of the current step."""
    pairs = {
        g.index: list(zip(dfs[pair_key(relation, g.index)].entries, placed(relation, g, signals[g.index])))
        for g in relation.hidden_groups
    }
    return over_groups(relation, pairs)


def placed(relation: HiddenParamOpRelation, group: HiddenGroup, entries: Sequence[T]) -> list[T]:
    """Values per position of a group, for every entry of an operation's output."""
    return [relation.place(group, e) for e in entries]


def over_groups(
    relation: HiddenParamOpRelation, pairs: Mapping[int, Sequence[tuple[Coefficient, jax.Array | None]]]
) -> jax.Array | None:
    """Sum products over hidden variables, groups, and the axes that y lacks."""
    shape = relation.y_var.aval.shape
    parts = [weighted_sum(terms) for terms in pairs.values()]
    return add([None if p is None else unbroadcast(p, shape) for p in parts])


def contraction(
    operation: HiddenParamOpRelation,
    x: jax.Array | None,
    cotangent: jax.Array,
    operands: Operands,
    fixed: Fixed,
    axes: int,
    ones: jax.Array | None = None,
) -> Gradients:
    """Gradient of an operation's operands, summed over ``axes`` leading axes of its inputs and of its cotangent.

    It is made, and left, in the dtype of sums over time. With ``ones``, an array over these axes, ``x`` is a filtered
    representation of the input, and ``ones`` is what the same filter makes of the input 1 of an offset.
    """
    if operation.sub_steps is not None:
        operation, axes = operation.one, axes + 1
        ones = None if ones is None else jnp.broadcast_to(ones[..., None], cotangent.shape[:axes])
    p, params, bound = operation.primitive, operation.eqn_params, ones is None
    x, cotangent, operands, fixed = widened((x, cotangent, dict(operands), dict(fixed)))

    def gradients(x: jax.Array | None, cotangent: jax.Array) -> Gradients:
        return dict(p.summed_vjp(x, cotangent, operands, params, fixed, axes, bound))

    def times(factor: jax.Array) -> jax.Array:
        return (factor.reshape(factor.shape + (1,) * (cotangent.ndim - axes)) * cotangent).astype(cotangent.dtype)

    offset = set(operation.offset_keys)
    gradient = gradients(x, cotangent) if set(operands) - offset or (fixed and bound) else {}
    if offset and not fixed:
        factors = jnp.ones(cotangent.shape[:axes], cotangent.dtype) if ones is None else ones
        # A product with an array runs far faster on a CPU than XLA's reduction over leading axes, and compiles slower.
        if cotangent.size < _SMALL:
            total = times(factors).sum(tuple(range(axes)))
        else:
            total = where_compiled(_weighted_merged, _weighted_apart, factors, cotangent, static=(axes,))
        total = total.astype(cotangent.dtype)
        first = None if x is None else x[(0,) * axes]
        at_first = p.weight_vjp(first, total, operands, params, {}, bound)
        gradient.update({k: at_first[k] for k in offset})
    elif offset and ones is not None:
        of_offsets = gradients(x, times(ones))
        gradient.update({k: of_offsets[k] for k in offset})
    if operation.affine_keys and ones is not None:
        at_zero = gradients(jnp.zeros_like(x), times(ones - 1.0))
        gradient.update({k: gradient[k] + at_zero[k] for k in operation.affine_keys})
    return gradient


def _weighted_apart(axes: int, factors: jax.Array, cotangent: jax.Array) -> jax.Array:
    return jnp.tensordot(factors, cotangent, axes)


def _weighted_merged(axes: int, factors: jax.Array, cotangent: jax.Array) -> jax.Array:
    return jnp.tensordot(factors.reshape(-1), cotangent.reshape((-1, *cotangent.shape[axes:])), 1)
