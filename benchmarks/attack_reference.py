"""Compares the attacks with cleverhans and ART on one classifier: accuracy after the attack.

python benchmarks/attack_reference.py runs/none --out docs/attack_reference.json
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import numpy as np
import tensorflow as tf
from attack_speed import hardware
from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent

from tfjacreg import attacks, datasets, evaluation

with warnings.catch_warnings():
    # ART warns of the frameworks that are not installed.
    warnings.simplefilter("ignore")
    from art.attacks.evasion import ProjectedGradientDescentTensorFlowV2, SquareAttack
    from art.estimators.classification import TensorFlowV2Classifier

EPS, STEP, ITERATIONS, BATCH = 32 / 255, 2 / 255, 16, 250


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

    tf.random.set_seed(0)
    np.random.seed(0)
    clean = tf.nn.softmax(model.predict(x, verbose=0)).numpy()
    rows = []
    print(
        f"{target.dataset}, {len(x)} test images, clean accuracy {accuracy(x):.3f}; after attack:"
    )
    print(f"{'attack':38} {'ours':>6} {'cleverhans':>10} {'ART':>6} {'largest gap':>11}")

    def compare(name: str, ours: float, ch: float | None, art: float | None) -> None:
        gap = max(abs(ours - other) for other in (ch, art) if other is not None)
        rows.append({"attack": name, "ours": ours, "cleverhans": ch, "art": art, "gap": gap})
        cells = ["-" if a is None else f"{a:.3f}" for a in (ours, ch, art)]
        print(f"{name:38} {cells[0]:>6} {cells[1]:>10} {cells[2]:>6} {gap:11.3f}")

    for start in (False, True):
        ours = attacks.pgd(model, x, y, iterations=ITERATIONS, random_start=start)
        compare(
            f"PGD, 32/255, 16 steps, {'random' if start else 'no random'} start",
            ours.accuracy[-1],
            cleverhans(y, hard_loss, EPS if start else None),
            art_pgd(int(start)),
        )
    ours = attacks.tpgd(model, x, y, iterations=ITERATIONS)
    compare("TPGD, 32/255, 16 steps", ours.accuracy[-1], cleverhans(clean, soft_loss, 0.001), None)
    for eps, queries in ((8, 100), (8, 1000), (32, 100)):
        ours = attacks.square(model, x, y, eps=eps / 255, iterations=queries)
        theirs = art_square(eps / 255, queries)
        compare(f"Square, {eps}/255, {queries} queries", ours.accuracy[-1], None, theirs)
    evaluation.write_json(
        args.out,
        {"rows": rows, "images": len(x), "hardware": hardware()} | evaluation.environment(),
    )


if __name__ == "__main__":
    main()
