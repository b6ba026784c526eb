"""Launches kernels without working out again what has been worked out before.

Triton's own launch looks at every argument and every option to find the compiled kernel, which takes the host longer
than a small kernel takes the GPU. Here the first launch is Triton's, and those like it go to the kernel that it found.
Moreover, runs of one plan differ in the addresses of their tensors and in nothing else, so a plan's launches are
recorded the first time, and after that launched from the record; and those over the same addresses replayed.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from core_kernels.arguments import Tensors
from core_kernels.engine import interpreting
from core_kernels.plan import Plan
from core_kernels.replay import remember, replay

Arguments = tuple[Any, ...]

ALIGNED = 16  # bytes: what Triton asks of an address
MOST_RECORDS = 64  # of a plan: one for each combination of its inputs' strides
_INT32 = 2**31
_FOUND: dict[tuple, Any] = {}
# Triton's launch is for one thread at a time: others find a kernel that it has compiled and not yet loaded. A lock for
# each device, for loading may wait for the device, and that for what another one's thread has yet to launch.
_FIRST: dict[int, threading.Lock] = {}
_recording = threading.local()


def launching(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """``kernel[grid]``: positional arguments are the kernel's first, keywords the others and the options."""
    return kernel[grid] if interpreting() else lambda *args, **others: _launch(kernel, grid, args, others)


def run_recorded(operation: Callable[[Plan, Tensors], None], plan: Plan, tensors: Tensors) -> None:
    """``operation``, which launches kernels and does nothing else, from the plan's record of its launches if it can."""
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    aligned = tuple(address % ALIGNED == 0 for address in addresses.values())
    device = torch.cuda.current_device()
    layouts = ((tensors[name].dtype, tensors[name].stride()) for name in plan.varying)
    key = (device, "workspace" in addresses, aligned, *layouts)
    record = plan.records.get(key)
    if record is not None:
        record.run(addresses, driver.active.get_current_stream(device))
        return
    with torch.no_grad():
        _record(operation, plan, tensors, key)


class Launch(NamedTuple):
    """A launch without the addresses of its tensors. A pointer's place among the arguments comes with the name of its
    tensor and its bytes from there; so does a descriptor's.
    """

    kernel: Any  # as compiled
    grid: tuple[int, int, int]
    arguments: Arguments
    pointers: tuple[tuple[int, str, int], ...]
    descriptors: tuple[tuple[int, str, int], ...]

    def again(self, addresses: Mapping[str, int], stream: int, hooked: bool) -> None:
        arguments = list(self.arguments)
        for place, name, offset in self.pointers:
            arguments[place] = addresses[name] + offset
        for place, name, offset in self.descriptors:
            arguments[place] = _described(arguments[place], _Address(addresses[name] + offset))
        kernel, grid = self.kernel, self.grid
        if hooked:
            kernel[grid](*arguments, stream=stream)
        else:  # what that comes to
            kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *arguments)


class Record:
    """A plan's launches."""

    def __init__(self, launches: tuple[Launch, ...]) -> None:
        self.launches = launches

    def run(self, addresses: Mapping[str, int], stream: int) -> None:
        these = (self, *addresses.items())
        if _is_hooked():
            self.launch(addresses, stream, hooked=True)
        elif not replay(these, stream):
            self.launch(addresses, stream)
            remember(these, functools.partial(self.launch, addresses))

    def launch(self, addresses: Mapping[str, int], stream: int, hooked: bool = False) -> None:
        for launch in self.launches:
            launch.again(addresses, stream, hooked)


class _Address(NamedTuple):
    """What a launch asks of a descriptor's tensor."""

    address: int

    def data_ptr(self) -> int:
        return self.address


def _is_hooked() -> bool:
    """Whether a profiler asked Triton to be told of launches."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


def _is_descriptor(value: Any) -> bool:
    """Of Triton's or of Gluon's."""
    return hasattr(value, "block_shape")


def _described(known: Any, base: Any) -> Any:
    """A descriptor like ``known``, of another tensor like its own, which need not be looked at again."""
    descriptor = object.__new__(type(known))
    descriptor.__dict__.update(known.__dict__, base=base)
    return descriptor


def _launch(kernel: Any, grid: tuple[int, ...], args: Arguments, others: dict[str, Any]) -> None:
    device, whole_grid = torch.cuda.current_device(), (*grid, 1, 1)[:3]
    key = (id(kernel), device, *map(_trait, args), *others, *map(_option, others.values()))
    rest = [others[name] for name in kernel.arg_names[len(args) :]]
    found = _FOUND.get(key)
    if found is None:
        with _FIRST.setdefault(device, threading.Lock()):
            found = _FOUND[key] = kernel[grid](*args, **others)
    else:
        found[whole_grid](*args, *rest)
    launches = getattr(_recording, "launches", None)
    if launches is not None:
        launches.append((found, whole_grid, (*args, *rest)))


def _trait(value: Any) -> Any:
    """What Triton specialises a kernel for."""
    if type(value) is int:
        return value == 1, value % ALIGNED == 0, -_INT32 <= value < _INT32
    if isinstance(value, Tensor):
        aligned = value.data_ptr() % ALIGNED == 0
        return value.dtype, aligned, torch.version.hip is not None and value.untyped_storage().nbytes() < _INT32
    if _is_descriptor(value):
        return type(value), value.base.dtype, *value.block_shape
    return _option(value)


def _option(value: Any) -> Any:
    """What of a keyword is compiled in: all of it, but of a float its type."""
    return float if type(value) is float else value


def _record(operation: Callable[[Plan, Tensors], None], plan: Plan, tensors: Tensors, key: tuple) -> None:
    _recording.launches = []
    try:
        operation(plan, plan.with_workspace(tensors))
        launches = _recording.launches
    finally:
        _recording.launches = None
    extents = {name: (tensor.data_ptr(), tensor.data_ptr() + _extent(tensor)) for name, tensor in tensors.items()}
    in_order = sorted(extents.values())
    if all(end <= start for (_, end), (start, _) in itertools.pairwise(in_order)):
        if len(plan.records) >= MOST_RECORDS:
            plan.records.clear()
        kept = tuple(_without_addresses(kernel, grid, arguments, extents) for kernel, grid, arguments in launches)
        plan.records[key] = Record(kept)
    # else two are in one place, and an address does not tell which it is


def _without_addresses(
    kernel: Any, grid: tuple[int, int, int], arguments: Arguments, extents: Mapping[str, tuple[int, int]]
) -> Launch:
    def place_of(address: int) -> tuple[str, int]:
        return next((name, address - start) for name, (start, end) in extents.items() if start <= address < end)

    kept = list(arguments)
    pointers, descriptors = [], []
    for place, value in enumerate(arguments):
        if isinstance(value, Tensor):
            pointers.append((place, *place_of(value.data_ptr())))
            kept[place] = None
        elif _is_descriptor(value):
            descriptors.append((place, *place_of(value.base.data_ptr())))
            kept[place] = _described(value, None)  # a record shall hold no memory of a GPU
    return Launch(kernel, grid, tuple(kept), tuple(pointers), tuple(descriptors))


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its end."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize
