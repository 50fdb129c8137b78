"""Prepares a data set out of its original files, without a network; reports on sweeps.

python -m tfjacreg prepare fashion_mnist /usr/share/datasets/fashion-mnist [--data-dir DIR]
python -m tfjacreg report runs/paper_fashion_mnist [SWEEP ...] [--benchmarks DIR] [--out DIR]
"""

import argparse
import sys

from tfjacreg import cli, datasets
from tfjacreg.printable import printable


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `run` in the result is the command."""
    parser = cli.Parser(
        prog="python -m tfjacreg",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    prepare = commands.add_parser("prepare", help="make a data set out of its original files")
    prepare.set_defaults(run=_prepare)
    prepare.add_argument("name", choices=datasets.DOWNLOADED)
    prepare.add_argument("source_dir", type=cli.path, help="where the original files are")
    prepare.add_argument("--data-dir", type=cli.path, help="default: ~/tensorflow_datasets")
    report = commands.add_parser("report", help="compare the methods of finished or running sweeps")
    report.set_defaults(run=_report)
    report.add_argument(
        "sweeps", nargs="+", type=cli.path, metavar="SWEEP", help="folder of a sweep"
    )
    report.add_argument(
        "--benchmarks",
        type=cli.path,
        metavar="DIR",
        help="folder of the benchmarks' JSON files, for Figure 5 (left out)",
    )
    report.add_argument(
        "--out",
        type=cli.path,
        metavar="DIR",
        help="folder of the report (report, in the first SWEEP)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs a command and says where its result is."""
    arguments = parse(argv)

    def main() -> int:
        print(printable(arguments.run(arguments)))
        return 0

    return cli.run("tfjacreg", main, "Stopped. What was there before is as it was.")


def _prepare(arguments: argparse.Namespace) -> str:
    folder = datasets.prepare(arguments.name, arguments.source_dir, arguments.data_dir)
    return f"{arguments.name} is in {folder}"


def _report(arguments: argparse.Namespace) -> str:
    # matplotlib and others, which `prepare` has no need of.
    from tfjacreg.experiments import report

    benchmarks = arguments.benchmarks
    if benchmarks and not benchmarks.is_dir():
        raise ValueError(f"--benchmarks must be a folder. Received: {benchmarks}.")
    out = arguments.out or arguments.sweeps[0] / "report"
    return str(report.write(arguments.sweeps, out, benchmarks=benchmarks).path)


if __name__ == "__main__":
    sys.exit(main())
