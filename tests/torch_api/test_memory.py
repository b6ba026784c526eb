"""What a call may cost: the slab that ``memory`` allows; on a GPU, peak memory and never a wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from core_kernels import Argument, Options, Plan, Step, linear_problem, plan
from core_kernels.plan import MIB
from tests.core_kernels.problems import HIDDEN, VOCAB, in_lines
from tests.support import on_gpu, waiting_raises
from tests.torch_api.calls import (
    Arguments,
    Loss,
    assert_all_same_bits,
    every_loss,
    gradients,
    random_arguments,
    record_launches,
)
from torch_api import fused_linear_cross_entropy

gpu_only = pytest.mark.skipif(not on_gpu(), reason="needs a GPU's allocator and streams")


# ---- the slab


def slab_problem(device: torch.device, dtype: torch.dtype, **options: Any) -> tuple[Arguments, int, int, int]:
    """Arguments whose vocab spans four slabs of the least size; its columns, its bytes, and those of the rest."""
    arguments = {name: t.detach() for name, t in random_arguments(fused_linear_cross_entropy, device).items()}
    tokens = arguments["target"].numel()

    def planned_for(vocab: int) -> Plan:
        problem = linear_problem(
            Argument("input", (tokens, HIDDEN), dtype),
            Argument("weight", (vocab, HIDDEN), dtype),
            Argument("target", (tokens,), torch.int64),
            Argument("bias", (vocab,), dtype),
            None,
        )
        return plan(Step("loss", problem, Options(**options)).gradient(["x", "weight", "bias"]), device)

    planned = planned_for(VOCAB)
    width = planned.tiles.slab.n
    if planned.engine == "triton":
        width = max(width, planned.tiles.grad_weight.m)
    vocab = 3 * width + 5
    torch.manual_seed(2)
    leaves = {
        "input": torch.randn(tokens, HIDDEN),
        "weight": 0.5 * torch.randn(vocab, HIDDEN),
        "bias": torch.randn(vocab),
    }
    arguments |= {name: leaf.to(device, dtype).requires_grad_() for name, leaf in leaves.items()}
    del arguments["ce_weight"]

    planned = planned_for(vocab)
    (slab,) = (buffer for buffer in planned.workspace if buffer.name == "slab")
    rest = planned.workspace_bytes - in_lines(slab.nbytes)
    return arguments, width, tokens * width * slab.dtype.itemsize, rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_change_the_result(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    launches = record_launches(monkeypatch)
    arguments, width, slab, rest = slab_problem(device, dtype, label_smoothing=0.1)
    results = []
    for memory in ("speed", "auto", "lean", *(rest + in_lines(tiles * slab) for tiles in (1, 2, 3))):
        loss = fused_linear_cross_entropy(**arguments, label_smoothing=0.1, memory=memory)
        results.append({"loss": loss} | gradients(loss, arguments))
    backward = [launched for launched in launches if launched.step.kind == "gradient"]
    vocab = len(arguments["weight"])
    *slabs, last = (launched.slab for launched in backward)
    assert slabs == [vocab, vocab, vocab, width, 2 * width]
    assert last in (2 * width, 3 * width)  # of those that fit, the one that keeps the programs busier

    first, *others = results
    sums_in_parts = backward[0].splits > 1  # of which slabs have more or fewer columns
    for other in others:
        if backward[0].engine == "triton":
            in_order = [name for name in first if not (sums_in_parts and name == "input")]
            assert_all_same_bits({name: other[name] for name in in_order}, {name: first[name] for name in in_order})
        # the products' shapes decide in which order the BLAS sums
        torch.testing.assert_close(other, first, rtol=max(1e-6, torch.finfo(dtype).eps), atol=1e-6)


@pytest.mark.parametrize("memory", [0, 1, 100])
def test_too_little_memory_raises(device: torch.device, memory: int) -> None:
    arguments, *_ = slab_problem(device, torch.float32)
    with pytest.raises(ValueError, match=f"memory={memory} bytes are too few: this call needs at least [0-9]+"):
        fused_linear_cross_entropy(**arguments, memory=memory)


def test_too_little_memory_for_the_backward_pass_raises(device: torch.device) -> None:
    arguments, _, slab, rest = slab_problem(device, torch.float32)
    with pytest.raises(ValueError) as raised:
        fused_linear_cross_entropy(**arguments, memory=0)
    least = int(str(raised.value).split()[-1])
    assert 0 < least <= rest + in_lines(slab)  # of which sums in parts are left out where they do not fit
    fused_linear_cross_entropy(**arguments, memory=least).backward()
    memory = least - 1
    message = f"memory={memory} bytes are too few: this call needs at least {least}"
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(**arguments, memory=memory).backward()


# ---- on a GPU

LARGE_TOKENS, LARGE_HIDDEN, LARGE_VOCAB = 16384, 512, 65536
LARGE_LOGITS_BYTES = LARGE_TOKENS * LARGE_VOCAB * torch.bfloat16.itemsize


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
    return sum(buffer.nbytes + MIB for plan in plans for buffer in plan.allocations)


@gpu_only
def test_logits_are_never_whole_in_memory(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(LARGE_TOKENS, LARGE_HIDDEN, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(LARGE_VOCAB, LARGE_HIDDEN, device=device, dtype=torch.bfloat16).mul_(0.05).requires_grad_()
    target = torch.randint(0, LARGE_VOCAB, (LARGE_TOKENS,), device=device)

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
    assert evaluation_bytes < LARGE_LOGITS_BYTES / 50
    assert training_bytes <= planned_bytes(forward, backward)
    assert training_bytes < LARGE_LOGITS_BYTES / 4


@gpu_only
@every_loss
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
