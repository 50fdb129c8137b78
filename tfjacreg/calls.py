"""Every call of a layer in a forward pass, as a function that can be run again on its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfjacreg import _keras, frozen, signature


class _AtOneInput(keras.Layer):
    """A layer as a function of one of the tensors that it was called with."""

    def __init__(self, layer: keras.Operation, function: Callable[[tf.Tensor], tf.Tensor]) -> None:
        # Not the layer's policy: a quantized one asks for methods that only the layer has.
        dtype = getattr(layer, "compute_dtype", None)
        super().__init__(name="at_one_input", dtype=dtype, autocast=False)
        self.layer = layer
        self.function = function
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Calls the layer as it was called, but for this tensor."""
        return self.function(x)


def calls_of_layers(
    network: keras.Layer, taken: signature.Taken, training: bool
) -> Iterator[tuple[keras.Operation, keras.Layer, tf.Tensor]]:
    """Every call of a layer in one forward pass, inner ones first, once for each tensor it took.

    Args:
        network: The network.
        taken: What it takes.
        training: Whether it runs in training mode.

    Yields:
        The layer; a function of one of the tensors that it took, `[B, ...]` to `[B, n]`; and that
        tensor, in at least float32.
    """
    size = taken.x.shape[0]
    recorded: list[tuple[keras.Operation, Any]] = []

    def recording(operation: keras.Operation, call: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            recorded.append((operation, (args, kwargs)))
            return outputs

        return record

    operations = {id(layer): layer for layer in _keras.layers_of(network)}
    for model in list(operations.values()):
        # A functional model also holds what keras.ops did to its symbolic tensors.
        operations.update({id(found): found for found in getattr(model, "operations", [])})
    with contextlib.ExitStack() as stack:
        for operation in operations.values():
            # A layer after `quantize("int8")` is called by its second name.
            for name in ("call", "quantized_call"):
                own = getattr(operation, name, None)
                if own is not None:
                    stack.enter_context(
                        frozen.substituted(operation, name, recording(operation, own))
                    )
        with frozen.without_trace(network):
            network(taken.packed(), training=training)

    def is_batch(a: Any) -> bool:
        # Tensors of a loop's own graph are gone by now: the layer around the loop answers for it.
        return (
            isinstance(a, tf.Tensor)
            and hasattr(a, "numpy")
            and a.dtype.is_floating
            and a.shape.rank > 0
            and a.shape[0] == size
        )

    for operation, taken_by in recorded:
        flat = tf.nest.flatten(taken_by)
        for position in range(len(flat)):
            if not is_batch(flat[position]):
                continue

            def function(
                a: tf.Tensor,
                operation: keras.Operation = operation,
                taken_by: Any = taken_by,
                flat: list[Any] = flat,
                position: int = position,
            ) -> tf.Tensor:
                own = tf.cast(a, flat[position].dtype)
                changed = [*flat[:position], own, *flat[position + 1 :]]
                args, kwargs = tf.nest.pack_sequence_as(taken_by, changed)
                outputs = tf.nest.flatten(operation(*args, **kwargs))
                parts = [tf.reshape(tf.cast(y, a.dtype), (size, -1)) for y in outputs]
                return tf.concat(parts, axis=1)

            value = flat[position]
            if value.dtype.size < 4:
                value = tf.cast(value, tf.float32)
            yield operation, _AtOneInput(operation, function), value
