"""What the attacks and the robustness measures share: a checked classifier and its examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from tfjacreg import network_ends

Array = npt.NDArray[np.floating]
Progress = Callable[[int], object]

# Products of few rows take another code path than products of many rows and round differently; the
# sign of a gradient that is nearly zero then changes. With batches filled up to a multiple of this
# many rows LeNet, ResNet-20 and VGG16 gave equal images on a CPU; 8 was too few for VGG16.
_ROW_MULTIPLE = 16
_PROBE_SIZE = 64


class CheckedClassifier(NamedTuple):
    """A classifier that passed the checks, with its examples.

    Attributes:
        x: Pixels in [0, 1], float32 `[N, *in]`.
        y: Labels, int32 `[N]`.
        logits: Traceable map from pixels `[B, *in]` to float32 logits `[B, K]`.
    """

    x: Array
    y: npt.NDArray[np.int32]
    logits: Callable[[tf.Tensor], tf.Tensor]


def check_classifier(
    classifier: keras.Model,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    loss: Callable[..., tf.Tensor] | None = None,
) -> CheckedClassifier:
    """Refuses classifiers and examples that would make a judgement meaningless, as AutoAttack does.

    Warns if the classifier scales its pixels down itself, as one for pixels in 0..255 does.

    Args:
        classifier: Keras model from pixels `[B, *in]` to logits `[B, K]`.
        x: Pixels in [0, 1], floating point, `[N, *in]`.
        y: Integer labels `[N]` or `[N, 1]`.
        loss: `loss(labels=, logits=)` `[B]` that must be differentiable; a warning is given if its
            gradient is zero. None if no gradient is needed.

    Returns:
        The classifier's logits function and the examples as float32 and int32 arrays.

    Raises:
        TypeError: If the classifier is not a Keras model or does not return one floating tensor,
            the pixels are not floating point or the labels are not integers.
        ValueError: If shapes disagree, the set is empty, pixels lie outside [0, 1], a label is not
            a class, the outputs are probabilities, random, not finite or not `[B, K]`, or the loss
            is not differentiable.
    """
    if not isinstance(classifier, keras.Model):
        raise TypeError(f"classifier must be a keras.Model. Received: {type(classifier).__name__}.")
    pixels, labels = _check_examples(classifier, _as_array("x", x), _as_array("y", y))
    scaled = network_ends.shrinking_start(classifier, None)
    if scaled is not None:
        layer, factor = scaled
        warnings.warn(
            f"The classifier scales its pixels by {factor:.2g} itself, by {layer}: it was made for "
            "pixels in 0..255, say, and sees hardly anything of pixels in [0, 1]. Give the attacks "
            "a classifier of pixels in [0, 1], such as keras.Sequential([keras.layers.Rescaling("
            "255), classifier]).",
            stacklevel=3,
        )

    def logits(images: tf.Tensor) -> tf.Tensor:
        outputs = classifier(images, training=False)
        if not isinstance(outputs, tf.Tensor) or not outputs.dtype.is_floating:
            raise TypeError(
                "The classifier must give one floating tensor of logits. Received: "
                f"{getattr(outputs, 'dtype', type(outputs).__name__)}."
            )
        return tf.cast(outputs, tf.float32)

    classes = _check_outputs(logits, pixels[:_PROBE_SIZE])
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"y must hold labels from 0 to {classes - 1}, one per output of the classifier. "
            f"Received: labels from {labels.min()} to {labels.max()}."
        )
    labels32 = labels.astype(np.int32)  # After the check: a large label would wrap around.
    if loss is not None:
        _check_gradients(logits, loss, pixels[:_PROBE_SIZE], labels32[:_PROBE_SIZE])
    return CheckedClassifier(pixels, labels32, logits)


def _as_array(name: str, value: npt.ArrayLike) -> npt.NDArray:
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be an array, of one length along each axis. Received: {error}."
        ) from error


def _check_examples(
    classifier: keras.Model, x: npt.NDArray, y: npt.NDArray
) -> tuple[Array, npt.NDArray[np.integer]]:
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(
            f"x must hold floating point pixels in [0, 1]. Received: dtype {x.dtype}. "
            "Divide 8-bit pixels by 255."
        )
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"x must be a non-empty array [N, *in]. Received: shape {x.shape}.")
    expected = getattr(classifier, "input_shape", (None, *x.shape[1:]))
    if len(expected) != x.ndim or any(
        want is not None and want != got
        for want, got in zip(expected[1:], x.shape[1:], strict=True)
    ):
        raise ValueError(
            f"x must have the classifier's input shape {tuple(expected)}. Received: {x.shape}."
        )
    if not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(
            f"x must hold pixels in [0, 1]. Received: values from {x.min()} to {x.max()}. "
            "Standardisation belongs into the classifier, as its first layer."
        )
    if not np.issubdtype(y.dtype, np.integer):
        raise TypeError(f"y must hold integer labels. Received: dtype {y.dtype}.")
    if y.shape == (len(x), 1):  # A column, as in keras.datasets.cifar10.
        y = y[:, 0]
    if y.shape != x.shape[:1]:
        advice = " Turn one-hot rows into labels with y.argmax(axis=1)."
        raise ValueError(
            f"y must be one label per image, shape {x.shape[:1]}. Received: {y.shape}."
            f"{advice if y.ndim == 2 and len(y) == len(x) else ''}"
        )
    return x.astype(np.float32), y


def _check_outputs(logits: Callable[[tf.Tensor], tf.Tensor], x: Array) -> int:
    first, second = (logits(tf.constant(x)).numpy() for _ in range(2))
    if first.ndim != 2 or first.shape[1] < 2:
        raise ValueError(
            f"The classifier must give logits [B, K] with K >= 2. Received: shape {first.shape}. "
            "A single logit z becomes two as [0, z]."
        )
    finite(first, "logits")
    if not np.allclose(first, second, rtol=1e-4, atol=1e-5):
        raise ValueError(
            "The classifier must give the same logits for the same images. Received: outputs that "
            f"differ by up to {np.abs(first - second).max():.2g} between two calls. "
            "Remove the layer that is random at inference."
        )
    if first.min() >= 0 and first.max() <= 1 and np.allclose(first.sum(axis=1), 1, atol=1e-3):
        raise ValueError(
            "The classifier must give logits. Received: what looks like probabilities (in [0, 1], "
            f"each row with sum 1, e.g. {np.round(first[0], 3).tolist()}). "
            "Remove the softmax at its end: it hides the gradient and weakens the attacks."
        )
    return first.shape[1]


def _check_gradients(
    logits: Callable[[tf.Tensor], tf.Tensor],
    loss: Callable[..., tf.Tensor],
    x: Array,
    y: npt.NDArray[np.int32],
) -> None:
    images = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(images)
        value = loss(labels=tf.constant(y), logits=logits(images))
    gradient = tape.gradient(value, images)
    if gradient is None:
        raise ValueError(
            "The classifier must be differentiable. Received: one whose loss has no gradient with "
            "respect to the pixels. Use `square`, which needs none."
        )
    dead = int((gradient.numpy().reshape(len(x), -1) == 0).all(axis=1).sum())
    if dead:
        warnings.warn(
            f"The loss of {dead} of the first {len(x)} images has zero gradient: attacks that "
            "follow the gradient cannot move them and overstate the robustness. "
            "Compare with the margin as loss, which does not fade where logits are large, or with "
            "`square`, which needs no gradient.",
            stacklevel=4,
        )


def image_rng(seed: int, stream: int, *keys: int) -> np.random.Generator:
    """Returns the random generator of one image (and block), the same whatever its batch.

    Args:
        seed: The caller's seed, an integer >= 0.
        stream: A number that separates the uses of the same seed.
        *keys: The image's index, and the block of draws if there are several.
    """
    return np.random.default_rng([seed, stream, *keys])


def batches(count: int, batch_size: int) -> Iterator[slice]:
    """Yields the slices that cover `count` rows in order, `batch_size` at a time."""
    return (slice(i, min(i + batch_size, count)) for i in range(0, count, batch_size))


def pad_rows(rows: npt.NDArray) -> tf.Tensor:
    """Repeats the last row until the number of rows is a multiple of `_ROW_MULTIPLE`."""
    missing = -len(rows) % _ROW_MULTIPLE
    return tf.constant(np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]))


def concrete_function(
    function: Callable[..., Any], *examples: npt.NDArray | tf.TensorSpec
) -> Callable[..., Any]:
    """Traces `function` once, for arguments like the `examples` with any number of rows.

    A concrete function keeps no cache outside itself: it is freed, with the weights of the
    classifier, as soon as the caller drops it.
    """
    specs = [
        e
        if isinstance(e, tf.TensorSpec)
        else tf.TensorSpec([None, *e.shape[1:]] if e.ndim else [], e.dtype)
        for e in examples
    ]
    return tf.function(function).get_concrete_function(*specs)


def predict(checked: CheckedClassifier, x: Array | None = None, *, batch_size: int = 256) -> Array:
    """Returns the logits `[N, K]` of `x`, by default of the images that were checked.

    Raises:
        ValueError: If a logit is NaN or infinite.
    """
    images = checked.x if x is None else x
    logits = concrete_function(checked.logits, images)
    return np.concatenate(
        [
            finite(logits(pad_rows(images[s])).numpy()[: s.stop - s.start], "logits")
            for s in batches(len(images), batch_size)
        ]
    )


def finite(rows: Array, what: str) -> Array:
    """Returns `rows` of one image each; raises ValueError if one is NaN or infinite."""
    require_finite(np.asarray(np.isfinite(rows).reshape(len(rows), -1).all(axis=1)), what)
    return rows


def require_finite(is_finite: npt.NDArray[np.bool_], what: str) -> None:
    """Raises ValueError unless all that the classifier gave for each image, `[B]`, is finite."""
    bad = int((~is_finite).sum())
    if bad:
        raise ValueError(
            f"The classifier must give finite {what}. Received: NaN or infinity for "
            f"{bad} of {len(is_finite)} images."
        )


def other_logits(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Returns the logits `[B, K]` with minus infinity in place of the label's logit."""
    own = tf.one_hot(labels, logits.shape[1], dtype=tf.bool, on_value=True, off_value=False)
    return tf.where(own, -np.inf, logits)


def logit_margin(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Returns the logit of the label minus the largest other, `[B]`, from logits `[B, K]`."""
    largest_other = tf.reduce_max(other_logits(labels, logits), axis=1)
    return tf.gather(logits, labels, batch_dims=1) - largest_other


def logit_spread(logits: tf.Tensor) -> tf.Tensor:
    """Returns the largest logit minus the third largest (of two: the second), `[B]`.

    The result is held constant in gradients, and 1 where the two are equal.
    """
    largest = tf.math.top_k(logits, min(3, logits.shape[1])).values
    spread = tf.stop_gradient(largest[:, 0] - largest[:, -1])
    return tf.where(spread > 0, spread, 1.0)


def scaled_margin(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Returns the margin divided by the spread, `[B]`, which scaling the logits does not change."""
    return logit_margin(labels, logits) / logit_spread(logits)
