"""A dozen model families; `python -m tests.transformers.sweep` runs all of them."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tests.transformers.families import GRADIENT_BOUND, LOSS_BOUND, compare

FAMILIES = [
    "BartForCausalLM",  # a loss of its own, which does not shift
    "BertLMHeadModel",  # the head is within another module, after a transform
    "BloomForCausalLM",
    "Cohere2ForCausalLM",  # a factor
    "DeepseekV3ForCausalLM",
    "Gemma2ForCausalLM",  # a softcap
    "Gemma3ForConditionalGeneration",
    "GitForCausalLM",  # rows for the image before those of the text
    "GraniteMoeForCausalLM",  # a divisor
    "LlavaForConditionalGeneration",
    "MambaForCausalLM",
    "MixtralForCausalLM",
    "OPTForCausalLM",
    "Qwen3NextForCausalLM",
    "RecurrentGemmaForCausalLM",  # a softcap written otherwise
]


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_the_models_own(name: str) -> None:
    result = compare(name)
    assert result.fused, result.note
    assert result.loss_error <= LOSS_BOUND
    assert result.gradient_error <= GRADIENT_BOUND, result.worst


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MusicgenForCausalLM", "one output embedding, got MusicgenForCausalLM with a list of 4"),
        ("ProphetNetForCausalLM", "the model calls `transpose` on its logits"),
    ],
)
def test_what_is_not_fused_says_why(name: str, reason: str) -> None:
    result = compare(name)
    assert not result.fused
    assert reason in result.note
