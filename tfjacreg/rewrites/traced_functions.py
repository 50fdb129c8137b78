"""A `tf.function` that a layer calls is traced anew while a pass is recorded.

Keras calls a layer when it builds a model, so a `tf.function` of the layer is traced before any
pass is recorded, with the functions that a pass replaces. In a pass it is therefore exchanged for a
copy of the same code with traces of its own.

With a tangent the code runs as it is written, without a function around it: TensorFlow's derivative
of a tangent that went through a `tf.function` is wrong in a graph, and raises an error eagerly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfjacreg.rewrites.context import Place

_KIND = type(tf.function(lambda: None))
_ITS_OWN = "_tfjacreg_in_passes"


def _is_foreign(function: Any) -> bool:
    """Whether it belongs to TensorFlow or Keras, which differentiate through their functions."""
    module = getattr(function.python_function, "__module__", None) or ""
    return module.split(".")[0] in ("tensorflow", "keras")


def _as_written(original: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces a call of a `tf.function` in a pass with a tangent."""
    if _is_foreign(function):
        return original(function, *args, **kwargs)
    code = function.python_function
    if not tf.executing_eagerly() and getattr(function, "_autograph", True):
        with contextlib.suppress(Exception):  # Code that autograph cannot read runs as it is.
            code = tf.autograph.to_graph(code)
    return code(*args, **kwargs)


def _anew(original: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces a call of a `tf.function` in a pass, with a trace of its own."""
    if _is_foreign(function):
        return original(function, *args, **kwargs)
    # Stored in an attribute of the function, so that both are freed together.
    if _ITS_OWN not in vars(function):
        # The name is private, and exists from TensorFlow 2.18 to 2.21. Without it the earlier trace
        # is used, and what is wrong in it is found in the graph of the pass.
        clone = getattr(function, "_clone", None)
        vars(function)[_ITS_OWN] = function if clone is None else clone(None)
    return original(vars(function)[_ITS_OWN], *args, **kwargs)


TRACED_ANEW = Place(_KIND, "__call__", _anew)
AS_WRITTEN = Place(_KIND, "__call__", _as_written)
