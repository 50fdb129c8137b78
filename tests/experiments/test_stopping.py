"""Ctrl-C and SIGTERM in the middle of the work of train.py, evaluate.py and a sweep's worker."""

import random
import signal
import time
from pathlib import Path

import pytest

from tfjacreg.experiments.folder_reader import FolderReader

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_at_random_moments(nursery, tmp_path, number):
    """130 within seconds, one sentence, no traceback, nothing half done; and on it goes."""
    seed = random.SystemRandom().randrange(10**9)
    print("seed of the moments:", seed)
    moments = random.Random(seed)
    (tmp_path / "two.toml").write_text(
        'dataset = "digits"\nepochs = 100\nrepeats = 2\n[methods.none]\n'
    )
    run = tmp_path / "run"
    assert nursery.call("train", "--epochs", 1, "--out", run, log=tmp_path / "log")[0] == 0
    evaluate = ["evaluate", run, "--boundary", "--out", tmp_path / "figures"]
    for argv, epochs in (
        (["train", "--epochs", 1000, "--out", tmp_path / "long"], tmp_path / "long"),
        (["train", "--sweep", tmp_path / "two.toml", "--out", tmp_path / "two"], None),
        (evaluate, None),
    ):
        for _ in range(3):
            log = tmp_path / "log"
            log.unlink()
            child = nursery.start(*argv, log=log)
            time.sleep(moments.uniform(0.3, 3))
            children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
            runs = children.read_text().split() if children.exists() else []
            child.signal(number)
            started = time.monotonic()
            status = child.wait()
            assert time.monotonic() - started < 10
            if status == 0 and argv is evaluate:
                continue  # It was over.
            assert status == 130, child.output
            assert child.output.count("Stopped.") == 1 and "Traceback" not in child.output
            deadline = time.monotonic() + 10
            while any(Path(f"/proc/{pid}").exists() for pid in runs):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        if epochs is not None:
            # What is there is whole: the next command goes on with it.
            FolderReader(epochs).read_config()
            _, rows = FolderReader(epochs).read_state(4)
            # A line may be there whose checkpoint is not.
            if rows:
                assert rows == FolderReader(epochs).read_history()[: len(rows)]
                assert FolderReader(epochs).count_epochs() - len(rows) in (0, 1)
