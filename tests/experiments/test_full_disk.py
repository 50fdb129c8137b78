"""A disk that is full at each file in turn: one message, what was there stays, and on it goes."""

import contextlib
import os
import subprocess

import numpy as np
import pytest

from tfjacreg import datasets
from tfjacreg.experiments.config import RunConfig
from tfjacreg.experiments.folder_reader import FolderReader

pytestmark = pytest.mark.slow
CONFIG = RunConfig.of(epochs=2, regularizer="none")
TRAIN = ["train", "--epochs", CONFIG.epochs, "--regularizer", CONFIG.regularizer]
FILES = {"config.json", "history.csv", "metrics.json", "classifier.keras", "saved_model"}


@contextlib.contextmanager
def disk(folder, size):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        if os.environ.get("CI"):
            pytest.fail("CI must be allowed to mount a small disk")
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def assert_one_message(status, output, command):
    assert status == 2, output
    errors = [line for line in output.splitlines() if ": error: " in line]
    assert len(errors) == 1 and errors[0].startswith(f"{command}: error: "), output
    assert "No space left" in output.partition(errors[0])[1] + output.partition(errors[0])[2]
    assert "Traceback" not in output and "Exception ignored" not in output, output


def test_train_py_and_evaluate_py(nursery, tmp_path):
    with disk(tmp_path / "disk", "6m") as place:
        out, filler, log = place / "run", place / "filler", tmp_path / "log"
        train = [*TRAIN, "--out", out]
        kept = 0
        for name in (
            *("config.json", "history.csv", "checkpoint.keras", "classifier.keras"),
            *("saved_model", "metrics.json"),
        ):
            result = nursery.call(*train, log=log, full_at=[name, str(filler)])
            assert_one_message(*result, "train.py")
            assert str(out) in result[1] and "Choose a writable --out" in result[1]
            # The last good state is kept: of what was done before nothing is done again.
            epochs = FolderReader(out).count_epochs() if out.exists() else 0
            assert epochs >= kept
            kept = epochs
            assert not list(out.glob(".*")) and not (out / "metrics.json").exists()
            filler.unlink()
        status, output = nursery.call(*train, log=log)
        assert status == 0, output
        FolderReader(out).check_products()
        assert {p.name for p in out.iterdir()} == FILES

        figures = tmp_path / "figures"
        evaluate = ["evaluate", out, "--attacks", "noise", "--out", figures]
        result = nursery.call(*evaluate, log=log, full_at=["evaluation.json", str(filler)])
        assert_one_message(*result, "evaluate.py")
        assert {p.name for p in out.iterdir()} == FILES
        filler.unlink()
        evaluate[-1] = place / "figures"
        result = nursery.call(*evaluate, log=log, full_at=["robustness.png", str(filler)])
        assert_one_message(*result, "evaluate.py")
        filler.unlink()
        assert nursery.call(*evaluate, log=log)[0] == 0
        assert [p.name for p in (place / "figures").iterdir()] == ["robustness.png"]

        # A run that is to be thrown away stays whole as long as the new one cannot be begun.
        anew = [*train, "--overwrite", "--seed", 1]
        result = nursery.call(*anew, log=log, full_at=["config.json", str(filler)])
        assert_one_message(*result, "train.py")
        filler.unlink()
        FolderReader(out).check_claim(CONFIG)
        FolderReader(out).check_products()


def test_a_sweep(nursery, tmp_path):
    with disk(tmp_path / "disk", "6m") as place:
        path, out, filler = tmp_path / "two.toml", place / "two", place / "filler"
        path.write_text(
            f'dataset = "digits"\nepochs = {CONFIG.epochs}\nrepeats = 2\n[methods.none]\n'
        )
        sweep, log = ["train", "--sweep", path, "--out", out], tmp_path / "log"
        for name in ("sweep.toml", "error.txt"):
            (place / "broken").mkdir(exist_ok=True)
            result = nursery.call(*sweep, log=log, full_at=[name, str(filler)])
            filler.unlink(missing_ok=True)
            if name == "sweep.toml":
                assert_one_message(*result, "train.py")
        status, output = nursery.call(*sweep, "--retry-failed", log=log)
        assert status == 0, output
        assert all(FolderReader(p).problem is None for p in out.glob("*-seed*"))

        # The database itself: whoever is told to remove it loses it for nothing.
        (out / "sweep.sqlite3").unlink()
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"0" * 512):
                pass
        status, output = nursery.call(*sweep, log=log)
        assert status == 2 and output.count(": error: ") == 1 and "Traceback" not in output, output
        assert "the disk is full. Make room" in output and "remove" not in output
        filler.unlink()
        assert nursery.call(*sweep, log=log)[0] == 0


def test_standard_output_that_cannot_be_written(nursery, tmp_path):
    """As `train.py ... > /dev/full`: a status, and no second message at the end."""
    train = [*TRAIN, "--out", tmp_path / "run"]
    assert nursery.start(*train, log="/dev/full").wait() == 2
    assert nursery.call(*train, log=tmp_path / "log")[0] == 0


@pytest.mark.parametrize("size", ["100k", "300k"])
def test_prepare(tmp_path, monkeypatch, any_files, size):
    """TFDS' own writers: one message; with room the same command makes the data set."""
    monkeypatch.setitem(datasets.VALIDATION_SIZES, "kmnist", 20)
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 600), ("t10k", 40)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype("uint8")
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes()
            (source / f"{name}-{kind}-ubyte").write_bytes(header + array.tobytes())
    with disk(tmp_path / "disk", size) as place:
        with pytest.raises(OSError, match=r"Cannot write .*kmnist.*Choose a writable --data-dir"):
            datasets.prepare("kmnist", source, place)
        assert not [p for p in place.rglob("*") if p.is_file()]
        subprocess.run(["mount", "-o", "remount,size=8m", str(place)], check=True)
        datasets.prepare("kmnist", source, place)
        assert len(datasets.load("kmnist", place).test.y) == 40
        assert len(list((place / "kmnist").iterdir())) == 1
