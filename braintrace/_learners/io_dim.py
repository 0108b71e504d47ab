"""pp_prop: traces that factorise into a filtered input and a filtered sensitivity."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, Unpack

import brainstate
import brainunit as u
import jax

from .._binding import Binding
from .._compiler.policy import ControlFlowPolicy
from .._engines.engine import Engine
from .._engines.io import IOEngine, IOTrace
from .._types import Path, PyTree, path_str
from .base import EligibilityTrace
from .config import ETraceConfig
from .decays import Decays
from .options import Legacy, VjpMethod, legacy_options
from .vjp import ETraceVjpAlgorithm

__all__ = ["ES_D_RTRL", "IODimVjpAlgorithm", "pp_prop"]

Decay: TypeAlias = "float | int | u.Quantity"
DecayOrRank: TypeAlias = "Decay | tuple[Decay, Decay]"
Prefix: TypeAlias = "str | Sequence[Hashable]"  # a path, a beginning of one, or these as a string with dots


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
    decay_or_rank : float, int, Quantity, pair of these, or mapping
        A float is the decay :math:`\alpha` in ``[0, 1)``; an int is a rank ``r >= 1`` with
        :math:`\alpha = (r-1)/(r+1)`; a time is a time constant :math:`\tau` with :math:`\alpha = e^{-dt/\tau}`; a pair
        sets the input side and the sensitivity side. A mapping gives these by parameter: its keys are paths or
        prefixes of paths (``('cell', 'W')``, ``'cell.W'``, ``'cell'``), of which the longest that fits counts; ``()``
        stands for all others.
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
        decay_or_rank: DecayOrRank | Mapping[Any, DecayOrRank] | None = None,
        name: str | None = None,
        vjp_method: VjpMethod = "single-step",
        fast_solve: bool = True,
        control_flow: ControlFlowPolicy | None = None,
        config: ETraceConfig | None = None,
        random_feedback_key: jax.Array | int | None = None,
        **legacy: Unpack[Legacy],
    ):
        legacy_options(legacy, type(self))
        if decay_or_rank is None and config is None:
            raise TypeError("Pass decay_or_rank (a decay in [0, 1), a rank >= 1, or a pair), or a config.")
        decays = None if decay_or_rank is None else Decays(decay_or_rank)
        if config is None:
            config = dataclasses.replace(self._default_config, decay=decays.first)  # type: ignore[union-attr]
        elif decays is not None and decays.is_mapping:
            raise TypeError(
                "A config holds the same decays for all parameters: pass it, or decay_or_rank as a mapping."
            )
        super().__init__(model, name, vjp_method, control_flow, config, random_feedback_key)
        own = (self.config.decay_x, self.config.decay_f)
        if decays is not None and not decays.is_mapping and decays.first != own:
            raise ValueError(
                f"decay_or_rank gives the decays {decays.first}, config gives {own}. Pass one, or equal ones."
            )
        self._decays = decays or Decays(own)
        self.fast_solve = bool(fast_solve)

    @property
    def decay_x(self) -> float:
        return self._common_decays[0]

    @property
    def decay_f(self) -> float:
        return self._common_decays[1]

    @property
    def decay(self) -> float:
        """The common decay; ``AttributeError`` where the two sides, or parameters, differ."""
        if self.decay_x != self.decay_f:
            raise AttributeError(f"The sides decay differently ({self._common_decays}); read decay_x and decay_f.")
        return self.decay_x

    @property
    def _common_decays(self) -> tuple[float, float]:
        if self._decays.common is None:
            shown = {".".join(k): v for k, v in self._decays.by_prefix.items()}
            raise AttributeError(f"The parameters decay differently: {shown}.")
        return self._decays.common

    def init_etrace_state(self, *args: PyTree, **kwargs: PyTree) -> None:
        """Allocate zero traces, as new state objects; the step counter is not touched."""
        del args, kwargs
        self._allocate(self._engine.init())

    def _allocate(self, zeros: IOTrace) -> None:
        self.etrace_xs = {k: EligibilityTrace(v) for k, v in zeros.xs.items()}
        self.etrace_dfs = {k: EligibilityTrace(v) for k, v in zeros.dfs.items()}

    @property
    def _filters(self) -> IOEngine:
        """The engine of those traces that are filtered inputs and sensitivities: here, of all."""
        return self._engine

    def _trace_states(self) -> Iterator[tuple[brainstate.State, int | None]]:
        engine = self._filters
        with_batch = {g.index for _, r, g, _ in engine.pairs if r.one.primitive.batched}
        axis = {key: int(r.sub_steps is not None) for _, r, g, key in engine.pairs if g.index in with_batch}
        for i, key in engine.x_keys.items():
            if engine.relations[i].one.primitive.batched:
                axis[key] = int(engine.relations[i].sub_steps is not None)
        for key, state in (*self.etrace_xs.items(), *self.etrace_dfs.items()):
            yield state, axis.get(key)

    def _unit_axes(self) -> Iterator[tuple[brainstate.State, Sequence[Path], int]]:
        for _, _, g, key in self._filters.pairs:
            yield self.etrace_dfs[key], g.hidden_paths, -2

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
        engine = self._filters
        xs, dfs = {}, {}
        for i, r, _, key in engine.pairs:
            if path in r.parameter_paths:
                dfs[key] = self.etrace_dfs[key].value
                if i in engine.x_keys:
                    xs[engine.x_keys[i]] = self.etrace_xs[engine.x_keys[i]].value
        if not dfs:
            raise ValueError(f"The parameter {path_str(path)!r} is trained by the current step alone: it has no trace.")
        return xs, dfs

    def _make_engine(self, binding: Binding) -> Engine:
        decays = self._decays.of(binding.graph.hidden_param_op_relations)
        return IOEngine(binding, tuple(decays), decays, self._recursion)

    @property
    def _recursion(self) -> str:
        """What stands in the place of D; that no decay of one parameter changes it for another."""
        return "jacobian" if self._decays.is_mapping else self.config.recursion_f

    def _get_etrace_data(self) -> PyTree:
        return IOTrace(
            {k: s.value for k, s in self.etrace_xs.items()}, {k: s.value for k, s in self.etrace_dfs.items()}
        )

    def _assign_etrace_data(self, vals: PyTree) -> None:
        for states, values in ((self.etrace_xs, vals.xs), (self.etrace_dfs, vals.dfs)):
            for key, state in states.items():
                state.value = values[key]


class pp_prop(IODimVjpAlgorithm):
    """The learning rule of :class:`IODimVjpAlgorithm` under its published name; also called ``ES_D_RTRL``.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its ``update`` is one time step.
    decay_or_rank : float, int, Quantity, pair of these, or mapping
        A decay in ``[0, 1)``, a rank ``r >= 1`` that stands for the decay ``(r - 1) / (r + 1)``, or a time constant; a
        pair for input and sensitivity; a mapping from paths to these.
    name : str, optional
    vjp_method : {'single-step', 'multi-step'}
        Whether the signal meets the trace after every step, or the gradient is exact within a window of steps; see
        :class:`ETraceVjpAlgorithm`.
    control_flow : ControlFlowPolicy, optional
        What to do with the loops and branches of the step.
    config : ETraceConfig, optional
        The rule as coordinates, in place of ``decay_or_rank``.
    random_feedback_key : int or JAX key, optional
        Of the fixed feedback matrices of ``learning_signal='random_feedback'``.
    fast_solve, **legacy
        Accepted for scripts; without effect.

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
