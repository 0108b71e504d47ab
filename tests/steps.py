"""Steps written as functions, for the oracle: what a user may put between an input and the new hidden values.

A row is a function of a namespace of layers, as in `models`. All parameters are drawn at random; what is given here is
their shapes.
"""

import jax
import jax.numpy as jnp
import models
from brainstate import ParamState
from helpers import old
from models import N_IN, N, element_wise, matmul

W, SQUARE, UNIT = jnp.zeros((N_IN, N)), jnp.zeros((N, N)), jnp.zeros(N)


class Step(models.Stage):
    """`transition(m, x)` with parameters by name and hidden states of shape (n,) by group."""

    def __init__(self, transition, output=None, hidden=(("h",),), **params):
        super().__init__()
        self.states = hidden
        self._transition, self._output = transition, output
        for name, value in params.items():
            setattr(self, name, ParamState(value))

    def init_state(self, batch_size=None, **_):
        for group in self.states:
            for name in group:
                setattr(self, name, models.zeros(N, batch_size))

    def transition(self, x):
        return self._transition(self, x)

    def output(self, aux):
        return self.h.value if self._output is None else self._output(self, aux)


def row(transition, output=None, hidden=(("h",),), **params):
    """With the parameter `w` of shape (n_in, n), unless others are given."""
    return lambda nn: [Step(transition, output, hidden, **(params or {"w": W}))]


def leaky(of_input, decay=0.5):
    """`h <- tanh(decay h + of_input(m, x))`"""

    def transition(m, x):
        m.h.value = jnp.tanh(decay * m.h.value + of_input(m, x))

    return transition


# -- parameters outside an operation, and the same one inside and outside


def operand_and_factor(m, x):
    leak = element_wise(m.v.value)
    m.h.value = jnp.tanh(leak * m.h.value + matmul(x, m.w.value) + 2 * m.v.value * x.sum(-1, keepdims=True))


PARAMETERS = {
    "plain input": row(leaky(lambda m, x: matmul(x, m.w.value) + x @ m.v.value), w=W, v=W),
    "gain and shift": row(
        leaky(lambda m, x: matmul(x, m.w.value) * m.gain.value + m.shift.value), w=W, gain=UNIT, shift=UNIT
    ),
    "product twice": row(leaky(lambda m, x: matmul(x, m.w.value) + x @ m.w.value)),
    "operand and factor": row(operand_and_factor, w=W, v=UNIT),
    "tied readout": row(leaky(lambda m, x: matmul(x, m.w.value)), lambda m, aux: m.h.value @ m.w.value.T @ m.w.value),
    "bias of the operation": row(leaky(lambda m, x: matmul(x, m.w.value, m.b.value)), w=W, b=UNIT),
    "bias beside": row(leaky(lambda m, x: matmul(x, m.w.value) + m.b.value), w=W, b=UNIT),
}

# -- what happens to a weight before its operation

MASK = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
_PREPARED = {
    "mask": (W, lambda w: w * MASK),
    "scale": (W, lambda w: 2 * w),
    "transpose": (W.T, lambda w: w.T),
    "square transpose": (SQUARE, lambda w: w.T[:N_IN]),
    "absolute": (W, jnp.abs),
    "standardised": (W, lambda w: (w - w.mean(0)) / jnp.sqrt(((w - w.mean(0)) ** 2).sum(0) + 1.0)),
    "rows of a larger one": (SQUARE, lambda w: w[1:]),
    "flat": (W.ravel(), lambda w: w.reshape(W.shape)),
    "tied rows": (UNIT, lambda w: jnp.stack([w, -0.5 * w])),
}
PREPARED = {
    name: row(leaky(lambda m, x, prepare=prepare: matmul(x, prepare(m.w.value))), w=weight)
    for name, (weight, prepare) in _PREPARED.items()
}
_PAIRS = {
    "sum": (W, W, lambda a, b: a + b),
    "product": (W, UNIT, lambda a, b: a * jnp.exp(b)),
    "low rank": (jnp.zeros((N_IN, 1)), jnp.zeros((1, N)), lambda a, b: a @ b),
    "rows of both": (W[:1], W[:1], lambda a, b: jnp.concatenate([a, b])),
}
PAIRS = {  # an operand made of the parameters a and b
    f"{name} of two": row(leaky(lambda m, x, of=combine: matmul(x, of(m.a.value, m.b.value))), a=a, b=b)
    for name, (a, b, combine) in _PAIRS.items()
}

# -- positions that mix


def mean_free(y):
    return y - y.mean(-1, keepdims=True)


def layer_norm(y):
    return mean_free(y) / jnp.sqrt((mean_free(y) ** 2).mean(-1, keepdims=True) + 1e-2)


MATRIX = jnp.array([[0.5, -1.0, 2.0], [0.1, 0.3, -0.7], [-0.4, 0.8, 0.6]])
MIXES = {
    "roll": lambda y: jnp.roll(y, 1, -1),
    "flip": lambda y: y[..., ::-1],
    "cumsum": lambda y: jnp.cumsum(y, -1),
    "value and sum": lambda y: y + y.sum(-1, keepdims=True),
    "layer norm": layer_norm,
    "softmax": lambda y: jax.nn.softmax(y, -1),
    "max": lambda y: y * y.max(-1, keepdims=True),
    "sort": lambda y: jnp.sort(y, -1),
    "constant matrix": lambda y: y @ MATRIX,
    "upper triangle": lambda y: y @ jnp.triu(MATRIX),
    "gather": lambda y: y[..., jnp.array([2, 0, 0])],
    "stack and sum": lambda y: jnp.stack([y, 2 * y[..., ::-1]], -1).sum(-1),
    "pad": lambda y: jnp.pad(y[..., 1:], [(0, 0)] * (y.ndim - 1) + [(0, 1)]),
}
# Between operation and state: exact now, diagonal in the trace.
TAILS = {name: row(leaky(lambda m, x, mix=mix: mix(matmul(x, m.w.value)))) for name, mix in MIXES.items()}


def of_old(mix, cut):
    def transition(m, x):
        h = old(m.h.value) if cut else m.h.value  # matrix products are cut
        m.h.value = jnp.tanh(0.6 * mix(h) + matmul(x, m.w.value))

    return transition


MIXED_STATES = {  # the trace keeps the true diagonal
    f"{name} of the old value": row(of_old(mix, cut="matrix" in name or "triangle" in name))
    for name, mix in MIXES.items()
    if name not in ("max", "sort")
}

# -- several states


def chain_of_two(m, x):
    m.h.value = 0.9 * m.h.value + matmul(x, m.w.value)
    m.b.value = jnp.tanh(0.8 * m.b.value + m.h.value)


def chain_of_three(m, x):
    chain_of_two(m, x)
    m.c.value = 0.7 * m.c.value + m.b.value * m.h.value


def two_groups(m, x):
    y = matmul(x, m.w.value)
    m.h.value = jnp.tanh(0.5 * m.h.value + y)
    m.b.value = 0.7 * m.b.value + y + jnp.roll(m.h.value, 1, -1)


class Siblings(models.Stage):
    """Two layers of one state each, the second reading the new value of the first."""

    def __init__(self, in_a_list):
        super().__init__()
        first, second = Step(None, a=W), Step(None, a=W)
        if in_a_list:
            self.cells = [first, second]
        else:
            self.first, self.second = first, second
        self._pair = (first, second)

    def groups(self):
        return [[cell.h for cell in self._pair]]

    def transition(self, x):
        first, second = self._pair
        first.h.value = 0.5 * first.h.value + matmul(x, first.a.value)
        second.h.value = jnp.tanh(0.7 * first.h.value + 0.4 * second.h.value + matmul(x, second.a.value))

    def output(self, aux):
        return self._pair[1].h.value


def product(m, x):
    m.a.value = 0.9 * m.a.value + matmul(x, m.w.value)
    m.b.value = 0.8 * m.b.value + matmul(x, m.v.value)
    m.h.value = m.a.value * m.b.value


def product_of_old(m, x):
    a, b = m.a.value, m.b.value
    m.h.value = jnp.tanh(a * b)
    m.a.value = 0.9 * a + matmul(x, m.w.value)
    m.b.value = 0.8 * b + 0.1 * a * m.h.value + matmul(x, m.v.value)


def choice(m, x):
    m.a.value = 0.9 * m.a.value + matmul(x, m.w.value)
    m.b.value = 0.8 * m.b.value + matmul(x, m.v.value)
    m.h.value = jnp.where(m.a.value > m.b.value, m.a.value, 0.3 * m.b.value)


def all_three(m, aux):
    return m.h.value + m.a.value + m.b.value


def both(m, aux):
    return m.h.value + m.b.value**2


def one_value_for_two(m, x):
    m.h.value = m.b.value = jnp.tanh(0.5 * m.h.value + 0.2 * m.b.value + matmul(x, m.w.value))


def never_written(m, x):
    m.h.value = 0.5 * m.h.value + m.b.value + matmul(x, m.w.value)


CHAINS = {
    "chain of two": row(chain_of_two, lambda m, aux: m.b.value, (("h", "b"),)),
    "chain of three": row(chain_of_three, lambda m, aux: m.c.value + 0.1 * m.b.value, (("h", "b", "c"),)),
}
SEVERAL_STATES = {
    **CHAINS,
    "two linked groups": row(two_groups, both, (("h",), ("b",))),
    "siblings": lambda nn: [Siblings(in_a_list=False)],
    "siblings in a list": lambda nn: [Siblings(in_a_list=True)],
    "product of states": row(product, all_three, (("a", "b", "h"),), w=W, v=W),
    "product of old states": row(product_of_old, all_three, (("a", "b", "h"),), w=W, v=W),
    "choice of states": row(choice, all_three, (("a", "b", "h"),), w=W, v=W),
    "one value for two states": row(one_value_for_two, both, (("h", "b"),)),
    "a state that is never written": row(never_written, both, (("h", "b"),)),
}

# -- what is written, and what leaves the step


def shows_operation(m, x):
    y = matmul(x, m.w.value)
    m.h.value = 0.5 * m.h.value + y
    return y


def returns_alias(m, x):
    y = jnp.tanh(0.5 * m.h.value + matmul(x, m.w.value))
    m.h.value = y * 1.0
    return y


def stored_output(m, x):
    m.h.value = matmul(x, m.w.value)


def written_twice(m, x):
    m.h.value = 0.5 * m.h.value + matmul(x, m.w.value)
    m.h.value = jnp.tanh(m.h.value)


def product_of_operations(m, x):
    m.h.value = 0.5 * m.h.value + matmul(x, m.w.value) * matmul(x, m.v.value)


def parts_of_the_units(m, x):
    h, y = m.h.value, matmul(x, m.w.value)
    m.h.value = jnp.concatenate([0.5 * h[..., :1] + y[..., :1], jnp.tanh(h[..., 1:]) * y[..., 1:]], -1)


def written_in_place(m, x):
    y = matmul(x, m.w.value)
    m.h.value = jnp.tanh((0.8 * m.h.value).at[..., 0].set(0.3).at[..., 1:].add(y[..., 1:]).at[..., 2:].mul(0.7))


def keeps_old(m, x):
    before = m.h.value
    m.h.value = jnp.tanh(0.5 * before + matmul(x, m.w.value))
    return before


WRITTEN = {
    "operation beside": row(shows_operation, lambda m, y: m.h.value + y),
    "operation times state": row(shows_operation, lambda m, y: jnp.cumsum(y, -1) * m.h.value),
    "alias": row(returns_alias, lambda m, y: y),
    "stored output": row(stored_output),
    "written twice": row(written_twice),
    "product of operations": row(product_of_operations, w=W, v=W),
    "parts of the units": row(parts_of_the_units),
    "written in place": row(written_in_place),
}
OLD_OUTPUTS = {
    "old value": row(keeps_old, lambda m, before: before),
    "both values": row(keeps_old, lambda m, before: m.h.value * before),
}

# -- a user's derivative, which is not that of the function


@jax.custom_vjp
def gated(y):
    return y * (y > 0)


gated.defvjp(lambda y: (gated(y), y), lambda y, cot: (cot / (1 + y**2),))


@jax.custom_vjp
def softened(y):
    return jax.nn.softmax(y, -1)


softened.defvjp(lambda y: (softened(y), y), lambda y, cot: (0.5 * cot + jnp.roll(cot, 1, -1),))


@jax.custom_jvp
def spike(v):
    return (v > 0.3).astype(v.dtype)


spike.defjvp(lambda primals, tangents: (spike(primals[0]), tangents[0] / (1 + primals[0] ** 2)))


@jax.custom_vjp
def blend(h, y):
    return 0.5 * h + y


blend.defvjp(lambda h, y: (blend(h, y), y), lambda y, cot: (0.25 * cot, cot * (1 + y**2)))


def through(function):
    def transition(m, x):
        m.h.value = 0.5 * m.h.value + 0.3 * function(matmul(x, m.w.value) + 0.2 * m.h.value)

    return transition


def blended(m, x):
    m.h.value = jnp.tanh(blend(m.h.value, matmul(x, m.w.value)))


DERIVATIVES = {
    "reverse rule": row(through(gated)),
    "reverse rule that mixes": row(through(softened)),
    "forward rule": row(through(spike)),
    "reverse rule of two arguments": row(blended),
}

# -- control flow without weights

FLOWS = {
    "cond": lambda h, x: jax.lax.cond(x.sum() > 2, lambda h: 0.5 * h, lambda h: 0.2 * h**2, h),
    "switch": lambda h, x: jax.lax.switch(x.sum().astype(int), [jnp.sin, jnp.cos, jnp.tanh], h),
    "scan": lambda h, x: jax.lax.scan(lambda h, _: (h - 0.1 * h**3, None), h, None, length=4)[0],
    "fori_loop": lambda h, x: jax.lax.fori_loop(0, 4, lambda i, h: 0.8 * h + 0.01 * i, h),
    "scan that mixes": lambda h, x: jax.lax.scan(lambda h, _: (0.5 * (h + jnp.roll(h, 1, -1)), None), h, None, 2)[0],
    "where": lambda h, x: jnp.where(h > 0, 0.5 * h, 0.2 * h),
    "nested jit": lambda h, x: jax.jit(jax.jit(jnp.tanh))(h),
}


def flow_of_old(flow):
    def transition(m, x):
        m.h.value = jnp.tanh(flow(m.h.value, x) + matmul(x, m.w.value))

    return transition


def flow_of_operation(flow):
    def transition(m, x):
        m.h.value = 0.5 * m.h.value + flow(matmul(x, m.w.value), x)

    return transition


CONTROL_FLOW = {
    **{f"{name}, old value": row(flow_of_old(flow)) for name, flow in FLOWS.items()},
    **{f"{name}, operation": row(flow_of_operation(flow)) for name, flow in FLOWS.items()},
}

STEPS = {
    **PARAMETERS,
    **PREPARED,
    **PAIRS,
    **TAILS,
    **MIXED_STATES,
    **SEVERAL_STATES,
    **WRITTEN,
    **OLD_OUTPUTS,
    **DERIVATIVES,
    **CONTROL_FLOW,
}
CASES = [(name, 2) for name in STEPS] + [(name, None) for name in (*TAILS, *CHAINS)]
# The oracle knows the way from one group's new value to another group in the current step only.
LENGTHS = dict.fromkeys(STEPS, 3) | {"two linked groups": 1}
