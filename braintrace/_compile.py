"""One call from a model to a ready learner."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias, overload

import brainstate
import jax
import jax.numpy as jnp

from ._arguments import check_batch_size
from ._learners.base import ETraceAlgorithm
from ._learners.bootstrap import DNI
from ._learners.config import ETraceConfig
from ._learners.hybrid_dim import HybridDimVjpAlgorithm
from ._learners.io_dim import IODimVjpAlgorithm, pp_prop
from ._learners.param_dim import ParamDimVjpAlgorithm
from ._learners.projection import UORO, RandomProjectionVjpAlgorithm
from ._learners.rules import D_RTRL, EProp, Immediate, OSTLFeedforward, OSTLRecurrent, ThreeFactor
from ._learners.vjp import ETraceVjpAlgorithm
from ._mapped import ETraceVmap
from ._types import PyTree, cause_of, head, in_one_line

__all__ = ["compile"]

NAMES: dict[str, type[ETraceAlgorithm]] = {
    "pp_prop": pp_prop,
    "es_d_rtrl": pp_prop,
    "esd_rtrl": pp_prop,
    "ostl_recurrent": OSTLRecurrent,
    "ostl_feedforward": OSTLFeedforward,
    "d_rtrl": D_RTRL,
    "eprop": EProp,
    "e_prop": EProp,
    "uoro": UORO,
    "three_factor": ThreeFactor,
    "dni": DNI,
    "hybrid": HybridDimVjpAlgorithm,
    "immediate": Immediate,
}


ENGINES: dict[str, type[ETraceAlgorithm]] = {
    "io_factorized": IODimVjpAlgorithm,
    "per_param": ParamDimVjpAlgorithm,
    "hybrid": HybridDimVjpAlgorithm,
    "random_projection": RandomProjectionVjpAlgorithm,
}


RuleName: TypeAlias = Literal[
    "pp_prop", "es_d_rtrl", "esd_rtrl", "d_rtrl", "eprop", "e_prop", "ostl_recurrent", "ostl_feedforward", "uoro",
    "three_factor", "dni", "hybrid", "immediate",
]  # fmt: skip
Rule: TypeAlias = RuleName | type[ETraceAlgorithm] | ETraceConfig


@overload
def compile(
    model: brainstate.nn.Module,
    algorithm: Rule,
    *example_inputs: PyTree,
    batch_size: int | None = None,
    seed: int | None = None,
    verbose: Literal[0, 1, 2] = 0,
    vmap: Literal[False] = False,
    **options: Any,
) -> ETraceAlgorithm: ...


@overload
def compile(
    model: brainstate.nn.Module,
    algorithm: Rule,
    *example_inputs: PyTree,
    batch_size: int,
    seed: int | None = None,
    verbose: Literal[0, 1, 2] = 0,
    vmap: Literal[True],
    **options: Any,
) -> ETraceVmap: ...


def compile(
    model: brainstate.nn.Module,
    algorithm: str | type[ETraceAlgorithm] | ETraceConfig,
    *example_inputs: PyTree,
    batch_size: int | None = None,
    seed: int | None = None,
    verbose: int = 0,
    vmap: bool = False,
    **options: Any,
) -> ETraceAlgorithm | ETraceVmap:
    """Initialise a model's states, make a learner of it and compile it.

    Parameters
    ----------
    model : brainstate.nn.Module
        The model; its states are always initialised anew (``brainstate.nn.init_all_states``).
    algorithm : str, ETraceAlgorithm subclass or ETraceConfig
        The learning rule by name (``'pp_prop'``, ``'es_d_rtrl'``, ``'esd_rtrl'``, ``'d_rtrl'``, ``'eprop'``,
        ``'e_prop'``, ``'ostl_recurrent'``, ``'ostl_feedforward'``, ``'uoro'``, ``'three_factor'``, ``'dni'``,
        ``'hybrid'``, ``'immediate'``), by class, or by coordinates.
    *example_inputs : pytree of array, jax.ShapeDtypeStruct or scalar
        At least one; the structure of later ``update(*inputs)``.
    batch_size : int, optional
        Batch axis of the states; ``None`` for none. With ``vmap`` it is required, and the size of the mapped axis.
    seed : int, optional
        Seed of the state initialisation; the global generator is restored.
    verbose : {0, 1, 2}
        Level of the report that is printed; 0 prints none.
    vmap : bool
        Whether the model is written for one sample and mapped over the batch: every leaf of the example inputs, and
        of later inputs, has the batch as axis 0.
    **options
        Passed to the learner's constructor.

    Returns
    -------
    ETraceAlgorithm
        The learner; with ``vmap`` an :class:`ETraceVmap` whose ``module`` is the learner of one sample.

    Raises
    ------
    ValueError
        For an unknown name, no example input, a bad ``verbose``, or ``vmap`` without ``batch_size``.
    TypeError
        For an ``algorithm`` of another kind, or a missing or unknown option.
    CompilationError
        If nothing in the model is trainable online.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> learner = braintrace.compile(braintrace.nn.GRUCell(2, 3), 'pp_prop', jnp.zeros(2), decay_or_rank=0.9)
    >>> learner(jnp.ones(2)).shape
    (3,)
    """
    if not isinstance(model, brainstate.nn.Module):
        raise TypeError(f"The model must be a brainstate.nn.Module, got {type(model).__name__}.")
    if isinstance(model, ETraceAlgorithm):
        raise TypeError(f"This {type(model).__name__} is a learner already. Pass the model that it trains.")
    if isinstance(algorithm, ETraceConfig):
        if "config" in options:
            raise TypeError("The config is given twice: as algorithm and as an option. Pass it once.")
        options["config"] = algorithm
    rule = _find(algorithm)
    if not example_inputs:
        raise ValueError("Pass at least one example input, with the shapes and dtypes of later calls.")
    if isinstance(verbose, bool) or verbose not in (0, 1, 2):
        raise ValueError(f"verbose must be 0, 1 or 2, got {verbose!r}.")
    check_batch_size(batch_size)
    _check_arguments(model, example_inputs)
    learner = rule(model, **options)
    with contextlib.nullcontext() if seed is None else brainstate.random.seed_context(seed):
        if vmap:
            sample = _first_sample(example_inputs, batch_size)
            learner._mapped_samples = batch_size or 1

            @brainstate.transform.vmap_new_states(state_tag="new", axis_size=batch_size)
            def initialise() -> None:
                brainstate.nn.init_all_states(model)
                learner.compile_graph(*sample)

            initialise()
        else:
            brainstate.nn.init_all_states(model, batch_size=batch_size)
            with _batch_in_place(batch_size, example_inputs):
                learner.compile_graph(*example_inputs)
    if verbose:
        learner.report.show(level=verbose)
    return ETraceVmap(learner, vmap_states="new") if vmap else learner


def _check_arguments(model: brainstate.nn.Module, inputs: tuple[PyTree, ...]) -> None:
    if type(model).__call__ is not brainstate.nn.Module.__call__:
        return
    signature = inspect.signature(model.update)
    try:
        signature.bind(*inputs)
    except TypeError as error:
        sizes = [x for x in inputs if isinstance(x, int) and not isinstance(x, bool)]
        batch = f" A batch size is passed by name: batch_size={sizes[-1]}." if sizes else ""
        raise TypeError(
            f"{type(model).__name__}.update takes ({', '.join(signature.parameters)}), and there are "
            f"{len(inputs)} example inputs: {error}. Pass one example for each argument.{batch}"
        ) from None


@contextlib.contextmanager
def _batch_in_place(batch_size: int | None, inputs: tuple[PyTree, ...]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        cause = cause_of(error)
        if not isinstance(cause, (TypeError, ValueError)):
            raise
        shapes = [jnp.shape(x) for x in jax.tree.leaves(inputs)]
        if batch_size is None:
            if size := next((s[0] for s in shapes if s), None):
                error.add_note(
                    f"The states have no axis of a batch, and the example inputs have the shapes {shapes}. If axis 0 "
                    f"of these is a batch, pass batch_size={size} to braintrace.compile."
                )
            raise
        others = [s for s in shapes if s[:1] != (batch_size,)]
        if not others:
            raise
        raise ValueError(
            f"The states have batch_size={batch_size}, an example input has the shape {others[0]}, and the model's "
            f"step fails on them: {in_one_line(cause)} Pass inputs whose axis 0 is a batch of that size."
        ) from error


def _first_sample(inputs: tuple[PyTree, ...], batch_size: int | None) -> PyTree:
    if batch_size is None:
        raise ValueError("With vmap=True pass batch_size, the size of the mapped axis.")
    for leaf in jax.tree.leaves(inputs):
        if not jnp.shape(leaf) or jnp.shape(leaf)[0] != batch_size:
            raise ValueError(
                f"With vmap=True axis 0 of every example leaf must be the batch of {batch_size}, got a leaf of shape "
                f"{jnp.shape(leaf)}."
            )
    return jax.tree.map(head, inputs)


def _find(algorithm: object) -> type[ETraceAlgorithm]:
    if isinstance(algorithm, ETraceConfig):
        return ENGINES[algorithm.trace_factorization]
    if isinstance(algorithm, str):
        name = algorithm.strip().lower()
        if name not in NAMES:
            raise ValueError(f"Unknown algorithm {algorithm!r}; the names are {', '.join(sorted(NAMES))}.")
        return NAMES[name]
    if isinstance(algorithm, type):
        if algorithm in (ETraceAlgorithm, ETraceVjpAlgorithm):
            raise TypeError(f"{algorithm.__name__} is an abstract base. Pass a rule, such as braintrace.pp_prop.")
        if issubclass(algorithm, ETraceAlgorithm):
            return algorithm
        raise TypeError(f"algorithm must be a subclass of ETraceAlgorithm, got the class {algorithm.__name__}.")
    raise TypeError(
        f"algorithm must be a name, a subclass of ETraceAlgorithm or an ETraceConfig, got {type(algorithm).__name__}."
    )
