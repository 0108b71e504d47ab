"""The eligibility trace of pp_prop: one filtered input and one filtered sensitivity per relation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._compiler.graph import ETraceGraph
from .._compiler.relations import HiddenParamOpRelation
from .record import (
    Jacobian,
    Sensitivity,
    Slots,
    contraction,
    over_groups,
    pair_key,
    placed,
    spread,
    weighted_sum,
    x_aval,
    x_keys,
)

__all__ = ["IOTrace", "bias_correction", "contract_io", "contract_io_chunk", "init_io", "join", "split", "update_io"]


class IOTrace(NamedTuple):
    """Traces by key: the filtered input, and the filtered sensitivity, one array of shape V per hidden variable.

    In the trace states the sensitivity is one array of shape ``V + (S,)``: see :func:`join` and :func:`split`.
    """

    xs: dict[str, jax.Array]
    dfs: dict[str, Any]


def split(trace: IOTrace) -> IOTrace:
    return trace._replace(dfs={k: [f[..., a] for a in range(f.shape[-1])] for k, f in trace.dfs.items()})


def join(trace: IOTrace) -> IOTrace:
    return trace._replace(dfs={k: jnp.stack(slots, -1) for k, slots in trace.dfs.items()})


def init_io(graph: ETraceGraph) -> IOTrace:
    """Zero traces, joined."""
    xs, dfs = {}, {}
    for i, key in x_keys(graph).items():
        aval = x_aval(graph.hidden_param_op_relations[i])
        xs[key] = jnp.zeros(aval.shape, aval.dtype)
    for r in graph.hidden_param_op_relations:
        for g in r.hidden_groups:
            custom = r.primitive.rules.init_pp
            shape = (*r.shape_in(g), g.num_state)
            zeros = jnp.zeros(shape, r.y_var.aval.dtype)
            if custom is not None and r.sub_steps is None and r.y_var.aval.shape == g.varshape:
                zeros = custom(r.x_var, r.y_var, r.trainable_vars, g.num_state)
            dfs[pair_key(r, g.index)] = zeros
    return IOTrace(xs, dfs)


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
            key = pair_key(r, g.index)
            slots = trace.dfs[key]
            out = []
            for a, df in enumerate(dfs[key].entries):
                if recursion_f == "jacobian":
                    carried = weighted_sum(list(zip(placed(r, g, Ds[g.index].entries[a]), slots)))
                else:
                    carried = slots[a] if recursion_f == "scalar_leak" else None
                value = weighted_sum([(decay_f, carried), (1.0 - decay_f, df)])
                out.append(spread(value, slots[a].shape, slots[a].dtype))
            new_dfs[key] = out
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
        g.index: list(zip(placed(relation, g, signals[g.index]), trace.dfs[pair_key(relation, g.index)]))
        for g in relation.hidden_groups
    }
    total = over_groups(relation, pairs)
    return None if total is None else (total / correction).astype(relation.y_var.aval.dtype)


def contract_io_chunk(
    relation: HiddenParamOpRelation,
    x_start: Any,
    xs: Any,
    now: jax.Array | None,
    before: jax.Array | None,
    operands: Any,
    fixed: Any,
    axes: int,
) -> dict[str, jax.Array] | None:
    """Gradient of a chunk of K steps from the filtered inputs ``xs`` of its steps, ``x_start`` at its entry.

    ``now[t]`` is the cotangent that meets the trace after step t, ``before[t]`` the one that meets the trace before.
    """
    if before is None:
        return None if now is None else contraction(relation, xs, now, operands, fixed, axes, bound=False)
    if xs is not None:
        xs = jnp.concatenate([x_start[None], xs])
    # Both meet the same K + 1 traces: after step t is before step t + 1.
    nothing = jnp.zeros_like(before[:1])
    total = jnp.concatenate([before, nothing])
    if now is not None:
        total = total + jnp.concatenate([nothing, now])
    if fixed:
        fixed = jax.tree.map(lambda v: jnp.concatenate([v[:1], v]), fixed)
    return contraction(relation, xs, total, operands, fixed, axes, bound=False)
