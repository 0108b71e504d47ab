"""An operation at every sub-step of a loop, as one operation."""

from __future__ import annotations

import dataclasses
import functools

import jax

from .primitive import Aval, ETPPrimitive, Fixed, Gradients, Input, Params, Rules, Static, Weights

__all__ = ["StackedPrimitive", "stacked"]


class StackedPrimitive(ETPPrimitive):
    """The traced output of an operation at L sub-steps, with the same weights at each.

    Axis 0 of the output and of every operand is the sub-step, but of those at the positions ``shared``.

    Attributes
    ----------
    one : ETPPrimitive
        The operation of one sub-step; it takes the same static parameters.
    """

    def __init__(self, one: ETPPrimitive, shared: frozenset[int]):
        def impl(*operands: jax.Array, **params: Static) -> jax.Array:
            axes = [None if i in shared else 0 for i in range(len(operands))]
            return jax.vmap(lambda *xs: one.outputs(xs, params)[one.y_index], in_axes=axes)(*operands)

        super().__init__(
            one.name, impl, gradient_enabled=one.gradient_enabled, trainables=one.trainables, x_index=one.x_index
        )
        self.one = one
        self.rules = dataclasses.replace(Rules(), pp_x_repr=one.rules.pp_x_repr)

    def x_repr(self, x: jax.Array, weights: Weights) -> jax.Array:
        return jax.vmap(lambda x: self.one.x_repr(x, weights))(x)

    def lift(self, x: Input, weights: Weights, params: Params, fixed: Fixed, y: Aval) -> jax.Array:
        one_y = jax.ShapeDtypeStruct(y.shape[1:], y.dtype)
        return jax.vmap(lambda x, fixed: self.one.lift(x, weights, params, fixed, one_y))(x, dict(fixed))

    def weight_vjp(
        self, x: Input, cotangent: jax.Array, weights: Weights, params: Params, fixed: Fixed, bound: bool = False
    ) -> Gradients:
        return self.summed_vjp(x, cotangent, weights, params, fixed, 0, bound)

    def summed_vjp(
        self, x: Input, cotangent: jax.Array, weights: Weights, params: Params, fixed: Fixed, axes: int, bound: bool
    ) -> Gradients:
        return self.one.summed_vjp(x, cotangent, weights, params, fixed, axes + 1, bound)


@functools.cache
def stacked(one: ETPPrimitive, shared: frozenset[int]) -> StackedPrimitive:
    return StackedPrimitive(one, shared)
