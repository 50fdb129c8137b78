"""The data of a run: standardized splits, and batches in a fixed order."""

from __future__ import annotations

import dataclasses
import math

import keras
import numpy as np
import tensorflow as tf

from tfjacreg import datasets
from tfjacreg.datasets import Split
from tfjacreg.experiments import data_sources
from tfjacreg.experiments.config import RunConfig, RunError


@dataclasses.dataclass(frozen=True)
class Data:
    """The standardized splits of a run.

    Attributes:
        normalization: From pixels in [0, 1] to the input of the network.
        train: The training split.
        validation: Held out of the official training set; None if the whole set is trained on.
        test: The official test set.
        num_classes: The number of classes.
        class_names: Their names; empty if they have none.
        digest: The digest of your own data set; None for one in `datasets.NAMES`.
    """

    normalization: keras.layers.Normalization
    train: Split
    validation: Split | None
    test: Split
    num_classes: int
    class_names: tuple[str, ...]
    digest: str | None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of an example."""
        return self.train.x.shape[1:]

    def steps_per_epoch(self, batch_size: int) -> int:
        """The number of batches in the training split; the last one may be smaller."""
        return math.ceil(len(self.train.x) / batch_size)


def load(config: RunConfig) -> Data:
    """Loads and standardizes the data set of a run.

    Args:
        config: The settings.

    Raises:
        RunError: If the data is missing, has fewer training images than a batch or a pixel that is
            not a finite number, or something else is wrong with your own data set.
    """
    try:
        data = data_sources.load(config.dataset, config.data_dir, config.image_size)
    except (OSError, ValueError) as error:
        raise RunError(str(error)) from error
    if len(data.train.x) < config.batch_size and config.dataset not in datasets.NAMES:
        raise RunError(
            f"{config.dataset}: there must be at least a batch of training images, "
            f"{config.batch_size}. Received: {len(data.train.x)}. Give a smaller --batch-size, or "
            "more images."
        )
    splits: dict[str, Split] = {name: getattr(data, name) for name in ("train", "validation")}
    splits["test"] = data.test
    for name, split in splits.items():
        bad = np.count_nonzero(~np.isfinite(split.x))
        if bad:
            raise RunError(
                f"Every pixel must be a finite number. Received: {bad} that are not in the {name} "
                f"split of {config.dataset!r}. Prepare the data set again from its original files."
            )
    mean, std = data.mean, data.std
    if config.whole_training_set:
        parts = splits["train"], splits.pop("validation")
        splits["train"] = Split(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        mean, std = splits["train"].statistics()
    normalization = keras.layers.Normalization(mean=mean, variance=np.square(std))
    standardized = {
        name: Split(_standardized(normalization, x), y) for name, (x, y) in splits.items()
    }
    return Data(
        normalization=normalization,
        train=standardized["train"],
        validation=standardized.get("validation"),
        test=standardized["test"],
        num_classes=data.num_classes,
        class_names=data.class_names,
        digest=data_sources.digest(data),
    )


def _standardized(normalization: keras.layers.Normalization, x: np.ndarray) -> np.ndarray:
    with tf.device("CPU"):
        return keras.ops.convert_to_numpy(normalization(x))


def training_batches(
    x: np.ndarray, y: np.ndarray, batch_size: int, seed: int, epoch: tf.Variable, augment: bool
) -> tf.data.Dataset:
    """One pass over the examples, in an order that depends only on `seed` and `epoch`'s value.

    So a run that continues sees the same batches that it would have seen without the interruption.
    Whole batches are gathered from memory at once: slicing single examples takes longer than a step
    of a small network.

    Args:
        x: Standardized inputs, `[N, H, W, C]`.
        y: Labels, `[N]`.
        batch_size: Examples in a batch; the last one may be smaller.
        seed: Seed of the order and of the augmentation.
        epoch: The number of the epoch; read at the start of each pass.
        augment: Whether to crop and flip at random.
    """
    images, labels = tf.constant(x), tf.constant(y)
    whole, remaining = divmod(len(x), batch_size)
    steps = whole + (remaining > 0)

    def order(_: tf.Tensor) -> tf.data.Dataset:
        shuffled = tf.random.experimental.stateless_shuffle(
            tf.range(len(x)), seed=tf.stack([tf.cast(seed, tf.int64), epoch])
        )
        rows = tf.reshape(shuffled[: whole * batch_size], (whole, batch_size))
        indices = tf.data.Dataset.from_tensor_slices(rows)
        if remaining:
            indices = indices.concatenate(tf.data.Dataset.from_tensors(shuffled[-remaining:]))
        return indices

    def batch(number: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        chosen = tf.gather(images, index)
        if augment:
            key = tf.stack([tf.cast(seed, tf.int64), steps * epoch + number])
            chosen = _cropped_and_flipped(chosen, key)
        return chosen, tf.gather(labels, index)

    # One thread is enough to gather, and does not compete with the steps.
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.autotune.enabled = False
    batches = tf.data.Dataset.from_tensors(0).flat_map(order).enumerate().map(batch).prefetch(8)
    batches = batches.apply(tf.data.experimental.assert_cardinality(steps))
    return batches.with_options(options)


def _cropped_and_flipped(x: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Appendix A.2: a random crop after 4 pixels of padding, and a flip half of the time."""
    pad, (size, height, width) = 4, (tf.shape(x)[0], x.shape[1], x.shape[2])
    draws = tf.random.stateless_uniform([3, size], key)
    padded = tf.pad(x, [[0, 0], [pad, pad], [pad, pad], [0, 0]])
    top, left = tf.unstack(tf.cast(draws[:2] * (2 * pad + 1), tf.int32))
    rows = top[:, None] + tf.range(height)
    columns = left[:, None] + tf.range(width)
    columns = tf.where(draws[2][:, None] < 0.5, columns, columns[:, ::-1])
    return tf.gather(tf.gather(padded, rows, batch_dims=1), columns, axis=2, batch_dims=1)
