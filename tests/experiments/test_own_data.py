"""Data and networks of one's own: from files to a run, and what is refused before it."""

import dataclasses
import hashlib
import importlib.util
import json
import re
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import wrong_inputs
from keras import layers
from wrong_inputs import CLASSIFIERS, RUNS, arrays

from tfjacreg import dataset_files, datasets, published
from tfjacreg.experiments import (
    archives,
    data_readers,
    data_sources,
    evaluation,
    measures,
    network_sources,
    pipeline,
)
from tfjacreg.experiments.classifier_files import Scale
from tfjacreg.experiments.config import RunConfig, RunError
from tfjacreg.experiments.ledger import study_name
from tfjacreg.experiments.run import run
from tfjacreg.experiments.sweep import Sweep

ROOT = Path(__file__).parents[2]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SHORT = {"epochs": 1, "batch_size": 16}


def save(path, **content):
    np.savez(path, **content)
    return str(path)


def small_network(shape, classes, *begin):
    return keras.Sequential(
        [
            keras.Input(shape),
            *begin,
            layers.Conv2D(4, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(classes),
        ]
    )


# --- what is wrong is told before anything is trained ---


@pytest.mark.parametrize(("make", "sentence"), [r[1:] for r in RUNS], ids=[r[0] for r in RUNS])
def test_what_is_wrong_gets_a_sentence(make, sentence, tmp_path):
    settings = {**SHORT, "network": "resnet20", "width": 0.1, "schedule": "constant"}
    own = make(tmp_path)
    if "network" in own:
        del settings["width"]
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        run(RunConfig.of(**{**settings, **own}), tmp_path / "run", verbose=0)
    assert len(str(caught.value).splitlines()) in (
        1,
        3,
    )  # One sentence, or that and two lines of code.
    assert not (tmp_path / "run" / "config.json").exists()


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("make", "sentence"), [r[1:] for r in CLASSIFIERS], ids=[r[0] for r in CLASSIFIERS]
)
def test_a_wrong_classifier_gets_a_sentence(make, sentence, tmp_path, capsys):
    arguments = map(str, [*make(tmp_path), "--out", tmp_path / "out", "--limit", 9])
    assert script("evaluate").main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1
    assert not list(tmp_path.rglob("evaluation.json"))


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "own_data.md").read_text()
    listed = [*RUNS, *CLASSIFIERS]
    assert len(listed) >= 40 and len({what for what, _, _ in listed}) == len(listed)
    for what, _, sentence in listed:
        assert f"| {what} | ... {sentence} ... |" in page


def lines_of(message):
    return "\n".join(line.strip() for line in message.splitlines()[1:])


@pytest.mark.parametrize(
    "what",
    [
        "a network that ends in a softmax",
        "a Softmax layer at the end",
        "a network that begins with Rescaling",
        "Normalization behind an augmentation",
        "another number of classes",
    ],
)
def test_the_two_lines_mend_it(what, tmp_path, monkeypatch):
    (make,) = (make for name, make, _ in wrong_inputs.NETWORKS if name == what)
    config = RunConfig.of(**make(tmp_path))
    with pytest.raises(ValueError, match="Take it off:|another last layer:") as caught:
        config.make_network((12, 12, 1), 3)
    monkeypatch.chdir(tmp_path)
    exec(lines_of(str(caught.value)), {"keras": keras})
    (made,) = {path.name for path in tmp_path.glob("*.keras")} - {"mine.keras"}
    assert RunConfig.of(network=made).make_network((12, 12, 1), 3).output_shape == (None, 3)


# --- data ---


@pytest.fixture(scope="module")
def fashion():
    """180 images of Fashion-MNIST, as many of each of its ten classes."""
    x, y = dataset_files.read("fashion_mnist", DEBIAN, "train")
    chosen = np.concatenate([np.flatnonzero(y == label)[:18] for label in range(10)])
    chosen = np.random.default_rng(1).permutation(chosen)
    held = np.isin(np.arange(180) % 6, 0)
    return x[chosen[~held]], y[chosen[~held]], x[chosen[held]], y[chosen[held]]


def doors(door, fashion, folder, monkeypatch):
    x_train, y_train, x_test, y_test = fashion
    if door == "npz":
        return save(
            folder / "mine.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test
        )
    if door == "folders":
        for split, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
            for number, (image, label) in enumerate(zip(x, y, strict=True)):
                place = folder / "mine" / split / str(label)
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{number}.png").write_bytes(tf.io.encode_png(image).numpy())
        return str(folder / "mine")
    images = {"train": (x_train, y_train), "test": (x_test, y_test)}
    monkeypatch.setattr(dataset_files, "read", lambda name, source, split: images[split])
    monkeypatch.setattr(published, "check", lambda *_: None)
    datasets.prepare("fashion_mnist", folder, folder / "tfds")
    return "tfds:fashion_mnist"


def test_three_doors_to_one_run(fashion, tmp_path, monkeypatch):
    """The same images out of a file, out of folders and out of tfds: to the last digit."""
    results = {}
    for door in ("npz", "folders", "tfds"):
        config = RunConfig.of(
            dataset=doors(door, fashion, tmp_path, monkeypatch),
            data_dir=str(tmp_path / "tfds"),
            regularizer="none",
            **SHORT,
        )
        metrics = run(config, tmp_path / door, verbose=0)
        history = (tmp_path / door / "history.csv").read_text().splitlines()[1].split(",")
        model = keras.models.load_model(tmp_path / door / "classifier.keras")
        settings = json.loads((tmp_path / door / "config.json").read_text())
        figures = (metrics["test_loss"], metrics["test_spectral_norm"], history[:-1])
        results[door] = (figures, settings["data_digest"], model.get_weights())
    for figures, digest, weights in results.values():
        assert figures == results["npz"][0] and digest == results["npz"][1]
        assert all(map(np.array_equal, weights, results["npz"][2]))
    assert len(results["npz"][1]) == 64


@pytest.mark.parametrize("classes", [2, 100])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_sizes_colours_and_classes(classes, channels, tmp_path):
    shape = (9, 13) if channels is None else (9, 13, channels)
    content = arrays(n=6 * classes, classes=classes, shape=shape)
    path = save(tmp_path / "mine.npz", **content)
    data = data_sources.load(path)
    assert data.num_classes == classes and data.input_shape == (9, 13, channels or 1)
    assert len(data.validation.y) == classes and len(data.train.y) == 5 * classes
    assert np.array_equal(np.unique(data.validation.y), np.arange(classes))
    # Every image is there once, with its label.
    pixels = np.concatenate([data.train.x, data.validation.x])
    labels = np.concatenate([data.train.y, data.validation.y])
    found = {(x.tobytes(), int(y)) for x, y in zip(pixels, labels, strict=True)}
    stored = content["x_train"].reshape(-1, *data.input_shape).astype("float32") / 255
    expected = zip(stored, content["y_train"], strict=True)
    assert found == {(x.tobytes(), int(y)) for x, y in expected}
    made = pipeline.load(RunConfig.of(dataset=path, batch_size=2))
    flat = made.train.x.reshape(-1, channels or 1).astype(float)
    np.testing.assert_allclose(flat.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(flat.std(axis=0), 1, atol=1e-5)


def test_images_that_are_all_alike_are_no_bomb(tmp_path):
    """Its ratio and size would be too large for a part of a .keras file."""
    x = np.zeros((1100, 256, 256), "uint8")
    np.savez_compressed(tmp_path / "mine.npz", x_train=x, y_train=np.zeros(1100, int))
    file = zipfile.ZipFile(tmp_path / "mine.npz")
    with file, pytest.raises(ValueError, match="100 times what they take up"):
        archives.check_parts(file)
    raw = data_readers.read(str(tmp_path / "mine.npz"), None, None)
    assert raw.splits["train"][0].shape == x.shape


def test_forms_of_labels_and_pixels_are_the_same_data(tmp_path):
    content = arrays()
    expected = data_sources.digest(data_sources.load(save(tmp_path / "a.npz", **content)))
    forms = {
        "column": {k: v[:, None] if k[0] == "y" else v for k, v in content.items()},
        "one-hot": {k: np.eye(3)[v] if k[0] == "y" else v for k, v in content.items()},
        "floats": {
            k: v / np.float32(255) if k[0] == "x" else v.astype("uint8") for k, v in content.items()
        },
        "another order": {k: v[::-1] for k, v in content.items()},
    }
    for name, form in forms.items():
        path = save(tmp_path / f"{name}.npz", **form)
        assert data_sources.digest(data_sources.load(path)) == expected, name
    path = save(tmp_path / "other.npz", **content | {"y_test": content["y_test"][::-1]})
    assert data_sources.digest(data_sources.load(path)) != expected


def test_splits_that_are_not_given(tmp_path):
    content = {k: v for k, v in arrays(n=60).items() if "train" in k}
    data = data_sources.load(save(tmp_path / "a.npz", **content))
    for split, count in ((data.test, 4), (data.validation, 2), (data.train, 14)):
        assert np.bincount(split.y).tolist() == [count] * 3
    given = arrays() | {"x_val": arrays(9)["x_train"], "y_val": np.arange(9) % 3}
    data = data_sources.load(save(tmp_path / "b.npz", **given))
    assert len(data.validation.y) == 9 and len(data.train.y) == 60


def test_images_of_several_sizes_and_colours(tmp_path):
    make = wrong_inputs.folders(splits=("",), classes=("emu", "ant"))
    root = Path(make(tmp_path)["dataset"])
    (root / "ant" / "0.png").write_bytes(wrong_inputs.picture((20, 30), channels=3))
    (root / "ant" / ".hidden").write_text("no image")
    (root / "emu" / "0.jpg").write_bytes(wrong_inputs.picture((12, 12), kind="jpeg"))
    data = data_sources.load(str(root), image_size=(10, 10))
    assert data.class_names == ("ant", "emu") and data.input_shape == (10, 10, 3)
    assert data.train.x.min() >= 0 and data.train.x.max() <= 1
    grey = np.ptp(data.train.x, axis=-1).max(axis=(1, 2)) == 0
    assert grey.sum() >= len(grey) - 1
    # A run asks twice: nothing is decoded again until an image changes.
    assert data_sources.load(str(root), image_size=(10, 10)) is data
    (root / "emu" / "0.jpg").write_bytes(wrong_inputs.picture((14, 12), kind="jpeg"))
    assert data_sources.digest(data_sources.load(str(root), image_size=(10, 10))) != (
        data_sources.digest(data)
    )


def test_a_set_of_tensorflow_datasets(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr("tfjacreg.hosts.ask", lambda host: None)
    # Without a network the sizes of the splits are not known.
    splits = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[60], num_bytes=0)
        for name in ("train", "test")
    }
    monkeypatch.setattr(tfds.core.DatasetInfo, "splits", property(lambda self: splits))
    # Its images are drawn from one seed, so that both splits have the same.
    monkeypatch.setattr(data_sources, "_look_for_shared_images", lambda *_: None)
    with tfds.testing.mock_data(num_examples=60):
        data = data_sources.load("tfds:beans", tmp_path, image_size=(16, 16))
    assert data.input_shape == (16, 16, 3) and data.num_classes == 3
    assert data.class_names == ("angular_leaf_spot", "bean_rust", "healthy")


def test_a_few_images_in_both_splits_are_told(tmp_path):
    content = arrays(n=600)
    content["x_test"][0] = content["x_train"][0]
    with pytest.warns(UserWarning, match="1 of 300 test images are among the training images"):
        data_sources.load(save(tmp_path / "a.npz", **content))


def test_class_names_are_kept(tmp_path, capsys):
    path = save(tmp_path / "a.npz", **arrays(), class_names=["ant", "bee", "cat"])
    network = small_network((12, 12, 1), 3)
    network.save(tmp_path / "mine.keras")
    arguments = ["--dataset", path, "--network", str(tmp_path / "mine.keras"), "--epochs", "1"]
    assert script("train").main([*arguments, "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    by_class = metrics["test_accuracy_by_class"]
    assert list(by_class) == ["ant", "bee", "cat"]
    assert np.mean([*by_class.values()]) == pytest.approx(metrics["test_accuracy"])
    printed = capsys.readouterr().out
    assert all(f"    {name}" in printed for name in by_class)


# --- networks ---


def test_weights_of_a_file(tmp_path):
    seeded = layers.Conv2D(4, 3, kernel_initializer=keras.initializers.HeNormal(seed=5))
    network = small_network((12, 12, 1), 3, layers.RandomFlip("horizontal"), seeded)
    network.save(tmp_path / "mine.keras")
    name, shape = str(tmp_path / "mine.keras"), (12, 12, 1)

    def weights(seed, **options):
        keras.utils.set_random_seed(seed)
        config = RunConfig.of(network=name, **options)
        return config.make_network(shape, 3).trainable_variables

    for kept, new in zip(network.trainable_variables, weights(0, pretrained=True), strict=True):
        np.testing.assert_array_equal(kept, new)
    first, again, other = weights(1), weights(1), weights(2)
    drawn = [n for n, v in enumerate(first) if v.name == "kernel"]
    assert len(drawn) == 3
    for n in drawn:
        np.testing.assert_array_equal(first[n], again[n])
        assert not np.array_equal(first[n], other[n])
        assert not np.array_equal(first[n], network.trainable_variables[n])


def test_augmentation_and_batch_norm_work_as_in_fit(tmp_path, monkeypatch):
    """Without a penalty the run is what Keras' own fit makes of the same network and batches."""
    path = save(tmp_path / "a.npz", **arrays())
    flip = layers.RandomFlip("horizontal", seed=3)
    small_network((12, 12, 1), 3, flip).save(tmp_path / "mine.keras")
    config = RunConfig.of(
        dataset=path,
        network=str(tmp_path / "mine.keras"),
        pretrained=True,
        regularizer="none",
        **SHORT,
    )
    run(config, tmp_path / "run", verbose=0)
    data = pipeline.load(config)
    keras.utils.set_random_seed(0)
    plain = keras.models.load_model(tmp_path / "mine.keras", compile=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    plain.compile(keras.optimizers.SGD(0.01, momentum=0.8), loss)
    epoch = tf.Variable(0, dtype=tf.int64)
    plain.fit(pipeline.training_batches(*data.train, 16, 0, epoch, False), shuffle=False, verbose=0)
    classifier = keras.models.load_model(tmp_path / "run" / "classifier.keras")
    pixels = data_sources.load(path).test.x
    np.testing.assert_allclose(
        classifier.predict(pixels, verbose=0), plain.predict(data.test.x, verbose=0), atol=1e-4
    )


def test_a_function(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "my_networks.py").write_text(
        "import os, keras\n"
        "os.chdir('elsewhere')\n"
        "def make(input_shape, num_classes):\n"
        "    return keras.Sequential([keras.Input(input_shape), keras.layers.Flatten(),\n"
        "                             keras.layers.Dense(num_classes)])\n"
    )
    monkeypatch.chdir(tmp_path)
    config = RunConfig.of(network="my_networks:make").identified()
    path = list(sys.path)
    assert config.make_network((4, 5, 3), 7).output_shape == (None, 7)
    assert sys.path == path
    monkeypatch.chdir(tmp_path)
    assert config.network_digest == network_sources.digest("my_networks:make") is not None
    assert config.default_folder().name == "digits-my_networks-make-spectral-0.01-seed0"
    (tmp_path / "sweep.toml").write_text(
        'network = "my_networks:make"\nrepeats = 1\n[methods.none]\n'
    )
    with pytest.raises(ValueError, match="must name no code: a sweep file is data"):
        Sweep.load(tmp_path / "sweep.toml")


# --- identity ---


def test_other_data_or_another_network_is_refused(tmp_path):
    content = arrays()
    path = save(tmp_path / "a.npz", **content)
    network = tmp_path / "mine.keras"
    small_network((12, 12, 1), 3).save(network)
    config = RunConfig.of(dataset=path, network=str(network), regularizer="none", **SHORT)
    out = tmp_path / "run"
    metrics = run(config, out, verbose=0)
    # The same data and network under another name, in another order: the same run.
    moved = save(tmp_path / "b.npz", **{k: v[::-1] for k, v in content.items()})
    assert run(dataclasses.replace(config, dataset=moved), out, verbose=0) == metrics
    save(tmp_path / "a.npz", **content | {"x_test": 255 - content["x_test"]})
    with pytest.raises(RunError, match="another configuration: data_digest is"):
        run(config, out, verbose=0)
    save(tmp_path / "a.npz", **content)
    small_network((12, 12, 1), 3, layers.Conv2D(2, 3)).save(network)
    with pytest.raises(RunError, match="another configuration: network_digest is"):
        run(config, out, verbose=0)


def test_a_sweep_of_one_s_own(tmp_path):
    path = save(tmp_path / "a.npz", **arrays())
    (tmp_path / "sweep.toml").write_text(
        f'dataset = "{path}"\nnetwork = "mine.keras"\npretrained = true\nimage_size = [8, 8]\n'
        "repeats = 1\n[methods.none]\n"
    )
    config = Sweep.load(tmp_path / "sweep.toml").any_config
    assert (config.dataset, config.pretrained, config.image_size) == (path, True, (8, 8))


def test_sweeps_on_other_data_share_no_study(tmp_path):
    """Under the same name on one server; a folder has its own database, and one sweep."""
    (tmp_path / "own.toml").write_text('dataset = "a.npz"\nrepeats = 1\n[methods.none]\n')
    sweep = Sweep.load(tmp_path / "own.toml")
    config = sweep.any_config
    others = [
        dataclasses.replace(config, data_digest=64 * "1"),
        dataclasses.replace(config, network_digest=64 * "2"),
    ]
    assert len({study_name(sweep, c, shared=True) for c in (config, *others)}) == 3
    assert len({study_name(sweep, c, shared=False) for c in (config, *others)}) == 1
    # Without digests the name is that of the versions before, so that their studies go on.
    digest = hashlib.sha256(sweep.content).hexdigest()
    assert study_name(sweep, config, shared=True) == f"a-lenet-{digest[:16]}"


# --- evaluate.py ---


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Evaluates a small classifier on data of one's own, by measures that take no time."""
    found = {"iterations": [1], "accuracy": [0.5]}
    monkeypatch.setattr(measures, "measure", lambda name, *_: {name: found})
    file = tmp_path / "theirs.keras"
    small_network((None, None, 3), 3).save(file)

    def measured(name, dataset, image_size=None):
        (target,) = evaluation.find_targets(
            [tmp_path / "theirs.keras"],
            dataset=dataset,
            out=tmp_path / "out",
            image_size=image_size,
        )
        test = evaluation.test_images(target)
        return evaluation.evaluate(target, test.x, test.y, perturbations=[name])

    return measured


@pytest.mark.filterwarnings("ignore:.* is right on:UserWarning")
def test_an_evaluation_has_one_data_set(evaluate, tmp_path):
    content = arrays(shape=(12, 12, 3))
    path = save(tmp_path / "mine.npz", **content)
    before = evaluate("tpgd", path)
    assert before["settings"]["data_digest"] == data_sources.digest(data_sources.load(path))
    save(tmp_path / "mine.npz", **content | {"x_test": 255 - content["x_test"]})
    with pytest.raises(ValueError, match="made with data_digest=.*, now it is"):
        evaluate("pgd", path)
    # An evaluation from before the digest was written goes on.
    file = tmp_path / "out" / "theirs" / "evaluation.json"
    old = json.loads(file.read_text())
    del old["sha256"], old["settings"]["data_digest"], old["settings"]["image_size"]
    file.write_text(json.dumps(old))
    assert {"tpgd", "pgd"} < evaluate("pgd", path).keys()


@pytest.mark.filterwarnings("ignore:.* is right on:UserWarning")
def test_an_evaluation_has_images_of_one_size(evaluate, tmp_path):
    for label in "abc":
        (tmp_path / "mine" / label).mkdir(parents=True)
        for number, image in enumerate(arrays(n=9, shape=(12, 12, 3))["x_train"]):
            png = tf.io.encode_png(image).numpy()
            (tmp_path / "mine" / label / f"{number}.png").write_bytes(png)
    evaluate("tpgd", str(tmp_path / "mine"), (8, 8))
    with pytest.raises(ValueError, match=r"image_size=\[8, 8\], now it is \[9, 9\]"):
        evaluate("pgd", str(tmp_path / "mine"), (9, 9))


@pytest.fixture
def of_pixels(tmp_path):
    """A classifier of digits in 0..255, standardized outside of it, that gets most right."""
    data = data_sources.load("digits")
    keras.utils.set_random_seed(0)
    inner = keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten(), layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    inner.compile(keras.optimizers.Adam(0.003), loss)
    inner.fit((255 * data.train.x - 80) / 90, data.train.y, epochs=4, verbose=0)
    inner.save(tmp_path / "standardized.keras")
    behind = layers.Rescaling(1 / 90, offset=-80 / 90)
    keras.Sequential([keras.Input((28, 28, 1)), behind, inner]).save(tmp_path / "pixels.keras")
    return tmp_path


def judged(folder, name, *options, monkeypatch):
    monkeypatch.setattr(
        measures, "PLAN", {**measures.PLAN, "noise": {"variance": [0.1], "draws": 1}}
    )
    arguments = [folder / name, "--dataset", "digits", "--attacks", "noise", "--limit", 60]
    arguments += ["--out", folder / "out", *options]
    status = script("evaluate").main([str(a) for a in arguments])
    assert status == 0
    stem = Path(name).stem
    return json.loads((folder / "out" / stem / "evaluation.json").read_text())


def test_pixels_mean_and_std(of_pixels, monkeypatch, capsys):
    a = judged(of_pixels, "pixels.keras", "--pixels", "0..255", monkeypatch=monkeypatch)
    scale = ("--pixels", "0..255", "--mean", "80", "--std", "90")
    b = judged(of_pixels, "standardized.keras", *scale, monkeypatch=monkeypatch)
    assert a["clean_accuracy"] > 0.8 and a["clean_accuracy"] == b["clean_accuracy"]
    assert a["noise"] == b["noise"]
    assert b["settings"]["scale"] == "pixels in [0, 255], less 80, divided by 90"
    printed = capsys.readouterr().out
    assert "images 28x28x1, pixels in [0, 255], into 10 classes, logits out: accuracy" in printed
    with pytest.raises(AssertionError):  # Another scale is another measurement.
        judged(of_pixels, "pixels.keras", monkeypatch=monkeypatch)
    assert "scale=pixels in [0, 255], now it is pixels in [0, 1]" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--pixels", "--pix"])
def test_a_range_below_0(option):
    args = script("evaluate").parse(["theirs.keras", option, "-1..1", "--mean", "-0.5"])
    assert (args.pixels, args.mean) == ("-1..1", [-0.5])
    assert Scale.of(args.pixels, [], []) == Scale(-1.0, 1.0)


def test_a_classifier_that_guesses_is_told(of_pixels, monkeypatch):
    with (
        pytest.warns(UserWarning, match="guessing is on 10.0 %.*begins with 'rescaling.*--pixels"),
        pytest.warns(UserWarning, match="scales its pixels by 0.011 itself"),
    ):
        judged(of_pixels, "pixels.keras", monkeypatch=monkeypatch)
