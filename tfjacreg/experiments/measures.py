"""What evaluate.py can measure on one classifier, with which settings, and how it is stored.

A measure is a function of the classifier, the images, the labels and a seed. Its result goes into
`evaluation.json`, where an entry with the name of the measure says that it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tqdm import tqdm

from tfjacreg import attacks, norms, robustness
from tfjacreg.experiments import evaluation_records
from tfjacreg.judging.classifiers import (
    Progress,
    batches,
    check_classifier,
    concrete_function,
    finite,
    logit_margin,
    pad_rows,
    predict,
)

PERTURBATIONS = evaluation_records.PERTURBATIONS
POINTWISE = evaluation_records.POINTWISE

STEPS = [1, 2, 4, 8, 16, 32]
_GRADIENT: dict[str, Any] = {
    "iterations": STEPS,
    "eps": attacks.EPS,
    "step_size": attacks.STEP_SIZE,
}
PLAN: dict[str, dict[str, Any]] = {
    "noise": {"variance": [0.01, 0.02, 0.05, 0.1, 0.2], "draws": 5},
    "pgd": _GRADIENT,
    "pgd_margin": _GRADIENT,
    "tpgd": _GRADIENT,
    "square": {"iterations": [1, 10, 30, 100, 300, 1000], "eps": attacks.EPS},
    "boundary": {"samples": 100, "spheres": 64, "resolution": 0.01},
    "distance": {"starts": 3, "iterations": 50},
    "sigma": {"method": "exact"},
}
# Images whose Jacobians are measured together.
_BATCH = 256
# Significant digits of what is measured at a point: float32 has seven.
_DIGITS = 6


def steps_per_image(name: str) -> float:
    """Roughly the number of plain training steps that take as long as a measure of one image.

    It is for an estimate of the time before anything was measured; a forward pass is a third of a
    step.

    Args:
        name: One of `PERTURBATIONS` or `POINTWISE`.
    """
    plan, forward = PLAN[name], 1 / 3
    if name == "noise":
        return forward * len(plan["variance"]) * plan["draws"]
    if name == "square":
        return forward * plan["iterations"][-1]
    if name == "boundary":
        return forward * plan["samples"] * plan["spheres"]
    if name == "distance":
        return float(plan["starts"] * plan["iterations"])
    if name == "sigma":  # A product for each of about ten classes.
        return 10.0
    return float(plan["iterations"][-1])


def measure(
    name: str, classifier: keras.Model, x: np.ndarray, y: np.ndarray, seed: int, title: str
) -> dict[str, Any]:
    """Measures one thing, with a progress bar.

    Args:
        name: One of `PERTURBATIONS` or `POINTWISE`.
        classifier: From pixels in [0, 1] to logits.
        x: Test images in [0, 1], `[N, *in]`.
        y: Their labels `[N]`.
        seed: Seed of everything random.
        title: The title of the progress bar.

    Returns:
        Entries of `evaluation.json`, one of them under `name`.

    Raises:
        TypeError: If the classifier cannot be evaluated.
        ValueError: Likewise.
    """
    if name in POINTWISE:
        found: Callable[..., dict[str, Any]] = {
            "boundary": _boundary,
            "distance": _distance,
            "sigma": _sigma,
        }[name]
        with tqdm(total=len(x), desc=title, unit="image") as bar:
            return found(classifier, x, y, seed=seed, progress=bar.update, **PLAN[name])
    return {name: _curve(name, classifier, x, y, seed, title)}


def _curve(
    name: str, classifier: keras.Model, x: np.ndarray, y: np.ndarray, seed: int, title: str
) -> dict[str, Any]:
    plan = dict(PLAN[name])
    strength = evaluation_records.strength(name)
    values = plan.pop(strength)
    if name == "noise":
        total = len(x) * len(values) * plan["draws"]
        with tqdm(total=total, desc=title, unit="image", unit_scale=True) as bar:
            accuracy = robustness.noise_accuracy(
                classifier, x, y, values, seed, progress=bar.update, **plan
            )
        return {strength: values, "accuracy": accuracy.tolist()}
    if name == "pgd_margin":
        plan["loss"] = "margin"
    attack = {"tpgd": attacks.tpgd, "square": attacks.square}.get(name, attacks.pgd)
    with tqdm(total=len(x) * values[-1], desc=title, unit="step", unit_scale=True) as bar:
        result = attack(classifier, x, y, iterations=values, seed=seed, progress=bar.update, **plan)
    entry = {strength: values, "accuracy": result.accuracy.tolist()}
    if name != "square":  # Square uses no gradient.
        entry["faded"] = result.faded.mean(axis=1).tolist()
    return entry


def _boundary(classifier: keras.Model, x: np.ndarray, y: np.ndarray, **plan: Any) -> dict[str, Any]:
    distance = robustness.boundary_distance(classifier, x, y, **plan)
    return {
        "boundary_distance": [round(d, 6) if np.isfinite(d) else None for d in distance],
        "boundary": _without(distance, "beyond_max_radius"),
    }


def _distance(classifier: keras.Model, x: np.ndarray, y: np.ndarray, **plan: Any) -> dict[str, Any]:
    distance, _ = robustness.minimal_distance(classifier, x, y, **plan)
    return {
        "minimal_distance": [_number(d) if np.isfinite(d) else None for d in distance],
        "distance": _without(distance, "not_found"),
    }


def _without(distance: npt.NDArray[np.float64], infinite: str) -> dict[str, list[int]]:
    """The images that have no distance: those with NaN are misclassified, the others infinite."""
    return {
        "misclassified": np.flatnonzero(np.isnan(distance)).tolist(),
        infinite: np.flatnonzero(np.isinf(distance)).tolist(),
    }


def _sigma(
    classifier: keras.Model,
    x: np.ndarray,
    y: np.ndarray,
    *,
    seed: int,
    progress: Progress,
    method: str,
) -> dict[str, Any]:
    """The spectral norm of the Jacobian at each image, and the margin to compare it with."""
    checked = check_classifier(classifier, x, y)
    margin = logit_margin(tf.constant(checked.y), tf.constant(predict(checked))).numpy()
    finite(margin, "margins")

    def spectral_norm(images: tf.Tensor) -> tf.Tensor:
        return norms.spectral_norm(classifier, images, method=method, seed=seed).sigma

    measured = concrete_function(spectral_norm, checked.x)
    sigma = np.empty(len(checked.x))
    for s in batches(len(sigma), _BATCH):
        images = pad_rows(checked.x[s])
        sigma[s] = finite(measured(images).numpy()[: s.stop - s.start], "spectral norms")
        progress(s.stop - s.start)
    return {"sigma": [_number(s) for s in sigma], "margin": [_number(m) for m in margin]}


def _number(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
