"""A sweep from its file to the answer: the grid, the choice, the final runs and the report.

Every stage continues where it was interrupted, and any workers take part in all of them. The second
stage is a sweep too, of the chosen cells, in the folder `final` of the first.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

from tfjacreg import cli
from tfjacreg.experiments import report, workers
from tfjacreg.experiments.config import RunError
from tfjacreg.experiments.ledger import Result, Summary
from tfjacreg.experiments.locks import FileLocks
from tfjacreg.experiments.sweep import FINAL_FOLDER, Cell, Sweep


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of a sweep.

    Attributes:
        grid: The results of the file's own cells.
        final: The results of the chosen cells; None without a second stage.
        unchosen: Why nothing was chosen, by method.
        report: The page; None without a second stage.
        answer: The report's first sentence.
    """

    grid: Summary
    final: Summary | None = None
    unchosen: dict[str, str] = dataclasses.field(default_factory=dict)
    report: Path | None = None
    answer: str = ""

    @property
    def failures(self) -> dict[str, str]:
        """The errors of the failed runs of both stages, by the names of their folders."""
        final = self.final.failures if self.final else {}
        return self.grid.failures | {f"{FINAL_FOLDER}/{name}": e for name, e in final.items()}

    def __str__(self) -> str:
        """The tables, what was not chosen, and the answer."""
        if self.final is None:
            return str(self.grid)
        lines = [f"{self.grid}\n", f"The chosen cells, with new seeds:\n{self.final}"]
        lines += [f"{method}: {why}" for method, why in self.unchosen.items()]
        return "\n".join([*lines, f"\n{self.answer}"])


def run(
    sweep: Sweep,
    out: Path | str,
    *,
    storage: str | None = None,
    data_dir: str | None = None,
    retry_failed: bool = False,
) -> Outcome:
    """Takes part in a sweep until it is finished, and writes the report if it has `[final]`.

    Args:
        sweep: The sweep.
        out: Its folder; the second stage is in its folder `final`, the report in `report`.
        storage: As for `workers.run_sweep`.
        data_dir: The folder in which tensorflow-datasets keeps its data; None for its default.
        retry_failed: Whether runs that have failed by now are tried once more.

    Raises:
        ValueError: If the URL is not valid.
        RunError: As for `workers.run_sweep`; if no cell can be chosen; or if `final` was begun with
            another choice.
    """
    out = Path(out)
    options: dict[str, Any] = {
        "storage": storage,
        "data_dir": data_dir,
        "retry_failed": retry_failed,
    }
    grid = workers.run_sweep(sweep, out, announcement=plan(sweep, out), **options)
    if sweep.final is None:
        return Outcome(grid)
    chosen, unchosen = choose(sweep, grid, sweep.final.choose_by)
    cli.say(_told(sweep.final.choose_by, chosen, unchosen))
    if not chosen:
        raise RunError(
            f"No cell of any method in {out} has finished all its repeats: there is nothing to "
            "choose. Mend what the failed runs say, in their error.txt, and use --retry-failed."
        )
    second = sweep.second_stage(list(chosen.values()))
    place = out / FINAL_FOLDER
    workers.claim_folder(
        second,
        place,
        way_out=f"Runs of {out} were made again since {place} was begun, and another cell is the "
        f"best now. Move {place} away to train the new choice.",
    )
    final = workers.run_sweep(second, place, **options)
    with FileLocks(out).exclusive():  # All workers get here at the same time.
        written = report.write([out], out / "report")
    return Outcome(grid, final, unchosen, written.path, written.answer)


def plan(sweep: Sweep, out: Path) -> str:
    """The runs that are planned, and their folders, in lines."""
    config = sweep.any_config
    count = len(sweep.cells) * sweep.repeats
    lines = [f"{sweep.name}: {config.dataset}, {config.network}", f"in {out}"]
    runs = f"{count} run{'s' * (count != 1)} of {config.epochs} epoch{'s' * (config.epochs != 1)}"
    final = sweep.final
    if final is None:
        lines.append(runs)
    else:
        more = len(sweep.methods) * final.repeats
        last = f"final: {more} runs of the choices, {final.repeats} of each with new seeds"
        if final.whole_training_set:
            last += ", on the whole training set"
        if final.judgement.names:
            last += f"; judged by {', '.join(final.judgement.names)}"
        if final.judgement.limit:
            last += f", on {final.judgement.limit} images"
        lines += [
            f"grid: {runs}",
            f"choice: the cell of best {final.choose_by} of each of {len(sweep.methods)} methods",
            last,
            f"in all {count + more} runs",
        ]
    lines[-1] += "; the time left is shown after the first"
    return "\n  ".join(lines)


def choose(sweep: Sweep, grid: Summary, choose_by: str) -> tuple[dict[str, Cell], dict[str, str]]:
    """Chooses the cell of each method.

    Only a cell whose repeats have all finished can be chosen, so a diverged run never is.

    Args:
        sweep: The sweep of the grid.
        grid: The results of its cells.
        choose_by: As in `sweep.Final`.

    Returns:
        The best cell of each method, the first of equals; and for the methods without one, why.
    """
    sign = 1 if choose_by == "val_loss" else -1

    def loss(result: Result) -> float:
        values = getattr(result, choose_by)
        return sign * statistics.fmean(values) if len(values) == grid.repeats else math.nan

    chosen, unchosen = {}, {}
    for method in sweep.methods:
        own = [result for result in grid.results if result.cell.method == method]
        finished = [result for result in own if math.isfinite(loss(result))]
        if finished:
            chosen[method] = min(finished, key=loss).cell
        else:
            names = {f"{r.cell.name}-seed{seed}" for r in own for seed in sweep.seeds}
            errors = [error for run, error in grid.failures.items() if run in names]
            unchosen[method] = (
                f"nothing is chosen: none of its {len(own)} cells has finished all its repeats "
                f"({errors[0] if errors else f'no {choose_by}'})"
            )
    return chosen, unchosen


def _told(choose_by: str, chosen: dict[str, Cell], unchosen: dict[str, str]) -> str:
    lines = [f"  {method}: {cell.name}" for method, cell in chosen.items()]
    lines += [f"  {method}: {why}" for method, why in unchosen.items()]
    return "\n".join([f"\nChosen by {choose_by}:", *lines])
