"""The equations between old hidden values, outputs of operations and new hidden values of one group: the program F."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .._jax import Atom, ClosedJaxpr, JaxprEqn, Literal, Var, hashed, structs
from .._program import Value, before, made_at, read, variables
from .._types import Path, Shape
from .descent import bind_without_links
from .flow import Flow, MarkedOp, through_operation, y_label
from .frame import is_marked
from .labels import NONE, Label, Labels, own_label, unaligned_axes
from .module_info import ModuleInfo, known_constants
from .positions import propagate

__all__ = [
    "Slot", "Transition", "displaced_axes", "is_shared", "mixed_axes", "mixed_output_axes", "transition_of",
]  # fmt: skip


Slot = tuple[int, int | None]  # of a hidden variable: the number of the member, and of its component or None


@dataclasses.dataclass(frozen=True, eq=False)
class Transition:
    """The program F of a group, from old values and everything that it reads beside them to new values.

    In a scope that sees the recurrent mixing, F passes through the operations that read its hidden values.

    Attributes
    ----------
    eqns : tuple of JaxprEqn
        Its equations, in order.
    inside : frozenset of int
        Their numbers in the step.
    olds, news : tuple of Var
        Old and new values of the members.
    ys : dict
        Operation index -> output, held fixed.
    fronts : dict
        Operation index -> axes of the output in front of those of one sub-step.
    externals : tuple of Var
        Everything else that F reads.
    constants : dict
        Known values among what it reads.
    passed : frozenset of int
        Operations that F passes through, transparent ones apart.
    mixing : bool
        Whether F passes through what mixes positions.
    """

    eqns: tuple[JaxprEqn, ...]
    inside: frozenset[int]
    olds: tuple[Var, ...]
    ys: dict[int, Var]
    fronts: dict[int, int]
    externals: tuple[Var, ...]
    constants: dict[Var, ArrayLike]
    news: tuple[Atom, ...]
    passed: frozenset[int] = frozenset()
    mixing: bool = False

    @property
    def beside(self) -> tuple[Var, ...]:
        """What F reads beside the old values: operation outputs, then everything else."""
        return (*self.ys.values(), *self.externals)

    @property
    def inputs(self) -> tuple[Var, ...]:
        return (*self.olds, *self.beside)

    @functools.cached_property
    def program(self) -> ClosedJaxpr:
        """``(old values, values beside them) -> new values`` as a closed jaxpr."""
        return jax.make_jaxpr(self)(structs(self.olds), structs(self.beside))

    def __call__(self, olds: Sequence[jax.Array], beside: Sequence[jax.Array]) -> list[jax.Array]:
        """New values."""
        return self.run(olds, dict(zip(self.ys, beside)), beside[len(self.ys) :])

    def run(
        self, olds: Sequence[jax.Array], ys: Mapping[int, jax.Array], externals: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """New values; operations inside F add their held-fixed value's perturbation, links are cut."""
        env: dict[Var, Value] = {**self.constants, **dict(zip(self.externals, externals)), **dict(zip(self.olds, olds))}
        env |= {self.ys[k]: y for k, y in ys.items()}
        op_index = {v: k for k, v in self.ys.items()}
        # An operation that F passes through holds the other operations fixed, but for what they do to hidden values.
        held = {self.ys[k]: jax.lax.stop_gradient(y) for k, y in ys.items()} if self.passed else {}
        read_held = lambda v: read(env, v) if isinstance(v, Literal) or v not in held else held[v]  # noqa: E731
        for eqn in self.eqns:
            if is_marked(eqn):
                y = eqn.outvars[eqn.primitive.y_index]
                number = op_index[y]
                values = [read_held(v) if number in self.passed else read(env, v) for v in eqn.invars]
                outs = eqn.primitive.outputs(values, eqn.params)
                if self.passed:
                    held[y] = outs[eqn.primitive.y_index]
                given = ys[number]
                outs[eqn.primitive.y_index] += given - jax.lax.stop_gradient(given)
            else:
                outs = bind_without_links(eqn, [read(env, v) for v in eqn.invars])
                if not held.keys().isdisjoint(variables(eqn.invars)):
                    own = bind_without_links(eqn, [read_held(v) for v in eqn.invars])
                    held.update((v, o) for v, o in zip(eqn.outvars, own) if v not in self.news)
            env.update(zip(eqn.outvars, outs))
        return [jnp.asarray(read(env, v)) for v in self.news]

    def labels(self, varshape: Shape) -> tuple[list[dict[int, Label]], list[dict[int, Label]]]:
        """For each new value: its labels by old value, and by operation output."""
        env = {v: {("old", i): own_label(v.aval.shape, len(varshape))} for i, v in enumerate(self.olds)}
        env |= {v: {("y", k): y_label(v.aval.shape, self.fronts[k])} for k, v in self.ys.items()}
        op_index = {v: k for k, v in self.ys.items()}
        behind = set(self.news)  # the new values, and what is computed from them within the step
        for eqn in self.eqns:
            if not behind.isdisjoint(variables(eqn.invars)):
                behind.update(eqn.outvars)

        def through(eqn: JaxprEqn, inputs: list[Labels]) -> list[Labels] | None:
            if not is_marked(eqn):
                return None
            y = eqn.outvars[eqn.primitive.y_index]
            number = op_index[y]
            if number in self.passed:
                known = through_operation(eqn, inputs, self.constants)
                if behind.isdisjoint(variables(eqn.invars)):
                    known = {s: label for s, label in known.items() if s[0] != "y"}  # held fixed there
            else:
                known = inputs[eqn.primitive.x_index]
            return [
                (known | {("y", number): y_label(y.aval.shape, self.fronts[number])}) if v is y else {}
                for v in eqn.outvars
            ]

        propagate(self.eqns, env, through, self.constants)
        by_old, by_y = [], []
        for new in self.news:
            labels = {} if isinstance(new, Literal) else env.get(new, {})
            by_old.append({s[1]: lab for s, lab in labels.items() if s[0] == "old"})
            by_y.append({s[1]: lab for s, lab in labels.items() if s[0] == "y"})
        return by_old, by_y

    def form(self) -> Hashable | None:
        """Equal for two that differ in nothing but their variables; ``None`` where that cannot be told."""
        number = {v: i for i, v in enumerate((*self.inputs, *self.constants))}
        kind = lambda v: (v.aval.shape, v.aval.dtype)  # noqa: E731
        name = lambda v: (kind(v), np.asarray(v.val).tobytes()) if isinstance(v, Literal) else number[v]  # noqa: E731
        body = []
        for eqn in self.eqns:
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


def transition_of(info: ModuleInfo, flow: Flow, paths: Sequence[Path], mixing: bool = False) -> Transition:
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
    return Transition(
        tuple(eqns[i] for i in sorted(inside)),
        frozenset(inside),
        olds,
        dict(sorted(ys.items())),
        fronts,
        varying,
        constants,
        news,
        frozenset(passed),
        mixing,
    )


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
