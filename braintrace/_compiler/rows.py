"""The rows of D and df of a group: reverse passes of F, repeated for one position at a time where F mixes positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .._jax import consts_of, is_tracer, open_jaxpr, struct, structs
from .._types import PyTree, Shape
from .labels import MANY, NONE, Label, own_label
from .position_rules import combine
from .positions import no_cut, propagate
from .scope import Neighbourhood, Scope
from .transition import Slot, Transition, displaced_axes, is_shared, mixed_axes

__all__ = ["Fold", "Rows"]


Values = Sequence[jax.Array]
Bars = tuple[list[jax.Array | None], dict[int, jax.Array]]  # of every old hidden variable, if it has one, and every y
Cotangents = Callable[[jax.Array], Bars]  # of a seed over positions


class Fold(NamedTuple):
    """Where the entries of an operation's output act, if each acts on one position of a group of another shape.

    Of an operation with sub-steps, those of one sub-step.

    ``positions`` holds the position of every entry, one integer array per axis of the group; ``tiles`` is their number
    where they are equal slices of the last axis, ``whole`` the group's shape where they are its entries in order.
    """

    positions: tuple[np.ndarray, ...]
    tiles: int | None
    whole: Shape | None

    def place(self, value: PyTree) -> PyTree:
        """The value of every entry's position; axes in front of those of the group stay."""
        if value is None or jnp.ndim(value) == 0:
            return value
        if self.whole is not None:
            return value.reshape(*value.shape[: value.ndim - len(self.whole)], *self.positions[0].shape)
        if self.tiles is not None:
            return jnp.concatenate([value] * self.tiles, -1)
        return value[(..., *self.positions)]


def _y_shapes(transition: Transition) -> dict[int, Shape]:
    """The shape of every operation's output, of one sub-step."""
    return {k: v.aval.shape[transition.fronts[k] :] for k, v in transition.ys.items()}


def _folds(
    transition: Transition,
    varshape: Shape,
    slots: Sequence[Slot],
    inexact: Sequence[bool],
    y_labels: Sequence[Mapping[int, Label]],
) -> dict[int, Fold]:
    """Outputs of another shape of which every entry acts on one position: labels of F's reverse pass tell."""
    y_shapes = _y_shapes(transition)

    def is_candidate(k: int) -> bool:
        """Whether broadcasting does not say where the entries of an output act."""
        shape = y_shapes[k]
        if shape == varshape or not math.prod(shape) or not shape or not varshape:
            return False
        return math.prod(shape) == math.prod(varshape) or any(
            k in labels and displaced_axes(labels[k], shape, varshape) for labels in y_labels
        )

    folds = {}
    for k, var in transition.ys.items():
        if not is_candidate(k):
            continue
        label: Label | None = None
        for a in sorted({a for a, _ in slots if inexact[a]}):

            def reverse(
                seed: jax.Array,
                y: jax.Array,
                olds: Values,
                others: dict[int, jax.Array],
                externals: Values,
                a: int = a,
                k: int = k,
            ) -> jax.Array:
                def new_value(y: jax.Array) -> jax.Array:
                    return transition.run(olds, others | {k: y}, externals)[a]

                return jax.vjp(new_value, y)[1](seed)[0]

            others = {j: struct(v) for j, v in transition.ys.items() if j != k}
            values = struct(var), structs(transition.olds), others, structs(transition.externals)
            closed = jax.make_jaxpr(reverse)(struct(transition.news[a]), *values)
            jaxpr = open_jaxpr(closed)
            known = {v: c for v, c in zip(jaxpr.constvars, consts_of(closed)) if not is_tracer(c)}
            env = {jaxpr.invars[0]: {("new", 0): own_label(transition.news[a].aval.shape, len(varshape))}}
            propagate(jaxpr.eqns, env, no_cut, known)
            found = env.get(jaxpr.outvars[0], {}).get(("new", 0))
            label = found if label is None else label if found is None else tuple(map(combine, label, found))
        if label is None or any(np.any(ids == MANY) for ids in label[1:]):
            continue
        index = tuple(np.where(ids == NONE, 0, ids) for ids in label[1:])
        if transition.fronts[k]:
            if any(np.any(ids != ids[:1]) for ids in index):
                continue
            index = tuple(ids[0] for ids in index)
        folds[k] = Fold(index, _tiles(index, y_shapes[k], varshape), _in_order(index, varshape))
    return folds


def _in_order(index: Sequence[np.ndarray], varshape: Shape) -> Shape | None:
    """The group's shape if the entries are its positions one after the other."""
    flat = np.ravel_multi_index(index, varshape).ravel()
    return varshape if np.array_equal(flat, np.arange(math.prod(varshape))) else None


def _tiles(index: Sequence[np.ndarray], y_shape: Shape, varshape: Shape) -> int | None:
    """How many equal slices of the last axis the entries are, if they are."""
    if y_shape[:-1] != varshape[:-1] or y_shape[-1] % varshape[-1]:
        return None
    number = y_shape[-1] // varshape[-1]
    own = own_label(varshape, len(varshape))[1:]
    same = all(np.array_equal(i, np.concatenate([o] * number, -1)) for i, o in zip(index, own))
    return number if same else None


def _component(cotangent: jax.Array, c: int | None) -> jax.Array | None:
    """Of one hidden variable; ``None`` for a state that has no derivative."""
    if cotangent.dtype == jax.dtypes.float0:
        return None
    return cotangent if c is None else cotangent[..., c]


class _Row(NamedTuple):
    D: list[jax.Array | None]
    df: dict[int, jax.Array]


class Rows:
    """The rows of D and df, by reverse passes of F: one for every hidden variable of a new value."""

    def __init__(
        self,
        transition: Transition,
        varshape: Shape,
        slots: Sequence[Slot],
        scope: Scope,
        neighbourhood: Neighbourhood | None,
    ):
        self.transition, self.varshape, self.slots = transition, varshape, slots
        self.scope, self.neighbourhood, self.whole = scope, neighbourhood, scope.kind == "full"
        self.labels, self.y_labels = transition.labels(varshape)
        self.keys, self.y_shapes = list(transition.ys), _y_shapes(transition)
        self.inexact = [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in transition.news]
        self.folds = _folds(transition, varshape, slots, self.inexact, self.y_labels)
        self.by_position = [{k: lab for k, lab in of.items() if k not in self.folds} for of in self.y_labels]

    def all(self, *values: jax.Array) -> tuple[list[Bars], list[jax.Array]]:
        num_old, num_y = len(self.transition.olds), len(self.transition.ys)
        olds, ys, ext = values[:num_old], values[num_old : num_old + num_y], values[num_old + num_y :]
        rows = [self.of_slot(a, component, olds, ys, ext) for a, component in self.slots]
        nothing: list[jax.Array | None] = [None] * len(self.slots)
        return [(nothing if self.whole else r.D, r.df) for r in rows], list(values) if self.whole else []

    def of_slot(self, a: int, component: int | None, olds: Values, ys: Values, ext: Values) -> _Row:
        if not self.inexact[a]:
            return _Row([None] * len(self.slots), {})
        transition, varshape, y_shapes, scope = self.transition, self.varshape, self.y_shapes, self.scope

        def new_value(olds: Values, ys: Values) -> jax.Array:
            return transition.run(olds, dict(zip(self.keys, ys)), ext)[a]

        new, pull = jax.vjp(new_value, list(olds), list(ys))
        cotangents = _cotangents(new, pull, component, self.slots, self.keys)
        of_D = mixed_axes({} if self.whole else self.labels[a], {}, y_shapes, varshape)
        slopes = {
            k: _along(cotangents, k, varshape, new, ys[self.keys.index(k)])
            for k, label in self.by_position[a].items()
            if is_shared(label, y_shapes[k], varshape, transition.fronts[k])
        }
        along = {k: slope for k, slope in slopes.items() if slope is not None}
        own = {k: label for k, label in self.by_position[a].items() if k not in along}
        others = {k: shape for k, shape in y_shapes.items() if k not in along}
        of_df = mixed_axes({}, own, y_shapes, varshape)

        def row_of(y_shapes: Mapping[int, Shape], axes: tuple[int, ...]) -> _Row:
            return _row(cotangents, new.dtype, transition.fronts, y_shapes, varshape, axes, self.folds, scope)

        both = tuple(sorted({*of_D, *of_df}))
        if self.neighbourhood is not None:
            D = _blocks(cotangents, new.dtype, varshape, of_D, self.neighbourhood, scope)
            row = _Row(D, row_of(others, of_df).df)
        elif both in (of_D, of_df):
            row = row_of(others, both)
        else:  # one position at a time along all of these axes would be far more of them
            row = _Row(row_of({}, of_D).D, row_of(others, of_df).df)
        return _Row(row.D, {**row.df, **along})

    def without(self, bad: Callable[[Label, Shape, Shape], tuple[int, ...]]) -> frozenset[int]:
        """Outputs of operations on whose way to any hidden variable there are no ``bad`` axes."""

        def is_fine(k: int, a: int) -> bool:
            return k not in self.by_position[a] or not bad(self.y_labels[a][k], self.y_shapes[k], self.varshape)

        return frozenset(k for k in self.keys if all(is_fine(k, a) for a, _ in self.slots))


def _cotangents(
    new: jax.Array,
    pull: Callable[[jax.Array], tuple[Values, Values]],
    component: int | None,
    slots: Sequence[Slot],
    keys: Sequence[int],
) -> Cotangents:
    """Seed over positions -> cotangents of every old hidden variable and every y."""

    def of(seed: jax.Array) -> Bars:
        full = seed if component is None else jnp.zeros_like(new).at[..., component].set(seed)
        old_bar, y_bar = pull(full)
        return [_component(old_bar[b], c) for b, c in slots], dict(zip(keys, y_bar))

    return of


def _along(cotangents: Cotangents, key: int, varshape: Shape, new: jax.Array, y: jax.Array) -> jax.Array | None:
    """The derivative of every position by the entry of an output that it shares with others: forward, in one pass.

    Forward is the transpose of the reverse pass, as some functions have a reverse rule alone. ``None`` where that is a
    loop of unknown length, which has no transpose.
    """
    try:
        _, forward = jax.vjp(lambda seed: cotangents(seed)[1][key], jnp.zeros(varshape, new.dtype))
        one = jnp.ones_like(y)
        # What comes back for a complex entry is the real part of its product with the derivative.
        return forward(one)[0] + 1j * forward(-1j * one)[0] if jnp.iscomplexobj(one) else forward(one)[0]
    except ValueError:
        return None


def _by_position(
    read: Callable[[jax.Array, jax.Array], PyTree],
    dtype: DTypeLike,
    varshape: Shape,
    axes: tuple[int, ...],
    scope: Scope,
) -> PyTree:
    """``read(seed, pick)`` for one position at a time along some axes, stacked."""
    grids = jnp.meshgrid(*(jnp.arange(varshape[k]) for k in axes), indexing="ij")
    picks = jnp.stack([g.ravel() for g in grids], axis=-1)

    def at(pick: jax.Array) -> PyTree:
        seed = jnp.ones(varshape, dtype)
        for k, i in zip(axes, pick):
            seed = seed * (jax.lax.broadcasted_iota(jnp.int32, varshape, k) == i).astype(dtype)
        return read(seed, pick)

    # As many positions at once as the cotangents of all of them stay below the ceiling.
    at_once = max(1, scope.ceiling // max(1, math.prod(varshape)))
    return jax.vmap(at)(picks) if len(picks) <= at_once else jax.lax.map(at, picks, batch_size=at_once)


def _row(
    cotangents: Cotangents,
    dtype: DTypeLike,
    fronts: Mapping[int, int],
    y_shapes: Mapping[int, Shape],
    varshape: Shape,
    mixed: tuple[int, ...],
    folds: Mapping[int, Fold],
    scope: Scope,
) -> _Row:
    ones = jnp.ones(varshape, dtype)
    if not mixed:
        D, df = cotangents(ones)
        return _Row(D, {k: df[k] for k in y_shapes})

    def read(seed: jax.Array, pick: jax.Array) -> Bars:
        def own_position(cotangent: jax.Array, shape: Shape, front: int = 0) -> jax.Array:
            lead = len(varshape) - len(shape)
            for k, i in sorted(zip(mixed, pick), key=lambda ki: -ki[0]):
                if k >= lead:
                    cotangent = jax.lax.dynamic_index_in_dim(cotangent, i, front + k - lead, keepdims=False)
            return cotangent

        olds, ys = cotangents(seed)
        return [None if o is None else own_position(o, varshape) for o in olds], {
            k: ys[k] if k in folds else own_position(ys[k], y_shapes[k], fronts[k]) for k in y_shapes
        }

    def whole(stacked: jax.Array, shape: Shape = varshape, front: int = 0) -> jax.Array:
        lead = len(varshape) - len(shape)
        first = min(lead, *mixed)  # what lacks the axes in front has those of them along which positions were mixed
        lacking = [1 for k in range(first, lead) if k not in mixed]
        sizes, (_, *others) = [varshape[k] for k in mixed], stacked.shape
        stacked = stacked.reshape(*sizes, *others[:front], *lacking, *others[front:])
        return jnp.moveaxis(stacked, range(len(mixed)), [front + k - first for k in mixed])

    D, df = _by_position(read, dtype, varshape, mixed, scope)
    found = {k: whole(df[k], shape, fronts[k]) for k, shape in y_shapes.items()}
    if folds:
        # Every entry acts on one position, so that one pass from all positions gives all of them.
        found.update({k: y for k, y in cotangents(ones)[1].items() if k in folds and k in y_shapes})
    return _Row(jax.tree.map(whole, D), found)


def _blocks(
    cotangents: Cotangents,
    dtype: DTypeLike,
    varshape: Shape,
    mixed: tuple[int, ...],
    neighbourhood: Neighbourhood,
    scope: Scope,
) -> list[jax.Array | None]:
    """A row of D between neighbours."""
    if not mixed:
        return jax.tree.map(neighbourhood.each_its_own, cotangents(jnp.ones(varshape, dtype))[0])

    def read(seed: jax.Array, pick: jax.Array) -> list[PyTree]:
        number = jnp.ravel_multi_index(tuple(pick), tuple(varshape[k] for k in neighbourhood.axes), mode="clip")
        return jax.tree.map(lambda old: neighbourhood.columns(old, number), cotangents(seed)[0])

    rows = _by_position(read, dtype, varshape, neighbourhood.axes, scope)
    return jax.tree.map(neighbourhood.blocks, rows)
