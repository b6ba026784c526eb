"""A tiny model enabled and as it is, a batch for both, and what must be the same of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import PreTrainedModel

from tests.transformers.families import VOCAB, gradient_error, tiny_model
from torch_api.transformers import enable
from torch_api.transformers.deferred import Deferred

METRICS = {"return_token_accuracy": True, "return_predicted_tokens": True}
IGNORED = -100


def make_batch(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(4, VOCAB, (2, 2, 12), generator=generator)
    labels[0, :3] = labels[1, 7] = IGNORED
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def make(name: str, device: torch.device, **settings: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """An enabled model, and the same one as it is."""
    plain = tiny_model(name).to(device)
    return enable(copy.deepcopy(plain), **settings), plain


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(enabled: PreTrainedModel, plain: PreTrainedModel, **batch: Any) -> None:
    """Equal loss and gradients, and logits that are still left out."""
    ours, theirs = enabled(**batch), plain(**batch)
    ours, theirs = (o if isinstance(o, tuple) else o.to_tuple() for o in (ours, theirs))
    (logits,) = (t for t in ours if isinstance(t, Deferred))
    assert_left_out(logits)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert gradient_error(gradients(ours[0], enabled), gradients(theirs[0], plain))[0] < 1e-4


def assert_left_out(logits: Tensor) -> None:
    assert isinstance(logits, Deferred)
    state = logits.logits
    while state is not None:
        assert state.value is None
        state = state.step[0] if state.step else None


def expected_predictions(logits: Tensor, labels: Tensor) -> Tensor:
    """Each label's is made at the place before; none for the first and for ignored ones."""
    predicted = F.pad(logits.argmax(-1)[:, :-1], (1, 0), value=-1)
    return predicted.where(labels != IGNORED, -1)
