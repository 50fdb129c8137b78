"""Settings made before TensorFlow is imported: the benchmarks import this module first."""

import os

# TensorFlow leaves oneDNN off on some processors, at a third of the speed.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
