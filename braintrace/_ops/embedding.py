"""Rows of a table."""

from __future__ import annotations

import brainunit as u
import jax
import jax.numpy as jnp

from .._types import PyTree
from .linear import Hook, apply_hook, array_operand
from .primitive import Anchors, Aval, Avals, ETPPrimitive, Params, anchored

__all__ = ["embedding", "etp_emb_p", "etp_emb_v_p", "lookup"]


def _embedding_impl(x: jax.Array, weight: jax.Array, *, weight_fn: Hook, feature_ndim: int) -> jax.Array:
    del feature_ndim
    table = apply_hook(weight_fn, weight)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.take(table, x, axis=0)
    # The representation that the operation is linear in: an amount of every row.
    return jnp.tensordot(x, table, 1)


def _one_hot(x: jax.Array, weight_avals: Avals) -> jax.Array:
    rows, dtype = weight_avals["weight"].shape[0], weight_avals["weight"].dtype
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(dtype)
    return jax.nn.one_hot(jnp.where(x < 0, x + rows, x), rows, dtype=dtype)


def _anchors(y_aval: Aval, weight_avals: Avals, params: Params) -> Anchors:
    del y_aval, params
    return dict.fromkeys(weight_avals)


def _feature_ndim(params: Params) -> int:
    return params.get("feature_ndim", 1)


etp_emb_p = ETPPrimitive("etp_emb", _embedding_impl, batched=True, sample_ndim=_feature_ndim)
etp_emb_v_p = ETPPrimitive("etp_emb_v", _embedding_impl, batched_twin=etp_emb_p)
for _p in (etp_emb_p, etp_emb_v_p):
    _p.register_etp_rules(pp_x_repr=_one_hot, anchors=_anchors, snap_anchor=anchored)


def lookup(indices: PyTree, weight: PyTree, weight_fn: Hook = None) -> PyTree:
    """:func:`embedding` for a table with any number of feature axes."""
    array_operand("embedding", "indices", indices)
    array_operand("embedding", "weight", weight)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(
            f"embedding: indices have dtype {indices.dtype}, accepted are integers. "
            "For an amount of every row use braintrace.matmul."
        )
    p = etp_emb_p if jnp.ndim(indices) else etp_emb_v_p
    table = jnp.asarray(u.get_mantissa(weight))
    y = p.bind(jnp.asarray(indices), table, weight_fn=weight_fn, feature_ndim=table.ndim - 1)
    unit = u.get_unit(weight)
    return y if unit == u.UNITLESS else u.Quantity(y, unit=unit)


def embedding(indices: PyTree, weight: PyTree, *, weight_fn: Hook = None) -> PyTree:
    r"""Marked look-up :math:`y = f(T)_i` of rows of a table.

    Parameters
    ----------
    indices : integer array, shape ``()`` or ``(B,)``
        Row numbers. Negative ones count from the end; beyond the table the result is NaN.
    weight : array or Quantity, shape ``(rows, features)``
        The trained table.
    weight_fn : callable, optional
        Map of the raw mantissa of the whole table, as in :func:`matmul`.

    Returns
    -------
    array or Quantity, shape ``(features,)`` or ``(B, features)``
        In the unit of ``weight``.

    Raises
    ------
    TypeError
        If an operand is no array, or ``indices`` are no integers.
    NotImplementedError
        If ``indices`` have two axes or more.
    ValueError
        If ``weight`` has a rank other than 2.

    Notes
    -----
    The input that a trace filters is the one-hot vector of the index, in the dtype of the table.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> braintrace.embedding(jnp.array([2, 0]), jnp.arange(6.0).reshape(3, 2))
    Array([[4., 5.],
           [0., 1.]], dtype=float32)
    """
    array_operand("embedding", "indices", indices)
    array_operand("embedding", "weight", weight)
    if jnp.ndim(u.get_mantissa(weight)) != 2:
        raise ValueError(f"embedding: weight has shape {tuple(weight.shape)}; accepted is (rows, features).")
    if jnp.ndim(indices) > 1:
        raise NotImplementedError(
            f"embedding: indices have shape {tuple(indices.shape)}; accepted are () and (B,). "
            "Flatten them, or use braintrace.nn.Embedding."
        )
    return lookup(indices, weight, weight_fn)
