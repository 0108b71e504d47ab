r"""D_RTRL: :math:`\epsilon \leftarrow D \epsilon + \mathrm{df} \otimes x` per weight, sample and hidden variable."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .._binding import Binding, Fixed, Gradients, Operands, Signals, Slots
from .._compiler.groups import HiddenGroup
from .._compiler.relations import HiddenParamOpRelation
from .._compiler.steady import steady_axes
from .._compiler.step import StepRecord
from .._jax import ClosedJaxpr, open_jaxpr
from .._precision import wide, widened
from .._types import PyTree, Shape, path_str
from .engine import Cotangents, Emitted, Engine, bytes_of
from .instant import SlotTrace
from .layout import layout_of
from .param_chunk import ChunkCoefficients, chunk_coefficients, chunk_update
from .record import add, contraction
from .weight_trace import Recursion, WeightTrace, factorised_slots, recursion_of

__all__ = ["ParamEngine", "ParamRecursion", "Taken", "check_anchors"]

Taken: TypeAlias = tuple[StepRecord, Sequence[Operands]]  # of a step
Varying: TypeAlias = Sequence[Sequence[jax.Array]]  # per group the varying entries of D and df
Steady: TypeAlias = tuple[slice, ...] | None  # what leaves one of that which broadcasting repeats, if it repeats


@dataclasses.dataclass(frozen=True)
class ParamRecursion:
    """What the traces obey: ``kind`` says what stands in the place of D (``'jacobian'``, ``'scalar_leak'`` with
    ``decay``, ``'none'``); ``kappa`` is the decay of a filter on top, whose output signals then meet."""

    kind: str = "jacobian"
    decay: float | None = None
    kappa: float | None = None

    def of(self, binding: Binding, group: HiddenGroup, varying: Sequence[jax.Array | np.ndarray]) -> Recursion:
        """D and df of a group, from its varying entries at one step."""
        D = [[e.read(varying) for e in row] for row in group.jacobian.D]
        numbers = {r.op_index: i for i, r in enumerate(binding.graph.hidden_param_op_relations)}
        df = {numbers[k]: [e.read(varying) for e in row] for k, row in group.jacobian.df.items() if k in numbers}
        return recursion_of(D, df, self.kind, self.decay, self.kappa)


@dataclasses.dataclass(frozen=True, eq=False)
class ParamEngine(Engine):
    r""":math:`\nabla = \sum_s \langle L_s, \epsilon_s \rangle`, a :class:`WeightTrace` per relation and group."""

    binding: Binding
    numbers: tuple[int, ...]
    weights: tuple[WeightTrace, ...]  # see :meth:`plan`
    recursion: ParamRecursion
    dtype: DTypeLike | None = None  # of the stored traces
    samples: int | None = None  # mapped ones, where large traces are cut

    @classmethod
    def plan(
        cls, binding: Binding, numbers: Sequence[int], recursion: ParamRecursion, factorise: bool
    ) -> tuple[WeightTrace, ...]:
        """Where the entries of every trace act, and which slots need no entry per weight; ``factorise``: if any may."""
        relations = binding.graph.hidden_param_op_relations
        weights = []
        for i in numbers:
            layout = layout_of(relations[i])
            for g in relations[i].hidden_groups:
                # The values of varying entries do not matter: the structure is that of any step.
                anything = [np.zeros((1,))] * len(open_jaxpr(g.jacobian.program).outvars)
                structure = recursion.of(binding, g, anything)
                slots = factorised_slots(structure, i) if factorise and _may_factorise(relations[i]) else frozenset()
                weights.append(WeightTrace(i, relations[i], g, layout, structure, slots))
        return tuple(weights)

    def init(self) -> dict[str, SlotTrace]:
        return {w.key: w.init(self.dtype, self.samples) for w in self.weights}

    def take(
        self, record: StepRecord, operands: Sequence[Operands], invals: Sequence[jax.Array]
    ) -> tuple[tuple[Taken, None], None]:
        return ((record, operands), None), None

    def advance(self, traces: dict[str, SlotTrace], xs_and_dfs: tuple[Taken, None], Ds: None) -> dict[str, SlotTrace]:
        record, operands = xs_and_dfs[0]
        new = {}
        for w in self.weights:
            recursion = self._recursion(w.group, record.varying[w.group.index])
            x, own, fixed = record.x[w.number], operands[w.number], record.fixed[w.number]
            new[w.key] = w.step(recursion, traces[w.key], x, own, fixed)
        return new

    def _recursion(self, group: HiddenGroup, varying: Sequence[jax.Array]) -> Recursion:
        return self.recursion.of(self.binding, group, varying)

    def forms(self) -> dict[int, tuple[str, int]]:
        traces = jax.eval_shape(self.init)
        found: dict[int, tuple[str, int]] = {}
        for w in self.weights:
            factorised = len(w.factorised) == w.structure.width
            words, size = found.get(w.number, ("per input" if factorised else "per weight", 0))
            found[w.number] = words if factorised else "per weight", size + bytes_of(traces[w.key])
        return found

    # -- what signals make of the traces

    def _met(self, signals: Signals) -> Signals:
        """Signals per slot, with an axis of neighbours where there are some; with a filter they meet filtered slots."""
        groups = self.binding.graph.hidden_groups
        signals = [
            slots if g.snap is None else [None if s is None else g.snap.gather(s) for s in slots]
            for g, slots in zip(groups, signals)
        ]
        return signals if self.recursion.kappa is None else [[*([None] * len(slots)), *slots] for slots in signals]

    def carriers(
        self,
        numbers: Sequence[int],
        traces: dict[str, SlotTrace],
        operands: Sequence[Operands],
        fixed: Sequence[Fixed],
        weights: Sequence[PyTree],
        steps: jax.Array,
    ) -> dict[int, Signals]:
        return {i: self._carrier(i, traces, operands[i], fixed[i]) for i in numbers}

    def _carrier(self, number: int, traces: dict[str, SlotTrace], operands: Operands, fixed: Fixed) -> Signals:
        """Signals whose cotangents are the parameters' part in what they would give: the transpose of contraction."""

        def gradient(signals: Signals) -> Gradients | None:
            met = self._met(signals)
            return add([w.contract(traces[w.key], met[w.group.index], held, fixed) for w in weights])

        held = jax.lax.stop_gradient(operands)
        weights = [w for w in self.weights if w.number == number]
        own = {w.group.index for w in weights}
        relation = weights[0].relation
        dtype = wide(relation.y_var.aval.dtype)
        zeros = [
            [jnp.zeros(g.varshape, dtype) if g.index in own else None] * g.num_state
            for g in self.binding.graph.hidden_groups
        ]
        _, transpose = jax.vjp(gradient, zeros)
        return transpose(widened({k: operands[k] for k in relation.trainable_vars}))[0]

    def contract(
        self, numbers: Sequence[int], traces: dict[str, SlotTrace], signals: Signals, steps: jax.Array
    ) -> dict[int, Signals]:
        own = {i: {g.index for g in self.relations[i].hidden_groups} for i in numbers}
        return {i: [s if g in own[i] else [None] * len(s) for g, s in enumerate(signals)] for i in numbers}

    # -- a chunk

    def chunk_start(self, traces: dict[str, SlotTrace]) -> tuple[()]:
        return ()

    def chunk_step(
        self,
        carry: tuple[()],
        index: jax.Array,
        record: StepRecord,
        operands: Sequence[Operands],
        cotangents: Cotangents,
    ) -> tuple[tuple[()], tuple[Varying, Signals, Signals], set[int]]:
        varying = [
            [v if steady is None else v[steady] for v, steady in zip(values, of_group)]
            for values, of_group in zip(record.varying, self._steady)
        ]
        return carry, (varying, cotangents.new, cotangents.old), set(self.numbers)

    @functools.cached_property
    def _steady(self) -> list[list[Steady]]:
        """Per group and varying entry, the slices that leave one of what broadcasting repeats, or ``None``."""
        return [_slices(g.jacobian.program) for g in self.binding.graph.hidden_groups]

    def chunk_end(
        self,
        traces: dict[str, SlotTrace],
        carry: tuple[()],
        emitted: Emitted,
        operands: Sequence[Operands],
        vmap_shape: Shape,
        length: int,
    ) -> tuple[dict[str, SlotTrace], dict[int, Gradients | None]]:
        varying, new, old = emitted.engine
        # The signals that meet the trace after step t: those of its new values, and of the old values of step t + 1.
        after = [
            [add([n, None if o is None else jnp.concatenate([o[1:], jnp.zeros_like(o[:1])])]) for n, o in zip(*slots)]
            for slots in zip(new, old)
        ]
        entry = [[None if o is None else o[0] for o in slots] for slots in old]
        after, entry = self._met(after), self._met(entry)
        traces = dict(traces)
        gradients: dict[int, Gradients | None] = {}
        by_group: dict[int, list[WeightTrace]] = {}
        for w in self.weights:
            by_group.setdefault(w.group.index, []).append(w)
        found = self._coefficients(list(by_group.values()), varying, after, vmap_shape, length)
        for (index, weights), coefficients in zip(by_group.items(), found):
            for w in weights:
                source = self.binding.source(w.number)
                inputs = emitted.x.get(source), operands[w.number], emitted.fixed.get(w.number, {})
                gradient = _chunk_gradient(w, traces[w.key], coefficients, inputs, entry[index], len(vmap_shape))
                gradients[w.number] = add([gradients.get(w.number), gradient])
                traces[w.key] = chunk_update(w, traces[w.key], coefficients, *inputs, vmap_shape)
        return traces, gradients

    def _coefficients(
        self,
        of_groups: Sequence[Sequence[WeightTrace]],
        varying: Varying,
        signals: Signals,
        vmap_shape: Shape,
        length: int,
    ) -> list[ChunkCoefficients]:
        def of_sample(varying: Varying, signals: Signals) -> list[ChunkCoefficients]:
            parts = []
            for weights in of_groups:
                group = weights[0].group
                read = functools.partial(self._recursion, group)
                parts.append((read, varying[group.index], signals[group.index], weights))
            return chunk_coefficients(parts, length)

        if vmap_shape:
            out_axes = [ChunkCoefficients(1, 1, 0, 0)] * len(of_groups)  # type: ignore[arg-type]
            of_sample = jax.vmap(of_sample, in_axes=1, out_axes=out_axes, axis_size=vmap_shape[0])
        return of_sample(varying, signals)


def _slices(program: ClosedJaxpr) -> list[Steady]:
    found: list[Steady] = []
    for var, axes in zip(open_jaxpr(program).outvars, steady_axes(program)):
        short = [k in axes and n > 1 for k, n in enumerate(var.aval.shape)]
        found.append(tuple(slice(1) if s else slice(None) for s in short) if any(short) else None)
    return found


def check_anchors(relations: Iterable[HiddenParamOpRelation]) -> None:
    """Refuse operations whose trace entries are not known to belong to one position each."""
    for r in relations:
        rule = r.primitive.rules.snap_anchor
        if rule is None or not rule(r.eqn_params):
            raise NotImplementedError(
                f"{r.primitive.name} at {path_str(r.path)!r} does not say that every weight belongs to one "
                "position, which SnAp needs. Register the rule snap_anchor=lambda params: True on the operation "
                "if each of its weights acts on one entry of the output, or use another rule."
            )


def _chunk_gradient(
    weight: WeightTrace,
    trace: SlotTrace,
    coefficients: ChunkCoefficients,
    inputs: tuple[jax.Array | None, Operands, Fixed],
    entry: Slots,
    vmap_ndim: int,
) -> Gradients | None:
    x, operands, fixed = inputs
    cotangent = coefficients.y[weight.number]
    parts: list[Gradients | None] = []
    if cotangent is not None:
        parts.append(contraction(weight.relation, x, cotangent, operands, fixed, 1 + vmap_ndim))
    meets = [add([q, c]) for q, c in zip(entry, coefficients.entry)]
    at_entry = jax.tree.map(lambda v: v[0], fixed)
    parts.append(weight.contract(trace, meets, operands, at_entry, vmap_ndim))
    return add(parts)


def _may_factorise(relation: HiddenParamOpRelation) -> bool:
    rules = relation.primitive.rules
    own_layout = any(rule is not None for rule in (rules.dt_to_t, rules.init_drtrl, rules.pp_x_repr))
    linear = set(relation.linear_keys) == set(relation.trainable_vars) and not relation.fixed_vars
    alone = relation.x_var is None or relation.sub_steps is not None
    followed = any(g.snap is not None for g in relation.hidden_groups)
    return linear and not (own_layout or alone or followed)
