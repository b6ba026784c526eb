"""Options: one frozen value, normalised, every field of it checked."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

from core_kernels import OPTION_NAMES, Options
from core_kernels.options import REDUCTIONS
from tests.core_kernels.problems import PLAIN


def test_options_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        PLAIN.softcap = 1.0


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ({"label_smoothing": 0}, {"label_smoothing": 0.0}),
        ({"label_smoothing": 1}, {"label_smoothing": 1.0}),
        ({"lse_square_scale": np.float32(0.25)}, {"lse_square_scale": 0.25}),
        ({"softcap": 30}, {"softcap": 30.0}),
        ({"logit_scale": np.float64(2.0)}, {"logit_scale": 2.0}),
        ({"ignore_index": np.int64(-1)}, {"ignore_index": -1}),
        ({"softcap": None}, {}),
    ],
    ids=str,
)
def test_options_normalise(given: dict[str, Any], normal: dict[str, Any]) -> None:
    options, wanted = Options(**given), Options(**normal)
    assert options == wanted
    assert hash(options) == hash(wanted)
    for name in normal:
        assert type(getattr(options, name)) is type(normal[name])


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_every_option_is_checked_and_named(name: str) -> None:
    error = ValueError if name == "reduction" else TypeError
    with pytest.raises(error, match=rf"^{name} must be .*, got \[\]$"):
        Options(**{name: []})
    with pytest.raises(error, match=rf"^{name} must be .*, got \[\]$"):
        replace(PLAIN, **{name: []})


SCALARS = (np.ndarray, np.generic), "an array"


def test_a_mean_over_other_items_is_a_sum_that_is_divided_after() -> None:
    for reduction in REDUCTIONS:
        assert Options.reduction_over(None, reduction, *SCALARS) == reduction
    for num_items in (0, 7, np.int64(7), np.array(7), np.array([[7.5]])):
        assert Options.reduction_over(num_items, "mean", *SCALARS) == "sum"


@pytest.mark.parametrize(
    ("num_items", "reduction", "error", "message"),
    [
        (7.0, "mean", TypeError, "must be an int or an array, got 7.0"),
        (True, "mean", TypeError, "must be an int or an array, got True"),
        ([7], "mean", TypeError, "must be an int or an array, got [7]"),
        (-1, "mean", ValueError, "must not be negative, got -1"),
        (np.ones((2, 1)), "mean", ValueError, "must be one number, got shape (2, 1)"),
        (np.ones(0), "mean", ValueError, "must be one number, got shape (0,)"),
        (7, "none", ValueError, "must be None unless reduction is 'mean', got reduction='none'"),
        (np.int64(7), "sum", ValueError, "must be None unless reduction is 'mean', got reduction='sum'"),
    ],
    ids=str,
)
def test_bad_items_are_named(num_items: Any, reduction: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^num_items_in_batch {re.escape(message)}$"):
        Options.reduction_over(num_items, reduction, *SCALARS)


@pytest.mark.parametrize(
    ("flags", "needs_argmax", "returns_output"),
    [
        ({}, False, False),
        ({"return_z_loss": True}, False, True),
        ({"return_token_accuracy": True}, True, True),
        ({"return_predicted_tokens": True}, True, True),
        ({"use_token_scaling": True, "check_labels": True}, False, False),
    ],
)
def test_what_the_flags_ask_for(flags: dict[str, bool], needs_argmax: bool, returns_output: bool) -> None:
    options = Options(**flags)
    assert (options.needs_argmax, options.returns_output) == (needs_argmax, returns_output)
