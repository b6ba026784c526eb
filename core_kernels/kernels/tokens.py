"""Kernels over tokens: which are valid, what each one's loss and metrics are, and their reduction."""

import triton
import triton.language as tl

from core_kernels.kernels.logits import argmax_column, is_valid


@triton.jit
def compact_valid_tokens(
    labels, valid_tokens, valid_position, valid_count, N, V, ignore_index, POSITION: tl.constexpr, BLOCK: tl.constexpr
):
    """Number the valid tokens in order, so that products can skip the others without the host knowing the count.

    One program. ``valid_tokens[r]`` is the r-th valid token, and those that are not valid come after all that are;
    ``valid_position``, if asked for, is its inverse, and ``-1 - r`` where not valid.
    """
    count = tl.zeros([], tl.int32)
    for start in range(0, N, BLOCK):
        token = start + tl.arange(0, BLOCK)
        valid = (token < N) & is_valid(tl.load(labels + token, mask=token < N, other=0), ignore_index, V)
        rank = count + tl.cumsum(valid.to(tl.int32), 0) - 1
        rank = tl.where(valid, rank, N - 1 - (token - 1 - rank))
        tl.store(valid_tokens + rank, token, mask=token < N)
        if POSITION:
            tl.store(valid_position + token, tl.where(valid, rank, -1 - rank), mask=token < N)
        count += tl.sum(valid.to(tl.int32), 0)
    tl.store(valid_count, count)


@triton.jit
def sum_class_weight(class_weight, class_weight_sum, V, BLOCK: tl.constexpr):
    """``sum_v w_v`` in float32. One program."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total += tl.load(class_weight + column, mask=column < V, other=0.0).to(tl.float32)
    tl.store(class_weight_sum, tl.sum(total, 0))


@triton.jit
def mean_divisors(
    labels, class_weight, divisors, num_tokens, V, ignore_index, CLASS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """``divisors (2,)`` as ``reduce_tokens`` leaves them, where they are needed before the losses are. One program."""
    sum_weight = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        label = tl.load(labels + token, mask=token < num_tokens, other=0)
        valid = (token < num_tokens) & is_valid(label, ignore_index, V)
        count += valid.to(tl.int32)
        if CLASS_WEIGHT:
            sum_weight += tl.load(class_weight + label, mask=valid, other=0.0).to(tl.float32)
    valid_count = tl.sum(count, 0).to(tl.float32)
    weights = tl.sum(sum_weight, 0) if CLASS_WEIGHT else valid_count
    tl.store(divisors, tl.where(weights == 0.0, 0.0, 1.0 / weights))
    tl.store(divisors + 1, tl.where(valid_count == 0.0, 0.0, 1.0 / valid_count))


@triton.jit
def store_token(
    token, in_range, label, base, log_sum, target_logit, smooth_base, smooth_sum, argmax,
    class_weight, class_weight_sum,
    loss, z_loss, correct, num_valid, num_correct, predicted, saved_base, saved_log_sum, token_scale,
    V, ignore_index, smoothing, lse_square_scale,
    PER_TOKEN: tl.constexpr, Z_OUTPUT: tl.constexpr, ACCURACY: tl.constexpr, COUNTS: tl.constexpr,
    PREDICTED: tl.constexpr, TOKEN_SCALING: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Store what one token contributes, from its row's statistics, ``lse = base + log_sum``. Device function.

    ``loss = w_y (1 - e) (lse - z_y) + e / V * sum_v w_v (lse - z_v)``, ``z_loss = lse_square_scale * lse^2``, where
    ``smooth_sum = sum_v w_v (z_v - smooth_base)``. Ignored: 0 and -1. A label that is no class: NaN and -1.
    """
    ignored = label == ignore_index
    valid = in_range & is_valid(label, ignore_index, V)
    nll = (base - target_logit) + log_sum  # not lse - z_y: small losses keep their digits
    nll = tl.where(nll < 0.0, 0.0, nll)  # the label's logit may be rounded otherwise than the sum's
    lse = base + log_sum
    value = nll
    if CLASS_WEIGHT:
        value = nll * tl.load(class_weight + label, mask=valid, other=0.0).to(tl.float32)
    if SMOOTHING:
        weights = tl.load(class_weight_sum) if CLASS_WEIGHT else V
        spread = ((base - smooth_base) + log_sum) * weights - smooth_sum
        value = (1.0 - smoothing) * value + (smoothing / V) * spread
    z_value = lse_square_scale * lse * lse
    if TOKEN_SCALING:
        scale = tl.exp(-nll)
        value = value * scale
        z_value = z_value * scale
        tl.store(token_scale + token, tl.where(valid, scale, 0.0), mask=in_range)
    missing = tl.where(ignored, 0.0, float("nan"))
    value = tl.where(valid, value, missing)
    z_value = tl.where(valid, z_value, missing)
    if PER_TOKEN:
        tl.store(loss + token, value + z_value, mask=in_range)
        if Z_OUTPUT:
            tl.store(z_loss + token, z_value, mask=in_range)
    else:
        tl.store(loss + token, value, mask=in_range)
        tl.store(z_loss + token, z_value, mask=in_range)
    tl.store(saved_base + token, tl.where(valid, base, 0.0), mask=in_range)
    tl.store(saved_log_sum + token, tl.where(valid, log_sum, 0.0), mask=in_range)
    if ACCURACY or COUNTS or PREDICTED:
        store_metrics(
            token, in_range, label, valid, argmax, correct, num_valid, num_correct, predicted,
            PER_TOKEN, ACCURACY, COUNTS, PREDICTED,
        )  # fmt: skip


@triton.jit
def store_metrics(
    token, in_range, label, valid, argmax, correct, num_valid, num_correct, predicted,
    PER_TOKEN: tl.constexpr, ACCURACY: tl.constexpr, COUNTS: tl.constexpr, PREDICTED: tl.constexpr,
):  # fmt: skip
    prediction = tl.where(valid, argmax_column(argmax), -1)
    is_correct = valid & (prediction == label)
    if PREDICTED:
        tl.store(predicted + token, prediction.to(predicted.dtype.element_ty), mask=in_range)
    if ACCURACY or (COUNTS and not PER_TOKEN):
        tl.store(correct + token, is_correct.to(tl.float32), mask=in_range)
    if COUNTS and PER_TOKEN:
        tl.store(num_valid + token, valid.to(num_valid.dtype.element_ty), mask=in_range)
        tl.store(num_correct + token, is_correct.to(num_correct.dtype.element_ty), mask=in_range)


@triton.jit
def reduce_tokens(
    labels, token_loss, token_z_loss, token_correct, class_weight,
    loss, z_loss, accuracy, num_valid, num_correct, divisors,
    group_tokens, V, ignore_index,
    MEAN: tl.constexpr, Z_OUTPUT: tl.constexpr, ACCURACY: tl.constexpr, COUNTS: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (groups,). Sum or mean over a group's tokens, in a fixed order.

    ``"mean"`` divides the losses by the sum of the valid tokens' class weights and the z-losses by their count; a
    divisor of 0 gives 0. ``divisors`` (groups, 2) receives both reciprocals for the backward pass.
    """
    group = tl.program_id(0)
    first_token = group.to(tl.int64) * group_tokens
    sum_loss = tl.zeros([BLOCK], tl.float32)
    sum_z = tl.zeros([BLOCK], tl.float32)
    sum_correct = tl.zeros([BLOCK], tl.float32)
    sum_weight = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(0, group_tokens, BLOCK):
        inside = start + tl.arange(0, BLOCK) < group_tokens
        token = first_token + start + tl.arange(0, BLOCK)
        label = tl.load(labels + token, mask=inside, other=0)
        valid = inside & is_valid(label, ignore_index, V)
        count += valid.to(tl.float32)
        if CLASS_WEIGHT:
            sum_weight += tl.load(class_weight + label, mask=valid, other=0.0).to(tl.float32)
        sum_loss += tl.load(token_loss + token, mask=inside, other=0.0)
        sum_z += tl.load(token_z_loss + token, mask=inside, other=0.0)
        if ACCURACY or COUNTS:
            sum_correct += tl.load(token_correct + token, mask=inside, other=0.0)
    counted = tl.sum(count.to(tl.int32), 0)  # a float32 counts to 2**24
    counted_correct = tl.sum(sum_correct.to(tl.int32), 0)
    valid_count = counted.to(tl.float32)
    total_loss = tl.sum(sum_loss, 0)
    total_z = tl.sum(sum_z, 0)
    if MEAN:
        weights = tl.sum(sum_weight, 0) if CLASS_WEIGHT else valid_count
        by_weight = tl.where(weights == 0.0, 0.0, 1.0 / weights)
        by_count = tl.where(valid_count == 0.0, 0.0, 1.0 / valid_count)
        tl.store(divisors + 2 * group, by_weight)
        tl.store(divisors + 2 * group + 1, by_count)
        total_loss = total_loss * by_weight
        total_z = total_z * by_count
    tl.store(loss + group, total_loss + total_z)
    if Z_OUTPUT:
        tl.store(z_loss + group, total_z)
    if ACCURACY:
        tl.store(accuracy + group, tl.where(counted == 0, 0.0, counted_correct.to(tl.float32) / valid_count))
    if COUNTS:
        tl.store(num_valid + group, counted.to(num_valid.dtype.element_ty))
        tl.store(num_correct + group, counted_correct.to(num_correct.dtype.element_ty))
