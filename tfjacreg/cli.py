"""How commands print and end: an error is one message, and Ctrl-C stops them within seconds."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

import tfjacreg_startup
from tfjacreg import optional_packages
from tfjacreg.printable import printable

STOPPED = 130  # The exit status that shells give to a program stopped by Ctrl-C.
FAILED = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds for a running computation to end by itself. Then the process is ended, which does no harm:
# files are written whole or not at all, and locks are released with their process.
_GRACE = 3.0
_NARROWEST = 40  # Columns: lines are not broken for a narrower terminal.
_CODE = "    "


def run(name: str, main: Callable[[], int], stopped: Callable[[], str]) -> int:
    """Runs a command.

    Args:
        name: Its name, which begins every message.
        main: Does the work and returns the exit status.
        stopped: Returns what to print if Ctrl-C or SIGTERM stops it.

    Returns:
        The exit status: the one of `main`; 2 after one message on stderr if the input was wrong or
        the output could not be written; 130 if the command was stopped.
    """
    try:
        with _interruptible(stopped), _warnings_as_messages(name):
            status = main()
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):  # A second Ctrl-C.
            _say(stopped)
        return STOPPED
    except (ValueError, OSError, optional_packages.MissingExtraError) as error:
        reason = str(error)
        if isinstance(error, OSError) and (lost := _lost()):
            reason = f"its output cannot be written: {lost}. {_told(stopped)}"
        text = f"{name}: error: {tfjacreg_startup.hide_arguments(reason)}"
        for stream in filter(None, (sys.stderr, sys.stdout)):
            with contextlib.suppress(OSError):
                say(text, file=stream)
                break
        return FAILED
    finally:
        _give_up(sys.stdout)
        _give_up(sys.stderr)


def _lost() -> str | None:
    """Why an output stream cannot be written: its reader has ended, or its disk is full."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            return error.strerror
    return None


def say(text: str, *, file: TextIO | None = None) -> None:
    """Prints a text, in lines that fit if the stream is a terminal.

    Args:
        text: The text. A line that is too long continues two columns to the right of its start; a
            line that starts with four spaces or more is code and is not broken.
        file: The stream; None for stdout.
    """
    print(_fitted(printable(text), columns(file)), file=file, flush=True)


def columns(file: TextIO | None = None) -> int | None:
    """The width of a line in characters; None if the stream, stdout by default, is no terminal."""
    file = sys.stdout if file is None else file
    if file is None or not file.isatty():
        return None
    return max(shutil.get_terminal_size().columns, _NARROWEST)


def _fitted(text: str, width: int | None) -> str:
    if width is None:
        return text
    lines = []
    for line in text.split("\n"):
        if len(line) > width and not line.startswith(_CODE):
            line = textwrap.fill(
                line,
                width,
                subsequent_indent=" " * (len(line) - len(line.lstrip()) + 2),
                break_long_words=False,  # A path is one word.
                break_on_hyphens=False,
            )
        lines.append(line)
    return "\n".join(lines)


@contextlib.contextmanager
def _warnings_as_messages(name: str) -> Iterator[None]:
    """Shows a warning as its text, without the line of code that raised it."""
    before = warnings.formatwarning

    def shown(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> str:
        if not issubclass(category, UserWarning):
            return before(message, category, *args, **kwargs)
        text = tfjacreg_startup.hide_arguments(f"{name}: warning: {message}")
        return _fitted(printable(text), columns(sys.stderr)) + "\n"

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = before


def _give_up(stream: TextIO | None) -> None:
    """Flushes a stream; if that fails, prevents a second message from Python at its end."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(stopped: Callable[[], str]) -> None:
    with contextlib.suppress(OSError):
        say(f"\n{_told(stopped)}")


def _told(stopped: Callable[[], str]) -> str:
    try:
        return stopped()
    except (OSError, ValueError):  # The files that it reports on cannot be read.
        return "Stopped."


@contextlib.contextmanager
def _interruptible(stopped: Callable[[], str]) -> Iterator[None]:
    """Makes SIGTERM do what Ctrl-C does, within seconds whatever is being computed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Signals belong to the main thread.
        return
    told, ended = threading.Event(), threading.Event()

    def end() -> None:
        if not ended.wait(_GRACE):
            _say(stopped)
            os._exit(STOPPED)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        told.set()
        raise KeyboardInterrupt

    # Python's handlers wait until TensorFlow returns from C++; this pipe does not wait.
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)

    def watch() -> None:
        while data := os.read(receiver, 1):
            if data[0] in _SIGNALS:
                end()
                return

    # A shell makes background programs ignore Ctrl-C.
    caught = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in caught}
    old = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except Exception as error:
        # An interrupt inside TensorFlow's C++ may come back as another error.
        if told.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old)
        os.close(sender)
        watcher.join()
        os.close(receiver)
