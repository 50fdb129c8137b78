"""Checks that the products of a network are right, and finds the layer where they are not."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf

from tfjacreg import (
    _keras,
    arguments,
    first_derivatives,
    graph_search,
    recording,
    second_derivatives,
    signature,
)
from tfjacreg.error_causes import raise_what_says_nothing
from tfjacreg.jacobian import FORWARD_MODES, JacobianOperator, LostDerivative, NotConnected
from tfjacreg.layer_calls import LayerCall, calls_of_layers
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
    "has a J v by tf.autodiff.ForwardAccumulator that differs from the one by transposing J^T u, "
    "as with a tf.custom_gradient, whose body the accumulator differentiates"
)
_NO_TANGENTS_OF_LOOPS = (
    "cannot be differentiated forward: a loop or a branch in a graph (tf.while_loop, tf.cond) "
    "holds values of dtype variant, which have no tangents"
)
_NOT_CONNECTED = (
    "has no differentiable operation that leads from its input to its output: every product would "
    "be 0. Replace the operation without a derivative (an integer cast, tf.numpy_function, ...)"
)
_LOST_PART = (
    "has a derivative that its values contradict: <J^T u, v> differs by {:.3g} % from a difference "
    "of its values, as where an operation without a derivative stands beside others"
)
_NOT_FINITE = (
    "has a product J v or J^T u that is not finite where its output is finite: a derivative is NaN "
    "or infinite there, and so would be the penalty"
)
_NO_FINITE_GRADIENT = (
    "has a product <u, J v> whose gradient, which training takes, is not finite where its values "
    "are: TensorFlow's second derivative is NaN or infinite. Write it with other operations"
)
_WRONG_GRADIENT = (
    "has a second derivative that TensorFlow has wrong: the gradient of <u, J v>, which training "
    "takes, differs by {:.3g} % from that of a difference of its values. Write it with other "
    "operations"
)


class _Fault(NamedTuple):
    """What is wrong with a network's products.

    Attributes:
        text: What the network or layer does wrong; in a message it follows the name.
        cause: The exception that showed the fault, or None.
    """

    text: str
    cause: Exception | None = None


class _Settings(NamedTuple):
    """How a network is going to be trained.

    Attributes:
        training: Whether it runs in training mode.
        forward_mode: How the first J v is computed.
        is_compiled: Whether XLA compiles the step.
    """

    training: bool
    forward_mode: str
    is_compiled: bool


def check_network(
    network: keras.Layer,
    x: Any,
    *,
    training: bool = True,
    forward_mode: str = "accumulator",
    jit_compile: bool = False,
    input: signature.Name = None,
    output: signature.Name = None,
) -> None:
    """Checks that the products, and the gradient that training takes of them, are right.

    For the whole network:
    `<u, J v> = <J^T u, v>` (eqs. 6 and 7) for a random `u` and a `v` that is half along `J^T u` and
    half random, so that a derivative lost in either direction shows. The first example does not
    depend on any other, nor any other on it. With `forward_mode="accumulator"`, the J v of a
    `tf.autodiff.ForwardAccumulator` equals the one by transposing J^T u. Products are finite where
    the output is. No operation in the graph is one whose derivative TensorFlow lacks or has wrong.

    For every layer:
    The gradient of `<u, J v>` in the weights and the input of the layer equals the gradient of
    `<u, f(x + e v) - f(x - e v)> / 2e`, which needs first derivatives only
    (`second_derivatives.py`). Keras layers that are alike are checked once.

    The network does not change: no weight, statistic or seed. A custom gradient
    (`tf.custom_gradient`) that is wrong but consistent with itself passes the checks of the whole
    network; the check of its layer refuses it only if the gradient's own derivative shows the
    error.

    Args:
        network: A `keras.Layer`.
        x: What the network takes, with at least two examples, or one if its `Input` fixes that.
        training: Whether the network runs in training mode.
        forward_mode: `"accumulator"` or `"transpose"`; see `regularizers.SpectralNorm`.
        jit_compile: Whether XLA is going to compile the training step, as in `compile`.
        input: The floating input that the Jacobian is taken with respect to; see
            `JacobianOperator`.
        output: The output that the Jacobian is taken of, likewise.

    Raises:
        TypeError: If `network` is not a `keras.Layer`, `x` or the output holds no floating tensor,
            or `training` or `jit_compile` is not True or False.
        ValueError: If `x` has too few examples, or another argument is out of range. If the
            network or a layer fails; the message names it.
    """
    arguments.network(network)
    settings = _Settings(
        arguments.boolean("training", training),
        arguments.one_of("forward_mode", forward_mode, FORWARD_MODES),
        arguments.boolean("jit_compile", jit_compile),
    )
    given = signature.resolve_input(network, x, input)
    shape = tuple(given.x.shape)
    if shape[0] < 2 and not signature.takes_one(network):
        raise ValueError(
            "`x` must hold at least two examples, to see whether the network mixes them. "
            f"Received: x of shape {shape}"
        )
    if not network.built:
        network(signature.symbolic(given.packed()))
    with _restored(network) as variables:
        found = _Check(network, given, settings, output, variables).run()
    if found is not None:
        name, fault = found
        raise ValueError(
            f"The Jacobian of network {network.name!r} cannot be had with "
            f"forward_mode={forward_mode!r}: {name} {fault.text}. "
            f"Received: x of shape {shape}, training={training}"
        ) from fault.cause


def contradiction_tolerance(network: keras.Layer, dtype: str) -> float:
    """How far two products of one recorded pass may differ, relatively, by rounding alone.

    The square root of the machine epsilon of the coarsest layer: half of its digits. Real rounding
    is far smaller: in float32 2e-5 for EfficientNetB0, 1e-6 for most networks.

    Args:
        network: The network.
        dtype: The dtype of the products.
    """
    dtypes = {dtype, *_floating_dtypes(network)}
    return float(np.sqrt(max(float(ml_dtypes.finfo(name).eps) for name in dtypes)))


def _floating_dtypes(network: keras.Layer) -> set[str]:
    # Layers that look up or make tokens compute in integers or strings, which are not rounded.
    dtypes = {layer.compute_dtype for layer in _keras.layers_of(network)}
    return {name for name in dtypes if tf.as_dtype(name).is_floating}


def _is_precise(network: keras.Layer) -> bool:
    """Whether no layer computes in half precision, in which products may well overflow."""
    return all(tf.as_dtype(name).size >= 4 for name in _floating_dtypes(network))


def refuse_hidden_operations(jacobian: JacobianOperator) -> None:
    """Refuses a network with an operation whose part of the Jacobian would be lost silently.

    If one branch beside others has no derivative, no product shows it, only the graph of the pass.
    If the network runs eagerly only, a product is compared with a difference of values instead.
    Either is done once for each network, shape of x and values of the layers' flags.

    Raises:
        ValueError: If there is such an operation.
    """
    network = jacobian.network
    fault = jacobian.once("hides", lambda: _hidden_fault(jacobian))
    if fault is not None:
        raise ValueError(
            f"The Jacobian of network {network.name!r} is not known: it {fault}. `check_network` "
            f"names the layer. Received: x of shape {tuple(jacobian.x.shape)}"
        )


def _hidden_fault(jacobian: JacobianOperator) -> str | None:
    needs = graph_search.Needs(order=1)
    try:
        return jacobian.traced(lambda op: graph_search.fault(op.x, op.primal, needs))
    except Exception as error:
        raise_what_says_nothing(error)
        if not tf.executing_eagerly():
            return None
    # The network runs eagerly only: there is no graph to look at.
    lost = first_derivatives.lost_part(jacobian)
    return None if lost is None else _LOST_PART.format(100 * lost)


def explained(error: Exception, network: keras.Layer, forward_mode: str) -> ValueError:
    """Explains an error from the gradient of a penalty that no check could foresee.

    Args:
        error: What TensorFlow raised.
        network: The network that is trained.
        forward_mode: The forward mode of the penalty.
    """
    text, advice = _reason(error), ""
    if forward_mode == "accumulator" and "variant" in text:
        text = f"it {_NO_TANGENTS_OF_LOOPS}"
        advice = " With forward_mode='transpose' it can be had."
    return ValueError(
        f"The gradient of the penalty of network {network.name!r} cannot be had with "
        f"forward_mode={forward_mode!r}: {text}.{advice} Received: {type(error).__name__}"
    )


class _Check:
    """The check of one network and of its layers.

    `variables` collects the values of plain `tf.Variable`s, which Keras does not keep track of.
    """

    def __init__(
        self,
        network: keras.Layer,
        given: signature.NetworkInput,
        settings: _Settings,
        output: signature.Name,
        variables: dict[int, tuple[tf.Variable, tf.Tensor]],
    ) -> None:
        self.network = network
        self.given = given
        self.settings = settings
        self.output = output
        self.variables = variables
        self.runs_functions = False

    def run(self) -> tuple[str, _Fault] | None:
        """Returns the name of the network or the first layer that is wrong, and its fault."""
        fault = self.fault(is_whole=True)
        try:
            calls = calls_of_layers(self.network, self.given, self.settings.training)
        except Exception as error:  # It runs in a graph only: its layers cannot be looked at.
            raise_what_says_nothing(error)
            calls = []
        if fault is None:
            return self._wrong_second_derivative(calls)
        name = None
        for call, position in _varied(calls):
            # A functional model is nothing but its layers and operations: if its products are not
            # finite, and those of none of these are, they have only grown too large.
            if fault.text == _NOT_FINITE and _keras.graph_of(call.layer) is not None:
                continue
            found = self._of(call, position).fault()
            # A layer may well take a tensor that its output does not depend on.
            is_idle = found is not None and found.text == _NOT_CONNECTED != fault.text
            if found is not None and not is_idle:
                name, fault = _named(call.layer), found
                break
        if name is None:
            if fault.text == _NOT_FINITE and calls:
                return self._wrong_second_derivative(calls)
            name = f"the network {self.network.name!r} ({type(self.network).__name__}) as a whole"
        if self.settings.forward_mode == "accumulator" and fault.text != _MIXES_EXAMPLES:
            transposed = self.settings._replace(forward_mode="transpose")
            other = _Check(self.network, self.given, transposed, self.output, self.variables)
            if other.fault() is None:
                text = f"{fault.text}. With forward_mode='transpose' it can be had"
                fault = fault._replace(text=text)
        return name, fault

    def fault(self, *, is_whole: bool = False) -> _Fault | None:
        """Finds what is wrong with the products of the network itself, if anything.

        Args:
            is_whole: False for a layer inside another, which may fold what later layers unfold.
        """
        settings, given = self.settings, self.given
        try:
            graph, x, primal = self._graph()
            if is_whole:
                signature.refuse_folded(self.network, x, primal)
            # The masks of this graph cannot be used in the next one.
            _reset_dropout_masks(self.network)
            self.runs_functions = graph_search.calls_functions(graph)
            lost = graph_search.fault(x, primal, graph_search.Needs(2, settings.is_compiled))
            if lost is not None:
                return _Fault(lost)
            products = self._products(graph)
        except signature.NotOne:  # The arguments are wrong, not the network.
            raise
        except Exception as error:  # TensorFlow has many for an operation without a derivative.
            return _fault_of(error)
        finally:
            _reset_dropout_masks(self.network)
        tolerance = contradiction_tolerance(self.network, given.x.dtype.name)
        is_precise = _is_precise(self.network)
        text = products.contradiction(tolerance, is_precise=is_precise)
        if text in (_LOSES_A_DERIVATIVE, _OTHER_TANGENT):
            # Deep networks in half precision round more; a lost derivative is lost in full.
            tolerance += 4 * _rounding(self.network, given, settings.training, self.output)
            text = products.contradiction(tolerance, is_precise=is_precise)
        return None if text is None else _Fault(text)

    def _of(self, call: LayerCall, position: int) -> _Check:
        value = call.value(position)
        one = signature.NetworkInput(value, [value], 0)
        return _Check(call.function(position), one, self.settings, None, self.variables)

    def _wrong_second_derivative(self, calls: list[LayerCall]) -> tuple[str, _Fault] | None:
        """The first layer whose gradient of `<u, J v>` differs from the one by differences."""
        seen = set()
        for call, position in _varied(calls):
            # A functional model is nothing but its layers and operations, and a Keras layer is
            # compared as a whole.
            if _keras.graph_of(call.layer) is not None or call.is_part:
                continue
            if (kind := call.kind(position)) in seen:
                continue
            seen.add(kind)
            # A recurrence of Keras that stays a loop is compared eagerly: as a graph it would take
            # seconds to trace.
            in_graph = (
                self.runs_functions
                and not call.is_of_keras
                and self._of(call, position).calls_functions()
            )
            try:
                found = second_derivatives.compare(
                    call, position, self.settings.training, in_graph=in_graph
                )
            except LookupError as error:
                return _named(call.layer), _fault_of(error)
            _reset_dropout_masks(self.network)
            if found is not None and found.is_wrong:
                wrong = _WRONG_GRADIENT.format(100 * found.error)
                text = wrong if np.isfinite(found.error) else _NO_FINITE_GRADIENT
                return _named(call.layer), _Fault(text)
        return None

    def calls_functions(self) -> bool:
        """Whether something in the network runs as another operation in a graph than eagerly."""
        try:
            return graph_search.calls_functions(self._graph()[0])
        except Exception as error:  # It runs eagerly only.
            raise_what_says_nothing(error)
            return False
        finally:
            _reset_dropout_masks(self.network)

    def _operator(
        self, leaves: list[tf.Tensor], tangent: tf.Tensor | None = None
    ) -> JacobianOperator:
        given = self.given._replace(leaves=leaves)
        return JacobianOperator(
            self.network,
            given.packed(),
            training=self.settings.training,
            tangent=tangent,
            input=given.position,
            output=self.output,
        )

    def _graph(self) -> tuple[Any, tf.Tensor, tf.Tensor]:
        """The pass as a graph that is never run, with its input and its output."""
        found: list[tf.Tensor] = []

        def forward(leaves: list[tf.Tensor]) -> tf.Tensor:
            with recording.without_trace(self.network):
                op = self._operator(leaves)
            found.extend((op.x, op.primal))
            return op.primal

        graph = _traced(forward, self.given.leaves, self.variables).graph
        return graph, found[0], found[1]

    def _products(self, graph: Any) -> _Products:
        """Computes the products as training computes them."""
        leaves, has_tangent = self.given.leaves, self.settings.forward_mode == "accumulator"

        def products(leaves: list[tf.Tensor]) -> _Products:
            with recording.without_trace(self.network):
                x = leaves[self.given.position]
                along = random_unit(x, (0, 2)) if has_tangent else None
                op = self._operator(leaves, along)
                # u of the first example alone: any other example that reacts shows the mixing.
                u = _first_alone(random_unit(tf.cast(op.primal, op.x.dtype), (0, 0)))
                back = op.rmatvec_to_transpose(u)
                # Deep networks with fresh weights have products whose squares are too large for
                # float32.
                along_back = tf.cast(unit(tf.cast(back, tf.float64)), op.x.dtype)
                v = _first_alone(unit(along_back + random_unit(op.x, (0, 1))))
                forth = op.matvec(v)
                wide_u, wide_forth, wide_back, wide_v = (
                    tf.cast(a, tf.float64) for a in (u, forth, back, v)
                )
                both = () if along is None else (op.tangent_out, op.matvec(tf.identity(along)))
                return _Products(
                    op.primal,
                    back,
                    forth,
                    inner(wide_u, wide_forth)[0],
                    inner(wide_back, wide_v)[0],
                    length(wide_forth)[0],
                    both,
                )

        # A loop in a graph is another operation than an eager one, and eagerly an accumulator
        # takes the gradient that a `tf.custom_gradient` defines. Training runs in a graph.
        if self.runs_functions or (has_tangent and graph_search.defines_gradients(graph)):
            found = _traced(products, leaves, self.variables)(leaves)
        else:
            # Running the same operations one by one takes a tenth of the time of tracing a graph.
            found = products(leaves)
        return _Products(*tf.nest.map_structure(lambda part: part.numpy(), tuple(found)))


class _Products(NamedTuple):
    """The products of a network at one u and one v, both of the first example alone.

    Attributes:
        primal: The output, `[B, *out]`.
        back: J^T u, `[B, *in]`.
        forth: J v, `[B, *out]`.
        forward_dot: `<u, J v>` of the first example.
        backward_dot: `<J^T u, v>` of the first example.
        scale: `||J v||` of the first example.
        both: With an accumulator: its J v for another v, and the J v by transposing J^T u.
    """

    primal: Any
    back: Any
    forth: Any
    forward_dot: Any
    backward_dot: Any
    scale: Any
    both: tuple[Any, ...]

    def contradiction(self, tolerance: float, *, is_precise: bool) -> str | None:
        """Says what the products contradict, in words that follow a name; None if nothing.

        Args:
            tolerance: How far two products may differ, relatively.
            is_precise: Whether a product that is not finite counts: half precision overflows.
        """
        products = (self.back, self.forth, *self.both)
        if (
            is_precise
            and np.all(np.isfinite(self.primal))
            and not all(np.all(np.isfinite(product)) for product in products)
        ):
            return _NOT_FINITE
        if any(np.any(np.isfinite(a[1:]) & (a[1:] != 0)) for a in (self.back, self.forth)):
            return _MIXES_EXAMPLES
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 where J = 0 is no fault.
            if np.abs(self.forward_dot - self.backward_dot) / self.scale > tolerance:
                return _LOSES_A_DERIVATIVE
            if self.both:
                along, across = (a.reshape(len(a), -1).astype("float64") for a in self.both)
                off = np.linalg.norm(along - across, axis=1) / np.linalg.norm(across, axis=1)
                if np.max(off, initial=0, where=~np.isnan(off)) > tolerance:
                    return _OTHER_TANGENT
        return None


def _varied(calls: list[LayerCall]) -> Iterator[tuple[LayerCall, int]]:
    """Every call, once for each tensor that it can be varied in."""
    for call in calls:
        for position in call.positions:
            yield call, position


def _fault_of(error: Exception) -> _Fault:
    """What the error raised by a product says about the network."""
    if isinstance(error, LostDerivative):
        if error.__cause__ is None:
            return _Fault(_LOSES_A_DERIVATIVE, error)
        reason = _reason(error.__cause__)
        return _Fault(f"cannot be differentiated as often as needed ({reason})", error)
    if isinstance(error, NotConnected):
        return _Fault(_NOT_CONNECTED, error)
    raise_what_says_nothing(error)
    reason = _reason(error)
    if "variant" in reason:
        return _Fault(f"{_NO_TANGENTS_OF_LOOPS} ({reason})", error)
    return _Fault(f"cannot be differentiated as often as needed ({reason})", error)


def _traced(
    function: Callable[[list[tf.Tensor]], Any],
    leaves: list[tf.Tensor],
    variables: dict[int, tuple[tf.Variable, tf.Tensor]],
) -> Any:
    """Traces the function into a graph; adds the variables that it may change to `variables`."""
    traced = tf.function(function, autograph=False).get_concrete_function(leaves)
    for variable in traced.graph.variables:
        variables.setdefault(id(variable), (variable, tf.identity(variable)))
    return traced


def _rounding(
    network: keras.Layer, given: signature.NetworkInput, training: bool, output: signature.Name
) -> float:
    """How far the products of a pass are from linear, relatively, by rounding alone."""

    def deviations(leaves: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        inputs = given._replace(leaves=leaves)
        with recording.without_trace(network):
            op = JacobianOperator(
                network, inputs.packed(), training=training, input=inputs.position, output=output
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
    return max(float(tf.reduce_max(part)) for part in traced(given.leaves))


@contextlib.contextmanager
def _restored(network: keras.Layer) -> Iterator[dict[int, tuple[tf.Variable, tf.Tensor]]]:
    """Restores what a check has changed and `keras.StatelessScope` does not know about.

    These are plain `tf.Variable`s, which the user of this context collects in the dict it yields.
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
    """Drops the masks that recurrent cells keep when no loop around them ends."""
    for layer in _keras.layers_of(network):
        for name in ("reset_dropout_mask", "reset_recurrent_dropout_mask"):
            getattr(layer, name, lambda: None)()


def _named(layer: keras.Operation) -> str:
    return f"layer {layer.name!r} ({type(layer).__name__})"


def _first_alone(a: tf.Tensor) -> tf.Tensor:
    """`a` with zeros for all examples except the first."""
    return tf.concat([a[:1], tf.zeros_like(a[1:])], axis=0)


def _reason(error: BaseException) -> str:
    """The reason of an error, without its place: Keras and TensorFlow wrap it in advice."""
    said = str(error).split("Arguments received by ")[0].strip()
    where = ("Exception encountered when calling", "[[{{node")
    lines = [line.strip() for line in _ANSI_ESCAPES.sub("", said).splitlines()]
    lines = [line for line in lines if line and not line.startswith(where)]
    if "TraceType" in said:
        return "tf.autodiff.ForwardAccumulator cannot trace the gradient of an operation of it"
    if isinstance(error, LookupError):
        return f"TensorFlow has no second derivative of it: {lines[-1]}"
    return lines[-1] if lines else type(error).__name__
