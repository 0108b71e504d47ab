"""The oracle: the recursions of docs/mathematics.md in dense arrays, sharing no code with the library.

A *reference network* has an attribute `layers`. A layer is either a plain callable or a *stage*, which owns hidden
states and offers

    groups()        list of hidden groups, each a list of `HiddenState`s linked position by position
    transition(x)   write the new hidden values, return anything the output needs beside them
    output(aux)     what leaves the stage, computed from the hidden values as they now stand

Every trainable map calls `tap`, and every old hidden value that enters one (or any other map that mixes positions)
goes through `old`. Between `transition` and `output` the oracle can treat a group's new values as independent inputs,
in a `tap` it can hold the outputs fixed: that is all it needs for D, df, L and L⁻ by `jax.jacobian` and `jax.grad`.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
from brainstate import HiddenState, ParamState


class Relation(NamedTuple):
    """One trainable map that was called: `y = apply(x, *operands)`."""

    apply: Callable
    x: Any
    operands: tuple

    def pull(self, x, signal):
        """Cotangents of the operands for `signal`, an array shaped as y, with `x` in the place of the input."""
        y, vjp = jax.vjp(lambda *operands: self.apply(x, *operands), *self.operands)
        return vjp(jax.tree.unflatten(jax.tree.structure(y), [signal]))

    def jacobian(self):
        """dy/doperands, leaves of shape y.shape + leaf.shape."""
        return jax.jacobian(lambda operands: leaf(self.apply(self.x, *operands)))(self.operands)


class _Run:
    """What one pass over the network is asked to do (fields set by `Oracle.run`) and what it finds (dicts)."""

    def __init__(self, held=None, shifts=None, frozen=None, cut=False):
        self.held, self.shifts, self.frozen, self.cut = held, shifts or {}, frozen, cut
        self.stage, self.varshape, self.calls = None, None, 0
        self.relations, self.ys, self.new = {}, {}, {}


_runs: list[_Run] = []


def tap(apply, x, *operands):
    """Inside the oracle every trainable map is `tap(apply, x, *operands)`, affine in x and in each operand."""
    run = _runs[-1]
    key = (run.stage, run.calls)
    run.calls += 1
    y = apply(x, *operands)
    run.relations[key] = Relation(apply, x, operands)
    run.ys[key] = y
    return y if run.held is None else run.held[key]


def old(h):
    """An old hidden value on its way into a map that mixes positions."""
    cut = bool(_runs) and (_runs[-1].cut or _runs[-1].held is not None)
    return jax.tree.map(jax.lax.stop_gradient, h) if cut else h


def in_oracle() -> bool:
    return bool(_runs)


def stage_shape() -> tuple:
    """Shape of the hidden values of the stage that is running."""
    return _runs[-1].varshape


def leaf(tree):
    """The one array of a value, its unit dropped."""
    (array,) = jax.tree.leaves(tree)
    return array


# ---------------------------------------------------------------------------------------------------------------------
# Learning rules: how a relation's trace advances and how it meets a signal. Shapes: D (S, S) + V, df and L (S,) + V.


class PPProp:
    """`x, 1` are the inputs of a map that is affine in x: the filtered 1 multiplies what is left of it at x = 0."""

    def __init__(self, decay_x=0.9, decay_f=None):
        self.x, self.f = decay_x, decay_x if decay_f is None else decay_f

    def start(self, relation, df):
        inputs = (relation.x, jnp.ones(()))
        return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=df.dtype), inputs), jnp.zeros_like(df)

    def advance(self, trace, relation, D, df):
        ex, ef = trace
        ex = jax.tree.map(lambda e, x: self.x * e + x, ex, (relation.x, 1.0))
        return ex, self.f * jnp.einsum("ab...,b...->a...", D, ef) + (1 - self.f) * df

    def credit(self, trace, relation, L, n):
        (ex, one), ef = trace
        with np.errstate(divide="ignore"):
            correction = -jnp.expm1(n * float(np.log(self.f)))  # 1 - f**n, with all digits for f near 1
        signal = (L * ef).sum(0) / jnp.where(n > 0, correction, 1)
        nothing = jax.tree.map(jnp.zeros_like, ex)
        linear = jax.tree.map(jnp.subtract, relation.pull(ex, signal), relation.pull(nothing, signal))
        return jax.tree.map(jnp.add, linear, relation.pull(nothing, one * signal))


class DRTRL:
    """`kappa` filters the trace before it meets the signal (EProp); 0 is D_RTRL."""

    def __init__(self, kappa=0.0):
        self.kappa = kappa

    def start(self, relation, df):
        zeros = jax.tree.map(lambda j: jnp.zeros(df.shape[:1] + j.shape, df.dtype), relation.jacobian())
        return zeros, zeros

    def advance(self, trace, relation, D, df):
        def one(e, jac):
            extra = (...,) + (None,) * (jac.ndim - df.ndim + 1)
            return jnp.einsum("ab...,b...->a...", D[extra], e) + df[extra] * jac

        trace, filtered = trace
        trace = jax.tree.map(one, trace, relation.jacobian())
        return trace, jax.tree.map(lambda e, f: self.kappa * f + e, trace, filtered)

    def credit(self, trace, relation, L, n):
        del n
        return jax.tree.map(lambda e: jnp.tensordot(L, e, L.ndim), trace[1])


# ---------------------------------------------------------------------------------------------------------------------


class Pieces(NamedTuple):
    """One step: what back-propagation through it gives, and what the traces need."""

    loss: Any
    grads: dict  # exact one-step gradient, path -> gradient
    after: dict  # values after the step, path -> value
    facts: dict  # call -> (x, operands)
    D: dict  # group -> (S, S) + V
    df: dict  # (call, group) -> (S,) + V
    L: dict  # group -> (S,) + V
    old_L: dict  # group -> (S,) + V


class Oracle:
    """Online gradients of `loss(net, call, *args)`, where `call(x)` runs one step of the network `net`."""

    def __init__(self, net, loss):
        self.net, self.loss = net, loss
        states = net.states()
        self.params = {path: st for path, st in states.items() if isinstance(st, ParamState)}
        self.states = {path: st for path, st in states.items() if not isinstance(st, ParamState)}
        self.hidden = [path for path, st in self.states.items() if isinstance(st, HiddenState)]
        paths = {id(st): path for path, st in states.items()}
        self.groups = {
            (i, g): [paths[id(st)] for st in group]
            for i, layer in enumerate(net.layers)
            if hasattr(layer, "groups")
            for g, group in enumerate(layer.groups())
        }
        self._pieces, self._learners = jax.jit(self.pieces), {}
        assert sorted(p for group in self.groups.values() for p in group) == sorted(self.hidden)

    def values(self):
        return (
            {path: st.value for path, st in self.params.items()},
            {path: st.value for path, st in self.states.items()},
        )

    # -- one pass over the network as a pure function

    def run(self, params, before, args, **options):
        """Run `loss` once: `(loss, values after the step, record of the pass)`."""
        run = _Run(**options)
        everything = self.params | self.states
        kept = {path: st.value for path, st in everything.items()}
        with brainstate.StateTraceStack():
            try:
                _runs.append(run)
                for path, value in (params | before).items():
                    everything[path].value = value
                loss = self.loss(self.net, lambda x: self._call(run, x), *args)
                after = {path: st.value for path, st in self.states.items()}
            finally:
                _runs.pop()
                for path, value in kept.items():
                    everything[path].value = value
        return loss, after, run

    def _call(self, run, x):
        for i, layer in enumerate(self.net.layers):
            run.stage, run.calls = (i, 0), 0
            if not hasattr(layer, "groups"):
                x = layer(x)
                continue
            groups = [key for key in self.groups if key[0] == i]
            run.varshape = leaf(self.states[self.groups[groups[0]][0]].value).shape
            aux = layer.transition(x)
            run.stage = (i, 1)
            for key in groups:
                for path in self.groups[key]:
                    state = self.states[path]
                    run.new[path] = state.value
                    if run.frozen == key:
                        state.value = jax.tree.map(jax.lax.stop_gradient, state.value)
                    if path in run.shifts:
                        state.value = jax.tree.map(jnp.add, state.value, run.shifts[path])
            x = layer.output(aux)
        return x

    # -- one online step

    def pieces(self, params, before, args):
        """What a rule needs of one step. Keys: a call is ((layer, 0 before or 1 after the new values), number)."""
        hidden = {path: before[path] for path in self.hidden}
        zeros = jax.tree.map(jnp.zeros_like, hidden)

        def exact(params, shifts):
            loss, after, run = self.run(params, before, args, shifts=shifts)
            self.applies = {call: r.apply for call, r in run.relations.items()}
            facts = {call: (r.x, r.operands) for call, r in run.relations.items()}
            return loss, (after, facts, run.ys)

        gradient = jax.value_and_grad(exact, argnums=(0, 1), has_aux=True)
        (loss, (after, facts, ys)), (grads, signal) = gradient(params, zeros)

        def transition(hidden, ys):
            _, _, run = self.run(params, before | hidden, args, held=ys)
            return {path: leaf(value) for path, value in run.new.items()}

        dense = jax.jacobian(transition, argnums=(0, 1))(hidden, ys)

        def reads_old(group, key):  # cut: what leads back into the group is its recurrence
            return self.run(params, before | group, args, frozen=key, cut=True)[0]

        D, df, L, old_L = {}, {}, {}, {}
        for key, group in self.groups.items():
            old_signal = jax.grad(reads_old)({path: before[path] for path in group}, key)
            D[key] = jnp.stack([jnp.stack([_diagonal(dense[a][0][b]) for b in group]) for a in group])
            L[key] = jnp.stack([leaf(signal[a]) for a in group])
            old_L[key] = jnp.stack([leaf(old_signal[a]) for a in group])
            for call in facts:
                if call[0] == (key[0], 0) and leaf(ys[call]).shape == L[key].shape[1:]:
                    df[call, key] = jnp.stack([_diagonal(dense[a][1][call]) for a in group])
        return Pieces(loss, grads, after, facts, D, df, L, old_L)

    def backward(self, args):
        """Back-propagation through one step from the values the network has."""
        return self._pieces(*self.values(), args).grads

    def start(self, rule, pieces):
        """Zero traces, shaped after one step's pieces."""

        def f(pieces):
            return {pair: rule.start(self.relation(pieces, pair[0]), df) for pair, df in pieces.df.items()}

        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, pieces))

    def relation(self, pieces, call):
        return Relation(self.applies[call], *pieces.facts[call])

    def _learn(self, rule):
        """`learn` of a rule, compiled once."""
        return self._learners.setdefault(rule, jax.jit(functools.partial(self.learn, rule)))

    def learn(self, rule, params, before, args, pieces, traces, n):
        """The gradient of a step that has `n` steps behind it, and the traces after it."""
        credit = {call: [jax.tree.map(jnp.zeros_like, operands)] for call, (_, operands) in pieces.facts.items()}
        new = {}
        for (call, group), df in pieces.df.items():
            relation, pair = self.relation(pieces, call), (call, group)
            new[pair] = rule.advance(traces[pair], relation, pieces.D[group], df)
            instant = relation.pull(relation.x, (pieces.L[group] * df).sum(0))
            credit[call] += [
                rule.credit(new[pair], relation, pieces.L[group], n + 1),
                jax.tree.map(jnp.negative, instant),
                rule.credit(traces[pair], relation, pieces.old_L[group], n),
            ]

        def operands(params):
            return {call: r.operands for call, r in self.run(params, before, args)[2].relations.items()}

        summed = {call: jax.tree.map(lambda *terms: sum(terms), *terms) for call, terms in credit.items()}
        (history,) = jax.vjp(operands, params)[1](summed)
        return jax.tree.map(jnp.add, pieces.grads, history), new

    # -- whole sequences; `sequence` is a list of argument tuples

    def online(self, rule, sequence):
        """Per step `(loss, gradients)`, and the values after the last step."""
        params, before = self.values()
        learn = self._learn(rule)
        traces, steps = None, []
        for n, args in enumerate(sequence):
            pieces = self._pieces(params, before, args)
            traces = self.start(rule, pieces) if traces is None else traces
            grads, traces = learn(params, before, args, pieces, traces, n)
            steps.append((pieces.loss, grads))
            before = pieces.after
        return steps, before

    def windows(self, rule, sequence, k):
        """Per window of `k` steps `(losses, gradients)`: back-propagation inside, the trace for what was before."""

        def inside(params, hidden, before, window):
            losses = self._losses(params, before | hidden, window)
            return losses.sum(), losses

        learn = self._learn(rule)
        gradient = jax.jit(jax.grad(inside, argnums=(0, 1), has_aux=True))
        params, before = self.values()
        traces, steps = None, []
        for n in range(0, len(sequence), k):
            window = sequence[n : n + k]
            hidden = {path: before[path] for path in self.hidden}
            (grads, entry), losses = gradient(params, hidden, before, window)
            for i, args in enumerate(window):
                pieces = self._pieces(params, before, args)
                if traces is None:
                    traces = self.start(rule, pieces)
                if i == 0:
                    L = {key: jnp.stack([leaf(entry[path]) for path in group]) for key, group in self.groups.items()}
                    silent = pieces._replace(grads=grads, L=jax.tree.map(jnp.zeros_like, L), old_L=L)
                    grads, _ = learn(params, before, args, silent, traces, n)
                traces = learn(params, before, args, pieces, traces, n + i)[1]
                before = pieces.after
            steps.append((losses, grads))
        return steps, before

    def _losses(self, params, before, sequence, **options):
        def step(before, args):
            loss, after, _ = self.run(params, before, args, **options)
            return after, loss

        return jax.lax.scan(step, before, jax.tree.map(lambda *xs: jnp.stack(xs), *sequence))[1]

    def bptt(self, sequence, cut=False, params=None):
        """Loss and gradient over all time steps. `cut`: old hidden values are constants where they enter maps."""

        def total(params):
            return self._losses(params, self.values()[1], sequence, cut=cut).sum()

        return jax.jit(jax.value_and_grad(total))(self.values()[0] if params is None else params)


def _diagonal(jacobian):
    """(V, V) as an array or a value with a unit -> its diagonal, shape V."""
    dense = leaf(jacobian)
    shape = dense.shape[: dense.ndim // 2]
    size = int(np.prod(shape))
    return jnp.diagonal(dense.reshape(size, size)).reshape(shape)


def total(steps, weights=None):
    """The sum of the gradients of `Oracle.online`'s steps, each times its weight."""
    weights = [1] * len(steps) if weights is None else weights
    return jax.tree.map(lambda *gs: sum(w * g for w, g in zip(weights, gs, strict=True)), *[g for _, g in steps])


# ---------------------------------------------------------------------------------------------------------------------


def assert_close(actual, expected, tol=1e-5, what=""):
    """Compare two mappings path -> gradient: errors relative to the largest entry of each leaf."""
    assert set(actual) == set(expected), (set(actual), set(expected))
    for path in expected:
        assert jax.tree.structure(actual[path]) == jax.tree.structure(expected[path]), (what, path)
        for a, e in zip(jax.tree.leaves(actual[path]), jax.tree.leaves(expected[path])):
            a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
            np.testing.assert_allclose(a, e, rtol=0, atol=max(tol * np.abs(e).max(), 1e-12), err_msg=f"{what} {path}")


def flags_for(devices):
    """`XLA_FLAGS` of another process that has so many devices on the CPU, beside what is set here."""
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    return " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])


class Precision(NamedTuple):
    dtype: Any
    x64: bool
    steps: int
    tol: float  # relative to the largest entry of a gradient; about 20 roundings of the type

    @contextlib.contextmanager
    def __call__(self):
        with jax.enable_x64(self.x64), brainstate.environ.context(precision=64 if self.dtype == np.float64 else 32):
            yield


PRECISIONS = {
    "float32": Precision(np.float32, False, 5, 1e-5),
    "float64": Precision(np.float64, True, 5, 1e-12),
    "float32-x64": Precision(np.float32, True, 5, 1e-5),
    "float16": Precision(np.float16, False, 3, 2e-2),
    "bfloat16": Precision(jnp.bfloat16, False, 3, 1.6e-1),
}
