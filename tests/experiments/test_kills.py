"""Every signal at random moments of every command: nothing twice, nothing lost, nothing left.

`--kills` says how many, `--moments` replays a seed; benchmarks/random_kills.py makes a record.
"""

import gzip
import shutil
import signal
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import optuna
import pytest
from nursery import is_over
from test_workers import study

from tfjacreg.experiments import workers
from tfjacreg.experiments.config import RunConfig
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.sweep import Sweep

pytestmark = pytest.mark.slow
EPOCHS = 4
FILES = {"config.json", "history.csv", "metrics.json", "classifier.keras", "saved_model"}
# Of these a command knows, and says so; the others end it at once.
STOPPING = (signal.SIGINT, signal.SIGTERM)
SIGNALS = (*STOPPING, signal.SIGKILL, signal.SIGHUP, signal.SIGQUIT, signal.SIGABRT)
# Of the kills, what each command gets; a sweep with each kind of database.
SHARES = {"train": 0.25, "evaluate": 0.15, "sweep": 0.2, "report": 0.1, "prepare": 0.1}
TWO = f"""
dataset = "digits"
epochs = {EPOCHS}
repeats = 1
[methods.spectral]
[methods.none]
"""


def command(out, seed):
    return ["train", "--epochs", EPOCHS, "--seed", seed, "--out", out]


def result(path):
    """What a run came to, to the byte: figures, history and weights, but no times."""
    folder = FolderReader(path)
    folder.check_products()
    metrics = folder.read_metrics()
    rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in folder.read_history()]
    del metrics["files"], metrics["sha256"], metrics["step_seconds"], metrics["training_seconds"]
    for split in ("val", "test"):
        del metrics[f"lowest_{split}_loss"]["step_seconds"]
    weights = {}

    def add(name, item):
        if isinstance(item, h5py.Dataset):
            weights[name] = item[()].tobytes()

    with (
        zipfile.ZipFile(folder.classifier_file) as archive,
        archive.open("model.weights.h5") as part,
        h5py.File(part, "r") as file,
    ):
        file.visititems(add)
    assert weights
    return metrics, rows, weights


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Undisturbed(NamedTuple):
    """A command that ran to its end."""

    output: str
    seconds: float
    changes: int  # Of files.


def undisturbed_run(nursery, argv, log):
    started = time.monotonic()
    status, output = nursery.call(*argv, log=log, dies_at=-1)
    assert status == 0, output
    changes = int(output.rpartition("changes of files: ")[2].split()[0])
    return Undisturbed(output, time.monotonic() - started, changes)


class Killer:
    """Kills a command as often as it should be; a process that was over before does not count.

    Attributes:
        left: How many kills are to come.
    """

    def __init__(self, name, nursery, moments, log, kills):
        self.left = max(round(SHARES[name] * kills), 2)
        self._tries = 10 * self.left
        self._name, self._nursery, self._moments, self._log = name, nursery, moments, log

    def undisturbed(self, argv):
        """Runs the command to its end; how long it takes and what it changes is known then."""
        self.know(undisturbed_run(self._nursery, argv, self._log))

    def know(self, run):
        """Takes what is known of the command from a run that was not disturbed."""
        self._seconds, self._changes = run.seconds, run.changes
        print(f"{self._name} takes {self._seconds:.1f} s, {self._changes} changes of files")
        assert self._changes > 5

    def kill(self, argv, *, workers=1):
        """Before some change of files, or at some other time; checks how the processes end.

        Returns:
            Whether all of them were over before.
        """
        started, before = [], self.left
        self._tries -= 1
        assert self._tries >= 0, "nearly all of them are over before the signal"
        for _ in range(workers):
            number, log = self._moments.choice(SIGNALS), self._log.with_suffix(f".{len(started)}")
            log.unlink(missing_ok=True)
            if self._moments.random() < 0.5:
                change = self._moments.randrange(self._changes)
                moment = f"before change {change}"
                child = self._nursery.start(*argv, log=log, dies_at=change, dies_by=number)
                delay = None
            else:
                delay = self._moments.uniform(0, self._seconds)
                moment = f"after {delay:.2f} s"
                child = self._nursery.start(*argv, log=log)
            started.append((child, number, delay, moment))
        for child, number, delay, moment in started:
            if delay is not None:
                time.sleep(delay)
                runs = self._runs(child)
                child.signal(number)
                self._ended(child, number, moment, runs)
        for child, number, delay, moment in started:
            if delay is None:
                self._ended(child, number, moment, [])
        return self.left == before

    @staticmethod
    def _runs(child):
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        return children.read_text().split() if children.exists() else []

    def _ended(self, child, number, moment, runs):
        started = time.monotonic()
        status = child.wait()
        if status != 0:
            print(f"kill: {self._name}, {number.name} {moment}: status {status}")
        assert "Traceback" not in child.output and "Exception ignored" not in child.output
        if moment.startswith("after"):
            assert time.monotonic() - started < 10
        if status != 0:
            self.left -= 1
            assert status == (130 if number in STOPPING else -number), child.output
            assert child.output.count("Stopped.") == (number in STOPPING), child.output
        deadline = time.monotonic() + 10
        while not all(map(is_over, runs)):  # They end with their worker.
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def killer(request, nursery, moments, tmp_path):
    name = request.node.originalname.removeprefix("test_")
    return Killer(name, nursery, moments, tmp_path / "log", request.config.getoption("kills"))


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory):
    """The results of two runs, by seed; the folder in which they are; the first command's run."""
    folder, results, runs = tmp_path_factory.mktemp("undisturbed"), {}, []
    for seed in (0, 1):
        runs.append(undisturbed_run(nursery, command(folder / str(seed), seed), folder / "log"))
        results[seed] = result(folder / str(seed))
    assert results[0] != results[1]
    return results, folder, runs[0]


@pytest.fixture(scope="module")
def undisturbed_sweep(nursery, tmp_path_factory):
    """A sweep of two runs by one worker: its folder and the command's run."""
    folder = tmp_path_factory.mktemp("undisturbed_sweep")
    path, out = folder / "two.toml", folder / "two"
    path.write_text(TWO)
    argv = ["train", "--sweep", path, "--out", out]
    return out, undisturbed_run(nursery, argv, folder / "log")


def lines(path):
    try:
        return (path / "history.csv").read_text().splitlines()
    except FileNotFoundError:
        return []


def test_train(nursery, killer, undisturbed, moments, tmp_path):
    results, _, first = undisturbed
    killer.know(first)
    out, seed = tmp_path / "run", 0
    middle = {"dies_at": first.changes // 2, "log": tmp_path / "log"}
    assert nursery.start(*command(out, seed), **middle).wait() == -signal.SIGKILL
    assert len(lines(out)) > 1 and not FolderReader(out).finished
    while killer.left > 0:
        again = FolderReader(out).finished or moments.random() < 0.3
        overwrite = ["--overwrite"] if again else []
        # What is still there of a run that was being thrown away does not count.
        previous, before = seed, [] if FolderReader(out).is_clearing else lines(out)
        seed = 1 - seed if overwrite else seed
        killer.kill([*command(out, seed), *overwrite])
        folder = FolderReader(out)
        if not folder.claimed:
            assert not before and set(p.name[:9] for p in out.glob("*")) <= {".partial-", ".lock"}
            continue
        config = RunConfig.of(epochs=EPOCHS, seed=folder.read_config()["seed"])
        if overwrite and config.seed == previous:
            # Killed before the first change: the old run is as it was.
            assert FolderReader(out).is_clearing or lines(out) == before
            seed = previous
        elif not overwrite:
            # The last line may be that of an epoch that was not yet in the checkpoint.
            assert config.seed == seed and lines(out)[: max(len(before) - 1, 0)] == before[:-1]
        if folder.finished:
            assert result(out) == results[config.seed]
    status, output = nursery.call(*command(out, seed), log=tmp_path / "log")
    assert status == 0, output
    assert result(out) == results[seed]
    assert {p.name for p in out.iterdir()} == FILES


def test_evaluate(nursery, killer, undisturbed, tmp_path):
    out = undisturbed[1] / "0"
    argv = ["evaluate", out, "--attacks", "noise", "pgd", "square", "--boundary", "--sigma"]
    argv += ["--adversarial-examples", 2, "--out", tmp_path / "figures"]
    killer.undisturbed(argv)
    whole = [contents(out), contents(tmp_path / "figures")]
    (out / "evaluation.json").unlink()
    known: set[str] = set()
    while killer.left > 0:
        over = killer.kill(argv)
        found = FolderReader(out).read_evaluation() or {}
        assert known <= found.keys()
        known = set(found)
        if over:  # Once more from the start.
            assert [contents(out), contents(tmp_path / "figures")] == whole
            (out / "evaluation.json").unlink()
            known = set()
    status, output = nursery.call(*argv, log=tmp_path / "log")
    assert status == 0, output
    assert [contents(out), contents(tmp_path / "figures")] == whole
    examples = {"evaluation.json", "adversarial_examples.png"}
    assert {p.name for p in out.iterdir()} == FILES | examples
    figures = {"robustness.png", "boundary.png", "sigma.png"}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == figures


def test_sweep(nursery, killer, undisturbed, undisturbed_sweep, storage, tmp_path):
    """Two workers, killed both: each run once, in the end, and the table of one left alone."""
    whole, alone = undisturbed_sweep
    killer.know(alone)
    path, out = tmp_path / "two.toml", tmp_path / "two"
    path.write_text(TWO)
    argv = ["train", "--sweep", path, "--out", out]
    argv += ["--storage", storage] if storage else []
    seen: dict[str, list[str]] = {}
    while killer.left > 0:
        over = killer.kill(argv, workers=2)
        before, seen = seen, {p.name: lines(p) for p in out.glob("*-seed*")}
        for name, rows in before.items():
            assert seen[name][: max(len(rows) - 1, 0)] == rows[:-1]
        if over:  # Once more from the start.
            if storage:
                old = study(out, storage)
                optuna.delete_study(study_name=old.study_name, storage=old._storage)
            shutil.rmtree(out)
            seen = {}
    pair = [nursery.start(*argv, log=tmp_path / f"log{number}") for number in range(2)]
    assert [child.wait() for child in pair] == [0, 0], [child.output for child in pair]
    configs = list(Sweep.load(path).configs().values())
    for config in configs:
        folder = out / Sweep.folder(config)
        assert {p.name for p in folder.iterdir()} == FILES
        FolderReader(folder).check_claim(config)
        assert result(folder) == result(whole / folder.name)
        if config.regularizer == "spectral":
            assert result(folder) == undisturbed[0][config.seed]
        kept = seen.get(folder.name, [])
        assert (
            lines(folder)[: max(len(kept) - 1, 0)] == kept[:-1] and len(lines(folder)) == EPOCHS + 1
        )
    names = {Sweep.folder(config) for config in configs}
    database = set() if storage else {"sweep.sqlite3"}
    assert {p.name for p in out.iterdir()} == names | {"sweep.toml", ".sweep.lock"} | database
    found = study(out, storage).get_trials()
    assert {trial.state for trial in found} == {optuna.trial.TrialState.COMPLETE}
    assert sorted(f"{t.params['cell']}-seed{t.params['repeat']}" for t in found) == sorted(names)
    summary = workers.run_sweep(Sweep.load(path), out, storage=storage)
    assert not summary.failures and len(summary.results) == 2
    for output in (alone.output, *(child.output for child in pair)):
        assert str(summary) in output


def test_report(nursery, killer, undisturbed_sweep, tmp_path):
    sweep, out = tmp_path / "two", tmp_path / "report"
    shutil.copytree(undisturbed_sweep[0], sweep)
    (tmp_path / "nothing").mkdir()
    argv = ["evaluate", sweep / "none-lr0.01-b32-seed0", "--attacks", "noise"]
    status, output = nursery.call(*argv, "--out", sweep / "f", log=tmp_path / "log")
    assert status == 0, output
    argv = ["tfjacreg", "report", sweep, "--out", out, "--benchmarks", tmp_path / "nothing"]
    killer.undisturbed(argv)
    whole, read = contents(out), contents(sweep)
    while killer.left > 0:
        killer.kill(argv)
        # What is there is whole: the last report's, until the next one's takes its place.
        assert {k: v for k, v in contents(out).items() if not k.name.startswith(".")} == whole
    assert nursery.call(*argv, log=tmp_path / "log")[0] == 0
    assert contents(out) == whole and contents(sweep) == read


def test_prepare(nursery, killer, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 600), ("t10k", 100)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes()
            content = gzip.compress(header + array.astype("uint8").tobytes())
            (source / f"{name}-{kind}-ubyte.gz").write_bytes(content)
    argv = ["tfjacreg", "prepare", "kmnist", source, "--data-dir"]
    killer.undisturbed([*argv, tmp_path / "whole"])
    whole, data = contents(tmp_path / "whole"), tmp_path / "data"
    while killer.left > 0:
        killer.kill([*argv, data])
        found = {k: v for k, v in contents(data).items() if not k.parts[1].startswith(".")}
        assert found in ({}, whole)
        if found:  # Once more from the start.
            shutil.rmtree(data / "kmnist")
    assert nursery.call(*argv, data, log=tmp_path / "log")[0] == 0
    assert contents(data) == whole
