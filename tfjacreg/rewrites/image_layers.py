"""Layers that resize or warp images, as linear maps with all their derivatives.

Once its random draw is fixed, each of these layers is a linear map of the image, plus a constant
where it fills: `J v` is the same operation on `v`, and `J^T u` its transpose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfjacreg.rewrites import resampling
from tfjacreg.rewrites.context import Place, is_replacing

_PREPROCESSING = (
    keras.layers.CenterCrop,
    keras.layers.RandomCrop,
    keras.layers.RandomRotation,
    keras.layers.RandomShear,
    keras.layers.RandomTranslation,
    keras.layers.RandomZoom,
    keras.layers.Resizing,
    # Older versions of Keras lack it.
    *filter(None, [getattr(keras.layers, "RandomPerspective", None)]),
)
LAYERS: tuple[type[keras.Layer], ...] = (keras.layers.UpSampling2D, *_PREPROCESSING)


def linear_image_map(layer: keras.Layer) -> list[Place]:
    """The replacement for the image operations of a layer, with exact derivatives of every order.

    The values agree to rounding, or to the last bit where pixels are only moved. The layer's random
    numbers are drawn as usual: once in each call, from its own generator. A preprocessing layer
    runs its own code, including what a subclass overrides: only the image operations in it are
    replaced. `UpSampling2D` is replaced as a whole, so only if a subclass does not change it.

    Args:
        layer: Any layer.

    Returns:
        Nothing for a layer that is none of `LAYERS`, or that has all its derivatives already.
    """
    if isinstance(layer, keras.layers.UpSampling2D):
        is_own = all(
            getattr(type(layer), name, None) is getattr(keras.layers.UpSampling2D, name, None)
            for name in ("call", "_resize_images")
        )
        # Without interpolation it repeats pixels, which TensorFlow differentiates correctly.
        if not is_own or layer.interpolation == "nearest":
            return []
        return [Place(layer, "call", functools.partial(_upsample, layer))]
    if isinstance(layer, _PREPROCESSING):
        return [Place(layer, "backend", view=lambda own: _Backend(own, layer))]
    return []


def _upsample(
    layer: keras.Layer, call: Callable[[tf.Tensor], tf.Tensor], inputs: tf.Tensor
) -> tf.Tensor:
    if not inputs.dtype.is_floating:
        return call(inputs)
    axes = resampling.spatial_axes(inputs, layer.data_format)
    sizes = [
        resampling.size_along(inputs, axis) * factor
        for axis, factor in zip(axes, layer.size, strict=True)
    ]
    resized = resampling.resize(inputs, axes, sizes, layer.interpolation)
    return tf.cast(resized, inputs.dtype)


class _Backend:
    """The backend of a preprocessing layer, with its image operations replaced."""

    def __init__(self, own: Any, layer: keras.Layer) -> None:
        self._own = own
        self._image = _ImageOperations(own, layer)

    def __getattr__(self, name: str) -> Any:
        return self._image if name == "image" and is_replacing() else getattr(self._own, name)


class _ImageOperations:
    """The operations of `backend.image`; those in `_LINEAR` are replaced for floating images."""

    def __init__(self, backend: Any, layer: keras.Layer) -> None:
        self._backend = backend
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._backend.image, name)
        if name not in _LINEAR:
            return own

        def operation(images: tf.Tensor, *args: Any, **kwargs: Any) -> tf.Tensor:
            if not images.dtype.is_floating:
                return own(images, *args, **kwargs)
            return _LINEAR[name](self._layer, own, images, *args, **kwargs)

        return operation


def _resize(
    layer: keras.Layer,
    own: Callable[..., tf.Tensor],
    images: tf.Tensor,
    size: Sequence[int],
    interpolation: str = "bilinear",
    antialias: bool = False,
    crop_to_aspect_ratio: bool = False,
    pad_to_aspect_ratio: bool = False,
    fill_mode: str = "constant",
    fill_value: float = 0.0,
    data_format: str | None = None,
) -> tf.Tensor:
    axes = resampling.spatial_axes(images, data_format)
    shape = [resampling.size_along(images, axis) for axis in range(len(images.shape))]
    if isinstance(layer, keras.layers.RandomCrop) and None in images.shape[axes[0] : axes[1] + 1]:
        # In a graph the layer ends with a resize of what it has already cropped to `size`, because
        # TensorFlow cannot tell the size of a slice that begins at a random place.
        shape[axes[0] : axes[1] + 1] = size
        return tf.reshape(images, shape)
    return resampling.resize(
        images,
        axes,
        size,
        interpolation,
        antialias=antialias,
        aspect="crop" if crop_to_aspect_ratio else "pad" if pad_to_aspect_ratio else None,
        fill_value=fill_value,
    )


def _affine_transform(
    layer: keras.Layer,
    own: Callable[..., tf.Tensor],
    images: tf.Tensor,
    transform: tf.Tensor,
    interpolation: str = "bilinear",
    fill_mode: str = "constant",
    fill_value: float = 0,
    data_format: str | None = None,
) -> tf.Tensor:
    operation = functools.partial(
        own, transform=transform, interpolation=interpolation, fill_mode=fill_mode
    )
    return resampling.warp(images, operation, interpolation, fill_value, data_format)


def _perspective_transform(
    layer: keras.Layer,
    own: Callable[..., tf.Tensor],
    images: tf.Tensor,
    start_points: tf.Tensor,
    end_points: tf.Tensor,
    interpolation: str = "bilinear",
    fill_value: float = 0,
    data_format: str | None = None,
) -> tf.Tensor:
    operation = functools.partial(
        own, start_points=start_points, end_points=end_points, interpolation=interpolation
    )
    return resampling.warp(images, operation, interpolation, fill_value, data_format)


_LINEAR: dict[str, Callable[..., tf.Tensor]] = {
    "resize": _resize,
    "affine_transform": _affine_transform,
    "perspective_transform": _perspective_transform,
}
