"""The linear recurrent unit."""

from typing import ClassVar

import brainstate
import jax.numpy as jnp
from brainstate.nn import init
from brainstate.typing import ArrayLike

from braintrace._jax import any_rank
from braintrace._ops import element_wise

from ._base import Recurrent
from ._linear import Linear


def _open_uniform(n: int) -> ArrayLike:
    """Uniform between 0 and 1, and never 0, of which the logarithm is infinite."""
    draw = brainstate.random.uniform(size=(n,))
    return jnp.maximum(draw, jnp.finfo(draw.dtype).tiny)


class LRUCell(Recurrent, brainstate.nn.RNNCell):
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
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        self.theta_log = brainstate.ParamState(jnp.log(max_phase * _open_uniform(d_hidden)))
        nu_log = jnp.log(-0.5 * jnp.log(r_min**2 + _open_uniform(d_hidden) * (r_max**2 - r_min**2)))
        self.nu_log = brainstate.ParamState(nu_log)
        self.gamma_log = brainstate.ParamState(0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(nu_log))))  # log sqrt(1 - |λ|²)
        w_init = init.LecunNormal(distribution="normal")
        self.B_re = Linear(d_model, d_hidden, w_init, b_init=None)
        self.B_im = Linear(d_model, d_hidden, w_init, b_init=None)
        self.C_re = Linear(d_hidden, d_model, w_init, b_init=None)
        self.C_im = Linear(d_hidden, d_model, w_init, b_init=None)
        self.D = brainstate.ParamState(brainstate.random.randn(d_model))

    @any_rank
    def update(self, inputs: ArrayLike) -> ArrayLike:
        """Take one step with `inputs` of shape ``(..., d_model)`` and return ``y`` of that shape."""
        magnitude = jnp.exp(-jnp.exp(element_wise(self.nu_log.value)))
        phase = jnp.exp(element_wise(self.theta_log.value))
        scale = jnp.exp(element_wise(self.gamma_log.value))
        re, im = magnitude * jnp.cos(phase), magnitude * jnp.sin(phase)
        h_re, h_im = self.h_re.value, self.h_im.value
        self.h_re.value = re * h_re - im * h_im + scale * self.B_re(inputs)
        self.h_im.value = re * h_im + im * h_re + scale * self.B_im(inputs)
        return self.C_re(self.h_re.value) - self.C_im(self.h_im.value) + element_wise(self.D.value) * inputs
