"""How a command ends: one message and a status, at whatever moment it is told to stop."""

import io
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import tfjacreg_arguments
from tfjacreg import cli, optional_packages
from tfjacreg.experiments.config import RunConfig
from tfjacreg.experiments.folder_reader import FolderReader

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
    assert cli.run("name", fails(error), lambda: "Stopped.") == 2
    assert capsys.readouterr().err.endswith("it is wrong\n")


@pytest.mark.parametrize("lost", ["stdout", "stderr"])
@pytest.mark.parametrize("why", ["No space left on device", "Broken pipe"])
def test_output_that_nobody_gets_is_told_on_the_other_stream(monkeypatch, tmp_path, lost, why):
    """With the way on: what was computed is kept."""
    number = os.open("/dev/full", os.O_WRONLY)
    if why == "Broken pipe":
        reader, number = os.pipe()
        os.close(reader)
    monkeypatch.setattr(sys, lost, os.fdopen(number, "w"))
    other = (tmp_path / "other").open("w")
    monkeypatch.setattr(sys, "stdout" if lost == "stderr" else "stderr", other)

    def main():
        print("a line", file=getattr(sys, lost), flush=True)

    assert cli.run("name", main, lambda: "Stopped. Go on so.") == 2
    told = f"name: error: its output cannot be written: {why}. Stopped. Go on so.\n"
    assert (tmp_path / "other").read_text() == told


def test_a_fault_of_the_program_is_no_message():
    with pytest.raises(ZeroDivisionError):
        cli.run("name", fails(ZeroDivisionError()), lambda: "Stopped.")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_and_handlers_are_as_before(capsys, number):
    before = [signal.getsignal(n) for n in SIGNALS]

    def main():
        os.kill(os.getpid(), number)
        time.sleep(60)

    started = time.monotonic()
    assert cli.run("name", main, lambda: "Stopped. Go on so.") == 130
    assert time.monotonic() - started < 10
    assert capsys.readouterr().out == "\nStopped. Go on so.\n"
    assert [signal.getsignal(n) for n in SIGNALS] == before
    assert cli.run("name", lambda: 7, lambda: "Stopped.") == 7


@pytest.mark.parametrize("error", [ValueError, SystemError])
def test_what_a_signal_has_become_is_no_error(capsys, error):
    def main():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            raise error("the network cannot be differentiated") from None

    assert cli.run("name", main, lambda: "Stopped.") == 130
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
import warnings
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
sys.exit(cli.run("name", main, lambda: "Stopped."))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("kind", DEAF)
def test_it_ends_within_seconds_whatever_is_computed(fresh_python, number, kind):
    started = time.monotonic()
    done = fresh_python.run(f"{DEAF[kind]}{TOLD}", int(number), check=False)
    assert time.monotonic() - started < 20
    assert (done.returncode, done.stdout) == (130, "working\n\nStopped.\n")


COMMANDS = {
    "train.py": ["train.py", "--epochs", "500", "--out"],
    "evaluate.py": ["evaluate.py"],
    "python -m tfjacreg": ["-m", "tfjacreg", "report"],
}


def _catches(process, number):
    """Whether a process has a handler of its own for a signal."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["pipe", "closed", "nobody reads"])
@pytest.mark.parametrize("command", COMMANDS)
def test_in_the_first_seconds(tmp_path, command, stream):
    """While TensorFlow is imported: one sentence, and nothing was begun; whatever the streams."""
    seed = random.SystemRandom().randrange(10**9)
    print("seed of the moment:", seed)
    moments = random.Random(seed)
    number, delay = moments.choice(SIGNALS), moments.uniform(0, 2)
    print(f"{number.name} after {delay:.2f} s")
    arguments = [sys.executable, *COMMANDS[command], str(tmp_path / "out")]
    if stream == "closed":
        arguments = ["sh", "-c", 'exec "$@" <&- >&-', "sh", *arguments]
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if stream == "nobody reads":
        process.stdout.close()
    # Python itself has none for SIGTERM: from here on it is our code that runs.
    while not _catches(process, signal.SIGTERM):
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(number)
    started = time.monotonic()
    output = "" if stream == "nobody reads" else process.stdout.read()
    errors = process.stderr.read()
    status = process.wait(60)
    assert time.monotonic() - started < 15
    assert "Traceback" not in output + errors and "Exception ignored" not in errors
    if command != "train.py" and status == 2:  # It had ended: there is no such folder.
        assert errors.count(": error: ") == 1
        return
    assert status == 130, errors
    assert output.count("Stopped") == (stream == "pipe") and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_closed_streams_lose_nothing_and_get_nothing(tmp_path):
    """The next file that is opened gets the number of a stream that is closed, and its text."""
    run = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "train.py"]
    run += ["--epochs", "1", "--regularizer", "none", "--out", str(tmp_path / "run")]
    assert subprocess.run(run, cwd=ROOT, check=False).returncode == 0
    FolderReader(tmp_path / "run").check_products()


def test_messages_have_no_password_and_command_no_terminal(capsys, monkeypatch):
    url = "postgresql://me:hunter2\x1b[2J@host/db"
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", url])
    assert cli.run("name", fails(ValueError(f"{url} is wrong")), lambda: "Stopped.") == 2
    with pytest.raises(SystemExit) as caught:
        tfjacreg_arguments.Parser(prog="name").parse_args(sys.argv[1:])
    shown = capsys.readouterr().err
    assert caught.value.code == 2 and "hunter2" not in shown and "\x1b" not in shown
    assert shown.count("postgresql://me:***@host/db") == 2


def test_a_url_with_a_password_is_no_path(capsys, tmp_path):
    """Whichever option it was given to by mistake: it would stand in config.json."""
    url = "postgresql://me:hunter2@host/db"
    parser = tfjacreg_arguments.Parser(prog="name")
    parser.add_argument("--data-dir", type=tfjacreg_arguments.path)
    with pytest.raises(SystemExit):
        parser.parse_args(["--data-dir", url])
    assert "hunter2" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="`data_dir` must be a path. Received: a URL with a p"):
        RunConfig.of(data_dir=url)


@pytest.mark.parametrize("text", ["", "a\udcff", "\ud800"])
def test_a_path_that_tensorflow_cannot_name_is_refused(capsys, text):
    parser = tfjacreg_arguments.Parser(prog="name")
    parser.add_argument("--out", type=tfjacreg_arguments.path)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--out", text])
    assert caught.value.code == 2 and "--out: must be a path" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_lines_that_fit(monkeypatch):
    """A path is not broken, nor what is to be copied; a file gets the lines as they are."""
    monkeypatch.setenv("COLUMNS", "60")
    path, code = f"runs/{'x' * 70}", f"    python {'y ' * 40}"
    text = f"{'a word ' * 20}\n  in {path}\n{code}\n  {'end ' * 20}"
    terminal, file = Terminal(), io.StringIO()
    cli.say(text, file=terminal)
    cli.say(text, file=file)
    assert file.getvalue() == f"{text}\n"
    lines = terminal.getvalue().splitlines()
    assert {line for line in lines if len(line) > 60} == {f"    {path}", code}
    assert terminal.getvalue().split() == text.split()
    starts = [len(line) - len(line.lstrip()) for line in lines]
    assert starts == [0, 2, 2, 2, 4, 4, 2, 4]
    assert (cli.columns(terminal), cli.columns(file)) == (60, None)


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_message(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "postgresql://me:hunter2@host/db"])

    def main():
        warnings.warn("of \x1b postgresql://me:hunter2@host/db", stacklevel=1)
        warnings.warn("of others", DeprecationWarning, stacklevel=1)
        return 0

    with warnings.catch_warnings():  # Without pytest's own records.
        monkeypatch.setattr(warnings, "_showwarnmsg_impl", _written)
        assert cli.run("name", main, lambda: "Stopped.") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "name: warning: of \\x1b postgresql://me:***@host/db"
    assert re.match(r".*test_cli\.py:\d+: DeprecationWarning: of others", lines[1])


def _written(message):
    """As Python writes a warning."""
    parts = message.message, message.category, message.filename, message.lineno, message.line
    sys.stderr.write(warnings.formatwarning(*parts))


@pytest.mark.parametrize("error", [OSError("lost"), ValueError("damaged"), KeyboardInterrupt()])
def test_what_is_kept_may_be_unreadable(capsys, error):
    status = cli.run("name", fails(KeyboardInterrupt()), fails(error))
    assert status == 130
    shown = "" if isinstance(error, KeyboardInterrupt) else "\nStopped.\n"
    assert capsys.readouterr() == (shown, "")
