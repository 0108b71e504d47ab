"""One call of a learner: forward step, trace update, and how a cotangent of the result becomes a gradient."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import brainstate
import jax
import jax.numpy as jnp

from .._compiler.executor import ETraceVjpGraphExecutor
from .._compiler.groups import slots_of
from .._compiler.policy import ControlFlowPolicy
from .._compiler.tape import TapeRecord
from .._traces.record import Slots, instantaneous, sensitivities, spread, x_keys
from .._types import MultiStepData, Path, SingleStepData, path_str
from .base import ETraceAlgorithm
from .config import ETraceConfig
from .signals import expand_modulator, feedback_matrix, random_feedback

__all__ = ["Credit", "ETraceVjpAlgorithm", "legacy_options"]


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


class Credit(NamedTuple):
    """Everything that a gradient is made of, beside the traces after the step.

    Attributes
    ----------
    new, old : list
        Signals with respect to the groups' new and old values: per group, one array per hidden variable or ``None``.
    bare_new : list
        ``new`` before it was changed for the traces.
    y : dict
        Relation number -> total cotangent of the operation's output, where it is more than ``df`` carries.
    entry_traces, entry_index
        Traces and number of steps before the step or window.
    record : TapeRecord
        Of the step; of a window, of its first step.
    window : bool
        Whether the call is differentiated as a window.
    invals, operands : list
        Inputs of the step (the first one of a window), and the trained operands of every relation.
    """

    new: list[Slots]
    old: list[Slots]
    bare_new: list[Slots]
    y: dict[int, jax.Array]
    entry_traces: Any
    entry_index: jax.Array
    record: TapeRecord
    window: bool
    invals: list[Any]
    operands: list[dict[str, jax.Array]]


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

    # -- to be given by an engine -------------------------------------------------------------------------------

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
                if y != shape and not (r.x_var is None and y == shape[1:]):
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

    def _contract(
        self, number: int, traces: Any, signals: list[Slots], steps: jax.Array, credit: Credit
    ) -> dict[str, jax.Array] | None:
        """Gradients of the operands of one relation: signals contracted with traces of that many steps.

        ``None`` where no signal reaches the relation.
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
        signals: Credit,
        weight_vals: dict[Path, Any],
        plain_grads: dict[Path, Any],
        etp_window_grads: list[dict[str, jax.Array]] | None,
    ) -> dict[Path, Any]:
        """Gradient of every parameter: ``plain_grads``, plus per relation the gradient of its operands."""
        gradients = self._operand_gradients(running_index, traces, signals)
        leaf_gradients: dict[int, jax.Array] = {}
        for relation, gradient in zip(self.graph.hidden_param_op_relations, gradients):
            if gradient:
                for i, g in relation.operand_program.pull_back(signals.invals, gradient).items():
                    leaf_gradients[i] = leaf_gradients[i] + g if i in leaf_gradients else g
        info = self.graph.module_info
        numbers = {p: leaves for p, leaves in zip(info.compiled_state_paths, info.state_leaves)}
        out = {}
        tree: Any
        for path in weight_vals:
            leaves, tree = jax.tree.flatten(plain_grads[path])
            traced = [leaf_gradients.get(info.in_tree.num_leaves + i) for i in numbers[path]]
            out[path] = tree.unflatten([g if t is None else g + t.astype(g.dtype) for g, t in zip(leaves, traced)])
        return out

    def _operand_gradients(self, running_index, traces, credit: Credit) -> list[dict[str, jax.Array]]:
        """Per relation, what the traces give, and what of the current step they do not carry."""
        out = []
        for i, r in enumerate(self.graph.hidden_param_op_relations):
            parts = [self._contract(i, credit.entry_traces, credit.old, credit.entry_index, credit)]
            if not credit.window:
                parts.append(self._contract(i, traces, credit.new, running_index, credit))
                parts.append(self._beside_trace(i, credit))
            found = [p for p in parts if p is not None]
            out.append({k: sum((p[k] for p in found[1:]), found[0][k]) for k in r.trainable_vars} if found else {})
        return out

    def _beside_trace(self, number: int, credit: Credit) -> dict[str, jax.Array] | None:
        """The current step's credit that does not pass through the hidden groups position by position."""
        if number not in credit.y:
            return None
        relation = self.graph.hidden_param_op_relations[number]
        xs, dfs, _ = self._read_record(credit.record, credit.operands)
        carried = instantaneous(relation, dfs, credit.bare_new)
        rest = credit.y[number] if carried is None else credit.y[number] - carried
        return self._operand_vjp(number, xs.get(x_keys(self.graph).get(number, "")), rest, credit)

    def _operand_vjp(self, number: int, x: Any, cotangent: jax.Array, credit: Credit) -> dict[str, jax.Array]:
        r = self.graph.hidden_param_op_relations[number]
        fixed = credit.record.fixed[number]
        return r.primitive.weight_vjp(x, cotangent, credit.operands[number], r.eqn_params, fixed)

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
        info = self.graph.module_info
        states = dict(zip(info.compiled_state_paths, info.compiled_model_states))
        values = self._split([self._state_value(p, s) for p, s in states.items()])
        index = self.running_index.value
        call = self._differentiable_call(over_time, length)
        out, new, traces = call(leaves, values, self._get_etrace_data(), index, aux)
        for state, value in zip(self._split(list(states.values()))[1:], new[1:]):
            for s, v in zip(state, value):
                s.value = v
        self._assign_etrace_data(traces)
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

    def _differentiable_call(self, over_time, length):
        """``(argument leaves, state values, traces, index, aux) -> (output, new values, new traces)``."""
        multi = self.graph_executor.is_multi_step_vjp

        def forward(leaves, values, traces, index, aux=None):
            if length is not None:
                return self._run_window(over_time, length, leaves, values, traces, index)
            return self._run_step(leaves, values, traces, index, self.graph.tape.zeros(), trained=multi)[:3]

        def step_forward(leaves, values, traces, index, aux):
            if length is not None:
                raise NotImplementedError(
                    "A single-step learner has no gradient of a window. Make the learner with vjp_method='multi-step', "
                    "or differentiate step by step."
                )

            def run(leaves, values, zeros):
                out, new, new_traces, record = self._run_step(leaves, values, traces, index, zeros)
                return (out, new), (new_traces, record)

            values = values._replace(weights=jax.tree.map(_first_order, values.weights))
            zeros = self.graph.tape.zeros()
            (out, new), pull, (new_traces, record) = jax.vjp(run, leaves, values, zeros, has_aux=True)
            return (out, new, new_traces), (pull, leaves, values, traces, index, aux, new_traces, record)

        def step_backward(residuals, cotangents):
            pull, leaves, values, traces, index, aux, new_traces, record = residuals
            leaf_bars, value_bars, zero_bars = pull(tuple(cotangents[:2]))
            credit = self._credit(zero_bars.new, zero_bars.old, zero_bars.y, traces, index, record, leaves, values, aux)
            return leaf_bars, self._with_weights(index + 1, new_traces, credit, values, value_bars), None, None, None

        def window_forward(leaves, values, traces, index, aux):
            def run(leaves, values):
                out, new, new_traces = forward(leaves, values, traces, index)
                return (out, new), new_traces

            (out, new), pull, new_traces = jax.vjp(run, leaves, values, has_aux=True)
            return (out, new, new_traces), (pull, leaves, values, traces, index, aux)

        def window_backward(residuals, cotangents):
            pull, leaves, values, traces, index, aux = residuals
            leaf_bars, value_bars = pull(tuple(cotangents[:2]))
            paths = self.graph.module_info.states_of(brainstate.HiddenState)
            entry = {p: jax.tree.leaves(bar)[0] for p, bar in zip(paths, value_bars.hidden)}
            now = leaves if length is None else [x[0] if m else x for x, m in zip(leaves, over_time)]
            credit = self._credit({}, entry, {}, traces, index, None, now, values, aux)
            return leaf_bars, self._with_weights(index, traces, credit, values, value_bars), None, None, None

        call = jax.custom_vjp(forward)
        call.defvjp(*((window_forward, window_backward) if multi else (step_forward, step_backward)))
        return call

    def _run_step(self, leaves, values, traces, index, zeros, trained=False):
        """One step; with ``trained``, operations are differentiated in their trained operands too."""
        invals = self._invals(leaves, values)
        operands = self._operands(invals)
        stop = jax.lax.stop_gradient
        outs, record = self.graph.tape(invals, operands if trained else stop(operands), zeros)
        xs, dfs, Ds = self._read_record(record, stop(operands))
        weights = self._weight_dict(stop(values.weights))
        inputs = self._trace_inputs(xs, record, stop(operands))
        traces = self._update_etrace_data(index, traces, (inputs, dfs), Ds, weights, False)
        out, new = self._outvals(outs)
        return out, new, traces, record

    def _run_window(self, over_time, length, leaves, values, traces, index):
        zeros = self.graph.tape.zeros()

        def body(carry, sliced):
            hidden, others, traces, index = carry
            sliced = iter(sliced)
            now = [next(sliced) if m else x for x, m in zip(leaves, over_time)]
            state = values._replace(hidden=hidden, others=others)
            out, new, traces, _ = self._run_step(now, state, traces, index, zeros, trained=True)
            return (new.hidden, new.others, traces, index + 1), out

        data = [x for x, m in zip(leaves, over_time) if m]
        first = (values.hidden, values.others, traces, index)
        (hidden, others, traces, _), out = jax.lax.scan(body, first, data, length=length)
        return out, values._replace(hidden=hidden, others=others), traces

    def _credit(self, new, old, y, traces, index, record, leaves, values, aux):
        invals = self._invals(leaves, values)
        args = (leaves, aux)
        operands = self._operands(invals)
        window = record is None
        if window:
            record = self.graph.tape(invals, operands, self.graph.tape.zeros())[1]
        bare = self._slots(new)
        signals = self._changed(bare, args), self._changed(self._slots(old), args), bare
        return Credit(*signals, y, traces, index, record, window, invals, operands)

    def _with_weights(self, index, traces, credit, values, value_bars):
        weight_vals = self._weight_dict(values.weights)
        plain = self._weight_dict(value_bars.weights)
        gradients = self._solve_weight_gradients(index, traces, credit, weight_vals, plain, None)
        return value_bars._replace(weights=[gradients[p] for p in weight_vals])

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

    def _weight_dict(self, weights: list[Any]) -> dict[Path, Any]:
        return dict(zip(self.graph.module_info.states_of(brainstate.ParamState), weights))

    def _operands(self, invals: list[Any]) -> list[dict[str, jax.Array]]:
        return [r.operand_program.operands(invals) for r in self.graph.hidden_param_op_relations]

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
        own_hook = type(self)._compute_learning_signal is not ETraceVjpAlgorithm._compute_learning_signal
        if not (own_hook or self.config.learning_signal in ("random_feedback", "modulatory")):
            return signals
        if all(s is None for slots in signals for s in slots):
            return signals
        dense = []
        for g, slots in zip(self.graph.hidden_groups, signals):
            dtype = next((s.dtype for s in slots if s is not None), jnp.result_type(float))
            dense.append(jnp.stack([spread(s, g.varshape, dtype) for s in slots], -1))
        changed = self._compute_learning_signal(dense, args)
        return [[s[..., a] for a in range(s.shape[-1])] for s in changed]


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
