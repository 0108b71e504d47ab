"""D_RTRL: a trace for every trained weight."""

from __future__ import annotations

from typing import Any

import brainstate
import jax
import jax.numpy as jnp

from .._traces.param import ParamTrace, contract_param, init_param, meta_of, update_param
from .._traces.record import pair_key
from .._types import Path, path_str
from .base import EligibilityTrace
from .config import ETraceConfig
from .vjp import Credit, ETraceVjpAlgorithm, legacy_options

__all__ = ["ParamDimVjpAlgorithm"]


class ParamDimVjpAlgorithm(ETraceVjpAlgorithm):
    r"""Online learning with one trace per weight, sample and hidden variable (D_RTRL).

    For an operation :math:`y = \mathrm{op}(x, \theta)` that drives a hidden group with S variables per position,

    .. math::

        \epsilon^t = D^t \epsilon^{t-1} + \mathrm{df}^t \otimes x^t, \qquad
        \nabla_\theta \mathrel{+}= \sum_s \langle L^t_s, \epsilon^t_s \rangle,

    with :math:`D`, :math:`\mathrm{df}` and :math:`L` as for :class:`IODimVjpAlgorithm`. On one group whose transition
    acts position by position and has no recurrence through weights, this is back-propagation through time.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its ``update`` is one time step.
    name : str, optional
    vjp_method : {'single-step', 'multi-step'}
        See :class:`ETraceVjpAlgorithm`.
    fast_solve, chunked_trace : bool
        Accepted for scripts; results do not depend on them.
    trace_dtype : dtype, optional
        Storage precision of the traces; gradients keep the parameters' dtype.
    control_flow : None
        Accepted for scripts.
    config : ETraceConfig, optional
        The rule as coordinates, with ``trace_factorization='per_param'``.
    random_feedback_key : int or JAX key, optional
        Of the fixed feedback matrices of ``learning_signal='random_feedback'``.

    Attributes
    ----------
    etrace_bwg : dict
        Opaque key per operation and group -> :class:`EligibilityTrace`, a dict of arrays: for a matrix
        ``(B?, in, out, S)``, for a bias ``(B?, out, S)``, for an ``element_wise`` parameter ``V + (S,)``.

    References
    ----------
    .. [1] C. Wang et al., "Model-agnostic linear-memory online learning in spiking neural networks", Nature
       Communications, 2026.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> learner = braintrace.compile(braintrace.nn.GRUCell(2, 3), 'd_rtrl', jnp.zeros(2))
    >>> grads = learner.etrace_grad(jnp.ones((10, 2)), step_fn=lambda x: (learner(x) ** 2).sum())
    >>> grads['Wz', 'weight']['weight'].shape
    (5, 3)
    """

    __module__ = "braintrace"

    _default_config = ETraceConfig()

    def __init__(
        self,
        model: brainstate.nn.Module,
        name: str | None = None,
        vjp_method: str = "single-step",
        fast_solve: bool = True,
        trace_dtype: Any = None,
        chunked_trace: bool = True,
        control_flow: None = None,
        config: ETraceConfig | None = None,
        random_feedback_key: jax.Array | int | None = None,
        **legacy: Any,
    ):
        legacy_options(legacy)
        super().__init__(model, name, vjp_method, control_flow, config, random_feedback_key)
        self.fast_solve = bool(fast_solve)
        self.chunked_trace = bool(chunked_trace)
        self.trace_dtype = None if trace_dtype is None else jnp.dtype(trace_dtype)

    def init_etrace_state(self, *args: Any, **kwargs: Any) -> None:
        """Allocate zero traces, as new state objects; the step counter is not touched."""
        del args, kwargs
        self._check_output_shapes()
        self._metas = tuple(meta_of(r) for r in self.graph.hidden_param_op_relations)
        zeros = init_param(self.graph, self._metas, self.trace_dtype)
        self.etrace_bwg = {k: EligibilityTrace(v) for k, v in zeros.items()}
        filtered = zeros if self.config.trace_filter == "kappa" else {}
        self.etrace_filtered = {k: EligibilityTrace(v) for k, v in filtered.items()}

    def reset_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        """Zero the traces and the step counter; the model's states are untouched.

        Parameters
        ----------
        batch_size : int, optional
            New size of the batch axis of those traces that have one.
        """
        del kwargs
        lead = {
            pair_key(r, g.index): m.lead or len(g.varshape) - r.y_var.aval.ndim
            for r, m in zip(self.graph.hidden_param_op_relations, self._metas)
            for g in r.hidden_groups
        }
        for states in (self.etrace_bwg, self.etrace_filtered):
            for key, state in states.items():
                batched = batch_size is not None and lead[key] > 0

                def zeros(e, batched=batched):
                    return jnp.zeros((batch_size, *e.shape[1:]) if batched else e.shape, e.dtype)

                state.value = jax.tree.map(zeros, state.value)
        self.running_index.value = jnp.zeros_like(self.running_index.value)

    def get_etrace_of(self, weight: brainstate.ParamState | Path) -> dict[str, dict[str, jax.Array]]:
        """The traces of one parameter.

        Parameters
        ----------
        weight : ParamState or path

        Returns
        -------
        dict
            Key -> trained operand -> array.

        Raises
        ------
        ValueError
            Before compilation, or if ``weight`` has no trace; the message names the path.
        """
        path = self._path_of(weight)
        found = {
            pair_key(r, g.index): self.etrace_bwg[pair_key(r, g.index)].value
            for r in self.graph.hidden_param_op_relations
            if path in r.parameter_paths
            for g in r.hidden_groups
        }
        if not found:
            raise ValueError(f"The parameter {path_str(path)!r} is trained by the current step alone: it has no trace.")
        return found

    # -- the rule -----------------------------------------------------------------------------------------------

    def _get_etrace_data(self) -> tuple[ParamTrace, ParamTrace]:
        return (
            {k: s.value for k, s in self.etrace_bwg.items()},
            {k: s.value for k, s in self.etrace_filtered.items()},
        )

    def _assign_etrace_data(self, vals: tuple[ParamTrace, ParamTrace]) -> None:
        for states, values in zip((self.etrace_bwg, self.etrace_filtered), vals):
            for key, state in states.items():
                state.value = values[key]

    def _update_etrace_data(self, running_index, old_traces, xs_and_dfs, Ds, weight_vals, input_is_multi_step):
        del running_index, weight_vals, input_is_multi_step
        traces, filtered = old_traces
        (xs, operands, fixed), dfs = xs_and_dfs
        config = self.config
        traces = update_param(
            self.graph, self._metas, traces, xs, dfs, Ds, operands, fixed, config.temporal_recursion, config.decay
        )
        if filtered:
            filtered = jax.tree.map(lambda f, e: (config.kappa * f + e).astype(f.dtype), filtered, traces)
        return traces, filtered

    def _trace_inputs(self, xs, record, operands):
        return record.x, operands, record.fixed

    def _contract(self, number, traces, signals, steps, credit: Credit):
        del steps, credit
        bare, filtered = traces
        relation = self.graph.hidden_param_op_relations[number]
        return contract_param(relation, self._metas[number], filtered or bare, signals)
