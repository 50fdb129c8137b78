"""The pictures of how distances to the decision boundary and slopes are distributed over points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from tfjacreg.experiments import curves
from tfjacreg.experiments.curves import Distances, Evaluation
from tfjacreg.experiments.figures import save, styles

# With room for a legend beside the panel.
_WIDE = 9.0


def boundary_figure(evaluations: Sequence[Evaluation], path: str | Path) -> None:
    """Draws how the distances to the decision boundary are distributed (Figure 4).

    One panel per data set: for each method the share of points, over all its runs, that have a
    boundary within the given distance. Only points that every run classifies correctly count.

    Args:
        evaluations: The judged runs.
        path: PNG file to write.
    """
    gathered = curves.distances(evaluations)
    figure, panels = _panels(gathered)
    drawn_as = styles(evaluations)
    for ax, (dataset, methods) in zip(panels, gathered.items(), strict=True):
        for method, found in methods.items():
            label = f"{method} (median {np.median(found.values):.2f})"
            _draw_shares(ax, found.values, label=label, color=drawn_as[method].color)
        ax.set_title(_title(dataset, methods))
        ax.set_xlabel("distance to the decision boundary (Euclidean, pixel units)")
        ax.set_ylabel("points within (%)")
        ax.set_xlim(left=0)
        ax.legend(loc="lower right")
    save(figure, path)


def distance_figure(evaluations: Sequence[Evaluation], path: str | Path) -> None:
    """Draws the distances to the nearest image found, beside those along random directions.

    One panel per data set, as in `boundary_figure`, with a logarithmic axis. The distances along
    random directions are there if all runs have them.

    Args:
        evaluations: The judged runs.
        path: PNG file to write.
    """
    names = ["distance"]
    if all("boundary" in e.result for e in evaluations):
        names.append("boundary")
    measured = [curves.distances(evaluations, name) for name in names]
    figure, panels = _panels(measured[0], _WIDE)
    drawn_as = styles(evaluations)
    for ax, dataset in zip(panels, measured[0], strict=True):
        for method, style in drawn_as.items():
            medians = []
            for gathered, line in zip(measured, ("-", "--"), strict=False):
                if method in gathered[dataset]:
                    values = gathered[dataset][method].values
                    _draw_shares(ax, values, color=style.color, linestyle=line)
                    medians.append(f"{np.median(values):.2f}")
            if medians:
                label = f"{method} (median {' and '.join(medians)})"
                ax.plot([], [], color=style.color, label=label)
        ax.set_title(_title(dataset, measured[0][dataset]))
        ax.set_xlabel("distance to another class (Euclidean, pixel units)")
        ax.set_ylabel("points within (%)")
        if len(names) > 1:
            ax.plot([], [], color="gray", label="nearest image found")
            ax.plot([], [], color="gray", linestyle="--", label="along random directions")
        _logarithmic(ax)
    save(figure, path)


def sigma_figure(evaluations: Sequence[Evaluation], path: str | Path) -> None:
    """Draws how the spectral norm of the Jacobian is distributed, on a logarithmic axis.

    One panel per data set: for each method the share of all points, over all its runs, where sigma
    is at most the given number.

    Args:
        evaluations: The judged runs.
        path: PNG file to write.
    """
    gathered = curves.slopes(evaluations)
    figure, panels = _panels(gathered, _WIDE)
    drawn_as = styles(evaluations)
    for ax, (dataset, methods) in zip(panels, gathered.items(), strict=True):
        for method, slope in methods.items():
            label = f"{method} (median {np.median(slope.sigma):.2f})"
            _draw_shares(ax, slope.sigma, label=label, color=drawn_as[method].color)
        points = next(iter(methods.values())).sigma.shape[1]
        ax.set_title(f"{dataset}: {points} points")
        ax.set_xlabel("exact sigma (logits per pixel unit)")
        ax.set_ylabel("points with at most that (%)")
        _logarithmic(ax)
    save(figure, path)


def _panels(gathered: dict[str, Any], width: float = 6.4) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each data set, one below the other."""
    size = (width, 3.6 * len(gathered) + 0.6)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels = figure.subplots(len(gathered), 1, squeeze=False)[:, 0].tolist()
    for ax in panels:
        ax.set_ylim(0, 100)
        ax.grid(alpha=0.3)
    return figure, panels


def _title(dataset: str, methods: dict[str, Distances]) -> str:
    points = next(iter(methods.values()))
    return f"{dataset}: {points.values.shape[1]} of {points.points} points"


def _draw_shares(ax: Axes, values: npt.NDArray[np.float64], **style: Any) -> None:
    """The share of the values that are at most the one on the axis; infinite ones are not drawn."""
    ordered = np.sort(values, axis=None)
    share = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
    reached = np.isfinite(ordered)
    ax.step(ordered[reached], share[reached], where="post", **style)


def _logarithmic(ax: Axes) -> None:
    """Makes the axis logarithmic, and lays the legend beside the panel: the curves fill it."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
