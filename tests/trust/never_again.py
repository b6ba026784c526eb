"""The ways in which a loss can be computed, and how a case that takes one of them is run and judged.

``test_never_again_*.py`` go down a list of defects that were measured or reported in public loss kernels: the number in
a test's name is the line's. A test runs in every way that its line concerns, through both frontends, and is judged as
in ``tests/parity``: by the float64 oracle, within twice the error of plain torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import Tensor

from core_kernels import Plan, Step, for_gradient, launch, plan
from core_kernels.tiles import choose_tiles
from tests.parity import framework, frontends
from tests.parity.cases import Case, Inputs, make_inputs
from tests.parity.closeness import check_results
from tests.parity.frontends import Results
from tests.support import interpreting, on_gpu, suite_device
from torch_api import operator

FRONTENDS = ("torch", "jax")


@dataclass(frozen=True)
class Way:
    """An operation in a dtype, and the schedule that a ``memory`` has it take.

    Of a projection: ``"slabs"`` of few tiles, or ``"whole"``, one slab of the whole vocab, project the logits again in
    the backward pass; ``"kept"`` exponentials and gradients computed ``"ahead"`` do not.
    """

    operation: str
    dtype: torch.dtype
    memory: str = "auto"
    schedule: str = ""
    met: bool = True  # whether calls take the schedule, where the kernels run

    def __str__(self) -> str:
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        return "-".join(filter(None, (self.operation, dtype, self.schedule)))

    def case(self, name: str, **changes: Any) -> Case:
        """A small case that takes this way: several tiles of the vocab, none even."""
        case = Case(f"{name}-{self}", self.operation, (7,), 24, 69, self.dtype, memory=self.memory)
        return replace(case, **changes)

    @property
    def block(self) -> int:
        """Columns of the vocab that no kernel's block exceeds."""
        tiles = choose_tiles(suite_device(), self.dtype, 24 if self.operation == "linear" else None)
        if self.operation == "logits":
            return max(tiles.forward.block, tiles.backward.block)
        return max(tiles.project.n, tiles.keep.n, tiles.slab.n, tiles.grad_weight.m, tiles.grad_x.k)


LOGITS = (Way("logits", torch.float32), Way("logits", torch.bfloat16))
SLABS = (
    Way("linear", torch.float32, "lean", "slabs"),
    Way("linear", torch.float32, "speed", "whole"),
    Way("linear", torch.bfloat16, "lean", "slabs"),
)
KEPT = Way("linear", torch.bfloat16, "speed", "kept")
AHEAD = Way("linear", torch.bfloat16, "speed", "ahead")
LINEAR = (KEPT, *SLABS, AHEAD)


def distinct(*ways: Way) -> list[Way]:
    """All of them; of slow, interpreted kernels, one of those that differ in dtype or in the width of slabs alone."""
    firsts = {(way.operation, way.schedule.replace("whole", "slabs")): way for way in reversed(ways)}
    return [way for way in ways if not interpreting() or way in firsts.values()]


def in_ways(*ways: Way) -> pytest.MarkDecorator:
    """Each of the ways, in both frontends; interpreted, JAX, which launches what torch does, takes one an operation."""
    firsts = {way.operation: way for way in reversed(ways)}.values()
    chosen = [
        pytest.param(way, frontend, id=f"{way}-{frontend}")
        for way in distinct(*ways)
        for frontend in FRONTENDS
        if frontend == "torch" or not interpreting() or way in firsts
    ]
    return pytest.mark.parametrize(("way", "frontend"), chosen)


in_every_way = in_ways(*LOGITS, *LINEAR)
in_every_linear_way = in_ways(*LINEAR)
per_token_in_every_way = in_ways(*LOGITS, KEPT, *SLABS)  # gradients ahead have one upstream gradient


@contextmanager
def scheduled(way: Way) -> Iterator[list[Plan]]:
    """Within it calls of ``way`` take its schedule, however small they are; answers the plans that are launched."""
    plans: list[Plan] = []

    def launch_and_remember(planned: Plan, tensors: dict[str, Tensor]) -> None:
        plans.append(planned)
        launch(planned, tensors)

    def decided_anew(text: str, wanted: tuple[str, ...], device: torch.device) -> tuple[int, str, str]:
        most, few, many = for_gradient(operator.decode(text), wanted, device)
        return most, operator.encode(few), operator.encode(many)

    def forget() -> None:
        plan.cache_clear()
        operator._planned.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        for name in ("LEAN_BYTES", "CPU_SLAB_BYTES", "CHUNK_BYTES"):
            if way.schedule != "whole":
                patch.setattr(sys.modules["core_kernels.plan"], name, 1)
        if way.schedule == "ahead":
            patch.setattr("core_kernels.step.MOST_SPEED_BYTES", 0)
        patch.setattr("torch_api.functional.for_gradient", decided_anew)
        patch.setattr("torch_api.operator.launch_plan", launch_and_remember)
        patch.setattr("jax_api.bridge.launch", launch_and_remember)
        forget()
        try:
            yield plans
        finally:
            forget()
    check_schedule(way, plans)


def check_schedule(way: Way, plans: list[Plan]) -> None:
    """Gradients were computed as ``way`` says."""
    steps = [planned.step for planned in plans if planned.step.kind == "gradient"]
    if way.operation == "logits" or not way.met or not (interpreting() or on_gpu()):
        return
    assert all(taken(step) == way.schedule.replace("whole", "slabs") for step in steps)
    for planned in plans:
        if planned.step.kind == "gradient" and planned.problem.tokens and way.schedule in ("slabs", "whole"):
            in_one = way.schedule == "whole" or planned.problem.columns <= way.block
            if in_one or interpreting():  # a GPU's least slab may hold all that a test has
                assert (planned.slab == planned.problem.columns) == in_one


def taken(step: Step) -> str:
    return "kept" if step.keep else "ahead" if step.ahead else "slabs"


def run(
    frontend: str, way: Way, case: Case, inputs: Inputs, metrics: dict[str, bool] = frontends.METRICS
) -> Results:
    """Outputs, and gradients by all inputs."""
    with scheduled(way):
        return (
            frontends.run_torch(case, inputs, suite_device(), metrics=metrics)
            if frontend == "torch"
            else frontends.run_jax(case, inputs, metrics=metrics)
        )


def check(frontend: str, case: Case, inputs: Inputs, ours: Results) -> None:
    """As exact as plain torch, or twice as bad; metrics exactly."""
    expected, plain = frontends.run_oracle(case, inputs), framework.run(case, inputs, suite_device())
    gradients = {key for key in ours if key.startswith("grad_")}  # of a call that was asked for some of them
    expected = {key: value for key, value in expected.items() if not key.startswith("grad_") or key in gradients}
    check_results(frontend, case, ours, expected, plain)


def agree(frontend: str, way: Way, case: Case, inputs: Inputs | None = None) -> Results:
    """Run ``case`` and check it; answers its results."""
    inputs = make_inputs(case) if inputs is None else inputs
    ours = run(frontend, way, case, inputs)
    check(frontend, case, inputs, ours)
    return ours


def with_arrays(inputs: Inputs, **arrays: Tensor) -> Inputs:
    return replace(inputs, arrays=inputs.arrays | arrays)


def cycled(values: list[int], count: int) -> Tensor:
    """Labels that take ``values`` in turn."""
    return torch.tensor(values).repeat(-(-count // len(values)))[:count]


def results_of(out: Any, gradients: dict[str, Any]) -> Results:
    """What a call of either frontend answered, as ``frontends`` has it."""
    found = {name: getattr(out, name) for name in frontends.OUTPUTS} | {f"grad_{k}": v for k, v in gradients.items()}
    return {k: frontends.to_numpy(v) if isinstance(v, Tensor) else np.asarray(v) for k, v in found.items()}


def torch_leaves(inputs: Inputs, wanted: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """The arrays on the suite's device, of which those ``wanted`` (all, if not said) require a gradient."""
    arrays = {name: frontends.to_device(array, suite_device()) for name, array in inputs.arrays.items()}
    return {name: array.requires_grad_(wanted is None or name in wanted) for name, array in arrays.items()}


def jax_vjp(case: Case, inputs: Inputs, arrays: dict[str, Any], fixed: dict[str, Any] | None = None) -> Any:
    """The output, and the pullback by ``arrays``, beside ``fixed`` ones that are not differentiated."""

    def loss(arrays: dict[str, Any]) -> Any:
        out = frontends.call_jax(case, inputs, arrays | (fixed or {}))
        return out.loss, out

    _, pullback, out = jax.vjp(loss, arrays, has_aux=True)
    return out, lambda upstream: pullback(upstream)[0]
