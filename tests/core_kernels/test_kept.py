"""Kept exponentials, and gradients computed ahead: as exact as slab by slab, whatever the data and the shapes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core_kernels import Options, Step, launch, plan
from core_kernels.tiles import choose_tiles
from tests.core_kernels.problems import (
    IGNORE,
    POISON,
    Tensors,
    assert_same_bits,
    assert_uses_every_tensor,
    differentiable,
    differentiate,
    in_lines,
    linear,
    outputs_of,
    poisoned,
    run,
    saved_of,
)
from tests.parity import framework, frontends
from tests.parity.cases import METRICS, SERVED, Case, Inputs, make_inputs
from tests.parity.closeness import check_results
from tests.support import interpreting, on_gpu, suite_device

pytestmark = pytest.mark.skipif(not (interpreting() or on_gpu()), reason="only the kernels have schedules")

SCHEDULES: dict[str, dict[str, Any]] = {"slabs": {}, "kept": {"keep": True}, "ahead": {"ahead": ("x", "weight")}}
TILES = choose_tiles(suite_device(), torch.bfloat16, None)
ACROSS = TILES.grad_x  # the tile of the gradient of x
BF16 = 2.0**-9  # what a rounding may change, relatively
# A hidden size of two tiles; token tiles of which, with it, the programs' last round leaves one or two pairs.
TWO_TILES = ACROSS.n * 3 // 2 + 8
ODD_TILES = TILES.programs(ACROSS) // 2 + 1


def _cases() -> list[Case]:
    bf16 = Case("", "linear", leading=(13,), vocab=101, dtype=torch.bfloat16)
    table: list[tuple[str, dict[str, Any]]] = [
        ("mean", {"leading": (37,)}),
        ("sum", {"options": {"reduction": "sum"}}),
        ("none", {"options": {"reduction": "none"}}),
        ("z_loss", {"options": {"lse_square_scale": 0.01}}),
        ("softcap", {"options": {"softcap": 5.0}}),
        ("logit_scale", {"options": {"logit_scale": -0.3}}),
        ("token_scaling", {"options": {"use_token_scaling": True}}),
        ("class_weight", {"class_weight": True}),
        ("every_option", {"class_weight": True, "options": SERVED}),
        ("every_option_none", {"class_weight": True, "options": {**SERVED, "reduction": "none"}}),
        ("half_ignored", {"data": "half_ignored"}),
        ("all_ignored", {"data": "all_ignored", "options": {"lse_square_scale": 0.01}}),
        ("broken_ignored", {"data": "broken_ignored", "leading": (23,)}),
        ("broken_x", {"data": "broken_x"}),
        ("broken_x_none", {"data": "broken_x", "options": {"reduction": "none"}}),
        ("peaked", {"data": "peaked"}),
        ("peaked_softcap", {"data": "peaked", "options": {"softcap": 20.0}}),
        ("far", {"data": "far"}),
        ("far_every_option", {"data": "far", "class_weight": True, "options": {**SERVED, "softcap": 60.0}}),
        ("shared_labels", {"data": "shared_labels", "leading": (37,), "class_weight": True, "options": SERVED}),
        ("shared_by_17", {"data": "shared_labels", "leading": (38,)}),  # one and a block of others
        ("shared_by_50", {"data": "shared_labels", "leading": (71,)}),
        ("one_token", {"leading": (1,)}),
        ("one_class", {"vocab": 1, "options": {"lse_square_scale": 0.01}}),
        ("one_hidden", {"hidden": 1}),
        ("no_descriptor", {"hidden": 33}),
        ("packed_in_place", {"hidden": 48}),
        ("even_tiles", {"leading": (32,), "hidden": 64, "vocab": 128}),
        ("transposed_weight", {"layout": "transposed_weight", "vocab": 104}),
        ("transposed_odd_weight", {"layout": "transposed_weight"}),
        ("sliced", {"layout": "sliced"}),
        ("expanded", {"layout": "expanded", "data": "same_rows"}),
    ]
    return [replace(bf16, name=name, **changes) for name, changes in table]


def _split_cases() -> list[Case]:
    """Shapes where all token tiles, or the last of one or several groups of them, are summed in parts."""
    bf16 = Case("", "linear", dtype=torch.bfloat16, hidden=TWO_TILES, vocab=101)

    def tokens(tiles: int) -> tuple[int]:
        return ((tiles - 1) * ACROSS.m + 5,)

    few = replace(bf16, leading=tokens(1), hidden=ACROSS.n - 24, vocab=9 * ACROSS.k + 5)
    last = replace(bf16, leading=tokens(ODD_TILES))
    return [
        replace(few, name="all_split"),
        replace(few, name="all_split_wide", hidden=ACROSS.n),
        replace(last, name="last_split"),
        replace(last, name="last_split_half_ignored", data="half_ignored"),
        replace(bf16, name="last_of_groups_split", leading=tokens(ODD_TILES + TILES.programs(ACROSS))),
    ]


CASES, SPLIT_CASES = _cases(), _split_cases()
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
new_schedules = pytest.mark.parametrize("schedule", ["kept", "ahead"])


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def loss_of(case: Case, schedule: str, **options: Any) -> Step:
    tokens = math.prod(case.leading)
    problem = linear(tokens, case.hidden, case.vocab, case.dtype, bias=False, class_weight=case.class_weight)
    return Step("loss", problem, Options(**{**METRICS, **case.options, **options}), **SCHEDULES[schedule])


def tensors_of(inputs: Inputs, device: torch.device) -> Tensors:
    tensors = {name: frontends.to_device(array, device) for name, array in inputs.arrays.items()}
    tensors |= {"labels": inputs.labels.to(device), "grad_loss": inputs.upstream.reshape(-1).to(device)}
    return tensors if inputs.class_weight is None else tensors | {"class_weight": inputs.class_weight.to(device)}


def drawn(name: str, device: torch.device) -> tuple[Case, Tensors]:
    case = case_of(name)
    return case, tensors_of(make_inputs(case), device)


def check_close(case: Case, schedule: str, inputs: Inputs, device: torch.device) -> Tensors:
    """Launch the loss and its gradient, which must be as close to the oracle as plain torch; answers what was saved."""
    outputs, saved, gradients = differentiate(loss_of(case, schedule), tensors_of(inputs, device))
    ours = {name: frontends.to_numpy(tensor) for name, tensor in (outputs | gradients).items()}
    wanted = frontends.run_oracle(case, inputs)
    check_results(schedule, case, ours, wanted, framework.run(case, inputs, device))
    return saved


# What the others do not have in common with kept exponentials.
AHEAD = ("mean", "every_option", "all_ignored", "broken_x", "peaked", "far", "no_descriptor", "transposed_weight")
SLABS = ("every_option", "broken_x", "far_every_option")
SCHEDULED = [
    pytest.param(case, schedule, id=f"{case}-{schedule}")
    for schedule, names in {"slabs": SLABS, "kept": [*map(str, CASES)], "ahead": AHEAD}.items()
    for case in CASES
    if str(case) in names
]


@pytest.fixture
def one_tile_a_chunk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys.modules["core_kernels.plan"], "CHUNK_BYTES", 1)
    plan.cache_clear()
    yield
    plan.cache_clear()


# ---- right


@pytest.mark.parametrize(("case", "schedule"), SCHEDULED)
def test_every_schedule_agrees_with_the_oracle(device: torch.device, case: Case, schedule: str) -> None:
    check_close(case, schedule, make_inputs(case), device)


@pytest.mark.parametrize(
    ("case", "schedule"),
    [(case, "kept") for case in SPLIT_CASES] + [(SPLIT_CASES[0], "slabs"), (SPLIT_CASES[2], "slabs")],
    ids=str,
)
def test_sums_in_parts_agree_with_the_oracle(device: torch.device, case: Case, schedule: str) -> None:
    planned = plan(loss_of(case, schedule).gradient(("x", "weight")), device)
    assert planned.splits > 1
    tiles = math.ceil(math.prod(case.leading) / ACROSS.m)
    assert (planned.split_tiles == tiles) == case.name.startswith("all_split")
    check_close(case, schedule, make_inputs(case), device)


def test_parts_of_a_narrow_last_slab_agree_with_the_oracle(device: torch.device) -> None:
    """The last slab has no columns for all of them."""
    unit = max(TILES.slab.n, TILES.grad_weight.m)
    case = replace(SPLIT_CASES[0], name="narrow_slab", vocab=4 * unit + 5)
    inputs = make_inputs(case)
    loss = loss_of(case, "slabs")
    whole = plan(loss.gradient(("x", "weight")), device)
    rest = sum(in_lines(buffer.nbytes) for buffer in whole.workspace if buffer.name != "slab")
    loss = replace(loss, memory=rest + in_lines(2 * unit * whole.problem.tokens))
    planned = plan(loss.gradient(("x", "weight")), device)
    assert planned.splits > 1
    assert (planned.slab, case.vocab % planned.slab) == (unit, 5)
    outputs, _, gradients = differentiate(loss, tensors_of(inputs, device))
    ours = {name: frontends.to_numpy(tensor) for name, tensor in (outputs | gradients).items()}
    check_results("slabs", case, ours, frontends.run_oracle(case, inputs), framework.run(case, inputs, device))


@pytest.mark.parametrize("name", ["half_ignored", "shared_labels"])
def test_chunks_agree_with_the_oracle(one_tile_a_chunk: None, device: torch.device, name: str) -> None:
    """Of which the last has no valid token, where half are ignored."""
    case = replace(case_of(name), leading=(2 * TILES.keep.m + 6,))
    assert plan(loss_of(case, "ahead"), device).chunk == TILES.keep.m
    check_close(case, "ahead", make_inputs(case), device)


@pytest.mark.parametrize(("name", "schedule"), [("sum", "kept"), ("none", "kept"), ("every_option", "ahead")])
def test_bad_labels_are_nan_without_gradient(device: torch.device, name: str, schedule: str) -> None:
    case = case_of(name)
    inputs = make_inputs(case)
    inputs.labels[9:12] = torch.tensor([case.vocab, -1, 2**40])
    check_close(case, schedule, inputs, device)


def test_whole_tiles_of_ignored_tokens_agree_with_the_oracle(device: torch.device) -> None:
    case = replace(case_of("mean"), leading=(3 * TILES.keep.m,))
    inputs = make_inputs(case)
    inputs.labels[: TILES.keep.m + 1] = inputs.labels[2 * TILES.keep.m :] = IGNORE
    check_close(case, "kept", inputs, device)


@pytest.mark.parametrize("name", ["mean", "far", "softcap"])
def test_exponentials_stay_in_range(device: torch.device, name: str) -> None:
    """Relative to the label's logit, or, where that is too far below the others, to the largest."""
    case = case_of(name)
    saved = check_close(case, "kept", make_inputs(case), device)
    valid = make_inputs(case).labels.to(device) != IGNORE
    kept = saved["exponentials"][: valid.sum(), : case.vocab].float()
    assert kept.isfinite().all()
    assert kept.min() >= 0
    assert kept.max() <= math.exp(40.0)
    assert saved["log_sum"][valid].max() <= 40.0


@pytest.mark.parametrize("softcap", [None, 40.0])
@every_schedule
def test_gradients_of_a_tiny_loss_are_exact_relative_to_themselves(
    device: torch.device, schedule: str, softcap: float | None
) -> None:
    """To a rounding of each operand and of the result, though softmax minus one-hot cancels all but a thousandth."""
    case = replace(case_of("sum"), hidden=64, options={"reduction": "sum", "softcap": softcap})
    inputs = make_inputs(case)
    weight = torch.nn.functional.normalize(inputs.arrays["weight"].float(), dim=1)
    valid = inputs.labels != IGNORE
    inputs.arrays["weight"].copy_(weight)
    inputs.arrays["x"][valid] = (12.0 * weight[inputs.labels[valid]]).bfloat16()
    wanted = frontends.run_oracle(case, inputs)
    assert 1e-4 < wanted["loss"] / int(valid.sum()) < 4e-3
    _, _, gradients = differentiate(loss_of(case, schedule), tensors_of(inputs, device))
    for name, tensor in gradients.items():
        error = np.linalg.norm(frontends.to_numpy(tensor) - wanted[name]) / np.linalg.norm(wanted[name])
        assert error <= 3 * BF16, f"{name}: {error:.2e}"


@new_schedules
def test_no_weight_reaches_the_gradient_of_a_token_that_does_not_count(device: torch.device, schedule: str) -> None:
    case, inputs = drawn("mean", device)
    inputs["weight"][5] = float("inf")
    inputs["labels"][3] = case.vocab  # bad, where the first and the last are ignored
    _, _, gradients = differentiate(loss_of(case, schedule), inputs)
    assert gradients["grad_x"][[0, 3, -1]].count_nonzero() == 0
    assert gradients["grad_x"][1].isnan().all()


@pytest.mark.parametrize("x", ["frozen", "free"])
@every_schedule
def test_a_masked_class_has_no_gradient(device: torch.device, schedule: str, x: str) -> None:
    """By minus infinity in its row of the weight, where ``x`` is positive. Rows of a tile that are no token's were
    zeros once, whose logit there is NaN; and NaN times their zeros in ``x`` was the class's gradient.
    """
    case, inputs = drawn("mean", device)
    inputs["x"].abs_()
    inputs["weight"][5, 3] = float("-inf")
    inputs["labels"][inputs["labels"] == 5] = 6
    wanted = ("weight",) if x == "frozen" else ("x", "weight")
    loss = loss_of(case, schedule)
    loss = replace(loss, ahead=wanted) if loss.ahead else loss
    saved = saved_of(loss, run(loss, inputs))
    gradient = run(loss.gradient(wanted), inputs | saved)["grad_weight"]
    assert gradient[5].count_nonzero() == 0
    assert gradient.isfinite().all()
    assert gradient.count_nonzero() > 0


# ---- the same bits


@new_schedules
def test_nothing_depends_on_what_was_in_the_buffers(device: torch.device, schedule: str) -> None:
    """The same launches twice give the same bits, whatever their buffers held before."""
    case, inputs = drawn("shared_labels", device)
    loss = loss_of(case, schedule)
    outputs, saved, gradients = differentiate(loss, inputs)
    outputs_again, saved_again, gradients_again = differentiate(loss, inputs, poison=1e30)
    assert_same_bits(outputs_again, outputs)
    assert_same_bits(saved_again, saved)
    assert_same_bits(gradients_again, gradients)


@pytest.mark.parametrize("name", ["far", "broken_x"])
def test_losses_are_the_same_bits_kept_and_ahead(one_tile_a_chunk: None, device: torch.device, name: str) -> None:
    case = replace(case_of(name), leading=(TILES.keep.m + 5,))
    inputs = tensors_of(make_inputs(case), device)
    kept, ahead = (loss_of(case, schedule) for schedule in ("kept", "ahead"))
    assert_same_bits(outputs_of(ahead, run(ahead, inputs)), outputs_of(kept, run(kept, inputs)))


@pytest.mark.parametrize(("name", "schedule"), [("far", "kept"), ("broken_x", "kept"), ("far", "ahead")])
def test_metrics_change_no_bit(device: torch.device, name: str, schedule: str) -> None:
    case, inputs = drawn(name, device)
    bare = loss_of(case, schedule, **dict.fromkeys(METRICS, False))
    outputs, _, gradients = differentiate(bare, inputs)
    outputs_with, _, gradients_with = differentiate(loss_of(case, schedule), inputs)
    assert_same_bits(outputs, {"loss": outputs_with["loss"]})
    assert_same_bits(gradients, gradients_with)


@pytest.mark.parametrize("wanted", ["x", "weight"])
@pytest.mark.parametrize(
    ("name", "schedule"),
    [("packed_in_place", "slabs"), ("packed_in_place", "kept"), ("every_option", "kept"), ("every_option", "ahead")],
)
def test_a_gradient_alone_has_the_same_bits(device: torch.device, name: str, wanted: str, schedule: str) -> None:
    case, inputs = drawn(name, device)
    loss = loss_of(case, schedule)
    _, _, both = differentiate(loss, inputs)
    alone = replace(loss, ahead=(wanted,)) if loss.ahead else loss
    gradient = alone.gradient((wanted,))
    saved = saved_of(alone, run(alone, inputs))
    found = outputs_of(gradient, run(gradient, inputs | saved))
    assert_same_bits(found, {f"grad_{wanted}": both[f"grad_{wanted}"]})


@pytest.mark.parametrize(
    ("name", "schedule"), [("transposed_weight", "kept"), ("transposed_weight", "ahead"), ("no_descriptor", "kept")]
)
def test_the_weight_gradient_may_be_a_transposed_view(device: torch.device, name: str, schedule: str) -> None:
    case, inputs = drawn(name, device)
    loss = loss_of(case, schedule)
    _, saved, gradients = differentiate(loss, inputs)
    planned = plan(loss.gradient(differentiable(loss.problem)), device)
    kernel = torch.full((case.hidden, case.vocab), float("nan"), dtype=case.dtype, device=device)
    launch(planned, inputs | saved | poisoned(planned, device) | {"grad_weight": kernel.T})
    assert_same_bits({"grad_weight": kernel.T.contiguous()}, {"grad_weight": gradients["grad_weight"]})


# ---- what is used


def assert_written(buffers: Tensors) -> None:
    for name, tensor in buffers.items():
        assert not untouched(tensor).all(), f"{name} is in vain"


def untouched(tensor: Tensor) -> Tensor:
    return tensor.isnan() if tensor.is_floating_point() else tensor == POISON


@every_schedule
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("x", "weight")], ids="+".join)
def test_launches_use_every_buffer(device: torch.device, wanted: tuple[str, ...], schedule: str) -> None:
    """Of the inputs, a product of exponentials reads one operand, and what scales sums reads next to none."""
    case, inputs = drawn("every_option", device)
    loss = loss_of(case, schedule)
    loss = replace(loss, ahead=wanted) if loss.ahead else loss
    buffers = assert_uses_every_tensor(loss, inputs)
    assert_written(buffers)
    gradient = loss.gradient(wanted)
    unread: set[str] = set(wanted) if loss.keep and len(wanted) == 1 else set()
    if loss.ahead:
        unread = {*gradient.inputs} - {"labels", "grad_loss", *(f"sum_{name}" for name in wanted)}
    assert_written(assert_uses_every_tensor(gradient, inputs | buffers, unread))


@new_schedules
def test_inputs_are_not_written_to(device: torch.device, schedule: str) -> None:
    """Nor is what was saved: the gradient may be asked for twice."""
    case, inputs = drawn("every_option", device)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    loss = loss_of(case, schedule)
    saved = saved_of(loss, run(loss, inputs, poison=0.5))
    saved_before = {name: tensor.clone() for name, tensor in saved.items()}
    run(loss.gradient(("x", "weight")), inputs | saved)
    assert_same_bits(inputs, before)
    assert_same_bits(saved, saved_before)


@new_schedules
def test_plain_torch_schedules_nothing_and_is_right_as_well(device: torch.device, schedule: str) -> None:
    """A program that was traced for a GPU may run elsewhere."""
    case, inputs = drawn("every_option", device)
    loss = replace(loss_of(case, schedule), engine="torch")
    outputs, _, gradients = differentiate(loss, inputs)
    outputs_plain, _, gradients_plain = differentiate(loss.plain(), inputs)
    assert_same_bits(outputs, outputs_plain)
    assert_same_bits(gradients, gradients_plain)
