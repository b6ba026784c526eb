"""Plans and options: values that compare and hash, list no buffer in vain, and keep within their memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from core_kernels import Buffer, Options, Plan, Problem, plan_backward, plan_forward
from core_kernels.options import OPTION_NAMES
from core_kernels.plan import CPU_SLAB_BYTES, SLAB_BYTES
from core_kernels.tiles import INTERPRETED
from tests.core_kernels.problems import EVERYTHING, HIDDEN, PLAIN, TOKENS, VOCAB, differentiable, linear, logits

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


# ---- options


def test_options_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        PLAIN.softcap = 1.0


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ({"label_smoothing": 0}, {"label_smoothing": 0.0}),
        ({"label_smoothing": 1}, {"label_smoothing": 1.0}),
        ({"lse_square_scale": np.float32(0.25)}, {"lse_square_scale": 0.25}),
        ({"softcap": 30}, {"softcap": 30.0}),
        ({"logit_scale": np.float64(2.0)}, {"logit_scale": 2.0}),
        ({"ignore_index": np.int64(-1)}, {"ignore_index": -1}),
        ({"softcap": None}, {}),
    ],
    ids=str,
)
def test_options_normalise(given: dict[str, Any], normal: dict[str, Any]) -> None:
    options, wanted = Options(**given), Options(**normal)
    assert options == wanted
    assert hash(options) == hash(wanted)
    for name in normal:
        assert type(getattr(options, name)) is type(normal[name])


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_every_option_is_checked_and_named(name: str) -> None:
    error = ValueError if name == "reduction" else TypeError
    with pytest.raises(error, match=rf"^{name} must be .*, got \[\]$"):
        Options(**{name: []})
    with pytest.raises(error, match=rf"^{name} must be .*, got \[\]$"):
        replace(PLAIN, **{name: []})


@pytest.mark.parametrize(
    ("flags", "needs_argmax", "returns_output"),
    [
        ({}, False, False),
        ({"return_z_loss": True}, False, True),
        ({"return_token_accuracy": True}, True, True),
        ({"return_predicted_tokens": True}, True, True),
        ({"use_token_scaling": True, "check_labels": True}, False, False),
    ],
)
def test_what_the_flags_ask_for(flags: dict[str, bool], needs_argmax: bool, returns_output: bool) -> None:
    options = Options(**flags)
    assert (options.needs_argmax, options.returns_output) == (needs_argmax, returns_output)


# ---- plans are values


@pytest.mark.parametrize("problem", [linear, logits])
def test_plans_are_frozen_equal_and_hashable(engine: str, problem: Callable[..., Problem]) -> None:
    def plans() -> tuple[Plan, Plan]:
        forward = plan_forward(problem(), replace(EVERYTHING), CPU, engine=engine)
        return forward, plan_backward(forward, differentiable(forward.problem))

    for plan, again in zip(plans(), plans(), strict=True):
        assert plan is not again
        assert plan == again
        assert {plan: "found"}[again] == "found"
        for value in (plan, plan.problem, plan.options, plan.tile, plan.outputs[0]):
            for field in fields(value):
                with pytest.raises(FrozenInstanceError):
                    setattr(value, field.name, None)
    forward, backward = plans()
    assert forward != backward


@pytest.mark.parametrize(
    "other",
    [
        lambda engine: plan_forward(linear(tokens=8), EVERYTHING, CPU, engine=engine),
        lambda engine: plan_forward(linear(vocab=38), EVERYTHING, CPU, engine=engine),
        lambda engine: plan_forward(linear(dtype=torch.bfloat16), EVERYTHING, CPU, engine=engine),
        lambda engine: plan_forward(linear(bias=False), EVERYTHING, CPU, engine=engine),
        lambda engine: plan_forward(linear(), replace(EVERYTHING, softcap=5.0), CPU, engine=engine),
        lambda engine: plan_forward(linear(), replace(EVERYTHING, ignore_index=0), CPU, engine=engine),
        lambda engine: plan_forward(linear(), EVERYTHING, CPU, engine=engine, memory="lean"),
        lambda engine: plan_forward(linear(), EVERYTHING, CPU, engine=engine, index_dtype=torch.int32),
    ],
    ids=["tokens", "vocab", "dtype", "bias", "softcap", "ignore_index", "memory", "index_dtype"],
)
def test_plans_of_different_calls_differ(engine: str, other: Callable[[str], Plan]) -> None:
    assert other(engine) != plan_forward(linear(), EVERYTHING, CPU, engine=engine)


def test_plans_of_different_engines_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    by_torch, by_triton = (plan_forward(linear(), EVERYTHING, CPU, engine=engine) for engine in ENGINES)
    assert by_torch != by_triton


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_predictions_have_the_dtype_that_is_asked_for(engine: str, index_dtype: torch.dtype) -> None:
    plan = plan_forward(linear(), EVERYTHING, CPU, engine=engine, index_dtype=index_dtype)
    assert Buffer("predicted_tokens", (TOKENS,), index_dtype) in plan.outputs


# ---- no buffer in vain

BASE_SAVED = {"row_max", "log_sum"}
TRITON_LINEAR_SAVED = {"valid_tokens", "valid_position", "num_valid"}
TRITON_LINEAR_WORKSPACE = {"target_logit", "strip_max", "strip_sum"}


def plain_sum(engine: str, problem: Callable[..., Problem], class_weight: bool = False, **options: Any) -> Plan:
    options = {"reduction": "sum"} | options
    return plan_forward(problem(class_weight=class_weight), Options(**options), CPU, engine=engine)


@pytest.mark.parametrize("problem", [linear, logits])
def test_a_plain_loss_needs_little(engine: str, problem: Callable[..., Problem]) -> None:
    plan = plain_sum(engine, problem)
    assert names(plan.outputs) == {"loss"}
    of_kernels = engine == "triton" and problem is linear
    assert names(plan.saved) == BASE_SAVED | (TRITON_LINEAR_SAVED if of_kernels else set())
    per_token = plain_sum(engine, problem, reduction="none")
    if engine == "torch":
        assert names(per_token.workspace) == {"slab"}
    else:
        assert names(per_token.workspace) == (TRITON_LINEAR_WORKSPACE if of_kernels else set())
        assert names(plan.workspace) == names(per_token.workspace) | {"token_loss", "token_z_loss"}


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
    plan = plain_sum("triton", problem, class_weight, **options)
    if problem is logits:
        workspace = {name for name in workspace if not name.startswith("strip_")}
    assert names(plan.outputs) - names(without.outputs) == outputs
    assert names(plan.saved) - names(without.saved) == saved
    assert names(plan.workspace) - names(without.workspace) == workspace
    assert names(without.buffers) <= names(plan.buffers)


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
def test_the_backward_plan_of_a_linear_loss(
    engine: str, dtype: torch.dtype, wanted: tuple[str, ...], outputs: dict[str, tuple[int, ...]], rows: bool
) -> None:
    forward = plan_forward(linear(dtype=dtype), EVERYTHING, CPU, engine=engine)
    plan = plan_backward(forward, wanted)
    assert plan.backward
    assert not forward.backward
    assert {buffer.name: (buffer.shape, buffer.dtype) for buffer in plan.outputs} == {
        name: (shape, dtype) for name, shape in outputs.items()
    }
    assert (Buffer("grad_rows", (TOKENS, HIDDEN), torch.float32) in plan.workspace) == rows
    packed = {"valid_x"} if engine == "triton" and "weight" in wanted else set()
    assert names(plan.workspace) == {"slab"} | packed | ({"grad_rows"} if rows else set())
    assert plan.saved == ()
    assert plan.inputs == (*forward.inputs, *(buffer.name for buffer in forward.saved), "grad_loss")


def test_the_backward_plan_of_given_logits(engine: str) -> None:
    plan = plan_backward(plan_forward(logits(), EVERYTHING, CPU, engine=engine), ["logits"])
    assert plan.outputs == (Buffer("grad_logits", (TOKENS, VOCAB), torch.float32),)
    assert names(plan.workspace) == ({"slab"} if engine == "torch" else set())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("class_weight", [False, True])
def test_inputs_are_those_that_the_problem_has(engine: str, bias: bool, class_weight: bool) -> None:
    weights = ("class_weight",) if class_weight else ()
    plan = plan_forward(linear(bias=bias, class_weight=class_weight), PLAIN, CPU, engine=engine)
    assert plan.inputs == ("x", "weight", "labels", *(("bias",) if bias else ()), *weights)
    plan = plan_forward(logits(class_weight=class_weight), PLAIN, CPU, engine=engine)
    assert plan.inputs == ("logits", "labels", *weights)


# ---- memory

LARGE = {"tokens": 8192, "hidden": 4096, "vocab": 128256, "dtype": torch.bfloat16}
LARGE_LOGITS_BYTES = 8192 * 128256 * 4  # float32


@pytest.mark.parametrize("memory", ["lean", "auto", "speed"])
def test_a_large_problem_is_planned_within_its_slab(engine: str, memory: str) -> None:
    forward = plan_forward(linear(**LARGE), EVERYTHING, CPU, engine=engine, memory=memory)
    slab = SLAB_BYTES[memory] if engine == "triton" else CPU_SLAB_BYTES
    statistics = 64 * 8192 * 16  # bytes: at most 64 strips of four numbers for each token
    assert nbytes(forward.buffers) <= statistics + (slab if engine == "torch" else 0)
    assert nbytes(forward.buffers) < LARGE_LOGITS_BYTES / 50

    backward = plan_backward(forward, ["x", "weight", "bias"])
    rows = 8192 * 4096 * (4 + (2 if engine == "triton" else 0))  # grad_rows in float32, valid_x in bf16
    assert rows < nbytes(backward.workspace) <= slab + rows
    if memory != "speed":
        assert nbytes(backward.workspace) < LARGE_LOGITS_BYTES / 5
        assert nbytes(backward.buffers) < LARGE_LOGITS_BYTES / 2  # the gradients themselves included


@pytest.mark.parametrize("memory", ["lean", "auto", "speed", 10**9, 3 * 10**8 + 1])
def test_the_slab_is_whole_tiles_or_the_whole_vocab(engine: str, memory: str | int) -> None:
    for problem in (linear(**LARGE), linear()):
        backward = plan_backward(plan_forward(problem, PLAIN, CPU, engine=engine, memory=memory), ["x", "weight"])
        (slab,) = (buffer for buffer in backward.workspace if buffer.name == "slab")
        rows, width = slab.shape
        assert rows == problem.tokens
        assert backward.slab <= width < backward.slab + 16
        assert engine == "torch" or width % 16 == 0  # every row starts where a tensor descriptor may
        assert slab.dtype == (problem.dtype if engine == "triton" else torch.float32)
        assert backward.slab == problem.vocab or backward.slab % backward.tile.n == 0
        assert 0 < backward.slab <= problem.vocab
    assert backward.slab == VOCAB  # a small problem is one slab


@pytest.mark.parametrize("memory", [250_000_000, 512 * 2**20, 2**31 + 7, 2**34])
def test_a_number_of_bytes_bounds_both_workspaces(engine: str, memory: int) -> None:
    forward = plan_forward(linear(**LARGE), EVERYTHING, CPU, engine=engine, memory=memory)
    backward = plan_backward(forward, ["x", "weight", "bias"])
    assert nbytes(forward.workspace) <= memory
    assert nbytes(backward.workspace) <= memory
    one_more_tile = 8192 * backward.tile.n * (2 if engine == "triton" else 4)
    assert backward.slab == LARGE["vocab"] or nbytes(backward.workspace) + one_more_tile > memory


def narrow_linear() -> Problem:
    """A vocab of less than one tile: its slab is the whole vocab, and no wider."""
    return linear(vocab=5)


@pytest.mark.parametrize("problem", [linear, narrow_linear, logits])
def test_the_least_memory_is_named_and_is_enough(engine: str, problem: Callable[..., Problem]) -> None:
    with pytest.raises(ValueError, match=r"^memory=0 bytes are too few: this call needs at least \d+$") as raised:
        plan_forward(problem(), EVERYTHING, CPU, engine=engine, memory=0)
    least = int(str(raised.value).split()[-1])
    forward = plan_forward(problem(), EVERYTHING, CPU, engine=engine, memory=least)
    backward = plan_backward(forward, forward.inputs)
    assert max(nbytes(forward.workspace), nbytes(backward.workspace)) == least
    with pytest.raises(ValueError, match=f"^memory={least - 1} bytes are too few: this call needs at least {least}$"):
        plan_forward(problem(), EVERYTHING, CPU, engine=engine, memory=least - 1)


def test_the_least_memory_of_the_backward_pass_is_named_and_is_enough(engine: str) -> None:
    def backward(memory: int) -> Plan:
        forward = plan_forward(linear(), replace(PLAIN, reduction="none"), CPU, engine=engine, memory=memory)
        return plan_backward(forward, ["x", "weight"])  # the error of too little memory is the forward plan's

    valid_x = TOKENS * math.ceil(HIDDEN / 16) * 16 * 4 if engine == "triton" else 0
    least = TOKENS * HIDDEN * 4 + valid_x + TOKENS * INTERPRETED.n * 4  # grad_rows, and a slab of one tile
    plan = backward(least)
    assert (nbytes(plan.workspace), plan.slab) == (least, plan.tile.n)
    with pytest.raises(ValueError, match=f"^memory={least - 1} bytes are too few: this call needs at least {least}$"):
        backward(least - 1)
