"""The names in an `evaluation.json`, and checks of its form before tables and figures."""

from __future__ import annotations

import re
from typing import Any

from tfjacreg.experiments.records import LARGEST, is_number
from tfjacreg.printable import shown

# Accuracies under perturbations of rising strength, and measures at each image.
PERTURBATIONS = ("noise", "pgd", "pgd_margin", "tpgd", "square")
POINTWISE = ("boundary", "distance", "sigma")
# The entries with the distances: in random directions, to the nearest image.
DISTANCES = {"boundary": "boundary_distance", "distance": "minimal_distance"}

_COUNT = 2**63  # Of images, and of seeds.
_NAME = 4096  # Characters of a data set's name, which may be a path.


def strength(name: str) -> str:
    """The name of the entry with a perturbation's strengths."""
    return "variance" if name == "noise" else "iterations"


def check_evaluation(content: dict[str, Any]) -> None:
    """Checks the entries of an evaluation; a missing entry may not have been measured yet.

    Args:
        content: Content of `evaluation.json`.

    Raises:
        ValueError: If an entry is not as evaluate.py writes it; the message names it.
    """
    if "settings" in content:
        _check_settings(content["settings"])
    if "clean_accuracy" in content:
        _require(
            is_number(content["clean_accuracy"], 0, 1),
            *("clean_accuracy", "a number from 0 to 1", content["clean_accuracy"]),
        )
    for name in PERTURBATIONS:
        if name in content:
            _check_curve(name, content[name])
    for name, key in DISTANCES.items():
        if name in content or key in content:
            _check_distances(name, key, content)
    if "sigma" in content:
        _check_list("sigma", content["sigma"], 0, LARGEST)
        _check_list("margin", content.get("margin"), -LARGEST, LARGEST)
        _require(
            len(content["margin"]) == len(content["sigma"]),
            *("margin", "a margin for each sigma", content["margin"]),
        )

    images = content.get("settings", {}).get("images")
    for key in (*DISTANCES.values(), "sigma"):
        if key in content:
            images = len(content[key]) if images is None else images
            _require(
                len(content[key]) == images,
                key,
                f"a list of {images}, one for each image",
                content[key],
            )


def _require(holds: bool, name: str, what: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {what}. Received: {shown(value)}")


def _check_settings(settings: Any) -> None:
    _require(isinstance(settings, dict), "settings", "an object", settings)
    for name, what, holds in (
        ("dataset", "a name", lambda v: isinstance(v, str) and len(v) <= _NAME),
        ("images", "a count", lambda v: isinstance(v, int) and is_number(v, 1, _COUNT)),
        ("seed", "an integer from 0", lambda v: isinstance(v, int) and is_number(v, 0, _COUNT)),
        ("classifier_sha256", "64 digits from 0 to f", _is_digest),
        ("data_digest", "64 digits from 0 to f", _is_digest),
        ("image_size", "null or two counts", _is_size),
    ):
        if name in settings:
            _require(holds(settings[name]), f"settings.{name}", what, settings[name])


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_size(value: Any) -> bool:
    return value is None or (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(side, int) and is_number(side, 1, _COUNT) for side in value)
    )


def _check_list(name: str, values: Any, low: float, high: float) -> None:
    _require(
        isinstance(values, list)
        and len(values) > 0
        and all(is_number(v, low, high) for v in values),
        *(name, f"a list of numbers from {low:g} to {high:g}", values),
    )


def _check_curve(name: str, curve: Any) -> None:
    _require(isinstance(curve, dict), name, "an object", curve)
    key = strength(name)
    _check_list(f"{name}.{key}", curve.get(key), 0, LARGEST)
    strengths = curve[key]
    _require(strengths == sorted(set(strengths)), f"{name}.{key}", "rising numbers", strengths)
    for part in ("accuracy", "faded"):
        if part in curve or part == "accuracy":
            _check_list(f"{name}.{part}", curve.get(part), 0, 1)
            _require(
                len(curve[part]) == len(strengths),
                *(f"{name}.{part}", f"a number for each {key}", curve[part]),
            )


def _check_distances(name: str, key: str, content: dict[str, Any]) -> None:
    values: Any = content.get(key)
    found: Any = content.get(name)
    _require(
        isinstance(values, list)
        and len(values) > 0
        and all(value is None or is_number(value, 0, LARGEST) for value in values),
        *(key, "a list of numbers from 0, or null", values),
    )
    _require(isinstance(found, dict) and "misclassified" in found, name, "an object", found)
    without: set[int] = set()
    for part, images in found.items():
        _require(
            isinstance(images, list)
            and all(isinstance(i, int) and is_number(i, 0, len(values) - 1) for i in images),
            *(f"{name}.{shown(part)}", f"a list of images from 0 to {len(values) - 1}", images),
        )
        without.update(images)
    absent = {image for image, value in enumerate(values) if value is None}
    _require(absent == without, name, f"the images that have no {key}", found)
