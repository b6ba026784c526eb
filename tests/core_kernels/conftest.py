"""Fixtures of the core's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from core_kernels import plan
from core_kernels.tiles import INTERPRETED, PRODUCTS, Tile

WIDE = Tile(128, 256, 64, group=8, warps=8, stages=3)
LARGE_GPU = replace(INTERPRETED, **dict.fromkeys(PRODUCTS, WIDE), processors=132, overlap=True)


@pytest.fixture(params=["interpreted", "large GPU"])
def every_tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans of the kernels on a CPU, with the interpreter's tiles and with those of a large GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    plan.cache_clear()
    if request.param == "large GPU":
        monkeypatch.setattr(sys.modules["core_kernels.plan"], "choose_tiles", lambda *_: LARGE_GPU)
    yield
    plan.cache_clear()
