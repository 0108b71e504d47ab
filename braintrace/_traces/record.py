"""What one step leaves for the traces, and how it is named.

Arrays have no units. With S hidden variables per position, sums over them are written out, so that XLA fuses them and
only the entries of D that can be non-zero cost anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._compiler.cut import Entry
from .._compiler.graph import ETraceGraph
from .._compiler.relations import HiddenParamOpRelation
from .._types import path_str

__all__ = [
    "Jacobian", "Sensitivity", "Slots", "instantaneous", "over_groups", "pair_key", "relation_name", "sensitivities",
    "spread", "weighted_sum", "x_aval", "x_keys",
]  # fmt: skip

Slots = list[Any]  # one array of shape V per hidden variable of a group, or None for a known zero


class Jacobian(NamedTuple):
    """D of one group at one step: ``entries[a][b]`` is an array, a number, or ``None`` for a known zero."""

    entries: tuple[tuple[Any, ...], ...]

    def dense(self, varshape: tuple[int, ...], dtype: Any) -> jax.Array:
        """The array of shape ``V + (S, S)``."""
        rows = [jnp.stack([spread(e, varshape, dtype) for e in row], -1) for row in self.entries]
        return jnp.stack(rows, -2)


class Sensitivity(NamedTuple):
    """df of one relation and group at one step; as :class:`Jacobian`, one entry per hidden variable."""

    entries: tuple[Any, ...]


def spread(entry: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros(shape, dtype) if entry is None else jnp.broadcast_to(jnp.asarray(entry, dtype), shape)


def relation_name(relation: HiddenParamOpRelation) -> str:
    path, call = relation.key
    return f"{path_str(path)}#{relation.op_index}.{call}"


def pair_key(relation: HiddenParamOpRelation, group_index: int) -> str:
    return f"{relation_name(relation)}/hidden_group_{group_index}"


def x_keys(graph: ETraceGraph) -> dict[int, str]:
    """Relation number -> key of its x-trace; relations that read the same value in the same way share one."""
    keys: dict[int, str] = {}
    shared: dict[Any, str] = {}
    for i, r in enumerate(graph.hidden_param_op_relations):
        if r.x_var is None:
            continue
        shapes = tuple((k, v.aval.shape, v.aval.dtype) for k, v in r.trainable_vars.items())
        # An own representation (one-hot, say) depends on the weight's shape; the input itself does not.
        how: Any = None if r.primitive.rules.pp_x_repr is None else (r.primitive.rules.pp_x_repr, shapes)
        if how is None and not jnp.issubdtype(r.x_var.aval.dtype, jnp.inexact):
            how = (x_aval(r).dtype,)
        keys[i] = shared.setdefault((r.x_var, how), f"x of {relation_name(r)}")
    return keys


def x_aval(relation: HiddenParamOpRelation) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the linear representation of a relation's input."""
    weights = {k: jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for k, v in relation.trainable_vars.items()}
    var: Any = relation.x_var
    x = jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
    return jax.eval_shape(relation.primitive.x_repr, x, weights)


def sensitivities(
    graph: ETraceGraph, varying: Sequence[Sequence[Any]]
) -> tuple[dict[str, Sensitivity], list[Jacobian]]:
    """Fill the known structure of df and D with one step's varying entries."""

    def read(entry: Entry, group: int):
        return entry.read(varying[group])

    dfs = {
        pair_key(r, g.index): Sensitivity(tuple(read(e, g.index) for e in g.cut.df[r.op_index]))
        for r in graph.hidden_param_op_relations
        for g in r.hidden_groups
    }
    traced = {g.index for r in graph.hidden_param_op_relations for g in r.hidden_groups}
    nothing = Jacobian(())
    Ds = [
        Jacobian(tuple(tuple(read(e, g.index) for e in row) for row in g.cut.D)) if g.index in traced else nothing
        for g in graph.hidden_groups
    ]
    return dfs, Ds


def weighted_sum(terms: Sequence[tuple[Any, Any]]) -> Any | None:
    """Sum of products, leaving out known zeros."""
    total = None
    for a, b in terms:
        if a is None or b is None:
            continue
        total = a * b if total is None else total + a * b
    return total


def instantaneous(
    relation: HiddenParamOpRelation, dfs: dict[str, Sensitivity], signals: Sequence[Slots]
) -> jax.Array | None:
    """``sum_a df_a signal_a``, shaped like y: the position-wise part of the current step."""
    pairs = {
        g.index: list(zip(dfs[pair_key(relation, g.index)].entries, signals[g.index])) for g in relation.hidden_groups
    }
    return over_groups(relation, pairs)


def over_groups(relation, pairs) -> jax.Array | None:
    """Sum products over hidden variables, groups, and the axes that y lacks."""
    total = None
    for terms in pairs.values():
        part = weighted_sum(terms)
        if part is None:
            continue
        lead = part.ndim - relation.y_var.aval.ndim
        part = part.sum(axis=tuple(range(lead))) if lead else part
        total = part if total is None else total + part
    return total
