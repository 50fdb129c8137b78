"""Workers of a sweep: every run of it once, by any number of processes on one or many machines.

Optuna keeps the ledger: a trial for each run, handed out by its grid sampler over the axes `cell`
and `repeat`. The sampler alone gives a cell to two workers that ask at once, and a killed worker's
to nobody. So all changes of the ledger are made under one lock, and a run is worked on under a lock
of its own. Both vanish with their holder: locks of files are freed by the kernel, and those of
PostgreSQL by its server when the connection ends. A trial that is running and unlocked is a dead
worker's, and the next one to look takes it up from the last finished epoch.

Each run has a process of its own, so that it is what `train.py` makes of the same settings whatever
the worker did before, and a crash of TensorFlow is one failed run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import tensorflow as tf
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm import tqdm

from tfjacreg import datasets
from tfjacreg.experiments import files
from tfjacreg.experiments.locks import FileLocks, ServerLocks, server_url
from tfjacreg.experiments.run import RunConfig, RunError, run
from tfjacreg.experiments.sweep import Cell, Sweep

_POLL = 2.0  # Seconds between looks at the other workers.


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of the repeats of a cell.

    Attributes:
        cell: The cell.
        val_loss: Of each finished repeat, after its last epoch.
        test_accuracy: The same.
    """

    cell: Cell
    val_loss: list[float]
    test_accuracy: list[float]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What came of a sweep.

    Attributes:
        repeats: How many each cell was to have.
        results: A line for each cell, in the sweep's order.
        failures: The errors of the failed runs, by the names of their folders.
    """

    repeats: int
    results: list[Result]
    failures: dict[str, str]

    def __str__(self) -> str:
        """A table of means over the finished repeats, and the failed runs."""
        lines = [f"{'cell':<36} {'repeats':>8} {'val_loss':>9} {'test accuracy':>14}"]
        for result in self.results:
            means = (
                f"{statistics.fmean(values):.4f}" if values else "-"
                for values in (result.val_loss, result.test_accuracy)
            )
            done = f"{len(result.val_loss)} of {self.repeats}"
            lines.append("{:<36} {:>8} {:>9} {:>14}".format(result.cell.name, done, *means))
        lines += [f"failed: {name}: {error}" for name, error in self.failures.items()]
        return "\n".join(lines)


def work(
    path: Path | str,
    out: Path | str,
    *,
    storage: str | None = None,
    data_dir: str | None = None,
    retry_failed: bool = False,
) -> Summary:
    """Takes part in a sweep until every run of it is finished, by this worker or another.

    Args:
        path: The sweep file.
        out: The sweep's folder: a copy of the file, `sweep.toml`; a run folder for each run, with
            `error.txt` where it failed; and, without `storage`, Optuna's `sweep.sqlite3`.
        storage: A `postgresql://` URL, for workers on several machines. The study in it is named
            after the content of the sweep file.
        data_dir: Where tensorflow-datasets keeps its data; None is its own default.
        retry_failed: Whether runs that have failed by now are tried once more.

    Raises:
        ValueError: If the sweep file or the URL is not valid.
        RunError: If `out` holds another sweep or cannot be written, the data is missing, or the
            storage cannot be used.
    """
    sweep, out = Sweep.load(path), Path(out)
    try:
        with contextlib.ExitStack() as stack:
            _hold(sweep, out)
            ledger = stack.enter_context(_Ledger.open(sweep, out, storage, data_dir))
            ledger.reopen(failed=retry_failed, lost=storage is None)
            if not ledger.finished():
                _check_data(ledger)
            bar = stack.enter_context(_Bar(ledger))
            while not ledger.finished():
                claim = ledger.take()
                if claim is None:
                    time.sleep(_POLL)
                    ledger.locks.check()
                else:
                    try:
                        bar.write(_train(ledger, claim, bar))
                    finally:
                        ledger.locks.give(claim.name, claim.descriptor)
                bar.show()
            return ledger.summary()
    except OSError as error:
        raise RunError(
            f"Cannot write the sweep's folder {out}: {error}. Choose a writable --out."
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise RunError(
            f"Cannot use the sweep's storage: {error}\nThe same command goes on when it is there."
        ) from error


def _hold(sweep: Sweep, out: Path) -> None:
    """Makes `out` the folder of this sweep, or refuses if it is another's."""
    out.mkdir(parents=True, exist_ok=True)
    copy = out / "sweep.toml"
    with FileLocks(out).ledger():
        if not copy.exists():
            with files.replacing(copy) as temporary:
                temporary.write_bytes(sweep.content)
        elif copy.read_bytes() != sweep.content:
            raise RunError(
                f"{out} holds another sweep: its sweep.toml differs from the file given. "
                "Choose another --out."
            )


def _check_data(ledger: _Ledger) -> None:
    """Missing data would fail every run of the sweep, one after the other."""
    # The runs' own processes need the memory of the GPU that TensorFlow would take for this one,
    # unless it has done so before.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    config = next(iter(ledger.configs.values()))
    try:
        datasets.load(config.dataset, config.data_dir)
    except (OSError, ValueError) as error:
        raise RunError(str(error)) from error


class _Grid(optuna.samplers.GridSampler):
    """The grid sampler for ask and tell, without the loop that it stops after the last trial."""

    def after_trial(self, *args: Any, **kwargs: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Claim:
    """A run that this worker has the lock of."""

    name: str
    trial: Trial
    descriptor: int


class _Ledger:
    """The trials of a sweep: which runs were taken, and what came of them."""

    def __init__(
        self,
        sweep: Sweep,
        out: Path,
        configs: dict[str, RunConfig],
        locks: FileLocks,
        study: optuna.Study,
        axes: dict[str, list[Any]],
    ) -> None:
        self.sweep = sweep
        self.out = out
        self.configs = configs
        self.locks = locks
        self._study = study
        self._axes = axes

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, sweep: Sweep, out: Path, storage: str | None, data_dir: str | None
    ) -> Iterator[_Ledger]:
        """Joins the sweep's study, which the first worker makes."""
        configs = {sweep.folder(c): c for c in sweep.configs(data_dir).values()}
        some = next(iter(configs.values()))
        digest = hashlib.sha256(sweep.content).hexdigest()[:16]
        study = f"{some.dataset}-{some.network}-{digest}"
        locks: FileLocks
        if storage is None:
            url = sqlalchemy.URL.create("sqlite", database=str(out / "sweep.sqlite3"))
            locks, options = FileLocks(out), {"connect_args": {"timeout": 60}}
        else:
            url = server_url(storage)
            locks, options = ServerLocks(out, url, study), {}
        axes: dict[str, list[Any]] = {
            "cell": [cell.name for cell in sweep.cells],
            "repeat": list(range(sweep.repeats)),
        }
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with contextlib.closing(locks):
            with locks.ledger():
                tables = optuna.storages.RDBStorage(
                    url.render_as_string(hide_password=False), engine_kwargs=options
                )
                held = optuna.create_study(
                    study_name=study,
                    storage=tables,
                    sampler=_Grid(axes, seed=0),
                    load_if_exists=True,
                )
            try:
                yield cls(sweep, out, configs, locks, held, axes)
            finally:
                tables.engine.dispose()

    def latest(self) -> dict[str, FrozenTrial]:
        """The last trial of each run that has one. A run tried again has several."""
        named = ((_name_of(trial), trial) for trial in self._study.get_trials(deepcopy=False))
        return {name: trial for name, trial in named if name is not None}

    def finished(self) -> bool:
        """Whether every run is, by success or by failure."""
        latest = self.latest()
        return len(latest) == len(self.configs) and all(
            trial.state.is_finished() for trial in latest.values()
        )

    def reopen(self, *, failed: bool, lost: bool) -> None:
        """Puts runs back that were finished.

        Args:
            failed: Those that failed.
            lost: Those that succeeded and whose folder was removed since.
        """
        with self.locks.ledger():
            for name, trial in self.latest().items():
                if (failed and trial.state == TrialState.FAIL) or (
                    lost
                    and trial.state == TrialState.COMPLETE
                    and not (self.out / name / "metrics.json").exists()
                ):
                    self._study.enqueue_trial(trial.params)

    def take(self) -> _Claim | None:
        """A run that a dead worker left or nobody has begun; None if there is none."""
        with self.locks.ledger():
            for held in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                # A worker that died while it asked left a trial that has no name yet.
                name = _name_of(held) or self._asked(Trial(self._study, held._trial_id))
                descriptor = self.locks.take(name)
                if descriptor is not None:
                    return _Claim(name, Trial(self._study, held._trial_id), descriptor)
            latest = self.latest()
            if len(latest) < len(self.configs) or any(
                trial.state == TrialState.WAITING for trial in latest.values()
            ):
                trial = self._study.ask()
                name = self._asked(trial)
                descriptor = self.locks.take(name)
                if descriptor is not None:
                    return _Claim(name, trial, descriptor)
        return None

    def _asked(self, trial: Trial) -> str:
        """The run that the grid gives to a trial."""
        for axis, values in self._axes.items():
            trial.suggest_categorical(axis, values)
        return _name(trial.params)

    def succeed(self, claim: _Claim, metrics: dict[str, Any]) -> None:
        """Records what a run came to."""
        with self.locks.ledger():
            claim.trial.set_user_attr("test_accuracy", metrics["test_accuracy"])
            # The last words of a worker killed as it said them may have come through after all.
            self._study.tell(claim.trial, metrics["val_loss"], skip_if_finished=True)

    def fail(self, claim: _Claim, error: str) -> None:
        """Records why a run failed."""
        with self.locks.ledger():
            claim.trial.set_user_attr("error", error)
            self._study.tell(claim.trial, state=TrialState.FAIL)

    def epochs(self, latest: dict[str, FrozenTrial]) -> int:
        """How many epochs of the sweep are done with, as far as the run folders are seen here."""
        done = 0
        for name, config in self.configs.items():
            if name in latest and latest[name].state.is_finished():
                done += config.epochs
            else:
                with contextlib.suppress(FileNotFoundError):
                    lines = (self.out / name / "history.csv").read_bytes().count(b"\n")
                    done += lines - 1
        return done

    def summary(self) -> Summary:
        """The sweep as it is now."""
        results = {cell: Result(cell, [], []) for cell in self.sweep.cells}
        failures = {}
        latest = self.latest()
        for name, config in self.configs.items():
            if name not in latest:
                continue
            trial = latest[name]
            if trial.state == TrialState.COMPLETE:
                result = results[Cell.of(config)]
                result.val_loss.append(trial.values[0])
                result.test_accuracy.append(trial.user_attrs["test_accuracy"])
            elif trial.state == TrialState.FAIL:
                failures[name] = trial.user_attrs.get("error", "its val_loss is not a number")
        return Summary(self.sweep.repeats, list(results.values()), failures)


def _name(params: dict[str, Any]) -> str:
    return f"{params['cell']}-seed{params['repeat']}"


def _name_of(trial: FrozenTrial) -> str | None:
    params = trial.system_attrs.get("fixed_params", {}) | trial.params
    return _name(params) if len(params) == 2 else None


class _Bar(tqdm):
    """Epochs of the whole sweep, whoever trains them, with the time left."""

    def __init__(self, ledger: _Ledger) -> None:
        self._ledger = ledger
        some = next(iter(ledger.configs.values()))
        super().__init__(
            desc=ledger.sweep.name,
            total=len(ledger.configs) * some.epochs,
            initial=ledger.epochs(ledger.latest()),
            unit="epoch",
            smoothing=0,  # Epochs of different methods differ.
            mininterval=1 if sys.stderr.isatty() else 60,
            miniters=0,
            dynamic_ncols=True,
        )

    def show(self) -> None:
        """Brings the bar up to date."""
        latest = self._ledger.latest()
        states = [trial.state for trial in latest.values() if trial.state.is_finished()]
        failed = states.count(TrialState.FAIL)
        runs = f"{len(states)} of {len(self._ledger.configs)} runs"
        self.set_postfix_str(runs + (f", {failed} failed" if failed else ""), refresh=False)
        self.update(self._ledger.epochs(latest) - self.n)


def _train(ledger: _Ledger, claim: _Claim, bar: _Bar) -> str:
    """Makes a run and records what came of it, which it returns in a line."""
    folder = ledger.out / claim.name
    if (folder / "metrics.json").exists():
        log = _adopted(ledger.configs[claim.name], folder)
    else:
        log = _process(ledger, claim, bar)
    if log is None:
        metrics = json.loads((folder / "metrics.json").read_text())
        (folder / "error.txt").unlink(missing_ok=True)
        ledger.succeed(claim, metrics)
        values = metrics["val_loss"], metrics["test_accuracy"]
        return "{}: val_loss {:.4f}, test accuracy {:.4f}".format(claim.name, *values)
    with files.replacing(folder / "error.txt") as temporary:
        temporary.write_text(log)
    error = log.splitlines()[-1]
    ledger.fail(claim, error)
    return f"{claim.name}: failed: {error}"


def _adopted(config: RunConfig, folder: Path) -> str | None:
    """Checks that a finished run, perhaps made by hand, is the sweep's; returns what is wrong."""
    try:
        run(config, folder)
    except RunError as error:
        return f"RunError: {error}"
    return None


def _process(ledger: _Ledger, claim: _Claim, bar: _Bar) -> str | None:
    """Makes a run in a process of its own; returns its log if it failed."""
    config, folder = ledger.configs[claim.name], ledger.out / claim.name
    order = json.dumps({"config": dataclasses.asdict(config), "folder": str(folder)})
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tfjacreg.experiments.workers"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            # The lock stays until this process has ended as well.
            pass_fds=[claim.descriptor],
            # A Ctrl-C is for the worker, which ends it.
            process_group=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        try:
            with contextlib.suppress(BrokenPipeError):  # It ended at once; why is in the log.
                os.write(process.stdin.fileno(), order.encode() + b"\n")  # type: ignore[union-attr]
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
                ledger.locks.check()
                bar.show()
        finally:
            process.kill()
            process.wait()
            process.stdin.close()  # type: ignore[union-attr]
        if process.returncode == 0:
            return None
        log.seek(0)
        text = log.read().decode(errors="replace")
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return f"{text}\nThe run's process was ended by {name}; SIGKILL may be lack of memory."
    return text


def _end_with_worker() -> None:
    """Ends this process, in whatever it is doing, when the worker's end of the pipe is closed."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def _run_for_worker() -> None:
    """The process of a run: the configuration comes as a line of JSON."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_worker, daemon=True).start()
    try:
        run(RunConfig(**order["config"]), order["folder"], verbose=0)
    except Exception as error:
        traceback.print_exc()
        # The last line of the log is the error in short.
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    _run_for_worker()
