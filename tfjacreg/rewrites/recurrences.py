"""The loop of a recurrent layer, written out while a pass is recorded.

In a graph Keras runs a recurrence as a loop. The derivative of such a loop keeps every tensor of
every turn in a list, and so does the derivative of the derivative; TensorFlow's accumulator has no
tangents of lists at all. Written out, as by Keras with `unroll=True`, the same turns are ordinary
operations. The graph grows with the length of the sequence, so a long loop stays a loop, as does
one whose length is not known.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfjacreg import _keras
from tfjacreg.rewrites.context import Place

# The longest sequence that is written out.
MOST_STEPS = 64

_keeps_loops = contextvars.ContextVar("keeps_loops", default=False)


@contextlib.contextmanager
def keeping_loops() -> Iterator[None]:
    """Inside this context every loop stays a loop: for data of lengths not known beforehand."""
    token = _keeps_loops.set(True)
    try:
        yield
    finally:
        _keeps_loops.reset(token)


def _recurrence(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Replaces the function by which Keras runs all recurrences."""
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    taken = bound.arguments
    axis = 0 if taken["time_major"] else 1
    steps = keras.tree.flatten(taken["inputs"])[0].shape[axis]
    if (
        tf.executing_eagerly()  # Eagerly it is a loop in Python.
        or _keeps_loops.get()
        or taken["unroll"]
        or isinstance(taken["input_length"], tf.Tensor)
        or not steps
        or steps > MOST_STEPS
    ):
        return original(*args, **kwargs)
    if taken["go_backwards"]:
        # With unroll=True Keras reverses the sequence, but not the mask of what it returns.
        for name in ("inputs", "mask"):
            taken[name] = keras.tree.map_structure(
                lambda a: None if a is None else tf.reverse(a, [axis]), taken[name]
            )
    taken.update(go_backwards=False, unroll=True)
    return original(*bound.args, **bound.kwargs)


def _places() -> list[Place]:
    owner = _keras.owner_of_recurrences()
    return [] if owner is None else [Place(owner, "rnn", _recurrence)]


RECURRENCES: tuple[Place, ...] = tuple(_places())
