"""The report on sweeps: the answer, Table 1, Figures 3 to 5, and what is missing in them."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfjacreg import atomic_files
from tfjacreg.experiments import (
    answer,
    curves,
    distributions,
    evaluation_tables,
    figures,
    files,
    html,
    judgements,
    selection,
    tables,
)
from tfjacreg.experiments.curves import Evaluation
from tfjacreg.experiments.measures import PERTURBATIONS, POINTWISE
from tfjacreg.experiments.selection import LABELS, CellResults, RunResult, SweepResults

# The seed that draws the runs of Figure 4, and the number of images to evaluate runs on.
SEED = 0
IMAGES = 2000

FADED = f"""\
Open marks, and stars in the tables: on {100 * curves.FADED:g} % of the images or more the attack
had lost its gradient, because the cross entropy rounds to 0 where logits are large. These images
count as right, but they were not tested. Judge by PGD on the margin and by Square there."""
NEAREST = """\
Of the same runs, the distance to the nearest adversarial image that a search from the linearised
classifier found in the pixel range: an upper bound of the distance to the nearest one. Dashed: the
distance along random directions of Figure 4."""
RATIOS = """\
Both distances at each point, and what the margin and sigma alone would give. No step from a margin
`m` to the boundary is shorter than `m / (sqrt(2) sigma)` as long as sigma stays what it is at the
point. Nothing says that it does, so that number is no certificate: where the last ratio is below 1,
an image of another class was found nearer."""


class Written(NamedTuple):
    """The result of `write`.

    Attributes:
        path: The page.
        answer: The sentence that it begins with, one for each data set.
    """

    path: Path
    answer: str


class _Lead(NamedTuple):
    """A sweep that gives an answer, with the evaluations of its runs."""

    results: SweepResults
    judged: dict[Path, dict[str, Any]]


def write(folders: Sequence[Path], out: Path, *, benchmarks: Path | None = None) -> Written:
    """Writes `report.md`, its pictures and `report.html`, which needs none of the other files.

    Args:
        folders: Folders of sweeps, each with its `sweep.toml`. A second stage is read with its
            sweep.
        out: Folder of the report; made if needed.
        benchmarks: Folder with results of `benchmarks/step_time.py` (`step_time*.json`) and
            `benchmarks/estimator_error.py` (`estimator_error.json`), for Figure 5; the report says
            what is missing. None leaves Figure 5 out.

    Raises:
        ValueError: If a folder does not belong to a sweep or comes twice, a run in it has other
            settings than planned, or a file is damaged; the message names the file.
        OSError: If the report cannot be written.
    """
    atomic_files.check_files(out / "report.md", out / "report.html")
    sweeps = selection.read(folders)
    leads = [_Lead(found, judgements.read(found)) for found in selection.leading(sweeps)]
    answers = [answer.answer(lead.results, sweeps, lead.judged) for lead in leads]
    names = dict.fromkeys(tables.plain(lead.results.dataset) for lead in leads)
    command = shlex.join(["python", "-m", "tfjacreg", "report", *map(str, folders)])
    blocks = [f"# Does a Jacobian penalty help on {' and '.join(names)}?"]
    for number, (lead, found) in enumerate(zip(leads, answers, strict=True)):
        if len(leads) > 1:
            blocks.append(f"**{tables.plain(lead.results.label)}**")
        blocks.append(f"**{found.sentence}** {found.robust}".rstrip())
        if lead.results.chosen:
            blocks += [found.table, found.notes]
        blocks += _lead_figure(lead, out, number)
        if found.more:
            blocks.append("\n".join(f"- {text}" for text in found.more))
    blocks.append("## Accuracy (Table 1)")
    answering = [lead.results for lead in leads]
    for results in (*answering, *(other for other in sweeps if other not in answering)):
        blocks += [
            f"### {tables.plain(results.label)}",
            tables.setting(results),
            tables.table_1(results),
        ]
        if results.chosen:
            blocks += ["The cells of this table:", tables.chosen_cells(results)]
        if differences := tables.differences(results):
            blocks += ["The differences between them:", differences]
        blocks += tables.missing(results)
    blocks += [*_training(sweeps, out), *_robustness(leads, out)]
    if benchmarks is not None:
        blocks += _cost(benchmarks, out)
    blocks += ["## All cells", tables.ALL_CELLS]
    for results in sweeps:
        blocks += [f"### {tables.plain(results.label)}", tables.all_cells(results)]
    blocks += ["## Runs and machines", *map(tables.machines, sweeps)]
    blocks += ["## What the numbers mean", tables.notes(sweeps), tables.DIFFERENCES]
    if not all(results.validated for results in sweeps):
        blocks.append(tables.WHOLE_TRAINING_SET)
    blocks.append(f"Written by {tables.code(command)}.")
    text = "\n\n".join(blocks) + "\n"
    for name, content in (("report.md", text), ("report.html", html.render(text, out))):
        with atomic_files.replacing(out / name) as file:
            file.write_text(content, encoding="utf-8")
    return Written(out / "report.html", " ".join(found.sentence for found in answers))


def _lead_figure(lead: _Lead, out: Path, number: int) -> list[str]:
    """Accuracy against the strength of an attack; without evaluations, the validation loss."""
    name = "answer.svg" if number == 0 else f"answer_{number + 1}.svg"
    judged = answer.evaluations(*lead)
    perturbation = next((p for p in _BY_INTEREST if any(p in e.result for e in judged)), None)
    if perturbation is not None:
        judged = [e for e in judged if perturbation in e.result]
        figures.accuracy_figure(judged, perturbation, out / name)
        return [f"![{_finding(judged, perturbation)}]({name})"]
    return []


# The order in which perturbations are preferred for the first figure.
_BY_INTEREST = ("pgd_margin", "noise", "square", "pgd", "tpgd")


def _finding(judged: Sequence[Evaluation], name: str) -> str:
    """What a figure of accuracies shows, as its alternative text."""
    (found,) = curves.curves(judged, name).values()
    middle = (len(next(iter(found.values())).strength) - 1) // 2
    accuracy = {m: 100 * c.accuracy[:, middle].mean() for m, c in found.items()}
    strength = next(iter(found.values())).strength[middle]
    ranked = sorted(accuracy, key=lambda m: -accuracy[m])
    listed = ", ".join(f"{method} {accuracy[method]:.1f} %" for method in ranked)
    return tables.plain(
        f"Accuracy under {curves.TITLES[name]}, by strength; at {strength:g} {curves.unit(name)}: "
        f"{listed}"
    )


def pick_run(method: str, cell: CellResults) -> RunResult:
    """Draws the run of a method for Figure 4 (appendix A.3), always the same one.

    Args:
        method: Its name; the draws for methods are independent of each other.
        cell: The chosen cell, with at least one finished run.
    """
    rng = np.random.default_rng([SEED, list(LABELS).index(method)])
    return cell.finished[rng.integers(len(cell.finished))]


def _training(sweeps: Sequence[SweepResults], out: Path) -> list[str]:
    pictures = []
    for number, results in enumerate(sweeps, start=1):
        if results.chosen and results.validated:
            losses = {
                LABELS[method]: np.stack([run.curve("val_loss") for run in cell.finished])
                for method, cell in results.chosen.items()
            }
            name = "training.svg" if number == 1 else f"training_{number}.svg"
            figures.training_figure({results.label: losses}, out / name)
            last = {method: loss[:, -1].mean() for method, loss in losses.items()}
            best = min(last, key=lambda method: last[method])
            pictures.append(
                f"![Validation loss by epoch; after the last the lowest is {best}'s, "
                f"{last[best]:.4f}]({name})"
            )
    if not pictures:
        return []
    return [
        "## Training",
        "Data loss on the validation split after each epoch: mean over the repeats of the cells of "
        "Table 1, and a band of one standard deviation.",
        "\n".join(pictures),
    ]


def _robustness(leads: Sequence[_Lead], out: Path) -> list[str]:
    """Figures 3 and 4, from the runs of the chosen cells that evaluate.py has evaluated."""
    perturbed: list[Evaluation] = []
    measured: dict[str, list[Evaluation]] = {name: [] for name in POINTWISE}
    commands, picked = [], []
    for results, judged in leads:
        commands += _evaluation_command(results, judged)
        perturbed += answer.evaluations(results, judged)
        for method, cell in results.chosen.items():
            run = pick_run(method, cell)
            result = judged.get(run.folder.path, {})
            name = tables.code(run.folder.path.name)
            for kind, evaluations in measured.items():
                if kind in result:
                    evaluations.append(Evaluation(results.label, LABELS[method], result))
            line = f"- {tables.plain(results.label)}, {LABELS[method]}: {name}"
            if "boundary" not in result:
                line += ", not in the figure: its distances are not measured yet"
            picked.append(line)
    blocks = ["## Robustness (Figure 3)"]
    if commands:
        blocks += [
            "**Not all runs of the cells of Table 1 are judged by everything.** Figures 3 and 4 "
            "leave out what is missing. To judge them:",
            tables.fence("\n".join(commands)),
        ]
    return [*blocks, *_figure_3(perturbed, out), *_figure_4(picked, measured, out)]


def _figure_3(judged: Sequence[Evaluation], out: Path) -> list[str]:
    names = [name for name in PERTURBATIONS if any(name in e.result for e in judged)]
    judged = [e for e in judged if any(name in e.result for name in names)]
    if not names:
        return []
    pictures, shown = [], []
    for name in names:
        figures.robustness_figure(judged, [name], out / f"robustness_{name}.svg")
        pictures.append(f"![{_drop(judged, name)}](robustness_{name}.svg)")
        shown += evaluation_tables.robustness_tables(judged, [name])
    blocks = [
        "Accuracy on clean test images minus the accuracy on perturbed ones: mean over the "
        "evaluated repeats of the cells of Table 1, with a band of one standard deviation.",
        "\n".join(pictures),
        *_markdown(shown),
    ]
    if any(_fades(e.result[name]) for e in judged for name in names if name in e.result):
        blocks.insert(1, FADED)
    return blocks


def _drop(judged: Sequence[Evaluation], name: str) -> str:
    """Which method loses least, and which most, at the greatest strength."""
    texts = []
    for dataset, found in curves.curves(judged, name).items():
        lost = {m: 100 * (c.clean - c.accuracy[:, -1]).mean() for m, c in found.items()}
        low, high = (best(lost, key=lambda m: lost[m]) for best in (min, max))
        texts.append(
            f"{dataset}: at the greatest strength {low} loses the least, {lost[low]:.1f} points, "
            f"{high} the most, {lost[high]:.1f}"
        )
    return tables.plain(f"Accuracy drop under {curves.TITLES[name]}. {'; '.join(texts)}")


def _markdown(shown: Iterable[evaluation_tables.Table]) -> list[str]:
    blocks = []
    for table in shown:
        rows = [[tables.plain(cell) for cell in row] for row in table.rows]
        blocks.append(f"{tables.plain(table.title)}:")
        if rows:
            blocks.append(tables.table(table.head, rows))
        if table.note:
            blocks.append(tables.plain(table.note))
    return blocks


def _fades(curve: dict[str, Any]) -> bool:
    return max(curve.get("faded", [0])) >= curves.FADED


def _figure_4(picked: Sequence[str], measured: dict[str, list[Evaluation]], out: Path) -> list[str]:
    """For one run of each method: both distances, sigma, and how they compare at each point."""
    if not any(measured.values()):
        return []
    blocks = [
        "## Distance to the decision boundary (Figure 4)",
        f"One repeat of each cell of Table 1, drawn at random with a fixed seed ({SEED}), at "
        "the test images that all runs shown classify correctly:",
        "\n".join(picked),
    ]
    if measured["boundary"]:
        distributions.boundary_figure(measured["boundary"], out / "boundary.svg")
        shown = evaluation_tables.distance_tables(measured["boundary"])
        if _has_rows(shown):
            blocks.append(
                f"![Share of the points with a boundary within a distance; {_medians(shown)}]"
                "(boundary.svg)"
            )
        blocks += _markdown(shown)
    if measured["distance"]:
        distributions.distance_figure(measured["distance"], out / "distance.svg")
        shown = evaluation_tables.distance_tables(measured["distance"], "distance")
        blocks += ["## The nearest adversarial image", NEAREST]
        if _has_rows(shown):
            blocks.append(
                f"![Share of the points with another class within a distance; {_medians(shown)}]"
                "(distance.svg)"
            )
        blocks += _markdown(shown)
    if measured["sigma"]:
        distributions.sigma_figure(measured["sigma"], out / "sigma.svg")
        shown = evaluation_tables.sigma_tables(measured["sigma"])
        blocks += [
            "## Sigma at the test images",
            "The exact spectral norm of the classifier's Jacobian at all points of the same runs, "
            "in logits per pixel unit: Table 1's sigma over the standard deviation of the pixels.",
            f"![Share of the points with at most some sigma; {_medians(shown)}](sigma.svg)",
            *_markdown(shown),
        ]
    whole = [e for e in measured["distance"] if _has(e.result, POINTWISE)]
    ratios = evaluation_tables.ratio_tables(whole)
    if ratios:
        blocks += [RATIOS, *_markdown(ratios)]
    return blocks


def _has_rows(shown: Iterable[evaluation_tables.Table]) -> bool:
    return any(table.rows for table in shown)


def _medians(shown: Sequence[evaluation_tables.Table]) -> str:
    """The medians of tables of quantiles, for the alternative text of their figure."""
    texts = [f"{row[0]} {row[table.head.index('50 %')]}" for table in shown for row in table.rows]
    return tables.plain(f"medians: {', '.join(texts)}")


def _has(result: Mapping[str, Any], names: Iterable[str]) -> bool:
    return all(name in result for name in names)


def _evaluation_command(results: SweepResults, judged: dict[Path, dict[str, Any]]) -> list[str]:
    """The command that evaluates the runs by all that the sweep names, or by everything."""
    wanted = results.sweep.judgement.names or (*PERTURBATIONS, *POINTWISE)
    lacking = [
        str(run.folder.path)
        for cell in results.chosen.values()
        for run in cell.finished
        if not _has(judged.get(run.folder.path, {}), wanted)
    ]
    if not lacking or results.sweep.final:
        return []
    options = [f"--{name}" for name in POINTWISE if name in wanted]
    attacks = [name for name in PERTURBATIONS if name in wanted]
    if len(attacks) < len(PERTURBATIONS):
        options = ["--attacks", *attacks, *options]
    images = results.sweep.judgement.limit or IMAGES
    limits = next(map(judgements.limits, judged.values()), ["--limit", str(images)])
    return [shlex.join(["python", "evaluate.py", *lacking, *options, *limits])]


def _cost(benchmarks: Path, out: Path) -> list[str]:
    """Figure 5: step times of several batch sizes, and the errors of the estimators."""
    blocks = ["## Time and error (Figure 5)"]
    pictures, measured = [], []
    for path in sorted(benchmarks.glob("step_time*.json")):
        content = files.read_json(path)
        with _errors_name(path, "step_time.py"):
            if len(content["batch_size"]) > 1:
                figures.step_time_figure([content], out / f"{path.stem}.svg")
                measured.append(tables.code(path.name))
                pictures.append(f"![{_step_times(content)}]({path.stem}.svg)")
    if pictures:
        blocks += [
            f"The time of a training step against the batch size ({', '.join(measured)}). The "
            "paper measured on an NVIDIA K80.",
            "\n".join(pictures),
        ]
    else:
        target = benchmarks / "step_time_lenet.json"
        blocks += [
            f"There are no step times of several batch sizes in {tables.code(str(benchmarks))}. To "
            "measure them:",
            tables.fence(f"python benchmarks/step_time.py --json {target}"),
        ]
    target = benchmarks / "estimator_error.json"
    if target.exists():
        content = files.read_json(target)
        with _errors_name(target, "estimator_error.py"):
            figures.estimator_error_figure(content, out / "estimator_error.svg")
        blocks += [
            f"The relative error of sigma against the products spent (`{target.name}`).",
            "![Relative error of sigma: the more products an estimator spends, the nearer it comes]"
            "(estimator_error.svg)",
        ]
    else:
        command = f"python benchmarks/estimator_error.py --runs runs/estimators --json {target}"
        blocks += [
            f"There are no errors of the estimators in {tables.code(str(benchmarks))}. To measure "
            "them:",
            tables.fence(command),
        ]
    return blocks


def _step_times(content: Mapping[str, Any]) -> str:
    size = min(content["batch_size"], key=int)
    rows = content["batch_size"][size]
    text = f"Seconds per training step against the batch size, {content['settings']['network']}"
    if {"plain", "power_1"} <= rows.keys():
        ratio = rows["power_1"]["seconds"] / rows["plain"]["seconds"]
        text += f"; at batch {size} a step with SpectralNorm takes {ratio:.1f} times a plain one"
    return tables.plain(text)


@contextlib.contextmanager
def _errors_name(path: Path, script: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must be as benchmarks/{script} writes it. Received: {error!r}. Run it again."
        ) from error
