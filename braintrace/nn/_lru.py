"""Recurrences that turn and shrink a complex value per unit: the linear recurrent unit, and recurrent trace units."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import brainstate
import jax.numpy as jnp
from brainstate.nn import init
from brainstate.typing import ArrayLike

from braintrace._jax import any_rank
from braintrace._ops import element_wise
from braintrace._types import PyTree

from ._base import Initializer, Recurrent, as_activation
from ._linear import Linear


def _open_uniform(n: int) -> ArrayLike:
    """Uniform between 0 and 1, and never 0, of which the logarithm is infinite."""
    draw = brainstate.random.uniform(size=(n,))
    return jnp.maximum(draw, jnp.finfo(draw.dtype).tiny)


class _Rotation(Recurrent, brainstate.nn.RNNCell):
    """A cell with one factor of absolute value below one per unit, drawn from a ring."""

    def _draw(self, r_min: float, r_max: float, max_phase: float) -> None:
        (n,) = self.out_size
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        self.theta_log = brainstate.ParamState(jnp.log(max_phase * _open_uniform(n)))
        nu_log = jnp.log(-0.5 * jnp.log(r_min**2 + _open_uniform(n) * (r_max**2 - r_min**2)))
        self.nu_log = brainstate.ParamState(nu_log)

    def _factor(self) -> tuple[ArrayLike, ArrayLike, ArrayLike]:
        """Real and imaginary part of the factor, and its rate, minus the logarithm of its absolute value."""
        rate = jnp.exp(element_wise(self.nu_log.value))
        magnitude, phase = jnp.exp(-rate), jnp.exp(element_wise(self.theta_log.value))
        return magnitude * jnp.cos(phase), magnitude * jnp.sin(phase), rate


class LRUCell(_Rotation):
    r"""Linear recurrent unit: a diagonal complex recurrence between two linear maps.

    .. math::

        \lambda &= \exp(-e^\nu + i e^\theta) \\
        h_t &= \lambda \circ h_{t-1} + e^\gamma \circ (B_{re} + i B_{im}) x_t \\
        y_t &= C_{re} \operatorname{Re} h_t - C_{im} \operatorname{Im} h_t + D \circ x_t

    Parameters
    ----------
    d_model : int
        Number of inputs and of outputs.
    d_hidden : int
        Number of complex hidden values.
    r_min, r_max : float, optional
        The initial :math:`|\lambda|` lies between them, uniform on that ring of the complex plane.
    max_phase : float, optional
        The initial phase of :math:`\lambda` is uniform between 0 and this.

    Attributes
    ----------
    d_model, d_hidden, r_min, r_max, max_phase
        As given.
    h_re, h_im : HiddenState
        Real and imaginary part of the hidden state, of shape ``(*batch, d_hidden)``, made by `init_state`.
    nu_log, theta_log, gamma_log : ParamState
        :math:`\nu, \theta, \gamma`, of shape ``(d_hidden,)``.
    D : ParamState
        Feed-through, of shape ``(d_model,)``.
    B_re, B_im, C_re, C_im : Linear
        Maps into and out of the hidden state, without bias.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import braintrace
    >>> cell = braintrace.nn.LRUCell(3, 4)
    >>> cell.init_state(batch_size=2)
    >>> cell(jnp.ones((2, 3))).shape
    (2, 3)
    """

    hidden: ClassVar = ("h_re", "h_im")

    def __init__(self, d_model: int, d_hidden: int, r_min: float = 0.0, r_max: float = 1.0, max_phase: float = 6.28):
        super().__init__(d_model, d_hidden, init.ZeroInit())
        self.d_model, self.d_hidden = d_model, d_hidden
        self._draw(r_min, r_max, max_phase)
        log_scale = 0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(self.nu_log.value)))  # log sqrt(1 - |λ|²)
        self.gamma_log = brainstate.ParamState(log_scale)
        w_init = init.LecunNormal(distribution="normal")
        self.B_re = Linear(d_model, d_hidden, w_init, b_init=None)
        self.B_im = Linear(d_model, d_hidden, w_init, b_init=None)
        self.C_re = Linear(d_hidden, d_model, w_init, b_init=None)
        self.C_im = Linear(d_hidden, d_model, w_init, b_init=None)
        self.D = brainstate.ParamState(brainstate.random.randn(d_model))

    @any_rank
    def update(self, inputs: ArrayLike) -> ArrayLike:
        """Take one step with `inputs` of shape ``(..., d_model)`` and return ``y`` of that shape."""
        re, im, _ = self._factor()
        scale = jnp.exp(element_wise(self.gamma_log.value))
        h_re, h_im = self.h_re.value, self.h_im.value
        self.h_re.value = re * h_re - im * h_im + scale * self.B_re(inputs)
        self.h_im.value = re * h_im + im * h_re + scale * self.B_im(inputs)
        return self.C_re(self.h_re.value) - self.C_im(self.h_im.value) + element_wise(self.D.value) * inputs


class RTUCell(_Rotation):
    r"""Recurrent trace unit: a pair of real states per unit, turned, shrunk, and passed through a nonlinearity.

    .. math::

        \lambda &= \exp(-e^\nu + i e^\theta), \qquad \gamma = \sqrt{1 - |\lambda|^2} \\
        c^1_t &= \phi(\operatorname{Re} \lambda \circ c^1_{t-1} - \operatorname{Im} \lambda \circ c^2_{t-1}
        + \gamma \circ W^1 x_t) \\
        c^2_t &= \phi(\operatorname{Re} \lambda \circ c^2_{t-1} + \operatorname{Im} \lambda \circ c^1_{t-1}
        + \gamma \circ W^2 x_t)

    No unit reads another one, so that the traces of D_RTRL are exact, at a cost that grows as the number of weights.

    Parameters
    ----------
    in_size : int
        Number of inputs.
    out_size : int
        Number of units; there are twice as many outputs.
    r_min, r_max : float, optional
        The initial :math:`|\lambda|` lies between them, uniform on that ring of the complex plane.
    max_phase : float, optional
        The initial phase of :math:`\lambda` is uniform between 0 and this.
    w_init : callable or array, optional
        Initial weight of both maps.
    state_init : callable or array, optional
        Initial hidden states.
    activation : str or callable, optional
        The function :math:`\phi`, or its name in `brainstate.nn`; the identity gives the linear units.
    name : str, optional
        Name of the layer.

    Attributes
    ----------
    c1, c2 : HiddenState
        The states of a pair, of shape ``(*batch, out_size)``, made by `init_state`.
    nu_log, theta_log : ParamState
        :math:`\nu, \theta`, of shape ``(out_size,)``.
    W1, W2 : Linear
        Maps of the input, without bias.

    References
    ----------
    .. [1] E. Elelimy et al., "Real-time recurrent learning using trace units in reinforcement learning", Advances in
       Neural Information Processing Systems 37, 2024.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import braintrace
    >>> cell = braintrace.nn.RTUCell(3, 4)
    >>> cell.init_state(batch_size=2)
    >>> cell(jnp.ones((2, 3))).shape
    (2, 8)
    """

    hidden: ClassVar = ("c1", "c2")

    def __init__(
        self,
        in_size: int,
        out_size: int,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 6.28,
        w_init: Initializer = init.LecunNormal(distribution="normal"),
        state_init: Initializer = init.ZeroInit(),
        activation: str | Callable[..., PyTree] = "tanh",
        name: str | None = None,
    ):
        super().__init__(in_size, out_size, state_init, name)
        self.activation = as_activation(activation)
        self._draw(r_min, r_max, max_phase)
        self.W1 = Linear(in_size, out_size, w_init, b_init=None)
        self.W2 = Linear(in_size, out_size, w_init, b_init=None)

    @any_rank
    def update(self, x: ArrayLike) -> ArrayLike:
        """Take one step with `x` of shape ``(..., in_size)`` and return both states, ``(..., 2 out_size)``."""
        re, im, rate = self._factor()
        scale = jnp.sqrt(-jnp.expm1(-2 * rate))  # sqrt(1 - |λ|²): the gradient of ν passes through both
        c1, c2 = self.c1.value, self.c2.value
        self.c1.value = self.activation(re * c1 - im * c2 + scale * self.W1(x))
        self.c2.value = self.activation(re * c2 + im * c1 + scale * self.W2(x))
        return jnp.concatenate([self.c1.value, self.c2.value], -1)
