"""Two processes on one folder: one works, the other is refused or waits; never a mixed run."""

import csv
import json
import time

import pytest

from tfjacreg.experiments.config import RunConfig
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.sweep import Sweep

pytestmark = pytest.mark.slow
TRIALS = 6
EPOCHS = 2
# Without a penalty, which would be half of the time: who may use a folder does not depend on it.
TRAIN = ["train", "--regularizer", "none", "--epochs", EPOCHS]
FILES = {"config.json", "history.csv", "metrics.json", "classifier.keras", "saved_model"}


def assert_whole(path, config):
    """A finished run of one configuration, whose files belong together."""
    folder = FolderReader(path)
    folder.check_claim(config)
    folder.check_products()
    assert [row["epoch"] for row in folder.read_history()] == list(range(1, config.epochs + 1))
    assert {p.name for p in path.iterdir()} == FILES


def pair(nursery, moments, tmp_path, *commands):
    """Starts two commands, the second up to half a second after the first."""
    logs = [tmp_path / f"log{number}" for number in range(2)]
    for log in logs:
        log.unlink(missing_ok=True)
    first = nursery.start(*commands[0], log=logs[0])
    time.sleep(moments.choice([0, moments.uniform(0, 0.5), moments.uniform(0, 2)]))
    second = nursery.start(*commands[-1], log=logs[1])
    return first, second


def test_two_train_py(nursery, moments, tmp_path):
    refused = 0
    for trial in range(TRIALS):
        out = tmp_path / f"run{trial}"
        command = [*TRAIN, "--out", out]
        both = pair(nursery, moments, tmp_path, command)
        statuses = [child.wait() for child in both]
        assert 0 in statuses and set(statuses) <= {0, 2}, [c.output for c in both]
        # One has trained; the other was refused, or came when it was over.
        assert sum("Epoch 1/" in child.output for child in both) == 1
        for child, other in (both, both[::-1]):
            if child.poll() == 2:
                refused += 1
                assert f"is in use by process {other.pid}." in child.output
                assert "Traceback" not in child.output
        assert_whole(out, RunConfig.of(regularizer="none", epochs=EPOCHS))
    assert refused > TRIALS // 4


def test_the_second_overwrites(nursery, moments, tmp_path):
    """With other settings: the folder is at the end that of one of the two, as a whole."""
    out = tmp_path / "run"
    base = [*TRAIN, "--overwrite", "--out", out]
    for _ in range(TRIALS // 2):
        both = pair(nursery, moments, tmp_path, base, [*base, "--seed", 1])
        statuses = [child.wait() for child in both]
        assert 0 in statuses and set(statuses) <= {0, 2}, [c.output for c in both]
        seed = json.loads((out / "config.json").read_text())["seed"]
        assert statuses[seed] == 0
        assert_whole(out, RunConfig.of(regularizer="none", epochs=EPOCHS, seed=seed))


def test_waiting_for_the_first(nursery, tmp_path):
    command = [*TRAIN, "--out", tmp_path / "run"]
    first = nursery.start(*command, log=tmp_path / "first")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "config.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second = nursery.start(*command, "--wait", log=tmp_path / "second")
    assert (first.wait(), second.wait()) == (0, 0), first.output + second.output
    assert f"in use by process {first.pid}: waiting for its end" in second.output
    assert "Epoch" not in second.output and "test accuracy" in second.output
    assert_whole(tmp_path / "run", RunConfig.of(regularizer="none", epochs=EPOCHS))


def test_two_evaluate_py(nursery, moments, tmp_path):
    out = tmp_path / "run"
    train = [*TRAIN, "--out", out]
    assert nursery.call(*train, log=tmp_path / "log")[0] == 0
    command = ["evaluate", out, "--attacks", "noise", "pgd", "square", "--out", tmp_path / "out"]
    assert nursery.call(*command, log=tmp_path / "log")[0] == 0
    whole = (out / "evaluation.json").read_bytes()
    refused = 0
    for _ in range(TRIALS):
        (out / "evaluation.json").unlink()
        both = pair(nursery, moments, tmp_path, command)
        statuses = [child.wait() for child in both]
        assert 0 in statuses and set(statuses) <= {0, 2}, [c.output for c in both]
        assert (out / "evaluation.json").read_bytes() == whole
        for child, other in (both, both[::-1]):
            if child.poll() == 2:
                refused += 1
                assert f"in use by process {other.pid}." in child.output
        assert {p.name for p in out.iterdir()} == FILES | {"evaluation.json"}
    assert refused > 0
    # And beside a run that is being trained anew: of the old one or of none.
    for _ in range(TRIALS // 2):
        both = pair(nursery, moments, tmp_path, [*train, "--overwrite"], command)
        statuses = [child.wait() for child in both]
        assert (set(statuses) <= {0, 2} and statuses[0] == 0) or "in use" in both[0].output
        assert_evaluation_fits(out)


def assert_evaluation_fits(out):
    folder = FolderReader(out)
    found = folder.read_evaluation()
    if found is not None and folder.finished:
        assert found["settings"]["classifier_sha256"] == folder.classifier_digest()


def test_train_py_and_a_sweep(nursery, moments, tmp_path):
    """In each of the sweep's folders train.py begins the same run by hand."""
    path, out = tmp_path / "ten.toml", tmp_path / "ten"
    path.write_text(f'dataset = "digits"\nepochs = {EPOCHS}\nrepeats = {TRIALS}\n[methods.none]\n')
    sweep = nursery.start("train", "--sweep", path, "--out", out, log=tmp_path / "sweep.log")
    hands, configs = [], list(Sweep.load(path).configs().values())
    for config in configs:
        folder = out / Sweep.folder(config)
        deadline = time.monotonic() + 60
        if moments.random() < 0.6:  # When the sweep is at it; else as it may come.
            while not folder.exists() and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 1))
        log = tmp_path / f"hand{config.seed}"
        hands.append(nursery.start(*TRAIN, "--seed", config.seed, "--out", folder, log=log))
    assert sweep.wait() == 0, sweep.output
    for config, hand in zip(configs, hands, strict=True):
        status = hand.wait()
        assert status == 0 or (status == 2 and "is in use by process" in hand.output), hand.output
        assert_whole(out / Sweep.folder(config), config)
        with (out / Sweep.folder(config) / "history.csv").open() as file:
            assert len(list(csv.DictReader(file))) == EPOCHS
