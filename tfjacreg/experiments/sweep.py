"""A sweep: a TOML file that names the runs of a comparison of methods (appendix A.2).

Its top-level keys are settings that all runs share, `repeats`, the axes in `[grid]` and a table for
each method, which may have axes of its own:

    dataset = "digits"
    epochs = 5
    repeats = 2  # with seeds 0 and 1

    [grid]
    factor = [0.001, 0.01]

    [methods.none]
    [methods.spectral]
    factor = [0.01, 0.1]

A table `[final]` adds a second stage: `Sweep.second_stage` is the sweep of the cells that were
chosen on the grid.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfjacreg import arguments, regularizers
from tfjacreg.experiments import measures, network_sources, reading
from tfjacreg.experiments.config import RunConfig
from tfjacreg.printable import printable, shown

SWEEP_FILE = "sweep.toml"  # A copy of the given file, in the sweep's folder.
FINAL_FOLDER = "final"  # The folder of the second stage, in the sweep's folder.
MOST_RUNS = 100_000
CHOICES = ("val_loss", "val_accuracy")
MEASURES = (*measures.PERTURBATIONS, *measures.POINTWISE)
AXES = ("learning_rate", "batch_size", "factor")
METHODS = ("none", *regularizers.BY_NAME)

# A repeat sets the seed, a method the regularizer, and the place of the data does not define a run.
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
        learning_rate: The initial learning rate of SGD.
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
class Judgement:
    """How finished runs are evaluated: the options of `evaluate.py`.

    Attributes:
        names: Some of `MEASURES`; if there are none, the runs are not evaluated.
        limit: The number of test images to use, from the first; None for all.
    """

    names: tuple[str, ...] = ()
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Final:
    """The second stage of a sweep: more runs of the chosen cell of each method.

    Attributes:
        choose_by: `"val_loss"` (the lowest) or `"val_accuracy"` (the highest): the mean over the
            repeats of a cell, after the last epoch.
        repeats: How often the chosen cells are trained again, with seeds that the grid does not
            have.
        whole_training_set: Whether to train on the validation split too.
        judgement: How these runs are evaluated.
    """

    choose_by: str
    repeats: int
    whole_training_set: bool
    judgement: Judgement


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of a sweep file.

    Attributes:
        name: The file's name without its ending.
        content: The file's bytes, with the data set and the network that were given beside it.
        repeats: How often each cell is run.
        first_seed: The seed of the first repeat; the others follow.
        cells: Every cell once: by method in the file's order, then rate, batch size and factor.
        settings: The settings that all runs share, by `RunConfig`'s names.
        judgement: How the runs are evaluated.
        final: The second stage, or None.
    """

    name: str
    content: bytes
    repeats: int
    first_seed: int
    cells: tuple[Cell, ...]
    settings: Mapping[str, Any]
    judgement: Judgement
    final: Final | None

    @classmethod
    def load(
        cls, path: Path | str, *, dataset: str | None = None, network: str | None = None
    ) -> Sweep:
        """Reads a sweep file.

        Args:
            path: The TOML file.
            dataset: The data set to use instead of the file's, if given.
            network: The network to use instead of the file's, if given.

        Raises:
            ValueError: If the file cannot be read or anything in it is not valid; the message
                names the file, the key and what is valid.
        """
        path = Path(path)
        options = {"dataset": dataset, "network": network}
        given = {name: value for name, value in options.items() if value is not None}
        try:
            content = reading.read_bytes(path, reading.SWEEP)
            table = tomllib.loads(content.decode())
            if given:
                content = _with_settings(content.decode(), table, given).encode()
                table |= given
        except OSError as error:
            raise ValueError(f"Cannot read the sweep file: {error}.") from error
        except RecursionError as error:
            raise ValueError(
                f"{path} must have no table or list deep in others. Received: more of them in each "
                "other than can be read. Two levels are enough for a sweep."
            ) from error
        except ValueError as error:  # From decoding the text, or from TOML.
            raise ValueError(f"{path} is not a TOML file: {error}.") from error
        try:
            return _parsed(path.stem, content, table)
        except ValueError as error:
            raise ValueError(f"{path}: {printable(str(error), limit=1000)}") from error

    def configs(self, data_dir: str | None = None) -> dict[tuple[Cell, int], RunConfig]:
        """The configuration of every run, by cell and repeat; repeats of a cell are neighbours.

        Args:
            data_dir: The folder in which tensorflow-datasets keeps its data; None for its default.
        """
        return {
            (cell, repeat): _config(self.settings, cell, seed=repeat, data_dir=data_dir)
            for cell in self.cells
            for repeat in self.seeds
        }

    @property
    def seeds(self) -> range:
        """The seeds of the repeats."""
        return range(self.first_seed, self.first_seed + self.repeats)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, in the file's order."""
        return tuple(dict.fromkeys(cell.method for cell in self.cells))

    def second_stage(self, chosen: Sequence[Cell]) -> Sweep:
        """The sweep of the second stage, read from the text of a file of its own.

        Args:
            chosen: The chosen cells, one of each method that has one.

        Raises:
            ValueError: If the sweep has no second stage.
        """
        final = self.final
        if final is None:
            raise ValueError("A sweep without [final] has no second stage.")
        digest = hashlib.sha256(self.content).hexdigest()
        settings = {**self.settings, "whole_training_set": final.whole_training_set}
        settings |= {
            "repeats": final.repeats,
            "first_seed": self.first_seed + self.repeats,
            "judge": list(final.judgement.names),
        }
        if final.judgement.limit is not None:
            settings["limit"] = final.judgement.limit
        lines = [
            f"# Written by train.py --sweep: each method's cell of best {final.choose_by}, out of",
            f"# the sweep whose file has the SHA-256 {digest}.",
            *(f"{name} = {_in_toml(value)}" for name, value in settings.items()),
        ]
        for cell in chosen:
            lines += ["", f"[methods.{cell.method}]"]
            axes = {name: getattr(cell, name) for name in AXES}
            lines += [f"{name} = [{v!r}]" for name, v in axes.items() if v is not None]
        text = "\n".join(lines) + "\n"
        return _parsed(self.name, text.encode(), tomllib.loads(text))

    @property
    def any_config(self) -> RunConfig:
        """One of the configurations, for the settings that all of them share."""
        return _config(self.settings, self.cells[0])

    @staticmethod
    def folder(config: RunConfig) -> str:
        """The name of a run's folder inside the sweep's folder."""
        return f"{Cell.of(config).name}-seed{config.seed}"


def _config(settings: Mapping[str, Any], cell: Cell, **others: Any) -> RunConfig:
    # Without a penalty the factor has no meaning and keeps its default, as in a run made by hand.
    own = {name: value for name, value in vars(cell).items() if value is not None}
    return RunConfig.of(regularizer=own.pop("method"), **own, **settings, **others)


def _with_settings(text: str, table: dict[str, Any], given: dict[str, str]) -> str:
    """The text of a sweep file with other values for keys of its top level.

    Raises:
        ValueError: If a value is written in a form that cannot be replaced.
    """
    lines = text.splitlines(keepends=True)
    tables = (i for i, line in enumerate(lines) if re.match(r"\s*\[", line))
    top = next(tables, len(lines))
    replaced = re.compile(rf"\s*({'|'.join(given)})\s*=")
    kept = [line for i, line in enumerate(lines) if i >= top or not replaced.match(line)]
    written = [
        f"{name} = {_in_toml(value)}  # Given with --{name}.\n" for name, value in given.items()
    ]
    result = "".join([*written, *kept])
    try:
        done = tomllib.loads(result) == table | given
    except ValueError:
        done = False
    if not done:
        raise ValueError(
            f"{' and '.join(f'`{name}`' for name in given)} must have a line of its own in the "
            "file, to be replaced by the option. Received: one in another form."
        )
    return result


def _in_toml(value: Any) -> str:
    """A setting as TOML writes it: as JSON does, but for the pairs of surrogates, and DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _parsed(name: str, content: bytes, table: dict[str, Any]) -> Sweep:
    keys = ("repeats", "first_seed", "judge", "limit", "grid", "methods", "final")
    _known("The top level ", table, (*SETTINGS, *keys))
    if "repeats" not in table:
        raise ValueError("`repeats` is missing: how often each cell is run, such as `repeats = 5`.")
    arguments.positive_integer("repeats", table["repeats"])
    first_seed = arguments.fixed_seed(table.get("first_seed", 0), "first_seed", below=2**31)
    judgement = _judgement("", table)
    final = _final(table["final"]) if "final" in table else None
    settings = {key: _typed(key, table[key]) for key in SETTINGS if key in table}
    if network_sources.is_function(settings.get("network", "")):
        raise ValueError(
            "`network` must name no code: a sweep file is data. Received: "
            f"network = {shown(settings['network'])}. Save the network, with "
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
        runs += table["repeats"] * math.prod(lengths) + (final.repeats if final else 0)
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
        _config(settings, cell)  # Raises an error if a value is wrong.
        if cell.name in seen:
            raise ValueError(
                f"Every cell must be listed once and differ in the first six digits of a value. "
                f"Received: {cell.name} twice. Remove the repeated value."
            )
        seen.add(cell.name)
    if final and default.whole_training_set:
        raise ValueError(
            "A sweep with [final] needs a validation split to choose by. Received: "
            "`whole_training_set = true` at the top level. Say it in [final], or leave [final] out."
        )
    sweep = Sweep(
        name=name,
        content=content,
        repeats=table["repeats"],
        first_seed=first_seed,
        cells=tuple(cells),
        settings=settings,
        judgement=judgement,
        final=final,
    )
    if final:
        # What is wrong with the second stage must not come out after the grid was trained.
        try:
            sweep.second_stage(list({cell.method: cell for cell in reversed(cells)}.values()))
        except ValueError as error:
            raise ValueError(f"[final] gives no second stage: {error}") from error
    return sweep


def _final(value: Any) -> Final:
    table = _table("[final]", value)
    _known("[final] ", table, ("choose_by", "repeats", "whole_training_set", "judge", "limit"))
    if "repeats" not in table:
        raise ValueError(
            "[final] `repeats` is missing: how often each chosen cell is trained again, such as "
            "`repeats = 3`."
        )
    choose_by = table.get("choose_by", CHOICES[0])
    if choose_by not in CHOICES:
        raise ValueError(f"`[final] choose_by` must be one of {CHOICES}. Received: {choose_by!r}")
    return Final(
        choose_by=choose_by,
        repeats=arguments.positive_integer("[final] repeats", table["repeats"]),
        whole_training_set=_typed(
            "[final] whole_training_set", table.get("whole_training_set", False)
        ),
        judgement=_judgement("[final] ", table),
    )


def _judgement(where: str, table: dict[str, Any]) -> Judgement:
    names, limit = table.get("judge", []), table.get("limit")
    if not isinstance(names, list) or any(name not in MEASURES for name in names):
        raise ValueError(
            f"{where}`judge` must be a list of some of {MEASURES}. Received: {shown(names)}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{where}`judge` must name each once. Received: {shown(names)}")
    if limit is not None:
        arguments.positive_integer(f"{where}limit", limit)
        if not names:
            raise ValueError(
                f"{where}`limit` is for `judge`, which names nothing. Received: limit = {limit}"
            )
    return Judgement(tuple(names), limit)


def _axes(where: str, table: dict[str, Any], names: tuple[str, ...]) -> dict[str, list[Any]]:
    _known(f"{where} ", table, names)
    for name, values in table.items():
        if not isinstance(values, list) or not values:
            raise ValueError(
                f"{where} `{name}` must be a list of at least one value, such as "
                f"`{name} = [{getattr(RunConfig.of(), name)}]`. Received: {shown(values)}"
            )
    return {
        name: [_typed(f"{where} {name}", value) for value in values]
        for name, values in table.items()
    }


def _typed(where: str, value: Any) -> Any:
    """The value in the type that `RunConfig` has for its name, the last word of `where`."""
    if where == "image_size":
        if not isinstance(value, list):
            raise ValueError(
                f"`image_size` must be a list such as [32, 32]. Received: {shown(value)}"
            )
        return tuple(value)
    kind = _TYPES[where.split()[-1]]
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"`{where}` must be {_KINDS[kind]}. Received: {shown(value)}")
    try:
        return kind(value)
    except OverflowError as error:
        raise ValueError(
            f"`{where}` must be a number below 1.8e308. Received: {shown(value)}"
        ) from error


def _table(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a table. Received: {shown(value)}")
    return value


def _known(where: str, table: dict[str, Any], valid: tuple[str, ...]) -> None:
    unknown = [key for key in table if key not in valid]
    if unknown:
        raise ValueError(
            f"{where}has keys out of {valid}. Received: {printable(', '.join(unknown), limit=200)}"
        )
