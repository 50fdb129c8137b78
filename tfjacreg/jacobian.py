"""The Jacobian of a network, one matrix per example, as a linear operator.

For an example `x` the matrix `J = df/dx` is never formed. It is known through two products:
`matvec(v) = J v` (the paper's forward mode, eq. 6) and `rmatvec(u) = J^T u` (its backward mode,
eq. 7). Section 3.2 and appendix C extend both to any differentiable network through the
computational graph; here the graph is TensorFlow's.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfjacreg import max_pool

FORWARD_MODES = ("accumulator", "transpose")
_PARTIAL = (
    "The Jacobian of some examples of a batch is that of the whole batch only if each is computed "
    "alone and without random numbers. Use fraction=1. "
)


class _Recording(threading.local):
    """The forward passes now recorded, innermost last. A thread traces each replica."""

    def __init__(self) -> None:
        self.passes: list[_Recorders] = []


_recording = _Recording()


class _Recorders:
    """What records one forward pass: a tape for J^T u, a forward accumulator for J v, or both."""

    def __init__(
        self,
        tape: tf.GradientTape | None,
        accumulator: tf.autodiff.ForwardAccumulator | None,
        is_partial: bool,
    ) -> None:
        self.tape = tape
        self.accumulator = accumulator
        self.is_partial = is_partial
        self._is_paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        if self._is_paused:
            yield
            return
        with contextlib.ExitStack() as stack:
            self._is_paused = True
            stack.callback(setattr, self, "_is_paused", False)
            if self.tape is not None:
                stack.enter_context(self.tape.stop_recording())
            if self.accumulator is not None:
                # An accumulator stops on exit and goes on where it was when entered again.
                self.accumulator.__exit__(None, None, None)
                stack.callback(self.accumulator.__enter__)
            yield


@contextlib.contextmanager
def hold_constant() -> Iterator[None]:
    """Holds what is computed in this context constant for the Jacobian, and only for it.

    A layer that mixes the examples of a batch (BatchNorm in training mode) gives `f(x_i)` a
    derivative with respect to another example `x_j`. The paper's pseudo-inference mode
    (Section 3.2) takes the batch's statistics as constants instead. `JacobianOperator` does so for
    Keras' `BatchNormalization` and its subclasses; in a layer of your own, compute the statistics
    in this context:

    ```python
    def call(self, x, training=None):
        with tfjacreg.hold_constant():
            mean = ops.mean(x, axis=0)
        return x - mean
    ```

    The gradient of the loss still flows through the statistics. Outside a Jacobian's forward pass
    the context does nothing.
    """
    if not _recording.passes:
        yield
        return
    if _recording.passes[-1].is_partial:
        raise ValueError(
            f"{_PARTIAL}Received: a layer that takes something from the whole batch, such as "
            "BatchNormalization in training mode"
        )
    with _recording.passes[-1].paused():
        yield


@contextlib.contextmanager
def _held_layers(network: keras.Layer) -> Iterator[None]:
    """Makes BatchNorm hold its batch's moments, and max-pooling the places of its maxima."""
    held: list[tuple[keras.Layer, str]] = []
    for layer in _layers(network):
        if isinstance(layer, keras.layers.BatchNormalization):
            held.append((layer, "_moments"))
            substitute = functools.partial(_held_moments, layer._moments)
        elif isinstance(layer, max_pool.LAYERS):
            held.append((layer, "call"))
            substitute = max_pool.held_max_pool(layer, layer.call)
        else:
            continue
        # Set beside Keras' attribute tracking: a model's structure must not change under its feet.
        # Replicas trace the same layer in turns, so the last user takes it away.
        layer.__dict__.setdefault(held[-1][1], _Substitute(substitute)).users += 1
    try:
        yield
    finally:
        for layer, name in held:
            layer.__dict__[name].users -= 1
            if not layer.__dict__[name].users:
                del layer.__dict__[name]


def _held_moments(moments: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with hold_constant():
        return moments(*args, **kwargs)


class _Substitute:
    """Stands in for a layer's method while passes are being recorded."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _layers(network: keras.Layer) -> list[keras.Layer]:
    """The network and all layers in it, at any depth."""
    return network._flatten_layers()


def _variables(network: keras.Layer) -> list[keras.Variable]:
    """All variables of the network, and the states that stateful recurrences keep to themselves."""
    states = keras.tree.flatten([getattr(layer, "states", None) for layer in _layers(network)])
    return [*network.variables, *(s for s in states if isinstance(s, keras.Variable))]


@contextlib.contextmanager
def _kept_losses(network: keras.Layer) -> Iterator[None]:
    """Keeps the losses that layers added in the recorded pass: Keras clears them in each call."""
    kept = [(layer, list(layer._losses), set(layer._loss_ids)) for layer in _layers(network)]
    try:
        yield
    finally:
        for layer, losses, loss_ids in kept:
            layer._losses[:] = losses
            layer._loss_ids |= loss_ids


class JacobianOperator:
    """The Jacobians of `network` at the examples of a batch: `J_i = d network(x_i) / d x_i`.

    The forward pass runs once, when something first needs it, and is recorded on a
    `tf.GradientTape` that serves every `rmatvec`. With `forward_mode="accumulator"` (the default) a
    `tf.autodiff.ForwardAccumulator` computes J v along a forward pass: in a `tf.function` the first
    `matvec` shares the pass of the operator if nothing has run it yet; any other one replays the
    network from the same state (weights, statistics, dropout mask). With
    `forward_mode="transpose"` J v is the derivative of `<J^T u, v>` with respect to `u`: no pass is
    ever replayed, and kernels do not drag zero tangents along, which is faster wherever it was
    measured (see `benchmarks/`).

    Works eagerly, in a `tf.function` and inside an outer `tf.GradientTape`, which can differentiate
    `primal` and both products with respect to the weights, provided that they are first used
    inside it.

    Attributes:
        network: The network.
        x: The inputs, `[B, *in]`, in at least float32.

    Args:
        network: A `keras.Layer` (any model is one) from one tensor `[B, *in]` to one `[B, *out]`.
        x: Floating inputs, `[B, *in]`, B >= 1.
        training: Whether the network runs in training mode. If so, BatchNorm statistics are those
            of this batch, held constant for the Jacobian; dropout has one mask for every product;
            and the one forward pass does all that a training pass does (moving statistics), once.
        forward_mode: `"accumulator"` or `"transpose"`.

    Raises:
        TypeError: If `network` is not a `keras.Layer`, or `x` is not one floating tensor.
        ValueError: If `x` has no batch axis or an empty one, or `forward_mode` is unknown.
    """

    def __init__(
        self,
        network: keras.Layer,
        x: Any,
        *,
        training: bool = False,
        forward_mode: str = "accumulator",
    ) -> None:
        if not isinstance(network, keras.Layer):
            raise TypeError(
                "`network` must be a keras.Layer, for example a keras.Model. "
                f"Received: network={network!r} (of type {type(network).__name__})"
            )
        self.forward_mode = validate_forward_mode(forward_mode)
        self.network = network
        self.training = training
        self.x = _as_floating_batch(x, network)
        self._tape: Any = None
        self._primal: tf.Tensor | None = None
        self._state: list[tuple[keras.Variable, tf.Tensor]] = []
        self._is_partial = False

    def of_examples(self, rows: tf.Tensor) -> JacobianOperator:
        """The Jacobians of some examples only, from a forward pass of their own.

        That pass leaves no trace in the network: it comes beside the one of the whole batch.

        Args:
            rows: Numbers of examples, integers `[R]`.

        Raises:
            ValueError: If the network draws random numbers, or (when its pass runs) takes anything
                from the whole batch: the pass would then be another one.
        """
        if any(v.name == "seed_generator_state" for v in self.network.variables):
            raise ValueError(
                f"{_PARTIAL}Received: network {self.network.name!r}, which draws random numbers, "
                "such as those of Dropout"
            )
        part = JacobianOperator(
            self.network,
            tf.gather(self.x, rows),
            training=self.training,
            forward_mode=self.forward_mode,
        )
        part._is_partial = True
        return part

    @property
    def has_run(self) -> bool:
        """Whether anything has needed the forward pass yet."""
        return self._primal is not None

    @property
    def primal(self) -> tf.Tensor:
        """The network's output `f(x)`, `[B, *out]`, in the network's own dtype."""
        if self._primal is None:
            self._record(tangent=None)
        return self._primal

    def matvec(self, v: Any) -> tf.Tensor:
        """Computes `J_i v_i` for every example: the forward mode, eq. (6).

        Args:
            v: Tangents, `[B, *in]`.

        Returns:
            `[B, *out]`, in the dtype of `x`.

        Raises:
            TypeError: If `v` does not hold real numbers.
            ValueError: If `v` has another shape than `x`.
        """
        v = _like(v, self.x.shape, self.x.dtype, "v", "the input x")
        if self.forward_mode == "transpose":
            product = self._transposed_product(v)
        elif self._primal is None and not tf.executing_eagerly():
            product = self._record(tangent=v)
        else:
            product = self._replay(v)
        return tf.cast(product, self.x.dtype)

    def rmatvec(self, u: Any) -> tf.Tensor:
        """Computes `J_i^T u_i` for every example: the backward mode, eq. (7).

        Args:
            u: Cotangents, `[B, *out]`.

        Returns:
            `[B, *in]`, in the dtype of `x`.

        Raises:
            TypeError: If `u` does not hold real numbers.
            ValueError: If `u` has another shape than `primal`.
        """
        primal = self.primal
        u = _like(u, primal.shape, primal.dtype, "u", "the network's output")
        return self._pull_back(u)

    def _pull_back(self, u: tf.Tensor) -> tf.Tensor:
        primal = self.primal  # Runs the forward pass, which makes the tape.
        return self._tape.gradient(
            primal,
            self.x,
            output_gradients=u,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )

    def _record(self, tangent: tf.Tensor | None) -> tf.Tensor | None:
        """Runs the forward pass; with a tangent, returns J v computed along it."""
        if self.forward_mode == "accumulator":
            # What a replay must start from: read before this pass updates statistics and seeds.
            # Inference may do so too: dropout that is always on.
            self._state = [(v, tf.convert_to_tensor(v.value)) for v in _variables(self.network)]
        accumulator = None
        if tangent is not None:
            accumulator = tf.autodiff.ForwardAccumulator(self.x, tangent)
        self._tape = tf.GradientTape(persistent=True)
        with contextlib.ExitStack() as stack:
            if self._is_partial:
                stack.enter_context(keras.StatelessScope())
                stack.enter_context(_kept_losses(self.network))
            stack.enter_context(self._tape)
            self._tape.watch(self.x)
            self._primal = self._call(self._tape, accumulator)
        return _product_of(accumulator, self._primal)

    def _replay(self, v: tf.Tensor) -> tf.Tensor:
        """Runs the network again from the recorded state, changing nothing, for another J v.

        Eagerly the first J v too: as soon as its tangents are freed, TensorFlow takes the pass that
        they were computed along off an outer tape, and `primal` would have no gradient.
        """
        if self._primal is None:
            self._record(tangent=None)
        accumulator = tf.autodiff.ForwardAccumulator(self.x, v)
        with keras.StatelessScope(state_mapping=self._state), _kept_losses(self.network):
            return _product_of(accumulator, self._call(None, accumulator))

    def _call(
        self,
        tape: tf.GradientTape | None,
        accumulator: tf.autodiff.ForwardAccumulator | None,
    ) -> tf.Tensor:
        _recording.passes.append(_Recorders(tape, accumulator, self._is_partial))
        try:
            with (
                _held_layers(self.network),
                accumulator if accumulator is not None else contextlib.nullcontext(),
            ):
                primal = self.network(self.x, training=self.training)
        finally:
            _recording.passes.pop()
        if not isinstance(primal, tf.Tensor):
            raise TypeError(
                "`network` must return one dense tensor. To differentiate one of several outputs, "
                "build keras.Model(network.input, network.get_layer(name).output). "
                f"Received: an output of type {type(primal).__name__}"
            )
        return primal

    @functools.cached_property
    def _pulled_back_zero(self) -> tuple[tf.GradientTape, tf.Tensor, tf.Tensor]:
        """`u = 0` and `J^T u`, recorded as a function of u, for products by transposition."""
        u = tf.zeros_like(self.primal)
        tape = tf.GradientTape(persistent=True)
        with tape:
            tape.watch(u)
            pulled_back = self._pull_back(u)
        return tape, u, pulled_back

    def _transposed_product(self, v: tf.Tensor) -> tf.Tensor:
        tape, u, pulled_back = self._pulled_back_zero
        return tape.gradient(
            pulled_back,
            u,
            output_gradients=v,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )


def validate_forward_mode(forward_mode: str) -> str:
    """Returns `forward_mode` if it is one of `FORWARD_MODES`.

    Raises:
        ValueError: If it is not.
    """
    if forward_mode not in FORWARD_MODES:
        raise ValueError(
            f"`forward_mode` must be one of {FORWARD_MODES}. Received: forward_mode={forward_mode}"
        )
    return forward_mode


def _product_of(
    accumulator: tf.autodiff.ForwardAccumulator | None, primal: tf.Tensor
) -> tf.Tensor | None:
    if accumulator is None:
        return None
    return accumulator.jvp(primal, unconnected_gradients=tf.UnconnectedGradients.ZERO)


def _as_floating_batch(x: Any, network: keras.Layer) -> tf.Tensor:
    if isinstance(x, (dict, list, tuple)):
        raise TypeError(
            f"`x` must be one floating tensor or array [B, *in]. Received: a {type(x).__name__}"
        )
    x = tf.convert_to_tensor(x)
    if not x.dtype.is_floating:
        raise TypeError(
            "The Jacobian needs a floating input: differentiate with respect to pixels as floats, "
            f"or to the output of an embedding. Received: x of dtype {x.dtype.name}"
        )
    if x.shape.rank is not None and (x.shape.rank == 0 or x.shape[0] == 0):
        raise ValueError(
            "`x` must hold at least one example along its first axis. "
            f"Received: x of shape {tuple(x.shape)}"
        )
    if x.dtype in (tf.float16, tf.bfloat16):
        # Norms of thousands of squares overflow half precision.
        x = tf.cast(x, tf.float32)
    return x


def _like(a: Any, shape: tf.TensorShape, dtype: tf.DType, name: str, what: str) -> tf.Tensor:
    a = tf.convert_to_tensor(a)
    if not (a.dtype.is_floating or a.dtype.is_integer):
        raise TypeError(
            f"`{name}` must hold real numbers. Received: {name} of dtype {a.dtype.name}"
        )
    a = tf.cast(a, dtype)
    if a.shape.rank is not None and shape.rank is not None:
        if a.shape.rank != shape.rank or not a.shape.is_compatible_with(shape):
            raise ValueError(
                f"`{name}` must have the shape of {what}, {tuple(shape)}. "
                f"Received: {name} of shape {tuple(a.shape)}"
            )
    return a
