"""Time and peak memory of a training step of a Llama-shaped model of transformers, with and without the fused loss.

    python benchmarks/finetune_step.py --out benchmarks/results/NAME_finetune.json
    python benchmarks/finetune_step.py --tiny --out /tmp/finetune.json    # on a CPU, to see that it runs

The model is random, in bf16, of the shape of Llama 3.2 1B with a head of its own. A training step is forward, backward
and AdamW; an evaluation is a forward pass without gradients. With "predictions" a step also has the predicted token of
every position and the token accuracy: from the fused loss, or else by an argmax of the logits.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from measure import Clock, release, take_turns, wait
from results import Results
from tabulate import tabulate
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from torch_api.transformers import disable, enable

GIB = 2**30
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
METRICS = {"return_predicted_tokens": True, "return_token_accuracy": True}
SIZES = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1024,
}  # fmt: skip


def make_model(sizes: dict[str, int], checkpointing: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=8192, use_cache=False, tie_word_embeddings=False)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def predictions(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted tokens, as the fused loss aligns them, and the accuracy, from the logits."""
    with torch.no_grad():
        predicted = torch.full_like(labels, -1)
        predicted[:, 1:] = outputs.logits[:, :-1].argmax(-1)
        return predicted, (predicted == labels)[:, 1:].float().mean()


def contenders(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> dict[str, Callable[[], dict[str, Tensor]]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=DEVICE.type == "cuda")

    def step(prepare: Callable[[], Any], training: bool, argmax: bool) -> dict[str, Tensor]:
        prepare()
        with torch.set_grad_enabled(training):
            outputs = model(**batch)
            found = {"loss": outputs.loss.detach()}
            if "predicted_tokens" in outputs:
                found |= {"predicted": outputs.predicted_tokens, "accuracy": outputs.token_accuracy}
            elif argmax:
                found["predicted"], found["accuracy"] = predictions(outputs, batch["labels"])
            loss = outputs.loss
            del outputs
        if training:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return found

    ways = {
        "transformers": (lambda: disable(model), False),
        "transformers, predictions": (lambda: disable(model), True),
        "twinhead": (lambda: enable(model), False),
        "twinhead, predictions": (lambda: enable(model, **METRICS), False),
    }
    return {
        f"{kind}{name}": lambda p=prepare, t=training, a=argmax: step(p, t, a)
        for kind, training in (("", True), ("evaluation: ", False))
        for name, (prepare, argmax) in ways.items()
        if training or "predictions" in name
    }


def peak(step: Callable[[], Any]) -> float | None:
    """GiB at the highest point of a step, weights, gradients and the optimizer's state included."""
    if DEVICE.type != "cuda":
        return None
    release()
    torch.cuda.reset_peak_memory_stats()
    step()
    wait()
    return torch.cuda.max_memory_allocated() / GIB


def agreement(steps: dict[str, Callable[[], dict[str, Tensor]]]) -> dict[str, float]:
    """How far the two evaluations are apart, at the same weights."""
    ours, theirs = (steps[f"evaluation: {name}, predictions"]() for name in ("twinhead", "transformers"))
    valid = ours["predicted"] >= 0
    return {
        "loss_difference": float((ours["loss"] - theirs["loss"]).abs() / theirs["loss"]),
        "same_predictions": float((ours["predicted"] == theirs["predicted"])[valid].float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step of a Llama-shaped model, with and without the patch.")
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--checkpointing", action="store_true", help="recompute the layers' activations")
    parser.add_argument("--tiny", action="store_true", help="a toy model, 2 sequences of 64 tokens")
    parser.add_argument("--out", type=Path, required=True, help="results file, JSON")
    parser.add_argument("--commit", help="commit of the measured code, where git cannot tell")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.batch, arguments.length = 2, 64
    sizes = TINY if arguments.tiny else SIZES
    model = make_model(sizes, arguments.checkpointing)
    ids = torch.randint(sizes["vocab_size"], (arguments.batch, arguments.length), device=DEVICE)
    steps = contenders(model, {"input_ids": ids, "labels": ids})
    for step in steps.values():  # compiles kernels, and makes the optimizer's state
        step()
    agree = agreement(steps)
    peaks = {name: peak(step) for name, step in steps.items()}
    times, failures = take_turns(steps, Clock(0.0, arguments.rounds, arguments.rounds))
    if failures:
        raise SystemExit(str(failures))
    rows = {
        name: {"ms": median(found), "ms_min": min(found), "ms_max": max(found), "peak_gib": peaks[name]}
        for name, found in times.items()
    }
    setup = {"model": sizes, "batch": [arguments.batch, arguments.length], "checkpointing": arguments.checkpointing}
    results = Results(arguments.out, DEVICE.type, arguments.commit, dtype="bfloat16", **setup)
    results.add("agreement", value=agree)
    results.add("rows", value=rows)
    table = [[name, row["ms"], row["peak_gib"]] for name, row in rows.items()]
    print(tabulate(table, ["step", "ms", "peak GiB"], floatfmt=("", ".1f", ".2f"), missingval="-"))
    print(", ".join(f"{name} {value:.3g}" for name, value in agree.items()))


if __name__ == "__main__":
    main()
