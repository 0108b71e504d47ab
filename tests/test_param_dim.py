"""The rules with one trace per weight, beside the product of `test_gradients`."""

import brainstate
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from rules import problem_of, reference

import braintrace

pytestmark = pytest.mark.usefixtures("time_step")


@pytest.mark.parametrize("mapped", [None, "compile"])
def test_a_filtered_trace_advances_without_gradients(mapped):
    """Four steps forward, then one gradient: the filter has seen all of them."""
    problem = problem_of("ModelA", mapped=mapped)
    learner = problem.learner("EProp")
    for x, _ in problem.sequence[:-1]:
        learner(x)
    grads, _ = problem.step(learner)(*problem.sequence[-1])
    assert_close(dict(grads), reference("ModelA", rule="EProp", steps=5).steps[-1][1])


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


def gradient(x, **options):
    """The learner with it."""
    model = Cell()
    model.linear.weight.value = {"weight": jnp.ones((2, 3)) * 0.3, "bias": jnp.zeros(3)}
    learner = braintrace.compile(model, "d_rtrl", x[0], **options)
    return learner, dict(learner.etrace_grad(x, step_fn=lambda x: (learner(x) ** 2).sum()))


def test_mapped_samples_equal_a_batch():
    xs = brainstate.random.RandomState(1).randn(5, 4, 2)
    assert_close(gradient(xs, batch_size=4, vmap=True)[1], gradient(xs, batch_size=4)[1], 1e-5)


def test_trace_dtype_is_storage_only():
    xs = brainstate.random.RandomState(2).randn(3, 2)
    learner, stored = gradient(xs, trace_dtype=jnp.bfloat16)
    assert {v.dtype for s in learner.etrace_bwg.values() for v in s.value.values()} == {jnp.dtype(jnp.bfloat16)}
    assert all(g.dtype == jnp.float32 for g in stored["linear", "weight"].values())
    assert_close(stored, gradient(xs)[1], 2e-2)


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


def squared(model, call, x):
    return (call(x) ** 2).sum()


def squared_and_state(model, call, x):
    return squared(model, call, x) + model.h.value.sum()


@pytest.mark.parametrize("make, batch, loss", [(Cell, 4, squared), (ReadsBefore, None, squared_and_state)])
def test_d_rtrl_is_back_propagation_without_recurrent_weights(make, batch, loss):
    """In the second one the credit of old values passes a marked readout."""
    xs = brainstate.random.RandomState(0).randn(6, *(() if batch is None else (batch,)), 2)
    learner = braintrace.compile(make(), "d_rtrl", xs[0], batch_size=batch)
    model = learner.model4compile
    grads = learner.etrace_grad(xs, step_fn=lambda x: loss(model, learner, x), reduction="sum")
    brainstate.nn.init_all_states(model, batch_size=batch)

    def whole():
        return brainstate.transform.for_loop(lambda x: loss(model, model, x), xs).sum()

    expected = brainstate.transform.grad(whole, model.states(brainstate.ParamState))()
    assert_close(dict(grads), dict(expected), 1e-5)
