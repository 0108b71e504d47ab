"""What the compiler finds in a model: groups, relations, the structure of their derivatives, and what it says."""

import inspect
import io
import itertools
import re
import warnings
import xml.etree.ElementTree

import brainpy
import brainstate
import braintools
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate import HiddenState, ParamState
from brainstate.transform import grad

import braintrace
from braintrace import CompilationRecord, DiagnosticKind, DiagnosticLevel, element_wise, matmul
from braintrace._compiler.position_rules import ENDS, RULES
from braintrace._jax import call_body, is_jit, open_jaxpr

pytestmark = [
    pytest.mark.usefixtures("time_step"),
    pytest.mark.filterwarnings("ignore:.*relation_"),
    pytest.mark.filterwarnings("ignore:.*state_mismatch"),
]

N_IN, N = 2, 3
X = jnp.array([0.5, -1.0])


class Model(brainstate.nn.Module):
    """`step(m, *args)` with the given states; every model has the parameters `w` and `v` of shape (2, 3)."""

    def __init__(self, step, hidden="h", n=N, **states):
        super().__init__()
        self._step = step
        self.w, self.v = ParamState(0.1 * jnp.ones((N_IN, n))), ParamState(0.2 * jnp.ones((N_IN, n)))
        for name in hidden:
            setattr(self, name, HiddenState(jnp.zeros(n)))
        for name, state in states.items():
            setattr(self, name, state)

    def update(self, *args):
        return self._step(self, *args)


def compiled(step, *args, **states):
    return braintrace.compile_etrace_graph(Model(step, **states), *(args or (X,)))


def names(graph):
    return [[".".join(map(str, path)) for path in g.hidden_paths] for g in graph.hidden_groups]


def kinds(graph, level=None):
    return [r.kind for r in graph.diagnostics if level is None or r.level is level]


# -- groups


def linked_by(link, new=False):
    """b reads h, its old or its new value, through `link(m, h)`."""

    def step(m, x):
        before = m.h.value
        m.h.value = 0.5 * m.h.value + matmul(x, m.w.value)
        m.b.value = 0.3 * m.b.value + link(m, m.h.value if new else before) + matmul(x, m.v.value)
        return m.b.value

    return step


ONE_GROUP, TWO_GROUPS = [["h", "b"]], [["h"], ["b"]]
LINKS = {
    "identity": (lambda m, h: h, ONE_GROUP),
    "element-wise": (lambda m, h: jnp.tanh(2 * h) ** 2, ONE_GROUP),
    "times a parameter": (lambda m, h: h * m.v.value[0], ONE_GROUP),
    "times element_wise": (lambda m, h: h * element_wise(m.p.value), ONE_GROUP),
    "where": (lambda m, h: jnp.where(m.b.value > 0, h, 0.0), ONE_GROUP),
    "jit": (jax.jit(lambda m, h: jnp.sin(h), static_argnums=0), ONE_GROUP),
    "part of the units": (lambda m, h: h.at[0].set(0.0), ONE_GROUP),
    "twice reversed": (lambda m, h: h[::-1][::-1], ONE_GROUP),
    "none": (lambda m, h: 0.0 * m.b.value, TWO_GROUPS),
    "stop_gradient": (lambda m, h: jax.lax.stop_gradient(h), TWO_GROUPS),
    "comparison": (lambda m, h: (h > 0).astype(jnp.float32), TWO_GROUPS),
    "operation": (lambda m, h: matmul(h, m.q.value), TWO_GROUPS),
    "plain product": (lambda m, h: h @ m.q.value, TWO_GROUPS),
    "roll": (lambda m, h: jnp.roll(h, 1), TWO_GROUPS),
    "sum": (lambda m, h: h.sum() * jnp.ones(N), TWO_GROUPS),
}


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("link", LINKS)
def test_states_linked_position_by_position_form_a_group(link, new):
    f, expected = LINKS[link]
    graph = compiled(linked_by(f, new), hidden="hb", p=ParamState(jnp.ones(N)), q=ParamState(jnp.ones((N, N))))
    assert names(graph) == expected
    merged = graph.explain(kind=DiagnosticKind.HIDDEN_GROUP_MERGED)
    assert [r.hidden_paths for r in merged] == ([(("h",), ("b",))] if expected == ONE_GROUP else [])
    assert {p: g.index for p, g in graph.hid_path_to_group.items()} == {
        (name,): i for i, group in enumerate(expected) for name in group
    }


def test_shapes_never_share_a_group():
    def step(m, x):
        m.h.value = 0.5 * m.h.value + matmul(x, m.w.value)
        m.big.value = 0.5 * m.big.value + m.h.value
        return m.big.value

    graph = compiled(step, big=HiddenState(jnp.zeros((4, N))))
    assert names(graph) == [["h"], ["big"]]
    assert [g.varshape for g in graph.hidden_groups] == [(N,), (4, N)]


def test_groups_and_members_come_in_the_order_of_first_access():
    def step(m, x):
        c, b, a, h = m.c.value, m.b.value, m.a.value, m.h.value
        m.h.value = 0.5 * h + 0.1 * c + matmul(x, m.w.value)
        m.c.value = 0.5 * c
        m.a.value = 0.5 * a + 0.1 * b
        m.b.value = 0.5 * b
        return m.h.value

    assert names(compiled(step, hidden="habc")) == [["c", "h"], ["b", "a"]]


def test_links_are_transitive():
    def step(m, x):
        a, b, h = m.a.value, m.b.value, m.h.value
        m.h.value = 0.5 * h + matmul(x, m.w.value)
        m.a.value = 0.5 * a + h
        m.b.value = 0.5 * b + a
        return m.b.value

    assert names(compiled(step, hidden="hab")) == [["a", "b", "h"]]


ONE_BY_ONE = "abs arccos arcsin arctan cbrt cosh exp exp2 expm1 log log10 log1p log2 reciprocal sinc sqrt square tanh"


@pytest.mark.parametrize("module, names", [(jnp, ONE_BY_ONE), (jax.nn, "elu gelu selu sigmoid silu softplus")])
def test_what_jax_computes_entry_by_entry_needs_no_derivative_to_be_followed(module, names):
    """Its primitives, and those of its derivative, have rules, in every release of JAX."""
    x = jnp.array([0.3, 0.5])
    for function in [getattr(module, name) for name in names.split()]:
        for f in (function, lambda x: jax.jvp(function, (x,), (x,))[1]):
            for eqn in inlined(jax.make_jaxpr(f)(x)):
                real = all(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in (*eqn.invars, *eqn.outvars))
                name = eqn.primitive.name
                assert not real or name in RULES or name in ENDS or "custom" in name, (function, eqn)


def inlined(jaxpr):
    for eqn in open_jaxpr(jaxpr).eqns:
        yield from inlined(call_body(eqn)) if is_jit(eqn) else [eqn]


@pytest.mark.parametrize("lead", [(), (4,)])
def test_a_state_of_several_variables(lead):
    def step(m, x):
        h, c = m.s.value[..., 0], m.s.value[..., 1]
        m.s.value = jnp.stack([0.5 * h + matmul(x, m.w.value), 0.2 * c + h], -1)
        return m.s.value

    state = brainstate.HiddenGroupState(jnp.zeros((*lead, N, 2)))
    (group,) = compiled(step, jnp.ones((*lead, N_IN)), hidden="", s=state).hidden_groups
    assert (group.varshape, group.num_state, group.trace_state_width) == ((*lead, N), 2, 2)
    assert [[e.kind for e in row] for row in group.jacobian.D] == [["constant", "zero"], ["constant", "constant"]]
    assert [e.kind for e in group.jacobian.df[0]] == ["constant", "zero"]
    assert group.jacobian.aligned == {0}


@pytest.mark.parametrize(
    "move",
    [
        lambda h, y: jnp.concatenate(jnp.split(0.5 * h, 3)) + y,
        lambda h, y: jnp.stack([*(0.5 * h)]) + jnp.stack([y, y])[0],
        lambda h, y: 0.5 * h + jnp.tile(y, 2)[:N],
    ],
    ids=["split", "stack", "tile"],
)
def test_data_that_only_moves_keeps_its_position(move):
    def step(m, x):
        m.h.value = move(m.h.value, matmul(x, m.w.value))
        return m.h.value

    (group,) = compiled(step).hidden_groups
    assert group.jacobian.aligned == {0} and not group.jacobian.displaced
    assert repr(group.jacobian.D) == "((0.5,),)"


def test_packing_and_unpacking_a_group():
    def step(m, x):
        h, s = m.h.value, m.s.value
        m.h.value = 0.5 * h + s[..., 0] + matmul(x, m.w.value)
        m.s.value = 0.5 * s
        return m.h.value

    (group,) = compiled(step, s=brainstate.HiddenGroupState(jnp.zeros((N, 2)))).hidden_groups
    values = [jnp.arange(3.0), jnp.arange(6.0).reshape(3, 2)]
    packed = group.concat_hidden(values)
    np.testing.assert_array_equal(packed, [[0, 0, 1], [1, 2, 3], [2, 4, 5]])
    for a, b in zip(group.split_hidden(packed), values, strict=True):
        np.testing.assert_array_equal(a, b)
    group.check_consistent_varshape()
    for bad, message in [(values[:1], "2 members"), (values[::-1], r"\(3,\)")]:
        with pytest.raises(ValueError, match=message):
            group.concat_hidden(bad)
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        group.split_hidden(packed[:2])
    assert group.snap is None and group.is_diagonal_recurrence
    assert "members=['h', 's']" in repr(group) and group.dict()["num_state"] == 3


# -- the structure of D and df


@jax.custom_jvp
def spike(v):
    return (v > 1.0).astype(v.dtype)


spike.defjvp(lambda primals, tangents: (spike(primals[0]), tangents[0] / (1 + (primals[0] - 1) ** 2)))


def leaky(m, x):
    m.h.value = 0.5 * m.h.value + matmul(x, m.w.value)


def leak_per_unit(m, x):
    m.h.value = jnp.array([0.1, 0.2, 0.3]) * m.h.value + 2 * matmul(x, m.w.value)


def vanilla(m, x):
    m.h.value = jnp.tanh(matmul(x, m.w.value) + matmul(m.h.value, m.q.value))


def gated(m, x):
    m.h.value = jax.nn.sigmoid(m.h.value) * m.h.value + matmul(x, m.w.value)


def trained_leak(m, x):
    m.h.value = element_wise(m.p.value) * m.h.value + matmul(x, m.w.value)


def lif(reset):
    """Synapse g and membrane h; hand-derived D over (g, h)."""

    def step(m, x):
        g, h = m.g.value, m.h.value
        m.g.value = 0.8 * g + matmul(x, m.w.value)
        m.h.value = 0.9 * reset(h) + 0.1 * m.g.value
        return spike(m.h.value)

    return step


def soft(h):
    return h - jax.lax.stop_gradient(spike(h))


def soft_through_spike(h):
    return h - spike(h)


def hard(h):
    return h * (1 - jax.lax.stop_gradient(spike(h)))


def constant_in_disguise(m, x):
    m.h.value = jnp.exp(jnp.log(0.5)) * (m.h.value + m.h.value) - m.h.value + matmul(x, m.w.value) / 4


STRUCTURES = [  # step, hidden, D, df by operation; None: computed every step
    (leaky, "h", [[0.5]], {0: [1.0]}),
    (leak_per_unit, "h", [[[0.1, 0.2, 0.3]]], {0: [2.0]}),
    (vanilla, "h", [[0]], {0: [None], 1: [None]}),
    (gated, "h", [[None]], {0: [1.0]}),
    (trained_leak, "h", [[None]], {0: [None], 1: [1.0]}),
    (constant_in_disguise, "h", [[0]], {0: [0.25]}),
    (lif(soft), "gh", [[0.8, 0], [0.08, 0.9]], {0: [1.0, 0.1]}),
    (lif(soft_through_spike), "gh", [[0.8, 0], [0.08, None]], {0: [1.0, 0.1]}),
    (lif(hard), "gh", [[0.8, 0], [0.08, None]], {0: [1.0, 0.1]}),
]


def assert_entry(entry, expected):
    if expected is None:
        assert (entry.kind, entry.value) == ("varying", None) and entry.slot is not None
    elif np.all(np.asarray(expected) == 0):
        assert entry.kind == "zero"
    else:
        assert entry.kind == "constant"
        np.testing.assert_allclose(entry.value, expected, rtol=1e-6)
        assert np.ndim(entry.value) == np.ndim(expected)


@pytest.mark.parametrize("step, hidden, D, df", STRUCTURES)
def test_structure_is_known_before_the_first_step(step, hidden, D, df):
    extra = dict(p=ParamState(jnp.ones(N)), q=ParamState(jnp.ones((N, N))))
    graph = compiled(step, hidden=hidden, **extra)
    (group,) = graph.hidden_groups
    assert names(graph) == [list(hidden)]
    for row, expected in zip(group.jacobian.D, D, strict=True):
        for entry, value in zip(row, expected, strict=True):
            assert_entry(entry, value)
    assert set(group.jacobian.df) == set(df)
    for op, expected in df.items():
        for entry, value in zip(group.jacobian.df[op], expected, strict=True):
            assert_entry(entry, value)
    varying = sum(e is None for row in D for e in row) + sum(e is None for row in df.values() for e in row)
    assert len(group.jacobian.program.jaxpr.outvars) == varying


def test_structure_of_spiking_neurons():
    class Net(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.neu = brainpy.state.LIF(N, tau=4 * u.ms, R=1.0 * u.ohm, spk_fun=braintools.surrogate.ReluGrad())
            self.syn = brainpy.state.AlignPostProj(
                comm=braintrace.nn.Linear(N_IN, N, w_init=jnp.ones((N_IN, N)) * u.mS, b_init=None),
                syn=brainpy.state.Expon(N, tau=6 * u.ms),
                out=brainpy.state.CUBA(),
                post=self.neu,
            )

        def update(self, x):
            self.syn(x)
            self.neu()
            return self.neu.get_spike()

    net = Net()
    brainstate.nn.init_all_states(net)
    (group,) = braintrace.compile_etrace_graph(net, X).hidden_groups
    assert [p[-1] for p in group.hidden_paths] == ["g", "V"]
    (gg, gV), (Vg, VV) = group.jacobian.D
    assert_entry(gg, np.exp(-1 / 6))
    assert_entry(gV, 0)
    assert (Vg.kind, VV.kind) == ("constant", "varying")
    assert [e.kind for e in group.jacobian.df[0]] == ["constant", "constant"]


# -- the step as a flat program


def equation_names(graph):
    return [e.primitive.name for e in graph.module_info.jaxpr.eqns]


def test_nested_jit_is_inlined():
    inner = jax.jit(lambda x, w: jnp.tanh(matmul(x, w)))
    traced = inner.trace(X, jnp.ones((N_IN, N)))
    again = traced if callable(traced) else inner  # newer releases of JAX call it
    outer = jax.jit(lambda x, w: 2 * inner(x, w) + jax.nn.silu(again(x, w)))

    def step(m, x):
        m.h.value = brainstate.transform.jit(lambda x: outer(x, m.w.value) + 0.5 * m.h.value)(x)
        return m.h.value

    graph = compiled(step)
    assert not {"jit", "pjit", "closed_call", "eval_jaxpr"} & set(equation_names(graph))
    assert [r.path for r in graph.hidden_param_op_relations] == [("w",), ("w",)]


@pytest.mark.parametrize("function", [spike, jax.nn.relu])
def test_custom_derivatives_stay_whole(function):
    def step(m, x):
        m.h.value = 0.5 * m.h.value + function(matmul(x, m.w.value))
        return m.h.value

    assert equation_names(compiled(step)).count("custom_jvp_call") == 1


def test_what_nobody_needs_is_dropped():
    def step(m, x):
        jnp.sin(x).sum()
        leaky(m, x)
        return m.h.value

    assert "sin" not in equation_names(compiled(step))


def test_module_info():
    def step(m, x, scale):
        leaky(m, x)
        m.t.value = m.t.value + 1
        return {"a": m.h.value * scale, "b": x}

    model = Model(step, t=brainstate.ShortTermState(jnp.zeros(())), unread=ParamState(jnp.ones(1)))
    info = braintrace.extract_module_info(model, X, 2.0)
    assert info.compiled_state_paths == (("h",), ("w",), ("t",))
    assert info.compiled_model_states == (model.h, model.w, model.t)
    assert set(info.retrieved_model_states) == {("h",), ("w",), ("v",), ("t",), ("unread",)}
    assert info.num_var_out == 2 and len(info.jaxpr.invars) == 5 and len(info.jaxpr.outvars) == 5
    assert {p: v.aval.shape for p, v in info.hidden_path_to_invar.items()} == {("h",): (N,)}
    assert {p: [v.aval.shape for v in vs] for p, vs in info.weight_path_to_invars.items()} == {("w",): [(N_IN, N)]}
    assert list(info.invar_to_weight_path.values()) == [("w",)]
    assert info.closed_jaxpr.jaxpr is info.jaxpr and info.dict()["num_var_out"] == 2
    assert "'h'" in repr(info)


@pytest.mark.parametrize("example", [X, np.asarray(X), jax.ShapeDtypeStruct((N_IN,), jnp.float32), [0.5, -1.0]])
def test_example_inputs_may_be_abstract(example):
    def step(m, x):
        leaky(m, jnp.asarray(x))
        return m.h.value

    graph = compiled(step, example)
    assert len(graph.hidden_param_op_relations) == 1


# -- relations

CELLS = {  # cell -> (relations by first parameter and call, path class), excluded parameters and why
    "ValinaRNNCell": ({"W.weight": "all_direct"}, {}),
    "GRUCell": ({"Wz.weight": "all_direct", "Wh.weight": "all_direct"}, {"Wr.weight": "weight_to_weight"}),
    "CFNCell": (dict.fromkeys(["Wf.weight", "Wi.weight", "Wh.weight"], "all_direct"), {}),
    "MGUCell": ({"Wf.weight": "mixed", "Wh.weight": "all_direct"}, {}),
    "LSTMCell": (dict.fromkeys(["Wi.weight", "Wg.weight", "Wf.weight", "Wo.weight"], "all_direct"), {}),
    "URLSTMCell": (
        dict.fromkeys(["Wf.weight", "Wr.weight", "Wu.weight", "Wo.weight", "bias", "bias#1"], "all_direct"),
        {},
    ),
    "MinimalRNNCell": ({"phi.weight": "mixed", "W_u.weight": "all_direct"}, {}),
    "MiniGRU": (dict.fromkeys(["W_z.weight", "W_x.weight"], "all_direct"), {}),
    "MiniLSTM": (dict.fromkeys(["W_f.weight", "W_i.weight", "W_x.weight"], "all_direct"), {}),
    "LRUCell": (
        dict.fromkeys(["nu_log", "theta_log", "gamma_log", "B_re.weight", "B_im.weight"], "all_direct"),
        dict.fromkeys(["C_re.weight", "C_im.weight", "D"], "non_temporal"),
    ),
    "LeakyRateReadout": ({"W": "all_direct"}, {}),
}


def cell_graph(name, batch=None):
    cell = getattr(braintrace.nn, name)(N_IN, N)
    brainstate.nn.init_all_states(cell, **({} if batch is None else dict(batch_size=batch)))
    return braintrace.compile_etrace_graph(cell, jnp.ones((N_IN,) if batch is None else (batch, N_IN)))


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("name", CELLS)
def test_relations_of_the_shipped_cells(name, batch):
    graph = cell_graph(name, batch)
    found = {}
    for r in graph.hidden_param_op_relations:
        path, call = r.key
        (found_class,) = set(r.path_classification.values())
        found[".".join(path) + (f"#{call}" if call else "")] = found_class
    expected, excluded = CELLS[name]
    assert found == expected
    report = braintrace.CompilationReport(graph)
    assert {".".join(p): kind for p, kind in report.excluded_weights} == {
        p: f"relation_excluded_{why}" for p, why in excluded.items()
    }
    assert bool(graph.explain(kind="relation_partial_path")) == ("mixed" in expected.values())
    assert not kinds(graph, DiagnosticLevel.WARNING)


def test_the_groups_of_an_lstm_relation():
    graph = cell_graph("LSTMCell")
    (group,) = graph.hidden_groups
    assert group.hidden_paths == (("h",), ("c",))
    assert {r.path[0] for r in graph.hidden_param_op_relations} == {"Wi", "Wg", "Wf", "Wo"}
    of_output = next(r for r in graph.hidden_param_op_relations if r.path[0] == "Wo")
    assert [e.kind for e in group.jacobian.df[of_output.op_index]] == ["varying", "zero"]
    assert of_output.connected_hidden_paths == (("h",),) and set(of_output.path_classification) == {("h",)}
    of_cell = next(r for r in graph.hidden_param_op_relations if r.path[0] == "Wf")
    assert of_cell.connected_hidden_paths == group.hidden_paths


def test_fields_of_a_relation():
    graph = cell_graph("ValinaRNNCell", 2)
    (r,) = graph.hidden_param_op_relations
    assert r.primitive.name == "etp_mm" and r.path == ("W", "weight")
    assert (r.x_var.aval.shape, r.y_var.aval.shape) == ((2, N_IN + N), (2, N)) and (r.x, r.y) == (r.x_var, r.y_var)
    assert [g.index for g in r.hidden_groups] == [0] and r.connected_hidden_paths == (("h",),)
    assert r.eqn_params == {"has_bias": True, "weight_fn": None, "bias_fn": None}
    assert r.path_classification == {("h",): "all_direct"}
    assert r.trainable_paths == {"weight": ("W", "weight"), "bias": ("W", "weight")}
    assert r.trainable_leaf_indices == {"weight": 1, "bias": 0}
    assert {k: v.aval.shape for k, v in r.trainable_vars.items()} == {"weight": (N_IN + N, N), "bias": (N,)}
    assert set(map(type, r.trainable_param_states.values())) == {ParamState}
    assert "etp_mm" in repr(r) and r.dict()["key"] == (("W", "weight"), 0) == r._asdict()["key"]


def test_one_operation_may_feed_several_groups():
    def step(m, x):
        y = matmul(x, m.w.value)
        m.h.value, m.b.value = 0.5 * m.h.value + y, 0.2 * m.b.value - y
        return m.h.value

    (r,) = compiled(step, hidden="hb").hidden_param_op_relations
    assert [g.index for g in r.hidden_groups] == [0, 1]


def test_a_layer_does_not_feed_the_group_behind_the_next():
    layers = brainstate.nn.Sequential(*(braintrace.nn.LeakyRateReadout(n, N) for n in (N_IN, N)))
    brainstate.nn.init_all_states(layers)
    first, second = braintrace.compile_etrace_graph(layers, X).hidden_param_op_relations
    assert [g.index for r in (first, second) for g in r.hidden_groups] == [0, 1]


# -- diagnostics


def readout(m, x):
    leaky(m, x)
    return matmul(m.h.value, m.q.value)


def constant_weight(m, x):
    leaky(m, x)
    m.h.value = m.h.value + matmul(x, jnp.ones((N_IN, N)))


def constant_bias(m, x):
    m.h.value = 0.5 * m.h.value + matmul(x, m.w.value, jnp.ones(N))


def weight_of_weight(m, x):
    leaky(m, matmul(x, m.a.value))


def direct_and_through(m, x):
    y = matmul(x, m.w.value)
    m.h.value = 0.5 * m.h.value + y + matmul(y, m.q.value)


def other_shape(m, x):
    leaky(m, x)
    y = matmul(x, m.q6.value).reshape(2, N)
    m.h.value = m.h.value + y.sum(0) + jnp.roll(y[0], 1)  # an entry acts on two units: no gate


two_outputs = braintrace.register_primitive("two_outputs", lambda x, w: (2 * x, x @ w), y_outvar_index=1)


def several_outputs(m, x):
    m.h.value = 0.5 * m.h.value + two_outputs.bind(x, m.w.value)[1]


def unread(m, x):
    leaky(m, x)


def noisy(m, x):
    leaky(m, x + brainstate.random.normal(size=(N_IN,)))


def cut_by_a_product(m, x):
    leaky(m, x)
    m.b.value = (element_wise(m.p.value) * m.h.value) @ jnp.ones((N, N)) + 0.5 * m.b.value


def product_with(multiply):
    def step(m, x):
        m.h.value = jnp.tanh(multiply(m.h.value, m.q.value) + matmul(x, m.w.value))
        return m.h.value

    return step


def in_plain_jax(combine):
    def step(m, x):
        m.h.value = 0.5 * m.h.value + combine(matmul(x, m.w.value), m.p.value)

    return step


def memory(keep, read=lambda h, t: h, output=lambda h, t: h):
    """`t` is no hidden state: written by `keep`, read by `h` and by the output."""

    def step(m, x):
        old = m.t.value
        m.h.value = 0.5 * read(m.h.value, old) + matmul(x, m.w.value)
        m.t.value = keep(old, m.h.value, m)
        return output(m.h.value, old)

    return step


def keep_output(t, h, m):
    return matmul(jnp.tanh(h), m.q.value)


def accumulate(t, h, m):
    return t + h


def mixed_by(mix):
    def step(m, x):
        m.h.value = 0.5 * mix(m.h.value) + matmul(x, m.w.value)

    return step


INFO, WARNING = DiagnosticLevel.INFO, DiagnosticLevel.WARNING
RECORDS = [  # step, kind, level, primitive, parameter
    (leaky, "relation_included", INFO, "etp_mv", "w"),
    (readout, "relation_excluded_non_temporal", INFO, "etp_mv", "q"),
    (constant_weight, "relation_excluded_no_paramstate", INFO, "etp_mv", None),
    (constant_bias, "trainable_invar_not_paramstate", INFO, "etp_mv", "w"),
    (weight_of_weight, "relation_excluded_weight_to_weight", INFO, "etp_mv", "a"),
    (direct_and_through, "relation_partial_path", INFO, "etp_mv", "w"),
    (other_shape, "relation_excluded_shape_mismatch", WARNING, "etp_mv", "q6"),
    (several_outputs, "multi_output_primitive_detected", INFO, "two_outputs", "w"),
    (unread, "state_mismatch", WARNING, None, "v"),
    (noisy, "state_mismatch", INFO, None, None),
    (cut_by_a_product, "relation_excluded_mixing", WARNING, "etp_elemwise", "p"),
    (product_with(jnp.matmul), "relation_excluded_unmarked", WARNING, None, "q"),
    (product_with(lambda h, q: q[0] * h), "relation_excluded_unmarked", WARNING, None, "q"),
    (product_with(jax.jit(lambda h, q: h @ jnp.abs(q))), "relation_excluded_unmarked", WARNING, None, "q"),
    (in_plain_jax(jnp.add), "relation_excluded_unmarked", WARNING, None, "p"),
    (in_plain_jax(lambda y, p: y * p), "relation_excluded_unmarked", WARNING, None, "p"),
    (in_plain_jax(lambda y, p: y + p[jnp.array([0, 2, 2])]), "relation_excluded_unmarked", WARNING, None, "p"),
    (
        in_plain_jax(lambda y, p: jax.ops.segment_sum(p[:2] * y[1:], jnp.array([0, 2]), N)),
        "relation_excluded_unmarked",
        WARNING,
        None,
        "p",
    ),
    (in_plain_jax(lambda y, p: y * jnp.exp(p)), "relation_excluded_unmarked", WARNING, None, "p"),
    (memory(keep_output, jnp.add), "state_not_hidden", WARNING, None, "q"),
    (memory(accumulate), "state_not_hidden", WARNING, None, None),
    (memory(accumulate, output=lambda h, t: t.sum()), "state_not_hidden", WARNING, None, None),
    (mixed_by(lambda h: jnp.roll(h, 1)), "recurrent_mixing", WARNING, None, "w"),
    (mixed_by(jax.nn.softmax), "recurrent_mixing", WARNING, None, "w"),
    (mixed_by(lambda h: h + h.mean()), "recurrent_mixing", WARNING, None, "w"),
    (mixed_by(lambda h: h @ jnp.eye(N)), "recurrent_mixing", WARNING, None, "w"),
    (mixed_by(lambda h: jnp.convolve(h, jnp.ones(3), "same")), "recurrent_mixing", WARNING, None, "w"),
]


@pytest.mark.parametrize("step, kind, level, primitive, weight", RECORDS)
def test_records(step, kind, level, primitive, weight):
    extra = dict(
        hidden="hb",
        q=ParamState(jnp.ones((N, N))),
        a=ParamState(jnp.ones((N_IN, N_IN))),
        q6=ParamState(jnp.ones((N_IN, 6))),
        p=ParamState(jnp.ones(N)),
        t=brainstate.ShortTermState(jnp.zeros(N)),
    )
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        graph = compiled(step, **extra)
    path = None if weight is None else (weight,)
    (record,) = [r for r in graph.explain(kind=kind) if r.weight_path == path]
    assert (record.level, record.primitive, record.kind) == (level, primitive, DiagnosticKind(kind))
    assert record in graph.explain(kind=DiagnosticKind(kind)) and (
        path is None or record in graph.explain(weight_path=path)
    )
    assert all(record in graph.explain(hidden_path=p) for p in record.hidden_paths)
    assert (weight is None) or f"'{weight}'" in record.message
    assert all(w.filename == __file__ for w in shown)
    texts = [str(w.message) for w in shown if issubclass(w.category, braintrace.CompilationWarning)]
    assert sum(record.message in text for text in texts) == (level is WARNING)
    assert len(texts) == sum(r.level is WARNING for r in graph.diagnostics)


SILENT = {  # what trains as documented
    "a readout": readout,
    "a plain readout": lambda m, x: leaky(m, x) or m.h.value @ m.q.value,
    "a delay of what an operation receives": memory(lambda t, h, m: jnp.tanh(h), lambda h, t: h + matmul(t, Q)),
    "a delay line": memory(lambda t, h, m: jnp.concatenate([jnp.tanh(h)[:1], t[:-1]]), lambda h, t: h + matmul(t, Q)),
    "a ring buffer": memory(lambda t, h, m: t.at[0].set(jnp.tanh(h)[0]), lambda h, t: h + matmul(t, Q)),
    "a value for the next output": lambda m, x: leaky(m, x) or setattr(m.t, "value", m.h.value),
    "no gradient": memory(lambda t, h, m: jax.lax.stop_gradient(h), jnp.add),
    "no gradient when read": memory(keep_output, lambda h, t: h + jax.lax.stop_gradient(t)),
    "a count": memory(lambda t, h, m: t + (h > 0), jnp.add),
    "a filtered input": memory(lambda t, h, m: 0.5 * t + 1, jnp.add),
    "noise": noisy,
}
Q = jnp.ones((N, N))


@pytest.mark.parametrize("name", SILENT)
def test_no_warning_where_nothing_is_to_be_done(name):
    graph = compiled(SILENT[name], q=ParamState(Q), t=brainstate.ShortTermState(jnp.zeros(N)))
    assert {r.kind for r in graph.diagnostics if r.level is WARNING} <= {DiagnosticKind.STATE_MISMATCH}  # unread ones


def buffered(read):
    """`t` holds the last values of `h`."""

    def step(m, x):
        m.h.value = 0.5 * m.h.value + read(m.t.value) + matmul(x, m.w.value)
        m.t.value = jnp.concatenate([m.t.value[1:], jnp.tanh(m.h.value)[None]])
        return m.t.value.sum(0)

    return step


@pytest.mark.parametrize("kind", [HiddenState, brainstate.ShortTermState])
def test_a_buffer_of_hidden_values_is_memory_that_no_trace_reaches(kind):
    """Unless it holds what an operation receives: then it is a delay."""
    graph = compiled(buffered(lambda t: 0.0), t=kind(jnp.zeros((2, N))))
    (record,) = graph.explain(kind="state_not_hidden")
    assert record.level is WARNING and "'t' keeps what 'h' did" in record.message
    assert "one shape" in record.message and "Make it" not in record.message

    def delay(m, x):
        buffered(lambda t: matmul(t[0], Q))(m, x)
        return m.h.value

    assert not compiled(delay, t=kind(jnp.zeros((2, N)))).explain(kind="state_not_hidden")


@pytest.mark.parametrize(
    "shape, advice", [((N,), r"HiddenState\.$"), ((2, N), "HiddenState, or several, of the shape")]
)
@pytest.mark.parametrize("scope", [dict(sparse_n=N), {}])
def test_a_delay_is_memory_of_rules_that_see_recurrent_weights(scope, shape, advice):
    def records(keep):
        def step(m, x):
            old, t = m.h.value, m.t.value
            m.h.value = jnp.tanh(0.5 * old + matmul(x, m.w.value) + matmul(t if t.ndim == 1 else t[0], Q))
            m.t.value = keep(old) if t.ndim == 1 else jnp.stack([t[1], keep(old)])
            return m.h.value

        model = Model(step, t=brainstate.ShortTermState(jnp.zeros(shape)))
        graph = braintrace.compile_etrace_graph(model, X, include_recurrent_mixing=True, **scope)
        return graph.explain(kind="state_not_hidden")

    assert not records(jax.lax.stop_gradient)
    (record,) = records(jnp.tanh)
    assert record.level is WARNING and "'t' keeps what 'h' did" in record.message
    assert "an operation takes it back there" in record.message and re.search(advice, record.message)


def written_attribute(m, x):
    m.memory = 0.9 * m.memory + matmul(x, m.w.value)
    m.h.value = jnp.tanh(0.5 * m.h.value + m.memory)
    m.seen = m.h.value
    m.log.append(m.h.value)
    return m.h.value


@pytest.mark.parametrize("start", [jnp.zeros(N), np.zeros(N), 0.0, jnp.zeros(()), jnp.zeros(N) * u.mV])
def test_memory_in_an_attribute(start):
    """One is told, and the model is as it was; what is not read is no memory."""

    def step(m, x):
        m.memory = m.memory / u.get_unit(start)
        out = written_attribute(m, x)
        m.memory = m.memory * u.get_unit(start)
        return out

    model = Model(step, memory=start, seen=None, log=[], other=[jnp.ones(2)])
    before = dict(vars(model))
    graph = braintrace.compile_etrace_graph(model, X)
    (record,) = graph.explain(kind="state_not_hidden")
    assert record.level is WARNING and "'memory' of Model" in record.message
    assert vars(model) == before and model.memory is start and model.log == []
    model.update(X)  # no traced value was left behind
    model.memory = start
    assert len(braintrace.compile_etrace_graph(model, X).explain(kind="state_not_hidden")) == 1
    assert len(model.log) == 1


def counts(m, x):
    m.k += 1
    m.h.value = matmul(x, m.w.value) + (0.5 if m.k % 2 else 0.0) * m.h.value


def is_first(m, x):
    m.h.value = matmul(x, m.w.value) + (0.0 if m.k else 0.5) * m.h.value
    m.k = False


def keeps_a_list(m, x):
    m.k[0] = m.k[0] * 2
    m.h.value = matmul(x, m.w.value) + m.k[0] * m.h.value


@pytest.mark.parametrize("step, start", [(counts, 0), (is_first, True), (keeps_a_list, [0.1])])
def test_a_number_in_an_attribute_that_a_compiled_step_does_not_move(step, start):
    """It is warned of, and neither compilation nor a comparison uses it up."""
    model = Model(step, k=start)
    (record,) = braintrace.compile_etrace_graph(model, X).explain(kind="state_not_hidden")
    assert record.level is WARNING and "'k' of Model" in record.message
    assert model.k == start and model.k is start
    with pytest.warns(braintrace.CompilationWarning, match="'k' of Model"):
        braintrace.compare(
            model, X[None], step_fn=lambda call, x: (call(x), jnp.sum(model.h.value))[1], rules=["d_rtrl"]
        )
    assert model.k == start


def sizes(m, x):
    m.k = x.shape[-1]


def builds(m, x):
    if not m.k:
        m.k = True
        m.built = [2.0]


@pytest.mark.parametrize("write, start, end", [(sizes, 0, 2), (sizes, None, 2), (builds, False, True)])
def test_a_number_that_the_step_does_not_read_is_no_memory(write, start, end):
    """It is what the step has written."""

    def step(m, x):
        write(m, x)
        m.h.value = 0.5 * m.h.value + matmul(x, m.w.value)

    model = Model(step, k=start, built=None)
    assert not braintrace.compile_etrace_graph(model, X).explain(kind="state_not_hidden")
    assert model.k == end and (write is sizes or model.built == [2.0])


@pytest.mark.parametrize("value", [float("nan"), np.bool_(True), {"calls": 1}])
def test_what_stays_the_same_is_not_written(value):
    def step(m, x):
        m.k = {"calls": 1} if isinstance(value, dict) else type(value)(value)
        m.h.value = (0.0 if m.k else 0.5) * m.h.value + matmul(x, m.w.value)

    model = Model(step, k=value)
    assert not braintrace.compile_etrace_graph(model, X).explain(kind="state_not_hidden")


def test_a_value_that_is_written_before_it_is_read_is_no_memory():
    def step(m, x):
        m.conductance = matmul(x, m.w.value)
        m.h.value = 0.5 * m.h.value + m.conductance

    assert not compiled(step, conductance=jnp.zeros(N)).explain(kind="state_not_hidden")


def test_a_state_that_is_made_by_the_step():
    def step(m, x):
        if not hasattr(m, "late"):
            m.late = HiddenState(jnp.zeros(N))
        m.late.value = 0.5 * m.late.value + matmul(x, m.w.value)
        return m.late.value

    def layer(m, x):
        if not hasattr(m, "late"):
            m.late = braintrace.nn.Linear(N_IN, N)
        m.h.value = m.late(x)

    model = Model(step)
    for update in (layer, step):
        model._step = update
        with pytest.raises(ValueError, match="'late' is.*made inside the update of Model.*init_state"):
            braintrace.compile_etrace_graph(model, X)
        assert not hasattr(model, "late")
    model.late = HiddenState(jnp.zeros(N))
    assert names(braintrace.compile_etrace_graph(model, X)) == [["late"]]


def test_a_warning_is_given_once_where_the_user_compiles():
    learner = braintrace.pp_prop(Model(memory(accumulate), t=brainstate.ShortTermState(jnp.zeros(N))), 0.9)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        learner.compile_graph(X), learner.compile_graph(X)
        learner(X), learner(braintrace.MultiStepData(X[None]))
        with brainstate.environ.context(other="setting"):
            learner(X)
    line = inspect.getsourcelines(test_a_warning_is_given_once_where_the_user_compiles)[1] + 4
    of_memory, unread = shown if "state_not" in str(shown[0].message) else shown[::-1]
    assert {(w.filename, w.lineno, w.category) for w in shown} == {(__file__, line, braintrace.CompilationWarning)}
    assert "state_not_hidden" in str(of_memory.message) and "never reads" in str(unread.message)
    with warnings.catch_warnings(record=True) as shown:
        warnings.filterwarnings("ignore", category=braintrace.CompilationWarning)
        compiled(memory(accumulate), t=brainstate.ShortTermState(jnp.zeros(N)))
    assert not shown


@pytest.mark.parametrize("vmap", [False, True])
def test_a_warning_of_compile_points_at_its_caller(vmap):
    model = Model(mixed_by(jax.nn.softmax))
    with pytest.warns(braintrace.CompilationWarning, match="recurrent_mixing") as shown:
        braintrace.compile(
            model, "pp_prop", X[None] if vmap else X, batch_size=1 if vmap else None, vmap=vmap, decay_or_rank=0.9
        )
    assert {w.filename for w in shown} == {__file__} and len(shown) == 2


def driven_through(tail):
    def step(m, x):
        m.h.value = jnp.tanh(tail(matmul(x, m.w.value)) + matmul(m.h.value, m.q.value))

    return step


@pytest.mark.filterwarnings("ignore:.*snap_pattern")
@pytest.mark.parametrize("tail, warned", [(jnp.tanh, []), (lambda y: jnp.roll(y, 1), [("w",)])], ids=["tanh", "roll"])
@pytest.mark.parametrize("rule", ["pp_prop", "d_rtrl", braintrace.SnAp])
def test_every_rule_warns_of_a_way_into_the_state_that_mixes_positions(rule, tail, warned, recwarn):
    options = dict(decay_or_rank=0.9) if rule == "pp_prop" else {}
    model = Model(driven_through(tail), q=ParamState(jnp.eye(N)))
    graph = braintrace.compile(model, rule, X, **options).graph
    kind = DiagnosticKind.TRANSITION_TAIL_BOUNDED
    assert [r.weight_path for r in graph.explain(kind=kind)] == warned
    assert any(kind.value in str(w.message) for w in recwarn) == bool(warned)


@pytest.mark.parametrize("scope", ["coupled", "diagonal"])
def test_a_rule_that_sees_the_mixing_needs_no_warning(scope):
    graph = braintrace.compile_etrace_graph(
        Model(mixed_by(jax.nn.softmax)), X, include_recurrent_mixing=scope == "coupled"
    )
    assert bool(graph.explain(kind="recurrent_mixing")) == (scope == "diagonal")


def test_context_of_records():
    graph = compiled(direct_and_through, q=ParamState(jnp.ones((N, N))))
    included = graph.explain(kind="relation_included", weight_path=("w",))[0].context
    assert included == {"hidden_group_indices": (0,), "path_classification": {("h",): "mixed"}}
    graph = compiled(weight_of_weight, a=ParamState(jnp.ones((N_IN, N_IN))))
    context = graph.explain(kind="relation_excluded_weight_to_weight")[0].context
    assert context["blocking_primitives"] == ("etp_mv",)
    assert tuple(context["blocking_weight_paths"]) == (("w",),)


def test_a_record_shows_what_it_has():
    record = CompilationRecord(DiagnosticKind.STATE_MISMATCH, WARNING, "hello")
    assert repr(record) == "CompilationRecord(kind='state_mismatch', level='warning', message='hello')"
    full = CompilationRecord(DiagnosticKind.RELATION_INCLUDED, INFO, "m", "etp_mm", ("w",), (("h",),), {"a": 1})
    assert all(f"{name}=" in repr(full) for name in ("primitive", "weight_path", "hidden_paths", "context"))
    with pytest.raises(AttributeError):
        record.kind = DiagnosticKind.RELATION_INCLUDED
    assert record == CompilationRecord(DiagnosticKind.STATE_MISMATCH, WARNING, "hello")


def test_names_of_kinds_and_levels():
    assert [level.value for level in DiagnosticLevel] == ["info", "warning", "error"]
    assert len(DiagnosticKind) == 37 and all(kind.value == kind.name.lower() == kind for kind in DiagnosticKind)
    with pytest.raises(ValueError):
        compiled(leaky).explain(kind="nothing")


def test_parameters_that_are_not_read_have_no_gradient():
    model = Model(unread)
    learner = braintrace.pp_prop(model, 0.9)
    with pytest.warns(UserWarning, match="never reads the parameter 'v'"):
        learner.compile_graph(X)
    assert set(learner.param_states) == {("w",)}
    with pytest.raises(ValueError, match="not found in the state trace"):
        grad(lambda: jnp.sum(learner(X) or model.h.value), model.states(ParamState))()


def test_random_states_advance():
    model = Model(noisy)
    learner = braintrace.pp_prop(model, 0.0)
    learner.compile_graph(X)
    assert learner.graph.explain(kind="state_mismatch")[0].level is INFO
    assert set(learner.other_states) == {("_unknown_path_0",)}
    with brainstate.random.seed_context(3):
        seen = []
        for _ in range(2):
            model.h.value = jnp.zeros(N)
            learner(jnp.zeros(N_IN))
            seen.append(model.h.value)
    assert np.abs(seen[0] - seen[1]).max() > 1e-3
    with brainstate.random.seed_context(3):
        model.h.value = jnp.zeros(N)
        learner(jnp.zeros(N_IN))
    np.testing.assert_allclose(model.h.value, seen[0], rtol=1e-6)


def test_dropout():
    model = brainstate.nn.Sequential(
        braintrace.nn.Linear(N_IN, N), brainstate.nn.Dropout(0.5), braintrace.nn.LeakyRateReadout(N, N)
    )
    brainstate.nn.init_all_states(model)
    with brainstate.environ.context(fit=True):
        learner = braintrace.pp_prop(model, 0.9)
        learner.compile_graph(X)
        masks = [learner(X) for _ in range(3)]
    assert ("_unknown_path_0",) in learner.other_states
    assert not np.allclose(masks[1] - masks[0], masks[2] - masks[1])


# -- the report


def report_of():
    def step(m, x):
        out = readout(m, x)
        m.b.value = 0.5 * m.b.value + matmul(x, m.v.value, m.bias.value)
        m.t.value = m.t.value + x.sum()
        return out * m.plain.value

    graph = compiled(
        step,
        hidden="hb",
        q=ParamState(jnp.ones((N, N))),
        bias=ParamState(jnp.ones(N)),
        plain=ParamState(jnp.ones(N)),
        t=brainstate.ShortTermState(jnp.zeros(())),
        unread=ParamState(jnp.ones(N)),
    )
    return braintrace.CompilationReport(graph)


def test_fields_of_the_report():
    report = report_of()
    assert report.hidden_groups == [(0, [("h",)]), (1, [("b",)])]
    assert report.etrace_weights == [(("w",), [0]), (("v",), [1]), (("bias",), [1])]
    assert sorted(report.excluded_weights) == [(("plain",), None), (("q",), "relation_excluded_non_temporal")]
    assert report.dynamic_states == [("t",)]
    assert report.diagnostics is report.graph.diagnostics
    assert isinstance(braintrace.CompilationReport.graph, property)
    counts = dict(hidden_groups=2, etrace_weights=3, excluded_weights=2, warnings=1, errors=0)
    assert report.counts == counts
    assert repr(report) == f"CompilationReport({', '.join(f'{k}={v}' for k, v in counts.items())})"


def test_a_merged_parameter_appears_once_per_key():
    report = braintrace.CompilationReport(cell_graph("ValinaRNNCell"))
    assert report.etrace_weights == [(("W", "weight"), [0])] * 2


@pytest.mark.parametrize("level", [1, 2])
def test_text_of_the_report(level, capsys):
    report = report_of()
    text = report.to_str(level)
    order = [
        re.search(row, text).start()
        for row in (" 0 +h", " 1 +b", " t\n", " w +etp", " v +etp", " bias +etp", " q +reaches")
    ]
    assert order == sorted(order)
    assert "reaches no hidden state" in text and ("never reads" in text) == (level == 2)
    report.show(level)
    assert capsys.readouterr().out == text + "\n"
    target = io.StringIO()
    report.show(level, file=target)
    assert target.getvalue() == text + "\n" and capsys.readouterr().out == ""


def test_what_is_empty_is_left_out():
    text = braintrace.CompilationReport(cell_graph("ValinaRNNCell")).to_str(2)
    assert "W.weight" in text and "Other" not in text and "Warning" not in text and "only" not in text


def test_show_graph(capsys):
    learner = braintrace.compile(braintrace.nn.GRUCell(N_IN, N), "pp_prop", X, decay_or_rank=0.9)
    assert learner.show_graph() is None
    assert capsys.readouterr().out.strip() == learner.report.to_str(1)
    assert learner.show_graph(verbose=False) is None and capsys.readouterr().out == ""
    assert learner.show_graph(verbose=False, return_msg=True).strip() == learner.report.to_str(1)


def test_the_report_in_a_notebook():
    html = report_of()._repr_html_()
    assert html.count("<table>") == html.count("</table>") == 5
    for cell in ("h", "t", "plain", "q", "reaches no hidden state", "etp_mv", "[1]", "state_mismatch"):
        assert f"<td>{cell}</td>" in html
    assert "&#x27;unread&#x27;" in html and "'" not in html


def drawing_of(model, x):
    brainstate.nn.init_all_states(model)
    report = braintrace.CompilationReport(braintrace.compile_etrace_graph(model, x))
    drawings = re.findall(r"<svg.*?</svg>", report._repr_html_())
    return report, [xml.etree.ElementTree.fromstring(d) for d in drawings]


def test_the_report_draws_the_model():
    stack = brainstate.nn.Sequential(
        braintrace.nn.LSTMCell(2, 3), braintrace.nn.GRUCell(3, 3), braintrace.nn.Linear(3, 1)
    )
    report, (svg,) = drawing_of(stack, jnp.zeros(2))
    of_kind = lambda tag: svg.findall(f"{{http://www.w3.org/2000/svg}}{tag}")  # noqa: E731
    words = {text.text for text in of_kind("text")}
    assert {"input", "output", "layers.1.Wr.weight", "layers.0.h, layers.0.c", "shape (3,), S = 2"} <= words
    boxes = [[float(rect.get(k)) for k in ("x", "y", "width", "height")] for rect in of_kind("rect")]
    for (x, y, width, height), (x2, y2, width2, height2) in itertools.combinations(boxes, 2):
        assert x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y
    total = float(svg.get("width"))
    assert all(x >= 0 and y >= 0 and x + width <= total for x, y, width, _ in boxes)
    arrows = report.to_mermaid().count("-->") + report.to_mermaid().count("==>") + report.to_mermaid().count("--x")
    assert len(of_kind("path")) == arrows + report.to_mermaid().count("-.->")


def test_a_model_too_large_to_be_read_is_not_drawn():
    _, drawings = drawing_of(brainstate.nn.Sequential(*(braintrace.nn.LSTMCell(2, 2) for _ in range(9))), jnp.zeros(2))
    assert drawings == []


def test_the_report_as_a_diagram():
    def step(m, x):
        y = matmul(x, m.w.value) + matmul(m.h.value, m.q.value)
        m.h.value = 0.5 * m.h.value + y
        m.b.value = jnp.tanh(matmul(m.h.value, m.q.value)) + 0.0 * jax.lax.stop_gradient(m.b.value)
        return matmul(m.b.value, m.q.value) + x.sum()

    text = braintrace.CompilationReport(compiled(step, hidden="hb", q=ParamState(jnp.ones((N, N))))).to_mermaid()
    lines = [line.strip() for line in text.split("\n")]
    assert lines[0] == "flowchart LR"
    edges = set(lines) - {line for line in lines if "[" in line}
    assert {
        "x --> op0",
        "g0 --x|cut| op1",  # recurrence through a weight
        "op0 ==>|traced| g0",
        "op1 ==>|traced| g0",
        "g0 ==>|D| g0",
        "g0 -.->|current step| op2",  # the layer below
        "op2 ==>|traced| g1",
        "g1 -.->|current step| op3",
        "op3 -.->|current step| out",
        "x --> out",
    } <= edges
    assert not [e for e in edges if e.startswith("g1 ==>") or e.endswith("op3| g1")]
    assert 'op3["q<br/>etp_mv"]' in lines


# -- the parts of a compilation, one by one


def lstm_graph():
    cell = braintrace.nn.LSTMCell(N_IN, N)
    brainstate.nn.init_all_states(cell)
    cell.h.value, cell.c.value = jnp.array([0.3, -0.1, 0.2]), jnp.array([0.5, 0.1, -0.4])
    return cell, braintrace.compile_etrace_graph(cell, X)


def read_inputs(group, cell):
    """Values of what a transition reads, by running the step up to them."""
    info = braintrace.extract_module_info(cell, X)
    values = [X, *jax.tree.leaves([s.value for s in info.compiled_model_states])]
    env = dict(zip(info.jaxpr.invars, values))
    for eqn in info.jaxpr.eqns:
        outs = eqn.primitive.bind(*[v.val if hasattr(v, "val") else env[v] for v in eqn.invars], **eqn.params)
        env.update(zip(eqn.outvars, outs if eqn.primitive.multiple_results else [outs]))
    own = next(g for g in braintrace.find_hidden_groups_from_minfo(info)[0] if g.index == group.index)
    return own, [env[v] for v in own.transition_jaxpr_constvars]


def test_the_transition_of_a_group():
    cell, graph = lstm_graph()
    group, inputs = read_inputs(graph.hidden_groups[0], cell)
    old = [cell.h.value, cell.c.value]
    D, full = group.diagonal_jacobian(old, inputs), group.full_jacobian(old, inputs)
    assert D.shape == (N, 2, 2) and full.shape == (N, 2, N, 2)
    assert len(group.transition_jaxpr.invars) == 2 + len(inputs) and len(group.transition_jaxpr.outvars) == 2
    new = group.transition(old, inputs)
    cell(X)
    np.testing.assert_allclose(new[0], cell.h.value, rtol=1e-6)
    np.testing.assert_allclose(new[1], cell.c.value, rtol=1e-6)
    shift = 1e-3
    for b in range(2):
        moved = [o + shift * (i == b) for i, o in enumerate(old)]
        slope = [(p - q) / shift for p, q in zip(group.transition(moved, inputs), new)]
        np.testing.assert_allclose(D[..., b], jnp.stack(slope, -1), atol=2e-3)
    for i in range(N):
        np.testing.assert_allclose(full[i, :, i], D[i], rtol=1e-6)
        assert np.all(np.delete(full[i], i, axis=1) == 0)
    for bad in ((old[:1], inputs), (old, inputs[:-1]), ([o[:2] for o in old], inputs)):
        for method in (group.transition, group.diagonal_jacobian, group.full_jacobian):
            with pytest.raises(ValueError, match="shapes"):
                method(*bad)


@pytest.mark.parametrize(
    "make",
    [
        lambda cell, **options: braintrace.compile_etrace_graph(cell, X, **options),
        lambda cell, **options: braintrace.find_hidden_groups_from_module(cell, X, **options),
        lambda cell, **options: braintrace.ETraceGraphExecutor(cell, **options),
        lambda cell, **options: braintrace.ETraceVjpGraphExecutor(cell, **options),
    ],
)
@pytest.mark.parametrize("name", ["sparse_n", "snap_max_jacobian_elements"])
def test_numbers_of_a_scope(make, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        make(lstm_graph()[0], **{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an int of at least 1, got 2.0"):
        make(lstm_graph()[0], **{name: 2.0})
    with pytest.raises(braintrace.NotSupportedError, match="sparse_n=2.*include_recurrent_mixing=True"):
        make(lstm_graph()[0], sparse_n=2)


@pytest.mark.filterwarnings("ignore")
def test_scopes():
    widths = {}
    for name, options in {
        "coupled": {"include_recurrent_mixing": True},
        "neighbours": {"include_recurrent_mixing": True, "sparse_n": 2},
    }.items():
        groups, _ = braintrace.find_hidden_groups_from_module(lstm_graph()[0], X, **options)
        (group,) = braintrace.compile_etrace_graph(lstm_graph()[0], X, **options).hidden_groups
        assert [g.hidden_paths for g in groups] == [group.hidden_paths]
        assert not group.is_diagonal_recurrence
        widths[name] = group.trace_state_width
    assert widths == {"coupled": 2, "neighbours": 2 * lstm_graph()[0].out_size[-1]}
    assert lstm_graph()[1].hidden_groups[0].is_diagonal_recurrence


def test_keyword_arguments_of_a_model():
    def step(m, x, scale):
        leaky(m, scale * x)
        return m.h.value

    class Keywords(Model):
        def update(self, x, *, scale):
            return step(self, x, scale)

    info = braintrace.extract_module_info(Keywords(step), X, scale=jnp.asarray(2.0))
    assert len(info.jaxpr.invars) == 4 and info.num_var_out == 1


def test_compiling_within_the_tracing_of_a_step():
    def step(m, x):
        braintrace.compile_etrace_graph(Model(leaky), X)

    with pytest.raises(NotImplementedError, match="while a step of another one is traced"):
        compiled(step)
    compiled(leaky)  # the guard is gone


def test_graph_is_a_named_tuple():
    graph = compiled(leaky)
    assert graph._asdict() == graph.dict() and graph.dict()["hidden_groups"] is graph.hidden_groups
    assert isinstance(graph.hidden_groups, list) and isinstance(graph.diagnostics, tuple)
    assert "'w'" in repr(graph)
    assert graph.explain() == graph.diagnostics


# -- compiling within a traced program


def test_compiling_inside_jit():
    """A training script that makes and compiles its learner anew in every jitted step."""
    model = braintrace.nn.GRUCell(N_IN, N)
    brainstate.nn.init_all_states(model)
    weights = model.states(ParamState)
    xs = jnp.stack([X, 2 * X, -X])

    def sequence(xs):
        learner = braintrace.compile(model, braintrace.pp_prop, xs[0], decay_or_rank=0.9)
        return learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).sum(), weights=weights)

    eager = sequence(xs)
    jitted = brainstate.transform.jit(sequence)
    for _ in range(2):
        for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted(xs)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_traced_constant_of_the_model_is_computed_every_step():
    def run(leak):
        def step(m, x):
            m.h.value = leak * m.h.value + matmul(x, m.w.value)
            return m.h.value

        model = Model(step)
        learner = braintrace.pp_prop(model, 0.9)
        learner.compile_graph(X)
        kinds.append(learner.graph.hidden_groups[0].jacobian.D[0][0].kind)
        learner(X)
        return grad(lambda: learner(-X).sum(), learner.param_states)()[("w",)]

    kinds = []
    np.testing.assert_allclose(brainstate.transform.jit(run)(jnp.asarray(0.5)), run(0.5), rtol=1e-5)
    assert kinds == ["varying", "constant"]


# -- what a step may not do


def writes_parameter(m, x):
    leaky(m, x)
    m.w.value = m.w.value * 0.9


def changes_unit(m, x):
    leaky(m, x)
    m.s.value = m.s.value * u.second


def loses_unit(m, x):
    leaky(m, x)
    m.s.value = m.s.value.to_decimal(u.mV)


def changes_scale(m, x):
    leaky(m, x)
    m.s.value = u.math.ones(N) * u.volt


def changes_shape(m, x):
    leaky(m, x)
    m.h.value = jnp.zeros((2, N))


FORBIDDEN = [
    (writes_parameter, braintrace.NotSupportedError, "'w'"),
    (changes_unit, ValueError, r"'s'.*from mV to (mWb|mV \* s)"),
    (loses_unit, ValueError, "'s'.*from mV to 1"),
    (changes_scale, ValueError, r"'s'.*from mV to V"),
    (changes_shape, ValueError, r"'h'.*\(3,\).*\(2, 3\)"),
]


@pytest.mark.parametrize("step, error, message", FORBIDDEN)
def test_forbidden_steps(step, error, message):
    with pytest.raises(error, match=message):
        compiled(step, s=brainstate.ShortTermState(jnp.ones(N) * u.mV))


@pytest.mark.parametrize("make", [braintrace.compile_etrace_graph, braintrace.extract_module_info])
def test_the_model_must_be_a_module(make):
    with pytest.raises(AssertionError, match="function"):
        make(lambda x: x, X)


class Adapting(brainstate.nn.Module):
    """A potential and two currents per neuron: one state of two axes, or one with two values per position."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.w = kind, brainstate.ParamState(jnp.linspace(-1.0, 1.0, 6).reshape(2, 3))

    def init_state(self, **_):
        self.v, self.a = brainstate.HiddenState(jnp.zeros(3)), self.kind(jnp.zeros((3, 2)))

    def update(self, x):
        y = braintrace.matmul(x, self.w.value)
        self.v.value = jnp.tanh(0.8 * self.v.value + y - self.a.value.sum(-1))
        self.a.value = jnp.array([0.9, 0.5]) * self.a.value + 0.3 * self.v.value[:, None]
        return self.v.value


def test_states_that_depend_on_each_other_and_form_no_group():
    xs = jax.random.normal(jax.random.key(1), (6, 2))

    def by_hand(w):
        v, a, loss = jnp.zeros(3), jnp.zeros((3, 2)), 0.0
        for x in xs:
            v = jnp.tanh(0.8 * v + x @ w - a.sum(-1))
            a = jnp.array([0.9, 0.5]) * a + 0.3 * v[:, None]
            loss += (v**2).sum()
        return loss

    def gradient(kind):
        learner = braintrace.compile(Adapting(kind), "d_rtrl", xs[0])
        found = learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).sum(), reduction="sum")
        return found["w",], jax.grad(by_hand)(learner.param_states["w",].value)

    with pytest.warns(braintrace.CompilationWarning, match=r"'v', 'a'.*\(3,\), \(3, 2\).*'w'.*HiddenGroupState"):
        found, right = gradient(brainstate.HiddenState)
    assert not np.allclose(found, right, rtol=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", braintrace.CompilationWarning)
        found, right = gradient(brainstate.HiddenGroupState)
    np.testing.assert_allclose(found, right, rtol=1e-5)
