"""What every learner is: a model, its compiled graph, its traces and a step counter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import brainstate
import jax.numpy as jnp
from brainstate.util import FlattedDict

from .._compiler.call import Call
from .._compiler.diagnostics import CompilationRecord, emit
from .._compiler.executor import ETraceGraphExecutor
from .._compiler.graph import ETraceGraph
from .._compiler.report import CompilationReport
from .._jax import zeros
from .._sequence import SequenceDriverMixin
from .._types import CompilationError, Path, PyTree, names_of, path_str

if TYPE_CHECKING:
    from .._layout import Layout

__all__ = ["ETraceAlgorithm", "EligibilityTrace"]


class EligibilityTrace(brainstate.ShortTermState):
    """A short-term state by another name, so that traces can be told from other states by their class.

    Parameters
    ----------
    value : pytree of array
        The trace.
    name : str, optional

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> braintrace.EligibilityTrace(jnp.zeros(3)).value.shape
    (3,)
    """

    __module__ = "braintrace"


class ETraceAlgorithm(SequenceDriverMixin, brainstate.nn.Module):
    """Abstract base of all learners.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its ``update`` is one time step. It is not touched before :meth:`compile_graph`.
    graph_executor : ETraceGraphExecutor
        Compiles the model.
    name : str, optional

    Attributes
    ----------
    running_index : brainstate.LongTermState
        Number of time steps since the last reset.
    """

    __module__ = "braintrace"

    def __init__(self, model: brainstate.nn.Module, graph_executor: ETraceGraphExecutor, name: str | None = None):
        if not isinstance(name, (str, type(None))):
            raise TypeError(
                f"The name of a {type(self).__name__} must be a string, got {name!r}. Pass its other arguments by "
                "keyword; a decay is an argument of pp_prop (decay_or_rank)."
            )
        super().__init__(name=name)
        if not isinstance(model, brainstate.nn.Module):
            raise TypeError(f"The model must be a brainstate.nn.Module, got {type(model).__name__}.")
        if not isinstance(graph_executor, ETraceGraphExecutor):
            raise TypeError(f"graph_executor must be an ETraceGraphExecutor, got {type(graph_executor).__name__}.")
        self.model4compile = model
        self._executor = graph_executor
        self.is_compiled = False
        self._layout: Layout | None = None
        self._mapped_samples = 1  # samples that one learner is mapped over
        self.running_index = brainstate.LongTermState(zeros((), jnp.int32))

    def __repr__(self) -> str:
        kind = f"{type(self).__name__} of {type(self.model4compile).__name__}"
        if not self.is_compiled:
            return f"{kind}, not compiled"
        return f"{kind}\n{self.report.to_str()}"

    def _repr_html_(self) -> str | None:
        """What a notebook shows: the report."""
        return self.report._repr_html_() if self.is_compiled else None

    @property
    def graph_executor(self) -> ETraceGraphExecutor:
        """What compiles the model."""
        if self._executor.model is not self.model4compile:  # this learner is a copy, with a model of its own
            self._executor = self._executor.of(self.model4compile)
        return self._executor

    @property
    def executor(self) -> ETraceGraphExecutor:
        return self.graph_executor

    @property
    def graph(self) -> ETraceGraph:
        """The compiled graph; a ``ValueError`` before :meth:`compile_graph`."""
        return self.graph_executor.graph

    @property
    def report(self) -> CompilationReport:
        """What is trained online and what is not; a ``RuntimeError`` before :meth:`compile_graph`."""
        if not self.is_compiled:
            raise RuntimeError("There is no report yet. Call compile_graph(*example_inputs) first.")
        return self._report()

    def _report(self) -> CompilationReport:
        return CompilationReport(self.graph, self.states(), self._trace_forms())

    def show_graph(self, verbose: bool = True, return_msg: bool = False) -> str | None:
        """Print the report; return its text if ``return_msg``."""
        return self._report().print(verbose, return_msg)

    @property
    def param_states(self) -> FlattedDict:
        """Path -> parameter, for the parameters that the step reads."""
        return self._states_of(brainstate.ParamState)

    @property
    def hidden_states(self) -> FlattedDict:
        """Path -> hidden state, for those that the step touches."""
        return self._states_of(brainstate.HiddenState)

    @property
    def other_states(self) -> FlattedDict:
        """Path -> state, for what the step touches beside parameters and hidden states."""
        known = (brainstate.ParamState, brainstate.HiddenState)
        return FlattedDict({p: s for p, s in self.path_to_states.items() if not isinstance(s, known)})

    def _draw_apart(self) -> None:
        """Have samples over which this learner is mapped draw random numbers of their own: shared noise stays noise."""

    def _states_of(self, kind: type) -> FlattedDict:
        return FlattedDict({p: s for p, s in self.path_to_states.items() if isinstance(s, kind)})

    @property
    def path_to_states(self) -> FlattedDict:
        return self.graph_executor.path_to_states

    @property
    def state_id_to_path(self) -> dict[int, Path]:
        return self.graph_executor.state_id_to_path

    def compile_graph(self, *args: PyTree, **kwargs: PyTree) -> None:
        """Trace one step of the model and allocate the traces; later calls do nothing.

        As by ``jax.jit``, one step is compiled for each kind of call: where the learner is called with arguments or
        states of other shapes or dtypes, with other keyword arguments without arrays, or under other entries of
        ``brainstate.environ`` that are no arrays or numbers, that call compiles another one, and the traces go on.
        Arrays and numbers of the environment that the step reads are inputs of every call; the time step ``dt`` is a
        constant of the step, unless it is itself being traced.

        Parameters
        ----------
        *args : pytree of array, jax.ShapeDtypeStruct, SingleStepData or MultiStepData
            Example arguments of ``update``; of a window the first step counts. The model's states must be
            initialised (``brainstate.nn.init_all_states``).
        **kwargs
            Keyword arguments of the model's ``update``.

        Raises
        ------
        CompilationError
            If no parameter has a trace.
        """
        if self.is_compiled or brainstate.transform.in_new_state_probe():
            return
        self.graph_executor.compile_graph(*args, **kwargs)
        if not self.graph.hidden_param_op_relations:
            raise CompilationError(
                f"Nothing in {type(self.model4compile).__name__} is trainable online: no parameter drives a hidden "
                "state through a marked operation. Route parameters through operations such as braintrace.matmul or "
                f"the layers of braintrace.nn.{self._not_hidden()}\n" + CompilationReport(self.graph).to_str(2)
            )
        self.init_etrace_state(*args)
        self.is_compiled = True
        emit(self._remarks())
        self._lay_out()

    def _remarks(self) -> list[CompilationRecord]:
        """What users should know of the traces that their model gets."""
        return []

    def _not_hidden(self) -> str:
        states = {p: s for p, s in self.other_states.items() if not isinstance(s, brainstate.random.RandomState)}
        if self.hidden_states or not states:
            return ""
        named = ", ".join(f"the {type(s).__name__} {path_str(p)!r}" for p, s in states.items())
        return f" The step has no hidden state: make what it remembers a brainstate.HiddenState ({named})."

    def _select(self, call: Call) -> list[brainstate.State]:
        """The states that a call touches, its step being the present one."""
        return self.graph_executor.select(call)

    def _lay_out(self) -> None:
        """Spread the arrays over the devices of a mesh, if :func:`braintrace.shard` was called."""
        if self._layout is not None:
            self._layout.apply(self)

    def _trace_forms(self) -> dict[int, tuple[str, int]]:
        """Relation number -> in words what is kept for it, and how many bytes."""
        return {}

    def _unit_axes(self) -> Iterable[tuple[brainstate.State, Sequence[Path], int]]:
        """States of traces, paths of the states whose units they follow, and along which axis."""
        return ()

    def init_etrace_state(self, *args: PyTree, **kwargs: PyTree) -> None:
        """Allocate zero traces, as new state objects."""
        raise NotImplementedError

    def reset_state(self, batch_size: int | None = None, **kwargs: object) -> None:
        """Zero the traces and the step counter."""
        raise NotImplementedError

    def get_etrace_of(self, weight: brainstate.ParamState | Path) -> PyTree:
        """The traces of one parameter."""
        raise NotImplementedError

    def update(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Run one step of the model and advance the traces."""
        raise NotImplementedError

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return self.update(*args, **kwargs)

    def _path_of(self, weight: brainstate.ParamState | Path) -> Path:
        if not self.is_compiled:
            raise ValueError("There are no traces yet. Call compile_graph(*example_inputs) first.")
        if isinstance(weight, brainstate.State):
            path = self.state_id_to_path.get(id(weight))
            if path is None:
                raise ValueError(f"This {type(weight).__name__} is no parameter that the compiled step reads.")
        elif isinstance(weight, (str, tuple, list)):
            names = names_of(weight)
            path = next((p for p in self.param_states if names_of(p) == names), names)
        else:
            raise TypeError(f"Pass a ParamState or its path, a tuple of names, got {type(weight).__name__}.")
        if path not in self.param_states:
            known = ", ".join(map(path_str, self.param_states))
            raise ValueError(f"{path_str(path)!r} is no parameter that the compiled step reads; these are: {known}.")
        return path
