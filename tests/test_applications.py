"""The table of keras.applications: that it is fresh, and a row and a check of it anew."""

import json
import sys
from pathlib import Path

import applications
import numpy as np
import pytest

from tfjacreg.jacobian import FORWARD_MODES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def content():
    return json.loads((ROOT / "results" / "applications.json").read_text())


def test_the_page_has_the_table_of_the_results(content):
    page = (ROOT / "docs" / "verification.md").read_text()
    assert applications.with_table(page, content) == page
    assert applications.table(content).count("\n") == 1 + len(content["models"])


def test_a_changed_result_shows_in_the_table(content):
    changed = json.loads(json.dumps(content))
    changed["models"]["VGG16"]["errors"]["float64"] = 0.5
    assert "5e-01" in applications.table(changed)
    assert "5e-01" not in applications.table(content)


def test_no_model_is_refused_and_every_sigma_is_right(content):
    for name, row in content["models"].items():
        assert row["checks"]["refused"] == {}, name
        assert row["errors"]["float64"] < 1e-9, name
        assert row["errors"]["float32"] < 1e-3, name


@pytest.mark.slow
def test_a_row_anew():
    """Of a model with depthwise convolutions; then a training step of it."""
    assert applications.checks("MobileNet", seeds=1) == {"seeds": 1, "refused": {}}
    wrong = applications.errors("MobileNet")
    assert wrong["float64"] < 1e-9 and wrong["float32"] < 1e-3
    assert wrong["sigma"] > 0
    x = applications.images("MobileNet", 2).astype("float32")
    for kind in ("plain", *FORWARD_MODES):
        model = applications.compiled(applications.network("MobileNet"), kind)
        logs = model.train_on_batch(x, np.array([0, 1]), return_dict=True)
        assert np.isfinite(logs["loss"])
        assert kind == "plain" or (np.isfinite(logs["penalty"]) and logs["penalty"] > 0)


@pytest.mark.slow
def test_the_first_that_was_refused_wrongly_is_taken():
    assert applications.checks("ResNet50", seeds=1) == {"seeds": 1, "refused": {}}


def test_what_is_there_is_not_done_again(tmp_path, monkeypatch, capsys):
    """Row by row: the parts that are missing, or all of those that are asked for anew."""
    done = []

    def in_a_process(part, *rest):
        done.append((part, *rest))
        return {
            "checks": {"seeds": 1, "refused": {}},
            "errors": {"sigma": 1.0, "float64": 1e-15, "float32": 1e-6},
        }[part]

    monkeypatch.setattr(applications, "in_a_process", in_a_process)
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(f"before\n{applications.BEGIN}\n{applications.END}\nafter\n")

    def run(*arguments):
        done.clear()
        command = ["applications.py", "--json", str(results), "--page", str(page), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        applications.main()
        return [call[0] for call in done]

    assert run("--models", "VGG16", "--parts", "checks") == ["checks"]
    assert run("--models", "VGG16") == ["errors"]
    assert run("--models", "VGG16") == []
    assert run("--models", "VGG16", "--parts", "errors", "--redo") == ["errors"]
    assert run("--models", "MobileNet", "--parts", "errors") == ["errors"]
    assert run("--parts") == []
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")][2:]
    assert [row.split(" | ")[0] for row in rows] == ["| MobileNet", "| VGG16"]
    assert "| 0 of 1 | 1e-15 | 1e-06 |" in rows[1]
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
