"""The eligibility trace of D_RTRL: one entry per trained weight, sample and hidden variable.

Pure functions of (trace, one step's record); arrays have no units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._compiler.graph import ETraceGraph
from .._compiler.positions import MANY, NONE, no_cut, own_label, propagate
from .._compiler.relations import HiddenParamOpRelation
from .._jax import open_jaxpr
from .._types import path_str
from .record import Jacobian, Sensitivity, Slots, pair_key

__all__ = ["ParamMeta", "ParamTrace", "contract_param", "init_param", "meta_of", "update_param"]

ParamTrace = dict[str, dict[str, jax.Array]]  # pair key -> trained key -> array of shape (lead, weight shape, S)


class ParamMeta(NamedTuple):
    """What of a relation is known before the first step: its batch axes, and where each weight entry acts."""

    lead: int
    anchors: Mapping[str, Any]


def meta_of(relation: HiddenParamOpRelation) -> ParamMeta:
    """Find the output position of every weight entry from the derivative of the operation.

    Raises
    ------
    NotImplementedError
        If one weight entry acts on several positions of a sample, or an untrained operand has a batch axis.
    """
    p, y = relation.primitive, relation.y_var.aval
    lead = p.lead(y)
    weights = {k: _struct(v) for k, v in relation.trainable_vars.items()}
    fixed = {i: _struct(v) for i, v in relation.fixed_vars.items()}
    where = f"{p.name} at {path_str(relation.path)!r}"
    if lead and any(f.shape[:lead] == y.shape[:lead] and len(f.shape) == y.ndim for f in fixed.values()):
        raise NotImplementedError(
            f"An operand of {where} that is not trained has a batch axis. Use braintrace.pp_prop, or apply it outside."
        )
    if relation.x_var is None or p.rules.dt_to_t is not None:
        return ParamMeta(lead, dict.fromkeys(weights))
    ones = (1,) * lead
    x = jax.ShapeDtypeStruct(ones + relation.x_var.aval.shape[lead:], relation.x_var.aval.dtype)
    cotangent = jax.ShapeDtypeStruct(ones + y.shape[lead:], y.dtype)

    def derivative(x, cotangent, weights, fixed):
        return p.weight_vjp(x, cotangent, weights, relation.eqn_params, fixed)

    jaxpr = open_jaxpr(jax.make_jaxpr(derivative)(x, cotangent, weights, fixed))
    env = {jaxpr.invars[1]: {("y", 0): own_label(cotangent.shape, len(cotangent.shape))}}
    propagate(jaxpr.eqns, env, no_cut)
    anchors: dict[str, Any] = {}
    for key, var in zip(sorted(weights), jaxpr.outvars):
        label = env.get(var, {}).get(("y", 0))
        index = [] if label is None else [np.where(a == NONE, 0, a) for a in label[1 + lead :]]
        if label is None or any(np.any(a == MANY) for a in index):
            raise NotImplementedError(
                f"A weight of {where} acts on several positions of one sample, so that there is no single trace per "
                "weight. Use braintrace.pp_prop, or register dt_to_t on the operation."
            )
        # Where the position is that of the last axes, broadcasting does: far cheaper than a gather.
        own = own_label(weights[key].shape, len(weights[key].shape))
        tail = len(weights[key].shape) - len(index)
        aligned = tail >= 0 and all(np.array_equal(a, own[1 + tail + i]) for i, a in enumerate(index))
        anchors[key] = None if aligned else tuple(index)
    return ParamMeta(lead, anchors)


def _struct(var: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def init_param(graph: ETraceGraph, metas: Sequence[ParamMeta], dtype: Any) -> ParamTrace:
    """Zero traces."""
    traces: ParamTrace = {}
    for r, meta in zip(graph.hidden_param_op_relations, metas):
        custom = r.primitive.rules.init_drtrl
        for g in r.hidden_groups:
            batch = g.varshape[: meta.lead]
            own = None if custom is None else custom(r.x_var, r.y_var, r.trainable_vars, g.num_state)
            traces[pair_key(r, g.index)] = {
                k: own[k]
                if own is not None
                else jnp.zeros(
                    (*(g.varshape if r.x_var is None else (*batch, *v.aval.shape)), g.num_state),
                    dtype or jnp.result_type(v.aval.dtype, r.y_var.aval.dtype),
                )
                for k, v in r.trainable_vars.items()
            }
    return traces


def _times(relation, meta, coefficient: Any, trace: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A coefficient (a number, or an array over positions) times the trace entries of its positions."""
    if jnp.ndim(coefficient) == 0 or relation.x_var is None:
        return {k: coefficient * e for k, e in trace.items()}
    return relation.primitive.spread_signal(coefficient, trace, relation.eqn_params, meta.anchors, meta.lead)


def _add(terms: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array] | None:
    return {k: sum((t[k] for t in terms[1:]), terms[0][k]) for k in terms[0]} if terms else None


def instant(relation, meta, x, df, operands, fixed) -> dict[str, jax.Array]:
    """``df`` times the derivative of the output with respect to the weights, per sample."""
    group_shape = jnp.shape(df)
    if relation.x_var is None:
        # One weight entry per unit, the same for every sample.
        def pull(cotangent):
            return relation.primitive.weight_vjp(None, cotangent, operands, relation.eqn_params, fixed)

        for _ in range(len(group_shape) - relation.y_var.aval.ndim):
            pull = jax.vmap(pull)
        return pull(df)
    return relation.primitive.sample_vjp(x, df, operands, relation.eqn_params, fixed, meta.lead)


def update_param(
    graph: ETraceGraph,
    metas: Sequence[ParamMeta],
    traces: ParamTrace,
    xs: Sequence[Any],
    dfs: Mapping[str, Sensitivity],
    Ds: Sequence[Jacobian],
    operands: Sequence[Mapping[str, jax.Array]],
    fixed: Sequence[Mapping[int, Any]],
    recursion: str = "jacobian",
    decay: float | None = None,
) -> ParamTrace:
    r"""One step: :math:`\epsilon \leftarrow D \epsilon + \mathrm{df} \otimes x` for every weight entry."""
    out: ParamTrace = {}
    for i, (r, meta) in enumerate(zip(graph.hidden_param_op_relations, metas)):
        for g in r.hidden_groups:
            key = pair_key(r, g.index)
            old = traces[key]
            slots = [{k: e[..., a] for k, e in old.items()} for a in range(g.num_state)]
            new = []
            for a, df in enumerate(dfs[key].entries):
                if recursion == "jacobian":
                    row: Sequence[Any] = Ds[g.index].entries[a]
                else:
                    row = [decay if b == a and decay else None for b in range(g.num_state)]
                terms = [_times(r, meta, d, slots[b]) for b, d in enumerate(row) if d is not None]
                if df is not None:
                    spread = jnp.broadcast_to(jnp.asarray(df, r.y_var.aval.dtype), g.varshape)
                    terms.append(instant(r, meta, xs[i], spread, operands[i], fixed[i]))
                new.append(_add(terms) or {k: jnp.zeros_like(e) for k, e in slots[a].items()})
            out[key] = {k: jnp.stack([n[k].astype(e.dtype) for n in new], -1) for k, e in old.items()}
    return out


def contract_param(
    relation: HiddenParamOpRelation, meta: ParamMeta, traces: ParamTrace, signals: Sequence[Slots]
) -> dict[str, jax.Array] | None:
    """``sum_a <signal_a, trace_a>`` over samples and positions, shaped like the weights."""
    terms = []
    for g in relation.hidden_groups:
        trace = traces[pair_key(relation, g.index)]
        for a, signal in enumerate(signals[g.index]):
            if signal is None:
                continue
            slot = {k: e[..., a].astype(jnp.result_type(e.dtype, signal.dtype)) for k, e in trace.items()}
            terms.append(_times(relation, meta, signal, slot))
    total = _add(terms)
    if total is None:
        return None
    out = {}
    for k, v in relation.trainable_vars.items():
        extra = total[k].ndim - v.aval.ndim
        out[k] = total[k].sum(tuple(range(extra))).astype(v.aval.dtype)
    return out
