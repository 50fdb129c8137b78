"""The networks of the paper's experiments, as plain `keras.Model`s with logits as outputs."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from tfjacreg import arguments

INITIALIZATIONS = ("keras", "pytorch")
# Beyond these limits a layer has more weights than machines have room for.
_WIDEST = 16
_MOST_PIXELS = 2**24
_MOST_CLASSES = 2**20

# Channels of the 13 convolutions; "pool" halves both sides of the image (appendix A.1).
_VGG16: tuple[int | str, ...] = (
    *(64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool"),
    *(512, 512, 512, "pool", 512, 512, 512, "pool"),
)


def lenet(
    input_shape: tuple[int, int, int] = (28, 28, 1),
    num_classes: int = 10,
    *,
    initialization: str = "keras",
) -> keras.Model:
    """The paper's variant of LeNet (appendix A.1): 61,706 parameters for 28x28x1 and 10 classes.

    Two 5x5 convolutions (6 channels with padding 2, 16 channels without padding), each followed by
    ReLU and a 2x2 max-pooling, then dense layers of 120, 84 and `num_classes` units.

    Args:
        input_shape: `(H, W, C)`, at least 12x12.
        num_classes: The number of logits.
        initialization: How the weights start: `"keras"` with Glorot-uniform kernels and zero
            biases, as Keras' layers do; `"pytorch"` with kernels and biases uniform within
            `1 / sqrt(fan_in)`, as PyTorch's layers do and probably the paper's networks did.

    Returns:
        A model from standardized images `[B, H, W, C]` to logits `[B, num_classes]`.

    Raises:
        ValueError: If an argument is out of range.
    """
    input_shape, num_classes = _validate(input_shape, num_classes, smallest=12)
    arguments.one_of("initialization", initialization, INITIALIZATIONS)
    start = functools.partial(_initializers, initialization)
    inputs = _input(input_shape)
    x = layers.Conv2D(
        6, 5, padding="same", activation="relu", name="conv1", **start(25 * input_shape[2])
    )(inputs)
    x = layers.MaxPooling2D(2, name="pool1")(x)
    x = layers.Conv2D(16, 5, activation="relu", name="conv2", **start(25 * 6))(x)
    x = layers.MaxPooling2D(2, name="pool2")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(120, activation="relu", name="dense1", **start(x.shape[-1]))(x)
    x = layers.Dense(84, activation="relu", name="dense2", **start(120))(x)
    logits = layers.Dense(num_classes, name="logits", **start(84))(x)
    return keras.Model(inputs, logits, name="lenet")


def vgg16(
    input_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
    *,
    width: float = 1.0,
) -> keras.Model:
    """VGG16 with BatchNorm after each of its 13 convolutions (appendix A.1).

    The appendix breaks off before the dense layers. This network has the usual head for 32x32
    images: one dense layer on the output of the fifth pooling (512 numbers at 32x32). torchvision's
    head, two dense layers of 4,096 units with dropout behind a pooling to 7x7, was made for 224x224
    images: here it would copy one position 49 times and spend 120 of 134 million weights on it.

    Kernels start as in He et al. (2015).

    Args:
        input_shape: `(H, W, C)`, at least 32x32.
        num_classes: The number of logits.
        width: Multiplies the channels of every convolution (at least one is kept).

    Returns:
        A model from standardized images `[B, H, W, C]` to logits `[B, num_classes]`.

    Raises:
        ValueError: If an argument is out of range.
    """
    input_shape, num_classes = _validate(input_shape, num_classes, smallest=32)
    x = inputs = _input(input_shape)
    for stage in _VGG16:
        if isinstance(stage, str):
            x = layers.MaxPooling2D(2)(x)
        else:
            x = layers.ReLU()(_conv_norm(x, _scaled(stage, width)))
    x = layers.Flatten()(x)
    return keras.Model(inputs, layers.Dense(num_classes, name="logits")(x), name="vgg16")


def resnet20(
    input_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
    *,
    width: float = 1.0,
) -> keras.Model:
    """The 20-layer residual network for 32x32 images of He et al. (2016), with skip connections.

    Three groups of three blocks with 16, 32 and 64 channels; between groups the shortcut is a
    strided 1x1 convolution with BatchNorm (their option B). Kernels start as in He et al. (2015).

    Args:
        input_shape: `(H, W, C)`, at least 4x4.
        num_classes: The number of logits.
        width: Multiplies the channels of every convolution (at least one is kept).

    Returns:
        A model from standardized images `[B, H, W, C]` to logits `[B, num_classes]`.

    Raises:
        ValueError: If an argument is out of range.
    """
    input_shape, num_classes = _validate(input_shape, num_classes, smallest=4)
    inputs = _input(input_shape)
    x = layers.ReLU()(_conv_norm(inputs, _scaled(16, width)))
    for group, channels in enumerate((16, 32, 64)):
        for block in range(3):
            strides = 2 if group and not block else 1
            filters = _scaled(channels, width)
            y = layers.ReLU()(_conv_norm(x, filters, strides=strides))
            y = _conv_norm(y, filters)
            if strides == 2:
                x = _conv_norm(x, filters, kernel_size=1, strides=2)
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(num_classes, name="logits")(x), name="resnet20")


def _initializers(initialization: str, fan_in: int) -> dict[str, Any]:
    """The initializers of a layer, for one of `INITIALIZATIONS`."""
    if initialization == "keras":
        return {}
    bound = fan_in**-0.5
    # One initializer each: a shared one without a seed would give the same numbers each time.
    return {
        f"{name}_initializer": keras.initializers.RandomUniform(-bound, bound)
        for name in ("kernel", "bias")
    }


def _input(input_shape: tuple[int, int, int]) -> Any:
    # The default dtype of Input, floatx, would round images to float32 under a float64 policy.
    return keras.Input(input_shape, dtype=keras.config.dtype_policy().variable_dtype)


def _conv_norm(x: Any, filters: int, *, kernel_size: int = 3, strides: int = 1) -> Any:
    x = layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding="same",
        use_bias=False,  # BatchNorm has its own bias (beta).
        kernel_initializer="he_normal",
    )(x)
    return layers.BatchNormalization()(x)


def _scaled(channels: int, width: float) -> int:
    if arguments.positive("width", width) > _WIDEST:
        raise ValueError(f"`width` must be at most {_WIDEST}. Received: width={width!r}")
    return max(1, round(channels * float(width)))


def _validate(input_shape: Any, num_classes: Any, smallest: int) -> tuple[Any, int]:
    """Returns the two with Python integers, or raises ValueError."""
    if (
        not isinstance(input_shape, (tuple, list))
        or len(input_shape) != 3
        or not all(isinstance(n, numbers.Integral) and int(n) >= 1 for n in input_shape)
        or any(isinstance(n, bool) for n in input_shape)
        or math.prod(map(int, input_shape)) > _MOST_PIXELS
        or min(input_shape[:2]) < smallest
    ):
        raise ValueError(
            f"`input_shape` must be (height, width, channels), at least {smallest}x{smallest} and "
            f"at most {_MOST_PIXELS} numbers. Received: input_shape={input_shape!r}"
        )
    num_classes = arguments.positive_integer("num_classes", num_classes)
    if num_classes > _MOST_CLASSES:
        raise ValueError(
            f"`num_classes` must be at most {_MOST_CLASSES}. Received: num_classes={num_classes}"
        )
    return tuple(int(n) for n in input_shape), num_classes


_BY_NAME: dict[str, Callable[..., keras.Model]] = {
    "lenet": lenet,
    "vgg16": vgg16,
    "resnet20": resnet20,
}
NAMES = tuple(_BY_NAME)


def get(
    name: str, input_shape: tuple[int, int, int], num_classes: int, **options: Any
) -> keras.Model:
    """Makes a network by name.

    Args:
        name: A name in `NAMES`.
        input_shape: `(H, W, C)`.
        num_classes: The number of logits.
        **options: `width`, for vgg16 and resnet20; `initialization`, for lenet.

    Returns:
        A model from standardized images `[B, H, W, C]` to logits `[B, num_classes]`.

    Raises:
        ValueError: If the name or an option is unknown, or an argument is out of range.
    """
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ValueError(f"A network's name must be one of {NAMES}. Received: {name!r}")
    known = inspect.signature(_BY_NAME[name]).parameters.keys() - {"input_shape", "num_classes"}
    for option in options.keys() - known:
        raise ValueError(
            f"`{option}` is no option of {name}, which has {sorted(known)}. "
            f"Received: {option}={options[option]!r}"
        )
    return _BY_NAME[name](input_shape, num_classes, **options)
