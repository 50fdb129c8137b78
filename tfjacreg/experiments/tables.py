"""Markdown tables of a sweep: Table 1, its cells, all cells, what is missing, the machines."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter

from tfjacreg import datasets
from tfjacreg.experiments import selection
from tfjacreg.experiments.selection import LABELS, CellRuns, Run, Section, Statistic
from tfjacreg.experiments.sweep import Cell

# Table 1 of the paper: test accuracy in %, mean and standard deviation over five runs.
PAPER = {
    "cifar10": {
        "spectral": (90.20, 0.61),
        "frobenius": (90.21, 0.69),
        "spectral_bound": (89.37, 0.70),
        "weight_decay": (89.94, 0.76),
        "none": (88.59, 0.67),
    },
    "kmnist": {
        "spectral": (96.61, 0.14),
        "frobenius": (96.39, 0.08),
        "spectral_bound": (95.72, 0.21),
        "weight_decay": (93.38, 0.03),
        "none": (94.36, 0.26),
    },
    "fashion_mnist": {
        "spectral": (91.10, 0.06),
        "frobenius": (91.00, 0.16),
        "spectral_bound": (90.66, 0.26),
        "weight_decay": (90.84, 0.30),
        "none": (90.35, 0.28),
    },
}
_PAPER_RUNS = {"cifar10": "VGG16, 100 epochs", "kmnist": "LeNet, 50 epochs"}
_PAPER_RUNS["fashion_mnist"] = _PAPER_RUNS["kmnist"]
# Published sizes of the training sets, the validation split included.
_TRAINING_IMAGES = {
    "digits": 1797 - datasets.DIGITS_TEST_SIZE,
    "fashion_mnist": 60_000,
    "kmnist": 60_000,
    "cifar10": 50_000,
}

TABLE_1 = """\
Test accuracy in % on the official test split, mean ± sample standard deviation (ddof = 1) over the
repeats of one cell of the grid.

- **Last epoch**: of the cell that has, among the cells of its method, the lowest mean over its
  repeats of the validation loss after the last epoch. The validation split is held out of the
  training set. Only a cell whose repeats have all finished can be chosen. † marks a method without
  such a cell: the best of its incomplete cells stands there, over the repeats that it has.
- **Lowest validation loss**: of the same cell, at each run's epoch of lowest validation loss.
- **Chosen on the test split**: of the cell with the lowest mean of its runs' lowest test loss, at
  each run's epoch of lowest test loss. The paper seems to have chosen so: its validation set is the
  official test set. A choice on the images that are then reported flatters.

Sigma is the exact spectral norm of the Jacobian, in logits per standardized pixel, averaged over
the test split after the last epoch. The time of a step is the mean over the repeats of each run's
median epoch; runs that shared a machine slowed each other down (Figure 5 is the measurement)."""
ALL_CELLS = """\
Values of the last epoch, mean ± sample standard deviation over the repeats that there are. \\*
marks the cells of Table 1."""


def table_1(section: Section) -> str:
    """Table 1: the accuracy of each method, beside the paper's where it has the data set."""
    paper = PAPER.get(section.dataset, {})
    complete = [cell for cell in section.chosen.values() if cell.complete]
    best = max((cell.statistic("test_accuracy").mean for cell in complete), default=math.nan)
    rows = []
    for method, cells in section.methods.items():
        cell = section.chosen.get(method)
        theirs = selection.choose(cells, selection.LOWEST_TEST_LOSS)
        row = [LABELS[method], "no finished run", "", "", ""]
        if cell and theirs:
            last = cell.statistic("test_accuracy")
            bold = "**" if last.mean == best else ""
            row = [
                LABELS[method] + _dagger(cell),
                f"{bold}{_percent(last)}{bold}",
                _repeats(cell),
                _percent(cell.statistic("lowest_val_loss", "test_accuracy")),
                _percent(theirs.statistic("lowest_test_loss", "test_accuracy")) + _dagger(theirs),
            ]
        if paper:
            mean, std = paper[method]
            row.insert(3, f"{mean:.2f} ± {std:.2f}")
        rows.append(row)
    head = ["Method", "Last epoch", "Repeats", "Lowest validation loss", "Chosen on the test split"]
    if paper:
        head.insert(3, "Paper")
    return _table(head, rows)


def setting(section: Section) -> str:
    """What the sweep trains, how much of it is done, and what the paper trained."""
    config = section.runs[0].config
    width = "" if config.network == "lenet" else f", width {config.width:g}"
    told = (
        f"{config.network}{width}, {config.epochs} epochs, {config.schedule} learning rate, "
        f"{len(section.sweep.cells)} cells, planned repeats of each: {section.sweep.repeats}; "
        f"{len(section.finished)} of {len(section.runs)} runs have finished. The plan is in "
        f"{code(str(section.folder / 'sweep.toml'))}."
    )
    paper = _PAPER_RUNS.get(section.dataset)
    return f"{told} The paper: {paper}, 5 repeats." if paper else told


def chosen_cells(section: Section) -> str:
    """The cells that Table 1 shows, out of how many, with their loss, sigma and time."""
    rows = []
    for method, cell in section.chosen.items():
        cells = section.methods[method]
        complete = sum(other.complete for other in cells)
        theirs = selection.choose(cells, selection.LOWEST_TEST_LOSS) or cell
        rows.append(
            [
                LABELS[method] + _dagger(cell),
                _name(cell.cell),
                f"{complete} of {len(cells)}",
                _number(cell.statistic("val_loss"), 4),
                _number(cell.statistic("test_spectral_norm"), 3),
                _milliseconds(cell),
                "the same" if theirs is cell else _name(theirs.cell),
            ]
        )
    head = ["Method", "Cell", "Complete cells", "Validation loss", "Mean exact sigma"]
    head += ["Milliseconds per step", "On the test split"]
    return _table(head, rows)


def missing(section: Section) -> list[str]:
    """Which repeats are missing and why, how to make them, and which runs are not the sweep's."""
    lines = []
    for cells in section.methods.values():
        for cell in cells:
            if not cell.complete:
                seeds: dict[str, list[str]] = {}
                for run in cell.runs:
                    if run.problem:
                        seeds.setdefault(run.problem, []).append(str(run.config.seed))
                told = [f"{code(why)} (seed {', '.join(those)})" for why, those in seeds.items()]
                lines.append(
                    f"- {LABELS[cell.cell.method]}, {_name(cell.cell)}: {_repeats(cell)} repeats; "
                    f"{'; '.join(told)}"
                )
    blocks = []
    if lines:
        folder = str(section.folder)
        command = ["python", "train.py", "--sweep", f"{folder}/sweep.toml", "--out", folder]
        command += ["--retry-failed"] * any(run.failed for run in section.runs)
        blocks = [
            f"**{len(lines)} of {len(section.sweep.cells)} cells are incomplete.** This command "
            "goes on with them:",
            fence(shlex.join(command)),
            "\n".join(lines),
        ]
    planned = {run.folder.name for run in section.runs}
    others = sorted(path.parent.name for path in section.folder.glob("*/config.json"))
    foreign = [name for name in others if name not in planned]
    if foreign:
        blocks.append(
            f"Left out, because `sweep.toml` does not name them: {', '.join(map(code, foreign))}."
        )
    return blocks


def all_cells(section: Section) -> str:
    """Every cell of the sweep, with how many of its repeats there are."""
    head = ["Method", "Cell", "Repeats", "Validation loss", "Test accuracy in %"]
    head += ["Mean exact sigma", "Milliseconds per step"]
    rows = []
    for method, cells in section.methods.items():
        for cell in cells:
            row = [LABELS[method], _name(cell.cell), _repeats(cell)]
            if cell.finished:
                row += [
                    _number(cell.statistic("val_loss"), 4),
                    _percent(cell.statistic("test_accuracy")),
                    _number(cell.statistic("test_spectral_norm"), 3),
                    _milliseconds(cell),
                ]
            if cell is section.chosen.get(method):
                row[0] += " \\*"
            rows.append(row + [""] * (len(head) - len(row)))
    return _table(head, rows)


def environment(section: Section) -> str:
    """How many runs were made with which versions on which hardware, and their hours."""
    counts = Counter(json.dumps(run.environment, sort_keys=True) for run in section.finished)
    machines = [(json.loads(text), count) for text, count in counts.most_common()]
    names = list(dict.fromkeys(name for machine, _ in machines for name in machine))
    rows = [
        [str(count), *(str(machine.get(name, "")) for name in names)] for machine, count in machines
    ]
    hours = sum(map(_seconds, section.finished)) / 3600
    told = (
        f"{section.label}: {len(section.finished)} finished runs, {hours:.1f} hours of training "
        "steps (without the evaluation after each epoch)."
    )
    return f"{told}\n\n{_table(['runs', *names], rows)}" if rows else told


def fence(text: str) -> str:
    """A block of text whose spaces and lines stay."""
    return f"```\n{text}\n```"


def code(text: str) -> str:
    """Text in a line, shown as it is."""
    return "`" + text.replace("`", "'") + "`"


def _seconds(run: Run) -> float:
    config = run.config
    images = _TRAINING_IMAGES[config.dataset] - datasets.VALIDATION_SIZES[config.dataset]
    return math.ceil(images / config.batch_size) * float(run.history["step_seconds"].sum())


def _name(cell: Cell) -> str:
    factor = "" if cell.factor is None else f"factor {cell.factor:g}, "
    return f"{factor}rate {cell.learning_rate:g}, batch {cell.batch_size}"


def _repeats(cell: CellRuns) -> str:
    return f"{len(cell.finished)} of {len(cell.runs)}"


def _dagger(cell: CellRuns) -> str:
    return "" if cell.complete else " †"


def _number(statistic: Statistic, digits: int) -> str:
    mean = f"{statistic.mean:.{digits}f}"
    return mean if statistic.repeats == 1 else f"{mean} ± {statistic.std:.{digits}f}"


def _percent(statistic: Statistic) -> str:
    return _number(Statistic(100 * statistic.mean, 100 * statistic.std, statistic.repeats), 2)


def _milliseconds(cell: CellRuns) -> str:
    return f"{1e3 * cell.statistic('step_seconds').mean:.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
