"""How a command ends: one message and a status, at whatever moment it is told to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tfjacreg import cli, optional_packages

ROOT = Path(__file__).parents[1]
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def fails(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error",
    [
        ValueError("it is wrong"),
        OSError(28, "it is wrong"),
        optional_packages.MissingExtraError("it is wrong"),
    ],
)
def test_an_error_is_one_message(capsys, error):
    assert cli.run("name", fails(error), "Stopped.") == 2
    assert capsys.readouterr().err.endswith("it is wrong\n")


def test_a_fault_of_the_program_is_no_message():
    with pytest.raises(ZeroDivisionError):
        cli.run("name", fails(ZeroDivisionError()), "Stopped.")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_and_handlers_are_as_before(capsys, number):
    before = [signal.getsignal(n) for n in SIGNALS]

    def main():
        os.kill(os.getpid(), number)
        time.sleep(60)

    started = time.monotonic()
    assert cli.run("name", main, "Stopped. Go on so.") == 130
    assert time.monotonic() - started < 10
    assert capsys.readouterr().out == "\nStopped. Go on so.\n"
    assert [signal.getsignal(n) for n in SIGNALS] == before
    assert cli.run("name", lambda: 7, "Stopped.") == 7


@pytest.mark.parametrize("error", [ValueError, SystemError])
def test_what_a_signal_has_become_is_no_error(capsys, error):
    def main():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            raise error("the network cannot be differentiated") from None

    assert cli.run("name", main, "Stopped.") == 130
    assert capsys.readouterr() == ("\nStopped.\n", "")


# What keeps Python from its handlers: C that does not come back; and what swallows the exception.
DEAF = {
    "in C": """
import ctypes
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
def main():
    library.pthread_mutex_lock(mutex)
    print("working", flush=True)
    library.pthread_mutex_lock(mutex)  # For ever.
""",
    "swallowed": """
import time
def main():
    print("working", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
""",
}


# Told to stop a second after it began to work, as by a shell.
TOLD = """
import os, sys, threading
from tfjacreg import cli
threading.Timer(1, os.kill, (os.getpid(), int(sys.argv[1]))).start()
sys.exit(cli.run("name", main, "Stopped."))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("kind", DEAF)
def test_it_ends_within_seconds_whatever_is_computed(fresh_python, number, kind):
    started = time.monotonic()
    done = fresh_python.run(f"{DEAF[kind]}{TOLD}", int(number), check=False)
    assert time.monotonic() - started < 20
    assert (done.returncode, done.stdout) == (130, "working\n\nStopped.\n")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
@pytest.mark.parametrize("delay", [0.3, 1.5])
def test_in_the_first_seconds(tmp_path, script, number, delay):
    """While TensorFlow is imported: no traceback, and nothing was begun."""
    out = tmp_path / "out"
    arguments = ["--epochs", "500", "--out", out] if script == "train.py" else [out]
    process = subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    time.sleep(delay)
    process.send_signal(number)
    started = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - started < 15
    assert process.returncode == 130, output
    assert "Traceback" not in output
