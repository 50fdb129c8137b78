"""Checkpoints: Keras files with a note inside that names the run and the epochs."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import keras

from tfjacreg.experiments import archives, reading
from tfjacreg.printable import printable

_NOTE = "run.json"  # Keras ignores parts of an archive that it does not know.


def save(model: keras.Model, path: Path, note: dict[str, Any]) -> None:
    """Writes the training state, with a note that can be read without loading it.

    Args:
        model: The model.
        path: The file, with the ending `.keras`.
        note: Content that JSON can represent.
    """
    model.save(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(_NOTE, json.dumps(note))


def load(path: Path, **options: Any) -> keras.Model:
    """Loads a `.keras` file after checking every byte of it; runs no code that it holds.

    Args:
        path: The file.
        **options: For `keras.models.load_model`.

    Raises:
        ValueError: If that fails, for whatever reason.
    """
    # Keras skips the checksums of a file, and reports a truncated one as "not found".
    numbers = check_whole(path)
    try:
        model = archives.with_layers_limited(
            numbers, lambda: keras.models.load_model(path, safe_mode=True, **options)
        )
        archives.check_outputs(model)
        return model
    except Exception as error:
        # Keras raises errors of many kinds for a broken file.
        reason = printable(" ".join(str(error).split()), limit=1000) or type(error).__name__
        raise ValueError(f"{path} cannot be loaded as a Keras model: {reason}") from error


def check_whole(path: Path) -> int:
    """Checks that a `.keras` file is whole and may be loaded: see `archives`; raises ValueError.

    Returns:
        How many numbers its weights hold.
    """
    try:
        with reading.open_regular(path) as file:
            return archives.check(file)
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    except Exception as error:  # Of many kinds.
        raise ValueError(f"{path} cannot be loaded: it is no whole .keras file: {error}") from error


def read_note(path: Path) -> dict[str, Any]:
    """Reads the note in a checkpoint; raises ValueError if there is none."""
    check_whole(path)
    with zipfile.ZipFile(path) as archive:
        try:
            note = json.loads(archive.read(_NOTE))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be loaded: it does not say which run and epoch it is of"
            ) from error
    if not isinstance(note, dict):
        raise ValueError(f"{path} cannot be loaded: its {_NOTE} is no object")
    return note
