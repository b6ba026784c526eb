"""Functions run by several processes of one group; a test fails with what went wrong in any of them."""

from __future__ import annotations

import json
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Check = Callable[[], None]

TIMEOUT = timedelta(minutes=5)  # of a collective that another rank never comes to


def on_every_rank(world: int, checks: dict[str, Check], device: str = "cpu") -> None:
    """Run ``checks`` in turn on ``world`` processes with gloo, or with nccl on a GPU each, which is then where tensors
    are made.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        failures = Path(folder) / "failures.json"
        mp.start_processes(_run, (world, port, device, checks, failures), nprocs=world, start_method="spawn")
        found = json.loads(failures.read_text())
    if found:
        pytest.fail("\n".join(f"{name}: {text}" for name, text in found.items()), pytrace=False)


def _run(rank: int, world: int, port: int, device: str, checks: dict[str, Check], failures: Path) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", timeout=TIMEOUT, rank=rank, world_size=world)
    found: dict[str, str] = {}
    for name, check in checks.items():
        error = ""
        try:
            check()
        except Exception:
            error = f"on rank {rank} of {world}:\n{traceback.format_exc()}"
        errors: list[Any] = [None] * world
        dist.all_gather_object(errors, error)  # a rank that failed is waited for, before the next check
        if any(errors):
            found[name] = "\n".join(filter(None, errors))
    if rank == 0:
        failures.write_text(json.dumps(found))
    dist.destroy_process_group()
