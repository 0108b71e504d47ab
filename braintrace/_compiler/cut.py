"""Cut evaluation: the derivatives D and df of a group with every operation's output held fixed.

The equations between a group's old values, the outputs of its operations and its new values form a small program
``F``. One reverse pass of ``F`` from each hidden variable gives that row of D and of every df. Where ``F`` acts
position by position these are the derivatives themselves; where it mixes positions, the reverse pass is repeated for
one position at a time along the mixed axes, which gives the true diagonal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._jax import consts_of, eval_jaxpr, hashed, is_tracer, open_jaxpr, prune, structs
from .constants import known_outputs
from .labels import MANY, NONE, Label, own_label
from .module_info import ModuleInfo
from .position_rules import combine
from .positions import no_cut, propagate
from .scope import DIAGONAL, Neighbourhood, Scope
from .slices import Slice, displaced_axes, evaluate_slice, is_shared, mixed_axes, mixed_output_axes, slice_labels

__all__ = ["Cut", "Cuts", "Entry", "Fold", "Transition", "differentiate_cut"]


class Entry(NamedTuple):
    """One entry of D or df: known to be zero, a known constant, or the ``slot``-th value computed every step."""

    kind: str  # 'zero', 'constant' or 'varying'
    value: Any = None  # a scalar, or an array over positions
    slot: int = -1

    def read(self, varying: Sequence[Any]) -> Any | None:
        """The value, or ``None`` for a known zero."""
        return None if self.kind == "zero" else self.value if self.kind == "constant" else varying[self.slot]

    def __repr__(self) -> str:
        if self.kind == "constant":
            return f"{np.ravel(self.value)[0]:.4g}"
        return {"zero": "0", "varying": "*"}[self.kind]


class Fold(NamedTuple):
    """Where the entries of an operation's output act, if each acts on one position of a group of another shape.

    Of an operation with sub-steps, those of one sub-step.

    ``positions`` holds the position of every entry, one integer array per axis of the group; ``tiles`` is their number
    where they are equal slices of the last axis, ``whole`` the group's shape where they are its entries in order.
    """

    positions: tuple[np.ndarray, ...]
    tiles: int | None
    whole: tuple[int, ...] | None

    def place(self, value: Any) -> Any:
        """The value of every entry's position; axes in front of those of the group stay."""
        if value is None or jnp.ndim(value) == 0:
            return value
        if self.whole is not None:
            return value.reshape(*value.shape[: value.ndim - len(self.whole)], *self.positions[0].shape)
        if self.tiles is not None:
            return jnp.concatenate([value] * self.tiles, -1)
        return value[(..., *self.positions)]


class Cut(NamedTuple):
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
    inputs: tuple[Any, ...]
    program: Any
    aligned: frozenset
    displaced: frozenset
    folds: dict[int, Fold]
    values: tuple[Entry, ...] = ()

    def varying(self, values: Sequence[Any]) -> list[Any]:
        return eval_jaxpr(self.program, *values)

    def renamed(self, inputs: tuple[Any, ...], number: Mapping[int, int]) -> Cut:
        """The same for a program of other variables, whose operations have other indices."""
        return self._replace(
            df={number[k]: row for k, row in self.df.items()},
            inputs=inputs,
            aligned=frozenset(map(number.__getitem__, self.aligned)),
            displaced=frozenset(map(number.__getitem__, self.displaced)),
            folds={number[k]: fold for k, fold in self.folds.items()},
        )


class Transition:
    """F as a program that can be read and run; made when first asked for.

    Attributes
    ----------
    inputs : tuple of Var
        What F reads beside the old values: operation outputs, then everything else.
    """

    def __init__(self, info: ModuleInfo, part: Slice):
        self.info, self.part = info, part
        self.inputs = (*part.ys.values(), *part.externals)

    @functools.cached_property
    def program(self) -> Any:
        """``(old values, inputs) -> new values`` as a closed jaxpr."""
        return jax.make_jaxpr(self.run)(structs(self.part.olds), structs(self.inputs))

    def run(self, olds: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        ys = dict(zip(self.part.ys, inputs))
        return evaluate_slice(self.info.jaxpr.eqns, self.part, olds, ys, inputs[len(ys) :])


class Cuts:
    """The cuts of a step's groups; those of groups whose slices differ in nothing but their variables are made once."""

    def __init__(self, info: ModuleInfo):
        self._info = info
        self._found: dict[Any, tuple[Slice, Cut]] = {}

    def make(
        self,
        part: Slice,
        varshape: tuple[int, ...],
        slots: Sequence[Any],
        scope: Scope = DIAGONAL,
        neighbourhood: Neighbourhood | None = None,
    ) -> Cut:
        """As :func:`differentiate_cut`."""
        form = part.form(self._info.jaxpr.eqns) if neighbourhood is None else None
        key = None if form is None else hashed(form, varshape, tuple(slots), scope)
        if key not in self._found:
            cut = differentiate_cut(self._info, part, varshape, slots, scope, neighbourhood)
            if key is None:
                return cut
            self._found[key] = part, cut
        alike, cut = self._found[key]
        return cut.renamed(part.inputs, dict(zip(alike.ys, part.ys)))


def differentiate_cut(
    info: ModuleInfo,
    part: Slice,
    varshape: tuple[int, ...],
    slots: Sequence[tuple[int, int | None]],
    scope: Scope = DIAGONAL,
    neighbourhood: Neighbourhood | None = None,
) -> Cut:
    """Build the program for D and df and classify every entry.

    With a ``neighbourhood`` the entries of D have two axes of neighbours in front of those of the positions. In the
    scope ``'full'`` there is no D; the program gives what F reads instead.
    """
    eqns = info.jaxpr.eqns
    labels, y_labels = slice_labels(eqns, part, varshape)
    inputs = part.inputs
    num_old, num_y = len(part.olds), len(part.ys)
    keys = list(part.ys)
    y_shapes = _y_shapes(part)
    inexact = [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in part.news]
    folds = _folds(eqns, part, varshape, slots, inexact, y_labels)
    by_position = [{k: lab for k, lab in labels_of.items() if k not in folds} for labels_of in y_labels]
    whole = scope.kind == "full"

    def rows(*values):
        olds, ys, ext = values[:num_old], values[num_old : num_old + num_y], values[num_old + num_y :]
        out = []
        for a, component in slots:
            if not inexact[a]:
                out.append(_Row([None] * len(slots), {}))
                continue

            def new_value(olds, ys, a=a, ext=ext):
                return evaluate_slice(eqns, part, olds, dict(zip(keys, ys)), ext)[a]

            new, pull = jax.vjp(new_value, list(olds), list(ys))
            cotangents = _cotangents(new, pull, component, slots, keys)
            of_D = mixed_axes({} if whole else labels[a], {}, y_shapes, varshape)
            along = {
                k: _along(cotangents, k, varshape, new, ys[keys.index(k)])
                for k, label in by_position[a].items()
                if is_shared(label, y_shapes[k], varshape, part.fronts[k])
            }
            along = {k: slope for k, slope in along.items() if slope is not None}
            own = {k: label for k, label in by_position[a].items() if k not in along}
            others = {k: shape for k, shape in y_shapes.items() if k not in along}
            of_df = mixed_axes({}, own, y_shapes, varshape)
            row_of = lambda y_shapes, axes, of=cotangents, dtype=new.dtype: _row(  # noqa: E731
                of, dtype, part.fronts, y_shapes, varshape, axes, folds, scope
            )
            both = tuple(sorted({*of_D, *of_df}))
            if neighbourhood is not None:
                D = _blocks(cotangents, new.dtype, varshape, of_D, neighbourhood, scope)
                out.append(_Row(D, row_of(others, of_df).df))
            elif both in (of_D, of_df):
                out.append(row_of(others, both))
            else:  # one position at a time along all of these axes would be far more of them
                out.append(_Row(row_of({}, of_D).D, row_of(others, of_df).df))
            out[-1].df.update(along)
        nothing = [None] * len(slots)
        return [(nothing if whole else r.D, r.df) for r in out], list(values) if whole else []

    closed, out_shape = jax.make_jaxpr(rows, return_shape=True)(*structs(inputs))
    flat, tree = jax.tree.flatten(out_shape)
    # Arrays even where all of it is one number: df has the axis of sub-steps, D that of neighbours.
    paths = [path[1:] for path, _ in jax.tree.leaves_with_path(out_shape)]
    keep_shape = [
        len(path) == 3 and (neighbourhood is not None and path[1].idx == 0 or _in_sub_steps(path[2], part.fronts))
        for path in paths
    ]
    known = known_outputs(closed)
    varying = [i for i in range(len(flat)) if i not in known]
    entries = [
        _constant(known[i], keep_shape[i]) if i in known else Entry("varying", slot=varying.index(i))
        for i in range(len(flat))
    ]
    program = prune(closed, [i not in known for i in range(len(flat))])
    zero = Entry("zero")
    result, values = jax.tree.unflatten(tree, entries)
    D = tuple(tuple(zero if e is None else e for e in row) for row, _ in result)
    df = {k: tuple(row.get(k, zero) for _, row in result) for k in keys}
    without = lambda bad: frozenset(  # noqa: E731
        k
        for k in keys
        if all(k not in by_position[a] or not bad(y_labels[a][k], y_shapes[k], varshape) for a, _ in slots)
    )
    aligned, displaced = without(mixed_output_axes), frozenset(keys) - without(displaced_axes)
    return Cut(D, df, inputs, program, aligned, displaced, folds, tuple(values))


def _in_sub_steps(key: Any, fronts: Mapping[int, int]) -> bool:
    return bool(fronts.get(getattr(key, "key", -1)))


def _y_shapes(part: Slice) -> dict[int, tuple[int, ...]]:
    """The shape of every operation's output, of one sub-step."""
    return {k: v.aval.shape[part.fronts[k] :] for k, v in part.ys.items()}


def _folds(eqns, part, varshape, slots, inexact, y_labels) -> dict[int, Fold]:
    """Outputs of another shape of which every entry acts on one position: labels of F's reverse pass tell."""
    y_shapes = _y_shapes(part)

    def is_candidate(k):
        """Whether broadcasting does not say where the entries of an output act."""
        shape = y_shapes[k]
        if shape == varshape or not math.prod(shape) or not shape or not varshape:
            return False
        return math.prod(shape) == math.prod(varshape) or any(
            k in labels and displaced_axes(labels[k], shape, varshape) for labels in y_labels
        )

    folds = {}
    for k, var in part.ys.items():
        if not is_candidate(k):
            continue
        label: Label | None = None
        for a in sorted({a for a, _ in slots if inexact[a]}):

            def reverse(seed, y, olds, others, externals, a=a, k=k):
                def new_value(y):
                    return evaluate_slice(eqns, part, olds, others | {k: y}, externals)[a]

                return jax.vjp(new_value, y)[1](seed)[0]

            of = lambda v: jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)  # noqa: E731
            others = {j: of(v) for j, v in part.ys.items() if j != k}
            values = of(var), [of(v) for v in part.olds], others, [of(v) for v in part.externals]
            closed = jax.make_jaxpr(reverse)(of(part.news[a]), *values)
            jaxpr = open_jaxpr(closed)
            known = {v: c for v, c in zip(jaxpr.constvars, consts_of(closed)) if not is_tracer(c)}
            env = {jaxpr.invars[0]: {("new", 0): own_label(part.news[a].aval.shape, len(varshape))}}
            propagate(jaxpr.eqns, env, no_cut, known)
            found = env.get(jaxpr.outvars[0], {}).get(("new", 0))
            label = found if label is None else label if found is None else tuple(map(combine, label, found))
        if label is None or any(np.any(ids == MANY) for ids in label[1:]):
            continue
        index = tuple(np.where(ids == NONE, 0, ids) for ids in label[1:])
        if part.fronts[k]:
            if any(np.any(ids != ids[:1]) for ids in index):
                continue
            index = tuple(ids[0] for ids in index)
        folds[k] = Fold(index, _tiles(index, y_shapes[k], varshape), _in_order(index, varshape))
    return folds


def _in_order(index, varshape) -> tuple[int, ...] | None:
    """The group's shape if the entries are its positions one after the other."""
    flat = np.ravel_multi_index(index, varshape).ravel()
    return varshape if np.array_equal(flat, np.arange(math.prod(varshape))) else None


def _tiles(index, y_shape, varshape) -> int | None:
    """How many equal slices of the last axis the entries are, if they are."""
    if y_shape[:-1] != varshape[:-1] or y_shape[-1] % varshape[-1]:
        return None
    number = y_shape[-1] // varshape[-1]
    own = own_label(varshape, len(varshape))[1:]
    same = all(np.array_equal(i, np.concatenate([o] * number, -1)) for i, o in zip(index, own))
    return number if same else None


def _component(cotangent, c):
    """Of one hidden variable; ``None`` for a state that has no derivative."""
    if cotangent.dtype == jax.dtypes.float0:
        return None
    return cotangent if c is None else cotangent[..., c]


class _Row(NamedTuple):
    D: list[Any]
    df: dict[int, Any]


def _cotangents(new, pull, component, slots, keys):
    """Seed over positions -> cotangents of every old hidden variable and every y."""

    def of(seed):
        full = seed if component is None else jnp.zeros_like(new).at[..., component].set(seed)
        old_bar, y_bar = pull(full)
        return [_component(old_bar[b], c) for b, c in slots], dict(zip(keys, y_bar))

    return of


def _along(cotangents, key, varshape, new, y):
    """The derivative of every position by the entry of an output that it shares with others: forward, in one pass.

    Forward is the transpose of the reverse pass, as some functions have a reverse rule alone. ``None`` where that is a
    loop of unknown length, which has no transpose.
    """
    try:
        _, forward = jax.vjp(lambda seed: cotangents(seed)[1][key], jnp.zeros(varshape, new.dtype))
        one = jnp.ones_like(y)
        # What comes back for a complex entry is the real part of its product with the derivative.
        return forward(one)[0] + 1j * forward(-1j * one)[0] if jnp.iscomplexobj(one) else forward(one)[0]
    except ValueError:
        return None


def _by_position(read, dtype, varshape, axes, scope):
    """``read(seed, pick)`` for one position at a time along some axes, stacked."""
    grids = jnp.meshgrid(*(jnp.arange(varshape[k]) for k in axes), indexing="ij")
    picks = jnp.stack([g.ravel() for g in grids], axis=-1)

    def at(pick):
        seed = jnp.ones(varshape, dtype)
        for k, i in zip(axes, pick):
            seed = seed * (jax.lax.broadcasted_iota(jnp.int32, varshape, k) == i).astype(dtype)
        return read(seed, pick)

    # As many positions at once as the cotangents of all of them stay below the ceiling.
    at_once = max(1, scope.ceiling // max(1, math.prod(varshape)))
    return jax.vmap(at)(picks) if len(picks) <= at_once else jax.lax.map(at, picks, batch_size=at_once)


def _row(cotangents, dtype, fronts, y_shapes, varshape, mixed, folds, scope) -> _Row:
    ones = jnp.ones(varshape, dtype)
    if not mixed:
        D, df = cotangents(ones)
        return _Row(D, {k: df[k] for k in y_shapes})

    def read(seed, pick):
        def own_position(cotangent, shape, front=0):
            lead = len(varshape) - len(shape)
            for k, i in sorted(zip(mixed, pick), key=lambda ki: -ki[0]):
                if k >= lead:
                    cotangent = jax.lax.dynamic_index_in_dim(cotangent, i, front + k - lead, keepdims=False)
            return cotangent

        olds, ys = cotangents(seed)
        return [None if o is None else own_position(o, varshape) for o in olds], {
            k: ys[k] if k in folds else own_position(ys[k], y_shapes[k], fronts[k]) for k in y_shapes
        }

    def whole(stacked, front=0):
        sizes = [varshape[k] for k in mixed]
        axes = [front + k for k in mixed]
        return jnp.moveaxis(stacked.reshape(*sizes, *stacked.shape[1:]), range(len(mixed)), axes)

    D, df = _by_position(read, dtype, varshape, mixed, scope)
    found = {k: whole(df[k], fronts[k]) for k in y_shapes}
    if folds:
        # Every entry acts on one position, so that one pass from all positions gives all of them.
        found.update({k: y for k, y in cotangents(ones)[1].items() if k in folds and k in y_shapes})
    return _Row(jax.tree.map(whole, D), found)


def _blocks(cotangents, dtype, varshape, mixed, neighbourhood, scope) -> list[Any]:
    """A row of D between neighbours."""
    if not mixed:
        return jax.tree.map(neighbourhood.each_its_own, cotangents(jnp.ones(varshape, dtype))[0])

    def read(seed, pick):
        number = jnp.ravel_multi_index(tuple(pick), tuple(varshape[k] for k in neighbourhood.axes), mode="clip")
        return jax.tree.map(lambda old: neighbourhood.columns(old, number), cotangents(seed)[0])

    rows = _by_position(read, dtype, varshape, neighbourhood.axes, scope)
    return jax.tree.map(neighbourhood.blocks, rows)


def _constant(value: np.ndarray, whole: bool) -> Entry:
    """The entry of a known value; ``whole``: as an array even if all of it is one number."""
    if not np.any(value):
        return Entry("zero")
    if not whole and value.size and np.all(value == value.flat[0]):
        value = value.flat[0].item()  # a Python number: takes the dtype of what it multiplies
    return Entry("constant", value)
