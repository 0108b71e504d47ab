"""Whole sequences: the online gradient of many steps, or many steps without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import brainstate
import jax
import jax.numpy as jnp

from ._types import MultiStepData, SingleStepData

__all__ = ["ETraceVmap", "SequenceDriverMixin"]


class SequenceDriverMixin:
    """Drives a learner over whole sequences as one ``scan``."""

    __module__ = "braintrace"

    _per_sample: Any = property(lambda self: self)  # the learner itself, or the one that is mapped

    def _driven(self) -> Any:
        if not self._per_sample.is_compiled:
            raise ValueError("The learner is not compiled. Call compile_graph(*example_inputs) first.")
        return self

    def etrace_grad(
        self,
        *sequences: Any,
        step_fn: Callable[..., Any] | None = None,
        mask: Any = None,
        chunk_size: int | None = None,
        weights: Mapping[Any, brainstate.State] | None = None,
        reduction: str = "mean",
        loss_output: str = "per_step",
        has_aux: bool = False,
        return_value: bool = False,
    ) -> Any:
        r"""Online gradient over a sequence, :math:`\sum_t m_t\, g_t` (divided by :math:`\max(\sum m, 1)` for the mean).

        Parameters
        ----------
        *sequences : pytree of array, shape ``(T, ...)``
            Sliced in lockstep along axis 0 and passed to ``step_fn``.
        step_fn : callable
            ``step_fn(*slices)`` calls the learner once and returns the step's scalar loss, or ``(loss, aux)``. In
            window mode slices have shape ``(k, ...)``, ``step_fn`` wraps them in :class:`MultiStepData`, and returns
            ``k`` losses.
        mask : array, shape ``(T,)``, optional
            Weight of each step's loss; the model and the traces advance at every step.
        chunk_size : int, optional
            ``None`` or 1 for single steps; ``k >= 2`` for windows of k steps (``vjp_method='multi-step'``).
        weights : mapping, optional
            States to differentiate; by default ``param_states``.
        reduction : {'mean', 'sum'}
        loss_output : {'per_step', 'masked', 'scalar'}
            What is returned as the value: raw losses ``(T,)``, losses times mask, or the reduced objective.
        has_aux, return_value : bool

        Returns
        -------
        grads, or (grads, value), (grads, aux), (grads, value, aux)
            ``grads`` is keyed like ``weights``; ``aux`` is stacked over steps (windows).

        Raises
        ------
        ValueError, TypeError
            For sequences, masks, losses and options that do not fit; the message names the leaf, shape or number.

        Notes
        -----
        Afterwards the model, the traces and ``running_index`` stand where the same calls one by one would leave them.

        Examples
        --------
        >>> import brainstate, braintrace, jax.numpy as jnp
        >>> cell = braintrace.nn.GRUCell(2, 3)
        >>> learner = braintrace.compile(cell, 'pp_prop', jnp.zeros(2), decay_or_rank=0.9)
        >>> grads = learner.etrace_grad(jnp.ones((10, 2)), step_fn=lambda x: (learner(x) ** 2).sum())
        >>> sorted(grads)
        [('Wh', 'weight'), ('Wr', 'weight'), ('Wz', 'weight')]
        """
        self._driven()
        if step_fn is None:
            raise TypeError("etrace_grad: pass step_fn, a function of one slice that returns the loss of that step.")
        _one_of("reduction", reduction, ("mean", "sum"))
        _one_of("loss_output", loss_output, ("per_step", "masked", "scalar"))
        length = _common_length(sequences)
        k = self._window_length(chunk_size, length, gradient=True)
        mask = _check_mask(mask, length)
        weights = self._per_sample.param_states if weights is None else weights

        def objective(slices, m):
            result = step_fn(*slices)
            loss, aux = result if has_aux else (result, None)
            expected = () if k is None else (k,)
            if jnp.shape(loss) != expected:
                raise ValueError(
                    f"step_fn must return a loss of shape {expected}, got {jnp.shape(loss)}"
                    + (". Sum or average it over batch and features." if k is None else ", one per step of the window.")
                )
            return jnp.sum(loss * m.astype(jnp.result_type(loss))), (loss, aux)

        gradient = brainstate.transform.grad(objective, weights, has_aux=True)

        def body(total, item):
            slices, m = item
            grads, (loss, aux) = gradient(slices, m)
            return jax.tree.map(jnp.add, total, grads), (loss, aux)

        items = (_windows(sequences, k), _windows(mask, k))
        zeros = jax.tree.map(jnp.zeros_like, {p: s.value for p, s in weights.items()})
        total, (losses, aux) = brainstate.transform.scan(body, zeros, items)
        losses = losses.reshape(length)
        count = jnp.maximum(mask.sum(), 1)
        if reduction == "mean":
            total = jax.tree.map(lambda g: g / count.astype(g.dtype), total)
        masked = losses * mask.astype(losses.dtype)
        if loss_output == "masked":
            losses = masked
        elif loss_output == "scalar":
            losses = masked.sum() / count.astype(losses.dtype) if reduction == "mean" else masked.sum()
        out = (total, *((losses,) if return_value else ()), *((aux,) if has_aux else ()))
        return out if len(out) > 1 else total

    def etrace_evolve(
        self,
        *sequences: Any,
        step_fn: Callable[..., Any] | None = None,
        chunk_size: int | None = None,
        return_outputs: bool = False,
    ) -> Any:
        """Advance the model and the traces over a sequence, without a loss.

        Parameters
        ----------
        *sequences : pytree of array, shape ``(T, ...)``
        step_fn : callable, optional
            ``step_fn(*slices)`` calls the learner once; by default the learner itself is called on the slices.
        chunk_size : int, optional
            As in :meth:`etrace_grad`; windows are allowed for both VJP methods.
        return_outputs : bool
            Whether to return the outputs, stacked on a leading axis.

        Returns
        -------
        None or pytree
        """
        learner = self._driven()
        length = _common_length(sequences)
        k = self._window_length(chunk_size, length, gradient=False)
        if step_fn is None:

            def step_fn(*slices):
                return learner(*(slices if k is None else map(MultiStepData, slices)))

        def body(slices):
            out = step_fn(*slices)
            return out if return_outputs else None

        outputs = brainstate.transform.for_loop(body, _windows(sequences, k))
        return outputs if return_outputs else None

    def _window_length(self, chunk_size: Any, length: int, *, gradient: bool) -> int | None:
        if chunk_size is None:
            return None
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
            raise TypeError(f"chunk_size must be a Python int or None, got {type(chunk_size).__name__}.")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        if chunk_size == 1:
            return None
        if length % chunk_size:
            raise ValueError(f"The sequence length {length} is no multiple of chunk_size={chunk_size}.")
        if isinstance(self, ETraceVmap):
            raise ValueError("Windows (chunk_size >= 2) cannot be used on a mapped learner; use chunk_size=None.")
        if gradient and self._per_sample.vjp_method != "multi-step":
            raise ValueError("Windows (chunk_size >= 2) need a learner made with vjp_method='multi-step'.")
        return chunk_size


class ETraceVmap(SequenceDriverMixin, brainstate.nn.Vmap):
    """A learner of single samples, mapped over a batch.

    Parameters
    ----------
    module : ETraceAlgorithm
        The learner of one sample, compiled under ``brainstate.transform.vmap_new_states``.
    in_axes, out_axes, vmap_states, vmap_out_states, axis_name, axis_size
        As for ``brainstate.nn.Vmap``.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> x = jnp.ones((4, 2))
    >>> cell = braintrace.nn.GRUCell(2, 3)
    >>> learner = braintrace.compile(cell, 'pp_prop', x, batch_size=4, vmap=True, decay_or_rank=0.9)
    >>> learner(x).shape
    (4, 3)
    """

    __module__ = "braintrace"

    _per_sample: Any = property(lambda self: self.module)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")


def _common_length(sequences: tuple[Any, ...]) -> int:
    if not sequences:
        raise ValueError("Pass at least one sequence.")
    wrapped = lambda x: isinstance(x, (SingleStepData, MultiStepData))  # noqa: E731
    lengths: dict[int, str] = {}
    for i, sequence in enumerate(sequences):
        leaves = jax.tree.leaves(sequence, is_leaf=wrapped)
        if not leaves:
            raise ValueError(f"Sequence {i} is an empty pytree.")
        for leaf in leaves:
            if wrapped(leaf):
                raise TypeError(f"Sequence {i} holds {type(leaf).__name__}; pass bare arrays with time as axis 0.")
            if jnp.ndim(leaf) == 0:
                raise ValueError(f"Sequence {i} holds a scalar; axis 0 of every leaf must be time.")
            lengths.setdefault(jnp.shape(leaf)[0], f"sequence {i}, shape {jnp.shape(leaf)}")
    if len(lengths) > 1:
        raise ValueError(f"The sequences have different lengths: {lengths}.")
    length = next(iter(lengths))
    if length == 0:
        raise ValueError("The sequences have length 0.")
    return length


def _check_mask(mask: Any, length: int) -> jax.Array:
    if mask is None:
        return jnp.ones(length)
    mask = jnp.asarray(mask)
    if mask.shape != (length,):
        raise ValueError(f"mask must have shape ({length},), got {mask.shape}.")
    return mask if jnp.issubdtype(mask.dtype, jnp.floating) else mask.astype(jnp.result_type(float))


def _windows(tree: Any, k: int | None) -> Any:
    return tree if k is None else jax.tree.map(lambda x: jnp.reshape(x, (-1, k, *jnp.shape(x)[1:])), tree)
