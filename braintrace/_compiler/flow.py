"""One forward labelling pass over the step: what reaches which hidden state, position by position."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import brainstate
import numpy as np
from jax.typing import ArrayLike

from .._jax import Atom, JaxprEqn, Literal, Var, source_line
from .._ops.primitive import ETPPrimitive
from .._ops.stacked import StackedPrimitive
from .._program import behind, equations_within, variables
from .._types import Path, Shape
from .descent import holds_link
from .diagnostics import CompilationRecord, DiagnosticKind, DiagnosticLevel
from .frame import is_marked
from .labels import NONE, Label, Labels, mixes, own_label, touches_own_position
from .module_info import ModuleInfo, known_constants
from .positions import moves, propagate, transfer
from .remarks import LOOPS

__all__ = ["Flow", "MarkedOp", "Reach", "analyse_flow", "analyse_reach", "through_operation", "title_of", "y_label"]

MIXING = frozenset(["conv_general_dilated", "ragged_dot", "ragged_dot_general"])

CutAt = Callable[[int, JaxprEqn, list[Labels]], list[Labels] | None]  # as for `propagate`, with the equation's position
Sink = tuple[str, Any]  # ('op', index), ('links', position), ('group', index) or ('out', None)


class MarkedOp(NamedTuple):
    """One marked operation of the step."""

    index: int  # type: ignore[assignment]  # among the marked operations
    position: int  # of its equation in the step
    eqn: JaxprEqn

    @property
    def primitive(self) -> ETPPrimitive:
        return self.eqn.primitive

    @property
    def y(self) -> Var:
        return self.eqn.outvars[self.primitive.y_index]

    @property
    def x(self) -> Atom | None:
        index = self.primitive.x_index
        return None if index is None else self.eqn.invars[index]

    @property
    def front(self) -> int:
        """Axes of the output in front of those of one sub-step."""
        return int(isinstance(self.primitive, StackedPrimitive))

    @property
    def title(self) -> str:
        return title_of(self.primitive, self.y)

    @property
    def operands(self) -> dict[str, Atom]:
        """Trained operands by key."""
        return {k: self.eqn.invars[i] for k, i in self.primitive.trainables(self.eqn.params).items()}


def title_of(primitive: ETPPrimitive, y: Var) -> str:
    """The name of an operation, and how many sub-steps of it there are."""
    return f"{primitive.name} x {y.aval.shape[0]}" if isinstance(primitive, StackedPrimitive) else primitive.name


def y_label(shape: Shape, front: int) -> Label:
    """The label of an operation's output: all sub-steps, along ``front`` first axes, have the positions of one."""
    return tuple(np.broadcast_to(ids, shape) for ids in own_label(shape[front:], len(shape) - front))


def through_operation(eqn: JaxprEqn, inputs: list[Labels], constants: Mapping[Var, ArrayLike]) -> Labels:
    """Labels of an operation's output by what reaches its operands; its samples stay apart."""
    p, y = eqn.primitive, eqn.outvars[eqn.primitive.y_index]
    labels = transfer(eqn, inputs, constants)[p.y_index]
    if p.x_index is None:
        return labels
    own = own_label(y.aval.shape, p.lead(y.aval, eqn.params))
    for source, read in inputs[p.x_index].items():
        label = labels.get(source)
        if label is None or len(read) < len(own) or sum(source in of for of in inputs) > 1:
            continue
        x = own_label(read[0].shape, len(own) - 1)
        apart = [k for k in range(1, len(own)) if np.all((read[k] == x[k]) | (read[k] == NONE))]
        labels[source] = tuple(
            np.where(label[0] == NONE, NONE, own[k]) if k in apart else c for k, c in enumerate(label)
        )
    return labels


class Flow(NamedTuple):
    """Sources are ``('old', path)``, ``('new', path)`` and ``('y', operation index)``."""

    ops: tuple[MarkedOp, ...]
    members: dict[Var, list[Path]]  # variables that hold a new hidden value
    labels: dict[Var, Labels]  # of every variable, as what reads it sees them
    into: dict[Path, Labels]  # what reaches a new hidden value without passing another one
    links: dict[Path, frozenset[Path]]  # hidden states whose own position reaches that of a new hidden value
    diagnostics: tuple[CompilationRecord, ...] = ()


def analyse_flow(info: ModuleInfo, mixing: bool = False) -> Flow:
    """Label every variable; marked operations and products of hidden values end the labels of what they read.

    With ``mixing`` neither of them does.
    """
    eqns = info.jaxpr.eqns
    ops = [MarkedOp(i, p, e) for i, (p, e) in enumerate((p, e) for p, e in enumerate(eqns) if is_marked(e))]
    op_at = {op.position: op for op in ops}
    constants = known_constants(info)
    members: dict[Var, list[Path]] = {}
    for path in info.states_of(brainstate.HiddenState):
        outvar = info.hidden_path_to_outvar[path]
        if not isinstance(outvar, Literal) and outvar not in info.jaxpr.invars:
            members.setdefault(outvar, []).append(path)
    _, feeds = behind(eqns, members)
    records: list[CompilationRecord] = []

    def cut(position: int, eqn: JaxprEqn, inputs: list[Labels]) -> list[Labels] | None:
        op = op_at.get(position)
        if op is not None:
            through: Labels = {}
            if op.primitive.gradient_enabled:
                label_in = {v: lab for v, lab in zip(eqn.invars, inputs) if not isinstance(v, Literal)}
                x = op.x
                if x is not None and x in label_in and x.aval.shape == op.y.aval.shape:
                    through = dict(label_in[x])
            if mixing:
                through = through_operation(eqn, inputs, constants)
            own = {("y", op.index): y_label(op.y.aval.shape, op.front)}
            return [(through | own) if v is op.y else {} for v in eqn.outvars]
        of_hidden = not mixing and any(s[0] in ("old", "new") for lab in inputs for s in lab)
        if of_hidden and is_product(eqn) and sums_positions(eqn, inputs):
            return [{} for _ in eqn.outvars]
        if eqn.primitive.name in LOOPS and of_hidden:
            return cut_in_loop(eqn, inputs)
        return None

    def sums_positions(eqn: JaxprEqn, inputs: list[Labels]) -> bool:
        """And not over the hidden variables of each one."""
        outs = transfer(eqn, inputs, constants)
        return any(s[0] != "y" and mixes(label) for labels in outs for s, label in labels.items())

    def cut_in_loop(eqn: JaxprEqn, inputs: list[Labels]) -> list[Labels] | None:
        if not any(is_product(e) for e in equations_within(eqn)):
            return None
        outs = transfer(eqn, inputs, constants)
        kept = [{s: lab for s, lab in labels.items() if s[0] == "y" or not mixes(lab)} for labels in outs]
        if list(map(len, kept)) != list(map(len, outs)) and any(v in feeds for v in eqn.outvars):
            records.append(_mixing_record(eqn))
        return kept

    env, into = _labelled(info, members, cut, constants)
    flow = Flow(tuple(ops), members, env, into, {}, tuple(records))
    return flow._replace(links=_links(info, flow, cut, constants))


def _labelled(
    info: ModuleInfo, members: Mapping[Var, list[Path]], cut: CutAt, constants: Mapping[Var, ArrayLike]
) -> tuple[dict[Var, Labels], dict[Path, Labels]]:
    """Labels of every variable, and of what reaches each new hidden value without passing another one."""
    hidden = info.states_of(brainstate.HiddenState)
    env: dict[Var, Labels] = {}
    into: dict[Path, Labels] = {}
    for path, state in hidden.items():
        invar, outvar = info.hidden_path_to_invar[path], info.hidden_path_to_outvar[path]
        env[invar] = {("old", path): own_label(invar.aval.shape, len(state.varshape))}
        if isinstance(outvar, Literal) or outvar not in members:
            into[path] = {} if isinstance(outvar, Literal) else dict(env.get(outvar, {}))
    for position, eqn in enumerate(info.jaxpr.eqns):
        propagate([eqn], env, functools.partial(cut, position), constants)
        for var in eqn.outvars:
            for i, path in enumerate(members.get(var, ())):
                into[path] = env.get(var, {}) if i == 0 else into[members[var][0]]
            if var in members:
                # What reads the variable from here on reads the first of the states that it is the new value of.
                path = members[var][0]
                env[var] = {("new", path): own_label(var.aval.shape, len(hidden[path].varshape))}
    return env, into


def _links(info: ModuleInfo, flow: Flow, cut: CutAt, constants: Mapping[Var, ArrayLike]) -> dict[Path, frozenset[Path]]:
    shapes = {p: tuple(s.varshape) for p, s in info.states_of(brainstate.HiddenState).items()}

    def linked(into: Mapping[Path, Labels]) -> set[tuple[Path, Path]]:
        return {
            (target, s[1])
            for target, labels in into.items()
            for s, label in labels.items()
            if s[0] != "y" and shapes[s[1]] == shapes[target] and touches_own_position(label, shapes[target])
        }

    found = linked(flow.into)
    mixed = {(t, s[1]) for t, labels in flow.into.items() for s, lab in labels.items() if s[0] != "y" and mixes(lab)}
    if any(t != s and shapes[t] == shapes[s] for t, s in mixed - found):
        # Where labels of several terms came together as a mixture, some of the terms may still be position-wise.
        def apart(position: int, eqn: JaxprEqn, inputs: list[Labels]) -> list[Labels]:
            outs = cut(position, eqn, inputs)
            return moves(eqn, inputs, constants) if outs is None else outs

        found |= linked(_labelled(info, flow.members, apart, constants)[1])
    return {p: frozenset(s for t, s in found if t == p) for p in shapes}


def is_product(eqn: JaxprEqn) -> bool:
    """Whether an equation is a product that sums over an axis."""
    if eqn.primitive.name == "dot_general":
        ((contracted, _), _) = eqn.params["dimension_numbers"]
        return any(eqn.invars[0].aval.shape[k] > 1 for k in contracted)
    return eqn.primitive.name in MIXING


def _mixing_record(eqn: JaxprEqn) -> CompilationRecord:
    name, line = eqn.primitive.name, source_line(eqn)
    return CompilationRecord(
        DiagnosticKind.CONTROL_FLOW_RECURRENT_MIXING,
        DiagnosticLevel.WARNING,
        f"The {name}{f' at {line}' if line else ''} mixes the positions of a hidden state by a product. As with any "
        "recurrent product, the current step is exact, and traces do not follow the mixing.",
        primitive=name,
        context={"line": line},
    )


class Reach(NamedTuple):
    """Everything downstream of a variable in the same step, whatever lies between."""

    of: dict[Var, frozenset[Sink]]

    def groups(self, var: Var) -> frozenset[int]:
        return frozenset(i for kind, i in self.of.get(var, ()) if kind == "group")

    def ops(self, var: Var) -> frozenset[int]:
        return frozenset(i for kind, i in self.of.get(var, ()) if kind == "op")

    def links(self, var: Var) -> frozenset[int]:
        """Equations with links (see :mod:`.descent`), by position."""
        return frozenset(i for kind, i in self.of.get(var, ()) if kind == "links")


def analyse_reach(
    eqns: Sequence[JaxprEqn], outvars: Sequence[Atom], group_of_member: dict[Var, set[int]], ops: Sequence[MarkedOp]
) -> Reach:
    of: dict[Var, frozenset[Sink]] = {}
    op_at = {op.position: op.index for op in ops}

    def add(var: Var, sinks: frozenset[Sink]) -> None:
        of[var] = of.get(var, frozenset()) | sinks

    for var in variables(outvars):
        if var not in group_of_member:
            add(var, frozenset([("out", None)]))
    for var, groups in group_of_member.items():
        add(var, frozenset(("group", g) for g in groups))
    for position in range(len(eqns) - 1, -1, -1):
        eqn = eqns[position]
        sinks = frozenset[Sink]().union(*(of.get(v, frozenset()) for v in eqn.outvars))
        if position in op_at:
            sinks |= {("op", op_at[position])}
        if holds_link(eqn):
            sinks |= {("links", position)}
        for var in variables(eqn.invars):
            add(var, sinks)
    return Reach(of)
