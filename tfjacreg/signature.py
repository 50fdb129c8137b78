"""The input that the Jacobian is taken with respect to, and the output that it is taken of."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfjacreg import _keras

# How `input=` and `output=` name a tensor: by position, by key or by name.
Name = int | str | None


class NotOne(ValueError):
    """The Jacobian is not the one of a single tensor with a row for each example.

    Either `input` or `output` names no floating tensor, or none is named although there are
    several, or the number of output rows is not the number of examples.
    """


class NetworkInput(NamedTuple):
    """What a network takes, as tensors, and which of them is the input of the Jacobian.

    Attributes:
        structure: As given: a tensor, or a list, tuple or dict of them.
        leaves: Its tensors in order; None for an optional `Input` that is left out.
        position: The index of the Jacobian's input among the leaves.
    """

    structure: Any
    leaves: list[Any]
    position: int

    @property
    def x(self) -> tf.Tensor:
        """The input of the Jacobian, `[B, *in]`, in at least float32."""
        return self.leaves[self.position]

    def tensors(self) -> list[Any]:
        """The leaves without the None of optional inputs that are left out."""
        return [leaf for leaf in self.leaves if leaf is not None]

    def with_tensors(self, tensors: Sequence[Any]) -> NetworkInput:
        """The same with other tensors in place of `tensors()`."""
        rest = iter(tensors)
        return self._replace(leaves=[None if leaf is None else next(rest) for leaf in self.leaves])

    def packed(self) -> Any:
        """The tensors in the structure that the network takes."""
        return keras.tree.pack_sequence_as(self.structure, self.leaves)


def keys(structure: Any) -> list[str]:
    """The keys or positions that lead to each tensor of a structure, with points between them."""
    return [".".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(structure)]


def named(name: Name, names: Sequence[Sequence[str]], candidates: Sequence[int]) -> list[int]:
    """The candidates that a name stands for: a key goes before a name, and that before a position.

    Args:
        name: The position, key or name.
        names: The key and the names of each tensor.
        candidates: The positions of the tensors that may be meant.
    """
    found = [n for n in candidates if name in names[n][:1]]
    found = found or [n for n in candidates if name in names[n]]
    if not found and isinstance(name, numbers.Integral) and not isinstance(name, bool):
        found = [n for n in candidates if n == name]
    return found


def resolve_input(network: keras.Layer, x: Any, name: Name = None) -> NetworkInput:
    """Casts what a network takes as Keras casts it, and finds the input of the Jacobian.

    A floating tensor keeps its dtype, except half precision, which becomes float32: norms of
    thousands of squares would overflow it. Any other tensor is cast to the dtype of its `Input`. If
    the network declares no `Input` and takes one tensor of integers (pixels), it becomes float32.

    Args:
        network: The network.
        x: A tensor or array, or a list, tuple or dict of them.
        name: The input that the Jacobian is taken with respect to: a position, a key, or the name
            of an `Input`. None means the only floating one.

    Raises:
        TypeError: If there is no floating tensor.
        ValueError: If there are several and `name` is None; if `name` is none of them; if a batch
            is empty or has no batch axis.
    """
    inputs = list(getattr(network, "inputs", None) or [])
    paths = keys(x)
    leaves = keras.tree.flatten(x)
    if any(isinstance(leaf, int | float) for leaf in leaves):
        raise TypeError(
            "`x` must be a tensor or array, or a list, tuple or dict of them. "
            f"Received: {type(x).__name__} of Python's numbers. Make an array of it, of one length "
            "along each axis"
        )
    specs = _specs(x, paths, inputs)
    leaves = [_as_keras_takes(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)]
    if not inputs and len(leaves) == 1 and _is_integer(leaves[0]):
        # These may be pixels: a layer that computes with them casts them itself.
        leaves = [tf.cast(leaves[0], tf.float32)]
    names = [_names(path, spec) for path, spec in zip(paths, specs, strict=True)]
    declares = any(spec is not None for spec in specs)
    is_taken = [spec is not None or not declares for spec in specs]
    candidates = [n for n, leaf in enumerate(leaves) if _is_floating(leaf) and is_taken[n]]
    if not candidates:
        refuse_ragged(leaves)
    if not candidates:
        received = ", ".join(f"x of dtype {_dtype(leaf)}" for leaf in leaves) or f"x={x!r}"
        raise TypeError(
            "The Jacobian needs a floating input: differentiate with respect to pixels as floats, "
            f"or to the output of an embedding. Received: {received}"
        )
    position = _chosen("input", name, names, candidates)
    batch = leaves[position]
    if batch.shape.rank is not None and (batch.shape.rank == 0 or batch.shape[0] == 0):
        raise ValueError(
            "`x` must hold at least one example along its first axis. "
            f"Received: x of shape {tuple(batch.shape)}"
        )
    return NetworkInput(x, leaves, position)


def refuse_ragged(leaves: Sequence[Any]) -> None:
    """Raises TypeError if one of the leaves is a ragged tensor."""
    if any(isinstance(leaf, tf.RaggedTensor) for leaf in leaves):
        raise TypeError(
            "A ragged tensor has no Jacobian of one shape for each example. Give batches of one "
            "shape each: x.to_tensor(), with a mask if the network takes one, or "
            f"dataset.padded_batch(...). Received: x of type {[type(a).__name__ for a in leaves]}"
        )


def select_output(network: keras.Layer, outputs: Any, name: Name = None) -> tf.Tensor:
    """Returns the output that the Jacobian is taken of.

    Args:
        network: The network.
        outputs: What the network returned.
        name: Which output: a position, a key, or the name of the network's output. None means the
            only floating one.

    Raises:
        TypeError: If there is no dense floating tensor.
        ValueError: If there are several and `name` is None, or `name` is none of them.
    """
    leaves = keras.tree.flatten(outputs)
    paths = keys(outputs)
    known = getattr(network, "output_names", None) or []
    if len(known) != len(leaves):
        known = [None] * len(leaves)
    names = [[n for n in (path, own) if n] for path, own in zip(paths, known, strict=True)]
    candidates = [number for number, leaf in enumerate(leaves) if _is_floating(leaf)]
    if not candidates:
        kinds = ", ".join(type(leaf).__name__ for leaf in leaves)
        raise TypeError(
            "`network` must return a dense floating tensor. "
            f"Received: an output of type {kinds or type(outputs).__name__}"
        )
    return leaves[_chosen("output", name, names, candidates)]


def refuse_folded(network: keras.Layer, x: tf.Tensor, output: tf.Tensor) -> None:
    """Refuses an output that does not have one row for each example.

    Raises:
        ValueError: If the shapes say that there are more or fewer rows than examples.
    """
    rows = output.shape[0] if output.shape.rank else 1
    if rows and x.shape[0] and rows != x.shape[0]:
        way_out = (
            "Views that the network folds into the batch axis must be unfolded at its end, as by "
            "keras.ops.reshape(output, (-1, views, size)), or be held apart by "
            "keras.layers.TimeDistributed"
        )
        if rows < x.shape[0]:
            way_out = "Nothing may be reduced over the batch axis: that belongs into the loss"
        raise NotOne(
            f"The output must have one row for each example. {way_out}. "
            f"Received: network {network.name!r}, which returns {tuple(output.shape)} for x of "
            f"shape {tuple(x.shape)}"
        )


def example(network: keras.Layer, specs: Any) -> Any:
    """Makes random examples for the check of a network; zeros for inputs that are integers.

    Args:
        network: The network.
        specs: `tf.TensorSpec`s of the data, in the structure of the data; or None, for what the
            network's `Input`s declare.

    Returns:
        Tensors of two examples, or of as many as the data or the network's `Input` fix; of one
        example only where the `Input` fixes that. An axis of unknown size gets the first of a few
        lengths that the network takes. None if a rank is not known, or if the network takes none of
        these lengths.
    """
    inputs = list(getattr(network, "inputs", None) or [])
    specs = _specs_of_data(network, specs)
    leaves = keras.tree.flatten(specs)
    if not leaves or any(leaf.shape is None for leaf in leaves):
        return None
    known = list(zip(leaves, _specs(specs, keys(specs), inputs), strict=True))
    shapes = [_known_shape(leaf, spec) for leaf, spec in known]
    if any(shape is None for shape in shapes):
        return None
    if all(None not in (shape or ())[1:] for shape in shapes):
        return _random(specs, known, shapes, 0)
    for length in _LENGTHS:
        made = _random(specs, known, shapes, length)
        if _takes(network, made):
            return made
    return None


def leaves_lengths_open(network: keras.Layer, specs: Any) -> bool:
    """Whether the data leave the size of an axis open, which the graph of a step then lacks.

    Args:
        network: The network.
        specs: As for `example`.
    """
    leaves = keras.tree.flatten(_specs_of_data(network, specs))
    return any(leaf.shape is None or None in tuple(leaf.shape)[1:] for leaf in leaves)


def _specs_of_data(network: keras.Layer, specs: Any) -> Any:
    """The given specs, or what the network's `Input`s declare."""
    inputs = list(getattr(network, "inputs", None) or [])
    if specs is None:
        specs = _keras.input_structure(network)
    if specs is None:
        specs = inputs[0] if len(inputs) == 1 else inputs
    return specs


# What an axis of unknown size has in the check of a network, the first that the network takes.
_LENGTHS = (8, 16, 32, 64, 128, 256)


def _known_shape(leaf: Any, spec: Any) -> tuple[int | None, ...] | None:
    """The shape of a tensor of the data, as far as it or its `Input` knows it; None if neither."""
    shape = tf.TensorShape(leaf.shape)
    known = tf.TensorShape(None if spec is None else spec.shape)
    if shape.rank is None:
        shape = known
    elif known.rank == shape.rank and shape.is_compatible_with(known):
        # A stateful recurrence takes batches of one size only.
        shape = shape.merge_with(known)
    return tuple(shape) if shape.rank else None


def symbolic(x: Any) -> Any:
    """Symbolic Keras tensors in the place of tensors or their specs; None stays."""

    def of(leaf: Any) -> Any:
        is_sparse = isinstance(leaf, tf.SparseTensor | tf.SparseTensorSpec)
        is_sparse = is_sparse or getattr(leaf, "sparse", False)
        dtype = keras.backend.standardize_dtype(leaf.dtype)
        return keras.KerasTensor(tuple(leaf.shape), dtype, sparse=is_sparse)

    return keras.tree.map_structure(lambda leaf: None if leaf is None else of(leaf), x)


def takes_one(network: keras.Layer) -> bool:
    """Whether a network declares that it takes one example at a time: there it can mix none."""
    inputs = list(getattr(network, "inputs", None) or [])
    return bool(inputs) and all(spec.shape[0] == 1 for spec in inputs)


def _takes(network: keras.Layer, x: Any) -> bool:
    """Whether a network takes tensors of these shapes, and returns any of at least one element."""
    try:
        outputs = keras.tree.flatten(network.compute_output_spec(symbolic(x)))
    except Exception:  # Whatever its layers have for a shape that is too small.
        return False
    return all(size is None or size > 0 for output in outputs for size in output.shape)


def _random(specs: Any, known: list[Any], shapes: list[Any], length: int) -> Any:
    """Random tensors of these shapes, with `length` in the place of what is not known."""
    made = []
    for number, ((leaf, spec), (batch, *rest)) in enumerate(zip(known, shapes, strict=True)):
        # Data that come one by one leave it to the network whether it takes more.
        is_one = spec is not None and spec.shape[0] == 1
        size = 1 if is_one else max(2, batch or 2)
        shape = (size, *(length if n is None else n for n in rest))
        dtype = tf.as_dtype(leaf.dtype if spec is None else spec.dtype)
        if dtype.is_floating:
            dtype = tf.float32 if dtype.size < 4 else dtype
            made.append(tf.random.stateless_normal(shape, (0, number), dtype=dtype, alg="philox"))
        else:
            made.append(tf.zeros(shape, dtype))
        if isinstance(leaf, tf.SparseTensorSpec):
            made[-1] = tf.sparse.from_dense(made[-1])
    return keras.tree.pack_sequence_as(specs, made)


def check_name(kind: str, name: Any) -> None:
    """Raises TypeError if `name`, of an input or an output (`kind`), cannot be one, nor None."""
    is_position = isinstance(name, numbers.Integral) and not isinstance(name, bool)
    if not (name is None or is_position or isinstance(name, str)):
        raise TypeError(f"`{kind}` must be a position, key or name. Received: {kind}={name!r}")


def _chosen(
    kind: str, name: Name, names: Sequence[Sequence[str]], candidates: Sequence[int]
) -> int:
    """The position that `name` means."""
    shown = ", ".join(
        f"{number}" + "".join(f" or {own!r}" for own in dict.fromkeys(names[number]))
        for number in candidates
    )
    if name is None:
        if len(candidates) == 1:
            return candidates[0]
        raise NotOne(
            f"The network has several {kind}s that the Jacobian could be "
            f"{'taken in' if kind == 'input' else 'of'}: name one with `{kind}=`. "
            f"The candidates are {shown}. Received: {kind}=None"
        )
    check_name(kind, name)
    found = named(name, names, candidates)
    if len(found) != 1:
        raise NotOne(
            f"`{kind}` must be the position, key or name of one floating {kind} of the network: "
            f"{shown}. Received: {kind}={name!r}"
        )
    return found[0]


def _specs(x: Any, paths: Sequence[str], inputs: Sequence[Any]) -> list[Any]:
    """The `Input` that each tensor of x goes to, or None where the network declares none."""
    by_name = {spec.name: spec for spec in inputs}
    # Keras matches the keys of a dict to the names of inputs, and leaves the other keys alone.
    if isinstance(x, dict) and set(by_name) <= set(paths):
        return [by_name.get(path) for path in paths]
    return list(inputs) if len(inputs) == len(paths) else [None] * len(paths)


def _names(path: str, spec: Any) -> list[str]:
    return [name for name in (path, getattr(spec, "name", None)) if name]


def _as_keras_takes(leaf: Any, spec: Any) -> Any:
    """A tensor in the dtype and, as far as known, the shape that the network computes with."""
    if leaf is None or isinstance(leaf, (tf.SparseTensor, tf.RaggedTensor)):
        return leaf
    try:
        leaf = tf.convert_to_tensor(leaf)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "`x` must hold tensors or arrays of numbers, of one length along each axis. "
            f"Received: a {type(leaf).__name__} of which TensorFlow makes no tensor: {error}"
        ) from error
    wanted = leaf.dtype if spec is None else tf.as_dtype(spec.dtype)
    if leaf.dtype == tf.string or wanted == tf.string or leaf.dtype.is_complex:
        return leaf
    if wanted.is_floating and not (leaf.dtype.is_floating and leaf.dtype.size >= 4):
        leaf = tf.cast(leaf, tf.float32 if wanted.size < 4 else wanted)
    elif not wanted.is_floating:
        leaf = tf.cast(leaf, wanted)
    if spec is not None and not leaf.shape.is_fully_defined():
        shape = tf.TensorShape([None, *spec.shape[1:]])
        if leaf.shape.is_compatible_with(shape):
            leaf = tf.ensure_shape(leaf, leaf.shape.merge_with(shape))
    return leaf


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, tf.Tensor) and leaf.dtype.is_floating


def _is_integer(leaf: Any) -> bool:
    return isinstance(leaf, tf.Tensor) and leaf.dtype.is_integer


def _dtype(leaf: Any) -> str:
    return "None" if leaf is None else leaf.dtype.name
