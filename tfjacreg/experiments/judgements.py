"""Reads what `evaluate.py` measured on the runs of a sweep's chosen cells."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.selection import SweepResults


def read(results: SweepResults) -> dict[Path, dict[str, Any]]:
    """Reads the evaluations of the finished runs of the chosen cells, by run folder.

    Raises:
        ValueError: If one is damaged, belongs to another classifier, or has other settings than the
            others; the message names the file.
    """
    judged = {}
    for cell in results.chosen.values():
        for run in cell.finished:
            result = run.folder.read_evaluation()
            if result is not None:
                _check(run.folder, result)
                judged[run.folder.path] = result
    _refuse_other_settings(judged)
    return judged


def limits(result: dict[str, Any]) -> list[str]:
    """The options of `evaluate.py` with which an evaluation was made."""
    settings = result["settings"]
    return ["--limit", f"{settings['images']:d}", "--seed", f"{settings['seed']:d}"]


def _refuse_other_settings(judged: dict[Path, dict[str, Any]]) -> None:
    """Compares the settings that all evaluations have; earlier versions had fewer measures."""
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


def _check(folder: FolderReader, result: dict[str, Any]) -> None:
    path, classifier = folder.evaluation_file, folder.classifier_file
    try:
        digest = result["settings"]["classifier_sha256"]
        limits(result)
        if "clean_accuracy" not in result:
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
