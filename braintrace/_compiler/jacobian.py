"""The derivatives D and df of a group's transition F, with every operation's output held fixed.

One reverse pass of ``F`` from each hidden variable gives that row of D and of every df. Where ``F`` acts
position by position these are the derivatives themselves; where it mixes positions, the reverse pass is repeated for
one position at a time along the mixed axes, which gives the true diagonal.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np

from .._jax import ClosedJaxpr, Var, eval_jaxpr, hashed, prune, structs
from .._types import Shape
from .constants import known_outputs
from .rows import Fold, Rows
from .scope import DIAGONAL, Neighbourhood, Scope
from .transition import Slot, Transition, displaced_axes, mixed_output_axes

__all__ = ["Coefficient", "Entry", "Fold", "Jacobians", "TransitionJacobian", "differentiate"]


Coefficient: TypeAlias = jax.Array | np.ndarray | complex | None  # an array, a number, or None for a known zero


class Entry(NamedTuple):
    """One entry of D or df: known to be zero, a known constant, or the ``slot``-th value computed every step."""

    kind: str  # 'zero', 'constant' or 'varying'
    value: Coefficient = None  # a scalar, or an array over positions
    slot: int = -1

    def read(self, varying: Sequence[jax.Array | np.ndarray]) -> Coefficient:
        """The value, or ``None`` for a known zero."""
        return None if self.kind == "zero" else self.value if self.kind == "constant" else varying[self.slot]

    def __repr__(self) -> str:
        if self.kind == "constant":
            return f"{np.asarray(self.value).ravel()[0]:.4g}"
        return {"zero": "0", "varying": "*"}[self.kind]


class TransitionJacobian(NamedTuple):
    """D and df of a group.

    Attributes
    ----------
    D : tuple of tuple of Entry
        ``D[a][b]`` is the derivative of hidden variable ``a`` with respect to the old ``b``, per position.
    df : dict
        Operation index -> one entry per hidden variable.
    inputs : tuple of Var
        What ``program`` reads.
    program : ClosedJaxpr
        Computes the varying entries.
    aligned : frozenset of int
        Operations with an entry for every position, from which every path within F is position by position.
    displaced : frozenset of int
        Operations of which some entry acts on another position than its own.
    folds : dict
        Operation index -> :class:`Fold`, for outputs of another shape than the group (fused gates, a reshape).
    values : tuple of Entry
        One per variable of ``inputs``, in the scope ``'full'``.
    """

    D: tuple[tuple[Entry, ...], ...]
    df: dict[int, tuple[Entry, ...]]
    inputs: tuple[Var, ...]
    program: ClosedJaxpr
    aligned: frozenset[int]
    displaced: frozenset[int]
    folds: dict[int, Fold]
    values: tuple[Entry, ...] = ()

    def varying(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        return eval_jaxpr(self.program, *values)

    def renamed(self, inputs: tuple[Var, ...], number: Mapping[int, int]) -> TransitionJacobian:
        """The same for a program of other variables, whose operations have other indices."""
        return self._replace(
            df={number[k]: row for k, row in self.df.items()},
            inputs=inputs,
            aligned=frozenset(map(number.__getitem__, self.aligned)),
            displaced=frozenset(map(number.__getitem__, self.displaced)),
            folds={number[k]: fold for k, fold in self.folds.items()},
        )


class Jacobians:
    """Those of a step's groups, made once for all whose transitions differ in nothing but their variables."""

    def __init__(self) -> None:
        self._found: dict[Hashable, tuple[Transition, TransitionJacobian]] = {}

    def make(
        self,
        transition: Transition,
        varshape: Shape,
        slots: Sequence[Slot],
        scope: Scope = DIAGONAL,
        neighbourhood: Neighbourhood | None = None,
    ) -> TransitionJacobian:
        """As :func:`differentiate`."""
        form = transition.form() if neighbourhood is None else None
        key = None if form is None else hashed(form, varshape, tuple(slots), scope)
        if key not in self._found:
            found = differentiate(transition, varshape, slots, scope, neighbourhood)
            if key is None:
                return found
            self._found[key] = transition, found
        alike, found = self._found[key]
        return found.renamed(transition.inputs, dict(zip(alike.ys, transition.ys)))


def differentiate(
    transition: Transition,
    varshape: Shape,
    slots: Sequence[Slot],
    scope: Scope = DIAGONAL,
    neighbourhood: Neighbourhood | None = None,
) -> TransitionJacobian:
    """Build the program for D and df and classify every entry.

    With a ``neighbourhood`` the entries of D have two axes of neighbours in front of those of the positions. In the
    scope ``'full'`` there is no D; the program gives what F reads instead.
    """
    rows = Rows(transition, varshape, slots, scope, neighbourhood)
    closed, out_shape = jax.make_jaxpr(rows.all, return_shape=True)(*structs(transition.inputs))
    tree, known = jax.tree.structure(out_shape), known_outputs(closed)
    # Arrays even where all of it is one number: df has the axis of sub-steps, D that of neighbours.
    paths = [path[1:] for path, _ in jax.tree.leaves_with_path(out_shape)]
    keep_shape = [
        len(path) == 3 and (neighbourhood is not None and path[1].idx == 0 or _in_sub_steps(path[2], transition.fronts))
        for path in paths
    ]
    varying = [i for i in range(len(paths)) if i not in known]
    entries = [
        _constant(known[i], keep_shape[i]) if i in known else Entry("varying", slot=varying.index(i))
        for i in range(len(paths))
    ]
    program = prune(closed, [i not in known for i in range(len(paths))])
    zero = Entry("zero")
    result, values = jax.tree.unflatten(tree, entries)
    D = tuple(tuple(zero if e is None else e for e in row) for row, _ in result)
    df = {k: tuple(row.get(k, zero) for _, row in result) for k in transition.ys}
    aligned, displaced = rows.without(mixed_output_axes), frozenset(transition.ys) - rows.without(displaced_axes)
    return TransitionJacobian(D, df, transition.inputs, program, aligned, displaced, rows.folds, tuple(values))


def _in_sub_steps(key: object, fronts: Mapping[int, int]) -> bool:
    return bool(fronts.get(getattr(key, "key", -1)))


def _constant(value: np.ndarray, whole: bool) -> Entry:
    """The entry of a known value; ``whole``: as an array even if all of it is one number."""
    if not np.any(value):
        return Entry("zero")
    if not whole and value.size and np.all(value == value.flat[0]):
        value = value.flat[0].item()  # a Python number: takes the dtype of what it multiplies
    return Entry("constant", value)
