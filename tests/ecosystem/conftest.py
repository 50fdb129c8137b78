"""Tests with the real packages of the extra `ecosystem`, which the main suite does without."""

import importlib.util

# If the extra is installed all of them are collected, and a missing package is an error.
if importlib.util.find_spec("keras_hub") is None:
    collect_ignore_glob = ["test_*.py"]
