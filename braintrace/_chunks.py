"""A sequence of calls, chunk by chunk: steps leave records, and what is as large as a weight is done once a chunk."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef

from ._binding import Gradients, Operands
from ._compiler.constants import known_outputs
from ._compiler.step import Zeros
from ._engines.engine import Emitted
from ._jax import any_dtype, open_jaxpr
from ._precision import wide
from ._program import variables
from ._recorder import Recorded, Recorder, Records, ZerosOfCall, weighted
from ._types import Path, PyTree, Shape, first_as_one, head

if TYPE_CHECKING:
    from ._learners.vjp import ETraceVjpAlgorithm

__all__ = ["ChunkedEvolution", "ChunkedGradient", "weights_of", "zeros_to_add"]


# Per number of a leaf of the weights its sum, and per operation those of its operands.
Total: TypeAlias = tuple[dict[int, jax.Array], dict[int, Gradients]]


_FEW_CALLS, _TINY_CALLS, _MANY_CALLS = 32, 100, 200  # fewer leave small products, more gain nothing
_USUAL_CALLS = 1, 2, 5, 10, 20, 25, 50, 100, 200  # divide most sequences: memory is then the same for all of them
_ABOUT = 1.25  # a little more memory rather than half of the calls
_SMALL_BYTES, _TINY_BYTES = 2**26, 2**22


class _Chunked:
    """A sequence of calls, with everything that is as large as a weight done once for a chunk of them.

    Neither the derivatives of a step nor its learning signals depend on the traces. So a step leaves a small record,
    and the algebra of the traces follows for a chunk of records together, as products over time.
    """

    def __init__(
        self,
        learner: ETraceVjpAlgorithm,
        function: Callable[..., PyTree],
        vmap_shape: Shape,
        chunk: int | None = None,
    ):
        self.learner, self.function, self.vmap_shape, self.chunk = learner, function, vmap_shape, chunk
        self.calls = 0
        self.length: int | None = None

    def applies(self, items: PyTree) -> bool:
        """Whether the learner's call can be recorded: one is made, not inside of another transformation.

        A chunk knows one value of each parameter, the same for all samples and steps.
        """
        if not self.learner._can_record():
            return False
        while True:
            graph = self.learner.graph
            self.records = Records(self.learner._online, self.learner._is_single_step)
            self.step = brainstate.transform.StatefulFunction(self._one_call)
            first = jax.eval_shape(lambda items: (*jax.tree.map(head, items), self._zeros()), items)
            self.program = self.step.make_jaxpr(*first).get_jaxpr(*first)
            if self.learner.graph is graph:
                return self.calls == 1 and self._has_fixed_parameters(first) and not self._reads_traces(first)

    def _has_fixed_parameters(self, args: tuple[PyTree, ...]) -> bool:
        written = {id(state) for state in self.step.get_write_states(*args)}
        avals = self.learner.graph.module_info.state_avals
        return not any(
            id(state) in written or [jnp.shape(x) for x in jax.tree.leaves(state.value)] != [a.shape for a in avals(p)]
            for p, state in self.learner.param_states.items()
        )

    def _reads_traces(self, args: tuple[PyTree, ...]) -> bool:
        """Whether the step uses the traces: it wants those of its time, not those of the chunk's beginning."""
        jaxpr = open_jaxpr(self.program)
        number = lambda states: sum(len(jax.tree.leaves(s.value)) for s in states)  # noqa: E731
        states = self.step.get_states(*args)
        results = len(jaxpr.outvars) - number(self.step.get_write_states(*args))
        used = set(variables([*(v for e in jaxpr.eqns for v in e.invars), *jaxpr.outvars[:results]]))
        traces = {id(state) for state, _ in self.learner._trace_states()}
        values = iter(jaxpr.invars[len(jaxpr.invars) - number(states) :])
        of_states = {id(s): [next(values) for _ in jax.tree.leaves(s.value)] for s in states}
        return any(not used.isdisjoint(vs) for i, vs in of_states.items() if i in traces)

    def _one_call(self, *item: PyTree) -> tuple[list[jax.Array], ZerosOfCall, PyTree, Recorded | None]:
        """Gradients of plain uses of parameters, cotangents of the zeros, result, and what the learner's call left.

        The last of the items are the zeros.
        """
        raise NotImplementedError

    def _weight(self, item: tuple[PyTree, ...]) -> jax.Array | None:
        """What the gradient of a call is multiplied with."""
        return None

    def _recorded(self, zeros: PyTree, *args: PyTree) -> tuple[PyTree, Recorded | None]:
        """What the function returns, and what the learner's call in it left."""
        with self.learner._recording(zeros) as recorder:
            result = self.function(*args)
        # Not the recorder itself: traced values that it held would be kept alive.
        self.calls, self.length = recorder.calls, recorder.length
        return result, recorder.recorded

    def _zeros(self) -> ZerosOfCall:
        zeros = Recorder.zeros_of(self.records.online, self.records.single_step)
        return jax.tree.map(lambda z: jnp.zeros((*self.vmap_shape, *z.shape), z.dtype), zeros)

    def _operands(self) -> list[Operands]:
        """The trained operands of every operation, from the present parameters."""
        binding = self.records.binding
        return binding.operands(binding.of_parameters(self.learner.param_states))

    def _over_chunks(self, total: Total, items: PyTree) -> tuple[Total, PyTree]:
        """``total`` (sums for plain uses, and for operands) after all calls, and their results."""
        self.operands = jax.lax.stop_gradient(self._operands())
        calls = jax.tree.leaves(items)[0].shape[0]
        size = min(calls, self.chunk or self._automatic(calls))
        whole = calls - calls % size
        results = []
        if whole == size:
            total, out = self._chunk(total, _part(items, 0, size))
            results.append(out)
        elif whole:
            # Sliced chunk by chunk: a sequence cut to the whole chunks would be a copy of it.
            body = lambda total, i: self._chunk(total, _part(items, i * size, size))  # noqa: E731
            total, out = brainstate.transform.scan(body, total, jnp.arange(whole // size))
            results.append(first_as_one(out, 2))
        if whole < calls:
            total, out = self._chunk(total, _part(items, whole, calls - whole))
            results.append(out)
        return total, results[0] if len(results) == 1 else jax.tree.map(lambda *v: jnp.concatenate(v), *results)

    def _chunk(self, total: Total, items: PyTree) -> tuple[Total, PyTree]:
        plain, traced = total
        learner, records = self.learner, self.records
        traces = learner._get_etrace_data()

        def body(
            carry: tuple[dict[int, jax.Array], PyTree], item: tuple[PyTree, ...]
        ) -> tuple[tuple[dict[int, jax.Array], PyTree], tuple[Emitted, PyTree]]:
            plain, engine = carry
            index = learner.running_index.value
            weight = self._weight(item)
            grads, bars, result, recorded = self.step(*item, self._zeros())
            read = lambda engine, recorded, bars: records.step(  # noqa: E731
                engine, index, recorded, bars, self.operands, self.length, weight
            )
            if self.vmap_shape:
                read = jax.vmap(read, out_axes=(0, 1), axis_size=self.vmap_shape[0])
            engine, emitted = read(engine, recorded, bars)
            now = weighted({i: grads[i] for i in plain}, weight)
            return ({i: v + now[i] for i, v in plain.items()}, engine), (emitted, result)

        (plain, engine), (emitted, result) = brainstate.transform.scan(
            body, (plain, records.engine.chunk_start(traces)), items
        )
        emitted = first_as_one(emitted, 2)
        length = jax.tree.leaves(items)[0].shape[0] * (self.length or 1)
        traces, found = records.end(traces, engine, emitted, self.operands, self.vmap_shape, length)
        learner._assign_etrace_data(traces)
        return (plain, {i: _plus(sums, found.get(i)) for i, sums in traced.items()}), result

    def _automatic(self, calls: int) -> int:
        """As many calls as their records are smaller than what is then touched once instead of at every step."""
        held, record = self.records.bytes_of(self.learner._get_etrace_data())
        samples = math.prod(self.vmap_shape) * (self.length or 1)
        few = min(_FEW_CALLS, max(1, _SMALL_BYTES // (record * samples)))
        if _TINY_CALLS * record * samples <= _TINY_BYTES:
            few = _TINY_CALLS  # one chunk in place of a loop over several compiles faster
        most = min(_MANY_CALLS, max(few, held // (record * samples)))
        usual = max(k for k in _USUAL_CALLS if k <= _ABOUT * most)
        even = (k for k in (usual, *range(most, most // 2, -1)) if calls % k == 0)  # leaves no shorter chunk to compile
        return next(even, most)


class ChunkedEvolution(_Chunked):
    """Calls without a loss."""

    def _one_call(
        self, slices: tuple[PyTree, ...], zeros: ZerosOfCall
    ) -> tuple[list[jax.Array], ZerosOfCall, PyTree, Recorded | None]:
        result, recorded = self._recorded(zeros, slices)
        return [], Zeros({}, {}, {}) if self.records.single_step else {}, result, recorded

    def run(self, items: tuple[PyTree, ...]) -> PyTree:
        _, outputs = self._over_chunks(({}, {}), (items,))
        for state in self.learner.path_to_states.values():
            if not isinstance(state, brainstate.ParamState):
                state.value = jax.lax.stop_gradient(state.value)
        parameters = [s.value for s in self.learner.param_states.values()]
        return no_gradient(outputs, parameters)


class ChunkedGradient(_Chunked):
    """Calls whose results are losses and auxiliary data; a step is differentiated alone, with respect to its zeros."""

    def __init__(
        self,
        learner: ETraceVjpAlgorithm,
        objective: Callable[..., tuple[jax.Array, PyTree]],
        vmap_shape: Shape,
        chunk: int | None,
        weights: Mapping[Hashable, brainstate.State],
    ):
        super().__init__(learner, objective, vmap_shape, chunk)
        self.weights = weights
        self.numbers: dict[Hashable, list[int]] = {}  # of the leaves of each key's value, among all of them
        for key, state in weights.items():
            first = sum(map(len, self.numbers.values()))
            self.numbers[key] = list(range(first, first + len(jax.tree.leaves(state.value))))

    def _one_call(
        self, slices: tuple[PyTree, ...], m: jax.Array, zeros: ZerosOfCall
    ) -> tuple[list[jax.Array], ZerosOfCall, PyTree, Recorded | None]:
        def differentiable(
            slices: tuple[PyTree, ...], m: jax.Array, zeros: ZerosOfCall
        ) -> tuple[jax.Array, tuple[PyTree, Recorded | None]]:
            (value, result), recorded = self._recorded(zeros, slices, weights_of(m)[0])
            return value, (result, recorded)

        gradient = brainstate.transform.grad(differentiable, self.weights, argnums=2, has_aux=True)
        (grads, bars), more = gradient(slices, m, zeros)
        return self._leaves(grads), bars, *more

    def _weight(self, item: tuple[PyTree, jax.Array]) -> jax.Array | None:
        return weights_of(item[1])[1]

    def _leaves(self, by_key: Mapping[Hashable, PyTree]) -> list[jax.Array]:
        return [leaf for key in self.weights for leaf in jax.tree.leaves(by_key[key])]

    def run(self, items: tuple[PyTree, PyTree]) -> tuple[dict[Hashable, PyTree], jax.Array, PyTree]:
        """Gradients by the keys of ``weights``, losses and auxiliary data."""
        known = known_outputs(self.program, look_inside=False)
        leaves = self._leaves({k: s.value for k, s in self.weights.items()})
        # Most parameters are used by operations alone: zeros need not be added up.
        numbers = [i for numbers in self.numbers.values() for i in numbers if np.any(known.get(i, True))]
        plain = zeros_to_add({i: leaves[i] for i in numbers})
        traced = zeros_to_add(dict(enumerate(self._operands())))
        total, (losses, aux) = self._over_chunks((plain, traced), items)
        return self._by_key(*total), losses, aux

    @any_dtype
    def _by_path(self, gradients: Mapping[int, Gradients]) -> dict[Path, list[jax.Array | None]]:
        """Gradients of operands -> path -> gradients of the parameter's leaves, ``None`` where there is none."""
        states, binding = self.learner.param_states, self.records.binding
        leaves = binding.leaf_gradients(gradients, binding.of_parameters(states))
        return {p: [leaves.get(n) for n in binding.leaf_numbers(p)] for p in states}

    def _by_key(self, plain: dict[int, jax.Array], traced: dict[int, Gradients]) -> dict[Hashable, PyTree]:
        path_of = self.learner.state_id_to_path
        by_path = self._by_path(traced)
        out = {}
        for key, state in self.weights.items():
            tree: PyTreeDef
            leaves, tree = jax.tree.flatten(state.value)
            traced_ones = by_path.get(path_of.get(id(state), ()), [None] * len(leaves))
            found = []
            for number, leaf, extra in zip(self.numbers[key], leaves, traced_ones):
                parts = [g for g in (plain.get(number), extra) if g is not None] or [zeros_to_add(leaf)]
                found.append(functools.reduce(jnp.add, [g.astype(wide(leaf.dtype)) for g in parts]))
            out[key] = tree.unflatten(found)
        return out


def weights_of(m: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
    """Of the losses within a call, those of a window, and of the gradient of a call with a single one."""
    return (m, None) if m.ndim else (None, m)


@jax.custom_vjp
def no_gradient(outputs: PyTree, parameters: PyTree) -> PyTree:
    """``outputs``, which refuse a gradient with respect to ``parameters``, also where none would flow."""
    del parameters
    return outputs


def _refuse_gradient(residuals: None, bars: PyTree) -> NoReturn:
    raise NotImplementedError(
        "The outputs of etrace_evolve have no gradient: it advances the model and the traces without one. Use "
        "etrace_grad with the loss in its step_fn, or call the learner in a loop of your own."
    )


no_gradient.defvjp(lambda outputs, parameters: (outputs, None), _refuse_gradient)


def zeros_to_add(tree: PyTree) -> PyTree:
    """To be summed to over time."""
    return jax.tree.map(lambda v: jnp.zeros(v.shape, wide(v.dtype)), tree)


def _plus(sums: Gradients, more: Gradients | None) -> Gradients:
    return {k: v + more[k].astype(v.dtype) for k, v in sums.items()} if more else sums


def _part(tree: PyTree, start: int | jax.Array, size: int) -> PyTree:
    return jax.tree.map(lambda v: jax.lax.dynamic_slice_in_dim(v, start, size), tree)
