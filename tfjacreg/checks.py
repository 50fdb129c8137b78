"""Whether the Jacobian of a network is what its products say, and if not, which layer breaks it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf

from tfjacreg import _keras, arguments, frozen, graphs, signature
from tfjacreg.calls import calls_of_layers
from tfjacreg.error_causes import came_from
from tfjacreg.jacobian import FORWARD_MODES, JacobianOperator, LostDerivative, NotConnected
from tfjacreg.vectors import inner, length, random_unit, unit

_ANSI_ESCAPES = re.compile(r"\x1b\[\d*m")
_MIXES_EXAMPLES = (
    "mixes the examples of a batch: the output of one depends on the input of another. Compute "
    "what it takes from the batch in `with tfjacreg.hold_constant():`"
)
_LOSES_A_DERIVATIVE = (
    "has a derivative that TensorFlow loses: <u, J v> is not <J^T u, v>. Replace it by an "
    "operation with a second derivative"
)
_OTHER_TANGENT = (
    "has another J v by tf.autodiff.ForwardAccumulator than by transposing J^T u, as of a "
    "tf.custom_gradient, whose body it differentiates"
)
_NO_TANGENTS_OF_LOOPS = (
    "cannot be differentiated forward: a loop or a branch in a graph (tf.while_loop, tf.cond) "
    "holds values of dtype variant, which have no tangents"
)
_NOT_CONNECTED = (
    "has no differentiable operation that leads from its input to its output: every product would "
    "be 0. Replace the operation without a derivative (an integer cast, tf.numpy_function, ...)"
)


class _Fault(NamedTuple):
    """What is wrong with a network's products.

    Attributes:
        text: What the network, or the layer, does; it follows a name.
        cause: The exception that told, or None.
    """

    text: str
    cause: Exception | None = None


def check_network(
    network: keras.Layer,
    x: Any,
    *,
    training: bool = True,
    forward_mode: str = "accumulator",
    input: signature.Name = None,
    output: signature.Name = None,
) -> None:
    """Checks that `<u, J v> = <J^T u, v>` (eqs. 6 and 7) and that examples do not mix.

    With random `u`, and `v` half along `J^T u` and half random, so that a tangent lost in either
    direction shows. The first example must not depend on any other, nor any other on it. With
    `forward_mode="accumulator"` the J v of a `tf.autodiff.ForwardAccumulator` must be that of the
    transposed product too. Nothing of the network changes: no weight, statistic or seed. Where a
    product is not finite there is no verdict, and a gradient that is wrong in the same way both
    times (`tf.custom_gradient`) passes.

    Args:
        network: A `keras.Layer`.
        x: What it takes, with two examples or more.
        training: Whether the network runs in training mode.
        forward_mode: `"accumulator"` or `"transpose"`; see `regularizers.SpectralNorm`.
        input: Which floating input the Jacobian is taken in; see `JacobianOperator`.
        output: Which output it is of, likewise.

    Raises:
        TypeError: If `network` is not a `keras.Layer`, or `x` holds no floating tensor.
        ValueError: If `x` has fewer than two examples, or a layer fails; the message names it.
    """
    arguments.network(network)
    arguments.boolean("training", training)
    arguments.one_of("forward_mode", forward_mode, FORWARD_MODES)
    taken = signature.taken(network, x, input)
    shape = tuple(taken.x.shape)
    if shape[0] < 2:
        raise ValueError(
            "`x` must hold at least two examples, to see whether the network mixes them. "
            f"Received: x of shape {shape}"
        )
    if not network.built:
        network(
            keras.tree.map_structure(
                lambda t: keras.KerasTensor(t.shape, dtype=t.dtype.name), taken.packed()
            )
        )
    with _restored(network) as variables:
        fault = _fault(network, taken, training, forward_mode, output, variables)
        if fault is None:
            return
        name = f"the network {network.name!r} ({type(network).__name__}) as a whole"
        text, cause = fault.text, fault.cause
        for layer, function, value in calls_of_layers(network, taken, training):
            one = signature.Taken(value, [value], 0)
            found = _fault(function, one, training, forward_mode, None, variables)
            # A layer may well take a tensor that says nothing of its output.
            is_idle = found is not None and found.text == _NOT_CONNECTED != fault.text
            if found is not None and not is_idle:
                name, text, cause = _named(layer), found.text, found.cause
                break
        other = forward_mode == "accumulator" and fault.text != _MIXES_EXAMPLES
        if other and _fault(network, taken, training, "transpose", output, variables) is None:
            text += ". With forward_mode='transpose' it can be had"
    raise ValueError(
        f"The Jacobian of network {network.name!r} cannot be had with "
        f"forward_mode={forward_mode!r}: {name} {text}. "
        f"Received: x of shape {shape}, training={training}"
    ) from cause


def contradiction_tolerance(network: keras.Layer, dtype: str) -> float:
    """How far, relatively, two products of one recorded pass may differ by rounding alone.

    Half of the digits of the coarsest layer. In a pass that is recorded once rounding takes far
    less: in float32 2e-5 of an EfficientNetB0, of most networks 1e-6.

    Args:
        network: The network.
        dtype: That of the products.
    """
    dtypes = {dtype, *(layer.compute_dtype for layer in _keras.layers_of(network))}
    # Layers that look up tokens, or make them, compute in integers or strings: those round nothing.
    floating = (name for name in dtypes if tf.as_dtype(name).is_floating)
    return float(np.sqrt(max(float(ml_dtypes.finfo(name).eps) for name in floating)))


def refuse_hidden_operations(jacobian: JacobianOperator) -> None:
    """Refuses a network with an operation whose part of the Jacobian would be lost in silence.

    That a branch beside others has no derivative shows in no product: only the graph of the pass
    tells. It is traced once for each network and shape of x.

    Raises:
        ValueError: If there is such an operation.
    """
    network = jacobian.network
    try:
        fault = jacobian.of_graph("hides", lambda op: _hidden(op.x, op.primal))
    except Exception:  # It runs eagerly only: then nothing is to be seen.
        return
    if fault is not None:
        raise ValueError(
            f"The Jacobian of network {network.name!r} is not known: it {fault}. `check_network` "
            f"names the layer. Received: x of shape {tuple(jacobian.x.shape)}"
        )


def explained(error: Exception, network: keras.Layer, forward_mode: str) -> ValueError:
    """The error of a penalty's gradient in words, for what a check cannot see before training.

    Args:
        error: What TensorFlow raised.
        network: The network that is trained.
        forward_mode: That of the penalty.
    """
    text, advice = _reason(error), ""
    if forward_mode == "accumulator" and "variant" in text:
        text = f"it {_NO_TANGENTS_OF_LOOPS}"
        advice = " With forward_mode='transpose' it can be had."
    return ValueError(
        f"The gradient of the penalty of network {network.name!r} cannot be had with "
        f"forward_mode={forward_mode!r}: {text}.{advice} Received: {type(error).__name__}"
    )


def _fault(
    network: keras.Layer,
    taken: signature.Taken,
    training: bool,
    forward_mode: str,
    output: signature.Name,
    variables: dict[int, tuple[tf.Variable, tf.Tensor]],
) -> _Fault | None:
    """What is wrong with a network's products, if anything is.

    Adds to `variables` the values of those that the network keeps besides Keras'.
    """
    passes: list[tuple[tf.Tensor, tf.Tensor]] = []

    def operator(leaves: list[tf.Tensor], tangent: tf.Tensor | None = None) -> JacobianOperator:
        given = taken._replace(leaves=leaves)
        return JacobianOperator(
            network,
            given.packed(),
            training=training,
            tangent=tangent,
            input=given.position,
            output=output,
        )

    def forward(leaves: list[tf.Tensor]) -> tf.Tensor:
        with frozen.without_trace(network):
            op = operator(leaves)
        passes.append((op.x, op.primal))
        return op.primal

    def products(leaves: list[tf.Tensor]) -> tuple[tf.Tensor, ...]:
        with frozen.without_trace(network):
            x = leaves[taken.position]
            along = random_unit(x, (0, 2)) if forward_mode == "accumulator" else None
            op = operator(leaves, along)
            # Of the first example alone: what the others have of it shows how examples mix.
            u = _first_alone(random_unit(tf.cast(op.primal, op.x.dtype), (0, 0)))
            back = op.rmatvec(u)
            v = _first_alone(unit(unit(back) + random_unit(op.x, (0, 1))))
            forth = op.matvec(v)
            dots = inner(u, forth)[0], inner(back, v)[0], length(forth)[0]
            if along is None:
                return back[1:], forth[1:], *dots
            return back[1:], forth[1:], *dots, op.tangent_out, op.matvec(tf.identity(along))

    try:
        graph = _traced(forward, taken.leaves, variables).graph
        _reset_dropout_masks(network)  # Those of this graph are of no use in the next one.
        # A loop in a graph is another operation than an eager one, and eagerly an accumulator
        # takes the gradient that a `tf.custom_gradient` defines. Training runs in a graph.
        if graphs.calls_functions(graph) or (
            forward_mode == "accumulator" and graphs.defines_gradients(graph)
        ):
            found = _traced(products, taken.leaves, variables)(taken.leaves)
        else:
            # The same operations one by one take a tenth of the seconds of their graph.
            found = products(taken.leaves)
        others, other_outputs, forward_dot, backward_dot, scale, *both = (
            part.numpy() for part in found
        )
    except signature.NotOne:  # What is asked for is wrong, not the network.
        raise
    except LostDerivative as error:
        reason = _LOSES_A_DERIVATIVE
        if error.__cause__ is not None:
            reason = f"cannot be differentiated as often as needed ({_reason(error.__cause__)})"
        return _Fault(reason, error)
    except NotConnected as error:
        return _Fault(_NOT_CONNECTED, error)
    except Exception as error:  # Any that TensorFlow has for an operation without a derivative.
        if came_from(error, KeyboardInterrupt):  # Ctrl-C, in the middle of C++.
            raise KeyboardInterrupt from error
        reason = _reason(error)
        if "variant" in reason:
            return _Fault(f"{_NO_TANGENTS_OF_LOOPS} ({reason})", error)
        return _Fault(f"cannot be differentiated as often as needed ({reason})", error)
    finally:
        _reset_dropout_masks(network)
    lost = _hidden(*passes[0])
    if lost is not None:
        return _Fault(lost)
    if any(np.any(np.isfinite(part) & (part != 0)) for part in (others, other_outputs)):
        return _Fault(_MIXES_EXAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 where J = 0 is no fault.
        errors = {_LOSES_A_DERIVATIVE: np.abs(forward_dot - backward_dot) / scale}
        if both:
            along, across = (part.reshape(len(part), -1).astype("float64") for part in both)
            off = np.linalg.norm(along - across, axis=1) / np.linalg.norm(across, axis=1)
            errors[_OTHER_TANGENT] = np.max(off, initial=0, where=~np.isnan(off))
    tolerance = contradiction_tolerance(network, taken.x.dtype.name)
    if any(error > tolerance for error in errors.values()):
        # Deep networks in half precision round more: what is lost is lost by its whole size.
        tolerance += 4 * _rounding(network, taken, training, output)
    return next((_Fault(text) for text, error in errors.items() if error > tolerance), None)


def _traced(
    function: Callable[[list[tf.Tensor]], Any],
    leaves: list[tf.Tensor],
    variables: dict[int, tuple[tf.Variable, tf.Tensor]],
) -> Any:
    """The function as a graph; adds what it may change to `variables`."""
    traced = tf.function(function, autograph=False).get_concrete_function(leaves)
    for variable in traced.graph.variables:
        variables.setdefault(id(variable), (variable, tf.identity(variable)))
    return traced


def _rounding(
    network: keras.Layer, taken: signature.Taken, training: bool, output: signature.Name
) -> float:
    """How far, relatively, the products of a pass are from linear: by rounding alone."""

    def deviations(leaves: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        given = taken._replace(leaves=leaves)
        with frozen.without_trace(network):
            op = JacobianOperator(
                network, given.packed(), training=training, input=given.position, output=output
            )
            found = []
            for product, like in (
                (op.matvec, op.x),
                (op.rmatvec, tf.cast(op.primal, op.x.dtype)),
            ):
                a, b = random_unit(like, (0, 3)), random_unit(like, (0, 4))
                whole = product(a + b)
                off = length(product(a) + product(b) - whole)
                found.append(tf.math.divide_no_nan(off, length(whole)))
            return found[0], found[1]

    traced = tf.function(deviations, autograph=False)
    return max(float(tf.reduce_max(part)) for part in traced(taken.leaves))


@contextlib.contextmanager
def _restored(network: keras.Layer) -> Iterator[dict[int, tuple[tf.Variable, tf.Tensor]]]:
    """Puts back what a check has changed and `keras.StatelessScope` does not know.

    These are plain `tf.Variable`s, which the user of the context collects.
    """
    own = {id(v.value) for v in network.variables}
    variables: dict[int, tuple[tf.Variable, tf.Tensor]] = {}
    try:
        yield variables
    finally:
        for key, (variable, value) in variables.items():
            if key not in own:
                variable.assign(value)


def _reset_dropout_masks(network: keras.Layer) -> None:
    """Recurrent cells keep their masks when no loop around them ends."""
    for layer in _keras.layers_of(network):
        for name in ("reset_dropout_mask", "reset_recurrent_dropout_mask"):
            getattr(layer, name, lambda: None)()


def _hidden(x: tf.Tensor, primal: tf.Tensor) -> str | None:
    """What an operation between x and the output does whose part of the Jacobian is lost."""
    found = graphs.without_derivative(x, primal)
    if found is None:
        return None
    return f"has an operation without a derivative, {found}: its part of the Jacobian would be lost"


def _named(layer: keras.Operation) -> str:
    return f"layer {layer.name!r} ({type(layer).__name__})"


def _first_alone(a: tf.Tensor) -> tf.Tensor:
    """`a` with zeros for all examples but the first."""
    return tf.concat([a[:1], tf.zeros_like(a[1:])], axis=0)


def _reason(error: BaseException) -> str:
    """What happened, without where: Keras and TensorFlow wrap it in their own advice."""
    said = str(error).split("Arguments received by ")[0].strip()
    where = ("Exception encountered when calling", "[[{{node")
    lines = [line.strip() for line in _ANSI_ESCAPES.sub("", said).splitlines()]
    lines = [line for line in lines if line and not line.startswith(where)]
    if "TraceType" in said:
        return "tf.autodiff.ForwardAccumulator cannot trace the gradient of an operation of it"
    if isinstance(error, LookupError):
        return f"TensorFlow has no second derivative of it: {lines[-1]}"
    return lines[-1] if lines else type(error).__name__
