"""Launches kernels again without asking Triton anew what they are specialised for.

Triton's own launch looks at every argument and every option to find the compiled kernel, which takes the host longer
than a small kernel takes the GPU. Here the first launch is Triton's, and those like it go to the kernel that it found.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from core_kernels.engine import interpreting

_FOUND: dict[tuple, Any] = {}
# Triton's launch is for one thread at a time: others find a kernel that it has compiled and not yet loaded. A lock for
# each device, for loading may wait for the device, and that for what another one's thread has yet to launch.
_FIRST: dict[int, threading.Lock] = {}
_INT32 = range(-(2**31), 2**31)


def launching(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """``kernel[grid]``: positional arguments are the kernel's first, keywords the others and the options."""
    return kernel[grid] if interpreting() else lambda *args, **others: _launch(kernel, grid, args, others)


def _launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], others: dict[str, Any]) -> None:
    device = torch.cuda.current_device()
    # Numbers that are no constants of the kernel's are floats: a new one, as of a schedule, is no new kernel.
    constants = [float if type(value) is float else value for value in others.values()]
    key = (id(kernel), device, *map(_trait, args), *others, *constants)
    found = _FOUND.get(key)
    if found is None:
        with _FIRST.setdefault(device, threading.Lock()):
            _FOUND[key] = kernel[grid](*args, **others)
    else:
        rest = [others[name] for name in kernel.arg_names[len(args) :]]
        found[(*grid, 1, 1)](*args, *rest)


def _trait(value: Any) -> Any:
    """What Triton specialises a kernel for."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *value.block_shape
    if isinstance(value, int):
        return value == 1, value % 16 == 0, value in _INT32
    return value
