"""One call from a model and rules to their gradients beside back-propagation through time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from ._arguments import check_batch_size, check_mask, common_length
from ._compared import CONVENTION, Rules, Run, run_of_learner, run_of_model, shares_by_lag, takes, undone
from ._comparison import BPTT, Comparison
from ._compile import _find
from ._jax import is_outside
from ._learners.config import ETraceConfig
from ._sequence import SequenceDriverMixin
from ._types import PyTree

__all__ = ["compare"]


def compare(
    subject: brainstate.nn.Module | SequenceDriverMixin,
    *sequences: PyTree,
    step_fn: Callable[..., PyTree],
    rules: Any = None,
    decays: Iterable[float] | float = (),
    mask: PyTree = None,
    lags: int | Iterable[int] | None = None,
    at: int | Iterable[int] | None = None,
    batch_size: int | None = None,
    vmap: bool = False,
) -> Comparison:
    """Compare gradients of online rules with back-propagation through time, through the same model from the same state.

    Parameters
    ----------
    subject : brainstate.nn.Module, ETraceAlgorithm or ETraceVmap
        A model, whose states are initialised for the comparison, with ``rules`` or ``decays``; or a compiled learner,
        which is compared as it is: from the present states of its model, the traces being zero.
    *sequences : pytree of array, shape ``(T, ...)``
        Sliced in lockstep along axis 0 and passed to ``step_fn``.
    step_fn : callable
        ``step_fn(call, *slices)`` runs one step by ``call``, which takes the arguments of the model, and returns its
        scalar loss. For BPTT ``call`` is the plain model, for a rule its learner. With a learner, also a function of
        the slices alone that calls it, as for ``etrace_grad``.
    rules : mapping or list, optional
        Rules as in :func:`braintrace.compile`: a name, a class or an :class:`ETraceConfig`, or a pair of one and its
        options. Keys of a mapping are labels.
    decays : float or list of float, optional
        Stands for ``pp_prop`` with each as ``decay_or_rank``.
    mask : array, shape ``(T,)``, optional
        Weight of each step's loss.
    lags : int or increasing list of int, optional
        Lags whose shares of the gradient are compared; ``n`` for 0, ..., n - 1. An entry of a list stands for all lags
        above the one before it. ``lags[-1] + 1`` gradients of steps are kept in memory for BPTT, at most one per entry.
    at : int or list of int, optional
        Steps whose losses are decomposed by lag (their sum is); by default the last one with a weight in the mask.
    batch_size : int, optional
        Of a model, as in :func:`braintrace.compile`.
    vmap : bool
        Of a model, as in :func:`braintrace.compile`.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError, TypeError
        For a learner that is not compiled, a ``step_fn`` of another form, or arguments that do not fit.

    Notes
    -----
    Afterwards all states are as before: parameters, hidden states, traces, random states, and whatever else ``step_fn``
    writes. Every run starts from the same values, random keys included, and gradients are of the mean loss, as those
    of ``etrace_grad``.

    The share of a lag in the loss at step T is, for BPTT, the gradient by the parameters as they are used at step
    T - lag. For a rule it is what its gradient at T gains if the traces start one step earlier, at T - lag in place of
    T - lag + 1. A share within rounding of that gradient is zero.

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> model = brainstate.nn.Sequential(braintrace.nn.LRUCell(2, 8), braintrace.nn.Linear(2, 1))
    >>> xs, ys = jnp.sin(jnp.arange(40.0).reshape(20, 2)), jnp.ones((20, 1))
    >>> found = braintrace.compare(
    ...     model, xs, ys, step_fn=lambda call, x, y: ((call(x) - y) ** 2).sum(), rules=['d_rtrl'], decays=[0.5, 0.9]
    ... )
    >>> found.rules
    ['d_rtrl', 'pp_prop 0.5', 'pp_prop 0.9']
    >>> found.best['all']
    'd_rtrl'
    """
    if not is_outside():
        raise ValueError("compare returns numbers and a table: call it outside of jit and of other transformations.")
    check_batch_size(batch_size)
    length = common_length(sequences)
    if isinstance(subject, SequenceDriverMixin) and callable(step_fn) and takes(step_fn, len(sequences)) is None:
        step_fn = _by_call(subject, step_fn)
    _check_step_fn(step_fn, len(sequences))
    sequences = jax.tree.map(jnp.asarray, sequences)
    mask = check_mask(mask, length)
    lags, ends = _lags_and_ends(lags, at, np.asarray(mask))
    first = jax.tree.map(lambda x: x[0], sequences)
    if isinstance(subject, SequenceDriverMixin):
        if rules is not None or _listed(decays) or batch_size is not None or vmap:
            raise TypeError(
                f"rules, decays, batch_size and vmap are for a model, and {type(subject).__name__} is a learner, which "
                "has its rule and its batch. Pass them with learner.model4compile, or the learner alone."
            )
        made = run_of_learner(subject, step_fn, first)
    elif isinstance(subject, brainstate.nn.Module):
        made = run_of_model(subject, step_fn, first, _labelled(rules, decays), batch_size, vmap)
    else:
        raise TypeError(f"Pass a brainstate.nn.Module or a compiled learner, got {type(subject).__name__}.")
    with made as (call, learners):
        weights = next(iter(learners.values()))._per_sample.param_states
        run = Run(call, step_fn, weights, lags, ends)
        gradients = {BPTT: undone(run.bptt, sequences, mask)}
        shares = {BPTT: undone(run.bptt_by_lag, sequences)} if lags else {}
        for label, learner in learners.items():
            gradients[label] = undone(lambda *a, to=learner: run.online(to, *a), sequences, mask)
            if lags:
                found = undone(lambda *a, to=learner: run.online_by_lag(to, *a), sequences)
                shares[label] = jax.tree.map(shares_by_lag, found)
    return Comparison(gradients, lags, shares)


def _labelled(rules: Any, decays: Any) -> Rules:
    is_pair = lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], Mapping)  # noqa: E731
    if isinstance(rules, (str, type, ETraceConfig)) or is_pair(rules):
        rules = [rules]
    entries = [*rules.items()] if isinstance(rules, Mapping) else [(None, rule) for rule in _listed(rules)]
    entries += [(f"pp_prop {d}", ("pp_prop", {"decay_or_rank": d})) for d in _listed(decays)]
    found: Rules = {}
    for label, entry in entries:
        rule, options = entry if is_pair(entry) else (entry, {})
        _find(rule)
        if label is None:
            name = rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)
            label = f"{name}({', '.join(f'{k}={_shown(v)}' for k, v in options.items())})" if options else name
        if label in found or label == BPTT:
            raise ValueError(f"The label {label!r} is taken. Pass rules as a mapping with a label for each.")
        found[label] = (rule, {**options, "config": rule} if isinstance(rule, ETraceConfig) else dict(options))
    if not found:
        raise ValueError(
            "There is no rule to compare. Pass rules, such as ['d_rtrl', ('pp_prop', {'decay_or_rank': 0.9})], or "
            "decays of pp_prop, such as [0.5, 0.9]."
        )
    return found


def _listed(given: Any) -> list[Any]:
    if given is None:
        return []
    return [*given] if isinstance(given, Iterable) else [given]


def _shown(option: object) -> str:
    text = repr(option)
    return text if len(text) <= 40 and "\n" not in text else type(option).__name__


def _by_call(learner: SequenceDriverMixin, step_fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """A function that calls a learner itself, as one of what runs the step."""

    def of_call(call: Callable[..., PyTree], *slices: PyTree) -> PyTree:
        if call is learner:
            return step_fn(*slices)
        with learner._replaced_by(call):
            return step_fn(*slices)

    return of_call


def _check_step_fn(step_fn: object, sequences: int) -> None:
    if not callable(step_fn):
        raise TypeError(f"step_fn must be a function, got {step_fn!r}. {CONVENTION}.")
    error = takes(step_fn, sequences + 1)
    if error is not None:
        names = ", ".join(inspect.signature(step_fn).parameters)
        raise TypeError(
            f"step_fn takes ({names}), and is called with what runs the step and one slice of each sequence, "
            f"{sequences} here: {error}. {CONVENTION}."
        )


def _lags_and_ends(lags: Any, at: Any, mask: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if lags is None:
        if at is not None:
            raise ValueError("at says which losses are decomposed by lag. Pass lags too, such as lags=20.")
        return (), ()
    found = tuple(range(lags)) if _is_int(lags) else tuple(_listed(lags))
    if not found or not all(map(_is_int, found)) or found[0] < 0 or any(a >= b for a, b in zip(found, found[1:])):
        raise ValueError(f"lags must be a positive number or increasing integers from 0 on, got {lags!r}.")
    if at is None:
        weighed = np.flatnonzero(mask)
        if not weighed.size:
            raise ValueError("The mask gives no loss a weight, so that none can be decomposed by lag. Pass at.")
        at = int(weighed[-1])
    ends = tuple(_listed(at))
    if not ends or not all(_is_int(end) and found[-1] <= end < len(mask) for end in ends):
        raise ValueError(
            f"Lags up to {found[-1]} need a loss at the steps {found[-1]} to {len(mask) - 1} of {len(mask)}, and at "
            f"is {at!r}. Pass fewer lags, a later step or a longer sequence."
        )
    return tuple(map(int, found)), tuple(map(int, ends))


def _is_int(x: object) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)
