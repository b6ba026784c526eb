"""Cross entropy over given logits: one program per token, one pass over its row forward and one backward.

The online log-sum-exp is that of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
"""

import triton
import triton.language as tl

from core_kernels.kernels.logits import (
    NO_COLUMN,
    argmax_minding_nan,
    exp,
    final_logits,
    finite_or_zero,
    gradient_coefficients,
    is_valid,
    logits_gradient,
    merge_argmax,
    round_to,
)
from core_kernels.kernels.tokens import store_token


@triton.jit
def load_logits(
    row, column, mask, stride_v, logit_scale, softcap, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """A block of a row's final logits; -inf where masked."""
    z = tl.load(row + column.to(tl.int64) * stride_v, mask=mask, other=0.0).to(tl.float32)
    return final_logits(z, mask, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)


@triton.jit
def cross_entropy_forward(
    logits, labels, class_weight, class_weight_sum,
    loss, z_loss, correct, num_valid, num_correct, predicted, saved_base, saved_log_sum, token_scale,
    stride_n, stride_v, V, ignore_index, logit_scale, softcap, smoothing, lse_square_scale,
    PER_TOKEN: tl.constexpr, Z_OUTPUT: tl.constexpr, ACCURACY: tl.constexpr, COUNTS: tl.constexpr,
    PREDICTED: tl.constexpr, TOKEN_SCALING: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N,). ``logits`` (N, V) with any strides; the rest (N,), (V,) or scalars. A row's loss and statistics."""
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token)
    ARGMAX: tl.constexpr = ACCURACY or COUNTS or PREDICTED
    row_max = tl.full([], float("-inf"), tl.float32)
    row_sum = tl.full([], 0.0, tl.float32)
    target_logit = tl.full([], 0.0, tl.float32)
    smooth_base = tl.full([], 0.0, tl.float32)
    smooth_sum = tl.full([], 0.0, tl.float32)
    argmax = tl.full([], 0, tl.int32)
    lane = tl.arange(0, BLOCK)
    row = logits + token * stride_n
    if is_valid(label, ignore_index, V):
        own = tl.load(row + label.to(tl.int64) * stride_v).to(tl.float32)
        target_logit = final_logits(own, True, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        coming = tl.load(row + lane.to(tl.int64) * stride_v, mask=lane < V, other=0.0)
        for start in range(0, V, BLOCK):
            column = start + lane
            in_vocab = column < V
            raw = coming
            after = column + BLOCK  # is on its way while this block is summed
            coming = tl.load(row + after.to(tl.int64) * stride_v, mask=after < V, other=0.0)
            z = final_logits(raw.to(tl.float32), in_vocab, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
            block_top = tl.max(z, 0)
            if ARGMAX:
                if block_top > row_max:  # few blocks raise the maximum: only they pay for finding where
                    argmax = tl.min(tl.where(z == block_top, column, NO_COLUMN), 0)
            new_max = tl.maximum(row_max, block_top)
            base = finite_or_zero(new_max)
            row_sum = row_sum * tl.exp(row_max - base) + tl.sum(exp(z - base), 0)
            row_max = new_max
            if SMOOTHING:
                if start == 0:
                    smooth_base = base
                w = tl.where(in_vocab, 1.0, 0.0)
                if CLASS_WEIGHT:
                    w = tl.load(class_weight + column, mask=in_vocab, other=0.0).to(tl.float32)
                smooth_sum += tl.sum(tl.where(in_vocab, w * (z - smooth_base), 0.0), 0)
    if ARGMAX:
        if row_sum != row_sum:  # NaN or inf in the row: look again
            top = tl.full([], float("-inf"), tl.float32)
            argmax = tl.full([], NO_COLUMN, tl.int32)
            for start in range(0, V, BLOCK):
                column = start + lane
                in_vocab = column < V
                z = load_logits(row, column, in_vocab, stride_v, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
                block_top, block_column = argmax_minding_nan(z, column, 0)
                argmax = merge_argmax(top, argmax, block_top, block_column)
                top = tl.maximum(top, block_top)
    store_token(
        token, True, label, row_max, tl.log(row_sum), target_logit, smooth_base, smooth_sum, argmax,
        class_weight, class_weight_sum,
        loss, z_loss, correct, num_valid, num_correct, predicted, saved_base, saved_log_sum, token_scale,
        V, ignore_index, smoothing, lse_square_scale,
        PER_TOKEN, Z_OUTPUT, ACCURACY, COUNTS, PREDICTED, TOKEN_SCALING, CLASS_WEIGHT, SMOOTHING,
    )  # fmt: skip


@triton.jit
def cross_entropy_backward(
    logits, labels, class_weight, class_weight_sum, lse_base, saved_log_sum, token_scale, divisors,
    grad_loss, grad_logits,
    stride_n, stride_v, group_tokens, V, ignore_index, logit_scale, softcap, smoothing, lse_square_scale,
    MEAN: tl.constexpr, TOKEN_SCALING: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N,). Writes ``grad_logits`` (N, V), contiguous, from the logits and the saved statistics of each row."""
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token)
    valid = is_valid(label, ignore_index, V)
    row = logits + token * stride_n
    grad_row = grad_logits + token * V
    base = tl.load(lse_base + token, mask=valid, other=0.0)
    log_sum = tl.load(saved_log_sum + token, mask=valid, other=0.0)
    soft, target, uniform = gradient_coefficients(
        token, label, valid, base, log_sum,
        grad_loss, group_tokens, divisors, token_scale, class_weight, class_weight_sum,
        V, smoothing, lse_square_scale,
        MEAN, TOKEN_SCALING, CLASS_WEIGHT, SMOOTHING, Z_LOSS,
    )  # fmt: skip
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        in_vocab = column < V
        readable = column < tl.where(valid, V, 0)
        z = load_logits(row, column, readable, stride_v, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        g = logits_gradient(
            z, True, column, in_vocab, label, base, log_sum, soft, target, uniform,
            class_weight, logit_scale, softcap, CLASS_WEIGHT, SMOOTHING, Z_LOSS, HAS_SCALE, HAS_SOFTCAP,
        )  # fmt: skip
        g = tl.where(valid, g, 0.0)
        tl.store(grad_row + column, round_to(g, grad_logits.dtype.element_ty), mask=in_vocab)
