"""The snippets inside the lines of the pages and docstrings: what they write can be written."""

import re
from inspect import ismodule
from pathlib import Path

import keras
import numpy as np
import pytest
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
    }


def snippets(text):
    """The calls in backticks, on one line, whose first name is a module, class or function."""
    found = re.findall(r"(?<!`)`([\w.]+\([^`\n]*\))`", text)
    known = {name for name, value in names().items() if callable(value) or ismodule(value)}
    return {s for s in found if re.match(r"\w+", s).group() in known and "..." not in s}


WRITTEN = sorted(set().union(*(snippets(path.read_text()) for path in [*PAGES, *MODULES])))


def test_there_are_some():
    assert len(WRITTEN) > 15
    assert any("EarlyStopping" in snippet for snippet in WRITTEN)


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
