"""What the compiler noticed, as records that passes return."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping

from .._types import CompilationWarning, Path
from .._warn import warn

__all__ = ["CompilationRecord", "DiagnosticKind", "DiagnosticLevel", "emit"]


class DiagnosticLevel(str, enum.Enum):  # noqa: UP042
    """How much a record matters; warnings and errors are :class:`CompilationWarning` too."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class DiagnosticKind(str, enum.Enum):  # noqa: UP042
    """What a :class:`CompilationRecord` tells; the value is the name in lower case.

    No record is of the kinds ``OUTPUT_BYPASSES_HIDDEN`` and ``OUTPUT_BYPASS_DROPPED``, which scripts may ask for: the
    reverse pass through the step yields the credit of every output, whether or not it passes a new hidden value.
    """

    RELATION_INCLUDED = "relation_included"
    RELATION_EXCLUDED_NO_PARAMSTATE = "relation_excluded_no_paramstate"
    RELATION_EXCLUDED_NON_TEMPORAL = "relation_excluded_non_temporal"
    RELATION_EXCLUDED_SHAPE_MISMATCH = "relation_excluded_shape_mismatch"
    RELATION_EXCLUDED_WEIGHT_TO_WEIGHT = "relation_excluded_weight_to_weight"
    RELATION_EXCLUDED_SLICED_WEIGHT = "relation_excluded_sliced_weight"
    RELATION_EXCLUDED_MIXING = "relation_excluded_mixing"
    RELATION_EXCLUDED_UNMARKED = "relation_excluded_unmarked"
    RELATION_PARTIAL_PATH = "relation_partial_path"
    TRAINABLE_INVAR_NOT_PARAMSTATE = "trainable_invar_not_paramstate"
    COND_IF_CONVERTED = "cond_if_converted"
    COND_CONVERSION_SKIPPED = "cond_conversion_skipped"
    SCAN_UNROLLED = "scan_unrolled"
    SCAN_UNROLL_SKIPPED = "scan_unroll_skipped"
    SCAN_DESCENT_APPLIED = "scan_descent_applied"
    SCAN_DESCENT_SKIPPED = "scan_descent_skipped"
    SCAN_DESCENT_NO_RELATIONS = "scan_descent_no_relations"
    WEIGHT_IN_WHILE = "weight_in_while"
    WEIGHT_IN_CONTROL_FLOW = "weight_in_control_flow"
    CONTROL_FLOW_OPAQUE_FWD = "control_flow_opaque_fwd"
    CONTROL_FLOW_RECURRENT_MIXING = "control_flow_recurrent_mixing"
    PRIMITIVE_INSIDE_NESTED_JIT = "primitive_inside_nested_jit"
    PRIMITIVE_INSIDE_CONTROL_FLOW = "primitive_inside_control_flow"
    MULTI_OUTPUT_PRIMITIVE_DETECTED = "multi_output_primitive_detected"
    PYTREE_WEIGHT_LEAF_AMBIGUOUS = "pytree_weight_leaf_ambiguous"
    SNAP_PATTERN_CONSERVATIVE = "snap_pattern_conservative"
    SNAP_PATTERN_DEGENERATE = "snap_pattern_degenerate"
    TRANSITION_TAIL_BOUNDED = "transition_tail_bounded"
    HIDDEN_GROUP_MERGED = "hidden_group_merged"
    OUTPUT_BYPASSES_HIDDEN = "output_bypasses_hidden"
    OUTPUT_BYPASS_DROPPED = "output_bypass_dropped"
    STATE_MISMATCH = "state_mismatch"
    STATE_NOT_HIDDEN = "state_not_hidden"
    RECURRENT_MIXING = "recurrent_mixing"
    WEIGHT_VARIES = "weight_varies"
    FILTER_MISSES_SLOPE = "filter_misses_slope"
    SIGNAL_BYPASSES_FILTER = "signal_bypasses_filter"


@dataclasses.dataclass(frozen=True)
class CompilationRecord:
    """One thing that the compiler noticed.

    Attributes
    ----------
    kind, level : DiagnosticKind, DiagnosticLevel
    message : str
        What happened, to which of the user's objects, and what to do about it.
    primitive : str or None
        The operation's name.
    weight_path : tuple or None
        Path of the parameter concerned.
    hidden_paths : tuple of tuple
        Paths of the hidden states concerned.
    context : mapping or None
        Further facts, by name.
    """

    kind: DiagnosticKind
    level: DiagnosticLevel
    message: str
    primitive: str | None = None
    weight_path: Path | None = None
    hidden_paths: tuple[Path, ...] = ()
    context: Mapping[str, object] | None = None

    def __repr__(self) -> str:
        shown = [f"kind={self.kind.value!r}", f"level={self.level.value!r}"]
        for name in ("primitive", "weight_path", "hidden_paths", "message", "context"):
            value = getattr(self, name)
            if value:
                shown.append(f"{name}={value!r}")
        return f"CompilationRecord({', '.join(shown)})"


def emit(records: Iterable[CompilationRecord], said: set[str] | None = None) -> None:
    """Show warnings and errors among the records as Python warnings, each once; ``said``: those shown before."""
    said = set() if said is None else said
    for record in records:
        text = f"[{record.kind.value}] {record.message}"
        if record.level is not DiagnosticLevel.INFO and text not in said:
            said.add(text)
            warn(text, CompilationWarning)
