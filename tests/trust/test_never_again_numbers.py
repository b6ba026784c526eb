"""Line 8: numbers at the ends of their range, of losses and of logits; line 9 is in ``test_never_again_large.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from core_kernels.tiles import INTERPRETED, Row, Tile, choose_tiles
from tests.parity import framework, frontends
from tests.parity.cases import Case, Inputs, make_inputs
from tests.parity.closeness import EPSILON
from tests.support import interpreting, suite_device
from tests.trust.never_again import (
    AHEAD,
    KEPT,
    LOGITS,
    SLABS,
    Way,
    agree,
    cycled,
    in_every_way,
    in_ways,
    per_token_in_every_way,
    run,
)

SIXTEEN_BITS = (
    LOGITS[1],
    Way("logits", torch.float16),
    SLABS[2],
    Way("linear", torch.float16, "lean", "slabs"),
    KEPT,
    AHEAD,
)


@in_ways(*SIXTEEN_BITS)
def test_8_the_loss_of_16_bit_inputs_is_float32_and_as_exact(way: Way, frontend: str) -> None:
    case = way.case("loss_dtype", options={"reduction": "sum", "lse_square_scale": 0.01})
    ours = agree(frontend, way, case)
    for name in ("loss", "z_loss"):
        assert ours[name].dtype == np.float32
        assert torch.tensor(float(ours[name])).to(way.dtype).float() != float(ours[name]), "no digit more than 16 bits"


def with_label_logits(case: Case, gaps: torch.Tensor) -> Inputs:
    """Logits near 0, but for each token's label, whose logit is near the token's gap; no token is ignored.

    Of a projection, each token has a direction of its own, as has its label's class; turned so that all of their sum
    is rounded.
    """
    inputs = make_inputs(case)
    token = torch.arange(len(gaps))
    labels = 2 * token + 1
    if case.operation == "logits":
        inputs.arrays["logits"].mul_(0.1)[token, labels] = gaps.to(case.dtype)
    else:
        inputs.arrays["x"].mul_(0.1)[token, token] = gaps.to(case.dtype)
        inputs.arrays["weight"].mul_(0.1)[labels] += torch.eye(case.hidden, dtype=case.dtype)[: len(gaps)]
        turn, _ = torch.linalg.qr(torch.randn(case.hidden, case.hidden, generator=torch.Generator().manual_seed(0)))
        for array in inputs.arrays.values():
            array.copy_(array.float() @ turn)
    return replace(inputs, labels=labels)


def check_each_loss(case: Case, inputs: Inputs, loss: np.ndarray) -> None:
    """Each to twice plain torch's error, and a few roundings of itself or of a sum of exponentials near 1."""
    expected, plain = frontends.run_oracle(case, inputs)["loss"], framework.run(case, inputs, suite_device())["loss"]
    allowed = 2 * np.abs(plain.numpy() - expected) + EPSILON[torch.float32] * np.maximum(expected, 1.0)
    assert (np.abs(loss - expected) <= allowed).all(), (loss, expected)


@per_token_in_every_way
@pytest.mark.parametrize("gap", [16.0, 1000.0])
def test_8_a_token_loss_is_never_negative(way: Way, frontend: str, gap: float) -> None:
    """The label's logit is the whole of the sum, up to rounding: a log-probability must not come out above 0."""
    case = way.case("never_negative", leading=(12,), options={"reduction": "none"})
    inputs = with_label_logits(case, gap + torch.linspace(0, 1, 12))
    loss = run(frontend, way, case, inputs)["loss"]
    assert (loss >= 0).all()
    check_each_loss(case, inputs, loss)


@in_ways(*LOGITS, *SLABS)
def test_8_the_log_of_a_vanished_exponential_is_finite_under_smoothing(way: Way, frontend: str) -> None:
    """Logits over 400 nats: most probabilities are 0 in float32, and none of their logs is ``-inf``."""
    case = way.case("vanished", options={"label_smoothing": 0.2, "reduction": "none"})
    inputs = make_inputs(case)
    slope = torch.linspace(-1, 1, case.vocab).to(case.dtype)
    if way.operation == "logits":
        inputs.arrays["logits"] += 200 * slope
    else:
        inputs.arrays["x"][:, 0] = 200
        inputs.arrays["weight"][:, 0] = slope
    ours = agree(frontend, way, case, inputs)
    assert np.isfinite(ours["loss"]).all() and (ours["loss"][1:-1] > 20).all()


@per_token_in_every_way
def test_8_losses_of_a_millionth_and_of_200_nats_are_each_exact(way: Way, frontend: str) -> None:
    """Relative to themselves: beside one of 200 nats nobody would see that a loss of 1e-6 is wrong."""
    gaps = torch.tensor([18.0, 18.25, 18.5, 10.0, 5.0, 0.0, -20.0, -200.0, -195.0])
    case = way.case("each_exact", leading=(9,), options={"reduction": "none"})
    inputs = with_label_logits(case, gaps)
    loss = agree(frontend, way, case, inputs)["loss"]
    assert loss.min() < 2e-6 and loss.max() > 195
    check_each_loss(case, inputs, loss)


@in_every_way
def test_8_logits_around_10000_lose_no_more_than_float32_does(way: Way, frontend: str) -> None:
    case = way.case("around_10000", options={"lse_square_scale": 1e-6})
    inputs = make_inputs(case)
    if way.operation == "logits":
        inputs.arrays["logits"].mul_(20).add_(1e4)
    else:
        for array in inputs.arrays.values():  # so that plain torch is not exact by luck, every sum is exact
            array.mul_(8).round_().div_(8)
            array[:, 0] = 100.0
    agree(frontend, way, case, inputs)


@in_every_way
@pytest.mark.parametrize("nats", [1.7e4, 1e5, 1e8, 1e9, 1e12, 3e38] if not interpreting() else [1e5, 3e38])
def test_8_logits_up_to_the_end_of_float32_agree_with_float64(way: Way, frontend: str, nats: float) -> None:
    """A class of so many nats, whose product with log2(e) is rounded or too large, is almost every token's label;
    with metrics, and without any.
    """
    case, top = way.case("far"), 40
    inputs = make_inputs(case)
    if way.operation == "logits":
        inputs.arrays["logits"][:, top] = nats
    else:
        inputs.arrays["x"][:, 0] = 1
        inputs.arrays["weight"][top] = 0
        inputs.arrays["weight"][top, 0] = nats
    inputs = replace(inputs, labels=cycled([top], 7))
    inputs.labels[3] = 5
    ours = agree(frontend, way, case, inputs)
    assert nats / 8 < ours["loss"] < nats / 6  # of one token in seven
    for name, value in run(frontend, way, case, inputs, metrics={}).items():
        np.testing.assert_array_equal(value, ours[name])


# ---- a large vocab

WIDE = Tile(16, 16384, 16, group=2, warps=4, stages=1)
WIDE_TILES: dict[str, Any] = {
    "project": WIDE,
    "keep": WIDE,
    "slab": WIDE,
    "grad_x": Tile(16, 16, 16384, 2, 4, 1),
    "grad_weight": Tile(16384, 16, 16, 2, 4, 1),
    "forward": Row(16384, 4),
    "backward": Row(16384, 4),
}


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interpreted kernels that take 16384 classes at a time: 4096 tiles of 64 would take minutes."""
    monkeypatch.setattr("core_kernels.tiles.INTERPRETED", replace(INTERPRETED, **WIDE_TILES))
    choose_tiles.cache_clear()
    yield
    choose_tiles.cache_clear()


@pytest.mark.usefixtures("wide_tiles")
@in_ways(LOGITS[0], KEPT, SLABS[0], *(() if interpreting() else (LOGITS[1], *SLABS[1:], AHEAD)))
def test_8_a_vocab_of_262144_agrees_with_float64(way: Way, frontend: str) -> None:
    case = way.case("large_vocab", leading=(4,), hidden=8, vocab=262_144)
    inputs = make_inputs(case)
    inputs.labels[1:3] = torch.tensor([262_143, 131_071])
    agree(frontend, way, case, inputs)
