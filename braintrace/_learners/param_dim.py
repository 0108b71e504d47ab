"""D_RTRL: a trace for every trained weight."""

from __future__ import annotations

import functools
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from .._compiler.policy import ControlFlowPolicy
from .._compiler.scope import CEILING
from .._jax import any_rank
from .._precision import wide, widened
from .._traces import param
from .._traces.record import add, contraction
from .._types import Path, path_str
from .base import EligibilityTrace
from .config import ETraceConfig
from .credit import Bars
from .vjp import ETraceVjpAlgorithm, legacy_options

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
        vjp_method: str = "single-step",
        fast_solve: bool = True,
        trace_dtype: Any = None,
        chunked_trace: bool = True,
        control_flow: ControlFlowPolicy | None = None,
        config: ETraceConfig | None = None,
        random_feedback_key: jax.Array | int | None = None,
        snap_max_jacobian_elements: int = CEILING,
        **legacy: Any,
    ):
        legacy_options(legacy, type(self))
        super().__init__(model, name, vjp_method, control_flow, config, random_feedback_key, snap_max_jacobian_elements)
        self.fast_solve = bool(fast_solve)
        self.chunked_trace = bool(chunked_trace)
        self.trace_dtype = None if trace_dtype is None else jnp.dtype(trace_dtype)
        if self.trace_dtype is not None and not jnp.issubdtype(self.trace_dtype, jnp.inexact):
            raise ValueError(f"trace_dtype must be a floating-point type, got {self.trace_dtype}.")

    def init_etrace_state(self, *args: Any, **kwargs: Any) -> None:
        """Allocate zero traces, as new state objects; the step counter is not touched."""
        del args, kwargs
        self._slot_traces = {k: EligibilityTrace(v) for k, v in self._zero_traces().items()}

    def _zero_traces(self) -> dict[str, param.SlotTrace]:
        width = lambda pair: self._recursion(pair.group, _Anything()).width  # noqa: E731
        return {pair.key: param.init(pair, width(pair), self.trace_dtype) for pair in self._pairs()}

    def _make_pairs(self) -> list[param.Pair]:
        self._check_output_shapes()
        if self.config.recurrence_scope == "sparse_n":
            self._check_anchors()
        pairs: list[param.Pair] = []
        for i, r in enumerate(self.graph.hidden_param_op_relations):
            meta = param.meta_of(r)
            # The structure is that of any step: varying entries may be read from anything.
            factorised = lambda g: self._factorise(i, self._recursion(g, _Anything()))  # noqa: E731, B023
            pairs.extend(param.Pair(i, r, g, meta, factorised(g)) for g in r.hidden_groups)
        return pairs

    def _check_anchors(self) -> None:
        """Refuse operations whose trace entries are not known to belong to one position each."""
        for r in self.graph.hidden_param_op_relations:
            rule = r.primitive.rules.snap_anchor
            if rule is None or not rule(r.eqn_params):
                raise NotImplementedError(
                    f"{r.primitive.name} at {path_str(r.path)!r} does not say that every weight belongs to one "
                    "position, which SnAp needs. Register the rule snap_anchor=lambda params: True on the operation "
                    "if each of its weights acts on one entry of the output, or use another rule."
                )

    def _can_record(self) -> bool:
        """Traces of neighbours advance step by step: between steps they are mixed, not scaled."""
        return super()._can_record() and all(g.snap is None for g in self.graph.hidden_groups)

    def _factorise(self, number, recursion) -> frozenset:
        r = self.graph.hidden_param_op_relations[number]
        rules = r.primitive.rules
        own_layout = any(rule is not None for rule in (rules.dt_to_t, rules.init_drtrl, rules.pp_x_repr))
        fixed_slope = set(r.linear_keys) == set(r.trainable_vars) and not r.fixed_vars and not own_layout
        alone = r.x_var is None or r.sub_steps is not None
        followed = any(g.snap is not None for g in r.hidden_groups)
        if alone or followed or not fixed_slope or self._overrides("_update_etrace_data"):
            return frozenset()
        return param.factorised_slots(recursion, number)

    @property
    def etrace_bwg(self) -> dict[str, EligibilityTrace]:
        """Key -> trace, a dict of arrays with the hidden variables along a last axis; a view, made when it is read."""
        operands = self._static_operands()
        return {pair.key: EligibilityTrace(self._dense(pair, operands)) for pair in self._pairs()}

    @any_rank
    def _dense(self, pair, operands) -> dict[str, jax.Array]:
        trace = self._slot_traces[pair.key].value
        return param.dense(pair, trace, operands[pair.number], pair.group.num_state, self._front(pair, trace))

    def _front(self, pair, trace) -> tuple[int, ...]:
        """The mapped axis of a trace that is looked at from outside of ``jax.vmap``."""
        one = param.init(pair, 1, None)
        name = next(iter(trace))
        shape = trace[name][0].shape
        return shape[: len(shape) - one[name][0].ndim]

    def _trace_states(self):
        for pair in self._pairs():
            batched = pair.meta.lead > 0 or len(pair.group.varshape) > pair.meta.relation.y_var.aval.ndim
            yield self._slot_traces[pair.key], 0 if batched else None

    def _unit_axes(self):
        for p in self._pairs():
            yield self._slot_traces[p.key], p.group.hidden_paths, -1 if p.group.snap is None else -2

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
        operands = self._static_operands()
        found = {p.key: self._dense(p, operands) for p in self._pairs() if path in p.relation.parameter_paths}
        if not found:
            raise ValueError(f"The parameter {path_str(path)!r} is trained by the current step alone: it has no trace.")
        return found

    # -- the rule -----------------------------------------------------------------------------------------------

    def _get_etrace_data(self) -> dict[str, param.SlotTrace]:
        return {k: s.value for k, s in self._slot_traces.items()}

    def _assign_etrace_data(self, vals: dict[str, param.SlotTrace]) -> None:
        for key, state in self._slot_traces.items():
            state.value = vals[key]

    def _recursion(self, group, varying) -> param.Recursion:
        """D and df of a group, from its varying entries at one step."""
        D = [[e.read(varying) for e in row] for row in group.cut.D]
        numbers = {r.op_index: i for i, r in enumerate(self.graph.hidden_param_op_relations)}
        df = {numbers[k]: [e.read(varying) for e in row] for k, row in group.cut.df.items() if k in numbers}
        config: Any = self.config
        return param.recursion_of(D, df, config.temporal_recursion, config.decay, config.kappa)

    def _pairs(self) -> list[param.Pair]:
        return self._plan("pairs", self._make_pairs)

    def _trace_inputs(self, xs, record, operands, invals):
        return record, operands

    def _update_etrace_data(self, running_index, old_traces, xs_and_dfs, Ds, weight_vals, input_is_multi_step):
        del running_index, Ds, weight_vals, input_is_multi_step
        record, operands = xs_and_dfs[0]
        new = {}
        for pair in self._pairs():
            recursion = self._recursion(pair.group, record.varying[pair.group.index])
            inputs = [of[pair.number] for of in (record.x, operands, record.fixed)]
            new[pair.key] = param.update(pair, recursion, old_traces[pair.key], *inputs)
        return new

    def _met(self, signals):
        """Signals per slot: with a trace filter they meet the filtered slots."""
        if self.config.trace_filter != "kappa":
            return signals
        return [[*([None] * len(slots)), *slots] for slots in signals]

    def _lift(self, number, traces, operands, fixed, steps):
        del steps

        def gradient(signals):
            met = self._met(signals)
            return add([param.contract(p, traces[p.key], met[p.group.index], held, fixed) for p in pairs])

        held = jax.lax.stop_gradient(operands)
        pairs = [p for p in self._pairs() if p.number == number]
        own = {p.group.index for p in pairs}
        relation = pairs[0].relation
        dtype = wide(relation.y_var.aval.dtype)
        zeros = [
            [jnp.zeros(g.varshape, dtype) if g.index in own else None] * g.num_state for g in self.graph.hidden_groups
        ]
        _, transpose = jax.vjp(gradient, zeros)
        return transpose(widened({k: operands[k] for k in relation.trainable_vars}))[0]

    def _meet(self, number, traces, signals, steps):
        own = {g.index for g in self.graph.hidden_param_op_relations[number].hidden_groups}
        return [slots if i in own else [None] * len(slots) for i, slots in enumerate(signals)]

    def _chunk_start(self, traces):
        return ()

    def _chunk_step(self, carry, index, record, operands, bars: Bars):
        del index, operands
        needed = set(range(len(self.graph.hidden_param_op_relations)))
        return carry, (record.varying, bars.new, bars.old), needed

    def _chunk_end(self, traces, carry, emitted, operands, front, length):
        varying, new, old = emitted.engine
        # The signals that meet the trace after step t: those of its new values, and of the old values of step t + 1.
        after = [
            [add([n, None if o is None else jnp.concatenate([o[1:], jnp.zeros_like(o[:1])])]) for n, o in zip(*slots)]
            for slots in zip(new, old)
        ]
        entry = [[None if o is None else o[0] for o in slots] for slots in old]
        after, entry = self._met(after), self._met(entry)
        traces, gradients = dict(traces), {}
        by_group: dict[int, list[param.Pair]] = {}
        for p in self._pairs():
            by_group.setdefault(p.group.index, []).append(p)
        found = self._coefficients(list(by_group.values()), varying, after, front, length)
        for (index, pairs), coefficients in zip(by_group.items(), found):
            for p in pairs:
                inputs = emitted.x.get(self._source(p.number)), operands[p.number], emitted.fixed.get(p.number, {})
                traces[p.key], gradient = self._pair_end(p, traces[p.key], coefficients, inputs, entry[index], front)
                gradients[p.number] = add([gradients.get(p.number), gradient])
        return traces, gradients

    def _coefficients(self, of_groups, varying, signals, front, length):
        def of_sample(varying, signals):
            parts = []
            for pairs in of_groups:
                group = pairs[0].group
                read = functools.partial(self._recursion, group)
                parts.append((read, varying[group.index], signals[group.index], pairs))
            return param.chunk_coefficients(parts, length)

        if front:
            out_axes = [param.ChunkCoefficients(1, 1, 0, 0)] * len(of_groups)
            of_sample = jax.vmap(of_sample, in_axes=1, out_axes=out_axes, axis_size=front[0])
        return of_sample(varying, signals)

    def _pair_end(self, pair, trace, coefficients, inputs, entry, front):
        x, operands, fixed = inputs
        cotangent = coefficients.y[pair.number]
        parts = []
        if cotangent is not None:
            parts.append(contraction(pair.relation, x, cotangent, operands, fixed, 1 + len(front)))
        meets = [add([q, c]) for q, c in zip(entry, coefficients.entry)]
        at_entry = jax.tree.map(lambda v: v[0], fixed)
        parts.append(param.contract(pair, trace, meets, operands, at_entry, len(front)))
        recursion = self._recursion(pair.group, _Anything())
        return param.chunk_update(pair, recursion, trace, coefficients, *inputs, front), add(parts)


ParamDimVjpAlgorithm._engine = ParamDimVjpAlgorithm


class _Anything:
    """Varying entries whose values do not matter."""

    def __getitem__(self, slot: int) -> np.ndarray:
        return np.zeros((1,))
