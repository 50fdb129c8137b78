"""What README.md and docs/ tell a reader to type."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    example = re.findall(r"```python\n(import keras.*?)```", README, re.DOTALL)
    assert len(example) == 1 and len(example[0].splitlines()) <= 12
    done = subprocess.run(
        [sys.executable, "-c", example[0]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "penalty" in done.stdout and "shape=(5,)" in done.stdout
    assert (tmp_path / "network.keras").exists()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_links_name_files_that_exist(page):
    text = page.read_text()
    for name in re.findall(r"python ((?:\w+/)?\w+\.py)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([\w/.-]+)(?:#[\w-]+)?\)", text):
        assert (page.parent / name).exists(), name
    for name in re.findall(r"`((?:sweeps|docs|results|benchmarks|tests)/[\w/.-]+\.\w+)", text):
        assert (ROOT / name).exists(), name


def examples(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_guide_runs(tmp_path):
    """Its blocks one after the other; names that stand for the reader's own are made up."""
    whole, parts, step = examples("guide.md")
    # Of the parts, several and behind are the reader's own models.
    parts = "\n".join(line for line in parts.splitlines() if "several" not in line)
    parts = "\n".join(line for line in parts.splitlines() if "behind" not in line)
    own = (
        "import tensorflow as tf\n"
        "x_batch, logits = x[:8].astype('float32'), network\n"
        "your_loss = lambda y: tf.reduce_mean(y**2)\n"
    )
    script = "\n".join([whole, own, parts, step, "print(len(gradients), float(penalty))"])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "network.keras").exists() and (tmp_path / "run.keras").exists()
    count, penalty = done.stdout.split("\n")[-2].split()
    assert int(count) == 6 and float(penalty) > 0


@pytest.mark.slow
def test_the_example_of_several_gpus_runs(tmp_path):
    (example,) = (block for block in examples("sweeps.md") if "MirroredStrategy" in block)
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "penalty" in done.stdout


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_options_in_the_readme_are_options_of_the_script(script):
    """Every --option on the lines of the script's synopsis is in its --help."""
    synopsis = re.search(rf"```\n(python {script} .*?)```", README, re.DOTALL).group(1)
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    options = re.findall(r"--[\w-]+", synopsis)
    assert len(options) >= 5
    for option in options:
        assert option in done.stdout
