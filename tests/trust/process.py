"""A function run in an interpreter of its own, which a fault may end, and what came of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240  # seconds, of which a function takes a tenth, if it does not hang

_PROGRAM = """
import faulthandler, importlib, sys
faulthandler.dump_traceback_later({limit}, exit=True)
getattr(importlib.import_module({module!r}), {name!r})(*sys.argv[1:])
"""


def run(function: Callable[..., None], *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call ``function``, of a module, with the arguments as text; one that hangs prints its stacks and fails."""
    program = _PROGRAM.format(limit=LIMIT, module=function.__module__, name=function.__name__)
    try:
        return subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)} | environment,
            capture_output=True,
            text=True,
            timeout=LIMIT + 10,
        )
    except subprocess.TimeoutExpired as hung:
        pytest.fail(f"{function.__name__} hangs:\n{hung.stdout}\n{hung.stderr}", pytrace=False)


def run_well(function: Callable[..., None], *arguments: object, **environment: str) -> str:
    """The same, which has to end well; answers what it prints."""
    done = run(function, *arguments, **environment)
    if done.returncode:
        output = f"{done.stdout}\n{done.stderr}"
        pytest.fail(f"{function.__name__} ends with {done.returncode}:\n{output}", pytrace=False)
    return done.stdout
