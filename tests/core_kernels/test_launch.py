"""Launches: they read what the plan names, fill what it lists, repeat to the bit, and leave the host alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from core_kernels import Options, Plan, Problem, Step, launch, plan
from core_kernels.plan import LINE
from tests.core_kernels.problems import (
    EVERYTHING,
    HIDDEN,
    IGNORE,
    PLAIN,
    POISON,
    TOKENS,
    VOCAB,
    Tensors,
    assert_filled,
    assert_same_bits,
    assert_uses_every_tensor,
    differentiable,
    differentiate,
    every_engine,
    linear,
    logits,
    outputs_of,
    poisoned,
    random_inputs,
    run,
    saved_of,
)
from tests.parity import oracle
from tests.support import on_gpu, waiting_raises

REDUCTIONS = ("none", "mean", "sum")
ORACLE_OPTIONS = (
    "ignore_index",
    "label_smoothing",
    "lse_square_scale",
    "softcap",
    "logit_scale",
    "reduction",
    "use_token_scaling",
)

every_problem = pytest.mark.parametrize("problem", [linear, logits])
gpu_only = pytest.mark.skipif(not on_gpu(), reason="needs a GPU's allocator and streams")


@pytest.fixture(params=[*REDUCTIONS, "plain", "scaled"])
def options(request: pytest.FixtureRequest) -> Options:
    """Every reduction with every metric; no option at all; and token scaling."""
    if request.param == "plain":
        return PLAIN
    if request.param == "scaled":
        return Options(use_token_scaling=True, lse_square_scale=0.1, reduction="none", return_token_accuracy=True)
    return replace(EVERYTHING, reduction=request.param)


def assert_right(loss: Step, inputs: Tensors, outputs: Tensors, gradients: Tensors) -> None:
    arrays = {name: (t.double() if t.is_floating_point() else t).cpu().numpy() for name, t in inputs.items()}
    upstream = arrays.pop("grad_loss")
    compute = oracle.cross_entropy if loss.problem.hidden is None else oracle.fused_linear_ce
    wanted = compute(
        **arrays,
        upstream=upstream if loss.options.per_token else upstream[0],
        **{name: getattr(loss.options, name) for name in ORACLE_OPTIONS},
    )
    for name, tensor in outputs.items():
        np.testing.assert_allclose(tensor.cpu().numpy(), getattr(wanted, name), rtol=1e-5, atol=1e-6, err_msg=name)
    for name, tensor in gradients.items():
        gradient = wanted.gradients[name.removeprefix("grad_")]
        np.testing.assert_allclose(tensor.cpu().numpy(), gradient, rtol=1e-5, atol=1e-6, err_msg=name)


# ---- what is filled, what is read


@every_engine
@every_problem
def test_every_output_is_filled_and_right(
    device: torch.device, engine: str, problem: Callable[..., Problem], options: Options
) -> None:
    """What is saved too, its rows of ignored tokens included: a frontend may look at them (a search for NaN)."""
    loss = Step("loss", problem(), options, engine)
    inputs = random_inputs(loss, device)
    outputs, saved, gradients = differentiate(loss, inputs)
    assert_filled(outputs | saved | gradients)
    assert_right(loss, inputs, outputs, gradients)


@every_engine
@every_problem
def test_nothing_depends_on_what_was_in_the_buffers(
    device: torch.device, engine: str, problem: Callable[..., Problem], options: Options
) -> None:
    """The same plan twice gives the same bits, whatever its outputs, saved buffers and workspace held before."""
    loss = Step("loss", problem(), options, engine)
    inputs = random_inputs(loss, device)
    once, again = differentiate(loss, inputs), differentiate(loss, inputs, poison=1e30)
    for tensors, tensors_again in zip(once, again, strict=True):
        assert_same_bits(tensors_again, tensors)


@every_engine
@every_problem
def test_a_launch_uses_every_tensor_that_the_plan_names(
    device: torch.device, engine: str, problem: Callable[..., Problem], options: Options
) -> None:
    loss = Step("loss", problem(), options, engine)
    inputs = random_inputs(loss, device)
    buffers = assert_uses_every_tensor(loss, inputs)
    assert_uses_every_tensor(loss.gradient(differentiable(problem())), inputs | buffers)


@every_engine
@every_problem
def test_the_workspace_may_come_in_one(device: torch.device, engine: str, problem: Callable[..., Problem]) -> None:
    """Its buffers start at lines of memory, none in another, and the results have the same bits."""
    loss = Step("loss", problem(), EVERYTHING, engine)
    inputs = random_inputs(loss, device)
    apart = run(loss, inputs)
    for step in (loss, loss.gradient(differentiable(problem()))):
        planned, given = plan(step, device), inputs | apart
        tensors = {name: given[name] for name in step.inputs}
        tensors |= {b.name: torch.empty(b.shape, dtype=b.dtype, device=device) for b in planned.allocations}
        placed = planned.with_workspace(tensors)
        base = tensors["workspace"].data_ptr() if planned.workspace else 0
        starts = [placed[buffer.name].data_ptr() - base for buffer in planned.workspace]
        ends = [start + buffer.nbytes for start, buffer in zip(starts, planned.workspace, strict=True)]
        assert not any(start % LINE for start in starts)
        assert all(end <= start for end, start in zip(ends, [*starts[1:], planned.workspace_bytes], strict=False))
        launch(planned, tensors)
        assert_same_bits(outputs_of(step, tensors), outputs_of(step, run(step, given)))


@every_engine
@every_problem
def test_inputs_are_not_written_to(device: torch.device, engine: str, problem: Callable[..., Problem]) -> None:
    loss = Step("loss", problem(), EVERYTHING, engine)
    inputs = random_inputs(loss, device)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    saved = saved_of(loss, run(loss, inputs))
    saved_before = {name: tensor.clone() for name, tensor in saved.items()}
    run(loss.gradient(differentiable(problem())), inputs | saved)
    assert_same_bits(inputs, before)
    assert_same_bits(saved, saved_before)


@every_engine
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias")], ids="+".join)
def test_a_subset_of_the_gradients_has_the_same_bits(
    device: torch.device, engine: str, wanted: tuple[str, ...]
) -> None:
    loss = Step("loss", linear(), EVERYTHING, engine)
    inputs = random_inputs(loss, device)
    _, saved, gradients = differentiate(loss, inputs)
    step = loss.gradient(wanted)
    subset = outputs_of(step, run(step, inputs | saved))
    assert_same_bits(subset, {f"grad_{name}": gradients[f"grad_{name}"] for name in wanted})


@every_engine
@every_problem
def test_no_gradient_wanted_writes_nothing(device: torch.device, engine: str, problem: Callable[..., Problem]) -> None:
    loss = Step("loss", problem(), PLAIN, engine)
    inputs = random_inputs(loss, device)
    step = loss.gradient(())
    assert step.outputs == ()
    for tensor in run(step, inputs | run(loss, inputs)).values():
        assert (tensor.isnan() if tensor.is_floating_point() else tensor == POISON).all()


@every_engine
@every_problem
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_tokens_gives_zeros(
    device: torch.device, engine: str, problem: Callable[..., Problem], reduction: str
) -> None:
    loss = Step("loss", problem(tokens=0), replace(EVERYTHING, reduction=reduction), engine)
    outputs, _, gradients = differentiate(loss, random_inputs(loss, device))
    for tensor in (outputs | gradients).values():
        assert tensor.count_nonzero() == 0  # NaN would count
    assert outputs["loss"].shape == ((0,) if reduction == "none" else ())
    assert outputs["predicted_tokens"].shape == (0,)
    wanted = {"grad_x": (0, HIDDEN), "grad_weight": (VOCAB, HIDDEN), "grad_bias": (VOCAB,), "grad_logits": (0, VOCAB)}
    assert {name: tensor.shape for name, tensor in gradients.items()} == {name: wanted[name] for name in gradients}


@every_engine
def test_the_weight_gradient_may_be_a_transposed_view(device: torch.device, engine: str) -> None:
    loss = Step("loss", linear(), EVERYTHING, engine)
    inputs = random_inputs(loss, device)
    _, saved, gradients = differentiate(loss, inputs)
    planned = plan(loss.gradient(differentiable(linear())), device)
    kernel = torch.full((HIDDEN, VOCAB), float("nan"), device=device)
    launch(planned, inputs | saved | poisoned(planned, device) | {"grad_weight": kernel.T})
    assert_same_bits({"grad_weight": kernel.T.contiguous()}, {"grad_weight": gradients["grad_weight"]})


@every_engine
def test_the_weight_gradient_may_lie_anywhere(device: torch.device, engine: str) -> None:
    """Where no descriptor can have it, it lends no slab its place."""
    problem = linear(tokens=40, hidden=64, vocab=1600, dtype=torch.bfloat16, bias=False, class_weight=False)
    loss = Step("loss", problem, PLAIN, engine, memory=70_000)
    inputs = random_inputs(loss, device)
    _, saved, gradients = differentiate(loss, inputs)
    planned = plan(loss.gradient(differentiable(problem)), device)
    assert bool(planned.borrowed) == (planned.engine == "triton")
    shifted = torch.full((1600 * 64 + 1,), float("nan"), dtype=torch.bfloat16, device=device)[1:].view(1600, 64)
    launch(planned, inputs | saved | poisoned(planned, device) | {"grad_weight": shifted})
    assert_same_bits({"grad_weight": shifted}, {"grad_weight": gradients["grad_weight"]})


# ---- tokens that do not count


@every_engine
@every_problem
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bad_labels_are_nan_without_gradient(
    device: torch.device, engine: str, problem: Callable[..., Problem], reduction: str
) -> None:
    """A launch raises on no data: a label beyond either end of the vocab shows in the loss, and in no gradient."""
    loss = Step("loss", problem(), replace(EVERYTHING, reduction=reduction), engine)
    inputs = random_inputs(loss, device)
    inputs["labels"][2:5] = torch.tensor([VOCAB, -1, 2**40])
    outputs, _, gradients = differentiate(loss, inputs)
    assert_filled(gradients)
    assert_right(loss, inputs, outputs, gradients)  # the oracle has NaN there, and there alone
    assert outputs["loss"].isnan().sum() == (3 if reduction == "none" else 1)
    assert outputs["predicted_tokens"][2:5].tolist() == [-1, -1, -1]
    rows = gradients["grad_x" if problem is linear else "grad_logits"]
    assert rows[2:5].count_nonzero() == 0
    assert rows[1].count_nonzero() > 0


@every_engine
@every_problem
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf")])
def test_garbage_in_rows_that_do_not_count_reaches_nothing(
    device: torch.device, engine: str, problem: Callable[..., Problem], garbage: float
) -> None:
    """Padding may hold anything, and so may its upstream gradient."""
    loss = Step("loss", problem(), replace(EVERYTHING, reduction="none"), engine)
    inputs = random_inputs(loss, device)
    inputs["labels"][3] = IGNORE
    ignored = [0, 3, TOKENS - 1]
    outputs, _, gradients = differentiate(loss, inputs)
    assert_right(loss, inputs, outputs, gradients)

    for name in ("x" if problem is linear else "logits", "grad_loss"):
        inputs[name][ignored] = garbage
    outputs_with, _, gradients_with = differentiate(loss, inputs)
    assert_same_bits(outputs_with, outputs)
    assert_same_bits(gradients_with, gradients)


@every_engine
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_no_weight_reaches_the_gradient_of_a_token_that_does_not_count(
    device: torch.device, engine: str, garbage: float
) -> None:
    """Zero times what the weights hold would not be zero."""
    loss = Step("loss", linear(), replace(EVERYTHING, reduction="none"), engine)
    inputs = random_inputs(loss, device)
    inputs["labels"][3] = VOCAB  # bad, where the first and the last are ignored
    inputs["weight"][5] = garbage
    outputs, _, gradients = differentiate(loss, inputs)
    assert gradients["grad_x"][[0, 3, TOKENS - 1]].count_nonzero() == 0
    assert outputs["loss"][[0, TOKENS - 1]].count_nonzero() == 0
    assert gradients["grad_x"][1].isnan().all()


# ---- what a launch does to the host, and to a stream


def warm_plans(problem: Problem, device: torch.device) -> tuple[Plan, Plan, Tensors]:
    """The plans of a loss and its gradient, and one set of tensors for both, after a first launch that compiles."""
    loss = Step("loss", problem, EVERYTHING)
    forward, backward = plan(loss, device), plan(loss.gradient(differentiable(problem)), device)
    inputs = random_inputs(loss, device)
    tensors = inputs | poisoned(forward, device) | poisoned(backward, device)
    launch(forward, tensors)
    launch(backward, tensors)
    torch.cuda.synchronize()
    return forward, backward, tensors


def results(forward: Plan, backward: Plan, tensors: Tensors) -> Tensors:
    return {buffer.name: tensors[buffer.name].clone() for buffer in forward.outputs + backward.outputs}


@gpu_only
@every_problem
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_warm_launch_neither_waits_nor_allocates(
    device: torch.device, problem: Callable[..., Problem], dtype: torch.dtype
) -> None:
    forward, backward, tensors = warm_plans(problem(dtype=dtype), device)
    wanted = results(forward, backward, tensors)
    for buffer in forward.outputs + backward.outputs:
        tensors[buffer.name].fill_(POISON)
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    with waiting_raises():
        launch(forward, tensors)
        launch(backward, tensors)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    assert_same_bits(results(forward, backward, tensors), wanted)


@gpu_only
@every_problem
def test_launches_can_be_captured_in_a_graph(device: torch.device, problem: Callable[..., Problem]) -> None:
    """Replayed over other inputs, with another number of valid tokens: the host never knew it."""
    forward, backward, tensors = warm_plans(problem(), device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(forward, tensors)
        launch(backward, tensors)

    others = random_inputs(forward.step, device, seed=1)
    others["labels"][2:5] = IGNORE
    for name, tensor in others.items():
        tensors[name].copy_(tensor)
    graph.replay()
    torch.cuda.synchronize()
    outputs, _, gradients = differentiate(forward.step, others)
    assert_same_bits(results(forward, backward, tensors), outputs | gradients)


@gpu_only
@every_problem
def test_a_launch_runs_on_the_current_stream(device: torch.device, problem: Callable[..., Problem]) -> None:
    """Inputs that the same stream is still preparing are waited for by the kernels, not by the host."""
    forward, backward, tensors = warm_plans(problem(), device)
    others = random_inputs(forward.step, device, seed=1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for name, tensor in others.items():
            tensors[name].copy_(tensor)
        launch(forward, tensors)
        launch(backward, tensors)
    assert not stream.query()
    stream.synchronize()
    outputs, _, gradients = differentiate(forward.step, others)
    assert_same_bits(results(forward, backward, tensors), outputs | gradients)
