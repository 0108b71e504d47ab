"""Products with a matrix of low rank."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .._jax import any_rank
from .._types import PyTree
from .linear import Hook, apply_hook, array_operand, one_per_output, rank_of, shape_after, with_units
from .primitive import Anchors, Aval, Avals, ETPPrimitive, Gradients, Params, Unshared, Weights, anchored

__all__ = ["etp_lora_mm_p", "etp_lora_mv_p", "lora_matmul", "low_rank"]


@any_rank
def _lora_impl(
    x: jax.Array,
    b: jax.Array,
    a: jax.Array,
    *bias: jax.Array,
    alpha: float,
    has_bias: bool,
    b_fn: Hook,
    a_fn: Hook,
    bias_fn: Hook,
) -> jax.Array:
    del has_bias
    y = jnp.matmul(jnp.matmul(x, apply_hook(b_fn, b)), apply_hook(a_fn, a))
    y = y if alpha == 1.0 else y * alpha
    return y + apply_hook(bias_fn, bias[0]) if bias else y


def _trainables(params: Params) -> dict[str, int]:
    return {"lora_b": 1, "lora_a": 2, **({"bias": 3} if params["has_bias"] else {})}


def _unshare(x_aval: Aval, y_aval: Aval, weight_avals: Avals, params: Params) -> Unshared:
    """An entry of B acts on every output; an entry of the product alpha f(B) g(A) acts on one.

    With an A that is another one at every step there is no product: B then has an entry for every output.
    """
    del x_aval
    steady = "lora_a" in weight_avals

    def expand(weights: Weights) -> Gradients:
        b = params["alpha"] * apply_hook(params["b_fn"], weights["lora_b"])
        a = apply_hook(params["a_fn"], weights["lora_a"])
        own = b @ jax.lax.stop_gradient(a) if steady else jnp.broadcast_to(b[..., None], (*b.shape, *y_aval.shape))
        out = {"lora_b": own, "lora_a": a, "input_side": jax.lax.stop_gradient(b)}
        if params["has_bias"]:
            out["bias"] = apply_hook(params["bias_fn"], weights["bias"])
        return out

    def impl(x: jax.Array, unshared: Weights) -> jax.Array:
        a = unshared["lora_a"]
        # The product has the value; A, beside it, adds nothing but its own derivative.
        beside_value = a - jax.lax.stop_gradient(a)
        of_b = x @ unshared["lora_b"] if steady else jnp.einsum("i,irn,rn->n", x, unshared["lora_b"], a)
        y = of_b + (x @ jax.lax.stop_gradient(unshared["input_side"])) @ beside_value
        return y + unshared["bias"] if params["has_bias"] else y

    return Unshared(expand, impl)


def _anchors(y_aval: Aval, weight_avals: Avals, params: Params) -> Anchors:
    del y_aval, params
    return dict.fromkeys(weight_avals)


etp_lora_mm_p = ETPPrimitive("etp_lora_mm", _lora_impl, batched=True, trainables=_trainables, sample_ndim=1)
etp_lora_mv_p = ETPPrimitive("etp_lora_mv", _lora_impl, trainables=_trainables, batched_twin=etp_lora_mm_p)
for _p in (etp_lora_mm_p, etp_lora_mv_p):
    _p.register_etp_rules(unshare=_unshare, anchors=_anchors, snap_anchor=anchored)


def low_rank(
    x: PyTree,
    B: PyTree,
    A: PyTree,
    *,
    alpha: float = 1.0,
    bias: PyTree = None,
    b_fn: Hook = None,
    a_fn: Hook = None,
    bias_fn: Hook = None,
) -> PyTree:
    """:func:`lora_matmul` for an input of any rank; all leading axes are batch axes."""
    p = etp_lora_mm_p if rank_of(x) > 1 else etp_lora_mv_p
    static = dict(alpha=float(alpha), has_bias=bias is not None, b_fn=b_fn, a_fn=a_fn, bias_fn=bias_fn)
    if bias is not None:
        bias = one_per_output("lora_matmul", bias, shape_after(a_fn, "lora_matmul", "A", A)[1:], bias_fn)
    return with_units("lora_matmul", lambda *xs: p.bind(*xs, **static), x, {"B": B, "A": A}, bias)


def lora_matmul(
    x: PyTree,
    B: PyTree,
    A: PyTree,
    *,
    alpha: float = 1.0,
    bias: PyTree = None,
    b_fn: Hook = None,
    a_fn: Hook = None,
    bias_fn: Hook = None,
) -> PyTree:
    r"""Marked product with a matrix of low rank, :math:`y = \alpha\, x\, f(B)\, g(A) + h(b)`.

    Parameters
    ----------
    x : array or Quantity, shape ``(in,)`` or ``(batch, in)``
        The input.
    B : array or Quantity, shape ``(in, r)``
        Trained factor on the side of the input (key ``'lora_b'``).
    A : array or Quantity, shape ``(r, out)``
        Trained factor on the side of the output (key ``'lora_a'``).
    alpha : float
        A fixed factor.
    bias : array or Quantity, shape ``(out,)``, optional
        Must be convertible to the unit of the product.
    b_fn, a_fn, bias_fn : callable, optional
        Maps of the raw mantissas, as in :func:`matmul`.

    Returns
    -------
    array or Quantity, shape ``(out,)`` or ``(batch, out)``
        In the product of the units of ``x``, ``B`` and ``A``.

    Raises
    ------
    ValueError
        If ``x`` has a rank other than 1 or 2.
    TypeError
        If an operand is no array, or inner dimensions differ.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> braintrace.lora_matmul(jnp.ones((5, 4)), jnp.ones((4, 1)), jnp.ones((1, 3)), alpha=0.5).shape
    (5, 3)
    """
    array_operand("lora_matmul", "x", x)
    if rank_of(x) not in (1, 2):
        raise ValueError(
            f"lora_matmul: x has shape {tuple(x.shape)}; accepted are (in,) and (batch, in). "
            "Flatten further batch axes, or use braintrace.nn.LoRA."
        )
    return low_rank(x, B, A, alpha=alpha, bias=bias, b_fn=b_fn, a_fn=a_fn, bias_fn=bias_fn)
