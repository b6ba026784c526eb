"""Schedules: how the loss prepares for its gradient, what it then leaves and holds, and which products are split."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from core_kernels import KEPT, Buffer, Options, Plan, Problem, Step, for_gradient, plan
from core_kernels.step import KEPT_STATISTICS_BYTES, MOST_KEPT_BYTES, MOST_SPEED_BYTES
from tests.core_kernels.problems import EVERYTHING, logits, sharded
from tests.core_kernels.problems import linear as any_linear

CPU = torch.device("cpu")
MIB = 2**20
WANTED = ("x", "weight")
TOKENS, HIDDEN, VOCAB = 41, 40, 203  # rows of 48 and of 208 columns
ROW, COLUMNS = 48, 208
PLAIN = Options(reduction="sum")
COMPACTION = {"valid_tokens", "valid_count"}
LABELS = {"sorted_labels", "sorted_tokens", "label_slot"}
FACTORS = {"row_target", "row_soft", "label_kept"}
CHUNK = {"label_logit", "exponentials"} | FACTORS


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def linear(tokens: int = TOKENS, hidden: int = HIDDEN, vocab: int = VOCAB, **others: Any) -> Problem:
    return any_linear(tokens, hidden, vocab, **{"dtype": torch.bfloat16, "bias": False, "class_weight": False} | others)


def step(options: Options = PLAIN, problem: Problem | None = None, **others: Any) -> Step:
    return Step("loss", problem or linear(), options, **others)


def in_order(value: Any) -> str:
    return str(sorted(value) if isinstance(value, set) else value)


def names(buffers: tuple[Buffer, ...]) -> set[str]:
    return {buffer.name for buffer in buffers}


def chosen(loss: Step, wanted: tuple[str, ...] = WANTED) -> tuple[int, Step, Step]:
    return for_gradient(loss, wanted, CPU)


# ---- which schedule


@pytest.mark.parametrize("memory", ["auto", "speed", 2**34])
@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        Options(reduction="mean", softcap=5.0, logit_scale=2.0, lse_square_scale=0.1, use_token_scaling=True),
        Options(reduction="none", return_z_loss=True, return_token_accuracy=True, return_predicted_tokens=True),
    ],
    ids=["sum", "mean", "none"],
)
@pytest.mark.parametrize("class_weight", [False, True])
def test_few_tokens_keep_their_exponentials(memory: str | int, options: Options, class_weight: bool) -> None:
    loss = Step("loss", linear(class_weight=class_weight), options, memory=memory)
    most, few, _ = chosen(loss)
    assert most > TOKENS
    assert few == replace(loss, keep=True)


@pytest.mark.parametrize(("memory", "most_bytes"), [("auto", MOST_KEPT_BYTES), ("speed", MOST_SPEED_BYTES)])
def test_the_exponentials_of_the_most_tokens_are_within_their_bytes(memory: str, most_bytes: int) -> None:
    most, few, _ = chosen(step(memory=memory, problem=linear(hidden=4096, vocab=32003)))

    def kept(tokens: int) -> int:
        of_tokens = replace(few, problem=replace(few.problem, leading=(tokens,)))
        return next(buffer.nbytes for buffer in of_tokens.saved if buffer.name == "exponentials")

    assert kept(most) <= most_bytes < kept(most + 1)


@pytest.mark.parametrize("memory", [100 * MIB, 300_000_001, 2**34])
def test_a_number_of_bytes_keeps_the_exponentials_that_fit(memory: int) -> None:
    """Beside rows of the workspace, vectors, a slot for each label, and the tiles' statistics."""
    vocab, hidden = 32003, 4100
    loss = step(memory=memory, problem=linear(hidden=hidden, vocab=vocab))
    per_token = 2 * 32016 + 6 * 4112 + 64
    most = (memory - KEPT_STATISTICS_BYTES - 4 * vocab - 64) // per_token
    assert chosen(loss) == (most, replace(loss, keep=True), loss)


@pytest.mark.parametrize("memory", ["auto", "speed", 2**34])
@pytest.mark.parametrize(("vocab", "tokens"), [(1000, 16384), (65536, 32768)])
def test_no_more_tokens_are_kept_than_are_soon_sorted(memory: str | int, vocab: int, tokens: int) -> None:
    """Each label is compared with each: of very many tokens of a small head that would take longer than products."""
    loss = step(memory=memory, problem=linear(2**20, 128, vocab))
    most, _, many = chosen(loss)
    assert most == min(tokens, {"auto": 2**31, "speed": MOST_SPEED_BYTES}.get(memory, 2**34) // (2 * vocab))
    chunk = plan(many, CPU).chunk
    assert 0 < chunk <= tokens if memory == "speed" else chunk == 0


@pytest.mark.parametrize("memory", [0, 1, KEPT_STATISTICS_BYTES])
def test_too_few_bytes_keep_nothing(memory: int) -> None:
    most, _, many = chosen(step(memory=memory))
    assert (most, many) == (0, step(memory=memory))


@pytest.mark.parametrize("wanted", [("x",), ("weight",), WANTED], ids="+".join)
def test_speed_computes_gradients_ahead_with_more_tokens(wanted: tuple[str, ...]) -> None:
    loss = step(memory="speed")
    _, _, many = chosen(loss, wanted)
    assert many == replace(loss, ahead=wanted)


def test_a_loss_of_each_token_computes_nothing_ahead() -> None:
    """Each has its own upstream gradient, which is not known yet."""
    loss = step(Options(reduction="none"), memory="speed")
    most, _, many = chosen(loss)
    assert most > 0
    assert many == loss


@pytest.mark.parametrize(
    "other",
    [
        {"memory": "lean"},
        {"engine": "torch"},
        {"problem": linear(dtype=torch.float32)},
        {"problem": linear(dtype=torch.float16)},
        {"problem": linear(bias=True)},
        {"problem": linear().times(1)},
        {"problem": sharded(step(), 1).problem},
        {"problem": logits(dtype=torch.bfloat16)},
        {"options": Options(label_smoothing=0.1)},
    ],
    ids=["lean", "torch", "float32", "float16", "bias", "groups", "shards", "logits", "smoothing"],
)
@pytest.mark.parametrize("memory", ["auto", "speed", 2**34])
def test_what_is_not_served_leaves_statistics_alone(memory: str | int, other: dict[str, Any]) -> None:
    loss = replace(step(memory=memory), **other)
    assert chosen(loss) == (0, loss, loss)


def test_without_kernels_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    loss = step(memory="speed")
    assert chosen(loss) == (0, loss, loss)
    assert for_gradient(loss, WANTED, torch.device("cuda"))[1] == replace(loss, keep=True)


@pytest.mark.parametrize("schedule", [{"keep": True}, {"ahead": WANTED}, {"keep": True, "ahead": ("x",)}], ids=str)
def test_a_plain_step_saves_statistics_alone(schedule: dict[str, Any]) -> None:
    scheduled = step(EVERYTHING, **schedule)
    assert scheduled.plain() == step(EVERYTHING)
    assert names(scheduled.saved) - names(scheduled.plain().saved) <= set(KEPT)
    assert not names(scheduled.plain().saved) & set(KEPT)


# ---- which buffers


def test_what_a_loss_that_keeps_saves() -> None:
    exponentials = Buffer("exponentials", (TOKENS, COLUMNS), torch.bfloat16)
    label_logit = Buffer("label_logit", (TOKENS,), torch.float32)
    ranks = Buffer("valid_tokens", (TOKENS,), torch.int32), Buffer("valid_count", (1,), torch.int32)
    assert step(keep=True).saved == (*step().saved, exponentials, label_logit, *ranks)


@pytest.mark.parametrize(
    ("ahead", "sums"),
    [
        (("x",), {"sum_x": (TOKENS, HIDDEN)}),
        (("weight",), {"sum_weight": (VOCAB, HIDDEN)}),
        (WANTED, {"sum_x": (TOKENS, HIDDEN), "sum_weight": (VOCAB, HIDDEN)}),
    ],
    ids=in_order,
)
def test_what_a_loss_that_computes_ahead_saves(ahead: tuple[str, ...], sums: dict[str, tuple[int, ...]]) -> None:
    wanted = tuple(Buffer(name, shape, torch.float32) for name, shape in sums.items())
    assert step(ahead=ahead).saved == (*step().saved, *wanted)


METRICS = Options(reduction="sum", return_token_accuracy=True)


@pytest.mark.parametrize(
    ("options", "metrics"),
    [(PLAIN, set()), (METRICS, {"token_correct", "tile_max", "row_argmax"})],
    ids=["plain", "metrics"],
)
@pytest.mark.parametrize(
    ("schedule", "buffers"),
    [
        ({"keep": True}, set()),
        ({"ahead": ("x",)}, CHUNK | COMPACTION),
        ({"ahead": WANTED}, CHUNK | COMPACTION | LABELS),
    ],
    ids=in_order,
)
def test_what_a_scheduled_loss_holds(
    options: Options, metrics: set[str], schedule: dict[str, Any], buffers: set[str]
) -> None:
    """Sums of tiles are relative to the label's logit: their maxima serve the argmax alone."""
    workspace = plan(step(options, **schedule), CPU).workspace
    every = {"packed_x", "tile_sum", "token_loss", "token_z_loss"}
    assert names(workspace) == every | metrics | buffers


def test_shapes_of_a_chunk() -> None:
    planned = plan(step(ahead=WANTED), CPU)
    assert planned.chunk == 64  # whole tiles of 32
    shapes = {buffer.name: (buffer.shape, buffer.dtype) for buffer in planned.workspace}
    assert shapes["exponentials"] == ((64, COLUMNS), torch.bfloat16)
    assert shapes["packed_x"] == ((64, ROW), torch.bfloat16)
    assert shapes["sorted_labels"] == shapes["sorted_tokens"] == ((64,), torch.int32)
    assert shapes["label_slot"] == ((VOCAB,), torch.int32)
    assert {shapes[name] for name in ("row_target", "row_soft", "label_kept")} == {((TOKENS,), torch.float32)}


@pytest.mark.parametrize(
    ("hidden", "wanted", "rows"),
    [
        (40, ("x",), {"rows"}),
        (40, ("weight",), {"rows", "packed_x"} | LABELS),
        (40, WANTED, {"rows", "packed_x"} | LABELS),
        (48, WANTED, {"rows"} | LABELS),  # packed rows find their place in the gradient of x
    ],
    ids=in_order,
)
def test_what_the_gradient_from_kept_exponentials_holds(hidden: int, wanted: tuple[str, ...], rows: set[str]) -> None:
    loss = replace(step(keep=True), problem=linear(hidden=hidden))
    gradient = plan(loss.gradient(wanted), CPU)
    assert names(gradient.workspace) == FACTORS | rows
    assert gradient.slab == VOCAB  # one product over all of it
    assert gradient.step.saved == ()
    assert gradient.inputs == (*loss.inputs, *(buffer.name for buffer in loss.saved), "grad_loss")


RANKS = COMPACTION | {"valid_position"}


@pytest.mark.parametrize(("wanted", "buffers"), [(("x",), RANKS), (("weight",), set()), (WANTED, RANKS)])
def test_the_gradient_of_sums_holds_next_to_nothing(wanted: tuple[str, ...], buffers: set[str]) -> None:
    gradient = plan(step(ahead=wanted).gradient(wanted), CPU)
    assert names(gradient.workspace) == buffers
    assert names(gradient.outputs) == {f"grad_{name}" for name in wanted}


# ---- sums in parts: interpreted tiles of the gradient of x are 32 tokens by 64 hidden units, for 3 programs


def gradient_of(tokens: int, hidden: int, vocab: int, wanted: tuple[str, ...] = WANTED) -> Plan:
    loss = Step("loss", linear(tokens, hidden, vocab), PLAIN, memory="lean", keep=True)
    return plan(loss.gradient(wanted), CPU)


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocab", "split_tiles", "splits", "rows"),
    [
        (32, 64, 128, 0, 1, 32),  # one tile, and not enough columns for two parts
        (32, 64, 129, 1, 2, 64),
        (20, 64, 257, 1, 3, 96),  # rows of the first part are whole tiles
        (20, 64, 5000, 1, 3, 96),  # as many parts as programs
        (33, 64, 5000, 0, 1, 33),  # two tiles: half a part each would not keep three programs busier
        (96, 64, 5000, 0, 1, 96),  # one full round
        (64, 128, 203, 1, 2, 96),  # of four tiles one is left, and split with its neighbour
        (37, 100, 203, 1, 2, 96),
        (160, 64, 203, 0, 1, 160),  # of five tiles two are left, enough for a round
        (224, 64, 203, 1, 2, 256),
        (48 * 32 + 1, 64, 203, 0, 1, 48 * 32 + 1),  # of so many rounds the last does not count
    ],
)
def test_tiles_of_a_last_round_are_summed_in_parts(
    tokens: int, hidden: int, vocab: int, split_tiles: int, splits: int, rows: int
) -> None:
    planned = gradient_of(tokens, hidden, vocab)
    assert (planned.split_tiles, planned.splits) == (split_tiles, splits)
    assert next(buffer.shape[0] for buffer in planned.workspace if buffer.name == "rows") == rows
    if splits > 1:
        assert planned.first_part == -(-tokens // 32) * 32


def test_only_the_gradient_of_x_is_summed_in_parts() -> None:
    planned = gradient_of(20, 64, 5000, ("weight",))
    assert (planned.split_tiles, planned.splits) == (0, 1)
    loss = plan(Step("loss", linear(20, 64, 5000), PLAIN, ahead=WANTED), CPU)
    assert (loss.split_tiles, loss.splits) == (0, 1)


@pytest.mark.parametrize("tokens", [1, 500, 1000, 5000, 8192, 9000, 30_000])
@pytest.mark.parametrize("hidden", [512, 1000, 4096])
def test_parts_take_no_longer_than_whole_tiles(every_tiling: None, tokens: int, hidden: int) -> None:
    """Each program takes every so-many-th of the whole tiles, and then of the parts."""
    planned = gradient_of(tokens, hidden, 128256)
    tile = planned.tiles.grad_x
    programs = planned.tiles.programs(tile)
    across = math.ceil(hidden / tile.n)
    tiles, split = math.ceil(tokens / tile.m) * across, planned.split_tiles * across
    times = [1.0] * (tiles - split) + [1.0 / planned.splits] * (split * planned.splits)
    assert max(sum(times[program::programs]) for program in range(programs)) <= math.ceil(tiles / programs)
