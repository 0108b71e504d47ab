"""Where the entries of a weight's trace act: the layout of the traces that D_RTRL keeps per weight.

An operation has such traces if every entry of its weight acts on one position of the output of a sample, or if a weight
with an entry for every position takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from .._binding import Fixed, Operands
from .._compiler.labels import NONE, is_aligned, mixes, own_label
from .._compiler.positions import entry_positions, no_cut, propagate
from .._compiler.relations import HiddenParamOpRelation
from .._jax import Literal, open_jaxpr, struct
from .._ops.primitive import Unshared
from .._types import PyTree, Shape, path_str
from .pieces import Slot
from .samples import aligned

__all__ = ["TraceLayout", "layout_of"]

Anchor = tuple[np.ndarray, ...] | None  # one array per axis of the output; None: the position is that of the last axes
Shapes = dict[str, jax.ShapeDtypeStruct]


class TraceLayout(NamedTuple):
    """Batch axes of a relation, where each trace entry acts, and the trace's shape per sample."""

    relation: HiddenParamOpRelation  # of one sub-step: all sub-steps add to one trace
    batch_ndim: int
    anchors: Mapping[str, Anchor]
    unshared: Unshared | None  # the operation with a weight entry for every position, where its own act on several
    shapes: Mapping[str, Shape]
    sub_steps: int | None = None  # axis of that size in front of the batch axes of inputs and of df

    def apply(self, x: jax.Array | None, weights: Operands, fixed: Fixed) -> jax.Array:
        """The output of one sample, for weights that have traces."""
        if self.unshared is not None:
            return self.unshared.impl(x, weights)
        return self.relation.primitive.apply_sample(x, weights, self.relation.eqn_params, fixed)

    def own(self, operands: Operands, fixed: Fixed) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The weights that have traces: the operation's own, or one for every position; and constants beside these."""
        if self.unshared is None:
            return dict(operands), {}
        own = self.unshared.expand({**operands, **{k: fixed[i] for k, i in self.relation.untrained.items()}})
        return {k: own[k] for k in operands}, {k: w for k, w in own.items() if k not in operands}

    @property
    def is_plain(self) -> bool:
        """Whether the operation has an input, and nothing else but its own trained operands."""
        return self.relation.x_var is not None and self.unshared is None and not self.relation.fixed_vars

    @property
    def broadcasts(self) -> bool:
        """Whether the position of every trace entry is that of its last axes."""
        return self.relation.primitive.rules.dt_to_t is None and all(a is None for a in self.anchors.values())

    def times(self, coefficient: PyTree, trace: Slot, vmap_ndim: int) -> Slot:
        """A coefficient (a number, or an array over positions) times the trace entries of its positions."""
        relation = self.relation
        if np.ndim(coefficient) == 0 or relation.x_var is None:
            return jax.tree.map(lambda e: coefficient * e, dict(trace))
        lead = self.batch_ndim + vmap_ndim
        if self.broadcasts:
            return jax.tree.map(lambda e: aligned(coefficient, e, lead) * e, dict(trace))
        return relation.primitive.spread_signal(coefficient, trace, relation.eqn_params, self.anchors, lead)


def layout_of(relation: HiddenParamOpRelation) -> TraceLayout:
    """Find the output position of every trace entry from the derivative of the operation.

    Raises
    ------
    NotImplementedError
        If one weight entry acts on several positions of a sample, or an untrained operand has a batch axis.
    """
    return _layout_of_one(relation.one)._replace(sub_steps=relation.sub_steps)


def _layout_of_one(relation: HiddenParamOpRelation) -> TraceLayout:
    p, y = relation.primitive, relation.y_var.aval
    lead = p.lead(y, relation.eqn_params)
    weights = {k: struct(v) for k, v in relation.trainable_vars.items()}
    fixed = {i: struct(v) for i, v in relation.fixed_vars.items()}
    untrained = {k: fixed[i] for k, i in relation.untrained.items()}
    where = f"{p.name} at {path_str(relation.path)!r}"
    shapes = {k: w.shape for k, w in weights.items()}
    if lead and _reads_by_sample(relation, weights, fixed):
        raise NotImplementedError(
            f"An operand of {where} that is not trained has a batch axis. Use braintrace.pp_prop, or apply it outside."
        )
    if relation.x_var is None:
        # Without an entry of its own for every position, the trace is that of the output, and an anchor says so.
        anchors: Mapping[str, Anchor] = {k: None if _pointwise(relation, k) else () for k in weights}
        if () in anchors.values() and fixed.keys() - relation.constant:
            raise NotImplementedError(
                f"A weight of {where} acts on several positions, in another way at every step. Use braintrace.pp_prop."
            )
        return TraceLayout(relation, lead, anchors, None, shapes)
    x = jax.ShapeDtypeStruct(relation.x_var.aval.shape[lead:], relation.x_var.aval.dtype)
    one_y = jax.ShapeDtypeStruct(y.shape[lead:], y.dtype)
    steady = weights | {k: w for k, w in untrained.items() if relation.untrained[k] in relation.constant}
    unshared = None if p.rules.unshare is None else p.rules.unshare(x, one_y, steady, relation.eqn_params)
    if unshared is not None:
        own = jax.eval_shape(unshared.expand, weights | untrained)
        shapes, weights = {k: own[k].shape for k in weights}, own
    layout = TraceLayout(relation, lead, {}, unshared, shapes)
    if p.rules.dt_to_t is not None:
        return layout._replace(anchors=dict.fromkeys(shapes))
    if p.rules.anchors is None:
        return layout._replace(anchors=_find_anchors(layout, x, one_y, weights, fixed, where))
    params = relation.eqn_params
    if unshared is None and not all(_is_entry_by_entry(params.get(f"{k}_fn"), w) for k, w in weights.items()):
        # The rule speaks of the weights that the functions in the operation give.
        try:
            return layout._replace(anchors=_find_anchors(layout, x, one_y, weights, fixed, where))
        except NotImplementedError:
            own = _of_functions(relation)
            layout, weights = layout._replace(unshared=own), jax.eval_shape(own.expand, weights | untrained)
            shapes = {k: weights[k].shape for k in shapes}
    anchors = p.rules.anchors(one_y, weights, params)
    return layout._replace(anchors={k: anchors[k] for k in shapes}, shapes=shapes)


def _is_entry_by_entry(function: Callable[[jax.Array], jax.Array] | None, weight: jax.ShapeDtypeStruct) -> bool:
    """Whether every entry of what a function gives depends on the same entry of the weight alone."""
    if function is None:
        return True
    jaxpr = open_jaxpr(jax.make_jaxpr(function)(weight))
    env = {jaxpr.invars[0]: {("w", 0): own_label(weight.shape, len(weight.shape))}}
    propagate(jaxpr.eqns, env, no_cut)
    (out,) = jaxpr.outvars
    label = None if isinstance(out, Literal) else env.get(out, {}).get(("w", 0))
    return out.aval.shape == weight.shape and (label is None or is_aligned(label, weight.shape))


def _of_functions(relation: HiddenParamOpRelation) -> Unshared:
    """Weights that have traces where the functions in an operation mix the entries of its own: what these give."""
    p, params = relation.primitive, relation.eqn_params
    functions = {k: f for k in p.trainables(params) if (f := params.get(f"{k}_fn")) is not None}
    bare = {**params, **dict.fromkeys(f"{k}_fn" for k in functions)}
    return Unshared(
        lambda weights: {k: functions[k](w) if k in functions else w for k, w in weights.items()},
        lambda x, weights: p.apply_sample(x, weights, bare, {}),
    )


def _reads_by_sample(relation: HiddenParamOpRelation, weights: Shapes, fixed: dict[int, jax.ShapeDtypeStruct]) -> bool:
    """Whether every sample of the output reads its own part of some untrained operand."""
    p, y = relation.primitive, relation.y_var.aval
    if y.shape[0] == 1:  # a single sample reads what there is
        return False
    x = None if relation.x_var is None else struct(relation.x_var)
    jaxpr = open_jaxpr(jax.make_jaxpr(lambda x, w, f: p.apply(x, w, relation.eqn_params, f))(x, weights, fixed))
    operands = jaxpr.invars[len(jaxpr.invars) - len(fixed) :]
    env = {v: {("fixed", i): own_label(v.aval.shape, len(v.aval.shape))} for i, v in enumerate(operands)}
    propagate(jaxpr.eqns, env, no_cut)
    own = own_label(y.shape, 1)[1]
    labels = [] if isinstance(jaxpr.outvars[0], Literal) else env.get(jaxpr.outvars[0], {}).values()
    return any(len(label) > 1 and np.all((label[1] == own) | (label[1] == NONE)) for label in labels)


def _find_anchors(
    layout: TraceLayout,
    x: jax.ShapeDtypeStruct,
    y: jax.ShapeDtypeStruct,
    weights: Shapes,
    fixed: dict[int, jax.ShapeDtypeStruct],
    where: str,
) -> dict[str, Anchor]:
    trained = layout.relation.trainable_vars
    constants = {k: w for k, w in weights.items() if k not in trained}
    found = entry_positions(
        lambda x, w, constants, fixed: layout.apply(x, w | constants, fixed),
        (x, {k: weights[k] for k in trained}, constants, fixed),
        y,
    )
    anchors: dict[str, Anchor] = {}
    for key, label in found.items():
        index = [] if label is None else [np.where(a == NONE, 0, a) for a in label[1:]]
        if label is None or mixes(label):
            raise NotImplementedError(
                f"A weight of {where} acts on several positions of one sample, so that there is no single trace per "
                "weight. Use braintrace.pp_prop, or register the rule unshare or dt_to_t on the operation."
            )
        # Where the position is that of the last axes, broadcasting does: far cheaper than a gather.
        own = own_label(weights[key].shape, len(weights[key].shape))
        tail = len(weights[key].shape) - len(index)
        aligned = tail >= 0 and all(np.array_equal(a, own[1 + tail + i]) for i, a in enumerate(index))
        anchors[key] = None if aligned else tuple(index)
    return anchors


def _pointwise(relation: HiddenParamOpRelation, key: str) -> bool:
    """Whether the output of an operation without input depends entry by entry on a weight."""
    others = {k: struct(v) for k, v in relation.trainable_vars.items()}
    w, y = others.pop(key), relation.y_var.aval
    fixed = {i: struct(v) for i, v in relation.fixed_vars.items()}

    def value(w: jax.Array, others: dict[str, jax.Array], fixed: dict[int, jax.Array]) -> jax.Array:
        return relation.primitive.apply_sample(None, {**others, key: w}, relation.eqn_params, fixed)

    jaxpr = open_jaxpr(jax.make_jaxpr(value)(w, others, fixed))
    env = {jaxpr.invars[0]: {("w", 0): own_label(w.shape, len(w.shape))}}
    propagate(jaxpr.eqns, env, no_cut)
    label = env.get(jaxpr.outvars[0], {}).get(("w", 0))
    return w.shape == y.shape and (label is None or is_aligned(label, w.shape))
