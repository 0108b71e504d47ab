"""Some relations with the exact traces of D_RTRL, the others with those of pp_prop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax

from .._binding import Binding, Fixed, Gradients, Operands, Signals
from .._compiler.diagnostics import CompilationRecord
from .._compiler.step import StepRecord
from .._types import PyTree, Shape
from .engine import Cotangents, Emitted, Engine
from .instant import SlotTrace
from .io import IOEngine, IOTrace
from .param import ParamEngine, Taken
from .record import Jacobian, Sensitivity

__all__ = ["HybridEngine", "HybridTrace"]


class HybridTrace(NamedTuple):
    exact: dict[str, SlotTrace]
    filtered: IOTrace


# What the exact traces take of a step, and inputs and df for the others.
Inputs: TypeAlias = tuple[tuple[Taken, dict[str, jax.Array]], dict[str, Sensitivity]]


@dataclasses.dataclass(frozen=True, eq=False)
class HybridEngine(Engine):
    """Two engines, each of which follows relations of its own."""

    binding: Binding
    numbers: tuple[int, ...]
    exact: ParamEngine
    filtered: IOEngine

    def _parts(self, numbers: Sequence[int]) -> list[tuple[Engine, list[int]]]:
        """Each engine with those of the relations that it follows."""
        return [(e, [i for i in numbers if i in e.numbers]) for e in (self.exact, self.filtered)]

    def init(self) -> HybridTrace:
        return HybridTrace(self.exact.init(), self.filtered.init())

    def take(
        self, record: StepRecord, operands: Sequence[Operands], invals: Sequence[jax.Array]
    ) -> tuple[Inputs, list[Jacobian]]:
        (of_exact, _), _ = self.exact.take(record, operands, invals)
        (xs, dfs), Ds = self.filtered.take(record, operands, invals)
        return ((of_exact, xs), dfs), Ds

    def advance(self, traces: HybridTrace, xs_and_dfs: Inputs, Ds: Sequence[Jacobian]) -> HybridTrace:
        (of_exact, xs), dfs = xs_and_dfs
        exact = self.exact.advance(traces.exact, (of_exact, None), None)
        return HybridTrace(exact, self.filtered.advance(traces.filtered, (xs, dfs), Ds))

    def carriers(
        self,
        numbers: Sequence[int],
        traces: HybridTrace,
        operands: Sequence[Operands],
        fixed: Sequence[Fixed],
        weights: Sequence[PyTree],
        steps: jax.Array,
    ) -> dict[int, PyTree]:
        found: dict[int, PyTree] = {}
        for (engine, own), trace in zip(self._parts(numbers), traces):
            found |= engine.carriers(own, trace, operands, fixed, weights, steps)
        return found

    def contract(
        self, numbers: Sequence[int], traces: HybridTrace, signals: Signals, steps: jax.Array
    ) -> dict[int, PyTree]:
        found: dict[int, PyTree] = {}
        for (engine, own), trace in zip(self._parts(numbers), traces):
            found |= engine.contract(own, trace, signals, steps)
        return found

    def forms(self) -> dict[int, tuple[str, int]]:
        return self.exact.forms() | self.filtered.forms()

    def remarks(self) -> list[CompilationRecord]:
        return self.filtered.remarks()

    # -- a chunk

    def chunk_start(self, traces: HybridTrace) -> tuple[PyTree, PyTree]:
        return self.exact.chunk_start(traces.exact), self.filtered.chunk_start(traces.filtered)

    def chunk_step(
        self,
        carry: tuple[PyTree, PyTree],
        index: jax.Array,
        record: StepRecord,
        operands: Sequence[Operands],
        cotangents: Cotangents,
    ) -> tuple[tuple[PyTree, PyTree], tuple[PyTree, PyTree], set[int]]:
        args = index, record, operands, cotangents
        exact, of_exact, needed = self.exact.chunk_step(carry[0], *args)
        filtered, of_filtered, also = self.filtered.chunk_step(carry[1], *args)
        return (exact, filtered), (of_exact, of_filtered), needed | also

    def chunk_end(
        self,
        traces: HybridTrace,
        carry: tuple[PyTree, PyTree],
        emitted: Emitted,
        operands: Sequence[Operands],
        vmap_shape: Shape,
        length: int,
    ) -> tuple[HybridTrace, dict[int, Gradients | None]]:
        of_exact, of_filtered = (emitted._replace(engine=own) for own in emitted.engine)
        rest = operands, vmap_shape, length
        exact, gradients = self.exact.chunk_end(traces.exact, carry[0], of_exact, *rest)
        filtered, more = self.filtered.chunk_end(traces.filtered, carry[1], of_filtered, *rest)
        return HybridTrace(exact, filtered), gradients | more
