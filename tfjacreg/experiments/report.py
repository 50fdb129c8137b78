"""The report of one or several sweeps: Table 1, Figures 3 to 5, and what is missing from them."""

from __future__ import annotations

import contextlib
import itertools
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfjacreg import atomic_files
from tfjacreg.experiments import (
    curves,
    distributions,
    figures,
    files,
    html,
    selection,
    tables,
)
from tfjacreg.experiments.curves import Evaluation
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.measures import PERTURBATIONS, POINTWISE
from tfjacreg.experiments.selection import LABELS, CellResults, RunResult, SweepResults

# The seed that draws the runs of Figure 4, and how many images the runs should be judged on.
SEED = 0
IMAGES = 2000

FADED = f"""\
Open marks, and stars in the table: on {100 * curves.FADED:g} % of the images or more the attack had
lost its gradient, because the cross entropy rounds to 0 where logits are large. These images count
as right, but they were not tested. Judge by PGD on the margin and by Square there."""
NEAREST = """\
Of the same runs, the distance to the nearest adversarial image that a search from the linearised
classifier found in the pixel range: an upper bound of the distance to the nearest one. Dashed: the
distance along random directions of Figure 4."""
RATIOS = """\
Both distances at each point, and what the margin and sigma alone would give. No step from a margin
`m` to the boundary is shorter than `m / (sqrt(2) sigma)` as long as sigma stays what it is at the
point. Nothing says that it does, so that number is no certificate: where the last ratio is below 1,
an image of another class was found nearer."""


def write(folders: Sequence[Path], out: Path, *, benchmarks: Path) -> Path:
    """Writes `report.md`, its pictures and `report.html`, which needs none of the other files.

    Args:
        folders: Folders of sweeps, each with its `sweep.toml`.
        out: Folder of the report; made if needed.
        benchmarks: Folder with results of `benchmarks/step_time.py` (`step_time*.json`) and
            `benchmarks/estimator_error.py` (`estimator_error.json`), for Figure 5; what is not
            there is said in the report.

    Returns:
        The path of `report.html`.

    Raises:
        ValueError: If a folder is no sweep's or comes twice, a run in it has other settings than
            planned, or a file is damaged; the message names the file.
        OSError: If the report cannot be written.
    """
    atomic_files.check_files(out / "report.md", out / "report.html")
    sweeps = selection.read(folders)
    command = shlex.join(["python", "-m", "tfjacreg", "report", *map(str, folders)])
    blocks = [
        f"# Jacobian regularization: {', '.join(tables.plain(s.label) for s in sweeps)}",
        f"Written by {tables.code(command)}.",
        "## Accuracy (Table 1)",
        tables.TABLE_1,
    ]
    if not all(results.validated for results in sweeps):
        blocks.append(tables.WHOLE_TRAINING_SET)
    for results in sweeps:
        blocks += [
            f"### {tables.plain(results.label)}",
            tables.setting(results),
            tables.table_1(results),
        ]
        if results.chosen:
            blocks += ["The cells of this table:", tables.chosen_cells(results)]
        if differences := tables.differences(results):
            blocks += [f"The differences between them. {tables.DIFFERENCES}", differences]
        blocks += tables.missing(results)
    blocks += [*_training(sweeps, out), *_robustness(sweeps, out), *_cost(benchmarks, out)]
    blocks += ["## All cells", tables.ALL_CELLS]
    for results in sweeps:
        blocks += [f"### {tables.plain(results.label)}", tables.all_cells(results)]
    blocks += ["## Runs and machines", *map(tables.machines, sweeps)]
    text = "\n\n".join(blocks) + "\n"
    for name, content in (("report.md", text), ("report.html", html.render(text, out))):
        with atomic_files.replacing(out / name) as file:
            file.write_text(content, encoding="utf-8")
    return out / "report.html"


def pick_run(method: str, cell: CellResults) -> RunResult:
    """Picks at random the run that Figure 4 shows of a method (appendix A.3), always the same.

    Args:
        method: Its name; the choices for methods are independent of each other.
        cell: The cell that stands for it, with at least one finished run.
    """
    rng = np.random.default_rng([SEED, list(LABELS).index(method)])
    return cell.finished[rng.integers(len(cell.finished))]


def _training(sweeps: Sequence[SweepResults], out: Path) -> list[str]:
    losses = {
        results.label: {
            LABELS[method]: np.stack([run.curve("val_loss") for run in cell.finished])
            for method, cell in results.chosen.items()
        }
        for results in sweeps
        if results.chosen and results.validated
    }
    if not losses:
        return []
    figures.training_figure(losses, out / "training.png")
    return [
        "## Training",
        "Data loss on the validation split after each epoch: mean over the repeats of the cells of "
        "Table 1, and a band of one standard deviation.",
        "![Validation loss against the epoch, by method](training.png)",
    ]


def _robustness(sweeps: Sequence[SweepResults], out: Path) -> list[str]:
    """Figures 3 and 4, from those runs of the chosen cells that evaluate.py has judged."""
    perturbed: list[Evaluation] = []
    measured: dict[str, list[Evaluation]] = {name: [] for name in POINTWISE}
    commands, picked = [], []
    for results in sweeps:
        judged = _judged(results)
        commands += _evaluation_command(results, judged)
        for method, cell in results.chosen.items():
            for run in cell.finished:
                result = judged.get(run.folder.path, {})
                perturbed.append(Evaluation(results.label, LABELS[method], result))
            run = pick_run(method, cell)
            result = judged.get(run.folder.path, {})
            name = tables.code(run.folder.path.name)
            line = f"- {tables.plain(results.label)}, {LABELS[method]}: {name}"
            for kind, evaluations in measured.items():
                if kind in result:
                    evaluations.append(Evaluation(results.label, LABELS[method], result))
            if "boundary" not in result:
                line += ", not in the figure: its distances are not measured yet"
            picked.append(line)
    blocks = ["## Robustness (Figure 3)"]
    if commands:
        blocks += [
            "**Not all runs of the cells of Table 1 are judged yet.** Figures 3 and 4 leave out "
            "what is missing. To judge them:",
            tables.fence("\n".join(commands)),
        ]
    return [*blocks, *_figure_3(perturbed, out), *_figure_4(picked, measured, out)]


def _figure_3(judged: Sequence[Evaluation], out: Path) -> list[str]:
    names = [name for name in PERTURBATIONS if any(name in e.result for e in judged)]
    judged = [e for e in judged if any(name in e.result for name in names)]
    if not names:
        return []
    figures.robustness_figure(judged, names, out / "robustness.png")
    blocks = [
        "Accuracy on clean test images less that on perturbed ones: mean over the judged repeats "
        "of the cells of Table 1, and a band of one standard deviation.",
        f"![Accuracy drop against the strength of {len(names)} perturbations](robustness.png)",
        tables.fence(curves.robustness_table(judged, names)),
    ]
    if any(_fades(e.result[name]) for e in judged for name in names if name in e.result):
        blocks.insert(1, FADED)
    return blocks


def _fades(curve: dict[str, Any]) -> bool:
    return max(curve.get("faded", [0])) >= curves.FADED


def _figure_4(picked: Sequence[str], measured: dict[str, list[Evaluation]], out: Path) -> list[str]:
    """Of one run of each method: both distances, sigma, and how they compare at each point."""
    blocks = ["## Distance to the decision boundary (Figure 4)"]
    if picked:
        blocks += [
            f"One repeat of each cell of Table 1, drawn at random with a fixed seed ({SEED}), at "
            "the test images that all runs shown classify correctly:",
            "\n".join(picked),
        ]
    if measured["boundary"]:
        distributions.boundary_figure(measured["boundary"], out / "boundary.png")
        blocks += [
            "![Share of the points with a boundary within a distance](boundary.png)",
            tables.fence(curves.distance_table(measured["boundary"])),
        ]
    if measured["distance"]:
        distributions.distance_figure(measured["distance"], out / "distance.png")
        blocks += [
            "## The nearest adversarial image",
            NEAREST,
            "![Share of the points with another class within a distance](distance.png)",
            tables.fence(curves.distance_table(measured["distance"], "distance")),
        ]
    if measured["sigma"]:
        distributions.sigma_figure(measured["sigma"], out / "sigma.png")
        blocks += [
            "## Sigma at the test images",
            "The exact spectral norm of the classifier's Jacobian at all points of the same runs, "
            "in logits per pixel unit: Table 1's sigma over the standard deviation of the pixels.",
            "![Share of the points with at most some sigma](sigma.png)",
            tables.fence(curves.sigma_table(measured["sigma"])),
        ]
    whole = [e for e in measured["distance"] if _has(e.result, POINTWISE)]
    if whole:
        blocks += [RATIOS, tables.fence(curves.ratio_table(whole))]
    return blocks


def _judged(results: SweepResults) -> dict[Path, dict[str, Any]]:
    """The evaluations of the finished runs of the chosen cells, by run folder."""
    judged = {}
    for cell in results.chosen.values():
        for run in cell.finished:
            result = run.folder.read_evaluation()
            if result is not None:
                _check_evaluation(run.folder, result)
                judged[run.folder.path] = result
    _refuse_other_settings(judged)
    return judged


def _refuse_other_settings(judged: dict[Path, dict[str, Any]]) -> None:
    """Compares the settings that evaluations share; earlier versions had fewer measures."""
    for folder, other in itertools.combinations(judged, 2):
        one, two = judged[folder]["settings"], judged[other]["settings"]
        shared = one.keys() & two.keys() - {"classifier_sha256"}
        different = sorted(name for name in shared if one[name] != two[name])
        if different:
            raise ValueError(
                "Evaluations that are compared must have equal settings. Received: "
                f"{FolderReader(folder).evaluation_file} and "
                f"{FolderReader(other).evaluation_file}, which differ in {different}. Judge one of "
                "them again, with evaluate.py --overwrite."
            )


def _check_evaluation(folder: FolderReader, result: dict[str, Any]) -> None:
    path, classifier = folder.evaluation_file, folder.classifier_file
    try:
        digest = result["settings"]["classifier_sha256"]
        _limits(result)
        if not _has(result, ["clean_accuracy"]):
            raise KeyError("clean_accuracy")
    except KeyError as error:
        raise ValueError(
            f"{path} must be as evaluate.py writes it. Received: one without {error}. Judge that "
            "run again, with evaluate.py --overwrite."
        ) from error
    if folder.classifier_digest() not in (None, digest):
        raise ValueError(
            f"{path} must judge {classifier}. Received: an evaluation of another classifier. "
            "Judge that run again, with evaluate.py --overwrite."
        )


def _has(result: dict[str, Any], names: Iterable[str]) -> bool:
    return all(name in result for name in names)


def _limits(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    return ["--limit", f"{settings['images']:d}", "--seed", f"{settings['seed']:d}"]


def _evaluation_command(results: SweepResults, judged: dict[Path, dict[str, Any]]) -> list[str]:
    lacking = [
        str(run.folder.path)
        for cell in results.chosen.values()
        for run in cell.finished
        if not _has(judged.get(run.folder.path, {}), (*PERTURBATIONS, *POINTWISE))
    ]
    if not lacking:
        return []
    options = [f"--{name}" for name in POINTWISE]
    limits = next(map(_limits, judged.values()), ["--limit", str(IMAGES)])
    return [shlex.join(["python", "evaluate.py", *lacking, *options, *limits])]


def _cost(benchmarks: Path, out: Path) -> list[str]:
    """Figure 5: step times of several batch sizes, and the errors of the estimators."""
    blocks = ["## Time and error (Figure 5)"]
    times = {}
    for path in sorted(benchmarks.glob("step_time*.json")):
        content = files.read_json(path)
        with _errors_name(path, "step_time.py"):
            if len(content["batch_size"]) > 1:
                times[path.name] = content
    if times:
        with _errors_name(benchmarks / "step_time*.json", "step_time.py"):
            figures.step_time_figure(list(times.values()), out / "step_time.png")
        blocks += [
            "Left: the time of a training step against the batch size "
            f"({', '.join(map(tables.code, times))}). The paper measured on an NVIDIA K80.",
            "![Seconds per training step against the batch size](step_time.png)",
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
            figures.estimator_error_figure(content, out / "estimator_error.png")
        blocks += [
            f"Right: the relative error of sigma against the products spent (`{target.name}`).",
            "![Relative error of sigma against the products spent](estimator_error.png)",
        ]
    else:
        command = f"python benchmarks/estimator_error.py --runs runs/estimators --json {target}"
        blocks += [
            f"There are no errors of the estimators in {tables.code(str(benchmarks))}. To measure "
            "them:",
            tables.fence(command),
        ]
    return blocks


@contextlib.contextmanager
def _errors_name(path: Path, script: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must be as benchmarks/{script} writes it. Received: {error!r}. Run it again."
        ) from error
