"""Trains a network with a Jacobian penalty, or without one, and exports it.

    python train.py                            # digits, LeNet, spectral penalty: no download
    python train.py --dataset fashion_mnist --regularizer none --epochs 3
    python train.py --sweep sweeps/quick.toml  # many runs: docs/sweeps.md

The same command goes on where it was interrupted. docs/training.md says what a run folder holds.
"""

if __name__ == "__main__":
    import tfjacreg_startup

    tfjacreg_startup.prepare()

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from tfjacreg import cli, datasets, networks, optional_packages, regularizers
from tfjacreg.printable import printable

with optional_packages.script_importing("experiments", "train.py"):
    from tfjacreg.experiments.config import SCHEDULES, RunConfig
    from tfjacreg.experiments.folder_reader import FolderReader
    from tfjacreg.experiments.run import run


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; only what was given is in the result."""
    default = RunConfig.of()
    parser = cli.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add(
        "--data-dir",
        type=cli.path,
        help="of tensorflow-datasets; its own default is ~/tensorflow_datasets",
    )
    add(
        "--out",
        type=cli.path,
        help="the folder; default: runs/<named after the settings or FILE>",
    )
    single = parser.add_argument_group("one run")
    add = single.add_argument
    names = ", ".join(datasets.NAMES)
    add(
        "--dataset",
        metavar="DATA",
        help=f"{names}, FILE.npz, a folder of class folders or tfds:NAME ({default.dataset})",
    )
    add(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="what images of a folder or of tfds:NAME are resized to",
    )
    names = ", ".join(networks.NAMES)
    add(
        "--network",
        metavar="NETWORK",
        help=f"{names}, FILE.keras or MODULE:FUNCTION ({default.network})",
    )
    add("--pretrained", action="store_true", help="keep the weights of FILE.keras as the start")
    add("--width", type=float, help="of vgg16 and resnet20; 1 is published")
    add(
        "--initialization",
        choices=networks.INITIALIZATIONS,
        help=f"whose initial weights lenet has ({default.initialization})",
    )
    methods = ("none", *regularizers.BY_NAME)
    add("--regularizer", choices=methods, help=f"({default.regularizer})")
    add("--factor", type=float, help=f"weight of the penalty ({default.factor})")
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
    add(
        "--whole-training-set",
        action="store_true",
        help="train on the validation split too; there are no validation figures then",
    )
    add("--seed", type=int, help=f"({default.seed})")
    add("--overwrite", action="store_true", help="throw away the run that is in --out")
    add("--wait", action="store_true", help="wait for a process that works in --out")
    many = parser.add_argument_group("many runs")
    add = many.add_argument
    add(
        "--sweep",
        metavar="FILE",
        type=cli.path,
        help="TOML that names the runs; goes with --out, --dataset, --network",
    )
    add("--storage", metavar="URL", help="postgresql://..., for workers on several machines")
    add("--retry-failed", action="store_true", help="try runs once more that failed before")
    args = parser.parse_args(argv)
    sweep, common = {"sweep", "storage", "retry_failed"}, {"data_dir", "out"}
    both = {"dataset", "network"}  # Beside --sweep they take the place of the file's.
    given = set(vars(args)) - common
    for name in sorted(given - sweep - both if "sweep" in given else given & sweep):
        option = f"--{name.replace('_', '-')}"
        if "sweep" in given:
            parser.error(f"{option} is not for --sweep: the file says what is run")
        parser.error(f"{option} needs --sweep FILE")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs one configuration or a sweep and prints what came of it."""
    settings = vars(parse(argv))
    if "sweep" in settings:
        out = settings.setdefault("out", _sweep_folder(**settings))
        stopped = f"Stopped. The same command goes on from the last finished epochs, kept in {out}."
        return cli.run("train.py", lambda: _sweep(**settings), stopped)
    stopped = "Stopped. The same command goes on from the last finished epoch"
    out = settings.get("out")
    stopped += f", kept in {out}." if out else ", kept in its folder."
    return cli.run("train.py", lambda: _one(**settings), stopped)


def _one(
    *, out: Path | None = None, overwrite: bool = False, wait: bool = False, **settings: Any
) -> int:
    config = RunConfig.of(**settings)
    out = out or config.default_folder()
    finished = FolderReader(out).finished and not overwrite
    verbose = 1 if sys.stdout.isatty() else 2
    metrics = run(config, out, overwrite=overwrite, wait=wait, verbose=verbose)
    if finished:
        print(printable(f"{out} has this run, finished; --overwrite repeats it."))
    print(f"\n{config.dataset}, {config.network}, {config.regularizer}, factor {config.factor:g}")
    for label, value in (
        ("test accuracy", f"{metrics['test_accuracy']:.4f}"),
        ("test loss", f"{metrics['test_loss']:.4f}"),
        ("mean exact sigma", f"{metrics['test_spectral_norm']:.4f}"),
        ("seconds per step", f"{metrics['step_seconds']:.5f}"),
    ):
        print(f"  {label:<17} {value:>8}")
    for name, accuracy in metrics.get("test_accuracy_by_class", {}).items():
        shown = "no image" if accuracy is None else f"{accuracy:.4f}"
        print(f"    {printable(name, limit=40):<15} {shown:>8}")
    print(printable(f"  in {out}"))
    return 0


def _sweep_folder(*, sweep: Path, dataset: str = "", network: str = "", **_: Any) -> Path:
    """Where a sweep goes if nothing else is said; data and networks given beside it are named."""
    given = (re.sub(r"\W+", "-", Path(name).stem).strip("-") for name in (dataset, network))
    return Path("runs") / "-".join(filter(None, (sweep.stem, *given)))


def _sweep(
    *,
    sweep: Path,
    out: Path,
    dataset: str | None = None,
    network: str | None = None,
    **options: Any,
) -> int:
    with optional_packages.importing("experiments", "A sweep"):
        # Optuna and matplotlib take a second, for sweeps only.
        from tfjacreg.experiments import stages
        from tfjacreg.experiments.sweep import Sweep

    plan = Sweep.load(sweep, dataset=dataset, network=network)
    outcome = stages.run(plan, out, **options)
    print(printable(f"\n{outcome}\n  in {outcome.report or out}"))
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
