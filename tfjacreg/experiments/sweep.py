"""A sweep: a TOML file that names the runs of a comparison of methods (appendix A.2).

Its top-level keys are settings that all runs share, `repeats`, the axes in `[grid]` and a table for
each method, which may give axes of its own:

    dataset = "digits"
    epochs = 5
    repeats = 2  # with seeds 0 and 1

    [grid]
    factor = [0.001, 0.01]

    [methods.none]
    [methods.spectral]
    factor = [0.01, 0.1]
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfjacreg import arguments, regularizers
from tfjacreg.experiments import network_sources, reading
from tfjacreg.experiments.config import RunConfig
from tfjacreg.printable import printable

SWEEP_FILE = "sweep.toml"  # In the sweep's folder, a copy of the file that was given.
MOST_RUNS = 100_000
AXES = ("learning_rate", "batch_size", "factor")
METHODS = ("none", *regularizers.BY_NAME)

# A repeat is a seed, a method a regularizer, and where the data lies is not what a run is.
SETTINGS = tuple(
    field.name
    for field in dataclasses.fields(RunConfig)
    if field.name not in (*AXES, "regularizer", "seed", "data_dir", "data_digest", "network_digest")
)
_TYPES = typing.get_type_hints(RunConfig)
_KINDS = {str: "a string", bool: "true or false", int: "an integer", float: "a number"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A point of the grid: what the repeats of a run have in common.

    Attributes:
        method: `"none"` or a name in `regularizers.BY_NAME`.
        factor: The weight of the penalty; None for the method `"none"`.
        learning_rate: Of SGD, at the start.
        batch_size: Examples in a step.
    """

    method: str
    factor: float | None
    learning_rate: float
    batch_size: int

    @classmethod
    def of(cls, config: RunConfig) -> Cell:
        """The cell that a run belongs to."""
        factor = None if config.regularizer == "none" else config.factor
        return cls(config.regularizer, factor, config.learning_rate, config.batch_size)

    @property
    def name(self) -> str:
        """The cell in the names of its run folders, such as `"spectral-0.01-lr0.01-b32"`."""
        method = self.method if self.factor is None else f"{self.method}-{self.factor:g}"
        return f"{method}-lr{self.learning_rate:g}-b{self.batch_size}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of a sweep file.

    Attributes:
        name: The file's name without its ending.
        content: The file's bytes.
        repeats: How often each cell is run, with seeds 0, 1, ...
        cells: Every cell once: by method in the file's order, then rate, batch size and factor.
        settings: What all runs share, by `RunConfig`'s names.
    """

    name: str
    content: bytes
    repeats: int
    cells: tuple[Cell, ...]
    settings: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path | str) -> Sweep:
        """Reads a sweep file.

        Args:
            path: The TOML file.

        Raises:
            ValueError: If the file cannot be read or anything in it is not valid; the message
                names the file, the key and what is valid.
        """
        path = Path(path)
        try:
            content = reading.read_bytes(path, reading.SWEEP)
            table = tomllib.loads(content.decode())
        except OSError as error:
            raise ValueError(f"Cannot read the sweep file: {error}.") from error
        except RecursionError as error:
            raise ValueError(
                f"{path} must have no table or list deep in others. Received: more of them in each "
                "other than can be read. Two levels are enough for a sweep."
            ) from error
        except ValueError as error:  # Of the decoder or of TOML.
            raise ValueError(f"{path} is not a TOML file: {error}.") from error
        try:
            return _parsed(path.stem, content, table)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def configs(self, data_dir: str | None = None) -> dict[tuple[Cell, int], RunConfig]:
        """The configuration of every run, by cell and repeat; repeats of a cell are neighbours.

        Args:
            data_dir: Where tensorflow-datasets keeps its data; None is its own default.
        """
        return {
            (cell, repeat): _config(self.settings, cell, seed=repeat, data_dir=data_dir)
            for cell in self.cells
            for repeat in range(self.repeats)
        }

    @property
    def any_config(self) -> RunConfig:
        """One of the configurations, for what all of them share."""
        return _config(self.settings, self.cells[0])

    @staticmethod
    def folder(config: RunConfig) -> str:
        """The name of a run's folder inside the sweep's folder."""
        return f"{Cell.of(config).name}-seed{config.seed}"


def _config(settings: Mapping[str, Any], cell: Cell, **others: Any) -> RunConfig:
    # Without a penalty the factor means nothing and keeps its default, as in a run made by hand.
    own = {name: value for name, value in vars(cell).items() if value is not None}
    return RunConfig.of(regularizer=own.pop("method"), **own, **settings, **others)


def _parsed(name: str, content: bytes, table: dict[str, Any]) -> Sweep:
    _known("The top level ", table, (*SETTINGS, "repeats", "grid", "methods"))
    if "repeats" not in table:
        raise ValueError("`repeats` is missing: how often each cell is run, such as `repeats = 5`.")
    arguments.positive_integer("repeats", table["repeats"])
    settings = {key: _typed(key, table[key]) for key in SETTINGS if key in table}
    if network_sources.is_function(settings.get("network", "")):
        raise ValueError(
            "`network` must name no code: a sweep file is data. Received: "
            f"network = {_shown(settings['network'])}. Save the network, with "
            "network.save('mine.keras'), and name that file."
        )
    default = RunConfig.of(**settings)
    grid = {name: [getattr(default, name)] for name in AXES}
    grid |= _axes("[grid]", _table("[grid]", table.get("grid", {})), AXES)
    methods = _table("[methods]", table.get("methods", {}))
    _known("[methods] ", methods, METHODS)
    if not methods:
        raise ValueError(
            f"[methods] must have a table for each method, out of {METHODS}, such as "
            "`[methods.spectral]`. Received: none."
        )
    cells: list[Cell] = []
    runs = 0
    for method, own in methods.items():
        where = f"[methods.{method}]"
        names = tuple(name for name in AXES if (method, name) != ("none", "factor"))
        axes = grid | _axes(where, _table(where, own), names)
        lengths = [len(axes[axis]) for axis in names]
        runs += table["repeats"] * math.prod(lengths)
        if runs > MOST_RUNS:
            raise ValueError(
                f"A sweep must have at most {MOST_RUNS} runs: methods times values times repeats. "
                f"Received: {runs} up to {where}. Shorten a list or `repeats`, or make several "
                "sweeps."
            )
        for rate, size in itertools.product(axes["learning_rate"], axes["batch_size"]):
            factors = axes["factor"] if "factor" in names else [None]
            cells += [Cell(method, factor, rate, size) for factor in factors]
    seen = set()
    for cell in cells:
        _config(settings, cell)  # It says what is wrong with a value.
        if cell.name in seen:
            raise ValueError(
                f"Every cell must be listed once and differ in the first six digits of a value. "
                f"Received: {cell.name} twice. Remove the repeated value."
            )
        seen.add(cell.name)
    return Sweep(name, content, table["repeats"], tuple(cells), settings)


def _axes(where: str, table: dict[str, Any], names: tuple[str, ...]) -> dict[str, list[Any]]:
    _known(f"{where} ", table, names)
    for name, values in table.items():
        if not isinstance(values, list) or not values:
            raise ValueError(
                f"{where} `{name}` must be a list of at least one value, such as "
                f"`{name} = [{getattr(RunConfig.of(), name)}]`. Received: {_shown(values)}"
            )
    return {
        name: [_typed(f"{where} {name}", value) for value in values]
        for name, values in table.items()
    }


def _typed(where: str, value: Any) -> Any:
    """The value as the type that `RunConfig` gives to its name, the last word of `where`."""
    if where == "image_size":
        if not isinstance(value, list):
            raise ValueError(
                f"`image_size` must be a list such as [32, 32]. Received: {_shown(value)}"
            )
        return tuple(value)
    kind = _TYPES[where.split()[-1]]
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"`{where}` must be {_KINDS[kind]}. Received: {_shown(value)}")
    try:
        return kind(value)
    except OverflowError as error:
        raise ValueError(
            f"`{where}` must be a number below 1.8e308. Received: {_shown(value)}"
        ) from error


def _shown(value: Any) -> str:
    """A value for a message, which it does not fill."""
    try:
        return printable(repr(value), limit=200)
    except (RecursionError, ValueError):  # Too deep, or an integer of too many digits.
        return f"one that is too long to show, of type {type(value).__name__}"


def _table(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a table. Received: {_shown(value)}")
    return value


def _known(where: str, table: dict[str, Any], valid: tuple[str, ...]) -> None:
    unknown = [key for key in table if key not in valid]
    if unknown:
        raise ValueError(
            f"{where}has keys out of {valid}. Received: {printable(', '.join(unknown), limit=200)}"
        )
