"""Compares PGD on the margin and the minimal distance with ART's AutoPGD and DeepFool.

AutoPGD follows the difference of logits ratio (DLR) with steps, momentum and restarts of its own,
and shares no code with this project or cleverhans. Every attack runs on the logits and on the
logits times 300: an attack on the margin must give the same result.

python benchmarks/margin_reference.py runs/none runs/spectral --out results/margin_reference.json
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import _setup  # noqa: F401
import keras
import numpy as np

from tfjacreg import attacks, datasets, robustness
from tfjacreg.experiments import evaluation, files
from tfjacreg.experiments.environment import environment

with warnings.catch_warnings():
    # ART warns of the frameworks that are not installed.
    warnings.simplefilter("ignore")
    from art.attacks.evasion import AutoProjectedGradientDescent, DeepFool
    from art.estimators.classification import TensorFlowV2Classifier

FACTORS = (1, 300)
RADII, ITERATIONS, BATCH, SEED = (8 / 255, 32 / 255), 32, 250, 0
QUANTILES = (0.05, 0.5, 0.95)


def scaled(classifier: keras.Model, factor: float) -> keras.Model:
    """Returns the classifier with its logits multiplied by `factor`."""
    pixels = keras.Input(classifier.input_shape[1:])
    return keras.Model(pixels, keras.layers.Rescaling(factor)(classifier(pixels)))


def accuracies(
    model: keras.Model, wrapped: TensorFlowV2Classifier, x: np.ndarray, y: np.ndarray, eps: float
) -> dict[str, float]:
    """Returns the accuracy after each attack of radius `eps`, and how often a gradient faded."""
    pgd = partial(attacks.pgd, model, x, y, eps=eps, iterations=ITERATIONS, seed=SEED)
    with warnings.catch_warnings():
        # That gradients are zero is what is measured here.
        warnings.simplefilter("ignore", UserWarning)
        entropy = pgd()
    margin = pgd(loss="margin")
    np.random.seed(SEED)
    autopgd = AutoProjectedGradientDescent(
        wrapped,
        eps=eps,
        eps_step=2 * eps,
        max_iter=ITERATIONS,
        nb_random_init=1,
        batch_size=BATCH,
        loss_type="difference_logits_ratio",
        verbose=False,
    )
    fooled = model.predict(autopgd.generate(x, y), verbose=0).argmax(axis=1) != y
    return {
        "cross_entropy": float(entropy.accuracy[-1]),
        "faded": float(entropy.faded[-1].mean()),
        "margin": float(margin.accuracy[-1]),
        "art_autopgd_dlr": float(1 - fooled.mean()),
    }


def distances(
    model: keras.Model, wrapped: TensorFlowV2Classifier, x: np.ndarray, y: np.ndarray
) -> dict[str, Any]:
    """Returns quantiles of our distance, of DeepFool's and of their ratio, where both have one."""
    ours, _ = robustness.minimal_distance(model, x, y, seed=SEED)
    deepfool = DeepFool(wrapped, max_iter=50, epsilon=1e-3, batch_size=BATCH, verbose=False)
    x_adv = deepfool.generate(x)
    theirs = np.linalg.norm((x_adv - x).reshape(len(x), -1), axis=1)
    fooled = model.predict(x_adv, verbose=0).argmax(axis=1) != y
    both = np.isfinite(ours) & fooled
    return {
        "minimal_distance": np.quantile(ours[both], QUANTILES).tolist(),
        "art_deepfool": np.quantile(theirs[both], QUANTILES).tolist(),
        "ratio": np.quantile(theirs[both] / ours[both], QUANTILES).tolist(),
        "images": int(both.sum()),
    }


def judge(model: keras.Model, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Returns accuracies and distances on one classifier."""
    wrapped = TensorFlowV2Classifier(
        model,
        nb_classes=model.output_shape[-1],
        input_shape=x.shape[1:],
        loss_object=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        clip_values=(0.0, 1.0),
    )
    return {
        "clean": float((model.predict(x, verbose=0).argmax(axis=1) == y).mean()),
        **{f"eps_{255 * eps:g}": accuracies(model, wrapped, x, y, eps) for eps in RADII},
        **distances(model, wrapped, x, y),
    }


def main() -> None:
    """Prints and writes, for each run and factor, accuracies and distances."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--data-dir", help="folder of the data sets")
    parser.add_argument("--limit", type=int, default=500, help="test images (500)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    rows = []
    for target in evaluation.find_targets(args.runs, data_dir=args.data_dir):
        test = datasets.load(target.dataset, target.data_dir).test
        x, y = test.x[: args.limit], test.y[: args.limit]
        classifier = evaluation.load(target.classifier)
        for factor in FACTORS:
            row = {"method": target.method, "seed": target.seed, "factor": factor}
            row |= judge(scaled(classifier, factor), x, y)
            rows.append(row)
            print_row(row)
    machine = environment()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    files.write_json(args.out, {"rows": rows, "limit": args.limit} | machine)


def print_row(row: dict[str, Any]) -> None:
    """Prints the results of one run and factor."""
    print(f"{row['method']} #{row['seed']}, logits x {row['factor']}, clean {row['clean']:.3f}")
    for eps in RADII:
        found = row[f"eps_{255 * eps:g}"]
        cells = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        print(f"  {255 * eps:2g}/255: {cells}")
    for name in ("minimal_distance", "art_deepfool", "ratio"):
        values = ", ".join(f"{value:.3f}" for value in row[name])
        print(f"  {name:16} 5, 50, 95 %: {values} of {row['images']} images", flush=True)


if __name__ == "__main__":
    main()
