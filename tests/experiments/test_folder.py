"""A run folder: whose it is, and that no reader goes on with what was not written."""

import dataclasses
import json
import math

import keras
import pytest
from keras import layers

from tfjacreg.experiments.config import RunConfig, RunError
from tfjacreg.experiments.folder import RunFolder

CONFIG = RunConfig.of(epochs=2)
ROW = {"epoch": 1, "val_loss": 0.5, "test_loss": 0.6, "test_accuracy": 0.7, "step_seconds": 0.1}
METRICS = {"test_accuracy": 0.7, "test_loss": 0.6, "test_spectral_norm": 2.0, "step_seconds": 0.1}
METRICS |= {"val_loss": 0.5, "lowest_val_loss": ROW, "lowest_test_loss": ROW}
WHOLE = RunConfig.of(epochs=2, whole_training_set=True)


@pytest.fixture
def model():
    network = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    network.compile("sgd", "mse")
    return network


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(CONFIG)
    return folder


def test_what_was_written_is_read_again(folder, model):
    assert (folder.claimed, folder.finished, folder.problem) == (True, False, "not finished")
    settings = folder.read_config()
    assert CONFIG.differences(settings) == {} and settings["environment"]["keras"]
    history = [ROW, ROW | {"epoch": 2, "val_loss": 0.4}]
    model.optimizer.iterations.assign(6)
    folder.write_epoch(history, model)
    restored, rows = folder.read_state(steps_per_epoch=3)
    assert rows == history == folder.read_history() and folder.count_epochs() == 2
    assert int(restored.optimizer.iterations) == 6
    # A row more than the checkpoint: the process was killed between the two.
    model.optimizer.iterations.assign(3)
    folder.write_epoch(history, model)
    assert folder.read_state(steps_per_epoch=3)[1] == history[:1]
    folder.write_result(model, METRICS)
    assert folder.finished and folder.problem is None and not folder.checkpoint_file.exists()
    assert folder.read_metrics() == METRICS and folder.saved_model.is_dir()
    folder.require_classifier()
    assert len(folder.classifier_digest()) == 64
    folder.write_evaluation({"clean_accuracy": 0.5})
    assert folder.read_evaluation() == {"clean_accuracy": 0.5}
    assert not list(folder.path.glob(".*"))


def test_another_configuration_is_refused(folder):
    folder.claim(dataclasses.replace(CONFIG, data_dir="elsewhere"))
    with pytest.raises(RunError, match="epochs is 2 there, 3 here.*--overwrite"):
        folder.claim(RunConfig.of(epochs=3))
    with pytest.raises(RunError, match="whole_training_set is False there, True here"):
        folder.claim(WHOLE)


def test_a_folder_from_before_a_setting_existed_is_the_same_runs(folder):
    settings = json.loads(folder.config_file.read_text())
    del settings["whole_training_set"]
    folder.config_file.write_text(json.dumps(settings))
    folder.claim(CONFIG)
    assert folder.read_config()["whole_training_set"] is False
    with pytest.raises(RunError, match="whole_training_set is False there, True here"):
        folder.claim(WHOLE)


def test_files_that_nobody_owns_are_not_taken_over(folder):
    folder.metrics_file.write_text(json.dumps(METRICS))
    folder.config_file.unlink()
    with pytest.raises(RunError, match=r"Received: \['metrics.json'\] without.*--overwrite"):
        folder.claim(CONFIG)
    assert not folder.claimed
    folder.clear()
    folder.claim(CONFIG)
    assert not folder.finished


def test_clearing_leaves_what_is_not_the_runs(folder, model):
    folder.write_epoch([ROW], model)
    folder.write_result(model, METRICS)
    folder.write_evaluation({})
    folder.write_error("it failed")
    (folder.path / "mine.txt").write_text("keep me")
    (folder.path / "saved_model.txt").write_text("keep me")
    folder.clear()
    assert {path.name for path in folder.path.iterdir()} == {"mine.txt", "saved_model.txt"}


def test_clearing_that_is_stopped_leaves_no_finished_run(folder, model, monkeypatch):
    """At whatever file: the folder is that of the old run, not finished, and can be cleared."""
    folder.write_epoch([ROW], model)
    folder.write_result(model, METRICS)
    unlink, gone = type(folder.path).unlink, []

    def stop(path, **kwargs):
        if len(gone) == 1:
            raise KeyboardInterrupt
        gone.append(path)
        unlink(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(folder.path), "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            folder.clear()
    assert folder.claimed and not folder.finished
    folder.clear()
    assert not folder.claimed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "config.json must hold a JSON object"),
        ('{"dataset": "digits"}', r"config.json lacks \['data_dir', 'factor'"),
    ],
)
def test_damaged_settings(folder, content, message):
    folder.metrics_file.write_text(json.dumps(METRICS))
    folder.config_file.write_text(content)
    for read in (folder.read_config, lambda: folder.claim(CONFIG), folder.read_metrics):
        with pytest.raises(RunError, match=f"{message}.*--overwrite"):
            read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_loss": None}, "as val_loss. Received: None"),
        ({"test_loss": math.nan}, "as test_loss. Received: nan"),
        ({"test_accuracy": "high"}, "as test_accuracy. Received: 'high'"),
        ({"lowest_val_loss": 3}, "as lowest_val_loss.test_accuracy. Received: None"),
        ({"lowest_test_loss": {}}, "as lowest_test_loss.test_loss. Received: None"),
    ],
)
def test_damaged_figures(folder, change, message):
    folder.metrics_file.write_text(json.dumps(METRICS | change))
    with pytest.raises(RunError, match=f"metrics.json must hold a finite number {message}"):
        folder.read_metrics()


def test_on_the_whole_training_set_there_are_no_validation_figures(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim(WHOLE)
    metrics = {key: value for key, value in METRICS.items() if "val" not in key}
    folder.metrics_file.write_text(json.dumps(metrics))
    folder.history_file.write_text("epoch,test_loss,step_seconds\n1,2,3\n")
    assert folder.read_metrics() == metrics
    assert folder.read_history() == [{"epoch": 1, "test_loss": 2, "step_seconds": 3}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "FileNotFoundError"),
        ("epoch,val_loss\n1,2\n", "KeyError"),
        ("epoch,val_loss,step_seconds\n1,2\n", "TypeError"),
        ("epoch,val_loss,step_seconds\n1,2,3,4\n", "TypeError"),
        ("epoch,val_loss,step_seconds\n1,2,x\n", "could not convert"),
        ("epoch,val_loss,step_seconds\n1,2,3\n3,2,3\n", "epoch 3 in line 2"),
    ],
)
def test_damaged_history(folder, content, message):
    if content is not None:
        folder.history_file.write_text(content)
    with pytest.raises(RunError, match=f"history.csv must hold a line of numbers.*{message}"):
        folder.read_history()


def test_a_damaged_state(folder, model):
    model.optimizer.iterations.assign(6)
    folder.write_epoch([ROW], model)
    with pytest.raises(RunError, match="history.csv must hold the 2 epochs.*Received: 1"):
        folder.read_state(steps_per_epoch=3)
    folder.checkpoint_file.write_text("no zip file")
    with pytest.raises(RunError, match="checkpoint.keras cannot be loaded.*--overwrite"):
        folder.read_state(steps_per_epoch=3)


def test_why_a_run_has_not_finished(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.problem == "not started"
    folder.write_error("Traceback\nRunError: diverged\n")
    assert folder.problem == "failed: RunError: diverged"
    folder.write_error("")
    assert folder.problem == "failed: error.txt is empty"
    folder.clear_error()
    assert folder.problem == "not finished"


def test_folders_in_a_folder(tmp_path):
    for name in ("b", "a"):
        RunFolder(tmp_path / name).claim(CONFIG)
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("")
    assert [folder.path.name for folder in RunFolder.all_in(tmp_path)] == ["a", "b"]
