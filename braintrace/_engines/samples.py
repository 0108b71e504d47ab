"""The sum over samples of a signal times a trace, in the form that is fast where it is lowered.

``met(signal, trace)`` has the shape of a weight: ``signal`` has the axes of samples, then those of positions, ``trace``
has others of the weight between them. Its transpose :func:`spread_over` lets a cotangent of weight's shape reach the
signal. Both are primitives: under ``jax.vmap`` mapped samples join the others, so that the sum over them is part of the
transposed ``spread_over``, and what computes it is chosen where it is compiled.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from .._jax import Primitive, define_bilinear

__all__ = ["met", "spread_over"]

_UNROLLED = 8


def met(signal: jax.Array, trace: jax.Array, samples: int) -> jax.Array:
    """``sum over samples of signal * trace``; the first ``samples`` axes are those of samples."""
    dtype = jnp.result_type(signal, trace)
    return _met_p.bind(signal.astype(dtype), trace.astype(dtype), samples=samples)


def spread_over(weight: jax.Array, trace: jax.Array, samples: int, rank: int) -> jax.Array:
    """``weight * trace``, summed over what is neither an axis of samples nor one of the last ``rank``."""
    dtype = jnp.result_type(weight, trace)
    return _spread_p.bind(weight.astype(dtype), trace.astype(dtype), samples=samples, rank=rank)


def _aligned(signal, trace, samples):
    """``signal`` with axes of length one where the trace has further ones."""
    between = (1,) * (trace.ndim - signal.ndim)
    return signal.reshape(*signal.shape[:samples], *between, *signal.shape[samples:])


def _met(signal, trace, *, samples):
    return (_aligned(signal, trace, samples) * trace).sum(tuple(range(samples)))


def _met_on_one_cpu(signal, trace, *, samples):
    """Additions of products of slices, which XLA fuses; its own sum over leading axes reads in large strides."""
    size = math.prod(trace.shape[:samples])
    if size == 0:
        return _met(signal, trace, samples=samples)
    parts = [_aligned(signal, trace, samples), trace]
    parts = [p.reshape(size, *p.shape[samples:]) for p in parts]

    def total(first, count, start=None):
        for i in range(count):
            at = [jax.lax.dynamic_index_in_dim(p, first + i, keepdims=False) for p in parts]
            product = at[0] * at[1]
            start = product if start is None else start + product
        return start

    rest = size % _UNROLLED or min(size, _UNROLLED)
    sums = total(0, rest)
    if rest == size:
        return sums
    body = lambda i, sums: total(rest + i * _UNROLLED, _UNROLLED, sums)  # noqa: E731
    return jax.lax.fori_loop(0, (size - rest) // _UNROLLED, body, sums)


def _spread(weight, trace, *, samples, rank):
    return (weight[(None,) * samples] * trace).sum(tuple(range(samples, trace.ndim - rank)))


def _batch_met(args: Any, dims: Any, *, samples: int) -> Any:
    return jax.vmap(lambda *xs: _met(*xs, samples=samples), dims)(*args), 0


def _batch_spread(args: Any, dims: Any, *, samples: int, rank: int) -> Any:
    weight, trace = args
    if dims[0] is None:
        trace = jnp.moveaxis(trace, dims[1], 0)
        return _spread_p.bind(weight, trace, samples=samples + 1, rank=rank), 0
    return jax.vmap(lambda *xs: _spread(*xs, samples=samples, rank=rank), dims)(weight, trace), 0


_met_p, _spread_p = Primitive("met"), Primitive("spread_over")
define_bilinear(
    _met_p,
    _met,
    _batch_met,
    lambda bar, signal, trace, samples: spread_over(bar, trace, samples, signal.ndim - samples),
    lambda bar, signal, trace, samples: _aligned(signal, bar[(None,) * samples], samples) * bar,
    _met_on_one_cpu,
)
define_bilinear(
    _spread_p,
    _spread,
    _batch_spread,
    lambda bar, weight, trace, samples, rank: met(bar, trace, samples),
    lambda bar, weight, trace, samples, rank: _aligned(bar, weight[(None,) * samples], samples) * weight,
)
