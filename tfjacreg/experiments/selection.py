"""The runs of sweeps by cell, and the cell that stands for each method (appendix A.2)."""

from __future__ import annotations

import csv
import functools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tfjacreg.experiments.evaluation import read_json
from tfjacreg.experiments.run import RunConfig
from tfjacreg.experiments.sweep import Cell, Sweep

# The paper's names of the methods, in the order of its Table 1.
LABELS = {
    "spectral": "Spectral",
    "frobenius": "Frobenius",
    "spectral_bound": "Spectral-Bound",
    "weight_decay": "L2",
    "none": "None",
}
# Keys into metrics.json. The first loss chooses on held-out training data, the second on the test
# split itself.
VALIDATION_LOSS = ("val_loss",)
LOWEST_TEST_LOSS = ("lowest_test_loss", "test_loss")
_NUMBERS = (
    VALIDATION_LOSS,
    LOWEST_TEST_LOSS,
    ("lowest_test_loss", "test_accuracy"),
    ("lowest_val_loss", "test_accuracy"),
    ("test_accuracy",),
    ("test_spectral_norm",),
    ("step_seconds",),
)
_COLUMNS = ("val_loss", "step_seconds")


class Statistic(NamedTuple):
    """Mean and spread over the repeats of a cell.

    Attributes:
        mean: The mean.
        std: The sample standard deviation (ddof = 1); NaN where there is one value.
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


class Run(NamedTuple):
    """One planned run of a sweep.

    Attributes:
        folder: Its run folder.
        config: Its settings.
        problem: None if it has finished; else why not.
        metrics: Content of `metrics.json`; empty unless finished.
        history: The numbers in `history.csv`, `[epochs]` by column; empty unless finished.
        environment: Versions and hardware; empty unless finished.
    """

    folder: Path
    config: RunConfig
    problem: str | None
    metrics: dict[str, Any]
    history: dict[str, npt.NDArray[np.float64]]
    environment: dict[str, Any]

    @property
    def failed(self) -> bool:
        """Whether it ended with an error."""
        return self.problem is not None and self.problem.startswith("failed")


class CellRuns(NamedTuple):
    """The repeats of a cell.

    Attributes:
        cell: The cell.
        runs: All planned runs, by seed.
    """

    cell: Cell
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
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


class Section(NamedTuple):
    """A sweep, and the cell that stands for each of its methods.

    Attributes:
        label: Its name in tables and figures.
        folder: Its folder.
        sweep: What was planned.
        methods: The cells of each method, in the order of `LABELS`.
        chosen: The cell that stands for each method that has a finished run.
    """

    label: str
    folder: Path
    sweep: Sweep
    methods: dict[str, list[CellRuns]]
    chosen: dict[str, CellRuns]

    @property
    def dataset(self) -> str:
        """The name of the data set."""
        return self.runs[0].config.dataset

    @property
    def runs(self) -> list[Run]:
        """Every planned run."""
        return [run for cells in self.methods.values() for cell in cells for run in cell.runs]

    @property
    def finished(self) -> list[Run]:
        """The runs that have finished."""
        return [run for run in self.runs if run.problem is None]


def read(folders: Sequence[Path]) -> list[Section]:
    """Reads sweeps and chooses a cell for each of their methods.

    Args:
        folders: Folders of sweeps, each with its `sweep.toml`.

    Returns:
        One section per sweep, labelled with its data set, and with its folder where several
        sweeps share a data set.

    Raises:
        ValueError: If a folder is no sweep's or comes twice, or a run folder in it holds a run
            with other settings or a damaged file; the message names the file.
    """
    folders = list(folders)
    for folder, count in Counter(folder.resolve() for folder in folders).items():
        if count > 1:
            raise ValueError(f"Every sweep must be named once. Received: {folder} {count} times.")
    for folder in folders:
        if not (folder / "sweep.toml").is_file():
            raise ValueError(
                f"A sweep's folder must hold sweep.toml. Received: {folder}, which does not. "
                "`python train.py --sweep FILE --out DIR` makes such a folder."
            )
    sweeps = [Sweep.load(folder / "sweep.toml") for folder in folders]
    names = [next(iter(sweep.configs().values())).dataset for sweep in sweeps]
    return [
        _section(name if names.count(name) == 1 else f"{name}, {folder}", folder, sweep)
        for name, folder, sweep in zip(names, folders, sweeps, strict=True)
    ]


def _section(label: str, folder: Path, sweep: Sweep) -> Section:
    cells = read_cells(folder, sweep)
    methods: dict[str, list[CellRuns]] = {
        method: [cell for cell in cells if cell.cell.method == method]
        for method in LABELS
        if any(cell.cell.method == method for cell in cells)
    }
    chosen = {method: choose(group, VALIDATION_LOSS) for method, group in methods.items()}
    return Section(label, folder, sweep, methods, {m: c for m, c in chosen.items() if c})


def read_cells(folder: Path, sweep: Sweep) -> list[CellRuns]:
    """Reads the runs of a sweep, finished or not.

    Args:
        folder: The sweep's folder.
        sweep: What was planned.

    Returns:
        Every cell of the sweep, in its order.

    Raises:
        ValueError: If a run folder holds a run with other settings or a damaged file.
    """
    runs: dict[Cell, list[Run]] = {cell: [] for cell in sweep.cells}
    for (cell, _), config in sweep.configs().items():
        runs[cell].append(_read_run(folder / sweep.folder(config), config))
    return [CellRuns(cell, tuple(planned)) for cell, planned in runs.items()]


def choose(cells: Sequence[CellRuns], loss: Sequence[str]) -> CellRuns | None:
    """Picks the cell with the lowest mean loss over its repeats.

    Args:
        cells: The cells of one method.
        loss: Keys of the loss in `metrics.json`, such as `VALIDATION_LOSS`.

    Returns:
        The best of the complete cells; if there is none, of the cells with a finished run; if
        there is none either, None. The first of equals.
    """
    begun = [cell for cell in cells if cell.finished]
    complete = [cell for cell in begun if cell.complete]
    return min(complete or begun, key=lambda cell: cell.statistic(*loss).mean, default=None)


def _read_run(folder: Path, config: RunConfig) -> Run:
    if (folder / "config.json").exists():
        held = read_json(folder / "config.json")
        _refuse_other_settings(folder / "config.json", held, config)
        if (folder / "metrics.json").exists():
            metrics = read_json(folder / "metrics.json")
            _check_numbers(folder / "metrics.json", metrics)
            history = _read_history(folder / "history.csv", config.epochs)
            return Run(folder, config, None, metrics, history, held.get("environment", {}))
    return Run(folder, config, _problem(folder), {}, {}, {})


def _refuse_other_settings(path: Path, held: dict[str, Any], config: RunConfig) -> None:
    for name, (theirs, planned) in config.differences(held).items():
        raise ValueError(
            f"{path} must be that of the sweep's run, with {name}={planned!r}. Received: "
            f"{name}={theirs!r}. Move that run out of the sweep's folder."
        )


def _check_numbers(path: Path, metrics: dict[str, Any]) -> None:
    for keys in _NUMBERS:
        value: Any = metrics
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"{path} must hold a finite number as {'.'.join(keys)}. Received: {value!r}. "
                "Train that run again, with train.py --overwrite."
            )


def _read_history(path: Path, epochs: int) -> dict[str, npt.NDArray[np.float64]]:
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        history = {name: np.array([float(row[name]) for row in rows]) for name in _COLUMNS}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must hold a line of numbers per epoch, among them {_COLUMNS}. "
            f"Received: {error!r}. Train that run again, with train.py --overwrite."
        ) from error
    if len(rows) != epochs:
        raise ValueError(f"{path} must hold {epochs} epochs. Received: {len(rows)}.")
    return history


def _problem(folder: Path) -> str:
    error = folder / "error.txt"
    if error.exists():
        # Of a traceback the last line is the error itself.
        lines = error.read_text(errors="replace").strip().splitlines()
        return f"failed: {lines[-1] if lines else 'error.txt is empty'}"
    return "not finished" if folder.exists() else "not started"
