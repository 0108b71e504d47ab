"""The perturbed step: zeros are added to the step, whose cotangents are the learning signals.

Zeros are added to three kinds of values:

- to a group's *new* values, for everything that reads them except the group's own program F: the signal L,
  explicit, because paths through other members of the group stay inside F, which D and df account for;
- to a group's *old* values, for everything that reads them except F and whatever leads back into F: the signal L⁻;
- to an operation's output: its total cotangent.

So one value is seen in several *views* that differ by zeros: with or without those of some groups' old values, and of
one group's new values. The step is evaluated once, equation by equation, in all views at a time; where the inputs of an
equation are the very same objects in two views, so are its outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import PyTreeDef

from .._jax import (
    Atom,
    ClosedJaxpr,
    JaxprEqn,
    Literal,
    Var,
    bind_equation,
    consts_of,
    eval_jaxpr,
    prune,
    reads,
    struct,
    structs,
)
from .._program import Value, read
from .._types import Path, PyTree
from .descent import bind_without_links, holds_link, is_link
from .flow import Flow, Reach
from .frame import is_marked
from .groups import HiddenGroup
from .module_info import ModuleInfo
from .relations import HiddenParamOpRelation

__all__ = ["PerturbedStep", "StepRecord", "Zeros", "perturb"]


Operands = Sequence[Mapping[str, jax.Array]]  # per operation: its trained operands


class Zeros(NamedTuple):
    """The added zeros; as cotangents they are the signals."""

    new: dict[Path, jax.Array]
    old: dict[Path, jax.Array]
    y: dict[int, jax.Array]  # operation number -> like its output


class StepRecord(NamedTuple):
    """What one step leaves for the trace update."""

    x: tuple[jax.Array | None, ...]  # per operation: its input, or None
    # Per operation: operands that are neither trained nor the input, by position.
    fixed: tuple[dict[int, jax.Array], ...]
    varying: tuple[tuple[jax.Array, ...], ...]  # per group: the varying entries of D and df


class PerturbedStep(NamedTuple):
    """The compiled step.

    Attributes
    ----------
    program : ClosedJaxpr
        ``(step inputs, operands, zeros) -> (step outputs, record)``, all flat.
    zeros_like : Zeros
        Shapes of the zeros that the program takes: only those whose cotangent can be other than zero.
    recorder : Recorder
        ``(step inputs, operands) -> record`` alone.
    """

    program: ClosedJaxpr
    in_tree: PyTreeDef
    out_tree: PyTreeDef
    zeros_like: PyTree
    recorder: Recorder

    def zeros(self) -> Zeros:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.zeros_like)

    def __call__(
        self, invals: Sequence[jax.Array], operands: Operands, zeros: Zeros
    ) -> tuple[list[jax.Array], StepRecord]:
        flat, tree = jax.tree.flatten((list(invals), [dict(o) for o in operands], zeros))
        assert tree == self.in_tree, (tree, self.in_tree)
        return jax.tree.unflatten(self.out_tree, eval_jaxpr(self.program, *flat))

    def record(self, invals: Sequence[jax.Array], operands: Operands) -> StepRecord:
        """What the step leaves for the trace update, without running the rest of it."""
        program, tree = self.recorder.program
        flat = jax.tree.leaves((list(invals), [dict(o) for o in operands]))
        return jax.tree.unflatten(tree, eval_jaxpr(program, *flat))


class Recorder:
    """What a step leaves for the trace update, as a program without side effects; made when first asked for."""

    def __init__(self, views: _Views, invals: PyTree, operands: PyTree):
        self._views, self._shapes = views, (invals, operands)

    @functools.cached_property
    def program(self) -> tuple[ClosedJaxpr, PyTreeDef]:
        """``(step inputs, operands) -> record`` as a closed jaxpr, and the structure of the record."""

        def record(invals: Sequence[jax.Array], operands: Operands) -> StepRecord:
            values = _Values(self._views, operands, Zeros({}, {}, {}))
            return self._views.record(self._views.evaluate(values, invals, effects=False))

        closed, shape = jax.make_jaxpr(record, return_shape=True)(*self._shapes)
        tree: PyTreeDef = jax.tree.structure(shape)
        return prune(closed), tree


def perturb(
    info: ModuleInfo,
    flow: Flow,
    reach: Reach,
    groups: Sequence[HiddenGroup],
    operations: Sequence[HiddenParamOpRelation],
) -> PerturbedStep:
    views = _Views(info, flow, reach, groups, operations)
    invals = structs(info.jaxpr.invars)
    operands = [{k: struct(v) for k, v in r.trainable_vars.items()} for r in operations]
    differentiable: dict[Path, PyTree] = {
        p: struct(v) for p, v in info.hidden_path_to_invar.items() if jnp.issubdtype(v.aval.dtype, jnp.inexact)
    }
    y: dict[int, PyTree] = {i: struct(r.y_var) for i, r in enumerate(operations) if not r.residual_free}

    def step(invals: Sequence[jax.Array], operands: Operands, zeros: Zeros) -> tuple[list[jax.Array], StepRecord]:
        seen = views.evaluate(_Values(views, operands, zeros), invals)
        return views.outputs(seen, zeros), views.record(seen)

    def trace(zeros: Zeros) -> tuple[ClosedJaxpr, PyTreeDef, PyTreeDef]:
        closed, shape = jax.make_jaxpr(step, return_shape=True)(invals, operands, zeros)
        return closed, jax.tree.structure(shape), jax.tree.structure((invals, operands, zeros))

    # Keep only the zeros that the step's outputs (not the records) can feel: equations as a whole tell of most.
    felt = views.felt_by_outputs(views.evaluate(_Dependence(views), [frozenset()] * len(invals)))
    kept = Zeros(differentiable, {p: s for p, s in differentiable.items() if p in felt}, y)
    closed, out_tree, in_tree = trace(kept)
    num_outs = len(info.jaxpr.outvars)
    needed: Zeros = jax.tree.unflatten(in_tree, reads(closed, [i < num_outs for i in range(out_tree.num_leaves)]))[2]
    if not all(needed.old.values()):
        kept = kept._replace(old={p: s for p, s in kept.old.items() if needed.old[p]})
        closed, out_tree, in_tree = trace(kept)
    return PerturbedStep(prune(closed), in_tree, out_tree, kept, Recorder(views, invals, operands))


class _View(NamedTuple):
    """Which values are seen without the zeros that are added to them."""

    plain_old: frozenset[int]  # groups, of their old values
    plain_new: int | None = None  # the group, of its new values


_REST = _View(frozenset())


Seen: TypeAlias = dict[_View, dict[Var, Value]]  # what every variable is in every view


class _Views:
    """The views of a step: which of them every reader reads its inputs in."""

    def __init__(
        self,
        info: ModuleInfo,
        flow: Flow,
        reach: Reach,
        groups: Sequence[HiddenGroup],
        operations: Sequence[HiddenParamOpRelation],
    ):
        self.info, self.groups, self.operations = info, groups, operations
        self.eqns = info.jaxpr.eqns
        self.group_of = {p: g.index for g in groups for p in g.hidden_paths}
        self.owner = {v: paths[0] for v, paths in flow.members.items()}
        self.index_of = [flow.ops[r.op_index].position for r in operations]
        self.operation_at = {index: i for i, index in enumerate(self.index_of)}
        self.invars = [e.invars for e in self.eqns]
        for index, operation in zip(self.index_of, operations):
            self.invars[index] = operation.invars
        # Whatever leads into F, or into anything that leads there, sees plain old values.
        news = [[v for v in g.hidden_outvars if not isinstance(v, Literal)] for g in groups]
        leads_to = [frozenset([g.index]).union(*map(reach.groups, vs)) for g, vs in zip(groups, news)]
        self.into = [_View(names) for names in leads_to]
        self.within = [_View(names, g) for g, names in enumerate(leads_to)]
        # Operations that a group's F passes through are like its other equations; all others read in one view.
        passed = {op.position for op in flow.ops for g in groups if op.position in g.inside}
        self.x_view: dict[int, _View] = {}
        self.own_view: dict[int, _View] = {}
        self.link_view: dict[int, _View] = {}
        for index, eqn in enumerate(self.eqns):
            if index not in self.operation_at and not holds_link(eqn):
                continue
            fed = frozenset[int]().union(*map(reach.groups, eqn.outvars))
            view = _View(frozenset[int]().union(*(leads_to[g] for g in fed)))
            if index not in self.operation_at and not is_link(eqn):
                self.link_view[index] = view  # the links in a loop read as operations do
                continue
            self.x_view[index] = view
            if index not in passed:
                self.own_view[index] = view
        self.all = list(
            dict.fromkeys([_REST, *self.into, *self.within, *self.x_view.values(), *self.link_view.values()])
        )

    def of_inputs(self, index: int, view: _View) -> _View:
        """The view in which an equation that is seen in ``view`` reads its inputs."""
        if index in self.own_view:
            return self.own_view[index]
        if view.plain_new is not None and index not in self.groups[view.plain_new].inside:
            return self.into[view.plain_new]
        return view

    def evaluate(self, values: _Values | _Dependence, invals: Sequence[Value], effects: bool = True) -> Seen:
        """What every variable is in every view: the step run on ``invals`` by the rules of ``values``."""
        info = self.info
        shared = dict(zip(info.jaxpr.constvars, map(values.constant, consts_of(info.closed_jaxpr))))
        shared |= dict(zip(info.jaxpr.invars, invals))
        seen = {view: dict(shared) for view in self.all}
        for path, var in info.hidden_path_to_invar.items():
            plain, shifted = shared[var], values.shifted_old(path, shared[var])
            for view, env in seen.items():
                env[var] = plain if self.group_of[path] in view.plain_old else shifted

        def seen_in(v: Atom, view: _View) -> Value:
            return values.constant(v.val) if isinstance(v, Literal) else seen[view][v]

        for index, eqn in enumerate(self.eqns):
            if eqn.effects and not effects and not eqn.outvars:
                continue
            found: dict[Hashable, tuple[Sequence[Value], list[Value], list[Value]]] = {}
            for view in self.all:
                args = [seen_in(v, self.of_inputs(index, view)) for v in self.invars[index]]
                of_links = [seen_in(v, self.link_view[index]) for v in eqn.invars] if index in self.link_view else args
                key = () if eqn.effects else tuple(map(id, (*args, *of_links)))
                if key not in found:  # what is found keeps its inputs, so that no other object gets their ids
                    found[key] = values.apply(index, args, of_links), args, of_links
                seen[view].update(zip(eqn.outvars, found[key][0]))
            for var in eqn.outvars:
                if var in self.owner:
                    self._shift(var, seen, values)
        return seen

    def _shift(self, var: Var, seen: Seen, values: _Values | _Dependence) -> None:
        """A new hidden value is made within its group, which alone sees it plain."""
        path = self.owner[var]
        within = self.within[self.group_of[path]]
        plain = seen[within][var]
        shifted = values.shifted_new(path, plain)
        for view, env in seen.items():
            env[var] = plain if view.plain_new == within.plain_new else shifted

    def _sinks(self) -> list[tuple[Atom, _View, Path | None]]:
        """The outputs of the step, the view that they are read in, and the path of those that are hidden values."""
        info = self.info
        paths: list[Path | None] = [None] * info.num_var_out
        for path, leaves in zip(info.compiled_state_paths, info.state_leaves):
            paths.extend(path if path in self.group_of else None for _ in leaves)
        return [
            (v, _REST if p is None else self.within[self.group_of[p]], p) for v, p in zip(info.jaxpr.outvars, paths)
        ]

    def outputs(self, seen: Seen, zeros: Zeros) -> list[jax.Array]:
        outs = []
        for var, view, path in self._sinks():
            value = jnp.asarray(read(seen[view], var))
            outs.append(_plus(value, zeros.new[path]) if path in zeros.new else value)
        return outs

    def felt_by_outputs(self, seen: Seen) -> frozenset[Path]:
        return frozenset[Path]().union(*(seen[view][v] for v, view, _ in self._sinks() if not isinstance(v, Literal)))

    def record(self, seen: Seen) -> StepRecord:
        stop = jax.lax.stop_gradient
        envs = [seen[self.x_view[index]] for index in self.index_of]
        traced = {g.index for r in self.operations for g in r.hidden_groups}
        return StepRecord(
            tuple(None if r.x_var is None else stop(read(env, r.x_var)) for r, env in zip(self.operations, envs)),
            tuple(
                {i: stop(jnp.asarray(read(env, v))) for i, v in r.fixed_vars.items()}
                for r, env in zip(self.operations, envs)
            ),
            tuple(
                tuple(g.jacobian.varying([stop(read(seen[self.into[g.index]], v)) for v in g.jacobian.inputs]))
                if g.index in traced
                else ()
                for g in self.groups
            ),
        )


class _Values:
    """Evaluation on arrays."""

    def __init__(self, views: _Views, operands: Operands, zeros: Zeros):
        self.views, self.operands, self.zeros = views, operands, zeros

    def constant(self, value: jax.Array) -> jax.Array:
        return value

    def shifted_old(self, path: Path, value: jax.Array) -> jax.Array:
        return value + self.zeros.old[path] if path in self.zeros.old else value

    def shifted_new(self, path: Path, value: jax.Array) -> jax.Array:
        return _plus(value, self.zeros.new[path]) if path in self.zeros.new else value

    def apply(self, index: int, args: list[jax.Array], of_links: list[jax.Array]) -> list[jax.Array]:
        eqn, views = self.views.eqns[index], self.views
        if index in views.operation_at:
            return self._operate(views.operation_at[index], eqn, args)
        if all(a is b for a, b in zip(args, of_links)):
            return eqn.primitive.outputs(args, eqn.params) if is_marked(eqn) else bind_equation(eqn, args)
        # Links see one view, everything else in the equation another one.
        outs, own = bind_equation(eqn, of_links), bind_without_links(eqn, of_links)
        return [
            out + (value - same) if jnp.issubdtype(out.dtype, jnp.inexact) else out
            for out, value, same in zip(outs, bind_without_links(eqn, args), own)
        ]

    def _operate(self, number: int, eqn: JaxprEqn, args: Sequence[jax.Array]) -> list[jax.Array]:
        """An operation on the trained operands that are given."""
        primitive = self.views.operations[number].primitive
        slots = primitive.trainables(eqn.params)
        args = list(args)
        for key, operand in self.operands[number].items():
            args[slots[key]] = operand
        outs = primitive.outputs(args, eqn.params)
        if number in self.zeros.y:
            outs[primitive.y_index] += self.zeros.y[number]
        return outs


class _Dependence:
    """Evaluation on sets: the old values whose zeros a value depends on, taking every equation as a whole."""

    def __init__(self, views: _Views):
        self.views = views

    def constant(self, value: object) -> frozenset[Path]:
        return frozenset()

    def shifted_old(self, path: Path, value: frozenset[Path]) -> frozenset[Path]:
        return value | {path}

    def shifted_new(self, path: Path, value: frozenset[Path]) -> frozenset[Path]:
        return value

    def apply(self, index: int, args: list[frozenset[Path]], of_links: list[frozenset[Path]]) -> list[frozenset[Path]]:
        eqn = self.views.eqns[index]
        given: Collection[int] = ()
        if index in self.views.operation_at:
            operation = self.views.operations[self.views.operation_at[index]]
            slots = operation.primitive.trainables(eqn.params)
            given = {slots[key] for key in operation.trainable_vars}
        if index in self.views.link_view:
            args = [*args, *of_links]
        felt = frozenset[Path]().union(*(a for i, a in enumerate(args) if i not in given))
        return [felt] * len(eqn.outvars)


def _plus(value: jax.Array, zero: jax.Array) -> jax.Array:
    return value + zero.astype(value.dtype)
