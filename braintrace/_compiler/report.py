"""The report that a person reads."""

from __future__ import annotations

import sys
from typing import Any, TextIO

import brainstate

from .._types import Path, path_str
from .diagnostics import CompilationRecord, DiagnosticLevel
from .graph import ETraceGraph

__all__ = ["CompilationReport"]


class CompilationReport:
    """What a compiled model trains online, and what it does not.

    Parameters
    ----------
    graph : ETraceGraph

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.ValinaRNNCell(2, 3)
    >>> _ = brainstate.nn.init_all_states(cell)
    >>> learner = braintrace.pp_prop(cell, decay_or_rank=0.9)
    >>> learner.compile_graph(jnp.zeros(2))
    >>> learner.report
    CompilationReport(hidden_groups=1, etrace_weights=2, excluded_weights=0, warnings=0, errors=0)
    """

    def __init__(self, graph: ETraceGraph):
        self.graph = graph

    @property
    def diagnostics(self) -> tuple[CompilationRecord, ...]:
        return self.graph.diagnostics

    @property
    def hidden_groups(self) -> list[tuple[int, list[Path]]]:
        """``(index, member paths)`` per group."""
        return [(g.index, list(g.hidden_paths)) for g in self.graph.hidden_groups]

    @property
    def etrace_weights(self) -> list[tuple[Path, list[int]]]:
        """``(parameter path, group indices)``, one entry per trained operand."""
        return [(path, groups) for path, groups, _ in self._trained()]

    @property
    def excluded_weights(self) -> list[tuple[Path, str | None]]:
        """``(parameter path, kind of the record that tells why)`` per parameter without a trace."""
        trained = {path for r in self.graph.hidden_param_op_relations for path in r.parameter_paths}
        why = {r.weight_path: r.kind.value for r in self.diagnostics if r.kind.value.startswith("relation_excluded")}
        return [(p, why.get(p)) for p in self.graph.module_info.weight_path_to_invars if p not in trained]

    @property
    def dynamic_states(self) -> list[Path]:
        """Paths of the short-term states that belong to no group."""
        states = self.graph.module_info.states_of(brainstate.ShortTermState)
        return [p for p in states if p not in self.graph.hid_path_to_group]

    @property
    def counts(self) -> dict[str, int]:
        levels = [r.level for r in self.diagnostics]
        return {
            "hidden_groups": len(self.hidden_groups),
            "etrace_weights": len(self.etrace_weights),
            "excluded_weights": len(self.excluded_weights),
            "warnings": levels.count(DiagnosticLevel.WARNING),
            "errors": levels.count(DiagnosticLevel.ERROR),
        }

    def _trained(self) -> list[tuple[Path, list[int], str]]:
        return [
            (path, [g.index for g in r.hidden_groups], r.primitive.name)
            for r in self.graph.hidden_param_op_relations
            for path in (
                *r.trainable_paths.values(),
                *(p for p in r.parameter_paths if p not in r.trainable_paths.values()),
            )
        ]

    def to_str(self, level: int = 1) -> str:
        """The report as text; level 2 adds the warnings and errors."""
        lines: list[str] = []

        def section(title: str, items: list[str]) -> None:
            if items:
                lines.extend([title, *(f"  {item}" for item in items), ""])

        section(
            "Hidden groups",
            [
                f"{g.index}: {', '.join(map(path_str, g.hidden_paths))}   shape {g.varshape}, S = {g.num_state}"
                for g in self.graph.hidden_groups
            ],
        )
        section("Other dynamic states", [path_str(p) for p in self.dynamic_states])
        section(
            "Trained online (operation -> groups)",
            [
                f"{path_str(p)}   {op} -> {list(groups)}"
                for p, groups, op in dict.fromkeys(map(_hashable, self._trained()))
            ],
        )
        section(
            "Current-step gradient only",
            [f"{path_str(p)}   {kind or 'used without a marked operation'}" for p, kind in self.excluded_weights],
        )
        if level >= 2:
            section(
                "Warnings and errors",
                [
                    f"{r.level.value} {r.kind.value}: {r.message}"
                    for r in self.diagnostics
                    if r.level is not DiagnosticLevel.INFO
                ],
            )
        return "\n".join(lines).rstrip()

    def show(self, level: int = 1, *, file: TextIO | None = None) -> None:
        """Print the report."""
        print(self.to_str(level), file=file or sys.stdout)

    def __repr__(self) -> str:
        return f"CompilationReport({', '.join(f'{k}={v}' for k, v in self.counts.items())})"


def _hashable(item: tuple[Path, list[int], str]) -> tuple[Any, ...]:
    path, groups, op = item
    return path, tuple(groups), op
