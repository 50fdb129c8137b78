"""The tables of evaluated runs, for evaluate.py and the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tfjacreg.experiments import curves
from tfjacreg.experiments.curves import Evaluation

_MEANINGS = {
    "boundary": "distance to the decision boundary along random directions",
    "distance": "distance to the nearest adversarial image found",
}
_AGAINST_SPHERES = "distance along random directions / distance to the nearest image found"
_AGAINST_SIGMA = "distance to the nearest image found / (margin / (sqrt(2) sigma))"
_NOT_TESTED = (
    "* Not tested: so many % of the images are right, but the attack has lost its gradient there."
)
_NONE_SHARED = "Left out: there is no point that every run classifies correctly."
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_HEAD = [f"{100 * q:g} %" for q in _QUANTILES]


class Table(NamedTuple):
    """A table before it is turned into text or Markdown.

    Attributes:
        title: What it shows.
        head: The names of the columns.
        rows: Rows with a cell for each column; the first cell names the method. Without rows there
            are the title and the note alone.
        note: The note below it, or nothing.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    def __str__(self) -> str:
        """The table as text, in columns."""
        return self.text()

    def text(self, width: int | None = None) -> str:
        """The table in columns; columns that do not fit follow below, with the methods' names.

        Args:
            width: The most characters in a line; None for any number.
        """
        if not self.rows:
            return f"{self.title}\n{self.note}"
        rows = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        parts: list[list[int]] = [[]]
        for column in range(1, len(widths)):
            taken = sum(widths[i] + 2 for i in [*parts[-1], column])
            if parts[-1] and width is not None and widths[0] + taken > width:
                parts.append([])
            parts[-1].append(column)
        lines = [
            row[0].ljust(widths[0]) + "".join(f"  {row[i]:>{widths[i]}}" for i in part)
            for part in parts
            for row in rows
        ]
        return "\n".join([self.title, *lines, *filter(None, [self.note])])


def robustness_tables(evaluations: Sequence[Evaluation], names: Sequence[str]) -> list[Table]:
    """The accuracies in percent: a table per data set and perturbation.

    An accuracy is marked if the attack had lost its gradient on images that are still classified
    correctly; a row below says for how many.
    """
    blocks = []
    for name in names:
        for dataset, methods in curves.curves(evaluations, name).items():
            strengths = next(iter(methods.values())).strength
            rows = []
            for method, c in methods.items():
                marks = ["", *np.where(c.untested, "*", "")]
                cells = (_spread(100 * a) for a in np.column_stack([c.clean, c.accuracy]).T)
                marked = [cell + mark for cell, mark in zip(cells, marks, strict=True)]
                rows.append([method, str(len(c.clean)), *marked])
                if c.untested.any():
                    shares = (_spread(100 * share) for share in c.faded.T)
                    rows.append(["  gradient faded", "", "", *shares])
            title = f"{dataset}, {curves.TITLES[name]}: accuracy in % against {curves.axis(name)}"
            head = ["method", "runs", "clean", *(f"{s:g}" for s in strengths)]
            untested = any(c.untested.any() for c in methods.values())
            blocks.append(Table(title, head, rows, _NOT_TESTED * untested))
    return blocks


def distance_tables(evaluations: Sequence[Evaluation], name: str = "boundary") -> list[Table]:
    """Distances to the boundary: a table per data set, without rows if runs share no point.

    Args:
        evaluations: The evaluated runs.
        name: "boundary" or "distance", as for `curves.distances`.
    """
    blocks = []
    gathered = curves.distances(evaluations, name)
    for dataset in dict.fromkeys(e.dataset for e in evaluations):
        if dataset not in gathered:
            blocks.append(Table(f"{dataset}: {_MEANINGS[name]}", [], [], _NONE_SHARED))
            continue
        methods = gathered[dataset]
        shared = next(iter(methods.values()))
        rows = [
            [
                method,
                str(len(d.values)),
                *(f"{q:.3f}" for q in _quantiles(d.values)),
                str(int(np.isinf(d.values).sum())),
            ]
            for method, d in methods.items()
        ]
        title = (
            f"{dataset}: {_MEANINGS[name]} (Euclidean, pixel units), quantiles over"
            f" the {shared.values.shape[1]} of {shared.points} points that every run gets right"
        )
        blocks.append(Table(title, ["method", "runs", *_HEAD, "none found"], rows))
    return blocks


def sigma_tables(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Quantiles of sigma over all points: a table per data set."""
    blocks = []
    for dataset, methods in curves.slopes(evaluations).items():
        rows = [
            [
                method,
                str(len(s.sigma)),
                f"{s.sigma.mean():.2f}",
                *(f"{q:.2f}" for q in _quantiles(s.sigma)),
                f"{s.sigma.max():.2f}",
            ]
            for method, s in methods.items()
        ]
        points = next(iter(methods.values())).sigma.shape[1]
        title = f"{dataset}: exact sigma (logits per pixel unit) at {points} points, quantiles"
        blocks.append(Table(title, ["method", "runs", "mean", *_HEAD, "largest"], rows))
    return blocks


def ratio_tables(evaluations: Sequence[Evaluation]) -> list[Table]:
    """The finite ones of `curves.ratios`: two tables per data set whose runs share points."""
    blocks = []
    for dataset, methods in curves.ratios(evaluations).items():
        points = next(iter(methods.values())).spheres.shape[1]
        for title, name in ((_AGAINST_SPHERES, "spheres"), (_AGAINST_SIGMA, "linear")):
            rows = []
            for method, found in methods.items():
                values: npt.NDArray[np.float64] = getattr(found, name)
                finite = values[np.isfinite(values)]
                cells = ["-"] * (len(_QUANTILES) + 1)
                if len(finite):
                    quantiles = (f"{q:.2f}" for q in _quantiles(finite))
                    cells = [*quantiles, f"{100 * (finite < 1).mean():.1f}"]
                rows.append([method, str(len(values)), *cells])
            head = ["method", "runs", *_HEAD, "below 1, in %"]
            blocks.append(Table(f"{dataset}: {title}, quantiles over {points} points", head, rows))
    return blocks


def _spread(values: npt.NDArray[np.float64]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{values.mean():.1f}±{values.std(ddof=1):.1f}"


def _quantiles(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # Without interpolation: some distances may be infinite.
    return np.quantile(values, _QUANTILES, method="inverted_cdf")
