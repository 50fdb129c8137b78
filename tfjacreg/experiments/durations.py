"""How long a sweep will take: from its finished runs, and by a guess for methods without one."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

from optuna.trial import TrialState

from tfjacreg.experiments import measures
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.ledger import Ledger

# The time of a run relative to one without a penalty, until a run of the method was timed. Most of
# it is steps; docs/cost.md has their times.
_GUESSED = {
    "none": 1.0,
    "weight_decay": 1.0,
    "spectral_bound": 1.3,
    "frobenius": 2.2,
    "spectral": 2.2,
}


def timed(ledger: Ledger) -> dict[str, float]:
    """The mean seconds of a run, for each method with a run that was not interrupted."""
    found: dict[str, list[float]] = {}
    for name, trial in ledger.latest().items():
        if trial.state == TrialState.COMPLETE and "seconds" in trial.user_attrs:
            method = ledger.configs[name].regularizer
            found.setdefault(method, []).append(trial.user_attrs["seconds"])
    return {method: statistics.fmean(values) for method, values in found.items()}


def of_runs(methods: Iterable[str], known: Mapping[str, float]) -> dict[str, float]:
    """The seconds of a run of each method: known ones, and guesses for the others.

    Args:
        methods: The methods.
        known: What `timed` returns; at least one method.
    """
    plain = statistics.fmean(seconds / _GUESSED[method] for method, seconds in known.items())
    return {method: known.get(method, plain * _GUESSED[method]) for method in methods}


def left(ledger: Ledger, test_images: int) -> float | None:
    """The seconds until all runs of the sweep are finished, including its second stage.

    It assumes the current number of workers. None until a run was timed.

    Args:
        ledger: The runs.
        test_images: The number of images in the test split.
    """
    known = timed(ledger)
    if not known:
        return None
    latest = ledger.latest()
    seconds = of_runs(ledger.sweep.methods, known)
    total, workers = 0.0, 0
    for name, config in ledger.configs.items():
        state = latest[name].state
        if not state.is_finished():
            done = FolderReader(ledger.out / name).count_epochs() / config.epochs
            total += seconds[config.regularizer] * (1 - min(done, 1))
        workers += state == TrialState.RUNNING
    final = ledger.sweep.final
    if final is not None:
        images = min(final.judgement.limit or test_images, test_images)
        judging = images * sum(map(measures.steps_per_image, final.judgement.names))
        judging *= _seconds_per_image(ledger)
        total += final.repeats * sum(value + judging for value in seconds.values())
    return total / max(workers, 1)


def _seconds_per_image(ledger: Ledger) -> float:
    """The seconds per image of a training step, for the method with the fastest steps so far."""
    return min(
        trial.user_attrs["step_seconds"] / ledger.configs[name].batch_size
        for name, trial in ledger.latest().items()
        if "step_seconds" in trial.user_attrs
    )


def shown(seconds: float) -> str:
    """A rough time: `"less than a minute"`, `"12 minutes"`, `"3.5 hours"`."""
    minutes = seconds / 60
    if minutes < 1:
        return "less than a minute"
    if minutes < 90:
        return f"{minutes:.0f} minute{'s' * (round(minutes) != 1)}"
    return f"{minutes / 60:.1f} hours"
