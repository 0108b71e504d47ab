"""What is refused, by which exception, and what its message must name."""

import functools
import os
import subprocess
import sys
import types

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate import HiddenState, ParamState
from brainstate.transform import for_loop, grad, jit

import braintrace
from braintrace import D_RTRL, EProp, MultiStepData, OSTLFeedforward, SingleStepData, compile, matmul, pp_prop
from braintrace._legacy import operations as OLD

pytestmark = [
    pytest.mark.usefixtures("time_step"),
    pytest.mark.filterwarnings("ignore:.*(relation_|snap_|never reads)"),
]

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


returns_two = braintrace.register_primitive("returns_two", lambda x, w: (x @ w, x @ w))


def two_outputs(m, x):
    m.h.value, _ = returns_two.bind(x, m.w.value)
    return m.h.value


def stateless(m, x):
    return matmul(x, m.w.value)


def writes_parameter(m, x):
    m.w.value = 2 * m.w.value
    return leaky(m, x)


def changes_unit(m, x):
    m.h.value = u.get_mantissa(m.h.value) * u.mV
    return leaky(m, x)


def changes_structure(m, x):
    m.h.value = {"h": leaky(m, x)}
    return x


def draws(m, x):
    m.k.value = jax.random.split(m.k.value)[0]
    return leaky(m, x)


def compiles_within(m, x):
    raw().compile_graph(x)
    return leaky(m, x)


def snap_of_another_batch():
    model = cell()
    learner = compile(model, braintrace.SnAp, XS, batch_size=6)
    brainstate.nn.init_all_states(model, batch_size=5)
    return learner


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


def delays(m, x):
    m.h.value = jnp.concatenate([matmul(x, m.w.value)[None], m.h.value[:-1]])
    return m.h.value[-1]


def repeats(m, x):
    m.h.value = 0.5 * m.h.value + jnp.tile(matmul(x, m.w.value), 2)
    return m.h.value


def with_readout():
    """`out` is read behind the state, `never` nowhere."""
    model = Model(lambda m, x: leaky(m, x) @ m.out.value, out=ParamState(jnp.ones((3, 3))), never=ParamState(X))
    learner = pp_prop(model, 0.9)
    learner.compile_graph(X)
    return learner


def remembers(m, x):
    m.s.value = 0.5 * m.s.value + matmul(x, m.w.value)


def unmapped():
    learner = learner_of()
    return braintrace.ETraceVmap(learner)(XS)


def driven_by(step, *more, weights=None, evolve=False):
    """A driver with `step` of the learner, another one of the same model and a slice."""
    learner = learner_of()
    other = pp_prop(learner.model4compile, 0.9)
    other.compile_graph(X)
    drive = learner.etrace_evolve if evolve else functools.partial(learner.etrace_grad, weights=weights)
    return drive(XS, *more, step_fn=lambda x, *_: step(learner, other, x))


def batched(step_fn=None, sequence=jnp.ones((4, 6, 2)), vmap=False):
    learner = compile(cell(), "pp_prop", jnp.ones((4, 2)), batch_size=4, vmap=vmap, decay_or_rank=0.9)
    if step_fn is None:
        return learner.etrace_evolve(sequence)
    return learner.etrace_grad(sequence, step_fn=lambda x: step_fn(learner, x))


def in_plain_jax(transformed):
    return lambda learner, other, x: transformed(lambda x: learner(x).sum(), x)


def assign_decay():
    raw().decay = 0.5


def compile_mapped(x, **options):
    return compile(cell(), "pp_prop", x, decay_or_rank=0.9, vmap=True, **options)


def drive(sequence=XS, step_fn=None, *more, evolve=False, vjp_method="single-step", **options):
    """A driver of a compiled learner; `step_fn` takes the learner before the slice."""
    learner = learner_of(vjp_method=vjp_method)
    step_fn = step_fn or (lambda learner, x, *_: learner(x).sum())
    method = learner.etrace_evolve if evolve else learner.etrace_grad
    return method(*(() if sequence is None else (sequence,)), *more, step_fn=lambda *x: step_fn(learner, *x), **options)


def windows(losses=lambda out: out.sum(-1), **options):
    return drive(XS, lambda learner, x: losses(learner(MultiStepData(x))), **options)


def conditionally(f, x):
    return jax.lax.cond(x.sum() > 0, f, lambda x: 0.0, x)


SHORT = brainstate.ShortTermState(jnp.zeros(3))
NotSupported, NoRelation = braintrace.NotSupportedError, braintrace.CompilationError
DECAYS = [  # decay_or_rank
    (1.0, ValueError, r"1\.0"),
    (-0.5, ValueError, r"-0\.5"),
    (float("nan"), ValueError, "nan"),
    (0, ValueError, "rank.* 0"),
    (-1, ValueError, "rank.* -1"),
    (True, TypeError, "bool"),
    (np.True_, TypeError, "bool"),
    (None, TypeError, "decay_or_rank"),
    ("0.9", ValueError, "str"),
    ((0.9,), ValueError, "pair.*1"),
    ((0.9, 0.9, 0.9), ValueError, "pair.*3"),
    ([0.9, 0.9, 0.9], ValueError, "pair.*3"),
    ((0.9, 2.0), ValueError, r"2\.0"),
]
OF_PP_PROP = [
    *((lambda value=value: pp_prop(cell(), value), error, message) for value, error, message in DECAYS),
    (lambda: pp_prop(cell(), 0.9, vjp_method="both"), ValueError, "'both'"),
]

ROWS = [  # what is called, the exception, what the message names
    # compile
    (lambda: compile(cell(), "rtrl", X), ValueError, "'rtrl'.*pp_prop"),
    (lambda: compile(cell(), 3, X), TypeError, "int"),
    (lambda: compile(cell(), None, X), TypeError, "NoneType"),
    (lambda: compile(cell(), pp_prop(cell(), 0.9), X), TypeError, "pp_prop"),
    (lambda: compile(cell(), dict, X), TypeError, "dict"),
    (lambda: compile(cell(), braintrace.ETraceAlgorithm, X), TypeError, "ETraceAlgorithm.*abstract"),
    (lambda: compile(cell(), braintrace.ETraceVjpAlgorithm, X), TypeError, "ETraceVjpAlgorithm.*abstract"),
    (lambda: compile(cell(), "d_rtrl", X, decay_or_rank=0.9), TypeError, "decay_or_rank"),
    (lambda: compile(cell(), "eprop", X, feedback="mean"), ValueError, "feedback.*'mean'"),
    (lambda: compile(lambda x: x, "pp_prop", X, decay_or_rank=0.9), TypeError, "function"),
    (lambda: compile(cell(), "pp_prop", decay_or_rank=0.9), ValueError, "example input"),
    (lambda: compile(cell(), "pp_prop", X, decay_or_rank=0.9, verbose=3), ValueError, "verbose.*3"),
    (lambda: compile(cell(), "pp_prop", X, decay_or_rank=0.9, verbose=True), ValueError, "verbose.*True"),
    (lambda: compile(cell(), "pp_prop", X), TypeError, "decay_or_rank"),
    (lambda: compile(cell(), "pp_prop", X, decay_or_rank=0.9, colour=1), TypeError, "colour"),
    (lambda: compile(Model(two_outputs), "d_rtrl", X), TypeError, "'returns_two' returns a tuple.*y_outvar_index"),
    (lambda: compile(Model(stateless), "pp_prop", X, decay_or_rank=0.9), NoRelation, "online.*braintrace.matmul"),
    (lambda: compile(Model(remembers, s=SHORT), "pp_prop", X, decay_or_rank=0.9), NoRelation, "'s'.*HiddenState"),
    (lambda: compile(cell(), "pp_prop", X, decay=0.9), TypeError, "decay. Did you mean decay_or_rank"),
    (lambda: compile(cell(), "d_rtrl", X, trace_dtyp=None), TypeError, "Did you mean trace_dtype .*D_RTRL takes name"),
    (lambda: compile(cell(), "pp_prop", XS, 6, decay_or_rank=0.9), TypeError, "GRUCell.*2 example.*batch_size=6"),
    (lambda: compile(Model(leaky), "pp_prop", decay_or_rank=0.9, *(X, X)), TypeError, "positional"),
    (lambda: compile(cell(), "pp_prop", XS, batch_size=4, decay_or_rank=0.9), ValueError, r"batch_size=4.*\(6, 2\)"),
    (lambda: compile(cell(), config(), X, config=config()), TypeError, "config"),
    (lambda: compile_mapped(jnp.ones((3, 2))), ValueError, "batch_size"),
    (lambda: compile_mapped(jnp.ones((3, 2)), batch_size=4), ValueError, r"\(3, 2\).*4|4.*\(3, 2\)"),
    (lambda: compile_mapped(1.0, batch_size=4), ValueError, r"\(\)|scalar"),
    # construction
    (lambda: pp_prop(lambda x: x, 0.9), TypeError, "function"),
    (lambda: pp_prop(types.SimpleNamespace(), 0.9), TypeError, "SimpleNamespace"),
    (lambda: D_RTRL(cell(), vjp_method="both"), ValueError, "'both'"),
    (lambda: EProp(cell(), vjp_method="both"), ValueError, "'both'"),
    (lambda: OSTLFeedforward(cell(), vjp_method="both"), ValueError, "'both'"),
    (lambda: braintrace.ETraceVjpGraphExecutor(cell(), "both"), ValueError, "'both'"),
    (lambda: D_RTRL(3), TypeError, "int"),
    (lambda: EProp(None), TypeError, "NoneType"),
    (lambda: D_RTRL(cell(), 0.9, modus=1), TypeError, "modus"),
    (lambda: D_RTRL(cell(), trace_dtype=int), ValueError, "trace_dtype.*int"),
    (lambda: D_RTRL(cell(), trace_dtype="complex64"), ValueError, "trace_dtype.*complex64"),
    (lambda: D_RTRL(cell(), trace_dtype="float"[:3]), ValueError, "trace_dtype.*'flo'"),
    (lambda: compile(learner_of(), "d_rtrl", X), TypeError, "learner already"),
    (lambda: D_RTRL(cell(), config=config()), ValueError, "io_factorized.*per_param"),
    (lambda: D_RTRL(cell(), config=3), TypeError, "ETraceConfig.*int"),
    (lambda: EProp(cell(), feedback="mean"), ValueError, "feedback.*'mean'"),
    (lambda: EProp(cell(), feedback="random"), ValueError, "random_feedback_key"),
    (lambda: EProp(cell(), feedback="random", random_feedback_key="a"), TypeError, "random_feedback_key.*'a'"),
    (lambda: braintrace.FixedRandomFeedback(2, 3, 0.5), TypeError, "key.*0.5"),
    (lambda: EProp(cell(), kappa_filter_decay=float("nan")), ValueError, "kappa.*nan"),
    (lambda: D_RTRL(cell(), 0.9), TypeError, "name of a D_RTRL.*0.9.*decay_or_rank"),
    (lambda: EProp(cell(), kappa_filter_decay=1.5), ValueError, r"kappa 1\.5"),
    (lambda: EProp(cell(), kappa_filter_decay="a"), TypeError, "kappa_filter_decay.*str"),
    (lambda: EProp(cell(), config=config()), TypeError, "config"),
    (lambda: OSTLFeedforward(cell(), 2.0), ValueError, r"2\.0"),
    (lambda: pp_prop(cell(), 0.9, control_flow="unroll"), TypeError, "ControlFlowPolicy.*str"),
    (lambda: braintrace.ControlFlowPolicy(cond="x"), ValueError, "cond.*'x'"),
    (lambda: pp_prop(cell(), 0.9, modus=1), TypeError, "modus"),
    (lambda: pp_prop(cell()), TypeError, "decay_or_rank"),
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
        "bootstrapped.*DNI",
    ),
    (lambda: pp_prop(cell(), (0.9, 0.5)).decay, AttributeError, "decay_x.*decay_f"),
    (assign_decay, AttributeError, "decay"),
    (lambda: braintrace.ETraceGraphExecutor(3), TypeError, "int"),
    (lambda: braintrace.ETraceAlgorithm(cell(), "executor"), TypeError, "str"),
    # before compilation
    (lambda: raw()(X), ValueError, "compile_graph"),
    (
        lambda: pp_prop(cell(), 0.9).compile_graph(X),
        AttributeError,
        "GRUCell.*'h'.*init_all_states.*braintrace.compile",
    ),
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
    (lambda: learner_of(stateless), NoRelation, "Model.*online.*braintrace.matmul"),
    (lambda: learner_of(writes_parameter), NotSupported, "'w'"),
    (lambda: learner_of(h=jnp.zeros((4, 3))), ValueError, r"etp_mv.*'w'.*\(3,\).*h.*\(4, 3\)"),
    (lambda: learner_of(h=jnp.zeros((2, 3))), ValueError, r"\(3,\).*\(2, 3\)"),
    (lambda: learner_of(repeats, h=jnp.zeros(6)), NoRelation, "Nothing in Model"),
    (lambda: learner_of(delays, h=jnp.zeros((4, 3))), ValueError, "delay what the operation receives.*ShortTermState"),
    (lambda: braintrace.compile_etrace_graph(leaky, X), AssertionError, "function"),
    (lambda: braintrace.extract_module_info(3, X), AssertionError, "int"),
    (lambda: braintrace.find_hidden_groups_from_module(3, X), AssertionError, "int"),
    (lambda: braintrace.find_hidden_param_op_relations_from_module(3, X), AssertionError, "int"),
    (lambda: braintrace.add_hidden_perturbation_in_module(3, X), AssertionError, "int"),
    (lambda: learner_of(changes_unit, h=jnp.zeros(3) * u.mA), ValueError, "'h'.*from mA to mV"),
    (lambda: learner_of(changes_unit), ValueError, "'h'.*from 1 to mV"),
    (lambda: learner_of(changes_structure), ValueError, "'h'.*structure"),
    (lambda: learner_of(compiles_within), NotImplementedError, "before, not within"),
    # calls
    (lambda: learner_of()(X, speed=2), TypeError, "speed"),
    (lambda: learner_of()(X, modulator=1.0), TypeError, "modulator"),
    (lambda: learner_of()(), ValueError, "structure"),
    (lambda: learner_of()(X, X), ValueError, "structure"),
    (lambda: learner_of()({"x": X}), ValueError, "structure"),
    (lambda: learner_of()(jnp.ones(3)), ValueError, r"\(3,\).*\(2,\)"),
    (lambda: learner_of()(MultiStepData(jnp.ones((6, 3)))), ValueError, r"\(6, 3\).*\(2,\)"),
    (lambda: compile(Model(draws, k=HiddenState(jax.random.key(0))), "d_rtrl", X), TypeError, "'k'.*ShortTermState"),
    (lambda: learner_of(leaky)(X * 1j), ValueError, "complex64.*float32.*'h' changes its dtype"),
    (lambda: learner_of()(MultiStepData(jnp.asarray(1.0))), ValueError, "scalar"),
    (lambda: learner_of()(MultiStepData(XS[:0])), ValueError, "length 0"),
    (lambda: snap_of_another_batch()(jnp.ones((5, 2))), ValueError, r"reset_state\(batch_size"),
    (
        lambda: learner_of(two_inputs, X, X)(MultiStepData(XS), MultiStepData(XS[:4])),
        ValueError,
        r"lengths.*4, 6",
    ),
    (lambda: gradient(learner_of(), MultiStepData(XS)), NotImplementedError, "multi-step"),
    # traces
    (lambda: learner_of().get_etrace_of(("v", "weight")), ValueError, "'v.weight'.*w"),
    (lambda: learner_of().get_etrace_of(("h",)), ValueError, "'h'"),
    (lambda: with_readout().get_etrace_of(("out",)), ValueError, "'out'"),
    (lambda: with_readout().get_etrace_of(("never",)), ValueError, "'never'"),
    (lambda: learner_of().get_etrace_of(ParamState(X)), ValueError, "ParamState"),
    (lambda: learner_of().get_etrace_of(3), TypeError, "ParamState.*int"),
    # drivers, with a gradient and without
    (lambda: drive(None), ValueError, "at least one sequence"),
    (lambda: drive(None, evolve=True), ValueError, "at least one sequence"),
    (lambda: drive({}), ValueError, "Sequence 0.*empty"),
    (lambda: drive(XS, None, 1.0), ValueError, "Sequence 1.*scalar"),
    (lambda: drive(XS, None, XS[:4]), ValueError, r"different lengths.*\(6, 2\).*\(4, 2\)"),
    (lambda: drive(XS, None, XS[:4], evolve=True), ValueError, r"different lengths.*\(6, 2\).*\(4, 2\)"),
    (lambda: drive(XS[:0]), ValueError, "length 0"),
    (lambda: drive(MultiStepData(XS)), TypeError, "MultiStepData"),
    (lambda: drive({"x": SingleStepData(XS)}, evolve=True), TypeError, "SingleStepData"),
    (lambda: drive(chunk_size=0), ValueError, "chunk_size.*0"),
    (lambda: drive(chunk_size=True), TypeError, "chunk_size.*bool"),
    (lambda: drive(chunk_size=np.int64(2)), TypeError, "chunk_size.*int64"),
    (lambda: drive(chunk_size=4), ValueError, "6.*chunk_size=4"),
    (lambda: drive(chunk_size=4, evolve=True), ValueError, "6.*chunk_size=4"),
    (lambda: drive(chunk_size=2), ValueError, "vjp_method='multi-step'"),
    (lambda: windows(lambda out: out.sum(), vjp_method="multi-step", chunk_size=2), ValueError, r"\(2,\).*\(\)"),
    (lambda: windows(lambda out: out, vjp_method="multi-step", chunk_size=2), ValueError, r"\(2,\).*\(2, 3\)"),
    (lambda: drive(XS, lambda learner, x: learner(x)), ValueError, r"loss of shape \(\).*\(3,\)"),
    (lambda: drive(XS, lambda learner, x: learner(x).sum() * u.mV), TypeError, "unit mV"),
    (lambda: drive(XS, lambda learner, x: (learner(x).sum(), 1)), TypeError, "has_aux=True"),
    (lambda: drive(XS, lambda learner, x: learner(x).sum(), has_aux=True), TypeError, r"\(loss, aux\)"),
    (lambda: drive(XS, lambda learner, x: None), TypeError, "NoneType"),
    (lambda: drive(mask=jnp.ones(5)), ValueError, r"mask.*\(6,\).*\(5,\)"),
    (lambda: drive(reduction="max"), ValueError, "reduction.*'max'"),
    (lambda: drive(loss_output="all"), ValueError, "loss_output.*'all'"),
    (lambda: drive(trace_chunk=0), ValueError, "trace_chunk.*0"),
    (lambda: drive(trace_chunk=2.0), TypeError, "trace_chunk.*float"),
    (lambda: learner_of().etrace_grad(XS), TypeError, "step_fn"),
    (lambda: learner_of().etrace_grad(XS, step_fn=3), TypeError, "step_fn.*3"),
    (lambda: learner_of().etrace_evolve(XS, step_fn=3), TypeError, "step_fn.*3"),
    (lambda: braintrace.ETraceVmap(raw()).etrace_grad(XS, step_fn=jnp.sum), ValueError, "compile_graph"),
    (lambda: drive(weights=cell()), TypeError, "weights.*GRUCell.*param_states"),
    (lambda: drive(weights=[ParamState(X)]), TypeError, "weights.*list.*param_states"),
    (lambda: drive(weights={}), ValueError, "weights is empty.*param_states"),
    (lambda: drive(weights={"w": X}), TypeError, "weights.*'w'.*ArrayImpl.*param_states"),
    (lambda: drive(weights=learner_of().states()), TypeError, "running_index.*int32.*param_states"),
    (lambda: drive(mask=1j * jnp.ones(6)), TypeError, "mask.*complex64"),
    (lambda: drive(XS, lambda learner, x: (learner(x) > 0).sum()), TypeError, "loss.*int32.*differentiable"),
    (lambda: drive(XS, lambda learner, x: learner(x).sum() * 1j), TypeError, "loss.*complex64"),
    (lambda: learner_of().etrace_grad(XS, step_fn=lambda x, y: x), TypeError, r"1 here.*\(x, y\).*sequences"),
    (lambda: learner_of().etrace_evolve(XS, XS, step_fn=lambda x: x), TypeError, r"2 here.*\(x\).*sequences"),
    (lambda: driven_by(lambda a, b, x: a.model4compile(x).sum()), ValueError, "did not call the learner"),
    (lambda: driven_by(lambda a, b, x: b(x).sum()), ValueError, "did not call the learner"),
    (lambda: driven_by(lambda a, b, x: learner_of()(x).sum()), ValueError, "did not call the learner"),
    (lambda: driven_by(in_plain_jax(conditionally)), TypeError, "jax.lax.cond.*brainstate.transform"),
    (lambda: driven_by(in_plain_jax(conditionally), evolve=True), TypeError, "jax.lax.cond.*brainstate.transform"),
    (lambda: driven_by(in_plain_jax(lambda f, x: jax.jit(f)(x))), TypeError, "jax.jit.*brainstate.transform"),
    (lambda: driven_by(in_plain_jax(lambda f, x: jax.grad(f)(x).sum())), TypeError, "jax.grad.*brainstate.transform"),
    (batched, ValueError, r"time.*\(4, 6, 2\).*4 is the batch.*swapaxes"),
    (lambda: batched(lambda f, x: f(x).sum()), ValueError, r"time.*\(4, 6, 2\).*4 is the batch.*swapaxes"),
    (lambda: batched(lambda f, x: f(x).sum(), vmap=True), ValueError, r"\(4, 6, 2\).*4 is the batch.*swapaxes"),
    (lambda: batched(lambda f, x: x.sum(), jnp.ones((6, 4, 2)), vmap=True), ValueError, "did not call the learner"),
    (unmapped, brainstate.BatchAxisError, r"vmap_new_states.*vmap=True"),
    # what older versions had
    (lambda: braintrace.nn.Linear(2, 3, param_type=OLD.ETraceParam), TypeError, "param_type=ETraceParam.*gone.*out"),
    (lambda: braintrace.nn.Embedding(2, 3, param_type=OLD.NonTempParam), TypeError, "param_type=NonTempParam.*gone"),
    (lambda: braintrace.ETraceState, AttributeError, "0.1.*brainstate.HiddenState"),
    (lambda: braintrace.stop_param_gradients, AttributeError, "0.1.*stop_gradient"),
    # graph
    (lambda: learner_of().graph.explain(kind="nothing"), ValueError, "nothing"),
    *OF_PP_PROP,
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
    assert error.__bases__ == (Exception,) and error.__module__ == "braintrace"


def test_states_that_changed_after_compilation_are_named():
    learner = learner_of()
    learner.model4compile.h.value = jnp.zeros(3)
    learner(X)
    with pytest.raises(ValueError, match="h.*"):
        learner.model4compile.h._value = jnp.zeros((2, 3))
        learner(X)


def test_a_missing_attribute_that_is_no_state_is_not_explained():
    model = Model(lambda m, x: m.missing)
    with pytest.raises(AttributeError) as caught:
        pp_prop(model, 0.9).compile_graph(X)
    assert "init_all_states" not in str(caught.value)


def test_the_cause_in_a_container_of_modules_is_told():
    def net():
        return brainstate.nn.Sequential(cell(), braintrace.nn.Linear(3, 2))

    learner = compile(net(), "pp_prop", XS, batch_size=6, decay_or_rank=0.9)
    for other, cause in [(jnp.ones((6, 5)), "TypeError: dot_general.*Pass"), (jnp.ones((4, 2)), "Cannot concatenate")]:
        with pytest.raises(ValueError, match=cause):
            learner(other)
    with pytest.raises(ValueError, match="batch_size=4.*Cannot concatenate"):
        compile(net(), "pp_prop", XS, batch_size=4, decay_or_rank=0.9)
    with pytest.raises(Exception) as raised:
        compile(net(), "pp_prop", XS, decay_or_rank=0.9)
    assert any("pass batch_size=6" in note for note in raised.value.__notes__)


def test_a_failed_compilation_leaves_the_learner_uncompiled():
    learner = pp_prop(Model(leaky, h=jnp.zeros((4, 3))), 0.9)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\(4, 3\)"):
            learner.compile_graph(X)
        assert not learner.is_compiled
    learner.compile_graph(jnp.ones((4, 2)))
    assert learner(jnp.ones((4, 2))).shape == (4, 3)


# -- whatever fails, nothing has happened


class Stop(Exception):
    pass


BATCH, BATCHES = jnp.ones((4, 2)), jnp.ones((6, 4, 2))


def stops(learner):
    """A step that has called the learner when it fails."""

    def step(x):
        learner(x)
        raise Stop

    return step


def differentiated(learner, step):
    return grad(step, learner._per_sample.param_states)()


FAILING = {
    "shape": lambda f: f(jnp.ones((4, 3))),
    "batch size": lambda f: f(jnp.ones((5, 2))),
    "dtype": lambda f: f(BATCH * 1j),
    "structure": lambda f: f({"x": BATCH}),
    "modulator": lambda f: f(BATCH, modulator=1.0),
    "gradient of a wrong shape": lambda f: differentiated(f, lambda: f(jnp.ones((4, 3))).sum()),
    "gradient": lambda f: differentiated(f, lambda: stops(f)(BATCH)),
    "gradient of a window": lambda f: differentiated(f, lambda: f(MultiStepData(BATCHES)).sum()),
    "jit": lambda f: jit(stops(f))(BATCH),
    "loop": lambda f: for_loop(stops(f), BATCHES),
    "etrace_grad": lambda f: f.etrace_grad(BATCHES, step_fn=stops(f)),
    "etrace_grad in chunks": lambda f: f.etrace_grad(BATCHES, step_fn=stops(f), trace_chunk=2),
    "etrace_grad, no scalar": lambda f: f.etrace_grad(BATCHES, step_fn=f),
    "etrace_grad, no learner": lambda f: f.etrace_grad(BATCHES, step_fn=jnp.sum),
    "etrace_grad, windows": lambda f: f.etrace_grad(
        BATCHES, step_fn=lambda x: f(MultiStepData(x)).sum((1, 2)), chunk_size=2
    ),
    "etrace_grad, cond of JAX": lambda f: f.etrace_grad(
        BATCHES, step_fn=lambda x: conditionally(lambda x: f(x).sum(), x)
    ),
    "etrace_grad, another loss": lambda f: f.etrace_grad(BATCHES, step_fn=lambda x: (f(x) > 0).sum()),
    "etrace_grad, swapped": lambda f: f.etrace_grad(jnp.swapaxes(BATCHES, 0, 1), step_fn=lambda x: f(x).sum()),
    "etrace_grad, no weights": lambda f: f.etrace_grad(BATCHES, step_fn=lambda x: f(x).sum(), weights={}),
    "etrace_evolve": lambda f: f.etrace_evolve(BATCHES, step_fn=stops(f)),
    "etrace_evolve, shape": lambda f: f.etrace_evolve(BATCHES[..., :1]),
}
RULES = {"pp_prop": dict(decay_or_rank=0.9), "d_rtrl": {}, "eprop": dict(kappa_filter_decay=0.5)}


def values(learner):
    return {path: jax.tree.map(np.asarray, state.value) for path, state in learner.states().items()}


@pytest.mark.parametrize("rule, vmap", [("pp_prop", False), ("pp_prop", True), ("d_rtrl", False), ("eprop", True)])
def test_a_failed_call_changes_nothing(rule, vmap):
    learner = compile(braintrace.nn.LSTMCell(2, 3), rule, BATCH, batch_size=4, vmap=vmap, **RULES[rule])
    learner(BATCH)
    before = values(learner)
    for name, fails in FAILING.items():
        with pytest.raises((Stop, TypeError, ValueError, NotImplementedError)):
            fails(learner)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, name), values(learner), before)
        assert learner._per_sample._recorder is None
    learner(BATCH)
    assert learner._per_sample.running_index.value.max() == 2


@pytest.mark.parametrize("rule", ["pp_prop", "d_rtrl"])
def test_a_refused_call_leaves_the_step_that_was_compiled(rule):
    """A batch whose axis is missing compiles, and does not fit the states."""
    learner = compile(Model(leaky, jnp.zeros((2, 3))), rule, jnp.ones((2, 2)), **RULES[rule])
    known = str(learner.report)
    with pytest.raises(ValueError, match="shape"):
        learner(X)
    assert str(learner.report) == known
    learner.reset_state()
    learner.etrace_evolve(jnp.ones((3, 2, 2)))
    with pytest.raises(ValueError, match=r"\(3, 2\).*compiled for \(2, 2\)"):
        learner(jnp.ones((3, 2)))


@pytest.mark.parametrize("step", [changes_unit, changes_structure, writes_parameter, compiles_within])
def test_a_failed_compilation_leaves_the_states(step):
    model = Model(step)
    before = {path: state.value for path, state in model.states().items()}
    with pytest.raises((ValueError, NotSupported, NotImplementedError)):
        pp_prop(model, 0.9).compile_graph(X)
    assert {path: state.value for path, state in model.states().items()} == before


WITHOUT_ASSERTS = """
import re, brainstate, brainunit, test_errors
assert False
with brainstate.environ.context(dt=1.0 * brainunit.ms):
    for number in {numbers}:
        call, error, message = test_errors.ROWS[number]
        try:
            call()
        except error as caught:
            if not re.search(message, str(caught), re.DOTALL):
                raise SystemExit(f"{{number}}: {{caught}}")
        else:
            raise SystemExit(f"{{number}}: accepted")
print("all refused")
"""


def test_refused_without_asserts():
    """Under `python -O`. Beside the last ones every sixth row: all of them take as long as this file."""
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    numbers = sorted({*range(0, len(ROWS), 6), *range(len(ROWS) - len(OF_PP_PROP), len(ROWS))})
    code = WITHOUT_ASSERTS.format(numbers=numbers)
    command = [sys.executable, "-O", "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0 and "all refused" in done.stdout, done.stdout + done.stderr
