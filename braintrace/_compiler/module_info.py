"""Model -> one flat step program."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import brainstate
import brainunit as u
import jax
from brainstate.util import FlattedDict
from jax.tree_util import PyTreeDef
from jax.typing import ArrayLike

from .._jax import Atom, ClosedJaxpr, Jaxpr, Var, consts_of, is_tracer, open_jaxpr
from .._program import made_at
from .._types import NotSupportedError, Path, PyTree, path_str
from .call import Call, call_of, convertible
from .complex_states import Parts, before_cast, with_real_parts
from .diagnostics import CompilationRecord, DiagnosticKind, DiagnosticLevel
from .flatten import flatten
from .frame import Origin
from .policy import ControlFlowPolicy
from .stored import read_from_stored
from .tracing import check_structure, traced_with_numbers

__all__ = ["ModuleInfo", "extract_module_info"]


class ModuleInfo(NamedTuple):
    """One step of a model as a flat jaxpr, and what its inputs and outputs are.

    Inputs are the leaves of the arguments, then those of the environment, then the leaves of every touched state;
    outputs are the leaves of the model's output, then the new leaves of the same states.

    Attributes
    ----------
    closed_jaxpr : ClosedJaxpr
        The step without nested ``jit``; its ``jaxpr`` is the property :attr:`jaxpr`.
    compiled_model_states : tuple of State
        The touched states in the order of first access.
    compiled_state_paths : tuple of path
        Their paths, in the same order.
    retrieved_model_states : FlattedDict
        Every state of the model, by path.
    state_leaves : tuple of tuple of int
        For each touched state, the positions of its leaves among the inputs (and, shifted, the outputs).
    in_tree, out_tree : PyTreeDef
        Structure of the arguments and of the output.
    environment : PyTreeDef
        Structure of the arrays and numbers of ``brainstate.environ`` that the step reads, by key.
    fixed_numbers : tuple of str
        Keys of numbers of the environment whose value the step needed to be known.
    state_trees : tuple of PyTreeDef
        Structure of each touched state's value.
    hidden_path_to_invar : dict
        Path of a hidden state to its input variable.
    hidden_path_to_outvar : dict
        Path of a hidden state to the variable that holds its new value, before a last change of precision.
    complex_hidden : dict
        Path of a complex hidden state to how the program's reals, its real and imaginary part, make up the value.
    weight_path_to_invars : dict
        Path of a parameter to its input variables, one per leaf.
    invar_to_weight_path : dict
        The inverse.
    num_var_out : int
        Number of output leaves of the model.
    diagnostics : tuple of CompilationRecord
    """

    closed_jaxpr: ClosedJaxpr
    compiled_model_states: tuple[brainstate.State, ...]
    compiled_state_paths: tuple[Path, ...]
    retrieved_model_states: Mapping[Path, brainstate.State]
    state_leaves: tuple[tuple[int, ...], ...]
    in_tree: PyTreeDef
    out_tree: PyTreeDef
    environment: PyTreeDef
    fixed_numbers: tuple[str, ...]
    state_trees: tuple[PyTreeDef, ...]
    hidden_path_to_invar: dict[Path, Var]
    hidden_path_to_outvar: dict[Path, Atom]
    complex_hidden: dict[Path, Parts]
    weight_path_to_invars: dict[Path, list[Var]]
    invar_to_weight_path: dict[Var, Path]
    num_var_out: int
    diagnostics: tuple[CompilationRecord, ...]

    @property
    def jaxpr(self) -> Jaxpr:
        return open_jaxpr(self.closed_jaxpr)

    @property
    def first_state(self) -> int:
        """Number of inputs in front of those of the states."""
        return self.in_tree.num_leaves + self.environment.num_leaves

    @property
    def environment_keys(self) -> list[str]:
        return list(self.environment.unflatten(range(self.environment.num_leaves)))

    def environment_leaves(self, inputs: Mapping[str, PyTree]) -> list[jax.Array]:
        """Those of the environment's arrays and numbers that the step reads, as its inputs."""
        avals = [v.aval for v in self.jaxpr.invars[self.in_tree.num_leaves : self.first_state]]
        leaves = jax.tree.leaves({k: inputs[k] for k in self.environment_keys})
        return [jax.numpy.asarray(x, a.dtype) for x, a in zip(leaves, avals)]

    def writes(self, numbers: Iterable[int]) -> bool:
        """Whether the step gives one of the leaves of states another value."""
        new = self.jaxpr.outvars[self.num_var_out :]
        return any(new[n] is not self.jaxpr.invars[self.first_state + n] for n in numbers)

    @property
    def changing(self) -> frozenset[Var]:
        """Inputs that may be others at every step: neither parameters, nor states that the step does not write."""
        steady = [v for n, v in enumerate(self.jaxpr.invars[self.first_state :]) if not self.writes([n])]
        return frozenset(self.jaxpr.invars) - self.invar_to_weight_path.keys() - set(steady)

    def state_avals(self, path: Path) -> list[jax.core.ShapedArray | jax.ShapeDtypeStruct]:
        """Shape and dtype of the leaves of a state's value."""
        numbers = self.state_leaves[self.compiled_state_paths.index(path)]
        avals = [self.jaxpr.invars[self.first_state + n].aval for n in numbers]
        parts = self.complex_hidden.get(path)
        return avals if parts is None else [jax.ShapeDtypeStruct(parts.shape(a.shape), parts.dtype) for a in avals]

    def reals(self, path: Path, leaf: jax.Array) -> jax.Array:
        """A leaf of a state as the program takes it."""
        return self.complex_hidden[path].split(leaf) if path in self.complex_hidden else leaf

    def results(self, outs: Sequence[jax.Array]) -> tuple[PyTree, list[PyTree]]:
        """The program's flat outputs as the model's output and the new values of the touched states, in order."""
        leaves = outs[self.num_var_out :]
        values = []
        for path, tree, numbers in zip(self.compiled_state_paths, self.state_trees, self.state_leaves):
            parts = self.complex_hidden.get(path)
            values.append(tree.unflatten([leaves[i] if parts is None else parts.join(leaves[i]) for i in numbers]))
        return self.out_tree.unflatten(outs[: self.num_var_out]), values

    def dict(self) -> dict[str, Any]:
        return self._asdict()

    def __repr__(self) -> str:
        return (
            f"ModuleInfo(states={[path_str(p) for p in self.compiled_state_paths]}, "
            f"equations={len(self.jaxpr.eqns)}, outputs={self.num_var_out})"
        )

    def states_of(self, *kinds: type) -> Mapping[Path, brainstate.State]:
        """The touched states of the given classes, by path."""
        return {p: s for p, s in zip(self.compiled_state_paths, self.compiled_model_states) if isinstance(s, kinds)}


def extract_module_info(
    model: brainstate.nn.Module, *args: PyTree, control_flow: ControlFlowPolicy | None = None, **kwargs: PyTree
) -> ModuleInfo:
    """Trace one step of a model with initialised states.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its ``update`` is one time step.
    *args, **kwargs : pytree of array or jax.ShapeDtypeStruct
        Example arguments of one step.
    control_flow : ControlFlowPolicy, optional
        What to do with loops and branches.

    Returns
    -------
    ModuleInfo

    Raises
    ------
    NotSupportedError
        If the step writes a ``ParamState``.
    ValueError
        If a state changes its unit, shape or structure within the step.
    NotImplementedError
        If a parameter or a marked operation is used where no trace can follow it; within the tracing of another step.
    CompilationError
        If loops and branches are nested deeper than the policy allows.

    Examples
    --------
    >>> import brainstate, braintrace, jax.numpy as jnp
    >>> cell = braintrace.nn.ValinaRNNCell(2, 3)
    >>> _ = brainstate.nn.init_all_states(cell)
    >>> braintrace.extract_module_info(cell, jnp.zeros(2))
    ModuleInfo(states=['h', 'W.weight'], equations=3, outputs=1)
    """
    return info_of_call(model, call_of(args, kwargs).first_step(), control_flow)


def info_of_call(model: brainstate.nn.Module, call: Call, control_flow: ControlFlowPolicy | None) -> ModuleInfo:
    """:func:`extract_module_info` for the arguments, and in the environment, of a call."""
    _check_types(model, control_flow)
    (traced, args, written), numbers, fixed = traced_with_numbers(model, call)
    trace = traced.get_state_trace(*args)
    states = tuple(trace.states)
    out_shapes, new_shapes = traced.get_out_shapes(*args)
    retrieved = FlattedDict(model.states())
    paths, diagnostics = _name_states(states, retrieved)
    _check_states(states, trace.been_writen, paths, new_shapes)

    in_leaves, in_tree = jax.tree.flatten(call.given)
    env_leaves, environment = jax.tree.flatten(numbers)
    out_leaves, out_tree = jax.tree.flatten(out_shapes)
    first_in, first_out = len(in_leaves) + len(env_leaves), len(out_leaves)
    sizes = [len(jax.tree.leaves(s._value)) for s in states]
    starts = itertools.accumulate(sizes, initial=0)
    positions = tuple(tuple(range(a, b)) for a, b in itertools.pairwise(starts))

    origins, hidden_out = [Origin(data=True)] * first_in, [False] * first_out
    for state, path, size in zip(states, paths, sizes):
        is_hidden = isinstance(state, brainstate.HiddenState)
        data = Origin(data=True, live=is_hidden, entry=is_hidden)
        origins += [Origin.of_weight(path) if isinstance(state, brainstate.ParamState) else data] * size
        hidden_out += [is_hidden] * size
    closed, records = flatten(
        traced.get_jaxpr(*args), origins, first_out, hidden_out, control_flow or ControlFlowPolicy()
    )
    hidden = {i: positions[i][0] for i, s in enumerate(states) if isinstance(s, brainstate.HiddenState)}
    ends = {paths[i]: (first_in + place, first_out + place) for i, place in hidden.items()}
    if complex_hidden := _complex_parts(closed, {paths[i]: states[i] for i in hidden}, ends):
        closed = with_real_parts(closed, {ends[p]: part for p, part in complex_hidden.items()})
    closed = read_from_stored(closed, dict(ends.values()))
    jaxpr = open_jaxpr(closed)
    made = made_at(jaxpr.eqns)

    def invars(i: int) -> list[Var]:
        return [jaxpr.invars[first_in + p] for p in positions[i]]

    weights = {paths[i]: invars(i) for i, s in enumerate(states) if isinstance(s, brainstate.ParamState)}
    return ModuleInfo(
        closed_jaxpr=closed,
        compiled_model_states=states,
        compiled_state_paths=paths,
        retrieved_model_states=retrieved,
        state_leaves=positions,
        in_tree=in_tree,
        out_tree=out_tree,
        environment=environment,
        fixed_numbers=fixed,
        state_trees=tuple(jax.tree.structure(s._value) for s in states),
        hidden_path_to_invar={paths[i]: invars(i)[0] for i in hidden},
        hidden_path_to_outvar={
            paths[i]: before_cast(jaxpr.outvars[first_out + place], jaxpr.eqns, made) for i, place in hidden.items()
        },
        complex_hidden=complex_hidden,
        weight_path_to_invars=weights,
        invar_to_weight_path={v: p for p, vs in weights.items() for v in vs},
        num_var_out=first_out,
        diagnostics=tuple(diagnostics + written + records),
    )


def _check_types(model: object, control_flow: object) -> None:
    if not isinstance(model, brainstate.nn.Module):
        raise AssertionError(f"The model must be a brainstate.nn.Module, got {type(model).__name__}.")
    if not isinstance(control_flow, (ControlFlowPolicy, type(None))):
        raise TypeError(f"control_flow must be a ControlFlowPolicy or None, got {type(control_flow).__name__}.")


def _complex_parts(
    closed: ClosedJaxpr, states: Mapping[Path, brainstate.State], ends: Mapping[Path, tuple[int, int]]
) -> dict[Path, Parts]:
    """How complex hidden states are kept as two real parts, by path."""
    avals = {p: open_jaxpr(closed).invars[old].aval for p, (old, _) in ends.items()}
    return {
        p: Parts(len(aval.shape) > len(states[p].varshape), aval.dtype)
        for p, aval in avals.items()
        if jax.numpy.issubdtype(aval.dtype, jax.numpy.complexfloating)
    }


def known_constants(info: ModuleInfo) -> dict[Var, ArrayLike]:
    """Values of the step's constants, but for those that are themselves being traced."""
    pairs = zip(info.jaxpr.constvars, consts_of(info.closed_jaxpr))
    return {v: c for v, c in pairs if not is_tracer(c)}


def _name_states(
    states: Sequence[brainstate.State], retrieved: Mapping[Path, brainstate.State]
) -> tuple[tuple[Path, ...], list[CompilationRecord]]:
    path_of = {id(s): p for p, s in retrieved.items()}
    paths, records, unknown = [], [], 0
    for state in states:
        path = path_of.get(id(state))
        if path is None:
            path = (f"_unknown_path_{unknown}",)
            unknown += 1
            drawn = isinstance(state, brainstate.random.RandomState)
            level = DiagnosticLevel.INFO if drawn else DiagnosticLevel.WARNING
            records.append(
                CompilationRecord(
                    DiagnosticKind.STATE_MISMATCH,
                    level,
                    f"The step uses a {type(state).__name__} that is no attribute of the model (a random generator, "
                    f"say). It is advanced like any other state and called {path_str(path)!r} here.",
                )
            )
        paths.append(path)
    touched = {id(s) for s in states}
    for path, state in retrieved.items():
        if isinstance(state, brainstate.ParamState) and id(state) not in touched:
            records.append(
                CompilationRecord(
                    DiagnosticKind.STATE_MISMATCH,
                    DiagnosticLevel.WARNING,
                    f"The step never reads the parameter {path_str(path)!r}: it gets no gradient and is not among "
                    "the learner's param_states.",
                    weight_path=path,
                )
            )
    return tuple(paths), records


def _check_states(
    states: Sequence[brainstate.State], written: Sequence[bool], paths: Sequence[Path], new_shapes: Sequence[PyTree]
) -> None:
    for state, was_written, path, new in zip(states, written, paths, new_shapes):
        if was_written and isinstance(state, brainstate.ParamState):
            raise NotSupportedError(
                f"The step writes the parameter {path_str(path)!r}. Parameters are trained by the optimiser only; "
                "hold values that the step changes in a HiddenState or ShortTermState."
            )
        old = state._value
        is_quantity = lambda x: isinstance(x, u.Quantity)  # noqa: E731
        check_structure(path, old, new)
        old_leaves, new_leaves = (jax.tree.leaves(v, is_leaf=is_quantity) for v in (old, new))
        if isinstance(state, brainstate.HiddenState) and any(
            jax.numpy.issubdtype(getattr(v, "dtype", float), jax.dtypes.prng_key) for v in old_leaves
        ):
            raise TypeError(
                f"The HiddenState {path_str(path)!r} holds a random key, which no trace can follow. Keep it in a "
                "brainstate.ShortTermState."
            )
        shapes = [tuple(jax.numpy.shape(u.get_mantissa(v))) for v in old_leaves]
        new_shapes_of = [tuple(v.shape) for v in new_leaves]
        if shapes != new_shapes_of:
            raise ValueError(
                f"The state {path_str(path)!r} changes its shape within the step, from {shapes} to {new_shapes_of}. "
                "Initialise it with the shape that the step writes (did the states get the right batch_size?)."
            )
        for before, after in zip(old_leaves, new_leaves):
            if not convertible(after.dtype, jax.numpy.result_type(u.get_mantissa(before))):
                dtype = jax.numpy.result_type(u.get_mantissa(before))
                raise ValueError(
                    f"The state {path_str(path)!r} changes its dtype within the step, from {dtype} to {after.dtype}. "
                    "Initialise it with the dtype that the step writes."
                )
