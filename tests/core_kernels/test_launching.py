"""Launches found again, and launches read from a plan's record, with kernels that only say how they were called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

import core_kernels.launching as module
from core_kernels import Options, Plan, Step, plan
from core_kernels.launching import launching, run_recorded
from tests.core_kernels.problems import linear

pytest.importorskip("triton")
H, V, N = 32, 64, 16
STREAM = 0


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "_FOUND", {})
    monkeypatch.setattr("core_kernels.replay.driver", lambda: None)
    monkeypatch.setattr(
        module, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: STREAM))
    )


class Compiled:
    """As Triton compiles them: a launch through ``[]`` tells its hooks, and ends in one through ``run``."""

    function, packed_metadata = object(), object()

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.told = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, stream: int = 0) -> None:
            self.told += 1
            self.run(*grid[:3], stream, self.function, self.packed_metadata, None, None, None, *args)

        return launch

    def run(self, x: int, y: int, z: int, stream: int, function: Any, metadata: Any, *others: Any) -> None:
        assert (stream, function, metadata) == (STREAM, self.function, self.packed_metadata)
        assert others[:3] == (None, None, None)
        self.calls.append(((x, y, z), others[3:]))


class Kernel:
    """As ``triton.jit`` makes them: a launch answers what was compiled for it."""

    arg_names = ("a", "b", "n", "scale", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def launch(*args: Any, **others: Any) -> Compiled:
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return launch


def launch(kernel: Kernel, n: int = 5, scale: float = 2.0, block: int = 8, a: Tensor | None = None) -> None:
    a = torch.zeros(32) if a is None else a
    launching(kernel, (3,))(a, None, n, scale=scale, BLOCK=block, num_warps=4)


def test_a_launch_like_one_before_goes_to_the_kernel_that_was_found() -> None:
    kernel = Kernel()
    launch(kernel, n=5)
    launch(kernel, n=7)
    (compiled,) = kernel.compiled
    ((grid, (a, b, n, scale, block)),) = compiled.calls
    assert (grid[0], b, n, scale, block) == (3, None, 7, 2.0, 8)
    assert isinstance(a, Tensor)


def test_a_float_that_changes_finds_the_same_kernel() -> None:
    """Triton compiles no float in; a loss whose smoothing is annealed has a new one every step."""
    kernel = Kernel()
    for step in range(20):
        launch(kernel, scale=0.5 + step)
    (compiled,) = kernel.compiled
    assert [args[3] for _, args in compiled.calls] == [0.5 + step for step in range(1, 20)]


@pytest.mark.parametrize(
    "other",
    [
        {"n": 1},
        {"n": 16},
        {"n": 2**31},
        {"n": -(2**31) - 1},
        {"scale": 2},
        {"block": 16},
        {"a": torch.zeros(32, dtype=torch.float16)},
        {"a": torch.zeros(33)[1:]},
    ],
    ids=str,
)
def test_what_a_kernel_is_compiled_for_finds_another(other: dict[str, Any]) -> None:
    kernel = Kernel()
    launch(kernel)
    launch(kernel, **other)
    assert len(kernel.compiled) == 2


# ---- the record of a plan


def planned() -> Plan:
    problem = linear(N, H, V, bias=False, class_weight=False)
    return plan(Step("loss", problem, Options(), engine="torch"), torch.device("cpu"))


def tensors_of(plan: Plan) -> dict[str, Tensor]:
    x, weight = torch.zeros(N, H), torch.zeros(V, H)
    inputs = {"x": x, "weight": weight, "labels": torch.zeros(N, dtype=torch.int64)}
    return inputs | {buffer.name: torch.empty(buffer.shape, dtype=buffer.dtype) for buffer in plan.allocations}


class Operation:
    """Launches a kernel over ``x``, a part of it and a descriptor of ``weight``."""

    def __init__(self) -> None:
        self.kernel = Kernel()
        self.runs = 0
        self.run = functools.partial(run_recorded, self)

    def __call__(self, plan: Plan, t: Any) -> None:
        self.runs += 1
        descriptor = TensorDescriptor.from_tensor(t["weight"], [16, 16])
        for _ in range(2):
            launching(self.kernel, (3, 2))(t["x"], t["x"][4:], descriptor, scale=1.5, BLOCK=8)

    @property
    def calls(self) -> list[tuple]:
        return [call for compiled in self.kernel.compiled for call in compiled.calls]


def test_a_plan_is_launched_again_from_its_record_over_other_tensors() -> None:
    operation, of = Operation(), planned()
    of.records.clear()
    operation.run(of, tensors_of(of))
    assert (operation.runs, len(operation.calls)) == (1, 1)  # of two launches the first was the compiler's
    others = tensors_of(of)
    operation.run(of, others)
    assert (operation.runs, len(operation.calls)) == (1, 3)
    for grid, (whole, part, descriptor, scale, block) in operation.calls[1:]:
        assert grid == (3, 2, 1)
        assert (whole, part) == (others["x"].data_ptr(), others["x"][4:].data_ptr())
        assert descriptor.base.data_ptr() == others["weight"].data_ptr()
        assert (tuple(descriptor.shape), descriptor.strides, descriptor.block_shape) == ((V, H), (H, 1), [16, 16])
        assert (scale, block) == (1.5, 8)


def test_a_profilers_hooks_are_told_of_launches_from_a_record() -> None:
    operation, of = Operation(), planned()
    of.records.clear()
    operation.run(of, tensors_of(of))
    told = [compiled.told for compiled in operation.kernel.compiled]
    hook = print
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        operation.run(of, tensors_of(of))
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    operation.run(of, tensors_of(of))
    assert operation.runs == 1
    assert [compiled.told for compiled in operation.kernel.compiled] == [told[0] + 2]
    assert len(operation.calls) == 5


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.zeros(H, N).T},
        {"labels": torch.zeros(N, dtype=torch.int32)},
        {"x": torch.zeros(N * H + 1)[1:].view(N, H)},
        {"labels": torch.zeros(N + 1, dtype=torch.int64)[1:]},  # as of one row of tokens, shifted
    ],
    ids=["strides", "dtype", "alignment", "alignment of labels"],
)
def test_a_record_serves_no_other_kind_of_tensors(changed: dict[str, Tensor]) -> None:
    operation, of = Operation(), planned()
    of.records.clear()
    operation.run(of, tensors_of(of))
    for _ in range(3):
        operation.run(of, tensors_of(of) | changed)
    assert operation.runs == 2


def test_tensors_in_one_place_leave_no_record() -> None:
    """Which of them an address belongs to could not be told; in the next call they may be apart."""
    operation, of = Operation(), planned()
    of.records.clear()
    both = torch.zeros(V, H)
    for _ in range(2):
        operation.run(of, tensors_of(of) | {"x": both[:N], "weight": both})
    assert operation.runs == 2
    assert not of.records


def test_records_hold_no_tensor_and_are_few() -> None:
    operation, of = Operation(), planned()
    of.records.clear()
    for row in range(H, H + 400, 4):
        operation.run(of, tensors_of(of) | {"x": torch.zeros(N, row)[:, :H]})
    assert 0 < len(of.records) <= 64
    for record in of.records.values():
        for launch in record.launches:
            assert not any(isinstance(value, Tensor) for value in launch.arguments)
            assert all(d.base is None for d in launch.arguments if isinstance(d, TensorDescriptor))
    of.records.clear()
