"""Checks of your own images and labels; each fault is reported in one sentence."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfjacreg.datasets import Split

_LARGEST = 1 << 31  # Numbers in an array.


def split(where: str, x: Any, y: Any) -> Split:
    """Checks the images and labels of a split, and brings them into one form.

    Args:
        where: The name of the two in messages, such as `"mine.npz: x_train"`.
        x: Images, `[N, H, W]` or `[N, H, W, C]`: uint8, or floats in [0, 1].
        y: Labels: integers `[N]` or `[N, 1]`, or one-hot rows `[N, K]`.

    Returns:
        Pixels in [0, 1], float32 `[N, H, W, C]`, and labels, int32 `[N]`.

    Raises:
        ValueError: If anything is wrong with them; the message says what to do.
    """
    images = pixels(where, np.asarray(x))
    labels = _labels(where, np.asarray(y), len(images))
    return Split(images, labels)


def pixels(where: str, x: np.ndarray) -> np.ndarray:
    """Checks the images of a split and returns them as `split` does."""
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4:
        raise ValueError(
            f"{where}: images must be an array [N, H, W] or [N, H, W, C]. Received: shape {x.shape}"
        )
    if not x.size:
        raise ValueError(f"{where}: there must be images. Received: shape {x.shape}")
    if x.shape[1] in (1, 3) and x.shape[3] not in (1, 3, 4):
        raise ValueError(
            f"{where}: channels must be the last axis, [N, H, W, C]. Received: shape {x.shape}. "
            "Turn the axes: x.transpose(0, 2, 3, 1)"
        )
    if x.size >= _LARGEST:
        raise ValueError(
            f"{where}: it must have fewer than 2**31 numbers. Received: shape {x.shape}. Make the "
            "images smaller"
        )
    if x.dtype == np.uint8:
        if x.max() <= 1:
            raise ValueError(
                f"{where}: uint8 pixels must reach up to 255. Received: none above {x.max()}. If "
                "they are in 0..1 already, save them as floats: x.astype('float32')"
            )
        return x.astype("float32") / np.float32(255)
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f"{where}: pixels must be uint8, or floats in [0, 1]. Received: dtype {x.dtype}. If "
            "they are in 0..255, save x.astype('uint8')"
        )
    bad = np.count_nonzero(~np.isfinite(x))
    if bad:
        raise ValueError(
            f"{where}: every pixel must be a finite number. Received: {bad} that are NaN or "
            "infinite"
        )
    low, high = x.min(), x.max()
    if low < 0 or high > 1:
        way_out = "Map them into [0, 1]"
        if low < 0:
            way_out = "They look standardized: save them as they were before; training does that"
        elif high <= 255:
            way_out = "Divide them by 255, or save x.astype('uint8')"
        raise ValueError(
            f"{where}: float pixels must lie in [0, 1]. Received: from {low:g} to {high:g}. "
            f"{way_out}"
        )
    if high <= 1.5 / 255:
        raise ValueError(
            f"{where}: float pixels must fill [0, 1]. Received: none above {high:g}. They look "
            "divided by 255 twice"
        )
    return x.astype("float32")


def _labels(where: str, y: np.ndarray, count: int) -> np.ndarray:
    where = f"{where}, labels"
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape[:1] != (count,) or y.ndim > 2:
        raise ValueError(
            f"{where}: there must be one per image, {count}. Received: shape {y.shape}"
        )
    if y.dtype.kind not in "iufb":
        raise ValueError(
            f"{where}: they must be integers. Received: dtype {y.dtype}. Number the classes, and "
            "give their names as class_names: names, y = numpy.unique(y, return_inverse=True)"
        )
    if y.ndim == 2:
        if not (np.isin(y, (0, 1)).all() and (y.sum(axis=1) == 1).all()):
            raise ValueError(
                f"{where}: rows must be one-hot, a 1 and else 0. Received: shape {y.shape}, "
                f"first row {y[0].tolist()[:10]}"
            )
        return y.argmax(axis=1).astype("int32")
    if y.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: they must be integers. Received: dtype {y.dtype}. Save y.astype('int64'), "
            "if they are whole"
        )
    if y.min() < 0:
        raise ValueError(f"{where}: they must count from 0. Received: {y.min()} among them")
    if y.max() >= 2**31:
        raise ValueError(f"{where}: they must count from 0. Received: {y.max()} among them")
    return y.astype("int32")


def classes(where: str, train: Split, others: dict[str, Split], names: tuple[str, ...]) -> int:
    """Checks that the splits have the same classes, 0 to K - 1; returns K.

    Args:
        where: The name of the data set in messages.
        train: The training images.
        others: The other splits, by name.
        names: The names of the classes; empty if they have none.

    Raises:
        ValueError: If a class is missing, or there is only one.
    """
    found = np.unique(train.y)
    if len(found) == 1:
        raise ValueError(
            f"{where}: training images must be of at least two classes. Received: class {found[0]} "
            "alone"
        )
    count = int(found[-1]) + 1
    if found[0] == 1 and len(found) == count - 1:
        raise ValueError(
            f"{where}: labels must count from 0. Received: {found[0]} to {found[-1]}. Save y - 1"
        )
    if len(found) < count:
        missing = np.setdiff1d(np.arange(min(count, len(found) + 10)), found)[:5].tolist()
        raise ValueError(
            f"{where}: every label from 0 to {count - 1} must have training images. Received: none "
            f"of {missing}. Number the classes anew: "
            "y = numpy.unique(y, return_inverse=True)[1]"
        )
    for name, other in others.items():
        if other.y.max() >= count:
            raise ValueError(
                f"{where}: labels of the {name} split must be among those of the training images, "
                f"0 to {count - 1}. Received: {other.y.max()}"
            )
    if names and len(names) != count:
        raise ValueError(
            f"{where}: class_names must name each of the {count} classes. Received: {len(names)}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: class_names must differ. Received: {list(names)[:20]}")
    return count


def shapes(where: str, splits: dict[str, Split]) -> None:
    """Checks that all images have one shape; raises ValueError."""
    found = {name: split.x.shape[1:] for name, split in splits.items()}
    if len(set(found.values())) > 1:
        raise ValueError(f"{where}: all images must have one shape [H, W, C]. Received: {found}")


def channels(where: str, train: Split) -> None:
    """Checks that each channel can be standardized; raises ValueError."""
    flat = train.x.reshape(-1, train.x.shape[-1])
    constant = np.flatnonzero(flat.min(axis=0) == flat.max(axis=0)).tolist()
    if constant:
        raise ValueError(
            f"{where}: every channel must vary over the training images. Received: channel "
            f"{constant[0]} that is {flat[0, constant[0]]:g} everywhere. Leave it out"
        )
