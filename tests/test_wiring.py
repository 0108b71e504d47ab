"""Networks wired at random: up to four states per position and three operations, against the dense oracle."""

import brainstate
import brainunit as u
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import models
from helpers import DRTRL, PPProp, old
from hypothesis import HealthCheck, Phase, given, settings
from models import N_IN, Linear, N, Problem, cat
from rules import check

import braintrace

RULES = [
    (lambda net: braintrace.pp_prop(net, (0.8, 0.6)), PPProp(0.8, 0.6)),
    (braintrace.D_RTRL, DRTRL()),
    (lambda net: braintrace.EProp(net, kappa_filter_decay=0.5), DRTRL(0.5)),
]
UPDATES = {  # of a state's own old value and what reaches it
    "sum": lambda own, reached: 0.8 * own + reached,
    "bounded": lambda own, reached: jnp.tanh(0.7 * own + reached),
    "gated": lambda own, reached: jax.nn.sigmoid(reached) * own + 0.5 * reached,
    "forgets": lambda own, reached: jnp.sin(reached),
}


def components(links, chain):
    """Groups of states that read each other, old or new."""
    groups = []
    for a, reads in enumerate(zip(links, chain)):
        met = [g for g in groups if g & {*reads[0], *reads[1]} or a in g]
        groups = [g for g in groups if g not in met] + [{a, *reads[0], *reads[1]}.union(*met)]
    return [sorted(g) for g in groups]


def names_of(groups):
    return [name for group in groups for name in group]


class Wired(models.Stage):
    """State `a` takes `updates[a]` of what reaches it.

    These are old values (`links`) and new values (`chain`) of other states, and outputs of operations (`into`).
    Operation `o` reads the input, and the old value of state `feedback[o]` unless that is `None`.
    """

    def __init__(self, updates, links, chain, into, feedback, reads_old, beside):
        super().__init__()
        self.wires = updates, links, chain, into
        self.feedback, self.reads_old, self.beside = feedback, reads_old, beside
        self.states = tuple(tuple(f"s{a}" for a in group) for group in components(links, chain))
        self.ops = [Linear(N_IN + N * (source is not None), N) for source in feedback]

    def init_state(self, batch_size=None, **_):
        for name in names_of(self.states):
            setattr(self, name, models.zeros(N, batch_size))

    def members(self):
        return [getattr(self, name) for name in sorted(names_of(self.states))]

    def recurrent(self, o):
        """Whether an operation leads back into the group that it reads."""
        driven = {f"s{a}" for a, into in enumerate(self.wires[3]) if o in into}
        return any(f"s{self.feedback[o]}" in group and driven & set(group) for group in self.states)

    def transition(self, x):
        states = self.members()
        before = [s.value for s in states]
        ys = []
        for o, (op, source) in enumerate(zip(self.ops, self.feedback)):
            read = old if self.recurrent(o) else lambda h: h
            ys.append(op(x if source is None else cat(x, read(before[source]))))
        for a, (kind, links, chain, into) in enumerate(zip(*self.wires)):
            reached = [0.4 * before[b] for b in links] + [0.5 * states[b].value for b in chain] + [ys[o] for o in into]
            states[a].value = UPDATES[kind](before[a], sum(reached, jnp.zeros_like(before[a])))
        return before, ys

    def output(self, aux):
        before, ys = aux
        out = sum((a + 1) * s.value**2 for a, s in enumerate(self.members()))
        out = out + sum(before) if self.reads_old else out
        return out * jnp.tanh(ys[-1]) if self.beside else out


def subset(size):
    return st.lists(st.integers(0, size - 1), unique=True, max_size=size).map(sorted) if size else st.just([])


@st.composite
def wirings(draw):
    states, operations = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    into = [draw(subset(operations)) for _ in range(states)]
    first = draw(st.integers(0, states - 1))
    into[first] = into[first] or [0]  # something is traced
    return dict(
        updates=[draw(st.sampled_from(sorted(UPDATES))) for _ in range(states)],
        links=[[b for b in draw(subset(states)) if b != a] for a in range(states)],
        chain=[draw(subset(a)) for a in range(states)],
        into=into,
        feedback=[draw(st.none() | st.integers(0, states - 1)) for _ in range(operations)],
        reads_old=draw(st.booleans()),
        beside=draw(st.booleans()),
    )


@settings(
    max_examples=18,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # to shrink a network takes minutes
    suppress_health_check=list(HealthCheck),
)
@given(
    wiring=wirings(),
    rule=st.sampled_from(range(len(RULES))),
    batch=st.sampled_from([None, 2]),
    trace_chunk=st.sampled_from([1, 2, 3, 5]),
)
def test_any_wiring(wiring, rule, batch, trace_chunk):
    with brainstate.environ.context(dt=1.0 * u.ms):
        problem = Problem(lambda nn: [Wired(**wiring)], None, batch)
        check(problem, RULES[rule], chunks=[trace_chunk], tol=2e-5, silent=True)
