"""What results/ holds: the report comes from its files, the page's tables too, and claims hold."""

import csv
import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tfjacreg.experiments import report, tables
from tfjacreg.experiments.measures import PERTURBATIONS, PLAN, POINTWISE
from tfjacreg.experiments.sweep import Sweep

ROOT = Path(__file__).parents[2]
JUDGE = Path("results", "fashion_mnist", "judge")
GRID, FINAL = JUDGE.parent / "grid", JUDGE.parent / "final"
BY_TEST = JUDGE.parent / "by_test"
SWEEP = Sweep.load(ROOT / JUDGE / "sweep.toml")
RUNS = {SWEEP.folder(config): cell for (cell, _), config in SWEEP.configs().items()}


def evaluation(run):
    return json.loads((ROOT / JUDGE / run / "evaluation.json").read_text())


JUDGED = (*(f"robustness_{name}" for name in PERTURBATIONS), *POINTWISE)
REPORTS = {
    "judge": ([JUDGE], ("answer", "training", *JUDGED)),
    "final": ([GRID, FINAL], ("answer", "training", *JUDGED)),
    "digits": ([Path("results", "digits")], ("training",)),
}


@pytest.mark.parametrize("name", REPORTS)
def test_the_report_is_that_of_the_files(tmp_path, monkeypatch, name):
    folders, figures = REPORTS[name]
    monkeypatch.chdir(ROOT)
    for module in (report.figures, report.distributions):
        monkeypatch.setattr(module, "save", lambda figure, path: None)
    monkeypatch.setattr(report.html, "render", lambda text, out: "")
    report.write(folders, tmp_path)
    committed = ROOT / folders[-1] / "report"
    text = (committed / "report.md").read_text()
    assert (tmp_path / "report.md").read_text() == text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures == [f"{n}.svg" for n in figures]
    for picture in pictures:
        assert (committed / picture).read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize("run", RUNS)
def test_everything_was_measured_on_the_same_images(run):
    found = evaluation(run)
    assert found.keys() >= {*PERTURBATIONS, *POINTWISE}
    assert found["settings"] == evaluation(next(iter(RUNS)))["settings"] | {
        "classifier_sha256": found["settings"]["classifier_sha256"]
    }
    assert {name: found["settings"][name] for name in PLAN} == PLAN
    assert found["settings"]["images"] == 2000


@pytest.mark.parametrize("run", RUNS)
def test_the_nearest_image_is_nearer_than_any_direction(run):
    found = evaluation(run)
    nearest, spheres = (
        np.array(found[name], float) for name in ("minimal_distance", "boundary_distance")
    )
    both = np.isfinite(nearest) & np.isfinite(spheres)
    assert both.sum() > 1700 and (nearest < spheres)[both].all()
    # The margin says which images are right; the distances leave out the others.
    wrong = np.flatnonzero(np.array(found["margin"]) < 0).tolist()
    assert found["distance"]["misclassified"] == found["boundary"]["misclassified"] == wrong
    assert found["clean_accuracy"] == pytest.approx(1 - len(wrong) / 2000)


@pytest.mark.parametrize("run", RUNS)
def test_sigma_of_the_points_is_that_of_the_run(run):
    """On the first 2,000 test images in pixels, and on all 10,000 in the network's own input."""
    metrics = json.loads((ROOT / JUDGE / run / "metrics.json").read_text())
    std = 0.353  # Of Fashion-MNIST's pixels.
    mean = np.mean(evaluation(run)["sigma"])
    assert mean * std == pytest.approx(metrics["test_spectral_norm"], rel=0.03)


def test_a_run_trained_again_is_judged_as_the_committed_one():
    """The run without penalty, of version 0.1.0 and of today: every number that both have."""
    name = "none-lr0.01-b32-seed0"
    before = json.loads(
        (ROOT / "results/archive/fashion_mnist_chosen" / name / "evaluation.json").read_text()
    )
    now = evaluation(name)
    for perturbation in ("noise", "pgd", "tpgd", "square"):
        assert now[perturbation]["accuracy"] == before[perturbation]["accuracy"]
    assert now["boundary_distance"] == before["boundary_distance"]


NAMES = {
    "none": "none",
    "Spectral-Bound": "spectral_bound",
    "weight decay": "weight_decay",
    "Frobenius": "frobenius",
    "spectral": "spectral",
}


def run_named(text):
    """The run folder of "spectral 0.1", as the page writes it."""
    method, _, factor = text.partition(" 0.")
    return f"{NAMES[method]}{factor and f'-0.{factor}'}-lr0.01-b32-seed0"


def test_the_tables_of_the_page_are_those_of_the_files():
    text = (ROOT / "docs" / "robustness.md").read_text()
    section = text.split("## The five methods on Fashion-MNIST")[1].split("### Large cells")[0]
    accuracies, points = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
        for table in re.findall(r"^\|.*?\n(?=\n)", section, re.M | re.DOTALL)
    )
    named = [run_named(row[0]) for row in accuracies]
    assert sorted(named) == sorted(RUNS) and [run_named(row[0]) for row in points] == named
    found = [evaluation(run) for run in named]
    for row, result in zip(accuracies, found, strict=True):
        values = [
            result["clean_accuracy"],
            result["noise"]["accuracy"][3],
            result["pgd"]["accuracy"][2],
            result["pgd"]["accuracy"][5],
            result["pgd"]["faded"][5],
            *(result["pgd_margin"]["accuracy"][i] for i in (2, 3, 5)),
            result["square"]["accuracy"][5],
        ]
        assert row[1:] == [f"{100 * value:.1f}" for value in values]
    right = np.all([np.array(result["margin"]) > 0 for result in found], axis=0)
    for row, result in zip(points, found, strict=True):
        sigma, margin, nearest, spheres = (
            np.array(result[name], float)
            for name in ("sigma", "margin", "minimal_distance", "boundary_distance")
        )
        spheres[np.isnan(spheres)] = np.inf
        with np.errstate(invalid="ignore"):
            around, linear = spheres / nearest, nearest / (margin / (np.sqrt(2) * sigma))
        values = (np.median(a[right]) for a in (nearest, spheres, around, linear))
        shown = [f"{v:.{d}f}" for v, d in zip(values, (2, 2, 1, 2), strict=True)]
        below = f"{100 * (linear[right] < 1).mean():.1f}"
        assert row[1:] == [f"{sigma.mean():.2f}", *shown, below]


def test_what_the_page_says_of_the_ranking():
    """With a margin all measures of an attacker give one order; the cross entropy does not."""
    networks = [evaluation(run) for run in RUNS]

    def ranked(value):
        return sorted(range(len(RUNS)), key=lambda i: value(networks[i]))

    order = ranked(lambda r: -np.mean(r["sigma"]))
    assert ranked(lambda r: np.nanmedian(np.array(r["minimal_distance"], float))) == order
    for step in (2, 3):
        assert ranked(lambda r, step=step: r["pgd_margin"]["accuracy"][step]) == order
    weakest = order[0]
    assert networks[weakest]["pgd_margin"]["accuracy"][4] == 0
    last = [network["pgd"]["accuracy"][5] for network in networks]
    assert last[weakest] > np.median(last)


def test_the_table_of_the_grid_is_that_of_the_files():
    """Of each method and quarter the lowest validation loss, in bold the choice."""
    text = section("results/README.md", "The grid")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    grid = Sweep.load(ROOT / GRID / "sweep.toml")
    found = {
        cell: json.loads((ROOT / GRID / grid.folder(config) / "metrics.json").read_text())
        for (cell, _), config in grid.configs().items()
    }
    assert f"**{len(found)} of {len(grid.cells)}** cells" in text
    quarters = [(0.01, 16), (0.01, 32), (0.001, 16), (0.001, 32)]
    assert sorted(row[0].strip() for row in rows[2:]) == sorted(NAMES)
    for name, *shown in rows[2:]:
        own = {c: m for c, m in found.items() if c.method == NAMES[name.strip()]}
        best = min(own, key=lambda cell: own[cell]["val_loss"])
        for quarter, text in zip(quarters, shown, strict=True):
            inside = [c for c in own if (c.learning_rate, c.batch_size) == quarter]
            cell = min(inside, key=lambda cell: own[cell]["val_loss"])
            loss, accuracy = own[cell]["val_loss"], own[cell]["test_accuracy"]
            expected = f"{loss:.3f} ({100 * accuracy:.2f})"
            if cell.factor is not None:
                expected = f"{cell.factor:g}: {expected}"
            assert text.strip() == (f"**{expected}**" if cell == best else expected)
        # Both neighbours of the choice are there, and worse.
        factors = sorted({c.factor for c in grid.cells if c.method == best.method} - {None})
        at = factors.index(best.factor) if factors else 0
        for factor in (*factors[max(at - 1, 0) : at], *factors[at + 1 : at + 2]):
            beside = dataclasses.replace(best, factor=factor)
            assert own[beside]["val_loss"] > own[best]["val_loss"]


def section(file, heading):
    return (ROOT / file).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def table(text):
    """The rows with a number, as lists of cells."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return [row for row in rows if len(row) > 2 and re.search(r"\d", row[1])]


def repeats(folder, cell, file="metrics.json", seeds=5):
    folders = (ROOT / folder / f"{cell}-seed{i}" for i in range(seeds))
    return [json.loads((run / file).read_text()) for run in folders]


def shown(values, digits):
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def accuracies(runs):
    return [100 * run["test_accuracy"] for run in runs]


def difference(mean, p):
    """As the pages write it."""
    return f"{mean:+.2f} ({'p < 0.001' if p < 0.001 else f'p {p:.3f}'})"


def less(ours, others):
    pairs = np.subtract(accuracies(ours), accuracies(others))
    return difference(pairs.mean(), stats.ttest_rel(accuracies(ours), accuracies(others)).pvalue)


def beside_the_paper(method, found):
    """The paper's accuracy and the difference to it, with the p of Welch's t test."""
    paper = tables.PAPER["fashion_mnist"][method]
    p = stats.ttest_ind_from_stats(
        np.mean(found), np.std(found, ddof=1), len(found), *paper, equal_var=False
    ).pvalue
    published = f"{paper.mean:.2f} ± {paper.std:.2f}"
    return [published, difference(np.mean(found) - paper.mean, p)]


def listed(*words):
    return ", ".join(filter(None, words))


def factor_of(cell):
    return "" if cell.factor is None else f"{cell.factor:g}"


def settings_of(cell):
    return listed(factor_of(cell), f"rate {cell.learning_rate:g}", f"batch {cell.batch_size}")


def test_the_tables_of_the_final_runs_are_those_of_the_files():
    sweep = Sweep.load(ROOT / FINAL / "sweep.toml")
    cells = {cell.method: cell for cell in sweep.cells}
    rows = table(section("results/README.md", "The final runs"))
    front = table(section("README.md", "Results"))
    none = repeats(FINAL, cells["none"].name)
    for row, (first, *short) in zip(rows, front, strict=True):
        cell = cells.pop(NAMES[row[0]])
        runs = repeats(FINAL, cell.name)
        found = accuracies(runs)
        assert row[1:] == [
            settings_of(cell),
            shown(found, 2),
            "" if cell.method == "none" else less(runs, none),
            *beside_the_paper(cell.method, found),
            shown([run["test_loss"] for run in runs], 4),
            shown([run["test_spectral_norm"] for run in runs], 2),
        ]
        judged = repeats(FINAL, cell.name, "evaluation.json")
        assert first == listed(row[0], factor_of(cell))
        assert short == [
            row[2],
            row[4],
            row[7].partition(" ")[0],
            shown([100 * run["pgd_margin"]["accuracy"][2] for run in judged], 1),
        ]
    assert not cells


def test_what_the_page_says_of_the_final_runs():
    """Counted as ten tests, one difference in accuracy is left."""
    runs = {
        cell.method: accuracies(repeats(FINAL, cell.name))
        for cell in Sweep.load(ROOT / FINAL / "sweep.toml").cells
    }
    pairs = list(itertools.combinations(sorted(runs), 2))
    p = {(a, b): stats.ttest_rel(runs[a], runs[b]).pvalue for a, b in pairs}
    assert [pair for pair in pairs if 10 * p[pair] < 0.05] == [("none", "spectral")]
    level = list(itertools.combinations(("frobenius", "spectral", "weight_decay"), 2))
    assert max(abs(np.mean(runs[a]) - np.mean(runs[b])) for a, b in level) < 0.055
    assert [f"{f(p[pair] for pair in level):.2f}" for f in (min, max)] == ["0.58", "0.99"]


def test_what_the_page_says_of_the_difference_to_the_paper():
    """The last epoch depends on chance; PyTorch's initial weights explain nothing."""
    page = section("results/README.md", "What the difference to the paper comes from")
    text = " ".join(page.split())
    found = []
    for cell in Sweep.load(ROOT / FINAL / "sweep.toml").cells:
        for i in range(5):
            file = ROOT / FINAL / f"{cell.name}-seed{i}" / "history.csv"
            rows = list(csv.DictReader(file.read_text().splitlines()))
            found.append([100 * float(row["test_accuracy"]) for row in rows[-20:]])
    spread = np.mean([np.std(last, ddof=1) for last in found])
    assert f"{spread:.2f}" == "0.30" and "0.30 points over its last 20 epochs" in text
    starts = [
        json.loads((ROOT / folder / name / "metrics.json").read_text())
        for folder, name in (
            (FINAL.parent / "initialization", "pytorch-spectral-0.03-lr0.001-b16-seed0"),
            (FINAL, "spectral-0.03-lr0.001-b16-seed0"),
        )
    ]
    assert "{:.2f} % against {:.2f}".format(*accuracies(starts)) in text


def test_the_table_of_the_papers_reading_is_that_of_the_files():
    """Both the cell and the epoch by test loss."""
    page = section("results/README.md", "What the difference to the paper comes from")
    cells = {c.method: (FINAL, c) for c in Sweep.load(ROOT / FINAL / "sweep.toml").cells}
    cells |= {c.method: (BY_TEST, c) for c in Sweep.load(ROOT / BY_TEST / "sweep.toml").cells}
    none = [r["lowest_test_loss"] for r in repeats(BY_TEST, cells["none"][1].name, seeds=3)]
    for row in table(page):
        folder, cell = cells.pop(NAMES[row[0]])
        runs = repeats(folder, cell.name, seeds=3)
        read = [run["lowest_test_loss"] for run in runs]
        found = accuracies(read)
        assert row[1:] == [
            settings_of(cell),
            shown(accuracies(runs), 2),
            shown(found, 2),
            "" if cell.method == "none" else less(read, none),
            *beside_the_paper(cell.method, found),
        ]
    assert not cells


def test_the_tables_of_the_digits_are_those_of_the_files():
    text = section("results/README.md", "Digits")
    rows = table(text)

    def measured(label):
        method, _, factor = label.removesuffix(", the default").partition(", ")
        if method.startswith("0."):
            method, factor = "spectral", method
        cell = f"{NAMES[method]}{factor and f'-{factor}'}-lr0.01-b32"
        return repeats(Path("results", "digits"), cell)

    assert len(rows) == 9
    for row in rows:
        runs = measured(row[0])
        if row[0] in NAMES or ", " in row[0]:
            found = row.pop(3)
            assert found == ("" if row[0] == "none" else less(runs, measured("none")))
        assert row[1:] == [
            shown([run["val_loss"] for run in runs], 4),
            shown(accuracies(runs), 2),
            shown([run["test_loss"] for run in runs], 4),
            shown([run["test_spectral_norm"] for run in runs], 2),
        ]
    low, high = (measured(label) for label in ("0.01", "0.03"))
    for name, p in (("test_loss", "0.005"), ("test_accuracy", "0.070")):
        found = stats.ttest_rel([r[name] for r in low], [r[name] for r in high]).pvalue
        assert f"{found:.3f}" == p and f"(p {p})" in text
