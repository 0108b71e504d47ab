"""Values that are parts of what a hidden state stores are read from it, like the state itself.

``h.value = h_new.reshape(shape); return f(h_new)`` and ``s.value = jnp.stack([v, w], -1); return f(v)`` say the same as
``return f(h.value...)``: an output reads the new hidden value, and its signal has to meet the trace there.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .._jax import (
    Atom,
    ClosedJaxpr,
    JaxprEqn,
    Literal,
    Var,
    bind_equation,
    consts_of,
    is_tracer,
    open_jaxpr,
    structs,
)
from .._program import before, environment, made_at, read
from .._types import Shape
from .complex_states import before_cast
from .frame import is_marked
from .movement import MOVES

__all__ = ["read_from_stored"]


class _Part(NamedTuple):
    """``value`` takes it out of ``whole``, which the equations with the numbers ``makers`` lead to."""

    whole: Var
    value: Callable[[jax.Array], jax.Array]
    makers: Collection[int]


def read_from_stored(closed: ClosedJaxpr, hidden: Mapping[int, int]) -> ClosedJaxpr:
    """The same program; outputs, and operations that lead to other groups, read the parts of stored values from there.

    ``hidden`` has the number of the output of every hidden value, by that of its input. A value whose past is in
    another state is read where it is: its trace is that of the other state.
    """
    jaxpr = open_jaxpr(closed)
    eqns, made = jaxpr.eqns, made_at(jaxpr.eqns)
    wholes = {i: before_cast(jaxpr.outvars[o], eqns, made) for i, o in hidden.items()}
    constants = {v: c for v, c in zip(jaxpr.constvars, consts_of(closed)) if not is_tracer(c)}
    parts: dict[Var, _Part] = {}
    olds = {jaxpr.invars[i] for i in hidden}
    for i, whole in wholes.items():
        found = [
            (part, value)
            for part, value in _parts(whole, eqns, made, constants)
            if olds.intersection(_within(eqns, made, [part])) == {jaxpr.invars[i]}
        ]
        makers = {made[v] for v in before(eqns, made, [whole]) if v in made} if found else set()
        for part, value in found:
            parts.setdefault(part, _Part(whole, value, makers))
    if not parts:
        return closed
    transitions = {made[v] for v in _within(eqns, made, wholes.values()) if v in made and not is_marked(eqns[made[v]])}

    def source(var: Atom, reader: int | None) -> Atom | _Part:
        part = None if isinstance(var, Literal) or reader in transitions else parts.get(var)
        return var if part is None or reader in part.makers else part

    of_equations = [[source(v, n) for v in e.invars] for n, e in enumerate(eqns)]
    of_outputs = [v if o in hidden.values() else source(v, None) for o, v in enumerate(jaxpr.outvars)]
    order = _order(eqns, of_equations, {*jaxpr.invars, *jaxpr.constvars})
    if order is None:
        return closed

    def step(*args: jax.Array) -> list[jax.Array]:
        env = environment(closed, args)

        def value(source: Atom | _Part) -> jax.Array:
            return source.value(env[source.whole]) if isinstance(source, _Part) else read(env, source)

        for n in order:
            env.update(zip(eqns[n].outvars, bind_equation(eqns[n], list(map(value, of_equations[n])))))
        return list(map(value, of_outputs))

    return jax.make_jaxpr(step)(*structs(jaxpr.invars))


def _within(eqns: Sequence[JaxprEqn], made: Mapping[Var, int], ends: Iterable[Atom]) -> set[Var]:
    """What leads to some values without a marked operation between."""
    return set(before(eqns, made, ends, lambda v: v not in made or not is_marked(eqns[made[v]])))


def _parts(
    whole: Atom, eqns: Sequence[JaxprEqn], made: Mapping[Var, int], constants: Mapping[Var, ArrayLike]
) -> Iterator[tuple[Var, Callable[[jax.Array], jax.Array]]]:
    """The variables that a stored value is made of by moving entries alone, and how each is had from it."""
    if isinstance(whole, Literal) or whole not in made:
        return
    pending: list[tuple[Var, Callable[[jax.Array], jax.Array]]] = [(whole, lambda x: x)]
    while pending:
        var, of_whole = pending.pop()
        for source, back in _taken_apart(eqns[made[var]], constants):
            if isinstance(source, Var) and source in made and jnp.issubdtype(source.aval.dtype, jnp.inexact):
                value = lambda x, of_whole=of_whole, back=back: back(of_whole(x))  # noqa: E731
                pending.append((source, value))
                yield source, value


def _taken_apart(
    eqn: JaxprEqn, constants: Mapping[Var, ArrayLike]
) -> list[tuple[Atom, Callable[[jax.Array], jax.Array]]]:
    """Operands of an equation that only moves entries, and how each is had from its result."""
    name, params = eqn.primitive.name, eqn.params
    shapes = [v.aval.shape for v in eqn.invars]
    found: list[Callable[[jax.Array], jax.Array]] = []
    if name == "concatenate":
        axis = params["dimension"]
        ends = np.cumsum([0, *(shape[axis] for shape in shapes)])
        found = [functools.partial(_cut, a, b, axis) for a, b in itertools.pairwise(ends)]
    elif name == "stack":
        found = [functools.partial(_entry, i, params["axis"]) for i in range(len(shapes))]
    elif name == "scatter" and eqn.invars[1] in constants:  # of the `set_value` of a HiddenTreeState
        numbers = np.arange(1, 1 + math.prod(shapes[2])).reshape(shapes[2])
        index = np.asarray(constants[eqn.invars[1]])
        landed = np.ravel(MOVES["scatter"](np.zeros(shapes[0], int), index, numbers, **params))
        if np.array_equal(np.sort(landed[landed > 0]), numbers.ravel()):
            found = [functools.partial(_gathered, np.argsort(landed)[-numbers.size :], shapes[2])]
            return list(zip(eqn.invars[2:], found))
    elif name == "transpose":
        back = tuple(np.argsort(params["permutation"]))
        found = [lambda x: jax.lax.transpose(x, back)]
    elif name in ("reshape", "squeeze", "expand_dims", "broadcast_in_dim") and len(shapes) == 1:
        if math.prod(shapes[0]) == math.prod(eqn.outvars[0].aval.shape):
            found = [lambda x: x.reshape(shapes[0])]
    return list(zip(eqn.invars, found))


def _cut(start: int, end: int, axis: int, x: jax.Array) -> jax.Array:
    return jax.lax.slice_in_dim(x, start, end, axis=axis)


def _entry(index: int, axis: int, x: jax.Array) -> jax.Array:
    return jax.lax.index_in_dim(x, index, axis, keepdims=False)


def _gathered(at: np.ndarray, shape: Shape, x: jax.Array) -> jax.Array:
    flat = x.reshape(-1)
    if np.array_equal(at, np.arange(x.size)):
        return flat.reshape(shape)
    entries = jax.lax.GatherDimensionNumbers(offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,))
    return jax.lax.gather(flat, at[:, None], entries, (1,), mode="promise_in_bounds").reshape(shape)


def _order(
    eqns: Sequence[JaxprEqn], sources: Sequence[Sequence[Atom | _Part]], known: Collection[Var]
) -> list[int] | None:
    """The equations in an order in which every source is there.

    ``None`` if parts of two wholes need each other, or side effects would come in another order.
    """
    there: set[Var] = set(known)
    order: list[int] = []
    pending = list(range(len(eqns)))
    needs = [{s.whole if isinstance(s, _Part) else s for s in of if not isinstance(s, Literal)} for of in sources]
    while pending:
        later = []
        for n in pending:
            if needs[n] <= there:
                order.append(n)
                there.update(eqns[n].outvars)
            else:
                later.append(n)
        if len(later) == len(pending):
            return None
        pending = later
    with_effects = [n for n in order if eqns[n].effects]
    return order if with_effects == sorted(with_effects) else None
