"""The compiler's passes one at a time, as older code called them."""

from __future__ import annotations

from collections.abc import Mapping, Set

import brainstate

from .._compiler.diagnostics import emit
from .._compiler.find_relations import find_relations
from .._compiler.flow import analyse_flow
from .._compiler.graph import groups_of, reach_of
from .._compiler.groups import HiddenGroup
from .._compiler.influence import Influence
from .._compiler.module_info import ModuleInfo, extract_module_info
from .._compiler.relations import HiddenParamOpRelation
from .._compiler.scope import CEILING, scope_of
from .._types import Path, PyTree

__all__ = [
    "find_hidden_groups_from_minfo", "find_hidden_groups_from_module", "find_hidden_param_op_relations_from_minfo",
    "find_hidden_param_op_relations_from_module",
]  # fmt: skip


def find_hidden_groups_from_minfo(
    minfo: ModuleInfo,
    include_recurrent_mixing: bool = False,
    sparse_n: int | None = None,
    snap_max_jacobian_elements: int = CEILING,
    descended_scan_eqn_ids: Set[int] = frozenset(),
    descended_hidden_paths: Set[Path] = frozenset(),
) -> tuple[list[HiddenGroup], dict[Path, HiddenGroup]]:
    """The hidden groups of a traced model.

    Parameters
    ----------
    minfo : ModuleInfo
        From :func:`extract_module_info`.
    include_recurrent_mixing, sparse_n, snap_max_jacobian_elements
        As in :func:`compile_etrace_graph`.
    descended_scan_eqn_ids, descended_hidden_paths
        Accepted, without effect: what is followed inside long loops stands in ``minfo``.

    Returns
    -------
    groups : list of HiddenGroup
    group_of : dict
        Path of a hidden state to its group.

    Raises
    ------
    NotSupportedError
        As :func:`compile_etrace_graph`.

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.LSTMCell(2, 3)
    >>> _ = brainstate.nn.init_all_states(cell)
    >>> groups, _ = braintrace.find_hidden_groups_from_minfo(braintrace.extract_module_info(cell, jnp.zeros(2)))
    >>> groups
    [HiddenGroup(index=0, members=['h', 'c'], varshape=(3,), S=2)]
    """
    del descended_scan_eqn_ids, descended_hidden_paths
    scope = scope_of(include_recurrent_mixing, sparse_n, snap_max_jacobian_elements)
    return groups_of(minfo, analyse_flow(minfo), scope)[:2]


def find_hidden_groups_from_module(
    model: brainstate.nn.Module,
    *args: PyTree,
    include_recurrent_mixing: bool = False,
    sparse_n: int | None = None,
    snap_max_jacobian_elements: int = CEILING,
    **kwargs: PyTree,
) -> tuple[list[HiddenGroup], dict[Path, HiddenGroup]]:
    """:func:`extract_module_info`, then :func:`find_hidden_groups_from_minfo`.

    Parameters
    ----------
    model : brainstate.nn.Module
        With initialised states.
    *args, **kwargs
        As :func:`extract_module_info` takes them.
    include_recurrent_mixing, sparse_n, snap_max_jacobian_elements
        As in :func:`compile_etrace_graph`.

    Returns
    -------
    groups : list of HiddenGroup
    group_of : dict
        Path of a hidden state to its group.

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.GRUCell(2, 3)
    >>> _ = brainstate.nn.init_all_states(cell)
    >>> braintrace.find_hidden_groups_from_module(cell, jnp.zeros(2))[0]
    [HiddenGroup(index=0, members=['h'], varshape=(3,), S=1)]
    """
    minfo = extract_module_info(model, *args, **kwargs)
    return find_hidden_groups_from_minfo(minfo, include_recurrent_mixing, sparse_n, snap_max_jacobian_elements)


def find_hidden_param_op_relations_from_minfo(
    minfo: ModuleInfo,
    hid_path_to_group: Mapping[Path, HiddenGroup],
    descended_scan_eqn_ids: Set[int] = frozenset(),
    *,
    descended_hidden_paths: Set[Path] = frozenset(),
) -> tuple[HiddenParamOpRelation, ...]:
    """The relations of a traced model.

    Parameters
    ----------
    minfo : ModuleInfo
        From :func:`extract_module_info`.
    hid_path_to_group : mapping
        From :func:`find_hidden_groups_from_minfo`.
    descended_scan_eqn_ids, descended_hidden_paths
        Accepted, without effect: what is followed inside long loops stands in ``minfo``.

    Returns
    -------
    tuple of HiddenParamOpRelation
        What speaks against other relations is shown as warnings.

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.ValinaRNNCell(2, 3)
    >>> _ = brainstate.nn.init_all_states(cell)
    >>> minfo = braintrace.extract_module_info(cell, jnp.zeros(2))
    >>> _, group_of = braintrace.find_hidden_groups_from_minfo(minfo)
    >>> braintrace.find_hidden_param_op_relations_from_minfo(minfo, group_of)
    (HiddenParamOpRelation('W.weight', etp_mv, groups=[0]),)
    """
    del descended_scan_eqn_ids, descended_hidden_paths
    flow = analyse_flow(minfo)
    groups = sorted({g.index: g for g in hid_path_to_group.values()}.values(), key=lambda g: g.index)
    reach, influence = reach_of(minfo, flow, hid_path_to_group), Influence(minfo, flow)
    relations, _, records = find_relations(minfo, flow, reach, groups, influence)
    emit(records)
    return relations


def find_hidden_param_op_relations_from_module(
    model: brainstate.nn.Module, *args: PyTree, **kwargs: PyTree
) -> tuple[HiddenParamOpRelation, ...]:
    """:func:`extract_module_info`, then groups, then relations.

    Parameters
    ----------
    model : brainstate.nn.Module
        With initialised states.
    *args, **kwargs
        As :func:`extract_module_info` takes them.

    Returns
    -------
    tuple of HiddenParamOpRelation

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.MiniGRU(2, 3)
    >>> _ = brainstate.nn.init_all_states(cell)
    >>> [r.path for r in braintrace.find_hidden_param_op_relations_from_module(cell, jnp.zeros(2))]
    [('W_z', 'weight'), ('W_x', 'weight')]
    """
    minfo = extract_module_info(model, *args, **kwargs)
    return find_hidden_param_op_relations_from_minfo(minfo, find_hidden_groups_from_minfo(minfo)[1])
