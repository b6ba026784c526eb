"""Groups: problems side by side over one weight give what each gives alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from core_kernels import Options, Problem, Step
from tests.core_kernels.problems import (
    EVERYTHING,
    HIDDEN,
    IGNORE,
    TOKENS,
    VOCAB,
    Tensors,
    assert_close,
    assert_filled,
    assert_same_bits,
    assert_uses_every_tensor,
    differentiable,
    differentiate,
    differentiate_sharded,
    every_engine,
    gathered,
    linear,
    logits,
    outputs_of,
    random_inputs,
    run,
    shard_inputs,
    sharded,
)

# Inputs, outputs and saved buffers that hold something of each token; the others hold something of each group.
OF_TOKENS = ("x", "logits", "labels", "predicted_tokens", "lse_base", "log_sum", "token_scale")

every_problem = pytest.mark.parametrize("problem", [linear, logits])
every_shape = pytest.mark.parametrize("groups", [(2,), (2, 3), (1, 2)], ids=str)


@pytest.fixture(
    params=[
        Options(),
        EVERYTHING,
        Options(reduction="sum"),
        replace(EVERYTHING, reduction="sum"),
        replace(EVERYTHING, use_token_scaling=True),
    ],
    ids=["plain mean", "mean", "plain sum", "sum", "scaled mean"],
)
def options(request: pytest.FixtureRequest) -> Options:
    return request.param


def side_by_side(problem: Problem, groups: tuple[int, ...]) -> Problem:
    for size in reversed(groups):
        problem = problem.times(size)
    return problem


def inputs_for(loss: Step, device: torch.device) -> Tensors:
    """Random inputs: the last group has no valid token, and some between have an upstream gradient of 0."""
    inputs = random_inputs(loss, device)
    inputs["labels"][[3, TOKENS]] = IGNORE
    inputs["labels"][-loss.problem.group_tokens :] = IGNORE
    inputs["grad_loss"][1:-1:3] = 0.0
    return inputs


def inputs_of_group(inputs: Tensors, index: int) -> Tensors:
    tokens = slice(index * TOKENS, (index + 1) * TOKENS)
    own = {name: tensor[tokens] if name in OF_TOKENS else tensor for name, tensor in inputs.items()}
    return own | {"grad_loss": inputs["grad_loss"][index : index + 1]}


def joined(results: list[Tensors], groups: tuple[int, ...]) -> Tensors:
    """Outputs or saved buffers of separate problems as those of groups."""
    whole = {}
    for name in results[0]:
        parts = [result[name] for result in results]
        if name in OF_TOKENS:
            whole[name] = torch.cat(parts)
        elif name == "class_weight_sum":
            whole[name] = parts[0]
        else:
            whole[name] = torch.stack(parts).view(*groups, *parts[0].shape)
    return whole


def added(gradients: list[Tensors]) -> Tensors:
    """Gradients of separate problems as those of groups: those by tokens joined, those by weights added."""
    return {
        name: torch.cat([own[name] for own in gradients])
        if name in ("grad_x", "grad_logits")
        else torch.stack([own[name] for own in gradients]).sum(0)
        for name in gradients[0]
    }


def separately(
    problem: Problem, options: Options, engine: str, inputs: Tensors, groups: tuple[int, ...]
) -> tuple[Tensors, Tensors, Tensors]:
    loss = Step("loss", problem, options, engine)
    alone = [differentiate(loss, inputs_of_group(inputs, index)) for index in range(math.prod(groups))]
    outputs, saved, gradients = zip(*alone, strict=True)
    return joined(outputs, groups), joined(saved, groups), added(gradients)


@every_engine
@every_problem
@every_shape
def test_groups_give_what_separate_problems_give(
    device: torch.device, engine: str, problem: Callable[..., Problem], groups: tuple[int, ...], options: Options
) -> None:
    loss = Step("loss", side_by_side(problem(), groups), options, engine)
    inputs = inputs_for(loss, device)
    outputs, saved, gradients = differentiate(loss, inputs)
    assert_filled(outputs | saved | gradients)
    wanted_outputs, wanted_saved, wanted_gradients = separately(problem(), options, engine, inputs, groups)
    assert_close(outputs, wanted_outputs)
    assert_close(saved, wanted_saved)
    assert_close(gradients, wanted_gradients)

    for name in outputs.keys() - {"predicted_tokens"}:
        assert outputs[name].shape == groups
        assert outputs[name].view(-1)[-1] == 0.0  # no valid token
    rows = gradients["grad_x" if problem is linear else "grad_logits"]
    learns = [bool(own.count_nonzero()) for own in rows.split(TOKENS)]
    assert learns == [*(upstream != 0.0 for upstream in inputs["grad_loss"].tolist()[:-1]), False]


@every_engine
@every_problem
def test_the_losses_of_each_token_know_no_groups(
    device: torch.device, engine: str, problem: Callable[..., Problem]
) -> None:
    options = replace(EVERYTHING, reduction="none")
    ungrouped = Step("loss", problem(6 * TOKENS), options, engine)
    grouped = Step("loss", side_by_side(problem(), (2, 3)), options, engine)
    inputs = random_inputs(ungrouped, device)
    for tensors, wanted in zip(differentiate(grouped, inputs), differentiate(ungrouped, inputs), strict=True):
        assert_same_bits(tensors, wanted)


@every_engine
@every_problem
@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_a_bad_label_spoils_its_own_group(
    device: torch.device, engine: str, problem: Callable[..., Problem], bad: int
) -> None:
    loss = Step("loss", side_by_side(problem(), (3,)), EVERYTHING, engine)
    inputs = random_inputs(loss, device)
    inputs["labels"][TOKENS + 2] = bad
    outputs, _, gradients = differentiate(loss, inputs)
    assert outputs["loss"].isnan().tolist() == [False, True, False]
    assert outputs["z_loss"].isnan().tolist() == [False, True, False]
    assert_filled(gradients)


@every_engine
def test_more_tokens_in_a_group_than_one_block_reduces(device: torch.device, engine: str) -> None:
    """The second group starts where no block does; plain torch finds what is to be reduced."""
    tokens = 1030
    loss = Step("loss", linear(tokens, hidden=3, vocab=5).times(2), Options(return_token_accuracy=True), engine)
    inputs = random_inputs(loss, device)
    inputs["labels"][: tokens // 2] = IGNORE
    outputs = outputs_of(loss, run(replace(loss, engine="torch"), inputs))

    step = sharded(loss, 1)
    (own,) = shard_inputs(inputs, 1)
    statistics = run(replace(step, engine="torch"), own)["shard_statistics"]
    combined = run(step.of_kind("combine"), inputs | {"shard_statistics": statistics[None]})
    assert_close(outputs_of(loss, combined), outputs)
    assert outputs["token_accuracy"][0] != outputs["token_accuracy"][1]


@every_engine
@every_problem
def test_nothing_depends_on_what_was_in_the_buffers(
    device: torch.device, engine: str, problem: Callable[..., Problem], options: Options
) -> None:
    loss = Step("loss", side_by_side(problem(), (2,)), options, engine)
    inputs = inputs_for(loss, device)
    for again, once in zip(differentiate(loss, inputs, poison=1e30), differentiate(loss, inputs), strict=True):
        assert_same_bits(again, once)


@every_engine
@every_problem
def test_launches_use_every_tensor_that_their_plans_name(
    device: torch.device, engine: str, problem: Callable[..., Problem], options: Options
) -> None:
    loss = Step("loss", side_by_side(problem(), (2,)), options, engine)
    inputs = inputs_for(loss, device)
    saved = assert_uses_every_tensor(loss, inputs)
    assert_uses_every_tensor(loss.gradient(differentiable(loss.problem)), inputs | saved)


@every_engine
@pytest.mark.parametrize("groups", [(2,), (2, 3)], ids=str)
def test_groups_on_shards(device: torch.device, engine: str, groups: tuple[int, ...], options: Options) -> None:
    loss = Step("loss", side_by_side(linear(vocab=2 * VOCAB), groups), options, engine)
    inputs = inputs_for(loss, device)
    outputs, saved, gradients = differentiate(loss, inputs)
    outputs_of_shards, saved_of_shards, gradients_of_shards = differentiate_sharded(loss, inputs, 2)
    assert_close(outputs_of_shards, outputs)
    assert_close(saved_of_shards, saved)
    assert_close(gathered(gradients_of_shards), gradients)


@every_engine
@every_problem
@pytest.mark.parametrize(("tokens", "groups"), [(0, (2, 3)), (TOKENS, (0,)), (TOKENS, (2, 0))], ids=str)
def test_no_tokens_give_zeros(
    device: torch.device, engine: str, problem: Callable[..., Problem], tokens: int, groups: tuple[int, ...]
) -> None:
    loss = Step("loss", side_by_side(problem(tokens), groups), EVERYTHING, engine)
    assert loss.problem.tokens == 0
    outputs, _, gradients = differentiate(loss, random_inputs(loss, device))
    for name in ("loss", "z_loss", "token_accuracy"):
        assert outputs[name].tolist() == torch.zeros(groups).tolist()
    for tensor in gradients.values():
        assert tensor.count_nonzero() == 0  # NaN would count
    if problem is linear:
        assert gradients["grad_weight"].shape == (VOCAB, HIDDEN)
