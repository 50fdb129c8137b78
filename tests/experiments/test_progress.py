"""What a run shows of its epochs, how it times them, and what Ctrl-C says is kept."""

import json
import types

import keras
import numpy as np
import pytest
from keras import layers

import train
from tfjacreg.experiments import callbacks, stopped
from tfjacreg.experiments.config import RunConfig
from tfjacreg.experiments.folder import RunFolder
from tfjacreg.experiments.run import STEPS_PER_EXECUTION

STEPS = 7


def fit(monkeypatch, *more, epochs=2, seconds=14.0):
    """Epochs of seven steps, which take so many seconds; returns the history and the clock."""
    assert STEPS < STEPS_PER_EXECUTION  # Keras counts a whole execution all the same.
    now = iter(np.arange(2 * epochs) * seconds)
    monkeypatch.setattr(callbacks, "time", types.SimpleNamespace(perf_counter=lambda: next(now)))
    model = keras.Sequential([keras.Input([2]), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    options = {"metrics": ["accuracy"], "steps_per_execution": STEPS_PER_EXECUTION}
    model.compile("sgd", loss, **options)
    clock = callbacks.EpochClock(0)
    shown = [callbacks.EpochTable(clock), *more]
    x, y = np.ones([4 * STEPS, 2]), np.arange(4 * STEPS) % 3
    history = model.fit(
        *(x, y, 4, epochs, 0), callbacks=[clock, *shown], validation_data=(x, y), shuffle=False
    )
    return history.history, clock


def test_a_step_is_timed_by_the_steps_that_an_epoch_has(monkeypatch):
    _, clock = fit(monkeypatch)
    assert clock.step_seconds == 2


def test_an_epoch_is_a_line_of_80_columns(monkeypatch, capsys):
    history, _ = fit(monkeypatch)
    lines = [line.rpartition("\r")[2] for line in capsys.readouterr().out.split("\n")]
    head, *rows, end = (line.split() for line in lines)
    assert all(len(line) < 80 for line in lines)
    assert not end and head == ["epoch", "loss", "accuracy", "val_loss", "val_accuracy", "ms/step"]
    for i, row in enumerate(rows):
        assert row == [f"{i + 1}/2", *(f"{history[name][i]:.4f}" for name in head[1:-1]), "2000.0"]


def test_a_large_figure_keeps_its_column():
    assert list(map(callbacks._shown, [0.5, 1e30, 12345.678])) == ["0.5000", "1.0e+30", "1.2e+04"]


def test_nothing_stays_of_the_bar_when_training_ends_early(monkeypatch, capsys):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(monkeypatch, Stop())
    assert "epoch 1/2" in capsys.readouterr().out


def test_the_settings_come_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "run", lambda *_, **__: pytest.fail("reached"))
    options = "--epochs 1 --factor 0.03 --initialization pytorch --whole-training-set --augment"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pytest.fail.Exception):
        train.main(options.split())
    assert capsys.readouterr().out == (
        "digits, lenet, spectral, factor 0.03, seed 0\n"
        "  1 epoch, batches of 32, learning rate 0.01 (constant), initial weights of pytorch, "
        "images cropped and flipped, whole training set\n"
        "  in runs/digits-lenet-spectral-0.03-whole-pytorch-seed0\n\n"
    )
    assert RunConfig.of(network="vgg16", regularizer="none", width=0.5, seed=3).described() == (
        "digits, vgg16, none, seed 3\n"
        "  100 epochs, batches of 128, learning rate 0.1 (cosine), width 0.5"
    )


ROW = {"loss": 0.5, "accuracy": 0.5, "val_loss": 0.5, "val_accuracy": 0.5}
ROW |= {"test_loss": 0.6, "test_accuracy": 0.7, "step_seconds": 0.1}


def epochs(folder, count):
    """A run with so many finished epochs."""
    config = RunConfig.of(epochs=5)
    folder = RunFolder(folder)
    folder.claim(config)
    model = keras.Sequential([keras.Input([2]), layers.Dense(3)])
    if count:
        folder.write_epoch([{"epoch": i + 1, **ROW} for i in range(count)], model)
    return config


def test_what_is_kept_of_a_run(tmp_path):
    config, run = RunConfig.of(epochs=5), tmp_path / "run"
    assert stopped.run(config, run, overwrite=False) == f"Stopped. Nothing was begun in {run}."
    epochs(run, 0)
    kept = f"Stopped. Kept in {run}: 0 of 5 epochs. The same command starts with the first."
    assert stopped.run(config, run, overwrite=True) == kept
    epochs(run, 3)
    kept = f"Stopped. Kept in {run}: 3 of 5 epochs. "
    goes_on = " goes on from the last finished epoch."
    assert stopped.run(config, run, overwrite=False) == f"{kept}The same command{goes_on}"
    without = f"{kept}The same command without --overwrite{goes_on}"
    assert stopped.run(config, run, overwrite=True) == without
    # Between the history and the checkpoint of an epoch: it is not kept yet.
    history = RunFolder(run).reader.history_file
    history.write_text(history.read_text() + history.read_text().splitlines()[-1])
    assert stopped.run(config, run, overwrite=False).startswith(kept)
    other = RunConfig.of(epochs=6)
    assert stopped.run(other, run, overwrite=False) == f"Stopped. {run} is as it was."
    (run / "metrics.json").write_text("{}")
    assert stopped.run(config, run, overwrite=False) == f"Stopped. The run in {run} is finished."


def test_what_is_kept_of_a_sweep_and_of_evaluations(tmp_path):
    def kept():
        start, text = f"Stopped. Kept in {tmp_path}: ", stopped.sweep(tmp_path)
        assert text.startswith(start) and text.endswith(". The same command goes on from there.")
        return text.removeprefix(start).partition(".")[0]

    assert kept() == "0 finished runs"
    runs = [tmp_path / "a", tmp_path / "final" / "b", tmp_path / "c"]
    for folder, count in zip(runs, (5, 2, 0), strict=True):
        epochs(folder, count)
    assert kept() == "0 finished runs, 7 epochs of 2 other runs"
    (runs[0] / "metrics.json").write_text("{}")
    assert kept() == "1 finished run, 2 epochs of 1 other run"

    names = ["noise", "pgd", "sigma"]
    assert stopped.evaluation([], names, overwrite=False) == "Stopped. Nothing was begun."
    content = {"noise": {"variance": [0.1], "accuracy": [0.5]}}
    content["square"] = {"iterations": [1], "accuracy": [0.5]}
    (runs[1] / "evaluation.json").write_text(json.dumps(content))
    for folders, place in ((runs[1:2], runs[1] / "evaluation.json"), (runs, "their folders")):
        text = stopped.evaluation(folders, names, overwrite=True)
        assert text == (
            f"Stopped. Kept in {place}: 1 of {3 * len(folders)} measurements. The same command "
            "without --overwrite goes on after the last one."
        )
