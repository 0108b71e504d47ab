"""Exact traces where they are cheap, pp_prop's elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import brainstate
import jax

from .._binding import Binding
from .._compiler.policy import ControlFlowPolicy
from .._compiler.relations import HiddenParamOpRelation
from .._engines.engine import bytes_of
from .._engines.hybrid import HybridEngine, HybridTrace
from .._engines.io import IOEngine
from .._engines.param import ParamEngine, ParamRecursion
from .._engines.weight_trace import WeightTrace, as_allocated
from .._types import Path, PyTree, lies_under, names_of, path_str
from .base import EligibilityTrace
from .config import ETraceConfig
from .io_dim import DecayOrRank, IODimVjpAlgorithm, Prefix
from .options import Legacy, VjpMethod
from .param_dim import dense_trace

__all__ = ["HybridDimVjpAlgorithm"]

RECURSION = ParamRecursion()


class HybridDimVjpAlgorithm(IODimVjpAlgorithm):
    r"""The exact traces of D_RTRL for some parameters, those of pp_prop for the others.

    Where D and df of an operation are constants shared by all positions (leaky readouts, exponential synapses,
    integrators), the exact trace :math:`\epsilon^t = D \epsilon^{t-1} + \mathrm{df} \otimes x^t` is a filtered input
    with the very decay of the state, no larger than pp_prop's own. It is kept there, and where ``exact`` asks for it.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its ``update`` is one time step.
    decay_or_rank : float, int, Quantity, pair of these, or mapping
        Of the parameters that are left to pp_prop, as for :class:`IODimVjpAlgorithm`.
    name, vjp_method, fast_solve, control_flow, config, random_feedback_key
        As for :class:`IODimVjpAlgorithm`; a config has ``trace_factorization='hybrid'``.
    exact : {'free', 'all'}, int, or list of paths
        Which parameters have exact traces: ``'free'``, those whose trace needs no entry per weight; ``'all'``, those
        that can have one; an int, as many of these as fit into that many bytes, the smallest first, those that are
        free anyway (of one sample, if the learner is mapped); paths or prefixes of paths, those, and the free ones.

    Attributes
    ----------
    etrace_xs, etrace_dfs : dict
        The traces of pp_prop, as for :class:`IODimVjpAlgorithm`.
    etrace_bwg : dict
        The exact ones, as for :class:`ParamDimVjpAlgorithm`.

    Raises
    ------
    ValueError, TypeError
        For a decay or ``exact`` out of range, or of another type.
    NotImplementedError
        By ``compile_graph``, where a parameter named by ``exact`` can have no trace per weight.

    Examples
    --------
    >>> import braintrace, brainstate, jax.numpy as jnp
    >>> net = brainstate.nn.Sequential(braintrace.nn.GRUCell(2, 3), braintrace.nn.LeakyRateReadout(3, 1))
    >>> with brainstate.environ.context(dt=1.0):
    ...     learner = braintrace.compile(net, 'hybrid', jnp.zeros(2), decay_or_rank=0.9)
    >>> [len(traces) for traces in (learner.etrace_bwg, learner.etrace_dfs)]
    [1, 2]
    """

    __module__ = "braintrace"

    _default_config = ETraceConfig("hybrid", ("scalar_leak", "jacobian"), decay=(0.9, 0.9))

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
        exact: str | int | Sequence[Prefix] = "free",
        **legacy: Unpack[Legacy],
    ):
        super().__init__(
            model, decay_or_rank, name, vjp_method, fast_solve, control_flow, config, random_feedback_key, **legacy
        )
        self.exact = exact
        self._check_exact()

    def _check_exact(self) -> None:
        exact = self.exact
        if isinstance(exact, str):
            if exact not in ("free", "all"):
                raise ValueError(f"exact must be 'free', 'all', a number of bytes or a list of paths, got {exact!r}.")
        elif isinstance(exact, bool) or not isinstance(exact, (int, list, tuple)):
            raise TypeError(f"exact must be 'free', 'all', a number of bytes or a list of paths, got {exact!r}.")
        elif isinstance(exact, int) and exact < 0:
            raise ValueError(f"As a number of bytes, exact must not be negative, got {exact}.")

    def init_etrace_state(self, *args: PyTree, **kwargs: PyTree) -> None:
        """Allocate zero traces, as new state objects; the step counter is not touched."""
        del args, kwargs
        engine = self._engine
        zeros = engine.init()
        self._slot_traces = {k: EligibilityTrace(v) for k, v in zeros.exact.items()}
        self._allocate(zeros.filtered)
        self._forms = {w.key: w.factorised for w in engine.exact.weights}

    def _make_engine(self, binding: Binding) -> HybridEngine:
        relations = binding.graph.hidden_param_op_relations
        decays = self._decays.of(relations)
        weights = self._exact_weights(binding)
        kept = tuple(dict.fromkeys(w.number for w in weights))
        rest = tuple(i for i in decays if i not in kept)
        return HybridEngine(
            binding,
            tuple(decays),
            ParamEngine(binding, kept, weights, RECURSION, samples=self._samples()),
            IOEngine(binding, rest, {i: decays[i] for i in rest}, self._recursion),
        )

    def _exact_weights(self, binding: Binding) -> tuple[WeightTrace, ...]:
        """The traces that are kept exactly, by relation: those that were allocated, or else the chosen ones."""
        can = self._plan("weights", lambda: self._possible_weights(binding))
        if self._forms is None:
            return self._plan("exact", lambda: self._chosen_weights(binding, can))
        return as_allocated((w for weights in can.values() for w in weights if w.key in self._forms), self._forms)

    def _possible_weights(self, binding: Binding) -> dict[int, tuple[WeightTrace, ...]]:
        relations = binding.graph.hidden_param_op_relations
        named = self._named(relations)
        can: dict[int, tuple[WeightTrace, ...]] = {}
        for i in range(len(relations)):
            try:
                can[i] = ParamEngine.plan(binding, [i], RECURSION, not self._overrides("_update_etrace_data"))
            except NotImplementedError:
                if i in named:
                    raise
        return can

    def _chosen_weights(self, binding: Binding, can: Mapping[int, tuple[WeightTrace, ...]]) -> tuple[WeightTrace, ...]:
        named = self._named(binding.graph.hidden_param_op_relations)
        free = [i for i, weights in can.items() if all(len(w.factorised) == w.structure.width for w in weights)]
        kept = {*free, *named, *(can if self.exact == "all" else ())}
        if isinstance(self.exact, int):
            sizes = {i: sum(bytes_of(jax.eval_shape(lambda w=w: w.init(None))) for w in can[i]) for i in can}
            left = self.exact
            for i in sorted(set(can) - kept, key=sizes.__getitem__):
                if sizes[i] > left:
                    break
                left -= sizes[i]
                kept.add(i)
        return tuple(w for i in sorted(kept) for w in can[i])

    def _named(self, relations: Sequence[HiddenParamOpRelation]) -> set[int]:
        """The relations that ``exact`` names."""
        if not isinstance(self.exact, (list, tuple)):
            return set()
        found: set[int] = set()
        known = [(i, p) for i, r in enumerate(relations) for p in r.parameter_paths]
        for key in self.exact:
            prefix = names_of(key)
            fits = {i for i, p in known if lies_under(p, prefix)}
            if not fits:
                shown = ", ".join(dict.fromkeys(path_str(p) for _, p in known))
                raise ValueError(f"exact names {'.'.join(prefix)!r}, and the parameters with traces are {shown}.")
            found |= fits
        return found

    @property
    def etrace_bwg(self) -> dict[str, EligibilityTrace]:
        """Key -> exact trace, as arrays with the hidden variables along a last axis; made when it is read."""
        return {w.key: EligibilityTrace(self._dense(w)) for w in self._engine.exact.weights}

    def _dense(self, weight: WeightTrace) -> dict[str, jax.Array]:
        return dense_trace(weight, self._slot_traces[weight.key].value, self._binding, self.param_states)

    @property
    def _filters(self) -> IOEngine:
        return self._engine.filtered

    def _trace_states(self) -> Iterator[tuple[brainstate.State, int | None]]:
        yield from ((self._slot_traces[w.key], w.batch_axis) for w in self._engine.exact.weights)
        yield from super()._trace_states()

    def _unit_axes(self) -> Iterator[tuple[brainstate.State, Sequence[Path], int]]:
        for w in self._engine.exact.weights:
            yield self._slot_traces[w.key], w.group.hidden_paths, w.unit_axis
        yield from super()._unit_axes()

    def get_etrace_of(self, weight: brainstate.ParamState | Path) -> PyTree:
        """The traces of one parameter: exact ones as :class:`ParamDimVjpAlgorithm` gives them, others as
        :class:`IODimVjpAlgorithm` does.

        Parameters
        ----------
        weight : ParamState or path

        Raises
        ------
        ValueError
            Before compilation, or if ``weight`` has no trace; the message names the path.
        """
        path = self._path_of(weight)
        exact = {w.key: self._dense(w) for w in self._engine.exact.weights if path in w.relation.parameter_paths}
        return exact or super().get_etrace_of(path)

    def _get_etrace_data(self) -> HybridTrace:
        return HybridTrace({k: s.value for k, s in self._slot_traces.items()}, super()._get_etrace_data())

    def _assign_etrace_data(self, vals: HybridTrace) -> None:
        for key, state in self._slot_traces.items():
            state.value = vals.exact[key]
        super()._assign_etrace_data(vals.filtered)
