"""Operation and parameter objects of older versions, in terms of today's functions.

An operation object holds the options of a call, a parameter object holds a value beside its operation.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Sequence

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp

from .._jax import JaxprEqn, bind_equation, call_body, is_jit
from .._ops import conv, element_wise, lora_matmul, matmul, pattern_of, sparse_matmul
from .._ops.primitive import ETPPrimitive, Static
from .._program import run_program
from .._types import PyTree

REPLACEMENTS = {
    "MatMulOp": "braintrace.matmul",
    "ElemWiseOp": "braintrace.element_wise",
    "ConvOp": "braintrace.conv",
    "SpMatMulOp": "braintrace.sparse_matmul",
    "LoraOp": "braintrace.lora_matmul",
    "ETraceOp": "braintrace.register_primitive",
    "ETraceParam": "brainstate.ParamState with an operation such as braintrace.matmul",
    "ElemWiseParam": "brainstate.ParamState with braintrace.element_wise",
    "NonTempParam": "brainstate.ParamState with plain JAX operations",
    "FakeETraceParam": "a plain array with plain JAX operations",
    "FakeElemWiseParam": "a plain array with plain JAX operations",
}


def forward(name: str) -> type:
    """The object that ``braintrace.<name>`` stands for, with a warning that names its replacement."""
    warnings.warn(f"braintrace.{name} is deprecated, use {REPLACEMENTS[name]}.", DeprecationWarning, stacklevel=3)
    return globals()[name]


def _identity(x: PyTree) -> PyTree:
    return x


def _unmarked(function: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """The value of ``function(*args)`` with every marked operation replaced by plain JAX."""
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    values = run_program(closed, jax.tree.leaves(args), _unmarked_rule)
    return jax.tree.unflatten(jax.tree.structure(out), values)


def _unmarked_rule(eqn: JaxprEqn, values: list[jax.Array]) -> Sequence[jax.Array]:
    body = call_body(eqn) if is_jit(eqn) else None
    if isinstance(eqn.primitive, ETPPrimitive):
        return eqn.primitive.outputs(values, eqn.params)
    return bind_equation(eqn, values) if body is None else run_program(body, values, _unmarked_rule)


def _checked(op: str, weight: object, *keys: str) -> dict[str, PyTree]:
    if not isinstance(weight, dict):
        raise TypeError(f"{op} takes its weight as a dict with {' and '.join(map(repr, keys))}, got {type(weight)}.")
    missing = [k for k in keys if k not in weight]
    if missing:
        raise ValueError(f"{op} needs the key {missing[0]!r} in its weight, which has {sorted(weight)}.")
    return weight


class ETraceOp:
    """An operation with its options; a subclass gives :meth:`xw_to_y`.

    Examples
    --------
    >>> import braintrace._legacy.operations as old, jax.numpy as jnp
    >>> class Scale(old.ETraceOp):
    ...     def xw_to_y(self, x, w):
    ...         return x * w
    >>> Scale().xy_to_dw(jnp.array([2.0]), jnp.ones(1), jnp.array([5.0]))
    Array([2.], dtype=float32)
    """

    def __init__(self, is_diagonal: bool = False, name: str | None = None):
        self.is_diagonal, self.name = is_diagonal, name

    def __call__(self, x: PyTree, w: PyTree) -> PyTree:
        """The marked value."""
        return self.xw_to_y(x, w)

    def xw_to_y(self, x: PyTree, w: PyTree) -> PyTree:
        """The marked value."""
        raise NotImplementedError(f"{type(self).__name__} must define xw_to_y(x, weight).")

    def raw_xw_to_y(self, x: PyTree, w: PyTree) -> PyTree:
        """The same value by plain JAX."""
        return _unmarked(self.xw_to_y, x, w)

    def xy_to_dw(self, x: PyTree, cot: PyTree, w: PyTree) -> PyTree:
        """The gradient of the weight for a cotangent of the value."""
        return jax.vjp(lambda weight: self.raw_xw_to_y(x, weight), w)[1](cot)[0]

    def dt_to_t(self, cot: PyTree, trace: PyTree) -> PyTree:
        """A trace times the cotangent of the output position of each entry."""
        raise NotImplementedError(f"{type(self).__name__} must define dt_to_t(cotangent, trace).")


class MatMulOp(ETraceOp):
    """:func:`braintrace.matmul` of a weight ``{'weight'[, 'bias']}``, behind a mask and a function."""

    def __init__(
        self,
        weight_mask: PyTree = None,
        weight_fn: Callable[..., PyTree] = _identity,
        apply_weight_fn_before_mask: bool = False,
    ):
        super().__init__()
        if weight_mask is not None and not (hasattr(weight_mask, "shape") and hasattr(weight_mask, "dtype")):
            raise TypeError(f"MatMulOp: weight_mask must be an array, got {type(weight_mask).__name__}.")
        self.weight_mask, self.weight_fn = weight_mask, weight_fn
        self.apply_weight_fn_before_mask = apply_weight_fn_before_mask

    def xw_to_y(self, x: PyTree, w: PyTree) -> PyTree:
        weight = _checked("MatMulOp", w, "weight")["weight"]
        if self.apply_weight_fn_before_mask:
            weight = self._masked(self.weight_fn(weight))
        else:
            weight = self.weight_fn(self._masked(weight))
        return matmul(x, weight, w.get("bias"))

    def _masked(self, weight: PyTree) -> PyTree:
        return weight if self.weight_mask is None else weight * self.weight_mask

    def dt_to_t(self, cot: PyTree, trace: PyTree) -> PyTree:
        return {k: trace[k] * (jnp.expand_dims(cot, -2) if k == "weight" else cot) for k in trace}


class ElemWiseOp(ETraceOp):
    """:func:`braintrace.element_wise` with a function; called with the weight alone."""

    def __init__(self, fn: Callable[..., PyTree] = _identity):
        super().__init__(is_diagonal=True)
        self.fn = fn

    def __call__(self, *args: PyTree) -> PyTree:
        """The marked value of the last argument."""
        return self.xw_to_y(None, args[-1])

    def xw_to_y(self, x: PyTree, w: PyTree) -> PyTree:
        del x
        return element_wise(w, weight_fn=self.fn)

    def dt_to_t(self, cot: PyTree, trace: PyTree) -> PyTree:
        return jax.tree.map(lambda e: e * cot, trace)


class ConvOp(ETraceOp):
    """:func:`braintrace.conv` of a weight ``{'weight'[, 'bias']}``, behind a mask and a function."""

    def __init__(
        self,
        xinfo: object,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        dimension_numbers: jax.lax.ConvDimensionNumbers | tuple[str, str, str] | None = None,
        weight_mask: PyTree = None,
        weight_fn: Callable[..., PyTree] = _identity,
    ):
        super().__init__()
        self.xinfo, self.weight_mask, self.weight_fn = xinfo, weight_mask, weight_fn
        self._geometry: dict[str, Static] = dict(
            strides=window_strides,
            padding=padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            dimension_numbers=dimension_numbers,
        )

    def xw_to_y(self, x: PyTree, w: PyTree) -> PyTree:
        weight = _checked("ConvOp", w, "weight")["weight"]
        weight = self.weight_fn(weight if self.weight_mask is None else weight * self.weight_mask)
        return conv(x, weight, w.get("bias"), **self._geometry)


class SpMatMulOp(ETraceOp):
    """:func:`braintrace.sparse_matmul` of a weight ``{'weight'[, 'bias']}``, behind a function."""

    def __init__(self, sparse_mat: PyTree, weight_fn: Callable[..., PyTree] = _identity):
        super().__init__()
        if not isinstance(sparse_mat, u.sparse.SparseMatrix):
            raise TypeError(
                "SpMatMulOp: sparse_mat must be a brainunit.sparse.SparseMatrix, such as a brainevent.CSR, got "
                f"{type(sparse_mat).__name__}."
            )
        self.sparse_mat, self.weight_fn = sparse_mat, weight_fn
        self._pattern = pattern_of(sparse_mat)

    def xw_to_y(self, x: PyTree, w: PyTree) -> PyTree:
        weight = self.weight_fn(_checked("SpMatMulOp", w, "weight")["weight"])
        return sparse_matmul(x, weight, sparse_mat=self._pattern, bias=w.get("bias"))


class LoraOp(ETraceOp):
    """:func:`braintrace.lora_matmul` of a weight ``{'B', 'A'[, 'bias']}``."""

    def __init__(self, alpha: float | None = None):
        super().__init__()
        self.alpha = alpha

    def xw_to_y(self, x: PyTree, w: PyTree) -> PyTree:
        _checked("LoraOp", w, "B", "A")
        return lora_matmul(x, w["B"], w["A"], alpha=1.0 if self.alpha is None else self.alpha, bias=w.get("bias"))


class ETraceGrad(enum.Enum):
    """Kinds of gradient that older versions told apart; without effect."""

    full = "full"
    approx = "approx"
    adaptive = "adaptive"


def _operation(owner: str, op: object) -> ETraceOp:
    if not isinstance(op, ETraceOp):
        raise TypeError(f"{owner}: op must be an operation object such as MatMulOp(), got {type(op).__name__}.")
    return op


def _element_wise_op(op: Callable[..., PyTree]) -> ElemWiseOp:
    return op if isinstance(op, ElemWiseOp) else ElemWiseOp(op)


class ETraceParam(brainstate.ParamState):
    """A parameter with the operation that it is used by."""

    def __init__(self, weight: PyTree, op: ETraceOp, grad: str | None = None, name: str | None = None):
        super().__init__(weight, name=name)
        self.op = _operation("ETraceParam", op)
        self.gradient = ETraceGrad(grad or "adaptive")
        self.is_etrace = True

    def execute(self, x: PyTree) -> PyTree:
        """The marked value for an input."""
        return self.op(x, self.value)


class ElemWiseParam(ETraceParam):
    """A parameter that is used entry by entry."""

    def __init__(self, weight: PyTree, op: Callable[..., PyTree] = _identity, name: str | None = None):
        super().__init__(weight, _element_wise_op(op), name=name)

    def execute(self) -> PyTree:  # type: ignore[override]
        """The marked value."""
        return self.op(None, self.value)


def _plain(op: Callable[..., PyTree], x: PyTree, value: PyTree) -> PyTree:
    return op.raw_xw_to_y(x, value) if isinstance(op, ETraceOp) else op(x, value)


class NonTempParam(brainstate.ParamState):
    """A parameter whose operation is not marked: the current step alone trains it."""

    def __init__(self, value: PyTree, op: Callable[..., PyTree], name: str | None = None, **ignored: object):
        del ignored
        super().__init__(value, name=name)
        self.op = op

    def execute(self, x: PyTree) -> PyTree:
        """The value for an input, by plain JAX."""
        return _plain(self.op, x, self.value)


class FakeETraceParam:
    """A constant that is used like a parameter."""

    def __init__(self, value: PyTree, op: Callable[..., PyTree]):
        self.value, self.op = value, op

    def execute(self, x: PyTree) -> PyTree:
        """The value for an input, by plain JAX."""
        return _plain(self.op, x, self.value)


class FakeElemWiseParam:
    """A constant that is used like a parameter, entry by entry."""

    def __init__(self, weight: PyTree, op: Callable[..., PyTree] = _identity, name: str | None = None):
        self.value, self.op, self.name = weight, _element_wise_op(op), name

    def execute(self) -> PyTree:
        """The value, by plain JAX."""
        return self.op.raw_xw_to_y(None, self.value)
