"""Runs the tests of several devices: each file in a process of its own, where JAX has eight virtual CPU devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jax_api.sharded import ENVIRONMENT
from tests.support import interpreting

HERE = Path(__file__).resolve().parent
FILES = sorted(path.name for path in HERE.glob("test_sharded_*.py"))
if interpreting():  # which takes long: the file whose kernels no other test of this frontend runs
    FILES = ["test_sharded_vocab.py"]
# Once a process that hangs at a collective has printed its stacks it is ended, and so is the one that will not print.
HANGING, ENDED = 120, 560


@pytest.mark.parametrize("name", FILES)
def test_on_virtual_devices(name: str) -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ("-q", "-p", "no:cacheprovider", f"--timeout={HANGING}", "--timeout-method=thread")
    run = subprocess.run(
        (sys.executable, "-m", "pytest", *options, str(HERE / name)),
        cwd=HERE.parents[1],
        env=outside | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=ENDED,
    )
    if run.returncode != 0:
        pytest.fail(f"in a process of its own:\n{run.stdout}", pytrace=False)
    assert "passed" in run.stdout and "skipped" not in run.stdout
