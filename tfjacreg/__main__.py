"""Writes reports on sweeps; prepares data sets from their original files, without a network.

python -m tfjacreg report runs/paper_fashion_mnist [SWEEP ...] [--benchmarks DIR] [--out DIR]
python -m tfjacreg prepare fashion_mnist /usr/share/datasets/fashion-mnist [--data-dir DIR]
"""

import argparse
import sys

import tfjacreg_arguments
from tfjacreg import cli, datasets


def main(argv: list[str] | None = None) -> int:
    """Runs a command and prints where its result is."""
    arguments = tfjacreg_arguments.module(argv)
    command, stopped = {
        "report": (_report, "Stopped. Every file of the report is whole, as it was or new."),
        "prepare": (_prepare, "Stopped. What was there before is as it was."),
    }[arguments.command]

    def main() -> int:
        cli.say(command(arguments))
        return 0

    stopped += " The same command starts again."
    return cli.run("tfjacreg", main, lambda: stopped)


def _prepare(arguments: argparse.Namespace) -> str:
    folder = datasets.prepare(arguments.name, arguments.source_dir, arguments.data_dir)
    return f"{arguments.name} is in {folder}"


def _report(arguments: argparse.Namespace) -> str:
    # It needs matplotlib and others, which `prepare` does not need.
    from tfjacreg.experiments import report

    benchmarks = arguments.benchmarks
    if benchmarks and not benchmarks.is_dir():
        raise ValueError(f"--benchmarks must be a folder. Received: {benchmarks}.")
    out = arguments.out or arguments.sweeps[0] / "report"
    return str(report.write(arguments.sweeps, out, benchmarks=benchmarks).path)


if __name__ == "__main__":
    sys.exit(main())
