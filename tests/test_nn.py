import doctest
import importlib
import inspect
import json
import pathlib
import subprocess
import sys

import brainevent
import brainstate
import braintools
import brainunit as u
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from brainstate.nn import init
from helpers import PRECISIONS, assert_close

import braintrace
import braintrace.nn as bnn

N_IN, N_OUT, BATCH = 3, 4, 2


@pytest.fixture(autouse=True)
def time_step():
    """Only the readout needs a time step; its tests set their own."""


def sigma(x):
    return 1 / (1 + np.exp(-x))


def cat(*arrays):
    return np.concatenate(arrays, -1)


def close(actual, desired, tol=1e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(desired), rtol=tol, atol=tol)


def ramped(out):
    """A loss that weighs the units by 1, 2, ..."""
    return (out * jnp.arange(1.0, out.shape[-1] + 1)).sum()


def driven_by_layer(m, x):
    m.h.value = jnp.tanh(0.5 * m.h.value + m.layer(x))
    return m.h.value


def values(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- recurrent cells, each against its equation in NumPy ---
# A reference takes the cell's affine maps and plain parameters `p`, the input and the old states; it returns the output
# and the new states.


def relu_rnn(p, x, h):
    h = np.maximum(p["W"](cat(x, h)), 0)
    return h, (h,)


def gru(p, x, h):
    z, r = sigma(p["Wz"](cat(x, h))), sigma(p["Wr"](cat(x, h)))
    h = (1 - z) * h + z * np.tanh(p["Wh"](cat(x, r * h)))
    return h, (h,)


def cfn(p, x, h):
    h = sigma(p["Wf"](cat(x, h))) * np.tanh(h) + sigma(p["Wi"](cat(x, h))) * np.tanh(p["Wh"](x))
    return h, (h,)


def mgu(p, x, h):
    f = sigma(p["Wf"](cat(x, h)))
    h = (1 - f) * h + f * np.tanh(p["Wh"](cat(x, f * h)))
    return h, (h,)


def lstm(p, x, h, c):
    xh = cat(x, h)
    c = sigma(p["Wf"](xh) + 1) * c + sigma(p["Wi"](xh)) * np.tanh(p["Wg"](xh))
    h = sigma(p["Wo"](xh)) * np.tanh(c)
    return h, (h, c)


def urlstm(p, x, h, c):
    xh = cat(x, h)
    f, r = sigma(p["bias"] + p["Wf"](xh)), sigma(p["Wr"](xh) - p["bias"])
    g = 2 * r * f + (1 - 2 * r) * f**2
    c = g * c + (1 - g) * np.tanh(p["Wu"](xh))
    h = sigma(p["Wo"](xh)) * np.tanh(c)
    return h, (h, c)


def minimal_rnn(p, x, h):
    z = p["phi"](x)
    f = sigma(p["W_u"](cat(z, h)))
    h = f * h + (1 - f) * z
    return h, (h,)


def mini_gru(p, x, h):
    z = sigma(p["W_z"](cat(x, h)))
    h = (1 - z) * h + z * p["W_x"](x)
    return h, (h,)


def mini_lstm(p, x, h):
    h = sigma(p["W_f"](cat(x, h))) * h + sigma(p["W_i"](cat(x, h))) * p["W_x"](x)
    return h, (h,)


def lru(p, x, h_re, h_im):
    lam = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    h = lam * (h_re + 1j * h_im) + np.exp(p["gamma_log"]) * (p["B_re"](x) + 1j * p["B_im"](x))
    return p["C_re"](h.real) - p["C_im"](h.imag) + p["D"] * x, (h.real, h.imag)


def rtu(p, x, c1, c2):
    lam = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    turned = lam * (c1 + 1j * c2)
    scale = np.sqrt(1 - abs(lam) ** 2)
    c1, c2 = np.tanh(turned.real + scale * p["W1"](x)), np.tanh(turned.imag + scale * p["W2"](x))
    return np.concatenate([c1, c2], -1), (c1, c2)


XH, ZH = N_IN + N_OUT, 2 * N_OUT
AFFINE = dict(state_init=init.Normal(scale=0.5), b_init=init.Normal())
# cell, reference, arguments, states, fan-in of each layer, shape of each other parameter
CELLS = [
    ("ValinaRNNCell", relu_rnn, AFFINE, "h", dict(W=XH), {}),
    ("GRUCell", gru, AFFINE, "h", dict(Wz=XH, Wr=XH, Wh=XH), {}),
    ("CFNCell", cfn, AFFINE, "h", dict(Wf=XH, Wi=XH, Wh=N_IN), {}),
    ("MGUCell", mgu, AFFINE, "h", dict(Wf=XH, Wh=XH), {}),
    ("LSTMCell", lstm, AFFINE, "h c", dict(Wi=XH, Wg=XH, Wf=XH, Wo=XH), {}),
    ("URLSTMCell", urlstm, dict(state_init=init.Normal()), "h c", dict(Wu=XH, Wf=XH, Wr=XH, Wo=XH), dict(bias=N_OUT)),
    ("MinimalRNNCell", minimal_rnn, AFFINE, "h", dict(phi=N_IN, W_u=ZH), {}),
    ("MiniGRU", mini_gru, AFFINE, "h", dict(W_x=N_IN, W_z=XH), {}),
    ("MiniLSTM", mini_lstm, AFFINE, "h", dict(W_x=N_IN, W_f=XH, W_i=XH), {}),
    (
        "LRUCell",
        lru,
        {},
        "h_re h_im",
        dict(B_re=N_IN, B_im=N_IN, C_re=N_OUT, C_im=N_OUT),
        dict(nu_log=N_OUT, theta_log=N_OUT, gamma_log=N_OUT, D=N_IN),
    ),
    ("RTUCell", rtu, {}, "c1 c2", dict(W1=N_IN, W2=N_IN), dict(nu_log=N_OUT, theta_log=N_OUT)),
]
GATED = [name for name, *_ in CELLS if name not in ("LRUCell", "RTUCell")]
every_cell = pytest.mark.parametrize(
    "name, reference, kwargs, states, layers, others", CELLS, ids=[name for name, *_ in CELLS]
)
every_batch = pytest.mark.parametrize("batch", [None, BATCH])


def make(name, batch=None, **kwargs):
    brainstate.random.seed(0)
    cell = getattr(bnn, name)(N_IN, N_OUT, **kwargs)
    cell.init_state(batch)
    return cell


def affine(params):
    weight, bias = np.asarray(params["weight"], float), np.asarray(params.get("bias", 0.0), float)
    return lambda x: x @ weight + bias


@every_batch
@every_cell
def test_cell_follows_its_equation(name, reference, kwargs, states, layers, others, batch):
    cell = make(name, batch, **kwargs)
    p = {key: affine(getattr(cell, key).weight.value) for key in layers}
    p |= {key: np.asarray(getattr(cell, key).value, float) for key in others}
    expected = tuple(np.asarray(getattr(cell, key).value, float) for key in states.split())
    for t in range(3):
        x = values((N_IN,) if batch is None else (batch, N_IN), seed=t)
        out, expected = reference(p, x, *expected)
        close(cell(x), out)
        for key, value in zip(states.split(), expected):
            close(getattr(cell, key).value, value)


@every_cell
def test_cell_parameter_paths(name, reference, kwargs, states, layers, others):
    cell = make(name, **kwargs)
    fan_out = {"C_re": N_IN, "C_im": N_IN}
    shapes = {(key,): (size,) for key, size in others.items()}
    for key, fan_in in layers.items():
        out = fan_out.get(key, N_OUT)
        bias = {"bias": (out,)} if "b_init" in kwargs else {}
        shapes[key, "weight"] = {"weight": (fan_in, out)} | bias
    found = {path: jax.tree.map(jnp.shape, state.value) for path, state in cell.states(brainstate.ParamState).items()}
    assert found == shapes
    assert set(cell.states(brainstate.HiddenState)) == {(key,) for key in states.split()}


@every_batch
@every_cell
def test_cell_states_are_made_and_refilled(name, reference, kwargs, states, layers, others, batch):
    cell = make(name, batch)
    assert (cell.in_size, cell.out_size) == ((N_IN,), (N_OUT,))
    before = {key: getattr(cell, key) for key in states.split()}
    for state in before.values():
        assert isinstance(state, brainstate.HiddenState)
        assert state.value.shape == ((N_OUT,) if batch is None else (batch, N_OUT))
        assert not state.value.any()
    cell(values((N_IN,) if batch is None else (batch, N_IN)))
    cell.reset_state(5, unused=None)
    for key, state in before.items():
        assert getattr(cell, key) is state
        assert state.value.shape == (5, N_OUT)
        assert not state.value.any()
    cell.init_state(batch_size=6, unused=None)
    for key, state in before.items():
        assert getattr(cell, key) is not state
        assert getattr(cell, key).value.shape == (6, N_OUT)


@pytest.mark.parametrize(
    "state_init",
    [2.0, np.full(N_OUT, 2.0, np.float32), np.full((1, N_OUT), 2.0, np.float32), init.Constant(2.0)],
    ids=["number", "array", "row", "callable"],
)
def test_state_initialisers_fill_the_whole_state(state_init):
    cell = make("GRUCell", BATCH, state_init=state_init)
    assert cell.h.value.shape == (BATCH, N_OUT)
    assert not cell.h.value.weak_type
    close(cell.h.value, 2.0)


def test_initial_states_may_bring_their_own_batch_axis():
    cell = make("GRUCell", state_init=values((BATCH, N_OUT)))
    close(cell.h.value, values((BATCH, N_OUT)), tol=0)
    cell.h.value = cell(values((BATCH, N_IN)))
    cell.reset_state()
    close(cell.h.value, values((BATCH, N_OUT)), tol=0)


def test_random_initial_states_differ_between_samples():
    cell = make("LSTMCell", BATCH, state_init=init.Normal())
    assert (cell.h.value[0] != cell.h.value[1]).all()
    assert (cell.h.value != cell.c.value).all()


@pytest.mark.parametrize("name", ["GRUCell", "LSTMCell", "LRUCell", "RTUCell"])
def test_cell_accepts_any_number_of_batch_axes(name):
    cell = make(name)
    single = cell(values(N_IN))
    for state in cell.states(brainstate.HiddenState).values():
        state.value = jnp.zeros((5, BATCH, N_OUT))
    close(cell(np.broadcast_to(values(N_IN), (5, BATCH, N_IN))), np.broadcast_to(single, (5, BATCH, len(single))))


@pytest.mark.parametrize("name", GATED)
def test_cell_sizes_may_be_tuples(name):
    cell = getattr(bnn, name)((5, N_IN), (5, N_OUT))
    cell.init_state(BATCH)
    assert (cell.in_size, cell.out_size) == ((5, N_IN), (5, N_OUT))
    assert cell(values((BATCH, 5, N_IN))).shape == cell.h.value.shape == (BATCH, 5, N_OUT)
    with pytest.raises(AssertionError, match=r"in_size=\(5, 3\) and out_size=\(6, 4\)"):
        getattr(bnn, name)((5, N_IN), (6, N_OUT))


@pytest.mark.parametrize("name", [name for name in GATED if name not in ("MinimalRNNCell", "MiniGRU", "MiniLSTM")])
def test_activation_is_a_callable_or_a_name(name):
    x = values(N_IN)
    close(make(name, activation="sigmoid")(x), make(name, activation=jax.nn.sigmoid)(x), tol=0)
    with pytest.raises(AttributeError, match="no_such_function"):
        make(name, activation="no_such_function")
    with pytest.raises(AssertionError, match="Got 3 of type int as activation"):
        make(name, activation=3)


def test_minimal_rnn_cell_embeds_with_a_given_callable():
    cell = make("MinimalRNNCell", phi=lambda x: jnp.ones(N_OUT))
    assert list(cell.states(brainstate.ParamState)) == [("W_u", "weight")]
    f = sigma(affine(cell.W_u.weight.value)(cat(np.ones(N_OUT), np.zeros(N_OUT))))
    close(cell(values(N_IN)), 1 - f)


def test_urlstm_bias_is_the_logit_of_a_uniform():
    bias = bnn.URLSTMCell(N_IN, 500).bias.value
    gate = sigma(np.asarray(bias))
    assert 1 / 500 <= gate.min() < 0.05 and 0.95 < gate.max() <= 1 - 1 / 500
    assert abs(gate.mean() - 0.5) < 0.05


def test_lru_eigenvalues_start_on_the_ring():
    cell = bnn.LRUCell(N_IN, 500, r_min=0.4, r_max=0.9, max_phase=1.5)
    assert (cell.d_model, cell.d_hidden, cell.r_min, cell.r_max, cell.max_phase) == (N_IN, 500, 0.4, 0.9, 1.5)
    radius, phase = np.exp(-np.exp(cell.nu_log.value)), np.exp(cell.theta_log.value)
    assert 0.4 <= radius.min() < 0.45 and 0.85 < radius.max() <= 0.9
    assert 0 < phase.min() and 1.4 < phase.max() <= 1.5
    close(np.exp(cell.gamma_log.value), np.sqrt(1 - radius**2))
    assert abs(np.std(cell.C_re.weight.value["weight"]) * np.sqrt(500) - 1) < 0.1
    assert (cell.d_model, cell.d_hidden, cell.r_min, cell.r_max, cell.max_phase) == (N_IN, 500, 0.4, 0.9, 1.5)


@pytest.mark.parametrize("name, exact", [("LRUCell", True), ("RTUCell", True), ("GRUCell", False)])
def test_units_that_read_no_other_unit_are_learned_exactly(name, exact):
    """D_RTRL equals back-propagation through time; with gates that read other units it does not."""
    cell = make(name)
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(30, 2, N_IN)), jnp.float32)
    learner = braintrace.compile(cell, "d_rtrl", xs[0], batch_size=2)
    ours = learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).sum(), reduction="sum")
    brainstate.nn.init_all_states(cell, batch_size=2)
    parameters = cell.states(brainstate.ParamState)

    def loss():
        return brainstate.transform.for_loop(lambda x: (cell(x) ** 2).sum(), xs).sum()

    theirs = brainstate.transform.grad(loss, parameters)()
    pairs = [(a, b) for p in parameters for a, b in zip(jax.tree.leaves(ours[p]), jax.tree.leaves(theirs[p]))]
    off = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
    assert off < 1e-4 if exact else off > 1e-2


def test_lru_parameters_are_finite_whatever_is_drawn(monkeypatch):
    monkeypatch.setattr(brainstate.random, "uniform", lambda size: jnp.zeros(size))
    cell = make("LRUCell")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves([s.value for s in cell.states().values()]))
    assert cell(inputs=values(N_IN)).shape == (N_IN,)


# --- initial weights ---


def initial_sums(layer):
    """`{path of a leaf: [sum, sum weighted by position]}` of all that the layer written as a string starts with."""
    brainstate.random.seed(0)
    with brainstate.environ.context(dt=1.0 * u.ms):
        module = eval(layer, {**vars(bnn), "Normal": init.Normal, "Uniform": init.Uniform})
    module.init_state(2)
    sums = {}
    for path, state in module.states().items():
        for key, leaf in jax.tree.leaves_with_path(state.value):
            entries = np.asarray(leaf, np.float64).ravel()
            sums[".".join(path) + jax.tree_util.keystr(key)] = [entries.sum(), entries @ np.arange(1, entries.size + 1)]
    return sums


# Made with `initial_sums` in an environment that has braintrace 0.2.6.
INITIAL = json.loads((pathlib.Path(__file__).parent / "initial_weights.json").read_text())


@pytest.mark.parametrize("precision, layer", [(p, layer) for p, table in INITIAL.items() for layer in table])
def test_a_seed_gives_the_initial_weights_of_0_2_6(precision, layer):
    """Which numbers a model starts with is part of the result of a script."""
    with PRECISIONS[precision]():
        sums = initial_sums(layer)
    expected = INITIAL[precision][layer]
    assert set(sums) == set(expected)
    tol = 1e-5 if precision == "float32" else 1e-12
    for leaf, (total, weighted) in expected.items():
        np.testing.assert_allclose(sums[leaf], [total, weighted], rtol=tol, atol=10 * tol, err_msg=leaf)


# --- linear layers ---


@pytest.mark.parametrize("lead", [(), (2,), (2, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_maps_the_last_axis(lead, bias):
    layer = bnn.Linear(N_IN, N_OUT, b_init=init.Normal() if bias else None)
    assert list(layer.weight.value) == (["weight", "bias"] if bias else ["weight"])
    assert list(layer.states()) == [("weight",)]
    x = values((*lead, N_IN))
    close(layer(x), affine(layer.weight.value)(x))
    assert layer(x).shape == (*lead, N_OUT)


@pytest.mark.parametrize(
    "w_init, b_init",
    [
        (lambda shape: np.full(shape, 2.0), lambda shape: np.full(shape, 3.0)),
        (2.0, 3),
        ([[2.0] * N_OUT] * N_IN, [3.0] * N_OUT),
        (np.full((1, N_OUT), 2.0), np.full((1, N_OUT), 3.0)),
        (braintools.init.Constant(2.0), braintools.init.Constant(3.0)),
    ],
    ids=["callables", "numbers", "lists", "rows", "braintools"],
)
def test_linear_initial_values(w_init, b_init):
    layer = bnn.Linear(N_IN, N_OUT, w_init=w_init, b_init=b_init)
    params = layer.weight.value
    assert {k: (v.shape, v.dtype) for k, v in params.items()} == {
        "weight": ((N_IN, N_OUT), np.float32),
        "bias": ((N_OUT,), np.float32),
    }
    close(params["weight"], np.full((N_IN, N_OUT), 2.0), tol=0)
    close(params["bias"], np.full(N_OUT, 3.0), tol=0)


MASK = np.arange(N_IN * N_OUT).reshape(N_IN, N_OUT) % 2
ROW = np.array([[1.0], [0.0], [1.0]], np.float32)


@pytest.mark.parametrize("mask", [MASK, MASK > 0, jnp.asarray(MASK), lambda shape: jnp.asarray(MASK), ROW, 0.5])
def test_linear_mask_acts_on_values_and_gradients(mask):
    layer = bnn.Linear(N_IN, N_OUT, b_init=None, w_mask=mask)
    array = np.broadcast_to(MASK if callable(mask) else mask, MASK.shape).astype(np.float32)
    x = values((BATCH, N_IN))
    weight = layer.weight.value["weight"]
    close(layer(x), x @ (np.asarray(weight) * array))
    gradient = brainstate.transform.grad(lambda: layer(x).sum(), layer.states())()["weight",]["weight"]
    close(gradient, array * x.sum(0)[:, None])


@pytest.mark.parametrize("lead", [(), (2,), (2, 5)], ids=str)
@pytest.mark.parametrize("sign", [None, -1.0, 2 * MASK - 1.0, 2 * ROW - 1], ids=["none", "number", "full", "row"])
def test_signed_linear_keeps_the_signs(sign, lead):
    layer = bnn.SignedWLinear(N_IN, N_OUT, w_sign=sign)
    weight = np.asarray(layer.weight.value)
    assert weight.shape == (N_IN, N_OUT) and weight.min() < 0 < weight.max()
    x = values((*lead, N_IN))
    close(layer(x), x @ (np.abs(weight) * (1.0 if sign is None else sign)))


@pytest.mark.parametrize("lead", [(), (2,), (2, 5)], ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [
        *[{}, dict(ws_gain=False), dict(b_init=None), dict(eps=100.0)],
        *[dict(w_mask=mask) for mask in (ROW, MASK, MASK > 0, MASK[1], 0.5, lambda shape: jnp.asarray(ROW))],
    ],
    ids=["all", "no gain", "no bias", "eps", "row", "full", "bool", "units", "number", "callable"],
)
def test_scaled_ws_linear_standardises_its_columns(kwargs, lead):
    layer = bnn.ScaledWSLinear(N_IN, N_OUT, **({"b_init": init.Normal()} | kwargs))
    params = layer.weight.value
    shapes = {"weight": (N_IN, N_OUT), "bias": (N_OUT,), "gain": (1, N_OUT)}
    if not kwargs.get("ws_gain", True):
        del shapes["gain"]
    if "b_init" in kwargs:
        del shapes["bias"]
    assert jax.tree.map(jnp.shape, params) == shapes
    if "gain" in params:
        layer.weight.value = params = params | {"gain": jnp.asarray(values((1, N_OUT)))}
    w = np.asarray(params["weight"])
    w = (w - w.mean(0)) / np.sqrt(np.maximum(w.var(0) * N_IN, kwargs.get("eps", 1e-4)))
    x = values((*lead, N_IN))
    mask = kwargs.get("w_mask", 1.0)
    mask = mask((N_IN, 1)) if callable(mask) else mask
    y = (x @ (w * np.asarray(mask))) * np.asarray(params.get("gain", [[1.0]]))[0] + params.get("bias", 0.0)
    close(layer(x), y)
    assert layer(x).shape == (*lead, N_OUT)


@pytest.mark.parametrize("rule, options", [("pp_prop", dict(decay_or_rank=0.9)), ("d_rtrl", {})])
@every_batch
def test_gain_and_bias_of_a_scaled_ws_linear_are_trained_in_front_of_a_cell(batch, rule, options):
    w = jnp.array([[0.3, -0.4, 0.5], [0.1, 0.2, -0.9], [0.7, 0.1, 0.2]])
    model = brainstate.nn.Sequential(
        bnn.ScaledWSLinear(3, 3, w_init=w), bnn.ValinaRNNCell(3, 3, activation="tanh"), bnn.Linear(3, 3)
    )
    x = jnp.array([[0.5, -1.0, 0.3], [2.0, 1.0, -0.4]])
    x = x[0] if batch is None else x
    brainstate.nn.init_all_states(model, **({} if batch is None else dict(batch_size=batch)))
    truth = brainstate.transform.grad(lambda: ramped(model(x)), model.states(brainstate.ParamState))()
    learner = braintrace.compile(model, rule, x, batch_size=batch, **options)
    assert_close(dict(brainstate.transform.grad(lambda: ramped(learner(x)), learner.param_states)()), dict(truth))


LINEAR = ["Linear", "SignedWLinear", "ScaledWSLinear"]


@pytest.mark.parametrize("name", LINEAR)
def test_linear_sizes_may_be_tuples(name):
    layer = getattr(bnn, name)((5, N_IN), (5, N_OUT))
    assert (layer.in_size, layer.out_size) == ((5, N_IN), (5, N_OUT))
    assert jax.tree.leaves(layer.weight.value)[-1].shape == (N_IN, N_OUT)
    assert layer(values((BATCH, 5, N_IN))).shape == (BATCH, 5, N_OUT)
    with pytest.raises(AssertionError, match="agree in all axes but the last"):
        getattr(bnn, name)((5, N_IN), N_OUT)


@pytest.mark.parametrize("name, kwargs", [("Linear", dict(w_mask=MASK)), ("SignedWLinear", {})])
def test_hooks_keep_their_identity(name, kwargs, monkeypatch):
    """A hook that is new at each call would make every call a new program."""
    layer = getattr(bnn, name)(N_IN, N_OUT, **kwargs)
    module, hooks = importlib.import_module("braintrace.nn._linear"), []
    dense = module.dense

    def spy(*args, weight_fn):
        hooks.append(weight_fn)
        return dense(*args, weight_fn=weight_fn)

    monkeypatch.setattr(module, "dense", spy)
    layer(values(N_IN))
    layer(values(N_IN))
    assert hooks[0] is hooks[1] and hash(hooks[0]) is not None


@pytest.mark.parametrize(
    "name, kwargs", [("Linear", dict(w_mask=MASK)), ("SignedWLinear", dict(w_sign=ROW)), ("ScaledWSLinear", {})]
)
def test_layers_keep_the_dtype_of_the_model(name, kwargs):
    def half(shape):
        return jnp.ones(shape, jnp.bfloat16)

    bias = {} if name == "SignedWLinear" else {"b_init": half}
    layer = getattr(bnn, name)(N_IN, N_OUT, w_init=half, **bias, **kwargs)
    assert layer(jnp.ones(N_IN, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["GRUCell", "LSTMCell", "LRUCell", "RTUCell"])
def test_cells_have_the_precision_of_the_environment(name):
    with brainstate.environ.context(precision="bf16"):
        cell = make(name, BATCH)
        y = cell(jnp.ones((BATCH, N_IN), jnp.bfloat16))
    leaves = jax.tree.leaves([y, *[s.value for s in cell.states().values()]])
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}


@pytest.mark.parametrize("name", LINEAR)
def test_parameters_use_the_given_state_class(name):
    class Special(brainstate.ParamState):
        pass

    layer = getattr(bnn, name)(N_IN, N_OUT, w_init=2.0, param_type=Special, name="mine")
    assert type(layer.weight) is Special and layer.name == "mine"
    assert jax.tree.leaves(layer.weight.value)[-1].shape == (N_IN, N_OUT)
    with pytest.raises(ValueError):
        getattr(bnn, name)(N_IN, N_OUT, w_init=np.ones((7, N_OUT)))


# --- convolutions ---

KINDS = {1: (7,), 2: (6, 5), 3: (4, 3, 5)}
GEOMETRIES = [
    {},
    dict(stride=2, padding="VALID"),
    dict(padding=1, rhs_dilation=2),
    dict(padding=[(1, 0)]),
    dict(groups=2),
]


def convolution(ndim, channel_first=False, channels=2, **kwargs):
    space = KINDS[ndim]
    size = (channels, *space) if channel_first else (*space, channels)
    return getattr(bnn, f"Conv{ndim}d")(size, 4, 2, channel_first=channel_first, **kwargs)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("channel_first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("ndim", [1, 2])
def test_convolution(ndim, channel_first, geometry):
    layer = convolution(ndim, channel_first, b_init=init.Normal(), **geometry)
    twin = getattr(brainstate.nn, f"Conv{ndim}d")(
        layer.in_size, 4, 2, channel_first=channel_first, b_init=init.Normal(), **geometry
    )
    assert isinstance(layer, type(twin)) and layer.out_size == twin.out_size
    assert jax.tree.map(jnp.shape, layer.weight.value) == jax.tree.map(jnp.shape, twin.weight.value)
    twin.weight.value = layer.weight.value
    x = values((BATCH, *layer.in_size))
    close(layer(x), twin(x))
    close(layer(x[0]), twin(x)[0])
    assert layer(x[0]).shape == layer.out_size


def test_convolution_in_space():
    layer = convolution(3, w_init=init.Constant(1.0))
    x = values((BATCH, *layer.in_size))
    assert list(layer.states()) == [("weight",)] and list(layer.weight.value) == ["weight"]
    total = np.pad(x.sum(-1), [(0, 0), *[(0, 1)] * 3])
    window = sum(total[:, i : i + 4, j : j + 3, k : k + 5] for i in (0, 1) for j in (0, 1) for k in (0, 1))
    close(layer(x), np.repeat(window[..., None], 4, -1), tol=1e-4)


@pytest.mark.parametrize("mask", [lambda shape: jnp.ones(shape).at[0].set(0.0), np.arange(16).reshape(2, 2, 4) % 3])
def test_convolution_mask_acts_on_values_and_gradients(mask):
    layer = convolution(1, w_mask=mask)
    array = np.asarray(mask((2, 2, 4)) if callable(mask) else mask, np.float32)
    x = values((BATCH, *layer.in_size))
    free = convolution(1)
    free.weight.value = {"weight": layer.weight.value["weight"] * array}
    close(layer(x), free(x))
    gradient = brainstate.transform.grad(lambda: (layer(x) ** 2).sum(), layer.states())()["weight",]["weight"]
    plain = brainstate.transform.grad(lambda: (free(x) ** 2).sum(), free.states())()["weight",]["weight"]
    close(gradient, array * plain, tol=1e-4)


def test_convolution_of_another_shape():
    layer = convolution(2)
    for shape in [(5, 6, 2), (BATCH, 6, 5, 3), (2, BATCH, 6, 5, 2)]:
        with pytest.raises(ValueError, match=r"inputs of shape \(6, 5, 2\)"):
            layer(jnp.zeros(shape))


@pytest.mark.parametrize("batch, mapped", [(None, False), (BATCH, False), (BATCH, True)], ids=str)
@pytest.mark.parametrize("channel_first", [False, True], ids=["last", "first"])
def test_convolution_is_trained_in_every_mode(channel_first, batch, mapped):
    class Cell(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = convolution(2, channel_first, b_init=init.Normal())

        def init_state(self, batch_size=None, **_):
            lead = () if batch_size is None else (batch_size,)
            self.h = brainstate.HiddenState(jnp.zeros((*lead, *self.conv.out_size)))

        def update(self, x):
            self.h.value = jnp.tanh(0.5 * self.h.value + self.conv(x))
            return self.h.value

    cell = Cell()
    lead = () if batch is None else (batch,)
    x = jnp.asarray(values((*lead, *cell.conv.in_size)))
    learner = braintrace.compile(cell, "pp_prop", x, decay_or_rank=0.9, batch_size=batch, vmap=mapped)
    grads = brainstate.transform.grad(lambda: (learner(x) ** 2).sum(), cell.states(brainstate.ParamState))()
    layer, kernel = cell.conv, cell.conv.weight.value
    layer.weight.value = kernel
    truth = brainstate.transform.grad(lambda: (jnp.tanh(layer(x)) ** 2).sum(), layer.states())()["weight",]
    for key in kernel:
        close(grads["conv", "weight"][key], truth[key], tol=1e-4)


@pytest.mark.parametrize("rule", [braintrace.pp_prop, braintrace.D_RTRL])
@pytest.mark.parametrize("channel_first, size", [(True, (3, 4)), (True, (3, 3)), (False, (4, 3))])
def test_the_bias_of_a_convolution(channel_first, size, rule):
    """Also where a spatial axis is as long as that of the channels."""
    layer = bnn.Conv1d(size, 3, 2, b_init=braintools.init.Normal(0.0, 1.0), channel_first=channel_first)
    x = jax.random.normal(jax.random.key(0), (2, *size))
    cost = jax.random.normal(jax.random.key(1), (2, *layer.out_size))
    truth = brainstate.transform.grad(lambda: (jnp.tanh(layer(x)) * cost).sum(), layer.states())()
    model = models.Plain(driven_by_layer, layer=layer, h=brainstate.HiddenState(jnp.zeros(cost.shape)))
    learner = rule(model, *([0.9] if rule is braintrace.pp_prop else []))
    learner.compile_graph(x)
    ours = brainstate.transform.grad(lambda: (learner(x) * cost).sum(), learner.param_states)()
    assert_close({"weight": ours["layer", "weight"]}, {"weight": truth["weight",]})


# --- embedding ---


@pytest.mark.parametrize("size", [3, (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (2, 5)], ids=str)
def test_embedding(size, shape):
    layer = bnn.Embedding(7, size)
    assert isinstance(layer, brainstate.nn.Embedding) and list(layer.states()) == [("weight",)]
    row = (size,) if isinstance(size, int) else size
    assert layer.weight.value.shape == (7, *row) and layer.out_size == row
    indices = np.random.default_rng(0).integers(0, 7, shape)
    close(layer(jnp.asarray(indices)), np.asarray(layer.weight.value)[indices])


OPTIONS = [dict(padding_idx=0), dict(max_norm=1.0), dict(scale_grad_by_freq=True), dict(freeze=True)]


@pytest.mark.parametrize("options", [*OPTIONS, dict(padding_idx=2, freeze=True)], ids=str)
def test_embedding_options_that_a_trace_cannot_follow(options):
    with pytest.raises(NotImplementedError) as error:
        bnn.Embedding(7, 3, **options)
    assert all(name in str(error.value) for name in options)
    layer = bnn.Embedding(7, 3)
    for name, value in options.items():
        setattr(layer, name, value)
    with pytest.raises(NotImplementedError, match=next(iter(options))):
        layer(jnp.array(0))


def test_embedding_of_no_shape():
    with pytest.raises(ValueError, match=r"embedding_size=\(\)"):
        bnn.Embedding(7, ())


@every_batch
def test_embeddings_of_several_tables_of_one_index(batch):
    """Each table filters its own one-hot vector."""

    class Cell(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = bnn.Embedding(5, 3), bnn.Embedding(7, (3,))
            self.h = brainstate.HiddenState(jnp.zeros((3,) if batch is None else (batch, 3)))

        def update(self, i):
            self.h.value = 0.5 * self.h.value + self.a(i) + self.b(i)
            return self.h.value

    learner = braintrace.pp_prop(cell := Cell(), 0.9)
    index = jnp.array(2) if batch is None else jnp.array([2, 4])
    learner.compile_graph(index)
    assert sorted(x.value.shape[-1] for x in learner.etrace_xs.values()) == [5, 7]
    grads = brainstate.transform.grad(lambda: learner(index).sum(), cell.states(brainstate.ParamState))()
    for name, rows in (("a", 5), ("b", 7)):
        close(grads[name, "weight"], np.eye(rows)[np.ravel(index)].sum(0)[:, None] * np.ones(3))


# --- few weights ---


@pytest.mark.parametrize("lead", [(), (2,), (2, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_linear(lead, bias):
    layer = bnn.GroupedLinear(4, N_IN, N_OUT, b_init=init.Normal() if bias else None)
    assert (layer.in_size, layer.out_size) == ((4, N_IN), (4, N_OUT))
    params = {k: np.asarray(v) for k, v in layer.weight.value.items()}
    assert list(params) == (["weight", "bias"] if bias else ["weight"])
    x = values((*lead, 4, N_IN))
    close(layer(x), np.einsum("...gk,gkn->...gn", x, params["weight"]) + params.get("bias", 0.0))


@pytest.mark.parametrize("lead", [(), (2,), (2, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_sparse_linear(lead, bias):
    dense = values((N_IN, N_OUT)) * MASK
    matrix = brainevent.CSR.fromdense(jnp.asarray(dense))
    layer = bnn.SparseLinear(matrix, b_init=init.Constant(2.0) if bias else None)
    assert isinstance(layer, brainstate.nn.SparseLinear) and layer.spar_mat is matrix
    assert (layer.in_size, layer.out_size) == ((N_IN,), (N_OUT,))
    shapes = {"weight": (MASK.sum(),)} | ({"bias": (N_OUT,)} if bias else {})
    assert jax.tree.map(jnp.shape, layer.weight.value) == shapes
    x = values((*lead, N_IN))
    close(layer(x), x @ dense + 2.0 * bias)


def test_sparse_linear_sizes():
    matrix = brainevent.CSR.fromdense(jnp.asarray(MASK))
    assert bnn.SparseLinear(matrix, in_size=(5, N_IN)).out_size == (5, N_OUT)
    with pytest.raises(ValueError, match=r"in_size=\(7,\)"):
        bnn.SparseLinear(matrix, in_size=7)
    with pytest.raises(TypeError, match="DataRepresentation"):
        bnn.SparseLinear(MASK)


@pytest.mark.parametrize("lead", [(), (2,), (2, 5)], ids=str)
@pytest.mark.parametrize("base", [True, False])
def test_lora(lead, base):
    module = bnn.Linear(N_IN, N_OUT) if base else None
    layer = bnn.LoRA(N_IN, 2, N_OUT, base_module=module)
    assert isinstance(layer, brainstate.nn.LoRA)
    a, b = layer.weight.value["lora_a"], layer.weight.value["lora_b"]
    assert (a.shape, b.shape) == ((N_IN, 2), (2, N_OUT))
    paths = {("weight",)} | ({("base_module", "weight")} if base else set())
    assert set(layer.states()) == paths
    x = values((*lead, N_IN))
    close(layer(x), x @ np.asarray(a @ b) / 2 + (np.asarray(module(x)) if base else 0.0))


@pytest.mark.parametrize(
    "sizes, in_size",
    [((N_IN, N_OUT), (5, N_IN)), (((5, N_IN), (5, N_OUT)), None), ((N_IN, N_OUT), None), (((N_IN,), (N_OUT,)), N_IN)],
)
def test_lora_sizes(sizes, in_size):
    layer = bnn.LoRA(sizes[0], 2, sizes[1], in_size=in_size)
    lead = (5,) if (5, N_IN) in (in_size, sizes[0]) else ()
    assert (layer.in_size, layer.out_size) == ((*lead, N_IN), (*lead, N_OUT))
    assert (layer.in_features, layer.lora_rank, layer.out_features) == (N_IN, 2, N_OUT)
    assert jax.tree.map(jnp.shape, layer.weight.value) == {"lora_a": (N_IN, 2), "lora_b": (2, N_OUT)}
    assert layer(values((*lead, N_IN))).shape == (*lead, N_OUT)
    with pytest.raises(ValueError, match="base_module must be"):
        bnn.LoRA(N_IN, 2, N_OUT, base_module=3)
    with pytest.raises(AssertionError, match="agree in all axes but the last"):
        bnn.LoRA((5, N_IN), 2, (6, N_OUT))


@pytest.mark.parametrize(
    "kernel_init",
    [
        (values((N_IN, 2)) * u.mS, values((2, N_OUT), seed=1)),
        (init.Normal(unit=u.mS), init.Normal()),
        [lambda shape: jnp.ones(shape) * u.mS, 2.0],
        lambda shape: values(shape) * (u.mS if shape[0] == N_IN else u.UNITLESS),
    ],
    ids=["arrays", "initialisers", "callable and number", "one callable"],
)
def test_lora_factors_have_their_own_initial_values(kernel_init):
    layer = bnn.LoRA(N_IN, 2, N_OUT, kernel_init=kernel_init)
    a, b = layer.weight.value["lora_a"], layer.weight.value["lora_b"]
    assert u.get_unit(a) == u.mS and u.get_unit(b) == u.UNITLESS
    x = values(N_IN)
    close(layer(x * u.mV).to_decimal(u.uA), x @ np.asarray(a.mantissa) @ np.asarray(b) / 2)


@every_batch
def test_linear_over_positions_is_one_relation(batch):
    """A state of shape (B, T, out) or (T, out) that a map of its last axis drives."""
    layer = bnn.Linear(N_IN, N_OUT)
    w = layer.weight.value["weight"]
    lead = (5,) if batch is None else (batch, 5)
    model = models.Plain(driven_by_layer, layer=layer, h=brainstate.HiddenState(jnp.zeros((*lead, N_OUT))))
    # Small and positive: in float32 the slope of a saturated tanh has few digits, and so have sums that cancel.
    x = jnp.asarray(0.3 * np.abs(values((*lead, N_IN))))
    learner = braintrace.pp_prop(model, 0.9)
    learner.compile_graph(x)
    assert len(learner.graph.hidden_param_op_relations) == 1
    truth = jax.grad(lambda w: ramped(jnp.tanh(x @ w)))(w)
    (gradient,) = brainstate.transform.grad(lambda: ramped(learner(x)), learner.param_states)().values()
    np.testing.assert_allclose(gradient["weight"], truth, rtol=1e-5)


# --- units ---


def test_linear_multiplies_units():
    weight, bias = values((N_IN, N_OUT)), values(N_OUT, seed=1)
    layer = bnn.Linear(N_IN, N_OUT, w_init=weight * u.siemens, b_init=bias * u.amp, w_mask=MASK)
    x = values((BATCH, N_IN))
    y = layer(x * u.volt)
    close(y.to_decimal(u.amp), x @ (weight * MASK) + bias)
    with pytest.raises(u.UnitMismatchError):
        layer(x * u.second)


def test_signed_linear_multiplies_units():
    weight = values((N_IN, N_OUT))
    x = values(N_IN)
    y = bnn.SignedWLinear(N_IN, N_OUT, w_init=weight * u.mS, w_sign=-1.0)(x * u.mV)
    close(y.to_decimal(u.uA), x @ -np.abs(weight))


KERNEL = init.XavierNormal(unit=u.mS)


@pytest.mark.parametrize("channel_first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_convolution_multiplies_units(ndim, channel_first):
    kwargs = dict(channel_first=channel_first, w_mask=lambda shape: jnp.ones(shape).at[0].set(0.0))
    layer = convolution(ndim, w_init=KERNEL, b_init=init.Normal(unit=u.nA), **kwargs)
    plain = convolution(ndim, b_init=init.Normal(), **kwargs)
    assert layer.out_size == plain.out_size
    params = layer.weight.value
    plain.weight.value = {k: v.mantissa * s for (k, v), s in zip(params.items(), (1.0, 1e-3))}
    x = values((BATCH, *layer.in_size))
    for x in (x, x[0]):
        close(layer(x * u.mV).to_decimal(u.uA), plain(x))


# layer, leaves of the parameter that its operation carries
ONLINE = {
    "convolution": (
        lambda: bnn.Conv1d((5, 2), 3, 2, w_init=KERNEL, b_init=init.Normal(unit=u.uS)),
        ["weight", "bias"],
    ),
    "low rank": (
        lambda: bnn.LoRA(N_IN, 2, N_OUT, kernel_init=(init.Normal(unit=u.mS), init.Normal(unit=u.mV))),
        ["lora_a", "lora_b"],
    ),
    "low rank over positions": (lambda: bnn.LoRA((5, N_IN), 2, (5, N_OUT)), ["lora_a", "lora_b"]),
    "standardised": (lambda: bnn.ScaledWSLinear(N_IN, N_OUT, w_mask=MASK), ["weight"]),
}


@pytest.mark.parametrize("name", ONLINE)
def test_layers_learn_online_as_through_time(name):
    make_layer, leaves = ONLINE[name]

    class Cell(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make_layer()

        def init_state(self, batch_size=None, **_):
            self.h = brainstate.HiddenState(jnp.zeros((batch_size, *self.layer.out_size)))

        def update(self, x):
            self.h.value = 0.5 * self.h.value + u.get_mantissa(self.layer(x))
            return jnp.sin(self.h.value).sum()

    brainstate.random.seed(0)
    cell = Cell()
    cell.init_state(BATCH)
    xs = jnp.asarray(values((3, BATCH, *cell.layer.in_size)))
    learner = braintrace.compile(cell, "d_rtrl", xs[0], batch_size=BATCH)
    online = learner.etrace_grad(xs, step_fn=learner, reduction="sum")
    cell.init_state(BATCH)
    through_time = brainstate.transform.grad(lambda: sum(cell(x) for x in xs), cell.states(brainstate.ParamState))()
    for leaf in leaves:
        actual, desired = (u.get_mantissa(g["layer", "weight"][leaf]) for g in (online, through_time))
        close(actual, desired, tol=1e-4)


def test_readout_integrates_with_units():
    with brainstate.environ.context(dt=1.0 * u.ms):
        readout = bnn.LeakyRateReadout(
            N_IN, N_OUT, 10.0 * u.ms, w_init=values((N_IN, N_OUT)) * u.mV, r_init=init.ZeroInit(unit=u.mV)
        )
    readout.init_state(BATCH)
    x = values((BATCH, N_IN))
    readout(x)
    y = readout(x)
    close(y.to_decimal(u.mV), (1 + np.exp(-0.1)) * (x @ values((N_IN, N_OUT))))


# --- readout ---


@every_batch
def test_leaky_rate_readout(batch):
    with brainstate.environ.context(dt=0.5 * u.ms):
        readout = bnn.LeakyRateReadout(N_IN, N_OUT, r_init=init.Constant(1.0))
    assert readout.tau == 5.0 * u.ms and isinstance(readout.r_init, init.Constant)
    close(readout.decay, np.exp(-0.1))
    assert list(readout.states(brainstate.ParamState)) == [("W",)]
    assert readout.W.value.shape == (N_IN, N_OUT)
    readout.init_state(batch)
    r = np.ones((N_OUT,) if batch is None else (batch, N_OUT))
    for t in range(3):
        x = values((*r.shape[:-1], N_IN), seed=t)
        r = np.exp(-0.1) * r + x @ np.asarray(readout.W.value)
        close(readout(x), r)
        close(readout.r.value, r)
    readout.reset_state(batch)
    close(readout.r.value, np.ones_like(r))


def test_readout_needs_a_time_step():
    with pytest.raises(KeyError, match="dt"):
        bnn.LeakyRateReadout(N_IN, N_OUT)


# --- the public surface ---

GATES = "b_init=ZeroInit state_init=ZeroInit"
SIGNATURES = {
    "Linear": "w_init=KaimingNormal b_init=ZeroInit w_mask=None name=None param_type=ParamState",
    "SignedWLinear": "w_init=KaimingNormal w_sign=None name=None param_type=ParamState",
    "ScaledWSLinear": "w_init=KaimingNormal b_init=ZeroInit w_mask=None ws_gain=True eps=0.0001 name=None "
    "param_type=ParamState",
    "GroupedLinear": "w_init=KaimingNormal b_init=ZeroInit name=None param_type=ParamState",
    "SparseLinear": "b_init=None in_size=None name=None param_type=ParamState",
    "LoRA": "base_module=None kernel_init=LecunNormal param_type=ParamState in_size=None",
    "Embedding": "embedding_init=LecunUniform padding_idx=None max_norm=None norm_type=2.0 scale_grad_by_freq=False "
    "freeze=False name=None param_type=ParamState",
    **dict.fromkeys(
        ["Conv1d", "Conv2d", "Conv3d"],
        "stride=1 padding=SAME lhs_dilation=1 rhs_dilation=1 groups=1 w_init=XavierNormal b_init=None w_mask=None "
        "channel_first=False name=None param_type=ParamState",
    ),
    "LeakyRateReadout": "tau=5.0*ms w_init=KaimingNormal r_init=ZeroInit name=None",
    "ValinaRNNCell": "state_init=ZeroInit w_init=XavierNormal b_init=ZeroInit activation=relu name=None",
    "GRUCell": f"w_init=Orthogonal {GATES} activation=tanh name=None",
    "CFNCell": f"w_init=Orthogonal {GATES} activation=tanh name=None",
    "MGUCell": f"w_init=Orthogonal {GATES} activation=tanh name=None",
    "LSTMCell": f"w_init=XavierNormal {GATES} activation=tanh name=None",
    "URLSTMCell": "w_init=XavierNormal state_init=ZeroInit activation=tanh name=None",
    "MinimalRNNCell": f"w_init=Orthogonal {GATES} phi=None name=None",
    "MiniGRU": f"w_init=Orthogonal {GATES} name=None",
    "MiniLSTM": f"w_init=Orthogonal {GATES} name=None",
    "LRUCell": "r_min=0.0 r_max=1.0 max_phase=6.28",
    "RTUCell": "r_min=0.0 r_max=1.0 max_phase=6.28 w_init=LecunNormal state_init=ZeroInit activation=tanh name=None",
}


SIZES = {
    "LRUCell": "d_model d_hidden",
    "GroupedLinear": "num_groups in_features out_features",
    "SparseLinear": "spar_mat",
    "LoRA": "in_features lora_rank out_features",
    "Embedding": "num_embeddings embedding_size",
    **dict.fromkeys(["Conv1d", "Conv2d", "Conv3d"], "in_size out_channels kernel_size"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    def show(default):
        if isinstance(default, u.Quantity):
            return f"{default.mantissa}*{default.unit}"
        if isinstance(default, type):
            return default.__name__
        return type(default).__name__ if isinstance(default, init.Initializer) else str(default)

    parameters = list(inspect.signature(getattr(bnn, name).__init__).parameters.values())[1:]
    shown = [p.name if p.default is p.empty else f"{p.name}={show(p.default)}" for p in parameters]
    sizes = SIZES.get(name, "in_size out_size")
    assert " ".join(shown) == f"{sizes} {SIGNATURES[name]}"


@pytest.mark.parametrize(
    "name", [*LINEAR, "ValinaRNNCell", "GRUCell", "MGUCell", "LSTMCell", "URLSTMCell", "CFNCell", "LRUCell"]
)
def test_layers_are_brainstate_layers(name):
    same_name = getattr(brainstate.nn, name, brainstate.nn.RNNCell)
    assert issubclass(getattr(bnn, name), same_name)


def test_names():
    assert dir(bnn) == sorted(dir(bnn)) and set(bnn.__all__) < set(dir(bnn))
    assert set(SIGNATURES) == set(bnn.__all__) and len(dir(bnn)) == 84
    with pytest.raises(AttributeError, match="no attribute 'NoSuchLayer'"):
        bnn.NoSuchLayer


def test_import_is_light():
    code = "import sys, braintrace.nn; assert not {'brainpy', 'brainpy_state', 'braintools'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["_cells", "_conv", "_embedding", "_linear", "_lru", "_readout", "_sparse"])
def test_docstring_examples(module):
    outcome = doctest.testmod(importlib.import_module(f"braintrace.nn.{module}"))
    assert outcome.attempted and not outcome.failed
