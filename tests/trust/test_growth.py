"""Nothing grows with the number of calls, nor, beyond what caches may hold, with that of shapes and options."""

from __future__ import annotations

import functools
import gc
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
import torch

import core_kernels
import jax_api
import torch_api
from jax_api.bridge import PlanCallback
from tests.jax_api import problems
from tests.support import interpreting, on_gpu, suite_device
from tests.torch_api.calls import gradients, random_arguments
from tests.trust.process import run_well

CALLS = 25 if interpreting() else 10_000
SHAPES = 1100  # more than the caches of torch_api hold
# 10,000 steps of plain torch, and of plain JAX, themselves leave up to 150 KiB; Python takes some pieces, now and then.
MOST_BYTES, MOST_BLOCKS = 2**20, 150 if interpreting() else 500

Growth = dict[str, int]


def growth(calls: Callable[[], None]) -> Growth:
    """What more the process holds after ``calls``: bytes on the host and on the GPU, and Python's pieces of memory."""
    held()  # which asks JAX for its GPU: that too is there then
    before = held()
    calls()
    return {name: now - before[name] for name, now in held().items()}


def held() -> Growth:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    sizes = {"bytes": pages * resource.getpagesize(), "blocks": sys.getallocatedblocks()}
    if on_gpu():
        torch.cuda.synchronize()
        sizes["torch_gpu"] = torch.cuda.memory_allocated()
        sizes["xla_gpu"] = jax.devices()[0].memory_stats()["bytes_in_use"]
    return sizes


@pytest.mark.parametrize("frontend", ("torch", "jax"))
def test_calls_leave_nothing_behind(frontend: str) -> None:
    grown = [json.loads(line) for line in run_well(make_calls, frontend).splitlines()]
    assert grown
    for growth in grown:
        assert growth.pop("bytes") <= MOST_BYTES
        assert growth.pop("blocks") <= MOST_BLOCKS
        assert not any(growth.values()), growth  # on a GPU, not a byte


def make_calls(frontend: str) -> None:
    if frontend == "torch":
        print(json.dumps(growth_of_torch()))
        if not interpreting():
            print(json.dumps(growth_over_shapes()))
    else:
        print(json.dumps(growth_of_jax()))


def growth_of_torch() -> Growth:
    arguments = random_arguments(torch_api.fused_linear_cross_entropy, suite_device(), (5,), vocab=19)

    def calls(times: int = CALLS) -> None:
        for _ in range(times):
            gradients(torch_api.fused_linear_cross_entropy(**arguments, softcap=5.0), arguments)

    calls(CALLS // 10)  # and all is there that will be
    return growth(calls)


def growth_over_shapes() -> Growth:
    """Over shapes that no call had, after caches are full."""
    weight = torch.randn(19, 8, device=suite_device(), requires_grad=True)

    def calls(first: int) -> None:
        for tokens in range(first, first + SHAPES):
            x, labels = weight[:1].expand(tokens, -1), torch.zeros(tokens, dtype=torch.int64, device=weight.device)
            torch.autograd.grad(torch_api.fused_linear_cross_entropy(x, weight, labels), weight)

    calls(2)
    return growth(lambda: calls(2 + SHAPES))


def growth_of_jax() -> Growth:
    problem = problems.LINEAR.problem((5,), vocab=19)
    loss, _ = problems.LINEAR.losses(problem, **problems.OPTIONS)
    step = jax.jit(jax.value_and_grad(loss))

    def calls(times: int = CALLS) -> None:
        for _ in range(times):
            jax.block_until_ready(step(problem.primals))

    calls(CALLS // 10)
    return growth(calls)


def programs() -> int:
    """How many launches JAX's compiled programs hold."""
    gc.collect()
    return sum(type(thing) is PlanCallback for thing in gc.get_objects())


def test_a_program_of_jax_is_all_that_a_shape_leaves_and_goes_with_it() -> None:
    jax.clear_caches()
    assert programs() == 0
    steps = []  # a compiled function's programs go with it
    for tokens in (3, 4):
        problem = problems.LINEAR.problem((tokens,), vocab=19)
        loss, _ = problems.LINEAR.losses(problem)
        for transform in (problems.eagerly, jax.jit):
            steps.append(transform(jax.value_and_grad(loss)))
            for _ in range(2):
                jax.block_until_ready(steps[-1](problem.primals))
    assert programs() == 2 * 2 * 2  # shapes, eager and compiled, forward and backward
    jax.clear_caches()
    assert programs() == 0


def test_every_cache_is_bounded() -> None:
    """Those without arguments, by class of model, by GPU, and of what there is to say, hold as many as there are."""
    packages = tuple(f"{package.__name__}." for package in (core_kernels, torch_api, jax_api))
    caches = [
        cache
        for cache in gc.get_objects()
        if type(cache) is functools._lru_cache_wrapper and cache.__module__.startswith(packages)
    ]
    unbounded = {cache.__qualname__ for cache in caches if cache.cache_parameters()["maxsize"] is None}
    assert len(caches) > 10
    known = {"measured", "_names", "fused_class", "_output_class", "say_once", "driver", "capturing_stream"}
    assert unbounded <= known
