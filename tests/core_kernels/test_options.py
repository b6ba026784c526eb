"""Options: one frozen value, normalised, every field of it checked."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

from core_kernels import OPTION_NAMES, Options
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
