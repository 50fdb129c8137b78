import dataclasses
import gzip
import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tfjacreg import __main__ as command
from tfjacreg import dataset_files, datasets, hosts, published

RNG = np.random.default_rng(0)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def idx(array):
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes()
    return header + array.astype("uint8").tobytes()


def mnist_files(folder, train=40, test=20, compress=True):
    """Original files of a small data set; returns the arrays that are in them."""
    folder.mkdir(exist_ok=True)
    arrays = {}
    for split, size in (("train", train), ("t10k", test)):
        images = RNG.integers(0, 256, (size, 28, 28))
        labels = np.arange(size) % 10
        arrays[split] = images, labels
        for name, content in (
            (f"{split}-images-idx3-ubyte", idx(images)),
            (f"{split}-labels-idx1-ubyte", idx(labels)),
        ):
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return arrays


def cifar_files(folder, archive):
    folder.mkdir(exist_ok=True)
    images = RNG.integers(0, 256, (60, 32, 32, 3)).astype("uint8")
    labels = (np.arange(60) % 10).astype("uint8")
    records = np.concatenate(
        [labels[:, None], images.transpose(0, 3, 1, 2).reshape(60, -1)], axis=1
    )
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    parts = {name: records[10 * i : 10 * (i + 1)].tobytes() for i, name in enumerate(names)}
    if archive:
        with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
            for name, content in parts.items():
                info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        (folder / "cifar-10-batches-bin").mkdir()
        for name, content in parts.items():
            (folder / "cifar-10-batches-bin" / name).write_bytes(content)
    return images, labels


def match(images, originals):
    """The index of each image among the originals; every original must be there once."""
    where = {x.astype("uint8").tobytes(): i for i, x in enumerate(originals)}
    order = [where[x.astype("uint8").tobytes()] for x in images]
    assert sorted(order) == list(range(len(originals)))
    return order


@pytest.fixture
def small(monkeypatch, any_files):
    """Validation splits that fit data sets of 40 or 50 images."""
    for name in datasets.DOWNLOADED:
        monkeypatch.setitem(datasets.VALIDATION_SIZES, name, 10)


def test_digits():
    data = datasets.load("digits")
    assert data.input_shape == (28, 28, 1) and data.num_classes == 10
    assert [len(s.y) for s in (data.train, data.validation, data.test)] == [1257, 180, 360]
    for split in (data.train, data.validation, data.test):
        assert split.x.dtype == np.float32 and split.y.dtype == np.int32
        assert split.x.min() >= 0 and split.x.max() <= 1 and split.x.max() > 0.9
    np.testing.assert_array_equal(np.bincount(data.validation.y), 18)
    np.testing.assert_array_equal(np.bincount(data.test.y), 36)
    np.testing.assert_allclose(data.mean, data.train.x.astype("float64").mean(), rtol=1e-6)
    np.testing.assert_allclose(data.std, data.train.x.astype("float64").std(), rtol=1e-6)


def test_digits_are_scikit_learns():
    """Every original is there once, interpolated between the centres of its pixels."""
    from sklearn.datasets import load_digits

    data = datasets.load("digits")
    x = np.concatenate([s.x for s in (data.train, data.validation, data.test)])[..., 0]
    y = np.concatenate([s.y for s in (data.train, data.validation, data.test)])
    images, labels = load_digits(return_X_y=True)
    centres = (np.arange(28) + 0.5) * 8 / 28 - 0.5
    weights = np.stack([np.interp(centres, np.arange(8), row) for row in np.eye(8)], axis=1)
    expected = weights @ (images.reshape(-1, 8, 8) / 16) @ weights.T
    # Match each of ours with the nearest expected one, then compare whole.
    ours, theirs = x.reshape(len(x), -1), expected.reshape(len(x), -1)
    distance = (ours**2).sum(1)[:, None] - 2 * ours @ theirs.T + (theirs**2).sum(1)
    nearest = np.argmin(distance, axis=1)
    assert len(np.unique(nearest)) == len(labels)
    np.testing.assert_allclose(ours, theirs[nearest], atol=1e-5)
    np.testing.assert_array_equal(y, labels[nearest])


def test_seed_moves_only_the_validation_split():
    first, same, other = (datasets.load("digits", seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.validation.x, same.validation.x)
    np.testing.assert_array_equal(first.test.x, other.test.x)
    assert np.any(first.validation.x != other.validation.x)

    def rows(split):
        return {row.tobytes() for row in split.x}

    assert not rows(first.train) & rows(first.validation)


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
@pytest.mark.parametrize("compress", [True, False])
def test_prepare_mnist_family(tmp_path, small, name, compress):
    import tensorflow_datasets as tfds

    arrays = mnist_files(tmp_path / "source", compress=compress)
    folder = datasets.prepare(name, tmp_path / "source", tmp_path / "data")
    assert folder.parent.parent == tmp_path / "data" and folder.parent.name == name
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    # As anybody would load it.
    for split, original in (("train", "train"), ("test", "t10k")):
        loaded = tfds.load(
            name, split=split, data_dir=tmp_path / "data", download=False, batch_size=-1
        )
        images, labels = loaded["image"].numpy()[..., 0], loaded["label"].numpy()
        order = match(images, arrays[original][0])
        np.testing.assert_array_equal(labels, arrays[original][1][order])
    data = datasets.load(name, tmp_path / "data")
    assert [len(s.y) for s in (data.train, data.validation, data.test)] == [30, 10, 20]
    pixels = np.rint(data.test.x[..., 0] * 255)
    np.testing.assert_array_equal(data.test.y, arrays["t10k"][1][match(pixels, arrays["t10k"][0])])
    np.testing.assert_allclose(data.test.x[..., 0], pixels / 255, rtol=1e-6)


def test_prepared_equals_downloaded(tmp_path, small, monkeypatch):
    """Same images in the same order, or one seed would mean two different validation splits."""
    import tensorflow_datasets as tfds

    mnist_files(tmp_path / "source", train=50, test=20, compress=False)
    datasets.prepare("kmnist", tmp_path / "source", tmp_path / "prepared")
    # What tensorflow-datasets itself makes of these files once it has downloaded them.
    builder = tfds.builder("kmnist", data_dir=tmp_path / "downloaded")
    monkeypatch.setattr(
        type(builder),
        "_split_generators",
        lambda self, _: {
            split: self._generate_examples(
                size, *(tmp_path / "source" / name for name in dataset_files.IDX_FILES[split])
            )
            for split, size in (("train", 50), ("test", 20))
        },
    )
    builder.download_and_prepare()
    one, other = (datasets.load("kmnist", tmp_path / d) for d in ("prepared", "downloaded"))
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(one, split).x, getattr(other, split).x)
        np.testing.assert_array_equal(getattr(one, split).y, getattr(other, split).y)


@pytest.mark.parametrize("archive", [True, False])
def test_prepare_cifar10(tmp_path, small, archive):
    images, labels = cifar_files(tmp_path / "source", archive)
    datasets.prepare("cifar10", tmp_path / "source", tmp_path / "data")
    data = datasets.load("cifar10", tmp_path / "data")
    assert data.input_shape == (32, 32, 3) and data.mean.shape == (3,)
    order = match(np.rint(data.test.x * 255), images[50:])
    np.testing.assert_allclose(data.test.x, images[50:][order] / 255, rtol=1e-6)
    np.testing.assert_array_equal(data.test.y, labels[50:][order])
    train = data.train.x.astype("float64")
    np.testing.assert_allclose(data.mean, train.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(data.std, train.std(axis=(0, 1, 2)), rtol=1e-6)


def test_prepare_leaves_what_is_there(tmp_path, any_files):
    mnist_files(tmp_path / "source")
    folder = datasets.prepare("kmnist", tmp_path / "source", tmp_path / "data")
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert datasets.prepare("kmnist", tmp_path / "nowhere", tmp_path / "data") == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def truncated_gzip(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-2000])


def damaged_stream(folder):
    """Bad code in the middle of the stream, which zlib reports and not gzip."""
    path = folder / "train-images-idx3-ubyte.gz"
    content = gzip.compress(idx(np.zeros((40, 28, 28))))
    path.write_bytes(content[:12] + bytes([255] * 20) + content[32:])


def truncated_idx(folder):
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-7]))


def wrong_magic(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(b"\x00\x00\x0d\x01" + gzip.decompress(path.read_bytes())[4:]))


def not_gzip(folder):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(b"<html>404</html>")


def empty_file(folder):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b""))


def too_few_labels(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(7))))


def wrong_label(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.full(20, 11))))


def wrong_size(folder):
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(
        gzip.compress(idx(np.zeros((20, 32, 28), "uint8")))
    )


DAMAGE = {
    truncated_gzip: "train-images-idx3-ubyte.gz: expected a whole gzip file. Received",
    damaged_stream: "train-images-idx3-ubyte.gz: expected a whole gzip file. Received",
    truncated_idx: "t10k-images-idx3-ubyte.gz: expected 15696 bytes.*Received: 15689",
    wrong_magic: "train-labels-idx1-ubyte.gz: expected an idx file.*Received.*00000d01",
    not_gzip: "train-labels-idx1-ubyte.gz: expected a whole gzip file",
    empty_file: "train-labels-idx1-ubyte.gz: expected an idx file.*Received: 0 bytes",
    too_few_labels: "t10k-labels-idx1-ubyte.gz: expected a label for each of the 20.*Received: 7",
    wrong_label: "t10k-labels-idx1-ubyte.gz: expected labels from 0 to 9. Received: 11",
    wrong_size: "expected images of 28x28. Received",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named_and_nothing_is_written(tmp_path, damage):
    mnist_files(tmp_path / "source")
    damage(tmp_path / "source")
    with pytest.raises(ValueError, match=DAMAGE[damage]):
        datasets.prepare("fashion_mnist", tmp_path / "source", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*"))


def test_damaged_cifar(tmp_path):
    cifar_files(tmp_path / "source", archive=False)
    path = tmp_path / "source" / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3.bin: expected records of 3073 bytes"):
        datasets.prepare("cifar10", tmp_path / "source", tmp_path / "data")
    (tmp_path / "source" / "cifar-10-binary.tar.gz").write_bytes(b"not a tar")
    with pytest.raises(ValueError, match="expected a whole gzip file"):
        datasets.prepare("cifar10", tmp_path / "source", tmp_path / "data")
    (tmp_path / "source" / "cifar-10-binary.tar.gz").write_bytes(gzip.compress(b"not a tar" * 99))
    with pytest.raises(ValueError, match="expected a whole tar archive"):
        datasets.prepare("cifar10", tmp_path / "source", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*"))


def test_cifar_archive_with_changed_pixels(tmp_path):
    """Only the checksum at the end of the archive can tell."""
    cifar_files(tmp_path / "source", archive=True)
    path = tmp_path / "source" / "cifar-10-binary.tar.gz"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20] = bytes(b ^ 1 for b in content[middle : middle + 20])
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz: expected a whole"):
        datasets.prepare("cifar10", tmp_path / "source", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*"))


def test_missing_files(tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.gz or"):
        datasets.prepare("kmnist", tmp_path / "source", tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"cifar-10-binary.tar.gz or, unpacked"):
        datasets.prepare("cifar10", tmp_path / "source", tmp_path / "data")


@pytest.mark.parametrize("name", datasets.DOWNLOADED)
def test_no_network_and_no_data_names_both_ways_out(tmp_path, monkeypatch, name):
    def unreachable(_):
        raise OSError("no route to host")

    monkeypatch.setattr(hosts, "ask", unreachable)
    with pytest.raises(FileNotFoundError, match=r"there is a network.*tfjacreg prepare") as caught:
        datasets.load(name, tmp_path)
    assert ("dataset-fashion-mnist" in str(caught.value)) == (name == "fashion_mnist")


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match=r"digits.*fashion_mnist.*kmnist.*Received: 'mnist'"):
        datasets.load("mnist")
    with pytest.raises(ValueError, match=r"digits need no preparation. Received: 'digits'"):
        datasets.prepare("digits", tmp_path)


def test_a_data_set_too_small_for_its_validation_split(tmp_path, any_files):
    mnist_files(tmp_path / "source")
    datasets.prepare("kmnist", tmp_path / "source", tmp_path / "data")
    with pytest.raises(ValueError, match=r"more than 500 examples of every class.*Received: 4"):
        datasets.load("kmnist", tmp_path / "data")


def test_the_command(tmp_path, capsys, any_files):
    def prepare(*arguments):
        status = command.main(["prepare", *map(str, arguments)])
        return (status, *capsys.readouterr())

    mnist_files(tmp_path / "source")
    status, printed, _ = prepare("kmnist", tmp_path / "source", "--data-dir", tmp_path / "data")
    assert (status, printed) == (0, f"kmnist is in {tmp_path / 'data' / 'kmnist' / '3.0.1'}\n")
    status, _, error = prepare("fashion_mnist", tmp_path / "nowhere", "--data-dir", tmp_path)
    assert status == 2
    assert "error: Expected" in error and "Traceback" not in error


@pytest.mark.slow
def test_the_real_fashion_mnist(tmp_path):
    if not DEBIAN.exists() and not os.environ.get("CI"):
        pytest.skip("needs the original files: apt-get install dataset-fashion-mnist")
    datasets.prepare("fashion_mnist", DEBIAN, tmp_path)
    data = datasets.load("fashion_mnist", tmp_path)
    assert [len(s.y) for s in (data.train, data.validation, data.test)] == [55000, 5000, 10000]
    np.testing.assert_array_equal(np.bincount(data.validation.y), 500)
    # The published statistics of the whole training set.
    np.testing.assert_allclose(data.mean, 0.2860, atol=2e-3)
    np.testing.assert_allclose(data.std, 0.3530, atol=2e-3)


def files_of(owner, folder, compress):
    """A data set's files: Debian's of Fashion-MNIST; of others what is like them."""
    folder.mkdir()
    if owner == "fashion_mnist":
        for file in DEBIAN.glob("*.gz"):
            content = gzip.decompress(file.read_bytes())
            if compress:
                (folder / file.name).write_bytes(gzip.compress(content, compresslevel=1))
            else:
                (folder / file.stem).write_bytes(content)
        return
    # MNIST has from 5,421 to 6,742 images of a class, where the others have 6,000 of each.
    for split, size in (("train", 60_000), ("t10k", 10_000)):
        labels = np.arange(size) % 10
        labels[:50] = 1
        contents = {"images-idx3": idx(np.zeros((size, 28, 28), "u1")), "labels-idx1": idx(labels)}
        for kind, content in contents.items():
            name, data = f"{split}-{kind}-ubyte", content
            if compress:
                name, data = f"{name}.gz", gzip.compress(content, compresslevel=1)
            (folder / name).write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    ("owner", "name", "message"),
    [
        ("fashion_mnist", "kmnist", "a file of kmnist. Received: one of fashion_mnist, by its ch"),
        ("mnist", "fashion_mnist", "a file of fashion_mnist. Received: one with another checksum"),
        ("mnist", "kmnist", r"6000 images of each class. Received: \[5995, 6045"),
    ],
)
def test_the_files_of_another_set_are_refused(tmp_path, owner, name, message, compress):
    """However they are compressed, and before anything is written."""
    if owner == "fashion_mnist" and not DEBIAN.exists() and not os.environ.get("CI"):
        pytest.skip("needs the original files: apt-get install dataset-fashion-mnist")
    files_of(owner, tmp_path / "source", compress)
    with pytest.raises(ValueError, match=message):
        datasets.prepare(name, tmp_path / "source", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_published_checksums_are_compared(tmp_path, monkeypatch):
    """As tensorflow-datasets has them: of MNIST too, which is none of these sets."""
    import tensorflow_datasets as tfds

    mnist_files(tmp_path / "source")
    labels = {"train": np.arange(40) % 10, "test": np.arange(20) % 10}
    monkeypatch.setitem(published.COUNTS, "kmnist", {"train": 40, "test": 20})
    published.check("kmnist", tmp_path / "source", labels, tfds)
    with pytest.raises(ValueError, match=r"source: expected the test split of kmnist, 2 images"):
        published.check("kmnist", tmp_path / "source", labels | {"test": np.arange(19)}, tfds)
    path = tmp_path / "source" / "train-labels-idx1-ubyte.gz"
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    builder = tfds.builder_cls("mnist")
    (info, *_) = builder.url_infos.values()
    changed = {"url": dataclasses.replace(info, checksum=checksum)}
    monkeypatch.setattr(builder, "url_infos", changed)
    with pytest.raises(ValueError, match=rf"{path}: expected a file of kmnist. Received: one of m"):
        published.check("kmnist", tmp_path / "source", labels, tfds)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_source_that_is_no_file_is_refused(tmp_path, make):
    for name in ("train-images-idx3-ubyte.gz", dataset_files.CIFAR_ARCHIVE):
        make(tmp_path / name)
    for name in ("kmnist", "cifar10"):
        with pytest.raises(ValueError, match="expected a file. Received: a folder or a device"):
            datasets.prepare(name, tmp_path, tmp_path / "data")
