"""Printed numbers for three small models, computed from the recursions by other programs."""

import brainstate
import models
import pytest

import braintrace

RULES = {
    "pp_prop": lambda net, decay: braintrace.pp_prop(net, decay_or_rank=decay),
    "D_RTRL": lambda net, _: braintrace.D_RTRL(net),
    "EProp": lambda net, kappa: braintrace.EProp(net, kappa_filter_decay=kappa),
}


@pytest.mark.parametrize("row", [row for row in models.PUBLISHED if row[1] in RULES])
def test_published_numbers(row):
    model, rule, knob, step = row
    net = models.published(model)
    learner = RULES[rule](net, knob)
    learner.compile_graph(models.PUBLISHED_INPUTS[0])
    gradient = brainstate.transform.grad(lambda x: models.published_loss(net, learner, x), learner.param_states)
    gradients = [gradient(x) for x in models.PUBLISHED_INPUTS]
    models.assert_published(gradients[step], *models.PUBLISHED[row])
