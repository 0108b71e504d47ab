"""The axes along which learning rules differ, and their legal combinations."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, TypeGuard

__all__ = ["ETraceConfig", "check_config"]

AXES = {
    "trace_factorization": ("per_param", "io_factorized", "hybrid", "random_projection"),
    "temporal_recursion": ("jacobian", "scalar_leak", "none"),
    "recurrence_scope": ("diagonal", "coupled", "sparse_n"),
    "learning_signal": ("symmetric", "random_feedback", "modulatory", "bootstrapped"),
    "trace_filter": ("none", "kappa"),
    "update_schedule": ("per_step", "window", "sequence_end"),
}
SCHEDULES = ("per_step",)  # those that are implemented
FILTERS = {  # by trace_factorization
    "per_param": ("none", "kappa"),
    "io_factorized": ("none",),
    "hybrid": ("none",),
    "random_projection": ("none",),
}
SCOPES = {  # by trace_factorization; other recursions than 'jacobian' have no scope but 'diagonal'
    "per_param": ("diagonal", "coupled", "sparse_n"),
    "io_factorized": ("diagonal", "coupled"),
    "hybrid": ("diagonal", "coupled"),
    "random_projection": ("coupled",),
}
COEFFICIENTS = {  # the axis, and the one value on it, that a coefficient belongs to
    "kappa": ("trace_filter", "kappa"),
    "sparse_n": ("recurrence_scope", "sparse_n"),
    "window_size": ("update_schedule", "window"),
}
PAIRED = ("temporal_recursion", "decay")


@dataclasses.dataclass(frozen=True)
class ETraceConfig:
    r"""A learning rule, as one choice on each of six axes.

    Equal rules have equal configurations, for what is given is first brought to one form: under ``'io_factorized'``
    and ``'hybrid'`` a single recursion or decay stands for both sides, and any recursion with decay 0 is ``'none'``;
    elsewhere a leak of 0 is ``'none'``; ``'none'`` has decay 0.0; ``sparse_n=1`` is ``'coupled'``; ``kappa=0`` is no
    filter.

    Parameters
    ----------
    trace_factorization : {'per_param', 'io_factorized', 'hybrid', 'random_projection'}
        What is kept: a trace per parameter entry, a filtered input x and sensitivity f, for some parameters the one and
        for the others the other, or a random projection.
    temporal_recursion : {'jacobian', 'scalar_leak', 'none'}, or pair of these
        What carries a trace from step to step: the transition Jacobian :math:`D`, a constant decay, or nothing. A pair
        is for ``'io_factorized'`` and ``'hybrid'``, ``(x, f)``. The x side has no Jacobian: a single ``'jacobian'`` is
        a leak there.
    recurrence_scope : {'diagonal', 'coupled', 'sparse_n'}
        What :math:`D` sees: each position alone, the recurrent mixing too, or traces of neighbours within ``sparse_n``
        steps. All but ``'diagonal'`` need the recursion ``'jacobian'`` (of f).
    learning_signal : {'symmetric', 'random_feedback', 'modulatory', 'bootstrapped'}
        What the traces are contracted with: the loss gradient, a random projection of it, a modulator, or the gradient
        with an estimate of the future added.
    trace_filter : {'none', 'kappa'}
        A low-pass filter of the traces before they are contracted; for ``'per_param'``.
    update_schedule : {'per_step'}
        ``'window'`` and ``'sequence_end'`` are known but not implemented.
    decay : float, or pair of float, optional
        The leak in ``[0, 1)``. Under ``'io_factorized'`` every side has one; elsewhere only ``'scalar_leak'``.
    kappa : float, optional
        The decay of ``trace_filter='kappa'`` in ``[0, 1)``.
    sparse_n : int, optional
        The order of ``recurrence_scope='sparse_n'``, at least 1.
    window_size : int, optional
        Belongs to ``update_schedule='window'``.

    Raises
    ------
    ValueError
        For an unknown value or an illegal combination.
    TypeError
        For a ``decay``, ``kappa`` or ``sparse_n`` that is no number of its kind.

    Examples
    --------
    >>> import braintrace
    >>> config = braintrace.ETraceConfig('io_factorized', decay=0.9)
    >>> config.describe()
    "trace_factorization='io_factorized', temporal_recursion=('scalar_leak', 'jacobian'), decay=(0.9, 0.9)"
    >>> config.replace(decay=(0.0, 0.9)).recursion_x
    'none'
    >>> braintrace.ETraceConfig(recurrence_scope='sparse_n', sparse_n=2).include_recurrent_mixing
    True
    """

    __module__ = "braintrace"

    trace_factorization: str = "per_param"
    temporal_recursion: str | tuple[str, str] = "jacobian"
    recurrence_scope: str = "diagonal"
    learning_signal: str = "symmetric"
    trace_filter: str = "none"
    update_schedule: str = "per_step"
    decay: float | tuple[float | None, float | None] | None = None
    kappa: float | None = None
    sparse_n: int | None = None
    window_size: int | None = None

    def __post_init__(self) -> None:
        _check_form(self)
        for name, value in _canonical(self).items():
            object.__setattr__(self, name, value)
        _check_axes(self)
        _check_decays(self)
        _check_coefficients(self)

    @property
    def is_factorized(self) -> bool:
        """Whether traces have an x side and an f side."""
        return self.trace_factorization in ("io_factorized", "hybrid")

    @property
    def recursion_x(self) -> str:
        """The recursion of the filtered input; ``AttributeError`` unless factorized, like the next three."""
        return self._side("temporal_recursion", 0)

    @property
    def recursion_f(self) -> str:
        """The recursion of the filtered sensitivity."""
        return self._side("temporal_recursion", 1)

    @property
    def decay_x(self) -> float:
        """The decay of the filtered input."""
        return self._side("decay", 0)

    @property
    def decay_f(self) -> float:
        """The decay of the filtered sensitivity."""
        return self._side("decay", 1)

    @property
    def include_recurrent_mixing(self) -> bool:
        """Whether :math:`D` contains the recurrent mixing between positions."""
        return self.recurrence_scope != "diagonal"

    def replace(self, **changes: Any) -> ETraceConfig:
        """The configuration with other values, checked anew.

        Parameters
        ----------
        **changes
            Arguments of the constructor; the others keep the form that they are stored in.
        """
        return dataclasses.replace(self, **changes)

    def describe(self) -> str:
        """The factorization, then whatever differs from the defaults, as arguments of the constructor."""
        names = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return _show(self, *dict.fromkeys(["trace_factorization", *names]))

    def _side(self, name: str, side: int) -> Any:
        if not self.is_factorized:
            raise AttributeError(f"{_show(self, 'trace_factorization')} has no x and f sides. Read {name}.")
        return getattr(self, name)[side]


def check_config(config: object, own: ETraceConfig) -> ETraceConfig:
    if not isinstance(config, ETraceConfig):
        raise TypeError(f"config must be an ETraceConfig, got {type(config).__name__}.")
    if config.trace_factorization != own.trace_factorization:
        raise ValueError(
            f"config has trace_factorization={config.trace_factorization!r}, this learner's engine is "
            f"{own.trace_factorization!r}. Use the learner of that engine, or braintrace.compile(model, config, ...)."
        )
    return config


def _check_form(c: ETraceConfig) -> None:
    """Each value by itself, before it is brought to its canonical form."""
    for axis, values in AXES.items():
        given = getattr(c, axis)
        for value in _entries(given) if axis in PAIRED else [given]:
            if not isinstance(value, str) or value not in values:
                raise ValueError(f"Unknown {axis} {value!r}. Pass one of {', '.join(map(repr, values))}.")
    for name in PAIRED:
        if isinstance(getattr(c, name), (tuple, list)):
            if not c.is_factorized:
                raise ValueError(
                    f"{_show(c, name)} is a pair, but {_show(c, 'trace_factorization')} has no x and f sides. Pass a "
                    "single value, or trace_factorization='io_factorized'."
                )
            if len(getattr(c, name)) != 2:
                raise ValueError(f"{_show(c, name)} is not a pair. Pass (x, f), or a single value for both sides.")
    for value in _entries(c.decay):
        if value is not None:
            _check_fraction("decay", value)


def _canonical(c: ETraceConfig) -> dict[str, object]:
    out: dict[str, object] = {}
    recursion, decay = c.temporal_recursion, c.decay
    if c.is_factorized:
        if isinstance(recursion, str):
            recursion = ("scalar_leak" if recursion == "jacobian" else recursion, recursion)
        decays = decay if isinstance(decay, (tuple, list)) else (decay, decay)
        sides = [_canonical_side(r, d, zero_is_none=True) for r, d in zip(recursion, decays)]
        out["temporal_recursion"], out["decay"] = zip(*sides)
    else:
        side = _canonical_side(recursion, decay, zero_is_none=recursion == "scalar_leak")
        out["temporal_recursion"], out["decay"] = side
    if _is_number(c.kappa):
        out["kappa"] = float(c.kappa)
        if c.trace_filter == "kappa" and c.kappa == 0:
            out |= {"trace_filter": "none", "kappa": None}
    if _is_number(c.sparse_n, numbers.Integral):
        out["sparse_n"] = int(c.sparse_n)
        if c.recurrence_scope == "sparse_n" and c.sparse_n == 1:
            out |= {"recurrence_scope": "coupled", "sparse_n": None}
    return out


def _canonical_side(recursion: Any, decay: Any, zero_is_none: bool) -> tuple[str, float | None]:
    if zero_is_none and decay == 0:
        recursion = "none"
    if recursion == "none":
        decay = decay or 0.0
    return recursion, None if decay is None else float(decay)


def _check_axes(c: ETraceConfig) -> None:
    """Axes against each other, but for the scopes of a factorization, which come last."""
    if any(r == "none" and d for r, d in _sides(c)):
        raise ValueError(
            f"{_show(c, 'temporal_recursion', 'decay')}: 'none' carries nothing over, so its decay is 0.0. Leave it "
            "out there (of a pair, pass 0.0), or pass the recursion 'scalar_leak'."
        )
    if c.update_schedule not in SCHEDULES:
        raise ValueError(f"{_show(c, 'update_schedule')} is not implemented. Pass 'per_step'.")
    if c.trace_filter not in FILTERS[c.trace_factorization]:
        raise ValueError(
            f"{_show(c, 'trace_filter')} filters a trace per parameter, but {_show(c, 'trace_factorization')} keeps "
            "none. Pass trace_filter='none', or trace_factorization='per_param'."
        )
    if c.include_recurrent_mixing and _sides(c)[-1][0] != "jacobian":
        raise ValueError(
            f"{_show(c, 'recurrence_scope')} is about the transition Jacobian, but "
            f"{_show(c, 'temporal_recursion')} does not use it. Pass recurrence_scope='diagonal', or the recursion "
            "'jacobian' (of f)."
        )
    if c.is_factorized and c.recursion_x == "jacobian":
        raise ValueError(
            f"{_show(c, 'temporal_recursion')}: the x side filters inputs, for which there is no transition Jacobian. "
            "Pass 'scalar_leak' or 'none' as its recursion."
        )


def _check_decays(c: ETraceConfig) -> None:
    if c.is_factorized:
        if None in (c.decay_x, c.decay_f):
            raise ValueError(
                f"{_show(c, 'decay')}, but under {_show(c, 'trace_factorization')} both sides decay. Pass "
                "decay=(x side, f side), or one number for both."
            )
    elif c.temporal_recursion == "jacobian" and c.decay is not None:
        raise ValueError(
            f"{_show(c, 'decay')} has no place in {_show(c, 'temporal_recursion')}, where the Jacobian alone carries "
            "the trace over. Pass decay=None, or temporal_recursion='scalar_leak'."
        )
    elif c.temporal_recursion == "scalar_leak" and c.decay is None:
        raise ValueError(f"{_show(c, 'temporal_recursion')} needs the factor of its leak. Pass decay, in [0, 1).")


def _check_coefficients(c: ETraceConfig) -> None:
    for name, (axis, category) in COEFFICIENTS.items():
        if getattr(c, axis) == category and getattr(c, name) is None:
            raise ValueError(f"{_show(c, axis)} needs its coefficient. Pass {name}.")
        if getattr(c, axis) != category and getattr(c, name) is not None:
            raise ValueError(
                f"{_show(c, name)} belongs to {axis}={category!r}, but {_show(c, axis)}. Pass {name}=None, or that "
                f"{axis}."
            )
    scopes = SCOPES[c.trace_factorization]
    if c.recurrence_scope not in scopes:
        raise ValueError(
            f"{_show(c, 'recurrence_scope')} is not defined for {_show(c, 'trace_factorization')}. Pass "
            f"recurrence_scope {' or '.join(map(repr, scopes))}, or another trace_factorization."
        )
    if c.kappa is not None:
        _check_fraction("kappa", c.kappa)
    if c.sparse_n is not None:
        if not _is_number(c.sparse_n, numbers.Integral):
            raise TypeError(f"sparse_n={c.sparse_n!r} counts steps. Pass an int of at least 1.")
        if c.sparse_n < 1:
            raise ValueError(f"sparse_n={c.sparse_n!r} reaches no neighbour. Pass an int of at least 1.")


def _check_fraction(name: str, value: object) -> None:
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, not {value!r} of type {type(value).__name__}. Pass one in [0, 1).")
    if not 0 <= float(value) < 1:
        raise ValueError(f"{name} {value!r} is outside [0, 1), so a trace would not fade. Pass a number in [0, 1).")


def _is_number(value: object, kind: type = numbers.Real) -> TypeGuard[float]:
    return isinstance(value, kind) and not isinstance(value, bool)


def _entries(value: object) -> list[object]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _sides(c: ETraceConfig) -> list[tuple[object, object]]:
    """Recursion and decay of each side; the last recursion is the one that may use D."""
    return list(zip(_entries(c.temporal_recursion), _entries(c.decay)))


def _show(c: ETraceConfig, *names: str) -> str:
    return ", ".join(f"{name}={getattr(c, name)!r}" for name in names)
