"""A run folder: whose it is, and that no reader goes on with what was not written."""

import dataclasses
import json
import math

import keras
import pytest
from keras import layers

from tfjacreg import atomic_files
from tfjacreg.experiments import files
from tfjacreg.experiments.config import RunConfig, RunError
from tfjacreg.experiments.folder import RunFolder
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.run import run

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


@pytest.fixture
def reader(folder):
    return folder.reader


def test_what_was_written_is_read_again(folder, reader, model):
    assert (reader.claimed, reader.finished, reader.problem) == (True, False, "not finished")
    settings = reader.read_config()
    assert CONFIG.differences(settings) == {} and settings["environment"]["keras"]
    history = [ROW, ROW | {"epoch": 2, "val_loss": 0.4}]
    model.optimizer.iterations.assign(6)
    folder.write_epoch(history, model)
    restored, rows = reader.read_state(steps_per_epoch=3)
    assert rows == history == reader.read_history() and reader.count_epochs() == 2
    assert int(restored.optimizer.iterations) == 6
    # A row more than the checkpoint: the process was killed between the two.
    model.optimizer.iterations.assign(3)
    folder.write_epoch(history, model)
    assert reader.read_state(steps_per_epoch=3)[1] == history[:1]
    written = folder.write_result(model, METRICS)
    assert reader.finished and reader.problem is None and not reader.checkpoint_file.exists()
    assert reader.read_metrics() == written == json.loads(reader.metrics_file.read_text())
    assert {k: v for k, v in written.items() if k not in ("files", "sha256")} == METRICS
    assert written["files"].keys() == {"settings", "history.csv", "classifier.keras", "saved_model"}
    assert reader.saved_model.is_dir()
    reader.require_classifier()
    assert len(reader.classifier_digest()) == 64
    folder.write_evaluation({"clean_accuracy": 0.5})
    assert reader.read_evaluation() == {"clean_accuracy": 0.5}
    assert not list(folder.path.glob(".*"))


def test_another_configuration_is_refused(folder):
    folder.claim(dataclasses.replace(CONFIG, data_dir="elsewhere"))
    with pytest.raises(RunError, match="epochs is 2 there, 3 here.*--overwrite"):
        folder.claim(RunConfig.of(epochs=3))
    with pytest.raises(RunError, match="whole_training_set is False there, True here"):
        folder.claim(WHOLE)


def test_a_folder_from_before_a_setting_existed_is_the_same_runs(folder, reader):
    settings = json.loads(reader.config_file.read_text())
    del settings["whole_training_set"], settings["initialization"]
    reader.config_file.write_text(json.dumps(settings))
    folder.claim(CONFIG)
    assert reader.read_config()["whole_training_set"] is False
    assert reader.read_config()["initialization"] == "keras"
    with pytest.raises(RunError, match="whole_training_set is False there, True here"):
        folder.claim(WHOLE)


def test_files_that_nobody_owns_are_not_taken_over(folder, reader):
    reader.metrics_file.write_text(json.dumps(METRICS))
    reader.config_file.unlink()
    with pytest.raises(RunError, match=r"Received: \['metrics.json'\] without.*--overwrite"):
        folder.claim(CONFIG)
    assert not reader.claimed
    folder.claim(CONFIG, overwrite=True)
    assert reader.claimed and not reader.metrics_file.exists()


def test_clearing_leaves_what_is_not_the_runs(folder, model):
    folder.write_epoch([ROW], model)
    folder.write_result(model, METRICS)
    folder.write_evaluation({})
    folder.write_error("it failed")
    (folder.path / "mine.txt").write_text("keep me")
    (folder.path / "saved_model.txt").write_text("keep me")
    folder.claim(CONFIG, overwrite=True)
    assert {path.name for path in folder.path.iterdir()} == {
        *("mine.txt", "saved_model.txt"),
        "config.json",
    }


PRODUCTS = [
    *("metrics.json", "evaluation.json", "adversarial_examples.png", "classifier.keras"),
    *("saved_model", "checkpoint.keras", "history.csv", "error.txt"),
]


@pytest.mark.parametrize("stop", range(len(PRODUCTS) + 1))
def test_overwriting_that_is_stopped_is_of_the_new_run(folder, reader, model, monkeypatch, stop):
    """At whatever file: the folder is the old run's, whole, or the new one's, not finished."""
    folder.write_epoch([ROW], model)
    folder.write_result(model, METRICS)
    folder.write_epoch([ROW], model)
    folder.write_error("it failed")
    folder.write_evaluation({})
    reader.examples_file.write_bytes(b"")
    new = dataclasses.replace(CONFIG, seed=7)
    remove, removed = atomic_files.remove, []

    def killed(path):
        if not path.name.startswith("."):
            if len(removed) == stop:
                raise KeyboardInterrupt
            removed.append(path.name)
        remove(path)

    def unwritable(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", unwritable)
        with pytest.raises(RunError, match="No space left"):
            folder.claim(new, overwrite=True)
    reader.check_products()  # Nothing has gone.
    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "remove", killed)
        if stop < len(PRODUCTS):
            with pytest.raises(KeyboardInterrupt):
                folder.claim(new, overwrite=True)
        else:
            folder.claim(new, overwrite=True)
    assert sorted(removed) == sorted(PRODUCTS[:stop])
    assert reader.claimed and not reader.finished
    with pytest.raises(RunError, match="has not finished"):
        reader.require_classifier()
    with pytest.raises(RunError, match="seed is 7 there, 0 here"):
        folder.claim(CONFIG)
    folder.claim(new)  # Goes on where it was stopped.
    assert [path.name for path in folder.path.iterdir()] == ["config.json"]
    assert not new.differences(reader.read_config()) and not reader.is_clearing
    assert reader.read_state(3) == (None, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "config.json must hold a JSON object"),
        ('{"dataset": "digits"}', r"config.json lacks \['data_dir', 'factor'"),
    ],
)
def test_damaged_settings(folder, reader, content, message):
    reader.metrics_file.write_text(json.dumps(METRICS))
    reader.config_file.write_text(content)
    for read in (reader.read_config, lambda: folder.claim(CONFIG), reader.read_metrics):
        with pytest.raises(RunError, match=f"{message}.*--overwrite"):
            read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_loss": None}, "as val_loss, .*. Received: None"),
        ({"test_loss": math.nan}, "as test_loss, .*. Received: nan"),
        ({"test_accuracy": "high"}, "as test_accuracy, .*. Received: 'high'"),
        ({"lowest_val_loss": 3}, "as lowest_val_loss.test_accuracy, .*. Received: None"),
        ({"lowest_test_loss": {}}, "as lowest_test_loss.test_loss, .*. Received: None"),
    ],
)
def test_damaged_figures(folder, reader, change, message):
    reader.metrics_file.write_text(json.dumps(METRICS | change))
    with pytest.raises(RunError, match=f"metrics.json must hold a finite number {message}"):
        reader.read_metrics()


def test_on_the_whole_training_set_there_are_no_validation_figures(tmp_path):
    folder = RunFolder(tmp_path)
    reader = folder.reader
    folder.claim(WHOLE)
    metrics = {key: value for key, value in METRICS.items() if "val" not in key}
    reader.metrics_file.write_text(json.dumps(metrics))
    reader.history_file.write_text("epoch,test_loss,step_seconds\n1,2,3\n")
    assert reader.read_metrics() == metrics
    assert reader.read_history() == [{"epoch": 1, "test_loss": 2, "step_seconds": 3}]


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
def test_damaged_history(folder, reader, content, message):
    if content is not None:
        reader.history_file.write_text(content)
    with pytest.raises(RunError, match=f"history.csv must hold a line of numbers.*{message}"):
        reader.read_history()


def test_a_damaged_state(folder, reader, model):
    model.optimizer.iterations.assign(6)
    folder.write_epoch([ROW], model)
    with pytest.raises(RunError, match="history.csv must hold the 2 epochs.*Received: 1"):
        reader.read_state(steps_per_epoch=3)
    reader.checkpoint_file.write_text("no zip file")
    with pytest.raises(RunError, match="checkpoint.keras cannot be loaded.*--overwrite"):
        reader.read_state(steps_per_epoch=3)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", [*PRODUCTS, "config.json"])
def test_a_folder_named_like_a_file_is_refused_before_the_first_epoch(tmp_path, name, overwrite):
    """And a file named like a folder; nothing of it is removed, with --overwrite neither."""
    path = tmp_path / "run" / name
    path.parent.mkdir()
    if name == "saved_model":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "mine").write_text("mine")
    with pytest.raises(RunError, match=f"{name} |'{name}'"):
        run(CONFIG, tmp_path / "run", overwrite=overwrite, verbose=0)
    assert [p.name for p in path.parent.iterdir()] == [name]
    assert (path if path.is_file() else path / "mine").read_text() == "mine"


def test_why_a_run_has_not_finished(tmp_path):
    folder = RunFolder(tmp_path / "run")
    reader = folder.reader
    assert reader.problem == "not started"
    folder.write_error("Traceback\nRunError: diverged\n")
    assert reader.problem == "failed: RunError: diverged"
    folder.write_error("")
    assert reader.problem == "failed: error.txt is empty"
    folder.clear_error()
    assert reader.problem == "not finished"


def test_folders_in_a_folder(tmp_path):
    for name in ("b", "a"):
        RunFolder(tmp_path / name).claim(CONFIG)
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("")
    assert [folder.path.name for folder in FolderReader.all_in(tmp_path)] == ["a", "b"]
