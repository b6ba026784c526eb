"""Tile configurations as data: how large a block of each product one program computes, by device and dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from core_kernels.engine import interpreting


@dataclass(frozen=True)
class Tile:
    """A product's output tile is ``m x n``, summed ``k`` at a time; a row kernel takes ``row`` columns at a time."""

    m: int
    n: int
    k: int
    group: int  # output tiles are visited in groups of this many rows, so that operands are reused from L2
    warps: int
    stages: int
    row: int
    programs: int  # how many programs a projection is split into: several for each multiprocessor


# Interpreted tiles are small on purpose: small test shapes then span several of them in every dimension.
INTERPRETED = Tile(m=32, n=64, k=32, group=2, warps=4, stages=1, row=128, programs=4)

# By (compute capability major, or 0 for any other GPU; bytes per element).
TILES = {
    (9, 2): Tile(m=128, n=256, k=64, group=16, warps=8, stages=3, row=4096, programs=2048),
    (0, 2): Tile(m=128, n=128, k=32, group=8, warps=8, stages=3, row=4096, programs=2048),
    # float32 products are exact float32 (no TF32), in registers: a large tile would spill.
    (0, 4): Tile(m=64, n=64, k=32, group=8, warps=4, stages=2, row=4096, programs=2048),
}


def choose_tile(device: torch.device, dtype: torch.dtype) -> Tile:
    if interpreting() or device.type != "cuda":
        return INTERPRETED
    major = torch.cuda.get_device_capability(device)[0] if torch.version.hip is None else 0
    return TILES.get((major, dtype.itemsize)) or TILES[(0, dtype.itemsize)]
