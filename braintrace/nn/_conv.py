"""Convolutional layers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial

import brainstate
import brainunit as u
import jax.numpy as jnp
from brainstate.typing import ArrayLike

from braintrace._ops import conv
from braintrace._ops.linear import Hook

from ._base import fill_in
from ._linear import masked

# What the docstrings of the layers have in common.
_PARAMETERS = """out_channels : int
    Channels of the output.
kernel_size, stride, lhs_dilation, rhs_dilation : int or tuple of int
    One number for every axis of space, or one per axis.
padding : str, int, pair or sequence of pairs
    ``'SAME'``, ``'VALID'``, or how much to pad.
groups : int
    Groups of channels that are convolved by themselves.
w_init : callable or array, optional
    Initial kernel.
b_init : callable, array or None, optional
    Initial bias. ``None`` leaves the bias out.
w_mask : callable, array or None, optional
    Mask :math:`m` of the kernel. Masked entries neither act nor learn.
channel_first : bool
    Whether the channel axis comes before those of space.
name : str, optional
    Name of the layer.
param_type : type, optional
    Class of the parameter state."""
_ATTRIBUTES = """Attributes
----------
weight : ParamState
    ``{'weight': (*kernel_size, in_channels // groups, out_channels)}``, and a ``'bias'`` with axes to broadcast if
    `b_init` is given.
out_size : tuple of int
    Shape of one output."""
_RAISES = """Raises
------
ValueError
    If the sizes do not fit, or an input has another shape than `in_size`."""


class _Conv:
    """The forward pass of a `brainstate.nn` convolution, through a marked operation."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        fill_in(cls, parameters=_PARAMETERS, attributes=_ATTRIBUTES, raises=_RAISES)

    @cached_property
    def _kernel_fn(self: brainstate.nn.Module) -> Hook:
        # One object for the life of the layer: operations compare their hooks by identity.
        return None if self.w_mask is None else partial(masked, self.w_mask)

    def _conv_op(self: brainstate.nn.Module, x: ArrayLike, params: Mapping[str, ArrayLike]) -> ArrayLike:
        # brainstate's constructor evaluates this on a plain input to learn the shape of the output.
        return self._convolve(x, {k: jnp.asarray(u.get_mantissa(v)) for k, v in params.items()})

    def update(self: brainstate.nn.Module, x: ArrayLike) -> ArrayLike:
        """Convolve `x` of shape ``in_size`` or ``(batch, *in_size)``."""
        lead = x.shape[: -len(self.in_size)]
        if len(lead) > 1 or x.shape[len(lead) :] != tuple(self.in_size):
            raise ValueError(
                f"{type(self).__name__} was made for inputs of shape {tuple(self.in_size)}, with a batch axis in front "
                f"or without, and got {tuple(x.shape)}."
            )
        return self._convolve(x, self.weight.value)

    def _convolve(self: brainstate.nn.Module, x: ArrayLike, params: Mapping[str, ArrayLike]) -> ArrayLike:
        return conv(
            x,
            params["weight"],
            params.get("bias"),
            strides=self.stride,
            padding=self.padding,
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.rhs_dilation,
            feature_group_count=self.groups,
            dimension_numbers=self.dimension_numbers,
            kernel_fn=self._kernel_fn,
        )


class Conv1d(_Conv, brainstate.nn.Conv1d):
    r"""Convolution over one axis, :math:`y = (K \circ m) * x + b`, through :func:`braintrace.conv`.

    Parameters
    ----------
    in_size : tuple of int
        Shape of one input, ``(length, channels)``, or ``(channels, length)`` with ``channel_first``.
    {parameters}

    {attributes}

    {raises}

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import braintrace
    >>> layer = braintrace.nn.Conv1d((8, 2), 4, kernel_size=3)
    >>> layer.out_size, layer(jnp.ones((5, 8, 2))).shape, layer(jnp.ones((8, 2))).shape
    ((8, 4), (5, 8, 4), (8, 4))
    """


class Conv2d(_Conv, brainstate.nn.Conv2d):
    r"""Convolution over two axes, :math:`y = (K \circ m) * x + b`, through :func:`braintrace.conv`.

    Parameters
    ----------
    in_size : tuple of int
        Shape of one input, ``(height, width, channels)``, or ``(channels, height, width)`` with
        ``channel_first``.
    {parameters}

    {attributes}

    {raises}

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import braintrace
    >>> layer = braintrace.nn.Conv2d((8, 8, 2), 4, kernel_size=3, stride=2)
    >>> layer(jnp.ones((5, 8, 8, 2))).shape
    (5, 4, 4, 4)
    """


class Conv3d(_Conv, brainstate.nn.Conv3d):
    r"""Convolution over three axes, :math:`y = (K \circ m) * x + b`, through :func:`braintrace.conv`.

    Parameters
    ----------
    in_size : tuple of int
        Shape of one input, ``(depth, height, width, channels)``, or ``(channels, depth, height, width)`` with
        ``channel_first``.
    {parameters}

    {attributes}

    {raises}

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import braintrace
    >>> layer = braintrace.nn.Conv3d((4, 4, 4, 2), 3, kernel_size=2, padding='VALID')
    >>> layer(jnp.ones((5, 4, 4, 4, 2))).shape
    (5, 3, 3, 3, 3)
    """
