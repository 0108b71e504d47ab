"""What the compiler does with loops and branches, as data."""

from __future__ import annotations

import dataclasses

__all__ = ["ControlFlowPolicy"]

CHOICES = {
    "cond": ("convert", "opaque"),
    "while_hidden": ("opaque-fwd", "error"),
    "etp_in_control_flow": ("error", "exclude"),
    "scan_descent": ("auto", "off"),
}


@dataclasses.dataclass(frozen=True)
class ControlFlowPolicy:
    """What the compiler does with the loops and branches of a step.

    Only *relevant* ones are touched: those that hold a marked operation, read a parameter or something computed from
    hidden states or operations, or write a hidden state. All others stay as they are.

    Parameters
    ----------
    cond : {'convert', 'opaque'}
        ``'convert'``: run every branch of a ``cond`` or ``switch`` and select among the results, so that operations
        inside are traced. ``'opaque'``: never; a parameter inside is then refused.
    scan_unroll_limit : int
        Scans of at most this length are unrolled: every sub-step has its own operations. 0 or less: none.
    while_hidden : {'opaque-fwd', 'error'}
        ``'opaque-fwd'``: a ``while`` loop that stands between hidden states is kept, and differentiated in forward
        mode. ``'error'``: it is refused.
    etp_in_control_flow : {'error', 'exclude'}
        What to do with a marked operation, of a constant, that is left inside a loop or branch: refuse it, or leave it
        to plain JAX with a warning.
    scan_descent : {'auto', 'off'}
        ``'auto'``: follow longer scans in place, if they carry the hidden state forward from its value at the start
        of the step: one relation for all sub-steps of an operation, for every learning rule. ``'off'``: refuse them.
    fixpoint_iteration_limit : int
        How many loops and branches may stand inside one another where they are unrolled or converted.

    Raises
    ------
    ValueError
        If a value is none of these.

    Examples
    --------
    >>> import braintrace
    >>> policy = braintrace.ControlFlowPolicy(scan_unroll_limit=32)
    >>> policy.cond
    'convert'
    >>> braintrace.ControlFlowPolicy(cond='both')
    Traceback (most recent call last):
        ...
    ValueError: cond must be 'convert' or 'opaque', got 'both'.
    """

    __module__ = "braintrace"

    cond: str = "convert"
    scan_unroll_limit: int = 16
    while_hidden: str = "opaque-fwd"
    etp_in_control_flow: str = "error"
    scan_descent: str = "auto"
    fixpoint_iteration_limit: int = 64

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if not (isinstance(value, str) and value in allowed):
                raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}.")
        if not _is_int(self.scan_unroll_limit):
            raise ValueError(f"scan_unroll_limit must be an int, got {self.scan_unroll_limit!r}.")
        if not _is_int(self.fixpoint_iteration_limit) or self.fixpoint_iteration_limit < 1:
            raise ValueError(f"fixpoint_iteration_limit must be a positive int, got {self.fixpoint_iteration_limit!r}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
