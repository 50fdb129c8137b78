"""A run folder: the names, the readers and the writers of all its files.

`config.json` is written first and says whose the folder is. After each epoch `history.csv` gets a
line and `checkpoint.keras` the whole training state, with the history that belongs to it.
`metrics.json` comes last, after `classifier.keras` and `saved_model/`, with the digests of all of
them: a folder that has it is that of a finished run.
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
from tfjacreg.experiments.reading import CLEARING, SETTINGS_DIGEST, FolderReader, digest


class RunFolder(FolderReader):
    """The files of one run. A reader raises `RunError` where a file is not what was written.

    Attributes:
        path: The folder.
        config_file: Settings and environment.
        history_file: A line of figures per epoch.
        checkpoint_file: The training state after the last finished epoch, until the run finishes.
        classifier_file: From pixels in [0, 1] to logits.
        saved_model: The same as a TensorFlow SavedModel; a folder.
        metrics_file: The figures of the finished run.
        evaluation_file: What evaluate.py measured.
        examples_file: Images before and after an attack.
        error_file: Why a run of a sweep failed.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.history_file = self.path / "history.csv"
        self.checkpoint_file = self.path / "checkpoint.keras"
        self.classifier_file = self.path / "classifier.keras"
        self.saved_model = self.path / "saved_model"
        self.metrics_file = self.path / "metrics.json"
        self.evaluation_file = self.path / "evaluation.json"
        self.examples_file = self.path / "adversarial_examples.png"
        self.error_file = self.path / "error.txt"

    @classmethod
    def all_in(cls, path: Path) -> list[RunFolder]:
        """The run folders that lie in a folder, by name."""
        return sorted((f for f in map(cls, path.glob("*")) if f.claimed), key=lambda f: f.path)

    # --- whose the folder is, and how far the run has come ---

    @contextlib.contextmanager
    def owned(self, *, wait: bool = False) -> Iterator[None]:
        """Keeps every other process out, and clears what a killed one left.

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
        """Whether a process that worked here was killed, or is here now."""
        begun = any(file.exists() for file in atomic_files.left_in(self.path))
        spent = self.finished and self.checkpoint_file.exists()
        return begun or spent or folder_lock.left_in(self.path)

    def check_claim(self, config: RunConfig) -> None:
        """Refuses the folder of another run.

        Args:
            config: The settings.

        Raises:
            RunError: If it is the folder of another configuration, has a run's files without its
                settings, or its settings are damaged.
        """
        if self.claimed:
            self.check_settings(
                config, "Choose another --out, or --overwrite to throw that run away."
            )
            return
        ownerless = [file.name for file in self._products if file.exists()]
        if ownerless:
            raise RunError(
                f"{self.path} must be empty or have a config.json, which says whose its files are. "
                f"Received: {ownerless} without. Choose another --out, or --overwrite to throw "
                "them away."
            )

    def claim(self, config: RunConfig, *, overwrite: bool = False) -> None:
        """Makes it the folder of this configuration. It must be `owned`.

        With `overwrite` the files of the run that was there go, and nothing else that may lie in
        the folder. At every moment it is either the folder of that run, whole, or of this one.

        Args:
            config: The settings.
            overwrite: Whether to start anew, whosever the folder is.

        Raises:
            RunError: If it is the folder of another run, or cannot be written.
        """
        if not overwrite:
            self.check_claim(config)
        settings = {**dataclasses.asdict(config), "environment": environment()}
        with self._write_errors_as_run_errors():
            if overwrite or self.is_clearing:
                files.write_json(self.config_file, {**settings, CLEARING: True})
                for file in (*self._products, self.error_file):
                    atomic_files.remove(file)
                files.write_json(self.config_file, settings)
            elif not self.claimed:
                files.write_json(self.config_file, settings)

    @property
    def _products(self) -> tuple[Path, ...]:
        return (
            self.metrics_file,
            self.evaluation_file,
            self.examples_file,
            self.classifier_file,
            self.saved_model,
            self.checkpoint_file,
            self.history_file,
        )

    # --- writers: what was there before stays until the new file is whole ---

    def write_epoch(self, history: Sequence[dict[str, float]], model: keras.Model) -> None:
        """Keeps the figures and the training state of a finished epoch.

        Args:
            history: A row per epoch so far.
            model: The model that is trained.

        Raises:
            RunError: If a file cannot be written.
        """
        text = records.history_text(history)
        note = {"settings": self.settings_digest, "history": text}
        with self._write_errors_as_run_errors():
            # The checkpoint comes last: rows beyond it are dropped when a run goes on.
            with atomic_files.replacing(self.history_file) as file:
                file.write_bytes(text.encode())
            with atomic_files.replacing(self.checkpoint_file) as file:
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
        with self._write_errors_as_run_errors():
            with atomic_files.replacing(self.classifier_file) as file:
                classifier.save(file)
            with atomic_files.replacing(self.saved_model) as folder:
                classifier.export(folder, verbose=False)
            products = [self.history_file, self.classifier_file, self.saved_model]
            digests = {file.name: digest(file) for file in products if file.exists()}
            digests[SETTINGS_DIGEST] = self.settings_digest
            content = files.sealed({**metrics, "files": digests})
            files.write_json(self.metrics_file, content)
            self.checkpoint_file.unlink(missing_ok=True)
        return content

    def tidy(self) -> None:
        """Clears a finished run's folder of what a killed process left, unless one is here now."""
        with contextlib.suppress(RunError), self.owned():
            if self.finished:
                self.checkpoint_file.unlink(missing_ok=True)

    def write_evaluation(self, content: dict[str, Any]) -> None:
        """Keeps what evaluate.py has measured so far; raises OSError if that fails."""
        files.write_json(self.evaluation_file, files.sealed(content))

    def write_error(self, log: str) -> None:
        """Keeps the log of a failed run; raises OSError if that fails."""
        with atomic_files.replacing(self.error_file) as file:
            file.write_text(log)

    def clear_error(self) -> None:
        """Forgets an earlier failure."""
        self.error_file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _write_errors_as_run_errors(self) -> Iterator[None]:
        try:
            yield
        # TensorFlow's writers have errors of their own.
        except (OSError, tf.errors.OpError) as error:
            raise RunError(
                f"Cannot write the run folder {self.path}: {error}. Choose a writable --out."
            ) from error
