"""Values and the traces that they are part of: where they were made, how they meet, what is a constant of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

import brainstate
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jax.typing import DTypeLike

from .._types import PyTree
from .programs import JaxprEqn, bind_equation

__all__ = [
    'any_dtype', 'any_rank', 'hashed', 'in_its_trace', 'is_outside', 'is_traced_within', 'is_tracer', 'placed',
    'refuses', 'runs_on_cpu', 'trace_context', 'with_constants', 'zeros',
]  # fmt: skip

P = ParamSpec("P")
T = TypeVar("T")


def any_rank(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, which broadcasts between arrays of different ranks whatever ``jax_numpy_rank_promotion`` says."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return run


def any_dtype(function: Callable[P, T]) -> Callable[P, T]:
    """:func:`any_rank`, and arrays of different dtypes meet whatever ``jax_numpy_dtype_promotion`` says.

    For the algebra of traces, which may be stored in fewer bits than they are summed in.
    """

    @functools.wraps(function)
    @any_rank
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run


def is_tracer(x: object) -> bool:
    return isinstance(x, jax.core.Tracer)


def zeros(shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
    """Zeros that no kernel is compiled for; where a program is being traced, of that program."""
    value = jax.device_put(np.zeros(shape, dtype))
    return jnp.zeros(shape, dtype) if is_tracer(value) else value


def runs_on_cpu() -> bool:
    """Whether arrays are made on a CPU, where nothing else is asked for."""
    return jax.default_backend() == "cpu"


def placed(x: jax.Array, sharding: Sharding) -> jax.Array:
    """``x`` laid out; other processes with a part of it have to hold an equal array (``AssertionError``)."""
    if sharding.is_fully_addressable or not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(placed(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    # Of what device_put makes here, JAX cannot give the parts.
    whole = np.asarray(x)
    multihost_utils.assert_equal(whole)
    return jax.make_array_from_callback(x.shape, sharding, lambda part: whole[part])


def refuses(message: str) -> Callable[[T], T]:
    """An identity that cannot be differentiated, and says why."""

    @jax.custom_jvp
    def identity(x: T) -> T:
        return x

    @identity.defjvp
    def refuse(primals: PyTree, tangents: PyTree) -> NoReturn:
        raise NotImplementedError(message)

    return identity


def trace_context() -> object:
    """An object equal to another one if both were made directly under the same transformation."""
    home = jax.extend.core if hasattr(jax.extend.core, "get_opaque_trace_state") else jax.core
    return home.get_opaque_trace_state(convention="nnx")


_OUTSIDE = trace_context()


def is_outside() -> bool:
    """Whether no transformation is at work."""
    return trace_context() == _OUTSIDE


def is_traced_within() -> bool:
    """Whether brainstate traces a loop, a branch, a jit, ... inside of the innermost function that is differentiated.

    Its arguments are then all that is seen of values from outside, and one trace may serve several calls. Maps are no
    such trace: their values know what they are made of.
    """
    context = getattr(brainstate._state, "TRACE_CONTEXT", None)
    names = [str(trace.name) for trace in getattr(context, "state_stack", ())]
    inner = names[max((i + 1 for i, name in enumerate(names) if name == "gradient"), default=0) :]
    return any(not name.startswith(("vmap", "state_map")) for name in inner)


def in_its_trace(x: object) -> tuple[Any, bool]:
    """What a mapped or a differentiated value stands for, in the trace that knows what it is made of, if there is one.

    And whether JAX itself differentiates it, which no loop of brainstate does.
    """
    differentiated = False
    while is_tracer(x) and not hasattr(x, "parent"):
        differentiated |= not hasattr(x, "val")
        x = getattr(x, "val", getattr(x, "primal", None))
    return x, differentiated


def with_constants(x: jax.Array, end: Any, is_constant: Callable[[Any, JaxprEqn | None], bool]) -> PyTree:
    """``x`` computed again in its trace, where some values are constants of differentiation; or ``x`` itself.

    ``end`` is what it stands for, see :func:`in_its_trace`; where this is another value, it is a constant as a whole.
    """
    found: dict[int, PyTree] = {}
    pending = [end]
    while pending:
        value = pending[-1]
        eqn = getattr(value, "parent", None)
        constant = is_tracer(value) and is_constant(value, eqn)
        inputs = () if eqn is None or constant or eqn.primitive.name == "stop_gradient" else eqn.in_tracers
        if missing := [v for v in inputs if id(v) not in found]:
            pending.extend(missing)
            continue
        pending.pop()
        new = [found[id(v)] for v in inputs]
        if constant or any(a is not b for a, b in zip(new, inputs)):
            found[id(value)] = None if end is not x else _constant(value) if constant else _again(value, eqn, new)
        else:
            found[id(value)] = value
    new = found[id(end)]
    return x if new is end else new if end is x else _constant(x)


def _constant(x: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def _again(value: PyTree, eqn: JaxprEqn, inputs: Sequence[PyTree]) -> PyTree:
    number = [var is getattr(value, "val", None) for var in eqn.outvars]
    if eqn.effects or not any(number):  # what has effects shall have them once
        return _constant(value)
    return bind_equation(eqn, inputs)[number.index(True)]


def hashed(*items: object) -> tuple[Hashable, ...] | None:
    """The items as a key, or ``None`` where one of them cannot be part of a key."""
    try:
        hash(items)
    except TypeError:
        return None
    return items
