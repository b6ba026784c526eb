"""How close is close enough: twice the error of plain torch, and a few roundings."""

from __future__ import annotations

import numpy as np
import torch

from tests.parity.cases import Case
from tests.parity.frontends import Results

INTEGERS = ("predicted_tokens", "num_valid", "num_correct")
# Beyond twice plain torch's own error: a few roundings of a float32 result, one of a 16-bit one.
EPSILON = {torch.float32: 8 * 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def check_same_bits(by_torch: Results, by_jax: Results) -> None:
    assert by_torch.keys() == by_jax.keys()
    for key in by_torch:
        ours, theirs = (np.asarray(results[key], np.float64) for results in (by_torch, by_jax))
        assert ours.shape == theirs.shape, key
        assert np.array_equal(ours, theirs, equal_nan=True), f"{key}: torch and JAX differ"


def check_results(
    frontend: str,
    case: Case,
    ours: Results,
    expected: Results,
    plain: dict[str, torch.Tensor],
) -> None:
    assert ours.keys() == expected.keys(), frontend
    for key in expected.keys() & {*INTEGERS}:
        assert np.issubdtype(ours[key].dtype, np.integer), f"{frontend} {key}"
        assert np.array_equal(ours[key], expected[key]), f"{frontend} {key}"
    if "token_accuracy" in expected:
        assert ours["token_accuracy"].dtype == np.float32, frontend
        assert np.allclose(ours["token_accuracy"], expected["token_accuracy"], rtol=1e-6, atol=0), frontend
    for key in expected.keys() - {*INTEGERS, "token_accuracy"}:
        is_gradient = key.startswith("grad_")
        assert is_gradient or ours[key].dtype == np.float32, f"{frontend} {key}"
        epsilon = EPSILON[case.dtype if is_gradient else torch.float32]
        if case.options.get("use_token_scaling"):  # an exponential of the token's loss, up to 16 here, has its rounding
            epsilon += 16 * 2.0**-24
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
