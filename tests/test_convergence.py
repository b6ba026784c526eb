"""Training with our loss follows training with the framework's own, and the README says what was measured of it."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.pages import AS_THE_SUITE, RESULTS, ROOT, report, run_benchmark, shared_file

COMMITTED = RESULTS / "convergence.json"
# Of the spread between seeds: far less than it, even after what rounding makes of all steps. bf16 rounds by 2^-9.
MOST = {"float32": 1e-3, "bfloat16": 0.1}

pytestmark = pytest.mark.skipif(not (find_spec("jax") and find_spec("optax")), reason="needs JAX and optax")


@pytest.fixture(scope="module", params=("tiny", "committed"))
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Those of a toy model, on the suite's device, and those that the README tells of."""
    if request.param == "committed":
        return json.loads(COMMITTED.read_text())
    arguments = ["--tiny", "--commit", "0123456789", "--out"]
    run = partial(run_benchmark, "convergence.py", *arguments, **AS_THE_SUITE)
    return json.loads(shared_file(tmp_path_factory, "convergence.json", run).read_text())


def _curves(results: dict, frontend: str, dtype: str, loss: str) -> np.ndarray:
    """Held-out losses (seeds, evaluations)."""
    return np.array([run[loss] for run in results["curves"][frontend][dtype].values()])


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("frontend", ("torch", "jax"))
def test_runs_of_one_seed_are_far_closer_than_seeds_are(results: dict, frontend: str, dtype: str) -> None:
    ours, theirs = (_curves(results, frontend, dtype, loss) for loss in ("twinhead", "framework"))
    assert ours.shape == theirs.shape == (results["setup"]["seeds"], len(results["evaluated"]))
    spread = theirs.std(axis=0, ddof=1)
    assert (spread > 1e-3).all()  # seeds do differ, from the first evaluation on
    assert (np.abs(ours - theirs).max(axis=0) <= MOST[dtype] * spread).all()
    assert (ours != theirs).any()  # they are two losses
    assert (theirs[:, -1] < theirs[:, 0] - 0.01).all()  # which teach something


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("loss", ("twinhead", "framework"))
def test_both_frontends_learn_the_same(results: dict, loss: str, dtype: str) -> None:
    """Of the model too every operation rounds otherwise, so float32 has no bound of its own."""
    by_torch, by_jax = (_curves(results, frontend, dtype, loss) for frontend in ("torch", "jax"))
    spread = by_torch.std(axis=0, ddof=1)
    assert (np.abs(by_torch - by_jax).max(axis=0) <= MOST["bfloat16"] * spread).all()


def test_bf16_is_bf16(results: dict) -> None:
    for frontend in ("torch", "jax"):
        for loss in ("twinhead", "framework"):
            exact, rounded = (_curves(results, frontend, dtype, loss) for dtype in ("float32", "bfloat16"))
            difference = np.abs(exact - rounded).max(axis=1)
            assert (difference > 1e-5).all() and (difference < 1e-2).all(), (frontend, loss)


def test_the_readme_says_what_the_committed_results_do(tmp_path: Path) -> None:
    page = report(COMMITTED, ("README.md",), tmp_path)["README.md"]
    assert page == (ROOT / "README.md").read_text(), "run benchmarks/report.py benchmarks/results/convergence.json"
    assert (tmp_path / "docs/convergence.png").read_bytes().startswith(b"\x89PNG")
    ends = _curves(json.loads(COMMITTED.read_text()), "torch", "float32", "twinhead")[:, -1]
    assert f"| torch, float32 | {ends.mean():.4f} ± {ends.std(ddof=1):.4f} |" in page
