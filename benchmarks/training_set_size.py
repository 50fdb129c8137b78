"""The gain of each penalty against the size of the training set, for docs/choosing.md.

    python benchmarks/training_set_size.py OUT              # every sweep that is missing in OUT
    python benchmarks/training_set_size.py OUT --sweeps "LeNet, 1000"
    python benchmarks/training_set_size.py OUT --table      # results, figure and page alone

The data is Fashion-MNIST as an .npz of 1,000, 6,000 or all 60,000 training images, the same share
of each class, with all 10,000 test images. The networks are LeNet, and a small network with
augmentation and BatchNorm. Each pair gets a sweep of two stages (docs/sweeps.md): the factor of
each method is chosen by the lowest validation loss on a tenth of the images; then new seeds are
trained on all images and evaluated. LeNet on all images is not trained here: its runs are those of
README.md, in results/fashion_mnist. If the script is stopped, the same command continues; started
twice, it makes two workers.

The results hold every run of both stages. A gain is the test accuracy minus the one of the run
without penalty with the same seed; it counts if the p of a paired t test, times the number of
penalties, is below 0.05.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import _rows
import _setup  # noqa: F401
import keras
import numpy as np

from tfjacreg import atomic_files, datasets
from tfjacreg.experiments import comparison, figures, files, selection
from tfjacreg.experiments.comparison import Difference
from tfjacreg.experiments.environment import environment
from tfjacreg.experiments.selection import LABELS, RunResult, Statistic

JSON = _rows.ROOT / "results" / "training_set_size.json"
FIGURE = _rows.ROOT / "results" / "training_set_size.svg"
PAGE = _rows.ROOT / "docs" / "choosing.md"
BEGIN, END = "<!-- training_set_size.py: begin -->", "<!-- training_set_size.py: end -->"


class Size(NamedTuple):
    """How many images are trained on how long and how often.

    Attributes:
        epochs: The more images, the fewer bring the validation loss without penalty past its
            lowest.
        choice: Seeds of each cell of the grid: a tenth of 1,000 images is little to choose by.
        final: Seeds of each choice.
    """

    epochs: int
    choice: int
    final: int


SIZES = {1_000: Size(30, 2, 5), 6_000: Size(20, 1, 5), 60_000: Size(4, 1, 3)}
NETWORKS = {"LeNet": "lenet", "BatchNorm": "batch_norm.keras"}
# The paper's protocol, whose runs are committed: 50 epochs, two rates and batch sizes in the grid.
COMMITTED = {"LeNet, 60000": _rows.ROOT / "results" / "fashion_mnist"}
SWEEPS = {f"{name}, {size}": (name, size) for size in SIZES for name in NETWORKS}
SWEEP = """dataset = "digits"
network = "lenet"
epochs = {epochs}
schedule = "cosine"
repeats = {choice}

[grid]
learning_rate = [0.01]
batch_size = [32]

[methods.none]
[methods.weight_decay]
factor = [0.0003, 0.001, 0.003]
[methods.frobenius]
factor = [0.001, 0.003, 0.01]
[methods.spectral]
factor = [0.01, 0.03, 0.1]

[final]
choose_by = "val_loss"
repeats = {final}
whole_training_set = true
judge = ["noise", "pgd_margin"]
limit = 2000
"""
PENALTIES = ("spectral", "frobenius", "weight_decay")
TITLES = {"LeNet": "LeNet", "BatchNorm": "BatchNorm, with augmentation"}
METRICS = ("val_loss", "val_accuracy", "test_loss", "test_accuracy", "test_spectral_norm")
LEVEL = 0.05
NOISE, STEPS = 0.05, 4  # Of what is judged: the variance, and the steps of PGD.


def data(size: int, data_dir: str | None) -> dict[str, np.ndarray]:
    """Some of the training images, the same number of each class, and all test images."""
    found = datasets.load("fashion_mnist", data_dir)
    x = np.concatenate([found.train.x, found.validation.x])
    y = np.concatenate([found.train.y, found.validation.y])
    rng = np.random.default_rng(0)
    chosen = np.concatenate(
        [rng.permutation(np.flatnonzero(y == label))[: size // 10] for label in range(10)]
    )
    as_bytes = [np.round(255 * images).astype("uint8") for images in (x[chosen], found.test.x)]
    return {
        "x_train": as_bytes[0],
        "y_train": y[chosen],
        "x_test": as_bytes[1],
        "y_test": found.test.y,
    }


def batch_norm(shape: tuple[int, int, int] = (28, 28, 1), classes: int = 10) -> keras.Model:
    """Three convolutions with BatchNorm behind shifts and flips."""
    inputs = keras.Input(shape)
    x = keras.layers.RandomFlip("horizontal")(inputs)
    x = keras.layers.RandomTranslation(0.08, 0.08, fill_mode="nearest")(x)
    for filters, strides in ((16, 2), (32, 2), (64, 1)):
        x = keras.layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    return keras.Model(
        inputs, keras.layers.Dense(classes)(keras.layers.GlobalAveragePooling2D()(x))
    )


def prepare(out: Path, data_dir: str | None) -> None:
    """Writes the files of data, network and sweeps that are missing."""
    for size, settings in SIZES.items():
        if not (out / f"{size}.npz").exists():
            with atomic_files.replacing(out / f"{size}.npz") as path:
                np.savez_compressed(path, **data(size, data_dir))  # type: ignore[arg-type]
        if not (out / f"{size}.toml").exists():
            with atomic_files.replacing(out / f"{size}.toml") as path:
                path.write_text(SWEEP.format(**settings._asdict()), encoding="utf-8")
    if not (out / NETWORKS["BatchNorm"]).exists():
        with atomic_files.replacing(out / NETWORKS["BatchNorm"]) as path:
            batch_norm().save(path)


def folder(name: str) -> str:
    """Where the runs of a sweep lie."""
    network, size = SWEEPS[name]
    return f"{network}_{size}".lower()


def train(out: Path, name: str) -> None:
    """Takes part in a sweep until it is finished."""
    network, size = SWEEPS[name]
    command = [sys.executable, str(_rows.ROOT / "train.py"), "--sweep", f"{size}.toml"]
    command += ["--dataset", f"{size}.npz", "--network", NETWORKS[network], "--out", folder(name)]
    subprocess.run(command, cwd=out, check=True)


def row(run: RunResult) -> dict[str, Any]:
    """The figures of a run; those of the second stage alone have been judged."""
    found = {
        "method": run.config.regularizer,
        "factor": None if run.config.regularizer == "none" else run.config.factor,
        "seed": run.config.seed,
        **{name: run.metrics[name] for name in METRICS if name in run.metrics},
    }
    judged = run.folder.read_evaluation()
    if judged:
        noise, attack = judged["noise"], judged["pgd_margin"]
        found["under_noise"] = noise["accuracy"][noise["variance"].index(NOISE)]
        found["under_pgd"] = attack["accuracy"][attack["iterations"].index(STEPS)]
    return found


def gathered(out: Path) -> dict[str, Any]:
    """Every run of every sweep that is finished, and what was chosen."""
    sweeps = {}
    for name in SWEEPS:
        if name in COMMITTED:
            places = [COMMITTED[name] / stage for stage in ("grid", "final")]
        else:
            places = [out / folder(name)]
            if not (places[0] / "report").exists():
                print(f"not finished: {name}")
                continue
        grid, final = selection.read(places)
        chosen = {
            m: cell.cell.factor for m, cell in final.chosen.items() if m in (*PENALTIES, "none")
        }
        sweeps[name] = {
            "epochs": grid.sweep.any_config.epochs,
            "chosen": chosen,
            "grid": [row(run) for run in grid.finished],
            "final": [row(run) for run in final.finished],
        }
    return {"sweeps": sweeps, "environment": environment()}


def values(rows: list[dict[str, Any]], method: str, key: str) -> dict[int, float]:
    """A figure of the runs of a method in percent, by seed."""
    return {row["seed"]: 100 * row[key] for row in rows if row["method"] == method}


def table(content: dict[str, Any]) -> str:
    """The table of docs/choosing.md."""
    lines = [
        "| network, images | method, factor | test accuracy in % | gain in points | p | "
        "under noise in % | after PGD in % | mean sigma |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, sweep in content["sweeps"].items():
        network, size = SWEEPS[name]
        rows = sweep["final"]
        for method, factor in sweep["chosen"].items():
            accuracy = values(rows, method, "test_accuracy")
            cells = [
                f"{network}, {size:,}",
                LABELS[method].lower() + ("" if factor is None else f", {factor:g}"),
                shown(list(accuracy.values()), 2),
            ]
            if method == "none":
                cells += ["", ""]
            else:
                found = gain(rows, method, "test_accuracy")
                counted = " *" if counts(found, sweep) else ""
                cells += [
                    f"{found.less.mean:+.2f} ± {found.less.std:.2f}{counted}",
                    f"{found.p:.3f}",
                ]
            cells += [
                shown(list(values(rows, method, key).values()), 1)
                for key in ("under_noise", "under_pgd")
            ]
            sigma = [row["test_spectral_norm"] for row in rows if row["method"] == method]
            cells.append(f"{np.mean(sigma):.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gain(rows: list[dict[str, Any]], method: str, key: str) -> Difference:
    """A figure of a method less that without penalty, seed by seed, in points."""
    found = comparison.paired(values(rows, method, key), values(rows, "none", key))
    if found is None:
        raise ValueError(f"There must be two seeds of {method} and none. Received: {rows}.")
    return found


def shown(found: list[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    statistic = Statistic.of(found)
    return f"{statistic.mean:.{digits}f} ± {statistic.std:.{digits}f}"


def counts(found: Difference, sweep: dict[str, Any]) -> bool:
    """Whether a difference remains significant when all penalties of the sweep are counted."""
    return found.p * (len(sweep["chosen"]) - 1) < LEVEL


def draw(content: dict[str, Any]) -> None:
    """The gain in accuracy, clean and after PGD, against the number of training images."""
    figure, panels = figures.panels(2, 2, (7.2, 5.6), sharex=True, sharey="row")
    for column, network in zip(panels.T, NETWORKS, strict=True):
        column[0].set_title(TITLES[network])
        for panel, key in zip(column, ("test_accuracy", "under_pgd"), strict=True):
            panel.axhline(0, color="#b0b0b0", lw=1)
            for shift, method in zip((0.93, 1, 1.07), PENALTIES, strict=True):
                style = figures.METHODS[LABELS[method]]
                sizes, gains = [], []
                for size in SIZES:
                    rows = content["sweeps"][f"{network}, {size}"]["final"]
                    sizes.append(shift * size)
                    gains.append(gain(rows, method, key).less)
                panel.errorbar(
                    sizes,
                    [gain.mean for gain in gains],
                    [gain.std for gain in gains],
                    color=style.color,
                    marker=style.marker,
                    linestyle=style.linestyle,
                    capsize=2,
                    label=LABELS[method],
                )
        column[1].set_xscale("log")
        column[1].set_xticks(list(SIZES), [f"{size:,}" for size in SIZES])
        column[1].minorticks_off()
        column[1].set_xlabel("training images")
    panels[0, 0].set_ylabel("gain in test accuracy, points")
    panels[1, 0].set_ylabel("gain after PGD, points")
    figures.legend_below(figure)
    figures.save(figure, FIGURE)


def main() -> None:
    """Trains what is missing, and writes results, figure and page once all is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder of data and runs")
    names = [name for name in SWEEPS if name not in COMMITTED]
    parser.add_argument("--sweeps", nargs="*", choices=names, default=names)
    parser.add_argument("--data-dir", help="of tensorflow-datasets")
    parser.add_argument("--table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        prepare(arguments.out, arguments.data_dir)
        for name in arguments.sweeps:
            train(arguments.out, name)
    content = gathered(arguments.out)
    if len(content["sweeps"]) < len(SWEEPS):
        return
    files.write_json(JSON, content)
    write_page(content)


def write_page(content: dict[str, Any]) -> None:
    """The figure, and the table between its marks."""
    draw(content)
    page = _rows.between(PAGE.read_text(encoding="utf-8"), BEGIN, END, table(content))
    with atomic_files.replacing(PAGE) as path:
        path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
