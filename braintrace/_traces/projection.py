r"""A random projection of the influence of all parameters on a hidden group (UORO).

Pure functions of traces and records; arrays have no units. A sensitivity matrix of hidden variables times parameters
is kept as one outer product, :math:`\tilde s \otimes \tilde\theta`, whose expectation it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._compiler.groups import HiddenGroup
from .._compiler.relations import HiddenParamOpRelation
from .._precision import eval_widened, widened
from .record import Sensitivity, Slots, add, contraction, instantaneous

__all__ = ["Projection", "meet", "step_jacobian_product", "projected", "advance"]


class Projection(NamedTuple):
    """``state`` of shape ``V + (S,)``, and one array per leaf of the parameters that drive the group."""

    state: jax.Array
    parameters: list[jax.Array]


def meet(projection: Projection, signals: Slots) -> jax.Array | None:
    """The signal times the projected state."""
    return add([(s * projection.state[..., a]).sum() for a, s in enumerate(signals) if s is not None])


def step_jacobian_product(group: HiddenGroup, varying: Sequence[Any], tangent: jax.Array) -> jax.Array:
    """The whole Jacobian of a group's step times ``tangent``, both of shape ``V + (S,)``."""
    olds, inputs = widened(group.read_transition(varying))
    smooth = [i for i, v in enumerate(olds) if jnp.issubdtype(v.dtype, jnp.inexact)]

    def new_values(moved):
        at = dict(zip(smooth, moved))
        out = eval_widened(group.program.program, *[at.get(i, v) for i, v in enumerate(olds)], *inputs)
        return [out[i] for i in smooth]

    news, pull = jax.vjp(new_values, [olds[i] for i in smooth])
    # The transpose of the transpose: custom reverse rules have no forward mode.
    _, push = jax.vjp(lambda bars: pull(bars)[0], [jnp.zeros_like(n) for n in news])
    parts = group.split_hidden(tangent)
    (moved,) = push([parts[i].astype(olds[i].dtype) for i in smooth])
    at = dict(zip(smooth, moved))
    return group.concat_hidden([at.get(i, jnp.zeros(v.shape, tangent.dtype)) for i, v in enumerate(olds)])


def projected(
    relations: Mapping[int, HiddenParamOpRelation],
    group: HiddenGroup,
    noise: jax.Array,
    dfs: Mapping[str, Sensitivity],
    x: Sequence[Any],
    operands: Sequence[Any],
    fixed: Sequence[Any],
) -> dict[int, dict[str, jax.Array]]:
    """``noise`` times the derivative of the group by the operands of the operations that drive it."""
    out = {}
    for i, r in relations.items():
        signals: list[Slots] = [[] for _ in range(group.index)]
        signals.append([noise[..., a] for a in range(group.num_state)])
        cotangent = instantaneous(r._replace(hidden_groups=(group,)), dfs, signals)
        if cotangent is not None:
            out[i] = contraction(r, x[i], cotangent.astype(r.y_var.aval.dtype), operands[i], fixed[i], 0)
    return out


def advance(
    old: Projection, carried: jax.Array, noise: jax.Array, projection: Sequence[jax.Array], eps: float
) -> Projection:
    r"""One step.

    .. math::

        \tilde s \leftarrow \rho_0 J \tilde s + \rho_1 \nu, \qquad
        \tilde\theta \leftarrow \tilde\theta / \rho_0 + \nu^\top J_f / \rho_1

    with ``carried`` :math:`= J \tilde s` and ``projection`` :math:`= \nu^\top J_f`; the factors balance the norms of
    both sides.
    """
    rho_0 = jnp.sqrt((_norm(old.parameters) + eps) / (_norm([carried]) + eps))
    rho_1 = jnp.sqrt((_norm(projection) + eps) / (_norm([noise]) + eps))
    # Divided in the precision of the norms: a factor may be out of the range of half precision where a quotient is not.
    parameters = [(o / rho_0 + p / rho_1).astype(o.dtype) for o, p in zip(old.parameters, projection)]
    return Projection((rho_0 * carried + rho_1 * noise).astype(old.state.dtype), parameters)


def _norm(arrays):
    wide = [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays]
    return jnp.sqrt(sum((a * a).sum() for a in wide))
