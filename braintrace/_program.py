"""A jaxpr as a program: run with a rule per equation, and read from its inputs on or from its outputs back.

Everything that goes through the equations of a jaxpr does it by these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from ._jax import Atom, ClosedJaxpr, JaxprEqn, Literal, Var, bind_equation, consts_of, open_jaxpr, structs, sub_jaxprs

__all__ = [
    "Value", "before", "behind", "environment", "equations_within", "made_at", "outputs", "read", "run",
    "run_program", "sub_program", "variables",
]  # fmt: skip

Value: TypeAlias = Any  # what stands for a variable: an array or a number, or what a rule makes of them
Rule = Callable[[JaxprEqn, list[Value]], Sequence[Value]]  # (equation, values of its operands) -> values of its outputs


def read(env: Mapping[Var, Value], var: Atom) -> Value:
    return var.val if isinstance(var, Literal) else env[var]


def variables(operands: Iterable[Atom]) -> list[Var]:
    """Those that are no literals."""
    return [v for v in operands if not isinstance(v, Literal)]


def environment(closed: ClosedJaxpr, args: Sequence[Value] = ()) -> dict[Var, Value]:
    """Values of a closed jaxpr's constants and inputs, by variable."""
    jaxpr = open_jaxpr(closed)
    return dict(zip(jaxpr.constvars, consts_of(closed))) | dict(zip(jaxpr.invars, args))


def run(eqns: Iterable[JaxprEqn], env: dict[Var, Value], rule: Rule = bind_equation) -> dict[Var, Value]:
    """Evaluate equations in order, into ``env``."""
    for eqn in eqns:
        env.update(zip(eqn.outvars, rule(eqn, [read(env, v) for v in eqn.invars])))
    return env


def outputs(closed: ClosedJaxpr, env: Mapping[Var, Value]) -> list[Value]:
    return [read(env, v) for v in open_jaxpr(closed).outvars]


def run_program(closed: ClosedJaxpr, args: Sequence[Value], rule: Rule = bind_equation) -> list[Value]:
    """Evaluate a closed jaxpr."""
    return outputs(closed, run(open_jaxpr(closed).eqns, environment(closed, args), rule))


def sub_program(
    closed: ClosedJaxpr, invars: Sequence[Var], outvars: Sequence[Var], eqns: Sequence[JaxprEqn]
) -> ClosedJaxpr:
    """A closed jaxpr that runs some equations of another one; what it reads beside its inputs must be a constant."""

    def of_values(*values: jax.Array) -> list[jax.Array]:
        env = run(eqns, environment(closed) | dict(zip(invars, values)))
        return [env[v] for v in outvars]

    return jax.make_jaxpr(of_values)(*structs(invars))


# -- reading


def made_at(eqns: Sequence[JaxprEqn]) -> dict[Var, int]:
    """Variable -> number of the equation that makes it."""
    return {v: i for i, e in enumerate(eqns) for v in e.outvars}


def behind(eqns: Sequence[JaxprEqn], ends: Iterable[Atom]) -> tuple[list[JaxprEqn], set[Var]]:
    """The equations that lead to some variables, in order, and every variable on the way, ends included."""
    needed = set(variables(ends))
    found = []
    for eqn in reversed(eqns):
        if not needed.isdisjoint(eqn.outvars):
            needed.update(variables(eqn.invars))
            found.append(eqn)
    return found[::-1], needed


def before(
    eqns: Sequence[JaxprEqn],
    made: Mapping[Var, int],
    ends: Iterable[Atom],
    enters: Callable[[Var], bool] = lambda v: True,
) -> Iterator[Var]:
    """Every variable that some variables are computed from, these included.

    What lies behind a variable is looked at if ``enters`` says so, and an equation makes it.
    """
    seen, pending = set(), variables(ends)
    while pending:
        var = pending.pop()
        if var in seen:
            continue
        seen.add(var)
        yield var
        if enters(var) and var in made:
            pending.extend(variables(eqns[made[var]].invars))


def equations_within(eqn: JaxprEqn) -> Iterator[JaxprEqn]:
    """Every equation in the bodies of an equation, at any depth."""
    for body in sub_jaxprs(eqn):
        for inner in open_jaxpr(body).eqns:
            yield inner
            yield from equations_within(inner)
