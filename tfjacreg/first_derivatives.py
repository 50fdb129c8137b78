"""Compares a product of a network with a difference of its values.

Where a network runs eagerly only, no graph shows an operation whose part of the Jacobian is lost.
But the values show it:

    <J^T u, v> = <u, f(x + e v) - f(x - e v)> / 2e,

with u along the difference itself. As in `second_derivatives.py`, the difference is taken in double
precision if the network can run in it, and has to agree with itself at two steps e.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfjacreg import rewrites
from tfjacreg.double_precision import in_double_precision
from tfjacreg.error_causes import raise_an_interrupt, raise_what_says_nothing
from tfjacreg.jacobian import JacobianOperator
from tfjacreg.second_derivatives import (
    AGREES,
    COARSE_STEPS,
    FINE_STEPS,
    beside,
    noise,
)
from tfjacreg.vectors import broadcast_like, flatten, length, unit

# The largest relative error of a right network; coarse steps cross kinks of it.
_TOLERANCES = {FINE_STEPS: 1e-3, COARSE_STEPS: 5e-2}


def lost_part(jacobian: JacobianOperator) -> float | None:
    """How much of a product is lost, relative to the difference of values; None if nothing.

    Nothing can be said, and None is returned, if the network holds something constant
    (`hold_constant`, `tf.stop_gradient`), draws random numbers that cannot be repeated, or has
    kinks or steps at all distances.

    Args:
        jacobian: The operator of an eager pass.
    """
    x, network = jacobian.x, jacobian.network
    wide = tf.cast(x, tf.float64)
    for attempt in (
        lambda: in_double_precision(
            network, lambda: _lost_part(jacobian, wide, (FINE_STEPS, COARSE_STEPS))
        ),
        lambda: _lost_part(jacobian, x, (COARSE_STEPS,)),
    ):
        try:
            return attempt()
        # It has constants in single precision, or cannot run beside x.
        except Exception as error:
            raise_an_interrupt(error)
            failure = error
    raise_what_says_nothing(failure)
    return None


def _lost_part(
    jacobian: JacobianOperator, x: tf.Tensor, scales: Sequence[tuple[float, float]]
) -> float | None:
    if not tf.reduce_any(x != 0):  # All in the middle of any kinks.
        x += 0.01 * noise(x.shape, x.dtype)
    x = beside(x)
    here = jacobian.moved(x)
    if here.holds_constants or _stops_gradients(jacobian, x):
        return None
    v = broadcast_like(length(x), x) * unit(noise(x.shape, x.dtype))
    for steps in scales:
        moves, differences = [], []
        for step in steps:
            # Points of single precision: a functional model casts what it takes to its Input.
            ends = [tf.cast(tf.cast(x + e * v, tf.float32), x.dtype) for e in (step, -step)]
            values = [flatten(tf.cast(jacobian.moved(end).primal, x.dtype)) for end in ends]
            moves.append((ends[0] - ends[1]) / (2 * step))
            differences.append((values[0] - values[1]) / (2 * step))
        u = unit(differences[-1])
        back = here.rmatvec(tf.reshape(u, tf.shape(here.primal)))
        # Of all examples together, so that it does not matter whether the network mixes them.
        taken = [float(tf.reduce_sum(back * move)) for move in moves]
        wanted = [float(tf.reduce_sum(u * difference)) for difference in differences]
        size = max(abs(wanted[-1]), abs(taken[-1]))
        if not size or not np.isfinite(size):
            return None
        errors = [(a - b) / size for a, b in zip(taken, wanted, strict=True)]
        error = min(map(abs, errors))
        if error <= _TOLERANCES[steps]:
            return None
        if abs(errors[0] - errors[1]) <= AGREES * error:
            return error
    return None


def _stops_gradients(jacobian: JacobianOperator, x: tf.Tensor) -> bool:
    """Whether the network's own code calls `tf.stop_gradient`, as `keras.ops.stop_gradient` does.

    What it passes is meant to be a constant of the Jacobian; the values depend on it.
    """
    calls = []

    def noted(original: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    place = rewrites.Place(tf, "stop_gradient", noted)
    rewrites.while_replaced([place], lambda: jacobian.run_again(x))
    return bool(calls)
