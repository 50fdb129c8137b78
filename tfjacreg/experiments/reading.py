"""Reads files that somebody else may have put into a folder: regular ones, of a bounded size.

A link may lead out of the folder, a pipe or a device may never end, and a sparse file of many
terabytes takes no room in an archive.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

TEXT = 64 << 20  # The most bytes of settings, figures and tables.
SWEEP = 1 << 20  # A sweep file.
ERROR = 64 << 10  # The bytes that are read of a log, from its end.
PICTURE = 64 << 20
MODEL = 4 << 30  # A classifier, a checkpoint or a file of a SavedModel.

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path, limit: int | None = MODEL) -> BufferedReader:
    """Opens a file for reading, without following a link or waiting for another process.

    Args:
        path: The file.
        limit: The most bytes that it may have; None for any number.

    Raises:
        FileNotFoundError: If nothing is there.
        OSError: If it is not a regular file, is larger or cannot be read.
    """
    # The kind is checked first, since sockets cannot be opened and links are not followed. If the
    # file is replaced after that, the flags and the second check of the open file find it.
    _check_kind(os.lstat(path).st_mode)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        status = os.fstat(file.fileno())
        _check_kind(status.st_mode)
        if limit is not None and status.st_size > limit:
            raise OSError(
                f"it must have at most {limit} bytes. Received: {status.st_size}. It is none that "
                "this project has written"
            )
    except BaseException:
        file.close()
        raise
    return file


def _check_kind(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(
            f"it must be a regular file in its folder. Received: {kind}. Put the file itself there"
        )


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file; raises OSError as `open_regular` does."""
    with open_regular(path, limit) as file:
        # One byte more than allowed: the file may grow meanwhile.
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(f"it must have at most {limit} bytes. Received: a file that grows")
    return content


def read_end(path: Path, size: int) -> bytes:
    """The last `size` bytes of a file of any length; raises OSError as `open_regular` does."""
    with open_regular(path, None) as file:
        file.seek(max(os.fstat(file.fileno()).st_size - size, 0))
        return file.read(size)
