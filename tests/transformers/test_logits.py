"""Logits that are put off: computed when they are looked at, whatever is done with them, and not before."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from tests.support import on_gpu
from tests.transformers.families import VOCAB, gradient_error
from tests.transformers.models import (
    METRICS,
    assert_left_out,
    gradients,
    make,
)
from torch_api.transformers import disable, enable


def test_logits_are_computed_when_looked_at_and_the_models_own(batch: dict[str, Tensor], device: torch.device) -> None:
    for name in ("LlamaForCausalLM", "Gemma2ForCausalLM", "GraniteForCausalLM"):
        enabled, plain = make(name, device)
        ours, theirs = enabled(**batch).logits, plain(**batch).logits
        facts = ("shape", "dtype", "device", "requires_grad", "ndim")
        assert [getattr(ours, f) for f in facts] == [getattr(theirs, f) for f in facts]
        assert (ours.size(-1), len(ours), ours.numel()) == (VOCAB, 2, theirs.numel())
        assert_left_out(ours)
        with pytest.warns(UserWarning, match="`argmax` needs logits that were to be left out"):
            assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it has been said
            assert np.array_equal(ours.detach().cpu().numpy(), theirs.detach().cpu().numpy())
            assert torch.equal(enabled(**batch).logits.exp(), theirs.exp())


@pytest.mark.parametrize(
    "step",
    [
        lambda z: z[:, -1],
        lambda z: z[..., 2:5, :],
        lambda z: z[:, [3, 1]],
        lambda z: z[z[..., 0].shape == z.shape[:2] and 1],
        lambda z: z[..., 5],
        lambda z: z[..., :7],
        lambda z: z[:, None, 0],
        lambda z: z[:, 1::2].float() * 3 / 2.5,
        lambda z: z.view(-1, VOCAB).unsqueeze(0),
        lambda z: z.reshape(VOCAB, -1),
        lambda z: z.flatten(0, 1)[3:],
        lambda z: torch.tanh(z / 2) * 3,
        lambda z: torch.tanh(torch.tanh(z)),
        lambda z: z * torch.arange(VOCAB, device=z.device),
        lambda z: z.to(torch.bfloat16).float(),
        lambda z: z.double(),
        lambda z: -z + 1,
        lambda z: z.transpose(1, 2),
        lambda z: 1 / z,
    ],
)
def test_any_arithmetic_gives_what_it_would(step: Any, batch: dict[str, Tensor], device: torch.device) -> None:
    """Values and gradients, and the loss of rows that are made of the logits."""
    enabled, plain = make("LlamaForCausalLM", device)
    results = []
    for model in (enabled, plain):
        made = step(model(**batch).logits)
        loss = made.float().square().mean()
        results.append((made.shape, made.dtype, made.detach().clone(), gradients(loss, model)))
    ours, theirs = results
    assert ours[:2] == theirs[:2]
    assert torch.equal(ours[2], theirs[2])
    assert gradient_error(ours[3], theirs[3])[0] < 1e-6
    rows = [step(model(**batch).logits).float() for model in (enabled, plain)]
    if rows[0].dim() == 2:
        target = torch.arange(len(rows[0]), device=device) % rows[0].shape[-1]
        losses = [F.cross_entropy(r, target) for r in rows]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        assert gradient_error(gradients(losses[0], enabled), gradients(losses[1], plain))[0] < 1e-4


def test_written_to_logits(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("LlamaForCausalLM", device)
    results = []
    for model in (enabled, plain):
        logits = model(**batch).logits
        before = logits.float() * 2
        logits[..., 7] = -1e4
        logits /= 2
        loss = F.cross_entropy(logits.view(-1, VOCAB), batch["input_ids"].flatten())
        results.append((before.detach().clone(), logits.detach().clone(), loss, gradients(loss, model)))
    for ours, theirs in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.equal(ours, theirs)
    assert gradient_error(results[0][3], results[1][3])[0] < 1e-6


class Square(torch.autograd.Function):
    """What takes tensors without asking them: a function of C++, or of somebody's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def test_functions_that_do_not_ask_get_gradients_too(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("Gemma2ForCausalLM", device)
    found = [gradients(Square.apply(model(**batch).logits).mean(), model) for model in (enabled, plain)]
    assert gradient_error(*found)[0] < 1e-5


@pytest.mark.skipif(not on_gpu(), reason="measures the GPU's memory")
def test_a_step_takes_no_memory_for_logits(device: torch.device) -> None:
    config = LlamaConfig(
        vocab_size=50_000, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).to(device)
    ids = torch.randint(config.vocab_size, (2, 2048), device=device)
    logits = ids.numel() * config.vocab_size * 4  # bytes
    extra = {}
    for prepare in (disable, lambda model: enable(model, memory="lean", **METRICS)):
        prepare(model)
        for _ in range(2):  # the first makes the gradients, and compiles
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(input_ids=ids, labels=ids).loss.backward()
        extra[prepare] = torch.cuda.max_memory_allocated() - before
    plain, enabled = extra.values()
    assert plain > 2 * logits
    assert enabled < logits / 2


def test_a_pass_holds_nothing_when_its_outputs_are_gone(batch: dict[str, Tensor], device: torch.device) -> None:
    model, _ = make("LlamaForCausalLM", device, **METRICS)
    outputs = model(**batch)
    outputs.loss.backward()
    hidden = weakref.ref(outputs.logits.logits.projection.hidden)
    gc.disable()  # no cycles either
    try:
        del outputs
        assert hidden() is None
    finally:
        gc.enable()


def test_logits_after_the_weights_have_changed_are_an_error(batch: dict[str, Tensor], device: torch.device) -> None:
    model, _ = make("LlamaForCausalLM", device)
    outputs = model(**batch)
    outputs.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="has been changed since: look at them before the optimizer's step"):
        outputs.logits.sum()


def test_what_the_model_does_to_logits_is_named_once(batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("ProphetNetForCausalLM", device)
    with pytest.warns(UserWarning, match="`transpose` needs logits that were to be left out"):
        ours = enabled(**batch).loss
    assert torch.equal(ours, plain(**batch).loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        enabled(**batch)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_of_a_pass_without_gradients(mode: Any, batch: dict[str, Tensor], device: torch.device) -> None:
    enabled, plain = make("Gemma2ForCausalLM", device)
    with mode():
        ours, theirs = enabled(**batch).logits, plain(**batch).logits
    assert not (ours.requires_grad or ours.exp().requires_grad)  # looked at with gradients on
    assert torch.equal(ours.exp(), theirs.exp())
