"""Checks the form of a run's history and figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfjacreg.experiments import reading
from tfjacreg.printable import shown

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
# The limit of all figures: the largest number in single precision.
LARGEST = 3.5e38


def is_number(value: Any, low: float = -LARGEST, high: float = LARGEST) -> bool:
    """Whether a value of JSON is a number within limits; NaN, infinity and true are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def check_metrics(metrics: dict[str, Any], *, validated: bool) -> None:
    """Checks that the figures of a finished run are numbers.

    Args:
        metrics: Content of `metrics.json`.
        validated: Whether the run has a validation split.

    Raises:
        ValueError: If a figure is missing or not finite.
    """
    numbers = _VALIDATION_NUMBERS + _NUMBERS if validated else _NUMBERS
    # Runs of version 0.1.0 did not record it.
    if "training_seconds" in metrics:
        numbers += (("training_seconds",),)
    for keys in numbers:
        value: Any = metrics
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        share = keys[-1].endswith("accuracy")
        if not is_number(value, 0, 1 if share else LARGEST):
            limits = "from 0 to 1" if share else f"from 0 to {LARGEST:g}"
            raise ValueError(
                f"must hold a finite number as {'.'.join(keys)}, {limits}. Received: {shown(value)}"
            )
    for name, row in metrics.items():
        values = row.values() if isinstance(row, dict) else [row]
        if name.startswith("lowest_") and not all(map(is_number, values)):
            raise ValueError(f"must hold finite numbers as {name}. Received: {shown(row)}")


def digests(metrics: dict[str, Any]) -> dict[str, str]:
    """The digests in `metrics.json` by file; none in version 0.1.0; raises ValueError."""
    found = metrics.get("files", {})
    if not isinstance(found, dict):
        raise ValueError(f"must hold digests as files. Received: {shown(found)}")
    return found


def history_text(rows: Sequence[dict[str, float]]) -> str:
    """A history as the text of `history.csv`."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def read_history(path: Path, *, validated: bool) -> tuple[str, list[dict[str, float]]]:
    """Reads the text of a history, and its rows, one per epoch.

    Args:
        path: `history.csv`.
        validated: Whether the run has a validation split.

    Raises:
        ValueError: If it cannot be read, or a row is incomplete, does not hold numbers or is not
            the next epoch's.
    """
    needed = ("val_loss", "step_seconds") if validated else ("step_seconds",)
    try:
        # As bytes, since the digest covers the line endings.
        text = reading.read_bytes(path, reading.TEXT).decode()
        reader = csv.DictReader(io.StringIO(text, newline=""))
        rows = [{name: float(value) for name, value in row.items()} for row in reader]
        for number, row in enumerate(rows, start=1):
            for name in needed:
                row[name]
            for name, value in row.items():
                low = 0 if name.endswith(("accuracy", "seconds")) else -LARGEST
                if not is_number(value, low, 1 if name.endswith("accuracy") else LARGEST):
                    raise ValueError(
                        f"{value:g} as {name[:50]!r}, out of range or not finite in line {number}"
                    )
            if row.setdefault("epoch", number) != number:
                raise ValueError(f"epoch {row['epoch']:g} in line {number}")
    except (OSError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"must hold a line of numbers per epoch, among them {needed}. Received: {shown(error)}"
        ) from error
    return text, [row | {"epoch": int(row["epoch"])} for row in rows]


def check_same(text: str, kept: Any, epochs: int) -> None:
    """Checks that a history is, up to an epoch, the one that a checkpoint was saved with.

    Args:
        text: Content of `history.csv`.
        kept: The history in the checkpoint.
        epochs: The number of epochs to compare.

    Raises:
        ValueError: If a line differs.
    """
    lines, expected = text.splitlines(), str(kept).splitlines()
    for number in range(epochs + 1):
        if lines[number : number + 1] != expected[number : number + 1]:
            raise ValueError(
                f"is not the history of the checkpoint beside it: line {number + 1} was "
                f"{shown(expected[number : number + 1])}. Received: "
                f"{shown(lines[number : number + 1])}"
            )
