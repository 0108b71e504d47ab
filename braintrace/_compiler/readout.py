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
from .._program import before, made_at
from .._types import Path, quoted
from .diagnostics import CompilationRecord, DiagnosticKind, DiagnosticLevel
from .groups import HiddenGroup
from .step import Zeros

if TYPE_CHECKING:
    from .graph import ETraceGraph

__all__ = ["remarks_on_outputs"]


def remarks_on_outputs(graph: ETraceGraph, filtered: bool, random: bool) -> list[CompilationRecord]:
    """For traces behind a filter, and signals through a random matrix."""
    changed = _unchanged_signals(graph) if filtered or random else []
    return changed + (_unfiltered_slopes(graph) if filtered else [])


def _unchanged_signals(graph: ETraceGraph) -> list[CompilationRecord]:
    """On outputs that read old values past the new ones: of what is before a reset or a clip, not of what is stored."""
    old = graph.step.zeros_like.old
    records = []
    for g in graph.hidden_groups:
        paths = tuple(p for p in g.hidden_paths if p in old)
        if g.index in graph.traced and paths:
            message = (
                f"The output reads what {quoted(paths)} held before the step past the new value (what is stored comes "
                "after a reset or a clip, say). Credit that takes this way passes no filter and no random matrix. Keep "
                "what the output reads in a brainstate.HiddenState of its own, and read it from there."
            )
            kind = DiagnosticKind.SIGNAL_BYPASSES_FILTER
            records.append(CompilationRecord(kind, DiagnosticLevel.WARNING, message, hidden_paths=paths))
    return records


def _unfiltered_slopes(graph: ETraceGraph) -> list[CompilationRecord]:
    """On outputs that read new values by a function that is not linear: spikes, say."""
    records = []
    for g in _with_varying_slopes(graph):
        message = (
            f"The output reads {quoted(g.hidden_paths)} by a function whose slope changes from step to step (spikes, "
            "tanh, a gate). The filter sums traces without that slope, and the gradient can point away from that of "
            "back-propagation. Keep what the readout takes, such as the spikes, in a brainstate.HiddenState of its "
            "own, and read it from there: the trace of that state has the slope."
        )
        kind = DiagnosticKind.FILTER_MISSES_SLOPE
        records.append(CompilationRecord(kind, DiagnosticLevel.WARNING, message, hidden_paths=g.hidden_paths))
    return records


def _with_varying_slopes(graph: ETraceGraph) -> list[HiddenGroup]:
    """Groups by whose new values an output has a derivative that depends on more than what stays as it is."""
    step, info = graph.step, graph.module_info
    flat = structs(open_jaxpr(step.program).invars)
    invals, operands, zeros = jax.tree.unflatten(step.in_tree, flat)
    groups = [g for g in graph.hidden_groups if g.index in graph.traced]
    paths = [p for g in groups for p in g.hidden_paths if p in zeros.new]
    new = {p: zeros.new[p] for p in paths}

    def signals(flat: Sequence[jax.Array], new: dict[Path, jax.Array], bars: list[jax.Array]) -> list[jax.Array]:
        invals, operands, zeros = jax.tree.unflatten(step.in_tree, flat)

        def outputs(new: dict[Path, jax.Array]) -> list[jax.Array]:
            shifted = Zeros(zeros.new | new, zeros.old, zeros.y)
            outs = eval_jaxpr(step.program, *jax.tree.leaves((invals, operands, shifted)))
            return [out for out in outs[: info.num_var_out] if jnp.issubdtype(out.dtype, jnp.inexact)]

        found = jax.vjp(outputs, new)[1](bars)[0]
        return [found[p] for p in paths]

    outs = open_jaxpr(step.program).outvars[: info.num_var_out]
    bars = [s for s in structs(outs) if jnp.issubdtype(s.dtype, jnp.inexact)]
    closed = jax.make_jaxpr(signals)(flat, new, bars)
    changing, made = info.changing, made_at(info.jaxpr.eqns)
    changes = [v in changing for v in info.jaxpr.invars]
    for r, own in zip(graph.operations, operands):
        for key in sorted(own):
            behind = before(info.jaxpr.eqns, made, [r.trainable_vars[key]])
            changes.append(bool(r.varying) or not changing.isdisjoint(behind))

    def varies(group: HiddenGroup) -> bool:
        read = reads(closed, [p in group.hidden_paths for p in paths])
        return any(r and change for r, change in zip(read, changes))

    assert len(changes) == len(invals) + len(jax.tree.leaves(operands))
    return [g for g in groups if varies(g)]
