"""Checks the second derivatives of one layer, which training needs, by first derivatives alone.

A penalty of the Jacobian is made of products `<u, J v>`, and training takes their gradient in the
weights: a second derivative of the network. This gradient also follows from a difference,

    <u, f(x + e v) - f(x - e v)> / 2e,

which needs first derivatives only. Here both are taken for one call of a layer, in its weights and
in the tensor that it takes. If the layer can run in double precision it does: the step of the
difference is then a millionth of the input, hardly any kink lies within it, and rounding is far
below.

The difference is the reference, so it has to agree with itself: a layer is refused only if two
steps e agree and training's gradient differs from both. The error from a kink or from rounding
grows as the step shrinks; the error of a wrong derivative stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfjacreg import recording, rewrites
from tfjacreg.double_precision import in_double_precision
from tfjacreg.error_causes import (
    came_from,
    raise_an_interrupt,
    raise_what_says_nothing,
)
from tfjacreg.jacobian import JacobianOperator
from tfjacreg.layer_calls import LayerCall
from tfjacreg.vectors import inner, length, unit

# Steps relative to the length of each example's input: in double precision, and for layers that
# compute something in single precision.
FINE_STEPS = (1e-6, 2.5e-7)
COARSE_STEPS = (1e-2, 4e-3)
# The largest relative error of a right layer at those steps. How far right layers stay below it and
# how small an error is still found: `benchmarks/second_derivative_check.py`.
TOLERANCE = 1e-4
_COARSE_TOLERANCE = 1e-3
AGREES = 0.25  # How far, relative to the error, the two differences may differ from each other.
# A gradient counts as at least this part of its natural size: anything smaller is only rounding.
_SMALLEST = 1e-3


class Comparison(NamedTuple):
    """The comparison of the two gradients of one call of a layer.

    Attributes:
        error: How far they differ, relative to the larger of them. There is one such number for all
            weights together and one for the inputs; this is the larger. NaN if the gradient that
            training takes is not finite where the difference's is.
        is_certain: Whether the difference agrees with itself, so that the error counts.
        tolerance: The largest error that a right layer may have.
    """

    error: float
    is_certain: bool
    tolerance: float = TOLERANCE

    @property
    def is_wrong(self) -> bool:
        """Whether the layer has a wrong second derivative."""
        return self.is_certain and not self.error <= self.tolerance


def compare(call: LayerCall, position: int, training: bool, *, in_graph: bool) -> Comparison | None:
    """Compares the two gradients of one call of a layer.

    Args:
        call: The call.
        position: Which of its tensors is varied.
        training: Whether the layer runs in training mode.
        in_graph: Whether to differentiate the layer as a graph, because it has loops, branches or
            functions that are other operations there.

    Returns:
        None if nothing can be said: the layer mixes random draws with statistics of the batch, what
        it is given has no derivative, or it raises an error when it runs alone or at another point.

    Raises:
        LookupError: If TensorFlow has no derivative of the layer's derivative.
        MemoryError, tf.errors.ResourceExhaustedError: If memory does not suffice.
    """
    for in_double in (True, False):
        subject = _Subject(call, position, training, in_double, in_graph)
        try:
            return subject.compared()
        except Exception as error:  # For example, it has constants in single precision.
            raise_an_interrupt(error)
            failure = error
    if came_from(failure, LookupError):
        raise failure
    raise_what_says_nothing(failure)
    return None


class _Subject:
    """One call of a layer, and the gradients in its trainable weights and its inputs."""

    def __init__(
        self, call: LayerCall, position: int, training: bool, in_double: bool, in_graph: bool
    ) -> None:
        self.layer = call.layer
        self.function = call.function(position, in_double=in_double)
        self.training = training
        self.in_double = in_double
        value = call.value(position)
        self.own = tf.cast(value, tf.float64) if in_double else value
        self.weights = [v.value for v in getattr(call.layer, "trainable_variables", [])]
        self.others = call.others(position)
        self.holds = self.draws = False
        # Differences need first derivatives only, which are the same eagerly.
        product = self._of_the_product
        self._product = tf.function(product, autograph=False) if in_graph else product

    def compared(self) -> Comparison | None:
        """The verdict, near the layer's own input: at the input's zeros lie kinks and ties."""
        for x in (beside(self.own), self.own):  # A square root may have no value beside it.
            found = self._compared_at(x)
            if found is not None:
                break
        if found is not None and not found.is_wrong and not self._is_finite_at_zeros():
            return Comparison(np.nan, True)
        return found

    def _is_finite_at_zeros(self) -> bool:
        """Whether the gradient that training takes is finite where the layer's input has zeros."""
        if not tf.reduce_any(self.own == 0):
            return True
        *_, of_weights, of_inputs = self._run(self._product, self.own, is_recorded=True)
        return bool(np.isfinite(_norm([*of_weights, *of_inputs])))

    def _compared_at(self, x: tf.Tensor) -> Comparison | None:
        u, v, product, *taken = self._run(self._product, x, is_recorded=True)
        if self.holds and self.draws:
            return None
        scales = [
            _SMALLEST * _norm([product]) / max(_norm(parts), 1e-30)
            for parts in (self.weights, [x, *self.others])
        ]
        found = None
        for steps in (FINE_STEPS, COARSE_STEPS) if self.in_double else (COARSE_STEPS,):
            wanted = []
            for step in steps:  # The second step is needed only if the first one differs.
                wanted.append(self._run(self._of_the_difference, x, u, v, step))
                tolerance = TOLERANCE if steps is FINE_STEPS else _COARSE_TOLERANCE
                found = _verdict(taken, wanted, scales, tolerance)
                if found is None or found.is_certain:
                    return found
        return found

    def _of_the_product(self, x: tf.Tensor) -> list[Any]:
        """Returns `u`, `v`, `<J^T u, v>` and its gradients, as training takes them."""
        with tf.GradientTape() as tape:
            tape.watch([x, *self.others])
            jacobian = JacobianOperator(self.function, x, training=self.training)
            u = unit(noise(jacobian.primal.shape, x.dtype))
            back = jacobian.rmatvec(u)
            with tape.stop_recording():
                v = unit(unit(back) + unit(noise(x.shape, x.dtype)))
            product = inner(back, v)
            total = tf.reduce_sum(product)
        self.holds = jacobian.holds_constants
        return [u, v, product, *self._gradients(tape, total, x)]

    def _of_the_difference(
        self, x: tf.Tensor, u: tf.Tensor, v: tf.Tensor, step: float
    ) -> list[Any]:
        """The gradients of `<u, f(x + e v) - f(x - e v)> / 2e`."""
        sizes = length(x)
        e = step * tf.where(sizes == 0, tf.ones_like(sizes), sizes)
        e = tf.reshape(e, [-1, *[1] * (len(x.shape) - 1)])
        with tf.GradientTape() as tape:
            tape.watch([x, *self.others])
            forward, backward = self._values(x + e * v, x - e * v)
            scaled = u / tf.reshape(2 * e, [-1, 1])
            total = tf.reduce_sum(scaled * (forward - backward))
        return self._gradients(tape, total, x)

    def _gradients(
        self, tape: tf.GradientTape, total: tf.Tensor, x: tf.Tensor
    ) -> list[list[tf.Tensor]]:
        """The gradients in all weights and in all inputs; 0 where there is no path."""
        sources = [self.weights, [x, *self.others]]
        zero = tf.UnconnectedGradients.ZERO
        found = tape.gradient(total, sources, unconnected_gradients=zero)
        return [[tf.convert_to_tensor(part) for part in kind] for kind in found]

    def _values(self, forward: tf.Tensor, backward: tf.Tensor) -> list[tf.Tensor]:
        """The layer's values at two points, with the same draws or the same statistics.

        Statistics that a layer takes from the batch, such as a mean over examples, are computed
        over both points together. They equal the statistics at the point between, up to the square
        of the step.
        """

        def values(x: tf.Tensor) -> tf.Tensor:
            with recording.without_trace(self.layer):
                return self.function(x, training=self.training)

        if self.draws:
            return [values(forward), values(backward)]
        return tf.split(values(tf.concat([forward, backward], axis=0)), 2)

    def _run(
        self, function: Callable[..., list[Any]], *args: Any, is_recorded: bool = False
    ) -> list[Any]:
        """Calls the function in the precision asked for, and undoes its traces in the layer."""

        def run() -> list[Any]:
            with recording.without_trace(self.layer) as scope:
                result = function(*args)
            self.draws = self.draws or recording.has_drawn(self.layer, scope)
            return result

        def rewritten() -> list[Any]:
            # A recorded pass rewrites the layer itself.
            return run() if is_recorded else rewrites.active(self.layer, run)

        if not self.in_double:
            return rewritten()
        return in_double_precision(self.layer, rewritten)


def beside(x: tf.Tensor) -> tf.Tensor:
    """A point at a distance of a hundredth, on the same side of 0 if all of x is on one side."""
    move = noise(x.shape, x.dtype)
    if tf.reduce_min(x) >= 0:
        move = tf.abs(move)
    return x + 0.01 * tf.sqrt(tf.reduce_mean(tf.square(x))) * move


def noise(shape: Any, dtype: tf.DType) -> tf.Tensor:
    """Standard normal numbers, the same each time."""
    # NumPy's: a draw of TensorFlow is made of fifty operations and takes longer.
    values = np.random.default_rng(0).normal(size=shape)
    return tf.constant(values, dtype)


def _verdict(
    taken: list[list[tf.Tensor]],
    wanted: list[list[list[tf.Tensor]]],
    scales: list[float],
    tolerance: float,
) -> Comparison | None:
    """The worse of two verdicts: for the gradients in the weights, and for those in the inputs."""
    found = []
    for kind, scale in enumerate(scales):
        got, others = taken[kind], [gradients[kind] for gradients in wanted]
        if not got:
            continue
        if not all(np.isfinite(_norm(other)) for other in others):
            return None
        scale = max(_norm(others[0]), scale)
        if not np.isfinite(_norm(got)):
            found.append(Comparison(np.nan, True))
            continue
        scale = max(_norm(got), scale)
        if not scale:
            continue
        error = min(_norm(_minus(got, other)) / scale for other in others)
        itself = _norm(_minus(others[0], others[-1])) / scale
        agrees = len(others) > 1 and itself <= AGREES * error
        found.append(Comparison(error, error <= tolerance or agrees, tolerance))
    wrong = [comparison for comparison in found if comparison.is_wrong]
    if wrong:
        return wrong[0]
    # If one part is without a verdict, so is the whole.
    worst = max((comparison.error for comparison in found), default=0.0)
    is_certain = all(comparison.is_certain for comparison in found)
    return Comparison(worst, is_certain, tolerance)


def _minus(a: list[tf.Tensor], b: list[tf.Tensor]) -> list[tf.Tensor]:
    return [p - q for p, q in zip(a, b, strict=True)]


def _norm(parts: list[Any]) -> float:
    """The Euclidean norm of all tensors together."""
    squares = [np.sum(np.square(np.asarray(part, "float64"))) for part in parts]
    return float(np.sqrt(np.sum(squares)))
