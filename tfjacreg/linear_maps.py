"""The linear map `W^l` of each layer, for `SpectralBound`, `spectral_bound` and `WeightDecay`.

See Section 2 of the paper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import layers, ops

from tfjacreg import _keras


class LinearMap:
    """The linear part of one layer at the size of its input, as a batch of one map.

    Attributes:
        layer: The layer.
        x: Zeros of the shape of the layer's input, `[1, *in]`, in the dtype of its variables or, if
            that is half precision, in float32.
        primal: Zeros of the shape of its output, `[1, *out]`: estimators need only the shape.
    """

    def __init__(self, layer: keras.Layer, apply: Callable[[Any], Any]) -> None:
        self.layer = layer
        self._apply = apply
        self.x = _zeros(layer)
        self.primal = tf.zeros_like(apply(self.x))

    def matvec(self, v: tf.Tensor) -> tf.Tensor:
        """Returns `W v`, `[1, *out]`."""
        return self._apply(v)

    def rmatvec(self, u: tf.Tensor) -> tf.Tensor:
        """Returns `W^T u`, `[1, *in]`: the gradient of `<u, W x>`, at any x."""
        with tf.GradientTape() as tape:
            tape.watch(self.x)
            y = self._apply(self.x)
        return tape.gradient(y, self.x, output_gradients=u)


def layer_maps(network: keras.Layer) -> list[LinearMap]:
    """The maps of the layers of `network` that multiply by a kernel, in any topology.

    Raises:
        ValueError: If there is none, if another layer than BatchNorm has trainable weights and no
            known linear map, or if the input size of a layer is not known.
    """
    maps = []
    for layer in _leaves(network):
        is_norm = isinstance(layer, layers.BatchNormalization)
        maps += _known_maps(layer, [] if is_norm else layer.trainable_variables)
    if not maps:
        raise ValueError(f"`network` has no layer with a kernel. Received: {network.name}")
    return maps


def chained_maps(network: keras.Layer) -> list[LinearMap]:
    """The maps of a network that is one chain of layers, including those of normalizations.

    Raises:
        ValueError: If the network branches, runs an operation that is not a layer, or has no known
            order; if a layer has weights and no known linear map, or an unknown input size.
    """
    maps = []
    for layer in _steps(network):
        kind = next((kind for kind in _ELEMENTWISE if isinstance(layer, kind)), None)
        if kind is None:
            maps += _known_maps(layer, layer.weights)
        elif not _is_map_of(layer, kind):
            raise _unknown(layer)
        else:
            maps.append(_ELEMENTWISE[kind](layer))
    return maps


def _steps(network: keras.Layer) -> list[keras.Layer]:
    """The layers of a chain in order, each as often as it runs, including those nested deeper."""
    if not hasattr(network, "layers"):
        return [network]
    graph = _keras.graph_of(network)
    if graph is None:
        raise ValueError(
            "The order of the layers must be known: build the network from keras.Input, as a "
            f"Sequential or functional model. Received: {network.name!r}, which has no known input"
        )
    branches = (
        "The product of the layers' norms bounds the Jacobian of a chain of layers, not of a "
        "network that branches. Received: "
    )
    if len(graph.outputs) > 1:
        raise ValueError(f"{branches}{network.name!r} with {len(graph.outputs)} outputs")
    steps = []
    for node in _keras.nodes_in_order(graph):
        step, inputs = node.operation, len(node.input_tensors)
        what = f"{step.name!r} ({type(step).__name__})"
        if inputs > 1:
            raise ValueError(f"{branches}{what} with {inputs} inputs")
        if not isinstance(step, keras.Layer):
            raise ValueError(
                "The norm of an operation that is not a Keras layer is not known: use a layer, "
                f"such as keras.layers.ReLU for keras.ops.relu. Received: {what}"
            )
        steps += _steps(step)
    return steps


def trainable_kernels(network: keras.Layer) -> list[keras.Variable]:
    """The trainable kernels of `network`, without biases, scales or offsets.

    Raises:
        ValueError: If there is none.
    """
    found = [v for v in network.trainable_variables if v.name.endswith("kernel")]
    if not found:
        raise ValueError(f"`network` has no trainable kernel. Received: {network.name}")
    return found


def _leaves(network: keras.Layer) -> list[keras.Layer]:
    """The layers that hold no others, in the order in which the network holds them."""
    inner = list(getattr(network, "layers", ()))
    if not inner:
        return [network]
    return [leaf for layer in inner for leaf in _leaves(layer)]


def _known_maps(layer: keras.Layer, weights: list[keras.Variable]) -> list[LinearMap]:
    """The map of `layer` in a list, which is empty for a layer without a map and `weights`."""
    linear_map = _linear_map(layer)
    if linear_map is not None:
        return [linear_map]
    if weights:
        raise _unknown(layer)
    return []


def _unknown(layer: keras.Layer) -> ValueError:
    return ValueError(
        "The linear map of this layer is not known; known are Dense, EinsumDense, Conv1D to "
        "3D, their transposes, and depthwise convolutions. A subclass whose `call` or "
        "`convolution_op` is its own counts as another layer, and so does a quantized one. "
        f"Received: layer {layer.name!r} ({type(layer).__name__})"
    )


def _is_map_of(layer: keras.Layer, kind: type[keras.Layer]) -> bool:
    """Whether a layer computes what its class of Keras computes, with its kernel as it is."""
    # With LoRA, `kernel` is the sum; of a quantized layer it is what is stored.
    return layer.dtype_policy.quantization_mode is None and all(
        getattr(type(layer), name, None) is getattr(kind, name, None)
        for name in ("call", "convolution_op")
    )


def _linear_map(layer: keras.Layer) -> LinearMap | None:
    for kind, apply in _MAPS.items():
        if isinstance(layer, kind) and _is_map_of(layer, kind):
            return LinearMap(layer, functools.partial(apply, layer))
    return None


def _convolve(layer: keras.Layer, x: Any) -> Any:
    padding = layer.padding
    if padding == "causal":
        before = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
        time = 2 if layer.data_format == "channels_first" else 1
        x = ops.pad(x, [(before, 0) if axis == time else (0, 0) for axis in range(3)])
        padding = "valid"
    strides = list(layer.strides)
    if max(layer.kernel_size) == 1 and layer.data_format == "channels_last":
        # Strided slices instead of strides: for a single example, as here, the kernel's gradient of
        # a strided 1x1 convolution makes TensorFlow's oneDNN write beyond its memory.
        x = x[(slice(None), *(slice(None, None, stride) for stride in strides))]
        strides = [1] * len(strides)
    return ops.conv(
        x,
        _kernel(layer, x),
        strides=strides,
        padding=padding,
        data_format=layer.data_format,
        dilation_rate=layer.dilation_rate,
    )


def _convolve_by_channel(layer: keras.Layer, x: Any) -> Any:
    return ops.depthwise_conv(
        x,
        _kernel(layer, x),
        strides=layer.strides,
        padding=layer.padding,
        data_format=layer.data_format,
        dilation_rate=layer.dilation_rate,
    )


def _convolve_transposed(layer: keras.Layer, x: Any) -> Any:
    return ops.conv_transpose(
        x,
        _kernel(layer, x),
        strides=list(layer.strides),
        padding=layer.padding,
        output_padding=layer.output_padding,
        data_format=layer.data_format,
        dilation_rate=layer.dilation_rate,
    )


# What each layer that multiplies by a kernel does, without its bias and activation.
_MAPS: dict[type[keras.Layer], Callable[[keras.Layer, Any], Any]] = {
    layers.Dense: lambda layer, x: ops.matmul(x, _kernel(layer, x)),
    layers.EinsumDense: lambda layer, x: ops.einsum(layer.equation, x, _kernel(layer, x)),
    **dict.fromkeys((layers.Conv1D, layers.Conv2D, layers.Conv3D), _convolve),
    **dict.fromkeys((layers.DepthwiseConv1D, layers.DepthwiseConv2D), _convolve_by_channel),
    **dict.fromkeys(
        (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose),
        _convolve_transposed,
    ),
}


def _batch_norm_map(layer: keras.Layer) -> LinearMap:
    zeros = _zeros(layer)
    scale = tf.math.rsqrt(tf.cast(layer.moving_variance.value, zeros.dtype) + layer.epsilon)
    if layer.scale:
        scale *= tf.cast(layer.gamma.value, zeros.dtype)
    shape = [1] * len(zeros.shape)
    shape[layer.axis] = -1
    scale = tf.reshape(scale, shape)
    return LinearMap(layer, lambda x: x * scale)


def _slope_map(layer: keras.Layer) -> LinearMap:
    """The map of a layer that scales and shifts every element."""
    zeros = _zeros(layer)
    slope = tf.cast(layer(tf.ones_like(zeros)) - layer(zeros), zeros.dtype)
    return LinearMap(layer, lambda x: x * slope)


_ELEMENTWISE: dict[type[keras.Layer], Callable[[keras.Layer], LinearMap]] = {
    layers.BatchNormalization: _batch_norm_map,
    layers.Normalization: _slope_map,
    layers.Rescaling: _slope_map,
}


def _zeros(layer: keras.Layer) -> tf.Tensor:
    """One example of zeros in the shape of a layer's input, in at least float32."""
    dtype = tf.as_dtype(layer.variable_dtype)
    return tf.zeros((1, *_input_shape(layer)), tf.float32 if dtype.size < 4 else dtype)


def _kernel(layer: keras.Layer, x: Any) -> tf.Tensor:
    return tf.cast(layer.kernel, x.dtype)


def _input_shape(layer: keras.Layer) -> tuple[int, ...]:
    shapes = _keras.input_shapes(layer) if layer.built else set()
    if not shapes:
        raise ValueError(
            "A layer's norm depends on the size of its input: build the network with keras.Input "
            f"of a full shape first. Received: layer {layer.name!r}, which has no known input"
        )
    if len(shapes) > 1 or None in next(iter(shapes)):
        raise ValueError(
            "A layer's norm depends on the size of its input, which must be one known size. "
            f"Received: layer {layer.name!r} with input shapes {sorted(map(str, shapes))}"
        )
    (shape,) = shapes
    return shape
