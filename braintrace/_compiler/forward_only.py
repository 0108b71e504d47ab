"""A reverse rule for loops that have none, made of forward-mode columns.

A ``while`` loop can be differentiated in forward mode alone. Where every entry of a result depends on at most one entry
of an input, one forward pass with all-ones tangents of that input gives the whole Jacobian, and transposing it is a
product (and, if entries moved, a scatter). Dependence on several entries is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .._jax import Atom, JaxprEqn, Literal, bind_equation, open_jaxpr, sub_jaxprs
from .labels import Label
from .positions import dependence

__all__ = ["is_forward_only", "with_reverse_rule"]


def is_forward_only(eqn: JaxprEqn) -> bool:
    """Whether an equation is a ``while`` loop or holds one, and computes with real numbers."""
    return _holds_while(eqn) and any(_is_inexact(v) for v in eqn.invars) and any(_is_inexact(v) for v in eqn.outvars)


def _holds_while(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name == "while":
        return True
    loops = eqn.primitive.name in ("scan", "cond")
    return loops and any(_holds_while(e) for body in sub_jaxprs(eqn) for e in open_jaxpr(body).eqns)


def _is_inexact(var: Atom) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.inexact)


def with_reverse_rule(eqn: JaxprEqn) -> Callable[..., list[jax.Array]]:
    """The equation as a function of its inputs with a reverse rule."""
    labels = dependence(eqn)
    active = [i for i, v in enumerate(eqn.invars) if not isinstance(v, Literal) and _is_inexact(v)]
    real = [j for j, v in enumerate(eqn.outvars) if _is_inexact(v)]

    @jax.custom_vjp
    def run(*values: jax.Array) -> list[jax.Array]:
        return bind_equation(eqn, values)

    def forward(*values: jax.Array) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
        return run(*values), values

    def backward(values: tuple[jax.Array, ...], cotangents: Sequence[jax.Array]) -> tuple[jax.Array | None, ...]:
        bars: list[jax.Array | None] = [None] * len(values)
        for n, i in enumerate(active):
            bars[i] = column(n, values, cotangents)
        return tuple(bars)

    def column(n: int, values: tuple[jax.Array, ...], cotangents: Sequence[jax.Array]) -> jax.Array:
        bar = jnp.zeros_like(values[active[n]])
        felt = {
            j: labels[j][active[n]] for j in real if active[n] in labels[j] and np.any(_known(labels[j][active[n]]))
        }
        if not felt:
            return bar

        def of_active(*xs: jax.Array) -> list[jax.Array]:
            filled = list(values)
            for i, x in zip(active, xs):
                filled[i] = x
            outs = bind_equation(eqn, filled)
            return [outs[j] for j in felt]

        primals = [values[i] for i in active]
        tangents = [jnp.ones_like(p) if m == n else jnp.zeros_like(p) for m, p in enumerate(primals)]
        _, slopes = jax.jvp(of_active, primals, tangents)
        for (j, label), slope in zip(felt.items(), slopes):
            bar += _transpose(label, slope * cotangents[j], bar)
        return bar

    run.defvjp(forward, backward)
    return run


def _known(label: Label) -> np.ndarray:
    """Where an entry depends on exactly one."""
    return np.logical_and.reduce([np.asarray(ids) >= 0 for ids in label])


def _transpose(label: Label, product: jax.Array, like: jax.Array) -> jax.Array:
    """Sum the products of all output entries into the input entry that each depends on."""
    known, coordinates = _known(label), [np.asarray(ids) for ids in label[1:]]
    product = jnp.where(known, product, 0)
    grid = np.indices(like.shape)
    if product.shape == like.shape and all(np.all(~known | (c == g)) for c, g in zip(coordinates, grid)):
        return product
    if not coordinates:
        return product.sum()
    index = tuple(np.where(known, c, 0) for c in coordinates)
    return jnp.zeros_like(like).at[index].add(product)
