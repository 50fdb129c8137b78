"""Locks a folder for one process, by a file in it; the kernel releases the lock when it ends.

The file names the owner, who removes it on release.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tfjacreg.experiments import reading
from tfjacreg.experiments.config import RunError

_LOCK = ".lock"
_NAMED_WITHIN = 1.0  # Seconds within which an owner writes its name.


@contextlib.contextmanager
def owned(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keeps every other process out of a folder, which is made if it does not exist.

    Args:
        folder: The folder.
        wait: Whether to wait for a process that has it.

    Raises:
        RunError: If another process has it, or it cannot be locked.
    """
    was_there = os.path.lexists(folder)
    try:
        lock = acquire(folder)
        if lock is None:
            holder = owner(folder)
            if not wait:
                raise RunError(
                    f"{folder} is in use by {holder}. Choose another folder, or --wait for its end."
                )
            print(f"{folder} is in use by {holder}: waiting for its end.", file=sys.stderr)
            lock = acquire(folder, wait=True)
    except OSError as error:
        raise RunError(
            f"Cannot write the run folder {folder}: {error}. Choose a writable --out."
        ) from error
    try:
        yield
    finally:
        if lock is not None:
            release(folder, lock)
        if not was_there:
            with contextlib.suppress(OSError):  # It is not empty.
                folder.rmdir()


def acquire(folder: Path, *, wait: bool = False) -> int | None:
    """Takes the lock of a folder, which is made if it does not exist.

    A process that inherits the descriptor owns the folder too.

    Args:
        folder: The folder.
        wait: Whether to wait until the current owner ends.

    Returns:
        The descriptor of the lock, or None if another process has it.

    Raises:
        OSError: If the folder or the lock's file cannot be made.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            if os.path.lexists(folder):  # Something else has this name.
                raise
            continue  # The folder existed, and its last owner has removed it since.
        try:
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # The last owner has just removed the folder.
            continue
        try:
            if _locked(folder, descriptor, wait=wait):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} {platform.node()}\n".encode())
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def release(folder: Path, descriptor: int) -> None:
    """Releases a folder, and removes the lock's file unless another process owns it by now."""
    os.close(descriptor)
    with contextlib.suppress(OSError):
        # A process that inherited the lock may still have it.
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if _locked(folder, descriptor, wait=False):
                (folder / _LOCK).unlink()
        finally:
            os.close(descriptor)


def _locked(folder: Path, descriptor: int, *, wait: bool) -> bool:
    """Locks an open file; False if it was removed meanwhile, which makes the lock useless."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(folder / _LOCK))
    except FileNotFoundError:
        return False


def left_in(folder: Path) -> bool:
    """Whether a lock's file is there, whether its owner is alive or not."""
    return (folder / _LOCK).exists()


def owner(folder: Path) -> str:
    """The owner of a folder, for a message: `process 123`, with its machine if it is another."""
    deadline = time.monotonic() + _NAMED_WITHIN
    while time.monotonic() < deadline:
        try:
            process, _, machine = (
                reading.read_bytes(folder / _LOCK, 1024).decode().strip().partition(" ")
            )
        except (OSError, ValueError):
            break
        if process.isdecimal():
            return f"process {process}" + f" on {machine}" * (machine != platform.node())
        time.sleep(0.01)
    return "another process"
