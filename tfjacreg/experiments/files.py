"""Result files, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name in the same folder to write to, and then puts the file in place.

    The folder is made if it is not there. What was at `path` before is untouched until the end.

    Args:
        path: The file.

    Raises:
        OSError: If the file cannot be put in place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{path.name}")
    yield temporary
    os.replace(temporary, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content`, and makes the file's folder if it is not there.

    Args:
        path: The file.
        content: What JSON can hold.

    Raises:
        OSError: If the file cannot be written; what was there before is then untouched.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
