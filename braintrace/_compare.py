"""One call from a model and rules to their gradients beside back-propagation through time."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from ._arguments import check_mask, common_length, loss_and_aux
from ._comparison import BPTT, Comparison
from ._compile import _batch_in_place, _find, _first_sample
from ._jax import is_outside
from ._learners.config import ETraceConfig
from ._mapped import ETraceVmap
from ._sequence import SequenceDriverMixin
from ._types import MultiStepData, SingleStepData

__all__ = ["compare"]

_CONVENTION = (
    "step_fn(call, *slices) runs one step by its first argument, which is the learner of a rule, or the plain model "
    "for BPTT: step_fn=lambda call, x, y: loss(call(x), y)"
)


def compare(
    subject: Any,
    *sequences: Any,
    step_fn: Callable[..., Any],
    rules: Any = None,
    decays: Iterable[float] = (),
    mask: Any = None,
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
    decays : list of float, optional
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
    length = common_length(sequences)
    if isinstance(subject, SequenceDriverMixin) and callable(step_fn) and _takes(step_fn, len(sequences)) is None:
        step_fn = _by_call(subject, step_fn)
    _check_step_fn(step_fn, len(sequences))
    sequences = jax.tree.map(jnp.asarray, sequences)
    mask = check_mask(mask, length)
    lags, ends = _lags_and_ends(lags, at, np.asarray(mask))
    first = jax.tree.map(lambda x: x[0], sequences)
    if isinstance(subject, SequenceDriverMixin):
        if rules is not None or [*decays] or batch_size is not None or vmap:
            raise TypeError(
                f"rules, decays, batch_size and vmap are for a model, and {type(subject).__name__} is a learner, which "
                "has its rule and its batch. Pass them with learner.model4compile, or the learner alone."
            )
        made = _of_learner(subject, step_fn, first)
    elif isinstance(subject, brainstate.nn.Module):
        made = _of_model(subject, step_fn, first, _labelled(rules, decays), batch_size, vmap)
    else:
        raise TypeError(f"Pass a brainstate.nn.Module or a compiled learner, got {type(subject).__name__}.")
    with made as (call, learners):
        weights = next(iter(learners.values()))._per_sample.param_states
        run = _Run(call, step_fn, weights, lags, ends)
        gradients = {BPTT: _undone(run.bptt, sequences, mask)}
        shares = {BPTT: _undone(run.bptt_by_lag, sequences)} if lags else {}
        for label, learner in learners.items():
            gradients[label] = _undone(lambda *a, to=learner: run.online(to, *a), sequences, mask)
            if lags:
                found = _undone(lambda *a, to=learner: run.online_by_lag(to, *a), sequences)
                shares[label] = jax.tree.map(_shares, found)
    return Comparison(gradients, lags, shares)


class _Run(NamedTuple):
    """The gradients of one loss, by back-propagation through ``call`` and by learners, as functions that are traced."""

    call: Any
    step_fn: Callable[..., Any]
    weights: Mapping[Any, brainstate.State]
    lags: tuple[int, ...]
    ends: tuple[int, ...]

    def bptt(self, sequences, mask):
        def objective():
            losses = brainstate.transform.for_loop(lambda *slices: self.step_fn(self.call, *slices), *sequences)
            return (losses * (mask / jnp.maximum(mask.sum(), 1)).astype(losses.dtype)).sum()

        return dict(brainstate.transform.grad(objective, self.weights)())

    def online(self, learner, sequences, mask):
        learner._per_sample.reset_state()
        options = {"step_fn": lambda *slices: self.step_fn(learner, *slices), "mask": mask, "weights": self.weights}
        return dict(learner.etrace_grad(*sequences, **options))

    def bptt_by_lag(self, sequences):
        """The gradient by what is added to the parameters, an own zero for each lag."""
        restart, depth = self._restart(sequences), self.lags[-1]
        places = np.searchsorted(self.lags, depth - np.arange(depth + 1))

        def shares(end):
            restart(end - depth)
            window = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, end - depth, depth + 1), sequences)
            held = {path: state.value for path, state in self.weights.items()}

            def step(added, place, slices):
                for path, state in self.weights.items():
                    state.value = jax.tree.map(lambda v, a: v + a[place], held[path], added[path])
                loss = self.step_fn(self.call, *slices)
                for path, state in self.weights.items():
                    state.value = held[path]
                return loss

            def objective(added):
                return brainstate.transform.for_loop(lambda i, x: step(added, i, x), places, window)[-1]

            return brainstate.transform.grad(objective)(self._zeros())

        return self._summed(shares)

    def online_by_lag(self, learner, sequences):
        """For each lag the gradient with traces that start so long before the loss."""
        restart = self._restart(sequences)
        loss = lambda t: self.step_fn(learner, *jax.tree.map(lambda x: x[t], sequences))  # noqa: E731

        def advance(t):
            loss(t)
            return t + 1

        def gradient(end, lag):
            restart(end - lag)
            learner._per_sample.reset_state()
            brainstate.transform.while_loop(lambda t: t < end, advance, end - lag)
            return dict(brainstate.transform.grad(lambda: loss(end), self.weights)())

        return self._summed(
            lambda end: brainstate.transform.for_loop(lambda lag: gradient(end, lag), jnp.array(self.lags))
        )

    def _restart(self, sequences):
        """A function of a step that sets all states that the model writes to their values before it."""
        with brainstate.StateTraceStack() as touched:
            self.step_fn(self.call, *jax.tree.map(lambda x: x[0], sequences))
        touched.recovery_original_values()
        states = [s for s, written in zip(touched.states, touched.been_writen) if written]

        def step(*slices):
            before = [state.value for state in states]
            self.step_fn(self.call, *slices)
            return before

        values = brainstate.transform.for_loop(step, *sequences)

        def restart(t):
            for state, value in zip(states, values):
                state.value = jax.tree.map(lambda x: x[t], value)

        return restart

    def _zeros(self):
        zeros = lambda x: jnp.zeros((len(self.lags), *jnp.shape(x)), jnp.result_type(x))  # noqa: E731
        return {path: jax.tree.map(zeros, state.value) for path, state in self.weights.items()}

    def _summed(self, f):
        def add(total, end):
            return jax.tree.map(jnp.add, total, f(end)), None

        return brainstate.transform.scan(add, self._zeros(), jnp.array(self.ends))[0]


def _undone(run, *arrays):
    """``run(*arrays)`` as one program that leaves every state as it was."""

    @brainstate.transform.jit
    def program(*arrays):
        with brainstate.StateTraceStack() as touched:
            out = run(*arrays)
        touched.recovery_original_values()
        return out

    return program(*arrays)


def _shares(gradients: jax.Array) -> np.ndarray:
    """Differences of successive lags; what is within rounding of the gradient is zero."""
    eps = float(jnp.finfo(gradients.dtype).eps)
    wide = np.asarray(gradients).astype(np.complex128 if jnp.iscomplexobj(gradients) else np.float64)
    shares = np.diff(wide, axis=0, prepend=np.zeros_like(wide[:1]))
    norm = lambda x: np.linalg.norm(x.reshape(len(x), -1), axis=1)  # noqa: E731
    shares[norm(shares) <= 8 * eps * norm(wide)] = 0
    return shares


# -- what is compared


@contextlib.contextmanager
def _of_learner(learner, step_fn, slices):
    """``(call of the plain model, {label: learner})``"""
    learner._driven()
    model = learner._per_sample.model4compile
    if isinstance(learner, ETraceVmap):
        states, out_states = learner._filters.value
        model = brainstate.nn.Vmap(
            model, learner.in_axes, learner.out_axes, states, out_states, learner.axis_name, learner.axis_size
        )
    _arguments(model, step_fn, slices)
    yield model, {type(learner._per_sample).__name__: learner}


@contextlib.contextmanager
def _of_model(model, step_fn, slices, rules, batch_size, vmap):
    learners = {}
    for label, (rule, options) in rules.items():
        with _noting(f"This is the rule {label!r}."):
            learners[label] = _find(rule)(model, **options)
    if vmap:
        _first_sample((), batch_size)  # says that there has to be a size
    with _as_before(model):
        if vmap:
            _initialise(model, batch_size)
            args, kwargs = _arguments(brainstate.nn.Vmap(model, vmap_states="new"), step_fn, slices)
            _initialise(model, batch_size, learners, *_first_sample((args, kwargs), batch_size))
            mapped = {label: ETraceVmap(learner, vmap_states="new") for label, learner in learners.items()}
            yield brainstate.nn.Vmap(model, vmap_states="new"), mapped
        else:
            brainstate.nn.init_all_states(model, batch_size=batch_size)
            with _batch_in_place(batch_size, slices):
                args, kwargs = _arguments(model, step_fn, slices)
            for learner in learners.values():
                learner.compile_graph(*args, **kwargs)
            yield model, learners


def _initialise(model, batch_size, learners=(), args=(), kwargs=None):
    @brainstate.transform.vmap_new_states(state_tag="new", axis_size=batch_size)
    def initialise():
        brainstate.nn.init_all_states(model)
        for label in learners:
            learners[label].compile_graph(*args, **kwargs)

    initialise()


def _arguments(call, step_fn, slices):
    """Shapes of what ``step_fn`` calls the model with; errors for what it does otherwise."""
    found: list[Any] = []

    def recorded(*args, **kwargs):
        wrapped = lambda x: isinstance(x, (SingleStepData, MultiStepData))  # noqa: E731
        if any(map(wrapped, jax.tree.leaves((args, kwargs), is_leaf=wrapped))):
            raise TypeError("step_fn passes on SingleStepData or MultiStepData. Pass bare arrays of one step to call.")
        abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x  # noqa: E731
        found.append(jax.tree.map(abstract, (args, kwargs)))
        return call(*args, **kwargs)

    def probe(*slices):
        loss_and_aux(step_fn(recorded, *slices), False, ())

    with _noting(f"{_CONVENTION}." if _takes(step_fn, len(slices)) is None else ""):
        _undone(probe, *slices)
    if not found:
        raise ValueError(
            f"step_fn called neither its first argument nor the learner: nothing is compared. {_CONVENTION}."
        )
    return found[0]


@contextlib.contextmanager
def _noting(note: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if note:
            error.add_note(note)
        raise


@contextlib.contextmanager
def _as_before(model: brainstate.nn.Module) -> Iterator[None]:
    """Keep the state objects of a model, their values and the random state through an initialisation."""
    holders: dict[int, tuple[Any, Any]] = {}

    def visit(x):
        if id(x) in holders:
            return
        if isinstance(x, brainstate.State):
            holders[id(x)] = (x, x.value)
        elif isinstance(x, brainstate.graph.Node):
            visit(vars(x))
        elif isinstance(x, (dict, list, tuple)):
            if not isinstance(x, tuple):
                holders[id(x)] = (x, x.copy())
            for item in x.values() if isinstance(x, dict) else x:
                visit(item)

    visit(model)
    visit(brainstate.random.DEFAULT)
    try:
        yield
    finally:
        for x, kept in holders.values():
            if isinstance(x, brainstate.State):
                x.value = kept
            elif isinstance(x, dict):
                x.clear()
                x.update(kept)
            else:
                x[:] = kept


# -- arguments


def _labelled(rules: Any, decays: Iterable[float]) -> dict[str, tuple[Any, dict[str, Any]]]:
    is_pair = lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], Mapping)  # noqa: E731
    if isinstance(rules, (str, type, ETraceConfig)) or is_pair(rules):
        rules = [rules]
    entries = [*rules.items()] if isinstance(rules, Mapping) else [(None, rule) for rule in rules or ()]
    entries += [(f"pp_prop {decay}", ("pp_prop", {"decay_or_rank": decay})) for decay in decays]
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for label, entry in entries:
        rule, options = entry if is_pair(entry) else (entry, {})
        _find(rule)
        if label is None:
            name = rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)
            label = f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})" if options else name
        if label in found or label == BPTT:
            raise ValueError(f"The label {label!r} is taken. Pass rules as a mapping with a label for each.")
        found[label] = (rule, {**options, "config": rule} if isinstance(rule, ETraceConfig) else dict(options))
    if not found:
        raise ValueError(
            "There is no rule to compare. Pass rules, such as ['d_rtrl', ('pp_prop', {'decay_or_rank': 0.9})], or "
            "decays of pp_prop, such as [0.5, 0.9]."
        )
    return found


def _by_call(learner: Any, step_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls a learner itself, as one of what runs the step."""

    def of_call(call, *slices):
        if call is learner:
            return step_fn(*slices)
        with learner._replaced_by(call):
            return step_fn(*slices)

    return of_call


def _check_step_fn(step_fn: Any, sequences: int) -> None:
    if not callable(step_fn):
        raise TypeError(f"step_fn must be a function, got {step_fn!r}. {_CONVENTION}.")
    error = _takes(step_fn, sequences + 1)
    if error is not None:
        names = ", ".join(inspect.signature(step_fn).parameters)
        raise TypeError(
            f"step_fn takes ({names}), and is called with what runs the step and one slice of each sequence, "
            f"{sequences} here: {error}. {_CONVENTION}."
        )


def _takes(step_fn: Callable[..., Any], arguments: int) -> TypeError | None:
    """Why a function cannot be called with so many arguments."""
    try:
        inspect.signature(step_fn).bind(*range(arguments))
    except ValueError:  # not every callable has a signature
        return None
    except TypeError as error:
        return error
    return None


def _lags_and_ends(lags: Any, at: Any, mask: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if lags is None:
        if at is not None:
            raise ValueError("at says which losses are decomposed by lag. Pass lags too, such as lags=20.")
        return (), ()
    found = tuple(range(lags)) if _is_int(lags) else tuple(lags)
    if not found or not all(map(_is_int, found)) or found[0] < 0 or any(a >= b for a, b in zip(found, found[1:])):
        raise ValueError(f"lags must be a positive number or increasing integers from 0 on, got {lags!r}.")
    if at is None:
        weighed = np.flatnonzero(mask)
        if not weighed.size:
            raise ValueError("The mask gives no loss a weight, so that none can be decomposed by lag. Pass at.")
        at = int(weighed[-1])
    ends = (at,) if _is_int(at) else tuple(at)
    if not ends or not all(_is_int(end) and found[-1] <= end < len(mask) for end in ends):
        raise ValueError(
            f"Lags up to {found[-1]} need a loss at the steps {found[-1]} to {len(mask) - 1} of {len(mask)}, and at "
            f"is {at!r}. Pass fewer lags, a later step or a longer sequence."
        )
    return tuple(map(int, found)), tuple(map(int, ends))


def _is_int(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)
