"""Which operations act on which hidden groups, and why others do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .._jax import Atom, Var, any_rank, source_line
from .._program import before
from .._types import Path, Shape, path_str
from .descent import holds_link
from .diagnostics import CompilationRecord, DiagnosticKind, DiagnosticLevel
from .flow import Flow, MarkedOp, Reach
from .frame import is_marked
from .groups import HiddenGroup
from .influence import Influence
from .module_info import ModuleInfo
from .operands import OperandProgram, Step
from .relations import HiddenParamOpRelation
from .varying import Trained, is_steady, is_varying, trained

__all__ = ["find_relations"]


@any_rank
def find_relations(
    info: ModuleInfo,
    flow: Flow,
    reach: Reach,
    groups: Sequence[HiddenGroup],
    influence: Influence,
) -> tuple[tuple[HiddenParamOpRelation, ...], tuple[HiddenParamOpRelation, ...], list[CompilationRecord]]:
    """Every marked operation with a parameter is a relation, or a record says why not.

    Returns the relations, the operations with parameters that drive no group (the same record without groups), and
    the diagnostics.
    """
    finder = _Finder(Step(info, flow), reach, groups, influence)
    for op in flow.ops:
        finder.add(op)
    return tuple(finder.relations), tuple(finder.plain), finder.records


class _Finder:
    """Takes one operation after the other into ``relations`` or ``plain``, and says why in ``records``."""

    def __init__(self, step: Step, reach: Reach, groups: Sequence[HiddenGroup], influence: Influence):
        self.step, self.flow, self.reach, self.groups, self.influence = step, step.flow, reach, groups, influence
        self.group_of = {p: g for g in groups for p in g.hidden_paths}
        self.records: list[CompilationRecord] = []
        self.relations: list[HiddenParamOpRelation] = []
        self.plain: list[HiddenParamOpRelation] = []
        self.calls: dict[Path, int] = {}

    def note(self, level: DiagnosticLevel, kind: DiagnosticKind, op: MarkedOp, text: str, **more: Any) -> None:
        self.records.append(CompilationRecord(kind, level, text, primitive=op.primitive.name, **more))

    def add(self, op: MarkedOp) -> None:
        program, paths, blocked = self.step.operand_program(op)
        name = op.primitive.name
        self._describe_blocked(op, blocked)
        if program is None:
            if not blocked:
                text = f"{name} is not trained online: none of its operands comes from a parameter."
                self.note(DiagnosticLevel.INFO, DiagnosticKind.RELATION_EXCLUDED_NO_PARAMSTATE, op, text)
            return
        first = next(iter(paths.values()))
        self._describe(op, first, {**paths, **blocked})
        fed, usable = self._driven(op, first)
        used = tuple(self.groups[i] for i in usable)
        opaque = [k for k in self.reach.ops(op.y) - {op.index} if not self.flow.ops[k].primitive.gradient_enabled]
        others = [k for k in opaque if _direct_groups(self.flow, self.group_of, k) & set(usable)]
        through = bool(others or self.reach.links(op.y))
        found = trained(self.step, op, program, paths)
        relation = _relation(self.step, op, found, used, self.calls.setdefault(first, 0), through)
        if usable:
            self._describe_weight(op, program, found)
            self.relations.append(relation)
            self.calls[first] += 1
            self._describe_relation(op, first, relation, used, through)
            return
        self.plain.append(relation)
        if not fed:
            self.records.append(_excluded(self.step, name, first, op, self.reach, self.influence))

    def _describe_blocked(self, op: MarkedOp, blocked: Mapping[str, Path]) -> None:
        for key, path in blocked.items():
            text = (
                f"Operand {key!r} of {op.primitive.name} is computed from the parameter {path_str(path)!r} and from "
                "what another operation gave, which no trace follows: the parameter gets the gradient of the current "
                f"step only. Multiply the input or the output of {op.primitive.name} by the latter instead."
            )
            kind = DiagnosticKind.RELATION_EXCLUDED_NO_PARAMSTATE
            self.note(DiagnosticLevel.WARNING, kind, op, text, weight_path=path)

    def _driven(self, op: MarkedOp, first: Path) -> tuple[list[int], list[int]]:
        """Numbers of the groups that the output drives, and of those whose shape lets it have a trace."""
        direct = [p for p, labels in self.flow.into.items() if ("y", op.index) in labels]
        fed = sorted({self.group_of[p].index for p in direct})
        usable = []
        for i in fed:
            group = self.groups[i]
            if op.index in group.jacobian.folds or _broadcastable(op.y.aval.shape[op.front :], group.varshape):
                usable.append(i)
                continue
            text = (
                f"The output of {op.primitive.name} at {path_str(first)!r} has shape {tuple(op.y.aval.shape)}, the "
                f"hidden states that it drives have {group.varshape}: no trace is kept for this pair, and the "
                "parameter gets the gradient of the current step only. Give both one shape."
            )
            kind = DiagnosticKind.RELATION_EXCLUDED_SHAPE_MISMATCH
            self.note(DiagnosticLevel.WARNING, kind, op, text, weight_path=first, hidden_paths=group.hidden_paths)
        return fed, usable

    def _describe(self, op: MarkedOp, first: Path, paths: Mapping[str, Path]) -> None:
        """Outputs without a trace, and operands that are not trained."""
        name, info = op.primitive.name, DiagnosticLevel.INFO
        if len(op.eqn.outvars) > 1:
            text = (
                f"{name} at {path_str(first)!r} has {len(op.eqn.outvars)} outputs; number {op.primitive.y_index} "
                "is traced."
            )
            self.note(info, DiagnosticKind.MULTI_OUTPUT_PRIMITIVE_DETECTED, op, text, weight_path=first)
        for key in op.operands.keys() - paths.keys():
            text = f"Operand {key!r} of {name} at {path_str(first)!r} comes from no parameter and is not trained."
            self.note(info, DiagnosticKind.TRAINABLE_INVAR_NOT_PARAMSTATE, op, text, weight_path=first)

    def _describe_weight(self, op: MarkedOp, program: OperandProgram, found: Trained) -> None:
        """A weight that is computed in another way at every step, and has a trace as if it were not."""
        if found.program is not program or not is_varying(self.step, op, found):
            return
        first = next(iter(found.paths.values()))
        text = (
            f"The weight of {op.primitive.name} at {path_str(first)!r} is computed from its parameter and from values "
            "that change from step to step (random numbers, inputs, states). Its trace takes the past as if they had "
            "been what they are now: the parameter gets a wrong gradient from earlier steps. Keep these values for the "
            "whole sequence, or multiply the input or the output of the operation by them."
        )
        kind = DiagnosticKind.WEIGHT_VARIES
        self.note(DiagnosticLevel.WARNING, kind, op, text, weight_path=first)

    def _describe_relation(
        self, op: MarkedOp, first: Path, relation: HiddenParamOpRelation, used: Sequence[HiddenGroup], through: bool
    ) -> None:
        where = f"{op.primitive.name} at {path_str(first)!r}"
        connected = relation.connected_hidden_paths
        if through:
            text = (
                f"{where} reaches its hidden states directly and through another operation. The current step is exact; "
                "the trace keeps the direct path."
            )
            kind = DiagnosticKind.RELATION_PARTIAL_PATH
            self.note(DiagnosticLevel.INFO, kind, op, text, weight_path=first, hidden_paths=connected)
        mixed = [g for g in used if op.index in g.jacobian.displaced]
        if mixed:
            text = (
                f"The way from {where} to {', '.join(g.name for g in mixed)} mixes positions. The current step is "
                "exact; the trace keeps what each output does at its own position."
            )
            kind, paths = DiagnosticKind.TRANSITION_TAIL_BOUNDED, tuple(p for g in mixed for p in g.hidden_paths)
            self.note(DiagnosticLevel.WARNING, kind, op, text, weight_path=first, hidden_paths=paths)
        context = {
            "hidden_group_indices": tuple(g.index for g in used),
            "path_classification": dict(relation.path_classification),
        }
        text = f"{where} is trained online through {', '.join(g.name for g in used)}."
        kind = DiagnosticKind.RELATION_INCLUDED
        more = dict(weight_path=first, hidden_paths=connected, context=context)
        self.note(DiagnosticLevel.INFO, kind, op, text, **more)


def _relation(
    step: Step, op: MarkedOp, found: Trained, used: tuple[HiddenGroup, ...], call: int, mixed: bool
) -> HiddenParamOpRelation:
    info = step.info
    connected = tuple(p for g in used for p in _connected(g, op))
    states = dict(zip(info.compiled_state_paths, info.compiled_model_states))
    constant = frozenset(i for i, v in found.fixed.items() if _is_constant(step, v))
    reads = step.dependence(op, found.primitive, found.variables, found.fixed)
    return HiddenParamOpRelation(
        key=(next(iter(found.paths.values())), call),
        primitive=found.primitive,
        x_var=op.x,
        y_var=op.y,
        hidden_groups=used,
        connected_hidden_paths=connected,
        eqn_params=dict(op.eqn.params),
        path_classification=dict.fromkeys(connected, "mixed" if mixed else "all_direct"),
        trainable_vars=found.variables,
        trainable_paths=found.paths,
        trainable_leaf_indices={k: _leaf(info, v, found.paths[k]) for k, v in found.variables.items()},
        trainable_param_states={k: states[p] for k, p in found.paths.items()},
        fixed_vars=found.fixed,
        constant=constant,
        op_index=op.index,
        parameter_paths=_parameter_paths(info, found.program),
        operand_program=found.program,
        residual_free=bool(used) and _residual_free(step, op, used),
        offset_keys=reads.offset,
        affine_keys=reads.affine,
        linear_keys=reads.linear,
        varying=frozenset(i for i in reads.fixed if not is_steady(step, found.fixed[i])),
    )


def _connected(group: HiddenGroup, op: MarkedOp) -> list[Path]:
    """The members of a group that an operation acts on without passing an old value."""
    row = group.jacobian.df.get(op.index, ())
    driven = {i for (i, _), entry in zip(group.slots, row) if entry.kind != "zero"}
    return [p for i, p in enumerate(group.hidden_paths) if i in driven or not driven]


def _is_constant(step: Step, var: Atom) -> bool:
    """Whether a variable depends on no input of the step."""
    return step.number.keys().isdisjoint(before(step.info.jaxpr.eqns, step.made_at, [var]))


def _parameter_paths(info: ModuleInfo, program: OperandProgram) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(info.invar_to_weight_path[info.jaxpr.invars[i]] for i in program.leaves))


def _leaf(info: ModuleInfo, var: Var, path: Path) -> int:
    leaves = info.weight_path_to_invars[path]
    return leaves.index(var) if var in leaves else 0


def _broadcastable(y: Shape, varshape: Shape) -> bool:
    try:
        return np.broadcast_shapes(y, varshape) is not None
    except ValueError:
        return False


def _direct_groups(flow: Flow, group_of: Mapping[Path, HiddenGroup], k: int) -> set[int]:
    return {group_of[p].index for p, labels in flow.into.items() if ("y", k) in labels}


def _excluded(step: Step, name: str, path: Path, op: MarkedOp, reach: Reach, influence: Influence) -> CompilationRecord:
    info, flow = step.info, step.flow
    changed = influence.of([op.y], influence.opaque.__contains__)
    if driven := influence.driven(changed):
        products = influence.products(changed)
        line = source_line(products[0]) if products else ""
        how = (products[0].primitive.name if products else "loop") + (f" at {line}" if line else "")
        return CompilationRecord(
            DiagnosticKind.RELATION_EXCLUDED_MIXING,
            DiagnosticLevel.WARNING,
            f"{name} at {path_str(path)!r} reaches {', '.join(map(path_str, driven))} only through the {how}, which "
            "mixes the positions of hidden values: no trace follows it, and its parameter gets the gradient of the "
            "current step only. Make it a part of the weight of one braintrace.matmul there.",
            primitive=name,
            weight_path=path,
            hidden_paths=driven,
        )
    linked = {v for position in reach.links(op.y) for v in info.jaxpr.eqns[position].invars}
    blocking = sorted((reach.ops(op.y) | {o.index for o in flow.ops if o.y in linked}) - {op.index})
    if blocking and reach.groups(op.y):
        others = [flow.ops[k] for k in blocking]
        return CompilationRecord(
            DiagnosticKind.RELATION_EXCLUDED_WEIGHT_TO_WEIGHT,
            DiagnosticLevel.INFO,
            f"{name} at {path_str(path)!r} reaches hidden states only through another operation: its parameter gets "
            "the exact gradient of the current step, without history.",
            primitive=name,
            weight_path=path,
            context={
                "blocking_primitives": tuple(o.primitive.name for o in others),
                "blocking_weight_paths": tuple(
                    p for o in others for p in dict.fromkeys(step.operand_program(o).paths.values())
                ),
            },
        )
    return CompilationRecord(
        DiagnosticKind.RELATION_EXCLUDED_NON_TEMPORAL,
        DiagnosticLevel.INFO,
        f"{name} at {path_str(path)!r} drives no hidden state (a readout, say): its parameter gets the exact gradient "
        "of the current step, and needs no trace.",
        primitive=name,
        weight_path=path,
    )


def _residual_free(step: Step, op: MarkedOp, groups: Sequence[HiddenGroup]) -> bool:
    """Follow y to wherever it leaves F; stop at hidden values, which the signal accounts for."""
    if any(op.index not in g.jacobian.aligned for g in groups):
        return False
    eqns, members, outputs = step.info.jaxpr.eqns, step.flow.members, step.outputs
    inside = {p for g in groups for p in g.inside}
    if op.y in members:
        return True
    if op.y in outputs:
        return False
    pending, seen = list(step.readers.get(op.y, ())), {op.position}
    while pending:
        position = pending.pop()
        if position in seen:
            continue
        seen.add(position)
        eqn = eqns[position]
        differentiable = [v for v in eqn.outvars if jax.numpy.issubdtype(v.aval.dtype, jax.numpy.inexact)]
        if not differentiable or eqn.primitive.name == "stop_gradient":
            continue
        through = is_marked(eqn) and not eqn.primitive.gradient_enabled
        if position not in inside or holds_link(eqn) or through:
            return False
        for var in differentiable:
            if var in members:
                continue
            if var in outputs:
                return False
            pending.extend(step.readers.get(var, ()))
    return True
