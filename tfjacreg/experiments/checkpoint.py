"""Checkpoints: Keras' own files, with a note inside that says which run and epochs they are of."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import keras

_NOTE = "run.json"  # Keras leaves members that it does not know alone.
_OWN = {"keras", "builtins", "tfjacreg"}


def save(model: keras.Model, path: Path, note: dict[str, Any]) -> None:
    """Writes the training state, with a note that can be read without loading it.

    Args:
        model: The model.
        path: The file, with the ending `.keras`.
        note: What JSON can represent.
    """
    model.save(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(_NOTE, json.dumps(note))


def load(path: Path, **options: Any) -> keras.Model:
    """Loads a `.keras` file after a look at every byte of it; runs no code that it holds.

    Args:
        path: The file.
        **options: For `keras.models.load_model`.

    Raises:
        ValueError: If that fails, for whatever reason.
    """
    # Keras jumps about in a file, past the checksums, and names one that is cut "not found".
    check_whole(path)
    foreign = sorted(_modules(_descriptions(path)) - _OWN)
    if foreign:
        raise ValueError(
            f"{path} cannot be loaded: it names classes of {foreign}, and no code is imported for "
            "a file. Save it with layers of Keras alone"
        )
    try:
        return keras.models.load_model(path, safe_mode=True, **options)
    except Exception as error:
        # Keras answers a broken file with errors of many kinds.
        reason = " ".join(str(error).split()) or type(error).__name__
        if "Lambda" in reason or "lambda" in reason:
            reason = (
                "it holds a Lambda layer, and the Python code of a file is not run. Save it with a "
                "layer of Keras in its place"
            )
        raise ValueError(f"{path} cannot be loaded as a Keras model: {reason}") from error


def check_whole(path: Path) -> None:
    """Compares every part of a `.keras` file with its checksum; raises ValueError."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # Of many kinds too.
        raise ValueError(f"{path} cannot be loaded: it is no whole .keras file: {error}") from error
    if damaged is not None:
        raise ValueError(f"{path} cannot be loaded: its part {damaged} is damaged")


def _descriptions(path: Path) -> list[Any]:
    """What the JSON parts of a `.keras` file say."""
    with zipfile.ZipFile(path) as archive:
        parts = [name for name in archive.namelist() if name.endswith(".json")]
        try:
            return [json.loads(archive.read(name)) for name in parts]
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} cannot be loaded: it does not say what model it is: {error}"
            ) from error


def _modules(config: Any) -> set[str]:
    """The packages of all classes in a config: old versions of Keras import whatever is named."""
    if isinstance(config, list):
        return set().union(*map(_modules, config))
    if not isinstance(config, dict):
        return set()
    module = config.get("module")
    own = (
        {module.partition(".")[0]} if isinstance(module, str) and "class_name" in config else set()
    )
    return own.union(*map(_modules, config.values()))


def read_note(path: Path) -> dict[str, Any]:
    """The note in a checkpoint; raises ValueError where there is none."""
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
