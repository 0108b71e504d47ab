"""The executor of learners, and the step's derivatives as older code asked it for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import brainstate
import jax
import jax.numpy as jnp

from .._compiler.call import call_of
from .._compiler.executor import ETraceGraphExecutor
from .._compiler.policy import ControlFlowPolicy
from .._compiler.scope import CEILING, scope_of
from .._compiler.step import StepRecord
from .._types import Path, PyTree

__all__ = ["ETraceVjpGraphExecutor"]

Key = tuple[Path, int]  # of a relation
Jacobians = tuple[dict[Key, jax.Array | None], dict[tuple[Key, int], jax.Array]]  # (xs, dfs)
Values: TypeAlias = dict[Path, PyTree]  # of states
Stepper = Callable[[PyTree, Jacobians, list[jax.Array | None]], PyTree]


class ETraceVjpGraphExecutor(ETraceGraphExecutor):
    """The executor of learners that differentiate in reverse mode.

    Parameters
    ----------
    model : brainstate.nn.Module
    vjp_method : {'single-step', 'multi-step'}
        Whether a call is differentiated through one step or through a window of steps.
    include_recurrent_mixing, sparse_n, snap_max_jacobian_elements, control_flow
        As for :class:`ETraceGraphExecutor`.
    full_jacobian : bool
        Whether groups give their whole Jacobian, as a product with tangents, instead of its blocks per position.
    include_output_bypass : bool
        Kept as an attribute; it changes no gradient, see :func:`compile_etrace_graph`.

    Raises
    ------
    ValueError
        If ``vjp_method`` is another string, ``sparse_n`` or ``snap_max_jacobian_elements`` below 1.

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.LSTMCell(2, 3)
    >>> _ = brainstate.nn.init_all_states(cell)
    >>> executor = braintrace.ETraceVjpGraphExecutor(cell)
    >>> executor.compile_graph(jnp.zeros(2))
    >>> out, hidden, other, (xs, dfs), Ds, _ = executor.solve_h2w_h2h_jacobian(jnp.ones(2))
    >>> Ds[0].shape
    (3, 2, 2)
    """

    def __init__(
        self,
        model: brainstate.nn.Module,
        vjp_method: str = "single-step",
        include_recurrent_mixing: bool = False,
        sparse_n: int | None = None,
        snap_max_jacobian_elements: int = CEILING,
        control_flow: ControlFlowPolicy | None = None,
        full_jacobian: bool = False,
        include_output_bypass: bool = True,
    ):
        super().__init__(model, include_recurrent_mixing, sparse_n, snap_max_jacobian_elements, control_flow)
        if vjp_method not in ("single-step", "multi-step"):
            raise ValueError(f"vjp_method must be 'single-step' or 'multi-step', got {vjp_method!r}.")
        if full_jacobian:
            self._scope = scope_of(True, None, snap_max_jacobian_elements, full=True)
        self.vjp_method = vjp_method
        self.full_jacobian = full_jacobian
        self.include_output_bypass = include_output_bypass
        self._needs_perturbation = self.is_single_step_vjp

    @property
    def is_single_step_vjp(self) -> bool:
        return self.vjp_method == "single-step"

    @property
    def is_multi_step_vjp(self) -> bool:
        return self.vjp_method == "multi-step"

    def solve_h2w_h2h_jacobian(
        self, *args: PyTree, etrace_stepper: Stepper | None = None, init_etrace: PyTree = None
    ) -> tuple[PyTree, ...]:
        """Run the step from the states' present values, which stay as they are, and return its derivatives.

        Parameters
        ----------
        *args : pytree
            Arguments of the model; with a leaf in :class:`MultiStepData` the call is a window of steps.
        etrace_stepper : callable, optional
            ``(trace, (xs, dfs), Ds) -> trace``, applied at every step.
        init_etrace : pytree, optional
            The trace before the first step.

        Returns
        -------
        out : pytree
        hidden_vals, other_vals : dict
            New values of the hidden states, and of the rest that are no parameters, by path.
        jacobians : tuple of dict, or None
            ``(xs, dfs)``: inputs by relation key, and arrays of shape ``V + (S,)`` by (relation key, group index).
        Ds : list of array, or None
            Of shape ``V + (S, S)``, one per group; with neighbours ``V + (M, M)``, as
            :meth:`HiddenGroup.diagonal_jacobian` gives it; with ``full_jacobian``, ``V + (S,) + V + (S,)``. Those of a
            window have time in front; with a stepper there are none.
        trace : pytree or None
            After the last step, with a stepper.
        """
        out, hidden, other, jacobians, Ds, _, trace = self._solve(args, etrace_stepper, init_etrace, False)
        return out, hidden, other, jacobians, Ds, trace

    def solve_h2w_h2h_l2h_jacobian(
        self, *args: PyTree, etrace_stepper: Stepper | None = None, init_etrace: PyTree = None
    ) -> tuple[PyTree, ...]:
        """As :meth:`solve_h2w_h2h_jacobian`, with the backward pass before the trace.

        It takes cotangents of ``(out, hidden_vals, other_vals)`` and returns those of the argument leaves, of the
        states' old values by path, and, by path, of the new hidden values taken together (zeros for a window).
        """
        return self._solve(args, etrace_stepper, init_etrace, True)

    def _solve(
        self, args: tuple[PyTree, ...], stepper: Stepper | None, trace: PyTree, backward: bool
    ) -> tuple[PyTree, ...]:
        call = call_of(args, {})
        states = self.select(call)
        graph = self.graph
        info = graph.module_info
        leaves = [*jax.tree.leaves(call.given), *info.environment_leaves(call.inputs)]
        over_time = [*call.over_time, *([False] * info.environment.num_leaves)]
        values = {p: s.value for p, s in zip(info.compiled_state_paths, states)}
        zeros = graph.step.zeros().new

        def run(
            leaves: Sequence[jax.Array], values: Values, zeros: dict[Path, jax.Array]
        ) -> tuple[tuple[PyTree, Values], tuple[PyTree, ...]]:
            if any(over_time):
                return self._window(over_time, leaves, values, stepper, trace)
            out, new, record = self._step(leaves, values, zeros)
            if stepper is not None:
                return (out, new), (None, None, stepper(trace, *record))
            return (out, new), (*record, None)

        if backward:
            (out, new), pull, extra = jax.vjp(run, leaves, values, zeros, has_aux=True)
        else:
            (out, new), extra = run(leaves, values, zeros)
        jacobians, Ds, trace = extra
        hidden = {p: new[p] for p in info.states_of(brainstate.HiddenState)}
        weights = info.states_of(brainstate.ParamState)
        other = {p: v for p, v in new.items() if p not in hidden and p not in weights}

        def residuals(cotangents: tuple[PyTree, Values, Values]) -> tuple[PyTree, ...]:
            bar, hidden_bars, other_bars = cotangents
            kept = {p: jax.tree.map(jnp.zeros_like, new[p]) for p in weights}
            return pull((bar, hidden_bars | other_bars | kept))

        return out, hidden, other, jacobians, Ds, residuals if backward else None, trace

    def _step(
        self, leaves: Sequence[jax.Array], values: Values, zeros: dict[Path, jax.Array]
    ) -> tuple[PyTree, Values, tuple[Jacobians, list[jax.Array | None]]]:
        """Output, new values by path, and ``((xs, dfs), Ds)``."""
        graph = self.graph
        info = graph.module_info
        states = [info.reals(p, x) for p in info.compiled_state_paths for x in jax.tree.leaves(values[p])]
        invals = [*leaves, *states]
        operands = [r.operand_program.operands(invals) for r in graph.operations]
        outs, record = graph.step(invals, operands, graph.step.zeros()._replace(new=zeros))
        out, news = info.results(outs)
        new = dict(zip(info.compiled_state_paths, news))
        dense = lambda g, entries: g.dense([e.read(record.varying[g.index]) for e in entries])  # noqa: E731
        xs = {r.key: x for r, x in zip(graph.hidden_param_op_relations, record.x)}
        dfs = {
            (r.key, g.index): dense(g, g.jacobian.df[r.op_index])
            for r in graph.hidden_param_op_relations
            for g in r.hidden_groups
        }
        return out, new, ((xs, dfs), self._transitions(record))

    def _transitions(self, record: StepRecord) -> list[jax.Array | None]:
        traced = self.graph.traced
        return [g.dense_D(record.varying[g.index]) if g.index in traced else None for g in self.graph.hidden_groups]

    def _window(
        self,
        over_time: Sequence[bool],
        leaves: Sequence[jax.Array],
        values: Values,
        stepper: Stepper | None,
        trace: PyTree,
    ) -> tuple[tuple[PyTree, Values], tuple[PyTree, ...]]:
        zeros = self.graph.step.zeros().new

        def body(carry: tuple[Values, PyTree], sliced: Sequence[jax.Array]) -> tuple[tuple[Values, PyTree], PyTree]:
            values, trace = carry
            parts = iter(sliced)
            out, values, record = self._step(
                [next(parts) if t else x for x, t in zip(leaves, over_time)], values, zeros
            )
            if stepper is not None:
                return (values, stepper(trace, *record)), (out, None)
            return (values, trace), (out, record)

        data = [x for x, t in zip(leaves, over_time) if t]
        (values, trace), (out, record) = jax.lax.scan(body, (values, trace), data)
        jacobians, Ds = (None, None) if record is None else record
        return (out, values), (jacobians, Ds, None if stepper is None else trace)
