"""Whether the Jacobian of a network is what its products say, and if not, which layer breaks it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf

from tfjacreg import norms
from tfjacreg.jacobian import FORWARD_MODES, JacobianOperator, _kept_losses, _layers

_MIXES = (
    "mixes the examples of a batch: the output of one depends on the input of another. Compute "
    "what it takes from the batch in `with tfjacreg.hold_constant():`"
)
_ESCAPES = re.compile(r"\x1b\[\d*m")
_UNEQUAL = (
    "has a derivative that TensorFlow loses: <u, J v> is not <J^T u, v>. Replace it by an "
    "operation with a second derivative"
)


def check_network(
    network: keras.Layer, x: Any, *, training: bool = True, forward_mode: str = "accumulator"
) -> None:
    """Checks that `<u, J v> = <J^T u, v>` (eqs. 6 and 7) and that examples do not mix.

    With random `u`, and `v` half along `J^T u` and half random, so that a tangent lost in either
    direction shows. The first and the last example must not depend on any other. Nothing of the
    network changes: no weight, statistic or seed. Where a product is not finite there is no
    verdict, and a gradient that is wrong in the same way both times (`tf.custom_gradient`) passes.

    Args:
        network: A `keras.Layer` from `[B, *in]` to `[B, *out]`.
        x: Floating inputs, `[B, *in]`, B >= 2.
        training: Whether the network runs in training mode.
        forward_mode: `"accumulator"` or `"transpose"`; see `JacobianOperator`.

    Raises:
        TypeError: If `network` is not a `keras.Layer`, or `x` is not one floating tensor.
        ValueError: If `x` has fewer than two examples, or a layer fails; the message names it.
    """
    x = JacobianOperator(network, x, training=training, forward_mode=forward_mode).x
    if x.shape[0] < 2:
        raise ValueError(
            "`x` must hold at least two examples, to see whether the network mixes them. "
            f"Received: x of shape {tuple(x.shape)}"
        )
    if not network.built:
        network(keras.KerasTensor(x.shape, dtype=x.dtype.name))
    fault, cause = _fault(network, x, training, forward_mode)
    if fault is None:
        return
    name = f"the network {network.name!r} ({type(network).__name__}) as a whole"
    for layer, function, value in _calls(network, x, training):
        found, found_cause = _fault(function, value, training, forward_mode)
        if found is not None:
            name = f"layer {layer.name!r} ({type(layer).__name__})"
            fault, cause = found, found_cause
            break
    (other,) = set(FORWARD_MODES) - {forward_mode}
    passes = fault != _MIXES and _fault(network, x, training, other)[0] is None
    advice = f"With forward_mode={other!r} it can be had. " if passes else ""
    raise ValueError(
        f"The Jacobian of network {network.name!r} cannot be had with "
        f"forward_mode={forward_mode!r}: {name} {fault}. {advice}"
        f"Received: x of shape {tuple(x.shape)}, training={training}"
    ) from cause


def _fault(
    network: keras.Layer, x: tf.Tensor, training: bool, forward_mode: str
) -> tuple[str | None, Exception | None]:
    """What is wrong with a network's products, and the exception that said so, if one did."""

    @tf.function  # As training runs: a loop in a graph is another operation than an eager one.
    def products(x: tf.Tensor) -> tuple[tf.Tensor, ...]:
        with keras.StatelessScope(), _kept_losses(network):
            op = JacobianOperator(network, x, training=training, forward_mode=forward_mode)
            u = norms.random_unit(tf.cast(op.primal, x.dtype), (0, 0))
            # One example's cotangent alone, for the first and the last example.
            first = op.rmatvec(tf.concat([u[:1], tf.zeros_like(u[1:])], axis=0))[1:]
            last = op.rmatvec(tf.concat([tf.zeros_like(u[:-1]), u[-1:]], axis=0))[:-1]
            back = op.rmatvec(u)
            v = norms.unit(norms.unit(back) + norms.random_unit(x, (0, 1)))
            forth = op.matvec(v)
            return first, last, norms.inner(u, forth), norms.inner(back, v), norms.length(forth)

    try:
        first, last, forward, backward, scale = (part.numpy() for part in products(x))
    except Exception as error:  # Any that TensorFlow has for an operation without a derivative.
        return f"cannot be differentiated as often as needed ({_reason(error)})", error
    if any(np.any(np.isfinite(part) & (part != 0)) for part in (first, last)):
        return _MIXES, None
    # Rounding loses at most half of the digits of the coarsest layer.
    dtypes = {x.dtype.name, *(layer.compute_dtype for layer in _layers(network))}
    tolerance = np.sqrt(max(float(ml_dtypes.finfo(dtype).eps) for dtype in dtypes)) * scale
    if np.any(np.abs(forward - backward) > tolerance):
        return _UNEQUAL, None
    return None, None


def _reason(error: Exception) -> str:
    """The line of a message that says what happened: Keras wraps it in where it happened."""
    said = str(error).split("Arguments received by ")[0].strip().splitlines() or [""]
    return _ESCAPES.sub("", said[-1]).strip()


class _OfOneInput(keras.Layer):
    """A layer as a function of one of the tensors that it was called with."""

    def __init__(self, layer: keras.Operation, function: Callable[[tf.Tensor], tf.Tensor]) -> None:
        dtype = getattr(layer, "dtype_policy", None)
        super().__init__(name="of_one_input", dtype=dtype, autocast=False)
        self.layer = layer
        self.function = function
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Calls the layer as it was called, but for this tensor."""
        return self.function(x)


def _calls(
    network: keras.Layer, x: tf.Tensor, training: bool
) -> Iterator[tuple[keras.Operation, keras.Layer, tf.Tensor]]:
    """Every call of a layer in one forward pass, inner ones first, once for each tensor it took."""
    size = x.shape[0]
    recorded: list[tuple[keras.Operation, Any]] = []

    def recording(operation: keras.Operation, call: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            recorded.append((operation, (args, kwargs)))
            return outputs

        return record

    operations = {id(layer): layer for layer in _layers(network)}
    for model in list(operations.values()):
        # A functional model also holds what keras.ops did to its symbolic tensors.
        operations.update({id(found): found for found in getattr(model, "operations", [])})
    with contextlib.ExitStack() as stack:
        for operation in operations.values():
            operation.__dict__["call"] = recording(operation, operation.call)
            stack.callback(operation.__dict__.pop, "call")
        with keras.StatelessScope(), _kept_losses(network):
            network(x, training=training)

    def is_batch(a: Any) -> bool:
        # Tensors of a loop's own graph are gone by now: the layer around the loop answers for it.
        return (
            isinstance(a, tf.Tensor)
            and hasattr(a, "numpy")
            and a.dtype.is_floating
            and a.shape.rank > 0
            and a.shape[0] == size
        )

    for operation, arguments in recorded:
        flat = tf.nest.flatten(arguments)
        for position in range(len(flat)):
            if not is_batch(flat[position]):
                continue

            def function(
                a: tf.Tensor,
                operation: keras.Operation = operation,
                arguments: Any = arguments,
                flat: list[Any] = flat,
                position: int = position,
            ) -> tf.Tensor:
                changed = [*flat[:position], a, *flat[position + 1 :]]
                args, kwargs = tf.nest.pack_sequence_as(arguments, changed)
                outputs = tf.nest.flatten(operation(*args, **kwargs))
                parts = [tf.reshape(tf.cast(y, a.dtype), (size, -1)) for y in outputs]
                return tf.concat(parts, axis=1)

            yield operation, _OfOneInput(operation, function), flat[position]
