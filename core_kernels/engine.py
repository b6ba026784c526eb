"""Which engine runs a plan: the Triton kernels, or plain torch operations. Decided here and nowhere else."""

from __future__ import annotations

import os

import torch

ENGINES = ("auto", "triton", "torch")


def interpreting() -> bool:
    """Whether Triton kernels are interpreted, on any device; Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def runs_kernels(engine: str, device: torch.device) -> bool:
    """Whether a call that asks for ``engine`` runs the kernels on ``device``."""
    return engine != "torch" and (device.type == "cuda" or interpreting())


def choose_engine(engine: str, device: torch.device) -> str:
    """Answer ``"triton"`` or ``"torch"`` for a call on ``device``.

    ``"auto"`` takes the kernels wherever they run: on a GPU, and everywhere under ``TRITON_INTERPRET=1``.
    """
    kernels_run = runs_kernels(engine, device)
    if engine == "triton" and not kernels_run:
        raise ValueError(
            f"engine='triton' needs a GPU, or TRITON_INTERPRET=1 set before Python starts; got arguments on {device}"
        )
    return "triton" if kernels_run else "torch"
