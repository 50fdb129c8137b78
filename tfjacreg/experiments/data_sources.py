"""Data sets by name, the project's or your own, in three splits.

The splits of your own data depend on its images alone: not on their order in a file, nor on the
kind of file.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from pathlib import Path

import numpy as np

import tfjacreg_startup
from tfjacreg import datasets
from tfjacreg.datasets import Dataset, Split
from tfjacreg.experiments import data_checks, data_readers
from tfjacreg.printable import is_one_line

TEST_FRACTION = 0.2  # Of all images, if there is no test split.
VALIDATION_FRACTION = 0.1  # Of the training images, if there is no validation split.
# Public sets have a few images twice. More than this share are a mistake in splitting.
_SHARED = 0.01


def is_valid(name: object) -> bool:
    """Whether a data set may have this name; it need not exist."""
    if not is_one_line(name) or ("://" in name and tfjacreg_startup.redacted(name) != name):
        return False  # A password in a name would be stored in the settings of every run.
    return name in datasets.NAMES or data_readers.is_own(name)


def load(
    name: str,
    data_dir: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
) -> Dataset:
    """Loads a data set in three splits, with pixels in [0, 1], not standardized.

    If there are no test images, a fifth of each class is held out as the test split. If there are
    no validation images, a tenth of each class of the training images is. Both are drawn with seed
    0.

    Args:
        name: A name in `datasets.NAMES`, `FILE.npz`, a folder or `tfds:NAME`.
        data_dir: The folder in which tensorflow-datasets keeps its data; None for its default.
        image_size: `(H, W)` that images of folders and tfds are resized to; None if they are of
            one size.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If anything in it is wrong; the message says what to do.
    """
    if name in datasets.NAMES:
        return datasets.load(name, data_dir)
    return _load(name, data_dir, image_size, _stamp(Path(name).expanduser()))


def _stamp(place: Path) -> tuple[tuple[str, int, int], ...]:
    """Path, time and size of every file of a data set, so that changed files are read again.

    Empty for tensorflow-datasets, which never changes a prepared set.
    """
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    stats = [(str(file), file.stat()) for file in files]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


# A run asks for its data twice: for the digest, and to train.
@functools.lru_cache(maxsize=1)
def _load(
    name: str,
    data_dir: str | Path | None,
    image_size: tuple[int, int] | None,
    _stamp: tuple[tuple[str, int, int], ...],
) -> Dataset:
    raw = data_readers.read(name, data_dir, image_size)
    splits = {
        split: data_checks.split(f"{name}: x_{split}", *pair) for split, pair in raw.splits.items()
    }
    data_checks.shapes(name, splits)
    others = {split: splits[split] for split in splits if split != "train"}
    count = data_checks.classes(name, splits["train"], others, raw.class_names)
    splits = {split: _ordered(examples) for split, examples in splits.items()}
    if "test" not in splits:
        splits["train"], splits["test"] = _held_out(name, splits["train"], TEST_FRACTION, "test")
    if "val" not in splits:
        splits["train"], splits["val"] = _held_out(
            name, splits["train"], VALIDATION_FRACTION, "validation"
        )
    train = splits["train"]
    data_checks.channels(name, train)
    _look_for_shared_images(name, splits)
    mean, std = train.statistics()
    return Dataset(
        name=name,
        train=train,
        validation=splits["val"],
        test=splits["test"],
        mean=mean,
        std=std,
        num_classes=count,
        class_names=raw.class_names,
    )


def digest(data: Dataset) -> str | None:
    """The SHA-256 of the images and labels of the three splits; None for `datasets.NAMES`."""
    if data.name in datasets.NAMES:
        return None
    found = hashlib.sha256()
    for split in (data.train, data.validation, data.test):
        found.update(repr(split.x.shape).encode())
        found.update(np.ascontiguousarray(split.x, "<f4").data)
        found.update(np.ascontiguousarray(split.y, "<i4").data)
    return found.hexdigest()


def digest_of(name: str, data_dir: str | None, image_size: tuple[int, int] | None) -> str | None:
    """As `digest`, of a data set by name; also None if it is not there."""
    if name in datasets.NAMES:
        return None
    try:
        return digest(load(name, data_dir, image_size))
    except FileNotFoundError:
        return None


def _hashes(split: Split) -> list[bytes]:
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in split.x]


def _ordered(split: Split) -> Split:
    """The examples in an order that depends on their content alone."""
    hashes = _hashes(split)
    order = sorted(range(len(hashes)), key=lambda number: (hashes[number], split.y[number]))
    return Split(split.x[order], split.y[order])


def _held_out(name: str, split: Split, fraction: float, what: str) -> tuple[Split, Split]:
    """Takes a part of each class out of a split, by seed 0; returns the rest and that part."""
    generator = np.random.default_rng(0)
    held = np.zeros(len(split.y), bool)
    for label in np.unique(split.y):
        members = np.flatnonzero(split.y == label)
        if len(members) < 2:
            raise ValueError(
                f"{name}: a class must have at least two images to hold one out for the {what} "
                f"split. Received: {len(members)} of class {label}. Add images, or give that split"
            )
        size = max(1, round(fraction * len(members)))
        held[generator.permutation(members)[:size]] = True
    return Split(split.x[~held], split.y[~held]), Split(split.x[held], split.y[held])


def _look_for_shared_images(name: str, splits: dict[str, Split]) -> None:
    known = {*_hashes(splits["train"]), *_hashes(splits["val"])}
    test = _hashes(splits["test"])
    shared = sum(image in known for image in test)
    if shared > _SHARED * len(test):
        raise ValueError(
            f"{name}: test images must be none of the training images. Received: {shared} of "
            f"{len(test)} that are. Take them out of one of the two"
        )
    if shared:
        warnings.warn(
            f"{name}: {shared} of {len(test)} test images are among the training images too.",
            stacklevel=2,
        )
