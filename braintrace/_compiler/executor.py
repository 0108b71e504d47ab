"""Holds a model and, once compiled, its graph."""

from __future__ import annotations

from typing import Any

import brainstate
from brainstate.util import FlattedDict

from .._types import Path
from .graph import ETraceGraph, compile_etrace_graph
from .report import CompilationReport

__all__ = ["ETraceGraphExecutor", "ETraceVjpGraphExecutor"]


class ETraceGraphExecutor:
    """Compiles a model and answers for its graph.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its ``update`` is one time step.

    Raises
    ------
    TypeError
        If ``model`` is no ``brainstate.nn.Module``.
    """

    def __init__(self, model: brainstate.nn.Module):
        if not isinstance(model, brainstate.nn.Module):
            raise TypeError(f"The model must be a brainstate.nn.Module, got {type(model).__name__}.")
        self.model = model
        self._graph: ETraceGraph | None = None

    @property
    def graph(self) -> ETraceGraph:
        if self._graph is None:
            raise ValueError("The graph is not compiled yet. Call compile_graph(*example_inputs) first.")
        return self._graph

    @property
    def is_compiled(self) -> bool:
        return self._graph is not None

    @property
    def states(self) -> FlattedDict:
        """The states that the traced step touches, by path."""
        info = self.graph.module_info
        return FlattedDict(dict(zip(info.compiled_state_paths, info.compiled_model_states)))

    @property
    def path_to_states(self) -> FlattedDict:
        return self.states

    @property
    def state_id_to_path(self) -> dict[int, Path]:
        return {id(s): p for p, s in self.states.items()}

    def compile_graph(self, *args: Any) -> None:
        """Trace the model once."""
        self._graph = compile_etrace_graph(self.model, *args)

    def show_graph(self, verbose: bool = True, return_msg: bool = False) -> str | None:
        """Print the report; return it if asked."""
        message = CompilationReport(self.graph).to_str()
        if verbose:
            print(message)
        return message if return_msg else None


class ETraceVjpGraphExecutor(ETraceGraphExecutor):
    """The executor of learners that differentiate in reverse mode.

    Parameters
    ----------
    model : brainstate.nn.Module
    vjp_method : {'single-step', 'multi-step'}
        Whether a call is differentiated through one step or through a window of steps.
    """

    def __init__(self, model: brainstate.nn.Module, vjp_method: str = "single-step"):
        super().__init__(model)
        if vjp_method not in ("single-step", "multi-step"):
            raise ValueError(f"vjp_method must be 'single-step' or 'multi-step', got {vjp_method!r}.")
        self.vjp_method = vjp_method

    @property
    def is_single_step_vjp(self) -> bool:
        return self.vjp_method == "single-step"

    @property
    def is_multi_step_vjp(self) -> bool:
        return self.vjp_method == "multi-step"
