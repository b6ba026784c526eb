"""Line 1: what is masked has no part in the softmax, wherever it lies and whatever else is asked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.parity.cases import make_inputs
from tests.trust.never_again import SLABS, Way, agree, in_every_way, in_ways

INF = float("inf")


@in_every_way
def test_1_padded_lanes_do_not_leak_into_the_softmax_under_a_softcap(way: Way, frontend: str) -> None:
    """Ten classes in a block of far more lanes, with a cap of 2: a lane that is masked before it counts ``exp(-2)``."""
    agree(frontend, way, way.case("padded", vocab=10, options={"softcap": 2.0}))


@in_ways(*SLABS)
def test_1_padded_lanes_do_not_leak_into_smoothing_under_a_softcap(way: Way, frontend: str) -> None:
    options = {"softcap": 2.0, "label_smoothing": 0.1, "lse_square_scale": 0.1, "reduction": "none"}
    agree(frontend, way, way.case("padded_smoothing", vocab=10, bias=True, class_weight=True, options=options))


@in_every_way
def test_1_a_first_vocabulary_block_of_minus_infinity_turns_no_row_into_nan(way: Way, frontend: str) -> None:
    """All columns of the first block, and some more, are ``-inf``; of a projection because it overflows."""
    masked = way.block + 5
    case = way.case("first_block", vocab=2 * way.block + 37)
    inputs = make_inputs(case)
    labels = torch.where(inputs.labels >= 0, masked + inputs.labels % (case.vocab - masked), inputs.labels)
    if way.operation == "logits":
        inputs.arrays["logits"][:, :masked] = -INF
    else:
        inputs.arrays["x"][:, 0] = 2.0
        inputs.arrays["weight"][:, 0] = 0.0
        inputs.arrays["weight"][:masked, 0] = -3e38
    ours = agree(frontend, way, case, replace(inputs, labels=labels))
    assert all(np.isfinite(values).all() for values in ours.values())


@in_ways(*SLABS)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"logit_scale": 0.5}], ids=["mean", "none", "scaled"])
def test_1_a_bias_of_minus_infinity_over_a_whole_tile_is_not_swallowed(
    way: Way, frontend: str, options: dict[str, object]
) -> None:
    """Its classes would be the likeliest: they have neither a prediction, nor probability, nor a gradient."""
    tile = slice(way.block, 2 * way.block)
    case = way.case("bias_tile", vocab=2 * way.block + 37, bias=True, options=options)
    inputs = make_inputs(case)
    inputs.arrays["weight"][tile] = 3.0 * inputs.arrays["x"][1]
    inputs.arrays["bias"][tile] = -INF
    inside = (inputs.labels >= tile.start) & (inputs.labels < tile.stop)
    ours = agree(frontend, way, case, replace(inputs, labels=torch.where(inside, tile.stop + 1, inputs.labels)))
    predicted = ours["predicted_tokens"]
    assert not ((predicted >= tile.start) & (predicted < tile.stop)).any()
    assert not ours["grad_weight"][tile].any() and not ours["grad_bias"][tile].any()
