"""A session with the base dependencies alone, in a process of its own.

python tests/base_session.py FOLDER

Blocks what only the extras install, then imports, measures, trains, saves, reloads and attacks, and
prints what is said about each missing package. Also run in environments that hold only the base:
the oldest TensorFlow and Keras (.ci/oldest), and benchmarks/install_size.py.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def packages_of_extras() -> set[str]:
    """The modules that the extras' own distributions install, of those that are here."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {normalized(line) for lines in extras.values() for line in lines}
    names -= {"tensorflow", "tfjacreg"}
    installed = importlib.metadata.packages_distributions()
    return {
        module for module, owners in installed.items() if {normalized(o) for o in owners} & names
    }


def normalized(requirement: str) -> str:
    """The name of a distribution as PyPI compares it."""
    name = re.match(r"[\w.-]+", requirement).group()
    return re.sub(r"[-_.]+", "-", name).lower()


def session(folder: Path) -> None:
    """What works without any extra."""
    import keras

    import tfjacreg
    from tfjacreg import attacks, datasets, networks, regularizers, robustness

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
    assert tfjacreg.spectral_norm(networks.lenet(), x[:2].repeat(4, 1).repeat(4, 2)[:, 2:30, 2:30])

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
    for module in packages_of_extras():
        sys.modules[module] = None  # type: ignore[assignment]
    session(Path(sys.argv[1]))
