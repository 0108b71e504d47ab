"""Small parts of learning rules, for those who write their own."""

from __future__ import annotations

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from .._precision import wide, widened
from .._types import PyTree
from .signals import as_key

__all__ = ["FixedRandomFeedback", "GradExpon", "KappaFilter"]


class FixedRandomFeedback:
    """A fixed random matrix that carries errors to a layer in place of the true weights.

    Parameters
    ----------
    n_target, n_layer : int
        Sizes of the error and of the layer.
    key : JAX key or int
        An integer is the seed of a key.
    init_scale : float
        Standard deviation of the entries.

    Attributes
    ----------
    B : array, shape ``(n_target, n_layer)``
        Constant for differentiation.

    References
    ----------
    .. [1] T. Lillicrap et al., "Random synaptic feedback weights support error backpropagation for deep learning",
       Nature Communications 7, 2016.

    Examples
    --------
    >>> import braintrace, jax, jax.numpy as jnp
    >>> braintrace.FixedRandomFeedback(2, 5, jax.random.key(0)).project(jnp.ones((7, 2))).shape
    (7, 5)
    """

    __module__ = "braintrace"

    def __init__(self, n_target: int, n_layer: int, key: jax.Array | int, init_scale: float = 0.1):
        key = as_key("key", key)
        self.n_target = n_target
        self.n_layer = n_layer
        self.B = jax.lax.stop_gradient(init_scale * jax.random.normal(key, (n_target, n_layer)))

    def project(self, y_target: jax.Array) -> jax.Array:
        """``y_target @ B`` for ``y_target`` of shape ``(..., n_target)``."""
        return y_target @ self.B


class KappaFilter(brainstate.ShortTermState):
    r"""A low-pass filter, :math:`v \leftarrow (1-\kappa)\, x + \kappa\, v`.

    Parameters
    ----------
    init_value : array
        Initial value; one of half precision is kept, and returned, in float32.
    kappa : float
        In ``[0, 1)``; 0 passes its input on.

    Raises
    ------
    ValueError
        If ``kappa`` is out of range.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> f = braintrace.KappaFilter(jnp.zeros(2), 0.5)
    >>> f.update(jnp.ones(2))
    Array([0.5, 0.5], dtype=float32)
    """

    __module__ = "braintrace"

    value: PyTree

    def __init__(self, init_value: PyTree, kappa: float):
        if not 0.0 <= kappa < 1.0:
            raise ValueError(f"kappa must lie in [0, 1), got {kappa}.")
        super().__init__(widened(init_value))
        self.kappa = kappa

    def update(self, x: PyTree) -> PyTree:
        """Filter one input, store and return the new value."""
        self.value = jax.tree.map(lambda v, x: (1 - self.kappa) * x + self.kappa * v, self.value, x)
        return self.value

    def reset_state(self, batch_size: int | None = None, **kwargs: object) -> None:
        """Zero the value; ``batch_size`` replaces its leading axis (or becomes the axis of a scalar)."""

        del kwargs

        def zeros(v: jax.Array) -> jax.Array:
            shape = jnp.shape(v) if batch_size is None else (batch_size, *jnp.shape(v)[1:])
            return jnp.zeros(shape, jnp.result_type(v))

        self.value = jax.tree.map(zeros, self.value)


class GradExpon(brainstate.nn.Module):
    r"""An exponentially decaying sum of gradients, :math:`G \leftarrow \lambda G + g`.

    Parameters
    ----------
    grad_shape : pytree of array
        The gradients' structure and shapes.
    tau_or_decay : float or Quantity
        The decay in ``(0, 1)``, or a time constant :math:`\tau` with :math:`\lambda = e^{-dt/\tau}`.

    Attributes
    ----------
    gradients : brainstate.LongTermState
        Of gradients of half precision, in float32.
    decay : float

    Raises
    ------
    AssertionError
        If a float decay is out of range.
    ValueError
        If a time constant is not positive.
    KeyError
        For a time constant, if ``dt`` is not set in ``brainstate.environ``.
    TypeError
        For another kind of argument.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> smooth = braintrace.GradExpon({'w': jnp.zeros(2)}, 0.5)
    >>> smooth.update({'w': jnp.ones(2)}); smooth.update({'w': jnp.ones(2)})
    >>> smooth.gradients.value['w']
    Array([1.5, 1.5], dtype=float32)
    """

    __module__ = "braintrace"

    def __init__(self, grad_shape: PyTree, tau_or_decay: float | u.Quantity):
        super().__init__()
        if isinstance(tau_or_decay, u.Quantity):
            if not u.get_mantissa(tau_or_decay) > 0.0:
                raise ValueError(f"A time constant must be positive, got {tau_or_decay}.")
            self.decay = u.math.exp(-brainstate.environ.get_dt() / tau_or_decay)
        elif isinstance(tau_or_decay, (float, np.floating)):
            if not 0.0 < tau_or_decay < 1.0:
                raise AssertionError(f"The decay must lie in (0, 1), got {tau_or_decay}.")
            self.decay = tau_or_decay
        else:
            raise TypeError(
                "tau_or_decay must be a float (a decay) or a brainunit.Quantity (a time constant), got "
                f"{type(tau_or_decay).__name__}."
            )
        zeros = jax.tree.map(lambda g: jnp.zeros(jnp.shape(g), wide(jnp.result_type(g))), grad_shape)
        self.gradients = brainstate.LongTermState(zeros)

    def update(self, grads: PyTree) -> None:
        """Add one gradient to the decaying sum."""
        self.gradients.value = jax.tree.map(lambda G, g: self.decay * G + g, self.gradients.value, grads)
