"""What the layers share: sizes, initial values and hidden states."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import ClassVar, TypeAlias

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from brainstate.nn import init
from brainstate.typing import ArrayLike, Size

from braintrace._types import PyTree, Shape

Initializer: TypeAlias = Callable[..., PyTree] | ArrayLike  # a callable of the shape, or the values themselves


class Orthogonal(init.Orthogonal):
    """Orthonormal rows or columns, whichever are fewer, from a normal matrix of the shape of the result.

    `brainstate.nn.init.Orthogonal` draws the transpose of a matrix with more columns than rows: another one of a seed.
    """

    def __call__(self, shape: Shape, **kwargs: object) -> ArrayLike:
        del kwargs
        rows, cols = shape
        normal = self.rng.normal(size=shape)
        tall = normal if rows >= cols else normal.T
        q, r = jnp.linalg.qr(tall.astype(jnp.promote_types(tall.dtype, jnp.float32)))  # there is none in half precision
        q = self.scale * (q * jnp.sign(jnp.diag(r))[None]).astype(normal.dtype)
        return u.maybe_decimal(u.Quantity(q if rows >= cols else q.T, unit=self.unit))


def initialize(initializer: Initializer, shape: Shape) -> ArrayLike:
    """Make an array of exactly `shape`.

    A number fills it, an array is broadcast to it, a callable is called with the whole shape. Units pass through.
    """
    if u.math.isscalar(initializer):
        initializer = init.Constant(initializer)
    value = initializer(shape) if callable(initializer) else u.math.asarray(initializer)
    value = jax.tree.map(jnp.asarray, value)
    extra = max(value.ndim - len(shape), 0)
    if extra and set(value.shape[:extra]) == {1}:  # a row, say, for a bias
        value = value.reshape(value.shape[extra:])
    return value if value.shape == shape else u.math.broadcast_to(value, shape)


OF_OLDER_LAYERS = frozenset("ETraceParam ElemWiseParam NonTempParam FakeETraceParam FakeElemWiseParam".split())


def parameter(param_type: Callable[..., brainstate.ParamState], value: PyTree) -> brainstate.ParamState:
    """Make a layer's parameter."""
    name = getattr(param_type, "__name__", "")
    if name in OF_OLDER_LAYERS:
        raise TypeError(
            f"param_type={name} of version 0.1 is gone: every layer of braintrace.nn is trained online wherever it "
            "drives a hidden state. Leave param_type out; take the layer of brainstate.nn where it shall not be."
        )
    return param_type(value)


def fill_in(cls: type, **texts: str) -> None:
    """Put texts into the docstring of a class: each in place of a line that has its name in braces."""
    mark = re.compile(rf"^( *)\{{({'|'.join(texts)})\}}$", flags=re.M)
    cls.__doc__ = cls.__doc__ and mark.sub(lambda m: textwrap.indent(texts[m[2]], m[1]), cls.__doc__)


def set_sizes(module: brainstate.nn.Module, in_size: Size, out_size: Size) -> None:
    """Store both sizes on `module` as tuples; a layer maps the last axis only, so the others must agree."""
    module.in_size = in_size
    module.out_size = out_size
    if module.in_size[:-1] != module.out_size[:-1]:
        raise AssertionError(
            f"{type(module).__name__} maps the last axis and keeps the others, but in_size={module.in_size} and "
            f"out_size={module.out_size} differ in front of it. Pass sizes that agree in all axes but the last."
        )


def as_activation(activation: str | Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Resolve an activation: a callable as it is, a string as the function of that name in `brainstate.nn`."""
    if isinstance(activation, str):
        return getattr(brainstate.nn, activation)
    if not callable(activation):
        raise AssertionError(
            f"Got {activation!r} of type {type(activation).__name__} as activation, which cannot be called. "
            "Pass a function, or the name of one in brainstate.nn such as 'tanh'."
        )
    return activation


def cat(x: ArrayLike, h: ArrayLike) -> ArrayLike:
    """Join input and hidden state along the last axis, the input first."""
    bare = not any(isinstance(part, u.Quantity) for part in (x, h))
    return (jnp if bare else u.math).concatenate([x, h], axis=-1)


class Recurrent(brainstate.nn.Module):
    """A layer whose hidden states, named in `hidden`, all have the shape `out_size` and one initialiser."""

    hidden: ClassVar[tuple[str, ...]] = ("h",)

    def __init__(self, in_size: Size, out_size: Size, state_init: Initializer, name: str | None = None):
        # Not `super().__init__`: the next class may be the brainstate cell of the same name, with other parameters.
        brainstate.nn.Module.__init__(self, name=name)
        set_sizes(self, in_size, out_size)
        self.state_init = state_init

    def init_state(self, batch_size: int | None = None, **kwargs: object) -> None:
        """Create the hidden states, each of shape `(batch_size, *out_size)`, or `out_size` without a batch."""
        del kwargs
        for name in self.hidden:
            setattr(self, name, brainstate.HiddenState(self._initial(batch_size)))

    def reset_state(self, batch_size: int | None = None, **kwargs: object) -> None:
        """Refill the existing hidden states with their initial values."""
        del kwargs
        for name in self.hidden:
            getattr(self, name).value = self._initial(batch_size)

    def _initial(self, batch_size: int | None) -> ArrayLike:
        lead = () if batch_size is None else (batch_size,)
        if batch_size is None and not callable(self.state_init):  # an array may bring a batch axis of its own
            lead = np.shape(u.get_mantissa(self.state_init))[: -len(self.out_size)]
        return initialize(self.state_init, (*lead, *self.out_size))
