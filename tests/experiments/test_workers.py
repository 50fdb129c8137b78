"""Workers of a sweep: each run once, whoever is killed when; failures; one table at the end."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from nursery import is_over

import train
from tfjacreg import datasets
from tfjacreg.experiments import ledger, workers
from tfjacreg.experiments.config import RunConfig, RunError
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.ledger import Ledger
from tfjacreg.experiments.locks import server_url
from tfjacreg.experiments.sweep import Sweep

ROOT = Path(__file__).parents[2]
DEADLINE = 120
PYTHON = sys.executable  # Tests put the stand-in below in its place.

MANY = """
dataset = "digits"
epochs = 1
repeats = 8
[grid]
factor = [0.01, 0.1]
[methods.none]
[methods.weight_decay]
"""

# Stands for the process of a run where only the workers are tested: it "trains" for up to so many
# seconds and ends with its worker. It notes clashes in its folder, and what it made.
STAND_IN = """#!{python} -IS
import fcntl, json, os, random, select, sys, time
order = json.loads(sys.stdin.buffer.raw.readline())
folder = order["folder"]
lock = open(folder + "/writer", "a")
def note(what):
    with open(os.path.join(os.path.dirname(folder), "notes"), "a") as file:
        file.write(what + " " + os.path.basename(folder) + "\\n")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    note("clash")
if select.select([0], [], [], random.uniform(0, {seconds}))[0]:
    sys.exit(1)
{special}
note("made")
seed = order["config"]["seed"]
for name, content in (
    ("config.json", order["config"]),
    ("metrics.json", {metrics} | {{"val_loss": seed + 1.5, "test_accuracy": 0.25 + seed / 16}}),
):
    if order["config"]["whole_training_set"]:
        content = {{name: value for name, value in content.items() if "val" not in name}}
    with open(folder + "/partial", "w") as file:
        json.dump(content, file)
    os.replace(folder + "/partial", folder + "/" + name)
"""
METRICS = {"test_accuracy": 0.25, "test_loss": 2.0, "test_spectral_norm": 1.0, "step_seconds": 0.1}
METRICS = METRICS | {f"lowest_{split}_loss": METRICS for split in ("val", "test")}


def _stand_in(tmp_path, special="", seconds=0):
    path = tmp_path / "stand_in"
    values = {"special": special, "seconds": seconds, "metrics": METRICS}
    path.write_text(STAND_IN.format(python=PYTHON, **values))
    path.chmod(0o755)
    return str(path)


def _until(condition, what):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {DEADLINE} s"
        time.sleep(0.02)


def study(out, storage):
    """The only one of its database."""
    url = storage and storage.replace("postgresql:", "postgresql+psycopg:")
    url = url or f"sqlite:///{out}/sweep.sqlite3"
    (name,) = optuna.get_all_study_names(url)
    return optuna.load_study(study_name=name, storage=url)


def _trials(out, storage):
    return study(out, storage).get_trials()


def _start(nursery, number, path, out, storage, **options):
    """So many workers: train.py's own command each, their log beside the folder."""
    argv = ["train", "--sweep", path, "--out", out]
    argv += ["--storage", storage] if storage else []
    log = out.with_suffix(".log")
    return [nursery.start(*argv, log=log, **options) for _ in range(number)]


def _children(worker):
    path = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
    return path.read_text().split() if path.exists() else []


def _kill(crowd):
    """Kills workers; returns once the processes of their runs have ended by themselves."""
    children = [pid for worker in crowd for pid in _children(worker)]
    for worker in crowd:
        worker.kill()
    for pid in children:
        _until(lambda pid=pid: is_over(pid), f"end of the orphan {pid}")


def _wait(crowd):
    for worker in crowd:
        assert worker.wait() == 0, worker.output


@pytest.mark.slow
def test_many_short_runs_and_many_kills(nursery, moments, tmp_path, storage):
    """Three workers ask at once, and are killed while they ask, claim, train and tell."""
    path, out = tmp_path / "many.toml", tmp_path / "out"
    path.write_text(MANY)
    stand_in, notes = _stand_in(tmp_path, seconds=0.2), out / "notes"

    def made():
        return notes.read_text().splitlines() if notes.exists() else []

    for _ in range(3):
        count = len(made())
        crowd = _start(nursery, 3, path, out, storage, stand_in=stand_in)
        _until(lambda n=count: len(made()) > n, "run")
        time.sleep(moments.uniform(0, 0.4))
        _kill(crowd)
    _wait(_start(nursery, 3, path, out, storage, stand_in=stand_in))
    names = [Sweep.folder(config) for config in Sweep.load(path).configs().values()]
    assert sorted(made()) == sorted(f"made {name}" for name in names)
    complete = [t for t in _trials(out, storage) if t.state == optuna.trial.TrialState.COMPLETE]
    done = [f"{t.params['cell']}-seed{t.params['repeat']}" for t in complete]
    assert sorted(done) == sorted(names)
    assert len(_trials(out, storage)) == len(complete)


def _work(tmp_path, text, monkeypatch, special="", **options):
    """A worker in this process, with the stand-in for its runs."""
    monkeypatch.setattr(workers.sys, "executable", _stand_in(tmp_path, special))
    (tmp_path / "some.toml").write_text(text)
    return workers.run_sweep(Sweep.load(tmp_path / "some.toml"), tmp_path / "out", **options)


FEW = 'dataset = "digits"\nepochs = 4\nrepeats = 2\n[methods.none]\n[methods.spectral]\n'
FAILED = "spectral-0.01-lr0.01-b32-seed1"
FAILURE = f'''
if folder.endswith("{FAILED}") and not os.path.exists(folder + "/../repaired"):
    sys.exit("Traceback and so on\\nRunError: diverged")
'''


def test_the_table(tmp_path, monkeypatch):
    """Against the run folders."""
    summary = _work(tmp_path, FEW, monkeypatch)
    out = tmp_path / "out"
    assert summary.repeats == 2 and not summary.failures
    lines = str(summary).splitlines()
    assert len(lines) == 3
    for result, line in zip(summary.results, lines[1:], strict=True):
        metrics = [
            json.loads((out / f"{result.cell.name}-seed{seed}" / "metrics.json").read_text())
            for seed in (0, 1)
        ]
        assert result.val_loss == [m["val_loss"] for m in metrics]
        assert result.test_accuracy == [m["test_accuracy"] for m in metrics]
        assert line.split() == [
            result.cell.name,
            *("2", "of", "2"),
            f"{sum(result.val_loss) / 2:.4f}",
            f"{sum(result.test_accuracy) / 2:.4f}",
        ]
    assert (out / "sweep.toml").read_bytes() == (tmp_path / "some.toml").read_bytes()


@pytest.mark.parametrize("words", ["", "\\n", " \\n\\n"])
def test_a_failure_without_a_word_is_recorded_and_stops_nothing(tmp_path, monkeypatch, words):
    """As where nothing more can be written to the log."""
    silent = FAILURE.replace('sys.exit("Traceback and so on\\nRunError: diverged")', "pass")
    special = silent.replace("pass", f'print("{words}", end=""), sys.stdout.flush(), os._exit(1)')
    summary = _work(tmp_path, FEW, monkeypatch, special)
    assert list(summary.failures) == [FAILED] and "without a word" in summary.failures[FAILED]
    assert [len(result.val_loss) for result in summary.results] == [2, 1]
    assert "without a word" in (tmp_path / "out" / FAILED / "error.txt").read_text()


@pytest.mark.parametrize("gone", ["missing", "file"])
def test_a_temporary_folder_that_is_of_no_use_stops_nothing(tmp_path, monkeypatch, gone):
    (tmp_path / "file").write_text("")
    # It is looked for anew: without one, Python tries others, and the present folder.
    monkeypatch.setattr(workers.tempfile, "tempdir", str(tmp_path / gone))
    summary = _work(tmp_path, FEW, monkeypatch)
    assert not summary.failures
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith("tmp")]


def test_a_failure_is_recorded_and_stops_nothing(tmp_path, monkeypatch, capfd):
    summary = _work(tmp_path, FEW, monkeypatch, FAILURE)
    assert summary.failures == {FAILED: "RunError: diverged"}
    assert [len(result.val_loss) for result in summary.results] == [2, 1]
    assert f"failed: {FAILED}: RunError: diverged" in str(summary)
    assert " 1 of 2 " in str(summary) and " 2 of 2 " in str(summary)
    error = tmp_path / "out" / FAILED / "error.txt"
    assert error.read_text() == "Traceback and so on\nRunError: diverged\n"
    notes = tmp_path / "out" / "notes"
    assert len(notes.read_text().splitlines()) == 3
    captured = capfd.readouterr()
    assert f"{FAILED}: failed: RunError: diverged" in captured.out
    assert "4 of 4 runs, 1 failed" in captured.err and "16/16" in captured.err

    # Started again it is known; tried again it fails again, once; repaired it succeeds.
    (tmp_path / "out" / "repaired").write_text("")
    assert _work(tmp_path, FEW, monkeypatch, FAILURE).failures == summary.failures
    (tmp_path / "out" / "repaired").unlink()
    again = _work(tmp_path, FEW, monkeypatch, FAILURE, retry_failed=True)
    assert again.failures == summary.failures and len(_trials(tmp_path / "out", None)) == 5
    (tmp_path / "out" / "repaired").write_text("")
    repaired = _work(tmp_path, FEW, monkeypatch, FAILURE, retry_failed=True)
    assert not repaired.failures and repaired.results[1].val_loss == [1.5, 2.5]
    assert not error.exists()
    assert len(notes.read_text().splitlines()) == 4


def test_runs_on_the_whole_training_set_have_no_validation_loss(tmp_path, monkeypatch, capfd):
    summary = _work(tmp_path, "whole_training_set = true\n" + FEW, monkeypatch)
    assert [(r.val_loss, r.test_accuracy) for r in summary.results] == [([], [0.25, 0.3125])] * 2
    assert [line.split()[4] for line in str(summary).splitlines()[1:]] == ["-", "-"]
    assert "seed0: test accuracy 0.2500" in capfd.readouterr().out


def test_a_run_whose_process_is_killed_has_failed(tmp_path, monkeypatch):
    special = f'os.kill(os.getpid(), 9) if folder.endswith("{FAILED}") else None'
    summary = _work(tmp_path, FEW, monkeypatch, special)
    assert list(summary.failures) == [FAILED] and "ended by SIGKILL" in summary.failures[FAILED]
    assert "ended by SIGKILL" in (tmp_path / "out" / FAILED / "error.txt").read_text()


def test_runs_are_found_by_their_folders(tmp_path, monkeypatch):
    """Made by hand they are the sweep's, if they are; removed they are made again."""
    out = tmp_path / "out"
    (tmp_path / "some.toml").write_text(FEW)
    configs = list(Sweep.load(tmp_path / "some.toml").configs().values())
    other = RunConfig.of(regularizer="none", epochs=5, seed=1)
    for config, made in ((configs[0], configs[0]), (configs[1], other)):
        folder = out / Sweep.folder(config)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(vars(made)))
        metrics = METRICS | {"val_loss": 0.125, "test_accuracy": 0.5}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    summary = _work(tmp_path, FEW, monkeypatch)
    assert summary.results[0].val_loss == [0.125]
    assert summary.results[0].test_accuracy == [0.5]
    (failure,) = summary.failures.values()
    assert "epochs is 5 there, 4 here" in failure
    assert len((out / "notes").read_text().splitlines()) == 2
    shutil.rmtree(out / Sweep.folder(configs[0]))
    summary = _work(tmp_path, FEW, monkeypatch)
    assert summary.results[0].val_loss == [1.5]
    assert len((out / "notes").read_text().splitlines()) == 3


def test_what_a_dying_worker_leaves_in_the_ledger_is_taken_up(tmp_path, monkeypatch):
    """It may die between any two of Optuna's writes: as it adds the runs, or once it has asked."""
    (tmp_path / "some.toml").write_text(FEW)
    sweep, out = Sweep.load(tmp_path / "some.toml"), tmp_path / "out"
    out.mkdir()
    add, added = optuna.Study.add_trial, []

    def die(self, trial):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(trial)
        add(self, trial)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "add_trial", die)
        with pytest.raises(KeyboardInterrupt), Ledger.open(sweep, out, None, None):
            pass
    assert len(_trials(out, None)) == 2
    with Ledger.open(sweep, out, None, None) as ledger:
        assert len(ledger.latest()) == 4
        ledger._study.ask()
        ledger._study.ask()
    summary = _work(tmp_path, FEW, monkeypatch)
    assert [result.val_loss for result in summary.results] == [[1.5, 2.5], [1.5, 2.5]]
    assert len(_trials(out, None)) == 4
    assert len((out / "notes").read_text().splitlines()) == 4


def test_a_lost_connection_ends_the_worker_and_its_run(tmp_path, monkeypatch, server):
    """Its lock is lost: another may have the run by now."""

    def cut():
        engine = sqlalchemy.create_engine(server_url(server))
        _until((tmp_path / "out" / "pid").exists, "run")
        with engine.connect() as connection:
            connection.execute(
                sqlalchemy.text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE pid != pg_backend_pid() AND backend_type = 'client backend'"
                )
            )
        engine.dispose()

    monkeypatch.setattr(workers, "_POLL", 0.1)
    thread = threading.Thread(target=cut)
    thread.start()
    special = 'open(folder + "/../pid", "w").write(str(os.getpid())); time.sleep(60)'
    with pytest.raises(RunError, match="Cannot use the sweep's storage: .*same command") as error:
        _work(tmp_path, FEW, monkeypatch, special, storage=server)
    thread.join()
    assert "secret" not in str(error.value)
    assert not Path("/proc", (tmp_path / "out" / "pid").read_text()).exists()
    summary = _work(tmp_path, FEW, monkeypatch, storage=server)
    assert [result.val_loss for result in summary.results] == [[1.5, 2.5], [1.5, 2.5]]


def test_a_server_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="Cannot use the sweep's storage") as error:
        _work(tmp_path, FEW, monkeypatch, storage="postgresql://tester:secret@127.0.0.1:9/none")
    assert "secret" not in str(error.value)


DISTURBED = {
    "removed": ("os.remove(file)", "was removed or replaced while"),
    "replaced": (
        "open(file + '2', 'wb').write(open(file, 'rb').read()); os.replace(file + '2', file)",
        "was removed or replaced while",
    ),
    "replaced by a folder": ("os.remove(file); os.mkdir(file)", "was removed or replaced while"),
    "emptied": ("open(file, 'w').close()", "is damaged"),
    "overwritten": ("open(file, 'r+b').write(b'x' * 50000)", "is damaged"),
}


@pytest.mark.parametrize("case", DISTURBED)
def test_a_database_that_is_disturbed_while_a_worker_uses_it(tmp_path, monkeypatch, case):
    """One sentence with its name; then, if need be without it, the same command goes on."""
    code, message = DISTURBED[case]
    special = f"file = folder + '/../sweep.sqlite3'\n{code}"
    with pytest.raises(RunError, match=message) as caught:
        _work(tmp_path, FEW, monkeypatch, special)
    database = tmp_path / "out" / "sweep.sqlite3"
    assert str(database) in str(caught.value) and "\n" not in str(caught.value)
    if database.is_dir():
        database.rmdir()
    if "remove it" in str(caught.value):
        database.unlink()
    summary = _work(tmp_path, FEW, monkeypatch)
    assert [result.val_loss for result in summary.results] == [[1.5, 2.5], [1.5, 2.5]]
    assert len((tmp_path / "out" / "notes").read_text().splitlines()) == 4


def test_a_database_that_another_program_has_locked(tmp_path, monkeypatch):
    _work(tmp_path, FEW, monkeypatch)
    monkeypatch.setattr(ledger, "_PATIENCE", 0.1)
    with contextlib.closing(sqlite3.connect(tmp_path / "out" / "sweep.sqlite3")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(RunError, match="sweep.sqlite3, is locked by another program") as caught:
            _work(tmp_path, FEW, monkeypatch)
        assert "remove" not in str(caught.value)
    _work(tmp_path, FEW, monkeypatch)


@pytest.mark.parametrize("url", ["mysql://host/name", "sqlite:///file", "nonsense"])
def test_other_storages_are_refused(tmp_path, monkeypatch, url):
    with pytest.raises(ValueError, match="postgresql://user@host/name.*Received: " + url):
        _work(tmp_path, FEW, monkeypatch, storage=url)


def test_another_sweeps_folder_is_refused(tmp_path, monkeypatch):
    _work(tmp_path, FEW, monkeypatch)
    before = (tmp_path / "out" / "sweep.toml").read_bytes()
    with pytest.raises(RunError, match="another sweep.*Choose another --out"):
        _work(tmp_path, FEW + "# changed", monkeypatch)
    assert (tmp_path / "out" / "sweep.toml").read_bytes() == before


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("")
    with pytest.raises(RunError, match="Cannot write.*Choose a writable --out"):
        _work(tmp_path, FEW, monkeypatch)


def test_missing_data_is_no_failure_of_every_run(tmp_path, monkeypatch):
    def missing(*_):
        raise FileNotFoundError("no data; download or prepare")

    monkeypatch.setattr(datasets, "load", missing)
    with pytest.raises(RunError, match="download or prepare"):
        _work(tmp_path, FEW, monkeypatch)
    states = [trial.state for trial in _trials(tmp_path / "out", None)]
    assert states == [optuna.trial.TrialState.WAITING] * 4


@pytest.mark.slow
def test_the_command_fails_where_a_run_diverges(tmp_path, capsys):
    """Real processes: a failure's error in its folder, in the table and as exit status."""
    text = 'dataset = "digits"\nepochs = 1\nrepeats = 1\n[grid]\nlearning_rate = [1e30, 0.01]\n'
    (tmp_path / "some.toml").write_text(text + "[methods.none]")
    out = tmp_path / "out"
    assert train.main(["--sweep", str(tmp_path / "some.toml"), "--out", str(out)]) == 1
    assert (
        "failed: none-lr1e+30-b32-seed0: RunError: Training diverged in epoch 1"
        in capsys.readouterr().out
    )
    error = (out / "none-lr1e+30-b32-seed0" / "error.txt").read_text()
    assert "Traceback" in error and "RunError: Training diverged in epoch 1" in error
    whole = FolderReader(out / "none-lr0.01-b32-seed0")
    whole.check_products()
    assert whole.read_metrics()["test_accuracy"] > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sweep", "F", "--epochs", "3"), "--epochs is not for --sweep"),
        (("--sweep", "F", "--seed", "0"), "--seed is not for --sweep"),
        (("--sweep", "F", "--no-augment"), "--augment is not for --sweep"),
        (("--sweep", "F", "--overwrite"), "--overwrite is not for --sweep"),
        (("--storage", "postgresql://h/n"), "--storage needs --sweep FILE"),
        (("--retry-failed",), "--retry-failed needs --sweep FILE"),
    ],
)
def test_options_that_do_not_go_together(capsys, options, message):
    with pytest.raises(SystemExit) as error:
        train.main(list(options))
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers.sys, "executable", _stand_in(tmp_path, FAILURE))
    (tmp_path / "some.toml").write_text(FEW)
    monkeypatch.chdir(tmp_path)
    assert train.main(["--sweep", "some.toml"]) == 1
    assert f"failed: {FAILED}: RunError: diverged\n  in runs/some" in capsys.readouterr().out
    (tmp_path / "runs" / "some" / "repaired").write_text("")
    assert train.main(["--sweep", "some.toml", "--retry-failed", "--out", "runs/some"]) == 0
    assert train.main(["--sweep", "missing.toml"]) == 2
    assert "Cannot read the sweep file" in capsys.readouterr().err


def test_stopped_by_hand(tmp_path, monkeypatch, capsys):
    """The run's process ends, its lock is free, and the same command goes on."""
    special = "os.kill(os.getppid(), 2); time.sleep(60)"
    monkeypatch.setattr(workers.sys, "executable", _stand_in(tmp_path, special))
    (tmp_path / "some.toml").write_text(FEW)
    command = ["--sweep", str(tmp_path / "some.toml"), "--out", str(tmp_path / "out")]
    started = time.monotonic()
    assert train.main(command) == 130
    assert time.monotonic() - started < 30
    assert "The same command goes on" in capsys.readouterr().out
    monkeypatch.setattr(workers.sys, "executable", _stand_in(tmp_path))
    assert train.main(command) == 0
    assert len((tmp_path / "out" / "notes").read_text().splitlines()) == 4


def test_the_process_of_a_run_has_its_lock(tmp_path, monkeypatch):
    """By inheritance: an orphan that is still writing keeps the next worker out."""
    special = """
for number in os.listdir("/proc/self/fd"):
    try:
        if os.readlink("/proc/self/fd/" + number) == os.path.realpath(folder + "/.lock"):
            note("locked")
    except OSError:
        pass
"""
    _work(tmp_path, FEW, monkeypatch, special)
    notes = (tmp_path / "out" / "notes").read_text().splitlines()
    assert sum(line.startswith("locked") for line in notes) == 4 and len(notes) == 8
    # Of a worker that was killed when its run was recorded.
    left = tmp_path / "out" / FAILED / ".lock"
    assert not left.exists()
    left.write_text("1 elsewhere\n")
    _work(tmp_path, FEW, monkeypatch, special)
    assert not left.exists()


@pytest.mark.slow
def test_the_process_of_a_run_ends_with_its_worker(tmp_path):
    config = {"epochs": 10_000, "batch_size": 128, "regularizer": "none"}
    child = subprocess.Popen(
        [PYTHON, "-m", "tfjacreg.experiments.workers"], cwd=ROOT, stdin=subprocess.PIPE
    )
    try:
        order = json.dumps({"config": config, "folder": str(tmp_path)})
        child.stdin.write(order.encode() + b"\n")
        child.stdin.flush()
        _until((tmp_path / "history.csv").exists, "epoch")
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(30) == 1
    finally:
        child.kill()
        child.wait()
