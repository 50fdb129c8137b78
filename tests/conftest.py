import collections
import fcntl
import gc
import os
import signal
from pathlib import Path

# Set before TensorFlow is imported, as in the scripts, so that tests run what users run.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has one core, and so do the processes that it starts.
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

import keras
import pytest
import tensorflow as tf
from fresh_python import FreshPython

# A shell that starts the tests in the background makes them, and all they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What is imported stays, and graphs are made of many small objects: with Python's default garbage
# collection the suite takes an eighth longer.
gc.freeze()
gc.set_threshold(100_000, 50, 100)

# Two logical devices for the tests of distribution strategies, which must be set before any use.
_cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


def pytest_addoption(parser):
    kills = "how many processes test_kills.py kills at random moments"
    parser.addoption("--kills", type=int, default=16, help=kills)
    moments = "the seed of these and other random moments; the default is another one each time"
    parser.addoption("--moments", type=int, help=moments)


def pytest_collection_modifyitems(items):
    """Sorts files with many slow tests first, so that the processes end at about the same time.

    Files with tests that must run alone come last, when few others are left to wait.
    """
    sizes = collections.Counter(item.path for item in items)
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    alone = {item.path for item in items if _is_alone(item)}
    items.sort(key=lambda i: (i.path in alone, -slow[i.path], -sizes[i.path], i.path))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """While a test marked `alone` runs, no other process starts or continues a test."""
    folder = Path(__file__).parent
    with (folder / "conftest.py").open() as door, (folder / "reference.py").open() as room:
        # A process that waits for the room keeps the door, so that no other gets in meanwhile.
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if _is_alone(item) else fcntl.LOCK_SH)
        if not _is_alone(item):
            fcntl.flock(door, fcntl.LOCK_UN)
        return (yield)


def _is_alone(item):
    return item.get_closest_marker("alone") is not None


@pytest.fixture(autouse=True, scope="module")
def _fresh_session():
    """Clears Keras' session; not for every test, since that collects garbage and is slow.

    What TensorFlow keeps after that it keeps for good: it is not searched again after each module.
    """
    keras.utils.clear_session()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Every test starts from the same seeds and in float32."""
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="session")
def fresh_python():
    """Runs programs in processes that share nothing with this one."""
    python = FreshPython()
    yield python
    python.close()


@pytest.fixture
def any_files(monkeypatch):
    """Makes `prepare` accept small files that a test has made as those of a data set."""
    from tfjacreg import published

    monkeypatch.setattr(published, "check", lambda *_: None)


@pytest.fixture
def float64():
    """Makes layers and arrays double precision, for comparisons with dense oracles."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
