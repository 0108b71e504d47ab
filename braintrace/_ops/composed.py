"""An operation together with what happens to its weights in the same step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from .._jax import ClosedJaxpr, eval_jaxpr
from .primitive import Anchors, Aval, Avals, ETPPrimitive, Params, Rules, Static

__all__ = ["ComposedPrimitive"]


class ComposedPrimitive(ETPPrimitive):
    """An operation of which some operands are computed from parameters and from values of the step.

    What is trained are the parameters. They and the values come behind the other operands of the operation.

    Attributes
    ----------
    one : ETPPrimitive
        The operation itself; it takes the same static parameters.
    """

    def __init__(
        self,
        one: ETPPrimitive,
        program: ClosedJaxpr,
        made: Sequence[int],
        kept: Sequence[int],
        keys: Sequence[str],
        weights: Sequence[str] | None,
    ):
        """``program``: parameters, by ``keys``, and values -> the operands at the positions ``made``.

        Those at the positions ``kept`` are taken as they are. ``weights``: the operand of which a parameter has the
        entries, one by one, for every parameter, or ``None`` where it is not so.
        """
        first = len(kept)

        def impl(*operands: jax.Array, **params: Static) -> jax.Array:
            every = dict(zip(kept, operands)) | dict(zip(made, eval_jaxpr(program, *operands[first:])))
            (y,) = one.outputs([every[i] for i in sorted(every)], params)
            return y

        super().__init__(
            one.name,
            impl,
            batched=one.batched,
            gradient_enabled=one.gradient_enabled,
            trainables=lambda params: {k: first + j for j, k in enumerate(keys)},
            x_index=None if one.x_index is None else kept.index(one.x_index),
            sample_ndim=one.sample_ndim,
        )
        self.one = one
        rules = one.rules
        self.rules = dataclasses.replace(
            Rules(),
            snap_anchor=rules.snap_anchor,
            snap_adjacency=rules.snap_adjacency,
            anchors=None if rules.anchors is None or weights is None else self._anchors,
        )
        self.weights = dict(zip(keys, weights or ()))
        if one.unbatched_twin is not None:
            self.unbatched_twin = ComposedPrimitive(one.unbatched_twin, program, made, kept, keys, weights)

    def _anchors(self, y_aval: Aval, weight_avals: Avals, params: Params) -> Anchors:
        assert self.one.rules.anchors is not None
        found = self.one.rules.anchors(y_aval, {self.weights[k]: v for k, v in weight_avals.items()}, params)
        return {k: found[self.weights[k]] for k in weight_avals}

    @staticmethod
    def takes(one: ETPPrimitive) -> bool:
        """Whether the derived rules do for an operation: others speak of the weights that it has itself."""
        own = "pp_x_repr", "dt_to_t", "init_drtrl", "init_pp", "xy_to_dw"
        return not one.multiple_results and all(getattr(one.rules, name) is None for name in own)
