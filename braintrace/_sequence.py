"""Whole sequences: the online gradient of many steps, or many steps without one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Literal

import brainstate
import jax
import jax.numpy as jnp

from ._arguments import (
    check_mask,
    check_step_fn,
    check_weights,
    chunk_length,
    common_length,
    loss_and_aux,
    one_of,
    windows,
)
from ._chunks import ChunkedEvolution, ChunkedGradient, weights_of, zeros_to_add
from ._jax import is_outside
from ._recorder import weighted
from ._types import CompilationWarning, MultiStepData, PyTree, Shape
from ._warn import warn

__all__ = ["SequenceDriverMixin"]


class SequenceDriverMixin:
    """Drives a learner over whole sequences as one ``scan``."""

    __module__ = "braintrace"

    _calls_outside = 0
    _stand_in: Callable[..., PyTree] | None = None
    _per_sample: Any = property(lambda self: self)  # the learner itself, or the one that is mapped

    _is_mapped = False

    def _vmap_shape(self) -> Shape:
        """The size of the mapped axis, if there is one."""
        return ()

    @contextlib.contextmanager
    def _replaced_by(self, call: Callable[..., PyTree]) -> Iterator[None]:
        """What calls this learner calls ``call`` instead."""
        before, self._stand_in = self._stand_in, call
        try:
            yield
        finally:
            self._stand_in = before

    def _driven(self) -> Any:
        if not self._per_sample.is_compiled:
            raise ValueError("The learner is not compiled. Call compile_graph(*example_inputs) first.")
        return self

    def etrace_grad(
        self,
        *sequences: PyTree,
        step_fn: Callable[..., PyTree] | None = None,
        mask: PyTree = None,
        chunk_size: int | None = None,
        weights: Mapping[Any, brainstate.State] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        loss_output: Literal["per_step", "masked", "scalar"] = "per_step",
        has_aux: bool = False,
        return_value: bool = False,
        trace_chunk: int | None = None,
    ) -> PyTree:
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
            Weight of each step's gradient, in a window of each loss; the model and the traces advance at every step.
        chunk_size : int, optional
            ``None`` or 1 for single steps; ``k >= 2`` for windows of k steps (``vjp_method='multi-step'``).
        weights : mapping, optional
            States to differentiate; by default ``param_states``.
        reduction : {'mean', 'sum'}
        loss_output : {'per_step', 'masked', 'scalar'}
            What is returned as the value: raw losses ``(T,)``, losses times mask, or the reduced objective.
        has_aux, return_value : bool
        trace_chunk : int, optional
            Number of calls whose records are kept until their contribution to the gradient is computed as one product;
            by default chosen from the sizes. It changes speed and memory, and results by rounding only.

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
        one_of("reduction", reduction, ("mean", "sum"))
        one_of("loss_output", loss_output, ("per_step", "masked", "scalar"))
        length = common_length(sequences)
        k = self._window_length(chunk_size, length, gradient=True)
        mask = check_mask(mask, length)
        weights = self._per_sample.param_states if weights is None else check_weights(weights)
        step_fn = check_step_fn(step_fn, len(sequences), "that returns the loss of that step")
        index = self._per_sample.running_index

        def objective(slices: tuple[PyTree, ...], m: jax.Array | None) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
            before = index.value
            loss, aux = loss_and_aux(step_fn(*slices), has_aux, () if k is None else (k,))
            if index.value is before:
                raise ValueError(
                    "step_fn did not call the learner whose etrace_grad this is, but the model itself, another "
                    "learner or none: no trace would be part of the gradient. Call this learner in step_fn."
                )
            return jnp.sum(loss if m is None else loss * m.astype(jnp.result_type(loss))), (loss, aux)

        chunk = chunk_length(trace_chunk)

        def run(sequences: tuple[PyTree, ...], mask: jax.Array) -> tuple[list[PyTree], jax.Array, PyTree]:
            items = (windows(sequences, k), windows(mask, k))
            engine = ChunkedGradient(self._per_sample, objective, self._vmap_shape(), chunk, weights)
            total, losses, aux = (
                engine.run(items) if engine.applies(items) else _step_by_step(objective, weights, items)
            )
            losses = losses.reshape(length)
            count = jnp.maximum(mask.sum(), 1)
            if reduction == "mean":
                total = jax.tree.map(lambda g: g / count.astype(g.dtype), total)
            found = [jax.tree.map(lambda g, v: g.astype(v.dtype), total[k], s.value) for k, s in weights.items()]
            masked = losses * mask.astype(losses.dtype)
            if loss_output == "masked":
                losses = masked
            elif loss_output == "scalar":
                losses = masked.sum() / count.astype(losses.dtype) if reduction == "mean" else masked.sum()
            return found, losses, aux

        with _named_weights(weights, self._per_sample.path_to_states.values()):
            found, losses, aux = self._as_one_program(run, sequences, mask)
        total = dict(zip(weights, found))
        out = (total, *((losses,) if return_value else ()), *((aux,) if has_aux else ()))
        return out if len(out) > 1 else total

    def etrace_evolve(
        self,
        *sequences: PyTree,
        step_fn: Callable[..., PyTree] | None = None,
        chunk_size: int | None = None,
        return_outputs: bool = False,
    ) -> PyTree:
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
        length = common_length(sequences)
        k = self._window_length(chunk_size, length, gradient=False)
        if step_fn is not None:
            check_step_fn(step_fn, len(sequences), "or None")

        def body(slices: tuple[PyTree, ...]) -> PyTree:
            wrapped = slices if k is None else map(MultiStepData, slices)
            out = learner(*wrapped) if step_fn is None else step_fn(*slices)
            return out if return_outputs else None

        recorded = k is None or self._per_sample.vjp_method == "multi-step"

        def run(sequences: tuple[PyTree, ...]) -> PyTree:
            items = windows(sequences, k)
            engine = ChunkedEvolution(self._per_sample, body, self._vmap_shape())
            applies = recorded and engine.applies((items,))
            return engine.run(items) if applies else brainstate.transform.for_loop(body, items)

        outputs = self._as_one_program(run, sequences)
        return outputs if return_outputs else None

    def _as_one_program(self, run: Callable[..., PyTree], sequences: tuple[PyTree, ...], *more: PyTree) -> PyTree:
        """``run(sequences, *more)``; outside of any transformation, as a program that nothing holds afterwards.

        JAX keeps what it compiles for a loop that is run as such, and traces ``step_fn``, a new function at each call
        as far as it can tell, to another loop every time.
        """
        with self._explained(sequences):
            if not is_outside():
                return run(sequences, *more)
            out = brainstate.transform.jit(lambda *args: run(*args))(sequences, *more)
        self._calls_outside += 1
        if self._calls_outside == 3:
            warn(
                "etrace_grad and etrace_evolve trace and compile their loop anew at every call outside of a "
                "transformation, which takes far longer than the loop itself. Call them in a function wrapped in "
                "brainstate.transform.jit.",
                CompilationWarning,
            )
        return out

    @contextlib.contextmanager
    def _explained(self, sequences: tuple[PyTree, ...]) -> Iterator[None]:
        """What fails under a driver fails with what the driver knows about it."""
        try:
            yield
        except jax.errors.UnexpectedTracerError as error:
            raise TypeError(
                "step_fn calls the learner inside a transformation of JAX itself (jax.lax.cond, jax.jit, jax.grad, "
                "...), which loses the states that the call writes. Use that of brainstate.transform there."
            ) from error
        except (TypeError, ValueError) as error:
            size, _ = self._per_sample._leading_size()
            shapes = [jnp.shape(x) for x in jax.tree.leaves(sequences)]
            if any(s[0] != size for s in shapes) or all(len(s) == 1 or s[1] == size for s in shapes):
                raise
            raise ValueError(
                f"Axis 0 of a sequence is time; the sequences have the shapes {shapes}, and {size} is the batch size "
                "of the states. If the batch is in front, pass jnp.swapaxes(sequence, 0, 1). What failed: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _window_length(self, chunk_size: object, length: int, *, gradient: bool) -> int | None:
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
        if self._is_mapped:
            raise ValueError("Windows (chunk_size >= 2) cannot be used on a mapped learner; use chunk_size=None.")
        if gradient and self._per_sample.vjp_method != "multi-step":
            raise ValueError("Windows (chunk_size >= 2) need a learner made with vjp_method='multi-step'.")
        return chunk_size


@contextlib.contextmanager
def _named_weights(weights: Mapping[Hashable, brainstate.State], read: Iterable[brainstate.State]) -> Iterator[None]:
    """A state that nothing reads has no gradient: it is refused by its key."""
    try:
        yield
    except ValueError as error:
        known = set(map(id, read))
        others = [key for key, state in weights.items() if id(state) not in known]
        if "check_states" not in str(error) or not others:
            raise
        raise ValueError(
            f"step_fn does not read every state in weights; those that the model's step does not read either have the "
            f"keys {others}. Pass those that it reads, such as learner.param_states."
        ) from error


def _step_by_step(
    objective: Callable[..., tuple[jax.Array, tuple[jax.Array, PyTree]]],
    weights: Mapping[Hashable, brainstate.State],
    items: tuple[PyTree, PyTree],
) -> tuple[dict[Hashable, PyTree], jax.Array, PyTree]:
    """The gradient of a sequence as a sum of gradients of its steps."""
    gradient = brainstate.transform.grad(objective, weights, has_aux=True)

    def body(
        total: dict[Hashable, PyTree], item: tuple[tuple[PyTree, ...], jax.Array]
    ) -> tuple[dict[Hashable, PyTree], tuple[jax.Array, PyTree]]:
        slices, m = item
        of_losses, of_call = weights_of(m)
        grads, (loss, aux) = gradient(slices, of_losses)
        return jax.tree.map(jnp.add, total, weighted(grads, of_call)), (loss, aux)

    zeros = zeros_to_add({p: s.value for p, s in weights.items()})
    total, (losses, aux) = brainstate.transform.scan(body, zeros, items)
    return total, losses, aux
