"""Scripts written for older versions: positional arguments, arguments that have gone, whole training loops."""

import inspect
import warnings

import brainevent
import brainstate
import braintools
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate import HiddenState, ParamState
from brainstate.transform import for_loop, grad, jit
from helpers import assert_close

import braintrace
from braintrace import D_RTRL, ES_D_RTRL, EProp, IODimVjpAlgorithm, OSTLFeedforward, ParamDimVjpAlgorithm, pp_prop

pytestmark = pytest.mark.filterwarnings("ignore:.*relation_")

XS = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2, 3)), jnp.float32)
TARGETS = jnp.asarray(np.random.default_rng(1).standard_normal((5, 2, 4)), jnp.float32)

IO = ["decay_or_rank", "name", "vjp_method", "fast_solve", "control_flow", "config", "random_feedback_key"]
PARAM = ["name", "vjp_method", "fast_solve", "trace_dtype", "chunked_trace", "control_flow", "config"]
PARAM += ["random_feedback_key", "snap_max_jacobian_elements"]
WINDOWS = ["trace_dtype", "chunked_trace", "control_flow", "snap_max_jacobian_elements"]
UORO = ["name", "vjp_method", "fast_solve", "control_flow", "projection_key", "projection_eps"]
UORO += ["random_feedback_key", "snap_max_jacobian_elements"]
SIGNATURES = {  # the arguments after the model, in this order
    pp_prop: IO,
    ES_D_RTRL: IO,
    IODimVjpAlgorithm: IO,
    D_RTRL: PARAM,
    ParamDimVjpAlgorithm: PARAM,
    EProp: ["feedback", "kappa_filter_decay", "random_feedback_key", "name", "vjp_method", "fast_solve"],
    OSTLFeedforward: ["decay_or_rank", "name"],
    braintrace.OSTLRecurrent: PARAM,
    braintrace.SnAp: ["n", "name", "vjp_method", "fast_solve", "snap_max_jacobian_elements"],
    braintrace.ThreeFactor: ["name", "vjp_method", "modulator", "fast_solve", *WINDOWS],
    braintrace.DNI: ["synthesizer", "name", "vjp_method", "fast_solve", *WINDOWS],
    braintrace.RandomProjectionVjpAlgorithm: [*UORO[:4], "config", *UORO[4:]],
    braintrace.UORO: UORO,
    braintrace.ETraceVjpAlgorithm: [
        *["name", "vjp_method", "control_flow", "config"],
        *["random_feedback_key", "snap_max_jacobian_elements"],
    ],
    braintrace.ETraceAlgorithm: ["graph_executor", "name"],
}


@pytest.mark.parametrize("rule", SIGNATURES)
def test_positional_order(rule):
    parameters = list(inspect.signature(rule.__init__).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert names == ["model", *SIGNATURES[rule]]


@pytest.mark.parametrize("rule", [pp_prop, ES_D_RTRL, IODimVjpAlgorithm])
def test_positional_arguments(rule):
    learner = rule(Net(), 19, "name", "multi-step", False)
    found = learner.decay, learner.name, learner.vjp_method, learner.fast_solve
    assert found == (0.9, "name", "multi-step", False)
    assert rule(Net(), decay_or_rank=3).decay == 0.5


class Net(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        brainstate.random.seed(3)
        self.cell = braintrace.nn.GRUCell(3, 4)
        self.out = braintrace.nn.Linear(4, 4)

    def update(self, x):
        return self.out(self.cell(x))


def trained(make, init_all=True):
    """The training step of an older script: compile by hand, sum gradients over time, update once."""
    net = Net()
    weights = net.states(ParamState)
    optimizer = braintools.optim.SGD(0.1)
    optimizer.register_trainable_weights(weights)

    @jit
    def train(xs, targets):
        brainstate.nn.init_all_states(net, batch_size=2)
        learner = make(net)
        learner.compile_graph(xs[0])

        def step(before, item):
            x, target = item
            loss = lambda: ((learner(x) - target) ** 2).mean()  # noqa: E731
            grads, value = grad(loss, weights, return_value=True)()
            return jax.tree.map(jnp.add, before, grads), value

        grads, losses = brainstate.transform.scan(
            step, jax.tree.map(jnp.zeros_like, weights.to_dict_values()), (xs, targets)
        )
        optimizer.update(grads)
        return losses

    losses = [train(XS, TARGETS).mean() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    return {path: state.value for path, state in weights.items()}


MODE = brainstate.mixin.Batching()
IO_WAYS = {
    "keyword": lambda net: pp_prop(net, decay_or_rank=0.9),
    "rank": lambda net: pp_prop(net, 19),
    "pair": lambda net: IODimVjpAlgorithm(net, (0.9, 0.9)),
    "list": lambda net: IODimVjpAlgorithm(net, [0.9, 19]),
    "ES_D_RTRL": lambda net: ES_D_RTRL(net, 0.9, vjp_method="single-step"),
    "all in order": lambda net: ES_D_RTRL(net, 0.9, "name", "single-step", True, None, None, None),
    "mode": lambda net: pp_prop(net, 0.9, mode=MODE),
    "mode and more": lambda net: IODimVjpAlgorithm(net, 0.9, vjp_method="single-step", fast_solve=False, mode=MODE),
}
PARAM_WAYS = {
    "alone": lambda net: D_RTRL(net),
    "ParamDimVjpAlgorithm": lambda net: ParamDimVjpAlgorithm(net, vjp_method="single-step"),
    "all in order": lambda net: D_RTRL(net, "name", "single-step", True, None, True, None, None, None),
    "mode": lambda net: D_RTRL(net, mode=MODE),
    "without chunks": lambda net: ParamDimVjpAlgorithm(net, fast_solve=False, chunked_trace=False, mode=MODE),
    "EProp": lambda net: EProp(net, "symmetric", 0.0, None, "name", "single-step", True),
    "EProp, mode": lambda net: EProp(net, kappa_filter_decay=0, mode=MODE),
}


def same_way(ways, way):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = trained(ways[way])
    told = [w for w in caught if issubclass(w.category, DeprecationWarning) and "mode" in str(w.message)]
    assert bool(told) == ("mode" in way or way == "without chunks")
    return found


@pytest.fixture(scope="module", params=[IO_WAYS, PARAM_WAYS], ids=["pp_prop", "D_RTRL"])
def family(request):
    first = next(iter(request.param))
    return request.param, trained(request.param[first])


@pytest.mark.parametrize("index", range(1, max(len(IO_WAYS), len(PARAM_WAYS))))
def test_a_training_loop(family, index):
    ways, expected = family
    if index < len(ways):
        assert_close(same_way(ways, list(ways)[index]), expected, 1e-6)


def test_families_differ():
    """Negative control."""
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(trained(IO_WAYS["keyword"]), trained(PARAM_WAYS["alone"]), 1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda net: pp_prop(net, 0.9, modus=1),
        lambda net: D_RTRL(net, modus=1),
        lambda net: EProp(net, modus=1),
        lambda net: OSTLFeedforward(net, modus=1),
        lambda net: D_RTRL(net, decay_or_rank=0.9),
    ],
)
def test_other_arguments_are_refused(make):
    with pytest.raises(TypeError, match="modus|decay_or_rank"):
        make(Net())


# -- operations


class Leaky(brainstate.nn.Module):
    """`h <- sigmoid(leak) h + x W` with W stored sparsely; `leak` and `product` are the operations in question."""

    def __init__(self, leak, product):
        super().__init__()
        dense = jnp.array([[0.3, 0.0, -0.5], [0.0, 0.7, 0.2]])
        self.matrix = brainevent.CSR.fromdense(dense)
        self.w, self.leak = ParamState(self.matrix.data), ParamState(jnp.array([0.1, -0.4, 0.6]))
        self.h = HiddenState(jnp.zeros(3))
        self._leak, self._product = leak, product

    def update(self, x):
        self.h.value = self._leak(self.leak.value) * self.h.value + self._product(x, self.w.value, self.matrix)
        return self.h.value


LEAKS = [
    lambda w: braintrace.element_wise(w, weight_fn=jax.nn.sigmoid),
    lambda w: braintrace.element_wise(w, jax.nn.sigmoid),
    lambda w: braintrace.element_wise(w, fn=jax.nn.sigmoid),
    lambda w: braintrace.element_wise(weight=w, fn=jax.nn.sigmoid),
]
PRODUCTS = [
    lambda x, w, matrix: braintrace.sparse_matmul(x, w, sparse_mat=matrix),
    lambda x, w, matrix: braintrace.sparse_matmul(x, weight_data=w, sparse_mat=matrix),
    lambda x, w, matrix: braintrace.sparse_matmul(x=x, weight=w, sparse_mat=matrix, bias=None),
]


def operated(leak, product):
    model = Leaky(leak, product)
    learner = pp_prop(model, 0.9)
    learner.compile_graph(XS[0, 0, :2])
    assert len(learner.graph.hidden_param_op_relations) == 2
    return dict(for_loop(grad(lambda x: learner(x).sum(), learner.param_states), XS[:, 0, :2]))


@pytest.mark.parametrize(
    "leak, product", [*((leak, PRODUCTS[0]) for leak in LEAKS[1:]), *((LEAKS[0], p) for p in PRODUCTS[1:])]
)
def test_arguments_of_operations(leak, product):
    assert_close(operated(leak, product), operated(LEAKS[0], PRODUCTS[0]), 1e-6)
