"""Packages that a base install lacks, and the message with the command that installs them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message names the command that installs it."""


@contextlib.contextmanager
def importing(extra: str, needed_by: str) -> Iterator[None]:
    """Names the command that installs an extra, if an import in the block finds no package.

    Args:
        extra: The name of the extra in `pyproject.toml` that holds the package.
        needed_by: What cannot be done without it; the subject of the message.

    Raises:
        MissingExtraError: If a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == __package__:
            raise
        raise MissingExtraError(
            f"{needed_by} needs the package {package}, which is not installed: "
            f'run pip install "tfjacreg[{extra}]".'
        ) from error


@contextlib.contextmanager
def script_importing(extra: str, script: str) -> Iterator[None]:
    """Does the same at the head of a script: prints the message to stderr, exits with status 2."""
    try:
        with importing(extra, script):
            yield
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
