"""The forward passes that are being recorded: one stack in each thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
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
