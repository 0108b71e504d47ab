"""Loops and branches: the same model written without them is the reference."""

import warnings

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate import HiddenState, ParamState
from brainstate.transform import for_loop, grad
from jax.lax import cond, fori_loop, scan, switch, while_loop

import braintrace
from braintrace import ControlFlowPolicy, DiagnosticKind, DiagnosticLevel, element_wise, matmul

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*relation_"),
    pytest.mark.filterwarnings("ignore:.*state_mismatch"),
]

XS = jnp.array([[0.5, -1.0], [-0.3, 0.8], [0.7, 0.2]])
RAMP = jnp.arange(1.0, 4.0)
INFO, WARNING = DiagnosticLevel.INFO, DiagnosticLevel.WARNING


class Model(brainstate.nn.Module):
    """`step(m, x)` of two inputs, three units `h`, and the parameters w (2, 3), r (3, 3) and p (3,)."""

    def __init__(self, step):
        super().__init__()
        self._step = step
        self.w = ParamState(jnp.array([[0.3, 0.4, -0.5], [0.6, -0.2, 0.1]]))
        self.r = ParamState(jnp.array([[0.2, 0.1, -0.3], [0.4, 0.3, 0.1], [-0.1, 0.2, 0.5]]))
        self.p = ParamState(jnp.array([0.3, 0.5, 0.7]))
        self.init_state()

    def init_state(self, **_):
        self.h = HiddenState(0.2 * RAMP)

    def update(self, x):
        return self._step(self, x)


def drive(m, x):
    return matmul(x, m.w.value)


def loss(out):
    return (out * RAMP).sum()


def online(step, rule, **options):
    """Values and gradients at every step."""
    model = Model(step)
    learner = rule(model, **options)
    learner.compile_graph(XS[0])
    step = brainstate.transform.jit(
        grad(lambda x: loss(learner(x)), learner.param_states, return_value=True),
    )
    results = [(step(x), model.h.value) for x in XS]
    return [(value, h, {p[0]: g for p, g in grads.items()}) for (grads, value), h in results], learner


def backprop(step):
    model = Model(step)
    gradients = grad(lambda: loss(model(XS[0])), model.states(ParamState), check_states=False)()
    return {p[0]: g for p, g in gradients.items()}


RULES = {
    "pp_prop": lambda model, **options: braintrace.pp_prop(model, 0.9, **options),
    "D_RTRL": braintrace.D_RTRL,
}

# -- each step with control flow, and by hand


def branch(m, x):
    h, y = m.h.value, drive(m, x)
    m.h.value = cond(x[0] > 0, lambda: jnp.tanh(0.5 * h + y), lambda: 0.3 * h * y)
    return m.h.value


def branch_by_hand(m, x):
    h, y = m.h.value, drive(m, x)
    m.h.value = jnp.where(x[0] > 0, jnp.tanh(0.5 * h + y), 0.3 * h * y)
    return m.h.value


def branch_with_operations(m, x):
    h = m.h.value
    m.h.value = cond(
        h.sum() > 1, lambda: jnp.tanh(drive(m, x) + matmul(h, m.r.value)), lambda: element_wise(m.p.value) * h + x[0]
    )
    return m.h.value


def branch_with_operations_by_hand(m, x):
    h = m.h.value
    yes, no = jnp.tanh(drive(m, x) + matmul(h, m.r.value)), element_wise(m.p.value) * h + x[0]
    m.h.value = jnp.where(h.sum() > 1, yes, no)
    return m.h.value


def switching(m, x):
    h = m.h.value
    m.h.value, out = switch(
        (3 * jnp.abs(x[0])).astype(int),
        [
            lambda: (drive(m, x), h),
            lambda: (0.5 * h + drive(m, 2 * x), h),
            lambda: (h * element_wise(m.p.value), 2 * h),
        ],
    )
    return m.h.value + out


def switching_by_hand(m, x):
    h, k = m.h.value, (3 * jnp.abs(x[0])).astype(int)
    choices = [drive(m, x), 0.5 * h + drive(m, 2 * x), h * element_wise(m.p.value)]
    m.h.value = jnp.select([k == 0, k == 1], choices[:2], choices[2])
    return m.h.value + jnp.where(k < 2, h, 2 * h)


def sub_steps(m, x):
    m.h.value = fori_loop(0, 3, lambda i, h: jnp.tanh(0.5 * h + (i + 1) * drive(m, x)), m.h.value)
    return m.h.value


def sub_steps_by_hand(m, x):
    for i in range(3):
        m.h.value = jnp.tanh(0.5 * m.h.value + (i + 1) * drive(m, x))
    return m.h.value


def stacked(reverse):
    def body(m, x):
        def body(h, k):
            h = jnp.tanh(0.5 * h + k * drive(m, x) + matmul(h, m.r.value))
            return h, k * h

        return body

    def looped(m, x):
        m.h.value, ys = scan(body(m, x), m.h.value, x, reverse=reverse)
        return ys[0] - 2 * ys[1]

    def by_hand(m, x):
        h, ys = m.h.value, [None, None]
        for i in (1, 0) if reverse else (0, 1):
            h, ys[i] = body(m, x)(h, x[i])
        m.h.value = h
        return ys[0] - 2 * ys[1]

    return looped, by_hand


def branch_in_loop(m, x):
    def body(h, k):
        return cond(k > 0, lambda: 0.5 * h + drive(m, k * x), lambda: jnp.sin(h)), None

    m.h.value = scan(body, m.h.value, x)[0]
    return m.h.value


def branch_in_loop_by_hand(m, x):
    for k in x:
        m.h.value = jnp.where(k > 0, 0.5 * m.h.value + drive(m, k * x), jnp.sin(m.h.value))
    return m.h.value


def loop_in_branch(m, x):
    def loop():
        return fori_loop(0, 2, lambda i, h: jnp.tanh(0.5 * h + drive(m, x)), m.h.value)

    m.h.value = cond(x[1] < 0.5, loop, lambda: 0.5 * m.h.value)
    return m.h.value


def loop_in_branch_by_hand(m, x):
    h = m.h.value
    for _ in range(2):
        h = jnp.tanh(0.5 * h + drive(m, x))
    m.h.value = jnp.where(x[1] < 0.5, h, 0.5 * m.h.value)
    return m.h.value


def branch_in_branch(m, x):
    h = m.h.value
    inner = lambda: cond(x[1] > 0, lambda: drive(m, x) * h, lambda: 0.9 * h)  # noqa: E731
    m.h.value = cond(x[0] > 0, lambda: jnp.tanh(drive(m, x)), inner)
    return m.h.value


def branch_in_branch_by_hand(m, x):
    h = m.h.value
    yes, inner = jnp.tanh(drive(m, x)), jnp.where(x[1] > 0, drive(m, x) * h, 0.9 * h)
    m.h.value = jnp.where(x[0] > 0, yes, inner)
    return m.h.value


def checkpointed(m, x):
    @jax.checkpoint
    def body(h, x, w):
        return jax.jit(lambda h: fori_loop(0, 2, lambda i, h: jnp.tanh(0.5 * h + matmul(x, w)), h))(h)

    m.h.value = body(m.h.value, x, m.w.value)
    return m.h.value


def checkpointed_by_hand(m, x):
    for _ in range(2):
        m.h.value = jnp.tanh(0.5 * m.h.value + drive(m, x))
    return m.h.value


def checkpointed_operation(m, x):
    y = jax.checkpoint(lambda x, w: jnp.tanh(matmul(x, w)))(x, m.w.value)
    m.h.value = 0.5 * m.h.value + y + matmul(m.h.value, m.r.value)
    return m.h.value


def checkpointed_operation_by_hand(m, x):
    m.h.value = 0.5 * m.h.value + jnp.tanh(drive(m, x)) + matmul(m.h.value, m.r.value)
    return m.h.value


def long_loop(m, x):
    def body(h, k):
        h = jnp.tanh(0.6 * h + k * drive(m, x))
        return h, 0.1 * h * h

    m.h.value, ys = scan(body, m.h.value, jnp.linspace(-1, 1, 5))
    return ys.sum(0)


def long_loop_by_hand(m, x):
    out = 0.0
    for k in np.linspace(-1, 1, 5, dtype=np.float32):
        m.h.value = jnp.tanh(0.6 * m.h.value + k * drive(m, x))
        out = out + 0.1 * m.h.value * m.h.value
    return out


def long_loop_without_operation(m, x):
    y = drive(m, x)
    m.h.value = fori_loop(0, 20, lambda i, h: h - 0.1 * h**3 + 0.05 * y, m.h.value)
    return m.h.value


def long_loop_without_operation_by_hand(m, x):
    y = drive(m, x)
    for _ in range(20):
        m.h.value = m.h.value - 0.1 * m.h.value**3 + 0.05 * y
    return m.h.value


def while_of_hidden(m, x):
    y = drive(m, x)
    m.h.value = while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1]) + 0.1 * c[1] * y), (0, m.h.value))[1]
    return m.h.value


def while_of_hidden_by_hand(m, x):
    y = drive(m, x)
    for _ in range(3):
        m.h.value = jnp.sin(m.h.value) + 0.1 * m.h.value * y
    return m.h.value


def while_and_more(m, x):
    """Through a further operation, in an output, and a scalar of one unit; in a branch that is kept, too."""
    y, twice = drive(m, x), lambda v: while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, v))[1]
    h = cond(x[0] > 0, lambda: twice(m.h.value), lambda: 0.5 * m.h.value)
    m.h.value = jnp.tanh(h + y + twice(m.h.value[0]))
    return twice(m.h.value @ m.r.value)


def while_and_more_by_hand(m, x):
    y, twice = drive(m, x), lambda v: jnp.sin(jnp.sin(v))
    h = jnp.where(x[0] > 0, twice(m.h.value), 0.5 * m.h.value)
    m.h.value = jnp.tanh(h + y + twice(m.h.value[0]))
    return twice(m.h.value @ m.r.value)


CASES = {  # with control flow, by hand, kinds of the records, policy
    "branch": (branch, branch_by_hand, ["cond_if_converted"], {}),
    "opaque branch": (branch, branch_by_hand, ["control_flow_opaque_fwd"], dict(cond="opaque")),
    "operations": (branch_with_operations, branch_with_operations_by_hand, ["cond_if_converted"], {}),
    "switch": (switching, switching_by_hand, ["cond_if_converted"], {}),
    "sub-steps": (sub_steps, sub_steps_by_hand, ["scan_unrolled"], {}),
    "stacked": (*stacked(False), ["scan_unrolled"], {}),
    "backward": (*stacked(True), ["scan_unrolled"], {}),
    "branch in loop": (branch_in_loop, branch_in_loop_by_hand, ["scan_unrolled", "cond_if_converted"], {}),
    "loop in branch": (loop_in_branch, loop_in_branch_by_hand, ["cond_if_converted", "scan_unrolled"], {}),
    "branch in branch": (branch_in_branch, branch_in_branch_by_hand, ["cond_if_converted"] * 2, {}),
    "checkpoint": (checkpointed, checkpointed_by_hand, ["scan_unrolled"], {}),
    "checkpoint of an operation": (checkpointed_operation, checkpointed_operation_by_hand, [], {}),
    "long": (
        long_loop,
        long_loop_by_hand,
        ["scan_unroll_skipped", "scan_descent_applied"],
        dict(scan_unroll_limit=4),
    ),
    "longer limit": (long_loop, long_loop_by_hand, ["scan_unrolled"], dict(scan_unroll_limit=5)),
    "no limit": (
        sub_steps,
        sub_steps_by_hand,
        ["scan_unroll_skipped", "scan_descent_applied"],
        dict(scan_unroll_limit=0),
    ),
    "long, no operation": (
        long_loop_without_operation,
        long_loop_without_operation_by_hand,
        ["scan_unroll_skipped", "control_flow_opaque_fwd"],
        {},
    ),
    "while": (while_of_hidden, while_of_hidden_by_hand, ["control_flow_opaque_fwd"], {}),
    "while and more": (
        while_and_more,
        while_and_more_by_hand,
        ["cond_conversion_skipped"] + ["control_flow_opaque_fwd"] * 2,
        {},
    ),
}
LENGTHS = {"long": 5, "no limit": 3}  # of loops that are followed in place: one relation instead of one per sub-step
OF_CONTROL_FLOW = frozenset(
    "cond_if_converted cond_conversion_skipped scan_unrolled scan_unroll_skipped scan_descent_applied "
    "scan_descent_skipped scan_descent_no_relations weight_in_while weight_in_control_flow control_flow_opaque_fwd "
    "control_flow_recurrent_mixing primitive_inside_control_flow relation_excluded_sliced_weight".split()
)


def records(graph):
    return [r for r in graph.diagnostics if r.kind.value in OF_CONTROL_FLOW]


def graph_of(step, **policy):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        graph = braintrace.compile_etrace_graph(Model(step), XS[0], control_flow=ControlFlowPolicy(**policy))
    expected = [r.message for r in graph.diagnostics if r.level is not INFO]
    assert [str(w.message).split("] ", 1)[1] for w in shown] == expected
    return graph


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*cond_conversion_skipped")
def test_the_same_as_by_hand(case, rule):
    step, by_hand, _, policy = CASES[case]
    ours, learner = online(step, RULES[rule], control_flow=ControlFlowPolicy(**policy))
    theirs, reference = online(by_hand, RULES[rule])
    relations = [len(e.graph.hidden_param_op_relations) for e in (learner, reference)]
    assert relations == [1, LENGTHS[case]] if case in LENGTHS else relations[0] == relations[1]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
    expected = backprop(by_hand)
    for name, gradient in ours[0][2].items():
        np.testing.assert_allclose(gradient, expected[name], rtol=2e-4, atol=1e-5, err_msg=name)
    model = Model(step)
    for x, (value, h, _) in zip(XS, ours):
        np.testing.assert_allclose(loss(model(x)), value, rtol=1e-5)
        np.testing.assert_allclose(model.h.value, h, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_records_of_what_was_done(case):
    step, _, kinds, policy = CASES[case]
    found = records(graph_of(step, **policy))
    assert [r.kind.value for r in found] == kinds
    assert all(f"{__file__}:" in r.message and f"{__file__}:" in r.context["line"] for r in found)
    assert {r.kind.value for r in found if r.level is not INFO} <= {"cond_conversion_skipped"}


@pytest.mark.parametrize("case", ["branch", "sub-steps", "branch in loop", "while", "long"])
def test_mapped_over_samples(case):
    """Every sample takes its own branch."""
    step, by_hand, _, policy = CASES[case]
    batch = jnp.stack([XS[0], XS[1]])

    def gradients(step):
        model = Model(step)
        learner = braintrace.compile(
            model, braintrace.D_RTRL, batch, vmap=True, batch_size=2, control_flow=ControlFlowPolicy(**policy)
        )
        sequence = jnp.stack([batch, -batch])
        return learner.etrace_grad(sequence, step_fn=lambda x: loss(learner(x).sum(0)), weights=dict(w=model.w))

    for a, b in zip(jax.tree.leaves(gradients(step)), jax.tree.leaves(gradients(by_hand)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


# -- a branch that is not taken

HARMFUL = {  # what a branch that is not taken computes
    "division by zero": lambda m, x, h: 1 / (0 * h),
    "logarithm of a negative operation": lambda m, x, h: jnp.log(-jnp.abs(drive(m, x))),
    "root of zero": lambda m, x, h: jnp.sqrt(0 * drive(m, x)),
    "operation of NaN": lambda m, x, h: drive(m, jnp.log(-jnp.abs(x))),
    "operation of infinity": lambda m, x, h: matmul(h / 0.0, m.r.value),
    "parameter": lambda m, x, h: h / (0 * m.p.value),
    "element_wise": lambda m, x, h: jnp.log(-element_wise(m.p.value)) * h,
    "in a branch": lambda m, x, h: cond(x[0] < 9, lambda: 1 / (0 * drive(m, x)), lambda: h),
    "in a loop": lambda m, x, h: fori_loop(0, 2, lambda i, h: jnp.sqrt(drive(m, x) * 0 - h**2), h),
    "overflow": lambda m, x, h: jnp.exp(1000 + h**2) * drive(m, x),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("harm", HARMFUL)
def test_a_branch_that_is_not_taken_does_no_harm(harm, rule):
    f = HARMFUL[harm]

    def step(m, x):
        h = m.h.value
        m.h.value = cond(x[0] > 5, lambda: f(m, x, h), lambda: jnp.tanh(0.5 * h + drive(m, x)))
        return m.h.value

    def by_hand(m, x):
        m.h.value = jnp.tanh(0.5 * m.h.value + drive(m, x))
        return m.h.value

    ours, theirs = online(step, RULES[rule])[0], online(by_hand, RULES[rule])[0]
    if rule == "pp_prop":  # the traces of the other branch's operations advance as well
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(ours))
        ours, theirs = ours[:1], theirs[:1]
    for (value, h, gradients), (value_by_hand, h_by_hand, by_hand_gradients) in zip(ours, theirs):
        np.testing.assert_allclose(value, value_by_hand, rtol=1e-5)
        np.testing.assert_allclose(h, h_by_hand, rtol=1e-5)
        for name, g in gradients.items():
            np.testing.assert_allclose(g, by_hand_gradients.get(name, jnp.zeros_like(g)), rtol=1e-4, atol=1e-6)


def test_a_branch_that_is_taken_may_be_infinite():
    """The gate hides nothing: a harmful branch that is taken harms the gradient as in plain JAX."""

    def step(m, x):
        m.h.value = cond(x[0] < 5, lambda: 1 / (0 * drive(m, x)), lambda: m.h.value)
        return m.h.value

    assert not np.isfinite(online(step, braintrace.D_RTRL)[0][0][2]["w"]).any()


# -- what stays as it is


def names_in(graph):
    return [e.primitive.name for e in graph.module_info.jaxpr.eqns]


def in_the_input(m, x):
    """Loops and branches of the input alone carry no credit."""
    x = fori_loop(0, 3, lambda i, x: 0.5 * x, x)
    x = cond(x[0] > 0, lambda: 2 * x, lambda: x)
    x = while_loop(lambda x: x.sum() > 1, lambda x: 0.5 * x, x)
    m.h.value = 0.5 * m.h.value + drive(m, jax.checkpoint(jnp.sin)(x))
    return m.h.value


def of_a_stopped_value(m, x):
    h = jax.lax.stop_gradient(m.h.value)
    m.h.value = 0.5 * m.h.value + drive(m, x) * fori_loop(0, 3, lambda i, h: 0.5 * h, h)
    return m.h.value


def test_irrelevant_control_flow_stays():
    graph = graph_of(in_the_input)
    assert records(graph) == []
    assert {"scan", "cond", "checkpoint"} <= {n.replace("remat2", "checkpoint") for n in names_in(graph)}
    graph = graph_of(of_a_stopped_value)
    assert records(graph) == [] and "scan" in names_in(graph)


def test_arguments_have_gradients_through_a_while_loop():
    learner = braintrace.D_RTRL(Model(in_the_input))
    learner.compile_graph(XS[0])
    f = lambda x: loss(learner(x))  # noqa: E731
    x = jnp.array([0.5, -0.2])
    expected = matmul(jnp.cos(x / 4)[:, None] * jnp.eye(2) / 4, learner.model4compile.w.value) @ RAMP
    np.testing.assert_allclose(grad(f)(x), expected, rtol=1e-4)


def test_a_branch_known_at_compile_time_is_taken():
    def step(m, x):
        m.h.value = cond(jnp.asarray(True), lambda: drive(m, x), lambda: m.h.value)
        return m.h.value

    graph = graph_of(step)
    assert names_in(graph) == ["etp_mv"] and records(graph) == []


def test_a_new_hidden_value_makes_a_branch_relevant():
    def step(m, x):
        drive(m, x)
        m.h.value = cond(x[0] > 0, lambda: jnp.ones(3), lambda: jnp.zeros(3))
        return m.h.value

    assert [r.kind.value for r in records(graph_of(step))] == ["cond_if_converted"]


def test_brainstate_loops_are_followed():
    def step(m, x):
        def body(k):
            m.h.value = jnp.tanh(0.5 * m.h.value + k * drive(m, x))
            return m.h.value

        return for_loop(body, x).sum(0)

    graph = graph_of(step)
    assert [r.kind.value for r in records(graph)] == ["scan_unrolled"]
    assert len(graph.hidden_param_op_relations) == 2


# -- mixing of positions in loops that stay


def while_that_mixes(m, x):
    y = drive(m, x)
    m.h.value = while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.roll(c[1], 1)), (0, m.h.value))[1] + y
    return m.h.value


def while_that_counts(m, x):
    """What only ends the loop may mix."""
    y = drive(m, x)
    m.h.value = while_loop(lambda h: h.sum() > 0.1, lambda h: 0.5 * h, m.h.value) + y
    return m.h.value


def product_in_a_long_loop(m, x):
    y = drive(m, x)
    m.h.value = fori_loop(0, 20, lambda i, h: jnp.tanh(h @ jax.lax.stop_gradient(m.r.value) + y), m.h.value)
    return m.h.value


def parameter_in_a_long_loop(m, x):
    y = drive(m, x)
    m.h.value = fori_loop(0, 20, lambda i, h: jnp.tanh(0.5 * h + y * m.p.value), m.h.value)
    return m.h.value


@pytest.mark.parametrize(
    "step, mixes", [(while_that_mixes, True), (while_that_counts, False), (product_in_a_long_loop, True)]
)
def test_mixing_in_a_loop_is_said(step, mixes):
    graph = graph_of(step)
    found = graph.explain(kind="control_flow_recurrent_mixing")
    assert [r.level for r in found] == [WARNING] * mixes
    assert all(f"{__file__}:" in r.message for r in found)
    assert (graph.hidden_groups[0].jacobian.D[0][0].kind == "zero") == (step is while_that_mixes)


def test_a_parameter_in_a_long_loop_gets_the_current_step():
    (record,) = graph_of(parameter_in_a_long_loop).explain(kind="scan_descent_no_relations")
    assert (record.level, record.weight_path) == (WARNING, ("p",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = online(parameter_in_a_long_loop, braintrace.D_RTRL)[0]
    expected = backprop(parameter_in_a_long_loop)
    for name, g in ours[0][2].items():
        np.testing.assert_allclose(g, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_loop_that_ends_by_value():
    def first_step_by_hand(m, x):
        m.h.value = m.h.value / 16 + drive(m, x)
        return m.h.value

    ours = online(while_that_counts, braintrace.D_RTRL)[0]
    np.testing.assert_allclose(ours[0][0], loss(Model(first_step_by_hand)(XS[0])), rtol=1e-6)
    np.testing.assert_allclose(ours[0][2]["w"], backprop(first_step_by_hand)["w"], rtol=1e-5)


# -- refusals


def in_opaque_branch(m, x):
    m.h.value = cond(x[0] > 0, lambda: drive(m, x), lambda: m.h.value)


def in_while(m, x):
    m.h.value = while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] + drive(m, x))), (0, m.h.value))[1]


def while_in_branch(m, x):
    m.h.value = cond(
        x[0] > 0, lambda: while_loop(lambda h: h.sum() > 1, lambda h: 0.5 * h, drive(m, x)), lambda: m.h.value
    )


def long_in_branch(m, x):
    def loop():
        return fori_loop(0, 20, lambda i, h: jnp.tanh(0.5 * h + drive(m, x)), m.h.value)

    m.h.value = cond(x[1] > 0.5, loop, lambda: 0.5 * m.h.value)


def while_in_loop(m, x):
    def body(h, k):
        return while_loop(lambda h: h.sum() > 1, lambda h: 0.5 * h, h + k * drive(m, x)), None

    m.h.value = scan(body, m.h.value, x)[0]


def slices(m, x):
    def body(h, row):
        return jnp.tanh(h + row), None

    m.h.value = scan(body, m.h.value + drive(m, x), m.r.value)[0]


def long_backward(m, x):
    def body(h, k):
        return jnp.tanh(0.5 * h + k * drive(m, x)), None

    m.h.value = scan(body, m.h.value, jnp.ones(20), reverse=True)[0]


def long_with_branch(m, x):
    def body(h, k):
        return cond(k > 0, lambda: jnp.tanh(0.5 * h + drive(m, x)), lambda: h), None

    m.h.value = scan(body, m.h.value, jnp.linspace(-1, 1, 20))[0]


def long_from_a_computed_value(m, x):
    m.h.value = fori_loop(0, 20, lambda i, h: jnp.tanh(0.5 * h + drive(m, x)), 0.5 * m.h.value)


def long_without_hidden(m, x):
    m.h.value = 0.5 * m.h.value + fori_loop(0, 20, lambda i, y: y + drive(m, x), jnp.zeros(3))


def long_with_changing_operand(m, x):
    m.h.value = scan(
        lambda h, k: (jnp.tanh(0.5 * h + matmul(x, k * m.w.value)), None), m.h.value, jnp.linspace(-1, 1, 20)
    )[0]


def constant_in_while(m, x):
    m.h.value = 0.5 * m.h.value + drive(m, x)
    return while_loop(lambda y: y.sum() > 9, lambda y: matmul(y, jnp.eye(3)), m.h.value)


@jax.custom_jvp
def custom(x, w):
    return matmul(x, w)


custom.defjvp(lambda primals, tangents: (custom(*primals), tangents[0] @ primals[1] + primals[0] @ tangents[1]))


def in_custom_derivative(m, x):
    m.h.value = 0.5 * m.h.value + custom(x, m.w.value)


REFUSED = [  # step, policy, kinds of the records before, what the message names
    (in_opaque_branch, dict(cond="opaque"), ["weight_in_control_flow"], ["'w'", "cond", "cond='convert'"]),
    (in_while, {}, ["weight_in_while"], ["'w'", "while", "for_loop"]),
    (while_in_branch, {}, ["cond_conversion_skipped", "weight_in_control_flow"], ["'w'", "cond"]),
    (long_in_branch, {}, ["cond_conversion_skipped", "weight_in_control_flow"], ["'w'", "cond"]),
    (while_in_loop, {}, ["scan_unroll_skipped", "weight_in_control_flow"], ["'w'", "scan"]),
    (slices, {}, ["relation_excluded_sliced_weight", "weight_in_control_flow"], ["'r'", "scan"]),
    *(
        (step, {}, ["scan_descent_skipped", "weight_in_control_flow"], ["'w'", "scan", f"scan_unroll_limit={n}"])
        for step, n in [
            (long_backward, 20),
            (long_with_branch, 20),
            (long_from_a_computed_value, 20),
            (long_without_hidden, 20),
            (long_with_changing_operand, 20),
        ]
    ),
    (
        long_loop,
        dict(scan_descent="off", scan_unroll_limit=4),
        ["scan_unroll_skipped", "weight_in_control_flow"],
        ["scan_unroll_limit=5"],
    ),
    (
        parameter_in_a_long_loop,
        dict(scan_descent="off"),
        ["scan_unroll_skipped", "weight_in_control_flow"],
        ["'p'", "scan"],
    ),
    (constant_in_while, {}, ["primitive_inside_control_flow"], ["etp_mv", "while", "etp_in_control_flow='exclude'"]),
    (in_custom_derivative, {}, ["primitive_inside_control_flow"], ["etp_mv", "custom_jvp_call"]),
    (
        in_custom_derivative,
        dict(etp_in_control_flow="exclude"),
        ["primitive_inside_control_flow"],
        ["etp_mv", "custom_jvp_call"],
    ),
    (while_of_hidden, dict(while_hidden="error"), ["control_flow_opaque_fwd"], ["while", "while_hidden='opaque-fwd'"]),
]


@pytest.mark.parametrize(
    "step, policy, kinds, words", REFUSED, ids=[f"{r[0].__name__}-{i}" for i, r in enumerate(REFUSED)]
)
def test_refusals(step, policy, kinds, words):
    with warnings.catch_warnings(record=True) as shown, pytest.raises(NotImplementedError) as refusal:
        warnings.simplefilter("always")
        braintrace.compile_etrace_graph(Model(step), XS[0], control_flow=ControlFlowPolicy(**policy))
    message = str(refusal.value)
    assert all(word in message for word in [*words, f"{__file__}:"]), message
    found = [str(w.message) for w in shown]
    assert [f.split("]")[0][1:] for f in found] == kinds
    assert message in found[-1]


@pytest.mark.parametrize(
    "step",
    [long_backward, long_with_branch, long_from_a_computed_value, long_without_hidden, long_with_changing_operand],
)
def test_what_the_refusal_says_helps(step):
    def returning(m, x):
        step(m, x)
        return m.h.value

    policy = ControlFlowPolicy(scan_unroll_limit=20)
    ours = online(returning, braintrace.D_RTRL, control_flow=policy)[0]
    np.testing.assert_allclose(ours[0][2]["w"], backprop(returning)["w"], rtol=1e-4, atol=1e-5)


def test_operations_of_constants_may_be_left_inside():
    (record,) = records(graph_of(constant_in_while, etp_in_control_flow="exclude"))[:1]
    assert (record.kind, record.level, record.primitive) == (
        DiagnosticKind.PRIMITIVE_INSIDE_CONTROL_FLOW,
        WARNING,
        "etp_mv",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = ControlFlowPolicy(etp_in_control_flow="exclude")
        ours = online(constant_in_while, braintrace.D_RTRL, control_flow=policy)[0]
    np.testing.assert_allclose(ours[0][1], Model(constant_in_while)(XS[0]), rtol=1e-6)


# -- the policy


@pytest.mark.parametrize(
    "nested, limit", [(branch_in_loop, 2), (branch_in_branch, 2), (sub_steps, 1), (checkpointed, 1)]
)
def test_depth(nested, limit):
    graph_of(nested, fixpoint_iteration_limit=limit)
    if limit > 1:
        with pytest.raises(braintrace.CompilationError, match=f"cond at .*{__file__}.*fixpoint_iteration_limit=1"):
            graph_of(nested, fixpoint_iteration_limit=limit - 1)


@pytest.mark.parametrize("length, kind", [(16, "scan_unrolled"), (17, "scan_descent_applied")])
def test_the_default_limit(length, kind):
    def step(m, x):
        m.h.value = fori_loop(0, length, lambda i, h: 0.5 * h + drive(m, x), m.h.value)

    graph = graph_of(step)
    assert records(graph)[-1].kind.value == kind
    assert len(graph.hidden_param_op_relations) == (length if kind == "scan_unrolled" else 1)


@pytest.mark.parametrize(
    "knob, value",
    [
        ("cond", "x"),
        ("cond", None),
        ("while_hidden", "x"),
        ("etp_in_control_flow", "x"),
        ("scan_descent", True),
        ("scan_unroll_limit", 1.5),
        ("scan_unroll_limit", True),
        ("scan_unroll_limit", "16"),
        ("fixpoint_iteration_limit", 0),
        ("fixpoint_iteration_limit", 2.0),
    ],
)
def test_knobs_are_checked_at_construction(knob, value):
    with pytest.raises(ValueError, match=f"{knob}.*{value}"):
        ControlFlowPolicy(**{knob: value})


def test_the_policy_is_a_value():
    assert ControlFlowPolicy() == ControlFlowPolicy("convert", 16, "opaque-fwd", "error", "auto", 64)
    assert hash(ControlFlowPolicy(scan_unroll_limit=-1)) == hash(ControlFlowPolicy(scan_unroll_limit=-1))
    with pytest.raises(AttributeError):
        ControlFlowPolicy().cond = "opaque"


@pytest.mark.parametrize(
    "use",
    [
        lambda model, policy: braintrace.extract_module_info(model, XS[0], control_flow=policy),
        lambda model, policy: braintrace.compile_etrace_graph(model, XS[0], control_flow=policy),
        lambda model, policy: braintrace.find_hidden_groups_from_module(model, XS[0], control_flow=policy),
        lambda model, policy: braintrace.ETraceGraphExecutor(model, control_flow=policy).compile_graph(XS[0]),
        lambda model, policy: braintrace.ETraceVjpGraphExecutor(model, control_flow=policy).compile_graph(XS[0]),
        lambda model, policy: braintrace.D_RTRL(model, control_flow=policy).compile_graph(XS[0]),
        lambda model, policy: braintrace.pp_prop(model, 0.9, control_flow=policy).compile_graph(XS[0]),
    ],
)
def test_everything_that_compiles_takes_a_policy(use):
    use(Model(in_opaque_branch), None)
    with pytest.raises(NotImplementedError, match="'w'"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        use(Model(in_opaque_branch), ControlFlowPolicy(cond="opaque"))
    with pytest.raises(TypeError, match="str"):
        use(Model(in_opaque_branch), "opaque")
