"""One owner of a folder at a time: while it lives, whoever else comes, and not longer."""

import contextlib
import os
import platform
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tfjacreg.experiments import folder_lock
from tfjacreg.experiments.config import RunConfig, RunError
from tfjacreg.experiments.folder import RunFolder
from tfjacreg.experiments.run import run

# Owns a folder, says so and waits; its process needs nothing of TensorFlow.
HOLDER = """
import fcntl, os, sys, time
descriptor = os.open(sys.argv[1] + "/.lock", os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX)
os.write(descriptor, sys.argv[2].encode())
print("mine", flush=True)
time.sleep(60)
"""


def hold(folder, name):
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), name], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "mine\n"
    return process


def test_the_second_is_refused_with_the_process_of_the_first(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.owned():
        with (
            pytest.raises(RunError, match=rf"run is in use by process {os.getpid()}\. .*--wait"),
            folder.owned(),
        ):
            pytest.fail("two owners")
        with pytest.raises(RunError, match="in use by process"):
            run(RunConfig.of(epochs=1), folder.path)
        assert [p.name for p in folder.path.iterdir()] == [".lock"]
    assert not folder.path.exists()  # Nothing was put into it.
    with folder.owned():
        folder.claim(RunConfig.of(epochs=1))
    assert [p.name for p in folder.path.iterdir()] == ["config.json"]


def test_an_owner_on_another_machine_is_named_with_it(tmp_path):
    process = hold(tmp_path, "123 elsewhere\n")
    try:
        with (
            pytest.raises(RunError, match="in use by process 123 on elsewhere"),
            RunFolder(tmp_path).owned(),
        ):
            pytest.fail("two owners")
    finally:
        process.kill()
        process.wait()


def test_a_lock_dies_with_its_owner(tmp_path, capsys):
    process = hold(tmp_path, f"77 {platform.node()}\n")
    (tmp_path / ".partial-elsewhere-77-history.csv").write_text("half a")
    (tmp_path / ".partial-elsewhere-77-saved_model").mkdir()
    (tmp_path / ".partial-elsewhere-77-saved_model" / "a").write_text("half a model")
    assert folder_lock.acquire(tmp_path) is None
    threading.Timer(0.3, process.kill).start()
    with RunFolder(tmp_path).owned(wait=True):
        assert folder_lock.owner(tmp_path) == f"process {os.getpid()}"
        # What the dead one had begun is gone.
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    process.wait()
    assert not list(tmp_path.iterdir())
    assert "in use by process 77: waiting for its end" in capsys.readouterr().err


def test_an_owner_that_has_not_said_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_NAMED_WITHIN", 0.1)
    process = hold(tmp_path, "")
    try:
        assert folder_lock.owner(tmp_path) == "another process"
    finally:
        process.kill()
        process.wait()


def test_who_inherits_the_lock_has_it(tmp_path):
    lock = folder_lock.acquire(tmp_path)
    child = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    folder_lock.release(tmp_path, lock)
    assert folder_lock.acquire(tmp_path) is None and folder_lock.left_in(tmp_path)
    child.kill()
    child.wait()
    lock = folder_lock.acquire(tmp_path)
    folder_lock.release(tmp_path, lock)
    assert not folder_lock.left_in(tmp_path)


def test_many_come_and_go_and_never_two_are_in(tmp_path):
    """The file of the lock comes and goes with them, and the folder too."""
    folder, inside, most, times = tmp_path / "run", [], [], []

    def enter(seed):
        moments = random.Random(seed)
        for _ in range(40):
            lock = folder_lock.acquire(folder, wait=moments.random() < 0.5)
            if lock is None:
                continue
            inside.append(1)
            time.sleep(moments.uniform(0, 0.002))
            most.append(len(inside))
            inside.pop()
            folder_lock.release(folder, lock)
            times.append(1)
            if moments.random() < 0.3:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    threads = [threading.Thread(target=enter, args=[seed]) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(times) > 60
    assert not folder.exists() or not list(folder.iterdir())


def test_a_lock_that_is_no_file_of_ours(tmp_path):
    (tmp_path / "victim").write_text("keep me")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with (
        pytest.raises(RunError, match="Cannot write the run folder"),
        RunFolder(tmp_path / "run").owned(),
    ):
        pytest.fail("a foreign file was written")
    assert (tmp_path / "victim").read_text() == "keep me"


@pytest.mark.parametrize("name", ["a" * 300, "file/run"])
def test_a_folder_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match=r"Cannot write the run folder.*Choose a writable --out"),
        RunFolder(Path(tmp_path, name)).owned(),
    ):
        pytest.fail("there is no such folder")
