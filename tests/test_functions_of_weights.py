"""Functions that an operation applies to its parameters, `weight_fn` and the like: they mix entries, or read others.

The memory is position by position, so that D_RTRL is back-propagation through time, step by step and in chunks.
"""

import brainevent
import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import braintrace

T, B = 4, 2
CSR = brainevent.CSR.fromdense(jnp.array([[1.0, 0.0, 2.0, 0.5], [0.0, 0.5, 0.0, 1.0], [1.5, 0.0, 0.0, -1.0]]))
FUNCTIONS = {
    "norm of all": lambda w: w / jnp.linalg.norm(w),
    "norm of columns": lambda w: w / jnp.linalg.norm(w, axis=0),
    "reversed": lambda w: w[..., ::-1],
    "softmax": lambda w: jax.nn.softmax(w, -1),
    "square": jnp.square,
}
X, GROUPS, ROWS = (3,), (2, 3), ()
OPERATIONS = {  # (input, parameters, function) -> output; shapes of the input and the parameters; of the output
    "weight": (lambda x, w, f: braintrace.matmul(x, w, weight_fn=f), X, [(3, 4)], (4,)),
    "bias": (lambda x, w, b, f: braintrace.matmul(x, w, b, bias_fn=f), X, [(3, 4), (4,)], (4,)),
    "grouped": (lambda x, w, f: braintrace.grouped_matmul(x, w, weight_fn=f), GROUPS, [(2, 3, 4)], (2, 4)),
    "einsum": (lambda x, w, f: braintrace.einsum("bi,io->bo", x, w, weight_fn=f), X, [(3, 4)], (4,)),
    "embedding": (lambda x, w, f: braintrace.embedding((x > 0).astype(int), w, weight_fn=f), ROWS, [(2, 4)], (4,)),
    "lora a": (lambda x, b, a, f: braintrace.lora_matmul(x, b, a, a_fn=f), X, [(3, 2), (2, 4)], (4,)),
    "lora b": (lambda x, b, a, f: braintrace.lora_matmul(x, b, a, b_fn=f), X, [(3, 2), (2, 4)], (4,)),
    "sparse": (lambda x, w, f: braintrace.sparse_matmul(x, w, sparse_mat=CSR, weight_fn=f), X, [(7,)], (4,)),
    "element-wise": (lambda x, w, f: x[..., :1] + braintrace.element_wise(w, weight_fn=f), X, [(4,)], (4,)),
}


class Net(brainstate.nn.Module):
    def __init__(self, operation, function):
        super().__init__()
        self.apply, _, shapes, self.shape = OPERATIONS[operation]
        self.function = function
        self.w = [brainstate.ParamState(jax.random.normal(jax.random.key(i), s)) for i, s in enumerate(shapes)]

    def init_state(self, batch_size=None, **_):
        self.h = brainstate.HiddenState(jnp.zeros((batch_size, *self.shape)))

    def update(self, x):
        self.h.value = self.new(x, self.h.value, [w.value for w in self.w])
        return self.h.value

    def new(self, x, h, w):
        return jnp.tanh(0.6 * h + self.apply(x, *w, self.function))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_functions_that_mix_entries(operation, function):
    xs = jax.random.normal(jax.random.key(9), (T, B, *OPERATIONS[operation][1]))
    net = Net(operation, FUNCTIONS[function])
    learner = braintrace.compile(net, "d_rtrl", xs[0], batch_size=B)

    def through_time(w):
        h, loss = jnp.zeros((B, *net.shape)), 0.0
        for x in xs:
            h = net.new(x, h, w)
            loss += (jnp.sin(h) ** 2).sum()
        return loss

    def loss(x):
        return (jnp.sin(learner(x)) ** 2).sum()

    exact = jax.grad(through_time)([w.value for w in net.w])
    steps = [brainstate.transform.grad(loss, learner.param_states)(x) for x in xs]
    learner.reset_state()
    brainstate.nn.reset_all_states(net, batch_size=B)
    net.h.value = jnp.zeros_like(net.h.value)
    chunk = learner.etrace_grad(xs, step_fn=loss, reduction="sum")
    for i, expected in enumerate(exact):
        for found in (chunk["w", i], sum(s["w", i] for s in steps)):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize("read", ["state", "parameter", "input"])
def test_functions_that_read_other_values_are_refused(read):
    class Reading(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.g = brainstate.ParamState(jnp.ones((3, 4))), brainstate.ParamState(jnp.ones(4))
            self.mask = brainstate.ShortTermState(jnp.ones(4))

        def init_state(self, batch_size=None, **_):
            self.h = brainstate.HiddenState(jnp.zeros(4))

        def update(self, x):
            of = {"state": lambda: self.mask.value, "parameter": lambda: self.g.value, "input": x.sum}[read]
            self.h.value = 0.5 * self.h.value + braintrace.matmul(x, self.w.value, weight_fn=lambda w: w * of())
            return self.h.value

    with pytest.raises(ValueError, match=r"<lambda> \(.*reads more than this parameter.*matmul\(x, f\(w\)\)"):
        braintrace.compile(Reading(), "d_rtrl", jnp.ones(3))
