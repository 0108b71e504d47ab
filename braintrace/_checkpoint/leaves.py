"""Leaves of pytrees as arrays, with what is to be known beside them: kinds, dtypes and units."""

from __future__ import annotations

from typing import Any, TypeAlias

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .._engines.pieces import is_pieces, joined
from .._jax import is_tracer, placed
from .._types import PyTree

__all__ = [
    "SCALARS", "Array", "Json", "decoded", "encoded", "for_numpy", "is_key", "is_leaf", "is_quantity", "is_state",
    "is_whole", "with_unit",
]  # fmt: skip

_BASE_UNITS = ("m", "kg", "s", "A", "K", "mol", "cd")


Array: TypeAlias = jax.Array | np.ndarray
Json: TypeAlias = dict[str, Any]  # an object of a JSON text; that of a leaf has its kind, shape, dtype and unit

SCALARS = {"bool": bool, "int": int, "float": float, "complex": complex}


def is_quantity(x: object) -> bool:
    return isinstance(x, u.Quantity)


def is_whole(x: object) -> bool:
    return is_quantity(x) or is_pieces(x)


def is_state(x: object) -> bool:
    return isinstance(x, brainstate.State)


def is_leaf(x: object) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic, bool, int, float, complex, str))


def is_key(x: object) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def encoded(name: str, leaf: PyTree) -> tuple[Array, Json]:
    """A leaf as an array, and what is to be known beside it."""
    if is_pieces(leaf):
        return encoded(name, joined(leaf))
    if is_quantity(leaf):
        array, record = encoded(name, leaf.mantissa)
        return array, {**record, "unit": _unit_record(leaf.unit)}
    if is_tracer(leaf):
        raise ValueError(f"{name} has no value within jit, grad or vmap. Save and load outside of them.")
    if is_key(leaf):
        record = {"kind": "jax", "shape": list(leaf.shape), "dtype": f"key<{jax.random.key_impl(leaf)}>"}
        return jax.random.key_data(leaf), record
    if isinstance(leaf, jax.Array):
        record = {"kind": "jax", "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        return leaf, {**record, "weak_type": True} if leaf.weak_type else record
    if isinstance(leaf, str):
        array = np.frombuffer(leaf.encode(), np.uint8)
        return array, {"kind": "str", "shape": list(array.shape), "dtype": "uint8"}
    if is_leaf(leaf):
        array = np.array(leaf)
        if array.dtype != object:
            kind = type(leaf).__name__ if type(leaf) in SCALARS.values() else "numpy"
            return array, {"kind": kind, "shape": list(array.shape), "dtype": str(array.dtype)}
    raise TypeError(
        f"{name} is {leaf!r} of type {type(leaf).__name__}, which is no array, number (of 64 bits) or string. Leave it "
        "out, or turn it into these."
    )


def for_numpy(array: Array) -> np.ndarray:
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.isbuiltin == 2 else array


def decoded(array: Array, record: Json, like: PyTree = None) -> PyTree:
    """The leaf that was saved, without its unit; ``like`` is the one that it replaces."""
    kind, dtype = record["kind"], record["dtype"]
    if kind == "str":
        return np.asarray(array).tobytes().decode()
    if kind in SCALARS:
        return SCALARS[kind](np.asarray(array).item())
    is_key = dtype.startswith("key<")
    if not is_key:
        own = jnp.dtype(dtype)
        if array.dtype != own and own.isbuiltin == 2:
            array = np.asarray(array).view(own)
        if kind == "numpy" or jax.dtypes.canonicalize_dtype(own) != own:
            return np.array(array)
    value = array if isinstance(array, jax.Array) else jnp.array(array)
    if is_key:
        value = jax.random.wrap_key_data(value, impl=dtype[4:-1])
    if record.get("weak_type"):
        value = jnp.broadcast_to(jnp.asarray(_zero(value.dtype)), value.shape).at[...].set(value)
    if isinstance(like, jax.Array) and like.committed:
        value = placed(value, like.sharding)
    return value


def _zero(dtype: DTypeLike) -> bool | int | float | complex:
    """Of the Python type that makes a weak array of this dtype."""
    return np.zeros((), dtype).item()


def _unit_record(unit: u.Unit) -> Json:
    powers = {base: float(unit.dim.get_dimension(base)) for base in _BASE_UNITS}
    scales = {name: float(getattr(unit, name)) for name in ("scale", "base", "factor")}
    return {"name": str(unit), "dimensions": {k: p for k, p in powers.items() if p}, **scales}


def _unit(record: Json) -> u.Unit:
    dim = u.get_or_create_dimension([record["dimensions"].get(k, 0) for k in _BASE_UNITS])
    scales = {name: record[name] for name in ("scale", "base", "factor")}
    return u.Unit(dim, name=record["name"], dispname=record["name"], **scales)


def with_unit(value: PyTree, record: Json) -> PyTree:
    return u.Quantity(value, unit=_unit(record["unit"])) if "unit" in record else value
