"""Matrix products: one matrix, or one for every group."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from .._jax import any_rank, consts_of, is_tracer
from .._types import PyTree, Shape
from .primitive import Anchors, Aval, Avals, ETPPrimitive, Params, anchored

__all__ = [
    "Hook", "apply_hook", "array_operand", "dense", "etp_gmm_p", "etp_gmv_p", "etp_mm_p", "etp_mv_p", "grouped",
    "grouped_matmul", "matmul", "one_per_output", "rank_of", "shape_after", "weight_and_bias", "with_units",
]  # fmt: skip

Hook = Callable[[jax.Array], jax.Array] | None


def apply_hook(hook: Hook, value: jax.Array) -> jax.Array:
    if hook is None:
        return value
    # It is called again when the operation is differentiated and compiled; what else it reads would be out of date.
    closed = jax.make_jaxpr(hook)(jax.ShapeDtypeStruct(value.shape, value.dtype))
    others = [tuple(c.shape) for c in consts_of(closed) if is_tracer(c)]
    if others:
        code = getattr(hook, "__code__", None)
        where = "" if code is None else f" ({code.co_filename}:{code.co_firstlineno})"
        raise ValueError(
            f"The function {getattr(hook, '__qualname__', hook)}{where} that an operation applies to its parameter of "
            f"shape {tuple(value.shape)} reads more than this parameter: a state, another parameter, an input, or an "
            f"array that the step makes, of shape {others[0]}. Apply it in front of the operation instead, as in "
            "matmul(x, f(w)), or make that array in __init__."
        )
    return hook(value)


def weight_and_bias(params: Params) -> dict[str, int]:
    return {"weight": 1, "bias": 2} if params["has_bias"] else {"weight": 1}


def rank_of(x: PyTree) -> int:
    return jnp.ndim(u.get_mantissa(x))


def array_operand(op: str, name: str, value: object) -> None:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{op}: {name} must be an array or a brainunit.Quantity, got {type(value).__name__}.")


def with_units(
    op: str,
    bind: Callable[..., jax.Array],
    x: PyTree,
    weights: Mapping[str, PyTree],
    bias: PyTree = None,
) -> PyTree:
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


def shape_after(hook: Hook, op: str, name: str, weight: PyTree) -> Shape:
    """The shape of what a function makes of a weight."""
    array_operand(op, name, weight)
    if hook is None:
        return tuple(weight.shape)
    return tuple(jax.eval_shape(lambda w: apply_hook(hook, w), u.get_mantissa(weight)).shape)


def one_per_output(op: str, bias: PyTree, outputs: Shape, bias_fn: Hook) -> PyTree:
    """A bias with an entry for every output of a sample; one that several outputs share is repeated."""
    array_operand(op, "bias", bias)
    shape = tuple(bias.shape)
    if len(shape) <= len(outputs) and (shape == outputs or bias_fn is not None):  # a function may make them
        return bias
    if len(shape) > len(outputs) or any(n not in (1, m) for n, m in zip(shape[::-1], outputs[::-1])):
        raise ValueError(
            f"{op}: bias has shape {shape}, and may have one entry for every output, {outputs}: all samples share it. "
            "Add what differs between samples to the result."
        )
    return u.math.broadcast_to(bias, outputs)


# -- one matrix -------------------------------------------------------------------------------------------------


@any_rank
def _dense_impl(
    x: jax.Array, weight: jax.Array, *bias: jax.Array, has_bias: bool, weight_fn: Hook, bias_fn: Hook
) -> jax.Array:
    del has_bias
    y = jnp.matmul(x, apply_hook(weight_fn, weight))
    return y + apply_hook(bias_fn, bias[0]) if bias else y


def _last_axes(y_aval: Aval, weight_avals: Avals, params: Params) -> Anchors:
    del y_aval, params
    return dict.fromkeys(weight_avals)


def _no_hook(params: Params) -> bool:
    return params["weight_fn"] is None


def _every_pair(params: Params, size: int) -> np.ndarray:
    del params
    return np.ones((size, size), bool)


etp_mm_p = ETPPrimitive("etp_mm", _dense_impl, batched=True, trainables=weight_and_bias, sample_ndim=1)
etp_mv_p = ETPPrimitive("etp_mv", _dense_impl, trainables=weight_and_bias, batched_twin=etp_mm_p)
for _p in (etp_mm_p, etp_mv_p):
    _p.register_etp_rules(anchors=_last_axes, snap_anchor=anchored, snap_adjacency=_every_pair, input_rows=_no_hook)


def dense(x: PyTree, weight: PyTree, bias: PyTree = None, *, weight_fn: Hook = None, bias_fn: Hook = None) -> PyTree:
    """:func:`matmul` for an input of any rank; all leading axes are batch axes."""
    p = etp_mm_p if rank_of(x) > 1 else etp_mv_p

    def bind(*operands: jax.Array) -> jax.Array:
        return p.bind(*operands, has_bias=bias is not None, weight_fn=weight_fn, bias_fn=bias_fn)

    if bias is not None:
        bias = one_per_output("matmul", bias, shape_after(weight_fn, "matmul", "weight", weight)[1:], bias_fn)
    return with_units("matmul", bind, x, {"weight": weight}, bias)


def matmul(x: PyTree, weight: PyTree, bias: PyTree = None, *, weight_fn: Hook = None, bias_fn: Hook = None) -> PyTree:
    r"""Marked matrix product :math:`y = x\, f(W) + g(b)`.

    Parameters
    ----------
    x : array or Quantity, shape ``(in,)`` or ``(B, in)``
        The input; booleans and integers (spikes) are fine.
    weight : array or Quantity, shape ``(in, out)``
        The trained matrix.
    bias : array or Quantity, shape ``(out,)``, optional
        Must be convertible to the unit of ``x`` times that of ``weight``; one entry, ``()`` or ``(1,)``, is for all
        outputs.
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
        If ``x`` has a rank other than 1 or 2, or ``bias`` another shape.
    TypeError
        If an operand is no array, or the inner dimensions differ.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> braintrace.matmul(jnp.ones((5, 2)), jnp.ones((2, 3)), jnp.zeros(3)).shape
    (5, 3)
    """
    array_operand("matmul", "x", x)
    if rank_of(x) not in (1, 2):
        raise ValueError(
            f"matmul: x has shape {tuple(x.shape)}; accepted are (in,) and (B, in). "
            "Flatten further batch axes, or use braintrace.nn.Linear."
        )
    return dense(x, weight, bias, weight_fn=weight_fn, bias_fn=bias_fn)


# -- one matrix for every group ---------------------------------------------------------------------------------


@any_rank
def _grouped_impl(
    x: jax.Array, weight: jax.Array, *bias: jax.Array, has_bias: bool, weight_fn: Hook, bias_fn: Hook
) -> jax.Array:
    del has_bias
    y = jnp.einsum("...gk,gkn->...gn", x, apply_hook(weight_fn, weight))
    return y + apply_hook(bias_fn, bias[0]) if bias else y


def _grouped_anchors(y_aval: Aval, weight_avals: Avals, params: Params) -> Anchors:
    del params
    groups, width = y_aval.shape
    anchors = {"weight": (np.arange(groups)[:, None, None], np.arange(width)), "bias": None}
    return {k: anchors[k] for k in weight_avals}


etp_gmm_p = ETPPrimitive("etp_gmm", _grouped_impl, batched=True, trainables=weight_and_bias, sample_ndim=2)
etp_gmv_p = ETPPrimitive("etp_gmv", _grouped_impl, trainables=weight_and_bias, batched_twin=etp_gmm_p)
for _p in (etp_gmm_p, etp_gmv_p):
    _p.register_etp_rules(anchors=_grouped_anchors, snap_anchor=anchored)


def grouped(x: PyTree, weight: PyTree, bias: PyTree = None, *, weight_fn: Hook = None, bias_fn: Hook = None) -> PyTree:
    """:func:`grouped_matmul` for an input of any rank; all axes in front of the groups are batch axes."""
    for name, value, rank in (("weight", weight, 3), ("bias", bias, 2)):
        if value is not None:
            array_operand("grouped_matmul", name, value)
            if rank_of(value) != rank:
                raise ValueError(
                    f"grouped_matmul: {name} has shape {tuple(value.shape)}; accepted is "
                    f"{'(groups, in, out)' if rank == 3 else '(groups, out)'}."
                )
    if tuple(x.shape[-2:]) != tuple(weight.shape[:2]):
        raise ValueError(
            f"grouped_matmul: the last axes {tuple(x.shape[-2:])} of x are not the groups and inputs "
            f"{tuple(weight.shape[:2])} of a weight of shape {tuple(weight.shape)}. Pass x of shape (..., groups, in)."
        )
    if bias is not None:
        made = shape_after(weight_fn, "grouped_matmul", "weight", weight)
        bias = one_per_output("grouped_matmul", bias, made[:1] + made[2:], bias_fn)
    p = etp_gmm_p if rank_of(x) > 2 else etp_gmv_p

    def bind(*operands: jax.Array) -> jax.Array:
        return p.bind(*operands, has_bias=bias is not None, weight_fn=weight_fn, bias_fn=bias_fn)

    return with_units("grouped_matmul", bind, x, {"weight": weight}, bias)


def grouped_matmul(
    x: PyTree, weight: PyTree, bias: PyTree = None, *, weight_fn: Hook = None, bias_fn: Hook = None
) -> PyTree:
    r"""Marked matrix product of every group by itself, :math:`y_g = x_g\, f(W)_g + g(b)_g`.

    Parameters
    ----------
    x : array or Quantity, shape ``(G, K)`` or ``(B, G, K)``
        The input.
    weight : array or Quantity, shape ``(G, K, N)``
        One trained matrix per group.
    bias : array or Quantity, shape ``(G, N)``, optional
        Must be convertible to the unit of ``x`` times that of ``weight``.
    weight_fn, bias_fn : callable, optional
        Maps of the raw mantissas, as in :func:`matmul`.

    Returns
    -------
    array or Quantity, shape ``(G, N)`` or ``(B, G, N)``
        In the unit of ``x`` times that of ``weight``.

    Raises
    ------
    ValueError
        If an operand has another rank, or the groups or inner dimensions differ.
    TypeError
        If an operand is no array.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> braintrace.grouped_matmul(jnp.ones((5, 4, 2)), jnp.ones((4, 2, 3))).shape
    (5, 4, 3)
    """
    array_operand("grouped_matmul", "x", x)
    if rank_of(x) not in (2, 3):
        raise ValueError(
            f"grouped_matmul: x has shape {tuple(x.shape)}; accepted are (groups, in) and (B, groups, in). "
            "Flatten further batch axes, or use braintrace.nn.GroupedLinear."
        )
    return grouped(x, weight, bias, weight_fn=weight_fn, bias_fn=bias_fn)
