"""Exact spectral-norm Jacobian regularization for Keras 3 on TensorFlow.

After "Exact Spectral Norm Regularization for Neural Networks" (Johansson, Engsner, Strannegård,
Mostad 2022).
"""

import tfjacreg_startup

if tfjacreg_startup.is_module_command():
    import tfjacreg_arguments

    tfjacreg_startup.prepare()
    tfjacreg_arguments.module()  # --help and mistakes end here, before seconds of imports.
    tfjacreg_startup.import_tensorflow()

from tfjacreg import attacks, callbacks, datasets, networks, norms, regularizers, robustness
from tfjacreg.checks import check_network
from tfjacreg.jacobian import JacobianOperator
from tfjacreg.model import RegularizedModel
from tfjacreg.norms import SingularTriplet, frobenius_norm, spectral_bound, spectral_norm
from tfjacreg.recording import hold_constant
from tfjacreg.weak_penalties import PenaltyWarning

__version__ = "0.2.0"

__all__ = [
    "JacobianOperator",
    "PenaltyWarning",
    "RegularizedModel",
    "SingularTriplet",
    "attacks",
    "callbacks",
    "check_network",
    "datasets",
    "frobenius_norm",
    "hold_constant",
    "networks",
    "norms",
    "regularizers",
    "robustness",
    "spectral_bound",
    "spectral_norm",
]
