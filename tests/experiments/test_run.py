"""One run: what is in the folder, how it is interrupted and continued, what it refuses."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from nursery import shrink

import tfjacreg
import train
from tfjacreg import datasets
from tfjacreg.experiments import callbacks, pipeline, records
from tfjacreg.experiments import run as run_module
from tfjacreg.experiments.config import RunConfig, RunError
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.run import mean_spectral_norm, run

ROOT = Path(__file__).parents[2]
SHORT = {"epochs": 2, "batch_size": 128}
PLAIN = {**SHORT, "regularizer": "none"}  # For what does not depend on the penalty.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "spectral"
    config = RunConfig.of(**SHORT)
    return config, out, run(config, out, verbose=0)


def test_folder(finished):
    _, out, metrics = finished
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "history.csv",
        "metrics.json",
        "classifier.keras",
        "saved_model",
    }
    settings = json.loads((out / "config.json").read_text())
    assert (
        settings["dataset"] == "digits"
        and settings["epochs"] == 2
        and settings["learning_rate"] == 0.01
    )
    assert {"tensorflow", "keras", "device"} <= set(settings["environment"])
    with (out / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert set(rows[0]) == {
        *("epoch", "loss", "penalty", "accuracy", "val_loss", "val_accuracy"),
        *("test_loss", "test_accuracy", "step_seconds"),
    }
    assert json.loads((out / "metrics.json").read_text()) == metrics
    for name in ("val_loss", "val_accuracy", "test_loss", "test_accuracy"):
        assert metrics[name] == pytest.approx(float(rows[-1][name]), rel=1e-6)
    # 1257 digits in batches of 128 are 10 steps.
    seconds = 10 * sum(float(row["step_seconds"]) for row in rows)
    assert metrics["training_seconds"] == pytest.approx(seconds)


def test_the_whole_training_set(tmp_path, monkeypatch):
    """All 1437 digits of the training set are trained on; nothing is validated."""
    seen = []
    original = pipeline.training_batches

    def record(x, y, *rest):
        seen.append((x, y))
        return original(x, y, *rest)

    monkeypatch.setattr(pipeline, "training_batches", record)
    config = RunConfig.of(**PLAIN, whole_training_set=True)
    metrics = run(config, tmp_path, verbose=0)
    data = datasets.load("digits")
    ((x, y),) = seen
    assert sorted(y) == sorted([*data.train.y, *data.validation.y]) and len(y) == 1797 - 360
    # Standardized with the statistics of just these images.
    assert np.mean(x, dtype=float) == pytest.approx(0, abs=1e-5)
    assert np.std(x, dtype=float) == pytest.approx(1, abs=1e-4)
    pixels = np.concatenate([data.train.x, data.validation.x])
    np.testing.assert_allclose(x, (pixels - pixels.mean()) / pixels.std(), atol=1e-4)
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and not [name for name in rows[0] if name.startswith("val")]
    assert not [name for name in metrics if "val" in name]
    assert metrics["test_loss"] == float(rows[-1]["test_loss"])
    assert json.loads((tmp_path / "config.json").read_text())["whole_training_set"] is True
    # Again: the same figures, and not those of a run with a validation split.
    assert run(config, tmp_path, verbose=0) == metrics
    with pytest.raises(RunError, match="whole_training_set is True there, False here"):
        run(RunConfig.of(**PLAIN), tmp_path, verbose=0)


def test_the_epochs_of_lowest_loss_are_lines_of_the_history(small, tmp_path, monkeypatch):
    """With a rate that leaps up at the end, neither is the last."""
    original = callbacks.EpochClock.on_epoch_begin

    def leap(self, epoch, logs=None):
        original(self, epoch, logs)
        if epoch == 2:
            self.model.optimizer.learning_rate.assign(100.0)

    monkeypatch.setattr(callbacks.EpochClock, "on_epoch_begin", leap)
    metrics = run(RunConfig.of(regularizer="none", epochs=3, batch_size=32), tmp_path, verbose=0)
    with (tmp_path / "history.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    for split in ("val", "test"):
        losses = [row[f"{split}_loss"] for row in rows]
        assert metrics[f"lowest_{split}_loss"] == rows[int(np.argmin(losses))]
        assert metrics[f"lowest_{split}_loss"]["epoch"] < 3


def test_metrics_are_those_of_the_exported_classifier(finished):
    """Accuracy, loss and mean sigma again, in NumPy, from the classifier that pixels go into."""
    _, out, metrics = finished
    test = datasets.load("digits").test
    classifier = keras.models.load_model(out / "classifier.keras")
    logits = classifier.predict(test.x, verbose=0).astype("float64")
    accuracy = np.mean(np.argmax(logits, axis=1) == test.y)
    log_sum = np.log(np.sum(np.exp(logits), axis=1))
    loss = np.mean(log_sum - logits[np.arange(len(test.y)), test.y])
    assert metrics["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert metrics["test_loss"] == pytest.approx(loss, rel=1e-4)
    # In pixels the Jacobian is that of the network divided by the standard deviation.
    x = tf.constant(test.x[:50])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = classifier(x)
    jacobians = tape.batch_jacobian(y, x).numpy().reshape(50, 10, -1)
    std = datasets.load("digits").std[0]
    sigma = np.linalg.svd(jacobians, compute_uv=False)[:, 0] * std
    network = classifier.layers[-1]
    mean = mean_spectral_norm(network, classifier.layers[1](x).numpy())
    assert mean == pytest.approx(np.mean(sigma), rel=1e-4)


def test_a_finished_run_is_not_repeated(finished):
    config, out, metrics = finished
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert run(config, out, verbose=0) == metrics
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before


@pytest.fixture
def small(monkeypatch):
    """Runs of one dense layer on few digits, for what does not depend on the network."""
    shrink(monkeypatch.setattr)


@pytest.fixture(scope="module")
def small_finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "small"
    config = RunConfig.of(**SHORT)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        return config, out, run(config, out, verbose=0)


def test_overwrite_repeats_the_same_run(small, small_finished, tmp_path):
    config, _, metrics = small_finished
    (tmp_path / "mine.txt").write_text("keep me")
    first = run(config, tmp_path, verbose=0)
    again = run(config, tmp_path, verbose=0, overwrite=True)
    for name in ("test_accuracy", "test_loss", "test_spectral_norm", "val_loss"):
        assert first[name] == pytest.approx(metrics[name], rel=1e-5)
        assert again[name] == pytest.approx(metrics[name], rel=1e-5)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that was stopped after its first epoch."""
    out = tmp_path_factory.mktemp("begun") / "run"
    original = callbacks.Recorder.on_epoch_end

    def stop(self, epoch, logs=None):
        original(self, epoch, logs)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        patch.setattr(callbacks.Recorder, "on_epoch_end", stop)
        with pytest.raises(KeyboardInterrupt):
            run(RunConfig.of(**PLAIN), out, verbose=0)
    return out


class _Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["between epochs", "between history and checkpoint"])
def test_an_interrupted_run_ends_like_an_undisturbed_one(
    small, small_finished, tmp_path, monkeypatch, where
):
    config, _, metrics = small_finished
    original = callbacks.Recorder.on_epoch_end
    replace = os.replace

    def stop(self, epoch, logs=None):
        if where == "between epochs":
            original(self, epoch, logs)
            raise _Stop
        if epoch == 1:
            monkeypatch.setattr(os, "replace", stop_at_checkpoint)
        original(self, epoch, logs)

    def stop_at_checkpoint(source, target):
        if str(target).endswith("checkpoint.keras"):
            raise _Stop
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Recorder, "on_epoch_end", stop)
        with pytest.raises(_Stop):
            run(config, tmp_path, verbose=0)
    monkeypatch.setattr(os, "replace", replace)
    assert not (tmp_path / "metrics.json").exists()
    resumed = run(config, tmp_path, verbose=0)
    for name in ("test_accuracy", "test_loss", "test_spectral_norm", "val_loss"):
        assert resumed[name] == pytest.approx(metrics[name], rel=1e-5)
    with (tmp_path / "history.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(nursery, tmp_path):
    out = tmp_path / "run"
    child = nursery.start("train", "--epochs", 500, "--out", out, log=tmp_path / "log")
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.keras").exists():
        assert child.poll() is None and time.monotonic() < deadline, child.output
        time.sleep(0.01)
    child.signal(signal.SIGINT)
    assert child.wait() == 130
    assert "goes on from the last finished epoch" in child.output
    assert "Traceback" not in child.output


# The classifier is loaded first; then TensorFlow's own command is given the SavedModel.
ELSEWHERE = """
import sys
sys.modules["tfjacreg"] = None
import keras, numpy
classifier = keras.models.load_model(sys.argv.pop(1))
numpy.save(sys.argv.pop(1), classifier(numpy.load("x.npy")))
from tensorflow.python.tools import saved_model_cli
saved_model_cli.main()
"""


@pytest.mark.slow
def test_what_is_exported_gives_the_logits_of_keras_without_tfjacreg(
    fresh_python, finished, tmp_path
):
    """In a process that cannot import it: `classifier.keras` in Keras, and `saved_model_cli`."""
    _, out, _ = finished
    x = datasets.load("digits").test.x[:16]
    np.save(tmp_path / "x.npy", x)
    command = ["run", "--dir", out / "saved_model", "--tag_set", "serve", "--signature_def"]
    command += ["serve", "--inputs", "pixels=x.npy", "--outdir", "served"]
    fresh_python.run(ELSEWHERE, out / "classifier.keras", "loaded.npy", *command, cwd=tmp_path)
    (served,) = (tmp_path / "served").glob("*.npy")
    expected = keras.models.load_model(out / "classifier.keras").predict(x, verbose=0)
    for found in (tmp_path / "loaded.npy", served):
        np.testing.assert_allclose(np.load(found), expected, atol=1e-5)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    """A fresh run in a process of its own, a repeated one, one with other settings there."""
    out = ["--out", str(tmp_path / "run")]
    settings = ["--epochs", "1", "--regularizer", "none"]
    command = [sys.executable, "train.py", *out, *settings]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    for words in ("40/40", "val_loss", "test accuracy", "test loss", "mean exact sigma"):
        assert words in first.stdout
    assert train.main([*out, *settings]) == 0
    assert "--overwrite repeats it" in capsys.readouterr().out
    assert train.main([*out, "--epochs", "1", "--factor", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "another configuration" in error and "Traceback" not in error
    assert train.main([*out, "--dataset", "mnist"]) == 2
    assert "fashion_mnist" in capsys.readouterr().err


def cifar_shaped(folder):
    """Real images in the form of CIFAR-10: the digits, 32x32, in colours that tell nothing."""
    digits = datasets.load("digits")
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name, split, size in (
        *((f"data_batch_{i}.bin", digits.train, 48) for i in range(1, 6)),
        ("test_batch.bin", digits.test, 80),
    ):
        chosen = rng.choice(len(split.x), size, replace=False)
        images = np.pad(split.x[chosen], ((0, 0), (2, 2), (2, 2), (0, 0)))
        images = images * rng.uniform(0.5, 1, (size, 1, 1, 3)) * 255
        pixels = images.astype("uint8").transpose(0, 3, 1, 2).reshape(size, -1)
        labels = split.y[chosen].astype("uint8")[:, None]
        (folder / name).write_bytes(np.concatenate([labels, pixels], axis=1).tobytes())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "penalty"), [("vgg16", "spectral_bound"), ("resnet20", "spectral")]
)
def test_networks_with_batch_norm_train_end_to_end(
    tmp_path, monkeypatch, any_files, network, penalty
):
    """train.py on CIFAR-shaped files: crops and flips, cosine schedule, momentum, export."""
    cifar_shaped(tmp_path / "source")
    monkeypatch.setitem(datasets.VALIDATION_SIZES, "cifar10", 40)
    datasets.prepare("cifar10", tmp_path / "source", tmp_path / "data")
    # Of fewer than 8 channels, oneDNN's strided 1x1 convolution ruins memory (docs/layers.md).
    width = {"vgg16": "0.25", "resnet20": "0.5"}[network]
    arguments = ["--dataset", "cifar10", "--network", network, "--width", width, "--epochs", "2"]
    arguments += ["--batch-size", "16", "--regularizer", penalty, "--data-dir"]
    arguments += [str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert train.main(arguments) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["augment"], config["schedule"], config["learning_rate"]) == (True, "cosine", 0.1)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert all(np.isfinite(v) for v in metrics.values() if isinstance(v, float))
    x = datasets.load("cifar10", tmp_path / "data").test.x[:8]
    served = tf.saved_model.load(tmp_path / "run" / "saved_model")
    classifier = keras.models.load_model(tmp_path / "run" / "classifier.keras")
    np.testing.assert_allclose(served.serve(x), classifier(x), rtol=1e-6, atol=1e-4)
    moved = [
        layer.moving_mean.numpy()
        for layer in classifier.layers[-1].layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert len(moved) == {"vgg16": 13, "resnet20": 21}[network] and all(map(np.any, moved))


def test_another_configuration_is_refused_and_nothing_is_lost(finished):
    _, out, _ = finished
    before = (out / "config.json").read_text()
    with pytest.raises(RunError, match="factor is 0.01 there, 0.5 here.*--overwrite"):
        run(RunConfig.of(factor=0.5, **SHORT), out)
    assert (out / "config.json").read_text() == before


def test_broken_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="not JSON"):
        run(RunConfig.of(**SHORT), tmp_path)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Cannot write.*Choose a writable --out"):
        run(RunConfig.of(**SHORT), tmp_path / "file" / "run")


def _spoiled(monkeypatch, value):
    data = datasets.load("digits")
    x = data.train.x.copy()
    x[3, 4, 5, 0] = value
    spoiled = dataclasses.replace(data, train=data.train._replace(x=x))
    monkeypatch.setattr(datasets, "load", lambda *_: spoiled)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_are_refused(tmp_path, monkeypatch, value):
    _spoiled(monkeypatch, value)
    with pytest.raises(RunError, match="1 that are not in the train split"):
        run(RunConfig.of(**SHORT), tmp_path, verbose=0)


def test_divergence_stops_and_keeps_the_last_good_checkpoint(small, tmp_path, monkeypatch):
    config = RunConfig.of(**SHORT)
    original = callbacks.EpochClock.on_epoch_begin

    def poison(self, epoch, logs=None):
        original(self, epoch, logs)
        if epoch == 1:
            self.model.optimizer.learning_rate.assign(np.inf)

    monkeypatch.setattr(callbacks.EpochClock, "on_epoch_begin", poison)
    with pytest.raises(RunError, match="diverged in epoch 2.*state after epoch 1 is in"):
        run(config, tmp_path, verbose=0)
    model = keras.models.load_model(tmp_path / "checkpoint.keras")
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())
    assert isinstance(model, tfjacreg.RegularizedModel)
    with (tmp_path / "history.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1


def _poisoned_figure(name):
    def poison(model, logs):
        logs[name] = np.nan

    return poison


def _poisoned_momentum(model, logs):
    momentum = [v for v in model.optimizer.variables if "momentum" in v.path][-1]
    momentum.assign(np.full(momentum.shape, np.inf))


def _poisoned_weight(model, logs):
    model.trainable_variables[-1].assign(np.full(model.trainable_variables[-1].shape, np.nan))


def _huge_weights(model, logs):
    """Finite, but the test images' logits are not."""
    for variable in model.trainable_variables:
        variable.assign(np.full(variable.shape, 1e38))


POISONS = {
    **{name: _poisoned_figure(name) for name in ("loss", "accuracy", "val_loss", "val_accuracy")},
    "momentum": _poisoned_momentum,
    "weight": _poisoned_weight,
    "logits": _huge_weights,
    "beyond what files hold": lambda model, logs: logs.update(loss=1e200),
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("bad_epoch", [0, 1])
def test_a_number_that_is_none_in_the_last_step_ends_the_run(
    small, begun, tmp_path, monkeypatch, poison, bad_epoch
):
    """In its first epoch, and in the second of a run that goes on."""
    config, out = RunConfig.of(**(PLAIN | {"epochs": 1})), tmp_path / "run"
    if bad_epoch:
        config = RunConfig.of(**PLAIN)
        shutil.copytree(begun, out)
    original = callbacks.StopAtNaN.on_epoch_end

    def poisoned(self, epoch, logs=None):
        if epoch == bad_epoch:
            POISONS[poison](self.model, logs)
        original(self, epoch, logs)

    monkeypatch.setattr(callbacks.StopAtNaN, "on_epoch_end", poisoned)
    message = _message_of_run(config, out)
    assert re.search(f"diverged in epoch {bad_epoch + 1}.*finite number", message)
    assert ("the state after epoch 1 is in" in message) == bool(bad_epoch)
    reader = FolderReader(out)
    assert not reader.finished and not reader.classifier_file.exists()
    assert reader.count_epochs() == bad_epoch
    assert reader.checkpoint_file.exists() == bool(bad_epoch)


def _message_of_run(config, path):
    with pytest.raises(RunError) as caught:
        run(config, path, verbose=0)
    return str(caught.value)


def test_a_spectral_norm_that_is_no_number_ends_the_run(small, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "mean_spectral_norm", lambda *_: np.nan)
    message = _message_of_run(RunConfig.of(**(PLAIN | {"epochs": 1})), tmp_path)
    assert "diverged by epoch 1" in message and "spectral norm" in message
    assert not FolderReader(tmp_path).finished


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_a_history_of_what_is_no_number_is_refused(tmp_path, text):
    (tmp_path / "history.csv").write_text(f"epoch,val_loss,step_seconds\n1,{text},1\n")
    with pytest.raises(ValueError, match="not finite in line 1"):
        records.read_history(tmp_path / "history.csv", validated=True)


@pytest.mark.parametrize(
    "name", ["tensorflow", "keras", "numpy", "python", "device", "floatx", "image_data_format"]
)
def test_a_run_does_not_go_on_elsewhere(small, begun, tmp_path, name):
    out = tmp_path / "run"
    shutil.copytree(begun, out)
    file = out / "config.json"
    settings = json.loads(file.read_text())
    settings["environment"][name] = "another"
    file.write_text(json.dumps(settings))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert f"was begun with {name}='another'" in _message_of_run(RunConfig.of(**PLAIN), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_run_killed_before_its_first_epoch_is_of_the_machine_that_makes_it(
    small, begun, tmp_path
):
    """Its config.json names where it was begun, where nothing of it was made."""
    out = tmp_path / "run"
    out.mkdir()
    settings = json.loads((begun / "config.json").read_text())
    elsewhere = settings["environment"] | {"tensorflow": "2.18.0", "device": "Tesla K80"}
    (out / "config.json").write_text(json.dumps(settings | {"environment": elsewhere}))
    run(RunConfig.of(**PLAIN), out, verbose=0)
    assert json.loads((out / "config.json").read_text()) == settings
    FolderReader(out).check_products()


@pytest.mark.parametrize(
    ("layout", "floatx"),
    [("channels_first", "float32"), ("channels_last", "float16"), ("channels_last", "bfloat16")],
)
def test_settings_of_keras_that_make_another_network_are_refused(tmp_path, layout, floatx):
    keras.config.set_image_data_format(layout)
    keras.config.set_floatx(floatx)
    try:
        message = _message_of_run(RunConfig.of(**SHORT), tmp_path / "run")
    finally:
        keras.config.set_image_data_format("channels_last")
        keras.config.set_floatx("float32")
    assert f"Received: '{layout}' and '{floatx}'" in message and not (tmp_path / "run").exists()


def test_missing_data_names_both_ways_out(tmp_path, monkeypatch):
    def missing(*_):
        raise FileNotFoundError("no data; download or prepare")

    monkeypatch.setattr(datasets, "load", missing)
    with pytest.raises(RunError, match="download or prepare"):
        run(RunConfig.of(dataset="kmnist"), tmp_path)
