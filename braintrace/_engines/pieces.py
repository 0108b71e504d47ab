"""A large trace as several arrays.

On a CPU a new array beyond what the allocator keeps for reuse consists of pages that the system has to clear: a step
that returns a large trace spends most of its time there. Pieces that are small enough lie in memory that an earlier
step has used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyEntry
from jax.typing import DTypeLike

from .._jax import runs_on_cpu, zeros
from .._types import PyTree, Shape

__all__ = ["Pieces", "Slot", "cut_like", "is_pieces", "joined", "zeros_in_pieces"]

T = TypeVar("T")
Slot = dict[str, PyTree]  # of a trace: trained key -> an array, or one as `Pieces`

_PIECE = 2**24  # bytes
_MOST = 64  # each piece takes time to compile


@jax.tree_util.register_pytree_with_keys_class
class Pieces:
    """Arrays that make up one along ``axis``, counted from the last."""

    def __init__(self, arrays: Sequence[jax.Array], axis: int):
        self.arrays, self.axis = tuple(arrays), axis

    @property
    def shape(self) -> Shape:
        shape = list(self.arrays[0].shape)
        shape[self.axis] = sum(a.shape[self.axis] for a in self.arrays)
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return len(self.arrays[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return self.arrays[0].dtype

    def tree_flatten_with_keys(self) -> tuple[list[tuple[KeyEntry, jax.Array]], int]:
        return [(jax.tree_util.SequenceKey(i), a) for i, a in enumerate(self.arrays)], self.axis

    def tree_flatten(self) -> tuple[tuple[jax.Array, ...], int]:
        return self.arrays, self.axis

    @classmethod
    def tree_unflatten(cls, axis: int, arrays: Sequence[jax.Array]) -> Pieces:
        return cls(arrays, axis)

    def map(self, function: Callable[[slice], T]) -> list[T]:
        """``function`` of the part of the axis that a piece covers, for every piece."""
        ends = list(itertools.accumulate((a.shape[self.axis] for a in self.arrays), initial=0))
        return [function(slice(*part)) for part in zip(ends, ends[1:])]

    def cut(self, whole: jax.Array) -> list[jax.Array]:
        """Parts of an array with the same axis, one for each piece."""
        axis = len(whole.shape) + self.axis
        return self.map(lambda p: jax.lax.slice_in_dim(whole, p.start, p.stop, axis=axis))


def is_pieces(x: object) -> TypeGuard[Pieces]:
    return isinstance(x, Pieces)


def cut_like(value: jax.Array | Pieces, like: jax.Array | Pieces) -> jax.Array | Pieces:
    """An array in the pieces of another."""
    if not is_pieces(like) or isinstance(value, Pieces):
        return value
    return Pieces(like.cut(value), like.axis)


def joined(value: jax.Array | Pieces) -> jax.Array:
    return jnp.concatenate(value.arrays, value.axis) if isinstance(value, Pieces) else value


def zeros_in_pieces(shape: Shape, dtype: DTypeLike, axis: int, samples: int | None) -> jax.Array | Pieces:
    """Zeros for each of that many mapped samples, in pieces along an axis where they are many on a CPU.

    Without a number of samples they are whole.
    """
    if samples is None or not runs_on_cpu():
        return zeros(shape, dtype)
    size, n = samples * math.prod(shape) * jnp.dtype(dtype).itemsize, shape[axis]
    count = min(-(-size // _PIECE), _MOST, n)
    # Pieces of more than twice the size are not reused either.
    if size <= _PIECE or size > 2 * _PIECE * count:
        return zeros(shape, dtype)
    sizes = [n * (i + 1) // count - n * i // count for i in range(count)]
    pieces = [(*shape[: len(shape) + axis], m, *shape[len(shape) + axis + 1 :]) for m in sizes]
    return Pieces([zeros(piece, dtype) for piece in pieces], axis)
