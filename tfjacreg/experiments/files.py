"""JSON files, written whole or not at all, with a digest of their content."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tfjacreg import atomic_files
from tfjacreg.experiments import reading

_SEAL = "sha256"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content`; makes the folder of the file if it does not exist.

    Args:
        path: The file.
        content: Content that JSON can represent.

    Raises:
        OSError: If the file cannot be written; an existing file is then untouched.
    """
    with atomic_files.replacing(path) as file:
        file.write_text(json_text(content), encoding="utf-8")


def json_text(content: dict[str, Any]) -> str:
    """`content` as JSON, indented, with every list of numbers on one line."""
    text = json.dumps(content, indent=2)
    # A JSON string has no line break in it, so no string can match.
    return re.sub(r'\[\n\s+([^][{}"]+?)\n\s+\]', _on_one_line, text) + "\n"


def _on_one_line(match: re.Match[str]) -> str:
    return "[" + re.sub(r",\s+", ", ", match[1]) + "]"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.

    Raises:
        ValueError: If the file cannot be read or does not hold a JSON object; the message names
            it.
    """
    try:
        content = json.loads(reading.read_bytes(path, reading.TEXT).decode())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # From decoding the text, or from JSON.
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object. Received: {type(content).__name__}.")
    return content


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal; raises OSError if it cannot be read."""
    with reading.open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_sha256(folder: Path) -> str:
    """The SHA-256 of the names and contents of all files in a folder; raises OSError."""
    # A link is read as a file, wherever it leads, and refused as one.
    inside = folder.rglob("*")
    files = sorted(path for path in inside if path.is_symlink() or not path.is_dir())
    return content_sha256({str(path.relative_to(folder)): sha256(path) for path in files})


def content_sha256(content: dict[str, Any]) -> str:
    """The SHA-256 of content that JSON can represent, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with the digest of its figures and settings, under `sha256`."""
    return {**content, _SEAL: _seal(content)}


def check_seal(path: Path, content: dict[str, Any]) -> None:
    """Checks that sealed content has not changed since; older files have no seal.

    Args:
        path: Where it was read.
        content: What `read_json` returned.

    Raises:
        ValueError: If it has changed.
    """
    if _SEAL in content and content[_SEAL] != _seal(content):
        raise ValueError(f"{path} is damaged or was changed: its content and its sha256 differ.")


def _seal(content: dict[str, Any]) -> str:
    # The environment is not a result: its entries are compared where they matter.
    names = content.keys() - {_SEAL, "environment"}
    return content_sha256({name: content[name] for name in names})


def unsealed(content: dict[str, Any]) -> dict[str, Any]:
    """`content` without its own digest."""
    return {name: value for name, value in content.items() if name != _SEAL}
