"""Whole sequences: the online gradient of many steps, or many steps without one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from brainstate.util import FlattedDict

from ._chunks import ChunkedEvolution, ChunkedGradient, zeros_to_add
from ._compiler.graph import ETraceGraph
from ._compiler.report import CompilationReport
from ._jax import is_outside, trace_context
from ._types import CompilationWarning, Held, MultiStepData, Path, SingleStepData
from ._warn import warn

__all__ = ["ETraceVmap", "SequenceDriverMixin", "common_length"]


class SequenceDriverMixin:
    """Drives a learner over whole sequences as one ``scan``."""

    __module__ = "braintrace"

    _calls_outside = 0
    _stand_in: Any = None
    _per_sample: Any = property(lambda self: self)  # the learner itself, or the one that is mapped

    def _vmap_shape(self) -> tuple[int, ...]:
        """The size of the mapped axis, if there is one."""
        return ()

    @contextlib.contextmanager
    def _replaced_by(self, call: Callable[..., Any]) -> Iterator[None]:
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
        *sequences: Any,
        step_fn: Callable[..., Any] | None = None,
        mask: Any = None,
        chunk_size: int | None = None,
        weights: Mapping[Any, brainstate.State] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        loss_output: Literal["per_step", "masked", "scalar"] = "per_step",
        has_aux: bool = False,
        return_value: bool = False,
        trace_chunk: int | None = None,
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
        if not callable(step_fn):
            raise TypeError(
                f"step_fn must be a function of one slice that returns the loss of that step, got {step_fn!r}."
            )
        _one_of("reduction", reduction, ("mean", "sum"))
        _one_of("loss_output", loss_output, ("per_step", "masked", "scalar"))
        length = common_length(sequences)
        k = self._window_length(chunk_size, length, gradient=True)
        mask = _check_mask(mask, length)
        weights = self._per_sample.param_states if weights is None else _check_weights(weights)
        _check_arguments(step_fn, len(sequences))
        index = self._per_sample.running_index

        def objective(slices, m):
            before = index.value
            loss, aux = _loss_and_aux(step_fn(*slices), has_aux, () if k is None else (k,))
            if index.value is before:
                raise ValueError(
                    "step_fn did not call the learner whose etrace_grad this is, but the model itself, another "
                    "learner or none: no trace would be part of the gradient. Call this learner in step_fn."
                )
            return jnp.sum(loss if m is None else loss * m.astype(jnp.result_type(loss))), (loss, aux)

        chunk = _chunk_length(trace_chunk)

        def run(sequences, mask):
            items = (_windows(sequences, k), _windows(mask, k))
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

        found, losses, aux = self._as_one_program(run, sequences, mask)
        total = dict(zip(weights, found))
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
        length = common_length(sequences)
        k = self._window_length(chunk_size, length, gradient=False)
        if not (step_fn is None or callable(step_fn)):
            raise TypeError(f"step_fn must be a function of one slice, or None, got {step_fn!r}.")
        if step_fn is not None:
            _check_arguments(step_fn, len(sequences))

        def body(slices):
            wrapped = slices if k is None else map(MultiStepData, slices)
            out = learner(*wrapped) if step_fn is None else step_fn(*slices)
            return out if return_outputs else None

        recorded = k is None or self._per_sample.vjp_method == "multi-step"

        def run(sequences):
            items = _windows(sequences, k)
            engine = ChunkedEvolution(self._per_sample, body, self._vmap_shape())
            applies = recorded and engine.applies((items,))
            return engine.run(items) if applies else brainstate.transform.for_loop(body, items)

        outputs = self._as_one_program(run, sequences)
        return outputs if return_outputs else None

    def _as_one_program(self, run: Callable[..., Any], sequences: tuple[Any, ...], *more: Any) -> Any:
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
    def _explained(self, sequences: tuple[Any, ...]) -> Iterator[None]:
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

    What else is asked of it (:attr:`report`, :attr:`param_states`, :meth:`reset_state`, ...) is asked of its learner;
    traces and other states have the mapped axis in front.

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

    def __init__(
        self,
        module: Any,
        in_axes: Any = 0,
        out_axes: Any = 0,
        vmap_states: Any = None,
        vmap_out_states: Any = None,
        axis_name: Any = None,
        axis_size: int | None = None,
    ):
        super().__init__(module, in_axes, out_axes, vmap_states, vmap_out_states, axis_name, axis_size)
        self._filters = Held((vmap_states, vmap_out_states))
        self._functions = Held((None, None, None))

    def _vmap_shape(self) -> tuple[int, ...]:
        state = next(iter(self.module.hidden_states.values()))
        return (jax.tree.leaves(state.value)[0].shape[0],)

    def _mapped(self, options: dict[str, Any]) -> tuple[Callable, Callable]:
        """The mapped call, and the same under a driver, for the module and the states that it has now."""
        module = self.module
        key = [options, id(module), *map(id, module.states().values())]
        if self._functions.value[0] == key:
            return self._functions.value[1:]

        def run(args, kwargs):
            return module(*args, **kwargs, **options)

        def record(zeros, args, kwargs):
            with module._recording(zeros) as inner:
                out = module(*args, **kwargs, **options)
            self._recorded_length = inner.length
            return out, inner.recorded

        ins, outs = (_states_by_axis(module, f) for f in self._filters.value)
        over = dict(in_states=ins, out_states=outs, axis_name=self.axis_name, axis_size=self.axis_size)
        axes = tuple(self.in_axes) if isinstance(self.in_axes, (tuple, list)) else self.in_axes
        mapped = brainstate.transform.vmap
        functions = (
            mapped(run, in_axes=(axes, 0), out_axes=self.out_axes, **over),
            mapped(record, in_axes=(0, axes, 0), out_axes=(self.out_axes, 0), **over),
        )
        self._functions = Held((key, *functions))
        return functions

    @property
    def report(self) -> CompilationReport:
        """What is trained online and what is not, of one sample."""
        return self.module.report

    @property
    def graph(self) -> ETraceGraph:
        """The compiled graph of one sample."""
        return self.module.graph

    @property
    def param_states(self) -> FlattedDict:
        """Path -> parameter, for the parameters that the step reads."""
        return self.module.param_states

    @property
    def hidden_states(self) -> FlattedDict:
        """Path -> hidden state, for those that the step touches."""
        return self.module.hidden_states

    def get_etrace_of(self, weight: brainstate.ParamState | Path) -> Any:
        """The traces of one parameter, as the learner's method of that name gives them."""
        return self.module.get_etrace_of(weight)

    def reset_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        """Zero the traces and the step counter; the model's states are untouched."""
        self.module.reset_state(batch_size, **kwargs)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Run the mapped learner on inputs with a batch axis; keyword arguments without arrays are not mapped."""
        if self._stand_in is not None:
            return self._stand_in(*args, **kwargs)
        arrays = {k: v for k, v in kwargs.items() if any(hasattr(x, "shape") for x in jax.tree.leaves(v))}
        run, record = self._mapped({k: v for k, v in kwargs.items() if k not in arrays})
        args, arrays = jax.tree.map(jnp.asarray, (args, arrays))
        recorder = self.module._recorder
        if recorder is None or recorder.context != trace_context():
            try:
                return run(args, arrays)
            except brainstate.BatchAxisError as error:
                raise brainstate.BatchAxisError(
                    "A state of the learner was not made for the mapped axis. Make the states and compile the learner "
                    "under brainstate.transform.vmap_new_states(state_tag='new') and map it with vmap_states='new'; "
                    f"braintrace.compile(..., batch_size=..., vmap=True) does both. What failed: {error}"
                ) from error
        out, recorded = record(recorder.zeros, args, arrays)
        recorder.take(*recorded, self._recorded_length)
        return out


def _states_by_axis(module: Any, states: Any) -> Any:
    if states is None:
        return None
    if isinstance(states, dict):
        return {axis: module.states(kind) for kind, axis in states.items()}
    return module.states(states)


def _step_by_step(objective, weights, items):
    """The gradient of a sequence as a sum of gradients of its steps."""
    gradient = brainstate.transform.grad(objective, weights, has_aux=True)

    def body(total, item):
        slices, m = item
        if m.ndim:  # of a window: one weight per loss in it
            grads, (loss, aux) = gradient(slices, m)
        else:
            grads, (loss, aux) = gradient(slices, None)
            grads = jax.tree.map(lambda g: g * m.astype(g.dtype), grads)
        return jax.tree.map(jnp.add, total, grads), (loss, aux)

    zeros = zeros_to_add({p: s.value for p, s in weights.items()})
    total, (losses, aux) = brainstate.transform.scan(body, zeros, items)
    return total, losses, aux


def _loss_and_aux(result: Any, has_aux: bool, shape: tuple[int, ...]) -> tuple[Any, Any]:
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"With has_aux=True step_fn must return a pair (loss, aux), got {type(result).__name__}.")
    loss, aux = result if has_aux else (result, None)
    if not isinstance(loss, (jax.Array, np.ndarray, np.generic, float, int)):
        unit = f" of unit {u.get_unit(loss)}; divide it by its unit" if isinstance(loss, u.Quantity) else ""
        pair = "; for (loss, aux) pass has_aux=True" if isinstance(loss, tuple) and not has_aux else ""
        raise TypeError(
            f"step_fn must return the loss as an array without a unit, got {type(loss).__name__}{unit}{pair}."
        )
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise TypeError(
            f"step_fn must return a loss that has a derivative, got one of dtype {jnp.result_type(loss)} (a count of "
            "errors, say). Return a real, differentiable function of the output; pass counts on by has_aux=True."
        )
    if jnp.shape(loss) != shape:
        advice = "one per step of the window" if shape else "a sum or an average over batch and features"
        raise ValueError(f"step_fn must return a loss of shape {shape}, {advice}, got {jnp.shape(loss)}.")
    return loss, aux


def _chunk_length(trace_chunk: Any) -> int | None:
    if trace_chunk is None:
        return None
    if isinstance(trace_chunk, bool) or not isinstance(trace_chunk, int):
        raise TypeError(f"trace_chunk must be a Python int or None, got {type(trace_chunk).__name__}.")
    if trace_chunk < 1:
        raise ValueError(f"trace_chunk must be at least 1, got {trace_chunk}.")
    return trace_chunk


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")


def common_length(sequences: tuple[Any, ...]) -> int:
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


def _check_arguments(step_fn: Callable[..., Any], sequences: int) -> None:
    try:
        signature = inspect.signature(step_fn)
    except (TypeError, ValueError):  # not every callable has one
        return
    try:
        signature.bind(*range(sequences))
    except TypeError as error:
        raise TypeError(
            f"step_fn is called with one slice of each sequence, {sequences} here, and takes "
            f"({', '.join(signature.parameters)}): {error}. Pass as many sequences as it has arguments."
        ) from None


def _check_weights(weights: Any) -> Mapping[Any, brainstate.State]:
    advice = (
        "Pass a mapping of keys to parameters, such as learner.param_states or model.states(brainstate.ParamState)."
    )
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a mapping, got {type(weights).__name__}. {advice}")
    if not weights:
        raise ValueError(f"weights is empty: there is nothing to differentiate. {advice}")
    for key, state in weights.items():
        if not isinstance(state, brainstate.State):
            raise TypeError(f"weights[{key!r}] must be a state, got {type(state).__name__}. {advice}")
        dtypes = [jnp.result_type(x) for x in jax.tree.leaves(state.value)]
        if not all(jnp.issubdtype(d, jnp.inexact) for d in dtypes):
            raise TypeError(
                f"weights[{key!r}] is a {type(state).__name__} of dtype {dtypes[0]}, which has no gradient "
                f"(learner.states() holds traces and counters too). {advice}"
            )
    return weights


def _check_mask(mask: Any, length: int) -> jax.Array:
    if mask is None:
        return jnp.ones(length)
    mask = jnp.asarray(mask)
    if mask.shape != (length,):
        raise ValueError(f"mask must have shape ({length},), got {mask.shape}.")
    if jnp.issubdtype(mask.dtype, jnp.complexfloating):
        raise TypeError(f"mask must hold real weights of the losses, got {mask.dtype}. Pass its real part.")
    return mask if jnp.issubdtype(mask.dtype, jnp.floating) else mask.astype(jnp.result_type(float))


def _windows(tree: Any, k: int | None) -> Any:
    return tree if k is None else jax.tree.map(lambda x: jnp.reshape(x, (-1, k, *jnp.shape(x)[1:])), tree)
