"""Complex hidden values enter the step as their real and imaginary parts.

A step need not be holomorphic in its states (``h.imag``, ``abs(h)``, a threshold of the real part), so that its
derivative is a real 2 x 2 block per position: the two parts are two hidden variables, as those of a
``HiddenGroupState`` are. Signals and D are then real; df and traces are complex where a parameter is, in JAX's
convention, because every row of them is the reverse pass of a real value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .._jax import Atom, ClosedJaxpr, JaxprEqn, Literal, Var, bind_equation, open_jaxpr, structs
from .._program import Value, environment, made_at, read, run
from .._types import Shape

__all__ = ["Parts", "before_cast", "with_real_parts"]


class Parts(NamedTuple):
    """A complex value as reals: the parts are a last axis, or twice as long a one if there is one already."""

    grouped: bool
    dtype: DTypeLike

    def split(self, value: jax.Array) -> jax.Array:
        parts = [jnp.real(value), jnp.imag(value)]
        return jnp.concatenate(parts, -1) if self.grouped else jnp.stack(parts, -1)

    def join(self, reals: jax.Array) -> jax.Array:
        number = reals.shape[-1] // 2
        real, imag = (reals[..., :number], reals[..., number:]) if self.grouped else (reals[..., 0], reals[..., 1])
        return jax.lax.complex(real, imag)

    def shape(self, shape: Shape) -> Shape:
        """The shape of the value, from that of its reals."""
        return (*shape[:-1], shape[-1] // 2) if self.grouped else shape[:-1]


def with_real_parts(closed: ClosedJaxpr, parts: Mapping[tuple[int, int], Parts]) -> ClosedJaxpr:
    """The program with some inputs and outputs as reals; ``parts`` has their (input, output) numbers.

    Everything that reads one of these outputs within the program reads it by way of its reals.
    """
    jaxpr = open_jaxpr(closed)
    made = made_at(jaxpr.eqns)
    joined_at_entry = {i: p for (i, _), p in parts.items()}
    of_output = {o: (i, p) for (i, o), p in parts.items()}
    roots = {}
    for o, (_, p) in of_output.items():
        root = before_cast(jaxpr.outvars[o], jaxpr.eqns, made)
        if root in made:
            roots[root] = p

    def step(*args: jax.Array) -> list[jax.Array]:
        reals: dict[Var, jax.Array] = {}

        def by_reals(eqn: JaxprEqn, values: list[Value]) -> list[Value]:
            outs = bind_equation(eqn, values)
            for n, v in enumerate(eqn.outvars):
                if v in roots:
                    reals[v] = roots[v].split(outs[n])
                    outs[n] = roots[v].join(reals[v])
            return outs

        joined = [joined_at_entry[i].join(x) if i in joined_at_entry else x for i, x in enumerate(args)]
        env = run(jaxpr.eqns, environment(closed, joined), by_reals)
        outs = []
        for o, v in enumerate(jaxpr.outvars):
            if o not in of_output:
                outs.append(read(env, v))
                continue
            i, p = of_output[o]
            root = before_cast(v, jaxpr.eqns, made)
            if v is jaxpr.invars[i]:
                outs.append(args[i])
            elif root in reals:
                outs.append(reals[root].astype(args[i].dtype))
            else:
                outs.append(p.split(read(env, v)))
        return outs

    inputs = structs(jaxpr.invars)
    for i, p in joined_at_entry.items():
        inputs[i] = jax.eval_shape(p.split, inputs[i])
    return jax.make_jaxpr(step)(*inputs)


def before_cast(var: Atom, eqns: Sequence[JaxprEqn], made: Mapping[Var, int]) -> Atom:
    """The variable that a variable is but for its precision."""
    while not isinstance(var, Literal) and var in made:
        eqn = eqns[made[var]]
        source = eqn.invars[0]
        if eqn.primitive.name not in ("convert_element_type", "reduce_precision") or source not in made:
            break
        kinds = [jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in (var, source)]
        if kinds[0] != kinds[1] or not jnp.issubdtype(source.aval.dtype, jnp.inexact):
            break
        var = source
    return var
