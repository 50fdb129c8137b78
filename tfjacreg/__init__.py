"""Exact spectral-norm Jacobian regularization for Keras 3 on TensorFlow.

After "Exact Spectral Norm Regularization for Neural Networks" (Johansson, Engsner, Strannegård,
Mostad 2022).
"""

from tfjacreg import norms, regularizers
from tfjacreg.jacobian import JacobianOperator, hold_constant
from tfjacreg.model import RegularizedModel
from tfjacreg.norms import SingularTriplet, frobenius_norm, spectral_bound, spectral_norm

__version__ = "0.1.0"

__all__ = [
    "JacobianOperator",
    "RegularizedModel",
    "SingularTriplet",
    "frobenius_norm",
    "hold_constant",
    "norms",
    "regularizers",
    "spectral_bound",
    "spectral_norm",
]
