"""What one step, or a chunk of them, adds to the trace of a weight: the derivative of the operation, per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._binding import Fixed, Gradients, Operands
from .._compiler.relations import HiddenParamOpRelation
from .._jax import traced_once
from .._ops.primitive import ETPPrimitive
from .._precision import wide, widened
from .._types import PyTree, Shape
from .layout import TraceLayout
from .pieces import Pieces, Slot, cut_like, is_pieces
from .record import Coefficient, spread, x_aval

__all__ = ["SlotTrace", "cut_slots", "full", "instant", "instant_like", "kept_like", "outer", "slot_of"]


# Trained key -> one array per slot: (batch, weight shape), or a filtered input. Large ones are `Pieces`.
SlotTrace = dict[str, list[PyTree]]


def slot_of(trace: SlotTrace, a: int) -> Slot:
    return {k: slots[a] for k, slots in trace.items()}


def instant(
    layout: TraceLayout,
    x: jax.Array | None,
    coefficient: jax.Array,
    operands: Operands,
    fixed: Fixed,
    vmap_ndim: int = 0,
    time: bool = False,
) -> dict[str, jax.Array]:
    """``coefficient`` times the derivative of the output with respect to the weights, per sample.

    ``vmap_ndim`` axes of mapped samples stand in front of the batch axes of the operation; with ``time`` another one
    in front of these is summed over, as are sub-steps, whose axis stands between mapped samples and batch. Of a plain
    layout the coefficient may have axes of samples of length one.
    """
    x, coefficient, operands, fixed = widened((x, coefficient, dict(operands), dict(fixed)))
    if layout.sub_steps is not None:
        x, coefficient, fixed = jax.tree.map(lambda v: _first(v, vmap_ndim, time), (x, coefficient, fixed))
        return instant(layout._replace(sub_steps=None), x, coefficient, operands, fixed, vmap_ndim, True)
    if layout.relation.x_var is None:
        return _instant_without_input(layout, coefficient, operands, fixed, vmap_ndim, time)

    samples = layout.batch_ndim, vmap_ndim
    if layout.is_plain:  # layers of one kind and size are one program
        relation = layout.relation
        static = relation.primitive, tuple(sorted(relation.eqn_params.items())), *samples, time
        return traced_once(_plain, static, x, coefficient, operands)
    own = lambda fixed: layout.own(operands, fixed)  # noqa: E731
    return _of_samples(layout.apply, own, *samples, time, x, coefficient, fixed)


def _plain(
    primitive: ETPPrimitive,
    params: tuple[tuple[str, Any], ...],
    batch_ndim: int,
    vmap_ndim: int,
    time: bool,
    x: jax.Array,
    coefficient: jax.Array,
    weights: Operands,
) -> Gradients:
    apply = lambda x, weights, fixed: primitive.apply_sample(x, weights, dict(params), fixed)  # noqa: E731
    return _of_samples(apply, lambda _: (weights, {}), batch_ndim, vmap_ndim, time, x, coefficient, {})


def _of_samples(
    apply: Callable[[jax.Array, Operands, Fixed], jax.Array],
    own: Callable[[Fixed], tuple[Operands, dict[str, jax.Array]]],
    batch_ndim: int,
    vmap_ndim: int,
    time: bool,
    x: jax.Array,
    coefficient: jax.Array,
    fixed: Fixed,
) -> dict[str, jax.Array]:
    """``apply(x, weights, fixed)``: output of one sample; ``own(fixed)``: its weights, and constants beside them."""

    def of_sample(x: jax.Array, coefficient: jax.Array, fixed: Fixed) -> dict[str, jax.Array]:
        def output(weights: dict[str, jax.Array]) -> jax.Array:
            one = lambda x, fixed: apply(x, weights | own(fixed)[1], fixed)  # noqa: E731
            return (jax.vmap(one) if time else one)(x, fixed)

        weights, _ = own(jax.tree.map(lambda v: v[0], fixed) if time else fixed)
        y, pull = jax.vjp(output, weights)
        return pull(coefficient.astype(y.dtype))[0]

    axis, samples = int(time), batch_ndim + vmap_ndim
    sizes = zip(x.shape[axis:], coefficient.shape[axis:][:samples])
    repeated = [n == 1 < size for size, n in sizes]  # then one product for all samples
    coefficient = coefficient.squeeze(tuple(axis + k for k, same in enumerate(repeated) if same))
    for k, same in reversed(list(enumerate(repeated))):
        of_fixed = axis if k < vmap_ndim else None
        of_sample = jax.vmap(of_sample, in_axes=(axis, None if same else axis, of_fixed))
    return of_sample(x, coefficient, fixed)


def _first(value: jax.Array, vmap_ndim: int, time: bool) -> jax.Array:
    """The axis of sub-steps moved to the front, and merged with that of time."""
    if not time:
        return jnp.moveaxis(value, vmap_ndim, 0)
    value = jnp.moveaxis(value, 1 + vmap_ndim, 1)
    return value.reshape((-1, *value.shape[2:]))


def _instant_without_input(
    layout: TraceLayout, coefficient: jax.Array, operands: Operands, fixed: Fixed, vmap_ndim: int, time: bool
) -> dict[str, jax.Array]:
    relation = layout.relation

    def times(coefficient: jax.Array, unit: jax.Array) -> dict[str, jax.Array]:
        def slopes(fixed: Fixed) -> dict[str, jax.Array]:
            units = jnp.full(relation.y_var.aval.shape, unit)
            found = relation.primitive.weight_vjp(None, units, operands, relation.eqn_params, fixed)
            # Where a weight has no entry for every position, the trace is that of the output.
            return {k: v if layout.anchors[k] is None else units for k, v in found.items()}

        if not fixed:
            total = coefficient.sum(0) if time else coefficient
            return {k: total * v for k, v in slopes({}).items()}
        front = vmap_ndim + int(time)
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
    return jax.tree.map(jnp.add, times(jnp.real(coefficient), one), times(jnp.imag(coefficient), 1j * one))


def outer(
    layout: TraceLayout, filtered: Slot, coefficient: jax.Array, operands: Operands, vmap_ndim: int
) -> dict[str, jax.Array]:
    """A factorised slot, spread over positions: filtered input times coefficient."""
    relation = layout.relation
    x = next((filtered[k] for k in filtered if k not in relation.offset_keys), None)
    if x is None:  # offsets alone: any input will do
        x = jnp.zeros((*coefficient.shape[:vmap_ndim], *x_aval(relation).shape), x_aval(relation).dtype)
    out = instant(layout, x, coefficient, operands, {}, vmap_ndim)
    for k in relation.offset_keys:
        count = filtered[k].reshape(filtered[k].shape + (1,) * (out[k].ndim - filtered[k].ndim))
        out[k] = count * out[k]
    return out


def kept_like(value: Mapping[str, Coefficient | Pieces], old: Slot) -> Slot:
    """New values, or zeros in the place of none, as the old ones are stored."""

    def of_key(value: Coefficient | Pieces, old: jax.Array | Pieces) -> jax.Array | Pieces:
        if value is None:
            return jax.tree.map(jnp.zeros_like, old)
        return jax.tree.map(lambda v, e: spread(v, e.shape, e.dtype), value, old)

    return {k: of_key(value[k], old[k]) for k in old}


def cut_slots(value: Slot, old: Slot) -> Slot:
    return {k: cut_like(value[k], old[k]) for k in value}


def instant_like(
    old: Slot,
    layout: TraceLayout,
    x: jax.Array | None,
    coefficient: jax.Array,
    operands: Operands,
    fixed: Fixed,
    vmap_ndim: int = 0,
    time: bool = False,
) -> Slot:
    """:func:`instant` in the pieces of a slot. Those of a matrix are made one by one: no whole lies in memory."""
    has_rows = layout.relation.primitive.rules.input_rows
    cut = [(k, e) for k, e in old.items() if is_pieces(e)]
    if x is None or not cut or has_rows is None or not has_rows(layout.relation.eqn_params):
        return cut_slots(instant(layout, x, coefficient, operands, fixed, vmap_ndim, time), old)
    ((key, pieces),) = cut

    def of_rows(rows: slice) -> dict[str, jax.Array]:
        part = {**operands, key: operands[key][rows]}
        return instant(layout, x[..., rows], coefficient, part, fixed, vmap_ndim, time)

    found = pieces.map(of_rows)
    return {**found[0], key: Pieces([now[key] for now in found], pieces.axis)}


def full(relation: HiddenParamOpRelation, entry: Coefficient, shape: Shape) -> jax.Array:
    return spread(entry, shape, wide(relation.y_var.aval.dtype))
