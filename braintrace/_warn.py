"""Warnings that point at the user's own line."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings

import brainstate
import jax

__all__ = ["warn"]

_PACKAGES = tuple(os.path.dirname(f) + os.sep for f in (__file__, brainstate.__file__, jax.__file__))
_WRAPPERS = frozenset([contextlib.__file__, functools.__file__])


def warn(message: str, category: type[Warning]) -> None:
    """As ``warnings.warn`` does with ``skip_file_prefixes``, which Python 3.11 lacks."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_ours(file: str) -> bool:
    return file.startswith(_PACKAGES) or file in _WRAPPERS
