"""Where the suite is running: the same tests run interpreted, on a plain CPU, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from core_kernels.engine import interpreting as interpreting


def on_gpu() -> bool:
    return torch.cuda.is_available() and not interpreting()


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
