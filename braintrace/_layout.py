"""Where the arrays of a learner lie on a mesh of devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import brainstate
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._jax import is_tracer, placed
from ._learners.base import ETraceAlgorithm
from ._mapped import ETraceVmap
from ._ops.sparse import Pattern
from ._types import Path, PyTree, Shape, lies_under, names_of, path_str

__all__ = ["shard"]


def shard(
    learner: ETraceAlgorithm | ETraceVmap,
    mesh: Mesh,
    batch: str | None = None,
    units: Mapping[str | Path, str] | None = None,
) -> None:
    """Spread a learner over a mesh of devices; what is not named lies on all of them.

    Results are the same as on one device, up to rounding. Over the batch only gradients and losses cross between
    devices. Over units the weights into them, their states and their traces stay where they are, and activities cross.

    Parameters
    ----------
    learner : ETraceAlgorithm or ETraceVmap
        Before it is compiled this is remembered: parameters, states and traces are laid out when it is. It is laid out
        anew by ``reset_state``; call this again when the model's states have been initialised anew.
    mesh : jax.sharding.Mesh
    batch : str, optional
        Axis of the mesh for the samples: the batch axis of states and traces, or the mapped one.
    units : mapping, optional
        Path of a part of the model, or its dotted name, to the axis of the mesh for its hidden units: the last axis of
        its hidden states, of the parameters there that end with as many entries, and of their traces. The entries of
        a sparse matrix go with the units that they lead to: make it by :func:`braintrace.columns_in_parts`.

    Raises
    ------
    ValueError
        If the axes of the mesh are explicit, it has no such axis, no hidden state lies under a path, there is no
        batch, sizes are no multiples of those of the mesh, or the entries of a sparse matrix are in another order; the
        message names the path and the shape. If an array is not the same in all processes of the mesh.
    NotImplementedError
        For a batch of a mapped :class:`UORO` with convolutions.
    TypeError
        If ``learner`` or ``mesh`` is something else.

    Examples
    --------
    >>> import braintrace, jax, jax.numpy as jnp, numpy as np
    >>> x = jnp.ones((4, 2))
    >>> learner = braintrace.compile(braintrace.nn.GRUCell(2, 3), 'd_rtrl', x, batch_size=4)
    >>> braintrace.shard(learner, jax.sharding.Mesh(np.array(jax.devices()[:1]), ('batch',)), batch='batch')
    >>> learner.hidden_states['h',].value.sharding.spec[0]
    'batch'
    """
    one = learner.module if isinstance(learner, ETraceVmap) else learner
    if not isinstance(one, ETraceAlgorithm):
        raise TypeError(f"learner must be a braintrace learner, or what maps one, got {type(learner).__name__}.")
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}.")
    if any("Explicit" in str(kind) for kind in getattr(mesh, "axis_types", None) or ()):
        raise ValueError(
            "The mesh has axes of the type Explicit, with which every operation of a model would have to say where its "
            "result lies. Make it by jax.sharding.Mesh(devices, names), whose axes leave that to the compiler."
        )
    by_path = {names_of(k): v for k, v in (units or {}).items()}
    for axis in (*([] if batch is None else [batch]), *by_path.values()):
        if axis not in mesh.shape:
            raise ValueError(f"The mesh has no axis {axis!r}; it has {', '.join(map(repr, mesh.shape))}.")
    before, one._layout = one._layout, Layout(mesh, batch, by_path)
    try:
        if one.is_compiled:
            one._lay_out()
    except Exception:
        one._layout = before
        raise


class Layout:
    """What :func:`shard` was given."""

    def __init__(self, mesh: Mesh, batch: str | None, units: Mapping[tuple[str, ...], str]):
        self.mesh, self.batch, self.units = mesh, batch, units

    def __deepcopy__(self, memo: object) -> Layout:
        return self

    def apply(self, learner: ETraceAlgorithm) -> None:
        """Put the arrays of a compiled learner where they belong."""
        size, mapped = learner._leading_size()
        batched = mapped or any(axis is not None for _, axis in learner._trace_states())
        if self.batch is not None and not batched:
            raise ValueError(
                "The learner has no batch that could be spread. Compile it with batch_size=..., or leave out batch."
            )
        model = {id(s): p for p, s in learner.model4compile.states().items()}
        places = {id(state): (paths, axis) for state, paths, axis in learner._unit_axes()}
        units = [self._units(learner, prefix, name) for prefix, name in self.units.items()]
        for path, state in learner.states().items():
            is_parameter = isinstance(state, brainstate.ParamState)
            paths, axis = ([model[id(state)]], -1) if id(state) in model else places.get(id(state), ((), -1))
            samples = None if is_parameter or self.batch is None else size
            own = next((u for u in units if any(map(u.has, paths))), None)
            state.value = self._put(state.value, path_str(path), samples, own, axis)

    def _units(self, learner: ETraceAlgorithm, prefix: tuple[str, ...], name: str) -> Units:
        under = Units(prefix, name, set(), set())
        groups = [g for g in learner.graph.hidden_groups if any(map(under.has, g.hidden_paths))]
        if not groups:
            known = ", ".join(map(path_str, learner.hidden_states))
            raise ValueError(f"No hidden state lies under {path_str(prefix)!r}; these are: {known}.")
        under.counts.update(g.varshape[-1] for g in groups)
        for r in learner.graph.hidden_param_op_relations:
            matrix = r.eqn_params.get("sparse_mat")
            # One value for all places has no device of its own.
            if isinstance(matrix, Pattern) and not matrix.shared and any(map(under.has, r.parameter_paths)):
                under.entries.update((matrix.data_shape, (math.prod(matrix.data_shape),)))
                if matrix.parts % self.mesh.shape[name]:
                    raise ValueError(
                        f"The entries of the sparse matrix at {path_str(r.path)} are not in the order of its columns, "
                        f"as many for each of the {self.mesh.shape[name]} devices along {name!r}. Make the matrix by "
                        f"braintrace.columns_in_parts(sparse_mat, {self.mesh.shape[name]})."
                    )
        return under

    def _put(self, value: PyTree, title: str, samples: int | None, units: Units | None, axis: int) -> PyTree:
        def of_leaf(x: object) -> object:
            if is_tracer(x) or not isinstance(x, jax.Array):
                return x
            spec: list[str | None] = [None] * x.ndim
            if samples is not None and x.ndim and x.shape[0] == samples:
                spec[0] = self.batch
            if units is not None and (place := units.axis(x.shape, axis)) is not None:
                spec[place] = units.name
            for n, name in zip(x.shape, spec):
                if name is not None and n % self.mesh.shape[name]:
                    raise ValueError(
                        f"{title} has the shape {x.shape}: {n} is no multiple of the {self.mesh.shape[name]} devices "
                        f"along {name!r}. Choose sizes that are, or leave it out."
                    )
            try:
                return placed(x, NamedSharding(self.mesh, PartitionSpec(*spec)))
            except AssertionError as error:  # the processes of the mesh are compared
                raise ValueError(
                    f"{title} has another value in this process than in the first one. Seed brainstate.random with "
                    "one number in all processes before the model is made, by brainstate.random.seed(...)."
                ) from error

        return jax.tree.map(of_leaf, value)


class Units(NamedTuple):
    """The axis of the mesh for what lies under a path, how many units there can be, and shapes of sparse entries."""

    prefix: tuple[str, ...]
    name: str
    counts: set[int]
    entries: set[Shape]

    def has(self, path: Path) -> bool:
        return lies_under(path, self.prefix)

    def axis(self, shape: Shape, last: int) -> int | None:
        """The axis of the units in an array that has them along ``last``; sparse entries have theirs first."""
        for entries in self.entries:
            if shape[len(shape) - len(entries) :] == entries:
                return -len(entries)
        return last if len(shape) >= -last and shape[last] in self.counts else None
