"""Tile configurations as data: how large a block of each product one program computes, by device, dtype and shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from core_kernels.engine import interpreting


@dataclass(frozen=True)
class Tile:
    """A product's output tile is ``m x n``, summed ``k`` at a time."""

    m: int
    n: int
    k: int
    group: int  # output tiles are visited in groups of this many rows, so that operands are reused from L2
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """The tile of each product; a row kernel takes ``row`` columns at a time."""

    project: Tile  # statistics of the logits
    keep: Tile  # the same, which leaves their exponentials behind
    slab: Tile  # a slab of the gradient of the logits
    grad_x: Tile
    grad_weight: Tile
    row: int
    programs: int  # that run at a time: one for each multiprocessor
    overlap: bool  # a launch may start as the one before runs out of programs (Hopper and later)


SMALL = Tile(32, 64, 32, group=2, warps=4, stages=1)
# Interpreted tiles are small on purpose: small test shapes then span several of them in every dimension.
INTERPRETED = Tiles(SMALL, SMALL, SMALL, SMALL, Tile(64, 32, 32, 2, 4, 1), row=128, programs=3, overlap=False)

WIDE, WIDE_4, TALL = Tile(128, 256, 64, 16, 8, 3), Tile(128, 256, 64, 16, 8, 4), Tile(256, 128, 64, 16, 8, 3)
DEEP = Tile(128, 256, 64, 8, 8, 4)
SQUARE, EXACT = Tile(128, 128, 32, 8, 8, 3), Tile(64, 64, 32, 8, 4, 2)

# By (compute capability major, or 0 for any other GPU; bytes per element; whether the hidden size fills 256 columns).
TILES = {
    (9, 2, True): (WIDE_4, WIDE, WIDE, DEEP, WIDE_4),
    (9, 2, False): (WIDE_4, WIDE, WIDE, DEEP, WIDE_4),
    (0, 2, True): (SQUARE, SQUARE, SQUARE, SQUARE, SQUARE),
    (0, 2, False): (SQUARE, SQUARE, SQUARE, SQUARE, SQUARE),
    # float32 products are exact float32 (no TF32), in registers: a large tile would spill.
    (0, 4, True): (EXACT, EXACT, EXACT, EXACT, EXACT),
    (0, 4, False): (EXACT, EXACT, EXACT, EXACT, EXACT),
}


@functools.lru_cache(maxsize=64)
def choose_tiles(device: torch.device, dtype: torch.dtype, hidden: int | None) -> Tiles:
    if interpreting() or device.type != "cuda":
        return INTERPRETED
    major = torch.cuda.get_device_capability(device)[0] if torch.version.hip is None else 0
    fills = (hidden or 256) % 256 == 0
    tiles = TILES.get((major, dtype.itemsize, fills)) or TILES[(0, dtype.itemsize, fills)]
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Tiles(*tiles, row=4096, programs=processors, overlap=major >= 9)
