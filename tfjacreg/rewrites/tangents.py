"""Rules by which TensorFlow's accumulator computes tangents, for common operations.

`tf.autodiff.ForwardAccumulator` has one rule for all operations: it transposes the gradient. To do
so it builds a function for every kind and shape of operation, which takes most of the time until
the first step; and if an input has no tangent, such as a kernel, it multiplies zeros by it. Here a
linear operation is applied to the tangent itself, a product to the tangent of each factor that has
one, and the derivative of an activation is written out. The tangents are the same, and so are all
their derivatives. Operations without a rule are left to TensorFlow.

The rules act only along passes that are being recorded, in the thread and graph of the pass.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfjacreg import passes

# Attributes whose names differ from those of the arguments that they come from.
_ARGUMENTS = {"squeeze_dims": "axis"}


class Operation:
    """An operation that has run, and the tangents of its inputs.

    Attributes:
        inputs: Its inputs, flat.
        outputs: Its outputs. No tape has recorded them yet, so nothing that is to be differentiated
            may be computed from them.
        given: The tangent of each input; None if no tangent reaches the input.
        filled: The same with zeros in place of None, for floating inputs.
    """

    def __init__(
        self,
        kind: str,
        attributes: Sequence[Any],
        inputs: Sequence[tf.Tensor],
        outputs: Sequence[tf.Tensor],
        given: Sequence[tf.Tensor | None],
        filled: Sequence[tf.Tensor | None],
    ) -> None:
        self._raw = getattr(tf.raw_ops, kind)
        pairs = zip(attributes[::2], attributes[1::2], strict=True)
        self._attributes = {_ARGUMENTS.get(name, name): value for name, value in pairs}
        self.inputs = inputs
        self.outputs = outputs
        self.given = given
        self.filled = filled

    def output(self) -> tf.Tensor:
        """Its first output computed again, so that tapes record it; a graph merges the two."""
        return self.again(self.inputs)[0]

    def again(self, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The outputs of the same operation for other inputs."""
        names = list(_parameters(self._raw))
        groups = self._grouped(inputs)
        arguments = dict(zip(names, groups, strict=False))
        # The dtypes of inputs are attributes too, but not arguments.
        for name in names[len(groups) :]:
            if name in self._attributes:
                arguments[name] = self._attributes[name]
        outputs = self._raw(**arguments)
        return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]

    def _grouped(self, inputs: Sequence[tf.Tensor]) -> list[Any]:
        """The inputs as the operation's function takes them: some as lists."""
        if "N" not in self._attributes:
            return list(inputs)
        size = self._attributes["N"]
        return [list(inputs[:size]), *inputs[size:]]

    def attribute(self, name: str) -> Any:
        """The value of an attribute."""
        return self._attributes[name]


@functools.lru_cache
def _parameters(raw: Callable[..., Any]) -> Sequence[str]:
    return tuple(inspect.signature(raw).parameters)


Rule = Callable[[Operation], Sequence[Any]]


def _linear(op: Operation) -> Sequence[Any]:
    """For an operation that is linear in all its floating inputs together."""
    tangents = zip(op.inputs, op.filled, strict=True)
    return op.again([x if tangent is None else tangent for x, tangent in tangents])


def _multilinear(op: Operation) -> Sequence[Any]:
    """For a product: linear in each of its factors."""
    terms = []
    for n, tangent in enumerate(op.given):
        if tangent is not None:
            terms += op.again([*op.inputs[:n], tangent, *op.inputs[n + 1 :]])
    return [functools.reduce(tf.add, terms)]


def _sum(op: Operation) -> Sequence[Any]:
    """For a sum of two: a tangent of the shape of the sum is passed on as it is."""
    (x, y), (of_x, of_y) = op.inputs, op.given
    if of_x is not None and of_y is not None:
        return op.again([of_x, of_y])
    if of_x is not None:
        return [of_x if _covers(x, y) else tf.broadcast_to(of_x, tf.shape(op.outputs[0]))]
    return [of_y if _covers(y, x) else tf.broadcast_to(of_y, tf.shape(op.outputs[0]))]


def _difference(op: Operation) -> Sequence[Any]:
    if op.given[1] is None:
        return _sum(op)
    return _linear(op)


def _bias(op: Operation) -> Sequence[Any]:
    return [op.given[0]] if op.given[1] is None else _linear(op)


def _covers(x: tf.Tensor, y: tf.Tensor) -> bool:
    """Whether x is known to have the shape to which x and y broadcast."""
    if x.shape.rank is None or y.shape.rank is None or y.shape.rank > x.shape.rank:
        return False
    sizes = list(x.shape)[x.shape.rank - y.shape.rank :]
    return all(b == 1 or (b is not None and a == b) for a, b in zip(sizes, y.shape, strict=True))


def _quotient(op: Operation) -> Sequence[Any]:
    (_, y), (of_x, of_y) = op.inputs, op.given
    if of_y is None:
        return op.again([of_x, y])
    of_quotient = op.output() * of_y
    return op.again([-of_quotient if of_x is None else of_x - of_quotient, y])


def _squared_difference(op: Operation) -> Sequence[Any]:
    (x, y), (of_x, of_y) = op.inputs, op.given
    difference = 2 * (x - y)
    if of_y is None:
        return [difference * of_x]
    return [difference * (-of_y if of_x is None else of_x - of_y)]


def _of_input(derivative: Callable[[Any, Any], Any]) -> Rule:
    """For a function of each element: its derivative from the input, times the tangent."""
    return lambda op: [derivative(op.inputs[0], op.given[0])]


def _of_output(derivative: Callable[[Any, Any], Any]) -> Rule:
    """The same for a derivative that is a function of the output."""
    return lambda op: [derivative(op.output(), op.given[0])]


def _leaky_relu(op: Operation) -> Sequence[Any]:
    alpha = op.attribute("alpha")
    return [tf.raw_ops.LeakyReluGrad(gradients=op.given[0], features=op.inputs[0], alpha=alpha)]


def _softmax(y: tf.Tensor, tangent: tf.Tensor) -> tf.Tensor:
    return y * (tangent - tf.reduce_sum(y * tangent, -1, keepdims=True))


def _log_softmax(y: tf.Tensor, tangent: tf.Tensor) -> tf.Tensor:
    return tangent - tf.reduce_sum(tf.exp(y) * tangent, -1, keepdims=True)


_LINEAR = (
    *("AddN", "AvgPool", "AvgPool3D", "BatchToSpaceND", "BroadcastTo", "Cast", "ConcatV2"),
    *("Cumsum", "DepthToSpace", "ExpandDims", "GatherNd", "GatherV2", "Identity", "Mean"),
    *("MirrorPad", "Neg", "Pack", "Pad", "PadV2", "Reshape", "ReverseV2", "Roll", "Select"),
    *("SelectV2", "Slice", "SpaceToBatchND", "SpaceToDepth", "Split", "SplitV", "Squeeze"),
    *("StridedSlice", "Sum", "Tile", "Transpose", "Unpack"),
)
_PRODUCTS = (
    *("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "MatMul", "Mul", "Einsum"),
    *("Conv2D", "Conv3D", "DepthwiseConv2dNative"),
    # Transposed convolutions.
    *("Conv2DBackpropInput", "Conv3DBackpropInputV2", "DepthwiseConv2dNativeBackpropInput"),
)
_raw = tf.raw_ops
_OF_INPUT: dict[str, Callable[[Any, Any], Any]] = {
    "Erf": lambda x, t: t * (2 / math.sqrt(math.pi) * tf.exp(-tf.square(x))),
    "Erfc": lambda x, t: t * (-2 / math.sqrt(math.pi) * tf.exp(-tf.square(x))),
    "Log": lambda x, t: t / x,
    "Relu": lambda x, t: _raw.ReluGrad(gradients=t, features=x),
    "Relu6": lambda x, t: _raw.Relu6Grad(gradients=t, features=x),
    "Softplus": lambda x, t: _raw.SoftplusGrad(gradients=t, features=x),
    "Softsign": lambda x, t: _raw.SoftsignGrad(gradients=t, features=x),
    "Square": lambda x, t: t * (2 * x),
}
_OF_OUTPUT: dict[str, Callable[[Any, Any], Any]] = {
    "Elu": lambda y, t: _raw.EluGrad(gradients=t, outputs=y),
    "Exp": lambda y, t: t * y,
    "LogSoftmax": _log_softmax,
    "Rsqrt": lambda y, t: _raw.RsqrtGrad(y=y, dy=t),
    "Selu": lambda y, t: _raw.SeluGrad(gradients=t, outputs=y),
    "Sigmoid": lambda y, t: _raw.SigmoidGrad(y=y, dy=t),
    "Softmax": _softmax,
    "Sqrt": lambda y, t: _raw.SqrtGrad(y=y, dy=t),
    "Tanh": lambda y, t: _raw.TanhGrad(y=y, dy=t),
}
RULES: dict[str, Rule] = {
    **dict.fromkeys(_LINEAR, _linear),
    **dict.fromkeys(_PRODUCTS, _multilinear),
    **{name: _of_input(derivative) for name, derivative in _OF_INPUT.items()},
    **{name: _of_output(derivative) for name, derivative in _OF_OUTPUT.items()},
    "Add": _sum,
    "AddV2": _sum,
    "BiasAdd": _bias,
    # The end of a `tf.custom_gradient` in a graph: the accumulator differentiates its body.
    "IdentityN": lambda op: op.filled,
    "LeakyRelu": _leaky_relu,
    "RealDiv": _quotient,
    "SquaredDifference": _squared_difference,
    "Sub": _difference,
}


def _given(
    inputs: Sequence[tf.Tensor], tangents: Sequence[tf.Tensor | None]
) -> list[tf.Tensor | None] | None:
    """The tangents that a pass has for some inputs; None if another accumulator asks."""
    stack = passes.recorded.stack
    if not stack or stack[-1].accumulator is None:
        return None
    if stack[-1].graph is not passes.current_graph():
        return None
    jvp = stack[-1].accumulator.jvp
    given = [jvp(x) if x.dtype.is_floating else None for x in inputs]
    own = [a is b for a, b in zip(given, tangents, strict=True) if a is not None]
    return given if own and all(own) else None


def _tangents(
    theirs: Callable[..., Any],
    kind: str,
    attributes: Sequence[Any],
    inputs: Sequence[tf.Tensor],
    outputs: Sequence[tf.Tensor],
    tangents: Sequence[tf.Tensor | None],
    *rest: Any,
) -> Any:
    """The tangents of an operation's outputs, for which TensorFlow asks after it has run."""
    rule = RULES.get(kind)
    if rule is not None and all(y.dtype.is_floating for y in outputs):
        given = _given(inputs, tangents)
        if given is not None:
            return rule(Operation(kind, attributes, inputs, outputs, given, tangents))
    return theirs(kind, attributes, inputs, outputs, tangents, *rest)


def _register() -> bool:
    """Registers the rules with TensorFlow; returns False if it has no place for them.

    Both names are private, and exist from TensorFlow 2.18 to 2.21.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from tensorflow.python import pywrap_tfe
        from tensorflow.python.eager import forwardprop

        theirs = forwardprop._jvp_dispatch
        pywrap_tfe.TFE_Py_RegisterJVPFunction(functools.partial(_tangents, theirs))
        return True
    return False


IS_REGISTERED = _register()
