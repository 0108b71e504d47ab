"""`compare`: its BPTT against programs written by hand, its rules against `etrace_grad`, and what it leaves behind."""

import re
import sys

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from helpers import PRECISIONS, assert_close

import braintrace
from braintrace import compare

pytestmark = pytest.mark.usefixtures("time_step")

STEPS, N_IN, N, N_OUT = 6, 2, 3, 2


class Gated(brainstate.nn.Module):
    """A leaky cell with a recurrent weight, and a plain readout."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(3)
        self.w = brainstate.ParamState(jnp.asarray(0.7 * rng.normal(size=(N_IN + N, N))))
        self.out = brainstate.ParamState({"v": jnp.asarray(rng.normal(size=(N, N_OUT)))})

    def init_state(self, batch_size=None, **_):
        self.h = models.zeros(N, batch_size)

    def update(self, x):
        xh = jnp.concatenate([x, self.h.value], -1)
        self.h.value = 0.8 * self.h.value + 0.5 * jnp.tanh(braintrace.matmul(xh, self.w.value))
        return self.h.value @ self.out.value["v"]


def by_hand(ws, vs, xs, targets):
    """Losses of `Gated` from zeros, with own parameters for each step."""

    def step(h, item):
        w, v, x, target = item
        h = 0.8 * h + 0.5 * jnp.tanh(jnp.concatenate([x, h], -1) @ w)
        return h, ((h @ v - target) ** 2).sum()

    return jax.lax.scan(step, jnp.zeros((*xs.shape[1:-1], N), xs.dtype), (ws, vs, xs, targets))[1]


class Turning(brainstate.nn.Module):
    """Complex weights and states; how fast the states turn depends on the input."""

    def __init__(self):
        super().__init__()
        self.w = brainstate.ParamState(jnp.ones((N_IN, N_OUT), jnp.complex64))

    def init_state(self, batch_size=None, **_):
        self.h = brainstate.HiddenState(jnp.zeros((batch_size, N_OUT), jnp.complex64))

    def update(self, x):
        turn = 0.9 * jnp.exp(1j * x.sum(-1, keepdims=True))
        self.h.value = turn * self.h.value + braintrace.matmul((1 + 1j) * x, self.w.value)
        return self.h.value.real


def data(steps=STEPS, batch=(), n_in=N_IN, n_out=N_OUT, seed=0):
    rng = np.random.default_rng(seed)
    dtype = brainstate.environ.dftype()
    xs, ys = rng.normal(size=(steps, *batch, n_in)), rng.normal(size=(steps, *batch, n_out))
    return jnp.asarray(xs.astype(dtype)), jnp.asarray(ys.astype(dtype))


def squares(call, x, target):
    return ((call(x) - target) ** 2).sum()


def leaky(n=N, n_in=N_IN):
    """Position-wise, no recurrent weights: D_RTRL is exact. `LeakyRateReadout` is its own hidden state."""
    return braintrace.nn.LeakyRateReadout(n_in, n, tau=5 * u.ms)


def real(x):
    return np.stack([np.real(x), np.imag(x)], -1)


def cosines(comparison, label):
    return np.array([a.cosine for a in comparison.agreement[label].values()])


# -- BPTT


@pytest.mark.parametrize("batch", [(), (2,)])
def test_bptt_is_a_scan_written_by_hand(batch):
    with PRECISIONS["float64"]():
        model, (xs, targets) = Gated(), data(batch=batch)
        mask = jnp.array([1.0, 0.0, 2.0, 0.0, 0.5, 1.0])
        w, v = model.w.value, model.out.value["v"]

        def mean(w, v):
            ws, vs = (jnp.broadcast_to(p, (STEPS, *p.shape)) for p in (w, v))
            return (by_hand(ws, vs, xs, targets) * mask).sum() / 4.5

        size = batch[0] if batch else None
        found = compare(model, xs, targets, step_fn=squares, rules="d_rtrl", mask=mask, batch_size=size)
        exact = found.gradients["BPTT"]
        expected = jax.grad(mean, (0, 1))(w, v)
        assert_close(exact, {("out",): {"v": expected[1]}, ("w",): expected[0]}, 1e-12)
        moved = 1e-5 * jnp.zeros_like(w).at[3, 1].set(1.0)
        difference = (mean(w + moved, v) - mean(w - moved, v)) / 2e-5
        np.testing.assert_allclose(exact["w",][3, 1], difference, rtol=1e-7)


@pytest.mark.parametrize("lags, at", [(4, [3, 5]), ([0, 2, 4], None)])
def test_bptt_by_lag_is_the_gradient_by_parameters_of_single_steps(lags, at):
    with PRECISIONS["float64"]():
        model, (xs, targets) = Gated(), data()
        ws, vs = (jnp.broadcast_to(p, (STEPS, *p.shape)) for p in (model.w.value, model.out.value["v"]))
        rows = range(lags) if isinstance(lags, int) else lags
        gradients = jax.jit(jax.jacobian(by_hand, (0, 1)))(ws, vs, xs, targets)  # axes: loss, cause, weight
        ends = [5] if at is None else [at] if isinstance(at, int) else at
        bins = list(zip([-1, *rows], rows))
        summed = [sum(g[t, t - high : t - low].sum(0) for t in ends) for g in gradients for low, high in bins]
        w, v = jnp.stack(summed[: len(bins)]), jnp.stack(summed[len(bins) :])
        found = compare(model, xs, targets, step_fn=squares, rules="d_rtrl", lags=lags, at=at)
        assert_close(found.gradients_by_lag["BPTT"], {("out",): {"v": v}, ("w",): w}, 1e-12)
        assert found.lags == tuple(rows)


# -- rules

EXACT = {
    "leaky": lambda: leaky(N_OUT),
    "LRU": lambda: braintrace.nn.LRUCell(N_IN, N),  # complex states
    "LIF": lambda: models.Net(models.Spiking(N_IN, N_OUT, recurrent=False)),  # a parameter in mS
    "dropout": lambda: brainstate.nn.Sequential(brainstate.nn.Dropout(0.5), leaky(N_OUT)),
    "complex": Turning,
    "gates": lambda: models.Net(models.Leak(N_IN, N_OUT)),
}


@pytest.mark.parametrize("name", EXACT)
def test_d_rtrl_equals_bptt_at_every_lag_where_it_is_exact(name):
    model, (xs, targets) = models.randomise(EXACT[name]()), data(batch=(2,))
    with brainstate.environ.context(fit=True):
        found = compare(model, 3 * xs, targets, step_fn=squares, rules="d_rtrl", lags=4, batch_size=2)
    np.testing.assert_allclose([a[:2] for a in found.agreement["d_rtrl"].values()], 1, rtol=1e-4)
    for by_label in (found.gradients, found.gradients_by_lag):
        assert_close(*(jax.tree.map(real, by_label[label]) for label in ("d_rtrl", "BPTT")), 1e-4)
    assert not np.isnan(found.by_lag["d_rtrl"]["all"].cosine[0])
    for path, profile in found.by_lag["d_rtrl"].items():
        reached = ~np.isnan(profile.cosine)  # a parameter of the output has no past
        np.testing.assert_allclose(profile.cosine[reached], 1, rtol=1e-3, err_msg=str(path))
        np.testing.assert_allclose(profile.norm_ratio[reached], 1, rtol=1e-3, err_msg=str(path))


def test_a_bad_decay_is_seen():
    """One input early, the loss late: a decay of 0.1 has forgotten most of what the leaky unit keeps."""
    xs, targets = data(steps=12)
    found = compare(leaky(N_OUT), xs, targets, step_fn=squares, decays=[0.05, 0.8], rules=["d_rtrl"], lags=8)
    assert found.agreement["pp_prop 0.05"]["all"].cosine < 0.9 < found.agreement["d_rtrl"]["all"].cosine
    far = found.by_lag["pp_prop 0.05"]["all"].norm_ratio[5:], found.by_lag["pp_prop 0.8"]["all"].norm_ratio[5:]
    assert (far[0] < 0.1 * far[1]).all()
    assert found.best["all"] == "d_rtrl"
    found = compare(leaky(N_OUT), xs, targets, step_fn=squares, decays=[0.05, 0.8])
    assert found.best["all"] == "pp_prop 0.8"


@pytest.mark.parametrize("rule, options", [("pp_prop", {"decay_or_rank": 0.7}), ("uoro", {})])
def test_rules_are_etrace_grad_and_lags_add_up(rule, options):
    xs, targets = data()
    mask = jnp.arange(STEPS) == STEPS - 1
    found = compare(Gated(), xs, targets, step_fn=squares, rules={"it": (rule, options)}, mask=mask, lags=STEPS)
    learner = braintrace.compile(Gated(), rule, xs[0], **options)
    expected = learner.etrace_grad(xs, targets, step_fn=lambda *s: squares(learner, *s), mask=mask)
    assert_close(found.gradients["it"], dict(expected))
    for label in ("BPTT", "it") if rule != "uoro" else ("BPTT",):
        summed = jax.tree.map(lambda x: x.sum(0), found.gradients_by_lag[label])
        assert_close(summed, found.gradients[label], 1e-4, label)
    assert np.allclose([a.cosine[0] for a in found.by_lag["it"].values()], 1)  # the current step is exact


def test_mapped_models_and_learners_are_as_batched_ones():
    xs, targets = data(batch=(2,))
    options = {"step_fn": squares, "decays": [0.5], "lags": 2, "batch_size": 2}
    batched = compare(Gated(), xs, targets, **options)
    mapped = compare(Gated(), xs, targets, vmap=True, **options)
    learner = braintrace.compile(Gated(), "pp_prop", xs[0], batch_size=2, vmap=True, decay_or_rank=0.5)
    alone = compare(learner, xs, targets, step_fn=squares, lags=2)
    assert alone.rules == ["pp_prop"]
    pairs = [(batched, mapped, label, label) for label in batched.gradients]
    pairs += [(batched, alone, "BPTT", "BPTT"), (batched, alone, "pp_prop 0.5", "pp_prop")]
    for one, other, a, b in pairs:
        assert_close(other.gradients[b], one.gradients[a])
        assert_close(other.gradients_by_lag[b], one.gradients_by_lag[a], 1e-4)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_function_of_the_slices_alone_calls_the_learner(mapped):
    """As for `etrace_grad`: BPTT then runs the plain model where the function calls the learner."""
    xs, targets = data(batch=(2,))
    learner = braintrace.compile(Gated(), "d_rtrl", xs[0], batch_size=2, vmap=mapped)
    options = {"lags": 2}
    alone = compare(learner, xs, targets, step_fn=lambda x, y: squares(learner, x, y), **options)
    passed = compare(learner, xs, targets, step_fn=squares, **options)
    for label in passed.gradients:
        assert_close(alone.gradients[label], passed.gradients[label])
        assert_close(alone.gradients_by_lag[label], passed.gradients_by_lag[label], 1e-4)
    assert min(cosines(alone, "D_RTRL")) < 1 - 1e-6  # recurrent weights: the two are not the same run


def test_mapped_runs_draw_the_same_keys():
    model = brainstate.nn.Sequential(brainstate.nn.Dropout(0.5), leaky(N_OUT))
    xs, targets = data(batch=(4,))
    with brainstate.environ.context(fit=True):
        found = compare(model, xs, targets, step_fn=squares, rules="d_rtrl", batch_size=4, vmap=True)
    np.testing.assert_allclose(cosines(found, "d_rtrl"), 1, rtol=1e-5)


def test_a_learner_is_compared_from_where_its_model_stands():
    xs, targets = data(steps=9)
    learner = braintrace.compile(Gated(), "d_rtrl", xs[0])
    learner.etrace_evolve(xs[:3])
    start = learner.model4compile.h.value
    found = compare(learner, xs[3:], targets[3:], step_fn=squares)
    ws, vs = (lambda m: (m.w.value, m.out.value["v"]))(learner.model4compile)
    step = lambda h, x: 0.8 * h + 0.5 * jnp.tanh(jnp.concatenate([x, h]) @ ws)  # noqa: E731

    def mean(v):
        hs = jax.lax.scan(lambda h, x: (step(h, x),) * 2, start, xs[3:])[1]
        return ((hs @ v - targets[3:]) ** 2).sum() / 6

    for label in ("BPTT", "D_RTRL"):
        np.testing.assert_allclose(found.gradients[label]["out",]["v"], jax.grad(mean)(vs), rtol=1e-4)


def test_losses_may_read_states_and_parameters():
    xs, targets = data()
    model = leaky(N_OUT)

    def loss(call, x, target):
        out = squares(call, x, target)
        return out + (model.r.value**2).mean() + 0.1 * (model.W.value**2).sum()

    found = compare(model, xs, targets, step_fn=loss, rules="d_rtrl")
    np.testing.assert_allclose(cosines(found, "d_rtrl"), 1, rtol=1e-5)
    plain = compare(model, xs, targets, step_fn=squares, rules="d_rtrl")
    assert not np.allclose(plain.gradients["BPTT"]["W",], found.gradients["BPTT"]["W",])


# -- what is left behind


def everything(*roots):
    found = {}
    for root in roots:
        for path, state in root.states().items():
            found[path] = (state, jax.tree.map(np.asarray, state.value))
    key = np.asarray(jax.random.key_data(brainstate.random.DEFAULT.value))
    return found | {"random": (brainstate.random.DEFAULT, key)}


def assert_as_before(before, after):
    assert before.keys() == after.keys()
    for path, (state, value) in before.items():
        assert after[path][0] is state, path
        jax.tree.map(np.testing.assert_array_equal, value, after[path][1])


def noisy(model, seen):
    """A loss that draws, and writes to a state that is not the model's."""

    def loss(call, x, target):
        seen.value = seen.value + 1
        return squares(call, x + brainstate.random.random(x.shape[-1:]), target)

    return loss


@pytest.mark.parametrize("vmap, lags", [(False, 2), (True, None)])
def test_all_states_are_as_before(vmap, lags):
    xs, targets = data(batch=(2,))
    seen = brainstate.ShortTermState(jnp.zeros(()))
    learner = braintrace.compile(Gated(), "d_rtrl", xs[0], batch_size=2, vmap=vmap)
    learner.etrace_evolve(xs)
    model = learner._per_sample.model4compile
    before = everything(learner)
    compare(learner, xs, targets, step_fn=noisy(model, seen), lags=lags)
    assert_as_before(before, everything(learner))
    compare(model, xs, targets, step_fn=noisy(model, seen), decays=[0.5], batch_size=2, vmap=vmap)
    assert_as_before(before, everything(learner))
    assert seen.value == 0


def test_a_model_that_was_never_initialised_is_so_afterwards():
    model = brainstate.nn.Sequential(braintrace.nn.LSTMCell(N_IN, N), braintrace.nn.Linear(N, N_OUT))
    before = vars(model.layers[0]).keys() | set()
    compare(model, *data(), step_fn=squares, decays=[0.5])
    assert vars(model.layers[0]).keys() == before and not model.states(brainstate.HiddenState)


@pytest.mark.parametrize("of_learner", [False, True])
def test_bad_input_leaves_all_states(of_learner):
    xs, targets = data()
    learner = braintrace.compile(Gated(), "d_rtrl", xs[0])
    learner.etrace_evolve(xs)
    before = everything(learner)

    def fails(call, x, target):
        squares(call, x, target)
        raise KeyError("x")

    rules = {} if of_learner else {"rules": "d_rtrl"}
    subject = learner if of_learner else learner.model4compile
    for step_fn, error in [(fails, KeyError), (lambda call, x, y: call(x), ValueError)]:
        with pytest.raises(error):
            compare(subject, xs, targets, step_fn=step_fn, lags=2, **rules)
        assert_as_before(before, everything(learner))


# -- arguments

RULES = [
    ("d_rtrl", ["d_rtrl"]),
    (("pp_prop", {"decay_or_rank": 0.5}), ["pp_prop(decay_or_rank=0.5)"]),
    ([braintrace.D_RTRL, ("pp_prop", {"decay_or_rank": (0.5, 0.9)})], ["D_RTRL", "pp_prop(decay_or_rank=(0.5, 0.9))"]),
    ({"a": "d_rtrl", "b": (braintrace.EProp, {"kappa_filter_decay": 0.5})}, ["a", "b"]),
    (braintrace.ETraceConfig("io_factorized", decay=0.9), ["ETraceConfig"]),
    ({1: "d_rtrl"}, [1]),
]


@pytest.mark.parametrize("rules, labels", RULES)
def test_forms_of_rules(rules, labels):
    found = compare(Gated(), *data(steps=2), step_fn=squares, rules=rules)
    assert found.rules == labels and [*found.gradients] == ["BPTT", *labels]
    assert all(str(label) in str(found) for label in labels)


def with_learner(**options):
    learner = braintrace.compile(Gated(), "d_rtrl", jnp.zeros(N_IN))
    return compare(learner, *data(), **options)


def with_model(step_fn=squares, rules="d_rtrl", **options):
    return compare(Gated(), *data(), step_fn=step_fn, rules=rules, **options)


ERRORS = [
    (lambda: with_learner(step_fn=lambda x, y: x.sum()), ValueError, "called neither"),
    (lambda: with_model(lambda x, y: x.sum()), TypeError, r"takes \(x, y\).*lambda call, x, y"),
    (lambda: with_model(lambda x, y, z, w: x), TypeError, "missing a required argument: 'w'"),
    (lambda: with_model(3), TypeError, "must be a function, got 3"),
    (lambda: with_model(lambda call, x, y: (x**2).sum()), ValueError, "called neither"),
    (lambda: with_model(lambda call, x, y: call(x)), ValueError, "loss of shape"),
    (lambda: with_model(lambda call, x, y: call(braintrace.SingleStepData(x)).sum()), TypeError, "bare arrays"),
    (lambda: with_learner(step_fn=squares, decays=[0.5]), TypeError, "learner.model4compile"),
    (lambda: with_model(rules=None), ValueError, "There is no rule to compare"),
    (lambda: with_model(rules="d_rtrll"), ValueError, "Unknown algorithm 'd_rtrll'"),
    (lambda: with_model(rules=["d_rtrl", "d_rtrl"]), ValueError, "'d_rtrl' is taken"),
    (lambda: with_model(rules={"BPTT": "d_rtrl"}), ValueError, "'BPTT' is taken"),
    (lambda: with_model(decays=[1.5]), ValueError, "1.5"),
    (lambda: with_model(decays=1.5), ValueError, "1.5"),
    (lambda: with_model(rules=3), TypeError, "got int"),
    (lambda: with_model(rules="dni"), RuntimeError, "the rule is .'dni', {'synthesizer'"),
    (lambda: with_model(lags=2.0), ValueError, "got 2.0"),
    (lambda: with_model(batch_size="4"), TypeError, "batch_size must be an int or None, got '4'"),
    (lambda: with_model(lambda call, x, y: (call(x).sum(), y)), TypeError, "without a unit, got tuple."),
    (lambda: with_model(lags=7), ValueError, "Lags up to 6 need a loss at the steps 6 to 5 of 6, and at is 5"),
    (lambda: with_model(lags=0), ValueError, "got 0"),
    (lambda: with_model(lags=[2, 1]), ValueError, r"got \[2, 1\]"),
    (lambda: with_model(lags=3, at=1), ValueError, "at is 1"),
    (lambda: with_model(at=1), ValueError, "Pass lags too"),
    (lambda: with_model(lags=2, mask=jnp.zeros(STEPS)), ValueError, "gives no loss a weight"),
    (lambda: with_model(mask=jnp.zeros(3)), ValueError, "mask must have shape"),
    (lambda: with_model(vmap=True), ValueError, "pass batch_size"),
    (lambda: with_model(batch_size=5), ValueError, "batch_size=5"),
    (lambda: with_model().by_lag, ValueError, "Pass lags to compare"),
    (lambda: compare(3, *data(), step_fn=squares), TypeError, "got int"),
    (lambda: compare(Gated(), step_fn=squares, rules="d_rtrl"), ValueError, "at least one sequence"),
    (lambda: compare(braintrace.D_RTRL(Gated()), *data(), step_fn=squares), ValueError, "not compiled"),
    (lambda: brainstate.transform.jit(with_model)(), ValueError, "outside of jit"),
]


@pytest.mark.parametrize("call, error, message", ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_error_names_the_rule():
    with pytest.raises(ValueError) as caught:
        with_model(rules={"mine": ("pp_prop", {"decay_or_rank": 2.0})})
    assert caught.value.__notes__ == ["This is the rule 'mine'."]


# -- the result


def small(**options):
    exact = {("a",): jnp.array([3.0, 4.0]), ("b", "w"): {"w": jnp.zeros(2) * u.mS}, ("c",): jnp.array([1.0 + 1.0j])}
    ours = {("a",): jnp.array([4.0, -3.0]), ("b", "w"): {"w": jnp.ones(2) * u.mS}, ("c",): jnp.array([2.0 + 0.0j])}
    zero = jax.tree.map(jnp.zeros_like, ours)
    return braintrace.Comparison({"BPTT": exact, "ours": ours, "zero": zero, "half": exact}, **options)


def test_numbers():
    found = small().agreement
    nan = np.nan
    expected = {("a",): (0, 1, 0.5), ("b", "w"): (nan, nan, nan), ("c",): (0.5**0.5, 2**0.5, 0.5)}
    expected["all"] = (2 / (27 * 31) ** 0.5, (31 / 27) ** 0.5, 0.5)
    for path, numbers in expected.items():
        np.testing.assert_allclose(found["ours"][path], numbers, atol=1e-7)
    np.testing.assert_array_equal(found["zero"]["a",], (0, 0, 0))
    best = {("a",): "half", ("b", "w"): None, ("c",): "half", "all": "half"}
    assert small().best == best


def test_text_and_html():
    text = str(small())
    assert re.search(r"b\.w +ours +- +- +-\n", text) and re.search(r"a +half +1\.0000 +1\.0000 +1\.0000 +\*", text)
    assert len(small().table) == 12 and small().table[0][:2] == (("a",), "ours")
    assert repr(small()) == "Comparison(rules=['ours', 'zero', 'half'], parameters=3, lags=0)"
    shown = braintrace.Comparison({"BPTT": small().gradients["BPTT"], "<b>": small().gradients["half"]})._repr_html_()
    assert "<td>&lt;b&gt;</td>" in shown and shown.count("<table>") == 1
    found = with_model(lags=3)
    assert "Cosine by lag" in str(found) and found._repr_html_().count("<table>") == 2


def test_plots(monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ax = with_model(lags=3).plot(parameter=("w",))
    assert len(ax.lines) == 1 and ax.get_title() == "w"
    other = pyplot.subplots()[1]
    assert small().plot(other, quantity="norm_ratio") is other and len(other.patches) == 12
    for options, what in [({"quantity": "norm"}, "norm"), ({"parameter": ("x",)}, "path or 'all'")]:
        with pytest.raises(ValueError, match=what):
            small().plot(**options)
    pyplot.close("all")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"braintrace\[plot\]"):
        small().plot()
