"""What a loss call answers with when it is asked for more than the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CrossEntropyOutput:
    """A loss and the metrics that came with it; what was not asked for is ``None``.

    Attributes:
        loss: float32, a scalar or one per token, with a graph.
        z_loss: float32, the z-loss that is part of ``loss``, reduced alike; detached.
        token_accuracy: float32, correct / valid tokens (0 or 1 per token under ``reduction="none"``); detached.
        predicted_tokens: int64 in the labels' shape, the argmax of the logits, -1 where ignored.
        num_valid, num_correct: integers, the tokens that are valid, and those of them that are predicted right (0 or 1
            per token under ``reduction="none"``).
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None
    num_valid: Tensor | None = None
    num_correct: Tensor | None = None


# A tree of tensors, to torch.func, to exporting and to tracing; by its name in saved programs.
torch.export.register_dataclass(CrossEntropyOutput, serialized_type_name="torch_api.CrossEntropyOutput")
