"""pp_prop: traces that factorise into one filtered input and one filtered sensitivity per relation.

An offset of an operation is a weight whose input is 1. What a filter makes of this input is the same number everywhere,
known from the count of steps, so that there is no array for it: see :func:`filtered_one`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from .._binding import Binding, Fixed, Gradients, Operands, Signals
from .._compiler.diagnostics import CompilationRecord, DiagnosticKind, DiagnosticLevel
from .._compiler.groups import HiddenGroup
from .._compiler.relations import HiddenParamOpRelation
from .._compiler.step import StepRecord
from .._jax import zeros
from .._precision import wide, widened
from .._types import PyTree, Shape, path_str
from .engine import Cotangents, Emitted, Engine, bytes_of
from .record import (
    Jacobian,
    Sensitivity,
    add,
    contraction,
    over_groups,
    pair_key,
    placed,
    read_record,
    spread,
    weighted_sum,
    x_aval,
    x_keys,
)

__all__ = ["IOEngine", "IOTrace"]


class IOTrace(NamedTuple):
    """Traces by key: the filtered input, and the filtered sensitivity, of shape ``V + (S,)``."""

    xs: dict[str, jax.Array]
    dfs: dict[str, jax.Array]


class SplitTrace(NamedTuple):
    """The same while they advance: of a sensitivity, a list of arrays of shape V, ``None`` where it stays zero.

    See :meth:`IOEngine._split`, :func:`_join`.
    """

    xs: dict[str, jax.Array]
    dfs: dict[str, list[jax.Array | None]]


Contracted: TypeAlias = dict[int, jax.Array]  # relation number -> what signals make of its sensitivity
Ones: TypeAlias = dict[float, jax.Array]  # what every filter of inputs makes of an input that is always 1
IOEmitted: TypeAlias = tuple[dict[str, jax.Array], Contracted, Contracted, tuple[Ones, Ones]]


@dataclasses.dataclass(frozen=True, eq=False)
class IOEngine(Engine):
    r""":math:`\epsilon_x \leftarrow \alpha_x \epsilon_x + x` and
    :math:`\epsilon_f \leftarrow \alpha_f D \epsilon_f + (1-\alpha_f)\, df`; together, with the signals,
    :math:`\nabla = \epsilon_x \otimes \sum_s L_s \epsilon_{f,s} / (1 - \alpha_f^t)`.

    ``decays`` are those of the two filters, per relation; ``recursion`` says what stands in the place of D:
    ``'jacobian'``, ``'scalar_leak'`` (1) or ``'none'`` (0).
    """

    binding: Binding
    numbers: tuple[int, ...]
    decays: Mapping[int, tuple[float, float]]
    recursion: str = "jacobian"

    @functools.cached_property
    def x_keys(self) -> dict[int, str]:
        """Relation number -> key of its x-trace; a relation without an input has none."""
        return x_keys(self.binding.graph, {i: self.decays[i][0] for i in self.numbers})

    @functools.cached_property
    def pairs(self) -> list[tuple[int, HiddenParamOpRelation, HiddenGroup, str]]:
        """Every relation with each of its groups, and the key of their sensitivity."""
        return [(i, r, g, pair_key(r, g.index)) for i, r in self.relations.items() for g in r.hidden_groups]

    @functools.cached_property
    def _driven(self) -> dict[str, frozenset[int]]:
        """Per key the hidden variables that the operation reaches, at once or through D."""
        return {key: self._reached(r, g) for _, r, g, key in self.pairs}

    def _reached(self, relation: HiddenParamOpRelation, group: HiddenGroup) -> frozenset[int]:
        if relation.primitive.rules.init_pp is not None:  # what it begins with need not be zero
            return frozenset(range(group.num_state))
        jacobian = group.jacobian
        reached = {a for a, df in enumerate(jacobian.df[relation.op_index]) if df.kind != "zero"}
        while self.recursion == "jacobian":
            more = {a for a, row in enumerate(jacobian.D) if any(row[b].kind != "zero" for b in reached)}
            if more <= reached:
                break
            reached |= more
        return frozenset(reached)

    def init(self) -> IOTrace:
        xs, dfs = {}, {}
        for i, key in self.x_keys.items():
            aval = x_aval(self.relations[i])
            xs[key] = zeros(aval.shape, wide(aval.dtype))
        for _, r, g, key in self.pairs:
            custom = r.primitive.rules.init_pp
            if custom is not None and r.sub_steps is None and r.y_var.aval.shape == g.varshape:
                own = custom(r.x_var, r.y_var, r.weight_vars, g.num_state)
            else:
                own = zeros((*r.shape_in(g), g.num_state), wide(r.y_var.aval.dtype))
            dfs[key] = widened(own)
        return IOTrace(xs, dfs)

    def take(
        self, record: StepRecord, operands: Sequence[Operands], invals: Sequence[jax.Array] | None
    ) -> tuple[tuple[dict[str, jax.Array], dict[str, Sensitivity]], list[Jacobian]]:
        xs, dfs, Ds = read_record(self.binding.graph, record, operands, self.x_keys)
        return (xs, dfs), Ds

    def advance(
        self,
        traces: IOTrace,
        xs_and_dfs: tuple[Mapping[str, jax.Array], Mapping[str, Sensitivity]],
        Ds: Sequence[Jacobian],
    ) -> IOTrace:
        return _join(self._advance(self._split(traces), *xs_and_dfs, Ds), traces)

    def _split(self, traces: IOTrace) -> SplitTrace:
        def slots(key: str, f: jax.Array) -> list[jax.Array | None]:
            return [f[..., a] if a in self._driven[key] else None for a in range(f.shape[-1])]

        return SplitTrace(traces.xs, {key: slots(key, f) for key, f in traces.dfs.items()})

    def _advance(
        self, trace: SplitTrace, xs: Mapping[str, jax.Array], dfs: Mapping[str, Sensitivity], Ds: Sequence[Jacobian]
    ) -> SplitTrace:
        decay_of = {key: self.decays[i][0] for i, key in self.x_keys.items()}
        new_xs = {k: decay_of[k] * e + xs[k].astype(e.dtype) for k, e in trace.xs.items()}
        new_dfs: dict[str, list[jax.Array | None]] = {}
        for i, r, g, key in self.pairs:
            slots, new_dfs[key], decay = trace.dfs[key], [], self.decays[i][1]
            for a, (slot, df) in enumerate(zip(slots, dfs[key].entries)):
                if slot is None:
                    new_dfs[key].append(None)
                    continue
                if self.recursion == "jacobian":
                    carried = weighted_sum(list(zip(placed(r, g, Ds[g.index].entries[a]), slots)))
                else:
                    carried = slot if self.recursion == "scalar_leak" else None
                value = weighted_sum([(decay, carried), (1.0 - decay, df)])
                new_dfs[key].append(spread(value, slot.shape, slot.dtype))
        return SplitTrace(new_xs, new_dfs)

    def forms(self) -> dict[int, tuple[str, int]]:
        traces = jax.eval_shape(self.init)
        first = {key: i for i, key in reversed(self.x_keys.items())}
        size = {i: bytes_of(traces.xs[key]) for key, i in first.items()}
        for i, _, _, key in self.pairs:
            size[i] = size.get(i, 0) + bytes_of(traces.dfs[key])
        shown = {i: "/".join(f"{d:.4g}" for d in dict.fromkeys(self.decays[i])) for i in self.numbers}
        return {i: (f"filtered, decay {shown[i]}", size[i]) for i in self.numbers}

    def remarks(self) -> list[CompilationRecord]:
        """On weights that the filters take for the same at every step."""
        return [
            CompilationRecord(
                DiagnosticKind.WEIGHT_VARIES,
                DiagnosticLevel.WARNING,
                f"The weight of {r.primitive.name} at {path_str(r.path)!r} is computed with values that change from "
                "step to step (random numbers, inputs, states). pp_prop filters inputs alone, and takes the past as if "
                "these values had been what they are now. Use D_RTRL, or HybridDimVjpAlgorithm with this path in "
                "exact=[...], or multiply the input or the output of the operation by these values.",
                primitive=r.primitive.name,
                weight_path=r.path,
            )
            for i, r in self.relations.items()
            if r.varying and self.decays[i][0]
        ]

    # -- what signals make of the traces

    def carriers(
        self,
        numbers: Sequence[int],
        traces: IOTrace,
        operands: Sequence[Operands],
        fixed: Sequence[Fixed],
        weights: Sequence[PyTree],
        steps: jax.Array,
    ) -> dict[int, jax.Array]:
        of, ones = self.relations, self._ones(steps)
        return {
            i: _carrier(of[i], self._x(traces.xs, i), operands[i], fixed[i], ones[self.decays[i][0]]) for i in numbers
        }

    def contract(
        self, numbers: Sequence[int], traces: IOTrace, signals: Signals, steps: jax.Array
    ) -> dict[int, jax.Array | None]:
        return self._contract(numbers, self._split(traces), signals, steps)

    def _contract(
        self, numbers: Sequence[int], trace: SplitTrace, signals: Signals, steps: jax.Array
    ) -> dict[int, jax.Array | None]:
        """Per relation ``sum_a signal_a * f_a / c``, shaped like its output."""
        corrections = {f: _bias_correction(f, steps) for f in {self.decays[i][1] for i in numbers}}
        found = {}
        for i in numbers:
            r, correction = self.relations[i], corrections[self.decays[i][1]]
            terms = {
                g.index: list(zip(placed(r, g, signals[g.index]), trace.dfs[pair_key(r, g.index)]))
                for g in r.hidden_groups
            }
            total = over_groups(r, terms)
            found[i] = None if total is None else (total / correction).astype(wide(r.y_var.aval.dtype))
        return found

    def _ones(self, steps: jax.Array) -> Ones:
        """What every filter of inputs makes of an input that is always 1."""
        return {decay: filtered_one(decay, steps) for decay in {x for x, _ in self.decays.values()}}

    def _x(self, xs: Mapping[str, jax.Array], number: int) -> jax.Array | None:
        return xs.get(self.x_keys.get(number, ""))

    # -- a chunk: one product over (time, batch) of filtered inputs with the cotangents of the outputs

    def chunk_start(self, traces: IOTrace) -> SplitTrace:
        return self._split(traces)

    def chunk_step(
        self,
        carry: SplitTrace,
        index: jax.Array,
        record: StepRecord,
        operands: Sequence[Operands],
        cotangents: Cotangents,
    ) -> tuple[SplitTrace, IOEmitted, set[int]]:
        def met(trace: SplitTrace, signals: Signals, steps: jax.Array) -> Contracted:
            return {i: c for i, c in self._contract(self.numbers, trace, signals, steps).items() if c is not None}

        before = met(carry, cotangents.old, index)
        (xs, dfs), Ds = self.take(record, operands, None)
        carry = self._advance(carry, xs, dfs, Ds)
        now = met(carry, cotangents.new, index + 1)
        needed = {i for i in (*before, *now) if record.fixed[i]}
        ones = self._ones(index + 1), self._ones(index)
        return carry, (carry.xs if before or now else {}, now, before, ones), needed

    def chunk_end(
        self,
        traces: IOTrace,
        carry: SplitTrace,
        emitted: Emitted,
        operands: Sequence[Operands],
        vmap_shape: Shape,
        length: int,
    ) -> tuple[IOTrace, dict[int, Gradients | None]]:
        del length
        xs, now, before, ones = emitted.engine
        gradients: dict[int, Gradients | None] = {}
        for i, r in self.relations.items():
            inputs = self._x(traces.xs, i), self._x(xs, i)
            fixed = emitted.fixed.get(i, {})
            axes, decay = 1 + len(vmap_shape), self.decays[i][0]
            of_one = ones[0][decay], ones[1][decay]
            gradients[i] = _contract_chunk(r, *inputs, now.get(i), before.get(i), of_one, operands[i], fixed, axes)
        return _join(carry, traces), gradients


def _join(trace: SplitTrace, like: IOTrace) -> IOTrace:
    def whole(key: str, f: jax.Array) -> jax.Array:
        return jnp.stack([spread(slot, f.shape[:-1], f.dtype) for slot in trace.dfs[key]], -1)

    return IOTrace(trace.xs, {key: whole(key, f) for key, f in like.dfs.items()})


def _bias_correction(decay_f: float, steps: jax.Array) -> jax.Array:
    r""":math:`1 - \alpha^n`, accurate for :math:`\alpha` near 1 and for every n; 1 for an empty trace."""
    return jnp.where(steps > 0, _faded(decay_f, steps), 1.0)


def filtered_one(decay_x: float, steps: jax.Array) -> jax.Array:
    r"""The x-trace of an input that is always 1: :math:`(1 - \alpha^n) / (1 - \alpha)`."""
    return _faded(decay_x, steps) / (1.0 - decay_x)


def _faded(decay: float, steps: jax.Array) -> jax.Array:
    r""":math:`1 - \alpha^n`."""
    n = jnp.asarray(steps, jnp.result_type(float))
    return jnp.where(n > 0, 1.0, 0.0) if decay == 0.0 else -jnp.expm1(n * math.log(decay))


def _carrier(
    relation: HiddenParamOpRelation,
    x: jax.Array | None,
    operands: Operands,
    fixed: Fixed,
    one: jax.Array,
) -> jax.Array:
    """An array like the output whose cotangent reaches the operands through the filtered input ``x``, and ``one``."""

    y = jax.ShapeDtypeStruct(relation.y_var.aval.shape, wide(relation.y_var.aval.dtype))
    operands, fixed = widened((dict(operands), dict(fixed)))

    def lift(x: jax.Array | None, factors: Mapping[str, jax.Array]) -> jax.Array:
        moved = {k: _with_factor(w, factors[k]) if k in factors else w for k, w in operands.items()}
        return relation.primitive.lift(x, moved, relation.eqn_params, fixed, y)

    lifted = lift(x, dict.fromkeys(relation.offset_keys, one))
    if x is not None and relation.affine_keys:  # linear in the input but for the value where it is zero
        factors = dict.fromkeys(operands, jnp.zeros_like(one)) | dict.fromkeys(relation.affine_keys, one - 1.0)
        lifted += lift(jnp.zeros_like(x), factors)
    return lifted


def _with_factor(value: jax.Array, factor: jax.Array) -> jax.Array:
    """``value``, with a factor on its cotangent."""
    still = jax.lax.stop_gradient(value)
    return still + (factor * (value - still)).astype(value.dtype)


def _contract_chunk(
    relation: HiddenParamOpRelation,
    x_start: jax.Array | None,
    xs: jax.Array | None,
    now: jax.Array | None,
    before: jax.Array | None,
    ones: tuple[jax.Array, jax.Array],
    operands: Operands,
    fixed: Fixed,
    axes: int,
) -> Gradients | None:
    """Gradient of a chunk of K steps from the filtered inputs ``xs`` of its steps, ``x_start`` at its entry.

    ``now[t]`` is the cotangent that meets the trace after step t, ``before[t]`` the one that meets the trace before;
    ``ones`` are the filtered ones after and before every step.
    """
    after, ahead = ones
    if before is None:
        return None if now is None else contraction(relation, xs, now, operands, fixed, axes, after)
    of_end = xs
    if x_start is not None and xs is not None:
        xs = jnp.concatenate([x_start[None], xs])
    if not fixed.keys() <= relation.constant:  # of step t is also what meets the trace before it
        of_start = None if xs is None else xs[:-1]
        old = contraction(relation, of_start, before, operands, fixed, axes, ahead)
        new = None if now is None else contraction(relation, of_end, now, operands, fixed, axes, after)
        return add([old, new])
    after = jnp.concatenate([ahead[:1], after])
    # Both meet the same K + 1 traces: after step t is before step t + 1.
    nothing = jnp.zeros_like(before[:1])
    total = jnp.concatenate([before, nothing])
    if now is not None:
        total = total + jnp.concatenate([nothing, now])
    if fixed:
        fixed = jax.tree.map(lambda v: jnp.concatenate([v[:1], v]), fixed)
    return contraction(relation, xs, total, operands, fixed, axes, after)
