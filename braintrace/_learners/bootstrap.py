"""DNI: windows that are told by an estimate what their last states mean for the losses after them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import brainstate
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .._arguments import checked_loss, common_length
from .._compiler.policy import ControlFlowPolicy
from .._compiler.scope import CEILING
from .._types import Held, MultiStepData, Path, PyTree, Shape, path_str
from .config import ETraceConfig
from .options import Legacy, VjpMethod, legacy_options
from .param_dim import ParamDimVjpAlgorithm

__all__ = ["DNI", "SyntheticGradient", "train_synthetic_gradient"]


class SyntheticGradient(brainstate.nn.Module):
    r"""An affine estimate of the derivative of future losses by the present hidden states.

    Per hidden group :math:`\hat g = h W + b`, with the last two axes of h (units and hidden variables) as one.

    Parameters
    ----------
    group_shapes : dict
        Group index -> shape ``V + (S,)``, as :meth:`DNI.group_signal_shapes` gives it.
    hidden_width : optional
        Accepted for scripts; the map has no hidden layer.
    scale : float
        Standard deviation of the initial weights; 0 estimates nothing to begin with.
    seed : int
        Of the initial weights.

    Attributes
    ----------
    group_shapes : dict
    weights, biases : dict
        Group index -> ParamState of shape ``(width, width)`` and ``(width,)``, float32.

    Raises
    ------
    ValueError
        For a shape with fewer than two axes.

    References
    ----------
    .. [1] M. Jaderberg et al., "Decoupled neural interfaces using synthetic gradients", International Conference on
       Machine Learning, 2017.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> synthesizer = braintrace.SyntheticGradient({0: (4, 3, 2)})
    >>> synthesizer.apply(synthesizer.param_values(), {0: jnp.ones((4, 3, 2))})[0].shape
    (4, 3, 2)
    """

    __module__ = "braintrace"

    def __init__(
        self, group_shapes: Mapping[int, Shape], hidden_width: object = None, scale: float = 0.0, seed: int = 0
    ):
        super().__init__()
        del hidden_width
        self.group_shapes = {i: tuple(shape) for i, shape in group_shapes.items()}
        self.weights: dict[int, brainstate.ParamState] = {}
        self.biases: dict[int, brainstate.ParamState] = {}
        key = jax.random.key(seed)
        for i, shape in self.group_shapes.items():
            if len(shape) < 2:
                raise ValueError(f"The shape {shape} of group {i} has no axes of units and of hidden variables.")
            width = math.prod(shape[-2:])
            key, own = jax.random.split(key)
            self.weights[i] = brainstate.ParamState(scale * jax.random.normal(own, (width, width), jnp.float32))
            self.biases[i] = brainstate.ParamState(jnp.zeros(width, jnp.float32))

    def param_values(self) -> dict[str, dict[int, jax.Array]]:
        """The present parameters, ``{'w': {index: array}, 'b': {index: array}}``."""
        return {
            "w": {i: s.value for i, s in self.weights.items()},
            "b": {i: s.value for i, s in self.biases.items()},
        }

    def states_dict(self) -> dict[tuple[str, int], brainstate.ParamState]:
        """The parameters under ``('synth_w', index)`` and ``('synth_b', index)``, for optimisers."""
        weights = {("synth_w", i): s for i, s in self.weights.items()}
        return weights | {("synth_b", i): s for i, s in self.biases.items()}

    def apply(
        self, param_values: Mapping[str, Mapping[int, jax.Array]], group_hiddens: Mapping[int, jax.Array]
    ) -> dict[int, jax.Array]:
        """Estimates for hidden values without units.

        Parameters
        ----------
        param_values : dict
            As :meth:`param_values` gives them.
        group_hiddens : dict
            Group index -> array of shape ``V + (S,)``; axes in front of the last two may have other sizes.

        Returns
        -------
        dict
            Group index -> array like the hidden values.

        Raises
        ------
        ValueError
            For another size of the last two axes, or an unknown group.
        """
        out = {}
        for i, h in group_hiddens.items():
            if i not in self.group_shapes or h.shape[-2:] != self.group_shapes[i][-2:]:
                raise ValueError(
                    f"The hidden values of group {i} have shape {h.shape}; the synthesizer was made for "
                    f"{self.group_shapes}. Make it with DNI.group_signal_shapes() of this learner."
                )
            flat = h.reshape(*h.shape[:-2], -1)
            estimate = flat @ param_values["w"][i].astype(h.dtype) + param_values["b"][i].astype(h.dtype)
            out[i] = estimate.reshape(h.shape)
        return out


class DNI(ParamDimVjpAlgorithm):
    r"""D_RTRL on windows, with an estimate of the losses after each window (decoupled neural interfaces).

    At the exit of a window a synthesizer estimates :math:`\partial(\text{future loss}) / \partial h`. The estimate
    enters the reverse sweep of that window as a further cotangent, and is added to the gradients of plain uses of
    parameters, of the arguments, and of the states at the entry. What an operation's trace carries over the end of the
    window is in the trace already: neither trained operands nor the learning signal receive it. A zero estimate leaves
    the gradients of :class:`D_RTRL` with ``vjp_method='multi-step'``.

    Parameters
    ----------
    model : brainstate.nn.Module
    synthesizer : SyntheticGradient, optional
        May be attached later, see :meth:`attach_synthesizer`.
    vjp_method : {'multi-step'}
        The rule is defined on windows; a single step is a window of one.
    name, fast_solve, trace_dtype, chunked_trace, control_flow, snap_max_jacobian_elements, **legacy
        As for :class:`ParamDimVjpAlgorithm`.

    Attributes
    ----------
    synthesizer : SyntheticGradient or None

    Raises
    ------
    ValueError
        For another ``vjp_method``.
    TypeError
        For a synthesizer without the method ``apply``, or an unknown argument.
    RuntimeError
        By a call, if there is no synthesizer.

    Notes
    -----
    A mask of :meth:`etrace_grad` weights the gradients of single steps. Of a window of several steps it weights the
    losses, not the estimate of what follows.

    References
    ----------
    .. [1] M. Jaderberg et al., "Decoupled neural interfaces using synthetic gradients", International Conference on
       Machine Learning, 2017.

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.GRUCell(2, 3)
    >>> learner = braintrace.compile(cell, 'dni', jnp.zeros(2))
    >>> learner.attach_synthesizer(braintrace.SyntheticGradient(learner.group_signal_shapes()))
    >>> errors = braintrace.train_synthetic_gradient(learner, jnp.ones((10, 2)), chunk_size=5, epochs=3)
    >>> len(errors)
    3
    """

    __module__ = "braintrace"

    _default_config = ETraceConfig(learning_signal="bootstrapped")

    def __init__(
        self,
        model: brainstate.nn.Module,
        synthesizer: SyntheticGradient | None = None,
        name: str | None = None,
        vjp_method: VjpMethod = "multi-step",
        fast_solve: bool = True,
        trace_dtype: DTypeLike | None = None,
        chunked_trace: bool = True,
        control_flow: ControlFlowPolicy | None = None,
        snap_max_jacobian_elements: int = CEILING,
        **legacy: Unpack[Legacy],
    ):
        legacy_options(legacy, type(self))
        super().__init__(
            model,
            name,
            vjp_method,
            fast_solve,
            trace_dtype,
            chunked_trace,
            control_flow,
            snap_max_jacobian_elements=snap_max_jacobian_elements,
        )
        self._held = Held(None)
        if synthesizer is not None:
            self.attach_synthesizer(synthesizer)

    @property
    def synthesizer(self) -> SyntheticGradient | None:
        """What estimates future losses; its parameters are not among the learner's states."""
        return self._held.value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_held":  # brainstate gives a copy of a module the very values that are no states
            value = value.of_its_own()
        super().__setattr__(name, value)

    def attach_synthesizer(self, synthesizer: SyntheticGradient) -> None:
        """Use this synthesizer from the next call on.

        A function that was jitted before reads the parameters of the one that was attached then.

        Parameters
        ----------
        synthesizer : SyntheticGradient
            Or another object with its methods ``param_values`` and ``apply``.
        """
        if not (hasattr(synthesizer, "apply") and hasattr(synthesizer, "param_values")):
            raise TypeError(f"A synthesizer has the methods apply and param_values; {synthesizer!r} has not.")
        self._held = Held(synthesizer)

    def group_signal_shapes(self) -> dict[int, Shape]:
        """Group index -> ``V + (S,)``, which a :class:`SyntheticGradient` is made with; ``ValueError`` before
        :meth:`compile_graph`."""
        return {g.index: (*g.varshape, g.num_state) for g in self.graph.hidden_groups}

    def _attached(self) -> SyntheticGradient:
        if self.synthesizer is None:
            raise RuntimeError(
                "The learner has no synthesizer. Call "
                "attach_synthesizer(braintrace.SyntheticGradient(learner.group_signal_shapes())) first, or make it "
                "with synthesizer=...; in compare the rule is ('dni', {'synthesizer': ...})."
            )
        return self.synthesizer

    def _get_update_aux(self) -> dict[str, dict[int, jax.Array]]:
        return self._attached().param_values()

    def _packed(self, by_path: Mapping[Path, PyTree]) -> dict[int, jax.Array]:
        """Values per hidden state, without units, as one array per group."""
        return self._by_group(self._binding.reals(by_path))

    def _by_group(self, reals: Mapping[Path, jax.Array]) -> dict[int, jax.Array]:
        return {g.index: g.concat_hidden([reals[p] for p in g.hidden_paths]) for g in self.graph.hidden_groups}

    def _inject_exit_cotangent(
        self, exit_hiddens: dict[Path, jax.Array], aux: dict[str, dict[int, jax.Array]]
    ) -> dict[Path, jax.Array]:
        exits = self._by_group(exit_hiddens)
        estimates = self._attached().apply(aux, exits)
        cotangents: dict[Path, jax.Array] = {}
        for g in self.graph.hidden_groups:
            found = jnp.shape(estimates[g.index]) if g.index in estimates else None
            if found != exits[g.index].shape:
                raise ValueError(
                    f"The synthesizer's estimate for group {g.index} has shape {found}, the hidden values have "
                    f"{exits[g.index].shape}. Its method apply must return one array per group, like the hidden values."
                )
            cotangents.update(zip(g.hidden_paths, g.split_hidden(estimates[g.index])))
        return cotangents


def train_synthetic_gradient(
    learner: DNI,
    inputs: PyTree,
    *,
    chunk_size: int = 1,
    loss_fn: Callable[[PyTree], jax.Array] | None = None,
    optimizer: Any = None,
    lr: float = 1e-2,
    epochs: int = 1,
    reset: bool = True,
    batch_size: int | None = None,
) -> list[float]:
    """Fit the synthesizer of a learner to the cotangents that its own windows return.

    Window by window, the estimate for the hidden states at the entry is regressed on the cotangent that the window
    gives them, the estimate at its exit included; the last state of the sequence is regressed on zero. The model's
    parameters do not change.

    Parameters
    ----------
    learner : DNI
        With a synthesizer.
    inputs : pytree of array, shape ``(T, ...)``
        The argument of the model.
    chunk_size : int
        Length of the windows, a divisor of T.
    loss_fn : callable, optional
        Outputs of a window, stacked along time, -> scalar; by default their sum of squares.
    optimizer : optional
        An object whose ``update(grads)`` takes gradients keyed like ``synthesizer.states_dict()``, such as a
        ``braintools.optim`` optimiser that these states are registered with; by default plain gradient descent.
    lr : float
        Step size of gradient descent.
    epochs : int
    reset : bool
        Whether the model's states are initialised anew, and the traces zeroed, before every epoch.
    batch_size : int, optional
        Batch axis of the states, as the learner was compiled with.

    Returns
    -------
    list of float
        Mean squared error per epoch.

    Raises
    ------
    TypeError
        If ``learner`` is no DNI.
    ValueError
        If T is no multiple of ``chunk_size``, ``batch_size`` is not that of the learner, or the learner is mapped.
    RuntimeError
        If there is no synthesizer.

    References
    ----------
    .. [1] M. Jaderberg et al., "Decoupled neural interfaces using synthetic gradients", International Conference on
       Machine Learning, 2017.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> learner = braintrace.compile(braintrace.nn.ValinaRNNCell(2, 3), 'dni', jnp.zeros(2))
    >>> learner.attach_synthesizer(braintrace.SyntheticGradient(learner.group_signal_shapes()))
    >>> errors = braintrace.train_synthetic_gradient(learner, jnp.ones((6, 2)), chunk_size=2, epochs=20)
    >>> errors[-1] < errors[0]
    True
    """
    if not isinstance(learner, DNI):
        raise TypeError(f"The learner must be a DNI, got {type(learner).__name__}.")
    synthesizer = learner._attached()
    length = common_length((inputs,))
    k = learner._window_length(chunk_size, length, gradient=True) or 1
    for path, zero in learner._binding.hidden_zeros().items():
        shape = learner._binding.reals({path: learner.hidden_states[path].value})[path].shape
        if shape != zero.shape:
            raise ValueError(
                f"{path_str(path)!r} has shape {shape}, the learner was compiled for {zero.shape}: it is mapped over "
                "samples. Fit the synthesizer with an unmapped learner of the same model, compiled on a batch."
            )
    windows = jax.tree.map(lambda x: jnp.reshape(x, (-1, k, *jnp.shape(x)[1:])), inputs)
    loss_of = loss_fn or (lambda out: sum((o**2).sum() for o in jax.tree.leaves(out)))
    regression = _Regression(synthesizer, optimizer, lr)

    def window_loss(window: PyTree) -> jax.Array:
        return checked_loss("loss_fn", loss_of(learner(MultiStepData(window))), ())

    def present() -> dict[int, jax.Array]:
        return learner._packed({p: s.value for p, s in learner.hidden_states.items()})

    floating = {p: s for p, s in learner.hidden_states.items() if _is_floating(s.value)}

    def one_window(window: PyTree) -> jax.Array:
        entry = present()
        still = {p: jax.tree.map(jnp.zeros_like, s.value) for p, s in learner.hidden_states.items()}
        bars = brainstate.transform.grad(window_loss, floating)(window)
        # The cotangent of a complex value is the conjugate of its parts' own.
        return regression.step(entry, jax.lax.stop_gradient(learner._packed(jax.tree.map(jnp.conj, still | bars))))

    @brainstate.transform.jit
    def epoch(windows: PyTree, start: dict[Path, PyTree]) -> jax.Array:
        for path, value in start.items():
            learner.path_to_states[path].value = value
        if reset:
            learner.reset_state()
        errors = brainstate.transform.for_loop(one_window, windows)
        last = present()
        final = regression.step(last, jax.tree.map(jnp.zeros_like, last))
        return (errors.sum() + final) / (errors.size + 1)

    errors = []
    for _ in range(epochs):
        start = _initial_values(learner, batch_size) if reset else {}
        errors.append(float(epoch(windows, start)))
    return errors


class _Regression:
    """Fits a synthesizer's estimates, by an optimiser or plain gradient descent."""

    def __init__(self, synthesizer: SyntheticGradient, optimizer: Any, lr: float):
        self.synthesizer, self.optimizer, self.lr = synthesizer, optimizer, lr
        self.parameters = synthesizer.states_dict()

    def step(self, hidden: dict[int, jax.Array], target: dict[int, jax.Array]) -> jax.Array:
        """One step; the error before it."""

        def error() -> jax.Array | float:
            estimates = self.synthesizer.apply(self.synthesizer.param_values(), hidden)
            total = sum(((estimates[i] - target[i]) ** 2).sum() for i in target)
            return total / sum(t.size for t in target.values())

        grads, value = brainstate.transform.grad(error, self.parameters, return_value=True)()
        if self.optimizer is None:
            for key, state in self.parameters.items():
                state.value = state.value - self.lr * grads[key]
        else:
            self.optimizer.update(grads)
        return value


def _initial_values(learner: DNI, batch_size: int | None) -> dict[Path, PyTree]:
    """Of all states that are no parameters, from a copy: the learner keeps the states that it was compiled with."""
    copy = brainstate.graph.clone(learner.model4compile)
    brainstate.nn.init_all_states(copy, batch_size=batch_size)
    found = copy.states()
    start = {}
    for path, state in {**learner.hidden_states, **learner.other_states}.items():
        if path in found:
            start[path] = found[path].value
            shapes = [[jnp.shape(v) for v in jax.tree.leaves(value)] for value in (start[path], state.value)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"With batch_size={batch_size}, {path_str(path)!r} is initialised with shape {shapes[0][0]}; the "
                    f"learner was compiled for {shapes[1][0]}. Pass the batch_size that it was compiled with."
                )
    return start


def _is_floating(value: PyTree) -> bool:
    return all(jnp.issubdtype(jnp.result_type(v), jnp.inexact) for v in jax.tree.leaves(value))
