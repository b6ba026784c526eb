"""A forward and backward pass in a CUDA graph, recorded by hand and by the compiler, replayed over new data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core_kernels.problems import HIDDEN, VOCAB
from tests.support import on_gpu
from tests.torch_api.calls import (
    METRICS,
    OPTIONS,
    Arguments,
    Loss,
    assert_all_same_bits,
    every_loss,
    leaves_of,
    random_arguments,
    record_launches,
)
from torch_api import fused_linear_cross_entropy

pytestmark = pytest.mark.skipif(not on_gpu(), reason="graphs are a GPU's")


def step(loss_fn: Loss, arguments: Arguments) -> Arguments:
    output = loss_fn(**arguments, **OPTIONS, **METRICS)
    leaves = leaves_of(arguments)
    answers = torch.autograd.grad(0.7 * output.loss, list(leaves.values()))
    return vars(output) | {f"grad_{name}": gradient for name, gradient in zip(leaves, answers, strict=True)}


def fill(arguments: Arguments, others: Arguments) -> None:
    with torch.no_grad():
        for name, tensor in arguments.items():
            tensor.copy_(others[name])


@every_loss
def test_a_recorded_step_is_replayed_on_new_data(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, loss_fn: Loss
) -> None:
    arguments = random_arguments(loss_fn, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles what the graph will hold
            step(loss_fn, arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(loss_fn, arguments)

    launches = record_launches(monkeypatch)
    for seed in (1, 2, 3):
        others = random_arguments(loss_fn, device, seed=seed)
        fill(arguments, others)
        graph.replay()
        assert not launches
        replayed = {name: tensor.detach().clone() for name, tensor in results.items()}
        wanted = step(loss_fn, others)
        assert_all_same_bits(replayed, {name: tensor.detach() for name, tensor in wanted.items()})
        launches.clear()


@pytest.mark.parametrize("num_items", (5, "on the CPU", "on the GPU"))
def test_items_of_a_batch_are_recorded(device: torch.device, num_items: Any) -> None:
    """A tensor's on a GPU are read at replay; a number is part of the graph."""
    arguments = random_arguments(fused_linear_cross_entropy, device)
    items = num_items if num_items == 5 else torch.tensor(5, device=device if "GPU" in num_items else "cpu")
    call = lambda: fused_linear_cross_entropy(**arguments, num_items_in_batch=items)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = call()
    graph.replay()
    torch.testing.assert_close(loss, fused_linear_cross_entropy(**arguments, reduction="sum") / 5)
    if num_items == "on the GPU":
        items.fill_(10)
        graph.replay()
        torch.testing.assert_close(loss, fused_linear_cross_entropy(**arguments, reduction="sum") / 10)


@every_loss
def test_reduce_overhead_replays_on_new_data(device: torch.device, loss_fn: Loss) -> None:
    torch._dynamo.reset()

    def loss_and_metrics(arguments: Arguments) -> Any:
        return loss_fn(**arguments, **OPTIONS, **METRICS)

    run = torch.compile(loss_and_metrics, mode="reduce-overhead", fullgraph=True)
    for seed in (0, 1, 2, 3, 4):
        arguments = random_arguments(loss_fn, device, seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        output = run(arguments)
        leaves = leaves_of(arguments)
        answers = torch.autograd.grad(0.7 * output.loss, list(leaves.values()))
        got = {name: tensor.detach().clone() for name, tensor in vars(output).items()}
        got |= {f"grad_{name}": gradient.clone() for name, gradient in zip(leaves, answers, strict=True)}
        assert_all_same_bits(got, {name: tensor.detach() for name, tensor in step(loss_fn, arguments).items()})


def test_a_graph_over_bfloat16_of_many_tiles(device: torch.device) -> None:
    """Shapes that the real kernels tile, in every gradient."""
    torch.manual_seed(0)
    x = torch.randn(300, 4 * HIDDEN, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(7 * VOCAB, 4 * HIDDEN, device=device, dtype=torch.bfloat16).mul_(0.1).requires_grad_()
    arguments: dict[str, Tensor] = {"input": x, "weight": weight}
    arguments["target"] = torch.randint(0, 7 * VOCAB, (300,), device=device)
    step(fused_linear_cross_entropy, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(fused_linear_cross_entropy, arguments)
    with torch.no_grad():
        x.mul_(-0.5)
        arguments["target"].copy_(arguments["target"].roll(1))
    graph.replay()
    replayed = {name: tensor.detach().clone() for name, tensor in results.items()}
    wanted = step(fused_linear_cross_entropy, arguments)
    assert_all_same_bits(replayed, {name: tensor.detach() for name, tensor in wanted.items()})
