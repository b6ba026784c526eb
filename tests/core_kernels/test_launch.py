"""Launches: they read what the plan names, fill what it lists, repeat to the bit, and leave the host alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from core_kernels import Options, Plan, Problem, launch, plan_backward, plan_forward
from core_kernels.engine import choose_engine
from tests.core_kernels.problems import (
    EVERYTHING,
    HIDDEN,
    IGNORE,
    PLAIN,
    POISON,
    TOKENS,
    VOCAB,
    differentiable,
    linear,
    logits,
    poisoned,
    random_inputs,
    run,
)
from tests.parity import oracle
from tests.support import on_gpu, suite_device, waiting_raises

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

# Plain torch everywhere, and the kernels wherever they run.
ENGINES = sorted({"torch", choose_engine("auto", suite_device())})

every_engine = pytest.mark.parametrize("engine", ENGINES)
every_problem = pytest.mark.parametrize("problem", [linear, logits])
gpu_only = pytest.mark.skipif(not on_gpu(), reason="needs a GPU's allocator and streams")

Tensors = dict[str, Tensor]


@pytest.fixture(params=[*REDUCTIONS, "plain", "scaled"])
def options(request: pytest.FixtureRequest) -> Options:
    """Every reduction with every metric; no option at all; and token scaling."""
    if request.param == "plain":
        return PLAIN
    if request.param == "scaled":
        return Options(use_token_scaling=True, lse_square_scale=0.1, reduction="none", return_token_accuracy=True)
    return replace(EVERYTHING, reduction=request.param)


def step(
    problem: Problem, options: Options, device: torch.device, engine: str = "auto", inputs: Tensors | None = None
) -> tuple[Plan, Plan, Tensors]:
    """The forward and the backward plan of a problem, and inputs for both."""
    forward = plan_forward(problem, options, device, engine=engine)
    return forward, plan_backward(forward, differentiable(problem)), inputs or random_inputs(forward, device)


def run_step(forward: Plan, backward: Plan, inputs: Tensors, poison: float = float("nan")) -> tuple[Tensors, Tensors]:
    """Launch both; answers their outputs."""
    first = run(forward, inputs, poison)
    second = run(backward, inputs | {buffer.name: first[buffer.name] for buffer in forward.saved}, poison)
    outputs = {buffer.name: first[buffer.name] for buffer in forward.outputs}
    return outputs, {buffer.name: second[buffer.name] for buffer in backward.outputs}


def assert_same_bits(actual: Tensors, wanted: Tensors) -> None:
    assert actual.keys() == wanted.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), wanted[name].reshape(-1).view(torch.uint8)), name


def assert_filled(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        poison = tensor.isnan() if tensor.is_floating_point() else tensor == POISON
        assert not poison.any(), f"{name} was filled in part: {tensor}"


def assert_right(forward: Plan, inputs: Tensors, outputs: Tensors, answers: Tensors) -> None:
    arrays = {name: (t.double() if t.is_floating_point() else t).cpu().numpy() for name, t in inputs.items()}
    upstream = arrays.pop("grad_loss")
    compute = oracle.cross_entropy if forward.problem.hidden is None else oracle.fused_linear_ce
    wanted = compute(
        **arrays,
        upstream=upstream if forward.options.per_token else upstream[0],
        **{name: getattr(forward.options, name) for name in ORACLE_OPTIONS},
    )
    for name, tensor in outputs.items():
        np.testing.assert_allclose(tensor.cpu().numpy(), getattr(wanted, name), rtol=1e-5, atol=1e-6, err_msg=name)
    for name, tensor in answers.items():
        gradient = wanted.gradients[name.removeprefix("grad_")]
        np.testing.assert_allclose(tensor.cpu().numpy(), gradient, rtol=1e-5, atol=1e-6, err_msg=name)


# ---- what is filled, what is read


@every_engine
@every_problem
def test_every_output_is_filled_and_right(
    device: torch.device, engine: str, problem: Callable[..., Problem], options: Options
) -> None:
    forward, backward, inputs = step(problem(), options, device, engine)
    outputs, answers = run_step(forward, backward, inputs)
    assert_filled(outputs | answers)
    assert_right(forward, inputs, outputs, answers)


@every_engine
@every_problem
def test_every_saved_buffer_is_filled(
    device: torch.device, engine: str, problem: Callable[..., Problem], options: Options
) -> None:
    """Its rows of ignored tokens too: a frontend may look at them (a search for NaN), and hands them on as results."""
    forward, _, inputs = step(problem(), options, device, engine)
    buffers = run(forward, inputs)
    assert_filled({buffer.name: buffers[buffer.name] for buffer in forward.saved})


@every_engine
@every_problem
def test_nothing_depends_on_what_was_in_the_buffers(
    device: torch.device, engine: str, problem: Callable[..., Problem], options: Options
) -> None:
    """The same plan twice gives the same bits, whatever its outputs, saved buffers and workspace held before."""
    forward, backward, inputs = step(problem(), options, device, engine)
    outputs, answers = run_step(forward, backward, inputs)
    outputs_again, answers_again = run_step(forward, backward, inputs, poison=1e30)
    assert_same_bits(outputs_again, outputs)
    assert_same_bits(answers_again, answers)


class Recorder(Mapping[str, Tensor]):
    """Tensors, and the names under which they were asked for."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self.taken: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        self.taken.add(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@every_engine
@every_problem
def test_a_launch_uses_every_tensor_that_the_plan_names(
    device: torch.device, engine: str, problem: Callable[..., Problem], options: Options
) -> None:
    forward, backward, inputs = step(problem(), options, device, engine)
    tensors = inputs
    for plan in (forward, backward):
        recorder = Recorder({name: tensors[name] for name in plan.inputs} | poisoned(plan, device))
        launch(plan, recorder)
        assert recorder.taken == {*plan.inputs, *(buffer.name for buffer in plan.buffers)}
        tensors = tensors | recorder.tensors


@every_engine
@every_problem
def test_inputs_are_not_written_to(device: torch.device, engine: str, problem: Callable[..., Problem]) -> None:
    forward, backward, inputs = step(problem(), EVERYTHING, device, engine)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    buffers = run(forward, inputs)
    saved = {buffer.name: buffers[buffer.name] for buffer in forward.saved}
    saved_before = {name: tensor.clone() for name, tensor in saved.items()}
    run(backward, inputs | saved)
    assert_same_bits(inputs, before)
    assert_same_bits(saved, saved_before)


@every_engine
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias")], ids="+".join)
def test_a_subset_of_the_gradients_has_the_same_bits(
    device: torch.device, engine: str, wanted: tuple[str, ...]
) -> None:
    forward, backward, inputs = step(linear(), EVERYTHING, device, engine)
    _, answers = run_step(forward, backward, inputs)
    _, subset = run_step(forward, plan_backward(forward, wanted), inputs)
    assert_same_bits(subset, {f"grad_{name}": answers[f"grad_{name}"] for name in wanted})


@every_engine
@every_problem
def test_no_gradient_wanted_writes_nothing(device: torch.device, engine: str, problem: Callable[..., Problem]) -> None:
    forward, _, inputs = step(problem(), PLAIN, device, engine)
    saved = run(forward, inputs)
    plan = plan_backward(forward, ())
    assert plan.outputs == ()
    for tensor in run(plan, inputs | saved).values():
        assert tensor.isnan().all()


@every_engine
@every_problem
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_tokens_gives_zeros(
    device: torch.device, engine: str, problem: Callable[..., Problem], reduction: str
) -> None:
    forward, backward, inputs = step(
        problem(tokens=0), replace(EVERYTHING, reduction=reduction), device, engine, empty_inputs(problem, device)
    )
    outputs, answers = run_step(forward, backward, inputs)
    for tensor in (outputs | answers).values():
        assert tensor.count_nonzero() == 0  # NaN would count
    assert outputs["loss"].shape == ((0,) if reduction == "none" else ())
    assert outputs["predicted_tokens"].shape == (0,)
    wanted = {"grad_x": (0, HIDDEN), "grad_weight": (VOCAB, HIDDEN), "grad_bias": (VOCAB,), "grad_logits": (0, VOCAB)}
    assert {name: tuple(tensor.shape) for name, tensor in answers.items()} == {name: wanted[name] for name in answers}


def empty_inputs(problem: Callable[..., Problem], device: torch.device) -> Tensors:
    """Inputs of no tokens; weights as for some."""
    inputs = random_inputs(plan_forward(problem(), PLAIN, device), device)
    per_token = ("x", "logits", "labels")
    return {name: tensor[:0] if name in per_token else tensor for name, tensor in inputs.items()}


@every_engine
def test_the_weight_gradient_may_be_a_transposed_view(device: torch.device, engine: str) -> None:
    forward, backward, inputs = step(linear(), EVERYTHING, device, engine)
    _, answers = run_step(forward, backward, inputs)
    buffers = poisoned(backward, device)
    kernel = torch.full((HIDDEN, VOCAB), float("nan"), device=device)
    launch(backward, inputs | run(forward, inputs) | buffers | {"grad_weight": kernel.T})
    assert_same_bits({"grad_weight": kernel.T.contiguous()}, {"grad_weight": answers["grad_weight"]})


# ---- tokens that do not count


@every_engine
@every_problem
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bad_labels_are_nan_without_gradient(
    device: torch.device, engine: str, problem: Callable[..., Problem], reduction: str
) -> None:
    """A launch raises on no data: a label beyond either end of the vocab shows in the loss, and in no gradient."""
    options = replace(EVERYTHING, reduction=reduction)
    forward, backward, inputs = step(problem(), options, device, engine)
    inputs["labels"][2:5] = torch.tensor([VOCAB, -1, 2**40])
    outputs, answers = run_step(forward, backward, inputs)
    assert_filled(answers)
    assert_right(forward, inputs, outputs, answers)  # the oracle has NaN there, and there alone
    assert outputs["loss"].isnan().sum() == (3 if reduction == "none" else 1)
    assert outputs["predicted_tokens"][2:5].tolist() == [-1, -1, -1]
    rows = answers["grad_x" if problem is linear else "grad_logits"]
    assert rows[2:5].count_nonzero() == 0
    assert rows[1].count_nonzero() > 0


@every_engine
@every_problem
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf")])
def test_garbage_in_rows_that_do_not_count_reaches_nothing(
    device: torch.device, engine: str, problem: Callable[..., Problem], garbage: float
) -> None:
    """Padding may hold anything, and so may its upstream gradient."""
    options = replace(EVERYTHING, reduction="none")
    forward, backward, inputs = step(problem(), options, device, engine)
    inputs["labels"][3] = IGNORE
    ignored = [0, 3, TOKENS - 1]
    outputs, answers = run_step(forward, backward, inputs)
    assert_right(forward, inputs, outputs, answers)

    for name in ("x" if problem is linear else "logits", "grad_loss"):
        inputs[name][ignored] = garbage
    outputs_with, answers_with = run_step(forward, backward, inputs)
    assert_same_bits(outputs_with, outputs)
    assert_same_bits(answers_with, answers)


@every_engine
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_no_weight_reaches_the_gradient_of_a_token_that_does_not_count(
    device: torch.device, engine: str, garbage: float
) -> None:
    """Zero times what the weights hold would not be zero."""
    forward, backward, inputs = step(linear(), replace(EVERYTHING, reduction="none"), device, engine)
    inputs["labels"][3] = VOCAB  # bad, where the first and the last are ignored
    inputs["weight"][5] = garbage
    outputs, answers = run_step(forward, backward, inputs)
    assert answers["grad_x"][[0, 3, TOKENS - 1]].count_nonzero() == 0
    assert outputs["loss"][[0, TOKENS - 1]].count_nonzero() == 0
    assert answers["grad_x"][1].isnan().all()


# ---- what a launch does to the host, and to a stream


def warm_step(problem: Problem, device: torch.device) -> tuple[Plan, Plan, Tensors]:
    """Both plans of a step, and one set of tensors for both, after a first launch that compiles."""
    forward, backward, inputs = step(problem, EVERYTHING, device)
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
    forward, backward, tensors = warm_step(problem(dtype=dtype), device)
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
    forward, backward, tensors = warm_step(problem(), device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(forward, tensors)
        launch(backward, tensors)

    others = random_inputs(forward, device, seed=1)
    others["labels"][2:5] = IGNORE
    for name, tensor in others.items():
        tensors[name].copy_(tensor)
    graph.replay()
    torch.cuda.synchronize()
    outputs, answers = run_step(forward, backward, others)
    assert_same_bits(results(forward, backward, tensors), outputs | answers)


@gpu_only
@every_problem
def test_a_launch_runs_on_the_current_stream(device: torch.device, problem: Callable[..., Problem]) -> None:
    """Inputs that the same stream is still preparing are waited for by the kernels, not by the host."""
    forward, backward, tensors = warm_step(problem(), device)
    others = random_inputs(forward, device, seed=1)
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
    outputs, answers = run_step(forward, backward, others)
    assert_same_bits(results(forward, backward, tensors), outputs | answers)
