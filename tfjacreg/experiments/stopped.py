"""What to print after Ctrl-C: how much of the work is saved, where, and how to continue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tfjacreg.experiments import checkpoint
from tfjacreg.experiments.config import RunConfig, RunError
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.sweep import FINAL_FOLDER


def run(config: RunConfig, folder: Path, *, overwrite: bool) -> str:
    """What is saved of a run.

    Args:
        config: Its settings.
        folder: Its folder.
        overwrite: Whether the command was to throw away what was in the folder.
    """
    reader = FolderReader(folder)
    if not reader.claimed:
        return f"Stopped. Nothing was begun in {folder}."
    try:
        reader.check_claim(config)
    except RunError:
        return f"Stopped. {folder} is as it was."
    if reader.finished:
        return f"Stopped. The run in {folder} is finished."
    done = _epochs(reader)
    kept = f"Stopped. Kept in {folder}: {done} of {_counted(config.epochs, 'epoch')}."
    if not done:
        return f"{kept} The same command starts with the first."
    return f"{kept} {_again(overwrite)} goes on from the last finished epoch."


def sweep(folder: Path) -> str:
    """What is saved of a sweep.

    Args:
        folder: Its folder.
    """
    readers = [*FolderReader.all_in(folder), *FolderReader.all_in(folder / FINAL_FOLDER)]
    begun = [done for r in readers if not r.finished and (done := _epochs(r))]
    kept = _counted(sum(r.finished for r in readers), "finished run")
    if begun:
        kept += f", {_counted(sum(begun), 'epoch')} of {_counted(len(begun), 'other run')}"
    return f"Stopped. Kept in {folder}: {kept}. The same command goes on from there."


def evaluation(folders: Sequence[Path], names: Sequence[str], *, overwrite: bool) -> str:
    """What is saved of the evaluations of some runs.

    Args:
        folders: The folders of their `evaluation.json`.
        names: The measures asked for.
        overwrite: Whether the command was to throw away earlier measurements.
    """
    if not folders:
        return "Stopped. Nothing was begun."
    readers = list(map(FolderReader, folders))
    done = sum(len({*names} & {*(reader.read_evaluation() or {})}) for reader in readers)
    place = readers[0].evaluation_file if len(readers) == 1 else "their folders"
    measurements = _counted(len(names) * len(readers), "measurement")
    kept = f"Stopped. Kept in {place}: {done} of {measurements}."
    return f"{kept} {_again(overwrite)} goes on after the last one."


def _again(overwrite: bool) -> str:
    return "The same command" + " without --overwrite" * overwrite


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _epochs(reader: FolderReader) -> int:
    """The number of saved epochs of a run; the history may have one line more than the state."""
    if not reader.checkpoint_file.exists():
        return 0
    history = str(checkpoint.read_note(reader.checkpoint_file).get("history"))
    return max(history.count("\n") - 1, 0)
