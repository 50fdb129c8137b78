"""Temporary names for files being written, which show the next process whose they are."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".partial-"


def beside(path: Path) -> Path:
    """A name in the same folder, with the same ending, that no other process uses."""
    return path.with_name(f"{_PREFIX}{platform.node()}-{os.getpid()}-{path.name}")


def left_in(folder: Path) -> list[Path]:
    """The files in a folder that any process has begun under a temporary name."""
    return list(folder.glob(f"{_PREFIX}*"))


def remove(path: Path) -> None:
    """Removes a file, or a folder with its content, if it exists; raises OSError if it cannot."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_stale(path: Path) -> None:
    """Removes what ended processes of this machine left of an attempt to write `path`."""
    pattern = re.compile(rf"{_PREFIX}{re.escape(platform.node())}-(\d+)-{re.escape(path.name)}")
    for file in left_in(path.parent):
        match = pattern.fullmatch(file.name)
        if match and not _lives(int(match[1])):
            with contextlib.suppress(OSError):
                remove(file)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # The process belongs to another user.
        return True
    return True


def check_files(*paths: Path) -> None:
    """Checks, before the work for them, that files can have these names; raises OSError if not."""
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(
                f"{path} must be a file. Received: a folder of that name. Move it out of the way."
            )
        above = next(folder for folder in path.parents if os.path.lexists(folder))
        if not above.is_dir():
            raise NotADirectoryError(
                f"{above} must be a folder. Received: a file of that name. Move it out of the way."
            )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name in the same folder to write to, and then puts the result in place.

    The folder is made if it does not exist. What is at `path` is untouched until the end. A file
    replaces a file in one step. For a new folder, what is there is removed just before; a new file
    never replaces a folder.

    Args:
        path: A file, or a folder.

    Raises:
        OSError: If the result cannot be put in place, such as a file in place of a folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    temporary = beside(path)
    try:
        yield temporary
        if temporary.is_dir():
            remove(path)
        os.replace(temporary, path)
    finally:
        remove(temporary)
