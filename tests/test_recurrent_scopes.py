"""Rules whose transition Jacobian sees the recurrent mixing, against dense Jacobians of the same step in plain JAX."""

import contextlib
import re
import warnings

import brainevent
import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import braintrace
from braintrace._compiler.scope import neighbourhood

N, INPUTS, T = 4, 3, 4
WEIGHT = jax.random.normal(jax.random.key(1), (N,))


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True), brainstate.environ.context(precision=64):
        yield


def weight(seed, *shape):
    return 0.6 * np.random.default_rng(seed).normal(size=shape)


# A model is its parameters and a step `(mm, parameters, states, x) -> states`, with all states of shape (..., N).
# `mm(key, x)` is the product with a parameter: marked, or plain and observed.


def vanilla(mm, s, x):
    return [jnp.tanh(mm("w", jnp.concatenate([x, s[0]], -1)))]


def recurrent(mm, s, x):
    return [0.3 * s[0] + jnp.tanh(mm("in", x) + mm("rec", s[0]))]


def synapse_first(mm, s, x):
    v, g = s
    g = 0.7 * g + mm("in", x) + mm("rec", jnp.tanh(v))
    return [0.8 * v + 0.5 * jnp.tanh(g), g]


def neuron_first(mm, s, x):
    """The new potential enters the recurrent product of the same step."""
    v, g = s
    v = 0.8 * v + 0.5 * jnp.tanh(g) + 0.2 * mm("in", x)
    return [v, 0.7 * g + mm("rec", jnp.tanh(v))]


def gated(mm, s, x):
    """The gate acts directly and through the other product, whose output is held fixed for its trace."""
    f = jax.nn.sigmoid(mm("gate", jnp.concatenate([x, s[0]], -1)))
    return [f * s[0] + (1 - f) * jnp.tanh(mm("w", jnp.concatenate([x, f * s[0]], -1)))]


MODELS = {
    "vanilla": (vanilla, {"w": weight(0, INPUTS + N, N)}, 1),
    "recurrent": (recurrent, {"in": weight(1, INPUTS, N), "rec": weight(2, N, N)}, 1),
    "synapse first": (synapse_first, {"in": weight(3, INPUTS, N), "rec": weight(4, N, N)}, 2),
    "neuron first": (neuron_first, {"in": weight(5, INPUTS, N), "rec": weight(6, N, N)}, 2),
    "gated": (gated, {"gate": weight(7, INPUTS + N, N), "w": weight(8, INPUTS + N, N)}, 1),
}
DIRECT = ["vanilla", "recurrent", "synapse first", "neuron first"]  # no product behind another one within a step


class Model(brainstate.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.step, parameters, self.number = MODELS[name]
        self.w = {k: brainstate.ParamState(jnp.asarray(v)) for k, v in parameters.items()}

    def init_state(self, batch_size=None, **_):
        shape = (N,) if batch_size is None else (batch_size, N)
        self.s = [brainstate.HiddenState(jnp.full(shape, 0.1 * (i + 1))) for i in range(self.number)]

    def update(self, x):
        new = self.step(lambda k, x: braintrace.matmul(x, self.w[k].value), [s.value for s in self.s], x)
        for state, value in zip(self.s, new):
            state.value = value
        return new[0] ** 2 + sum(new[1:])


def loss_of(states):
    return ((states[0] ** 2 + sum(states[1:])) * WEIGHT).sum()


def inputs(*shape):
    return jax.random.normal(jax.random.key(3), (T, *shape, INPUTS))


class Reference:
    """Traces of one sample with the whole Jacobian, masked to the neighbourhood of every position."""

    def __init__(self, name, mask, kappa=0.0):
        self.kappa = kappa
        self.step, parameters, self.number = MODELS[name]
        self.w = {k: jnp.asarray(v) for k, v in parameters.items()}
        self.mask = mask  # [p, q]: the trace of a weight at p follows q

    def new(self, s, x, w=None, shift=None):
        """The new states; a shift of one product's output does not enter another product directly."""
        w = self.w if w is None else w
        ys = self.products(s, x)[1]

        def mm(k, x):
            y = x @ w[k]
            if shift is None or k not in shift:
                # Behind another product: as it is without the shift.
                return ys[k] if shift is not None and self.step is gated else y
            return y + shift[k]

        return jnp.stack(self.step(mm, list(s), x))

    def products(self, s, x):
        """Inputs and outputs of all products."""
        xs, ys = {}, {}

        def mm(k, x):
            xs[k], ys[k] = x, x @ self.w[k]
            return ys[k]

        self.step(mm, list(s), x)
        return xs, ys

    def gradients(self, xs):
        """The gradient of every step's loss."""
        s = jnp.stack([jnp.full(N, 0.1 * (i + 1)) for i in range(self.number)])
        traces = {k: jnp.zeros((self.number, N, len(w), N)) for k, w in self.w.items()}  # (S, q, in, p)
        filtered = dict(traces)
        out = []
        for x in xs:
            J = jax.jacobian(self.new)(s, x)  # (S, N, S, N)
            new, L = self.new(s, x), jax.grad(loss_of)(self.new(s, x))
            exact = jax.grad(lambda w, s=s, x=x: loss_of(self.new(s, x, w)))(self.w)
            found = {}
            for k in traces:
                jac = jax.jacobian(lambda z, k=k, s=s, x=x: self.new(s, x, shift={k: z}))(jnp.zeros(N))
                df, given = jnp.diagonal(jac, axis1=1, axis2=2), self.products(s, x)[0][k]
                now = jnp.einsum("ap,i,pq->aqip", df, given, jnp.eye(N))
                carried = jnp.einsum("aqbr,brip->aqip", J, traces[k])
                traces[k] = (carried + now) * self.mask.T[:, None, :]
                filtered[k] = self.kappa * filtered[k] + traces[k]
                # What the traces do not carry of the current step is exact all the same.
                beside = exact[k] - jnp.einsum("ap,ap,i->ip", L, df, given)
                found[k] = jnp.einsum("aq,aqip->ip", L, filtered[k]) + beside
            out.append(found)
            s = new
        return out


def library(name, algorithm, xs, batch=None, driver="call", **options):
    learner = braintrace.compile(Model(name), algorithm, xs[0], batch_size=batch, **options)

    def step(x):
        return (learner(x) * WEIGHT).sum()

    if driver == "call":
        gradient = brainstate.transform.grad(step, learner.param_states)
        return [{k[-1]: v for k, v in gradient(x).items()} for x in xs]
    total = learner.etrace_grad(xs, step_fn=step, reduction="sum", **driver)
    return {k[-1]: v for k, v in total.items()}


def agree(found, expected, rtol=1e-9):
    for k in expected:
        np.testing.assert_allclose(found[k], expected[k], rtol=rtol, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_coupled(name):
    xs = inputs()
    for found, expected in zip(library(name, "ostl_recurrent", xs), Reference(name, jnp.eye(N)).gradients(xs)):
        agree(found, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DIRECT)
def test_saturated_neighbourhoods(name):
    xs = inputs()
    every = jnp.ones((N, N))
    learner = braintrace.compile(Model(name), braintrace.SnAp, xs[0], n=2)
    assert learner.graph.hidden_groups[0].snap.num_neighbour == N
    found = library(name, braintrace.SnAp, xs, n=2)
    for f, e in zip(found, Reference(name, every).gradients(xs)):
        agree(f, e)
    if name == "neuron first":  # the input's way to the state mixes positions
        return
    # One group whose operations act position by position: back-propagation through time.
    model = Model(name)
    brainstate.nn.init_all_states(model)

    def loss():
        return sum((model(x) * WEIGHT).sum() for x in xs)

    exact = brainstate.transform.grad(loss, model.states(brainstate.ParamState))()
    total = jax.tree.map(lambda *g: sum(g), *found)
    agree(total, {k[-1]: v for k, v in exact.items()})
    coupled = jax.tree.map(lambda *g: sum(g), *library(name, "ostl_recurrent", xs))
    assert not any(np.allclose(coupled[k], total[k], rtol=1e-3) for k in total)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [dict(batch=2), dict(batch=2, vmap=True)], ids=["batched", "vmap"])
@pytest.mark.parametrize(
    "name, algorithm, rule",
    [
        ("synapse first", "ostl_recurrent", {}),
        ("gated", braintrace.SnAp, {"n": 2}),
        ("gated", braintrace.ETraceConfig("io_factorized", decay=0.9, recurrence_scope="coupled"), {}),
    ],
    ids=["coupled", "snap", "pp_prop"],
)
def test_batches_and_drivers(name, algorithm, rule, options):
    """Step by step on single samples is what everything else must be."""
    xs = inputs(2)
    each = [library(name, algorithm, xs[:, i], **rule) for i in range(2)]
    expected = jax.tree.map(lambda *g: sum(g), *each[0], *each[1])
    for chunk in (2, None):
        agree(library(name, algorithm, xs, driver=dict(trace_chunk=chunk), **options, **rule), expected)


def chain_with_a_skip():
    """0 -> 1 -> 2 -> 3 -> 4 and 0 -> 2; entry (p, q) is what p gives q."""
    A = np.zeros((5, 5))
    for p, q in [(0, 1), (1, 2), (2, 3), (3, 4), (1, 3)]:
        A[p, q] = 0.5 + 0.1 * p
    return A


class Chain(brainstate.nn.Module):
    def __init__(self, A):
        super().__init__()
        self.matrix = brainevent.CSR.fromdense(jnp.asarray(A))
        self.w = brainstate.ParamState(self.matrix.data)
        self.w_in = brainstate.ParamState(jnp.asarray(weight(9, 2, 5)))

    def init_state(self, batch_size=None, **_):
        self.h = brainstate.HiddenState(jnp.zeros(5 if batch_size is None else (batch_size, 5)))

    def update(self, x):
        y = braintrace.sparse_matmul(self.h.value, self.w.value, sparse_mat=self.matrix)
        self.h.value = jnp.tanh(0.2 * self.h.value + y + braintrace.matmul(x, self.w_in.value))
        return self.h.value


def test_sparse_neighbourhoods():
    A = chain_with_a_skip()
    reach = (A != 0) | np.eye(5, dtype=bool)
    xs = jax.random.normal(jax.random.key(4), (7, 2))
    exact = None
    for n, width in [(1, 1), (2, 3), (3, 4), (4, 5)]:
        learner = braintrace.compile(Chain(A), braintrace.SnAp, xs[0], n=n)
        (group,) = learner.graph.hidden_groups
        assert group.trace_state_width == width
        if n > 1:
            snap = group.snap
            followed = [sorted(snap.neighbours[p][snap.valid[p]]) for p in range(5)]
            assert followed == [sorted(np.flatnonzero(row)) for row in np.linalg.matrix_power(reach.astype(int), n - 1)]
            assert list(snap.neighbours[:, 0]) == list(range(5))
            assert not snap.conservative and snap.reason == "" and snap.n == n
            assert not snap.is_saturated and not snap.is_degenerate
        grads = learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).sum(), reduction="sum")
        model = learner.model4compile
        if exact is None:
            brainstate.nn.reset_all_states(model)
            model.h.value = jnp.zeros(5)

            def loss():
                return brainstate.transform.for_loop(lambda x: (model(x) ** 2).sum(), xs).sum()

            exact = brainstate.transform.grad(loss, model.states(brainstate.ParamState))()
        error = max(float(jnp.abs(grads[k] - exact[k]).max()) for k in exact)
        assert (error < 1e-12) == (n == 4), (n, error)


class Fused(brainstate.nn.Module):
    """Two gates from one product, whose outputs act on one position each."""

    def __init__(self):
        super().__init__()
        self.w = brainstate.ParamState(jnp.asarray(weight(10, INPUTS + N, 2 * N)))

    def init_state(self, batch_size=None, **_):
        self.h = brainstate.HiddenState(jnp.zeros(N if batch_size is None else (batch_size, N)))

    def update(self, x):
        gates = braintrace.matmul(jnp.concatenate([x, self.h.value], -1), self.w.value)
        z, candidate = jnp.split(gates, 2, -1)
        self.h.value = self.h.value + jax.nn.sigmoid(z) * (jnp.tanh(candidate) - self.h.value)
        return self.h.value * WEIGHT


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("model, n", [("chain", 2), ("chain", 3), ("ring", 5), ("fused", 2)])
def test_chunks_are_steps(model, n, batch):
    """Gradients and traces; what a step does is compared with the whole Jacobian above."""

    def learner_of():
        ring = 0.9 * np.roll(np.eye(5), 1, axis=1)  # in five steps a unit has reached all
        net = Fused() if model == "fused" else Chain(ring if model == "ring" else chain_with_a_skip())
        return braintrace.compile(net, braintrace.SnAp, xs[0], n=n, batch_size=batch)

    def loss(learner, x):
        return (learner(x) ** 2).sum()

    xs = jax.random.normal(
        jax.random.key(5), (7, *([] if batch is None else [batch]), INPUTS if model == "fused" else 2)
    )
    one, many = learner_of(), learner_of()
    each = [brainstate.transform.grad(lambda x: loss(one, x), one.param_states)(x) for x in xs]
    total = many.etrace_grad(xs, step_fn=lambda x: loss(many, x), reduction="sum", trace_chunk=3)
    agree(total, jax.tree.map(lambda *g: sum(g), *each))
    for path in many.param_states:
        jax.tree.map(lambda a, b: agree({path: a}, {path: b}), many.get_etrace_of(path), one.get_etrace_of(path))


PATTERNS = {  # adjacency, order: is_saturated, is_degenerate
    "none": (np.eye(4), 3, False, True),
    "ring, some": (np.roll(np.eye(4), 1, axis=1), 3, False, False),
    "ring, all": (np.roll(np.eye(4), 1, axis=1), 4, True, False),
    "chain": (np.eye(4, k=1), 9, False, False),
    "unknown": (None, 2, True, False),
    "one position": (np.ones((1, 1)), 2, True, True),
}


@pytest.mark.parametrize("row", PATTERNS)
def test_summaries_of_a_neighbourhood(row):
    adjacency, n, saturated, degenerate = PATTERNS[row]
    size = 4 if adjacency is None else len(adjacency)
    found = neighbourhood(None if adjacency is None else adjacency.astype(bool), (0,), (size,), n, "why")
    assert (found.n, found.is_saturated, found.is_degenerate, found.reason) == (n, saturated, degenerate, "why")


WHY_UNKNOWN = [
    (lambda s, w: s @ w + jnp.roll(s, 1), "hidden values enter 0 marked operations"),
    (lambda s, w: braintrace.matmul(braintrace.matmul(s, w), w), "hidden values enter 2 marked operations"),
    (lambda s, w: braintrace.matmul(s, w) + jnp.roll(s, 1), "beside etp_mv"),
    (lambda s, w: jnp.roll(braintrace.matmul(s, w), 1), "output of etp_mv changes its positions"),
    (lambda s, w: braintrace.matmul(s, w * s), "another operand of etp_mv"),
    (lambda s, w: braintrace.matmul(jnp.tile(s, 2), jnp.tile(w, (2, 1))), r"does not map the shape \(4,\)"),
    (lambda s, w: braintrace.matmul(s.reshape(2, 2), w[:2, :2]).reshape(4), r"does not map the shape \(4,\)"),
]


@pytest.mark.parametrize("mix, reason", WHY_UNKNOWN, ids=[reason for _, reason in WHY_UNKNOWN])
def test_why_a_pattern_is_unknown(mix, reason):
    class Mixed(Model):
        def update(self, x):
            s = self.s[0].value
            self.s[0].value = jnp.tanh(braintrace.matmul(x, self.w["in"].value) + mix(s, self.w["rec"].value))
            return self.s[0].value

    model = Mixed("recurrent")
    brainstate.nn.init_all_states(model)
    with pytest.warns(UserWarning, match=f"known pattern \\(.*{reason}.*\\): every"):
        graph = braintrace.compile_etrace_graph(model, inputs()[0], include_recurrent_mixing=True, sparse_n=2)
    (group,) = graph.hidden_groups
    assert group.snap.conservative and group.snap.is_saturated and re.search(reason, group.snap.reason)


def test_a_sparse_jacobian_is_never_formed_whole():
    """A ring of many units: what a step needs grows with the units, not with their square."""
    sizes = {}
    for n in (100, 400):
        model = Chain(np.roll(np.eye(5), 1, axis=1))
        model.matrix = brainevent.CSR.fromdense(jnp.asarray(np.roll(np.eye(n), 1, axis=1)))
        model.w.value, model.w_in.value = model.matrix.data, jnp.ones((2, n))
        model.init_state = lambda batch_size=None, m=model, n=n, **_: setattr(
            m, "h", brainstate.HiddenState(jnp.zeros((batch_size, n)))
        )
        learner = braintrace.compile(
            model, braintrace.SnAp, jnp.zeros((2, 2)), batch_size=2, n=2, snap_max_jacobian_elements=4 * n
        )
        assert learner.graph.hidden_groups[0].trace_state_width == 2
        run = brainstate.transform.jit(lambda x, f=learner: f(x))
        run(jnp.ones((2, 2)))
        step = jax.jit(learner.graph.step.record)
        invals = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in learner.graph.module_info.jaxpr.invars]
        operands = learner._binding.operands(invals)
        sizes[n] = step.lower(invals, operands).compile().memory_analysis().temp_size_in_bytes
    assert sizes[400] < 8 * max(sizes[100], 4096)


def test_neighbourhoods_settle():
    """However large the order, the search ends when nothing new is reached."""
    adjacency = np.roll(np.eye(6, dtype=bool), 1, axis=1)
    found = neighbourhood(adjacency, (0,), (6,), 10**9)
    assert found.num_neighbour == 6 and list(found.neighbours[2]) == [2, 0, 1, 3, 4, 5]


@pytest.mark.parametrize("rule", ["ostl_recurrent", braintrace.SnAp])
def test_products_that_are_not_marked(rule):
    """A plain product of hidden values is recurrent mixing too."""

    class Plain(Model):
        def update(self, x):
            s = self.s[0].value
            self.s[0].value = 0.3 * s + jnp.tanh(braintrace.matmul(x, self.w["in"].value) + s @ self.w["rec"].value)
            return self.s[0].value ** 2

    xs = inputs()
    options = {} if rule == "ostl_recurrent" else {"n": 2}
    kind = braintrace.DiagnosticKind.SNAP_PATTERN_CONSERVATIVE
    with contextlib.nullcontext() if rule == "ostl_recurrent" else pytest.warns(UserWarning, match=kind.value):
        learner = braintrace.compile(Plain("recurrent"), rule, xs[0], **options)
    assert bool(learner.graph.explain(kind=kind)) == (rule is braintrace.SnAp)
    gradient = brainstate.transform.grad(lambda x: (learner(x) * WEIGHT).sum(), learner.param_states)
    found = [gradient(x)["w", "in"] for x in xs]
    mask = jnp.eye(N) if rule == "ostl_recurrent" else jnp.ones((N, N))
    for f, e in zip(found, Reference("recurrent", mask).gradients(xs)):
        np.testing.assert_allclose(f, e["in"], rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scope", [dict(recurrence_scope="coupled"), dict(recurrence_scope="sparse_n", sparse_n=2)])
def test_filtered_traces(scope):
    xs = inputs()
    config = braintrace.ETraceConfig(trace_filter="kappa", kappa=0.5, **scope)
    mask = jnp.ones((N, N)) if "sparse_n" in scope else jnp.eye(N)
    for f, e in zip(library("synapse first", config, xs), Reference("synapse first", mask, 0.5).gradients(xs)):
        agree(f, e)


@pytest.mark.filterwarnings("ignore")
def test_the_trace_of_neighbours_is_laid_out_with_the_own_position_first():
    xs = inputs()
    learner = braintrace.compile(Model("synapse first"), braintrace.SnAp, xs[0], n=2)
    learner(xs[0])
    traces = {k: v["weight"] for k, v in learner.get_etrace_of(("w", "in")).items()}
    (trace,) = traces.values()
    assert trace.shape == (INPUTS, N, N * 2)
    first = trace.reshape(INPUTS, N, N, 2)
    assert jnp.all(first[:, :, 1:] == 0) and jnp.all(first[:, :, 0] != 0)
    (group,) = learner.graph.hidden_groups
    whole = group.full_jacobian(*transition_values(learner, group))  # V + (S,) + V + (S,)
    blocks = group.diagonal_jacobian(*transition_values(learner, group)).reshape(N, N, 2, N, 2)
    nu = group.snap.neighbours
    for p in range(N):
        np.testing.assert_allclose(blocks[p], whole[nu[p]][:, :, nu[p]], rtol=1e-12, atol=1e-15)


def transition_values(learner, group):
    rng = np.random.default_rng(0)
    olds = [jnp.asarray(rng.normal(size=s.value.shape)) for s in group.hidden_states]
    return olds, [jnp.asarray(rng.normal(size=v.aval.shape)) for v in group.transition_jaxpr_constvars]


CELLS = {
    "GRU": lambda: braintrace.nn.GRUCell(2, 3),
    "MGU": lambda: braintrace.nn.MGUCell(2, 3),
    "LSTM": lambda: braintrace.nn.LSTMCell(2, 3),
    "URLSTM": lambda: braintrace.nn.URLSTMCell(2, 3),  # with biases that the batch shares
    "conv": lambda: Convolved(),
}


class Convolved(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = braintrace.nn.Conv1d((4, 2), 2, 3)

    def init_state(self, batch_size=None, **_):
        self.h = brainstate.HiddenState(jnp.zeros((batch_size, 4, 2)))

    def update(self, x):
        self.h.value = jnp.tanh(0.5 * self.h.value + self.conv(self.h.value) + x.reshape(-1, 4, 2))
        return self.h.value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ceiling", [16777216, 2])
@pytest.mark.parametrize("name", CELLS)
def test_blocks_are_those_of_the_whole_jacobian(name, ceiling):
    """D at once, or in parts below the ceiling, is the diagonal of the Jacobian of the model's own step."""
    model = CELLS[name]()
    batch = 2
    brainstate.nn.init_all_states(model, batch_size=batch)
    x = jax.random.normal(jax.random.key(7), (batch, 8 if name == "conv" else 2))
    hidden = model.states(brainstate.HiddenState)
    for i, state in enumerate(hidden.values()):
        state.value = jax.random.normal(jax.random.key(i), state.value.shape)
    shape = next(iter(hidden.values())).value.shape

    def step():
        model(x)
        return jnp.stack([s.value for s in hidden.values()], -1)

    before = {k: s.value for k, s in hidden.items()}
    jacobians = brainstate.transform.jacrev(step, hidden)()  # V + (S,) + V each
    for k, state in hidden.items():
        state.value = before[k]
    executor = braintrace.ETraceVjpGraphExecutor(
        model, include_recurrent_mixing=True, snap_max_jacobian_elements=ceiling
    )
    executor.compile_graph(x)
    (D,) = executor.solve_h2w_h2h_jacobian(x)[4]
    size, S = int(np.prod(shape)), len(hidden)
    whole = jnp.stack([jacobians[k] for k in hidden], -1).reshape(size, S, size, S)
    expected = jnp.stack([whole[p, :, p] for p in range(size)]).reshape(*shape, S, S)
    order = [executor.graph.hidden_groups[0].hidden_states.index(s) for s in hidden.values()]
    np.testing.assert_allclose(D[..., order, :][..., order], expected, rtol=1e-9, atol=1e-12)

    executor = braintrace.ETraceVjpGraphExecutor(model, full_jacobian=True)
    executor.compile_graph(x)
    (full,) = executor.solve_h2w_h2h_jacobian(x)[4]
    full = full.reshape(size, S, size, S)[:, order][..., order]
    np.testing.assert_allclose(full, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_a_cell_with_parameters_that_are_shared_by_the_batch():
    """Its gates have biases of their own, which broadcast over the batch; all of it is back-propagation."""
    xs = jax.random.normal(jax.random.key(6), (4, 2, 2))
    brainstate.random.seed(0)
    learner = braintrace.compile(braintrace.nn.URLSTMCell(2, 3), braintrace.SnAp, xs[0], batch_size=2, n=2)
    found = learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).sum(), reduction="sum")
    brainstate.random.seed(0)
    model = braintrace.nn.URLSTMCell(2, 3)
    brainstate.nn.init_all_states(model, batch_size=2)

    def loss():
        return brainstate.transform.for_loop(lambda x: (model(x) ** 2).sum(), xs).sum()

    exact = brainstate.transform.grad(loss, model.states(brainstate.ParamState))()
    assert ("bias",) in exact
    for path in exact:
        for f, e in zip(jax.tree.leaves(found[path]), jax.tree.leaves(exact[path]), strict=True):
            np.testing.assert_allclose(f, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", ["d_rtrl", "ostl_recurrent", braintrace.SnAp, "uoro"])
@pytest.mark.filterwarnings("ignore")
def test_states_are_named_by_the_model(rule):
    learner = braintrace.compile(Model("gated"), rule, jnp.zeros(INPUTS))
    model = {k[1:] for k in learner.states() if k[0] == "model4compile"}
    assert model == {("w", "gate"), ("w", "w"), ("s", 0)}
    assert not any(isinstance(s, (brainstate.ParamState, brainstate.HiddenState)) for k, s in learner.states().items()
                   if k[0] != "model4compile")  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", ["d_rtrl", "ostl_recurrent", braintrace.SnAp])
def test_the_way_into_another_operation_is_no_mixing_tail(rule):
    """What a gate does through another product is held fixed for its trace, in every scope."""
    graph = braintrace.compile(Model("gated"), rule, jnp.zeros(INPUTS)).graph
    assert not graph.explain(kind=braintrace.DiagnosticKind.TRANSITION_TAIL_BOUNDED)
    assert graph.explain(kind=braintrace.DiagnosticKind.RELATION_PARTIAL_PATH)


class Stack(brainstate.nn.Module):
    def __init__(self, in_a_list):
        super().__init__()
        cells = [braintrace.nn.ValinaRNNCell(2, 2) for _ in range(2)]
        if in_a_list:
            self.cells = cells
        else:
            self.first, self.second = cells
        self.order = cells

    def update(self, x):
        return self.order[1](self.order[0](x))


def test_the_mixing_between_layers_of_a_list_is_not_recurrent():
    """As attributes, states of one shape that reach each other through a product are one group."""
    for in_a_list, number in [(True, 2), (False, 1)]:
        model = Stack(in_a_list)
        brainstate.nn.init_all_states(model)
        groups, _ = braintrace.find_hidden_groups_from_module(model, jnp.zeros(2), include_recurrent_mixing=True)
        assert len(groups) == number


def unanchored():
    return braintrace.register_primitive("no_anchor", lambda x, w: x @ w)


def anchored(adjacency=None):
    p = braintrace.register_primitive("own_anchor", lambda x, w: x @ w)
    return p.register_etp_rules(snap_anchor=lambda params: True, snap_adjacency=adjacency)


class Custom(Model):
    def __init__(self, primitive):
        super().__init__("recurrent")
        self.p = primitive

    def update(self, x):
        s, w = self.s[0].value, self.w
        self.s[0].value = 0.3 * s + jnp.tanh(braintrace.matmul(x, w["in"].value) + self.p.bind(s, w["rec"].value))
        return self.s[0].value ** 2


@pytest.mark.filterwarnings("ignore")
def test_operations_of_ones_own():
    xs = inputs()
    for n in (1, 2):
        with pytest.raises(NotImplementedError, match="no_anchor at 'w.rec'.*snap_anchor"):
            braintrace.compile(Custom(unanchored()), braintrace.SnAp, xs[0], n=n)
    conservative = braintrace.compile(Custom(anchored()), braintrace.SnAp, xs[0], n=2)
    snap = conservative.graph.hidden_groups[0].snap
    assert snap.conservative and snap.is_saturated and "own_anchor has no rule snap_adjacency" in snap.reason

    def ring(params, size):  # q is what p may depend on
        return np.roll(np.eye(size, dtype=bool), 1, axis=0)

    learner = braintrace.compile(Custom(anchored(ring)), braintrace.SnAp, xs[0], n=2)
    snap = learner.graph.hidden_groups[0].snap
    assert not snap.conservative
    np.testing.assert_array_equal(snap.neighbours, [[p, (p + 1) % N] for p in range(N)])
    with pytest.raises(ValueError, match=r"snap_adjacency of own_anchor.*\(4, 4\)"):
        braintrace.compile(Custom(anchored(lambda params, size: np.eye(3))), braintrace.SnAp, xs[0], n=2)


def test_refusals():
    x = jnp.zeros(INPUTS)
    with pytest.raises(braintrace.NotSupportedError, match="s.0, s.1.*256 elements.*4 neighbours.*=255"):
        braintrace.compile(Model("synapse first"), braintrace.SnAp, x, n=2, snap_max_jacobian_elements=255)
    for n, error in [(True, TypeError), (1.0, TypeError), (0, ValueError)]:
        with pytest.raises(error, match="sparse_n="):
            braintrace.SnAp(Model("vanilla"), n=n)
    with pytest.raises(TypeError, match="SnAp takes no config"):
        braintrace.SnAp(Model("vanilla"), config=braintrace.ETraceConfig())
    assert braintrace.SnAp(Model("vanilla"), n=1).config == braintrace.ETraceConfig(recurrence_scope="coupled")

    class Long(Model):
        def update(self, x):
            def body(s, _):
                return jnp.tanh(braintrace.matmul(s, self.w["rec"].value) + x[0]), None

            self.s[0].value = jax.lax.scan(body, self.s[0].value, None, length=20)[0]
            return self.s[0].value

    for rule in ("ostl_recurrent", braintrace.SnAp):
        with pytest.raises(NotImplementedError, match="long loop.*scan_unroll_limit"):
            braintrace.compile(Long("recurrent"), rule, x)


def test_a_group_without_recurrent_mixing_has_no_neighbours():
    class Leaky(Model):
        def __init__(self):
            super().__init__("recurrent")
            del self.w["rec"]

        def update(self, x):
            self.s[0].value = jnp.tanh(0.5 * self.s[0].value + braintrace.matmul(x, self.w["in"].value))
            return self.s[0].value

    xs = inputs()
    learner = braintrace.compile(Leaky(), braintrace.SnAp, xs[0], n=3)
    assert learner.graph.explain(kind=braintrace.DiagnosticKind.SNAP_PATTERN_DEGENERATE)
    assert learner.graph.hidden_groups[0].trace_state_width == 1
    plain = braintrace.compile(Leaky(), "d_rtrl", xs[0])
    found = [g.etrace_grad(xs, step_fn=lambda x, g=g: (g(x) * WEIGHT).sum())["w", "in"] for g in (learner, plain)]
    np.testing.assert_allclose(*found, rtol=1e-12)


class Populations(brainstate.nn.Module):
    """Two populations that drive each other through operations."""

    def __init__(self, n_e, n_i):
        super().__init__()
        self.sizes = n_e, n_i
        shapes = dict(w=(INPUTS, n_e), ei=(n_e, n_i), ie=(n_i, n_e))
        self.w = {k: brainstate.ParamState(jnp.asarray(weight(i, *s))) for i, (k, s) in enumerate(shapes.items())}

    def init_state(self, **_):
        self.e, self.i = (brainstate.HiddenState(jnp.zeros(n)) for n in self.sizes)

    def update(self, x):
        e, i = self.e.value, self.i.value
        mm = lambda k, x: braintrace.matmul(x, self.w[k].value)  # noqa: E731
        self.e.value = jnp.tanh(0.5 * e + mm("w", x) - mm("ie", i))
        self.i.value = jnp.tanh(0.5 * i + mm("ei", e))
        return self.e.value


@pytest.mark.filterwarnings("ignore:.*snap_pattern")
@pytest.mark.parametrize("rule, options", [(braintrace.SnAp, {"n": 2}), ("ostl_recurrent", {})])
def test_groups_that_a_rule_for_recurrent_mixing_keeps_apart(rule, options):
    with pytest.warns(braintrace.CompilationWarning, match=r"recurrent_mixing.*'e', 'i' depend on.*\(4,\), \(3,\)"):
        braintrace.compile(Populations(4, 3), rule, jnp.zeros(INPUTS), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", braintrace.CompilationWarning)
        warnings.filterwarnings("ignore", ".*snap_pattern")
        braintrace.compile(Populations(4, 4), rule, jnp.zeros(INPUTS), **options)
        braintrace.compile(Populations(4, 3), "d_rtrl", jnp.zeros(INPUTS))


class Gain(brainstate.nn.Module):
    """A gain, which knows of no batch and perhaps of fewer axes, in front of recurrent weights."""

    def __init__(self, shape):
        super().__init__()
        self.a = brainstate.ParamState(jnp.resize(jnp.array([0.5, -0.8, 1.2]), shape))
        self.u = braintrace.nn.Linear(3, 3, w_init=np.random.default_rng(0).normal(size=(3, 3)), b_init=None)

    def init_state(self, batch_size=None, **_):
        self.h = brainstate.HiddenState(jnp.zeros((2, 3) if batch_size is None else (batch_size, 2, 3)))

    def update(self, x):
        gained = braintrace.element_wise(self.a.value) * self.h.value
        self.h.value = jnp.tanh(x + 0.5 * self.h.value + self.u(gained))
        return self.h.value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(2, 3), (3,), ()])
@pytest.mark.parametrize("algorithm, options", [("ostl_recurrent", {}), (braintrace.SnAp, {"n": 1})])
def test_an_operation_without_a_batch_axis_in_front_of_recurrent_weights(algorithm, options, shape):
    xs = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2, 2, 3)))

    def gradients(xs, **how):
        learner = braintrace.compile(Gain(shape), algorithm, xs[0], **options, **how)
        grads = learner.etrace_grad(xs, step_fn=lambda x: (learner(x) ** 2).sum(), reduction="sum")
        return {path: np.asarray(jax.tree.leaves(g)[0]) for path, g in grads.items()}

    found, samples = gradients(xs, batch_size=2), [gradients(xs[:, b]) for b in range(2)]
    for path, g in found.items():
        np.testing.assert_allclose(g, samples[0][path] + samples[1][path], rtol=1e-5)
