"""What results/ holds: the report comes from its files, the page's tables too, and claims hold."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tfjacreg.experiments import report
from tfjacreg.experiments.measures import PERTURBATIONS, PLAN, POINTWISE
from tfjacreg.experiments.sweep import Sweep

ROOT = Path(__file__).parents[2]
JUDGE = Path("results", "fashion_mnist", "judge")
SWEEP = Sweep.load(ROOT / JUDGE / "sweep.toml")
RUNS = {SWEEP.folder(config): cell for (cell, _), config in SWEEP.configs().items()}


def evaluation(run):
    return json.loads((ROOT / JUDGE / run / "evaluation.json").read_text())


def test_the_report_is_that_of_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for module in (report.figures, report.distributions):
        monkeypatch.setattr(module, "save", lambda figure, path: None)
    monkeypatch.setattr(report.html, "render", lambda text, out: "")
    report.write([JUDGE], tmp_path, benchmarks=JUDGE)
    committed = ROOT / JUDGE / "report"
    text = (committed / "report.md").read_text()
    assert (tmp_path / "report.md").read_text() == text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures == [f"{n}.png" for n in ("training", "robustness", *POINTWISE)]
    for picture in pictures:
        assert (committed / picture).read_bytes().startswith(b"\x89PNG")


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
    before = json.loads((ROOT / JUDGE.parent / "chosen" / name / "evaluation.json").read_text())
    now = evaluation(name)
    for perturbation in ("noise", "pgd", "tpgd", "square"):
        assert now[perturbation]["accuracy"] == before[perturbation]["accuracy"]
    assert now["boundary_distance"] == before["boundary_distance"]
