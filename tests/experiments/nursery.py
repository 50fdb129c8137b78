"""Starts train.py, evaluate.py and sweeps many times: each is a fork of one process.

TensorFlow is imported once, and does not compute anything before the fork. The data set is a part
of the digits and the network one dense layer, so that a run takes a second. As a program this file
takes orders as lines of JSON and answers each with a line.
"""

import contextlib
import ctypes
import gc
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEADLINE = 300
PR_SET_PDEATHSIG = 1
PLAN = {
    "noise": {"variance": [0.01, 0.1], "draws": 1},
    "pgd": {"iterations": [1, 2], "eps": 0.1, "step_size": 0.03},
    "square": {"iterations": [2, 4], "eps": 0.1},
}


class Nursery:
    """The process that forks. Its children end with it."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout.readline() == "ready\n"

    def _ask(self, **order):
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the nursery has died"
        return json.loads(answer)

    def start(self, *argv, log, dies_at=None, dies_by=signal.SIGKILL, full_at=None, stand_in=None):
        """Starts a command: `train`, `evaluate` or `tfjacreg`, and its arguments.

        Args:
            argv: The command line.
            log: The file that its output goes to.
            dies_at: The number, counted from 0, of the change of files before which the command
                signals itself; -1 only counts the changes, for the last line of the log.
            dies_by: The signal.
            full_at: The name of a file, and another file that grows until the disk is full when
                the first is to be written.
            stand_in: A program that a sweep's worker starts for each run, instead of a fork that
                trains.
        """
        order = {"argv": [str(a) for a in argv], "log": str(log), "stand_in": stand_in}
        order |= {"dies_at": dies_at, "dies_by": dies_by, "full_at": full_at}
        return Child(self, self._ask(**order), log)

    def call(self, *argv, log, **options):
        """Runs a command to its end; returns its exit status and its output."""
        Path(log).unlink(missing_ok=True)
        child = self.start(*argv, log=log, **options)
        return child.wait(), child.output

    def close(self):
        self._process.stdin.close()
        self._process.wait(DEADLINE)


class Child:
    def __init__(self, nursery, pid, log):
        self.pid, self._nursery, self._log, self._status = pid, nursery, Path(log), None

    def poll(self):
        """The exit status, negative for a signal; None while it runs."""
        if self._status is None:
            self._status = self._nursery._ask(poll=self.pid)
        return self._status

    def wait(self):
        deadline = time.monotonic() + DEADLINE
        while self.poll() is None:
            assert time.monotonic() < deadline, f"{self.pid} does not end:\n{self.output}"
            time.sleep(0.01)
        return self.poll()

    def signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.signal(signal.SIGKILL)
        return self.wait()

    @property
    def output(self):
        return self._log.read_text() if self._log.exists() else ""


def is_over(pid):
    """Whether a process has ended; who inherits it may take seconds to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def shrink(set_attribute=setattr):
    """Makes runs small: few digits, one dense layer, a short plan for evaluate.py.

    Args:
        set_attribute: `setattr`, or a fixture's version of it that is undone afterwards.
    """
    # Imported here: the process that forks must first be told where to find TensorFlow.
    import keras
    import numpy as np
    from keras import layers
    from sklearn.datasets import load_digits

    from tfjacreg import datasets, networks, published
    from tfjacreg.experiments import measures

    # Without TensorFlow's resizing, since it must not compute anything before a fork.
    images, labels = load_digits(return_X_y=True)
    x = np.kron(images.reshape(-1, 8, 8) / 16, np.ones((3, 3))).astype("float32")
    x = np.pad(x, ((0, 0), (2, 2), (2, 2)))[..., None]
    by_class = np.argsort(labels, kind="stable").reshape(-1)
    few = np.concatenate([by_class[labels[by_class] == k][:18] for k in range(10)])
    rest, test = few[np.arange(180) % 18 < 14], few[np.arange(180) % 18 >= 14]
    splits = [datasets.Split(x[rows], labels[rows].astype("int32")) for rows in (rest, test)]

    def dense(input_shape, num_classes, *, initialization):
        assert initialization == "keras"
        inputs = keras.Input(input_shape)
        pooled = layers.Flatten()(layers.AveragePooling2D(7)(inputs))
        return keras.Model(inputs, layers.Dense(num_classes)(pooled))

    set_attribute(published, "check", lambda *_: None)
    set_attribute(datasets, "_digits", lambda: splits)
    set_attribute(datasets, "VALIDATION_SIZES", datasets.VALIDATION_SIZES | {"digits": 20})
    set_attribute(networks, "_BY_NAME", networks._BY_NAME | {"lenet": dense})
    set_attribute(measures, "PLAN", measures.PLAN | PLAN)


def spare_the_disk():
    """SQLite does not wait for what it writes to be on the disk: no test cuts the power."""
    import sqlalchemy

    @sqlalchemy.event.listens_for(sqlalchemy.Engine, "connect")
    def connected(connection, _):
        # What is wrong with the file is for the statements of the program to find.
        if isinstance(connection, sqlite3.Connection):
            with contextlib.suppress(sqlite3.Error):
                connection.execute("PRAGMA synchronous = OFF")


class _Forked:
    """Replaces `subprocess.Popen` in a sweep's worker: the process of a run is a fork of it."""

    def __init__(self, _command, *, stdout, **_):
        from tfjacreg.experiments import workers

        theirs, ours = os.pipe()
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.setpgid(0, 0)
            os.close(ours)
            os.dup2(theirs, 0)
            sys.stdin = os.fdopen(0)
            for descriptor in (1, 2):
                os.dup2(stdout.fileno(), descriptor)
            status = 1
            try:
                workers._run_for_worker()
                status = 0
            except SystemExit as error:
                print(error.code, file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        os.close(theirs)
        self.stdin = os.fdopen(ours, "wb", buffering=0)

    def poll(self):
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=DEADLINE):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("run", timeout)
            time.sleep(0.01)

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _main():
    import optuna
    import tensorflow_datasets  # noqa: F401

    import evaluate
    import train
    from tfjacreg import __main__, datasets
    from tfjacreg.experiments import figures, report, workers  # noqa: F401

    shrink()
    spare_the_disk()
    workers.subprocess = types.SimpleNamespace(
        Popen=_Forked, PIPE=None, TimeoutExpired=subprocess.TimeoutExpired
    )
    workers._POLL = 0.1
    # What Optuna imports when it first opens a study takes half a second.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    optuna.create_study(storage="sqlite://")
    # A worker forks its runs: TensorFlow must not have computed anything in it.
    workers._test_images = lambda config: len(datasets.load(config.dataset).test.y)
    commands = {"train": train.main, "evaluate": evaluate.main, "tfjacreg": __main__.main}
    # As in tests/conftest.py. Objects that are not searched are not copied in the forks either.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)

    print("ready", flush=True)
    statuses = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            pid = order["poll"]
            if pid not in statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            print(json.dumps(statuses.get(pid)), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            changes = [0]
            if order["dies_at"] is not None:
                _die_at(order["dies_at"], order["dies_by"], changes)
            if order["full_at"]:
                _fill_at(*order["full_at"])
            if order["stand_in"]:
                workers.subprocess, sys.executable = subprocess, order["stand_in"]
            command, *arguments = order["argv"]
            status = 1
            try:
                status = commands[command](arguments)
            except SystemExit as error:
                status = error.code
            finally:
                with contextlib.suppress(OSError):
                    print("changes of files:", changes[0], flush=True)
                os._exit(status)
        print(pid, flush=True)


def _die_at(number, by, seen):
    """Signals this process before the change of files with that number, and counts changes."""
    process = os.getpid()

    def count(event, arguments):
        if os.getpid() != process:  # A run that a worker has started.
            return
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
        if event == "open" and isinstance(arguments[2], int):
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changes:
            seen[0] += 1
            if seen[0] == number + 1:
                os.kill(os.getpid(), by)

    sys.addaudithook(count)


def _fill_at(name, filler):
    """Fills the disk when a file of that name is about to be written."""
    from tfjacreg import atomic_files

    replacing = atomic_files.replacing

    @contextlib.contextmanager
    def full(path):
        if path.name == name:
            with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"0" * 512):
                    pass
        with replacing(path) as inner:
            yield inner

    atomic_files.replacing = full


if __name__ == "__main__":
    _main()
