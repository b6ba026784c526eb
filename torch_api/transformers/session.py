"""One forward pass with labels: the options of its loss, and what the loss found out about the labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What :func:`enable` was told."""

    return_token_accuracy: bool = False
    return_predicted_tokens: bool = False
    label_smoothing: float = 0.0
    lse_square_scale: float = 0.0
    memory: str | int = "auto"
    use_token_scaling: bool = False  # of a single call, as TRL's SFTTrainer asks for with `loss_type="dft"`

    @property
    def metrics(self) -> bool:
        return self.return_token_accuracy or self.return_predicted_tokens

    @property
    def plain(self) -> bool:
        """Whether the loss is asked for nothing that the model's own would not give."""
        return not (self.metrics or self.label_smoothing or self.lse_square_scale or self.use_token_scaling)


class Session:
    """The losses of one forward pass. A model may compute its loss in several calls, over a part of the tokens each."""

    def __init__(self, settings: Settings, warn: Callable[[str], None]) -> None:
        self.settings = settings
        self.warn = warn  # called with a sentence; one is said of each model
        self.open = True  # until the forward pass returns: what is done with the logits later is the caller's own
        self.deferred = False  # whether the head has left logits out
        self._counts: list[tuple[Tensor, Tensor]] = []  # correct, valid
        self._predictions: list[tuple[Tensor, Tensor]] = []  # positions in the labels, predicted tokens

    def loss(self, compute: Callable[..., Any], positions: Tensor | None, **call: Any) -> Tensor:
        """The loss by `compute`, with this pass's options over those of the `call`; its metrics are kept.

        `positions` says of each token which of the labels it is, if that is known.
        """
        if not self.open:
            return compute(**call)
        call["label_smoothing"] = call["label_smoothing"] or self.settings.label_smoothing
        call["lse_square_scale"] = self.settings.lse_square_scale
        if self.settings.use_token_scaling:
            call["use_token_scaling"] = True
        if not self.settings.metrics:
            return compute(**call)
        predicts = self.settings.return_predicted_tokens and positions is not None
        result = compute(return_counts=True, return_predicted_tokens=predicts, **call)
        self._counts.append((result.num_correct.sum(), result.num_valid.sum()))
        if positions is not None and predicts:
            self._predictions.append((positions.flatten(), result.predicted_tokens.flatten()))
        return result.loss

    def metrics(self, shape: torch.Size) -> dict[str, Tensor]:
        """The metrics of all losses of the pass, by the names of the outputs' fields; none if there was no loss."""
        if not self._counts:
            if self.settings.metrics:
                self.warn(
                    "there are no metrics, because the loss is no cross entropy of rows of logits with the labels."
                )
            return {}
        correct, valid = (sum(counts) for counts in zip(*self._counts, strict=True))
        found = {"num_correct": correct, "num_valid": valid}
        if self.settings.return_token_accuracy:
            found = {"token_accuracy": correct.float() / valid.clamp(min=1), **found}
        if self._predictions:
            spare = shape.numel()  # where those go that answer for no label
            predicted = self._predictions[0][1].new_full((spare + 1,), -1)
            for positions, tokens in self._predictions:
                predicted[positions] = tokens
            found["predicted_tokens"] = predicted[:spare].view(shape)
        elif self.settings.return_predicted_tokens:
            self.warn("there are no predicted tokens, because the loss is not of the labels that the model was given.")
        return found
