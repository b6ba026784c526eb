"""What a property test may ask of numbers: exactness where the contract has it, else twice what rounding costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from hypothesis import assume

from tests.parity import framework, frontends, oracle
from tests.parity.cases import Inputs
from tests.parity.closeness import EPSILON, check_results
from tests.parity.frontends import Results
from tests.trust.problems import Problem

METRICS = ("token_accuracy", "predicted_tokens", "num_valid", "num_correct")
ROUNDING = 2.0**-24  # of a float32, relative
Margins = dict[str, np.ndarray]


def expected_of(problem: Problem, inputs: Inputs) -> Results:
    """The oracle's answer, if it is one that the dtype can hold."""
    expected = frontends.run_oracle(problem, inputs)
    for key, gradient in expected.items():
        if key.startswith("grad_") and gradient.size:
            assume(not np.abs(gradient).max() > torch.finfo(problem.dtype).max / 4)
    return expected


def margins_of(problem: Problem, inputs: Inputs, expected: Results, device: torch.device) -> Margins:
    """How far each number may be from the oracle's; ``check`` allows twice that, and the parity tests' epsilon.

    The error of plain torch; and, since that is 0 by luck where there are few numbers or all cancel,

    - what it costs the oracle that every logit is off by one float32 rounding of its terms (if any), its tanh and its
      exponential by one of their own, and that every gradient of a logit, and every gradient, is rounded to the dtype;
    - what a float32 sum may be off by, in any order: half a rounding of all its terms for each of them (of equal ones
      all err alike), and at least one.
    """
    plain = framework.run(problem, inputs, device)
    rounded, terms = _rounded_and_terms(problem, inputs)
    margins = {}
    for key, value in rounded.items():
        with np.errstate(invalid="ignore"):
            errors = [np.abs(a - expected[key]) for a in (plain[key].numpy().reshape(value.shape), value)]
            errors.append(ROUNDING * terms.get(key, np.zeros(())))
        margins[key] = sum(np.where(np.isfinite(error), error, 0.0) for error in errors)
    return margins


def check(name: str, problem: Problem, ours: Results, expected: Results, margins: Margins) -> None:
    """``ours`` may leave out what was not asked for."""
    asked = {key: expected[key] for key in ours}
    plain = {key: torch.from_numpy(np.asarray(asked[key] + margins[key])) for key in asked if key not in METRICS}
    check_results(name, problem, ours, asked, plain)


def with_metrics(problem: Problem, inputs: Inputs, expected: Results, predictions: np.ndarray) -> Results:
    """``expected`` with the metrics of these ``predictions``, once they are seen to be right."""
    labels = inputs.labels.numpy()
    valid = _valid(problem, labels)
    assert predictions.shape == labels.shape
    assert (predictions[~valid] == -1).all()
    _check_predictions(problem, inputs, valid, predictions[valid])
    correct = predictions[valid] == labels[valid]
    if problem.reduction == "none":
        per_token = np.zeros(labels.shape)
        per_token[valid] = correct
        return expected | {"predicted_tokens": predictions, "token_accuracy": per_token, "num_correct": per_token}
    accuracy = np.asarray(correct.mean() if correct.size else 0.0)
    return expected | {
        "predicted_tokens": predictions,
        "token_accuracy": accuracy,
        "num_correct": np.asarray(correct.sum()),
    }


def _check_predictions(problem: Problem, inputs: Inputs, valid: np.ndarray, predictions: np.ndarray) -> None:
    """``argmax`` of the final float32 logits, where they are known: those without a cap, of exact numbers.

    Elsewhere a largest one to rounding; of exact equals the lowest still.
    """
    logits, terms = (array[valid] for array in _logits_and_terms(inputs))
    known = _known(problem)
    z = np.float32(problem.options.get("logit_scale", 1.0)) * logits.astype(np.float32)
    cap = problem.options.get("softcap")
    if known and cap is None:
        np.testing.assert_array_equal(predictions, z.argmax(1))
        return
    z = problem.options.get("logit_scale", 1.0) * logits
    chosen = np.arange(len(z)), predictions
    slack = 2 * (2 + problem.hidden) * ROUNDING * abs(problem.options.get("logit_scale", 1.0)) * terms
    if cap is not None:
        z, slack = cap * np.tanh(z / cap), slack + 8 * ROUNDING * cap
    finite = np.where(np.isfinite(slack), slack, 0.0)
    assert (z.max(1) - z[chosen] <= finite.max(1)).all()
    if known:
        assert (predictions == (logits == logits[chosen][:, None]).argmax(1)).all()


def _known(problem: Problem) -> bool:
    """Whether float32 has the logits exactly, before scale and cap."""
    return problem.exact or problem.operation == "logits"


def _logits_and_terms(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Logits before scale and cap, in float64, and the sums of the absolute values of what they are sums of."""
    arrays = {name: array.double().numpy() for name, array in inputs.arrays.items()}
    if "logits" in arrays:
        return arrays["logits"], np.abs(arrays["logits"])
    x, weight, bias = arrays["x"], arrays["weight"], arrays.get("bias", np.zeros(()))
    with np.errstate(invalid="ignore"):
        return x @ weight.T + bias, np.abs(x) @ np.abs(weight).T + np.abs(bias)


def _rounded_and_terms(problem: Problem, inputs: Inputs) -> tuple[Results, Results]:
    """The oracle's losses and gradients where all is rounded once; and of what sums may be off by a rounding."""
    logits, terms = _logits_and_terms(inputs)
    up_or_down = ROUNDING * np.random.default_rng(0).choice((-1.0, 1.0), (2, *logits.shape))
    options = {**problem.options}
    scale, cap = options.pop("logit_scale", 1.0), options.pop("softcap", None)
    with np.errstate(invalid="ignore"):
        if _known(problem):  # the product is exact, and so is a scale of a power of two
            terms = np.abs(logits) * (math.frexp(scale)[0] not in (0.5, -0.5))
        roundings = (abs(scale) * terms + 1.0) * up_or_down[0]
        z, slope = np.where(np.isfinite(logits), scale * logits + roundings, scale * logits), scale
    if cap is not None:
        tanh = np.tanh(z / cap)
        tanh = np.where(np.abs(tanh) < 1.0, tanh * (1.0 + up_or_down[1]), tanh)
        z, slope = cap * tanh, scale * (1.0 - tanh**2)
    labels, upstream = inputs.labels.numpy(), inputs.upstream.double().numpy()
    if problem.options.get("use_token_scaling"):  # exp(-(lse - z_y)), of a difference that is rounded
        own = np.eye(problem.vocab)[np.where(_valid(problem, labels), labels, 0)]
        with np.errstate(invalid="ignore"):
            z = np.where(own > 0.0, z - ROUNDING * (z.max(-1, keepdims=True) - z), z)
    class_weight = None if inputs.class_weight is None else inputs.class_weight.double().numpy()
    answer = oracle.cross_entropy(z, labels, class_weight=class_weight, upstream=upstream, **options)
    dtype, valid = problem.dtype, _valid(problem, labels)[..., None]
    rounded = torch.from_numpy(np.where(valid, answer.gradients["logits"] * slope, 0.0)).to(dtype)
    absolute = np.where(valid, abs(scale) * _terms_of_gradient(problem, inputs, z), 0.0)
    losses = {"loss": answer.loss, "z_loss": answer.z_loss}
    gradients = _sums(problem, inputs, rounded.double().numpy(), lambda array: array)
    gradients = {name: torch.from_numpy(gradient).to(dtype).double().numpy() for name, gradient in gradients.items()}
    terms = _sums(problem, inputs, absolute, np.abs)
    if problem.reduction != "none":
        terms |= {name: np.abs(loss) for name, loss in losses.items()}
    tokens = int(valid.sum())
    lengths = {"grad_logits": 1, "grad_x": problem.vocab, "grad_weight": tokens, "grad_bias": tokens}
    terms = {name: max(1.0, lengths.get(name, tokens) / 2) * total for name, total in terms.items()}
    return losses | gradients, terms


def _terms_of_gradient(problem: Problem, inputs: Inputs, z: np.ndarray) -> np.ndarray:
    """Of each final logit's gradient: the sum of the absolute values that are added and subtracted, or more."""
    labels, smoothing = inputs.labels.numpy(), problem.options.get("label_smoothing", 0.0)
    weight = np.ones(problem.vocab) if inputs.class_weight is None else inputs.class_weight.double().numpy()
    valid = _valid(problem, labels)
    y = np.where(valid, labels, 0)
    ce_divisor = z_divisor = 1.0
    if problem.reduction == "mean":
        ce_divisor, z_divisor = weight[y[valid]].sum() or 1.0, valid.sum() or 1.0
        if "num_items_in_batch" in problem.options:
            ce_divisor = z_divisor = problem.options["num_items_in_batch"]
    with np.errstate(invalid="ignore", over="ignore"):
        top = z.max(-1, keepdims=True)
        total = np.exp(z - top).sum(-1, keepdims=True)
        p, lse = np.exp(z - top) / total, top + np.log(total)
        ce = (1.0 - smoothing) * weight[y][..., None] * (p + np.eye(problem.vocab)[y])
        ce += smoothing / problem.vocab * (weight.sum() * p + weight)
        z_loss = problem.options.get("lse_square_scale", 0.0) * 2.0 * np.abs(lse) * p
        return np.abs(inputs.upstream.double().numpy())[..., None] * (ce / ce_divisor + z_loss / z_divisor)


def _sums(problem: Problem, inputs: Inputs, gradient: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> Results:
    """The gradients by a problem's inputs from those by its logits."""
    if problem.operation == "logits":
        return {"grad_logits": gradient}
    valid = _valid(problem, inputs.labels.numpy())[..., None]
    x = of(np.where(valid, inputs.arrays["x"].double().numpy(), 0.0)).reshape(-1, problem.hidden)
    flat = gradient.reshape(-1, problem.vocab)
    sums = {"grad_x": gradient @ of(inputs.arrays["weight"].double().numpy()), "grad_weight": flat.T @ x}
    return sums | ({"grad_bias": flat.sum(0)} if problem.bias else {})


def _valid(problem: Problem, labels: np.ndarray) -> np.ndarray:
    return labels != problem.ignore_index  # none is bad here


def sum_of_margins(problem: Problem, cut: set[str], answers: Sequence[tuple[Results, Margins]]) -> Margins:
    """Margins of a whole that is put together of results of its parts: those of all ``answers``, the whole's first.

    What is named by ``cut`` is laid side by side; the rest is added, so each part's own rounding counts.
    """
    (_, whole), *parts = answers
    margins = {}
    for key, margin in whole.items():
        epsilon = EPSILON[problem.dtype if key.startswith("grad_") else torch.float32]
        with np.errstate(invalid="ignore"):
            rounding = [(0.0 if key in cut else epsilon) * np.abs(expected[key]) for expected, _ in parts]
        of_parts = [part[key] + np.where(np.isfinite(r), r, 0.0) for (_, part), r in zip(parts, rounding, strict=True)]
        margins[key] = margin + (np.concatenate(of_parts) if key in cut else sum(of_parts))
    return margins
