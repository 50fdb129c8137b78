"""What the authors of the data sets publish: the number of images of each class, and checksums.

The files of `fashion_mnist`, `kmnist` and others have the same names, so they are easily mixed up.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from tfjacreg import dataset_files
from tfjacreg.dataset_files import NUM_CLASSES

# Every class has the same number of images in each of these sets.
COUNTS = {
    "fashion_mnist": {"train": 60_000, "test": 10_000},
    "kmnist": {"train": 60_000, "test": 10_000},
    "cifar10": {"train": 50_000, "test": 10_000},
}
# SHA-256 of the decompressed files. Debian compresses the files of this set again, so their own
# checksums differ from the authors'; for the other sets only the authors' checksums are known.
_CONTENTS = {
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888": "fashion_mnist",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9": "fashion_mnist",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b": "fashion_mnist",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34": "fashion_mnist",
}


def check(name: str, source: Path, labels: dict[str, np.ndarray], tfds: Any) -> None:
    """Refuses files that do not belong to a data set.

    Args:
        name: `fashion_mnist`, `kmnist` or `cifar10`.
        source: The folder of the original files.
        labels: The labels that were read from them, `[N]`, by split.
        tfds: The module tensorflow_datasets, which has the published checksums.

    Raises:
        ValueError: If a file belongs to another data set or differs from the published one, or a
            class does not have the published number of images; the message names the file or the
            folder.
    """
    owners = {
        info.checksum: owner
        for owner in (*COUNTS, "mnist")
        for info in tfds.builder_cls(owner).url_infos.values()
    }
    for path in dataset_files.paths(name, source):
        with path.open("rb") as file:
            owner = owners.get(hashlib.file_digest(file, "sha256").hexdigest())
        if owner is None and name != "cifar10":
            content = dataset_files.content_of(path)
            owner = _CONTENTS.get(hashlib.sha256(content).hexdigest())
        if owner not in (None, name):
            raise ValueError(
                f"{path}: expected a file of {name}. Received: one of {owner}, by its checksum. "
                "Keep their files in folders of their own."
            )
        if owner is None and name in _CONTENTS.values():
            raise ValueError(
                f"{path}: expected a file of {name}. Received: one with another checksum than the "
                "published one. Get the file again."
            )
    for split, count in COUNTS[name].items():
        counts = np.bincount(labels[split], minlength=NUM_CLASSES).tolist()
        if set(counts) != {count // NUM_CLASSES}:
            raise ValueError(
                f"{source}: expected the {split} split of {name}, {count // NUM_CLASSES} images of "
                f"each class. Received: {counts}. These are not the files of {name}."
            )
