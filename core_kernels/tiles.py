"""Tile configurations as data: how large a block of each product one program computes, by device, dtype and shape.

What was measured is in ``tiles.json``, which ``benchmarks/tune.py`` writes. Devices that are not in it get tiles that
fit anywhere.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch

from core_kernels.engine import interpreting
from core_kernels.notices import say_once

# The products: statistics of the logits; the same, leaving their exponentials behind; a slab of the gradient of the
# logits; and the gradients of the inputs.
PRODUCTS = ("project", "keep", "slab", "grad_x", "grad_weight")
# Up to this hidden size the sum of a tile of logits is short, and what is done with the tile counts.
SHORT_HIDDEN = 1024


@dataclass(frozen=True)
class Tile:
    """A product's output tile is ``m x n``, summed ``k`` at a time."""

    m: int
    n: int
    k: int
    group: int  # output tiles are visited in groups of this many rows, so that operands are reused from L2
    warps: int
    stages: int
    resident: int = 1  # programs that a multiprocessor runs at a time
    specialized: bool = False  # one more warp loads what these multiply, four of them for each part of the tile's rows

    @property
    def parts(self) -> int:
        return 8 // self.warps if self.specialized else 1

    @property
    def pipelined(self) -> Tile:
        """As Triton itself overlaps loads and products: for operands without descriptors, and other GPUs."""
        return replace(self, warps=8, stages=min(self.stages, 3), specialized=False) if self.specialized else self


@dataclass(frozen=True)
class Row:
    """A kernel over rows of given logits takes ``block`` columns at a time."""

    block: int
    warps: int


@dataclass(frozen=True)
class Tiles:
    """The tile of each product; the row kernels' blocks."""

    project: Tile
    keep: Tile
    slab: Tile
    grad_x: Tile
    grad_weight: Tile
    forward: Row
    backward: Row
    processors: int
    overlap: bool  # a launch may start as the one before runs out of programs (Hopper and later)

    def __post_init__(self) -> None:
        for name in ("slab", "keep"):
            rows = getattr(self, name).m  # of its tiles the last is filled with zeros, and no more is
            if rows % self.grad_weight.k:
                raise ValueError(
                    f"{name}.m must be a multiple of grad_weight.k, which sums over whole blocks of the rows that it "
                    f"writes; got {rows} and {self.grad_weight.k}"
                )

    def programs(self, tile: Tile) -> int:
        """That run at a time."""
        return self.processors * tile.resident


SMALL = Tile(32, 64, 32, group=2, warps=4, stages=1)
# Interpreted tiles are small on purpose: small test shapes then span several of them in every dimension.
INTERPRETED = Tiles(
    SMALL, SMALL, SMALL, SMALL, Tile(64, 32, 32, 2, 4, 1), Row(128, 4), Row(128, 4), processors=3, overlap=False
)
# By bytes per element. float32 products are exact float32 (no TF32), in registers: a large tile would spill.
ANYWHERE = {2: Tile(128, 128, 32, 8, 8, 3), 4: Tile(64, 64, 32, 8, 4, 2)}
ANY_ROW = Row(4096, 8)


@functools.lru_cache(maxsize=64)
def choose_tiles(device: torch.device, dtype: torch.dtype, hidden: int | None) -> Tiles:
    if interpreting() or device.type != "cuda":
        return INTERPRETED
    capability = torch.cuda.get_device_capability(device)[0] if torch.version.hip is None else 0
    length = "short" if (hidden or 0) <= SHORT_HIDDEN else "long"
    tiles: dict[str, Any] = {name: ANYWHERE[dtype.itemsize] for name in PRODUCTS}
    rows: dict[str, Any] = {"forward": ANY_ROW, "backward": ANY_ROW}
    for entry in measured():
        if entry["capability"] == capability and "rows" in entry:
            rows |= {name: Row(*row) for name, row in entry["rows"].items()}
        elif entry["capability"] == capability and (entry["bytes"], entry["hidden"]) == (dtype.itemsize, length):
            tiles |= {name: Tile(*tile) for name, tile in entry["tiles"].items()}
    if not can_specialize():
        tiles = {name: tile.pipelined for name, tile in tiles.items()}
    if all(entry["capability"] != capability for entry in measured()):
        say_once(
            "the tiles of its kernels were measured on other GPUs than this one, which may be slower than it could be "
            "with those that benchmarks/tune.py finds for it"
        )
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Tiles(**tiles, **rows, processors=processors, overlap=capability >= 9)


def can_specialize() -> bool:
    """Whether this Triton has what ``kernels/hopper.py`` is written in."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return torch.version.hip is None and (int(major), int(minor)) >= (3, 6)


@functools.cache
def measured() -> list[dict]:
    return json.loads(resources.files("core_kernels").joinpath("tiles.json").read_text())
