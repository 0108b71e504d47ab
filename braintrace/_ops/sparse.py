"""Products with a sparse matrix whose stored entries are trained.

Only the places of the stored entries are taken from the matrix; the product is plain JAX, so that no kernel compiler
is needed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Hashable
from typing import TypeAlias

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .._jax import any_rank
from .._types import PyTree, Shape
from .linear import Hook, apply_hook, array_operand, one_per_output, rank_of, weight_and_bias, with_units
from .primitive import Anchors, Aval, Avals, ETPPrimitive, Gradients, Params, Unshared, Weights, anchored

__all__ = ["Pattern", "etp_sp_mm_p", "etp_sp_mv_p", "pattern_of", "sparse_matmul", "sparse_product"]

Matrix: TypeAlias = PyTree  # a sparse one, of brainevent, brainunit or jax.experimental.sparse
Places: TypeAlias = np.ndarray | jax.Array  # integers

# From this density on a dense product is faster on a CPU, with a batch by far.
DENSE_FROM = 0.02

# More terms than this do not stay in the cache of a CPU: the samples of a batch are then multiplied one by one.
UNROLLED = 5  # samples of which XLA then adds up the cotangents of the matrix in one pass
TERMS_AT_ONCE = 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    """Where the stored entries of a matrix are: a hashable static parameter, equal where the contents are equal.

    Attributes
    ----------
    rows, cols : integer arrays, shape ``(n,)``
        Places, in the order of the data.
    entries : integer array, shape ``(n,)``
        Which entry of the flattened data is there.
    shape, data_shape : tuple of int
        Of the matrix, and of its data.
    """

    rows: np.ndarray
    cols: np.ndarray
    entries: np.ndarray
    shape: tuple[int, int]
    data_shape: Shape

    @functools.cached_property
    def _content(self) -> tuple[Hashable, ...]:
        digests = (hashlib.sha256(a.tobytes()).digest() for a in (self.rows, self.cols, self.entries))
        return (self.shape, self.data_shape, *digests)

    def __hash__(self) -> int:
        return hash(self._content)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Pattern) and self._content == other._content)

    def __repr__(self) -> str:
        return f"Pattern(shape={self.shape}, entries={len(self.entries)})"

    @functools.cached_property
    def shared(self) -> bool:
        """Whether one entry of the data is in several places."""
        return len(np.unique(self.entries)) < len(self.entries)

    @functools.cached_property
    def _in_order(self) -> bool:
        return np.array_equal(self.entries, np.arange(math.prod(self.data_shape)))

    @functools.cached_property
    def parts(self) -> int:
        """Into how many parts data and columns are cut alike: each part of the data lies in its part of the columns."""
        size, columns = math.prod(self.data_shape), self.shape[1]
        few = slice(None, None, 1 + len(self.cols) // 1000)  # these tell at once of most numbers that it is not them
        for n in range(0 if self.shared else math.gcd(size, columns), 1, -1):
            if size % n == columns % n == 0 and all(
                np.array_equal(self.entries[some] // (size // n), self.cols[some] // (columns // n))
                for some in (few, slice(None))
            ):
                return n
        return 1

    @functools.cached_property
    def _places_in_parts(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Rows and columns ``(parts, entries)`` in each part, and how many columns: one more if some are no places."""
        size, width = math.prod(self.data_shape), self.shape[1] // self.parts
        rows, cols = np.zeros(size, np.int32), np.full(size, width, np.int32)
        rows[self.entries], cols[self.entries] = self.rows, self.cols % width
        padded = int(len(self.entries) < size)
        return rows.reshape(self.parts, -1), cols.reshape(self.parts, -1), width + padded

    def stored(self, data: jax.Array) -> jax.Array:
        """The values of the places; where they are in parts, of all entries."""
        data = data.reshape(-1)
        return data if self._in_order or self.parts > 1 else _pick(data, self.entries)

    def product(self, x: jax.Array, stored: jax.Array) -> jax.Array:
        """``x @ matrix`` for the values ``stored``; any leading axes of ``x``."""
        if self.parts == 1:
            return _product(x, stored, self.rows, self.cols, self.shape)
        # Part by part, so that the parts can lie on different devices and each has all that it needs but x.
        rows, cols, width = self._places_in_parts
        one = lambda data, rows, cols: _product(x, data, rows, cols, (self.shape[0], width))  # noqa: E731
        y = jax.vmap(one, out_axes=-2)(stored.reshape(rows.shape), rows, cols)
        return y[..., : self.shape[1] // self.parts].reshape(*x.shape[:-1], self.shape[1])


def _product(x: jax.Array, stored: jax.Array, rows: Places, cols: Places, shape: tuple[int, int]) -> jax.Array:
    if len(rows) >= DENSE_FROM * math.prod(shape):
        return x @ _add_up(jnp.zeros(shape, stored.dtype), (rows, cols), stored)
    if x.ndim == 1:
        return _sum(_pick(x, rows) * stored, cols, shape[1])
    samples = x.reshape(-1, x.shape[-1])
    if len(samples) * len(rows) > TERMS_AT_ONCE:
        # Recomputed in reverse mode, which would otherwise keep the terms of every sample.
        one = lambda x: _product(x, stored, rows, cols, shape)  # noqa: E731
        keep_none = jax.checkpoint(one, prevent_cse=False)
        _, y = jax.lax.scan(lambda _, x: (None, keep_none(x)), None, samples, unroll=UNROLLED)
    else:
        y = _sum(_pick(samples.T, rows) * stored[:, None], cols, shape[1]).T
    return y.reshape(*x.shape[:-1], shape[1])


def _sum(terms: jax.Array, cols: Places, columns: int) -> jax.Array:
    """Sum the terms ``(n, ...)`` of each column."""
    total = _add_up(jnp.zeros((columns, *terms.shape[1:]), terms.dtype), cols, terms)
    # Nothing but a border for XLA: it fuses what computes a cotangent into the look-ups of the cotangent, once per
    # entry and not per column. The cotangent of this look-up is a scatter, which it never fuses.
    return _pick(total, np.arange(columns, dtype=np.int32))


# The places are known to be inside; JAX would compute with them at every step, or fold millions of constants.
def _pick(x: jax.Array, places: Places) -> jax.Array:
    return x.at[places].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _add_up(zeros: jax.Array, places: Places | tuple[Places, Places], terms: jax.Array) -> jax.Array:
    return zeros.at[places].add(terms, mode="promise_in_bounds", wrap_negative_indices=False)


def _from_pointers(indices: ArrayLike, pointers: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Minor and major index of every entry of a compressed matrix."""
    pointers = np.asarray(pointers)
    return np.asarray(indices), np.repeat(np.arange(len(pointers) - 1), np.diff(pointers))


def _places(matrix: Matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and entry of the data for every stored place."""
    kind = type(matrix).__name__
    if kind.startswith("JITC"):
        return _generated_places(matrix)
    if kind == "Dense":
        rows, cols = (g.ravel() for g in np.indices(matrix.shape))
    elif hasattr(matrix, "indptr"):
        minor, major = _from_pointers(matrix.indices, matrix.indptr)
        rows, cols = (minor, major) if kind == "CSC" else (major, minor)
    elif hasattr(matrix, "row"):
        rows, cols = np.asarray(matrix.row), np.asarray(matrix.col)
    elif kind == "BCOO":
        rows, cols = np.asarray(matrix.indices).T
    else:  # a fixed number of connections: one row of indices per unit before, or after
        minor = np.asarray(matrix.indices)
        major = np.broadcast_to(np.arange(len(minor))[:, None], minor.shape)
        per_post = kind in ("FixedNumPerPost", "FixedPreNumConn")
        rows, cols = (minor.ravel(), major.ravel()) if per_post else (major.ravel(), minor.ravel())
    size = math.prod(_data_shape(matrix))
    entries = np.arange(len(rows)) if size == len(rows) else np.zeros(len(rows), int)
    return rows, cols, entries


def _generated_places(matrix: Matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kind = type(matrix).__name__
    if isinstance(matrix.data, tuple):
        raise TypeError(
            f"sparse_matmul: the data of a {kind} are {len(matrix.data)} parameters of a distribution, not one trained "
            "array. Pass a matrix of stored entries, such as sparse_mat.tocsr()."
        )
    try:
        ones = matrix.with_data(u.math.ones_like(matrix.data)).todense()
    except Exception as error:
        raise RuntimeError(
            f"sparse_matmul: brainevent could not draw the connections of a {kind} on this machine. Install what its "
            "kernels need (`pip install 'brainevent[cpu]'`), or pass a matrix with stored indices, such as a CSR."
        ) from error
    rows, cols = np.nonzero(np.asarray(u.get_mantissa(ones)))
    return rows, cols, np.zeros(len(rows), int)


def _data_shape(matrix: Matrix) -> Shape:
    return tuple(jnp.shape(u.get_mantissa(matrix.data)))


def is_sparse(matrix: object) -> bool:
    """Whether it is a brainevent representation, a brainunit sparse matrix, or a sparse matrix of JAX."""
    if isinstance(matrix, u.sparse.SparseMatrix):
        return True
    kind = type(matrix)
    return kind.__name__ in ("BCOO", "BCSR") and kind.__module__.startswith("jax.experimental.sparse")


def pattern_of(matrix: Matrix | Pattern) -> Pattern:
    """The places of the stored entries of a sparse matrix.

    Raises
    ------
    TypeError
        If ``matrix`` is no sparse matrix with one array of data.
    ValueError
        If its indices are not known while the program is traced, or it has more than two axes.
    """
    if isinstance(matrix, Pattern):
        return matrix
    if not is_sparse(matrix):
        raise TypeError(
            f"sparse_matmul: sparse_mat must be a brainevent.DataRepresentation (such as brainevent.CSR) or a BCOO or "
            f"BCSR matrix of jax.experimental.sparse, got {type(matrix).__name__}. For a dense array use matmul."
        )
    if len(matrix.shape) != 2 or any(getattr(matrix, n, 0) for n in ("n_batch", "n_dense")):
        raise ValueError(f"sparse_matmul: sparse_mat of shape {tuple(matrix.shape)} must have two sparse axes.")
    try:
        with jax.ensure_compile_time_eval():
            rows, cols, entries = _places(matrix)
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            "sparse_matmul: the indices of sparse_mat are values of a traced program. Make the matrix outside of jit, "
            "and pass its data as the weight."
        ) from error
    inside = (rows < matrix.shape[0]) & (cols < matrix.shape[1])  # JAX fills up with places outside
    rows, cols, entries = (np.ascontiguousarray(a[inside], np.int32) for a in (rows, cols, entries))
    return Pattern(rows, cols, entries, tuple(matrix.shape), _data_shape(matrix))


def columns_in_parts(sparse_mat: Matrix, parts: int) -> u.sparse.COO:
    """The same matrix, with its entries in an order that lets devices have columns of their own.

    The entries of the first columns come first, those of the next ones then, and every part gets as many entries as the
    largest one has, the last of which have a place outside of the matrix, and are zero. Where parameters and hidden
    units are spread over as many devices (:func:`braintrace.shard`), nothing crosses but the input of the product.

    Parameters
    ----------
    sparse_mat : brainevent.DataRepresentation, or another sparse matrix that :func:`sparse_matmul` takes
        Shape ``(in, out)``.
    parts : int
        Number of devices, or a multiple of it.

    Returns
    -------
    brainunit.sparse.COO
        For :func:`sparse_matmul` and ``braintrace.nn.SparseLinear``; its data are the initial values in this order.

    Raises
    ------
    ValueError
        If the number of columns is no multiple of ``parts``, or one value is in several places.

    Examples
    --------
    >>> import brainevent, braintrace, jax.numpy as jnp
    >>> matrix = brainevent.CSR.fromdense(jnp.array([[1.0, 2.0, 0.0, 0.0], [0.0, 3.0, 0.0, 4.0]]))
    >>> halves = braintrace.columns_in_parts(matrix, 2)
    >>> halves.data
    Array([1., 2., 3., 4., 0., 0.], dtype=float32)
    >>> braintrace.sparse_matmul(jnp.ones(2), halves.data, sparse_mat=halves)
    Array([1., 5., 0., 4.], dtype=float32)
    """
    pattern = pattern_of(sparse_mat)
    if parts < 1 or pattern.shape[1] % parts:
        raise ValueError(
            f"columns_in_parts: {pattern.shape[1]} columns cannot be cut into {parts} equal parts. Pass a divisor, or "
            "add columns without entries."
        )
    if pattern.shared:
        raise ValueError(
            "columns_in_parts: one value of sparse_mat is in several places, which would be in several parts. Pass a "
            "matrix with a value for each place, such as sparse_mat.tocsr()."
        )
    part = pattern.cols // (pattern.shape[1] // parts)
    order = np.argsort(part, kind="stable")
    counts = np.bincount(part, minlength=parts)
    most, before = counts.max(), np.cumsum(counts) - counts
    places = part[order] * most + np.arange(len(order)) - before[part[order]]
    rows, cols = (np.full(parts * most, outside, np.int32) for outside in pattern.shape)
    rows[places], cols[places] = pattern.rows[order], pattern.cols[order]
    data, unit = u.split_mantissa_unit(sparse_mat.data)
    data = jnp.zeros(parts * most, data.dtype).at[places].set(data.reshape(-1)[pattern.entries[order]])
    return u.sparse.COO((u.maybe_decimal(data * unit), rows, cols), shape=pattern.shape)


def _stored(pattern: Pattern, weight: jax.Array, hook: Hook) -> jax.Array:
    return pattern.stored(apply_hook(hook, weight))


@any_rank
def _sparse_impl(
    x: jax.Array,
    weight: jax.Array,
    *bias: jax.Array,
    sparse_mat: Pattern,
    has_bias: bool,
    weight_fn: Hook,
    bias_fn: Hook,
) -> jax.Array:
    del has_bias
    y = sparse_mat.product(x, _stored(sparse_mat, weight, weight_fn))
    return y + apply_hook(bias_fn, bias[0]) if bias else y


def _unshare(x_aval: Aval, y_aval: Aval, weight_avals: Avals, params: Params) -> Unshared | None:
    del x_aval, y_aval, weight_avals
    pattern = params["sparse_mat"]
    if not pattern.shared:
        return None

    def expand(weights: Weights) -> Gradients:
        unshared = {"weight": _stored(pattern, weights["weight"], params["weight_fn"])}
        if params["has_bias"]:
            unshared["bias"] = apply_hook(params["bias_fn"], weights["bias"])
        return unshared

    def impl(x: jax.Array, unshared: Weights) -> jax.Array:
        y = pattern.product(x, unshared["weight"])
        return y + unshared["bias"] if params["has_bias"] else y

    return Unshared(expand, impl)


def _anchors(y_aval: Aval, weight_avals: Avals, params: Params) -> Anchors:
    del y_aval
    pattern = params["sparse_mat"]
    anchors: dict[str, tuple[np.ndarray] | None] = dict.fromkeys(weight_avals)
    if pattern.shared:
        anchors["weight"] = (pattern.cols,)
    elif "weight" in anchors:
        column = np.zeros(math.prod(weight_avals["weight"].shape), np.int32)
        column[pattern.entries] = pattern.cols
        anchors["weight"] = (column.reshape(weight_avals["weight"].shape),)
    return anchors


def _stored_pairs(params: Params, size: int) -> np.ndarray:
    pattern = params["sparse_mat"]
    pairs = np.zeros((size, size), bool)
    pairs[pattern.cols, pattern.rows] = True
    return pairs


etp_sp_mm_p = ETPPrimitive("etp_sp_mm", _sparse_impl, batched=True, trainables=weight_and_bias, sample_ndim=1)
etp_sp_mv_p = ETPPrimitive("etp_sp_mv", _sparse_impl, trainables=weight_and_bias, batched_twin=etp_sp_mm_p)
for _p in (etp_sp_mm_p, etp_sp_mv_p):
    _p.register_etp_rules(unshare=_unshare, anchors=_anchors, snap_anchor=anchored, snap_adjacency=_stored_pairs)


def sparse_product(
    x: PyTree, weight: PyTree, pattern: Pattern, bias: PyTree = None, *, weight_fn: Hook = None, bias_fn: Hook = None
) -> PyTree:
    """:func:`sparse_matmul` for an input of any rank; all leading axes are batch axes."""
    array_operand("sparse_matmul", "x", x)
    array_operand("sparse_matmul", "weight", weight)
    size = math.prod(pattern.data_shape)
    if tuple(weight.shape) not in (pattern.data_shape, (size,)):
        raise ValueError(
            f"sparse_matmul: weight has shape {tuple(weight.shape)}, the data of sparse_mat have {pattern.data_shape}. "
            "Pass one weight per stored entry, in the order of the data."
        )
    if rank_of(x) and x.shape[-1] != pattern.shape[0]:
        raise TypeError(
            f"sparse_matmul: x of shape {tuple(x.shape)} cannot be multiplied with a matrix of shape {pattern.shape}: "
            f"{x.shape[-1]} and {pattern.shape[0]} differ."
        )
    if bias is not None:
        bias = one_per_output("sparse_matmul", bias, pattern.shape[1:], bias_fn)
    p = etp_sp_mm_p if rank_of(x) > 1 else etp_sp_mv_p
    static = dict(sparse_mat=pattern, has_bias=bias is not None, weight_fn=weight_fn, bias_fn=bias_fn)
    return with_units("sparse_matmul", lambda *xs: p.bind(*xs, **static), x, {"weight": weight}, bias)


def sparse_matmul(
    x: PyTree,
    weight: PyTree = None,
    *,
    sparse_mat: Matrix | Pattern,
    bias: PyTree = None,
    weight_fn: Hook = None,
    bias_fn: Hook = None,
    weight_data: PyTree = None,
) -> PyTree:
    r"""Marked product with a sparse matrix, :math:`y = x\, S(f(w)) + g(b)`; the stored entries are trained.

    Parameters
    ----------
    x : array or Quantity, shape ``(in,)`` or ``(B, in)``
        The input.
    weight : array or Quantity, shape ``(nnz,)``
        Values of the stored entries, in the order of the data of ``sparse_mat``; the shape of these data is also
        accepted. A matrix with one value for all connections takes that one.
    sparse_mat : brainevent.DataRepresentation, or a BCOO or BCSR matrix of ``jax.experimental.sparse``
        Says where the entries are; its own values are not read. Shape ``(in, out)``.
    bias : array or Quantity, shape ``(out,)``, optional
        Must be convertible to the unit of ``x`` times that of ``weight``.
    weight_fn, bias_fn : callable, optional
        Maps of the raw mantissas, as in :func:`matmul`.
    weight_data : optional
        Another spelling of ``weight``.

    Returns
    -------
    array or Quantity, shape ``(out,)`` or ``(B, out)``
        In the unit of ``x`` times that of ``weight``.

    Raises
    ------
    ValueError
        If ``x`` has a rank other than 1 or 2, the weight has not one value per entry, or the indices of the matrix are
        traced.
    TypeError
        If an operand is no array, ``sparse_mat`` no sparse matrix, the weight is given twice or not at all, or the
        inner dimensions differ.
    RuntimeError
        If ``brainevent`` cannot draw the connections of a just-in-time matrix on this machine.

    Examples
    --------
    >>> import brainevent, braintrace, jax.numpy as jnp
    >>> matrix = brainevent.CSR.fromdense(jnp.array([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]))
    >>> braintrace.sparse_matmul(jnp.ones(2), matrix.data, sparse_mat=matrix)
    Array([3., 1., 2.], dtype=float32)
    """
    if (weight is None) == (weight_data is None):
        raise TypeError("sparse_matmul: pass weight, or its older spelling weight_data, and not both.")
    weight = weight_data if weight is None else weight
    array_operand("sparse_matmul", "x", x)
    if rank_of(x) not in (1, 2):
        raise ValueError(
            f"sparse_matmul: x has shape {tuple(x.shape)}; accepted are (in,) and (B, in). "
            "Flatten further batch axes, or use braintrace.nn.SparseLinear."
        )
    return sparse_product(x, weight, pattern_of(sparse_mat), bias, weight_fn=weight_fn, bias_fn=bias_fn)
