"""Grouped convolutions, written so that TensorFlow differentiates them quickly.

Keras compiles a grouped convolution with XLA. On a CPU its derivatives take many times as long as
those of the same map written as a depthwise convolution, or as one convolution for each group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tfjacreg.rewrites.context import Place


def grouped_convolution(layer: keras.Layer) -> list[Place]:
    """The replacement for the convolution of a layer; its values agree to rounding.

    Args:
        layer: Any layer.

    Returns:
        Nothing if the layer is not a grouped convolution, overrides the method that would be
        replaced, or has its channels first, which TensorFlow on a CPU convolves only through XLA.
    """
    for kind, name, replacement in _KINDS:
        if (
            isinstance(layer, kind)
            and getattr(type(layer), name) is getattr(kind, name)
            and layer.groups > 1
            and layer.data_format == "channels_last"
        ):
            return [Place(layer, name, functools.partial(replacement, layer))]
    return []


def _call(layer: keras.Layer, original: Callable[..., Any], inputs: tf.Tensor) -> tf.Tensor:
    """Replaces the call of a Conv1D, which does not use its `convolution_op`."""
    padding = layer.padding
    if padding == "causal":
        before = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
        inputs, padding = ops.pad(inputs, [[0, 0], [before, 0], [0, 0]]), "valid"
    outputs = _convolution(layer, inputs, layer.kernel, padding)
    if layer.use_bias:
        outputs = ops.add(outputs, ops.reshape(layer.bias, (1, 1, layer.filters)))
    return outputs if layer.activation is None else layer.activation(outputs)


def _convolution_op(
    layer: keras.Layer, original: Callable[..., Any], inputs: tf.Tensor, kernel: tf.Tensor
) -> tf.Tensor:
    return _convolution(layer, inputs, kernel, layer.padding)


def _convolution(
    layer: keras.Layer, inputs: tf.Tensor, kernel: tf.Tensor, padding: str
) -> tf.Tensor:
    settings = {
        "strides": layer.strides,
        "padding": padding,
        "data_format": layer.data_format,
        "dilation_rate": layer.dilation_rate,
    }
    is_depthwise = layer.groups == inputs.shape[-1] and layer.rank == 2
    # TensorFlow has no depthwise convolution with different strides along the axes.
    if is_depthwise and len(set(layer.strides)) == 1:
        shape = (*layer.kernel_size, layer.groups, layer.filters // layer.groups)
        return ops.depthwise_conv(inputs, ops.reshape(kernel, shape), **settings)
    inputs, kernel = (ops.split(tensor, layer.groups, -1) for tensor in (inputs, kernel))
    pairs = zip(inputs, kernel, strict=True)
    return ops.concatenate([ops.conv(*pair, **settings) for pair in pairs], -1)


_KINDS: tuple[tuple[type[keras.Layer], str, Callable[..., tf.Tensor]], ...] = (
    (keras.layers.Conv1D, "call", _call),
    (keras.layers.Conv2D, "convolution_op", _convolution_op),
    (keras.layers.Conv3D, "convolution_op", _convolution_op),
)
