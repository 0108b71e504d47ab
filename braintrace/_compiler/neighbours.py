"""Which positions of a group influence which, one step later."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from .._jax import Literal
from .._types import NotSupportedError, Path, Shape, path_str
from .diagnostics import CompilationRecord, DiagnosticKind, DiagnosticLevel
from .flow import Flow, MarkedOp
from .labels import unaligned_axes
from .scope import Neighbourhood, Scope, neighbourhood
from .transition import Transition, mixed_axes

__all__ = ["find_neighbourhood"]


def find_neighbourhood(
    flow: Flow,
    transition: Transition,
    paths: Sequence[Path],
    varshape: Shape,
    num_state: int,
    scope: Scope,
) -> tuple[Neighbourhood, list[CompilationRecord]]:
    """The neighbourhoods of a group's positions, and what there is to say about them.

    Raises
    ------
    NotSupportedError
        If the Jacobian between neighbours has more elements than the scope's ceiling.
    """
    by_old, _ = transition.labels(varshape)
    floating = [labels for labels, v in zip(by_old, transition.news) if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    axes = tuple(sorted({k for labels in floating for k in mixed_axes(labels, {}, {}, varshape)}))
    names = ", ".join(map(path_str, paths))
    records = []

    def tell(kind: DiagnosticKind, level: DiagnosticLevel, message: str) -> None:
        records.append(CompilationRecord(kind, level, message, hidden_paths=tuple(paths)))

    if not axes:
        axes = (len(varshape) - 1,) if varshape else ()
        found = neighbourhood(np.eye(math.prod(varshape[-1:]), dtype=bool), axes, varshape, scope.order)
        tell(
            DiagnosticKind.SNAP_PATTERN_DEGENERATE,
            DiagnosticLevel.INFO,
            f"The positions of {names} do not influence each other within the group: traces have no neighbours.",
        )
    else:
        influence = _influence(flow, transition, varshape, axes)
        if isinstance(influence, str):
            found = neighbourhood(None, axes, varshape, scope.order, influence)
        else:
            found = neighbourhood(influence, axes, varshape, scope.order)
        if found.conservative:
            tell(
                DiagnosticKind.SNAP_PATTERN_CONSERVATIVE,
                DiagnosticLevel.WARNING,
                f"How the positions of {names} influence each other is not that of a single recurrent product with a "
                f"known pattern ({found.reason}): every position is taken as the neighbour of every other.",
            )
    elements = found.num_position * (found.num_neighbour * num_state) ** 2
    if elements > scope.ceiling:
        raise NotSupportedError(
            f"The Jacobian of {names} between neighbours has {elements} elements ({found.num_position} positions with "
            f"{found.num_neighbour} neighbours and {num_state} hidden variables), more than "
            f"snap_max_jacobian_elements={scope.ceiling}. Pass a smaller n, a sparser recurrent matrix, or a larger "
            "snap_max_jacobian_elements."
        )
    return found, records


def _influence(flow: Flow, transition: Transition, varshape: Shape, axes: tuple[int, ...]) -> np.ndarray | str:
    """``[p, q]``: p influences q; why that is unknown unless one operation on the last axis does all of the mixing."""
    if len(transition.passed) != 1:
        return f"hidden values enter {len(transition.passed)} marked operations instead of one"
    if axes != (len(varshape) - 1,):
        return f"positions mix along the axes {axes} of the shape {varshape}, and not along the last one alone"
    op = flow.ops[next(iter(transition.passed))]
    name = op.primitive.name
    if op.x is None or op.x.aval.shape != varshape or op.y.aval.shape != varshape:
        return f"{name} does not map the shape {varshape} onto itself"
    if _steers(flow, op):
        return f"another operand of {name} than its input depends on hidden values"
    # Without passing through the operation, it stands as the identity: all else must be position by position.
    by_old, by_y = dataclasses.replace(transition, passed=frozenset()).labels(varshape)
    if any(op.index in labels and unaligned_axes(labels[op.index], varshape) for labels in by_y):
        return f"the output of {name} changes its positions on the way to the hidden values"
    if any(unaligned_axes(label, varshape) for labels in by_old for label in labels.values()):
        return f"hidden values change their positions beside {name}"
    rule = op.primitive.rules.snap_adjacency
    pattern: np.ndarray | None = None if rule is None else rule(op.eqn.params, varshape[-1])
    if pattern is None:
        return f"{name} has no rule snap_adjacency, or one that returns None"
    pattern = np.asarray(pattern, bool)
    if pattern.shape != (varshape[-1],) * 2:
        raise ValueError(
            f"The rule snap_adjacency of {name} must return an array of shape {(varshape[-1],) * 2}, got "
            f"{pattern.shape}."
        )
    return pattern.T


def _steers(flow: Flow, op: MarkedOp) -> bool:
    """Whether hidden values reach another operand than the input."""
    others = [v for i, v in enumerate(op.eqn.invars) if i != op.primitive.x_index and not isinstance(v, Literal)]
    return any(s[0] != "y" for v in others for s in flow.labels.get(v, {}))
