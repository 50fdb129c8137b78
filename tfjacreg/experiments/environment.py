"""The versions and the hardware of a result."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

_PACKAGES = ("tensorflow", "keras", "numpy", "cleverhans")


def environment() -> dict[str, str]:
    """The environment that runs, evaluations and benchmarks write beside their numbers.

    Returns:
        `python` and the versions of the packages that are installed; `device`: the names of the
        GPUs, or the processor if there is none; `onednn`: whether TensorFlow was told to use it;
        `floatx` and `image_data_format`: Keras' settings.
    """
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    gpus = tf.config.list_physical_devices("GPU")
    names = [
        str(tf.config.experimental.get_device_details(gpu).get("device_name", "GPU"))
        for gpu in gpus
    ]
    return {
        "python": platform.python_version(),
        **versions,
        "device": ", ".join(names) or processor(),
        "floatx": keras.config.floatx(),
        "image_data_format": keras.config.image_data_format(),
        "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "default"),
    }


def processor() -> str:
    """The name of the processor and the number of its cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {os.cpu_count()} cores"


def differences(before: dict[str, Any], now: dict[str, str]) -> dict[str, tuple[Any, str]]:
    """The entries in which two environments differ: the earlier value and the current one.

    An entry that only one of them has is not compared. Evaluations of version 0.1.0 have no
    `onednn`, and without a GPU their `device` is `"CPU"`, whichever processor it was.

    Args:
        before: An environment from a file.
        now: The current one.
    """
    shared = [name for name in now if name in before]
    if before.get("device") == "CPU" and now["device"] == processor():
        shared.remove("device")
    return {name: (before[name], now[name]) for name in shared if before[name] != now[name]}
