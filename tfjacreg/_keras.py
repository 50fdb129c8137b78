"""The private names of Keras that tfjacreg uses; `tests/test_keras_names.py` checks each.

Two more private names are overridden or patched where they are used, since no function can stand
between: `RegularizedModel._maybe_symbolic_build` and `BatchNormalization._moments`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.utils import io_utils
from keras.src.utils.naming import to_snake_case


def layers_of(network: keras.Operation) -> list[keras.Layer]:
    """The network and all layers in it, at any depth, including layers inside layers."""
    return network._flatten_layers() if isinstance(network, keras.Layer) else []


def own_metrics(network: keras.Layer) -> list[keras.Metric]:
    """The metrics that a model keeps as attributes, which a model around it would ignore."""
    is_model = isinstance(network, keras.Model)
    return list(network._metrics) if is_model else []


def compute_loss(model: keras.Model, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> Any:
    """The training loss of a model whose `compute_loss` may lack the argument `training`."""
    return model._compute_loss(x, y, y_pred, sample_weight, training=True)


def loss_tracker(model: keras.Model) -> keras.metrics.Metric:
    """The mean that a compiled model logs as `loss`, whatever its other metrics are called."""
    return model._loss_tracker


def ask_to_overwrite(path: str) -> bool:
    """Asks at the terminal, as Keras does, whether a file may be replaced."""
    return io_utils.ask_to_proceed_with_overwrite(path)


def build_metrics(model: keras.Model, y: Any, y_pred: Any) -> None:
    """Makes the metrics of `compile`, as their first update would, from symbolic tensors."""
    metrics = model._compile_metrics
    if metrics is not None and not metrics.built:
        metrics.build(y, y_pred)


@contextlib.contextmanager
def losses_kept(network: keras.Operation) -> Iterator[None]:
    """Keeps the losses that layers have added so far, which Keras clears in each call."""
    kept = [(layer, list(layer._losses), set(layer._loss_ids)) for layer in layers_of(network)]
    try:
        yield
    finally:
        for layer, losses, loss_ids in kept:
            layer._losses[:] = losses
            layer._loss_ids.clear()
            layer._loss_ids |= loss_ids


def graph_of(network: keras.Layer) -> Any:
    """The functional graph of a network built from `keras.Input`, or None."""
    # A Sequential wraps its functional graph in `_functional`.
    graph = getattr(network, "_functional", None) or network
    return graph if hasattr(graph, "_nodes_by_depth") else None


def input_structure(network: keras.Layer) -> Any:
    """The symbolic inputs of a network built from `keras.Input`, in its structure; or None."""
    graph = graph_of(network)
    return None if graph is None else graph._inputs_struct


def nodes_in_order(graph: Any) -> list[Any]:
    """The calls of a functional graph in the order in which they run."""
    by_depth = sorted(graph._nodes_by_depth.items(), reverse=True)
    return [node for _, nodes in by_depth for node in nodes]


def input_shapes(layer: keras.Layer) -> set[tuple[Any, ...]]:
    """The shapes `[*in]` of the first tensor of every symbolic call of a layer."""
    return {tuple(node.input_tensors[0].shape[1:]) for node in layer._inbound_nodes}


def unlock(layer: keras.Layer) -> None:
    """Allows a built layer to get further layers and metrics, as a functional model may."""
    layer._tracker.unlock()


def group_in_file(layer: keras.Layer) -> str:
    """The name in a weights file for a model's first layer of this class."""
    return to_snake_case(type(layer).__name__)


def is_inside_another(layer: keras.Layer) -> bool:
    """Whether a layer that is being called is called by another one."""
    return layer._get_call_context().entry_layer is not layer


def element_spec(iterator: Any) -> Any:
    """The shapes and dtypes of the batches of the iterator that Keras' `fit` trains on."""
    return iterator._distributed_dataset.element_spec


def owner_of_recurrences() -> Any:
    """The module in which Keras' recurrent layers look up `rnn`, the function that runs them."""
    owner = getattr(sys.modules[keras.layers.RNN.__module__], "backend", None)
    return owner if hasattr(owner, "rnn") else None
