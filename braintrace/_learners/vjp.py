"""One call of a learner: forward step, trace update, and how a cotangent of the result becomes a gradient."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import brainstate
import jax
import jax.numpy as jnp

from .._compiler.call import Call, call_of
from .._compiler.executor import ETraceVjpGraphExecutor
from .._compiler.policy import ControlFlowPolicy
from .._compiler.scope import CEILING
from .._compiler.step import StepRecord
from .._jax import any_rank, is_tracer, trace_context
from .._traces.record import Slots, instantaneous, spread
from .._types import Path, path_str
from .config import ETraceConfig
from .credit import Bars, credit, no_window_gradient, reverse_only, with_cotangent
from .recording import Recording
from .signals import expand_modulator, feedback_matrix, random_feedback

__all__ = ["ETraceVjpAlgorithm", "legacy_options"]


DELAY_LINE = (
    " If the states are a delay line of outputs, delay what the operation receives instead: keep its inputs (spikes, "
    "say) in a brainstate.ShortTermState, and apply the operation to the oldest."
)


def legacy_options(options: dict[str, Any], rule: type) -> None:
    """Accept what older scripts pass and newer versions ignore; everything else is a ``TypeError``."""
    if options.pop("mode", None) is not None:
        warnings.warn("The argument mode has no effect and is ignored.", DeprecationWarning, stacklevel=3)
    if options:
        known = _arguments(rule)
        near = {n: [k for k in known if n in k] or difflib.get_close_matches(n, known, 1, 0.5) for n in options}
        meant = "".join(f" Did you mean {found[0]} for {n}?" for n, found in sorted(near.items()) if found)
        raise TypeError(
            f"Unknown argument(s): {', '.join(sorted(options))}.{meant} {rule.__name__} takes {', '.join(known)}."
        )


def _arguments(rule: type) -> list[str]:
    """Names of the constructor's arguments behind the model, those that it passes on to its bases included."""
    names: list[str] = []
    for base in rule.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            names += [k for k, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            if "legacy" in parameters:
                break
    return [k for k in dict.fromkeys(names) if k not in ("self", "model")]


def _check_config(config: Any, own: ETraceConfig) -> ETraceConfig:
    if not isinstance(config, ETraceConfig):
        raise TypeError(f"config must be an ETraceConfig, got {type(config).__name__}.")
    if config.trace_factorization != own.trace_factorization:
        raise ValueError(
            f"config has trace_factorization={config.trace_factorization!r}, this learner's engine is "
            f"{own.trace_factorization!r}. Use the learner of that engine, or braintrace.compile(model, config, ...)."
        )
    return config


class ETraceVjpAlgorithm(Recording):
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
    snap_max_jacobian_elements : int
        The most elements that the Jacobian between neighbours may have, in the scope ``'sparse_n'``; in every scope,
        how many elements of a Jacobian are computed at once.

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
        snap_max_jacobian_elements: int = CEILING,
    ):
        self._config = self._default_config if config is None else _check_config(config, self._default_config)
        executor = ETraceVjpGraphExecutor(
            model,
            vjp_method,
            self._config.include_recurrent_mixing,
            self._config.sparse_n,
            snap_max_jacobian_elements,
            control_flow,
            full_jacobian=self._config.trace_factorization == "random_projection",
        )
        super().__init__(model, executor, name=name)
        if self._config.learning_signal == "random_feedback" and random_feedback_key is None:
            raise ValueError("learning_signal='random_feedback' needs random_feedback_key, an int or a JAX key.")
        own_hook = type(self)._inject_exit_cotangent is not ETraceVjpAlgorithm._inject_exit_cotangent
        if self._config.learning_signal == "bootstrapped" and not own_hook:
            raise NotImplementedError(
                f"learning_signal='bootstrapped' needs a rule that estimates future losses, such as DNI; "
                f"{type(self).__name__} does not override _inject_exit_cotangent."
            )
        if own_hook and vjp_method == "single-step":
            raise ValueError(f"{type(self).__name__} estimates what follows a window: use vjp_method='multi-step'.")
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

    @property
    def _is_single_step(self) -> bool:
        return self.vjp_method == "single-step"

    def reset_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        """Zero the traces and the step counter; the model's states are untouched.

        Parameters
        ----------
        batch_size : int, optional
            New size of the batch axis of those traces that have one; by default that of the hidden states.
        """
        del kwargs
        size, mapped = self._leading_size()
        size = size if batch_size is None else batch_size
        for state, axis in self._trace_states():
            place = 0 if mapped else axis

            def zeros(e, place=place):
                shape = list(e.shape)
                if place is not None and size is not None and e.ndim > place:
                    shape[place] = size
                return jnp.zeros(shape, e.dtype)

            state.value = jax.tree.map(zeros, state.value)
        self.running_index.value = jnp.zeros_like(self.running_index.value)
        if not is_tracer(self.running_index.value):
            self._lay_out()

    def _leading_size(self) -> tuple[int | None, bool]:
        """Size of the first axis of the hidden states as they are now, and whether it is a mapped one."""
        for path, state in self.hidden_states.items() if self.is_compiled else ():
            aval, shape = self.graph.module_info.state_avals(path)[0], jnp.shape(jax.tree.leaves(state.value)[0])
            return (shape[0] if shape else None), len(shape) > len(aval.shape)
        return None, False

    def _plan(self, name: str, make: Callable[[], Any]) -> Any:
        """What an engine finds out once for each compiled step; no attribute, whose states would be the learner's."""
        plans = self.graph_executor.compiled.plans
        if name not in plans:
            plans[name] = make()
        return plans[name]

    def _select(self, call: Call) -> list[brainstate.State]:
        states = super()._select(call)
        if self.is_compiled and not self._overrides("init_etrace_state", "_get_etrace_data"):
            wanted = self._plan("shapes", lambda: jax.eval_shape(self._zero_traces))
            held = self._get_etrace_data()
            trees: list[Any] = [jax.tree.structure(t) for t in (wanted, held)]
            if trees[0] != trees[1]:
                raise ValueError(
                    "Another hidden state or operation is trained by this call than by the first one, for which the "
                    "traces were made. Use a learner of its own for it."
                )
            for a, b in zip(*map(jax.tree.leaves, (wanted, held))):
                if a.shape != b.shape:
                    raise ValueError(
                        f"The traces have the shape {b.shape} where this call needs {a.shape}. Call "
                        "reset_state(batch_size=...) of the learner when the states are initialised for another batch."
                    )
        return states

    # -- to be given by an engine -------------------------------------------------------------------------------

    def _trace_states(self) -> Iterator[tuple[brainstate.State, int | None]]:
        """The states of traces, and which of their axes is the batch."""
        raise NotImplementedError

    def _zero_traces(self) -> Any:
        """Traces of the present step at the start, as :meth:`_get_etrace_data` gives them."""
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
                y, shape = r.one.y_var.aval.shape, g.varshape
                fits = y == shape or r.fold(g) is not None
                if not fits and not (r.x_var is None and jnp.broadcast_shapes(y, shape) == shape):
                    delayed = y and len(shape) > len(y) and shape[-len(y) :] == y
                    raise ValueError(
                        f"The output of {r.primitive.name} at {path_str(r.path)!r} has shape {y}, the hidden states "
                        f"{', '.join(map(path_str, g.hidden_paths))} that it drives have shape {shape}. Both need one "
                        "shape: initialise the states with the batch size of the inputs, or give the operation the "
                        "shape of the states." + DELAY_LINE * bool(delayed)
                    )

    def _trace_inputs(self, xs: dict[str, Any], record: StepRecord, operands: Any, invals: list[Any]) -> Any:
        """What of a step's inputs the trace update takes: by default their linear representations, by x-key."""
        del record, operands, invals
        return xs

    def _lift(self, number: int, traces: Any, operands: dict[str, jax.Array], fixed: Any, steps: jax.Array) -> Any:
        """Arrays whose cotangents :meth:`_meet` gives, and through which these reach the operands of one relation."""
        raise NotImplementedError

    def _meet(self, number: int, traces: Any, signals: list[Slots], steps: jax.Array) -> Any | None:
        """Cotangents of :meth:`_lift` for signals that meet traces of that many steps; ``None`` if there are none."""
        raise NotImplementedError

    def _lifts(
        self,
        numbers: Iterable[int],
        traces: Any,
        operands: Sequence[Any],
        fixed: Sequence[Any],
        weights: list[Any],
        steps: jax.Array,
    ) -> Any:
        """What carries the cotangents of :meth:`_meets` to the parameters: by default, :meth:`_lift` per relation."""
        del weights
        return {i: self._lift(i, traces, operands[i], fixed[i], steps) for i in numbers}

    def _meets(self, numbers: Iterable[int], traces: Any, signals: list[Slots], steps: jax.Array) -> Any:
        """Cotangents of :meth:`_lifts`."""
        return {i: self._meet(i, traces, signals, steps) for i in numbers}

    # -- hooks with a default -----------------------------------------------------------------------------------

    def _compute_learning_signal(self, signals: list[jax.Array], args_plus_aux: Any) -> list[jax.Array]:
        """Signals per group, shape ``V + (S,)``, as they meet the traces."""
        kind = self.config.learning_signal
        groups = self.graph.hidden_groups
        if kind == "random_feedback":
            traced = self.graph.traced
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

    def _inject_exit_cotangent(self, exit_hiddens: dict[Path, jax.Array], aux: Any) -> dict[Path, jax.Array] | None:
        """Cotangents of the hidden values at the exit of a window, for losses after it; by default there are none.

        They reach plain uses of parameters, the arguments, and the states at the entry; what a trace carries over
        they do not reach: the trained operands of operations, and the signals.
        """
        del exit_hiddens, aux
        return None

    def _overrides(self, *names: str) -> bool:
        return any(getattr(type(self), n, None) is not getattr(self._engine, n, None) for n in names)

    # -- one call -----------------------------------------------------------------------------------------------

    @any_rank
    def update(self, *args: Any, modulator: Any = None, **kwargs: Any) -> Any:
        """Run the model for one step, or for a window, and advance the traces.

        Parameters
        ----------
        *args : pytree
            Arguments of the model. Leaves may be wrapped in :class:`MultiStepData` (axis 0 is time; the call is then
            a window, and the output is stacked along a new leading axis) or :class:`SingleStepData`.
        modulator : optional
            Third factor of this call, for rules that take one.
        **kwargs
            Keyword arguments of the model; those without arrays are constants of the compiled step.

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
        call = call_of(args, kwargs)
        length = call.length
        states = self._select(call)
        aux = self._aux(modulator)
        leaves, over_time = self._input_leaves(call)
        leaves = [reverse_only(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in leaves]
        info = self.graph.module_info
        values = self._split([self._state_value(p, s) for p, s in zip(info.compiled_state_paths, states)])
        index = self.running_index.value
        if self._recorder is not None and self._recorder.context == trace_context():
            out, new = self._record(over_time, length, leaves, values, aux)
        else:
            traces = jax.lax.stop_gradient(self._get_etrace_data())
            run = self._run_step if self._is_single_step else self._run_window
            out, new, traces = run(over_time, length, leaves, values, traces, index, aux)
            self._assign_etrace_data(traces)
        for state, value in zip(self._split(states)[1:], new[1:]):
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
        """One step, differentiated as such: see :func:`credit`."""
        if length is not None:
            out, new, traces = self._run_window(over_time, length, leaves, values, traces, index, aux)
            return (*no_window_gradient((out, new)), traces)
        if not (any(map(is_tracer, jax.tree.leaves(values.weights))) or self._overrides("_solve_weight_gradients")):
            # Nothing differentiates this call in a parameter.
            out, new, record, operands, invals = self._plain_step(leaves, values)
            return out, new, self._advance(traces, index, record, operands, invals, values.weights)
        held = jax.lax.stop_gradient(self._invals(leaves, values))
        held_operands = self._operands(held)
        record = self.graph.step.record(held, held_operands)
        after = self._advance(traces, index, record, held_operands, held, values.weights)
        values = self._hooked(values, after, index + 1)
        invals = self._invals(leaves, values)
        operands = self._operands(invals)
        zeros = self._credited_zeros(traces, after, index, record, leaves, operands, values.weights, aux)
        trained = len(self.graph.hidden_param_op_relations)
        operands = [jax.lax.stop_gradient(w) if i < trained else w for i, w in enumerate(operands)]
        out, new = self._outvals(self.graph.step(invals, operands, zeros)[0])
        return out, new, after

    def _run_window(self, over_time, length, leaves, values, traces, index, aux):
        """A window of steps (or one), differentiated through all of them."""
        values = bare = self._hooked(values, traces, index)
        values = values._replace(hidden=self._credited_entry(traces, index, leaves, over_time, length, values, aux))
        weights = jax.lax.stop_gradient(values.weights)

        def step(carry, leaves):
            hidden, others, traces, index = carry
            out, new, record, *read = self._plain_step(leaves, values._replace(hidden=hidden, others=others))
            traces = self._advance(traces, index, record, *jax.lax.stop_gradient(read), weights)
            return (new.hidden, new.others, traces, index + 1), out

        start = (values.hidden, values.others, traces, index)
        (hidden, others, traces, _), out = self._over_time(step, start, over_time, length, leaves)
        exits = self._hidden_reals(self._hidden_dict(hidden))
        estimate = self._inject_exit_cotangent(jax.lax.stop_gradient(exits), aux)
        if estimate is not None and any(map(is_tracer, jax.tree.leaves((leaves, values)))):
            future = self._future(estimate, over_time, length, leaves, bare)
            out, hidden, others = with_cotangent((out, hidden, others), future)
        return out, values._replace(hidden=hidden, others=others), traces

    def _future(self, estimate, over_time, length, leaves, values):
        """The hidden values at the exit of a window times their estimated cotangents.

        Of the same window with what the traces account for held fixed: the operands of relations, and the part of the
        entry that meets the traces.
        """

        def step(carry, leaves):
            hidden, others = carry
            now = values._replace(hidden=hidden, others=others)
            _, new, *_ = self._plain_step(leaves, now, held=len(self.graph.hidden_param_op_relations))
            return (new.hidden, new.others), None

        (hidden, _), _ = self._over_time(step, (values.hidden, values.others), over_time, length, leaves)
        exits = self._hidden_reals(self._hidden_dict(hidden))
        terms = [(jax.lax.stop_gradient(bar) * exits[p]).sum() for p, bar in estimate.items()]
        return sum(terms, jnp.zeros(()))

    def _plain_step(self, leaves, values, held=0):
        """The model's step with trained operands as they are, what it leaves for the traces, and what it read.

        The operands of the first ``held`` operations are constants.
        """
        invals = self._invals(leaves, values)
        operands = self._operands(invals)
        operands = [jax.lax.stop_gradient(w) if i < held else w for i, w in enumerate(operands)]
        outs, record = self.graph.step(invals, operands, self.graph.step.zeros())
        return *self._outvals(outs), record, operands, invals

    @staticmethod
    def _over_time(step, start, over_time, length, leaves):
        """``step(carry, leaves)`` once, or scanned over the leaves that have a time axis."""
        if length is None:
            return step(start, leaves)

        def body(carry, sliced):
            sliced = iter(sliced)
            return step(carry, [next(sliced) if m else x for x, m in zip(leaves, over_time)])

        return jax.lax.scan(body, start, [x for x, m in zip(leaves, over_time) if m], length=length)

    def _advance(self, traces, index, record, operands, invals, weights):
        xs, dfs, Ds = self._read_record(record, operands)
        inputs = self._trace_inputs(xs, record, operands, invals)
        weights = self._weight_dict(jax.lax.stop_gradient(weights))
        return self._update_etrace_data(index, traces, (inputs, dfs), Ds, weights, False)

    # -- how cotangents of a step's result reach the parameters ---------------------------------------------------
    #
    # The zeros that the step adds come from `credit`, a function of arrays that depend on the parameters: its value is
    # zero, its reverse rule turns the signals into cotangents of these arrays. All of it is an ordinary JAX program,
    # so that under jax.vmap the weight gradients of all samples are one product.

    def _credited_zeros(self, traces, after, index, record, leaves, operands, weights, aux):
        zeros = self.graph.step.zeros()
        _, dfs, _ = self._read_record(record, operands)
        relations = self.graph.hidden_param_op_relations
        every = range(len(relations))
        read = [i for i in every if any(p in zeros.old for g in relations[i].hidden_groups for p in g.hidden_paths)]
        apply = lambda i, r: r.primitive.apply(record.x[i], operands[i], r.eqn_params, record.fixed[i])  # noqa: E731
        lifted = {
            "now": self._lifts(every, after, operands, record.fixed, weights, index + 1),
            "before": self._lifts(read, traces, operands, record.fixed, weights, index) if read else {},
            "beside": {i: apply(i, r) for i, r in enumerate(relations) if i in zeros.y},
        }
        beside = tuple(lifted["beside"])  # a rule of differentiation that held traced values would keep them alive
        own = zeros._replace(y={i: zeros.y[i] for i in beside})

        def reverse(held, bars):
            traces, after, index, dfs, leaves, aux = held
            bars = self._bars(bars.new, bars.old, bars.y, dfs, leaves, aux)
            return {
                "now": self._meets(every, after, bars.new, index + 1),
                "before": self._meets(read, traces, bars.old, index) if read else {},
                "beside": {i: bars.beside[i] for i in beside},
            }

        held = jax.lax.stop_gradient((traces, after, index, dfs, leaves, aux))
        own = credit(reverse, own, lifted, held, weights)
        return own._replace(y={**zeros.y, **own.y})

    def _credited_entry(self, traces, index, leaves, over_time, length, values, aux):
        """Hidden values at the entry of a window, whose cotangents meet the traces there."""
        if not any(map(is_tracer, jax.tree.leaves(values.weights))):
            return values.hidden
        now = self._first_step(over_time, length, leaves)
        invals = self._invals(now, values)
        operands = self._operands(invals)
        fixed = self.graph.step.record(*jax.lax.stop_gradient((invals, operands))).fixed
        every = range(len(self.graph.hidden_param_op_relations))
        lifted = self._lifts(every, traces, operands, fixed, values.weights, index)
        zeros = self._hidden_zeros()

        def reverse(held, bars):
            traces, index, leaves, aux = held
            return self._meets(every, traces, self._changed(self._slots(bars), (leaves, aux)), index)

        zeros = credit(reverse, zeros, lifted, jax.lax.stop_gradient((traces, index, now, aux)), None)
        return self._shifted(values.hidden, zeros)

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

    def _hooked(self, values, traces, index):
        """The parameters, through the hook of a subclass for their gradients."""
        if not self._overrides("_solve_weight_gradients"):
            return values

        @jax.custom_vjp
        def hook(weights, traces, index):
            del traces, index
            return weights

        @any_rank
        def backward(held, bars):
            weights, traces, index = held
            found = self._solve_weight_gradients(
                index, traces, None, self._weight_dict(weights), self._weight_dict(bars), None
            )
            return [found[p] for p in self._weight_dict(bars)], None, None

        hook.defvjp(lambda weights, traces, index: (weights, (weights, traces, index)), backward)
        return values._replace(weights=hook(values.weights, traces, index))
