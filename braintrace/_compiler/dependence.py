"""What the gradient of each trained operand of an operation reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from .._jax import Atom, ClosedJaxpr, JaxprEqn, Literal, Var, call_body, open_jaxpr, reads, scan_operands, struct
from .._ops.primitive import ETPPrimitive
from .._types import PyTree

__all__ = ["Dependence", "dependence"]

_PRODUCTS = frozenset({"mul", "dot_general", "conv_general_dilated"})
_LINEAR = frozenset({
    "add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "cumsum", "dynamic_slice",
    "expand_dims", "gather", "neg", "pad", "reduce_sum", "reshape", "rev", "scatter-add", "select_n", "slice",
    "squeeze", "sub", "transpose",
})  # fmt: skip
# The operands that are moved, not the indices and conditions that say where.
_DATA = {"gather": slice(1), "dynamic_slice": slice(1), "scatter-add": slice(0, 3, 2), "select_n": slice(1, None)}


class Dependence(NamedTuple):
    """Trained keys by what their gradient reads.

    Attributes
    ----------
    offset : tuple of str
        It does not depend on the input (a bias).
    affine : tuple of str
        It depends on the input, and is not known to vanish with it (``w`` of ``(x + 1) @ w``).
    linear : tuple of str
        It does not depend on the trained operands.
    fixed : tuple of int
        Positions of the operands that are neither trained nor the input on which some of them depend.
    """

    offset: tuple[str, ...]
    affine: tuple[str, ...]
    linear: tuple[str, ...]
    fixed: tuple[int, ...]


def dependence(
    primitive: ETPPrimitive,
    params: Mapping[str, Any],
    x: Atom | None,
    y: Var,
    trained: Mapping[str, Var],
    fixed: Mapping[int, Atom],
) -> Dependence:
    """Read it off the gradient's program; arguments are variables, trained ones by key and fixed ones by position."""
    weights = {k: struct(v) for k, v in trained.items()}
    operands = {i: struct(v) for i, v in fixed.items()}

    def program(x: PyTree, bound: bool) -> ClosedJaxpr:
        def gradient(
            x: PyTree, weights: dict[str, jax.Array], fixed: dict[int, jax.Array], cotangent: jax.Array
        ) -> dict[str, jax.Array]:
            return primitive.weight_vjp(x, cotangent, weights, params, fixed, bound)

        return jax.make_jaxpr(gradient)(x, weights, operands, struct(y))

    keys, inputs = sorted(weights), None if x is None else struct(x)
    closed, lead = program(inputs, True), int(x is not None)
    read = {key: reads(closed, [j == i for j in range(len(keys))]) for i, key in enumerate(keys)}
    offset = tuple(k for k in keys if not any(read[k][:lead]))
    linear = tuple(k for k in keys if not any(read[k][lead:][: len(keys)]))
    read_fixed = tuple(i for j, i in enumerate(sorted(operands)) if any(r[lead + len(keys) + j] for r in read.values()))
    affine: tuple[str, ...] = ()
    if x is not None:
        if primitive.rules.pp_x_repr is not None:
            slots = primitive.trainables(params)
            untrained = {k: operands[i] for k, i in slots.items() if i in operands}
            closed = program(jax.eval_shape(primitive.x_repr, inputs, weights | untrained), False)
        vanish = _vanishes(closed, [True] + [False] * (len(open_jaxpr(closed).invars) - 1))
        affine = tuple(k for k, zero in zip(keys, vanish) if not zero and k not in offset)
    return Dependence(offset, affine, linear, read_fixed)


def _vanishes(closed: ClosedJaxpr, inputs: Sequence[bool]) -> list[bool]:
    """Which outputs are known to be zero where the marked inputs are."""
    jaxpr = open_jaxpr(closed)
    zeros = {v for v, zero in zip(jaxpr.invars, inputs) if zero}

    def is_zero(v: Atom) -> bool:
        return np.ndim(v.val) == 0 and v.val == 0 if isinstance(v, Literal) else v in zeros

    for eqn in jaxpr.eqns:
        zeros.update(v for v, zero in zip(eqn.outvars, _outputs(eqn, [is_zero(v) for v in eqn.invars])) if zero)
    return [is_zero(v) for v in jaxpr.outvars]


def _outputs(eqn: JaxprEqn, inputs: list[bool]) -> list[bool]:
    name, body = eqn.primitive.name, call_body(eqn)
    if name == "scan":
        consts, number = scan_operands(eqn)
        carried = slice(consts, consts + number)
        after = _vanishes(eqn.params["jaxpr"], inputs)
        stays = after[:number]
        if stays != inputs[carried]:
            inputs[carried] = [a and b for a, b in zip(inputs[carried], stays)]
            return _outputs(eqn, inputs)
        return after
    if body is not None:
        return _vanishes(body, inputs)
    data = inputs[_DATA.get(name, slice(None))]
    if name in _PRODUCTS:
        zero = any(inputs)
    elif name == "div":
        zero = inputs[0]
    else:
        zero = name in _LINEAR and all(data)
    return [zero] * len(eqn.outvars)
