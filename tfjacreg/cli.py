"""How a command ends: its errors in one message, and at once when it is told to."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

import tfjacreg_startup
from tfjacreg import optional_packages
from tfjacreg.printable import printable

STOPPED = 130  # What shells give to a program that Ctrl-C has ended.
FAILED = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds for what is being computed to end by itself. Then the process is ended, which harms
# nothing: files are written whole or not at all, and locks go with their owner.
_GRACE = 3.0


def run(name: str, main: Callable[[], int], stopped: str) -> int:
    """Runs a command.

    Args:
        name: Its name, which begins every message.
        main: Does the work and returns the exit status.
        stopped: What to say when Ctrl-C or SIGTERM ends it.

    Returns:
        The exit status: that of `main`; 2 after one message on stderr where something was wrong
        with what the command was given, or could not be written; 130 where it was stopped.
    """
    try:
        with _interruptible(stopped):
            status = main()
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        _say(stopped)
        return STOPPED
    except (ValueError, OSError, optional_packages.MissingExtraError) as error:
        reason = str(error)
        if isinstance(error, OSError) and (lost := _lost()):
            reason = f"its output cannot be written: {lost}. {stopped}"
        for stream in filter(None, (sys.stderr, sys.stdout)):
            with contextlib.suppress(OSError):
                print(f"{name}: error: {_shown(reason)}", file=stream, flush=True)
                break
        return FAILED
    finally:
        _give_up(sys.stdout)
        _give_up(sys.stderr)


def _lost() -> str | None:
    """Why a stream cannot be written any more: who reads it has ended, or its disk is full."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            return error.strerror
    return None


class Parser(argparse.ArgumentParser):
    """A parser whose messages have no password and command no terminal."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong with the command line, and ends with status 2."""
        super().error(_shown(message))


def path(text: str) -> Path:
    """The type of an option that names a file or folder, which TensorFlow must be able to name."""
    if not text:  # A variable that is not set.
        raise argparse.ArgumentTypeError("must be a path. Received: an empty one.")
    if "://" in text and tfjacreg_startup.redacted(text) != text:
        raise argparse.ArgumentTypeError("must be a path. Received: a URL with a password.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(
            f"must be a path in UTF-8, which TensorFlow needs. Received: {text!r}. Rename it."
        ) from error
    return Path(text)


def _shown(message: str) -> str:
    return printable(tfjacreg_startup.hide_arguments(message))


def _give_up(stream: TextIO | None) -> None:
    """Python writes what is left at its end: where that fails there would be a second message."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"\n{printable(text)}", flush=True)


@contextlib.contextmanager
def _interruptible(stopped: str) -> Iterator[None]:
    """Has SIGTERM do what Ctrl-C does, within seconds whatever is being computed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Signals are another thread's.
        return
    told, ended = threading.Event(), threading.Event()

    def end() -> None:
        if not ended.wait(_GRACE):
            _say(stopped)
            os._exit(STOPPED)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        told.set()
        raise KeyboardInterrupt

    # Python's own handlers wait for TensorFlow to come back from C++; this pipe does not.
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)

    def watch() -> None:
        while data := os.read(receiver, 1):
            if data[0] in _SIGNALS:
                end()
                return

    # A shell has what it starts in the background ignore Ctrl-C.
    caught = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in caught}
    old = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except Exception as error:
        # What is stopped in TensorFlow's C++ may come back as another error, and be explained.
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
