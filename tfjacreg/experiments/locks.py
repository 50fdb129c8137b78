"""Locks that end with their owner, among the processes of one machine or of several machines."""

from __future__ import annotations

import contextlib
import fcntl
import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy

import tfjacreg_startup
from tfjacreg import optional_packages
from tfjacreg.experiments import folder_lock

# A worker that has lost its machine's network notices within 15 seconds and stops; the server gives
# its run to another worker only after 60 seconds.
_CONNECTION = {
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 15_000,
    "options": "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3",
}


class FileLocks:
    """Locks among the processes of one machine, released by the kernel when their owner ends.

    The lock of a run is the lock of its folder, which train.py and evaluate.py take too.
    """

    def __init__(self, out: Path) -> None:
        self._out = out

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits for the one lock on all changes of the ledger."""
        # Without following a link or waiting for the other end of a pipe.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(self._out / ".sweep.lock", flags, 0o666), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def acquire(self, name: str) -> int | None:
        """The descriptor of the lock of a run, or None if another process has the lock.

        A process that inherits the descriptor has the lock too.
        """
        return folder_lock.acquire(self._out / name)

    def release(self, name: str, descriptor: int) -> None:
        """Releases the lock of a run."""
        folder_lock.release(self._out / name, descriptor)

    def ensure_alive(self) -> None:
        """Raises if the locks may be lost; the kernel never takes them from a living process."""

    def close(self) -> None:
        """Releases what the kernel does not release."""


class PostgresLocks(FileLocks):
    """Locks among machines too: PostgreSQL's advisory locks, which last as long as a connection."""

    def __init__(self, out: Path, url: sqlalchemy.URL, study: str) -> None:
        super().__init__(out)
        self._study = study
        engine = sqlalchemy.create_engine(
            url,
            isolation_level="AUTOCOMMIT",
            poolclass=sqlalchemy.NullPool,
            connect_args=_CONNECTION,
        )
        self._connection = engine.connect()

    def _call(self, function: str, key: str) -> Any:
        statement = sqlalchemy.text(f"SELECT {function}(hashtextextended(:key, 0))")
        return self._connection.execute(statement, {"key": key}).scalar()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits for the one lock on all changes of the ledger, on all machines."""
        # One lock for all studies, since they share Optuna's tables, which the first worker makes.
        with super().exclusive():
            self._call("pg_advisory_lock", "tfjacreg")
            try:
                yield
            finally:
                self._call("pg_advisory_unlock", "tfjacreg")

    def acquire(self, name: str) -> int | None:
        """As for files; also None if a worker on another machine has the lock."""
        if not self._call("pg_try_advisory_lock", f"{self._study}/{name}"):
            return None
        descriptor = super().acquire(name)
        if descriptor is None:
            self._call("pg_advisory_unlock", f"{self._study}/{name}")
        return descriptor

    def release(self, name: str, descriptor: int) -> None:
        """Releases the lock of a run."""
        super().release(name, descriptor)
        self._call("pg_advisory_unlock", f"{self._study}/{name}")

    def ensure_alive(self) -> None:
        """Raises if the connection is lost, and the locks with it."""
        self._connection.execute(sqlalchemy.text("SELECT 1"))

    def close(self) -> None:
        """Ends the connection, which releases its locks."""
        self._connection.close()


def server_url(storage: str) -> sqlalchemy.URL:
    """The URL of a PostgreSQL server, with the driver that is used.

    Raises:
        ValueError: If it is not such a URL; the message does not contain a password.
        ImportError: If the driver is not installed.
    """
    # SQLAlchemy's errors quote the URL, so neither their message nor their cause is kept.
    with contextlib.suppress(sqlalchemy.exc.ArgumentError, ValueError):
        url = sqlalchemy.make_url(storage)
        if url.get_backend_name() in ("postgresql", "postgres"):
            # psycopg 3, whichever driver SQLAlchemy's version takes for the bare name.
            with optional_packages.importing("postgresql", "A sweep on a PostgreSQL server"):
                import psycopg  # noqa: F401
            return url.set(drivername="postgresql+psycopg")
    shown = tfjacreg_startup.redacted(storage)
    raise ValueError(
        "`--storage` must be the URL of a PostgreSQL database, such as postgresql://user@host/name."
        f" Received: {shown}. Leave it out for an SQLite file in the sweep's folder."
    )


def hidden(text: str, storage: str | None) -> str:
    """`text`, such as an error of the storage, without the password in the storage's URL."""
    secrets: list[str] = []
    with contextlib.suppress(sqlalchemy.exc.ArgumentError, ValueError):
        url = sqlalchemy.make_url(storage or "")
        secrets = [str(url.password or "")]
        for name, values in url.normalized_query.items():
            secrets += values if tfjacreg_startup.is_secret(name) else ()
    for secret in filter(None, secrets):
        quoted = (urllib.parse.quote(secret, safe=""), urllib.parse.quote(secret))
        for spelling in (secret, repr(secret)[1:-1], *quoted, urllib.parse.quote_plus(secret)):
            text = text.replace(spelling, "***")
    return text
