"""For every family of keras.applications: whether it works, and the error of its sigma.

    python benchmarks/applications.py                         # what is missing in the results
    python benchmarks/applications.py --models VGG16 --redo   # anew
    python benchmarks/applications.py --parts                 # docs/verification.md alone

Every model is made without weights, at its smallest size, with ten logits. Each part of a model
runs in a process of its own, and its row is written as soon as it is known.

checks: `check_network` in training mode, in both forward modes, with fresh weights for each seed.
errors: `spectral_norm(method="exact")` compared with the SVD of the dense Jacobian in float64, in
inference mode, for the network in float64 and for the same weights in float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import _rows
import _setup  # noqa: F401
import keras
import numpy as np
import tensorflow as tf

from tfjacreg.checks import check_network
from tfjacreg.jacobian import FORWARD_MODES
from tfjacreg.model import RegularizedModel
from tfjacreg.norms import spectral_norm
from tfjacreg.regularizers import SpectralNorm

# The smallest model of every family, and the smallest image that it takes; how many seeds.
MODELS = {
    "MobileNet": (32, 10),
    "MobileNetV2": (32, 10),
    "MobileNetV3Small": (32, 10),
    "VGG16": (32, 10),
    "ResNet50": (32, 10),
    "ResNet50V2": (32, 10),
    "EfficientNetB0": (32, 10),
    "EfficientNetV2B0": (32, 10),
    "DenseNet121": (32, 10),
    "NASNetMobile": (32, 10),
    "ConvNeXtTiny": (32, 10),
    "Xception": (71, 10),
    "InceptionV3": (75, 10),
    "InceptionResNetV2": (75, 10),
}
PARTS = ("checks", "errors")
BEGIN, END = "<!-- applications.py: begin -->", "<!-- applications.py: end -->"


def network(name: str, seed: int = 0) -> keras.Model:
    """A model of keras.applications with fresh weights and ten logits."""
    keras.utils.set_random_seed(seed)
    size, _ = MODELS[name]
    return getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
    )


def images(name: str, number: int, seed: int = 0) -> np.ndarray:
    """Pixels from 0 to 255 for models that scale them; else standardized."""
    size, _ = MODELS[name]
    noise = np.random.default_rng(seed).uniform(size=(number, size, size, 3))
    scales = name.startswith(("Efficient", "ConvNeXt", "MobileNetV3"))
    return noise * 255 if scales else (noise - 0.5) * 12**0.5


def checks(name: str, seeds: int | None = None) -> dict[str, Any]:
    """What `check_network` refuses; after the first seed in accumulator mode, which holds both."""
    seeds = MODELS[name][1] if seeds is None else seeds
    refused = {}
    for seed in range(seeds):
        for mode in FORWARD_MODES if seed == 0 else FORWARD_MODES[:1]:
            # An initializer without a seed draws from Keras' own generator.
            made = network(name, seed)
            try:
                check_network(made, images(name, 2, seed).astype("float32"), forward_mode=mode)
            except ValueError as error:
                refused[f"{mode}, seed {seed}"] = str(error)
        keras.backend.clear_session()
    return {"seeds": seeds, "refused": refused}


def errors(name: str) -> dict[str, float]:
    """The largest relative error of sigma of two images, in float64 and float32."""
    weights = with_statistics(network(name), name).get_weights()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    x = images(name, 2)
    precise = network(name)
    precise.set_weights(weights)
    jacobians = dense_jacobian(precise, x)
    exact = np.linalg.svd(jacobians, compute_uv=False)[:, 0]
    sigma = {"float64": spectral_norm(precise, x, method="exact").sigma.numpy()}
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    plain = network(name)
    plain.set_weights(weights)
    sigma["float32"] = spectral_norm(plain, x.astype("float32"), method="exact").sigma.numpy()
    return {"sigma": float(exact[0])} | {
        dtype: float(np.max(np.abs(got / exact - 1))) for dtype, got in sigma.items()
    }


def with_statistics(made: keras.Model, name: str) -> keras.Model:
    """The model with the moving statistics of a batch: without them images hardly pass it."""
    for layer in made._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    made(images(name, 32, seed=1).astype("float32"), training=True)
    return made


def dense_jacobian(made: keras.Model, x: np.ndarray) -> np.ndarray:
    """`[B, 10, n_in]`, a row for each output, by reverse mode alone: no part of tfjacreg."""

    @tf.function(autograph=False)
    def row(x: tf.Tensor, direction: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = made(x, training=False)
        return tape.gradient(outputs, x, direction)

    x = tf.constant(x)
    directions = (tf.one_hot([k] * len(x), 10, dtype=x.dtype) for k in range(10))
    rows = [row(x, direction).numpy().reshape(len(x), -1) for direction in directions]
    return np.stack(rows, axis=1)


def compiled(made: keras.Model, kind: str) -> keras.Model:
    """A network to be trained: `"plain"` by Keras alone, or with the penalty in a forward mode."""
    model = made
    if kind != "plain":
        model = RegularizedModel(made, SpectralNorm(0.01, seed=0, forward_mode=kind))
    model.compile(
        keras.optimizers.SGD(1e-6),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    return model


IN_A_PROCESS: dict[str, Callable[..., Any]] = {"checks": checks, "errors": errors}


in_a_process = functools.partial(_rows.in_a_process, __file__)


def measured(name: str, part: str, _repeats: int) -> Any:
    """One part of the results of a model; no step is timed."""
    return in_a_process(part, name)


def table(content: dict[str, Any]) -> str:
    """The table of docs/verification.md."""
    lines = [
        "| model | pixels | seeds refused | error of sigma, float64 | float32 |",
        "|---|---|---|---|---|",
    ]
    for name, row in content["models"].items():
        cells = [name, f"{MODELS[name][0]}"]
        checked, wrong = (row.get(part) for part in PARTS)
        cells.append(f"{len(checked['refused'])} of {checked['seeds']}" if checked else "")
        cells += [f"{wrong[dtype]:.0e}" if wrong else "" for dtype in ("float64", "float32")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(page: str, content: dict[str, Any]) -> str:
    """The page with the table between its marks."""
    return _rows.between(page, BEGIN, END, table(content))


def main() -> None:
    """Fills in the results, row by row, and writes the table."""
    _rows.Rows(
        key="models",
        names=tuple(MODELS),
        parts=PARTS,
        timed=("errors",),
        repeats=0,
        json=_rows.ROOT / "results" / "applications.json",
        page=_rows.ROOT / "docs" / "verification.md",
        in_a_process=IN_A_PROCESS,
        measured=measured,
        with_table=with_table,
    ).main(__doc__)


if __name__ == "__main__":
    main()
