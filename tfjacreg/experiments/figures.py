"""The figures of evaluated runs, of training, and of the benchmarks' results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

from tfjacreg import atomic_files
from tfjacreg.experiments import curves
from tfjacreg.experiments.curves import Evaluation
from tfjacreg.printable import printable

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLACK, _ORANGE, _SKY_BLUE, _GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
_BLUE, _VERMILION, _PURPLE = "#0072B2", "#D55E00", "#CC79A7"


# Inches at which figures are shown: a single panel fills a phone, and three small ones fit beside
# each other on a page. Type is 9 points or more.
PANEL, SMALL_PANEL = (3.7, 3.5), (3.25, 3.3)
_TYPE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    # As text, which can be searched and read aloud, and whose colour the dark mode can change.
    "svg.fonttype": "none",
    "svg.hashsalt": "tfjacreg",  # Equal figures are equal files.
}
# An SVG file follows the reader's choice of light or dark by itself, wherever it is shown.
_DARK = f"""<style>
@media (prefers-color-scheme: dark) {{
 text {{ fill: #e6e6e6 !important; }}
 [style*="stroke: {_BLACK}"] {{ stroke: #e6e6e6 !important; }}
 [style*="fill: {_BLACK}"] {{ fill: #e6e6e6 !important; }}
 [style*="stroke: {_BLUE.lower()}"] {{ stroke: #4da6e0 !important; }}
 [style*="fill: {_BLUE.lower()}"] {{ fill: #4da6e0 !important; }}
 [style*="stroke: #b0b0b0"] {{ stroke: #707070 !important; }}
}}
</style>
"""


class Style(NamedTuple):
    """How a line is drawn: two lines never differ in colour alone."""

    color: str
    marker: str
    linestyle: Any = "-"


# The paper's methods look the same in all figures, whichever of them are there.
METHODS = {
    "Spectral": Style(_BLUE, "s"),
    "Frobenius": Style(_ORANGE, "P", "--"),
    "Spectral-Bound": Style(_PURPLE, "v", ":"),
    "Weight decay": Style(_GREEN, "^", "-."),
    "None": Style(_BLACK, "o", (0, (6, 1.5))),
}
# Other methods take these styles in turn.
_OTHERS = (
    METHODS["None"],
    Style(_VERMILION, "s", "--"),
    Style(_BLUE, "D"),
    METHODS["Weight decay"],
    METHODS["Spectral-Bound"],
    METHODS["Frobenius"],
    Style(_SKY_BLUE, "*", "-."),
)
_OPEN = f"open marks: gradient lost on {100 * curves.FADED:g} % of\nthe images or more, still right"
# The ratio of losses above which the axis is logarithmic.
_LOGARITHMIC = 8
# The steps to draw, out of those that were timed, and the estimators.
_STEPS = {
    "plain": ("plain", METHODS["None"]),
    "spectral_bound": ("SpectralBound", METHODS["Spectral-Bound"]),
    "frobenius": ("FrobeniusNorm, 1 projection", METHODS["Frobenius"]),
    "power_1": ("SpectralNorm, N = 1", METHODS["Spectral"]),
    "power_1_transpose": ("SpectralNorm, N = 1, transpose", Style(_SKY_BLUE, "D", "--")),
    "exact": ("SpectralNorm, exact", Style(_GREEN, "^")),
    "analytic": ("analytic (row by row, SVD)", Style(_VERMILION, "*")),
}
_ESTIMATORS = {
    "power": ("power iteration", METHODS["Spectral"]),
    "lanczos": ("Lanczos as penalty", Style(_VERMILION, "o", "--")),
    "complete_lanczos": ("Lanczos in spectral_norm", Style(_GREEN, "^", "-.")),
}


def robustness_figure(
    evaluations: Sequence[Evaluation], names: Sequence[str], path: str | Path
) -> None:
    """Draws the accuracy drop against the strength (Figure 3).

    One column per perturbation, one row per data set: the mean over the runs of a method, and a
    band of one standard deviation if there are several. A mark is open if the attack has lost its
    gradient on images that are still classified correctly.

    Args:
        evaluations: The evaluated runs.
        names: The perturbations.
        path: File to write, `.svg` or `.png`.
    """
    columns = [curves.curves(evaluations, name) for name in names]
    datasets = list(dict.fromkeys(e.dataset for e in evaluations))
    size = (SMALL_PANEL[0] * len(names), SMALL_PANEL[1] * len(datasets))
    figure, axes = panels(len(datasets), len(names), size)
    drawn_as, marked = styles(evaluations), False
    for column, (name, gathered) in enumerate(zip(names, columns, strict=True)):
        for row, dataset in enumerate(datasets):
            ax = axes[row, column]
            if dataset not in gathered:
                ax.set_axis_off()
                continue
            for method, curve in gathered[dataset].items():
                style = drawn_as[method]
                drop = 100 * (curve.clean[:, None] - curve.accuracy)
                mean = drop.mean(axis=0)
                ax.plot(curve.strength, mean, ms=4, label=method, **style._asdict())
                if len(drop) > 1:
                    std = drop.std(axis=0, ddof=1)
                    _band(ax, curve.strength, mean - std, mean + std, style)
                if curve.untested.any():
                    marked = True
                    _mark(ax, curve.strength[curve.untested], mean[curve.untested], style)
            if name != "noise":
                ax.set_xscale("log")
                ax.xaxis.set_major_locator(FixedLocator(curve.strength.tolist()))
                ax.xaxis.set_minor_locator(NullLocator())
                ax.xaxis.set_major_formatter(ScalarFormatter())
            ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
            ax.grid(alpha=0.3)
            ax.set_xlabel(curves.axis(name))
            if row == 0:
                ax.set_title(curves.TITLES[name])
            if column == 0:
                several = f"{dataset}\n" if len(datasets) > 1 else ""
                ax.set_ylabel(f"{several}accuracy drop (points)")
    legend_below(figure, _OPEN * marked)
    save(figure, path)


def accuracy_figure(evaluations: Sequence[Evaluation], name: str, path: str | Path) -> None:
    """Draws the accuracy against the strength of one perturbation, starting at clean images.

    One panel, for one data set: the mean over the runs of a method, and a band of one standard
    deviation if there are several.

    Args:
        evaluations: The evaluated runs.
        name: The perturbation.
        path: File to write, `.svg` or `.png`.
    """
    (found,) = curves.curves(evaluations, name).values()
    figure, axes = panels(1, 1, PANEL)
    ax = axes[0, 0]
    drawn_as, marked = styles(evaluations), False
    for method, curve in found.items():
        style = drawn_as[method]
        accuracy = 100 * np.column_stack([curve.clean, curve.accuracy])
        mean, places = accuracy.mean(axis=0), np.arange(accuracy.shape[1])
        ax.plot(places, mean, ms=4, label=method, **style._asdict())
        if len(accuracy) > 1:
            std = accuracy.std(axis=0, ddof=1)
            _band(ax, places, mean - std, mean + std, style)
        if curve.untested.any():
            marked = True
            _mark(ax, places[1:][curve.untested], mean[1:][curve.untested], style)
    strengths = next(iter(found.values())).strength
    ax.set_xticks(range(len(strengths) + 1), ["clean", *(f"{s:g}" for s in strengths)])
    ax.set_ylim(0, 100)
    ax.grid(alpha=0.3)
    ax.set_xlabel(curves.axis(name))
    ax.set_ylabel("test accuracy in %")
    ax.set_title(curves.TITLES[name])
    legend_below(figure, _OPEN * marked)
    save(figure, path)


def training_figure(
    losses: Mapping[str, Mapping[str, npt.NDArray[np.float64]]], path: str | Path
) -> None:
    """Draws the validation loss against the epoch, mean and standard deviation over runs.

    Args:
        losses: By title of the panel and name of the method, the loss of each run `[R, epochs]`.
        path: File to write, `.svg` or `.png`.
    """
    figure, axes = panels(1, len(losses), (PANEL[0] * len(losses), PANEL[1]))
    for ax, (title, methods) in zip(axes[0], losses.items(), strict=True):
        for method, loss in methods.items():
            style = METHODS[method]
            epochs = np.arange(1, loss.shape[1] + 1)
            mean = loss.mean(axis=0)
            every = max(1, len(mean) // 10)
            ax.plot(epochs, mean, ms=4, markevery=every, label=method, **style._asdict())
            if len(loss) > 1:
                std = loss.std(axis=0, ddof=1)
                _band(ax, epochs, mean - std, mean + std, style)
        ax.set_title(title)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        # With the first epochs there would be no room for the differences between the methods.
        low, high = (
            f(np.min(m) if f is min else np.max(m) for m in methods.values()) for f in (min, max)
        )
        if low > 0 and high > _LOGARITHMIC * low:
            ax.set_yscale("log")
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("validation loss")
    legend_below(figure)
    save(figure, path)


def adversarial_figure(
    clean: np.ndarray,
    perturbed: np.ndarray,
    labels: np.ndarray,
    predicted: np.ndarray,
    title: str,
    path: str | Path,
) -> None:
    """Draws images, their perturbed versions, the differences and the predicted classes.

    Images of other than one or three channels are drawn as the mean over their channels.

    Args:
        clean: Images in [0, 1], `[N, H, W, C]`.
        perturbed: The same images, perturbed.
        labels: Classes predicted for the clean images, `[N]`.
        predicted: Classes predicted for the perturbed images, `[N]`.
        title: Title of the figure.
        path: File to write, `.svg` or `.png`.
    """
    difference = perturbed - clean
    limit = max(float(np.abs(difference).max()), float(np.finfo(np.float32).tiny))
    channels = clean.shape[-1]
    figure = Figure(figsize=(6.0, 1.9 * len(clean) + 0.5), dpi=130)
    axes = figure.subplots(len(clean), 3, squeeze=False)
    for row in range(len(clean)):
        cells = (
            (clean[row], f"clean: class {labels[row]}"),
            (perturbed[row], f"perturbed: class {predicted[row]}"),
            (0.5 + difference[row] / (2 * limit), f"difference (grey 0, ±{limit:.3f})"),
        )
        for ax, (image, caption) in zip(axes[row], cells, strict=True):
            shown = image if channels == 3 else image.mean(axis=-1)
            ax.imshow(shown, cmap="gray", vmin=0, vmax=1)
            ax.set_title(caption, fontsize=9)
            ax.axis("off")
    figure.suptitle(title if channels in (1, 3) else f"{title}\nmean over {channels} channels")
    _show_as_written(figure)
    figure.tight_layout()
    save(figure, path)


def step_time_figure(contents: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws the time of a training step against the batch size (Figure 5, left).

    One panel per content, both axes logarithmic.

    Args:
        contents: Contents of JSON files that `benchmarks/step_time.py` wrote.
        path: File to write, `.svg` or `.png`.

    Raises:
        ValueError: If there is no content, or one without any of the steps to draw.
    """
    if not contents:
        raise ValueError("Step times need at least one content to draw. Received: none")
    figure, grid = panels(1, len(contents), (4.8 * len(contents), 5.0))
    axes = grid[0]
    if len(contents) > 1:
        for ax in axes[1:]:
            ax.sharey(axes[0])
    for ax, content in zip(axes, contents, strict=True):
        settings, timed = content["settings"], content["batch_size"]
        for name, (label, style) in _STEPS.items():
            points = [(int(b), rows[name]["seconds"]) for b, rows in timed.items() if name in rows]
            if points:
                sizes, seconds = zip(*sorted(points), strict=True)
                ax.plot(sizes, seconds, label=label, **style._asdict())
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
        ticks = sorted(map(int, timed))
        ax.set_xticks(ticks, list(map(str, ticks)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("batch size")
        ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("seconds per training step")
    legend_below(figure)
    save(figure, path)


def estimator_error_figure(content: Mapping[str, Any], path: str | Path) -> None:
    """Draws the relative error of sigma against the products spent (Figure 5, right).

    The upper panel shows networks trained with `SpectralNorm`, N = 1, and the error of the product
    of the layers' norms on networks trained with `SpectralBound`. The lower panel shows networks
    trained without penalty as lines, and each estimator on the networks trained with it as single
    points. Lines are means over points and seeds, bands reach from the lowest to the highest seed.

    Args:
        content: Content of a JSON file that `benchmarks/estimator_error.py` wrote.
        path: File to write, `.svg` or `.png`.

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
    figure, axes = panels(2, 1, (4.8, 8.0), sharex=True, sharey=True)
    left, right = axes[:, 0]
    for ax, name in ((left, "power_1"), (right, "none")):
        networks = [n for n in trained if n["name"] == name]
        for estimator, (label, style) in _ESTIMATORS.items():
            products, errors = _mean_errors(networks, estimator)
            mean = errors.mean(axis=0)
            ax.plot(products, mean, ms=4, label=label, **style._asdict())
            _band(ax, products, errors.min(0), errors.max(0), style)
        ax.set_ylabel("relative error of sigma (mean over points)")
        ax.grid(alpha=0.3)
    right.set_xlabel("products spent (J v and J^T u count one each)")
    bound = [n["bound_error"]["mean"] for n in trained if n["name"] == "spectral_bound"]
    label = "product of the layers' norms, trained with SpectralBound"
    left.axhline(np.mean(bound), color=_PURPLE, linestyle="--", label=label)
    for network in trained:
        estimator, _, iterations = network["name"].partition("_")
        if estimator in ("power", "lanczos"):
            label, style = _ESTIMATORS[estimator]
            row = network["errors"][estimator][int(iterations) - 1]
            right.plot(
                row["products"],
                row["mean"],
                style.marker,
                label=f"{label}, trained with it",
                color="none",
                markeredgecolor=style.color,
                markersize=9,
            )
    left.set_yscale("log")
    left.set_ylim(bottom=1e-4)
    left.set_xticks(range(2, 21, 2))
    left.set_title(f"trained with SpectralNorm, N = 1, factor {factor:g}")
    right.set_title("trained without penalty;\nopen marks: with the estimator")
    figure.suptitle(
        f"lenet, {settings['dataset']}, epochs: {settings['epochs']}, "
        f"{settings['points']} training points\n{_environment(content)}",
        fontsize=9,
    )
    legend_below(figure)
    save(figure, path)


def _mean_errors(
    networks: Sequence[Mapping[str, Any]], estimator: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The products `[P]` that an estimator spent, and its mean error on each network, `[R, P]`."""
    errors = [network["errors"][estimator] for network in networks]
    products = np.array([row["products"] for row in errors[0]])
    return products, np.array([[row["mean"] for row in rows] for rows in errors])


def panels(
    rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Figure, npt.NDArray[Any]]:
    """A figure of panels `[rows, columns]`, with type of the size in which it will be read.

    Args:
        rows: The number of rows.
        columns: The number of columns.
        size: Width and height of the figure in inches.
        options: For matplotlib's `subplots`.
    """
    with rc_context(_TYPE):
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def legend_below(figure: Figure, note: str = "") -> None:
    """Adds one legend for all panels, below them, with each entry once.

    The figure needs `layout="constrained"`, which makes room for it.

    Args:
        figure: The figure.
        note: Text above the entries.
    """
    found = [ax.get_legend_handles_labels() for ax in figure.axes]
    handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
    # The line of an entry takes about 0.6 inches, and a letter 0.07.
    columns = int(figure.get_size_inches()[0] / (0.6 + 0.07 * max(map(len, handles))))
    columns = max(1, min(columns, len(handles)))
    with rc_context(_TYPE):
        figure.legend(
            handles.values(),
            handles,
            loc="outside lower center",
            ncols=columns,
            columnspacing=1.0,
            handlelength=2.6,
            title=note or None,
            title_fontsize=9,
        )


def _environment(content: Mapping[str, Any]) -> str:
    versions = content["environment"]
    return f"{versions['device']}\nTensorFlow {versions['tensorflow']}, Keras {versions['keras']}"


def styles(evaluations: Sequence[Evaluation]) -> dict[str, Style]:
    """The style of each method."""
    methods = dict.fromkeys(e.method for e in evaluations)
    return {
        method: METHODS.get(method, _OTHERS[i % len(_OTHERS)]) for i, method in enumerate(methods)
    }


def _band(ax: Axes, x: Any, low: Any, high: Any, style: Style) -> None:
    ax.fill_between(x, low, high, color=style.color, alpha=0.2, lw=0)


def _mark(ax: Axes, x: Any, y: Any, style: Style) -> None:
    """Opens the marks at some points of a line."""
    ax.plot(x, y, style.marker, ms=6, mfc="white", mec=style.color, mew=1.5, ls="none", zorder=3)


def _show_as_written(figure: Figure) -> None:
    """Shows names as they are, not as formulas, which may be invalid; ticks stay formulas."""
    legends = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
    texts = [text for legend in legends for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
    for text in (*texts, *figure.texts):
        text.set_parse_math(False)
        text.set_text(printable(text.get_text()))


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure as SVG or PNG, by the ending; an existing file stays until it is complete.

    An SVG has no background and follows the reader's choice of light or dark.
    """
    path = Path(path)
    _show_as_written(figure)
    with rc_context(_TYPE), atomic_files.replacing(path) as file:
        if path.suffix != ".svg":
            figure.savefig(file, format="png")
            return
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        head, defs, rest = file.read_text(encoding="utf-8").partition("<defs>")
        file.write_text(f"{head}{_DARK}{defs}{rest}", encoding="utf-8")
