"""The command lines of train.py, evaluate.py and `python -m tfjacreg`.

This module is not in the package `tfjacreg`, whose import takes seconds: `--help` and mistakes are
answered before it. Names from the library are repeated here; `tests/test_arguments.py` checks that
they agree.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import tfjacreg_startup
from tfjacreg_startup import printable

DOWNLOADED = ("fashion_mnist", "kmnist", "cifar10")
DATASETS = ("digits", *DOWNLOADED)
NETWORKS = ("lenet", "vgg16", "resnet20")
INITIALIZATIONS = ("keras", "pytorch")
METHODS = ("none", "spectral", "frobenius", "spectral_bound", "weight_decay")
SCHEDULES = ("constant", "cosine")
PERTURBATIONS = ("noise", "pgd", "pgd_margin", "tpgd", "square")
# The defaults of train.py.
DEFAULTS = {
    "dataset": "digits",
    "network": "lenet",
    "initialization": "keras",
    "regularizer": "spectral",
    "factor": 0.01,
    "seed": 0,
}

_DATA = f"{', '.join(DATASETS)}, FILE.npz, a folder of class folders or tfds:NAME"
_SIZE = "resize the images of a folder or of tfds:NAME to this size"
_DATA_DIR = "folder of tensorflow-datasets (default: ~/tensorflow_datasets)"


class Parser(argparse.ArgumentParser):
    """A parser that keeps the line breaks of its help, and passwords out of its messages."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Prints what is wrong with the command line, and ends with status 2."""
        super().error(printable(tfjacreg_startup.hide_arguments(message)))


def path(text: str) -> Path:
    """The type of an option that names a file or folder, which TensorFlow must be able to name."""
    if not text:  # From a shell variable that is not set, for example.
        raise argparse.ArgumentTypeError("must be a path. Received: an empty one.")
    if "://" in text and tfjacreg_startup.redacted(text) != text:
        raise argparse.ArgumentTypeError("must be a path. Received: a URL with a password.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(
            f"must be a path in UTF-8, which TensorFlow needs. Received: {text!r}. Rename it."
        ) from error
    return Path(text)


def train(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line of train.py; the result has only the options that were given.

    Args:
        description: The beginning of the help.
        argv: The arguments; None for those of this process.
    """
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--data-dir", metavar="DIR", type=path, help=_DATA_DIR)
    add(
        "--out",
        metavar="DIR",
        type=path,
        help="folder of the results (default: one in runs/, named after the settings or the FILE)",
    )
    single = parser.add_argument_group("one run")
    add = single.add_argument
    add("--dataset", metavar="DATA", help=f"{_DATA} {_default('dataset')}")
    add("--image-size", metavar=("H", "W"), type=int, nargs=2, help=_SIZE)
    add(
        "--network",
        metavar="NETWORK",
        help=f"{', '.join(NETWORKS)}, FILE.keras or MODULE:FUNCTION {_default('network')}",
    )
    add(
        "--pretrained",
        action="store_true",
        help="start from the weights in FILE.keras (default: from new ones)",
    )
    add("--width", metavar="F", type=float, help="width of vgg16 and resnet20 (default: 1)")
    add(
        "--initialization",
        metavar="NAME",
        choices=INITIALIZATIONS,
        help=f"initial weights of lenet: {_listed(INITIALIZATIONS)} {_default('initialization')}",
    )
    add(
        "--regularizer",
        metavar="NAME",
        choices=METHODS,
        help=f"penalty: {_listed(METHODS)} {_default('regularizer')}",
    )
    add("--factor", metavar="F", type=float, help=f"factor of the penalty {_default('factor')}")
    add(
        "--epochs",
        metavar="N",
        type=int,
        help="passes over the training images (default: 50; for vgg16 and resnet20 100)",
    )
    add(
        "--batch-size",
        metavar="N",
        type=int,
        help="images in a step (default: 32; for vgg16 and resnet20 128)",
    )
    add(
        "--learning-rate",
        metavar="F",
        type=float,
        help="learning rate of SGD with momentum 0.8 (default: 0.01; for vgg16 and resnet20 0.1)",
    )
    add(
        "--schedule",
        metavar="NAME",
        choices=SCHEDULES,
        help="learning rate over the run: constant, or cosine, which falls to 0 (default: "
        "constant; for vgg16 and resnet20 cosine)",
    )
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="crop and flip the training images at random (default: for cifar10 only)",
    )
    add(
        "--whole-training-set",
        action="store_true",
        help="train on the validation images too; then there are no validation figures",
    )
    add(
        "--seed",
        metavar="N",
        type=int,
        help="seed of the initial weights, the order of the images and the random vectors "
        f"{_default('seed')}",
    )
    add("--overwrite", action="store_true", help="throw away the run that is in the folder")
    add("--wait", action="store_true", help="wait while another process works in the folder")
    many = parser.add_argument_group("many runs")
    add = many.add_argument
    add(
        "--sweep",
        metavar="FILE",
        type=path,
        help="TOML file that says what to run; --dataset and --network replace those in it",
    )
    add(
        "--storage",
        metavar="URL",
        help="postgresql://USER@HOST/NAME, through which workers on several machines share a sweep",
    )
    add("--retry-failed", action="store_true", help="try failed runs once more")
    arguments = parser.parse_args(argv)
    sweep, common = {"sweep", "storage", "retry_failed"}, {"data_dir", "out"}
    both = {"dataset", "network"}  # With --sweep they replace those in the file.
    given = set(vars(arguments)) - common
    for name in sorted(given - sweep - both if "sweep" in given else given & sweep):
        option = f"--{name.replace('_', '-')}"
        if "sweep" in given:
            parser.error(f"{option} is not for --sweep: the file says what is run")
        parser.error(f"{option} needs --sweep FILE")
    return arguments


def evaluate(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line of evaluate.py.

    Args:
        description: The beginning of the help.
        argv: The arguments; None for those of this process.
    """
    parser = Parser(description=description)
    add = parser.add_argument
    add("runs", nargs="+", type=path, metavar="RUN", help="run folder or .keras file")
    add(
        "--out",
        metavar="DIR",
        type=path,
        default=Path("out"),
        help="folder of the figures, and of what is measured on .keras files (default: out)",
    )
    add("--overwrite", action="store_true", help="measure anew what has been measured before")
    add("--wait", action="store_true", help="wait while another process works in a run folder")
    what = parser.add_argument_group("what to measure")
    add = what.add_argument
    add(
        "--attacks",
        nargs="*",
        metavar="NAME",
        choices=PERTURBATIONS,
        default=list(PERTURBATIONS),
        help=f"{_listed(PERTURBATIONS)}: accuracy under each, by its strength (default: all of "
        "them; no NAME: none)",
    )
    add(
        "--boundary",
        action="store_true",
        help="distance to the decision boundary along random directions",
    )
    add("--distance", action="store_true", help="distance to the nearest adversarial image found")
    add(
        "--sigma",
        action="store_true",
        help="sigma, the exact spectral norm of the Jacobian, at each image",
    )
    add("--limit", metavar="N", type=_count, help="only on the first N test images")
    add("--seed", metavar="N", type=_seed, default=0, help="seed of noise and attacks (default: 0)")
    add(
        "--adversarial-examples",
        metavar="N",
        type=_count,
        help="draw N images before and after PGD, in each run folder",
    )
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--data-dir", metavar="DIR", type=path, help=_DATA_DIR)
    add("--dataset", metavar="DATA", help=f"data set of .keras files: {_DATA}")
    add("--image-size", metavar=("H", "W"), type=_count, nargs=2, help=_SIZE)
    add(
        "--pixels",
        metavar="LOW..HIGH",
        help="scale of the pixels that .keras files take, such as 0..255 or -1..1 (default: 0..1)",
    )
    add(
        "--mean",
        metavar="F",
        type=float,
        nargs="+",
        default=(),
        help="what .keras files want subtracted from the pixels, one number or one for each "
        "channel, on the scale of --pixels",
    )
    add(
        "--std",
        metavar="F",
        type=float,
        nargs="+",
        default=(),
        help="what they want the difference divided by",
    )
    return parser.parse_args(_ranges_joined(sys.argv[1:] if argv is None else argv))


def _ranges_joined(argv: list[str]) -> list[str]:
    """Joins --pixels and a range below 0 with a =, or argparse would take that for an option."""
    joined: list[str] = []
    for word in argv:
        if re.match(r"-\d", word) and joined and re.fullmatch("--p[a-z]*", joined[-1]):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def module(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line of `python -m tfjacreg`; `command` in the result is its first word.

    Args:
        argv: The arguments; None for those of this process.
    """
    parser = Parser(
        prog="python -m tfjacreg",
        description="Reports on sweeps, and prepares data sets where there is no network.",
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    report = commands.add_parser(
        "report",
        help="compare the methods of finished or running sweeps",
        description="Compares the methods of finished or running sweeps in a page, report.html.\n\n"
        "    python -m tfjacreg report runs/quick",
    )
    report.add_argument("sweeps", nargs="+", type=path, metavar="SWEEP", help="folder of a sweep")
    report.add_argument(
        "--out",
        metavar="DIR",
        type=path,
        help="folder of the report (default: report, in the first SWEEP)",
    )
    report.add_argument(
        "--benchmarks",
        metavar="DIR",
        type=path,
        help="folder of the benchmarks' JSON files, for step times and the estimators' errors "
        "(default: these are left out)",
    )
    prepare = commands.add_parser(
        "prepare",
        help="make a data set from its original files",
        description="Makes a data set from its original files, the same as a download gives.\n\n"
        "    python -m tfjacreg prepare fashion_mnist /usr/share/datasets/fashion-mnist",
    )
    prepare.add_argument("name", metavar="NAME", choices=DOWNLOADED, help=_listed(DOWNLOADED))
    prepare.add_argument(
        "source_dir", metavar="FOLDER", type=path, help="folder of the original files"
    )
    prepare.add_argument("--data-dir", metavar="DIR", type=path, help=_DATA_DIR)
    return parser.parse_args(argv)


def _default(name: str) -> str:
    return f"(default: {DEFAULTS[name]})"


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _count(text: str) -> int:
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {value}.")
    return value


def _seed(text: str) -> int:
    value = _integer(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1. Received: {value}.")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be an integer. Received: {text!r}.") from error
