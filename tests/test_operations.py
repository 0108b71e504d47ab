"""Marked operations: ordinary JAX values and derivatives, and operations of one's own."""

import warnings

import brainevent
import brainstate
import brainunit as u
import helpers
import jax
import jax.experimental.sparse as jsparse
import jax.numpy as jnp
import models
import numpy as np
import pytest
from brainstate import HiddenState, ParamState
from brainstate.transform import grad
from models import N_IN, N, Problem
from rules import check

import braintrace
from braintrace._ops import pattern_of, sparse_product

pytestmark = pytest.mark.usefixtures("time_step")

X = jnp.array([[0.5, -1.0], [1.5, 2.0], [0.0, -0.3], [2.0, 1.0]])
W = jnp.array([[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]])
B = jnp.array([0.01, 0.02, 0.03])
SPIKES = {"bool": X > 0.7, "int32": (X > 0.7).astype(jnp.int32), "uint8": (X > 0.7).astype(jnp.uint8)}


def square(w):
    return w**2


def primitives(f, *args):
    """Names of all equations, nested ones included."""
    names = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            names.append(eqn.primitive.name)
            for value in eqn.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                        walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(f)(*args).jaxpr)
    return names


def marks(f, *args):
    return [name for name in primitives(f, *args) if name.startswith("etp_")]


# -- values


def draw(*shape):
    """Fixed values around one, none of them zero."""
    return 1 + 0.7 * jnp.sin(1.0 + 2.3 * jnp.arange(np.prod(shape))).reshape(shape)


GROUPS, GROUP_BIAS = draw(4, 2, 3), draw(4, 3)
TABLE, ROWS = draw(5, 3), jnp.array([4, 0, -1, 2])
LOW, HIGH = draw(2, 2), draw(2, 3)
DENSE = draw(2, 3) * jnp.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
# Per kind of sparse matrix (of shape (2, 3)): the matrix, and its data -> dense, written by hand.
CSR = brainevent.CSR.fromdense(DENSE)
SPARSE = {
    "CSR": (CSR, lambda w: jnp.array([[0, w[0], w[1]], [w[2], 0, 0]])),
    "CSC": (brainevent.CSC.fromdense(DENSE), lambda w: jnp.array([[0, w[1], w[2]], [w[0], 0, 0]])),
    "transposed": (
        brainevent.CSR.fromdense(DENSE.T).T,
        lambda w: jnp.array([[0, w[1], w[2]], [w[0], 0, 0]]),
    ),
    "Dense": (brainevent.Dense(DENSE), lambda w: w),
    "per pre": (
        brainevent.FixedNumPerPre(draw(2, 2), jnp.array([[0, 2], [1, 0]]), shape=(2, 3)),
        lambda w: jnp.array([[w[0, 0], 0, w[0, 1]], [w[1, 1], w[1, 0], 0]]),
    ),
    "per post": (
        brainevent.FixedNumPerPost(draw(3, 1), jnp.array([[1], [0], [1]]), shape=(2, 3)),
        lambda w: jnp.array([[0, w[1, 0], 0], [w[0, 0], 0, w[2, 0]]]),
    ),
    "one value": (
        brainevent.FixedNumPerPre(draw(1), jnp.array([[0, 2], [1, 0]]), shape=(2, 3)),
        lambda w: w[0] * jnp.array([[1.0, 0, 1], [1, 1, 0]]),
    ),
    "twice in one place": (
        brainevent.FixedNumPerPre(draw(2, 2), jnp.array([[1, 1], [2, 0]]), shape=(2, 3)),
        lambda w: jnp.array([[0, w[0, 0] + w[0, 1], 0], [w[1, 1], 0, w[1, 0]]]),
    ),
    "BCOO": (jsparse.BCOO.fromdense(DENSE, nse=5), lambda w: jnp.array([[0, w[0], w[1]], [w[2], 0, 0]])),
    "BCSR": (jsparse.BCSR.fromdense(DENSE), lambda w: jnp.array([[0, w[0], w[1]], [w[2], 0, 0]])),
    "brainunit": (u.sparse.coo_fromdense(DENSE), lambda w: jnp.array([[0, w[0], w[1]], [w[2], 0, 0]])),
}
PLACES = np.random.default_rng(0).integers(0, (60, 70), (40, 2))  # far below the density of a dense product
THIN = jsparse.BCOO((draw(40), jnp.asarray(PLACES)), shape=(60, 70))


def thin(x, w):
    return x @ jnp.zeros(THIN.shape).at[PLACES[:, 0], PLACES[:, 1]].add(w)


DILATED = dict(strides=(1, 1), lhs_dilation=(1, 2), padding=[(1, 1), (0, 1)])
LAYOUTS = {  # dimension numbers, shape of x, of the kernel, options
    "1d": (None, (2, 3, 7), (4, 3, 3), dict()),
    "1d-last": (("NWC", "WIO", "NWC"), (2, 7, 3), (3, 3, 4), dict(padding="VALID")),
    "2d": (None, (2, 3, 5, 4), (4, 3, 3, 2), dict(strides=(2, 1))),
    "2d-last": (("NHWC", "HWIO", "NHWC"), (2, 5, 4, 3), (3, 2, 3, 4), dict(strides=(1, 2), rhs_dilation=(2, 1))),
    "2d-mixed": (
        ("NHWC", "OIHW", "NCHW"),
        (2, 5, 4, 3),
        (4, 3, 3, 2),
        dict(strides=(1, 1), lhs_dilation=(1, 2), padding=[(1, 1), (0, 1)]),
    ),
    "2d-batch-last": (("HWCN", "HWIO", "HWCN"), (5, 4, 3, 2), (3, 2, 3, 4), dict(strides=(1, 1))),
    "3d": (None, (2, 2, 3, 4, 3), (4, 2, 2, 2, 2), dict(strides=(1, 2, 1), padding=[(1, 0), (0, 0), (2, 1)])),
    "groups": (("NWC", "WIO", "NWC"), (2, 7, 4), (3, 2, 4), dict(feature_group_count=2)),
    "batch-groups": (None, (4, 3, 7), (4, 3, 3), dict(batch_group_count=2)),
}


def conv_call(name, bias=None, sample=False):
    """A convolution of the table above, JAX's own, and the operands."""
    layout, x_shape, kernel_shape, options = LAYOUTS[name]
    options = {"strides": (1,), "padding": "SAME", **options}
    strides, padding = options["strides"], options["padding"]
    rest = {k: v for k, v in options.items() if k not in ("strides", "padding")}
    out = (layout or ("NCWH",) * 3)[2]
    channel = out.index("C")

    def reference(x, kernel, *b):
        y = jax.lax.conv_general_dilated(
            x[None] if sample else x, kernel, strides, padding, dimension_numbers=layout, **rest
        )
        if b:
            y = y + (jnp.moveaxis(b[0].reshape(-1, *[1] * (y.ndim - 1)), 0, channel) if b[0].ndim == 1 else b[0])
        return y[0] if sample else y

    def ours(x, kernel, *b):
        return braintrace.conv(x, kernel, *b, dimension_numbers=layout, **options)

    args = (draw(*x_shape)[0] if sample else draw(*x_shape), draw(*kernel_shape))
    if bias is not None:
        args += (draw(*bias),)
    return ours, reference, args


CALLS = [  # operation, reference, arguments
    (braintrace.matmul, lambda x, w: x @ w, (X[0], W)),
    (braintrace.matmul, lambda x, w: x @ w, (X, W)),
    (braintrace.matmul, lambda x, w, b: x @ w + b, (X[0], W, B)),
    (braintrace.matmul, lambda x, w, b: x @ w + b, (X, W, B)),
    (lambda x, w: braintrace.matmul(x, w, weight_fn=square), lambda x, w: x @ w**2, (X, W)),
    (
        lambda x, w, b: braintrace.matmul(x, w, b, weight_fn=square, bias_fn=jnp.exp),
        lambda x, w, b: x @ w**2 + jnp.exp(b),
        (X, W, B),
    ),
    (lambda x, w, b: braintrace.matmul(x, weight=w, bias=b), lambda x, w, b: x @ w + b, (X, W, B)),
    (braintrace.element_wise, lambda w: w, (W,)),
    (braintrace.element_wise, lambda w: w, (jnp.asarray(0.3),)),
    (lambda w: braintrace.element_wise(w, jnp.tanh), jnp.tanh, (W,)),
    (lambda w: braintrace.element_wise(w, fn=jnp.tanh), jnp.tanh, (B,)),
    (lambda w: braintrace.element_wise(w, weight_fn=jnp.tanh), jnp.tanh, (B,)),
    (braintrace.grouped_matmul, lambda x, w: jnp.einsum("gk,gkn->gn", x, w), (draw(4, 2), GROUPS)),
    (braintrace.grouped_matmul, lambda x, w: jnp.einsum("bgk,gkn->bgn", x, w), (draw(5, 4, 2), GROUPS)),
    (
        lambda x, w, b: braintrace.grouped_matmul(x, w, b, weight_fn=square, bias_fn=jnp.exp),
        lambda x, w, b: jnp.einsum("bgk,gkn->bgn", x, w**2) + jnp.exp(b),
        (draw(5, 4, 2), GROUPS, GROUP_BIAS),
    ),
    (lambda w: braintrace.embedding(ROWS, w), lambda w: w[ROWS], (TABLE,)),
    (lambda w: braintrace.embedding(ROWS[1], w, weight_fn=square), lambda w: w[ROWS[1]] ** 2, (TABLE,)),
    (lambda x, w: braintrace.einsum("bk,kn->bn", x, w), lambda x, w: x @ w, (X, W)),
    (lambda x, w: braintrace.einsum(" btk, kn -> btn ", x, w), lambda x, w: x @ w, (draw(2, 3, 2), W)),
    (
        lambda x, w: braintrace.einsum("bktg,gkn->bngt", x, w, weight_fn=square),
        lambda x, w: jnp.einsum("bktg,gkn->bngt", x, w**2),
        (draw(2, 2, 3, 4), GROUPS),
    ),
    (lambda x, w: braintrace.einsum("bn,n->bn", x, w), lambda x, w: x * w, (draw(2, 3), B)),
    (lambda x, w: braintrace.einsum("b,n->bn", x, w), lambda x, w: jnp.outer(x, w), (X[:, 0], B)),
    (braintrace.lora_matmul, lambda x, b, a: x @ b @ a, (X[0], LOW, HIGH)),
    (lambda x, b, a: braintrace.lora_matmul(x, b, a, alpha=0.3), lambda x, b, a: 0.3 * x @ b @ a, (X, LOW, HIGH)),
    (
        lambda x, b, a, c: braintrace.lora_matmul(
            x, b, a, alpha=2, bias=c, b_fn=square, a_fn=jnp.tanh, bias_fn=jnp.exp
        ),
        lambda x, b, a, c: 2 * x @ b**2 @ jnp.tanh(a) + jnp.exp(c),
        (X, LOW, HIGH, B),
    ),
    *[
        (
            lambda x, w, matrix=matrix: braintrace.sparse_matmul(x, w, sparse_mat=matrix),
            lambda x, w, dense=dense: x @ dense(w),
            (x, matrix.data),
        )
        for matrix, dense in SPARSE.values()
        for x in (X[0], X)
    ],
    *[
        (lambda x, w: braintrace.sparse_matmul(x, w, sparse_mat=THIN), thin, (x, draw(40)))
        for x in (draw(60), draw(3, 60))
    ],
    (
        lambda x, w, b: braintrace.sparse_matmul(x, w, sparse_mat=CSR, bias=b, weight_fn=square, bias_fn=jnp.exp),
        lambda x, w, b: x @ SPARSE["CSR"][1](w**2) + jnp.exp(b),
        (X, CSR.data, B),
    ),
    (
        lambda x, w: braintrace.sparse_matmul(x, weight_data=w, sparse_mat=SPARSE["per pre"][0]),
        lambda x, w: x @ SPARSE["per pre"][1](w.reshape(2, 2)),
        (X, draw(4)),
    ),
    *[conv_call(name) for name in LAYOUTS],
    *[conv_call(name, bias=(4,)) for name in LAYOUTS],
    *[conv_call(name, bias=(4,), sample=True) for name in ("1d", "2d-last", "2d-mixed", "3d", "groups")],
    conv_call("1d", bias=(1, 4, 1)),
    conv_call("1d", bias=(4, 7)),
    conv_call("2d-last", bias=(1, 1, 1, 4)),
    conv_call("2d-last", bias=(1, 1, 4), sample=True),
    conv_call("1d", bias=(4, 7), sample=True),
    (
        lambda x, k, b: braintrace.conv(x, k, b, kernel_fn=square, bias_fn=jnp.exp),
        lambda x, k, b: jax.lax.conv(x, k**2, (1,), "SAME") + jnp.exp(b)[:, None],
        (draw(2, 3, 7), draw(4, 3, 3), draw(4)),
    ),
]
IDS = [f"{i}" for i in range(len(CALLS))]


@pytest.mark.parametrize("at_once", [1, 2**20])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("parts", [None, 7])
def test_sparse_product_of_many_samples(monkeypatch, parts, lead, at_once):
    monkeypatch.setattr("braintrace._ops.sparse.TERMS_AT_ONCE", at_once)
    x, w = draw(*lead, 60), draw(40)
    matrix = THIN if parts is None else braintrace.columns_in_parts(THIN, parts)
    pattern = pattern_of(matrix)
    assert pattern.parts == (parts or 1)

    def product(x, w):
        if parts is not None:
            w = braintrace.columns_in_parts(jsparse.BCOO((w, THIN.indices), shape=THIN.shape), parts).data
        return sparse_product(x, w, pattern)

    tangents = jnp.cos(x), jnp.cos(w)
    np.testing.assert_allclose(product(x, w), thin(x, w), rtol=1e-6)
    for ours, reference in zip(*(jax.jvp(f, (x, w), tangents) for f in (product, thin))):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-6)
    gradients = (jax.grad(lambda x, w: jnp.sum(jnp.tanh(f(x, w))), (0, 1))(x, w) for f in (product, thin))
    for ours, reference in zip(*gradients):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["CSR", "CSC", "per pre", "twice in one place", "BCOO"])
@pytest.mark.parametrize("parts", [1, 3])
def test_columns_in_parts(name, parts):
    matrix, dense = SPARSE[name]
    there = braintrace.columns_in_parts(matrix, parts)
    data = there.data
    assert there.shape == matrix.shape
    np.testing.assert_allclose(braintrace.sparse_matmul(X, data, sparse_mat=there), X @ dense(matrix.data), rtol=1e-6)
    part = pattern_of(there)
    assert np.array_equal(part.entries // (len(data) // parts), part.cols // (3 // parts))


def test_columns_with_units_and_those_that_do_not_come_in_parts():
    matrix = brainevent.CSR((CSR.data * u.mV, CSR.indices, CSR.indptr), shape=CSR.shape)
    assert u.get_unit(braintrace.columns_in_parts(matrix, 3).data) == u.mV
    with pytest.raises(ValueError, match="3 columns.*2 equal parts"):
        braintrace.columns_in_parts(CSR, 2)
    with pytest.raises(ValueError, match="one value.*tocsr"):
        braintrace.columns_in_parts(SPARSE["one value"][0], 3)
    assert pattern_of(SPARSE["per post"][0]).parts == 3 and pattern_of(SPARSE["one value"][0]).parts == 1


def test_sparse_gradients_need_neither_a_dense_matrix_nor_all_terms():
    n, per_row, batch = 1500, 20, 64
    columns = np.random.default_rng(0).integers(0, n, n * per_row)
    matrix = brainevent.CSR((draw(n * per_row), columns, np.arange(n + 1) * per_row), shape=(n, n))

    def loss(x, w):
        return jnp.sum(braintrace.sparse_matmul(x, w, sparse_mat=matrix) ** 2)

    for size, bound in (((n,), 4 * n * n / 10), ((batch, n), 4 * batch * n * per_row / 3)):
        memory = jax.jit(jax.grad(loss, (0, 1))).lower(draw(*size), matrix.data).compile().memory_analysis()
        assert memory.temp_size_in_bytes < bound


@pytest.mark.parametrize("op, reference, args", CALLS, ids=IDS)
def test_values(op, reference, args):
    for run in (op, jax.jit(op)):
        out = run(*args)
        np.testing.assert_allclose(out, reference(*args), rtol=1e-6)
        assert out.dtype == jnp.float32


@pytest.mark.parametrize("op, reference, args", CALLS, ids=IDS)
def test_one_mark_per_call(op, reference, args):
    assert len(marks(op, *args)) == len(marks(jax.jit(op), *args)) == 1


@pytest.mark.parametrize("kind", SPIKES)
@pytest.mark.parametrize("row", [0, slice(None)])
def test_spikes_as_inputs(kind, row):
    x = SPIKES[kind][row]
    out = braintrace.matmul(x, W, B)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, x.astype(jnp.float32) @ W + B, rtol=1e-6)
    ours, theirs = (
        jax.grad(lambda w: (f(x, w) ** 2).sum())(W) for f in (braintrace.matmul, lambda x, w: x.astype(w.dtype) @ w)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize(
    "x_dtype, w_dtype",
    [("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "float32"), ("int32", "bfloat16")],
)
def test_promotion_is_that_of_jax(x_dtype, w_dtype):
    x, w = X.astype(x_dtype), W.astype(w_dtype)
    assert braintrace.matmul(x, w).dtype == jnp.result_type(x, w)


@pytest.mark.parametrize("x", [X, np.asarray(X), np.asarray(X)[0]])
def test_numpy_operands(x):
    np.testing.assert_allclose(
        braintrace.matmul(x, np.asarray(W), np.asarray(B)), np.asarray(x) @ np.asarray(W) + B, rtol=1e-5
    )
    np.testing.assert_array_equal(braintrace.element_wise(np.asarray(W)), W)


# -- units

UNITS = [  # unit of x, of the weight, of the bias, of the result
    (u.mV, u.mS, u.uA, u.uA),
    (u.UNITLESS, u.mS, u.mS, u.mS),
    (u.mV, u.UNITLESS, u.mV, u.mV),
    (u.ms, u.kHz, u.UNITLESS, u.UNITLESS),
]


def with_unit(x, unit):
    return x if unit == u.UNITLESS else x * unit


@pytest.mark.parametrize("of_x, of_w, of_b, of_y", UNITS)
def test_the_result_has_the_product_of_the_units(of_x, of_w, of_b, of_y):
    out = braintrace.matmul(with_unit(X, of_x), with_unit(W, of_w), with_unit(B, of_b))
    assert u.get_unit(out).has_same_dim(of_y)
    expected = u.math.matmul(with_unit(X, of_x), with_unit(W, of_w)) + with_unit(B, of_b)
    np.testing.assert_allclose(u.get_mantissa(u.Quantity(out) / u.Quantity(expected)), 1.0, rtol=1e-5)


WITH_UNITS = {  # operation of (x, weight, bias), the operands, the same in plain JAX
    "grouped": (
        braintrace.grouped_matmul,
        (draw(5, 4, 2), GROUPS, GROUP_BIAS),
        lambda x, w, b: (x[..., None, :] @ w)[..., 0, :] + b,
    ),
    "sparse": (
        lambda x, w, b: braintrace.sparse_matmul(x, w, sparse_mat=CSR, bias=b),
        (X, CSR.data, B),
        lambda x, w, b: x @ SPARSE["CSR"][1](w) + b,
    ),
    "conv": (braintrace.conv, (draw(2, 3, 7), draw(4, 3, 3), draw(4)), conv_call("1d", bias=(4,))[1]),
    "einsum": (lambda x, w, b: braintrace.einsum("bk,kn->bn", x, w) + b, (X, W, B), lambda x, w, b: x @ w + b),
}


@pytest.mark.parametrize("name", WITH_UNITS)
def test_units_of_the_other_operations(name):
    op, (x, w, b), reference = WITH_UNITS[name]
    out = op(x * u.mV, w * u.mS, b * u.mA)
    np.testing.assert_allclose(out.to_decimal(u.uA), reference(x, w, 1000 * b), rtol=1e-5)
    assert not isinstance(op(x * u.ms, w * u.kHz, b), u.Quantity)


def test_units_of_tables_and_factors():
    assert u.get_unit(braintrace.embedding(ROWS, TABLE * u.mV)) == u.mV
    out = braintrace.lora_matmul(X * u.mV, LOW * u.mS, HIGH, bias=B * u.mA)
    np.testing.assert_allclose(out.to_decimal(u.uA), X @ LOW @ HIGH + 1000 * B, rtol=1e-5)


def test_a_bias_is_converted():
    out = braintrace.matmul(X * u.mV, W, B * u.volt)
    np.testing.assert_allclose(out.to_decimal(u.mV), X @ W + 1000 * B, rtol=1e-5)


def test_hooks_see_mantissas():
    out = braintrace.matmul(X * u.mV, W * u.mS, weight_fn=square)
    np.testing.assert_allclose(out.to_decimal(u.mV * u.mS), X @ W**2, rtol=1e-5)
    leak = braintrace.element_wise(B * u.ms, weight_fn=jnp.exp)
    np.testing.assert_allclose(leak.to_decimal(u.ms), jnp.exp(B), rtol=1e-6)


def test_units_that_do_not_match_are_an_error():
    with pytest.raises(u.UnitMismatchError):
        braintrace.matmul(X * u.mV, W, B * u.ms)


# -- JAX transformations outside of learners


def total(op, args):
    shape = jax.eval_shape(op, *args).shape
    return lambda *xs: (jnp.sin(op(*xs)) * jnp.cos(jnp.arange(np.prod(shape))).reshape(shape)).sum()


@pytest.mark.parametrize("op, reference, args", CALLS, ids=IDS)
def test_first_derivatives(op, reference, args):
    everything = tuple(range(len(args)))
    ours, theirs = (jax.jit(jax.grad(total(f, args), everything))(*args) for f in (op, reference))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op, reference, args", CALLS[:12], ids=IDS[:12])
def test_derivatives(op, reference, args):
    ours, theirs = total(op, args), total(reference, args)
    everything = tuple(range(len(args)))
    tangents = tuple(jnp.cos(7 * a) for a in args)
    rows = [
        lambda f: jax.grad(f, everything)(*args),
        lambda f: jax.jit(jax.grad(f, everything))(*args),
        lambda f: jax.jvp(f, args, tangents)[1],
        lambda f: jax.hessian(f, everything)(*args),
        lambda f: jax.jvp(jax.grad(f, everything), args, tangents)[1],
        lambda f: jax.linearize(f, *args)[1](*tangents),
    ]
    for row in rows:
        for a, b in zip(jax.tree.leaves(row(ours)), jax.tree.leaves(row(theirs)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_scan_and_checkpoint():
    def run(mm, w):
        def body(h, x):
            h = jnp.tanh(mm(x, w) + 0.5 * h)
            return h, h

        return jax.lax.scan(jax.checkpoint(body), jnp.zeros(3), X)[1].sum()

    np.testing.assert_allclose(run(braintrace.matmul, W), run(jnp.matmul, W), rtol=1e-6)
    ours, theirs = (jax.grad(run, 1)(mm, W) for mm in (braintrace.matmul, jnp.matmul))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_mapping_the_input_keeps_the_mark(axis):
    mapped = jax.vmap(braintrace.matmul, (axis, None, None))
    x = jnp.moveaxis(X, 0, axis)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(mapped(x, W, B), X @ W + B, rtol=1e-6)
        assert marks(mapped, x, W, B) == ["etp_mm"]
        assert marks(jax.jit(mapped), x, W, B) == ["etp_mm"]


SAMPLES = {  # operation of one sample and weights, batch of samples, weights, name of the mark
    "matmul": (braintrace.matmul, X, (W, B), "etp_mm"),
    "grouped": (braintrace.grouped_matmul, draw(5, 4, 2), (GROUPS, GROUP_BIAS), "etp_gmm"),
    "embedding": (braintrace.embedding, ROWS, (TABLE,), "etp_emb"),
    "lora": (lambda x, b, a, c: braintrace.lora_matmul(x, b, a, bias=c), X, (LOW, HIGH, B), "etp_lora_mm"),
    "sparse": (lambda x, w: braintrace.sparse_matmul(x, w, sparse_mat=CSR), X, (CSR.data,), "etp_sp_mm"),
    "conv": (braintrace.conv, draw(5, 3, 7), (draw(4, 3, 3), draw(4)), "etp_conv"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_mapped_sample_is_a_batch(name):
    op, xs, weights, mark = SAMPLES[name]
    mapped = jax.vmap(op, (0, *[None] * len(weights)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(mapped(xs, *weights), jnp.stack([op(x, *weights) for x in xs]), rtol=1e-5)
        assert marks(mapped, xs, *weights) == marks(op, xs, *weights) == [mark]


MAPPED = [  # in_axes, operation, arguments, reference
    ((None, 0), braintrace.matmul, (X[0], jnp.stack([W, 2 * W])), lambda x, w: jnp.einsum("i,kio->ko", x, w)),
    ((0, 0), braintrace.matmul, (X[:2], jnp.stack([W, 2 * W])), lambda x, w: jnp.einsum("ki,kio->ko", x, w)),
    ((None, 2), braintrace.matmul, (X, jnp.stack([W, 2 * W], -1)), lambda x, w: jnp.einsum("bi,iok->kbo", x, w)),
    ((0, None), braintrace.matmul, (jnp.stack([X, -X]), W), lambda x, w: x @ w),
    ((0,), braintrace.element_wise, (W,), lambda w: w),
    (
        (0, None),
        lambda x, w: braintrace.einsum("bk,kn->bn", x, w),
        (jnp.stack([X, -X]), W),
        lambda x, w: x @ w,
    ),
    ((None, 0), braintrace.embedding, (ROWS, jnp.stack([TABLE, -TABLE])), lambda i, w: w[:, i]),
]


@pytest.mark.parametrize("axes, op, args, reference", MAPPED)
def test_other_maps_warn_and_become_plain_jax(axes, op, args, reference):
    mapped = jax.vmap(op, axes)
    with pytest.warns(UserWarning, match="invisible to online learning"):
        np.testing.assert_allclose(mapped(*args), reference(*args), rtol=1e-6)
    with pytest.warns(UserWarning, match="etp_"):
        assert marks(mapped, *args) == []


# -- what is refused

REFUSED = [
    (lambda: braintrace.matmul(jnp.ones((2, 2, 2)), W), ValueError, r"\(2, 2, 2\).*\(B, in\)"),
    (lambda: braintrace.matmul(jnp.asarray(1.0), W), ValueError, r"\(\)"),
    (lambda: braintrace.matmul([1.0, 2.0], W), TypeError, "x must be an array.*list"),
    (lambda: braintrace.matmul(X, [[1.0], [2.0]]), TypeError, "weight must be an array.*list"),
    (lambda: braintrace.matmul(X, W, [1.0, 2.0, 3.0]), TypeError, "bias must be an array.*list"),
    (lambda: braintrace.matmul(jnp.ones(3), W), TypeError, "3.*2"),
    (lambda: braintrace.matmul(X, W, weight_fun=square), TypeError, "weight_fun"),
    (lambda: braintrace.matmul(X, W, draw(2)), ValueError, r"bias has shape \(2,\).*\(3,\)"),
    (lambda: braintrace.matmul(draw(4, 2), W, draw(4, 3)), ValueError, r"bias has shape \(4, 3\).*samples share it"),
    (lambda: braintrace.element_wise([1.0]), TypeError, "weight must be an array.*list"),
    (lambda: braintrace.element_wise(W, jnp.exp, weight_fn=jnp.exp), TypeError, "not both"),
    (lambda: braintrace.grouped_matmul(X, W), ValueError, r"weight has shape \(2, 3\)"),
    (lambda: braintrace.grouped_matmul(draw(4, 2), W), ValueError, r"weight has shape \(2, 3\)"),
    (lambda: braintrace.grouped_matmul(draw(2), GROUPS), ValueError, r"x has shape \(2,\)"),
    (lambda: braintrace.grouped_matmul(draw(3, 2), GROUPS), ValueError, r"\(3, 2\).*\(4, 2\)"),
    (lambda: braintrace.grouped_matmul(draw(4, 2), GROUPS, B), ValueError, r"bias has shape \(3,\)"),
    (lambda: braintrace.embedding(X[:, 0], TABLE), TypeError, "float32.*integers"),
    (lambda: braintrace.embedding(X[:, 0] > 0, TABLE), TypeError, "bool.*integers"),
    (lambda: braintrace.embedding(ROWS[None], TABLE), NotImplementedError, r"\(1, 4\).*nn.Embedding"),
    (lambda: braintrace.embedding(ROWS, B), ValueError, r"\(3,\).*\(rows, features\)"),
    (lambda: braintrace.embedding([1, 2], TABLE), TypeError, "indices must be an array.*list"),
    *[
        (lambda e=equation: braintrace.einsum(e, X, W), ValueError, message)
        for equation, message in [
            ("bk,kn", "not two operands"),
            ("bk->bk", "not two operands"),
            ("bk,kn,n->bn", "not two operands"),
            ("bK,Kn->bn", "'bK'.*lower-case"),
            ("...k,kn->...n", "lower-case"),
            ("bk,kk->bk", "repeats a letter"),
            ("bk,bn->bn", "no leading batch letter"),
            ("bk,kn->nb", "no leading batch letter"),
            ("bk,kn->bnz", "output letter 'z'"),
            ("bk,mn->bn", "weight letter 'm'"),
            ("btk,kn->btn", r"x has shape \(4, 2\)"),
        ]
    ],
    (lambda: braintrace.einsum(1, X, W), TypeError, "string, got int"),
    (lambda: braintrace.lora_matmul(draw(2, 2, 2), LOW, HIGH), ValueError, r"\(2, 2, 2\)"),
    (lambda: braintrace.lora_matmul(X, LOW, [1.0]), TypeError, "A must be an array.*list"),
    (lambda: braintrace.sparse_matmul(X, CSR.data, sparse_mat=DENSE), TypeError, "DataRepresentation.*ArrayImpl"),
    (lambda: braintrace.sparse_matmul(X, sparse_mat=CSR), TypeError, "weight_data"),
    (lambda: braintrace.sparse_matmul(draw(2, 2, 2), CSR.data, sparse_mat=CSR), ValueError, r"\(2, 2, 2\)"),
    (lambda: braintrace.sparse_matmul(draw(3), CSR.data, sparse_mat=CSR), TypeError, "3 and 2 differ"),
    (lambda: braintrace.sparse_matmul(X, draw(4), sparse_mat=CSR), ValueError, r"\(4,\).*\(3,\)"),
    (
        lambda: braintrace.sparse_matmul(X, draw(1), sparse_mat=brainevent.JITCNormalR(0.5, 1.0, 0.5, 1, shape=(2, 3))),
        TypeError,
        "JITCNormalR are 2 parameters",
    ),
    (
        lambda: jax.jit(lambda m: braintrace.sparse_matmul(X, m.data, sparse_mat=m))(SPARSE["BCOO"][0]),
        ValueError,
        "outside of jit",
    ),
    (lambda: braintrace.conv(draw(7), draw(4, 3, 3)), ValueError, r"\(7,\).*\(4, 3, 3\)"),
    (lambda: braintrace.conv(draw(2, 3, 7, 5), draw(4, 3, 3, 3)), ValueError, r"strides=\(1,\).*2 spatial"),
    (lambda: braintrace.conv(draw(3, 7), draw(4, 3, 3), batch_group_count=2), ValueError, "needs a batch axis"),
    (lambda: braintrace.conv(draw(2, 3, 7), draw(4, 3, 3), draw(3)), ValueError, r"bias has shape \(3,\).*4 output"),
    (lambda: braintrace.conv(draw(2, 3, 7), draw(4, 3, 3), draw(2, 4, 1)), ValueError, "one along the batch axis"),
    (lambda: braintrace.conv([1.0], draw(4, 3, 3)), TypeError, "x must be an array.*list"),
    (lambda: braintrace.register_primitive("nothing", None), TypeError, "'nothing'.*NoneType"),
    (lambda: scaled.register_etp_rules(xy_to_wd=square), TypeError, "xy_to_wd"),
]


def test_a_table_has_no_row_beyond_its_end():
    out = braintrace.embedding(jnp.array([5, 4]), TABLE)
    assert bool(jnp.isnan(out[0]).all()) and bool((out[1] == TABLE[4]).all())


def test_patterns_are_equal_by_content():
    a, b = (pattern_of(brainevent.CSR.fromdense(DENSE)) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a != pattern_of(SPARSE["Dense"][0])


@pytest.mark.parametrize("call, error, message", REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# -- operations of one's own: each as a primitive and as plain JAX

scaled = braintrace.register_primitive("scaled", lambda x, w, *, gain: gain * (x @ w))
scaled_of_batch = braintrace.register_primitive("scaled", lambda x, w, *, gain: gain * (x @ w), batched=True)


def own(name, impl, **options):
    """The operation with and without a batch axis."""
    return [braintrace.register_primitive(name, impl, batched=batched, **options) for batched in (False, True)]


class Own(models.Stage):
    """One layer through an operation of one's own; `static` are its static parameters."""

    def __init__(self, primitives, shapes, static=None):
        super().__init__()
        self._primitives, self._static = primitives, static or {}
        self.w = ParamState([jnp.zeros(shape) for shape in shapes])

    def init_state(self, batch_size=None, **_):
        self.h = models.zeros(N, batch_size)

    def transition(self, x):
        primitive = self._primitives[x.ndim - 1]
        h = self.h.value

        def apply(x, *ws):
            operands = [None] * (len(ws) + 1)
            slots = primitive.trainables(self._static)
            operands[primitive.x_index] = x
            for w, i in zip(ws, slots.values()):
                operands[i] = w
            y = (
                primitive.impl_fn(*operands, **self._static)
                if helpers.in_oracle()
                else primitive.bind(*operands, **self._static)
            )
            return y[primitive.y_index] if primitive.multiple_results else y

        y = helpers.tap(apply, x, *self.w.value) if helpers.in_oracle() else apply(x, *self.w.value)
        self.h.value = jnp.tanh(0.5 * h + y)


OWN = {  # primitives, shapes of the parameters, static parameters
    "scaled": ([scaled, scaled_of_batch], [(N_IN, N)], {"gain": 1.7}),
    "low rank": (
        own("low_rank", lambda x, b, a: x @ b @ a, trainable_invars_fn=lambda params: {"b": 1, "a": 2}),
        [(N_IN, 1), (1, N)],
        {},
    ),
    "gated": (
        own("gated", lambda x, w, v: x @ (w * jax.nn.sigmoid(v)), trainable_invars_fn=lambda params: {"w": 1, "v": 2}),
        [(N_IN, N), (N_IN, N)],
        {},
    ),
    "weight first": (
        own("weight_first", lambda w, x: x @ w.T, trainable_invars_fn=lambda params: {"weight": 0}, x_invar_index=1),
        [(N, N_IN)],
        {},
    ),
    "affine": (
        own("affine", lambda x, w, b: x @ w + b, trainable_invars_fn=lambda params: {"weight": 1, "bias": 2}),
        [(N_IN, N), (N,)],
        {},
    ),
    "gain of an affine map": (
        own("gain", lambda x, w, b, g: g * (x @ w + b), trainable_invars_fn=lambda params: {"w": 1, "b": 2, "g": 3}),
        [(N_IN, N), (N,), (N,)],
        {},
    ),
    "shifted input": (own("shifted", lambda x, w: (x + 1) @ w), [(N_IN, N)], {}),
    "second output": (own("second", lambda x, w: (x, x @ w), y_outvar_index=1), [(N_IN, N)], {}),
}


def check_own(primitives, shapes, static=None, batch=None):
    problem = Problem(lambda nn: [Own(primitives, shapes, static)], batch=batch, steps=3)
    learner = check(problem)[0].inner
    assert len(learner.graph.hidden_param_op_relations) == 1
    return learner


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("name", OWN)
def test_own_operation_is_trained_by_derived_rules(name, batch):
    learner = check_own(*OWN[name], batch=batch)
    (relation,) = learner.graph.hidden_param_op_relations
    primitives, _, static = OWN[name]
    assert relation.primitive is primitives[0 if batch is None else 1]
    assert relation.eqn_params == static and list(relation.trainable_vars) == list(
        relation.primitive.trainables(static)
    )


@pytest.mark.parametrize("batch", [None, 2])
def test_hand_written_rules_take_the_place_of_derived_ones(batch):
    calls = []
    primitives = own("by_hand", lambda x, w, *, gain: gain * (x @ w))

    def xy_to_dw(x, cot, weights, *, gain):
        calls.append(("xy_to_dw", x.shape, cot.shape, weights["weight"].shape, gain))
        return {"weight": gain * jnp.tensordot(x, cot, (0, 0)) if x.ndim > 1 else gain * jnp.outer(x, cot)}

    def init_pp(x_var, y_var, weight_vars, num_state):
        calls.append(("init_pp", x_var.aval.shape, y_var.aval.shape, weight_vars["weight"].aval.shape, num_state))
        return jnp.zeros((*y_var.aval.shape, num_state), y_var.aval.dtype)

    for p in primitives:
        assert p.register_xy_to_dw(xy_to_dw) is xy_to_dw
        assert p.register_init_pp(init_pp) is init_pp
    check_own(primitives, [(N_IN, N)], {"gain": 1.7}, batch)
    lead = () if batch is None else (batch,)
    shapes = ((*lead, N_IN), (*lead, N), (N_IN, N))
    assert {("xy_to_dw", *shapes, 1.7), ("init_pp", *shapes, 1)} <= set(calls)


def test_a_wrong_rule_gives_a_wrong_gradient():
    """Negative control: the registered rule is the one that is used."""
    primitives = own("wrong", lambda x, w: x @ w)
    primitives[0].register_xy_to_dw(lambda x, cot, weights: {"weight": 2 * jnp.outer(x, cot)})
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_own(primitives, [(N_IN, N)])


def test_the_other_rules_are_accepted():
    p = braintrace.register_primitive("all_rules", lambda x, w: x @ w)
    rules = dict.fromkeys(
        ["dt_to_t", "xy_to_dw", "init_drtrl", "init_pp", "fast_path", "pp_x_repr", "snap_anchor", "snap_adjacency"],
        lambda *args, **params: None,
    )
    p.register_etp_rules(**rules)
    for name in ("register_dt_to_t", "register_init_drtrl"):
        assert getattr(p, name)(rules["dt_to_t"]) is rules["dt_to_t"]


def test_a_name_may_be_registered_twice():
    a = braintrace.register_primitive("same", lambda x, w: x @ w)
    b = braintrace.register_primitive("same", lambda x, w: 2 * (x @ w))
    np.testing.assert_allclose(2 * a.bind(X[0], W), b.bind(X[0], W))
    assert isinstance(a, braintrace.ETPPrimitive) and a.name == b.name == "same"


@pytest.mark.parametrize("name", OWN)
def test_own_operation_is_ordinary_jax_elsewhere(name):
    primitives, shapes, static = OWN[name]
    p = primitives[1]
    slots = list(p.trainables(static).values())
    operands = [None] * (len(slots) + 1)
    operands[p.x_index] = X
    for shape, i in zip(shapes, slots):
        operands[i] = jnp.cos(jnp.arange(np.prod(shape))).reshape(shape)

    def loss(run):
        def f(*xs):
            y = run(*xs, **static)
            return (jnp.sin(y[p.y_index] if p.multiple_results else y)).sum()

        return f

    everything = tuple(range(len(operands)))
    ours, theirs = (jax.jit(jax.hessian(loss(run), everything))(*operands) for run in (p.bind, p.impl_fn))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_own_operation_with_a_fixed_operand():
    """The third operand is neither the input nor trained."""
    p = braintrace.register_primitive("masked", lambda x, w, mask: x @ (w * mask))
    mask = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    grads = two_steps(lambda m, x: p.bind(x, m.w.value, mask), w=W)
    np.testing.assert_allclose(grads[("w",)], two_steps_truth(X[:2]) * mask, rtol=1e-5)


def test_a_bias_that_is_no_parameter():
    grads = two_steps(lambda m, x: braintrace.matmul(x, m.w.value, B), w=W)
    np.testing.assert_allclose(grads[("w",)], two_steps_truth(X[:2]), rtol=1e-5)


def test_a_weight_that_is_no_parameter():
    grads = two_steps(lambda m, x: braintrace.matmul(x, W, m.b.value), b=B)
    np.testing.assert_allclose(grads[("b",)], two_steps_truth(jnp.ones((2, 1)))[0], rtol=1e-5)


LEAK, DECAY, RAMP = 0.5, 0.9, jnp.array([1.0, 2.0, 3.0])


class Leaky(brainstate.nn.Module):
    """h <- LEAK h + op(m, x)"""

    def __init__(self, op, h=jnp.zeros(3), **params):
        super().__init__()
        self.op, self.h = op, HiddenState(h)
        for name, value in params.items():
            setattr(self, name, ParamState(value))

    def update(self, x):
        self.h.value = LEAK * self.h.value + self.op(self, x)
        return self.h.value


def two_steps(op, xs=X[:2], **params):
    """The gradient at the second step, for a loss that weighs the units by RAMP."""
    model = Leaky(op, **params)
    learner = braintrace.pp_prop(model, DECAY)
    learner.compile_graph(xs[0])
    learner(xs[0])
    return grad(lambda: (learner(xs[1]) * RAMP).sum(), learner.param_states)()


def two_steps_truth(xs):
    x = DECAY * xs[0] + xs[1]
    f = (DECAY * LEAK * (1 - DECAY) + (1 - DECAY)) / (1 - DECAY**2)
    return jnp.outer(x, f * RAMP)


def one_hot(indices, weights):
    weight = weights["weight"]
    return jax.nn.one_hot(indices, weight.shape[0], dtype=weight.dtype)


def row_rule(x, cot, weights):
    return {"weight": jnp.einsum("...i,...o->...io", x, cot).reshape(-1, *weights["weight"].shape).sum(0)}


@pytest.mark.parametrize("batch", [None, 4])
def test_a_hand_written_embedding(batch):
    table = braintrace.register_primitive("rows", lambda i, w: w[i], batched=batch is not None)
    table.register_etp_rules(pp_x_repr=one_hot, xy_to_dw=row_rule)
    indices = jnp.array([[2, 0, 1, 2], [1, 1, 0, 2]]) if batch else jnp.array([2, 1])
    lead = () if batch is None else (batch,)
    model = Leaky(lambda m, i: table.bind(i, m.w.value), h=jnp.zeros((*lead, 3)), w=jnp.zeros((3, 3)))
    learner = braintrace.pp_prop(model, DECAY)
    learner.compile_graph(indices[0])
    assert [x.value.shape for x in learner.etrace_xs.values()] == [(*lead, 3)]
    learner(indices[0])
    ours = grad(lambda: (learner(indices[1]) * RAMP).sum(), learner.param_states)()
    hot = np.eye(3)[np.asarray(indices)].reshape(2, -1, 3)
    expected = sum(np.asarray(two_steps_truth(hot[:, b])) for b in range(hot.shape[1]))
    np.testing.assert_allclose(ours[("w",)], expected, rtol=1e-5)


def test_two_tables_read_by_the_same_indices_keep_their_own_inputs():
    table = braintrace.register_primitive("table", lambda i, w: w[i])
    table.register_etp_rules(pp_x_repr=one_hot, xy_to_dw=row_rule)
    sizes, indices = dict(w=5, v=7), jnp.array([2, 4])
    params = {name: jnp.zeros((size, 3)) for name, size in sizes.items()}
    model = Leaky(lambda m, i: table.bind(i, m.w.value) + table.bind(i, m.v.value), **params)
    learner = braintrace.pp_prop(model, DECAY)
    learner.compile_graph(indices[0])
    assert sorted(x.value.shape for x in learner.etrace_xs.values()) == [(5,), (7,)]
    learner(indices[0])
    ours = grad(lambda: (learner(indices[1]) * RAMP).sum(), learner.param_states)()
    for name, size in sizes.items():
        np.testing.assert_allclose(ours[(name,)], two_steps_truth(np.eye(size)[indices]), rtol=1e-5)


def test_an_operation_without_input():
    p = braintrace.register_primitive(
        "softplus_of", jax.nn.softplus, trainable_invars_fn=lambda params: {"weight": 0}, x_invar_index=None
    )
    grads = two_steps(lambda m, x: p.bind(m.b.value), b=B)
    expected = two_steps_truth(jnp.ones((2, 1)))[0] * jax.nn.sigmoid(B)
    np.testing.assert_allclose(grads[("b",)], expected, rtol=1e-5)


def test_a_transparent_operation_passes_credit_on():
    """h <- LEAK h + s * (x @ w): both have a trace, of w through the product with s."""
    gain = braintrace.register_primitive("gain", lambda y, s: y * s, gradient_enabled=True)
    s = jnp.array([0.5, -2.0, 1.5])
    grads = two_steps(lambda m, x: gain.bind(braintrace.matmul(x, m.w.value), m.s.value), w=W, s=s)
    np.testing.assert_allclose(grads[("w",)], two_steps_truth(X[:2]) * s, rtol=1e-5)
    f = (DECAY * LEAK * (1 - DECAY) + (1 - DECAY)) / (1 - DECAY**2)
    ys = X[:2] @ W
    np.testing.assert_allclose(grads[("s",)], (DECAY * ys[0] + ys[1]) * f * RAMP, rtol=1e-5)


def test_a_transparent_operation_between_hidden_values_is_counted_once():
    """One group, all of it position by position: D_RTRL is back-propagation through time."""
    gain = braintrace.register_primitive("gain", lambda y, s: y * s, gradient_enabled=True)

    class Chain(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.s = ParamState(W), ParamState(jnp.array([0.5, -2.0, 1.5]))
            self.h, self.b = HiddenState(jnp.zeros(3)), HiddenState(jnp.ones(3))

        def update(self, x):
            self.h.value = LEAK * self.h.value + braintrace.matmul(x, self.w.value)
            self.b.value = jnp.tanh(LEAK * self.b.value + gain.bind(self.h.value, self.s.value))
            return self.b.value + self.h.value**2

    def loss(f):
        return sum((f(x) * RAMP).sum() for x in X)

    learner = braintrace.D_RTRL(Chain())
    learner.compile_graph(X[0])
    online = [grad(lambda x: (learner(x) * RAMP).sum(), learner.param_states)(x) for x in X]
    model = Chain()
    exact = grad(lambda: loss(model), model.states(ParamState))()
    for path in exact:
        np.testing.assert_allclose(sum(g[path] for g in online), exact[path], rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*relation_excluded_weight_to_weight")
def test_an_opaque_operation_leaves_the_current_step_only():
    gain = braintrace.register_primitive("gain", lambda y, s: y * s)
    s = jnp.array([0.5, -2.0, 1.5])
    grads = two_steps(lambda m, x: gain.bind(braintrace.matmul(x, m.w.value), m.s.value), w=W, s=s)
    np.testing.assert_allclose(grads[("w",)], jnp.outer(X[1], s * RAMP), rtol=1e-5)
