"""What flattening says about loops, branches and what they hold, and refuses."""

from __future__ import annotations

from typing import NoReturn

from .._jax import JaxprEqn, scan_operands, source_line
from .._program import equations_within
from .._types import CompilationError, Path, path_str
from .diagnostics import CompilationRecord, DiagnosticKind, DiagnosticLevel, emit
from .frame import Frame, is_marked
from .policy import ControlFlowPolicy

__all__ = ["LOOPS", "Remarks", "at", "weights_of"]

LOOPS = frozenset(["cond", "scan", "while"])


def at(eqn: JaxprEqn) -> str:
    line = source_line(eqn)
    return f" at {line}" if line else ""


def weights_of(eqn: JaxprEqn, frame: Frame) -> frozenset[Path]:
    return frozenset[Path]().union(*(o.weights for o in frame.inputs(eqn)[1]))


class Remarks:
    """Diagnostics of a step, by the policy; an equation's place is part of each."""

    def __init__(self, policy: ControlFlowPolicy):
        self.policy = policy
        self.records: list[CompilationRecord] = []

    def enter(self, eqn: JaxprEqn, frame: Frame) -> None:
        if frame.depth >= self.policy.fixpoint_iteration_limit:
            raise CompilationError(
                f"The {eqn.primitive.name}{at(eqn)} stands inside {frame.depth} loops or branches that are opened "
                f"too: fixpoint_iteration_limit={self.policy.fixpoint_iteration_limit}. Pass a larger one."
            )

    def cannot_convert(self, eqn: JaxprEqn) -> str | None:
        """Why a branch is not turned into a choice between results."""
        if self.policy.cond == "opaque":
            return "cond='opaque'"
        if eqn.effects:
            return "it has side effects"
        for inner in equations_within(eqn):
            if inner.primitive.name == "while":
                return f"it holds a while loop{at(inner)}, which might never end in a branch that is not taken"
            if inner.primitive.name == "scan" and inner.params["length"] > self.policy.scan_unroll_limit:
                return (
                    f"it holds a scan{at(inner)} of length {inner.params['length']}, beyond "
                    f"scan_unroll_limit={self.policy.scan_unroll_limit}"
                )
        return None

    @staticmethod
    def cannot_descend(eqn: JaxprEqn, frame: Frame) -> str | None:
        """Why operations in a long loop are not followed in place."""
        _, origins = frame.inputs(eqn)
        consts, carry = scan_operands(eqn)
        carried = origins[consts:][:carry]
        nested = [e for e in equations_within(eqn) if e.primitive.name in LOOPS]
        if eqn.params["reverse"]:
            return "it runs backward"
        if nested:
            return f"it holds a {nested[0].primitive.name}{at(nested[0])}"
        if not any(o.entry for o in carried):
            return "it carries no hidden state from its value at the start of the step"
        if any(o.live and not o.entry for o in carried):
            return "the hidden value that it carries is computed before it starts"
        return None

    def check_weights(self, eqn: JaxprEqn, frame: Frame, kind: str, remedy: str) -> None:
        weights = weights_of(eqn, frame)
        if weights:
            path = min(weights, key=path_str)
            name = eqn.primitive.name
            why = f"The parameter {path_str(path)!r} is used inside a {name}{at(eqn)}, where no trace can follow it. "
            self.refuse(kind, eqn, why + remedy, path)

    def check_operations(self, eqn: JaxprEqn, frame: Frame) -> None:
        """Marked operations that stay inside an equation are refused, or left to plain JAX."""
        inner = sorted({e.primitive.name for e in equations_within(eqn) if is_marked(e)})
        if not inner:
            return
        text = f"The marked operation {inner[0]!r} stands inside a {eqn.primitive.name!r}{at(eqn)}, where no trace "
        if self.policy.etp_in_control_flow == "error" or weights_of(eqn, frame):
            self.refuse(
                "PRIMITIVE_INSIDE_CONTROL_FLOW",
                eqn,
                f"{text}can follow it. Call it outside, use plain JAX inside, or, if its operand is no parameter, "
                "pass ControlFlowPolicy(etp_in_control_flow='exclude').",
                primitive=inner[0],
            )
        text += "follows it: it is plain JAX there."
        self.note("PRIMITIVE_INSIDE_CONTROL_FLOW", "WARNING", eqn, text, primitive=inner[0])

    def note(
        self,
        kind: str,
        level: str,
        eqn: JaxprEqn,
        message: str,
        weight_path: Path | None = None,
        primitive: str | None = None,
    ) -> None:
        record = CompilationRecord(
            DiagnosticKind[kind],
            DiagnosticLevel[level],
            message,
            primitive=primitive or eqn.primitive.name,
            weight_path=weight_path,
            context={"line": source_line(eqn)},
        )
        if record not in self.records:  # the sub-steps of a scan say the same
            self.records.append(record)

    def refuse(
        self, kind: str, eqn: JaxprEqn, message: str, weight_path: Path | None = None, primitive: str | None = None
    ) -> NoReturn:
        self.note(kind, "ERROR", eqn, message, weight_path, primitive)
        emit(self.records)
        raise NotImplementedError(message)
