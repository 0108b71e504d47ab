"""Holds a model and, once compiled, its graph."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
from brainstate.util import FlattedDict
from jax.typing import ArrayLike

from .._jax import consts_of, is_tracer
from .._types import Path, PyTree, cause_of, in_one_line, path_str
from .call import Call, call_of, convertible, equal
from .diagnostics import emit
from .graph import ETraceGraph, compile_in_scope
from .policy import ControlFlowPolicy
from .report import CompilationReport
from .scope import CEILING, scope_of

__all__ = ["Compiled", "ETraceGraphExecutor"]


class Compiled:
    """A compiled step, which calls it serves, and what engines find out about it once. Copies of a learner share it.

    Attributes
    ----------
    graph : ETraceGraph
    example : Call
        Shapes of the call that it was compiled for.
    written : frozenset of path
        The states that it writes.
    plans : dict
        Of the engine of the learner.
    """

    def __init__(self, graph: ETraceGraph, call: Call):
        info = graph.module_info
        self.graph = graph
        self.example = call._replace(**{k: jax.tree.map(_shape_of, getattr(call, k)) for k in ("args", "keywords")})
        self.constants = {**call.constants, **{k: call.inputs[k] for k in info.fixed_numbers}}
        self.unread = frozenset(call.inputs) - {*info.environment_keys, *info.fixed_numbers}
        self.written = frozenset(
            path for path, leaves in zip(info.compiled_state_paths, info.state_leaves) if info.writes(leaves)
        )
        self.plans: dict[Hashable, Any] = {}

    def __deepcopy__(self, memo: object) -> Compiled:
        return self

    @property
    def outlives_its_trace(self) -> bool:
        return not any(map(is_tracer, consts_of(self.graph.module_info.closed_jaxpr)))

    def difference(self, call: Call, states: Sequence[brainstate.State]) -> str | None:
        """Why a call needs another step, in words; ``None`` where this one serves it."""
        info = self.graph.module_info
        tree: jax.tree_util.PyTreeDef
        leaves, tree = jax.tree.flatten(call.given)
        if tree != info.in_tree:
            return f"The arguments have the structure {tree}, the learner was compiled for {info.in_tree}"
        for i, (x, m, v) in enumerate(zip(leaves, call.over_time, info.jaxpr.invars)):
            if other := _other(x, v.aval, over_time=m):
                return f"argument leaf {i} {other}"
        if not equal(dict(call.options), dict(self.example.options)):
            known = dict(self.example.options)
            return f"The keyword arguments are {dict(call.options)}, the learner was compiled for {known}"
        return self._other_environment(call) or self._other_states(states)

    def _other_environment(self, call: Call) -> str | None:
        info = self.graph.module_info
        known = {**call.constants, **{k: v for k, v in call.inputs.items() if k in info.fixed_numbers}}
        for key in {**self.constants, **known}:
            if key not in known or key not in self.constants or not equal(known[key], self.constants[key]):
                return f"The entry {key!r} of brainstate.environ is another one"
        read: PyTree = info.environment.unflatten(
            v.aval for v in info.jaxpr.invars[info.in_tree.num_leaves : info.first_state]
        )
        for key, value in call.inputs.items():
            if key in self.unread or key in self.constants:
                continue
            found: tuple[list[PyTree], jax.tree_util.PyTreeDef] = jax.tree.flatten(value)
            wanted = jax.tree.flatten(read.get(key))
            if found[1] != wanted[1] or any(_other(x, a) for x, a in zip(found[0], wanted[0])):
                return f"The entry {key!r} of brainstate.environ has another structure, shape or dtype"
        missing = [k for k in read if k not in call.inputs]
        return f"The entry {missing[0]!r} of brainstate.environ is not set" if missing else None

    def _other_states(self, states: Sequence[brainstate.State]) -> str | None:
        info = self.graph.module_info
        for path, tree, state in zip(info.compiled_state_paths, info.state_trees, states):
            found: jax.tree_util.PyTreeDef
            leaves, found = jax.tree.flatten(state.value)
            if found != tree:
                raise ValueError(
                    f"The value of {path_str(path)!r} has the structure {found}, the learner was compiled for {tree}. "
                    "A state keeps one structure and unit; compile another learner."
                )
            for x, aval in zip(leaves, info.state_avals(path)):
                if other := _other(x, aval):
                    return f"{path_str(path)} {other}"
        return None


def _shape_of(x: ArrayLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def _other(x: ArrayLike, aval: jax.core.ShapedArray | jax.ShapeDtypeStruct, over_time: bool = False) -> str | None:
    shape, dtype = jnp.shape(x), jnp.result_type(x)
    if shape[over_time:] != tuple(aval.shape):
        return f"has shape {shape}{', time in front' * over_time}, the learner was compiled for {tuple(aval.shape)}"
    return None if convertible(dtype, aval.dtype) else f"has dtype {dtype}, the learner was compiled for {aval.dtype}"


class ETraceGraphExecutor:
    """Compiles a model and answers for its graph.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its ``update`` is one time step.
    include_recurrent_mixing, sparse_n, snap_max_jacobian_elements
        As for :func:`compile_etrace_graph`.
    control_flow : ControlFlowPolicy, optional
        What to do with loops and branches.

    Raises
    ------
    TypeError
        If ``model`` is no ``brainstate.nn.Module``, or ``control_flow`` no ``ControlFlowPolicy``.
    ValueError
        If ``sparse_n`` or ``snap_max_jacobian_elements`` is below 1.

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.GRUCell(2, 3)
    >>> _ = brainstate.nn.init_all_states(cell)
    >>> executor = braintrace.ETraceGraphExecutor(cell)
    >>> executor.compile_graph(jnp.zeros(2))
    >>> executor.graph.hidden_groups
    [HiddenGroup(index=0, members=['h'], varshape=(3,), S=1)]
    """

    _needs_perturbation = False

    def __init__(
        self,
        model: brainstate.nn.Module,
        include_recurrent_mixing: bool = False,
        sparse_n: int | None = None,
        snap_max_jacobian_elements: int = CEILING,
        control_flow: ControlFlowPolicy | None = None,
    ):
        if not isinstance(model, brainstate.nn.Module):
            raise TypeError(f"The model must be a brainstate.nn.Module, got {type(model).__name__}.")
        if not isinstance(control_flow, (ControlFlowPolicy, type(None))):
            raise TypeError(f"control_flow must be a ControlFlowPolicy or None, got {type(control_flow).__name__}.")
        self._scope = scope_of(include_recurrent_mixing, sparse_n, snap_max_jacobian_elements)
        self.model = model
        self.include_recurrent_mixing = include_recurrent_mixing
        self.sparse_n = sparse_n
        self.snap_max_jacobian_elements = snap_max_jacobian_elements
        self.control_flow = control_flow
        self._compiled: Compiled | None = None
        self._known: list[Compiled] = []
        self._said: set[str] = set()
        self._example: tuple[tuple[PyTree, ...], dict[str, PyTree]] | None = None  # after unpickling

    @property
    def compiled(self) -> Compiled:
        """The step of the latest call."""
        if self._compiled is None:
            if self._example is None:
                raise ValueError("The graph is not compiled yet. Call compile_graph(*example_inputs) first.")
            args, keywords = self._example
            self._compile(call_of(args, keywords))
        return self._compiled  # type: ignore[return-value]

    @property
    def graph(self) -> ETraceGraph:
        return self.compiled.graph

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None or self._example is not None

    @property
    def written(self) -> frozenset[Path]:
        """The states that a call of some kind writes, of those that there were."""
        return self.compiled.written.union(*(known.written for known in self._known))

    @property
    def states(self) -> FlattedDict:
        """The states that the traced step touches, by path, as the model has them now."""
        return FlattedDict(dict(zip(self.graph.module_info.compiled_state_paths, self._states_of(self.compiled))))

    @property
    def path_to_states(self) -> FlattedDict:
        return self.states

    @property
    def state_id_to_path(self) -> dict[int, Path]:
        return {id(s): p for p, s in self.states.items()}

    def compile_graph(self, *args: PyTree, **kwargs: PyTree) -> None:
        """Trace the model once."""
        self._compile(call_of(args, kwargs).first_step())

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """The present step stays the present one where a call fails."""
        before = self._compiled, list(self._known)
        try:
            yield
        except BaseException:
            self._compiled, self._known = before
            raise

    def select(self, call: Call) -> list[brainstate.State]:
        """Make the step that serves a call the present one, compiling it if need be; the states that it touches."""
        present = self.compiled
        states = self._states_of(present)
        difference = present.difference(call, states)
        if difference is None:
            return states
        others = (c for c in self._known if c is not present and c.difference(call, self._states_of(c)) is None)
        found = next(others, None)
        if found is None:
            self._compile_another(call, difference)
        else:
            self._compiled = found
        return self._states_of(self.compiled)

    def _compile(self, call: Call) -> None:
        graph = compile_in_scope(self.model, call, self._scope, self._needs_perturbation, self.control_flow)
        emit(graph.diagnostics, self._said)
        self._compiled = Compiled(graph, call)
        if self._compiled.outlives_its_trace:
            self._known.append(self._compiled)

    def _compile_another(self, call: Call, difference: str) -> None:
        try:
            self._compile(call.first_step())
        except Exception as error:
            if not equal(dict(call.options), dict(self.compiled.example.options)):  # the model says it best
                raise
            raise ValueError(
                f"{difference}, and the model's step cannot be compiled for this call: {in_one_line(cause_of(error))} "
                "Pass arguments like those of the first call (time and batch axes in place?), or initialise the states "
                "with the batch size of the inputs."
            ) from error

    def _states_of(self, compiled: Compiled) -> list[brainstate.State]:
        info, now = compiled.graph.module_info, self.model.states()
        out = []
        for path, before in zip(info.compiled_state_paths, info.compiled_model_states):
            state = now.get(path, None if path in info.retrieved_model_states else before)
            kinds = brainstate.ParamState, brainstate.HiddenState
            if state is None or any(isinstance(state, k) != isinstance(before, k) for k in kinds):
                there = "no state" if state is None else f"a {type(state).__name__}"
                raise ValueError(
                    f"The learner was compiled for the {type(before).__name__} {path_str(path)!r}, and the model has "
                    f"{there} there now. Put it back (brainstate.nn.init_all_states), or make another learner."
                )
            out.append(state)
        return out

    def of(self, model: brainstate.nn.Module) -> ETraceGraphExecutor:
        """This one for a copy of its model."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, model=model, _known=list(self._known))
        return other

    def __deepcopy__(self, memo: dict[int, object]) -> ETraceGraphExecutor:
        return self.of(copy.deepcopy(self.model, memo))

    def __getstate__(self) -> dict[str, object]:
        # Programs cannot be pickled: they are compiled again when they are asked for.
        example = self._example
        if self._compiled is not None:
            call = self._compiled.example
            example = call.args, {**call.keywords, **call.options}
        return {**self.__dict__, "_compiled": None, "_known": [], "_example": example}

    def show_graph(self, verbose: bool = True, return_msg: bool = False) -> str | None:
        """Print the report; return it if asked."""
        return CompilationReport(self.graph).print(verbose, return_msg)
