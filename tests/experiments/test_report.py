"""The report of a sweep: a folder with known numbers in, Table 1 and a page out."""

import base64
import csv
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from selenium import webdriver

from tfjacreg.experiments import html, report, selection, tables
from tfjacreg.experiments.config import RunConfig
from tfjacreg.experiments.sweep import Sweep

POINTWISE = ("--boundary", "--distance", "--sigma")
ROOT = Path(__file__).parents[2]
TOML = """
dataset = "{dataset}"
epochs = {epochs}
repeats = 3
[grid]
factor = [0.001, 0.01]
[methods.none]
[methods.weight_decay]
[methods.spectral]
[methods.frobenius]
factor = [0.1]
"""
EPOCHS = 4
# Validation loss of the last epoch, lowest test loss, and how many of the three repeats there are.
PLAN = {
    "spectral-0.001-lr0.01-b32": (0.5, 0.2, 3),
    "spectral-0.01-lr0.01-b32": (0.4, 0.3, 3),
    "weight_decay-0.001-lr0.01-b32": (0.6, 0.5, 3),
    "weight_decay-0.01-lr0.01-b32": (0.1, 0.1, 2),
    "none-lr0.01-b32": (0.7, 0.6, 1),
}
ENVIRONMENT = {"python": "3.11", "tensorflow": "2.21", "keras": "3.15", "device": "one | core"}


def write_run(folder, config, last_val, lowest_test, seed, exist_ok=False):
    """A finished run with random numbers around the two losses."""
    rng = np.random.default_rng([seed, config.seed])
    rows = [
        {
            "epoch": epoch + 1,
            "val_loss": last_val * (1 + 0.1 * rng.random()) + (0.1 if epoch == 0 else 0),
            "test_loss": lowest_test * (1.5 + rng.random()),
            "test_accuracy": 0.9 + 0.05 * rng.random(),
            "step_seconds": 0.001 * (1 + rng.random()),
        }
        for epoch in range(config.epochs)
    ]
    # A choice by another loss, or by these at another epoch, would come out the other way round.
    rows[1]["val_loss"] = (1 - last_val) / 10
    rows[1]["test_loss"] = rows[-1]["test_loss"] = 2 - lowest_test
    rows[2]["test_loss"] = lowest_test * (1 + 0.1 * rng.random())
    folder.mkdir(parents=True, exist_ok=exist_ok)
    settings = dataclasses.asdict(config) | {"environment": ENVIRONMENT, "data_dir": "elsewhere"}
    (folder / "config.json").write_text(json.dumps(settings))
    with (folder / "history.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    metrics = {
        "test_accuracy": rows[-1]["test_accuracy"],
        "test_loss": rows[-1]["test_loss"],
        "test_spectral_norm": float(1 + rng.random()),
        "step_seconds": 0.001 * (1 + rng.random()),
        "val_loss": rows[-1]["val_loss"],
        "val_accuracy": 0.9,
        "training_seconds": 1000 * (1 + rng.random()),
        "lowest_val_loss": rows[1],
        "lowest_test_loss": rows[2],
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "classifier.keras").write_bytes(f"weights of {folder.name}".encode())


def write_evaluation(folder, images=6, **change):
    """An evaluation with random numbers; of the points, one at random is misclassified."""
    digest = hashlib.sha256((folder / "classifier.keras").read_bytes()).hexdigest()
    rng = np.random.default_rng(list(digest.encode()))
    wrong = int(rng.integers(3))
    content = {
        "settings": {"images": images, "seed": 5, "classifier_sha256": digest},
        "clean_accuracy": 0.9,
        "noise": {"variance": [0.1, 0.2], "accuracy": [0.8, float(rng.random())]},
        **{
            name: {"iterations": [1, 4, 9], "accuracy": [0.5, 0.4, float(rng.random())]}
            for name in ("pgd", "pgd_margin", "tpgd", "square")
        },
        "boundary_distance": [None if i == wrong else 1.0 + i for i in range(images)],
        "boundary": {"misclassified": [wrong], "beyond_max_radius": []},
        "minimal_distance": [None if i == wrong else 0.1 + i / 10 for i in range(images)],
        "distance": {"misclassified": [wrong], "not_found": []},
        "sigma": rng.uniform(1, 2, images).tolist(),
        "margin": [-1 if i == wrong else 1 for i in range(images)],
    }
    (folder / "evaluation.json").write_text(json.dumps(content | change))


def write_sweep(folder, dataset="fashion_mnist"):
    folder.mkdir()
    (folder / "sweep.toml").write_text(TOML.format(dataset=dataset, epochs=EPOCHS))
    sweep = Sweep.load(folder / "sweep.toml")
    for (cell, repeat), config in sweep.configs().items():
        if cell.name in PLAN and repeat < PLAN[cell.name][2]:
            last_val, lowest_test, _ = PLAN[cell.name]
            seed = list(PLAN).index(cell.name)
            write_run(folder / sweep.folder(config), config, last_val, lowest_test, seed)
    failed = folder / "none-lr0.01-b32-seed1"
    failed.mkdir()
    (failed / "error.txt").write_text("Traceback\n  line 1\nRunError: it `diverged` | badly\n")
    (folder / "none-lr0.01-b32-seed2").mkdir()
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_sweep(tmp_path / "sweep")


@pytest.fixture
def judged(folder):
    for run in folder.glob("*/classifier.keras"):
        write_evaluation(run.parent)
    return folder


@pytest.fixture
def benchmarks(tmp_path):
    """Step times and estimator errors, as the scripts write them."""
    place = tmp_path / "benchmarks"
    place.mkdir()
    times = {"plain": {"seconds": 0.001, "ratio": 1.0}, "power_1": {"seconds": 0.002, "ratio": 2.0}}
    settings = {"network": "lenet", "width": 1.0, "xla": False}
    content = {"settings": settings, "environment": ENVIRONMENT}
    sizes = {"16": times, "64": times}
    (place / "step_time_a.json").write_text(json.dumps(content | {"batch_size": sizes}))
    (place / "step_time_b.json").write_text(json.dumps(content | {"batch_size": {"16": times}}))
    errors = [{"products": 2 * n, "mean": 0.5**n} for n in range(1, 4)]
    networks = [
        {
            "name": name,
            "factor": None if name == "none" else 0.01,
            "seed": 0,
            "errors": dict.fromkeys(("power", "lanczos", "complete_lanczos"), errors),
            "bound_error": {"mean": 9.0},
        }
        for name in ("none", "power_1", "spectral_bound")
    ]
    settings = {"dataset": "digits", "epochs": 1, "points": 8, "factors": [0.01]}
    content = {"settings": settings, "environment": ENVIRONMENT, "networks": networks}
    (place / "estimator_error.json").write_text(json.dumps(content))
    return place


@pytest.fixture
def nothing(tmp_path):
    (tmp_path / "nothing").mkdir()
    return tmp_path / "nothing"


def write(folder, benchmarks, *others):
    target = report.write([folder, *others], folder / "report", benchmarks=benchmarks)
    assert target.path == folder / "report" / "report.html"
    assert not list(folder.rglob(".*"))
    return (folder / "report" / "report.md").read_text()


def rows_below(text, heading, number=0):
    """The rows of a Markdown table below a heading, by column, without emphasis."""
    section = re.split(r"^#+ ", text.split(f"\n{heading}\n", 1)[1], flags=re.M)[0]
    blocks = [b.strip() for b in section.split("\n\n") if b.strip().startswith("| ")]
    head, _, *body = [
        [cell.strip().replace("**", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in blocks[number].splitlines()
    ]
    return [dict(zip(head, row, strict=True)) for row in body]


def numbers(folder, cell, *keys):
    """Numbers of metrics.json of the runs of a cell, by hand."""
    found = []
    for path in sorted(folder.glob(f"{cell}-seed*/metrics.json")):
        value = json.loads(path.read_text())
        for key in keys:
            value = value[key]
        found.append(value)
    assert len(found) == PLAN[cell][2]
    return np.array(found)


def spread(values, digits=2, scale=100):
    """Mean and standard deviation written out: the root of the sum of squares over n - 1."""
    values = scale * values
    mean = values.sum() / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    std = math.sqrt(((values - mean) ** 2).sum() / (len(values) - 1))
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


# --- Table 1 and the choice of cells ---

LAST, LOWEST = ("test_accuracy",), ("lowest_val_loss", "test_accuracy")
THEIRS = ("lowest_test_loss", "test_accuracy")
# By method: its cell by validation loss, its cell by test loss, repeats.
CHOSEN = {
    "Spectral": ("spectral-0.01-lr0.01-b32", "spectral-0.001-lr0.01-b32", "3 of 3"),
    "Weight decay": ("weight_decay-0.001-lr0.01-b32", "weight_decay-0.001-lr0.01-b32", "3 of 3"),
    "None †": ("none-lr0.01-b32", "none-lr0.01-b32", "1 of 3"),
}
PAPER = {"Spectral": "91.10 ± 0.06", "Frobenius": "91.00 ± 0.16", "Weight decay": "90.84 ± 0.30"}
PAPER["None †"] = "90.35 ± 0.28"


def test_table_1_by_hand(folder, nothing):
    rows = {row["Method"]: row for row in rows_below(write(folder, nothing), "### fashion_mnist")}
    assert list(rows) == ["Spectral", "Frobenius", "Weight decay", "None †"]
    assert {method: row["Paper"] for method, row in rows.items()} == PAPER
    for method, (ours, theirs, repeats) in CHOSEN.items():
        row = rows[method]
        assert row["Last epoch"] == spread(numbers(folder, ours, *LAST))
        assert row["Lowest validation loss"] == spread(numbers(folder, ours, *LOWEST))
        test = row["Chosen on the test split"].removesuffix(" †")
        assert test == spread(numbers(folder, theirs, *THEIRS))
        assert row["Repeats"] == repeats
    assert rows["Frobenius"]["Last epoch"] == "no finished run"


def test_differences_by_seed_with_the_paired_t_test(folder, nothing):
    rows = rows_below(write(folder, nothing), "### fashion_mnist", 2)
    # One repeat of None is no pair of seeds.
    assert [row["Difference"] for row in rows] == ["Spectral - Weight decay"]
    ours, theirs = (
        numbers(folder, CHOSEN[method][0], *LAST) for method in ("Spectral", "Weight decay")
    )
    less = 100 * (ours - theirs)
    assert rows[0]["Mean"] == ("+" if less.mean() > 0 else "") + spread(less, scale=1)
    assert rows[0]["Seeds"] == "3"
    # With two degrees of freedom the t distribution has a closed form.
    t = less.mean() / (np.std(less, ddof=1) / math.sqrt(3))
    assert rows[0]["p"] == rows[0]["All"] == f"{1 - abs(t) / math.sqrt(t**2 + 2):.3f}"


def test_equal_accuracies_leave_nothing_to_test(folder, nothing):
    for path in folder.glob("*/metrics.json"):
        metrics = json.loads(path.read_text())
        path.write_text(json.dumps(metrics | {"test_accuracy": 0.875}))
    (row,) = rows_below(write(folder, nothing), "### fashion_mnist", 2)
    # Columns without anything are left out: there is no p.
    assert row == {
        "Difference": "Spectral - Weight decay",
        "Seeds": "3",
        "Mean": "+0.00 ± 0.00",
    }


def test_several_differences_are_counted(folder, nothing):
    sweep = Sweep.load(folder / "sweep.toml")
    for (cell, _), config in sweep.configs().items():
        if cell.method == "frobenius":
            write_run(folder / sweep.folder(config), config, 0.3, 0.3, 9)
    rows = rows_below(write(folder, nothing), "### fashion_mnist", 2)
    names = ["Spectral - Frobenius", "Spectral - Weight decay", "Frobenius - Weight decay"]
    assert [row["Difference"] for row in rows] == names
    for row in rows:
        assert float(row["All"]) == pytest.approx(min(1, 3 * float(row["p"])), abs=0.002)


def test_the_difference_to_the_paper_with_welchs_t_test(folder, nothing):
    row = rows_below(write(folder, nothing), "### fashion_mnist")[0]
    ours = 100 * numbers(folder, CHOSEN["Spectral"][0], *LAST)
    a, b = np.var(ours, ddof=1) / 3, 0.06**2 / 5
    t = (ours.mean() - 91.10) / math.sqrt(a + b)
    freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 4)
    # The density of the t distribution, summed up to t.
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    x = np.linspace(-abs(t), abs(t), 100_001)
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    p = 1 - np.trapezoid(density, x)
    assert row["Difference to the paper"] == f"{ours.mean() - 91.10:+.2f} (p {p:.3f})"


def test_only_the_best_complete_method_is_bold(folder, nothing):
    # None would be best, but one of its three repeats does not make it comparable.
    path = folder / "none-lr0.01-b32-seed0" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test_accuracy": 0.999}))
    text = write(folder, nothing)
    complete = [ours for ours, _, repeats in CHOSEN.values() if repeats == "3 of 3"]
    best = max((numbers(folder, cell, *LAST) for cell in complete), key=np.mean)
    assert re.findall(r"\*\*([\d.]+ ± [\d.]+)\*\*", text) == [spread(best)]


def test_the_cells_of_table_1(folder, nothing):
    rows = {r["Method"]: r for r in rows_below(write(folder, nothing), "### fashion_mnist", 1)}
    assert list(rows) == ["Spectral", "Weight decay", "None †"]
    assert rows["Spectral"]["Cell"] == "factor 0.01, rate 0.01, batch 32"
    assert rows["Spectral"]["On the test split"] == "factor 0.001, rate 0.01, batch 32"
    assert rows["Weight decay"]["On the test split"] == "the same"
    assert rows["None †"]["Cell"] == "rate 0.01, batch 32"
    complete = [row["Complete cells"] for row in rows.values()]
    assert complete == ["2 of 2", "1 of 2", "0 of 1"]
    for method, (ours, _, _) in CHOSEN.items():
        row = rows[method]
        assert row["Validation loss"] == spread(numbers(folder, ours, "val_loss"), 4, 1)
        sigma = numbers(folder, ours, "test_spectral_norm")
        assert row["Mean exact sigma"] == spread(sigma, 3, 1)
        seconds = numbers(folder, ours, "step_seconds")
        assert row["Milliseconds per step"] == f"{1e3 * seconds.mean():.2f}"


def test_all_cells_with_their_repeats(folder, nothing):
    text = write(folder, nothing).split("## All cells")[1]
    rows = rows_below(text, "### fashion_mnist")
    assert [(r["Method"], r["Cell"].split(",")[0], r["Repeats"]) for r in rows] == [
        ("Spectral", "factor 0.001", "3 of 3"),
        ("Spectral \\*", "factor 0.01", "3 of 3"),
        ("Frobenius", "factor 0.1", "0 of 3"),
        ("Weight decay \\*", "factor 0.001", "3 of 3"),
        ("Weight decay", "factor 0.01", "2 of 3"),
        ("None \\*", "rate 0.01", "1 of 3"),
    ]
    assert rows[2]["Validation loss"] == ""
    incomplete = "weight_decay-0.01-lr0.01-b32"
    assert rows[4]["Test accuracy in %"] == spread(numbers(folder, incomplete, *LAST))
    best = numbers(folder, incomplete, *LOWEST)
    assert rows[4]["At lowest validation loss"] == spread(best)


def test_what_is_missing_is_said(folder, nothing):
    text = write(folder, nothing)
    assert "12 of 18 runs have finished" in text
    assert "**3 of 6 cells are incomplete.**" in text
    command = f"python train.py --sweep {folder}/sweep.toml --out {folder}"
    assert f"\n{command} --retry-failed\n" in text
    (folder / "none-lr0.01-b32-seed1" / "error.txt").unlink()
    assert f"\n{command}\n" in write(folder, nothing)
    assert (
        "- None, rate 0.01, batch 32: 1 of 3 repeats; "
        "`failed: RunError: it 'diverged' | badly` (seed 1); `not finished` (seed 2)"
    ) in text
    assert "Frobenius, factor 0.1, rate 0.01, batch 32: 0 of 3 repeats; `not started`" in text
    assert "2 of 3 repeats; `not started` (seed 2)" in text
    assert "Left out" not in text


def test_every_missing_method_is_named_once(tmp_path, nothing):
    """Also one whose name is part of the name of a method that an earlier sweep lacks."""
    folders = []
    for other in ("spectral_bound", "spectral"):
        folders.append(tmp_path / other)
        folders[-1].mkdir()
        planned = f"[methods.none]\n[methods.{other}]\n"
        (folders[-1] / "sweep.toml").write_text(f"epochs = {EPOCHS}\nrepeats = 1\n{planned}")
        config = RunConfig.of(regularizer="none", epochs=EPOCHS)
        write_run(folders[-1] / Sweep.folder(config), config, 0.5, 0.4, 0)
    text = write(*folders[:1], nothing, *folders[1:])
    for name in ("Spectral", "Spectral-Bound"):
        assert text.count(f"- {name} is missing: each of its cells has not finished.") == 1


def test_runs_of_others_are_left_out_and_named(folder, nothing):
    before = write(folder, nothing)
    other = RunConfig.of(dataset="fashion_mnist", epochs=EPOCHS, factor=0.5)
    write_run(folder / "by-hand", other, 0.001, 0.001, 9)
    after = write(folder, nothing)
    assert "Left out, because `sweep.toml` does not name them: `by-hand`." in after
    assert rows_below(after, "### fashion_mnist") == rows_below(before, "### fashion_mnist")


def test_nothing_has_finished(tmp_path, nothing):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "sweep.toml").write_text(TOML.format(dataset="digits", epochs=2))
    text = write(folder, nothing)
    table = rows_below(text, "### digits")
    assert [row["Last epoch"] for row in table] == ["no finished run"] * 4
    assert "Paper" not in table[0] and "The paper:" not in text
    assert "**6 of 6 cells are incomplete.**" in text and "0 finished runs, 0.0 hours" in text
    assert not list((folder / "report").glob("*.svg"))


def test_on_the_whole_training_set_nothing_is_chosen_by_validation(tmp_path, nothing):
    """The only cell of a method stands for it; of several none does."""
    folder = tmp_path / "whole"
    folder.mkdir()
    text = TOML.format(dataset="fashion_mnist", epochs=EPOCHS)
    (folder / "sweep.toml").write_text(
        'whole_training_set = true\ninitialization = "pytorch"\n' + text
    )
    sweep = Sweep.load(folder / "sweep.toml")
    for (cell, _), config in sweep.configs().items():
        run = folder / sweep.folder(config)
        write_run(run, config, 0.5, 0.2, list(sweep.cells).index(cell))
        metrics = json.loads((run / "metrics.json").read_text())
        metrics = {name: value for name, value in metrics.items() if "val" not in name}
        (run / "metrics.json").write_text(json.dumps(metrics))
        lines = (run / "history.csv").read_text().splitlines()
        (run / "history.csv").write_text(
            "".join(re.sub(r"^([^,]*),[^,]*,", r"\1,", line) + "\n" for line in lines)
        )
    text = write(folder, nothing)
    assert "constant learning rate, the whole training set, 6 cells" in text
    assert f"lenet, pytorch initial weights, {EPOCHS} epochs" in text
    assert "no validation loss to choose by" in text
    rows = {row["Method"]: row for row in rows_below(text, "### fashion_mnist")}
    assert {m for m, row in rows.items() if row["Last epoch"].startswith("no val")} == {
        "Spectral",
        "Weight decay",
    }
    for method, row in rows.items():
        assert "Lowest validation loss" not in row and row["Chosen on the test split"], method
    found = [
        json.loads(path.read_text())["test_accuracy"]
        for path in sorted(folder.glob("frobenius-0.1-lr0.01-b32-seed*/metrics.json"))
    ]
    assert rows["Frobenius"]["Last epoch"] == spread(np.array(found))
    assert not (folder / "report" / "training.svg").exists()
    cells = rows_below(text.split("## All cells")[1], "### fashion_mnist")
    for name in ("Validation loss", "At lowest validation loss"):
        assert not any(name in row for row in cells) and len(cells) == 6
    assert all(row["Test accuracy in %"] for row in cells)


def test_several_sweeps(tmp_path, nothing):
    first, second = write_sweep(tmp_path / "a"), write_sweep(tmp_path / "b", "kmnist")
    text = write(first, nothing, second)
    assert text.startswith("# Does a Jacobian penalty help on fashion_mnist and kmnist?\n")
    kmnist = {r["Method"]: r["Paper"] for r in rows_below(text, "### kmnist")}
    assert kmnist["Spectral"] == "96.61 ± 0.14"
    third = write_sweep(tmp_path / "c", "kmnist")
    text = write(first, nothing, second, third)
    assert {"### kmnist, b", "### kmnist, c"} < set(text.splitlines())


def test_the_papers_numbers():
    """Table 1 of the paper, read again from its rows."""
    table = """
        spectral        90.20 0.61  96.61 0.14  91.10 0.06
        frobenius       90.21 0.69  96.39 0.08  91.00 0.16
        spectral_bound  89.37 0.70  95.72 0.21  90.66 0.26
        weight_decay    89.94 0.76  93.38 0.03  90.84 0.30
        none            88.59 0.67  94.36 0.26  90.35 0.28
    """
    for line in table.strip().splitlines():
        method, *values = line.split()
        pairs = zip(map(float, values[::2]), map(float, values[1::2]), strict=True)
        for dataset, pair in zip(("cifar10", "kmnist", "fashion_mnist"), pairs, strict=True):
            assert tables.PAPER[dataset][method] == (*pair, 5)
    assert list(tables.PAPER["kmnist"]) == list(selection.LABELS)


def test_hours_and_machines(folder, nothing):
    text = write(folder, nothing)
    metrics = [json.loads(path.read_text()) for path in folder.glob("*/metrics.json")]
    seconds = sum(content["training_seconds"] for content in metrics)
    assert f"12 finished runs, {seconds / 3600:.1f} hours" in text and seconds > 3600
    (line,) = re.findall(r"^- \d+ runs?: .*", text.partition("## Runs and machines")[2], re.M)
    assert line.startswith("- 12 runs: ") and "device one | core" in line


def test_runs_of_the_first_version_did_not_record_their_hours(folder, nothing):
    def forget(path):
        metrics = json.loads(path.read_text())
        del metrics["training_seconds"]
        path.write_text(json.dumps(metrics))

    paths = sorted(folder.glob("*/metrics.json"))
    forget(paths[0])
    assert (
        "hours of training steps (without the evaluation after each epoch); 1 of them did not"
        in (write(folder, nothing))
    )
    for path in paths[1:]:
        forget(path)
    assert "12 finished runs; 12 of them did not record their hours." in write(folder, nothing)


# --- the answer ---


def set_accuracies(folder, cell, values):
    """Gives the repeats of a cell these test accuracies, in percent."""
    for seed, value in enumerate(values):
        path = folder / f"{cell}-seed{seed}" / "metrics.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"test_accuracy": value / 100}))


@pytest.fixture
def answered(folder):
    """With three repeats without a penalty, and the accuracies of a test."""
    sweep = Sweep.load(folder / "sweep.toml")
    for (cell, repeat), config in sweep.configs().items():
        if cell.method == "none":
            shutil.rmtree(folder / sweep.folder(config), ignore_errors=True)
            write_run(folder / sweep.folder(config), config, 0.7, 0.6, repeat)
    set_accuracies(folder, "none-lr0.01-b32", [80.0, 81.0, 82.0])
    return folder


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("spectral", "decay", "expected"),
    [
        # Differences of 5, 5.2 and 5.4: t = 5.2 / (0.2 / sqrt(3)) = 45.03; p doubled is 0.001.
        ([85.0, 86.2, 87.4], [80.0, 81.1, 82.0],
         "Yes: Spectral with factor 0.01 raises the test accuracy by 5.20 points, from 81.00 to "
         "86.20 % (3 seeds, p < 0.001, corrected for 2 comparisons)."),
        ([85.0, 79.0, 87.0], [79.0, 82.0, 82.0],
         "Not measurably: Spectral with factor 0.01, the best penalty, changes the test accuracy "
         "by +2.67 points, from 81.00 to 83.67 %, which chance may do too (3 seeds, p 0.743, "
         "corrected for 2 comparisons)."),
        ([75.0, 76.1, 77.0], [70.0, 71.1, 72.0],
         "No: every penalty lowers the test accuracy. Spectral with factor 0.01 lowers it the "
         "least, by 4.97 points (3 seeds, p < 0.001, corrected for 2 comparisons)."),
    ],
)  # fmt: skip
def test_the_answer_in_words(answered, nothing, spectral, decay, expected):
    set_accuracies(answered, "spectral-0.01-lr0.01-b32", spectral)
    set_accuracies(answered, "weight_decay-0.001-lr0.01-b32", decay)
    text = write(answered, nothing).replace("\N{NO-BREAK SPACE}", " ")
    assert text.split("\n\n")[1] == f"**{expected}**"
    first = text.split("\n## ")[0]
    rows = {line.split(" | ")[0]: line.split(" | ")[1:3] for line in first.splitlines()}
    mean = np.mean(spectral)
    assert rows["| Spectral, 0.01"][0].startswith(f"{mean:.2f} ± ")
    assert rows["| Spectral, 0.01"][1].startswith(f"{mean - 81:+.2f} (p ")
    # The largest of its grid, and a method of which nothing has finished.
    assert "The factor of Spectral, 0.01, is the largest of its grid: a larger one" in first
    assert "The factor of Weight decay, 0.001, is the smallest of its grid: a smaller one" in first
    assert "Frobenius is missing: each of its cells has not finished" in first


@pytest.mark.usefixtures("no_pictures")
def test_without_enough_runs_there_is_no_answer(folder, nothing):
    assert "**No answer: with one seed a difference" in write(folder, nothing)
    for path in folder.glob("none-*"):
        shutil.rmtree(path)
    assert "**No answer: no run without a penalty has finished to compare" in write(folder, nothing)
    for path in folder.glob("*-seed*"):
        shutil.rmtree(path)
    assert "**No answer yet: 0 of 18 runs have finished.**" in write(folder, nothing)


@pytest.mark.usefixtures("no_pictures")
def test_robustness_stands_beside_the_answer(answered, nothing):
    """At the middle one of three strengths."""
    for number, run in enumerate(sorted(answered.glob("*/classifier.keras"))):
        write_evaluation(run.parent)
        path = run.parent / "evaluation.json"
        content = json.loads(path.read_text())
        right = (0.6 if "spectral" in run.parent.name else 0.3) + (number % 4) / 1000
        content["pgd_margin"]["accuracy"][1] = right
        path.write_text(json.dumps(content))
    first = write(answered, nothing).split("\n## ")[0].replace("\N{NO-BREAK SPACE}", " ")
    assert re.search(
        r"Under PGD on the margin, 4 steps, Spectral has 60\.\d ± 0\.\d % of the test images "
        r"right, no penalty 30\.\d ± 0\.\d %",
        first,
    )
    assert re.search(r"^\| Spectral, 0\.01 \|.*\| 80\.0 ± 0\.0 \| 60\.\d ± 0\.\d \|", first, re.M)
    assert "![Accuracy under PGD on the margin, by strength; at 4 steps: Spectral 60" in first


def test_the_papers_numbers_are_not_beside_another_network(tmp_path, nothing):
    folder = tmp_path / "other"
    folder.mkdir()
    toml = TOML.format(dataset="fashion_mnist", epochs=EPOCHS).replace(
        "epochs", 'network = "resnet20"\nepochs'
    )
    (folder / "sweep.toml").write_text(toml)
    text = write(folder, nothing)
    text = text.replace(str(tmp_path), "").replace("The paper measured on an NVIDIA", "")
    assert "paper" not in text


# --- figures ---


def test_training_curves_are_those_of_the_chosen_cells(folder, nothing, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        report.figures, "training_figure", lambda losses, path: drawn.update(losses)
    )
    monkeypatch.setattr(report.html, "render", lambda text, out: "")
    write(folder, nothing)
    assert {k: v.shape for k, v in drawn["fashion_mnist"].items()} == {
        "Spectral": (3, EPOCHS),
        "Weight decay": (3, EPOCHS),
        "None": (1, EPOCHS),
    }
    last = numbers(folder, "spectral-0.01-lr0.01-b32", "val_loss")
    np.testing.assert_allclose(drawn["fashion_mnist"]["Spectral"][:, -1], last)


def test_robustness_of_the_chosen_cells(judged, nothing, monkeypatch):
    drawn = []
    original = report.figures.robustness_figure
    monkeypatch.setattr(
        report.figures,
        "robustness_figure",
        lambda runs, *rest: drawn.extend(runs) or original(runs, *rest),
    )
    text = write(judged, nothing)
    expected = []
    for method, (cell, _, _) in CHOSEN.items():
        for path in sorted(judged.glob(f"{cell}-seed*/evaluation.json")):
            label = method.removesuffix(" †")
            expected.append(("fashion_mnist", label, json.loads(path.read_text())))
    # A panel for each of the five perturbations.
    assert [tuple(evaluation) for evaluation in drawn] == 5 * expected and len(expected) == 7
    assert "judged by everything" not in text and "not in the figure" not in text
    panels = [f"robustness_{name}" for name in ("noise", "pgd", "pgd_margin", "tpgd", "square")]
    for name in ("answer", *panels, "boundary", "distance", "sigma", "training"):
        assert f"]({name}.svg)" in text
        assert (judged / "report" / f"{name}.svg").read_text().count("<path") > 10


def test_one_run_per_method_for_the_boundary(judged, nothing, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        report.distributions, "boundary_figure", lambda runs, path: drawn.append(list(runs))
    )
    monkeypatch.setattr(report.html, "render", lambda text, out: "")
    text = write(judged, nothing)
    named = re.findall(r"^- fashion_mnist, ([\w ]+): `(\S+)`$", text, re.M)
    assert [method for method, _ in named] == ["Spectral", "Weight decay", "None"]
    (section,) = selection.read([judged])
    runs = {m: report.pick_run(m, cell) for m, cell in section.chosen.items()}
    assert [name for _, name in named] == [run.folder.path.name for run in runs.values()]
    assert any(run is not section.chosen[m].finished[0] for m, run in runs.items())
    for (method, name), evaluation in zip(named, drawn[0], strict=True):
        path = judged / name / "evaluation.json"
        assert tuple(evaluation) == ("fashion_mnist", method, json.loads(path.read_text()))
    write(judged, nothing)
    assert drawn[1] == drawn[0]
    path = judged / named[0][1] / "evaluation.json"
    content = json.loads(path.read_text())
    del content["boundary_distance"], content["boundary"]
    path.write_text(json.dumps(content))
    line = f"- fashion_mnist, Spectral: `{named[0][1]}`, not in the figure: its distances"
    assert line in write(judged, nothing)


@pytest.fixture
def no_pictures(monkeypatch):
    """Their files take longer than the text."""
    for module in (report.figures, report.distributions):
        monkeypatch.setattr(module, "save", lambda figure, path: None)
    monkeypatch.setattr(report.html, "render", lambda text, out: "")


@pytest.mark.usefixtures("no_pictures")
def test_what_an_attack_has_not_tested_is_said(judged, nothing):
    assert "Not tested" not in (text := write(judged, nothing)) and "Open marks" not in text
    pgd = {"iterations": [1, 4, 9], "accuracy": [0.5, 0.4, 0.4], "faded": [0.0, 0.1, 0.4]}
    write_evaluation(judged / "none-lr0.01-b32-seed0", pgd=pgd)
    text = write(judged, nothing)
    assert "Open marks" in text and text.count("\\* Not tested") == 1
    (line,) = re.findall(r"^\| None \| 1 \| 90\.0 .*\* \|$", text, re.M)
    assert line.split(" | ")[3:] == ["50.0", "40.0\\*", "40.0\\* |"]
    (line,) = re.findall(r"^\| gradient faded .*$", text, re.M)
    assert line.split(" | ")[3:] == ["0.0", "10.0", "40.0 |"]


@pytest.mark.usefixtures("no_pictures")
def test_the_points_of_the_runs_of_figure_4(judged, nothing, monkeypatch):
    """Both distances and sigma are those of the same runs; the ratios come of all three."""
    drawn = {}
    for name in ("boundary", "distance", "sigma"):

        def draw(runs, path, name=name):
            drawn[name] = list(runs)

        monkeypatch.setattr(report.distributions, f"{name}_figure", draw)
    text = write(judged, nothing)
    assert drawn["boundary"] == drawn["distance"] == drawn["sigma"] and len(drawn["sigma"]) == 3
    assert "distance to the nearest adversarial image found" in text
    assert "exact sigma (logits per pixel unit) at 6 points" in text
    # The distances were written as 1 + i and a tenth of that.
    assert re.search(
        r"along random directions / .*\n\n.*\n.*\n\| Spectral \| 1( \| 10\.00){5} \| 0\.0 \|\n",
        text,
    )
    for path in judged.glob("*/evaluation.json"):
        content = json.loads(path.read_text())
        del content["sigma"]
        path.write_text(json.dumps(content))
    text = write(judged, nothing)
    assert "sigma.svg" not in text and "sqrt(2)" not in text and "](distance.svg)" in text


@pytest.mark.parametrize("shared", [True, False])
def test_collapsed_runs_leave_a_page(judged, nothing, shared):
    """A constant classifier has slope 0 and no boundary; others get none of its images right."""
    for number, path in enumerate(sorted(judged.glob("*/evaluation.json"))):
        right = 0 if shared else number % 6
        wrong = [i for i in range(6) if i != right]
        content = json.loads(path.read_text()) | {
            "boundary_distance": [None] * 6,
            "boundary": {"misclassified": wrong, "beyond_max_radius": [right]},
            "minimal_distance": [None] * 6,
            "distance": {"misclassified": wrong, "not_found": [right]},
            "sigma": [0.0] * 6,
            "margin": [0.0] * 6,
        }
        path.write_text(json.dumps(content))
    text = write(judged, nothing)
    assert "](sigma.svg)" in text
    assert ("](boundary.svg)" in text, "](distance.svg)" in text) == (shared, shared)
    if shared:
        assert len(re.findall(r"\| Spectral \| 1( \| inf){5} \| 1 \|", text)) == 2
        assert len(re.findall(r"\| Spectral \| 1( \| -){6} \|", text)) == 2
    else:
        assert text.count("Left out: there is no point that every run classifies correctly.") == 2


@pytest.mark.usefixtures("no_pictures")
def test_evaluations_of_the_first_version_are_shown_for_what_they_have(judged, nothing):
    for path in judged.glob("*/evaluation.json"):
        content = json.loads(path.read_text())
        for name in ("pgd_margin", "minimal_distance", "distance", "sigma", "margin"):
            del content[name]
        path.write_text(json.dumps(content))
    later = judged / ONE / "evaluation.json"
    write_evaluation(later.parent)
    content = json.loads(later.read_text())
    content["settings"]["sigma"] = {"method": "exact"}
    later.write_text(json.dumps(content))
    text = write(judged, nothing)
    assert "](robustness_pgd.svg)" in text and "](boundary.svg)" in text
    assert (
        "judged by everything" in text
        and f"{ONE} " not in text.split("To judge them:")[1].split("```")[1]
    )
    assert text.count("PGD on the margin: accuracy") == 1
    rows = text.split("PGD on the margin: accuracy")[1].split("\n\n")[1]
    assert len(rows.splitlines()) == 3 and re.search(r"^\| Spectral \| 1 ", rows, re.M)


def test_every_repeat_can_be_drawn(folder):
    (section,) = selection.read([folder])
    cell = section.chosen["spectral"]
    many = cell._replace(runs=cell.runs * 20)
    positions = [many.runs.index(report.pick_run(m, many)) % 3 for m in selection.LABELS]
    assert len(set(positions)) > 1


def test_runs_to_judge_are_named_with_the_command(folder, nothing):
    chosen = [cell for cell, _, _ in CHOSEN.values()]
    names = [run for cell in chosen for run in sorted(folder.glob(f"{cell}-seed*/metrics.json"))]
    runs = [str(path.parent) for path in names]

    def command(text):
        (line,) = re.findall(r"^python evaluate.py (.*)$", text, re.M)
        return shlex.split(line)

    text = write(folder, nothing)
    assert command(text) == [*runs, *POINTWISE, "--limit", "2000"]
    assert "Figure 4)" not in text
    # One is judged whole, one on the way: the command goes on with the same settings.
    write_evaluation(Path(runs[0]))
    partial = Path(runs[1], "evaluation.json")
    write_evaluation(partial.parent)
    content = json.loads(partial.read_text())
    del content["square"], content["boundary_distance"], content["boundary"]
    partial.write_text(json.dumps(content))
    text = write(folder, nothing)
    assert command(text) == [*runs[1:], *POINTWISE, "--limit", "6", "--seed", "5"]
    (line,) = [li for li in text.splitlines() if re.match(r"\| Spectral \| 1 .* 50\.0 ", li)][:1]
    assert "±" not in line


def test_the_command_is_one_that_evaluate_takes(folder, nothing):
    lines = re.findall(r"^python evaluate.py (.*)$", write(folder, nothing), re.M)
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "evaluate.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    args = script.parse(shlex.split(lines[0]))
    assert args.boundary and args.limit == 2000 and len(args.runs) == 7


def test_figure_5_from_the_benchmarks(folder, benchmarks, nothing, monkeypatch):
    text = write(folder, benchmarks)
    # One batch size makes no curve.
    assert "`step_time_a.json`" in text and "step_time_b" not in text
    for name in ("step_time_a.svg", "estimator_error.svg"):
        assert (folder / "report" / name).read_text().count("<path") > 10
    text = write(folder, nothing)
    for script in ("step_time", "estimator_error"):
        assert f"python benchmarks/{script}.py " in text and f"({script}" not in text


# --- bad input ---

ONE = "spectral-0.01-lr0.01-b32-seed0"


def change_json(name, **change):
    def damage(folder):
        path = folder / ONE / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return damage


def write_text(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "sweep.toml").unlink(), "must hold sweep.toml. Received: .*sweep, which"),
        (write_text("sweep.toml", "= 3"), r"sweep.toml is not a TOML file"),
        (write_text(f"{ONE}/config.json", "{"), rf"{ONE}/config.json is not JSON"),
        (write_text(f"{ONE}/metrics.json", "[]"), rf"{ONE}/metrics.json must hold a JSON object"),
        (change_json("config.json", epochs=9), rf"{ONE}/config.json .*epochs is 9 there, 4 here"),
        (
            change_json("metrics.json", lowest_test_loss={"test_loss": 0.1}),
            rf"{ONE}/metrics.json must .*lowest_test_loss.test_accuracy, .*. Received: None",
        ),
        (lambda f: (f / ONE / "history.csv").unlink(), rf"{ONE}/history.csv must hold a line"),
        (write_text(f"{ONE}/history.csv", "val_loss\n1\n"), "step_seconds"),
        (write_text(f"{ONE}/history.csv", "val_loss,step_seconds\n1,2\n"), "4 epochs. Received: 1"),
        (write_text(f"{ONE}/evaluation.json", "{}"), rf"{ONE}/evaluation.json must be as"),
        (change_json("evaluation.json", square={"iterations": [1], "accuracy": [1], "faded": []}),
         "square.faded must be a list of numbers"),
        (change_json("evaluation.json", boundary={}), "boundary must be an object"),
        (change_json("evaluation.json", margin=[1]), "a margin for each sigma"),
        (write_text(f"{ONE}/classifier.keras", "new"), "an evaluation of another classifier"),
        (lambda f: write_evaluation(f / ONE, images=7), r"differ in \['images'\]"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_files_are_named(judged, nothing, damage, message):
    damage(judged)
    with pytest.raises(ValueError, match=message):
        write(judged, nothing)
    assert not (judged / "report" / "report.md").exists()


def test_results_without_weights(judged, nothing):
    for path in judged.glob("*/classifier.keras"):
        path.unlink()
    assert "](robustness_pgd.svg)" in write(judged, nothing)


@pytest.mark.parametrize(
    ("name", "content"), [("step_time_a.json", {}), ("estimator_error.json", {"settings": {}})]
)
def test_foreign_benchmarks_are_named(folder, benchmarks, name, content):
    (benchmarks / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{name} must be as benchmarks/"):
        write(folder, benchmarks)


def test_a_second_stage_is_read_once_however_it_is_named(folder, monkeypatch):
    (folder / "sweep.toml").write_text(
        (folder / "sweep.toml").read_text() + "[final]\nrepeats = 1\n"
    )
    sweep = Sweep.load(folder / "sweep.toml")
    (folder / "final").mkdir()
    (folder / "final" / "sweep.toml").write_bytes(sweep.second_stage(sweep.cells[:1]).content)
    monkeypatch.chdir(folder.parent)
    for folders in ([Path("sweep")], [Path("sweep"), folder / "final"]):
        assert len(selection.read(folders)) == 2


def test_the_same_sweep_twice(folder, nothing):
    with pytest.raises(ValueError, match="named once"):
        write(folder, nothing, folder / ".." / folder.name)


# --- the page ---


class _Links(HTMLParser):
    """Gathers everything that a page may load, and its text."""

    def __init__(self):
        super().__init__()
        self.found, self.tags, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_its_pictures_and_nothing_else(judged, benchmarks):
    text = write(judged, benchmarks)
    page_text = (judged / "report" / "report.html").read_text()
    links = _Links()
    links.feed(page_text)
    pictures = [link for link in links.found if link != "data:," and not link.startswith("#")]
    names = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(names) == 12
    for link, name in zip(pictures, names, strict=True):
        head, encoded = link.split(",")
        assert head == "data:image/svg+xml;base64"
        assert base64.b64decode(encoded) == (judged / "report" / name).read_bytes()
    assert "script" not in links.tags and links.tags.count("table") == 15
    # The contents lead to every section.
    targets = [link[1:] for link in links.found if link.startswith("#")]
    assert targets == re.findall(r'<h2 id="(.*?)"', page_text) and len(targets) == 10
    assert "url(" not in page_text and "@import" not in page_text
    # What came from files is text, not markup.
    assert "RunError: it 'diverged' | badly" in links.text and "one | core" in links.text


def test_markup_in_text_is_shown_as_text(tmp_path):
    shown = html.render("# A <b>title</b>\n\n<script>alert(1)</script> `<i>`\n", tmp_path)
    links = _Links()
    links.feed(shown)
    assert not {"script", "b", "i"} & set(links.tags)
    assert "<title>A &lt;b&gt;title&lt;/b&gt;</title>" in shown


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Debian's chromium, without a network of its own."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        message = "The page is tested in Debian's chromium: apt-get install chromium-driver"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = webdriver.ChromeService(driver)
    with webdriver.Chrome(options=options, service=service) as chrome:
        yield chrome


def shown(browser, path):
    """Opens a page: each image's natural width, and what became of each address asked for."""
    browser.get_log("performance")
    browser.get(path.as_uri())
    widths = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    # The browser's own page, for a new tab, may still ask for things.
    sent = [s for s in sent if not s["documentURL"].startswith("chrome:")]
    failed = {
        m["params"]["requestId"]: m["params"].get("blockedReason", m["params"]["errorText"])
        for m in messages
        if m["method"] == "Network.loadingFailed"
    }
    return widths, {s["request"]["url"]: failed.get(s["requestId"], "loaded") for s in sent}


@pytest.mark.slow
def test_the_page_in_a_browser(judged, benchmarks, browser):
    write(judged, benchmarks)
    path = judged / "report" / "report.html"
    alone = judged / "alone" / "report.html"
    alone.parent.mkdir()
    shutil.copy(path, alone)
    widths, requests = shown(browser, alone)
    assert len(widths) == 12 and min(widths) > 300
    assert [r for r in requests if not r.startswith("data:")] == [alone.as_uri()]
    assert set(requests.values()) == {"loaded"}
    # On a phone nothing but tables, pictures and code scrolls sideways.
    browser.set_window_size(500, 900)
    sizes = "return [document.documentElement.scrollWidth, innerWidth]"
    inner, outer = browser.execute_script(sizes)
    assert inner <= outer


@pytest.mark.slow
def test_the_browser_would_see_a_request(folder, nothing, browser):
    """The test above can fail: with an image from elsewhere, and without the policy."""
    write(folder, nothing)
    path = folder / "report" / "report.html"
    text = path.read_text()
    outside = "http://pictures.example/a.png"
    text = text.replace("<body>", f'<body><img src="{outside}">')
    path.write_text(text)
    widths, requests = shown(browser, path)
    assert widths[0] == 0 and requests[outside] == "csp"
    path.write_text(re.sub(r"<meta http-equiv.*?>", "", text, flags=re.DOTALL))
    assert shown(browser, path)[1][outside] == "net::ERR_NAME_NOT_RESOLVED"
