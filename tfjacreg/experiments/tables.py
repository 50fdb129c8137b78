"""Markdown tables of a sweep: Table 1, its cells, all cells, what is missing, the machines."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence

from scipy import stats

from tfjacreg.experiments import comparison, selection
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.selection import LABELS, CellResults, Statistic, SweepResults
from tfjacreg.experiments.sweep import SWEEP_FILE, Cell
from tfjacreg.printable import printable

# Table 1 of the paper: test accuracy in %, mean and standard deviation over five runs.
PAPER = {
    "cifar10": {
        "spectral": Statistic(90.20, 0.61, 5),
        "frobenius": Statistic(90.21, 0.69, 5),
        "spectral_bound": Statistic(89.37, 0.70, 5),
        "weight_decay": Statistic(89.94, 0.76, 5),
        "none": Statistic(88.59, 0.67, 5),
    },
    "kmnist": {
        "spectral": Statistic(96.61, 0.14, 5),
        "frobenius": Statistic(96.39, 0.08, 5),
        "spectral_bound": Statistic(95.72, 0.21, 5),
        "weight_decay": Statistic(93.38, 0.03, 5),
        "none": Statistic(94.36, 0.26, 5),
    },
    "fashion_mnist": {
        "spectral": Statistic(91.10, 0.06, 5),
        "frobenius": Statistic(91.00, 0.16, 5),
        "spectral_bound": Statistic(90.66, 0.26, 5),
        "weight_decay": Statistic(90.84, 0.30, 5),
        "none": Statistic(90.35, 0.28, 5),
    },
}
_PAPER_RUNS = {"vgg16": "VGG16, 100 epochs", "lenet": "LeNet, 50 epochs"}
_PAPER_NETWORKS = {"cifar10": "vgg16", "kmnist": "lenet", "fashion_mnist": "lenet"}

_OF_THE_PAPER = """\
- **Difference to the paper**: in percentage points, with the p of Welch's t test from the two
  means, standard deviations and numbers of repeats.
"""
_NOTES = """\
Test accuracy is in % on the test split, mean ± sample standard deviation (ddof = 1) over the
repeats of one cell of the grid.

- **Last epoch**: of the cell that has, among the cells of its method, {best} over its repeats after
  the last epoch. The validation split is held out of the training set. Only a cell whose repeats
  have all finished can be chosen. † marks a method without such a cell: the best of its incomplete
  cells is shown, over the repeats that it has.
{paper}- **Lowest validation loss**: of the same cell, at the epoch where each run has its lowest.
- **Chosen on the test split**: of the cell with the lowest mean of its runs' lowest test loss, at
  each run's epoch of lowest test loss.{reading} Choosing on the images that are then reported is
  optimistic.

Sigma is the exact spectral norm of the Jacobian, in logits per standardized pixel, averaged over
the test split after the last epoch. The time of a step is the mean over the repeats of each run's
median epoch; runs that shared a machine slowed each other down."""
_READING = """ The paper seems to have chosen
  so: its validation set is the official test set."""
DIFFERENCES = """\
Test accuracy of the first method after the last epoch, minus the accuracy of the second, in
percentage points. Runs with the same seed form a pair: they begin with the same weights and see the
images in the same order. p comes from a two-sided paired t test over the seeds, of this difference
alone: of twenty such tests between equal methods, one falls below 0.05 by chance. "All" is p times
the number of tests here (Bonferroni)."""
WHOLE_TRAINING_SET = """\
Runs on the whole training set have no validation loss to choose by. A method with one cell is shown
by this cell, after the last epoch; a method with several cells by its choice on the test split."""
ALL_CELLS = """\
Mean ± sample standard deviation over the repeats that there are. Values of the last epoch, and the
test accuracy at each run's epoch of lowest validation loss too. \\* marks the cells of Table 1."""


def notes(sweeps: Sequence[SweepResults]) -> str:
    """The meaning of the numbers in the tables."""
    published = any(map(paper, sweeps))
    by = {results.sweep.final.choose_by for results in sweeps if results.sweep.final}
    accuracy = "the highest mean validation accuracy"
    best = accuracy if by == {"val_accuracy"} else "the lowest mean validation loss"
    if len(by) > 1:
        best += f" (or {accuracy}, as its sweep file says)"
    return _NOTES.format(best=best, paper=_OF_THE_PAPER * published, reading=_READING * published)


def table_1(results: SweepResults) -> str:
    """Table 1: the accuracy of each method, beside the paper's if it has the data set."""
    published = paper(results)
    complete = [cell for cell in results.chosen.values() if cell.complete]
    best = max((cell.statistic("test_accuracy").mean for cell in complete), default=math.nan)
    rows = []
    for method, cells in results.methods.items():
        cell = results.chosen.get(method)
        by_test = selection.choose(cells, *selection.LOWEST_TEST_LOSS)
        row = [LABELS[method], "no finished run", "", "", ""]
        if cell:
            last = cell.statistic("test_accuracy")
            bold = "**" if last.mean == best else ""
            row[:3] = [
                LABELS[method] + _dagger(cell),
                f"{bold}{percent(last)}{bold}",
                _repeats(cell),
            ]
            row[3] = _at_lowest_validation_loss(results, cell)
        elif by_test:
            row[1] = "no validation loss to choose by"
        if by_test:
            accuracy = by_test.statistic("lowest_test_loss", "test_accuracy")
            row[4] = percent(accuracy) + _dagger(by_test)
        if published:
            row[3:3] = [number(published[method], 2), _from_paper(cell, published[method])]
        rows.append(row)
    head = ["Method", "Last epoch", "Repeats", "Lowest validation loss", "Chosen on the test split"]
    if published:
        head[3:3] = ["Paper", "Difference to the paper"]
    return table(head, rows)


def paper(results: SweepResults) -> dict[str, Statistic]:
    """The paper's accuracies by method, if it has the data set with the network."""
    config = results.sweep.any_config
    same = _PAPER_NETWORKS.get(config.dataset) == config.network
    return PAPER[config.dataset] if same else {}


def differences(results: SweepResults) -> str:
    """The differences of the methods of Table 1, seed by seed; empty if no two share two seeds."""
    found = []
    for (first, one), (second, other) in itertools.combinations(results.chosen.items(), 2):
        difference = comparison.paired(*map(comparison.accuracies, (one, other)))
        if difference:
            found.append((f"{LABELS[first]} - {LABELS[second]}", *difference))
    rows = [
        [name, str(less.repeats), signed(less), p_value(p), p_value(min(len(found) * p, 1.0))]
        for name, less, p in found
    ]
    return table(["Difference", "Seeds", "Mean", "p", "All"], rows) if rows else ""


def _from_paper(cell: CellResults | None, paper: Statistic) -> str:
    """The difference to a published mean, with the p of Welch's t test."""
    if cell is None:
        return ""
    ours = cell.statistic("test_accuracy")
    difference = f"{100 * ours.mean - paper.mean:+.2f}"
    if not ours.std > 0:
        return difference
    p = stats.ttest_ind_from_stats(
        *(100 * ours.mean, 100 * ours.std, ours.repeats), *paper, equal_var=False
    ).pvalue
    return f"{difference} (p {p_value(float(p))})"


def setting(results: SweepResults) -> str:
    """What the sweep trains, how much is done, and what the paper trained."""
    config = results.sweep.any_config
    network = config.network
    if network != "lenet":
        network += f", width {config.width:g}"
    if config.initialization != "keras":
        network += f", {config.initialization} initial weights"
    split = ", the whole training set" if config.whole_training_set else ""
    sentence = (
        f"{network}, {config.epochs} epochs, {config.schedule} learning rate{split}, "
        f"{len(results.sweep.cells)} cells, planned repeats of each: {results.sweep.repeats}; "
        f"{len(results.finished)} of {len(results.runs)} runs have finished. The plan is in "
        f"{code(str(results.folder / SWEEP_FILE))}."
    )
    if paper(results):
        sentence += f" The paper: {_PAPER_RUNS[config.network]}, 5 repeats."
    return sentence


def chosen_cells(results: SweepResults) -> str:
    """The chosen cells of Table 1, the number of cells, and their loss, sigma and time."""
    rows = []
    for method, cell in results.chosen.items():
        cells = results.methods[method]
        complete = sum(other.complete for other in cells)
        by_test = selection.choose(cells, *selection.LOWEST_TEST_LOSS) or cell
        rows.append(
            [
                LABELS[method] + _dagger(cell),
                _name(cell.cell),
                f"{complete} of {len(cells)}",
                _validation_loss(results, cell),
                number(cell.statistic("test_spectral_norm"), 3),
                milliseconds(cell),
                "the same" if by_test is cell else _name(by_test.cell),
            ]
        )
    head = ["Method", "Cell", "Complete cells", "Validation loss", "Mean exact sigma"]
    head += ["Milliseconds per step", "On the test split"]
    return table(head, rows)


def missing(results: SweepResults) -> list[str]:
    """The missing repeats and why, how to make them, and runs that do not belong to the sweep."""
    lines = []
    for cells in results.methods.values():
        for cell in cells:
            if not cell.complete:
                seeds: dict[str, list[str]] = {}
                for run in cell.runs:
                    if run.problem:
                        seeds.setdefault(run.problem, []).append(str(run.config.seed))
                reasons = [f"{code(why)} (seed {', '.join(own)})" for why, own in seeds.items()]
                lines.append(
                    f"- {LABELS[cell.cell.method]}, {_name(cell.cell)}: {_repeats(cell)} repeats; "
                    f"{'; '.join(reasons)}"
                )
    blocks = []
    if lines:
        folder = str(results.folder)
        command = ["python", "train.py", "--sweep", f"{folder}/{SWEEP_FILE}", "--out", folder]
        command += ["--retry-failed"] * any(run.failed for run in results.runs)
        blocks = [
            f"**{len(lines)} of {len(results.sweep.cells)} cells are incomplete.** This command "
            "goes on with them:",
            fence(shlex.join(command)),
            "\n".join(lines),
        ]
    planned = {run.folder.path for run in results.runs}
    foreign = [f.path.name for f in FolderReader.all_in(results.folder) if f.path not in planned]
    if foreign:
        blocks.append(
            f"Left out, because `{SWEEP_FILE}` does not name them: {', '.join(map(code, foreign))}."
        )
    return blocks


def all_cells(results: SweepResults) -> str:
    """Every cell of the sweep, with the number of its finished repeats."""
    head = ["Method", "Cell", "Repeats", "Validation loss", "Test accuracy in %"]
    head += ["At lowest validation loss", "Mean exact sigma", "Milliseconds per step"]
    rows = []
    for method, cells in results.methods.items():
        for cell in cells:
            row = [LABELS[method], _name(cell.cell), _repeats(cell)]
            if cell.finished:
                row += [
                    _validation_loss(results, cell),
                    percent(cell.statistic("test_accuracy")),
                    _at_lowest_validation_loss(results, cell),
                    number(cell.statistic("test_spectral_norm"), 3),
                    milliseconds(cell),
                ]
            if cell is results.chosen.get(method):
                row[0] += " \\*"
            rows.append(row + [""] * (len(head) - len(row)))
    return table(head, rows)


def machines(results: SweepResults) -> str:
    """The number of runs for each set of versions and hardware, and their hours."""
    counts = Counter(json.dumps(run.environment, sort_keys=True) for run in results.finished)
    found = [(json.loads(text), count) for text, count in counts.most_common()]
    machines = [
        f"- {count} run{'s' * (count != 1)}: "
        + "; ".join(f"{plain(name)} {plain(str(value))}" for name, value in machine.items())
        for machine, count in found
        if machine
    ]
    # Runs of version 0.1.0 did not record it.
    timed = [run.metrics for run in results.finished if "training_seconds" in run.metrics]
    hours = sum(metrics["training_seconds"] for metrics in timed) / 3600
    sentence = f"{plain(results.label)}: {len(results.finished)} finished runs"
    if timed or not results.finished:
        sentence += (
            f", {hours:.1f} hours of training steps (without the evaluation after each epoch)"
        )
    if len(timed) < len(results.finished):
        sentence += f"; {len(results.finished) - len(timed)} of them did not record their hours"
    return "\n\n".join([f"{sentence}.", "\n".join(machines)]).rstrip()


def fence(text: str) -> str:
    """A block of text in which spaces and line breaks stay."""
    text, marks = printable(text), "```"
    while marks in text:
        marks += "`"
    return f"{marks}\n{text}\n{marks}"


def code(text: str) -> str:
    """Text within a line, shown as it is."""
    return "`" + printable(" ".join(text.replace("`", "'").split())) + "`"


def plain(text: str) -> str:
    """Text within a line that may come from anywhere: none of it is Markdown."""
    # An underscore inside a word is not Markdown; `_table` takes care of vertical bars.
    special = r"[\\`*\[\]<>&!~#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=:)//|(?<=www)\."
    return re.sub(special, _escaped, printable(" ".join(text.split())))


def _escaped(match: re.Match[str]) -> str:
    return "".join(f"\\{character}" for character in match[0])


def _name(cell: Cell) -> str:
    factor = "" if cell.factor is None else f"factor {cell.factor:g}, "
    return f"{factor}rate {cell.learning_rate:g}, batch {cell.batch_size}"


def _repeats(cell: CellResults) -> str:
    return f"{len(cell.finished)} of {len(cell.runs)}"


def _dagger(cell: CellResults) -> str:
    return "" if cell.complete else " †"


def number(statistic: Statistic, digits: int) -> str:
    """The mean, and the standard deviation if there are several values."""
    mean = f"{statistic.mean:.{digits}f}"
    return mean if statistic.repeats == 1 else f"{mean} ± {statistic.std:.{digits}f}"


def signed(statistic: Statistic) -> str:
    """A difference, with its sign and spread."""
    return f"{statistic.mean:+.2f} ± {statistic.std:.2f}"


def p_value(value: float) -> str:
    """A probability; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:.3f}" if value >= 0.001 else "< 0.001"


def percent(statistic: Statistic) -> str:
    """A share in percent, mean and spread."""
    return number(Statistic(100 * statistic.mean, 100 * statistic.std, statistic.repeats), 2)


def _validation_loss(results: SweepResults, cell: CellResults) -> str:
    return number(cell.statistic("val_loss"), 4) if results.validated else ""


def _at_lowest_validation_loss(results: SweepResults, cell: CellResults) -> str:
    if not results.validated:
        return ""
    return percent(cell.statistic("lowest_val_loss", "test_accuracy"))


def milliseconds(cell: CellResults) -> str:
    """The time of a training step."""
    return f"{1e3 * cell.statistic('step_seconds').mean:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, without the columns that are empty in all rows."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    cells = [[row[i].replace("|", "\\|") for i in kept] for row in (head, *rows)]
    cells[1:1] = [["---"] * len(kept)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
