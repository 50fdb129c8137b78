"""The runs of sweeps by cell, and the chosen cell of each method (appendix A.2)."""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tfjacreg.experiments.config import RunConfig
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.sweep import CHOICES, FINAL_FOLDER, SWEEP_FILE, Cell, Sweep

# The methods by name, in the order of the paper's Table 1.
LABELS = {
    "spectral": "Spectral",
    "frobenius": "Frobenius",
    "spectral_bound": "Spectral-Bound",
    "weight_decay": "Weight decay",
    "none": "None",
}
# Keys into metrics.json, for a choice on the test split itself.
LOWEST_TEST_LOSS = ("lowest_test_loss", "test_loss")


class Statistic(NamedTuple):
    """Mean and spread over the repeats of a cell.

    Attributes:
        mean: The mean.
        std: The sample standard deviation (ddof = 1); NaN for a single value.
        repeats: The number of values.
    """

    mean: float
    std: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        """Summarizes at least one value."""
        std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), std, len(values))


class RunResult(NamedTuple):
    """One planned run of a sweep.

    Attributes:
        folder: Its run folder.
        config: Its settings.
        problem: None if it has finished; otherwise why not.
        metrics: Content of `metrics.json`; empty unless finished.
        history: A row of figures per epoch; empty unless finished.
        environment: Versions and hardware; empty unless finished.
    """

    folder: FolderReader
    config: RunConfig
    problem: str | None
    metrics: dict[str, Any]
    history: list[dict[str, float]]
    environment: dict[str, Any]

    @property
    def failed(self) -> bool:
        """Whether it ended with an error."""
        return self.problem is not None and self.problem.startswith("failed")

    def curve(self, name: str) -> npt.NDArray[np.float64]:
        """A column of the history, `[epochs]`."""
        return np.array([row[name] for row in self.history])


class CellResults(NamedTuple):
    """The repeats of a cell.

    Attributes:
        cell: The cell.
        runs: All planned runs, by seed.
    """

    cell: Cell
    runs: tuple[RunResult, ...]

    @property
    def finished(self) -> list[RunResult]:
        """The runs that have finished."""
        return [run for run in self.runs if run.problem is None]

    @property
    def complete(self) -> bool:
        """Whether every planned run has finished."""
        return len(self.finished) == len(self.runs)

    def statistic(self, *keys: str) -> Statistic:
        """Mean and spread, over the finished runs, of a number in `metrics.json`."""
        values: list[Any] = [
            functools.reduce(operator.getitem, keys, run.metrics) for run in self.finished
        ]
        return Statistic.of(values)


class SweepResults(NamedTuple):
    """A sweep, and the chosen cell of each of its methods.

    Attributes:
        label: Its name in tables and figures.
        folder: Its folder.
        sweep: What was planned.
        methods: The cells of each method, in the order of `LABELS`.
        chosen: The chosen cell of each method that has a finished run. Runs on the whole training
            set have no validation loss to choose by: a method's only cell is then chosen, and a
            method with several cells has none.
    """

    label: str
    folder: Path
    sweep: Sweep
    methods: dict[str, list[CellResults]]
    chosen: dict[str, CellResults]

    @property
    def dataset(self) -> str:
        """The name of the data set."""
        return self.sweep.any_config.dataset

    @property
    def most_repeats(self) -> int:
        """The largest number of finished repeats of a chosen cell."""
        return max((len(cell.finished) for cell in self.chosen.values()), default=0)

    @property
    def validated(self) -> bool:
        """Whether its runs have a validation split."""
        return not self.sweep.any_config.whole_training_set

    @property
    def runs(self) -> list[RunResult]:
        """Every planned run."""
        return [run for cells in self.methods.values() for cell in cells for run in cell.runs]

    @property
    def finished(self) -> list[RunResult]:
        """The runs that have finished."""
        return [run for run in self.runs if run.problem is None]


def read(folders: Sequence[Path]) -> list[SweepResults]:
    """Reads sweeps and chooses a cell for each of their methods.

    Args:
        folders: Folders of sweeps, each with its `sweep.toml`.

    Returns:
        The results of each sweep, followed by those of its second stage if it has one. The label is
        the data set, with the folder if several sweeps have the same data set.

    Raises:
        ValueError: If a folder does not belong to a sweep or comes twice, or a run folder in it
            belongs to a run with other settings or has a damaged file; the message names the file.
    """
    folders = list(folders)
    named = Counter(folder.resolve() for folder in folders)
    for folder, count in named.items():
        if count > 1:
            raise ValueError(f"Every sweep must be named once. Received: {folder} {count} times.")
    for folder in folders:
        if not (folder / SWEEP_FILE).is_file():
            raise ValueError(
                f"A sweep's folder must hold {SWEEP_FILE}. Received: {folder}, which does not. "
                "`python train.py --sweep FILE --out DIR` makes such a folder."
            )
    sweeps = {}
    for folder in folders:
        sweeps[folder] = Sweep.load(folder / SWEEP_FILE)
        final = folder / FINAL_FOLDER
        begun = sweeps[folder].final and (final / SWEEP_FILE).is_file()
        if begun and final.resolve() not in named:
            sweeps[final] = Sweep.load(final / SWEEP_FILE)
    names = [sweep.any_config.dataset for sweep in sweeps.values()]
    return [
        _read_sweep(
            name if names.count(name) == 1 else f"{name}, {_short(folder, list(sweeps))}",
            folder,
            sweep,
        )
        for name, (folder, sweep) in zip(names, sweeps.items(), strict=True)
    ]


def _short(folder: Path, others: Sequence[Path]) -> str:
    """The shortest end of a path that no other path has."""
    for count in range(1, len(folder.parts)):
        end = folder.parts[-count:]
        if sum(other.parts[-count:] == end for other in others) == 1:
            return "/".join(end)
    return str(folder)


def leading(sweeps: Sequence[SweepResults]) -> list[SweepResults]:
    """For each data set and network, the sweep that answers which method is best.

    It is the one whose chosen cells have the most finished repeats, and the last of equals. The
    other sweeps only select: a comparison is worth no more than the number of its seeds.
    """
    answers: dict[tuple[str, str], SweepResults] = {}
    for results in sweeps:
        config = results.sweep.any_config
        before = answers.get((config.dataset, config.network))
        if before is None or results.most_repeats >= before.most_repeats:
            answers[config.dataset, config.network] = results
    return list(answers.values())


def _read_sweep(label: str, folder: Path, sweep: Sweep) -> SweepResults:
    cells = read_cells(folder, sweep)
    methods: dict[str, list[CellResults]] = {
        method: [cell for cell in cells if cell.cell.method == method]
        for method in LABELS
        if any(cell.cell.method == method for cell in cells)
    }
    chosen = {}
    for method, group in methods.items():
        if sweep.any_config.whole_training_set:
            cell = group[0] if len(group) == 1 and group[0].finished else None
        else:
            cell = choose(group, sweep.final.choose_by if sweep.final else CHOICES[0])
        if cell:
            chosen[method] = cell
    return SweepResults(label, folder, sweep, methods, chosen)


def read_cells(folder: Path, sweep: Sweep) -> list[CellResults]:
    """Reads the runs of a sweep, finished or not.

    Args:
        folder: The sweep's folder.
        sweep: What was planned.

    Returns:
        Every cell of the sweep, in its order.

    Raises:
        ValueError: If a run folder belongs to a run with other settings or has a damaged file.
    """
    runs: dict[Cell, list[RunResult]] = {cell: [] for cell in sweep.cells}
    for (cell, _), config in sweep.configs().items():
        runs[cell].append(_read_run(FolderReader(folder / sweep.folder(config)), config))
    return [CellResults(cell, tuple(planned)) for cell, planned in runs.items()]


def choose(cells: Sequence[CellResults], *name: str) -> CellResults | None:
    """Picks the cell with the best mean over its repeats: the lowest loss, or the highest accuracy.

    Args:
        cells: The cells of one method.
        name: Keys of the figure in `metrics.json`, such as `"val_loss"`.

    Returns:
        The best of the complete cells, or, if there is none, of the cells with a finished run; None
        if there is none either. The first of equals.
    """
    sign = 1 if name[-1].endswith("loss") else -1
    begun = [cell for cell in cells if cell.finished]
    complete = [cell for cell in begun if cell.complete]
    return min(complete or begun, key=lambda cell: sign * cell.statistic(*name).mean, default=None)


def _read_run(folder: FolderReader, config: RunConfig) -> RunResult:
    folder.refuse_link()
    if folder.claimed:
        folder.check_settings(config, "Move that run out of the sweep's folder.")
    problem = folder.problem
    if problem is not None:
        return RunResult(folder, config, problem, {}, [], {})
    metrics, history = folder.read_metrics(), folder.read_history()
    if len(history) != config.epochs:
        raise ValueError(
            f"{folder.history_file} must hold {config.epochs} epochs. Received: {len(history)}. "
            "Train that run again, with train.py --overwrite."
        )
    environment = folder.read_config().get("environment", {})
    return RunResult(folder, config, None, metrics, history, environment)
