"""Reads and checks the original files of the data sets, as their authors publish them.

Nothing is unpacked to disk, and no more is read from a file than the data set can hold.
"""

from __future__ import annotations

import gzip
import io
import math
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

NUM_CLASSES = 10
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
_CIFAR_FILES = {
    "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    "test": ("test_batch.bin",),
}
_CIFAR_RECORD = 1 + 3 * 32 * 32
# No file has more examples than this.
_MOST_IDX = {"train": 60_000, "test": 10_000}
_MOST_CIFAR = 10_000
# The archive: six files, and a megabyte for the headers of tar and the authors' other files.
LARGEST = 16 + 28 * 28 * _MOST_IDX["train"]  # Bytes of an idx file.
_LARGEST_ARCHIVE = 6 * _MOST_CIFAR * _CIFAR_RECORD + 2**20


def read(name: str, folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a split of `fashion_mnist`, `kmnist` or `cifar10`.

    Args:
        name: The data set.
        folder: The folder of its original files.
        split: `"train"` or `"test"`.

    Returns:
        Pixels, uint8 `[N, H, W, C]`, and labels, uint8 `[N]`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or larger than the original; the message names it.
    """
    return _read_cifar(folder, split) if name == "cifar10" else _read_mnist(folder, split)


def paths(name: str, folder: Path) -> list[Path]:
    """The files that `read` reads; for `cifar10` the archive, or none if it is unpacked.

    Args:
        name: The data set.
        folder: The folder of its original files.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If one is not a file.
    """
    if name == "cifar10":
        return [path for path in [folder / CIFAR_ARCHIVE] if path.exists()]
    return [_find(folder, file) for pair in IDX_FILES.values() for file in pair]


def _read_mnist(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    image_file, label_file = (_find(folder, name) for name in IDX_FILES[split])
    images = _read_idx(image_file, _MOST_IDX[split], (28, 28))
    labels = _read_idx(label_file, _MOST_IDX[split], ())
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
            return _file(candidate)
    raise FileNotFoundError(f"Expected {name}.gz or {name} in {folder}. Received: neither is there")


def _file(path: Path) -> Path:
    """Returns the path of a regular file; a pipe, for example, might never end."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a file. Received: a folder or a device of that name")
    return path


def _read_idx(path: Path, most: int, example: tuple[int, ...]) -> np.ndarray:
    """Reads an idx file of bytes: magic number, sizes (big-endian int32), data."""
    rank = 1 + len(example)
    header = 4 + 4 * rank
    content = content_of(path, header + most * math.prod(example))
    magic = bytes((0, 0, 8, rank))
    if content[:4] != magic or len(content) < header:
        raise ValueError(
            f"{path}: expected an idx file of bytes with {rank} dimensions, which starts with "
            f"{magic.hex()}. Received: {len(content)} bytes that start with {content[:4].hex()}"
        )
    shape = tuple(map(int, np.frombuffer(content, ">i4", rank, 4)))
    if shape[1:] != example:
        raise ValueError(
            f"{path}: expected images of {'x'.join(map(str, example))}. Received: {shape[1:]}"
        )
    expected = header + math.prod(shape)
    if shape[0] < 0 or len(content) != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes, by the sizes {shape} in its header. "
            f"Received: {len(content)}. Get the file again."
        )
    if not shape[0]:
        raise ValueError(f"{path}: expected at least one example. Received: none")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def content_of(path: Path, largest: int = LARGEST) -> bytes:
    """The content of a file, decompressed if its name ends in `.gz`.

    Args:
        path: The file.
        largest: The most bytes that the content may have.

    Raises:
        ValueError: If there is more, or the compressed file is damaged.
    """
    if path.suffix == ".gz":
        return _gunzip(path, largest)
    with path.open("rb") as file:
        return _limited(path, file.read(largest + 1), largest)


def _gunzip(path: Path, largest: int) -> bytes:
    """Decompresses a whole file, so that its checksum is verified."""
    try:
        with gzip.open(path) as file:
            content = file.read(largest + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a whole gzip file. Received: {error}. Get the file again."
        ) from error
    return _limited(path, content, largest)


def _limited(path: Path, content: bytes, largest: int) -> bytes:
    if len(content) > largest:
        raise ValueError(
            f"{path}: expected at most {largest} bytes, more than which the data set does not "
            "have. Received: more. Get the file again."
        )
    return content


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
    archive = folder / CIFAR_ARCHIVE
    largest = _MOST_CIFAR * _CIFAR_RECORD
    if not archive.exists():
        inner = folder / "cifar-10-batches-bin"
        inner = inner if inner.is_dir() else folder
        for name in _CIFAR_FILES[split]:
            if not (inner / name).exists():
                raise FileNotFoundError(
                    f"Expected {CIFAR_ARCHIVE} or, unpacked, {name} in {folder}. "
                    "Received: neither is there"
                )
            yield inner / name, content_of(_file(inner / name), largest)
        return
    # Without tarfile's own decompression, which stops before the checksum at the end.
    content = io.BytesIO(_gunzip(_file(archive), _LARGEST_ARCHIVE))
    try:
        with tarfile.open(fileobj=content, mode="r:") as opened:
            members = _members(archive, opened)
            for name in _CIFAR_FILES[split]:
                if name not in members:
                    raise ValueError(f"{archive}: expected a file {name}. Received: {set(members)}")
                member = members[name]
                # A sparse file claims a size that it does not hold.
                if member.size > largest or member.issparse():
                    raise ValueError(
                        f"{archive / name}: expected at most {largest} bytes. Received: "
                        f"{member.size}. Get the file again."
                    )
                yield archive / name, opened.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{archive}: expected a whole tar archive. Received: {error}. Get the file again."
        ) from error


def _members(archive: Path, opened: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """The files of an archive by their names, without folders."""
    members: dict[str, tarfile.TarInfo] = {}
    for member in opened:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"{archive}: expected names that stay inside the archive. Received: "
                f"{member.name!r}. This is not the authors' archive."
            )
        if member.isfile():
            if path.name in members:
                raise ValueError(f"{archive}: expected each file once. Received: {path.name} twice")
            members[path.name] = member
    return members


def _check_labels(path: Path, labels: np.ndarray) -> None:
    if labels.size and labels.max() >= NUM_CLASSES:
        raise ValueError(
            f"{path}: expected labels from 0 to {NUM_CLASSES - 1}. Received: {int(labels.max())}"
        )
