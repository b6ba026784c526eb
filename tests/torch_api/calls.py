"""Random arguments for both losses, the calls that differentiate them, and what they must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import core_kernels as core
import torch_api
from tests.core_kernels.problems import HIDDEN, IGNORE, VOCAB
from tests.parity import oracle
from torch_api import operator

Arguments = dict[str, Tensor]
Loss = Callable[..., Any]

REDUCTIONS = ("none", "mean", "sum")
LOSSES = (torch_api.cross_entropy, torch_api.fused_linear_cross_entropy)
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "lse_square_scale": 0.05, "softcap": 5.0}
METRICS = {
    "return_z_loss": True,
    "return_token_accuracy": True,
    "return_predicted_tokens": True,
    "return_counts": True,
}

every_loss = pytest.mark.parametrize("loss_fn", LOSSES)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)

# The oracle's names for what the torch functions call differently.
LINEAR_NAMES = {"input": "x", "weight": "weight", "bias": "bias", "target": "labels", "ce_weight": "class_weight"}
LOGITS_NAMES = {"input": "logits", "weight": "class_weight", "target": "labels"}


def random_arguments(
    loss_fn: Loss, device: torch.device, leading: tuple[int, ...] = (7,), seed: int = 0, vocab: int = VOCAB
) -> Arguments:
    """Every tensor argument of ``loss_fn``: those that can require grad do; the first and last token are ignored."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device)

    target = torch.randint(0, vocab, leading, generator=generator, device="cpu")
    target.view(-1)[:1] = IGNORE
    target.view(-1)[-1:] = IGNORE
    arguments = {"target": target.to(device)}
    class_weight = torch.rand(vocab, generator=generator, device="cpu").to(device) + 0.5
    if loss_fn is torch_api.cross_entropy:
        leaves = {"input": 2.0 * normal(*leading, vocab)}
        arguments["weight"] = class_weight
    else:
        leaves = {"input": normal(*leading, HIDDEN), "weight": 0.5 * normal(vocab, HIDDEN), "bias": normal(vocab)}
        arguments["ce_weight"] = class_weight
    return arguments | {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def leaves_of(arguments: Arguments) -> Arguments:
    """Those that require grad."""
    return {name: tensor for name, tensor in arguments.items() if tensor.requires_grad}


def fresh_leaves(arguments: Arguments, wanted: tuple[str, ...] | None = None) -> Arguments:
    """Copies without a gradient, of which those named in ``wanted`` (by default, those that did) require one."""
    return {
        name: tensor.detach().clone().requires_grad_(tensor.requires_grad if wanted is None else name in wanted)
        for name, tensor in arguments.items()
    }


def upstream_like(loss: Tensor) -> Tensor:
    """An upstream gradient that is neither 1 nor uniform; among several tokens, the third has 0."""
    if loss.dim() == 0:
        return torch.tensor(0.7, device=loss.device)
    upstream = 1.5 * torch.rand(loss.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    upstream.view(-1)[2:3] = 0.0
    return upstream.to(loss.device)


def gradients(loss: Tensor, arguments: Arguments, **options: Any) -> Arguments:
    """Gradients of ``upstream_like(loss) * loss`` by the arguments that require one."""
    leaves = leaves_of(arguments)
    answers = torch.autograd.grad(loss, list(leaves.values()), upstream_like(loss), **options)
    return dict(zip(leaves, answers, strict=True))


def expected(loss_fn: Loss, arguments: Arguments, **options: Any) -> oracle.Expected:
    """What the oracle answers, its gradients by the torch names; every token has the upstream of ``upstream_like``."""
    names = LOGITS_NAMES if loss_fn is torch_api.cross_entropy else LINEAR_NAMES
    compute = oracle.cross_entropy if loss_fn is torch_api.cross_entropy else oracle.fused_linear_ce
    arrays = {names[name]: to_numpy(tensor) for name, tensor in arguments.items()}
    per_token = options.get("reduction") == "none"
    upstream = to_numpy(upstream_like(torch.empty(arguments["target"].shape if per_token else ())))
    answer = compute(**arrays, upstream=upstream, **options)
    by_torch_name = {name: answer.gradients[names[name]] for name in names if names[name] in answer.gradients}
    return replace(answer, gradients=by_torch_name)


def to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def assert_close(actual: Tensor, wanted: np.ndarray) -> None:
    """Equal to float32 accuracy."""
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(to_numpy(actual), wanted, rtol=1e-5, atol=1e-6)


def assert_gradients_close(actual: Arguments, wanted: dict[str, np.ndarray]) -> None:
    assert actual.keys() == wanted.keys()
    for name, gradient in actual.items():
        assert_close(gradient, wanted[name])


def assert_same_bits(actual: Tensor, wanted: Tensor) -> None:
    assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
    bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (actual, wanted)]
    assert torch.equal(*bits), f"{actual} is not {wanted}"


def assert_all_same_bits(actual: Arguments, wanted: Arguments) -> None:
    assert actual.keys() == wanted.keys()
    for name, tensor in actual.items():
        assert_same_bits(tensor, wanted[name])


def assert_all_close(actual: dict[str, Any], wanted: dict[str, Any]) -> None:
    """To float32's rounding: products of other shapes sum in another order on a CPU."""
    assert actual.keys() == wanted.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[core.Plan]:
    """The plans that are launched from here on."""
    plans: list[core.Plan] = []

    def launch(plan: core.Plan, tensors: Arguments) -> None:
        plans.append(plan)
        core.launch(plan, tensors)

    monkeypatch.setattr(operator, "launch_plan", launch)
    return plans
