"""The numbers behind the tables and figures of evaluated runs, and the tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tfjacreg.experiments.evaluation_records import DISTANCES, strength

TITLES = {
    "noise": "White noise",
    "pgd": "PGD",
    "pgd_margin": "PGD on the margin",
    "tpgd": "TPGD",
    "square": "Square",
}
_AXES = {"noise": "noise variance (squared pixel units)", "square": "queries"}
# An accuracy is marked as not tested if the attack has lost its gradient on at least this share of
# the images and they are still classified correctly.
FADED = 0.01
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


class Evaluation(NamedTuple):
    """One evaluated run.

    Attributes:
        dataset: Name of the data set.
        method: Name of the training method; its runs are the repeats.
        result: Content of `evaluation.json`.
    """

    dataset: str
    method: str
    result: dict[str, Any]


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


class Curve(NamedTuple):
    """Accuracy against strength, over the repeats of one method.

    Attributes:
        strength: Strengths `[S]`.
        clean: Clean accuracy of each run, `[R]`.
        accuracy: Accuracy of each run at each strength, `[R, S]`.
        faded: Share of the images that were still classified correctly although the attack had lost
            its gradient, `[R, S]`; 0 if it was not recorded.
    """

    strength: npt.NDArray[np.float64]
    clean: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]
    faded: npt.NDArray[np.float64]

    @property
    def untested(self) -> npt.NDArray[np.bool_]:
        """Where the mean accuracy is marked, `[S]`."""
        return self.faded.mean(axis=0) >= FADED


class Distances(NamedTuple):
    """Distances to the boundary at the points that every run classifies correctly.

    Attributes:
        values: Distances of each run, `[R, P]`, in pixel units; infinite where none was found.
        points: Number of points in the test set.
    """

    values: npt.NDArray[np.float64]
    points: int


class Slopes(NamedTuple):
    """The exact spectral norm at each point, and the margin.

    Attributes:
        sigma: Logits per pixel unit, of each run, `[R, P]`.
        margin: The logit of the label minus the largest other, `[R, P]`.
    """

    sigma: npt.NDArray[np.float64]
    margin: npt.NDArray[np.float64]


def curves(evaluations: Sequence[Evaluation], name: str) -> dict[str, dict[str, Curve]]:
    """Gathers the curves of one perturbation by data set and method.

    Args:
        evaluations: The evaluated runs.
        name: One of the keys of `TITLES`.

    Returns:
        The curve of each method of each data set, in the order of the runs; without those that were
        not evaluated under this perturbation.

    Raises:
        ValueError: If runs of one method were evaluated at different strengths.
    """
    gathered: dict[str, dict[str, Curve]] = {}
    judged = [e for e in evaluations if name in e.result]
    for dataset, method in dict.fromkeys((e.dataset, e.method) for e in judged):
        results = [e.result for e in judged if (e.dataset, e.method) == (dataset, method)]
        grids = [r[name][strength(name)] for r in results]
        if any(grid != grids[0] for grid in grids):
            raise ValueError(f"{method} on {dataset} must share strengths. Received: {grids}.")
        gathered.setdefault(dataset, {})[method] = Curve(
            np.array(grids[0], float),
            np.array([r["clean_accuracy"] for r in results]),
            np.array([r[name]["accuracy"] for r in results]),
            np.array([r[name].get("faded", np.zeros(len(grids[0]))) for r in results]),
        )
    return gathered


def distances(
    evaluations: Sequence[Evaluation], name: str = "boundary"
) -> dict[str, dict[str, Distances]]:
    """Gathers the distances to the boundary by data set and method.

    Args:
        evaluations: The evaluated runs.
        name: "boundary", along random directions, or "distance", to the nearest image found.

    Returns:
        The distances of each method of each data set, at the points that all runs get right;
        without the data sets of which they all get none right.

    Raises:
        ValueError: If runs on one data set were evaluated on different numbers of points.
    """
    gathered: dict[str, dict[str, Distances]] = {}
    for dataset, runs in _by_dataset(evaluations).items():
        shared = _shared(dataset, runs, name)
        if shared.any():
            gathered[dataset] = {
                method: Distances(_distances(repeats, name)[:, shared], len(shared))
                for method, repeats in _by_method(runs).items()
            }
    return gathered


def slopes(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, Slopes]]:
    """Gathers sigma and the margin at all points by data set and method.

    Args:
        evaluations: The evaluated runs.

    Returns:
        Sigma and margin for each method of each data set.

    Raises:
        ValueError: If runs on one data set were evaluated on different numbers of points.
    """
    gathered: dict[str, dict[str, Slopes]] = {}
    for dataset, runs in _by_dataset(evaluations).items():
        count = _count(dataset, runs, "sigma")
        if {len(e.result["margin"]) for e in runs} != {count}:
            raise ValueError(f"Runs on {dataset} must have a margin for each sigma.")
        gathered[dataset] = {
            method: Slopes(
                *(np.array([e.result[k] for e in repeats], float) for k in ("sigma", "margin"))
            )
            for method, repeats in _by_method(runs).items()
        }
    return gathered


def _by_dataset(evaluations: Sequence[Evaluation]) -> dict[str, list[Evaluation]]:
    names = dict.fromkeys(e.dataset for e in evaluations)
    return {name: [e for e in evaluations if e.dataset == name] for name in names}


def _by_method(runs: Sequence[Evaluation]) -> dict[str, list[Evaluation]]:
    names = dict.fromkeys(e.method for e in runs)
    return {name: [e for e in runs if e.method == name] for name in names}


def _count(dataset: str, runs: Sequence[Evaluation], key: str) -> int:
    counts = {len(e.result[key]) for e in runs}
    if len(counts) > 1:
        raise ValueError(f"Runs on {dataset} must share their points. Received: {counts}.")
    return counts.pop()


def _shared(dataset: str, runs: Sequence[Evaluation], name: str) -> npt.NDArray[np.bool_]:
    """Which points every run classifies correctly, `[P]`."""
    shared = np.ones(_count(dataset, runs, DISTANCES[name]), bool)
    for run in runs:
        shared[run.result[name]["misclassified"]] = False
    return shared


def _distances(runs: Sequence[Evaluation], name: str) -> npt.NDArray[np.float64]:
    # null marks images that are misclassified, and those where no distance was found.
    listed = [e.result[DISTANCES[name]] for e in runs]
    return np.array([[np.inf if d is None else d for d in row] for row in listed], float)


def unit(name: str) -> str:
    """The unit of a strength, to be written after or before its number."""
    return {"noise": "(variance)", "square": "queries"}.get(name, "steps")


def axis(name: str) -> str:
    """The name of the axis of a perturbation's strength."""
    return _AXES.get(name, "iterations")


def robustness_tables(evaluations: Sequence[Evaluation], names: Sequence[str]) -> list[Table]:
    """The accuracies in percent: a table per data set and perturbation.

    An accuracy is marked if the attack had lost its gradient on images that are still classified
    correctly; a row below says for how many.
    """
    blocks = []
    for name in names:
        for dataset, methods in curves(evaluations, name).items():
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
            title = f"{dataset}, {TITLES[name]}: accuracy in % against {axis(name)}"
            head = ["method", "runs", "clean", *(f"{s:g}" for s in strengths)]
            untested = any(c.untested.any() for c in methods.values())
            blocks.append(Table(title, head, rows, _NOT_TESTED * untested))
    return blocks


def distance_tables(evaluations: Sequence[Evaluation], name: str = "boundary") -> list[Table]:
    """Distances to the boundary: a table per data set, without rows if runs share no point.

    Args:
        evaluations: The evaluated runs.
        name: "boundary" or "distance", as for `distances`.
    """
    blocks = []
    gathered = distances(evaluations, name)
    for dataset in _by_dataset(evaluations):
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
    for dataset, methods in slopes(evaluations).items():
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
    """Ratios of the distances at each point: two tables per data set whose runs share points.

    One compares the distance along random directions with the distance to the nearest image found.
    The other compares the latter with the distance that the margin and sigma alone would give,
    `margin / (sqrt(2) sigma)`.
    """
    blocks = []
    for dataset, runs in _by_dataset(evaluations).items():
        shared = _shared(dataset, runs, "distance")
        if not shared.any():
            continue
        ratios: dict[str, list[list[str]]] = {_AGAINST_SPHERES: [], _AGAINST_SIGMA: []}
        for method, repeats in _by_method(runs).items():
            spheres, nearest = (
                _distances(repeats, name)[:, shared] for name in ("boundary", "distance")
            )
            slope = slopes(repeats)[dataset][method]
            # The margin is positive where an image is classified correctly, and sigma where the
            # class can change nearby. Where it cannot, both distances may be infinite.
            with np.errstate(divide="ignore", invalid="ignore"):
                linear = slope.margin[:, shared] / (math.sqrt(2) * slope.sigma[:, shared])
                found = {_AGAINST_SPHERES: spheres / nearest, _AGAINST_SIGMA: nearest / linear}
            for title, ratio in found.items():
                ratio = ratio[np.isfinite(ratio)]
                cells = ["-"] * (len(_QUANTILES) + 1)
                if len(ratio):
                    quantiles = (f"{q:.2f}" for q in _quantiles(ratio))
                    cells = [*quantiles, f"{100 * (ratio < 1).mean():.1f}"]
                ratios[title].append([method, str(len(repeats)), *cells])
        head = ["method", "runs", *_HEAD, "below 1, in %"]
        blocks += [
            Table(f"{dataset}: {title}, quantiles over {shared.sum()} points", head, rows)
            for title, rows in ratios.items()
        ]
    return blocks


def _spread(values: npt.NDArray[np.float64]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{values.mean():.1f}±{values.std(ddof=1):.1f}"


def _quantiles(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # Without interpolation: some distances may be infinite.
    return np.quantile(values, _QUANTILES, method="inverted_cdf")
