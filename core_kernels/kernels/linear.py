"""Fused projection and cross entropy: logits live in registers, a tile at a time, and are never stored.

Forward, each program walks one strip of the vocab for one tile of valid tokens and keeps the running statistics of
its rows. Backward, tiles are projected again and leave as the gradient of the logits, one slice of the vocab at a time
(the slab), which two products turn into the gradients of ``x`` and ``weight``.
"""

import triton
import triton.language as tl

from core_kernels.kernels.logits import (
    NO_COLUMN,
    final_logits,
    finite_or_zero,
    gradient_coefficients,
    is_valid,
    logits_gradient,
    merge_argmax,
    multiply_add,
    round_to,
    tile_statistics,
)
from core_kernels.kernels.tokens import store_token


@triton.jit
def grouped_tile(index, rows, columns, GROUP: tl.constexpr):
    """Row and column of the ``index``-th tile of a grid, in groups of ``GROUP`` rows, to reuse operands in L2."""
    per_group = GROUP * columns
    first = (index // per_group) * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + (index % per_group) % height, (index % per_group) // height


@triton.jit
def project(
    x, weight, bias, token, column, in_vocab, H, stride_xn, stride_xh, stride_wv, stride_wh,
    BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One (M, N) tile of ``x @ weight.T + bias`` in float32, for the given tokens and vocab columns."""
    k = tl.arange(0, K)
    safe_column = tl.where(in_vocab, column, 0).to(tl.int64)
    x_tile = x + token[:, None] * stride_xn + k[None, :].to(tl.int64) * stride_xh
    w_tile = weight + safe_column[None, :] * stride_wv + k[:, None].to(tl.int64) * stride_wh
    z = tl.zeros([M, N], tl.float32)
    for start in range(0, H, K):
        if EVEN_K:
            a = tl.load(x_tile)
            b = tl.load(w_tile)
        else:
            a = tl.load(x_tile, mask=(start + k < H)[None, :], other=0.0)
            b = tl.load(w_tile, mask=(start + k < H)[:, None], other=0.0)
        z = multiply_add(a, b, z)
        x_tile += tl.cast(stride_xh, tl.int64) * K
        w_tile += tl.cast(stride_wh, tl.int64) * K
    if BIAS:
        z = z + tl.load(bias + safe_column)[None, :].to(tl.float32)
    return z


@triton.jit
def strip_statistics(
    x, weight, bias, labels, class_weight, first_class, valid_tokens, valid_count,
    target_logit, strip_max, strip_sum, strip_smooth, strip_argmax,
    stride_xn, stride_xh, stride_wv, stride_wh, num_tokens, columns, H, strips, logit_scale, softcap,
    SHARDED: tl.constexpr, ARGMAX: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
    BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_K: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles * strips,). Statistics (strips, tokens) of the r-th valid token over one strip of the columns.

    The maximum and the sum of exponentials relative to it, its column, ``sum_v w_v z_v``; the label's logit (tokens,)
    is stored by the strip that holds it.
    """
    count = tl.load(valid_count)
    token_tiles = tl.cdiv(count, M)
    index = tl.program_id(0)
    if index >= token_tiles * strips:
        return
    tile, strip = grouped_tile(index, token_tiles, strips, GROUP)
    rank = tile * M + tl.arange(0, M)
    inside = rank < count
    token = tl.load(valid_tokens + rank, mask=inside, other=0).to(tl.int64)
    label = tl.load(labels + token, mask=inside, other=-1).to(tl.int64)
    if SHARDED:  # from here on classes are numbered as this shard's columns
        label -= tl.load(first_class)
        if CLASS_WEIGHT:
            class_weight += tl.load(first_class)

    vocab_tiles = tl.cdiv(columns, N)
    per_strip = tl.cdiv(vocab_tiles, strips)
    row_max = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    target = tl.zeros([M], tl.float32)
    smooth = tl.zeros([M], tl.float32)
    argmax = tl.full([M], NO_COLUMN, tl.int32)
    for vocab_tile in range(strip * per_strip, tl.minimum((strip + 1) * per_strip, vocab_tiles)):
        column = vocab_tile * N + tl.arange(0, N)
        in_vocab = column < columns
        z = project(
            x, weight, bias, token, column, in_vocab, H, stride_xn, stride_xh, stride_wv, stride_wh,
            BIAS, EVEN_K, M, N, K,
        )  # fmt: skip
        z = final_logits(z, in_vocab[None, :], logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        top, top_column, base, total = tile_statistics(z, column, row_max, ARGMAX)
        if ARGMAX:
            argmax = merge_argmax(row_max, argmax, top, top_column)
        row_sum = row_sum * tl.exp(row_max - base) + total
        row_max = tl.maximum(row_max, top)
        here = (label >= vocab_tile * N) & (label < (vocab_tile + 1) * N)
        if tl.max(here.to(tl.int32), 0) > 0:  # most tiles hold no token's label
            target += tl.sum(tl.where(column[None, :] == label[:, None], z, 0.0), 1)
        if SMOOTHING:
            w = tl.where(in_vocab, 1.0, 0.0)
            if CLASS_WEIGHT:
                w = tl.load(class_weight + column, mask=in_vocab, other=0.0).to(tl.float32)
            smooth += tl.sum(tl.where(in_vocab[None, :], w[None, :] * z, 0.0), 1)

    at = strip * num_tokens + rank
    tl.store(strip_max + at, row_max, mask=inside)
    tl.store(strip_sum + at, row_sum, mask=inside)
    if SMOOTHING:
        tl.store(strip_smooth + at, smooth, mask=inside)
    if ARGMAX:
        tl.store(strip_argmax + at, argmax, mask=inside)
    in_strip = (label >= strip * per_strip * N) & (label < (strip + 1) * per_strip * N)
    tl.store(target_logit + rank, target, mask=inside & in_strip)


@triton.jit
def merge_strips(
    position, valid, strip_max, strip_sum, strip_smooth, strip_argmax, stride, strips,
    ARGMAX: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of the tokens at ``position`` over all strips, which are ``stride`` apart, merged in order."""
    row_max = tl.full([BLOCK], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    smooth = tl.zeros([BLOCK], tl.float32)
    argmax = tl.full([BLOCK], NO_COLUMN, tl.int32)
    for strip in range(strips):
        at = strip * stride + position
        top = tl.load(strip_max + at, mask=valid, other=float("-inf"))
        part = tl.load(strip_sum + at, mask=valid, other=0.0)
        if ARGMAX:
            column = tl.load(strip_argmax + at, mask=valid, other=NO_COLUMN)
            argmax = merge_argmax(row_max, argmax, top, column)
        new_max = tl.maximum(row_max, top)
        base = finite_or_zero(new_max)
        row_sum = row_sum * tl.exp(row_max - base) + part * tl.exp(top - base)
        row_max = new_max
        if SMOOTHING:
            smooth += tl.load(strip_smooth + at, mask=valid, other=0.0)
    return row_max, row_sum, smooth, argmax


@triton.jit
def finish_tokens(
    labels, valid_position, target_logit, strip_max, strip_sum, strip_smooth, strip_argmax,
    class_weight, class_weight_sum,
    loss, z_loss, correct, num_valid, num_correct, predicted, saved_max, saved_log_sum, token_scale,
    num_tokens, V, stride, strips, ignore_index, smoothing, lse_square_scale,
    SHARDS: tl.constexpr, PER_TOKEN: tl.constexpr, Z_OUTPUT: tl.constexpr, ACCURACY: tl.constexpr,
    COUNTS: tl.constexpr, PREDICTED: tl.constexpr, TOKEN_SCALING: tl.constexpr, CLASS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens,). Merge a token's strips, in order, and store its loss, metrics and statistics.

    Strips lie ``stride`` apart, a valid token at its position in each, and one logit of its label serves all. With
    ``SHARDS`` they are the vocab's shards, a token at its own place; one of them has its label's logit, the others 0.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = token < num_tokens
    label = tl.load(labels + token, mask=in_range, other=0)
    if SHARDS:
        position = token.to(tl.int64)
        valid = in_range & is_valid(label, ignore_index, V)
    else:
        position = tl.load(valid_position + token, mask=in_range, other=-1).to(tl.int64)
        valid = position >= 0
    row_max, row_sum, smooth, argmax = merge_strips(
        position, valid, strip_max, strip_sum, strip_smooth, strip_argmax, stride, strips,
        ACCURACY or COUNTS or PREDICTED, SMOOTHING, BLOCK,
    )  # fmt: skip
    if SHARDS:
        target = tl.zeros([BLOCK], tl.float32)
        for shard in range(strips):
            target += tl.load(target_logit + shard * stride + position, mask=valid, other=0.0)
    else:
        target = tl.load(target_logit + position, mask=valid, other=0.0)
    store_token(
        token, in_range, label, row_max, tl.log(row_sum), target, 0.0, smooth, argmax,
        class_weight, class_weight_sum,
        loss, z_loss, correct, num_valid, num_correct, predicted, saved_max, saved_log_sum, token_scale,
        V, ignore_index, smoothing, lse_square_scale,
        PER_TOKEN, Z_OUTPUT, ACCURACY, COUNTS, PREDICTED, TOKEN_SCALING, CLASS_WEIGHT, SMOOTHING,
    )  # fmt: skip


@triton.jit
def finish_shard(
    labels, first_class, valid_position, target_logit, strip_max, strip_sum, strip_smooth, strip_argmax,
    shard_max, shard_sum, shard_target, shard_smooth, shard_argmax, num_tokens, columns, strips,
    ARGMAX: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens,). Merge a token's strips into what this shard of the vocab knows of it, (tokens,) each.

    The argmax is a class, or a NaN's class offset to below 0; the label's logit is 0 where another shard holds it.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = token < num_tokens
    position = tl.load(valid_position + token, mask=in_range, other=-1).to(tl.int64)
    valid = position >= 0
    row_max, row_sum, smooth, argmax = merge_strips(
        position, valid, strip_max, strip_sum, strip_smooth, strip_argmax, num_tokens, strips,
        ARGMAX, SMOOTHING, BLOCK,
    )  # fmt: skip
    first = tl.load(first_class)
    column = tl.load(labels + token, mask=in_range, other=0).to(tl.int64) - first
    here = valid & (column >= 0) & (column < columns)
    tl.store(shard_max + token, row_max, mask=in_range)
    tl.store(shard_sum + token, row_sum, mask=in_range)
    tl.store(shard_target + token, tl.load(target_logit + position, mask=here, other=0.0), mask=in_range)
    if SMOOTHING:
        tl.store(shard_smooth + token, smooth, mask=in_range)
    if ARGMAX:
        tl.store(shard_argmax + token, tl.where(valid, argmax + first, NO_COLUMN), mask=in_range)


@triton.jit
def slab_gradient(
    x, weight, bias, labels, class_weight, class_weight_sum, first_class, valid_tokens, valid_count,
    saved_max, saved_log_sum, token_scale, divisors, grad_loss, slab,
    stride_xn, stride_xh, stride_wv, stride_wh, group_tokens, num_tokens, V, H,
    first_column, slab_columns, slab_stride, logit_scale, softcap, smoothing, lse_square_scale,
    SHARDED: tl.constexpr, MEAN: tl.constexpr, TOKEN_SCALING: tl.constexpr, CLASS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, EVEN_K: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles * vocab tiles of the slab,). ``slab`` (tokens, slab_columns): gradient of the raw logits of the
    valid tokens for the columns from ``first_column``, rounded once, with the upstream gradient already in it. The last
    tile's rows that are no valid token are zero, so that a product over tokens needs no mask.
    """
    count = tl.load(valid_count)
    token_tiles = tl.cdiv(count, M)
    vocab_tiles = tl.cdiv(slab_columns, N)
    index = tl.program_id(0)
    if index >= token_tiles * vocab_tiles:
        return
    tile, vocab_tile = grouped_tile(index, token_tiles, vocab_tiles, GROUP)
    rank = tile * M + tl.arange(0, M)
    inside = rank < count
    token = tl.load(valid_tokens + rank, mask=inside, other=0).to(tl.int64)
    label = tl.load(labels + token, mask=inside, other=-1).to(tl.int64)
    slab_column = vocab_tile * N + tl.arange(0, N)
    column = first_column + slab_column
    in_slab = slab_column < slab_columns
    z = project(
        x, weight, bias, token, column, in_slab, H, stride_xn, stride_xh, stride_wv, stride_wh,
        BIAS, EVEN_K, M, N, K,
    )  # fmt: skip
    z = final_logits(z, in_slab[None, :], logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    row_max = tl.load(saved_max + token, mask=inside, other=0.0)
    log_sum = tl.load(saved_log_sum + token, mask=inside, other=0.0)
    soft, target, uniform = gradient_coefficients(
        token, label, inside, row_max, log_sum,
        grad_loss, group_tokens, divisors, token_scale, class_weight, class_weight_sum,
        V, smoothing, lse_square_scale,
        MEAN, TOKEN_SCALING, CLASS_WEIGHT, SMOOTHING, Z_LOSS,
    )  # fmt: skip
    if SHARDED:  # from here on classes are numbered as this shard's columns
        label -= tl.load(first_class)
        if CLASS_WEIGHT:
            class_weight += tl.load(first_class)
    g = logits_gradient(
        z, column[None, :], in_slab[None, :], label[:, None], row_max[:, None], log_sum[:, None],
        soft[:, None], target[:, None], uniform[:, None],
        class_weight, logit_scale, softcap, CLASS_WEIGHT, SMOOTHING, Z_LOSS, HAS_SCALE, HAS_SOFTCAP,
    )  # fmt: skip
    g = tl.where(inside[:, None], g, 0.0)
    at = rank.to(tl.int64)[:, None] * slab_stride + slab_column[None, :]
    tl.store(slab + at, round_to(g, slab.dtype.element_ty), mask=(rank < num_tokens)[:, None] & in_slab[None, :])
