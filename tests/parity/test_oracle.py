"""Checks of the oracle itself: against torch in float64 with autograd, and by value where torch has no answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.parity import oracle

TOKENS, HIDDEN, VOCAB = 7, 5, 11
IGNORE = -100
REDUCTIONS = ("none", "sum", "mean")


# ---- inputs and comparisons


def make_labels(rng: np.random.Generator, shape: tuple[int, ...] = (TOKENS,), ignore_index: int = IGNORE) -> np.ndarray:
    """Random labels, of which the second and the last are ignored."""
    labels = rng.integers(0, VOCAB, shape)
    labels.flat[[1, -1]] = ignore_index
    return labels


def make_class_weight(rng: np.random.Generator) -> np.ndarray:
    class_weight = rng.uniform(0.2, 2.0, VOCAB)
    class_weight[3] = 0.0
    return class_weight


def make_upstream(rng: np.random.Generator, reduction: str, shape: tuple[int, ...] = (TOKENS,)) -> np.ndarray:
    return rng.normal(size=shape if reduction == "none" else ())


def leaf(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


def assert_close(actual: np.ndarray, wanted: np.ndarray | torch.Tensor | float) -> None:
    wanted = wanted.detach().numpy() if isinstance(wanted, torch.Tensor) else np.asarray(wanted)
    assert actual.dtype == np.float64
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=1e-10, atol=1e-13)


def assert_same_as_functional(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    upstream: np.ndarray,
    class_weight: np.ndarray | None = None,
    **options: Any,
) -> oracle.Expected:
    """Compare loss and gradient with `torch.nn.functional.cross_entropy`, which wants at most one leading dimension."""
    expected = oracle.cross_entropy(logits, labels, upstream=upstream, class_weight=class_weight, **options)
    logits_t = leaf(logits)
    weight_t = None if class_weight is None else torch.tensor(class_weight)
    loss = F.cross_entropy(logits_t, torch.tensor(labels), weight=weight_t, **options)
    loss.backward(torch.tensor(upstream))
    assert_close(expected.loss, loss)
    assert_close(expected.gradients["logits"], logits_t.grad)
    return expected


def stated_in_torch(
    raw_logits: torch.Tensor,
    labels: np.ndarray,
    *,
    class_weight: np.ndarray | None = None,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    use_token_scaling: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and z-loss in differentiable torch operations. No bad labels, and at least one valid."""
    flat_labels = torch.tensor(labels).reshape(-1)
    kept = flat_labels != ignore_index
    target = flat_labels[kept]
    z = raw_logits.reshape(flat_labels.numel(), -1)[kept] * logit_scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap

    log_p = torch.log_softmax(z, dim=-1)
    weight = torch.ones(z.shape[-1], dtype=z.dtype) if class_weight is None else torch.tensor(class_weight)
    ce = F.nll_loss(log_p, target, weight=weight, reduction="none") * (1 - label_smoothing)
    if label_smoothing > 0:
        ce = ce - label_smoothing * (log_p * weight).mean(dim=-1)
    z_loss = lse_square_scale * torch.logsumexp(z, dim=-1).square()
    if use_token_scaling:
        p_target = torch.softmax(z, dim=-1).gather(1, target[:, None])[:, 0].detach()
        ce, z_loss = ce * p_target, z_loss * p_target

    if reduction == "none":
        zeros = torch.zeros(flat_labels.numel(), dtype=z.dtype)
        ce, z_loss = (zeros.masked_scatter(kept, part).reshape(labels.shape) for part in (ce, z_loss))
    elif reduction == "sum":
        ce, z_loss = ce.sum(), z_loss.sum()
    else:
        ce, z_loss = ce.sum() / weight[target].sum(), z_loss.mean()
    return ce + z_loss, z_loss


# ---- against torch.nn.functional.cross_entropy


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [IGNORE, 4])
def test_same_as_functional_cross_entropy(
    reduction: str, label_smoothing: float, weighted: bool, ignore_index: int
) -> None:
    rng = np.random.default_rng(1)
    assert_same_as_functional(
        3 * rng.normal(size=(TOKENS, VOCAB)),
        make_labels(rng, ignore_index=ignore_index),
        upstream=make_upstream(rng, reduction),
        class_weight=make_class_weight(rng) if weighted else None,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("target_masked", [False, True])
def test_same_as_functional_with_masked_vocabulary(reduction: str, label_smoothing: float, target_masked: bool) -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(TOKENS, VOCAB))
    logits[:, :8] = -np.inf
    labels = rng.integers(8, VOCAB, TOKENS)
    labels[1] = IGNORE
    if target_masked:
        labels[2] = 5
    expected = assert_same_as_functional(
        logits, labels, upstream=make_upstream(rng, reduction), label_smoothing=label_smoothing, reduction=reduction
    )
    assert np.isfinite(expected.gradients["logits"]).all()
    assert np.isposinf(expected.loss).any() == (target_masked or label_smoothing > 0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "all_minus_inf"])
def test_same_as_functional_with_a_row_that_is_not_a_number(
    reduction: str, label_smoothing: float, poison: float
) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(TOKENS, VOCAB))
    logits[2, slice(None) if poison == -np.inf else 6] = poison
    labels = rng.integers(0, VOCAB, TOKENS)
    expected = assert_same_as_functional(
        logits, labels, upstream=make_upstream(rng, reduction), label_smoothing=label_smoothing, reduction=reduction
    )
    assert np.isnan(expected.loss[2] if reduction == "none" else expected.loss)
    is_nan = np.isnan(expected.gradients["logits"])
    assert is_nan[2].all() and not np.delete(is_nan, 2, axis=0).any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_zero_dimensional_labels(reduction: str) -> None:
    rng = np.random.default_rng(4)
    logits, label = rng.normal(size=VOCAB), np.asarray(2)
    expected = assert_same_as_functional(logits, label, upstream=make_upstream(rng, reduction, ()), reduction=reduction)
    assert expected.token_accuracy.shape == expected.predicted_tokens.shape == ()
    assert expected.predicted_tokens == logits.argmax()


# ---- against plain torch formulas: what functional.cross_entropy lacks

EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "z_loss": {"lse_square_scale": 0.1},
    "softcap": {"softcap": 2.0},
    "logit_scale": {"logit_scale": 0.6},
    "softcap_after_scale": {"softcap": 2.0, "logit_scale": 1.7},
    "token_scaling": {"use_token_scaling": True},
    "token_scaling_z_loss": {"use_token_scaling": True, "lse_square_scale": 0.1},
    "z_loss_smoothing": {"lse_square_scale": 0.1, "label_smoothing": 0.2},
    "everything": {
        "lse_square_scale": 0.1,
        "softcap": 2.0,
        "logit_scale": 1.7,
        "label_smoothing": 0.2,
        "use_token_scaling": True,
    },
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS.keys())
def test_cross_entropy_same_as_torch_formula(reduction: str, weighted: bool, extras: dict[str, Any]) -> None:
    rng = np.random.default_rng(5)
    shape = (2, 4)
    logits, labels = 2 * rng.normal(size=(*shape, VOCAB)), make_labels(rng, shape)
    upstream = make_upstream(rng, reduction, shape)
    options = {"class_weight": make_class_weight(rng) if weighted else None, "reduction": reduction, **extras}

    logits_t = leaf(logits)
    loss, z_loss = stated_in_torch(logits_t, labels, **options)
    loss.backward(torch.tensor(upstream))

    expected = oracle.cross_entropy(logits, labels, upstream=upstream, **options)
    assert_close(expected.loss, loss)
    assert_close(expected.z_loss, z_loss)
    assert_close(expected.gradients["logits"], logits_t.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS.keys())
def test_fused_linear_same_as_torch_formula(
    reduction: str, biased: bool, weighted: bool, extras: dict[str, Any]
) -> None:
    rng = np.random.default_rng(6)
    shape = (4, 2)
    inputs = {"x": rng.normal(size=(*shape, HIDDEN)), "weight": rng.normal(size=(VOCAB, HIDDEN))}
    if biased:
        inputs["bias"] = rng.normal(size=VOCAB)
    labels, upstream = make_labels(rng, shape), make_upstream(rng, reduction, shape)
    options = {"class_weight": make_class_weight(rng) if weighted else None, "reduction": reduction, **extras}

    leaves = {name: leaf(array) for name, array in inputs.items()}
    logits_t = F.linear(leaves["x"], leaves["weight"], leaves.get("bias"))
    loss, z_loss = stated_in_torch(logits_t, labels, **options)
    loss.backward(torch.tensor(upstream))

    expected = oracle.fused_linear_ce(**inputs, labels=labels, upstream=upstream, **options)
    assert_close(expected.loss, loss)
    assert_close(expected.z_loss, z_loss)
    assert expected.gradients.keys() == leaves.keys()
    for name, tensor in leaves.items():
        assert_close(expected.gradients[name], tensor.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS.keys())
@pytest.mark.parametrize("target_masked", [False, True])
def test_masked_vocabulary_same_as_torch_formula(reduction: str, extras: dict[str, Any], target_masked: bool) -> None:
    """IEEE rules hold: with token scaling, a masked target's loss is 0 * inf = NaN; its gradient stays finite."""
    rng = np.random.default_rng(14)
    logits, labels = rng.normal(size=(TOKENS, VOCAB)), rng.integers(8, VOCAB, TOKENS)
    logits[:, :8] = -np.inf
    if target_masked:
        labels[2] = 5
    upstream, options = make_upstream(rng, reduction), {"reduction": reduction, **extras}

    logits_t = leaf(logits)
    loss, z_loss = stated_in_torch(logits_t, labels, **options)
    loss.backward(torch.tensor(upstream))

    expected = oracle.cross_entropy(logits, labels, upstream=upstream, **options)
    assert_close(expected.loss, loss)
    assert_close(expected.z_loss, z_loss)
    assert_close(expected.gradients["logits"], logits_t.grad)
    assert np.isfinite(expected.gradients["logits"]).all()


def test_fused_linear_with_masked_vocabulary_in_the_bias() -> None:
    rng = np.random.default_rng(7)
    x, weight, bias = leaf(rng.normal(size=(TOKENS, HIDDEN))), leaf(rng.normal(size=(VOCAB, HIDDEN))), np.zeros(VOCAB)
    bias[:8] = -np.inf
    labels = rng.integers(8, VOCAB, TOKENS)
    F.cross_entropy(x @ weight.T + torch.tensor(bias), torch.tensor(labels)).backward()

    expected = oracle.fused_linear_ce(x.detach(), weight.detach(), labels, bias)
    assert np.isfinite(expected.loss)
    assert_close(expected.gradients["x"], x.grad)
    assert_close(expected.gradients["weight"], weight.grad)
    assert (expected.gradients["weight"][:8] == 0).all()


def test_softcap_makes_infinite_logits_finite() -> None:
    expected = oracle.cross_entropy([[-np.inf, np.inf, 0.0]], [0], softcap=2.0, reduction="none")
    assert_close(expected.loss, np.log(np.exp([-2.0, 2.0, 0.0]).sum()) + np.full(1, 2.0))
    np.testing.assert_array_equal(expected.gradients["logits"][0, :2], 0)  # tanh is flat there
    assert expected.gradients["logits"][0, 2] > 0


# ---- metrics


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_accuracy_and_predictions(reduction: str) -> None:
    logits = np.asarray([[1.0, 5.0, 2.0], [7.0, 1.0, 7.0], [0.0, 3.0, 3.0], [9.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    labels = np.asarray([1, 0, 2, IGNORE, 2])
    expected = oracle.cross_entropy(logits, labels, class_weight=[0.0, 3.0, 0.5], reduction=reduction)
    np.testing.assert_array_equal(expected.predicted_tokens, [1, 0, 1, -1, 2])
    assert expected.predicted_tokens.dtype == np.int64
    assert_close(expected.token_accuracy, np.asarray([1.0, 1.0, 0.0, 0.0, 1.0]) if reduction == "none" else 0.75)


def test_predictions_come_from_the_final_logits() -> None:
    logits = np.asarray([[1.0, -2.0, 0.5], [300.0, 400.0, 0.0]])
    np.testing.assert_array_equal(oracle.cross_entropy(logits, [0, 0], logit_scale=-1.0).predicted_tokens, [1, 2])
    # The cap is reached by both large logits: a tie, which the lowest index wins.
    np.testing.assert_array_equal(oracle.cross_entropy(logits, [0, 0], softcap=1.0).predicted_tokens, [0, 0])


def test_predictions_of_nan_and_infinite_rows() -> None:
    logits = np.asarray([[9.0, np.nan, np.nan], [np.inf, 0.0, np.nan], [0.0, np.inf, 1.0], [-np.inf] * 3])
    expected = oracle.cross_entropy(logits, [1, 0, 1, 0], reduction="none")
    np.testing.assert_array_equal(expected.predicted_tokens, [1, 2, 1, 0])
    np.testing.assert_array_equal(expected.token_accuracy, [1, 0, 1, 1])
    assert np.isnan(expected.loss).all()


# ---- sentinels: ignored and bad tokens, empty divisors

OPTIONS: dict[str, Any] = {
    "lse_square_scale": 0.1,
    "label_smoothing": 0.2,
    "softcap": 5.0,
    "logit_scale": 0.7,
    "use_token_scaling": True,
}


def assert_all_zero(expected: oracle.Expected, shape: tuple[int, ...]) -> None:
    """Zero loss, accuracy and gradients, and no prediction."""
    for value in (expected.loss, expected.z_loss, expected.token_accuracy, *expected.gradients.values()):
        assert value.dtype == np.float64
        np.testing.assert_array_equal(value, 0)
    assert expected.predicted_tokens.shape == shape
    assert (expected.predicted_tokens == -1).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_ignored_tokens_do_not_see_their_inputs(reduction: str, poison: float) -> None:
    rng = np.random.default_rng(8)
    x, weight, bias = rng.normal(size=(TOKENS, HIDDEN)), rng.normal(size=(VOCAB, HIDDEN)), rng.normal(size=VOCAB)
    labels, upstream = make_labels(rng), make_upstream(rng, reduction)
    ignored = labels == IGNORE
    arguments = {"upstream": upstream, "reduction": reduction, **OPTIONS}
    clean = oracle.fused_linear_ce(x, weight, labels, bias, **arguments)
    poisoned = oracle.fused_linear_ce(np.where(ignored[:, None], poison, x), weight, labels, bias, **arguments)

    for field in ("loss", "z_loss", "token_accuracy", "predicted_tokens"):
        np.testing.assert_array_equal(getattr(poisoned, field), getattr(clean, field))
    for name, gradient in clean.gradients.items():
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(poisoned.gradients[name], gradient)
    np.testing.assert_array_equal(clean.gradients["x"][ignored], 0)
    np.testing.assert_array_equal(clean.predicted_tokens[ignored], -1)
    if reduction == "none":
        for per_token in (clean.loss, clean.z_loss, clean.token_accuracy):
            np.testing.assert_array_equal(per_token[ignored], 0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (4,), (2, 3), ()])
def test_no_valid_token(reduction: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(9)
    labels = np.full(shape, IGNORE)
    arguments = {"reduction": reduction, "class_weight": make_class_weight(rng), **OPTIONS}
    x, weight, bias = np.full((*shape, HIDDEN), np.nan), rng.normal(size=(VOCAB, HIDDEN)), rng.normal(size=VOCAB)

    linear = oracle.fused_linear_ce(x, weight, labels, bias, **arguments)
    assert_all_zero(linear, shape)
    assert {name: gradient.shape for name, gradient in linear.gradients.items()} == {
        "x": x.shape,
        "weight": weight.shape,
        "bias": bias.shape,
    }
    logits = np.full((*shape, VOCAB), np.nan)
    on_logits = oracle.cross_entropy(logits, labels, **arguments)
    assert_all_zero(on_logits, shape)
    assert on_logits.gradients["logits"].shape == logits.shape
    assert on_logits.loss.shape == linear.loss.shape == (shape if reduction == "none" else ())


def test_zero_class_weight_of_every_valid_token() -> None:
    rng = np.random.default_rng(10)
    logits, labels, class_weight = rng.normal(size=(TOKENS, VOCAB)), np.full(TOKENS, 3), make_class_weight(rng)
    assert class_weight[3] == 0

    without_z_loss = oracle.cross_entropy(logits, labels, class_weight=class_weight, label_smoothing=0.2)
    assert_close(without_z_loss.loss, 0.0)
    np.testing.assert_array_equal(without_z_loss.gradients["logits"], 0)

    # The z-loss has its own divisor, and stays.
    logits_t = leaf(logits)
    z_loss = 0.1 * torch.logsumexp(logits_t, dim=-1).square().mean()
    (2.5 * z_loss).backward()
    with_z_loss = oracle.cross_entropy(logits, labels, class_weight=class_weight, lse_square_scale=0.1, upstream=2.5)
    assert_close(with_z_loss.loss, z_loss)
    assert_close(with_z_loss.z_loss, z_loss)
    assert_close(with_z_loss.gradients["logits"], logits_t.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bad_label", [-1, VOCAB, 2**40])
def test_bad_labels(reduction: str, bad_label: int) -> None:
    """A bad token makes its own loss NaN, and is otherwise as good as ignored."""
    rng = np.random.default_rng(11)
    x, weight, bias = rng.normal(size=(TOKENS, HIDDEN)), rng.normal(size=(VOCAB, HIDDEN)), rng.normal(size=VOCAB)
    ignored_labels = make_labels(rng)
    bad_labels = ignored_labels.copy()
    bad_labels[1] = bad_label
    arguments = {
        "upstream": make_upstream(rng, reduction),
        "class_weight": make_class_weight(rng),
        "reduction": reduction,
        **OPTIONS,
    }
    ignored = oracle.fused_linear_ce(x, weight, ignored_labels, bias, **arguments)
    bad = oracle.fused_linear_ce(x, weight, bad_labels, bias, **arguments)

    is_bad = np.arange(TOKENS) == 1 if reduction == "none" else np.asarray(True)
    np.testing.assert_array_equal(bad.loss, np.where(is_bad, np.nan, ignored.loss))
    np.testing.assert_array_equal(bad.z_loss, np.where(is_bad, np.nan, ignored.z_loss))
    np.testing.assert_array_equal(bad.token_accuracy, ignored.token_accuracy)
    np.testing.assert_array_equal(bad.predicted_tokens, ignored.predicted_tokens)
    for name, gradient in ignored.gradients.items():
        np.testing.assert_array_equal(bad.gradients[name], gradient)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bad_labels_alone(reduction: str) -> None:
    """A bad label is seen even where there is nothing to divide by."""
    expected = oracle.cross_entropy(np.full((2, VOCAB), np.nan), [VOCAB, IGNORE], reduction=reduction)
    wanted = np.asarray([np.nan, 0.0]) if reduction == "none" else np.nan
    assert_close(expected.loss, wanted)
    assert_close(expected.z_loss, wanted)
    assert_close(expected.token_accuracy, np.zeros(2) if reduction == "none" else 0.0)
    np.testing.assert_array_equal(expected.predicted_tokens, -1)
    np.testing.assert_array_equal(expected.gradients["logits"], 0)


# ---- inputs


def test_a_scalar_upstream_is_the_same_for_every_token() -> None:
    rng = np.random.default_rng(12)
    logits, labels = rng.normal(size=(TOKENS, VOCAB)), make_labels(rng)
    scalar = oracle.cross_entropy(logits, labels, upstream=1.5, reduction="none")
    array = oracle.cross_entropy(logits, labels, upstream=np.full(TOKENS, 1.5), reduction="none")
    np.testing.assert_array_equal(scalar.gradients["logits"], array.gradients["logits"])


def test_bfloat16_inputs_are_widened_exactly() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(13)
    x, weight = (rng.normal(size=(n, HIDDEN)).astype(ml_dtypes.bfloat16) for n in (TOKENS, VOCAB))
    labels = make_labels(rng).astype(np.int32)
    narrow = oracle.fused_linear_ce(x, weight, labels)
    wide = oracle.fused_linear_ce(x.astype(np.float64), weight.astype(np.float64), labels)
    assert_close(narrow.loss, wide.loss)
    assert_close(narrow.gradients["weight"], wide.gradients["weight"])


def test_inputs_that_do_not_fit_are_refused() -> None:
    logits, labels = np.zeros((2, 3, VOCAB)), np.zeros((2, 3), np.int64)
    with pytest.raises(ValueError, match="logits"):
        oracle.cross_entropy(logits, labels.T)
    with pytest.raises(ValueError, match="class_weight"):
        oracle.cross_entropy(logits, labels, class_weight=np.ones(VOCAB - 1))
    with pytest.raises(ValueError, match="upstream"):
        oracle.cross_entropy(logits, labels, upstream=np.ones((2, 3)), reduction="mean")
    with pytest.raises(ValueError, match="reduction"):
        oracle.cross_entropy(logits, labels, reduction="average")
