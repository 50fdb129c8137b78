"""Weights files of a model around a network, which the network can also read and write alone.

They are written with h5py, which comes with Keras and TensorFlow.
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

# The group in the file for what the network does not have: the optimizer, the penalty's state.
_OWN = "regularized_model"


def is_one(path: Any) -> bool:
    """Whether a path names a local `.weights.h5` file."""
    return str(path).endswith(".weights.h5") and "://" not in str(path)


def put_network_first(path: Any, network: keras.Layer) -> None:
    """Moves the network to the root of a file that Keras wrote for the model around it.

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
    """Yields a temporary file with all but the network; None for a file of the network alone."""
    with h5py.File(path, "r") as file, tempfile.TemporaryDirectory() as folder:
        if _OWN not in file:
            yield None
            return
        own = str(Path(folder) / "own.weights.h5")
        with h5py.File(own, "w") as copy:
            for name in file[_OWN]:
                file.copy(f"{_OWN}/{name}", copy)
        yield own
