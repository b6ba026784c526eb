"""What a call takes of memory: the ``memory`` it is given, and the program's own account."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
import torch

from core_kernels import Plan
from jax_api import fused_linear_ce
from tests.jax_api.problems import (
    LINEAR,
    OPTIONS,
    Loss,
    Operation,
    assert_close,
    assert_same_bits,
    each_operation,
    kernels_run,
)
from tests.support import on_gpu

MIB = 2**20


@pytest.mark.parametrize("memory", ("lean", "speed"))
def test_memory_changes_no_result(memory: str) -> None:
    problem = LINEAR.problem()
    automatic, _ = LINEAR.losses(problem, **OPTIONS)
    chosen, _ = LINEAR.losses(problem, memory=memory, **OPTIONS)
    compare = assert_same_bits if kernels_run() else assert_close
    compare(jax.value_and_grad(chosen)(problem.primals), jax.value_and_grad(automatic)(problem.primals))


def temporary_bytes(memory: str | int, differentiated: bool) -> int:
    """Scratch of the program compiled for 16384 tokens, 128000 classes and 64 hidden; nothing is run."""
    shapes = (
        jax.ShapeDtypeStruct((16384, 64), jnp.float32),
        jax.ShapeDtypeStruct((128000, 64), jnp.float32),
        jax.ShapeDtypeStruct((16384,), jnp.int32),
    )

    def loss(x: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
        return fused_linear_ce(x, weight, labels, memory=memory)

    program = jax.jit(jax.grad(loss, argnums=(0, 1)) if differentiated else loss).lower(*shapes).compile()
    analysis = program.memory_analysis()
    if analysis is None:
        pytest.skip("this backend does not tell what a program takes")
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("memory", ("lean", "auto", 300 * MIB))
@pytest.mark.parametrize("differentiated", (False, True), ids=("loss", "gradient"))
def test_the_logits_are_never_held_whole(memory: str | int, differentiated: bool, plans: list[Plan]) -> None:
    # Of all scratch at so many tokens; of the slab; of what was asked for. The rest is vectors and grad_x.
    limit = {"lean": 308 * MIB, "auto": 512 * MIB}.get(memory, memory)
    taken = temporary_bytes(memory, differentiated)
    assert taken <= limit + 32 * MIB
    assert taken < 16384 * 128000 * 4 / 10
    assert [plan.step.kind for plan in plans] == (["loss", "gradient"] if differentiated else ["loss"])
    needed = max(plan.workspace_bytes for plan in plans)
    assert needed > (16 * MIB if differentiated else 0)
    assert taken >= needed  # the workspace is the program's own, so that XLA accounts for it


def test_a_memory_of_bytes_can_be_as_small_as_the_error_says() -> None:
    """That is one tile of the vocabulary at a time: sums of ``dX`` in other parts, all else in the same bits.

    The loss alone says what the gradient would need.
    """
    problem = LINEAR.problem()

    def loss(memory: int | str) -> Loss:
        return LINEAR.losses(problem, memory=memory)[0]

    with pytest.raises(ValueError) as caught:
        loss(0)(problem.primals)
    found = re.match(r"memory=0 bytes are too few: this call needs at least (\d+)", str(caught.value))
    assert found
    least = int(found[1])
    small, usual = (jax.value_and_grad(loss(memory))(problem.primals) for memory in (least, "auto"))
    assert_close(small[1].pop("x"), usual[1].pop("x"))
    compare = assert_same_bits if kernels_run() else assert_close
    compare(small, usual)
    for differentiated in (lambda f: f, jax.grad, jax.value_and_grad):
        with pytest.raises(ValueError) as caught:
            differentiated(loss(least - 1))(problem.primals)
        assert str(caught.value) == f"memory={least - 1} bytes are too few: this call needs at least {least}"


@pytest.mark.skipif(not on_gpu(), reason="torch has an allocator of its own on a GPU")
@each_operation
def test_torch_allocates_nothing(operation: Operation) -> None:
    problem = operation.problem((64,))
    ours, _ = operation.losses(problem, **OPTIONS)
    step = jax.jit(jax.value_and_grad(ours))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        jax.block_until_ready(step(problem.primals))
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated() == before
