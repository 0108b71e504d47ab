"""One call of a learner: the forward step, the trace update, and how cotangents of the result reach the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from ._binding import Binding, Operands, Signals, Values, first_step
from ._compiler.step import StepRecord, Zeros
from ._credit import credit, no_window_gradient, with_cotangent
from ._engines.engine import Cotangents, Engine
from ._engines.record import Sensitivity, instantaneous, read_record, spread
from ._jax import any_dtype, is_tracer
from ._types import Path, PyTree

__all__ = ["Extras", "Hooks", "OnlineStep", "over_window", "silent"]


C = TypeVar("C")
Out = TypeVar("Out")
Extras: TypeAlias = tuple[Sequence[jax.Array] | None, PyTree]  # argument leaves of a step, for hooks; and aux
States: TypeAlias = tuple[list[PyTree], list[PyTree]]  # hidden ones, and those that are neither these nor parameters


class Hooks(NamedTuple):
    """What a learner adds to its engine; ``None`` where it adds nothing.

    Attributes
    ----------
    update : callable
        ``(index, traces, xs_and_dfs, Ds, weight_vals, input_is_multi_step) -> traces``
    signals : callable, optional
        ``(signals per group, shape V + (S,), (argument leaves, aux)) -> signals``
    gradients : callable, optional
        ``(index, traces, None, weight_vals, plain_grads, None) -> gradients by path``
    future : callable, optional
        ``(exit values by path, aux) -> cotangents by path``, or ``None``
    modulated : bool
        Whether all that the traces meet is a modulator, whatever the loss.
    """

    update: Callable[..., PyTree]
    signals: Callable[..., list[jax.Array]] | None = None
    gradients: Callable[..., dict[Path, PyTree]] | None = None
    future: Callable[..., dict[Path, jax.Array] | None] | None = None
    modulated: bool = False


class OnlineStep(NamedTuple):
    """The compiled step of a learner together with its traces' algebra."""

    binding: Binding
    engine: Engine
    hooks: Hooks

    def run_step(
        self,
        over_time: Sequence[bool],
        length: int | None,
        leaves: Sequence[jax.Array],
        values: Values,
        traces: PyTree,
        index: jax.Array,
        aux: PyTree,
    ) -> tuple[PyTree, Values, PyTree]:
        """One step, differentiated as such: see :func:`credit`. Returns output, new values and traces."""
        if length is not None:
            out, new, traces = self.run_window(over_time, length, leaves, values, traces, index, aux)
            return (*no_window_gradient((out, new)), traces)
        binding, step = self.binding, self.binding.graph.step
        if not any(map(is_tracer, jax.tree.leaves(values.weights))) and self.hooks.gradients is None:
            # Nothing differentiates this call in a parameter.
            out, new, record, operands, invals = self.plain_step(leaves, values)
            return out, new, self._advance(traces, index, record, operands, invals, values.weights)
        held = jax.lax.stop_gradient(binding.invals(leaves, values))
        held_operands = binding.operands(held)
        record = step.record(held, held_operands)
        after = self._advance(traces, index, record, held_operands, held, values.weights)
        values = self._hooked(values, after, index + 1)
        invals = binding.invals(leaves, values)
        operands = binding.operands(invals)
        zeros = self._credited_zeros(traces, after, index, record, leaves, operands, values.weights, aux)
        trained = len(binding.graph.hidden_param_op_relations)
        operands = [jax.lax.stop_gradient(w) if i < trained else w for i, w in enumerate(operands)]
        out, new = binding.outvals(step(invals, operands, zeros)[0])
        return out, new, after

    def run_window(
        self,
        over_time: Sequence[bool],
        length: int | None,
        leaves: Sequence[jax.Array],
        values: Values,
        traces: PyTree,
        index: jax.Array,
        aux: PyTree,
    ) -> tuple[PyTree, Values, PyTree]:
        """A window of steps (or one), differentiated through all of them."""
        values = bare = self._hooked(values, traces, index)
        values = values._replace(hidden=self._credited_entry(traces, index, leaves, over_time, length, values, aux))
        weights = jax.lax.stop_gradient(values.weights)

        Carry: TypeAlias = tuple[list[PyTree], list[PyTree], PyTree, jax.Array]

        def one(carry: Carry, leaves: Sequence[jax.Array]) -> tuple[Carry, PyTree]:
            hidden, others, traces, index = carry
            now = values._replace(hidden=hidden, others=others)
            out, new, record, operands, invals = self.plain_step(leaves, now)
            operands, invals = jax.lax.stop_gradient((operands, invals))
            traces = self._advance(traces, index, record, operands, invals, weights)
            return (new.hidden, new.others, traces, index + 1), out

        start = (values.hidden, values.others, traces, index)
        (hidden, others, traces, _), out = over_window(one, start, over_time, length, leaves)
        if self.hooks.future is not None:
            exits = self.binding.reals(self.binding.hidden_by_path(hidden))
            estimate = self.hooks.future(jax.lax.stop_gradient(exits), aux)
            if estimate is not None and any(map(is_tracer, jax.tree.leaves((leaves, values)))):
                future = self._future(estimate, over_time, length, leaves, bare)
                out, hidden, others = with_cotangent((out, hidden, others), future)
        return out, values._replace(hidden=hidden, others=others), traces

    def _future(
        self,
        estimate: Mapping[Path, jax.Array],
        over_time: Sequence[bool],
        length: int | None,
        leaves: Sequence[jax.Array],
        values: Values,
    ) -> jax.Array:
        """The hidden values at the exit of a window times their estimated cotangents.

        Of the same window with what the traces account for held fixed: the operands of relations, and the part of the
        entry that meets the traces.
        """
        binding = self.binding

        def one(carry: States, leaves: Sequence[jax.Array]) -> tuple[States, None]:
            hidden, others = carry
            now = values._replace(hidden=hidden, others=others)
            _, new, *_ = self.plain_step(leaves, now, held=len(binding.graph.hidden_param_op_relations))
            return (new.hidden, new.others), None

        (hidden, _), _ = over_window(one, (values.hidden, values.others), over_time, length, leaves)
        exits = binding.reals(binding.hidden_by_path(hidden))
        terms = [(jax.lax.stop_gradient(bar) * exits[p]).sum() for p, bar in estimate.items()]
        return sum(terms, jnp.zeros(()))

    def plain_step(
        self, leaves: Sequence[jax.Array], values: Values, held: int = 0
    ) -> tuple[PyTree, Values, StepRecord, list[Operands], list[jax.Array]]:
        """The model's step with trained operands as they are, what it leaves for the traces, and what it read.

        The operands of the first ``held`` operations are constants.
        """
        invals = self.binding.invals(leaves, values)
        operands = self.binding.operands(invals)
        operands = [jax.lax.stop_gradient(w) if i < held else w for i, w in enumerate(operands)]
        step = self.binding.graph.step
        outs, record = step(invals, operands, step.zeros())
        return *self.binding.outvals(outs), record, operands, invals

    def _advance(
        self,
        traces: PyTree,
        index: jax.Array,
        record: StepRecord,
        operands: Sequence[Operands],
        invals: Sequence[jax.Array],
        weights: Sequence[PyTree],
    ) -> PyTree:
        taken, Ds = self.engine.take(record, operands, invals)
        by_path = self.binding.weights_by_path(jax.lax.stop_gradient(weights))
        return self.hooks.update(index, traces, taken, Ds, by_path, False)

    # -- how cotangents of a step's result reach the parameters
    #
    # The zeros that the step adds come from `credit`, a function of arrays that depend on the parameters: its value is
    # zero, its reverse rule turns the signals into cotangents of these arrays. All of it is an ordinary JAX program,
    # so that under jax.vmap the weight gradients of all samples are one product.

    def _credited_zeros(
        self,
        traces: PyTree,
        after: PyTree,
        index: jax.Array,
        record: StepRecord,
        leaves: Sequence[jax.Array],
        operands: Sequence[Operands],
        weights: Sequence[PyTree],
        aux: PyTree,
    ) -> Zeros:
        graph, engine = self.binding.graph, self.engine
        zeros = graph.step.zeros()
        _, dfs, _ = read_record(graph, record, operands, {})
        relations = graph.hidden_param_op_relations
        every = range(len(relations))
        read = [i for i in every if any(p in zeros.old for g in relations[i].hidden_groups for p in g.hidden_paths)]
        apply = lambda i, r: r.primitive.apply(record.x[i], operands[i], r.eqn_params, record.fixed[i])  # noqa: E731
        carriers = {
            "now": engine.carriers(every, after, operands, record.fixed, weights, index + 1),
            "before": engine.carriers(read, traces, operands, record.fixed, weights, index) if read else {},
            "residual": {i: apply(i, r) for i, r in enumerate(relations) if i in zeros.y},
        }
        residual = tuple(carriers["residual"])  # a rule of differentiation that held traced values would keep them
        own = zeros._replace(y={i: zeros.y[i] for i in residual})

        def reverse(held: tuple[PyTree, ...], bars: Zeros) -> dict[str, PyTree]:
            traces, after, index, dfs, leaves, aux = held
            found = self.cotangents(bars.new, bars.old, bars.y, dfs, leaves, aux)
            return {
                "now": engine.contract(every, after, found.new, index + 1),
                "before": engine.contract(read, traces, found.old, index) if read else {},
                "residual": {i: found.residual[i] for i in residual},
            }

        held = jax.lax.stop_gradient((traces, after, index, dfs, leaves, aux))
        own = credit(reverse, own, carriers, held, weights)
        return own._replace(y={**zeros.y, **own.y})

    def _credited_entry(
        self,
        traces: PyTree,
        index: jax.Array,
        leaves: Sequence[jax.Array],
        over_time: Sequence[bool],
        length: int | None,
        values: Values,
        aux: PyTree,
    ) -> list[PyTree]:
        """Hidden values at the entry of a window, whose cotangents meet the traces there."""
        if not any(map(is_tracer, jax.tree.leaves(values.weights))):
            return values.hidden
        binding, engine = self.binding, self.engine
        now = first_step(over_time, length, leaves)
        invals = binding.invals(now, values)
        operands = binding.operands(invals)
        fixed = binding.graph.step.record(*jax.lax.stop_gradient((invals, operands))).fixed
        every = range(len(binding.graph.hidden_param_op_relations))
        carriers = engine.carriers(every, traces, operands, fixed, values.weights, index)

        def reverse(held: tuple[PyTree, ...], bars: Mapping[Path, jax.Array]) -> PyTree:
            traces, index, leaves, aux = held
            return engine.contract(every, traces, self.changed(binding.signals(bars), (leaves, aux)), index)

        held = jax.lax.stop_gradient((traces, index, now, aux))
        return binding.shifted(values.hidden, credit(reverse, binding.hidden_zeros(), carriers, held, None))

    def cotangents(
        self,
        new: Mapping[Path, jax.Array],
        old: Mapping[Path, jax.Array],
        y: Mapping[int, jax.Array],
        dfs: Mapping[str, Sensitivity],
        leaves: Sequence[jax.Array] | None,
        aux: PyTree,
    ) -> Cotangents:
        """Signals as they meet the traces, and what they do not carry."""
        bare = self.binding.signals(new)
        residual = {}
        operations, trained = self.binding.graph.operations, len(self.binding.graph.hidden_param_op_relations)
        for i, bar in y.items():
            if self.hooks.modulated and i < trained:
                residual[i] = jnp.zeros_like(bar)
                continue
            carried = instantaneous(operations[i], dfs, bare)
            residual[i] = bar if carried is None else bar - carried
        before = self.binding.signals(old)
        if self.hooks.modulated:
            return Cotangents(self.changed(bare, (leaves, aux)), silent(before), residual)
        return Cotangents(self.changed(bare, (leaves, aux)), self.changed(before, (leaves, aux)), residual)

    def changed(self, signals: Signals, args: Extras) -> Signals:
        """The signals as the traces meet them."""
        if self.hooks.signals is None:
            return signals
        if not self.hooks.modulated and all(s is None for slots in signals for s in slots):
            return signals
        dense = []
        for g, slots in zip(self.binding.graph.hidden_groups, signals):
            dtype = next((s.dtype for s in slots if s is not None), jnp.result_type(float))
            dense.append(jnp.stack([spread(s, g.varshape, dtype) for s in slots], -1))
        return [[s[..., a] for a in range(s.shape[-1])] for s in self.hooks.signals(dense, args)]

    def _hooked(self, values: Values, traces: PyTree, index: jax.Array) -> Values:
        """The parameters, through the hook for their gradients."""
        change, by_path = self.hooks.gradients, self.binding.weights_by_path
        if change is None:
            return values

        @jax.custom_vjp
        def hook(weights: list[PyTree], traces: PyTree, index: jax.Array) -> list[PyTree]:
            del traces, index
            return weights

        @any_dtype
        def backward(
            held: tuple[list[PyTree], PyTree, jax.Array], bars: list[PyTree]
        ) -> tuple[list[PyTree], None, None]:
            weights, traces, index = held
            found = change(index, traces, None, by_path(weights), by_path(bars), None)
            return [found[p] for p in by_path(bars)], None, None

        hook.defvjp(lambda weights, traces, index: (weights, (weights, traces, index)), backward)
        return values._replace(weights=hook(values.weights, traces, index))


def silent(signals: Signals) -> Signals:
    return [[None] * len(slots) for slots in signals]


def over_window(
    step: Callable[[C, Sequence[jax.Array]], tuple[C, Out]],
    start: C,
    over_time: Sequence[bool],
    length: int | None,
    leaves: Sequence[jax.Array],
) -> tuple[C, Out]:
    """``step(carry, leaves)`` once, or scanned over the leaves that have a time axis."""
    if length is None:
        return step(start, leaves)

    def body(carry: C, sliced: list[jax.Array]) -> tuple[C, Out]:
        slices = iter(sliced)
        return step(carry, [next(slices) if m else x for x, m in zip(leaves, over_time)])

    return jax.lax.scan(body, start, [x for x, m in zip(leaves, over_time) if m], length=length)
