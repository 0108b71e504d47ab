"""pp_prop: traces that factorise into a filtered input and a filtered sensitivity."""

from __future__ import annotations

import numbers
from typing import Any

import brainstate
import jax

from .._binding import Binding
from .._compiler.policy import ControlFlowPolicy
from .._engines.io import IOEngine, IOTrace
from .._engines.record import pair_key
from .._types import Path, path_str
from .base import EligibilityTrace
from .config import ETraceConfig
from .vjp import ETraceVjpAlgorithm, legacy_options

__all__ = ["ES_D_RTRL", "IODimVjpAlgorithm", "pp_prop"]


class IODimVjpAlgorithm(ETraceVjpAlgorithm):
    r"""Online learning with memory of the size of inputs and outputs (pp_prop, ES-D-RTRL).

    For an operation :math:`y = \mathrm{op}(x, \theta)` that drives a hidden group with S variables per position,

    .. math::

        \epsilon_x^t &= \alpha_x\, \epsilon_x^{t-1} + x^t \qquad (x = 1 \text{ for a bias}), \\
        \epsilon_f^t &= \alpha_f\, D^t \epsilon_f^{t-1} + (1-\alpha_f)\, \mathrm{df}^t, \\
        \nabla_\theta &\mathrel{+}= \epsilon_x^t \otimes \sum_s L^t_s\, \epsilon^t_{f,s} / (1 - \alpha_f^t),

    where :math:`D = \partial h^t / \partial h^{t-1}` and :math:`\mathrm{df} = \partial h^t / \partial y^t` are taken
    position by position with every operation's output held fixed, and :math:`L` is the signal that reaches the group's
    new values. Whatever part of the current step's gradient this does not carry, and every parameter outside an
    operation, is exact reverse mode through the current step.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its ``update`` is one time step.
    decay_or_rank : float, int, or pair of these
        A float is the decay :math:`\alpha` in ``[0, 1)``; an int is a rank ``r >= 1`` with
        :math:`\alpha = (r-1)/(r+1)`; a pair sets the input side and the sensitivity side.
    name : str, optional
    vjp_method : {'single-step', 'multi-step'}
        See :class:`ETraceVjpAlgorithm`.
    fast_solve : bool
        Accepted for scripts; results do not depend on it.
    control_flow : ControlFlowPolicy, optional
        What to do with the loops and branches of the step.
    config : ETraceConfig, optional
        The rule as coordinates, with ``trace_factorization='io_factorized'``; it holds the decays, so that
        ``decay_or_rank`` may be left out.
    random_feedback_key : int or JAX key, optional
        Of the fixed feedback matrices of ``learning_signal='random_feedback'``.

    Attributes
    ----------
    decay_x, decay_f : float
        The two decays; ``decay`` is their common value.
    etrace_xs, etrace_dfs : dict
        Opaque key -> :class:`EligibilityTrace`: one filtered input per distinct input, shaped like it; one filtered
        sensitivity per operation and group, shape ``V + (S,)``. Without units.

    Raises
    ------
    ValueError, TypeError
        For a decay or rank out of range, or of another type.

    References
    ----------
    .. [1] C. Wang et al., "Model-agnostic linear-memory online learning in spiking neural networks", Nature
       Communications, 2026.

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.GRUCell(2, 3)
    >>> _ = brainstate.nn.init_all_states(cell)
    >>> learner = braintrace.pp_prop(cell, decay_or_rank=0.9)
    >>> x = jnp.ones(2)
    >>> learner.compile_graph(x)
    >>> grads = brainstate.transform.grad(lambda: learner(x).sum(), learner.param_states)()
    >>> grads['Wz', 'weight']['weight'].shape
    (5, 3)
    """

    __module__ = "braintrace"

    _default_config = ETraceConfig("io_factorized", ("scalar_leak", "jacobian"), decay=(0.9, 0.9))

    def __init__(
        self,
        model: brainstate.nn.Module,
        decay_or_rank: float | int | tuple[float | int, float | int] | None = None,
        name: str | None = None,
        vjp_method: str = "single-step",
        fast_solve: bool = True,
        control_flow: ControlFlowPolicy | None = None,
        config: ETraceConfig | None = None,
        random_feedback_key: jax.Array | int | None = None,
        **legacy: Any,
    ):
        legacy_options(legacy, type(self))
        if decay_or_rank is None and config is None:
            raise TypeError("Pass decay_or_rank (a decay in [0, 1), a rank >= 1, or a pair), or a config.")
        decays = None if decay_or_rank is None else _decay_pair(decay_or_rank)
        super().__init__(model, name, vjp_method, control_flow, config or _config_of(decays), random_feedback_key)
        own = (self.config.decay_x, self.config.decay_f)
        if decays is not None and decays != own:
            raise ValueError(f"decay_or_rank gives the decays {decays}, config gives {own}. Pass one, or equal ones.")
        self._decays = own
        self.fast_solve = bool(fast_solve)

    @property
    def decay_x(self) -> float:
        return self._decays[0]

    @property
    def decay_f(self) -> float:
        return self._decays[1]

    @property
    def decay(self) -> float:
        """The common decay; ``AttributeError`` where the two sides differ."""
        if self.decay_x != self.decay_f:
            raise AttributeError(f"The sides decay differently ({self._decays}); read decay_x and decay_f.")
        return self.decay_x

    def init_etrace_state(self, *args: Any, **kwargs: Any) -> None:
        """Allocate zero traces, as new state objects; the step counter is not touched."""
        del args, kwargs
        zeros = self._engine.init()
        self.etrace_xs = {k: EligibilityTrace(v) for k, v in zeros.xs.items()}
        self.etrace_dfs = {k: EligibilityTrace(v) for k, v in zeros.dfs.items()}

    def _trace_states(self):
        relations = self.graph.hidden_param_op_relations
        with_batch = {g.index for r in relations if r.one.primitive.batched for g in r.hidden_groups}
        axis = {}
        for i, r in enumerate(relations):
            behind = int(r.sub_steps is not None)
            axis |= {pair_key(r, g.index): behind for g in r.hidden_groups if g.index in with_batch}
            if r.one.primitive.batched and r.x_var is not None:
                axis[self._engine.x_keys[i]] = behind
        for key, state in (*self.etrace_xs.items(), *self.etrace_dfs.items()):
            yield state, axis.get(key)

    def _unit_axes(self):
        for r in self.graph.hidden_param_op_relations:
            for g in r.hidden_groups:
                yield self.etrace_dfs[pair_key(r, g.index)], g.hidden_paths, -2

    def get_etrace_of(self, weight: brainstate.ParamState | Path) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The traces of one parameter.

        Parameters
        ----------
        weight : ParamState or path

        Returns
        -------
        xs, dfs : dict
            Key -> array; an ``element_wise`` parameter has no ``xs``.

        Raises
        ------
        ValueError
            Before compilation, or if ``weight`` has no trace; the message names the path.
        """
        path = self._path_of(weight)
        keys = self._engine.x_keys
        xs, dfs = {}, {}
        for i, r in enumerate(self.graph.hidden_param_op_relations):
            if path in r.parameter_paths:
                if i in keys:
                    xs[keys[i]] = self.etrace_xs[keys[i]].value
                dfs.update({pair_key(r, g.index): self.etrace_dfs[pair_key(r, g.index)].value for g in r.hidden_groups})
        if not dfs:
            raise ValueError(f"The parameter {path_str(path)!r} is trained by the current step alone: it has no trace.")
        return xs, dfs

    def _make_engine(self, binding: Binding) -> IOEngine:
        numbers = tuple(range(len(binding.graph.hidden_param_op_relations)))
        return IOEngine(binding, numbers, *self._decays, self.config.recursion_f)

    def _get_etrace_data(self) -> IOTrace:
        return IOTrace(
            {k: s.value for k, s in self.etrace_xs.items()}, {k: s.value for k, s in self.etrace_dfs.items()}
        )

    def _assign_etrace_data(self, vals: IOTrace) -> None:
        for states, values in ((self.etrace_xs, vals.xs), (self.etrace_dfs, vals.dfs)):
            for key, state in states.items():
                state.value = values[key]


class pp_prop(IODimVjpAlgorithm):
    """The learning rule of :class:`IODimVjpAlgorithm` under its published name; also called ``ES_D_RTRL``.

    Takes the arguments of :class:`IODimVjpAlgorithm`.

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.ValinaRNNCell(2, 3)
    >>> learner = braintrace.pp_prop(cell, decay_or_rank=19)
    >>> learner.decay
    0.9
    """

    __module__ = "braintrace"


ES_D_RTRL = pp_prop


def _config_of(decays: Any) -> ETraceConfig:
    return ETraceConfig("io_factorized", ("scalar_leak", "jacobian"), decay=decays)


def _decay_pair(value: Any) -> tuple[float, float]:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"decay_or_rank takes a float, an int, or a pair of these, got {len(value)} entries.")
        return _decay(value[0]), _decay(value[1])
    return _decay(value), _decay(value)


def _decay(value: Any) -> float:
    if isinstance(value, bool) or (hasattr(value, "dtype") and value.dtype == bool):
        raise TypeError(f"decay_or_rank takes a float in [0, 1) or an int >= 1, got the bool {value}.")
    if isinstance(value, numbers.Integral):
        if value < 1:
            raise ValueError(f"As a rank, decay_or_rank must be at least 1, got {value}.")
        return (int(value) - 1) / (int(value) + 1)
    if isinstance(value, numbers.Real):
        if not 0.0 <= float(value) < 1.0:
            raise ValueError(f"As a decay, decay_or_rank must lie in [0, 1), got {value}. Ranks are ints.")
        return float(value)
    raise ValueError(f"decay_or_rank takes a float, an int, or a pair of these, got {type(value).__name__}.")
