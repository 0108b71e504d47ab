"""Primitives of our own, with all the rules that JAX asks for, and functions that differ by device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jax.tree_util import PyTreeDef
from jax.typing import DTypeLike

from .._types import PyTree, Shape
from .programs import Primitive
from .values import hashed

__all__ = ["define_bilinear", "define_primitive", "is_on_one_device", "traced_once", "where_compiled"]

Shapes: TypeAlias = tuple[tuple[Shape, DTypeLike], ...]
Flat: TypeAlias = Callable[..., Sequence[jax.Array]]  # of arrays to arrays


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
