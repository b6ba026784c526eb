"""The same call gives the same bits, a hundred times over, whatever ran before it, beside it, or on which stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch import Tensor

import torch_api
from core_kernels import Plan
from tests.core_kernels.problems import POISON, buffers_of
from tests.parity import frontends
from tests.parity.cases import EVERYTHING, Case, make_inputs
from tests.support import interpreting, on_gpu, suite_device
from tests.trust.never_again import jax_vjp

REPETITIONS = 3 if interpreting() else 100
DEVICE = suite_device()
# The torch engine, and the kernels, with several tiles and slices; on a GPU, full ones.
TOKENS, HIDDEN, VOCAB = (2048, 512, 32000) if on_gpu() else (37, 40, 203)
BFLOAT16 = torch.bfloat16

LINEAR = Case("determinism", "linear", (TOKENS,), HIDDEN, VOCAB, BFLOAT16)
LOGITS = replace(LINEAR, operation="logits")
CASES = {
    "auto": LINEAR,
    "lean": replace(LINEAR, memory="lean", data="half_ignored"),
    "speed": replace(LINEAR, memory="speed", class_weight=True, data="shared_labels"),
    "slices": replace(LINEAR, memory=32 * 2**20 if on_gpu() else 60_000, layout="transposed_weight"),
    "everything": replace(LINEAR, bias=True, class_weight=True, options=EVERYTHING),
    "none": replace(LINEAR, options={"reduction": "none", "use_token_scaling": True}),
    "float32": replace(LINEAR, dtype=torch.float32, vocab=VOCAB // 4 + 1, options={"reduction": "sum"}),
    "logits": replace(LOGITS, class_weight=True, options=EVERYTHING),
    "logits_none": replace(LOGITS, dtype=torch.float32, vocab=VOCAB // 4 + 1, options={"reduction": "none"}),
}
# What runs in between: other shapes, dtypes and options, so that other kernels, plans and allocations come and go.
OTHERS = (
    Case("other", "linear", (TOKENS // 3,), HIDDEN, VOCAB // 7, BFLOAT16, memory="speed"),
    Case("other", "linear", (5, 3), HIDDEN // 2, VOCAB // 3 + 1, torch.float16, memory="lean", bias=True),
    Case("other", "logits", (TOKENS // 2,), 0, VOCAB // 5, torch.float32, options=EVERYTHING),
)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
Call = Callable[[], dict[str, Tensor]]


def call_of(case: Case) -> Call:
    """The call, with all metrics and gradients, on inputs that stay where they are."""
    inputs = make_inputs(case)
    inputs = replace(inputs, labels=inputs.labels.to(DEVICE), upstream=inputs.upstream.to(DEVICE))
    arrays = {name: frontends.to_device(array, DEVICE).requires_grad_() for name, array in inputs.arrays.items()}

    def call() -> dict[str, Tensor]:
        out = frontends.call_torch(case, inputs, arrays)
        gradients = torch.autograd.grad(out.loss, list(arrays.values()), inputs.upstream)
        results = {name: value for name, value in vars(out).items() if value is not None}
        return {name: value.detach() for name, value in (results | dict(zip(arrays, gradients, strict=True))).items()}

    return call


def differing_bits(ours: dict[str, Tensor], first: dict[str, Tensor]) -> Tensor:
    """How many bytes differ, on the device: nobody waits for it."""
    assert ours.keys() == first.keys()
    pairs = [[t.contiguous().view(-1).view(torch.uint8) for t in (ours[name], first[name])] for name in first]
    return torch.stack([torch.count_nonzero(a != b) for a, b in pairs]).sum()


@each_case
def test_a_hundred_calls_between_others(case: Case) -> None:
    call, others = call_of(case), [call_of(other) for other in OTHERS]
    first = call()
    assert first["loss"].isfinite().all()
    differing = []
    for i in range(REPETITIONS):
        if i % 4 == 3 or i < 4:
            others[i % len(others)]()
        differing.append(differing_bits(call(), first))
    assert not torch.stack(differing).any(), f"of {REPETITIONS} calls these differ: {torch.stack(differing).nonzero()}"


def test_differing_bits_are_seen() -> None:
    """A zero's sign, one of many numbers, and of a single one."""
    first = {"loss": torch.tensor(0.0, device=DEVICE), "x": torch.ones(9, 7, device=DEVICE, dtype=BFLOAT16)}
    assert differing_bits(first, {name: value.clone() for name, value in first.items()}) == 0
    assert differing_bits(first | {"loss": torch.tensor(-0.0, device=DEVICE)}, first) == 1
    other = first["x"].clone()
    other[8, 6] = 2.0
    assert differing_bits(first | {"x": other}, first) == 2


@each_case
def test_uninitialised_memory_is_not_seen(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and workspace come as they are: full of NaN, of ones, or of what was there before."""
    call = call_of(case)
    first = call()
    launch = torch_api.operator.launch_plan
    filled: list[str] = []
    for fill in (float("nan"), 1.0, -7e4):

        def fill_and_launch(plan: Plan, tensors: dict[str, Tensor], fill: float = fill) -> None:
            filled.append(plan.step.kind)
            buffers = plan.with_workspace(tensors)
            for buffer in buffers_of(plan):
                buffers[buffer.name].fill_(fill if buffer.dtype.is_floating_point else POISON)
            launch(plan, tensors)

        monkeypatch.setattr(torch_api.operator, "launch_plan", fill_and_launch)
        assert differing_bits(call(), first) == 0, f"filled with {fill}"
    assert filled == 3 * ["loss", "gradient"]


@pytest.mark.skipif(not on_gpu(), reason="streams are a GPU's")
@each_case
def test_calls_on_busy_streams(case: Case) -> None:
    """Several streams run the call, and one multiplies matrices beside them, so that programs come in other orders."""
    call = call_of(case)
    first = call()
    busy, streams = torch.cuda.Stream(), [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    matrix = torch.randn(2048, 2048, device=DEVICE, dtype=BFLOAT16)
    busy.wait_stream(torch.cuda.current_stream())
    differing = []
    for i in range(REPETITIONS):
        with torch.cuda.stream(busy):
            for _ in range(i % 5):
                matrix @ matrix
        with torch.cuda.stream(streams[i % len(streams)]):
            differing.append(differing_bits(call(), first))
    torch.cuda.synchronize()
    assert not torch.stack(differing).any(), f"of {REPETITIONS} calls these differ: {torch.stack(differing).nonzero()}"


# ---- JAX


def jax_call_of(case: Case) -> Callable[[], Any]:
    """The same in JAX, under jit: results, and the gradients by all arrays."""
    case = replace(case, layout="contiguous")
    inputs = make_inputs(case)
    arrays, upstream = frontends.to_jax_arrays(case, inputs), frontends.to_jax(inputs.upstream)

    @jax.jit
    def run(arrays: dict[str, jax.Array]) -> Any:
        out, pullback = jax_vjp(case, inputs, arrays)
        return out, pullback(upstream)

    return lambda: run(arrays)


@jax.jit
def _jax_differing_bits(ours: Any, first: Any) -> jax.Array:
    """How many numbers differ in their bits, on the device."""
    bits = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}

    def differing(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = (jax.lax.bitcast_convert_type(array, bits[array.dtype.itemsize]) for array in (a, b))
        return jnp.count_nonzero(a != b)

    return sum(jax.tree.leaves(jax.tree.map(differing, ours, first)))


@each_case
def test_a_hundred_calls_in_jax_between_others(case: Case) -> None:
    call, others = jax_call_of(case), [jax_call_of(other) for other in OTHERS]
    first = call()
    assert jnp.isfinite(first[0].loss).all()
    differing = []
    for i in range(REPETITIONS):
        if i % 4 == 3 or i < 4:
            others[i % len(others)]()
        differing.append(_jax_differing_bits(call(), first))
    found = [i for i, count in enumerate(differing) if count]
    assert not found, f"of {REPETITIONS} calls these differ: {found}"
