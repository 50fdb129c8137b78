"""How long a sweep will take: by its finished runs, and by guess for what has none yet."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

from optuna.trial import TrialState

from tfjacreg.experiments import measures
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.ledger import Ledger

# The time of a run beside one without a penalty, as long as no run of the method was timed. Most of
# it are steps; docs/cost.md has their times.
_GUESSED = {
    "none": 1.0,
    "weight_decay": 1.0,
    "spectral_bound": 1.3,
    "frobenius": 2.2,
    "spectral": 2.2,
}


def timed(ledger: Ledger) -> dict[str, float]:
    """The mean seconds of a run of each method that has one which was made in one go."""
    found: dict[str, list[float]] = {}
    for name, trial in ledger.latest().items():
        if trial.state == TrialState.COMPLETE and "seconds" in trial.user_attrs:
            method = ledger.configs[name].regularizer
            found.setdefault(method, []).append(trial.user_attrs["seconds"])
    return {method: statistics.fmean(values) for method, values in found.items()}


def of_runs(methods: Iterable[str], known: Mapping[str, float]) -> dict[str, float]:
    """The seconds of a run of each method: those that are known, and for the others a guess.

    Args:
        methods: The methods.
        known: What `timed` gives; at least one method.
    """
    plain = statistics.fmean(seconds / _GUESSED[method] for method, seconds in known.items())
    return {method: known.get(method, plain * _GUESSED[method]) for method in methods}


def left(ledger: Ledger, test_images: int) -> float | None:
    """The seconds until all runs of the sweep, its second stage among them, are finished.

    With as many workers as there are now. None as long as no run was timed.

    Args:
        ledger: The runs.
        test_images: How many images the test split has.
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
    """Of a training step of the method whose steps are the fastest so far."""
    return min(
        trial.user_attrs["step_seconds"] / ledger.configs[name].batch_size
        for name, trial in ledger.latest().items()
        if "step_seconds" in trial.user_attrs
    )


def shown(seconds: float) -> str:
    """A time that is only known about: `"less than a minute"`, `"12 minutes"`, `"3.5 hours"`."""
    minutes = seconds / 60
    if minutes < 1:
        return "less than a minute"
    if minutes < 90:
        return f"{minutes:.0f} minute{'s' * (round(minutes) != 1)}"
    return f"{minutes / 60:.1f} hours"
