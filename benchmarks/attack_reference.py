"""Compares the attacks with cleverhans and ART on one classifier: accuracy after the attack.

python benchmarks/attack_reference.py runs/none --out results/attack_reference.json
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import _setup  # noqa: F401
import keras
import numpy as np
import tensorflow as tf
from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent

from tfjacreg import attacks, datasets
from tfjacreg.experiments import evaluation, files
from tfjacreg.experiments.environment import environment

with warnings.catch_warnings():
    # ART warns of the frameworks that are not installed.
    warnings.simplefilter("ignore")
    from art.attacks.evasion import ProjectedGradientDescentTensorFlowV2, SquareAttack
    from art.estimators.classification import TensorFlowV2Classifier

EPS, STEP, ITERATIONS, BATCH = 32 / 255, 2 / 255, 16, 250
# Single runs differ by more than the implementations do: the accuracy of 1,000 images after TPGD,
# or after ART's Square with its one window for all images, varies by 1 to 2 points with the seed.
GRADIENT_SEEDS, SQUARE_SEEDS = range(20), range(5)


def hard_loss(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Cross entropy, as cleverhans calls it."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)


def soft_loss(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Cross entropy with probabilities as labels: TPGD's loss up to a constant."""
    return tf.nn.softmax_cross_entropy_with_logits(labels=labels, logits=logits)


def main() -> None:
    """Prints and writes one row per attack and strength, one column per implementation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data-dir", help="folder of the data sets")
    parser.add_argument("--limit", type=int, default=1000, help="test images (1000)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    (target,) = evaluation.find_targets([args.run], data_dir=args.data_dir)
    test = datasets.load(target.dataset, target.data_dir).test
    x, y = test.x[: args.limit], test.y[: args.limit]
    model = evaluation.load(target.classifier)
    wrapped = TensorFlowV2Classifier(
        model,
        nb_classes=model.output_shape[-1],
        input_shape=x.shape[1:],
        loss_object=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        clip_values=(0.0, 1.0),
    )

    def accuracy(images: np.ndarray) -> float:
        return float(np.mean(model.predict(images, verbose=0).argmax(axis=1) == y))

    def logits(images: tf.Tensor) -> tf.Tensor:
        return model(images, training=False)

    def cleverhans(labels: np.ndarray, loss: Callable, noise: float | None) -> float:
        parts = [
            projected_gradient_descent(
                logits,
                tf.constant(x[i : i + BATCH]),
                EPS,
                STEP,
                ITERATIONS,
                np.inf,
                loss_fn=loss,
                clip_min=0.0,
                clip_max=1.0,
                y=tf.constant(labels[i : i + BATCH]),
                rand_init=noise is not None,
                rand_minmax=noise,
            ).numpy()
            for i in range(0, len(x), BATCH)
        ]
        return accuracy(np.concatenate(parts))

    def art_pgd(restarts: int) -> float:
        attack = ProjectedGradientDescentTensorFlowV2(
            wrapped,
            eps=EPS,
            eps_step=STEP,
            max_iter=ITERATIONS,
            num_random_init=restarts,
            batch_size=BATCH,
            verbose=False,
        )
        return accuracy(attack.generate(x, y))

    def art_square(eps: float, queries: int) -> float:
        attack = SquareAttack(
            wrapped, eps=eps, max_iter=queries, p_init=0.8, batch_size=BATCH, verbose=False
        )
        return accuracy(attack.generate(x, y))

    clean = tf.nn.softmax(model.predict(x, verbose=0)).numpy()
    rows = []
    print(f"{target.dataset}, {len(x)} test images, clean accuracy {accuracy(x):.3f}")
    print("after attack: mean ± standard deviation over the seeds, and largest gap of the means")
    print(f"{'attack':38} {'seeds':>5} {'ours':>12} {'cleverhans':>12} {'ART':>12} {'gap':>6}")

    def compare(
        name: str,
        seeds: range,
        ours: Callable[..., attacks.AttackResult],
        theirs: dict[str, Callable[[], float]],
    ) -> None:
        found = {"ours": [float(ours(seed=seed).accuracy[-1]) for seed in seeds]}
        for library, attack in theirs.items():
            found[library] = []
            for seed in seeds:
                tf.random.set_seed(seed)
                np.random.seed(seed)
                found[library].append(attack())
        gap = max(abs(np.mean(found["ours"]) - np.mean(found[library])) for library in theirs)
        rows.append({"attack": name, **found, "gap": float(gap)})
        cells = [
            f"{np.mean(found[k]):.3f}±{np.std(found[k], ddof=1):.3f}" if k in found else "-"
            for k in ("ours", "cleverhans", "art")
        ]
        print(
            f"{name:38} {len(seeds):5} {cells[0]:>12} {cells[1]:>12} {cells[2]:>12} {gap:6.3f}",
            flush=True,
        )

    for start in (False, True):
        compare(
            f"PGD, 32/255, 16 steps, {'random' if start else 'no random'} start",
            GRADIENT_SEEDS,
            partial(attacks.pgd, model, x, y, iterations=ITERATIONS, random_start=start),
            {
                "cleverhans": partial(cleverhans, y, hard_loss, EPS if start else None),
                "art": partial(art_pgd, int(start)),
            },
        )
    compare(
        "TPGD, 32/255, 16 steps",
        GRADIENT_SEEDS,
        partial(attacks.tpgd, model, x, y, iterations=ITERATIONS),
        {"cleverhans": partial(cleverhans, clean, soft_loss, 0.001)},
    )
    for eps, queries in ((8, 100), (8, 1000), (32, 100)):
        compare(
            f"Square, {eps}/255, {queries} queries",
            SQUARE_SEEDS,
            partial(attacks.square, model, x, y, eps=eps / 255, iterations=queries),
            {"art": partial(art_square, eps / 255, queries)},
        )
    machine = environment()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    files.write_json(args.out, {"rows": rows, "images": len(x)} | machine)


if __name__ == "__main__":
    main()
