"""What training loops do around the loss: mixed precision, checkpointing, accumulation, and the life of a graph."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.core_kernels.problems import HIDDEN, IGNORE, VOCAB
from tests.support import on_gpu
from tests.torch_api.calls import (
    METRICS,
    Loss,
    assert_all_same_bits,
    assert_same_bits,
    every_loss,
    fresh_leaves,
    gradients,
    random_arguments,
    record_launches,
)
from torch_api import FusedLinearCrossEntropyLoss, cross_entropy, fused_linear_cross_entropy

# ---- mixed precision


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_under_autocast_gradients_have_the_parameters_dtype(device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    body, head = nn.Linear(HIDDEN, HIDDEN).to(device), nn.Linear(HIDDEN, VOCAB).to(device)
    x, target = torch.randn(9, HIDDEN, device=device), torch.randint(0, VOCAB, (9,), device=device)
    target[[0, -1]] = IGNORE
    with torch.autocast(device.type, dtype):
        hidden = body(x)
        assert hidden.dtype == dtype
        loss = fused_linear_cross_entropy(hidden, head.weight, target, head.bias)
    assert loss.dtype == torch.float32
    loss.backward()
    parameters = [*body.parameters(), *head.parameters()]
    ours = [parameter.grad.clone() for parameter in parameters]
    assert all(gradient.dtype == torch.float32 for gradient in ours)

    exact = [p.detach().double().requires_grad_() for p in parameters]
    plain_hidden = F.linear(x.double(), exact[0], exact[1])
    wanted = torch.autograd.grad(F.cross_entropy(F.linear(plain_hidden, exact[2], exact[3]), target), exact)
    with torch.autocast(device.type, dtype):
        plain = F.cross_entropy(head(body(x)).float(), target)
    framework = torch.autograd.grad(plain, parameters)
    for mine, theirs, truth in zip(ours, framework, wanted, strict=True):
        allowed = 2 * (theirs - truth).norm() + torch.finfo(dtype).eps * truth.norm()
        assert (mine - truth).norm() <= allowed


@pytest.mark.parametrize("dtype", (torch.float64, torch.int64))
def test_autocast_casts_nothing_that_it_would_not_for_a_linear_layer(device: torch.device, dtype: torch.dtype) -> None:
    arguments = random_arguments(fused_linear_cross_entropy, device)
    arguments["input"] = arguments["input"].detach().to(dtype)
    with torch.autocast(device.type, torch.bfloat16), pytest.raises(TypeError, match=r"^input must be float32"):
        fused_linear_cross_entropy(**arguments)


class Scaled:
    """A step with fp16 tensors and a loss scale of 2**16, in fp16's own gradients: the framework's, and ours."""

    scale = 2.0**16

    def __init__(self, device: torch.device) -> None:
        # Thousands of tokens' mean, here as a weight of the loss: unscaled, most of the gradient is below fp16's least.
        self.share = 2.0**-12
        generator = torch.Generator().manual_seed(0)
        self.target = torch.randint(0, VOCAB, (16,), generator=generator).to(device)
        self.x = (0.1 * torch.randn(16, HIDDEN, generator=generator)).half().to(device)
        self.weight = (0.1 * torch.randn(VOCAB, HIDDEN, generator=generator)).half().to(device)

    def gradients(self, loss_fn: Any, scale: float, dtype: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
        x, weight = (tensor.to(dtype).detach().requires_grad_() for tensor in (self.x, self.weight))
        return torch.autograd.grad(scale * self.share * loss_fn(x, weight, self.target), (x, weight))

    @staticmethod
    def plain(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        z = F.linear(x, weight)
        return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), target)


def test_scaled_fp16_gradients_do_not_underflow_where_the_frameworks_do_not(device: torch.device) -> None:
    step = Scaled(device)
    exact = step.gradients(step.plain, 1.0, torch.float64)
    unscaled = step.gradients(step.plain, 1.0)
    ours = step.gradients(fused_linear_cross_entropy, step.scale)
    framework = step.gradients(step.plain, step.scale)
    assert any((gradient == 0).sum() > gradient.numel() / 10 for gradient in unscaled)  # there is something to lose
    for mine, theirs, truth in zip(ours, framework, exact, strict=True):
        assert mine.dtype == torch.float16 and mine.isfinite().all()
        assert not ((mine == 0) & (theirs != 0)).any()
        errors = [(gradient.double() / step.scale - truth).norm() for gradient in (mine, theirs)]
        assert errors[0] <= 2 * errors[1] + 2.0**-12 * truth.norm()


def test_a_grad_scaler_scales_steps_and_skips_overflows(device: torch.device) -> None:
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB).to(device)
    x, target = torch.randn(9, HIDDEN, device=device), torch.randint(0, VOCAB, (9,), device=device)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)

    def step(factor: float) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = fused_linear_cross_entropy(factor * x, head.weight, target, head.bias)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    losses = [step(1.0) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2] and scaler.get_scale() == 2.0**16
    before = head.weight.detach().clone()
    step(1e6)  # inf in fp16: the loss is not finite, and neither are the gradients
    assert scaler.get_scale() == 2.0**15
    assert_same_bits(head.weight.detach(), before)


# ---- checkpointing


@pytest.mark.parametrize("reentrant", (False, True))
def test_a_checkpointed_loss_has_the_same_bits(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, reentrant: bool
) -> None:
    launches = record_launches(monkeypatch)
    arguments = random_arguments(fused_linear_cross_entropy, device)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        own = arguments | {"input": x, "weight": weight, "bias": bias}
        return fused_linear_cross_entropy(**own, label_smoothing=0.1, return_predicted_tokens=True).loss

    leaves = [arguments[name] for name in ("input", "weight", "bias")]
    wanted = gradients(call(*leaves), arguments)
    launches.clear()
    loss = checkpoint(call, *leaves, use_reentrant=reentrant)
    (0.7 * loss).backward()
    assert [plan.step.kind for plan in launches] == ["loss", "loss", "gradient"]
    assert_all_same_bits({name: arguments[name].grad for name in wanted}, wanted)


def test_saved_tensors_may_be_packed_away(device: torch.device) -> None:
    """As offloading does: hooks that move what is saved to a CPU, and back."""
    arguments = random_arguments(fused_linear_cross_entropy, device)
    wanted = gradients(fused_linear_cross_entropy(**arguments), arguments)
    packed: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor.cpu().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.to(device)):
        loss = fused_linear_cross_entropy(**arguments)
    assert arguments["weight"].shape in packed
    assert max(shape.numel() for shape in packed) < arguments["target"].numel() * VOCAB * HIDDEN
    assert_all_same_bits(gradients(loss, arguments), wanted)


# ---- gradient accumulation


@pytest.mark.parametrize("as_tensor", (False, True))
@every_loss
def test_microbatches_with_the_batchs_items_are_the_batch(
    device: torch.device, loss_fn: Loss, as_tensor: bool
) -> None:
    arguments = random_arguments(loss_fn, device, (4, 6))
    arguments = {name: tensor for name, tensor in arguments.items() if tensor.requires_grad or name == "target"}
    arguments["target"][2, 1:] = IGNORE  # uneven: a mean of means would be another number
    arguments["target"][3] = IGNORE
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.05, "return_z_loss": True, "return_counts": True}
    whole = loss_fn(**arguments, **options)
    whole.loss.backward()

    parts = fresh_leaves(arguments)
    items: int | Tensor = int((arguments["target"] != IGNORE).sum())
    items = torch.tensor(items, device=device) if as_tensor else items
    results = []
    for row in range(4):
        mine = parts | {"input": parts["input"][row], "target": parts["target"][row]}
        results.append(loss_fn(**mine, num_items_in_batch=items, **options))
        results[-1].loss.backward()

    def total(name: str) -> Tensor:
        return torch.stack([getattr(result, name) for result in results]).sum(0)

    assert whole.loss.dtype == results[0].loss.dtype == torch.float32
    torch.testing.assert_close(total("loss"), whole.loss)
    torch.testing.assert_close(total("z_loss"), whole.z_loss)
    assert (total("num_valid"), total("num_correct")) == (whole.num_valid, whole.num_correct)
    for name, tensor in parts.items():
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, arguments[name].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("items", (0, torch.tensor(0), torch.tensor([0.0])))
def test_a_batch_without_items_has_loss_0(device: torch.device, items: int | Tensor) -> None:
    arguments = random_arguments(cross_entropy, device)
    arguments["target"].fill_(IGNORE)
    loss = cross_entropy(**arguments, num_items_in_batch=items)
    assert_same_bits(loss, torch.zeros((), device=device))
    assert not gradients(loss, arguments)["input"].any()


def test_items_may_be_a_fraction(device: torch.device) -> None:
    """As a sum of class weights may be."""
    arguments = random_arguments(cross_entropy, device)
    loss = cross_entropy(**arguments, num_items_in_batch=torch.tensor(0.25))
    assert_same_bits(loss, 4 * cross_entropy(**arguments, reduction="sum"))


@pytest.mark.skipif(not on_gpu(), reason="needs two devices")
@pytest.mark.parametrize(("items_on", "loss_on"), (("cpu", "cuda"), ("cuda", "cpu")))
def test_items_may_be_on_another_device(items_on: str, loss_on: str) -> None:
    arguments = random_arguments(cross_entropy, torch.device(loss_on))
    loss = cross_entropy(**arguments, num_items_in_batch=torch.tensor([4], device=items_on))
    assert loss.device.type == loss_on
    assert_same_bits(loss, 0.25 * cross_entropy(**arguments, reduction="sum"))


def test_a_module_takes_the_items_of_the_batch(device: torch.device) -> None:
    arguments = random_arguments(fused_linear_cross_entropy, device)
    x, weight, target = (arguments[name].detach() for name in ("input", "weight", "target"))
    module = FusedLinearCrossEntropyLoss()
    loss = module(weight, x, target, num_items_in_batch=10)
    torch.testing.assert_close(loss, fused_linear_cross_entropy(x, weight, target, reduction="sum") / 10)


# ---- the life of a graph


@every_loss
def test_metrics_keep_no_graph_alive(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device)
    hidden = 2.0 * arguments["input"]
    alive = weakref.ref(hidden)
    output = loss_fn(**arguments | {"input": hidden}, **METRICS)
    kept = output.predicted_tokens, output.token_accuracy, output.num_valid
    del hidden, output
    gc.collect()
    assert alive() is None
    assert kept[0].shape == arguments["target"].shape


@every_loss
def test_a_backward_pass_frees_what_was_saved(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device)
    hidden = 2.0 * arguments["input"]
    alive = weakref.ref(hidden)
    loss = loss_fn(**arguments | {"input": hidden})
    del hidden
    assert alive() is not None
    loss.backward()
    gc.collect()
    assert alive() is None
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
