"""Where the suite is running: the same tests run interpreted, on a plain CPU, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from core_kernels.engine import interpreting as interpreting
from core_kernels.tiles import can_specialize


def on_gpu() -> bool:
    return torch.cuda.is_available() and not interpreting()


def on_hopper() -> bool:
    """Whether the kernels for Hopper run."""
    return on_gpu() and torch.cuda.get_device_capability()[0] == 9 and can_specialize()


def suite_device() -> torch.device:
    return torch.device("cuda" if on_gpu() else "cpu")


@contextmanager
def waiting_raises() -> Iterator[None]:
    """Within it, whatever makes the host wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
