"""Line 7: predictions and accuracy, which agree, on ties, on rows that are no numbers, and under a softcap."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from core_kernels import Options, Step
from tests.core_kernels.problems import combine, linear, random_inputs
from tests.parity.cases import Case, Inputs, make_inputs
from tests.parity.frontends import Results
from tests.support import suite_device
from tests.trust.never_again import LINEAR, SLABS, Way, agree, cycled, in_every_way, in_ways

INF, NAN = float("inf"), float("nan")


def check_accuracy(inputs: Inputs, ours: Results) -> None:
    """The accuracy is the share of predictions that are labels, exactly."""
    labels = inputs.labels.numpy()
    correct = (ours["predicted_tokens"] == labels)[labels >= 0]
    assert ours["token_accuracy"] == np.float32(correct.mean())
    assert (ours["num_correct"], ours["num_valid"]) == (correct.sum(), correct.size)


def highest_columns(case: Case, columns: list[int], values: list[float]) -> Inputs:
    """Logits that are ``values`` in ``columns``, exactly, in every row, and lower elsewhere; labels are ``columns``."""
    inputs = make_inputs(case)
    if case.operation == "logits":
        inputs.arrays["logits"].clamp_(-3, 3)[:, columns] = torch.tensor(values, dtype=case.dtype)
    else:
        inputs.arrays["x"].clamp_(-1, 1)[:, 0] = 1
        inputs.arrays["weight"].mul_(0.1)[columns] = 0
        inputs.arrays["weight"][columns, 0] = torch.tensor(values, dtype=case.dtype)
    return replace(inputs, labels=torch.where(inputs.labels >= 0, cycled(columns, len(inputs.labels)), inputs.labels))


@in_every_way
def test_7_the_lowest_index_wins_a_tie_between_distant_blocks(way: Way, frontend: str) -> None:
    case = way.case("ties", vocab=2 * way.block + 37)
    columns = [3, way.block + 1, 2 * way.block - 2, 2 * way.block + 30]
    inputs = highest_columns(case, columns, [6.0] * len(columns))
    ours = agree(frontend, way, case, inputs)
    assert (ours["predicted_tokens"][1:-1] == columns[0]).all()
    check_accuracy(inputs, ours)
    assert 0 < ours["token_accuracy"] < 1


@in_every_way
def test_7_the_lowest_index_wins_a_tie_far_above_the_label(way: Way, frontend: str) -> None:
    """So far that exponentials relative to the label's logit would overflow, which makes kernels look at it again."""
    case = way.case("far_ties", vocab=2 * way.block + 37)
    columns = [way.block + 1, 2 * way.block - 2, 2 * way.block + 30]
    inputs = highest_columns(case, columns, [200.0] * 3)
    inputs.labels[inputs.labels >= 0] = 1
    ours = agree(frontend, way, case, inputs)
    assert (ours["predicted_tokens"][1:-1] == columns[0]).all()
    check_accuracy(inputs, ours)


@in_every_way
def test_7_the_argmax_is_taken_after_a_softcap_that_makes_ties(way: Way, frontend: str) -> None:
    """Raw logits grow from block to block, and all are capped to exactly 2: the lowest index wins."""
    case = way.case("saturated", vocab=2 * way.block + 37, options={"softcap": 2.0})
    columns = [5, way.block + 1, 2 * way.block + 30]
    inputs = highest_columns(case, columns, [200.0, 300.0, 400.0])
    ours = agree(frontend, way, case, inputs)
    assert (ours["predicted_tokens"][1:-1] == 5).all()
    check_accuracy(inputs, ours)


@in_every_way
def test_7_the_argmax_is_taken_after_a_negative_scale(way: Way, frontend: str) -> None:
    case = way.case("negative_scale", options={"logit_scale": -0.5})
    inputs = make_inputs(case)
    agree(frontend, way, case, inputs)


@in_every_way
def test_7_accuracy_and_predictions_agree_beside_rows_of_nan_and_inf(way: Way, frontend: str) -> None:
    """The first NaN is the prediction, and where there is none the first infinity; other rows know nothing of it."""
    case = way.case("broken", leading=(9,), vocab=2 * way.block + 37)
    inputs = make_inputs(case)
    late, last = way.block + 3, 2 * way.block + 20
    if way.operation == "logits":
        rows = inputs.arrays["logits"]
        rows[1, [late, last]] = NAN
        rows[2, late] = INF
        rows[3, late], rows[3, last] = INF, NAN
        rows[4] = -INF
        rows[5, 2], rows[5, late] = INF, INF
        wanted = [late, late, last, 0, 2]
    else:
        x, weight = inputs.arrays["x"], inputs.arrays["weight"]
        weight[:, 0] = -weight[:, 0].abs() - 0.1
        weight[[late, last], 0] = 1
        x[1, 3] = NAN
        x[2, 0] = INF
        x[3, 0], x[3, 5] = INF, NAN
        x[4, 0] = -INF
        x[5, 3] = NAN
        wanted = [0, late, 0, 0, 0]
    inputs.labels[1:6] = torch.tensor(wanted)
    inputs.labels[3] = 1
    ours = agree(frontend, way, case, inputs)
    assert ours["predicted_tokens"][1:6].tolist() == wanted
    check_accuracy(inputs, ours)


@in_ways(*LINEAR)
def test_7_a_class_that_is_nan_is_the_prediction_of_every_token(way: Way, frontend: str) -> None:
    case = way.case("nan_class", vocab=2 * way.block + 37)
    inputs = make_inputs(case)
    late, last = way.block + 3, 2 * way.block + 20
    inputs.arrays["weight"][[late, last], 1] = NAN
    inputs.labels[2] = late
    ours = agree(frontend, way, case, inputs)
    assert (ours["predicted_tokens"][1:-1] == late).all()
    check_accuracy(inputs, ours)


@in_ways(*SLABS)
def test_7_accuracy_and_predictions_agree_per_token(way: Way, frontend: str) -> None:
    case = way.case("per_token", leading=(3, 4), options={"reduction": "none"})
    inputs = make_inputs(case)
    inputs.labels.view(-1)[2:6] = torch.from_numpy(agree(frontend, way, case, inputs)["predicted_tokens"]).view(-1)[2:6]
    ours = agree(frontend, way, case, inputs)
    labels = inputs.labels.numpy()
    assert np.array_equal(ours["token_accuracy"], ((ours["predicted_tokens"] == labels) & (labels >= 0)).astype("f4"))
    assert ours["token_accuracy"].sum() >= 4


def test_7_the_lowest_index_wins_a_tie_between_shards_of_the_vocab_and_between_their_blocks() -> None:
    """What each device knows of its shard is merged alike in both frontends: by one kernel."""
    columns = 2 * LINEAR[0].block + 9
    problem = linear(tokens=7, vocab=3 * columns, bias=False, class_weight=False)
    loss = Step("loss", problem, Options(return_predicted_tokens=True, return_token_accuracy=True))
    inputs = random_inputs(loss, suite_device())
    ties = [columns - 2, 2 * columns - 5, columns + 1, 2 * columns + 1]
    inputs["x"][:, 0], inputs["weight"][:, 0] = 1, 0
    inputs["weight"][ties] = 0
    inputs["weight"][ties, 0] = 64
    inputs["labels"][1:-1] = torch.tensor([*ties, ties[0]])
    found = combine(loss, inputs, 3)
    assert found["predicted_tokens"].tolist() == [-1, *[ties[0]] * 5, -1]
    assert found["token_accuracy"].item() == np.float32(2 / 5)

    inputs["weight"][ties[0]] = 0  # then the first tie is within the second shard, in its first block and its last
    found = combine(loss, inputs, 3)
    assert found["predicted_tokens"].tolist() == [-1, *[ties[2]] * 5, -1]
