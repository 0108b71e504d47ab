"""Between a model's states and arguments, the flat inputs of its compiled step, and signals per hidden variable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp

from .._compiler.tape import TapeRecord
from .._traces.record import Slots, sensitivities, x_keys
from .._types import MultiStepData, Path, SingleStepData, path_str
from .base import ETraceAlgorithm

__all__ = ["Binding", "Values"]


class Values(NamedTuple):
    """Values of all states that a call touches, as lists in the graph's order."""

    weights: list[Any]
    hidden: list[Any]
    others: list[Any]


class Binding(ETraceAlgorithm):
    """A learner that reads and writes the values that its compiled step takes and gives."""

    def _argument_leaves(self, args: tuple[Any, ...]) -> tuple[list[jax.Array], list[bool], int | None]:
        """Argument leaves in their compiled dtypes, which of them have a time axis, and its length."""
        wrapped = lambda x: isinstance(x, (SingleStepData, MultiStepData))  # noqa: E731
        bare = jax.tree.map(lambda x: x.data if wrapped(x) else x, args, is_leaf=wrapped)
        marks = jax.tree.map(
            lambda x: jax.tree.map(lambda _: isinstance(x, MultiStepData), x.data if wrapped(x) else x),
            args,
            is_leaf=wrapped,
        )
        info = self.graph.module_info
        leaves, tree = jax.tree.flatten(bare)
        over_time = jax.tree.leaves(marks)
        if tree != info.in_tree:
            raise ValueError(
                f"The arguments have the structure {tree}, the learner was compiled for {info.in_tree}. "
                "Pass arguments of that structure (and units), or compile another learner."
            )
        lengths = sorted({jnp.shape(x)[0] if jnp.ndim(x) else None for x, m in zip(leaves, over_time) if m}, key=str)
        if None in lengths:
            raise ValueError("MultiStepData holds a scalar; axis 0 of every leaf must be time.")
        if len(lengths) > 1:
            raise ValueError(f"The windows of one call have different lengths: {lengths}.")
        expected = info.jaxpr.invars
        converted = [
            _convert(x, v.aval, f"argument leaf {i}", bool(m))
            for i, (x, m, v) in enumerate(zip(leaves, over_time, expected))
        ]
        return converted, over_time, lengths[0] if lengths else None

    def _state_value(self, path: Path, state: brainstate.State) -> Any:
        """A state's value in its compiled dtype."""
        info = self.graph.module_info
        i = info.compiled_state_paths.index(path)
        tree: Any
        leaves, tree = jax.tree.flatten(state.value)
        if tree != info.state_trees[i]:
            raise ValueError(
                f"The value of {path_str(path)!r} has the structure {tree}, the learner was compiled for "
                f"{info.state_trees[i]}. A state keeps one structure and unit; compile another learner."
            )
        first = info.in_tree.num_leaves
        expected = [info.jaxpr.invars[first + n].aval for n in info.state_leaves[i]]
        parts = info.complex_hidden.get(path)
        if parts is not None:
            expected = [jax.ShapeDtypeStruct(parts.shape(a.shape), parts.dtype) for a in expected]
        return tree.unflatten([_convert(x, a, path_str(path)) for x, a in zip(leaves, expected)])

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
        return [info.in_tree.num_leaves + n for n in info.state_leaves[info.compiled_state_paths.index(path)]]

    def _read_record(self, record: TapeRecord, operands: list[dict[str, jax.Array]]) -> tuple[Any, Any, Any]:
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


def _convert(value: Any, aval: Any, name: str, over_time: bool = False) -> Any:
    """An array in the shape and dtype that the step was compiled for."""
    shape = jnp.shape(value)
    if (shape[1:] if over_time else shape) != aval.shape:
        raise ValueError(
            f"{name} has shape {shape}, the learner was compiled for {aval.shape}. Pass that shape "
            "(initialise the states with the batch size of the inputs), or compile another learner."
        )
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return value
    dtype = jnp.result_type(value)
    if dtype == aval.dtype and hasattr(value, "dtype"):
        return jnp.asarray(value)
    kinds: list[Any] = [jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating]
    rank = [next(i for i, k in enumerate(kinds) if jnp.issubdtype(d, k)) for d in (dtype, aval.dtype)]
    if rank[0] > rank[1]:
        raise TypeError(
            f"{name} has dtype {dtype}, the learner was compiled for {aval.dtype}. Compile it with an example of the "
            "dtype that you pass."
        )
    return jnp.asarray(value).astype(aval.dtype)
