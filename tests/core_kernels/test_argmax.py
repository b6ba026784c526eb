"""The argmax that is found by kept exponentials, of which several columns have the largest, or nearly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from core_kernels import Options, Step
from core_kernels.tiles import choose_tiles
from tests.core_kernels.problems import IGNORE, Tensors, assert_same_bits, differentiate, linear
from tests.support import interpreting, on_gpu, suite_device

pytestmark = pytest.mark.skipif(not (interpreting() or on_gpu()), reason="only the kernels keep exponentials")

N = choose_tiles(suite_device(), torch.bfloat16, None).keep.n
VOCAB = 2 * N + 37  # columns of three tiles
TOKENS, HIDDEN = 9, 16  # of which two are used: rows begin where a descriptor's may
LOW = -3.0

SCHEDULES: dict[str, dict[str, Any]] = {"kept": {"keep": True}, "ahead": {"ahead": ("x", "weight")}}
schedules = pytest.mark.parametrize("schedule", SCHEDULES)


def loss_of(schedule: str, **options: Any) -> Step:
    metrics = {"reduction": "none"} if schedule == "kept" else {}
    options = metrics | {"return_predicted_tokens": True, "return_token_accuracy": True} | options
    problem = linear(TOKENS, HIDDEN, VOCAB, torch.bfloat16, bias=False, class_weight=False)
    return Step("loss", problem, Options(**options), **SCHEDULES[schedule])


def inputs_of(weight: Tensor, loss: Step) -> Tensors:
    """Logits are ``a + b`` for an even token and ``a - b`` for an odd one, exactly; labels are low columns."""
    device = suite_device()
    sign = 1.0 - 2.0 * (torch.arange(TOKENS) % 2)
    labels = torch.tensor([IGNORE, *range(10, 10 + TOKENS - 2), IGNORE])
    grad_loss = torch.rand(TOKENS if loss.options.per_token else 1, generator=torch.Generator().manual_seed(1)) + 0.5
    inputs = {
        "x": padded(torch.stack([torch.ones(TOKENS), sign], 1)),
        "weight": padded(weight),
        "labels": labels,
        "grad_loss": grad_loss,
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def padded(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, HIDDEN - rows.shape[1])).bfloat16()


def low_weight() -> Tensor:
    noise = torch.rand(VOCAB, generator=torch.Generator().manual_seed(0))
    return torch.stack([LOW - noise, torch.zeros(VOCAB)], 1)


def check(loss: Step, inputs: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """Predictions are the first largest of the exact logits, and loss and gradients those; answers all of it."""
    outputs, saved, gradients = differentiate(loss, inputs)
    x, weight = (inputs[name].double().requires_grad_() for name in ("x", "weight"))
    z = x @ weight.T * loss.options.logit_scale
    valid = inputs["labels"] != IGNORE
    predicted = torch.where(valid, z.argmax(1), -1)
    assert outputs["predicted_tokens"].tolist() == predicted.tolist()
    expected = torch.nn.functional.cross_entropy(z, inputs["labels"], reduction=loss.options.reduction)
    torch.testing.assert_close(outputs["loss"].double().view_as(expected), expected.detach(), rtol=1e-5, atol=1e-5)
    (expected * inputs["grad_loss"].double().view_as(expected)).sum().backward()
    for name, tensor in (("x", x), ("weight", weight)):
        error = (gradients[f"grad_{name}"].double() - tensor.grad).norm()
        assert error <= 2.0**-7 * tensor.grad.norm(), name  # of bfloat16 exponentials and results
    return outputs, saved, gradients


@schedules
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_largest_wins_by_less_than_a_step_of_its_exponential(schedule: str, scale: float) -> None:
    """The winners differ by 2**-10 of a logit, in one tile and in others; and their exponentials do not."""
    weight = low_weight()
    for column, b in ((5, 0.0), (7, 2.0**-11), (N + 6, 2.0**-10), (2 * N + 3, -(2.0**-10)), (2 * N + 4, 2.0**-10)):
        weight[column] = torch.tensor([4.0, b])
    loss = loss_of(schedule, logit_scale=scale)
    inputs = inputs_of(weight, loss)
    check(loss, inputs)
    z = inputs["x"].double() @ inputs["weight"].double().T
    assert z.argmax(1).tolist() == [2 * N + 3 if token % 2 else N + 6 for token in range(TOKENS)]


@schedules
@pytest.mark.parametrize("more", [-1, 0, 1, VOCAB])
def test_many_that_come_near_change_no_bit_of_the_loss(schedule: str, more: int) -> None:
    """About as many as are multiplied again, all of them equal, from the end of the first tile on; or, all logits being
    0, in every tile.
    """
    from core_kernels.kernels.argmax import MOST_NEAR

    near = min(MOST_NEAR.value + more, VOCAB)
    weight = low_weight()
    first = N - 3 if near < VOCAB else 0
    weight[first : first + near] = torch.tensor([2.0 if near < VOCAB else 0.0, 0.0])
    loss = loss_of(schedule)
    inputs = inputs_of(weight, loss)
    outputs, *others = check(loss, inputs)
    assert outputs["token_accuracy"].max() == 0.0
    plain = loss_of(schedule, return_predicted_tokens=False, return_token_accuracy=False)
    expected, *expected_others = differentiate(plain, inputs)
    for tensors, expected_tensors in zip(others, expected_others, strict=True):
        assert_same_bits(tensors, expected_tensors)
    assert torch.equal(outputs["loss"], expected["loss"])
