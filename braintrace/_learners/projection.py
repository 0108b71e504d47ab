"""UORO: a random projection in the place of traces per parameter."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Unpack

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef
from jax.typing import DTypeLike

from .._binding import Binding
from .._compiler.policy import ControlFlowPolicy
from .._compiler.scope import CEILING
from .._engines.projection import Projection, ProjectionEngine, Projections
from .._types import Path, PyTree, Shape, path_str
from .base import EligibilityTrace
from .config import ETraceConfig
from .options import Legacy, VjpMethod, legacy_options
from .signals import as_key
from .vjp import ETraceVjpAlgorithm

__all__ = ["UORO", "RandomProjectionVjpAlgorithm"]


class RandomProjectionVjpAlgorithm(ETraceVjpAlgorithm):
    r"""Online learning with memory of the size of states and parameters, by an unbiased random estimate (UORO).

    The derivative of a hidden group by all parameters that drive it is estimated by one outer product
    :math:`\tilde s \otimes \tilde\theta`. With random signs :math:`\nu`, the whole Jacobian
    :math:`J = \partial h^t / \partial h^{t-1}` of the group (recurrent weights included) and :math:`J_f`, the
    derivative of the new values by the parameters within the step,

    .. math::

        \tilde s \leftarrow \rho_0 J \tilde s + \rho_1 \nu, \qquad
        \tilde\theta \leftarrow \tilde\theta / \rho_0 + \nu^\top J_f / \rho_1, \qquad
        \nabla_\theta \mathrel{+}= (L \cdot \tilde s)\, \tilde\theta,

    .. math::

        \rho_0 = \sqrt{(\|\tilde\theta\| + \varepsilon) / (\|J \tilde s\| + \varepsilon)}, \qquad
        \rho_1 = \sqrt{(\|\nu^\top J_f\| + \varepsilon) / (\|\nu\| + \varepsilon)}.

    Where operations act on the group position by position, the expectation over :math:`\nu` is real-time recurrent
    learning within the group; of other operations :math:`J_f` holds each position's own part. A single estimate is
    noisy. With ``vjp_method='multi-step'`` the credit within a call is exact, and only what comes from before it is
    estimated.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its ``update`` is one time step.
    name : str, optional
    vjp_method : {'single-step', 'multi-step'}
        See :class:`ETraceVjpAlgorithm`.
    fast_solve : bool
        Accepted for scripts; results do not depend on it.
    control_flow : ControlFlowPolicy, optional
        What to do with the loops and branches of the step.
    config : ETraceConfig, optional
        The rule as coordinates, with ``trace_factorization='random_projection'``.
    projection_key : int or JAX key
        Of the random signs; a reset learner draws the same ones again.
    projection_eps : float
        :math:`\varepsilon`, above 0.
    random_feedback_key : int or JAX key, optional
        Of the fixed feedback matrices of ``learning_signal='random_feedback'``.
    snap_max_jacobian_elements : int
        Accepted for scripts: the Jacobian is never formed.

    Attributes
    ----------
    etrace_s : dict
        Group index -> :class:`EligibilityTrace`, shape ``V + (S,)``.
    etrace_theta : dict
        (group index, parameter path) -> :class:`EligibilityTrace` like the parameter.
    projection_rng, projection_step : brainstate.ShortTermState
        The key of the random signs, and how often they were drawn since the last reset.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit; the message names them.
    NotImplementedError
        By ``compile_graph``, for a model with a long loop that is not unrolled.

    Notes
    -----
    A learner that is mapped over samples keeps :math:`\tilde\theta` for each of them, made with the same signs.

    References
    ----------
    .. [1] C. Tallec and Y. Ollivier, "Unbiased online recurrent optimization", International Conference on Learning
       Representations, 2018.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> learner = braintrace.compile(braintrace.nn.GRUCell(2, 3), 'uoro', jnp.zeros(2))
    >>> grads = learner.etrace_grad(jnp.ones((10, 2)), step_fn=lambda x: (learner(x) ** 2).sum())
    >>> grads['Wz', 'weight']['weight'].shape
    (5, 3)
    """

    __module__ = "braintrace"

    _default_config = ETraceConfig("random_projection", recurrence_scope="coupled")

    def __init__(
        self,
        model: brainstate.nn.Module,
        name: str | None = None,
        vjp_method: VjpMethod = "multi-step",
        fast_solve: bool = True,
        control_flow: ControlFlowPolicy | None = None,
        config: ETraceConfig | None = None,
        projection_key: jax.Array | int = 42,
        projection_eps: float = 1e-12,
        random_feedback_key: jax.Array | int | None = None,
        snap_max_jacobian_elements: int = CEILING,
        **legacy: Unpack[Legacy],
    ):
        legacy_options(legacy, type(self))
        super().__init__(model, name, vjp_method, control_flow, config, random_feedback_key, snap_max_jacobian_elements)
        self.fast_solve = bool(fast_solve)
        if isinstance(projection_eps, bool) or not isinstance(projection_eps, numbers.Real):
            raise TypeError(f"projection_eps must be a number above 0, got {projection_eps!r}.")
        if not np.float32(projection_eps) > 0:
            raise ValueError(f"projection_eps must be above 0, also in float32, got {projection_eps!r}.")
        self.projection_eps: float = float(projection_eps)
        self.projection_key = projection_key
        self._key: jax.Array = as_key("projection_key", projection_key)

    def init_etrace_state(self, *args: PyTree, **kwargs: PyTree) -> None:
        """Allocate zero projections, as new state objects; the step counter is not touched."""
        del args, kwargs
        engine = self._engine
        projections, rng, step = engine.init()
        self.etrace_s = {index: EligibilityTrace(p.state) for index, p in projections.items()}
        self.etrace_theta = {}
        for index, (path, value) in self._of_parameters(projections):
            self.etrace_theta[index, path] = EligibilityTrace(value)
        # As plain numbers, which every transformation maps.
        self.projection_rng = brainstate.ShortTermState(rng)
        self.projection_step = brainstate.ShortTermState(step)

    def _make_engine(self, binding: Binding) -> ProjectionEngine:
        numbers = tuple(range(len(binding.graph.hidden_param_op_relations)))
        return ProjectionEngine(binding, numbers, self._key, self._draw_projection, self.projection_eps)

    def _of_parameters(self, projections: Mapping[int, Projection]) -> Iterator[tuple[int, tuple[Path, PyTree]]]:
        """Group index, path and projected value, a pytree like the parameter."""
        for index, own in projections.items():
            paths = self._engine.paths_of(index)
            tree: PyTreeDef = jax.tree.structure([self.param_states[p].value for p in paths])
            for path, value in zip(paths, tree.unflatten(own.parameters)):
                yield index, (path, value)

    def reset_state(self, batch_size: int | None = None, **kwargs: object) -> None:
        """Zero the projections and the step counter, and begin the stream of random signs anew.

        Parameters
        ----------
        batch_size : int, optional
            New size of the batch axis of those projections that have one.
        """
        super().reset_state(batch_size, **kwargs)
        size, mapped = self._leading_size()
        front = (batch_size or size,) if mapped else ()
        self.projection_step.value = jnp.zeros(front, jnp.int32)
        self._draw_apart()

    def _draw_apart(self) -> None:
        if self.is_compiled:
            samples = self.projection_step.value.shape
            keys = jax.random.split(self._key, samples) if samples else self._key
            self.projection_rng.value = jax.random.key_data(keys)

    def _lay_out(self) -> None:
        mapped = bool(self.projection_step.value.shape)
        convolutions = [r for r in self.graph.hidden_param_op_relations if r.primitive.name.startswith("etp_conv")]
        if self._layout is not None and self._layout.batch is not None and mapped and convolutions:
            raise NotImplementedError(
                f"The convolution at {path_str(convolutions[0].path)!r} would get another gradient on several devices: "
                "XLA partitions the gradient of a mapped kernel, one for each sample, in a wrong way. Compile the "
                "learner with batch_size=... and without vmap, or shard it without batch."
            )
        super()._lay_out()

    def _trace_states(self) -> Iterator[tuple[brainstate.State, int | None]]:
        relations = self.graph.hidden_param_op_relations
        wider = lambda r, g: len(g.varshape) > r.y_var.aval.ndim  # noqa: E731
        with_batch = {g.index for r in relations for g in r.hidden_groups if r.primitive.batched or wider(r, g)}
        for index, state in self.etrace_s.items():
            yield state, 0 if index in with_batch else None
        for state in self.etrace_theta.values():
            yield state, None

    def _unit_axes(self) -> Iterator[tuple[brainstate.State, Sequence[Path], int]]:
        for index, state in self.etrace_s.items():
            yield state, self.graph.hidden_groups[index].hidden_paths, -2
        for (_, path), state in self.etrace_theta.items():
            yield state, [path], -1

    def get_etrace_of(self, weight: brainstate.ParamState | Path) -> dict[tuple[int, Path], PyTree]:
        """The projections of one parameter.

        Parameters
        ----------
        weight : ParamState or path

        Returns
        -------
        dict
            (group index, path) -> array or pytree like the parameter.

        Raises
        ------
        ValueError
            Before compilation, or if ``weight`` has none; the message names the path.
        """
        path = self._path_of(weight)
        found = {key: s.value for key, s in self.etrace_theta.items() if key[1] == path}
        if not found:
            raise ValueError(f"The parameter {path_str(path)!r} is trained by the current step alone: it has no trace.")
        return found

    def _draw_projection(
        self, key: jax.Array, step: jax.Array, group_index: int, shape: Shape, dtype: DTypeLike
    ) -> jax.Array:
        """Random signs for one group at one step."""
        return jax.random.rademacher(jax.random.fold_in(jax.random.fold_in(key, step), group_index), shape, dtype)

    def _get_etrace_data(self) -> Projections:
        projections = {}
        for index, state in self.etrace_s.items():
            own = [self.etrace_theta[index, p].value for p in self._engine.paths_of(index)]
            projections[index] = Projection(state.value, jax.tree.leaves(own))
        return Projections(projections, self.projection_rng.value, self.projection_step.value)

    def _assign_etrace_data(self, vals: Projections) -> None:
        projections, self.projection_rng.value, self.projection_step.value = vals
        for index, state in self.etrace_s.items():
            state.value = projections[index].state
        for index, (path, value) in self._of_parameters(projections):
            self.etrace_theta[index, path].value = value


class UORO(RandomProjectionVjpAlgorithm):
    """The learning rule of :class:`RandomProjectionVjpAlgorithm` under its published name.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its ``update`` is one time step.
    name : str, optional
    vjp_method : {'single-step', 'multi-step'}
        Whether the signal meets the trace after every step, or the gradient is exact within a window of steps; see
        :class:`ETraceVjpAlgorithm`.
    control_flow : ControlFlowPolicy, optional
        What to do with the loops and branches of the step.
    projection_key : int or JAX key
        Of the random signs; a reset learner draws the same ones again.
    projection_eps : float
        Above 0: keeps the norms, by which projections are balanced, from being 0.
    random_feedback_key : int or JAX key, optional
        Of the fixed feedback matrices of ``learning_signal='random_feedback'``.
    fast_solve, snap_max_jacobian_elements, **legacy
        Accepted for scripts; without effect.

    Raises
    ------
    TypeError
        If ``config`` is given.

    Examples
    --------
    >>> import braintrace
    >>> braintrace.UORO(braintrace.nn.GRUCell(2, 3), projection_key=0).vjp_method
    'multi-step'
    """

    __module__ = "braintrace"

    def __init__(
        self,
        model: brainstate.nn.Module,
        name: str | None = None,
        vjp_method: VjpMethod = "multi-step",
        fast_solve: bool = True,
        control_flow: ControlFlowPolicy | None = None,
        projection_key: jax.Array | int = 42,
        projection_eps: float = 1e-12,
        random_feedback_key: jax.Array | int | None = None,
        snap_max_jacobian_elements: int = CEILING,
        **legacy: Unpack[Legacy],
    ):
        if "config" in legacy:
            raise TypeError("UORO takes no config: it is one point of the coordinates.")
        super().__init__(
            model,
            name,
            vjp_method,
            fast_solve,
            control_flow,
            None,
            projection_key,
            projection_eps,
            random_feedback_key,
            snap_max_jacobian_elements,
            **legacy,
        )
