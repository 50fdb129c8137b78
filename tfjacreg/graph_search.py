"""What the graph of a forward pass shows before it runs, and its products do not.

For some operations TensorFlow has no derivative and raises no error. For a few it has a wrong
derivative of a derivative. And a pass that is run twice may draw or count twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfjacreg.recording import HELD
from tfjacreg.rewrites import MOMENTS, SELECTION

# Steps, whose derivative is 0 wherever it exists, and operations that are meant to be constant.
_CONSTANT_OPERATIONS = {
    *("Floor", "Ceil", "Round", "Rint", "Sign", "FloorDiv", "StopGradient", "PreventGradient"),
    *("ZerosLike", "OnesLike", "Placeholder", "PlaceholderWithDefault"),
}
# Operations that only change the shape or dtype of a tensor.
_RESHAPES = {"Cast", "Identity", "Reshape", "Squeeze", "ExpandDims"}
_DRAWS_OR_ASSIGNS = re.compile(
    "Random|Rng|Stateful|Multinomial|TruncatedNormal|SampleDistorted|Assign"
    "|Resource(Scatter|Apply|Accumulate|SparseApply)"
)
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_BUILT_ELSEWHERE = (
    "Nothing can stand in for it where it was traced before tfjacreg saw it (a SavedModel, a "
    "concrete function, tf.raw_ops bound to a name)"
)
# Operations whose derivatives TensorFlow has wrong where a factor is exactly 0, with the order of
# the first wrong derivative. In a pass they are replaced wherever the sizes are known.
_PRODUCTS = {"Cumprod": 1, "Prod": 2, "SegmentProd": 2, "UnsortedSegmentProd": 2}
_MAX_POOLINGS = {"MaxPool", "MaxPoolV2", "MaxPool3D", "MaxPoolWithArgmax"}


class Needs(NamedTuple):
    """Which derivatives must be right.

    Attributes:
        order: 1 for sigma; 2 for the gradient of a penalty.
        is_compiled: Whether XLA compiles the pass.
    """

    order: int = 2
    is_compiled: bool = False


def fault(x: tf.Tensor, y: tf.Tensor, needs: Needs) -> str | None:
    """Finds an operation between x and y whose derivative is lost or wrong.

    Args:
        x: A tensor of a graph.
        y: A floating tensor of the same graph.
        needs: Which derivatives must be right.

    Returns:
        What the graph does wrong, in words that follow the name of a network or layer; None if
        nothing is found. The operation may be in a function, branch or loop.
    """
    return _Search(needs).run(x.graph, {x.ref()}, [y])[0]


def calls_functions(graph: tf.Graph) -> bool:
    """Whether an operation calls a function, loop or branch, or Python."""
    return any(
        op.type.endswith("PyFunc")
        or any(attribute.type in ("func", "list(func)") for attribute in op.op_def.attr)
        for op in graph.get_operations()
    )


def all_operations(graph: Any) -> Iterator[tf.Operation]:
    """The operations of a graph, and of the functions, branches and loops that they call."""
    for op in graph.get_operations():
        yield op
        for body in _bodies(op):
            yield from all_operations(body)


def defines_gradients(graph: tf.Graph) -> bool:
    """Whether a graph has a `tf.custom_gradient` that does not belong to tfjacreg."""
    return any(_has_own_gradient(op) and SELECTION not in op.name for op in graph.get_operations())


def draws_or_assigns(operations: Sequence[tf.Operation]) -> str | None:
    """The first operation that does something else each time it runs, in words; None if none does.

    Functions that are called are searched too. Keras' random numbers and variables do not count:
    inside a `keras.StatelessScope` they are functions of a state.
    """
    for op in operations:
        bodies = list(_bodies(op))
        for body in bodies:
            found = draws_or_assigns(body.get_operations())
            if found:
                return found
        if not bodies and op.op_def.is_stateful and _DRAWS_OR_ASSIGNS.match(op.type):
            return f"by the operation {op.type}"
    return None


class _Search:
    """The search for an operation with a fault, through functions, branches and loops."""

    def __init__(self, needs: Needs) -> None:
        self.needs = needs

    def run(
        self, graph: tf.Graph, reached: set[Any], targets: Sequence[tf.Tensor]
    ) -> tuple[str | None, list[bool]]:
        """Returns what is wrong, and which targets depend on the tensors in `reached`."""
        needed = _needed(targets)
        for op in graph.get_operations():
            if HELD in op.name:
                continue
            inputs = [n for n, t in enumerate(op.inputs) if t.ref() in reached]
            if _has_own_gradient(op):
                # Its first inputs are the results of a body that the gradient bypasses.
                inputs = [n for n in inputs if n >= _number_of_results(op)]
            outputs = [n for n, t in enumerate(op.outputs) if t.ref() in needed and _carries(t)]
            if not inputs or not outputs:
                continue
            bodies = list(_bodies(op))
            for body in bodies:
                found, depends = self._run_body(op, body, inputs, outputs)
                if found:
                    return found, []
                reached |= {op.outputs[n].ref() for n in depends}
            if bodies or op.type in _CONSTANT_OPERATIONS:
                continue
            found = _lost(op, tuple(inputs)) or self._wrong(op, inputs, reached)
            if found:
                return found, []
            reached |= {op.outputs[n].ref() for n in outputs}
        return None, [t.ref() in reached for t in targets]

    def _run_body(
        self, op: tf.Operation, body: Any, inputs: list[int], outputs: list[int]
    ) -> tuple[str | None, list[int]]:
        """The same in a function that `op` calls: which of its outputs depend on its inputs."""
        is_loop = op.type.endswith("While")
        # The operation of a branch also takes the index of the branch.
        skipped = 0 if is_loop or op.type in _CALLS else 1
        reached = {n - skipped for n in inputs if n >= skipped}
        numbers = list(range(len(body.outputs))) if is_loop else outputs
        targets = [body.outputs[n] for n in numbers]
        while True:
            found, depends = self.run(body, {body.inputs[n].ref() for n in reached}, targets)
            dependent = [n for n, yes in zip(numbers, depends, strict=False) if yes]
            # What one turn of a loop returns is the input of the next.
            if found or not is_loop or reached.issuperset(dependent):
                return found, dependent
            reached |= set(dependent)

    def _wrong(self, op: tf.Operation, inputs: list[int], reached: set[Any]) -> str | None:
        """Whether TensorFlow has a wrong derivative of an operation; says which, in words."""
        order = _PRODUCTS.get(op.type)
        if order is not None and order <= self.needs.order:
            return (
                f"has a product, {op.type}, whose {('first', 'second')[order - 1]} derivative "
                "TensorFlow has wrong where a factor is exactly 0. Call tf.math.cumprod, "
                "tf.reduce_prod or keras.ops on tensors of known shape, so that tfjacreg can "
                f"stand in. {_BUILT_ELSEWHERE}"
            )
        if op.type in _MAX_POOLINGS and self.needs.is_compiled:
            return (
                f"has a max-pooling, {op.type}, whose J v and penalty's gradient XLA has wrong "
                "where two inputs are close. Use keras.layers.MaxPooling, tf.nn.max_pool, or "
                f"jit_compile=False. {_BUILT_ELSEWHERE}"
            )
        if self.needs.order < 2:
            return None
        if op.type == "SoftmaxCrossEntropyWithLogits" and 1 in inputs:
            return (
                "has a cross entropy, SoftmaxCrossEntropyWithLogits, whose labels depend on the "
                "input: TensorFlow has no second derivative in them. Call "
                "tf.nn.softmax_cross_entropy_with_logits, so that tfjacreg can stand in. "
                f"{_BUILT_ELSEWHERE}"
            )
        if _holds_the_mean_of_a_variance(op, reached):
            return (
                "has a variance whose mean TensorFlow takes for a constant (tf.nn.moments): the "
                "gradient of the penalty would lack a part. Call tf.nn.moments or the layer "
                "itself, so that tfjacreg can stand in, or write the variance with tf.reduce_mean. "
                f"{_BUILT_ELSEWHERE}"
            )
        return None


def _lost(op: tf.Operation, inputs: tuple[int, ...]) -> str | None:
    """Whether an operation has no derivative in one of the inputs that are reached, in words."""
    missing = _without_derivative(op, inputs)
    if not missing:
        return None
    where = "" if len(missing) == len(inputs) else f" (in input {missing[0]})"
    return (
        f"has an operation without a derivative, {op.type}{where}: its part of the Jacobian would "
        "be lost"
    )


def _holds_the_mean_of_a_variance(op: tf.Operation, reached: set[Any]) -> bool:
    """Whether it is the `(x - stop_gradient(mean(x)))^2` of a `tf.nn.moments` not replaced."""
    if op.type != "SquaredDifference" or MOMENTS in op.name:
        return False
    for tensor, held in (op.inputs, tuple(op.inputs)[::-1]):
        held = _before_reshapes(held).op
        if held.type != "StopGradient":
            continue
        mean = _before_reshapes(held.inputs[0]).op
        if mean.type == "Mean" and mean.inputs[0].ref() in reached:
            return _before_reshapes(mean.inputs[0]) is _before_reshapes(tensor)
    return False


def _before_reshapes(tensor: tf.Tensor) -> tf.Tensor:
    while tensor.op.type in _RESHAPES:
        tensor = tensor.op.inputs[0]
    return tensor


def _bodies(op: tf.Operation) -> Iterator[Any]:
    """The graphs of the functions that an operation calls, except the condition of a loop."""
    for attribute in op.op_def.attr:
        if attribute.name == "cond" or attribute.type not in ("func", "list(func)"):
            continue
        value = op.get_attr(attribute.name)
        for function in value if attribute.type == "list(func)" else [value]:
            found = _function(op.graph, function.name)
            if found is not None:
                yield found


def _function(graph: Any, name: str) -> Any:
    """The graph of a function, or None if Python does not know it."""
    while graph is not None:
        found = graph._get_function(name) if hasattr(graph, "_get_function") else None
        if found is not None:
            return getattr(found, "graph", None)
        graph = getattr(graph, "outer_graph", None)
    return None


def made_by(tensor: tf.Tensor) -> str:
    """The type of the operation that makes a tensor of a graph, whatever its shape and dtype."""
    return _before_reshapes(tensor).op.type


def _needed(targets: Sequence[tf.Tensor]) -> set[Any]:
    """All tensors that the targets are computed from."""
    waiting, needed = list(targets), {t.ref() for t in targets}
    while waiting:
        op = waiting.pop().op
        if op.type in _CONSTANT_OPERATIONS or HELD in op.name:
            continue
        start = _number_of_results(op) if _has_own_gradient(op) else 0
        fresh = [t for t in op.inputs[start:] if t.ref() not in needed]
        needed |= {t.ref() for t in fresh}
        waiting += fresh
    return needed


def _carries(tensor: tf.Tensor) -> bool:
    """Whether a tensor can have a derivative; lists of tensors have the dtype variant."""
    return tensor.dtype.is_floating or tensor.dtype.is_complex or tensor.dtype == tf.variant


def _has_own_gradient(op: tf.Operation) -> bool:
    """Whether it ends a `tf.custom_gradient`: an identity of the results and the arguments."""
    return op.type == "IdentityN" and "_gradient_op_type" in op.node_def.attr


def _number_of_results(op: tf.Operation) -> int:
    """How many of its outputs are results: nobody uses the copies of the arguments."""
    return max((n + 1 for n, t in enumerate(op.outputs) if t.consumers()), default=1)


def _without_derivative(op: tf.Operation, inputs: tuple[int, ...]) -> tuple[int, ...]:
    """The inputs, among those given, in which TensorFlow has no derivative of an operation."""
    if op.outputs[0].dtype == tf.variant or "_gradient_op_type" in op.node_def.attr:
        return ()
    inputs = tuple(n for n in inputs if _carries(op.inputs[n]))
    switches = tuple(name for name, value in op.node_def.attr.items() if value.b)
    key = op.type, inputs, switches
    if key not in _missing:
        _missing[key] = _differentiated(op, inputs)
    return _missing[key]


_missing: dict[tuple[Any, ...], tuple[int, ...]] = {}


def _differentiated(op: tf.Operation, inputs: tuple[int, ...]) -> tuple[int, ...]:
    """The same, by trying a copy in a graph of its own: the network's graph stays as it is."""
    nodes = tf.compat.v1.GraphDef()
    copy = nodes.node.add()
    copy.CopyFrom(op.node_def)
    copy.name = "op"
    del copy.input[:]
    for number, t in enumerate(op.inputs):
        taken = nodes.node.add()
        if t.op.type == "Const":
            taken.CopyFrom(t.op.node_def)
        else:
            taken.op = "Placeholder"
            taken.attr["dtype"].type = t.dtype.as_datatype_enum
            taken.attr["shape"].shape.CopyFrom(t.shape.as_proto())
        taken.name = f"input_{number}"
        copy.input.append(taken.name)
    try:
        with tf.Graph().as_default() as graph:
            tf.graph_util.import_graph_def(nodes, name="")
            sources = [graph.get_tensor_by_name(f"input_{number}:0") for number in inputs]
            outputs = [t for t in graph.get_operation_by_name("op").outputs if _carries(t)]
            gradients = tf.gradients(outputs, sources)
    except Exception:  # No gradient is registered: then the products themselves raise an error.
        return ()
    return tuple(n for n, found in zip(inputs, gradients, strict=True) if found is None)
