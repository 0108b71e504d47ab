"""Contractions of an input with a weight, named by letters."""

from __future__ import annotations

import functools
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from .._types import PyTree
from .linear import Hook, apply_hook, array_operand, with_units
from .primitive import Anchors, Aval, Avals, ETPPrimitive, Gradients, Params, Unshared, Weights, anchored

__all__ = ["einsum", "etp_einsum_p"]


class Equation(NamedTuple):
    """Letters of the input, the weight and the output; the first of ``x`` and ``y`` is the batch axis."""

    x: str
    w: str
    y: str

    @property
    def text(self) -> str:
        return f"{self.x},{self.w}->{self.y}"

    @property
    def shared(self) -> str:
        """Output axes along which the weight is used again."""
        return "".join(c for c in self.y[1:] if c not in self.w)


@functools.lru_cache
def parse(equation: str) -> Equation:
    def refuse(why: str) -> NoReturn:
        raise ValueError(
            f"einsum: the equation {equation!r} {why}. Write 'x,w->y' in lower-case letters, such as 'bk,kn->bn', the "
            "first letter of x and y being the batch axis."
        )

    text = equation.replace(" ", "")
    terms, arrow, y = text.partition("->")
    operands = terms.split(",")
    if not arrow or len(operands) != 2:
        refuse("has not two operands and an output")
    x, w = operands
    for term in (x, w, y):
        if not all("a" <= c <= "z" for c in term):
            refuse(f"has the term {term!r}, which is not made of lower-case letters")
        if len(set(term)) != len(term):
            refuse(f"repeats a letter in the term {term!r}")
    if not x or not y or x[0] != y[0] or x[0] in w:
        refuse("has no leading batch letter common to x and y and absent from w")
    if missing := [c for c in y if c not in x + w]:
        refuse(f"has the output letter {missing[0]!r}, which no operand has")
    if missing := [c for c in w if c not in x + y]:
        refuse(f"has the weight letter {missing[0]!r}, which neither x nor y has")
    return Equation(x, w, y)


def _einsum_impl(x: jax.Array, weight: jax.Array, *, equation: str, weight_fn: Hook) -> jax.Array:
    eq = parse(equation)
    # Further leading axes, of time say, are batch axes too.
    more = x.ndim - len(eq.x)
    text = eq.text if more == 0 else f"...{eq.x},{eq.w}->...{eq.y}"
    return jnp.einsum(text, x, apply_hook(weight_fn, weight))


def _unshare(x_aval: Aval, y_aval: Aval, weight_avals: Avals, params: Params) -> Unshared | None:
    del x_aval, weight_avals
    eq = parse(params["equation"])
    if not eq.shared:
        return None
    sizes = dict(zip(eq.y[1:], y_aval.shape))
    repeats = tuple(sizes[c] for c in eq.shared)

    def expand(weights: Weights) -> Gradients:
        w = apply_hook(params["weight_fn"], weights["weight"])
        return {"weight": jnp.broadcast_to(w, (*repeats, *w.shape))}

    def impl(x: jax.Array, unshared: Weights) -> jax.Array:
        return jnp.einsum(f"{eq.x[1:]},{eq.shared}{eq.w}->{eq.y[1:]}", x, unshared["weight"])

    return Unshared(expand, impl)


def _anchors(y_aval: Aval, weight_avals: Avals, params: Params) -> Anchors:
    del y_aval
    eq = parse(params["equation"])
    letters, shape = eq.shared + eq.w, weight_avals["weight"].shape
    if letters.endswith(eq.y[1:]):
        return {"weight": None}
    axes = [letters.index(c) for c in eq.y[1:]]
    return {"weight": tuple(np.arange(shape[i]).reshape(-1, *[1] * (len(shape) - 1 - i)) for i in axes)}


etp_einsum_p = ETPPrimitive("etp_einsum", _einsum_impl, batched=True)
etp_einsum_p.register_etp_rules(unshare=_unshare, anchors=_anchors, snap_anchor=anchored)


def einsum(equation: str, x: PyTree, weight: PyTree, *, weight_fn: Hook = None) -> PyTree:
    r"""Marked contraction ``jnp.einsum(equation, x, f(W))``.

    Parameters
    ----------
    equation : str
        ``'x,w->y'`` in lower-case letters, none twice in a term, such as ``'bk,kn->bn'``. The first letter of x and y
        is the batch axis, which w lacks. Every letter of w must occur in x or y, and every letter of y in x or w. A
        letter of y that w lacks is an axis along which the weight is shared.
    x : array or Quantity
        The input, one axis per letter.
    weight : array or Quantity
        The trained weight, one axis per letter.
    weight_fn : callable, optional
        Map of the raw mantissa, as in :func:`matmul`.

    Returns
    -------
    array or Quantity
        In the unit of ``x`` times that of ``weight``.

    Raises
    ------
    ValueError
        If the equation is of another form, or an operand's rank is not the number of its letters.
    TypeError
        If the equation is no string, or an operand no array.

    Examples
    --------
    One matrix for every position ``t``:

    >>> import braintrace, jax.numpy as jnp
    >>> braintrace.einsum('btk,kn->btn', jnp.ones((5, 7, 2)), jnp.ones((2, 3))).shape
    (5, 7, 3)
    """
    if not isinstance(equation, str):
        raise TypeError(f"einsum: the equation must be a string, got {type(equation).__name__}.")
    eq = parse(equation)
    for name, value, letters in (("x", x, eq.x), ("weight", weight, eq.w)):
        array_operand("einsum", name, value)
        if len(value.shape) != len(letters):
            raise ValueError(
                f"einsum: {name} has shape {tuple(value.shape)}, but the equation {equation!r} gives it the axes "
                f"{letters!r}. Pass one axis per letter."
            )

    def bind(x: jax.Array, weight: jax.Array) -> jax.Array:
        return etp_einsum_p.bind(x, weight, equation=eq.text, weight_fn=weight_fn)

    return with_units("einsum", bind, x, {"weight": weight})
