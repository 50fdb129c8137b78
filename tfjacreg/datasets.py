"""The paper's data sets, and scikit-learn's digits, as arrays of pixels in [0, 1]."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfjacreg import (
    arguments,
    atomic_files,
    dataset_files,
    error_causes,
    hosts,
    optional_packages,
    published,
)
from tfjacreg.dataset_files import NUM_CLASSES

DOWNLOADED = ("fashion_mnist", "kmnist", "cifar10")
NAMES = ("digits", *DOWNLOADED)
VALIDATION_SIZES = {"digits": 180, "fashion_mnist": 5000, "kmnist": 5000, "cifar10": 5000}
DIGITS_TEST_SIZE = 360

# Asked before tensorflow-datasets downloads, which retries for minutes if there is no network.
_HOSTS = {
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "kmnist": "http://codh.rois.ac.jp/",
    "cifar10": "https://www.cs.toronto.edu/",
}
# Errors of the machine say nothing of the files, but for a missing file or a folder in its place.
# TensorFlow has an UnknownError for an error of the disk.
_OF_THE_MACHINE = (
    *(OSError, MemoryError, tf.errors.ResourceExhaustedError),
    *(tf.errors.PermissionDeniedError, tf.errors.UnknownError),
)
_OF_THE_FILES = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class Split(NamedTuple):
    """Images and their classes.

    Attributes:
        x: Pixels in [0, 1], float32 `[N, H, W, C]`.
        y: Classes, int32 `[N]`.
    """

    x: np.ndarray
    y: np.ndarray

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the pixels per channel, float32 `[C]` each."""
        mean = self.x.mean(axis=(0, 1, 2), dtype=np.float64)
        std = np.sqrt(np.square(self.x - mean).mean(axis=(0, 1, 2), dtype=np.float64))
        return mean.astype("float32"), std.astype("float32")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in three splits.

    Attributes:
        name: Its name in `NAMES`; for a file of your own, which `train.py` reads, the file's name.
        train: The training split.
        validation: Held out from the official training set, with equally many of each class.
        test: The official test set.
        mean: The mean of the training split's pixels per channel, float32 `[C]`.
        std: The standard deviation of the training split's pixels per channel, float32 `[C]`.
        num_classes: The number of classes.
        class_names: The names of the classes, or empty.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    mean: np.ndarray
    std: np.ndarray
    num_classes: int
    class_names: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of an example."""
        return self.train.x.shape[1:]


def load(name: str, data_dir: str | Path | None = None, *, seed: int = 0) -> Dataset:
    """Loads a data set.

    `digits` are the 1,797 handwritten digits of scikit-learn, resized from 8x8 to 28x28; 360 of
    them, always the same, are the test split. The other sets are read from `data_dir` as
    tensorflow-datasets stores them, or downloaded if they are not there. The validation split, 180
    digits or 5,000 images with equally many of each class, is held out from the training set.

    Args:
        name: A name in `NAMES`.
        data_dir: The folder in which tensorflow-datasets keeps its data; None is
            `~/tensorflow_datasets`.
        seed: Chooses the validation split, and nothing else.

    Returns:
        The three splits, and the statistics of the training split.

    Raises:
        TypeError: If `data_dir` is not a path.
        ValueError: If `name` is unknown, `seed` or `data_dir` is not valid, or the stored data is
            damaged; the message names the command that makes it again.
        FileNotFoundError: If the data is not there and cannot be downloaded.
        OSError: If the stored data cannot be read, which may be whole.
        ImportError: If a package that is needed is not installed; the message names the command
            that installs it.
    """
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"A data set's name must be one of {NAMES}. Received: {name!r}")
    seed = arguments.fixed_seed(seed)
    data_dir = None if data_dir is None else arguments.path("data_dir", data_dir)
    held, test = _digits() if name == "digits" else _from_tfds(name, data_dir)
    rest, validation = _stratified(held.y, VALIDATION_SIZES[name], np.random.default_rng(seed))
    train = Split(held.x[rest], held.y[rest])
    mean, std = train.statistics()
    return Dataset(
        name=name,
        train=train,
        validation=Split(held.x[validation], held.y[validation]),
        test=test,
        mean=mean,
        std=std,
        num_classes=NUM_CLASSES,
    )


def prepare(name: str, source_dir: str | Path, data_dir: str | Path | None = None) -> Path:
    """Makes a data set from its original files, for `load` to read without a network.

    For `fashion_mnist` and `kmnist` the original files are the four idx files, compressed (`.gz`)
    or not, as in Debian's package `dataset-fashion-mnist` under
    `/usr/share/datasets/fashion-mnist`; for `cifar10` they are the binary version, as
    `cifar-10-binary.tar.gz` or unpacked. The files of `fashion_mnist` and `kmnist` have the same
    names: files of another set are refused by their published checksums and by the number of images
    of each class. All files are checked before anything is written, and the result appears as a
    whole. An existing data set is left as it is, unless it is damaged. The examples are stored in
    the order that tensorflow-datasets gives to downloaded data, so that one seed holds out the same
    images of both.

    Args:
        name: `fashion_mnist`, `kmnist` or `cifar10`.
        source_dir: The folder of the original files.
        data_dir: The folder in which tensorflow-datasets keeps its data; None is
            `~/tensorflow_datasets`.

    Returns:
        The folder of the prepared data set.

    Raises:
        TypeError: If `source_dir` or `data_dir` is not a path.
        ValueError: If `name` is not one of the three, or a file is damaged or belongs to another
            set; the message names the file.
        FileNotFoundError: If a file is missing.
        OSError: If the data set cannot be written, or an existing one, which may be whole, cannot
            be read.
        ImportError: If tensorflow-datasets is not installed.
    """
    if not isinstance(name, str) or name not in DOWNLOADED:
        raise ValueError(
            f"Data sets to prepare are {DOWNLOADED}; digits need no preparation. Received: {name!r}"
        )
    source = arguments.path("source_dir", source_dir)
    data_dir = None if data_dir is None else arguments.path("data_dir", data_dir)
    tfds = _tensorflow_datasets(name)
    target = _target(name, data_dir)
    with contextlib.suppress(ValueError):  # A damaged data set is made again.
        builder = _builder(name, data_dir)
        if builder.is_prepared():
            _stored(name, builder)
            return target
    arrays = {split: dataset_files.read(name, source, split) for split in ("train", "test")}
    published.check(name, source, {split: labels for split, (_, labels) in arrays.items()}, tfds)
    blank = _blank(name)
    try:
        with (
            atomic_files.replacing(target) as scratch,
            # It would report the temporary folder. The progress bar is on the other stream.
            contextlib.redirect_stdout(io.StringIO()),
        ):
            made = tfds.dataset_builders.store_as_tfds_dataset(
                name=name,
                version=str(blank.version),
                features=blank.info.features,
                split_datasets={
                    split: list(_examples(name, split, *pair)) for split, pair in arrays.items()
                },
                data_dir=scratch / "made",
            )
            for file in Path(made.data_dir).iterdir():
                os.replace(file, scratch / file.name)
            atomic_files.remove(scratch / "made")
    except Exception as error:
        if not error_causes.came_from(error, OSError, tf.errors.OpError):
            raise
        raise OSError(
            f"Cannot write {target}: {error}. Choose a writable --data-dir with room for the data "
            "set; the same command then makes it."
        ) from error
    return target


def _tensorflow_datasets(name: str) -> Any:
    with optional_packages.importing("experiments", f"The data set {name}"):
        import tensorflow_datasets as tfds
    return tfds


def _blank(name: str) -> Any:
    """The builder of a data set for an empty folder."""
    with tempfile.TemporaryDirectory() as empty:
        return _tensorflow_datasets(name).builder(name, data_dir=empty)


def _target(name: str, data_dir: Path | None) -> Path:
    """The folder in which tensorflow-datasets keeps a data set, whether it is there or not."""
    tfds = _tensorflow_datasets(name)
    version = str(_blank(name).version)
    root = tfds.core.constants.DATA_DIR if data_dir is None else data_dir
    return Path(root).expanduser() / name / version


def _builder(name: str, data_dir: Path | None) -> Any:
    """The builder of tensorflow-datasets; raises what `_unreadable` says."""
    tfds = _tensorflow_datasets(name)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # Of many kinds, from JSON, protocol buffers, assertions.
        raise _unreadable(name, _target(name, data_dir), error) from error


def _stored(name: str, builder: Any) -> tuple[Split, Split]:
    """Reads the training and test splits of a prepared data set; raises what `_unreadable` says."""
    tfds = _tensorflow_datasets(name)
    splits = []
    try:
        for split in ("train", "test"):
            stored = builder.as_dataset(split=split, as_supervised=True, batch_size=-1)
            images, labels = tfds.as_numpy(stored)
            count = builder.info.splits[split].num_examples
            if len(images) != count or len(labels) != count or not count:
                raise ValueError(f"{len(images)} images in the {split} split, not {count}")
            if labels.min() < 0 or labels.max() >= NUM_CLASSES:
                raise ValueError(f"labels from {labels.min()} to {labels.max()}")
            splits.append(Split(_pixels(images), labels.astype("int32")))
    except Exception as error:  # TensorFlow has error classes of its own.
        raise _unreadable(name, Path(builder.data_dir), error) from error
    return splits[0], splits[1]


def _unreadable(name: str, folder: Path, error: Exception) -> OSError | ValueError:
    """What an error in reading a data set means: a ValueError if the data set is damaged."""
    # Without TensorFlow's names of its internal nodes.
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*?\]", "", str(error))
    reason = " ".join(text.split()) or type(error).__name__
    cause = error_causes.find(error, *_OF_THE_MACHINE)
    if cause is not None and not isinstance(cause, _OF_THE_FILES):
        return OSError(
            f"Cannot read the data set {name} in {folder}: {reason[:300]}. It may be whole: see to "
            "its permissions, its disk and the free memory. The same command then reads it."
        )
    return ValueError(
        f"The data set {name} in {folder} is damaged: {reason[:300]}. Make it again from its "
        f"original files ({_originals(name)}) with: python -m tfjacreg prepare {name} FOLDER "
        f"--data-dir {folder.parent.parent}, or remove {folder} to have it downloaded again."
    )


def _originals(name: str) -> str:
    if name == "cifar10":
        return dataset_files.CIFAR_ARCHIVE
    return ", ".join(f"{file}.gz" for pair in dataset_files.IDX_FILES.values() for file in pair)


def _from_tfds(name: str, data_dir: Path | None) -> tuple[Split, Split]:
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        try:
            hosts.ask(_HOSTS[name])
            builder.download_and_prepare()
        except Exception as error:
            debian = (
                " (Debian: apt-get install dataset-fashion-mnist, then the folder is "
                "/usr/share/datasets/fashion-mnist)"
                if name == "fashion_mnist"
                else ""
            )
            raise FileNotFoundError(
                f"{name} is not in {builder.data_dir} and cannot be downloaded: {error}. Either "
                "run this where there is a network, or make it from its original files "
                f"({_originals(name)}) with: python -m tfjacreg prepare {name} FOLDER{debian}. "
                "--data-dir says where to put it."
            ) from error
    return _stored(name, builder)


def _digits() -> tuple[Split, Split]:
    with optional_packages.importing("experiments", "The data set digits"):
        from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    x = np.clip(tf.image.resize(small, (28, 28)).numpy(), 0, 1)
    y = labels.astype("int32")
    rest, test = _stratified(y, DIGITS_TEST_SIZE, np.random.default_rng(0))
    return Split(x[rest], y[rest]), Split(x[test], y[test])


def _stratified(
    y: np.ndarray, size: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws `size` indices, equally many of each class; returns the others and these, sorted."""
    classes = np.unique(y)
    if size % len(classes):
        raise ValueError(f"{size} examples are not as many of each of {len(classes)} classes.")
    chosen = []
    for label in classes:
        members = np.flatnonzero(y == label)
        if len(members) <= size // len(classes):
            raise ValueError(
                f"Expected more than {size // len(classes)} examples of every class, to hold that "
                f"many out. Received: {len(members)} of class {label}. Is the data set whole?"
            )
        chosen.append(generator.permutation(members)[: size // len(classes)])
    held = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(y)), held), held


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.astype("float32") / np.float32(255)


def _examples(
    name: str, split: str, images: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Gives examples the keys of tensorflow-datasets, whose order on disk follows from them."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        example = {"image": image, "label": int(label)}
        if name == "cifar10":
            example["id"] = f"{split}_{number:05d}"
        yield number, example
