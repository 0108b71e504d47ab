"""How the outputs of a step read hidden values, and what of it a changed learning signal does not see.

A filter behind the traces stands for the memory of a readout, a random matrix for its weights. Both act on the signal
at a group's new values, and take for granted that outputs read these, and linearly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from .._jax import eval_jaxpr, open_jaxpr, reads, structs
from .._types import Path, PyTree, path_str
from .diagnostics import CompilationRecord, DiagnosticKind, DiagnosticLevel
from .groups import HiddenGroup
from .step import Zeros

if TYPE_CHECKING:
    from .graph import ETraceGraph

__all__ = ["unchanged_signals", "unfiltered_slopes"]


def unchanged_signals(graph: ETraceGraph) -> list[CompilationRecord]:
    """On outputs that read old values past the new ones: of what is before a reset or a clip, not of what is stored."""
    old = graph.step.zeros_like.old
    records = []
    for g in graph.hidden_groups:
        paths = tuple(p for p in g.hidden_paths if p in old)
        if g.index in graph.traced and paths:
            names = ", ".join(repr(path_str(p)) for p in paths)
            message = (
                f"The output reads what {names} held before the step past the new value (what is stored comes after a "
                "reset or a clip, say). Credit that takes this way passes no filter and no random matrix. Keep what "
                "the output reads in a brainstate.HiddenState of its own, and read it from there."
            )
            kind = DiagnosticKind.SIGNAL_BYPASSES_FILTER
            records.append(CompilationRecord(kind, DiagnosticLevel.WARNING, message, hidden_paths=paths))
    return records


def unfiltered_slopes(graph: ETraceGraph) -> list[CompilationRecord]:
    """On outputs that read new values by a function that is not linear: spikes, say."""
    records = []
    for g in graph.hidden_groups:
        if g.index in graph.traced and _slope_varies(graph, g):
            names = ", ".join(repr(path_str(p)) for p in g.hidden_paths)
            message = (
                f"The output reads {names} by a function whose slope changes from step to step (spikes, tanh, a gate). "
                "The filter sums traces without that slope, and the gradient can point away from that of "
                "back-propagation. Keep what the readout takes, such as the spikes, in a brainstate.HiddenState of its "
                "own, and read it from there: the trace of that state has the slope."
            )
            kind = DiagnosticKind.FILTER_MISSES_SLOPE
            records.append(CompilationRecord(kind, DiagnosticLevel.WARNING, message, hidden_paths=g.hidden_paths))
    return records


def _slope_varies(graph: ETraceGraph, group: HiddenGroup) -> bool:
    """Whether the derivative of an output by a new value depends on more than parameters."""
    step, info = graph.step, graph.module_info
    flat = structs(open_jaxpr(step.program).invars)
    invals, _, zeros = jax.tree.unflatten(step.in_tree, flat)
    new = {p: zeros.new[p] for p in group.hidden_paths if p in zeros.new}

    def signals(flat: Sequence[jax.Array], new: dict[Path, jax.Array], bars: list[jax.Array]) -> PyTree:
        invals, operands, zeros = jax.tree.unflatten(step.in_tree, flat)

        def outputs(new: dict[Path, jax.Array]) -> list[jax.Array]:
            shifted = Zeros(zeros.new | new, zeros.old, zeros.y)
            outs = eval_jaxpr(step.program, *jax.tree.leaves((invals, operands, shifted)))
            return [out for out in outs[: info.num_var_out] if jnp.issubdtype(out.dtype, jnp.inexact)]

        _, pull = jax.vjp(outputs, new)
        return pull(bars)

    outs = open_jaxpr(step.program).outvars[: info.num_var_out]
    bars = [s for s in structs(outs) if jnp.issubdtype(s.dtype, jnp.inexact)]
    closed = jax.make_jaxpr(signals)(flat, new, bars)
    read = reads(closed, [True] * len(open_jaxpr(closed).outvars))
    return any(r and v not in info.invar_to_weight_path for v, r in zip(info.jaxpr.invars, read[: len(invals)]))
