"""The paper's data sets, and embedded digits, as arrays of pixels in [0, 1]."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfjacreg import extras

DOWNLOADED = ("fashion_mnist", "kmnist", "cifar10")
NAMES = ("digits", *DOWNLOADED)
VALIDATION_SIZES = {"digits": 180, "fashion_mnist": 5000, "kmnist": 5000, "cifar10": 5000}
DIGITS_TEST_SIZE = 360
NUM_CLASSES = 10

# Asked before tensorflow-datasets downloads: without a network it retries for minutes.
_HOSTS = {
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "kmnist": "http://codh.rois.ac.jp/",
    "cifar10": "https://www.cs.toronto.edu/",
}
_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
_CIFAR_FILES = {
    "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    "test": ("test_batch.bin",),
}
_CIFAR_RECORD = 1 + 3 * 32 * 32


class Split(NamedTuple):
    """Examples.

    Attributes:
        x: Pixels in [0, 1], float32 `[N, H, W, C]`.
        y: Classes, int32 `[N]`.
    """

    x: np.ndarray
    y: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in three splits.

    Attributes:
        name: Its name in `NAMES`.
        train: What is trained on.
        validation: Held out from the official training set, as many of each class.
        test: The official test set.
        mean: The mean of the training split's pixels per channel, float32 `[C]`.
        std: Their standard deviation, float32 `[C]`.
        num_classes: The number of classes.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    mean: np.ndarray
    std: np.ndarray
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of an example."""
        return self.train.x.shape[1:]


def load(name: str, data_dir: str | Path | None = None, *, seed: int = 0) -> Dataset:
    """Loads a data set.

    `digits` are the 1,797 handwritten digits of scikit-learn, resized from 8x8 to 28x28; 360 of
    them, always the same, are the test split. The others come from tensorflow-datasets: from
    `data_dir` if they are there, else by download. The validation split is held out from the
    training set, 180 digits or 5,000 images, with as many of each class.

    Args:
        name: A name in `NAMES`.
        data_dir: Where tensorflow-datasets keeps its data; None is `~/tensorflow_datasets`.
        seed: Chooses the validation split, and nothing else.

    Returns:
        The three splits, and the statistics of the training split.

    Raises:
        ValueError: If `name` is unknown.
        FileNotFoundError: If the data is neither here nor to be had by download.
        ImportError: If the package that has the data is not installed; the message names the
            command that installs it.
    """
    if name not in NAMES:
        raise ValueError(f"A data set's name must be one of {NAMES}. Received: {name!r}")
    held, test = _digits() if name == "digits" else _from_tfds(name, data_dir)
    rest, validation = _stratified(held.y, VALIDATION_SIZES[name], np.random.default_rng(seed))
    train = Split(held.x[rest], held.y[rest])
    mean = train.x.mean(axis=(0, 1, 2), dtype=np.float64)
    std = np.sqrt(np.square(train.x - mean).mean(axis=(0, 1, 2), dtype=np.float64))
    return Dataset(
        name=name,
        train=train,
        validation=Split(held.x[validation], held.y[validation]),
        test=test,
        mean=mean.astype("float32"),
        std=std.astype("float32"),
        num_classes=NUM_CLASSES,
    )


def prepare(name: str, source_dir: str | Path, data_dir: str | Path | None = None) -> Path:
    """Makes a data set that tensorflow-datasets loads without a network out of original files.

    The files are those of the data set's authors: for `fashion_mnist` and `kmnist` the four idx
    files, compressed (`.gz`) or not, as Debian's package `dataset-fashion-mnist` has them in
    `/usr/share/datasets/fashion-mnist`; for `cifar10` the binary version, as
    `cifar-10-binary.tar.gz` or unpacked. Keep `fashion_mnist` and `kmnist` apart: their files have
    the same names. All files are checked before anything is written, and the result is put in place
    whole; a data set that is already there is left as it is. The examples come in the order in
    which tensorflow-datasets stores what it downloads: one seed holds out the same images of both.

    Args:
        name: `fashion_mnist`, `kmnist` or `cifar10`.
        source_dir: Where the original files are.
        data_dir: Where tensorflow-datasets keeps its data; None is `~/tensorflow_datasets`.

    Returns:
        The folder of the prepared data set.

    Raises:
        ValueError: If `name` is not one of the three, or a file is damaged; the message names it.
        FileNotFoundError: If a file is missing.
        ImportError: If tensorflow-datasets is not installed.
    """
    if name not in DOWNLOADED:
        raise ValueError(
            f"Data sets to prepare are {DOWNLOADED}; digits need no preparation. Received: {name!r}"
        )
    with extras.importing("experiments", f"The data set {name}"):
        import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    if builder.is_prepared():
        return Path(builder.data_dir)
    read = _read_cifar if name == "cifar10" else _read_mnist
    arrays = {split: read(Path(source_dir), split) for split in ("train", "test")}
    target = Path(builder.data_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as temporary,
        # It would praise the temporary folder. The progress bar is on the other stream.
        contextlib.redirect_stdout(io.StringIO()),
    ):
        made = tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version=str(builder.version),
            features=builder.info.features,
            split_datasets={
                split: list(_examples(name, split, *pair)) for split, pair in arrays.items()
            },
            data_dir=temporary,
        )
        # A folder that an interrupted attempt of tensorflow-datasets left is of no use to it.
        shutil.rmtree(target, ignore_errors=True)
        os.replace(made.data_dir, target)
    return target


def _from_tfds(name: str, data_dir: str | Path | None) -> tuple[Split, Split]:
    with extras.importing("experiments", f"The data set {name}"):
        import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    if not builder.is_prepared():
        try:
            _ask(_HOSTS[name])
            builder.download_and_prepare()
        except Exception as error:
            files = (
                _CIFAR_ARCHIVE
                if name == "cifar10"
                else ", ".join(f"{file}.gz" for pair in _IDX_FILES.values() for file in pair)
            )
            debian = (
                " (Debian: apt-get install dataset-fashion-mnist, then the folder is "
                "/usr/share/datasets/fashion-mnist)"
                if name == "fashion_mnist"
                else ""
            )
            raise FileNotFoundError(
                f"{name} is not in {builder.data_dir} and cannot be downloaded: {error}. Either "
                "run this where there is a network, or make it from its original files "
                f"({files}) with: python -m tfjacreg prepare {name} FOLDER{debian}. "
                "--data-dir says where to put it."
            ) from error
    splits = []
    for split in ("train", "test"):
        batches = tfds.as_numpy(builder.as_dataset(split=split, as_supervised=True, batch_size=-1))
        images, labels = batches
        splits.append(Split(_pixels(images), labels.astype("int32")))
    return splits[0], splits[1]


def _ask(host: str) -> None:
    request = urllib.request.Request(host, method="HEAD")
    with contextlib.suppress(urllib.error.HTTPError):  # Somebody answers.
        urllib.request.urlopen(request, timeout=10).close()


def _digits() -> tuple[Split, Split]:
    with extras.importing("experiments", "The data set digits"):
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
    """Chooses `size` indices, as many of each class; returns the rest and them, sorted."""
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


def _read_mnist(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    image_file, label_file = (_find(folder, name) for name in _IDX_FILES[split])
    images, labels = _read_idx(image_file, 3), _read_idx(label_file, 1)
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{image_file}: expected images of 28x28. Received: {images.shape[1:]}")
    if len(images) != len(labels):
        raise ValueError(
            f"{label_file}: expected a label for each of the {len(images)} images of "
            f"{image_file.name}. Received: {len(labels)}"
        )
    _check_labels(label_file, labels)
    return images[..., None], labels


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"Expected {name}.gz or {name} in {folder}. Received: neither is there")


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """Reads an idx file of bytes: magic number, sizes (big-endian int32), data."""
    content = _gunzip(path) if path.suffix == ".gz" else path.read_bytes()
    header = 4 + 4 * rank
    magic = bytes((0, 0, 8, rank))
    if content[:4] != magic or len(content) < header:
        raise ValueError(
            f"{path}: expected an idx file of bytes with {rank} dimensions, which starts with "
            f"{magic.hex()}. Received: {len(content)} bytes that start with {content[:4].hex()}"
        )
    shape = np.frombuffer(content, ">i4", rank, 4)
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes, by the sizes {tuple(map(int, shape))} in its "
            f"header. Received: {len(content)}. Get the file again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _gunzip(path: Path) -> bytes:
    """Decompresses a whole file, so that its checksum is verified."""
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a whole gzip file. Received: {error}. Get the file again."
        ) from error


def _read_cifar(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    parts = [_cifar_records(*item) for item in _cifar_files(folder, split)]
    records = np.concatenate(parts)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0]


def _cifar_records(path: Path, content: bytes) -> np.ndarray:
    if not content or len(content) % _CIFAR_RECORD:
        raise ValueError(
            f"{path}: expected records of {_CIFAR_RECORD} bytes, a label and 32x32x3 pixels. "
            f"Received: {len(content)} bytes. Get the file again."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR_RECORD)
    _check_labels(path, records[:, 0])
    return records


def _cifar_files(folder: Path, split: str) -> Iterator[tuple[Path, bytes]]:
    archive = folder / _CIFAR_ARCHIVE
    if not archive.exists():
        inner = folder / "cifar-10-batches-bin"
        inner = inner if inner.is_dir() else folder
        for name in _CIFAR_FILES[split]:
            if not (inner / name).exists():
                raise FileNotFoundError(
                    f"Expected {_CIFAR_ARCHIVE} or, unpacked, {name} in {folder}. "
                    "Received: neither is there"
                )
            yield inner / name, (inner / name).read_bytes()
        return
    # Not tarfile's own decompression: it stops before the checksum at the end.
    content = io.BytesIO(_gunzip(archive))
    try:
        with tarfile.open(fileobj=content, mode="r:") as opened:
            members = {Path(member.name).name: member for member in opened if member.isfile()}
            for name in _CIFAR_FILES[split]:
                if name not in members:
                    raise ValueError(f"{archive}: expected a file {name}. Received: {set(members)}")
                yield archive / name, opened.extractfile(members[name]).read()  # type: ignore
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{archive}: expected a whole tar archive. Received: {error}. Get the file again."
        ) from error


def _check_labels(path: Path, labels: np.ndarray) -> None:
    if labels.size and labels.max() >= NUM_CLASSES:
        raise ValueError(
            f"{path}: expected labels from 0 to {NUM_CLASSES - 1}. Received: {int(labels.max())}"
        )
