"""Small networks over all layer families, the same on every backend of Keras.

`second_derivatives.py` compares the penalty and its gradient on them with TensorFlow and with JAX,
so this module imports neither. Weights and inputs are drawn by NumPy from a seed made of the
network's name: generic numbers, away from the ties and kinks at which derivatives jump. A Dense
layer with tanh comes before and after most layers: the gradient of the weights before depends on
the layer's second derivative, the gradient of the weights after it on its first.
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import activations, layers, ops

Make = Callable[[], Any]


class Network(NamedTuple):
    """One network of the comparison.

    Attributes:
        family: The layers it is there for.
        make: Makes it, with weights as Keras draws them.
        batch: How many examples.
        training: Whether it runs in training mode.
    """

    family: str
    make: Make
    batch: int = 2
    training: bool = False


NETWORKS: dict[str, Network] = {}


def build(name: str) -> keras.Model:
    """The network of that name with its weights, in the current floating type."""
    network = NETWORKS[name].make()
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for weight in network.weights:
        if "float" in keras.backend.standardize_dtype(weight.dtype):
            weight.assign(_values(weight.name, tuple(weight.shape), rng))
    return network


def _values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Generic values that suit a weight's part."""
    if name in ("moving_variance", "variance"):
        return rng.uniform(0.5, 2.0, shape)
    normal = rng.normal(size=shape)
    if name in ("gamma", "scale"):
        return 1 + 0.3 * normal
    if len(shape) > 1:
        return 1.2 * normal / np.sqrt(np.prod(shape[:-1]))
    return 0.3 * normal


def inputs(name: str, network: keras.Model) -> np.ndarray:
    """Its examples, `[B, *in]`, float64."""
    rng = np.random.default_rng(zlib.crc32(name.encode()) + 1)
    return rng.normal(size=(NETWORKS[name].batch, *network.input_shape[1:]))


def digest(network: keras.Model, x: np.ndarray) -> int:
    """A number that tells whether two backends have the same weights and inputs."""
    weights = [np.array(w) for w in network.weights]
    found = zlib.crc32(np.ascontiguousarray(x, "<f8").tobytes())
    for weight in weights:
        if weight.dtype == np.float64:
            found = zlib.crc32(np.ascontiguousarray(weight, "<f8").tobytes(), found)
    return found


def file_name(name: str) -> str:
    """Of the reference of a network."""
    return f"{name.replace('/', '-').replace(':', '')}.npz"


def _add(family: str, name: str, make: Make, **options: Any) -> None:
    if name in NETWORKS:
        raise ValueError(f"Two networks are named {name!r}")
    NETWORKS[name] = Network(family, make, **options)


def _around(shape: tuple[int, ...], *makes: Make, first: int = 4) -> Make:
    """Dense, tanh; the layers; Dense, tanh, to three outputs."""

    def make() -> keras.Model:
        start = keras.Input(shape)
        x = layers.Dense(first, "tanh", name="before")(start)
        for layer in makes:
            x = layer()(x)
        x = layers.Flatten()(x)
        return keras.Model(start, layers.Dense(3, "tanh", name="behind")(x))

    return make


def _joined(shape: tuple[int, ...], number: int, join: Callable[[list[Any]], Any]) -> Make:
    """Several Dense branches of one input; `join` of them; Dense, tanh, to three outputs."""

    def make() -> keras.Model:
        start = keras.Input(shape)
        x = join([layers.Dense(4, "tanh")(start) for _ in range(number)])
        return keras.Model(start, layers.Dense(3, "tanh")(layers.Flatten()(x)))

    return make


def _join(make: Make, tensors: list[Any]) -> Any:
    return make()(tensors)


def _plain(*makes: Make) -> Make:
    return lambda: keras.Sequential([make() for make in makes])


def _dense() -> None:
    family, vector = "Dense, EinsumDense", (5,)
    _add(family, "Dense", _around(vector))
    _add(family, "Dense, no bias", _around(vector, lambda: layers.Dense(4, use_bias=False)))
    _add(family, "Dense, four deep", _around(vector, *4 * [lambda: layers.Dense(4, "tanh")]))
    more = _plain(
        *(lambda: keras.Input((3,)), lambda: layers.Dense(6, "tanh")),
        lambda: layers.Dense(7, "tanh"),
    )
    _add(family, "Dense, more outputs than inputs", more)
    one = _plain(
        *(lambda: keras.Input((5,)), lambda: layers.Dense(6, "tanh")),
        lambda: layers.Dense(1, "softplus"),
    )
    _add(family, "Dense, one output", one)
    _add(
        family,
        "EinsumDense",
        _around((3, 4), lambda: layers.EinsumDense("abc,cde->abde", (3, 2, 3), bias_axes="e")),
    )
    _add(
        family,
        "EinsumDense over two axes",
        _around((3, 4), lambda: layers.EinsumDense("abc,bcd->ad", (5,), activation="tanh")),
    )
    tied = _calls(lambda x: ops.matmul(x, ops.transpose(ops.tanh(x), (0, 2, 1))))
    _add(family, "matmul of two activations", _around((3, 4), tied))


class _Call(layers.Layer):
    """A function as a layer, on either backend."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def call(self, x: Any) -> Any:
        return self.function(x)


def _activations() -> None:
    """All of keras.activations, and the layers of them."""
    family = "activations"
    for name in sorted(vars(activations)):
        function = getattr(activations, name)
        if name.startswith("_") or not callable(function) or name in _NOT_ACTIVATIONS:
            continue
        if name in ("softmax", "log_softmax", "sparsemax", "glu"):
            _add(family, name, _around((5,), _calls(function), first=6))
        elif name == "threshold":
            _add(family, name, _around((5,), _calls(_threshold), first=6))
        else:
            # Two in a row: the second one's argument is no longer within (-1, 1).
            spread = _calls(lambda x: 2.5 * x)
            twice = [spread, _calls(function), lambda: layers.Dense(4), _calls(function)]
            _add(family, name, _around((5,), *twice, first=6))
    family = "activation layers"
    for name, make in {
        "ReLU": layers.ReLU,
        "ReLU with slope, threshold and maximum": lambda: layers.ReLU(0.75, 0.125, 0.0625),
        "LeakyReLU": lambda: layers.LeakyReLU(0.25),
        "PReLU": layers.PReLU,
        "PReLU, shared": lambda: layers.PReLU(shared_axes=[1]),
        "ELU": lambda: layers.ELU(0.7),
        "Softmax": layers.Softmax,
        "Softmax over two axes": lambda: layers.Softmax(axis=(1, 2)),
        "Activation": lambda: layers.Activation("gelu"),
    }.items():
        _add(family, f"{name} layer", _around((3, 4), make))


def _threshold(x: Any) -> Any:
    return activations.threshold(x, -0.2, 0.3)


_NOT_ACTIVATIONS = ("get", "serialize", "deserialize")


def _calls(function: Callable[[Any], Any]) -> Make:
    return lambda: _Call(function)


def _convolutions() -> None:
    row, image, volume = (8, 3), (6, 5, 3), (4, 4, 3, 2)
    family = "convolutions"
    for name, shape, make in (
        ("Conv1D", row, lambda: layers.Conv1D(3, 3)),
        ("Conv1D, strides 2", row, lambda: layers.Conv1D(3, 3, strides=2, padding="same")),
        ("Conv1D, causal, dilated", row, lambda: layers.Conv1D(3, 2, 1, "causal", dilation_rate=2)),
        ("Conv1D, groups", row, lambda: layers.Conv1D(4, 3, groups=2)),
        ("Conv2D", image, lambda: layers.Conv2D(3, 3)),
        ("Conv2D, same", image, lambda: layers.Conv2D(3, (3, 2), padding="same")),
        ("Conv2D, strides 2", image, lambda: layers.Conv2D(3, 3, strides=2, activation="tanh")),
        ("Conv2D, strides, same", image, lambda: layers.Conv2D(3, 3, (2, 2), "same")),
        ("Conv2D, dilated", image, lambda: layers.Conv2D(3, 2, dilation_rate=2)),
        ("Conv2D, groups", image, lambda: layers.Conv2D(4, 3, groups=2, activation="tanh")),
        ("Conv2D, a group per channel", image, lambda: layers.Conv2D(4, 2, groups=4)),
        ("Conv2D 1x1, no bias", image, lambda: layers.Conv2D(3, 1, use_bias=False)),
        ("Conv3D", volume, lambda: layers.Conv3D(2, 2)),
        ("Conv3D, strides, same", volume, lambda: layers.Conv3D(2, 3, 2, "same")),
        ("Conv3D, groups", volume, lambda: layers.Conv3D(4, 2, groups=2)),
    ):
        _add(family, name, _around(shape, make))
    family = "depthwise, separable"
    for name, shape, make in (
        ("DepthwiseConv1D", row, lambda: layers.DepthwiseConv1D(3, depth_multiplier=2)),
        ("DepthwiseConv1D, strides 2", row, lambda: layers.DepthwiseConv1D(3, 2, "same")),
        ("DepthwiseConv2D", image, lambda: layers.DepthwiseConv2D(3, activation="tanh")),
        ("DepthwiseConv2D, strides 2", image, lambda: layers.DepthwiseConv2D(3, 2, "same", 2)),
        ("DepthwiseConv2D, dilated", image, lambda: layers.DepthwiseConv2D(2, dilation_rate=2)),
        ("SeparableConv1D", row, lambda: layers.SeparableConv1D(3, 3)),
        ("SeparableConv2D", image, lambda: layers.SeparableConv2D(3, 3, activation="tanh")),
        ("SeparableConv2D, strides 2", image, lambda: layers.SeparableConv2D(3, 3, 2, "same")),
        ("SeparableConv2D, dilated", image, lambda: layers.SeparableConv2D(3, 2, dilation_rate=2)),
    ):
        _add(family, name, _around(shape, make))
    family = "transposed convolutions"
    for name, shape, make in (
        ("Conv1DTranspose", row, lambda: layers.Conv1DTranspose(2, 3, strides=2)),
        ("Conv1DTranspose, same", row, lambda: layers.Conv1DTranspose(2, 3, 2, "same")),
        ("Conv1DTranspose, dilated", row, lambda: layers.Conv1DTranspose(2, 2, dilation_rate=2)),
        ("Conv2DTranspose", (3, 4, 2), lambda: layers.Conv2DTranspose(2, 3, strides=2)),
        ("Conv2DTranspose, same", (3, 4, 2), lambda: layers.Conv2DTranspose(2, 3, 2, "same")),
        ("Conv2DTranspose, strides 1", (3, 4, 2), lambda: layers.Conv2DTranspose(2, 3)),
        ("Conv2DTranspose, dilated", (3, 4, 2), lambda: layers.Conv2DTranspose(2, 2, 1, **_TWO)),
        ("Conv3DTranspose", (2, 3, 2, 2), lambda: layers.Conv3DTranspose(2, 2, strides=2)),
        ("Conv3DTranspose, same", (2, 3, 2, 2), lambda: layers.Conv3DTranspose(2, 3, 2, "same")),
    ):
        _add(family, name, _around(shape, make))


_TWO: dict[str, Any] = {"dilation_rate": 2}


def _sizes() -> None:
    row, image, volume = (7, 3), (6, 5, 3), (4, 4, 3, 2)
    family = "UpSampling, Resizing"
    methods = ("nearest", "bilinear", "bicubic", "lanczos3", "lanczos5")
    _add(family, "UpSampling1D", _around(row, lambda: layers.UpSampling1D(2)))
    _add(family, "UpSampling3D", _around((2, 3, 2, 2), lambda: layers.UpSampling3D((2, 1, 2))))
    for method in methods:
        up = partial(layers.UpSampling2D, (2, 3), interpolation=method)
        _add(family, f"UpSampling2D, {method}", _around((3, 4, 2), up))
        for what, size in (("larger", (9, 8)), ("smaller", (4, 3))):
            resize = partial(layers.Resizing, *size, interpolation=method)
            _add(family, f"Resizing, {method}, {what}", _around(image, resize))
    for option in ("crop_to_aspect_ratio", "pad_to_aspect_ratio"):
        resize = partial(layers.Resizing, 4, 8, **{option: True})
        _add(family, f"Resizing, {option}", _around((6, 6, 2), resize))
    family = "cropping, padding, shapes"
    for name, shape, make in (
        ("Cropping1D", row, lambda: layers.Cropping1D((1, 2))),
        ("Cropping2D", image, lambda: layers.Cropping2D(((1, 2), (0, 1)))),
        ("Cropping3D", volume, lambda: layers.Cropping3D(((1, 0), (0, 1), (1, 0)))),
        ("CenterCrop", image, lambda: layers.CenterCrop(4, 3)),
        ("ZeroPadding1D", row, lambda: layers.ZeroPadding1D((1, 2))),
        ("ZeroPadding2D", image, lambda: layers.ZeroPadding2D(((1, 2), (0, 1)))),
        ("ZeroPadding3D", (2, 3, 2, 2), lambda: layers.ZeroPadding3D(1)),
        ("Permute", image, lambda: layers.Permute((3, 1, 2))),
        ("Reshape", image, lambda: layers.Reshape((5, 24))),
        ("RepeatVector", (5,), lambda: layers.RepeatVector(3)),
        ("Rescaling", row, lambda: layers.Rescaling(2.0, 0.125)),
        ("Identity", row, layers.Identity),
        ("Masking", row, lambda: layers.Masking(0.5)),
    ):
        # A Dense layer between: shapes alone have no second derivative.
        _add(family, name, _around(shape, make, lambda: layers.Dense(3, "tanh"), _NoMask))


def _pooling() -> None:
    row, image, volume = (7, 3), (6, 5, 3), (4, 5, 3, 2)
    family = "pooling"
    for name, shape, make in (
        ("MaxPooling1D", row, lambda: layers.MaxPooling1D(2)),
        ("MaxPooling2D", image, lambda: layers.MaxPooling2D(2)),
        ("MaxPooling2D, overlapping", image, lambda: layers.MaxPooling2D(3, 1, "same")),
        # TensorFlow on a CPU has neither in float64, except averages under XLA.
        ("AveragePooling3D in float32", volume, lambda: layers.AveragePooling3D(2, **_FLOAT32)),
        ("MaxPooling3D in float32", volume, lambda: layers.MaxPooling3D(2, **_FLOAT32)),
        ("AveragePooling1D", row, lambda: layers.AveragePooling1D(2)),
        ("AveragePooling2D", image, lambda: layers.AveragePooling2D(2)),
        ("AveragePooling2D, overlapping", image, lambda: layers.AveragePooling2D(3, 1, "same")),
        ("AveragePooling3D", volume, lambda: layers.AveragePooling3D(2)),
        ("GlobalAveragePooling1D", row, layers.GlobalAveragePooling1D),
        ("GlobalAveragePooling2D", image, lambda: layers.GlobalAveragePooling2D(keepdims=True)),
        ("GlobalAveragePooling3D", volume, layers.GlobalAveragePooling3D),
        ("GlobalMaxPooling1D", row, layers.GlobalMaxPooling1D),
        ("GlobalMaxPooling2D", image, lambda: layers.GlobalMaxPooling2D(keepdims=True)),
        ("GlobalMaxPooling3D", volume, layers.GlobalMaxPooling3D),
    ):
        _add(family, name, _around(shape, make))
    family = "adaptive pooling"
    for kind in ("Average", "Max"):
        for rank, shape, size in ((1, row, 3), (2, image, (3, 2)), (3, volume, (2, 3, 2))):
            # Keras has them from 3.13 on.
            layer = getattr(layers, f"Adaptive{kind}Pooling{rank}D", None)
            if layer is not None:
                name = f"Adaptive{kind}Pooling{rank}D"
                if (kind, rank) != ("Max", 3):  # As above.
                    _add(family, name, _around(shape, partial(layer, size)))
                single = partial(layer, size, **_FLOAT32)
                _add(family, f"{name} in float32", _around(shape, single))


_FLOAT32: dict[str, Any] = {"dtype": "float32"}


def _attention() -> None:
    family, rows = "attention", (4, 5)

    def attend(make: Make, number: int = 1, **options: Any) -> Make:
        """An attention layer on `number` branches: itself, or query and value."""
        return _joined(rows, number, lambda x: make()(*((x * 2)[:2]), **options))

    def multi_head(**options: Any) -> Make:
        # 1 / sqrt(4) is exact; another factor TensorFlow's Keras rounds to float32.
        return lambda: layers.MultiHeadAttention(2, 4, **options)

    def grouped() -> layers.Layer:
        return layers.GroupQueryAttention(4, 4, 2)

    _add(family, "MultiHeadAttention", attend(multi_head()))
    _add(family, "MultiHeadAttention, cross", attend(multi_head(value_dim=2), 2))
    _add(family, "MultiHeadAttention, causal", attend(multi_head(), use_causal_mask=True))
    _add(family, "MultiHeadAttention, no bias", attend(multi_head(use_bias=False, output_shape=2)))
    attended = (_MasksLast, _SelfAttention, _NoMask)
    _add(family, "MultiHeadAttention, masked", _around(rows, *attended))
    scores = _joined(
        rows,
        1,
        lambda x: layers.Concatenate()(
            [layers.Flatten()(y) for y in multi_head()()(x[0], x[0], return_attention_scores=True)]
        ),
    )
    _add(family, "MultiHeadAttention and its scores", scores)
    two = _joined((3, 2, 3), 1, lambda x: multi_head(attention_axes=(1, 2))()(x[0], x[0]))
    _add(family, "MultiHeadAttention over two axes", two)
    _add(family, "GroupQueryAttention", attend(grouped))
    _add(family, "GroupQueryAttention, causal", attend(grouped, 2, use_causal_mask=True))
    for name, make in (
        ("Attention", layers.Attention),
        ("Attention, scaled", lambda: layers.Attention(use_scale=True)),
        ("Attention, concat", lambda: layers.Attention(score_mode="concat", use_scale=True)),
        ("AdditiveAttention", layers.AdditiveAttention),
    ):
        _add(family, name, _joined(rows, 3, partial(_join, make)))
    causal = _joined(rows, 2, lambda x: layers.Attention()(x, use_causal_mask=True))
    _add(family, "Attention, causal", causal)
    _add(family, "Transformer block", _transformer)


class _NoMask(layers.Layer):
    """Takes the mask off: Flatten would warn of it."""

    def __init__(self) -> None:
        super().__init__()
        self.supports_masking = True

    def call(self, x: Any) -> Any:
        return 1.0 * x

    def compute_mask(self, x: Any, previous_mask: Any = None) -> None:
        """There is none."""


class _SelfAttention(layers.Layer):
    """MultiHeadAttention of one tensor to itself, with the mask that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.supports_masking = True
        self.attention = layers.MultiHeadAttention(2, 4)

    def build(self, shape: Any) -> None:
        self.attention.build(shape, shape)
        self.built = True

    def call(self, x: Any, mask: Any = None) -> Any:
        if mask is None:
            raise ValueError("Expected a mask.")
        return self.attention(x, x, query_mask=mask, value_mask=mask)


def _transformer() -> keras.Model:
    start = keras.Input((4, 6))
    y = layers.LayerNormalization()(start)
    x = layers.Add()([start, layers.MultiHeadAttention(2, 4)(y, y)])
    y = layers.Dense(8, "gelu")(layers.LayerNormalization()(x))
    x = layers.LayerNormalization()(layers.Add()([x, layers.Dense(6)(y)]))
    return keras.Model(start, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


def _recurrences() -> None:
    for unroll in (True, False):
        family = "recurrences, unrolled" if unroll else "recurrences, loops"
        of: dict[str, Any] = {"unroll": unroll}
        own: dict[str, Any] = {**of, "use_cudnn": False}
        rows = {**own, "return_sequences": True}
        makes: dict[str, list[Make]] = {
            "SimpleRNN": [partial(layers.SimpleRNN, 3, **of)],
            "GRU": [partial(layers.GRU, 3, **own)],
            "GRU, reset before": [partial(layers.GRU, 3, reset_after=False, **own)],
            "GRU, backwards": [partial(layers.GRU, 3, go_backwards=True, **own)],
            "LSTM": [partial(layers.LSTM, 3, **own)],
            "LSTM, sequences": [partial(layers.LSTM, 3, **rows)],
            "LSTM, other activations": [partial(layers.LSTM, 3, "gelu", "softplus", **own)],
            "LSTM, masked": [_MasksLast, partial(layers.LSTM, 3, **own)],
            "Bidirectional LSTM": [partial(_bidirectional, "concat", layers.LSTM, **own)],
            "Bidirectional GRU, summed": [partial(_bidirectional, "sum", layers.GRU, **rows)],
            "RNN of two cells": [partial(_two_cells, **of)],
        }
        for name, chain in makes.items():
            ending = ", unrolled" if unroll else ""
            _add(family, f"{name}{ending}", _around((3, 2), *chain, first=3))
    shapes: dict[int, tuple[int, ...]] = {1: (3, 4, 2), 2: (2, 3, 3, 2), 3: (2, 2, 3, 2, 2)}
    for rank, shape in shapes.items():
        make = partial(getattr(layers, f"ConvLSTM{rank}D"), 2, 2, padding="same")
        _add("recurrences, loops", f"ConvLSTM{rank}D", _around(shape, make, first=2))


def _bidirectional(merge: str, layer: Any, **options: Any) -> layers.Layer:
    return layers.Bidirectional(layer(2, **options), merge)


def _two_cells(**options: Any) -> layers.Layer:
    return layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)], **options)


class _MasksLast(layers.Layer):
    """Masks the last row of `[B, T, n]`, whatever is in it."""

    def call(self, x: Any) -> Any:
        return 1.0 * x

    def compute_mask(self, x: Any, previous_mask: Any = None) -> Any:  # noqa: ARG002
        return ops.ones_like(x[..., 0], "bool") & (ops.arange(x.shape[1]) < x.shape[1] - 1)


def _normalizations() -> None:
    family = "normalizations"
    rows: tuple[int, ...] = (3, 4)
    image: tuple[int, ...] = (3, 3, 4)

    def spectral() -> layers.Layer:
        return layers.SpectralNormalization(layers.Dense(3))

    for name, shape, make in (
        ("LayerNormalization", rows, layers.LayerNormalization),
        ("LayerNormalization over two axes", rows, lambda: layers.LayerNormalization((1, 2))),
        ("LayerNormalization, plain", rows, lambda: layers.LayerNormalization(-1, 0.1, **_PLAIN)),
        ("GroupNormalization", image, lambda: layers.GroupNormalization(2)),
        ("GroupNormalization, one group", image, lambda: layers.GroupNormalization(1)),
        ("GroupNormalization, a group per channel", image, lambda: layers.GroupNormalization(-1)),
        ("GroupNormalization of rows", rows, lambda: layers.GroupNormalization(2)),
        ("RMSNormalization", rows, layers.RMSNormalization),
        ("UnitNormalization", rows, layers.UnitNormalization),
        ("UnitNormalization over two axes", rows, lambda: layers.UnitNormalization((1, 2))),
        ("BatchNormalization", rows, layers.BatchNormalization),
        ("BatchNormalization, plain", image, lambda: layers.BatchNormalization(**_PLAIN)),
        ("Normalization", rows, lambda: layers.Normalization(-1, [0, 1, 2, 3], [1, 2, 3, 4])),
        ("SpectralNormalization", (5,), spectral),
    ):
        _add(family, name, _around(shape, make))
    family = "held statistics"
    hold: dict[str, Any] = {"training": True, "batch": 4}
    batch_norm = layers.BatchNormalization
    for name, shape, makes in (
        ("BatchNormalization of vectors", (5,), [batch_norm]),
        ("BatchNormalization of rows", rows, [batch_norm]),
        ("BatchNormalization of images", image, [batch_norm, _conv, batch_norm]),
        ("BatchNormalization of volumes", (2, 2, 3, 2), [batch_norm]),
        ("BatchNormalization along axis 1", rows, [lambda: batch_norm(axis=1)]),
        ("BatchNormalization, no scale", (5,), [lambda: batch_norm(scale=False, epsilon=0.1)]),
        ("BatchNormalization, no center", (5,), [lambda: batch_norm(center=False)]),
        ("BatchNormalization, thrice", (5,), 3 * [_tanh, batch_norm]),
        (
            "BatchNormalization and LayerNormalization",
            (5,),
            [batch_norm, _tanh, layers.LayerNormalization],
        ),
        ("BatchNormalization and GroupNormalization", image, [batch_norm, _conv, _group_norm]),
        ("BatchNormalization and max-pooling", image, [batch_norm, layers.MaxPooling2D]),
        ("BatchNormalization of masked rows", rows, [_MasksLast, batch_norm, _NoMask]),
    ):
        _add(family, f"{name}, training", _around(shape, *makes), **hold)
    for depth in (1, 2):
        name = f"Residual blocks with BatchNormalization, {depth}, training"
        _add(family, name, partial(_residual, depth), **hold)


_PLAIN: dict[str, Any] = {"center": False, "scale": False}


def _group_norm() -> layers.Layer:
    return layers.GroupNormalization(2)


def _tanh() -> layers.Layer:
    return layers.Dense(5, "tanh")


def _conv() -> layers.Layer:
    return layers.Conv2D(4, 2, padding="same", activation="tanh")


def _residual(depth: int) -> keras.Model:
    start = keras.Input((4, 4, 2))
    x = layers.Conv2D(3, 3, padding="same", use_bias=False)(start)
    for _ in range(depth):
        y = layers.ReLU()(layers.BatchNormalization()(x))
        y = layers.Conv2D(3, 3, padding="same", use_bias=False)(y)
        y = layers.Activation("silu")(layers.BatchNormalization()(y))
        x = layers.Add()([x, layers.Conv2D(3, 3, padding="same")(y)])
    return keras.Model(start, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def _spectrograms() -> None:
    family = "spectrograms"
    for mode in ("log", "magnitude", "psd", "real", "imag", "angle", "stft"):
        make = partial(layers.STFTSpectrogram, mode, 8, 4, 8)
        _add(family, f"STFTSpectrogram, {mode}", _around((20, 2), make, first=2))
    padded = partial(layers.STFTSpectrogram, "magnitude", 6, 3, 8, "hamming", padding="same")
    _add(family, "STFTSpectrogram, same, hamming", _around((20, 2), padded, first=2))
    # Keras computes it in float32, whatever the network's type, and else adds float32 to float64.
    options = {"sampling_rate": 100, "min_freq": 5, "max_freq": 50, **_FLOAT32}
    sizes = {"fft_length": 16, "sequence_stride": 4, "num_mel_bins": 5}
    for name, more in (
        ("MelSpectrogram in float32", {}),
        ("MelSpectrogram, amplitudes in float32", {"mag_exp": 1.0, "power_to_db": False}),
        ("MelSpectrogram, powers in float32", {"power_to_db": False, "window": "hamming"}),
    ):
        mel = partial(layers.MelSpectrogram, **options, **sizes, **more)
        _add(family, name, _around((24,), mel, first=24))


def _merges() -> None:
    family = "merge layers"
    for kind, number in (
        *(("Add", 3), ("Subtract", 2), ("Multiply", 3), ("Average", 3)),
        *(("Maximum", 3), ("Minimum", 3), ("Concatenate", 2)),
    ):
        join = getattr(layers, kind)
        _add(family, kind, _joined((5,), number, partial(_join, join)))
    _add(family, "Concatenate, axis 1", _joined((3, 2), 2, lambda x: layers.Concatenate(1)(x)))
    _add(family, "Dot", _joined((3, 2), 2, lambda x: layers.Dot((1, 1))(x)))
    normalized = _joined((3, 2), 2, lambda x: layers.Dot(2, normalize=True)(x))
    _add(family, "Dot, normalized", normalized)


def _structures() -> None:
    family = "skips, shared, nested, subclassed, TimeDistributed"
    _add(family, "skip connection", _skip)
    _add(family, "shared layer", _shared)
    nested = _plain(
        lambda: keras.Input((4,)),
        lambda: keras.Sequential([keras.Input((4,)), layers.Dense(5, "tanh"), layers.Dense(4)]),
        lambda: layers.Dense(3, "gelu"),
    )
    _add(family, "nested model", nested)
    _add(family, "subclassed model", _plain(lambda: keras.Input((4,)), _Subclassed))
    for name, shape, make in (
        ("Dense", (3, 4), lambda: layers.Dense(2, "tanh")),
        ("Conv2D", (2, 4, 4, 2), lambda: layers.Conv2D(2, 3, activation="tanh")),
        ("LayerNormalization", (3, 4), layers.LayerNormalization),
    ):
        wrapped = partial(_time_distributed, make)
        _add(family, f"TimeDistributed {name}", _around(shape, wrapped))
    _add(family, "U-net", _u_net)
    _add(family, "LeNet", _lenet)
    _add(family, "MLP-Mixer block", _mixer)
    _add(family, "ConvNeXt block", _convnext)
    _add(family, "squeeze and excitation", _squeeze)
    _add(family, "image to image", _image_to_image)


def _time_distributed(make: Make) -> layers.Layer:
    return layers.TimeDistributed(make())


class _Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = layers.Dense(6, activation="gelu")
        self.out = layers.Dense(3)

    def build(self, shape: Any) -> None:
        self.hidden.build(shape)
        self.out.build((*shape[:-1], 6))
        self.built = True

    def call(self, x: Any) -> Any:
        return self.out(self.hidden(x))


def _skip() -> keras.Model:
    start = keras.Input((5,))
    x = layers.Add()([layers.Dense(5, activation="relu")(start), start])
    return keras.Model(start, layers.Dense(3, "tanh")(layers.Concatenate()([x, start])))


def _shared() -> keras.Model:
    layer, start = layers.Dense(4, activation="tanh"), keras.Input((4,))
    return keras.Model(start, layer(layer(start)))


def _u_net() -> keras.Model:
    start = keras.Input((4, 4, 2))
    wide = layers.Conv2D(2, 3, padding="same", activation="silu")(start)
    deep = layers.Conv2D(3, 3, padding="same", activation="silu")(layers.MaxPooling2D(2)(wide))
    up = layers.Conv2DTranspose(2, 2, strides=2, activation="silu")(deep)
    x = layers.Conv2D(2, 3, padding="same")(layers.Concatenate()([wide, up]))
    return keras.Model(start, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def _lenet() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((10, 10, 1)),
            *(layers.Conv2D(3, 3, activation="tanh"), layers.MaxPooling2D(2)),
            *(layers.Conv2D(4, 3, activation="tanh"), layers.AveragePooling2D(2)),
            *(layers.Flatten(), layers.Dense(6, "tanh"), layers.Dense(4)),
        ]
    )


def _mixer() -> keras.Model:
    start = keras.Input((4, 3))
    y = layers.Permute((2, 1))(layers.LayerNormalization()(start))
    y = layers.Permute((2, 1))(layers.Dense(4)(layers.Dense(5, "gelu")(y)))
    x = layers.Add()([start, y])
    y = layers.Dense(3)(layers.Dense(5, "gelu")(layers.LayerNormalization()(x)))
    x = layers.GlobalAveragePooling1D()(layers.Add()([x, y]))
    return keras.Model(start, layers.Dense(3)(x))


def _convnext() -> keras.Model:
    start = keras.Input((4, 4, 3))
    y = layers.DepthwiseConv2D(3, padding="same")(start)
    y = layers.Dense(6, "gelu")(layers.LayerNormalization(epsilon=1e-6)(y))
    x = layers.Add()([start, layers.Dense(3)(y)])
    return keras.Model(start, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def _squeeze() -> keras.Model:
    start = keras.Input((4, 4, 2))
    x = layers.Conv2D(4, 3, activation="silu")(start)
    y = layers.Dense(2, "relu")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    x = layers.Multiply()([x, layers.Dense(4, "sigmoid")(y)])
    return keras.Model(start, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def _image_to_image() -> keras.Model:
    start = keras.Input((3, 3, 1))
    x = layers.Conv2D(2, 3, padding="same", activation="tanh")(start)
    return keras.Model(start, layers.Conv2D(1, 3, padding="same", activation="silu")(x))


def _operations() -> None:
    """Functions of keras.ops in a custom layer."""
    family = "keras.ops in a layer"
    for name, function in {
        "logsumexp": lambda x: ops.logsumexp(x, axis=-1, keepdims=True),
        "var and std": lambda x: ops.concatenate([ops.var(x, -1), ops.std(x, -1)], -1),
        "moments": lambda x: ops.concatenate(ops.moments(x, axes=[-1]), -1),
        "max and min": lambda x: ops.concatenate([ops.max(x, -1), ops.min(x, -1)], -1),
        "prod": lambda x: ops.prod(x, axis=-1),
        "cumsum": lambda x: ops.square(ops.cumsum(x, axis=1)),
        "cumprod": lambda x: ops.cumprod(x, axis=1),
        "sort": lambda x: ops.sort(x, axis=-1) * ops.array([1.0, 2.0, 3.0, 4.0], dtype=x.dtype),
        "einsum": lambda x: ops.einsum("bij,bkj,bkl->bil", x, x, x),
        "norm": lambda x: ops.norm(x, axis=-1),
        "erf": lambda x: ops.erf(2 * x),
        "sqrt, log and exp": lambda x: ops.sqrt(2 + x) * ops.log(2 + x) + ops.exp(x),
        "sin, cos and tan": lambda x: ops.sin(x) * ops.cos(2 * x) + ops.tan(x),
        "arcsin, arctan and arctan2": lambda x: (
            ops.arcsin(x) + ops.arctan(x) * ops.arctan2(x, x + 3)
        ),
        "sinh and arcsinh": lambda x: ops.sinh(x) + ops.arcsinh(2 * x),
        "power": lambda x: ops.power(2 + x, 1.7) + ops.power(1.5, x),
        "clip and abs": lambda x: ops.abs(ops.clip(x, -0.6, 0.6)) * x,
        "where": lambda x: ops.where(x > 0.1, ops.square(x), ops.sin(3 * x)),
        "rfft": lambda x: ops.concatenate(ops.rfft(ops.square(x)), -1),
        "solve": lambda x: ops.solve(
            ops.matmul(x, ops.transpose(x, (0, 2, 1))) + ops.eye(3, dtype=x.dtype), x
        ),
        "inv and det": lambda x: (
            ops.inv(_square(x)) * ops.expand_dims(ops.expand_dims(ops.det(_square(x)), -1), -1)
        ),
        "cholesky": lambda x: ops.cholesky(
            ops.matmul(_square(x), ops.transpose(_square(x), (0, 2, 1)))
        ),
        "take and roll": lambda x: ops.take(x, [0, 2, 0], axis=1) * ops.roll(x, 1, axis=1),
        "tensordot and outer": lambda x: ops.tensordot(x, ops.ones((4, 2), x.dtype), 1) ** 2,
        "binary cross entropy": lambda x: ops.binary_crossentropy(
            ops.sigmoid(x[:, :, :2]), ops.sigmoid(x[:, :, 2:])
        ),
    }.items():
        _add(family, f"ops: {name}", _around((3, 3), _calls(function)))


def _square(x: Any) -> Any:
    """`[B, 3, 4]` to well-conditioned `[B, 3, 3]`."""
    return x[:, :, :3] + 2 * ops.eye(3, dtype=x.dtype)


for _family in (
    *(_dense, _activations, _convolutions, _sizes, _pooling, _attention, _recurrences),
    *(_normalizations, _spectrograms, _merges, _structures, _operations),
):
    _family()
FAMILIES = tuple(dict.fromkeys(network.family for network in NETWORKS.values()))
