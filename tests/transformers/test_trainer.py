"""``transformers.Trainer`` with an enabled model: it trains as it would, and evaluates without logits."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments

from tests.transformers.families import VOCAB, tiny_model
from torch_api.transformers import deferred, enable

IGNORED = -100
QUIET: dict[str, Any] = {
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": not torch.cuda.is_available(),
    "dataloader_pin_memory": False,
}


def examples(count: int, length: int = 12) -> list[dict[str, Tensor]]:
    """Of unequal lengths: with more and fewer ignored labels."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for i in range(count):
        ids = torch.randint(4, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[: 1 + i % 9] = IGNORED
        made.append({"input_ids": ids, "labels": labels})
    return made


def make_trainer(model: PreTrainedModel, folder: Path, bf16: bool = False, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=3,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        bf16=bf16,
        **QUIET,
    )
    return Trainer(model, arguments, train_dataset=examples(24), eval_dataset=examples(7), **more)


def predicted_tokens(outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    return outputs[-1]


def accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    valid = evaluated.predictions >= 0
    return {"accuracy": float((evaluated.predictions == evaluated.label_ids)[valid].mean())}


def test_accumulated_gradients_train_as_the_models_own_loss(tmp_path: Path) -> None:
    plain = tiny_model("LlamaForCausalLM")
    enabled = enable(copy.deepcopy(plain), return_token_accuracy=True)
    trainers = [make_trainer(model, tmp_path) for model in (enabled, plain)]
    for trainer in trainers:
        trainer.train()
    losses, expected = ([log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in trainers)
    assert len(losses) == 4
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for ours, theirs in zip(enabled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_mixed_precision_leaves_logits_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `accelerate` casts the outputs of the model, logits and all, to float32."""
    plain = tiny_model("LlamaForCausalLM")
    enabled = enable(copy.deepcopy(plain), return_predicted_tokens=True)
    trainers = [make_trainer(model, tmp_path, bf16=True) for model in (plain, enabled)]
    trainers[0].train()
    monkeypatch.setattr(deferred.Logits, "real", lambda *_: pytest.fail("logits were computed"))
    trainers[1].train()
    expected, losses = ([log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in trainers)
    np.testing.assert_allclose(losses, expected, rtol=2e-3)  # the plain model rounds its logits to 8 bits


@pytest.mark.parametrize("ignored", [None, ["logits", "past_key_values", "cache"]])
def test_evaluation_never_sees_logits(
    ignored: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_model("LlamaForCausalLM")
    model = enable(copy.deepcopy(plain), return_predicted_tokens=True)
    recipe = {"preprocess_logits_for_metrics": predicted_tokens, "compute_metrics": accuracy}
    monkeypatch.setattr(deferred.Logits, "real", lambda *_: pytest.fail("logits were computed"))
    found = make_trainer(model, tmp_path, **recipe).predict(examples(7), ignore_keys=ignored)
    expected = make_trainer(plain, tmp_path).predict(examples(7))
    predictions = np.pad(expected.predictions.argmax(-1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    assert found.predictions.shape == found.label_ids.shape == (7, 12)
    assert np.array_equal(found.predictions, np.where(found.label_ids == IGNORED, -1, predictions))
    valid = found.label_ids[:, 1:] != IGNORED
    right = (predictions == found.label_ids)[:, 1:][valid].mean()
    assert found.metrics["test_accuracy"] == pytest.approx(right)
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)
    assert 0 < right < 1


def test_trl_reads_the_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The versions of TRL's SFTTrainer that ask a model for it, as they ask Liger-Kernel's."""
    trl = pytest.importorskip("trl")
    pytest.importorskip("liger_kernel")
    datasets = pytest.importorskip("datasets")
    if "return_token_accuracy" not in inspect.getsource(trl.SFTTrainer):
        pytest.skip("this TRL computes its own loss, and asks no model for the accuracy")
    model = enable(tiny_model("LlamaForCausalLM"))
    off = dict.fromkeys(("rope", "cross_entropy", "fused_linear_cross_entropy", "rms_norm", "swiglu"), False)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        use_liger_kernel=True,
        liger_kernel_config=off,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        **QUIET,
    )
    rows = datasets.Dataset.from_list([{"input_ids": e["input_ids"].tolist()} for e in examples(8)])
    trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer())
    asked: list[float] = []
    model.register_forward_hook(lambda module, inputs, outputs: asked.append(float(outputs.token_accuracy)))
    monkeypatch.setattr(deferred.Logits, "real", lambda *_: pytest.fail("logits were computed"))
    trainer.train()
    logged = [log["mean_token_accuracy"] for log in trainer.state.log_history if "mean_token_accuracy" in log]
    assert len(logged) == 2
    assert logged == pytest.approx(asked)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCAB)}
    whole = Tokenizer(models.WordLevel(words, unk_token="w3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )
