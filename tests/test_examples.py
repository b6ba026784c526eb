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


def _run(example: str, *arguments: str | Path, **environment: str) -> str:
    command = [sys.executable, ROOT / "examples" / example, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def _numbers(pattern: str, printed: str) -> list[float]:
    """The groups of ``pattern``, which is one whole line of what was printed."""
    found = re.search(f"^{pattern}$", printed, re.MULTILINE)
    assert found, printed
    return [float(group) for group in found.groups()]


def test_train_lm_learns_the_same_in_both_frontends(tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    printed = _run("train_lm.py", "--steps", "40", "--batch-size", "4", "--plot", picture)
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


def test_nnx_lm_learns_and_counts_its_predictions() -> None:
    pytest.importorskip("flax")
    printed = _run("nnx_lm.py", "--steps", "20", "--batch-size", "4")
    before, after = _numbers(r"held-out loss ([\d.]+) before training, ([\d.]+) after", printed)
    assert before > 8.0  # about log 4096, if not worse: it knows nothing
    assert after < before - 1.5
    accuracy, right, valid = _numbers(r"held-out accuracy ([\d.]+): (\d+) of (\d+) tokens predicted right", printed)
    assert right > 0
    assert accuracy == pytest.approx(right / valid, abs=5e-5)  # as printed
    assert re.search(r"^text │ .*def .*\n nnx │ ", printed, re.MULTILINE)


@pytest.mark.parametrize(("tokens", "vocab"), [(4, 2), (1, 1)])
def test_sharded_lm_learns_what_one_device_would(tokens: int, vocab: int) -> None:
    devices = f"--xla_force_host_platform_device_count={tokens * vocab}"
    printed = _run("sharded_lm.py", "--steps", "10", JAX_PLATFORMS="cpu", XLA_FLAGS=devices)
    assert f"cpu devices: {tokens} for the tokens x {vocab} for the vocab\n" in printed
    before, after = _numbers(r"held-out loss ([\d.]+) before training, ([\d.]+) after", printed)
    assert after < before - 1.5
    for name in ("loss", "accuracy"):
        sharded, plain = _numbers(rf"held-out {name} ([\d.]+) on the mesh, ([\d.]+) on one device", printed)
        assert sharded == pytest.approx(plain, rel=1e-5)


def test_finetune_hf_learns_without_logits(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    picture = tmp_path / "passage.png"
    printed = _run("finetune_hf.py", "--steps", "20", "--batch-size", "4", "--plot", picture)
    before, after = _numbers(r"held-out loss ([\d.]+) before training, ([\d.]+) after", printed)
    assert before > 8.0  # about log 4096, if not worse: it knows nothing
    assert after < before - 1.5
    (accuracy,) = _numbers(r"held-out accuracy [\d.]+ before training, ([\d.]+) after", printed)
    assert accuracy > 0
    assert re.search(r"^ text │ .*def .*\nLlama │ ", printed, re.MULTILINE)
    assert picture.read_bytes().startswith(b"\x89PNG")
