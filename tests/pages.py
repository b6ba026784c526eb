"""Benchmarks, run as their users do, and the pages that their report makes of a results file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support import on_gpu

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
COMPILE_FASTER = "--xla_backend_optimization_level=0"  # what is compiled runs for a moment
ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": COMPILE_FASTER}
AS_THE_SUITE = {} if on_gpu() else ON_CPU


def run_benchmark(script: str, *arguments: str | Path, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, BENCHMARKS / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shared_file(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A file that ``make`` makes once, in whichever of pytest's workers comes first."""
    base = factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            make(unfinished)
            unfinished.rename(path)
    return path


def report(results: Path, pages: tuple[str, ...], folder: Path) -> dict[str, str]:
    """What the report makes of copies of the pages in a folder."""
    for page in pages:
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, folder / page)
    run_benchmark("report.py", results, "--root", folder)
    return {page: (folder / page).read_text() for page in pages}
