"""Classifier files from anywhere: which pixels they take, and whether these fit the data."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfjacreg.experiments import network_sources


@dataclasses.dataclass(frozen=True)
class Scale:
    """The scale of the pixels that a classifier takes.

    Attributes:
        low: The value of black.
        high: The value of white.
        mean: What is then subtracted, per channel or for all; empty for nothing.
        std: What is then divided by; as many numbers as `mean`.

    Raises:
        ValueError: If a number is out of range.
    """

    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Checks every number."""
        numbers = (self.low, self.high, *self.mean, *self.std)
        if not all(map(math.isfinite, numbers)) or self.low >= self.high:
            raise ValueError(
                "--pixels must be LOW..HIGH with LOW below HIGH, --mean and --std finite "
                f"numbers. Received: {self.low:g}..{self.high:g}, {self.mean}, {self.std}"
            )
        if len(self.mean) != len(self.std):
            raise ValueError(
                "--mean and --std must be given together, as many numbers of each. Received: "
                f"{len(self.mean)} and {len(self.std)}"
            )
        if any(value <= 0 for value in self.std):
            raise ValueError(f"--std must be positive. Received: {self.std}")

    @classmethod
    def of(cls, pixels: str | None, mean: Sequence[float], std: Sequence[float]) -> Scale:
        """The scale that the options describe.

        Args:
            pixels: `"LOW..HIGH"`, such as `"0..255"`; None for `"0..1"`.
            mean: One number, or one per channel.
            std: Likewise.

        Raises:
            ValueError: If a number is out of range, or `pixels` has another form.
        """
        number = r"([+-]?\d+(?:\.\d+)?)"
        match = re.fullmatch(rf"{number}\.\.{number}", pixels or "0..1")
        if not match:
            raise ValueError(f"--pixels must be LOW..HIGH, such as 0..255. Received: {pixels!r}")
        return cls(float(match[1]), float(match[2]), tuple(mean), tuple(std))

    @property
    def is_plain(self) -> bool:
        """Whether pixels in [0, 1] go in as they are."""
        return self == Scale()

    def __str__(self) -> str:
        """The scale in words."""
        text = f"pixels in [{self.low:g}, {self.high:g}]"
        if self.std:
            mean, std = (" ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
            text += f", less {mean}, divided by {std}"
        return text

    def in_front_of(self, classifier: keras.Model) -> keras.Model:
        """The classifier as one of pixels in [0, 1]; raises ValueError if the scale is unfit."""
        if self.is_plain:
            return classifier
        shape = classifier.input_shape[1:]
        if len(self.mean) not in (0, 1, shape[-1]):
            raise ValueError(
                f"--mean and --std must have one number, or one for each of the {shape[-1]} "
                f"channels. Received: {len(self.mean)}"
            )
        layers = [keras.Input(shape)]
        if (self.low, self.high) != (0, 1):
            layers.append(keras.layers.Rescaling(self.high - self.low, offset=self.low))
        if self.std:
            mean, std = (np.broadcast_to(v, shape[-1:]) for v in (self.mean, self.std))
            layers.append(keras.layers.Normalization(mean=mean, variance=np.square(std)))
        return keras.Sequential([*layers, classifier])


def refuse_other_formats(path: Path) -> None:
    """Refuses models in formats whose content cannot be checked; raises ValueError."""
    if path.suffix.lower() in (".h5", ".hdf5") and path.is_file():
        raise ValueError(
            f"{path} is an HDF5 file, which Keras loads without a check of the code in it. Convert "
            "it where you trust it: "
            f"keras.models.load_model({path.name!r}).save({path.stem + '.keras'!r})"
        )
    if (path / "saved_model.pb").is_file():
        raise ValueError(
            f"{path} is a SavedModel: a graph that runs whatever operations it names, and has no "
            "layers that could be looked at. Save the Keras model that it was made of: "
            f"model.save({path.name + '.keras'!r}); beside a saved_model/ of train.py there is a "
            "classifier.keras"
        )


def described(path: Path, classifier: keras.Model, scale: Scale, accuracy: float, n: int) -> str:
    """One line on how a classifier is understood: its images, scale, classes and accuracy."""
    shape = "x".join(map(str, classifier.input_shape[1:]))
    classes = classifier.output_shape[-1]
    return (
        f"{path} is taken for a classifier of images {shape}, {scale}, into {classes} classes, "
        f"logits out: accuracy {100 * accuracy:.1f} % on {n} images."
    )


def warn_of_scale(
    path: Path, classifier: keras.Model, scale: Scale, accuracy: float, n: int
) -> None:
    """Warns if a classifier seems to have been made for pixels on another scale.

    Args:
        path: Its file.
        classifier: The classifier in it.
        scale: The scale on which it gets its pixels.
        accuracy: Its accuracy on the images on this scale.
        n: The number of images.
    """
    layer = network_sources.leading_scale(classifier)
    begins: Any = ""
    if layer is not None:
        begins = f" It begins with {layer.name!r} ({type(layer).__name__})."
    chance = 1 / classifier.output_shape[-1]
    # Three standard deviations of guessing.
    if accuracy < chance + 3 * math.sqrt(chance * (1 - chance) / n):
        warnings.warn(
            f"{path} is right on {100 * accuracy:.1f} % of {n} images, and guessing is on "
            f"{100 * chance:.1f} %: attacks on it say nothing.{begins} It was taken for one of "
            f"{scale}. If it was made for others, give --pixels 0..255, or --mean and --std; and "
            "look whether its classes are those of the data set, in its order.",
            stacklevel=2,
        )
    elif layer is not None and scale.is_plain and isinstance(layer, keras.layers.Rescaling):
        warnings.warn(
            f"{path} was taken for one of {scale}.{begins} If it was made for pixels of 0..255, "
            "give --pixels 0..255.",
            stacklevel=2,
        )
