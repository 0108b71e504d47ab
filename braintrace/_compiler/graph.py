"""Everything the compiler knows about a model."""

from __future__ import annotations

from typing import Any, NamedTuple

import brainstate

from .._jax import Literal
from .._types import Path
from .cut import differentiate_cut, slice_group
from .diagnostics import CompilationRecord, DiagnosticKind, emit
from .flow import analyse_flow, analyse_reach, refuse_control_flow
from .groups import HiddenGroup, partition, slots_of
from .module_info import ModuleInfo, extract_module_info
from .relations import HiddenParamOpRelation, find_relations
from .tape import Tape, build_tape

__all__ = ["ETraceGraph", "compile_etrace_graph"]


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
    tape : Tape
        The step as a program whose reverse pass yields the learning signals.
    diagnostics : tuple of CompilationRecord
    """

    module_info: ModuleInfo
    hidden_groups: list[HiddenGroup]
    hid_path_to_group: dict[Path, HiddenGroup]
    hidden_param_op_relations: tuple[HiddenParamOpRelation, ...]
    plain_operations: tuple[HiddenParamOpRelation, ...]
    tape: Tape
    diagnostics: tuple[CompilationRecord, ...]

    @property
    def operations(self) -> tuple[HiddenParamOpRelation, ...]:
        """Every operation with parameters: the relations, then the plain ones."""
        return (*self.hidden_param_op_relations, *self.plain_operations)

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


def compile_etrace_graph(model: brainstate.nn.Module, *args: Any) -> ETraceGraph:
    """Trace one step of a model with initialised states and find what can be trained online.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its ``update`` is one time step.
    *args : pytree of array or jax.ShapeDtypeStruct
        Example arguments of one step.

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
        If a marked operation stands inside a loop or branch, or a ``while`` loop computes with hidden states.

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.GRUCell(2, 3)
    >>> _ = brainstate.nn.init_all_states(cell)
    >>> graph = braintrace.compile_etrace_graph(cell, jnp.zeros(2))
    >>> [r.path for r in graph.hidden_param_op_relations]
    [('Wz', 'weight'), ('Wh', 'weight')]
    """
    info = extract_module_info(model, *args)
    refuse_control_flow(info)
    flow = analyse_flow(info)
    partitioned, merged = partition(info, flow)
    states = dict(zip(info.compiled_state_paths, info.compiled_model_states))
    groups = []
    for index, paths in enumerate(partitioned):
        members = tuple(states[p] for p in paths)
        varshape, slots = tuple(members[0].varshape), slots_of(members)
        part = slice_group(info, flow, paths)
        cut = differentiate_cut(info, part, varshape, slots)
        groups.append(HiddenGroup(index, paths, members, varshape, len(slots), cut, frozenset(part.positions)))
    group_of = {p: g for g in groups for p in g.hidden_paths}
    sinks: dict[Any, set[int]] = {}
    for path, var in info.hidden_path_to_outvar.items():
        if not isinstance(var, Literal):
            sinks.setdefault(var, set()).add(group_of[path].index)
    reach = analyse_reach(info.jaxpr.eqns, info.jaxpr.outvars, sinks, flow.ops)
    relations, plain, found = find_relations(info, flow, reach, groups)
    tape = build_tape(info, flow, reach, groups, (*relations, *plain))
    diagnostics = (*info.diagnostics, *merged, *found)
    emit(diagnostics)
    return ETraceGraph(info, groups, group_of, relations, plain, tape, diagnostics)
