"""Tables and pictures from evaluations of one or many runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

from tfjacreg.experiments import files

_TITLES = {"noise": "White noise", "pgd": "PGD", "tpgd": "TPGD", "square": "Square"}
_AXES = {"noise": "noise variance (squared pixel units)", "square": "queries"}
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP*"
# The paper's methods look the same in all figures, whichever of them are there.
_METHODS = {
    "Spectral": ("#0072B2", "s"),
    "Frobenius": ("#E69F00", "P"),
    "Spectral-Bound": ("#CC79A7", "v"),
    "L2": ("#009E73", "^"),
    "None": ("#000000", "o"),
}
# The steps that are drawn, out of those timed, and the estimators: label, colour, marker.
_STEPS = {
    "plain": ("plain", "#000000", "o"),
    "spectral_bound": ("SpectralBound", "#CC79A7", "v"),
    "frobenius": ("FrobeniusNorm, 1 projection", "#E69F00", "P"),
    "power_1": ("SpectralNorm, N = 1", "#0072B2", "s"),
    "power_1_transpose": ("SpectralNorm, N = 1, transpose", "#56B4E9", "D"),
    "exact": ("SpectralNorm, exact", "#009E73", "^"),
    "analytic": ("analytic (row by row, SVD)", "#D55E00", "*"),
}
_ESTIMATORS = {
    "power": ("power iteration", "#0072B2", "s"),
    "lanczos": ("Lanczos as penalty", "#D55E00", "o"),
    "complete_lanczos": ("Lanczos in spectral_norm", "#009E73", "^"),
}


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
            title = f"{dataset}, {_TITLES[name]}: accuracy in % against {_axis(name)}"
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


def robustness_figure(
    evaluations: Sequence[Evaluation], names: Sequence[str], path: str | Path
) -> None:
    """Draws the accuracy drop against the strength (Figure 3).

    One column per perturbation, one row per data set; mean over the runs of a method, and a band
    of one standard deviation where there are several.

    Args:
        evaluations: The judged runs.
        names: The perturbations.
        path: PNG file to write.
    """
    columns = [curves(evaluations, name) for name in names]
    figure = Figure(figsize=(3.4 * len(names) + 0.6, 2.9 * len(columns[0]) + 1.0), dpi=130)
    axes = figure.subplots(len(columns[0]), len(names), squeeze=False)
    styles = _styles(evaluations)
    for column, (name, gathered) in enumerate(zip(names, columns, strict=True)):
        for row, (dataset, methods) in enumerate(gathered.items()):
            ax = axes[row, column]
            for method, curve in methods.items():
                colour, marker = styles[method]
                drop = 100 * (curve.clean[:, None] - curve.accuracy)
                mean = drop.mean(axis=0)
                ax.plot(curve.strength, mean, color=colour, marker=marker, ms=4, label=method)
                if len(drop) > 1:
                    std = drop.std(axis=0, ddof=1)
                    ax.fill_between(
                        curve.strength, mean - std, mean + std, color=colour, alpha=0.2, lw=0
                    )
            if name != "noise":
                ax.set_xscale("log")
                ax.xaxis.set_major_locator(FixedLocator(curve.strength.tolist()))
                ax.xaxis.set_minor_locator(NullLocator())
                ax.xaxis.set_major_formatter(ScalarFormatter())
            ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
            ax.grid(alpha=0.3)
            ax.set_xlabel(_axis(name))
            if row == 0:
                ax.set_title(_TITLES[name])
            if column == 0:
                ax.set_ylabel(f"{dataset}\naccuracy drop (percentage points)")
    _legend_below(figure, styles)
    _save(figure, path)


def boundary_figure(evaluations: Sequence[Evaluation], path: str | Path) -> None:
    """Draws how the distances to the decision boundary are distributed (Figure 4).

    One panel per data set: for each method the share of points, over all its runs, that have a
    boundary within the given distance. Only points that every run classifies correctly count.

    Args:
        evaluations: The judged runs.
        path: PNG file to write.
    """
    gathered = distances(evaluations)
    figure = Figure(figsize=(6.4, 3.6 * len(gathered) + 0.6), dpi=130)
    axes = figure.subplots(len(gathered), 1, squeeze=False)[:, 0]
    styles = _styles(evaluations)
    for ax, (dataset, methods) in zip(axes, gathered.items(), strict=True):
        for method, found in methods.items():
            colour, _ = styles[method]
            values = np.sort(found.values, axis=None)
            share = 100 * np.arange(1, len(values) + 1) / len(values)
            reached = np.isfinite(values)
            label = f"{method} (median {np.median(values):.2f})"
            ax.step(values[reached], share[reached], where="post", color=colour, label=label)
        points = next(iter(methods.values()))
        ax.set_title(f"{dataset}: {points.values.shape[1]} of {points.points} points")
        ax.set_xlabel("distance to the decision boundary (Euclidean, pixel units)")
        ax.set_ylabel("points within (%)")
        ax.set_ylim(0, 100)
        ax.set_xlim(left=0)
        ax.grid(alpha=0.3)
        ax.legend(loc="lower right")
    figure.tight_layout()
    _save(figure, path)


def training_figure(
    losses: Mapping[str, Mapping[str, npt.NDArray[np.float64]]], path: str | Path
) -> None:
    """Draws the validation loss against the epoch, mean and standard deviation over runs.

    Args:
        losses: By title of the panel and name of the method, the loss of each run `[R, epochs]`.
        path: PNG file to write.
    """
    figure = Figure(figsize=(max(5.2 * len(losses), 6.4), 4.4), dpi=130)
    axes = figure.subplots(1, len(losses), squeeze=False)[0]
    for ax, (title, methods) in zip(axes, losses.items(), strict=True):
        for method, loss in methods.items():
            colour, marker = _METHODS[method]
            epochs = np.arange(1, loss.shape[1] + 1)
            mean = loss.mean(axis=0)
            ax.plot(epochs, mean, color=colour, marker=marker, ms=3, lw=1, label=method)
            if len(loss) > 1:
                std = loss.std(axis=0, ddof=1)
                ax.fill_between(epochs, mean - std, mean + std, color=colour, alpha=0.2, lw=0)
        ax.set_title(title)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
        ax.legend()
    axes[0].set_ylabel("validation loss")
    figure.tight_layout()
    _save(figure, path)


def adversarial_figure(
    clean: np.ndarray,
    perturbed: np.ndarray,
    labels: np.ndarray,
    predicted: np.ndarray,
    title: str,
    path: str | Path,
) -> None:
    """Draws images beside their perturbed selves, the difference and the predicted classes.

    Args:
        clean: Images in [0, 1], `[N, H, W, C]`.
        perturbed: The same images, perturbed.
        labels: Classes predicted for the clean images, `[N]`.
        predicted: Classes predicted for the perturbed images, `[N]`.
        title: Title of the figure.
        path: PNG file to write.
    """
    difference = perturbed - clean
    limit = max(float(np.abs(difference).max()), float(np.finfo(np.float32).tiny))
    figure = Figure(figsize=(6.0, 1.9 * len(clean) + 0.5), dpi=130)
    axes = figure.subplots(len(clean), 3, squeeze=False)
    for row in range(len(clean)):
        cells = (
            (clean[row], f"clean: class {labels[row]}"),
            (perturbed[row], f"perturbed: class {predicted[row]}"),
            (0.5 + difference[row] / (2 * limit), f"difference (grey 0, ±{limit:.3f})"),
        )
        for ax, (image, caption) in zip(axes[row], cells, strict=True):
            ax.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
            ax.set_title(caption, fontsize=9)
            ax.axis("off")
    figure.suptitle(title)
    figure.tight_layout()
    _save(figure, path)


def step_time_figure(contents: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws the time of a training step against the batch size (Figure 5, left).

    One panel per content, both axes logarithmic.

    Args:
        contents: Contents of JSON files that `benchmarks/step_time.py` wrote.
        path: PNG file to write.

    Raises:
        ValueError: If there is no content, or one without any of the steps that are drawn.
    """
    if not contents:
        raise ValueError("Step times need at least one content to draw. Received: none")
    size = (max(6.4, 5.2 * len(contents)), 5.4)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots(1, len(contents), squeeze=False)[0]
    for ax, content in zip(axes, contents, strict=True):
        settings, timed = content["settings"], content["batch_size"]
        for name, (label, colour, marker) in _STEPS.items():
            points = [(int(b), rows[name]["seconds"]) for b, rows in timed.items() if name in rows]
            if points:
                ax.plot(
                    *zip(*sorted(points), strict=True), label=label, color=colour, marker=marker
                )
        if not ax.lines:
            raise ValueError(
                f"Step times must hold some of {tuple(_STEPS)}: time these variants. "
                f"Received: {sorted({name for rows in timed.values() for name in rows})}"
            )
        network = settings["network"]
        if network != "lenet":
            network += f", width {settings['width']:g}"
        ax.set_title(f"{network}{', XLA' * settings['xla']}\n{_environment(content)}", fontsize=9)
        ax.set_xscale("log")
        ax.set_yscale("log")
        sizes = sorted(map(int, timed))
        ax.set_xticks(sizes, list(map(str, sizes)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("batch size")
        ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("seconds per training step (median)")
    _legend_outside(figure)
    _save(figure, path)


def estimator_error_figure(content: Mapping[str, Any], path: str | Path) -> None:
    """Draws the relative error of sigma against the products spent (Figure 5, right).

    Left: networks trained with `SpectralNorm`, N = 1, and the error of the product of the layers'
    norms on networks trained with `SpectralBound`. Right: networks trained without penalty as
    lines, and as single points each estimator on the networks trained with that very estimator.
    Lines are means over points and seeds, bands reach from the lowest to the highest seed.

    Args:
        content: Content of a JSON file that `benchmarks/estimator_error.py` wrote.
        path: PNG file to write.

    Raises:
        ValueError: If one of these networks is missing.
    """
    settings = content["settings"]
    factor = settings["factors"][0]
    trained = [n for n in content["networks"] if n["factor"] in (None, factor)]
    missing = {"none", "power_1", "spectral_bound"} - {n["name"] for n in trained}
    if missing:
        raise ValueError(
            "Estimator errors must hold networks trained without penalty, with SpectralNorm and "
            f"with SpectralBound at factor {factor:g}. Received: none of {sorted(missing)}"
        )
    figure = Figure(figsize=(10.4, 5.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for ax, name in ((left, "power_1"), (right, "none")):
        networks = [n for n in trained if n["name"] == name]
        for estimator, (label, colour, marker) in _ESTIMATORS.items():
            products, errors = _mean_errors(networks, estimator)
            mean = errors.mean(axis=0)
            ax.plot(products, mean, label=label, color=colour, marker=marker, markersize=4)
            ax.fill_between(products, errors.min(0), errors.max(0), color=colour, alpha=0.2, lw=0)
        ax.set_xlabel("products spent (J v and J^T u count one each)")
        ax.grid(alpha=0.3)
    bound = [n["bound_error"]["mean"] for n in trained if n["name"] == "spectral_bound"]
    label = "product of the layers' norms, trained with SpectralBound"
    left.axhline(np.mean(bound), color="#CC79A7", linestyle="--", label=label)
    for network in trained:
        estimator, _, iterations = network["name"].partition("_")
        if estimator in ("power", "lanczos"):
            label, colour, marker = _ESTIMATORS[estimator]
            row = network["errors"][estimator][int(iterations) - 1]
            style = {"color": "none", "markeredgecolor": colour, "markersize": 9}
            label += ", trained with it"
            right.plot(row["products"], row["mean"], marker, label=label, **style)
    left.set_yscale("log")
    left.set_ylim(bottom=1e-4)
    left.set_xticks(range(2, 21, 2))
    left.set_ylabel("relative error of sigma (mean over points)")
    left.set_title(f"trained with SpectralNorm, N = 1, factor {factor:g}")
    right.set_title("trained without penalty; open marks: with the estimator")
    figure.suptitle(
        f"lenet, {settings['dataset']}, epochs: {settings['epochs']}, "
        f"{settings['points']} training points; {_environment(content)}",
        fontsize=9,
    )
    _legend_outside(figure)
    _save(figure, path)


def _mean_errors(
    networks: Sequence[Mapping[str, Any]], estimator: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The products `[P]` that an estimator spent, and its mean error on each network, `[R, P]`."""
    errors = [network["errors"][estimator] for network in networks]
    products = np.array([row["products"] for row in errors[0]])
    return products, np.array([[row["mean"] for row in rows] for rows in errors])


def _legend_outside(figure: Figure) -> None:
    """One legend for all panels, below them; what several panels draw is named once."""
    found = [ax.get_legend_handles_labels() for ax in figure.axes]
    handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8)


def _environment(content: Mapping[str, Any]) -> str:
    versions = content["environment"]
    return f"{versions['device']}; TensorFlow {versions['tensorflow']}, Keras {versions['keras']}"


def _axis(name: str) -> str:
    return _AXES.get(name, "iterations")


def _styles(evaluations: Sequence[Evaluation]) -> dict[str, tuple[str, str]]:
    methods = dict.fromkeys(e.method for e in evaluations)
    return {
        method: _METHODS.get(method, (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]))
        for i, method in enumerate(methods)
    }


def _legend_below(figure: Figure, styles: dict[str, tuple[str, str]]) -> None:
    handles = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    width, height = map(float, figure.get_size_inches())
    columns = max(1, min(len(handles), int(width / 2)))
    rows = -(-len(handles) // columns)
    figure.tight_layout(rect=(0, (0.1 + 0.25 * rows) / height, 1, 1))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=columns)


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


def _save(figure: Figure, path: str | Path) -> None:
    with files.replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png")
