"""Plans: how a step runs on a device, and the scratch that it needs there.

A frontend asks for a plan, allocates what it lists, and hands all tensors to ``launch``. Plans are frozen and hash by
value.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core_kernels.engine import choose_engine
from core_kernels.notices import say_once
from core_kernels.options import Options
from core_kernels.problem import Problem
from core_kernels.step import KEPT_STATISTICS_BYTES, MIB, Buffer, Step, aligned, most_sorted, why_not_kept
from core_kernels.tiles import Tile, Tiles, choose_tiles

# Bytes of the slab, the piece of the logits or of their gradient that is held at a time.
SLAB_BYTES = {"auto": 512 * MIB, "speed": 4096 * MIB}
# Bytes of all scratch of a lean backward pass over few tokens, and for each token more; at least a quarter of what its
# rows take goes to the slab.
LEAN_BYTES, LEAN_TOKENS, LEAN_BYTES_PER_TOKEN = 252 * MIB, 8192, 7 * 1024
# On a CPU a larger slab wins nothing.
CPU_SLAB_BYTES = 64 * MIB
# Bytes of the tiles' statistics, and of packed rows, that a projection holds at a time.
PROJECTION_BYTES = 28 * MIB
# Bytes of the exponentials of a chunk of tokens whose gradients are computed ahead.
CHUNK_BYTES = 2720 * MIB
# A product of so many rounds of tiles does not mind a last one that is not full.
MOST_ROUNDS = 16
# What it takes to carry a tile's sums from slab to slab, in columns summed over.
CARRY = 512
# Bytes of which each buffer of the workspace starts at a multiple: a line of a GPU's cache.
LINE = 128
# Strips of a shard of the vocab, for each program that runs at a time: enough that none waits long for the last.
STRIPS = 16


@dataclass(frozen=True)
class Plan:
    """One launch: a step, the engine that runs it, and its scratch. All buffers are the caller's, and filled."""

    step: Step
    engine: str
    tiles: Tiles
    workspace: tuple[Buffer, ...]
    slab: int = 0  # vocab columns of the projected logits, or rows of given ones, that the slab holds
    borrowed: tuple[int, ...] = ()  # columns of the first slabs, that the weight's gradient has room for until filled
    ranks: int = 0  # valid tokens whose tiles' statistics are held at a time
    chunk: int = 0  # valid tokens whose exponentials are there at a time
    strips: int = 0  # into how many strips a shard of the vocab is split
    split_tiles: int = 0  # token tiles of ``x``'s gradient that are summed in parts, and
    splits: int = 1  # in how many

    @property
    def problem(self) -> Problem:
        return self.step.problem

    @property
    def options(self) -> Options:
        return self.step.options

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.step.inputs

    @property
    def outputs(self) -> tuple[Buffer, ...]:
        return self.step.outputs

    @property
    def saved(self) -> tuple[Buffer, ...]:
        return self.step.saved

    @functools.cached_property
    def allocations(self) -> tuple[Buffer, ...]:
        """What the caller provides beside the inputs: the results, and all of the workspace in one."""
        whole = (Buffer("workspace", (self.workspace_bytes,), torch.uint8),) if self.workspace else ()
        return self.step.results + whole

    @property
    def workspace_bytes(self) -> int:
        return _bytes(self.workspace)

    def with_workspace(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``tensors`` with each buffer of the workspace, which may also have been given one by one."""
        if "workspace" not in tensors:
            return tensors
        whole, split = tensors["workspace"], dict(tensors)
        starts = itertools.accumulate(map(_in_lines, self.workspace), initial=0)
        for buffer, start in zip(self.workspace, starts, strict=False):
            split[buffer.name] = whole[start : start + buffer.nbytes].view(buffer.dtype).view(buffer.shape)
        return split

    @property
    def first_part(self) -> int:
        """The row of the sums of ``x``'s gradient where those of the second part begin."""
        return _first_part(self.problem.tokens, self.tiles)

    @functools.cached_property
    def varying(self) -> tuple[str, ...]:
        """Names of the tensors whose strides or dtypes are the caller's choice: not what a loss fills or saved."""
        saved = {buffer.name for buffer in self.step.of_kind("loss").saved}
        gradients = self.outputs if self.step.kind == "gradient" else ()
        return (*(name for name in self.inputs if name not in saved), *(buffer.name for buffer in gradients))

    @functools.cached_property
    def records(self) -> dict[tuple, Any]:
        """The launches of its runs, which the Triton engine keeps here: no part of the plan's value."""
        return {}


@functools.lru_cache(maxsize=1024)
def plan(step: Step, device: torch.device) -> Plan:
    """Plan ``step`` on ``device``; the logits are never held whole, and their exponentials only if the step keeps them.

    Raises:
        ValueError: the step's engine does not run on ``device``; the bytes that its ``memory`` allows are too few for
            it or for the gradient that may follow.
    """
    chosen = _plan(step, device)
    if isinstance(step.memory, int) and step.kind in ("loss", "shard"):  # an error of this call, not of a later one
        kept = sum(buffer.nbytes for buffer in step.saved if buffer.name == "exponentials")
        least = kept + max(chosen.workspace_bytes, _plan(step.gradient(step.inputs), device).workspace_bytes)
        if least > step.memory:
            raise ValueError(f"memory={step.memory} bytes are too few: this call needs at least {least}")
    return chosen


def _plan(step: Step, device: torch.device) -> Plan:
    engine = choose_engine(step.engine, device)
    tiles = choose_tiles(device, step.problem.dtype, step.problem.hidden)
    if engine == "torch" or step.problem.hidden is None:
        workspace = _of_tokens(step) if engine == "triton" else _rows_of_torch(step)
        slab = _slab_of_torch(workspace, step, tiles) if engine == "torch" and step.kind != "combine" else 0
        return Plan(step, engine, tiles, tuple(workspace), slab)
    if step.kind == "gradient":
        return _gradient(step, tiles)
    workspace = _of_tokens(step)
    if step.kind == "combine":
        return Plan(step, engine, tiles, tuple(workspace))
    workspace += _compaction(step)
    if not step.keep:
        workspace.append(Buffer("label_logit", (step.problem.tokens,), torch.float32))
    if step.finds_argmax:
        workspace.append(Buffer("row_argmax", (step.problem.tokens,), torch.int32))
    if step.kind == "shard":
        strips = _strips(step.problem, tiles)
        workspace += _statistics(step, "strip", strips, step.problem.tokens)
        return Plan(step, engine, tiles, tuple(workspace), strips=strips)
    chunk = _chunk(step, tiles)
    if chunk:
        workspace.append(_packed_rows(step, chunk))
    if step.ahead:
        workspace += _chunk_buffers(step, chunk)
    tile = _projection(step, tiles)
    packs = tile.specialized and not (step.keep or step.ahead)
    if isinstance(step.memory, int) and _bytes([*workspace, *_at_a_time(step, tile, tile.m, packs)]) > step.memory:
        packs = False
    ranks = _ranks(workspace, step, tile, packs)
    workspace += _at_a_time(step, tile, ranks, packs)
    return Plan(step, engine, tiles, tuple(workspace), ranks=ranks, chunk=chunk)


def _projection(step: Step, tiles: Tiles) -> Tile:
    return tiles.keep if step.keep or step.ahead else tiles.project


def _chunk(step: Step, tiles: Tiles) -> int:
    """Valid tokens whose exponentials are there at a time: all, or whole tiles of chunks that are equal, or none."""
    tokens, tile = step.problem.tokens, tiles.keep
    if not step.ahead or tokens == 0:
        return tokens if step.keep else 0
    most = min(CHUNK_BYTES // (2 * aligned(step.problem.columns)), most_sorted(step.problem))
    most = max(1, most // tile.m) * tile.m
    return math.ceil(tokens / math.ceil(tokens / most) / tile.m) * tile.m


def _chunk_buffers(step: Step, chunk: int) -> list[Buffer]:
    """Exponentials of a chunk of tokens, and what their gradient needs."""
    n, columns = step.problem.tokens, step.problem.columns
    buffers = [Buffer("exponentials", (chunk, aligned(columns)), step.problem.dtype)]
    buffers += [Buffer(name, (n,), torch.float32) for name in ("row_target", "row_soft", "label_kept")]
    return buffers + (_label_buffers(chunk, columns) if "weight" in step.ahead else [])


def _label_buffers(tokens: int, columns: int) -> list[Buffer]:
    """Tokens in the order of their labels, and where the first of each label is."""
    buffers = [Buffer(name, (tokens,), torch.int32) for name in ("sorted_labels", "sorted_tokens")]
    return [*buffers, Buffer("label_slot", (columns,), torch.int32)]


def _of_tokens(step: Step) -> list[Buffer]:
    """Each token's loss and metrics, which are reduced in a second, ordered step: deterministic."""
    options, n = step.options, step.problem.tokens
    if step.kind not in ("loss", "combine") or options.per_token:
        return []
    buffers = [Buffer(name, (n,), torch.float32) for name in ("token_loss", "token_z_loss")]
    if options.return_token_accuracy or options.return_counts:
        buffers.append(Buffer("token_correct", (n,), torch.float32))
    return buffers


def _compaction(step: Step) -> list[Buffer]:
    """The numbers of the valid tokens: those that are not valid cost nothing. Where they are saved, nothing."""
    n = step.problem.tokens
    buffers = [] if step.keep else [Buffer("valid_tokens", (n,), torch.int32), Buffer("valid_count", (1,), torch.int32)]
    by_token = step.kind == "shard" or (step.kind == "gradient" and step.ahead)
    return [*buffers, *([Buffer("valid_position", (n,), torch.int32)] if by_token else [])]


def _statistics(step: Step, part: str, parts: int, ranks: int) -> list[Buffer]:
    """What the kernels learn of each part of a row of logits."""
    relative = step.keep or step.ahead  # to the label's logit
    names = ["sum", *(["smooth"] if step.options.label_smoothing > 0 else [])]
    buffers = [Buffer(f"{part}_{name}", (parts, ranks), torch.float32) for name in names]
    if step.options.needs_argmax or not relative:
        dtype = step.problem.dtype if step.finds_argmax else torch.float32
        buffers.append(Buffer(f"{part}_max", (parts, ranks), dtype))
    if step.options.needs_argmax and not step.finds_argmax:
        buffers.append(Buffer(f"{part}_argmax", (parts, ranks), torch.int32))
    return buffers


def _at_a_time(step: Step, tile: Tile, ranks: int, packs: bool) -> list[Buffer]:
    """What is held of the tokens that one launch projects: the statistics of all vocab tiles, and their rows of ``x``
    if it ``packs`` them.
    """
    statistics = _statistics(step, "tile", math.ceil(step.problem.columns / tile.n), ranks)
    return [*statistics, *([_packed_rows(step, ranks)] if packs else [])]


def _packed_rows(step: Step, rows: int) -> Buffer:
    """Room for so many rows of ``x``, one after the other, for a descriptor."""
    assert step.problem.hidden is not None
    return Buffer("packed_x", (rows, aligned(step.problem.hidden)), step.problem.dtype)


def _ranks(workspace: list[Buffer], step: Step, tile: Tile, packs: bool) -> int:
    """How many tokens a launch projects: whole tiles, in launches that are equal."""
    tokens = step.problem.tokens
    budget = KEPT_STATISTICS_BYTES if step.keep or step.ahead else PROJECTION_BYTES
    of_tile = _at_a_time(step, tile, tile.m, packs)
    if isinstance(step.memory, int) and not step.keep:
        budget = min(budget, step.memory - _bytes(workspace) - len(of_tile) * LINE)
    token_tiles = math.ceil(tokens / tile.m)
    launches = math.ceil(token_tiles / max(1, budget // sum(buffer.nbytes for buffer in of_tile)))
    return max(1, math.ceil(token_tiles / launches)) * tile.m if tokens else tile.m


def _strips(problem: Problem, tiles: Tiles) -> int:
    """Strips enough to fill a GPU with programs, one a token tile and strip; few, so that their results stay small."""
    tile = tiles.project
    token_tiles = max(1, math.ceil(problem.tokens / tile.m))
    return min(math.ceil(problem.columns / tile.n), math.ceil(STRIPS * tiles.programs(tile) / token_tiles))


def _gradient(step: Step, tiles: Tiles) -> Plan:
    """From kept exponentials, or slab by slab; the slab is as large as ``memory`` allows, but at least a tile wide."""
    problem, memory = step.problem, step.memory
    n, hidden, columns = problem.tokens, problem.hidden, problem.columns
    assert hidden is not None
    if step.ahead:
        return Plan(step, "triton", tiles, tuple(_compaction(step) if "x" in step.wanted else ()))
    split_tiles, splits = _splits(n, hidden, columns, tiles) if "x" in step.wanted else (0, 1)
    sums = _first_part(n, tiles) + (splits - 1) * split_tiles * tiles.grad_x.m if splits > 1 else n
    workspace = [*_compaction(step), *_rows(step, sums)]
    least_slab = [] if step.keep else [_slab_buffer(step, min(_slab_unit(tiles), columns))]
    if isinstance(memory, int) and _bytes([*workspace, *least_slab]) > memory:
        split_tiles, splits = 0, 1  # parts take more sums
        workspace = [*_compaction(step), *_rows(step, n)]
    held = columns
    if not step.keep:
        if memory == "speed":
            _say_that_speed_is_not_met(step)
        rest = _bytes(workspace)
        if memory == "lean":
            more = max(0, n - LEAN_TOKENS) * LEAN_BYTES_PER_TOKEN
            budget = max(LEAN_BYTES + more - rest, rest // 4)
        else:
            budget = SLAB_BYTES[memory] if isinstance(memory, str) else _whole_lines(memory - rest)
        held = _slab(step, tiles, budget)
        workspace.append(_slab_buffer(step, held))
    borrowed = () if step.keep else _borrowed(step, tiles, held)
    return Plan(step, "triton", tiles, tuple(workspace), held, borrowed, split_tiles=split_tiles, splits=splits)


def _first_part(tokens: int, tiles: Tiles) -> int:
    return math.ceil(tokens / tiles.grad_x.m) * tiles.grad_x.m


def _say_that_speed_is_not_met(step: Step) -> None:
    why = why_not_kept(step)
    if why is None and step.options.per_token:
        why = "there are too many for reduction='none'"
    why = why or "the loss was computed before it was known that a gradient would be"
    say_once(
        "memory='speed' would keep the exponentials of the logits for the backward pass, which projects them again, "
        f"because {why}"
    )


def _rows(step: Step, sums: int) -> list[Buffer]:
    """Rows for the backward products: those of ``x``, packed, and so many float32 sums; and what belongs to labels.

    The sums are those of labels' classes first, and of ``x``'s gradient after. In ``x``'s gradient itself the packed
    rows find their place, if a descriptor can have it.
    """
    n, hidden = step.problem.tokens, step.problem.hidden
    assert hidden is not None
    buffers = []
    packs = "weight" in step.wanted or not step.keep
    if packs and not ("x" in step.wanted and hidden == aligned(hidden)):
        buffers.append(_packed_rows(step, n))
    smoothed = step.options.label_smoothing > 0
    factors = ["row_target"]
    factors += ["row_soft"] if step.keep or smoothed or step.options.lse_square_scale > 0 else []
    factors += ["row_uniform"] if smoothed else []
    factors += ["label_kept"] if step.keep else []
    buffers += [Buffer(name, (n,), torch.float32) for name in factors]
    if step.keep and "weight" in step.wanted:
        buffers += _label_buffers(n, step.problem.columns)
    if "x" in step.wanted or (step.keep and "weight" in step.wanted):
        buffers.append(Buffer("rows", (sums, hidden), torch.float32))
    return buffers


def _splits(tokens: int, hidden: int, columns: int, tiles: Tiles) -> tuple[int, int]:
    """How many token tiles of ``x``'s gradient are summed in parts, and in how many, so that few programs wait.

    A few tiles are all split; of more, those that would be a last round for less than half of the programs.
    """
    tile, programs = tiles.grad_x, tiles.programs(tiles.grad_x)
    token_tiles, hidden_tiles = math.ceil(tokens / tile.m), math.ceil(hidden / tile.n)
    count = token_tiles * hidden_tiles
    if 0 < 2 * count <= programs:
        splits = min(programs // count, math.ceil(columns / (4 * tile.k)))
        return (token_tiles, splits) if splits > 1 else (0, 1)
    left = count % programs
    if programs < count < MOST_ROUNDS * programs and 0 < left <= programs // 2:
        return math.ceil(left / hidden_tiles), 2
    return 0, 1


def _slab(step: Step, tiles: Tiles, budget: int) -> int:
    """Columns of a slab of at most so many bytes."""
    unit, columns = _slab_unit(tiles), step.problem.columns
    widest = max(1, budget // max(1, step.problem.tokens * unit * step.problem.dtype.itemsize)) * unit
    return columns if widest >= columns else _best_width(step, tiles, widest)


def _borrowed(step: Step, tiles: Tiles, held: int) -> tuple[int, ...]:
    """Columns of the first slabs, which lie where the last rows of the weight's gradient will, while there is room for
    more than what is ``held`` beside it: rows that are not filled yet hold the slab. Not in float32, where the sum of
    a wide slab, a long chain of additions, would be the least exact thing here.
    """
    if step.problem.dtype == torch.float32:
        return ()
    n, hidden, rest, unit = step.problem.tokens, step.problem.hidden or 0, step.problem.columns, _slab_unit(tiles)
    widths: list[int] = []
    while "weight" in step.wanted and n:
        widest = (rest * hidden - LINE) // (n + hidden) // unit * unit
        width = _best_width(step, tiles, widest) if widest > held else 0
        if width <= held:
            break
        widths.append(width)
        rest -= width
    return tuple(widths)


def _best_width(step: Step, tiles: Tiles, widest: int) -> int:
    """Columns of a slab: whole tiles, of the widths up to the ``widest`` the one that keeps the programs busiest.

    A product's time is its rounds of tiles, one a program, times what it sums over; a sum that goes on from the slab
    before is read and stored.
    """
    problem, unit = step.problem, _slab_unit(tiles)
    n, hidden, columns = problem.tokens, problem.hidden or 0, problem.columns

    def rounds(tile: Tile, rows: int, across: int) -> int:
        return math.ceil(math.ceil(rows / tile.m) * math.ceil(across / tile.n) / tiles.programs(tile))

    def time(width: int) -> float:
        of_slab = rounds(tiles.slab, n, width) * hidden
        of_weight = rounds(tiles.grad_weight, width, hidden) * n
        of_x = rounds(tiles.grad_x, n, hidden) * (width + CARRY)
        return math.ceil(columns / width) * (of_slab + of_weight + of_x)

    return min(range(widest, widest // 2, -unit), key=time)


def _slab_buffer(step: Step, columns: int) -> Buffer:
    return Buffer("slab", (step.problem.tokens, aligned(columns)), step.problem.dtype)


def _slab_unit(tiles: Tiles) -> int:
    """Columns of which a slab has a multiple: whole tiles of all that walk it."""
    return math.lcm(tiles.slab.n, tiles.grad_weight.m, tiles.grad_x.k)


def _rows_of_torch(step: Step) -> list[Buffer]:
    if step.kind != "gradient" or "x" not in step.wanted:
        return []
    assert step.problem.hidden is not None
    return [Buffer("grad_rows", (step.problem.tokens, step.problem.hidden), torch.float32)]


def _slab_of_torch(workspace: list[Buffer], step: Step, tiles: Tiles) -> int:
    """Append a slab of float32 logits: some rows of given ones, some columns of projected ones; answer how many."""
    problem, memory = step.problem, step.memory
    across, limit, unit = problem.tokens, problem.columns, tiles.slab.n
    if problem.hidden is None:
        across, limit, unit = limit, across, 1
    budget = CPU_SLAB_BYTES if isinstance(memory, str) else _whole_lines(memory - _bytes(workspace))
    held = min(max(1, budget // max(1, 4 * across * min(unit, limit))) * unit, limit)
    workspace.append(Buffer("slab", (held, across) if problem.hidden is None else (across, held), torch.float32))
    return held


def _bytes(buffers: Iterable[Buffer]) -> int:
    return sum(map(_in_lines, buffers))


def _in_lines(buffer: Buffer) -> int:
    return math.ceil(buffer.nbytes / LINE) * LINE


def _whole_lines(budget: int) -> int:
    return budget // LINE * LINE
