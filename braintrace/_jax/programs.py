"""Jaxprs and their equations: what they are made of, evaluated and cut down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

import jax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var
from jax.interpreters import partial_eval as pe

from .._types import PyTree, Shape

__all__ = [
    'Atom', 'ClosedJaxpr', 'Jaxpr', 'JaxprEqn', 'Literal', 'Primitive', 'Var', 'at_source', 'bind_equation',
    'call_body', 'close', 'consts_of', 'eval_jaxpr', 'has_custom_rule', 'is_builtin', 'is_jit', 'is_remat',
    'open_jaxpr', 'primitive_body', 'prune', 'reads', 'scan_operands', 'source_line', 'struct', 'structs',
    'sub_jaxprs',
]  # fmt: skip

Atom: TypeAlias = "Var | Literal"  # what an equation reads
JIT_NAMES = frozenset("jit pjit closed_call core_call core_closed_call custom_lin_call eval_jaxpr xla_call".split())
REMAT_NAMES = frozenset({"checkpoint", "remat", "remat2", "remat_call"})


def open_jaxpr(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    """The object that has ``eqns``, ``invars`` and ``outvars`` (the jaxpr itself where JAX has only one class)."""
    return jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr


def consts_of(jaxpr: Jaxpr | ClosedJaxpr) -> tuple[PyTree, ...]:
    return tuple(getattr(jaxpr, "consts", ()))


def struct(variable: Atom) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a variable."""
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def structs(variables: Sequence[Var]) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of variables."""
    return [struct(v) for v in variables]


def eval_jaxpr(jaxpr: ClosedJaxpr, *args: PyTree) -> list[jax.Array]:
    """Evaluate a closed jaxpr."""
    return jax.core.eval_jaxpr(open_jaxpr(jaxpr), consts_of(jaxpr), *args)


def close(jaxpr: Jaxpr, consts: Sequence[PyTree]) -> ClosedJaxpr:
    return ClosedJaxpr(jaxpr, list(consts))


def is_jit(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in JIT_NAMES


def is_remat(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in REMAT_NAMES


def has_custom_rule(eqn: JaxprEqn) -> bool:
    """Whether a call-like equation has a derivative of its own (``custom_jvp``, ``custom_vjp``)."""
    return any(name in eqn.params for name in ("jvp_jaxpr_fun", "jvp_jaxpr_thunk", "bwd"))


def call_body(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The one jaxpr that a call-like equation (jit, custom_jvp, custom_vjp, checkpoint, ...) runs on its operands."""

    def shapes(variables: Sequence[Atom]) -> list[Shape]:
        return [v.aval.shape for v in variables]

    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        body = eqn.params.get(name)
        inner = open_jaxpr(body)
        if not (hasattr(inner, "invars") and hasattr(inner, "eqns")):
            continue
        if shapes(inner.invars) == shapes(eqn.invars) and shapes(inner.outvars) == shapes(eqn.outvars):
            return body
    return None


def scan_operands(eqn: JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are the same in every sub-step, and how many it carries; the others it slices."""
    params = eqn.params
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def is_builtin(eqn: JaxprEqn) -> bool:
    """Whether JAX itself defines what the primitive of an equation computes, and not another library by a function."""
    impl = getattr(eqn.primitive, "impl", None)
    module = getattr(getattr(impl, "func", impl), "__module__", None) or ""
    return module.split(".")[0] in ("", "jax", "jaxlib")


def primitive_body(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The function behind a primitive that is not built in, as a closed jaxpr, if it is made of other primitives."""
    primitive = eqn.primitive
    try:
        body = jax.make_jaxpr(lambda *xs: primitive.impl(*xs, **eqn.params))(*structs(eqn.invars))
    except Exception:  # no JAX function
        return None
    pending = [open_jaxpr(body)]
    while pending:
        for inner in pending.pop().eqns:
            if inner.primitive is primitive:
                return None
            pending.extend(map(open_jaxpr, sub_jaxprs(inner)))
    return body


def sub_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr | ClosedJaxpr]:
    """Every jaxpr found in the parameters of an equation."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (ClosedJaxpr, Jaxpr)):
                yield item


def at_source(eqn: JaxprEqn) -> AbstractContextManager[object]:
    """What is traced within says that it was made where the equation was."""
    info = eqn.source_info
    return source_info_util.user_context(info.traceback, name_stack=info.name_stack)


def bind_equation(eqn: JaxprEqn, values: Sequence[PyTree]) -> list[jax.Array]:
    """Apply one equation to values; always returns a list."""
    primitive, params = eqn.primitive, eqn.params
    functions: Sequence[Callable[..., PyTree]] = ()
    if hasattr(primitive, "get_bind_params"):
        bound = primitive.get_bind_params(params)
        # Either the parameters alone (functions among them), or a pair (functions, parameters).
        functions, params = bound if isinstance(bound, tuple) else ((), bound)
    with at_source(eqn):
        out = primitive.bind(*functions, *values, **params)
    return list(out) if primitive.multiple_results else [out]


def prune(closed: ClosedJaxpr, used_outputs: Sequence[bool] | None = None) -> ClosedJaxpr:
    """The closed jaxpr, still with all of its inputs, without the outputs not asked for and what only they need."""
    jaxpr = open_jaxpr(closed)
    used = [True] * len(jaxpr.outvars) if used_outputs is None else list(used_outputs)
    return close(pe.dce_jaxpr(jaxpr, used, instantiate=True)[0], consts_of(closed))


def reads(closed: ClosedJaxpr, used_outputs: Sequence[bool]) -> list[bool]:
    """Which inputs the outputs asked for need."""
    return list(pe.dce_jaxpr(open_jaxpr(closed), list(used_outputs), instantiate=False)[1])


def source_line(eqn: JaxprEqn) -> str:
    """``file:line (function)`` of the user's code that made the equation, or an empty string."""
    frames = getattr(getattr(eqn.source_info, "traceback", None), "frames", ())
    for frame in frames:
        name = frame.file_name
        if not any(part in name for part in ("site-packages", "braintrace/_", "<frozen", "/lib/python")):
            return f"{name}:{frame.line_num} ({frame.function_name})"
    return ""
