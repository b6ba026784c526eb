"""Plans: how a step runs on a device, and the scratch that it needs there.

A frontend asks for a plan, allocates every buffer that it lists, and hands all tensors to ``launch``. Plans are frozen
and hash by value.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from core_kernels.engine import choose_engine
from core_kernels.options import Options
from core_kernels.problem import Problem
from core_kernels.step import Buffer, Step
from core_kernels.tiles import Tile, choose_tile

MIB = 2**20
# Bytes of the slab, the piece of the logits or of their gradient that is held at a time.
SLAB_BYTES = {"lean": 128 * MIB, "auto": 512 * MIB, "speed": 4096 * MIB}
# On a CPU a larger slab wins nothing.
CPU_SLAB_BYTES = 64 * MIB


@dataclass(frozen=True)
class Plan:
    """One launch: a step, the engine that runs it, and its scratch. All buffers are the caller's, and filled."""

    step: Step
    engine: str
    tile: Tile
    workspace: tuple[Buffer, ...]
    slab: int = 0  # vocab columns of the projected logits, or rows of given ones, that the slab holds
    strips: int = 0  # into how many strips of the vocab the forward projection is split

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

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return self.step.results + self.workspace

    @property
    def workspace_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.workspace)


@functools.lru_cache(maxsize=1024)
def plan(step: Step, device: torch.device) -> Plan:
    """Plan ``step`` on ``device``; the logits are never held whole.

    Raises:
        ValueError: the step's engine does not run on ``device``; the bytes that its ``memory`` allows are too few for
            it or for the gradient that may follow.
    """
    chosen = _plan(step, device)
    if isinstance(step.memory, int) and step.kind in ("loss", "shard"):  # an error of this call, not of a later one
        least = max(chosen.workspace_bytes, _plan(step.gradient(step.inputs), device).workspace_bytes)
        if least > step.memory:
            raise ValueError(f"memory={step.memory} bytes are too few: this call needs at least {least}")
    return chosen


def _plan(step: Step, device: torch.device) -> Plan:
    engine = choose_engine(step.engine, device)
    tile = choose_tile(device, step.problem.dtype)
    strips = 0
    if engine == "triton" and step.problem.hidden is not None and step.kind in ("loss", "shard"):
        strips = _strips(step.problem, tile)
    workspace = _vectors(step, strips) if engine == "triton" else []
    if "grad_x" in (buffer.name for buffer in step.outputs):  # summed over slices of the vocab in float32, rounded once
        assert step.problem.hidden is not None
        workspace.append(Buffer("grad_rows", (step.problem.tokens, step.problem.hidden), torch.float32))
    slab = _add_slab(workspace, step, engine, tile)
    return Plan(step, engine, tile, tuple(workspace), slab, strips)


def _vectors(step: Step, strips: int) -> list[Buffer]:
    """What the kernels keep of each token, and the rows of the valid ones."""
    problem, options, n = step.problem, step.options, step.problem.tokens
    buffers = []
    if problem.hidden is not None and step.kind != "combine":  # tokens compacted: those that are not valid cost nothing
        buffers += [Buffer(name, (n,), torch.int32) for name in ("valid_tokens", "valid_position")]
        buffers.append(Buffer("valid_count", (1,), torch.int32))
    if strips:
        buffers.append(Buffer("target_logit", (n,), torch.float32))
        buffers += [Buffer(name, (strips, n), torch.float32) for name in ("strip_max", "strip_sum")]
        if options.label_smoothing > 0:
            buffers.append(Buffer("strip_smooth", (strips, n), torch.float32))
        if options.needs_argmax:
            buffers.append(Buffer("strip_argmax", (strips, n), torch.int32))
    if step.kind in ("loss", "combine") and not options.per_token:  # reduced in a second, ordered step: deterministic
        buffers += [Buffer(name, (n,), torch.float32) for name in ("token_loss", "token_z_loss")]
        if options.return_token_accuracy or options.return_counts:
            buffers.append(Buffer("token_correct", (n,), torch.float32))
    if "grad_weight" in (buffer.name for buffer in step.outputs):  # x of the valid tokens, side by side
        assert problem.hidden is not None
        buffers.append(Buffer("valid_x", (n, aligned(problem.hidden)), problem.dtype))
    return buffers


def _strips(problem: Problem, tile: Tile) -> int:
    """Strips enough to fill a GPU with (token tile, strip) programs; their results stay small however many tokens."""
    token_tiles = max(1, math.ceil(problem.tokens / tile.m))
    return min(math.ceil(problem.columns / tile.n), math.ceil(tile.programs / token_tiles))


def _add_slab(workspace: list[Buffer], step: Step, engine: str, tile: Tile) -> int:
    """Append the slab, as large as ``memory`` allows but at least one unit, and return its columns or rows."""
    problem, memory = step.problem, step.memory
    dtype = problem.dtype if engine == "triton" else torch.float32
    if problem.hidden is None:  # some rows of all columns
        across, limit, unit = problem.vocab, problem.tokens, 1
    else:  # some columns of all rows: whole tiles, so that slicing never changes a bit
        across, limit, unit = problem.tokens, problem.columns, tile.n
    unit_bytes = max(1, across * min(unit, aligned(limit))) * dtype.itemsize

    if isinstance(memory, str):
        units = max(1, (SLAB_BYTES[memory] if engine == "triton" else CPU_SLAB_BYTES) // unit_bytes)
    else:
        units = max(1, (memory - sum(buffer.nbytes for buffer in workspace)) // unit_bytes)
    by_kernels = problem.hidden is not None and step.kind == "gradient"
    if not (by_kernels if engine == "triton" else step.kind != "combine"):
        return 0
    held = min(units * unit, limit)
    shape = (held, across) if problem.hidden is None else (across, aligned(held) if engine == "triton" else held)
    workspace.append(Buffer("slab", shape, dtype))
    return held


def aligned(columns: int) -> int:
    """A row length whose rows all start where a tensor descriptor, and a wide load, may start."""
    return math.ceil(columns / 16) * 16
