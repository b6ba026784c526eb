"""Every causal model class of the installed transformers, tiny and random, and its loss compared with the unpatched."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from torch_api.transformers import deferred, disable, enable

MULTIMODAL = [
    f"{name}ForConditionalGeneration"
    for name in (
        "Gemma3", "Gemma4", "Glm4v", "Glm4vMoe", "InternVL", "Llama4", "Llava", "Mistral3", "Mllama", "PaliGemma",
        "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe", "SmolVLM",
    )
]  # fmt: skip

VOCAB, IGNORED = 96, -100

# The first rule whose pattern is the whole name of a field of a config says how small the field becomes.
RULES: list[tuple[str, Any]] = [
    (r"(\w+_)?vocab_size", VOCAB),
    (r"(hidden|embedding|input_embedding|output_embedding|backbone_hidden|attention_hidden)_size|d_model|n_embd", 64),
    (r"(embed|model|word_embed_proj|embedding|projection)_dim|out_hidden_size|hidden_size_global|dim_model", 64),
    (r"num_hidden_layers|n_layers?|num_layers|(num_)?(encoder|decoder)_layers|depth|num_blocks", 2),
    (r"(num_|n_|encoder_|decoder_|num_encoder_|num_decoder_|swa_num_)?(attention_heads|heads?)", 4),
    (r"(swa_)?num_(key_value|kv)_heads|num_query_groups", 2),
    (r"(swa_)?head_dim|attention_head_dim|v_head_dim|qk_nope_head_dim|qk_rope_head_dim|kv_channels", 16),
    (r"\w*intermediate_size(_mlp)?|\w*ffn_dim|n_inner|\w*ffn_hidden_size|dim_ff|prompt_mid_dim", 96),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length", 128),
    (r"(num|num_local|moe_num|n_routed)_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|first_k_dense_replace", 1),
    (r"rotary_dim|kv_lora_rank|q_lora_rank|o_lora_rank|index_head_dim|router_hidden_size", 16),
    (r"linear_(key|value)_head_dim|linear_head_dim|ssm_state_size|state_size|mamba_d_state", 16),
    (r"linear_num_(key|value)_heads|linear_num_heads", 4),
    (r"\w*dropout\w*|\w*pdrop|\w*layerdrop|drop_path_rate|\w*jitter\w*", 0.0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r"pad_token_id", 0),
    (r"\w+_token_(id|index)", 3),
]  # fmt: skip

# What the rules do not know, by the class: fields of its config, those of configs within in dictionaries.
_MROPE = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}}
_ZAMBA = {
    "num_hidden_layers": 5, "attention_hidden_size": 128, "attention_head_dim": 32,
    "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "CohereCompassForCausalLM": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "DeepseekV4ForCausalLM": {"mlp_layer_types": ["moe", "moe"]},
    "Dots3NoteForCausalLM": {"layer_types": ["full_attention"] * 2},
    "Dots1ForCausalLM": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "GitForCausalLM": {"vision_config": {"image_size": 32, "patch_size": 16}},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "Mistral4ForCausalLM": {"head_dim": 32},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3, "lru_width": 64},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": _ZAMBA,
    "ZambaForCausalLM": _ZAMBA,
    "Gemma4AssistantForCausalLM": {"text_config": {"hidden_size_per_layer_input": 0}},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "Glm4vForConditionalGeneration": _MROPE,
    "Glm4vMoeForConditionalGeneration": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "Qwen2VLForConditionalGeneration": _MROPE,
    "Qwen2_5_VLForConditionalGeneration": _MROPE,
}
# And of the batch.
BATCH: dict[str, dict[str, Any]] = {
    "GitForCausalLM": {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)},
}


LOSS_BOUND, GRADIENT_BOUND = 1e-5, 1e-4  # relative errors, in float32


@dataclass
class Result:
    """What became of one class."""

    name: str
    fused: bool
    note: str  # why it is not
    loss_error: float = math.nan
    gradient_error: float = math.nan
    worst: str = ""  # the parameter whose gradient that is

    @property
    def equal(self) -> bool:
        return self.fused and self.loss_error <= LOSS_BOUND and self.gradient_error <= GRADIENT_BOUND


def causal_classes() -> list[str]:
    """Every class that ends in ForCausalLM, but for the one that only picks another."""
    return sorted(n for n in dir(transformers) if n.endswith("ForCausalLM") and not n.startswith("AutoModel"))


def tiny_config(config_class: type[PreTrainedConfig], special: dict[str, Any]) -> PreTrainedConfig:
    """A config of few and small layers, by the rules and by what is special about it."""
    return config_class(**_tiny_fields(config_class, special))


def _tiny_fields(config_class: type[PreTrainedConfig], special: dict[str, Any]) -> dict[str, Any]:
    default = config_class()
    fields = vars(default)
    layers = _layers(fields)
    chosen: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            chosen[name] = _tiny_fields(type(value), special.get(name, {}))
        elif isinstance(value, list) and layers and len(value) == fields["num_hidden_layers"]:
            chosen[name] = [value[i] for i in layers]
        elif (isinstance(value, (int, float)) and not isinstance(value, bool)) or name == "head_dim":
            for pattern, small in RULES:
                if re.fullmatch(pattern, name):
                    chosen[name] = type(value)(small) if value is not None else small
                    break
    if layers:
        chosen["num_hidden_layers"] = len(layers)
    if "num_key_value_heads" in chosen and fields["num_key_value_heads"] == fields.get("num_attention_heads"):
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    return {**chosen, **{k: v for k, v in special.items() if not isinstance(chosen.get(k), dict)}}


def _layers(fields: dict[str, Any]) -> list[int]:
    """A layer of each kind, two at least, if the config lists its layers."""
    kinds = next((fields[name] for name in ("layer_types", "layers_block_type") if fields.get(name)), None)
    if not isinstance(kinds, list) or len(kinds) != fields.get("num_hidden_layers"):
        return []
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    return first if len(first) > 1 else [0, 1]


def tiny_model(name: str) -> PreTrainedModel:
    """A model of the class in float32 and training mode, without dropout; the same one at every call."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    config = tiny_config(model_class.config_class, SPECIAL.get(name, {}))
    config._attn_implementation = config._experts_implementation = "eager"
    for part in (config, config.get_text_config()):
        part.use_cache = False
    model = model_class(config).float().train()
    head = model.get_output_embeddings()
    with torch.no_grad():  # logits that differ, as those of a trained model do
        if head is not None and hasattr(head, "weight"):
            head.weight.normal_(std=0.1)
    return model


def compare(name: str) -> Result:
    """Run the class as it is and enabled, and say how far apart loss and gradients are."""
    if "labels" not in inspect.signature(getattr(transformers, name).forward).parameters:
        return Result(name, False, "its forward pass takes no labels")
    model = tiny_model(name)
    try:
        disable(enable(model))
    except ValueError as refused:
        return Result(name, False, str(refused))
    torch.manual_seed(1)
    ids, labels = torch.randint(4, model.config.get_text_config().vocab_size, (2, 2, 16))
    labels[0, :5] = labels[1, 11] = IGNORED
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **BATCH.get(name, {})}

    def step() -> tuple[Any, dict[str, Tensor]]:
        model.zero_grad()
        torch.manual_seed(2)
        outputs = model(**batch)
        outputs.loss.backward()
        return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    try:
        expected, expected_gradients = step()
    except Exception as error:
        return Result(name, False, f"unpatched it raises {type(error).__name__}: {error}")
    enable(model, return_predicted_tokens=True)
    with (
        mock.patch.object(deferred, "fused_linear_cross_entropy", wraps=deferred.fused_linear_cross_entropy) as fused,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        outputs, gradients = step()
    looked = [str(w.message).split("`")[1] for w in caught if "logits that were to be left out" in str(w.message)]
    if looked:
        note = f"the model calls `{looked[0]}` on its logits"
    elif not fused.called:
        note = "its head is not a linear layer"
    elif not _predictions_agree(outputs.predicted_tokens, expected.logits, labels):
        note = "its predictions are not those of its logits"
    else:
        note = ""
    loss_error = float((outputs.loss - expected.loss).detach().abs() / expected.loss.detach().abs())
    return Result(name, not note, note, loss_error, *gradient_error(gradients, expected_gradients))


def _predictions_agree(predicted: Tensor, logits: Tensor, labels: Tensor) -> bool:
    """Whether each is the argmax of the logits at its place, if the loss does not shift, or at the one before it."""
    rows = logits[:, -labels.shape[1] :].argmax(-1)  # those for an image come first
    return any(
        torch.equal(predicted, p.where(labels != IGNORED, -1)) for p in (rows, F.pad(rows[:, :-1], (1, 0), value=-1))
    )


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The greatest relative error in norm of any parameter's gradient, and the parameter's name.

    One whose gradient is less than a millionth of all of it is measured by that: it is zero but for rounding.
    """
    assert found.keys() == expected.keys()
    whole = torch.stack([g.float().norm() for g in expected.values()]).norm()
    return max(
        (float((found[name] - g).float().norm() / g.float().norm().clamp(min=1e-6 * whole)), name)
        for name, g in expected.items()
    )
