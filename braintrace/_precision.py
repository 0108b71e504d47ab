"""The precision of sums over time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ._jax import ClosedJaxpr, JaxprEqn, Literal, bind_equation, call_body, is_jit, is_remat, sub_jaxprs
from ._program import run_program
from ._types import PyTree

__all__ = ["eval_widened", "wide", "widened"]


def wide(dtype: DTypeLike) -> DTypeLike:
    """The dtype of sums over time of values of ``dtype``: in half precision they stop growing, or overflow."""
    narrow = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if narrow else dtype


def widened(tree: PyTree) -> PyTree:
    """Every array in the dtype of sums over time of its values."""
    return jax.tree.map(lambda v: v.astype(wide(v.dtype)) if hasattr(v, "dtype") else v, tree)


def eval_widened(closed: ClosedJaxpr, *args: jax.Array) -> list[jax.Array]:
    """Evaluate a closed jaxpr in the dtype of sums over time, but for loops and functions with their own derivative."""
    return list(map(widened, run_program(closed, args, _widely)))


def _widely(eqn: JaxprEqn, values: list[jax.Array]) -> list[jax.Array]:
    pairs = list(zip(eqn.invars, values))
    values = [widened(jnp.asarray(x, v.aval.dtype) if isinstance(v, Literal) else x) for v, x in pairs]
    if is_jit(eqn) or is_remat(eqn):
        return eval_widened(call_body(eqn), *values)
    if any(True for _ in sub_jaxprs(eqn)):
        return bind_equation(eqn, [x.astype(v.aval.dtype) for x, v in zip(values, eqn.invars)])
    params = {k: wide(p) if isinstance(p, np.dtype) else p for k, p in eqn.params.items()}
    return bind_equation(eqn.replace(params=params), values)
