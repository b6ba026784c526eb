"""Steps and plans: values that compare and hash, list no buffer in vain, and keep within their memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch

from core_kernels import Buffer, Options, Plan, Problem, Step, plan
from tests.core_kernels.problems import (
    EVERYTHING,
    HIDDEN,
    PLAIN,
    TOKENS,
    VOCAB,
    differentiable,
    linear,
    logits,
    sharded,
)

CPU = torch.device("cpu")
ENGINES = ("torch", "triton")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either engine, on a CPU: a plan for interpreted kernels needs no Triton."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if request.param == "triton" else "0")
    return request.param


def names(*groups: tuple[Buffer, ...]) -> set[str]:
    return {buffer.name for group in groups for buffer in group}


def nbytes(*groups: tuple[Buffer, ...]) -> int:
    return sum(buffer.nbytes for group in groups for buffer in group)


# ---- steps and plans are values


@pytest.mark.parametrize("problem", [linear, logits])
def test_steps_and_plans_are_frozen_equal_and_hashable(engine: str, problem: Callable[..., Problem]) -> None:
    def values() -> list[Step | Plan]:
        plan.cache_clear()
        loss = Step("loss", problem(), replace(EVERYTHING), engine)
        gradient = loss.gradient(differentiable(loss.problem))
        return [loss, gradient, plan(loss, CPU), plan(gradient, CPU)]

    for value, again in zip(values(), values(), strict=True):
        assert value is not again
        assert value == again
        assert {value: "found"}[again] == "found"
        for part in (value, value.problem, value.options, value.outputs[0]):
            for field in fields(part):
                with pytest.raises(FrozenInstanceError):
                    setattr(part, field.name, None)
    assert len(set(values())) == 4


@pytest.mark.parametrize(
    "other",
    [
        {"problem": linear(tokens=8)},
        {"problem": linear(vocab=38)},
        {"problem": linear(dtype=torch.bfloat16)},
        {"problem": linear(bias=False)},
        {"problem": linear().times(1)},
        {"options": replace(EVERYTHING, softcap=5.0)},
        {"options": replace(EVERYTHING, ignore_index=0)},
        {"memory": "lean"},
        {"index_dtype": torch.int32},
    ],
    ids=["tokens", "vocab", "dtype", "bias", "groups", "softcap", "ignore_index", "memory", "index_dtype"],
)
def test_steps_and_plans_of_different_calls_differ(engine: str, other: dict[str, Any]) -> None:
    loss = Step("loss", linear(), EVERYTHING, engine)
    assert replace(loss, **other) != loss
    assert plan(replace(loss, **other), CPU) != plan(loss, CPU)


@pytest.mark.parametrize("problem", [linear, logits])
def test_engines_differ_in_scratch_alone(monkeypatch: pytest.MonkeyPatch, problem: Callable[..., Problem]) -> None:
    """What a step reads, saves and answers is known before its engine is."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    by_torch, by_triton = (plan(Step("loss", problem(), EVERYTHING, engine), CPU) for engine in ENGINES)
    assert by_torch.workspace != by_triton.workspace
    assert by_torch.outputs == by_triton.outputs
    assert by_torch.saved == by_triton.saved
    assert by_torch.inputs == by_triton.inputs


@pytest.mark.parametrize("engine", ["cuda", "Torch", "", None, 0])
def test_an_unknown_engine_raises(engine: Any) -> None:
    with pytest.raises(ValueError) as raised:
        Step("loss", linear(), PLAIN, engine)
    assert str(raised.value) == f"engine must be one of 'auto', 'triton' and 'torch', got {engine!r}"


@pytest.mark.parametrize(
    ("memory", "error"), [("most", ValueError), (True, TypeError), (None, TypeError), (1.5, TypeError)]
)
def test_an_unknown_memory_raises(memory: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        Step("loss", linear(), PLAIN, memory=memory)
    assert str(raised.value) == f"memory must be 'auto', 'speed', 'lean' or a number of bytes, got {memory!r}"


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_predictions_have_the_dtype_that_is_asked_for(index_dtype: torch.dtype) -> None:
    loss = Step("loss", linear(), EVERYTHING, index_dtype=index_dtype)
    assert Buffer("predicted_tokens", (TOKENS,), index_dtype) in loss.outputs


# ---- no buffer in vain

COMPACTION = {"valid_tokens", "valid_count"}
TILES = {"label_logit", "tile_max", "tile_sum"}
STRIPS = {"label_logit", "strip_max", "strip_sum"}


def plain_sum(engine: str, problem: Callable[..., Problem], class_weight: bool = False, **options: Any) -> Plan:
    options = {"reduction": "sum"} | options
    return plan(Step("loss", problem(class_weight=class_weight), Options(**options), engine), CPU)


@pytest.mark.parametrize("problem", [linear, logits])
def test_a_plain_loss_needs_little(engine: str, problem: Callable[..., Problem]) -> None:
    planned = plain_sum(engine, problem)
    assert names(planned.outputs) == {"loss"}
    assert names(planned.saved) == {"lse_base", "log_sum"}
    per_token = plain_sum(engine, problem, reduction="none")
    if engine == "torch":
        assert names(per_token.workspace) == {"slab"}
    else:
        assert names(per_token.workspace) == (COMPACTION | TILES if problem is linear else set())
        assert names(planned.workspace) == names(per_token.workspace) | {"token_loss", "token_z_loss"}


@pytest.mark.parametrize(
    ("options", "class_weight", "outputs", "saved", "workspace"),
    [
        ({"return_z_loss": True}, False, {"z_loss"}, set(), set()),
        ({"return_token_accuracy": True}, False, {"token_accuracy"}, set(), {"token_correct", "tile_argmax"}),
        ({"return_predicted_tokens": True}, False, {"predicted_tokens"}, set(), {"tile_argmax"}),
        ({"label_smoothing": 0.1}, False, set(), set(), {"tile_smooth"}),
        ({"label_smoothing": 0.1}, True, set(), {"class_weight_sum"}, {"tile_smooth"}),
        ({}, True, set(), set(), set()),
        ({"use_token_scaling": True}, False, set(), {"token_scale"}, set()),
        ({"reduction": "mean"}, False, set(), {"divisors"}, set()),
        ({"lse_square_scale": 0.1, "softcap": 5.0, "logit_scale": 2.0}, False, set(), set(), set()),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
@pytest.mark.parametrize("problem", [linear, logits])
def test_an_option_adds_its_buffers_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
    problem: Callable[..., Problem],
    options: dict[str, Any],
    class_weight: bool,
    outputs: set[str],
    saved: set[str],
    workspace: set[str],
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    without = plain_sum("triton", problem)
    planned = plain_sum("triton", problem, class_weight, **options)
    if problem is logits:
        workspace = {name for name in workspace if not name.startswith("tile_")}
    assert names(planned.outputs) - names(without.outputs) == outputs
    assert names(planned.saved) - names(without.saved) == saved
    assert names(planned.workspace) - names(without.workspace) == workspace
    assert names((*without.outputs, *without.saved)) <= names((*planned.outputs, *planned.saved))


@pytest.mark.parametrize(
    ("wanted", "outputs", "rows"),
    [
        ((), {}, False),
        (("x",), {"grad_x": (TOKENS, HIDDEN)}, True),
        (("weight",), {"grad_weight": (VOCAB, HIDDEN)}, False),
        (("bias",), {"grad_bias": (VOCAB,)}, False),
        (
            ("bias", "weight", "x"),
            {"grad_x": (TOKENS, HIDDEN), "grad_weight": (VOCAB, HIDDEN), "grad_bias": (VOCAB,)},
            True,
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_linear_loss(
    engine: str, dtype: torch.dtype, wanted: tuple[str, ...], outputs: dict[str, tuple[int, ...]], rows: bool
) -> None:
    loss = Step("loss", linear(dtype=dtype), EVERYTHING, engine)
    gradient = loss.gradient(wanted)
    assert {buffer.name: (buffer.shape, buffer.dtype) for buffer in gradient.outputs} == {
        name: (shape, dtype) for name, shape in outputs.items()
    }
    assert gradient.saved == ()
    assert gradient.inputs == (*loss.inputs, *(buffer.name for buffer in loss.saved), "grad_loss")

    workspace = plan(gradient, CPU).workspace
    of_torch = {"slab"} | ({"grad_rows"} if rows else set())
    of_kernels = {"slab", "packed_x", "row_target", "row_soft", "row_uniform"} | COMPACTION
    assert names(workspace) == (of_torch if engine == "torch" else of_kernels | ({"rows"} if rows else set()))
    sums = [buffer for buffer in workspace if buffer.name in ("grad_rows", "rows")]
    assert [(buffer.shape, buffer.dtype) for buffer in sums] == [((TOKENS, HIDDEN), torch.float32)] * rows


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({}, {"row_target"}),
        ({"softcap": 5.0, "logit_scale": 2.0, "use_token_scaling": True}, {"row_target"}),
        ({"lse_square_scale": 0.1}, {"row_target", "row_soft"}),
        ({"label_smoothing": 0.1}, {"row_target", "row_soft", "row_uniform"}),
    ],
    ids=["plain", "scaled", "z_loss", "smoothing"],
)
def test_a_row_has_the_factors_that_options_need(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], factors: set[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    planned = plan(Step("loss", linear(), Options(**options), "triton").gradient(["weight"]), CPU)
    rows = {buffer for buffer in planned.workspace if buffer.name.startswith("row_")}
    assert rows == {Buffer(name, (TOKENS,), torch.float32) for name in factors}


@pytest.mark.parametrize(("hidden", "wanted", "packs"), [(48, "x", False), (48, "weight", True), (40, "x", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_packed_in_the_gradient_itself_where_a_descriptor_can_read_them(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, hidden: int, wanted: str, packs: bool
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    loss = Step("loss", linear(hidden=hidden, dtype=dtype), PLAIN, "triton")
    packed = [buffer for buffer in plan(loss.gradient([wanted]), CPU).workspace if buffer.name == "packed_x"]
    assert packed == [Buffer("packed_x", (TOKENS, 48), dtype)] * packs


def test_the_gradient_of_a_loss_of_given_logits(engine: str) -> None:
    planned = plan(Step("loss", logits(), EVERYTHING, engine).gradient(["logits"]), CPU)
    assert planned.outputs == (Buffer("grad_logits", (TOKENS, VOCAB), torch.float32),)
    assert names(planned.workspace) == ({"slab"} if engine == "torch" else set())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("class_weight", [False, True])
def test_inputs_are_those_that_the_problem_has(bias: bool, class_weight: bool) -> None:
    weights = ("class_weight",) if class_weight else ()
    loss = Step("loss", linear(bias=bias, class_weight=class_weight), PLAIN)
    names_of_all = ("x", "weight", "labels", *(("bias",) if bias else ()), *weights)
    assert loss.inputs == names_of_all
    assert sharded(loss, 1).inputs == (*names_of_all, "first_class")
    assert sharded(loss, 1).of_kind("combine").inputs == ("labels", *weights, "shard_statistics")
    assert Step("loss", logits(class_weight=class_weight), PLAIN).inputs == ("logits", "labels", *weights)


# ---- shards and groups


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 3),
        ({"lse_square_scale": 0.1, "return_z_loss": True, "use_token_scaling": True, "softcap": 5.0}, 3),
        ({"label_smoothing": 0.1}, 4),
        ({"return_token_accuracy": True}, 4),
        ({"return_predicted_tokens": True}, 4),
        ({"return_token_accuracy": True, "return_predicted_tokens": True, "label_smoothing": 0.1}, 5),
    ],
    ids=str,
)
def test_shards_tell_each_other_what_options_need(options: dict[str, Any], rows: int) -> None:
    shard = sharded(Step("loss", linear(vocab=4 * VOCAB), Options(**options)), 4)
    assert shard.outputs == (Buffer("shard_statistics", (rows, TOKENS), torch.int32),)
    assert shard.saved == ()


def test_steps_on_shards(engine: str) -> None:
    loss = Step("loss", linear(vocab=4 * VOCAB), EVERYTHING, engine)
    shard = sharded(loss, 4)
    combination = shard.of_kind("combine")
    gradient = shard.gradient(["x", "weight", "bias"])
    assert (combination.outputs, combination.saved) == (loss.outputs, loss.saved)
    assert gradient.inputs == (*shard.inputs, *(buffer.name for buffer in loss.saved), "grad_loss")
    shapes = {"grad_x": (TOKENS, HIDDEN), "grad_weight": (VOCAB, HIDDEN), "grad_bias": (VOCAB,)}
    assert {buffer.name: buffer.shape for buffer in gradient.outputs} == shapes

    assert nbytes(plan(shard, CPU).allocations) < nbytes(plan(loss, CPU).allocations)
    reduced = {"token_loss", "token_z_loss", "token_correct"} if engine == "triton" else set()
    assert names(plan(combination, CPU).workspace) == reduced


def test_each_group_has_its_own_results(engine: str) -> None:
    """Those of each token stay those of each token."""
    problem = linear().times(3).times(2)
    assert (problem.tokens, problem.group_tokens, problem.groups) == (6 * TOKENS, TOKENS, (2, 3))
    loss = Step("loss", problem, EVERYTHING, engine)
    shapes = {buffer.name: buffer.shape for buffer in plan(loss, CPU).step.results}
    assert {shapes[name] for name in ("loss", "z_loss", "token_accuracy")} == {(2, 3)}
    assert shapes["divisors"] == (2, 3, 2)
    assert {shapes[name] for name in ("predicted_tokens", "lse_base", "log_sum")} == {(6 * TOKENS,)}
    per_token = replace(loss, options=replace(EVERYTHING, reduction="none"))
    assert {buffer.shape for buffer in per_token.outputs} == {(6 * TOKENS,)}
