"""Twinhead for PyTorch: cross entropy, and the last linear layer fused with it, with predictions and accuracy."""

from torch_api.functional import cross_entropy, fused_linear_cross_entropy
from torch_api.modules import CrossEntropyLoss, FusedLinearCrossEntropyLoss
from torch_api.output import CrossEntropyOutput

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyOutput",
    "FusedLinearCrossEntropyLoss",
    "cross_entropy",
    "fused_linear_cross_entropy",
]
