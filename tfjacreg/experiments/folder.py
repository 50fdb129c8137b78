"""Writes a run folder.

`config.json` is written first and names the run that the folder belongs to. After each epoch
`history.csv` gets a line and `checkpoint.keras` the whole training state, with the history that
belongs to it. `metrics.json` comes last, after `classifier.keras` and `saved_model/`, with the
digests of all of them: a folder that has it holds a finished run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tfjacreg import atomic_files
from tfjacreg.experiments import checkpoint, files, folder_lock, records
from tfjacreg.experiments.config import RunConfig, RunError
from tfjacreg.experiments.environment import environment
from tfjacreg.experiments.folder_reader import CLEARING, SETTINGS_DIGEST, FolderReader, digest


class RunFolder:
    """The folder of one run: its lock, and the writers of its files.

    Attributes:
        path: The folder.
        reader: The reader of its files.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.reader = FolderReader(path)

    # --- which run the folder belongs to ---

    @contextlib.contextmanager
    def owned(self, *, wait: bool = False) -> Iterator[None]:
        """Keeps every other process out, and removes what a killed one left.

        Args:
            wait: Whether to wait for a process that has the folder.

        Raises:
            RunError: If another process has it, or it cannot be written.
        """
        with folder_lock.owned(self.path, wait=wait):
            self.clear_temporaries()
            yield

    def clear_temporaries(self) -> None:
        """Removes what a killed process had begun; the folder must be owned."""
        with self._write_errors_as_run_errors():
            for file in atomic_files.left_in(self.path):
                atomic_files.remove(file)

    @property
    def untidy(self) -> bool:
        """Whether a process that worked here was killed, or is still at work."""
        begun = any(file.exists() for file in atomic_files.left_in(self.path))
        spent = self.reader.finished and self.reader.checkpoint_file.exists()
        return begun or spent or folder_lock.left_in(self.path)

    def claim(self, config: RunConfig, *, overwrite: bool = False) -> None:
        """Makes it the folder of this configuration. It must be `owned`.

        With `overwrite` the files of the run that was there are removed, and nothing else in the
        folder. At every moment the folder belongs as a whole to that run or to this one.

        Args:
            config: The settings.
            overwrite: Whether to start anew, whichever run the folder belongs to.

        Raises:
            RunError: If it is the folder of another run, or cannot be written.
        """
        reader = self.reader
        if not overwrite:
            reader.check_claim(config)
        settings = {**dataclasses.asdict(config), "environment": environment()}
        with self._write_errors_as_run_errors():
            if overwrite or reader.is_clearing:
                files.write_json(reader.config_file, {**settings, CLEARING: True})
                for file in (*reader.products, reader.error_file):
                    atomic_files.remove(file)
                files.write_json(reader.config_file, settings)
            elif not reader.claimed:
                files.write_json(reader.config_file, settings)

    def note_environment(self) -> None:
        """Writes this process's environment into the settings; raises RunError.

        This is for a run without a finished epoch: all of its epochs will be trained here.
        """
        settings = self.reader.read_config()
        if settings.get("environment") != environment():
            with self._write_errors_as_run_errors():
                # Of the file as it is: a setting that did not exist then must not be added.
                content = files.read_json(self.reader.config_file)
                files.write_json(self.reader.config_file, {**content, "environment": environment()})

    # --- writers: an existing file stays until the new one is complete ---

    def write_epoch(self, history: Sequence[dict[str, float]], model: keras.Model) -> None:
        """Saves the figures and the training state of a finished epoch.

        Args:
            history: A row per epoch so far.
            model: The model in training.

        Raises:
            RunError: If a file cannot be written.
        """
        text = records.history_text(history)
        note = {"settings": self.reader.settings_digest, "history": text}
        with self._write_errors_as_run_errors():
            # The checkpoint comes last: rows beyond it are dropped when a run continues.
            with atomic_files.replacing(self.reader.history_file) as file:
                file.write_bytes(text.encode())
            with atomic_files.replacing(self.reader.checkpoint_file) as file:
                checkpoint.save(model, file, note)

    def write_result(self, classifier: keras.Model, metrics: dict[str, Any]) -> dict[str, Any]:
        """Finishes the run.

        Args:
            classifier: From pixels in [0, 1] to logits.
            metrics: The figures.

        Returns:
            The content of `metrics.json`: the figures, and digests of what belongs to them.

        Raises:
            RunError: If a file cannot be written.
        """
        reader = self.reader
        with self._write_errors_as_run_errors():
            with atomic_files.replacing(reader.classifier_file) as file:
                classifier.save(file)
            with atomic_files.replacing(reader.saved_model) as folder:
                classifier.export(folder, verbose=False)
            products = [reader.history_file, reader.classifier_file, reader.saved_model]
            digests = {file.name: digest(file) for file in products if file.exists()}
            digests[SETTINGS_DIGEST] = reader.settings_digest
            content = files.sealed({**metrics, "files": digests})
            files.write_json(reader.metrics_file, content)
            reader.checkpoint_file.unlink(missing_ok=True)
        return content

    def tidy(self) -> None:
        """Removes what a killed process left in a finished run's folder, unless one is at work."""
        with contextlib.suppress(RunError), self.owned():
            if self.reader.finished:
                self.reader.checkpoint_file.unlink(missing_ok=True)

    def write_evaluation(self, content: dict[str, Any]) -> None:
        """Saves what evaluate.py has measured so far; raises OSError if that fails."""
        files.write_json(self.reader.evaluation_file, files.sealed(content))

    def write_error(self, log: str) -> None:
        """Saves the log of a failed run; raises OSError if that fails."""
        with atomic_files.replacing(self.reader.error_file) as file:
            file.write_text(log)

    def clear_error(self) -> None:
        """Removes the log of an earlier failure."""
        self.reader.error_file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _write_errors_as_run_errors(self) -> Iterator[None]:
        try:
            yield
        # TensorFlow's writers raise errors of their own kinds.
        except (OSError, tf.errors.OpError) as error:
            raise RunError(
                f"Cannot write the run folder {self.path}: {error}. Choose a writable --out."
            ) from error
