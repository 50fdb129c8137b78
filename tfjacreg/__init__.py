"""Exact spectral-norm Jacobian regularization for Keras 3 on TensorFlow."""
