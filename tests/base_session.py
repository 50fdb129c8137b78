"""A session with the base dependencies alone, in a process of its own.

python tests/base_session.py FOLDER

It blocks packages that only the extras install, then imports, measures, trains, saves, reloads and
attacks, and prints the message about each missing package. benchmarks/base_install.py runs it in
environments that hold nothing else.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import tomllib
from pathlib import Path

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

ROOT = Path(__file__).resolve().parents[1]


def block_extras() -> None:
    """Makes every import of a package that an extra names fail, as if it were not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = project["optional-dependencies"].values()
    names = {normalized(requirement) for requirements in lists for requirement in requirements}
    names -= {"tensorflow", "tfjacreg"}
    installed = importlib.metadata.packages_distributions()
    for module, owners in installed.items():
        if {normalized(owner) for owner in owners} & names:
            sys.modules[module] = None  # type: ignore[assignment]


def normalized(requirement: str) -> str:
    """The name of a distribution in the form in which PyPI compares names."""
    name = re.split(r"[^\w.-]", requirement)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def session(folder: Path) -> None:
    """Does everything that works without any extra."""
    import keras
    import tensorflow as tf

    import tfjacreg
    from tfjacreg import attacks, datasets, networks, regularizers, robustness

    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, NumPy {np.__version__}")

    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(96, 8, 8, 1)).astype("float32")
    y = np.argmax(x[:, :4, :4, 0].sum(axis=2), axis=1).astype("int32")

    network = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(6, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(4),
        ]
    )
    exact = tfjacreg.spectral_norm(network, x[:8], method="exact").sigma.numpy()
    lanczos = tfjacreg.spectral_norm(network, x[:8], method="lanczos", iterations=4)
    np.testing.assert_allclose(lanczos.sigma, exact, rtol=1e-3)
    frobenius = tfjacreg.frobenius_norm(network, x[:8]).numpy()
    assert (frobenius >= exact * (1 - 1e-5)).all()
    assert tfjacreg.spectral_bound(networks.lenet()) > 0

    model = tfjacreg.RegularizedModel(network, regularizers.SpectralNorm(0.01))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.8), loss, metrics=["accuracy"])
    history = model.fit(x, y, epochs=6, batch_size=16, validation_data=(x, y), verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert np.isfinite(history["penalty"]).all() and min(history["penalty"]) > 0

    logits = network.predict(x, verbose=0)
    network.save(folder / "network.keras")
    model.save(folder / "run.keras")
    alone = keras.models.load_model(folder / "network.keras")
    np.testing.assert_allclose(alone.predict(x, verbose=0), logits, rtol=1e-5, atol=1e-6)
    whole = keras.models.load_model(folder / "run.keras")
    assert int(whole.optimizer.iterations) == int(model.optimizer.iterations) == 36
    again = whole.fit(x, y, epochs=1, batch_size=16, verbose=0).history
    assert again["loss"][0] < history["loss"][0]
    model.export(folder / "saved_model", verbose=False)

    result = attacks.square(network, x[:16], y[:16], iterations=20)
    assert result.accuracy[-1] <= np.mean(logits[:16].argmax(axis=1) == y[:16])
    assert robustness.noise_accuracy(network, x[:16], y[:16], [0.0, 0.5]).shape == (2,)

    for what, call in {
        "attacks.pgd": lambda: attacks.pgd(network, x[:2], y[:2], iterations=1),
        "attacks.tpgd": lambda: attacks.tpgd(network, x[:2], y[:2], iterations=1),
        "datasets.load digits": lambda: datasets.load("digits"),
        "datasets.load kmnist": lambda: datasets.load("kmnist"),
        "datasets.prepare": lambda: datasets.prepare("kmnist", folder),
    }.items():
        try:
            call()
        except ImportError as error:
            print(f"{what}: {error}")
        else:
            raise AssertionError(f"{what} found what only an extra installs.")


if __name__ == "__main__":
    block_extras()
    session(Path(sys.argv[1]))
