"""The public functions and modules: signatures, results' types and shapes, and options that must not change a bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_api
from core_kernels import plan
from core_kernels.engine import choose_engine
from tests.torch_api.calls import (
    METRICS,
    Arguments,
    Loss,
    assert_all_same_bits,
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
from torch_api import (
    CrossEntropyLoss,
    CrossEntropyOutput,
    FusedLinearCrossEntropyLoss,
    cross_entropy,
    functional,
    fused_linear_cross_entropy,
    modules,
)

REQUIRED = inspect.Parameter.empty
FLAGS = {
    "return_z_loss": ("z_loss",),
    "return_token_accuracy": ("token_accuracy",),
    "return_predicted_tokens": ("predicted_tokens",),
    "return_counts": ("num_valid", "num_correct"),
}
FIELDS = sum(FLAGS.values(), start=())

# (name, default) in order: what may be positional, then what is keyword-only.
SIGNATURES: dict[Callable[..., Any], tuple[list[tuple[str, Any]], list[tuple[str, Any]]]] = {
    cross_entropy: (
        [
            ("input", REQUIRED),
            ("target", REQUIRED),
            ("weight", None),
            ("size_average", None),
            ("ignore_index", -100),
            ("reduce", None),
            ("reduction", "mean"),
            ("label_smoothing", 0.0),
            ("lse_square_scale", 0.0),
            ("softcap", None),
            ("return_z_loss", False),
            ("return_token_accuracy", False),
            ("return_predicted_tokens", False),
        ],
        [
            ("logit_scale", 1.0),
            ("return_counts", False),
            ("num_items_in_batch", None),
            ("engine", "auto"),
            ("check_labels", False),
        ],
    ),
    fused_linear_cross_entropy: (
        [
            ("input", REQUIRED),
            ("weight", REQUIRED),
            ("target", REQUIRED),
            ("bias", None),
            ("ce_weight", None),
            ("ignore_index", -100),
            ("lse_square_scale", 0.0),
            ("label_smoothing", 0.0),
            ("reduction", "mean"),
            ("softcap", None),
            ("return_z_loss", False),
            ("accum_dtype", None),
            ("use_token_scaling", False),
            ("return_token_accuracy", False),
            ("return_predicted_tokens", False),
        ],
        [
            ("logit_scale", 1.0),
            ("return_counts", False),
            ("num_items_in_batch", None),
            ("process_group", None),
            ("memory", "auto"),
            ("engine", "auto"),
            ("check_labels", False),
        ],
    ),
    CrossEntropyLoss: (
        [
            ("weight", None),
            ("ignore_index", -100),
            ("lse_square_scale", 0.0),
            ("label_smoothing", 0.0),
            ("reduction", "mean"),
            ("softcap", None),
            ("return_z_loss", False),
            ("return_token_accuracy", False),
            ("return_predicted_tokens", False),
        ],
        [("logit_scale", 1.0), ("return_counts", False), ("engine", "auto"), ("check_labels", False)],
    ),
    FusedLinearCrossEntropyLoss: (
        [
            ("ce_weight", None),
            ("ignore_index", -100),
            ("lse_square_scale", 0.0),
            ("label_smoothing", 0.0),
            ("reduction", "mean"),
            ("softcap", None),
            ("return_z_loss", False),
            ("accum_dtype", None),
            ("use_token_scaling", False),
            ("return_token_accuracy", False),
            ("return_predicted_tokens", False),
        ],
        [
            ("logit_scale", 1.0),
            ("return_counts", False),
            ("process_group", None),
            ("memory", "auto"),
            ("engine", "auto"),
            ("check_labels", False),
        ],
    ),
    CrossEntropyLoss.forward: (
        [("self", REQUIRED), ("input", REQUIRED), ("target", REQUIRED)],
        [("num_items_in_batch", None)],
    ),
    FusedLinearCrossEntropyLoss.forward: (
        [("self", REQUIRED), ("lin_weight", REQUIRED), ("input", REQUIRED), ("target", REQUIRED), ("bias", None)],
        [("num_items_in_batch", None)],
    ),
}



# ---- signatures


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signature(function: Callable[..., Any]) -> None:
    positional, keyword_only = SIGNATURES[function]
    parameters = inspect.signature(function).parameters.values()
    by_kind: dict[Any, list[tuple[str, Any]]] = {}
    for parameter in parameters:
        by_kind.setdefault(parameter.kind, []).append((parameter.name, parameter.default))
    assert by_kind.pop(inspect.Parameter.POSITIONAL_OR_KEYWORD) == positional
    assert by_kind.pop(inspect.Parameter.KEYWORD_ONLY, []) == keyword_only
    assert by_kind == {}
    for parameter in parameters:  # 1 == 1.0 == True, but they are not the same default
        assert type(parameter.default) is type(dict(positional + keyword_only)[parameter.name])


def test_public_names() -> None:
    assert sorted(torch_api.__all__) == [
        "CrossEntropyLoss",
        "CrossEntropyOutput",
        "FusedLinearCrossEntropyLoss",
        "cross_entropy",
        "fused_linear_cross_entropy",
    ]
    assert [field.name for field in fields(CrossEntropyOutput)] == ["loss", *FIELDS]


# ---- modules

# None of these is its default, and each that can changes the result.
ALL_OPTIONS: dict[str, Any] = {
    "ignore_index": 3,
    "lse_square_scale": 0.05,
    "label_smoothing": 0.1,
    "reduction": "sum",
    "softcap": 4.0,
    "return_z_loss": True,
    "return_token_accuracy": True,
    "return_predicted_tokens": True,
    "return_counts": True,
    "logit_scale": 0.5,
    "engine": "torch",
    "check_labels": True,
}
LINEAR_OPTIONS = {"accum_dtype": torch.float32, "use_token_scaling": True, "memory": 1_000_000}


def module_and_function(linear: bool) -> tuple[type[torch.nn.Module], Loss, dict[str, Any]]:
    if linear:
        return FusedLinearCrossEntropyLoss, fused_linear_cross_entropy, ALL_OPTIONS | LINEAR_OPTIONS
    return CrossEntropyLoss, cross_entropy, ALL_OPTIONS


def call_module(module: torch.nn.Module, arguments: Arguments, **options: Any) -> Any:
    if isinstance(module, FusedLinearCrossEntropyLoss):
        return module(arguments["weight"], arguments["input"], arguments["target"], arguments["bias"], **options)
    return module(arguments["input"], arguments["target"], **options)


def class_weight_name(loss_fn: Loss) -> str:
    return "weight" if loss_fn is cross_entropy else "ce_weight"


@pytest.mark.parametrize("linear", [False, True])
def test_a_module_passes_every_option_on(device: torch.device, monkeypatch: pytest.MonkeyPatch, linear: bool) -> None:
    module_class, loss_fn, options = module_and_function(linear)
    options |= {"process_group": object()} if linear else {}
    weight_name = class_weight_name(loss_fn)
    assert {weight_name, *options} == inspect.signature(module_class).parameters.keys()
    arguments = random_arguments(loss_fn, device)
    bound: list[dict[str, Any]] = []

    def record(*positional: Any, **keywords: Any) -> None:
        bound.append(inspect.signature(loss_fn).bind(*positional, **keywords).arguments)

    monkeypatch.setattr(modules, loss_fn.__name__, record)
    module = module_class(**{weight_name: arguments[weight_name]}, **options)
    call_module(module, arguments, num_items_in_batch=5)
    (passed,) = bound
    assert passed.pop("num_items_in_batch") == 5
    assert passed.keys() == {*arguments, *options}
    assert all(passed[name] is arguments[name] for name in arguments)
    assert {name: passed[name] for name in options} == options


@pytest.mark.parametrize("linear", [False, True])
def test_a_module_gives_the_bits_of_its_function(device: torch.device, linear: bool) -> None:
    module_class, loss_fn, options = module_and_function(linear)
    options = options | {"engine": "auto"}
    weight_name = class_weight_name(loss_fn)
    arguments = random_arguments(loss_fn, device)
    arguments["target"].masked_fill_(arguments["target"] < 0, 3)

    by_function = loss_fn(**arguments, **options)
    module = module_class(**{weight_name: arguments[weight_name]}, **options)
    by_module = call_module(module, arguments)
    for field in fields(CrossEntropyOutput):
        assert_same_bits(getattr(by_module, field.name), getattr(by_function, field.name))
    assert_all_same_bits(gradients(by_module.loss, arguments), gradients(by_function.loss, arguments))

    of_default = loss_fn(arguments["input"], **{k: arguments[k] for k in arguments if k not in ("input", weight_name)})
    assert not torch.equal(of_default, by_function.loss)


@pytest.mark.parametrize("linear", [False, True])
def test_the_class_weight_is_a_buffer(device: torch.device, linear: bool) -> None:
    module_class, loss_fn, _ = module_and_function(linear)
    name = class_weight_name(loss_fn)
    arguments = random_arguments(loss_fn, device)
    module = module_class(arguments[name])
    assert list(module.parameters()) == []
    assert list(module.state_dict()) == [name]
    assert_same_bits(module.state_dict()[name], arguments[name])

    other = module_class(torch.ones_like(arguments[name]))
    assert not torch.equal(call_module(other, arguments), call_module(module, arguments))
    other.load_state_dict(module.state_dict())
    assert_same_bits(call_module(other, arguments), call_module(module, arguments))

    half = module.to(torch.bfloat16)
    assert_same_bits(getattr(half, name), arguments[name].bfloat16())
    assert_close(call_module(half, arguments), expected(loss_fn, arguments | {name: arguments[name].bfloat16()}).loss)


@pytest.mark.parametrize("linear", [False, True])
def test_a_module_without_class_weight_has_no_state(linear: bool) -> None:
    module_class, loss_fn, _ = module_and_function(linear)
    module = module_class()
    assert not module.state_dict()
    assert getattr(module, class_weight_name(loss_fn)) is None


@pytest.mark.parametrize(
    ("module_class", "options", "message"),
    [
        (CrossEntropyLoss, {"softcap": -1.0}, "softcap must be None, or finite and greater than 0, got -1.0"),
        (CrossEntropyLoss, {"engine": "cuda"}, "engine must be one of 'auto', 'triton' and 'torch', got 'cuda'"),
        (FusedLinearCrossEntropyLoss, {"label_smoothing": 2}, "label_smoothing must be between 0 and 1, got 2"),
        (
            FusedLinearCrossEntropyLoss,
            {"memory": "huge"},
            "memory must be 'auto', 'speed', 'lean' or a number of bytes, got 'huge'",
        ),
    ],
)
def test_bad_options_are_named_when_a_module_is_made(
    module_class: type[torch.nn.Module], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        module_class(**options)
    assert str(raised.value) == message


# ---- results


@every_loss
def test_without_flags_the_result_is_the_bare_loss(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device)
    loss = loss_fn(**arguments)
    assert type(loss) is Tensor
    assert_close(loss, expected(loss_fn, arguments).loss)


@every_loss
@pytest.mark.parametrize("flag", FLAGS)
def test_one_flag_fills_one_field(device: torch.device, loss_fn: Loss, flag: str) -> None:
    arguments = random_arguments(loss_fn, device)
    output = loss_fn(**arguments, lse_square_scale=0.05, **{flag: True})
    wanted = expected(loss_fn, arguments, lse_square_scale=0.05)
    assert type(output) is CrossEntropyOutput
    assert_close(output.loss, wanted.loss)
    for name in FIELDS:
        if name in FLAGS[flag]:
            assert_close(getattr(output, name), getattr(wanted, name))
        else:
            assert getattr(output, name) is None


@every_loss
@every_reduction
@pytest.mark.parametrize("leading", [(5,), (2, 3), (2, 1, 3)])
def test_shapes_dtypes_and_values_of_every_result(
    device: torch.device, loss_fn: Loss, reduction: str, leading: tuple[int, ...]
) -> None:
    arguments = random_arguments(loss_fn, device, leading)
    output = loss_fn(**arguments, reduction=reduction, lse_square_scale=0.05, **METRICS)
    wanted = expected(loss_fn, arguments, reduction=reduction, lse_square_scale=0.05)
    for name in ("loss", "z_loss", "token_accuracy", "num_valid", "num_correct"):
        result = getattr(output, name)
        dtype = torch.int64 if name.startswith("num_") else torch.float32
        assert (result.dtype, result.device) == (dtype, arguments["input"].device)
        assert result.shape == (leading if reduction == "none" else ())
        assert_close(result, getattr(wanted, name))
    assert output.predicted_tokens.dtype == torch.int64
    assert output.predicted_tokens.shape == leading
    assert output.predicted_tokens.tolist() == wanted.predicted_tokens.tolist()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_float32_and_gradients_have_their_inputs_dtype(
    device: torch.device, loss_fn: Loss, dtype: torch.dtype
) -> None:
    arguments = random_arguments(loss_fn, device)
    for name, tensor in arguments.items():
        if tensor.requires_grad:
            arguments[name] = tensor.detach().to(dtype).requires_grad_()
    loss = loss_fn(**arguments)
    assert loss.dtype == torch.float32
    assert_close(loss, expected(loss_fn, arguments).loss)  # of the rounded inputs, to float32 accuracy
    assert {gradient.dtype for gradient in gradients(loss, arguments).values()} == {dtype}


@every_loss
def test_int32_and_int64_targets_give_the_same_bits(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device)
    results = []
    for dtype in (torch.int64, torch.int32):
        arguments["target"] = arguments["target"].to(dtype)
        output = loss_fn(**arguments, return_token_accuracy=True, return_predicted_tokens=True)
        assert output.predicted_tokens.dtype == torch.int64
        metrics = {"token_accuracy": output.token_accuracy, "predicted_tokens": output.predicted_tokens}
        results.append(
            {"loss": output.loss} | metrics | {f"d_{k}": g for k, g in gradients(output.loss, arguments).items()}
        )
    assert_all_same_bits(*results)


# ---- options


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated:UserWarning")
@pytest.mark.parametrize(
    ("legacy", "reduction"),
    [
        ({"size_average": True}, "mean"),
        ({"size_average": False}, "sum"),
        ({"reduce": True}, "mean"),
        ({"reduce": False}, "none"),
        ({"size_average": False, "reduce": True}, "sum"),
        ({"size_average": True, "reduce": False}, "none"),
    ],
)
def test_legacy_reductions(device: torch.device, legacy: dict[str, bool], reduction: str) -> None:
    arguments = random_arguments(cross_entropy, device)
    other = "sum" if reduction == "mean" else "mean"
    assert_same_bits(
        cross_entropy(**arguments, **legacy, reduction=other), cross_entropy(**arguments, reduction=reduction)
    )


@pytest.mark.parametrize("accum_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_accum_dtype_changes_nothing(device: torch.device, accum_dtype: torch.dtype) -> None:
    arguments = random_arguments(fused_linear_cross_entropy, device)
    default = fused_linear_cross_entropy(**arguments)
    chosen = fused_linear_cross_entropy(**arguments, accum_dtype=accum_dtype)
    assert_same_bits(chosen, default)
    assert_all_same_bits(gradients(chosen, arguments), gradients(default, arguments))


@every_loss
def test_the_torch_engine_by_name(device: torch.device, monkeypatch: pytest.MonkeyPatch, loss_fn: Loss) -> None:
    launches = record_launches(monkeypatch)
    arguments = random_arguments(loss_fn, device)
    loss = loss_fn(**arguments, engine="torch")
    answers = gradients(loss, arguments)
    assert [launched.engine for launched in launches] == ["torch", "torch"]
    wanted = expected(loss_fn, arguments)
    assert_close(loss, wanted.loss)
    assert_gradients_close(answers, wanted.gradients)


@every_loss
def test_the_automatic_engine_is_the_kernels_wherever_they_run(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, loss_fn: Loss
) -> None:
    launches = record_launches(monkeypatch)
    arguments = random_arguments(loss_fn, device)
    gradients(loss_fn(**arguments), arguments)
    assert [launched.engine for launched in launches] == [choose_engine("auto", device)] * 2


@every_loss
def test_the_triton_engine_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch, loss_fn: Loss) -> None:
    plan.cache_clear()  # plans outlive a change of the environment
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="engine='triton' needs a GPU, or TRITON_INTERPRET=1 set before Python starts"):
        loss_fn(**random_arguments(loss_fn, torch.device("cpu")), engine="triton")


@every_loss
def test_check_labels_changes_no_bit(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device)
    assert_same_bits(loss_fn(**arguments, check_labels=True), loss_fn(**arguments))


def test_functions_take_no_unknown_option(device: torch.device) -> None:
    assert "use_token_scaling" not in inspect.signature(functional.cross_entropy).parameters
    with pytest.raises(TypeError, match="unexpected keyword argument 'memory'"):
        cross_entropy(**random_arguments(cross_entropy, device), memory="lean")
