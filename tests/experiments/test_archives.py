"""A `.keras` file of a stranger: what it may hold is known before any of it is made an object."""

import copy
import io
import json
import stat
import threading
import zipfile
from concurrent import futures

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from tfjacreg.experiments import archives, checkpoint

DENSE = {"module": "keras.layers", "class_name": "Dense", "config": {}, "registered_name": None}


def archive(*, description=DENSE, more=(), compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as opened:
        text = description if isinstance(description, bytes) else json.dumps(description)
        opened.writestr("config.json", text)
        for name, content in more:
            opened.writestr(name, content)
    return file


def function(module, name, registered="function"):
    return {
        "module": module,
        "class_name": "function",
        "config": name,
        "registered_name": registered,
    }


FOREIGN = {
    "builtins.exec": function("builtins", "exec"),
    "builtins.eval": function("builtins", "eval", None),
    "builtins.__import__": function("builtins", "__import__", "__import__"),
    "os.system": function("os", "system", "system"),
    "keras.utils.get_file": function("keras.utils", "get_file", "get_file"),
    "keras.activations.relu": function("keras.activations", "relu"),
    "builtins.dict": DENSE | {"module": "builtins", "class_name": "dict"},
    "keras.src.saving.saving_lib.Path": DENSE
    | {"module": "keras.src.saving.saving_lib", "class_name": "Path"},
    "keras.layers.TFSMLayer": DENSE | {"class_name": "TFSMLayer"},
    "keras.layers.TorchModuleWrapper": DENSE | {"class_name": "TorchModuleWrapper"},
    "keras.layers.StringLookup": DENSE | {"class_name": "StringLookup"},
    "keras.layers.TextVectorization": DENSE | {"class_name": "TextVectorization"},
    "keras.callbacks.CSVLogger": DENSE | {"module": "keras.callbacks", "class_name": "CSVLogger"},
    "keras.layers.Nobody": DENSE | {"class_name": "Nobody"},
    "None.Nobody": DENSE | {"module": None, "class_name": "Nobody"},
    "None.__typespec__": DENSE | {"module": None, "class_name": "__typespec__"},
    "tfjacreg.model.Dense": DENSE | {"module": "tfjacreg.model"},
    "tfjacreg.datasets.Path": DENSE
    | {"module": "tfjacreg.datasets", "class_name": "Path", "registered_name": "tfjacreg>Path"},
    "keras.layers.Dense": DENSE | {"registered_name": "Other>Dense"},
    "3.Dense": DENSE | {"module": 3},
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("deep", [False, True])
def test_what_is_not_a_layer_of_keras_is_refused(name, deep):
    description = FOREIGN[name]
    if deep:
        description = DENSE | {"config": {"layers": [{"inner": [[description]]}]}}
    with pytest.raises(ValueError, match="no code is imported or run for a file") as caught:
        archives.check(archive(description=description))
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "item",
    [DENSE | {"class_name": "Lambda"}, {"class_name": "__lambda__", "config": {"value": "x"}}],
)
def test_python_code_in_a_description_is_refused(item):
    with pytest.raises(ValueError, match="Python code of a file is not run"):
        archives.check(archive(description=[[item]]))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([("../x", b"")], "must stay inside it"),
        ([("/etc/x", b"")], "must stay inside it"),
        ([("a/../../x", b"")], "must stay inside it"),
        ([("a\\..\\x", b"")], "must stay inside it"),
        ([(f"part{i}", b"") for i in range(archives.PARTS)], "at most 1000 parts"),
        ([("a.json", b"[" * 100_000)], "does not say what model it is"),
        ([("a.json", b"[" * 250 + b"]" * 250)], "200 in each other"),
        ([("a.json", b"1" * 5000)], "does not say what model it is"),
        ([("model.weights.h5", b"no HDF5")], "weights cannot be read"),
    ],
)
def test_parts_have_bounds(parts, message):
    with pytest.raises(ValueError, match=message):
        archives.check(archive(more=parts))


def test_parts_are_files_that_anybody_can_read():
    """Neither links, which lead somewhere, nor encrypted."""
    for mode in (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK):
        link = zipfile.ZipInfo("link")
        link.external_attr = (mode | 0o777) << 16
        with pytest.raises(ValueError, match="'link', a link or device"):
            archives.check(archive(more=[(link, "/etc/passwd")]))
    content = bytearray(archive(more=[("secret", b"x")]).getvalue())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # The flags of the last part.
        content[content.rindex(mark) + place] |= 1
    with pytest.raises(ValueError, match="must not be encrypted. Received: 'secret'"):
        archives.check(io.BytesIO(content))


@pytest.mark.parametrize("cut", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_is_refused(tmp_path, cut):
    keras.Sequential([keras.Input((3,)), layers.Dense(2)]).save(tmp_path / "a.keras")
    content = (tmp_path / "a.keras").read_bytes()
    (tmp_path / "a.keras").write_bytes(content[: int(cut * len(content))])
    with pytest.raises(ValueError, match="a.keras cannot be loaded: it is no whole .keras file"):
        checkpoint.load(tmp_path / "a.keras")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_part_that_is_there_twice_is_refused():
    with pytest.raises(ValueError, match=r"Received: 'config.json' again"):
        archives.check(archive(more=[("config.json", b"{}")]))


def test_a_bomb_is_refused_before_it_is_unpacked(monkeypatch):
    bomb = archive(more=[("bomb", bytes(80 << 20))], compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match="100 times what they take up"):
        archives.check(bomb)


def test_a_bomb_of_numbers_or_of_parts_that_share_their_bytes_is_refused():
    """As `.npz` and overlapping parts: what is told of sizes is added up before it is read."""
    with pytest.raises(ValueError, match="at most"):
        archives.check(archive(more=[("x.npy", bytes(70 << 20))], compression=zipfile.ZIP_LZMA))
    content = archive(more=[("one", bytes(1 << 20))], compression=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(content, "a") as opened:
        (one,) = (part for part in opened.infolist() if part.filename == "one")
        for number in range(200):  # Further names for the same bytes.
            other = copy.copy(one)
            other.filename = f"one{number}"
            opened.filelist.append(other)
            opened.NameToInfo[other.filename] = other
        opened._didModify = True
    with pytest.raises(ValueError, match="100 times what they take up"):
        archives.check(content)


def test_layers_are_no_larger_than_the_weights_that_come_along(tmp_path):
    """A few bytes of description can ask for terabytes: it is refused before they are taken."""
    pixels = keras.Input((4, 4, 1))
    x = layers.Conv2D(2, 3, name="large")(layers.UpSampling2D(2, name="wide")(pixels))
    keras.Model(pixels, layers.Dense(3)(layers.GlobalAveragePooling2D()(x))).save(
        tmp_path / "good.keras"
    )
    checkpoint.load(tmp_path / "good.keras")

    def change(old, new):
        with (
            zipfile.ZipFile(tmp_path / "good.keras") as good,
            zipfile.ZipFile(tmp_path / "mine.keras", "w") as mine,
        ):
            for part in good.namelist():
                content = good.read(part)
                if part == "config.json":
                    assert old in content
                    content = content.replace(old, new)
                mine.writestr(part, content)
        return tmp_path / "mine.keras"

    for old, new, message in (
        (b'"filters": 2', b'"filters": 2000000000', "the layer 'large', which would have"),
        (b'"units": 3', b'"units": 100000000', "the layer 'dense.*', which would have"),
        (b'"size": [2, 2]', b'"size": [100000, 100000]', "the layer 'wide', which would give"),
    ):
        with pytest.raises(ValueError, match=rf"mine.keras cannot be loaded.*{message}"):
            checkpoint.load(change(old, new))
    assert keras.Layer.add_weight.__module__.startswith("keras.")


def test_the_limit_is_of_one_load():
    """Two loads that end in the order in which they began, and a layer of a third thread."""
    own = keras.Layer.add_weight
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    def large():
        return layers.Dense(archives._SPARE + 2, use_bias=False).build((None, 1))

    def first():
        first_is_in.set()
        assert second_is_in.wait(20)
        with pytest.raises(ValueError, match="weights that are in it, 1 numbers"):
            large()

    def second():
        second_is_in.set()
        assert first_is_out.wait(20)
        large()
        with pytest.raises(ValueError, match="would have"):
            large()

    with futures.ThreadPoolExecutor(2) as pool:
        one = pool.submit(archives.with_layers_limited, 1, first)
        assert first_is_in.wait(20)
        two = pool.submit(archives.with_layers_limited, 2, second)
        assert second_is_in.wait(20)
        large()
        one.result()
        first_is_out.set()
        two.result()
    assert keras.Layer.add_weight is own


def weights(make):
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        make(opened)
    return [("model.weights.h5", file.getvalue())]


def virtual(file):
    layout = h5py.VirtualLayout(shape=(3,), dtype="f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(3,))
    file.create_virtual_dataset("x", layout)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f.__setitem__("x", h5py.ExternalLink("/etc/passwd", "x")), "in another file"),
        (lambda f: f.create_group("g").__setitem__("x", h5py.ExternalLink("a", "/")), "'g/x'"),
        (
            lambda f: f.create_dataset("x", (3,), "u1", external=[("/etc/passwd", 0, 3)]),
            "in another file",
        ),
        (virtual, "in another file"),
        (lambda f: f.create_dataset("x", (1 << 40,), "f4", chunks=(1024,)), "at most"),
        (lambda f: f.create_dataset("x", (1 << 25,), "f4", compression="gzip"), "at most"),
    ],
)
def test_weights_lie_in_the_file_itself(make, message):
    with pytest.raises(ValueError, match=message):
        archives.check(archive(more=weights(make)))


def test_models_of_keras_are_loaded(tmp_path):
    """With whatever a classifier is made of: activations, operations, a model in a model."""
    pixels = keras.Input((8, 8, 1))
    inner = keras.Sequential([keras.Input((8, 8, 1)), layers.Conv2D(2, 3, activation="relu")])
    x = layers.BatchNormalization()(inner(pixels))
    x = keras.ops.reshape(keras.ops.relu(x) + 1.0, (-1, 72))
    x = layers.Dense(3, kernel_regularizer="l2", activation=keras.activations.gelu)(x)
    model = keras.Model(pixels, x)
    model.compile(keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 9)), "mse")
    model.save(tmp_path / "model.keras")
    loaded = checkpoint.load(tmp_path / "model.keras")
    images = np.ones((2, 8, 8, 1), "float32")
    np.testing.assert_array_equal(loaded(images), model(images))


def large(kind):
    """A model of a few bytes whose operations take up gigabytes, and that gives ten numbers."""
    pixels = keras.Input((28, 28, 1))
    pads, crops = layers.ZeroPadding2D(6000, name="pads"), layers.Cropping2D(6000)
    inner = keras.Sequential([keras.Input((28, 28, 1)), pads, crops])
    x = {
        "an operation": lambda: keras.ops.tile(pixels, (1, 500, 500, 1)),
        "a layer that is used twice": lambda: crops(pads(crops(pads(pixels)))),
        "a model in it": lambda: inner(inner(pixels)),
        "layers in a layer": lambda: layers.Pipeline([pads, crops])(pixels),
        "more examples": lambda: keras.ops.repeat(pixels, 1_000_000, axis=0),
        "attention": lambda: keras.ops.expand_dims(
            layers.Attention()([layers.Reshape((-1, 1))(layers.UpSampling2D(20)(pixels))] * 2), -1
        ),
    }[kind]()
    return keras.Model(pixels, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


@pytest.mark.parametrize(
    "kind",
    [
        *("an operation", "a layer that is used twice", "a model in it", "layers in a layer"),
        *("more examples", "attention"),
    ],
)
def test_what_operations_give_has_a_bound(tmp_path, kind):
    large(kind).save(tmp_path / "mine.keras")
    with pytest.raises(ValueError, match="mine.keras cannot be loaded.*give at most 134217728"):
        checkpoint.load(tmp_path / "mine.keras")
