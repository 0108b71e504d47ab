"""A large trace as several arrays.

On a CPU a new array beyond what the allocator keeps for reuse consists of pages that the system has to clear: a step
that returns a large trace spends most of its time there. Pieces that are small enough lie in memory that an earlier
step has used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .._jax import runs_on_cpu, zeros

__all__ = ["Pieces", "cut_like", "is_pieces", "joined", "zeros_in_pieces"]

_PIECE = 2**24  # bytes
_MOST = 64  # each piece takes time to compile


@jax.tree_util.register_pytree_with_keys_class
class Pieces:
    """Arrays that make up one along ``axis``, counted from the last."""

    def __init__(self, arrays: Sequence[Any], axis: int):
        self.arrays, self.axis = tuple(arrays), axis

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.arrays[0].shape)
        shape[self.axis] = sum(a.shape[self.axis] for a in self.arrays)
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return len(self.arrays[0].shape)

    @property
    def dtype(self) -> Any:
        return self.arrays[0].dtype

    def tree_flatten_with_keys(self) -> Any:
        return [(jax.tree_util.SequenceKey(i), a) for i, a in enumerate(self.arrays)], self.axis

    def tree_flatten(self) -> Any:
        return self.arrays, self.axis

    @classmethod
    def tree_unflatten(cls, axis: int, arrays: Sequence[Any]) -> Pieces:
        return cls(arrays, axis)

    def map(self, function: Callable[[Any, slice], Any]) -> Pieces:
        """``function`` of every piece and of the part of the axis that it covers."""
        ends = list(itertools.accumulate((a.shape[self.axis] for a in self.arrays), initial=0))
        return Pieces([function(a, slice(*part)) for a, part in zip(self.arrays, zip(ends, ends[1:]))], self.axis)

    def cut(self, whole: Any) -> list[Any]:
        """Parts of an array with the same axis, one for each piece."""
        axis = len(whole.shape) + self.axis
        return list(self.map(lambda _, p: jax.lax.slice_in_dim(whole, p.start, p.stop, axis=axis)).arrays)


def is_pieces(x: Any) -> bool:
    return isinstance(x, Pieces)


def cut_like(value: Any, like: Any) -> Any:
    """An array in the pieces of another."""
    if not is_pieces(like) or is_pieces(value):
        return value
    return Pieces(like.cut(value), like.axis)


def joined(value: Any) -> Any:
    return jnp.concatenate(value.arrays, value.axis) if is_pieces(value) else value


def zeros_in_pieces(shape: tuple[int, ...], dtype: DTypeLike, axis: int, samples: int | None) -> Any:
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
