r"""The eligibility trace of D_RTRL: one entry per trained weight, sample and hidden variable.

Pure functions of traces and records; arrays have no units. A trace is kept per *slot*, one array per hidden variable.
A slot whose coefficients in D and df are numbers, the same at every position and step, is kept *factorised*: its trace
is the product of a filtered input with ones, so that only the filtered input is stored. A trace filter doubles the
slots: the filtered trace obeys :math:`\bar\epsilon \leftarrow \kappa\bar\epsilon + D\epsilon + \mathrm{df} \otimes x`.
Where the trace of a weight follows the neighbours of its position, they are the last axis of every slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._compiler.groups import HiddenGroup
from .._compiler.positions import MANY, NONE, is_aligned, no_cut, own_label, propagate
from .._compiler.relations import HiddenParamOpRelation
from .._jax import Literal, open_jaxpr, zeros
from .._precision import wide, widened
from .._types import path_str
from .record import (
    Slots,
    add,
    contraction,
    pair_key,
    placed,
    spread,
    unbroadcast,
    weighted_sum,
    x_aval,
)
from .samples import met

__all__ = [
    "ChunkCoefficients", "Pair", "ParamMeta", "Recursion", "SlotTrace", "chunk_coefficients", "chunk_update",
    "contract", "dense", "factorised_slots", "init", "meta_of", "recursion_of", "update",
]  # fmt: skip

SlotTrace = dict[str, list[jax.Array]]  # trained key -> one array per slot: (lead, weight shape), or a filtered input
Row = Sequence[Any]  # entries that are arrays, numbers, or None for a known zero


class Recursion(NamedTuple):
    """``D`` and, per relation, ``df`` of one group over its slots, filtered ones included."""

    D: tuple[Row, ...]
    df: dict[int, Row]

    @property
    def width(self) -> int:
        return len(self.D)


def recursion_of(D: Sequence[Row], df: Mapping[int, Row], kind: str, decay: float | None, kappa: float | None):
    """The recursion that the traces obey: D as it is, a leak or nothing in its place, and a filter on top."""
    n = len(D)
    if kind != "jacobian":
        D = [[decay if decay and a == b else None for b in range(n)] for a in range(n)]
    if kappa is None:
        return Recursion(tuple(map(tuple, D)), {i: tuple(row) for i, row in df.items()})
    nothing = [None] * n
    upper = [(*row, *nothing) for row in D]
    lower = [(*row, *(kappa if a == b else None for b in range(n))) for a, row in enumerate(D)]
    return Recursion((*upper, *lower), {i: (*row, *row) for i, row in df.items()})


def factorised_slots(recursion: Recursion, number: int) -> frozenset:
    """The largest set of slots that only numbers drive, from the input and from each other."""
    is_number = lambda e: e is None or np.ndim(e) == 0 and not hasattr(e, "dtype")  # noqa: E731
    slots = {a for a in range(recursion.width) if is_number(recursion.df[number][a])}
    while True:
        kept = {
            a for a in slots if all(e is None or (b in slots and is_number(e)) for b, e in enumerate(recursion.D[a]))
        }
        if kept == slots:
            return frozenset(slots)
        slots = kept


# -- what is known of a relation before the first step --------------------------------------------------------------


class ParamMeta(NamedTuple):
    """Batch axes of a relation, where each trace entry acts, and the trace's shape per sample."""

    relation: HiddenParamOpRelation  # of one sub-step: all sub-steps add to one trace
    lead: int
    anchors: Mapping[str, Any]
    unshared: Any  # the operation with a weight entry for every position, where its own act on several; or None
    shapes: Mapping[str, tuple[int, ...]]
    sub_steps: int | None = None  # axis of that size in front of the batch axes of inputs and of df


def meta_of(relation: HiddenParamOpRelation) -> ParamMeta:
    """Find the output position of every trace entry from the derivative of the operation.

    Raises
    ------
    NotImplementedError
        If one weight entry acts on several positions of a sample, or an untrained operand has a batch axis.
    """
    return _meta_of_one(relation.one)._replace(sub_steps=relation.sub_steps)


class Pair(NamedTuple):
    """A relation and one of its groups, which have a trace of their own."""

    number: int  # of the relation
    relation: HiddenParamOpRelation
    group: HiddenGroup
    meta: ParamMeta
    factorised: frozenset  # slots

    @property
    def key(self) -> str:
        return pair_key(self.relation, self.group.index)


def _meta_of_one(relation: HiddenParamOpRelation) -> ParamMeta:
    p, y = relation.primitive, relation.y_var.aval
    lead = p.lead(y, relation.eqn_params)
    weights = {k: _struct(v) for k, v in relation.trainable_vars.items()}
    fixed = {i: _struct(v) for i, v in relation.fixed_vars.items()}
    untrained = {k: fixed[i] for k, i in relation.untrained.items()}
    where = f"{p.name} at {path_str(relation.path)!r}"
    shapes = {k: w.shape for k, w in weights.items()}
    if lead and _reads_by_sample(relation, weights, fixed):
        raise NotImplementedError(
            f"An operand of {where} that is not trained has a batch axis. Use braintrace.pp_prop, or apply it outside."
        )
    if relation.x_var is None:
        # Without an entry of its own for every position, the trace is that of the output, and an anchor says so.
        anchors: Mapping[str, Any] = {k: None if _pointwise(relation, k) else () for k in weights}
        if () in anchors.values() and fixed.keys() - relation.constant:
            raise NotImplementedError(
                f"A weight of {where} acts on several positions, in another way at every step. Use braintrace.pp_prop."
            )
        return ParamMeta(relation, lead, anchors, None, shapes)
    x = jax.ShapeDtypeStruct(relation.x_var.aval.shape[lead:], relation.x_var.aval.dtype)
    one_y = jax.ShapeDtypeStruct(y.shape[lead:], y.dtype)
    steady = weights | {k: w for k, w in untrained.items() if relation.untrained[k] in relation.constant}
    unshared = None if p.rules.unshare is None else p.rules.unshare(x, one_y, steady, relation.eqn_params)
    if unshared is not None:
        own = jax.eval_shape(unshared.expand, weights | untrained)
        shapes, weights = {k: own[k].shape for k in weights}, own
    meta = ParamMeta(relation, lead, {}, unshared, shapes)
    if p.rules.dt_to_t is not None:
        return meta._replace(anchors=dict.fromkeys(shapes))
    if p.rules.anchors is not None:
        anchors = p.rules.anchors(one_y, weights, relation.eqn_params)
        return meta._replace(anchors={k: anchors[k] for k in shapes})
    return meta._replace(anchors=_find_anchors(meta, x, one_y, weights, fixed, where))


def _reads_by_sample(relation, weights, fixed) -> bool:
    """Whether every sample of the output reads its own part of some untrained operand."""
    p, y = relation.primitive, relation.y_var.aval
    if y.shape[0] == 1:  # a single sample reads what there is
        return False
    x = None if relation.x_var is None else _struct(relation.x_var)
    jaxpr = open_jaxpr(jax.make_jaxpr(lambda x, w, f: p.apply(x, w, relation.eqn_params, f))(x, weights, fixed))
    operands = jaxpr.invars[len(jaxpr.invars) - len(fixed) :]
    env = {v: {("fixed", i): own_label(v.aval.shape, len(v.aval.shape))} for i, v in enumerate(operands)}
    propagate(jaxpr.eqns, env, no_cut)
    own = own_label(y.shape, 1)[1]
    labels = [] if isinstance(jaxpr.outvars[0], Literal) else env.get(jaxpr.outvars[0], {}).values()
    return any(len(label) > 1 and np.all((label[1] == own) | (label[1] == NONE)) for label in labels)


def _find_anchors(meta, x, y, weights, fixed, where) -> dict[str, Any]:
    def derivative(x, cotangent, weights, constants, fixed):
        return jax.vjp(lambda w: _sample(meta, x, w | constants, fixed), weights)[1](cotangent)[0]

    trained = meta.relation.trainable_vars
    constants = {k: w for k, w in weights.items() if k not in trained}
    weights = {k: weights[k] for k in trained}
    jaxpr = open_jaxpr(jax.make_jaxpr(derivative)(x, y, weights, constants, fixed))
    env = {jaxpr.invars[1]: {("y", 0): own_label(y.shape, len(y.shape))}}
    propagate(jaxpr.eqns, env, no_cut)
    anchors: dict[str, Any] = {}
    for key, var in zip(sorted(weights), jaxpr.outvars):
        label = env.get(var, {}).get(("y", 0))
        index = [] if label is None else [np.where(a == NONE, 0, a) for a in label[1:]]
        if label is None or any(np.any(a == MANY) for a in index):
            raise NotImplementedError(
                f"A weight of {where} acts on several positions of one sample, so that there is no single trace per "
                "weight. Use braintrace.pp_prop, or register the rule unshare or dt_to_t on the operation."
            )
        # Where the position is that of the last axes, broadcasting does: far cheaper than a gather.
        own = own_label(weights[key].shape, len(weights[key].shape))
        tail = len(weights[key].shape) - len(index)
        aligned = tail >= 0 and all(np.array_equal(a, own[1 + tail + i]) for i, a in enumerate(index))
        anchors[key] = None if aligned else tuple(index)
    return anchors


def _struct(var: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def _pointwise(relation: HiddenParamOpRelation, key: str) -> bool:
    """Whether the output of an operation without input depends entry by entry on a weight."""
    others = {k: _struct(v) for k, v in relation.trainable_vars.items()}
    w, y = others.pop(key), relation.y_var.aval
    fixed = {i: _struct(v) for i, v in relation.fixed_vars.items()}

    def value(w, others, fixed):
        return relation.primitive.apply_sample(None, {**others, key: w}, relation.eqn_params, fixed)

    jaxpr = open_jaxpr(jax.make_jaxpr(value)(w, others, fixed))
    env = {jaxpr.invars[0]: {("w", 0): own_label(w.shape, len(w.shape))}}
    propagate(jaxpr.eqns, env, no_cut)
    label = env.get(jaxpr.outvars[0], {}).get(("w", 0))
    return w.shape == y.shape and (label is None or is_aligned(label, w.shape))


def init(pair: Pair, width: int, dtype: Any) -> SlotTrace:
    """Zero traces, in ``dtype`` or in that of sums over time."""
    meta, group, relation = pair.meta, pair.group, pair.meta.relation
    custom = relation.primitive.rules.init_drtrl
    own = custom and custom(relation.x_var, relation.y_var, relation.weight_vars, group.num_state)
    y, whole = relation.y_var.aval, relation.shape_in(group)
    batch = whole[: meta.lead]
    trace: SlotTrace = {}
    for k, v in relation.trainable_vars.items():
        kept = jnp.result_type(v.aval.dtype, y.dtype)
        full = whole if relation.x_var is None else (*batch, *meta.shapes[k])
        if own:
            full, kept = own[k].shape[:-1], own[k].dtype
        kept = dtype or wide(kept)
        filtered = () if k in relation.offset_keys or relation.x_var is None else x_aval(relation).shape
        behind = () if group.snap is None else (group.snap.num_neighbour,)
        trace[k] = [zeros(filtered if a in pair.factorised else (*full, *behind), kept) for a in range(width)]
    return trace


# -- one entry of the recursion ---------------------------------------------------------------------------------------


def _sample(meta, x, weights, fixed):
    relation = meta.relation
    if meta.unshared is not None:
        return meta.unshared.impl(x, weights)
    return relation.primitive.apply_sample(x, weights, relation.eqn_params, fixed)


def _own(meta: ParamMeta, operands, fixed):
    """The weights that have traces: the operation's own, or one for every position; and constants beside these."""
    if meta.unshared is None:
        return dict(operands), {}
    own = meta.unshared.expand({**operands, **{k: fixed[i] for k, i in meta.relation.untrained.items()}})
    return {k: own[k] for k in operands}, {k: w for k, w in own.items() if k not in operands}


def instant(meta, x, coefficient, operands, fixed, extra: int = 0, time: bool = False) -> dict[str, jax.Array]:
    """``coefficient`` times the derivative of the output with respect to the weights, per sample.

    ``extra`` axes of mapped samples stand in front of the batch axes of the operation; with ``time`` another one in
    front of these is summed over, as are sub-steps, whose axis stands between mapped samples and batch.
    """
    x, coefficient, operands, fixed = widened((x, coefficient, dict(operands), dict(fixed)))
    if meta.sub_steps is not None:
        x, coefficient, fixed = jax.tree.map(lambda v: _first(v, extra, time), (x, coefficient, fixed))
        return instant(meta._replace(sub_steps=None), x, coefficient, operands, fixed, extra, True)
    if meta.relation.x_var is None:
        return _instant_without_input(meta, coefficient, operands, fixed, extra, time)

    def of_sample(x, coefficient, fixed):
        def apply(weights):
            one = lambda x, fixed: _sample(meta, x, weights | _own(meta, operands, fixed)[1], fixed)  # noqa: E731
            return (jax.vmap(one) if time else one)(x, fixed)

        weights, _ = _own(meta, operands, jax.tree.map(lambda v: v[0], fixed) if time else fixed)
        y, pull = jax.vjp(apply, weights)
        return pull(coefficient.astype(y.dtype))[0]

    axis = int(time)
    for _ in range(meta.lead):
        of_sample = jax.vmap(of_sample, in_axes=(axis, axis, None))
    for _ in range(extra):
        of_sample = jax.vmap(of_sample, in_axes=axis)
    return of_sample(x, coefficient, fixed)


def _first(value, extra, time):
    """The axis of sub-steps moved to the front, and merged with that of time."""
    if not time:
        return jnp.moveaxis(value, extra, 0)
    value = jnp.moveaxis(value, 1 + extra, 1)
    return value.reshape((-1, *value.shape[2:]))


def _instant_without_input(meta, coefficient, operands, fixed, extra, time):
    relation = meta.relation

    def times(coefficient, unit):
        def slopes(fixed):
            units = jnp.full(relation.y_var.aval.shape, unit)
            found = relation.primitive.weight_vjp(None, units, operands, relation.eqn_params, fixed)
            # Where a weight has no entry for every position, the trace is that of the output.
            return {k: v if meta.anchors[k] is None else units for k, v in found.items()}

        if not fixed:
            total = coefficient.sum(0) if time else coefficient
            return {k: total * v for k, v in slopes({}).items()}
        front = extra + int(time)
        for _ in range(front):
            slopes = jax.vmap(slopes)
        between = (1,) * (coefficient.ndim - front - relation.y_var.aval.ndim)
        found = {k: v.reshape(*v.shape[:front], *between, *v.shape[front:]) for k, v in slopes(fixed).items()}
        now = {k: coefficient * v for k, v in found.items()}
        return {k: v.sum(0) for k, v in now.items()} if time else now

    one = jnp.ones((), coefficient.dtype)
    if not jnp.iscomplexobj(one):
        return times(coefficient, one)
    # Of a complex output the derivative is linear in the two parts of the cotangent, and no more than that.
    return add([times(jnp.real(coefficient), one), times(jnp.imag(coefficient), 1j * one)])


def _times(meta, coefficient: Any, trace: Mapping[str, jax.Array], extra: int) -> dict[str, jax.Array]:
    """A coefficient (a number, or an array over positions) times the trace entries of its positions."""
    relation = meta.relation
    if jnp.ndim(coefficient) == 0 or relation.x_var is None:
        return {k: coefficient * e for k, e in trace.items()}
    lead = meta.lead + extra
    return relation.primitive.spread_signal(coefficient, trace, relation.eqn_params, meta.anchors, lead)


def _broadcasts(meta) -> bool:
    """Whether the position of every trace entry is that of its last axes."""
    return meta.relation.primitive.rules.dt_to_t is None and all(a is None for a in meta.anchors.values())


def _outer(meta, filtered, coefficient, operands, extra) -> dict[str, jax.Array]:
    """A factorised slot, spread over positions: filtered input times coefficient."""
    relation = meta.relation
    x = next((filtered[k] for k in filtered if k not in relation.offset_keys), None)
    if x is None:  # offsets alone: any input will do
        x = jnp.zeros((*coefficient.shape[:extra], *x_aval(relation).shape), x_aval(relation).dtype)
    out = instant(meta, x, coefficient, operands, {}, extra)
    for k in relation.offset_keys:
        count = filtered[k].reshape(filtered[k].shape + (1,) * (out[k].ndim - filtered[k].ndim))
        out[k] = count * out[k]
    return out


def _slot(trace: SlotTrace, a: int) -> dict[str, jax.Array]:
    return {k: slots[a] for k, slots in trace.items()}


def _full(relation, entry, shape):
    return spread(entry, shape, wide(relation.y_var.aval.dtype))


# -- one step ---------------------------------------------------------------------------------------------------------


def update(
    pair: Pair,
    recursion: Recursion,
    trace: SlotTrace,
    x: Any,
    operands: Mapping[str, jax.Array],
    fixed: Mapping[int, Any],
) -> SlotTrace:
    r"""One step: :math:`\epsilon \leftarrow D \epsilon + \mathrm{df} \otimes x`."""
    new: list[dict[str, jax.Array]] = []
    meta, relation = pair.meta, pair.meta.relation
    shape = relation.shape_in(pair.group)
    for a, (row, df) in enumerate(zip(recursion.D, recursion.df[pair.number])):
        old, row = _slot(trace, a), placed(relation, pair.group, row)
        if a in pair.factorised:
            source = relation.x_repr(x, operands)
            inputs = {k: 1.0 if k in relation.offset_keys else source for k in trace}
            value = {k: weighted_sum([*zip(row, slots), (df, inputs[k])]) for k, slots in trace.items()}
        else:
            terms = []
            for b, d in enumerate(row):
                if d is None:
                    continue
                if b in pair.factorised:
                    terms.append(_outer(meta, _slot(trace, b), _full(relation, d, shape), operands, 0))
                else:
                    terms.append(_carried(pair, d, _slot(trace, b)))
            if df is not None:
                whole = pair.relation.shape_in(pair.group)
                now = instant(meta, x, _full(relation, df, whole), operands, fixed)
                terms.append(now if pair.group.snap is None else _of_itself(pair.group.snap, now))
            value = add(terms) or dict.fromkeys(trace)
        kept = {k: spread(value[k], old[k].shape, old[k].dtype) for k in old}
        if all(d is None for d in row):
            # Under jax.vmap all arrays of a trace must stay mapped, also one that no sample changes.
            kept = {k: jnp.where(False, old[k], kept[k]) for k in old}
        new.append(kept)
    return {k: [slot[k] for slot in new] for k in trace}


def _carried(pair, d, slot) -> dict[str, jax.Array]:
    """An entry of D times a slot; between neighbours, a small matrix times a vector for every trace entry."""
    if pair.group.snap is None or jnp.ndim(d) == 0:
        return _times(pair.meta, d, slot, 0)
    if _broadcasts(pair.meta):
        return {k: _batched_product(d, e, pair.meta.lead) for k, e in slot.items()}

    def to_one(row):
        terms = jax.vmap(lambda c, e: _times(pair.meta, c, e, 0), in_axes=(0, -1))(row, slot)
        return {k: v.sum(0) for k, v in terms.items()}

    return jax.vmap(to_one, out_axes=-1)(d)


def _batched_product(d, entry, lead):
    """``d``: two axes of neighbours, then positions; ``entry``: ``lead`` batch axes, any, the other positions, one of
    neighbours."""
    i, j, *positions = range(d.ndim)
    batch, units = positions[:lead], positions[lead:]
    own = list(range(d.ndim, d.ndim + entry.ndim - 1 - len(positions)))
    return jnp.einsum(d, (i, j, *positions), entry, (*batch, *own, *units, j), (*batch, *own, *units, i))


def _of_itself(snap, now):
    """What a weight does at its own position, which is the first of its neighbours."""
    first = np.arange(snap.num_neighbour) == 0
    return {k: v[..., None] * first for k, v in now.items()}


def contract(
    pair: Pair,
    trace: SlotTrace,
    signals: Slots,
    operands: Mapping[str, jax.Array],
    fixed: Mapping[int, Any],
    extra: int = 0,
) -> dict[str, jax.Array] | None:
    """``sum_a <signal_a, trace_a>`` over samples and positions, shaped like the weights."""
    terms, whole = [], []
    relation, snap = pair.meta.relation, pair.group.snap
    if snap is not None:
        signals = [None if s is None else snap.gather(s) for s in signals]
    for a, signal in enumerate(placed(relation, pair.group, signals)):
        if signal is None:
            continue
        slot = _slot(trace, a)
        slot = {k: e.astype(wide(jnp.result_type(e.dtype, signal.dtype))) for k, e in slot.items()}
        if a in pair.factorised:
            terms.append(_contract_factorised(relation, slot, signal, operands, extra))
        elif snap is not None:
            met = jax.vmap(lambda s, e: _over_samples(pair.meta, s, e, extra), in_axes=(0, -1))(signal, slot)
            whole.append({k: v.sum(0) for k, v in met.items()})
        else:
            whole.append(_over_samples(pair.meta, signal, slot, extra))
    total = add(whole)
    if total is not None:
        terms.append(_to_weights(pair.meta, total, operands, fixed, extra))
    return add(terms)


def _contract_factorised(relation, filtered, signal, operands, extra):
    x = next((filtered[k] for k in filtered if k not in relation.offset_keys), None)
    out = {} if x is None else contraction(relation, x, signal, operands, {}, extra)
    for k in relation.offset_keys:
        count = filtered[k].reshape(filtered[k].shape + (1,) * (signal.ndim - filtered[k].ndim))
        x = jnp.zeros((*signal.shape[:extra], *x_aval(relation).shape), x_aval(relation).dtype)
        out[k] = contraction(relation, x, count * signal, operands, {}, extra)[k]
    return out


def _over_samples(meta, signal, slot, extra) -> dict[str, jax.Array]:
    """A signal times the trace entries of its positions, summed over samples."""
    relation, lead = meta.relation, meta.lead + extra
    if relation.x_var is None:
        return {k: signal * e for k, e in slot.items()}
    if relation.primitive.rules.dt_to_t is not None:
        products = _times(meta, signal, slot, extra)
        return {k: met(jnp.ones(v.shape[:lead], v.dtype), v, lead) if lead else v for k, v in products.items()}
    if not _broadcasts(meta):
        ones = {k: jnp.ones_like(e) for k, e in slot.items()}
        return {k: met(s, slot[k], lead) for k, s in _times(meta, signal, ones, extra).items()}
    return {k: met(signal, e, lead) for k, e in slot.items()}


def _to_weights(meta, total, operands, fixed, extra):
    """Pull trace-shaped gradients back to the operation's weights, in the dtype of sums over time."""
    relation = meta.relation
    # What is pulled back here is the same for all samples and sub-steps.
    first = (0,) * (extra + int(meta.sub_steps is not None))
    operands, fixed = widened((dict(operands), {i: v[first] for i, v in fixed.items()}))
    if relation.x_var is None:
        out = {}
        for k, value in total.items():
            value = unbroadcast(value, relation.y_var.aval.shape)
            if meta.anchors[k] is not None:
                value = relation.primitive.weight_vjp(None, value, operands, relation.eqn_params, fixed)[k]
            out[k] = unbroadcast(value, meta.shapes[k])
    elif meta.unshared is not None:
        own, pull = jax.vjp(lambda w: _own(meta, w, fixed)[0], operands)
        (out,) = pull({k: total[k].astype(own[k].dtype) for k in own})
    else:
        out = {k: unbroadcast(e, meta.shapes[k]) for k, e in total.items()}
    return {k: out[k].astype(w.dtype) for k, w in operands.items()}


def dense(pair: Pair, trace: SlotTrace, operands, width: int, front: tuple[int, ...]) -> dict[str, jax.Array]:
    """The trace as arrays with the slots along a last axis; neighbours come before the slots of each."""
    relation = pair.meta.relation
    slots = []
    for a in range(width):
        slot = _slot(trace, a)
        if a in pair.factorised:
            ones = _full(relation, 1.0, (*front, *relation.shape_in(pair.group)))
            whole = _outer(pair.meta, slot, ones, operands, len(front))
            slot = {k: whole[k].astype(slot[k].dtype) for k in slot}
        slots.append(slot)
    stacked = {k: jnp.stack([slot[k] for slot in slots], -1) for k in trace}
    return stacked if pair.group.snap is None else {k: v.reshape(*v.shape[:-2], -1) for k, v in stacked.items()}


# -- a chunk of K steps -----------------------------------------------------------------------------------------------
#
# With a_t = q_t + D_{t+1}' a_{t+1} (q_t: the signals that meet the trace after step t; D': transposed) and
# M_t = D_K ... D_{t+1}, both taken backward in time, position by position,
#
#   gradient = sum_t x_t (x) <df_t, a_t> + <q_0 + D_1' a_1, trace_0>
#   trace_K  = M_0 trace_0 + sum_t M_t df_t (x) x_t
#
# so that every weight-sized array is touched once a chunk, by products over time.


class ChunkCoefficients(NamedTuple):
    y: dict[int, jax.Array | None]  # relation -> <df_t, a_t>, (K, *y)
    u: dict[int, list[Any]]  # relation -> per slot M_t df_t, (K, *V), or None
    entry: list[Any]  # per slot D_1' a_1, V, or None
    M: list[list[Any]]  # M_0, V each, or None


def chunk_coefficients(
    of_groups: Sequence[tuple[Any, Any, Slots, Sequence[Pair]]], length: int
) -> list[ChunkCoefficients]:
    """Everything that a chunk needs beside the inputs, for the pairs of every group and for one sample.

    Per group ``read(varying entries of one step) -> Recursion``, these entries, the signals (per slot ``(K, *V)`` or
    ``None``), and the pairs. One loop serves all groups: many small ones take far longer to compile.
    """
    parts = [_Backward(read, varying, pairs, signals) for read, varying, signals, pairs in of_groups]

    def body(carry, items):
        both = [part.step(c, item) for part, c, item in zip(parts, carry, items)]
        return [c for c, _ in both], [out for _, out in both]

    items = [(varying, signals) for _, varying, signals, _ in of_groups]
    carry, outs = jax.lax.scan(body, [part.start for part in parts], items, length=length, reverse=True)
    return [part.result(c, out) for part, c, out in zip(parts, carry, outs)]


class _Backward:
    """The recursions of a chunk for one group, backward in time."""

    def __init__(self, read: Any, varying: Any, pairs: Sequence[Pair], signals: Slots):
        self.read, self.group = read, pairs[0].group
        self.relations = {p.number: p.relation for p in pairs}
        self.dtype = wide(pairs[0].relation.y_var.aval.dtype)
        structure = read(jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), varying))
        self.width = n = structure.width
        self.kept = [a for a in range(n) if not all(a in p.factorised for p in pairs)]
        has = [[e is not None for e in row] for row in structure.D]
        self.felt = _closure({a for a in range(n) if signals[a] is not None}, has)
        self.backward = {b for b in range(n) if any(has[a][b] for a in self.felt)}
        self.reach = {a: _closure({a}, has) for a in self.kept}
        nothing = jnp.zeros(self.group.varshape, self.dtype)
        self.start = (
            {b: nothing for b in self.backward},
            {a: {b: nothing + float(a == b) for b in self.reach[a]} for a in self.kept},
        )

    def step(self, carry, item):
        (future, M), (values, q) = carry, item
        group, felt, reach = self.group, self.felt, self.reach
        recursion = self.read(values)
        total = {a: add([q[a], future.get(a)]) for a in felt}
        y, u = {}, {}
        for i, r in self.relations.items():
            df = recursion.df[i]
            c = weighted_sum([(df[a], r.place(group, total[a])) for a in felt])
            y[i] = None if c is None else unbroadcast(c, r.y_var.aval.shape).astype(wide(r.y_var.aval.dtype))
            rows = {a: placed(r, group, [M[a][b] for b in reach[a]]) for a in self.kept}
            u[i] = [
                weighted_sum(list(zip(rows[a], [df[b] for b in reach[a]]))) if a in self.kept else None
                for a in range(self.width)
            ]
        back = {b: weighted_sum([(recursion.D[a][b], total[a]) for a in felt]) for b in self.backward}
        product = lambda a, c: weighted_sum([(M[a][b], recursion.D[b][c]) for b in reach[a]])  # noqa: E731
        M = {a: {c: spread(product(a, c), group.varshape, self.dtype) for c in reach[a]} for a in self.kept}
        return ({b: v.astype(self.dtype) for b, v in back.items()}, M), (y, u)

    def result(self, carry, outs) -> ChunkCoefficients:
        (future, M), (y, u) = carry, outs
        rows = [[M[a].get(b) if a in self.kept else None for b in range(self.width)] for a in range(self.width)]
        return ChunkCoefficients(y, u, [future.get(b) for b in range(self.width)], rows)


def _closure(start: set[int], has: Sequence[Sequence[bool]]) -> list[int]:
    """Slots that those of ``start`` depend on, at any earlier time, themselves included."""
    found = set(start)
    while True:
        more = found | {b for a in found for b, link in enumerate(has[a]) if link}
        if more == found:
            return sorted(found)
        found = more


def chunk_update(
    pair: Pair,
    recursion: Recursion,
    trace: SlotTrace,
    coefficients: ChunkCoefficients,
    xs: Any,
    operands: Mapping[str, jax.Array],
    fixed: Mapping[int, Any],
    front: tuple[int, ...],
) -> SlotTrace:
    """Traces after a chunk with inputs ``xs`` of shape ``(K, *front, ...)``."""
    new = []
    powers = _powers(pair, recursion, jax.tree.leaves(xs)[0].shape[0]) if pair.factorised else None
    for a in range(recursion.width):
        old = _slot(trace, a)
        if a in pair.factorised:
            value = _filtered(pair, a, powers, trace, xs, operands)
        else:
            row = placed(pair.meta.relation, pair.group, coefficients.M[a])
            u = coefficients.u[pair.number][a]
            value = add(_chunk_terms(pair, trace, row, u, xs, operands, fixed, len(front)))
        value = value or dict.fromkeys(trace)
        new.append({k: spread(value[k], old[k].shape, old[k].dtype) for k in old})
    return {k: [slot[k] for slot in new] for k in trace}


def _chunk_terms(pair, trace, row, u, xs, operands, fixed, extra):
    terms = []
    for b, m in enumerate(row):
        if m is None:
            continue
        if b in pair.factorised:
            terms.append(_outer(pair.meta, _slot(trace, b), m, operands, extra))
        else:
            terms.append(_times(pair.meta, m, _slot(trace, b), extra))
    if u is not None:
        terms.append(instant(pair.meta, xs, u, operands, fixed, extra, time=True))
    return terms


def _powers(pair, recursion, length):
    """Weights of the K inputs and of the old slots in the new factorised slots, as numbers."""
    slots = sorted(pair.factorised)
    D = np.array([[recursion.D[a][b] or 0.0 for b in slots] for a in slots], np.float64)
    df = np.array([recursion.df[pair.number][a] or 0.0 for a in slots], np.float64)
    M, inputs = np.eye(len(slots)), np.zeros((length, len(slots)))
    for t in range(length - 1, -1, -1):
        inputs[t] = M @ df
        M = M @ D
    return {a: (dict(zip(slots, M[k])), inputs[:, k]) for k, a in enumerate(slots)}


def _filtered(pair, a, powers, trace, xs, operands):
    old, weights = powers[a]
    relation, out = pair.meta.relation, {}
    for k, slots in trace.items():
        carried = weighted_sum([(float(old[b]), slots[b]) for b in sorted(pair.factorised)])
        if k in relation.offset_keys:
            new = float(weights.sum())
        else:
            repr_of = lambda x: relation.x_repr(x, operands)  # noqa: E731
            x = widened(jax.vmap(repr_of)(xs))
            new = jnp.tensordot(jnp.asarray(weights, x.dtype), x, 1)
        out[k] = carried + new
    return out
