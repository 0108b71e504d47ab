"""Types of the constructors' options, and what older scripts pass beside them."""

from __future__ import annotations

import difflib
import inspect
import warnings
from typing import Literal, TypeAlias, TypedDict

import jax
from jax.typing import DTypeLike

from .._compiler.policy import ControlFlowPolicy
from .config import ETraceConfig

__all__ = ["EPropOptions", "IOOptions", "Legacy", "SnApOptions", "VjpMethod", "legacy_options"]

VjpMethod: TypeAlias = Literal["single-step", "multi-step"]


class Legacy(TypedDict, total=False):
    """Accepted and ignored."""

    mode: object


class IOOptions(Legacy, total=False):
    """What rules pass on to :class:`IODimVjpAlgorithm`."""

    vjp_method: VjpMethod
    fast_solve: bool
    control_flow: ControlFlowPolicy | None
    config: ETraceConfig | None
    random_feedback_key: jax.Array | int | None


class ParamOptions(Legacy, total=False):
    """What rules pass on to :class:`ParamDimVjpAlgorithm`."""

    trace_dtype: DTypeLike | None
    chunked_trace: bool
    control_flow: ControlFlowPolicy | None


class EPropOptions(ParamOptions, total=False):
    snap_max_jacobian_elements: int


class SnApOptions(ParamOptions, total=False):
    random_feedback_key: jax.Array | int | None


def legacy_options(options: Legacy, rule: type) -> None:
    """Accept what older scripts pass and newer versions ignore; everything else is a ``TypeError``."""
    if options.pop("mode", None) is not None:
        warnings.warn("The argument mode has no effect and is ignored.", DeprecationWarning, stacklevel=3)
    if options:
        known = _arguments(rule)
        near = {n: [k for k in known if n in k] or difflib.get_close_matches(n, known, 1, 0.5) for n in options}
        meant = "".join(f" Did you mean {found[0]} for {n}?" for n, found in sorted(near.items()) if found)
        raise TypeError(
            f"Unknown argument(s): {', '.join(sorted(options))}.{meant} {rule.__name__} takes {', '.join(known)}."
        )


def _arguments(rule: type) -> list[str]:
    """Names of the constructor's arguments behind the model, those that it passes on to its bases included."""
    names: list[str] = []
    for base in rule.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            names += [k for k, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            if "legacy" in parameters:
                break
    return [k for k in dict.fromkeys(names) if k not in ("self", "model")]
