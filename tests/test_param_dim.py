"""The rules with one trace per weight, against the dense oracle of `helpers`."""

import brainstate
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DRTRL, PRECISIONS, PPProp, assert_close, total
from models import CELLS, READOUTS, SMALL, SPIKING, STACKED, Problem, build, library
from test_gradients import ALL, BATCHES, FEEDFORWARD, SILENT, check, check_step

import braintrace

pytestmark = pytest.mark.usefixtures("time_step")


@pytest.mark.parametrize("readout, batch", [("linear", None), ("leaky", 2)])
@pytest.mark.parametrize("model", CELLS | SPIKING | STACKED)
def test_models_and_readouts(model, readout, batch):
    check(Problem(ALL[model], READOUTS[readout], batch), DRTRL(), silent=model in SILENT, make=braintrace.D_RTRL)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model", SMALL)
def test_structures(model, batch):
    check(Problem(ALL[model], None, batch), DRTRL(), make=braintrace.D_RTRL)


STEPS = [
    *["plain input", "gain and shift", "chain of two", "chain of three", "two linked groups", "product twice"],
    *["operand and factor", "tied readout", "operation beside", "product of states", "choice of states"],
    *["written in place", "mask", "square transpose", "standardised", "tied rows", "sum of two", "product of two"],
    *["roll", "cumsum", "layer norm", "constant matrix", "reverse rule", "reverse rule that mixes"],
]


@pytest.mark.parametrize("name", STEPS)
def test_steps(name):
    check_step(name, rule=DRTRL(), make=braintrace.D_RTRL)


@pytest.mark.parametrize("model", ["lstm", "urlstm", "lif-cuba", "Shared"])
def test_filtered_trace(model):
    def make(net):
        return braintrace.EProp(net, kappa_filter_decay=0.6)

    check(Problem(ALL[model], READOUTS["linear"], 2), DRTRL(kappa=0.6), make=make)


@pytest.mark.parametrize("vmap", [False, True])
def test_a_filtered_trace_advances_without_gradients(vmap):
    """Four steps forward, then one gradient: the filter has seen all of them."""
    problem = Problem(SMALL["ModelA"], batch=2)
    steps, _ = problem.oracle().online(DRTRL(kappa=0.6), problem.sequence)
    net = build(SMALL["ModelA"], None, library(), None if vmap else 2)
    net.layers[0].W.weight.value = problem.net.layers[0].W.weight.value
    options = dict(kappa_filter_decay=0.6, batch_size=2, vmap=vmap)
    learner = braintrace.compile(net, "eprop", problem.sequence[0][0], **options)
    for x, _ in problem.sequence[:-1]:
        learner(x)
    parameters = net.states(brainstate.ParamState)
    grads = brainstate.transform.grad(lambda: problem.loss(net, learner, *problem.sequence[-1]), parameters)()
    assert_close(dict(grads), steps[-1][1])


@pytest.mark.parametrize("precision", ["float64", "float32-x64", "float16"])
def test_precisions(precision):
    p = PRECISIONS[precision]
    with p():
        problem = Problem(CELLS["gru"], READOUTS["linear"], 2, steps=p.steps, dtype=p.dtype)
        check(problem, DRTRL(), tol=p.tol, make=braintrace.D_RTRL)


@pytest.mark.parametrize("kind", ["bool", "int"])
def test_spike_inputs(kind):
    problem = Problem(FEEDFORWARD["alif"], READOUTS["linear"], 2, kind=kind)
    check(problem, DRTRL(), silent=True, make=braintrace.D_RTRL)


@pytest.mark.parametrize("rule", [DRTRL(0.3), PPProp(0.9)])
def test_another_rule_is_noticed(rule):
    """Negative control: the comparison with another rule fails by far."""
    problem = Problem(CELLS["lstm"], None, 2)
    ours = problem.online(problem.learner(make=braintrace.D_RTRL))
    theirs, _ = problem.oracle().online(rule, problem.sequence)
    with pytest.raises(AssertionError):
        assert_close(ours[-1][1], theirs[-1][1], 1e-2)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_windows(k):
    problem = Problem(CELLS["gru"], READOUTS["leaky"], 2, steps=6)
    learner = problem.learner(make=braintrace.D_RTRL, vjp_method="multi-step")
    expected, _ = problem.oracle().windows(DRTRL(), problem.sequence, k)
    xs, targets = problem.sequences()
    wrap = braintrace.MultiStepData if k > 1 else (lambda x: x)

    def loss(x, y):
        errors = (learner(wrap(x)) - y) ** 2
        return errors.sum((1, 2)) if k > 1 else errors.sum()

    grads = learner.etrace_grad(xs, targets, step_fn=loss, chunk_size=k, reduction="sum")
    assert_close(dict(grads), total(expected), 2e-5)


class Cell(brainstate.nn.Module):
    """A leaky unit per column, its decay trained: ``h <- sigmoid(d) h + x W + b``."""

    def __init__(self):
        super().__init__()
        self.linear = braintrace.nn.Linear(2, 3)
        self.d = brainstate.ParamState(jnp.zeros(3))

    def init_state(self, batch_size=None, **kwargs):
        self.h = brainstate.HiddenState(jnp.zeros(3 if batch_size is None else (batch_size, 3)))

    def update(self, x):
        decay = braintrace.element_wise(self.d.value, weight_fn=brainstate.nn.sigmoid)
        self.h.value = decay * self.h.value + self.linear(x)
        return self.h.value


SHAPES = [(None, (2, 3, 1), (3, 1), (3, 1)), (4, (4, 2, 3, 1), (4, 3, 1), (4, 3, 1))]


@pytest.mark.parametrize("batch, weight, bias, decay", SHAPES)
def test_layout_of_the_traces(batch, weight, bias, decay):
    x = jnp.ones(2 if batch is None else (batch, 2))
    learner = braintrace.compile(Cell(), "d_rtrl", x, batch_size=batch)
    learner(x)
    (linear,) = learner.get_etrace_of(("linear", "weight")).values()
    (element,) = learner.get_etrace_of("d").values()
    assert (linear["weight"].shape, linear["bias"].shape, element["weight"].shape) == (weight, bias, decay)
    np.testing.assert_allclose(linear["weight"], np.ones(weight))
    learner.reset_state()
    assert not any(np.any(v) for s in learner.etrace_bwg.values() for v in s.value.values())
    assert learner.running_index.value == 0


def test_d_rtrl_is_bptt_without_recurrent_weights():
    xs = brainstate.random.RandomState(0).randn(6, 4, 2)
    learner = braintrace.compile(Cell(), "d_rtrl", xs[0], batch_size=4)
    model = learner.model4compile
    grads = learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).sum(), reduction="sum")
    brainstate.nn.init_all_states(model, batch_size=4)

    def whole():
        return brainstate.transform.for_loop(lambda x: (model(x) ** 2).sum(), xs).sum()

    expected = brainstate.transform.grad(whole, model.states(brainstate.ParamState))()
    assert_close(dict(grads), dict(expected), 1e-5)


def test_mapped_samples_equal_a_batch():
    xs = brainstate.random.RandomState(1).randn(5, 4, 2)

    def gradient(**options):
        model = Cell()
        model.linear.weight.value = {"weight": jnp.ones((2, 3)) * 0.3, "bias": jnp.zeros(3)}
        learner = braintrace.compile(model, "d_rtrl", xs[0], batch_size=4, **options)
        return learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).sum())

    assert_close(dict(gradient(vmap=True)), dict(gradient()), 1e-5)


def test_trace_dtype_is_storage_only():
    xs = brainstate.random.RandomState(2).randn(3, 2)

    def gradient(**options):
        model = Cell()
        model.linear.weight.value = {"weight": jnp.ones((2, 3)) * 0.3, "bias": jnp.zeros(3)}
        learner = braintrace.compile(model, "d_rtrl", xs[0], **options)
        grads = learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).sum())
        return grads, {v.dtype for s in learner.etrace_bwg.values() for v in s.value.values()}

    exact, _ = gradient()
    stored, dtypes = gradient(trace_dtype=jnp.bfloat16)
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    assert all(g.dtype == jnp.float32 for g in stored["linear", "weight"].values())
    assert_close(dict(stored), dict(exact), 2e-2)


def test_a_weight_that_acts_on_several_positions_is_refused():
    shared = braintrace.register_primitive("shared_scale", lambda x, w: x * w)

    class Shared(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = brainstate.ParamState(jnp.ones(1))

        def init_state(self, batch_size=None, **kwargs):
            self.h = brainstate.HiddenState(jnp.zeros(3))

        def update(self, x):
            self.h.value = 0.5 * self.h.value + shared.bind(x, self.w.value)
            return self.h.value

    with pytest.raises(NotImplementedError, match="shared_scale.*'w'.*several positions"):
        braintrace.compile(Shared(), "d_rtrl", jnp.ones(3))


ERRORS = [
    (lambda m: braintrace.EProp(m, feedback="x"), ValueError, "feedback"),
    (lambda m: braintrace.EProp(m, feedback="random"), ValueError, "random_feedback_key"),
    (lambda m: braintrace.EProp(m, config=braintrace.ETraceConfig()), TypeError, "config"),
    (
        lambda m: braintrace.D_RTRL(m, config=braintrace.ETraceConfig("io_factorized", decay=0.9)),
        ValueError,
        "io_factorized.*per_param",
    ),
    (lambda m: braintrace.D_RTRL(m, nonsense=1), TypeError, "nonsense"),
]


@pytest.mark.parametrize("make, error, match", ERRORS)
def test_errors(make, error, match):
    with pytest.raises(error, match=match):
        make(Cell())


class ReadsBefore(brainstate.nn.Module):
    """A marked readout of the state before the update; the state has no recurrent weights."""

    def __init__(self):
        super().__init__()
        self.into = braintrace.nn.Linear(2, 3)
        self.out = braintrace.nn.Linear(3, 2)

    def init_state(self, batch_size=None, **kwargs):
        self.h = brainstate.HiddenState(jnp.zeros(3))

    def update(self, x):
        out = self.out(self.h.value)
        self.h.value = jnp.tanh(0.7 * self.h.value + self.into(x))
        return out


def test_credit_of_old_values_passes_a_marked_readout():
    xs = brainstate.random.RandomState(3).randn(6, 2)
    learner = braintrace.compile(ReadsBefore(), "d_rtrl", xs[0])
    model = learner.model4compile

    def loss(call, x):
        return (call(x) ** 2).sum() + model.h.value.sum()

    grads = learner.etrace_grad(xs, step_fn=lambda x: loss(learner, x), reduction="sum")
    model.h.value = jnp.zeros(3)

    def whole():
        return brainstate.transform.for_loop(lambda x: loss(model, x), xs).sum()

    expected = brainstate.transform.grad(whole, model.states(brainstate.ParamState))()
    assert_close(dict(grads), dict(expected), 1e-5)
