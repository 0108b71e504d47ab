"""What engines ask of every operation: its credit under pp_prop, its weight gradient, and its unshared form."""

import functools
import importlib.util
import itertools

import brainevent
import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate import HiddenState, ParamState
from helpers import assert_close
from models import Plain

import braintrace
from braintrace._ops.conv import _samples_last, etp_conv_p, etp_conv_v_p
from braintrace._ops.einsum import etp_einsum_p
from braintrace._ops.embedding import etp_emb_p, etp_emb_v_p
from braintrace._ops.linear import etp_gmm_p, etp_gmv_p, etp_mm_p, etp_mv_p
from braintrace._ops.lora import etp_lora_mm_p, etp_lora_mv_p
from braintrace._ops.sparse import etp_sp_mm_p, etp_sp_mv_p

BATCH, STEPS, DECAY = 2, 3, 0.8


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


def cube(w):
    return w**3


LAST = ("NHWC", "HWIO", "NHWC")
DENSE = draw(4, 3) * jnp.array([[0.0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 0]])
CSR = brainevent.CSR.fromdense(DENSE)
CSC = brainevent.CSC.fromdense(DENSE)
SHARED = brainevent.FixedNumPerPre(draw(1), jnp.array([[0, 2], [1, 0], [1, 2], [0, 1]]), shape=(4, 3))
FAN = brainevent.FixedNumPerPost(draw(3, 2), jnp.array([[0, 1], [1, 3], [2, 0]]), shape=(4, 3))
COO = (CSR.tocoo().row, CSR.tocoo().col)
CSC_COO = np.nonzero(np.asarray(DENSE.T))


def conv2d(x, k, b):
    """A batch of images, channels last, written as a sum over the window."""
    k, pad = cube(k), jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    y = sum(jnp.einsum("bhwi,io->bhwo", pad[:, i : i + 4, j : j + 5 : 2], k[i, j]) for i in range(3) for j in range(3))
    return y + b


def conv1d(x, k, b=None):
    """Channels first, no padding."""
    y = sum(jnp.einsum("bit,oi->bot", x[..., i : i + x.shape[-1] - 1], k[..., i]) for i in range(2))
    return y if b is None else y + b[:, None]


def call_conv2d(x, k, b):
    return braintrace.conv(x, k, b, strides=(1, 2), padding=[(1, 1), (1, 1)], dimension_numbers=LAST, kernel_fn=cube)


# name: operation, the same as a dense function of a batch, linear in its input; shape of one input; weights; marks of
# one sample and of a batch
ROWS = {
    "matmul": (braintrace.matmul, lambda x, w, b: x @ w + b, (4,), [(4, 3), (3,)], "etp_mv", "etp_mm"),
    "matmul, one bias": (braintrace.matmul, lambda x, w, b: x @ w + b, (4,), [(4, 3), (1,)], "etp_mv", "etp_mm"),
    "matmul-hook": (
        lambda x, w, b: braintrace.matmul(x, w, b, weight_fn=cube, bias_fn=jnp.tanh),
        lambda x, w, b: x @ w**3 + jnp.tanh(b),
        (4,),
        [(4, 3), (3,)],
        "etp_mv",
        "etp_mm",
    ),
    "grouped": (
        braintrace.grouped_matmul,
        lambda x, w, b: jnp.stack([x[:, g] @ w[g] + b[g] for g in range(2)], 1),
        (2, 4),
        [(2, 4, 3), (2, 3)],
        "etp_gmv",
        "etp_gmm",
    ),
    "embedding": (
        lambda i, t: braintrace.embedding(i, t, weight_fn=cube),
        lambda x, t: x @ t**3,
        5,
        [(5, 3)],
        "etp_emb_v",
        "etp_emb",
    ),
    "einsum": (
        lambda x, w: braintrace.einsum("bk,kn->bn", x, w),
        lambda x, w: x @ w,
        (4,),
        [(4, 3)],
        None,
        "etp_einsum",
    ),
    "einsum-shared": (
        lambda x, w: braintrace.einsum("bktg,gkn->bngt", x, w, weight_fn=cube),
        lambda x, w: sum((x[:, k, ..., None] * w[:, k] ** 3).transpose(0, 3, 2, 1) for k in range(4)),
        (4, 2, 3),
        [(3, 4, 2)],
        None,
        "etp_einsum",
    ),
    "lora": (
        lambda x, b, a, c: braintrace.lora_matmul(x, b, a, alpha=0.5, bias=c, b_fn=cube, a_fn=jnp.tanh),
        lambda x, b, a, c: 0.5 * x @ b**3 @ jnp.tanh(a) + c,
        (4,),
        [(4, 2), (2, 3), (3,)],
        "etp_lora_mv",
        "etp_lora_mm",
    ),
    "csr": (
        lambda x, w, b: braintrace.sparse_matmul(x, w, sparse_mat=CSR, bias=b),
        lambda x, w, b: x @ jnp.zeros((4, 3)).at[COO].set(w) + b,
        (4,),
        [(6,), (3,)],
        "etp_sp_mv",
        "etp_sp_mm",
    ),
    "csc": (
        lambda x, w: braintrace.sparse_matmul(x, w, sparse_mat=CSC, weight_fn=cube),
        lambda x, w: x @ jnp.zeros((3, 4)).at[CSC_COO].set(w**3).T,
        (4,),
        [(6,)],
        "etp_sp_mv",
        "etp_sp_mm",
    ),
    "fan": (
        lambda x, w: braintrace.sparse_matmul(x, w, sparse_mat=FAN),
        lambda x, w: jnp.stack([x[:, FAN.indices[o]] @ w[o] for o in range(3)], 1),
        (4,),
        [(3, 2)],
        "etp_sp_mv",
        "etp_sp_mm",
    ),
    "one value": (
        lambda x, w: braintrace.sparse_matmul(x, w, sparse_mat=SHARED),
        lambda x, w: w * x @ jnp.array([[1.0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 0]]),
        (4,),
        [(1,)],
        "etp_sp_mv",
        "etp_sp_mm",
    ),
    "conv1d": (
        lambda x, k, b: braintrace.conv(x, k, b, padding="VALID"),
        conv1d,
        (2, 5),
        [(3, 2, 2), (3,)],
        "etp_conv",
        "etp_conv",
    ),
    "conv1d-square": (  # as many positions as channels
        lambda x, k, b: braintrace.conv(x, k, b, padding="VALID"),
        conv1d,
        (2, 4),
        [(3, 2, 2), (3,)],
        "etp_conv",
        "etp_conv",
    ),
    "conv1d-grouped": (
        lambda x, k: braintrace.conv(x, k, padding="VALID", feature_group_count=2),
        lambda x, k: jnp.concatenate([conv1d(x[:, :2], k[:2]), conv1d(x[:, 2:], k[2:])], 1),
        (4, 5),
        [(4, 2, 2)],
        "etp_conv",
        "etp_conv",
    ),
    "conv2d": (call_conv2d, conv2d, (4, 5, 2), [(3, 3, 2, 3), (1, 1, 3)], "etp_conv", "etp_conv"),
    "conv2d-shaped-bias": (
        call_conv2d,
        conv2d,
        (4, 5, 2),
        [(3, 3, 2, 3), (1, 4, 3, 3)],
        "etp_conv",
        "etp_conv",
    ),
}
CASES = [(name, batch) for name, row in ROWS.items() for batch in (None, BATCH) if batch or row[4]]
every_case = pytest.mark.parametrize("name, batch", CASES)


def case(name, batch):
    """`(operation, dense function, inputs over time, their linear form with a batch axis, weights, mark)`."""
    op, dense, shape, weights, one, many = ROWS[name]
    lead = () if batch is None else (batch,)
    if isinstance(shape, int):
        xs = jnp.asarray(np.random.default_rng(3).integers(0, shape, (STEPS, *lead)))
        linear = jnp.eye(shape)[xs]
    else:
        xs = linear = draw(STEPS, *lead, *shape, seed=3)
    linear = linear[:, None] if batch is None else linear
    return op, dense, xs, linear, [draw(*s, seed=i) for i, s in enumerate(weights)], one if batch is None else many


class Layer(brainstate.nn.Module):
    """h <- tanh(h / 2 + op(x, weights))"""

    def __init__(self, op, h, weights):
        super().__init__()
        self.op, self.h, self.w = op, HiddenState(h), ParamState(weights)

    def update(self, x):
        self.h.value = jnp.tanh(0.5 * self.h.value + self.op(x, *self.w.value))
        return self.h.value


def oracle(operation, linear, weights, **options):
    """Gradients of every step under pp_prop, for the loss `(h * c).sum()`; options have an axis of time."""
    c = draw(*jax.eval_shape(operation, linear[0], *weights).shape, seed=5)

    @jax.jit
    def gradients(linear, weights, options):
        h, ex, one, ef, found = jnp.zeros(c.shape), jnp.zeros(linear[0].shape), 0.0, jnp.zeros(c.shape), []
        for n, x in enumerate(linear):
            dense = functools.partial(operation, **{k: v[n] for k, v in options.items()})
            h = jnp.tanh(0.5 * h + dense(x, *weights))
            df = 1 - h**2
            ex, one = DECAY * ex + x, DECAY * one + 1
            ef = DECAY * 0.5 * df * ef + (1 - DECAY) * df
            signal = c * ef / (1 - DECAY ** (n + 1))
            (linear_part, offset) = (jax.vjp(lambda *ws, x=x, f=dense: f(x, *ws), *weights)[1] for x in (ex, 0 * ex))
            found.append([a + (one - 1) * b for a, b in zip(linear_part(signal), offset(signal))])
        return found

    return c, gradients(linear, weights, options)


@every_case
def test_pp_prop_follows_the_recursions(name, batch):
    op, dense, xs, linear, weights, mark = case(name, batch)
    c, expected = oracle(dense, linear, weights)
    c = c[0] if batch is None else c
    learner = braintrace.pp_prop(Layer(op, jnp.zeros(c.shape), weights), DECAY)
    learner.compile_graph(xs[0])
    (relation,) = learner.graph.hidden_param_op_relations
    assert relation.primitive.name == mark and len(relation.trainable_vars) == len(weights)
    step = brainstate.transform.jit(
        brainstate.transform.grad(lambda x: (learner(x) * c).sum(), learner.param_states, return_value=True)
    )
    for x, truth in zip(xs, expected):
        (gradient,) = step(x)[0].values()
        for a, b in zip(gradient, truth, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_trace_is_seen():
    """Negative control: with another decay the same gradients differ, from the second step on."""
    op, dense, xs, linear, weights, _ = case("conv2d", BATCH)
    c, expected = oracle(dense, linear, weights)
    learner = braintrace.pp_prop(Layer(op, jnp.zeros(c.shape), weights), 0.5)
    learner.compile_graph(xs[0])
    for n, x in enumerate(xs[:2]):
        (gradient,) = brainstate.transform.grad(lambda: (learner(x) * c).sum(), learner.param_states)().values()
        assert np.allclose(gradient[0], expected[n][0], rtol=1e-3, atol=1e-4) == (n == 0)


# -- a trace per weight: without recurrence through weights, the gradient of a step's loss through all earlier steps


def exact(dense, linear, weights, kappa, **options):
    """Gradients of every step, for the loss `(h * c).sum()`, with traces that are filtered by `kappa`."""
    shape = jax.eval_shape(dense, linear[0], *weights).shape
    c = draw(*shape, seed=5)

    def losses(weights):
        def body(h, item):
            x, options = item
            h = jnp.tanh(0.5 * h + dense(x, *weights, **options))
            return h, (h * c).sum()

        return jax.lax.scan(body, jnp.zeros(shape), (linear, options))[1]

    single = jax.jacrev(losses)(weights)  # the signal is c at every step
    steps = len(linear)
    mix = jnp.array([[kappa ** (t - s) if s <= t else 0.0 for s in range(steps)] for t in range(steps)])
    return c, [jnp.tensordot(mix, g, 1) for g in single]


PER_PARAMETER = {"d_rtrl": 0.0, "eprop": 0.6}
UNGROUPED = [(name, batch) for name, batch in CASES if name != "conv1d-grouped"]


def per_parameter(rule, model, x, **options):
    more = {"kappa_filter_decay": PER_PARAMETER[rule]} if rule == "eprop" else {}
    return braintrace.compile(model, rule, x, **options, **more)


class Fresh(Layer):
    """A layer whose state is made anew."""

    def init_state(self, batch_size=None, **kwargs):
        del kwargs
        self.h = HiddenState(jnp.zeros(self.h.value.shape))


@pytest.mark.parametrize("rule", PER_PARAMETER)
@pytest.mark.parametrize("name, batch", UNGROUPED)
def test_a_trace_per_weight(name, batch, rule):
    op, dense, xs, linear, weights, mark = case(name, batch)
    c, expected = exact(dense, linear, weights, PER_PARAMETER[rule])
    c = c[0] if batch is None else c
    learner = per_parameter(rule, Fresh(op, jnp.zeros(c.shape), weights), xs[0])
    (relation,) = learner.graph.hidden_param_op_relations
    assert relation.primitive.name == mark
    step = brainstate.transform.jit(brainstate.transform.grad(lambda x: (learner(x) * c).sum(), learner.param_states))
    for t, x in enumerate(xs):
        (gradient,) = step(x).values()
        for a, b in zip(gradient, expected, strict=True):
            np.testing.assert_allclose(a, b[t], rtol=1e-4, atol=1e-4)
    learner = per_parameter(rule, Fresh(op, jnp.zeros(c.shape), weights), xs[0])
    (total,) = learner.etrace_grad(
        xs, step_fn=lambda x: (learner(x) * c).sum(), reduction="sum", trace_chunk=2
    ).values()
    for a, b in zip(total, expected, strict=True):
        np.testing.assert_allclose(a, b.sum(0), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("rule", PER_PARAMETER)
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row[4] and name != "conv1d-grouped"])
def test_a_trace_per_weight_of_mapped_samples(name, rule):
    op, dense, xs, linear, weights, _ = case(name, BATCH)
    c, expected = exact(dense, linear, weights, PER_PARAMETER[rule])
    model = Fresh(op, jnp.zeros(c.shape[1:]), weights)
    learner = per_parameter(rule, model, xs[0], batch_size=BATCH, vmap=True)
    (total,) = learner.etrace_grad(
        xs, step_fn=lambda x: (learner(x) * c).sum(), reduction="sum", trace_chunk=2
    ).values()
    for a, b in zip(total, expected, strict=True):
        np.testing.assert_allclose(a, b.sum(0), rtol=1e-4, atol=2e-4)


# -- any subset of the weights, the others constant or computed at every step


class Part(Layer):
    """A layer of which some weights are trained, the others a multiple of a constant, which is given."""

    def __init__(self, op, h, weights, trained):
        super().__init__(op, h, [w for w, t in zip(weights, trained) if t])
        self.weights, self.trained = weights, trained

    def init_state(self, batch_size=None, **_):
        front = () if batch_size is None else (batch_size,)
        self.h = HiddenState(jnp.zeros((*front, *self.h.value.shape)))

    def update(self, inputs):
        x, scale = inputs
        own = iter(self.w.value)
        weights = [next(own) if t else w if scale is None else scale * w for w, t in zip(self.weights, self.trained)]
        self.h.value = jnp.tanh(0.5 * self.h.value + self.op(x, *weights))
        return self.h.value


PARTS = [
    (name, trained)
    for name in ["matmul-hook", "grouped", "csr", "conv1d", "conv2d", "lora"]
    for trained in itertools.product([True, False], repeat=len(ROWS[name][3]))
    if any(trained) and not all(trained)
]
SCALES = jnp.array([0.5, -0.7, 1.3])
PART_RULES = {
    "pp_prop": (braintrace.pp_prop, dict(decay_or_rank=DECAY)),
    "eprop": (braintrace.EProp, dict(kappa_filter_decay=0.6)),
    "snap": (braintrace.SnAp, dict(n=2)),
}
SOME_PARTS = [("lora", (True, False, False)), ("matmul-hook", (False, True)), ("conv1d", (False, True))]


@pytest.mark.filterwarnings("ignore:.*(snap_pattern|trainable_invar)")
@pytest.mark.parametrize(
    "name, trained, rule",
    [(*part, "d_rtrl") for part in PARTS] + [(*part, rule) for part in SOME_PARTS for rule in PART_RULES],
)
def test_a_subset_of_the_weights(name, trained, rule):
    """Step by step for a batch, with constants; by chunks and mapped, with what is another value at every step."""
    batch = 7
    op, dense, shape, shapes, *_ = ROWS[name]
    xs, weights = draw(STEPS, batch, *shape, seed=3), [draw(*s, seed=i) for i, s in enumerate(shapes)]
    free = [w for w, t in zip(weights, trained) if t]

    def partial(x, *free, scale=1.0):
        own = iter(free)
        return dense(x, *[next(own) if t else scale * w for w, t in zip(weights, trained)])

    def truth(**options):
        if rule == "pp_prop":
            c, steps = oracle(partial, xs, free, **options)
            return c, [jnp.stack(g) for g in zip(*steps)]
        return exact(partial, xs, free, PER_PARAMETER.get(rule, 0.0), **options)

    c, expected = truth()
    kind, options = PART_RULES.get(rule, (rule, {}))
    learner = braintrace.compile(Part(op, c[0], weights, trained), kind, (xs[0], None), batch_size=batch, **options)
    step = brainstate.transform.jit(
        brainstate.transform.grad(lambda x: (learner((x, None)) * c).sum(), learner.param_states)
    )
    for t, x in enumerate(xs):
        (gradient,) = step(x).values()
        for a, b in zip(gradient, expected, strict=True):
            np.testing.assert_allclose(a, b[t], rtol=1e-4, atol=1e-4)
    c, expected = truth(scale=SCALES)
    inputs = xs, jnp.broadcast_to(SCALES[:, None], (STEPS, batch))
    first = jax.tree.map(lambda v: v[0], inputs)
    model = Part(op, c[0], weights, trained)
    learner = braintrace.compile(model, kind, first, batch_size=batch, vmap=True, **options)
    (total,) = learner.etrace_grad(
        inputs, step_fn=lambda inputs: (learner(inputs) * c).sum(), reduction="sum", trace_chunk=2
    ).values()
    for a, b in zip(total, expected, strict=True):
        np.testing.assert_allclose(a, b.sum(0), rtol=1e-4, atol=2e-4)


def test_grouped_convolutions_are_refused_with_a_trace_per_weight():
    op, _, xs, _, weights, _ = case("conv1d-grouped", BATCH)
    with pytest.raises(NotImplementedError, match="group"):
        per_parameter("d_rtrl", Fresh(op, jnp.zeros((BATCH, 4, 4)), weights), xs[0])


# -- the primitive by itself


def bound(op, x, weights):
    """The one marked equation of a call: primitive, keys of the trained operands, parameters."""
    (eqn,) = [e for e in jax.make_jaxpr(op)(x, *weights).eqns if isinstance(e.primitive, braintrace.ETPPrimitive)]
    slots = eqn.primitive.trainables(eqn.params)
    assert sorted(slots.values()) == list(range(1, 1 + len(weights)))
    return eqn.primitive, {k: weights[i - 1] for k, i in slots.items()}, eqn.params


@every_case
def test_weight_gradient_takes_more_leading_axes(name, batch):
    op, dense, xs, linear, weights, _ = case(name, batch)
    p, keyed, params = bound(op, xs[0], weights)
    ys = jnp.stack([op(x, *weights) for x in xs])
    reprs = jax.vmap(lambda x: p.x_repr(x, keyed))(xs)
    each = [p.weight_vjp(x, y, keyed, params, {}) for x, y in zip(reprs, ys)]
    summed = jax.tree.map(lambda *g: sum(g), *each)
    whole = jax.vmap(lambda x, y: p.weight_vjp(x, y, keyed, params, {}))(reprs, ys)
    flat = (jnp.reshape(a, (-1, *a.shape[2:])) if batch else a for a in (reprs, ys))
    twin = p if batch else p.batched_twin
    at_once = twin.weight_vjp(*flat, keyed, params, {})
    for k in keyed:
        np.testing.assert_allclose(whole[k].sum(0), summed[k], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(at_once[k], summed[k], rtol=1e-4, atol=1e-4)


@every_case
def test_batch_axes(name, batch):
    op, _, xs, _, weights, _ = case(name, batch)
    p, _, params = bound(op, xs[0], weights)
    y = jax.eval_shape(op, xs[0], *weights)
    assert p.lead(y, params) == p.lead(y) == (0 if batch is None else 1)


SHARES = {"einsum-shared", "lora", "one value", "conv1d", "conv1d-square", "conv2d", "conv2d-shaped-bias"}


def unshared(name):
    """Of one sample: `(function of x and unshared weights, x, unshared weights, the value, anchors)`."""
    op, dense, xs, linear, weights, _ = case(name, BATCH)
    p, keyed, params = bound(op, xs[0], weights)
    x = p.x_repr(xs[0], keyed)[0]
    y = dense(linear[0], *weights)[0]
    struct = {k: jax.ShapeDtypeStruct(w.shape, w.dtype) for k, w in keyed.items()}
    y_struct = jax.ShapeDtypeStruct(y.shape, y.dtype)
    unshare = p.rules.unshare
    form = None if unshare is None else unshare(x, y_struct, struct, params)
    assert (form is not None) == (name in SHARES)
    if form is None:

        def impl(x, ws):
            return p.impl_fn(x[None], *[ws[k] for k in keyed], **params)[0]

        return impl, x, keyed, keyed, y, p.rules.anchors(y_struct, struct, params), None
    wide = form.expand(keyed)
    wide_struct = {k: jax.ShapeDtypeStruct(wide[k].shape, wide[k].dtype) for k in keyed}
    return form.impl, x, keyed, wide, y, p.rules.anchors(y_struct, wide_struct, params), form.expand


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("conv1d-grouped", "matmul, one bias")])
def test_every_unshared_entry_acts_on_its_anchor_alone(name):
    impl, x, keyed, wide, y, anchors, _ = unshared(name)
    np.testing.assert_allclose(impl(x, wide), y, rtol=1e-4, atol=1e-4)
    jacobian = jax.jacobian(impl, 1)(x, wide)
    assert set(anchors) == set(keyed)
    for k in keyed:
        shape = wide[k].shape
        if anchors[k] is None:
            anchors[k] = tuple(np.indices(shape)[len(shape) - y.ndim :])
            assert shape[len(shape) - y.ndim :] == y.shape
        where = np.stack([np.broadcast_to(a, shape) for a in anchors[k]]).reshape(y.ndim, -1)
        acts = np.asarray(jacobian[k]).reshape(*y.shape, -1)
        entries = np.arange(acts.shape[-1])
        alone = np.zeros_like(acts)
        alone[(*where, entries)] = acts[(*where, entries)]
        np.testing.assert_array_equal(acts, alone)
        assert np.count_nonzero(acts)


@pytest.mark.parametrize("name", sorted(SHARES))
def test_the_unshared_form_has_the_derivative_of_the_operation(name):
    impl, x, keyed, wide, y, _, expand = unshared(name)
    op, dense, _, linear, weights, _ = case(name, BATCH)
    cotangent = draw(*y.shape, seed=7)
    (wide_gradient,) = jax.vjp(lambda ws: impl(x, ws), wide)[1](cotangent)
    (gradient,) = jax.vjp(expand, keyed)[1](wide_gradient)
    truth = jax.vjp(lambda *ws: dense(linear[0], *ws)[0], *weights)[1](cotangent)
    for k, b in zip(keyed, truth, strict=True):
        np.testing.assert_allclose(gradient[k], b, rtol=1e-4, atol=1e-4)


SHAPES = {  # of the trace of one sample, without the hidden variables
    "conv1d": {"weight": (4, 3, 2, 2), "bias": (3, 4)},
    "conv2d": {"weight": (4, 3, 3, 3, 2, 3), "bias": (4, 3, 3)},
    "einsum-shared": {"weight": (2, 3, 4, 2)},
    "lora": {"lora_b": (4, 3), "lora_a": (2, 3), "bias": (3,)},
    "one value": {"weight": (8,)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_unshared_weights(name):
    _, _, keyed, wide, _, _, _ = unshared(name)
    assert {k: wide[k].shape for k in keyed} == SHAPES[name]


def test_a_convolution_in_groups_has_no_unshared_form():
    x, kernel = draw(2, 4, 5), draw(4, 2, 3)
    p, keyed, params = bound(lambda x, k: braintrace.conv(x, k, feature_group_count=2), x, [kernel])
    with pytest.raises(NotImplementedError, match="feature_group_count=2.*pp_prop"):
        p.rules.unshare(x[0], jax.ShapeDtypeStruct((4, 5), x.dtype), keyed, params)


def test_a_shared_axis_by_hand():
    """Inputs 1 and 3 at two positions, which the loss weighs by 1 and 10."""
    model = Layer(lambda x, w: braintrace.einsum("btk,kn->btn", x, w), jnp.zeros((1, 2, 1)), [jnp.zeros((1, 1))])
    learner = braintrace.pp_prop(model, DECAY)
    x = jnp.array([1.0, 3.0]).reshape(1, 2, 1)
    learner.compile_graph(x)
    loss = jnp.array([1.0, 10.0]).reshape(1, 2, 1)
    (gradient,) = brainstate.transform.grad(lambda: (learner(x) * loss).sum(), learner.param_states)().values()
    np.testing.assert_allclose(gradient[0], [[31.0]], rtol=1e-6)


def test_groups_of_a_batch():
    """Two groups of two samples make two outputs; more axes in front are mapped."""
    x, k = draw(4, 2, 5), draw(4, 2, 2)
    p, _, params = bound(lambda x, k: braintrace.conv(x, k, padding="VALID", batch_group_count=2), x, [k])
    y = jnp.concatenate([conv1d(x[:2], k[:2]), conv1d(x[2:], k[2:])], 1)
    np.testing.assert_allclose(p.impl_fn(x, k, **params), y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(p.impl_fn(jnp.stack([x, -x]), k, **params), jnp.stack([y, -y]), rtol=1e-4, atol=1e-5)


def test_connections_that_are_drawn_when_needed():
    matrix = brainevent.JITCScalarR(jnp.array([1.5]), 0.5, 42, shape=(4, 3))
    x, w = draw(2, 4), jnp.array([2.0])
    if importlib.util.find_spec("numba") is None:
        with pytest.raises(RuntimeError, match="JITCScalarR.*brainevent"):
            braintrace.sparse_matmul(x, w, sparse_mat=matrix)
    else:
        dense = matrix.with_data(w).todense()
        np.testing.assert_allclose(braintrace.sparse_matmul(x, w, sparse_mat=matrix), x @ dense, rtol=1e-5)


TWINS = [
    (etp_mv_p, etp_mm_p),
    (etp_gmv_p, etp_gmm_p),
    (etp_emb_v_p, etp_emb_p),
    (etp_lora_mv_p, etp_lora_mm_p),
    (etp_sp_mv_p, etp_sp_mm_p),
    (etp_conv_v_p, etp_conv_p),
]


@pytest.mark.parametrize("one, many", TWINS)
def test_twins_know_each_other_and_share_their_rules(one, many):
    assert one.batched_twin is many and many.unbatched_twin is one
    assert not one.batched and many.batched and one.rules == many.rules and one.impl_fn is many.impl_fn
    assert etp_einsum_p.batched and etp_einsum_p.unbatched_twin is None


@pytest.mark.parametrize(
    "layout, x, kernel, geometry",
    [
        (("NWC", "WIO", "NWC"), (5, 9, 2), (3, 2, 4), dict(padding="SAME")),
        (("NCHW", "OIHW", "NCHW"), (3, 2, 7, 6), (4, 2, 3, 2), dict(padding="VALID", window_strides=(2, 1))),
        (("NHWC", "HWIO", "NHWC"), (3, 7, 6, 2), (3, 2, 2, 4), dict(padding=((0, 2), (1, 1)), rhs_dilation=(2, 1))),
        (("NHWC", "HWIO", "NCHW"), (3, 5, 6, 2), (2, 2, 2, 4), dict(padding=((1, 0), (0, 1)), lhs_dilation=(1, 2))),
        (("NDHWC", "DHWIO", "NDHWC"), (2, 4, 3, 5, 2), (2, 2, 3, 2, 3), dict(padding="SAME")),
    ],
)
def test_the_convolution_of_the_cpu_is_the_same_in_another_layout(layout, x, kernel, geometry):
    def of(shape, seed):
        return jax.random.normal(jax.random.key(seed), shape)

    n = len(kernel) - 2
    geometry = dict(window_strides=(1,) * n) | geometry
    numbers = jax.lax.conv_dimension_numbers(x, kernel, layout)
    results = []
    for convolve in (jax.lax.conv_general_dilated, _samples_last):
        y, pull = jax.vjp(lambda k, f=convolve: f(of(x, 0), k, dimension_numbers=numbers, **geometry), of(kernel, 1))
        results.append((y, *pull(of(y.shape, 2))))
    assert results[0][0].shape == results[1][0].shape
    for plain, other in zip(*results):
        np.testing.assert_allclose(plain, other, rtol=1e-5, atol=1e-5)


class SparseIntegrator(brainstate.nn.Module):
    def __init__(self, dtype, n):
        super().__init__()
        rng = np.random.default_rng(0)
        pointers = 4 * np.arange(n + 1, dtype=np.int32)
        matrix = brainevent.CSR((jnp.ones(4 * n), rng.integers(0, n, 4 * n, np.int32), pointers), shape=(n, n))
        self.synapses, self.dtype = braintrace.nn.SparseLinear(matrix), dtype
        self.h = HiddenState(jnp.zeros(n))

    def update(self, x):
        self.h.value = 0.9 * self.h.value + self.synapses(x.astype(self.dtype))
        return self.h.value


@pytest.mark.parametrize("n", [5, 20_000])  # the second takes the form for large matrices
@pytest.mark.parametrize("dtype", [bool, jnp.int32, jnp.float32])
def test_spikes_through_a_sparse_matrix_are_linear(dtype, n):
    """No second product at every step for what the operation would do to an input of zero."""
    learner = braintrace.compile(SparseIntegrator(dtype, n), "pp_prop", jnp.ones(n), decay_or_rank=0.9)
    (relation,) = learner.graph.hidden_param_op_relations
    assert relation.affine_keys == ()


# -- an offset is a weight whose input is 1

ONE_ENTRY = brainevent.CSR((jnp.ones(1), jnp.array([0]), jnp.array([0, 1])), shape=(1, 1))
AFFINE = braintrace.register_primitive(
    "affine_gain", lambda x, b, g: g * (x.sum() + b), trainable_invars_fn=lambda params: {"b": 1, "g": 2}
)
OFFSETS = {  # operations of an input [0] with the parameter b of shape (1,), which is 1
    "matmul": lambda x, b: braintrace.matmul(x, jnp.ones((1, 1)), b),
    "matmul, hook": lambda x, b: braintrace.matmul(x, jnp.ones((1, 1)), b, bias_fn=jnp.sin) / jnp.cos(1.0),
    "grouped": lambda x, b: braintrace.grouped_matmul(x[None], jnp.ones((1, 1, 1)), b[None]),
    "lora": lambda x, b: braintrace.lora_matmul(x, jnp.ones((1, 1)), jnp.ones((1, 1)), bias=b),
    "conv": lambda x, b: braintrace.conv(x[None], jnp.ones((1, 1, 1)), b),
    "sparse": lambda x, b: braintrace.sparse_matmul(x, jnp.ones(1), sparse_mat=ONE_ENTRY, bias=b),
    "element_wise": lambda x, b: braintrace.element_wise(b),
    "own": lambda x, b: AFFINE.bind(x, b, jnp.ones(1)),
    "own, of another form": lambda x, b: AFFINE.bind(x, jnp.ones(1), b),
    "twice, halved": lambda x, b: sum(braintrace.matmul(x, jnp.ones((1, 1)), b / 2) for _ in range(2)),
    "a row of the weight": lambda x, b: braintrace.matmul(x + 1, b[:, None]),
}


class Offset(brainstate.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.operation, self.b = OFFSETS[name], ParamState(jnp.ones(1))

    def init_state(self, batch_size=None, **_):
        self.h = HiddenState(jnp.zeros_like(self.operation(jnp.zeros(1), self.b.value)))

    def update(self, x):
        self.h.value = 0.95 * self.h.value + self.operation(x, self.b.value)
        return self.h.value


@pytest.mark.filterwarnings("ignore:.*trainable_invar")
@pytest.mark.parametrize("drive", ["steps", "chunks", "mapped"])
@pytest.mark.parametrize("name", OFFSETS)
def test_an_offset_is_a_weight_whose_input_is_one(name, drive):
    x, f, expected = 0.0, 0.0, 0.0
    for n in range(200):
        x, f = 0.98 * x + 1, 0.98 * 0.95 * f + 0.02
        expected += x * f / (1 - 0.98 ** (n + 1))
    assert abs(expected - 2703) < 0.1
    lead = (2,) if drive == "mapped" else ()
    xs = jnp.zeros((200, *lead, 1))
    options = dict(vmap=True, batch_size=2) if lead else {}
    learner = braintrace.compile(Offset(name), "pp_prop", xs[0], decay_or_rank=0.98, **options)
    if drive == "steps":
        step = brainstate.transform.grad(lambda x: learner(x).sum(), learner.param_states)
        found = brainstate.transform.for_loop(step, xs)["b",].sum()
    else:
        found = learner.etrace_grad(xs, step_fn=lambda x: learner(x).mean(), reduction="sum")["b",]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# -- the first step of D_RTRL and pp_prop is back-propagation


def first_step(model, learner_class, x, cost):
    """The gradient by the learner, and that of the model itself."""
    hidden = model.h.value
    learner = learner_class(model, *([DECAY] if learner_class is braintrace.pp_prop else []))
    learner.compile_graph(x)
    parameters = model.states(ParamState)
    ours = brainstate.transform.grad(lambda: (learner(x) * cost).sum(), parameters)()
    model.h.value = hidden
    return dict(ours), dict(brainstate.transform.grad(lambda: (model(x) * cost).sum(), parameters)())


@pytest.mark.parametrize("rule", [braintrace.pp_prop, braintrace.D_RTRL])
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_a_shared_element_wise_parameter_gets_its_gradient(shape, rule):
    def step(m, x):
        m.h.value = jnp.tanh(braintrace.element_wise(m.leak.value) * m.h.value + braintrace.matmul(x, m.w.value))
        return m.h.value

    ramp, w = jnp.arange(1.0, 4.0), jnp.array([[0.2, -0.1, 0.4]])
    model = Plain(step, w=ParamState(w), leak=ParamState(jnp.full(shape, 0.7)), h=HiddenState(ramp))
    assert_close(*first_step(model, rule, jnp.ones(1), ramp))


@pytest.mark.parametrize("rule", [braintrace.pp_prop, braintrace.D_RTRL])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("layout, size", [("NCH", (3, 4)), ("NCH", (3, 3)), ("NHC", (4, 3))])
def test_a_vector_as_the_bias_of_a_convolution(layout, size, batch, rule):
    """One entry per channel, also where there are as many positions."""
    shape = {"NCH": (3, 3, 2), "NHC": (2, 3, 3)}[layout]
    numbers = (layout, {"NCH": "OIH", "NHC": "HIO"}[layout], layout)
    kernel, b = draw(*shape, seed=1), draw(3, seed=2)
    x, cost = draw(*batch, *size, seed=3), draw(*batch, *size, seed=4)

    def plain(kernel, b):
        y = jax.lax.conv_general_dilated(x.reshape(-1, *size), kernel, (1,), "SAME", dimension_numbers=numbers)
        y = (y + (b[:, None] if layout == "NCH" else b)).reshape(cost.shape)
        return (jnp.tanh(y) * cost).sum()

    def step(m, x):
        m.h.value = jnp.tanh(0.5 * m.h.value + braintrace.conv(x, m.k.value, m.b.value, dimension_numbers=numbers))
        return m.h.value

    model = Plain(step, k=ParamState(kernel), b=ParamState(b), h=HiddenState(jnp.zeros(cost.shape)))
    ours, _ = first_step(model, rule, x, cost)
    by_k, by_b = jax.grad(plain, (0, 1))(kernel, b)
    assert_close(ours, {("k",): by_k, ("b",): by_b})
