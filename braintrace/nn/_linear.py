"""Dense linear layers."""

from __future__ import annotations

from functools import partial

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from brainstate.nn import init
from brainstate.typing import ArrayLike, Size

from braintrace._jax import any_rank
from braintrace._ops import dense

from ._base import Initializer, initialize, parameter, set_sizes

# The functions below act on the weight inside the marked operation. Operations compare their hooks by identity, so
# every layer binds its hook once, when it is built: a new one at each call would trace the program anew.


def masked(mask: ArrayLike, weight: jax.Array) -> jax.Array:
    return weight * jnp.asarray(mask, weight.dtype)


def _signed(sign: ArrayLike, weight: jax.Array) -> jax.Array:
    return jnp.abs(weight) * jnp.asarray(sign, weight.dtype)


def _standardized(eps: float, mask: ArrayLike | None, weight: jax.Array) -> jax.Array:
    weight = brainstate.nn.weight_standardization(weight, eps)
    return weight if mask is None else masked(mask, weight)


def _input_mask(mask: Initializer, shape: tuple[int, int]) -> ArrayLike:
    """A mask with one value for each input where that is all it says, else one for each weight."""
    column = (shape[0], 1)
    mask = mask(column) if callable(mask) else mask
    return initialize(mask, column if np.shape(mask)[-1:] in ((), (1,)) else shape)


class Linear(brainstate.nn.Linear):
    r"""Affine map of the last axis, :math:`y = x (W \circ m) + b`, through :func:`braintrace.matmul`.

    Parameters
    ----------
    in_size, out_size : int or tuple of int
        Size of one input and of one output. Axes in front of the last must agree.
    w_init : callable or array, optional
        Initial weight, of shape ``(in, out)``.
    b_init : callable, array or None, optional
        Initial bias, of shape ``(out,)``. ``None`` leaves the bias out.
    w_mask : callable, array or None, optional
        Mask :math:`m` that broadcasts to ``(in, out)``. Masked entries neither act nor learn.
    name : str, optional
        Name of the layer.
    param_type : type, optional
        Class of the parameter state.

    Attributes
    ----------
    weight : ParamState
        ``{'weight': (in, out), 'bias': (out,)}``, without ``'bias'`` if `b_init` is None.
    w_mask : array or None
        The mask.

    Raises
    ------
    AssertionError
        If the sizes differ in an axis in front of the last.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import braintrace
    >>> layer = braintrace.nn.Linear(3, 2)
    >>> layer(jnp.ones((5, 3))).shape  # any leading axes
    (5, 2)
    """

    def __init__(
        self,
        in_size: Size,
        out_size: Size,
        w_init: Initializer = init.KaimingNormal(),
        b_init: Initializer | None = init.ZeroInit(),
        w_mask: Initializer | None = None,
        name: str | None = None,
        param_type: type = brainstate.ParamState,
    ):
        brainstate.nn.Module.__init__(self, name=name)
        set_sizes(self, in_size, out_size)
        shape = self.in_size[-1], self.out_size[-1]
        self.w_mask = None if w_mask is None else initialize(w_mask, shape)
        self._weight_fn = None if w_mask is None else partial(masked, self.w_mask)
        params = {"weight": initialize(w_init, shape)}
        if b_init is not None:
            params["bias"] = initialize(b_init, shape[-1:])
        self.weight = parameter(param_type, params)

    def update(self, x: ArrayLike) -> ArrayLike:
        """Map `x` of shape ``(..., in)`` to ``(..., out)``."""
        params = self.weight.value
        return dense(x, params["weight"], params.get("bias"), weight_fn=self._weight_fn)


class SignedWLinear(brainstate.nn.SignedWLinear):
    r"""Linear map whose weights keep their sign, :math:`y = x (|W| \circ s)`: excitatory and inhibitory inputs.

    Parameters
    ----------
    in_size, out_size : int or tuple of int
        Size of one input and of one output. Axes in front of the last must agree.
    w_init : callable or array, optional
        Initial weight, of shape ``(in, out)``.
    w_sign : array or None, optional
        Signs :math:`s` that broadcast to ``(in, out)``; ``(in, 1)`` gives each input one sign. ``None``: all positive.
    name : str, optional
        Name of the layer.
    param_type : type, optional
        Class of the parameter state.

    Attributes
    ----------
    weight : ParamState
        The raw weight, an array of shape ``(in, out)``.
    w_sign : array or None
        The signs.

    Raises
    ------
    AssertionError
        If the sizes differ in an axis in front of the last.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import braintrace
    >>> layer = braintrace.nn.SignedWLinear(3, 2, w_sign=jnp.array([[1.0], [1.0], [-1.0]]))
    >>> bool((layer(jnp.array([0.0, 0.0, 1.0])) <= 0).all())
    True
    """

    def __init__(
        self,
        in_size: Size,
        out_size: Size,
        w_init: Initializer = init.KaimingNormal(),
        w_sign: ArrayLike | None = None,
        name: str | None = None,
        param_type: type = brainstate.ParamState,
    ):
        brainstate.nn.Module.__init__(self, name=name)
        set_sizes(self, in_size, out_size)
        shape = self.in_size[-1], self.out_size[-1]
        self.w_sign = None if w_sign is None else initialize(w_sign, shape)
        self._weight_fn = jnp.abs if w_sign is None else partial(_signed, self.w_sign)
        self.weight = parameter(param_type, initialize(w_init, shape))

    def update(self, x: ArrayLike) -> ArrayLike:
        """Map `x` of shape ``(..., in)`` to ``(..., out)``."""
        return dense(x, self.weight.value, weight_fn=self._weight_fn)


class ScaledWSLinear(brainstate.nn.ScaledWSLinear):
    r"""Linear map with standardised weights, :math:`y = (x\, (\hat W \circ m)) \circ g + b`.

    Each output column of the weight is standardised over its :math:`n` inputs,

    .. math:: \hat W = \frac{W - \mathrm{mean}(W)}{\sqrt{\max(n\, \mathrm{var}(W), \epsilon)}}.

    Parameters
    ----------
    in_size, out_size : int or tuple of int
        Size of one input and of one output. Axes in front of the last must agree.
    w_init : callable or array, optional
        Initial weight, of shape ``(in, out)``.
    b_init : callable, array or None, optional
        Initial bias, of shape ``(out,)``. ``None`` leaves the bias out.
    w_mask : callable, array or None, optional
        Mask :math:`m` that broadcasts to ``(in, out)``; a callable is asked for ``(in, 1)``, one value for each input.
    ws_gain : bool, optional
        Whether to train a gain :math:`g`, initially one.
    eps : float, optional
        Smallest :math:`n\, \mathrm{var}(W)` that is divided by.
    name : str, optional
        Name of the layer.
    param_type : type, optional
        Class of the parameter state.

    Attributes
    ----------
    weight : ParamState
        ``{'weight': (in, out), 'bias': (out,), 'gain': (1, out)}``, without what was left out.
    w_mask : array or None
        The mask.

    Raises
    ------
    AssertionError
        If the sizes differ in an axis in front of the last.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import braintrace
    >>> layer = braintrace.nn.ScaledWSLinear(3, 2)
    >>> bool(jnp.allclose(layer(jnp.ones(3)), 0.0, atol=1e-6))  # standardised columns sum to zero
    True
    """

    def __init__(
        self,
        in_size: Size,
        out_size: Size,
        w_init: Initializer = init.KaimingNormal(),
        b_init: Initializer | None = init.ZeroInit(),
        w_mask: Initializer | None = None,
        ws_gain: bool = True,
        eps: float = 1e-4,
        name: str | None = None,
        param_type: type = brainstate.ParamState,
    ):
        brainstate.nn.Module.__init__(self, name=name)
        set_sizes(self, in_size, out_size)
        shape = self.in_size[-1], self.out_size[-1]
        self.eps = eps
        self.w_mask = None if w_mask is None else _input_mask(w_mask, shape)
        self._weight_fn = partial(_standardized, eps, self.w_mask)
        params = {"weight": initialize(w_init, shape)}
        if b_init is not None:
            params["bias"] = initialize(b_init, shape[-1:])
        if ws_gain:
            params["gain"] = jnp.ones((1, shape[1]), params["weight"].dtype)
        self.weight = parameter(param_type, params)

    @any_rank
    def update(self, x: ArrayLike) -> ArrayLike:
        """Map `x` of shape ``(..., in)`` to ``(..., out)``."""
        params = self.weight.value
        weight, unit = u.split_mantissa_unit(params["weight"])
        # In front of the operation, so that the gain has traces too.
        weight = self._weight_fn(weight) * params.get("gain", 1.0)
        return dense(x, u.maybe_decimal(weight * unit), params.get("bias"))
