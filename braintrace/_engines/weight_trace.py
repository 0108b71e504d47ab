r"""The eligibility trace of one weight of D_RTRL: one entry per trained weight entry, sample and hidden variable.

Pure functions of traces and records; arrays have no units. A trace is kept per *slot*, one array per hidden variable.
A slot whose coefficients in D and df are numbers, the same at every position and step, is kept *factorised*: its trace
is the product of a filtered input with ones, so that only the filtered input is stored. A trace filter doubles the
slots: the filtered trace obeys :math:`\bar\epsilon \leftarrow \kappa\bar\epsilon + D\epsilon + \mathrm{df} \otimes x`.
Where the trace of a weight follows the neighbours of its position, they are the last axis of every slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .._binding import Fixed, Gradients, Operands, Slots
from .._compiler.groups import HiddenGroup
from .._compiler.relations import HiddenParamOpRelation
from .._jax import zeros
from .._precision import wide, widened
from .._types import PyTree, Shape, path_str
from .instant import SlotTrace, cut_slots, full, instant_like, kept_like, outer, slot_of
from .layout import TraceLayout
from .pieces import Slot, joined, zeros_in_pieces
from .record import Coefficient, add, contraction, pair_key, placed, unbroadcast, weighted_sum, x_aval
from .samples import met

__all__ = ["Forms", "Recursion", "WeightTrace", "as_allocated", "factorised_slots", "recursion_of"]


Row = Sequence[Coefficient]


class Recursion(NamedTuple):
    """``D`` and, per relation, ``df`` of one group over its slots, filtered ones included."""

    D: tuple[Row, ...]
    df: dict[int, Row]

    @property
    def width(self) -> int:
        return len(self.D)


def recursion_of(
    D: Sequence[Row], df: Mapping[int, Row], kind: str, decay: float | None, kappa: float | None
) -> Recursion:
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


def factorised_slots(recursion: Recursion, number: int) -> frozenset[int]:
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


Forms: TypeAlias = Mapping[str, frozenset[int]]  # which slots of a trace, by key, are factorised


class WeightTrace(NamedTuple):
    """The trace of a relation's weights in one of its groups."""

    number: int  # of the relation
    relation: HiddenParamOpRelation
    group: HiddenGroup
    layout: TraceLayout
    structure: Recursion  # with known entries as they are, and something in the place of varying ones
    factorised: frozenset[int]  # slots

    @property
    def key(self) -> str:
        return pair_key(self.relation, self.group.index)

    @property
    def batch_axis(self) -> int | None:
        """Which axis of the trace's arrays is the batch."""
        relation = self.layout.relation
        # Without an input the trace is as large as the hidden state, which may have an axis of samples on its own.
        wider = len(relation.shape_in(self.group)) > relation.y_var.aval.ndim and relation.x_var is None
        return 0 if self.layout.batch_ndim > 0 or wider else None

    @property
    def unit_axis(self) -> int:
        """Which axis of the trace's arrays is that of units, the last one of the group."""
        return -1 if self.group.snap is None else -2

    def vmap_shape(self, trace: SlotTrace) -> Shape:
        """The mapped axis of a trace that is looked at from outside of ``jax.vmap``."""
        (name, *_), one = trace, jax.eval_shape(lambda: self.init(None))
        return trace[name][0].shape[: trace[name][0].ndim - one[name][0].ndim]

    def init(self, dtype: DTypeLike | None, samples: int | None = None) -> SlotTrace:
        """Zero traces, in ``dtype`` or in that of sums over time; whole without the number of mapped ``samples``."""
        layout, group, relation = self.layout, self.group, self.layout.relation
        custom = relation.primitive.rules.init_drtrl
        own = custom and custom(relation.x_var, relation.y_var, relation.weight_vars, group.num_state)
        y, whole = relation.y_var.aval, relation.shape_in(group)
        batch = whole[: layout.batch_ndim]
        trace: SlotTrace = {}
        for k, v in relation.trainable_vars.items():
            kept: DTypeLike = jnp.result_type(v.aval.dtype, y.dtype)
            full = whole if relation.x_var is None else (*batch, *layout.shapes[k])
            if own:
                full, kept = own[k].shape[:-1], own[k].dtype
            kept = dtype or wide(kept)
            filtered = () if k in relation.offset_keys or relation.x_var is None else x_aval(relation).shape
            behind = () if group.snap is None else (group.snap.num_neighbour,)
            # An axis of the weight along which positions do not change can be cut.
            free = len(full) - len(batch) - len(self.group.varshape[layout.batch_ndim :])
            cut = samples if layout.broadcasts and free > 0 and not (own or behind) else None
            axis = len(batch) - len(full)
            trace[k] = [
                zeros(filtered, kept) if a in self.factorised else zeros_in_pieces((*full, *behind), kept, axis, cut)
                for a in range(self.structure.width)
            ]
        return trace

    def step(
        self,
        recursion: Recursion,
        trace: SlotTrace,
        x: jax.Array | None,
        operands: Operands,
        fixed: Fixed,
    ) -> SlotTrace:
        r"""One step: :math:`\epsilon \leftarrow D \epsilon + \mathrm{df} \otimes x`."""
        new: list[Slot] = []
        layout, relation = self.layout, self.layout.relation
        shape = relation.shape_in(self.group)
        for a, (row, df) in enumerate(zip(recursion.D, recursion.df[self.number])):
            old, row = slot_of(trace, a), self.placed(row)
            if a in self.factorised:
                source = relation.x_repr(x, operands)
                inputs = {k: 1.0 if k in relation.offset_keys else source for k in trace}
                value = {k: weighted_sum([*zip(row, slots), (df, inputs[k])]) for k, slots in trace.items()}
            else:
                terms = []
                for b, d in enumerate(row):
                    if d is None:
                        continue
                    if b in self.factorised:
                        terms.append(
                            cut_slots(outer(layout, slot_of(trace, b), full(relation, d, shape), operands, 0), old)
                        )
                    else:
                        terms.append(self.carried(d, slot_of(trace, b)))
                if df is not None:
                    whole = self.relation.shape_in(self.group)
                    now = instant_like(old, layout, x, full(relation, df, whole), operands, fixed)
                    terms.append(now if self.group.snap is None else self._of_itself(now))
                value = add(terms) or dict.fromkeys(trace)
            kept = kept_like(value, old)
            if all(d is None for d in row):
                # Under jax.vmap all arrays of a trace must stay mapped, also one that no sample changes.
                kept = jax.tree.map(lambda e, new: jnp.where(False, e, new), old, kept)
            new.append(kept)
        return {k: [slot[k] for slot in new] for k in trace}

    def carried(self, d: PyTree, slot: Slot, vmap_ndim: int = 0) -> Slot:
        """An entry of D times a slot; between neighbours, a small matrix times a vector for every trace entry."""
        if self.group.snap is None or jnp.ndim(d) == 0:
            return self.layout.times(d, slot, vmap_ndim)
        if self.layout.broadcasts:
            return {k: _over_neighbours(d, e, 2, self.layout.batch_ndim, vmap_ndim) for k, e in slot.items()}

        def to_one(row: jax.Array) -> dict[str, jax.Array]:
            times = lambda c, e: self.layout.times(c, e, vmap_ndim)  # noqa: E731
            terms = jax.vmap(times, in_axes=(vmap_ndim, -1))(row, slot)
            return {k: v.sum(0) for k, v in terms.items()}

        return jax.vmap(to_one, in_axes=vmap_ndim, out_axes=-1)(self._at_positions(d))

    def placed(self, values: Sequence[Coefficient]) -> list[PyTree]:
        """:func:`record.placed` of coefficients and signals, or of what these are between neighbours."""
        if self.group.snap is not None and self.relation.fold(self.group) is not None:
            values = [None if v is None else self._everywhere(v) for v in values]
        return placed(self.relation, self.group, values)

    def _everywhere(self, value: PyTree) -> PyTree:
        """What stands between neighbours with the axes of all positions, where it is the same for them."""
        shape = self.group.varshape
        return value if jnp.ndim(value) == 0 else jnp.broadcast_to(value, (*value.shape[: -len(shape)], *shape))

    def _at_positions(self, value: PyTree) -> PyTree:
        return self._everywhere(value) if self.relation.fold(self.group) is None else value

    def _of_itself(self, now: Slot) -> Slot:
        """What a weight does at its own position, along an axis of neighbours."""
        snap = self.group.snap
        assert snap is not None
        (where,) = self.placed([self._everywhere(snap.itself.astype(jax.tree.leaves(now)[0].dtype))])
        return jax.vmap(lambda w: self.layout.times(w, now, 0), out_axes=-1)(where)

    def contract(
        self,
        trace: SlotTrace,
        signals: Slots,
        operands: Operands,
        fixed: Fixed,
        vmap_ndim: int = 0,
    ) -> Gradients | None:
        """``sum_a <signal_a, trace_a>`` over samples and positions, shaped like the weights.

        Of neighbours every signal has an axis, in front of those of positions.
        """
        terms, whole = [], []
        relation, snap = self.layout.relation, self.group.snap
        for a, signal in enumerate(self.placed(signals)):
            if signal is None:
                continue
            slot, signal = slot_of(trace, a), widened(signal)
            if a in self.factorised:
                terms.append(_contract_factorised(relation, slot, signal, operands, vmap_ndim))
            elif snap is not None and snap.is_saturated and self.layout.broadcasts:
                axes = 1, self.layout.batch_ndim, vmap_ndim
                whole.append({k: _over_neighbours(signal, e, *axes) for k, e in slot.items()})
            elif snap is not None:
                over = lambda s, e: _over_samples(self.layout, s, e, vmap_ndim)  # noqa: E731
                of_each = jax.vmap(over, in_axes=(vmap_ndim, -1))(self._at_positions(signal), slot)
                whole.append({k: v.sum(0) for k, v in of_each.items()})
            else:
                whole.append(_over_samples(self.layout, signal, slot, vmap_ndim))
        total = add(whole)
        if total is not None:
            terms.append(_to_weights(self.layout, total, operands, fixed, vmap_ndim))
        return add(terms)

    def dense(self, trace: SlotTrace, operands: Operands, vmap_shape: Shape) -> dict[str, jax.Array]:
        """The trace as arrays with the slots along a last axis; neighbours come before the slots of each."""
        relation = self.layout.relation
        slots = []
        for a in range(self.group.num_state):
            slot = {k: joined(e) for k, e in slot_of(trace, a).items()}
            if a in self.factorised:
                ones = full(relation, 1.0, (*vmap_shape, *relation.shape_in(self.group)))
                whole = outer(self.layout, slot, ones, operands, len(vmap_shape))
                slot = {k: whole[k].astype(slot[k].dtype) for k in slot}
            slots.append(slot)
        slots = [self._itself_first(slot, len(vmap_shape)) for slot in slots]
        stacked = {k: jnp.stack([slot[k] for slot in slots], -1) for k in trace}
        return stacked if self.group.snap is None else {k: v.reshape(*v.shape[:-2], -1) for k, v in stacked.items()}

    def _itself_first(self, slot: Slot, vmap_ndim: int) -> Slot:
        """A slot with the neighbours of every position in the order that the group gives them."""
        snap = self.group.snap
        if snap is None or (first := snap.itself_first) is None:
            return dict(slot)
        (order,) = self.placed([self._everywhere(first.astype(np.float32))])
        ones = {k: jnp.ones(e.shape[vmap_ndim:-1], jnp.float32) for k, e in slot.items()}
        found = jax.vmap(lambda o: self.layout.times(o, ones, 0), out_axes=-1)(order)
        of_entry = {k: jnp.broadcast_to(v.astype(jnp.int32), slot[k].shape) for k, v in found.items()}
        return {k: jnp.take_along_axis(e, of_entry[k], -1) for k, e in slot.items()}


def as_allocated(weights: Iterable[WeightTrace], forms: Forms | None) -> tuple[WeightTrace, ...]:
    """The traces in the form in which they were allocated, for another step: it may factorise more, and no less."""
    if forms is None:
        return tuple(weights)
    found = []
    for w in weights:
        held = forms.get(w.key, w.factorised)
        if not held <= w.factorised:
            raise ValueError(
                f"The trace of {path_str(w.relation.path)!r} was made for calls that need its filtered input alone. "
                "This call (another training mode, other keyword arguments) needs an entry per weight. Make "
                "another learner and compile it for a call of this kind: such traces serve both."
            )
        found.append(w._replace(factorised=held))
    return tuple(found)


def _over_neighbours(value: jax.Array, entry: jax.Array, number: int, batch_ndim: int, vmap_ndim: int) -> jax.Array:
    """A matrix (``number`` 2) at every position times the vectors of neighbours of the trace entries there, or the
    product with a vector (1), which is summed over samples.

    ``value``: mapped samples, ``number`` axes of neighbours, batch, positions (of length one where all of these have
    the same); ``entry``: samples, any, positions, neighbours.
    """
    axes = list(range(value.ndim + entry.ndim))
    mapped, neighbours = axes[:vmap_ndim], axes[vmap_ndim : vmap_ndim + number]
    batch = axes[vmap_ndim + number :][:batch_ndim]
    units = axes[vmap_ndim + number + batch_ndim : value.ndim]
    own = axes[value.ndim :][: entry.ndim - 1 - vmap_ndim - batch_ndim - len(units)]
    first = value.ndim - len(units)
    shared = [k for k, n in enumerate(value.shape[first:]) if n == 1]
    value = value.squeeze(tuple(first + k for k in shared))
    of_value = [*mapped, *neighbours, *batch, *(v for k, v in enumerate(units) if k not in shared)]
    of_entry = [*mapped, *batch, *own, *units]
    out = [*of_entry, neighbours[0]] if number == 2 else [*own, *units]
    return jnp.einsum(value, of_value, entry, [*of_entry, neighbours[-1]], out)


def _contract_factorised(
    relation: HiddenParamOpRelation, filtered: Slot, signal: jax.Array, operands: Operands, vmap_ndim: int
) -> Gradients:
    x = next((filtered[k] for k in filtered if k not in relation.offset_keys), None)
    out = {} if x is None else contraction(relation, x, signal, operands, {}, vmap_ndim)
    for k in relation.offset_keys:
        count = filtered[k].reshape(filtered[k].shape + (1,) * (signal.ndim - filtered[k].ndim))
        x = jnp.zeros((*signal.shape[:vmap_ndim], *x_aval(relation).shape), x_aval(relation).dtype)
        out[k] = contraction(relation, x, count * signal, operands, {}, vmap_ndim)[k]
    return out


def _over_samples(layout: TraceLayout, signal: jax.Array, slot: Slot, vmap_ndim: int) -> dict[str, jax.Array]:
    """A signal times the trace entries of its positions, summed over samples."""
    relation, lead = layout.relation, layout.batch_ndim + vmap_ndim
    if relation.x_var is None:
        return {k: signal * e for k, e in slot.items()}
    if relation.primitive.rules.dt_to_t is not None:
        products = layout.times(signal, slot, vmap_ndim)
        return {k: met(jnp.ones(v.shape[:lead], v.dtype), v, lead) if lead else v for k, v in products.items()}
    if not layout.broadcasts:
        ones = {k: jnp.ones_like(e) for k, e in slot.items()}
        return {k: met(s, slot[k], lead) for k, s in layout.times(signal, ones, vmap_ndim).items()}
    return {k: met(signal, e, lead) for k, e in slot.items()}


def _to_weights(
    layout: TraceLayout, total: Mapping[str, jax.Array], operands: Operands, fixed: Fixed, vmap_ndim: int
) -> Gradients:
    """Pull trace-shaped gradients back to the operation's weights, in the dtype of sums over time."""
    relation = layout.relation
    # What is pulled back here is the same for all samples and sub-steps.
    first = (0,) * (vmap_ndim + int(layout.sub_steps is not None))
    operands, fixed = widened((dict(operands), {i: v[first] for i, v in fixed.items()}))
    if relation.x_var is None:
        out = {}
        for k, value in total.items():
            value = unbroadcast(value, relation.y_var.aval.shape)
            if layout.anchors[k] is not None:
                value = relation.primitive.weight_vjp(None, value, operands, relation.eqn_params, fixed)[k]
            out[k] = unbroadcast(value, layout.shapes[k])
    elif layout.unshared is not None:
        own, pull = jax.vjp(lambda w: layout.own(w, fixed)[0], operands)
        (out,) = pull({k: total[k].astype(own[k].dtype) for k in own})
    else:
        out = {k: unbroadcast(e, layout.shapes[k]) for k, e in total.items()}
    return {k: out[k].astype(w.dtype) for k, w in operands.items()}
