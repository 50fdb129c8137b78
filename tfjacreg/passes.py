"""The forward passes that are being recorded: one stack in each thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf


class Pass:
    """What records one forward pass: a tape for J^T u and, with a tangent, an accumulator."""

    def __init__(
        self,
        tape: tf.GradientTape,
        accumulator: tf.autodiff.ForwardAccumulator | None,
        is_partial: bool,
    ) -> None:
        self.tape = tape
        self.accumulator = accumulator
        self.is_partial = is_partial
        self.graph = current_graph()
        self.has_held = False
        self._is_paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Records nothing inside this context."""
        self.has_held = True
        if self._is_paused:
            yield
            return
        with contextlib.ExitStack() as stack:
            self._is_paused = True
            stack.callback(setattr, self, "_is_paused", False)
            stack.enter_context(self.tape.stop_recording())
            if self.accumulator is not None:
                # An accumulator stops on exit and continues where it was when entered again.
                self.accumulator.__exit__(None, None, None)
                stack.callback(self.accumulator.__enter__)
            yield


class _Passes(threading.local):
    """The forward passes of this thread, innermost last. Each replica is traced by a thread."""

    def __init__(self) -> None:
        self.stack: list[Pass] = []


recorded = _Passes()


def current_graph() -> Any:
    """The graph that is being traced; None in eager execution."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def can_use(graph: Any) -> bool:
    """Whether tensors of a graph (None: eager ones) can be used in the one that is traced now."""
    current = current_graph()
    while current is not graph and current is not None:
        current = getattr(current, "outer_graph", None)
    return current is graph


def _counter_of_tapes() -> Callable[[list[tf.Tensor]], int] | None:
    """TensorFlow's count of the tapes and accumulators that follow a tensor; it ends at 2.

    The name is private, and exists from TensorFlow 2.18 to 2.21.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from tensorflow.python import pywrap_tfe

        return pywrap_tfe.TFE_Py_TapeSetPossibleGradientTypes
    return None


COUNTER_OF_TAPES = _counter_of_tapes()


def is_followed_like(tensor: tf.Tensor, source: tf.Tensor) -> bool:
    """Whether every tape that records now, and follows the source, follows the tensor too.

    Args:
        tensor: What was computed from what the source was computed from.
        source: A tensor.
    """
    if COUNTER_OF_TAPES is None:
        return False
    return COUNTER_OF_TAPES([tensor]) >= COUNTER_OF_TAPES([source])
