"""Convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .._jax import any_rank
from .._types import PyTree, Shape
from .linear import Hook, apply_hook, array_operand, rank_of, weight_and_bias, with_units
from .primitive import Anchors, Aval, Avals, ETPPrimitive, Gradients, Params, Static, Unshared, Weights, anchored

__all__ = ["conv", "etp_conv_p", "etp_conv_v_p"]

GEOMETRY = (
    "window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count", "batch_group_count",
    "dimension_numbers",
)  # fmt: skip

# `dimension_numbers` is a `jax.lax.ConvDimensionNumbers`: the axes of (batch, channel, *spatial) of input and output,
# of (out, in, *spatial) of the kernel. Inside the operation axis 0 of input and output is the batch axis; one sample
# has the same layout without it.


def _sample_bias(bias: jax.Array, params: Params) -> jax.Array:
    """The bias in the layout of one sample, with axes to broadcast."""
    out_spec = params["dimension_numbers"].out_spec
    if bias.ndim == 1:
        shape = [1] * (len(out_spec) - 1)
        shape[out_spec[1] - 1] = bias.shape[0]
        return bias.reshape(shape)
    return bias[0] if bias.ndim == len(out_spec) else bias


def _samples_last(
    x: jax.Array, kernel: jax.Array, dimension_numbers: jax.lax.ConvDimensionNumbers, **geometry: Static
) -> jax.Array:
    """A convolution whose derivative by the kernel is one in the layout of XLA's fast path, with samples as channels.

    XLA brings convolutions into that layout by itself, but not those in a loop.
    """
    lhs, rhs, out = dimension_numbers
    n = len(lhs)
    x, kernel = jnp.transpose(x, (*lhs[1:], lhs[0])), jnp.transpose(kernel, (*rhs[1:], rhs[0]))
    inside = jax.lax.ConvDimensionNumbers(
        (n - 1, 0, *range(1, n - 1)), (n - 1, 0, *range(1, n - 1)), (n - 2, n - 1, *range(n - 2))
    )
    y = jax.lax.conv_general_dilated(x, kernel, dimension_numbers=inside, **geometry)
    return jnp.transpose(jnp.moveaxis(y, (-2, -1), (0, 1)), tuple(np.argsort(out)))


@any_rank
def _conv_impl(
    x: jax.Array,
    weight: jax.Array,
    *bias: jax.Array,
    convolve: Callable[..., jax.Array] = jax.lax.conv_general_dilated,
    **params: Static,
) -> jax.Array:
    if params["batch_group_count"] != 1 and x.ndim > len(params["dimension_numbers"].lhs_spec):
        return jax.vmap(lambda x: _conv_impl(x, weight, *bias, **params))(x)
    kernel = apply_hook(params["kernel_fn"], weight)
    dtype = jnp.result_type(x, kernel)
    # All axes in front of one sample, of time say, are one batch axis.
    lead = x.shape[: x.ndim - len(params["dimension_numbers"].lhs_spec) + 1]
    x = x.reshape(math.prod(lead), *x.shape[len(lead) :])
    y = convolve(x.astype(dtype), kernel.astype(dtype), **{k: params[k] for k in GEOMETRY})
    if params["batch_group_count"] == 1:
        y = y.reshape(*lead, *y.shape[1:])
    return y + _sample_bias(apply_hook(params["bias_fn"], bias[0]), params) if bias else y


def _conv_on_cpu(*operands: jax.Array, **params: Static) -> jax.Array:
    in_groups = params["feature_group_count"] != 1 or params["batch_group_count"] != 1
    return _conv_impl(*operands, **params) if in_groups else _conv_impl(*operands, convolve=_samples_last, **params)


def _patches(x: jax.Array, kernel_shape: Shape, params: Params) -> jax.Array:
    """What the kernel sees at every output position of one sample: shape ``(in, *kernel, *spatial_out)``."""
    lhs, rhs, _ = params["dimension_numbers"]
    window = [kernel_shape[d] for d in rhs[2:]]
    x = jnp.transpose(x, [d - 1 for d in lhs[1:]])[None]
    geometry = {k: params[k] for k in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")}
    patches = jax.lax.conv_general_dilated_patches(x, window, **geometry)[0]
    return patches.reshape(x.shape[1], *window, *patches.shape[1:])


def _unshare(x_aval: Aval, y_aval: Aval, weight_avals: Avals, params: Params) -> Unshared:
    del x_aval, weight_avals
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        raise NotImplementedError(
            f"A trace per weight of a convolution in groups (feature_group_count={params['feature_group_count']}, "
            f"batch_group_count={params['batch_group_count']}) is not available. Use braintrace.pp_prop, or one "
            "convolution per group."
        )
    _, rhs, out = params["dimension_numbers"]
    spatial = tuple(y_aval.shape[d - 1] for d in out[2:])
    window, positions = "abc"[: len(spatial)], "xyz"[: len(spatial)]
    kernel_axes = "".join(c for _, c in sorted(zip(rhs, "oi" + window)))
    y_axes = "".join(c for _, c in sorted(zip(out[1:], "o" + positions)))
    equation = f"i{window}{positions},{positions}{kernel_axes}->{y_axes}"

    def expand(weights: Weights) -> Gradients:
        kernel = apply_hook(params["kernel_fn"], weights["weight"])
        unshared = {"weight": jnp.broadcast_to(kernel, (*spatial, *kernel.shape))}
        if params["has_bias"]:
            bias = _sample_bias(apply_hook(params["bias_fn"], weights["bias"]), params)
            unshared["bias"] = jnp.broadcast_to(bias, y_aval.shape)
        return unshared

    def impl(x: jax.Array, unshared: Weights) -> jax.Array:
        kernel = unshared["weight"]
        patches = _patches(x.astype(jnp.result_type(x, kernel)), kernel.shape[len(spatial) :], params)
        y = jnp.einsum(equation, patches, kernel)
        return y + unshared["bias"] if params["has_bias"] else y

    return Unshared(expand, impl)


def _anchors(y_aval: Aval, weight_avals: Avals, params: Params) -> Anchors:
    _, rhs, out = params["dimension_numbers"]
    spatial = len(out) - 2
    axis_of = {out[1] - 1: spatial + rhs[0], **{d - 1: j for j, d in enumerate(out[2:])}}
    rank = 2 * spatial + 2

    def index(axis: int) -> np.ndarray:
        shape = [1] * rank
        shape[axis_of[axis]] = y_aval.shape[axis]
        return np.arange(y_aval.shape[axis]).reshape(shape)

    anchors = {"weight": tuple(map(index, range(y_aval.ndim))), "bias": None}
    return {k: anchors[k] for k in weight_avals}


def _sample_ndim(params: Params) -> int | None:
    layout = params.get("dimension_numbers")
    return None if layout is None or params["batch_group_count"] != 1 else len(layout.out_spec) - 1


etp_conv_p = ETPPrimitive("etp_conv", _conv_impl, batched=True, trainables=weight_and_bias, sample_ndim=_sample_ndim)
etp_conv_v_p = ETPPrimitive("etp_conv", _conv_impl, trainables=weight_and_bias, batched_twin=etp_conv_p)
for _p in (etp_conv_p, etp_conv_v_p):
    _p.register_etp_rules(unshare=_unshare, anchors=_anchors, snap_anchor=anchored, impl_on_cpu=_conv_on_cpu)


def _batch_first(spec: Sequence[int]) -> tuple[int, ...]:
    return (0, *(d + 1 if d < spec[0] else d for d in spec[1:]))


def _per_axis(name: str, value: Sequence[int] | None, rank: int) -> tuple[int, ...]:
    value = (1,) * rank if value is None else tuple(value)
    if len(value) != rank:
        raise ValueError(
            f"conv: {name}={value} has {len(value)} entries, the kernel has {rank} spatial axes. Pass one per axis."
        )
    return value


def conv(
    x: PyTree,
    kernel: PyTree,
    bias: PyTree = None,
    *,
    strides: Sequence[int] = (1,),
    padding: str | Sequence[tuple[int, int]] = "SAME",
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    dimension_numbers: jax.lax.ConvDimensionNumbers | tuple[str, str, str] | None = None,
    kernel_fn: Hook = None,
    bias_fn: Hook = None,
) -> PyTree:
    r"""Marked convolution ``jax.lax.conv_general_dilated(x, f(K), ...) + g(b)``.

    Parameters
    ----------
    x : array or Quantity, shape ``(B, in, *spatial)``, or another layout
        The input. Without its batch axis it is one sample, and so is the result.
    kernel : array or Quantity, shape ``(out, in, *window)``, or another layout
        The trained kernel (key ``'weight'``), of one to three spatial axes.
    bias : array or Quantity, shape ``(out,)``, optional
        Added along the channel axis of the output; with more axes it is broadcast to the output as it is.
    strides, lhs_dilation, rhs_dilation : sequence of int
        One entry per spatial axis.
    padding : str or sequence of pairs
        ``'SAME'``, ``'VALID'``, or ``(low, high)`` per spatial axis.
    feature_group_count, batch_group_count : int
        As in JAX; the second needs a batch axis.
    dimension_numbers : optional
        As in JAX, such as ``('NHWC', 'HWIO', 'NHWC')``; the layouts name the batch axis also where ``x`` has none.
    kernel_fn, bias_fn : callable, optional
        Maps of the raw mantissas, as in :func:`matmul`; ``bias_fn`` entry by entry.

    Returns
    -------
    array or Quantity
        In the unit of ``x`` times that of ``kernel``.

    Raises
    ------
    ValueError
        If ranks, the number of strides or dilations, or the sizes of the channel axes do not fit.
    TypeError
        If an operand is no array, or the channels do not fit the kernel.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> x, kernel = jnp.ones((5, 8, 8, 2)), jnp.ones((3, 3, 2, 4))
    >>> layout = ('NHWC', 'HWIO', 'NHWC')
    >>> braintrace.conv(x, kernel, strides=(2, 2), dimension_numbers=layout).shape
    (5, 4, 4, 4)
    """
    array_operand("conv", "x", x)
    array_operand("conv", "kernel", kernel)
    rank = rank_of(kernel)
    if rank not in (3, 4, 5) or rank_of(x) not in (rank, rank - 1):
        raise ValueError(
            f"conv: x has shape {tuple(x.shape)}, the kernel {tuple(kernel.shape)}. A kernel has 3 to 5 axes (out, in "
            "and one to three of space), and x as many (with a batch axis) or one less."
        )
    batched = rank_of(x) == rank
    if batch_group_count != 1 and not batched:
        raise ValueError(
            f"conv: batch_group_count={batch_group_count} needs a batch axis, x has shape {tuple(x.shape)}."
        )
    layout = jax.lax.conv_dimension_numbers((1,) * rank, (1,) * rank, dimension_numbers)
    inside = jax.lax.ConvDimensionNumbers(_batch_first(layout.lhs_spec), layout.rhs_spec, _batch_first(layout.out_spec))
    params = dict(
        has_bias=bias is not None,
        kernel_fn=kernel_fn,
        bias_fn=bias_fn,
        window_strides=_per_axis("strides", strides, rank - 2),
        padding=padding if isinstance(padding, str) else tuple((int(low), int(high)) for low, high in padding),
        lhs_dilation=_per_axis("lhs_dilation", lhs_dilation, rank - 2),
        rhs_dilation=_per_axis("rhs_dilation", rhs_dilation, rank - 2),
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        dimension_numbers=inside,
    )
    if bias is not None:
        _check_bias(bias, kernel, layout)
    in_batch, out_batch = layout.lhs_spec[0], layout.out_spec[0]

    def bind(x: jax.Array, kernel: jax.Array, *bias: jax.Array) -> jax.Array:
        if not batched:
            return etp_conv_v_p.bind(x, kernel, *bias, **params)
        bias = tuple(jnp.moveaxis(b, out_batch, 0) if b.ndim == rank else b for b in bias)
        y = etp_conv_p.bind(x if in_batch == 0 else jnp.moveaxis(x, in_batch, 0), kernel, *bias, **params)
        return y if out_batch == 0 else jnp.moveaxis(y, 0, out_batch)

    return with_units("conv", bind, x, {"kernel": kernel}, bias)


def _check_bias(bias: PyTree, kernel: PyTree, layout: jax.lax.ConvDimensionNumbers) -> None:
    array_operand("conv", "bias", bias)
    out = kernel.shape[layout.rhs_spec[0]]
    full = len(bias.shape) == len(kernel.shape)
    if len(bias.shape) == 1:
        fits = bias.shape[0] in (1, out)
    else:
        fits = len(bias.shape) <= len(kernel.shape) and not (full and bias.shape[layout.out_spec[0]] != 1)
    if not fits:
        raise ValueError(
            f"conv: the bias has shape {tuple(bias.shape)}, the kernel has {out} output channels. Pass ({out},), or an "
            "array that broadcasts to the output and is one along the batch axis."
        )
