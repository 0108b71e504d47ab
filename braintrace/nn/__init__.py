"""Layers whose trainable maps go through marked operations, ready for online learning."""

from typing import Any

from .._legacy.layers import FORWARDED as _FORWARDED
from .._legacy.layers import forward as _forward
from ._cells import CFNCell as CFNCell
from ._cells import GRUCell as GRUCell
from ._cells import LSTMCell as LSTMCell
from ._cells import MGUCell as MGUCell
from ._cells import MiniGRU as MiniGRU
from ._cells import MiniLSTM as MiniLSTM
from ._cells import MinimalRNNCell as MinimalRNNCell
from ._cells import URLSTMCell as URLSTMCell
from ._cells import ValinaRNNCell as ValinaRNNCell
from ._conv import Conv1d as Conv1d
from ._conv import Conv2d as Conv2d
from ._conv import Conv3d as Conv3d
from ._embedding import Embedding as Embedding
from ._linear import Linear as Linear
from ._linear import ScaledWSLinear as ScaledWSLinear
from ._linear import SignedWLinear as SignedWLinear
from ._lru import LRUCell as LRUCell
from ._lru import RTUCell as RTUCell
from ._readout import LeakyRateReadout as LeakyRateReadout
from ._sparse import GroupedLinear as GroupedLinear
from ._sparse import LoRA as LoRA
from ._sparse import SparseLinear as SparseLinear

__all__ = [
    "CFNCell",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "GRUCell",
    "GroupedLinear",
    "LRUCell",
    "LSTMCell",
    "LeakyRateReadout",
    "Linear",
    "LoRA",
    "MGUCell",
    "MiniGRU",
    "MiniLSTM",
    "MinimalRNNCell",
    "RTUCell",
    "ScaledWSLinear",
    "SignedWLinear",
    "SparseLinear",
    "URLSTMCell",
    "ValinaRNNCell",
]


def __getattr__(name: str) -> Any:
    return _forward(name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_FORWARDED])
