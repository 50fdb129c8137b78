"""Networks by name, the project's or your own: a `.keras` file, or a function.

A network of your own takes standardized images and returns logits. If it does not, the message
comes before anything is trained, with the lines of code that mend it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfjacreg import _keras, network_ends, networks
from tfjacreg.experiments import checkpoint, files
from tfjacreg.printable import is_one_line

_FUNCTION = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
_SATURATING = ("softmax", "sigmoid", "log_softmax")
# Layers that may come before or after the layer that is looked for: they do not change the scale.
_PASSING = (
    *(keras.layers.Reshape, keras.layers.Flatten, keras.layers.Identity, keras.layers.Dropout),
    *(keras.layers.CenterCrop, keras.layers.Resizing, keras.layers.ZeroPadding2D),
    *(keras.layers.RandomCrop, keras.layers.RandomFlip, keras.layers.RandomRotation),
    *(keras.layers.RandomTranslation, keras.layers.RandomZoom, keras.layers.GaussianNoise),
)


def is_valid(name: object) -> bool:
    """Whether a network may have this name; it need not exist."""
    return is_one_line(name) and (
        name in networks.NAMES or name.endswith(".keras") or is_function(name)
    )


def is_function(name: str) -> bool:
    """Whether a network's name is that of a function, `MODULE:FUNCTION`."""
    return re.fullmatch(_FUNCTION, name) is not None


def digest(name: str) -> str | None:
    """The SHA-256 of the file of a network, or of its function's module.

    None for `networks.NAMES`, and if the file is not there.
    """
    if name in networks.NAMES:
        return None
    path: str | None = str(Path(name).expanduser())
    if is_function(name):
        # The packages around a module are imported, and may raise anything; `make` reports it.
        with _working_folder(), contextlib.suppress(Exception):
            found = importlib.util.find_spec(name.partition(":")[0])
            path = found.origin if found else None
    if path is None or not Path(path).is_file():
        return None
    return files.sha256(Path(path).resolve())


def make(
    name: str, input_shape: tuple[int, int, int], num_classes: int, *, pretrained: bool
) -> keras.Model:
    """Makes a network of your own and checks that it can be trained on the data.

    Args:
        name: `FILE.keras` or `MODULE:FUNCTION`.
        input_shape: `(H, W, C)`.
        num_classes: The number of logits that it must return.
        pretrained: Whether to keep a file's weights; otherwise new ones are drawn with Keras'
            random generator, which `keras.utils.set_random_seed` sets.

    Raises:
        ValueError: If it cannot be loaded or made, or does not fit; the message says what to do.
    """
    if is_function(name):
        network = _call(name, input_shape, num_classes)
    else:
        path = Path(name).expanduser()
        if not path.exists():
            raise ValueError(f"There is no network at {name}.")
        network = checkpoint.load(path.resolve(), compile=False)
    _check(name, network, input_shape, num_classes)
    if is_function(name):
        _check_file(name, network)
    elif not pretrained:
        network = _anew(name, network, input_shape)
    return network


def _anew(name: str, network: keras.Model, input_shape: tuple[int, int, int]) -> keras.Model:
    """The same layers with new weights."""
    config = network.get_config()
    for item in _dictionaries(config):
        # An initializer with a seed of its own would draw the same numbers in every run.
        if "seed" in item and isinstance(item["seed"], int):
            item["seed"] = None
    kept = [
        layer.name
        for layer in _keras.layers_of(network)
        if isinstance(layer, keras.layers.Normalization) and layer.input_mean is None
    ]
    if kept:
        raise ValueError(
            f"{name}: layer {kept[0]!r} (Normalization) was adapted to data, which new weights "
            "would forget. Give --pretrained, or take the layer out"
        )
    made = type(network).from_config(config)
    if not made.built:
        made.build((None, *input_shape))
    return made


def _dictionaries(item: Any) -> Iterator[dict[str, Any]]:
    if isinstance(item, dict):
        yield item
        item = list(item.values())
    if isinstance(item, list | tuple):
        for inner in item:
            yield from _dictionaries(inner)


@contextlib.contextmanager
def _working_folder() -> Iterator[None]:
    """Allows imports from the current folder, as `python -c` does."""
    folder = str(Path.cwd())  # The imported code may change it.
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _call(name: str, input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    module_name, _, function_name = name.partition(":")
    with _working_folder():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise ValueError(
                f"{name}: the module {module_name} cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from error
        function = getattr(module, function_name, None)
        if not callable(function):
            raise ValueError(f"{name}: the module {module_name} has no function {function_name}")
        try:
            network = function(input_shape, num_classes)
        except Exception as error:
            raise ValueError(
                f"{name}: the function must take (input_shape, num_classes). Called with "
                f"{input_shape} and {num_classes} it raised {type(error).__name__}: {error}"
            ) from error
    if not isinstance(network, keras.Model):
        raise ValueError(
            f"{name}: the function must return a keras.Model. Received: {type(network).__name__}"
        )
    if not isinstance(network, keras.Sequential) and not hasattr(network, "inputs"):
        raise ValueError(
            f"{name}: the function must return a keras.Model of known inputs and outputs. "
            f"Received: {type(network).__name__}, whose layers are called in code of its own. "
            "Build it from inputs = keras.Input(input_shape), and return keras.Model(inputs, "
            "outputs)"
        )
    return network


def _check_file(name: str, network: keras.Model) -> None:
    """Checks that the network can be loaded from a file, as runs are, without running its code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.keras"
        network.save(file)
        try:
            checkpoint.load(file, compile=False)
        except ValueError as error:
            reason = str(error).removeprefix(f"{file} ")
            raise ValueError(
                f"{name}: its network, saved, {reason}. train.py keeps a run in such a file"
            ) from error


def _check(
    name: str, network: keras.Model, input_shape: tuple[int, int, int], num_classes: int
) -> None:
    shown = "x".join(map(str, input_shape))
    try:
        if not network.built:
            network.build((None, *input_shape))
    except Exception as error:
        raise _unfit(name, shown, error) from error
    if len(network.inputs) != 1 or len(network.outputs) != 1:
        raise ValueError(
            f"{name}: the network must have one input and one output. Received: "
            f"{len(network.inputs)} and {len(network.outputs)}. In Python tfjacreg takes others: "
            "docs/guide.md"
        )
    expected, output = tuple(network.inputs[0].shape[1:]), tuple(network.outputs[0].shape[1:])
    if len(expected) != 3 or any(
        want not in (None, got) for want, got in zip(expected, input_shape, strict=True)
    ):
        raise ValueError(
            f"{name}: the network takes images of shape {expected}, and the data has {shown}. "
            "Build it for them:\n"
            f"    inputs = keras.Input({input_shape})\n"
            "    network = keras.Model(inputs, ...)  # The same layers, from these inputs."
        )
    start = _start(network)
    if start is not None:
        layer, inner = start
        raise ValueError(
            f"{name}: the network must take standardized images, which train.py makes. Received: "
            f"one that begins with {layer.name!r} ({type(layer).__name__}). Take it off:\n"
            f'    inner = keras.models.load_model("{_file_of(name)}"){_inside(network, inner)}\n'
            f"    {_without(layer, inner, input_shape)}"
            '.save("from_standardized.keras")'
        )
    scaled = network_ends.shrinking_start(network, None)
    if scaled is not None:
        what, by = scaled
        raise ValueError(
            f"{name}: the network must take standardized images, which train.py makes. Received: "
            f"one that scales them by {by:.2g}, by {what}. Build it without that"
        )
    end = _end(network)
    if end is not None:
        layer, kind, inner = end
        mend = (
            f'inner.get_layer("{layer.name}").activation = keras.activations.linear; '
            'network.save("logits.keras")'
        )
        if isinstance(layer, keras.layers.Softmax):
            mend = (
                f'keras.Model(inner.inputs[0], inner.get_layer("{layer.name}").input)'
                '.save("logits.keras")'
            )
        raise ValueError(
            f"{name}: the network must end in logits. Received: one that ends in the {kind} of "
            f"{layer.name!r} ({type(layer).__name__}). Take it off:\n"
            f'    network = keras.models.load_model("{_file_of(name)}"); '
            f"inner = network{_inside(network, inner)}\n    {mend}"
        )
    graph = _keras.graph_of(network)
    saturating = graph and network_ends.saturating_end(graph, graph.outputs[0])
    if saturating:
        raise ValueError(
            f"{name}: the network must end in logits. Received: one whose outputs are "
            f"probabilities: {saturating}. Build it without that"
        )
    if output != (num_classes,):
        raise ValueError(
            f"{name}: the network gives outputs of shape {output}, and the data has {num_classes} "
            "classes. Give it another last layer:\n"
            f'    network = keras.models.load_model("{_file_of(name)}")\n'
            "    keras.Model(network.inputs[0], "
            f"keras.layers.Dense({num_classes})(network.layers[-1].input))"
            '.save("for_my_classes.keras")'
        )
    try:
        found = network(np.zeros((2, *input_shape), "float32"), training=False)
    except Exception as error:
        raise _unfit(name, shown, error) from error
    if found.shape != (2, num_classes):
        raise ValueError(
            f"{name}: the network must give {num_classes} logits for each image. Received: shape "
            f"{tuple(found.shape)} for two"
        )


def _unfit(name: str, shown: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300]
    return ValueError(f"{name}: the network does not take images of {shown}: {reason}")


def _file_of(name: str) -> str:
    """The file of a network, for a line of code; for a function, a file to save its network in."""
    return "network.keras" if is_function(name) else name


def _inside(network: keras.Model, inner: keras.Model) -> str:
    """The code that leads from a network to a model in it."""
    return "" if inner is network else f'.get_layer("{inner.name}")'


def _without(layer: keras.layers.Layer, model: keras.Model, input_shape: tuple[int, ...]) -> str:
    """The code that makes a model without its first layer."""
    if isinstance(model, keras.Sequential):
        number = model.layers.index(layer)
        kept = f"*inner.layers[:{number}], " * (number > 0) + f"*inner.layers[{number + 1}:]"
        return f"keras.Sequential([keras.Input({input_shape}), {kept}])"
    return f'keras.Model(inner.get_layer("{layer.name}").output, inner.outputs[0])'


def leading_scale(network: keras.Model) -> keras.layers.Layer | None:
    """The Rescaling or Normalization with which a network begins; None if there is none."""
    found = _start(network)
    return None if found is None else found[0]


def _start(network: keras.Model) -> tuple[keras.layers.Layer, keras.Model] | None:
    """The Rescaling or Normalization with which a network begins, and the model that it is in."""
    graph = _keras.graph_of(network)
    if graph is None:
        return None
    reached = {id(tensor) for tensor in graph.inputs}
    for node in _keras.nodes_in_order(graph):
        if not any(id(tensor) in reached for tensor in node.input_tensors):
            continue
        operation = node.operation
        if isinstance(operation, keras.layers.Rescaling | keras.layers.Normalization):
            return operation, network
        if isinstance(operation, keras.Model):
            inner = _start(operation)
            if inner is not None:
                return inner
            if all(isinstance(la, (*_PASSING, keras.layers.InputLayer)) for la in operation.layers):
                reached |= {id(tensor) for tensor in node.output_tensors}
        elif isinstance(operation, _PASSING):
            reached |= {id(tensor) for tensor in node.output_tensors}
    return None


def _end(network: keras.Model) -> tuple[keras.layers.Layer, str, keras.Model] | None:
    """The layer with a softmax or sigmoid at a network's end, its kind, and the model it is in."""
    graph = _keras.graph_of(network)
    if graph is None:
        return None
    wanted = id(graph.outputs[0])
    for node in reversed(_keras.nodes_in_order(graph)):
        if wanted not in map(id, node.output_tensors) or not node.input_tensors:
            continue
        operation = node.operation
        if isinstance(operation, keras.Model):
            return _end(operation)
        if isinstance(operation, _PASSING):
            wanted = id(node.input_tensors[0])
            continue
        kind = getattr(getattr(operation, "activation", None), "__name__", "")
        if isinstance(operation, keras.layers.Softmax):
            kind = "softmax"
        return (operation, kind, network) if kind in _SATURATING else None
    return None
