"""Bad input: the exception and its exact words, before anything runs; and labels that are no class."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.core_kernels.problems import IGNORE, VOCAB
from tests.support import on_gpu
from tests.torch_api.calls import (
    Loss,
    assert_close,
    assert_gradients_close,
    assert_same_bits,
    every_loss,
    every_reduction,
    expected,
    gradients,
    random_arguments,
    record_launches,
)
from torch_api import cross_entropy, fused_linear_cross_entropy

gpu_only = pytest.mark.skipif(not on_gpu(), reason="on a CPU a bad label raises at once")
cpu_only = pytest.mark.skipif(on_gpu(), reason="on a GPU a bad label must not make the host wait")

# ---- arguments

# N = 3 tokens, H = 4, V = 5. Every case below replaces some of these.
LINEAR = {
    "input": torch.ones(3, 4),
    "weight": torch.ones(5, 4),
    "target": torch.tensor([0, 4, IGNORE]),
    "bias": torch.ones(5),
    "ce_weight": torch.ones(5),
}
LOGITS = {"input": torch.ones(3, 5), "target": LINEAR["target"], "weight": torch.ones(5)}
META = torch.device("meta")

Case = tuple[dict[str, Any], type[Exception], str]


def number_cases(name: str, wanted: str, bad_values: tuple[Any, ...]) -> list[Case]:
    wrong_type = [
        ({name: value}, TypeError, f"{name} must be a Python number, got {value!r}")
        for value in (True, "0.1", [0.1], 1j, torch.tensor(0.1))
    ]
    infinite = (float("inf"), float("-inf"), float("nan"))
    wrong_value = [
        ({name: value}, ValueError, f"{name} must be {wanted}, got {value!r}") for value in (*bad_values, *infinite)
    ]
    return wrong_type + wrong_value


def flag_cases(name: str) -> list[Case]:
    return [
        ({name: value}, TypeError, f"{name} must be True or False, got {value!r}") for value in (1, 0.0, None, "yes")
    ]


OPTIONS: list[Case] = [
    *number_cases("label_smoothing", "between 0 and 1", (-0.1, 1.0001, 2)),
    *number_cases("lse_square_scale", "finite and not negative", (-1e-4, -1)),
    *number_cases("softcap", "None, or finite and greater than 0", (0, 0.0, -30.0)),
    *number_cases("logit_scale", "finite and not 0", (0, 0.0)),
    ({"label_smoothing": None}, TypeError, "label_smoothing must be a Python number, got None"),
    ({"lse_square_scale": None}, TypeError, "lse_square_scale must be a Python number, got None"),
    ({"logit_scale": None}, TypeError, "logit_scale must be a Python number, got None"),
    *(case for name in ("return_z_loss", "return_token_accuracy") for case in flag_cases(name)),
    *(case for name in ("return_predicted_tokens", "return_counts", "check_labels") for case in flag_cases(name)),
    ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got 1.0"),
    ({"ignore_index": True}, TypeError, "ignore_index must be an int, got True"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
    ({"ignore_index": "0"}, TypeError, "ignore_index must be an int, got '0'"),
    ({"ignore_index": 2**63}, ValueError, "ignore_index must fit in 64 bits, got 9223372036854775808"),
    ({"ignore_index": -(2**63) - 1}, ValueError, "ignore_index must fit in 64 bits, got -9223372036854775809"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of 'none', 'mean' and 'sum', got 'avg'"),
    ({"reduction": "Mean"}, ValueError, "reduction must be one of 'none', 'mean' and 'sum', got 'Mean'"),
    ({"reduction": None}, ValueError, "reduction must be one of 'none', 'mean' and 'sum', got None"),
    ({"reduction": True}, ValueError, "reduction must be one of 'none', 'mean' and 'sum', got True"),
    ({"num_items_in_batch": 7.0}, TypeError, "num_items_in_batch must be an int or a tensor, got 7.0"),
    ({"num_items_in_batch": True}, TypeError, "num_items_in_batch must be an int or a tensor, got True"),
    ({"num_items_in_batch": -1}, ValueError, "num_items_in_batch must not be negative, got -1"),
    ({"num_items_in_batch": torch.ones(2)}, ValueError, "num_items_in_batch must be one number, got shape (2,)"),
    (
        {"num_items_in_batch": 7, "reduction": "none"},
        ValueError,
        "num_items_in_batch must be None unless reduction is 'mean', got reduction='none'",
    ),
    ({"engine": "cuda"}, ValueError, "engine must be one of 'auto', 'triton' and 'torch', got 'cuda'"),
    ({"engine": None}, ValueError, "engine must be one of 'auto', 'triton' and 'torch', got None"),
]

MEMORY = "memory must be 'auto', 'speed', 'lean' or a number of bytes, got "
LINEAR_OPTIONS: list[Case] = [
    *flag_cases("use_token_scaling"),
    ({"accum_dtype": "float32"}, TypeError, "accum_dtype must be a torch.dtype or None, got 'float32'"),
    ({"accum_dtype": float}, TypeError, "accum_dtype must be a torch.dtype or None, got <class 'float'>"),
    ({"memory": "huge"}, ValueError, f"{MEMORY}'huge'"),
    ({"memory": 1e9}, TypeError, f"{MEMORY}1000000000.0"),
    ({"memory": None}, TypeError, f"{MEMORY}None"),
    ({"memory": True}, TypeError, f"{MEMORY}True"),
    ({"process_group": 2}, TypeError, "process_group must be a torch.distributed.ProcessGroup or None, got 2"),
]

SHARED_TENSORS: list[Case] = [
    ({"input": [[1.0]]}, TypeError, "input must be a torch.Tensor, got list"),
    ({"input": None}, TypeError, "input must be a torch.Tensor, got NoneType"),
    ({"target": 3}, TypeError, "target must be a torch.Tensor, got int"),
    ({"target": None}, TypeError, "target must be a torch.Tensor, got NoneType"),
    ({"target": torch.zeros(3)}, TypeError, "target must be int32 or int64 class indices, got float32"),
    ({"target": torch.zeros(3).bool()}, TypeError, "target must be int32 or int64 class indices, got bool"),
    ({"target": torch.zeros(3).to(torch.uint8)}, TypeError, "target must be int32 or int64 class indices, got uint8"),
    ({"target": torch.zeros(3).short()}, TypeError, "target must be int32 or int64 class indices, got int16"),
    ({"target": LINEAR["target"].to_sparse()}, ValueError, "target must be a dense tensor, got a sparse one"),
    (
        {"input": torch.nested.nested_tensor([torch.ones(3, 4)], layout=torch.jagged)},
        ValueError,
        "input must be a dense tensor, got a nested one",
    ),
    (
        {"target": LINEAR["target"].to(META)},
        ValueError,
        "target must be on the device of input, cpu, got meta",
    ),
]

LINEAR_TENSORS: list[Case] = [
    *SHARED_TENSORS,
    ({"input": torch.ones(3, 4).double()}, TypeError, "input must be float32, bfloat16 or float16, got float64"),
    ({"input": torch.ones(3, 4).long()}, TypeError, "input must be float32, bfloat16 or float16, got int64"),
    ({"input": torch.ones(3, 4) * 1j}, TypeError, "input must be float32, bfloat16 or float16, got complex64"),
    ({"weight": torch.ones(5, 4).double()}, TypeError, "weight must be float32, bfloat16 or float16, got float64"),
    ({"bias": torch.ones(5).double()}, TypeError, "bias must be float32, bfloat16 or float16, got float64"),
    ({"ce_weight": torch.ones(5).long()}, TypeError, "ce_weight must be float32, bfloat16 or float16, got int64"),
    (
        {"weight": torch.ones(5, 4).bfloat16()},
        TypeError,
        "weight must have the dtype of input, float32, got bfloat16: cast one of them",
    ),
    (
        {"input": torch.ones(3, 4).half(), "weight": torch.ones(5, 4).half()},
        TypeError,
        "bias must have the dtype of input, float16, got float32: cast one of them",
    ),
    ({"weight": [[1.0]]}, TypeError, "weight must be a torch.Tensor, got list"),
    ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    ({"bias": 0.0}, TypeError, "bias must be a torch.Tensor, got float"),
    ({"ce_weight": [1.0] * 5}, TypeError, "ce_weight must be a torch.Tensor, got list"),
    ({"input": torch.tensor(1.0)}, ValueError, "input must have shape (..., H), got a scalar"),
    ({"weight": torch.ones(4)}, ValueError, "weight must have shape (V, H), got (4,)"),
    ({"weight": torch.ones(1, 5, 4)}, ValueError, "weight must have shape (V, H), got (1, 5, 4)"),
    (
        {"weight": torch.ones(4, 5)},
        ValueError,
        "weight must have shape (V, 4) to match input of shape (3, 4), got (4, 5)",
    ),
    ({"weight": torch.ones(0, 4)}, ValueError, "weight must not be empty, got shape (0, 4)"),
    (
        {"input": torch.ones(3, 0), "weight": torch.ones(5, 0)},
        ValueError,
        "weight must not be empty, got shape (5, 0)",
    ),
    ({"bias": torch.ones(4)}, ValueError, "bias must have shape (5,), got (4,)"),
    ({"bias": torch.ones(5, 1)}, ValueError, "bias must have shape (5,), got (5, 1)"),
    ({"ce_weight": torch.ones(6)}, ValueError, "ce_weight must have shape (5,), got (6,)"),
    ({"ce_weight": torch.ones(1, 5)}, ValueError, "ce_weight must have shape (5,), got (1, 5)"),
    (
        {"target": torch.zeros(4).long()},
        ValueError,
        "target must have shape (3,) to match input of shape (3, 4), got (4,)",
    ),
    (
        {"target": torch.zeros(3, 1).long()},
        ValueError,
        "target must have shape (3,) to match input of shape (3, 4), got (3, 1)",
    ),
    (
        {"input": torch.ones(4)},
        ValueError,
        "target must have shape () to match input of shape (4,), got (3,)",
    ),
    (
        {"input": torch.ones(1, 3, 4)},
        ValueError,
        "target must have shape (1, 3) to match input of shape (1, 3, 4), got (3,)",
    ),
    ({"weight": torch.ones(5, 4, device=META)}, ValueError, "weight must be on the device of input, cpu, got meta"),
    ({"bias": torch.ones(5, device=META)}, ValueError, "bias must be on the device of input, cpu, got meta"),
    ({"ce_weight": torch.ones(5, device=META)}, ValueError, "ce_weight must be on the device of input, cpu, got meta"),
]

LOGITS_TENSORS: list[Case] = [
    *SHARED_TENSORS,
    ({"input": torch.ones(3, 5).double()}, TypeError, "input must be float32, bfloat16 or float16, got float64"),
    ({"input": torch.ones(3, 5).int()}, TypeError, "input must be float32, bfloat16 or float16, got int32"),
    ({"weight": torch.ones(5).double()}, TypeError, "weight must be float32, bfloat16 or float16, got float64"),
    ({"weight": [1.0] * 5}, TypeError, "weight must be a torch.Tensor, got list"),
    ({"input": torch.tensor(1.0)}, ValueError, "input must have shape (..., V), got a scalar"),
    (
        {"input": torch.ones(3, 0)},
        ValueError,
        "input must have at least one class in its last dimension, got shape (3, 0)",
    ),
    ({"weight": torch.ones(4)}, ValueError, "weight must have shape (5,), got (4,)"),
    ({"weight": torch.ones(5, 1)}, ValueError, "weight must have shape (5,), got (5, 1)"),
    (
        {"target": torch.zeros(2).long()},
        ValueError,
        "target must have shape (3,) to match input of shape (3, 5), got (2,)",
    ),
    (  # class probabilities, and classes in dimension 1, are what torch.nn.functional.cross_entropy would take
        {"target": torch.ones(3, 5)},
        TypeError,
        "target must be int32 or int64 class indices, got float32",
    ),
    (
        {"input": torch.ones(3, 5, 2), "target": torch.zeros(3, 2).long()},
        ValueError,
        "target must have shape (3, 5) to match input of shape (3, 5, 2), got (3, 2)",
    ),
    ({"weight": torch.ones(5, device=META)}, ValueError, "weight must be on the device of input, cpu, got meta"),
]

CASES = [(cross_entropy, case) for case in OPTIONS + LOGITS_TENSORS] + [
    (fused_linear_cross_entropy, case) for case in OPTIONS + LINEAR_OPTIONS + LINEAR_TENSORS
]


@pytest.mark.parametrize(("loss_fn", "case"), CASES, ids=[f"{loss_fn.__name__}-{case[2]}" for loss_fn, case in CASES])
def test_bad_input_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch, loss_fn: Loss, case: Case) -> None:
    bad, exception, message = case
    launches = record_launches(monkeypatch)
    arguments: dict[str, Any] = LOGITS if loss_fn is cross_entropy else LINEAR
    with pytest.raises(exception) as raised:
        loss_fn(**arguments | bad)
    assert type(raised.value) is exception
    assert str(raised.value) == message
    assert launches == []


@every_loss
def test_the_arguments_that_the_bad_cases_replace_are_good(loss_fn: Loss) -> None:
    arguments = LOGITS if loss_fn is cross_entropy else LINEAR
    assert_close(loss_fn(**arguments), expected(loss_fn, arguments).loss)  # ln 5: all logits are equal


@every_loss
@pytest.mark.parametrize(
    "limits",
    [
        {"label_smoothing": 0},
        {"label_smoothing": 1},
        {"lse_square_scale": 0},
        {"softcap": 1e-3},
        {"logit_scale": -1},
        {"ignore_index": 2**63 - 1},
        {"ignore_index": -(2**63)},
    ],
    ids=str,
)
def test_the_last_good_values_are_taken(device: torch.device, loss_fn: Loss, limits: dict[str, Any]) -> None:
    arguments = random_arguments(loss_fn, device)
    arguments["target"].clamp_(min=0)
    loss = loss_fn(**arguments, **limits)
    wanted = expected(loss_fn, arguments, **limits)
    assert_close(loss, wanted.loss)
    assert_gradients_close(gradients(loss, arguments), wanted.gradients)


# ---- labels that are no class

LAST = VOCAB - 1
BAD_LABELS = [VOCAB, -1, IGNORE - 1, 2**31 - 1, -(2**31), 2**40]


@every_loss
@cpu_only
@pytest.mark.parametrize("label", BAD_LABELS)
@pytest.mark.parametrize(
    ("leading", "position", "where"),
    [((7,), (4,), "target[4]"), ((2, 4), (1, 2), "target[1, 2]"), ((2, 1, 3), (0, 0, 2), "target[0, 0, 2]")],
)
def test_a_bad_label_raises_with_its_position_on_a_cpu(
    device: torch.device, loss_fn: Loss, label: int, leading: tuple[int, ...], position: tuple[int, ...], where: str
) -> None:
    arguments = random_arguments(loss_fn, device, leading)
    arguments["target"][position] = label
    with pytest.raises(IndexError) as raised:
        loss_fn(**arguments)
    assert str(raised.value) == bad_label_message(where, label)


@every_loss
@cpu_only
def test_a_bad_label_of_a_single_token_raises_on_a_cpu(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device, leading=())
    arguments["target"].fill_(VOCAB)
    with pytest.raises(IndexError) as raised:
        loss_fn(**arguments)
    assert str(raised.value) == bad_label_message("target", VOCAB)


@every_loss
@cpu_only
def test_the_first_of_several_bad_labels_is_named(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device)
    arguments["target"][2:4] = torch.tensor([-7, VOCAB])
    arguments["target"] = arguments["target"].int()
    with pytest.raises(IndexError) as raised:
        loss_fn(**arguments)
    assert str(raised.value) == bad_label_message("target[2]", -7)


def bad_label_message(where: str, label: int) -> str:
    return f"{where} = {label} is out of range: a label must be in [0, {VOCAB}) or equal ignore_index={IGNORE}"


@every_loss
@gpu_only
@every_reduction
@pytest.mark.parametrize("label", BAD_LABELS)
def test_a_bad_label_gives_nan_and_no_gradient_on_a_gpu(
    device: torch.device, loss_fn: Loss, reduction: str, label: int
) -> None:
    arguments = random_arguments(loss_fn, device, (2, 4))
    arguments["target"][1, 1] = label
    loss = loss_fn(**arguments, reduction=reduction, label_smoothing=0.1, lse_square_scale=0.05)
    wanted = expected(loss_fn, arguments, reduction=reduction, label_smoothing=0.1, lse_square_scale=0.05)
    assert_close(loss, wanted.loss)  # NaN where the oracle has it, and only there
    assert loss.isnan().sum() == 1
    answers = gradients(loss, arguments)
    assert_gradients_close(answers, wanted.gradients)
    assert answers["input"][1, 1].count_nonzero() == 0


@every_loss
@gpu_only
@pytest.mark.parametrize("label", BAD_LABELS)
def test_check_labels_raises_on_a_gpu(device: torch.device, loss_fn: Loss, label: int) -> None:
    arguments = random_arguments(loss_fn, device, (2, 4))
    arguments["target"][1, 2] = label
    with pytest.raises(IndexError) as raised:
        loss_fn(**arguments, check_labels=True)
    assert str(raised.value) == bad_label_message("target[1, 2]", label)


@every_loss
@pytest.mark.parametrize("ignore_index", [0, 5, LAST, VOCAB, VOCAB + 7, -1, 2**40])
@pytest.mark.parametrize("target_dtype", [torch.int32, torch.int64])
def test_any_ignore_index_ignores(
    device: torch.device, loss_fn: Loss, ignore_index: int, target_dtype: torch.dtype
) -> None:
    """Also one that is a class, beyond the classes, or beyond what the labels can hold."""
    arguments = random_arguments(loss_fn, device)
    ignored = torch.tensor([0, 3, 6], device=device)
    target = arguments["target"].clamp(min=0).to(target_dtype)
    arguments["target"] = target
    if ignore_index <= torch.iinfo(target_dtype).max:
        target[ignored] = ignore_index
    else:
        ignored = ignored[:0]
    options = {"reduction": "none", "ignore_index": ignore_index}
    output = loss_fn(**arguments, **options, return_predicted_tokens=True)
    wanted = expected(loss_fn, arguments, **options)
    assert_close(output.loss, wanted.loss)
    assert output.predicted_tokens.tolist() == wanted.predicted_tokens.tolist()
    answers = gradients(output.loss, arguments)
    assert_gradients_close(answers, wanted.gradients)
    for values in (output.loss[ignored], answers["input"][ignored]):
        assert_same_bits(values, torch.zeros_like(values))
