"""Tests with the real packages of the extra `ecosystem`, which the main suite does without."""

import importlib.util

# Where the extra is installed all of them are collected, and a package that is missing is an error.
if importlib.util.find_spec("keras_hub") is None:
    collect_ignore_glob = ["test_*.py"]
