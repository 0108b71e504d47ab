"""Rules and drivers: how a learner is made and driven, and the comparison of every rule and driver with the oracle."""

import functools
from typing import NamedTuple

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
from brainstate import HiddenState, ParamState
from helpers import DRTRL, PRECISIONS, PPProp, assert_close, total
from models import MODELS, READOUTS, Problem
from steps import LENGTHS, STEPS

import braintrace


def _rule(theirs, make, *args, **options):
    return functools.partial(make, *args, **options), theirs


_pp_prop = functools.partial(_rule, make=braintrace.pp_prop)
RULES = {  # how to make the learner of a network, the oracle's rule
    "pp_prop": _pp_prop(PPProp(0.9), decay_or_rank=0.9),
    "two decays": _pp_prop(PPProp(0.8, 0.5), decay_or_rank=(0.8, 0.5)),
    "rank": _pp_prop(PPProp(0.9), decay_or_rank=19),
    "rank and decay": _pp_prop(PPProp(0.5, 0.7), decay_or_rank=(3, 0.7)),
    "no decay": _pp_prop(PPProp(0.0), decay_or_rank=0.0),
    "rank one": _pp_prop(PPProp(0.0), decay_or_rank=1),
    "slow decay": _pp_prop(PPProp(0.9999), decay_or_rank=0.9999),
    "D_RTRL": _rule(DRTRL(), braintrace.D_RTRL),
    "EProp": _rule(DRTRL(0.6), braintrace.EProp, kappa_filter_decay=0.6),
}
DRIVERS = {  # options of `Problem` and of `check`
    "steps": {},
    "chunks": dict(chunks=(4,), steps=8),
    "chunks of two": dict(chunks=(2,)),
    "every length": dict(chunks=(1, 2, 7, 9, 10, None), steps=9),
}
DRIVERS |= {  # of learners of single samples that are mapped over the batch
    f"mapped {name}": options | {"mapped": "by hand" if "chunks" in options else "compile"}
    for name, options in DRIVERS.items()
}
DRIVERS |= {f"windows of {k}": dict(window=k, chunks=(1, 2), steps=6) for k in (1, 2, 3)}
DRIVERS |= {f"whole, windows of {k}": dict(window=k, chunks=(None,), steps=6) for k in (1, 2, 3)}


def learner_of(net, x, rule="pp_prop", mapped=None, **options):
    """A compiled learner by a rule: a name above, or how to make it.

    The network is mapped over the batch of the inputs `by hand`, or by `compile`; else its states are there already.
    """
    make = functools.partial(RULES[rule][0] if isinstance(rule, str) else rule, **options)
    if mapped == "compile":
        return braintrace.compile(net, make.func, x, batch_size=len(x), vmap=True, **make.keywords)
    learner = make(net)
    if not mapped:
        learner.compile_graph(x)
        return learner

    @brainstate.transform.vmap_new_states(state_tag="new", axis_size=len(x))
    def initialise():
        brainstate.nn.init_all_states(net)
        learner.compile_graph(x[0])

    initialise()
    return braintrace.ETraceVmap(learner, vmap_states="new")


def same(ours, theirs, tol, what):
    """Of values under the same keys, whatever holds their arrays."""
    assert_close(*({k: jax.tree.leaves(v) for k, v in values.items()} for values in (ours, theirs)), tol, what)


class Learner:
    """A problem and its learner, which every drive finds as it was at the start."""

    def __init__(self, problem, rule="pp_prop", **options):
        self.problem, self.driver = problem, problem.learner(rule, **options)
        self.inner = self.driver.module if problem.mapped else self.driver
        self.start = self.values()

    def values(self):
        """What a step changes, traces and counter included."""
        states = self.driver.states().items()
        return {path: state.value for path, state in states if not isinstance(state, ParamState)}

    def reset(self):
        states = self.driver.states()
        for path, value in self.start.items():
            states[path].value = value

    def loss(self, *args):
        return self.problem.loss(self.problem.net, self.driver, *args)

    def window_losses(self, xs, targets):
        errors = (self.driver(braintrace.MultiStepData(xs)) - targets) ** 2
        return errors.sum(range(1, errors.ndim))

    def chunked(self, trace_chunk, step_fn=None, sequences=None, **options):
        self.reset()
        options = {"reduction": "sum", "step_fn": step_fn or self.loss, "trace_chunk": trace_chunk} | options
        sequences = self.problem.sequences() if sequences is None else sequences
        return brainstate.transform.jit(lambda *xs: self.driver.etrace_grad(*xs, **options))(*sequences)

    def by_step(self, step_fn=None):
        """Per step `(loss, gradients)` of single calls in a plain loop."""
        self.reset()
        gradient = brainstate.transform.grad(step_fn or self.loss, self.inner.param_states, return_value=True)
        step = brainstate.transform.jit(lambda *args: gradient(*args))
        pairs = [step(*args) for args in self.problem.sequence]
        return [(loss, dict(grads)) for grads, loss in pairs]

    def called(self):
        """The values after single calls without a gradient."""
        self.reset()
        call = brainstate.transform.jit(lambda x: self.driver(x))
        for x, *_ in self.problem.sequence:
            call(x)
        return self.values()


class Expected(NamedTuple):
    """By the dense recursions; `steps` has `(loss, gradients)` of every step or window, `first` the gradients that
    back-propagation through the first step gives."""

    steps: list
    after: dict
    first: dict


def expected_of(problem, rule, window=None, oracle=None):
    oracle = problem.oracle() if oracle is None else oracle
    theirs = RULES[rule][1] if isinstance(rule, str) else rule
    if window:
        steps, after = oracle.windows(theirs, problem.sequence, window)
    else:
        steps, after = oracle.online(theirs, problem.sequence)
    return Expected(steps, after, oracle.backward(problem.sequence[0]))


def check(problem, rule="pp_prop", chunks=None, window=None, tol=1e-5, silent=False, expected=None):
    """A learner by a rule, a name above or a pair as there, equals the oracle in losses, gradients, and what is left.

    `chunks` are lengths for `etrace_grad`, `None` is single steps; `window` is the length of windows inside of chunks.
    With no history the gradient is that of back-propagation, and unless its neurons may be `silent`, every parameter
    acts on the last loss. Gives the learner, and the `(loss, gradients)` that were compared.
    """
    make, theirs = RULES[rule] if isinstance(rule, str) else rule
    steps, after, first = expected or expected_of(problem, theirs, window)
    learner = Learner(problem, make, **({"vjp_method": "multi-step"} if window else {}))
    called = None if chunks is None else learner.called()

    def compare(what, ours, theirs):
        (loss, grads), (expected_loss, expected) = ours, theirs
        assert_close(grads, expected, tol, what)
        np.testing.assert_allclose(np.float64(loss), np.float64(expected_loss), rtol=tol, err_msg=what)
        for path, state in learner.inner.param_states.items():
            assert jax.tree.map(jnp.result_type, grads[path]) == jax.tree.map(jnp.result_type, state.value)

    def left(what):
        hidden = {path: state.value for path, state in problem.net.states(HiddenState).items()}
        assert_close(hidden, {path: after[path] for path in hidden}, tol, f"states after {what}")
        assert int(learner.inner.running_index.value) == len(problem.sequence)

    if chunks is None:
        found = learner.by_step()
        assert_close(found[0][1], first, tol, "step 0 against back-propagation")
        for t, (ours, expected) in enumerate(zip(found, steps, strict=True)):
            compare(f"step {t}", ours, expected)
        left("single steps")
    else:
        whole = np.concatenate([np.ravel(np.float64(loss)) for loss, _ in steps]), total(steps)
        found = []
        for k in chunks:
            # Without `chunk_size` every step is a window of its own.
            options = {"chunk_size": window} if window and (window > 1 or k is None) else {}
            step_fn = learner.window_losses if window and window > 1 else None
            grads, losses = learner.chunked(k, step_fn, return_value=True, **options)
            found.append((losses, dict(grads)))
            compare(f"chunks of {k}", found[-1], whole)
            left(f"chunks of {k}")
            same(learner.values(), called, tol, f"values after chunks of {k}")
    for path, gradient in ({} if silent else found[-1][1]).items():
        for i, g in enumerate(jax.tree.leaves(gradient)):
            assert np.abs(g).max() > 1e-4, ("too small to be compared", path, i)
    return learner, found


# ---------------------------------------------------------------------------------------------------------------------
# Cases of the product of networks, rules and drivers. The oracle of a network serves all rules and drivers in turn.


def problem_of(model, readout=None, batch=2, **options):
    return Problem((MODELS | STEPS)[model], READOUTS.get(readout), batch, **options)


class Case(NamedTuple):
    """A row of the product; `options` are those of `Problem` and `check`, and a name of `PRECISIONS`."""

    model: str
    readout: str | None
    batch: int | None
    rule: str
    driver: str
    options: dict

    def __str__(self):
        words = [getattr(value, "__name__", value) for name, value in self.options.items() if name != "silent"]
        return "-".join(map(str, [*self[:5], *words]))

    def network(self):
        """What the oracle is made for, as words to sort by."""
        return [str(self.options.get(name)) for name in ("precision", "loss", "kind")] + [str(x) for x in self[:3]]

    def check(self):
        options = {"steps": LENGTHS.get(self.model, 5)} | DRIVERS[self.driver] | self.options
        asked = {name: options.pop(name) for name in ("chunks", "window", "tol", "silent") if name in options}
        p = PRECISIONS[options.pop("precision", "float32")]
        if p is not PRECISIONS["float32"]:
            options, asked = options | {"steps": p.steps, "dtype": p.dtype}, asked | {"tol": p.tol}
        with p():
            problem = problem_of(*self[:3], **options)
            options.pop("mapped", None)
            expected = _expected(self.rule, asked.get("window"), *self[:3], **options)
            return check(problem, self.rule, expected=expected, **asked)


def case(model, readout=None, batch=2, rule="pp_prop", driver="steps", **options):
    return Case(model, readout, batch, rule, driver, options)


def reference(model, readout=None, batch=2, rule="pp_prop", steps=9):
    """What is expected of a network."""
    return _expected(rule, None, model, readout, batch, steps=steps)


@functools.cache
def _expected(rule, window, *network, **options):
    oracle = _oracle(*network, **{name: options[name] for name in ("loss", "dtype") if name in options})
    return expected_of(problem_of(*network, **options), rule, window, oracle)


@functools.lru_cache(4)
def _oracle(*network, **options):
    return problem_of(*network, **options).oracle()
