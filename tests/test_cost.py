"""What the gradient of a sequence costs: no array as large as a weight per sample, and memory that is flat in time."""

import brainstate
import jax
import jax.numpy as jnp
import models
import pytest
from brainstate import ParamState
from brainstate.transform import grad
from helpers import PPProp, assert_close, total
from models import CELLS, READOUTS, SPIKING, Problem, squares

import braintrace
from braintrace._jax import scan_operands

pytestmark = pytest.mark.usefixtures("time_step")

# -- one array per weight, not one per weight and sample

B, N_IN, N, N_OUT, T = 5, 6, 11, 3, 4  # the shape of a weight says whose it is
MODELS = {
    "lstm": lambda: [braintrace.nn.LSTMCell(N_IN, N), braintrace.nn.Linear(N, N_OUT)],
    "lif": lambda: [models.Spiking(N_IN, N), braintrace.nn.LeakyRateReadout(N, N_OUT)],
    "plain readout": lambda: [braintrace.nn.ValinaRNNCell(N_IN, N), models.PlainReadout(N, N_OUT)],
}


def equations(jaxpr):
    """Nested ones included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    yield from equations(getattr(inner, "jaxpr", inner))


def shapes(jaxpr):
    """Of every value that an equation computes."""
    return [v.aval.shape for eqn in equations(jaxpr) for v in eqn.outvars]


def of_every_sample(f, weights, *args):
    """Shapes of values that have the axes of a weight and that of the batch, in whatever order."""
    wanted = [sorted((B, *w.shape)) for w in weights if w.ndim == 2]
    assert wanted
    jaxpr, _ = brainstate.transform.make_jaxpr(f)(*args)
    return [s for s in shapes(jaxpr.jaxpr) if any(sorted(n for n in s if n != 1) == w for w in wanted)]


def weights_of(net):
    return [w for s in net.states(ParamState).values() for w in jax.tree.leaves(s.value)]


def by_driver(net, rule="pp_prop", **options):
    options = options or {"decay_or_rank": 0.9}
    mapped = braintrace.compile(net, rule, jnp.zeros((B, N_IN)), batch_size=B, vmap=True, **options)
    return lambda xs: mapped.etrace_grad(xs, step_fn=lambda x: (mapped(x) ** 2).sum(), trace_chunk=2)


def by_step(net):
    mapped = braintrace.compile(net, "pp_prop", jnp.zeros((B, N_IN)), batch_size=B, vmap=True, decay_or_rank=0.9)
    return lambda xs: grad(lambda: (mapped(xs[0]) ** 2).sum(), mapped.module.param_states)()


def by_hand(net):
    learner = braintrace.pp_prop(net, 0.9)

    @brainstate.transform.vmap_new_states(state_tag="new", axis_size=B)
    def initialise():
        brainstate.nn.init_all_states(net)
        learner.compile_graph(jnp.zeros(N_IN))

    initialise()
    mapped = brainstate.nn.Vmap(learner, vmap_states="new")
    return lambda xs: grad(lambda: (mapped(xs[0]) ** 2).sum(), learner.param_states)()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", [by_driver, by_step, by_hand])
def test_no_weight_gradient_of_a_single_sample(way, model):
    net = models.Net(*MODELS[model]())
    found = of_every_sample(way(net), weights_of(net), jnp.ones((T, B, N_IN)))
    assert not found


def test_weight_gradients_of_single_samples_would_be_found():
    w = jnp.ones((N_IN, N))
    each = jax.vmap(jax.grad(lambda w, x: jnp.tanh(x @ w).sum()), (None, 0))

    def nested(xs):
        return jax.lax.scan(lambda total, x: (total + jax.jit(each)(w, x).sum(0), None), jnp.zeros(w.shape), xs)[0]

    xs = jnp.ones((T, B, N_IN))
    assert of_every_sample(nested, [w], xs)
    net = models.Net(*MODELS["lstm"]())
    driver = by_driver(net, "eprop", kappa_filter_decay=0.5)  # its traces are such arrays
    assert of_every_sample(driver, weights_of(net), xs)


@pytest.mark.parametrize(
    "rule, options", [("pp_prop", dict(decay_or_rank=0.9)), ("d_rtrl", {}), ("hybrid", dict(decay_or_rank=0.9))]
)
@pytest.mark.parametrize("cell", [braintrace.nn.LRUCell, braintrace.nn.RTUCell, braintrace.nn.LSTMCell])
def test_no_pairs_of_samples(cell, rule, options):
    """Parameters without an axis for samples, such as time constants, take one pass for all samples."""
    net = brainstate.nn.Sequential(cell(N_IN, N))
    learner = braintrace.compile(net, rule, jnp.zeros((B, N_IN)), batch_size=B, **options)
    drive = lambda xs: learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).sum())  # noqa: E731
    jaxpr, _ = brainstate.transform.make_jaxpr(drive)(jnp.ones((T, B, N_IN)))
    assert not [shape for shape in shapes(jaxpr.jaxpr) if shape.count(B) > 1]


# -- what depends on parameters alone is the same for all samples, and is recorded once for them


class Decaying(brainstate.nn.Module):
    """Every unit with its own decay, or all with one; two inputs, one of them added to what the other one left."""

    def __init__(self, shape):
        super().__init__()
        self.decay = ParamState(0.5 * jnp.ones(shape))
        self.w, self.v = (ParamState(brainstate.random.randn(N_IN, N)) for _ in range(2))

    def init_state(self, batch_size=None, **_):
        batch = () if batch_size is None else (batch_size,)
        self.h, self.g = (brainstate.HiddenState(jnp.zeros((*batch, N))) for _ in range(2))

    def update(self, x):
        decay = jax.nn.sigmoid(braintrace.element_wise(self.decay.value))
        self.g.value = (1 - decay) * self.g.value + braintrace.matmul(x, self.v.value)
        self.h.value = decay * self.h.value + 0.3 * self.g.value + braintrace.matmul(x, self.w.value)
        return self.h.value


def loss_by_hand(weights, xs):
    h = g = jnp.zeros((B, N))
    total, decay = 0.0, jax.nn.sigmoid(weights["decay"])
    for x in xs:
        g = (1 - decay) * g + x @ weights["v"]
        h = decay * h + 0.3 * g + x @ weights["w"]
        total += (jnp.sin(h) ** 2).sum()
    return total


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("chunk", [2, 7])
@pytest.mark.parametrize("shape", [(), (1,), (N,)])
def test_decays_that_samples_share(shape, chunk, mapped):
    net = Decaying(shape)
    learner = braintrace.compile(net, "d_rtrl", jnp.zeros((B, N_IN)), batch_size=B, vmap=mapped)
    xs = brainstate.random.randn(7, B, N_IN)
    found = learner.etrace_grad(
        xs, step_fn=lambda x: (jnp.sin(learner(x)) ** 2).sum(), reduction="sum", trace_chunk=chunk
    )
    expected = jax.grad(loss_by_hand)({p: getattr(net, p).value for p in ("decay", "w", "v")}, xs)
    assert_close(found, {(name,): value for name, value in expected.items()}, tol=2e-5)


@pytest.mark.parametrize("cell, shared", [(braintrace.nn.LRUCell, True), (braintrace.nn.GRUCell, False)])
def test_records_of_transitions_that_samples_share(cell, shared):
    learner = braintrace.compile(cell(N_IN, N), "d_rtrl", jnp.zeros((B, N_IN)), batch_size=B)
    drive = lambda xs: learner.etrace_evolve(xs)  # noqa: E731
    jaxpr, _ = brainstate.transform.make_jaxpr(drive)(jnp.ones((T, B, N_IN)))
    assert ((T, 1, 1, N) in shapes(jaxpr.jaxpr)) == shared


class Conductances(brainstate.nn.Module):
    """A voltage driven by two conductances with an operation each; they may decay alone, or one into the other."""

    def __init__(self, coupled):
        self.coupled = coupled
        self.w, self.u = (ParamState(brainstate.random.randn(N_IN, N)) for _ in range(2))

    def init_state(self, batch_size=None, **_):
        self.g, self.h, self.v = (brainstate.HiddenState(jnp.zeros((batch_size, N))) for _ in range(3))

    def update(self, x):
        h = self.h.value
        self.h.value = 0.5 * h + braintrace.matmul(x, self.u.value) + (0.1 * self.g.value if self.coupled else 0.0)
        self.g.value = 0.8 * self.g.value + braintrace.matmul(x, self.w.value)
        self.v.value = jnp.tanh(0.7 * self.v.value + self.g.value * (1 - self.v.value) - self.h.value)
        return self.v.value


@pytest.mark.parametrize("coupled", [False, True])
def test_sensitivities_that_stay_zero_are_not_advanced(coupled):
    """That of one conductance to the operation that drives the other."""
    learner = braintrace.compile(
        Conductances(coupled), "pp_prop", jnp.zeros((B, N_IN)), batch_size=B, decay_or_rank=0.9
    )
    jaxpr, _ = brainstate.transform.make_jaxpr(learner.etrace_evolve)(jnp.ones((T, B, N_IN)))
    (loop,) = (e for e in equations(jaxpr.jaxpr) if e.primitive.name == "scan")
    consts, carry = scan_operands(loop)
    carried = [v.aval.shape for v in loop.invars[consts : consts + carry]]
    assert carried.count((B, N)) == 3 + 2 + (3 if coupled else 2)


@pytest.mark.parametrize("model", ["gru", "lif-cuba"])
def test_a_model_that_maps_itself(model):
    """`brainstate.nn.Map` around the network: the gradients of a batch."""
    layers = (CELLS | SPIKING)[model]
    problem = Problem(layers, READOUTS["leaky"], 2)
    net = models.randomise(models.build(layers, READOUTS["leaky"], models.library()))
    mapped = brainstate.nn.Map(net, init_map_size=2)
    mapped.init_all_states()
    learner = braintrace.pp_prop(mapped, 0.9)
    xs, targets = problem.sequences()
    learner.compile_graph(xs[0])
    step = brainstate.transform.jit(grad(lambda x, y: squares(mapped, learner, x, y), learner.param_states))
    steps = problem.oracle().online(PPProp(0.9), problem.sequence)[0]
    for x, y, (_, expected) in zip(xs, targets, steps, strict=True):
        assert_close({path[1:]: g for path, g in step(x, y).items()}, expected)
    mapped.init_all_states()
    learner = braintrace.pp_prop(mapped, 0.9)
    learner.compile_graph(xs[0])
    grads = learner.etrace_grad(
        xs, targets, step_fn=lambda x, y: squares(mapped, learner, x, y), reduction="sum", trace_chunk=2
    )
    assert_close({path[1:]: g for path, g in grads.items()}, total(steps))


# -- temporary memory


def temporary(f, steps):
    """Bytes that the compiled program takes beside its arguments and results; nothing runs."""
    x = jax.ShapeDtypeStruct((steps, B, N_IN), jnp.float32)
    return brainstate.transform.jit(f).compile(x).memory_analysis().temp_size_in_bytes


def gradient(rule, vmap, chunk):
    net = models.Net(*MODELS["lif"]())
    options = {"decay_or_rank": 0.9} if rule == "pp_prop" else {}
    learner = braintrace.compile(net, rule, jnp.zeros((B, N_IN)), batch_size=B, vmap=vmap, **options)
    return lambda xs: learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).sum(), trace_chunk=chunk)


@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.parametrize("rule", ["pp_prop", "d_rtrl", "eprop"])
def test_memory_is_flat_in_time(rule, vmap):
    f = gradient(rule, vmap, chunk=20)
    first, second, last = (temporary(f, steps) for steps in (40, 80, 320))
    assert first > 0
    assert last - first < 16 * (320 - 40), (first, second, last)  # a few numbers a step: losses and mask


@pytest.mark.parametrize("rule", ["pp_prop", "d_rtrl"])
def test_memory_is_flat_for_chunks_of_automatic_length(rule):
    f = gradient(rule, False, chunk=None)
    first, last = (temporary(f, steps) for steps in (400, 1600))
    assert last - first < 16 * 1200, (first, last)


def test_back_propagation_needs_memory_for_every_step():
    net = models.Net(*MODELS["lif"]())
    brainstate.nn.init_all_states(net, batch_size=B)

    def whole(xs):
        loss = lambda: brainstate.transform.for_loop(lambda x: (net(x) ** 2).sum(), xs).sum()  # noqa: E731
        return grad(loss, net.states(ParamState))()

    first, last = (temporary(whole, steps) for steps in (40, 320))
    assert last - first > 4 * B * N * (320 - 40)
