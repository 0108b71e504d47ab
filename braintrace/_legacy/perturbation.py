"""The step with something added to every new hidden value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set, Sized
from typing import Any, NamedTuple

import brainstate
import jax
import jax.numpy as jnp

from .._compiler.groups import HiddenGroup
from .._compiler.module_info import ModuleInfo, extract_module_info
from .._jax import Atom, ClosedJaxpr, JaxprEqn, Literal, Var, bind_equation, eval_jaxpr, open_jaxpr, structs
from .._program import run_program
from .._types import Path, PyTree, path_str

__all__ = ["HiddenPerturbation", "add_hidden_perturbation_from_minfo", "add_hidden_perturbation_in_module"]


class HiddenPerturbation(NamedTuple):
    """The step as a program that adds one more input to every new hidden value, where the step writes it.

    The derivative with respect to such an input is the total derivative with respect to that new value.

    Attributes
    ----------
    perturb_vars : tuple of Var
        The added inputs, one per hidden state; ``.aval`` has their shape and dtype.
    perturb_hidden_paths : tuple of path
        Hidden states in the same order.
    perturb_hidden_states : tuple of HiddenState
    perturb_jaxpr : ClosedJaxpr
        ``(step inputs, perturbations) -> step outputs``, flat.
    bypass_param_paths, bypass_hidden_paths : tuple of path
        Empty: a parameter or an old hidden value that reaches the output beside the new hidden values needs no input of
        its own, for the step is differentiated as a whole.
    bypass_vars, bypass_hidden_vars : tuple of Var
        Their inputs, in the same order: none.
    """

    perturb_vars: tuple[Var, ...]
    perturb_hidden_paths: tuple[Path, ...]
    perturb_hidden_states: tuple[brainstate.HiddenState, ...]
    perturb_jaxpr: ClosedJaxpr
    bypass_param_paths: tuple[Path, ...] = ()
    bypass_vars: tuple[Var, ...] = ()
    bypass_hidden_paths: tuple[Path, ...] = ()
    bypass_hidden_vars: tuple[Var, ...] = ()

    def init_perturb_data(self) -> list[jax.Array]:
        """Zeros, one array per hidden state."""
        return [jnp.zeros(v.aval.shape, v.aval.dtype) for v in self.perturb_vars]

    def eval_jaxpr(
        self,
        inputs: Sequence[jax.Array],
        perturb_data: Sequence[jax.Array],
        bypass_data: Sequence[jax.Array] = (),
        bypass_hidden_data: Sequence[jax.Array] = (),
    ) -> list[jax.Array]:
        """Flat outputs of the step for flat inputs, one perturbation per hidden state and one value per bypass."""
        self._check_number(perturb_data, self.perturb_hidden_paths, "perturbations")
        self._check_number(bypass_data, self.bypass_param_paths, "values of bypassing parameters")
        self._check_number(bypass_hidden_data, self.bypass_hidden_paths, "values of bypassing hidden states")
        return eval_jaxpr(self.perturb_jaxpr, *inputs, *perturb_data, *bypass_data, *bypass_hidden_data)

    def perturb_data_to_hidden_group_data(
        self, perturb_data: Sequence[jax.Array], hidden_groups: Sequence[HiddenGroup]
    ) -> list[jax.Array]:
        """One array per hidden state, as one of shape ``V + (S,)`` per group."""
        self._check_number(perturb_data, self.perturb_hidden_paths, "perturbations")
        return _by_group(dict(zip(self.perturb_hidden_paths, perturb_data)), hidden_groups)

    def bypass_hidden_data_to_hidden_group_data(
        self, bypass_hidden_data: Sequence[jax.Array], hidden_groups: Sequence[HiddenGroup]
    ) -> list[jax.Array]:
        """One array per path of :attr:`bypass_hidden_paths`, as one of shape ``V + (S,)`` per group, else zero."""
        self._check_number(bypass_hidden_data, self.bypass_hidden_paths, "values of bypassing hidden states")
        return _by_group(dict(zip(self.bypass_hidden_paths, bypass_hidden_data)), hidden_groups)

    def _check_number(self, data: Sized, paths: Sequence[Path], name: str) -> None:
        if len(data) != len(paths):
            raise ValueError(
                f"There must be {len(paths)} {name}, one for each of {[path_str(p) for p in paths]}, got {len(data)}."
            )

    def dict(self) -> dict[str, Any]:
        return self._asdict()

    def __repr__(self) -> str:
        shapes = {path_str(p): v.aval.shape for p, v in zip(self.perturb_hidden_paths, self.perturb_vars)}
        return f"HiddenPerturbation({shapes})"


def _by_group(values: Mapping[Path, jax.Array], groups: Sequence[HiddenGroup]) -> list[jax.Array]:
    def member(path: Path, old: Var) -> jax.Array:
        return values[path] if path in values else jnp.zeros(old.aval.shape, old.aval.dtype)

    return [g.concat_hidden([member(p, v) for p, v in zip(g.hidden_paths, g.hidden_invars)]) for g in groups]


def add_hidden_perturbation_from_minfo(
    minfo: ModuleInfo,
    descended_scan_eqn_ids: Set[int] = frozenset(),
    include_output_bypass: bool = True,
    *,
    descended_hidden_paths: Set[Path] = frozenset(),
) -> HiddenPerturbation:
    """Add an input to every new hidden value of a traced step.

    Parameters
    ----------
    minfo : ModuleInfo
        From :func:`extract_module_info`.
    descended_scan_eqn_ids, descended_hidden_paths
        Accepted, without effect: what is followed inside long loops stands in ``minfo``.
    include_output_bypass : bool
        Accepted, without effect: see :func:`compile_etrace_graph`.

    Returns
    -------
    HiddenPerturbation

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.LSTMCell(2, 3)
    >>> _ = brainstate.nn.init_all_states(cell)
    >>> minfo = braintrace.extract_module_info(cell, jnp.zeros(2))
    >>> braintrace.add_hidden_perturbation_from_minfo(minfo)
    HiddenPerturbation({'h': (3,), 'c': (3,)})
    """
    del descended_scan_eqn_ids, include_output_bypass, descended_hidden_paths
    jaxpr = minfo.jaxpr
    states = minfo.states_of(brainstate.HiddenState)
    added_to: dict[Atom, list[int]] = {}
    for i, path in enumerate(states):
        if _is_made(minfo, path):
            added_to.setdefault(minfo.hidden_path_to_outvar[path], []).append(i)
    beside = {minfo.num_var_out + n: i for i, n in _beside(minfo, states, added_to)}

    def run(inputs: Sequence[jax.Array], perturbations: Sequence[jax.Array]) -> list[jax.Array]:
        def shifted(eqn: JaxprEqn, values: list[jax.Array]) -> list[jax.Array]:
            pairs = zip(eqn.outvars, bind_equation(eqn, values))
            return [sum((perturbations[i] for i in added_to.get(v, ())[:1]), out) for v, out in pairs]

        outs = list(map(jnp.asarray, run_program(minfo.closed_jaxpr, inputs, shifted)))
        return [x + perturbations[beside[n]] if n in beside else x for n, x in enumerate(outs)]

    shapes = structs([minfo.hidden_path_to_invar[p] for p in states])
    closed = jax.make_jaxpr(run)(structs(jaxpr.invars), shapes)
    added = tuple(open_jaxpr(closed).invars[len(jaxpr.invars) :])
    return HiddenPerturbation(added, tuple(states), tuple(states.values()), closed)


def _is_made(minfo: ModuleInfo, path: Path) -> bool:
    """Whether the step computes a new value, rather than hand on a constant or an input."""
    var = minfo.hidden_path_to_outvar[path]
    return not isinstance(var, Literal) and var not in minfo.jaxpr.invars and var not in minfo.jaxpr.constvars


def _beside(
    minfo: ModuleInfo, states: Mapping[Path, brainstate.State], added_to: Mapping[Atom, list[int]]
) -> Iterator[tuple[int, int]]:
    """(hidden state number, state leaf number) where the perturbation is added to the output alone: the value is handed
    on, or shared with an earlier state."""
    numbers = dict(zip(minfo.compiled_state_paths, minfo.state_leaves))
    for i, path in enumerate(states):
        first = added_to.get(minfo.hidden_path_to_outvar[path], [i])[0] if _is_made(minfo, path) else None
        if first != i:
            yield i, numbers[path][0]


def add_hidden_perturbation_in_module(
    model: brainstate.nn.Module, *args: PyTree, **kwargs: PyTree
) -> HiddenPerturbation:
    """:func:`extract_module_info`, then :func:`add_hidden_perturbation_from_minfo`.

    Parameters
    ----------
    model : brainstate.nn.Module
        With initialised states.
    *args, **kwargs
        As :func:`extract_module_info` takes them.

    Returns
    -------
    HiddenPerturbation

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.GRUCell(2, 3)
    >>> _ = brainstate.nn.init_all_states(cell)
    >>> braintrace.add_hidden_perturbation_in_module(cell, jnp.zeros(2)).init_perturb_data()
    [Array([0., 0., 0.], dtype=float32)]
    """
    return add_hidden_perturbation_from_minfo(extract_module_info(model, *args, **kwargs))
