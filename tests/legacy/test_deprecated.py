"""Names of older versions: what they do, and that they say what to use instead."""

import subprocess
import sys

import brainevent
import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate import ParamState

import braintrace

NAMES = set(
    "MatMulOp ElemWiseOp ConvOp SpMatMulOp LoraOp ETraceOp ETraceParam ElemWiseParam NonTempParam FakeETraceParam "
    "FakeElemWiseParam".split()
)
X, W, B = jnp.array([[0.5, -1.0], [1.5, 2.0]]), jnp.array([[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]]), jnp.arange(3.0)
MASK = jnp.array([[1.0, 0, 1], [0, 1, 1]])
DENSE = jnp.array([[0.0, 1, 2], [3, 0, 0]])
CSR = brainevent.CSR.fromdense(DENSE)
IMAGE, KERNEL = jnp.sin(jnp.arange(42.0)).reshape(2, 3, 7), jnp.cos(jnp.arange(36.0)).reshape(4, 3, 3)


def old(name):
    with pytest.warns(DeprecationWarning, match=f"braintrace.{name} is deprecated, use") as record:
        found = getattr(braintrace, name)
    assert record[0].filename == __file__
    return found


def test_names():
    assert dir(braintrace) == sorted({*braintrace.__all__, *NAMES})
    for name in NAMES:
        assert old(name) is old(name) and old(name).__name__ == name
    for name in ("ETraceState", "stop_param_gradients", "OTTT"):
        with pytest.raises(AttributeError, match=name):
            getattr(braintrace, name)


def test_import_is_silent_and_does_not_load_them():
    code = "import braintrace, sys; assert 'braintrace._legacy.operations' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:braintrace", "-c", code], check=True)


def conv(x, k):
    return jax.lax.conv(x, k, (1,), "SAME")


OPS = {  # operation object, input, weight, the value in plain JAX, the mark
    "matmul": (
        lambda: old("MatMulOp")(),
        X,
        {"weight": W, "bias": B},
        lambda x, w: x @ w["weight"] + w["bias"],
        "etp_mm",
    ),
    "mask": (
        lambda: old("MatMulOp")(MASK, jnp.exp),
        X,
        {"weight": W},
        lambda x, w: x @ jnp.exp(w["weight"] * MASK),
        "etp_mm",
    ),
    "mask last": (
        lambda: old("MatMulOp")(MASK, jnp.exp, True),
        X[0],
        {"weight": W},
        lambda x, w: x @ (jnp.exp(w["weight"]) * MASK),
        "etp_mv",
    ),
    "conv": (
        lambda: old("ConvOp")(None, (1,), "SAME"),
        IMAGE,
        {"weight": KERNEL, "bias": jnp.arange(4.0)},
        lambda x, w: conv(x, w["weight"]) + w["bias"][:, None],
        "etp_conv",
    ),
    "conv mask": (
        lambda: old("ConvOp")(None, (1,), "SAME", weight_mask=KERNEL > 0, weight_fn=jnp.tanh),
        IMAGE,
        {"weight": KERNEL},
        lambda x, w: conv(x, jnp.tanh(w["weight"] * (KERNEL > 0))),
        "etp_conv",
    ),
    "sparse": (
        lambda: old("SpMatMulOp")(CSR, jnp.square),
        X,
        {"weight": CSR.data, "bias": B},
        lambda x, w: x @ jnp.array([[0, w["weight"][0], w["weight"][1]], [w["weight"][2], 0, 0]]) ** 2 + w["bias"],
        "etp_sp_mm",
    ),
    "lora": (
        lambda: old("LoraOp")(0.5),
        X,
        {"B": W, "A": W.T, "bias": X[0]},
        lambda x, w: 0.5 * x @ w["B"] @ w["A"] + w["bias"],
        "etp_lora_mm",
    ),
    "lora plain": (lambda: old("LoraOp")(), X, {"B": W, "A": W.T}, lambda x, w: x @ w["B"] @ w["A"], "etp_lora_mm"),
    "element-wise": (lambda: old("ElemWiseOp")(jnp.tanh), None, B, lambda x, w: jnp.tanh(w), "etp_elemwise"),
}


def marks(f, *args):
    return [e.primitive.name for e in jax.make_jaxpr(f)(*args).eqns if e.primitive.name.startswith("etp_")]


@pytest.mark.parametrize("name", OPS)
def test_operation_objects(name):
    make, x, w, reference, mark = OPS[name]
    op = make()
    assert isinstance(op, old("ETraceOp"))
    value = reference(x, w)
    for f in (op, op.xw_to_y, op.raw_xw_to_y):
        np.testing.assert_allclose(f(x, w), value, rtol=1e-5)
    assert marks(op, x, w) == [mark] and marks(op.raw_xw_to_y, x, w) == []
    cotangent = jnp.cos(jnp.arange(value.size)).reshape(value.shape)
    ours, theirs = op.xy_to_dw(x, cotangent, w), jax.vjp(lambda w: reference(x, w), w)[1](cotangent)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)
    parameter = old("ETraceParam")(w, op) if x is not None else old("ElemWiseParam")(w, jnp.tanh)
    assert isinstance(parameter, ParamState) and parameter.is_etrace and parameter.gradient.name == "adaptive"
    args = () if x is None else (x,)
    np.testing.assert_allclose(parameter.execute(*args), value, rtol=1e-5)
    fake = old("FakeETraceParam")(w, op) if x is not None else old("FakeElemWiseParam")(w, jnp.tanh)
    np.testing.assert_allclose(fake.execute(*args), value, rtol=1e-5)
    assert not isinstance(fake, brainstate.State) and marks(lambda: fake.execute(*args)) == []
    plain = old("NonTempParam")(w, op, name="mine", grad="full")
    assert isinstance(plain, ParamState) and plain.name == "mine" and marks(lambda: plain.execute(x)) == []
    np.testing.assert_allclose(plain.execute(x), value, rtol=1e-5)


def test_non_temporal_parameters_take_functions():
    np.testing.assert_allclose(old("NonTempParam")(W, jnp.matmul).execute(X), X @ W)


def test_abstract_operation():
    op = old("ETraceOp")()
    for call in (lambda: op(X, W), lambda: op.dt_to_t(X, W)):
        with pytest.raises(NotImplementedError, match="ETraceOp must define"):
            call()


def test_traces_times_cotangents():
    trace = {"weight": W, "bias": B}
    out = old("MatMulOp")().dt_to_t(B, trace)
    np.testing.assert_allclose(out["weight"], W * B)
    np.testing.assert_allclose(out["bias"], B * B)
    np.testing.assert_allclose(old("ElemWiseOp")().dt_to_t(B, B), B * B)


REFUSED = [
    (lambda: old("MatMulOp")([[1.0]]), TypeError, "weight_mask must be an array, got list"),
    (lambda: old("MatMulOp")()(X, W), TypeError, "dict with 'weight'"),
    (lambda: old("MatMulOp")()(X, {"w": W}), ValueError, "'weight'.*'w'"),
    (lambda: old("LoraOp")()(X, {"B": W}), ValueError, "'A'"),
    (lambda: old("SpMatMulOp")(W), TypeError, "SparseMatrix"),
    (lambda: old("ETraceParam")(W, jnp.matmul), TypeError, "op must be an operation object"),
    (lambda: old("ETraceParam")(W, old("MatMulOp")(), grad="none"), ValueError, "none"),
]


@pytest.mark.parametrize("call, error, message", REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_model_of_old_parameters_is_trained():
    class Cell(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = old("ETraceParam")({"weight": W}, old("MatMulOp")(MASK))
            self.r = old("NonTempParam")({"weight": jnp.ones((3, 2))}, old("MatMulOp")())
            self.h = brainstate.HiddenState(jnp.zeros(3))

        def update(self, x):
            self.h.value = 0.5 * self.h.value + self.w.execute(x)
            return self.r.execute(self.h.value)

    learner = braintrace.pp_prop(Cell(), 0.9)
    learner.compile_graph(X[0])
    (relation,) = learner.graph.hidden_param_op_relations
    assert relation.path == ("w",)
    grads = brainstate.transform.grad(lambda: learner(X[0]).sum(), learner.param_states)()
    np.testing.assert_allclose(grads["w",]["weight"], 2 * X[0][:, None] * MASK, rtol=1e-5)
    np.testing.assert_allclose(grads["r",]["weight"], jnp.outer(X[0] @ (W * MASK), jnp.ones(2)), rtol=1e-5)
