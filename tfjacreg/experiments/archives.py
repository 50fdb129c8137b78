"""Checks what a `.keras` file holds before any object is made from it.

Keras makes objects of whatever class a file names; how much it refuses depends on its version.
Here a file may name Keras' own layers and what belongs to them, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
import stat
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import h5py
import keras
import tensorflow as tf

from tfjacreg import _keras, graph_search, rewrites
from tfjacreg.model import RegularizedModel
from tfjacreg.printable import shown

T = TypeVar("T")

PARTS = 1000  # Keras writes three, and this project adds one.
# Limits on the unpacked size of an archive's parts. Keras does not compress them.
UNPACKED = 4 << 30
RATIO = 100
_SMALL = 64 << 20  # Up to this size the ratio does not matter.
DESCRIPTION = 64 << 20  # Bytes of a part that is JSON.
DEPTH = 200  # Of nested lists and objects. A model in a model takes about six.
OBJECTS = 1_000_000  # Lists and objects in a description.

# Numbers that layers may make when they are built, beyond the weights in the file.
_SPARE = 1_000_000
OUTPUT = 1 << 27  # Numbers that a layer may return for an example.

_SPACES = (
    *("layers", "models", "initializers", "regularizers", "constraints", "optimizers"),
    *("optimizers.schedules", "losses", "metrics", "dtype_policies", "random", "quantizers"),
)
# Keras writes only the name of a function, which is in one of these modules.
_FUNCTIONS = ("activations", "losses", "metrics", "initializers", "regularizers", "constraints")
# These hold Python code, or read files that the description names.
_REFUSED = (
    *("Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"),
    *("StringLookup", "IntegerLookup", "TextVectorization", "MelSpectrogram"),
)
_VALUES = {
    *("__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__"),
    *("__tuple__", "__complex__"),
}
_KINDS = (
    *(keras.Operation, keras.Initializer, keras.Regularizer, keras.optimizers.Optimizer),
    *(keras.constraints.Constraint, keras.Loss, keras.Metric, keras.DTypePolicy),
    *(keras.optimizers.schedules.LearningRateSchedule, keras.random.SeedGenerator),
    keras.Quantizer,
)


def check(file: BinaryIO) -> int:
    """Checks the parts of an archive, the classes that it names, and its weights.

    Args:
        file: The archive, open.

    Returns:
        How many numbers its weights hold.

    Raises:
        ValueError: If something in it is not allowed.
        OSError: If the file is not an archive or cannot be read.
    """
    numbers = 0
    with zipfile.ZipFile(file) as archive:
        check_parts(archive)
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its part {shown(damaged)} is damaged")
        for part in archive.infolist():
            if part.filename.endswith(".json"):
                _check_description(archive.read(part))
            elif part.filename.endswith(".h5") and part.file_size:
                with archive.open(part) as weights:
                    numbers += check_weights(weights, part.file_size)
    return numbers


def check_parts(archive: zipfile.ZipFile) -> None:
    """Checks number, names, kinds and sizes of the parts of a `.keras` file without unpacking it.

    Args:
        archive: The file, open.

    Raises:
        ValueError: If a part is not allowed.
    """
    check_names(archive)
    parts = archive.infolist()
    unpacked = sum(part.file_size for part in parts)
    packed = sum(part.compress_size for part in parts)
    if unpacked > UNPACKED or unpacked > max(RATIO * packed, _SMALL):
        raise ValueError(
            f"its parts must have at most {UNPACKED} bytes, and {RATIO} times what they take up. "
            f"Received: {unpacked} bytes out of {packed}"
        )
    for part in parts:
        if part.filename.endswith(".json") and part.file_size > DESCRIPTION:
            raise ValueError(
                f"{part.filename!r} must have at most {DESCRIPTION} bytes. Received: "
                f"{part.file_size}"
            )


def check_names(archive: zipfile.ZipFile) -> None:
    """Checks number, names and kinds of the parts of a zip file.

    Args:
        archive: The file, open; an `.npz` file is one too.

    Raises:
        ValueError: If a part is not allowed.
    """
    parts = archive.infolist()
    if len(parts) > PARTS:
        raise ValueError(f"it must have at most {PARTS} parts. Received: {len(parts)}")
    names = set()
    for part in parts:
        name = part.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise ValueError(f"the names of its parts must stay inside it. Received: {shown(name)}")
        if name in names:
            raise ValueError(f"each of its parts must be there once. Received: {shown(name)} again")
        if part.flag_bits & 1:
            raise ValueError(f"its parts must not be encrypted. Received: {shown(name)}, which is")
        if stat.S_IFMT(part.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"its parts must be files. Received: {shown(name)}, a link or device")
        names.add(name)


def _check_description(text: bytes) -> None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it does not say what model it is: {error}") from error
    foreign = []
    for item in _objects(content):
        if "class_name" in item and not _allowed(item):
            foreign.append(_named(item))
    if any(name.rpartition(".")[2] in ("Lambda", "__lambda__") for name in foreign):
        raise ValueError(
            "it holds a Lambda layer, and the Python code of a file is not run. Save it with a "
            "layer of Keras in its place"
        )
    if foreign:
        raise ValueError(
            f"it names {sorted(set(foreign))[:5]}, and no code is imported or run for a file. Save "
            "it with layers of Keras alone, none of which reads other files"
        )


def _objects(content: Any) -> Iterator[dict[str, Any]]:
    """All objects in a description, however deeply nested."""
    waiting, seen = [(content, 1)], 0
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, dict):
            yield item
            inner = list(item.values())
        elif isinstance(item, list):
            inner = item
        else:
            continue
        seen += 1
        if depth > DEPTH or seen > OBJECTS:
            raise ValueError(
                f"its description must have at most {OBJECTS} lists and objects, {DEPTH} in each "
                "other. Received: more"
            )
        waiting += [(value, depth + 1) for value in inner if isinstance(value, dict | list)]


def _named(item: dict[str, Any]) -> str:
    """A class or function as the description names it, for a message."""
    name = item.get("config") if item["class_name"] == "function" else item["class_name"]
    if not isinstance(name, str):
        name = item["class_name"]
    return f"{item.get('module')}.{name}"[:80]


def _allowed(item: dict[str, Any]) -> bool:
    name, module, registered = (item.get(k) for k in ("class_name", "module", "registered_name"))
    if not isinstance(name, str) or not isinstance(module, str | None):
        return False
    if name in _VALUES:
        return True
    if name == "function":
        function = item.get("config")
        # For other names old versions look into the module itself, such as exec in builtins.
        return (
            module == "builtins"
            and registered in (None, "function", function)
            and isinstance(function, str)
            and any(callable(getattr(getattr(keras, s), function, None)) for s in _FUNCTIONS)
        )
    if isinstance(registered, str) and registered.startswith("tfjacreg>"):
        found = keras.saving.get_registered_object(registered)
        return isinstance(found, type) and (found.__module__, found.__name__) == (module, name)
    return registered in (None, name) and name not in _REFUSED and _is_keras_own(module, name)


def _is_keras_own(module: str | None, name: str) -> bool:
    if module is None:
        spaces = [getattr(keras.layers, name, None), getattr(keras.initializers, name, None)]
    elif module == "keras" or module.removeprefix("keras.") in _SPACES:
        space: Any = keras
        for part in module.split(".")[1:]:
            space = getattr(space, part, None)
        spaces = [getattr(space, name, None)]
    elif module.startswith(("keras.src.models.", "keras.src.ops.", "keras.src.layers.")):
        # A module that is not loaded yet is not loaded for a file.
        spaces = [vars(sys.modules[module]).get(name)] if module in sys.modules else []
    else:
        spaces = []
    return any(
        isinstance(found, type)
        and issubclass(found, _KINDS)
        and found.__module__.startswith("keras.")
        and found.__name__ not in _REFUSED
        for found in spaces
    )


def check_weights(file: Any, size: int) -> int:
    """Checks that weights lie in their file: HDF5 can refer to other files, or claim more room.

    Args:
        file: The HDF5 file, open.
        size: Its size in bytes.

    Returns:
        How many numbers it holds.

    Raises:
        ValueError: If the weights lie elsewhere, or cannot be read.
    """
    total, numbers, most = 0, 0, min(UNPACKED, max(RATIO * size, _SMALL))

    def problem(name: str, link: Any) -> str | None:  # h5py would lose an error raised in here.
        nonlocal total, numbers
        elsewhere = f"lie in it. Received: {name!r}, in another file"
        if isinstance(link, h5py.ExternalLink):
            return elsewhere
        item = weights.get(name) if isinstance(link, h5py.HardLink) else None
        if isinstance(item, h5py.Dataset):
            if item.is_virtual or item.external:
                return elsewhere
            total += item.nbytes
            numbers += item.size
        return f"have at most {most} bytes. Received: more" if total > most else None

    try:
        with h5py.File(file, "r") as weights:
            found = weights.visititems_links(problem)
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"its weights cannot be read: {error}") from error
    if found:
        raise ValueError(f"its weights must {found}")
    return numbers


def with_layers_limited(numbers: int, function: Callable[[], T]) -> T:
    """Calls a function that builds layers with weights of at most so many numbers, all together.

    The layers that other threads build meanwhile are not limited.

    Args:
        numbers: How many numbers the weights in the file hold.
        function: Loads the model, without arguments.

    Returns:
        What the function returns.

    Raises:
        ValueError: In the function, if a layer would have more.
    """
    left = numbers + _SPARE

    def add_weight(
        original: Callable[..., Any],
        layer: keras.Layer,
        shape: Any = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        nonlocal left
        left -= math.prod(int(n) for n in shape or ())
        if left < 0:
            raise ValueError(
                f"its layers must have the weights that are in it, {numbers} numbers. Received: "
                f"the layer {shown(layer.name)}, which would have {shown(shape)}"
            )
        return original(layer, shape, *args, **options)

    return rewrites.while_replaced(
        [rewrites.Place(keras.Layer, "add_weight", add_weight)], function
    )


def check_outputs(model: keras.Model) -> None:
    """Refuses a model with an operation that returns more numbers for an example than is allowed.

    Args:
        model: The loaded model, with which nothing has been computed yet.

    Raises:
        ValueError: If there is such an operation.
    """
    for layer in model._flatten_layers():
        outputs = []
        with contextlib.suppress(AttributeError, ValueError):  # Never called, or more than once.
            outputs = keras.tree.flatten(layer.output)
        for tensor in outputs:
            if _size(tensor.shape) > OUTPUT:
                raise ValueError(
                    f"its layers must give at most {OUTPUT} numbers for an example. Received: the "
                    f"layer {shown(layer.name)}, which would give {tensor.shape}"
                )
    _check_operations(model)


def _check_operations(model: keras.Model) -> None:
    """Checks operations between layers, and layers inside layers, which have no `output`.

    The model is traced for one example, which computes nothing.
    """
    if isinstance(model, RegularizedModel):
        model = model.network
    if not getattr(model, "inputs", None):  # Nothing is known of a model that is not built.
        return
    structure = _keras.input_structure(model)
    specs = keras.tree.map_structure(
        lambda t: tf.TensorSpec([1, *t.shape[1:]], t.dtype),
        model.inputs if structure is None else structure,
    )
    most = max([OUTPUT, *(math.prod(w.shape) for w in model.weights)])
    forward = tf.function(lambda x: model(x, training=False), autograph=False)
    for op in graph_search.all_operations(forward.get_concrete_function(specs).graph):
        for tensor in op.outputs:
            if _size(tensor.shape) > most:
                raise ValueError(
                    f"its operations must give at most {most} numbers for an example. Received: "
                    f"{shown(op.name)}, which would give {tuple(tensor.shape)}"
                )


def _size(shape: Any) -> int:
    """How many numbers a tensor holds for one example; sizes that are not known count as 1."""
    known = tf.TensorShape(shape)
    return math.prod(n or 1 for n in known) if known.rank else 1
