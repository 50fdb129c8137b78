"""The ledger of a sweep: each run is handed out once, whoever dies when."""

import os
import random
import sqlite3
import threading

import optuna
import pytest
import sqlalchemy

from tfjacreg.experiments import selection
from tfjacreg.experiments.config import RunError
from tfjacreg.experiments.ledger import Ledger
from tfjacreg.experiments.storage_errors import STORAGE_ERRORS, DatabaseFile, Server
from tfjacreg.experiments.sweep import Sweep

MANY = """
dataset = "digits"
epochs = 1
repeats = 6
[grid]
factor = [0.01, 0.1]
[methods.none]
[methods.weight_decay]
"""
FEW = 'dataset = "digits"\nrepeats = 2\n[methods.none]\n[methods.spectral]\n'
METRICS = {"val_loss": 0.5, "test_loss": 0.6, "test_accuracy": 0.7}


@pytest.fixture
def few(tmp_path):
    (tmp_path / "some.toml").write_text(FEW)
    (tmp_path / "out").mkdir()
    return Sweep.load(tmp_path / "some.toml"), tmp_path / "out"


def test_runs_are_handed_out_in_the_sweeps_order(few):
    sweep, out = few
    names = [sweep.folder(config) for config in sweep.configs().values()]
    with Ledger.open(sweep, out, None, None) as ledger:
        assert list(ledger.latest()) == list(ledger.configs) == names
        for name in names:
            assert not ledger.finished()
            claim = ledger.take()
            assert claim.name == name
            assert claim.trial.params == {"cell": name[:-6], "repeat": int(name[-1])}
            ledger.succeed(claim, METRICS)
            ledger.locks.release(claim.name, claim.descriptor)
        assert ledger.finished() and ledger.take() is None
        assert [result.val_loss for result in ledger.summary().results] == [[0.5, 0.5]] * 2


def test_a_second_worker_adds_nothing(few):
    for _ in range(2):
        with Ledger.open(*few, None, None) as ledger:
            assert len(ledger._study.get_trials()) == 4


def test_a_study_of_the_first_version_goes_on(few):
    """There a trial got its cell and repeat after it was asked for; some workers died between."""
    sweep, out = few
    with Ledger.open(sweep, out, None, None) as ledger:
        url, study = f"sqlite:///{out}/sweep.sqlite3", ledger._study.study_name
    (out / "sweep.sqlite3").unlink()
    old = optuna.create_study(study_name=study, storage=url)
    cells = [cell.name for cell in sweep.cells]
    done = old.ask()
    done.suggest_categorical("cell", cells)
    done.suggest_categorical("repeat", [0, 1])
    done.set_user_attr("test_accuracy", 0.9)
    old.tell(done, 0.25)
    old.ask()
    old.ask().suggest_categorical("cell", cells)
    old.enqueue_trial({"cell": cells[0], "repeat": 0})
    name = f"{done.params['cell']}-seed{done.params['repeat']}"
    with Ledger.open(sweep, out, None, None) as ledger:
        assert len(ledger.latest()) == 4
        taken = []
        # The one that was put back has no name; it is passed over once.
        while len(taken) < 3:
            claim = ledger.take()
            if claim is not None:
                taken.append(claim.name)
                ledger.succeed(claim, METRICS)
        assert sorted([*taken, name]) == sorted(ledger.configs) and ledger.finished()
        losses = [loss for result in ledger.summary().results for loss in result.val_loss]
        assert sorted(losses) == [0.25, 0.5, 0.5, 0.5]


def test_workers_that_ask_at_once(tmp_path, storage):
    """Each run is handed out once, also the last ones; more trials than runs are never begun."""
    (tmp_path / "some.toml").write_text(MANY)
    sweep, out = Sweep.load(tmp_path / "some.toml"), tmp_path / "out"
    out.mkdir()
    taken = []

    def ask():
        with Ledger.open(sweep, out, storage, None) as ledger:
            start.wait()
            while (claim := ledger.take()) is not None:
                taken.append(claim.name)
            start.wait()  # Who leaves frees its locks.

    start = threading.Barrier(4)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(sweep.folder(c) for c in sweep.configs().values())
    with Ledger.open(sweep, out, storage, None) as ledger:
        states = [trial.state for trial in ledger._study.get_trials()]
    assert states == [optuna.trial.TrialState.RUNNING] * len(taken) and len(taken) == 18


def test_a_ctrl_c_while_a_connection_is_closed_is_that_alone(few, monkeypatch, caplog):
    def stopped(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Ledger.open(*few, None, None):
        monkeypatch.setattr(sqlalchemy.engine.default.DefaultDialect, "do_close", stopped)
    assert not caplog.records


def test_a_damaged_database_is_named_with_the_way_out(few, tmp_path):
    """Or what was changed in it means nothing; no error is SQLite's or Optuna's own."""
    sweep, out = few
    with Ledger.open(sweep, out, None, None) as ledger:
        while (claim := ledger.take()) is not None:
            ledger.succeed(claim, METRICS)
            ledger.locks.release(claim.name, claim.descriptor)
    content = (out / "sweep.sqlite3").read_bytes()
    seed = random.SystemRandom().randrange(10**9)
    print("seed of the positions:", seed)
    moments, damages = random.Random(seed), [b"no database" * 500, content[: len(content) // 2]]
    for _ in range(20):
        damaged = bytearray(content)
        for position in moments.sample(range(len(content)), moments.choice([1, 20, 200])):
            damaged[position] ^= 1 << moments.randrange(8)
        damages.append(bytes(damaged))
    refused = 0
    for damaged in damages:
        (out / "sweep.sqlite3").write_bytes(damaged)
        error = None
        try:
            with Ledger.open(sweep, out, None, None) as ledger:
                ledger.check_folders()
                ledger.summary()
        except RunError as found:
            error = found
        except STORAGE_ERRORS as found:
            error = DatabaseFile(out / "sweep.sqlite3").explained(found)
        if error is not None:
            assert "sweep.sqlite3" in str(error) and "damaged" in str(error)
            assert "remove it" in str(error)
        refused += error is not None
    assert refused >= 2


def sqlite_error(name):
    error = sqlite3.OperationalError("some reason")
    error.sqlite_errorcode, error.sqlite_errorname = getattr(sqlite3, name), name
    wrapped = optuna.exceptions.StorageInternalError("An exception is raised during the commit.")
    wrapped.__cause__ = sqlalchemy.exc.OperationalError("INSERT ...\nlines", {}, error)
    wrapped.__cause__.__cause__ = error
    return wrapped


WAYS_OUT = {
    "SQLITE_BUSY": "is locked by another program. Wait",
    "SQLITE_BUSY_SNAPSHOT": "is locked by another program. Wait",
    "SQLITE_LOCKED": "is locked by another program. Wait",
    "SQLITE_FULL": "the disk is full. Make room",
    "SQLITE_READONLY": "cannot be written. Make it and its folder writable",
    "SQLITE_READONLY_DIRECTORY": "cannot be written. Make it and its folder writable",
    "SQLITE_READONLY_DBMOVED": "was removed or replaced while this command used it",
    "SQLITE_PERM": "cannot be written. Make it and its folder writable",
    "SQLITE_CANTOPEN": "cannot be opened. Make it and its folder writable",
    "SQLITE_IOERR_FSYNC": "See to its disk",
    "SQLITE_CORRUPT": "damaged: some reason. Put it back, or remove it",
    "SQLITE_NOTADB": "damaged: some reason. Put it back, or remove it",
    "SQLITE_ERROR": "damaged: some reason. Put it back, or remove it",
}


@pytest.mark.parametrize("name", WAYS_OUT)
def test_every_error_of_sqlite_has_its_way_out(tmp_path, name):
    """Nobody is told to remove what is whole."""
    message = str(DatabaseFile(tmp_path / "sweep.sqlite3").explained(sqlite_error(name)))
    assert str(tmp_path / "sweep.sqlite3") in message and WAYS_OUT[name] in message
    assert ("remove it" in message) == ("damaged" in message)
    assert "\n" not in message and "INSERT" not in message


def test_an_error_of_a_server_has_no_password():
    url = "postgresql://me:hunter2@host/db?sslpassword=hunter3"
    error = sqlalchemy.exc.OperationalError("x", {}, Exception("no hunter2\nand no hunter3"))
    message = str(Server(url).explained(error))
    assert "\n" not in message and "same command goes on" in message and "hunter" not in message


@pytest.mark.parametrize("kind", ["symbolic link", "folder", "pipe"])
@pytest.mark.parametrize("ending", ["", "-journal", "-wal", "-shm"])
def test_a_database_that_is_no_file_is_refused(few, tmp_path, kind, ending):
    """SQLite would follow the link and write there, or wait for the pipe's other end."""
    path = few[1] / f"sweep.sqlite3{ending}"
    (tmp_path / "mine").write_bytes(b"")
    {"symbolic link": lambda: path.symlink_to(tmp_path / "mine"), "folder": path.mkdir,
     "pipe": lambda: os.mkfifo(path)}[kind]()  # fmt: skip
    refused = pytest.raises(OSError, match=f"sweep.sqlite3{ending}: .*a {kind}")
    with refused, Ledger.open(*few, None, None):
        pass
    assert (tmp_path / "mine").read_bytes() == b""


def test_a_run_folder_that_is_a_link_is_refused(few, tmp_path):
    """A stranger's sweep would have another folder's files written, removed or shown."""
    sweep, out = few
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".partial-a").write_text("mine")
    name = [sweep.folder(config) for config in sweep.configs().values()][2]
    (out / name).symlink_to(tmp_path / "mine")
    refused = pytest.raises(RunError, match=f"{name} must be a folder.*a symbolic link")
    with refused, Ledger.open(sweep, out, None, None):
        pass
    with pytest.raises(RunError, match=f"{name} must be a folder.*a symbolic link"):
        selection.read_cells(out, sweep)
    (out / name).unlink()
    with Ledger.open(sweep, out, None, None) as ledger:
        (out / name).symlink_to(tmp_path / "mine")  # While a worker is at work.
        claims = [ledger.take(), ledger.take()]
        assert name not in [claim.name for claim in claims]
        with pytest.raises(RunError, match=f"{name} must be a folder"):
            ledger.take()
    assert [p.name for p in (tmp_path / "mine").iterdir()] == [".partial-a"]
