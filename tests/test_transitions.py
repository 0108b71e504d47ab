"""The transition as one program: terms that mix positions, custom derivatives, movements, shapes, precision, complex
values. Judged by dense Jacobians of the same formula in plain JAX, position-diagonal blocks taken by hand, and by
back-propagation through time where theory says that the rule equals it.
"""

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate import HiddenState, ParamState
from rules import learner_of

import braintrace

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # ways that mix positions are warned about


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    """In double precision, which JAX has within the tests alone."""
    return np.random.RandomState(seed).randn(*shape)


def hold(x):
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Position-diagonal blocks of everything between old values, operation outputs and new values.


@jax.custom_vjp
def tanh(x):
    return jnp.tanh(x)


tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, bar: (bar / jnp.cosh(x) ** 2,))


@jax.custom_vjp
def spike(x):
    return (x > 0).astype(x.dtype)


spike.defvjp(lambda x: (spike(x), x), lambda x, bar: (bar / (1 + x * x),))


@jax.custom_vjp
def next_neighbour(x):
    return 1.0 * jnp.roll(x, 1, -1)


next_neighbour.defvjp(lambda x: (next_neighbour(x), None), lambda _, bar: (jnp.roll(bar, -1, -1),))


def mean(a):
    return a.mean(-1, keepdims=True)


def layer_norm(a):
    return (a - mean(a)) * jax.lax.rsqrt(a.var(-1, keepdims=True) + 0.1)


def along_last(a, low, high, inner=0):
    return [(0, 0, 0)] * (a.ndim - 1) + [(low, high, inner)]


def there_and_back(a):
    return jax.lax.pad(jax.lax.pad(a, 0.0, along_last(a, 2, 1, 1)), 0.0, along_last(a, -2, -1))[..., ::2]


PRODUCT = draw(4, 4, seed=7) * 0.5
SHUFFLE, BACK = np.array([2, 0, 3, 1]), np.array([1, 3, 0, 2])


def inhibited(term):
    """Two states; ``term`` of the first one's new value acts on the second one beside ways that stay in place."""

    def transition(h, y, held):
        a = 0.5 * h[0] + 0.4 * h[1]
        return [a, jnp.tanh(0.7 * h[1] + y - term(a, held))]

    return transition


def downstream(read):
    """Two states; only ``read`` of the first one's new value links the second one to it."""

    def transition(h, y, held):
        a = 0.5 * h[0] + y
        return [a, 0.6 * h[1] + read(a)]

    return transition


TRANSITIONS = {
    "mean of a new value": lambda h, y, held: [
        (a := 0.5 * h[0] + 0.4 * h[1]),
        jnp.tanh(0.7 * h[1] + 0.5 * mean(a)) + y,
    ],
    "global inhibition": inhibited(lambda a, held: mean(a)),
    "neighbour": inhibited(lambda a, held: jnp.roll(a, 1, -1)),
    "softmax": inhibited(lambda a, held: jax.nn.softmax(a, -1)),
    "cumulative sum": inhibited(lambda a, held: jnp.cumsum(a, -1)),
    "layer norm": inhibited(lambda a, held: layer_norm(a)),
    "sorted": inhibited(lambda a, held: jnp.sort(a, -1)),
    "product": inhibited(lambda a, held: held(a) @ PRODUCT),
    "product and mean": inhibited(lambda a, held: held(a) @ PRODUCT + mean(a)),
    "mean of an old value": lambda h, y, held: [jnp.tanh(0.7 * h[0] + y - 0.3 * mean(h[0]))],
    "mean of the output": lambda h, y, held: [jnp.tanh(0.7 * h[0] + y + 0.3 * mean(y))],
    "value and mean": downstream(lambda a: jnp.tanh(a - mean(a))),
    "value and neighbour": downstream(lambda a: jnp.tanh(a - 0.3 * jnp.roll(a, 1, -1))),
    "custom reverse rule": lambda h, y, held: [0.5 * h[0] + y, tanh(0.6 * h[1] + 0.4 * h[0])],
    "custom reverse rule of a new value": downstream(tanh),
    "custom rules in calls": downstream(jax.jit(lambda a: tanh(jax.checkpoint(tanh)(a)))),
    "custom reverse rule, mapped": downstream(lambda a: jax.vmap(tanh)(a)),
    "surrogate spikes": lambda h, y, held: [
        (a := 0.5 * h[0] + y - 0.3 * spike(h[0])),
        0.5 * h[1] + spike(a - 0.2),
    ],
    "custom reverse rule that moves": downstream(lambda a: 0.2 * a + next_neighbour(a)),
    "flipped there and back": downstream(lambda a: jnp.flip(jnp.tanh(jnp.flip(a, -1)), -1)),
    "flipped, with a mean": downstream(lambda a: jnp.flip(jnp.tanh(jnp.flip(a, -1) + mean(a)), -1)),
    "split and joined": downstream(lambda a: jnp.concatenate(jnp.split(a, [1], -1), -1) ** 2),
    "reversed twice": downstream(lambda a: jnp.tanh(a[..., ::-1][..., ::-1])),
    "padded and cropped": downstream(lambda a: jnp.tanh(there_and_back(a))),
    "reshaped": downstream(lambda a: jnp.tanh(a.reshape(-1, 2, 2).reshape(a.shape))),
    "shuffled and back": downstream(lambda a: jnp.tanh(a[..., SHUFFLE][..., BACK])),
    "barrier": downstream(lambda a: jax.lax.optimization_barrier((jnp.tanh(a), jnp.ones(3)))[0]),
}


class Network(brainstate.nn.Module):
    def __init__(self, transition, number, shape, weight):
        super().__init__()
        self.transition, self.number, self.shape = transition, number, shape
        self.w = ParamState(jnp.asarray(weight))
        self.init_state()

    def init_state(self, *args, **kwargs):
        for i in range(self.number):
            setattr(self, f"h{i}", HiddenState(jnp.zeros(self.shape)))

    def update(self, x):
        states = [getattr(self, f"h{i}") for i in range(self.number)]
        news = self.transition([h.value for h in states], braintrace.matmul(x, self.w.value), hold)
        for h, new in zip(states, news):
            h.value = new
        return output(news)


def output(news):
    return news[-1] + (news[0] ** 2 if len(news) > 1 else 0.0)


def loss(out):
    return jnp.sum(jnp.arange(1.0, out.size + 1).reshape(out.shape) * out)


def by_dense_jacobians(transition, number, shape, weight, xs, decay):
    """The gradient of D_RTRL, or of pp_prop with a decay, from the recursions of docs/mathematics.md."""
    size = int(np.prod(shape))
    hs, total = [jnp.zeros(shape)] * number, 0.0
    trace = jnp.zeros((number, *shape, weight.shape[0]))
    ex, ef = jnp.zeros(xs.shape[1:]), jnp.zeros((number, *shape))

    def own(jacobian):
        return jnp.diagonal(jacobian.reshape(size, size)).reshape(shape)

    for t, x in enumerate(xs):
        y = x @ weight
        cut = lambda hs, y: transition(hs, y, jax.lax.stop_gradient)  # noqa: E731
        jacobians = jax.jacobian(cut, (0, 1))(hs, y)
        D = jnp.stack([jnp.stack([own(b) for b in of_old]) for of_old, _ in jacobians])
        df = jnp.stack([own(of_y) for _, of_y in jacobians])
        news = cut(hs, y)
        L = list(jax.grad(lambda news: loss(output(news)))(news))
        # What is held within the transition is read from outside of it.
        beside = jax.grad(lambda z: loss(output(transition(hs, y, lambda v: jax.lax.stop_gradient(v) + z))))
        L[0] = L[0] + beside(jnp.zeros(shape))
        L = jnp.stack(L)
        whole = jax.grad(lambda y: loss(output(transition(hs, y, hold))))(y)
        if decay is None:
            trace = jnp.einsum("ab...,b...i->a...i", D, trace) + df[..., None] * x[..., None, :]
            gradient = jnp.einsum("a...,a...i->...i", L, trace)
        else:
            ex = decay * ex + x
            ef = decay * jnp.einsum("ab...,b...->a...", D, ef) + (1 - decay) * df
            gradient = ((L * ef).sum(0) / (1 - decay ** (t + 1)))[..., None] * ex[..., None, :]
        gradient = gradient + (whole - (L * df).sum(0))[..., None] * x[..., None, :]
        total = total + gradient.reshape(-1, *weight.shape[::-1]).sum(0).T
        hs = transition(hs, y, hold)
    return total


def online(make, net, xs, driver):
    """The gradient of the summed losses by a learner that ``make`` makes of ``net``."""
    xs, parameters = jnp.asarray(xs), net.states(ParamState)
    learner = learner_of(net, xs[0], make, "by hand" if driver == "mapped" else None)
    if driver != "step":
        return learner.etrace_grad(xs, step_fn=lambda x: loss(learner(x)), reduction="sum", weights=parameters)
    step = brainstate.transform.jit(brainstate.transform.grad(lambda x: loss(learner(x)), parameters))
    total = None
    for x in xs:
        gradient = step(x)
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
    return total


def assert_equal(found, expected, tolerance=1e-11):
    scale = max(float(jnp.abs(e).max()) for e in jax.tree.leaves(expected))
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert f.dtype == e.dtype
        np.testing.assert_allclose(f, e, rtol=0, atol=tolerance * scale)


RULES = {
    "d_rtrl": (lambda net: braintrace.D_RTRL(net), None),
    "pp_prop": (lambda net: braintrace.pp_prop(net, 0.9), 0.9),
}


@pytest.mark.parametrize("rule, driver", [("d_rtrl", "step"), ("pp_prop", "sequence"), ("d_rtrl", "mapped")])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_a_transition_is_one_program(name, rule, driver):
    transition, weight = TRANSITIONS[name], draw(2, 4)
    shape = (4,) if driver == "step" else (3, 4)
    number = len(transition([jnp.zeros(4)] * 2, jnp.zeros(4), hold))
    xs = draw(3, *shape[:-1], 2, seed=1)
    make, decay = RULES[rule]
    net = Network(transition, number, shape[1:] if driver == "mapped" else shape, weight)
    found = online(make, net, xs, driver)["w",]
    assert_equal(found, by_dense_jacobians(transition, number, shape, weight, xs, decay))
    assert len(net.states(HiddenState)) == number


@pytest.mark.parametrize("name", ["value and mean", "custom reverse rule", "flipped there and back", "barrier"])
def test_members_that_reach_each_other_in_place_are_one_group(name):
    net = Network(TRANSITIONS[name], 2, (4,), draw(2, 4))
    (group,) = braintrace.compile_etrace_graph(net, jnp.zeros(2)).hidden_groups
    assert group.num_state == 2


def test_a_mixing_way_alone_links_no_states():
    for read in (mean, lambda a: jnp.cumsum(a, -1), lambda a: jnp.roll(a, 1, -1)):
        net = Network(downstream(lambda a, read=read: read(a) * jnp.ones(4)), 2, (4,), draw(2, 4))
        assert len(braintrace.compile_etrace_graph(net, jnp.zeros(2)).hidden_groups) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Outputs of another shape than the state: D_RTRL equals back-propagation through time.

CONV = dict(dimension_numbers=("NHC", "HIO", "NHC"))
SHAPES = {  # shape of the state, of the weight, of the input, and what drives the state
    "first of one sample": ((4,), (2, 4), (2,), lambda x, w: braintrace.matmul(x[None], w)[0]),
    "squeezed": ((4,), (2, 4), (2,), lambda x, w: jnp.squeeze(braintrace.matmul(x[None], w))),
    "one more axis": ((1, 4), (2, 4), (2,), lambda x, w: braintrace.matmul(x, w)[None]),
    "broadcast to one more axis": ((1, 4), (2, 4), (2,), lambda x, w: braintrace.matmul(x, w)),
    "an axis behind": ((4, 1), (2, 4), (2,), lambda x, w: braintrace.matmul(x, w)[:, None]),
    "reshaped": ((5, 2, 3), (2, 6), (5, 2), lambda x, w: braintrace.matmul(x, w).reshape(5, 2, 3)),
    "reshaped and turned": ((3, 2), (2, 6), (2,), lambda x, w: braintrace.matmul(x, w).reshape(2, 3).T),
    "samples last": ((4, 5), (2, 4), (5, 2), lambda x, w: braintrace.matmul(x, w).T),
    "samples merged": (
        (3, 2, 4),
        (2, 4),
        (3, 2, 2),
        lambda x, w: braintrace.matmul(x.reshape(6, 2), w).reshape(3, 2, 4),
    ),
    "padded": ((6,), (2, 4), (2,), lambda x, w: jnp.pad(braintrace.matmul(x, w), 1)),
    "padded and cropped": ((4,), (2, 4), (2,), lambda x, w: jnp.pad(braintrace.matmul(x, w), 1)[1:-1]),
    "set": ((6,), (2, 3), (2,), lambda x, w: jnp.zeros(6).at[jnp.array([0, 2, 5])].set(braintrace.matmul(x, w))),
    "conv of one sample": ((6, 3), (3, 2, 3), (6, 2), lambda x, w: braintrace.conv(x[None], w, **CONV)[0]),
    "conv, flat": ((4, 18), (3, 2, 3), (4, 6, 2), lambda x, w: braintrace.conv(x, w, **CONV).reshape(4, -1)),
    "element-wise": ((4,), (1, 4), (2,), lambda x, w: braintrace.element_wise(w)[0] * x[0]),
    "grouped, flat": ((6,), (2, 2, 3), (2, 2), lambda x, w: braintrace.grouped_matmul(x, w).reshape(-1)),
    "embedding": ((4,), (7, 4), (2,), lambda x, w: braintrace.embedding((x[:1] > 0).astype(int) + 2, w)[0]),
}


class Driven(brainstate.nn.Module):
    """``new = step(old, x, parameters)``, read by ``out``."""

    def __init__(self, shape, parameters, step, out=hold, dtype=float):
        super().__init__()
        self.shape, self.dtype, self.step, self.out = shape, dtype, step, out
        self.w = ParamState(jax.tree.map(jnp.asarray, parameters))
        self.init_state()

    def init_state(self, *args, **kwargs):
        self.h = HiddenState(jnp.zeros(self.shape, self.dtype))

    def update(self, x):
        self.h.value = self.step(self.h.value, x, self.w.value)
        return self.out(self.h.value)


def backpropagated(parameters, xs, shape, step, out=hold, dtype=float):
    def total(parameters):
        h, sum_of_losses = jnp.zeros(shape, dtype), 0.0
        for x in xs:
            h = step(h, x, parameters)
            sum_of_losses += loss(out(h))
        return sum_of_losses

    return jax.grad(total)(jax.tree.map(jnp.asarray, parameters))


@pytest.mark.parametrize("driver", ["step", "sequence"])
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_of_any_shape_are_followed(name, driver):
    shape, of_weight, of_x, drive = SHAPES[name]
    step = lambda h, x, w: jnp.tanh(0.7 * h + drive(x, w))  # noqa: E731
    weight, xs = draw(*of_weight), draw(3, *of_x, seed=1)
    expected = backpropagated(weight, xs, shape, step)
    assert_equal(online(braintrace.D_RTRL, Driven(shape, weight, step), xs, driver)["w",], expected)
    approximate = online(lambda net: braintrace.pp_prop(net, 0.9), Driven(shape, weight, step), xs, driver)["w",]
    first = online(lambda net: braintrace.pp_prop(net, 0.9), Driven(shape, weight, step), xs[:1], driver)["w",]
    assert_equal(first, backpropagated(weight, xs[:1], shape, step))
    assert float(jnp.abs(approximate - expected).max()) > 1e-3 * float(jnp.abs(expected).max())


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_an_untrained_operand_may_be_as_large_as_the_batch(batch):
    matrix, kernels = draw(3, 4, seed=3), draw(3, 2, 4, seed=4)
    rows = {
        "matmul": ((4,), (3,), lambda x, b: braintrace.matmul(x, matrix, b), (4,)),
        "grouped": ((3, 4), (3, 2), lambda x, b: braintrace.grouped_matmul(x, kernels, b), (3, 4)),
    }
    for of_state, of_x, drive, of_bias in rows.values():
        shape, bias = (batch, *of_state), draw(*of_bias)
        step = lambda h, x, b, drive=drive: jnp.tanh(0.7 * h + drive(x, b))  # noqa: E731
        xs = draw(3, batch, *of_x, seed=1)
        found = online(braintrace.D_RTRL, Driven(shape, bias, step), xs, "sequence")["w",]
        assert_equal(found, backpropagated(bias, xs, shape, step))


# ---------------------------------------------------------------------------------------------------------------------
# Precision: a value that is stored in another one is the same value.


@pytest.mark.parametrize("driver", ["step", "sequence"])
@pytest.mark.parametrize("rule", ["d_rtrl", "pp_prop"])
@pytest.mark.parametrize("of_state, of_weight, of_x", ["ffd", "ddf", "fdd", "dff"])
def test_a_change_of_precision_is_the_same_value(of_state, of_weight, of_x, rule, driver):
    of = {"f": jnp.float32, "d": jnp.float64}
    step = lambda h, x, w: jnp.tanh(0.9 * h + braintrace.matmul(x, w))  # noqa: E731
    weight, xs = draw(2, 3) * 0.5, draw(5, 4, 2, seed=1)
    make, _ = RULES[rule]
    expected = online(make, Driven((4, 3), weight, step), xs, driver)["w",]
    net = Driven((4, 3), jnp.asarray(weight, of[of_weight]), step, dtype=of[of_state])
    found = online(make, net, jnp.asarray(xs, of[of_x]), driver)["w",]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * float(jnp.abs(expected).max()))


# ---------------------------------------------------------------------------------------------------------------------
# Complex hidden values: D_RTRL equals back-propagation through time, with JAX's convention for complex gradients.

TURN = 0.9 * np.exp(0.5j)
TURNS = 0.8 * np.exp(1j * np.arange(1.0, 4.0))


def pair(*shape):
    return draw(*shape) + 1j * draw(*shape, seed=5)


def of_parts(h):
    return h.imag + h.real**2


COMPLEX = {  # parameters, step, what leaves the step
    "constant turn": (draw(2, 3), lambda h, x, w: TURN * h + 1j * braintrace.matmul(x, w), jnp.imag),
    "a turn for each unit": (draw(2, 3), lambda h, x, w: TURNS * h + braintrace.matmul(x, w), of_parts),
    "complex weights": (pair(2, 3), lambda h, x, w: TURNS * h + braintrace.matmul(x, w), of_parts),
    "complex weights, one turn for all": (pair(2, 3), lambda h, x, w: TURN * h + braintrace.matmul(x, w), of_parts),
    "complex weights and bias, one turn for all": (
        {"b": pair(3), "w": pair(2, 3)},
        lambda h, x, p: TURN * h + braintrace.matmul(x, p["w"], p["b"]),
        of_parts,
    ),
    "complex input": (draw(2, 3), lambda h, x, w: TURNS * h + braintrace.matmul(x * (1 + 2j), w), of_parts),
    "learnt turn": (
        draw(3),
        lambda h, x, w: jnp.exp(-0.1 + 1j * braintrace.element_wise(w)) * h + x.sum(-1, keepdims=True),
        of_parts,
    ),
    "complex hook of a real parameter": (
        draw(3),
        lambda h, x, w: braintrace.element_wise(w, weight_fn=lambda w: jnp.exp(1j * w) / 2) * h + 1 + x[..., :1],
        of_parts,
    ),
    "complex element-wise parameter": (
        pair(3),
        lambda h, x, w: braintrace.element_wise(w, weight_fn=lambda w: jnp.conj(w) / 3) * h + 1 + x[..., :1],
        of_parts,
    ),
    "not holomorphic": (
        draw(2, 3),
        lambda h, x, w: TURNS * h + 0.3 * h.conj() + (1 + jnp.tanh(h.real)) * braintrace.matmul(x, w),
        of_parts,
    ),
    "bounded": (
        pair(2, 3),
        lambda h, x, w: (z := TURNS * h + braintrace.matmul(x, w)) / (1 + z.real**2 + z.imag**2),
        of_parts,
    ),
    "several parameters": (
        {"b": draw(3), "w": draw(2, 3)},
        lambda h, x, p: TURNS * h + (1 + 1j) * braintrace.matmul(x, p["w"], p["b"]),
        of_parts,
    ),
}


@pytest.mark.parametrize("driver", ["step", "sequence", "mapped"])
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_states_equal_backpropagation(name, driver):
    parameters, step, out = COMPLEX[name]
    xs = draw(4, 2, 2, seed=1)
    net = Driven((3,) if driver == "mapped" else (2, 3), parameters, step, out, complex)
    expected = backpropagated(parameters, xs, (2, 3), step, out, complex)
    assert_equal(online(braintrace.D_RTRL, net, xs, driver)["w",], expected)


def test_complex_states_of_every_rule_at_the_first_step():
    parameters, step, _ = COMPLEX["bounded"]
    xs = draw(1, 2, 2, seed=1)
    expected = backpropagated(parameters, xs, (2, 3), step, of_parts, complex)
    rules = {
        "pp_prop": lambda net: braintrace.pp_prop(net, 0.9),
        "eprop": lambda net: braintrace.EProp(net, kappa_filter_decay=0.5),
        "uoro": braintrace.UORO,
        "ostl": braintrace.OSTLRecurrent,
        "snap": braintrace.SnAp,
        "window": lambda net: braintrace.D_RTRL(net, vjp_method="multi-step"),
    }
    for make in rules.values():
        net = Driven((2, 3), parameters, step, of_parts, complex)
        assert_equal(online(make, net, xs, "sequence")["w",], expected)


@pytest.mark.parametrize("driver", ["step", "sequence"])
def test_complex_states_under_pp_prop(driver):
    """The recursion with D as a real 2 x 2 block and one complex row of df for each part."""
    weight, xs, decay = pair(2, 3), draw(4, 2, seed=1), 0.9
    step = lambda h, x, w: TURNS * h + braintrace.matmul(x, w)  # noqa: E731
    D = np.array([[TURNS.real, -TURNS.imag], [TURNS.imag, TURNS.real]])  # a, b, unit
    df = np.array([np.ones(3), -1j * np.ones(3)])  # real part: bar; imaginary part: -i bar
    h, ex, ef, expected = jnp.zeros(3, complex), np.zeros(2), np.zeros((2, 3), complex), 0.0
    for t, x in enumerate(xs):
        h = TURNS * h + x @ weight
        ex, ef = decay * ex + x, decay * np.einsum("abk,bk->ak", D, ef) + (1 - decay) * df
        L = np.arange(1.0, 4.0) * np.array([2 * h.real, np.ones(3)])
        expected = expected + ex[:, None] * (L * ef).sum(0) / (1 - decay ** (t + 1))
    net = Driven((3,), weight, step, of_parts, complex)
    assert_equal(online(lambda net: braintrace.pp_prop(net, decay), net, xs, driver)["w",], expected)


def test_the_gradient_of_a_complex_state_by_hand():
    """h = w x i at the first step: the loss h.imag ** 2 has the derivative 2 w x ** 2."""
    net = Driven((2,), jnp.ones((1, 2)), COMPLEX["constant turn"][1], jnp.imag, complex)
    learner = braintrace.pp_prop(net, 0.9)
    learner.compile_graph(jnp.ones(1))
    gradient = brainstate.transform.grad(lambda: (learner(jnp.ones(1)) ** 2).sum(), net.states(ParamState))()
    np.testing.assert_allclose(gradient["w",], [[2.0, 2.0]])
    (group,) = learner.graph.hidden_groups
    assert group.num_state == 2 and net.h.value.dtype == jnp.complex128


# ---------------------------------------------------------------------------------------------------------------------
# Ranks: nothing here leans on how JAX promotes them.

RANKS = {
    "gru": lambda: braintrace.nn.GRUCell(3, 4),
    "urlstm": lambda: braintrace.nn.URLSTMCell(3, 4),
    "lru": lambda: braintrace.nn.LRUCell(3, 4),
    "rtu": lambda: braintrace.nn.RTUCell(3, 4),
    "standardised": lambda: brainstate.nn.Sequential(
        braintrace.nn.ScaledWSLinear(3, 4), braintrace.nn.MGUCell(4, 4), braintrace.nn.Linear(4, 2)
    ),
}


@pytest.mark.parametrize("rule", ["d_rtrl", "pp_prop", "eprop"])
@pytest.mark.parametrize("model", RANKS)
def test_ranks_need_not_be_promoted(model, rule):
    options = {"pp_prop": {"decay_or_rank": 0.9}, "eprop": {"kappa_filter_decay": 0.5}}.get(rule, {})
    found = []
    for promotion in ("raise", "allow"):
        with jax.numpy_rank_promotion(promotion):
            brainstate.random.seed(0)
            xs = jnp.asarray(draw(3, 2, 3, seed=1))
            learner = braintrace.compile(RANKS[model](), rule, xs[0], batch_size=2, **options)
            gradient = learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).sum())  # noqa: B023
            step = brainstate.transform.grad(lambda x: (learner(x) ** 2).sum(), learner.param_states)  # noqa: B023
            found.append((gradient, brainstate.transform.jit(lambda x: step(x))(xs[0])))  # noqa: B023
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-12), *found))
