"""Every kernel compiles for a GPU where there is none: what it is launched with is compiled, and not launched.

The interpreter runs what no compiler accepts, as a variable that changes its type. Hopper's own kernels are compiled in
``test_specialized``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from core_kernels import Options, Step, plan
from core_kernels.engine import interpreting
from core_kernels.tiles import Row, Tile, Tiles
from tests.core_kernels.problems import (
    EVERYTHING,
    Tensors,
    differentiable,
    linear,
    logits,
    poisoned,
    random_inputs,
    shard_inputs,
    sharded,
)

pytestmark = pytest.mark.skipif(interpreting(), reason="what is interpreted is not compiled")

CPU = torch.device("cpu")
CAPABILITY = 90
SERVED = replace(EVERYTHING, label_smoothing=0.0, use_token_scaling=True)  # by kept exponentials
FOUND = replace(SERVED, softcap=None)  # and their argmax by them
PER_TOKEN = replace(FOUND, reduction="none", return_counts=True)

TILE, ROW = Tile(32, 64, 16, group=2, warps=4, stages=2), Row(256, 4)  # small, and of no two equal sides
TILES = Tiles(TILE, TILE, TILE, TILE, TILE, ROW, ROW, processors=132, overlap=False)


def type_of(value: Any) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
    if isinstance(value, Tensor):
        return f"*{names[value.dtype]}"
    if hasattr(value, "block_shape"):
        return f"tensordesc<{names[value.base.dtype]}{list(value.block_shape)}>"
    return "fp32" if isinstance(value, float) else "i32"


def compiling(kernel: Any) -> Callable[..., None]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compile_launch(*args: Any, **others: Any) -> None:
        fixed = {name: others.pop(name) for name in kernel.arg_names[len(args) :]}
        given = dict(zip(kernel.arg_names, args, strict=False))
        fixed |= {name: None for name, value in given.items() if value is None}
        signature = {n: "constexpr" if n in fixed else type_of(given[n]) for n in kernel.arg_names}
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): fixed[name] for name in fixed})
        triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=others)

    return compile_launch


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names of the kernels that steps launch, which are planned as for a GPU."""
    names: set[str] = set()

    def launching(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        names.add(kernel.__name__)
        return compiling(kernel)

    planning = sys.modules["core_kernels.plan"]
    monkeypatch.setattr(planning, "choose_engine", lambda engine, device: "triton")
    monkeypatch.setattr(planning, "choose_tiles", lambda device, dtype, hidden: TILES)
    for name in ("triton_engine", "triton_loss", "triton_ahead", "triton_gradient"):
        monkeypatch.setattr(importlib.import_module(f"core_kernels.{name}"), "launching", launching)
    planning.plan.cache_clear()
    yield names
    planning.plan.cache_clear()


def run(step: Step, inputs: Tensors) -> Tensors:
    from core_kernels import triton_engine

    planned = plan(step, CPU)
    buffers = poisoned(planned, CPU)
    operations = triton_engine.LOGITS if step.problem.hidden is None else triton_engine.LINEAR
    operations[step.kind](planned, {name: inputs[name] for name in step.inputs} | buffers)
    return buffers


STEPS = {
    "logits": Step("loss", logits(dtype=torch.bfloat16), EVERYTHING),
    "plain slabs": Step("loss", linear(dtype=torch.bfloat16), Options()),
    "slabs": Step("loss", linear(dtype=torch.bfloat16), EVERYTHING),
    "float32 slabs": Step("loss", linear(), EVERYTHING),
    "kept": Step("loss", linear(hidden=48, dtype=torch.bfloat16, bias=False), FOUND, keep=True),
    "kept, softcap": Step("loss", linear(hidden=48, dtype=torch.bfloat16, bias=False), SERVED, keep=True),
    "kept, strided": Step("loss", linear(hidden=33, dtype=torch.bfloat16, bias=False), PER_TOKEN, keep=True),
    "ahead": Step("loss", linear(hidden=48, dtype=torch.bfloat16, bias=False), FOUND, ahead=("x", "weight")),
}
OWN_KERNELS = {
    "logits": ("cross_entropy_forward", "cross_entropy_backward"),
    "plain slabs": ("project_statistics", "slab_gradient", "weight_gradient", "input_gradient"),
    "slabs": ("sum_class_weight", "bias_gradient"),
    "float32 slabs": ("slab_gradient",),
    "kept": ("find_columns", "repair_tokens", "sort_labels", "finish_label_rows", "finish_rows"),
    "kept, softcap": ("project_statistics", "repair_tokens"),
    "kept, strided": ("find_columns", "finish_tokens"),
    "ahead": ("mean_divisors", "scale_rows"),
}


@pytest.mark.parametrize("name", STEPS)
def test_every_kernel_of_a_step_compiles(name: str, compiled: set[str]) -> None:
    loss = STEPS[name]
    inputs = random_inputs(loss, CPU)
    run(loss.gradient(differentiable(loss.problem)), inputs | run(loss, inputs))
    assert set(OWN_KERNELS[name]) <= compiled


def test_every_kernel_of_a_sharded_step_compiles(compiled: set[str]) -> None:
    loss = Step("loss", linear(vocab=256, dtype=torch.bfloat16), EVERYTHING)
    inputs, shard = random_inputs(loss, CPU), sharded(loss, 2)
    parts = [run(shard, each)["shard_statistics"] for each in shard_inputs(inputs, 2)]
    run(loss.of_kind("combine"), inputs | {"shard_statistics": torch.stack(parts)})
    assert {"shard_statistics", "finish_shard", "finish_tokens"} <= compiled
