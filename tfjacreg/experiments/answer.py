"""The first lines of a report: which method is best, by how much, and at what cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tfjacreg.experiments import comparison, curves, tables
from tfjacreg.experiments.comparison import Difference
from tfjacreg.experiments.curves import Evaluation
from tfjacreg.experiments.evaluation_records import strength
from tfjacreg.experiments.selection import LABELS, CellResults, Statistic, SweepResults
from tfjacreg.experiments.tables import code, number, p_value, percent, plain

# A difference counts as real if its p, times the number of differences, is below this.
LEVEL = 0.05
# The attack and the noise whose accuracies are shown.
ATTACK, NOISE = "pgd_margin", "noise"


class Answer(NamedTuple):
    """The first lines of a report about one data set.

    Attributes:
        sentence: The answer.
        robust: What the penalty does under attack, or nothing.
        table: A comparison of the methods, in Markdown.
        notes: The notes below the table.
        more: What else to know before deciding.
    """

    sentence: str
    robust: str
    table: str
    notes: str
    more: list[str]


class _Robustness(NamedTuple):
    """Accuracy in percent under one perturbation of one strength, by method and seed."""

    title: str
    values: dict[str, dict[int, float]]


def answer(
    results: SweepResults, others: Sequence[SweepResults], judged: Mapping[Path, dict[str, Any]]
) -> Answer:
    """Answers which method is best.

    Args:
        results: The sweep that gives the answer.
        others: All sweeps of the report; one may be the grid that this sweep's cells come from.
        judged: The evaluations of its runs, by run folder.
    """
    accuracy = {m: comparison.accuracies(cell) for m, cell in results.chosen.items()}
    noise, attack = (_robustness(results, judged, name) for name in (NOISE, ATTACK))
    more = [
        *_cost(results),
        *_not_shown(results, others),
        *_at_the_edge(results, others),
    ]
    return Answer(
        _sentence(results, accuracy),
        _robust(attack or noise),
        _table(results, accuracy, noise, attack),
        _notes(results, accuracy, noise, attack),
        more,
    )


def evaluations(results: SweepResults, judged: Mapping[Path, dict[str, Any]]) -> list[Evaluation]:
    """The evaluations of the chosen cells' runs; empty for a run without an evaluation."""
    return [
        Evaluation(results.label, LABELS[method], judged.get(run.folder.path, {}))
        for method, cell in results.chosen.items()
        for run in cell.finished
    ]


def named(method: str, cell: CellResults) -> str:
    """A method with its chosen factor."""
    factor = cell.cell.factor
    return LABELS[method] if factor is None else f"{LABELS[method]}, {factor:g}"


def _sentence(results: SweepResults, accuracy: Mapping[str, Mapping[int, float]]) -> str:
    chosen = results.chosen
    penalties = {m: cell for m, cell in chosen.items() if m != "none"}
    if not chosen:
        return f"No answer yet: {len(results.finished)} of {len(results.runs)} runs have finished."
    mean = {m: Statistic.of(list(values.values())) for m, values in accuracy.items()}
    best = max(penalties or chosen, key=lambda m: mean[m].mean)
    reached = f"{_called(best, chosen[best])} reaches {number(mean[best], 2)} % test accuracy"
    if "none" not in chosen:
        return f"No answer: no run without a penalty has finished to compare with. {reached}."
    if not penalties:
        return "No answer: only runs without a penalty have finished."
    differences = {m: comparison.paired(accuracy[m], accuracy["none"]) for m in penalties}
    found = {m: d for m, d in differences.items() if d is not None}
    if not found:
        return (
            "No answer: with one seed a difference between methods cannot be told from one between "
            f"seeds. {reached}, no penalty {number(mean['none'], 2)} %."
        )
    counted = {m: d for m, d in found.items() if d.p * len(found) < LEVEL}
    better = [m for m, d in counted.items() if d.less.mean > 0]
    seeds = f"{min(d.less.repeats for d in found.values())} seeds"
    if better:
        best = max(better, key=lambda m: mean[m].mean)
        also = [f"{_called(m, chosen[m])} by {found[m].less.mean:.2f}" for m in better if m != best]
        return (
            f"Yes: {_called(best, chosen[best])} raises the test accuracy by "
            f"{found[best].less.mean:.2f} points, from {mean['none'].mean:.2f} to "
            f"{mean[best].mean:.2f} % ({seeds}, {_probability(found[best], len(found))})"
            + f"; {', '.join(also)}" * bool(also)
            + "."
        )
    best = max(found, key=lambda m: found[m].less.mean)
    probability = _probability(found[best], len(found))
    if len(counted) == len(found):
        return (
            f"No: every penalty lowers the test accuracy. {_called(best, chosen[best])} lowers it "
            f"the least, by {-found[best].less.mean:.2f} points ({seeds}, {probability})."
        )
    return (
        f"Not measurably: {_called(best, chosen[best])}, the best penalty, changes the test "
        f"accuracy by {found[best].less.mean:+.2f} points, from {mean['none'].mean:.2f} to "
        f"{mean[best].mean:.2f} %, which chance may do too ({seeds}, {probability})."
    )


def _called(method: str, cell: CellResults) -> str:
    """A method with its factor, in a sentence."""
    factor = cell.cell.factor
    return LABELS[method] + ("" if factor is None else f" with factor {factor:g}")


def _probability(difference: Difference, count: int) -> str:
    if math.isnan(difference.p):
        return "no spread to test it by"
    corrected = f", corrected for {count} comparisons" if count > 1 else ""
    return f"p\u00a0{p_value(min(count * difference.p, 1.0))}{corrected}"


def _robustness(
    results: SweepResults, judged: Mapping[Path, dict[str, Any]], name: str
) -> _Robustness | None:
    """Gathers the accuracies at the middle one of the strengths."""
    values: dict[str, dict[int, float]] = {}
    title = ""
    for method, cell in results.chosen.items():
        for run in cell.finished:
            curve = judged.get(run.folder.path, {}).get(name)
            if curve:
                strengths = curve[strength(name)]
                middle = (len(strengths) - 1) // 2
                title = (
                    f"noise of variance {strengths[middle]:g}"
                    if name == NOISE
                    else f"{curves.TITLES[name]}, {strengths[middle]:g} steps"
                )
                accuracy = 100 * curve["accuracy"][middle]
                values.setdefault(method, {})[run.config.seed] = accuracy
    return _Robustness(title, values) if values else None


def _robust(found: _Robustness | None) -> str:
    if found is None or "none" not in found.values or len(found.values) < 2:
        return ""
    mean = {m: Statistic.of(list(values.values())) for m, values in found.values.items()}
    best = max((m for m in mean if m != "none"), key=lambda m: mean[m].mean)
    difference = comparison.paired(found.values[best], found.values["none"])
    text = (
        f"Under {found.title}, {LABELS[best]} has {number(mean[best], 1)} % of the test "
        f"images right, no penalty {number(mean['none'], 1)} %"
    )
    if difference and not math.isnan(difference.p):
        text += f" ({_probability(difference, len(mean) - 1)})"
    return f"{text}."


def _cost(results: SweepResults) -> list[str]:
    """Compares the times of an epoch: times of steps with different batch sizes do not compare."""
    times = {
        method: cell.statistic("step_seconds").mean / cell.cell.batch_size
        for method, cell in results.chosen.items()
    }
    if "none" not in times or len(times) < 2:
        return []
    ratios = [f"{LABELS[m]} {t / times['none']:.1f}" for m, t in times.items() if m != "none"]
    sizes = {cell.cell.batch_size for cell in results.chosen.values()}
    each = " (with the batch size chosen for each)" if len(sizes) > 1 else ""
    return [f"Time of an epoch, relative to one without a penalty{each}: {', '.join(ratios)}."]


def _grid(results: SweepResults, others: Sequence[SweepResults], method: str) -> list[CellResults]:
    """The cells from which the cell of a method was chosen."""
    settings = ("dataset", "network")
    config = results.sweep.any_config
    same = [
        other.methods.get(method, [])
        for other in others
        if all(getattr(other.sweep.any_config, s) == getattr(config, s) for s in settings)
    ]
    chosen = results.chosen[method].cell
    same = [cells for cells in same if any(cell.cell == chosen for cell in cells)]
    return max(same, key=len, default=[])


def _at_the_edge(results: SweepResults, others: Sequence[SweepResults]) -> list[str]:
    texts = []
    for method, cell in results.chosen.items():
        found = (c.cell.factor for c in _grid(results, others, method))
        factors = sorted({factor for factor in found if factor is not None})
        if len(factors) > 1 and cell.cell.factor in (factors[0], factors[-1]):
            end = (
                ("smallest", "smaller") if cell.cell.factor == factors[0] else ("largest", "larger")
            )
            texts.append(
                f"The factor of {LABELS[method]}, {cell.cell.factor:g}, is the {end[0]} of "
                f"its grid: a {end[1]} one may do better."
            )
    return texts


def _not_shown(results: SweepResults, others: Sequence[SweepResults]) -> list[str]:
    """Methods that were planned and have no result, here or in the sweep of the grid."""
    config = results.sweep.any_config
    texts: list[str] = []
    told = set(results.chosen)
    for other in others:
        theirs = other.sweep.any_config
        if (theirs.dataset, theirs.network) != (config.dataset, config.network):
            continue
        for method, cells in other.methods.items():
            if method in told:
                continue
            told.add(method)
            failed = [run for cell in cells for run in cell.runs if run.failed]
            why = f" ({code(str(failed[0].problem))})" if failed else ""
            ended = "failed or did not finish" if failed else "has not finished"
            texts.append(f"{LABELS[method]} is missing: each of its cells {ended}{why}.")
    if results.sweep.final is not None:
        texts.append(
            "These are the choices on the grid: their final runs, with new seeds, are not here yet."
        )
    return texts


def _table(
    results: SweepResults,
    accuracy: Mapping[str, Mapping[int, float]],
    noise: _Robustness | None,
    attack: _Robustness | None,
) -> str:
    rows = []
    for method, cell in results.chosen.items():
        difference = None
        if method != "none" and "none" in accuracy:
            difference = comparison.paired(accuracy[method], accuracy["none"])
        against = ""
        if difference:
            p = f" (p {p_value(difference.p)})" if not math.isnan(difference.p) else ""
            against = f"{difference.less.mean:+.2f}{p}"
        rows.append(
            [
                named(method, cell) + ("" if cell.complete else " †"),
                percent(cell.statistic("test_accuracy")),
                against,
                number(cell.statistic("test_spectral_norm"), 2),
                *(_shown(found, method) for found in (noise, attack)),
                f"{1e3 * cell.statistic('step_seconds').mean:.1f}",
            ]
        )
    head = ["Method, factor", "Accuracy", "Against none", "Sigma", "Noise", "PGD", "ms per step"]
    return tables.table(head, rows)


def _shown(found: _Robustness | None, method: str) -> str:
    if found is None or method not in found.values:
        return ""
    return number(Statistic.of(list(found.values[method].values())), 1)


def _notes(
    results: SweepResults,
    accuracy: Mapping[str, Mapping[int, float]],
    noise: _Robustness | None,
    attack: _Robustness | None,
) -> str:
    config = results.sweep.any_config
    seeds = sorted({seed for values in accuracy.values() for seed in values})
    split = "the whole training set" if config.whole_training_set else "the training split"
    text = (
        f"{plain(config.dataset)}, {plain(config.network)}, {config.epochs} epochs on {split}, "
        f"{len(seeds)} seed{'s' * (len(seeds) != 1)}. Test accuracy in %, mean ± standard deviation"
        "; against none: points, with p of a paired t test; sigma: the exact norm of the Jacobian, "
        "mean over the test images."
    )
    measured = [found.title for found in (noise, attack) if found]
    if measured:
        text += f" Accuracy in % under {' and '.join(measured)}."
    if any(not cell.complete for cell in results.chosen.values()):
        text += " †: not all repeats have finished."
    return text
