"""Weights that are computed from parameters in another way at every step: a random mask, a gain, a schedule.

A trace of such a weight would have to be pulled back through what was computed at each step of the past. So the
parameters themselves have traces, where each of their entries acts on one entry of the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from .._jax import Atom, ClosedJaxpr, JaxprEqn, Literal, Var, open_jaxpr, reads, struct, structs
from .._ops.composed import ComposedPrimitive
from .._ops.primitive import ETPPrimitive
from .._ops.stacked import StackedPrimitive
from .._program import before, behind, sub_program, variables
from .._types import Path, PyTree
from .flow import MarkedOp
from .labels import is_aligned, mixes, own_label
from .module_info import ModuleInfo
from .operands import OperandProgram, Step
from .positions import entry_positions, no_cut, propagate

__all__ = ["Trained", "is_steady", "is_varying", "trained"]


class Trained(NamedTuple):
    """An operation as it is trained: with operands of its own, or with the parameters that these are computed from."""

    primitive: ETPPrimitive
    program: OperandProgram
    paths: dict[str, Path]  # by key
    variables: dict[str, Var]  # by key
    fixed: dict[int, Atom]  # operands that are neither trained nor the input, by position


def trained(step: Step, op: MarkedOp, program: OperandProgram, paths: dict[str, Path]) -> Trained:
    """The operation with its parameters where its weights vary and that can be had, else with its own operands."""
    slots = op.primitive.trainables(op.eqn.params)
    taken = {slots[k] for k in paths} | {op.primitive.x_index}
    fixed = {i: v for i, v in enumerate(op.eqn.invars) if i not in taken}
    own = Trained(op.primitive, program, paths, {k: op.operands[k] for k in paths}, fixed)
    return (_composed(step, op, own) or own) if _read_backward(step, op, own) else own


def is_varying(step: Step, op: MarkedOp, own: Trained) -> bool:
    """Whether the way back to the parameters is another one at every step."""
    return any(not is_steady(step, step.info.jaxpr.invars[i]) for i in _read_backward(step, op, own))


def is_steady(step: Step, var: Atom) -> bool:
    """Whether a variable depends on nothing but parameters, and states that the step does not write."""
    return step.changing.isdisjoint(before(step.info.jaxpr.eqns, step.made_at, [var]))


def _read_backward(step: Step, op: MarkedOp, own: Trained) -> list[int]:
    """Inputs of the step, other than parameters, that the way back from the output to the parameters reads."""
    program = own.program
    if program.identity is not None or program.inputs == program.leaves:
        return []
    others = [i for i in program.inputs if i not in program.leaves]
    if set(step.dependence(op, op.primitive, own.variables, own.fixed).linear) != own.variables.keys():
        return others  # the derivative of the operation is that at the weights themselves

    def back(values: list[jax.Array], bars: list[jax.Array]) -> list[jax.Array]:
        invals: list[PyTree] = [None] * len(step.info.jaxpr.invars)
        for i, value in zip(program.inputs, values):
            invals[i] = value
        found = program.pull_back(invals, dict(zip(program.keys, bars)))
        return [found[i] for i in program.leaves]

    inputs = structs([step.info.jaxpr.invars[i] for i in program.inputs])
    closed = jax.make_jaxpr(back)(inputs, structs([op.operands[k] for k in program.keys]))
    read = reads(closed, [True] * len(program.leaves))
    return [i for i, of in zip(program.inputs, read) if of and i in others]


def _composed(step: Step, op: MarkedOp, own: Trained) -> Trained | None:
    one, params, keys = op.primitive, op.eqn.params, own.program.keys
    if isinstance(one, StackedPrimitive) or not ComposedPrimitive.takes(one) or _shares(op, own):
        return None
    info, outs = step.info, [op.operands[k] for k in keys]
    eqns = behind(info.jaxpr.eqns, outs)[0]
    identity = tuple(_differentiated(info, own.program.leaves, eqns, outs))
    leaves: list[Var] = [info.jaxpr.invars[i] for i in identity]
    made, inner = set(leaves), []
    for eqn in eqns:
        if not made.isdisjoint(variables(eqn.invars)):
            made.update(eqn.outvars)
            inner.append(eqn)
    known = made | set(info.jaxpr.constvars)
    values = list(dict.fromkeys(v for eqn in inner for v in variables(eqn.invars) if v not in known))
    program = sub_program(info.closed_jaxpr, [*leaves, *values], outs, inner)
    names = _names(program, keys, len(leaves))
    acts_on = _entry_by_entry(program, len(leaves))
    slots = one.trainables(params)
    weights = [slots[k] for k in keys]
    kept = [i for i in range(len(op.eqn.invars)) if i not in weights]
    further = len(kept) + len(leaves)
    found = Trained(
        ComposedPrimitive(one, program, weights, kept, names, None if acts_on is None else [keys[k] for k in acts_on]),
        OperandProgram(tuple(names), None, identity, identity, identity),
        {k: info.invar_to_weight_path[v] for k, v in zip(names, leaves)},
        dict(zip(names, leaves)),
        {kept.index(i): v for i, v in own.fixed.items()} | {further + m: v for m, v in enumerate(values)},
    )
    if op.x is None:
        return None if acts_on is None else found
    functions = any(params.get(f"{k}_fn") is not None for k in keys)
    trusted = found.primitive.rules.anchors is not None and not functions
    return found if trusted or _has_traces(op, found) else None


def _differentiated(
    info: ModuleInfo, leaves: Sequence[int], eqns: Sequence[JaxprEqn], outs: Sequence[Var]
) -> Iterator[int]:
    """The parameter leaves, by number among the step's inputs, that have a gradient."""
    of = {i: info.jaxpr.invars[i] for i in leaves}
    env = {v: {("leaf", i): own_label(v.aval.shape, len(v.aval.shape))} for i, v in of.items()}
    propagate(eqns, env, no_cut)
    return (i for i in leaves if any(("leaf", i) in env.get(out, {}) for out in outs))


def _shares(op: MarkedOp, own: Trained) -> bool:
    """Whether a weight acts on several positions of a sample, so that the operation says how it has one for each."""
    one, params = op.primitive, op.eqn.params
    if one.rules.unshare is None or op.x is None:
        return one.rules.unshare is not None
    lead = one.lead(op.y.aval, params)
    x, y = (jax.ShapeDtypeStruct(v.aval.shape[lead:], v.aval.dtype) for v in (op.x, op.y))
    weights = {k: struct(v) for k, v in own.variables.items()}
    return one.rules.unshare(x, y, weights, params) is not None


def _names(program: ClosedJaxpr, keys: Sequence[str], number: int) -> list[str]:
    """Of the parameters: those of the first weight that each of them acts on."""
    names: list[str] = []
    acts_on = [reads(program, [k == key for k in keys])[:number] for key in keys]
    for j in range(number):
        key = next((k for k, of in zip(keys, acts_on) if of[j]), keys[0])
        names.append(key if key not in names else f"{key}_{j}")
    return names


def _entry_by_entry(program: ClosedJaxpr, number: int) -> list[int] | None:
    """For every parameter the output whose entries it has, one by one; ``None`` if it is not so for all."""
    jaxpr, acts_on = open_jaxpr(program), {}
    leaves = jaxpr.invars[:number]
    env = {v: {("leaf", j): own_label(v.aval.shape, len(v.aval.shape))} for j, v in enumerate(leaves)}
    propagate(jaxpr.eqns, env, no_cut)
    for k, out in enumerate(jaxpr.outvars):
        for (_, j), label in ({} if isinstance(out, Literal) else env.get(out, {})).items():
            shape = leaves[j].aval.shape
            if out.aval.shape != shape or not is_aligned(label, shape) or j in acts_on:
                return None
            acts_on[j] = k
    return [acts_on[j] for j in range(number)] if len(acts_on) == number else None


def _has_traces(op: MarkedOp, found: Trained) -> bool:
    """Whether every entry of a parameter acts on one entry of the output of a sample."""
    one, params = found.primitive, op.eqn.params
    lead = one.lead(op.y.aval, params)
    sample = lambda v: jax.ShapeDtypeStruct(v.aval.shape[lead:], v.aval.dtype)  # noqa: E731
    whole = lambda of: {k: struct(v) for k, v in of.items()}  # noqa: E731
    args = None if op.x is None else sample(op.x), whole(found.variables), whole(found.fixed)

    def apply(x: PyTree, weights: PyTree, fixed: PyTree) -> jax.Array:
        return one.apply_sample(x, weights, params, fixed)

    if jax.eval_shape(apply, *args).shape != sample(op.y).shape:  # a value has an axis of samples
        return False
    labels = entry_positions(apply, args, sample(op.y))
    return all(label is not None and not mixes(label) for label in labels.values())
