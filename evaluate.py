"""Judges trained classifiers against noise, attacks and the distance to the decision boundary.

python evaluate.py runs/none runs/spectral --boundary --limit 1000 --out out
python evaluate.py mine.keras --dataset fashion_mnist --attacks pgd square
python evaluate.py --report runs/paper_fashion_mnist

The last one writes the report of a sweep that train.py has made or is making.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

from tfjacreg import attacks, datasets, extras

with extras.script_importing("experiments", "evaluate.py"):
    from tfjacreg.experiments import evaluation, figures, report


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="*", default=[], metavar="RUN", help="run folder or .keras file"
    )
    parser.add_argument(
        "--attacks",
        nargs="*",
        choices=evaluation.PERTURBATIONS,
        default=list(evaluation.PERTURBATIONS),
        help="perturbations to try (default: all)",
    )
    parser.add_argument("--boundary", action="store_true", help="measure the boundary distance too")
    parser.add_argument("--limit", type=_count, help="judge on the first LIMIT test images only")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise and attacks (0)")
    parser.add_argument(
        "--out", type=Path, help="folder of the figures (out) or of the report (DIR/report)"
    )
    parser.add_argument("--dataset", help="data set of bare .keras files")
    parser.add_argument("--data-dir", help="folder of the data sets")
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
        "--report", type=Path, nargs="+", metavar="DIR", help="report on sweeps instead of judging"
    )
    parser.add_argument(
        "--benchmarks",
        type=Path,
        metavar="DIR",
        help="folder of the benchmarks' JSON files, for the report's Figure 5 (results)",
    )
    args = parser.parse_args(argv)
    if args.report:
        alone = ("report", "benchmarks", "out")
        given = [k for k, v in vars(args).items() if k not in alone and v != parser.get_default(k)]
        if given:
            parser.error(f"--report goes with --benchmarks and --out alone. Received: {given}")
    elif not args.runs:
        parser.error("name a RUN to judge, or --report DIR")
    elif args.benchmarks:
        parser.error("--benchmarks goes with --report alone")
    return args


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {value}.")
    return value


def write_report(args: argparse.Namespace) -> None:
    """Writes the report of the sweeps given."""
    if args.benchmarks and not args.benchmarks.is_dir():
        raise ValueError(f"--benchmarks must be a folder. Received: {args.benchmarks}.")
    out = args.out or args.report[0] / "report"
    print(report.write(args.report, out, benchmarks=args.benchmarks or Path("results")))


def run(args: argparse.Namespace) -> None:
    """Judges every run given, then prints the tables and draws the figures."""
    out = args.out or Path("out")
    targets = evaluation.find_targets(
        args.runs, dataset=args.dataset, data_dir=args.data_dir, out=out
    )
    tests = {
        key: datasets.load(*key).test
        for key in dict.fromkeys((t.dataset, t.data_dir) for t in targets)
    }
    judged = []
    for target in targets:
        test = tests[target.dataset, target.data_dir]
        x, y = test.x[: args.limit], test.y[: args.limit]
        result = evaluation.evaluate(
            target,
            x,
            y,
            perturbations=args.attacks,
            boundary=args.boundary,
            seed=args.seed,
            overwrite=args.overwrite,
        )
        judged.append(figures.Evaluation(target.dataset, target.method, result))
        if args.adversarial_examples:
            examples = evaluation.adversarial_examples(
                target, x, y, args.adversarial_examples, seed=args.seed
            )
            title = f"{target.method}, {target.dataset}: PGD, eps {attacks.EPS * 255:g}/255"
            path = target.folder / "adversarial_examples.png"
            figures.adversarial_figure(*examples, title, path)
    if args.attacks:
        print(figures.robustness_table(judged, args.attacks), end="\n\n")
        figures.robustness_figure(judged, args.attacks, out / "robustness.png")
    if args.boundary:
        print(figures.boundary_table(judged))
        figures.boundary_figure(judged, out / "boundary.png")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    args = parse(argv)
    try:
        write_report(args) if args.report else run(args)
    except (ValueError, OSError, extras.MissingExtraError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on after the last finished measurement.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
