"""The snippets inside the lines of the pages and docstrings: what they write can be written."""

import re
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfjacreg

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted((ROOT / "tfjacreg").glob("*.py"))
X = np.random.default_rng(0).uniform(size=(8, 5)).astype("float32")
Y = np.arange(8) % 3


def names():
    """What a snippet may name: the library's face, Keras' callbacks, and a reader's variables."""
    network = keras.Sequential([keras.Input((5,)), layers.Dense(3)])
    return {
        **{name: getattr(tfjacreg, name) for name in tfjacreg.__all__},
        **{cls.__name__: cls for cls in tfjacreg.regularizers.BY_NAME.values()},
        **vars(tfjacreg.networks),
        **{name: getattr(keras.callbacks, name) for name in dir(keras.callbacks)},
        **{"tfjacreg": tfjacreg, "keras": keras, "network": network, "classifier": network},
        **{"x": X, "y": Y, "x_val": X, "f": 0.1, "factor": 0.1, "t": 0.5, "task": network},
        **{"np": np, "tf": tf, "warnings": warnings, "layer": layers.Dense(3)},
        **{"op": tfjacreg.JacobianOperator(network, X), "u": np.ones((8, 3)), "v": X},
    }


def calls(text):
    """The calls in backticks, on one line."""
    return set(re.findall(r"(?<!`)`([\w.]+\([^`\n]*\))`", text))


# What looks like a call and is none that a reader types: a formula, a signature to define, a method
# of an object that the sentence is about. A new one is added here on purpose, or is run.
NO_CODE = {
    *(
        "h(sigma_i)",
        "f(x_i)",
        "f(x)",
        "sigma(x_i)",
        "max(sigma - t, 0)",
        "max(sigma - threshold, 0)",
    ),
    *("min(n_out, n_in)", "round(fraction * B)", "self.network(x, training=training)"),
    *("h(max(‖J_i‖_2 - threshold, 0))", "KL(softmax(f(x)) || softmax(f(x_adv)))"),
    *("per_example(jacobian, key)", "__call__(network, state)", "regularizer(subject, state)"),
    "function(input_shape, num_classes)",
    *("factor_changes(factor)", "matvec(v)", "rmatvec(u)", "fit(x, y)"),
    *("tensors()", "float(tensor)", 'quantize("int8")', "max(sigma, 1 - eps)"),
    *("dataset.map(task.preprocessor)", "x.to_tensor()"),
}
# Those of other libraries, on the page that compares them with ours.
OF_OTHERS = (
    "torch.",
    "JacobianSpectralNorm(",
    "JacobianReg(",
    "nsl.",
    "reg(",
    "loss.backward(",
    "model.eval(",
    "model.train(",
)
KNOWN = set(names())


def snippets(text):
    """Those that are whole and begin with a name that is known."""
    found = {call for call in calls(text) if "..." not in call} - NO_CODE
    return {call for call in found if re.match(r"\w+", call).group() in KNOWN}


TEXTS = [path.read_text() for path in [*PAGES, *MODULES]]
WRITTEN = sorted(set().union(*map(snippets, TEXTS)))


def test_there_are_some():
    assert len(WRITTEN) > 15
    assert any("EarlyStopping" in snippet for snippet in WRITTEN)


def test_every_call_is_run_or_is_no_code():
    found = {call for text in TEXTS for call in calls(text) if "..." not in call}
    found = {call for call in found if not call.startswith(OF_OTHERS)}
    assert found - set(WRITTEN) == NO_CODE


@pytest.mark.parametrize("snippet", WRITTEN)
def test_a_snippet_runs(snippet):
    known = names()
    made = eval(snippet, known)
    if not isinstance(made, keras.callbacks.Callback):
        return
    monitor = tfjacreg.callbacks.SpectralNormMonitor(X)
    model = tfjacreg.RegularizedModel(known["network"], tfjacreg.regularizers.SpectralNorm(0.1))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(X, Y, verbose=0, callbacks=[monitor, made])
