"""Weights files of a model around a network, which the network alone reads and writes as well.

h5py, in which they are written, comes with Keras and TensorFlow.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras

from tfjacreg import _keras

# Where in the file stands what the network does not have: the optimizer, the penalty's state.
_OWN = "regularized_model"


def is_one(path: Any) -> bool:
    """Whether a path is that of a local `.weights.h5` file."""
    return str(path).endswith(".weights.h5") and "://" not in str(path)


def stamp(path: Any) -> tuple[int, int] | None:
    """What changes when a file is written anew; None where there is none."""
    with contextlib.suppress(OSError):
        found = Path(path).stat()
        return found.st_mtime_ns, found.st_ino
    return None


def put_network_first(path: Any, network: keras.Layer) -> None:
    """Moves the network of a file that Keras wrote for the model around it to the file's root.

    Args:
        path: The file.
        network: The network, the first of the model's layers.
    """
    with h5py.File(path, "r+") as file:
        names = list(file)
        file.create_group(_OWN)
        for name in names:
            file.move(name, f"{_OWN}/{name}")
        group = file[f"{_OWN}/layers/{_keras.group_in_file(network)}"]
        for name in list(group):
            file.move(f"{group.name}/{name}", name)


@contextlib.contextmanager
def own_part(path: Any) -> Iterator[str | None]:
    """A file for the time being of all but the network; None in a file of the network alone."""
    with h5py.File(path, "r") as file, tempfile.TemporaryDirectory() as folder:
        if _OWN not in file:
            yield None
            return
        own = str(Path(folder) / "own.weights.h5")
        with h5py.File(own, "w") as copy:
            for name in file[_OWN]:
                file.copy(f"{_OWN}/{name}", copy)
        yield own
