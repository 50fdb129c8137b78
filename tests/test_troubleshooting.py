"""docs/troubleshooting.md has every message of the library, and none that the library lacks."""

import ast
import builtins
import functools
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfjacreg

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MODULES = sorted((ROOT / "tfjacreg").rglob("*.py"))
# What the check says of a layer follows the layer's name.
OF_A_LAYER = ("has ", "mixes ", "cannot be differentiated", "draws ")
# What Keras itself says, in its words.
OF_KERAS = {"The model does not have any trainable weights"}
# Raised for a caller inside the package, which makes one of the other messages of it.
INNER = {"... images in the ... split, not", "labels from ... to"}


def is_of_experiments(path):
    return "experiments" in path.relative_to(ROOT).parts  # ROOT may have any name.


@functools.cache
def errors():
    """The names of the classes that are errors: Python's, and the package's own."""
    known = {
        n for n, v in vars(builtins).items() if isinstance(v, type) and issubclass(v, Exception)
    }
    trees = [ast.parse(path.read_text()) for path in MODULES]
    for _ in range(3):  # An own error may derive from another one.
        for node in (node for tree in trees for node in ast.walk(tree)):
            bases = node.bases if isinstance(node, ast.ClassDef) else ()
            if any(ast.unparse(base).rpartition(".")[2] in known for base in bases):
                known.add(node.name)
    return known


def assigned(tree):
    """The strings that a file gives a name, at its top or in a function."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, node.value)
    return found


def text(node, names):
    """The text of an expression, with ... for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        node = node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text(node.left, names) + text(node.right, names)
    name = ast.unparse(node).rpartition(".")[2]
    # A constant of the module or of another one, or a sentence that a function has put together.
    is_known = name.isupper() or (isinstance(node, ast.Name) and name not in ("name", "text"))
    value = names.get(name)
    if is_known and isinstance(value, ast.Constant | ast.JoinedStr):
        return text(value, {})
    return "..."


def key(message):
    """How a message begins: its first clause, by which it is found on the page."""
    message = re.sub(r"\{[^{} ]*\}", "...", " ".join(message.split()))
    message = message.removeprefix("...: ")  # The file that it is about.
    message = re.split(r"(?:(?<=[\w)`'])|(?<=\.\.\.))[.:] |[.:]? *Received:", message)[0]
    return re.sub(r"(\.\.\.)+", "...", message).removesuffix("(...)").rstrip(" .,:(")


def messages(path, known):
    """The messages of a file."""
    tree = ast.parse(path.read_text())
    names = {
        **assigned(ast.parse((ROOT / "tfjacreg" / "recording.py").read_text())),
        **assigned(tree),
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            function = ast.unparse(node.func).rpartition(".")[2]
            if function in known or function in ("warn", "_warn"):
                yield key(text(node.args[0], names))
        elif path.name in ("checks.py", "graph_search.py") and isinstance(
            node, ast.Constant | ast.JoinedStr
        ):
            said = text(node, names)
            if said.startswith(OF_A_LAYER) and len(said.split()) > 3:
                yield key(said)


@functools.cache
def said(of_experiments=False):
    known = errors()
    return {
        message
        for path in MODULES
        if is_of_experiments(path) == of_experiments
        for message in messages(path, known)
        # What is only filled in comes from another place, where it is found.
        if len(re.findall(r"[a-z]{2}", message)) > 3
    } - (OF_KERAS | INNER)


def on_the_page():
    return [key(entry) for entry in re.findall(r"^- `` (.*) ``$", PAGE, re.M)]


def test_the_page_has_every_message_of_the_library():
    library = said()
    assert len(library) > 100
    assert library - set(on_the_page()) == set()


def test_the_page_has_no_message_that_the_code_lacks():
    listed = on_the_page()
    assert sorted(listed) == sorted(set(listed))
    assert set(listed) - said() - said(of_experiments=True) == set()


def test_a_message_that_is_new_or_gone_would_be_seen(tmp_path):
    new = 'raise ValueError(f"`{name}` must be green. Received: {name}={value!r}")'
    (tmp_path / "new.py").write_text(new)
    assert list(messages(tmp_path / "new.py", errors())) == ["`...` must be green"]
    assert "`...` must be green" not in on_the_page()
    assert {"NotOne", "LostDerivative", "MissingExtraError", "ValueError"} <= errors()


def found(message):
    """What a reader finds who looks for a message with names and numbers in it."""
    flat = " ".join(message.split())
    patterns = {entry: re.sub(r"(\\\.){3}", ".*?", re.escape(entry)) for entry in on_the_page()}
    return [entry for entry, pattern in patterns.items() if re.search(pattern, flat)]


def dense(units=3, shape=(4,), **options):
    return keras.Sequential([keras.Input(shape), layers.Dense(units, **options)])


X = np.ones((4, 4), "float32")


class Mixes(layers.Layer):
    def call(self, x):
        return x - keras.ops.mean(x, axis=0)


def trained(network, loss="mse"):
    model = tfjacreg.RegularizedModel(network, "spectral")
    model.compile("sgd", loss)
    model.fit(X, np.zeros((4, 3)), verbose=0)


PROVOKED = {
    "mixes the examples of a batch": lambda: trained(
        keras.Sequential([keras.Input((4,)), layers.Dense(3), Mixes()])
    ),
    "The outputs of network ... are probabilities": lambda: trained(dense(activation="softmax")),
    "`...` must be an integer >= 1": lambda: tfjacreg.regularizers.SpectralNorm(0.1, iterations=0),
    "`...` must be one of": lambda: tfjacreg.spectral_norm(dense(), X, method="svd"),
    "The Jacobian needs a floating input": lambda: tfjacreg.spectral_norm(
        keras.Sequential([keras.Input((4,), dtype="int32"), layers.Embedding(3, 2)]),
        X.astype("int32"),
    ),
    "`network` must be a keras.Layer, for example a keras.Model": lambda: tfjacreg.RegularizedModel(
        np.tanh
    ),
    "A regularizer's name must be one of": lambda: tfjacreg.RegularizedModel(dense(), "l2"),
    "`network` must be used as Keras uses models": lambda: tfjacreg.RegularizedModel(
        tfjacreg.RegularizedModel(dense())
    ),
    "A ragged tensor has no Jacobian of one shape for each example": lambda: tfjacreg.spectral_norm(
        dense(), tf.ragged.constant([[1.0], [1.0, 2.0]])
    ),
    "`...` must be the position, key or name of one floating ... of the network": lambda: (
        tfjacreg.spectral_norm(dense(), X, input="image")
    ),
    "The classifier must give logits": lambda: tfjacreg.attacks.square(
        dense(shape=(4, 4, 1), activation="softmax"), np.ones((4, 4, 4, 1)), np.zeros(4, int)
    ),
    "A layer's norm depends on the size of its input": lambda: tfjacreg.spectral_bound(
        keras.Sequential([keras.Input((None, None, 1)), layers.Conv2D(2, 3)])
    ),
}


@pytest.mark.parametrize("entry", PROVOKED)
def test_a_reader_finds_a_message_that_was_provoked(entry):
    """As it comes, with the reader's own names in it, and not among many."""
    with pytest.raises((TypeError, ValueError, tfjacreg.PenaltyWarning)) as caught:
        PROVOKED[entry]()
    entries = found(str(caught.value))
    assert entry in entries and len(entries) <= 3
