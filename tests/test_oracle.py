"""The oracle itself, before it judges anything: no test here touches the library."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from helpers import DRTRL, PRECISIONS, Oracle, PPProp, assert_close, total
from models import CELLS, MORE_CELLS, READOUTS, SMALL, SPIKING, STACKED

pytestmark = pytest.mark.usefixtures("time_step")

ALL = CELLS | MORE_CELLS | SPIKING | STACKED | SMALL
RULES = [PPProp(0.9), DRTRL()]


def make(model, readout="plain", batch=None, steps=4):
    net = models.randomise(models.build(model, READOUTS.get(readout), models.twin, batch))
    return Oracle(net, models.squares), models.inputs(steps, batch, models.N_OUT if readout else models.N)


@pytest.mark.parametrize("model", ALL)
def test_one_step_is_backpropagation(model):
    oracle, sequence = make(ALL[model], steps=1)
    exact = oracle.bptt(sequence)[1]
    for rule in RULES:
        assert_close(total(oracle.online(rule, sequence)[0]), exact)


# One group; every trainable map feeds it directly and position by position.
EXACT = ["ModelA", "ModelB", "Chain", "ReadsOld", "Masked", "Leak"]
CUT = EXACT + ["ModelC", "vanilla", "lstm", "urlstm", *SPIKING]


@pytest.mark.parametrize("model", CUT)
def test_d_rtrl_is_bptt_with_cut_recurrence(model):
    oracle, sequence = make(ALL[model], batch=2)
    steps, _ = oracle.online(DRTRL(), sequence)
    assert_close(total(steps), oracle.bptt(sequence, cut=True)[1], tol=2e-5)
    if model in EXACT:
        exact = oracle.bptt(sequence)[1]
        for k in (1, 2):
            steps, _ = oracle.windows(DRTRL(), sequence, k)
            assert_close(total(steps), exact, tol=2e-5, what=f"windows of {k}")
        assert_close(total(oracle.online(DRTRL(), sequence)[0]), exact, tol=2e-5)


@pytest.mark.parametrize("model", ["ModelA", "lstm", "gru-lstm", "ReadsOld", "Beside"])
def test_finite_differences(model):
    with PRECISIONS["float64"]():
        oracle, sequence = make(ALL[model], "leaky", batch=2, steps=3)
        params, _ = oracle.values()
        gradient = oracle.bptt(sequence)[1]
        rng = np.random.default_rng(2)
        for _ in range(3):
            way = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape)), params)
            moved = [jax.tree.map(lambda p, d: p + e * d, params, way) for e in (1e-5, -1e-5)]
            up, down = (oracle.bptt(sequence, params=p)[0] for p in moved)
            slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(way)))
            np.testing.assert_allclose((up - down) / 2e-5, slope, rtol=1e-7)


MEANING = {
    "pp_prop": lambda decay: PPProp(*np.atleast_1d(decay)),
    "D_RTRL": lambda _: DRTRL(),
    "EProp": DRTRL,
}


@pytest.mark.parametrize("row", models.PUBLISHED)
def test_published_numbers(row):
    model, rule, knob, step = row
    oracle = Oracle(models.published(model), models.published_loss)
    steps, _ = oracle.online(MEANING[rule](knob), [(x,) for x in models.PUBLISHED_INPUTS])
    models.assert_published(steps[step][1], *models.PUBLISHED[row])


@pytest.mark.parametrize("other", [PPProp(0.8), PPProp(0.9, 0.8), DRTRL(), DRTRL(0.3)])
def test_the_rule_matters(other):
    """Negative control: neighbouring rules give visibly different gradients."""
    oracle, sequence = make(ALL["ModelB"])
    here, there = (total(oracle.online(rule, sequence)[0]) for rule in (PPProp(0.9), other))
    with pytest.raises(AssertionError):
        assert_close(here, there, tol=1e-2)
