"""What ``decay_or_rank`` may be: a decay, a rank, a time constant, a pair of these, or a mapping from parameters."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence

import brainstate
import brainunit as u

from .._compiler.relations import HiddenParamOpRelation
from .._types import Path, names_of, path_str

__all__ = ["Decays"]

Pair = tuple[float, float]


class Decays:
    """The decays of the two filters of pp_prop, (x side, f side), by parameter.

    ``by_prefix`` maps beginnings of paths, as names, to pairs; the longest that fits a parameter counts. The empty one
    fits every parameter.
    """

    def __init__(self, value: object):
        self.is_mapping = isinstance(value, Mapping)
        given = value if isinstance(value, Mapping) else {(): value}
        self.by_prefix = {names_of(key): _pair(entry) for key, entry in given.items()}
        if not self.by_prefix:
            raise ValueError("decay_or_rank is an empty mapping. Pass a decay, or path -> decay; () stands for all.")

    @property
    def first(self) -> Pair:
        """That of the empty prefix, or else the first one."""
        return self.by_prefix.get((), next(iter(self.by_prefix.values())))

    @property
    def common(self) -> Pair | None:
        """The pair of all parameters, if it is one."""
        found = set(self.by_prefix.values())
        return found.pop() if len(found) == 1 else None

    def of(self, relations: Sequence[HiddenParamOpRelation]) -> dict[int, Pair]:
        """By relation number.

        Raises
        ------
        ValueError
            If a parameter has no decay, an operation has parameters of several, or a prefix is of no parameter.
        """
        found: dict[int, Pair] = {}
        used: set[tuple[str, ...]] = set()
        for i, r in enumerate(relations):
            prefixes = {p: self._prefix_of(p) for p in r.parameter_paths}
            pairs = {self.by_prefix[prefix] for prefix in prefixes.values()}
            if len(pairs) > 1:
                shown = ", ".join(f"{path_str(p)}: {self.by_prefix[prefix]}" for p, prefix in prefixes.items())
                raise ValueError(f"One operation has one pair of decays; decay_or_rank gives its parameters {shown}.")
            found[i] = pairs.pop()
            used.update(prefixes.values())
        unused = [".".join(prefix) for prefix in self.by_prefix if prefix and prefix not in used]
        if unused:
            known = ", ".join(dict.fromkeys(path_str(p) for r in relations for p in r.parameter_paths))
            raise ValueError(f"decay_or_rank names {', '.join(unused)}, and the parameters with traces are {known}.")
        return found

    def _prefix_of(self, path: Path) -> tuple[str, ...]:
        names = names_of(path)
        fits = [names[:n] for n in range(len(names), -1, -1) if names[:n] in self.by_prefix]
        if not fits:
            raise ValueError(
                f"decay_or_rank has no entry for the parameter {path_str(path)!r}. Add its path, a prefix of it, or () "
                "for all others."
            )
        return fits[0]


def _pair(value: object) -> Pair:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"decay_or_rank takes a float, an int, or a pair of these, got {len(value)} entries.")
        return _decay(value[0]), _decay(value[1])
    return _decay(value), _decay(value)


def _decay(value: object) -> float:
    if isinstance(value, bool) or (hasattr(value, "dtype") and value.dtype == bool):
        raise TypeError(f"decay_or_rank takes a float in [0, 1) or an int >= 1, got the bool {value}.")
    if isinstance(value, u.Quantity) and not u.is_unitless(value):
        return _decay_of_time(value)
    if isinstance(value, numbers.Integral):
        if value < 1:
            raise ValueError(f"As a rank, decay_or_rank must be at least 1, got {value}.")
        return (int(value) - 1) / (int(value) + 1)
    if isinstance(value, numbers.Real):
        if not 0.0 <= float(value) < 1.0:
            raise ValueError(f"As a decay, decay_or_rank must lie in [0, 1), got {value}. Ranks are ints.")
        return float(value)
    number = "; it is a number of Python or NumPy, float(x) of an array" if hasattr(value, "dtype") else ""
    raise ValueError(f"decay_or_rank takes a float, an int, or a pair of these, got {type(value).__name__}{number}.")


def _decay_of_time(tau: u.Quantity) -> float:
    """``exp(-dt / tau)``, with the present time step."""
    dt = brainstate.environ.get("dt", None)
    if dt is None:
        raise ValueError(
            f"decay_or_rank={tau} is a time constant, which needs the time step. Call brainstate.environ.set(dt=...) "
            "before the learner is made, or pass the decay exp(-dt / tau)."
        )
    steps = tau / dt
    if not u.is_unitless(steps):
        raise ValueError(f"decay_or_rank={tau} must have the unit of a time, as the time step dt={dt} has.")
    count = float(u.get_magnitude(u.Quantity(steps)))
    if not count > 0:
        raise ValueError(f"As a time constant, decay_or_rank must be positive, got {tau}.")
    return math.exp(-1.0 / count)
