"""A learner of one sample, mapped over a batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, TypeAlias

import brainstate
import jax
import jax.numpy as jnp
from brainstate.util import FlattedDict

from ._compiler.graph import ETraceGraph
from ._compiler.report import CompilationReport
from ._jax import trace_context
from ._past import cut
from ._sequence import SequenceDriverMixin
from ._types import Held, Path, PyTree, Shape

if TYPE_CHECKING:
    from ._learners.base import ETraceAlgorithm
    from ._recorder import Recorded

__all__ = ["ETraceVmap"]

# A filter of states as of `brainstate.nn.Module.states` (a class, a tag, a predicate, ...), or a mapping of filters to
# their axes.
States: TypeAlias = Any


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

    _is_mapped = True

    def __init__(
        self,
        module: ETraceAlgorithm,
        in_axes: PyTree = 0,
        out_axes: PyTree = 0,
        vmap_states: States = None,
        vmap_out_states: States = None,
        axis_name: Hashable | None = None,
        axis_size: int | None = None,
    ):
        super().__init__(module, in_axes, out_axes, vmap_states, vmap_out_states, axis_name, axis_size)
        self._filters = Held((vmap_states, vmap_out_states))
        self._functions = Held((None, None, None))
        module._draw_apart()

    def _vmap_shape(self) -> Shape:
        state = next(iter(self.module.hidden_states.values()))
        return (jax.tree.leaves(state.value)[0].shape[0],)

    def _mapped(self, options: dict[str, object]) -> tuple[Callable[..., PyTree], Callable[..., PyTree]]:
        """The mapped call, and the same under a driver, for the module and the states that it has now."""
        module = self.module
        key = [options, id(module), *map(id, module.states().values())]
        if self._functions.value[0] == key:
            return self._functions.value[1:]

        def run(args: tuple[PyTree, ...], kwargs: dict[str, PyTree]) -> PyTree:
            return module(*args, **kwargs, **options)

        def record(
            zeros: PyTree, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]
        ) -> tuple[PyTree, Recorded | None]:
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

    def get_etrace_of(self, weight: brainstate.ParamState | Path) -> PyTree:
        """The traces of one parameter, as the learner's method of that name gives them."""
        return self.module.get_etrace_of(weight)

    def reset_state(self, batch_size: int | None = None, **kwargs: object) -> None:
        """Zero the traces and the step counter; the model's states are untouched."""
        self.module.reset_state(batch_size, **kwargs)

    def update(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Run the mapped learner on inputs with a batch axis; keyword arguments without arrays are not mapped."""
        if self._stand_in is not None:
            return self._stand_in(*args, **kwargs)
        arrays = {k: v for k, v in kwargs.items() if any(hasattr(x, "shape") for x in jax.tree.leaves(v))}
        run, record = self._mapped({k: v for k, v in kwargs.items() if k not in arrays})
        args, arrays = jax.tree.map(jnp.asarray, (args, arrays))
        recorder = self.module._recorder
        if recorder is None or recorder.context != trace_context():
            module = self.module
            # Here too, where it is seen what each part of a value is made of, and not only under the map.
            cut(module._written(list(module.path_to_states.values())), module.model4compile)
            try:
                out = run(args, arrays)
            except brainstate.BatchAxisError as error:
                raise brainstate.BatchAxisError(
                    "A state of the learner was not made for the mapped axis. Make the states and compile the learner "
                    "under brainstate.transform.vmap_new_states(state_tag='new') and map it with vmap_states='new'; "
                    f"braintrace.compile(..., batch_size=..., vmap=True) does both. What failed: {error}"
                ) from error
            return out
        out, recorded = record(recorder.zeros, args, arrays)
        recorder.take(*recorded, self._recorded_length)
        return out


def _states_by_axis(module: ETraceAlgorithm, states: States) -> PyTree:
    if states is None:
        return None
    if isinstance(states, dict):
        return {axis: module.states(kind) for kind, axis in states.items()}
    return module.states(states)
