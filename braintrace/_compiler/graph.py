"""Everything the compiler knows about a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import brainstate

from .._jax import Literal, Var, any_rank
from .._legacy.perturbation import HiddenPerturbation, add_hidden_perturbation_from_minfo
from .._types import Path, PyTree
from .call import Call, call_of
from .descent import holds_link
from .diagnostics import CompilationRecord, DiagnosticKind, emit
from .find_relations import find_relations
from .flow import Flow, Reach, analyse_flow, analyse_reach
from .groups import HiddenGroup, partition, slots_of
from .influence import Influence
from .jacobian import Jacobians
from .module_info import ModuleInfo, info_of_call
from .neighbours import find_neighbourhood
from .policy import ControlFlowPolicy
from .relations import HiddenParamOpRelation
from .scope import CEILING, Scope, scope_of
from .step import PerturbedStep, perturb
from .transition import transition_of
from .untraced import coupled_groups, fixed_products, mixing_transitions, unmarked_parameters, untraced_memory

__all__ = [
    "ETraceGraph", "compile_etrace_graph", "compile_in_scope", "groups_of", "reach_of",
]  # fmt: skip


class ETraceGraph(NamedTuple):
    """A compiled model.

    Attributes
    ----------
    module_info : ModuleInfo
        One step as a flat program.
    hidden_groups : list of HiddenGroup
    hid_path_to_group : dict
        Path of a hidden state to its group.
    hidden_param_op_relations : tuple of HiddenParamOpRelation
    plain_operations : tuple of HiddenParamOpRelation
        Operations with parameters that drive no group (readouts, weights that act through other weights).
    hidden_perturb : HiddenPerturbation or None
    step : PerturbedStep
        The step as a program whose reverse pass yields the learning signals.
    diagnostics : tuple of CompilationRecord
    """

    module_info: ModuleInfo
    hidden_groups: list[HiddenGroup]
    hid_path_to_group: dict[Path, HiddenGroup]
    hidden_param_op_relations: tuple[HiddenParamOpRelation, ...]
    plain_operations: tuple[HiddenParamOpRelation, ...]
    hidden_perturb: HiddenPerturbation | None
    step: PerturbedStep
    diagnostics: tuple[CompilationRecord, ...]

    @property
    def operations(self) -> tuple[HiddenParamOpRelation, ...]:
        """Every operation with parameters: the relations, then the plain ones."""
        return (*self.hidden_param_op_relations, *self.plain_operations)

    @property
    def traced(self) -> frozenset[int]:
        """Indices of the groups that some relation drives."""
        return frozenset(g.index for r in self.hidden_param_op_relations for g in r.hidden_groups)

    def explain(
        self,
        *,
        weight_path: Path | None = None,
        hidden_path: Path | None = None,
        kind: DiagnosticKind | str | None = None,
    ) -> tuple[CompilationRecord, ...]:
        """The records about a parameter, a hidden state or of one kind, in order."""
        return tuple(
            r
            for r in self.diagnostics
            if (weight_path is None or r.weight_path == weight_path)
            and (hidden_path is None or hidden_path in r.hidden_paths)
            and (kind is None or r.kind == DiagnosticKind(kind))
        )

    def dict(self) -> dict[str, Any]:
        return self._asdict()

    def __repr__(self) -> str:
        return f"ETraceGraph(groups={self.hidden_groups}, relations={list(self.hidden_param_op_relations)})"


def compile_etrace_graph(
    model: brainstate.nn.Module,
    *args: PyTree,
    include_hidden_perturb: bool = True,
    include_recurrent_mixing: bool = False,
    sparse_n: int | None = None,
    snap_max_jacobian_elements: int = CEILING,
    control_flow: ControlFlowPolicy | None = None,
    include_output_bypass: bool = True,
) -> ETraceGraph:
    """Trace one step of a model with initialised states and find what can be trained online.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its ``update`` is one time step.
    *args : pytree of array or jax.ShapeDtypeStruct
        Example arguments of one step.
    include_hidden_perturb : bool
        Whether :attr:`ETraceGraph.hidden_perturb` is made.
    include_recurrent_mixing : bool
        Whether the transition Jacobians of groups contain the recurrent mixing of positions.
    sparse_n : int, optional
        With the mixing, the order of the neighbourhood whose positions a trace follows; ``None`` for each position
        alone.
    snap_max_jacobian_elements : int
        The most elements that the Jacobian of a group may have between neighbours.
    control_flow : ControlFlowPolicy, optional
        What to do with loops and branches.
    include_output_bypass : bool
        Accepted, and changes no gradient: every output gets its credit, whether it reads a new hidden value, an old one
        or an operation's output directly, because the step is differentiated as a whole.

    Returns
    -------
    ETraceGraph

    Raises
    ------
    NotSupportedError
        If the step writes a parameter.
    ValueError
        If a state changes its unit or shape within the step.
    NotImplementedError
        If a parameter or a marked operation is used where no trace can follow it.
    NotSupportedError
        If the Jacobian between neighbours is larger than ``snap_max_jacobian_elements``, or ``sparse_n`` is given
        without ``include_recurrent_mixing``.
    CompilationError
        If loops and branches are nested deeper than the policy allows.

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.GRUCell(2, 3)
    >>> _ = brainstate.nn.init_all_states(cell)
    >>> graph = braintrace.compile_etrace_graph(cell, jnp.zeros(2))
    >>> [r.path for r in graph.hidden_param_op_relations]
    [('Wz', 'weight'), ('Wh', 'weight')]
    """
    del include_output_bypass
    scope = scope_of(include_recurrent_mixing, sparse_n, snap_max_jacobian_elements)
    graph = compile_in_scope(model, call_of(args, {}).first_step(), scope, include_hidden_perturb, control_flow)
    emit(graph.diagnostics)
    return graph


def compile_in_scope(
    model: brainstate.nn.Module,
    call: Call,
    scope: Scope,
    include_hidden_perturb: bool,
    control_flow: ControlFlowPolicy | None,
) -> ETraceGraph:
    """:func:`compile_etrace_graph` for any call and scope, without its warnings."""
    info = info_of_call(model, call, control_flow)
    flow = analyse_flow(info)
    groups, group_of, merged = groups_of(info, flow, scope)
    reach = reach_of(info, flow, group_of)
    influence = Influence(info, flow)
    relations, plain, found = find_relations(info, flow, reach, groups, influence)
    step = perturb(info, flow, reach, groups, (*relations, *plain))
    perturbation = add_hidden_perturbation_from_minfo(info) if include_hidden_perturb else None
    found += unmarked_parameters(info, flow, influence) + untraced_memory(info, influence, relations, scope.mixing)
    if scope.mixing and len(groups) > 1:
        found += coupled_groups(analyse_flow(info, mixing=True), groups, relations)
    elif not scope.mixing:
        found += coupled_groups(flow, groups, relations) + mixing_transitions(flow, groups, relations)
        found += fixed_products(info, flow, influence, groups, relations)
    diagnostics = (*info.diagnostics, *flow.diagnostics, *merged, *found)
    return ETraceGraph(info, groups, group_of, relations, plain, perturbation, step, diagnostics)


@any_rank
def groups_of(
    info: ModuleInfo, flow: Flow, scope: Scope
) -> tuple[list[HiddenGroup], dict[Path, HiddenGroup], list[CompilationRecord]]:
    if scope.mixing:
        _refuse_long_loops(info, flow)
        flow = analyse_flow(info, mixing=True)
    partitioned, records = partition(info, flow, scope.mixing)
    states = dict(zip(info.compiled_state_paths, info.compiled_model_states))
    groups, jacobians = [], Jacobians()
    for index, paths in enumerate(partitioned):
        members = tuple(states[p] for p in paths)
        varshape = tuple(members[0].varshape)
        transition = transition_of(info, flow, paths, scope.mixing)
        slots = slots_of(transition.olds, varshape)
        snap = None
        if scope.kind == "sparse_n":
            snap, record = find_neighbourhood(flow, transition, paths, varshape, len(slots), scope)
            records.extend(record)
        jacobian = jacobians.make(transition, varshape, slots, scope, snap)
        groups.append(HiddenGroup(index, paths, members, varshape, len(slots), jacobian, transition, snap))
    return groups, {p: g for g in groups for p in g.hidden_paths}, records


def _refuse_long_loops(info: ModuleInfo, flow: Flow) -> None:
    if any(op.front for op in flow.ops) or any(holds_link(e) for e in info.jaxpr.eqns):
        raise NotImplementedError(
            "A scope that sees the recurrent mixing cannot look into a long loop of the step: how the positions mix "
            "over its sub-steps is not followed. Use a rule of the diagonal scope (D_RTRL, pp_prop), or raise "
            "ControlFlowPolicy(scan_unroll_limit=...) so that the loop is unrolled."
        )


def reach_of(info: ModuleInfo, flow: Flow, group_of: Mapping[Path, HiddenGroup]) -> Reach:
    sinks: dict[Var, set[int]] = {}
    for path, var in info.hidden_path_to_outvar.items():
        if not isinstance(var, Literal):
            sinks.setdefault(var, set()).add(group_of[path].index)
    return analyse_reach(info.jaxpr.eqns, info.jaxpr.outvars, sinks, flow.ops)
