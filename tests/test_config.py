import dataclasses
import doctest
import itertools
import pickle
from fractions import Fraction

import numpy as np
import pytest

import braintrace
from braintrace._learners.config import ETraceConfig

IO, RANDOM = "io_factorized", "random_projection"
LEAK = "scalar_leak"
SIGNALS = ["symmetric", "random_feedback", "modulatory", "bootstrapped"]
NAMES = [field.name for field in dataclasses.fields(ETraceConfig)]

# trace_factorization, temporal_recursion, recurrence_scope, trace_filter, decay; as they are stored
LEGAL = [
    ("per_param", "jacobian", "diagonal", "none", None),
    ("per_param", "jacobian", "diagonal", "kappa", None),
    ("per_param", "jacobian", "coupled", "none", None),
    ("per_param", "jacobian", "coupled", "kappa", None),
    ("per_param", "jacobian", "sparse_n", "none", None),
    ("per_param", "jacobian", "sparse_n", "kappa", None),
    ("per_param", LEAK, "diagonal", "none", 0.5),
    ("per_param", LEAK, "diagonal", "kappa", 0.5),
    ("per_param", "none", "diagonal", "none", 0.0),
    ("per_param", "none", "diagonal", "kappa", 0.0),
    (IO, (LEAK, "jacobian"), "diagonal", "none", (0.5, 0.5)),
    (IO, (LEAK, "jacobian"), "coupled", "none", (0.5, 0.5)),
    (IO, ("none", "jacobian"), "diagonal", "none", (0.0, 0.5)),
    (IO, ("none", "jacobian"), "coupled", "none", (0.0, 0.5)),
    (IO, (LEAK, LEAK), "diagonal", "none", (0.5, 0.5)),
    (IO, (LEAK, "none"), "diagonal", "none", (0.5, 0.0)),
    (IO, ("none", LEAK), "diagonal", "none", (0.0, 0.5)),
    (IO, ("none", "none"), "diagonal", "none", (0.0, 0.0)),
    (RANDOM, "jacobian", "coupled", "none", None),
]


def arguments(factorization, recursion, scope, filter, decay):
    """One combination, with the coefficients that it needs."""
    return dict(
        trace_factorization=factorization,
        temporal_recursion=recursion,
        recurrence_scope=scope,
        trace_filter=filter,
        decay=decay,
        kappa=0.3 if filter == "kappa" else None,
        sparse_n=2 if scope == "sparse_n" else None,
    )


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("row", LEGAL, ids=str)
def test_legal_combination(row, signal):
    kwargs = dict(arguments(*row), learning_signal=signal, update_schedule="per_step", window_size=None)
    config = ETraceConfig(**kwargs)
    assert dataclasses.asdict(config) == kwargs
    assert config == ETraceConfig(*[kwargs[name] for name in NAMES])
    assert config.replace() == config
    assert eval(f"ETraceConfig({config.describe()})") == config


def test_no_other_combination():
    recursions, decays = ["jacobian", LEAK, "none"], [None, 0.0, 0.5]
    accepted = set()
    for factorization in ("per_param", IO, RANDOM):
        repeat = 2 if factorization == IO else 1
        axes = [itertools.product(values, repeat=repeat) for values in (recursions, decays)]
        scopes, filters = ["diagonal", "coupled", "sparse_n"], ["none", "kappa"]
        for recursion, decay, scope, filter in itertools.product(*axes, scopes, filters):
            if factorization != IO:
                (recursion,), (decay,) = recursion, decay
            try:
                c = ETraceConfig(**arguments(factorization, recursion, scope, filter, decay))
            except ValueError:
                continue
            accepted.add((factorization, c.temporal_recursion, c.recurrence_scope, c.trace_filter, c.decay))
    assert accepted == set(LEGAL)


# --- rejections, in their order ---

REJECTED = {
    "unknown value": [
        (dict(trace_factorization="dense"), ValueError, "Unknown trace_factorization 'dense'.*'io_factorized'"),
        (dict(temporal_recursion="leak"), ValueError, "Unknown temporal_recursion 'leak'.*'scalar_leak'"),
        (dict(trace_factorization=IO, temporal_recursion=(LEAK, "x")), ValueError, "temporal_recursion 'x'"),
        (dict(temporal_recursion=None), ValueError, "Unknown temporal_recursion None"),
        (dict(recurrence_scope="full"), ValueError, "Unknown recurrence_scope 'full'.*'coupled'"),
        (dict(recurrence_scope=("diagonal", "diagonal")), ValueError, "Unknown recurrence_scope"),
        (dict(learning_signal="random"), ValueError, "Unknown learning_signal 'random'.*'random_feedback'"),
        (dict(trace_filter=None), ValueError, "Unknown trace_filter None.*'kappa'"),
        (dict(update_schedule=1), ValueError, "Unknown update_schedule 1.*'per_step'"),
    ],
    "misplaced pair": [
        (dict(temporal_recursion=("none", "none")), ValueError, "is a pair.*'per_param'.*'io_factorized'"),
        (dict(trace_factorization=RANDOM, decay=[0.5, 0.5]), ValueError, "is a pair.*'random_projection'"),
        (dict(trace_factorization=IO, temporal_recursion=(LEAK,) * 3), ValueError, "not a pair.*single value"),
        (dict(trace_factorization=IO, temporal_recursion=()), ValueError, "not a pair"),
        (dict(trace_factorization=IO, decay=(0.5,)), ValueError, r"decay=\(0.5,\) is not a pair"),
    ],
    "decay out of range": [
        (dict(temporal_recursion=LEAK, decay=1.0), ValueError, r"decay 1.0 is outside \[0, 1\)"),
        (dict(temporal_recursion=LEAK, decay=-0.1), ValueError, "decay -0.1 is outside"),
        (dict(temporal_recursion=LEAK, decay=float("nan")), ValueError, "decay nan is outside"),
        (dict(trace_factorization=IO, decay=(0.5, 2)), ValueError, "decay 2 is outside"),
        (dict(temporal_recursion=LEAK, decay=False), TypeError, "must be a number, not False of type bool"),
        (dict(temporal_recursion=LEAK, decay="0.9"), TypeError, "must be a number, not '0.9' of type str"),
        (dict(trace_factorization=IO, decay=(np.ones(2), 0.9)), TypeError, "of type ndarray"),
    ],
    "none with a decay": [
        (dict(temporal_recursion="none", decay=0.5), ValueError, "'none' carries nothing over.*'scalar_leak'"),
        (dict(trace_factorization=IO, temporal_recursion=("none", "jacobian"), decay=0.9), ValueError, "nothing over"),
        (dict(trace_factorization=IO, temporal_recursion=(LEAK, "none"), decay=0.9), ValueError, "nothing over"),
    ],
    "unimplemented schedule": [
        (dict(update_schedule="window", window_size=4), ValueError, "'window' is not implemented.*'per_step'"),
        (dict(update_schedule="sequence_end"), ValueError, "'sequence_end' is not implemented"),
    ],
    "filter without a trace per parameter": [
        (dict(trace_factorization=IO, trace_filter="kappa", kappa=0.5, decay=0.9), ValueError, "trace per parameter"),
        (
            dict(trace_factorization=RANDOM, recurrence_scope="coupled", trace_filter="kappa", kappa=0.5),
            ValueError,
            "trace_filter='kappa'.*'random_projection'",
        ),
    ],
    "scope without a Jacobian": [
        (dict(temporal_recursion=LEAK, decay=0.5, recurrence_scope="coupled"), ValueError, "transition Jacobian, but"),
        (dict(temporal_recursion="none", recurrence_scope="sparse_n", sparse_n=2), ValueError, "='none' does not use"),
        (
            dict(trace_factorization=IO, temporal_recursion=LEAK, decay=0.5, recurrence_scope="coupled"),
            ValueError,
            "'coupled' is about the transition Jacobian",
        ),
        (dict(trace_factorization=IO, decay=(0.5, 0.0), recurrence_scope="coupled"), ValueError, "does not use it"),
        (dict(trace_factorization=RANDOM, temporal_recursion="none", recurrence_scope="coupled"), ValueError, "use it"),
    ],
    "Jacobian of the input": [
        (dict(trace_factorization=IO, temporal_recursion=("jacobian",) * 2, decay=0.9), ValueError, "x side filters"),
    ],
    "decay of one side": [
        (dict(decay=0.9), ValueError, "decay=0.9 has no place in temporal_recursion='jacobian'.*decay=None"),
        (dict(decay=0), ValueError, "decay=0.0 has no place"),
        (dict(trace_factorization=RANDOM, recurrence_scope="coupled", decay=0.9), ValueError, "has no place"),
        (dict(temporal_recursion=LEAK), ValueError, "'scalar_leak' needs the factor.*Pass decay"),
    ],
    "decay of two sides": [
        (dict(trace_factorization=IO), ValueError, r"decay=\(None, None\), but .* both sides decay"),
        (dict(trace_factorization=IO, decay=(0.9, None)), ValueError, r"decay=\(0.9, None\), but"),
        (dict(trace_factorization=IO, temporal_recursion=("none", LEAK)), ValueError, r"decay=\(0.0, None\), but"),
    ],
    "coefficient": [
        (dict(kappa=0.5), ValueError, "kappa=0.5 belongs to trace_filter='kappa', but trace_filter='none'"),
        (dict(kappa=0), ValueError, "kappa=0.0 belongs to"),
        (dict(trace_filter="kappa"), ValueError, "'kappa' needs its coefficient. Pass kappa"),
        (dict(sparse_n=2), ValueError, "sparse_n=2 belongs to recurrence_scope='sparse_n'.*'diagonal'"),
        (dict(recurrence_scope="coupled", sparse_n=1), ValueError, "sparse_n=1 belongs to"),
        (dict(recurrence_scope="sparse_n"), ValueError, "'sparse_n' needs its coefficient. Pass sparse_n"),
        (dict(window_size=4), ValueError, "window_size=4 belongs to update_schedule='window'"),
    ],
    "scope of the projection": [
        (
            dict(trace_factorization=RANDOM),
            ValueError,
            "'diagonal' is not defined for .*'random_projection'.*'coupled'",
        ),
        (dict(trace_factorization=RANDOM, temporal_recursion="none"), ValueError, "'diagonal' is not defined for"),
        (
            dict(trace_factorization=RANDOM, recurrence_scope="sparse_n", sparse_n=2),
            ValueError,
            "'sparse_n' is not def",
        ),
    ],
    "scope of two sides": [
        (
            dict(trace_factorization=IO, decay=0.9, recurrence_scope="sparse_n", sparse_n=2),
            ValueError,
            "'sparse_n' is not defined for .*'io_factorized'.*'diagonal' or 'coupled'",
        ),
    ],
    "value of a coefficient": [
        (dict(recurrence_scope="sparse_n", sparse_n=0), ValueError, "sparse_n=0 reaches no neighbour.*at least 1"),
        (dict(recurrence_scope="sparse_n", sparse_n=-1), ValueError, "sparse_n=-1"),
        (dict(recurrence_scope="sparse_n", sparse_n=True), TypeError, "sparse_n=True counts steps.*at least 1"),
        (dict(recurrence_scope="sparse_n", sparse_n=1.0), TypeError, "sparse_n=1.0 counts"),
        (dict(recurrence_scope="sparse_n", sparse_n="2"), TypeError, "sparse_n='2' counts"),
        (dict(trace_filter="kappa", kappa=1.0), ValueError, r"kappa 1.0 is outside \[0, 1\)"),
        (dict(trace_filter="kappa", kappa=-0.5), ValueError, "kappa -0.5 is outside"),
        (dict(trace_filter="kappa", kappa=False), TypeError, "kappa must be a number, not False"),
    ],
}


@pytest.mark.parametrize("kwargs, error, message", [row for rows in REJECTED.values() for row in rows], ids=str)
def test_rejected(kwargs, error, message):
    with pytest.raises(error, match=message) as caught:
        ETraceConfig(**kwargs)
    assert caught.type is error


# Each row breaks two rules, of which the first is reported.
BOTH = [
    ("unknown value", "misplaced pair", dict(temporal_recursion=("leak", "none", "none"))),
    ("misplaced pair", "decay out of range", dict(decay=(2.0, 0.5))),
    ("decay out of range", "none with a decay", dict(temporal_recursion="none", decay=2)),
    (
        "none with a decay",
        "unimplemented schedule",
        dict(temporal_recursion="none", decay=0.5, update_schedule="window"),
    ),
    (
        "unimplemented schedule",
        "filter without a trace per parameter",
        dict(update_schedule="window", trace_factorization=IO, trace_filter="kappa"),
    ),
    (
        "filter without a trace per parameter",
        "scope without a Jacobian",
        dict(trace_factorization=IO, temporal_recursion=LEAK, trace_filter="kappa", recurrence_scope="coupled"),
    ),
    (
        "scope without a Jacobian",
        "Jacobian of the input",
        dict(trace_factorization=IO, temporal_recursion=("jacobian", LEAK), recurrence_scope="coupled"),
    ),
    ("scope without a Jacobian", "decay of one side", dict(temporal_recursion=LEAK, recurrence_scope="coupled")),
    ("Jacobian of the input", "decay of two sides", dict(trace_factorization=IO, temporal_recursion=("jacobian",) * 2)),
    ("decay of one side", "coefficient", dict(decay=0.9, kappa=0.5)),
    ("decay of two sides", "coefficient", dict(trace_factorization=IO, sparse_n=2)),
    ("coefficient", "scope of the projection", dict(trace_factorization=RANDOM, kappa=0.5)),
    ("coefficient", "value of a coefficient", dict(kappa=2.0)),
    (
        "scope of the projection",
        "value of a coefficient",
        dict(trace_factorization=RANDOM, recurrence_scope="sparse_n", sparse_n=0),
    ),
    (
        "scope of two sides",
        "value of a coefficient",
        dict(trace_factorization=IO, decay=0.5, recurrence_scope="sparse_n", sparse_n=0),
    ),
]
REPORTED = {
    "unknown value": "Unknown",
    "misplaced pair": "is a pair|is not a pair",
    "decay out of range": "decay .* outside",
    "none with a decay": "carries nothing over",
    "unimplemented schedule": "not implemented",
    "filter without a trace per parameter": "filters a trace per parameter",
    "scope without a Jacobian": "is about the transition Jacobian",
    "Jacobian of the input": "x side filters inputs",
    "decay of one side": "has no place|needs the factor",
    "decay of two sides": "both sides decay",
    "coefficient": "belongs to|needs its coefficient",
    "scope of the projection": "not defined for trace_factorization='random",
    "scope of two sides": "not defined for trace_factorization='io",
}


@pytest.mark.parametrize("first, second, kwargs", BOTH, ids=str)
def test_order_of_rejections(first, second, kwargs):
    assert list(REJECTED).index(first) < list(REJECTED).index(second)
    with pytest.raises(ValueError, match=REPORTED[first]):
        ETraceConfig(**kwargs)


# --- canonical form ---

CANONICAL = [
    (dict(trace_factorization=IO, decay=0.9), dict(temporal_recursion=(LEAK, "jacobian"), decay=(0.9, 0.9))),
    (dict(trace_factorization=IO, temporal_recursion=LEAK, decay=0.9), dict(temporal_recursion=(LEAK, LEAK))),
    (
        dict(trace_factorization=IO, temporal_recursion="none"),
        dict(temporal_recursion=("none", "none"), decay=(0.0, 0.0)),
    ),
    (
        dict(trace_factorization=IO, temporal_recursion=[LEAK, "jacobian"], decay=[0.5, 0.9]),
        dict(temporal_recursion=(LEAK, "jacobian"), decay=(0.5, 0.9)),
    ),
    (dict(trace_factorization=IO, decay=(0, 0.9)), dict(temporal_recursion=("none", "jacobian"), decay=(0.0, 0.9))),
    (dict(trace_factorization=IO, decay=(0.9, 0)), dict(temporal_recursion=(LEAK, "none"), decay=(0.9, 0.0))),
    (
        dict(trace_factorization=IO, temporal_recursion=("jacobian", "jacobian"), decay=(0.0, 0.9)),
        dict(temporal_recursion=("none", "jacobian"), decay=(0.0, 0.9)),
    ),
    (dict(trace_factorization=IO, temporal_recursion=("none", LEAK), decay=(None, 0.9)), dict(decay=(0.0, 0.9))),
    (dict(temporal_recursion=LEAK, decay=0), dict(temporal_recursion="none", decay=0.0)),
    (dict(temporal_recursion="none"), dict(decay=0.0)),
    (dict(recurrence_scope="sparse_n", sparse_n=1), dict(recurrence_scope="coupled", sparse_n=None)),
    (
        dict(trace_factorization=RANDOM, recurrence_scope="sparse_n", sparse_n=np.int32(1)),
        dict(recurrence_scope="coupled", sparse_n=None),
    ),
    (dict(trace_filter="kappa", kappa=0), dict(trace_filter="none", kappa=None)),
    (
        dict(trace_factorization=IO, trace_filter="kappa", kappa=0.0, decay=0.5),
        dict(trace_filter="none", kappa=None),
    ),
    (dict(temporal_recursion=LEAK, decay=np.float32(0.5)), dict(decay=0.5)),
    (dict(temporal_recursion=LEAK, decay=Fraction(1, 2)), dict(decay=0.5)),
    (dict(recurrence_scope="sparse_n", sparse_n=np.int64(3)), dict(sparse_n=3)),
]


@pytest.mark.parametrize("kwargs, stored", CANONICAL, ids=str)
def test_canonical_form(kwargs, stored):
    config, plain = ETraceConfig(**kwargs), ETraceConfig(**{**kwargs, **stored})
    for name, value in stored.items():
        assert repr(getattr(config, name)) == repr(value)  # of the very type
    assert config == plain and hash(config) == hash(plain)


# --- the object ---


def test_defaults():
    values = ["per_param", "jacobian", "diagonal", "symmetric", "none", "per_step", None, None, None, None]
    assert dataclasses.astuple(ETraceConfig()) == tuple(values)


@pytest.mark.parametrize(
    "name, value", zip(["recursion_x", "recursion_f", "decay_x", "decay_f"], [LEAK, "none", 0.9, 0])
)
def test_sides(name, value):
    assert getattr(ETraceConfig(IO, (LEAK, "none"), decay=(0.9, None)), name) == value
    for config in (ETraceConfig(), ETraceConfig(RANDOM, recurrence_scope="coupled")):
        with pytest.raises(AttributeError, match="has no x and f sides. Read (decay|temporal_recursion)"):
            getattr(config, name)


@pytest.mark.parametrize("row", LEGAL, ids=str)
def test_predicates(row):
    config = ETraceConfig(**arguments(*row))
    assert config.is_factorized is (row[0] == IO)
    assert config.include_recurrent_mixing is (row[2] in ("coupled", "sparse_n"))


def test_frozen():
    config = ETraceConfig()
    for name in (*NAMES, "other"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        del config.decay


def test_equality_by_value():
    configs = [ETraceConfig(**arguments(*row), learning_signal=signal) for row in LEGAL for signal in SIGNALS]
    again = [ETraceConfig(**arguments(*row), learning_signal=signal) for row in LEGAL for signal in SIGNALS]
    assert configs == again and len({*configs, *again}) == len(configs)
    assert ETraceConfig() != dataclasses.astuple(ETraceConfig())


def test_replace():
    config = ETraceConfig(IO, decay=(0.5, 0.9))
    assert config.replace(recurrence_scope="coupled") == ETraceConfig(IO, decay=(0.5, 0.9), recurrence_scope="coupled")
    assert config.replace(decay=0) == ETraceConfig(IO, "none")
    assert config == ETraceConfig(IO, decay=(0.5, 0.9))
    with pytest.raises(ValueError, match="is a pair"):
        config.replace(trace_factorization="per_param")
    with pytest.raises(ValueError, match="belongs to"):
        config.replace(kappa=0.5)
    with pytest.raises(TypeError, match="other"):
        config.replace(other=1)


DESCRIBED = [
    (dict(), "trace_factorization='per_param'"),
    (dict(learning_signal="modulatory"), "trace_factorization='per_param', learning_signal='modulatory'"),
    (
        dict(sparse_n=2, kappa=0.5, trace_filter="kappa", recurrence_scope="sparse_n"),
        "trace_factorization='per_param', recurrence_scope='sparse_n', trace_filter='kappa', kappa=0.5, sparse_n=2",
    ),
    (dict(temporal_recursion="none"), "trace_factorization='per_param', temporal_recursion='none', decay=0.0"),
    (
        dict(trace_factorization=IO, decay=0.9),
        "trace_factorization='io_factorized', temporal_recursion=('scalar_leak', 'jacobian'), decay=(0.9, 0.9)",
    ),
    (
        dict(trace_factorization=RANDOM, recurrence_scope="coupled"),
        "trace_factorization='random_projection', recurrence_scope='coupled'",
    ),
]


@pytest.mark.parametrize("kwargs, text", DESCRIBED, ids=str)
def test_describe(kwargs, text):
    assert ETraceConfig(**kwargs).describe() == text


def test_public_name():
    assert ETraceConfig.__module__ == "braintrace"
    config = ETraceConfig(IO, decay=0.9)
    assert pickle.loads(pickle.dumps(config)) == config


def test_docstring_example():
    runner = doctest.DocTestRunner()
    runner.run(doctest.DocTestParser().get_doctest(ETraceConfig.__doc__, {}, "ETraceConfig", None, 0))
    assert runner.tries and not runner.failures
    assert braintrace.ETraceConfig is ETraceConfig
