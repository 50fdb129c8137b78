"""Checks of arguments: each function returns the argument in a plain form, or raises."""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfjacreg_startup

_LARGEST_COUNT = 2**31 - 1
_LARGEST_UNROLLED = 1000
_LARGEST_SINGLE = float(np.finfo(np.float32).max)
_SMALLEST_SINGLE = float(np.finfo(np.float32).tiny)


def network(value: Any) -> keras.Layer:
    """Returns the network if it is a Keras layer.

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
    """Returns an integer from 1 to 2**31 - 1, also one of NumPy's, as a Python int.

    Raises:
        ValueError: If it is not.
    """
    if not _is_integer(value) or not 1 <= value <= _LARGEST_COUNT:
        limit = "" if not _is_integer(value) or value < 1 else " (and < 2**31)"
        raise ValueError(f"`{name}` must be an integer >= 1{limit}. Received: {name}={value!r}")
    return int(value)


def unrolled_count(name: str, value: Any) -> int:
    """Returns an integer from 1 to 1000 as a Python int: the graph of a step holds each iteration.

    Raises:
        ValueError: If it is not.
    """
    count = positive_integer(name, value)
    if count > _LARGEST_UNROLLED:
        raise ValueError(
            f"`{name}` must be at most {_LARGEST_UNROLLED}: each is written into the graph of a "
            f"step. Received: {name}={value!r}"
        )
    return count


def seed(value: Any, name: str = "seed", *, below: int = 2**63) -> int | None:
    """Returns a seed that is None or an integer >= 0, as None or a Python int.

    Raises:
        ValueError: If it is not.
    """
    return None if value is None else _seed(value, name, "None or an integer", below)


def fixed_seed(value: Any, name: str = "seed", *, below: int = 2**63) -> int:
    """Returns a seed that makes a result repeatable: like `seed`, but None is refused.

    Raises:
        ValueError: If it is not an integer >= 0.
    """
    return _seed(value, name, "an integer", below)


def _seed(value: Any, name: str, kind: str, below: int) -> int:
    if not _is_integer(value) or not 0 <= value < below:
        power = below.bit_length() - 1
        raise ValueError(
            f"`{name}` must be {kind} >= 0 (and < 2**{power}). Received: {name}={value!r}"
        )
    return int(value)


def non_negative(name: str, value: Any) -> float:
    """Returns a finite number >= 0 that fits into single precision, as a Python float.

    Raises:
        ValueError: If it is not.
    """
    if not _is_real(value) or not 0 <= value <= _LARGEST_SINGLE:
        raise ValueError(
            f"`{name}` must be a finite number >= 0 (and < 3.4e38). Received: {name}={value!r}"
        )
    return float(value)


def positive(name: str, value: Any) -> float:
    """Returns a finite number > 0 that is not 0 in single precision, as a Python float.

    Raises:
        ValueError: If it is not.
    """
    if not _is_real(value) or not _SMALLEST_SINGLE <= value <= _LARGEST_SINGLE:
        raise ValueError(
            f"`{name}` must be a positive number (from 1.2e-38 to 3.4e38). "
            f"Received: {name}={value!r}"
        )
    return float(value)


def fraction(value: Any, name: str = "fraction") -> float:
    """Returns a number in (0, 1] as a Python float.

    Raises:
        ValueError: If it is not.
    """
    if not _is_real(value) or not 0 < value <= 1:
        raise ValueError(f"`{name}` must be a number in (0, 1]. Received: {name}={value!r}")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """Returns True or False, also one of NumPy's, as a Python bool.

    Raises:
        TypeError: If it is neither.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False. Received: {name}={value!r}")
    return bool(value)


def optional_function(name: str, value: Any) -> Callable[..., Any] | None:
    """Returns None or a callable.

    Raises:
        TypeError: If it is neither.
    """
    if value is not None and not callable(value):
        raise TypeError(f"`{name}` must be None or a function. Received: {name}={value!r}")
    return value


def path(name: str, value: Any) -> Path:
    """Returns a string or path-like object as a `Path`.

    Raises:
        TypeError: If it is neither.
        ValueError: If it cannot be a path.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"`{name}` must be a path. Received: {name}={value!r}")
    found = Path(value)
    if not str(value) or "\0" in str(found):
        raise ValueError(f"`{name}` must be a path. Received: {name}={value!r}")
    if "://" in str(value) and tfjacreg_startup.redacted(str(value)) != str(value):
        raise ValueError(f"`{name}` must be a path. Received: a URL with a password")
    try:
        str(found).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{name}` must be a path in UTF-8, which TensorFlow needs. Received: {name}={value!r}"
        ) from error
    return found


def one_of(name: str, value: Any, options: Collection[str]) -> str:
    """Returns a value that is one of the options.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"`{name}` must be one of {tuple(options)}. Received: {name}={value!r}")
    return value


def vector(name: str, a: Any, like: tf.Tensor, what: str) -> tf.Tensor:
    """Returns one vector for each example, `[B, ...]`, as a tensor of the dtype of `like`.

    Raises:
        TypeError: If `a` does not hold real numbers.
        ValueError: If `a` has another shape than `like`.
    """
    try:
        a = tf.convert_to_tensor(a)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{name}` must be a tensor or array of the shape of {what}. "
            f"Received: a {type(a).__name__} of which TensorFlow makes no tensor: {error}"
        ) from error
    if not (a.dtype.is_floating or a.dtype.is_integer):
        raise TypeError(
            f"`{name}` must hold real numbers. Received: {name} of dtype {a.dtype.name}"
        )
    if a.dtype != like.dtype:
        a = tf.cast(a, like.dtype)
    if not a.shape.is_compatible_with(like.shape):
        raise ValueError(
            f"`{name}` must have the shape of {what}, {tuple(like.shape)}. "
            f"Received: {name} of shape {tuple(a.shape)}"
        )
    return a


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
