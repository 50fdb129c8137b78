"""Files, written whole or not at all, and JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a temporary name in the same folder to write to, and then puts the file in place.

    The folder is made if it is not there. What was at `path` before is untouched until the end.

    Args:
        path: The file.

    Raises:
        OSError: If the file cannot be put in place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content`, and makes the file's folder if it is not there.

    Args:
        path: The file.
        content: What JSON can represent.

    Raises:
        OSError: If the file cannot be written; what was there before is then untouched.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(json_text(content))


def json_text(content: dict[str, Any]) -> str:
    """`content` as JSON, indented, with every list of numbers on one line."""
    text = json.dumps(content, indent=2)
    # Inside a JSON string there is no line break, so that no string can match.
    return re.sub(r'\[\n\s+([^][{}"]+?)\n\s+\]', _on_one_line, text) + "\n"


def _on_one_line(match: re.Match[str]) -> str:
    return "[" + re.sub(r",\s+", ", ", match[1]) + "]"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.

    Raises:
        ValueError: If the file cannot be read or is no JSON object; the message names it.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except ValueError as error:  # Of the decoder or of JSON.
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object. Received: {type(content).__name__}.")
    return content


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal; raises OSError if it cannot be read."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
