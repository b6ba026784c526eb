"""``torch.func``: gradients, pullbacks, and maps over tokens, which are one launch over more of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jacrev, vjp, vmap

from tests.core_kernels.problems import HIDDEN
from tests.torch_api.calls import (
    METRICS,
    OPTIONS,
    Arguments,
    Loss,
    assert_all_close,
    assert_all_same_bits,
    assert_same_bits,
    every_loss,
    every_reduction,
    gradients,
    leaves_of,
    random_arguments,
    record_launches,
    upstream_like,
)
from torch_api import fused_linear_cross_entropy

BATCH = 3


def leaves_and_rest(arguments: Arguments) -> tuple[Arguments, Arguments]:
    leaves = {name: tensor.detach() for name, tensor in leaves_of(arguments).items()}
    return leaves, {name: tensor for name, tensor in arguments.items() if name not in leaves}


@every_loss
def test_grad_and_value_are_those_of_backward(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device)
    leaves, rest = leaves_and_rest(arguments)

    def loss_and_output(leaves: Arguments) -> Any:
        output = loss_fn(**leaves, **rest, **OPTIONS, **METRICS)
        return 0.7 * output.loss, output

    answers, (_, output) = grad_and_value(loss_and_output, has_aux=True)(leaves)
    wanted = loss_fn(**arguments, **OPTIONS, **METRICS)
    assert_all_same_bits(vars(output), {k: v.detach() for k, v in vars(wanted).items()})
    assert_all_same_bits(answers, gradients(wanted.loss, arguments))


@every_loss
def test_vjp_takes_an_upstream_per_token(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device, (2, 4))
    leaves, rest = leaves_and_rest(arguments)
    loss, pullback = vjp(lambda leaves: loss_fn(**leaves, **rest, reduction="none", **OPTIONS), leaves)
    wanted = loss_fn(**arguments, reduction="none", **OPTIONS)
    assert_same_bits(loss, wanted)
    assert_all_same_bits(pullback(upstream_like(loss))[0], gradients(wanted, arguments))


def test_jacrev_has_one_row_per_token(device: torch.device) -> None:
    arguments = random_arguments(fused_linear_cross_entropy, device)
    leaves, rest = leaves_and_rest(arguments)
    jacobian = jacrev(lambda leaves: fused_linear_cross_entropy(**leaves, **rest, reduction="none"))(leaves)
    loss = fused_linear_cross_entropy(**arguments, reduction="none")
    for token in range(len(loss)):
        wanted = torch.autograd.grad(loss[token], [arguments[name] for name in leaves], retain_graph=True)
        rows = {name: jacobian[name][token] for name in leaves}
        assert_all_close(rows, dict(zip(leaves, wanted, strict=True)))


# ---- vmap


def batch_of(loss_fn: Loss, device: torch.device) -> tuple[Tensor, Tensor, Arguments, Arguments]:
    """Inputs and targets of a batch, and the other arguments: those that require grad, and those that do not."""
    first = random_arguments(loss_fn, device)
    many = [random_arguments(loss_fn, device, seed=seed) for seed in range(BATCH)]
    many[1]["target"][2:4] = many[1]["target"][0]  # other counts of valid tokens
    inputs, targets = (torch.stack([one[name].detach() for one in many]) for name in ("input", "target"))
    leaves, rest = leaves_and_rest({k: v for k, v in first.items() if k not in ("input", "target")})
    return inputs, targets, leaves, rest


@every_reduction
@every_loss
def test_a_map_over_tokens_is_one_launch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, loss_fn: Loss, reduction: str
) -> None:
    inputs, targets, leaves, rest = batch_of(loss_fn, device)
    options = OPTIONS | METRICS | {"reduction": reduction}

    def call(x: Tensor, target: Tensor) -> Any:
        return loss_fn(x, target=target, **leaves, **rest, **options)

    launches = record_launches(monkeypatch)
    output = vmap(call)(inputs, targets)
    assert len(launches) == 1 and launches[0].problem.tokens == targets.numel()
    for index in range(BATCH):
        wanted = call(inputs[index], targets[index])
        assert_all_close({k: v[index] for k, v in vars(output).items()}, vars(wanted))


@pytest.mark.parametrize("axes", ((1, 1), (0, None), (1, 0)))
@every_loss
def test_axes_are_anywhere(device: torch.device, loss_fn: Loss, axes: tuple[int, int | None]) -> None:
    inputs, targets, leaves, rest = batch_of(loss_fn, device)
    moved = inputs.movedim(0, axes[0])
    labels = targets[0] if axes[1] is None else targets.movedim(0, axes[1])

    def call(x: Tensor, target: Tensor) -> Tensor:
        return loss_fn(x, target=target, **leaves, **rest, reduction="none")

    losses = vmap(call, axes, out_dims=1)(moved, labels)
    for index in range(BATCH):
        target = targets[0 if axes[1] is None else index]
        torch.testing.assert_close(losses[:, index], call(inputs[index], target))


def test_a_gradient_of_a_map_is_one_launch_each_way(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, targets, leaves, rest = batch_of(fused_linear_cross_entropy, device)
    upstream = torch.tensor([1.5, -2.0, 0.5], device=device)

    def weighed(leaves: Arguments, inputs: Tensor) -> Tensor:
        call = lambda x, y: fused_linear_cross_entropy(x, target=y, **leaves, **rest, **OPTIONS)  # noqa: E731
        return (upstream * vmap(call)(inputs, targets)).sum()

    launches = record_launches(monkeypatch)
    by_leaves, by_inputs = grad(weighed, (0, 1))(leaves, inputs)
    assert [plan.step.kind for plan in launches] == ["loss", "gradient"]

    wanted = {name: torch.zeros_like(tensor) for name, tensor in leaves.items()}
    for index in range(BATCH):
        one = lambda leaves, x: fused_linear_cross_entropy(x, target=targets[index], **leaves, **rest, **OPTIONS)  # noqa: B023, E731
        of_leaves, of_input = grad(one, (0, 1))(leaves, inputs[index])
        wanted = {name: wanted[name] + upstream[index] * of_leaves[name] for name in wanted}
        torch.testing.assert_close(by_inputs[index], upstream[index] * of_input, rtol=1e-5, atol=1e-6)
    assert_all_close(by_leaves, wanted)


@every_loss
def test_per_example_gradients(device: torch.device, loss_fn: Loss) -> None:
    inputs, targets, leaves, rest = batch_of(loss_fn, device)

    def loss(leaves: Arguments, x: Tensor, target: Tensor) -> Tensor:
        return loss_fn(target=target, **leaves, **rest, input=x, **OPTIONS)

    by_leaves, by_inputs = vmap(grad(loss, (0, 1)), (None, 0, 0))(leaves, inputs, targets)
    for index in range(BATCH):
        wanted, wanted_input = grad(loss, (0, 1))(leaves, inputs[index], targets[index])
        assert_all_close({k: v[index] for k, v in by_leaves.items()}, wanted)
        torch.testing.assert_close(by_inputs[index], wanted_input, rtol=1e-5, atol=1e-6)


def test_a_map_over_weights_is_right(device: torch.device) -> None:
    """An ensemble: another head for each entry."""
    arguments = random_arguments(fused_linear_cross_entropy, device)
    weights = torch.stack([arguments["weight"].detach() * scale for scale in (1.0, -0.5, 2.0)])
    x, target = arguments["input"].detach(), arguments["target"]
    losses = vmap(lambda weight: fused_linear_cross_entropy(x, weight, target, **METRICS))(weights)
    for index in range(BATCH):
        wanted = fused_linear_cross_entropy(x, weights[index], target, **METRICS)
        assert_all_close({k: v[index] for k, v in vars(losses).items()}, vars(wanted))


def test_a_map_in_a_map(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    arguments = random_arguments(fused_linear_cross_entropy, device)
    inputs = torch.randn(2, BATCH, 7, HIDDEN, generator=generator).to(device)
    loss = lambda x: fused_linear_cross_entropy(x, arguments["weight"].detach(), arguments["target"])  # noqa: E731
    losses = vmap(vmap(loss))(inputs)
    for i in range(2):
        for j in range(BATCH):
            torch.testing.assert_close(losses[i, j], loss(inputs[i, j]))


@every_loss
def test_a_second_derivative_raises(device: torch.device, loss_fn: Loss) -> None:
    leaves, rest = leaves_and_rest(random_arguments(loss_fn, device))

    def penalty(leaves: Arguments) -> Tensor:
        return sum(g.square().sum() for g in grad(lambda leaves: loss_fn(**leaves, **rest))(leaves).values())

    with pytest.raises(RuntimeError, match="a second derivative of twinhead's losses is not supported"):
        grad(penalty)(leaves)
