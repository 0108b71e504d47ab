"""One call of a learner: forward step, trace update, and how a cotangent of the result becomes a gradient."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import brainstate
import jax
import jax.numpy as jnp

from .._compiler.executor import ETraceVjpGraphExecutor
from .._compiler.groups import slots_of
from .._compiler.policy import ControlFlowPolicy
from .._compiler.tape import TapeRecord
from .._jax import is_tracer, trace_context
from .._traces.record import Slots, add, contraction, instantaneous, sensitivities, spread, x_keys
from .._types import MultiStepData, Path, SingleStepData, path_str
from .base import ETraceAlgorithm
from .config import ETraceConfig
from .signals import expand_modulator, feedback_matrix, random_feedback

__all__ = ["Bars", "ETraceVjpAlgorithm", "Emitted", "legacy_options"]


def legacy_options(options: dict[str, Any]) -> None:
    """Accept what older scripts pass and newer versions ignore; everything else is a ``TypeError``."""
    if options.pop("mode", None) is not None:
        warnings.warn("The argument mode has no effect and is ignored.", DeprecationWarning, stacklevel=3)
    if options:
        raise TypeError(f"Unknown argument(s): {', '.join(sorted(options))}.")


def _check_config(config: Any, own: ETraceConfig) -> ETraceConfig:
    if not isinstance(config, ETraceConfig):
        raise TypeError(f"config must be an ETraceConfig, got {type(config).__name__}.")
    if config.trace_factorization != own.trace_factorization:
        raise ValueError(
            f"config has trace_factorization={config.trace_factorization!r}, this learner's engine is "
            f"{own.trace_factorization!r}. Use the learner of that engine, or braintrace.compile(model, config, ...)."
        )
    if config.recurrence_scope != "diagonal":
        raise NotImplementedError(f"recurrence_scope={config.recurrence_scope!r} is not available; use 'diagonal'.")
    if config.learning_signal == "bootstrapped":
        raise NotImplementedError("learning_signal='bootstrapped' needs a rule that estimates future losses.")
    return config


class Bars(NamedTuple):
    """Cotangents of one step, as they meet the traces.

    Attributes
    ----------
    new, old : list
        Signals with respect to the groups' new and old values: per group, one array per hidden variable or ``None``.
    beside : dict
        Operation number -> cotangent of its output that no trace carries.
    """

    new: list[Slots]
    old: list[Slots]
    beside: dict[int, jax.Array]


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

    def __init__(self, zeros: Any):
        self.zeros = zeros
        self.context = trace_context()
        self.calls = 0
        self.recorded: Any = None
        self.length: int | None = None

    def take(self, record: Any, extras: Any, length: int | None) -> None:
        """Keep what a call leaves; ``length``: the number of steps of a window."""
        self.calls += 1
        self.recorded, self.length = (record, extras), length


class _Values(NamedTuple):
    """Values of all states that a call touches, as lists in the graph's order."""

    weights: list[Any]
    hidden: list[Any]
    others: list[Any]


class ETraceVjpAlgorithm(ETraceAlgorithm):
    r"""Abstract base of the learners that differentiate through one step, or one window, in reverse mode.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its ``update`` is one time step.
    name : str, optional
    vjp_method : {'single-step', 'multi-step'}
        With ``'single-step'`` a call is one time step and the gradient is the signal contracted with the trace
        after the step. With ``'multi-step'`` a call may be a window of steps (:class:`MultiStepData`): the gradient is
        exact reverse mode within the window, plus the cotangent of the hidden states at its entry contracted with
        the trace at its entry.

    control_flow : ControlFlowPolicy, optional
        What to do with the loops and branches of the step.
    config : ETraceConfig, optional
        The rule as coordinates; by default the class's own.
    random_feedback_key : int or JAX key, optional
        Of the fixed feedback matrices of ``learning_signal='random_feedback'``.

    Raises
    ------
    ValueError
        If ``vjp_method`` is another string, or ``config`` belongs to another engine or lacks what it needs.
    TypeError
        If ``model`` is no ``brainstate.nn.Module``, or ``config`` no ``ETraceConfig``.
    """

    __module__ = "braintrace"

    _default_config: ClassVar[ETraceConfig] = ETraceConfig()
    _engine: ClassVar[type[ETraceVjpAlgorithm]]  # the class whose hooks are the engine's own

    def __init__(
        self,
        model: brainstate.nn.Module,
        name: str | None = None,
        vjp_method: str = "single-step",
        control_flow: ControlFlowPolicy | None = None,
        config: ETraceConfig | None = None,
        random_feedback_key: jax.Array | int | None = None,
    ):
        super().__init__(model, ETraceVjpGraphExecutor(model, vjp_method, control_flow=control_flow), name=name)
        self._config = self._default_config if config is None else _check_config(config, self._default_config)
        if self._config.learning_signal == "random_feedback" and random_feedback_key is None:
            raise ValueError("learning_signal='random_feedback' needs random_feedback_key, an int or a JAX key.")
        if self._config.learning_signal == "modulatory" and vjp_method != "single-step":
            raise ValueError("learning_signal='modulatory' is defined step by step: use vjp_method='single-step'.")
        if isinstance(random_feedback_key, int):
            random_feedback_key = jax.random.key(random_feedback_key)
        self._feedback_key = random_feedback_key
        self._modulator: brainstate.State | None = None
        self._recorder: Recorder | None = None

    @property
    def config(self) -> ETraceConfig:
        """The learning rule as coordinates."""
        return self._config

    @property
    def modulator(self) -> Any:
        """The standing third factor of rules that take one; a jitted step reads its present value."""
        return None if self._modulator is None else self._modulator.value

    @modulator.setter
    def modulator(self, value: Any) -> None:
        # Write into the state that a jitted step reads, where it can hold the value.
        known = self._modulator
        if known is not None and value is not None and jnp.shape(known.value) == jnp.shape(value):
            known.value = jnp.asarray(value)
        else:
            self._modulator = None if value is None else brainstate.ShortTermState(jnp.asarray(value))

    @property
    def vjp_method(self) -> str:
        return self.graph_executor.vjp_method  # type: ignore[attr-defined]

    @property
    def _is_single_step(self) -> bool:
        return self.vjp_method == "single-step"

    def reset_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        """Zero the traces and the step counter; the model's states are untouched.

        Parameters
        ----------
        batch_size : int, optional
            New size of the batch axis of those traces that have one.
        """
        del kwargs
        for state, batched in self._trace_states():

            def zeros(e, batched=batched):
                resized = batched and batch_size is not None and e.ndim > 0
                return jnp.zeros((batch_size, *e.shape[1:]) if resized else e.shape, e.dtype)

            state.value = jax.tree.map(zeros, state.value)
        self.running_index.value = jnp.zeros_like(self.running_index.value)

    # -- to be given by an engine -------------------------------------------------------------------------------

    def _trace_states(self) -> Iterator[tuple[brainstate.State, bool]]:
        """The states of traces, and whether their first axis is the batch."""
        raise NotImplementedError

    def _get_etrace_data(self) -> Any:
        """Values of the trace states."""
        raise NotImplementedError

    def _assign_etrace_data(self, vals: Any) -> None:
        """Write the trace states."""
        raise NotImplementedError

    def _update_etrace_data(
        self,
        running_index: jax.Array,
        old_traces: Any,
        xs_and_dfs: tuple[Any, Any],
        Ds: Sequence[Any],
        weight_vals: dict[Path, Any],
        input_is_multi_step: bool,
    ) -> Any:
        """Traces after one step."""
        raise NotImplementedError

    def _check_output_shapes(self) -> None:
        """Refuse operations whose output has another shape than the hidden states that it drives."""
        for r in self.graph.hidden_param_op_relations:
            for g in r.hidden_groups:
                y, shape = r.y_var.aval.shape, g.varshape
                fits = y == shape or r.fold(g) is not None
                if not fits and not (r.x_var is None and jnp.broadcast_shapes(y, shape) == shape):
                    raise ValueError(
                        f"The output of {r.primitive.name} at {path_str(r.path)!r} has shape {y}, the hidden states "
                        f"{', '.join(map(path_str, g.hidden_paths))} that it drives have shape {shape}. Both need one "
                        "shape: initialise the states with the batch size of the inputs, or give the operation the "
                        "shape of the states."
                    )

    def _trace_inputs(self, xs: dict[str, Any], record: TapeRecord, operands: Any) -> Any:
        """What of a step's inputs the trace update takes: by default their linear representations, by x-key."""
        del record, operands
        return xs

    def _lift(self, number: int, traces: Any, operands: dict[str, jax.Array], fixed: Any) -> Any:
        """Arrays whose cotangents :meth:`_meet` gives, and through which these reach the operands of one relation."""
        raise NotImplementedError

    def _meet(self, number: int, traces: Any, signals: list[Slots], steps: jax.Array) -> Any | None:
        """Cotangents of :meth:`_lift` for signals that meet traces of that many steps; ``None`` if there are none."""
        raise NotImplementedError

    def _chunk_start(self, traces: Any) -> Any:
        """What the steps of a chunk carry."""
        raise NotImplementedError

    def _chunk_step(
        self, carry: Any, index: jax.Array, record: TapeRecord, operands: Any, bars: Bars
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

    # -- hooks with a default -----------------------------------------------------------------------------------

    def _compute_learning_signal(self, signals: list[jax.Array], args_plus_aux: Any) -> list[jax.Array]:
        """Signals per group, shape ``V + (S,)``, as they meet the traces."""
        kind = self.config.learning_signal
        groups = self.graph.hidden_groups
        if kind == "random_feedback":
            traced = {g.index for r in self.graph.hidden_param_op_relations for g in r.hidden_groups}
            matrices = {g.index: feedback_matrix(self._feedback_key, g) for g in groups if g.index in traced}
            return [random_feedback(s, matrices[i]) if i in matrices else s for i, s in enumerate(signals)]
        if kind == "modulatory":
            _, modulator = args_plus_aux
            return [expand_modulator(modulator, g, s.dtype) for g, s in zip(groups, signals)]
        return signals

    def _get_update_aux(self) -> Any:
        """A pytree per call that reaches the signal hook but not the model."""
        return self.modulator

    def _solve_weight_gradients(
        self,
        running_index: jax.Array,
        traces: Any,
        signals: None,
        weight_vals: dict[Path, Any],
        plain_grads: dict[Path, Any],
        etp_window_grads: None,
    ) -> dict[Path, Any]:
        """The gradient of every parameter, which arrives complete in ``plain_grads``: a subclass may change it.

        ``traces`` are those after the step (of a window: at its entry), ``running_index`` counts their steps.
        """
        del running_index, traces, signals, weight_vals, etp_window_grads
        return plain_grads

    def _overrides(self, *names: str) -> bool:
        return any(getattr(type(self), n, None) is not getattr(self._engine, n, None) for n in names)

    # -- one call -----------------------------------------------------------------------------------------------

    def update(self, *args: Any, modulator: Any = None) -> Any:
        """Run the model for one step, or for a window, and advance the traces.

        Parameters
        ----------
        *args : pytree
            Arguments of the model. Leaves may be wrapped in :class:`MultiStepData` (axis 0 is time; the call is then
            a window, and the output is stacked along a new leading axis) or :class:`SingleStepData`.
        modulator : optional
            Third factor of this call, for rules that take one.

        Returns
        -------
        pytree
            The model's output.

        Raises
        ------
        ValueError
            Before :meth:`compile_graph`; for windows of different lengths; for an argument or state whose structure
            or shape differs from that at compilation.
        TypeError
            For an argument whose dtype cannot be converted, or a modulator where the rule takes none.
        NotImplementedError
            If the gradient of a window is asked of a single-step learner.
        """
        if not self.is_compiled:
            raise ValueError("The learner is not compiled. Call compile_graph(*example_inputs) first.")
        aux = self._aux(modulator)
        leaves, over_time, length = self._argument_leaves(args)
        leaves = [_reverse_only(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in leaves]
        info = self.graph.module_info
        states = dict(zip(info.compiled_state_paths, info.compiled_model_states))
        values = self._split([self._state_value(p, s) for p, s in states.items()])
        index = self.running_index.value
        if self._recorder is not None and self._recorder.context == trace_context():
            out, new = self._record(over_time, length, leaves, values, aux)
        else:
            traces = jax.lax.stop_gradient(self._get_etrace_data())
            run = self._run_step if self._is_single_step else self._run_window
            out, new, traces = run(over_time, length, leaves, values, traces, index, aux)
            self._assign_etrace_data(traces)
        for state, value in zip(self._split(list(states.values()))[1:], new[1:]):
            for s, v in zip(state, value):
                s.value = v
        self.running_index.value = index + (1 if length is None else length)
        return out

    def _aux(self, modulator: Any) -> Any:
        if self.config.learning_signal != "modulatory":
            if modulator is not None:
                raise TypeError(f"{type(self).__name__} takes no modulator: its learning signal is not 'modulatory'.")
            return self._get_update_aux()
        aux = self._get_update_aux() if modulator is None else modulator
        if aux is None:
            raise RuntimeError(
                "The learning signal is a modulator, and there is none: call update(..., modulator=m), or set the "
                "attribute modulator."
            )
        for g in self.graph.hidden_groups:
            expand_modulator(aux, g, jnp.result_type(float))
        return aux

    def _run_step(self, over_time, length, leaves, values, traces, index, aux):
        """One step, differentiated as such: see :func:`_credit`."""
        if length is not None:
            out, new, traces = self._run_window(over_time, length, leaves, values, traces, index, aux)
            return (*_no_window_gradient((out, new)), traces)
        held = jax.lax.stop_gradient(self._invals(leaves, values))
        held_operands = self._operands(held)
        record = self.graph.tape.record(held, held_operands)
        after = self._advance(traces, index, record, held_operands, values.weights)
        values = self._hooked(values, after, index + 1)
        invals = self._invals(leaves, values)
        operands = self._operands(invals)
        zeros = self._credited_zeros(traces, after, index, record, leaves, operands, values.weights, aux)
        trained = len(self.graph.hidden_param_op_relations)
        operands = [jax.lax.stop_gradient(w) if i < trained else w for i, w in enumerate(operands)]
        out, new = self._outvals(self.graph.tape(invals, operands, zeros)[0])
        return out, new, after

    def _run_window(self, over_time, length, leaves, values, traces, index, aux):
        """A window of steps (or one), differentiated through all of them."""
        values = self._hooked(values, traces, index)
        values = values._replace(hidden=self._credited_entry(traces, index, leaves, over_time, length, values, aux))
        weights = jax.lax.stop_gradient(values.weights)

        def step(carry, leaves):
            hidden, others, traces, index = carry
            out, new, record = self._plain_step(leaves, values._replace(hidden=hidden, others=others))
            held = jax.lax.stop_gradient(self._operands(self._invals(leaves, values)))
            traces = self._advance(traces, index, record, held, weights)
            return (new.hidden, new.others, traces, index + 1), out

        start = (values.hidden, values.others, traces, index)
        (hidden, others, traces, _), out = self._over_time(step, start, over_time, length, leaves)
        return out, values._replace(hidden=hidden, others=others), traces

    def _plain_step(self, leaves, values):
        """The model's step with trained operands as they are, and what it leaves for the traces."""
        invals = self._invals(leaves, values)
        outs, record = self.graph.tape(invals, self._operands(invals), self.graph.tape.zeros())
        return *self._outvals(outs), record

    @staticmethod
    def _over_time(step, start, over_time, length, leaves):
        """``step(carry, leaves)`` once, or scanned over the leaves that have a time axis."""
        if length is None:
            return step(start, leaves)

        def body(carry, sliced):
            sliced = iter(sliced)
            return step(carry, [next(sliced) if m else x for x, m in zip(leaves, over_time)])

        return jax.lax.scan(body, start, [x for x, m in zip(leaves, over_time) if m], length=length)

    def _advance(self, traces, index, record, operands, weights):
        xs, dfs, Ds = self._read_record(record, operands)
        inputs = self._trace_inputs(xs, record, operands)
        weights = self._weight_dict(jax.lax.stop_gradient(weights))
        return self._update_etrace_data(index, traces, (inputs, dfs), Ds, weights, False)

    # -- how cotangents of a step's result reach the parameters ---------------------------------------------------
    #
    # The zeros that the tape adds come from `credit`, a function of arrays that depend on the parameters: its value is
    # zero, its reverse rule turns the signals into cotangents of these arrays. All of it is an ordinary JAX program,
    # so that under jax.vmap the weight gradients of all samples are one product.

    def _credited_zeros(self, traces, after, index, record, leaves, operands, weights, aux):
        zeros = self.graph.tape.zeros()
        if not any(map(is_tracer, jax.tree.leaves(weights))):
            return zeros  # nothing differentiates this call
        _, dfs, _ = self._read_record(record, operands)
        lifted = {}
        for i, r in enumerate(self.graph.hidden_param_op_relations):
            lifted[i] = {"now": self._lift(i, after, operands[i], record.fixed[i])}
            if any(p in zeros.old for g in r.hidden_groups for p in g.hidden_paths):
                lifted[i]["before"] = self._lift(i, traces, operands[i], record.fixed[i])
            if i in zeros.y:
                fixed, y = record.fixed[i], r.y_var.aval
                lifted[i]["beside"] = r.primitive.lift(record.x[i], operands[i], r.eqn_params, fixed, y)
        own = zeros._replace(y={i: z for i, z in zeros.y.items() if i in lifted})

        def reverse(held, bars):
            traces, after, index, dfs, leaves, aux = held
            bars = self._bars(bars.new, bars.old, bars.y, dfs, leaves, aux)
            return {
                i: {
                    name: bars.beside[i]
                    if name == "beside"
                    else self._meet(i, after, bars.new, index + 1)
                    if name == "now"
                    else self._meet(i, traces, bars.old, index)
                    for name in parts
                }
                for i, parts in lifted.items()
            }

        held = jax.lax.stop_gradient((traces, after, index, dfs, leaves, aux))
        own = _credit(reverse, own, lifted, held, weights)
        return own._replace(y={**zeros.y, **own.y})

    def _credited_entry(self, traces, index, leaves, over_time, length, values, aux):
        """Hidden values at the entry of a window, whose cotangents meet the traces there."""
        if not any(map(is_tracer, jax.tree.leaves(values.weights))):
            return values.hidden
        now = leaves if length is None else [x[0] if m else x for x, m in zip(leaves, over_time)]
        invals = self._invals(now, values)
        operands = self._operands(invals)
        fixed = self.graph.tape.record(*jax.lax.stop_gradient((invals, operands))).fixed
        number = range(len(self.graph.hidden_param_op_relations))
        lifted = {i: self._lift(i, traces, operands[i], fixed[i]) for i in number}
        zeros = jax.tree.map(jnp.zeros_like, self._hidden_dict(values.hidden))

        def reverse(held, bars):
            traces, index, leaves, aux = held
            signals = self._changed(self._slots(bars), (leaves, aux))
            return {i: self._meet(i, traces, signals, index) for i in number}

        zeros = _credit(reverse, zeros, lifted, jax.lax.stop_gradient((traces, index, now, aux)), None)
        added = [zeros[p] for p in self._hidden_dict(values.hidden)]
        return [jax.tree.map(lambda v, z=z: v + z, h) for h, z in zip(values.hidden, added)]

    def _bars(self, new, old, y, dfs, leaves, aux) -> Bars:
        """Signals as they meet the traces, and what they do not carry."""
        bare = self._slots(new)
        beside = {}
        trained = len(self.graph.hidden_param_op_relations)
        modulated = self.config.learning_signal == "modulatory"  # the modulator is all that the traces meet
        for i, bar in y.items():
            if modulated and i < trained:
                beside[i] = jnp.zeros_like(bar)
                continue
            carried = instantaneous(self.graph.operations[i], dfs, bare)
            beside[i] = bar if carried is None else bar - carried
        args = (leaves, aux)
        before = self._slots(old)
        silent: list[Slots] = [[None] * len(slots) for slots in before]
        return Bars(self._changed(bare, args), silent if modulated else self._changed(before, args), beside)

    def _hooked(self, values, traces, index):
        """The parameters, through the hook of a subclass for their gradients."""
        if not self._overrides("_solve_weight_gradients"):
            return values

        @jax.custom_vjp
        def hook(weights, traces, index):
            del traces, index
            return weights

        def backward(held, bars):
            weights, traces, index = held
            found = self._solve_weight_gradients(
                index, traces, None, self._weight_dict(weights), self._weight_dict(bars), None
            )
            return [found[p] for p in self._weight_dict(bars)], None, None

        hook.defvjp(lambda weights, traces, index: (weights, (weights, traces, index)), backward)
        return values._replace(weights=hook(values.weights, traces, index))

    # -- under a driver of whole sequences: see _sequence.py ------------------------------------------------------

    def _can_record(self) -> bool:
        """Whether the gradient of a sequence may be taken chunk by chunk."""
        hooks = "_update_etrace_data", "_solve_weight_gradients", "_make_etrace_stepper"
        return not self._overrides(*hooks) and all(r.is_static for r in self.graph.operations)

    def _recorder_zeros(self) -> Any:
        if self._is_single_step:
            return self.graph.tape.zeros()
        return {
            p: jnp.zeros(v.aval.shape, v.aval.dtype) for p, v in self.graph.module_info.hidden_path_to_invar.items()
        }

    @contextlib.contextmanager
    def _recording(self, zeros: Any) -> Iterator[Recorder]:
        before, self._recorder = self._recorder, Recorder(zeros)
        try:
            yield self._recorder
        finally:
            self._recorder = before

    def _record(self, over_time, length, leaves, values, aux):
        recorder = self._recorder
        now = leaves if length is None else [x[0] if m else x for x, m in zip(leaves, over_time)]
        extras = (now if self._overrides("_compute_learning_signal") else None, aux)
        if self._is_single_step:
            if length is not None:
                raise NotImplementedError(_NO_WINDOW)
            invals = self._invals(leaves, values)
            held = jax.lax.stop_gradient(self._operands(invals))
            outs, record = self.graph.tape(invals, held, recorder.zeros)
            recorder.take(record, extras, None)
            return self._outvals(outs)
        hidden = [
            jax.tree.map(lambda v, z=recorder.zeros[p]: v + z, h) for p, h in self._hidden_dict(values.hidden).items()
        ]

        def step(carry, leaves):
            hidden, others = carry
            out, new, record = self._plain_step(leaves, values._replace(hidden=hidden, others=others))
            return (new.hidden, new.others), (out, record)

        (hidden, others), (out, record) = self._over_time(step, (hidden, values.others), over_time, length, leaves)
        recorder.take(record, extras, length)
        return out, values._replace(hidden=hidden, others=others)

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
        first = info.in_tree.num_leaves
        for path, state, numbers in zip(info.compiled_state_paths, info.compiled_model_states, info.state_leaves):
            if isinstance(state, brainstate.ParamState):
                for n, leaf in zip(numbers, jax.tree.leaves(self._state_value(path, state))):
                    invals[first + n] = leaf
        return invals

    def _parameter_gradients(self, gradients: dict[int, dict[str, jax.Array]]) -> dict[Path, Any]:
        """Gradients of operands -> path -> gradients of the parameter's leaves, ``None`` where there is none."""
        invals = self._static_invals()
        leaves: dict[int, jax.Array] = {}
        for i, gradient in gradients.items():
            if gradient:
                for n, g in self.graph.operations[i].operand_program.pull_back(invals, gradient).items():
                    leaves[n] = leaves[n] + g if n in leaves else g
        info = self.graph.module_info
        numbers = dict(zip(info.compiled_state_paths, info.state_leaves))
        first = info.in_tree.num_leaves
        return {p: [leaves.get(first + n) for n in numbers[p]] for p in self.param_states}

    # -- between states, step inputs and signals ----------------------------------------------------------------

    def _argument_leaves(self, args: tuple[Any, ...]) -> tuple[list[jax.Array], list[bool], int | None]:
        """Argument leaves in their compiled dtypes, which of them have a time axis, and its length."""
        wrapped = lambda x: isinstance(x, (SingleStepData, MultiStepData))  # noqa: E731
        bare = jax.tree.map(lambda x: x.data if wrapped(x) else x, args, is_leaf=wrapped)
        marks = jax.tree.map(
            lambda x: jax.tree.map(lambda _: isinstance(x, MultiStepData), x.data if wrapped(x) else x),
            args,
            is_leaf=wrapped,
        )
        info = self.graph.module_info
        leaves, tree = jax.tree.flatten(bare)
        over_time = jax.tree.leaves(marks)
        if tree != info.in_tree:
            raise ValueError(
                f"The arguments have the structure {tree}, the learner was compiled for {info.in_tree}. "
                "Pass arguments of that structure (and units), or compile another learner."
            )
        lengths = sorted({jnp.shape(x)[0] if jnp.ndim(x) else None for x, m in zip(leaves, over_time) if m}, key=str)
        if None in lengths:
            raise ValueError("MultiStepData holds a scalar; axis 0 of every leaf must be time.")
        if len(lengths) > 1:
            raise ValueError(f"The windows of one call have different lengths: {lengths}.")
        expected = info.jaxpr.invars
        converted = [
            _convert(x, v.aval, f"argument leaf {i}", bool(m))
            for i, (x, m, v) in enumerate(zip(leaves, over_time, expected))
        ]
        return converted, over_time, lengths[0] if lengths else None

    def _state_value(self, path: Path, state: brainstate.State) -> Any:
        """A state's value in its compiled dtype."""
        info = self.graph.module_info
        i = info.compiled_state_paths.index(path)
        tree: Any
        leaves, tree = jax.tree.flatten(state.value)
        if tree != info.state_trees[i]:
            raise ValueError(
                f"The value of {path_str(path)!r} has the structure {tree}, the learner was compiled for "
                f"{info.state_trees[i]}. A state keeps one structure and unit; compile another learner."
            )
        first = info.in_tree.num_leaves
        expected = [info.jaxpr.invars[first + n].aval for n in info.state_leaves[i]]
        return tree.unflatten([_convert(x, a, path_str(path)) for x, a in zip(leaves, expected)])

    def _split(self, values: list[Any]) -> _Values:
        out = _Values([], [], [])
        for state, value in zip(self.graph.module_info.compiled_model_states, values):
            out[_kind(state)].append(value)
        return out

    def _invals(self, leaves: Sequence[Any], values: _Values) -> list[Any]:
        parts = tuple(map(iter, values))
        out = list(leaves)
        for state in self.graph.module_info.compiled_model_states:
            out.extend(jax.tree.leaves(next(parts[_kind(state)])))
        return out

    def _outvals(self, outs: list[Any]) -> tuple[Any, _Values]:
        info = self.graph.module_info
        out, rest = outs[: info.num_var_out], outs[info.num_var_out :]
        values = [t.unflatten([rest[i] for i in n]) for t, n in zip(info.state_trees, info.state_leaves)]
        return info.out_tree.unflatten(out), self._split(values)

    def _hidden_dict(self, hidden: list[Any]) -> dict[Path, Any]:
        return dict(zip(self.graph.module_info.states_of(brainstate.HiddenState), hidden))

    def _weight_dict(self, weights: list[Any]) -> dict[Path, Any]:
        return dict(zip(self.graph.module_info.states_of(brainstate.ParamState), weights))

    def _operands(self, invals: list[Any]) -> list[dict[str, jax.Array]]:
        return [r.operand_program.operands(invals) for r in self.graph.operations]

    def _read_record(self, record: TapeRecord, operands: list[dict[str, jax.Array]]) -> tuple[Any, Any, Any]:
        """Inputs by x-key, df by key, and D per group."""
        xs = {}
        for i, key in x_keys(self.graph).items():
            if key not in xs:
                xs[key] = self.graph.hidden_param_op_relations[i].primitive.x_repr(record.x[i], operands[i])
        return (xs, *sensitivities(self.graph, record.varying))

    def _slots(self, by_path: dict[Path, jax.Array]) -> list[Slots]:
        """Per group one array per hidden variable; ``None`` where the signal is known to be zero."""
        signals: list[Slots] = []
        for g in self.graph.hidden_groups:
            bars = [by_path.get(p) for p in g.hidden_paths]
            bars = [None if b is None or b.dtype == jax.dtypes.float0 else b for b in bars]
            picked = [(bars[i], c) for i, c in slots_of(g.hidden_states)]
            signals.append([b if b is None or c is None else b[..., c] for b, c in picked])
        return signals

    def _changed(self, signals: list[Slots], args: Any) -> list[Slots]:
        """The signals as the traces meet them."""
        if not (
            self._overrides("_compute_learning_signal")
            or self.config.learning_signal in ("random_feedback", "modulatory")
        ):
            return signals
        if self.config.learning_signal != "modulatory" and all(s is None for slots in signals for s in slots):
            return signals
        dense = []
        for g, slots in zip(self.graph.hidden_groups, signals):
            dtype = next((s.dtype for s in slots if s is not None), jnp.result_type(float))
            dense.append(jnp.stack([spread(s, g.varshape, dtype) for s in slots], -1))
        changed = self._compute_learning_signal(dense, args)
        return [[s[..., a] for a in range(s.shape[-1])] for s in changed]


@jax.custom_vjp
def _reverse_only(x):
    """Identity without forward mode: traces are constants, so that forward and reverse mode would disagree."""
    return x


_reverse_only.defvjp(lambda x: (x, None), lambda _, bar: (bar,))


_NO_WINDOW = (
    "A single-step learner has no gradient of a window. Make the learner with vjp_method='multi-step', or "
    "differentiate step by step."
)


@jax.custom_jvp
def _no_window_gradient(outputs):
    return outputs


@_no_window_gradient.defjvp
def _refuse_window(primals, tangents):
    raise NotImplementedError(_NO_WINDOW)


def _credit(reverse, zeros, lifted, held, weights):
    """``zeros``, whose cotangents ``bars`` reach the arrays ``lifted`` as ``reverse(held, bars)``.

    ``weights``: parameters in which this has no second derivative.
    """

    shapes, like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (zeros, lifted))

    @jax.custom_vjp
    def credit(lifted, held, weights):
        del held, weights
        # Under jax.vmap the zeros must be mapped like what they stand for, or the signals of all samples were summed.
        mapped = sum(x[(0,) * x.ndim].astype(jnp.float32) for x in jax.tree.leaves(lifted))
        return jax.tree.map(
            lambda z: jnp.where(False, jnp.broadcast_to(mapped, z.shape).astype(z.dtype), jnp.zeros(z.shape, z.dtype)),
            shapes,
        )

    def forward(lifted, held, weights):
        return credit(lifted, held, weights), (held, jax.tree.map(_first_order, weights))

    def backward(residuals, bars):
        return _filled(reverse(residuals[0], bars), like), None, None

    credit.defvjp(forward, backward)
    return credit(lifted, held, weights)


def _filled(tree, like):
    """``tree`` in the dtypes of ``like``, with zeros in the place of ``None``."""
    if isinstance(like, (jax.Array, jax.ShapeDtypeStruct)):
        return jnp.zeros(like.shape, like.dtype) if tree is None else tree.astype(like.dtype)
    children, structure = jax.tree.flatten(like, is_leaf=lambda x: x is not like)
    given = [None] * len(children) if tree is None else jax.tree.leaves(tree, is_leaf=lambda x: x is not tree)
    return jax.tree.unflatten(structure, [_filled(t, c) for t, c in zip(given, children)])


@jax.custom_jvp
def _first_order(weight):
    """Identity that refuses to be differentiated: traces are constants, so what they give has no second derivative."""
    return weight


@_first_order.defjvp
def _refuse_second_order(primals, tangents):
    raise NotImplementedError(
        "An online gradient has no second derivatives with respect to parameters. Use vjp_method='multi-step', which "
        "differentiates a step or window as it is, or wrap the gradient in jax.lax.stop_gradient."
    )


def _kind(state: brainstate.State) -> int:
    """Position in :class:`_Values`."""
    return 0 if isinstance(state, brainstate.ParamState) else 1 if isinstance(state, brainstate.HiddenState) else 2


def _convert(value: Any, aval: Any, name: str, over_time: bool = False) -> Any:
    """An array in the shape and dtype that the step was compiled for."""
    shape = jnp.shape(value)
    if (shape[1:] if over_time else shape) != aval.shape:
        raise ValueError(
            f"{name} has shape {shape}, the learner was compiled for {aval.shape}. Pass that shape "
            "(initialise the states with the batch size of the inputs), or compile another learner."
        )
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return value
    dtype = jnp.result_type(value)
    if dtype == aval.dtype and hasattr(value, "dtype"):
        return jnp.asarray(value)
    kinds = [jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating]
    rank = [next(i for i, k in enumerate(kinds) if jnp.issubdtype(d, k)) for d in (dtype, aval.dtype)]
    if rank[0] > rank[1]:
        raise TypeError(
            f"{name} has dtype {dtype}, the learner was compiled for {aval.dtype}. Compile it with an example of the "
            "dtype that you pass."
        )
    return jnp.asarray(value).astype(aval.dtype)
