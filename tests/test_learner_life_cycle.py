"""A learner from construction to reset, under JAX's and brainstate's transformations, and its hooks for subclasses."""

import functools
import itertools

import brainstate
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from brainstate import HiddenState, ParamState
from brainstate.transform import for_loop, grad, hessian, jit, scan, vector_grad
from helpers import assert_close
from models import N_IN, N_OUT, N

import braintrace
from braintrace import MultiStepData, SingleStepData, pp_prop

pytestmark = [pytest.mark.usefixtures("time_step"), pytest.mark.filterwarnings("ignore:.*relation_")]

XS = jnp.array([[0.5, -1.0], [1.5, 2.0], [0.0, -0.3], [2.0, 1.0]])
X = XS[0]
BATCHED = jnp.stack([XS, -XS, 2 * XS], 1)  # time, batch, features


def net():
    """GRU and readout with fixed weights."""
    model = models.Net(braintrace.nn.GRUCell(N_IN, N), braintrace.nn.Linear(N, N_OUT))
    brainstate.nn.init_all_states(model)
    return models.randomise(model)


def learner_of(model=None, x=X, decay=0.9, **options):
    learner = pp_prop(net() if model is None else model, decay, **options)
    learner.compile_graph(x)
    return learner


def loss(out):
    return ((out - 1) ** 2).sum()


def step_gradient(learner, x):
    return jit(grad(lambda x: loss(learner(x)), learner.param_states))(x)


def traces(learner):
    return [*learner.etrace_xs.values(), *learner.etrace_dfs.values()]


def snapshot(learner):
    return {
        "states": jax.tree.map(np.asarray, [s.value for s in learner.model4compile.states().values()]),
        "traces": [np.asarray(s.value) for s in traces(learner)],
        "index": int(learner.running_index.value),
    }


def assert_same(a, b, rtol=1e-5):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=rtol, atol=1e-6), a, b)


# -- construction and compilation


def test_construction_touches_nothing():
    model = net()
    before = {p: (id(s), s.value) for p, s in model.states().items()}
    learner = pp_prop(model, 0.9)
    assert {p: (id(s), s.value) for p, s in model.states().items()} == before
    assert learner.model4compile is model and not learner.is_compiled
    assert learner.graph_executor is learner.executor and learner.executor.model is model
    assert learner.running_index.value == 0 and isinstance(learner.running_index, brainstate.LongTermState)
    for read, error in [
        (lambda: learner.graph, ValueError),
        (lambda: learner.report, RuntimeError),
        (lambda: learner.param_states, ValueError),
        (lambda: learner.hidden_states, ValueError),
        (lambda: learner.show_graph(), ValueError),
        (lambda: learner(X), ValueError),
        (lambda: learner.get_etrace_of(("layers", 1, "weight")), ValueError),
    ]:
        with pytest.raises(error, match="compile_graph"):
            read()


def test_states_by_kind():
    learner = learner_of()
    cell = ("layers", 0)
    assert set(learner.param_states) == {(*cell, w, "weight") for w in ("Wz", "Wr", "Wh")} | {("layers", 1, "weight")}
    assert list(learner.hidden_states) == [(*cell, "h")] and not learner.other_states
    assert set(learner.path_to_states) == {*learner.param_states, *learner.hidden_states}
    assert all(learner.state_id_to_path[id(s)] == p for p, s in learner.path_to_states.items())
    states = learner.model4compile.states()
    assert all(states[p] is s for p, s in learner.path_to_states.items())


def test_compiling_again_does_nothing():
    learner = learner_of()
    learner(X)
    graph, kept = learner.graph, snapshot(learner)
    objects = traces(learner)
    learner.compile_graph(jnp.ones((7, 5)), "anything")
    assert learner.graph is graph and all(a is b for a, b in zip(objects, traces(learner), strict=True))
    assert_same(snapshot(learner), kept)


def test_window_examples_are_reduced_to_their_first_step():
    for example in (MultiStepData(XS), SingleStepData(X), MultiStepData(jax.ShapeDtypeStruct(XS.shape, XS.dtype))):
        learner = learner_of(x=example)
        assert learner(X).shape == (N_OUT,)


def test_attributes():
    learner = learner_of(name="mine", vjp_method="multi-step", fast_solve=False)
    assert (learner.name, learner.vjp_method, learner.fast_solve) == ("mine", "multi-step", False)
    assert learner.executor.is_multi_step_vjp and not learner.executor.is_single_step_vjp
    assert (learner.decay, learner.decay_x, learner.decay_f) == (0.9, 0.9, 0.9)
    assert learner.graph is learner.executor.graph and isinstance(learner.graph, braintrace.ETraceGraph)
    assert isinstance(learner.report, braintrace.CompilationReport) and learner.report.graph is learner.graph
    uneven = pp_prop(net(), (0.9, 0.5))
    assert (uneven.decay_x, uneven.decay_f) == (0.9, 0.5)
    for f in (lambda: uneven.decay, lambda: setattr(learner, "decay", 0.5)):
        with pytest.raises(AttributeError):
            f()


NUMBERS = [(np.float32(0.5), 0.5), (np.int64(19), 0.9), (np.float64(0.0), 0.0), (1, 0.0), ([3, 3], 0.5)]


@pytest.mark.parametrize("decay_or_rank, decay", NUMBERS, ids=repr)
def test_numpy_numbers_are_numbers(decay_or_rank, decay):
    learner = pp_prop(net(), decay_or_rank)
    assert learner.decay == pytest.approx(decay, abs=1e-7) and type(learner.decay) is float


def test_classes():
    assert braintrace.ES_D_RTRL is pp_prop and issubclass(pp_prop, braintrace.IODimVjpAlgorithm)
    assert issubclass(braintrace.IODimVjpAlgorithm, braintrace.ETraceVjpAlgorithm)
    assert issubclass(braintrace.ETraceVjpAlgorithm, braintrace.ETraceAlgorithm)
    assert issubclass(braintrace.ETraceAlgorithm, (braintrace.SequenceDriverMixin, brainstate.nn.Module))
    assert issubclass(braintrace.EligibilityTrace, brainstate.ShortTermState)


@pytest.mark.parametrize("examples", [(0, X), (0, jax.ShapeDtypeStruct((N_IN,), jnp.float32)), (jnp.asarray(0), X)])
def test_integer_arguments(examples):
    class Counting(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = braintrace.nn.GRUCell(N_IN, N)

        def update(self, i, x):
            return self.cell(x) + i

    model = Counting()
    brainstate.nn.init_all_states(model)
    learner = pp_prop(model, 0.9)
    learner.compile_graph(*examples)
    out = for_loop(lambda i, x: learner(i, x), jnp.arange(4), XS)
    assert out.shape == (4, N) and learner(4, X).shape == (N,)


# -- traces


def test_one_trace_per_input_and_per_relation():
    """Two gates read one input; the third parameter has no trace; each trace is a state of its own class."""
    learner = learner_of()
    assert sorted(s.value.shape for s in learner.etrace_xs.values()) == [(N_IN + N,), (N_IN + N,)]
    assert [s.value.shape for s in learner.etrace_dfs.values()] == [(N, 1)] * 2
    lstm = braintrace.nn.LSTMCell(N_IN, N)
    brainstate.nn.init_all_states(lstm, batch_size=3)
    learner = learner_of(lstm, BATCHED[0])
    assert [s.value.shape for s in learner.etrace_xs.values()] == [(3, N_IN + N)]
    assert [s.value.shape for s in learner.etrace_dfs.values()] == [(3, N, 2)] * 4
    assert all(isinstance(s, braintrace.EligibilityTrace) for s in traces(learner))
    assert all(hash(k) is not None for k in (*learner.etrace_xs, *learner.etrace_dfs))


def test_values_of_the_traces_by_hand():
    model = models.published("ModelA")
    layer = model.layers[0]
    learner = pp_prop(model, (0.8, 0.5))
    learner.compile_graph(X)
    ex, ef, h = np.zeros(2), np.zeros(3), np.zeros(3)
    w = jax.tree.map(np.asarray, layer.W.weight.value)
    for x in np.asarray(XS):
        learner(jnp.asarray(x))
        h = np.tanh(0.5 * h + x @ w["weight"] + w["bias"])
        ex = 0.8 * ex + x
        ef = 0.5 * (0.5 * (1 - h**2)) * ef + 0.5 * (1 - h**2)
        (xs,), (dfs,) = (list(d.values()) for d in (learner.etrace_xs, learner.etrace_dfs))
        np.testing.assert_allclose(xs.value, ex, rtol=1e-5)
        np.testing.assert_allclose(dfs.value[:, 0], ef, rtol=1e-5)
    xs, dfs = learner.get_etrace_of(layer.W.weight)
    assert set(xs) == set(learner.etrace_xs) and set(dfs) == set(learner.etrace_dfs)
    np.testing.assert_allclose(next(iter(xs.values())), ex, rtol=1e-5)


def test_get_etrace_of_takes_states_and_paths():
    learner = learner_of()
    weight = learner.model4compile.layers[0].Wz.weight
    for key in (weight, ("layers", 0, "Wz", "weight"), ["layers", 0, "Wz", "weight"]):
        xs, dfs = learner.get_etrace_of(key)
        assert len(xs) == len(dfs) == 1 and set(xs) < set(learner.etrace_xs) and set(dfs) < set(learner.etrace_dfs)


def own_bias_and_leak(m, x):
    m.h.value = braintrace.element_wise(m.leak.value) * m.h.value + braintrace.matmul(x, m.w.value, m.b.value)
    return m.h.value


@pytest.mark.parametrize("name, xs_shapes", [("w", [(N_IN,)]), ("b", [(N_IN,)]), ("leak", [])])
def test_every_trained_parameter_shows_its_trace(name, xs_shapes):
    shapes = dict(w=(N_IN, N), b=(N,), leak=(N,))
    params = {k: ParamState(jnp.zeros(shape)) for k, shape in shapes.items()}
    learner = learner_of(models.Plain(own_bias_and_leak, h=HiddenState(jnp.zeros(N)), **params))
    for weight in (params[name], (name,)):
        xs, dfs = learner.get_etrace_of(weight)
        assert [x.shape for x in xs.values()] == xs_shapes
        assert [f.shape for f in dfs.values()] == [(N, 1)]


def test_new_traces_are_new_states():
    learner = learner_of()
    learner(X)
    before = traces(learner)
    learner.init_etrace_state(X)
    assert not {id(s) for s in before} & {id(s) for s in traces(learner)}
    assert all((s.value == 0).all() for s in traces(learner))
    assert learner.running_index.value == 1


def test_reset_keeps_the_objects_and_the_model():
    learner = learner_of()
    first = step_gradient(learner, X)
    before, h = traces(learner), learner.model4compile.layers[0].h.value
    learner.reset_state()
    assert all(a is b and (a.value == 0).all() for a, b in zip(before, traces(learner), strict=True))
    assert learner.running_index.value == 0
    np.testing.assert_array_equal(learner.model4compile.layers[0].h.value, h)
    brainstate.nn.reset_all_states(learner.model4compile)
    assert_close(dict(step_gradient(learner, X)), dict(first))


def leaky(m, x):
    m.h.value = jnp.tanh(0.5 * m.h.value + braintrace.matmul(x, m.w.value))
    return m.h.value


@pytest.mark.parametrize("lead, x_shape, f_shape", [((), (N_IN,), (N, 1)), ((2,), (5, N_IN), (5, N, 1))])
def test_only_a_batch_axis_is_replaced_on_reset(lead, x_shape, f_shape):
    x = jnp.ones((*lead, N_IN))
    model = models.Plain(leaky, w=ParamState(jnp.zeros((N_IN, N))), h=HiddenState(jnp.zeros((*lead, N))))
    learner = learner_of(model, x)
    learner(x)
    learner.reset_state(batch_size=5)
    assert [s.value.shape for s in learner.etrace_xs.values()] == [x_shape]
    assert [s.value.shape for s in learner.etrace_dfs.values()] == [f_shape]
    assert learner.running_index.value == 0
    assert all((s.value == 0).all() for s in traces(learner))


def test_keys_of_all_states_are_stable():
    learner = learner_of()
    before = set(learner.states())
    states = {id(s) for s in learner.states().values()}
    learner(X), learner.param_states, learner.hidden_states, learner.report
    step_gradient(learner, X)
    assert set(learner.states()) == before
    assert {id(s) for s in learner.states().values()} == states
    expected = {id(s) for s in [*learner.model4compile.states().values(), *traces(learner), learner.running_index]}
    assert states == expected
    assert set(learner.states(braintrace.EligibilityTrace).values()) == set(traces(learner))
    assert len(learner.states(ParamState)) == 4


# -- steps, windows and the counter


@pytest.mark.parametrize("vjp_method", ["single-step", "multi-step"])
def test_a_window_is_its_steps(vjp_method):
    one, many = (learner_of(vjp_method=vjp_method) for _ in range(2))
    outputs = jnp.stack([one(x) for x in XS])
    np.testing.assert_allclose(many(MultiStepData(XS)), outputs, rtol=1e-5)
    assert_same(snapshot(one), snapshot(many))
    assert many.running_index.value == 4
    many(X)
    assert many.running_index.value == 5


def test_the_counter_counts_calls_without_gradient():
    learner = learner_of()
    for n in range(1, 4):
        learner(X)
        assert learner.running_index.value == n
    step_gradient(learner, X)
    assert learner.running_index.value == 4


def test_constants_among_the_outputs():
    def step(m, x):
        out = leaky(m, x)
        return {"o": out, "n": 3, "f": 0.5, "x": x, "z": jnp.zeros(2), "nothing": None, "w": m.w.value}

    w, x = jnp.array([[0.2, -0.1, 0.4]]), jnp.ones(1)
    model = models.Plain(step, w=ParamState(w), h=HiddenState(jnp.zeros(N)))
    learner = learner_of(model, x)
    out = learner(x)
    assert (out["n"], out["f"], out["nothing"]) == (3, 0.5, None)
    np.testing.assert_array_equal(out["z"], [0.0, 0.0])
    model.h.value = jnp.zeros(N)
    learner.reset_state()
    gradient = jit(grad(lambda: learner(x)["o"].sum(), learner.param_states))()
    np.testing.assert_allclose(gradient["w",], 1 - jnp.tanh(w) ** 2, rtol=1e-5)


def test_mixed_inputs_repeat_their_single_steps():
    class Scaled(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = braintrace.nn.GRUCell(N_IN, N)

        def update(self, inputs, scale):
            return self.cell(inputs["a"] * inputs["b"] * scale)

    def fresh():
        model = Scaled()
        brainstate.nn.init_all_states(model)
        models.randomise(model)
        learner = pp_prop(model, 0.9)
        learner.compile_graph({"a": X, "b": X}, 1.0)
        return learner

    b = jnp.array([1.0, 0.5])
    learner = fresh()
    expected = jnp.stack([learner({"a": x, "b": b}, 2.0) for x in XS])
    for single in (b, SingleStepData(b)):
        out = fresh()({"a": MultiStepData(XS), "b": single}, 2.0)
        np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_one_window_over_everything_is_backpropagation():
    learner = learner_of(vjp_method="multi-step")
    model = net()
    truth = grad(lambda: loss(for_loop(model, XS)), model.states(ParamState))()
    assert_close(dict(grad(lambda: loss(learner(MultiStepData(XS))), learner.param_states)()), dict(truth))


def test_wrappers_are_pytrees():
    data = MultiStepData({"a": XS})
    doubled = jax.jit(lambda d: jax.tree.map(lambda x: 2 * x, d))(data)
    assert isinstance(doubled, MultiStepData)
    np.testing.assert_array_equal(doubled.data["a"], 2 * XS)
    assert "MultiStepData" in repr(data) and jax.tree.leaves(SingleStepData(3)) == [3]


# -- transformations


def by_hand(learner):
    return [learner(x) for x in XS]


WAYS = {
    "loop": by_hand,
    "jit": lambda learner: [jit(learner)(x) for x in XS],
    "for_loop": lambda learner: for_loop(learner, XS),
    "scan": lambda learner: scan(lambda c, x: (c, learner(x)), None, XS)[1],
    "jitted for_loop": lambda learner: jit(lambda xs: for_loop(learner, xs))(XS),
    "evolve": lambda learner: learner.etrace_evolve(XS, return_outputs=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_forward_passes(way):
    expected, other = learner_of(), learner_of()
    np.testing.assert_allclose(jnp.stack(list(WAYS[way](other))), jnp.stack(by_hand(expected)), rtol=1e-5)
    assert_same(snapshot(other), snapshot(expected))


def test_options_of_the_gradient_transform():
    learner = learner_of()
    expected = step_gradient(learner_of(), X)
    f = grad(lambda x: (loss(learner(x)), x), learner.param_states, has_aux=True, return_value=True)
    grads, value, aux = jit(f)(X)
    assert_close(dict(grads), dict(expected))
    np.testing.assert_array_equal(aux, X)
    learner, model = learner_of(), net()
    dx = grad(lambda x: loss(learner(x)), argnums=0)(X)
    np.testing.assert_allclose(dx, grad(lambda x: loss(model(x)), argnums=0)(X), rtol=1e-5)
    learner = learner_of()
    some = {"readout": learner.param_states["layers", 1, "weight"]}
    only = grad(lambda x: loss(learner(x)), some)(X)
    assert_close(dict(only), {"readout": expected["layers", 1, "weight"]})
    assert value == loss(learner_of()(X))


def test_gradients_of_all_model_parameters_and_vector_valued_losses():
    learner = learner_of()
    expected = step_gradient(learner_of(), X)
    assert_close(dict(grad(lambda: loss(learner(X)), learner.model4compile.states(ParamState))()), dict(expected))
    learner = learner_of()
    vector = vector_grad(lambda: (learner(X) - 1) ** 2, learner.param_states)()
    assert_close(dict(vector), dict(expected))


def test_hessian_of_the_input():
    learner, model = learner_of(), net()
    ours = hessian(lambda x: loss(learner(x)), argnums=0)(X)
    np.testing.assert_allclose(ours, hessian(lambda x: loss(model(x)), argnums=0)(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vjp_method", ["single-step", "multi-step"])
def test_second_derivatives_of_parameters_are_right_or_refused(vjp_method):
    problem = models.Problem(models.SMALL["ModelA"], steps=1)
    learner = problem.learner(vjp_method=vjp_method)
    (x, target), params = problem.sequence[0], learner.param_states

    def norm():
        grads = grad(lambda: problem.loss(problem.net, learner, x, target), params)()
        return sum((g**2).sum() for g in jax.tree.leaves(grads))

    def truth(w):
        inner = jax.grad(lambda w: ((jnp.tanh(x @ w["weight"] + w["bias"]) - target) ** 2).sum())(w)
        return sum((g**2).sum() for g in jax.tree.leaves(inner))

    if vjp_method == "single-step":
        with pytest.raises(NotImplementedError, match="no second derivatives.*multi-step"):
            grad(norm, params)()
    else:
        expected = jax.grad(truth)(problem.net.layers[0].W.weight.value)
        (ours,) = grad(norm, params)().values()
        assert_close({"w": ours}, {"w": expected})


def test_traces_are_constants_of_the_gradient():
    learner = learner_of()
    learner(X)
    trace = next(iter(learner.etrace_dfs.values()))
    (g,) = grad(lambda: loss(learner(X)) + 0 * trace.value.sum(), {"trace": trace})().values()
    assert (g == 0).all()


def test_forward_mode_is_refused():
    learner = learner_of()
    with pytest.raises(TypeError, match="jvp|custom_vjp|forward"):
        jax.jvp(lambda x: learner(x), (X,), (X,))


def mapped_gradient(mapped, params, x):
    return jit(grad(lambda x: loss(mapped(x)), params))(x)


def batched_truth(steps=2):
    model = net()
    brainstate.nn.init_all_states(model, batch_size=3)
    learner = learner_of(model, BATCHED[0])
    return [step_gradient(learner, x) for x in BATCHED[:steps]]


def assert_gradients(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert_close(dict(a), dict(b))


def test_mapping_by_hand():
    model = net()
    learner = pp_prop(model, 0.9)
    seen = []

    @brainstate.transform.vmap_new_states(state_tag="new", axis_size=3)
    def init():
        brainstate.nn.init_all_states(model)
        learner.compile_graph(X)
        seen.append((brainstate.transform.in_new_state_probe(), learner.is_compiled))

    init()
    assert all(compiled != probing for probing, compiled in seen) and learner.is_compiled
    mapped = brainstate.nn.Vmap(learner, vmap_states="new")
    assert_gradients([mapped_gradient(mapped, learner.param_states, x) for x in BATCHED[:2]], batched_truth())
    assert {s.value.shape[0] for s in traces(learner)} == {3}


def test_compiled_for_mapping():
    model = net()
    mapped = braintrace.compile(model, "pp_prop", BATCHED[0], batch_size=3, vmap=True, decay_or_rank=0.9)
    assert isinstance(mapped, braintrace.ETraceVmap) and isinstance(mapped.module, pp_prop)
    assert {r.primitive.name for r in mapped.module.graph.hidden_param_op_relations} == {"etp_mv"}
    assert_gradients([mapped_gradient(mapped, mapped.module.param_states, x) for x in BATCHED[:2]], batched_truth())


def test_compiling_in_a_probe_does_nothing(monkeypatch):
    learner = pp_prop(net(), 0.9)
    monkeypatch.setattr(brainstate.transform, "in_new_state_probe", lambda: True)
    learner.compile_graph(X)
    assert not learner.is_compiled
    monkeypatch.undo()
    learner.compile_graph(X)
    assert learner.is_compiled


def test_a_mapped_model():
    """`brainstate.nn.Map` as the model: the operations carry the batch axis."""
    model = brainstate.nn.Map(net(), init_map_size=3)
    model.init_all_states()
    learner = learner_of(model, BATCHED[0])
    assert {p[0] for p in learner.param_states} == {"module"}
    assert {r.primitive.name for r in learner.graph.hidden_param_op_relations} == {"etp_mm"}
    ours = [step_gradient(learner, x) for x in BATCHED[:2]]
    assert_gradients([{p[1:]: g for p, g in grads.items()} for grads in ours], batched_truth())


def test_an_optimiser_takes_the_parameters():
    braintools = pytest.importorskip("braintools")
    learner = learner_of()
    optimiser = braintools.optim.Adam(1e-1)
    optimiser.register_trainable_weights(learner.param_states)

    @jit
    def train(x):
        grads, value = grad(lambda x: loss(learner(x)), learner.param_states, return_value=True)(x)
        optimiser.step(grads)
        return value

    losses = [train(X) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


# -- hooks for subclasses


class Clipped(pp_prop):
    def _update_etrace_data(self, running_index, old_traces, xs_and_dfs, Ds, weight_vals, input_is_multi_step):
        assert set(weight_vals) == set(self.param_states)
        new = super()._update_etrace_data(running_index, old_traces, xs_and_dfs, Ds, weight_vals, input_is_multi_step)
        return jax.tree.map(lambda t: jnp.clip(t, -0.05, 0.05), new)


class Rescaled(pp_prop):
    def _solve_weight_gradients(self, running_index, traces, signals, weight_vals, plain_grads, etp_window_grads):
        grads = super()._solve_weight_gradients(
            running_index, traces, signals, weight_vals, plain_grads, etp_window_grads
        )
        assert set(grads) == set(self.param_states) == set(weight_vals) == set(plain_grads)
        return jax.tree.map(lambda g: 3.0 * g, grads)


class Doubled(pp_prop):
    def _get_update_aux(self):
        return jnp.asarray(2.0)

    def _compute_learning_signal(self, signals, args_plus_aux):
        *_, factor = args_plus_aux
        assert [s.shape for s in signals] == [(N, 1)]
        return [factor * s for s in signals]


def hooked(cls):
    learner = cls(models.published("ModelA"), 0.9)
    learner.compile_graph(X)
    return learner


def ramp_gradient(learner, x):
    (g,) = grad(lambda: (learner(x) * jnp.arange(1.0, 4.0)).sum(), learner.param_states)().values()
    return g


def test_clipped_traces():
    learner = hooked(Clipped)
    for x in XS:
        ramp_gradient(learner, x)
        assert max(np.abs(s.value).max() for s in traces(learner)) <= 0.05 + 1e-7
    assert np.abs(next(iter(hooked(pp_prop)._get_etrace_data()[0].values()))).max() == 0
    plain = hooked(pp_prop)
    plain(X)
    assert max(np.abs(s.value).max() for s in traces(plain)) > 0.05


def test_rescaled_gradients():
    ours, plain = hooked(Rescaled), hooked(pp_prop)
    for x in XS[:2]:
        assert_close({"w": ramp_gradient(ours, x)}, {"w": jax.tree.map(lambda g: 3 * g, ramp_gradient(plain, x))})


def test_changed_signals():
    """The whole gradient of a traced parameter is its signal against the trace, here twice as large."""
    ours, plain = hooked(Doubled), hooked(pp_prop)
    for x in XS[:2]:
        assert_close({"w": ramp_gradient(ours, x)}, {"w": jax.tree.map(lambda g: 2 * g, ramp_gradient(plain, x))})


def test_traces_can_be_read_and_written():
    learner = learner_of()
    learner(X)
    data = learner._get_etrace_data()
    learner._assign_etrace_data(jax.tree.map(lambda t: 2 * t, data))
    for a, b in zip(jax.tree.leaves(learner._get_etrace_data()), jax.tree.leaves(data), strict=True):
        np.testing.assert_array_equal(a, 2 * b)


# -- compile


@pytest.mark.parametrize("name", ["pp_prop", "es_d_rtrl", "esd_rtrl", " PP_Prop ", "ES_D_RTRL", pp_prop])
def test_names_of_the_rule(name):
    learner = braintrace.compile(net(), name, X, decay_or_rank=0.9)
    assert type(learner) is pp_prop and learner.is_compiled and learner.decay == 0.9


@pytest.mark.parametrize("example", [X, np.asarray(X), jax.ShapeDtypeStruct((N_IN,), jnp.float32), MultiStepData(XS)])
def test_examples(example):
    assert braintrace.compile(net(), "pp_prop", example, decay_or_rank=0.9)(X).shape == (N_OUT,)


def test_compile_makes_new_states_with_the_batch_size():
    model = net()
    h = model.layers[0].h
    learner = braintrace.compile(model, "pp_prop", BATCHED[0], batch_size=3, decay_or_rank=0.9)
    assert model.layers[0].h is not h and model.layers[0].h.value.shape == (3, N)
    assert learner(BATCHED[0]).shape == (3, N_OUT)
    assert {r.primitive.name for r in learner.graph.hidden_param_op_relations} == {"etp_mm"}


def test_compile_initialises_a_fresh_model():
    learner = braintrace.compile(braintrace.nn.LSTMCell(N_IN, N), "pp_prop", X, decay_or_rank=0.9)
    assert learner(X).shape == (N,)


def test_seed_of_the_initial_states():
    def initial(seed):
        cell = braintrace.nn.GRUCell(N_IN, N, state_init=brainstate.nn.init.Normal(1.0))
        braintrace.compile(cell, "pp_prop", X, decay_or_rank=0.9, seed=seed)
        return np.asarray(cell.h.value)

    np.testing.assert_array_equal(initial(5), initial(5))
    assert np.abs(initial(5) - initial(6)).max() > 1e-3


def test_the_global_generator_is_restored():
    def draw(seed):
        with brainstate.random.seed_context(1):
            cell = braintrace.nn.ValinaRNNCell(N_IN, N, w_init=jnp.ones((N_IN + N, N)))
            for _ in range(seed is not None):
                braintrace.compile(cell, "pp_prop", X, decay_or_rank=0.9, seed=seed)
            return np.asarray(brainstate.random.uniform(size=3))

    np.testing.assert_array_equal(draw(None), draw(7))


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_verbose(verbose, capsys):
    learner = braintrace.compile(net(), "pp_prop", X, decay_or_rank=0.9, verbose=verbose)
    assert capsys.readouterr().out == ("" if verbose == 0 else learner.report.to_str(verbose) + "\n")


def test_options_reach_the_constructor():
    learner = braintrace.compile(net(), "pp_prop", X, decay_or_rank=(0.9, 3), vjp_method="multi-step", name="mine")
    assert (learner.decay_x, learner.decay_f, learner.vjp_method, learner.name) == (0.9, 0.5, "multi-step", "mine")


def test_two_learners_of_one_model_are_independent():
    model = net()
    first = braintrace.compile(model, "pp_prop", X, decay_or_rank=0.9)
    first(X)
    second = braintrace.compile(model, "pp_prop", X, decay_or_rank=0.5)
    assert (first.running_index.value, second.running_index.value) == (1, 0)
    for learner in (first, second):
        assert list(learner.hidden_states.values())[0] is model.states(HiddenState)["layers", 0, "h"]
    assert all(first.param_states[p] is second.param_states[p] for p in first.param_states)


def test_a_learner_shows_what_it_trains():
    model = brainstate.nn.Sequential(braintrace.nn.GRUCell(2, 3), braintrace.nn.Linear(3, 1))
    learner = braintrace.pp_prop(model, decay_or_rank=0.9)
    assert repr(learner) == "pp_prop of Sequential, not compiled" and learner._repr_html_() is None
    brainstate.nn.init_all_states(model)
    learner.compile_graph(jnp.zeros(2))
    assert repr(learner).split("\n")[0] == "pp_prop of Sequential" and "layers.0.Wz.weight" in repr(learner)
    assert learner._repr_html_() == learner.report._repr_html_()


def test_states_that_are_missing_in_a_container():
    model = brainstate.nn.Sequential(braintrace.nn.GRUCell(2, 3), braintrace.nn.Linear(3, 1))
    with pytest.raises(AttributeError, match=r"'GRUCell'.*'h'.*init_all_states.*braintrace.compile"):
        braintrace.D_RTRL(model).compile_graph(jnp.zeros(2))


class Packed(brainstate.nn.Module):
    """Without a batch, a state of two axes that one flat operation drives, and a gain for each of its columns."""

    def __init__(self):
        super().__init__()
        self.w = ParamState(jnp.linspace(-1.0, 1.0, 12).reshape(2, 6))
        self.gain = ParamState(jnp.array([0.5, -0.5]))

    def init_state(self, **_):
        self.h = HiddenState(jnp.zeros((3, 2)))

    def update(self, x):
        y = braintrace.matmul(x, self.w.value).reshape(3, 2)
        self.h.value = jnp.tanh(0.8 * self.h.value + y + braintrace.element_wise(self.gain.value))
        return self.h.value


class SharedState(brainstate.nn.Module):
    """A batch, and in front of its state one that all samples share."""

    def __init__(self):
        super().__init__()
        self.w = ParamState(jnp.linspace(-1.0, 1.0, 8).reshape(2, 4))

    def init_state(self, batch_size=None, **_):
        self.a_threshold = HiddenState(jnp.zeros(3))
        self.h = HiddenState(jnp.zeros((batch_size or 2, 4)))

    def update(self, x):
        self.a_threshold.value = 0.9 * self.a_threshold.value + 0.1
        self.h.value = jnp.tanh(0.8 * self.h.value + braintrace.matmul(x, self.w.value))
        return self.h.value - self.a_threshold.value[0]


@pytest.mark.parametrize("rule, options", [("pp_prop", {"decay_or_rank": 0.9}), ("d_rtrl", {}), ("uoro", {})])
@pytest.mark.parametrize("model, x", [(Packed, X), (SharedState, BATCHED[0, :2])])
def test_a_reset_learner_is_a_new_one(model, x, rule, options):
    net = model()
    learner = braintrace.compile(net, rule, x, **options)
    xs = jnp.stack([x, 2 * x, -x])
    step_fn = lambda x: (learner(x) ** 2).sum()  # noqa: E731
    first = learner.etrace_grad(xs, step_fn=step_fn)
    brainstate.nn.init_all_states(net)
    learner.reset_state()
    assert_close(learner.etrace_grad(xs, step_fn=step_fn), first)


def test_traces_follow_a_batch_that_not_all_states_have():
    net = SharedState()
    learner = braintrace.compile(net, "d_rtrl", BATCHED[0, :2])
    brainstate.nn.init_all_states(net, batch_size=3)
    learner.reset_state()
    found = learner.etrace_grad(BATCHED, step_fn=lambda x: (learner(x) ** 2).sum())
    brainstate.nn.init_all_states(net, batch_size=3)
    new = braintrace.D_RTRL(net)
    new.compile_graph(BATCHED[0])
    assert_close(found, new.etrace_grad(BATCHED, step_fn=lambda x: (new(x) ** 2).sum()))


# -- several calls in one function that is differentiated: the traces alone account for earlier ones


class Leaky(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = ParamState(jnp.linspace(-1.0, 1.0, 6).reshape(2, 3))

    def init_state(self, batch_size=None, **_):
        self.h = HiddenState(jnp.zeros((3,) if batch_size is None else (batch_size, 3)))

    def update(self, x):
        self.h.value = jnp.tanh(0.8 * self.h.value + braintrace.matmul(x, self.w.value))
        return self.h.value


def both_calls(learner, model, xs):
    first = learner(xs[0])
    return (first * 0.3).sum() + (model.h.value * 0.7).sum() + (learner(xs[1]) ** 3).sum()


def in_a_loop(learner, model, xs):
    weights = jnp.array([0.0, 1.0])

    def step(x, weight):
        out = learner(x)
        return (1 - weight) * (out * 0.3 + model.h.value * 0.7).sum() + weight * (out**3).sum()

    return for_loop(step, xs, weights).sum()


def each_within(transform):
    """The calls stand in another transformation, with a trace of its own."""

    def way(learner, model, xs):
        call = transform(lambda x: (learner(x), model.h.value))
        (first, h), (second, _) = call(xs[0]), call(xs[1])
        return (first * 0.3).sum() + (h * 0.7).sum() + (second**3).sum()

    return way


def touched(learner, model, xs):
    first = learner(xs[0])
    loss = (first * 0.3).sum() + (model.h.value * 0.7).sum()
    model.h.value = jnp.where(jnp.zeros_like(first, bool), 0.0, model.h.value)  # where an episode has ended
    return loss + (learner(xs[1]) ** 3).sum()


def from_the_output(learner, model, xs):
    model.h.value = learner(xs[0])
    return model.h.value.sum() + (learner(xs[1]) ** 3).sum()


def loop_first(learner, model, xs):
    return for_loop(lambda x: learner(x).sum(), xs[:1]).sum() + (learner(xs[1]) ** 3).sum()


CHECKPOINTED = each_within(brainstate.transform.checkpoint)
BRANCH = each_within(lambda call: lambda x: brainstate.transform.cond(x.sum() < 9.0, call, call, x))
CALLS = [both_calls, in_a_loop, each_within(jit), CHECKPOINTED, BRANCH, touched, from_the_output, loop_first]


@pytest.mark.parametrize(
    "way, mode, options",
    [
        *itertools.product(CALLS, ["one"], [{}]),
        *itertools.product([both_calls, in_a_loop, touched, each_within(jit)], ["batch", "mapped"], [{}]),
        *itertools.product([both_calls, in_a_loop, touched], ["one", "mapped"], [{"vjp_method": "multi-step"}]),
    ],
)
def test_several_calls_in_one_gradient(way, mode, options):
    xs = jnp.array([[0.5, -1.0], [1.5, 0.3]])
    batch = {} if mode == "one" else {"batch_size": 2, "vmap": mode == "mapped"}
    if batch:
        xs = jnp.stack([xs, 0.5 * xs], 1)
    model = Leaky()
    learner = braintrace.compile(model, "d_rtrl", xs[0], **batch, **options)
    found = jit(lambda xs: grad(lambda: way(learner, model, xs), learner.param_states)())(xs)

    def by_hand(w):
        first = jnp.tanh(xs[0] @ w)
        return first.sum() + (jnp.tanh(0.8 * first + xs[1] @ w) ** 3).sum()

    assert_close(found, {("w",): jax.grad(by_hand)(model.w.value)})


class Delayed(Leaky):
    """Units that get their own values back after a step, by a buffer that is no hidden state."""

    def init_state(self, batch_size=None, **_):
        super().init_state()
        self.late = brainstate.ShortTermState(jnp.zeros(3))

    def update(self, x):
        late, self.late.value = self.late.value, self.h.value
        self.h.value = jnp.tanh(0.8 * self.h.value + braintrace.matmul(x, self.w.value) + late[::-1])
        return self.h.value


@pytest.mark.parametrize("way", [both_calls, in_a_loop, touched, each_within(jit)])
def test_nothing_reaches_earlier_calls_through_other_states(way):
    xs = jax.random.normal(jax.random.key(0), (2, 2))

    def gradient(function):
        model = Delayed()
        learner = braintrace.compile(model, "d_rtrl", xs[0])
        model.late.value = jnp.ones(3)
        return function(learner, model)

    def call_by_call(learner, model):
        first = grad(lambda: learner(xs[0]).sum(), learner.param_states)()
        second = grad(lambda: (learner(xs[1]) ** 3).sum(), learner.param_states)()
        return jax.tree.map(jnp.add, first, second)

    found = gradient(lambda learner, model: grad(lambda: way(learner, model, xs), learner.param_states)())
    assert_close(found, gradient(call_by_call))


def test_two_learners_that_step_one_model_in_one_gradient():
    xs, model = jnp.array([[0.5, -1.0], [1.5, 0.3]]), Leaky()
    one = braintrace.compile(model, "immediate", xs[0])
    other = braintrace.compile(model, "immediate", xs[0])
    found = grad(lambda: one(xs[0]).sum() + (other(xs[1]) ** 3).sum(), model.states(ParamState))()

    def by_hand(w):
        first = jnp.tanh(xs[0] @ w)
        return first.sum() + (jnp.tanh(0.8 * jax.lax.stop_gradient(first) + xs[1] @ w) ** 3).sum()

    assert_close(found, {("w",): jax.grad(by_hand)(model.w.value)})


class Prepared(Leaky):
    """A trained state to begin with, and a trained context that every call reads."""

    def __init__(self):
        super().__init__()
        self.first, self.of_context = ParamState(jnp.full(3, 0.3)), ParamState(jnp.full(3, 0.2))

    def init_state(self, batch_size=None, **_):
        super().init_state()
        self.context = brainstate.ShortTermState(jnp.zeros(3))

    def update(self, x):
        return super().update(x) * (1.0 + self.context.value)


@pytest.mark.filterwarnings("ignore:.*never reads the parameter")
@pytest.mark.parametrize("way, begins", [("calls", True), ("a reset", True), ("loop", False)])
def test_what_stands_before_the_calls_has_its_gradient(way, begins):
    """The states of the first call, and what calls read and do not write."""
    xs, model = jax.random.normal(jax.random.key(0), (4, 2)), Prepared()
    learner = braintrace.compile(model, "immediate", xs[0])

    def loss():
        model.h.value, model.context.value = jnp.tanh(model.first.value), jnp.sin(model.of_context.value)
        if way == "loop":
            return for_loop(lambda x: learner(x).sum(), xs).sum()
        total = 0.0
        for i, x in enumerate(xs):
            if i == 2 and way == "a reset":
                model.h.value = jnp.tanh(model.first.value)
            total += learner(x).sum()
        return total

    def by_hand(w, first, context):
        start, total = jnp.tanh(first), 0.0
        h = start if begins else jax.lax.stop_gradient(start)
        for i, x in enumerate(xs):
            h = start if i == 2 and way == "a reset" else h
            h = jnp.tanh(0.8 * h + x @ w)
            total += (h * (1.0 + jnp.sin(context))).sum()
            h = jax.lax.stop_gradient(h)
        return total

    names = ("w", "first", "of_context")
    expected = jax.grad(by_hand, (0, 1, 2))(*(getattr(model, k).value for k in names))
    assert_close(grad(loss, model.states(ParamState))(), {(k,): g for k, g in zip(names, expected)})


DONE = jnp.array([1.0, 0.0, 0.0, 1.0])


def unrolled(step, xs):
    return sum(step(x, done) for x, done in zip(xs, DONE))


def looped(step, xs):
    return for_loop(step, xs, DONE).sum()


def mixed(step, xs):
    first = jit(step)
    return first(xs[0], DONE[0]) + for_loop(step, xs[1:3], DONE[1:3]).sum() + step(xs[3], DONE[3])


@pytest.mark.filterwarnings("ignore:.*never reads the parameter")
@pytest.mark.parametrize("way", [unrolled, looped, mixed, "jitted before", "driven"])
@pytest.mark.parametrize("mapped", [False, True])
def test_episodes_that_begin_with_a_trained_state(way, mapped):
    """Of a state that is the old one or a trained one, the trained one alone has a gradient."""
    xs, model = jax.random.normal(jax.random.key(0), (4, 2)), Prepared()
    batch = {"batch_size": 2, "vmap": True} if mapped else {}
    if mapped:
        xs = jnp.stack([xs, -xs], 1)
    learner = braintrace.compile(model, "immediate", xs[0], **batch)
    parameters = {("w",): model.w, ("first",): model.first}

    def step(x, done):
        model.h.value = jnp.where(done > 0, jnp.tanh(model.first.value), 1.0 * model.h.value)
        return (learner(x) ** 2).sum()

    def again():
        model.h.value = jnp.zeros_like(model.h.value)
        (learner.module if mapped else learner).reset_state()

    one_by_one = [grad(lambda: step(x, done), parameters)() for x, done in zip(xs, DONE)]  # noqa: B023
    expected = jax.tree.map(lambda *g: sum(g), *map(dict, one_by_one))
    again()
    if way == "driven":
        found = learner.etrace_grad(xs, DONE, step_fn=step, weights=parameters, reduction="sum")
    elif way == "jitted before":
        known = jit(step)
        known(xs[0], DONE[0])  # its trace is made outside of the gradient
        again()
        found = grad(lambda: unrolled(known, xs), parameters)()
    else:
        found = grad(lambda: way(step, xs), parameters)()
    assert jnp.abs(found["first",]).min() > 0.01
    assert_close(found, expected)


def test_what_one_learner_gives_to_another_one_has_its_gradient():
    xs = jax.random.normal(jax.random.key(0), (3, 2))
    encoder, decoder = Leaky(), Leaky()
    learners = [braintrace.compile(model, "immediate", xs[0]) for model in (encoder, decoder)]

    def loss():
        for x in xs[:2]:
            decoder.h.value = 2.0 * learners[0](x)
        return (learners[1](xs[2]) ** 2).sum()

    def by_hand(of_encoder, of_decoder):
        h = jax.lax.stop_gradient(jnp.tanh(xs[0] @ of_encoder))
        h = 2.0 * jnp.tanh(0.8 * h + xs[1] @ of_encoder)
        return (jnp.tanh(0.8 * h + xs[2] @ of_decoder) ** 2).sum()

    expected = jax.grad(by_hand, (0, 1))(encoder.w.value, decoder.w.value)
    found = grad(loss, [encoder.w, decoder.w])()
    assert_close({(i,): g for i, g in enumerate(found)}, {(i,): g for i, g in enumerate(expected)})


@pytest.mark.parametrize("pattern", [(1, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0, 0, 1)])
def test_a_state_that_not_every_call_writes(pattern):
    class Sometimes(Leaky):
        def init_state(self, **_):
            super().init_state()
            self.late = brainstate.ShortTermState(jnp.zeros(3))

        def update(self, x, writes=False):
            late = self.late.value
            if writes:
                self.late.value = 0.5 * late + jnp.sin(self.h.value)
            self.h.value = jnp.tanh(0.8 * self.h.value + braintrace.matmul(x, self.w.value) + late)
            return self.h.value

    xs = jax.random.normal(jax.random.key(0), (len(pattern), 2))

    def gradient(function):
        model = Sometimes()
        learner = braintrace.compile(model, "immediate", xs[0])
        learner(xs[0], writes=True)
        call = lambda x, on: (learner(x, writes=bool(on)) ** 2).sum()  # noqa: E731
        steps = [functools.partial(call, x, on) for x, on in zip(xs, pattern)]
        return function(steps, learner.param_states)

    each = gradient(lambda steps, ps: jax.tree.map(lambda *g: sum(g), *[dict(grad(f, ps)()) for f in steps]))
    assert_close(gradient(lambda steps, ps: grad(lambda: sum(f() for f in steps), ps)()), each)


def test_a_first_state_of_a_learner_that_is_mapped_by_hand():
    model, xs, start = Leaky(), jax.random.normal(jax.random.key(0), (4, 2)), ParamState(jnp.full(3, 0.3))

    @brainstate.transform.vmap_new_states(state_tag="new", axis_size=4)
    def initialise():
        brainstate.nn.init_all_states(model)
        learner.compile_graph(xs[0])

    learner = braintrace.D_RTRL(model)
    initialise()
    mapped = brainstate.nn.Vmap(learner, vmap_states="new")

    def loss():
        model.h.value = jnp.tanh(start.value) + jnp.zeros((4, 3))
        return (mapped(xs) ** 2).sum() + mapped(xs).sum()

    def by_hand(start):
        first = jnp.tanh(0.8 * jnp.tanh(start) + xs @ model.w.value)
        return (first**2).sum()

    np.testing.assert_allclose(grad(loss, start)(), jax.grad(by_hand)(start.value), rtol=1e-5)


def test_two_calls_in_one_step_of_a_sequence():
    model, xs = Leaky(), jnp.array([[0.5, -1.0], [1.5, 0.3]])
    learner = braintrace.compile(model, "d_rtrl", xs[0])
    pairs = learner.etrace_grad(xs[None], step_fn=lambda x: both_calls(learner, model, x))
    model.h.value = jnp.zeros(3)
    learner.reset_state()
    assert_close(pairs, grad(lambda: in_a_loop(learner, model, xs), learner.param_states)())


@pytest.mark.parametrize("rule", ["pp_prop", "d_rtrl"])
@pytest.mark.parametrize("hidden, aux", [(0, 1), (1, 0), (0, 0)])
def test_arrays_without_entries(rule, hidden, aux):
    class Net(Leaky):
        def init_state(self, **_):
            super().init_state()
            self.nothing = HiddenState(jnp.zeros(hidden))

        def update(self, x):
            self.nothing.value = 0.5 * self.nothing.value
            return super().update(x)

    options = {"decay_or_rank": 0.9} if rule == "pp_prop" else {}
    gradients = []
    for chunk in (2, 6):
        learner = braintrace.compile(Net(), rule, X, **options)
        step_fn = lambda x: (learner(x).sum(), jnp.zeros(aux))  # noqa: E731
        found, more = learner.etrace_grad(jnp.ones((6, 2)), step_fn=step_fn, has_aux=True, trace_chunk=chunk)
        assert more.shape == (6, aux)
        gradients.append(found)
    assert_close(*gradients)


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("rule", ["pp_prop", "d_rtrl"])
def test_an_input_without_features(rule, batch):
    class Net(Leaky):
        def __init__(self):
            super().__init__()
            self.v = ParamState(jnp.zeros((0, 3)))

        def update(self, x):
            self.h.value = 0.5 * self.h.value + braintrace.matmul(x[..., :0], self.v.value)
            return super().update(x)

    lead = () if batch is None else (batch,)
    options = {"decay_or_rank": 0.9} if rule == "pp_prop" else {}
    learner = braintrace.compile(Net(), rule, jnp.ones((*lead, 2)), batch_size=batch, **options)
    loss = lambda x: learner(x).sum()  # noqa: E731
    for found in (grad(lambda: loss(jnp.ones((*lead, 2))), learner.param_states)(), learner.etrace_grad(
        jnp.ones((4, *lead, 2)), step_fn=loss)):  # fmt: skip
        assert found["v",].shape == (0, 3) and jnp.abs(found["w",]).min() > 0


def test_traces_by_a_path_with_dots():
    net = brainstate.nn.Sequential(braintrace.nn.GRUCell(2, 3))
    learner = braintrace.compile(net, "d_rtrl", X)
    by_string = learner.get_etrace_of("layers.0.Wh.weight")
    assert by_string.keys() == learner.get_etrace_of(("layers", 0, "Wh", "weight")).keys()
