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
import tensorflow as tf

from tfjacreg import _keras, graph_search, network_ends, recording, signature
from tfjacreg.error_causes import raise_an_interrupt

# A penalty below this part of the loss in the first step trains nothing. Fresh weights have a small
# slope that grows: with the default factor LeNet begins at 9e-4 of its loss on the digits, and
# behind a Rescaling by 1/255 at 4e-6.
_LEAST_PART = 3e-5
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
    scale = network_ends.shrinking_start(network, input)
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


def _outputs_meant(network: keras.Layer, graph: Any, name: signature.Name) -> list[int]:
    """The positions of the outputs that a name stands for; all if it is none of their names."""
    keys = signature.keys(graph.output)
    names = list(zip(keys, getattr(network, "output_names", None) or keys, strict=True))
    return signature.named(name, names, range(len(keys))) or list(range(len(keys)))


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
        return None if is_of_logits else network_ends.saturation(last)
    positions = _outputs_meant(network, graph, output)
    ends = [network_ends.saturating_end(graph, graph.outputs[position]) for position in positions]
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
