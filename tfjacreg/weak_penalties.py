"""Penalties that cannot act: warnings from the layers of a network, its loss and the first step.

The network is not run; it is traced if no layer shows what its outputs are. Each warning is given
once per model.
"""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfjacreg import _keras, graph_search, recording, signature
from tfjacreg.error_causes import raise_an_interrupt

# A penalty below this part of the loss in the first step trains nothing. Fresh weights have a small
# slope that grows: with the default factor LeNet begins at 9e-4 of its loss on the digits, and
# behind a Rescaling by 1/255 at 4e-6.
_LEAST_PART = 3e-5
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
_OF_PROBABILITIES = (
    *("BinaryCrossentropy", "CategoricalCrossentropy", "SparseCategoricalCrossentropy"),
    *("BinaryFocalCrossentropy", "CategoricalFocalCrossentropy", "KLDivergence"),
)


class PenaltyWarning(UserWarning):
    """A penalty of the Jacobian that cannot act, or is measured in other units than it seems.

    `RegularizedModel` gives each warning once, before or at the first training step: for outputs
    that are probabilities, for inputs that the network itself scales down, for a network that could
    not be checked, and if factor times penalty is below 3e-5 of the loss in the first step (with
    `steps_per_execution`, in the first of these). `docs/troubleshooting.md` says what to do.
    `warnings.filterwarnings("ignore", category=tfjacreg.PenaltyWarning)` silences all of them; with
    its argument `message=` it silences one kind.
    """


def warn_of_layers(
    network: keras.Layer,
    loss: Any,
    input: signature.Name,
    output: signature.Name,
    example: Any = None,
) -> None:
    """Warns about what the layers and the loss show before anything is computed.

    Args:
        network: The network.
        loss: The loss given to `compile`.
        input: The input that the Jacobian is taken with respect to.
        output: The output that the Jacobian is taken of.
        example: What the network takes, to trace what custom code ends with; or None.
    """
    saturating = _saturating_end(network, loss, output, example)
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


def warn_of_no_check(network: keras.Layer) -> None:
    """Warns that `fit` cannot check the network.

    Args:
        network: The network.
    """
    _warn(
        f"Network {network.name!r} is not checked before training: no example could be made for "
        "it, since the rank of its inputs is not known, or it takes none of the lengths tried. "
        "Check it on two examples of yours: tfjacreg.check_network(model.network, x, ...)"
    )


def warn_of_first_step(network: keras.Layer, factor: float, penalty: float, loss: float) -> None:
    """Warns if the penalty is negligible beside the loss.

    A penalty of exactly 0 gives no warning: it starts at 0 if a last layer does.

    Args:
        network: The network.
        factor: The factor of the penalty.
        penalty: The penalty of the first step, without its factor.
        loss: The loss of that step, including the penalty.
    """
    part, rest = abs(factor * penalty), abs(loss - factor * penalty)
    if math.isfinite(rest) and 0 < part < _LEAST_PART * rest:
        _warn(
            f"The penalty of network {network.name!r} hardly acts: at the start factor times "
            f"penalty is {part:.2g} beside a loss of {rest:.2g}. Take a larger factor, or look for "
            "what makes the Jacobian small: inputs in 0..255, a loss that is a sum, outputs that "
            "saturate"
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
    keys = [".".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(graph.input)]
    named = [
        tensor
        for number, (tensor, key) in enumerate(zip(inputs, keys, strict=True))
        if name is not None and name in (key, tensor.name, number)
    ]
    return named or [tensor for tensor in inputs if "float" in tensor.dtype]


def _outputs_meant(network: keras.Layer, graph: Any, name: signature.Name) -> list[int]:
    """The positions of the outputs that a name stands for; all if it is none of their names."""
    keys = [".".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(graph.output)]
    names = getattr(network, "output_names", None) or keys
    named = [
        number
        for number, key in enumerate(keys)
        if name is not None and name in (key, names[number], number)
    ]
    return named or list(range(len(keys)))


def _saturating_end(
    network: keras.Layer, loss: Any, output: signature.Name, example: Any
) -> str | None:
    """The last operation of the output that is meant, in words, if it gives probabilities."""
    graph = _keras.graph_of(network)
    is_own = example is not None and any(map(_is_own_code, _keras.layers_of(network)))
    if graph is None:
        if is_own:
            return _traced_end(network, loss, output, example)
        # Which layer runs last is not known; a loss with from_logits speaks against probabilities.
        last = (getattr(network, "layers", None) or [network])[-1]
        is_of_logits = any(getattr(one, "from_logits", False) for one in keras.tree.flatten(loss))
        return None if is_of_logits else _saturation(last)
    positions = _outputs_meant(network, graph, output)
    ends = [_end(graph, graph.outputs[position]) for position in positions]
    taken = [tensor.shape for tensor in graph.inputs]
    are_numbers = not _takes_probabilities(loss, network, output)
    is_image = [
        "softmax" not in (end or "") and _is_image(graph.outputs[number].shape, taken, are_numbers)
        for number, end in zip(positions, ends, strict=True)
    ]
    if all(end is not None for end in ends) and not all(is_image):
        return ends[0]
    if is_own and None in ends and len(positions) == 1:
        return _traced_end(network, loss, output, example)
    return None


def _is_image(shape: Any, taken: list[Any], are_numbers: bool) -> bool:
    """Whether the outputs of a sigmoid are pixels, which a sigmoid may well bound.

    Args:
        shape: The shape of the outputs.
        taken: The shapes of the inputs: an output of the same shape as an input is an image.
        are_numbers: Whether the loss compares numbers, not probabilities.
    """
    return tuple(shape) in map(tuple, taken) or (len(shape) == 4 and are_numbers)


def _is_own_code(layer: keras.Layer) -> bool:
    """Whether a layer runs custom code, which may end in anything."""
    function = getattr(layer, "activation", None)
    names = [type(layer).__module__, getattr(function, "__module__", None) or "keras."]
    is_known = all(name.startswith(("keras.", "tensorflow.")) for name in names)
    return isinstance(layer, keras.layers.Lambda) or not is_known


def _traced_end(
    network: keras.Layer, loss: Any, output: signature.Name, example: Any
) -> str | None:
    """The same, from the graph of a pass, for a network with custom code."""

    def forward(x: Any) -> tf.Tensor:
        with recording.without_trace(network):
            return signature.select_output(network, network(x, training=False), output)

    try:
        traced = tf.function(forward, autograph=False).get_concrete_function(example)
    except Exception as error:  # The check of the network that follows reports it.
        raise_an_interrupt(error)
        return None
    (made,) = traced.outputs
    kind = graph_search.made_by(made)
    taken = [leaf.shape for leaf in keras.tree.flatten(example)]
    are_numbers = not _takes_probabilities(loss, network, output)
    if kind == "Softmax" or (kind == "Sigmoid" and not _is_image(made.shape, taken, are_numbers)):
        return f"they come from a {kind.lower()} in {network.name!r} ({type(network).__name__})"
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
        if _passes_on(node) or isinstance(node.operation, _MIXING):
            ends = [_end(graph, one) for one in node.input_tensors]
            return ends[0] if all(ends) else None
        return _saturation(node.operation)
    return None


def _saturation(operation: Any) -> str | None:
    """What gives an operation's outputs, in words, if they are probabilities; otherwise None."""
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
        function = type(operation)  # For example keras.ops.softmax in a functional network.
    name = getattr(function, "__name__", type(function).__name__).lower()
    for kind in _SATURATING:
        if name in (kind, f"{kind}_v2", kind.replace("_", "")):
            return f"they come from the {kind} of {named}"
    return None


def _takes_probabilities(loss: Any, network: keras.Layer, output: signature.Name) -> bool:
    """Whether the compiled loss of the output that is meant takes probabilities."""
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
        except ValueError:  # Keras reports an unknown loss itself.
            return False
    if isinstance(loss, keras.losses.Loss):
        kind = type(loss).__name__
        return kind in _OF_PROBABILITIES and not getattr(loss, "from_logits", False)
    kind = getattr(loss, "__name__", "").replace("_", "").lower()
    return kind in [name.lower() for name in _OF_PROBABILITIES]


def _warn(text: str) -> None:
    """Gives the warning for the line of the caller outside Keras and this package."""
    warnings.warn(f"{text}.", PenaltyWarning, stacklevel=_outside())


def _outside() -> int:
    """The number of frames up to the first one outside Keras and this package."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] not in ("keras", "tfjacreg"):
            return level
        level, frame = level + 1, frame.f_back
    return level
