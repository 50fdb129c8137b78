"""What is read in a folder of others is a regular file in it, of a size such a file can have."""

import os
import socket

import pytest

from tfjacreg.experiments import checkpoint, data_readers, files, reading, records
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.locks import FileLocks
from tfjacreg.experiments.sweep import Sweep

SECRET = "db.example.org:5432:*:me:hunter2"


def link(path):
    secret = path.parent.parent / "secret"
    secret.write_text(SECRET)
    path.symlink_to(secret)


def listening(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def sparse(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


ODD = {
    "a symbolic link": link,
    "a pipe": os.mkfifo,
    "a socket": listening,
    "a folder": os.mkdir,
    "1099511627776": sparse,
}
READERS = {
    "config.json": files.read_json,
    "metrics.json": files.sha256,
    "sweep.toml": Sweep.load,
    "history.csv": lambda path: records.read_history(path, validated=True),
    "classifier.keras": checkpoint.load,
    "checkpoint.keras": checkpoint.read_note,
    "x.png": lambda path: reading.read_bytes(path, reading.PICTURE),
    "image.png": data_readers._decoded,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)  # The name of a socket is short.
    return folder


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", READERS)
def test_only_a_regular_file_is_read(folder, name, kind):
    ODD[kind](folder / name)
    with pytest.raises((OSError, ValueError), match=kind) as caught:
        READERS[name](folder / name)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in ODD if not kind.isdecimal()])
def test_why_a_run_failed_is_read_from_its_folder_alone(folder, kind):
    ODD[kind](folder / "error.txt")
    problem = FolderReader(folder).problem
    assert "cannot be read" in problem and kind in problem and "hunter2" not in problem


def test_of_a_long_log_the_end_is_read(folder):
    (folder / "error.txt").write_text("x\n" * 100_000 + "the error")
    assert FolderReader(folder).problem == "failed: the error"


@pytest.mark.parametrize("kind", ["a symbolic link", "a pipe", "a socket"])
def test_a_saved_model_has_no_other_files(folder, kind):
    (folder / "saved_model").mkdir()
    (folder / "saved_model" / "saved_model.pb").write_bytes(b"x")
    ODD[kind](folder / "saved_model" / "odd")
    with pytest.raises(OSError, match=kind):
        files.tree_sha256(folder / "saved_model")


def test_a_file_that_grows_is_not_read_for_ever(folder, monkeypatch):
    (folder / "a").write_bytes(b"12345")
    size = os.fstat

    class Small:
        def __init__(self, descriptor):
            self.st_mode, self.st_size = size(descriptor).st_mode, 1

    monkeypatch.setattr(reading.os, "fstat", Small)
    with pytest.raises(OSError, match="a file that grows"):
        reading.read_bytes(folder / "a", 3)


def test_the_lock_of_a_sweep_is_no_link(folder):
    link(folder / ".sweep.lock")
    with pytest.raises(OSError, match="symbolic"), FileLocks(folder).exclusive():
        pass
