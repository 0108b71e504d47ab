r"""Long loops in place: a scan with marked operations inside, as three equations.

For sub-steps :math:`h_\tau = f(h_{\tau-1}, y_\tau)`, :math:`y_\tau = \mathrm{op}(x_\tau, \theta)`,

1. a scan runs the sub-steps and keeps the inputs :math:`x_\tau`; it carries no credit;
2. one marked operation gives the outputs :math:`y_\tau` of all sub-steps from the kept inputs;
3. a second scan takes these outputs instead of computing them, up to the last sub-step, which follows it: there, as
   in any step, the new hidden values are read by what comes after them.

The derivatives of 3. with respect to its start and to :math:`y_\tau` are D and df of the whole loop,
:math:`D = D_L \cdots D_1` and :math:`\mathrm{df}_\tau = D_L \cdots D_{\tau+1}\, \partial f/\partial y_\tau`. What an
operation passes on from its input to its output is a *link* in 3.: zero in value, with the derivative of the operation
with respect to its input. Credit of the current step passes links; D and df do not, as they do not pass an operation.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._jax import (
    Atom,
    ClosedJaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    at_source,
    bind_equation,
    define_primitive,
    eval_jaxpr,
    open_jaxpr,
    scan_operands,
    structs,
)
from .._ops.primitive import ETPPrimitive
from .._ops.stacked import stacked
from .._program import Value, environment, equations_within, read, run, run_program, variables

__all__ = ["Descent", "bind_without_links", "holds_link", "is_link"]


Params = tuple[tuple[str, Any], ...]  # of an equation, as a primitive can have them for a parameter
Maps = tuple[tuple[int | None, ...], ...]  # the axes of the operands that one `vmap` after the other is over


class _Link(Primitive):
    """Zeros like an operation's output, with the operation's derivative with respect to its input."""

    def __init__(self) -> None:
        super().__init__("etp_link")
        define_primitive(self, self._zeros, self._batch, self._jvp)

    def _output(self, operands: Sequence[jax.Array], op: ETPPrimitive, params: Params, maps: Maps) -> jax.Array:
        def of_one(*operands: jax.Array) -> jax.Array:
            return op.outputs(operands, dict(params))[op.y_index]

        function = of_one
        for axes in maps:
            function = jax.vmap(function, in_axes=axes)
        return function(*operands)

    def _zeros(self, *operands: jax.Array, **how: Any) -> jax.Array:
        y = jax.eval_shape(lambda *xs: self._output(xs, **how), *operands)
        return jnp.zeros(y.shape, y.dtype)

    def _jvp(
        self, operands: Sequence[jax.Array], tangents: Sequence[jax.Array], **how: Any
    ) -> tuple[jax.Array, jax.Array]:
        i = how["op"].x_index

        def of_input(x: jax.Array) -> jax.Array:
            return self._output([*operands[:i], x, *operands[i + 1 :]], **how)

        return self.bind(*operands, **how), jax.jvp(of_input, [operands[i]], [tangents[i]])[1]

    def _batch(
        self, operands: Sequence[jax.Array], axes: Sequence[int | None], op: ETPPrimitive, params: Params, maps: Maps
    ) -> tuple[jax.Array, int]:
        return self.bind(*operands, op=op, params=params, maps=(*maps, tuple(axes))), 0


link = _Link()


def is_link(eqn: JaxprEqn) -> bool:
    return eqn.primitive is link


def holds_link(eqn: JaxprEqn) -> bool:
    return is_link(eqn) or any(map(is_link, equations_within(eqn)))


def bind_without_links(eqn: JaxprEqn, values: Sequence[jax.Array]) -> list[jax.Array]:
    """Apply one equation, with zeros instead of links."""
    if is_link(eqn):
        aval = eqn.outvars[0].aval
        return [jnp.zeros(aval.shape, aval.dtype)]
    if eqn.primitive.name != "scan" or not holds_link(eqn):
        return bind_equation(eqn, values)
    body = eqn.params["jaxpr"]

    n, carried = scan_operands(eqn)
    m = n + carried
    rule = lambda *xs: run_program(body, xs, bind_without_links)  # noqa: E731
    closed = jax.make_jaxpr(rule)(*structs(open_jaxpr(body).invars))

    def sub_step(carry: list[jax.Array], xs: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        outs = eval_jaxpr(closed, *values[:n], *carry, *xs)
        return outs[: m - n], outs[m - n :]

    with at_source(eqn):
        carry, ys = jax.lax.scan(
            sub_step, list(values[n:m]), list(values[m:]), eqn.params["length"], eqn.params["reverse"],
            eqn.params["unroll"],
        )  # fmt: skip
    return [*carry, *ys]


def _in(variables: Container[Var], var: Atom) -> bool:
    return not isinstance(var, Literal) and var in variables


def _is_inexact(x: jax.core.ShapedArray) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


class Descent:
    """A forward scan whose body has no calls, and what of it does not change from sub-step to sub-step.

    ``live`` tells which operands of the scan carry credit, ``trained`` which come from parameters alone.
    """

    def __init__(self, eqn: JaxprEqn, body: ClosedJaxpr, live: Sequence[bool], trained: Sequence[bool]):
        self.eqn, self.body = eqn, open_jaxpr(body)
        self.consts, self.carry = scan_operands(eqn)
        self.bound = environment(body)
        self.same = {*self.bound, *self.body.invars[: self.consts]}
        self.live = {v for v, is_live in zip(self.body.invars, live) if is_live}
        self.trained = {v for v, is_trained in zip(self.body.invars[: self.consts], trained) if is_trained}
        self.operations: list[JaxprEqn] = []
        for e in self.body.eqns:
            operands = variables(e.invars)
            if not e.effects and all(v in self.same for v in operands):
                self.same.update(e.outvars)
                if any(v in self.trained for v in operands):
                    self.trained.update(e.outvars)
            elif isinstance(e.primitive, ETPPrimitive):
                self.operations.append(e)
            if isinstance(e.primitive, ETPPrimitive) or any(v in self.live for v in operands):
                self.live.update(v for v in e.outvars if _is_inexact(v.aval))

    def obstacle(self) -> str | None:
        """Why an operation cannot be followed."""
        for e in self.operations:
            for key, i in e.primitive.trainables(e.params).items():
                if not (isinstance(e.invars[i], Literal) or e.invars[i] in self.same):
                    return f"the operand {key!r} of {e.primitive.name} changes from sub-step to sub-step"
        return None

    def outputs(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        """The outputs of the scan."""
        n, m = self.consts, self.consts + self.carry
        start, xs = list(values[n:m]), list(values[m:])
        env = self.bound | dict(zip(self.body.invars, values[:n]))
        self._hoist(env)
        held = {v: jax.lax.stop_gradient(x) for v, x in env.items()}
        wanted = dict.fromkeys(v for e in self.operations for v in self._kept(e))

        def keep(carry: list[jax.Array], xs: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
            seen = held | dict(zip(self.body.invars[n:], [*carry, *xs]))
            self._sub_step(seen, lambda _, e, operands: e.primitive.outputs(operands, e.params))
            return self._carried(seen), [read(seen, v) for v in wanted]

        def follow(
            carry: list[jax.Array], item: tuple[list[jax.Array], list[jax.Array]]
        ) -> tuple[list[jax.Array], list[jax.Array]]:
            xs, ys = item
            seen = env | dict(zip(self.body.invars[n:], [*carry, *xs]))
            self._sub_step(seen, lambda i, e, operands: self._given(e, operands, ys[i]))
            return self._carried(seen), [jnp.asarray(read(seen, v)) for v in self.body.outvars[self.carry :]]

        length, unroll = self.eqn.params["length"], self.eqn.params["unroll"]
        with at_source(self.eqn):
            held_start, held_xs = jax.tree.map(jax.lax.stop_gradient, (start, xs))
            _, kept = jax.lax.scan(keep, held_start, held_xs, length, unroll=unroll)
            stack = dict(zip(wanted, kept))
        ys = [self._at_once(e, env, stack) for e in self.operations]
        with at_source(self.eqn):
            before, last = (jax.tree.map(lambda v, part=part: v[part], (xs, ys)) for part in (slice(-1), -1))
            carry, outs = jax.lax.scan(follow, start, before, length - 1, unroll=unroll)
        carry, emitted = follow(carry, last)
        with at_source(self.eqn):
            return [*carry, *(jnp.concatenate([o, e[None]]) for o, e in zip(outs, emitted))]

    def _hoist(self, env: dict[Var, jax.Array]) -> None:
        """Evaluate before the loop: operations that do not change, and what trained operands are made of."""
        needed = {e.invars[i] for e in self.operations for i in self._shared(e)}
        hoisted = []
        for e in reversed(self.body.eqns):
            is_operation = isinstance(e.primitive, ETPPrimitive)
            if all(v in self.same for v in e.outvars) and (is_operation or any(v in needed for v in e.outvars)):
                needed.update(variables(e.invars))
                hoisted.append(e)
        run(reversed(hoisted), env)

    def _shared(self, e: JaxprEqn) -> frozenset[int]:
        """Positions of the trained operands."""
        return frozenset(i for i in e.primitive.trainables(e.params).values() if _in(self.trained, e.invars[i]))

    def _kept(self, e: JaxprEqn) -> list[Var]:
        shared = self._shared(e)
        return [v for i, v in enumerate(e.invars) if i not in shared and not isinstance(v, Literal)]

    def _at_once(self, e: JaxprEqn, env: Mapping[Var, jax.Array], stack: Mapping[Var, jax.Array]) -> jax.Array:
        """The outputs of one operation at all sub-steps."""
        shared, length = self._shared(e), self.eqn.params["length"]
        operands = [
            read(env, v) if i in shared else jnp.full(length, v.val) if isinstance(v, Literal) else stack[v]
            for i, v in enumerate(e.invars)
        ]
        with at_source(e):
            return stacked(e.primitive, shared).bind(*operands, **e.params)

    def _given(self, e: JaxprEqn, operands: Sequence[jax.Array], y: jax.Array) -> list[jax.Array]:
        """The outputs of an operation whose traced output is known."""
        p = e.primitive
        outs = p.outputs(operands, e.params) if p.multiple_results else [y]
        outs[p.y_index] = y
        if p.x_index is not None and _in(self.live, e.invars[p.x_index]):
            if p.gradient_enabled:
                held = [x if i == p.x_index else jax.lax.stop_gradient(x) for i, x in enumerate(operands)]
                value = p.outputs(held, e.params)[p.y_index]
                outs[p.y_index] = y + value - jax.lax.stop_gradient(value)
            else:
                outs[p.y_index] = y + link.bind(*operands, op=p, params=tuple(e.params.items()), maps=())
        return outs

    def _carried(self, env: Mapping[Var, jax.Array]) -> list[jax.Array]:
        return [read(env, v) for v in self.body.outvars[: self.carry]]

    def _sub_step(
        self, env: dict[Var, jax.Array], operation: Callable[[int, JaxprEqn, list[jax.Array]], list[jax.Array]]
    ) -> None:
        """Run the equations of one sub-step that are not known yet; ``operation`` gives the outputs of operations."""
        number = {id(e): i for i, e in enumerate(self.operations)}

        def rule(e: JaxprEqn, operands: list[Value]) -> list[Value]:
            with at_source(e):
                return operation(number[id(e)], e, operands) if id(e) in number else bind_equation(e, operands)

        run((e for e in self.body.eqns if not e.outvars or any(v not in env for v in e.outvars)), env, rule)
