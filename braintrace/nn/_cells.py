"""Recurrent cells. Every gate is a `Linear` layer of its own, so a parameter is found at, say, ``('Wz', 'weight')``.

In the equations :math:`\\sigma` is the logistic function, :math:`\\phi` the activation, :math:`\\circ` the product of
positions and :math:`[x, h]` the concatenation along the last axis; biases are left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ClassVar

import brainstate
import jax.numpy as jnp
from brainstate.nn import init
from brainstate.typing import ArrayLike, Size
from jax.nn import sigmoid

from braintrace._jax import any_rank
from braintrace._ops import element_wise
from braintrace._types import PyTree

from ._base import Initializer, Orthogonal, Recurrent, as_activation, cat, fill_in
from ._linear import Linear

# Lines that the docstrings have in common: of a parameter, alone or together with the one in front of it.
_PARAMETERS = {
    "out_size": """in_size, out_size : int or tuple of int
    Size of one input and of one hidden state. Axes in front of the last must agree.""",
    "b_init": """w_init, b_init : callable or array, optional
    Initial weight and bias of each layer; ``b_init=None`` leaves the biases out.""",
    "state_init": """state_init : callable or array, optional
    Initial hidden state.""",
    "activation": r"""activation : str or callable, optional
    The function :math:`\phi`, or its name in `brainstate.nn`.""",
    "phi": """phi : callable, optional
    Embedding of the input, from ``(..., in)`` to ``(..., out)``. ``None`` trains a `Linear`.""",
    "name": """name : str, optional
    Name of the layer.""",
}
_RAISES = """Raises
------
AssertionError
    If the sizes differ in an axis in front of the last, or `activation` cannot be called.
AttributeError
    If `brainstate.nn` has no function named `activation`."""
_EXAMPLES = """Examples
--------
>>> import jax.numpy as jnp
>>> import braintrace
>>> cell = braintrace.nn.{name}(3, 4)
>>> cell.init_state(batch_size=2)
>>> cell(jnp.ones((2, 3))).shape
(2, 4)"""


class Cell(Recurrent):
    """A cell made of linear maps to its hidden state.

    A subclass names them in `_maps`, in the order in which they are drawn, with what they take: the input, ``x``, or
    the input joined with a hidden state, ``xh``. In its docstring, marks stand for what all have in common.
    """

    _maps: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "{examples}" not in (cls.__doc__ or ""):
            return
        names = list(inspect.signature(cls.__init__).parameters)
        fill_in(
            cls,
            parameters="\n".join(["Parameters", "----------", *(_PARAMETERS[n] for n in names if n in _PARAMETERS)]),
            raises=_RAISES,
            examples=_EXAMPLES.format(name=cls.__name__),
        )

    def _make_maps(self, w_init: Initializer, b_init: Initializer | None) -> None:
        *lead, width = self.in_size
        sizes = {"x": self.in_size, "xh": (*lead, width + self.out_size[-1])}
        for name, reads in self._maps.items():
            setattr(self, name, Linear(sizes[reads], self.out_size, w_init, b_init))


class GatedCell(Cell):
    """The constructor of cells with an activation."""

    def __init__(
        self,
        in_size: Size,
        out_size: Size,
        w_init: Initializer = Orthogonal(),
        b_init: Initializer | None = init.ZeroInit(),
        state_init: Initializer = init.ZeroInit(),
        activation: str | Callable[..., PyTree] = "tanh",
        name: str | None = None,
    ):
        super().__init__(in_size, out_size, state_init, name)
        self.activation = as_activation(activation)
        self._make_maps(w_init, b_init)


class MiniCell(Cell):
    """The constructor of cells without an activation."""

    def __init__(
        self,
        in_size: Size,
        out_size: Size,
        w_init: Initializer = Orthogonal(),
        b_init: Initializer | None = init.ZeroInit(),
        state_init: Initializer = init.ZeroInit(),
        name: str | None = None,
    ):
        super().__init__(in_size, out_size, state_init, name)
        self._make_maps(w_init, b_init)


class ValinaRNNCell(Cell, brainstate.nn.ValinaRNNCell):
    r"""Plain recurrent cell.

    .. math::

        h_t = \phi(W [x_t, h_{t-1}])

    {parameters}

    Attributes
    ----------
    h : HiddenState
        Hidden state, of shape ``(*batch, *out_size)``, made by `init_state`.
    W : Linear
        Map of :math:`[x, h]`, the input first.

    {raises}

    {examples}
    """

    _maps: ClassVar = {"W": "xh"}

    def __init__(
        self,
        in_size: Size,
        out_size: Size,
        state_init: Initializer = init.ZeroInit(),
        w_init: Initializer = init.XavierNormal(distribution="normal"),
        b_init: Initializer | None = init.ZeroInit(),
        activation: str | Callable[..., PyTree] = "relu",
        name: str | None = None,
    ):
        super().__init__(in_size, out_size, state_init, name)
        self.activation = as_activation(activation)
        self._make_maps(w_init, b_init)

    def update(self, x: ArrayLike) -> ArrayLike:
        """Take one step with `x` of shape ``(..., in)`` and return the new ``h``."""
        self.h.value = self.activation(self.W(cat(x, self.h.value)))
        return self.h.value


class GRUCell(GatedCell, brainstate.nn.GRUCell):
    r"""Gated recurrent unit.

    .. math::

        z_t &= \sigma(W_z [x_t, h_{t-1}]) \\
        r_t &= \sigma(W_r [x_t, h_{t-1}]) \\
        \tilde h_t &= \phi(W_h [x_t, r_t \circ h_{t-1}]) \\
        h_t &= (1 - z_t) \circ h_{t-1} + z_t \circ \tilde h_t

    {parameters}

    Attributes
    ----------
    h : HiddenState
        Hidden state, of shape ``(*batch, *out_size)``, made by `init_state`.
    Wz, Wr, Wh : Linear
        Maps of :math:`[x, h]` or :math:`[x, r \circ h]`, the input first.

    {raises}

    {examples}
    """

    _maps: ClassVar = {"Wz": "xh", "Wr": "xh", "Wh": "xh"}

    def update(self, x: ArrayLike) -> ArrayLike:
        """Take one step with `x` of shape ``(..., in)`` and return the new ``h``."""
        h = self.h.value
        xh = cat(x, h)
        z = sigmoid(self.Wz(xh))
        r = sigmoid(self.Wr(xh))
        candidate = self.activation(self.Wh(cat(x, r * h)))
        self.h.value = (1 - z) * h + z * candidate
        return self.h.value


class CFNCell(GatedCell, brainstate.nn.RNNCell):
    r"""Chaos-free network cell.

    .. math::

        f_t &= \sigma(W_f [x_t, h_{t-1}]) \\
        i_t &= \sigma(W_i [x_t, h_{t-1}]) \\
        h_t &= f_t \circ \phi(h_{t-1}) + i_t \circ \phi(W_h x_t)

    {parameters}

    Attributes
    ----------
    h : HiddenState
        Hidden state, of shape ``(*batch, *out_size)``, made by `init_state`.
    Wf, Wi : Linear
        Maps of :math:`[x, h]`, the input first.
    Wh : Linear
        Map of :math:`x`.

    {raises}

    {examples}
    """

    _maps: ClassVar = {"Wf": "xh", "Wi": "xh", "Wh": "x"}

    def update(self, x: ArrayLike) -> ArrayLike:
        """Take one step with `x` of shape ``(..., in)`` and return the new ``h``."""
        h = self.h.value
        xh = cat(x, h)
        forget = sigmoid(self.Wf(xh))
        enter = sigmoid(self.Wi(xh))
        self.h.value = forget * self.activation(h) + enter * self.activation(self.Wh(x))
        return self.h.value


class MGUCell(GatedCell, brainstate.nn.MGUCell):
    r"""Minimal gated unit.

    .. math::

        f_t &= \sigma(W_f [x_t, h_{t-1}]) \\
        \tilde h_t &= \phi(W_h [x_t, f_t \circ h_{t-1}]) \\
        h_t &= (1 - f_t) \circ h_{t-1} + f_t \circ \tilde h_t

    {parameters}

    Attributes
    ----------
    h : HiddenState
        Hidden state, of shape ``(*batch, *out_size)``, made by `init_state`.
    Wf, Wh : Linear
        Maps of :math:`[x, h]` and :math:`[x, f \circ h]`, the input first.

    {raises}

    {examples}
    """

    _maps: ClassVar = {"Wf": "xh", "Wh": "xh"}

    def update(self, x: ArrayLike) -> ArrayLike:
        """Take one step with `x` of shape ``(..., in)`` and return the new ``h``."""
        h = self.h.value
        f = sigmoid(self.Wf(cat(x, h)))
        candidate = self.activation(self.Wh(cat(x, f * h)))
        self.h.value = (1 - f) * h + f * candidate
        return self.h.value


class LSTMCell(GatedCell, brainstate.nn.LSTMCell):
    r"""Long short-term memory.

    .. math::

        i_t &= \sigma(W_i [x_t, h_{t-1}]) \\
        g_t &= \phi(W_g [x_t, h_{t-1}]) \\
        f_t &= \sigma(W_f [x_t, h_{t-1}] + 1) \\
        o_t &= \sigma(W_o [x_t, h_{t-1}]) \\
        c_t &= f_t \circ c_{t-1} + i_t \circ g_t \\
        h_t &= o_t \circ \phi(c_t)

    {parameters}

    Attributes
    ----------
    h, c : HiddenState
        Hidden states, of shape ``(*batch, *out_size)``, made by `init_state`.
    Wi, Wg, Wf, Wo : Linear
        Maps of :math:`[x, h]`, the input first.

    {raises}

    {examples}
    """

    hidden: ClassVar = ("c", "h")
    _maps: ClassVar = {"Wi": "xh", "Wg": "xh", "Wf": "xh", "Wo": "xh"}

    def __init__(
        self,
        in_size: Size,
        out_size: Size,
        w_init: Initializer = init.XavierNormal(distribution="normal"),
        b_init: Initializer | None = init.ZeroInit(),
        state_init: Initializer = init.ZeroInit(),
        activation: str | Callable[..., PyTree] = "tanh",
        name: str | None = None,
    ):
        super().__init__(in_size, out_size, w_init, b_init, state_init, activation, name)

    def update(self, x: ArrayLike) -> ArrayLike:
        """Take one step with `x` of shape ``(..., in)`` and return the new ``h``."""
        h, c = self.h.value, self.c.value
        xh = cat(x, h)
        i = sigmoid(self.Wi(xh))
        g = self.activation(self.Wg(xh))
        f = sigmoid(self.Wf(xh) + 1.0)
        o = sigmoid(self.Wo(xh))
        self.c.value = f * c + i * g
        self.h.value = o * self.activation(self.c.value)
        return self.h.value


class URLSTMCell(Cell, brainstate.nn.URLSTMCell):
    r"""Long short-term memory with uniform gate initialisation and a refine gate.

    .. math::

        f_t &= \sigma(W_f [x_t, h_{t-1}] + b) \\
        r_t &= \sigma(W_r [x_t, h_{t-1}] - b) \\
        g_t &= 2 r_t \circ f_t + (1 - 2 r_t) \circ f_t^2 \\
        c_t &= g_t \circ c_{t-1} + (1 - g_t) \circ \phi(W_u [x_t, h_{t-1}]) \\
        h_t &= \sigma(W_o [x_t, h_{t-1}]) \circ \phi(c_t)

    Parameters
    ----------
    in_size, out_size : int or tuple of int
        Size of one input and of one hidden state. Axes in front of the last must agree.
    w_init : callable or array, optional
        Initial weight of each layer.
    state_init : callable or array, optional
        Initial hidden state.
    activation : str or callable, optional
        The function :math:`\phi`, or its name in `brainstate.nn`.
    name : str, optional
        Name of the layer.

    Attributes
    ----------
    h, c : HiddenState
        Hidden states, of shape ``(*batch, *out_size)``, made by `init_state`.
    Wu, Wf, Wr, Wo : Linear
        Maps of :math:`[x, h]`, the input first, without bias.
    bias : ParamState
        The bias :math:`b` of shape ``out_size``, whose :math:`\sigma(b)` starts uniform in :math:`(1/n, 1 - 1/n)`.

    {raises}

    {examples}
    """

    hidden: ClassVar = ("c", "h")
    _maps: ClassVar = {"Wu": "xh", "Wf": "xh", "Wr": "xh", "Wo": "xh"}

    def __init__(
        self,
        in_size: Size,
        out_size: Size,
        w_init: Initializer = init.XavierNormal(distribution="normal"),
        state_init: Initializer = init.ZeroInit(),
        activation: str | Callable[..., PyTree] = "tanh",
        name: str | None = None,
    ):
        super().__init__(in_size, out_size, state_init, name)
        self.activation = as_activation(activation)
        self._make_maps(w_init, None)
        n = self.out_size[-1]
        self.bias = brainstate.ParamState(-jnp.log(1 / brainstate.random.uniform(1 / n, 1 - 1 / n, (n,)) - 1))

    @any_rank
    def update(self, x: ArrayLike) -> ArrayLike:
        """Take one step with `x` of shape ``(..., in)`` and return the new ``h``."""
        h, c = self.h.value, self.c.value
        xh = cat(x, h)
        f = sigmoid(self.Wf(xh) + element_wise(self.bias.value))
        r = sigmoid(self.Wr(xh) - element_wise(self.bias.value))
        g = 2 * r * f + (1 - 2 * r) * f**2
        self.c.value = g * c + (1 - g) * self.activation(self.Wu(xh))
        self.h.value = sigmoid(self.Wo(xh)) * self.activation(self.c.value)
        return self.h.value


class MinimalRNNCell(Cell, brainstate.nn.RNNCell):
    r"""Minimal recurrent cell, which gates an embedding of the input.

    .. math::

        z_t &= \varphi(x_t) \\
        f_t &= \sigma(W_u [z_t, h_{t-1}]) \\
        h_t &= f_t \circ h_{t-1} + (1 - f_t) \circ z_t

    {parameters}

    Attributes
    ----------
    h : HiddenState
        Hidden state, of shape ``(*batch, *out_size)``, made by `init_state`.
    phi : Linear
        Map of :math:`x`, or the callable that was given.
    W_u : Linear
        Map of :math:`[z, h]`.

    Raises
    ------
    AssertionError
        If the sizes differ in an axis in front of the last, or `phi` cannot be called.

    {examples}
    """

    def __init__(
        self,
        in_size: Size,
        out_size: Size,
        w_init: Initializer = Orthogonal(),
        b_init: Initializer | None = init.ZeroInit(),
        state_init: Initializer = init.ZeroInit(),
        phi: Callable[..., PyTree] | None = None,
        name: str | None = None,
    ):
        super().__init__(in_size, out_size, state_init, name)
        self.phi = Linear(in_size, out_size, w_init, b_init) if phi is None else as_activation(phi)
        self.W_u = Linear((*self.out_size[:-1], 2 * self.out_size[-1]), out_size, w_init, b_init)

    def update(self, x: ArrayLike) -> ArrayLike:
        """Take one step with `x` of shape ``(..., in)`` and return the new ``h``."""
        h = self.h.value
        z = self.phi(x)
        f = sigmoid(self.W_u(cat(z, h)))
        self.h.value = f * h + (1 - f) * z
        return self.h.value


class MiniGRU(MiniCell, brainstate.nn.RNNCell):
    r"""Gated recurrent unit with a candidate that depends on the input only.

    .. math::

        z_t &= \sigma(W_z [x_t, h_{t-1}]) \\
        h_t &= (1 - z_t) \circ h_{t-1} + z_t \circ W_x x_t

    {parameters}

    Attributes
    ----------
    h : HiddenState
        Hidden state, of shape ``(*batch, *out_size)``, made by `init_state`.
    W_x : Linear
        Map of :math:`x`.
    W_z : Linear
        Map of :math:`[x, h]`, the input first.

    Raises
    ------
    AssertionError
        If the sizes differ in an axis in front of the last.

    {examples}
    """

    _maps: ClassVar = {"W_x": "x", "W_z": "xh"}

    def update(self, x: ArrayLike) -> ArrayLike:
        """Take one step with `x` of shape ``(..., in)`` and return the new ``h``."""
        h = self.h.value
        z = sigmoid(self.W_z(cat(x, h)))
        self.h.value = (1 - z) * h + z * self.W_x(x)
        return self.h.value


class MiniLSTM(MiniCell, brainstate.nn.RNNCell):
    r"""Long short-term memory with one state and a candidate that depends on the input only.

    .. math::

        f_t &= \sigma(W_f [x_t, h_{t-1}]) \\
        i_t &= \sigma(W_i [x_t, h_{t-1}]) \\
        h_t &= f_t \circ h_{t-1} + i_t \circ W_x x_t

    {parameters}

    Attributes
    ----------
    h : HiddenState
        Hidden state, of shape ``(*batch, *out_size)``, made by `init_state`.
    W_x : Linear
        Map of :math:`x`.
    W_f, W_i : Linear
        Maps of :math:`[x, h]`, the input first.

    Raises
    ------
    AssertionError
        If the sizes differ in an axis in front of the last.

    {examples}
    """

    _maps: ClassVar = {"W_x": "x", "W_f": "xh", "W_i": "xh"}

    def update(self, x: ArrayLike) -> ArrayLike:
        """Take one step with `x` of shape ``(..., in)`` and return the new ``h``."""
        h = self.h.value
        xh = cat(x, h)
        self.h.value = sigmoid(self.W_f(xh)) * h + sigmoid(self.W_i(xh)) * self.W_x(x)
        return self.h.value
