"""Writes the tables of docs/choosing.md from the files of results/.

python benchmarks/choosing_page.py
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import _rows
import _setup  # noqa: F401

from tfjacreg import atomic_files
from tfjacreg.experiments import files
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.selection import Statistic
from tfjacreg.experiments.tables import number, table


def spread(values: list[float], digits: int, scale: float = 1) -> str:
    """Mean and sample standard deviation."""
    return number(Statistic.of([scale * value for value in values]), digits)


def estimator_name(variant: dict[str, Any]) -> str:
    """How the docs call it."""
    method, iterations = variant.get("method", "power"), variant.get("iterations", 1)
    name = {"power": f"N = {iterations}", "lanczos": f"Lanczos, {iterations} steps"}
    part = variant.get("fraction", 1)
    return name.get(method, method) + (f", fraction {part:g}" if part < 1 else "")


def factors_table(content: dict[str, Any]) -> str:
    """The digits: a row for each factor."""
    head = ["factor", "training accuracy in %", "test accuracy in %", "under noise in %"]
    head += ["validation loss: first epoch", "last", "test loss", "mean sigma"]
    rows = []
    for row in content["factors"]:
        losses = row["val_loss"]
        rows.append(
            [
                f"{row['penalty']['factor']:g}",
                spread(row["accuracy"], 1, 100),
                spread(row["test_accuracy"], 1, 100),
                spread(row["noisy_accuracy"], 1, 100),
                spread([one[0] for one in losses], 2),
                spread([one[-1] for one in losses], 3),
                spread(row["test_loss"], 3),
                spread(row["sigma_mean"], 2),
            ]
        )
    return table(head, rows)


def fashion_table(grid: Path) -> str:
    """Fashion-MNIST: the spectral runs of the grid with rate .01 and batch 32."""
    found = []
    for folder in FolderReader.all_in(grid):
        config = folder.read_config()
        usual = config["learning_rate"] == 0.01 and config["batch_size"] == 32
        if usual and config["regularizer"] in ("none", "spectral"):
            factor = 0.0 if config["regularizer"] == "none" else config["factor"]
            found.append((factor, folder.read_history(), folder.read_metrics()))
    head = ["factor", "training accuracy in %", "test accuracy in %"]
    head += ["validation loss: first epoch", "lowest (epoch)", "last", "mean sigma"]
    rows = []
    for factor, history, metrics in sorted(found, key=lambda one: one[0]):
        lowest = min(history, key=lambda line: line["val_loss"])
        rows.append(
            [
                f"{factor:g}",
                f"{100 * history[-1]['accuracy']:.1f}",
                f"{100 * metrics['test_accuracy']:.1f}",
                f"{history[0]['val_loss']:.2f}",
                f"{lowest['val_loss']:.3f} ({lowest['epoch']:.0f})",
                f"{history[-1]['val_loss']:.3f}",
                f"{metrics['test_spectral_norm']:.2f}",
            ]
        )
    return table(head, rows)


def thresholds_table(content: dict[str, Any]) -> str:
    """The digits: a row for each threshold and factor."""
    head = ["threshold", "factor", "test accuracy in %", "under noise in %", "test loss"]
    head += ["mean sigma", "95 % quantile"]
    rows = [
        [
            f"{row['penalty']['threshold']:g}",
            f"{row['penalty']['factor']:g}",
            spread(row["test_accuracy"], 1, 100),
            spread(row["noisy_accuracy"], 1, 100),
            spread(row["test_loss"], 3),
            spread(row["sigma_mean"], 2),
            spread(row["sigma_q95"], 2),
        ]
        for row in content["thresholds"]
    ]
    return table(head, rows)


def estimators_table(content: dict[str, Any], errors: dict[str, Any]) -> str:
    """The digits, beside the error that another benchmark measured."""
    trained = [network for network in errors["networks"] if network["name"] == "power_1"]

    def error(variant: dict[str, Any]) -> str:
        if variant["method"] == "exact":
            return "0"
        index = variant["iterations"] - 1
        found = [network["errors"][variant["method"]][index]["mean"] for network in trained]
        return f"{100 * statistics.mean(found):.0f}"

    head = ["estimator", "products", "too low by, in %"]
    head += ["test accuracy in %", "under noise in %", "mean exact sigma"]
    rows = []
    for row in content["estimators"]:
        variant = row["penalty"]
        exact = variant["method"] == "exact"
        rows.append(
            [
                estimator_name(variant),
                "10" if exact else f"{2 * variant['iterations']}",
                error(variant),
                spread(row["test_accuracy"], 1, 100),
                spread(row["noisy_accuracy"], 1, 100),
                spread(row["sigma_mean"], 2),
            ]
        )
    return table(head, rows)


def denoiser_table(content: dict[str, Any]) -> str:
    """The denoiser: a row for each penalty."""
    head = ["threshold", "factor", "estimator", "error", "sigma > 1, in % of the images"]
    head += ["mean sigma", "largest sigma"]
    rows = []
    for row in content["denoiser"]:
        variant = row["penalty"]
        penalized = variant["factor"] > 0
        rows.append(
            [
                f"{variant['threshold']:g}" if penalized else "no penalty",
                f"{variant['factor']:g}" if penalized else "",
                estimator_name(variant) if penalized else "",
                spread(row["error"], 4),
                spread(row["above_1"], 0, 100),
                spread(row["sigma_mean"], 2),
                spread(row["sigma_max"], 2),
            ]
        )
    return table(head, rows)


def monitor_table(content: dict[str, Any]) -> str:
    """The monitor: a row for each estimator."""
    head = [
        "estimator",
        "points",
        "ms per epoch",
        "per point",
        "first epoch, s",
        "training, ms",
    ]
    rows = [
        [
            estimator_name(row),
            f"{row['points']:,}",
            f"{1e3 * row['monitor_seconds']:.0f}",
            f"{1e3 * row['monitor_seconds'] / row['points']:.3f}",
            f"{row['first_seconds']:.1f}",
            f"{1e3 * row['epoch_seconds']:.0f}",
        ]
        for row in content["monitor"]
    ]
    return table(head, rows)


def tables(results: Path) -> dict[str, str]:
    """Every table of the page, by the name between its marks."""
    content = files.read_json(results / "choosing.json")
    return {
        "factors": factors_table(content),
        "fashion_mnist": fashion_table(results / "fashion_mnist" / "grid"),
        "thresholds": thresholds_table(content),
        "estimators": estimators_table(content, files.read_json(results / "estimator_error.json")),
        "denoiser": denoiser_table(content),
        "monitor": monitor_table(content),
    }


def with_tables(page: str, found: dict[str, str]) -> str:
    """The page with each table between its marks."""
    for name, text in found.items():
        begin, end = f"<!-- choosing.py, {name}: begin -->", f"<!-- {name}: end -->"
        page = _rows.between(page, begin, end, text)
    return page


def main() -> None:
    """Writes them."""
    path = _rows.ROOT / "docs" / "choosing.md"
    page = with_tables(path.read_text(encoding="utf-8"), tables(_rows.ROOT / "results"))
    with atomic_files.replacing(path) as file:
        file.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
