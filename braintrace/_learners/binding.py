"""Between a model's states and arguments, the flat inputs of its compiled step, and signals per hidden variable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp

from .._compiler.call import Call
from .._compiler.step import StepRecord
from .._traces.record import Slots, sensitivities, x_keys
from .._types import Path
from .base import ETraceAlgorithm

__all__ = ["Binding", "Values"]


class Values(NamedTuple):
    """Values of all states that a call touches, as lists in the graph's order."""

    weights: list[Any]
    hidden: list[Any]
    others: list[Any]


class Binding(ETraceAlgorithm):
    """A learner that reads and writes the values that its compiled step takes and gives."""

    def _input_leaves(self, call: Call) -> tuple[list[jax.Array], list[bool]]:
        """Leaves of the arguments and of the environment in their compiled dtypes, and which have a time axis."""
        info = self.graph.module_info
        leaves = [_as(x, v.aval.dtype) for x, v in zip(jax.tree.leaves(call.given), info.jaxpr.invars)]
        more = info.environment_leaves(call.inputs)
        return [*leaves, *more], [*call.over_time, *([False] * len(more))]

    def _state_value(self, path: Path, state: brainstate.State) -> Any:
        """A state's value in its compiled dtype."""
        tree: Any
        leaves, tree = jax.tree.flatten(state.value)
        avals = self.graph.module_info.state_avals(path)
        return tree.unflatten([_as(x, a.dtype) for x, a in zip(leaves, avals)])

    def _split(self, values: list[Any]) -> Values:
        out = Values([], [], [])
        for state, value in zip(self.graph.module_info.compiled_model_states, values):
            out[_kind(state)].append(value)
        return out

    def _invals(self, leaves: Sequence[Any], values: Values) -> list[Any]:
        parts = tuple(map(iter, values))
        out, info = list(leaves), self.graph.module_info
        for path, state in zip(info.compiled_state_paths, info.compiled_model_states):
            out.extend(info.reals(path, x) for x in jax.tree.leaves(next(parts[_kind(state)])))
        return out

    def _outvals(self, outs: list[Any]) -> tuple[Any, Values]:
        info = self.graph.module_info
        out, values = info.results(outs)
        return out, self._split(values)

    @staticmethod
    def _first_step(over_time: Sequence[bool], length: int | None, leaves: Sequence[Any]) -> Sequence[Any]:
        """Argument leaves of the first step of a window, or of the one step."""
        return leaves if length is None else [x[0] if m else x for x, m in zip(leaves, over_time)]

    def _shifted(self, hidden: list[Any], zeros: dict[Path, jax.Array]) -> list[Any]:
        """Hidden values plus reals without units."""
        info = self.graph.module_info
        of = {p: info.complex_hidden[p].join(z) if p in info.complex_hidden else z for p, z in zeros.items()}
        return [jax.tree.map(lambda v, z=of[p]: v + z, h) for p, h in self._hidden_dict(hidden).items()]

    def _hidden_reals(self, by_path: Mapping[Path, Any]) -> dict[Path, Any]:
        """Hidden values without units, complex ones as their parts."""
        return {p: self.graph.module_info.reals(p, u.get_mantissa(v)) for p, v in by_path.items()}

    def _hidden_dict(self, hidden: list[Any]) -> dict[Path, Any]:
        return dict(zip(self.graph.module_info.states_of(brainstate.HiddenState), hidden))

    def _weight_dict(self, weights: list[Any]) -> dict[Path, Any]:
        return dict(zip(self.graph.module_info.states_of(brainstate.ParamState), weights))

    def _operands(self, invals: list[Any]) -> list[dict[str, jax.Array]]:
        return [r.operand_program.operands(invals) for r in self.graph.operations]

    def _leaf_gradients(
        self, gradients: dict[int, dict[str, jax.Array]], invals: Sequence[Any]
    ) -> dict[int, jax.Array]:
        """Gradients of operations' operands -> those of the parameter leaves, by number among the step's inputs."""
        leaves: dict[int, jax.Array] = {}
        for i, gradient in gradients.items():
            if gradient:
                for n, g in self.graph.operations[i].operand_program.pull_back(invals, gradient).items():
                    leaves[n] = leaves[n] + g if n in leaves else g
        return leaves

    def _leaf_numbers(self, path: Path) -> list[int]:
        """Where the leaves of a state are among the step's inputs."""
        info = self.graph.module_info
        return [info.first_state + n for n in info.state_leaves[info.compiled_state_paths.index(path)]]

    def _read_record(self, record: StepRecord, operands: list[dict[str, jax.Array]]) -> tuple[Any, Any, Any]:
        """Inputs by x-key, df by key, and D per group."""
        xs = {}
        for i, key in x_keys(self.graph).items():
            if key not in xs:
                xs[key] = self.graph.hidden_param_op_relations[i].x_repr(record.x[i], operands[i])
        return (xs, *sensitivities(self.graph, record.varying))

    def _slots(self, by_path: dict[Path, jax.Array]) -> list[Slots]:
        """Per group one array per hidden variable; ``None`` where the signal is known to be zero."""
        signals: list[Slots] = []
        for g in self.graph.hidden_groups:
            bars = [by_path.get(p) for p in g.hidden_paths]
            bars = [None if b is None or b.dtype == jax.dtypes.float0 else b for b in bars]
            picked = [(bars[i], c) for i, c in g.slots]
            signals.append([b if b is None or c is None else b[..., c] for b, c in picked])
        return signals


def _kind(state: brainstate.State) -> int:
    """Position in :class:`Values`."""
    return 0 if isinstance(state, brainstate.ParamState) else 1 if isinstance(state, brainstate.HiddenState) else 2


def _as(value: Any, dtype: Any) -> Any:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return value
    same = jnp.result_type(value) == dtype and hasattr(value, "dtype")
    return jnp.asarray(value) if same else jnp.asarray(value).astype(dtype)
