"""How the operands of an operation are computed from the parameters of the model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import jax

from .._jax import Atom, ClosedJaxpr, Literal, Var, eval_jaxpr, hashed
from .._ops.primitive import ETPPrimitive
from .._program import before, made_at, sub_program, variables
from .._types import Path, PyTree
from .dependence import Dependence, dependence
from .flow import Flow, MarkedOp
from .module_info import ModuleInfo

__all__ = ["OperandProgram", "OperandsOf", "Step", "operand_program", "program_of_operands"]


class Step:
    """A step, and what is asked about its variables and operations again and again."""

    def __init__(self, info: ModuleInfo, flow: Flow):
        self.info, self.flow = info, flow
        jaxpr = info.jaxpr
        self.number = {v: i for i, v in enumerate(jaxpr.invars)}
        self.changing = info.changing
        self.made_at = made_at(jaxpr.eqns)
        self.outputs = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
        self.op_positions = {op.position for op in flow.ops}
        self.readers: dict[Var, list[int]] = {}
        for i, eqn in enumerate(jaxpr.eqns):
            for v in variables(eqn.invars):
                self.readers.setdefault(v, []).append(i)
        self._dependence: dict[Hashable, Dependence] = {}
        self._programs: dict[int, OperandsOf] = {}

    def operand_program(self, op: MarkedOp) -> OperandsOf:
        """:func:`operand_program`, found once."""
        if op.index not in self._programs:
            self._programs[op.index] = program_of_operands(self, op)
        return self._programs[op.index]

    def dependence(
        self, op: MarkedOp, primitive: ETPPrimitive, trained: Mapping[str, Var], fixed: Mapping[int, Atom]
    ) -> Dependence:
        """:func:`dependence` of an operation, found once for all that differ in nothing it asks about."""
        arguments = primitive, op.eqn.params, op.x, op.y, trained, fixed
        shape_of = lambda v: None if v is None else (v.aval.shape, v.aval.dtype)  # noqa: E731
        operands = tuple((k, shape_of(v)) for k, v in (*trained.items(), *fixed.items()))
        params = tuple(op.eqn.params.items())
        key = hashed(primitive, primitive.rules, params, shape_of(op.x), shape_of(op.y), operands)
        if key is None:
            return dependence(*arguments)
        if key not in self._dependence:
            self._dependence[key] = dependence(*arguments)
        return self._dependence[key]


class OperandsOf(NamedTuple):
    """The operands of an operation that come from parameters."""

    program: OperandProgram | None  # the trained ones from the step's inputs, where there are some
    paths: dict[str, Path]  # the first parameter of each
    blocked: dict[str, Path]  # of those that are not trained: what another operation gave is part of them


class OperandProgram(NamedTuple):
    """What happens to parameters before they enter an operation (a mask, a sign, a sum of two).

    ``program`` maps step inputs to the trained operands; ``leaves`` are the parameter leaves among its inputs.
    """

    keys: tuple[str, ...]
    program: ClosedJaxpr | None
    inputs: tuple[int, ...]  # positions among the inputs of the step
    leaves: tuple[int, ...]  # those of them that are parameter leaves
    identity: tuple[int, ...] | None  # positions of the operands, if they are step inputs as they are

    def operands(self, invals: Sequence[PyTree]) -> dict[str, jax.Array]:
        if self.identity is not None:
            return {k: invals[i] for k, i in zip(self.keys, self.identity)}
        return dict(zip(self.keys, eval_jaxpr(self.program, *[invals[i] for i in self.inputs])))

    def pull_back(self, invals: Sequence[PyTree], gradients: dict[str, jax.Array]) -> dict[int, jax.Array]:
        """Gradients of the operands -> gradients of the parameter leaves, by position in the step's inputs."""
        if self.identity is not None:
            out: dict[int, jax.Array] = {}
            for k, i in zip(self.keys, self.identity):
                out[i] = out[i] + gradients[k] if i in out else gradients[k]
            return out

        def run(leaves: Sequence[jax.Array]) -> list[jax.Array]:
            values = dict(zip(self.leaves, leaves))
            args = [values.get(i, invals[i]) for i in self.inputs]
            return eval_jaxpr(self.program, *args)

        outs, pull = jax.vjp(run, [invals[i] for i in self.leaves])
        (bars,) = pull([gradients[k].astype(o.dtype) for k, o in zip(self.keys, outs)])
        return dict(zip(self.leaves, bars))


def operand_program(info: ModuleInfo, flow: Flow, op: MarkedOp) -> OperandsOf:
    """The operands of an operation that come from parameters, and how."""
    return Step(info, flow).operand_program(op)


def program_of_operands(step: Step, op: MarkedOp) -> OperandsOf:
    info, jaxpr, number, made = step.info, step.info.jaxpr, step.number, step.made_at
    paths: dict[str, Path] = {}
    blocked: dict[str, Path] = {}
    needed: set[int] = set()
    leaves: set[Var] = set()
    variables: dict[str, Var] = {}
    for key, var in op.operands.items():
        if isinstance(var, Literal):
            continue
        path = list(before(jaxpr.eqns, made, [var], lambda v: made.get(v) not in step.op_positions))
        roots = {v for v in path if v in number}
        found = [v for v in path if v in info.invar_to_weight_path]
        positions = {made[v] for v in path if v in made}
        if not found:
            continue
        first = info.invar_to_weight_path[min(found, key=number.__getitem__)]
        if not positions.isdisjoint(step.op_positions):
            blocked[key] = first
            continue
        paths[key] = first
        variables[key] = var
        needed |= positions
        leaves |= roots
    if not paths:
        return OperandsOf(None, {}, blocked)
    keys = tuple(variables)
    if all(v in number for v in variables.values()):
        identity = tuple(number[v] for v in variables.values())
        return OperandsOf(OperandProgram(keys, None, identity, identity, identity), paths, blocked)
    inputs = sorted(number[v] for v in leaves)
    used = [jaxpr.eqns[p] for p in sorted(needed)]
    program = sub_program(info.closed_jaxpr, [jaxpr.invars[i] for i in inputs], list(variables.values()), used)
    trained = tuple(i for i in inputs if jaxpr.invars[i] in info.invar_to_weight_path)
    return OperandsOf(OperandProgram(keys, program, tuple(inputs), trained, None), paths, blocked)
