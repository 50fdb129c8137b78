"""Every call of a layer in a forward pass, as a function that can be run again on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfjacreg import _keras, recording, rewrites, signature

# Entries of Keras' layer configs that say how large something is, or how its weights begin.
_SIZES = (
    *("filters", "units", "rate", "target_shape", "kernel_initializer", "bias_initializer"),
    *("beta_initializer", "gamma_initializer", "pointwise_initializer", "depthwise_initializer"),
)


class LayerCall:
    """One call of a layer: the layer and what it was called with.

    Attributes:
        layer: The layer, or the operation of a functional model.
        caller: The layer that called it, or None.
        size: The number of examples.
        positions: The indices of those tensors that are a batch of floats, among all that it took:
            the layer is a function of these. A tensor that was passed several times, as in
            self-attention, counts once. Tensors inside the graph of a loop no longer exist; they
            are covered by the layer around the loop.
    """

    def __init__(
        self,
        layer: keras.Operation,
        caller: keras.Operation | None,
        args: Any,
        kwargs: Any,
        size: int,
    ) -> None:
        self.layer = layer
        self.caller = caller
        self.size = size
        self._taken = args, kwargs
        self._flat = tf.nest.flatten(self._taken)
        # The first position of each tensor.
        ids = [id(a) for a in self._flat]
        self._firsts = [ids.index(one) for one in ids]
        self.positions = [n for n in sorted(set(self._firsts)) if self._is_batch(self._flat[n])]

    def _is_batch(self, a: Any) -> bool:
        return (
            isinstance(a, tf.Tensor)
            and hasattr(a, "numpy")
            and a.dtype.is_floating
            and a.shape.rank > 0
            and a.shape[0] == self.size
        )

    def value(self, position: int) -> tf.Tensor:
        """The tensor at this position, `[B, ...]`, in at least float32."""
        value = self._flat[position]
        return tf.cast(value, tf.float32) if value.dtype.size < 4 else value

    def others(self, position: int) -> list[tf.Tensor]:
        """The batches of floats at the other positions, each in its own dtype."""
        return [self._flat[n] for n in self.positions if n != position]

    def function(self, position: int, *, in_double: bool = False) -> keras.Layer:
        """The layer as a function of the tensor at one position, `[B, ...]` to `[B, n]`.

        The function accepts a batch `k` times as large: the other tensors are then repeated.

        Args:
            position: One of `positions`.
            in_double: Whether all other floating tensors are passed as float64 too.
        """

        def run(a: tf.Tensor) -> tf.Tensor:
            repeats = (a.shape[0] or self.size) // self.size
            flat = [self._as_given(other, in_double, repeats) for other in self._flat]
            given = a if in_double else tf.cast(a, self._flat[position].dtype)
            flat = [given if self._firsts[n] == position else b for n, b in enumerate(flat)]
            args, kwargs = tf.nest.pack_sequence_as(self._taken, flat)
            outputs = tf.nest.flatten(self.layer(*args, **kwargs))
            parts = [tf.reshape(tf.cast(y, a.dtype), (repeats * self.size, -1)) for y in outputs]
            return tf.concat(parts, axis=1)

        # Not the layer's policy: a quantized policy asks for methods that only the layer has.
        dtype = "float64" if in_double else getattr(self.layer, "compute_dtype", None)
        return _Function(self.layer, run, dtype)

    def _as_given(self, a: Any, in_double: bool, repeats: int) -> Any:
        if not isinstance(a, tf.Tensor):
            return a
        if in_double and a.dtype.is_floating:
            a = tf.cast(a, tf.float64)
        if repeats > 1 and a.shape.rank and a.shape[0] == self.size:
            a = tf.concat([a] * repeats, axis=0)
        return a

    @property
    def is_part(self) -> bool:
        """Whether the layer is a Keras layer inside another Keras layer that is not a model."""
        return (
            self.caller is not None
            and not isinstance(self.caller, keras.Model)
            and _is_of_keras(self.caller)
            and self.is_of_keras
        )

    @property
    def is_of_keras(self) -> bool:
        """Whether all code of the layer is Keras' code."""
        return _is_of_keras(self.layer)

    def kind(self, position: int) -> Any:
        """A dictionary key that is equal for calls that one check covers.

        For a Keras layer it is made of the class and configuration. Sizes are included if the
        layer's code depends on them: which axes have size 1, and for a pooling, whose windows may
        or may not divide the image, all sizes. A custom layer may do anything, so each is a kind of
        its own.
        """
        if not self.is_of_keras:
            return id(self.layer), position
        try:
            config = self.layer.get_config()
        except Exception:  # An operation with arguments that Keras cannot serialize.
            return id(self.layer), position
        is_pooling = "pool_size" in config or "output_size" in config
        for name in ("name", *([] if is_pooling else _SIZES)):
            config.pop(name, None)
        taken = [
            (a.dtype, a.shape if is_pooling else [size == 1 for size in a.shape[1:]])
            if isinstance(a, tf.Tensor)
            else a
            for a in self._flat
        ]
        # The config has only the name of a custom function.
        own = getattr(self.layer, "activation", None)
        # With one tensor in two places the layer is another function than with two tensors.
        return type(self.layer), str(config), str(taken), str(self._firsts), id(own), position


def _is_of_keras(layer: keras.Operation) -> bool:
    is_keras = type(layer).__module__.startswith("keras.")
    return is_keras and not isinstance(layer, keras.layers.Lambda)


class _Function(keras.Layer):
    """A layer as a function of one of the tensors that it was called with."""

    def __init__(
        self,
        layer: keras.Operation,
        function: Callable[[tf.Tensor], tf.Tensor],
        dtype: Any,
    ) -> None:
        super().__init__(name="one_call", dtype=dtype, autocast=False)
        self.layer = layer
        self.function = function
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Calls the layer with what it was called with, except for this tensor."""
        return self.function(x)


def calls_of_layers(
    network: keras.Layer, given: signature.NetworkInput, training: bool
) -> list[LayerCall]:
    """Every call of a layer in one forward pass, inner calls first.

    Args:
        network: The network.
        given: What the network takes.
        training: Whether the network runs in training mode.
    """
    size = given.x.shape[0]
    calls: list[LayerCall] = []
    callers: list[keras.Operation | None] = [None]

    def noted(layer: keras.Operation) -> Callable[..., Any]:
        def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            callers.append(layer)
            outputs = original(*args, **kwargs)
            callers.pop()
            calls.append(LayerCall(layer, callers[-1], args, kwargs, size))
            return outputs

        return call

    operations = {id(layer): layer for layer in _keras.layers_of(network)}
    for model in list(operations.values()):
        # A functional model also holds the operations that keras.ops made on symbolic tensors.
        operations.update({id(found): found for found in getattr(model, "operations", [])})
    places = [
        rewrites.Place(operation, name, noted(operation))
        for operation in operations.values()
        # A layer after `quantize("int8")` is called by its second name.
        for name in ("call", "quantized_call")
        if getattr(operation, name, None) is not None
    ]

    def forward() -> None:
        with recording.without_trace(network):
            network(given.packed(), training=training)

    rewrites.while_replaced(places, forward)
    return calls
