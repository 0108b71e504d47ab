"""Primitives that only move entries, by NumPy: it needs no compiler, and takes entries of any dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from .._jax import JaxprEqn
from .._types import PyTree, Shape

__all__ = ["MOVES", "moved", "scatter_hits"]

Mode = jax.lax.GatherScatterMode
Padding = Sequence[tuple[int, int, int]]  # per axis: in front, behind and between the entries
Place = tuple[np.ndarray, ...]  # an integer array per axis


def moved(eqn: JaxprEqn, operands: Sequence[np.ndarray], **replaced: object) -> list[np.ndarray]:
    """The outputs of an equation whose primitive is in :data:`MOVES`, with some of its parameters replaced."""
    params = {**eqn.params, **replaced, "out_shape": eqn.outvars[0].aval.shape}
    out = MOVES[eqn.primitive.name](*operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _broadcast_in_dim(
    x: np.ndarray, *dynamic: object, broadcast_dimensions: Sequence[int], out_shape: Shape, **_: object
) -> np.ndarray:
    full = [1] * len(out_shape)
    for size, d in zip(x.shape, broadcast_dimensions):
        full[d] = size
    return np.broadcast_to(x.reshape(full), out_shape)


def _reshape(
    x: np.ndarray, *dynamic: object, out_shape: Shape, dimensions: Sequence[int] | None = None, **_: object
) -> np.ndarray:
    return (x if dimensions is None else x.transpose(dimensions)).reshape(out_shape)


def _slice(
    x: np.ndarray,
    *,
    start_indices: Sequence[int],
    limit_indices: Sequence[int],
    strides: Sequence[int] | None,
    **_: object,
) -> np.ndarray:
    return x[tuple(map(slice, start_indices, limit_indices, strides or [1] * x.ndim))]


def _pad(x: np.ndarray, value: np.ndarray, *, padding_config: Padding, out_shape: Shape, **_: object) -> np.ndarray:
    spread = np.full([max(0, n + (n - 1) * inner) for n, (_, _, inner) in zip(x.shape, padding_config)], value, x.dtype)
    spread[tuple(slice(None, None, inner + 1) for _, _, inner in padding_config)] = x
    # Negative padding takes entries away.
    kept = spread[tuple(slice(max(0, -lo), n - max(0, -hi)) for n, (lo, hi, _) in zip(spread.shape, padding_config))]
    out = np.full(out_shape, value, x.dtype)
    out[tuple(slice(max(0, lo), max(0, lo) + n) for n, (lo, _, _) in zip(kept.shape, padding_config))] = kept
    return out


def _split(x: np.ndarray, *, sizes: Sequence[int], axis: int, **_: object) -> list[np.ndarray]:
    return np.split(x, np.cumsum(sizes)[:-1], axis)


def _unstack(x: np.ndarray, *, axis: int, **_: object) -> list[np.ndarray]:
    return list(np.moveaxis(x, axis, 0))


def _starts(starts: Sequence[np.ndarray], shape: Shape, window: Shape) -> tuple[slice, ...]:
    """The first entry of a window that is moved inside as a whole, as it is by the dynamic primitives."""
    return tuple(slice(s, s + w) for s, w in zip(_clipped(np.array(starts, int), shape, window), window))


def _clipped(starts: np.ndarray, shape: Shape, window: Sequence[int]) -> np.ndarray:
    return np.clip(starts, 0, np.subtract(shape, window))


def _dynamic_slice(x: np.ndarray, *starts: np.ndarray, slice_sizes: Shape, **_: object) -> np.ndarray:
    return x[_starts(starts, x.shape, slice_sizes)]


def _dynamic_update_slice(x: np.ndarray, update: np.ndarray, *starts: np.ndarray, **_: object) -> np.ndarray:
    out = x.copy()
    out[_starts(starts, x.shape, update.shape)] = update
    return out


def _windows(
    indices: np.ndarray,
    shape: Shape,
    window: Sequence[int],
    index_map: Sequence[int],
    batching: Sequence[int],
    indices_batching: Sequence[int],
    mode: Mode,
) -> tuple[Place, np.ndarray]:
    """Where each window lies: an integer array per axis of the operand, and which windows lie inside.

    Axes are those of the indices but the last, then those of the operand.
    """
    lead = indices.shape[:-1]
    starts = np.zeros((*lead, len(shape)), int)
    starts[..., list(index_map)] = indices
    for axis, along in zip(batching, indices_batching):
        starts[..., axis] = np.arange(lead[along]).reshape([-1 if k == along else 1 for k in range(len(lead))])
    clipped = _clipped(starts, shape, window)
    inside = np.ones(lead, bool) if mode == Mode.CLIP else np.all(starts == clipped, -1)
    at = []
    for axis, size in enumerate(window):
        offset = np.arange(size).reshape([-1 if k == axis else 1 for k in range(len(shape))])
        at.append(clipped[..., axis].reshape(*lead, *(1,) * len(shape)) + offset)
    return tuple(at), inside.reshape(*lead, *(1,) * len(shape))


def _gather(
    x: np.ndarray,
    indices: np.ndarray,
    *,
    dimension_numbers: jax.lax.GatherDimensionNumbers,
    slice_sizes: Shape,
    mode: str | Mode | None,
    fill_value: ArrayLike | None,
    **_: object,
) -> np.ndarray:
    d, mode = dimension_numbers, Mode.from_any(mode)
    gone = (*d.collapsed_slice_dims, *d.operand_batching_dims)
    at, inside = _windows(
        indices, x.shape, slice_sizes, d.start_index_map, d.operand_batching_dims, d.start_indices_batching_dims, mode
    )
    out = x[at]
    if mode == Mode.FILL_OR_DROP:
        out = np.where(inside, out, _fill(x.dtype) if fill_value is None else np.asarray(fill_value, x.dtype))
    lead = indices.ndim - 1
    out = out.reshape(*out.shape[:lead], *(n for k, n in enumerate(slice_sizes) if k not in gone))
    return np.moveaxis(out, range(lead, out.ndim), d.offset_dims)


def _fill(dtype: np.dtype) -> np.ndarray | np.bool_ | int:
    """What a gather gives beyond the end of an array."""
    if np.issubdtype(dtype, np.signedinteger):
        return np.iinfo(dtype).min
    if np.issubdtype(dtype, np.unsignedinteger):
        return np.iinfo(dtype).max
    return np.asarray(np.nan, dtype) if dtype != np.bool_ else np.True_


def _updates(
    x: np.ndarray,
    indices: np.ndarray,
    update: np.ndarray,
    dimension_numbers: jax.lax.ScatterDimensionNumbers,
    mode: str | Mode | None,
) -> tuple[Place, np.ndarray]:
    """Where each entry of an update goes, and the entries, both as lists."""
    d, mode = dimension_numbers, Mode.from_any(mode)
    gone = (*d.inserted_window_dims, *d.operand_batching_dims)
    lead = [k for k in range(update.ndim) if k not in d.update_window_dims]
    update = update.transpose(*lead, *d.update_window_dims)
    sizes = iter(update.shape[len(lead) :])
    window = [1 if k in gone else next(sizes) for k in range(x.ndim)]
    at, inside = _windows(
        indices, x.shape, window, d.scatter_dims_to_operand_dims, d.operand_batching_dims,
        d.scatter_indices_batching_dims, mode,
    )  # fmt: skip
    update = update.reshape(*update.shape[: len(lead)], *window)
    inside = np.broadcast_to(inside, update.shape)
    return tuple(np.broadcast_to(a, update.shape)[inside] for a in at), update[inside]


def _scatter(
    x: np.ndarray,
    indices: np.ndarray,
    update: np.ndarray,
    *,
    dimension_numbers: jax.lax.ScatterDimensionNumbers,
    mode: str | Mode | None,
    **_: object,
) -> np.ndarray:
    at, values = _updates(x, indices, update, dimension_numbers, mode)
    out = x.copy()
    out[at] = values
    return out


def scatter_hits(x: np.ndarray, indices: np.ndarray, update: np.ndarray, params: Mapping[str, Any]) -> np.ndarray:
    """How many entries of the update of a scatter go to each entry of its operand."""
    at, _ = _updates(x, indices, update, params["dimension_numbers"], params["mode"])
    hits = np.zeros(x.shape, np.int32)
    np.add.at(hits, at, 1)
    return hits


MOVES: Mapping[str, Callable[..., PyTree]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": lambda *xs, dimension, **_: np.concatenate(xs, dimension),
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "expand_dims": lambda x, *, out_shape, **_: x.reshape(out_shape),
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "rev": lambda x, *, dimensions, **_: np.flip(x, dimensions),
    "scatter": _scatter,
    "slice": _slice,
    "split": _split,
    "squeeze": lambda x, *, out_shape, **_: x.reshape(out_shape),
    "stack": lambda *xs, axis, **_: np.stack(xs, axis),
    "tile": lambda x, *, reps, **_: np.tile(x, reps),
    "transpose": lambda x, *, permutation, **_: x.transpose(permutation),
    "unstack": _unstack,
}
