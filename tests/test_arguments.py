"""The command lines, which are read before TensorFlow is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tfjacreg_arguments as command_line
from tfjacreg import datasets, networks, regularizers
from tfjacreg.experiments import config, measures

ROOT = Path(__file__).parents[1]
COMMANDS = [["train.py"], ["evaluate.py"], ["-m", "tfjacreg"], ["-m", "tfjacreg", "report"]]
COMMANDS += [["-m", "tfjacreg", "prepare"]]
# What a command has to import to work, and need not have to say how it is used.
HEAVY = {"numpy", "tensorflow", "keras", "matplotlib", "optuna", "sklearn", "tqdm"}


def test_the_command_line_names_what_there_is():
    assert command_line.DATASETS == datasets.NAMES
    assert command_line.DOWNLOADED == datasets.DOWNLOADED
    assert command_line.NETWORKS == networks.NAMES
    assert command_line.INITIALIZATIONS == networks.INITIALIZATIONS
    assert ("none", *regularizers.BY_NAME) == command_line.METHODS
    assert command_line.SCHEDULES == config.SCHEDULES
    assert command_line.PERTURBATIONS == measures.PERTURBATIONS
    options = vars(command_line.evaluate("", ["run"]))
    assert all(options[name] is False for name in measures.POINTWISE)


def help_of(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        command(["--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_defaults_that_help_names_are_those_of_a_run(capsys, monkeypatch):
    text = help_of(lambda argv: command_line.train("", argv), capsys, monkeypatch)
    _, *parts = re.split(r"^  (?=--)", text, flags=re.M)
    texts = {re.match(r"--[\w-]+", part)[0]: " ".join(part.split()) for part in parts}
    default = config.RunConfig.of()
    for name, value in command_line.DEFAULTS.items():
        assert getattr(default, name) == value
        assert f"(default: {value})" in texts[f"--{name}"]
    big = config.DEFAULTS["vgg16"]
    assert config.DEFAULTS["resnet20"] == big
    for name, value in config.DEFAULTS["lenet"].items():
        told = f"(default: {value}; for vgg16 and resnet20 {big[name]})"
        assert told in texts[f"--{name.replace('_', '-')}"]
    assert config.AUGMENTED_DATASETS == ("cifar10",)
    assert "(default: for cifar10 only)" in texts["--augment"]
    assert default.width == 1 and "(default: 1)" in texts["--width"]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_comes_at_once_and_fits_a_terminal(command):
    """Without imports that take seconds; and so does the answer to a mistake."""
    for last, status in (("--help", 0), ("--no-such-option", 2)):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *command, last],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "80"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.M))
        assert "argparse" in imported and not HEAVY & imported
        assert "\nusage: " in f"\n{done.stderr}{done.stdout}"
        assert all(len(line) <= 80 for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "few"], "argument --limit: must be an integer. Received: 'few'."),
        (["--limit", "0"], "argument --limit: must be at least 1. Received: 0."),
        (["--seed", "-1"], "argument --seed: must be from 0 to 2**63 - 1. Received: -1."),
    ],
)
def test_a_number_that_is_none(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        command_line.evaluate("", ["run", *arguments])
    assert caught.value.code == 2 and capsys.readouterr().err.rstrip().endswith(message)
