"""One call of a learner: forward step, trace update, and how a cotangent of the result becomes a gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import brainstate
import jax
import jax.numpy as jnp
from jax.tree_util import PyTreeDef

from .._binding import Binding
from .._compiler.call import Call, call_of
from .._compiler.diagnostics import CompilationRecord
from .._compiler.policy import ControlFlowPolicy
from .._compiler.readout import remarks_on_outputs
from .._compiler.scope import CEILING
from .._credit import reverse_only
from .._engines.engine import Engine, check_outputs
from .._engines.pieces import is_pieces
from .._engines.weight_trace import Forms
from .._jax import any_dtype, is_tracer, trace_context
from .._legacy.executor import ETraceVjpGraphExecutor
from .._online import Hooks, OnlineStep
from .._past import cut, named
from .._recorder import Recorder
from .._types import Path, PyTree
from .base import ETraceAlgorithm
from .config import ETraceConfig, check_config
from .options import VjpMethod
from .signals import as_key, expand_modulator, feedback_matrix, random_feedback

__all__ = ["ETraceVjpAlgorithm"]


T = TypeVar("T")


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
    _recorder: Recorder | None = None
    _forms: Forms | None = None  # of the traces as they were allocated, where there are several

    def __init__(
        self,
        model: brainstate.nn.Module,
        name: str | None = None,
        vjp_method: VjpMethod = "single-step",
        control_flow: ControlFlowPolicy | None = None,
        config: ETraceConfig | None = None,
        random_feedback_key: jax.Array | int | None = None,
        snap_max_jacobian_elements: int = CEILING,
    ):
        self._config = self._default_config if config is None else check_config(config, self._default_config)
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
        key = random_feedback_key
        self._feedback_key = None if key is None else as_key("random_feedback_key", key)
        self._modulator: brainstate.State | None = None

    @property
    def config(self) -> ETraceConfig:
        """The learning rule as coordinates."""
        return self._config

    @property
    def modulator(self) -> PyTree:
        """The standing third factor of rules that take one; a jitted step reads its present value."""
        return None if self._modulator is None else self._modulator.value

    @modulator.setter
    def modulator(self, value: PyTree) -> None:
        value = None if value is None else jnp.asarray(value)
        if self._modulator is not None:
            self._modulator.value = value  # the state that a jitted step reads
        elif value is not None:
            self._modulator = brainstate.ShortTermState(value)

    @property
    def vjp_method(self) -> str:
        return self.graph_executor.vjp_method  # type: ignore[attr-defined]

    @property
    def _is_single_step(self) -> bool:
        return self.vjp_method == "single-step"

    def reset_state(self, batch_size: int | None = None, **kwargs: object) -> None:
        """Zero the traces and the step counter; the model's states are untouched.

        Parameters
        ----------
        batch_size : int, optional
            New size of the batch axis of those traces that have one; by default that of the hidden states.
        """
        del kwargs
        if batch_size is None and self._is_as_compiled():
            self._assign_etrace_data(jax.tree.map(lambda e: jnp.zeros(e.shape, e.dtype), self._trace_shapes))
        else:
            self._resize(batch_size)
        self.running_index.value = jnp.zeros_like(self.running_index.value)
        if not is_tracer(self.running_index.value):
            self._lay_out()

    def _is_as_compiled(self) -> bool:
        """Whether the hidden states have the shapes, and the traces are those, of the compiled step."""
        if not self.is_compiled or self._overrides("init_etrace_state", "_get_etrace_data", "_assign_etrace_data"):
            return False
        info = self.graph.module_info
        return all(
            [jnp.shape(v) for v in jax.tree.leaves(s.value)] == [a.shape for a in info.state_avals(p)]
            for p, s in self.hidden_states.items()
        )

    def _resize(self, batch_size: int | None) -> None:
        """Zero traces for a batch of another size, by default that of the hidden states."""
        size, mapped = self._leading_size()
        size = size if batch_size is None else batch_size
        for state, axis in self._trace_states():
            place = 0 if mapped else axis

            def zeros(e: jax.Array, place: int | None = place) -> jax.Array:
                shape = list(e.shape)
                if place is not None and size is not None and e.ndim > place:
                    shape[place] = size
                return jnp.zeros(shape, e.dtype)

            state.value = jax.tree.map(zeros, state.value)

    def _leading_size(self) -> tuple[int | None, bool]:
        """Size of the first axis of the hidden states as they are now, and whether it is a mapped one.

        Where some states have another size than the step was compiled for, theirs is that of the batch.
        """
        found: int | None = None
        for path, state in self.hidden_states.items() if self.is_compiled else ():
            old = self.graph.module_info.state_avals(path)[0].shape
            shape = jnp.shape(jax.tree.leaves(state.value)[0])
            if len(shape) > len(old) or shape[:1] != old[:1]:
                return (shape[0] if shape else None), len(shape) > len(old)
            found = shape[0] if shape and found is None else found
        return found, False

    def _plan(self, name: Hashable, make: Callable[[], T]) -> T:
        """What an engine finds out once for each compiled step; no attribute, whose states would be the learner's."""
        plans = self.graph_executor.compiled.plans
        if name not in plans:
            plans[name] = make()
        return plans[name]

    @property
    def _trace_shapes(self) -> PyTree:
        """Of the traces of one sample, or of one batch, as the compiled step needs them."""
        forms = None if self._forms is None else frozenset(self._forms.items())
        return self._plan(("shapes", forms), lambda: jax.eval_shape(self._engine.init))

    def _select(self, call: Call) -> list[brainstate.State]:
        states = super()._select(call)
        if self.is_compiled and not self._overrides("init_etrace_state", "_get_etrace_data"):
            wanted, held = self._trace_shapes, self._get_etrace_data()
            trees: list[PyTreeDef] = [jax.tree.structure(t, is_leaf=is_pieces) for t in (wanted, held)]
            if trees[0] != trees[1]:
                raise ValueError(
                    "Another hidden state or operation is trained by this call than by the first one, for which the "
                    "traces were made. Use a learner of its own for it."
                )
            for a, b in zip(*(jax.tree.leaves(t, is_leaf=is_pieces) for t in (wanted, held))):
                if a.shape != b.shape:
                    raise ValueError(
                        f"The traces have the shape {b.shape} where this call needs {a.shape}. Call "
                        "reset_state(batch_size=...) of the learner when the states are initialised for another batch."
                    )
        return states

    # -- to be given by an engine's learner ----------------------------------------------------------------------

    def _make_engine(self, binding: Binding) -> Engine:
        """The algebra of the traces, for one compiled step."""
        raise NotImplementedError

    def _samples(self) -> int | None:
        """How many samples a trace is mapped over, or ``None`` where a hook of a subclass expects it whole."""
        hooks = "_update_etrace_data", "_solve_weight_gradients", "_get_etrace_data"
        return None if self._overrides(*hooks) else self._mapped_samples

    def _trace_states(self) -> Iterator[tuple[brainstate.State, int | None]]:
        """The states of traces, and which of their axes is the batch."""
        raise NotImplementedError

    def _get_etrace_data(self) -> PyTree:
        """Values of the trace states."""
        raise NotImplementedError

    def _assign_etrace_data(self, vals: PyTree) -> None:
        """Write the trace states."""
        raise NotImplementedError

    # -- hooks with a default -----------------------------------------------------------------------------------

    def _update_etrace_data(
        self,
        running_index: jax.Array,
        old_traces: PyTree,
        xs_and_dfs: tuple[PyTree, PyTree],
        Ds: PyTree,
        weight_vals: dict[Path, PyTree],
        input_is_multi_step: bool,
    ) -> PyTree:
        """Traces after one step."""
        del running_index, weight_vals, input_is_multi_step
        return self._engine.advance(old_traces, xs_and_dfs, Ds)

    def _compute_learning_signal(
        self, signals: list[jax.Array], args_plus_aux: tuple[PyTree, PyTree]
    ) -> list[jax.Array]:
        """Signals per group, shape ``V + (S,)``, as they meet the traces."""
        kind = self.config.learning_signal
        groups = self.graph.hidden_groups
        if kind == "random_feedback":
            traced = self.graph.traced
            key = self._feedback_key
            assert key is not None  # see __init__
            matrices = {g.index: feedback_matrix(key, g) for g in groups if g.index in traced}
            return [random_feedback(s, matrices[i]) if i in matrices else s for i, s in enumerate(signals)]
        if kind == "modulatory":
            _, modulator = args_plus_aux
            return [expand_modulator(modulator, g, s.dtype) for g, s in zip(groups, signals)]
        return signals

    def _get_update_aux(self) -> PyTree:
        """A pytree per call that reaches the signal hook but not the model."""
        return self.modulator

    def _solve_weight_gradients(
        self,
        running_index: jax.Array,
        traces: PyTree,
        signals: None,
        weight_vals: dict[Path, PyTree],
        plain_grads: dict[Path, PyTree],
        etp_window_grads: None,
    ) -> dict[Path, PyTree]:
        """The gradient of every parameter, which arrives complete in ``plain_grads``: a subclass may change it.

        ``traces`` are those after the step (of a window: at its entry), ``running_index`` counts their steps.
        """
        del running_index, traces, signals, weight_vals, etp_window_grads
        return plain_grads

    def _inject_exit_cotangent(self, exit_hiddens: dict[Path, jax.Array], aux: PyTree) -> dict[Path, jax.Array] | None:
        """Cotangents of the hidden values at the exit of a window, for losses after it; by default there are none.

        They reach plain uses of parameters, the arguments, and the states at the entry; what a trace carries over
        they do not reach: the trained operands of operations, and the signals.
        """
        del exit_hiddens, aux
        return None

    @classmethod
    def _overrides(cls, *names: str) -> bool:
        """Whether a subclass of the engine's learner has hooks of its own."""
        home = next(base for base in cls.__mro__ if "_make_engine" in vars(base))
        return any(getattr(cls, n, None) is not getattr(home, n, None) for n in names)

    # -- one call -----------------------------------------------------------------------------------------------

    @any_dtype
    def update(self, *args: PyTree, modulator: PyTree = None, **kwargs: PyTree) -> PyTree:
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
        if self._stand_in is not None:
            return self._stand_in(*args, **kwargs)
        if not self.is_compiled:
            raise ValueError("The learner is not compiled. Call compile_graph(*example_inputs) first.")
        with self.graph_executor.undone_on_error():
            return self._take_step(call_of(args, kwargs), modulator)

    def _take_step(self, call: Call, modulator: PyTree) -> PyTree:
        length = call.length
        states = self._select(call)
        aux = self._aux(modulator)
        online, binding = self._online, self._binding
        leaves, over_time = binding.inputs(call)
        leaves = [reverse_only(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in leaves]
        written = self._written(states)
        cut(written, self.model4compile)
        values = binding.values(states)
        index = self.running_index.value
        if self._recorder is not None and self._recorder.context == trace_context():
            out, new = self._recorder.run(online, over_time, length, leaves, values, aux)
        else:
            traces = jax.lax.stop_gradient(self._get_etrace_data())
            run = online.run_step if self._is_single_step else online.run_window
            out, new, traces = run(over_time, length, leaves, values, traces, index, aux)
            self._assign_etrace_data(traces)
        for state, value in zip(binding.split(states)[1:], new[1:]):
            for s, v in zip(state, value):
                s.value = v
        for state in written:
            state.value = named(state.value, written)
        self.running_index.value = index + (1 if length is None else length)
        return named(out, written)

    def _written(self, states: Sequence[brainstate.State]) -> list[brainstate.State]:
        """Of the states that the step touches, those that a call of any kind writes."""
        written = self.graph_executor.written
        return [s for p, s in zip(self.graph.module_info.compiled_state_paths, states) if p in written]

    def _aux(self, modulator: PyTree) -> PyTree:
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

    # -- the compiled step, the algebra of the traces, and what this learner adds to it

    @property
    def _binding(self) -> Binding:
        return self._plan("binding", self._bind)

    def _bind(self) -> Binding:
        check_outputs(self.graph.hidden_param_op_relations)
        return Binding(self.graph)

    @property
    def _engine(self) -> Any:
        return self._make_engine(self._binding)

    @property
    def _online(self) -> OnlineStep:
        changed = self.config.learning_signal in ("random_feedback", "modulatory")
        own = lambda name: getattr(self, name) if self._overrides(name) else None  # noqa: E731
        hooks = Hooks(
            self._update_etrace_data,
            self._compute_learning_signal if changed or self._overrides("_compute_learning_signal") else None,
            own("_solve_weight_gradients"),
            own("_inject_exit_cotangent"),
            self.config.learning_signal == "modulatory",
        )
        return OnlineStep(self._binding, self._engine, hooks)

    def _trace_forms(self) -> dict[int, tuple[str, int]]:
        return self._engine.forms()

    def _remarks(self) -> list[CompilationRecord]:
        filtered, random = self.config.trace_filter == "kappa", self.config.learning_signal == "random_feedback"
        return self._engine.remarks() + remarks_on_outputs(self.graph, filtered, random)

    def _can_record(self) -> bool:
        """Whether sequences may be driven chunk by chunk."""
        traces = "_get_etrace_data", "_assign_etrace_data", "_update_etrace_data", "_make_etrace_stepper"
        hooks = *traces, "_solve_weight_gradients", "_inject_exit_cotangent"
        static = all(r.is_static for r in self.graph.operations)
        return static and self._engine.has_chunks and not self._overrides(*hooks)

    @contextlib.contextmanager
    def _recording(self, zeros: PyTree) -> Iterator[Recorder]:
        before, self._recorder = self._recorder, Recorder(self._online, self._is_single_step, zeros)
        try:
            yield self._recorder
        finally:
            self._recorder = before
