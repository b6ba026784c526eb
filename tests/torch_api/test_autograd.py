"""The autograd Function: which gradients are computed, into what, when, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tests.core_kernels.problems import HIDDEN, IGNORE, VOCAB
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
    fresh_leaves,
    gradients,
    random_arguments,
    record_launches,
    upstream_like,
)
from torch_api import cross_entropy, fused_linear_cross_entropy

LINEAR_LEAVES = ("input", "weight", "bias")
SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(LINEAR_LEAVES, size)]
TOKEN_SHAPES = [(0,), (2, 0)]


# ---- which gradients


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_every_subset_gives_the_gradients_of_the_full_set(device: torch.device, wanted: tuple[str, ...]) -> None:
    arguments = random_arguments(fused_linear_cross_entropy, device)
    all_gradients = gradients(fused_linear_cross_entropy(**arguments, reduction="none"), arguments)

    subset = fresh_leaves(arguments, wanted)
    loss = fused_linear_cross_entropy(**subset, reduction="none")
    loss.backward(upstream_like(loss))
    for name, tensor in subset.items():
        if name in wanted:
            assert_same_bits(tensor.grad, all_gradients[name])
        else:
            assert tensor.grad is None
    wanted_values = expected(fused_linear_cross_entropy, arguments, reduction="none").gradients
    assert_gradients_close({name: subset[name].grad for name in wanted}, {name: wanted_values[name] for name in wanted})


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_a_frozen_argument_costs_no_buffer(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, wanted: tuple[str, ...]
) -> None:
    launches = record_launches(monkeypatch)
    arguments = fresh_leaves(random_arguments(fused_linear_cross_entropy, device), wanted)
    gradients(fused_linear_cross_entropy(**arguments), arguments)

    _, gradient = launches
    core_names = {"input": "x", "weight": "weight", "bias": "bias"}
    assert {buffer.name for buffer in gradient.outputs} == {f"grad_{core_names[name]}" for name in wanted}
    workspace = {buffer.name for buffer in gradient.workspace}
    sums = "rows" if gradient.engine == "triton" else "grad_rows"
    assert (sums in workspace) == ("input" in wanted)


@every_loss
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_there_is_no_graph_and_the_same_loss(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    loss_fn: Loss,
    mode: Callable[[], AbstractContextManager[None]],
) -> None:
    launches = record_launches(monkeypatch)
    arguments = random_arguments(loss_fn, device)
    with mode():
        evaluated = loss_fn(**arguments)
    assert [launched.step.kind for launched in launches] == ["loss"]
    assert not evaluated.requires_grad
    assert evaluated.grad_fn is None

    trained = loss_fn(**arguments)
    assert trained.requires_grad
    assert_same_bits(evaluated, trained)


@every_loss
def test_when_nothing_requires_grad_there_is_no_graph(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device)
    loss = loss_fn(**fresh_leaves(arguments, wanted=()))
    assert not loss.requires_grad
    assert_same_bits(loss, loss_fn(**arguments))


@every_loss
def test_metrics_are_detached(device: torch.device, loss_fn: Loss) -> None:
    output = loss_fn(**random_arguments(loss_fn, device), **METRICS, lse_square_scale=0.1)
    assert output.loss.requires_grad
    metrics = {name: value for name, value in vars(output).items() if name != "loss"}
    assert None not in metrics.values()
    for metric in metrics.values():
        assert not metric.requires_grad
        assert metric.grad_fn is None


@every_loss
def test_metrics_do_not_change_the_gradients(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device)
    bare = loss_fn(**arguments, lse_square_scale=0.1)
    output = loss_fn(**arguments, lse_square_scale=0.1, **METRICS)
    assert_same_bits(output.loss, bare)
    assert_all_same_bits(gradients(output.loss, arguments), gradients(bare, arguments))


@every_loss
def test_class_weights_are_not_differentiated(device: torch.device, loss_fn: Loss) -> None:
    name = "weight" if loss_fn is cross_entropy else "ce_weight"
    arguments = random_arguments(loss_fn, device)
    wanted = gradients(loss_fn(**arguments), arguments)

    loss = loss_fn(**arguments | {name: arguments[name].clone().requires_grad_()})
    assert_all_same_bits(gradients(loss, arguments), wanted)


# ---- backward again


@every_loss
def test_backward_twice_gives_the_same_bits_and_accumulates(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device)
    loss = loss_fn(**arguments, reduction="none", label_smoothing=0.1, lse_square_scale=0.1)
    first = gradients(loss, arguments, retain_graph=True)
    assert_all_same_bits(gradients(loss, arguments, retain_graph=True), first)

    upstream = upstream_like(loss)
    loss.backward(upstream, retain_graph=True)
    loss.backward(upstream)
    for name, gradient in first.items():
        assert_same_bits(arguments[name].grad, gradient + gradient)


SECOND_DERIVATIVE = "a second derivative of twinhead's losses is not supported: differentiate once"


@every_loss
def test_a_second_derivative_by_the_inputs_raises(device: torch.device, loss_fn: Loss) -> None:
    """As a gradient penalty asks for it: without an error, the penalty would be taken for a constant."""
    arguments = random_arguments(loss_fn, device)
    loss = loss_fn(**arguments)
    wanted = gradients(loss, arguments, retain_graph=True)
    first = gradients(loss, arguments, create_graph=True)
    assert_all_same_bits(first, wanted)
    with pytest.raises(RuntimeError, match=SECOND_DERIVATIVE):
        (loss + first["input"].square().sum()).backward()


@every_loss
def test_a_second_derivative_by_the_upstream_raises(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device)
    loss = loss_fn(**arguments)
    upstream = upstream_like(loss).requires_grad_()
    (first,) = torch.autograd.grad(loss, arguments["input"], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND_DERIVATIVE):
        first.square().sum().backward()


@every_loss
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_forward_mode_raises(device: torch.device, loss_fn: Loss, mode: Callable[[], Any]) -> None:
    """Without an error the tangent would be lost. ``no_grad`` does not turn forward mode off."""
    arguments = {name: tensor.detach() for name, tensor in random_arguments(loss_fn, device).items()}
    with forward_ad.dual_level(), mode():
        arguments["input"] = forward_ad.make_dual(arguments["input"], torch.ones_like(arguments["input"]))
        with pytest.raises(NotImplementedError, match="jvp"):
            loss_fn(**arguments)


# ---- the inputs are left alone


@every_loss
def test_inputs_are_not_written_to(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device)
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in arguments.items()}
    loss = loss_fn(**arguments, reduction="none", label_smoothing=0.1, softcap=5.0, logit_scale=0.5)
    upstream = upstream_like(loss)
    upstream_before = upstream.clone()
    loss.backward(upstream)

    assert_same_bits(upstream, upstream_before)
    for name, tensor in arguments.items():
        values, version = before[name]
        assert_same_bits(tensor, values)
        assert tensor._version == version


@pytest.mark.parametrize(
    ("loss_fn", "name"),
    [(cross_entropy, name) for name in ("input", "target", "weight")]
    + [(fused_linear_cross_entropy, name) for name in ("input", "weight", "target", "bias", "ce_weight")],
)
def test_an_input_changed_before_backward_is_noticed(device: torch.device, loss_fn: Loss, name: str) -> None:
    arguments = random_arguments(loss_fn, device)
    loss = loss_fn(**arguments)
    with torch.no_grad():
        arguments[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- the upstream gradient


@every_loss
def test_each_token_is_scaled_by_its_own_upstream(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device, leading=(2, 4))
    options = {"reduction": "none", "label_smoothing": 0.1, "lse_square_scale": 0.05}
    loss = loss_fn(**arguments, **options)
    answers = gradients(loss, arguments)
    wanted = expected(loss_fn, arguments, **options)
    assert_close(loss, wanted.loss)
    assert_gradients_close(answers, wanted.gradients)

    unused = (upstream_like(loss) == 0) | (arguments["target"] == IGNORE)
    assert unused.sum() == 3
    assert answers["input"][unused].count_nonzero() == 0
    assert (answers["input"][~unused] != 0).any(-1).all()


@every_loss
def test_the_upstream_of_an_ignored_token_is_not_read(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device)
    loss = loss_fn(**arguments, reduction="none")
    wanted = gradients(loss, arguments, retain_graph=True)

    upstream = upstream_like(loss).masked_fill(arguments["target"] == IGNORE, float("nan"))
    loss.backward(upstream)
    assert_all_same_bits({name: arguments[name].grad for name in wanted}, wanted)


@every_loss
def test_an_expanded_upstream_is_read_right(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device, leading=(2, 4))
    loss = 0.7 * loss_fn(**arguments, reduction="none").sum()  # the sum's backward hands on an expanded scalar
    loss.backward()
    wanted = expected(loss_fn, arguments, reduction="sum").gradients
    assert_gradients_close({name: arguments[name].grad for name in wanted}, wanted)


# ---- nothing to learn from


@every_loss
@every_reduction
def test_all_ignored_is_zero_and_connected(device: torch.device, loss_fn: Loss, reduction: str) -> None:
    arguments = random_arguments(loss_fn, device)
    arguments["target"].fill_(IGNORE)
    options = {"reduction": reduction, "label_smoothing": 0.1, "lse_square_scale": 0.1}
    assert_nothing_learned(loss_fn(**arguments, **options, **METRICS), arguments, (7,), reduction)


@every_loss
@every_reduction
@pytest.mark.parametrize("leading", TOKEN_SHAPES)
def test_an_empty_batch_is_zero_and_connected(
    device: torch.device, loss_fn: Loss, reduction: str, leading: tuple[int, ...]
) -> None:
    arguments = random_arguments(loss_fn, device, leading)
    options = {"reduction": reduction, "label_smoothing": 0.1, "lse_square_scale": 0.1}
    assert_nothing_learned(loss_fn(**arguments, **options, **METRICS), arguments, leading, reduction)


def assert_nothing_learned(output: Any, arguments: Arguments, leading: tuple[int, ...], reduction: str) -> None:
    for value in (output.loss, output.z_loss, output.token_accuracy, output.num_valid, output.num_correct):
        assert value.shape == (leading if reduction == "none" else ())
        assert_same_bits(value, torch.zeros_like(value))
    assert_same_bits(output.predicted_tokens, torch.full_like(arguments["target"], -1))
    assert output.loss.grad_fn is not None
    for name, gradient in gradients(output.loss, arguments).items():
        assert gradient.shape == arguments[name].shape
        assert gradient.count_nonzero() == 0  # NaN would count


@every_loss
@every_reduction
@pytest.mark.parametrize("label", [IGNORE, 5])
def test_a_single_token_without_leading_dimensions(
    device: torch.device, loss_fn: Loss, reduction: str, label: int
) -> None:
    arguments = random_arguments(loss_fn, device, leading=())
    arguments["target"].fill_(label)
    output = loss_fn(**arguments, reduction=reduction, **METRICS)
    wanted = expected(loss_fn, arguments, reduction=reduction)
    assert_close(output.loss, wanted.loss)
    assert_close(output.token_accuracy, wanted.token_accuracy)
    assert_close(output.predicted_tokens, wanted.predicted_tokens)
    assert_gradients_close(gradients(output.loss, arguments), wanted.gradients)


# ---- layouts


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def strided(tensor: Tensor) -> Tensor:
    """The odd columns of a wider tensor, whose other columns are NaN."""
    wider = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), device=tensor.device)
    wider[..., 1::2] = tensor
    return wider[..., 1::2]


def expanded(tensor: Tensor) -> Tensor:
    """The first row for every row, with a stride of 0."""
    return tensor[:1].expand_as(tensor)


@pytest.mark.parametrize("layout", [transposed, strided, expanded])
@pytest.mark.parametrize(
    ("loss_fn", "name"),
    [(cross_entropy, "input"), (fused_linear_cross_entropy, "input"), (fused_linear_cross_entropy, "weight")],
)
def test_gradients_of_any_layout_are_right_and_contiguous(
    device: torch.device, loss_fn: Loss, name: str, layout: Callable[[Tensor], Tensor]
) -> None:
    arguments = random_arguments(loss_fn, device)
    arguments[name] = layout(arguments[name].detach()).requires_grad_()
    assert not arguments[name].is_contiguous()
    assert_right_and_contiguous(loss_fn, arguments)


@pytest.mark.parametrize("layout", [transposed, strided, expanded])
def test_gradients_of_a_batch_in_any_layout(device: torch.device, layout: Callable[[Tensor], Tensor]) -> None:
    """Two leading dimensions that no single stride may describe."""
    arguments = random_arguments(fused_linear_cross_entropy, device, leading=(3, 4))
    arguments["input"] = layout(arguments["input"].detach()).requires_grad_()
    assert_right_and_contiguous(fused_linear_cross_entropy, arguments)


def test_gradients_with_strided_vectors(device: torch.device) -> None:
    arguments = random_arguments(fused_linear_cross_entropy, device)
    arguments["bias"] = strided(arguments["bias"].detach()).requires_grad_()
    arguments["ce_weight"] = strided(arguments["ce_weight"])
    arguments["target"] = torch.stack([torch.full_like(arguments["target"], 3), arguments["target"]], 1)[:, 1]
    assert not any(arguments[name].is_contiguous() for name in ("bias", "ce_weight", "target"))
    assert_right_and_contiguous(fused_linear_cross_entropy, arguments)


def assert_right_and_contiguous(loss_fn: Loss, arguments: Arguments) -> None:
    loss = loss_fn(**arguments, reduction="none", label_smoothing=0.1)
    answers = gradients(loss, arguments)
    wanted = expected(loss_fn, arguments, reduction="none", label_smoothing=0.1)
    assert_close(loss, wanted.loss)
    assert_gradients_close(answers, wanted.gradients)
    assert all(gradient.is_contiguous() for gradient in answers.values())


# ---- in a larger graph


def test_hooks_see_the_gradient_of_the_input(device: torch.device) -> None:
    arguments = random_arguments(fused_linear_cross_entropy, device)
    wanted = expected(fused_linear_cross_entropy, arguments).gradients["input"]
    seen: list[Tensor] = []
    arguments["input"].register_hook(seen.append)
    hidden = 2.0 * arguments["input"]
    hidden.register_hook(seen.append)
    loss = fused_linear_cross_entropy(**arguments | {"input": 0.5 * hidden})
    (0.7 * loss).backward()

    of_hidden, of_input = seen
    assert_close(of_hidden, 0.5 * wanted)
    assert_close(of_input, wanted)


def test_gradients_flow_through_a_layer_before_the_head(device: torch.device) -> None:
    arguments = random_arguments(fused_linear_cross_entropy, device, leading=(2, 4))
    torch.manual_seed(0)
    layer = nn.Linear(HIDDEN, HIDDEN).to(device)
    fused = fused_linear_cross_entropy(**arguments | {"input": layer(arguments["input"]).tanh()})
    parameters = [*layer.parameters(), arguments["input"], arguments["weight"], arguments["bias"]]
    actual = torch.autograd.grad(fused, parameters, upstream_like(fused))

    layer_64, arguments_64 = layer.double(), {name: in_float64(tensor) for name, tensor in arguments.items()}
    logits = layer_64(arguments_64["input"]).tanh() @ arguments_64["weight"].T + arguments_64["bias"]
    plain = nn.functional.cross_entropy(
        logits.flatten(0, -2), arguments["target"].flatten(), weight=arguments_64["ce_weight"]
    )
    parameters = [*layer_64.parameters(), arguments_64["input"], arguments_64["weight"], arguments_64["bias"]]
    wanted = torch.autograd.grad(plain, parameters, upstream_like(plain).double())
    assert_close(fused, plain.detach().cpu().numpy())
    for mine, theirs in zip(actual, wanted, strict=True):
        assert_close(mine, theirs.cpu().numpy())


def test_a_tied_embedding_gets_both_gradients(device: torch.device) -> None:
    target = random_arguments(fused_linear_cross_entropy, device)["target"]
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, VOCAB - 1], device=device)
    torch.manual_seed(0)
    table = torch.randn(VOCAB, HIDDEN, device=device, requires_grad=True)
    fused = fused_linear_cross_entropy(table[tokens], table, target)
    (actual,) = torch.autograd.grad(fused, table, upstream_like(fused))

    table_64 = in_float64(table)
    plain = nn.functional.cross_entropy(table_64[tokens] @ table_64.T, target)
    (wanted,) = torch.autograd.grad(plain, table_64, upstream_like(plain).double())
    assert_close(fused, plain.detach().cpu().numpy())
    assert_close(actual, wanted.cpu().numpy())


def in_float64(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)
