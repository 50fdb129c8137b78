"""Layers that resize or warp images as the linear maps they are, with all their derivatives.

Once its random draw is fixed, each of them is a linear map of the image, plus a constant where it
fills: `J v` is the same operation on `v`, and `J^T u` its transpose.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfjacreg import resampling

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


def is_linear_image_map(layer: keras.Layer) -> bool:
    """Whether `linear_image_map` knows `layer`.

    A preprocessing layer runs its own code, with whatever a subclass overrides: only the image
    operations in it are replaced. `UpSampling2D` is replaced as a whole, so it must be Keras' own.
    """
    if isinstance(layer, keras.layers.UpSampling2D):
        return all(
            getattr(type(layer), name, None) is getattr(keras.layers.UpSampling2D, name, None)
            for name in ("call", "_resize_images")
        )
    return isinstance(layer, _PREPROCESSING)


def linear_image_map(layer: keras.Layer, call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function with the values of `call`, and exact derivatives of every order.

    The values agree to rounding, or to the last bit where pixels are only moved. The layer's random
    numbers are drawn as usual: once in each call, from its own generator.

    Args:
        layer: A layer of `LAYERS`, for which `is_linear_image_map` is true.
        call: Its `call`.
    """
    if isinstance(layer, keras.layers.UpSampling2D):
        # Without interpolation it repeats pixels, which TensorFlow differentiates rightly.
        is_nearest = layer.interpolation == "nearest"
        return call if is_nearest else functools.partial(_upsample, layer, call)

    def linear_map(*args: Any, **kwargs: Any) -> Any:
        with _linear_operations(layer):
            return call(*args, **kwargs)

    return linear_map


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


@contextlib.contextmanager
def _linear_operations(layer: keras.Layer) -> Iterator[None]:
    """Gives `layer`, a preprocessing layer, image operations with derivatives of every order."""
    backend = layer.backend
    if not isinstance(backend, _Backend):
        backend = _Backend(backend, layer)
    # Set beside Keras' attribute tracking. Replicas run the same layer in turns, so the last user
    # takes it away.
    layer.__dict__["backend"] = backend
    backend.users += 1
    try:
        yield
    finally:
        backend.users -= 1
        if not backend.users:
            layer.__dict__["backend"] = backend.own


class _Backend:
    """The backend of a preprocessing layer, with linear maps among its image operations."""

    def __init__(self, own: Any, layer: keras.Layer) -> None:
        self.own = own
        self.image = _ImageOperations(own, layer)
        self.users = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


class _ImageOperations:
    """The operations of `backend.image`, those in `_LINEAR` replaced for floating images."""

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
        # In a graph it ends with a resize of what it has cropped to `size` already, because
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
