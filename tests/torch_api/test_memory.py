"""What a call costs on a GPU: peak memory, and never a wait for the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from core_kernels import Plan
from core_kernels.plan import MIB
from tests.support import on_gpu, waiting_raises
from tests.torch_api.calls import (
    LOSSES,
    Loss,
    assert_all_same_bits,
    random_arguments,
    record_launches,
)
from torch_api import fused_linear_cross_entropy

pytestmark = pytest.mark.skipif(not on_gpu(), reason="needs a GPU's allocator and streams")

TOKENS, HIDDEN, VOCAB = 8192, 512, 65536
LOGITS_BYTES = TOKENS * VOCAB * torch.bfloat16.itemsize


def growth_of_peak(call: Callable[[], object]) -> int:
    """Bytes that ``call`` holds at its highest point, beyond what was held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def planned_bytes(*plans: Plan) -> int:
    """All buffers of the plans, each with what the allocator may round it up by."""
    return sum(buffer.nbytes + MIB for plan in plans for buffer in plan.buffers)


def test_logits_are_never_whole_in_memory(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, device=device, dtype=torch.bfloat16).mul_(0.05).requires_grad_()
    target = torch.randint(0, VOCAB, (TOKENS,), device=device)

    def evaluate() -> torch.Tensor:
        with torch.no_grad():
            return fused_linear_cross_entropy(x, weight, target, memory="lean")

    def train() -> None:
        x.grad = weight.grad = None
        fused_linear_cross_entropy(x, weight, target, memory="lean").backward()

    evaluate()
    train()  # both are compiled now
    x.grad = weight.grad = None
    launches = record_launches(monkeypatch)
    evaluation_bytes = growth_of_peak(evaluate)
    training_bytes = growth_of_peak(train)
    evaluation, forward, backward = launches
    assert evaluation_bytes <= planned_bytes(evaluation)
    assert evaluation_bytes < LOGITS_BYTES / 50
    assert training_bytes <= planned_bytes(forward, backward)
    assert training_bytes < LOGITS_BYTES / 4


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_a_step_never_waits_for_the_gpu(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device)
    options = {"label_smoothing": 0.1, "return_token_accuracy": True, "return_predicted_tokens": True}

    def step() -> dict[str, torch.Tensor]:
        output = loss_fn(**arguments, **options)
        answers = torch.autograd.grad(output.loss, [t for t in arguments.values() if t.requires_grad])
        return dict(zip("abc", answers, strict=False)) | {"loss": output.loss, "predicted": output.predicted_tokens}

    warm = step()
    with waiting_raises():
        again = step()
    assert_all_same_bits(again, warm)
