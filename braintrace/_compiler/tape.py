"""The step as a program whose reverse pass yields the learning signals.

Zeros are added to three kinds of values; their cotangents are what a learning rule needs:

- to a group's *new* values, for everything that reads them except the group's own program F: the signal L,
  explicit, because paths through other members of the group stay inside F, which D and df account for;
- to a group's *old* values, for everything that reads them except F and whatever leads back into F: the signal L⁻;
- to an operation's output: its total cotangent.

An equation that both F and the rest of the step need is evaluated in both *worlds*, which differ only by zeros, so
that XLA computes it once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._jax import Literal, bind_equation, consts_of, eval_jaxpr, prune, reads
from .._types import Path
from .descent import bind_without_links, holds_link, is_link
from .flatten import is_marked
from .flow import Flow, Reach
from .groups import HiddenGroup
from .module_info import ModuleInfo
from .relations import HiddenParamOpRelation

__all__ = ["Tape", "TapeRecord", "Zeros", "build_tape"]


class Zeros(NamedTuple):
    """The added zeros; as cotangents they are the signals."""

    new: dict[Path, jax.Array]
    old: dict[Path, jax.Array]
    y: dict[int, jax.Array]  # operation number -> like its output


class TapeRecord(NamedTuple):
    """What one step leaves for the trace update."""

    x: tuple[Any, ...]  # per operation: its input, or None
    fixed: tuple[dict[int, Any], ...]  # per operation: operands that are neither trained nor the input, by position
    varying: tuple[tuple[Any, ...], ...]  # per group: the varying entries of D and df


class Tape(NamedTuple):
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

    program: Any
    in_tree: Any
    out_tree: Any
    zeros_like: Any
    recorder: Recorder

    def zeros(self) -> Zeros:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.zeros_like)

    def __call__(
        self, invals: Sequence[Any], operands: Sequence[Mapping[str, Any]], zeros: Zeros
    ) -> tuple[list[Any], TapeRecord]:
        flat, tree = jax.tree.flatten((list(invals), [dict(o) for o in operands], zeros))
        assert tree == self.in_tree, (tree, self.in_tree)
        return jax.tree.unflatten(self.out_tree, eval_jaxpr(self.program, *flat))

    def record(self, invals: Sequence[Any], operands: Sequence[Mapping[str, Any]]) -> TapeRecord:
        """What the step leaves for the trace update, without running the rest of it."""
        program, tree = self.recorder.program
        flat = jax.tree.leaves((list(invals), [dict(o) for o in operands]))
        return jax.tree.unflatten(tree, eval_jaxpr(program, *flat))


class Recorder:
    """What a step leaves for the trace update, as a program without side effects; made when first asked for."""

    def __init__(self, worlds: _Worlds, invals: Any, operands: Any):
        self._worlds, self._shapes = worlds, (invals, operands)

    @functools.cached_property
    def program(self) -> tuple[Any, Any]:
        """``(step inputs, operands) -> record`` as a closed jaxpr, and the structure of the record."""

        def record(invals, operands):
            return self._worlds.run(invals, operands, Zeros({}, {}, {}), effects=False)[1]

        closed, shape = jax.make_jaxpr(record, return_shape=True)(*self._shapes)
        tree: Any = jax.tree.structure(shape)
        return prune(closed), tree


class _World(NamedTuple):
    """How a value is seen: groups whose old values are bare, and the group whose new values are."""

    bare_old: frozenset
    bare_new: int | None


_REST = _World(frozenset(), None)


def build_tape(
    info: ModuleInfo,
    flow: Flow,
    reach: Reach,
    groups: Sequence[HiddenGroup],
    operations: Sequence[HiddenParamOpRelation],
) -> Tape:
    jaxpr = info.jaxpr
    shape_of: Any = lambda v: jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)  # noqa: E731
    differentiable: dict[Path, Any] = {
        p: shape_of(v) for p, v in info.hidden_path_to_invar.items() if jnp.issubdtype(v.aval.dtype, jnp.inexact)
    }
    everything: Any = Zeros(
        new=dict(differentiable),
        old=dict(differentiable),
        y={i: shape_of(r.y_var) for i, r in enumerate(operations) if not r.residual_free},
    )
    evaluator = _Worlds(info, flow, reach, groups, operations)
    invals = [shape_of(v) for v in jaxpr.invars]
    operands = [{k: shape_of(v) for k, v in r.trainable_vars.items()} for r in operations]

    def trace(zeros):
        closed, out_shape = jax.make_jaxpr(evaluator.run, return_shape=True)(invals, operands, zeros)
        return closed, jax.tree.structure(out_shape), jax.tree.structure((invals, operands, zeros))

    # Keep only the zeros that the step's outputs (not the records) can feel: equations as a whole tell of most.
    felt = evaluator.felt(everything)
    kept = everything._replace(old={p: s for p, s in everything.old.items() if p in felt})
    closed, out_tree, in_tree = trace(kept)
    num_outs = len(jaxpr.outvars)
    read: Zeros = jax.tree.unflatten(in_tree, reads(closed, [i < num_outs for i in range(out_tree.num_leaves)]))[2]
    if not all(read.old.values()):
        kept = kept._replace(old={p: s for p, s in kept.old.items() if read.old[p]})
        closed, out_tree, in_tree = trace(kept)
    return Tape(prune(closed), in_tree, out_tree, kept, Recorder(evaluator, invals, operands))


class _Worlds:
    """Evaluates the step in several worlds at once; see the module's docstring."""

    def __init__(self, info, flow, reach, groups, operations):
        self.info, self.groups, self.operations = info, groups, operations
        self.eqns = info.jaxpr.eqns
        self.consts = dict(zip(info.jaxpr.constvars, consts_of(info.closed_jaxpr)))
        self.number = {v: i for i, v in enumerate(info.jaxpr.invars)}
        self.made_at = {v: i for i, e in enumerate(self.eqns) for v in e.outvars}
        self.group_of = {p: g.index for g in groups for p in g.hidden_paths}
        self.path_of_old = {v: p for p, v in info.hidden_path_to_invar.items()}
        self.owner = {v: paths[0] for v, paths in flow.members.items()}
        self.position_of = [flow.ops[r.op_index].position for r in operations]
        self.operation_at = {position: i for i, position in enumerate(self.position_of)}
        # Whatever leads into F, or into anything that leads there, sees bare old values.
        downstream = [
            frozenset().union(*(reach.groups(info.hidden_path_to_outvar[p]) for p in g.hidden_paths if self._is_var(p)))
            for g in groups
        ]
        self.leads_to = [downstream[g.index] | {g.index} for g in groups]
        # Operations that a group's F passes through are like its other equations.
        self.passed = {op.position for op in flow.ops for g in groups if op.position in g.inside}
        self.x_world = {}
        self.link_world = {}  # of loops with links, which read as operations do
        for position, eqn in enumerate(self.eqns):
            if position in self.operation_at or holds_link(eqn):
                fed = frozenset().union(*map(reach.groups, eqn.outvars))
                world = _World(frozenset().union(*(self.leads_to[g] for g in fed)), None)
                loop = position not in self.operation_at and not is_link(eqn)
                (self.link_world if loop else self.x_world)[position] = world
        self.op_world = {p: w for p, w in self.x_world.items() if p not in self.passed}
        self._find_dependence()

    def _is_var(self, path):
        return not isinstance(self.info.hidden_path_to_outvar[path], Literal)

    def _find_dependence(self):
        """Per equation: groups whose old / new values it depends on without passing a hidden value or operation."""
        self.old_of, self.new_of = {}, {}
        old, new = {}, {}
        for v, p in self.path_of_old.items():
            old[v] = frozenset([self.group_of[p]])
        for i, eqn in enumerate(self.eqns):
            inputs = [v for v in eqn.invars if not isinstance(v, Literal)]
            self.old_of[i] = frozenset().union(*(old.get(v, frozenset()) for v in inputs))
            self.new_of[i] = frozenset().union(*(new.get(v, frozenset()) for v in inputs))
            for v in eqn.outvars:
                if v in self.owner:
                    new[v], old[v] = frozenset([self.group_of[self.owner[v]]]), frozenset()
                elif i in self.operation_at and i not in self.passed:
                    new[v], old[v] = frozenset(), frozenset()
                else:
                    new[v], old[v] = self.new_of[i], self.old_of[i]

    # -- which world a reader's value lives in ------------------------------------------------------------------

    def _input_world(self, position, asked):
        """The world in which an equation that is needed in the world ``asked`` reads its inputs."""
        if position in self.op_world:
            return self.op_world[position]
        if asked.bare_new is not None and position not in self.groups[asked.bare_new].inside:
            return _World(self.leads_to[asked.bare_new], None)
        return asked

    def _key(self, position, asked):
        """That world without what the equation does not depend on: equal keys are equal values."""
        world = self._input_world(position, asked)
        bare_new = world.bare_new if world.bare_new in self.new_of[position] else None
        return _World(world.bare_old & self.old_of[position], bare_new)

    def _linked(self, position, world, zeros):
        """The world in which the links of an equation read its inputs, as operations do, if another than ``world``."""
        linked = self.link_world.get(position)
        if linked is None:
            return None
        asked, linked_key = self._key(position, world), self._key(position, linked)
        felt = {self.group_of[p] for p in zeros.old} & (asked.bare_old ^ linked_key.bare_old)
        return linked if felt or asked.bare_new != linked_key.bare_new else None

    def _needs(self, var, world):
        """(position, world) of the equation behind a variable, if any."""
        if isinstance(var, Literal) or var not in self.made_at:
            return None
        if var in self.owner:
            g = self.group_of[self.owner[var]]
            return self.made_at[var], _World(self.leads_to[g], g)
        return self.made_at[var], world

    # -- evaluation ---------------------------------------------------------------------------------------------

    def felt(self, zeros) -> set[Path]:
        """Old values whose added zeros the outputs depend on, taking every equation as a whole."""
        sinks = self._sinks()
        plan = self._plan(sinks, True, zeros)
        found: dict[Any, set[Path]] = {}

        def of(var, world):
            need = self._needs(var, world)
            if need is not None:
                return found[need[0], self._key(*need)]
            path = None if isinstance(var, Literal) else self.path_of_old.get(var)
            return {path} if path in zeros.old and self.group_of[path] not in world.bare_old else set()

        for position in sorted(plan):
            for key, world in plan[position].items():
                worlds = [w for w in (world, self._linked(position, world, zeros)) if w is not None]
                found[position, key] = set().union(*(of(v, w) for v in self._inputs(position) for w in worlds))
        return set().union(*(of(*sink) for sink in sinks))

    def _sinks(self):
        """The outputs of the step, and the worlds that they are read in."""
        info = self.info
        sinks = [(v, _REST) for v in info.jaxpr.outvars[: info.num_var_out]]
        for path, outvar in zip(self._leaf_paths(), info.jaxpr.outvars[info.num_var_out :]):
            sinks.append((outvar, _REST if path is None else self._own_world(path)))
        return sinks

    def run(self, invals, operands, zeros, effects=True):
        info = self.info
        sinks = self._sinks()
        traced = {g.index for r in self.operations for g in r.hidden_groups}
        frontiers = [
            [(v, _World(self.leads_to[g.index], None)) for v in g.cut.inputs] if g.index in traced else None
            for g in self.groups
        ]
        worlds = [self.x_world[position] for position in self.position_of]
        xs = [None if r.x_var is None else (r.x_var, world) for r, world in zip(self.operations, worlds)]
        fixed = [{i: (v, world) for i, v in r.fixed_vars.items()} for r, world in zip(self.operations, worlds)]
        wanted = [*sinks, *(f for fs in frontiers for f in fs or ()), *(x for x in xs if x is not None)]
        wanted += [item for items in fixed for item in items.values()]

        plan = self._plan(wanted, effects, zeros)
        values = self._evaluate(plan, invals, operands, zeros)
        read = lambda item: self._read(*item, values, invals, zeros)  # noqa: E731
        outs = []
        leaf_paths = [None] * info.num_var_out + self._leaf_paths()
        for path, (var, world) in zip(leaf_paths, sinks):
            value = jnp.asarray(read((var, world)))
            if path is not None and path in zeros.new:
                value = value + zeros.new[path].astype(value.dtype)
            outs.append(value)
        stop = jax.lax.stop_gradient
        varying = tuple(
            tuple(g.cut.varying([stop(read(item)) for item in items])) if items is not None else ()
            for g, items in zip(self.groups, frontiers)
        )
        return outs, TapeRecord(
            tuple(None if x is None else stop(read(x)) for x in xs),
            tuple({i: stop(jnp.asarray(read(item))) for i, item in items.items()} for items in fixed),
            varying,
        )

    def _leaf_paths(self):
        """Per state leaf among the outputs: the hidden path, or None."""
        out = []
        for path, leaves in zip(self.info.compiled_state_paths, self.info.state_leaves):
            out.extend(path if path in self.group_of else None for _ in leaves)
        return out

    def _own_world(self, path):
        g = self.group_of[path]
        return _World(self.leads_to[g], g)

    def _plan(self, wanted, effects, zeros):
        plan: dict[int, dict[_World, _World]] = {}  # equation -> key -> world of its inputs

        def need_in(position, world):
            key = self._key(position, world)
            plan.setdefault(position, {})[key] = self._input_world(position, world)

        def ask(var, world):
            need = self._needs(var, world)
            if need is not None:
                position, world = need
                need_in(position, world)

        for position, eqn in enumerate(self.eqns):
            if eqn.effects and effects:
                need_in(position, _REST)
        for var, world in wanted:
            ask(var, world)
        for position in range(len(self.eqns) - 1, -1, -1):
            for world in plan.get(position, {}).values():
                for w in (world, self._linked(position, world, zeros)):
                    for var in self._inputs(position) if w is not None else ():
                        ask(var, w)
        return plan

    def _inputs(self, position):
        """Variables that an equation reads; the trained operands of an operation are given from outside."""
        eqn = self.eqns[position]
        if position not in self.operation_at:
            return eqn.invars
        operation = self.operations[self.operation_at[position]]
        slots = operation.primitive.trainables(eqn.params)
        given = {slots[k] for k in operation.trainable_vars}
        return [v for i, v in enumerate(eqn.invars) if i not in given]

    def _evaluate(self, plan, invals, operands, zeros):
        values: dict[Any, Any] = {}
        for position in sorted(plan):
            eqn = self.eqns[position]
            for key, world in plan[position].items():
                if position in self.operation_at:
                    outs = self._apply(position, world, values, invals, operands, zeros)
                else:
                    args = [self._read(v, world, values, invals, zeros) for v in eqn.invars]
                    linked = self._linked(position, world, zeros)
                    if linked is not None:
                        outs = self._bind_in_two(eqn, args, linked, values, invals, zeros)
                    else:
                        outs = eqn.primitive.outputs(args, eqn.params) if is_marked(eqn) else bind_equation(eqn, args)
                values[position, key] = outs
        return values

    def _bind_in_two(self, eqn, args, linked, values, invals, zeros):
        """Links see one world, everything else in the equation another one."""
        args_of_links = [self._read(v, linked, values, invals, zeros) for v in eqn.invars]
        outs, own = bind_equation(eqn, args_of_links), bind_without_links(eqn, args_of_links)
        return [
            out + (value - same) if jnp.issubdtype(out.dtype, jnp.inexact) else out
            for out, value, same in zip(outs, bind_without_links(eqn, args), own)
        ]

    def _apply(self, position, world, values, invals, operands, zeros):
        eqn, i = self.eqns[position], self.operation_at[position]
        operation = self.operations[i]
        slots = operation.primitive.trainables(eqn.params)
        given = {slots[k]: w for k, w in operands[i].items()}
        args = [
            given[n] if n in given else self._read(v, world, values, invals, zeros) for n, v in enumerate(eqn.invars)
        ]
        outs = operation.primitive.outputs(args, eqn.params)
        if i in zeros.y:
            outs[operation.primitive.y_index] += zeros.y[i]
        return outs

    def _read(self, var, world, values, invals, zeros):
        if isinstance(var, Literal):
            return var.val
        need = self._needs(var, world)
        if need is None:
            return self._input(var, world, invals, zeros)
        position, asked = need
        key = self._key(position, asked)
        value = values[position, key][self.eqns[position].outvars.index(var)]
        path = self.owner.get(var)
        if path is not None and path in zeros.new and world.bare_new != self.group_of[path]:
            value = value + zeros.new[path].astype(value.dtype)
        return value

    def _input(self, var, world, invals, zeros):
        if var in self.consts:
            return self.consts[var]
        value = invals[self.number[var]]
        path = self.path_of_old.get(var)
        if path is not None and path in zeros.old and self.group_of[path] not in world.bare_old:
            value = value + zeros.old[path]
        return value
