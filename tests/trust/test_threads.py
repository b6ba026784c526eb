"""Threads that call at once: each gets the bits that it gets alone, at first use of everything too."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from core_kernels import launching
from tests.parity.frontends import Results
from tests.support import interpreting, on_gpu
from tests.trust.calls import CALLS, Call, assert_same_bits
from tests.trust.process import run_well

ROUNDS = 1 if interpreting() else 10


def at_once(functions: list[Callable[[], Any]]) -> list[Any]:
    """Each in a thread of its own, all started together, on a GPU each on a stream of its own."""
    together = threading.Barrier(len(functions), timeout=60)

    def start(function: Callable[[], Any]) -> Any:
        together.wait()
        if not on_gpu():
            return function()
        with torch.cuda.stream(torch.cuda.Stream()):
            return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(start, functions))


def switch_often() -> None:
    """Threads take turns every few instructions, where they have a hundred times as many as a rule."""
    sys.setswitchinterval(5e-5)


@pytest.fixture
def restless() -> Any:
    before = sys.getswitchinterval()
    switch_often()
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
def test_both_frontends_in_threads_get_what_each_gets_alone() -> None:
    alone = [call.run() for call in CALLS]
    for call, results in zip(CALLS, alone, strict=True):
        call.check(results)
    for _ in range(ROUNDS):
        assert_all_as_alone(at_once([call.run for call in CALLS]), alone)


@pytest.mark.skipif(
    interpreting(), reason="it parses kernels at first use, and CPython 3.11 may not parse in two threads"
)
def test_threads_that_make_the_first_calls_of_a_process() -> None:
    assert "as alone" in run_well(first_calls)


def first_calls() -> None:
    """Two threads of each call: what is made once, and cached, is asked for by both at once."""
    import jax.numpy as jnp

    import jax_api  # noqa: F401  NumPy parses while it is imported, as Triton does to compile

    jnp.asarray(0.0)  # threads that use JAX itself for the first time, with no other code, can crash it (0.11 on a GPU)
    switch_often()
    together = at_once([call.run for call in CALLS * 2])
    alone = [call.run() for call in CALLS]
    assert_all_as_alone(together, alone * 2)
    for call, results in zip(CALLS, alone, strict=True):
        call.check(results)
    print("as alone")


def assert_all_as_alone(together: list[Results], alone: list[Results]) -> None:
    calls: list[Call] = CALLS * (len(together) // len(CALLS))
    for call, got, wanted in zip(calls, together, alone, strict=True):
        assert_same_bits(got, wanted, f"{call.frontend} {call.case}")


# ---- the first launch of a kernel, as Triton does it on a GPU


GRID = (2, 3)


class Kernel:
    """One that is found as soon as it is compiled and can be launched once it is loaded, as Triton's are."""

    arg_names = ("out", "scale", "BLOCK")

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load = load
        self.compiled = self.loaded = False
        self.first_launches = 0
        self.scales: list[float] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.first_launch if grid == GRID else self.launch

    def first_launch(self, out: int, *, scale: float, BLOCK: int) -> Kernel:
        self.first_launches += 1
        if self.compiled:
            assert self.loaded, "launched before it was loaded"
        else:
            self.compiled = True
            self.load()
            self.loaded = True
        self.scales.append(scale)
        return self

    def launch(self, out: int, scale: float, BLOCK: int) -> None:
        assert self.loaded
        self.scales.append(scale)


@pytest.fixture
def thread_device(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """Kernels are launched as on a GPU, which is the one with the number ``device`` of the thread."""
    current = threading.local()
    monkeypatch.setattr(launching, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "device", 0))
    monkeypatch.setattr(launching, "_FOUND", {})
    monkeypatch.setattr(launching, "_FIRST", {})
    return current


def launch(kernel: Kernel, scale: float = 0.5) -> None:
    launching.launching(kernel, GRID)(7, scale=scale, BLOCK=64)


@pytest.mark.usefixtures("thread_device")
def test_no_thread_launches_a_kernel_that_another_is_loading() -> None:
    kernel = Kernel(load=lambda: time.sleep(0.05))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda scale: launch(kernel, scale), range(8)))
    assert sorted(kernel.scales) == [*range(8)]


def test_devices_do_not_wait_for_each_other_to_load(thread_device: threading.local) -> None:
    """Loading may wait for a device whose work waits for another's."""
    both = threading.Barrier(2, timeout=10)

    def load_on(device: int) -> None:
        thread_device.device = device
        launch(Kernel(load=both.wait))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(load_on, range(2)))
