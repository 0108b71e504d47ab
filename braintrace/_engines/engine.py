"""What an engine is: the algebra of one kind of eligibility trace, apart from models, states and learners."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._binding import Binding, Fixed, Gradients, Operands, Signals
from .._compiler.diagnostics import CompilationRecord
from .._compiler.relations import HiddenParamOpRelation
from .._compiler.step import StepRecord
from .._types import PyTree, Shape, path_str

__all__ = ["Cotangents", "Emitted", "Engine", "bytes_of", "check_outputs"]


class Cotangents(NamedTuple):
    """Those of one step, as they meet the traces.

    Attributes
    ----------
    new, old : list
        Signals with respect to the groups' new and old values: per group, one array per hidden variable or ``None``.
    residual : dict
        Operation number -> cotangent of its output that no trace carries.
    """

    new: Signals
    old: Signals
    residual: dict[int, jax.Array]


class Emitted(NamedTuple):
    """What one step leaves for the end of its chunk, stacked over the K steps there.

    Attributes
    ----------
    engine : pytree
        Of the engine.
    x : dict
        Operation number -> input, once for all operations that read it.
    fixed : dict
        Operation number -> untrained operands.
    residual : dict
        As in :class:`Cotangents`.
    """

    engine: PyTree
    x: dict[int, jax.Array]
    fixed: dict[int, Fixed]
    residual: dict[int, jax.Array]


class Engine(abc.ABC):
    """Traces of the relations ``numbers``: how they begin, advance, and what they give to signals that they meet.

    Everything here is a pure function of traces, a pytree of the engine's own.
    """

    binding: Binding
    numbers: tuple[int, ...]

    @functools.cached_property
    def relations(self) -> dict[int, HiddenParamOpRelation]:
        of = self.binding.graph.hidden_param_op_relations
        return {i: of[i] for i in self.numbers}

    # -- step by step

    @abc.abstractmethod
    def init(self) -> PyTree:
        """Traces at the start."""

    @abc.abstractmethod
    def take(
        self, record: StepRecord, operands: Sequence[Operands], invals: Sequence[jax.Array]
    ) -> tuple[tuple[PyTree, PyTree], PyTree]:
        """What of a step advances the traces: the inputs and df, and D."""

    @abc.abstractmethod
    def advance(self, traces: PyTree, xs_and_dfs: tuple[PyTree, PyTree], Ds: PyTree) -> PyTree:
        """Traces after one step."""

    @abc.abstractmethod
    def carriers(
        self,
        numbers: Sequence[int],
        traces: PyTree,
        operands: Sequence[Operands],
        fixed: Sequence[Fixed],
        weights: Sequence[PyTree],
        steps: jax.Array,
    ) -> PyTree:
        """Arrays that depend on the parameters: the cotangents that :meth:`contract` gives them become the gradient."""

    @abc.abstractmethod
    def contract(self, numbers: Sequence[int], traces: PyTree, signals: Signals, steps: jax.Array) -> PyTree:
        """What signals make of the traces after that many steps, as cotangents of :meth:`carriers`."""

    def forms(self) -> dict[int, tuple[str, int]]:
        """In words what is kept for a relation, and how many bytes; what is shared counts where it comes first."""
        return {}

    def remarks(self) -> list[CompilationRecord]:
        """What users should know of the traces that their model gets."""
        return []

    # -- a chunk of steps, whose records are there before the traces are touched

    @property
    def has_chunks(self) -> bool:
        """Whether the rule has an algebra of chunks; without, sequences are driven step by step."""
        return True

    @abc.abstractmethod
    def chunk_start(self, traces: PyTree) -> PyTree:
        """What the steps of a chunk carry."""

    @abc.abstractmethod
    def chunk_step(
        self,
        carry: PyTree,
        index: jax.Array,
        record: StepRecord,
        operands: Sequence[Operands],
        cotangents: Cotangents,
    ) -> tuple[PyTree, PyTree, set[int]]:
        """Advance the carry; what to emit, and the operations whose inputs are to be emitted."""

    @abc.abstractmethod
    def chunk_end(
        self,
        traces: PyTree,
        carry: PyTree,
        emitted: Emitted,
        operands: Sequence[Operands],
        vmap_shape: Shape,
        length: int,
    ) -> tuple[PyTree, dict[int, Gradients | None]]:
        """Traces after a chunk of that many steps, and the gradients of the relations' operands.

        ``vmap_shape`` is the size of the mapped axis, if any, which stands behind that of time.
        """


def check_outputs(relations: Iterable[HiddenParamOpRelation]) -> None:
    """Refuse operations whose output has another shape than the hidden states that it drives."""
    for r in relations:
        for g in r.hidden_groups:
            y, shape = r.one.y_var.aval.shape, g.varshape
            fits = y == shape or r.fold(g) is not None
            if fits or (r.x_var is None and jnp.broadcast_shapes(y, shape) == shape):
                continue
            delayed = y and len(shape) > len(y) and shape[-len(y) :] == y
            raise ValueError(
                f"The output of {r.primitive.name} at {path_str(r.path)!r} has shape {y}, the hidden states "
                f"{', '.join(map(path_str, g.hidden_paths))} that it drives have shape {shape}. Both need one "
                "shape: initialise the states with the batch size of the inputs, or give the operation the "
                "shape of the states." + _DELAY_LINE * bool(delayed)
            )


def bytes_of(tree: PyTree) -> int:
    """Of arrays or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


_DELAY_LINE = (
    " If the states are a delay line of outputs, delay what the operation receives instead: keep its inputs (spikes, "
    "say) in a brainstate.ShortTermState, and apply the operation to the oldest."
)
