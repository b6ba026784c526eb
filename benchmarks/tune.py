"""Measures tile configurations on this GPU and writes the fastest into ``core_kernels/tiles.json``.

    python benchmarks/tune.py

Every product of every schedule is timed by the profiler, inside whole steps at the heads of real models, one tile at a
time while the others stay; and the rows of given logits. Contenders take turns, since a hot GPU is a slower one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contenders import METRICS, evaluation, training, twinhead
from kernel_times import kernel_ms
from problems import make_problems
from shapes import SIZES

import torch_api
from core_kernels import tiles
from torch_api import operator

PLAN = sys.modules["core_kernels.plan"]
FILE = Path(tiles.__file__).with_name("tiles.json")
SHAPES = {"long": "llama3-8b", "short": "qwen2.5-0.5b"}
# The kernel of each product, and the modes of a training step that it is timed in; evaluation is none.
KERNELS = {
    "project": ("project_statistics", (None,)),
    "keep": ("project_statistics", ("speed",)),
    "slab": ("slab_gradient", ("lean",)),
    "grad_x": ("input_gradient", ("speed", "lean")),
    "grad_weight": ("weight_gradient", ("speed", "lean")),
}
TILES = [
    tiles.Tile(128, 256, 64, 8, 8, 4),
    tiles.Tile(128, 256, 64, 16, 8, 3),
    tiles.Tile(128, 128, 64, 16, 4, 3, 2),
]
# Where warps specialise: the projections' multiply in two parts of four warps each, and the others' in one of eight.
PARTED = [tiles.Tile(128, 256, 64, group, 4, 4, 1, True) for group in (8, 16)]
WHOLE = [tiles.Tile(m, n, 64, group, 8, 4, 1, True) for m, n in ((128, 256), (256, 128)) for group in (4, 8, 16)]
SPECIALIZED = {"project": PARTED, "keep": PARTED, "slab": PARTED, "grad_x": WHOLE, "grad_weight": WHOLE}
ROWS = [tiles.Row(*row) for row in ((4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32))]
ROW_KERNELS = {"forward": "cross_entropy_forward", "backward": "cross_entropy_backward"}
ROUNDS = 2


def use(chosen: tiles.Tiles) -> None:
    """Plan with these tiles from now on."""
    PLAN.choose_tiles = lambda *_: chosen
    PLAN.plan.cache_clear()
    operator._planned.cache_clear()


def fastest(name: str, candidates: list, steps: list[Callable], kernel: str, best: tiles.Tiles) -> tiles.Tiles:
    """``best`` with the candidate for ``name`` whose time, summed over the steps, is the least."""
    times: dict[Any, list[float]] = {candidate: [] for candidate in candidates}
    for _ in range(ROUNDS):
        for candidate, found in times.items():
            use(replace(best, **{name: candidate}))
            try:
                found.append(sum(kernel_ms(step)[kernel] for step in steps))
            except Exception as error:  # it does not fit this GPU
                if "out of resource" not in str(error):
                    raise
                found.append(math.inf)
    for candidate, found in times.items():
        print(f"  {name:12s} {astuple(candidate)!s:32s} {median(found):8.3f} ms", flush=True)
    return replace(best, **{name: min(times, key=lambda candidate: median(times[candidate]))})


def tune_products(shape: str) -> dict[str, list[int]]:
    size = SIZES["cuda"].shapes[shape]
    problem = make_problems(size, "cuda")["random"]
    steps = {mode: training(twinhead(memory=mode))(problem) for mode in ("speed", "lean")}
    steps[None] = evaluation(twinhead(**METRICS))(problem)
    best = tiles.choose_tiles(torch.device("cuda"), torch.bfloat16, size[1])
    print(shape, size)
    hopper = torch.cuda.get_device_capability()[0] == 9 and tiles.can_specialize()
    for name, (kernel, modes) in KERNELS.items():
        candidates = TILES + (SPECIALIZED[name] if hopper else [])
        best = fastest(name, candidates, [steps[mode] for mode in modes], kernel, best)
    use(best)
    return {name: list(astuple(getattr(best, name))) for name in KERNELS}


def tune_rows() -> dict[str, list[int]]:
    logits = torch.randn(*SIZES["cuda"].logits, device="cuda").bfloat16().requires_grad_()
    labels = torch.randint(0, logits.shape[1], logits.shape[:1], device="cuda")

    def step() -> None:
        logits.grad = None
        torch_api.cross_entropy(logits, labels).backward()

    best = tiles.choose_tiles(torch.device("cuda"), torch.bfloat16, None)
    for name, kernel in ROW_KERNELS.items():
        best = fastest(name, ROWS, [step], kernel, best)
    return {name: list(astuple(getattr(best, name))) for name in ROW_KERNELS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE, help="table to write, with what it has of other devices")
    arguments = parser.parse_args()
    capability = torch.cuda.get_device_capability()[0]
    found: list[dict] = [
        {"capability": capability, "bytes": 2, "hidden": hidden, "tiles": tune_products(shape)}
        for hidden, shape in SHAPES.items()
    ]
    found.append({"capability": capability, "rows": tune_rows()})
    others = [entry for entry in tiles.measured() if entry["capability"] != capability]
    arguments.out.write_text("[\n" + ",\n".join(f" {json.dumps(entry)}" for entry in others + found) + "\n]\n")


if __name__ == "__main__":
    main()
