"""What a graph of operations shows of a forward pass, before it has run.

A pass can hide from its products: TensorFlow gives no derivative, and no error, for operations that
are registered without one, and a pass that is run twice may draw or count twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

# Steps, whose derivative is 0 wherever it exists, and what says in words that it has none.
_CONSTANT_OPERATIONS = {
    *("Floor", "Ceil", "Round", "Rint", "Sign", "FloorDiv", "StopGradient", "PreventGradient"),
    *("ZerosLike", "OnesLike", "Placeholder", "PlaceholderWithDefault"),
}
_DRAWS_OR_ASSIGNS = re.compile(
    "Random|Rng|Stateful|Multinomial|TruncatedNormal|SampleDistorted|Assign"
    "|Resource(Scatter|Apply|Accumulate|SparseApply)"
)
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")


def without_derivative(x: tf.Tensor, y: tf.Tensor) -> str | None:
    """Finds an operation between x and y that would hide a part of the Jacobian.

    Args:
        x: A tensor of a graph.
        y: A floating tensor of the same graph.

    Returns:
        The type of the operation, which may be in a function, branch or loop; None without one.
    """
    return _search(x.graph, {x.ref()}, [y])[0]


def calls_functions(graph: tf.Graph) -> bool:
    """Whether an operation runs code of its own: a function, loop or branch, or Python's."""
    return any(
        op.type.endswith("PyFunc")
        or any(attribute.type in ("func", "list(func)") for attribute in op.op_def.attr)
        for op in graph.get_operations()
    )


def defines_gradients(graph: tf.Graph) -> bool:
    """Whether something in a graph is a `tf.custom_gradient`."""
    return any(_has_own_gradient(op) for op in graph.get_operations())


def draws_or_assigns(operations: Sequence[tf.Operation]) -> str | None:
    """The first operation that does another thing each time it runs, in words; None without one.

    Functions that are called are looked through too. Keras' own random numbers and variables are
    not meant: inside a `keras.StatelessScope` they are functions of a state.
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


def _search(
    graph: tf.Graph, reached: set[Any], targets: Sequence[tf.Tensor]
) -> tuple[str | None, list[bool]]:
    """The operation that hides, and which targets depend on the tensors of `reached`."""
    needed = _needed(targets)
    for op in graph.get_operations():
        inputs = [n for n, t in enumerate(op.inputs) if t.ref() in reached]
        if _has_own_gradient(op):
            # Its first inputs are the results of a body that the gradient does not go through.
            inputs = [n for n in inputs if n >= _number_of_results(op)]
        outputs = [n for n, t in enumerate(op.outputs) if t.ref() in needed and _carries(t)]
        if not inputs or not outputs:
            continue
        bodies = list(_bodies(op))
        for body in bodies:
            found, depends = _search_body(op, body, inputs, outputs)
            if found:
                return found, []
            reached |= {op.outputs[n].ref() for n in depends}
        if bodies:
            continue
        if _has_derivative(op, tuple(inputs)):
            reached |= {op.outputs[n].ref() for n in outputs}
        elif op.type not in _CONSTANT_OPERATIONS:
            return op.type, []
    return None, [t.ref() in reached for t in targets]


def _search_body(
    op: tf.Operation, body: Any, inputs: list[int], outputs: list[int]
) -> tuple[str | None, list[int]]:
    """The same in a function that `op` calls: which outputs depend on its inputs."""
    is_loop = op.type.endswith("While")
    # A branch's operation also takes which branch it is to be.
    skipped = 0 if is_loop or op.type in _CALLS else 1
    reached = {n - skipped for n in inputs if n >= skipped}
    numbers = list(range(len(body.outputs))) if is_loop else outputs
    targets = [body.outputs[n] for n in numbers]
    while True:
        found, depends = _search(body, {body.inputs[n].ref() for n in reached}, targets)
        dependent = [n for n, yes in zip(numbers, depends, strict=False) if yes]
        # What one turn of a loop gives is what the next one takes.
        if found or not is_loop or reached.issuperset(dependent):
            return found, dependent
        reached |= set(dependent)


def _bodies(op: tf.Operation) -> Iterator[Any]:
    """The graphs of the functions that an operation calls, but for the condition of a loop."""
    for attribute in op.op_def.attr:
        if attribute.name == "cond" or attribute.type not in ("func", "list(func)"):
            continue
        value = op.get_attr(attribute.name)
        for function in value if attribute.type == "list(func)" else [value]:
            found = _function(op.graph, function.name)
            if found is not None:
                yield found


def _function(graph: Any, name: str) -> Any:
    """The graph of a function, or None where it is not known in Python."""
    while graph is not None:
        found = graph._get_function(name) if hasattr(graph, "_get_function") else None
        if found is not None:
            return getattr(found, "graph", None)
        graph = getattr(graph, "outer_graph", None)
    return None


def _needed(targets: Sequence[tf.Tensor]) -> set[Any]:
    """All tensors that the targets are computed from."""
    waiting, needed = list(targets), {t.ref() for t in targets}
    while waiting:
        op = waiting.pop().op
        start = _number_of_results(op) if _has_own_gradient(op) else 0
        fresh = [t for t in op.inputs[start:] if t.ref() not in needed]
        needed |= {t.ref() for t in fresh}
        waiting += fresh
    return needed


def _carries(tensor: tf.Tensor) -> bool:
    """Whether a tensor can have a derivative; lists of tensors are of dtype variant."""
    return tensor.dtype.is_floating or tensor.dtype.is_complex or tensor.dtype == tf.variant


def _has_own_gradient(op: tf.Operation) -> bool:
    """Whether it ends a `tf.custom_gradient`: an identity of its results and its arguments."""
    return op.type == "IdentityN" and "_gradient_op_type" in op.node_def.attr


def _number_of_results(op: tf.Operation) -> int:
    """How many of its outputs are results: the copies of the arguments are used by nobody."""
    return max((n + 1 for n, t in enumerate(op.outputs) if t.consumers()), default=1)


def _has_derivative(op: tf.Operation, inputs: tuple[int, ...]) -> bool:
    """Whether TensorFlow has a derivative of an operation in any of some of its inputs."""
    if op.outputs[0].dtype == tf.variant or "_gradient_op_type" in op.node_def.attr:
        return True
    key = op.type, inputs
    if key not in _derivatives:
        _derivatives[key] = _differentiated(op, inputs)
    return _derivatives[key]


_derivatives: dict[tuple[str, tuple[int, ...]], bool] = {}


def _differentiated(op: tf.Operation, inputs: tuple[int, ...]) -> bool:
    """The same, tried on a copy in a graph of its own: nothing is added to the network's graph."""
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
            gradients = tf.gradients(graph.get_tensor_by_name("op:0"), sources)
            return any(gradient is not None for gradient in gradients)
    except Exception:  # No gradient is registered: the products themselves fail, and loudly.
        return True
