"""The marked operation: a JAX primitive that knows which of its operands are trained.

An operation is an ordinary JAX function ``impl``; everything else (abstract evaluation, lowering, derivatives,
batching, the weight gradient, the linear representation of its input) is derived from it. A rule registered on
the primitive replaces the derived one, and never changes results.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from .._jax import Primitive, define_primitive, traced_once, where_compiled
from .._types import CompilationWarning, PyTree, first_as_one
from .._warn import warn

__all__ = ["ETPPrimitive", "Unshared", "anchored", "register_primitive"]

Aval: TypeAlias = "jax.ShapeDtypeStruct | jax.core.ShapedArray"  # shape and dtype of a value
Impl = Callable[..., PyTree]  # (operands, static parameters) -> the output, or several
Input: TypeAlias = "jax.Array | None"  # None where an operation has none
Weights = Mapping[str, jax.Array]
Gradients: TypeAlias = dict[str, jax.Array]
Avals = Mapping[str, Aval]  # those of weights
Fixed = Mapping[int, jax.Array]  # operands that are neither the input nor trained, by position
Static: TypeAlias = Any  # a static parameter, such as a number or a function
Params = Mapping[str, Static]
Items = tuple[tuple[str, Static], ...]  # the same, to compare them
Trainables = Callable[[Params], dict[str, int]]  # static parameters -> position of every trained operand
# key -> index into the output positions that gives every weight entry its own, or None
Anchors = Mapping[str, tuple[np.ndarray, ...] | None]


@dataclasses.dataclass(frozen=True)
class Unshared:
    """An operation on one sample, with an entry of every weight for each output position that the weight acts on.

    Attributes
    ----------
    expand : callable
        ``weights -> unshared weights``, differentiable. Beside one array per trained key it may return further keys:
        values of this step that ``impl`` reads as constants.
    impl : callable
        ``(x, unshared weights) -> y`` of one sample, with the value of the operation; its derivative with respect to
        an entry of an unshared weight is zero but at one output position.
    """

    expand: Callable[[Weights], Gradients]
    impl: Callable[[PyTree, Weights], jax.Array]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Overrides of what is derived from the implementation; ``None`` means derived.

    Two of them speak of one sample, that is, of shapes without batch axes.
    ``unshare(x_aval, y_aval, weight_avals, params)`` gives the :class:`Unshared` form, or ``None`` where every weight
    entry acts on one output position already. ``anchors(y_aval, weight_avals, params)`` gives per trained key, in
    the unshared form, the output position of every entry: a tuple of one integer array per axis of y, which
    broadcast to the shape of the weight, or ``None`` where the last axes of the weight are those of y.
    ``input_rows(params)`` says whether the output is a sum over the last axis of the input, along which lie the rows of
    the one weight beside offsets. ``impl_on_cpu`` is the implementation in a form whose derivative by the weights is
    faster there.
    """

    xy_to_dw: Callable[..., Gradients] | None = None
    dt_to_t: Callable[..., Gradients] | None = None
    init_drtrl: Callable[..., Gradients] | None = None
    init_pp: Callable[..., jax.Array] | None = None
    fast_path: object = None
    pp_x_repr: Callable[..., jax.Array] | None = None
    snap_anchor: Callable[..., bool] | None = None
    snap_adjacency: Callable[..., np.ndarray | None] | None = None
    unshare: Callable[..., Unshared | None] | None = None
    anchors: Callable[..., Anchors] | None = None
    input_rows: Callable[..., bool] | None = None
    impl_on_cpu: Impl | None = None


def _only_weight(params: Params) -> dict[str, int]:
    del params
    return {"weight": 1}


def anchored(params: Params) -> bool:
    """The rule ``snap_anchor`` of operations whose every (unshared) weight entry acts on one output position."""
    del params
    return True


class ETPPrimitive(Primitive):
    """A JAX primitive whose trainable operands take part in eligibility traces.

    Made by :func:`register_primitive`; bound like any primitive, ``p.bind(x, weight, **static_params)``.

    Attributes
    ----------
    rules : Rules
        The registered overrides.
    batched : bool
        Whether axis 0 of the input and of the output is a batch axis.
    gradient_enabled : bool
        Whether a walk from another operation's output to a hidden state passes through this one.
    Unshared : type
        What a registered ``unshare`` rule returns, ``Unshared(expand, impl)``.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> p = braintrace.register_primitive('scaled_matmul', lambda x, w, *, gain: gain * (x @ w))
    >>> p.bind(jnp.ones(2), jnp.ones((2, 3)), gain=2.0).shape
    (3,)
    """

    Unshared: ClassVar = Unshared

    def __init__(
        self,
        name: str,
        impl: Impl,
        *,
        batched: bool = False,
        gradient_enabled: bool = False,
        trainables: Trainables | None = None,
        x_index: int | None = 0,
        y_index: int = 0,
        batched_twin: ETPPrimitive | None = None,
        sample_ndim: int | Callable[[Params], int | None] | None = None,
    ):
        super().__init__(name)
        self.impl_fn = impl
        self.batched = batched
        self.gradient_enabled = gradient_enabled
        self.trainables = trainables or _only_weight
        self.x_index = x_index
        self.y_index = y_index
        self.batched_twin = batched_twin
        self.unbatched_twin: ETPPrimitive | None = None
        if batched_twin is not None:
            batched_twin.unbatched_twin = self
        self.sample_ndim = sample_ndim
        self.rules = Rules()
        self.multiple_results = y_index > 0
        define_primitive(self, impl, self._batch)

    # -- what an engine asks ------------------------------------------------------------------------------------

    def outputs(self, operands: Sequence[jax.Array], params: Params, impl: Impl | None = None) -> list[jax.Array]:
        """All outputs for the given operands, as plain JAX."""
        out = (impl or self.impl_fn)(*operands, **params)
        return list(out) if self.multiple_results else [out]

    def x_repr(self, x: jax.Array, weights: Weights) -> jax.Array:
        """The representation of the input that the operation is linear in and that an x-trace filters."""
        if self.rules.pp_x_repr is not None:
            avals = {k: jax.ShapeDtypeStruct(w.shape, w.dtype) for k, w in weights.items()}
            return self.rules.pp_x_repr(x, avals)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return x.astype(jnp.result_type(*(w.dtype for w in weights.values())))

    def weight_vjp(
        self, x: Input, cotangent: jax.Array, weights: Weights, params: Params, fixed: Fixed, bound: bool = False
    ) -> Gradients:
        """Gradient of the trained operands ``weights`` for input (representation) ``x`` and a cotangent of the output.

        ``fixed`` holds the other operands by position. ``bound``: ``x`` is the input itself, which a rule written for
        its representation does not take.
        """
        if self.rules.xy_to_dw is not None and not (bound and self.rules.pp_x_repr is not None):
            slots = self.trainables(params)
            untrained = {k: fixed[i] for k, i in slots.items() if i in fixed}
            gradients = self.rules.xy_to_dw(x, cotangent, {**weights, **untrained}, **params)
            return {k: gradients[k] for k in weights}

        y, pull = jax.vjp(lambda ws: self.apply(x, ws, params, fixed), dict(weights))
        return pull(cotangent.astype(y.dtype))[0]

    def apply(self, x: Input, weights: Weights, params: Params, fixed: Fixed, impl: Impl | None = None) -> jax.Array:
        """The traced output, as plain JAX; ``impl`` takes the place of the implementation."""
        slots = self.trainables(params)
        operands: dict[int, PyTree] = dict(fixed) | {slots[k]: w for k, w in weights.items()}
        if self.x_index is not None:
            operands[self.x_index] = x
        return self.outputs([operands[i] for i in sorted(operands)], params, impl)[self.y_index]

    def lead(self, y_aval: Aval, params: Params | None = None) -> int:
        """Number of batch axes of an output: samples that share the weights."""
        n = self._sample_ndim(params or {})
        return int(self.batched) if n is None else y_aval.ndim - n

    def _sample_ndim(self, params: Params) -> int | None:
        """Number of axes of one sample's output, where axes in front of them may be merged."""
        return self.sample_ndim(params) if callable(self.sample_ndim) else self.sample_ndim

    def lift(self, x: Input, weights: Weights, params: Params, fixed: Fixed, y: Aval) -> jax.Array:
        """An array like the output ``y`` whose cotangent ``c`` reaches the weights as ``weight_vjp(x, c)``.

        Being the operation itself (or the transpose of its own rule), it keeps ``jax.vmap`` and ``jax.grad`` on the
        ordinary product: mapped samples share one weight gradient.
        """
        if self.rules.xy_to_dw is None:
            return self.apply(x, weights, params, fixed)
        held = jax.lax.stop_gradient(dict(weights))
        _, transpose = jax.vjp(lambda c: self.weight_vjp(x, c, held, params, fixed), jnp.zeros(y.shape, y.dtype))
        return transpose(dict(weights))[0]

    def summed_vjp(
        self, x: Input, cotangent: jax.Array, weights: Weights, params: Params, fixed: Fixed, axes: int, bound: bool
    ) -> Gradients:
        """:meth:`weight_vjp` summed over ``axes`` leading axes (time, mapped samples) of all but the weights."""
        if self.rules.pp_x_repr is not None and self.rules.xy_to_dw is not None and not bound:
            return self._summed_own(x, cotangent, weights, params, fixed, axes)

        args = x, cotangent, dict(weights), dict(fixed)
        static = tuple(sorted(params.items()))
        whole = self if self.batched else self.batched_twin
        if whole is None or whole._sample_ndim(params) is None or self.rules.pp_x_repr is not None or fixed:
            return self._summed_apart(static, axes, *args)
        if axes + int(self.batched) == 1:  # time alone
            return traced_once(ETPPrimitive._summed_merged, (self, static, axes), *args)
        # One axis of samples is faster; where one of the axes is spread over devices, merging them gathers it.
        return where_compiled(
            ETPPrimitive._summed_merged, ETPPrimitive._summed_apart, *args, static=(self, static, axes)
        )

    def _summed_apart(
        self, params: Items, axes: int, x: Input, cotangent: jax.Array, weights: Weights, fixed: Fixed
    ) -> Gradients:
        def apply(ws: Weights) -> jax.Array:
            def one(x: Input, fixed: Fixed) -> jax.Array:
                return self.apply(x, ws, dict(params), fixed)

            for _ in range(axes):
                one = jax.vmap(one)
            return one(x, fixed)

        y, pull = jax.vjp(apply, weights)
        return pull(cotangent.astype(y.dtype))[0]

    def _summed_merged(
        self, params: Items, axes: int, x: jax.Array, cotangent: jax.Array, weights: Weights, fixed: Fixed
    ) -> Gradients:
        lead, whole = axes + int(self.batched), self if self.batched else self.batched_twin
        assert whole is not None
        x, cotangent = first_as_one((x, cotangent), lead)

        def gradient(impl: Impl | None, x: jax.Array, cotangent: jax.Array, weights: Weights) -> Gradients:
            y, pull = jax.vjp(lambda ws: whole.apply(x, ws, dict(params), fixed, impl), weights)
            return pull(cotangent.astype(y.dtype))[0]

        of_default = functools.partial(gradient, None)
        if whole.rules.impl_on_cpu is None:
            return of_default(x, cotangent, weights)
        of_cpu = functools.partial(gradient, whole.rules.impl_on_cpu)
        return jax.lax.platform_dependent(x, cotangent, weights, cpu=of_cpu, default=of_default)

    def _summed_own(
        self, x: Input, cotangent: jax.Array, weights: Weights, params: Params, fixed: Fixed, axes: int
    ) -> Gradients:
        whole = self if self.batched else self.batched_twin
        if whole is not None and not fixed:
            axes += int(self.batched)
            x, cotangent = first_as_one((x, cotangent), axes)
            return whole.weight_vjp(x, cotangent, weights, params, {})

        def add(total: Gradients, item: tuple[Input, jax.Array, Fixed]) -> tuple[Gradients, None]:
            return jax.tree.map(jnp.add, total, self.weight_vjp(item[0], item[1], weights, params, item[2])), None

        items = first_as_one((x, cotangent, dict(fixed)), axes)
        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, dict(weights)), items)[0]

    def apply_sample(self, x: Input, weights: Weights, params: Params, fixed: Fixed) -> jax.Array:
        """The output of one sample, whether or not the operation has a batch axis."""
        if not self.batched:
            return self.apply(x, weights, params, fixed)
        if self.unbatched_twin is not None:
            return self.unbatched_twin.apply(x, weights, params, fixed)
        return self.apply(jax.tree.map(lambda v: v[None], x), weights, params, fixed)[0]

    def spread_signal(
        self, signal: jax.Array, trace: Weights, params: Params, anchors: Anchors, lead: int
    ) -> Gradients:
        """Every trace entry times the signal of the output position that it belongs to; ``lead`` batch axes."""
        own = self.rules.dt_to_t
        untrained = dict.fromkeys(self.trainables(params).keys() - trace.keys(), jnp.zeros(()))

        def of_sample(signal: jax.Array, trace: Weights) -> Gradients:
            if own is not None:
                spread = own(signal, {**untrained, **trace}, **params)
                return {k: spread[k] for k in trace}
            return {k: (signal if anchors[k] is None else signal[anchors[k]]) * e for k, e in trace.items()}

        for _ in range(lead):
            of_sample = jax.vmap(of_sample)
        return of_sample(signal, dict(trace))

    # -- registration of overrides ------------------------------------------------------------------------------

    def register_etp_rules(self, **rules: Callable[..., PyTree] | None) -> ETPPrimitive:
        """Replace derived rules; see the fields of :class:`Rules`. Unknown names are a ``TypeError``."""
        self.rules = dataclasses.replace(self.rules, **{k: v for k, v in rules.items() if v is not None})
        return self

    def register_xy_to_dw(self, fn: Callable[..., Gradients]) -> Callable[..., Gradients]:
        """``(x, cotangent, weights, **params) -> {key: gradient}``."""
        self.register_etp_rules(xy_to_dw=fn)
        return fn

    def register_dt_to_t(self, fn: Callable[..., Gradients]) -> Callable[..., Gradients]:
        """``(cotangent, trace, **params) -> trace`` times the cotangent of the output position of each entry."""
        self.register_etp_rules(dt_to_t=fn)
        return fn

    def register_init_drtrl(self, fn: Callable[..., Gradients]) -> Callable[..., Gradients]:
        """``(x_var, y_var, weight_vars, S) -> {key: zeros}``."""
        self.register_etp_rules(init_drtrl=fn)
        return fn

    def register_init_pp(self, fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """``(x_var, y_var, weight_vars, S) -> zeros`` of shape ``y.shape + (S,)``."""
        self.register_etp_rules(init_pp=fn)
        return fn

    # -- jax.vmap -------------------------------------------------------------------------------------------------

    def _batch(
        self, operands: Sequence[jax.Array], dims: Sequence[int | None], **params: Static
    ) -> tuple[PyTree, PyTree]:
        mapped = {i: d for i, d in enumerate(dims) if d is not None}
        if self.batched_twin is not None and list(mapped) == [self.x_index]:
            operands = list(operands)
            ((i, d),) = mapped.items()
            operands[i] = jnp.moveaxis(operands[i], d, 0)
            return self.batched_twin.bind(*operands, **params), 0
        warn(
            f"jax.vmap over {self.name!r} maps operands {list(mapped)}, which is not a batch of its input alone: "
            "it becomes plain JAX here, and its weight is invisible to online learning. "
            "Map only the input, or give the operation a batch axis.",
            CompilationWarning,
        )
        out = jax.vmap(lambda *xs: self.impl_fn(*xs, **params), in_axes=tuple(dims))(*operands)
        return out, jax.tree.map(lambda _: 0, out)


def register_primitive(
    name: str,
    impl_fn: Callable[..., PyTree],
    *,
    batched: bool = False,
    gradient_enabled: bool = False,
    trainable_invars_fn: Callable[[Params], dict[str, int]] | None = None,
    x_invar_index: int | None = 0,
    y_outvar_index: int = 0,
) -> ETPPrimitive:
    """Make a marked operation of an ordinary JAX function.

    Parameters
    ----------
    name : str
        The primitive's name, as reports show it.
    impl_fn : callable
        ``impl_fn(*arrays, **static_params)``, linear in its external input beside offsets, whose input is 1; static
        parameters must be hashable.
    batched : bool
        Whether axis 0 of the input and of the output is a batch axis.
    gradient_enabled : bool
        Whether the operation is transparent for the walk from another operation's output to the hidden states.
    trainable_invars_fn : callable, optional
        ``params -> {key: operand index}``; by default ``{'weight': 1}``.
    x_invar_index : int or None
        The operand that is the external input; ``None`` if there is none.
    y_outvar_index : int
        Which output is traced. An operation with several outputs has an index of at least 1, or returns one array.

    Returns
    -------
    ETPPrimitive
        Every rule that an engine needs is derived from ``impl_fn``; ``register_*`` methods override single rules.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> half = braintrace.register_primitive('half_matmul', lambda x, w: 0.5 * (x @ w))
    >>> half.bind(jnp.ones(2), jnp.ones((2, 3)))
    Array([1., 1., 1.], dtype=float32)
    """
    if not callable(impl_fn):
        raise TypeError(f"impl_fn of operation {name!r} must be a JAX function, got {type(impl_fn).__name__}.")
    return ETPPrimitive(
        name,
        impl_fn,
        batched=batched,
        gradient_enabled=gradient_enabled,
        trainables=trainable_invars_fn,
        x_index=x_invar_index,
        y_index=y_outvar_index,
    )
