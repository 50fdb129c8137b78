"""Original files that hold more than they can, and prepared data that is damaged."""

import gzip
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from tfjacreg import dataset_files, datasets, hosts, published

ROOT = Path(__file__).parents[1]
FILES = ("data_batch_1.bin", *(f"data_batch_{n}.bin" for n in range(2, 6)), "test_batch.bin")


# `python -m tfjacreg` that takes small files for those of a data set.
SMALL_PREPARE = """
import sys
from tfjacreg import __main__, published
published.check = lambda *_: None
sys.exit(__main__.main())
"""


def idx(array):
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes()
    return header + array.astype("uint8").tobytes()


def kmnist_files(folder, train=60, test=20):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28))
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        labels = np.arange(count) % 10
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return folder


def archive(folder, members):
    """An archive of CIFAR-10: members by name, each its bytes or a `TarInfo`."""
    folder.mkdir()
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                file.addfile(info)


def records(count=2):
    return bytes(3073) * count


GOOD = [(f"cifar-10-batches-bin/{name}", records()) for name in FILES]
ARCHIVES = {
    "a name above": [*GOOD, ("../evil.bin", b"x")],
    "a name far above": [*GOOD, ("a/../../../../tmp/evil.bin", b"x")],
    "an absolute name": [*GOOD, ("/tmp/evil.bin", b"x")],
    "a batch above": [(f"../{name}", records()) for name in FILES],
    "a link above": [*GOOD, ("../link", (tarfile.SYMTYPE, "/etc/passwd"))],
    "a batch twice": [*GOOD, ("other/test_batch.bin", records())],
    "a link for a batch": [*GOOD[1:], (GOOD[0][0], (tarfile.SYMTYPE, "/etc/passwd"))],
    "a batch too large": [(GOOD[0][0], records(10_001)), *GOOD[1:]],
    "half a record": [(GOOD[0][0], bytes(3072)), *GOOD[1:]],
    "no record": [(GOOD[0][0], b""), *GOOD[1:]],
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_that_is_not_the_authors(tmp_path, case):
    archive(tmp_path / "source", ARCHIVES[case])
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz.*[Ee]xpected.*Received"):
        datasets.prepare("cifar10", tmp_path / "source", tmp_path / "data")
    assert not (tmp_path / "data").exists() and not Path("/tmp/evil.bin").exists()


def test_a_good_archive_is_read(tmp_path):
    archive(tmp_path / "source", GOOD)
    images, labels = dataset_files.read("cifar10", tmp_path / "source", "train")
    assert images.shape == (10, 32, 32, 3) and labels.shape == (10,)


def bomb(path, size):
    """A small file that unpacks to zeros."""
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(size // 2**20):
            file.write(bytes(2**20))


def test_what_unpacks_to_more_than_it_can_hold_is_not_unpacked(tmp_path):
    """300 MB of zeros; the memory it takes is that of the largest file that there is."""
    kmnist_files(tmp_path / "idx")
    bomb(tmp_path / "idx" / "train-images-idx3-ubyte.gz", 300 * 2**20)
    with pytest.raises(ValueError, match=r"train-images.*at most 47040016 bytes.*Received: more"):
        datasets.prepare("kmnist", tmp_path / "idx", tmp_path / "data")
    (tmp_path / "tar").mkdir()
    bomb(tmp_path / "tar" / "cifar-10-binary.tar.gz", 300 * 2**20)
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz: expected at most.*more"):
        datasets.prepare("cifar10", tmp_path / "tar", tmp_path / "data")
    with (tmp_path / "idx" / "train-images-idx3-ubyte").open("wb") as file:
        file.truncate(2**40)  # A sparse file: nothing of it is on the disk.
    (tmp_path / "idx" / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"train-images.*at most 47040016 bytes.*Received: more"):
        datasets.prepare("kmnist", tmp_path / "idx", tmp_path / "data")


@pytest.mark.parametrize(
    "shape", [(-1, 28, 28), (2**31 - 1, 28, 28), (60_001, 28, 28), (0, 28, 28)]
)
def test_counts_that_cannot_be(tmp_path, shape):
    kmnist_files(tmp_path)
    header = bytes((0, 0, 8, 3)) + np.array(shape, ">i4").tobytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz: expected.*Received"):
        datasets.prepare("kmnist", tmp_path, tmp_path / "data")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    place = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "check", lambda *_: None)
        return datasets.prepare("kmnist", kmnist_files(place / "source"), place / "data")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)


def cut_after_a_record(path):
    """Each record is whole: a length, its checksum, the data, its checksum."""
    content = path.read_bytes()
    path.write_bytes(content[: int.from_bytes(content[:8], "little") + 16])


DAMAGES = {
    "cut": cut,
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "after a record": cut_after_a_record,
    "other": lambda path: path.write_bytes(b"[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["train", "test", "dataset_info.json"])
def test_prepared_data_that_is_damaged(prepared, tmp_path, monkeypatch, any_files, name, damage):
    """It is named with the command that makes it again, and that command does."""

    def unreachable(_):
        raise OSError("no route to host")

    if (name, damage) == ("dataset_info.json", "after a record"):
        pytest.skip("it has no records")
    monkeypatch.setattr(hosts, "ask", unreachable)
    monkeypatch.setitem(datasets.VALIDATION_SIZES, "kmnist", 10)
    folder = tmp_path / "data" / "kmnist" / prepared.name
    shutil.copytree(prepared, folder)
    whole = datasets.load("kmnist", tmp_path / "data")
    (file,) = [p for p in folder.iterdir() if p.name == name or f"kmnist-{name}." in p.name]
    DAMAGES[damage](file)
    with pytest.raises(
        (ValueError, FileNotFoundError), match="python -m tfjacreg prepare kmnist"
    ) as e:
        datasets.load("kmnist", tmp_path / "data")
    assert str(folder) in str(e.value) and "{{" not in str(e.value)
    again = datasets.prepare("kmnist", prepared.parents[2] / "source", tmp_path / "data")
    assert again == folder and [p.name for p in folder.parent.iterdir()] == [folder.name]
    np.testing.assert_array_equal(datasets.load("kmnist", tmp_path / "data").test.x, whole.test.x)


UNREADABLE = {
    "permission": PermissionError(13, "Permission denied"),
    "disk": OSError(5, "Input/output error"),
    "memory": MemoryError(),
    "permission in TensorFlow": tf.errors.PermissionDeniedError(None, None, "denied"),
    "disk in TensorFlow": tf.errors.UnknownError(None, None, "Input/output error"),
    "memory in TensorFlow": tf.errors.ResourceExhaustedError(None, None, "OOM"),
}


@pytest.mark.parametrize("error", UNREADABLE.values(), ids=UNREADABLE)
def test_prepared_data_that_cannot_be_read_is_not_called_damaged(prepared, monkeypatch, error):
    """Nor made again in place of the data that may be whole."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_dataset", fail)
    before = {path: path.stat() for path in prepared.iterdir()}
    place = prepared.parents[1]
    for read in (
        lambda: datasets.load("kmnist", place),
        lambda: datasets.prepare("kmnist", place.parent / "source", place),
    ):
        with pytest.raises(OSError, match="Cannot read the data set kmnist in .*may be whole"):
            read()
    assert {path: path.stat() for path in prepared.iterdir()} == before


@pytest.mark.slow
def test_a_killed_prepare_leaves_nothing_that_the_next_does_not_clear(tmp_path):
    source = kmnist_files(tmp_path / "source", train=6000, test=200)
    command = [sys.executable, "-c", SMALL_PREPARE, "prepare", "kmnist", source]
    command += ["--data-dir", tmp_path / "data"]
    for _ in range(2):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("data/kmnist/.partial-*/**/*.tfrecord*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    # One of them is that of the second; the first one's it has cleared.
    assert len(list((tmp_path / "data" / "kmnist").iterdir())) == 1
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
    (folder,) = (tmp_path / "data" / "kmnist").iterdir()
    assert not folder.name.startswith(".")
    assert len(datasets.load("kmnist", tmp_path / "data").test.y) == 200


def test_what_a_living_process_has_begun_stays(tmp_path):
    from tfjacreg import atomic_files

    place = tmp_path / "kmnist"
    place.mkdir()
    ours = atomic_files.beside(place / "3.0.1")
    others = [
        place / ours.name.replace(f"-{os.getpid()}-", f"-{os.getppid()}-"),
        place / ".partial-elsewhere-1-3.0.1",
        place / "mine.txt",
    ]
    dead = place / ours.name.replace(f"-{os.getpid()}-", "-4194304000-")
    for path in (*others, dead):
        path.write_text("")
    with atomic_files.replacing(place / "3.0.1") as file:
        file.write_text("whole")
    assert sorted(place.iterdir()) == sorted([*others, place / "3.0.1"])
