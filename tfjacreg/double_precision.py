"""Runs the layers of a network in double precision, whatever their policies say, in one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import keras
import tensorflow as tf

from tfjacreg import _keras, rewrites

T = TypeVar("T")


_state = rewrites.Switch()


class _DoublePrecision(keras.DTypePolicy):
    """Computes in float64 with variables of any dtype, which Keras casts when they are used."""

    def __init__(self) -> None:
        super().__init__("float64")

    @property
    def variable_dtype(self) -> str:
        return "float32"


_DOUBLE_PRECISION = _DoublePrecision()


class _Policy:
    """The policy of a layer that one thread runs in double precision.

    It is that of double precision there, and the layer's own in every other thread.
    """

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattribute__(self, name: str) -> Any:
        # Everything, the class too: Keras asks for it, also to write a model to a file.
        return getattr(_acting(self), name)

    def __getitem__(self, path: str) -> Any:
        return _acting(self)[path]

    def __eq__(self, other: object) -> bool:
        return bool(_acting(self) == other)

    def __hash__(self) -> int:
        return id(self)


def _acting(policy: _Policy) -> Any:
    return _DOUBLE_PRECISION if _state.is_active else object.__getattribute__(policy, "_own")


def in_double_precision(layer: keras.Operation, function: Callable[[], T]) -> T:
    """Calls a function while all floating layers inside a layer compute in double precision.

    A layer that makes constants in single precision may raise an error meanwhile. Other threads may
    use the layers.

    Args:
        layer: The layer or network.
        function: Called without arguments.

    Returns:
        What the function returns.
    """
    places = [
        rewrites.Place(part, "_dtype_policy", view=_Policy)
        for part in _keras.layers_of(layer)
        if part.dtype_policy.quantization_mode is None
        and tf.as_dtype(part.compute_dtype).is_floating
    ]
    return rewrites.while_replaced(places, lambda: _state.during(function))
