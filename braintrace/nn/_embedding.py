"""Tables of vectors."""

from __future__ import annotations

import brainstate
import numpy as np
from brainstate.nn import init
from brainstate.typing import ArrayLike, Size

from braintrace._ops import lookup

from ._base import Initializer, initialize, parameter


class Embedding(brainstate.nn.Embedding):
    r"""Rows of a trained table, through :func:`braintrace.embedding`.

    Parameters
    ----------
    num_embeddings : int
        Number of rows.
    embedding_size : int or tuple of int
        Shape of one row.
    embedding_init : callable or array, optional
        Initial table, of shape ``(num_embeddings, *embedding_size)``.
    padding_idx, max_norm, norm_type, scale_grad_by_freq, freeze : optional
        Options of the `brainstate` layer that an eligibility trace cannot follow; only their defaults are accepted.
    name : str, optional
        Name of the layer.
    param_type : type, optional
        Class of the parameter state.

    Attributes
    ----------
    weight : ParamState
        The table, an array.

    Raises
    ------
    NotImplementedError
        If an option has another value than its default.
    TypeError
        If the indices are no integers.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import braintrace
    >>> layer = braintrace.nn.Embedding(10, 3)
    >>> layer(jnp.array([[1, 2], [3, 4]])).shape
    (2, 2, 3)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_size: Size,
        embedding_init: Initializer = init.LecunUniform(),
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        freeze: bool = False,
        name: str | None = None,
        param_type: type = brainstate.ParamState,
    ):
        brainstate.nn.Module.__init__(self, name=name)
        self.num_embeddings = int(num_embeddings)
        self.out_size = tuple(int(n) for n in np.ravel(embedding_size))
        self.embedding_size = self.out_size
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, max_norm, norm_type
        self.scale_grad_by_freq, self.freeze = scale_grad_by_freq, freeze
        self._refuse_options()
        if self.num_embeddings < 0 or not self.out_size or min(self.out_size) < 0:
            raise ValueError(
                f"Embedding takes a number of rows and a shape of one row, got num_embeddings={num_embeddings} and "
                f"embedding_size={embedding_size}."
            )
        self.weight = parameter(param_type, initialize(embedding_init, (self.num_embeddings, *self.out_size)))

    def _refuse_options(self) -> None:
        given: dict[str, object] = {
            "padding_idx": self.padding_idx is not None and self.padding_idx,
            "max_norm": self.max_norm is not None and self.max_norm,
            "scale_grad_by_freq": self.scale_grad_by_freq,
            "freeze": self.freeze,
        }
        offending = [f"{k}={v!r}" for k, v in given.items() if v is not False]
        if offending:
            raise NotImplementedError(
                f"Embedding was given {', '.join(offending)}, which changes the gradient in a way that an eligibility "
                "trace does not follow. Leave it at its default, or use brainstate.nn.Embedding, which is trained by "
                "the current step alone."
            )

    def update(self, indices: ArrayLike) -> ArrayLike:
        """Look up `indices` of any shape; the result has their shape followed by `embedding_size`."""
        self._refuse_options()
        return lookup(indices, self.weight.value)
