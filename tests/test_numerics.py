"""Errors against float64 are within twice torch's, and docs/numerics.md says what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pages import AS_THE_SUITE, BENCHMARKS, RESULTS, ROOT, report, run_benchmark, shared_file
from tests.parity import oracle
from tests.parity.closeness import EPSILON

COMMITTED = RESULTS / "errors.json"
PAGE = "docs/numerics.md"
LARGEST = {"logits about 1e4": 1e4}  # of the numbers whose difference a loss is, 1 elsewhere: exp(0)
HARDWARE_EXP = 2.0**-22  # what an exponential is wrong by on a GPU


@pytest.fixture(scope="module", params=("tiny", "committed"))
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Those of a few tokens, on the suite's device, and those that the page tells of."""
    if request.param == "committed":
        return json.loads(COMMITTED.read_text())
    run = partial(run_benchmark, "errors.py", "--tiny", "--commit", "0123456789", "--out", **AS_THE_SUITE)
    return json.loads(shared_file(tmp_path_factory, "errors.json", run).read_text())


def _ours(rows: dict[str, dict[str, float]]) -> Iterator[tuple[str, str, float]]:
    for memory, row in rows.items():
        if memory not in ("reference", "torch"):
            yield from ((memory, part, error) for part, error in row.items())


def test_errors_are_within_twice_those_of_torch(results: dict) -> None:
    """And a few roundings: of the loss, those of the numbers whose difference it is; of a gradient, one of its dtype
    and that of a probability next to 1, relative to how little is left of it.
    """
    seen = set()
    exp = 0.0 if results["device"] == "cpu" else HARDWARE_EXP
    for operation, dtypes in results["errors"].items():
        for dtype, kinds in dtypes.items():
            for data, rows in kinds.items():
                loss, torchs = rows["reference"]["loss"], rows["torch"]
                rounding = EPSILON[torch.float32] * (1 + LARGEST.get(data, 1.0) / loss)
                for memory, part, error in _ours(rows):
                    epsilon = rounding if part == "loss" else EPSILON[getattr(torch, dtype)] + exp / loss
                    where = f"{operation} {dtype} {data} {memory} {part}"
                    assert error <= 2 * torchs[part] + epsilon, f"{where}: {error:.2e}, torch's {torchs[part]:.2e}"
                    seen.add((operation, dtype, data, memory, part))
    linear = [(memory, part) for memory in ("speed", "auto", "lean") for part in ("loss", "x", "weight", "bias")]
    assert sum(case[0] == "linear" for case in seen) == 3 * 4 * len(linear)
    assert sum(case[0] == "logits" for case in seen) == 3 * 4 * 2


def test_tiny_losses_and_large_logits_are(results: dict) -> None:
    errors = results["errors"]
    for operation in ("linear", "logits"):
        for kinds in errors[operation].values():
            assert 1e-7 < kinds["tiny loss"]["reference"]["loss"] < 1e-2
            assert 1.0 < kinds["peaked"]["reference"]["loss"] < 2.0
    # Where logits are 1e4, numbers of bf16 are 64 apart, and torch's logits too.
    assert errors["linear"]["bfloat16"]["logits about 1e4"]["torch"]["x"] > 0.05


def test_the_reference_is_that_of_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("errors.BLOCK", 5)  # several, and the last one shorter
    from errors import linear_problems, logits_problems, reference

    size = (23, 8, 31)
    linear = [*linear_problems(size, "cpu", torch.float32)]
    for _, leaves, labels in [*linear, *logits_problems(size, "cpu", torch.float32)]:
        if "x" in leaves:
            leaves["bias"] = torch.linspace(-1.0, 1.0, 31)
        found = reference(leaves, labels)
        compute = oracle.fused_linear_ce if "x" in leaves else oracle.cross_entropy
        wanted = compute(labels=labels.numpy(), **{name: leaf.numpy() for name, leaf in leaves.items()})
        np.testing.assert_allclose(found["loss"], wanted.loss, rtol=1e-9)
        for name in leaves:
            np.testing.assert_allclose(found[name], wanted.gradients[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_page_says_what_the_committed_results_do(tmp_path: Path) -> None:
    page = report(COMMITTED, (PAGE,), tmp_path)[PAGE]
    assert page == (ROOT / PAGE).read_text(), "run benchmarks/report.py benchmarks/results/errors.json"
    loss = json.loads(COMMITTED.read_text())["errors"]["logits"]["bfloat16"]["peaked"]["reference"]["loss"]
    assert f"| bf16 | peaked | {loss:.1f} | " in page


def test_the_tests_that_the_page_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / PAGE).read_text())
    assert len(named) > 10
    assert all((ROOT / name).is_file() for name in named)
