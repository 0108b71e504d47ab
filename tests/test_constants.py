"""Equations of constants: as JAX computes them, without a compiled kernel."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from jax import lax

import braintrace
from braintrace._compiler.constants import Constants, known_outputs

pytestmark = pytest.mark.usefixtures("time_step")

COMPILED = []


def note(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(duration)


jax.monitoring.register_event_duration_secs_listener(note)


def folded(f, *xs):
    """The outputs of `f` of constants, and how many programs were compiled for them."""
    closed = jax.make_jaxpr(f)(*xs)
    constants, before = Constants(), len(COMPILED)
    found = constants.read(constants.run(closed, xs))
    return found, len(COMPILED) - before


def check(f, *xs):
    found, programs = folded(f, *xs)
    assert programs == 0
    for value, expected in zip(found, jax.tree.leaves(f(*map(jnp.asarray, xs))), strict=True):
        assert value.dtype == expected.dtype and value.shape == expected.shape
        kind = complex if np.iscomplexobj(expected) else float
        exact = not jnp.issubdtype(value.dtype, jnp.inexact)
        tolerance = 0 if exact else 4 * float(jnp.finfo(value.dtype).eps)
        np.testing.assert_allclose(value.astype(kind), np.asarray(expected).astype(kind), rtol=tolerance, atol=1e-37)


RNG = np.random.default_rng(0)
X, Y = (RNG.normal(size=(4, 5)).astype(np.float32) for _ in range(2))
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-30, 3e38], np.float32)
FUNCTIONS = [
    lax.exp, lax.expm1, lax.log, lax.log1p, lax.sin, lax.cos, lax.tanh, lax.logistic, lax.sqrt, lax.rsqrt, lax.floor,
    lax.sign, lax.abs, lax.neg, lax.is_finite, jax.nn.relu, jax.nn.softplus, lambda x: x**3, lambda x: x.sum(0),
    lambda x: x.max(), lambda x: x.min(), lambda x: jnp.where(x > 0, x, 2.0), lambda x: jnp.clip(x, -1, 1),
    lambda x: x.astype(bool), lambda x: jnp.arange(3) * x.ravel()[0],
]  # fmt: skip
OF_TWO = [
    lax.add, lax.sub, lax.mul, lax.div, lax.rem, lax.max, lax.min, lax.eq, lax.lt, lax.ge,
    lambda a, b: a % b, lambda a, b: jnp.stack([a, b], 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_functions_of_one_operand(dtype):
    for f in FUNCTIONS:
        check(f, X.astype(dtype))
        if dtype == jnp.float32:
            check(f, SPECIAL)


def test_functions_of_two_operands():
    for f in OF_TWO:
        check(f, X, Y)
        check(f, np.arange(-6, 6, dtype=np.int32), np.tile(np.array([0, 1, -3, 4], np.int32), 3))
        check(f, np.arange(250, 256, dtype=np.uint8), np.arange(6, dtype=np.uint8))


def test_complex_numbers():
    for f in (lax.exp, lax.neg, lax.abs, lax.real, lax.imag, lax.conj, lambda z: z * z / (1 + z), lambda z: z.sum(0)):
        check(f, (X + 1j * Y).astype(np.complex64))


A = np.arange(60).reshape(3, 4, 5)
MOVEMENTS = [
    lambda x: jnp.split(x, [1, 3], 1),
    lambda x: jnp.tile(x, (2, 1, 3)),
    lambda x: jnp.roll(x, 2, 1),
    lambda x: jnp.pad(x, 1),
    lambda x: x[::-1, 1:, ::2].transpose(2, 0, 1),
    lambda x: x[1, 2, 3],
    lambda x: x[:, np.array([3, 0]), 1],
    lambda x: x[np.array([[0], [2]]), :, np.array([4, 1])],
    lambda x: jnp.take(x, np.array([5, 1, -7]), axis=1, mode="fill"),
    lambda x: jnp.take(x, np.array([5, 1, -7]), axis=1, mode="clip"),
    lambda x: lax.dynamic_slice(x, (1, 9, -3), (2, 2, 3)),
    lambda x: lax.dynamic_update_slice(x, x[:2, :2, :2] * 2, (2, 9, 1)),
    lambda x: x.at[:, np.array([0, 9])].set(x[:, :2]),
    lambda x: x.at[1, :, np.array([1, 7])].set(5, mode="clip"),
    lambda x: jax.vmap(lambda a, i: a[i])(x, np.array([3, 1, 0])),
    lambda x: jax.vmap(lambda a, i: a.at[i].set(9))(x, np.array([3, 1, 7])),
    lambda x: jax.vmap(lambda a, i: lax.dynamic_slice(a, (i, 0), (2, 2)))(x, np.array([3, 1, 7])),
]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_movements(dtype):
    for f in MOVEMENTS:
        check(f, A.astype(dtype))


def test_what_numpy_does_not_know_is_one_program():
    def draws(x):
        return jax.random.normal(jax.random.key(0), (3,)) + x, jax.random.permutation(jax.random.key(1), 4)

    found, programs = folded(draws, np.float32(1))
    assert programs == 1
    for value, expected in zip(found, draws(1.0), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_known_outputs():
    def f(x, y):
        apart = lax.scan(lambda c, _: ((c[0] + 1, c[1] * x), None), (jnp.zeros(2), 1.0), length=3)[0]
        return x * 0, jnp.ones(3) * 2, y, apart[0], apart[1]

    closed = jax.make_jaxpr(f)(1.0, 2.0)
    known = known_outputs(closed)
    assert sorted(known) == [1, 3] and np.all(known[1] == 2) and np.all(known[3] == 3)
    assert sorted(known_outputs(closed, look_inside=False)) == [1]


NETWORKS = (
    {k: (models.CELLS | models.SPIKING)[k] for k in ("lstm", "lif-cuba", "alif-coba")}
    | {"masked": models.SMALL["Masked"]}
    | {"grus": lambda nn: [nn.GRUCell(models.N_IN, models.N), nn.GRUCell(models.N, models.N)]}
)


@pytest.mark.parametrize("rule", ["pp_prop", "d_rtrl"])
@pytest.mark.parametrize("name", NETWORKS)
def test_compiling_a_graph_compiles_no_kernels(name, rule):
    net = models.build(NETWORKS[name], models.READOUTS["leaky"], models.library(), 2)
    learner = braintrace.pp_prop(net, 0.9) if rule == "pp_prop" else braintrace.D_RTRL(net)
    x = jnp.zeros((2, models.N_IN))
    jax.clear_caches()
    before = len(COMPILED)
    learner.compile_graph(x)
    assert len(COMPILED) == before
    jax.jit(jnp.sin)(x)
    assert len(COMPILED) > before  # they are counted
