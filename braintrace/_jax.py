"""The one door to JAX internals and versions.

Everything here is decided by capability (``hasattr``, ``isinstance``), never by a version number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, ParamSpec, TypeAlias, TypeVar

import brainstate
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe
from jax.sharding import Sharding
from jax.tree_util import PyTreeDef
from jax.typing import DTypeLike

from ._types import PyTree, Shape

__all__ = [
    'Atom', 'ClosedJaxpr', 'Jaxpr', 'JaxprEqn', 'Literal', 'Primitive', 'Var', 'any_dtype', 'any_rank',
    'at_source', 'bind_equation', 'call_body', 'close', 'consts_of', 'define_bilinear', 'define_primitive',
    'eval_jaxpr', 'has_custom_rule', 'hashed', 'in_its_trace', 'is_builtin', 'is_jit', 'is_on_one_device', 'is_outside',
    'is_remat', 'is_traced_within', 'is_tracer', 'open_jaxpr', 'placed', 'primitive_body', 'prune', 'reads',
    'refuses', 'scan_operands', 'source_line', 'struct', 'structs', 'sub_jaxprs', 'trace_context',
    'where_compiled', 'with_constants', 'zeros',
]  # fmt: skip

P = ParamSpec("P")
T = TypeVar("T")
Atom: TypeAlias = "Var | Literal"  # what an equation reads
Shapes: TypeAlias = tuple[tuple[Shape, DTypeLike], ...]
Flat: TypeAlias = Callable[..., Sequence[jax.Array]]  # of arrays to arrays
JIT_NAMES = frozenset("jit pjit closed_call core_call core_closed_call custom_lin_call eval_jaxpr xla_call".split())
REMAT_NAMES = frozenset({"checkpoint", "remat", "remat2", "remat_call"})


def open_jaxpr(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    """The object that has ``eqns``, ``invars`` and ``outvars`` (the jaxpr itself where JAX has only one class)."""
    return jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr


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


def hashed(*items: object) -> tuple[Hashable, ...] | None:
    """The items as a key, or ``None`` where one of them cannot be part of a key."""
    try:
        hash(items)
    except TypeError:
        return None
    return items


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


def define_primitive(
    primitive: Primitive,
    impl: Callable[..., PyTree],
    batch_rule: Callable[..., tuple[PyTree, PyTree]],
    jvp_rule: Callable[..., tuple[PyTree, PyTree]] | None = None,
) -> None:
    """Give a primitive all its JAX rules, those that are not given derived from ``impl`` (ordinary JAX).

    A ``jvp_rule`` takes primals, and tangents that may be zeros of JAX's own kind, made arrays here.
    """
    primitive.def_impl(impl)

    def abstract_eval(*avals: jax.core.ShapedArray, **params: object) -> PyTree:
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
        out = jax.eval_shape(lambda *xs: impl(*xs, **params), *shapes)
        if isinstance(out, (tuple, list)) != primitive.multiple_results:
            found = f"a {type(out).__name__} of {len(out)}" if isinstance(out, (tuple, list)) else "one array"
            raise TypeError(
                f"The operation {primitive.name!r} returns {found}. An operation with y_outvar_index=0 returns one "
                "array; one with several outputs is registered with the index, at least 1, of the one that is traced."
            )
        return jax.tree.map(lambda s: jax.core.ShapedArray(s.shape, s.dtype), out)

    primitive.def_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, mlir.lower_fun(impl, multiple_results=primitive.multiple_results))

    def jvp(primals: Sequence[jax.Array], tangents: Sequence[PyTree], **params: object) -> tuple[PyTree, PyTree]:
        # Keep the primal marked; the tangent is linear, hence ordinary JAX that transposes by itself.
        out = primitive.bind(*primals, **params)
        active = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

        def of_active(*xs: jax.Array) -> PyTree:
            values = list(primals)
            for i, x in zip(active, xs):
                values[i] = x
            return impl(*values, **params)

        _, out_dot = jax.jvp(of_active, [primals[i] for i in active], [tangents[i] for i in active])
        return out, out_dot

    def given_jvp(primals: Sequence[jax.Array], tangents: Sequence[PyTree], **params: object) -> tuple[PyTree, PyTree]:
        assert jvp_rule is not None
        return jvp_rule(primals, [ad.instantiate_zeros(t) for t in tangents], **params)

    ad.primitive_jvps[primitive] = jvp if jvp_rule is None else given_jvp
    batching.primitive_batchers[primitive] = batch_rule


def define_bilinear(
    primitive: Primitive,
    impl: Callable[..., jax.Array],
    batch_rule: Callable[..., tuple[jax.Array, int | None]],
    transpose_first: Callable[..., jax.Array],
    transpose_others: Callable[..., Sequence[jax.Array | None]],
    on_one_cpu: Callable[..., jax.Array] | None = None,
) -> None:
    """The rules of a primitive that is linear in its first operand, and in all others together.

    The transposes take a cotangent, then the operands, of which those in question are shapes. ``on_one_cpu``
    computes the same where the program is compiled for a single CPU device: there cutting an axis moves nothing.
    """
    define_primitive(primitive, impl, batch_rule)

    def jvp(primals: Sequence[jax.Array], tangents: Sequence[PyTree], **params: object) -> tuple[jax.Array, jax.Array]:
        first, *others = (None if type(t) is ad.Zero else t for t in tangents)
        terms = [] if first is None else [primitive.bind(first, *primals[1:], **params)]
        if any(t is not None for t in others):
            others = [ad.instantiate_zeros(t) for t in tangents[1:]]
            terms.append(primitive.bind(primals[0], *others, **params))
        return primitive.bind(*primals, **params), sum(terms[1:], terms[0])

    def transpose(bar: PyTree, first: PyTree, *others: PyTree, **params: object) -> list[jax.Array | None]:
        shapes = [x.aval if ad.is_undefined_primal(x) else x for x in (first, *others)]
        if type(bar) is ad.Zero:
            return [None] * len(shapes)
        if ad.is_undefined_primal(first):
            return [transpose_first(bar, *shapes, **params), *[None] * len(others)]
        return [None, *transpose_others(bar, *shapes, **params)]

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose

    def lower(ctx: mlir.LoweringRuleContext, *args: PyTree, **params: object) -> PyTree:
        chosen = on_one_cpu if is_on_one_device(ctx) and on_one_cpu is not None else impl
        return mlir.lower_fun(chosen, multiple_results=False)(ctx, *args, **params)

    mlir.register_lowering(primitive, mlir.lower_fun(impl, multiple_results=False))
    if on_one_cpu is not None:
        mlir.register_lowering(primitive, lower, platform="cpu")


def is_on_one_device(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether a program is compiled for one device, or for what one device does of a mesh (under ``shard_map``)."""
    axes: Any = ctx.module_context.axis_context
    if hasattr(axes, "manual_axes"):
        return axes.manual_axes == frozenset(axes.mesh.axis_names)
    return getattr(axes, "num_devices", None) == 1


def where_compiled(
    one_device: Callable[..., PyTree],
    otherwise: Callable[..., PyTree],
    *args: PyTree,
    static: tuple[object, ...] = (),
) -> PyTree:
    """Either function of ``(*static, *args)``, which compute the same: the first where it is compiled for one device.

    What it returns has no derivative. Calls that are alike in functions, ``static`` and shapes are traced and lowered
    once.
    """
    leaves, tree = jax.tree.flatten(args)
    like = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    choose = _choice.__wrapped__ if hashed(static) is None else _choice
    one_device, otherwise, shapes, out = choose(one_device, otherwise, static, tree, like)
    return jax.tree.unflatten(out, _chosen_p.bind(*leaves, one_device=one_device, otherwise=otherwise, shapes=shapes))


def traced_once(function: Callable[..., PyTree], static: tuple[object, ...], *args: PyTree) -> PyTree:
    """``function(*static, *args)``; calls that are alike in ``static`` and shapes are traced once."""
    if hashed(static) is None:
        return function(*static, *args)
    return _inlined(function, len(static))(*static, *args)


@functools.lru_cache
def _inlined(function: Callable[..., PyTree], static: int) -> Callable[..., PyTree]:
    return jax.jit(function, static_argnums=tuple(range(static)), inline=True)


@functools.lru_cache
def _choice(
    one_device: Callable[..., PyTree],
    otherwise: Callable[..., PyTree],
    static: tuple[object, ...],
    tree: PyTreeDef,
    like: Shapes,
) -> tuple[Flat, Flat, Shapes, PyTreeDef]:
    """Both functions of flat arguments, and the shapes and structure of what they return."""
    flat = [lambda *xs, f=f: jax.tree.leaves(f(*static, *tree.unflatten(xs))) for f in (one_device, otherwise)]
    args = tree.unflatten([jax.ShapeDtypeStruct(*s) for s in like])
    result = jax.eval_shape(lambda *args: otherwise(*static, *args), *args)
    leaves, out = jax.tree.flatten(result)
    return *flat, tuple((s.shape, s.dtype) for s in leaves), out


def _batch_chosen(
    args: Sequence[jax.Array], dims: Sequence[int | None], one_device: Flat, otherwise: Flat, shapes: Shapes
) -> tuple[list[jax.Array], list[int]]:
    size = next(x.shape[d] for x, d in zip(args, dims) if d is not None)
    mapped = [jax.vmap(f, dims, axis_size=size) for f in (one_device, otherwise)]
    shapes = tuple(((size, *shape), dtype) for shape, dtype in shapes)
    return _chosen_p.bind(*args, one_device=mapped[0], otherwise=mapped[1], shapes=shapes), [0] * len(shapes)


def _lower_chosen(
    ctx: mlir.LoweringRuleContext, *args: PyTree, one_device: Flat, otherwise: Flat, shapes: Shapes
) -> PyTree:
    chosen = one_device if is_on_one_device(ctx) else otherwise
    return mlir.lower_fun(chosen, multiple_results=True)(ctx, *args)


_chosen_p = Primitive("where_compiled")
_chosen_p.multiple_results = True
define_primitive(_chosen_p, lambda *xs, one_device, otherwise, shapes: otherwise(*xs), _batch_chosen)
_chosen_p.def_abstract_eval(lambda *_, shapes, **__: [jax.core.ShapedArray(*s) for s in shapes])
mlir.register_lowering(_chosen_p, _lower_chosen)
