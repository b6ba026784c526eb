"""The demo trains, in both frontends alike, and shows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


def _train_lm(*arguments: str | Path) -> str:
    command = [sys.executable, ROOT / "examples" / "train_lm.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_lm_learns_the_same_in_both_frontends(tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    printed = _train_lm("--steps", "40", "--batch-size", "4", "--plot", picture)
    last = printed.strip().splitlines()[-1]
    pattern = r"torch ([\d.]+), jax ([\d.]+): \|difference\| ([\d.e-]+) in held-out loss; .* agree on ([\d.]+)%"
    found = re.match(pattern, last)
    assert found, last
    by_torch, by_jax, difference, agreement = map(float, found.groups())
    uniform = float(re.search(r"uniform, log V\D+([\d.]+)", printed).group(1))
    assert by_torch < uniform - 1.0  # nats better than knowing nothing
    assert by_torch == pytest.approx(by_jax, abs=1e-3)
    assert difference < 1e-3
    assert agreement > 99.0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_train_lm_in_torch_alone_needs_no_jax(tmp_path: Path) -> None:
    arguments = ["--frontend", "torch", "--steps", "2", "--batch-size", "1", "--plot", str(tmp_path / "curves.png")]
    code = (
        f"import runpy, sys\nsys.modules['jax'] = None\nsys.argv = ['train_lm.py', *{arguments!r}]\n"
        f"sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
        f"runpy.run_path({str(ROOT / 'examples' / 'train_lm.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^torch \d+\.\d+ held-out loss$", done.stdout, re.MULTILINE)
