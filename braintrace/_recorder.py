"""What calls of a learner leave while a driver differentiates them, and what becomes of it at the end of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from ._binding import Fixed, Gradients, Operands, Values, first_step
from ._compiler.step import StepRecord, Zeros
from ._credit import NO_WINDOW
from ._engines.engine import Cotangents, Emitted, bytes_of
from ._engines.record import add, contraction, read_record
from ._jax import any_dtype, open_jaxpr, trace_context
from ._online import Extras, OnlineStep, over_window, silent
from ._types import Path, PyTree, Shape

__all__ = ["Recorded", "Recorder", "Records", "ZerosOfCall", "weighted"]

T = TypeVar("T")
ZerosOfCall: TypeAlias = Zeros | dict[Path, jax.Array]  # of a step, or of hidden values at the entry of a window
Recorded: TypeAlias = tuple[StepRecord, Extras]


class Recorder:
    """Stands in for the traces while a driver differentiates a step: gives the zeros, takes the record.

    A single-step learner adds zeros wherever its perturbed step does; one that differentiates through windows adds them
    to the hidden values at the entry of a window.
    """

    def __init__(self, online: OnlineStep, single_step: bool, zeros: PyTree):
        self.online, self.single_step, self.zeros = online, single_step, zeros
        self.context = trace_context()
        self.calls = 0
        self.recorded: Recorded | None = None
        self.length: int | None = None

    @staticmethod
    def zeros_of(online: OnlineStep, single_step: bool) -> ZerosOfCall:
        return online.binding.graph.step.zeros() if single_step else online.binding.hidden_zeros()

    def run(
        self,
        online: OnlineStep,
        over_time: Sequence[bool],
        length: int | None,
        leaves: Sequence[jax.Array],
        values: Values,
        aux: PyTree,
    ) -> tuple[PyTree, Values]:
        """The call itself, without traces: its output and new values."""
        binding = online.binding
        if binding.graph is not self.online.binding.graph:
            # The driver sees that the call needed another step, and begins anew.
            self.zeros = self.zeros_of(online, self.single_step)
        extras = (first_step(over_time, length, leaves) if online.hooks.signals is not None else None, aux)
        if self.single_step:
            if length is not None:
                raise NotImplementedError(NO_WINDOW)
            invals = binding.invals(leaves, values)
            outs, record = binding.graph.step(invals, jax.lax.stop_gradient(binding.operands(invals)), self.zeros)
            self.take(record, extras, None)
            return binding.outvals(outs)
        hidden = binding.shifted(values.hidden, self.zeros)

        def step(
            carry: tuple[list[PyTree], list[PyTree]], leaves: Sequence[jax.Array]
        ) -> tuple[tuple[list[PyTree], list[PyTree]], tuple[PyTree, StepRecord]]:
            hidden, others = carry
            out, new, record, *_ = online.plain_step(leaves, values._replace(hidden=hidden, others=others))
            return (new.hidden, new.others), (out, record)

        (hidden, others), (out, record) = over_window(step, (hidden, values.others), over_time, length, leaves)
        self.take(record, extras, length)
        return out, values._replace(hidden=hidden, others=others)

    def take(self, record: StepRecord, extras: Extras, length: int | None) -> None:
        """Keep what a call leaves; ``length``: the number of steps of a window."""
        self.calls += 1
        self.recorded, self.length = (record, extras), length


class Records:
    """What becomes of the records of a chunk, for one sample or, at its end, for all of them."""

    def __init__(self, online: OnlineStep, single_step: bool):
        self.online, self.single_step = online, single_step
        self.binding, self.engine = online.binding, online.engine

    @any_dtype
    def step(
        self,
        carry: PyTree,
        index: jax.Array,
        recorded: Recorded,
        bars: PyTree,
        operands: Sequence[Operands],
        length: int | None,
        weight: jax.Array | None,
    ) -> tuple[PyTree, Emitted]:
        """From the record of a call and the cotangents of its zeros to what the end of the chunk needs.

        ``weight``: that of the call in the gradient. Signals get it as they meet the traces: what a rule makes of them
        need not be linear. Everything emitted has a leading axis: the ``length`` steps of a window, or one.
        """
        record, (leaves, aux) = recorded
        if self.single_step:
            _, dfs, _ = read_record(self.binding.graph, record, operands, {})
            found = weighted(self.online.cotangents(bars.new, bars.old, bars.y, dfs, leaves, aux), weight)
            carry, emitted = self._emit(carry, index, record, found, operands)
            return carry, jax.tree.map(lambda v: v[None], emitted)
        entry = weighted(self.online.changed(self.binding.signals(bars), (leaves, aux)), weight)
        if length is None:
            carry, emitted = self._emit(carry, index, record, Cotangents(silent(entry), entry, {}), operands)
            return carry, jax.tree.map(lambda v: v[None], emitted)

        def body(
            state: tuple[PyTree, jax.Array], item: tuple[StepRecord, jax.Array]
        ) -> tuple[tuple[PyTree, jax.Array], Emitted]:
            carry, index = state
            record, first = item
            old = [[None if s is None else jnp.where(first, s, jnp.zeros_like(s)) for s in slots] for slots in entry]
            carry, emitted = self._emit(carry, index, record, Cotangents(silent(entry), old, {}), operands)
            return (carry, index + 1), emitted

        (carry, _), emitted = jax.lax.scan(body, (carry, index), (record, jnp.arange(length) == 0))
        return carry, emitted

    def _emit(
        self,
        carry: PyTree,
        index: jax.Array,
        record: StepRecord,
        cotangents: Cotangents,
        operands: Sequence[Operands],
    ) -> tuple[PyTree, Emitted]:
        carry, of_engine, needed = self.engine.chunk_step(carry, index, record, operands, cotangents)
        needed = needed | set(cotangents.residual)
        read = {i: x for i in {self.binding.source(i) for i in needed} if (x := record.x[i]) is not None}
        fixed: dict[int, Fixed] = {i: record.fixed[i] for i in needed if record.fixed[i]}
        return carry, Emitted(of_engine, read, fixed, cotangents.residual)

    @any_dtype
    def end(
        self,
        traces: PyTree,
        carry: PyTree,
        emitted: Emitted,
        operands: Sequence[Operands],
        vmap_shape: Shape,
        length: int,
    ) -> tuple[PyTree, dict[int, Gradients | None]]:
        """Traces after a chunk, and the gradients of all operations' operands."""
        traces, gradients = self.engine.chunk_end(traces, carry, emitted, operands, vmap_shape, length)
        for i, cotangent in emitted.residual.items():
            x, fixed = emitted.x.get(self.binding.source(i)), emitted.fixed.get(i, {})
            axes = 1 + len(vmap_shape)
            more = contraction(self.binding.graph.operations[i], x, cotangent, operands[i], fixed, axes)
            gradients[i] = add([gradients.get(i), more])
        return traces, gradients

    def bytes_of(self, traces: PyTree) -> tuple[int, int]:
        """Bytes of traces and operands, and of what one step of one sample leaves until the end of its chunk."""
        operations = self.binding.graph.operations
        held = bytes_of(traces) + sum(bytes_of(v.aval) for r in operations for v in r.trainable_vars.values())
        record = 0
        for r in operations:
            slots = sum(g.num_state for g in r.hidden_groups)
            record += bytes_of(r.y_var.aval) * (1 + slots) + (0 if r.x_var is None else bytes_of(r.x_var.aval))
        for g in self.binding.graph.hidden_groups:
            if g.snap is not None:  # the Jacobian between neighbours is far larger than anything else
                record += sum(bytes_of(v.aval) for v in open_jaxpr(g.jacobian.program).outvars)
        return held, max(record, 1)


def weighted(tree: T, weight: jax.Array | None) -> T:
    return tree if weight is None else jax.tree.map(lambda v: weight.astype(v.dtype) * v, tree)
