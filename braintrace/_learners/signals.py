"""How a learning signal is changed before it meets the traces."""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .._compiler.groups import HiddenGroup
from .._types import CompilationWarning, PyTree
from .._warn import warn

__all__ = ["as_key", "expand_modulator", "feedback_matrix", "random_feedback"]


def as_key(name: str, given: PyTree) -> jax.Array:
    """The JAX key that an argument is, or that an integer is the seed of.

    Raises
    ------
    TypeError
        If it is neither; the message has the ``name`` of the argument.
    """
    key = given
    if isinstance(key, numbers.Integral) and not isinstance(key, bool):
        key = jax.random.key(int(key))
    elif getattr(key, "dtype", None) == jnp.uint32 and key.ndim == 1:
        key = jax.random.wrap_key_data(key)
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)) or jnp.ndim(key):
        raise TypeError(f"{name} must be an int or a JAX key, got {given!r}.")
    return key


def feedback_matrix(key: jax.Array, group: HiddenGroup) -> jax.Array:
    """A fixed square matrix over the units (the last axis) of a group, entries ``0.1 N(0, 1)``."""
    n = group.varshape[-1] if group.varshape else 1
    return jax.lax.stop_gradient(0.1 * jax.random.normal(jax.random.fold_in(key, group.index), (n, n)))


def random_feedback(signal: jax.Array, matrix: jax.Array) -> jax.Array:
    """Normalise a signal ``(..., n, S)`` over units and send it through a fixed matrix instead of the true weights."""
    shape = signal.shape
    signal = signal.reshape((1, *shape)) if len(shape) == 1 else signal  # a group of scalars has one unit
    unit = signal / (jnp.linalg.norm(signal, axis=-2, keepdims=True) + 1e-8)
    return jnp.einsum("...la,lk->...ka", unit, matrix.astype(signal.dtype)).reshape(shape)


def expand_modulator(modulator: PyTree, group: HiddenGroup, dtype: DTypeLike) -> jax.Array:
    """A third factor as a signal of shape ``V + (S,)``: a scalar, an array of shape V, or one that broadcasts."""
    if not (hasattr(modulator, "shape") or isinstance(modulator, numbers.Number)):
        raise TypeError(f"The modulator must be a scalar or an array, got a {type(modulator).__name__}.")
    shape = (*group.varshape, group.num_state)
    value = jnp.asarray(modulator, dtype)
    value = value[..., None] if value.shape == group.varshape else value
    first = group.varshape[:1]
    per_sample = (*first, *[1] * len(group.varshape))
    try:
        expanded = jnp.broadcast_to(value, shape)
    except ValueError:
        raise ValueError(
            f"The modulator has shape {jnp.shape(modulator)}, which does not expand to {shape} of {group.name}. Pass a "
            f"scalar, or shape {group.varshape}; {per_sample} is one value for each entry of the first axis."
        ) from None
    if len(group.varshape) > 1 and value.shape == per_sample[:-1] and first != (1,):
        warn(
            f"The modulator of shape {value.shape} is taken as one value for each unit of {group.name}, of shape "
            f"{group.varshape}. If its first axis is that of samples, pass it in the shape {per_sample}.",
            CompilationWarning,
        )
    return expanded
