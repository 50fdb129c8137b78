"""The numbers behind tables and figures of judged runs, and the tables as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

TITLES = {"noise": "White noise", "pgd": "PGD", "tpgd": "TPGD", "square": "Square"}
_AXES = {"noise": "noise variance (squared pixel units)", "square": "queries"}


class Evaluation(NamedTuple):
    """One judged run.

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
    """

    strength: npt.NDArray[np.float64]
    clean: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]


class Distances(NamedTuple):
    """Distances to the boundary of the points that every run classifies correctly.

    Attributes:
        values: Distances of each run, `[R, P]`; infinite beyond the largest radius tried.
        points: Number of points in the test set.
    """

    values: npt.NDArray[np.float64]
    points: int


def curves(evaluations: Sequence[Evaluation], name: str) -> dict[str, dict[str, Curve]]:
    """Gathers the curves of one perturbation by data set and method.

    Args:
        evaluations: The judged runs.
        name: "noise", "pgd", "tpgd" or "square".

    Returns:
        Curve of each method of each data set, in the order of the runs.

    Raises:
        ValueError: If runs of one method were judged at different strengths.
    """
    strength = "variance" if name == "noise" else "iterations"
    gathered: dict[str, dict[str, Curve]] = {}
    for dataset, method in dict.fromkeys((e.dataset, e.method) for e in evaluations):
        results = [e.result for e in evaluations if (e.dataset, e.method) == (dataset, method)]
        grids = [r[name][strength] for r in results]
        if any(grid != grids[0] for grid in grids):
            raise ValueError(f"{method} on {dataset} must share strengths. Received: {grids}.")
        gathered.setdefault(dataset, {})[method] = Curve(
            np.array(grids[0], float),
            np.array([r["clean_accuracy"] for r in results]),
            np.array([r[name]["accuracy"] for r in results]),
        )
    return gathered


def distances(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, Distances]]:
    """Gathers the boundary distances by data set and method.

    Args:
        evaluations: The judged runs.

    Returns:
        Distances of each method of each data set, for the points all its runs get right.

    Raises:
        ValueError: If runs on one data set were judged on different numbers of points, or share
            no correctly classified one.
    """
    gathered: dict[str, dict[str, Distances]] = {}
    for dataset in dict.fromkeys(e.dataset for e in evaluations):
        runs = [e for e in evaluations if e.dataset == dataset]
        counts = {len(e.result["boundary_distance"]) for e in runs}
        if len(counts) > 1:
            raise ValueError(f"Runs on {dataset} must share their points. Received: {counts}.")
        count = counts.pop()
        shared = np.ones(count, bool)
        for run in runs:
            shared[run.result["boundary"]["misclassified"]] = False
        if not shared.any():
            raise ValueError(f"There is no point on {dataset} that every run classifies correctly.")
        gathered[dataset] = {
            method: Distances(
                np.array(
                    [
                        # null marks the misclassified, dropped here, and the unreached.
                        np.array(
                            [np.inf if d is None else d for d in e.result["boundary_distance"]]
                        )[shared]
                        for e in runs
                        if e.method == method
                    ]
                ),
                count,
            )
            for method in dict.fromkeys(e.method for e in runs)
        }
    return gathered


def axis(name: str) -> str:
    """What the strength of a perturbation counts."""
    return _AXES.get(name, "iterations")


def robustness_table(evaluations: Sequence[Evaluation], names: Sequence[str]) -> str:
    """Formats the accuracies, in percent, as text: one block per data set and perturbation."""
    blocks = []
    for name in names:
        for dataset, methods in curves(evaluations, name).items():
            strength = next(iter(methods.values())).strength
            head = ["clean", *(f"{s:g}" for s in strength)]
            rows = [
                [
                    method,
                    str(len(c.clean)),
                    *(_spread(100 * a) for a in np.column_stack([c.clean, c.accuracy]).T),
                ]
                for method, c in methods.items()
            ]
            title = f"{dataset}, {TITLES[name]}: accuracy in % against {axis(name)}"
            blocks.append(_layout(title, ["method", "runs", *head], rows))
    return "\n\n".join(blocks)


def boundary_table(evaluations: Sequence[Evaluation]) -> str:
    """Formats the boundary distances as text: one block per data set."""
    blocks = []
    for dataset, methods in distances(evaluations).items():
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
            f"{dataset}: distance to the decision boundary (Euclidean, pixel units), quantiles over"
            f" the {shared.values.shape[1]} of {shared.points} points that every run gets right"
        )
        head = ["method", "runs", "5 %", "25 %", "50 %", "75 %", "95 %", "none found"]
        blocks.append(_layout(title, head, rows))
    return "\n\n".join(blocks)


def _spread(values: npt.NDArray[np.float64]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{values.mean():.1f}±{values.std(ddof=1):.1f}"


def _quantiles(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # Not interpolated: some distances may be infinite.
    return np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95], method="inverted_cdf")


def _layout(title: str, head: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
    return "\n".join([title, *lines])
