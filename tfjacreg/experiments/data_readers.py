"""Reads your own images and labels: from an .npz file, from class folders, from a tfds set.

They are returned as they were stored: `data_checks` says what is wrong with them.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfjacreg import hosts, optional_packages
from tfjacreg.experiments import archives, reading

TFDS = "tfds:"
# The endings that keras.utils.image_dataset_from_directory accepts.
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
SPLITS = ("train", "val", "test")
_KEYS = (*(f"{axis}_{name}" for name in SPLITS for axis in "xy"), "class_names")
_EXAMPLE = "numpy.savez('mine.npz', x_train=..., y_train=..., x_test=..., y_test=...)"
# Readers of an array's header. Version 3 is for records with names in other alphabets.
_HEADERS: dict[tuple[int, int], Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

Size = tuple[int, int] | None


class Raw(NamedTuple):
    """Images and labels as they were read.

    Attributes:
        splits: Images and labels by `"train"`, `"val"`, `"test"`; only the first is always there.
        class_names: The names of the classes; empty if they have none.
    """

    splits: dict[str, tuple[Any, Any]]
    class_names: tuple[str, ...]


def is_own(name: Any) -> bool:
    """Whether the name of a data set is an .npz file, a folder or a set of tfds."""
    # Unlike `Path.is_dir`, this accepts names that no file can have, and takes "" for no folder.
    return isinstance(name, str) and (
        name.startswith(TFDS) or name.endswith(".npz") or "/" in name or os.path.isdir(name)
    )


def read(name: str, data_dir: str | Path | None, image_size: Size) -> Raw:
    """Reads a data set.

    Args:
        name: `FILE.npz`, a folder or `tfds:NAME`.
        data_dir: The folder in which tensorflow-datasets keeps its data; None for its default.
        image_size: `(H, W)` that images are resized to; None if they are of one size.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If it cannot be read, or is not a data set; the message says what to do.
    """
    if name.startswith(TFDS):
        return _tfds(name, data_dir, image_size)
    path = Path(name).expanduser()
    if name.endswith(".npz"):
        if image_size is not None:
            raise ValueError(
                f"{name}: the images of an .npz file have one size; --image-size is for folders "
                "and tfds. Leave it out"
            )
        return _npz(path)
    if not path.is_dir():
        if path.exists():
            raise ValueError(
                f"{name}: a data set must be an .npz file, a folder or tfds:NAME. Received: a file "
                f"of another kind. Write one with {_EXAMPLE}"
            )
        raise FileNotFoundError(f"There is no data set at {name}.")
    return _folders(path, image_size)


def _npz(path: Path) -> Raw:
    if not path.exists():
        raise FileNotFoundError(f"There is no data set at {path}.")
    if not path.is_file():
        raise ValueError(f"{path}: it must be a file. Received: a folder")
    arrays: dict[str, np.ndarray] = {}
    try:
        # Object arrays are pickles, which run code when they are read. A single array is not read.
        opened = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise ValueError(f"it holds a single array. Write it with {_EXAMPLE}")
        with opened as file, zipfile.ZipFile(path) as archive:
            _check_keys(file.files)
            archives.check_names(archive)
            _check_sizes(archive)
            for key in file.files:
                try:
                    arrays[key] = file[key]
                except ValueError as error:
                    if "allow_pickle" not in str(error):
                        raise
                    raise ValueError(
                        f"{key} is an array of Python objects, which is never unpickled. Give all "
                        "images one size, and save numbers"
                    ) from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}. Write it again") from error
    except EOFError as error:
        raise ValueError(f"{path} is empty. Write it with {_EXAMPLE}") from error
    except ValueError as error:
        reason = str(error)
        if "allow_pickle" in reason:  # NumPy takes a file that is not its own for a pickle.
            reason = f"it is no .npz file. Write it with {_EXAMPLE}"
        raise ValueError(f"{path}: {reason}") from error
    names = arrays.pop("class_names", np.array([], str))
    if names.dtype.kind not in "US" or names.ndim != 1:
        if names.size:
            raise ValueError(
                f"{path}: class_names must be a list of strings. Received: dtype {names.dtype}, "
                f"shape {names.shape}"
            )
        names = names.astype(str)
    splits = {
        name: (arrays[f"x_{name}"], arrays[f"y_{name}"]) for name in SPLITS if f"x_{name}" in arrays
    }
    return Raw(splits, tuple(names.astype(str).tolist()))


def _check_keys(keys: Sequence[str]) -> None:
    unknown = sorted(set(keys) - set(_KEYS))
    if unknown:
        raise ValueError(f"its keys must be out of {_KEYS}. Received: {unknown}")
    for name in SPLITS:
        pair = {f"x_{name}", f"y_{name}"}
        missing = sorted(pair - set(keys))
        if len(missing) == 1 or (missing and name == "train"):
            raise ValueError(
                f"it must have {' and '.join(sorted(pair))}. Received: {sorted(keys)}, without "
                f"{' and '.join(missing)}. Write it with {_EXAMPLE}"
            )


def _check_sizes(archive: zipfile.ZipFile) -> None:
    """Refuses arrays for which there is no memory, before any is unpacked.

    NumPy reads of a part what its header says, so that the headers tell how much that is. Images
    that are almost all alike take up next to nothing in a file, and are allowed.
    """
    needed = 0
    for part in archive.infolist():
        with archive.open(part) as file:
            version = np.lib.format.read_magic(file)
            if version not in _HEADERS:
                raise ValueError(f"{part.filename} must be an array of numbers. Save it again")
            shape, _, dtype = _HEADERS[version](file)
        count = math.prod(shape)
        copied = 4 if part.filename.startswith("x_") else 0  # Bytes of float32.
        needed += count * (dtype.itemsize + copied)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"its arrays must fit into the memory of this machine, {memory} bytes. Received: "
            f"{needed} bytes, by their headers, with the copy in float32 that is made of images"
        )


def _folders(root: Path, image_size: Size) -> Raw:
    inside = {path.name for path in _entries(root)}
    if "train" in inside or "test" in inside:
        if "train" not in inside:
            raise ValueError(f"{root}: beside test/ there must be train/. Received: none")
        other = sorted(inside - set(SPLITS))
        if other:
            raise ValueError(
                f"{root}: beside train/ there may be test/ and val/. Received: {other[:5]} too"
            )
        places = {name: root / name for name in SPLITS if name in inside}
    else:
        places = {"train": root}
    names = tuple(path.name for path in _entries(places["train"]) if path.is_dir())
    if not names:
        raise ValueError(
            f"{places['train']}: it must have a folder of images for each class. Received: no "
            "folder"
        )
    labelled = {}
    for split, place in places.items():
        labelled[split] = _files(place, names)
    everything = [file for pairs in labelled.values() for file, _ in pairs]
    images = _same_form(
        root, [_decoded(file) for file in everything], [str(f) for f in everything], image_size
    )
    splits, start = {}, 0
    for split, pairs in labelled.items():
        labels = np.array([label for _, label in pairs], "int64")
        splits[split] = (images[start : start + len(pairs)], labels)
        start += len(pairs)
    return Raw(splits, names)


def _entries(folder: Path) -> list[Path]:
    """The entries of a folder by name, without hidden ones; none may be a link."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in entries:
        if path.is_symlink():
            raise ValueError(
                f"{path}: a data set must lie in its folder. Received: a symbolic link. Put the "
                "file or folder itself there, with cp -rL for example"
            )
    return entries


def _files(place: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    """The images of a split, with their labels."""
    if not place.is_dir():
        raise ValueError(
            f"{place}: it must be a folder with a folder for each class. Received: a file"
        )
    found = []
    for path in _entries(place):
        if not path.is_dir():
            raise ValueError(
                f"{place}: images must lie in the folder of their class. Received: {path.name} "
                "beside the folders"
            )
        if path.name not in names:
            raise ValueError(
                f"{place}: its classes must be those of the training images. Received: "
                f"{path.name} too"
            )
        files = _entries(path)
        for file in files:
            if file.suffix.lower() not in IMAGES or not file.is_file():
                raise ValueError(
                    f"{path}: it must hold images alone ({', '.join(IMAGES)}). Received: "
                    f"{file.name}"
                )
        if not files:
            raise ValueError(f"{path}: there must be images in it. Received: none")
        found += [(file, names.index(path.name)) for file in files]
    return found


def _decoded(file: Path) -> np.ndarray:
    try:
        content = reading.read_bytes(file, reading.PICTURE)
        image = tf.io.decode_image(content, expand_animations=False).numpy()
    except (OSError, tf.errors.OpError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} cannot be read as an image: {reason}") from error
    return image


def _same_form(
    where: Any, images: Sequence[np.ndarray], names: Sequence[str], image_size: Size
) -> np.ndarray:
    """Images as one array: of one size, and in colour if one of them is."""
    for image, name in zip(images, names, strict=True):
        if image.ndim != 3 or image.shape[-1] not in (1, 3):
            raise ValueError(
                f"{name}: an image must be grey or RGB. Received: shape {image.shape}. Save it "
                "without transparency"
            )
    if image_size is None:
        sizes = {image.shape[:2]: name for image, name in zip(images, names, strict=True)}
        if len(sizes) > 1:
            (a, first), (b, second) = list(sizes.items())[:2]
            raise ValueError(
                f"{where}: images must be of one size. Received: {a[0]}x{a[1]} ({first}), "
                f"{b[0]}x{b[1]} ({second}). Give --image-size H W"
            )
    colours = max(image.shape[-1] for image in images)
    images = [np.repeat(i, colours, axis=-1) if i.shape[-1] < colours else i for i in images]
    if image_size is not None and any(image.shape[:2] != image_size for image in images):
        # As floats in [0, 1], which are not rounded again.
        images = [_resized(image, image_size) for image in images]
    return np.stack(images)


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    scaled = image.astype("float32") / np.float32(255)
    return np.clip(tf.image.resize(scaled, size, antialias=True).numpy(), 0, 1)


def _tfds(name: str, data_dir: str | Path | None, image_size: Size) -> Raw:
    own = name.removeprefix(TFDS)
    # The library also accepts a namespace of code on the internet, which is refused here.
    if not re.fullmatch(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?", own):
        raise ValueError(
            "A data set of tensorflow-datasets must be named tfds:NAME or tfds:NAME/CONFIG. "
            f"Received: {name!r}"
        )
    with optional_packages.importing("experiments", f"The data set {name}"):
        import tensorflow_datasets as tfds
    try:
        builder = tfds.builder(own, data_dir=data_dir)
    except Exception as error:  # Of many kinds.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"tensorflow-datasets has no data set {own!r}: {reason}") from error
    if not builder.info.supervised_keys or [*builder.info.supervised_keys] != ["image", "label"]:
        raise ValueError(
            f"{name}: it must be one of images and their classes. Received: one of "
            f"{sorted(builder.info.features or [])}"
        )
    _prepare(name, builder)
    known = {"train": "train", "validation": "val", "test": "test"}
    stored = {mine: split for split, mine in known.items() if split in builder.info.splits}
    if "train" not in stored:
        raise ValueError(
            f"{name}: it must have a train split. Received: {sorted(builder.info.splits)}"
        )
    images: list[np.ndarray] = []
    labels = {}
    for mine, split in stored.items():
        try:
            pairs = list(tfds.as_numpy(builder.as_dataset(split=split, as_supervised=True)))
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{name}, split {split}, cannot be read: {reason}") from error
        images += [image for image, _ in pairs]
        labels[mine] = np.array([label for _, label in pairs], "int64")
    numbered = [f"image {number} of {name}" for number in range(len(images))]
    array = _same_form(name, images, numbered, image_size)
    splits, start = {}, 0
    for mine, of_split in labels.items():
        splits[mine] = (array[start : start + len(of_split)], of_split)
        start += len(of_split)
    return Raw(splits, tuple(builder.info.features["label"].names))


def _prepare(name: str, builder: Any) -> None:
    if builder.is_prepared():
        return
    try:
        hosts.ask("https://storage.googleapis.com/")
        builder.download_and_prepare()
    except Exception as error:
        raise FileNotFoundError(
            f"{name} is not in {builder.data_dir} and cannot be downloaded: {error}. Run this "
            "where there is a network, or give --data-dir where it was prepared."
        ) from error
