"""How near gradients are to those of back-propagation through time: numbers, table, drawing."""

from __future__ import annotations

import functools
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from ._types import Path, PyTree, path_str

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ALL", "BPTT", "Comparison"]

BPTT, ALL = "BPTT", "all"


class Agreement(NamedTuple):
    """How near a gradient is to that of BPTT: numbers, or arrays over lags."""

    cosine: PyTree
    norm_ratio: PyTree
    sign_agreement: PyTree


class Row(NamedTuple):
    parameter: Path | str
    rule: str
    cosine: float
    norm_ratio: float
    sign_agreement: float


class Comparison:
    """Gradients of one loss by several rules and by BPTT, and how near they are: what :func:`compare` returns.

    Parameters
    ----------
    gradients : mapping
        Label -> path -> gradient. The label ``'BPTT'`` is back-propagation through time.
    lags : tuple of int
        Lags between cause and loss; an entry stands for all lags above the one before it.
    gradients_by_lag : mapping, optional
        As ``gradients``, with lags as an additional axis 0 of every array.

    Attributes
    ----------
    rules : list of str
        The labels but ``'BPTT'``.
    agreement : dict
        Label -> path, or ``'all'`` for all parameters as one vector -> ``(cosine, norm_ratio, sign_agreement)``.
    by_lag : dict
        The same with an array over ``lags`` for each number.
    table : list of named tuples
        ``(parameter, rule, cosine, norm_ratio, sign_agreement)``; ``pandas.DataFrame(comparison.table)`` is a frame.
        The text of a comparison shows it.
    best : dict
        Path, or ``'all'`` -> label of the rule with the highest cosine; of equal ones the first, and ``None`` where the
        gradient of BPTT is zero.

    Notes
    -----
    ``sign_agreement`` is the fraction of the entries where BPTT is not zero whose sign is that of BPTT. Numbers are
    ``nan`` where the gradient of BPTT is zero. Of a quantity the mantissa counts, and a complex entry is two real ones.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> same = {('w',): jnp.array([3.0, 4.0])}
    >>> comparison = braintrace.Comparison({'BPTT': same, 'half': {('w',): jnp.array([1.5, 2.0])}})
    >>> print(comparison)
    Agreement with BPTT
      parameter  rule  cosine  norm ratio  same sign
      w          half  1.0000  0.5000      1.0000
      all        half  1.0000  0.5000      1.0000
    """

    __module__ = "braintrace"

    def __init__(
        self,
        gradients: Mapping[str, Mapping[Any, PyTree]],
        lags: tuple[int, ...] = (),
        gradients_by_lag: Mapping[str, Mapping[Any, PyTree]] | None = None,
    ):
        self.gradients = gradients
        self.lags = lags
        self.gradients_by_lag = gradients_by_lag

    @property
    def rules(self) -> list[str]:
        return [label for label in self.gradients if label != BPTT]

    @functools.cached_property
    def agreement(self) -> dict[str, dict[Path | str, Agreement]]:
        vectors = {label: _vectors(found) for label, found in self.gradients.items()}
        return {
            label: {path: _agreement(v, vectors[BPTT][path]) for path, v in vectors[label].items()}
            for label in self.rules
        }

    @functools.cached_property
    def by_lag(self) -> dict[str, dict[Path | str, Agreement]]:
        if not self.lags or self.gradients_by_lag is None:
            raise ValueError("There is nothing by lag. Pass lags to compare: lags=20 for the lags 0 to 19.")
        places = range(len(self.lags))
        vectors = {
            label: [_vectors(jax.tree.map(lambda x, i=i: x[i], found)) for i in places]
            for label, found in self.gradients_by_lag.items()
        }
        return {
            label: {
                path: Agreement(
                    *map(np.array, zip(*(_agreement(vectors[label][i][path], vectors[BPTT][i][path]) for i in places)))
                )
                for path in vectors[label][0]
            }
            for label in self.rules
        }

    @property
    def table(self) -> list[Row]:
        paths = [*self.gradients[BPTT], ALL]
        return [Row(path, label, *self.agreement[label][path]) for path in paths for label in self.rules]

    @property
    def best(self) -> dict[Path | str, str | None]:
        found: dict[Path | str, str | None] = {}
        for path in [*self.gradients[BPTT], ALL]:
            cosines = {label: round(self.agreement[label][path].cosine, 6) for label in self.rules}
            known = [label for label, cosine in cosines.items() if not math.isnan(cosine)]
            found[path] = max(known, key=lambda label: cosines[label]) if known else None
        return found

    def plot(self, ax: Axes | None = None, *, parameter: Path | str = ALL, quantity: str = "cosine") -> Axes:
        """Draw the agreement over the lags, or, without lags, a bar for each parameter and rule.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            By default a new one.
        parameter : path or 'all'
            Whose profile over the lags is drawn.
        quantity : {'cosine', 'norm_ratio', 'sign_agreement'}

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ImportError
            Without matplotlib, which the extra ``plot`` installs.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError(
                "Comparison.plot draws by matplotlib, which is not installed. Install the extra: "
                "pip install 'braintrace[plot]'. print(comparison) shows the numbers without it."
            ) from error
        if quantity not in Agreement._fields:
            raise ValueError(f"quantity must be one of {Agreement._fields}, got {quantity!r}.")
        paths = [*self.gradients[BPTT], ALL]
        if parameter not in paths:
            raise ValueError(f"parameter must be a path or 'all', one of {paths}, got {parameter!r}.")
        ax = pyplot.subplots(layout="constrained")[1] if ax is None else ax
        for i, label in enumerate(self.rules):
            if self.lags:
                ax.plot(self.lags, getattr(self.by_lag[label][parameter], quantity), marker=".", label=label)
            else:
                width = 0.8 / len(self.rules)
                heights = [getattr(self.agreement[label][path], quantity) for path in paths]
                ax.bar(np.arange(len(paths)) + width * i, heights, width, label=label)
        if self.lags:
            ax.set(xlabel="lag between cause and loss, steps", title=_name(parameter))
        else:
            middle = np.arange(len(paths)) + 0.4 - 0.4 / len(self.rules)
            ax.set_xticks(middle, [_name(path) for path in paths], rotation=30, ha="right")
        ax.set_ylabel(f"{quantity.replace('_', ' ')}, rule and BPTT")
        ax.legend()
        return ax

    def _sections(self) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        columns: tuple[str, ...] = ("parameter", "rule", "cosine", "norm ratio", "same sign")
        rows: list[tuple[str, ...]] = [(_name(r.parameter), str(r.rule), *map(_number, r[2:])) for r in self.table]
        if len(self.rules) > 1:
            best = self.best
            columns += ("best",)
            rows = [(*row, "*" * (best[r.parameter] == r.rule)) for row, r in zip(rows, self.table)]
        yield "Agreement with BPTT", columns, rows
        if self.lags:
            shown = sorted({int(i) for i in np.linspace(0, len(self.lags) - 1, min(10, len(self.lags)))})
            cosines = {label: self.by_lag[label][ALL].cosine for label in self.rules}
            lagged: list[tuple[str, ...]] = [(str(k), *(_number(v[i]) for i in shown)) for k, v in cosines.items()]
            yield "Cosine by lag, all parameters", ("rule", *(str(self.lags[i]) for i in shown)), lagged

    def __str__(self) -> str:
        parts = []
        for title, columns, rows in self._sections():
            widths = [max(map(len, column)) for column in zip(columns, *rows)]
            lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in (columns, *rows)]
            parts.append("\n".join([title, *(f"  {line}" for line in lines)]))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        return "".join(
            f"<table><caption>{title}</caption>{row(columns, 'th')}{''.join(row(r, 'td') for r in rows)}</table>"
            for title, columns, rows in self._sections()
        )

    def __repr__(self) -> str:
        return f"Comparison(rules={self.rules}, parameters={len(self.gradients[BPTT])}, lags={len(self.lags)})"


def _name(path: Path | str) -> str:
    return path if isinstance(path, str) else path_str(path)


def _number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.4f}" if abs(x) < 1e4 else f"{x:.1e}"


def _vector(tree: PyTree) -> np.ndarray:
    """All entries as real float64 numbers."""
    leaves = [np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)]
    parts = [np.stack([x.real, x.imag]) if np.iscomplexobj(x) else x for x in leaves]
    return np.concatenate([np.ravel(x).astype(np.float64) for x in parts] or [np.zeros(0)])


def _vectors(gradient: Mapping[Path | str, PyTree]) -> dict[Path | str, np.ndarray]:
    found: dict[Path | str, np.ndarray] = {path: _vector(value) for path, value in gradient.items()}
    return {**found, ALL: np.concatenate([*found.values()] or [np.zeros(0)])}


def _agreement(ours: np.ndarray, exact: np.ndarray) -> Agreement:
    a, b = np.linalg.norm(ours), np.linalg.norm(exact)
    if not b:
        return Agreement(math.nan, math.nan, math.nan)
    some = exact != 0
    signs = (np.sign(ours[some]) == np.sign(exact[some])).mean()
    return Agreement(float(ours / a @ (exact / b)) if a else 0.0, float(a / b), float(signs))
