"""The sum over samples of a signal times a trace, in the form that is fast where it is lowered.

``met(signal, trace)`` has the shape of a weight: ``signal`` has the axes of samples, then those of positions, ``trace``
has others of the weight between them. Its transpose :func:`spread_over` lets a cotangent of weight's shape reach the
signal. Both are primitives: under ``jax.vmap`` mapped samples join the others, so that the sum over them is part of the
transposed ``spread_over``, and what computes it is chosen where it is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .._jax import Primitive, define_bilinear
from .._precision import wide
from .._types import PyTree
from .pieces import Pieces

__all__ = ["aligned", "met", "spread_over"]

_UNROLLED = 4
_SMALL = 2**15  # elements; where a plain sum is as fast, it compiles faster


def met(signal: jax.Array, trace: jax.Array | Pieces, samples: int) -> jax.Array:
    """``sum over samples of signal * trace``; the first ``samples`` axes are those of samples."""
    signal, pieces, axis = _operands(signal, trace)
    if samples and sum(p.size for p in pieces) < _SMALL:
        return _met(signal, *pieces, samples=samples, axis=axis)
    return _met_p.bind(signal, *pieces, samples=samples, axis=axis)


def spread_over(weight: jax.Array, trace: jax.Array | Pieces, samples: int, rank: int) -> jax.Array:
    """``weight * trace``, summed over what is neither an axis of samples nor one of the last ``rank``."""
    weight, pieces, axis = _operands(weight, trace)
    return _spread_p.bind(weight, *pieces, samples=samples, rank=rank, axis=axis)


def _operands(other: jax.Array, trace: jax.Array | Pieces) -> tuple[jax.Array, tuple[jax.Array, ...], int]:
    """Narrow traces stay as they are: a wide copy of them would be made in memory."""
    pieces, axis = (trace.arrays, trace.axis) if isinstance(trace, Pieces) else ((trace,), -1)
    return other.astype(wide(jnp.result_type(other, trace.dtype))), pieces, axis


def aligned(signal: jax.Array, trace: jax.Array | Pieces, samples: int) -> jax.Array:
    """``signal`` with axes of length one where the trace has further ones."""
    between = (1,) * (trace.ndim - signal.ndim)
    return signal.reshape(*signal.shape[:samples], *between, *signal.shape[samples:])


def _met(signal: jax.Array, *pieces: jax.Array, samples: int, axis: int) -> jax.Array:
    sums = [(aligned(signal, p, samples) * p).sum(tuple(range(samples))) for p in pieces]
    return sums[0] if len(sums) == 1 else jnp.concatenate(sums, axis)


def _met_on_one_cpu(signal: jax.Array, *pieces: jax.Array, samples: int, axis: int) -> jax.Array:
    """Additions of products of slices, which XLA fuses; its own sum over leading axes reads in large strides."""
    size = math.prod(signal.shape[:samples])
    if not size or sum(p.size for p in pieces) < _SMALL:
        return _met(signal, *pieces, samples=samples, axis=axis)
    one_axis = lambda x: x.reshape(size, *x.shape[samples:])  # noqa: E731
    signal, pieces = one_axis(aligned(signal, pieces[0], samples)), tuple(map(one_axis, pieces))

    def total(first: int | jax.Array, count: int, sums: list[jax.Array]) -> list[jax.Array]:
        # XLA slices half precision as single precision. A copy of the whole must not be made for it before the loop.
        *held, first = jax.lax.optimization_barrier((*pieces, first))
        for i in range(count):
            s, *at = [jax.lax.dynamic_index_in_dim(x, first + i, keepdims=False) for x in (signal, *held)]
            products = [s * p for p in at]
            sums = [a + b for a, b in zip(sums, products)] if sums else products
        return sums

    rest = size % _UNROLLED
    dtype = jnp.result_type(signal, pieces[0])
    sums = total(0, rest, []) if rest else [jnp.zeros(p.shape[1:], dtype) for p in pieces]
    if rest < size:
        body = lambda i, sums: total(rest + i * _UNROLLED, _UNROLLED, sums)  # noqa: E731
        sums = jax.lax.fori_loop(0, (size - rest) // _UNROLLED, body, sums)
    return sums[0] if len(sums) == 1 else jnp.concatenate(sums, axis)


def _spread(weight: jax.Array, *pieces: jax.Array, samples: int, rank: int, axis: int) -> jax.Array:
    over = tuple(range(samples, pieces[0].ndim - rank))
    parts = Pieces(pieces, axis).cut(weight)
    terms = [(w[(None,) * samples] * p).sum(over) for w, p in zip(parts, pieces)]
    return sum(terms[1:], terms[0])


def _batch_met(
    args: Sequence[jax.Array], dims: Sequence[int | None], *, samples: int, axis: int
) -> tuple[jax.Array, int]:
    return jax.vmap(lambda *xs: _met(*xs, samples=samples, axis=axis), dims)(*args), 0


def _batch_spread(
    args: Sequence[jax.Array], dims: Sequence[int | None], *, samples: int, rank: int, axis: int
) -> tuple[jax.Array, int]:
    (weight, *pieces), (of_weight, *of_pieces) = args, dims
    mapped = [d for d in of_pieces if d is not None]
    if of_weight is None and len(mapped) == len(pieces):
        pieces = [jnp.moveaxis(p, d, 0) for p, d in zip(pieces, mapped)]
        return _spread_p.bind(weight, *pieces, samples=samples + 1, rank=rank, axis=axis), 0
    return jax.vmap(lambda *xs: _spread(*xs, samples=samples, rank=rank, axis=axis), dims)(*args), 0


def _signal_of_met(
    bar: jax.Array, signal: jax.core.ShapedArray, *pieces: jax.Array, samples: int, axis: int
) -> jax.Array:
    return spread_over(bar, Pieces(pieces, axis), samples, signal.ndim - samples)


def _pieces_of_met(bar: jax.Array, signal: jax.Array, *pieces: PyTree, samples: int, axis: int) -> list[jax.Array]:
    bars = Pieces(pieces, axis).cut(bar)
    return [(aligned(signal, p, samples) * b[(None,) * samples]).astype(p.dtype) for p, b in zip(pieces, bars)]


def _weight_of_spread(
    bar: jax.Array, weight: jax.core.ShapedArray, *pieces: jax.Array, samples: int, rank: int, axis: int
) -> jax.Array:
    return met(bar, Pieces(pieces, axis), samples)


def _pieces_of_spread(
    bar: jax.Array, weight: jax.Array, *pieces: PyTree, samples: int, rank: int, axis: int
) -> list[jax.Array]:
    weights = Pieces(pieces, axis).cut(weight)
    return [(aligned(bar, p, samples) * w[(None,) * samples]).astype(p.dtype) for p, w in zip(pieces, weights)]


_met_p, _spread_p = Primitive("met"), Primitive("spread_over")
define_bilinear(_met_p, _met, _batch_met, _signal_of_met, _pieces_of_met, _met_on_one_cpu)
define_bilinear(_spread_p, _spread, _batch_spread, _weight_of_spread, _pieces_of_spread)
