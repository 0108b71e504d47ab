"""The product of networks, rules and drivers: losses and gradients of every parameter, against the dense oracle.

The product is not full. Step by step, where every gradient is seen, the first rule meets every network, and the others
one network for each kind of trace. By chunks, the rules meet a network for each way of a chunk to sum. What else a case
can have (a loss, a precision, a kind of input) is crossed with few networks that differ in it.
"""

from functools import partial
from itertools import product

import brainstate
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import steps
from brainstate import HiddenState, ParamState
from brainstate.transform import for_loop, grad, jit
from helpers import DRTRL, PRECISIONS, PPProp, assert_close, leaf, total
from models import CELLS, LOSSES, MORE_CELLS, SMALL, SPIKING, STACKED, N
from rules import case, learner_of, problem_of
from steps import MIXES, OLD_OUTPUTS, PAIRS, PREPARED

import braintrace

pytestmark = pytest.mark.usefixtures("time_step")

LAYERS = [*CELLS, *SPIKING, *STACKED]
SILENT = {*SPIKING, "lif-alif", "alif-alone"} - {"lif-cuba"}  # at some step nothing reaches one of the weights
BARE = [(model, None) for model in SMALL]
EITHER = [None, 2]  # the batch
CHUNKED = [  # one for each way of a chunk to sum
    *[("gru", "linear"), ("lstm", "leaky"), ("lif-cuba", "leaky"), ("alif-coba", "plain"), ("lif-alif", "leaky")],
    *[("gru-lstm", None), ("four states", None), ("five states", "linear"), ("no memory", None)],
    *(network for network in BARE if network != ("ModelC", None)),  # `gru` has its kind of recurrence
]
PER_WEIGHT = [  # steps whose trace has its own way where every weight has one
    *["plain input", "gain and shift", "chain of two", "chain of three", "two linked groups", "product twice"],
    *["operand and factor", "tied readout", "operation beside", "product of states", "choice of states"],
    *["written in place", "mask", "square transpose", "standardised", "tied rows", "sum of two", "product of two"],
    *["roll", "cumsum", "layer norm", "constant matrix", "reverse rule", "reverse rule that mixes"],
]


def cases(networks, batches=(2,), rules=("pp_prop",), drivers=("steps",), silent=(), **options):
    """The product of all arguments; an option is a list as well."""
    for (model, readout), *row in product(networks, batches, rules, drivers, *options.values()):
        named = dict(zip(options, row[3:])) | ({"silent": True} if model in silent else {})
        yield case(model, readout, *row[:3], **named)


def on(models, *readouts):
    return product(models, readouts)


DECAYS = ["two decays", "rank", "rank and decay", "no decay", "rank one", "slow decay"]
CASES = [
    # -- step by step
    *cases(on(LAYERS, "leaky"), EITHER, silent=SILENT),
    *cases(on(LAYERS, "plain"), [None], silent=SILENT),
    *cases(on(LAYERS, "linear"), silent=SILENT),
    *cases([("gru", "plain")]),
    *cases([("gru", "linear")], [None]),
    *cases([*BARE, *on([*MORE_CELLS, "alif-cuba"], None)], EITHER),
    *(case(name, None, batch) for name, batch in steps.CASES),
    *cases(on(LAYERS, "linear"), [None], ["D_RTRL"], silent=SILENT),
    *cases(on(LAYERS, "leaky"), [2], ["D_RTRL"], silent=SILENT),
    *cases(BARE, EITHER, ["D_RTRL"]),
    *cases(on(PER_WEIGHT, None), [2], ["D_RTRL"]),
    *cases(on(["lstm", "urlstm", "lif-cuba", "Shared"], "linear"), [2], ["EProp"]),
    *cases([("ModelB", "plain")], [2], DECAYS),
    *cases(
        [("gru", "linear"), ("lif-alif", "leaky"), ("ReadsOld", None), ("Beside", None)],
        drivers=["mapped steps"],
        silent=SILENT,
    ),
    # -- in chunks
    *cases(CHUNKED, [2], ["two decays", "D_RTRL"], ["chunks", "mapped chunks"], silent=SILENT),
    *cases(
        [("lstm", "leaky"), ("alif-coba", "plain"), *on(["ReadsOld", "Masked", "Leak"], None)],
        [2],
        ["EProp"],
        ["chunks", "mapped chunks"],
        silent=SILENT,
    ),
    *cases([("lif-cuba", "leaky")], [None], drivers=["every length"]),
    *cases([("lif-cuba", "leaky")], drivers=["mapped every length"]),
    *cases([("gru", "linear")], [2], ["EProp"], ["every length"]),
    *cases([("Chain", None)], [None], ["D_RTRL"], ["every length"]),
    *cases([("five states", "linear")], [2], ["D_RTRL"], ["mapped every length"]),
    # -- in windows
    *cases([("gru", "leaky")], [2], ["D_RTRL"], [f"whole, windows of {k}" for k in (1, 2, 3)]),
    *cases([("gru", "linear")], drivers=["windows of 2"]),
    *cases([("lif-cuba", "leaky")], drivers=["windows of 1"]),
    *cases([("lif-cuba", "leaky")], [2], ["D_RTRL"], ["windows of 3"]),
    *cases([("ReadsOld", None)], [2], ["EProp"], ["windows of 2"]),
    *cases([("ReadsOld", None)], [2], ["D_RTRL"], ["windows of 1"]),
    # -- losses that read parameters and states
    *cases(on(["gru", "lif-alif", "Chain"], "leaky"), loss=LOSSES),
    *cases([("lif-alif", "leaky")], drivers=["chunks of two"], loss=LOSSES),
    *cases([("Chain", None)], [2], ["D_RTRL"], ["mapped chunks of two"], loss=LOSSES),
    # -- precisions
    *cases(
        [("gru", "linear"), ("lstm", "leaky"), ("Leak", "plain"), ("Chain", None)],
        precision=["float64", "float32-x64", "float16", "bfloat16"],
    ),
    *cases([("alif-coba", "leaky")], precision=["float64", "float32-x64"]),
    *cases([("gru", "linear")], [2], ["D_RTRL"], precision=["float64", "float32-x64", "float16"]),
    *cases([("gru", "linear")], [2], ["D_RTRL"], ["chunks of two"], precision=["float64", "float32-x64", "bfloat16"]),
    *cases([("lstm", "leaky")], drivers=["chunks of two"], precision=["float64", "float32-x64", "bfloat16"]),
    *cases([("Chain", None)], [2], ["EProp"], ["chunks of two"], precision=["float64", "float32-x64", "bfloat16"]),
    # -- spikes as inputs
    *cases(on(["ModelA", "Shared", "gru", "alif-alone"], "linear"), EITHER, silent=SILENT, kind=["bool"]),
    *cases(on(["ModelA", "Shared", "gru", "alif-alone"], "linear"), silent=SILENT, kind=["int"]),
    *cases([("alif-alone", "linear")], [2], ["D_RTRL"], silent=SILENT, kind=["bool", "int"]),
]
CASES = sorted({str(case): case for case in CASES}.values(), key=lambda case: case.network())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_product(case):
    learner, _ = case.check()
    layers = [layer for layer in learner.problem.twin.layers if hasattr(layer, "groups")]
    sizes = [len(group) for layer in layers for group in layer.groups()]
    assert [g.num_state for g in learner.inner.graph.hidden_groups] == sizes
    assert [len(g.hidden_paths) for g in learner.inner.graph.hidden_groups] == sizes


@pytest.mark.parametrize("name", [*PREPARED, *PAIRS, "bias of the operation", "bias beside"])
def test_a_trace_is_of_the_parameters_of_its_operand(name):
    learner = problem_of(name).learner()
    relations = learner.graph.hidden_param_op_relations
    paths = [r.path for r in relations]
    if name in PREPARED:
        assert paths == [("layers", 0, "w")]
    elif name in PAIRS:
        assert paths == [("layers", 0, "a")] and not learner.report.excluded_weights
        for parameter in "ab":
            (x,) = learner.get_etrace_of(("layers", 0, parameter))[0].values()
            assert x.shape == (2, models.N_IN)
    else:
        traced = {p for r in relations for p in r.trainable_paths.values()}
        assert (("layers", 0, "b") in traced) == (name == "bias of the operation")


@pytest.mark.parametrize("name", OLD_OUTPUTS)
def test_an_output_that_reads_the_old_value_credits_the_trace_before(name):
    _, ours = case(name, steps=4).check()
    assert np.abs(leaf(ours[1][1])).max() > 1e-2


# -- another rule, and back-propagation, are other vectors


@pytest.mark.parametrize(
    "model, rule, other",
    [
        *product(["ModelB", "lstm"], ["pp_prop"], [PPProp(0.85), PPProp(0.9, 0.85), PPProp(0.85, 0.9)]),
        *(("ModelB", partial(braintrace.pp_prop, decay_or_rank=decay), PPProp(0.9)) for decay in (0.5, 0.89)),
        *product(["lstm"], ["D_RTRL"], [DRTRL(0.3), PPProp(0.9)]),
    ],
)
def test_another_rule_is_noticed(model, rule, other):
    """The comparison fails by far for a rule nearby, in later steps only."""
    problem = problem_of(model)
    ours = problem.online(problem.learner(rule))
    theirs, _ = problem.oracle().online(other, problem.sequence)
    assert_close(ours[0][1], theirs[0][1])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(ours[-1][1], theirs[-1][1], 1e-2 if rule == "D_RTRL" else 1e-3)


def test_sum_over_steps_is_not_bptt():
    """With recurrent weights the online gradient is another vector than that of BPTT."""
    problem = problem_of("vanilla", "linear")
    ours = total(problem.online(problem.learner()))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(ours, problem.oracle().bptt(problem.sequence)[1], 1e-2)


# -- by hand


def one_input(step, w, **states):
    """A step of one input onto three units, `h` its hidden state."""
    return models.Plain(step, w=ParamState(w), h=HiddenState(jnp.zeros(N)), **states)


def gradient(learner, x, loss):
    (found,) = jit(grad(lambda: loss(learner(x)), learner.param_states))().values()
    return found


def ramped(out):
    return (out * RAMP).sum()


ONE, ROW, RAMP = jnp.ones(1), jnp.array([[0.2, -0.1, 0.4]]), jnp.arange(1.0, N + 1)


def writes(f):
    def step(m, x):
        m.h.value = f(models.matmul(x, m.w.value))
        return m.h.value

    return step


def prepares(f):
    def step(m, x):
        m.h.value = models.matmul(x, f(m.w.value))
        return m.h.value

    return step


def chain_of_powers(m, x):
    """h = w, b = h^2, c = b h = w^3"""
    m.h.value = models.matmul(x, m.w.value)
    m.b.value = m.h.value**2
    m.c.value = m.b.value * m.h.value
    return m.c.value


def fan_out(m, x):
    y = models.matmul(x, m.w.value)
    m.h.value = y
    m.b.value = y + m.h.value.sum()
    return m.h.value + m.b.value


def beside(m, x):
    y = models.matmul(x, m.w.value)
    m.h.value = 0.5 * m.h.value + y
    return m.h.value + y


def permuting_hook(m, x):
    m.h.value = x + braintrace.element_wise(m.w.value[0], weight_fn=lambda w: 2 * w[::-1])
    return m.h.value


BY_HAND = {  # step, derivative by the weight of the loss that weighs the units by RAMP
    "roll": (writes(MIXES["roll"]), [2, 3, 1]),
    "cumsum": (writes(MIXES["cumsum"]), [6, 5, 3]),
    "value and sum": (writes(MIXES["value and sum"]), [7, 8, 9]),
    "mask": (prepares(lambda w: w * jnp.array([1.0, 0.0, 1.0])), [1, 0, 3]),
    "scale": (prepares(lambda w: 2 * w), [2, 4, 6]),
    "chain of powers": (chain_of_powers, 3 * ROW[0] ** 2 * RAMP),
    "fan out": (fan_out, 2 * RAMP + RAMP.sum()),
    "operation beside": (beside, [2, 4, 6]),
    "permuting hook": (permuting_hook, [6, 4, 2]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_one_step_by_hand(name):
    step, expected = BY_HAND[name]
    model = one_input(step, ROW, b=HiddenState(jnp.zeros(N)), c=HiddenState(jnp.zeros(N)))
    tol = 1e-7 if name == "operation beside" else 1e-6
    np.testing.assert_allclose(gradient(learner_of(model, ONE), ONE, ramped), [expected], rtol=tol)


def before_the_update(m, x):
    before = m.h.value
    m.h.value = jnp.tanh(before + models.matmul(x, m.w.value))
    return before


@pytest.mark.parametrize("vjp_method", ["single-step", "multi-step"])
def test_a_trace_of_one_step_is_corrected_for_one_step(vjp_method):
    """The loss of step 2 reads the state that step 1 left: no history, so its gradient is exact."""
    learner = learner_of(one_input(before_the_update, ROW), ONE, vjp_method=vjp_method)
    learner(ONE)
    np.testing.assert_allclose(gradient(learner, ONE, ramped), RAMP * (1 - jnp.tanh(ROW) ** 2), rtol=1e-5)


def test_bias_correction_lasts_beyond_a_thousand_steps():
    """h sums y: the corrected sensitivity is 1, so the gradient is the filtered input (1 - a^n) / (1 - a)."""
    decay = 0.9999

    def step(m, x):
        m.h.value = m.h.value + models.matmul(x, m.w.value)
        return m.h.value

    with PRECISIONS["float64"]():
        x = jnp.ones(1)
        learner = learner_of(one_input(step, jnp.zeros((1, N))), x, decay_or_rank=decay)
        per_step = for_loop(lambda x: gradient(learner, x, jnp.sum)[0, 0], jnp.ones((1003, 1)))
    n = np.arange(1, 1004)
    np.testing.assert_allclose(per_step, (1 - decay**n) / (1 - decay), rtol=1e-8)


class OneState(brainstate.nn.Module):
    """`ModelB` with both hidden variables in one state."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.W = braintrace.nn.Linear(models.N_IN, N)

    def init_state(self, batch_size=None, **_):
        zeros = jnp.zeros((N,) if batch_size is None else (batch_size, N))
        self.s = (
            brainstate.HiddenTreeState([zeros, zeros])
            if "tree" in self.kind
            else brainstate.HiddenGroupState(jnp.zeros((*zeros.shape, 2)))
        )

    def update(self, x):
        h, c = self.s.value[..., 0], self.s.value[..., 1]
        y = self.W(x)
        carried = 0.6 * h + 0.3 * c, 0.7 * c - 0.2 * h
        if self.kind == "product":  # of the variables of each position, as of a linear system's propagator
            carried = jnp.moveaxis(self.s.value @ jnp.array([[0.6, -0.2], [0.3, 0.7]]), -1, 0)
        new = jnp.tanh(carried[0] + y), carried[1] + 0.5 * y
        if "tree" in self.kind:
            self.s.set_value(list(new))
        elif self.kind == "parts moved":
            moved = jnp.concatenate([v.reshape(1, *v.shape) for v in new])
            self.s.value = jnp.moveaxis(moved, 0, -1)
        else:
            self.s.value = jnp.stack(new, -1)
        h, c = new if "parts" in self.kind else (self.s.value[..., 0], self.s.value[..., 1])
        return h + c**2


@pytest.mark.parametrize("batch", [None, 2, 4])
@pytest.mark.parametrize("kind", ["group", "tree", "product", "parts", "parts moved", "parts of a tree"])
def test_several_variables_in_one_state_equal_several_states(kind, batch):
    separate = problem_of("ModelB", batch=batch, steps=3)
    model = OneState(kind)
    brainstate.nn.init_all_states(model, **({} if batch is None else dict(batch_size=batch)))
    model.W.weight.value = separate.net.layers[0].W.weight.value
    learner = learner_of(model, separate.sequence[0][0])
    assert [g.num_state for g in learner.graph.hidden_groups] == [2]
    assert len(learner.graph.hidden_param_op_relations) == 1
    step = jit(grad(lambda x, target: ((learner(x) - target) ** 2).sum(), learner.param_states))
    expected_steps = separate.oracle().online(PPProp(0.9), separate.sequence)[0]
    for (_, expected), args in zip(expected_steps, separate.sequence, strict=True):
        ours = step(*args)
        assert_close({"W": ours[("W", "weight")]}, {"W": expected[("layers", 0, "W", "weight")]})


class KeepsSpikes(brainstate.nn.Module):
    """A reset by spikes, of which another state keeps a record in another shape."""

    def __init__(self):
        super().__init__()
        self.w = ParamState(jnp.array([[0.5, -0.3, 0.8], [0.2, 0.9, -0.4]]))
        self.v, self.z = HiddenState(jnp.zeros(3)), HiddenState(jnp.zeros((3, 1)))

    def update(self, x):
        v = 0.8 * self.v.value + models.matmul(x, self.w.value)
        z = jax.nn.sigmoid(3 * v)
        self.v.value, self.z.value = v - 0.5 * z, z[:, None]
        return z * jnp.arange(1.0, 4.0)


def test_what_has_its_past_in_another_state_is_read_where_it_is():
    """D_RTRL on positions apart is back-propagation, whatever else is kept of them."""
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32)
    model = KeepsSpikes()
    learner = learner_of(model, xs[0], "D_RTRL")
    ours = jit(lambda: learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).sum(), reduction="sum"))()
    model = KeepsSpikes()
    exact = jit(grad(lambda: for_loop(lambda x: (model(x) ** 2).sum(), xs).sum(), model.states(ParamState)))()
    assert_close({"w": ours["w",]}, {"w": exact["w",]})


@pytest.mark.parametrize("model", ["gru", "lif-coba-hard", "ReadsOld", "Beside"])
def test_gradients_of_inputs_and_states(model):
    """Ordinary reverse mode through one step, at any step."""
    problem = problem_of(model, "leaky", steps=3)
    learner, oracle = problem.learner(), problem.oracle()
    for args in problem.sequence[:-1]:
        learner(args[0])
    x, target = problem.sequence[-1]
    params, _ = oracle.values()
    now = {path: problem.net.states()[path].value for path in oracle.states}

    def expected(x, hidden):
        return oracle.run(params, now | hidden, (x, target))[0]

    dx, dh = jax.grad(expected, argnums=(0, 1))(x, {path: now[path] for path in oracle.hidden})
    f = brainstate.transform.grad(
        lambda x: problem.loss(problem.net, learner, x, target), learner.hidden_states, argnums=0
    )
    ours_h, ours_x = f(x)
    assert_close({"x": ours_x}, {"x": dx})
    assert_close(dict(ours_h), dh)
