"""The report that a person reads."""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TextIO

import brainstate
import jax

from .._types import Path, path_str
from .diagnostics import CompilationRecord, DiagnosticLevel
from .diagram import mermaid, svg
from .graph import ETraceGraph

__all__ = ["CompilationReport"]

# Why a parameter has no trace, by the kind of the record that tells; `None` where there is none.
_REASONS = {
    None: "used without a marked operation",
    "relation_excluded_no_paramstate": "enters an operation together with what another one gave",
    "relation_excluded_non_temporal": "reaches no hidden state",
    "relation_excluded_shape_mismatch": "its output has another shape than the hidden state",
    "relation_excluded_weight_to_weight": "reaches hidden states through another operation only",
    "relation_excluded_sliced_weight": "only a part of it is used",
    "relation_excluded_mixing": "its output is mixed between positions on the way",
    "relation_excluded_unmarked": "drives a hidden state in plain JAX",
}
_STYLE = (
    "<style scoped>.braintrace table{margin:0 0 1em;border-collapse:collapse;font-size:90%}"
    ".braintrace caption{text-align:left;font-weight:bold;padding:.3em 0}"
    ".braintrace td,.braintrace th{text-align:left;padding:.15em .8em .15em 0;border-bottom:1px solid #ddd}"
    ".braintrace div{overflow-x:auto}</style>"
)
_LEGEND = (
    "Thick: traced (D is what carries the history). Dotted: the exact credit of the current step only. Dashed: cut."
)

Section = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


class CompilationReport:
    """What a compiled model trains online, and what it does not.

    Parameters
    ----------
    graph : ETraceGraph
    states : mapping, optional
        Path -> state, of a learner whose layout on a mesh of devices is to be shown.
    traces : mapping, optional
        Number of a relation -> what a learner keeps for it, in words, and how many bytes (of one sample, if mapped).

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

    def __init__(
        self,
        graph: ETraceGraph,
        states: Mapping[Path, brainstate.State] | None = None,
        traces: Mapping[int, tuple[str, int]] | None = None,
    ):
        self._graph = graph
        self._states = states or {}
        self._traces = traces or {}

    @property
    def graph(self) -> ETraceGraph:
        """The compiled model that the report is about."""
        return self._graph

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
        return [(path, groups) for path, groups, *_ in self._trained()]

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

    def _trained(self) -> list[tuple[Path, list[int], str, tuple[str, ...]]]:
        form = {i: (words, f"{size:,}") for i, (words, size) in self._traces.items()}
        return [
            (path, [g.index for g in r.hidden_groups], r.title, form.get(i, ()))
            for i, r in enumerate(self.graph.hidden_param_op_relations)
            for path in (
                *r.trainable_paths.values(),
                *(p for p in r.parameter_paths if p not in r.trainable_paths.values()),
            )
        ]

    def _sections(self, level: int) -> list[Section]:
        """Title, column names and rows of every part of the report that is not empty."""
        found: list[Section] = [
            (
                "Hidden groups",
                ("group", "members", "shape", "S"),
                [
                    (str(g.index), ", ".join(map(path_str, g.hidden_paths)), str(g.varshape), str(g.num_state))
                    for g in self.graph.hidden_groups
                ],
            ),
            ("Other dynamic states", ("state",), [(path_str(p),) for p in self.dynamic_states]),
            (
                "Trained online",
                ("parameter", "operation", "groups", *(("trace", "bytes") if self._traces else ())),
                [(path_str(p), op, str(groups), *form) for p, groups, op, form in self._trained()],
            ),
            (
                "Current-step gradient only",
                ("parameter", "why"),
                [(path_str(p), _REASONS.get(kind, str(kind))) for p, kind in self.excluded_weights],
            ),
        ]
        found.append(("Layout", ("array", "shape", "axes of the mesh"), list(self._spread_arrays())))
        if level >= 2:
            notable = [r for r in self.diagnostics if r.level is not DiagnosticLevel.INFO]
            rows: list[tuple[str, ...]] = [(r.level.value, r.kind.value, r.message) for r in notable]
            found.append(("Warnings and errors", ("level", "kind", "message"), rows))
        return [(title, columns, list(dict.fromkeys(rows))) for title, columns, rows in found if rows]

    def _spread_arrays(self) -> Iterator[tuple[str, str, str]]:
        """What does not lie on all devices alike."""
        for path, state in self._states.items():
            for x in jax.tree.leaves(state.value):
                spec = getattr(getattr(x, "sharding", None), "spec", None) or ()
                if any(part is not None for part in spec):
                    yield path_str(path), str(x.shape), f"({', '.join(map(str, spec))})"

    def to_str(self, level: int = 1) -> str:
        """The report as text; level 2 adds the warnings and errors."""
        parts = []
        for title, columns, rows in self._sections(level):
            shown = [columns, *rows] if len(columns) > 1 else rows
            widths = [max(map(len, column)) for column in zip(*shown)]
            lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in shown]
            parts.append("\n".join([title, *(f"  {line}" for line in lines)]))
        return "\n\n".join(parts)

    def to_mermaid(self) -> str:
        """The model as a Mermaid flowchart.

        Operations and hidden groups are nodes. Thick arrows are traced (D is what carries a group's history), dotted
        ones get the exact credit of the current step only, crossed ones are cut.

        Examples
        --------
        >>> import brainstate, braintrace, jax.numpy as jnp
        >>> cell = braintrace.nn.ValinaRNNCell(2, 3)
        >>> _ = brainstate.nn.init_all_states(cell)
        >>> print(braintrace.CompilationReport(braintrace.compile_etrace_graph(cell, jnp.zeros(2))).to_mermaid())
        flowchart LR
          x([input])
          op0["W.weight<br/>etp_mv"]
          g0[("h<br/>shape (3,), S = 1")]
          out([output])
          x --> op0
          g0 --x|cut| op0
          op0 ==>|traced| g0
          g0 --> out
        """
        return mermaid(self.graph)

    def _repr_html_(self) -> str:
        def row(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        parts = []
        for title, columns, rows in self._sections(2):
            body = "".join(row(cells, "td") for cells in rows)
            parts.append(f"<table><caption>{title}</caption>{row(columns, 'th')}{body}</table>")
        drawing = svg(self.graph)
        if drawing:
            parts.append(f"<div>{drawing}</div><small>{_LEGEND}</small>")
        return f'{_STYLE}<div class="braintrace">{"".join(parts)}</div>'

    def show(self, level: int = 1, *, file: TextIO | None = None) -> None:
        """Print the report."""
        print(self.to_str(level), file=file or sys.stdout)

    def print(self, verbose: bool, return_msg: bool) -> str | None:
        """What ``show_graph`` does."""
        message = self.to_str()
        if verbose:
            print(message)
        return message if return_msg else None

    def __repr__(self) -> str:
        return f"CompilationReport({', '.join(f'{k}={v}' for k, v in self.counts.items())})"
