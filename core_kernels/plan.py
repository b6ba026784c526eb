"""Plans: what a launch reads, fills and needs for scratch, computed from shapes, dtypes, options and the device alone.

A frontend asks for a plan, allocates every buffer that it lists, and hands all tensors to ``launch``. Plans are frozen
and hash by value, so they can be static parameters of a compiled program.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from core_kernels.engine import choose_engine
from core_kernels.options import Options
from core_kernels.problem import Problem
from core_kernels.tiles import Tile, choose_tile

MIB = 2**20
# Bytes of the slab, the piece of the logits or of their gradient that is held at a time.
SLAB_BYTES = {"lean": 128 * MIB, "auto": 512 * MIB, "speed": 4096 * MIB}
# On a CPU a larger slab wins nothing.
CPU_SLAB_BYTES = 64 * MIB


@dataclass(frozen=True)
class Buffer:
    """A tensor that the caller provides: contiguous, uninitialised, on the inputs' device."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """One launch. ``inputs`` names what it reads; all buffers are filled by it, ``saved`` for the backward launch."""

    backward: bool
    problem: Problem
    options: Options
    engine: str
    device_type: str
    memory: str | int
    tile: Tile
    inputs: tuple[str, ...]
    outputs: tuple[Buffer, ...]
    saved: tuple[Buffer, ...]
    workspace: tuple[Buffer, ...]
    slab: int  # vocab columns of the projected logits, or rows of given ones, that the slab holds
    strips: int  # into how many strips of the vocab the forward projection is split

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return self.outputs + self.saved + self.workspace

    @property
    def workspace_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.workspace)


def plan_forward(
    problem: Problem,
    options: Options,
    device: torch.device,
    *,
    engine: str = "auto",
    memory: str | int = "auto",
    index_dtype: torch.dtype = torch.int64,
) -> Plan:
    """Plan the loss and the metrics that ``options`` asks for; the logits are never held whole."""
    engine = choose_engine(engine, device)
    tile = choose_tile(device, problem.dtype)
    n = problem.tokens
    per_token: tuple[int, ...] = (n,) if options.per_token else ()

    outputs = [Buffer("loss", per_token, torch.float32)]
    if options.return_z_loss:
        outputs.append(Buffer("z_loss", per_token, torch.float32))
    if options.return_token_accuracy:
        outputs.append(Buffer("token_accuracy", per_token, torch.float32))
    if options.return_predicted_tokens:
        outputs.append(Buffer("predicted_tokens", (n,), index_dtype))

    workspace = []
    if engine == "triton" and not options.per_token:  # reduced in a second, ordered step: deterministic
        workspace.append(Buffer("token_loss", (n,), torch.float32))
        workspace.append(Buffer("token_z_loss", (n,), torch.float32))
        if options.return_token_accuracy:
            workspace.append(Buffer("token_correct", (n,), torch.float32))

    strips = 0
    if engine == "triton" and problem.hidden is not None:
        strips = _strips(n, problem.vocab, tile)
        workspace.append(Buffer("target_logit", (n,), torch.float32))
        for name, dtype, wanted in (
            ("strip_max", torch.float32, True),
            ("strip_sum", torch.float32, True),
            ("strip_smooth", torch.float32, options.label_smoothing > 0),
            ("strip_argmax", torch.int32, options.needs_argmax),
        ):
            if wanted:
                workspace.append(Buffer(name, (strips, n), dtype))

    slab = _add_slab(workspace, problem, engine, tile, memory, needed=engine == "torch")
    plan = Plan(
        backward=False,
        problem=problem,
        options=options,
        engine=engine,
        device_type=device.type,
        memory=memory,
        tile=tile,
        inputs=_inputs(problem),
        outputs=tuple(outputs),
        saved=_saved(problem, options, engine),
        workspace=tuple(workspace),
        slab=slab,
        strips=strips,
    )
    if isinstance(memory, int):  # too little for the backward pass is an error of this call, not of a later one
        least = max(plan.workspace_bytes, plan_backward(plan, plan.inputs).workspace_bytes)
        if least > memory:
            raise ValueError(f"memory={memory} bytes are too few: this call needs at least {least}")
    return plan


def plan_backward(forward: Plan, wanted: Iterable[str]) -> Plan:
    """Plan the gradients of a planned loss by the inputs named in ``wanted``: ``logits``, or ``x, weight, bias``."""
    problem, engine = forward.problem, forward.engine
    n, v, h = problem.tokens, problem.vocab, problem.hidden
    names = [f"grad_{name}" for name in wanted]
    shapes: dict[str, tuple[int, ...]] = {"grad_logits": (n, v)}
    if h is not None:
        shapes = {"grad_x": (n, h), "grad_weight": (v, h), "grad_bias": (v,)}
    outputs = tuple(Buffer(name, shapes[name], problem.dtype) for name in shapes if name in names)

    workspace = []
    if h is not None and "grad_x" in names:  # summed over slices of the vocab in float32, rounded once
        workspace.append(Buffer("grad_rows", (n, h), torch.float32))
    if h is not None and "grad_weight" in names and engine == "triton":  # x of the valid tokens, side by side
        workspace.append(Buffer("valid_x", (n, aligned(h)), problem.dtype))
    needs_slab = h is not None or engine == "torch"
    slab = _add_slab(workspace, problem, engine, forward.tile, forward.memory, needed=needs_slab)
    return replace(
        forward,
        backward=True,
        inputs=(*forward.inputs, *(buffer.name for buffer in forward.saved), "grad_loss"),
        outputs=outputs,
        saved=(),
        workspace=tuple(workspace),
        slab=slab,
        strips=0,
    )


def _inputs(problem: Problem) -> tuple[str, ...]:
    names = ["logits"] if problem.hidden is None else ["x", "weight"]
    names.append("labels")
    if problem.has_bias:
        names.append("bias")
    if problem.has_class_weight:
        names.append("class_weight")
    return tuple(names)


def _saved(problem: Problem, options: Options, engine: str) -> tuple[Buffer, ...]:
    """What the backward launch reads beside the inputs. ``lse = row_max + log_sum``: the sum would round."""
    n = problem.tokens
    saved = [Buffer("row_max", (n,), torch.float32), Buffer("log_sum", (n,), torch.float32)]
    if options.use_token_scaling:
        saved.append(Buffer("token_scale", (n,), torch.float32))
    if options.reduction == "mean":
        saved.append(Buffer("divisors", (2,), torch.float32))
    if engine == "triton" and problem.has_class_weight and options.label_smoothing > 0:
        saved.append(Buffer("class_weight_sum", (1,), torch.float32))
    if engine == "triton" and problem.hidden is not None:
        saved.append(Buffer("valid_tokens", (n,), torch.int32))
        saved.append(Buffer("valid_position", (n,), torch.int32))
        saved.append(Buffer("num_valid", (1,), torch.int32))
    return tuple(saved)


def _strips(tokens: int, vocab: int, tile: Tile) -> int:
    """Strips enough to fill a GPU with (token tile, strip) programs; their results stay small however many tokens."""
    token_tiles = max(1, math.ceil(tokens / tile.m))
    return min(math.ceil(vocab / tile.n), math.ceil(tile.programs / token_tiles))


def _add_slab(
    workspace: list[Buffer], problem: Problem, engine: str, tile: Tile, memory: str | int, *, needed: bool
) -> int:
    """Append the slab, as large as ``memory`` allows but at least one step, and return its columns or rows."""
    dtype = problem.dtype if engine == "triton" else torch.float32
    if problem.hidden is None:  # some rows of all columns
        across, limit, step = problem.vocab, problem.tokens, 1
    else:  # some columns of all rows: whole tiles, so that slicing never changes a bit
        across, limit, step = problem.tokens, problem.vocab, tile.n
    unit = max(1, across * min(step, aligned(limit))) * dtype.itemsize

    if isinstance(memory, bool) or not isinstance(memory, (str, int)):
        raise TypeError(f"memory must be 'auto', 'speed', 'lean' or a number of bytes, got {memory!r}")
    if isinstance(memory, str):
        if memory not in SLAB_BYTES:
            raise ValueError(f"memory must be 'auto', 'speed', 'lean' or a number of bytes, got {memory!r}")
        units = max(1, (SLAB_BYTES[memory] if engine == "triton" else CPU_SLAB_BYTES) // unit)
    else:
        units = max(1, (memory - sum(buffer.nbytes for buffer in workspace)) // unit)
    if not needed:
        return 0
    held = min(units * step, limit)
    shape = (held, across) if problem.hidden is None else (across, aligned(held) if engine == "triton" else held)
    workspace.append(Buffer("slab", shape, dtype))
    return held


def aligned(columns: int) -> int:
    """A row length whose rows all start where a tensor descriptor, and a wide load, may start."""
    return math.ceil(columns / 16) * 16
