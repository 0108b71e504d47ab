"""Which position of a hidden state every entry of an array belongs to."""

from __future__ import annotations

import numpy as np

from .._types import Shape

__all__ = [
    "Label", "Labels", "MANY", "NONE", "is_aligned", "mixes", "own_label", "touches_own_position", "unaligned_axes",
]  # fmt: skip

Label = tuple[np.ndarray, ...]
Source = tuple  # a kind and what it names; of several ways that it moves, the way too
Labels = dict[Source, Label]
NONE = -1
MANY = -2


def own_label(shape: Shape, axes: int) -> Label:
    """The label of a source itself: entry ``p`` depends on position ``p`` of its first ``axes`` axes."""
    grids = [np.broadcast_to(np.int32(0), shape)]
    for k in range(axes):
        index = np.arange(shape[k], dtype=np.int32).reshape([-1 if i == k else 1 for i in range(len(shape))])
        grids.append(np.broadcast_to(index, shape))
    return tuple(grids)


def unaligned_axes(label: Label, shape: Shape) -> tuple[int, ...]:
    """Source axes along which some entry of a variable, of ``shape`` plus own trailing axes, depends on another
    position than its own."""
    own = own_label(label[0].shape, len(label) - 1)
    if label[0].shape[: len(shape)] != shape or len(label) - 1 != len(shape):
        return tuple(range(len(shape)))
    return tuple(k for k in range(len(shape)) if not np.all((label[k + 1] == own[k + 1]) | (label[k + 1] == NONE)))


def is_aligned(label: Label, shape: Shape) -> bool:
    """Whether every entry depends on its own position, or on nothing."""
    aligned_shape = label[0].shape[: len(shape)] == shape and len(label) - 1 == len(shape)
    return aligned_shape and not unaligned_axes(label, shape)


def touches_own_position(label: Label, shape: Shape) -> bool:
    """Whether at least one entry depends on exactly its own position."""
    if label[0].shape[: len(shape)] != shape or len(label) - 1 != len(shape):
        return False
    own = own_label(label[0].shape, len(shape))
    return bool(np.any(np.logical_and.reduce([a == b for a, b in zip(label, own)])))


def mixes(label: Label) -> bool:
    """Whether some entry depends on several positions."""
    return any(np.any(ids == MANY) for ids in label)
