"""Replacements that act while a pass is recorded, whoever calls the code that they replace.

TensorFlow's own functions have the right values, but a derivative that is wrong, missing or slow.
`context` replaces something for a time. The other modules are the replacements: a table of
functions, a table by layer class, and the function by which Keras runs recurrences. `tangents`
gives TensorFlow's accumulator rules for the tangents along a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import keras

from tfjacreg import _keras
from tfjacreg.rewrites import missing_gradients, tangents  # noqa: F401 (register what they have)
from tfjacreg.rewrites.context import (
    Place,
    Switch,
    is_replacing,
    stepping_aside,
    undone,
    while_replaced,
)
from tfjacreg.rewrites.functions import FUNCTIONS, MOMENTS
from tfjacreg.rewrites.grouped_convolutions import grouped_convolution
from tfjacreg.rewrites.image_layers import linear_image_map
from tfjacreg.rewrites.input_gradients import in_blocks
from tfjacreg.rewrites.max_pool import SELECTION
from tfjacreg.rewrites.recurrences import RECURRENCES, keeping_loops
from tfjacreg.rewrites.traced_functions import AS_WRITTEN, TRACED_ANEW

__all__ = [
    "MOMENTS",
    "SELECTION",
    "Place",
    "Switch",
    "active",
    "in_blocks",
    "is_replacing",
    "keeping_loops",
    "stepping_aside",
    "undone",
    "while_replaced",
]

T = TypeVar("T")

# Each returns the places of a layer, none if it does not know the layer.
_OF_LAYERS: tuple[Callable[[keras.Layer], Iterable[Place]], ...] = (
    grouped_convolution,
    linear_image_map,
)


def active(
    network: keras.Operation,
    function: Callable[[], T],
    more: Callable[[keras.Layer], Iterable[Place]] = lambda _: (),
    *,
    has_tangent: bool = False,
) -> T:
    """Calls a function with all replacements of this package in place, in this thread.

    This is a function of a function, not a context manager, because Ctrl-C may come between a
    context manager and the `with` that uses it.

    Args:
        network: The network whose layers are rewritten, at any depth.
        function: Runs the network, without arguments.
        more: Returns further places of a layer.
        has_tangent: Whether an accumulator runs along the network.

    Returns:
        What the function returns.
    """
    places = [*FUNCTIONS, *RECURRENCES, AS_WRITTEN if has_tangent else TRACED_ANEW]
    for layer in _keras.layers_of(network):
        for of_layer in (*_OF_LAYERS, more):
            places += of_layer(layer)
    return while_replaced(places, function)
