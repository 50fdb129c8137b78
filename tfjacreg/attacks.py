"""Attacks in the L-infinity ball on a classifier from pixels in [0, 1] to logits.

PGD and TPGD take their gradient and step from cleverhans. The loop, the projection and the random
numbers are implemented here, so that one run gives the accuracy at several step counts, no image
leaves the ball, and each image has its own random numbers, whatever the batch size. Square is
implemented in `judging.square_attack`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from tfjacreg import arguments, optional_packages
from tfjacreg.judging import square_attack
from tfjacreg.judging.classifiers import (
    Array,
    CheckedClassifier,
    Progress,
    batches,
    check_classifier,
    concrete_function,
    finite,
    image_rng,
    pad_rows,
    predict,
    scaled_margin,
)

EPS = 32 / 255
STEP_SIZE = 2 / 255

_PGD_START, _TPGD_START = 0, 1
_TPGD_NOISE = 0.001
# A smaller float32 is zero or denormal; TensorFlow's kernels round denormal numbers to zero.
_SMALLEST = np.finfo(np.float32).tiny


class AttackResult(NamedTuple):
    """Outcome of one attack, recorded at rising strengths.

    Attributes:
        x_adv: Images after the last iteration, float32 `[N, *in]`.
        iterations: Strengths (numbers of iterations) at which the run was recorded, `[S]`, rising.
        correct: Whether each image was still classified correctly there, bool `[S, N]`.
        faded: Whether each image was still classified correctly there although the attack had lost
            its gradient, bool `[S, N]`. Either the loss had rounded to 0, and with it the part of
            its gradient that lowers the label's logit; or the last gradient was zero or denormal in
            every pixel. All False for Square, which uses no gradient.
    """

    x_adv: Array
    iterations: npt.NDArray[np.int64]
    correct: npt.NDArray[np.bool_]
    faded: npt.NDArray[np.bool_]

    @property
    def accuracy(self) -> npt.NDArray[np.float64]:
        """Share of images classified correctly at each strength, `[S]`."""
        return self.correct.mean(axis=1)


def pgd(
    classifier: keras.Model,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    eps: float = EPS,
    step_size: float = STEP_SIZE,
    iterations: int | Sequence[int] = 32,
    loss: str = "cross_entropy",
    seed: int = 0,
    random_start: bool = True,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> AttackResult:
    """Projected gradient descent on a loss of the label (eq. (10)).

    `loss="cross_entropy"` is the paper's. Where the logits are large its gradient rounds to zero,
    and the attack overstates the robustness: see `AttackResult.faded`. `loss="margin"` does not
    depend on the scale of the logits: it is (largest other logit - logit of the label) divided by
    (largest - third largest logit), like AutoAttack's DLR loss. With two classes the divisor is
    (largest - smallest logit), or 1 if these are equal. The gradient treats the divisor as a
    constant: otherwise an image would stay where its label has fallen to the third place.

    Args:
        classifier: Keras model from pixels in [0, 1], `[B, *in]`, to logits `[B, K]`.
        x: Pixels in [0, 1], `[N, *in]`.
        y: Integer labels `[N]` or `[N, 1]`.
        eps: Radius of the ball, in pixel units.
        step_size: Change of each pixel per iteration, in pixel units.
        iterations: Number of steps, or several rising numbers: then one run to the last of them is
            recorded at each.
        loss: `"cross_entropy"` or `"margin"`.
        seed: Seed of the random start. Image `i` has its own random numbers.
        random_start: Whether to start uniformly in the ball, clipped to [0, 1], instead of at `x`.
        batch_size: Images per batch; changes speed and memory, not the result.
        progress: Called with the number of image steps done since the last call, of
            `N * iterations` in all.

    Returns:
        The perturbed images, and which images are still classified correctly at each strength.
        Images that are misclassified from the start are attacked like the others.

    Raises:
        ImportError: If cleverhans is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, the classifier fails a check (see
            `judging.classifiers.check_classifier`) or its logits or gradients become NaN or
            infinite.
    """
    objective = _LOSSES[arguments.one_of("loss", loss, _LOSSES)]
    arguments.boolean("random_start", random_start)
    step_size = arguments.positive("step_size", step_size)
    settings = _settings(eps, iterations, seed, batch_size, progress)

    def start(index: int, image: Array) -> Array:
        noise = image_rng(seed, _PGD_START, index).uniform(-eps, eps, image.shape)
        return image + noise if random_start else image

    checked = check_classifier(classifier, x, y, loss=objective)
    return _projected_ascent(checked, checked.y, objective, start, step_size, settings)


def tpgd(
    classifier: keras.Model,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    eps: float = EPS,
    step_size: float = STEP_SIZE,
    iterations: int | Sequence[int] = 32,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> AttackResult:
    """Projected gradient descent on the divergence from the softmax of the clean image.

    Maximizes `KL(softmax(f(x)) || softmax(f(x_adv)))` from a start at `x + 0.001 N(0, 1)`. The
    labels are used only to count correct images. The arguments, result and errors are the same as
    for `pgd`, without `loss` and `random_start`.
    """
    step_size = arguments.positive("step_size", step_size)
    settings = _settings(eps, iterations, seed, batch_size, progress)

    def start(index: int, image: Array) -> Array:
        noise = image_rng(seed, _TPGD_START, index).standard_normal(image.shape)
        return image + _TPGD_NOISE * noise

    checked = check_classifier(classifier, x, y, loss=_cross_entropy)
    clean = tf.nn.softmax(predict(checked, batch_size=batch_size)).numpy()
    return _projected_ascent(checked, clean, _soft_cross_entropy, start, step_size, settings)


def square(
    classifier: keras.Model,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    eps: float = EPS,
    iterations: int | Sequence[int] = 1000,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> AttackResult:
    """Square attack: random search with square windows, without gradients.

    Starts from vertical stripes of `+-eps`. Each query sets one square window, at a random place
    and with one random sign per channel, to `+-eps`, and keeps it if the margin (logit of the label
    minus the largest other logit) falls. The windows shrink as in the published attack, whose
    schedule for 10,000 queries is rescaled to the last of `iterations`: a strength recorded on the
    way belongs to a search that was planned for more queries. Only images classified correctly are
    attacked, each until its margin is no longer positive; `progress` counts the queries that are
    saved in this way as done.

    The arguments are the same as for `pgd`, except that `x` must be images `[N, H, W, C]`, that
    `iterations` counts the queries after the stripes, and that `classifier` need not be
    differentiable.

    Returns:
        The images with the lowest margin found, which may be the clean ones, and which images are
        still classified correctly at each strength.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, `x` is not `[N, H, W, C]`, the classifier fails
            a check (see `judging.classifiers.check_classifier`) or a logit is NaN or infinite.
    """
    settings = _settings(eps, iterations, seed, batch_size, progress)
    checked = check_classifier(classifier, x, y)
    if checked.x.ndim != 4:
        raise ValueError(f"square needs images [N, H, W, C]. Received: shape {checked.x.shape}.")
    best, correct = square_attack.search(
        checked,
        _box(checked.x, settings.eps),
        settings.strengths,
        eps=settings.eps,
        seed=settings.seed,
        batch_size=settings.batch_size,
        progress=settings.progress,
    )
    return AttackResult(best, np.array(settings.strengths), correct, np.zeros_like(correct))


class _Settings(NamedTuple):
    """The common settings of the attacks, checked before anything is computed."""

    eps: float
    strengths: list[int]
    seed: int
    batch_size: int
    progress: Progress | None


def _settings(
    eps: float,
    iterations: int | Sequence[int],
    seed: int,
    batch_size: int,
    progress: Progress | None,
) -> _Settings:
    return _Settings(
        arguments.positive("eps", eps),
        _strengths(iterations),
        arguments.fixed_seed(seed),
        arguments.positive_integer("batch_size", batch_size),
        arguments.optional_function("progress", progress),
    )


def _strengths(iterations: int | Sequence[int]) -> list[int]:
    given = iterations if isinstance(iterations, Iterable) else [iterations]
    strengths = [arguments.positive_integer("iterations", strength) for strength in given]
    if not strengths or any(b <= a for a, b in itertools.pairwise(strengths)):
        raise ValueError(
            "`iterations` must be a number or rising numbers, each of at least 1. "
            f"Received: iterations={strengths}"
        )
    return strengths


def _cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)


def _soft_cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    # Equal to the divergence up to the entropy of the labels, a constant: the same gradient.
    return tf.nn.softmax_cross_entropy_with_logits(labels=labels, logits=logits)


def _negative_margin(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return -scaled_margin(labels, logits)


_LOSSES: dict[str, Callable[..., tf.Tensor]] = {
    "cross_entropy": _cross_entropy,
    "margin": _negative_margin,
}


def _projected_ascent(
    checked: CheckedClassifier,
    targets: npt.NDArray,
    loss: Callable[..., tf.Tensor],
    start: Callable[[int, Array], Array],
    step_size: float,
    settings: _Settings,
) -> AttackResult:
    """Climbs `loss(labels=targets, logits=...)` by sign steps, projected on the box."""
    strengths = settings.strengths
    with optional_packages.importing("experiments", "A PGD attack"):
        from cleverhans.tf2.utils import compute_gradient, optimize_linear
    x_adv = np.empty_like(checked.x)
    correct = np.empty((len(strengths), len(x_adv)), bool)
    faded = np.empty_like(correct)

    def steps(
        images: tf.Tensor, target: tf.Tensor, low: tf.Tensor, high: tf.Tensor, count: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        slope = tf.zeros(tf.shape(images)[:1])
        for _ in tf.range(count):
            # Unwrapped: cleverhans' own tf.function would keep every classifier's weights forever.
            gradient = compute_gradient.python_function(checked.logits, loss, images, target, False)
            slope = tf.reduce_max(tf.abs(gradient), axis=range(1, len(gradient.shape)))
            images += optimize_linear(gradient, step_size, np.inf)
            images = tf.clip_by_value(images, low, high)
        return images, slope

    steps = concrete_function(steps, x_adv, targets, x_adv, x_adv, np.array(0, np.int32))
    logits = concrete_function(checked.logits, x_adv)
    for s in batches(len(x_adv), settings.batch_size):
        size = s.stop - s.start
        low, high = _box(checked.x[s], settings.eps)
        first = np.stack([start(i, checked.x[i]) for i in range(s.start, s.stop)])
        first = np.clip(first, low, high).astype(np.float32)
        images, target, low, high = (pad_rows(a) for a in (first, targets[s], low, high))
        for row, (done, strength) in enumerate(zip([0, *strengths], strengths, strict=False)):
            images, slope = steps(images, target, low, high, tf.constant(strength - done))
            largest = finite(slope.numpy()[:size], "gradients")
            outputs = finite(logits(images).numpy()[:size], "logits")
            correct[row, s] = outputs.argmax(axis=1) == checked.y[s]
            rounded = loss(labels=target[:size], logits=outputs).numpy() == 0
            faded[row, s] = correct[row, s] & (rounded | (largest < _SMALLEST))
            if settings.progress is not None:
                settings.progress(size * (strength - done))
        x_adv[s] = images.numpy()[:size]
    return AttackResult(x_adv, np.array(strengths), correct, faded)


def _box(x: Array, eps: float) -> tuple[Array, Array]:
    """Returns the bounds of the ball within the pixel range, rounded inwards to float32."""
    exact = x.astype(np.float64)
    low, high = np.maximum(exact - eps, 0), np.minimum(exact + eps, 1)
    low32, high32 = low.astype(np.float32), high.astype(np.float32)
    low32 = np.where(low32 < low, np.nextafter(low32, np.float32(1)), low32)
    return low32, np.where(high32 > high, np.nextafter(high32, np.float32(0)), high32)
