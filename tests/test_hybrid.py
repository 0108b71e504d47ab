"""Exact traces for some parameters, pp_prop's for the others, and decays by parameter: each as if it were alone."""

import functools

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from rules import check, problem_of, reference

import braintrace

pytestmark = pytest.mark.usefixtures("time_step")


def expected(network, rules):
    """Of every parameter by the rule that it has: `(prefix of paths, rule)` in order."""
    by_rule = {rule: reference(*network, rule=rule) for _, rule in rules}

    def rule_of(path):
        dotted = ".".join(map(str, path))
        return by_rule[next(rule for prefix, rule in rules if dotted.startswith(prefix))]

    last = by_rule[rules[-1][1]]
    steps = [(loss, {p: rule_of(p).steps[t][1][p] for p in grads}) for t, (loss, grads) in enumerate(last.steps)]
    return last._replace(steps=steps)


GRU, LSTM, ALIF = ("gru", "linear"), ("lstm", "leaky"), ("alif-coba", "plain")
CASES = {  # network, options, rules
    "gru, nothing is free": (GRU, {}, [("", "pp_prop")]),
    "gru, all": (GRU, {"exact": "all"}, [("", "D_RTRL")]),
    "gru, one weight": (GRU, {"exact": [("layers", 0, "Wh")]}, [("layers.0.Wh", "D_RTRL"), ("", "pp_prop")]),
    "lstm, the readout is free": (LSTM, {}, [("layers.1", "D_RTRL"), ("", "pp_prop")]),
    "lstm, no bytes": (LSTM, {"exact": 0}, [("layers.1", "D_RTRL"), ("", "pp_prop")]),
    "lstm, all bytes": (LSTM, {"exact": 10**9}, [("", "D_RTRL")]),
    "lstm, two decays": (
        LSTM,
        {"decay_or_rank": (0.5, 0.7)},
        [("layers.1", "D_RTRL"), ("", "rank and decay")],
    ),
    "alif": (ALIF, {"exact": "all"}, [("", "D_RTRL")]),
}


def check_all(network, make, rules, drivers):
    for mapped, chunks in drivers:
        problem = problem_of(*network, steps=9, mapped=mapped)
        check(problem, (make, None), chunks, silent=network == ALIF, expected=expected(network, rules))


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_its_rule(case):
    network, options, rules = CASES[case]
    make = functools.partial(braintrace.HybridDimVjpAlgorithm, **{"decay_or_rank": 0.9} | options)
    check_all(network, make, rules, [(None, None), (None, [4]), ("by hand", [None]), ("by hand", None)])


def test_the_rules_differ():
    """A control: another rule for one parameter is seen by the comparison above."""
    a, b = (reference(*LSTM, rule=rule).steps[-1][1] for rule in ("D_RTRL", "pp_prop"))
    for path in a:
        if path[:2] != ("layers", 1) or path[-1] == "W":
            x, y = (np.concatenate([np.ravel(v) for v in jax.tree.leaves(g[path])]) for g in (a, b))
            assert np.linalg.norm(x - y) > 1e-2 * np.linalg.norm(x), path


BY_PARAMETER = {
    "lstm": (
        LSTM,
        {"layers.0": (0.9, 0.9), ("layers", 1): (0.5, 0.7)},
        [("layers.1", "rank and decay"), ("", "pp_prop")],
    ),
    "gru": (
        GRU,
        {(): 19, "layers.0.Wh": (0.5, 0.7)},
        [("layers.0.Wh", "rank and decay"), ("", "pp_prop")],
    ),
}


@pytest.mark.parametrize("case", BY_PARAMETER)
def test_decays_by_parameter(case):
    network, decays, rules = BY_PARAMETER[case]
    make = functools.partial(braintrace.pp_prop, decay_or_rank=decays)
    check_all(network, make, rules, [(None, [4]), (None, None)])
    with pytest.raises(AttributeError, match="decay differently"):
        _ = problem_of(*network).learner(make).decay


def test_time_constants():
    with brainstate.environ.context(dt=0.5 * u.ms):
        learner = braintrace.pp_prop(braintrace.nn.GRUCell(2, 3), (10.0 * u.ms, 0.02 * u.second))
    np.testing.assert_allclose((learner.decay_x, learner.decay_f), np.exp([-0.05, -0.025]), rtol=1e-12)


def small(rule=braintrace.pp_prop, **options):
    net = brainstate.nn.Sequential(braintrace.nn.GRUCell(2, 3), braintrace.nn.LeakyRateReadout(3, 1))
    return braintrace.compile(net, rule, jnp.zeros(2), **options)


ERRORS = [
    (dict(decay_or_rank={"layers.0": 0.9}), ValueError, "no entry for the parameter 'layers.1.W'"),
    (dict(decay_or_rank={(): 0.9, "cell": 0.5}), ValueError, "names cell.*layers.0.Wz.weight"),
    (dict(decay_or_rank={}), ValueError, "empty mapping"),
    (dict(decay_or_rank={3: 0.9}), TypeError, "path or a prefix"),
    (dict(decay_or_rank={(): 1.5}), ValueError, "1.5"),
    (dict(decay_or_rank=3.0 * u.mV), ValueError, "unit of a time"),
    (dict(decay_or_rank=-3.0 * u.ms), ValueError, "positive"),
    (dict(rule="hybrid", decay_or_rank=0.9, exact="some"), ValueError, "'free', 'all'"),
    (dict(rule="hybrid", decay_or_rank=0.9, exact=True), TypeError, "'free', 'all'"),
    (dict(rule="hybrid", decay_or_rank=0.9, exact=-1), ValueError, "negative"),
    (dict(rule="hybrid", decay_or_rank=0.9, exact=["cell"]), ValueError, "exact names 'cell'.*layers.1.W"),
    (dict(rule="hybrid"), TypeError, "decay_or_rank"),
    (dict(rule="immediate", config=braintrace.ETraceConfig("io_factorized", decay=0.5)), TypeError, "no config"),
]


@pytest.mark.parametrize("options, error, message", ERRORS)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        small(**options)


def test_a_time_constant_needs_the_time_step(monkeypatch):
    get = brainstate.environ.get
    monkeypatch.setattr(brainstate.environ, "get", lambda key, *a, **k: None if key == "dt" else get(key, *a, **k))
    with pytest.raises(ValueError, match="environ.set"):
        braintrace.pp_prop(braintrace.nn.GRUCell(2, 3), 10.0 * u.ms)


def test_what_can_have_no_trace_per_weight_is_left_to_pp_prop():
    """A weight that acts on several positions, of an operation that says no more of it, has none."""
    scale = braintrace.register_primitive("hybrid_scale", lambda x, w: x * w.sum())

    class Net(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = brainstate.ParamState(jnp.ones(3))
            self.h = brainstate.HiddenState(jnp.zeros(4))

        def update(self, x):
            self.h.value = jnp.tanh(0.5 * self.h.value + scale.bind(x, self.w.value))
            return self.h.value

    with pytest.raises(NotImplementedError):
        braintrace.compile(Net(), "d_rtrl", jnp.zeros(4))
    learner = braintrace.compile(Net(), "hybrid", jnp.zeros(4), decay_or_rank=0.9, exact="all")
    assert not learner.etrace_bwg and learner.etrace_dfs
    with pytest.raises(NotImplementedError):
        braintrace.compile(Net(), "hybrid", jnp.zeros(4), decay_or_rank=0.9, exact=["w"])


def test_the_report_says_which_is_which():
    learner = small("hybrid", decay_or_rank=0.9)
    text = learner.report.to_str()
    assert "filtered, decay 0.9" in text and "per input" in text
    paths = [("layers", 0, "Wz", "weight"), ("layers", 1, "W")]
    filtered, exact = (learner.get_etrace_of(p) for p in paths)
    assert len(filtered) == 2 and isinstance(exact, dict)
    held = sum(x.nbytes for s in learner.states(braintrace.EligibilityTrace).values() for x in jax.tree.leaves(s.value))
    shown = [int(row.split()[-1].replace(",", "")) for row in text.split("bytes\n")[1].split("\n\n")[0].splitlines()]
    # One row for each trained path; a path that stands for two operands is listed once.
    assert sum(shown) == held


def test_the_immediate_rule_has_no_memory():
    """After any number of steps its gradient is that of the present step alone."""
    net = braintrace.nn.GRUCell(2, 3)
    learner = braintrace.compile(net, "immediate", jnp.zeros((2, 2)), batch_size=2)
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 2)), jnp.float32)
    loss = lambda x: (learner(x) ** 2).sum()  # noqa: E731
    for x in xs:
        h = net.h.value
        ours = brainstate.transform.grad(loss, learner.param_states)(x)
        after, net.h.value = net.h.value, h
        truth = brainstate.transform.grad(lambda x=x: (net(x) ** 2).sum(), learner.param_states)()
        net.h.value = after
        assert_close(dict(ours), dict(truth), 1e-5, "the present step")


def test_coordinates():
    config = braintrace.ETraceConfig("hybrid", decay=(0.8, 0.5))
    learner = braintrace.compile(braintrace.nn.GRUCell(2, 3), config, jnp.zeros(2))
    assert isinstance(learner, braintrace.HybridDimVjpAlgorithm) and (learner.decay_x, learner.decay_f) == (0.8, 0.5)
    assert braintrace.HybridDimVjpAlgorithm(braintrace.nn.GRUCell(2, 3), 0.9).config.is_factorized
