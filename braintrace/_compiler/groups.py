"""Hidden states that reach each other position by position."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import brainstate
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._jax import Atom, Jaxpr, Var, open_jaxpr
from .._types import NotSupportedError, Path, PyTree, Shape, path_str
from .diagnostics import CompilationRecord, DiagnosticKind, DiagnosticLevel
from .flow import Flow
from .jacobian import TransitionJacobian
from .module_info import ModuleInfo
from .scope import Neighbourhood
from .transition import Slot, Transition

__all__ = ["HiddenGroup", "partition", "slots_of"]


class HiddenGroup(NamedTuple):
    """Hidden states linked position by position, within a step or from one step to the next.

    Attributes
    ----------
    index : int
        Number of the group.
    hidden_paths : tuple of path
        Its members in the order of first access.
    hidden_states : tuple of HiddenState
    varshape : tuple of int
        The shape V of one hidden variable, batch axis included.
    num_state : int
        S, the number of hidden variables per position; a complex state counts as two, its real and imaginary part.
    jacobian : TransitionJacobian
        The derivatives D and df with every operation's output held fixed, and their compile-time structure.
    program : Transition
        The equations between old values, operation outputs and new values.
    snap : Neighbourhood or None
        The positions that each position influences, in the scope ``'sparse_n'``: ``neighbours`` and ``valid`` of shape
        ``(num_position, num_neighbour)``, within ``n - 1`` steps; ``is_saturated`` where each influences all,
        ``is_degenerate`` where each influences itself alone, ``conservative`` for the ``reason`` that is given.
    """

    index: int  # type: ignore[assignment]
    hidden_paths: tuple[Path, ...]
    hidden_states: tuple[brainstate.HiddenState, ...]
    varshape: Shape
    num_state: int
    jacobian: TransitionJacobian
    program: Transition
    snap: Neighbourhood | None = None

    @property
    def name(self) -> str:
        return f"hidden_group_{self.index}"

    @property
    def inside(self) -> frozenset[int]:
        """Numbers of the equations of :attr:`program` in the step."""
        return self.program.inside

    @property
    def hidden_invars(self) -> list[Var]:
        """The variables of the step that hold the members' old values."""
        return list(self.program.olds)

    @property
    def hidden_outvars(self) -> list[Atom]:
        """The variables of the step that hold the members' new values; a literal where the step writes a number."""
        return list(self.program.news)

    @property
    def trace_state_width(self) -> int:
        """Entries of a trace per weight: S, times the number of neighbours where there are some."""
        return self.num_state * (1 if self.snap is None else self.snap.num_neighbour)

    @property
    def is_diagonal_recurrence(self) -> bool:
        """Whether D leaves out the recurrent mixing between positions."""
        return not self.program.mixing

    @property
    def transition_jaxpr(self) -> Jaxpr:
        """The transition: inputs are the members' old values, then :attr:`transition_jaxpr_constvars`."""
        return open_jaxpr(self.program.program)

    @property
    def transition_jaxpr_constvars(self) -> tuple[Var, ...]:
        """Variables of the step that the transition reads beside the old values; operation outputs come first."""
        return self.program.beside

    def transition(self, hidden_vals: Sequence[jax.Array], input_vals: Sequence[jax.Array]) -> list[jax.Array]:
        """New values of the members.

        Parameters
        ----------
        hidden_vals : sequence of array
            Old value of every member, without unit.
        input_vals : sequence of array
            Values of :attr:`transition_jaxpr_constvars`.
        """
        self._check_values(hidden_vals, input_vals)
        return self.program(hidden_vals, input_vals)

    def diagonal_jacobian(self, hidden_vals: Sequence[jax.Array], input_vals: Sequence[jax.Array]) -> jax.Array:
        """D per position, shape ``V + (S, S)``; arguments as for :meth:`transition`.

        With neighbours, ``V + (M, M)`` with M = :attr:`trace_state_width`, neighbours in front of hidden variables.
        """
        self._check_values(hidden_vals, input_vals)
        if self.jacobian.values:
            size, blocks = math.prod(self.varshape), (self.num_state,) * 2
            whole = self.full_jacobian(hidden_vals, input_vals).reshape(size, self.num_state, size, self.num_state)
            return jnp.einsum("paqb,pq->pab", whole, jnp.eye(size)).reshape(*self.varshape, *blocks)
        return self.dense_D(self.jacobian.varying([*hidden_vals, *input_vals]))

    def full_jacobian(self, hidden_vals: Sequence[jax.Array], input_vals: Sequence[jax.Array]) -> jax.Array:
        """Derivative of every new value by every old one, shape ``V + (S,) + V + (S,)``; arguments as before."""
        self._check_values(hidden_vals, input_vals)

        def new_values(packed: jax.Array) -> jax.Array:
            return self.concat_hidden(self.program(self.split_hidden(packed), input_vals))

        return jax.jacrev(new_values)(self.concat_hidden(hidden_vals))

    def read_transition(self, varying: Sequence[jax.Array]) -> tuple[list[PyTree], list[PyTree]]:
        """Old values and :attr:`transition_jaxpr_constvars` of one step, in the scope ``'full'``."""
        values = [e.read(varying) for e in self.jacobian.values]
        return values[: len(self.hidden_paths)], values[len(self.hidden_paths) :]

    def dense_D(self, varying: Sequence[jax.Array]) -> jax.Array:
        """D as one array, from its varying entries; where these are what the transition reads, the whole Jacobian."""
        if self.jacobian.values:
            return self.full_jacobian(*self.read_transition(varying))
        D = [[e.read(varying) for e in row] for row in self.jacobian.D]
        if self.snap is None:
            return self.dense(D)
        shape = (self.snap.num_neighbour,) * 2 + self.varshape
        blocks = [[jnp.broadcast_to(0.0 if d is None else d, shape) for d in row] for row in D]
        if (order := self.snap.itself_first) is not None:
            rows = lambda d: jnp.take_along_axis(d, order[:, None], 0)  # noqa: E731
            blocks = [[jnp.take_along_axis(rows(d), order[None], 1) for d in row] for row in blocks]
        stacked = jnp.stack([jnp.stack(row, 1) for row in blocks], 1)  # neighbour, a, b, neighbour, V
        stacked = jnp.moveaxis(stacked, (0, 1, 3, 2), (-4, -3, -2, -1))
        return stacked.reshape(*self.varshape, self.trace_state_width, self.trace_state_width)

    def dense(self, entries: PyTree) -> jax.Array:
        """Nested lists of entries (arrays, numbers, ``None`` for zero) as one array with trailing axes."""
        dtype = jnp.result_type(*(v.aval.dtype for v in self.program.news))
        if isinstance(entries, (list, tuple)):
            parts = [self.dense(e) for e in entries]
            return jnp.stack(parts, len(self.varshape))
        return jnp.broadcast_to(jnp.asarray(0 if entries is None else entries, dtype), self.varshape)

    def _check_values(self, hidden_vals: Sequence[ArrayLike], input_vals: Sequence[ArrayLike]) -> None:
        for name, values, variables in (
            ("hidden_vals", hidden_vals, self.program.olds),
            ("input_vals", input_vals, self.program.beside),
        ):
            found, expected = [jnp.shape(v) for v in values], [v.aval.shape for v in variables]
            if found != expected:
                raise ValueError(f"{name} of {self.name} must have shapes {expected}, got {found}.")

    def dict(self) -> dict[str, Any]:
        return self._asdict()

    def __repr__(self) -> str:
        members = [path_str(p) for p in self.hidden_paths]
        return f"HiddenGroup(index={self.index}, members={members}, varshape={self.varshape}, S={self.num_state})"

    def check_consistent_varshape(self) -> None:
        """Raise ``NotSupportedError`` unless all members have the group's shape."""
        for path, state in zip(self.hidden_paths, self.hidden_states):
            if tuple(state.varshape) != self.varshape:
                raise NotSupportedError(
                    f"The hidden states of one group must have one shape: {path_str(path)!r} has {state.varshape}, "
                    f"the group has {self.varshape}."
                )

    def concat_hidden(self, values: Iterable[jax.Array]) -> jax.Array:
        """Stack one array per member (no units, complex ones as their parts) to shape ``V + (S,)``."""
        values = list(values)
        if len(values) != len(self.hidden_states):
            raise ValueError(f"{self.name} has {len(self.hidden_states)} members, got {len(values)} arrays.")
        parts = []
        for path, old, value in zip(self.hidden_paths, self.program.olds, values):
            if tuple(value.shape) != old.aval.shape:
                raise ValueError(f"{path_str(path)!r} takes shape {old.aval.shape}, got {tuple(value.shape)}.")
            parts.append(value if value.ndim > len(self.varshape) else value[..., None])
        return jnp.concatenate(parts, axis=-1)

    def split_hidden(self, value: jax.Array) -> list[jax.Array]:
        """The inverse of :meth:`concat_hidden`."""
        if tuple(value.shape) != (*self.varshape, self.num_state):
            raise ValueError(f"{self.name} takes shape {(*self.varshape, self.num_state)}, got {tuple(value.shape)}.")
        out: list[PyTree] = [None] * len(self.hidden_paths)
        for number, (i, component) in enumerate(self.slots):
            one = value[..., number]
            if component is None:
                out[i] = one
            elif component == 0:
                out[i] = value[..., number : number + self.program.olds[i].aval.shape[-1]]
        return out

    @property
    def slots(self) -> list[Slot]:
        """The S hidden variables: (member number, component or None)."""
        return slots_of(self.program.olds, self.varshape)


def slots_of(olds: Iterable[Var], varshape: Shape) -> list[Slot]:
    """The hidden variables that variables of the step hold: (number of the variable, component or None)."""
    out: list[Slot] = []
    for i, old in enumerate(olds):
        behind = old.aval.shape[len(varshape) :]
        out.extend((i, c) for c in range(behind[0])) if behind else out.append((i, None))
    return out


def _listed_apart(a: Path, b: Path) -> bool:
    """Whether two paths first differ in the number of an entry of a list."""
    first = next(((x, y) for x, y in zip(a, b) if x != y), (None, None))
    return all(isinstance(x, int) for x in first)


def partition(
    info: ModuleInfo, flow: Flow, mixing: bool = False
) -> tuple[list[tuple[Path, ...]], list[CompilationRecord]]:
    """Connected components of the position-wise links, in state order; with ``mixing``, of all links.

    Links that mix positions do not join entries of one list: layers of a stack stay apart.
    """
    hidden = info.states_of(brainstate.HiddenState)
    parent = {p: p for p in hidden}

    def root(p: Path) -> Path:
        while parent[p] != p:
            p = parent[p]
        return p

    order = {p: i for i, p in enumerate(hidden)}
    for target, labels in flow.into.items():
        shape = tuple(hidden[target].varshape)
        for kind, source in labels:
            if kind == "y" or source == target or tuple(hidden[source].varshape) != shape:
                continue
            if source in flow.links[target] or (mixing and not _listed_apart(target, source)):
                a, b = sorted((root(target), root(source)), key=order.__getitem__)
                parent[b] = a
    components: dict[Path, list[Path]] = {}
    for p in hidden:
        components.setdefault(root(p), []).append(p)
    groups = [tuple(c) for c in components.values()]
    records = [
        CompilationRecord(
            DiagnosticKind.HIDDEN_GROUP_MERGED,
            DiagnosticLevel.INFO,
            f"{len(paths)} hidden states of shape {tuple(hidden[paths[0]].varshape)} reach each other "
            f"{'' if mixing else 'position by position '}and form one group: {', '.join(map(path_str, paths))}.",
            hidden_paths=paths,
        )
        for paths in groups
        if len(paths) > 1
    ]
    return groups, records
