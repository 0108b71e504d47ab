"""The eligibility trace of pp_prop: one filtered input and one filtered sensitivity per relation.

Pure functions of (trace, one step's record); arrays have no units. With S hidden variables per position, sums over
them are written out, so that XLA fuses them and only the entries of D that can be non-zero cost anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._compiler.cut import Entry
from ._compiler.graph import ETraceGraph
from ._compiler.relations import HiddenParamOpRelation
from ._types import path_str

__all__ = ["IOTrace", "Jacobian", "bias_correction", "contract_io", "init_io", "sensitivities", "update_io"]

Slots = list[Any]  # one array of shape V per hidden variable of a group, or None for a known zero


class Jacobian(NamedTuple):
    """D of one group at one step: ``entries[a][b]`` is an array, a number, or ``None`` for a known zero."""

    entries: tuple[tuple[Any, ...], ...]

    def dense(self, varshape: tuple[int, ...], dtype: Any) -> jax.Array:
        """The array of shape ``V + (S, S)``."""
        rows = [jnp.stack([_spread(e, varshape, dtype) for e in row], -1) for row in self.entries]
        return jnp.stack(rows, -2)


class Sensitivity(NamedTuple):
    """df of one relation and group at one step; as :class:`Jacobian`, one entry per hidden variable."""

    entries: tuple[Any, ...]


class IOTrace(NamedTuple):
    """Traces by key: the filtered input, and the filtered sensitivity of shape ``V + (S,)``."""

    xs: dict[str, jax.Array]
    dfs: dict[str, jax.Array]


def _spread(entry: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros(shape, dtype) if entry is None else jnp.broadcast_to(jnp.asarray(entry, dtype), shape)


def relation_name(relation: HiddenParamOpRelation) -> str:
    path, call = relation.key
    return f"{path_str(path)}#{relation.op_index}.{call}"


def df_key(relation: HiddenParamOpRelation, group_index: int) -> str:
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


def init_io(graph: ETraceGraph) -> IOTrace:
    """Zero traces."""
    xs, dfs = {}, {}
    for i, key in x_keys(graph).items():
        aval = x_aval(graph.hidden_param_op_relations[i])
        xs[key] = jnp.zeros(aval.shape, aval.dtype)
    for r in graph.hidden_param_op_relations:
        for g in r.hidden_groups:
            custom = r.primitive.rules.init_pp
            shape = (*g.varshape, g.num_state)
            zeros = jnp.zeros(shape, r.y_var.aval.dtype)
            if custom is not None and r.y_var.aval.shape == g.varshape:
                zeros = custom(r.x_var, r.y_var, r.trainable_vars, g.num_state)
            dfs[df_key(r, g.index)] = zeros
    return IOTrace(xs, dfs)


def sensitivities(
    graph: ETraceGraph, varying: Sequence[Sequence[Any]]
) -> tuple[dict[str, Sensitivity], list[Jacobian]]:
    """Fill the known structure of df and D with one step's varying entries."""

    def read(entry: Entry, group: int):
        return entry.read(varying[group])

    dfs = {
        df_key(r, g.index): Sensitivity(tuple(read(e, g.index) for e in g.cut.df[r.op_index]))
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


def _weighted_sum(terms: Sequence[tuple[Any, Any]]) -> Any | None:
    """Sum of products, leaving out known zeros."""
    total = None
    for a, b in terms:
        if a is None or b is None:
            continue
        total = a * b if total is None else total + a * b
    return total


def update_io(
    graph: ETraceGraph,
    trace: IOTrace,
    xs: dict[str, jax.Array],
    dfs: dict[str, Sensitivity],
    Ds: Sequence[Jacobian],
    decay_x: float,
    decay_f: float,
    recursion_f: str = "jacobian",
) -> IOTrace:
    r"""One step: :math:`\epsilon_x \leftarrow \alpha_x \epsilon_x + x` and
    :math:`\epsilon_f \leftarrow \alpha_f D \epsilon_f + (1-\alpha_f)\, df`."""
    new_xs = {k: decay_x * trace.xs[k] + xs[k].astype(trace.xs[k].dtype) for k in trace.xs}
    new_dfs = {}
    for r in graph.hidden_param_op_relations:
        for g in r.hidden_groups:
            key = df_key(r, g.index)
            old = trace.dfs[key]
            slots = [old[..., b] for b in range(g.num_state)]
            out = []
            for a, df in enumerate(dfs[key].entries):
                if recursion_f == "jacobian":
                    carried = _weighted_sum(list(zip(Ds[g.index].entries[a], slots)))
                else:
                    carried = slots[a] if recursion_f == "scalar_leak" else None
                value = _weighted_sum([(decay_f, carried), (1.0 - decay_f, df)])
                out.append(_spread(value, g.varshape, old.dtype))
            new_dfs[key] = jnp.stack(out, -1)
    return IOTrace(new_xs, new_dfs)


def bias_correction(decay_f: float, steps: jax.Array) -> jax.Array:
    r""":math:`1 - \alpha^n`, accurate for :math:`\alpha` near 1 and for every n; 1 for an empty trace."""
    n = jnp.asarray(steps, jnp.result_type(float))
    if decay_f == 0.0:
        return jnp.ones_like(n)
    return jnp.where(n > 0, -jnp.expm1(n * math.log(decay_f)), 1.0)


def contract_io(
    relation: HiddenParamOpRelation,
    trace: IOTrace,
    signals: Sequence[Slots],
    correction: jax.Array,
) -> jax.Array | None:
    """The cotangent of the operation's output that the trace gives: ``sum_a signal_a * f_a / c``, shaped like y."""
    pairs = {
        g.index: [(s, trace.dfs[df_key(relation, g.index)][..., a]) for a, s in enumerate(signals[g.index])]
        for g in relation.hidden_groups
    }
    total = _over_groups(relation, pairs)
    return None if total is None else (total / correction).astype(relation.y_var.aval.dtype)


def instantaneous(
    relation: HiddenParamOpRelation, dfs: dict[str, Sensitivity], signals: Sequence[Slots]
) -> jax.Array | None:
    """``sum_a df_a signal_a``, shaped like y: the position-wise part of the current step."""
    pairs = {
        g.index: list(zip(dfs[df_key(relation, g.index)].entries, signals[g.index])) for g in relation.hidden_groups
    }
    return _over_groups(relation, pairs)


def _over_groups(relation, pairs) -> jax.Array | None:
    """Sum products over hidden variables, groups, and the axes that y lacks."""
    total = None
    for terms in pairs.values():
        part = _weighted_sum(terms)
        if part is None:
            continue
        lead = part.ndim - relation.y_var.aval.ndim
        part = part.sum(axis=tuple(range(lead))) if lead else part
        total = part if total is None else total + part
    return total
