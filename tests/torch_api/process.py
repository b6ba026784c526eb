"""Functions run by several processes of one group, and what went wrong in any of them."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Check = Callable[[], None]


def on_every_rank(world: int, checks: dict[str, Check], device: str = "cpu") -> dict[str, str]:
    """Run ``checks`` in turn on ``world`` processes with gloo, or with nccl on a GPU each, which is then where tensors
    are made; the tracebacks of those that failed, by name.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    failures = context.SimpleQueue()
    mp.start_processes(_run, (world, port, device, checks, failures), nprocs=world, start_method="spawn")
    found: dict[str, str] = {}
    while not failures.empty():
        name, text = failures.get()
        found[name] = f"{found.get(name, '')}\n{text}"
    return found


def _run(rank: int, world: int, port: int, device: str, checks: dict[str, Check], failures: Any) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for name, check in checks.items():
        error = ""
        try:
            check()
        except Exception:
            error = f"on rank {rank} of {world}:\n{traceback.format_exc()}"
        errors: list[Any] = [None] * world
        dist.all_gather_object(errors, error)  # a rank that failed is waited for, before the next check
        if error:
            failures.put((name, error))
    dist.destroy_process_group()
