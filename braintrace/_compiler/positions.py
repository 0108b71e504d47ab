"""Which position of a source does each entry of a variable depend on?

A *label* of a variable for one source holds, for every entry of the variable, the coordinates of the single source
position that it depends on, as one integer array per source axis (and a first one that only tells whether there
is any dependence): ``NONE`` where there is none, ``MANY`` where there are several. Labels follow differentiable
dependence only: integers, booleans and ``stop_gradient`` end them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from .._jax import (
    ClosedJaxpr,
    JaxprEqn,
    Literal,
    Var,
    bind_equation,
    call_body,
    consts_of,
    has_custom_rule,
    is_tracer,
    open_jaxpr,
    scan_operands,
    structs,
)
from .._types import PyTree, Shape
from .labels import MANY, NONE, Label, Labels, mixes, own_label
from .position_rules import ENDS, combine, reduce, rule_for

__all__ = ["dependence", "entry_positions", "moves", "no_cut", "propagate", "transfer"]


def dependence(eqn: JaxprEqn) -> list[dict[int, Label]]:
    """For every output of an equation, its labels with each of the inputs, by number, as a source."""
    inputs: list[Labels] = [
        {("input", i): own_label(v.aval.shape, v.aval.ndim)} if _differentiable(v.aval) else {}
        for i, v in enumerate(eqn.invars)
    ]
    outs = _transfer(eqn, inputs, {}, _How())
    return [
        {i: label for (_, i), label in labels.items() if _differentiable(v.aval)}
        for v, labels in zip(eqn.outvars, outs)
    ]


def propagate(
    eqns: Iterable[JaxprEqn],
    env: dict[Var, Labels],
    outputs_of: Callable[[JaxprEqn, list[Labels]], list[Labels] | None],
    constants: Mapping[Var, ArrayLike] | None = None,
    _how: _How | None = None,
) -> None:
    """Run labels through equations, adding the labels of every output variable to ``env``.

    ``outputs_of(eqn, input_labels)`` may decide the output labels of an equation itself (a cut); ``None`` leaves
    them to the equation's own rule.
    """
    constants, how = constants or {}, _how or _How()
    for eqn in eqns:
        inputs = [{} if isinstance(v, Literal) else env.get(v, {}) for v in eqn.invars]
        outs = outputs_of(eqn, inputs)
        if outs is None:
            outs = _transfer(eqn, inputs, constants, how)
        for var, labels in zip(eqn.outvars, outs):
            if labels and (how.all_values or _differentiable(var.aval)):
                env[var] = {s: lab for s, lab in labels.items() if not np.all(lab[0] == NONE)}


def entry_positions(
    apply: Callable[..., jax.Array], args: tuple[PyTree, ...], y: jax.ShapeDtypeStruct
) -> dict[str, Label | None]:
    """Per weight the entry of the output ``y`` that each of its entries acts on, as the reverse pass tells.

    ``apply(x, weights, ...)`` is an operation, and ``args`` what it takes; ``None`` where nothing is known of a weight.
    """

    def derivative(cotangent: jax.Array, x: PyTree, weights: Mapping[str, jax.Array], *others: PyTree) -> PyTree:
        return jax.vjp(lambda w: apply(x, w, *others), weights)[1](cotangent)[0]

    jaxpr = open_jaxpr(jax.make_jaxpr(derivative)(y, *args))
    env = {jaxpr.invars[0]: {("y", 0): own_label(y.shape, len(y.shape))}}
    propagate(jaxpr.eqns, env, no_cut)
    return {k: env.get(v, {}).get(("y", 0)) for k, v in zip(sorted(args[1]), jaxpr.outvars)}


def transfer(eqn: JaxprEqn, inputs: list[Labels], constants: Mapping[Var, ArrayLike]) -> list[Labels]:
    """Labels of the outputs of one equation."""
    return _transfer(eqn, inputs, constants, _How())


def moves(eqn: JaxprEqn, inputs: list[Labels], constants: Mapping[Var, ArrayLike]) -> list[Labels]:
    """As :func:`transfer`, following each way by which single positions move on its own, without those that mix them.

    So that a sum of a value and its mean, or of a value and its neighbour, still holds the value itself. Sources are
    ``(kind, name, way)`` here; there are as many of one name as there are ways.
    """
    apart = [{(*s[:2], _way(label)): label for s, label in labels.items()} for labels in inputs]
    outs: list[Labels] = []
    for labels in transfer(eqn, apart, constants):
        mixed = {s: functools.reduce(np.logical_or, [ids == MANY for ids in label]) for s, label in labels.items()}
        pure = {s: tuple(np.where(mixed[s], NONE, ids) for ids in label) for s, label in labels.items()}
        outs.append({(*s[:2], _way(label)): label for s, label in list(pure.items())[:_WAYS]})
    return outs


_WAYS = 16  # that are followed from one source to one variable: more of them are no longer a handful of terms


def _way(label: Label) -> int:
    return hash(tuple(ids.tobytes() for ids in label))


class _How(NamedTuple):
    """How deep in derivatives of equations the labels are, and whether they follow values without a derivative too."""

    depth: int = 0
    all_values: bool = False

    def derived(self) -> _How:
        return self._replace(depth=self.depth + 1)


def no_cut(eqn: JaxprEqn, inputs: list[Labels]) -> None:
    del eqn, inputs


def _transfer(eqn: JaxprEqn, inputs: list[Labels], constants: Mapping[Var, ArrayLike], how: _How) -> list[Labels]:
    ends = eqn.primitive.name in ENDS and not how.all_values
    if ends or not any(inputs):
        return [{} for _ in eqn.outvars]
    if eqn.primitive.name in LOOPS:
        return LOOPS[eqn.primitive.name](eqn, inputs, how)
    body = call_body(eqn)
    if body is not None and not (has_custom_rule(eqn) and not how.all_values):
        known = {
            w: constants[v]
            for v, w in zip(eqn.invars, open_jaxpr(body).invars)
            if not isinstance(v, Literal) and v in constants
        }
        return _through(body, inputs, how, known)
    if eqn.primitive.name == "optimization_barrier":
        return [dict(labels) for labels in inputs]
    rule = rule_for(eqn, constants)
    if rule is None:
        return _many_or_derived(eqn, inputs, how)
    sources = dict.fromkeys(s for labels in inputs for s in labels)
    out_shapes = [v.aval.shape for v in eqn.outvars]
    outs: list[Labels] = [{} for _ in eqn.outvars]
    for s in sources:
        labels = [lab.get(s) for lab in inputs]
        axes = max(len(lab) for lab in labels if lab is not None)
        columns = [rule([None if lab is None else lab[k] for lab in labels], out_shapes) for k in range(axes)]
        for i in range(len(outs)):
            outs[i][s] = tuple(column[i] for column in columns)
    return outs


def _through(
    body: ClosedJaxpr, inputs: list[Labels], how: _How, known: dict[Var, ArrayLike] | None = None
) -> list[Labels]:
    """Labels of the outputs of a body."""
    inner = open_jaxpr(body)
    env = {v: dict(labels) for v, labels in zip(inner.invars, inputs)}
    known = (known or {}) | {v: c for v, c in zip(inner.constvars, consts_of(body)) if not is_tracer(c)}
    propagate(inner.eqns, env, no_cut, known, how)
    return [{} if isinstance(v, Literal) else env.get(v, {}) for v in inner.outvars]


def _join(a: Labels, b: Labels) -> Labels:
    return {s: tuple(map(combine, a[s], b[s])) if s in a and s in b else a.get(s, b.get(s, ())) for s in {**a, **b}}


def _equal(a: Labels, b: Labels) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(x, y) for s in a for x, y in zip(a[s], b[s]))


def _settled(step: Callable[[list[Labels]], list[Labels]], carry: list[Labels]) -> list[Labels]:
    """The labels of a loop's carry before any of its sub-steps, whichever it is."""
    while True:
        new = [_join(a, b) for a, b in zip(carry, step(carry))]
        if all(map(_equal, carry, new)):
            return carry
        carry = new


def _through_while(eqn: JaxprEqn, inputs: list[Labels], how: _How) -> list[Labels]:
    skipped, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    fixed, carry = inputs[skipped : skipped + consts], inputs[skipped + consts :]
    return _settled(lambda carry: _through(eqn.params["body_jaxpr"], [*fixed, *carry], how), carry)


def _through_scan(eqn: JaxprEqn, inputs: list[Labels], how: _How) -> list[Labels]:
    n, carried = scan_operands(eqn)
    m = n + carried
    fixed, carry, xs = inputs[:n], inputs[n:m], inputs[m:]
    # A slice of a scanned operand depends on what any of its slices depends on.
    now = [{s: tuple(reduce(ids, (0,)) for ids in label) for s, label in labels.items()} for labels in xs]
    step = lambda carry: _through(eqn.params["jaxpr"], [*fixed, *carry, *now], how)  # noqa: E731
    carry = _settled(lambda carry: step(carry)[: m - n], carry)
    outs = step(carry)
    shapes = [v.aval.shape for v in eqn.outvars[m - n :]]
    ys = [
        {s: tuple(np.broadcast_to(ids, shape) for ids in label) for s, label in labels.items()}
        for labels, shape in zip(outs[m - n :], shapes)
    ]
    return [*(carry if eqn.params["length"] == 0 else outs[: m - n]), *ys]


def _through_cond(eqn: JaxprEqn, inputs: list[Labels], how: _How) -> list[Labels]:
    branches = [_through(body, inputs[1:], how) for body in eqn.params["branches"]]
    return [functools.reduce(_join, labels) for labels in zip(*branches)]


LOOPS = {"while": _through_while, "scan": _through_scan, "cond": _through_cond}


def _many_or_derived(eqn: JaxprEqn, inputs: list[Labels], how: _How) -> list[Labels]:
    """An equation without a rule: look at its derivative, which is made of simpler equations.

    Forward mode does not see into a function that has a reverse rule alone. Where neither derivative tells, what its
    body reads does.
    """
    ways = (_by_vjp, _by_jvp, _by_value) if has_custom_rule(eqn) else (_by_jvp, _by_vjp)
    # The derivative of a linear primitive is made of that primitive again.
    if how.depth == 0 or (has_custom_rule(eqn) and how.depth < 8):
        for derive in ways:
            try:
                return derive(eqn, inputs, how.derived())
            except Exception:  # no such derivative: try the next way, else the safe answer below
                continue
    sources = {s: len(lab) for labels in inputs for s, lab in labels.items()}
    return [{s: _many(v.aval.shape, n) for s, n in sources.items()} for v in eqn.outvars]


def _many(shape: Shape, axes: int) -> Label:
    return (np.zeros(shape, np.int32), *(np.full(shape, MANY, np.int32) for _ in range(axes - 1)))


def _differentiable(aval: jax.core.ShapedArray) -> bool:
    return jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact)


def _by_value(eqn: JaxprEqn, inputs: list[Labels], how: _How) -> list[Labels]:
    return _through(call_body(eqn), inputs, how._replace(all_values=True))


def _by_jvp(eqn: JaxprEqn, inputs: list[Labels], how: _How) -> list[Labels]:
    active = [i for i, labels in enumerate(inputs) if labels and _differentiable(eqn.invars[i].aval)]

    def jvp(primals: Sequence[jax.Array], tangents: Sequence[jax.Array]) -> list[jax.Array]:
        def f(*xs: jax.Array) -> list[jax.Array]:
            values = list(primals)
            for i, x in zip(active, xs):
                values[i] = x
            return bind_equation(eqn, values)

        return jax.jvp(f, [primals[i] for i in active], tangents)[1]

    jaxpr = open_jaxpr(jax.make_jaxpr(jvp)(structs(eqn.invars), structs([eqn.invars[i] for i in active])))
    env = {v: inputs[i] for i, v in zip(active, jaxpr.invars[len(eqn.invars) :])}
    propagate(jaxpr.eqns, env, no_cut, None, how)
    return [{} if isinstance(v, Literal) else env.get(v, {}) for v in jaxpr.outvars]


def _by_vjp(eqn: JaxprEqn, inputs: list[Labels], how: _How) -> list[Labels]:
    """By the reverse rule: where each cotangent of an input has a single origin, the output entry there reads it."""
    active = [i for i, labels in enumerate(inputs) if labels and _differentiable(eqn.invars[i].aval)]
    outs = [k for k, v in enumerate(eqn.outvars) if _differentiable(v.aval)]

    def vjp(primals: Sequence[jax.Array], cotangents: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        def f(*xs: jax.Array) -> list[jax.Array]:
            values = list(primals)
            for i, x in zip(active, xs):
                values[i] = x
            found = bind_equation(eqn, values)
            return [found[k] for k in outs]

        return jax.vjp(f, *[primals[i] for i in active])[1](cotangents)

    jaxpr = open_jaxpr(jax.make_jaxpr(vjp)(structs(eqn.invars), structs([eqn.outvars[k] for k in outs])))
    env: dict[Var, Labels] = {
        v: {("output", j): own_label(v.aval.shape, len(v.aval.shape))}
        for j, v in zip(outs, jaxpr.invars[len(eqn.invars) :])
    }
    propagate(jaxpr.eqns, env, no_cut, None, how)
    result: list[Labels] = [{} for _ in eqn.outvars]
    for i, cotangent in zip(active, jaxpr.outvars):
        for (_, k), origin in ({} if isinstance(cotangent, Literal) else env.get(cotangent, {})).items():
            if mixes(origin):
                raise ValueError("mixes positions")
            shape = eqn.outvars[k].aval.shape
            read = {s: tuple(_sent(ids, origin, shape) for ids in label) for s, label in inputs[i].items()}
            result[k] = _join(result[k], read)
    return result


def _sent(ids: np.ndarray, origin: Label, shape: Shape) -> np.ndarray:
    """The integers of an input at the output entries that ``origin`` names for them."""
    there = (origin[0] != NONE) & (ids != NONE)
    at, big = tuple(axis[there] for axis in origin[1:]), np.iinfo(np.int32).max
    low, top = np.full(shape, big, np.int32), np.full(shape, NONE, np.int32)
    np.minimum.at(low, at, ids[there])
    np.maximum.at(top, at, ids[there])
    return np.where(low == big, NONE, np.where(low == top, top, MANY)).astype(np.int32)
