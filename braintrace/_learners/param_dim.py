"""D_RTRL: a trace for every trained weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .._binding import Binding
from .._compiler.policy import ControlFlowPolicy
from .._compiler.scope import CEILING
from .._engines.instant import SlotTrace
from .._engines.param import ParamEngine, ParamRecursion, check_anchors
from .._engines.weight_trace import WeightTrace, as_allocated
from .._jax import any_dtype
from .._types import Path, PyTree, path_str
from .base import EligibilityTrace
from .config import ETraceConfig
from .options import Legacy, VjpMethod, legacy_options
from .vjp import ETraceVjpAlgorithm

__all__ = ["ParamDimVjpAlgorithm", "dense_trace"]


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
    control_flow : ControlFlowPolicy, optional
        What to do with the loops and branches of the step.
    config : ETraceConfig, optional
        The rule as coordinates, with ``trace_factorization='per_param'``.
    random_feedback_key : int or JAX key, optional
        Of the fixed feedback matrices of ``learning_signal='random_feedback'``.
    snap_max_jacobian_elements : int
        See :class:`ETraceVjpAlgorithm`.

    Attributes
    ----------
    etrace_bwg : dict
        Opaque key per operation and group -> :class:`EligibilityTrace`, a dict of arrays: for a matrix
        ``(B?, in, out, S)``, for a bias ``(B?, out, S)``, for an ``element_wise`` parameter ``V + (S,)``.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit; the message names them.

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
        vjp_method: VjpMethod = "single-step",
        fast_solve: bool = True,
        trace_dtype: DTypeLike | None = None,
        chunked_trace: bool = True,
        control_flow: ControlFlowPolicy | None = None,
        config: ETraceConfig | None = None,
        random_feedback_key: jax.Array | int | None = None,
        snap_max_jacobian_elements: int = CEILING,
        **legacy: Unpack[Legacy],
    ):
        legacy_options(legacy, type(self))
        super().__init__(model, name, vjp_method, control_flow, config, random_feedback_key, snap_max_jacobian_elements)
        self.fast_solve = bool(fast_solve)
        self.chunked_trace = bool(chunked_trace)
        self.trace_dtype = None if trace_dtype is None else _floating(trace_dtype)

    def init_etrace_state(self, *args: PyTree, **kwargs: PyTree) -> None:
        """Allocate zero traces, as new state objects; the step counter is not touched."""
        del args, kwargs
        before, self._forms = self._forms or {}, None
        # What another kind of call needed it may need again.
        self._forms = {w.key: w.factorised & before.get(w.key, w.factorised) for w in self._engine.weights}
        self._slot_traces = {k: EligibilityTrace(v) for k, v in self._engine.init().items()}

    def _make_engine(self, binding: Binding) -> ParamEngine:
        config: Any = self.config
        numbers = tuple(range(len(binding.graph.hidden_param_op_relations)))
        recursion = ParamRecursion(config.temporal_recursion, config.decay, config.kappa)

        def plan() -> tuple[WeightTrace, ...]:
            if config.recurrence_scope == "sparse_n":
                check_anchors(binding.graph.hidden_param_op_relations)
            return ParamEngine.plan(binding, numbers, recursion, not self._overrides("_update_etrace_data"))

        weights = as_allocated(self._plan("weights", plan), self._forms)
        return ParamEngine(binding, numbers, weights, recursion, self.trace_dtype, self._samples())

    @property
    def etrace_bwg(self) -> dict[str, EligibilityTrace]:
        """Key -> trace, a dict of arrays with the hidden variables along a last axis; a view, made when it is read."""
        return {w.key: EligibilityTrace(self._dense(w)) for w in self._engine.weights}

    def _dense(self, weight: WeightTrace) -> dict[str, jax.Array]:
        return dense_trace(weight, self._slot_traces[weight.key].value, self._binding, self.param_states)

    def _trace_states(self) -> Iterator[tuple[brainstate.State, int | None]]:
        return ((self._slot_traces[w.key], w.batch_axis) for w in self._engine.weights)

    def _unit_axes(self) -> Iterator[tuple[brainstate.State, Sequence[Path], int]]:
        return ((self._slot_traces[w.key], w.group.hidden_paths, w.unit_axis) for w in self._engine.weights)

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
        found = {w.key: self._dense(w) for w in self._engine.weights if path in w.relation.parameter_paths}
        if not found:
            raise ValueError(f"The parameter {path_str(path)!r} is trained by the current step alone: it has no trace.")
        return found

    def _get_etrace_data(self) -> dict[str, SlotTrace]:
        return {k: s.value for k, s in self._slot_traces.items()}

    def _assign_etrace_data(self, vals: dict[str, SlotTrace]) -> None:
        for key, state in self._slot_traces.items():
            state.value = vals[key]


@any_dtype
def dense_trace(
    weight: WeightTrace, trace: SlotTrace, binding: Binding, parameters: Mapping[Path, brainstate.ParamState]
) -> dict[str, jax.Array]:
    """A trace as arrays with the hidden variables along a last axis."""
    operands = binding.operands(binding.of_parameters(parameters))
    return weight.dense(trace, operands[weight.number], weight.vmap_shape(trace))


def _floating(given: DTypeLike) -> np.dtype:
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"trace_dtype must be a floating-point type, such as 'bfloat16', got {given!r}.")
    return dtype
