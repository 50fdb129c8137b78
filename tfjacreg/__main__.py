"""Prepares a data set out of its original files, without a network.

python -m tfjacreg prepare fashion_mnist /usr/share/datasets/fashion-mnist [--data-dir DIR]
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from tfjacreg import datasets
from tfjacreg.extras import MissingExtraError


def main(argv: list[str] | None = None) -> int:
    """Prepares a data set and says where it is."""
    parser = argparse.ArgumentParser(prog="python -m tfjacreg", description=__doc__)
    commands = parser.add_subparsers(required=True)
    prepare = commands.add_parser("prepare", help="make a data set out of its original files")
    prepare.add_argument("name", choices=datasets.DOWNLOADED)
    prepare.add_argument("source_dir", help="where the original files are")
    prepare.add_argument("--data-dir", help="default: ~/tensorflow_datasets")
    arguments = parser.parse_args(argv)
    try:
        folder = datasets.prepare(arguments.name, arguments.source_dir, arguments.data_dir)
    except (ValueError, OSError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.name} is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
