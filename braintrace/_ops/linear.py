"""Matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp

from .primitive import ETPPrimitive

__all__ = ["dense", "etp_mm_p", "etp_mv_p", "matmul", "with_units"]

Hook = Callable[[jax.Array], jax.Array] | None


def _dense_impl(x, weight, *bias, has_bias, weight_fn, bias_fn):
    y = jnp.matmul(x, weight if weight_fn is None else weight_fn(weight))
    if not has_bias:
        return y
    return y + (bias[0] if bias_fn is None else bias_fn(bias[0]))


def _dense_trainables(params):
    return {"weight": 1, "bias": 2} if params["has_bias"] else {"weight": 1}


etp_mm_p = ETPPrimitive("etp_mm", _dense_impl, batched=True, trainables=_dense_trainables, any_rank=True)
etp_mv_p = ETPPrimitive("etp_mv", _dense_impl, trainables=_dense_trainables, batched_twin=etp_mm_p)


def array_operand(op: str, name: str, value: Any) -> None:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{op}: {name} must be an array or a brainunit.Quantity, got {type(value).__name__}.")


def with_units(op: str, bind: Callable[..., jax.Array], x: Any, weights: dict[str, Any], bias: Any) -> Any:
    """Run ``bind`` on mantissas; the result has the product of the units, to which the bias is converted."""
    for name, value in {"x": x, **weights, **({} if bias is None else {"bias": bias})}.items():
        array_operand(op, name, value)
    unit = u.get_unit(x)
    for value in weights.values():
        unit = unit * u.get_unit(value)
    operands = [jnp.asarray(u.get_mantissa(v)) for v in (x, *weights.values())]
    if bias is not None:
        if u.get_unit(bias) != unit:
            bias = u.Quantity(bias).in_unit(unit)
        operands.append(jnp.asarray(u.get_mantissa(bias)))
    y = bind(*operands)
    return y if unit.is_unitless and unit == u.UNITLESS else u.maybe_decimal(u.Quantity(y, unit=unit))


def dense(x: Any, weight: Any, bias: Any = None, *, weight_fn: Hook = None, bias_fn: Hook = None) -> Any:
    """:func:`matmul` for an input of any rank; all leading axes are batch axes."""
    p = etp_mm_p if jnp.ndim(u.get_mantissa(x)) > 1 else etp_mv_p

    def bind(*operands):
        return p.bind(*operands, has_bias=bias is not None, weight_fn=weight_fn, bias_fn=bias_fn)

    return with_units("matmul", bind, x, {"weight": weight}, bias)


def matmul(x: Any, weight: Any, bias: Any = None, *, weight_fn: Hook = None, bias_fn: Hook = None) -> Any:
    r"""Marked matrix product :math:`y = x\, f(W) + g(b)`.

    Parameters
    ----------
    x : array or Quantity, shape ``(in,)`` or ``(B, in)``
        The input; booleans and integers (spikes) are fine.
    weight : array or Quantity, shape ``(in, out)``
        The trained matrix.
    bias : array or Quantity, shape ``(out,)``, optional
        Must be convertible to the unit of ``x`` times that of ``weight``.
    weight_fn, bias_fn : callable, optional
        Maps of the raw mantissas, applied inside the operation: gradients and traces are with respect to the raw
        parameters. Compared by identity, so pass the same function object at every call.

    Returns
    -------
    array or Quantity, shape ``(out,)`` or ``(B, out)``
        In the unit of ``x`` times that of ``weight``.

    Raises
    ------
    ValueError
        If ``x`` has a rank other than 1 or 2.
    TypeError
        If an operand is no array, or the inner dimensions differ.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> braintrace.matmul(jnp.ones((5, 2)), jnp.ones((2, 3)), jnp.zeros(3)).shape
    (5, 3)
    """
    array_operand("matmul", "x", x)
    rank = jnp.ndim(u.get_mantissa(x))
    if rank not in (1, 2):
        raise ValueError(
            f"matmul: x has shape {tuple(x.shape)}; accepted are (in,) and (B, in). "
            "Flatten further batch axes, or use braintrace.nn.Linear."
        )
    return dense(x, weight, bias, weight_fn=weight_fn, bias_fn=bias_fn)
