"""What plans hold: within the bytes that ``memory`` allows, and nothing of all tokens and classes unless it is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from core_kernels import Plan, Problem, Step, for_gradient, plan
from core_kernels.plan import (
    CHUNK_BYTES,
    CPU_SLAB_BYTES,
    LEAN_BYTES,
    LEAN_BYTES_PER_TOKEN,
    LEAN_TOKENS,
    LINE,
    PROJECTION_BYTES,
    SLAB_BYTES,
)
from core_kernels.step import KEPT_STATISTICS_BYTES, aligned
from core_kernels.tiles import INTERPRETED
from tests.core_kernels.problems import (
    EVERYTHING,
    HIDDEN,
    PLAIN,
    TOKENS,
    VOCAB,
    in_lines,
    linear,
    logits,
)

CPU = torch.device("cpu")
MIB = 2**20
ALL = ("x", "weight", "bias")
SUBSETS = [("x",), ("weight",), ("x", "weight")]
SERVED = replace(EVERYTHING, label_smoothing=0.0)  # by exponentials that are kept


@pytest.fixture(params=["torch", "triton"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either engine, on a CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if request.param == "triton" else "0")
    return request.param


def large(tokens: int = 8192, **others: Any) -> Problem:
    return linear(**{"tokens": tokens, "hidden": 4096, "vocab": 128256, "dtype": torch.bfloat16} | others)


def bytes_of(planned: Plan, name: str) -> int:
    return sum(buffer.nbytes for buffer in planned.workspace if buffer.name == name)


def nbytes(planned: Plan) -> int:
    return sum(buffer.nbytes for buffer in planned.allocations)


def unit(planned: Plan) -> int:
    """The columns of which a slab has some multiple."""
    tiles = planned.tiles
    return tiles.slab.n if planned.engine == "torch" else max(tiles.slab.n, tiles.grad_weight.m)


# ---- modes


@pytest.mark.parametrize("memory", ["lean", "auto", "speed"])
def test_a_large_problem_is_planned_within_its_slab(engine: str, memory: str) -> None:
    loss = Step("loss", large(), EVERYTHING, engine, memory)
    forward, backward = plan(loss, CPU), plan(loss.gradient(ALL), CPU)
    vectors = 8192 * 4 * 16  # at most sixteen numbers for each token
    logits_bytes = 8192 * 128256 * 4  # float32
    assert nbytes(forward) <= vectors + (CPU_SLAB_BYTES if engine == "torch" else PROJECTION_BYTES)
    assert nbytes(forward) < logits_bytes / 50

    slab, rows = bytes_of(backward, "slab"), 8192 * 4096 * 4
    assert rows <= backward.workspace_bytes - slab <= rows + vectors
    if engine == "torch":
        assert slab <= CPU_SLAB_BYTES
    elif memory == "lean":
        assert backward.workspace_bytes <= LEAN_BYTES
    else:
        assert slab <= SLAB_BYTES[memory]
    if memory != "speed":
        assert backward.workspace_bytes < logits_bytes / 5
        assert nbytes(backward) < logits_bytes / 2  # the gradients themselves included


@pytest.mark.parametrize("tokens", [300, LEAN_TOKENS, 4 * LEAN_TOKENS + 3, 32 * LEAN_TOKENS])
@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_lean_takes_little_more_than_its_rows(every_tiling: None, tokens: int, wanted: tuple[str, ...]) -> None:
    backward = plan(Step("loss", large(tokens), PLAIN, "triton", "lean").gradient(wanted), CPU)
    budget = LEAN_BYTES + max(0, tokens - LEAN_TOKENS) * LEAN_BYTES_PER_TOKEN
    rest = backward.workspace_bytes - bytes_of(backward, "slab")
    one_tile = tokens * unit(backward) * 2
    assert backward.workspace_bytes <= max(budget, rest + rest // 4, rest + one_tile)


@pytest.mark.parametrize("memory", ["lean", "auto", "speed", 10**9, 3 * 10**8 + 1])
def test_the_slab_is_whole_tiles_or_all_columns(engine: str, memory: str | int) -> None:
    for problem in (large(), one_shard(), linear()):
        backward = plan(Step("loss", problem, PLAIN, engine, memory).gradient(["x", "weight"]), CPU)
        (slab,) = (buffer for buffer in backward.workspace if buffer.name == "slab")
        held = backward.slab
        assert slab.shape == (problem.tokens, held if engine == "torch" else aligned(held))
        assert slab.dtype == (problem.dtype if engine == "triton" else torch.float32)
        assert held == problem.columns or held % unit(backward) == 0
        assert 0 < held <= problem.columns
    assert held == VOCAB  # a small problem is one slab


@pytest.mark.parametrize("columns", [1, 15, 16, 203])
def test_every_row_starts_where_a_tensor_descriptor_may(columns: int) -> None:
    assert aligned(columns) % 16 == 0
    assert columns <= aligned(columns) < columns + 16


@pytest.mark.parametrize("schedule", [{}, {"ahead": ("x", "weight")}], ids=["slabs", "ahead"])
@pytest.mark.parametrize("memory", ["lean", "auto", "speed"])
def test_nothing_grows_with_tokens_times_vocab(every_tiling: None, memory: str, schedule: dict[str, Any]) -> None:
    """With sixteen times the tokens, what is held beside rows of the hidden size and vectors stays as it was."""

    def held(tokens: int) -> int:
        loss = Step("loss", large(tokens, bias=False), PLAIN, "triton", memory, **schedule)
        per_token = 4 * 4096 * 4 + 256  # x packed, its gradient, and sums of either
        plans = [plan(loss, CPU), plan(loss.gradient(["x", "weight"]), CPU)]
        return max(nbytes(planned) for planned in plans) - tokens * per_token

    assert held(16 * 16384) <= max(held(16384), 0) + 16 * 16384 * LEAN_BYTES_PER_TOKEN


# ---- chunks


@pytest.mark.parametrize("tokens", [1, 5000, 65536, 65537, 200_000])
def test_chunks_are_whole_tiles_equal_and_within_their_bytes(every_tiling: None, tokens: int) -> None:
    loss = Step("loss", large(tokens, bias=False), PLAIN, "triton", "speed", ahead=("x", "weight"))
    planned = plan(loss, CPU)
    tile, row_bytes = planned.tiles.keep.m, 2 * 128256
    most = CHUNK_BYTES // (row_bytes * tile) * tile  # tokens
    chunks = -(-tokens // most)
    assert planned.chunk % tile == 0
    assert -(-tokens // planned.chunk) == chunks
    assert chunks * planned.chunk < tokens + chunks * tile
    assert bytes_of(planned, "exponentials") == planned.chunk * row_bytes <= CHUNK_BYTES
    assert planned.workspace_bytes <= CHUNK_BYTES + KEPT_STATISTICS_BYTES + planned.chunk * 4096 * 2 + 64 * tokens + MIB


def test_a_vocab_that_is_too_large_for_a_chunk_takes_one_tile(every_tiling: None) -> None:
    planned = plan(Step("loss", linear(200, vocab=100_000_000, bias=False), PLAIN, "triton", ahead=("x",)), CPU)
    assert planned.chunk == planned.tiles.keep.m


# ---- a number of bytes


@pytest.mark.parametrize("memory", [250_000_000, 512 * MIB, 2**31 + 7, 2**34])
def test_a_number_of_bytes_bounds_both_workspaces(engine: str, memory: int) -> None:
    """The slab is more than half of the widest, of those that keep the programs busy."""
    loss = Step("loss", large(), EVERYTHING, engine, memory)
    forward, backward = plan(loss, CPU), plan(loss.gradient(ALL), CPU)
    assert forward.workspace_bytes <= memory
    assert backward.workspace_bytes <= memory
    slab = bytes_of(backward, "slab")
    one_more_tile = slab // backward.slab * unit(backward)
    assert backward.slab == 128256 or backward.workspace_bytes + slab + one_more_tile > memory


@pytest.mark.parametrize("memory", [100 * MIB, 300_000_001, 2**31 + 7, 2**34])
@pytest.mark.parametrize(("hidden", "vocab"), [(4096, 128256), (2048, 32000), (1000, 5003), (24, 100)])
def test_what_is_kept_and_all_scratch_are_within_the_bytes(
    every_tiling: None, memory: int, hidden: int, vocab: int
) -> None:
    """With as many tokens as the exponentials are kept for, and with one more, whatever is wanted."""
    loss = Step("loss", large(1, hidden=hidden, vocab=vocab, bias=False), SERVED, "triton", memory)
    most, few, many = for_gradient(loss, ("x", "weight"), CPU)
    for tokens in sorted({1, most // 3, most, most + 1} - {0}):
        kept = few if tokens <= most else many
        step = replace(kept, problem=replace(kept.problem, leading=(tokens,)))
        exponentials = tokens * 2 * aligned(vocab) if step.keep else 0
        backward = [plan(step.gradient(wanted), CPU).workspace_bytes for wanted in SUBSETS]
        assert exponentials + max(plan(step, CPU).workspace_bytes, *backward) <= memory


@pytest.mark.parametrize("tokens", [1, 100, 5000, 70_000])
@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_slabs_are_within_the_least_bytes(every_tiling: None, tokens: int, wanted: tuple[str, ...]) -> None:
    """Those of any subset of the gradients, in the bytes that all of them need."""
    least = least_memory(Step("loss", large(tokens), EVERYTHING, "triton", 0))
    step = Step("loss", large(tokens), EVERYTHING, "triton", least)
    assert max(plan(step, CPU).workspace_bytes, plan(step.gradient(wanted), CPU).workspace_bytes) <= least


def narrow_linear() -> Problem:
    """A vocab of less than one tile: its slab is the whole vocab, and no wider."""
    return linear(vocab=5)


def one_shard() -> Problem:
    return replace(linear(vocab=2 * VOCAB), columns=VOCAB, shards=2)


def least_memory(step: Step) -> int:
    with pytest.raises(ValueError, match=r"^memory=0 bytes are too few: this call needs at least \d+$") as raised:
        plan(step, CPU)
    return int(str(raised.value).split()[-1])


@pytest.mark.parametrize("problem", [linear, narrow_linear, logits, one_shard])
def test_the_least_memory_is_named_and_is_enough(engine: str, problem: Callable[..., Problem]) -> None:
    step = Step("shard" if problem is one_shard else "loss", problem(), EVERYTHING, engine, memory=0)
    least = least_memory(step)
    enough = replace(step, memory=least)
    forward, backward = plan(enough, CPU), plan(enough.gradient(step.inputs), CPU)
    assert max(forward.workspace_bytes, backward.workspace_bytes) == least
    with pytest.raises(ValueError, match=f"^memory={least - 1} bytes are too few: this call needs at least {least}$"):
        plan(replace(step, memory=least - 1), CPU)


def test_the_least_memory_of_a_loss_that_keeps_exponentials_includes_them(every_tiling: None) -> None:
    step = Step("loss", linear(dtype=torch.bfloat16, bias=False), PLAIN, "triton", 0, keep=True)
    least = least_memory(step)
    forward, backward = plan(replace(step, memory=least), CPU), plan(step.gradient(["x", "weight"]), CPU)
    exponentials = TOKENS * aligned(VOCAB) * 2
    assert exponentials + max(forward.workspace_bytes, backward.workspace_bytes) == least


def test_where_memory_is_short_no_product_is_split(every_tiling: None) -> None:
    """Parts of a sum take more memory than one, and are there to be faster."""
    loss = Step("loss", linear(32, 64, 1000, torch.bfloat16, bias=False, class_weight=False), PLAIN, "triton", 0)
    least = least_memory(loss)
    short, ample = (plan(replace(loss, memory=memory).gradient(["x", "weight"]), CPU) for memory in (least, 2**30))
    assert (short.splits, short.workspace_bytes) == (1, least)
    assert ample.splits > 1 and ample.workspace_bytes > least


def test_the_least_memory_of_the_gradient_is_named_and_is_enough(engine: str) -> None:
    """The error is that of the loss, long before the gradient is asked for."""
    loss = Step("loss", linear(), replace(PLAIN, reduction="none"), engine)
    slab, rows = TOKENS * INTERPRETED.slab.n * 4, TOKENS * HIDDEN * 4  # a slab of one tile
    buffers = [slab, rows]
    if engine == "triton":  # packed_x, and row_target, valid_tokens and valid_count
        buffers += [TOKENS * aligned(HIDDEN) * 4, TOKENS * 4, TOKENS * 4, 4]
    least = sum(map(in_lines, buffers))
    enough = replace(loss, memory=least)
    assert plan(enough, CPU).step == enough
    backward = plan(enough.gradient(["x", "weight"]), CPU)
    assert (backward.workspace_bytes, backward.slab) == (least, INTERPRETED.slab.n)
    with pytest.raises(ValueError, match=f"^memory={least - 1} bytes are too few: this call needs at least {least}$"):
        plan(replace(loss, memory=least - 1), CPU)


@pytest.mark.parametrize(("tokens", "hidden", "vocab"), [(8192, 4096, 128256), (8192, 2304, 256000), (3, 5, 1000)])
def test_the_first_slabs_lie_where_no_row_of_the_weight_s_gradient_is_filled_yet(
    every_tiling: None, tokens: int, hidden: int, vocab: int
) -> None:
    loss = Step("loss", linear(tokens, hidden, vocab, torch.bfloat16), PLAIN, memory="lean")
    planned = plan(loss.gradient(("x", "weight")), torch.device("cpu"))
    first = 0
    for columns in planned.borrowed:
        assert columns > planned.slab
        assert columns % planned.tiles.grad_weight.m == 0
        start = (vocab * hidden - tokens * columns) // LINE * LINE
        assert start >= (first + columns) * hidden
        first += columns
    assert first < vocab or planned.borrowed == ()


def test_without_the_weight_s_gradient_no_slab_lies_in_it(every_tiling: None) -> None:
    loss = Step("loss", linear(8192, 4096, 128256, torch.bfloat16), PLAIN, memory="lean")
    assert plan(loss.gradient(("x",)), torch.device("cpu")).borrowed == ()
    assert plan(loss.gradient(("x", "weight")), torch.device("cpu")).borrowed


def test_in_float32_no_slab_lies_in_the_weight_s_gradient(every_tiling: None) -> None:
    """It would be wider than what is held beside, and its sums longer chains of additions."""
    loss = Step("loss", linear(8192, 4096, 128256, torch.float32), PLAIN, memory="lean")
    assert plan(loss.gradient(("x", "weight")), torch.device("cpu")).borrowed == ()
