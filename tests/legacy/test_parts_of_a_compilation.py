"""The compiler's passes one at a time, and a step's derivatives, as older code asks for them."""

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate.transform import grad
from test_compiler import N_IN, Model, N, X, compiled, kinds, lstm_graph, names, read_inputs

import braintrace
from braintrace import matmul

pytestmark = [
    pytest.mark.usefixtures("time_step"),
    pytest.mark.filterwarnings("ignore:.*relation_"),
    pytest.mark.filterwarnings("ignore:.*state_mismatch"),
]


def test_parts_agree_with_the_whole():
    cell, graph = lstm_graph()
    minfo = braintrace.extract_module_info(cell, X)
    groups, group_of = braintrace.find_hidden_groups_from_minfo(minfo)
    relations = braintrace.find_hidden_param_op_relations_from_minfo(minfo, group_of)
    assert names(graph) == [["h", "c"]] and repr(groups) == repr(graph.hidden_groups)
    assert repr(braintrace.find_hidden_groups_from_module(cell, X)[0]) == repr(groups)
    assert {p: g.index for p, g in group_of.items()} == {p: g.index for p, g in graph.hid_path_to_group.items()}
    of_module = braintrace.find_hidden_param_op_relations_from_module(cell, X)
    for found in (relations, of_module):
        assert [r.key for r in found] == [r.key for r in graph.hidden_param_op_relations]
    assert all(g.dict() == g._asdict() for g in groups) and all(r.dict() == r._asdict() for r in relations)
    (group,) = groups
    assert group.hidden_invars == [minfo.hidden_path_to_invar[p] for p in group.hidden_paths]
    assert group.hidden_outvars == [minfo.hidden_path_to_outvar[p] for p in group.hidden_paths]


def test_hidden_perturbation():
    cell, graph = lstm_graph()
    for made in (graph.hidden_perturb, braintrace.add_hidden_perturbation_in_module(cell, X)):
        assert made.perturb_hidden_paths == (("h",), ("c",)) and made.perturb_hidden_states == (cell.h, cell.c)
        assert [v.aval.shape for v in made.perturb_vars] == [(N,), (N,)]
        assert "'h': (3,)" in repr(made) and made.dict() == made._asdict()
    zeros = made.init_perturb_data()
    assert [z.shape for z in zeros] == [(N,), (N,)] and not np.any(zeros)
    inputs = [X, *jax.tree.leaves([s.value for s in graph.module_info.compiled_model_states])]
    out, new_h, new_c = (made.eval_jaxpr(inputs, zeros)[i] for i in (0, *hidden_outputs(graph)))
    np.testing.assert_allclose(out, cell(X), rtol=1e-6)
    shifted = made.eval_jaxpr(inputs, [zeros[0], 0.1 + zeros[1]])
    index_h, index_c = hidden_outputs(graph)
    np.testing.assert_allclose(shifted[index_c], new_c + 0.1, rtol=1e-5)
    assert np.abs(shifted[index_h] - new_h).max() > 1e-3  # h reads the new c
    assert np.array_equal(made.eval_jaxpr(inputs, zeros, (), ())[0], out)
    h, c = jnp.arange(3.0), 3 + jnp.arange(3.0)
    (joined,) = made.perturb_data_to_hidden_group_data([h, c], graph.hidden_groups)
    np.testing.assert_array_equal(joined, jnp.stack([h, c], -1))
    one = jnp.ones(N)
    for bad in ([zeros[:1]], [zeros, [one]], [zeros, [], [one]]):
        with pytest.raises(ValueError, match=r"There must be (2 perturb|0 values of by).*got 1\."):
            made.eval_jaxpr(inputs, *bad)
    for method in (made.perturb_data_to_hidden_group_data, made.bypass_hidden_data_to_hidden_group_data):
        with pytest.raises(ValueError, match=r"There must be (2 perturb|0 values of by).*got 1\."):
            method([one], graph.hidden_groups)
    assert braintrace.compile_etrace_graph(cell, X, include_hidden_perturb=False).hidden_perturb is None


def hidden_outputs(graph):
    info = graph.module_info
    where = dict(zip(info.compiled_state_paths, info.state_leaves))
    return [info.num_var_out + where[p][0] for p in (("h",), ("c",))]


@pytest.mark.parametrize(
    "write",
    [
        lambda m, h, y: (h + y, h + y),  # two values
        lambda m, h, y: (y, y),  # one for both
        lambda m, h, y: (y, h),  # an old one handed on
        lambda m, h, y: (y, jnp.ones(N)),  # a constant
    ],
)
def test_every_new_value_is_perturbed(write):
    def step(m, x):
        m.h.value, m.b.value = write(m, m.h.value, matmul(x, m.w.value))
        return m.b.value.sum()

    graph = compiled(step, hidden="hb")
    made, info = graph.hidden_perturb, graph.module_info
    inputs = [X, *jax.tree.leaves([s.value for s in info.compiled_model_states])]
    zeros = made.init_perturb_data()
    plain = made.eval_jaxpr(inputs, zeros)
    where = dict(zip(info.compiled_state_paths, info.state_leaves))
    for i, path in enumerate(made.perturb_hidden_paths):
        shifted = made.eval_jaxpr(inputs, [z + (i == j) for j, z in enumerate(zeros)])
        n = info.num_var_out + where[path][0]
        np.testing.assert_allclose(shifted[n] - plain[n], 1, rtol=1e-5)


def test_outputs_that_bypass_the_new_values():
    """They need no inputs of their own; what is asked about them is answered all the same."""

    def step(m, x):
        y = matmul(x, m.w.value)
        m.h.value, m.b.value, old = y + m.h.value, jnp.tanh(y) + m.b.value * m.h.value, m.b.value
        m.g.value = 0.5 * m.g.value + matmul(x, m.v.value)[:, None]
        return old + y

    model = Model(step, "hb", g=brainstate.HiddenGroupState(jnp.zeros((N, 2))))
    on, graph = [braintrace.compile_etrace_graph(model, X, include_output_bypass=flag) for flag in (True, False)]
    assert repr(on) == repr(graph) and on.diagnostics == graph.diagnostics
    assert names(graph) == [["h", "b"], ["g"]] and not [k for k in kinds(graph) if "bypass" in k]
    made = graph.hidden_perturb
    for name in ("bypass_param_paths", "bypass_vars", "bypass_hidden_paths", "bypass_hidden_vars"):
        assert getattr(made, name) == () and made._field_defaults[name] == ()
    for found, shape in zip(made.bypass_hidden_data_to_hidden_group_data((), graph.hidden_groups), [(N, 2)] * 2):
        np.testing.assert_array_equal(found, jnp.zeros(shape), strict=True)
    value = jnp.arange(1.0, N + 1)
    named = made._replace(bypass_hidden_paths=(("b",),))
    pair, other = named.bypass_hidden_data_to_hidden_group_data([value], graph.hidden_groups)
    np.testing.assert_array_equal(pair, jnp.stack([jnp.zeros(N), value], -1))
    np.testing.assert_array_equal(other, jnp.zeros((N, 2)))


find_groups = braintrace.find_hidden_groups_from_minfo
find_relations = braintrace.find_hidden_param_op_relations_from_minfo
add_perturbation = braintrace.add_hidden_perturbation_from_minfo
IDS, PATHS = frozenset({1}), frozenset({("h",)})
IGNORED = dict(descended_scan_eqn_ids=IDS, descended_hidden_paths=PATHS)
WITHOUT_EFFECT = [  # a call with the graph's step and groups; what it finds of the graph
    (lambda info, _: find_groups(info, False, None, 9, IDS, PATHS)[0], "hidden_groups"),
    (lambda info, _: find_groups(info, **IGNORED)[0], "hidden_groups"),
    (lambda info, group_of: find_relations(info, group_of, IDS), "hidden_param_op_relations"),
    (lambda info, group_of: find_relations(info, group_of, **IGNORED), "hidden_param_op_relations"),
    (lambda info, _: add_perturbation(info, IDS, False), "hidden_perturb"),
    (lambda info, _: add_perturbation(info, include_output_bypass=False, **IGNORED), "hidden_perturb"),
]


@pytest.mark.parametrize("call, part", WITHOUT_EFFECT)
def test_arguments_without_effect(call, part):
    _, graph = lstm_graph()
    assert repr(call(graph.module_info, graph.hid_path_to_group)) == repr(getattr(graph, part))


@pytest.mark.parametrize("method, has", [("single-step", True), ("multi-step", False)])
def test_only_single_step_learners_have_a_perturbation(method, has):
    cell, _ = lstm_graph()
    learner = braintrace.D_RTRL(cell, vjp_method=method)
    learner.compile_graph(X)
    assert (learner.graph.hidden_perturb is not None) == has


# -- derivatives from an executor


@pytest.mark.parametrize("window", [False, True])
def test_derivatives_from_an_executor(window):
    cell, graph = lstm_graph()
    group, inputs = read_inputs(graph.hidden_groups[0], cell)
    executor = braintrace.ETraceVjpGraphExecutor(cell, "multi-step" if window else "single-step")
    executor.compile_graph(X)
    before = cell.h.value
    arg = braintrace.MultiStepData(jnp.stack([X, -X])) if window else X
    out, hidden, other, (xs, dfs), Ds, last = executor.solve_h2w_h2h_jacobian(arg)
    lead = (2,) if window else ()
    assert out.shape == (*lead, N) and set(hidden) == {("h",), ("c",)} and other == {} and last is None
    assert cell.h.value is before
    keys = [r.key for r in graph.hidden_param_op_relations]
    assert set(xs) == set(keys) and all(x.shape == (*lead, N_IN + N) for x in xs.values())
    assert set(dfs) == {(key, 0) for key in keys} and all(f.shape == (*lead, N, 2) for f in dfs.values())
    first = Ds[0][0] if window else Ds[0]
    np.testing.assert_allclose(first, group.diagonal_jacobian([before, cell.c.value], inputs), rtol=1e-5)
    outs = [cell(x) for x in ((X, -X) if window else (X,))]
    np.testing.assert_allclose(out, jnp.stack(outs) if window else outs[0], rtol=1e-5)
    np.testing.assert_allclose(hidden["h",], cell.h.value, rtol=1e-5)


@pytest.mark.parametrize("window", [False, True])
def test_a_stepper_rolls_a_trace(window):
    cell, _ = lstm_graph()
    executor = braintrace.ETraceVjpGraphExecutor(cell)
    executor.compile_graph(X)
    arg = braintrace.MultiStepData(jnp.stack([X, -X])) if window else X

    def stepper(trace, xs_and_dfs, Ds):
        xs, _ = xs_and_dfs
        return 0.5 * trace + xs[("Wi", "weight"), 0] + Ds[0].sum()

    _, _, _, (xs, _), Ds, _ = executor.solve_h2w_h2h_jacobian(arg)
    *_, jacobians, no_Ds, trace = executor.solve_h2w_h2h_jacobian(arg, etrace_stepper=stepper, init_etrace=jnp.ones(5))
    assert jacobians is None and no_Ds is None
    expected = jnp.ones(5)
    for t in range(2) if window else [...]:
        expected = stepper(expected, ({k: x[t] for k, x in xs.items()}, None), [Ds[0][t]])
    np.testing.assert_allclose(trace, expected, rtol=1e-5)


def test_backward_from_an_executor():
    cell, _ = lstm_graph()
    executor = braintrace.ETraceVjpGraphExecutor(cell)
    executor.compile_graph(X)
    out, hidden, other, _, _, backward, _ = executor.solve_h2w_h2h_l2h_jacobian(X)
    bars = (RAMP := jnp.arange(1.0, N + 1), jax.tree.map(jnp.zeros_like, hidden), other)
    (x_bar,), state_bars, signals = backward(bars)
    x_by_grad = grad(lambda x: (cell(x) * RAMP).sum())(X)
    np.testing.assert_allclose(x_bar, x_by_grad, rtol=1e-4, atol=1e-6)
    assert {p for p in state_bars if p in hidden} == set(hidden)
    np.testing.assert_allclose(signals["h",], RAMP, rtol=1e-6)
    np.testing.assert_array_equal(signals["c",], jnp.zeros(N))


@pytest.mark.parametrize("bypass", [True, False])
def test_every_output_has_its_credit_in_an_executor(bypass):
    def step(m, x):
        old, y = m.h.value, matmul(x, m.w.value)
        m.h.value = jnp.tanh(0.5 * old + y)
        return (old + jnp.sin(y)) * m.v.value[0]

    executor = braintrace.ETraceVjpGraphExecutor(Model(step), include_output_bypass=bypass)
    assert executor.include_output_bypass is bypass
    executor.compile_graph(X)
    bar = jnp.arange(1.0, N + 1)
    *_, backward, _ = executor.solve_h2w_h2h_l2h_jacobian(X)
    (x_bar,), bars, _ = backward((bar, {("h",): jnp.zeros(N)}, {}))
    w, v = (executor.states[name,].value for name in "wv")
    by_y = bar * v[0] * jnp.cos(X @ w)
    np.testing.assert_allclose(x_bar, w @ by_y, rtol=1e-6)
    np.testing.assert_allclose(bars["w",], jnp.outer(X, by_y), rtol=1e-6)
    np.testing.assert_allclose(bars["h",], bar * v[0], rtol=1e-6)
    np.testing.assert_allclose(bars["v",][0], bar * jnp.sin(X @ w), rtol=1e-6)


def test_an_executor_says_what_it_takes():
    cell, _ = lstm_graph()
    executor = braintrace.ETraceVjpGraphExecutor(cell)
    with pytest.raises(ValueError, match="compile_graph"):
        executor.solve_h2w_h2h_jacobian(X)
    executor.compile_graph(X)
    with pytest.raises(ValueError, match="structure"):
        executor.solve_h2w_h2h_jacobian(X, X)
