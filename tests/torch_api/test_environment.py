"""What surrounds a call does not change its numbers: autocast, the default dtype, a compiler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.torch_api.calls import random_arguments
from torch_api import CrossEntropyLoss, FusedLinearCrossEntropyLoss, fused_linear_cross_entropy


def _gradients(arguments: dict[str, Tensor], loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [arguments[name] for name in ("input", "weight", "bias")]))


def _same_bits(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_backward_pass_under_autocast_is_the_same(device: torch.device) -> None:
    arguments = random_arguments(fused_linear_cross_entropy, device)
    expected = _gradients(arguments, fused_linear_cross_entropy(**arguments))
    loss = fused_linear_cross_entropy(**arguments)
    with torch.autocast(device.type, torch.bfloat16):
        assert _same_bits(_gradients(arguments, loss), expected)


def test_autocast_casts_as_for_a_linear_layer(device: torch.device) -> None:
    """Activations in bf16, parameters in float32: gradients in each one's own dtype."""
    arguments = random_arguments(fused_linear_cross_entropy, device)
    arguments["input"] = arguments["input"].detach().bfloat16().requires_grad_()
    cast = {n: t.detach().bfloat16().requires_grad_() for n, t in arguments.items() if n in ("input", "weight", "bias")}
    expected_loss = fused_linear_cross_entropy(**{**arguments, **cast})
    expected = _gradients(cast, expected_loss)

    with torch.autocast(device.type, torch.bfloat16):
        loss = fused_linear_cross_entropy(**arguments)
    assert torch.equal(loss, expected_loss)
    gradients = _gradients(arguments, loss)
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    assert _same_bits([g.bfloat16() for g in gradients], expected)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(device: torch.device, default: torch.dtype) -> None:
    arguments = random_arguments(fused_linear_cross_entropy, device)
    loss = fused_linear_cross_entropy(**arguments, label_smoothing=0.1)
    expected = [loss, *_gradients(arguments, loss)]
    torch.set_default_dtype(default)
    try:
        loss = fused_linear_cross_entropy(**arguments, label_smoothing=0.1)
        assert _same_bits([loss, *_gradients(arguments, loss)], expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_compiled_equals_eager(device: torch.device) -> None:
    arguments = random_arguments(fused_linear_cross_entropy, device)

    def scaled(arguments: dict[str, Tensor]) -> Tensor:
        return 1.5 * fused_linear_cross_entropy(**arguments, softcap=5.0)

    expected = [scaled(arguments), *_gradients(arguments, scaled(arguments))]
    loss = torch.compile(scaled, backend="aot_eager")(arguments)
    assert _same_bits([loss, *_gradients(arguments, loss)], expected)


def test_modules_validate_their_options_and_show_them() -> None:
    with pytest.raises(ValueError, match="label_smoothing must be between 0 and 1, got -1"):
        CrossEntropyLoss(label_smoothing=-1)
    with pytest.raises(ValueError, match="reduction must be one of"):
        FusedLinearCrossEntropyLoss(reduction="avg")
    loss = FusedLinearCrossEntropyLoss(softcap=30.0, return_predicted_tokens=True)
    assert repr(loss) == "FusedLinearCrossEntropyLoss(softcap=30.0, return_predicted_tokens=True)"
