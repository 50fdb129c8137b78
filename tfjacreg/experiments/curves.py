"""The numbers behind the tables and figures of evaluated runs."""

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


class Ratios(NamedTuple):
    """Ratios at the points that every run classifies correctly; NaN or infinite if there is none.

    Attributes:
        spheres: The distance along random directions by the one to the nearest image found,
            `[R, P]`.
        linear: The distance to the nearest image found by `margin / (sqrt(2) sigma)`, which the
            margin and sigma alone would give, `[R, P]`.
    """

    spheres: npt.NDArray[np.float64]
    linear: npt.NDArray[np.float64]


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


def ratios(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, Ratios]]:
    """Gathers how distances, sigma and the margin compare by data set and method.

    Args:
        evaluations: The evaluated runs, with everything that is measured at a point.

    Returns:
        The ratios of each method of each data set whose runs share points.

    Raises:
        ValueError: If runs on one data set were evaluated on different numbers of points.
    """
    gathered: dict[str, dict[str, Ratios]] = {}
    for dataset, runs in _by_dataset(evaluations).items():
        shared = _shared(dataset, runs, "distance")
        if not shared.any():
            continue
        gathered[dataset] = {}
        for method, repeats in _by_method(runs).items():
            spheres, nearest = (
                _distances(repeats, name)[:, shared] for name in ("boundary", "distance")
            )
            slope = slopes(repeats)[dataset][method]
            # The margin is positive where an image is classified correctly, and sigma where the
            # class can change nearby. Where it cannot, both distances may be infinite.
            with np.errstate(divide="ignore", invalid="ignore"):
                linear = slope.margin[:, shared] / (math.sqrt(2) * slope.sigma[:, shared])
                gathered[dataset][method] = Ratios(spheres / nearest, nearest / linear)
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
