"""Every case through both frontends: against the oracle, within what plain torch itself gets, and bit for bit alike."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace

import pytest
from torch import Tensor

from core_kernels import Plan, launch
from tests.parity import framework, frontends
from tests.parity.cases import CASES, Case, make_inputs
from tests.parity.closeness import check_results, check_same_bits
from tests.support import interpreting, on_gpu, suite_device


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frontends_agree_with_the_oracle_and_with_each_other(case: Case) -> None:
    inputs = make_inputs(case)
    oracle = frontends.run_oracle(case, inputs)
    plain = framework.run(case, inputs, suite_device())
    by_torch = frontends.run_torch(case, inputs, suite_device())
    check_results("torch", case, by_torch, oracle, plain)
    if case.layout in ("contiguous", "transposed_weight"):  # JAX arrays have no strides but a weight's layout
        by_jax = frontends.run_jax(case, inputs)
        check_results("jax", case, by_jax, oracle, plain)
        check_same_bits(by_torch, by_jax)


# ---- gradients computed ahead, which takes more tokens than a test has

AHEAD = ("bf16_far", "bf16_served_options", "bf16_transposed_weight", "bf16_sliced")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Plans that either frontend launches, where nothing is kept, and a chunk is one tile."""
    plans: list[Plan] = []

    def launch_and_remember(plan: Plan, tensors: Mapping[str, Tensor]) -> None:
        plans.append(plan)
        launch(plan, tensors)

    monkeypatch.setattr("core_kernels.step.MOST_SPEED_BYTES", 0)
    monkeypatch.setattr(sys.modules["core_kernels.plan"], "CHUNK_BYTES", 1)
    monkeypatch.setattr("torch_api.operator.launch_plan", launch_and_remember)
    monkeypatch.setattr("jax_api.bridge.launch", launch_and_remember)
    return plans


@pytest.mark.skipif(not (interpreting() or on_gpu()), reason="only the kernels compute gradients ahead")
@pytest.mark.parametrize("name", AHEAD)
def test_gradients_ahead_agree_with_the_oracle_and_with_each_other(launched: list[Plan], name: str) -> None:
    """With a scale that no other test has: what is remembered of a call says what was decided then."""
    case = next(case for case in CASES if case.name == f"linear-{name}")
    scale = case.options.get("logit_scale", 1.0)
    case = replace(case, memory="speed", options=case.options | {"logit_scale": 1.0625 * scale})
    inputs = make_inputs(case)
    oracle, plain = frontends.run_oracle(case, inputs), framework.run(case, inputs, suite_device())
    by_torch = frontends.run_torch(case, inputs, suite_device())
    check_results("torch", case, by_torch, oracle, plain)
    if case.layout != "sliced":
        by_jax = frontends.run_jax(case, inputs)
        check_results("jax", case, by_jax, oracle, plain)
        check_same_bits(by_torch, by_jax)
    losses = [plan for plan in launched if plan.step.kind == "loss"]
    assert len(losses) == len(launched) / 2 == (1 if case.layout == "sliced" else 2)
    for plan in losses:
        assert set(plan.step.ahead) == {"x", "weight"}
        assert plan.chunk == plan.tiles.keep.m
