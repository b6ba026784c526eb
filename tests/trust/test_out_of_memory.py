"""A call that runs out of memory raises what its framework raises, and the calls after it are right to the bit.

Memory is limited in a process of its own: the address space on a CPU, on a GPU the allocators of torch and of XLA.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

import jax_api
import torch_api
from tests.jax_api import problems
from tests.support import interpreting, on_gpu, suite_device
from tests.torch_api.calls import Arguments, Loss, assert_all_same_bits, every_loss, gradients, random_arguments
from tests.trust.process import run_well

HEADROOM = 16 * 2**20  # what a small call may take beyond what is held
XLA_LIMIT = 512 * 2**20  # on a GPU: all that XLA may take
TOKENS, HIDDEN, VOCAB = 2**14, 16, 2**15  # on a GPU 1 GiB of exponentials, on a CPU slabs of 64 MiB
GIVEN = 2**12  # columns of given logits


@pytest.mark.skipif(interpreting(), reason="the interpreter takes too long over what takes much memory")
def test_out_of_memory_is_raised_and_survived() -> None:
    limit = {}
    if on_gpu():
        limit["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(XLA_LIMIT / torch.cuda.get_device_properties(0).total_memory)
    assert run_well(run_out_of_memory, **limit).split() == ["torch", "jax"]


def run_out_of_memory() -> None:
    run_out_in_torch(suite_device())
    print("torch")
    run_out_in_jax()
    print("jax")


def run_out_in_torch(device: torch.device) -> None:
    def small() -> Arguments:
        arguments = random_arguments(torch_api.fused_linear_cross_entropy, device)
        loss = torch_api.fused_linear_cross_entropy(**arguments)
        return gradients(loss, arguments) | {"loss": loss.detach()}

    before = small()
    x, weight = (torch.randn(n, HIDDEN, device=device).bfloat16().requires_grad_() for n in (TOKENS, VOCAB))
    labels = torch.randint(0, GIVEN, (TOKENS,), device=device)
    with torch_memory_limited(device):
        assert_runs_out(lambda: torch_api.fused_linear_cross_entropy(x, weight, labels))
        assert_all_same_bits(small(), before)

    row = torch.randn(1, GIVEN, device=device)
    logits = row.expand(TOKENS, -1).requires_grad_()
    loss = torch_api.cross_entropy(logits, labels)
    with torch_memory_limited(device):
        assert_runs_out(loss.backward)
        assert_all_same_bits(small(), before)
    loss.backward()  # with room, it goes on where it could not
    alone = row.requires_grad_()
    torch_api.cross_entropy(alone, labels[:1]).backward()
    assert logits.grad is not None
    torch.testing.assert_close(TOKENS * logits.grad[:1], alone.grad, rtol=1e-6, atol=1e-7)


def assert_runs_out(call: Callable[[], object]) -> None:
    """And forget the error, whose traceback holds what was allocated before it."""
    try:
        call()
    except RuntimeError as error:
        assert isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        return
    pytest.fail("there was memory enough")


def run_out_in_jax() -> None:
    problem = problems.LINEAR.problem()
    loss, _ = problems.LINEAR.losses(problem, **problems.OPTIONS)
    small = jax.jit(jax.value_and_grad(loss))
    before = small(problem.primals)

    x, weight = (jnp.ones((n, HIDDEN), jnp.bfloat16) for n in (TOKENS, VOCAB))
    labels = jnp.zeros(TOKENS, jnp.int32)
    # Given logits and their gradient do not both fit, where the limit is that of the process.
    logits = jnp.ones((XLA_LIMIT * 3 // 5 // (4 * GIVEN) if on_gpu() else TOKENS // 4, GIVEN), jnp.float32)

    def forward(x: jax.Array, weight: jax.Array, labels: jax.Array) -> Any:
        return jax.vjp(lambda x, weight: jax_api.fused_linear_ce(x, weight, labels), x, weight)

    gradient = jax.grad(jax_api.cross_entropy)
    for function, operands in ((forward, (x, weight, labels)), (gradient, (logits, jnp.zeros(len(logits), jnp.int32)))):
        program = jax.jit(function).lower(*operands).compile()
        with address_space_limited():
            with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
                jax.block_until_ready(program(*operands))
            problems.assert_same_bits(small(problem.primals), before)


@contextmanager
def torch_memory_limited(device: torch.device) -> Iterator[None]:
    """To what is held now, and a little more."""
    if device.type == "cpu":
        with address_space_limited():
            yield
        return
    torch.cuda.empty_cache()
    held, all_of_it = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((held + HEADROOM) / all_of_it)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def address_space_limited() -> Iterator[None]:
    """On a CPU: to what is mapped now, and a little more. On a GPU the limit is XLA's, from the start."""
    if on_gpu():
        yield
        return
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + HEADROOM, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


# ---- every allocation, one after the other


@every_loss
def test_whichever_allocation_fails_nothing_is_left_behind(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, loss_fn: Loss
) -> None:
    """A step whose n-th buffer cannot be had raises that, and can be done again; so can its backward pass alone."""
    arguments = random_arguments(loss_fn, device, leading=(3,), vocab=40)
    loss = loss_fn(**arguments)
    want = gradients(loss, arguments) | {"loss": loss.detach()}
    empty, left = torch.empty, 0

    def empty_or_fail(*shape: Any, **options: Any) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise torch.OutOfMemoryError("no room")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", empty_or_fail)

    def attempt(call: Callable[[], Any], allocations: int) -> Any:
        """What ``call`` answers, or ``None`` if it takes more."""
        nonlocal left
        left = allocations
        try:
            return call()
        except torch.OutOfMemoryError as error:
            assert str(error) == "no room"
            return None

    forward = 0
    while (loss := attempt(lambda: loss_fn(**arguments), forward)) is None:
        forward += 1
    backward = 0
    while (got := attempt(lambda: gradients(loss, arguments), backward)) is None:
        backward += 1
    assert forward > 1 and backward > 0
    assert_all_same_bits(got | {"loss": loss.detach()}, want)
