"""Every case through both frontends: against the oracle, within what plain torch itself gets, and bit for bit alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.parity import framework, frontends
from tests.parity.cases import CASES, Case, make_inputs
from tests.support import suite_device

INTEGERS = ("predicted_tokens", "num_valid", "num_correct")
# Beyond twice plain torch's own error: a few roundings of a float32 result, one of a 16-bit one.
EPSILON = {torch.float32: 8 * 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frontends_agree_with_the_oracle_and_with_each_other(case: Case) -> None:
    inputs = make_inputs(case)
    oracle = frontends.run_oracle(case, inputs)
    plain = framework.run(case, inputs, suite_device())
    by_torch = frontends.run_torch(case, inputs, suite_device())
    _check("torch", case, by_torch, oracle, plain)
    if case.layout in ("contiguous", "transposed_weight"):  # JAX arrays have no strides but a weight's layout
        by_jax = frontends.run_jax(case, inputs)
        _check("jax", case, by_jax, oracle, plain)
        _check_same_bits(by_torch, by_jax)


def _check_same_bits(by_torch: frontends.Results, by_jax: frontends.Results) -> None:
    assert by_torch.keys() == by_jax.keys()
    for key in by_torch:
        ours, theirs = (np.asarray(results[key], np.float64) for results in (by_torch, by_jax))
        assert ours.shape == theirs.shape, key
        assert np.array_equal(ours, theirs, equal_nan=True), f"{key}: torch and JAX differ"


def _check(
    frontend: str,
    case: Case,
    ours: frontends.Results,
    expected: frontends.Results,
    plain: dict[str, torch.Tensor],
) -> None:
    assert ours.keys() == expected.keys(), frontend
    for key in INTEGERS:
        assert np.issubdtype(ours[key].dtype, np.integer), f"{frontend} {key}"
        assert np.array_equal(ours[key], expected[key]), f"{frontend} {key}"
    assert ours["token_accuracy"].dtype == np.float32, frontend
    assert np.allclose(ours["token_accuracy"], expected["token_accuracy"], rtol=1e-6, atol=0), frontend
    for key in expected.keys() - {*INTEGERS, "token_accuracy"}:
        is_gradient = key.startswith("grad_")
        assert is_gradient or ours[key].dtype == np.float32, f"{frontend} {key}"
        epsilon = EPSILON[case.dtype if is_gradient else torch.float32]
        _check_close(f"{frontend} {key}", ours[key], expected[key], plain[key].numpy(), epsilon)


def _check_close(key: str, ours: np.ndarray, expected: np.ndarray, plain: np.ndarray, epsilon: float) -> None:
    """``|ours - expected| <= 2 |plain - expected| + epsilon |expected|``, as a norm and at the worst element."""
    assert ours.shape == expected.shape, key
    ours = ours.astype(np.float64)
    finite = np.isfinite(expected)
    assert np.array_equal(ours[~finite], expected[~finite], equal_nan=True), f"{key}: not where inf and NaN belong"
    ours, expected, plain = ours[finite], expected[finite], plain.reshape(finite.shape)[finite]
    assert np.isfinite(ours).all(), f"{key}: inf or NaN where the oracle has a number"
    if not expected.size:
        return
    for norm in (np.linalg.norm, lambda a: np.abs(a).max()):
        error, allowed, scale = norm(ours - expected), norm(plain - expected), norm(expected)
        assert error <= 2 * allowed + epsilon * scale, f"{key}: {error:.3e}, plain torch {allowed:.3e} of {scale:.3e}"
