"""A run folder: the names, the readers and the writers of all its files.

`config.json` is written first and says whose the folder is. After each epoch `history.csv` gets a
line and `checkpoint.keras` the whole training state. `metrics.json` comes last, after
`classifier.keras` and `saved_model/`: a folder that has it is that of a finished run.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras

from tfjacreg.experiments import files
from tfjacreg.experiments.config import EARLIER, RunConfig, RunError
from tfjacreg.experiments.environment import environment

_AGAIN = "Train that run again, with train.py --overwrite."
# What every config.json says, since the first version.
_SETTINGS = {"dataset", "network", "regularizer", "factor", "seed", "data_dir"}
# Keys into metrics.json.
_Keys = tuple[str, ...]
_NUMBERS: tuple[_Keys, ...] = (
    ("lowest_test_loss", "test_loss"),
    ("lowest_test_loss", "test_accuracy"),
    ("test_accuracy",),
    ("test_loss",),
    ("test_spectral_norm",),
    ("step_seconds",),
)
_VALIDATION_NUMBERS: tuple[_Keys, ...] = (
    ("val_loss",),
    ("lowest_val_loss", "test_accuracy"),
)


class RunFolder:
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

    @property
    def claimed(self) -> bool:
        """Whether it is the folder of some run."""
        return self.config_file.exists()

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return self.metrics_file.exists()

    @property
    def problem(self) -> str | None:
        """None if the run has finished; else why not, in a few words."""
        if self.claimed and self.finished:
            return None
        if self.error_file.exists():
            # Of a traceback the last line is the error itself.
            lines = self.error_file.read_text(errors="replace").strip().splitlines()
            return f"failed: {lines[-1] if lines else 'error.txt is empty'}"
        return "not finished" if self.path.exists() else "not started"

    def claim(self, config: RunConfig) -> None:
        """Makes it the folder of this configuration, or refuses if it is another's.

        Args:
            config: The settings.

        Raises:
            RunError: If it is the folder of another configuration, has a run's files without its
                settings, or cannot be written.
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
        settings = {**dataclasses.asdict(config), "environment": environment()}
        with self._write_errors_as_run_errors():
            files.write_json(self.config_file, settings)

    def check_settings(self, config: RunConfig, way_out: str) -> None:
        """Refuses the folder of another configuration.

        Args:
            config: The settings that are expected.
            way_out: What to do if they are not those of the folder; ends the message.

        Raises:
            RunError: If a setting differs or the file is damaged.
        """
        different = config.differences(self.read_config())
        if different:
            settings = ", ".join(
                f"{k} is {a!r} there, {b!r} here" for k, (a, b) in different.items()
            )
            raise RunError(
                f"{self.config_file} is that of a run with another configuration: {settings}. "
                f"{way_out}"
            )

    def clear(self) -> None:
        """Removes the run's files, and nothing else that may lie in the folder.

        Raises:
            RunError: If that fails.
        """
        # First what says that the run has finished, last whose it is: stopped in between, the
        # folder is still that of the old run, which has lost its results.
        with self._write_errors_as_run_errors():
            for file in self._products:
                if file == self.saved_model:
                    shutil.rmtree(file, ignore_errors=True)
                else:
                    file.unlink(missing_ok=True)
            self.error_file.unlink(missing_ok=True)
            self.config_file.unlink(missing_ok=True)

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

    # --- readers ---

    def read_config(self) -> dict[str, Any]:
        """The settings, and `environment`.

        Raises:
            RunError: If the file is missing or damaged.
        """
        content = self._read_json(self.config_file, "Use --overwrite to start anew.")
        lacking = sorted(_SETTINGS - content.keys())
        if lacking:
            raise RunError(f"{self.config_file} lacks {lacking}. Use --overwrite to start anew.")
        return content | {k: v for k, v in EARLIER.items() if k not in content}

    def read_metrics(self) -> dict[str, Any]:
        """The figures of the finished run.

        Raises:
            RunError: If the file is missing or damaged, or a number in it is not finite.
        """
        metrics = self._read_json(self.metrics_file, _AGAIN)
        numbers = _NUMBERS if self._on_whole_training_set else _VALIDATION_NUMBERS + _NUMBERS
        # Runs of version 0.1.0 did not record it.
        if "training_seconds" in metrics:
            numbers += (("training_seconds",),)
        for keys in numbers:
            value: Any = metrics
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise RunError(
                    f"{self.metrics_file} must hold a finite number as {'.'.join(keys)}. "
                    f"Received: {value!r}. {_AGAIN}"
                )
        return metrics

    def read_history(self) -> list[dict[str, float]]:
        """A row of figures per epoch.

        Raises:
            RunError: If the file is missing or damaged.
        """
        needed = ("step_seconds",) if self._on_whole_training_set else ("val_loss", "step_seconds")
        try:
            with self.history_file.open(newline="") as file:
                rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
            for number, row in enumerate(rows, start=1):
                for name in needed:
                    row[name]
                if row.setdefault("epoch", number) != number:
                    raise ValueError(f"epoch {row['epoch']:g} in line {number}")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{self.history_file} must hold a line of numbers per epoch, among them {needed}. "
                f"Received: {error!r}. {_AGAIN}"
            ) from error
        return [row | {"epoch": int(row["epoch"])} for row in rows]

    def count_epochs(self) -> int:
        """How many epochs the history has, at a glance; 0 if there is none."""
        try:
            return max(self.history_file.read_bytes().count(b"\n") - 1, 0)
        except FileNotFoundError:
            return 0

    def read_evaluation(self) -> dict[str, Any] | None:
        """What evaluate.py has measured so far; None if there is nothing.

        Raises:
            RunError: If the file is damaged.
        """
        if not self.evaluation_file.exists():
            return None
        return self._read_json(self.evaluation_file, "Judge that run again, with --overwrite.")

    def classifier_digest(self) -> str | None:
        """The SHA-256 of the classifier; None if it is not there: results may be kept alone."""
        if not self.classifier_file.exists():
            return None
        return files.sha256(self.classifier_file)

    def require_classifier(self) -> None:
        """Checks that a finished run with its classifier is here.

        Raises:
            RunError: If not; the message says what is missing.
        """
        if not self.path.is_dir():
            raise RunError(f"{self.path} is neither a run folder nor a .keras file.")
        if not self.claimed:
            raise RunError(f"{self.path} is no run folder: it has no config.json.")
        if not self.finished:
            raise RunError(
                f"{self.path} has not finished (no metrics.json): run train.py to its end."
            )
        if not self.classifier_file.is_file():
            raise RunError(f"{self.path} is broken: it has no classifier.keras. {_AGAIN}")

    def read_state(self, steps_per_epoch: int) -> tuple[keras.Model | None, list[dict[str, float]]]:
        """The model and the history as they were after the last finished epoch, if there is one.

        Args:
            steps_per_epoch: How many steps of the optimizer an epoch takes.

        Raises:
            RunError: If a file is damaged, or the history has fewer epochs than the checkpoint.
        """
        if not self.checkpoint_file.exists():
            return None, []
        try:
            model = keras.models.load_model(self.checkpoint_file)
        except Exception as error:
            # Keras answers a broken file with errors of many kinds.
            raise RunError(f"{self.checkpoint_file} cannot be loaded: {error}. {_AGAIN}") from error
        done = int(model.optimizer.iterations) // steps_per_epoch
        history = self.read_history()
        if len(history) < done:
            raise RunError(
                f"{self.history_file} must hold the {done} epochs of {self.checkpoint_file.name}. "
                f"Received: {len(history)}. {_AGAIN}"
            )
        return model, history[:done]

    @property
    def _on_whole_training_set(self) -> bool:
        return bool(self.read_config().get("whole_training_set", False))

    def _read_json(self, path: Path, way_out: str) -> dict[str, Any]:
        try:
            return files.read_json(path)
        except ValueError as error:
            raise RunError(f"{error} {way_out}") from error

    # --- writers: what was there before stays until the new file is whole ---

    def write_epoch(self, history: Sequence[dict[str, float]], model: keras.Model) -> None:
        """Keeps the figures and the training state of a finished epoch.

        Args:
            history: A row per epoch so far.
            model: The model that is trained.

        Raises:
            RunError: If a file cannot be written.
        """
        with self._write_errors_as_run_errors():
            # The checkpoint comes last: rows beyond it are dropped when a run goes on.
            with (
                files.atomic_write(self.history_file) as temporary,
                temporary.open("w", newline="") as file,
            ):
                writer = csv.DictWriter(file, fieldnames=list(history[0]))
                writer.writeheader()
                writer.writerows(history)
            with files.atomic_write(self.checkpoint_file) as temporary:
                model.save(temporary)

    def write_result(self, classifier: keras.Model, metrics: dict[str, Any]) -> None:
        """Finishes the run.

        Args:
            classifier: From pixels in [0, 1] to logits.
            metrics: The figures.

        Raises:
            RunError: If a file cannot be written.
        """
        with self._write_errors_as_run_errors():
            with files.atomic_write(self.classifier_file) as temporary:
                classifier.save(temporary)
            temporary = self.path / f".partial-{self.saved_model.name}"
            shutil.rmtree(temporary, ignore_errors=True)
            classifier.export(temporary, verbose=False)
            shutil.rmtree(self.saved_model, ignore_errors=True)
            os.replace(temporary, self.saved_model)
            files.write_json(self.metrics_file, metrics)
            self.checkpoint_file.unlink(missing_ok=True)

    def write_evaluation(self, content: dict[str, Any]) -> None:
        """Keeps what evaluate.py has measured so far; raises OSError if that fails."""
        files.write_json(self.evaluation_file, content)

    def write_error(self, log: str) -> None:
        """Keeps the log of a failed run; raises OSError if that fails."""
        with files.atomic_write(self.error_file) as temporary:
            temporary.write_text(log)

    def clear_error(self) -> None:
        """Forgets an earlier failure."""
        self.error_file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _write_errors_as_run_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"Cannot write the run folder {self.path}: {error}. Choose a writable --out."
            ) from error
