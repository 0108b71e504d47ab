"""Hidden states that reach each other position by position."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import brainstate
import jax.numpy as jnp

from .._types import NotSupportedError, Path, path_str
from .cut import Cut
from .diagnostics import CompilationRecord, DiagnosticKind, DiagnosticLevel
from .flow import Flow
from .module_info import ModuleInfo
from .positions import touches_own_position

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
        S, the number of hidden variables per position.
    cut : Cut
        The derivatives D and df with every operation's output held fixed, and their compile-time structure.
    inside : frozenset of int
        Numbers of the equations between old values, operation outputs and new values.
    """

    index: int  # type: ignore[assignment]
    hidden_paths: tuple[Path, ...]
    hidden_states: tuple[brainstate.HiddenState, ...]
    varshape: tuple[int, ...]
    num_state: int
    cut: Cut
    inside: frozenset

    @property
    def name(self) -> str:
        return f"hidden_group_{self.index}"

    @property
    def trace_state_width(self) -> int:
        return self.num_state

    @property
    def snap(self) -> None:
        return None

    @property
    def is_diagonal_recurrence(self) -> bool:
        return True

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

    def concat_hidden(self, values: Iterable[Any]) -> Any:
        """Stack one array per member (no units) to shape ``V + (S,)``."""
        values = list(values)
        if len(values) != len(self.hidden_states):
            raise ValueError(f"{self.name} has {len(self.hidden_states)} members, got {len(values)} arrays.")
        parts = []
        for path, state, value in zip(self.hidden_paths, self.hidden_states, values):
            grouped = isinstance(state, brainstate.HiddenGroupState)
            expected = self.varshape + ((state.num_state,) if grouped else ())
            if tuple(value.shape) != expected:
                raise ValueError(f"{path_str(path)!r} takes shape {expected}, got {tuple(value.shape)}.")
            parts.append(value if grouped else value[..., None])
        return jnp.concatenate(parts, axis=-1)

    def split_hidden(self, value: Any) -> list[Any]:
        """The inverse of :meth:`concat_hidden`."""
        if tuple(value.shape) != (*self.varshape, self.num_state):
            raise ValueError(f"{self.name} takes shape {(*self.varshape, self.num_state)}, got {tuple(value.shape)}.")
        out, start = [], 0
        for state in self.hidden_states:
            if isinstance(state, brainstate.HiddenGroupState):
                out.append(value[..., start : start + state.num_state])
            else:
                out.append(value[..., start])
            start += state.num_state
        return out


def slots_of(states: Iterable[brainstate.HiddenState]) -> list[tuple[int, int | None]]:
    """The S hidden variables of a group: (member number, component or None)."""
    out: list[tuple[int, int | None]] = []
    for i, state in enumerate(states):
        if isinstance(state, brainstate.HiddenGroupState):
            out.extend((i, c) for c in range(state.num_state))
        else:
            out.append((i, None))
    return out


def partition(info: ModuleInfo, flow: Flow) -> tuple[list[tuple[Path, ...]], list[CompilationRecord]]:
    """Connected components of the position-wise links, in state order."""
    hidden = info.states_of(brainstate.HiddenState)
    parent = {p: p for p in hidden}

    def root(p):
        while parent[p] != p:
            p = parent[p]
        return p

    order = {p: i for i, p in enumerate(hidden)}
    for target, labels in flow.into.items():
        shape = tuple(hidden[target].varshape)
        for (kind, source), label in labels.items():
            if kind == "y" or source == target or tuple(hidden[source].varshape) != shape:
                continue
            if touches_own_position(label, shape):
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
            f"{len(paths)} hidden states of shape {tuple(hidden[paths[0]].varshape)} reach each other position by "
            f"position and form one group: {', '.join(map(path_str, paths))}.",
            hidden_paths=paths,
        )
        for paths in groups
        if len(paths) > 1
    ]
    return groups, records
