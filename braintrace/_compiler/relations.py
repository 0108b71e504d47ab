"""Which parameters drive which hidden groups, through which operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import brainstate
import jax
import numpy as np

from .._jax import Literal, Var, any_rank, eval_jaxpr, hashed, source_line
from .._ops.primitive import ETPPrimitive
from .._ops.stacked import StackedPrimitive
from .._program import before, made_at, sub_program, variables
from .._types import Path, path_str
from .cut import Fold
from .dependence import Dependence, dependence
from .descent import holds_link
from .diagnostics import CompilationRecord, DiagnosticKind, DiagnosticLevel
from .flatten import is_marked
from .flow import Flow, MarkedOp, Reach, title_of
from .groups import HiddenGroup
from .influence import Influence
from .module_info import ModuleInfo

__all__ = ["HiddenParamOpRelation", "OperandProgram", "find_relations", "operand_program"]


NO_PARAMETER = "none of its operands comes from a parameter"


class OperandProgram(NamedTuple):
    """What happens to parameters before they enter an operation (a mask, a sign, a sum of two).

    ``program`` maps step inputs to the trained operands; ``leaves`` are the parameter leaves among its inputs.
    """

    keys: tuple[str, ...]
    program: Any
    inputs: tuple[int, ...]  # positions among the inputs of the step
    leaves: tuple[int, ...]  # those of them that are parameter leaves
    identity: tuple[int, ...] | None  # positions of the operands, if they are step inputs as they are

    def operands(self, invals: Sequence[Any]) -> dict[str, jax.Array]:
        if self.identity is not None:
            return {k: invals[i] for k, i in zip(self.keys, self.identity)}
        return dict(zip(self.keys, eval_jaxpr(self.program, *[invals[i] for i in self.inputs])))

    def pull_back(self, invals: Sequence[Any], gradients: dict[str, jax.Array]) -> dict[int, jax.Array]:
        """Gradients of the operands -> gradients of the parameter leaves, by position in the step's inputs."""
        if self.identity is not None:
            out: dict[int, jax.Array] = {}
            for k, i in zip(self.keys, self.identity):
                out[i] = out[i] + gradients[k] if i in out else gradients[k]
            return out

        def run(leaves):
            values = dict(zip(self.leaves, leaves))
            args = [values.get(i, invals[i]) for i in self.inputs]
            return eval_jaxpr(self.program, *args)

        outs, pull = jax.vjp(run, [invals[i] for i in self.leaves])
        (bars,) = pull([gradients[k].astype(o.dtype) for k, o in zip(self.keys, outs)])
        return dict(zip(self.leaves, bars))


class _SubStep(NamedTuple):
    """Stands for a variable of one sub-step."""

    aval: jax.ShapeDtypeStruct

    @classmethod
    def of(cls, var: Any) -> _SubStep:
        return cls(jax.ShapeDtypeStruct(var.aval.shape[1:], var.aval.dtype))


class HiddenParamOpRelation(NamedTuple):
    """One operation whose trained operands come from parameters and whose output reaches a hidden group directly.

    Attributes
    ----------
    key : tuple
        ``(path of the first parameter, call index)``: names the relation.
    primitive : ETPPrimitive
    x_var, y_var : Var or None, Var
        Input and output of the operation (``.aval.shape``, ``.aval.dtype``).
    hidden_groups : tuple of HiddenGroup
        The groups that the output reaches without passing through another group.
    connected_hidden_paths : tuple of path
    eqn_params : dict
        Static parameters of the operation.
    path_classification : dict
        Hidden path -> ``'all_direct'``, or ``'mixed'`` where the output also acts through another operation.
    trainable_vars, trainable_paths, trainable_leaf_indices, trainable_param_states : dict
        Per trainable key: the operand variable, the path of its parameter, the leaf number within the parameter's
        value and the parameter. The first parameter is named where an operand is computed from several.
    fixed_vars : dict
        Operands that are neither trained nor the input, by position.
    constant : frozenset of int
        Those of them that are the same at every step.
    op_index : int
        Number of the operation among the marked operations of the step.
    parameter_paths : tuple of path
        Every parameter that the trained operands are computed from.
    operand_program : OperandProgram
    residual_free : bool
        Whether every path from the output to the loss is through its hidden groups position by position.
    offset_keys : tuple of str
        Trained operands whose gradient does not depend on the input (a bias).
    affine_keys : tuple of str
        Trained operands whose gradient depends on the input, and is not known to vanish with it.
    linear_keys : tuple of str
        Trained operands whose gradient does not depend on the operands themselves (no hook).
    """

    key: tuple[Path, int]
    primitive: ETPPrimitive
    x_var: Any | None
    y_var: Var | _SubStep
    hidden_groups: tuple[HiddenGroup, ...]
    connected_hidden_paths: tuple[Path, ...]
    eqn_params: dict[str, Any]
    path_classification: dict[Path, str]
    trainable_vars: dict[str, Any]
    trainable_paths: dict[str, Path]
    trainable_leaf_indices: dict[str, int]
    trainable_param_states: dict[str, brainstate.ParamState]
    fixed_vars: Mapping[int, Any]
    constant: frozenset[int]
    op_index: int
    parameter_paths: tuple[Path, ...]
    operand_program: OperandProgram
    residual_free: bool
    offset_keys: tuple[str, ...]
    affine_keys: tuple[str, ...]
    linear_keys: tuple[str, ...]

    @property
    def is_static(self) -> bool:
        """Whether the trained operands are the same at every step while the parameters are."""
        return self.operand_program.inputs == self.operand_program.leaves

    @property
    def sub_steps(self) -> int | None:
        """The number of sub-steps along a first axis of input and output, of an operation in a long loop."""
        return self.y_var.aval.shape[0] if isinstance(self.primitive, StackedPrimitive) else None

    @property
    def title(self) -> str:
        """The name of the operation, and how many sub-steps of it there are."""
        return title_of(self.primitive, self.y_var)

    @property
    def untrained(self) -> dict[str, int]:
        """Keys of operands that could be trained and are not, and their positions."""
        slots = self.primitive.trainables(self.eqn_params)
        return {k: i for k, i in slots.items() if i in self.fixed_vars}

    @property
    def weight_vars(self) -> dict[str, Any]:
        """Variables of the trained and the untrained operands, by key."""
        return self.trainable_vars | {k: self.fixed_vars[i] for k, i in self.untrained.items()}

    def x_repr(self, x: Any, operands: Mapping[str, Any]) -> Any:
        """The representation of the input that the operation is linear in."""
        fixed = {k: self.fixed_vars[i].aval for k, i in self.untrained.items()}
        return self.primitive.x_repr(x, {**fixed, **operands})

    @property
    def one(self) -> HiddenParamOpRelation:
        """The relation with the operation of one sub-step (itself, where there are none)."""
        if not isinstance(self.primitive, StackedPrimitive):
            return self
        return self._replace(
            primitive=self.primitive.one,
            x_var=None if self.x_var is None else _SubStep.of(self.x_var),
            y_var=_SubStep.of(self.y_var),
            fixed_vars={i: _SubStep.of(v) for i, v in self.fixed_vars.items()},
        )

    def fold(self, group: HiddenGroup) -> Fold | None:
        """Where the entries of an output with several for every position of a group act."""
        return group.cut.folds.get(self.op_index)

    def place(self, group: HiddenGroup, value: Any) -> Any:
        """A value per position of a group, for every entry of the output (or of the group, where y is no larger).

        All sub-steps have the same, so that there is no axis for them.
        """
        fold = self.fold(group)
        return value if fold is None else fold.place(value)

    def shape_in(self, group: HiddenGroup) -> tuple[int, ...]:
        """The shape that :meth:`place` gives, with sub-steps in front of it."""
        front = () if self.sub_steps is None else (self.sub_steps,)
        y = self.y_var.aval.shape
        return (*front, *group.varshape) if self.fold(group) is None else y

    @property
    def x(self) -> Any | None:
        return self.x_var

    @property
    def y(self) -> Var | _SubStep:
        return self.y_var

    @property
    def path(self) -> Path:
        return self.key[0]

    def dict(self) -> dict[str, Any]:
        return self._asdict()

    def __repr__(self) -> str:
        groups = [g.index for g in self.hidden_groups]
        return f"HiddenParamOpRelation({path_str(self.path)!r}, {self.title}, groups={groups})"


class _Step:
    """A step, and what is asked about its variables and operations again and again."""

    def __init__(self, info: ModuleInfo, flow: Flow):
        self.info, self.flow = info, flow
        jaxpr = info.jaxpr
        self.number = {v: i for i, v in enumerate(jaxpr.invars)}
        self.made_at = made_at(jaxpr.eqns)
        self.hidden = set(info.hidden_path_to_invar.values())
        self.outputs = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
        self.op_positions = {op.position for op in flow.ops}
        self.readers: dict[Any, list[int]] = {}
        for i, eqn in enumerate(jaxpr.eqns):
            for v in variables(eqn.invars):
                self.readers.setdefault(v, []).append(i)
        self._dependence: dict[Any, Dependence] = {}
        self._programs: dict[int, tuple[OperandProgram | None, dict[str, Path], str]] = {}

    def operand_program(self, op: MarkedOp) -> tuple[OperandProgram | None, dict[str, Path], str]:
        """:func:`operand_program`, found once."""
        if op.index not in self._programs:
            self._programs[op.index] = _operand_program(self, op)
        return self._programs[op.index]

    def dependence(self, op: MarkedOp, trained: Mapping[str, Any], fixed: Mapping[int, Any]) -> Dependence:
        """:func:`dependence` of an operation, found once for all that differ in nothing it asks about."""
        arguments = op.primitive, op.eqn.params, op.x, op.y, trained, fixed
        shape_of = lambda v: None if v is None else (v.aval.shape, v.aval.dtype)  # noqa: E731
        operands = tuple((k, shape_of(v)) for k, v in (*trained.items(), *fixed.items()))
        params = tuple(op.eqn.params.items())
        key = hashed(op.primitive, op.primitive.rules, params, shape_of(op.x), shape_of(op.y), operands)
        if key is None:
            return dependence(*arguments)
        if key not in self._dependence:
            self._dependence[key] = dependence(*arguments)
        return self._dependence[key]


def operand_program(info: ModuleInfo, flow: Flow, op: MarkedOp) -> tuple[OperandProgram | None, dict[str, Path], str]:
    """The trained operands of an operation as a program of step inputs.

    Returns ``(program, first parameter path by key, why not)``; the program is ``None`` if no operand comes from a
    parameter. An operand that is a constant, or computed from hidden values, is not trained.
    """
    return _Step(info, flow).operand_program(op)


def _operand_program(step: _Step, op: MarkedOp) -> tuple[OperandProgram | None, dict[str, Path], str]:
    info, jaxpr, number, made = step.info, step.info.jaxpr, step.number, step.made_at
    paths: dict[str, Path] = {}
    needed: set[int] = set()
    leaves: set[Any] = set()
    variables: dict[str, Any] = {}
    why = NO_PARAMETER
    for key, var in op.operands.items():
        if isinstance(var, Literal):
            continue
        path = list(before(jaxpr.eqns, made, [var]))
        roots = {v for v in path if v in number}
        found = [v for v in path if v in info.invar_to_weight_path]
        positions = {made[v] for v in path if v in made}
        blocked = not roots.isdisjoint(step.hidden) or not positions.isdisjoint(step.op_positions)
        if not found:
            continue
        if blocked:
            why = "its operand is computed from hidden values or from another operation"
            continue
        first = min(found, key=number.__getitem__)
        paths[key] = info.invar_to_weight_path[first]
        variables[key] = var
        needed |= positions
        leaves |= roots
    if not paths:
        return None, {}, why
    keys = tuple(variables)
    if all(v in number for v in variables.values()):
        identity = tuple(number[v] for v in variables.values())
        return OperandProgram(keys, None, identity, identity, identity), paths, ""
    inputs = sorted(number[v] for v in leaves)
    used = [jaxpr.eqns[p] for p in sorted(needed)]
    program = sub_program(info.closed_jaxpr, [jaxpr.invars[i] for i in inputs], list(variables.values()), used)
    trained = tuple(i for i in inputs if jaxpr.invars[i] in info.invar_to_weight_path)
    return OperandProgram(keys, program, tuple(inputs), trained, None), paths, ""


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
    group_of = {p: g for g in groups for p in g.hidden_paths}
    records: list[CompilationRecord] = []
    relations: list[HiddenParamOpRelation] = []
    plain: list[HiddenParamOpRelation] = []
    calls: dict[Path, int] = {}
    step = _Step(info, flow)
    for op in flow.ops:
        program, paths, why = step.operand_program(op)
        name = op.primitive.name
        if program is None:
            records.append(
                CompilationRecord(
                    DiagnosticKind.RELATION_EXCLUDED_NO_PARAMSTATE,
                    DiagnosticLevel.INFO if why == NO_PARAMETER else DiagnosticLevel.WARNING,
                    f"{name} is not trained online: {why}. Its value and gradient are those of plain JAX.",
                    primitive=name,
                )
            )
            continue
        first = next(iter(paths.values()))
        if len(op.eqn.outvars) > 1:
            records.append(
                CompilationRecord(
                    DiagnosticKind.MULTI_OUTPUT_PRIMITIVE_DETECTED,
                    DiagnosticLevel.INFO,
                    f"{name} at {path_str(first)!r} has {len(op.eqn.outvars)} outputs; number {op.primitive.y_index} "
                    "is traced.",
                    primitive=name,
                    weight_path=first,
                )
            )
        for key in op.operands.keys() - paths.keys():
            records.append(
                CompilationRecord(
                    DiagnosticKind.TRAINABLE_INVAR_NOT_PARAMSTATE,
                    DiagnosticLevel.INFO,
                    f"Operand {key!r} of {name} at {path_str(first)!r} comes from no parameter and is not trained.",
                    primitive=name,
                    weight_path=first,
                )
            )
        direct = [p for p, labels in flow.into.items() if ("y", op.index) in labels]
        fed = sorted({group_of[p].index for p in direct})
        usable = [
            i
            for i in fed
            if op.index in groups[i].cut.folds or _broadcastable(op.y.aval.shape[op.front :], groups[i].varshape)
        ]
        for i in fed:
            if i not in usable:
                records.append(
                    CompilationRecord(
                        DiagnosticKind.RELATION_EXCLUDED_SHAPE_MISMATCH,
                        DiagnosticLevel.WARNING,
                        f"The output of {name} at {path_str(first)!r} has shape {tuple(op.y.aval.shape)}, the hidden "
                        f"states that it drives have {groups[i].varshape}: no trace is kept for this pair, and the "
                        "parameter gets the gradient of the current step only. Give both one shape.",
                        primitive=name,
                        weight_path=first,
                        hidden_paths=groups[i].hidden_paths,
                    )
                )
        used = tuple(groups[i] for i in usable)
        opaque = [k for k in reach.ops(op.y) - {op.index} if not flow.ops[k].primitive.gradient_enabled]
        others = [k for k in opaque if _direct_groups(flow, group_of, k) & set(usable)]
        through = bool(others or reach.links(op.y))
        relation = _relation(step, op, program, paths, used, calls.setdefault(first, 0), through)
        if not usable:
            plain.append(relation)
            if not fed:
                records.append(_excluded(step, name, first, op, reach, influence))
            continue
        relations.append(relation)
        calls[first] += 1
        if through:
            records.append(
                CompilationRecord(
                    DiagnosticKind.RELATION_PARTIAL_PATH,
                    DiagnosticLevel.INFO,
                    f"{name} at {path_str(first)!r} reaches its hidden states directly and through another operation. "
                    "The current step is exact; the trace keeps the direct path.",
                    primitive=name,
                    weight_path=first,
                    hidden_paths=relation.connected_hidden_paths,
                )
            )
        mixed = [g for g in used if op.index in g.cut.displaced]
        if mixed:
            records.append(
                CompilationRecord(
                    DiagnosticKind.TRANSITION_TAIL_BOUNDED,
                    DiagnosticLevel.WARNING,
                    f"The way from {name} at {path_str(first)!r} to {', '.join(g.name for g in mixed)} mixes "
                    "positions. The current step is exact; the trace keeps what each output does at its own position.",
                    primitive=name,
                    weight_path=first,
                    hidden_paths=tuple(p for g in mixed for p in g.hidden_paths),
                )
            )
        records.append(
            CompilationRecord(
                DiagnosticKind.RELATION_INCLUDED,
                DiagnosticLevel.INFO,
                f"{name} at {path_str(first)!r} is trained online through {', '.join(g.name for g in used)}.",
                primitive=name,
                weight_path=first,
                hidden_paths=relation.connected_hidden_paths,
                context={
                    "hidden_group_indices": tuple(usable),
                    "path_classification": dict(relation.path_classification),
                },
            )
        )
    return tuple(relations), tuple(plain), records


def _relation(step, op, program, paths, used, call, mixed) -> HiddenParamOpRelation:
    info = step.info
    connected = tuple(p for g in used for p in _connected(g, op))
    states = dict(zip(info.compiled_state_paths, info.compiled_model_states))
    trainable = {k: op.operands[k] for k in paths}
    fixed = _fixed_vars(op, paths)
    reads = step.dependence(op, trainable, fixed)
    return HiddenParamOpRelation(
        key=(next(iter(paths.values())), call),
        primitive=op.primitive,
        x_var=op.x,
        y_var=op.y,
        hidden_groups=used,
        connected_hidden_paths=connected,
        eqn_params=dict(op.eqn.params),
        path_classification=dict.fromkeys(connected, "mixed" if mixed else "all_direct"),
        trainable_vars=trainable,
        trainable_paths=paths,
        trainable_leaf_indices={k: _leaf(info, op.operands[k], paths[k]) for k in paths},
        trainable_param_states={k: states[p] for k, p in paths.items()},
        fixed_vars=fixed,
        constant=frozenset(i for i, v in fixed.items() if _is_constant(info, v)),
        op_index=op.index,
        parameter_paths=_parameter_paths(info, program),
        operand_program=program,
        residual_free=bool(used) and _residual_free(step, op, used),
        offset_keys=reads.offset,
        affine_keys=reads.affine,
        linear_keys=reads.linear,
    )


def _connected(group: HiddenGroup, op: MarkedOp) -> list[Path]:
    """The members of a group that an operation acts on without passing an old value."""
    row = group.cut.df.get(op.index, ())
    driven = {i for (i, _), entry in zip(group.slots, row) if entry.kind != "zero"}
    return [p for i, p in enumerate(group.hidden_paths) if i in driven or not driven]


def _fixed_vars(op: MarkedOp, trained) -> Mapping[int, Any]:
    slots = op.primitive.trainables(op.eqn.params)
    taken = {slots[k] for k in trained} | {op.primitive.x_index}
    return {i: v for i, v in enumerate(op.eqn.invars) if i not in taken}


def _is_constant(info: ModuleInfo, var: Any) -> bool:
    """Whether a variable depends on no input of the step."""
    eqns, inputs = info.jaxpr.eqns, set(info.jaxpr.invars)
    return inputs.isdisjoint(before(eqns, made_at(eqns), [var]))


def _parameter_paths(info, program) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(info.invar_to_weight_path[info.jaxpr.invars[i]] for i in program.leaves))


def _leaf(info, var, path) -> int:
    leaves = info.weight_path_to_invars[path]
    return leaves.index(var) if var in leaves else 0


def _broadcastable(y: tuple[int, ...], varshape: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(y, varshape) is not None
    except ValueError:
        return False


def _direct_groups(flow, group_of, k) -> set[int]:
    return {group_of[p].index for p, labels in flow.into.items() if ("y", k) in labels}


def _excluded(step, name, path, op, reach, influence) -> CompilationRecord:
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
                    p for o in others for p in dict.fromkeys(step.operand_program(o)[1].values())
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


def _residual_free(step: _Step, op: MarkedOp, groups: Sequence[HiddenGroup]) -> bool:
    """Follow y to wherever it leaves F; stop at hidden values, which the signal accounts for."""
    if any(op.index not in g.cut.aligned for g in groups):
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
