"""Grouped convolutions written so that TensorFlow differentiates them quickly, and often.

Keras compiles a grouped convolution with XLA, whose derivatives on a CPU take many times as long as
those of the same map as a depthwise convolution, or as one convolution for each group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tfjacreg.rewrites.context import Place


def grouped_convolution(layer: keras.Layer) -> list[Place]:
    """What stands in for the `convolution_op` of a layer: its values agree to rounding.

    Args:
        layer: Any layer.

    Returns:
        Nothing if the layer is no grouped convolution, has a `convolution_op` of its own, or keeps
        the channels first, which TensorFlow on a CPU convolves through XLA only.
    """
    kind = next(
        (
            k
            for k in (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
            if isinstance(layer, k)
        ),
        None,
    )
    if (
        kind is None
        or type(layer).convolution_op is not kind.convolution_op
        or layer.groups == 1
        or layer.data_format != "channels_last"
    ):
        return []

    def convolution(
        original: Callable[..., Any], inputs: tf.Tensor, kernel: tf.Tensor
    ) -> tf.Tensor:
        return _convolution(layer, inputs, kernel)

    return [Place(layer, "convolution_op", convolution)]


def _convolution(layer: keras.Layer, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    settings = {
        "strides": layer.strides,
        "padding": layer.padding,
        "data_format": layer.data_format,
        "dilation_rate": layer.dilation_rate,
    }
    is_depthwise = layer.groups == inputs.shape[-1] and layer.rank == 2
    # TensorFlow has no depthwise convolution with another stride along each axis.
    if is_depthwise and len(set(layer.strides)) == 1:
        shape = (*layer.kernel_size, layer.groups, layer.filters // layer.groups)
        return ops.depthwise_conv(inputs, ops.reshape(kernel, shape), **settings)
    inputs, kernel = (ops.split(tensor, layer.groups, -1) for tensor in (inputs, kernel))
    pairs = zip(inputs, kernel, strict=True)
    return ops.concatenate([ops.conv(*pair, **settings) for pair in pairs], -1)
