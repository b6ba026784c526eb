"""Models that ``peft`` has wrapped, before or after they were enabled."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft

from tests.transformers.families import gradient_error, tiny_model
from tests.transformers.models import assert_left_out, expected_predictions, gradients, make_batch
from torch_api.transformers import disable, enable

BODY = {"target_modules": ["q_proj", "v_proj"]}
SAVED_HEAD = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
LORA_HEAD = {"target_modules": ["q_proj", "lm_head"]}


@pytest.mark.parametrize("first", ["enable", "peft"])
@pytest.mark.parametrize(("adapters", "fused"), [(BODY, True), (SAVED_HEAD, True), (LORA_HEAD, False)])
def test_adapters(adapters: dict[str, Any], fused: bool, first: str, device: torch.device) -> None:
    """On a head that is more than a linear layer the loss is not fused, says so, and has its metrics all the same."""
    model = tiny_model("LlamaForCausalLM").to(device)
    if first == "enable":
        enable(model, return_predicted_tokens=True)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **adapters)
    wrapped = peft.get_peft_model(model, config)
    if first == "peft":
        assert enable(wrapped, return_predicted_tokens=True) is wrapped
    batch = make_batch(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = wrapped(**batch)
        found = gradients(ours.loss, wrapped)
    assert any("needs logits that were to be left out" in str(w.message) for w in caught) == (not fused)
    if fused:
        assert_left_out(ours.logits)
    disable(wrapped)
    theirs = wrapped(**batch)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    assert gradient_error(found, gradients(theirs.loss, wrapped))[0] < 1e-4
    assert torch.equal(ours.predicted_tokens, expected_predictions(theirs.logits, batch["labels"]))
