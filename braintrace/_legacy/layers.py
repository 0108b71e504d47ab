"""Layers that other packages of the ecosystem provide, still served under their old name."""

from __future__ import annotations

import importlib
import warnings

_NEW_HOMES = {
    "brainpy.state": "IF LIF ALIF Expon Alpha DualExpon STP STD",
    "brainstate.nn": """
        ReLU RReLU Hardtanh ReLU6 Sigmoid Hardsigmoid Tanh SiLU Mish Hardswish ELU CELU SELU GLU GELU Hardshrink
        LeakyReLU LogSigmoid Softplus Softshrink PReLU Softsign Tanhshrink Softmin Softmax Softmax2d LogSoftmax
        Dropout Dropout1d Dropout2d Dropout3d Identity SpikeBitwise Flatten Unflatten
        AvgPool1d AvgPool2d AvgPool3d MaxPool1d MaxPool2d MaxPool3d
        AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
        BatchNorm0d BatchNorm1d BatchNorm2d BatchNorm3d LayerNorm RMSNorm GroupNorm
    """,
}
FORWARDED = {name: module for module, names in _NEW_HOMES.items() for name in names.split()}


def forward(name: str) -> type:
    """Import the object that `braintrace.nn.<name>` stands for, with a warning that names its new home."""
    if name not in FORWARDED:
        raise AttributeError(f"module 'braintrace.nn' has no attribute {name!r}")
    module = FORWARDED[name]
    warnings.warn(f"braintrace.nn.{name} is deprecated, use {module}.{name}.", DeprecationWarning, stacklevel=3)
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(
            f"braintrace.nn.{name} is now {module}.{name}, but {module} cannot be imported. Install it with "
            "`pip install 'brainpy>=2.9'`, on Python 3.11 with `pip install 'brainpy.state<0.2'`, then use "
            f"{module}.{name}."
        ) from error
