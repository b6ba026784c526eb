"""An enabled model against the same one as it is: loss, gradients, metrics, and what does not change."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.support import on_gpu
from tests.transformers.families import VOCAB, gradient_error, tiny_model
from tests.transformers.models import (
    IGNORED,
    METRICS,
    assert_left_out,
    assert_same_step,
    expected_predictions,
    gradients,
    make,
)
from torch_api.transformers import disable, enable
from torch_api.transformers.deferred import Deferred
from torch_api.transformers.head import intercepted

# ---- the loss, by the semantics of transformers


# Plain; a softcap; a factor; a divisor.
@pytest.mark.parametrize("name", [f"{n}ForCausalLM" for n in ("Llama", "Gemma2", "Cohere", "Granite")])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 5},
        {"return_dict": False},
    ],
    ids=str,
)
def test_step_is_the_models_own(
    name: str, more: dict[str, Any], batch: dict[str, Tensor], device: torch.device
) -> None:
    enabled, plain = make(name, device)
    if more.get("ignore_index"):
        batch["labels"] = batch["labels"].where(batch["labels"] != IGNORED, 5)
    assert_same_step(enabled, plain, **batch, **more)


def test_scale_and_softcap_are_those_of_the_config(batch: dict[str, Tensor], device: torch.device) -> None:
    model, _ = make("Gemma2ForCausalLM", device)
    state = model(**batch).logits.logits
    cap = model.config.final_logit_softcapping
    assert (state.capped, state.post) == (True, cap)
    assert state.scale == pytest.approx(1 / cap, rel=1e-15)


def test_shift_labels(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("LlamaForCausalLM", device, **METRICS)
    batch["shift_labels"] = batch["labels"].roll(-1, 1)
    assert_same_step(enabled, plain, **batch)
    outputs, logits = enabled(**batch), plain(**batch).logits
    expected = logits.argmax(-1).where(batch["shift_labels"] != IGNORED, -1)  # where they are told to be, so are they
    assert torch.equal(outputs.predicted_tokens, expected)


def test_logits_to_keep(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("LlamaForCausalLM", device)
    labels = batch.pop("labels")
    assert_same_step(enabled, plain, **batch, labels=labels, shift_labels=labels[:, -4:].contiguous(), logits_to_keep=4)
    outputs = enabled(**batch, logits_to_keep=4)
    assert torch.equal(outputs.logits, plain(**batch, logits_to_keep=4).logits)
    for model in (enabled, plain):
        with pytest.raises(ValueError, match=r"target|batch_size"):  # as many labels as tokens, but not as logits
            model(**batch, labels=labels, logits_to_keep=4)


def test_auxiliary_loss_of_experts(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("MixtralForCausalLM", device)
    assert_same_step(enabled, plain, **batch, output_router_logits=True)
    assert enabled(**batch, output_router_logits=True).aux_loss > 0


def test_labels_and_hidden_states_by_position(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("LlamaForCausalLM", device, **METRICS)
    arguments = (batch["input_ids"], None, None, None, None, batch["labels"])
    assert torch.equal(enabled(*arguments).loss.detach() > 0, plain(*arguments).loss.detach() > 0)
    assert "predicted_tokens" in enabled(*arguments)


@pytest.mark.parametrize("fused", [True, False])
def test_label_smoothing_and_z_loss(fused: bool, batch: dict[str, Tensor], device: torch.device) -> None:
    e, z = 0.1, 0.02
    model, plain = make("CohereForCausalLM", device, label_smoothing=e, lse_square_scale=z, **METRICS)
    if not fused:
        model.logit_scale = torch.tensor(model.logit_scale)  # a factor that might have a gradient
    outputs = model(**batch)
    assert isinstance(outputs.logits, Deferred) == fused
    every = plain(**batch).logits
    logits, labels = every[:, :-1].double(), batch["labels"][:, 1:]
    valid = labels != IGNORED
    token = F.cross_entropy(logits[valid], labels[valid], label_smoothing=e, reduction="none")
    expected = (token + z * logits[valid].logsumexp(-1) ** 2).mean()
    torch.testing.assert_close(outputs.loss.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(outputs.predicted_tokens, expected_predictions(every, batch["labels"]))


def test_token_scaling(batch: dict[str, Tensor], device: torch.device) -> None:
    """What TRL's SFTTrainer asks for with `loss_type="dft"`."""
    model, plain = make("LlamaForCausalLM", device)
    logits, labels = plain(**batch).logits[:, :-1].double(), batch["labels"][:, 1:]
    valid = labels != IGNORED
    token = F.cross_entropy(logits[valid], labels[valid], reduction="none")
    scaled = model(**batch, use_token_scaling=True, skip_logits=True).loss
    torch.testing.assert_close(scaled.double(), (token * (-token).exp()).mean(), rtol=1e-6, atol=0)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + 1)
    with pytest.raises(ValueError, match="use_token_scaling must be False where the loss is not fused"):
        model(**batch, use_token_scaling=True)


@pytest.mark.skipif(not on_gpu(), reason="labels on another device need two")
def test_labels_on_another_device(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("LlamaForCausalLM", device, **METRICS)
    batch["labels"] = batch["labels"].cpu()
    assert_same_step(enabled, plain, **batch)
    assert enabled(**batch).predicted_tokens.device.type == device.type


def test_a_loss_of_ones_own(batch: dict[str, Tensor], device: torch.device) -> None:
    """It is fused as the model's is, and its predictions are for the labels that it is made of."""
    enabled, plain = make("LlamaForCausalLM", device, **METRICS)
    kept = batch["labels"] % 3 != 0

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        labels = labels[:, 1:].masked_fill(labels[:, 1:] % 3 == 0, IGNORED)
        labels = torch.where(labels == 4, IGNORED, labels)
        return 3 * F.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels.reshape(-1), reduction="sum")

    enabled.loss_function = plain.loss_function = loss
    assert_same_step(enabled, plain, **batch)
    kept &= (batch["labels"] != IGNORED) & (batch["labels"] != 4)
    expected = expected_predictions(plain(**batch).logits, batch["labels"].where(kept, IGNORED))
    assert torch.equal(enabled(**batch).predicted_tokens, expected)

    def others(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return F.cross_entropy(logits.view(-1, vocab_size), batch["input_ids"].view(-1))

    enabled.loss_function = others
    with pytest.warns(UserWarning, match="there are no predicted tokens, because the loss is not of the labels"):
        outputs = enabled(**batch)
    assert outputs.num_valid == batch["input_ids"].numel()
    assert "predicted_tokens" not in outputs


def test_metrics_of_another_loss(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("LlamaForCausalLM", device, **METRICS)
    enabled.loss_function = plain.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    with pytest.warns(UserWarning, match="`square` needs logits"):
        outputs = enabled(**batch)
    assert torch.equal(outputs.loss, plain(**batch).loss) and "token_accuracy" not in outputs
    enabled.loss_function = lambda logits, labels, **kwargs: labels.float().mean()
    enable(enabled, **METRICS)
    with pytest.warns(UserWarning, match="there are no metrics, because the loss is no cross entropy"):
        assert "token_accuracy" not in enabled(**batch)


def test_a_batch_without_a_valid_label_has_loss_0(batch: dict[str, Tensor], device: torch.device) -> None:
    model, _ = make("LlamaForCausalLM", device, **METRICS)
    outputs = model(input_ids=batch["input_ids"], labels=torch.full_like(batch["labels"], IGNORED))
    assert outputs.loss == 0 and outputs.token_accuracy == 0 and outputs.num_valid == 0
    assert (outputs.predicted_tokens == -1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_loss_is_closer_than_the_models_own(
    dtype: torch.dtype, batch: dict[str, Tensor], device: torch.device
) -> None:
    enabled, plain = make("LlamaForCausalLM", device)
    enabled.to(dtype), plain.to(dtype)
    with torch.no_grad():
        hidden = plain.model(batch["input_ids"]).last_hidden_state
        logits = hidden.double() @ plain.lm_head.weight.double().T
        exact = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        ours, theirs = enabled(**batch).loss, plain(**batch).loss
    assert ours.dtype == torch.float32
    assert (ours - exact).abs() <= 2 * (theirs - exact).abs() + 1e-6


def test_autocast(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("LlamaForCausalLM", device)
    with torch.autocast(device.type, torch.bfloat16):
        ours, theirs = enabled(**batch), plain(**batch)
    assert ours.logits.dtype == theirs.logits.dtype == torch.bfloat16
    assert torch.equal(ours.logits.argmax(-1), theirs.logits.argmax(-1))  # looked at outside of autocast
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-2, atol=0)
    assert all(g.dtype == torch.float32 for g in gradients(ours.loss, enabled).values())


def test_in_64_bits_the_loss_is_the_models_own(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = (model.double() for model in make("LlamaForCausalLM", device))
    with pytest.warns(UserWarning, match="did not run as a linear layer of plain tensors in 32 or 16 bits"):
        ours = enabled(**batch).loss
    assert torch.equal(ours, plain(**batch).loss)


# ---- metrics


@pytest.mark.parametrize("training", [True, False])
def test_metrics_of_the_output(training: bool, batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("LlamaForCausalLM", device, **METRICS)
    enabled.train(training)
    outputs = enabled(**batch)
    assert_left_out(outputs.logits)
    labels = batch["labels"]
    predicted = expected_predictions(plain(**batch).logits, labels)
    valid = labels[:, 1:] != IGNORED
    correct = (predicted[:, 1:] == labels[:, 1:]) & valid
    assert isinstance(outputs, CausalLMOutputWithPast)
    assert torch.equal(outputs.predicted_tokens, predicted)
    assert (outputs.num_valid, outputs.num_correct) == (valid.sum(), correct.sum())
    torch.testing.assert_close(outputs.token_accuracy, correct.sum() / valid.sum())
    assert [*outputs][-4:] == ["token_accuracy", "num_correct", "num_valid", "predicted_tokens"]
    assert outputs[-1] is outputs["predicted_tokens"] is outputs.predicted_tokens
    assert not any(outputs[name].requires_grad for name in [*outputs][-4:])


def test_accuracy_counts_the_right_ones(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("LlamaForCausalLM", device, **METRICS)
    labels = F.pad(plain(**batch).logits.argmax(-1)[:, :-1], (1, 0), value=IGNORED)  # what it predicts
    labels[:, 5:8] = (labels[:, 5:8] + 1) % VOCAB
    outputs = enabled(input_ids=batch["input_ids"], labels=labels)
    assert (outputs.num_correct, outputs.num_valid) == (16, 22)
    assert outputs.token_accuracy == 16 / 22


def test_predictions_of_a_loss_that_does_not_shift(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("BartForCausalLM", device, **METRICS)
    outputs = enabled(**batch)
    assert_left_out(outputs.logits)
    logits = plain(**batch).logits
    assert torch.equal(outputs.predicted_tokens, logits.argmax(-1).where(batch["labels"] != IGNORED, -1))


def test_flags_of_one_call(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, _ = make("LlamaForCausalLM", device, return_token_accuracy=True)
    assert "predicted_tokens" not in enabled(**batch)
    assert enabled(**batch, return_predicted_tokens=True).predicted_tokens.shape == batch["labels"].shape
    assert "token_accuracy" not in enabled(**batch, return_token_accuracy=False)
    without_labels = enabled(input_ids=batch["input_ids"], return_predicted_tokens=True)
    assert "token_accuracy" not in without_labels and "predicted_tokens" not in without_labels


def test_in_a_tuple_metrics_come_last(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("LlamaForCausalLM", device, **METRICS)
    ours, theirs = enabled(**batch, return_dict=False), plain(**batch, return_dict=False)
    assert len(ours) == len(theirs) + 4
    assert torch.equal(ours[-1], expected_predictions(theirs[1], batch["labels"]))


# ---- what does not change


def test_without_labels_nothing_is_different(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("LlamaForCausalLM", device, **METRICS)
    del batch["labels"]
    ours, theirs = enabled(**batch), plain(**batch)
    assert type(ours) is type(theirs) and [*ours] == [*theirs]
    assert type(ours.logits) is Tensor
    assert torch.equal(ours.logits, theirs.logits)
    generated = [m.generate(**batch, max_new_tokens=6, do_sample=False) for m in (enabled.eval(), plain.eval())]
    assert torch.equal(*generated)


def test_disable_and_enable_again(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("LlamaForCausalLM", device, **METRICS)
    assert type(enabled) is not LlamaForCausalLM and type(enabled).__name__ == "LlamaForCausalLM"
    assert enable(enabled) is enabled and "predicted_tokens" not in enabled(**batch)
    assert disable(enabled) is enabled and disable(enabled) is enabled
    assert type(enabled) is LlamaForCausalLM
    assert vars(enabled).keys() == vars(plain).keys()
    outputs = enabled(**batch)
    assert type(outputs.logits) is Tensor and torch.equal(outputs.loss, plain(**batch).loss)


def test_copies_and_pickles_are_enabled_too(batch: dict[str, Tensor], device: torch.device) -> None:
    model, _ = make("LlamaForCausalLM", device, **METRICS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        disable(model)  # each on its own
        outputs = other(**batch)
        assert_left_out(outputs.logits)
        assert outputs.predicted_tokens.shape == batch["labels"].shape
        enable(model, **METRICS)


def test_saved_and_loaded(batch: dict[str, Tensor], device: torch.device, tmp_path: Any) -> None:
    enabled, plain = make("LlamaForCausalLM", device)
    enabled.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).to(device)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(loaded(**batch).loss, plain(**batch).loss)


def test_the_signature_stays(device: torch.device) -> None:
    enabled, plain = make("LlamaForCausalLM", device)
    assert inspect.signature(enabled.forward) == inspect.signature(plain.forward)


def test_a_new_head_is_found(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("LlamaForCausalLM", device)
    for model in (enabled, plain):
        torch.manual_seed(0)
        model.resize_token_embeddings(VOCAB + 5)
    assert_same_step(enabled, plain, **batch)


def test_compiled(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("LlamaForCausalLM", device, **METRICS)
    outputs = torch.compile(enabled, backend="eager")(**batch)
    assert_left_out(outputs.logits)
    expected = plain(**batch)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=0)
    assert torch.equal(outputs.predicted_tokens, expected_predictions(expected.logits, batch["labels"]))


def test_a_replica_of_data_parallel_is_on_its_own() -> None:
    head = nn.Linear(4, 3)
    replica = head._replicate_for_data_parallel()  # in one thread while the other one runs in another
    replica.weight, replica.bias = head.weight, head.bias
    x = torch.randn(2, 4)
    with intercepted(replica, lambda hidden, weight, bias: "caught"):
        assert torch.equal(head(x), F.linear(x, head.weight, head.bias))
        assert replica(x) == "caught"


@pytest.mark.parametrize("training", [True, False])
def test_offloaded_weights(training: bool, batch: dict[str, Tensor], device: torch.device) -> None:
    """They are there while their module runs, and on the meta device before and after."""
    accelerate = pytest.importorskip("accelerate")
    enabled, plain = make("LlamaForCausalLM", device, **METRICS)
    accelerate.cpu_offload(enabled, execution_device=device)
    with torch.set_grad_enabled(training):
        ours, theirs = enabled(**batch), plain(**batch)
    assert enabled.lm_head.weight.is_meta
    assert_left_out(ours.logits)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    assert torch.equal(ours.predicted_tokens, expected_predictions(theirs.logits, batch["labels"]))
    assert torch.equal(ours.logits.exp(), theirs.logits.exp())


def test_a_weight_that_is_whole_in_the_heads_own_pass_alone(batch: dict[str, Tensor], device: torch.device) -> None:
    """As with ZeRO-3, which replaces its data; FSDP2 is in `test_parallel.py`."""
    enabled, plain = make("LlamaForCausalLM", device)
    head, whole = enabled.lm_head, enabled.lm_head.weight.data

    def gather(*_: Any) -> None:
        head.weight.data = whole

    def release(*_: Any) -> None:
        head.weight.data = whole.new_empty(0)

    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    release()
    ours, theirs = enabled(**batch), plain(**batch)
    assert head.weight.numel() == 0
    with pytest.raises(RuntimeError, match="is sharded again: look at them before the backward pass"):
        ours.logits.exp()
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    ours.loss.register_hook(gather)
    assert gradient_error(gradients(ours.loss, enabled), gradients(theirs.loss, plain))[0] < 1e-4


def test_a_backward_hook_of_the_head_is_called(batch: dict[str, Tensor], device: torch.device) -> None:
    """It wants the gradient of the logits, and of what the head is given as it is, so there are logits."""
    enabled, plain = make("LlamaForCausalLM", device)
    found = []
    for model in (enabled, plain):
        model.lm_head.register_full_backward_hook(lambda module, inputs, outputs: found.append(outputs[0]))
    with pytest.warns(UserWarning, match="the head, a Linear, did not run as a linear layer of plain tensors"):
        ours = gradients(enabled(**batch).loss, enabled)
    assert gradient_error(ours, gradients(plain(**batch).loss, plain))[0] < 1e-6
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


# ---- what is refused


def test_errors(device: torch.device) -> None:
    with pytest.raises(TypeError, match=r"model must be a model of transformers, .* got Linear"):
        enable(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="one output embedding, got LlamaModel with none"):
        enable(tiny_model("LlamaForCausalLM").model)
    model = tiny_model("LlamaForCausalLM")
    with pytest.raises(ValueError, match="label_smoothing must be between 0 and 1, got -1"):
        enable(model, label_smoothing=-1)
    with pytest.raises(TypeError, match="return_token_accuracy must be True or False, got 1"):
        enable(model, return_token_accuracy=1)
    assert type(model) is LlamaForCausalLM  # and not half enabled


def test_importing_torch_api_does_not_import_transformers() -> None:
    code = "import sys, torch_api; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
