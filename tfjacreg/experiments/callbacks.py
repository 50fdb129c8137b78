"""Callbacks of a run: they time, check and test each epoch, save its state and show its figures."""

from __future__ import annotations

import sys
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from tfjacreg.datasets import Split
from tfjacreg.experiments import records
from tfjacreg.experiments.config import RunError
from tfjacreg.experiments.folder import RunFolder

EVALUATION_BATCH = 500
# The figures of an epoch that a terminal shows, and the width of each in columns.
_SHOWN = ("loss", "accuracy", "penalty", "val_loss", "val_accuracy")
_WIDTH = 8


class EpochClock(keras.callbacks.Callback):
    """Numbers the epochs for the pipeline and times their training steps.

    Attributes:
        epoch: The number of the current epoch, counted from 0.
        step_seconds: The mean seconds of a step in the current epoch, without validation.
    """

    def __init__(self, first_epoch: int) -> None:
        super().__init__()
        self.epoch = tf.Variable(first_epoch, dtype=tf.int64)
        self.step_seconds = 0.0
        self._started = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the clock."""
        self.epoch.assign(epoch)
        self._started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Reads the clock."""
        seconds = time.perf_counter() - self._started
        self.step_seconds = seconds / _steps_done(batch, self.params["steps"])


class StopAtNaN(keras.callbacks.Callback):
    """Ends the run if the loss or a weight is no longer a finite number.

    It comes before `Recorder`, so that such a state is not saved.
    """

    def __init__(self, folder: RunFolder, history: list[dict[str, float]]) -> None:
        super().__init__()
        self._folder = folder
        self._history = history

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Checks the loss."""
        self._check(logs["loss"])

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Checks the figures of the epoch, with validation, and everything that a step changes."""
        self._check(*logs.values())
        for variable in (*self.model.variables, *self.model.optimizer.variables):
            value = keras.ops.convert_to_numpy(variable)
            if np.issubdtype(value.dtype, np.inexact) or value.dtype.kind == "V":
                self._check(value.astype("float64"))

    def _check(self, *values: Any) -> None:
        # NaN fails the comparison too. Double precision has finite numbers that no file may hold.
        if not all(np.all(np.abs(np.asarray(value, float)) <= records.LARGEST) for value in values):
            raise self.diverged()

    def diverged(self) -> RunError:
        """The error to raise in the current epoch."""
        done = len(self._history)
        kept = (
            f"the state after epoch {done} is in {self._folder.reader.checkpoint_file}"
            if done
            else "no epoch was finished"
        )
        return RunError(
            f"Training diverged in epoch {done + 1}: the loss, a weight or a figure is no longer "
            f"a finite number; {kept}. Start again with a smaller --learning-rate or --factor."
        )


class Recorder(keras.callbacks.Callback):
    """Tests the network after each epoch, and saves a line of figures and the whole state."""

    def __init__(
        self,
        folder: RunFolder,
        history: list[dict[str, float]],
        clock: EpochClock,
        test: Split,
        guard: StopAtNaN,
    ) -> None:
        super().__init__()
        self._folder = folder
        self._history = history
        self._clock = clock
        self._test = test
        self._guard = guard

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds a row to the history, and writes it and the checkpoint."""
        row = {"epoch": epoch + 1, **{k: float(v) for k, v in logs.items()}}
        test = self.model.evaluate(
            *self._test, batch_size=EVALUATION_BATCH, verbose=0, return_dict=True
        )
        row |= {"test_loss": float(test["loss"]), "test_accuracy": float(test["accuracy"])}
        row["step_seconds"] = self._clock.step_seconds
        if not all(map(records.is_number, row.values())):
            raise self._guard.diverged()
        self._history.append(row)
        self._folder.write_epoch(self._history, self.model)


class EpochTable(keras.callbacks.Callback):
    """Shows a line of figures per epoch, and a bar for the current one, in 80 terminal columns.

    It comes after `Recorder`: an epoch whose line is shown has been saved.
    """

    def __init__(self, clock: EpochClock) -> None:
        super().__init__()
        self._clock = clock
        self._bar: Any = None
        self._has_head = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts a bar."""
        self._bar = tqdm(
            desc=f"epoch {epoch + 1}/{self.params['epochs']}",
            total=self.params["steps"],
            unit="step",
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
        )

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Moves the bar."""
        self._bar.update(_steps_done(batch, self.params["steps"]) - self._bar.n)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Replaces the bar by the line."""
        self.close()
        names = [n for n in _SHOWN if n in logs]
        widths = {name: max(len(name), _WIDTH) for name in names}
        if not self._has_head:
            head = "".join(f"  {name:>{width}}" for name, width in widths.items())
            print(f"{'epoch':>7}{head}  ms/step")
            self._has_head = True
        figures = "".join(f"  {_shown(logs[name]):>{width}}" for name, width in widths.items())
        counted = f"{epoch + 1}/{self.params['epochs']}"
        print(f"{counted:>7}{figures}  {1e3 * self._clock.step_seconds:7.1f}", flush=True)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()


def _steps_done(batch: int, steps: int) -> int:
    """The steps of an epoch so far: Keras counts the last `steps_per_execution` as a full one."""
    return min(batch + 1, steps)


def _shown(value: float) -> str:
    text = f"{value:.4f}"
    return text if len(text) <= _WIDTH else f"{value:.1e}"
