"""The figures of the distributions of distances to the boundary, and of sigma, over points."""

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
from tfjacreg.experiments.figures import PANEL, Style, legend_below, panels, save, styles

# The share of the values that an axis leaves out at either end, to have room for the middle.
_TAIL = 0.005
_MOST = 400


def boundary_figure(evaluations: Sequence[Evaluation], path: str | Path) -> None:
    """Draws the distribution of the distances to the decision boundary (Figure 4).

    One panel per data set: for each method the share of points, over all its runs, that have a
    boundary within the given distance. Only points that every run classifies correctly count;
    without such points nothing is drawn.

    Args:
        evaluations: The evaluated runs.
        path: File to write, `.svg` or `.png`.
    """
    gathered = curves.distances(evaluations)
    if not gathered:
        return
    figure, axes = _shares(gathered)
    drawn_as = styles(evaluations)
    for ax, (dataset, methods) in zip(axes, gathered.items(), strict=True):
        for method, found in methods.items():
            label = f"{method} (median {np.median(found.values):.2f})"
            _draw_shares(ax, found.values, drawn_as[method], label=label)
        ax.set_title(_title(dataset, methods))
        ax.set_xlabel("distance to the decision boundary\n(Euclidean, pixel units)")
        ax.set_ylabel("points within (%)")
        ax.set_xlim(left=0)
    legend_below(figure)
    save(figure, path)


def distance_figure(evaluations: Sequence[Evaluation], path: str | Path) -> None:
    """Draws the distances to the nearest image found, beside those along random directions.

    One panel per data set, as in `boundary_figure`, with a logarithmic axis. The distances along
    random directions are drawn if all runs have them.

    Args:
        evaluations: The evaluated runs.
        path: File to write, `.svg` or `.png`.
    """
    names = ["distance"]
    if all("boundary" in e.result for e in evaluations):
        names.append("boundary")
    measured = [curves.distances(evaluations, name) for name in names]
    if not measured[0]:
        return
    figure, axes = _shares(measured[0])
    drawn_as = styles(evaluations)
    for ax, dataset in zip(axes, measured[0], strict=True):
        for method, style in drawn_as.items():
            medians = []
            for gathered, line in zip(measured, ("-", "--"), strict=False):
                if method in gathered[dataset]:
                    values = gathered[dataset][method].values
                    _draw_shares(ax, values, style._replace(linestyle=line))
                    medians.append(f"{np.median(values):.2f}")
            if medians:
                label = f"{method} (median {' and '.join(medians)})"
                ax.plot([], [], color=style.color, marker=style.marker, ms=4, label=label)
        ax.set_title(_title(dataset, measured[0][dataset]))
        ax.set_xlabel("distance to another class (Euclidean, pixel units)")
        ax.set_ylabel("points within (%)")
        if len(names) > 1:
            ax.plot([], [], color="gray", label="nearest image found")
            ax.plot([], [], color="gray", linestyle="--", label="along random directions")
        both = [m[dataset][method].values for m in measured for method in m[dataset]]
        _logarithmic(ax, both)
    legend_below(figure)
    save(figure, path)


def sigma_figure(evaluations: Sequence[Evaluation], path: str | Path) -> None:
    """Draws the distribution of the spectral norm of the Jacobian, on a logarithmic axis.

    One panel per data set: for each method the share of all points, over all its runs, whose sigma
    is at most the given number.

    Args:
        evaluations: The evaluated runs.
        path: File to write, `.svg` or `.png`.
    """
    gathered = curves.slopes(evaluations)
    figure, axes = _shares(gathered)
    drawn_as = styles(evaluations)
    for ax, (dataset, methods) in zip(axes, gathered.items(), strict=True):
        for method, slope in methods.items():
            label = f"{method} (median {np.median(slope.sigma):.2f})"
            _draw_shares(ax, slope.sigma, drawn_as[method], label=label)
        points = next(iter(methods.values())).sigma.shape[1]
        ax.set_title(f"{dataset}:\n{points} points")
        ax.set_xlabel("exact sigma (logits per pixel unit)")
        ax.set_ylabel("points with at most that (%)")
        _logarithmic(ax, [slope.sigma for slope in methods.values()])
    legend_below(figure)
    save(figure, path)


def _shares(gathered: dict[str, Any]) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each data set, one below the other."""
    figure, grid = panels(len(gathered), 1, (PANEL[0], PANEL[1] * len(gathered) + 0.6))
    axes = grid[:, 0].tolist()
    for ax in axes:
        ax.set_ylim(0, 100)
        ax.grid(alpha=0.3)
    return figure, axes


def _title(dataset: str, methods: dict[str, Distances]) -> str:
    points = next(iter(methods.values()))
    return f"{dataset}:\n{points.values.shape[1]} of {points.points} points"


def _draw_shares(ax: Axes, values: npt.NDArray[np.float64], style: Style, **options: Any) -> None:
    """Draws the share of the values up to each value on the axis, without infinite ones."""
    ordered = np.sort(values, axis=None)
    share = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
    kept = np.flatnonzero(np.isfinite(ordered))
    # More points cannot be seen, and make a large file.
    kept = kept[np.linspace(0, len(kept) - 1, min(len(kept), _MOST)).round().astype(int)]
    options |= {**style._asdict(), "ms": 4, "markevery": 0.15}
    ax.step(ordered[kept], share[kept], where="post", **options)


def _logarithmic(ax: Axes, drawn: Sequence[npt.NDArray[np.float64]]) -> None:
    """Makes the axis logarithmic, over the range of the curves; not if it has no value above 0."""
    values = np.concatenate([values.ravel() for values in drawn])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return
    ax.set_xscale("log")
    low, high = np.quantile(values, (_TAIL, 1 - _TAIL))
    if low < high:
        ax.set_xlim(low / 1.1, high * 1.1)
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
