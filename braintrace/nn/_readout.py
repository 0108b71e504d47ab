"""Readouts with a memory."""

from __future__ import annotations

from typing import ClassVar

import brainstate
import brainunit as u
from brainstate.nn import init
from brainstate.typing import ArrayLike, Size

from braintrace._ops import dense

from ._base import Initializer, Recurrent, initialize


class LeakyRateReadout(Recurrent):
    r"""Leaky integrator, :math:`r_t = e^{-\Delta t / \tau}\, r_{t-1} + x_t W`.

    Parameters
    ----------
    in_size, out_size : int or tuple of int
        Size of one input and of one output. Axes in front of the last must agree.
    tau : array or quantity, optional
        Time constant :math:`\tau`.
    w_init : callable or array, optional
        Initial weight, of shape ``(in, out)``.
    r_init : callable or array, optional
        Initial state, with the unit of ``x @ W`` if that has one.
    name : str, optional
        Name of the layer.

    Attributes
    ----------
    W : ParamState
        The weight, an array of shape ``(in, out)``.
    r : HiddenState
        The output, of shape ``(*batch, *out_size)``.
    decay : array
        :math:`e^{-\Delta t / \tau}`, computed once from the time step ``brainstate.environ.get_dt()``.

    Raises
    ------
    KeyError
        If no time step is set in `brainstate.environ`.
    AssertionError
        If the sizes differ in an axis in front of the last.

    Examples
    --------
    >>> import brainstate
    >>> import brainunit as u
    >>> import jax.numpy as jnp
    >>> import braintrace
    >>> with brainstate.environ.context(dt=1.0 * u.ms):
    ...     readout = braintrace.nn.LeakyRateReadout(3, 2, tau=10.0 * u.ms)
    >>> readout.init_state(batch_size=5)
    >>> readout(jnp.ones((5, 3))).shape
    (5, 2)
    """

    hidden: ClassVar = ("r",)

    def __init__(
        self,
        in_size: Size,
        out_size: Size,
        tau: ArrayLike = 5.0 * u.ms,
        w_init: Initializer = init.KaimingNormal(distribution="normal"),
        r_init: Initializer = init.ZeroInit(),
        name: str | None = None,
    ):
        super().__init__(in_size, out_size, r_init, name)
        self.tau = tau
        self.decay = u.math.exp(-brainstate.environ.get_dt() / tau)
        self.W = brainstate.ParamState(initialize(w_init, (self.in_size[-1], self.out_size[-1])))

    @property
    def r_init(self) -> Initializer:
        """What made the initial state."""
        return self.state_init

    def update(self, x: ArrayLike) -> ArrayLike:
        """Integrate `x` of shape ``(..., in)`` for one step and return the new ``r``."""
        self.r.value = self.decay * self.r.value + dense(x, self.W.value)
        return self.r.value
