"""Judges trained classifiers against noise, attacks and the distance to the decision boundary.

python evaluate.py runs/none runs/spectral --boundary --distance --sigma --limit 1000 --out out
python evaluate.py mine.keras --dataset mine.npz --pixels 0..255 --attacks pgd square

`python -m tfjacreg report` writes the report of a whole sweep.
"""

from __future__ import annotations

if __name__ == "__main__":
    import tfjacreg_startup

    tfjacreg_startup.prepare()

import argparse
import sys
from pathlib import Path

from tfjacreg import cli, datasets, optional_packages
from tfjacreg.printable import printable

with optional_packages.script_importing("experiments", "evaluate.py"):
    from tfjacreg.experiments import data_sources, evaluation, measures
    from tfjacreg.experiments.classifier_files import Scale


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=cli.path, metavar="RUN", help="run folder or .keras file"
    )
    parser.add_argument(
        "--attacks",
        nargs="*",
        choices=measures.PERTURBATIONS,
        default=list(measures.PERTURBATIONS),
        help="perturbations to try (default: all)",
    )
    parser.add_argument(
        "--boundary",
        action="store_true",
        help="measure the distance to the boundary along random directions too",
    )
    parser.add_argument(
        "--distance",
        action="store_true",
        help="measure the distance to the nearest adversarial image found too",
    )
    parser.add_argument(
        "--sigma", action="store_true", help="measure the spectral norm at each image too"
    )
    parser.add_argument("--limit", type=_count, help="judge on the first LIMIT test images only")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of noise and attacks (0)")
    parser.add_argument(
        "--out", type=cli.path, default=Path("out"), help="folder of the figures (out)"
    )
    parser.add_argument(
        "--dataset",
        metavar="DATA",
        type=_data,
        help=f"of bare .keras files: {', '.join(datasets.NAMES)}, FILE.npz, a folder or tfds:NAME",
    )
    parser.add_argument(
        "--image-size",
        type=_count,
        nargs=2,
        metavar=("H", "W"),
        help="what images of a folder or of tfds:NAME are resized to",
    )
    parser.add_argument(
        "--pixels", metavar="LOW..HIGH", help="scale that bare .keras files take, such as 0..255"
    )
    parser.add_argument(
        "--mean",
        type=float,
        nargs="+",
        default=(),
        help="what bare .keras files want subtracted, on the scale of --pixels (0..1)",
    )
    parser.add_argument(
        "--std", type=float, nargs="+", default=(), help="what they want that divided by"
    )
    parser.add_argument("--data-dir", type=cli.path, help="folder of the data sets")
    parser.add_argument(
        "--adversarial-examples",
        type=_count,
        metavar="N",
        help="draw N images before and after PGD, beside each evaluation.json",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start afresh where there is an evaluation.json"
    )
    parser.add_argument(
        "--wait", action="store_true", help="wait for processes that work in the run folders"
    )
    return parser.parse_args(argv)


def _data(text: str) -> str:
    if not data_sources.is_valid(text):
        raise argparse.ArgumentTypeError(
            f"must be one of {datasets.NAMES}, FILE.npz, a folder that is there (./NAME) or "
            f"tfds:NAME. Received: {text}."
        )
    return text


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {value}.")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1. Received: {value}.")
    return value


def run(args: argparse.Namespace) -> None:
    """Judges every run given and prints the tables."""
    with evaluation.owned(args.runs, args.out, wait=args.wait):
        targets = evaluation.find_targets(
            args.runs,
            dataset=args.dataset,
            data_dir=args.data_dir,
            out=args.out,
            image_size=tuple(args.image_size) if args.image_size else None,
            scale=Scale.of(args.pixels, args.mean, args.std),
        )
        tables = evaluation.judge(
            targets,
            args.out,
            perturbations=args.attacks,
            pointwise=[name for name in measures.POINTWISE if getattr(args, name)],
            limit=args.limit,
            examples=args.adversarial_examples,
            seed=args.seed,
            overwrite=args.overwrite,
        )
    print(printable(tables))


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    args = parse(argv)

    def judge() -> int:
        run(args)
        return 0

    stopped = "Stopped. The same command goes on after the last finished measurement."
    return cli.run("evaluate.py", judge, stopped)


if __name__ == "__main__":
    sys.exit(main())
