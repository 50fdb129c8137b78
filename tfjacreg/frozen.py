"""What a forward pass holds constant for the Jacobian (Section 3.2 and appendix B).

`recording` surrounds the one pass of a `JacobianOperator`. Inside it, what BatchNorm takes from
the batch and the places of max-pooling's maxima are constants of the Jacobian, and `hold_constant`
lets a layer of one's own do the same. The gradient of the loss is not affected.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfjacreg import _keras, _tensorflow, image_maps, stand_ins  # noqa: F401 (a derivative)
from tfjacreg.grouped_convolutions import grouped_convolution

NEEDS_THE_WHOLE_BATCH = (
    "The Jacobian of some examples of a batch is that of the whole batch only if each is computed "
    "alone and without random numbers. Use fraction=1. "
)


class _Pass:
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
        self.graph = _graph()
        self._is_paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        if self._is_paused:
            yield
            return
        with contextlib.ExitStack() as stack:
            self._is_paused = True
            stack.callback(setattr, self, "_is_paused", False)
            stack.enter_context(self.tape.stop_recording())
            if self.accumulator is not None:
                # An accumulator stops on exit and goes on where it was when entered again.
                self.accumulator.__exit__(None, None, None)
                stack.callback(self.accumulator.__enter__)
            yield


class _Passes(threading.local):
    """The forward passes now recorded, innermost last. A thread traces each replica."""

    def __init__(self) -> None:
        self.stack: list[_Pass] = []


_passes = _Passes()


@contextlib.contextmanager
def hold_constant() -> Iterator[None]:
    """Holds what is computed in this context constant for the Jacobian, and only for it.

    A layer that mixes the examples of a batch (BatchNorm in training mode) gives `f(x_i)` a
    derivative with respect to another example `x_j`. The paper's pseudo-inference mode
    (Section 3.2) takes the batch's statistics as constants instead. `JacobianOperator` does so for
    Keras' `BatchNormalization` and its subclasses; in a layer of your own, compute the statistics
    in this context:

    ```python
    def call(self, x, training=None):
        with tfjacreg.hold_constant():
            mean = ops.mean(x, axis=0)
        return x - mean
    ```

    The gradient of the loss still flows through the statistics. Outside a Jacobian's forward pass
    the context does nothing.
    """
    if not _passes.stack:
        yield
        return
    if _passes.stack[-1].is_partial:
        raise ValueError(
            f"{NEEDS_THE_WHOLE_BATCH}Received: a layer that takes something from the whole batch, "
            "such as BatchNormalization in training mode"
        )
    if _passes.stack[-1].graph is not _graph():
        # Of a graph inside the pass the tape records the one call, with all that is in it.
        raise ValueError(
            "What a layer takes from the whole batch cannot be held constant for the Jacobian "
            "inside of a tf.function, a branch or a loop of a graph. Take it outside of it. "
            "Received: hold_constant(), or BatchNormalization in training mode, in such a place"
        )
    with _passes.stack[-1].paused():
        yield


def _graph() -> Any:
    """The graph that is being traced now; None eagerly."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


@contextlib.contextmanager
def recording(
    network: keras.Layer,
    tape: tf.GradientTape,
    accumulator: tf.autodiff.ForwardAccumulator | None = None,
    *,
    is_partial: bool = False,
) -> Iterator[None]:
    """Records the forward pass inside: on the tape and, if there is one, along the accumulator.

    Args:
        network: Whose layers are to hold their statistics and places.
        tape: Not yet entered.
        accumulator: Not yet entered.
        is_partial: Whether the pass is one of some examples of a batch, in which nothing may be
            taken from the whole of it.
    """
    _passes.stack.append(_Pass(tape, accumulator, is_partial))
    try:
        with (
            _frozen_layers(network),
            stand_ins.standing_in(),
            tape,
            accumulator or contextlib.nullcontext(),
        ):
            yield
    finally:
        _passes.stack.pop()


@contextlib.contextmanager
def without_trace(network: keras.Layer) -> Iterator[keras.StatelessScope]:
    """Undoes what the passes inside change of Keras' state: variables, seeds and added losses."""
    with keras.StatelessScope() as scope, _keras.losses_kept(network):
        yield scope


@contextlib.contextmanager
def _frozen_layers(network: keras.Layer) -> Iterator[None]:
    """Makes BatchNorm hold its moments, and rewrites image layers and grouped convolutions."""
    with contextlib.ExitStack() as stack:
        for layer in _keras.layers_of(network):
            if isinstance(layer, keras.layers.BatchNormalization):
                held = functools.partial(_frozen_moments, layer._moments)
                stack.enter_context(substituted(layer, "_moments", held))
            elif image_maps.is_linear_image_map(layer):
                # AugMix and RandAugment call the second method of the layers in them.
                for name in ("call", "transform_images"):
                    if hasattr(layer, name):
                        linear = image_maps.linear_image_map(layer, getattr(layer, name))
                        stack.enter_context(substituted(layer, name, linear))
            elif (convolution := grouped_convolution(layer)) is not None:
                stack.enter_context(substituted(layer, "convolution_op", convolution))
        yield


def _frozen_moments(moments: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Constants of the Jacobian need no second derivative.
    with hold_constant(), stand_ins.stepping_aside():
        return moments(*args, **kwargs)


class _Patched:
    """Stands in for a layer's method while passes are being recorded."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@contextlib.contextmanager
def substituted(layer: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Puts `function` in the place of a method of one layer, for the time inside."""
    # Through `__dict__`: Keras' `__setattr__` would track the function as part of the model.
    # Replicas' threads interleave here (synchronized BatchNorm), so users are counted.
    layer.__dict__.setdefault(name, _Patched(function)).users += 1
    try:
        yield
    finally:
        layer.__dict__[name].users -= 1
        if not layer.__dict__[name].users:
            del layer.__dict__[name]
