"""Wrong data sets, networks and classifiers, and a part of the message that each causes.

Each is `(what is wrong, make, sentence)`: `make(folder)` returns the settings of a run, or for
`CLASSIFIERS` the arguments of evaluate.py. `docs/own_data.md` has the table.
"""

import io
import struct
import sys
import zipfile

import keras
import numpy as np
import tensorflow as tf
from keras import layers

RNG = np.random.default_rng(0)
SHAPE = (12, 12, 1)


def arrays(n=60, classes=3, shape=SHAPE):
    """A data set without faults."""
    x = RNG.integers(0, 256, size=(n, *shape), dtype="uint8")
    test = RNG.integers(0, 256, size=(n // 2, *shape), dtype="uint8")
    return {
        "x_train": x,
        "y_train": np.arange(n) % classes,
        "x_test": test,
        "y_test": np.arange(n // 2) % classes,
    }


def npz(change):
    """A data set with something changed: by a function, or by other values for keys."""

    def make(folder):
        content = arrays()
        if callable(change):
            content = change(content) or content
        else:
            content |= change
        np.savez(folder / "mine.npz", **content)
        return {"dataset": str(folder / "mine.npz")}

    return make


def raw(content):
    def make(folder):
        (folder / "mine.npz").write_bytes(content)
        return {"dataset": str(folder / "mine.npz")}

    return make


def without(*keys):
    return npz(lambda a: {k: v for k, v in a.items() if k not in keys})


def changed(key, function):
    return npz(lambda a: a | {key: function(a[key])})


def both(name, function):
    """A change of the images or of the labels in both splits."""
    return npz(lambda a: a | {f"{name}_{s}": function(a[f"{name}_{s}"]) for s in ("train", "test")})


def put(x, where, value):
    x = x.copy()
    x[where] = value
    return x


def floats(x):
    return x.astype("float32") / 255


def a_whole_file_but_its_end(folder):
    np.savez(folder / "whole.npz", **arrays())
    (folder / "mine.npz").write_bytes((folder / "whole.npz").read_bytes()[:-900])
    return {"dataset": str(folder / "mine.npz")}


def a_single_array(folder):
    np.save(folder / "mine.npy", arrays()["x_train"])
    (folder / "mine.npy").rename(folder / "mine.npz")
    return {"dataset": str(folder / "mine.npz")}


def a_small_file_of_a_large_array(folder):
    """Its header says what would be unpacked."""
    header = io.BytesIO()
    content = {"descr": "|u1", "fortran_order": False, "shape": (1 << 45, 12, 12)}
    np.lib.format.write_array_header_1_0(header, content)
    np.savez(folder / "mine.npz", y_train=np.zeros(9, int))
    with zipfile.ZipFile(folder / "mine.npz", "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x_train.npy", header.getvalue() + bytes(9999))
    return {"dataset": str(folder / "mine.npz")}


def a_changed_byte(folder):
    """The first one of the compressed data, which then are of no kind that there is."""
    np.savez_compressed(folder / "mine.npz", **arrays())
    content = bytearray((folder / "mine.npz").read_bytes())
    content[30 + sum(struct.unpack("<2H", content[26:30]))] = 255
    (folder / "mine.npz").write_bytes(content)
    return {"dataset": str(folder / "mine.npz")}


OBJECTS = np.array([np.zeros((2, 2)), np.zeros((3, 3))], dtype=object)
COPIED = npz(lambda a: a | {"x_test": a["x_train"][:30], "y_test": a["y_train"][:30]})
NPZ = [
    ("no such file", lambda f: {"dataset": str(f / "no.npz")}, "There is no data set at"),
    ("a file of text", raw(b"hello"), "it is no .npz file"),
    ("an empty file", raw(b""), "is empty"),
    ("a file that was cut", a_whole_file_but_its_end, "is damaged"),
    ("a file with a changed byte", a_changed_byte, "is damaged"),
    (
        "a small file of a large array",
        a_small_file_of_a_large_array,
        "its arrays must fit into the memory of this machine",
    ),
    ("a single array", a_single_array, "it holds a single array"),
    ("no x_train", without("x_train"), "without x_train"),
    ("no y_train", without("y_train"), "without y_train"),
    ("images for a test without labels", without("y_test"), "without y_test"),
    ("a key that is not known", npz({"x_valid": np.zeros(3)}), "Received: ['x_valid']"),
    ("an object array", npz({"x_train": OBJECTS}), "which is never unpickled"),
    ("flat images", both("x", lambda x: x.reshape(len(x), -1)), "must be an array [N, H, W]"),
    ("no image", changed("x_train", lambda x: x[:0]), "there must be images"),
    (
        "channels before the sides",
        both("x", lambda x: np.repeat(x, 3, axis=-1).transpose(0, 3, 1, 2)),
        "x.transpose(0, 2, 3, 1)",
    ),
    ("integers of another type", both("x", lambda x: x.astype("int64")), "x.astype('uint8')"),
    ("complex numbers", both("x", lambda x: x + 0j), "pixels must be uint8, or floats in [0, 1]"),
    ("uint8 of 0 and 1", both("x", lambda x: x // 255), "uint8 pixels must reach up to 255"),
    ("floats in 0..255", both("x", lambda x: x.astype("float32")), "Divide them by 255"),
    ("standardized floats", both("x", lambda x: floats(x) - 0.5), "They look standardized"),
    ("floats above 255", both("x", lambda x: x * 9.0), "Map them into [0, 1]"),
    ("floats divided twice", both("x", lambda x: floats(x) / 255), "divided by 255 twice"),
    (
        "a pixel that is NaN",
        changed("x_train", lambda x: put(floats(x), (3, 2, 1), np.nan)),
        "every pixel must be a finite number. Received: 1 that",
    ),
    (
        "an infinite pixel",
        changed("x_test", lambda x: put(floats(x), (3, 2, 1), np.inf)),
        "x_test: every pixel must be a finite number",
    ),
    (
        "test images of another size",
        changed("x_test", lambda x: x[:, 1:]),
        "all images must have one shape",
    ),
    (
        "a constant channel",
        both("x", lambda x: np.concatenate([x, 0 * x + 7], axis=-1)),
        "Received: channel 1 that is",
    ),
    ("fewer labels than images", changed("y_train", lambda y: y[:-1]), "there must be one per"),
    ("names as labels", both("y", lambda y: y.astype(str)), "return_inverse=True"),
    ("labels that are no integers", both("y", lambda y: y * 1.0), "they must be integers"),
    ("a negative label", changed("y_train", lambda y: y - 1), "they must count from 0"),
    ("labels from 1", both("y", lambda y: y + 1), "Save y - 1"),
    ("labels that skip", both("y", lambda y: y * 2), "Received: none of [1, 3]"),
    ("one class alone", both("y", lambda y: 0 * y), "at least two classes"),
    ("a class in the test alone", changed("y_test", lambda y: put(y, 0, 9)), "of the test split"),
    (
        "rows that are not one-hot",
        both("y", lambda y: np.ones((len(y), 3))),
        "rows must be one-hot",
    ),
    ("too few class names", npz({"class_names": ["a", "b"]}), "must name each of the 3 classes"),
    ("a class name twice", npz({"class_names": ["a", "b", "a"]}), "class_names must differ"),
    ("numbers as class names", npz({"class_names": [0, 1, 2]}), "must be a list of strings"),
    ("test images among the training images", COPIED, "Received: 30 of 30 that are"),
    (
        "a class of one image, no test split",
        npz(lambda a: {"x_train": a["x_train"], "y_train": put(0 * a["y_train"], 0, 1)}),
        "at least two images to hold one out",
    ),
    (
        "fewer images than a batch",
        lambda f: npz({})(f) | {"batch_size": 64},
        "at least a batch of training images, 64. Received: 54",
    ),
    (
        "--image-size for an .npz file",
        lambda f: npz({})(f) | {"image_size": (8, 8)},
        "have one size; --image-size is for folders",
    ),
]


def picture(size=(12, 12), channels=1, kind="png"):
    image = RNG.integers(0, 256, size=(*size, channels), dtype="uint8")
    return getattr(tf.io, f"encode_{kind}")(image).numpy()


def folders(change=lambda root: None, splits=("train", "test"), classes=("cat", "dog")):
    def make(folder):
        root = folder / "data"
        for split in splits:
            for name in classes:
                place = root / split / name
                place.mkdir(parents=True)
                for number in range(20):
                    (place / f"{number}.png").write_bytes(picture())
        change(root)
        return {"dataset": str(root)}

    return make


def an_empty_folder(folder):
    (folder / "data").mkdir()
    return {"dataset": str(folder / "data")}


FOLDERS = [
    ("no such folder", lambda f: {"dataset": f"{f}/no"}, "There is no data set at"),
    ("a folder without folders", an_empty_folder, "a folder of images for each class"),
    (
        "test/ without train/",
        folders(splits=("test",)),
        "beside test/ there must be train/",
    ),
    (
        "a class folder beside train/",
        folders(lambda root: (root / "cat").mkdir()),
        "Received: ['cat'] too",
    ),
    (
        "an image beside the class folders",
        folders(lambda root: (root / "train/a.png").write_bytes(picture())),
        "must lie in the folder of their class",
    ),
    (
        "a file that is no image",
        folders(lambda root: (root / "train/cat/notes.txt").write_text("x")),
        "Received: notes.txt",
    ),
    (
        "a damaged image",
        folders(lambda root: (root / "train/cat/0.png").write_bytes(picture()[:50])),
        "0.png cannot be read as an image",
    ),
    (
        "a link to an image elsewhere",
        folders(lambda root: (root / "train/cat/link.png").symlink_to("/etc/passwd")),
        "a data set must lie in its folder. Received: a symbolic link",
    ),
    (
        "a class folder that is a link",
        folders(lambda root: (root / "train/emu").symlink_to(root / "train/cat")),
        "a data set must lie in its folder. Received: a symbolic link",
    ),
    (
        "an empty class folder",
        folders(lambda root: (root / "train/emu").mkdir()),
        "there must be images in it",
    ),
    (
        "a class in test/ alone",
        folders(lambda root: (root / "test/emu").mkdir()),
        "Received: emu too",
    ),
    (
        "images of two sizes",
        folders(lambda root: (root / "test/cat/0.png").write_bytes(picture((9, 12)))),
        "Give --image-size H W",
    ),
    (
        "an image with transparency",
        folders(lambda root: (root / "train/cat/0.png").write_bytes(picture(channels=4))),
        "Save it without transparency",
    ),
]


TFDS = [
    ("a tfds set that is not known", lambda f: {"dataset": "tfds:no_such_set"}, "has no data set"),
    (
        "a name that leads to code elsewhere",
        lambda f: {"dataset": "tfds:huggingface:mnist"},
        "must be named tfds:NAME",
    ),
    (
        "a tfds set of other things than images",
        lambda f: {"dataset": "tfds:iris", "data_dir": str(f)},
        "it must be one of images and their classes",
    ),
]


def saved(*stack, shape=SHAPE):
    """A network from a file, with a data set without faults."""

    def make(folder):
        keras.Sequential([keras.Input(shape), *(kind() for kind in stack)]).save(
            folder / "mine.keras"
        )
        return npz({})(folder) | {"network": str(folder / "mine.keras")}

    return make


def named(name, text=None):
    def make(folder):
        if text is not None:
            file = folder / f"{name.partition(':')[0].replace('.', '/')}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
            (file.parent / "__init__.py").write_text("no_such_name")  # Of a package, in a folder.
            sys.path.insert(0, str(folder))
        return npz({})(folder) | {"network": name}

    return make


def two_inputs(folder):
    a, b = keras.Input(SHAPE), keras.Input(SHAPE)
    out = layers.Dense(3)(layers.Flatten()(layers.Add()([a, b])))
    keras.Model([a, b], out).save(folder / "mine.keras")
    return npz({})(folder) | {"network": str(folder / "mine.keras")}


def with_code(folder):
    keras.Sequential(
        [keras.Input(SHAPE), layers.Flatten(), layers.Lambda(lambda x: x), layers.Dense(3)]
    ).save(folder / "mine.keras")
    return npz({})(folder) | {"network": str(folder / "mine.keras")}


def by_operations(start, end):
    """A network that begins or ends with an operation in place of a layer."""

    def make(folder):
        inputs = keras.Input(SHAPE)
        outputs = end(layers.Dense(3)(layers.Flatten()(start(inputs))))
        keras.Model(inputs, outputs).save(folder / "mine.keras")
        return npz({})(folder) | {"network": str(folder / "mine.keras")}

    return make


IMPORTS = "import keras\n"
CODE = IMPORTS + "def make(shape, classes):\n    "
NETWORKS = [
    ("no such network", lambda f: npz({})(f) | {"network": f"{f}/no.keras"}, "There is no network"),
    (
        "a network that ends in a softmax",
        saved(layers.Flatten, lambda: layers.Dense(3, activation="softmax", name="last")),
        '.get_layer("last").activation = keras.activations.linear',
    ),
    (
        "a Softmax layer at the end",
        saved(layers.Flatten, lambda: layers.Dense(3), lambda: layers.Softmax(name="last")),
        '.get_layer("last").input).save("logits.keras")',
    ),
    (
        "a network that begins with Rescaling",
        saved(lambda: layers.Rescaling(1 / 255), layers.Flatten, lambda: layers.Dense(3)),
        "one that begins with 'rescaling",
    ),
    (
        "Normalization behind an augmentation",
        saved(
            lambda: layers.RandomFlip("horizontal"),
            lambda: layers.Normalization(mean=0.5, variance=0.1),
            layers.Flatten,
            lambda: layers.Dense(3),
        ),
        "(Normalization). Take it off",
    ),
    (
        "a division of the pixels at the start",
        by_operations(lambda x: x / 255.0, lambda y: y),
        "one that scales them by 0.0039",
    ),
    (
        "a softmax by an operation at the end",
        by_operations(lambda x: x, keras.ops.softmax),
        "one whose outputs are probabilities",
    ),
    (
        "images of another size",
        saved(layers.Flatten, lambda: layers.Dense(3), shape=(9, 9, 1)),
        "takes images of shape (9, 9, 1), and the data has 12x12x1",
    ),
    (
        "another number of classes",
        saved(layers.Flatten, lambda: layers.Dense(5)),
        "and the data has 3 classes",
    ),
    ("a network with two inputs", two_inputs, "must have one input and one output"),
    ("a file with code in it", with_code, "Lambda layer, and the Python code of a file is not run"),
    ("a module that is not there", named("no_such_module:make"), "cannot be imported"),
    ("a function that is not there", named("wrong_a:other", CODE), "cannot be imported"),
    ("a name that is none", named("wrong_b:other", "make = 3"), "has no function other"),
    (
        "a function that fails",
        named("wrong_c:make", CODE + "raise RuntimeError('so')"),
        "it raised RuntimeError: so",
    ),
    ("a function that returns a list", named("wrong_d:make", CODE + "return []"), "Received: list"),
    (
        "a function with a layer of its own",
        named(
            "wrong_e:make",
            IMPORTS
            + "class Own(keras.layers.Layer):\n    def call(self, x):\n        return x\n"
            + "def make(shape, classes):\n    return keras.Sequential([keras.Input(shape), Own(), "
            + "keras.layers.Flatten(), keras.layers.Dense(classes)])\n",
        ),
        "no code is imported or run for a file",
    ),
    (
        "a function that returns a model with code of its own",
        named(
            "wrong_f:make",
            IMPORTS
            + "class Net(keras.Model):\n    def call(self, x):\n        return x\n"
            + "def make(shape, classes):\n    return Net()\n",
        ),
        "Build it from inputs = keras.Input(input_shape), and return keras.Model(inputs, outputs)",
    ),
    (
        "a function whose network is too deep for the images",
        named("wrong_g:make", CODE + "return keras.Sequential([keras.layers.Conv2D(3, 13)])"),
        "does not take images of 12x12x1",
    ),
    (
        "a function in a package with a mistake",
        named("wrong_package.module:make", CODE + "pass"),
        "cannot be imported: NameError: name 'no_such_name' is not defined",
    ),
    ("a file of HDF5", lambda f: npz({})(f) | {"network": "mine.h5"}, ".save('mine.keras')"),
    (
        "--pretrained for a name",
        lambda f: npz({})(f) | {"pretrained": True},
        "`pretrained` is for a network out of FILE.keras",
    ),
]


def a_file(name, content=b""):
    def make(folder):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return [path.parent if path.name == "saved_model.pb" else path, "--dataset", "digits"]

    return make


def options(*given):
    def make(folder):
        keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten(), layers.Dense(10)]).save(
            folder / "mine.keras"
        )
        return [folder / "mine.keras", "--dataset", "digits", *given]

    return make


CLASSIFIERS = [
    ("a classifier in HDF5", a_file("mine.h5"), "without a check of the code in it. Convert"),
    ("a SavedModel", a_file("mine/saved_model.pb"), "is a SavedModel: a graph that runs whatever"),
    ("--pixels that is no range", options("--pixels", "255"), "--pixels must be LOW..HIGH"),
    ("--pixels the wrong way round", options("--pixels", "255..0"), "LOW below HIGH"),
    ("--mean without --std", options("--mean", "0.5"), "must be given together"),
    ("--std that is 0", options("--mean", "0.5", "--std", "0"), "--std must be positive"),
    (
        "--mean of too many channels",
        options("--mean", "1", "1", "--std", "1", "1"),
        "or one for each of the 1 channels",
    ),
    (
        "--image-size for a data set of the project",
        options("--image-size", "32", "32"),
        "--image-size is for folders and tfds:NAME; digits has one size",
    ),
]
RUNS = [*NPZ, *FOLDERS, *TFDS, *NETWORKS]
