"""The equations between old hidden values, outputs of operations and new hidden values of one group: the program F."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .._jax import Atom, JaxprEqn, Literal, Var, hashed
from .._program import before, made_at, read, variables
from .._types import Path, Shape
from .descent import bind_without_links
from .flow import Flow, MarkedOp, through_operation, y_label
from .frame import is_marked
from .labels import NONE, Label, Labels, own_label, unaligned_axes
from .module_info import ModuleInfo, known_constants
from .positions import propagate

__all__ = [
    "Slice", "Slot", "displaced_axes", "evaluate_slice", "is_shared", "mixed_axes", "mixed_output_axes", "slice_group",
    "slice_labels",
]  # fmt: skip


Slot = tuple[int, int | None]  # of a hidden variable: the number of the member, and of its component or None


class Slice(NamedTuple):
    """The program F of a group.

    In a scope that sees the recurrent mixing, F passes through the operations that read its hidden values.
    """

    positions: tuple[int, ...]  # of its equations in the step
    olds: tuple[Var, ...]  # old values of the members
    ys: dict[int, Var]  # operation index -> output, held fixed
    fronts: dict[int, int]  # operation index -> axes of the output in front of those of one sub-step
    externals: tuple[Var, ...]  # everything else that F reads
    constants: dict[Var, ArrayLike]  # known values among what it reads
    news: tuple[Atom, ...]  # new values of the members
    passed: frozenset[int] = frozenset()  # operations that F passes through, transparent ones apart
    mixing: bool = False  # whether F passes through what mixes positions

    @property
    def inputs(self) -> tuple[Var, ...]:
        return (*self.olds, *self.ys.values(), *self.externals)

    def form(self, eqns: Sequence[JaxprEqn]) -> Hashable | None:
        """Equal for two slices that differ in nothing but their variables; ``None`` where that cannot be told."""
        number = {v: i for i, v in enumerate((*self.inputs, *self.constants))}
        kind = lambda v: (v.aval.shape, v.aval.dtype)  # noqa: E731
        name = lambda v: (kind(v), np.asarray(v.val).tobytes()) if isinstance(v, Literal) else number[v]  # noqa: E731
        body = []
        for position in self.positions:
            eqn = eqns[position]
            read = tuple(map(name, eqn.invars))
            made = tuple((number.setdefault(v, len(number)), kind(v)) for v in eqn.outvars)
            body.append((eqn.primitive, tuple(eqn.params.items()), read, made))
        return hashed(
            tuple(map(kind, self.inputs)),
            tuple(map(id, self.constants.values())),
            tuple((self.fronts[k], k in self.passed) for k in self.ys),
            (len(self.olds), len(self.ys), self.mixing),
            tuple(body),
            tuple(map(name, self.news)),
        )


def slice_group(info: ModuleInfo, flow: Flow, paths: Sequence[Path], mixing: bool = False) -> Slice:
    """Collect F backward from the new values; with ``mixing``, through what mixes positions too."""
    own = set(paths)
    eqns = info.jaxpr.eqns
    made = made_at(eqns)
    op_of = {op.y: op for op in flow.ops}
    olds = tuple(info.hidden_path_to_invar[p] for p in paths)
    news = tuple(info.hidden_path_to_outvar[p] for p in paths)
    member_of = {v: set(ps) for v, ps in flow.members.items()}
    ys: dict[int, Var] = {}
    fronts: dict[int, int] = {}
    externals: dict[Var, None] = {}
    inside: set[int] = set()
    passed: set[int] = set()

    def belongs(var: Var) -> bool:
        return any(s[0] == "y" or s[1] in own for s in flow.labels.get(var, {}))

    def passes(op: MarkedOp) -> bool:
        read = [s for v in variables(op.eqn.invars) for s in flow.labels.get(v, {})]
        return mixing and any(s[0] != "y" and s[1] in own for s in read)

    def enters(var: Var) -> bool:
        """Whether the equation behind a variable is part of F; otherwise the variable is an input of it."""
        if var in olds:
            return False
        is_member = bool(member_of.get(var, set()) & own)
        op = op_of.get(var)
        if op is not None:
            ys[op.index], fronts[op.index] = var, op.front
            if not op.primitive.gradient_enabled:
                if not passes(op):
                    return False
                passed.add(op.index)
        elif var not in made or not (is_member or (var not in member_of and belongs(var))):
            externals[var] = None
            return False
        inside.add(made[var])
        return True

    for _ in before(eqns, made, news, enters):
        pass
    values = known_constants(info)
    constants = {v: values[v] for v in externals if v in values}
    varying = tuple(v for v in externals if v not in constants)
    return Slice(
        tuple(sorted(inside)),
        olds,
        dict(sorted(ys.items())),
        fronts,
        varying,
        constants,
        news,
        frozenset(passed),
        mixing,
    )


def evaluate_slice(
    eqns: Sequence[JaxprEqn],
    part: Slice,
    olds: Sequence[jax.Array],
    ys: Mapping[int, jax.Array],
    externals: Sequence[jax.Array],
) -> list[jax.Array]:
    """New values of F; operations inside F add their held-fixed value's perturbation, links are cut."""
    env = part.constants | dict(zip(part.externals, externals)) | dict(zip(part.olds, olds))
    env |= {part.ys[k]: y for k, y in ys.items()}
    op_index = {v: k for k, v in part.ys.items()}
    # An operation that F passes through holds the other operations fixed, but for what they do to hidden values.
    held = {part.ys[k]: jax.lax.stop_gradient(y) for k, y in ys.items()} if part.passed else {}
    read_held = lambda v: read(env, v) if isinstance(v, Literal) or v not in held else held[v]  # noqa: E731
    for position in part.positions:
        eqn = eqns[position]
        if is_marked(eqn):
            y = eqn.outvars[eqn.primitive.y_index]
            number = op_index[y]
            values = [read_held(v) if number in part.passed else read(env, v) for v in eqn.invars]
            outs = eqn.primitive.outputs(values, eqn.params)
            if part.passed:
                held[y] = outs[eqn.primitive.y_index]
            given = ys[number]
            outs[eqn.primitive.y_index] += given - jax.lax.stop_gradient(given)
        else:
            outs = bind_without_links(eqn, [read(env, v) for v in eqn.invars])
            if not held.keys().isdisjoint(variables(eqn.invars)):
                own = bind_without_links(eqn, [read_held(v) for v in eqn.invars])
                held.update((v, o) for v, o in zip(eqn.outvars, own) if v not in part.news)
        env.update(zip(eqn.outvars, outs))
    return [jnp.asarray(read(env, v)) for v in part.news]


def slice_labels(
    eqns: Sequence[JaxprEqn], part: Slice, varshape: Shape
) -> tuple[list[dict[int, Label]], list[dict[int, Label]]]:
    """For each new value: its labels by old value, and by operation output."""
    env = {v: {("old", i): own_label(v.aval.shape, len(varshape))} for i, v in enumerate(part.olds)}
    env |= {v: {("y", k): y_label(v.aval.shape, part.fronts[k])} for k, v in part.ys.items()}
    op_index = {v: k for k, v in part.ys.items()}
    behind = set(part.news)  # the new values, and what is computed from them within the step
    for position in part.positions:
        if not behind.isdisjoint(variables(eqns[position].invars)):
            behind.update(eqns[position].outvars)

    def through(eqn: JaxprEqn, inputs: list[Labels]) -> list[Labels] | None:
        if not is_marked(eqn):
            return None
        y = eqn.outvars[eqn.primitive.y_index]
        number = op_index[y]
        if number in part.passed:
            known = through_operation(eqn, inputs, part.constants)
            if behind.isdisjoint(variables(eqn.invars)):
                known = {s: label for s, label in known.items() if s[0] != "y"}  # held fixed there
        else:
            known = inputs[eqn.primitive.x_index]
        return [
            (known | {("y", number): y_label(y.aval.shape, part.fronts[number])}) if v is y else {} for v in eqn.outvars
        ]

    propagate([eqns[p] for p in part.positions], env, through, part.constants)
    by_old, by_y = [], []
    for new in part.news:
        labels = {} if isinstance(new, Literal) else env.get(new, {})
        by_old.append({s[1]: lab for s, lab in labels.items() if s[0] == "old"})
        by_y.append({s[1]: lab for s, lab in labels.items() if s[0] == "y"})
    return by_old, by_y


def mixed_output_axes(label: Label, y_shape: Shape, varshape: Shape) -> tuple[int, ...]:
    """Group axes along which a position depends on another entry of y, or shares its entry with other positions."""
    lead = len(varshape) - len(y_shape)
    if lead < 0 or varshape[lead:] != y_shape:
        return tuple(range(len(varshape)))
    return (*range(lead), *displaced_axes(label, y_shape, varshape))


def displaced_axes(label: Label, y_shape: Shape, varshape: Shape) -> tuple[int, ...]:
    """Group axes along which a position depends on another entry than the one that broadcasting gives it."""
    lead = len(varshape) - len(y_shape)
    if lead < 0 or any(n not in (1, size) for n, size in zip(y_shape, varshape[lead:])):
        return tuple(range(len(varshape)))
    own = own_label(label[0].shape, len(varshape))
    ids = {k: label[k - lead + 1] for k in range(lead, len(varshape)) if y_shape[k - lead] == varshape[k]}
    return tuple(k for k, at in ids.items() if not np.all((at == own[k + 1]) | (at == NONE)))


def is_shared(label: Label, y_shape: Shape, varshape: Shape, front: int) -> bool:
    """Whether positions share entries of y as broadcasting does, and depend on no others."""
    return not front and y_shape != varshape and not displaced_axes(label, y_shape, varshape)


def mixed_axes(
    old_labels: Mapping[int, Label], y_labels: Mapping[int, Label], y_shapes: Mapping[int, Shape], varshape: Shape
) -> tuple[int, ...]:
    axes: set[int] = set()
    for label in old_labels.values():
        axes.update(unaligned_axes(label, varshape))
    for k, label in y_labels.items():
        axes.update(mixed_output_axes(label, y_shapes[k], varshape))
    return tuple(sorted(axes))
