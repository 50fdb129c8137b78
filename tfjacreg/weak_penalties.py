"""Penalties that cannot act: what the layers of a network, its loss and a first step say of them.

Nothing here runs the network. Each warning is told once for a model.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tfjacreg import _keras, signature

# A penalty below this part of the loss in the first step trains nothing. Fresh weights give a small
# slope that grows: with the default factor LeNet begins at 9e-4 of its loss on the digits. Behind a
# Rescaling by 1/255 that is 4e-6.
_LEAST_PART = 3e-5
# Pixels in 0..255 are scaled by 1/255, or by one through their deviation: 1/60, say.
_SHRINKS = 0.1
_SATURATING = ("softmax", "sigmoid", "hard_sigmoid", "sparsemax", "sparse_sigmoid")
# A layer that passes the values of its input on.
_PASSING = (
    *(keras.layers.Reshape, keras.layers.Flatten, keras.layers.Permute, keras.layers.Identity),
    *(keras.layers.RepeatVector, keras.layers.Dropout, keras.layers.ActivityRegularization),
)
_OF_PROBABILITIES = (
    *("BinaryCrossentropy", "CategoricalCrossentropy", "SparseCategoricalCrossentropy"),
    *("BinaryFocalCrossentropy", "CategoricalFocalCrossentropy", "KLDivergence"),
)


class PenaltyWarning(UserWarning):
    """A penalty of the Jacobian that cannot act, or acts in other units than it seems.

    `RegularizedModel` gives it once, at the first training step or before: for outputs that are
    probabilities, for inputs that the network scales down itself, and where factor times penalty is
    below 3e-5 of the loss in the first step. `docs/troubleshooting.md` says what to do.
    With `warnings.filterwarnings("ignore", category=tfjacreg.PenaltyWarning)` you hear of none;
    `message=` of that function leaves out one kind.
    """


def warn_of_layers(
    network: keras.Layer, loss: Any, input: signature.Name, output: signature.Name
) -> None:
    """Warns of what the layers and the loss show before anything is computed.

    Args:
        network: The network.
        loss: That of `compile`.
        input: Which input the Jacobian is taken in.
        output: Which output it is of.
    """
    saturating = _saturating_end(network, loss, output)
    if saturating is None and _takes_probabilities(loss, network, output):
        saturating = "the loss takes them for probabilities, without from_logits=True"
    if saturating is not None:
        _warn(
            f"The outputs of network {network.name!r} are probabilities: {saturating}. Their "
            "Jacobian is near 0 wherever the network is sure, so that the penalty hardly acts and "
            "rewards confidence. Let the network end in logits, and give the loss "
            "from_logits=True"
        )
    scale = shrinking_start(network, input)
    if scale is not None:
        layer, factor = scale
        _warn(
            f"The inputs of network {network.name!r} are scaled by {factor:.2g} inside, by "
            f"{layer}: sigma is per unit of the input as it comes, such as a grey level of 0..255, "
            f"and is smaller than per unit of the scaled one by that number. Scale in the data, "
            f"and train the network behind it; or multiply the factor of the penalty by "
            f"{1 / factor:.2g}"
        )


def warn_of_first_step(network: keras.Layer, factor: float, penalty: float, loss: float) -> None:
    """Warns of a penalty that is nothing beside the loss.

    Not of one that is 0, as it is at first where a last layer starts at 0.

    Args:
        network: The network.
        factor: That of the penalty.
        penalty: The penalty of the first step, without its factor.
        loss: The loss of that step, the penalty in it.
    """
    part, rest = abs(factor * penalty), abs(loss - factor * penalty)
    if math.isfinite(rest) and 0 < part < _LEAST_PART * rest:
        _warn(
            f"The penalty of network {network.name!r} hardly acts: in the first step factor times "
            f"penalty is {part:.2g} beside a loss of {rest:.2g}. Take a larger factor, or look for "
            "what makes the Jacobian small: inputs in 0..255, a loss that is a sum, outputs that "
            "saturate"
        )


def shrinking_start(network: keras.Layer, input: signature.Name) -> tuple[str, float] | None:
    """The layer with which a network scales its input down, in words, and by how much; or None.

    Args:
        network: The network. Where the order of its layers is not known, any of them counts.
        input: Which input is meant: a position, key or name; None for all.
    """
    graph = _keras.graph_of(network)
    found: Iterator[tuple[str, float] | None]
    if graph is None:
        found = (_scale(layer) for layer in _keras.layers_of(network))
    else:
        found = _scales_at(graph, _inputs_meant(graph, input))
    shrinking = (scale for scale in found if scale is not None and scale[1] < _SHRINKS)
    return next(shrinking, None)


def _scales_at(graph: Any, tensors: list[Any]) -> Iterator[tuple[str, float] | None]:
    """How the operations that take these tensors of a functional graph scale them."""
    meant = {id(tensor) for tensor in tensors}
    for node in _keras.nodes_in_order(graph):
        places = [n for n, tensor in enumerate(node.input_tensors) if id(tensor) in meant]
        if not places:
            continue
        inner = _keras.graph_of(node.operation)
        if inner is not None and len(inner.inputs) == len(node.input_tensors):
            yield from _scales_at(inner, [inner.inputs[n] for n in places])
        elif isinstance(node.operation, _PASSING):
            yield from _scales_at(graph, list(node.output_tensors))
        else:
            yield _scale(node.operation) or _scale_of_numbers(node)


def _scale(operation: Any) -> tuple[str, float] | None:
    """By how much a layer of Keras' scales its input."""
    if isinstance(operation, keras.layers.Rescaling):
        scale = operation.scale
    elif isinstance(operation, keras.layers.Normalization) and not operation.invert:
        if not operation.built or getattr(operation, "variance", None) is None:
            return None
        scale = 1 / np.maximum(np.sqrt(np.asarray(operation.variance)), keras.config.epsilon())
    else:
        return None
    # A channel that never varies says nothing of the others.
    size = float(np.median(np.abs(np.asarray(scale, float))))
    return (f"layer {operation.name!r} ({type(operation).__name__})", size) if size else None


def _scale_of_numbers(node: Any) -> tuple[str, float] | None:
    """By how much `x / number` or `number * x`, written out, scales x."""
    kind = type(node.operation).__name__
    numbers = [part for part in node.arguments.args if isinstance(part, int | float) and part]
    if len(numbers) != 1 or kind not in ("TrueDivide", "Divide", "Multiply"):
        return None
    size = abs(float(numbers[0]))
    return f"operation {node.operation.name!r} ({kind})", size if kind == "Multiply" else 1 / size


def _inputs_meant(graph: Any, name: signature.Name) -> list[Any]:
    """The inputs that a name stands for; all floating ones, if it is none of theirs."""
    inputs = list(graph.inputs)
    keys = [".".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(graph.input)]
    named = [
        tensor
        for number, (tensor, key) in enumerate(zip(inputs, keys, strict=True))
        if name is not None and name in (key, tensor.name, number)
    ]
    return named or [tensor for tensor in inputs if "float" in tensor.dtype]


def _outputs_meant(network: keras.Layer, graph: Any, name: signature.Name) -> list[int]:
    """The positions of the outputs that a name stands for; all, if it is none of theirs."""
    keys = [".".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(graph.output)]
    names = getattr(network, "output_names", None) or keys
    named = [
        number
        for number, key in enumerate(keys)
        if name is not None and name in (key, names[number], number)
    ]
    return named or list(range(len(keys)))


def _saturating_end(network: keras.Layer, loss: Any, output: signature.Name) -> str | None:
    """The last operation of the output that is meant, in words, if it makes probabilities."""
    graph = _keras.graph_of(network)
    if graph is None:
        # Which layer runs last is not known: the loss may say that it is another one.
        last = (getattr(network, "layers", None) or [network])[-1]
        is_of_logits = any(getattr(one, "from_logits", False) for one in keras.tree.flatten(loss))
        return None if is_of_logits else _saturation(last)
    positions = _outputs_meant(network, graph, output)
    ends = [_end(graph, graph.outputs[position]) for position in positions]
    # Pixels of an image in, pixels of an image out: a sigmoid bounds them, and that is all.
    is_image = [
        graph.outputs[position].shape in [tensor.shape for tensor in graph.inputs]
        and "softmax" not in (end or "")
        for position, end in zip(positions, ends, strict=True)
    ]
    if all(end is not None for end in ends) and not all(is_image):
        return ends[0]
    return None


def _end(graph: Any, tensor: Any) -> str | None:
    """The operation that makes a tensor of a functional graph, in words, if it saturates."""
    for node in _keras.nodes_in_order(graph):
        made = [id(one) for one in node.output_tensors]
        if id(tensor) not in made or not node.input_tensors:
            continue
        inner = _keras.graph_of(node.operation)
        if inner is not None:
            return _end(inner, inner.outputs[made.index(id(tensor))])
        if isinstance(node.operation, _PASSING):
            return _end(graph, node.input_tensors[0])
        return _saturation(node.operation)
    return None


def _saturation(operation: Any) -> str | None:
    """What an operation ends with, in words, if its outputs are probabilities."""
    if isinstance(operation, keras.layers.TimeDistributed):
        return _saturation(operation.layer)
    named = f"{operation.name!r} ({type(operation).__name__})"
    if isinstance(operation, keras.layers.Softmax):
        return f"they come from the softmax {named}"
    if isinstance(operation, keras.layers.Lambda):
        function = operation.function
    elif isinstance(operation, keras.layers.Layer):
        function = getattr(operation, "activation", None)
    else:
        function = type(operation)  # keras.ops.softmax, say, in a functional network.
    name = getattr(function, "__name__", type(function).__name__).lower()
    for kind in _SATURATING:
        if name in (kind, f"{kind}_v2", kind.replace("_", "")):
            return f"they come from the {kind} of {named}"
    return None


def _takes_probabilities(loss: Any, network: keras.Layer, output: signature.Name) -> bool:
    """Whether the compiled loss of the output that is meant is one of probabilities."""
    losses = loss
    if isinstance(loss, dict) and output is not None:
        losses = loss.get(output)
    elif isinstance(loss, list | tuple) and output is not None:
        names = getattr(network, "output_names", None) or range(len(loss))
        numbers = range(len(loss))
        losses = [
            one
            for one, name, number in zip(loss, names, numbers, strict=False)
            if output in (name, number)
        ]
    found = [one for one in keras.tree.flatten(losses) if one is not None]
    return bool(found) and all(_is_of_probabilities(one) for one in found)


def _is_of_probabilities(loss: Any) -> bool:
    if isinstance(loss, str):
        try:
            loss = keras.losses.get(loss)
        except ValueError:  # Keras says so itself.
            return False
    if isinstance(loss, keras.losses.Loss):
        kind = type(loss).__name__
        return kind in _OF_PROBABILITIES and not getattr(loss, "from_logits", False)
    kind = getattr(loss, "__name__", "").replace("_", "").lower()
    return kind in [name.lower() for name in _OF_PROBABILITIES]


def _warn(text: str) -> None:
    """Warns at the line of the caller outside of Keras and this package."""
    warnings.warn(f"{text}.", PenaltyWarning, stacklevel=_outside())


def _outside() -> int:
    """How many frames up the first one is that belongs to neither Keras nor this package."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] not in ("keras", "tfjacreg"):
            return level
        level, frame = level + 1, frame.f_back
    return level
