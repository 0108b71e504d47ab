"""What a compiled step depends on beside the values of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .._jax import is_tracer
from .._types import MultiStepData, PyTree, SingleStepData, head

__all__ = ["Call", "call_of", "convertible", "equal"]

SETTINGS = frozenset({"precision", "platform", "host_device_count"})
NUMBERS = (jax.Array, np.ndarray, np.generic, float, int, complex)


class Call(NamedTuple):
    """Arguments, and the environment that they are passed in.

    Attributes
    ----------
    args : tuple
        Without the wrappers of :class:`SingleStepData` and :class:`MultiStepData`.
    keywords : dict
        Keyword arguments that hold arrays, likewise.
    over_time : list of bool
        Which of their leaves have time as a first axis.
    options : dict
        All other keyword arguments.
    inputs : dict
        Arrays and numbers of the environment.
    constants : dict
        Its other entries, and a time step that is not being traced: models draw decays from it, and a trace whose
        coefficients are constants is far smaller.
    """

    args: tuple[PyTree, ...]
    keywords: Mapping[str, PyTree]
    over_time: list[bool]
    options: Mapping[str, object]
    inputs: Mapping[str, PyTree]
    constants: Mapping[str, object]

    @property
    def given(self) -> PyTree:
        return (self.args, self.keywords) if self.keywords else self.args

    @property
    def length(self) -> int | None:
        """Number of steps of a window."""
        windows = [jnp.shape(x) for x, m in zip(jax.tree.leaves(self.given), self.over_time) if m]
        if () in windows:
            raise ValueError("MultiStepData holds a scalar; axis 0 of every leaf must be time.")
        lengths = {shape[0] for shape in windows}
        if len(lengths) > 1:
            raise ValueError(f"The windows of one call have different lengths: {sorted(lengths)}.")
        if 0 in lengths:
            raise ValueError("MultiStepData holds a window of length 0; axis 0 of every leaf must be one step or more.")
        return next(iter(lengths), None)

    def first_step(self) -> Call:
        """That of the first step of a window."""
        tree: jax.tree_util.PyTreeDef
        leaves, tree = jax.tree.flatten(self.given)
        given = tree.unflatten([head(x) if m else x for x, m in zip(leaves, self.over_time)])
        args, keywords = given if self.keywords else (given, {})
        return self._replace(args=args, keywords=keywords, over_time=[False] * len(leaves))


def call_of(args: tuple[PyTree, ...], keywords: Mapping[str, PyTree]) -> Call:
    is_wrapped = lambda x: isinstance(x, (SingleStepData, MultiStepData))  # noqa: E731
    of_arrays = lambda tree: any(hasattr(x, "shape") for x in jax.tree.leaves(tree))  # noqa: E731

    def bare(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.data if is_wrapped(x) else x, tree, is_leaf=is_wrapped)

    arrays = {k: v for k, v in keywords.items() if of_arrays(v)}
    parts = jax.tree.leaves((args, arrays), is_leaf=is_wrapped)
    over_time = [isinstance(x, MultiStepData) for x in parts for _ in jax.tree.leaves(bare(x))]
    options = {k: v for k, v in keywords.items() if k not in arrays}
    inputs: dict[str, PyTree] = {}
    constants: dict[str, object] = {}
    for key, value in brainstate.environ.all().items():
        leaves = jax.tree.leaves(value)
        known_step = key == "dt" and not any(map(is_tracer, leaves))
        numeric = bool(leaves) and all(isinstance(x, NUMBERS) and not isinstance(x, bool) for x in leaves)
        (inputs if numeric and not known_step and key not in SETTINGS else constants)[key] = value
    return Call(bare(args), bare(arrays), over_time, options, dict(sorted(inputs.items())), constants)


def equal(a: object, b: object) -> bool:
    """Whether two values that are no inputs are the same."""
    if a is b:
        return True
    left: jax.tree_util.PyTreeDef
    (xs, left), (ys, right) = jax.tree.flatten(a), jax.tree.flatten(b)
    try:
        return bool(left == right) and all(x is y or bool(np.all(x == y)) for x, y in zip(xs, ys))
    except Exception:  # whatever cannot be compared is another value
        return False


def convertible(dtype: DTypeLike, wanted: DTypeLike) -> bool:
    """Whether every value of a kind of number is one of another kind."""
    kinds: list[DTypeLike] = [jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating]
    found, limit = (next((i for i, k in enumerate(kinds) if jnp.issubdtype(d, k)), None) for d in (dtype, wanted))
    return dtype == wanted or (found is not None and limit is not None and found <= limit)
