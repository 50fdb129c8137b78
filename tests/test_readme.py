"""What README.md tells a reader to type."""

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


def test_commands_name_files_that_exist():
    for name in re.findall(r"python (\w+/?\w+\.py)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / name).exists(), name


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
