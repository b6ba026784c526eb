"""What importing a frontend imports, each in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="its interpreters see no TRITON_INTERPRET: plain runs have it")

ROOT = Path(__file__).resolve().parents[2]


def run_python(program: str, **environment: str) -> str:
    """Run ``program`` on a plain CPU, in an interpreter that has imported nothing, and return what it prints."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=clean | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_torch_api_and_the_core_do_not_import_jax() -> None:
    program = """
import sys
import core_kernels, torch_api
print(sorted(name for name in sys.modules if name.split(".")[0] in ("jax", "jaxlib", "jax_api")))
"""
    assert run_python(program) == "[]"


def test_without_jax_the_error_says_what_to_install_and_torch_api_works() -> None:
    program = """
import sys
sys.modules["jax"] = None
try:
    import jax_api
except ImportError as error:
    print(error)
import torch, torch_api
print(torch_api.cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3])).item())
"""
    message, loss = run_python(program).splitlines()
    assert message == "jax_api needs JAX, which is an extra: pip install 'twinhead[jax]'"
    assert abs(float(loss) - 1.3862944) < 1e-6


def test_jax_api_imports_no_kernel_until_one_runs() -> None:
    program = """
import sys
import jax_api, jax, jax.numpy as jnp
kernels = lambda: sorted(name for name in sys.modules if name.startswith("core_kernels.kernels"))
print(kernels())
print(jax.value_and_grad(jax_api.cross_entropy)(jnp.zeros((2, 4)), jnp.array([1, 3]))[0])
print(kernels())
"""
    imported, loss, imported_by_call = run_python(program).splitlines()
    assert (imported, imported_by_call) == ("[]", "[]")
    assert abs(float(loss) - 1.3862944) < 1e-6


def test_x64_from_the_environment_widens_predictions() -> None:
    program = """
import jax_api, jax.numpy as jnp
labels = jnp.array([1, 3])
out = jax_api.cross_entropy(jnp.eye(4, dtype=jnp.float32)[:2], labels, return_predicted_tokens=True)
print(labels.dtype, out.loss.dtype, out.predicted_tokens.dtype, out.predicted_tokens.tolist())
"""
    assert run_python(program, JAX_ENABLE_X64="1") == "int64 float32 int64 [0, 1]"
