"""Trains a network with a Jacobian penalty, or without one, and exports it.

    python train.py                            # digits, LeNet, spectral penalty: no download
    python train.py --dataset fashion_mnist --regularizer none --epochs 3

The same command goes on where it was interrupted. What a run folder holds is in README.md.
"""

import argparse
import os
import sys
from pathlib import Path

# Before TensorFlow is imported: it leaves oneDNN off on some processors, at a third of the speed.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from tfjacreg import datasets, networks, regularizers  # noqa: E402
from tfjacreg.experiment import SCHEDULES, RunConfig, RunError, run  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    default = RunConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", default=default.dataset, choices=datasets.NAMES)
    add("--network", default=default.network, choices=networks.NAMES)
    add("--width", type=float, default=default.width, help="of vgg16 and resnet20; 1 is published")
    methods = ("none", *regularizers.NAMES)
    add("--regularizer", default=default.regularizer, choices=methods)
    add("--factor", type=float, default=default.factor, help="weight of the penalty (%(default)s)")
    add("--epochs", type=int, help="lenet: 50; others: 100")
    add("--batch-size", type=int, help="lenet: 32; others: 128")
    add("--learning-rate", type=float, help="of SGD with momentum 0.8; lenet: 0.01; others: 0.1")
    add(
        "--schedule",
        choices=SCHEDULES,
        help="of the rate; lenet: constant; others: cosine",
    )
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="random crops and flips; the default is only for cifar10",
    )
    add("--seed", type=int, default=default.seed, help="(%(default)s)")
    add("--data-dir", help="of tensorflow-datasets; its own default is ~/tensorflow_datasets")
    add("--out", type=Path, help="the run folder; default: runs/<named after the settings>")
    add("--overwrite", action="store_true", help="throw away the run that --out holds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs one configuration and prints what came of it."""
    settings = vars(parse(argv))
    out, overwrite = settings.pop("out"), settings.pop("overwrite")
    try:
        config = RunConfig(**settings)
        out = out or config.default_folder()
        finished = (out / "metrics.json").exists() and not overwrite
        metrics = run(config, out, overwrite=overwrite, verbose=1 if sys.stdout.isatty() else 2)
    except (RunError, ValueError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nStopped. The same command goes on from the last finished epoch, kept in {out}.")
        return 130
    if finished:
        print(f"{out} holds this run, finished; --overwrite repeats it.")
    print(f"\n{config.dataset}, {config.network}, {config.regularizer}, factor {config.factor:g}")
    for label, value in (
        ("test accuracy", f"{metrics['test_accuracy']:.4f}"),
        ("test loss", f"{metrics['test_loss']:.4f}"),
        ("mean exact sigma", f"{metrics['test_spectral_norm']:.4f}"),
        ("seconds per step", f"{metrics['step_seconds']:.5f}"),
    ):
        print(f"  {label:<17} {value:>8}")
    print(f"  in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
