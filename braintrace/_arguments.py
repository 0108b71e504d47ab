"""What the drivers of sequences are given: lengths, masks, weights, and what a step returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from ._types import MultiStepData, PyTree, Shape, SingleStepData

__all__ = [
    "check_batch_size", "check_mask", "check_step_fn", "check_weights", "checked_loss", "chunk_length",
    "common_length", "loss_and_aux", "one_of", "windows",
]  # fmt: skip


def loss_and_aux(result: PyTree, has_aux: bool, shape: Shape) -> tuple[PyTree, PyTree]:
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"With has_aux=True step_fn must return a pair (loss, aux), got {type(result).__name__}.")
    loss, aux = result if has_aux else (result, None)
    return checked_loss("step_fn", loss, shape, "" if has_aux else "; for (loss, aux) pass has_aux=True"), aux


def checked_loss(function: str, loss: PyTree, shape: Shape, for_pairs: str = "") -> PyTree:
    """``loss``, which a function of that name has returned, if it is one."""
    if not isinstance(loss, (jax.Array, np.ndarray, np.generic, float, int)):
        unit = f" of unit {u.get_unit(loss)}; divide it by its unit" if isinstance(loss, u.Quantity) else ""
        pair = for_pairs if isinstance(loss, tuple) else ""
        raise TypeError(
            f"{function} must return the loss as an array without a unit, got {type(loss).__name__}{unit}{pair}."
        )
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise TypeError(
            f"{function} must return a loss that has a derivative, got one of dtype {jnp.result_type(loss)} (a count "
            "of errors, say). Return a real, differentiable function of the output"
            f"{'; pass counts on by has_aux=True' if for_pairs else ''}."
        )
    if jnp.shape(loss) != shape:
        advice = "one per step of the window" if shape else "a sum or an average over batch and features"
        raise ValueError(f"{function} must return a loss of shape {shape}, {advice}, got {jnp.shape(loss)}.")
    return loss


def chunk_length(trace_chunk: object) -> int | None:
    if trace_chunk is None:
        return None
    if isinstance(trace_chunk, bool) or not isinstance(trace_chunk, int):
        raise TypeError(f"trace_chunk must be a Python int or None, got {type(trace_chunk).__name__}.")
    if trace_chunk < 1:
        raise ValueError(f"trace_chunk must be at least 1, got {trace_chunk}.")
    return trace_chunk


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")


def check_batch_size(batch_size: Any) -> None:
    if batch_size is not None and (isinstance(batch_size, (bool, str, float)) or np.ndim(batch_size)):
        raise TypeError(f"batch_size must be an int or None, got {batch_size!r}.")


def common_length(sequences: tuple[PyTree, ...]) -> int:
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


def check_step_fn(step_fn: object, sequences: int, or_what: str) -> Callable[..., PyTree]:
    if not callable(step_fn):
        raise TypeError(f"step_fn must be a function of one slice, {or_what}, got {step_fn!r}.")
    try:
        signature = inspect.signature(step_fn)
    except (TypeError, ValueError):  # not every callable has one
        return step_fn
    try:
        signature.bind(*range(sequences))
    except TypeError as error:
        raise TypeError(
            f"step_fn is called with one slice of each sequence, {sequences} here, and takes "
            f"({', '.join(signature.parameters)}): {error}. Pass as many sequences as it has arguments."
        ) from None
    return step_fn


def check_weights(weights: object) -> Mapping[Hashable, brainstate.State]:
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


def check_mask(mask: PyTree, length: int) -> jax.Array:
    if mask is None:
        return jnp.ones(length)
    mask = jnp.asarray(mask)
    if mask.shape != (length,):
        raise ValueError(f"mask must have shape ({length},), got {mask.shape}.")
    if jnp.issubdtype(mask.dtype, jnp.complexfloating):
        raise TypeError(f"mask must hold real weights of the losses, got {mask.dtype}. Pass its real part.")
    return mask if jnp.issubdtype(mask.dtype, jnp.floating) else mask.astype(jnp.result_type(float))


def windows(tree: PyTree, k: int | None) -> PyTree:
    return tree if k is None else jax.tree.map(lambda x: jnp.reshape(x, (-1, k, *jnp.shape(x)[1:])), tree)
