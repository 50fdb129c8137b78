"""The runs of a sweep and their results, kept in a study of Optuna.

The first worker makes a waiting trial for each run, with the run's cell and repeat as parameters.
All changes are made under one lock, and each run has a lock of its own. Locks end with their owner:
the kernel releases locks of files, and a PostgreSQL server releases its own when the connection
ends. A trial that is running and not locked belonged to a worker that has ended; the next worker
that looks takes it over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from tfjacreg.experiments import folder_lock
from tfjacreg.experiments.config import RunConfig, RunError, file_name
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.locks import FileLocks, PostgresLocks, server_url
from tfjacreg.experiments.storage_errors import DatabaseFile, Server
from tfjacreg.experiments.sweep import Cell, Sweep

DATABASE = "sweep.sqlite3"
_PATIENCE = 60.0  # Seconds to wait for another program that has locked the database.


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of the repeats of a cell.

    Attributes:
        cell: The cell.
        val_loss: Of each finished repeat, after its last epoch; empty on the whole training set.
        val_accuracy: Likewise.
        test_accuracy: Of each finished repeat, after its last epoch.
    """

    cell: Cell
    val_loss: list[float]
    val_accuracy: list[float]
    test_accuracy: list[float]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The results of a sweep.

    Attributes:
        repeats: The number of repeats that each cell is to have.
        results: One for each cell, in the sweep's order.
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
            done = f"{len(result.test_accuracy)} of {self.repeats}"
            lines.append("{:<36} {:>8} {:>9} {:>14}".format(result.cell.name, done, *means))
        lines += [f"failed: {name}: {error}" for name, error in self.failures.items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A run whose lock this worker has.

    Attributes:
        name: The name of its folder.
        trial: Its trial.
        descriptor: The descriptor of the lock's file; a process that inherits it has the lock too.
    """

    name: str
    trial: Trial
    descriptor: int


class Ledger:
    """The trials of a sweep. `Ledger.open` joins them.

    Attributes:
        sweep: The sweep.
        out: Its folder.
        configs: The configuration of each run, by the name of its folder.
        locks: The locks of the runs and of the ledger itself.
    """

    def __init__(
        self,
        sweep: Sweep,
        out: Path,
        configs: dict[str, RunConfig],
        locks: FileLocks,
        study: optuna.Study,
        database: DatabaseFile | Server,
    ) -> None:
        self.sweep = sweep
        self.out = out
        self.configs = configs
        self.locks = locks
        self._study = study
        self._database = database

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, sweep: Sweep, out: Path, storage: str | None, data_dir: str | None
    ) -> Iterator[Ledger]:
        """Joins the sweep's study, which the first worker makes.

        Args:
            sweep: The sweep.
            out: Its folder, which holds `sweep.sqlite3` if there is no `storage`.
            storage: A `postgresql://` URL, or None.
            data_dir: The folder in which tensorflow-datasets keeps its data; None for its default.

        Raises:
            ValueError: If the URL is not valid.
            RunError: If a run folder is a link, or the database is damaged.
            OSError: If the database is not a file.
        """
        # All runs have the same data and network, so their digests are computed once.
        known = dataclasses.replace(sweep.any_config, data_dir=data_dir).identified()
        digests = {n: getattr(known, n) for n in ("data_digest", "network_digest")}
        configs = {
            sweep.folder(config): dataclasses.replace(config, **digests)
            for config in sweep.configs(data_dir).values()
        }
        for run in configs:
            FolderReader(out / run).refuse_link()
        database = database_of(out, storage)
        name = study_name(sweep, known, shared=storage is not None)
        locks: FileLocks
        if isinstance(database, DatabaseFile):
            database.check_kind()
            url = sqlalchemy.URL.create("sqlite", database=str(database.path))
            locks, options = FileLocks(out), {"connect_args": {"timeout": _PATIENCE}}
        else:
            url = server_url(database.storage)
            locks, options = PostgresLocks(out, url, name), {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # A Ctrl-C while it closes a connection is logged with a traceback, and raised all the same.
        logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
        with contextlib.closing(locks):
            with locks.exclusive(), database.errors_named():
                tables = optuna.storages.RDBStorage(
                    url.render_as_string(hide_password=False), engine_kwargs=options
                )
                study = optuna.create_study(
                    study_name=name,
                    storage=tables,
                    sampler=optuna.samplers.RandomSampler(),  # Unused: there is nothing to sample.
                    load_if_exists=True,
                )
                ledger = cls(sweep, out, configs, locks, study, database)
                # All runs at first; later those that a first worker did not add before it ended.
                ledger._add(configs.keys() - ledger.latest().keys())
            try:
                yield ledger
            finally:
                tables.engine.dispose()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Surrounds every read of the study: its file must still be the one that was opened."""
        self._database.check()
        with self._database.errors_named():
            yield

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Surrounds every change of the study."""
        with self.locks.exclusive(), self._reading():
            yield

    def _add(self, names: set[str]) -> None:
        """Adds a waiting trial for each of these runs, in the sweep's order."""
        distributions: dict[str, BaseDistribution] = {
            "cell": CategoricalDistribution([cell.name for cell in self.sweep.cells]),
            "repeat": CategoricalDistribution(list(self.sweep.seeds)),
        }
        for name, config in self.configs.items():
            if name in names:
                self._study.add_trial(
                    optuna.trial.create_trial(
                        state=TrialState.WAITING,
                        params={"cell": Cell.of(config).name, "repeat": config.seed},
                        distributions=distributions,
                    )
                )

    def latest(self) -> dict[str, FrozenTrial]:
        """The last trial of each run; a run that is tried again has several."""
        with self._reading():
            named = {_name(trial): trial for trial in self._study.get_trials(deepcopy=False)}
            return {name: trial for name, trial in named.items() if name is not None}

    def finished(self) -> bool:
        """Whether every run has ended, by success or by failure."""
        return all(trial.state.is_finished() for trial in self.latest().values())

    def reopen(self, *, failed: bool, lost: bool) -> None:
        """Puts ended runs back among the waiting ones.

        Args:
            failed: Whether to put back runs that failed.
            lost: Whether to put back runs that succeeded, but whose folder or evaluation was
                removed since.
        """
        with self._changing():
            again = set()
            for name, trial in self.latest().items():
                reader = FolderReader(self.out / name)
                gone = not reader.finished or bool(self.unjudged(reader))
                if (failed and trial.state == TrialState.FAIL) or (
                    lost and gone and trial.state == TrialState.COMPLETE
                ):
                    again.add(name)
            self._add(again)

    def unjudged(self, reader: FolderReader) -> list[str]:
        """What the sweep measures on each run and is missing in a run's `evaluation.json`."""
        names = self.sweep.judgement.names
        if not names:
            return []
        try:
            found = reader.read_evaluation() or {}
        except RunError:  # The evaluation of the run reports what is wrong with the file.
            return list(names)
        return [name for name in names if name not in found]

    def check_folders(self) -> None:
        """Compares the results of runs with their folders, if those are here and finished.

        This comes before `summary`, which relies on every result.

        Raises:
            RunError: If a folder belongs to another run, is damaged, or has other figures.
        """
        for name, trial in self.latest().items():
            folder = FolderReader(self.out / name)
            if trial.state != TrialState.COMPLETE:
                continue
            if (
                not isinstance(trial.user_attrs.get("test_accuracy"), int | float)
                or not trial.values
            ):
                raise self._database.damaged(f"{name} has no result")
            if not folder.finished:
                continue
            folder.check_settings(self.configs[name], "Move that run out of the sweep's folder.")
            here, known = folder.read_metrics()["test_accuracy"], trial.user_attrs["test_accuracy"]
            if here != known:
                raise RunError(
                    f"{folder.metrics_file} is not of the run that this sweep has made: its test "
                    f"accuracy is {here!r}, that of the run was {known!r}. Move it out of the "
                    "sweep's folder, and this command makes it again."
                )

    def clear_locks(self) -> None:
        """Removes the locks that workers left who were killed when their run was recorded."""
        for name, trial in self.latest().items():
            if trial.state.is_finished() and folder_lock.left_in(self.out / name):
                descriptor = self.locks.acquire(name)
                if descriptor is not None:
                    self.locks.release(name, descriptor)

    def take(self) -> Claim | None:
        """Takes a run that an ended worker left or nobody has begun; None if there is none."""
        with self._changing():
            running = (TrialState.RUNNING,)
            for trial in self._study.get_trials(deepcopy=False, states=running):
                claim = self._claim(Trial(self._study, trial._trial_id))
                if claim is not None:
                    return claim
            if any(trial.state == TrialState.WAITING for trial in self.latest().values()):
                return self._claim(self._study.ask())
        return None

    def _claim(self, trial: Trial) -> Claim | None:
        name = _name(trial)
        if name is None:
            return None
        FolderReader(self.out / name).refuse_link()
        descriptor = self.locks.acquire(name)
        if descriptor is None:
            return None
        return Claim(name, trial, descriptor)

    def succeed(
        self, claim: Claim, metrics: dict[str, Any], *, seconds: float | None = None
    ) -> None:
        """Records the result of a run.

        Args:
            claim: The run.
            metrics: Content of its `metrics.json`.
            seconds: How long it took, from the start of its process to its end; None if it was
                interrupted.
        """
        known = {"seconds": seconds}
        names = ("test_accuracy", "val_accuracy", "step_seconds")
        known |= {name: metrics.get(name) for name in names}
        with self._changing():
            for name, value in known.items():
                if value is not None:
                    claim.trial.set_user_attr(name, value)
            # A trial needs a value; runs on the whole training set have no validation loss.
            loss = metrics.get("val_loss", metrics["test_loss"])
            # A worker killed inside `tell` may have recorded the result already.
            self._study.tell(claim.trial, loss, skip_if_finished=True)

    def fail(self, claim: Claim, error: str) -> None:
        """Records why a run failed."""
        with self._changing():
            claim.trial.set_user_attr("error", error)
            self._study.tell(claim.trial, state=TrialState.FAIL)

    def epochs(self) -> int:
        """The number of finished epochs of the sweep, as far as the run folders are here."""
        latest = self.latest()
        return sum(
            config.epochs
            if latest[name].state.is_finished()
            else FolderReader(self.out / name).count_epochs()
            for name, config in self.configs.items()
        )

    def summary(self) -> Summary:
        """The current results of the sweep."""
        results = {cell: Result(cell, [], [], []) for cell in self.sweep.cells}
        failures = {}
        latest = self.latest()
        for name, config in self.configs.items():
            trial = latest[name]
            if trial.state == TrialState.COMPLETE:
                result = results[Cell.of(config)]
                if not config.whole_training_set:
                    result.val_loss.append(trial.values[0])
                    # Runs of other versions, made by hand, may have none.
                    result.val_accuracy.append(trial.user_attrs.get("val_accuracy", math.nan))
                result.test_accuracy.append(trial.user_attrs["test_accuracy"])
            elif trial.state == TrialState.FAIL:
                failures[name] = trial.user_attrs.get("error", "its val_loss is not a number")
        return Summary(self.sweep.repeats, list(results.values()), failures)


def study_name(sweep: Sweep, config: RunConfig, *, shared: bool) -> str:
    """The name of a sweep's study in its database.

    Args:
        sweep: The sweep.
        config: One of its configurations, identified.
        shared: Whether others have studies there too. Their data and networks may be other ones
            under the same names; a folder holds the runs of one sweep.
    """
    content = hashlib.sha256(sweep.content)
    for digest in (config.data_digest, config.network_digest) if shared else ():
        content.update((digest or "").encode())
    kinds = f"{file_name(config.dataset)}-{file_name(config.network)}"
    return f"{kinds}-{content.hexdigest()[:16]}"


def database_of(out: Path, storage: str | None) -> DatabaseFile | Server:
    """The database of a sweep.

    Args:
        out: The sweep's folder.
        storage: A `postgresql://` URL, or None for a file in the folder.
    """
    return DatabaseFile(out / DATABASE) if storage is None else Server(storage)


def _name(trial: FrozenTrial | Trial) -> str | None:
    """The run of a trial; None if a worker of version 0.1.0 ended while it asked for a run."""
    params = trial.params
    return f"{params['cell']}-seed{params['repeat']}" if len(params) == 2 else None
