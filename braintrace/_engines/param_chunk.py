"""The traces of D_RTRL over a chunk of K steps.

With a_t = q_t + D_{t+1}' a_{t+1} (q_t: the signals that meet the trace after step t; D': transposed) and
M_t = D_K ... D_{t+1}, both taken backward in time, position by position,

  gradient = sum_t x_t (x) <df_t, a_t> + <q_0 + D_1' a_1, trace_0>
  trace_K  = M_0 trace_0 + sum_t M_t df_t (x) x_t

so that every weight-sized array is touched once a chunk, by products over time. Between neighbours the entries of D and
of M are matrices at every position, a_t and M_t df_t vectors; df_t acts on the position itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from .._binding import Fixed, Operands, Slots
from .._precision import wide, widened
from .._types import Shape
from .instant import SlotTrace, cut_slots, instant, instant_like, kept_like, outer, slot_of
from .layout import TraceLayout
from .pieces import Slot
from .record import add, placed, spread, unbroadcast, weighted_sum
from .weight_trace import Recursion, WeightTrace

__all__ = ["ChunkCoefficients", "chunk_coefficients", "chunk_update"]


class ChunkCoefficients(NamedTuple):
    y: dict[int, jax.Array | None]  # relation -> <df_t, a_t>, (K, *y)
    u: dict[int, list[jax.Array | None]]  # relation -> per slot M_t df_t, (K, *V), or None
    entry: list[jax.Array | None]  # per slot D_1' a_1, V, or None
    M: list[list[jax.Array | None]]  # M_0, V each, or None


Varying: TypeAlias = Sequence[jax.Array]  # the varying entries of D and df of a group
Read: TypeAlias = Callable[[Varying], Recursion]
Products: TypeAlias = dict[int, dict[int, jax.Array]]  # slot -> slot -> an entry of M
Carry: TypeAlias = tuple[dict[int, jax.Array], Products]  # D' a by slot, and M
Outs: TypeAlias = tuple[dict[int, jax.Array | None], dict[int, list[jax.Array | None]]]  # y and u of coefficients


def chunk_coefficients(
    of_groups: Sequence[tuple[Read, Varying, Slots, Sequence[WeightTrace]]], length: int
) -> list[ChunkCoefficients]:
    """Everything that a chunk needs beside the inputs, for the weights of every group and for one sample.

    Per group ``read(varying entries of one step) -> Recursion``, these entries, the signals (per slot ``(K, *V)`` or
    ``None``), and the weights. One loop serves all groups: many small ones take far longer to compile.
    """
    parts = [_Backward(read, varying, weights, signals) for read, varying, signals, weights in of_groups]

    def body(carry: list[Carry], items: list[tuple[Varying, Slots]]) -> tuple[list[Carry], list[Outs]]:
        both = [part.step(c, item) for part, c, item in zip(parts, carry, items)]
        return [c for c, _ in both], [out for _, out in both]

    items = [(varying, signals) for _, varying, signals, _ in of_groups]
    carry, outs = jax.lax.scan(body, [part.start for part in parts], items, length=length, reverse=True)
    return [part.result(c, out) for part, c, out in zip(parts, carry, outs)]


class _Backward:
    """The recursions of a chunk for one group, backward in time."""

    def __init__(self, read: Read, varying: Varying, weights: Sequence[WeightTrace], signals: Slots):
        self.read, self.group = read, weights[0].group
        self.relations = {p.number: p.relation for p in weights}
        self.layouts = {p.number: p.layout for p in weights}
        self.dtype = wide(weights[0].relation.y_var.aval.dtype)
        structure = read(jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), varying))
        self.width = n = structure.width
        self.kept = [a for a in range(n) if not all(a in p.factorised for p in weights)]
        has = [[e is not None for e in row] for row in structure.D]
        self.felt = _closure({a for a in range(n) if signals[a] is not None}, has)
        self.backward = {b for b in range(n) if any(has[a][b] for a in self.felt)}
        self.reach = {a: _closure({a}, has) for a in self.kept}
        nothing = jnp.zeros(self.group.varshape, self.dtype)
        # Products of D have the axes of its entries: of those that depend on parameters alone, none of samples.
        entries = [getattr(e, "shape", ()) for row in structure.D for e in row]
        self.shape = np.broadcast_shapes((1,) * nothing.ndim, *entries)
        one = np.ones(())
        self.product = self.transposed = operator.mul
        self.own = lambda values: values
        if (snap := self.group.snap) is not None:
            self.product, self.transposed, self.own = snap.product, snap.transposed, snap.own
            nothing = snap.gather(nothing)
            one = np.eye(snap.num_neighbour).reshape(*(snap.num_neighbour,) * 2, *(1,) * len(snap.varshape))
            self.shape = np.broadcast_shapes(self.shape, one.shape)
        zero = jnp.zeros(self.shape, self.dtype)
        self.start = (
            {b: nothing for b in self.backward},
            {a: {b: zero + one.astype(self.dtype) if a == b else zero for b in self.reach[a]} for a in self.kept},
        )

    def step(self, carry: Carry, item: tuple[Varying, Slots]) -> tuple[Carry, Outs]:
        (future, M), (values, q) = carry, item
        group, felt, reach = self.group, self.felt, self.reach
        recursion = self.read(values)
        total = {a: add([q[a], future.get(a)]) for a in felt}
        y, u = {}, {}
        for i, r in self.relations.items():
            df = recursion.df[i]
            c = weighted_sum([(df[a], r.place(group, self.own(total[a]))) for a in felt])
            y[i] = None if c is None else unbroadcast(c, r.y_var.aval.shape).astype(wide(r.y_var.aval.dtype))
            whole = r.fold(group) is not None  # places are those of an array of the group's shape
            rows = {a: placed(r, group, [self.spread(self.own(M[a][b]), whole) for b in reach[a]]) for a in self.kept}
            u[i] = [
                weighted_sum(list(zip(rows[a], [df[b] for b in reach[a]]))) if a in self.kept else None
                for a in range(self.width)
            ]
        D, kept = recursion.D, self.kept
        back = {b: weighted_sum([(D[a][b], total[a]) for a in felt], self.transposed) for b in self.backward}
        entry = lambda a, c: weighted_sum([(M[a][b], D[b][c]) for b in reach[a]], self.product)  # noqa: E731
        M = {a: {c: spread(entry(a, c), self.shape, self.dtype) for c in reach[a]} for a in kept}
        return ({b: v.astype(self.dtype) for b, v in back.items() if v is not None}, M), (y, u)

    def spread(self, value: jax.Array, whole: bool = True) -> jax.Array:
        """With the axes of the group, and what is in front of them."""
        shape = np.broadcast_shapes(value.shape, self.group.varshape)
        return jnp.broadcast_to(value, shape) if whole else value

    def spread_samples(self, value: jax.Array) -> jax.Array:
        """The same, but for axes of positions along which neighbours are the same."""
        shape = self.group.varshape if self.group.snap is None else self.group.snap.shape
        return jnp.broadcast_to(value, np.broadcast_shapes(value.shape, shape))

    def spread_positions(self, value: jax.Array, layout: TraceLayout) -> jax.Array:
        """The same, but for axes of samples where :func:`instant` leaves them apart."""
        if self.group.snap is not None or not layout.is_plain or layout.sub_steps is not None:
            return self.spread(value)
        samples, whole = layout.batch_ndim, self.group.varshape
        return jnp.broadcast_to(value, (*value.shape[: 1 + samples], *whole[samples:]))

    def result(self, carry: Carry, outs: Outs) -> ChunkCoefficients:
        (future, M), (y, u) = carry, outs
        rows = [
            [self.spread_samples(M[a][b]) if a in self.kept and b in M[a] else None for b in range(self.width)]
            for a in range(self.width)
        ]
        for i, r in self.relations.items():
            if r.fold(self.group) is None:
                u[i] = [None if v is None else self.spread_positions(v, self.layouts[i]) for v in u[i]]
        return ChunkCoefficients(y, u, [future.get(b) for b in range(self.width)], rows)


def _closure(start: set[int], has: Sequence[Sequence[bool]]) -> list[int]:
    """Slots that those of ``start`` depend on, at any earlier time, themselves included."""
    found = set(start)
    while True:
        more = found | {b for a in found for b, link in enumerate(has[a]) if link}
        if more == found:
            return sorted(found)
        found = more


Powers: TypeAlias = dict[int, tuple[dict[int, np.generic], np.ndarray]]  # factorised slot -> those of old slots, inputs


def chunk_update(
    weight: WeightTrace,
    trace: SlotTrace,
    coefficients: ChunkCoefficients,
    xs: jax.Array | None,
    operands: Operands,
    fixed: Fixed,
    vmap_shape: Shape,
) -> SlotTrace:
    """Traces after a chunk with inputs ``xs`` of shape ``(K, *vmap_shape, ...)``."""
    new: list[Slot] = []
    recursion = weight.structure
    powers = _powers(weight, jax.tree.leaves(xs)[0].shape[0]) if weight.factorised else {}
    for a in range(recursion.width):
        old = slot_of(trace, a)
        if a in weight.factorised:
            value: Slot | None = _filtered(weight, a, powers, trace, xs, operands)
        else:
            row = weight.placed(coefficients.M[a])
            u = coefficients.u[weight.number][a]
            value = add(_chunk_terms(weight, trace, old, row, u, xs, operands, fixed, len(vmap_shape)))
        new.append(kept_like(value or dict.fromkeys(trace), old))
    return {k: [slot[k] for slot in new] for k in trace}


def _chunk_terms(
    weight: WeightTrace,
    trace: SlotTrace,
    old: Slot,
    row: Sequence[jax.Array | None],
    u: jax.Array | None,
    xs: jax.Array | None,
    operands: Operands,
    fixed: Fixed,
    vmap_ndim: int,
) -> list[Slot]:
    terms = []
    for b, m in enumerate(row):
        if m is None:
            continue
        if b in weight.factorised:
            whole = outer(weight.layout, slot_of(trace, b), m, operands, vmap_ndim)
            terms.append(cut_slots(whole, old))
        else:
            terms.append(weight.carried(m, slot_of(trace, b), vmap_ndim))
    if u is not None and weight.group.snap is not None:
        terms.append(_instant_of_neighbours(weight, xs, u, operands, fixed, vmap_ndim))
    elif u is not None:
        terms.append(instant_like(old, weight.layout, xs, u, operands, fixed, vmap_ndim, time=True))
    return terms


def _instant_of_neighbours(
    weight: WeightTrace, xs: jax.Array | None, u: jax.Array, operands: Operands, fixed: Fixed, vmap_ndim: int
) -> Slot:
    """What the steps add, along a last axis of neighbours, which ``u`` has in front of those of positions."""

    def added(xs: jax.Array | None, u: jax.Array, time: bool) -> Slot:
        of_each = lambda u: instant(weight.layout, xs, u, operands, fixed, vmap_ndim, time)  # noqa: E731
        return jax.vmap(of_each, in_axes=int(time) + vmap_ndim, out_axes=-1)(u)

    found, offsets = added(xs, u, True), weight.relation.offset_keys
    if offsets and not fixed and weight.relation.sub_steps is None:
        # An offset has no input. A product with ones is far faster on a CPU than XLA's reduction over a leading axis.
        total = jnp.tensordot(jnp.ones(u.shape[:1], u.dtype), u, 1)
        at_once = added(None if xs is None else xs[0], total, False)
        found.update({k: at_once[k] for k in offsets})
    return found


def _powers(weight: WeightTrace, length: int) -> Powers:
    """Weights of the K inputs and of the old slots in the new factorised slots, as numbers."""
    slots, recursion = sorted(weight.factorised), weight.structure
    D = np.array([[recursion.D[a][b] or 0.0 for b in slots] for a in slots])
    df = np.array([recursion.df[weight.number][a] or 0.0 for a in slots])
    dtype = np.result_type(D, df, np.float64)  # of an operation with a complex output, df is complex
    M, inputs = np.eye(len(slots), dtype=dtype), np.zeros((length, len(slots)), dtype)
    for t in range(length - 1, -1, -1):
        inputs[t] = M @ df
        M = M @ D
    return {a: (dict(zip(slots, M[k])), inputs[:, k]) for k, a in enumerate(slots)}


def _filtered(
    weight: WeightTrace, a: int, powers: Powers, trace: SlotTrace, xs: jax.Array | None, operands: Operands
) -> dict[str, jax.Array]:
    old, of_inputs = powers[a]
    relation, out = weight.layout.relation, {}
    for k, slots in trace.items():
        carried = weighted_sum([(old[b].item(), slots[b]) for b in sorted(weight.factorised)])
        if k in relation.offset_keys:
            new = of_inputs.sum().item()
        else:
            repr_of = lambda x: relation.x_repr(x, operands)  # noqa: E731
            x = widened(jax.vmap(repr_of)(xs))
            new = jnp.tensordot(jnp.asarray(of_inputs, jnp.result_type(x.dtype, slots[0].dtype)), x, 1)
        out[k] = carried + new
    return out
