"""Between a model's states and arguments and the flat inputs and outputs of its compiled step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
from jax.tree_util import PyTreeDef
from jax.typing import DTypeLike

from ._compiler.call import Call
from ._compiler.graph import ETraceGraph
from ._types import Path, PyTree

__all__ = ["Binding", "Fixed", "Gradients", "Operands", "Signals", "Slots", "Values", "first_step"]

Slots = list[jax.Array | None]  # one array of shape V per hidden variable of a group, or None for a known zero
Signals = list[Slots]  # per group
Operands = Mapping[str, jax.Array]  # of one operation, those that are trained, by key
Fixed = Mapping[int, jax.Array]  # those that are not, beside the input, by position
Gradients = dict[str, jax.Array]  # of the trained operands of one operation


class Values(NamedTuple):
    """Values of all states that a call touches, as lists in the graph's order."""

    weights: list[PyTree]
    hidden: list[PyTree]
    others: list[PyTree]


class Binding:
    """Translates for one compiled step; knows no learner and no traces.

    Attributes
    ----------
    graph : ETraceGraph
    """

    def __init__(self, graph: ETraceGraph):
        self.graph = graph
        self._info = graph.module_info

    # -- arguments and states

    def inputs(self, call: Call) -> tuple[list[jax.Array], list[bool]]:
        """Leaves of the arguments and of the environment in their compiled dtypes, and which have a time axis."""
        info = self._info
        leaves = [_as(x, v.aval.dtype) for x, v in zip(jax.tree.leaves(call.given), info.jaxpr.invars)]
        more = info.environment_leaves(call.inputs)
        return [*leaves, *more], [*call.over_time, *([False] * len(more))]

    def state_value(self, path: Path, state: brainstate.State) -> PyTree:
        """A state's value in its compiled dtype."""
        tree: PyTreeDef
        leaves, tree = jax.tree.flatten(state.value)
        return tree.unflatten([_as(x, a.dtype) for x, a in zip(leaves, self._info.state_avals(path))])

    def values(self, states: Sequence[brainstate.State]) -> Values:
        return self.split([self.state_value(p, s) for p, s in zip(self._info.compiled_state_paths, states)])

    def split(self, values: Sequence[PyTree]) -> Values:
        """What stands for the states, in their order, by kind of state."""
        out = Values([], [], [])
        for state, value in zip(self._info.compiled_model_states, values):
            out[_kind(state)].append(value)
        return out

    def invals(self, leaves: Sequence[jax.Array], values: Values) -> list[jax.Array]:
        parts = tuple(map(iter, values))
        out, info = list(leaves), self._info
        for path, state in zip(info.compiled_state_paths, info.compiled_model_states):
            out.extend(info.reals(path, x) for x in jax.tree.leaves(next(parts[_kind(state)])))
        return out

    def outvals(self, outs: list[jax.Array]) -> tuple[PyTree, Values]:
        out, values = self._info.results(outs)
        return out, self.split(values)

    # -- hidden values

    def hidden_by_path(self, hidden: Sequence[PyTree]) -> dict[Path, PyTree]:
        return dict(zip(self._info.states_of(brainstate.HiddenState), hidden))

    def hidden_zeros(self) -> dict[Path, jax.Array]:
        """Without units, as everything that meets the traces; none for integers and booleans."""
        avals = {p: v.aval for p, v in self._info.hidden_path_to_invar.items()}
        return {p: jnp.zeros(a.shape, a.dtype) for p, a in avals.items() if jnp.issubdtype(a.dtype, jnp.inexact)}

    def shifted(self, hidden: Sequence[PyTree], zeros: Mapping[Path, jax.Array]) -> list[PyTree]:
        """Hidden values plus reals without units."""
        info = self._info
        of = {p: info.complex_hidden[p].join(z) if p in info.complex_hidden else z for p, z in zeros.items()}
        return [
            jax.tree.map(lambda v, z=of[p]: v + z, h) if p in of else h for p, h in self.hidden_by_path(hidden).items()
        ]

    def reals(self, by_path: Mapping[Path, PyTree]) -> dict[Path, jax.Array]:
        """Hidden values without units, complex ones as their parts."""
        return {p: self._info.reals(p, u.get_mantissa(v)) for p, v in by_path.items()}

    def signals(self, by_path: Mapping[Path, jax.Array]) -> Signals:
        """Per group one array per hidden variable; ``None`` where the signal is known to be zero."""
        found: Signals = []
        for g in self.graph.hidden_groups:
            bars = [by_path.get(p) for p in g.hidden_paths]
            bars = [None if b is None or b.dtype == jax.dtypes.float0 else b for b in bars]
            picked = [(bars[i], c) for i, c in g.slots]
            found.append([b if b is None or c is None else b[..., c] for b, c in picked])
        return found

    # -- parameters and the operands that they give

    def weights_by_path(self, weights: Sequence[PyTree]) -> dict[Path, PyTree]:
        return dict(zip(self._info.states_of(brainstate.ParamState), weights))

    def leaf_numbers(self, path: Path) -> list[int]:
        """Where the leaves of a state are among the step's inputs."""
        info = self._info
        return [info.first_state + n for n in info.state_leaves[info.compiled_state_paths.index(path)]]

    def of_parameters(self, states: Mapping[Path, brainstate.ParamState]) -> list[jax.Array | None]:
        """The step's inputs, those alone that parameters give."""
        invals: list[jax.Array | None] = [None] * len(self._info.jaxpr.invars)
        for path, state in states.items():
            for n, leaf in zip(self.leaf_numbers(path), jax.tree.leaves(self.state_value(path, state))):
                invals[n] = leaf
        return invals

    def operands(self, invals: Sequence[jax.Array | None]) -> list[Operands]:
        """The trained operands of every operation."""
        return [r.operand_program.operands(invals) for r in self.graph.operations]

    def leaf_gradients(
        self, gradients: Mapping[int, Gradients | None], invals: Sequence[jax.Array | None]
    ) -> dict[int, jax.Array]:
        """Gradients of operations' operands -> those of the parameter leaves, by number among the step's inputs."""
        leaves: dict[int, jax.Array] = {}
        for i, gradient in gradients.items():
            if gradient:
                for n, g in self.graph.operations[i].operand_program.pull_back(invals, gradient).items():
                    leaves[n] = leaves[n] + g if n in leaves else g
        return leaves

    def source(self, number: int) -> int:
        """The first operation that reads the same input."""
        operations = self.graph.operations
        return next(i for i, r in enumerate(operations) if r.x_var is operations[number].x_var)


def first_step(over_time: Sequence[bool], length: int | None, leaves: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Argument leaves of the first step of a window, or of the one step."""
    return leaves if length is None else [x[0] if m else x for x, m in zip(leaves, over_time)]


def _kind(state: brainstate.State) -> int:
    """Position in :class:`Values`."""
    return 0 if isinstance(state, brainstate.ParamState) else 1 if isinstance(state, brainstate.HiddenState) else 2


def _as(value: PyTree, dtype: DTypeLike) -> jax.Array:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return value
    same = jnp.result_type(value) == dtype and hasattr(value, "dtype")
    return jnp.asarray(value) if same else jnp.asarray(value).astype(dtype)
