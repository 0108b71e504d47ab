"""Axes along which a value is the same everywhere, whatever the inputs of its program are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from .._jax import ClosedJaxpr, JaxprEqn, Var, call_body, open_jaxpr
from .._program import run_program
from .position_rules import ELEMENTWISE
from .remarks import LOOPS

__all__ = ["steady_axes"]

Axes = frozenset[int]


def steady_axes(closed: ClosedJaxpr, of_inputs: Sequence[Axes] | None = None) -> list[Axes]:
    """Per output, axes that broadcasting made: those of samples, say, of what depends on parameters alone.

    Axes of length one are among them.
    """
    inputs = [_short(v) for v in open_jaxpr(closed).invars] if of_inputs is None else of_inputs
    return [_axes(v) for v in run_program(closed, inputs, _rule)]


def _rule(eqn: JaxprEqn, values: Sequence[Axes | ArrayLike]) -> list[Axes]:
    name, shape, axes = eqn.primitive.name, eqn.outvars[0].aval.shape, [_axes(v) for v in values]
    body = None if name in LOOPS else call_body(eqn)
    if body is not None:
        return steady_axes(body, axes)
    if name in ELEMENTWISE or name == "stop_gradient":
        of_arrays = [a for v, a in zip(eqn.invars, axes) if len(v.aval.shape) == len(shape)]
        return [frozenset(range(len(shape))).intersection(*of_arrays)]
    if name == "broadcast_in_dim":
        dims = eqn.params["broadcast_dimensions"]
        from_shape = eqn.invars[0].aval.shape
        varies = {d for k, d in enumerate(dims) if k not in axes[0] and from_shape[k] == shape[d]}
        return [frozenset(range(len(shape))) - varies]
    return [_short(v) for v in eqn.outvars]


def _short(var: Var) -> Axes:
    return frozenset(k for k, n in enumerate(var.aval.shape) if n == 1)


def _axes(value: Axes | ArrayLike) -> Axes:
    """Of what stands for a variable, or of a constant itself."""
    if isinstance(value, frozenset):
        return value
    value = np.asarray(value)
    return frozenset(k for k, n in enumerate(value.shape) if n and np.all(value == value.take([0], k)))
