"""Linear layers with few weights: stored entries of a sparse matrix, factors of low rank, groups."""

from __future__ import annotations

from collections.abc import Callable

import brainstate
import numpy as np
from brainstate.nn import init
from brainstate.typing import ArrayLike, Size

from braintrace._ops import grouped, low_rank, pattern_of, sparse_product
from braintrace._ops.sparse import Matrix
from braintrace._types import PyTree, Shape

from ._base import Initializer, initialize, parameter, set_sizes


def _as_tuple(size: Size) -> Shape:
    return tuple(int(n) for n in np.ravel(size))


class GroupedLinear(brainstate.nn.Module):
    r"""Affine map of every group by itself, :math:`y_g = x_g W_g + b_g`, through :func:`braintrace.grouped_matmul`.

    Parameters
    ----------
    num_groups, in_features, out_features : int
        Number of groups, and the size of one group's input and output.
    w_init : callable or array, optional
        Initial weight, of shape ``(num_groups, in_features, out_features)``.
    b_init : callable, array or None, optional
        Initial bias, of shape ``(num_groups, out_features)``. ``None`` leaves the bias out.
    name : str, optional
        Name of the layer.
    param_type : type, optional
        Class of the parameter state.

    Attributes
    ----------
    weight : ParamState
        ``{'weight': ..., 'bias': ...}``, without ``'bias'`` if `b_init` is None.
    in_size, out_size : tuple of int
        ``(num_groups, in_features)`` and ``(num_groups, out_features)``.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import braintrace
    >>> layer = braintrace.nn.GroupedLinear(4, 3, 2)
    >>> layer(jnp.ones((5, 4, 3))).shape  # any leading axes
    (5, 4, 2)
    """

    def __init__(
        self,
        num_groups: int,
        in_features: int,
        out_features: int,
        # With the fan-in of a kernel (out, in, window) a seed gives the weights of the published layer.
        w_init: Initializer = init.KaimingNormal(distribution="normal", in_axis=1, out_axis=0),
        b_init: Initializer | None = init.ZeroInit(),
        name: str | None = None,
        param_type: type = brainstate.ParamState,
    ):
        super().__init__(name=name)
        self.num_groups, self.in_features, self.out_features = num_groups, in_features, out_features
        set_sizes(self, (num_groups, in_features), (num_groups, out_features))
        params = {"weight": initialize(w_init, (num_groups, in_features, out_features))}
        if b_init is not None:
            params["bias"] = initialize(b_init, (num_groups, out_features))
        self.weight = parameter(param_type, params)

    def update(self, x: ArrayLike) -> ArrayLike:
        """Map `x` of shape ``(..., num_groups, in_features)`` to ``(..., num_groups, out_features)``."""
        params = self.weight.value
        return grouped(x, params["weight"], params.get("bias"))


class SparseLinear(brainstate.nn.SparseLinear):
    r"""Product with a sparse matrix whose stored entries are trained, through :func:`braintrace.sparse_matmul`.

    Parameters
    ----------
    spar_mat : brainevent.DataRepresentation, or another sparse matrix that the operation takes
        Says where the entries are, and gives their initial values. Shape ``(in, out)``.
    b_init : callable, array or None, optional
        Initial bias, of shape ``(out,)``. ``None`` leaves the bias out.
    in_size : int or tuple of int, optional
        Size of one input; by default the rows of the matrix.
    name : str, optional
        Name of the layer.
    param_type : type, optional
        Class of the parameter state.

    Attributes
    ----------
    weight : ParamState
        ``{'weight': data}``, and a ``'bias'`` of shape ``(out,)`` if `b_init` is given.
    spar_mat
        The matrix.

    Raises
    ------
    TypeError
        If `spar_mat` is no sparse matrix.
    ValueError
        If the last axis of `in_size` is not the number of its rows.

    Examples
    --------
    >>> import brainevent
    >>> import jax.numpy as jnp
    >>> import braintrace
    >>> matrix = brainevent.CSR.fromdense(jnp.array([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]))
    >>> layer = braintrace.nn.SparseLinear(matrix)
    >>> layer(jnp.ones((5, 2))).shape  # any leading axes
    (5, 3)
    """

    def __init__(
        self,
        spar_mat: Matrix,
        b_init: Initializer | None = None,
        in_size: Size | None = None,
        name: str | None = None,
        param_type: type = brainstate.ParamState,
    ):
        brainstate.nn.Module.__init__(self, name=name)
        self._pattern = pattern_of(spar_mat)
        rows, cols = self._pattern.shape
        self.in_size = size = (rows,) if in_size is None else _as_tuple(in_size)
        if size[-1] != rows:
            raise ValueError(
                f"SparseLinear: in_size={size} ends in {size[-1]}, the matrix of shape {(rows, cols)} takes {rows} "
                "inputs. Pass a size that ends in them."
            )
        self.out_size = (*size[:-1], cols)
        self.spar_mat = spar_mat
        params = {"weight": spar_mat.data}
        if b_init is not None:
            params["bias"] = initialize(b_init, (cols,))
        self.weight = parameter(param_type, params)

    def update(self, x: ArrayLike) -> ArrayLike:
        """Map `x` of shape ``(..., in)`` to ``(..., out)``."""
        params = self.weight.value
        return sparse_product(x, params["weight"], self._pattern, params.get("bias"))


class LoRA(brainstate.nn.LoRA):
    r"""Product of low rank, :math:`y = x A B / r`, through :func:`braintrace.lora_matmul`, beside another layer.

    Parameters
    ----------
    in_features, out_features : int or tuple of int
        Size of one input and of one output. Axes in front of the last must agree.
    lora_rank : int
        The rank :math:`r`.
    base_module : callable, optional
        A layer whose output is added.
    kernel_init : callable or array, or a pair of them, optional
        Initial value of both factors, or of ``lora_a`` and ``lora_b``. Each may carry a unit of its own.
    param_type : type, optional
        Class of the parameter state.
    in_size : int or tuple of int, optional
        Size of one input, where it has more axes than the last; another way to say it than `in_features`.

    Attributes
    ----------
    weight : ParamState
        ``{'lora_a': (in_features, lora_rank), 'lora_b': (lora_rank, out_features)}``: here ``lora_a`` is the factor on
        the side of the input.

    Raises
    ------
    ValueError
        If `base_module` cannot be called.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import braintrace
    >>> layer = braintrace.nn.LoRA(3, 1, 2, base_module=braintrace.nn.Linear(3, 2))
    >>> layer(jnp.ones((5, 3))).shape  # any leading axes
    (5, 2)
    """

    def __init__(
        self,
        in_features: Size,
        lora_rank: int,
        out_features: Size,
        *,
        base_module: Callable[..., PyTree] | None = None,
        kernel_init: Initializer | tuple[Initializer, Initializer] = init.LecunNormal(),
        param_type: type = brainstate.ParamState,
        in_size: Size | None = None,
    ):
        brainstate.nn.Module.__init__(self)
        if base_module is not None and not callable(base_module):
            raise ValueError(f"LoRA: base_module must be a layer or function, got {type(base_module).__name__}.")
        set_sizes(self, in_features, out_features)
        rows, cols = self.in_size[-1], self.out_size[-1]
        if in_size is not None:
            set_sizes(self, in_size, (*_as_tuple(in_size)[:-1], cols))
        self.in_features, self.lora_rank, self.out_features = rows, lora_rank, cols
        self.base_module = base_module
        a_init, b_init = kernel_init if isinstance(kernel_init, (tuple, list)) else (kernel_init, kernel_init)
        self.weight = parameter(
            param_type,
            {
                "lora_a": initialize(a_init, (rows, lora_rank)),
                "lora_b": initialize(b_init, (lora_rank, cols)),
            },
        )

    __call__ = brainstate.nn.Module.__call__

    def update(self, x: ArrayLike) -> ArrayLike:
        """Map `x` of shape ``(..., in_features)`` to ``(..., out_features)``."""
        params = self.weight.value
        y = low_rank(x, params["lora_a"], params["lora_b"], alpha=1 / self.lora_rank)
        return y if self.base_module is None else y + self.base_module(x)
