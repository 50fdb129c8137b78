"""Reads a run folder: the names of its files, and checks that they are as they were written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import keras

from tfjacreg.experiments import checkpoint, evaluation_records, files, reading, records
from tfjacreg.experiments.config import EARLIER, RunConfig, RunError
from tfjacreg.printable import printable, shown

CLEARING = "clearing"  # In config.json while the files of an earlier run are being removed.
SETTINGS_DIGEST = "settings"  # In metrics.json, beside the digests of the files.
_NAME = 1000  # Characters of a version or a device.
_AGAIN = "Train that run again, with train.py --overwrite."
_ANEW = "Put the file back as it was, or use --overwrite to start anew."
# The settings that every config.json has had since the first version.
_SETTINGS = {"dataset", "network", "regularizer", "factor", "seed", "data_dir"}


class FolderReader:
    """Reads the files of one run; raises `RunError` if a file is not what was written.

    Attributes:
        path: The folder.
        config_file: Settings and environment.
        history_file: A line of figures per epoch.
        checkpoint_file: The training state after the last finished epoch, until the run finishes.
        classifier_file: The network from pixels in [0, 1] to logits.
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
    def all_in(cls, path: Path) -> list[Self]:
        """The run folders in a folder, by name."""
        return sorted((f for f in map(cls, path.glob("*")) if f.claimed), key=lambda f: f.path)

    @property
    def products(self) -> tuple[Path, ...]:
        """The files that a run and its evaluation may write beside `config.json`."""
        return (
            self.metrics_file,
            self.evaluation_file,
            self.examples_file,
            self.classifier_file,
            self.saved_model,
            self.checkpoint_file,
            self.history_file,
        )

    def refuse_link(self) -> None:
        """Refuses a link in place of a folder of a sweep; raises RunError."""
        if self.path.is_symlink():
            raise RunError(
                f"{self.path} must be a folder in that of its sweep. Received: a symbolic link. "
                "Put the run itself there."
            )

    # --- which run the folder belongs to, and how far that run has come ---

    @property
    def claimed(self) -> bool:
        """Whether it is the folder of a run."""
        return self.config_file.exists()

    @property
    def finished(self) -> bool:
        """Whether the run has finished."""
        return self.metrics_file.exists() and not self.is_clearing

    @property
    def problem(self) -> str | None:
        """None if the run has finished; otherwise why not, in a few words."""
        if self.claimed and self.finished:
            return None
        if self.metrics_file.exists() and not self.claimed:
            return f"damaged: its {self.config_file.name} is missing"
        if os.path.lexists(self.error_file):
            try:
                log = reading.read_end(self.error_file, reading.ERROR).decode(errors="replace")
            except OSError as error:
                return f"failed: {self.error_file.name} cannot be read: {error}"
            # The last line of a traceback is the error itself.
            lines = log.strip().splitlines()
            return f"failed: {lines[-1] if lines else 'error.txt is empty'}"
        if self.classifier_file.exists() and not self.checkpoint_file.exists():
            return "not finished, or its metrics.json is missing"
        return "not finished" if self.path.exists() else "not started"

    @property
    def is_clearing(self) -> bool:
        """Whether --overwrite was killed while it removed the files of an earlier run."""
        try:
            return CLEARING in files.read_json(self.config_file)
        except ValueError:  # The file is missing or damaged, which other readers report.
            return False

    def check_kinds(self) -> None:
        """Refuses folders where a run writes files, and files where it writes folders.

        Raises:
            RunError: If there is one: the run would fail when it writes there.
        """
        for path in (self.config_file, *self.products, self.error_file):
            if path == self.saved_model:
                wrong, kind = path.exists() and not path.is_dir(), "a folder. Received: a file"
            else:
                wrong, kind = path.is_dir(), "a file. Received: a folder"
            if wrong:
                raise RunError(f"{path} must be {kind} of that name. Move it out of the way.")

    def check_claim(self, config: RunConfig) -> None:
        """Refuses a folder that belongs to another run.

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
        ownerless = [file.name for file in self.products if file.exists()]
        if ownerless:
            raise RunError(
                f"{self.path} must be empty or have a config.json, which says whose its files are. "
                f"Received: {ownerless} without. Choose another --out, or --overwrite to throw "
                "them away."
            )

    def check_settings(self, config: RunConfig, way_out: str) -> None:
        """Refuses a folder that belongs to another configuration.

        Args:
            config: The settings that are expected.
            way_out: What to do if the folder's settings differ; ends the message.

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

    # --- the content of its files ---

    def read_config(self) -> dict[str, Any]:
        """Reads the settings, and `environment`.

        Raises:
            RunError: If the file is missing or damaged.
        """
        way_out = "Use --overwrite to start anew."
        content = self._read_json(self.config_file, way_out)
        lacking = sorted(_SETTINGS - content.keys())
        if lacking:
            raise RunError(f"{self.config_file} lacks {lacking}. {way_out}")
        content |= {k: v for k, v in EARLIER.items() if k not in content}
        try:
            RunConfig.of(**{k: content[k] for k in RunConfig.names() if k in content})
        except (TypeError, ValueError) as error:
            reason = printable(str(error), limit=500)
            raise RunError(f"{self.config_file}: {reason} {way_out}") from error
        self._check_environment(self.config_file, content, way_out)
        return content

    @staticmethod
    def _check_environment(path: Path, content: dict[str, Any], way_out: str) -> None:
        found = content.get("environment", {})
        if not isinstance(found, dict):
            raise RunError(
                f"{path} must hold an object as environment. Received: {shown(found)}. {way_out}"
            )
        if not all(isinstance(text, str) and len(text) <= _NAME for text in found.values()):
            raise RunError(
                f"{path} must hold short names as environment. Received: {shown(found)}. {way_out}"
            )

    def read_metrics(self) -> dict[str, Any]:
        """Reads the figures of the finished run.

        Raises:
            RunError: If the file is missing or damaged, a number in it is not finite, or it does
                not belong to the settings and the history beside it.
        """
        metrics = self._read_json(self.metrics_file, _AGAIN, sealed=True)
        with self._value_errors_as_run_errors(self.metrics_file, _AGAIN):
            records.check_metrics(metrics, validated=self._validated)
        self._check_digest(self.history_file)
        return metrics

    def read_history(self) -> list[dict[str, float]]:
        """Reads a row of figures per epoch.

        Raises:
            RunError: If the file is missing or damaged.
        """
        with self._value_errors_as_run_errors(self.history_file, _AGAIN):
            return records.read_history(self.history_file, validated=self._validated)[1]

    def count_epochs(self) -> int:
        """The number of epochs in the history, without a check; 0 if there is none."""
        try:
            text = reading.read_bytes(self.history_file, reading.TEXT)
            return max(text.count(b"\n") - 1, 0)
        except OSError:  # Other readers report what is wrong with it.
            return 0

    def read_evaluation(self) -> dict[str, Any] | None:
        """Reads what evaluate.py has measured so far; None if there is nothing.

        Raises:
            RunError: If the file is damaged.
        """
        if not self.evaluation_file.exists():
            return None
        way_out = "Judge that run again, with evaluate.py --overwrite."
        content = self._read_json(self.evaluation_file, way_out, sealed=True)
        self._check_environment(self.evaluation_file, content, way_out)
        try:
            evaluation_records.check_evaluation(content)
        except ValueError as error:
            raise RunError(
                f"{self.evaluation_file} must be as evaluate.py writes it: {error}. {way_out}"
            ) from error
        if self.claimed:
            self._check_dataset(content.get("settings", {}).get("dataset"))
        return files.unsealed(content)

    def _check_dataset(self, judged: str | None) -> None:
        """Compares the data set of the settings with the one of the evaluation."""
        trained = self.read_config()["dataset"]
        if judged not in (None, trained):
            raise RunError(
                f"{self.config_file} and {self.evaluation_file} must name one data set. Received: "
                f"{shown(trained)} and {shown(judged)}. Put back the one that was changed, or "
                "judge that run again, with evaluate.py --overwrite."
            )

    def classifier_digest(self) -> str | None:
        """The SHA-256 of the classifier; None if it is not there: results may be kept alone."""
        if not self.classifier_file.exists():
            return None
        return files.sha256(self.classifier_file)

    def check_products(self, *, alone: bool = False) -> None:
        """Checks that the files of a finished run are those that it wrote.

        Args:
            alone: Whether the figures may be kept alone, without classifier and SavedModel.

        Raises:
            RunError: If a file is missing or is not the one that was written.
        """
        self.read_metrics()
        kept = [self.history_file, self.classifier_file, self.saved_model]
        if alone and not self.classifier_file.exists() and not self.saved_model.exists():
            kept = [self.history_file]
        for file in kept:
            self._check_digest(file)

    def require_classifier(self) -> None:
        """Checks that the folder holds a finished run with its classifier.

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
        if not os.path.lexists(self.classifier_file):
            raise RunError(f"{self.path} is broken: it has no classifier.keras. {_AGAIN}")
        self._check_digest(self.classifier_file)

    def _check_digest(self, file: Path) -> None:
        """Compares the settings and a file with their digests in `metrics.json`, if it has them."""
        metrics = self._read_json(self.metrics_file, _AGAIN, sealed=True)
        with self._value_errors_as_run_errors(self.metrics_file, _AGAIN):
            digests = records.digests(metrics)
        if digests.get(SETTINGS_DIGEST) not in (None, self.settings_digest):
            raise RunError(
                f"{self.metrics_file} is not of the settings in {self.config_file.name}. {_AGAIN}"
            )
        if file.name not in digests:  # The run is from version 0.1.0.
            return
        with self._value_errors_as_run_errors(file, _AGAIN):
            if not file.exists():
                raise ValueError("is missing")
            if digest(file) != digests[file.name]:
                raise ValueError(
                    f"is damaged, or not of the run of {self.metrics_file.name}: their digests "
                    "differ"
                )

    def read_state(self, steps_per_epoch: int) -> tuple[keras.Model | None, list[dict[str, float]]]:
        """Loads the model and the history after the last finished epoch, if there is one.

        Args:
            steps_per_epoch: The number of optimizer steps in an epoch.

        Raises:
            RunError: If a file is damaged, or they do not belong to one run.
        """
        file = self.checkpoint_file
        if not file.exists():
            # A checkpoint is first written after the first line, and kept until the run finishes.
            exported = self.classifier_file.exists() or self.saved_model.exists()
            if exported or self.count_epochs() > 1:
                also = f" and {self.metrics_file.name} are" if exported else " is"
                raise RunError(
                    f"{file}{also} missing: the other files are of a run that has come further. "
                    f"{_ANEW}"
                )
            return None, []
        try:
            note = checkpoint.read_note(file)
            model = checkpoint.load(file)
        except ValueError as error:
            raise RunError(f"{error}. {_ANEW}") from error
        if note.get("settings") != self.settings_digest:
            raise RunError(
                f"{file} cannot be loaded: it is of a run with other settings than those in "
                f"{self.config_file.name}. {_ANEW}"
            )
        done = int(model.optimizer.iterations) // steps_per_epoch
        with self._value_errors_as_run_errors(self.history_file, _ANEW):
            text, history = records.read_history(self.history_file, validated=self._validated)
            if len(history) < done:
                raise ValueError(
                    f"must hold the {done} epochs of {file.name}. Received: {len(history)}"
                )
            records.check_same(text, note.get("history"), done)
        return model, history[:done]

    @property
    def _validated(self) -> bool:
        return not self.read_config().get("whole_training_set", False)

    @property
    def settings_digest(self) -> str:
        """The digest of what the run is, without the place of its data and the machine."""
        self.read_config()
        # A setting that is not in the file did not exist then, and must not change the digest.
        content = files.read_json(self.config_file)
        names = content.keys() & set(RunConfig.names()) - {"data_dir"}
        return files.content_sha256({name: content[name] for name in names})

    def _read_json(self, path: Path, way_out: str, *, sealed: bool = False) -> dict[str, Any]:
        try:
            content = files.read_json(path)
            if sealed:
                files.check_seal(path, content)
        except ValueError as error:
            raise RunError(f"{error} {way_out}") from error
        return content

    @contextlib.contextmanager
    def _value_errors_as_run_errors(self, path: Path, way_out: str) -> Iterator[None]:
        """Turns errors that say what a file must be into RunErrors that begin with its name."""
        try:
            yield
        except RunError:
            raise
        except (OSError, ValueError) as error:
            raise RunError(f"{path} {error}. {way_out}") from error


def digest(path: Path) -> str:
    """The SHA-256 of a file, or of all files in a folder; raises OSError."""
    folder = path.is_dir() and not path.is_symlink()
    return files.tree_sha256(path) if folder else files.sha256(path)
