"""What a loss call answers with when it is asked for more than the loss."""

from __future__ import annotations

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossEntropyOutput:
    """A loss and the metrics that came with it, a pytree; what was not asked for is ``None``.

    Attributes:
        loss: float32, a scalar or one per token, differentiable.
        z_loss: float32, the z-loss that is part of ``loss``, reduced alike; detached.
        token_accuracy: float32, correct / valid tokens (0 or 1 per token under ``reduction="none"``); detached.
        predicted_tokens: int64 if x64 is enabled, else int32, in the labels' shape: the argmax of the logits, -1 where
            ignored.
        num_valid, num_correct: integers, the tokens that are valid, and those of them that are predicted right (0 or 1
            per token under ``reduction="none"``).
    """

    loss: jax.Array
    z_loss: jax.Array | None = None
    token_accuracy: jax.Array | None = None
    predicted_tokens: jax.Array | None = None
    num_valid: jax.Array | None = None
    num_correct: jax.Array | None = None
