"""Explains in a sentence what is wrong with the database of a sweep, and what to do."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import optuna
import sqlalchemy

from tfjacreg import error_causes
from tfjacreg.experiments import reading
from tfjacreg.experiments.config import RunError
from tfjacreg.experiments.locks import hidden

STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)
_AGAIN = "and give the same command again"
_BESIDE = ("-journal", "-wal", "-shm")  # Files that SQLite opens too, and would wait for.
# By SQLite's primary result codes.
_WAYS_OUT = {
    sqlite3.SQLITE_BUSY: f"is locked by another program. Wait for its end, or end it, {_AGAIN}",
    sqlite3.SQLITE_LOCKED: f"is locked by another program. Wait for its end, or end it, {_AGAIN}",
    sqlite3.SQLITE_FULL: f"cannot grow: the disk is full. Make room, {_AGAIN}",
    sqlite3.SQLITE_READONLY: f"cannot be written. Make it and its folder writable, {_AGAIN}",
    sqlite3.SQLITE_PERM: f"cannot be written. Make it and its folder writable, {_AGAIN}",
    sqlite3.SQLITE_CANTOPEN: f"cannot be opened. Make it and its folder writable, {_AGAIN}",
    sqlite3.SQLITE_IOERR: f"cannot be read or written. See to its disk, {_AGAIN}",
}


class Server:
    """A database on a PostgreSQL server.

    Attributes:
        storage: Its URL.
    """

    def __init__(self, storage: str) -> None:
        self.storage = storage

    def check(self) -> None:
        """Does nothing: the database on a server cannot be replaced."""

    @contextlib.contextmanager
    def errors_named(self) -> Iterator[None]:
        """Surrounds each use of the study; errors of other origin stay as they are."""
        yield

    def damaged(self, reason: str) -> RunError:
        """The error for a study whose content makes no sense."""
        return RunError(f"The sweep's study on the server is damaged: {reason}.")

    def explained(self, error: Exception) -> RunError:
        """One of `STORAGE_ERRORS` as a sentence that says what to do."""
        reason = str(error_causes.find(error, sqlalchemy.exc.DBAPIError) or error)
        reason = " ".join(hidden(reason.partition("(Background on")[0], self.storage).split())
        return RunError(
            f"Cannot use the sweep's storage: {reason} The same command goes on when it is there."
        )


class DatabaseFile:
    """The SQLite file of a sweep, which must stay the same file while a worker uses it.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: tuple[int, int] | None = None

    def check_kind(self) -> None:
        """Refuses a link, a folder or a pipe in place of a file of SQLite; raises OSError."""
        for ending in ("", *_BESIDE):
            path = self.path.with_name(self.path.name + ending)
            if os.path.lexists(path):
                try:
                    reading.open_regular(path, None).close()
                except OSError as error:
                    raise OSError(f"{path.name}: {error}") from error

    def check(self) -> None:
        """Raises RunError if the file is gone, or is not the one of the first call."""
        now = None
        with contextlib.suppress(OSError):
            status = os.lstat(self.path)
            now = status.st_dev, status.st_ino
        if now is None or self._file not in (None, now):
            raise self._replaced()
        self._file = now

    def _replaced(self) -> RunError:
        return RunError(
            f"{self.path} was removed or replaced while this command used it. Give the same "
            "command again: finished runs are found by their folders."
        )

    @contextlib.contextmanager
    def errors_named(self) -> Iterator[None]:
        """Surrounds each use of the study: Optuna raises errors of many kinds for a bad file."""
        try:
            yield
        except (OSError, RunError, *STORAGE_ERRORS):
            raise
        except Exception as error:
            raise self.damaged(repr(error)) from error

    def damaged(self, reason: str) -> RunError:
        """The error for a file whose content makes no sense."""
        return RunError(
            f"The sweep's study, {self.path}, is damaged: {reason}. Put it back, or remove it: "
            "finished runs are found by their folders."
        )

    def explained(self, error: Exception) -> RunError:
        """One of `STORAGE_ERRORS` as a sentence that says what to do."""
        cause = error_causes.find(error, sqlite3.Error)
        code = getattr(cause, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_READONLY_DBMOVED:
            return self._replaced()
        # The first byte is the primary code; the others only detail it.
        way_out = None if code is None else _WAYS_OUT.get(code & 0xFF)
        if way_out is None:
            return self.damaged(" ".join(str(cause or error).split()))
        return RunError(f"The sweep's study, {self.path}, {way_out} ({cause}).")
