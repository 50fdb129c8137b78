"""Functions of `tf.nn` that others stand in for while a pass is recorded, whoever calls them.

TensorFlow's own have the right values and the right first derivative, but not the right second.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tfjacreg import max_pool


def moments(
    original: Callable[..., Any],
    x: Any,
    axes: Any,
    shift: Any = None,
    keepdims: bool = False,
    name: str | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Stands in for `tf.nn.moments`, of LayerNormalization and its kin, with the same values.

    TensorFlow takes the mean inside of the variance for a constant. That leaves the variance's
    first derivative as it is, but takes `-2 dm dm` off the second. The square here is 0, and so is
    its first derivative; its second one is what was lost.
    """
    x = tf.convert_to_tensor(x)
    mean, variance = original(x, axes, shift=shift, keepdims=keepdims, name=name)
    wide = tf.cast(x, tf.float32) if x.dtype.size == 2 else x
    # Not `mean`: the tape would add up the loss's gradient in another order.
    centre = tf.reduce_mean(wide, axes, keepdims=keepdims)
    lost = tf.square(centre - tf.stop_gradient(centre))
    return mean, variance - tf.cast(lost, variance.dtype)


# Each takes the original first.
_STAND_INS: dict[str, Callable[..., Any]] = {
    "moments": moments,
    **{
        name: functools.partial(max_pool.pool, rank) for name, rank in max_pool.SPATIAL_AXES.items()
    },
}


class _Users(threading.local):
    """How many passes this thread is recording."""

    passes = 0


_users = _Users()
_lock = threading.Lock()
_originals: dict[str, Callable[..., Any]] = {}
_threads = 0


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """In this thread, inside of the context, these functions have derivatives of every order."""
    global _threads
    with _lock:
        _threads += 1
        if _threads == 1:
            for name in _STAND_INS:
                _originals[name] = getattr(tf.nn, name)
                setattr(tf.nn, name, functools.partial(_call, name))
    _users.passes += 1
    try:
        yield
    finally:
        _users.passes -= 1
        with _lock:
            _threads -= 1
            if _threads == 0:
                for name, function in _originals.items():
                    setattr(tf.nn, name, function)


@contextlib.contextmanager
def stepping_aside() -> Iterator[None]:
    """In this thread, inside of the context, these functions are TensorFlow's own."""
    passes, _users.passes = _users.passes, 0
    try:
        yield
    finally:
        _users.passes = passes


def _call(name: str, /, *args: Any, **kwargs: Any) -> Any:
    original = _originals[name]
    if not _users.passes:
        return original(*args, **kwargs)
    return _STAND_INS[name](original, *args, **kwargs)
