"""The vocab in shards: what the steps of all shards give together is what one step gives on the whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from core_kernels import Argument, Options, Problem, Step, linear_problem, plan
from tests.core_kernels.problems import (
    EVERYTHING,
    HIDDEN,
    IGNORE,
    TILE,
    Tensors,
    assert_close,
    assert_filled,
    assert_same_bits,
    assert_uses_every_tensor,
    combine,
    differentiable,
    differentiate,
    differentiate_sharded,
    every_engine,
    gathered,
    linear,
    outputs_of,
    random_inputs,
    run,
    shard_inputs,
    sharded,
)

TOKENS = 34  # more than one block of the kernels that finish tokens
COLUMNS = TILE.n + 37  # of a shard
METRICS = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}
INFINITY, NAN = float("inf"), float("nan")

every_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
every_count = pytest.mark.parametrize("shards", [1, 2, 4])


@pytest.fixture(
    params=[
        Options(),
        EVERYTHING,
        replace(EVERYTHING, reduction="none"),
        Options(reduction="sum", label_smoothing=0.2),
        replace(EVERYTHING, use_token_scaling=True, softcap=None),
        Options(reduction="none", use_token_scaling=True, lse_square_scale=0.1, return_token_accuracy=True),
    ],
    ids=["plain", "everything", "none", "smooth sum", "scaled everything", "scaled none"],
)
def options(request: pytest.FixtureRequest) -> Options:
    return request.param


def problem(shards: int, class_weight: bool = True, dtype: torch.dtype = torch.float32) -> Problem:
    """The whole of it."""
    return linear(TOKENS, vocab=shards * COLUMNS, class_weight=class_weight, dtype=dtype)


def inputs_for(loss: Step, device: torch.device) -> Tensors:
    """Random inputs, with labels in the first and in the last class of every shard."""
    inputs = random_inputs(loss, device)
    for number, first in enumerate(range(0, loss.problem.vocab, COLUMNS)):
        inputs["labels"][1 + 2 * number] = first
        inputs["labels"][2 + 2 * number] = first + COLUMNS - 1
    return inputs


def assert_as_whole(loss: Step, inputs: Tensors, shards: int) -> tuple[Tensors, list[Tensors]]:
    """With as much memory as it likes. Answers the outputs, and the gradients of each shard."""
    outputs, saved, gradients = differentiate(replace(loss, memory="auto"), inputs)
    outputs_of_shards, saved_of_shards, gradients_of_shards = differentiate_sharded(loss, inputs, shards)
    assert_close(outputs_of_shards, outputs)
    assert_close(saved_of_shards, saved)
    assert_close(gathered(gradients_of_shards), gradients)
    return outputs_of_shards, gradients_of_shards


# ---- as on the whole vocab


@every_engine
@every_count
def test_shards_give_what_the_whole_gives(device: torch.device, engine: str, shards: int, options: Options) -> None:
    loss = Step("loss", problem(shards), options, engine)
    outputs, gradients = assert_as_whole(loss, inputs_for(loss, device), shards)
    assert_filled(outputs | gathered(gradients))


@every_engine
def test_shards_without_bias_and_class_weight(device: torch.device, engine: str) -> None:
    whole = linear(TOKENS, vocab=2 * COLUMNS, bias=False, class_weight=False)
    loss = Step("loss", whole, EVERYTHING, engine)
    assert_as_whole(loss, inputs_for(loss, device), 2)


@every_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_in_half_precision(device: torch.device, engine: str, dtype: torch.dtype) -> None:
    """Statistics stay float32; each shard's gradient of ``x`` is rounded on its own."""
    loss = Step("loss", problem(2, dtype=dtype), replace(EVERYTHING, reduction="sum"), engine)
    inputs = inputs_for(loss, device)
    outputs, saved, gradients = differentiate(replace(loss, memory="auto"), inputs)
    outputs_of_shards, saved_of_shards, gradients_of_shards = differentiate_sharded(loss, inputs, 2)
    assert_close(outputs_of_shards, outputs)
    assert_close(saved_of_shards, saved)
    epsilon = torch.finfo(dtype).eps
    assert_close(gathered(gradients_of_shards), gradients, rtol=2 * epsilon, atol=2 * epsilon)


@every_engine
def test_int32_labels_give_the_same_bits(device: torch.device, engine: str) -> None:
    loss = Step("loss", problem(2), EVERYTHING, engine)
    inputs = inputs_for(loss, device)
    outputs, _, gradients = differentiate_sharded(loss, inputs, 2)
    outputs_of_int32, _, gradients_of_int32 = differentiate_sharded(
        loss, inputs | {"labels": inputs["labels"].to(torch.int32)}, 2
    )
    assert_same_bits(outputs_of_int32, outputs)
    assert_same_bits(gathered(gradients_of_int32), gathered(gradients))


@every_engine
def test_a_shard_in_slabs(device: torch.device, engine: str) -> None:
    """Of the least memory: a slab is one tile, and a shard several slabs."""
    loss = Step("loss", problem(2), EVERYTHING, engine)
    with pytest.raises(ValueError, match="bytes are too few") as raised:
        plan(sharded(replace(loss, memory=0), 2), device)
    lean = replace(loss, memory=int(str(raised.value).split()[-1]))
    gradient = sharded(lean, 2).gradient(differentiable(loss.problem))
    assert plan(gradient, device).slab == TILE.n < COLUMNS
    assert_as_whole(lean, inputs_for(lean, device), 2)


@every_engine
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",)], ids="+".join)
def test_one_gradient_of_a_shard_has_the_same_bits(device: torch.device, engine: str, wanted: tuple[str, ...]) -> None:
    loss = Step("loss", problem(2), EVERYTHING, engine)
    inputs = inputs_for(loss, device)
    _, saved, (_, gradients) = differentiate_sharded(loss, inputs, 2)
    step = sharded(loss, 2).gradient(wanted)
    alone = outputs_of(step, run(step, shard_inputs(inputs, 2)[1] | saved))
    assert_same_bits(alone, {f"grad_{name}": gradients[f"grad_{name}"] for name in wanted})


# ---- what is filled, what is read


@every_engine
def test_nothing_depends_on_what_was_in_the_buffers(device: torch.device, engine: str, options: Options) -> None:
    loss = Step("loss", problem(2), options, engine)
    inputs = inputs_for(loss, device)
    *once, gradients = differentiate_sharded(loss, inputs, 2)
    *again, gradients_again = differentiate_sharded(loss, inputs, 2, poison=1e30)
    for tensors, tensors_again in zip([*once, *gradients], [*again, *gradients_again], strict=True):
        assert_filled(tensors)
        assert_same_bits(tensors_again, tensors)


@every_engine
def test_statistics_of_every_token_are_filled(device: torch.device, engine: str, options: Options) -> None:
    """Those of ignored tokens too: they travel between devices with the rest."""
    loss = Step("loss", problem(2), options, engine)
    for own in shard_inputs(inputs_for(loss, device), 2):
        assert_filled({"shard_statistics": run(sharded(loss, 2), own)["shard_statistics"]})


@every_engine
def test_launches_use_every_tensor_that_their_plans_name(device: torch.device, engine: str, options: Options) -> None:
    loss = Step("loss", problem(2), options, engine)
    shard = sharded(loss, 2)
    inputs = inputs_for(loss, device)
    every_shard = shard_inputs(inputs, 2)
    statistics = torch.stack([assert_uses_every_tensor(shard, own)["shard_statistics"] for own in every_shard])
    combined = assert_uses_every_tensor(shard.of_kind("combine"), inputs | {"shard_statistics": statistics})
    assert_uses_every_tensor(shard.gradient(differentiable(loss.problem)), every_shard[1] | combined)


# ---- argmax over shards


@every_engine
@pytest.mark.parametrize("pattern", ["aa", "za", "zaa", "azaa", "zzaa", "aaaa"])
def test_the_lowest_class_wins_a_tie(device: torch.device, engine: str, pattern: str) -> None:
    """Products of small integers are exact, so equal shards tie; the logits of a shard of zeros are below."""
    shards = len(pattern)
    loss = Step("loss", problem(shards, class_weight=False), Options(**METRICS), engine)
    generator = torch.Generator().manual_seed(3)
    block = torch.randint(-2, 3, (COLUMNS, HIDDEN), generator=generator).float()
    inputs = inputs_for(loss, device)
    inputs["x"] = torch.randint(-2, 3, (TOKENS, HIDDEN), generator=generator).float().to(device)
    inputs["weight"] = torch.cat([block if letter == "a" else 0.0 * block for letter in pattern]).to(device)
    inputs["bias"] = torch.zeros(shards * COLUMNS, device=device)

    logits = (inputs["x"] @ inputs["weight"].T).cpu().numpy()
    lowest = logits.argmax(1)  # NumPy's is the lowest index
    assert ((logits == logits.max(1, keepdims=True)).sum(1) >= pattern.count("a")).all()
    assert (lowest // COLUMNS == pattern.index("a")).all()
    valid = (inputs["labels"] != IGNORE).cpu().numpy()
    predicted = combine(loss, inputs, shards)["predicted_tokens"]
    np.testing.assert_array_equal(predicted.cpu().numpy(), np.where(valid, lowest, -1))
    inputs["labels"][valid] = torch.from_numpy(lowest[valid]).to(device)
    assert combine(loss, inputs, shards)["token_accuracy"] == 1.0


@every_engine
@pytest.mark.parametrize(
    ("classes", "values", "predicted"),
    [
        ([5], [NAN], 5),
        ([COLUMNS - 1, COLUMNS], [NAN, NAN], COLUMNS - 1),
        ([3 * COLUMNS, 4 * COLUMNS - 1], [NAN, NAN], 3 * COLUMNS),
        ([7, 2 * COLUMNS + 3], [INFINITY, NAN], 2 * COLUMNS + 3),
        ([7, 2 * COLUMNS + 3], [NAN, INFINITY], 7),
        ([COLUMNS + 4, 3 * COLUMNS + 1], [INFINITY, INFINITY], COLUMNS + 4),
    ],
)
def test_the_first_nan_wins_and_after_it_infinity(
    device: torch.device, engine: str, classes: list[int], values: list[float], predicted: int
) -> None:
    loss = Step("loss", problem(4), Options(reduction="none", **METRICS), engine)
    inputs = inputs_for(loss, device)
    inputs["bias"][classes] = torch.tensor(values, device=device)
    inputs["x"][3] = NAN
    outputs = outputs_of(loss, combine(loss, inputs, 4))
    assert_close(outputs, outputs_of(loss, run(loss, inputs)))
    assert outputs["predicted_tokens"].tolist() == [-1, predicted, predicted, 0, *[predicted] * (TOKENS - 5), -1]
    assert outputs["loss"].isnan().tolist() == [False, *[True] * (TOKENS - 2), False]


@every_engine
@pytest.mark.parametrize("masked", [[0], [2], [3], [0, 1]], ids=str)
def test_a_shard_of_masked_classes_is_legal(device: torch.device, engine: str, masked: list[int]) -> None:
    """All its logits are -inf: a probability of 0, without a gradient."""
    loss = Step("loss", problem(4), Options(lse_square_scale=0.1, **METRICS), engine)
    inputs = inputs_for(loss, device)
    inputs["bias"].view(4, COLUMNS)[masked] = -INFINITY
    at_mask = torch.isin(inputs["labels"] // COLUMNS, torch.tensor(masked, device=device))
    inputs["labels"][at_mask & (inputs["labels"] != IGNORE)] = 2 * COLUMNS if 2 not in masked else COLUMNS
    outputs, gradients = assert_as_whole(loss, inputs, 4)
    assert outputs["loss"].isfinite()
    for name in ("grad_weight", "grad_bias"):
        assert gathered(gradients)[name].isfinite().all()
        assert [bool(own[name].count_nonzero()) for own in gradients] == [shard not in masked for shard in range(4)]


@every_engine
def test_no_class_but_masked_ones(device: torch.device, engine: str) -> None:
    """No softmax: NaN, as on the whole, and the lowest class."""
    loss = Step("loss", problem(2), Options(**METRICS), engine)
    inputs = inputs_for(loss, device)
    inputs["bias"][:] = -INFINITY
    outputs = outputs_of(loss, combine(loss, inputs, 2))
    assert_close(outputs, outputs_of(loss, run(loss, inputs)))
    assert outputs["predicted_tokens"].tolist() == [-1, *[0] * (TOKENS - 2), -1]


# ---- tokens that do not count


@every_engine
@every_reduction
def test_bad_labels_are_nan_without_gradient(device: torch.device, engine: str, reduction: str) -> None:
    loss = Step("loss", problem(2), replace(EVERYTHING, reduction=reduction), engine)
    inputs = inputs_for(loss, device)
    bad = [6, 7, 8]
    inputs["labels"][bad] = torch.tensor([2 * COLUMNS, -1, 2**40], device=device)
    outputs, gradients = assert_as_whole(loss, inputs, 2)
    assert_filled(gathered(gradients))
    assert outputs["loss"].isnan().sum() == (3 if reduction == "none" else 1)
    assert outputs["predicted_tokens"][bad].tolist() == [-1, -1, -1]
    for own in gradients:
        assert own["grad_x"][[0, *bad, TOKENS - 1]].count_nonzero() == 0
        assert own["grad_x"][1].count_nonzero() > 0


@every_engine
@every_reduction
def test_no_valid_token_gives_zeros(device: torch.device, engine: str, reduction: str) -> None:
    loss = Step("loss", problem(2), replace(EVERYTHING, reduction=reduction), engine)
    inputs = inputs_for(loss, device)
    inputs["labels"][:] = IGNORE
    outputs, gradients = assert_as_whole(loss, inputs, 2)
    assert outputs.pop("predicted_tokens").tolist() == [-1] * TOKENS
    for tensor in (outputs | gathered(gradients)).values():
        assert tensor.count_nonzero() == 0  # NaN would count


@every_engine
@every_reduction
def test_no_tokens_give_zeros(device: torch.device, engine: str, reduction: str) -> None:
    loss = Step("loss", linear(0, vocab=2 * COLUMNS), replace(EVERYTHING, reduction=reduction), engine)
    outputs, _, gradients = differentiate_sharded(loss, random_inputs(loss, device), 2)
    assert outputs["loss"].shape == ((0,) if reduction == "none" else ())
    assert gradients[0]["grad_weight"].shape == (COLUMNS, HIDDEN)
    for tensor in (outputs | gathered(gradients)).values():
        assert tensor.count_nonzero() == 0


# ---- the problem of a shard


def shard_problem(bias: int = COLUMNS, class_weight: int = 4 * COLUMNS) -> Problem:
    return linear_problem(
        Argument("x", (TOKENS, HIDDEN), torch.float32),
        Argument("weight", (COLUMNS, HIDDEN), torch.float32),
        Argument("labels", (TOKENS,), torch.int64),
        Argument("bias", (bias,), torch.float32),
        Argument("class_weight", (class_weight,), torch.float32),
        shards=4,
    )


def test_a_shard_is_a_part_of_the_whole() -> None:
    assert shard_problem() == sharded(Step("loss", problem(4), Options()), 4).problem


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"bias": 4 * COLUMNS}, rf"^bias must have shape \({COLUMNS},\), got \({4 * COLUMNS},\)$"),
        ({"class_weight": COLUMNS}, rf"^class_weight must have shape \({4 * COLUMNS},\), got \({COLUMNS},\)$"),
    ],
    ids=str,
)
def test_a_shard_has_its_own_bias_and_every_class_weight(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shard_problem(**sizes)
