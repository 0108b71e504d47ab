"""Operations that act on every entry of a parameter by itself."""

from __future__ import annotations

import brainunit as u
import jax
import jax.numpy as jnp

from .._types import PyTree
from .linear import Hook, array_operand
from .primitive import ETPPrimitive, anchored

__all__ = ["element_wise", "etp_elemwise_p"]


def _element_wise_impl(weight: jax.Array, *, weight_fn: Hook) -> jax.Array:
    # A marked value must differ from the parameter itself, also without a function.
    return jnp.copy(weight) if weight_fn is None else weight_fn(weight)


etp_elemwise_p = ETPPrimitive("etp_elemwise", _element_wise_impl, trainables=lambda params: {"weight": 0}, x_index=None)
etp_elemwise_p.register_etp_rules(snap_anchor=anchored)


def element_wise(weight: PyTree, fn: Hook = None, *, weight_fn: Hook = None) -> PyTree:
    r"""Marked parameter :math:`y = f(w)`, used entry by entry.

    Parameters
    ----------
    weight : array or Quantity
        A parameter whose entries each belong to one unit: a time constant, a bias, a gain.
    fn : callable, optional
        Another spelling of ``weight_fn``.
    weight_fn : callable, optional
        Map of the raw mantissa; the gradient is with respect to the raw parameter.

    Returns
    -------
    array or Quantity
        In the unit of ``weight``.

    Raises
    ------
    TypeError
        If ``weight`` is no array, or both ``fn`` and ``weight_fn`` are given.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> braintrace.element_wise(jnp.zeros(2), weight_fn=jnp.exp)
    Array([1., 1.], dtype=float32)
    """
    if fn is not None and weight_fn is not None:
        raise TypeError("element_wise: pass weight_fn or its older spelling fn, not both.")
    array_operand("element_wise", "weight", weight)
    y = etp_elemwise_p.bind(jnp.asarray(u.get_mantissa(weight)), weight_fn=weight_fn or fn)
    unit = u.get_unit(weight)
    return y if unit == u.UNITLESS else u.Quantity(y, unit=unit)
