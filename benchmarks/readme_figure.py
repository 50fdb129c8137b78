"""README's picture: accuracy under PGD on the margin, from the final runs on Fashion-MNIST.

    python benchmarks/readme_figure.py

Mean over five seeds, and a band of one standard deviation, of `results/fashion_mnist/final`.
"""

from pathlib import Path

import _rows
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from tfjacreg import atomic_files
from tfjacreg.experiments import files

RUNS = _rows.ROOT / "results" / "fashion_mnist" / "final"
FIGURE = RUNS / "pgd_margin.svg"
# Folders of a method, its name, and how its line is drawn: colours of Okabe and Ito.
METHODS = {
    "spectral-0.03": ("SpectralNorm", "#0072b2", "-", "s"),
    "frobenius": ("FrobeniusNorm", "#d55e00", "--", "P"),
    "weight_decay": ("WeightDecay", "#009e73", "-.", "^"),
    "none": ("no penalty", "#000000", ":", "o"),
    "spectral_bound": ("SpectralBound", "#cc79a7", (0, (3, 1, 1, 1, 1, 1)), "v"),
}


def accuracies(method: str) -> tuple[list[int], np.ndarray]:
    """The numbers of iterations, 0 first, and the accuracies in % `[runs, strengths]`."""
    runs = [files.read_json(path / "evaluation.json") for path in sorted(RUNS.glob(f"{method}-*"))]
    curves = [[run["clean_accuracy"], *run["pgd_margin"]["accuracy"]] for run in runs]
    return [0, *runs[0]["pgd_margin"]["iterations"]], 100 * np.array(curves)


def draw(path: Path) -> None:
    """Writes the figure."""
    matplotlib.use("agg")
    with plt.rc_context({"font.size": 13, "svg.fonttype": "path", "svg.hashsalt": "readme"}):
        figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
        for method, (label, color, line, marker) in METHODS.items():
            iterations, found = accuracies(method)
            # The strengths double: one position each.
            places = np.arange(len(iterations))
            mean, std = found.mean(axis=0), found.std(axis=0, ddof=1)
            axes.plot(places, mean, color=color, linestyle=line, marker=marker, label=label)
            axes.fill_between(places, mean - std, mean + std, color=color, alpha=0.15, lw=0)
        axes.set_xticks(places, [str(n) for n in iterations])
        axes.set_xlabel("steps of PGD (step 2/255, at most 32/255 per pixel)")
        axes.set_ylabel("test accuracy in %")
        axes.set_ylim(0, 100)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)
        with atomic_files.replacing(path) as file:
            figure.savefig(file, format="svg", metadata={"Date": None}, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    draw(FIGURE)
