r"""UORO: a random projection of the influence of all parameters on a hidden group.

A sensitivity matrix of hidden variables times parameters is kept as one outer product,
:math:`\tilde s \otimes \tilde\theta`, whose expectation it is. At every step, with random signs :math:`\nu`,

.. math::

    \tilde s \leftarrow \rho_0 J \tilde s + \rho_1 \nu, \qquad
    \tilde\theta \leftarrow \tilde\theta / \rho_0 + \nu^\top J_f / \rho_1,

where the factors balance the norms of both sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn, TypeAlias

import brainstate
import jax
import jax.numpy as jnp

from .._binding import Binding, Fixed, Gradients, Operands, Signals
from .._compiler.groups import HiddenGroup
from .._compiler.relations import HiddenParamOpRelation
from .._compiler.step import StepRecord
from .._jax import zeros
from .._precision import eval_widened, wide, widened
from .._types import Path, PyTree
from .engine import Engine
from .record import Sensitivity, add, contraction, instantaneous, read_record

__all__ = ["Projection", "ProjectionEngine", "Projections"]


class Projection(NamedTuple):
    """``state`` of shape ``V + (S,)``, and one array per leaf of the parameters that drive the group."""

    state: jax.Array
    parameters: list[jax.Array]


Taken: TypeAlias = tuple[StepRecord, Sequence[Operands], Sequence[jax.Array]]  # of a step


class Projections(NamedTuple):
    """By group index; ``key`` is the data of the key of the random signs, ``step`` how often they were drawn."""

    of_group: dict[int, Projection]
    key: jax.Array
    step: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class ProjectionEngine(Engine):
    """``draw(key, step, group index, shape, dtype)`` gives the random signs, ``eps`` keeps the norms above zero."""

    binding: Binding
    numbers: tuple[int, ...]
    key: jax.Array
    draw: Callable[..., jax.Array]
    eps: float

    @property
    def groups(self) -> list[HiddenGroup]:
        graph = self.binding.graph
        return [g for g in graph.hidden_groups if g.index in graph.traced]

    def paths_of(self, group_index: int) -> list[Path]:
        """The parameters that drive a group."""
        found = {p for r in self._relations_of(group_index).values() for p in r.parameter_paths}
        return [p for p in self.binding.graph.module_info.states_of(brainstate.ParamState) if p in found]

    def _relations_of(self, group_index: int) -> dict[int, HiddenParamOpRelation]:
        return {i: r for i, r in self.relations.items() if any(g.index == group_index for g in r.hidden_groups)}

    def _groups_of(self, numbers: Sequence[int]) -> list[int]:
        return sorted({g.index for i in numbers for g in self.relations[i].hidden_groups})

    def init(self) -> Projections:
        avals, found = self.binding.graph.module_info.state_avals, {}
        for g in self.groups:
            dtype = wide(jnp.result_type(*(v.aval.dtype for v in g.program.news)))
            own = [a for path in self.paths_of(g.index) for a in avals(path)]
            state = zeros((*g.varshape, g.num_state), dtype)
            found[g.index] = Projection(state, [zeros(a.shape, wide(a.dtype)) for a in own])
        return Projections(found, jax.random.key_data(self.key), zeros((), jnp.int32))

    def take(
        self, record: StepRecord, operands: Sequence[Operands], invals: Sequence[jax.Array]
    ) -> tuple[tuple[Taken, dict[str, Sensitivity]], None]:
        _, dfs, _ = read_record(self.binding.graph, record, operands, {})
        return ((record, operands, invals), dfs), None

    def advance(self, traces: Projections, xs_and_dfs: tuple[Taken, dict[str, Sensitivity]], Ds: None) -> Projections:
        (record, operands, invals), dfs = xs_and_dfs
        key, new = jax.random.wrap_key_data(traces.key, impl=jax.random.key_impl(self.key)), {}
        for g in self.groups:
            own = traces.of_group[g.index]
            noise = self.draw(key, traces.step, g.index, own.state.shape, own.state.dtype)
            carried = _jacobian_product(g, record.varying[g.index], own.state)
            found = _projected(self._relations_of(g.index), g, noise, dfs, record.x, operands, record.fixed)
            leaves = self.binding.leaf_gradients(found, invals)
            by_leaf = [leaves.get(n) for p in self.paths_of(g.index) for n in self.binding.leaf_numbers(p)]
            now = [jnp.zeros_like(o) if v is None else v for o, v in zip(own.parameters, by_leaf)]
            new[g.index] = self._balanced(own, carried, noise, now)
        return Projections(new, traces.key, traces.step + 1)

    def _balanced(
        self, old: Projection, carried: jax.Array, noise: jax.Array, projection: Sequence[jax.Array]
    ) -> Projection:
        eps = self.eps
        rho_0 = jnp.sqrt((_norm(old.parameters) + eps) / (_norm([carried]) + eps))
        rho_1 = jnp.sqrt((_norm(projection) + eps) / (_norm([noise]) + eps))
        # Divided in the precision of the norms: a factor may be out of the range of half precision, a quotient not.
        parameters = [(o / rho_0 + p / rho_1).astype(o.dtype) for o, p in zip(old.parameters, projection)]
        return Projection((rho_0 * carried + rho_1 * noise).astype(old.state.dtype), parameters)

    def carriers(
        self,
        numbers: Sequence[int],
        traces: Projections,
        operands: Sequence[Operands],
        fixed: Sequence[Fixed],
        weights: Sequence[PyTree],
        steps: jax.Array,
    ) -> dict[int, jax.Array]:
        """Per group the product of its projected parameters with the parameters themselves."""
        values, out = self.binding.weights_by_path(weights), {}
        for index in self._groups_of(numbers):
            leaves = jax.tree.leaves([values[p] for p in self.paths_of(index)])
            held = jax.lax.stop_gradient(traces.of_group[index].parameters)
            out[index] = sum((h * w).sum() for h, w in zip(held, leaves))
        return out

    def contract(
        self, numbers: Sequence[int], traces: Projections, signals: Signals, steps: jax.Array
    ) -> dict[int, jax.Array | None]:
        """The signals times the projected states."""
        states = {index: traces.of_group[index].state for index in self._groups_of(numbers)}
        return {
            index: add([(s * state[..., a]).sum() for a, s in enumerate(signals[index]) if s is not None])
            for index, state in states.items()
        }

    has_chunks = False  # each projection is made of new random signs

    def chunk_start(self, *_: object) -> NoReturn:
        raise NotImplementedError

    def chunk_step(self, *_: object) -> NoReturn:
        raise NotImplementedError

    def chunk_end(self, *_: object) -> NoReturn:
        raise NotImplementedError


def _jacobian_product(group: HiddenGroup, varying: Sequence[jax.Array], tangent: jax.Array) -> jax.Array:
    """The whole Jacobian of a group's step times ``tangent``, both of shape ``V + (S,)``."""
    olds, inputs = widened(group.read_transition(varying))
    smooth = [i for i, v in enumerate(olds) if jnp.issubdtype(v.dtype, jnp.inexact)]

    def new_values(moved: Sequence[jax.Array]) -> list[jax.Array]:
        at = dict(zip(smooth, moved))
        out = eval_widened(group.program.program, *[at.get(i, v) for i, v in enumerate(olds)], *inputs)
        return [out[i] for i in smooth]

    news, pull = jax.vjp(new_values, [olds[i] for i in smooth])
    # The transpose of the transpose: custom reverse rules have no forward mode.
    _, push = jax.vjp(lambda bars: pull(bars)[0], [jnp.zeros_like(n) for n in news])
    parts = group.split_hidden(tangent)
    (moved,) = push([parts[i].astype(olds[i].dtype) for i in smooth])
    at = dict(zip(smooth, moved))
    return group.concat_hidden([at.get(i, jnp.zeros(v.shape, tangent.dtype)) for i, v in enumerate(olds)])


def _projected(
    relations: Mapping[int, HiddenParamOpRelation],
    group: HiddenGroup,
    noise: jax.Array,
    dfs: Mapping[str, Sensitivity],
    x: Sequence[jax.Array | None],
    operands: Sequence[Operands],
    fixed: Sequence[Fixed],
) -> dict[int, Gradients]:
    """``noise`` times the derivative of the group by the operands of the operations that drive it."""
    out = {}
    for i, r in relations.items():
        signals: Signals = [[] for _ in range(group.index)]
        signals.append([noise[..., a] for a in range(group.num_state)])
        cotangent = instantaneous(r._replace(hidden_groups=(group,)), dfs, signals)
        if cotangent is not None:
            out[i] = contraction(r, x[i], cotangent.astype(r.y_var.aval.dtype), operands[i], fixed[i], 0)
    return out


def _norm(arrays: Sequence[jax.Array]) -> jax.Array:
    wide = [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays]
    return jnp.sqrt(sum((a * a).sum() for a in wide))
