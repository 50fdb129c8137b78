"""Workers of a sweep: every run is made once, by any number of processes on one or many machines.

Each run has a process of its own. So it is what `train.py` makes of the same settings, whatever the
worker did before, and a crash of TensorFlow is one failed run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import tensorflow as tf
from optuna.trial import TrialState
from tqdm import tqdm

from tfjacreg import atomic_files, cli
from tfjacreg.experiments import durations, evaluation, pipeline, reading
from tfjacreg.experiments.config import RunConfig, RunError
from tfjacreg.experiments.folder import RunFolder
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.ledger import Claim, Ledger, Summary, database_of
from tfjacreg.experiments.locks import FileLocks
from tfjacreg.experiments.run import train
from tfjacreg.experiments.storage_errors import STORAGE_ERRORS
from tfjacreg.experiments.sweep import SWEEP_FILE, Judgement, Sweep
from tfjacreg.printable import printable

_POLL = 2.0  # Seconds between checks of the other workers.
_NO_LOG = "the run's process ended without a word; its disk may be full"


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    storage: str | None = None,
    data_dir: str | None = None,
    retry_failed: bool = False,
    announcement: str = "",
) -> Summary:
    """Takes part in a sweep until every run of it is finished, by this worker or another.

    The second stage is another sweep: `stages.run` makes both.

    Args:
        sweep: The sweep.
        out: The sweep's folder. It holds a copy of the file, `sweep.toml`; a run folder for each
            run, with `error.txt` if it failed; and, without `storage`, Optuna's `sweep.sqlite3`.
        storage: A `postgresql://` URL, for workers on several machines. The study in it is named
            after the content of the sweep file, and of data and a network of your own.
        data_dir: The folder in which tensorflow-datasets keeps its data; None for its default.
        retry_failed: Whether runs that have failed by now are tried once more.
        announcement: Printed once the folder and the storage can be used.

    Returns:
        The results of the sweep.

    Raises:
        ValueError: If the URL is not valid.
        RunError: If `out` belongs to another sweep or cannot be written, the data is missing, or
            the storage cannot be used.
    """
    try:
        with contextlib.ExitStack() as stack:
            claim_folder(sweep, out)
            ledger = stack.enter_context(Ledger.open(sweep, out, storage, data_dir))
            ledger.reopen(failed=retry_failed, lost=storage is None)
            ledger.check_folders()
            ledger.clear_locks()
            if announcement:
                cli.say(announcement)
            if ledger.finished():
                return ledger.summary()
            bar = stack.enter_context(_Bar(ledger, _count_test_images(ledger)))
            while not ledger.finished():
                claim = ledger.take()
                if claim is None:
                    time.sleep(_POLL)
                    ledger.locks.ensure_alive()
                else:
                    try:
                        bar.write(_train(ledger, claim, bar))
                    finally:
                        ledger.locks.release(claim.name, claim.descriptor)
                bar.show()
            return ledger.summary()
    except OSError as error:
        raise RunError(
            f"Cannot write the sweep's folder {out}: {error}. Choose a writable --out."
        ) from error
    except STORAGE_ERRORS as error:
        raise database_of(out, storage).explained(error) from error


def claim_folder(sweep: Sweep, out: Path, *, way_out: str = "Choose another --out.") -> None:
    """Makes `out` the folder of this sweep, or refuses if it belongs to another.

    Args:
        sweep: The sweep.
        out: The folder.
        way_out: What to do if it belongs to another; ends the message.

    Raises:
        RunError: If it belongs to another sweep.
    """
    out.mkdir(parents=True, exist_ok=True)
    copy = out / SWEEP_FILE
    with FileLocks(out).exclusive():
        if not os.path.lexists(copy):
            with atomic_files.replacing(copy) as file:
                file.write_bytes(sweep.content)
        elif reading.read_bytes(copy, reading.SWEEP) != sweep.content:
            raise RunError(
                f"{out} is that of another sweep: its {SWEEP_FILE} differs from the one given. "
                f"{way_out}"
            )


def _count_test_images(ledger: Ledger) -> int:
    """Counts the test images first: bad data or a bad network would fail every run in turn."""
    # TensorFlow would take the memory of the GPU for this process, and the runs' own processes need
    # it; this has no effect if TensorFlow has already started.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    return _test_images(next(iter(ledger.configs.values())))


def _test_images(config: RunConfig) -> int:
    data = pipeline.load(config)
    try:
        config.make_network(data.input_shape, data.num_classes)
    except ValueError as error:
        raise RunError(str(error)) from error
    return len(data.test.y)


class _Bar(tqdm):
    """A bar of the epochs of the whole sweep, whoever trains them, with the time left."""

    def __init__(self, ledger: Ledger, test_images: int) -> None:
        self._ledger = ledger
        self._test_images = test_images
        self._told = bool(durations.timed(ledger))
        super().__init__(
            desc=ledger.out.name,
            total=len(ledger.configs) * ledger.sweep.any_config.epochs,
            initial=ledger.epochs(),
            unit="epoch",
            mininterval=1 if sys.stderr.isatty() else 60,
            miniters=0,
            dynamic_ncols=True,
            # tqdm's estimate counts all epochs alike, and does not include a second stage.
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} epochs [{elapsed}{postfix}]",
        )

    def show(self) -> None:
        """Updates the bar."""
        latest = self._ledger.latest()
        states = [trial.state for trial in latest.values() if trial.state.is_finished()]
        failed = states.count(TrialState.FAIL)
        runs = f"{len(states)} of {len(self._ledger.configs)} runs"
        left = durations.left(self._ledger, self._test_images)
        text = runs + (f", {failed} failed" if failed else "")
        if left:
            text += f", {durations.shown(left)} left"
            if not self._told:
                both = ", with the second stage" * (self._ledger.sweep.final is not None)
                self.write(f"Left after the first run{both}: {durations.shown(left)}.")
                self._told = True
        self.set_postfix_str(text, refresh=False)
        self.update(self._ledger.epochs() - self.n)


def _train(ledger: Ledger, claim: Claim, bar: _Bar) -> str:
    """Makes a run and records its result; returns the result in a line."""
    folder = RunFolder(ledger.out / claim.name)
    folder.clear_temporaries()
    whole, started = not folder.reader.claimed, time.monotonic()
    if folder.reader.finished and not ledger.unjudged(folder.reader):
        log = _adopted(ledger.configs[claim.name], folder.reader)
    else:
        log = _process(ledger, claim, bar)
    if log is None:
        try:
            metrics = folder.reader.read_metrics()
        except RunError as error:
            log = f"RunError: {error}"
    if log is None:
        folder.clear_error()
        seconds = time.monotonic() - started if whole else None
        ledger.succeed(claim, metrics, seconds=seconds)
        loss = f"val_loss {metrics['val_loss']:.4f}, " if "val_loss" in metrics else ""
        return f"{claim.name}: {loss}test accuracy {metrics['test_accuracy']:.4f}"
    folder.write_error(log if log.strip() else f"{_NO_LOG}\n")
    reason = printable((log.strip().splitlines() or [_NO_LOG])[-1])
    ledger.fail(claim, reason)
    return f"{claim.name}: failed: {reason}"


def _adopted(config: RunConfig, reader: FolderReader) -> str | None:
    """Checks that a finished run, perhaps made by hand, is the sweep's; returns what is wrong."""
    try:
        reader.check_claim(config)
        reader.check_products(alone=True)
    except RunError as error:
        return f"RunError: {error}"
    return None


def _process(ledger: Ledger, claim: Claim, bar: _Bar) -> str | None:
    """Makes a run in a process of its own; returns its log if it failed."""
    config, folder = ledger.configs[claim.name], ledger.out / claim.name
    order = json.dumps(
        {
            "config": dataclasses.asdict(config),
            "folder": str(folder),
            "judgement": dataclasses.asdict(ledger.sweep.judgement),
        }
    )
    # On the disk of the runs: the machine's temporary folder may be full.
    with tempfile.TemporaryFile(dir=ledger.out) as log:
        process = subprocess.Popen(
            # -P forbids imports from the current folder, as for train.py.
            [sys.executable, "-P", "-m", "tfjacreg.experiments.workers"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            # The lock lasts until this process has ended as well.
            pass_fds=[claim.descriptor],
            # Ctrl-C goes to the worker, which ends this process.
            process_group=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        try:
            with contextlib.suppress(BrokenPipeError):  # It ended at once; the log says why.
                os.write(process.stdin.fileno(), order.encode() + b"\n")  # type: ignore[union-attr]
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
                ledger.locks.ensure_alive()
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
    """Ends this process, whatever it does, when the worker's end of the pipe is closed."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def _run_for_worker() -> None:
    """The process of a run, which gets the configuration as a line of JSON."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_worker, daemon=True).start()
    try:
        # The worker has the lock, and this process inherits it.
        train(RunConfig.of(**order["config"]), RunFolder(order["folder"]), verbose=0)
        judgement = Judgement(**order["judgement"])
        if judgement.names:
            path = Path(order["folder"])
            evaluation.judge_run(path, judgement.names, limit=judgement.limit)
    except Exception as error:
        traceback.print_exc()
        # The last line of the log is the error in short.
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    _run_for_worker()
