"""Steps and plans: values that compare and hash, list no buffer in vain, and keep within their memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch

from core_kernels import Buffer, Options, Plan, Problem, Step, plan
from core_kernels.plan import CPU_SLAB_BYTES, SLAB_BYTES
from core_kernels.tiles import INTERPRETED
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

COMPACTION = {"valid_tokens", "valid_position", "valid_count"}
STRIPS = {"target_logit", "strip_max", "strip_sum"}


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
        assert names(per_token.workspace) == (COMPACTION | STRIPS if problem is linear else set())
        assert names(planned.workspace) == names(per_token.workspace) | {"token_loss", "token_z_loss"}


@pytest.mark.parametrize(
    ("options", "class_weight", "outputs", "saved", "workspace"),
    [
        ({"return_z_loss": True}, False, {"z_loss"}, set(), set()),
        ({"return_token_accuracy": True}, False, {"token_accuracy"}, set(), {"token_correct", "strip_argmax"}),
        ({"return_predicted_tokens": True}, False, {"predicted_tokens"}, set(), {"strip_argmax"}),
        ({"label_smoothing": 0.1}, False, set(), set(), {"strip_smooth"}),
        ({"label_smoothing": 0.1}, True, set(), {"class_weight_sum"}, {"strip_smooth"}),
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
        workspace = {name for name in workspace if not name.startswith("strip_")}
    assert names(planned.outputs) - names(without.outputs) == outputs
    assert names(planned.saved) - names(without.saved) == saved
    assert names(planned.workspace) - names(without.workspace) == workspace
    assert names(without.buffers) <= names(planned.buffers)


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
    assert (Buffer("grad_rows", (TOKENS, HIDDEN), torch.float32) in workspace) == rows
    of_kernels = COMPACTION | ({"valid_x"} if "weight" in wanted else set()) if engine == "triton" else set()
    assert names(workspace) == {"slab"} | of_kernels | ({"grad_rows"} if rows else set())


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

    assert nbytes(plan(shard, CPU).buffers) < nbytes(plan(loss, CPU).buffers)
    reduced = {"token_loss", "token_z_loss", "token_correct"} if engine == "triton" else set()
    assert names(plan(combination, CPU).workspace) == reduced


def test_each_group_has_its_own_results(engine: str) -> None:
    """Those of each token stay those of each token."""
    problem = linear().times(3).times(2)
    assert (problem.tokens, problem.group_tokens, problem.groups) == (6 * TOKENS, TOKENS, (2, 3))
    loss = Step("loss", problem, EVERYTHING, engine)
    shapes = {buffer.name: buffer.shape for buffer in plan(loss, CPU).buffers}
    assert {shapes[name] for name in ("loss", "z_loss", "token_accuracy")} == {(2, 3)}
    assert shapes["divisors"] == (2, 3, 2)
    assert {shapes[name] for name in ("predicted_tokens", "lse_base", "log_sum")} == {(6 * TOKENS,)}
    per_token = replace(loss, options=replace(EVERYTHING, reduction="none"))
    assert {buffer.shape for buffer in per_token.outputs} == {(6 * TOKENS,)}


# ---- memory

LARGE = {"tokens": 8192, "hidden": 4096, "vocab": 128256, "dtype": torch.bfloat16}
LARGE_LOGITS_BYTES = 8192 * 128256 * 4  # float32


@pytest.mark.parametrize("memory", ["lean", "auto", "speed"])
def test_a_large_problem_is_planned_within_its_slab(engine: str, memory: str) -> None:
    loss = Step("loss", linear(**LARGE), EVERYTHING, engine, memory)
    forward = plan(loss, CPU)
    slab = SLAB_BYTES[memory] if engine == "triton" else CPU_SLAB_BYTES
    statistics = 64 * 8192 * 16  # bytes: at most 64 strips of four numbers for each token
    assert nbytes(forward.buffers) <= statistics + (slab if engine == "torch" else 0)
    assert nbytes(forward.buffers) < LARGE_LOGITS_BYTES / 50

    backward = plan(loss.gradient(["x", "weight", "bias"]), CPU)
    rows = 8192 * 4096 * (4 + (2 if engine == "triton" else 0))  # grad_rows in float32, valid_x in bf16
    compaction = 2 * 8192 * 4 + 4
    assert rows < nbytes(backward.workspace) <= slab + rows + compaction
    if memory != "speed":
        assert nbytes(backward.workspace) < LARGE_LOGITS_BYTES / 5
        assert nbytes(backward.buffers) < LARGE_LOGITS_BYTES / 2  # the gradients themselves included


@pytest.mark.parametrize("memory", ["lean", "auto", "speed", 10**9, 3 * 10**8 + 1])
def test_the_slab_is_whole_tiles_or_all_columns(engine: str, memory: str | int) -> None:
    for problem in (linear(**LARGE), one_shard(), linear()):
        backward = plan(Step("loss", problem, PLAIN, engine, memory).gradient(["x", "weight"]), CPU)
        (slab,) = (buffer for buffer in backward.workspace if buffer.name == "slab")
        rows, width = slab.shape
        assert rows == problem.tokens
        assert backward.slab <= width < backward.slab + 16
        assert engine == "torch" or width % 16 == 0  # every row starts where a tensor descriptor may
        assert slab.dtype == (problem.dtype if engine == "triton" else torch.float32)
        assert backward.slab == problem.columns or backward.slab % backward.tile.n == 0
        assert 0 < backward.slab <= problem.columns
    assert backward.slab == VOCAB  # a small problem is one slab


@pytest.mark.parametrize("memory", [250_000_000, 512 * 2**20, 2**31 + 7, 2**34])
def test_a_number_of_bytes_bounds_both_workspaces(engine: str, memory: int) -> None:
    loss = Step("loss", linear(**LARGE), EVERYTHING, engine, memory)
    forward, backward = plan(loss, CPU), plan(loss.gradient(["x", "weight", "bias"]), CPU)
    assert nbytes(forward.workspace) <= memory
    assert nbytes(backward.workspace) <= memory
    one_more_tile = 8192 * backward.tile.n * (2 if engine == "triton" else 4)
    assert backward.slab == LARGE["vocab"] or nbytes(backward.workspace) + one_more_tile > memory


def narrow_linear() -> Problem:
    """A vocab of less than one tile: its slab is the whole vocab, and no wider."""
    return linear(vocab=5)


def one_shard() -> Problem:
    return replace(linear(vocab=2 * VOCAB), columns=VOCAB, shards=2)


@pytest.mark.parametrize("problem", [linear, narrow_linear, logits, one_shard])
def test_the_least_memory_is_named_and_is_enough(engine: str, problem: Callable[..., Problem]) -> None:
    step = Step("shard" if problem is one_shard else "loss", problem(), EVERYTHING, engine, memory=0)
    with pytest.raises(ValueError, match=r"^memory=0 bytes are too few: this call needs at least \d+$") as raised:
        plan(step, CPU)
    least = int(str(raised.value).split()[-1])
    enough = replace(step, memory=least)
    forward, backward = plan(enough, CPU), plan(enough.gradient(step.inputs), CPU)
    assert max(nbytes(forward.workspace), nbytes(backward.workspace)) == least
    with pytest.raises(ValueError, match=f"^memory={least - 1} bytes are too few: this call needs at least {least}$"):
        plan(replace(step, memory=least - 1), CPU)


def test_the_least_memory_of_the_gradient_is_named_and_is_enough(engine: str) -> None:
    """The error is that of the loss, long before the gradient is asked for."""
    loss = Step("loss", linear(), replace(PLAIN, reduction="none"), engine)
    of_kernels = TOKENS * math.ceil(HIDDEN / 16) * 16 * 4 + 2 * TOKENS * 4 + 4  # valid_x, and the compaction
    least = TOKENS * HIDDEN * 4 + TOKENS * INTERPRETED.n * 4  # grad_rows, and a slab of one tile
    least += of_kernels if engine == "triton" else 0
    enough = replace(loss, memory=least)
    assert plan(enough, CPU).step == enough
    backward = plan(enough.gradient(["x", "weight"]), CPU)
    assert (nbytes(backward.workspace), backward.slab) == (least, backward.tile.n)
    with pytest.raises(ValueError, match=f"^memory={least - 1} bytes are too few: this call needs at least {least}$"):
        plan(replace(loss, memory=least - 1), CPU)
