"""A learner under a driver of whole sequences: what a step leaves, and what becomes of a chunk of steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._compiler.step import StepRecord, Zeros
from .._jax import any_rank, trace_context
from .._traces.record import Slots, add, contraction
from .._types import Path
from .binding import Binding
from .credit import NO_WINDOW, Bars

__all__ = ["Emitted", "Recording"]


class Emitted(NamedTuple):
    """What one step leaves for the end of its chunk, stacked over the K steps there.

    Attributes
    ----------
    engine : pytree
        Of the learning rule.
    x : dict
        Operation number -> input, once for all operations that read it.
    fixed : dict
        Operation number -> untrained operands.
    beside : dict
        As in :class:`Bars`.
    """

    engine: Any
    x: dict[int, jax.Array]
    fixed: dict[int, dict[int, jax.Array]]
    beside: dict[int, jax.Array]


class Recorder:
    """Stands in for the traces while a driver differentiates a step: gives the zeros, takes the record."""

    def __init__(self, zeros: Any, graph: Any):
        self.zeros = zeros
        self.graph = graph
        self.context = trace_context()
        self.calls = 0
        self.recorded: Any = None
        self.length: int | None = None

    def take(self, record: Any, extras: Any, length: int | None) -> None:
        """Keep what a call leaves; ``length``: the number of steps of a window."""
        self.calls += 1
        self.recorded, self.length = (record, extras), length


class Recording(Binding):
    """A learner whose steps can be recorded, and whose gradient is then taken chunk by chunk."""

    _recorder: Recorder | None = None

    # -- to be given by an engine

    def _chunk_start(self, traces: Any) -> Any:
        """What the steps of a chunk carry."""
        raise NotImplementedError

    def _chunk_step(
        self, carry: Any, index: jax.Array, record: StepRecord, operands: Any, bars: Bars
    ) -> tuple[Any, Any, set[int]]:
        """Advance the carry; what to emit, and the operations whose inputs are to be emitted."""
        raise NotImplementedError

    def _chunk_end(
        self, traces: Any, carry: Any, emitted: Emitted, operands: Any, front: tuple[int, ...], length: int
    ) -> tuple[Any, dict[int, dict[str, jax.Array]]]:
        """Traces after a chunk of that many steps, and the gradients of the relations' operands.

        ``front`` is the size of the mapped axis, if any.
        """
        raise NotImplementedError

    # -- one call

    def _can_record(self) -> bool:
        """Whether the gradient of a sequence may be taken chunk by chunk."""
        hooks = "_update_etrace_data", "_solve_weight_gradients", "_make_etrace_stepper", "_inject_exit_cotangent"
        return not self._overrides(*hooks) and all(r.is_static for r in self.graph.operations)

    def _recorder_zeros(self) -> Any:
        return self.graph.step.zeros() if self._is_single_step else self._hidden_zeros()

    def _no_cotangents(self) -> Any:
        """In the place of those of the recorder's zeros, where nothing is differentiated."""
        return Zeros({}, {}, {}) if self._is_single_step else {}

    def _hidden_zeros(self) -> dict[Path, jax.Array]:
        """Without units, as everything that meets the traces."""
        invars = self.graph.module_info.hidden_path_to_invar
        return {p: jnp.zeros(v.aval.shape, v.aval.dtype) for p, v in invars.items()}

    @contextlib.contextmanager
    def _recording(self, zeros: Any) -> Iterator[Recorder]:
        before, self._recorder = self._recorder, Recorder(zeros, self.graph)
        try:
            yield self._recorder
        finally:
            self._recorder = before

    def _record(self, over_time, length, leaves, values, aux):
        recorder = self._recorder
        if recorder.graph is not self.graph:  # the driver sees that the call needed another step, and begins anew
            recorder.zeros = self._recorder_zeros()
        now = self._first_step(over_time, length, leaves)
        extras = (now if self._overrides("_compute_learning_signal") else None, aux)
        if self._is_single_step:
            if length is not None:
                raise NotImplementedError(NO_WINDOW)
            invals = self._invals(leaves, values)
            held = jax.lax.stop_gradient(self._operands(invals))
            outs, record = self.graph.step(invals, held, recorder.zeros)
            recorder.take(record, extras, None)
            return self._outvals(outs)
        hidden = self._shifted(values.hidden, recorder.zeros)

        def step(carry, leaves):
            hidden, others = carry
            out, new, record, *_ = self._plain_step(leaves, values._replace(hidden=hidden, others=others))
            return (new.hidden, new.others), (out, record)

        (hidden, others), (out, record) = self._over_time(step, (hidden, values.others), over_time, length, leaves)
        recorder.take(record, extras, length)
        return out, values._replace(hidden=hidden, others=others)

    @any_rank
    def _recorded_step(self, carry, index, recorded, bars, operands, length) -> tuple[Any, Emitted]:
        """From the record of a call and the cotangents of its zeros to what the end of the chunk needs.

        Everything emitted has a leading axis: the ``length`` steps of a window, or one.
        """
        record, (leaves, aux) = recorded
        if self._is_single_step:
            _, dfs, _ = self._read_record(record, operands)
            found = self._bars(bars.new, bars.old, bars.y, dfs, leaves, aux)
            carry, emitted = self._emit(carry, index, record, found, operands)
            return carry, jax.tree.map(lambda v: v[None], emitted)
        entry = self._changed(self._slots(bars), (leaves, aux))
        silent: list[Slots] = [[None] * len(slots) for slots in entry]
        if length is None:
            carry, emitted = self._emit(carry, index, record, Bars(silent, entry, {}), operands)
            return carry, jax.tree.map(lambda v: v[None], emitted)

        def body(state, item):
            carry, index = state
            record, first = item
            old = [[None if s is None else jnp.where(first, s, jnp.zeros_like(s)) for s in slots] for slots in entry]
            carry, emitted = self._emit(carry, index, record, Bars(silent, old, {}), operands)
            return (carry, index + 1), emitted

        (carry, _), emitted = jax.lax.scan(body, (carry, index), (record, jnp.arange(length) == 0))
        return carry, emitted

    def _emit(self, carry, index, record, bars, operands):
        carry, engine, needed = self._chunk_step(carry, index, record, operands, bars)
        needed = needed | set(bars.beside)
        sources = {self._source(i) for i in needed if record.x[i] is not None}
        fixed = {i: record.fixed[i] for i in needed if record.fixed[i]}
        return carry, Emitted(engine, {i: record.x[i] for i in sources}, fixed, bars.beside)

    def _source(self, number: int) -> int:
        """The first operation that reads the same value."""
        operations = self.graph.operations
        return next(i for i, r in enumerate(operations) if r.x_var is operations[number].x_var)

    @any_rank
    def _recorded_chunk(self, traces, carry, emitted, operands, front, length):
        """Traces after a chunk, and the gradients of all operations' operands."""
        traces, gradients = self._chunk_end(traces, carry, emitted, operands, front, length)
        for i, cotangent in emitted.beside.items():
            x, fixed = emitted.x.get(self._source(i)), emitted.fixed.get(i, {})
            axes = 1 + len(front)
            more = contraction(self.graph.operations[i], x, cotangent, operands[i], fixed, axes)
            gradients[i] = add([gradients.get(i), more])
        return traces, gradients

    def _chunk_bytes(self) -> tuple[int, int]:
        """Bytes of traces and operands, and of what one step of one sample leaves until the end of its chunk."""
        size_of = lambda v: v.size * v.dtype.itemsize  # noqa: E731
        operations = self.graph.operations
        held = jax.tree.leaves((self._get_etrace_data(), [list(r.trainable_vars.values()) for r in operations]))
        record = 0
        for r in operations:
            slots = sum(g.num_state for g in r.hidden_groups)
            record += size_of(r.y_var.aval) * (1 + slots) + (0 if r.x_var is None else size_of(r.x_var.aval))
        return sum(size_of(getattr(v, "aval", v)) for v in held), max(record, 1)

    def _static_operands(self) -> list[dict[str, jax.Array]]:
        """The trained operands of every operation, from the present parameters."""
        return self._operands(self._static_invals())

    def _static_invals(self) -> list[Any]:
        info = self.graph.module_info
        invals: list[Any] = [None] * len(info.jaxpr.invars)
        for path, state in self.param_states.items():
            for n, leaf in zip(self._leaf_numbers(path), jax.tree.leaves(self._state_value(path, state))):
                invals[n] = leaf
        return invals

    @any_rank
    def _parameter_gradients(self, gradients: dict[int, dict[str, jax.Array]]) -> dict[Path, Any]:
        """Gradients of operands -> path -> gradients of the parameter's leaves, ``None`` where there is none."""
        leaves = self._leaf_gradients(gradients, self._static_invals())
        return {p: [leaves.get(n) for n in self._leaf_numbers(p)] for p in self.param_states}
