"""How the cotangents of a step's result reach the parameters, in an ordinary JAX program."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ._jax import any_dtype, refuses
from ._types import PyTree

__all__ = ["NO_WINDOW", "credit", "no_window_gradient", "reverse_only", "with_cotangent"]


@jax.custom_vjp
def reverse_only(x: jax.Array) -> jax.Array:
    """Identity without forward mode: traces are constants, so that forward and reverse mode would disagree."""
    return x


reverse_only.defvjp(lambda x: (x, None), lambda _, bar: (bar,))


@jax.custom_vjp
def with_cotangent(result: PyTree, scalar: jax.Array) -> PyTree:
    """``result``; where it is differentiated, ``scalar`` is too, as if it were added to the loss."""
    del scalar
    return result


with_cotangent.defvjp(lambda result, scalar: (result, scalar), lambda scalar, bar: (bar, jnp.ones_like(scalar)))


NO_WINDOW = (
    "A single-step learner has no gradient of a window. Make the learner with vjp_method='multi-step', or "
    "differentiate step by step."
)


no_window_gradient = refuses(NO_WINDOW)


def credit(
    reverse: Callable[[PyTree, PyTree], PyTree],
    zeros: PyTree,
    lifted: PyTree,
    held: tuple[PyTree, ...],
    weights: PyTree,
) -> PyTree:
    """``zeros``, whose cotangents ``bars`` reach the arrays ``lifted`` as ``reverse(held, bars)``.

    ``held`` begins with the traces. ``weights``: parameters in which this has no second derivative.
    """

    shapes, like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (zeros, lifted))

    @jax.custom_vjp
    def zeros_of(lifted: PyTree, held: tuple[PyTree, ...], weights: PyTree) -> PyTree:
        del weights
        # Under jax.vmap the zeros must be mapped like what they stand for, or the signals of all samples were summed.
        leaves = jax.tree.leaves((lifted, held[0]))
        found = [x for x in leaves if x.size and jnp.issubdtype(x.dtype, jnp.inexact)]
        mapped = sum(x[(0,) * x.ndim].astype(jnp.float32) for x in found)
        return jax.tree.map(
            lambda z: jnp.where(False, jnp.broadcast_to(mapped, z.shape).astype(z.dtype), jnp.zeros(z.shape, z.dtype)),
            shapes,
        )

    def forward(
        lifted: PyTree, held: tuple[PyTree, ...], weights: PyTree
    ) -> tuple[PyTree, tuple[tuple[PyTree, ...], PyTree]]:
        return zeros_of(lifted, held, weights), (held, jax.tree.map(_first_order, weights))

    @any_dtype
    def backward(residuals: tuple[tuple[PyTree, ...], PyTree], bars: PyTree) -> tuple[PyTree, None, None]:
        return _filled(reverse(residuals[0], bars), like), None, None

    zeros_of.defvjp(forward, backward)
    return zeros_of(lifted, held, weights)


def _filled(tree: PyTree, like: PyTree) -> PyTree:
    """``tree`` in the dtypes of ``like``, with zeros in the place of ``None``."""
    if isinstance(like, (jax.Array, jax.ShapeDtypeStruct)):
        return jnp.zeros(like.shape, like.dtype) if tree is None else tree.astype(like.dtype)
    children, structure = jax.tree.flatten(like, is_leaf=lambda x: x is not like)
    given = [None] * len(children) if tree is None else jax.tree.leaves(tree, is_leaf=lambda x: x is not tree)
    return jax.tree.unflatten(structure, [_filled(t, c) for t, c in zip(given, children)])


# Traces are constants, so what they give has no second derivative.
_first_order = refuses(
    "An online gradient has no second derivatives with respect to parameters. Use vjp_method='multi-step', which "
    "differentiates a step or window as it is, or take the gradient outside of what is differentiated. The "
    "step_fn of etrace_grad is such a function: to take gradients and train within a step, use etrace_evolve or a loop."
)
