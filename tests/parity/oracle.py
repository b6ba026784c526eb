"""Float64 NumPy oracle: what both frontends must compute, stated as directly as possible.

Full logits, no chunking, gradients written out by hand. Every parity test compares with these two functions, so
clarity comes before speed here, and nothing is shared with the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

NO_PREDICTION = -1
REDUCTIONS = ("none", "sum", "mean")


@dataclass(frozen=True)
class Expected:
    """Every output of one call, and the gradient of `sum(upstream * loss)` for each differentiable input."""

    loss: FloatArray  # shape () for "mean" and "sum", the labels' shape for "none"
    z_loss: FloatArray  # as loss; it is part of loss already
    token_accuracy: FloatArray  # as loss
    predicted_tokens: IntArray  # always the labels' shape
    num_valid: IntArray  # as loss
    num_correct: IntArray  # as loss
    gradients: dict[str, FloatArray]


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    class_weight: ArrayLike | None = None,
    upstream: ArrayLike = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items_in_batch: int | None = None,
    use_token_scaling: bool = False,
) -> Expected:
    """Cross entropy of `logits` (..., V) with `labels` (...); gradients: "logits"."""
    logits = np.asarray(logits, np.float64)
    vocab = logits.shape[-1]
    batch = _sort_tokens(labels, vocab, ignore_index)
    _require_shape("logits", logits, (*batch.shape, vocab))
    options = _Options(
        class_weight=_class_weight(class_weight, vocab),
        upstream=_upstream_of_valid(upstream, batch, reduction),
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        logit_scale=logit_scale,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        use_token_scaling=use_token_scaling,
    )

    with np.errstate(invalid="ignore", over="ignore"):  # inf and NaN are legal inputs
        tokens = _evaluate(logits.reshape(batch.size, vocab)[batch.valid], batch.valid_labels, options)
        d_logits = _scatter(_logit_gradient(tokens, options), batch).reshape(logits.shape)
        return _expected(tokens, batch, options, {"logits": d_logits})


def fused_linear_ce(
    x: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    class_weight: ArrayLike | None = None,
    upstream: ArrayLike = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items_in_batch: int | None = None,
    use_token_scaling: bool = False,
) -> Expected:
    """Cross entropy of `x @ weight.T + bias`: x (..., H), weight (V, H), bias (V,), labels (...).

    Gradients: "x", "weight", and "bias" where one is given.
    """
    x = np.asarray(x, np.float64)
    weight = np.asarray(weight, np.float64)
    vocab, hidden = weight.shape
    batch = _sort_tokens(labels, vocab, ignore_index)
    _require_shape("x", x, (*batch.shape, hidden))
    options = _Options(
        class_weight=_class_weight(class_weight, vocab),
        upstream=_upstream_of_valid(upstream, batch, reduction),
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        logit_scale=logit_scale,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        use_token_scaling=use_token_scaling,
    )

    with np.errstate(invalid="ignore", over="ignore"):  # inf and NaN are legal inputs
        valid_x = x.reshape(batch.size, hidden)[batch.valid]
        logits = valid_x @ weight.T
        if bias is not None:
            bias = np.asarray(bias, np.float64)
            _require_shape("bias", bias, (vocab,))
            logits = logits + bias

        tokens = _evaluate(logits, batch.valid_labels, options)
        d_logits = _logit_gradient(tokens, options)
        gradients = {"x": _scatter(d_logits @ weight, batch).reshape(x.shape), "weight": d_logits.T @ valid_x}
        if bias is not None:
            gradients["bias"] = d_logits.sum(axis=0)
        return _expected(tokens, batch, options, gradients)


# ---- the tokens: valid, ignored or bad


@dataclass(frozen=True)
class _Batch:
    """The flattened labels and their kind: valid, bad (out of range), or ignored (neither)."""

    shape: tuple[int, ...]
    labels: IntArray
    valid: BoolArray
    bad: BoolArray

    @property
    def size(self) -> int:
        return self.labels.size

    @property
    def valid_labels(self) -> IntArray:
        return self.labels[self.valid]


def _sort_tokens(labels: ArrayLike, vocab: int, ignore_index: int) -> _Batch:
    labels = np.asarray(labels, np.int64)
    flat = labels.reshape(-1)
    counted = flat != ignore_index
    in_range = (flat >= 0) & (flat < vocab)
    return _Batch(shape=labels.shape, labels=flat, valid=counted & in_range, bad=counted & ~in_range)


def _scatter(valid_rows: FloatArray, batch: _Batch) -> FloatArray:
    """Put the valid tokens' rows back in their places. The other rows are 0, whatever their inputs hold."""
    rows = np.zeros((batch.size, valid_rows.shape[-1]))
    rows[batch.valid] = valid_rows
    return rows


# ---- the options, brought to one form


@dataclass(frozen=True)
class _Options:
    class_weight: FloatArray  # (V,), ones where none was given
    upstream: FloatArray  # one value for each valid token
    label_smoothing: float
    lse_square_scale: float
    softcap: float | None
    logit_scale: float
    reduction: str
    num_items_in_batch: int | None
    use_token_scaling: bool


def _class_weight(class_weight: ArrayLike | None, vocab: int) -> FloatArray:
    if class_weight is None:
        return np.ones(vocab)
    class_weight = np.asarray(class_weight, np.float64)
    _require_shape("class_weight", class_weight, (vocab,))
    return class_weight


def _upstream_of_valid(upstream: ArrayLike, batch: _Batch, reduction: str) -> FloatArray:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, want one of {REDUCTIONS}")
    upstream = np.asarray(upstream, np.float64)
    if upstream.ndim > 0:  # a scalar serves every reduction; an array only "none"
        _require_shape("upstream", upstream, batch.shape if reduction == "none" else ())
    return np.broadcast_to(upstream, batch.shape).reshape(-1)[batch.valid]


def _require_shape(name: str, array: FloatArray, want: tuple[int, ...]) -> None:
    if array.shape != want:
        raise ValueError(f"{name}: got shape {array.shape}, want {want}")


# ---- the maths, for valid tokens only


@dataclass(frozen=True)
class _Tokens:
    """The two parts of the loss before reduction: they have different divisors under "mean"."""

    labels: IntArray  # (n,)
    predictions: IntArray  # (n,)
    ce: FloatArray  # (n,) with label smoothing
    z_loss: FloatArray  # (n,)
    d_ce: FloatArray  # (n, V) derivative of ce with respect to the raw logits
    d_z_loss: FloatArray  # (n, V)


def _evaluate(logits: FloatArray, labels: IntArray, options: _Options) -> _Tokens:
    count, vocab = logits.shape
    token = np.arange(count)
    class_weight, smoothing = options.class_weight, options.label_smoothing
    label_weight = class_weight[labels]

    z, dz_dlogits = _scale_and_cap(logits, options)
    lse, softmax = _log_sum_exp(z)
    one_hot = np.zeros_like(z)
    one_hot[token, labels] = 1.0

    ce = (1 - smoothing) * label_weight * (lse - z[token, labels])
    dce_dz = (1 - smoothing) * label_weight[:, None] * (softmax - one_hot)
    if smoothing:  # skipped when off: 0 * inf would turn a legal -inf logit into NaN
        ce = ce + smoothing / vocab * (class_weight * (lse[:, None] - z)).sum(axis=1)
        dce_dz = dce_dz + smoothing / vocab * (class_weight.sum() * softmax - class_weight)

    z_loss = options.lse_square_scale * lse**2
    dzloss_dz = options.lse_square_scale * 2 * lse[:, None] * softmax

    # The scale is detached: a constant factor of the gradient, without a derivative of its own.
    scale = softmax[token, labels] if options.use_token_scaling else np.ones(count)
    return _Tokens(
        labels=labels,
        predictions=z.argmax(axis=1),  # the lowest index on a tie, the first NaN if any
        ce=scale * ce,
        z_loss=scale * z_loss,
        d_ce=scale[:, None] * dce_dz * dz_dlogits,
        d_z_loss=scale[:, None] * dzloss_dz * dz_dlogits,
    )


def _scale_and_cap(logits: FloatArray, options: _Options) -> tuple[FloatArray, FloatArray]:
    """The final z, and its elementwise derivative with respect to the raw logits."""
    z = options.logit_scale * logits
    if options.softcap is None:
        return z, np.full_like(z, options.logit_scale)
    tanh = np.tanh(z / options.softcap)
    return options.softcap * tanh, options.logit_scale * (1 - tanh**2)


def _log_sum_exp(z: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Log-sum-exp and softmax of each row. A row with NaN or +inf, or with -inf alone, is NaN throughout."""
    maximum = z.max(axis=1, keepdims=True)
    exponential = np.exp(z - maximum)
    total = exponential.sum(axis=1, keepdims=True)
    return (maximum + np.log(total))[:, 0], exponential / total


# ---- the reductions


def _divisors(tokens: _Tokens, options: _Options) -> tuple[float, float]:
    """What the CE part and the z-loss part are divided by."""
    if options.reduction != "mean":
        return 1.0, 1.0
    if options.num_items_in_batch is not None:
        return (float(max(options.num_items_in_batch, 1)),) * 2
    return float(options.class_weight[tokens.labels].sum()), float(tokens.labels.size)


def _logit_gradient(tokens: _Tokens, options: _Options) -> FloatArray:
    """Gradient of `sum(upstream * loss)` with respect to the valid tokens' raw logits."""
    ce_divisor, z_divisor = _divisors(tokens, options)
    upstream = options.upstream[:, None]
    return _divide(upstream * tokens.d_ce, ce_divisor) + _divide(upstream * tokens.d_z_loss, z_divisor)


def _divide(values: FloatArray, divisor: float) -> FloatArray:
    """Without anything to average over, a part is 0, not 0 / 0."""
    return values / divisor if divisor else np.zeros_like(values)


def _reduce(values: FloatArray, divisor: float, fill_bad: float, batch: _Batch, reduction: str) -> FloatArray:
    """Reduce the valid tokens' values, where a bad token gives `fill_bad` and an ignored one 0."""
    if reduction == "none":
        per_token = np.where(batch.bad, fill_bad, 0.0)
        per_token[batch.valid] = values
        return per_token.reshape(batch.shape)
    # Added after the division, so that a bad label shows also where no token is valid.
    return np.asarray(_divide(values.sum(), divisor) + (fill_bad if batch.bad.any() else 0.0))


def _expected(tokens: _Tokens, batch: _Batch, options: _Options, gradients: dict[str, FloatArray]) -> Expected:
    ce_divisor, z_divisor = _divisors(tokens, options)
    ce = _reduce(tokens.ce, ce_divisor, np.nan, batch, options.reduction)
    z_loss = _reduce(tokens.z_loss, z_divisor, np.nan, batch, options.reduction)

    correct = (tokens.predictions == tokens.labels).astype(np.float64)
    token_accuracy = _reduce(correct, float(correct.size), 0.0, batch, options.reduction)
    num_valid = _reduce(np.ones(correct.size), 1.0, 0.0, batch, options.reduction)
    num_correct = _reduce(correct, 1.0, 0.0, batch, options.reduction)
    predicted_tokens = np.full(batch.size, NO_PREDICTION, np.int64)
    predicted_tokens[batch.valid] = tokens.predictions
    return Expected(
        loss=np.asarray(ce + z_loss),  # numpy turns a sum of 0-d arrays into a scalar
        z_loss=z_loss,
        token_accuracy=token_accuracy,
        predicted_tokens=predicted_tokens.reshape(batch.shape),
        num_valid=num_valid.astype(np.int64),
        num_correct=num_correct.astype(np.int64),
        gradients=gradients,
    )
