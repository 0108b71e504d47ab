"""Published learning rules: an engine, its coordinates, and a name."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, Literal, Unpack

import brainstate
import jax
from jax.typing import DTypeLike

from .._binding import Binding
from .._compiler.policy import ControlFlowPolicy
from .._compiler.scope import CEILING
from .._engines.param import check_anchors
from .._types import PyTree
from .config import ETraceConfig
from .io_dim import DecayOrRank, pp_prop
from .options import EPropOptions, IOOptions, Legacy, SnApOptions, VjpMethod, legacy_options
from .param_dim import ParamDimVjpAlgorithm

__all__ = ["D_RTRL", "EProp", "Immediate", "OSTLFeedforward", "OSTLRecurrent", "SnAp", "ThreeFactor"]


class D_RTRL(ParamDimVjpAlgorithm):
    """The learning rule of :class:`ParamDimVjpAlgorithm` under its published name.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its ``update`` is one time step.
    name : str, optional
    vjp_method : {'single-step', 'multi-step'}
        Whether the signal meets the trace after every step, or the gradient is exact within a window of steps; see
        :class:`ETraceVjpAlgorithm`.
    trace_dtype : dtype, optional
        Storage precision of the traces; gradients keep the parameters' dtype.
    control_flow : ControlFlowPolicy, optional
        What to do with the loops and branches of the step.
    config : ETraceConfig, optional
        The rule as coordinates, with ``trace_factorization='per_param'``.
    random_feedback_key : int or JAX key, optional
        Of the fixed feedback matrices of ``learning_signal='random_feedback'``.
    snap_max_jacobian_elements : int
        See :class:`ETraceVjpAlgorithm`.
    fast_solve, chunked_trace, **legacy
        Accepted for scripts; without effect.

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> learner = braintrace.compile(braintrace.nn.ValinaRNNCell(2, 3), 'd_rtrl', jnp.zeros(2))
    >>> [t.value['weight'].shape for t in learner.etrace_bwg.values()]
    [(5, 3, 1)]
    """

    __module__ = "braintrace"


class EProp(ParamDimVjpAlgorithm):
    r"""D_RTRL with a filtered trace and, optionally, fixed random feedback (e-prop).

    Parameters
    ----------
    model : brainstate.nn.Module
    feedback : {'symmetric', 'random'}
        Whether the true signal meets the traces, or its unit vector sent through a fixed random matrix over units.
    kappa_filter_decay : float
        :math:`\kappa` of :math:`\bar\epsilon \leftarrow \kappa \bar\epsilon + \epsilon`; 0 is exactly D_RTRL.
    random_feedback_key : int or JAX key, optional
        Needed for ``feedback='random'``.
    name, vjp_method, fast_solve, **kwargs
        As for :class:`ParamDimVjpAlgorithm`.

    Raises
    ------
    ValueError
        For another ``feedback``, or a missing key.
    TypeError
        If ``config`` is given: the other arguments are its coordinates; for a ``kappa_filter_decay`` that is no number.

    Warns
    -----
    CompilationWarning
        If the output reads hidden values by a function that is not linear, such as a spike, or past the new value: the
        filter is behind the traces of hidden states. Keep what the output reads, the spikes, in a ``HiddenState``.

    References
    ----------
    .. [1] G. Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons", Nature
       Communications 11, 2020.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> learner = braintrace.compile(braintrace.nn.GRUCell(2, 3), 'eprop', jnp.zeros(2), kappa_filter_decay=0.5)
    >>> learner.config.trace_filter
    'kappa'
    """

    __module__ = "braintrace"

    def __init__(
        self,
        model: brainstate.nn.Module,
        feedback: Literal["symmetric", "random"] = "symmetric",
        kappa_filter_decay: float = 0.0,
        random_feedback_key: jax.Array | int | None = None,
        name: str | None = None,
        vjp_method: VjpMethod = "single-step",
        fast_solve: bool = True,
        **kwargs: Unpack[EPropOptions],
    ):
        if "config" in kwargs:
            raise TypeError("EProp takes no config: feedback and kappa_filter_decay are its coordinates.")
        if isinstance(kappa_filter_decay, bool) or not isinstance(kappa_filter_decay, numbers.Real):
            raise TypeError(f"kappa_filter_decay must be a number, got {type(kappa_filter_decay).__name__}.")
        if feedback not in ("symmetric", "random"):
            raise ValueError(f"feedback must be 'symmetric' or 'random', got {feedback!r}.")
        self.feedback = feedback
        self.kappa_filter_decay = kappa_filter_decay
        none = kappa_filter_decay <= 0  # not a number is none of both
        kappa: dict[str, Any] = {} if none else {"trace_filter": "kappa", "kappa": kappa_filter_decay}
        signal = "random_feedback" if feedback == "random" else "symmetric"
        super().__init__(
            model,
            name,
            vjp_method,
            fast_solve,
            config=ETraceConfig(learning_signal=signal, **kappa),
            random_feedback_key=random_feedback_key,
            **kwargs,
        )


class Immediate(pp_prop):
    r"""Derivatives of the current step alone, without any memory: pp_prop with decay 0.

    The gradient is :math:`\sum_t x^t \otimes \sum_s L^t_s\, \mathrm{df}^t_s`: that of every step's loss, with the old
    hidden values held fixed.

    Parameters
    ----------
    model : brainstate.nn.Module
    name : str, optional
    **kwargs
        As for :class:`IODimVjpAlgorithm`, but for ``decay_or_rank`` and ``config``.

    Raises
    ------
    TypeError
        If ``config`` is given.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> braintrace.compile(braintrace.nn.GRUCell(2, 3), 'immediate', jnp.zeros(2)).decay
    0.0
    """

    __module__ = "braintrace"

    def __init__(self, model: brainstate.nn.Module, name: str | None = None, **kwargs: Unpack[IOOptions]):
        if "config" in kwargs:
            raise TypeError("Immediate takes no config: it is one point of the coordinates.")
        super().__init__(model, 0.0, name, **kwargs)


class OSTLFeedforward(pp_prop):
    """pp_prop with a negligible memory, for networks without recurrence (OSTL without H).

    Parameters
    ----------
    model : brainstate.nn.Module
    decay_or_rank : float, int, or pair of these
        0.0 (or rank 1) has no memory at all.
    name : str, optional
    **kwargs
        As for :class:`IODimVjpAlgorithm`.

    References
    ----------
    .. [1] T. Bohnstingl et al., "Online spatio-temporal learning in deep neural networks", IEEE Transactions on
       Neural Networks and Learning Systems 34, 2023.

    Examples
    --------
    >>> import braintrace
    >>> braintrace.OSTLFeedforward(braintrace.nn.GRUCell(2, 3)).regime
    'without-H'
    """

    __module__ = "braintrace"

    regime = "without-H"

    def __init__(
        self,
        model: brainstate.nn.Module,
        decay_or_rank: DecayOrRank | Mapping[Any, DecayOrRank] = 1e-6,
        name: str | None = None,
        **kwargs: Unpack[IOOptions],
    ):
        super().__init__(model, decay_or_rank, name, **kwargs)


class OSTLRecurrent(ParamDimVjpAlgorithm):
    r"""D_RTRL whose transition Jacobian contains the recurrent weights (OSTL with recurrence).

    :math:`D` is the block on the diagonal of the whole Jacobian :math:`\partial h^t / \partial h^{t-1}`, recurrent
    operations included, where :class:`D_RTRL` holds their outputs fixed.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its ``update`` is one time step.
    name : str, optional
    vjp_method : {'single-step', 'multi-step'}
        Whether the signal meets the trace after every step, or the gradient is exact within a window of steps; see
        :class:`ETraceVjpAlgorithm`.
    trace_dtype : dtype, optional
        Storage precision of the traces; gradients keep the parameters' dtype.
    control_flow : ControlFlowPolicy, optional
        What to do with the loops and branches of the step.
    config : ETraceConfig, optional
        The rule as coordinates, with ``trace_factorization='per_param'``; by default with
        ``recurrence_scope='coupled'``.
    random_feedback_key : int or JAX key, optional
        Of the fixed feedback matrices of ``learning_signal='random_feedback'``.
    snap_max_jacobian_elements : int
        See :class:`ETraceVjpAlgorithm`.
    fast_solve, chunked_trace, **legacy
        Accepted for scripts; without effect.

    Raises
    ------
    NotImplementedError
        By ``compile_graph``, for a model with a long loop that is not unrolled.

    References
    ----------
    .. [1] T. Bohnstingl et al., "Online spatio-temporal learning in deep neural networks", IEEE Transactions on Neural
       Networks and Learning Systems 34, 2023.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> learner = braintrace.compile(braintrace.nn.GRUCell(2, 3), 'ostl_recurrent', jnp.zeros(2))
    >>> learner.regime, learner.config.recurrence_scope
    ('with-H', 'coupled')
    """

    __module__ = "braintrace"

    _default_config = ETraceConfig(recurrence_scope="coupled")
    regime = "with-H"


class SnAp(ParamDimVjpAlgorithm):
    r"""Traces that follow a weight's influence to the positions within n steps (sparse n-step approximation, SnAp-n).

    A weight that acts on position p keeps, for every position q that p influences within n - 1 steps, the sensitivity
    of the hidden variables of q:

    .. math::

        \epsilon^t_{q} = \sum_{q'} J^t_{q q'} \epsilon^{t-1}_{q'} + [q = p]\, \mathrm{df}^t \otimes x^t, \qquad
        \nabla_\theta \mathrel{+}= \sum_q \langle L^t_q, \epsilon^t_q \rangle,

    with q, q' among these positions and the whole Jacobian :math:`J = \partial h^t / \partial h^{t-1}` of the hidden
    group, recurrent weights included. With ``n=1`` this is :class:`OSTLRecurrent`; where the neighbourhood holds every
    position, and the operation acts position by position on one group, it is back-propagation through time.

    Which position influences which is read off a single recurrent product: of a dense one, each influences all; of a
    sparse one, p influences q where an entry (p, q) is stored. For any other recurrence each position is taken to
    influence every other.

    Parameters
    ----------
    model : brainstate.nn.Module
    n : int
        The order, at least 1.
    name, vjp_method, fast_solve, **kwargs
        As for :class:`ParamDimVjpAlgorithm`.
    snap_max_jacobian_elements : int
        The most elements that the Jacobian of a group may have between neighbours: positions times (neighbours times
        hidden variables) squared.

    Attributes
    ----------
    n : int

    Raises
    ------
    TypeError
        If ``n`` is no int, or ``config`` is given.
    ValueError
        If ``n`` is less than 1.
    NotSupportedError
        By ``compile_graph``, if the Jacobian would be larger.
    NotImplementedError
        By ``compile_graph``, for an operation that does not register ``snap_anchor``, or a long loop that is not
        unrolled.

    References
    ----------
    .. [1] J. Menick et al., "A practical sparse approximation for real time recurrent learning", International
       Conference on Learning Representations, 2021.

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.ValinaRNNCell(2, 3)
    >>> _ = brainstate.nn.init_all_states(cell)
    >>> learner = braintrace.SnAp(cell, n=2)
    >>> with warnings.catch_warnings(action='ignore'):
    ...     learner.compile_graph(jnp.zeros(2))
    >>> learner.graph.hidden_groups[0].snap.num_neighbour
    3
    """

    __module__ = "braintrace"

    def __init__(
        self,
        model: brainstate.nn.Module,
        n: int = 2,
        name: str | None = None,
        vjp_method: VjpMethod = "single-step",
        fast_solve: bool = True,
        snap_max_jacobian_elements: int = CEILING,
        **kwargs: Unpack[SnApOptions],
    ):
        if "config" in kwargs:
            raise TypeError("SnAp takes no config: n is its coordinate.")
        config = ETraceConfig(recurrence_scope="sparse_n", sparse_n=n)
        super().__init__(
            model,
            name,
            vjp_method,
            fast_solve,
            config=config,
            snap_max_jacobian_elements=snap_max_jacobian_elements,
            **kwargs,
        )
        self.n = int(n)

    def _bind(self) -> Binding:
        check_anchors(self.graph.hidden_param_op_relations)
        return super()._bind()


class ThreeFactor(ParamDimVjpAlgorithm):
    r"""D_RTRL whose traces meet a third factor (a reward, a neuromodulator) in the place of the learning signal.

    With a modulator :math:`m`, the gradient of a parameter with a trace is
    :math:`\sum_s \langle m^t_s, \epsilon^t_s \rangle`, whatever the loss makes of the new states; other
    parameters (a readout) get the gradient of the current step's loss, as with every rule. Differentiate a loss that
    depends on the learner's output: from one that does not (a count of spikes) JAX finds no way to the traces, and
    gives zeros.

    Parameters
    ----------
    model : brainstate.nn.Module
    name : str, optional
    vjp_method : {'single-step'}
        The rule is defined step by step.
    modulator : array, optional
        The standing third factor, for calls without their own: a scalar, an array of the shape V of the hidden states,
        or one that broadcasts to ``V + (S,)`` for S states per position. Also an attribute, which may be assigned at
        any time; a jitted step reads its present value.
    fast_solve, trace_dtype, chunked_trace, control_flow, snap_max_jacobian_elements, **legacy
        As for :class:`ParamDimVjpAlgorithm`.

    Raises
    ------
    ValueError
        For another ``vjp_method``; by a call, for a modulator that does not expand to the states.
    RuntimeError
        By a call, if it has no modulator and there is none standing.
    TypeError
        For an unknown argument; by a call, for a modulator that is a list or tuple.

    References
    ----------
    .. [1] N. Fremaux and W. Gerstner, "Neuromodulated spike-timing-dependent plasticity, and theory of three-factor
       learning rules", Frontiers in Neural Circuits 9, 2016.

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.GRUCell(2, 3)
    >>> learner = braintrace.compile(cell, 'three_factor', jnp.zeros(2))
    >>> reward = jnp.asarray([0.0, 0.0, 1.0])
    >>> grads = learner.etrace_grad(jnp.ones((3, 2)), reward, step_fn=lambda x, r: learner(x, modulator=r).sum())
    >>> grads['Wz', 'weight']['weight'].shape
    (5, 3)
    """

    __module__ = "braintrace"

    _default_config = ETraceConfig(learning_signal="modulatory")

    def __init__(
        self,
        model: brainstate.nn.Module,
        name: str | None = None,
        vjp_method: VjpMethod = "single-step",
        modulator: PyTree = None,
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
        self.modulator = modulator
