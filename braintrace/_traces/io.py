"""The eligibility trace of pp_prop: one filtered input and one filtered sensitivity per relation.

An offset of an operation is a weight whose input is 1. What a filter makes of this input is the same number everywhere,
known from the count of steps, so that there is no array for it: see :func:`filtered_one`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._compiler.graph import ETraceGraph
from .._compiler.relations import HiddenParamOpRelation
from .._jax import zeros
from .._precision import wide, widened
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

__all__ = [
    "IOTrace", "bias_correction", "contract_io", "contract_io_chunk", "filtered_one", "init_io", "join", "lift_io",
    "split", "update_io",
]  # fmt: skip


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
        xs[key] = zeros(aval.shape, wide(aval.dtype))
    for r in graph.hidden_param_op_relations:
        for g in r.hidden_groups:
            custom = r.primitive.rules.init_pp
            shape = (*r.shape_in(g), g.num_state)
            if custom is not None and r.sub_steps is None and r.y_var.aval.shape == g.varshape:
                own = custom(r.x_var, r.y_var, r.weight_vars, g.num_state)
            else:
                own = zeros(shape, wide(r.y_var.aval.dtype))
            dfs[pair_key(r, g.index)] = widened(own)
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
    return jnp.where(steps > 0, _faded(decay_f, steps), 1.0)


def filtered_one(decay_x: float, steps: jax.Array) -> jax.Array:
    r"""The x-trace of an input that is always 1: :math:`(1 - \alpha^n) / (1 - \alpha)`."""
    return _faded(decay_x, steps) / (1.0 - decay_x)


def _faded(decay: float, steps: jax.Array) -> jax.Array:
    r""":math:`1 - \alpha^n`."""
    n = jnp.asarray(steps, jnp.result_type(float))
    return jnp.where(n > 0, 1.0, 0.0) if decay == 0.0 else -jnp.expm1(n * math.log(decay))


def lift_io(
    relation: HiddenParamOpRelation,
    x: Any,
    operands: Mapping[str, jax.Array],
    fixed: Mapping[int, Any],
    one: jax.Array,
) -> jax.Array:
    """An array like the output whose cotangent reaches the operands through the filtered input ``x``, and ``one``."""

    y = jax.ShapeDtypeStruct(relation.y_var.aval.shape, wide(relation.y_var.aval.dtype))
    operands, fixed = widened((dict(operands), dict(fixed)))

    def lift(x, factors):
        moved = {k: _with_factor(w, factors[k]) if k in factors else w for k, w in operands.items()}
        return relation.primitive.lift(x, moved, relation.eqn_params, fixed, y)

    lifted = lift(x, dict.fromkeys(relation.offset_keys, one))
    if relation.affine_keys:  # linear in the input but for the value where it is zero
        factors = dict.fromkeys(operands, jnp.zeros_like(one)) | dict.fromkeys(relation.affine_keys, one - 1.0)
        lifted += lift(jnp.zeros_like(x), factors)
    return lifted


def _with_factor(value, factor):
    """``value``, with a factor on its cotangent."""
    still = jax.lax.stop_gradient(value)
    return still + (factor * (value - still)).astype(value.dtype)


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
    return None if total is None else (total / correction).astype(wide(relation.y_var.aval.dtype))


def contract_io_chunk(
    relation: HiddenParamOpRelation,
    x_start: Any,
    xs: Any,
    now: jax.Array | None,
    before: jax.Array | None,
    ones: tuple[jax.Array, jax.Array],
    operands: Any,
    fixed: Any,
    axes: int,
) -> dict[str, jax.Array] | None:
    """Gradient of a chunk of K steps from the filtered inputs ``xs`` of its steps, ``x_start`` at its entry.

    ``now[t]`` is the cotangent that meets the trace after step t, ``before[t]`` the one that meets the trace before;
    ``ones`` are the filtered ones after and before every step.
    """
    after, ahead = ones
    if before is None:
        return None if now is None else contraction(relation, xs, now, operands, fixed, axes, after)
    after = jnp.concatenate([ahead[:1], after])
    if xs is not None:
        xs = jnp.concatenate([x_start[None], xs])
    # Both meet the same K + 1 traces: after step t is before step t + 1.
    nothing = jnp.zeros_like(before[:1])
    total = jnp.concatenate([before, nothing])
    if now is not None:
        total = total + jnp.concatenate([nothing, now])
    if fixed:
        fixed = jax.tree.map(lambda v: jnp.concatenate([v[:1], v]), fixed)
    return contraction(relation, xs, total, operands, fixed, axes, after)
