"""How much of the mixing between positions a group's transition Jacobian sees."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .._types import NotSupportedError, Shape

__all__ = ["CEILING", "DIAGONAL", "Neighbourhood", "Scope", "neighbourhood", "scope_of"]

CEILING = 16777216


class Scope(NamedTuple):
    """One of four kinds of transition Jacobian.

    ``'diagonal'``: per position, with every operation's output and every other mixing of positions held fixed.
    ``'coupled'``: per position, the blocks on the diagonal of the whole Jacobian, recurrent weights included.
    ``'sparse_n'``: the blocks between all pairs of positions within the ``order``-step neighbourhood of a position.
    ``'full'``: the whole Jacobian, as a product with tangents.

    ``ceiling`` bounds the number of elements that are computed at once.
    """

    kind: str = "diagonal"
    order: int = 1
    ceiling: int = CEILING

    @property
    def mixing(self) -> bool:
        return self.kind != "diagonal"


DIAGONAL = Scope()


def scope_of(include_recurrent_mixing: bool, sparse_n: int | None, ceiling: int, full: bool = False) -> Scope:
    """The scope that the arguments of executors and compiler functions name.

    Raises
    ------
    TypeError, ValueError
        If ``sparse_n`` or ``ceiling`` is no int of at least 1.
    NotSupportedError
        If there is ``sparse_n`` without the mixing that it follows.
    """
    for name, value in (("sparse_n", sparse_n), ("snap_max_jacobian_elements", ceiling)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an int of at least 1, got {value!r}.")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}.")
    if sparse_n is not None and not include_recurrent_mixing:
        raise NotSupportedError(
            f"sparse_n={sparse_n} follows the recurrent mixing of positions, and include_recurrent_mixing=False leaves "
            "it out. Pass include_recurrent_mixing=True too."
        )
    if full:
        return Scope("full", ceiling=int(ceiling))
    if sparse_n is not None and sparse_n > 1:
        return Scope("sparse_n", int(sparse_n), int(ceiling))
    return Scope("coupled" if include_recurrent_mixing else "diagonal", ceiling=int(ceiling))


class Neighbourhood(NamedTuple):
    """The positions that each position influences within some steps, itself first.

    Positions are those along ``axes`` of the group's shape, flattened; along the other axes nothing mixes.

    Attributes
    ----------
    axes : tuple of int
    varshape : tuple of int
        The shape of the group.
    neighbours, valid : array, shape (num_position, num_neighbour)
        Numbers of positions, and which of them are more than padding.
    conservative : bool
        Whether nothing was known of the coupling, so that every position is a neighbour of every other.
    sources : array or None
        Per position those that influence it in one step, itself included, padded with -1; ``None`` where all do.
    n : int
        A position's neighbours are those that it influences within ``n - 1`` steps.
    reason : str
        Why nothing is known of the coupling, where ``conservative``; else empty.
    """

    axes: tuple[int, ...]
    varshape: Shape
    neighbours: np.ndarray
    valid: np.ndarray
    conservative: bool
    sources: np.ndarray | None
    n: int
    reason: str = ""

    @property
    def num_position(self) -> int:
        return self.neighbours.shape[0]

    @property
    def num_neighbour(self) -> int:
        return self.neighbours.shape[1]

    @property
    def is_saturated(self) -> bool:
        """Whether every position is a neighbour of every other."""
        return self.num_neighbour == self.num_position and bool(self.valid.all())

    @property
    def is_degenerate(self) -> bool:
        """Whether every position is its only neighbour."""
        return self.num_neighbour == 1

    @property
    def shape(self) -> Shape:
        """V, with axes of length one where all positions have the same neighbours, which are then kept in order."""
        return tuple(1 if self.is_saturated and k in self.axes else n for k, n in enumerate(self.varshape))

    @property
    def _positions(self) -> Shape:
        """V, with axes of length one but for those of positions."""
        return tuple(n if k in self.axes else 1 for k, n in enumerate(self.varshape))

    @property
    def itself(self) -> np.ndarray:
        """Whether a neighbour is the position itself: an axis of neighbours, then V or axes of length one."""
        own = np.arange(self.num_neighbour)[:, None] == (np.arange(self.num_position) if self.is_saturated else 0)
        return own.reshape(self.num_neighbour, *(self._positions if self.is_saturated else [1] * len(self.varshape)))

    def columns(self, row: jax.Array, number: jax.Array) -> jax.Array:
        """Of a row of a Jacobian, ``V``, what can be other than zero: ``(lead, sources)``."""
        flat = self._flat(row)
        if self.sources is None or self.is_saturated:
            return flat
        sources = jnp.asarray(self.sources)[number]
        return jnp.where(sources >= 0, flat[..., sources], 0)

    def blocks(self, rows: jax.Array) -> jax.Array:
        """:meth:`columns` of every row, stacked -> two axes of neighbours, then ``V``."""
        full = jnp.moveaxis(rows, 0, -2)
        if self.is_saturated:
            return self._alike(full, 2)
        if self.sources is None:

            def of_position(neighbours: np.ndarray, valid: np.ndarray) -> jax.Array:
                return jnp.where(valid[:, None] & valid, full[..., neighbours, :][..., neighbours], 0)

            return self._unflat(jax.vmap(of_position, out_axes=-3)(self.neighbours, self.valid), 2)
        column_of = np.full((self.num_position,) * 2, -1, np.int32)  # of a source, among those that a row keeps
        rows_of, columns = np.nonzero(self.sources >= 0)
        column_of[rows_of, self.sources[rows_of, columns]] = columns
        at = column_of[self.neighbours[:, :, None], self.neighbours[:, None, :]]
        there = (at >= 0) & self.valid[:, :, None] & self.valid[:, None, :]
        return self._unflat(jnp.where(there, full[..., self.neighbours[:, :, None], at], 0), 2)

    def each_its_own(self, diagonal: jax.Array) -> jax.Array:
        """The blocks of a Jacobian without mixing, from its entries per position."""
        shape = (self.num_neighbour, self.num_neighbour, *(1,) * len(self.varshape))
        return self.gather(diagonal)[:, None] * jnp.eye(self.num_neighbour, dtype=diagonal.dtype).reshape(shape)

    def gather(self, values: jax.Array) -> jax.Array:
        """Values per position, ``(..., V)`` -> an axis of neighbours, then ``V``; zero for padding."""
        flat = self._flat(values)
        if self.is_saturated:
            return self._alike(flat, 1)
        return self._unflat(jnp.where(self.valid, flat[..., self.neighbours], 0), 1)

    def own(self, values: jax.Array) -> jax.Array:
        """Of values per neighbour and position, ``(..., neighbours, V)``, those of each position itself."""
        axis = values.ndim - len(self.varshape) - 1
        if not self.is_saturated:
            return jnp.take(values, 0, axis)
        flat = jnp.moveaxis(values.squeeze(tuple(axis + 1 + k for k in self.axes)), axis, -1)
        return self._unflat(flat, 0)

    @property
    def itself_first(self) -> np.ndarray | None:
        """Where the neighbours that :attr:`neighbours` lists lie among those that are kept for every position.

        Along an axis of neighbours, then V or axes of length one; ``None`` where they are kept in that order.
        """
        if not self.is_saturated:
            return None
        return self.neighbours.T.reshape(self.num_neighbour, *self._positions)

    def product(self, a: ArrayLike, b: ArrayLike) -> ArrayLike:
        """A matrix between neighbours at every position times another one or a vector; of numbers, as they are."""
        if jnp.ndim(a) == 0 or jnp.ndim(b) == 0:
            return a * b
        columns = "k" if jnp.ndim(b) == 2 + len(self.varshape) else ""
        return jnp.einsum(f"ij...,j{columns}...->i{columns}...", a, b)

    def transposed(self, a: ArrayLike, b: ArrayLike) -> ArrayLike:
        """:meth:`product` of the transposed matrix and a vector."""
        return a * b if jnp.ndim(a) == 0 or jnp.ndim(b) == 0 else jnp.einsum("ij...,i...->j...", a, b)

    def _flat(self, values: jax.Array) -> jax.Array:
        """The axes of positions behind all others, as one."""
        first = values.ndim - len(self.varshape)
        behind = range(-len(self.axes), 0)
        moved = jnp.moveaxis(values, [first + k for k in self.axes], behind)
        return moved.reshape(*moved.shape[: values.ndim - len(self.axes)], self.num_position)

    def _unflat(self, values: jax.Array, number: int) -> jax.Array:
        """The axes of positions back in their places, and the ``number`` axes of neighbours behind them before V."""
        lead, behind = values.shape[: -1 - number], values.shape[values.ndim - number :]
        whole = values.reshape(*lead, *(self.varshape[k] for k in self.axes), *behind)
        first = len(lead) + len(self.axes) - len(self.varshape)  # axes in front of V
        whole = jnp.moveaxis(whole, range(len(lead), len(lead) + len(self.axes)), [first + k for k in self.axes])
        return jnp.moveaxis(whole, range(whole.ndim - number, whole.ndim), range(first, first + number))

    def _alike(self, values: jax.Array, number: int) -> jax.Array:
        """What is the same for all positions: ``number`` axes of neighbours before V, where those of positions are one.

        They stand behind all others now, in front of them the other axes of V.
        """
        first = values.ndim - number - (len(self.varshape) - len(self.axes))
        moved = jnp.moveaxis(values, range(values.ndim - number, values.ndim), range(first, first + number))
        return jnp.expand_dims(moved, [first + number + k for k in self.axes])


def neighbourhood(
    adjacency: np.ndarray | None, axes: tuple[int, ...], varshape: Shape, order: int, reason: str = ""
) -> Neighbourhood:
    """From ``adjacency[p, q]``, whether p influences q in one step (``None``: every q), to that of several steps."""
    number = math.prod(varshape[k] for k in axes)
    sources = None
    if adjacency is None:
        reached = np.ones((number, number), bool)
    else:
        one = adjacency | np.eye(number, dtype=bool)
        sources = _padded([np.flatnonzero(column) for column in one.T])
        reached, step = np.eye(number, dtype=bool), one.astype(np.float32)
        for _ in range(order - 1):
            further = reached.astype(np.float32) @ step > 0
            if np.array_equal(further, reached):
                break
            reached = further
    own_first: list[list[int | np.integer]] = [
        [p, *(q for q in np.flatnonzero(row) if q != p)] for p, row in enumerate(reached)
    ]
    neighbours = _padded(own_first)
    valid = neighbours >= 0
    if sources is not None and sources.shape[1] == number:
        sources = None
    neighbours = np.where(valid, neighbours, 0)
    return Neighbourhood(axes, varshape, neighbours, valid, adjacency is None, sources, order, reason)


def _padded(rows: Sequence[Sequence[int | np.integer] | np.ndarray]) -> np.ndarray:
    width = max(len(r) for r in rows)
    return np.array([[*r, *[-1] * (width - len(r))] for r in rows], np.int32)
