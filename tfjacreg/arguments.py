"""Is an argument what it should be? Each function returns it in its plain form, or raises."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import Any

import keras


def network(value: Any) -> keras.Layer:
    """Returns a network that is a Keras layer.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, keras.Layer):
        raise TypeError(
            "`network` must be a keras.Layer, for example a keras.Model. "
            f"Received: network={value!r} (of type {type(value).__name__})"
        )
    return value


def positive_integer(name: str, value: Any) -> int:
    """Returns an integer of at least 1, NumPy's too, as Python's.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be an integer >= 1. Received: {name}={value!r}")
    return int(value)


def seed(value: Any) -> int | None:
    """Returns a seed that is None or a non-negative integer, NumPy's too, as Python's.

    Raises:
        ValueError: If it is not.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(f"`seed` must be None or an integer >= 0. Received: seed={value!r}")
    return int(value)


def non_negative(name: str, value: Any) -> float:
    """Returns a finite number of at least 0, NumPy's too, as Python's.

    Raises:
        ValueError: If it is not.
    """
    if not _is_real(value) or not math.isfinite(value) or value < 0:
        raise ValueError(f"`{name}` must be a finite number >= 0. Received: {name}={value!r}")
    return float(value)


def fraction(value: Any) -> float:
    """Returns a fraction, a number in (0, 1], NumPy's too, as Python's.

    Raises:
        ValueError: If it is not.
    """
    if not _is_real(value) or not 0 < value <= 1:
        raise ValueError(f"`fraction` must be a number in (0, 1]. Received: fraction={value!r}")
    return float(value)


def one_of(name: str, value: Any, options: Collection[str]) -> str:
    """Returns a value that is one of the options.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"`{name}` must be one of {tuple(options)}. Received: {name}={value!r}")
    return value


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
