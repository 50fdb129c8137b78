"""evaluate.py from the command line down: run folders in, evaluation.json and figures out."""

import functools
import importlib.util
import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from reference import dense_jacobian

from tfjacreg import attacks, datasets, norms, robustness
from tfjacreg.experiments import environment, evaluation, measures

SCRIPT = Path(__file__).parents[2] / "evaluate.py"
SMALL = {
    "noise": {"variance": [0.01, 0.1], "draws": 2},
    "pgd": {"iterations": [1, 4], "eps": 0.1, "step_size": 0.03},
    "pgd_margin": {"iterations": [1, 4], "eps": 0.1, "step_size": 0.03},
    "tpgd": {"iterations": [1, 4], "eps": 0.1, "step_size": 0.03},
    "square": {"iterations": [5, 20], "eps": 0.1},
    "boundary": {"samples": 10, "spheres": 16, "resolution": 0.05},
    "distance": {"starts": 2, "iterations": 10},
    "sigma": {"method": "exact"},
}
POINTWISE = ("--boundary", "--distance", "--sigma")
CONFIG = dict(
    dataset="digits", network="lenet", regularizer="none", factor=0.01, epochs=1, batch_size=32,
    learning_rate=0.01, seed=0, data_dir=None, environment={"device": "CPU"},
)  # fmt: skip


ATTACKS = {
    "pgd": attacks.pgd,
    "pgd_margin": functools.partial(attacks.pgd, loss="margin"),
    "tpgd": attacks.tpgd,
    "square": attacks.square,
}


@functools.cache
def script():
    spec = importlib.util.spec_from_file_location("evaluate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def small_plan(monkeypatch):
    monkeypatch.setattr(measures, "PLAN", SMALL)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Three small classifiers for digits, that differ in their seed."""
    train = datasets.load("digits").train
    paths = []
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        model = keras.Sequential(
            [
                keras.Input(train.x.shape[1:]),
                layers.Normalization(mean=0.3, variance=0.14),
                layers.Flatten(),
                layers.Dense(16, activation="relu"),
                layers.Dense(10),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.001), loss)
        model.fit(train.x, train.y, epochs=4, verbose=0)
        paths.append(tmp_path_factory.mktemp("classifiers") / "classifier.keras")
        model.save(paths[-1])
    return paths


@pytest.fixture
def make_run(tmp_path, classifiers):
    def make(name="run", classifier=0, **config):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG | config))
        (folder / "metrics.json").write_text("{}")
        shutil.copy(classifiers[classifier], folder / "classifier.keras")
        return folder

    return make


def call(*arguments, limit=40):
    script().run(script().parse([str(a) for a in ("--limit", limit, *arguments)]))


def read(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_everything_for_one_run(make_run, tmp_path, capsys):
    run = make_run()
    out = tmp_path / "figures"
    call(run, *POINTWISE, "--out", out, "--adversarial-examples", 2)
    found = read(run)
    test = datasets.load("digits").test
    x, y = test.x[:40], test.y[:40]
    model = keras.models.load_model(run / "classifier.keras")
    assert found["clean_accuracy"] == np.mean(model.predict(x, verbose=0).argmax(axis=1) == y)
    for name, attack in ATTACKS.items():
        direct = attack(model, x, y, seed=0, **SMALL[name])
        faded = {} if name == "square" else {"faded": direct.faded.mean(axis=1).tolist()}
        assert found[name] == {
            "iterations": SMALL[name]["iterations"],
            "accuracy": direct.accuracy.tolist(),
            **faded,
        }
    direct = robustness.noise_accuracy(model, x, y, [0.01, 0.1], 0, draws=2)
    assert found["noise"] == {"variance": [0.01, 0.1], "accuracy": direct.tolist()}
    direct = robustness.boundary_distance(model, x, y, seed=0, **SMALL["boundary"])
    listed = np.array(found["boundary_distance"], float)
    np.testing.assert_allclose(listed, np.where(np.isinf(direct), np.nan, direct), atol=1e-6)
    assert found["boundary"]["misclassified"] == np.flatnonzero(np.isnan(direct)).tolist()
    direct, _ = robustness.minimal_distance(model, x, y, seed=0, **SMALL["distance"])
    np.testing.assert_allclose(np.array(found["minimal_distance"], float), direct, rtol=1e-5)
    assert found["distance"] == {
        "misclassified": np.flatnonzero(np.isnan(direct)).tolist(),
        "not_found": [],
    }
    # Of the classifier, in pixels: the slope of the logits at each image from NumPy's SVD.
    jacobian = dense_jacobian(model, tf.constant(x))
    sigma = np.linalg.svd(jacobian, compute_uv=False)[:, 0]
    np.testing.assert_allclose(found["sigma"], sigma, rtol=1e-4)
    logits = model.predict(x, verbose=0)
    own = logits[np.arange(40), y]
    logits[np.arange(40), y] = -np.inf
    np.testing.assert_allclose(found["margin"], own - logits.max(axis=1), rtol=1e-4, atol=1e-5)
    wrong = found["distance"]["misclassified"]
    assert wrong == np.flatnonzero(np.array(found["margin"]) < 0).tolist() and len(wrong) > 0
    assert found["settings"]["images"] == 40 and found["settings"]["pgd"] == SMALL["pgd"]
    assert found["environment"].keys() >= {"tensorflow", "keras", "cleverhans", "device"}
    names = ("robustness", "boundary", "distance", "sigma")
    pictures = [*(out / f"{name}.png" for name in names), run / "adversarial_examples.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    printed = capsys.readouterr()
    assert f"{100 * found['clean_accuracy']:.1f}" in printed.out and "digits, PGD" in printed.out
    assert "digits, PGD on the margin" in printed.out and "exact sigma" in printed.out
    assert "sqrt(2)" in printed.out
    assert "image" in printed.err and "/s" in printed.err
    for name in (*SMALL, "none #0"):
        assert name in printed.err
    assert not list(tmp_path.rglob(".*"))


def test_twice_gives_the_same_file(make_run, tmp_path):
    first, second = make_run("a"), make_run("b")
    for run in (first, second):
        call(run, "--boundary", "--out", tmp_path / "out")
    assert (first / "evaluation.json").read_bytes() == (second / "evaluation.json").read_bytes()


def test_other_seed_gives_another_file(make_run, tmp_path):
    first, second = make_run("a"), make_run("b")
    call(first, "--attacks", "pgd", "noise", "--out", tmp_path / "out")
    call(second, "--attacks", "pgd", "noise", "--seed", 1, "--out", tmp_path / "out")
    assert read(first)["noise"] != read(second)["noise"]


def test_a_killed_evaluation_goes_on_where_it_was(make_run, tmp_path, monkeypatch):
    whole, run = make_run("whole"), make_run("run")
    call(whole, "--out", tmp_path / "out")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attacks, "tpgd", killed)
        with pytest.raises(KeyboardInterrupt):
            call(run, "--out", tmp_path / "out")
    assert {"noise", "pgd"} < read(run).keys() and "tpgd" not in read(run)
    with monkeypatch.context() as patch:
        patch.setattr(attacks, "pgd", killed)
        patch.setattr(robustness, "noise_accuracy", killed)
        call(run, "--out", tmp_path / "out")
    assert (run / "evaluation.json").read_bytes() == (whole / "evaluation.json").read_bytes()


def test_a_killed_measure_of_points_is_made_again(make_run, tmp_path, monkeypatch):
    whole, run = make_run("whole"), make_run("run")
    command = ["--attacks", "--boundary", "--sigma", "--out", tmp_path / "out"]
    call(whole, *command, limit=10)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(norms, "spectral_norm", killed)
        with pytest.raises(KeyboardInterrupt):
            call(run, *command, limit=10)
    assert "boundary" in read(run) and "sigma" not in read(run)
    with monkeypatch.context() as patch:
        patch.setattr(robustness, "boundary_distance", killed)
        call(run, *command, limit=10)
    assert (run / "evaluation.json").read_bytes() == (whole / "evaluation.json").read_bytes()


def scale_logits(run, factor):
    model = keras.models.load_model(run / "classifier.keras")
    keras.Sequential([model, layers.Rescaling(factor)]).save(run / "classifier.keras")


@pytest.mark.filterwarnings("ignore:The loss of .* has zero gradient:UserWarning")
def test_faded_gradients_are_said_and_the_margin_is_not_fooled(make_run, tmp_path, capsys):
    plain, large = make_run("plain"), make_run("large", seed=1)
    scale_logits(large, 300)
    for run in (plain, large):
        call(run, "--attacks", "pgd", "pgd_margin", "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert printed.count("* Not tested") == 1 and printed.count("gradient faded") == 1
    cross_entropy, margin = (read(large)[name] for name in ("pgd", "pgd_margin"))
    assert cross_entropy["faded"][-1] > 0.2 and not any(margin["faded"])
    assert cross_entropy["accuracy"][-1] > read(plain)["pgd"]["accuracy"][-1] + 0.2
    np.testing.assert_allclose(margin["accuracy"], read(plain)["pgd_margin"]["accuracy"], atol=0.01)


def test_sigma_times_300(make_run, tmp_path):
    """What does depend on the scale of the logits: sigma and the margin, and not their ratio."""
    plain, large = make_run("plain"), make_run("large", seed=1)
    scale_logits(large, 300)
    for run in (plain, large):
        call(run, "--attacks", "--sigma", "--out", tmp_path / "out")
    for name in ("sigma", "margin"):
        np.testing.assert_allclose(read(large)[name], 300 * np.array(read(plain)[name]), rtol=1e-4)


def test_attacks_come_on_top_of_earlier_ones(make_run, tmp_path):
    run = make_run()
    call(run, "--attacks", "noise", "--out", tmp_path / "out")
    call(run, "--attacks", "--boundary", "--out", tmp_path / "out")
    assert {"noise", "boundary_distance"} < read(run).keys() and "pgd" not in read(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "1"], "seed=0, now it is 1"),
        (["--limit", "30"], "images=40, now it is 30"),
    ],
)
def test_other_settings_are_refused_unless_overwritten(make_run, tmp_path, change, message):
    run = make_run()
    call(run, "--attacks", "noise", "--out", tmp_path / "out")
    before = (run / "evaluation.json").read_bytes()
    again = [run, "--attacks", "pgd", "--out", tmp_path / "out", *change]
    with pytest.raises(ValueError, match=message):
        call(*again)
    assert (run / "evaluation.json").read_bytes() == before
    call(*again, "--overwrite")
    assert "pgd" in read(run) and "noise" not in read(run)


def test_an_evaluation_with_the_keys_of_the_first_version_goes_on(make_run, tmp_path):
    """Its device is "CPU", and it does not name oneDNN; its versions count as before."""
    run = make_run()
    call(run, "--attacks", "noise", "--out", tmp_path / "out")
    content = read(run)
    del content["environment"]["onednn"]
    content["environment"]["device"] = "CPU"
    (run / "evaluation.json").write_text(json.dumps(content))
    call(run, "--attacks", "pgd", "--out", tmp_path / "out")
    assert {"noise", "pgd"} < read(run).keys()
    content["environment"]["keras"] = "2.0"
    (run / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="made with keras=2.0, now it is"):
        call(run, "--attacks", "pgd", "--out", tmp_path / "out")


def test_an_evaluation_from_before_a_measure_existed_goes_on(make_run, tmp_path):
    """Its settings do not name the measure; with it they do, and then they count."""
    whole, run = make_run("whole"), make_run("run")
    call(whole, "--attacks", "noise", "--sigma", "--out", tmp_path / "out")
    call(run, "--attacks", "noise", "--out", tmp_path / "out")
    content = read(run)
    for name in ("pgd_margin", "distance", "sigma"):
        del content["settings"][name]
    del content["sha256"]
    (run / "evaluation.json").write_text(json.dumps(content))
    call(run, "--attacks", "noise", "--sigma", "--out", tmp_path / "out")
    assert read(run) == read(whole)
    # A measure without its settings is not one of evaluate.py's.
    content = read(run)
    del content["settings"]["sigma"], content["sha256"]
    (run / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="made with sigma=None, now it is"):
        call(run, "--attacks", "noise", "--out", tmp_path / "out")


def test_another_device_is_refused():
    now = environment.environment()
    assert environment.differences(now, now) == {}
    assert environment.differences(now | {"device": "CPU"}, now) == {}
    other = {"device": ("another", now["device"])}
    assert environment.differences(now | {"device": "another"}, now) == other
    gpu = now | {"device": "a GPU"}
    assert environment.differences({"device": "CPU"}, gpu) == {"device": ("CPU", "a GPU")}
    assert environment.differences({"device": "a GPU", "python": now["python"]}, gpu) == {}


def test_another_classifier_is_refused(make_run, tmp_path, classifiers):
    run = make_run()
    call(run, "--attacks", "noise", "--out", tmp_path / "out")
    shutil.copy(classifiers[1], run / "classifier.keras")
    with pytest.raises(ValueError, match="classifier_sha256"):
        call(run, "--attacks", "noise", "--out", tmp_path / "out")


def test_bare_classifier(classifiers, tmp_path):
    path = tmp_path / "mine.keras"
    shutil.copy(classifiers[0], path)
    call(path, "--dataset", "digits", "--attacks", "noise", "--out", tmp_path / "out")
    assert read(tmp_path / "out" / "mine")["settings"]["dataset"] == "digits"


def test_methods_are_told_apart_by_what_differs(make_run):
    folders = [
        make_run("a"),
        make_run("b", seed=1),
        make_run("c", regularizer="spectral"),
        make_run("d", regularizer="spectral", epochs=2),
    ]
    named = [(t.method, t.seed) for t in evaluation.find_targets(folders)]
    assert named == [
        ("none epochs=1", 0),
        ("none epochs=1", 1),
        ("spectral 0.01 epochs=1", 0),
        ("spectral 0.01 epochs=2", 0),
    ]
    assert [t.method for t in evaluation.find_targets(folders[:3])][::2] == [
        "none",
        "spectral 0.01",
    ]


# --- bad input ---


def break_run(folder, kind):
    match kind:
        case "no folder":
            shutil.rmtree(folder)
        case "no config":
            (folder / "config.json").unlink()
        case "bad config":
            (folder / "config.json").write_text('{"dataset": ')
        case "poor config":
            (folder / "config.json").write_text('{"dataset": "digits"}')
        case "unfinished":
            (folder / "metrics.json").unlink()
        case "no classifier":
            (folder / "classifier.keras").unlink()
        case "bad classifier":
            (folder / "classifier.keras").write_text("no zip file")
        case "bad evaluation":
            (folder / "evaluation.json").write_text("[1]")
        case "unknown data":
            (folder / "config.json").write_text(json.dumps(CONFIG | {"dataset": "letters"}))
        case "wrong shape":
            keras.Sequential([keras.Input((5, 5, 1)), layers.Flatten(), layers.Dense(10)]).save(
                folder / "classifier.keras"
            )
        case "softmax":
            model = keras.models.load_model(folder / "classifier.keras")
            keras.Sequential([model, layers.Softmax()]).save(folder / "classifier.keras")


@pytest.mark.parametrize(
    ("kind", "message"),
    {
        "no folder": "neither a run folder nor",
        "no config": "has no config.json",
        "bad config": "config.json is not JSON",
        "poor config": "config.json lacks",
        "unfinished": "has not finished",
        "no classifier": "has no classifier.keras",
        "bad classifier": "cannot be loaded",
        "bad evaluation": "must hold a JSON object",
        "unknown data": "letters",
        "wrong shape": r"input shape \(None, 5, 5, 1\)",
        "softmax": "probabilities",
    }.items(),
)
def test_broken_runs(make_run, tmp_path, kind, message):
    run = make_run()
    break_run(run, kind)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        call(run, "--out", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_broken_runs_are_found_before_others_are_judged(make_run, tmp_path):
    good, bad = make_run("good"), make_run("bad")
    break_run(bad, "unfinished")
    with pytest.raises(ValueError, match="has not finished"):
        call(good, bad, "--out", tmp_path / "out")
    assert not (good / "evaluation.json").exists()


def test_the_same_run_twice(make_run, tmp_path):
    run = make_run()
    with pytest.raises(ValueError, match="own settings and seed"):
        call(run, run, "--out", tmp_path / "out")


def test_bare_classifiers_need_a_data_set(classifiers, make_run):
    with pytest.raises(ValueError, match="needs --dataset"):
        call(classifiers[0])
    with pytest.raises(ValueError, match="for bare files only"):
        call(make_run(), "--dataset", "digits")
    with pytest.raises(ValueError, match="no classifier at"):
        call("nowhere.keras", "--dataset", "digits")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attacks", "fgsm"], "invalid choice: 'fgsm'"),
        (["--limit", "0"], "must be at least 1"),
        (["--adversarial-examples", "-2"], "must be at least 1"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit):
        script().parse(["run", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: RUN"),
        (["run", "--benchmarks", "results"], "unrecognized arguments: --benchmarks"),
        (["--report", "a", "b", "--limit", "9", "--boundary"], "unrecognized arguments: --report"),
    ],
)
def test_judging_and_reporting_do_not_mix(capsys, arguments, message):
    with pytest.raises(SystemExit):
        script().parse(arguments)
    assert message in capsys.readouterr().err


def test_errors_end_the_script_with_one_line(fresh_python, tmp_path):
    done = fresh_python.run(SCRIPT, tmp_path / "missing", check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        f"evaluate.py: error: {tmp_path / 'missing'} is neither a run folder nor a .keras file."
    )
    assert "Traceback" not in done.stderr


def test_stopping_by_hand_says_how_to_go_on(make_run, tmp_path, monkeypatch, capsys):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(attacks, "pgd", stopped)
    arguments = [str(make_run()), "--attacks", "pgd", "--limit", "5", "--out", str(tmp_path)]
    assert script().main(arguments) == 130
    assert "The same command goes on" in capsys.readouterr().out
