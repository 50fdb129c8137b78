"""What a network begins and ends with: scales of its input, outputs that are probabilities.

Both are read off the layers and operations of a functional model; the network is not run.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfjacreg import _keras, signature

# Pixels in 0..255 are scaled by 1/255, or by one over their standard deviation, about 1/60.
_SHRINKS = 0.1
_SATURATING = ("softmax", "sigmoid", "hard_sigmoid", "sparsemax", "sparse_sigmoid")
# Layers that pass on the values of their input, all or some, perhaps in other places.
_PASSING = (
    *(keras.layers.Reshape, keras.layers.Flatten, keras.layers.Permute, keras.layers.Identity),
    *(keras.layers.RepeatVector, keras.layers.Dropout, keras.layers.ActivityRegularization),
    *(keras.layers.Resizing, keras.layers.CenterCrop, keras.layers.RandomCrop),
    *(keras.layers.RandomFlip, keras.layers.RandomRotation, keras.layers.RandomTranslation),
    *(keras.layers.RandomZoom, keras.layers.GaussianNoise, keras.layers.Masking),
    *(keras.layers.ZeroPadding1D, keras.layers.ZeroPadding2D, keras.layers.ZeroPadding3D),
    *(keras.layers.Cropping1D, keras.layers.Cropping2D, keras.layers.Cropping3D),
)
# The same in keras.ops, by the names of the operations' classes.
_OPERATIONS = (
    *("Cast", "Clip", "Reshape", "Squeeze", "ExpandDims", "Transpose", "Swapaxes", "Moveaxis"),
    *("GetItem", "Flip", "Identity", "Resize", "Pad"),
)
# Layers that make probabilities from probabilities.
_MIXING = (
    *(keras.layers.Average, keras.layers.Concatenate, keras.layers.Maximum, keras.layers.Minimum),
    *(keras.layers.GlobalAveragePooling1D, keras.layers.GlobalAveragePooling2D),
    *(keras.layers.GlobalMaxPooling1D, keras.layers.GlobalMaxPooling2D),
)


def shrinking_start(network: keras.Layer, input: signature.Name) -> tuple[str, float] | None:
    """Finds the layer by which a network scales its input down, and by how much.

    If several scales follow each other, it is the last one, with the product of all.

    Args:
        network: The network. If the order of its layers is not known, any layer counts.
        input: Which input is meant: a position, key or name; None for all.

    Returns:
        The layer, in words, and the scale. None if the scale is at least 0.1, or if a part of the
        network takes the input unscaled.
    """
    graph = _keras.graph_of(network)
    if graph is None:
        found = [scale for layer in _keras.layers_of(network) if (scale := _scale(layer))]
        return next((scale for scale in found if scale[1] < _SHRINKS), None)
    reached = {id(tensor): ("", 1.0) for tensor in _inputs_meant(graph, input)}
    taken = _scales_taken(graph, reached)
    # What nothing else takes is an output.
    taken += [reached[id(tensor)] for tensor in graph.outputs if id(tensor) in reached]
    largest = max(taken, key=lambda scale: scale[1], default=("", 1.0))
    return largest if largest[1] < _SHRINKS else None


def _scales_taken(graph: Any, reached: dict[int, tuple[str, float]]) -> list[tuple[str, float]]:
    """The scales of the input at the operations of a functional graph that compute with it.

    Args:
        graph: The graph.
        reached: The tensors of the graph that are the scaled input, by id, with the last scale in
            words and the product of all; those that follow are added.
    """
    taken = []
    for node in _keras.nodes_in_order(graph):
        places = [n for n, tensor in enumerate(node.input_tensors) if id(tensor) in reached]
        if not places:
            continue
        so_far = reached[id(node.input_tensors[places[0]])]
        inner = _keras.graph_of(node.operation)
        if inner is not None and len(inner.inputs) == len(node.input_tensors):
            within = {id(inner.inputs[n]): reached[id(node.input_tensors[n])] for n in places}
            taken += _scales_taken(inner, within)
            for tensor, made in zip(node.output_tensors, inner.outputs, strict=True):
                if id(made) in within:
                    reached[id(tensor)] = within[id(made)]
        elif _passes_on(node):
            reached.update((id(tensor), so_far) for tensor in node.output_tensors)
        elif (scale := _scale(node.operation) or _scale_of_numbers(node)) is not None:
            name, size = scale
            reached.update((id(t), (name, so_far[1] * size)) for t in node.output_tensors)
        else:
            taken += [reached[id(node.input_tensors[n])] for n in places]
    return taken


def _passes_on(node: Any) -> bool:
    """Whether an operation passes on the values of its one tensor, or adds a constant to them."""
    if len(node.input_tensors) != 1:
        return False
    kind = type(node.operation)
    is_shift = kind.__name__ in ("Add", "Subtract") and _constant(node) is not None
    is_operation = kind.__module__.startswith("keras.src.ops.") and kind.__name__ in _OPERATIONS
    return isinstance(node.operation, _PASSING) or is_operation or is_shift


def _scale(operation: Any) -> tuple[str, float] | None:
    """The name of a Keras layer that scales its input, and by how much; None for other layers."""
    if isinstance(operation, keras.layers.Rescaling):
        scale = operation.scale
    elif isinstance(operation, keras.layers.Normalization) and not operation.invert:
        if not operation.built or getattr(operation, "variance", None) is None:
            return None
        scale = 1 / np.maximum(np.sqrt(np.asarray(operation.variance)), keras.config.epsilon())
    else:
        return None
    # The median: a channel that never varies says nothing about the others.
    size = float(np.median(np.abs(np.asarray(scale, float))))
    return (f"layer {operation.name!r} ({type(operation).__name__})", size) if size else None


def _scale_of_numbers(node: Any) -> tuple[str, float] | None:
    """The scale of x in `x / number` or `number * x`, written out; or with an array of numbers."""
    kind = type(node.operation).__name__
    size = _constant(node)
    if not size or kind not in ("TrueDivide", "Divide", "Multiply"):
        return None
    return f"operation {node.operation.name!r} ({kind})", size if kind == "Multiply" else 1 / size


def _constant(node: Any) -> float | None:
    """The median size of the one constant that an operation takes beside a tensor, or None."""
    found = [
        part
        for part in (*node.arguments.args, *node.arguments.kwargs.values())
        if isinstance(part, int | float | np.ndarray | np.number) or tf.is_tensor(part)
    ]
    return float(np.median(np.abs(np.asarray(found[0], float)))) if len(found) == 1 else None


def _inputs_meant(graph: Any, name: signature.Name) -> list[Any]:
    """The inputs that a name stands for; all floating inputs if it is none of their names."""
    inputs = list(graph.inputs)
    names = list(zip(signature.keys(graph.input), (t.name for t in inputs), strict=True))
    found = signature.named(name, names, range(len(inputs)))
    return [inputs[n] for n in found] or [tensor for tensor in inputs if "float" in tensor.dtype]


def saturating_end(graph: Any, tensor: Any) -> str | None:
    """The operation that makes a tensor of a functional graph, in words, if it saturates.

    Args:
        graph: A functional model.
        tensor: One of its symbolic tensors.
    """
    for node in _keras.nodes_in_order(graph):
        made = [id(one) for one in node.output_tensors]
        if id(tensor) not in made or not node.input_tensors:
            continue
        inner = _keras.graph_of(node.operation)
        if inner is not None:
            return saturating_end(inner, inner.outputs[made.index(id(tensor))])
        if _passes_on(node) or isinstance(node.operation, _MIXING):
            ends = [saturating_end(graph, one) for one in node.input_tensors]
            return ends[0] if all(ends) else None
        return saturation(node.operation)
    return None


def saturation(operation: Any) -> str | None:
    """What gives an operation's outputs, in words, if they are probabilities; otherwise None.

    Args:
        operation: A layer or another operation of Keras.
    """
    if isinstance(operation, keras.layers.TimeDistributed):
        return saturation(operation.layer)
    named = f"{operation.name!r} ({type(operation).__name__})"
    if isinstance(operation, keras.layers.Softmax):
        return f"they come from the softmax {named}"
    if isinstance(operation, keras.layers.Lambda):
        function = operation.function
    elif isinstance(operation, keras.layers.Layer):
        function = getattr(operation, "activation", None)
    else:
        function = type(operation)  # For example keras.ops.softmax in a functional network.
    name = getattr(function, "__name__", type(function).__name__).lower()
    for kind in _SATURATING:
        if name in (kind, f"{kind}_v2", kind.replace("_", "")):
            return f"they come from the {kind} of {named}"
    return None
