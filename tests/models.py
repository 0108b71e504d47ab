"""Networks for the gradient tests, each in two versions that share parameter and state paths.

`Net(layers)` from the library's operations is what a user writes; the twin is the same network for the oracle of
`helpers`. Hand-written layers serve as both: their maps go through `matmul` below, which is the library's operation
in a user's network and a plain product with a tap inside the oracle. The twins of the library's own cells follow the
equations of each cell's docstring.
"""

from types import SimpleNamespace

import brainpy
import brainstate
import braintools
import brainunit as u
import helpers
import jax
import jax.numpy as jnp
import numpy as np
from brainstate import HiddenState, ParamState
from brainstate.nn import Module
from helpers import old

# ---------------------------------------------------------------------------------------------------------------------
# Marked operations: the library's, or a tap. The library is imported on use: the oracle does not need it.


def matmul(x, w, b=None):
    if helpers.in_oracle():
        return helpers.tap(_affine, x, w, b)
    import braintrace

    return braintrace.matmul(x, w, b)


def element_wise(w):
    if helpers.in_oracle():
        shape = helpers.stage_shape()
        return helpers.tap(lambda _, w: jnp.broadcast_to(w, shape), None, w)
    import braintrace

    return braintrace.element_wise(w)


def _affine(x, w, b=None):
    y = x @ w
    return y if b is None else y + b


def cat(*xs):
    return jnp.concatenate([jnp.asarray(x) for x in xs], axis=-1)


def zeros(n, batch):
    return HiddenState(jnp.zeros((n,) if batch is None else (batch, n), brainstate.environ.dftype()))


# ---------------------------------------------------------------------------------------------------------------------
# Networks and layers


class Net(Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = list(layers)

    def update(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Stage(Module):
    """A layer that owns hidden states: `states` names those of each group, `output` reads them."""

    states: tuple = (("h",),)

    def groups(self):
        return [[getattr(self, name) for name in group] for group in self.states]

    def reset_state(self, batch_size=None, **_):
        for state in [state for group in self.groups() for state in group]:
            state.value = jax.tree.map(jnp.zeros_like, state.value)

    def output(self, aux):
        del aux
        return self.h.value

    def update(self, x):
        return self.output(self.transition(x))


class Plain(Module):
    """What a user writes, without a twin: `step(m, *args)`, states and parameters as given."""

    def __init__(self, step, **states):
        super().__init__()
        self._step = step
        for name, state in states.items():
            setattr(self, name, state)

    def update(self, *args):
        return self._step(self, *args)


class Linear(Module):
    def __init__(self, n_in, n_out, bias=True, unit=None):
        super().__init__()
        value = {"weight": jnp.zeros((n_in, n_out)), **({"bias": jnp.zeros(n_out)} if bias else {})}
        self.weight = ParamState({k: v * unit for k, v in value.items()} if unit is not None else value)
        self.in_size, self.out_size = (n_in,), (n_out,)

    def update(self, x):
        return matmul(x, self.weight.value["weight"], self.weight.value.get("bias"))


class PlainReadout(Module):
    """An unmarked `x @ w`."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.w = ParamState(jnp.zeros((n_in, n_out)))

    def update(self, x):
        return x @ self.w.value


class LeakyRateReadout(Stage):
    states = (("r",),)

    def __init__(self, n_in, n_out, tau=5.0 * u.ms):
        super().__init__()
        self.W = ParamState(jnp.zeros((n_in, n_out)))
        self.decay = float(u.math.exp(-brainstate.environ.get_dt() / tau))
        self.n = n_out

    def init_state(self, batch_size=None, **_):
        self.r = zeros(self.n, batch_size)

    def transition(self, x):
        self.r.value = self.decay * self.r.value + matmul(x, self.W.value)

    def output(self, aux):
        return self.r.value


# -- the library's cells, from their equations


class Cell(Stage):
    def __init__(self, n_in, n):
        super().__init__()
        self.n = n
        for name in self.gates:
            setattr(self, name, Linear(n_in + n, n))

    def init_state(self, batch_size=None, **_):
        for name in self.states[0]:
            setattr(self, name, zeros(self.n, batch_size))


class ValinaRNNCell(Cell):
    gates = ("W",)
    activation = staticmethod(jnp.tanh)

    def transition(self, x):
        self.h.value = self.activation(self.W(cat(x, old(self.h.value))))


class GRUCell(Cell):
    gates = ("Wz", "Wr", "Wh")

    def transition(self, x):
        h, xh = self.h.value, cat(x, old(self.h.value))
        z, r = jax.nn.sigmoid(self.Wz(xh)), jax.nn.sigmoid(self.Wr(xh))
        candidate = jnp.tanh(self.Wh(cat(x, r * old(h))))
        self.h.value = (1 - z) * h + z * candidate


class MGUCell(Cell):
    gates = ("Wf", "Wh")

    def transition(self, x):
        h = self.h.value
        f = jax.nn.sigmoid(self.Wf(cat(x, old(h))))
        self.h.value = (1 - f) * h + f * jnp.tanh(self.Wh(cat(x, f * old(h))))


class LSTMCell(Cell):
    gates = ("Wi", "Wg", "Wf", "Wo")
    states = (("h", "c"),)

    def transition(self, x):
        xh = cat(x, old(self.h.value))
        i, f, o = (jax.nn.sigmoid(y) for y in (self.Wi(xh), self.Wf(xh) + 1.0, self.Wo(xh)))
        self.c.value = f * self.c.value + i * jnp.tanh(self.Wg(xh))
        self.h.value = o * jnp.tanh(self.c.value)


class URLSTMCell(Cell):
    gates = ("Wu", "Wf", "Wr", "Wo")
    states = (("h", "c"),)

    def __init__(self, n_in, n):
        Stage.__init__(self)
        self.n = n
        for name in self.gates:
            setattr(self, name, Linear(n_in + n, n, bias=False))
        self.bias = ParamState(jnp.zeros(n))

    def transition(self, x):
        xh = cat(x, old(self.h.value))
        f = jax.nn.sigmoid(element_wise(self.bias.value) + self.Wf(xh))
        r = jax.nn.sigmoid(self.Wr(xh) - element_wise(self.bias.value))
        g = 2 * r * f + (1 - 2 * r) * f**2
        self.c.value = g * self.c.value + (1 - g) * jnp.tanh(self.Wu(xh))
        self.h.value = jax.nn.sigmoid(self.Wo(xh)) * jnp.tanh(self.c.value)


twin = SimpleNamespace(
    ValinaRNNCell=ValinaRNNCell,
    GRUCell=GRUCell,
    MGUCell=MGUCell,
    LSTMCell=LSTMCell,
    URLSTMCell=URLSTMCell,
    Linear=Linear,
    LeakyRateReadout=LeakyRateReadout,
)


def library():
    import braintrace

    return braintrace.nn


# -- spiking layers of brainpy.state, in physical units


class Spiking(Stage):
    """An exponential synapse onto LIF or ALIF neurons, current- or conductance-based, fed by input and own spikes."""

    def __init__(self, n_in, n, neuron="LIF", reset="soft", out="CUBA", recurrent=True):
        super().__init__()
        self.recurrent = recurrent
        kinds = {"LIF": {}, "ALIF": {"tau_a": 20.0 * u.ms, "beta": 0.3 * u.mV}}
        outs = {"CUBA": lambda: brainpy.state.CUBA(), "COBA": lambda: brainpy.state.COBA(E=4.0 * u.mV)}
        resistance = {"CUBA": 1.0 * u.ohm, "COBA": 300.0 * u.ohm}[out]
        self.neu = getattr(brainpy.state, neuron)(
            n,
            tau=4.0 * u.ms,
            R=resistance,
            spk_reset=reset,
            spk_fun=braintools.surrogate.InvSquareGrad(2.0),
            **kinds[neuron],
        )
        self.syn = brainpy.state.AlignPostProj(
            comm=Linear(n_in + n * recurrent, n, unit=u.mS),
            syn=brainpy.state.Expon(n, tau=6.0 * u.ms),
            out=outs[out](),
            post=self.neu,
        )

    def groups(self):
        adaptation = [self.neu.a] if isinstance(self.neu, brainpy.state.ALIF) else []
        return [[self.syn.syn.g, self.neu.V] + adaptation]

    def transition(self, x):
        self.syn(cat(x, old(self.neu.get_spike())) if self.recurrent else x)
        self.neu()

    def output(self, aux):
        return self.neu.get_spike()


# -- small hand-written models


class ModelA(Stage):
    """Leak outside the weight, inputs only."""

    def __init__(self, n_in=2, n=3):
        super().__init__()
        self.n, self.W = n, Linear(n_in, n)

    def init_state(self, batch_size=None, **_):
        self.h = zeros(self.n, batch_size)

    def transition(self, x):
        self.h.value = jnp.tanh(0.5 * self.h.value + self.W(x))


class ModelB(ModelA):
    """Two states of one group, both fed by one map; the output mixes them."""

    states = (("h", "c"),)

    def init_state(self, batch_size=None, **_):
        self.h, self.c = zeros(self.n, batch_size), zeros(self.n, batch_size)

    def transition(self, x):
        h, c, y = self.h.value, self.c.value, self.W(x)
        self.h.value = jnp.tanh(0.6 * h + 0.3 * c + y)
        self.c.value = 0.7 * c - 0.2 * h + 0.5 * y

    def output(self, aux):
        return self.h.value + self.c.value**2


class ModelC(ModelA):
    """A recurrent weight: the path through it is cut."""

    def __init__(self, n_in=2, n=3):
        super().__init__(n_in + n, n)

    def transition(self, x):
        self.h.value = 0.4 * self.h.value + 0.6 * jnp.tanh(self.W(cat(x, old(self.h.value))))


class Chain(ModelA):
    """Three states, each reading the new value of the one before."""

    states = (("a", "b", "c"),)

    def init_state(self, batch_size=None, **_):
        self.a, self.b, self.c = (zeros(self.n, batch_size) for _ in range(3))

    def transition(self, x):
        self.a.value = 0.9 * self.a.value + self.W(x)
        self.b.value = jnp.tanh(0.8 * self.b.value + self.a.value)
        self.c.value = 0.7 * self.c.value + self.b.value * self.a.value

    def output(self, aux):
        return self.a.value + self.b.value * self.c.value


class Beside(ModelA):
    """The operation's output also reaches the loss beside the state, and mixes positions."""

    def transition(self, x):
        y = self.W(x)
        self.h.value = jnp.tanh(0.5 * self.h.value + y + 0.3 * jnp.roll(y, 1, -1))
        return y

    def output(self, aux):
        return self.h.value + aux * jnp.arange(1.0, self.n + 1).astype(aux.dtype)


class ReadsOld(ModelA):
    """The output reads the state before and after the update."""

    def transition(self, x):
        before = self.h.value
        self.h.value = jnp.tanh(0.5 * before + self.W(x))
        return before

    def output(self, aux):
        return self.h.value + aux**2


class Masked(ModelA):
    """A program between the parameters and the operation: mask, scale and a second parameter."""

    def __init__(self, n_in=2, n=3):
        super().__init__(n_in, n)
        self.scale = ParamState(jnp.zeros(n))

    def transition(self, x):
        w = self.W.weight.value
        mask = (jnp.arange(w["weight"].size) % 3 > 0).reshape(w["weight"].shape)
        weight = w["weight"] * mask * jnp.exp(self.scale.value)
        self.h.value = jnp.tanh(0.5 * self.h.value + matmul(x, weight, w["bias"]))


class Shared(ModelA):
    """One weight in two operations and once plainly."""

    def transition(self, x):
        w = self.W.weight.value["weight"]
        y = self.W(x) * jnp.tanh(matmul(0.5 * x, w))
        self.h.value = 0.6 * self.h.value + y + 0.2 * (x @ w)


class Mixing(ModelA):
    """Plain recurrent product and a roll: neither carries the trace."""

    def __init__(self, n_in=2, n=3):
        super().__init__(n_in, n)
        self.R = ParamState(jnp.zeros((n, n)))

    def transition(self, x):
        h = self.h.value
        self.h.value = jnp.tanh(0.5 * h + 0.3 * jnp.roll(h, 1, -1) + old(h) @ self.R.value + self.W(x))


class Leak(ModelA):
    """A trainable leak through `element_wise`."""

    def __init__(self, n_in=2, n=3):
        super().__init__(n_in, n)
        self.leak = ParamState(jnp.zeros(n))

    def transition(self, x):
        keep = jax.nn.sigmoid(element_wise(self.leak.value))
        self.h.value = keep * self.h.value + (1 - keep) * self.W(x)


class Many(ModelA):
    """Up to five states per position: linear with constant coefficients, gated, and fed by two operations."""

    def __init__(self, count, n_in=2, n=3):
        super().__init__(n_in, n)
        self.R = Linear(n_in + n, n)
        self.states = (("a", "b", "c", "d", "e")[:count],)

    def init_state(self, batch_size=None, **_):
        for name in self.states[0]:
            setattr(self, name, zeros(self.n, batch_size))

    def transition(self, x):
        a, b, c, d = (getattr(self, name).value for name in "abcd")
        self.a.value = 0.9 * a + self.W(x)
        self.b.value = 0.8 * b + 0.3 * self.a.value
        self.c.value = jnp.tanh(0.5 * c + self.b.value + self.R(cat(x, old(c))))
        self.d.value = 0.7 * d + self.c.value * a
        if len(self.states[0]) == 5:
            self.e.value = jax.nn.sigmoid(self.d.value) * self.e.value + 0.2 * b

    def output(self, aux):
        return self.a.value * self.c.value + getattr(self, self.states[0][-1]).value


class NoMemory(ModelA):
    """A state that forgets: its trace is the present input."""

    def transition(self, x):
        self.h.value = self.W(x)


# ---------------------------------------------------------------------------------------------------------------------
# Lists. A model is a function of the namespace of layers to build from (the library's, or `twin`).

N_IN, N, N_OUT = 2, 3, 2

CELLS = {
    "vanilla": lambda nn: [nn.ValinaRNNCell(N_IN, N, **({} if nn is twin else {"activation": "tanh"}))],
    "gru": lambda nn: [nn.GRUCell(N_IN, N)],
    "lstm": lambda nn: [nn.LSTMCell(N_IN, N)],
}
MORE_CELLS = {
    "mgu": lambda nn: [nn.MGUCell(N_IN, N)],
    "urlstm": lambda nn: [nn.URLSTMCell(N_IN, N)],
}
SPIKING = {
    "lif-cuba": lambda nn: [Spiking(N_IN, N)],
    "lif-coba-hard": lambda nn: [Spiking(N_IN, N, out="COBA", reset="hard")],
    "alif-cuba-hard": lambda nn: [Spiking(N_IN, N, neuron="ALIF", reset="hard")],
    "alif-coba": lambda nn: [Spiking(N_IN, N, neuron="ALIF", out="COBA")],
}
STACKED = {
    "gru-lstm": lambda nn: [nn.GRUCell(N_IN, N), nn.LSTMCell(N, N)],
    "lif-alif": lambda nn: [Spiking(N_IN, N), Spiking(N, N, neuron="ALIF", out="COBA", recurrent=False)],
}
SMALL = {
    cls.__name__: lambda nn, cls=cls: [cls()]
    for cls in (ModelA, ModelB, ModelC, Chain, Beside, ReadsOld, Masked, Shared, Mixing, Leak)
}
MORE = {
    "alif-alone": lambda nn: [Spiking(N_IN, N, neuron="ALIF", recurrent=False)],
    "alif-cuba": lambda nn: [Spiking(N_IN, N, neuron="ALIF")],
    "four states": lambda nn: [Many(4)],
    "five states": lambda nn: [Many(5)],
    "no memory": lambda nn: [NoMemory()],
}
MODELS = CELLS | MORE_CELLS | SPIKING | STACKED | SMALL | MORE
READOUTS = {
    "plain": lambda nn: PlainReadout(N, N_OUT),
    "linear": lambda nn: nn.Linear(N, N_OUT),
    "leaky": lambda nn: nn.LeakyRateReadout(N, N_OUT),
}


def build(model, readout, nn, batch=None):
    net = Net(*model(nn), *([readout(nn)] if readout else []))
    brainstate.nn.init_all_states(net, **({} if batch is None else {"batch_size": batch}))
    return net


def randomise(net, seed=0, scale=0.6, dtype=None):
    """Random parameters; float states of both kinds in `dtype`."""
    rng = np.random.default_rng(seed)
    for _, state in sorted(net.states(ParamState).items()):
        state.value = jax.tree.map(lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype), state.value)
    if dtype is not None:
        for state in net.states().values():
            state.value = jax.tree.map(lambda x: x.astype(dtype), state.value)
    return net


def copy_values(source, target):
    """States of `target` take the values of `source`, the narrow float types widened to float32."""
    ours, theirs = target.states(), source.states()
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    for path, state in ours.items():
        state.value = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), theirs[path].value)
    return target


# Values that two other programs computed: (model, rule, options, step) -> weight by rows (of C rows 1, 2 and 5), bias.

_A0 = [0.90974, 1.99023, 2.9973]
PUBLISHED = {
    ("ModelA", "pp_prop", 0.9, 0): ([_A0, [0.45487, 0.99512, 1.49865]], _A0),
    ("ModelA", "pp_prop", 0.9, 2): (
        [[0.40507, 0.75954, 1.01143], [0.06842, 0.1283, 0.17085]],
        [1.48343, 2.78157, 3.70402],
    ),
    ("ModelA", "pp_prop", (0.8, 0.5), 2): (
        [[0.41865, 0.78696, 1.04908], [-0.02791, -0.05246, -0.06994]],
        [1.70253, 3.2003, 4.26627],
    ),
    ("ModelA", "D_RTRL", None, 2): (
        [[0.25709, 0.51114, 0.68264], [-0.56344, -1.0964, -1.47275]],
        [1.55814, 2.92096, 3.88874],
    ),
    ("ModelA", "EProp", 0.5, 2): (
        [[0.54816, 1.16191, 1.66188], [-0.02753, -0.03426, 0.11142]],
        [2.38341, 4.57991, 6.36579],
    ),
    ("ModelB", "pp_prop", 0.9, 2): (
        [[0.45129, 0.85927, 1.65959], [0.07623, 0.14515, 0.28034]],
        [1.65271, 3.1468, 6.07768],
    ),
    ("ModelB", "D_RTRL", None, 2): (
        [[0.37255, 0.7675, 1.1519], [-0.23027, -0.374, -1.37708]],
        [1.77787, 3.39603, 6.47233],
    ),
    ("ModelC", "pp_prop", 0.9, 2): (
        [[0.22258, 0.40787, 0.52635], [0.0376, 0.0689, 0.08891], [-0.07811, -0.14313, -0.18471]],
        [0.81514, 1.49369, 1.92759],
    ),
    ("ModelC", "D_RTRL", None, 2): (
        [[0.13475, 0.27974, 0.35797], [-0.34137, -0.60905, -0.5991], [-0.14908, -0.27002, -0.31844]],
        [0.85287, 1.56731, 2.03823],
    ),
}
PUBLISHED_INPUTS = np.array([[1, 0.5], [-0.3, 0.8], [0.2, -1]], np.float32)


def published(name):
    """`ModelA`, `ModelB` or `ModelC` with the parameters of the printed numbers."""
    net = build(SMALL[name], None, twin)
    W = jnp.array([[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]])
    if name == "ModelC":
        W = jnp.concatenate([W, 0.2 * jnp.eye(3) + 0.1])
    net.layers[0].W.weight.value = {"weight": W, "bias": jnp.array([0.01, 0.02, 0.03])}
    return net


def published_loss(net, call, x):
    return (call(x) * jnp.arange(1.0, 4.0)).sum()


def assert_published(gradients, weight, bias):
    """`gradients`: path -> gradient of the one parameter."""
    (gradient,) = gradients.values()
    rows = np.asarray(gradient["weight"])[[0, 1, 4][: len(weight)]]
    np.testing.assert_allclose(rows, weight, atol=6e-6)
    np.testing.assert_allclose(gradient["bias"], bias, atol=6e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Problems: a network in both versions, a loss and a sequence of argument tuples.


def squares(net, call, x, target):
    return ((call(x) - target) ** 2).sum()


def leaves(net, kind):
    return [x for state in net.states(kind).values() for x in jax.tree.leaves(state.value)]


def weight_decay(net, call, x, target):
    return squares(net, call, x, target) + 0.1 * sum((w**2).sum() for w in leaves(net, ParamState))


def firing_rate(net, call, x, target):
    loss = squares(net, call, x, target)
    return loss + sum(((h - 0.2) ** 2).mean() for h in leaves(net, HiddenState))


def looks_back(net, call, x, target):
    """What is read before the call is a constant."""
    before = [jax.lax.stop_gradient(h) for h in leaves(net, HiddenState)]
    loss = squares(net, call, x, target)
    return loss + sum((b * h).sum() for b, h in zip(before, leaves(net, HiddenState)))


def only_states(net, call, x, target):
    call(x)
    return sum((h**3).sum() for h in leaves(net, HiddenState))


LOSSES = [weight_decay, firing_rate, looks_back, only_states]  # beside `squares`


def inputs(steps, batch, width, kind="float", n_in=N_IN, seed=1, dtype=None):
    """`steps` pairs (x, target). Kinds of x: floats around one, or spikes as bool or int."""
    rng = np.random.default_rng(seed)
    lead = () if batch is None else (batch,)
    xs = rng.normal(1.0, 1.0, (steps, *lead, n_in))
    dtype = dtype or brainstate.environ.dftype()
    xs = xs.astype(dtype) if kind == "float" else (xs > 0.7).astype(kind)
    targets = rng.normal(size=(steps, *lead, width)).astype(dtype)
    return list(zip(jnp.asarray(xs), jnp.asarray(targets)))


class Problem:
    """The same network twice, with equal values; `loss(net, call, *args)` is the loss of one step.

    `mapped`: the library's is of single samples, to be mapped over the batch as `rules.learner_of` says.
    """

    def __init__(self, model, readout=None, batch=None, loss=squares, kind="float", steps=5, dtype=None, mapped=None):
        net = randomise(build(model, readout, library(), batch), dtype=dtype)
        self.twin = copy_values(net, build(model, readout, twin, batch))
        self.net = randomise(build(model, readout, library()), dtype=dtype) if mapped else net
        self.loss, self.batch, self.mapped = loss, batch, mapped
        self.sequence = inputs(steps, batch, N_OUT if readout else N, kind, dtype=dtype)

    def learner(self, rule="pp_prop", **options):
        import rules

        return rules.learner_of(self.net, self.sequence[0][0], rule, self.mapped, **options)

    def step(self, learner):
        """A jitted function of one step's arguments: `(gradients, loss)`."""
        return brainstate.transform.jit(
            brainstate.transform.grad(
                lambda *args: self.loss(self.net, learner, *args), learner.param_states, return_value=True
            )
        )

    def online(self, learner):
        """Per step `(loss, gradients)`, as `Oracle.online`."""
        step = self.step(learner)
        pairs = [step(*args) for args in self.sequence]
        return [(loss, dict(grads)) for grads, loss in pairs]

    def sequences(self):
        """Inputs and targets with a leading time axis, and the `step_fn` of a driver."""
        return [jnp.stack(leaves) for leaves in zip(*self.sequence)]

    def oracle(self):
        return helpers.Oracle(self.twin, self.loss)
