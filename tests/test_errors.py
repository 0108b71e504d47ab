"""What is refused, by which exception, and what its message must name."""

import types

import brainstate
import jax
import jax.numpy as jnp
import pytest
from brainstate import HiddenState, ParamState
from brainstate.transform import grad

import braintrace
from braintrace import MultiStepData, compile, matmul, pp_prop

pytestmark = [pytest.mark.usefixtures("time_step"), pytest.mark.filterwarnings("ignore:.*(relation_|never reads)")]

X = jnp.ones(2)
XS = jnp.ones((6, 2))


class Model(brainstate.nn.Module):
    """`step(m, *args)` with a parameter `w` and a hidden state `h`."""

    def __init__(self, step, h=jnp.zeros(3), **states):
        super().__init__()
        self._step = step
        self.w, self.h = ParamState(jnp.ones((2, 3))), HiddenState(h)
        for name, state in states.items():
            setattr(self, name, state)

    def update(self, *args):
        return self._step(self, *args)


def leaky(m, x):
    m.h.value = 0.5 * m.h.value + matmul(x, m.w.value)
    return m.h.value


def two_inputs(m, a, b):
    return leaky(m, a * b)


def stateless(m, x):
    return matmul(x, m.w.value)


def writes_parameter(m, x):
    m.w.value = 2 * m.w.value
    return leaky(m, x)


def learner_of(step=leaky, *args, h=jnp.zeros(3), decay=0.9, **options):
    learner = pp_prop(Model(step, h=h), decay, **options)
    learner.compile_graph(*(args or (X,)))
    return learner


def cell():
    return braintrace.nn.GRUCell(2, 3)


def raw():
    return pp_prop(Model(leaky), 0.9)


def gradient(learner, *args):
    return grad(lambda: learner(*args).sum(), learner.param_states)()


def assign_decay():
    raw().decay = 0.5


def compile_mapped(x, **options):
    return compile(cell(), "pp_prop", x, decay_or_rank=0.9, vmap=True, **options)


NotSupported, NoRelation = braintrace.NotSupportedError, braintrace.CompilationError

ROWS = [  # what is called, the exception, what the message names
    # compile
    (lambda: compile(cell(), "rtrl", X), ValueError, "'rtrl'.*pp_prop"),
    (lambda: compile(cell(), 3, X), TypeError, "int"),
    (lambda: compile(cell(), None, X), TypeError, "NoneType"),
    (lambda: compile(cell(), pp_prop(cell(), 0.9), X), TypeError, "pp_prop"),
    (lambda: compile(cell(), dict, X), TypeError, "dict"),
    (lambda: compile(lambda x: x, "pp_prop", X, decay_or_rank=0.9), TypeError, "function"),
    (lambda: compile(cell(), "pp_prop", decay_or_rank=0.9), ValueError, "example input"),
    (lambda: compile(cell(), "pp_prop", X, decay_or_rank=0.9, verbose=3), ValueError, "verbose.*3"),
    (lambda: compile(cell(), "pp_prop", X, decay_or_rank=0.9, verbose=True), ValueError, "verbose.*True"),
    (lambda: compile(cell(), "pp_prop", X), TypeError, "decay_or_rank"),
    (lambda: compile(cell(), "pp_prop", X, decay_or_rank=0.9, colour=1), TypeError, "colour"),
    (lambda: compile(Model(stateless), "pp_prop", X, decay_or_rank=0.9), NoRelation, "online.*braintrace.matmul"),
    (lambda: compile(cell(), config(), X, config=config()), TypeError, "config"),
    (lambda: compile_mapped(jnp.ones((3, 2))), ValueError, "batch_size"),
    (lambda: compile_mapped(jnp.ones((3, 2)), batch_size=4), ValueError, r"\(3, 2\).*4|4.*\(3, 2\)"),
    (lambda: compile_mapped(1.0, batch_size=4), ValueError, r"\(\)|scalar"),
    # construction
    (lambda: pp_prop(lambda x: x, 0.9), TypeError, "function"),
    (lambda: pp_prop(types.SimpleNamespace(), 0.9), TypeError, "SimpleNamespace"),
    (lambda: pp_prop(cell(), 0.9, vjp_method="both"), ValueError, "'both'"),
    (lambda: pp_prop(cell(), 0.9, modus=1), TypeError, "modus"),
    (lambda: pp_prop(cell()), TypeError, "decay_or_rank"),
    (lambda: pp_prop(cell(), 1.0), ValueError, r"1\.0"),
    (lambda: pp_prop(cell(), -0.5), ValueError, r"-0\.5"),
    (lambda: pp_prop(cell(), 0), ValueError, "rank.* 0"),
    (lambda: pp_prop(cell(), True), TypeError, "bool"),
    (lambda: pp_prop(cell(), "0.9"), ValueError, "str"),
    (lambda: pp_prop(cell(), (0.9, 0.9, 0.9)), ValueError, "pair.*3"),
    (lambda: pp_prop(cell(), (0.9, 2.0)), ValueError, r"2\.0"),
    (lambda: pp_prop(cell(), 0.9, config="jacobian"), TypeError, "ETraceConfig"),
    (
        lambda: pp_prop(cell(), config=config(trace_factorization="per_param")),
        ValueError,
        "io_factorized.*per_param|per_param.*io_factorized",
    ),
    (lambda: pp_prop(cell(), 0.5, config=config(decay=0.9)), ValueError, r"0\.5.*0\.9"),
    (
        lambda: pp_prop(cell(), config=config(learning_signal="random_feedback", decay=0.9)),
        ValueError,
        "random_feedback_key",
    ),
    (
        lambda: pp_prop(cell(), config=config(learning_signal="modulatory", decay=0.9), vjp_method="multi-step"),
        ValueError,
        "single-step",
    ),
    (
        lambda: pp_prop(cell(), config=config(learning_signal="bootstrapped", decay=0.9)),
        NotImplementedError,
        "bootstrapped",
    ),
    (lambda: pp_prop(cell(), (0.9, 0.5)).decay, AttributeError, "decay_x.*decay_f"),
    (assign_decay, AttributeError, "decay"),
    (lambda: braintrace.ETraceGraphExecutor(3), TypeError, "int"),
    (lambda: braintrace.ETraceAlgorithm(cell(), "executor"), TypeError, "str"),
    # before compilation
    (lambda: raw()(X), ValueError, "compile_graph"),
    (lambda: raw().get_etrace_of(("w",)), ValueError, "compile_graph"),
    (lambda: raw().graph, ValueError, "compile_graph"),
    (lambda: raw().executor.graph, ValueError, "compile_graph"),
    (lambda: raw().param_states, ValueError, "compile_graph"),
    (lambda: raw().hidden_states, ValueError, "compile_graph"),
    (lambda: raw().other_states, ValueError, "compile_graph"),
    (lambda: raw().show_graph(), ValueError, "compile_graph"),
    (lambda: raw().report, RuntimeError, "compile_graph"),
    (lambda: raw().etrace_grad(XS, step_fn=jnp.sum), ValueError, "compile_graph"),
    (lambda: raw().etrace_evolve(XS), ValueError, "compile_graph"),
    # at compilation
    (lambda: learner_of(writes_parameter), NotSupported, "'w'"),
    (lambda: learner_of(h=jnp.zeros((4, 3))), ValueError, r"etp_mv.*'w'.*\(3,\).*h.*\(4, 3\)"),
    (lambda: learner_of(h=jnp.zeros((1, 3))), ValueError, r"\(3,\).*\(1, 3\)"),
    (lambda: braintrace.compile_etrace_graph(leaky, X), AssertionError, "function"),
    (lambda: braintrace.extract_module_info(3, X), AssertionError, "int"),
    # calls
    (lambda: learner_of()(X, speed=2), TypeError, "speed"),
    (lambda: learner_of()(X, modulator=1.0), TypeError, "modulator"),
    (lambda: learner_of()(), ValueError, "structure"),
    (lambda: learner_of()(X, X), ValueError, "structure"),
    (lambda: learner_of()({"x": X}), ValueError, "structure"),
    (lambda: learner_of()(jnp.ones(3)), ValueError, r"\(3,\).*\(2,\)"),
    (lambda: learner_of()(MultiStepData(jnp.ones((6, 3)))), ValueError, r"\(6, 3\).*\(2,\)"),
    (lambda: learner_of(leaky, jnp.ones(2, int))(X), TypeError, "float32.*int32"),
    (lambda: learner_of()(MultiStepData(jnp.asarray(1.0))), ValueError, "scalar"),
    (
        lambda: learner_of(two_inputs, X, X)(MultiStepData(XS), MultiStepData(XS[:4])),
        ValueError,
        r"lengths.*4, 6",
    ),
    (lambda: gradient(learner_of(), MultiStepData(XS)), NotImplementedError, "multi-step"),
    # traces
    (lambda: learner_of().get_etrace_of(("v", "weight")), ValueError, "'v.weight'.*w"),
    (lambda: learner_of().get_etrace_of(("h",)), ValueError, "'h'"),
    (lambda: learner_of().get_etrace_of(ParamState(X)), ValueError, "ParamState"),
    (lambda: learner_of().get_etrace_of(3), (TypeError, ValueError), "int|3"),
    # graph
    (lambda: learner_of().graph.explain(kind="nothing"), ValueError, "nothing"),
]


def config(trace_factorization="io_factorized", decay=None, **axes):
    if trace_factorization == "io_factorized" and decay is None:
        decay = 0.9
    return braintrace.ETraceConfig(trace_factorization, decay=decay, **axes)


@pytest.mark.parametrize("call, error, message", ROWS, ids=[str(i) for i in range(len(ROWS))])
def test_refused(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("error", [braintrace.NotSupportedError, braintrace.CompilationError])
def test_exception_classes(error):
    assert error.__bases__ == (Exception,)


def test_states_that_changed_after_compilation_are_named():
    learner = learner_of()
    learner.model4compile.h.value = jnp.zeros(3)
    learner(X)
    with pytest.raises(ValueError, match="h.*"):
        learner.model4compile.h._value = jnp.zeros((2, 3))
        learner(X)


def test_uninitialised_states_are_an_error():
    with pytest.raises(Exception, match="h|init"):
        pp_prop(cell(), 0.9).compile_graph(X)


def test_a_failed_compilation_leaves_the_learner_uncompiled():
    learner = pp_prop(Model(leaky, h=jnp.zeros((4, 3))), 0.9)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\(4, 3\)"):
            learner.compile_graph(X)
        assert not learner.is_compiled
    learner.compile_graph(jnp.ones((4, 2)))
    assert learner(jnp.ones((4, 2))).shape == (4, 3)


def test_a_failed_call_changes_nothing():
    learner = learner_of()
    learner(X)
    before = jax.tree.map(lambda s: s.value, dict(learner.states()), is_leaf=lambda s: isinstance(s, brainstate.State))
    with pytest.raises(ValueError):
        learner(jnp.ones(3))
    after = jax.tree.map(lambda s: s.value, dict(learner.states()), is_leaf=lambda s: isinstance(s, brainstate.State))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, after))
