"""Fused projection and cross entropy, forward: logits live in registers, a tile at a time, and are never stored.

``project_statistics`` is the pass that everybody pays for: no branch in it, since one would undo the pipelining of its
flattened loop. What it does not get right, rows with NaN and rows whose exponentials overflow, ``repair_tokens`` does
again with care. A shard of the vocab is walked with care from the start.
"""

import triton
import triton.language as tl

from core_kernels.kernels.logits import (
    FAR,
    NO_COLUMN,
    exp,
    final_logits,
    finite_or_zero,
    merge_argmax,
    round_to,
    tile_statistics,
)
from core_kernels.kernels.projection import grouped_tile, project
from core_kernels.kernels.stores import store_rounded
from core_kernels.kernels.tokens import store_metrics, store_token

# Exponentials relative to the label's logit are kept up to e^40: in bfloat16 no product of theirs leaves its range.
MOST_NATS = tl.constexpr(40.0)


@triton.jit
def project_statistics(
    x, weight, bias, class_weight, valid_tokens, valid_count, label_logit, exponentials,
    tile_max, tile_sum, tile_smooth, tile_argmax, columns, H, first_rank, ranks, first_row, programs,
    stride_xn, stride_xh, stride_wv, stride_wh, logit_scale, softcap,
    KEEP: tl.constexpr, ARGMAX: tl.constexpr, LARGEST: tl.constexpr, CLASS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr, BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr, LAYOUT: tl.constexpr, EVEN_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (programs,), each of which takes every ``programs``-th tile. Statistics (vocab tiles, ranks) of each tile's
    rows, for ``ranks`` valid tokens from the ``first_rank``-th: the maximum and its column, the sum of exponentials
    relative to it, ``sum_v w_v z_v``.

    With ``KEEP`` the exponentials are relative to the label's logit, and are stored, rounded, through a descriptor of
    (M, N / 2) blocks of ``exponentials``, from the ``first_row``-th on; with a softcap they are times its slope. Rows
    to the end of the last tile are zero, or NaN where the last valid token's are. Rows of ``x`` that are ``PACKED``
    begin at ``first_row`` too. ``LARGEST``: instead of a maximum and its column, the largest of rounded exponentials.
    """
    count = tl.minimum(tl.load(valid_count) - first_rank, ranks)
    token_tiles = tl.cdiv(count, M)
    vocab_tiles = tl.cdiv(columns, N)
    for index in tl.range(tl.program_id(0), token_tiles * vocab_tiles, programs, flatten=True):
        tile, vocab_tile = grouped_tile(index, token_tiles, vocab_tiles, GROUP)
        rank = tile * M + tl.arange(0, M)
        inside = rank < count
        token = tl.load(valid_tokens + first_rank + rank, mask=inside, other=0).to(tl.int64)
        z = project(
            x, weight, bias, first_row + tile * M, token, inside, vocab_tile * N, columns, H,
            stride_xn, stride_xh, stride_wv, stride_wh, BIAS, PACKED, LAYOUT, EVEN_K, M, N, K,
        )  # fmt: skip
        column = vocab_tile * N + tl.arange(0, N)
        in_vocab = column < columns
        z = final_logits(z, in_vocab[None, :], logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        at = vocab_tile.to(tl.int64) * ranks + rank
        base = tl.full([M], float("inf"), tl.float32)
        if KEEP:
            base = tl.load(label_logit + token, mask=inside, other=float("inf"))
        if ARGMAX or not KEEP:
            top = tl.max(z, 1)
            tl.store(tile_max + at, top, mask=inside)
            if not KEEP:
                base = finite_or_zero(top)
        if ARGMAX:
            tl.store(tile_argmax + at, column_of(z, top, column), mask=inside)
        p = exp(z - base[:, None])
        tl.store(tile_sum + at, tl.sum(p, 1), mask=inside)
        if SMOOTHING:
            store_smooth(z, at, inside, column, in_vocab, class_weight, tile_smooth, CLASS_WEIGHT)
        if KEEP:
            kept = scaled_by_slope(p, z, softcap, HAS_SOFTCAP)
            if LARGEST:
                largest = tl.max(round_to(kept, exponentials.dtype).to(tl.float32), 1)
                tl.store(tile_max + at, largest, mask=inside)
            store_rounded(exponentials, first_row + tile * M, vocab_tile * N, kept)


@triton.jit
def column_of(z, top, column):
    """The first column of each row where it has its maximum."""
    return tl.min(tl.where(z == top[:, None], column[None, :], NO_COLUMN), 1)


@triton.jit
def store_smooth(z, at, inside, column, in_vocab, class_weight, tile_smooth, CLASS_WEIGHT: tl.constexpr):
    w = tl.where(in_vocab, 1.0, 0.0)
    if CLASS_WEIGHT:
        w = tl.load(class_weight + column, mask=in_vocab, other=0.0).to(tl.float32)
    smooth = tl.sum(tl.where(in_vocab[None, :], w[None, :] * z, 0.0), 1)
    tl.store(tile_smooth + at, smooth, mask=inside)


@triton.jit
def scaled_by_slope(p, z, softcap, HAS_SOFTCAP: tl.constexpr):
    """``p`` times the derivative of the cap; 0 where the column is past the vocab."""
    if HAS_SOFTCAP:
        capped = z / softcap
        p = tl.where(p == 0.0, 0.0, p * (1.0 - capped * capped))
    return p


@triton.jit
def walk_strip(
    x, weight, bias, class_weight, token, inside, label, first_tile, end_tile, columns, H,
    stride_xn, stride_xh, stride_wv, stride_wh, logit_scale, softcap,
    ARGMAX: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
    BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LAYOUT: tl.constexpr,
    EVEN_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Statistics of M tokens over a strip of vocab tiles, minding NaN: the maximum and the sum of exponentials
    relative to it, its column, ``sum_v w_v z_v``, and the label's logit if it lies in the strip.
    """
    row_max = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    target = tl.zeros([M], tl.float32)
    smooth = tl.zeros([M], tl.float32)
    argmax = tl.full([M], NO_COLUMN, tl.int32)
    for vocab_tile in range(first_tile, end_tile):
        column = vocab_tile * N + tl.arange(0, N)
        in_vocab = column < columns
        z = project(
            x, weight, bias, 0, token, inside, vocab_tile * N, columns, H, stride_xn, stride_xh, stride_wv, stride_wh,
            BIAS, False, LAYOUT, EVEN_K, M, N, K,
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
    return row_max, row_sum, target, smooth, argmax


@triton.jit
def shard_statistics(
    x, weight, bias, labels, class_weight, first_class, valid_tokens, valid_count,
    label_logit, strip_max, strip_sum, strip_smooth, strip_argmax,
    stride_xn, stride_xh, stride_wv, stride_wh, num_tokens, columns, H, strips, logit_scale, softcap,
    ARGMAX: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
    BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LAYOUT: tl.constexpr,
    EVEN_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles * strips,). Statistics (strips, tokens) of the r-th valid token over one strip of a shard of
    the vocab; the label's logit (tokens,) is stored by the strip that holds it.
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
    first = tl.load(first_class)  # from here on classes are numbered as this shard's columns
    label = tl.load(labels + token, mask=inside, other=-1).to(tl.int64) - first
    if CLASS_WEIGHT:
        class_weight += first
    per_strip = tl.cdiv(tl.cdiv(columns, N), strips)
    first_tile = strip * per_strip
    end_tile = tl.minimum(first_tile + per_strip, tl.cdiv(columns, N))
    row_max, row_sum, target, smooth, argmax = walk_strip(
        x, weight, bias, class_weight, token, inside, label, first_tile, end_tile, columns, H,
        stride_xn, stride_xh, stride_wv, stride_wh, logit_scale, softcap,
        ARGMAX, CLASS_WEIGHT, SMOOTHING, BIAS, HAS_SCALE, HAS_SOFTCAP, LAYOUT, EVEN_K, M, N, K,
    )  # fmt: skip
    at = strip * num_tokens + rank
    tl.store(strip_max + at, row_max, mask=inside)
    tl.store(strip_sum + at, row_sum, mask=inside)
    if SMOOTHING:
        tl.store(strip_smooth + at, smooth, mask=inside)
    if ARGMAX:
        tl.store(strip_argmax + at, argmax, mask=inside)
    in_strip = (label >= first_tile * N) & (label < end_tile * N)
    tl.store(label_logit + token, target, mask=inside & in_strip)


@triton.jit
def repair_tokens(
    x, weight, bias, labels, class_weight, class_weight_sum, valid_tokens, valid_count,
    loss, z_loss, correct, num_valid, num_correct, predicted, saved_base, saved_log_sum, token_scale, exponentials,
    row_argmax,
    stride_xn, stride_xh, stride_wv, stride_wh, exponentials_stride,
    first_rank, ranks, V, H, ignore_index, logit_scale, softcap, smoothing, lse_square_scale,
    KEEP: tl.constexpr, PER_TOKEN: tl.constexpr, Z_OUTPUT: tl.constexpr, ACCURACY: tl.constexpr,
    COUNTS: tl.constexpr, PREDICTED: tl.constexpr, TOKEN_SCALING: tl.constexpr, CLASS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr, BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    LAYOUT: tl.constexpr, EVEN_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of ranks,). Of ``ranks`` valid tokens from the ``first_rank``-th, those whose sum is NaN, or too
    large to keep its terms, or whose kept terms are relative to a ``FAR`` logit, again: relative to the maximum; and
    the metrics of those whose ``row_argmax``, if there is one, was not found.

    There are next to none, so most programs end at once. Where there are many, this is slow: a program walks the vocab.
    """
    rank = tl.program_id(0) * M + tl.arange(0, M)
    inside = rank < tl.minimum(tl.load(valid_count) - first_rank, ranks)
    token = tl.load(valid_tokens + first_rank + rank, mask=inside, other=0).to(tl.int64)
    log_sum = tl.load(saved_log_sum + token, mask=inside, other=0.0)
    again = log_sum != log_sum
    if KEEP:
        base = tl.load(saved_base + token, mask=inside, other=0.0)
        again = again | (log_sum > MOST_NATS) | (tl.abs(base) > FAR)
    walked = again
    if row_argmax is not None:
        found = tl.load(row_argmax + first_rank + rank, mask=inside, other=0)
        walked = again | (found == NO_COLUMN)
    if tl.max(walked.to(tl.int32), 0) == 0:
        return
    label = tl.load(labels + token, mask=walked, other=-1).to(tl.int64)
    ARGMAX: tl.constexpr = ACCURACY or COUNTS or PREDICTED
    vocab_tiles = tl.cdiv(V, N)
    row_max, row_sum, target, smooth, argmax = walk_strip(
        x, weight, bias, class_weight, token, walked, label, 0, vocab_tiles, V, H,
        stride_xn, stride_xh, stride_wv, stride_wh, logit_scale, softcap,
        ARGMAX, CLASS_WEIGHT, SMOOTHING, BIAS, HAS_SCALE, HAS_SOFTCAP, LAYOUT, EVEN_K, M, N, K,
    )  # fmt: skip
    store_token(
        token, again, label, row_max, tl.log(row_sum), target, 0.0, smooth, argmax,
        class_weight, class_weight_sum,
        loss, z_loss, correct, num_valid, num_correct, predicted, saved_base, saved_log_sum, token_scale,
        V, ignore_index, smoothing, lse_square_scale,
        PER_TOKEN, Z_OUTPUT, ACCURACY, COUNTS, PREDICTED, TOKEN_SCALING, CLASS_WEIGHT, SMOOTHING,
    )  # fmt: skip
    if row_argmax is not None:
        store_metrics(
            token, walked & ~again, label, walked, argmax, correct, num_valid, num_correct, predicted,
            PER_TOKEN, ACCURACY, COUNTS, PREDICTED,
        )  # fmt: skip
    if KEEP:
        if tl.max(again.to(tl.int32), 0) == 0:
            return
        base = finite_or_zero(row_max)
        for vocab_tile in range(0, vocab_tiles):
            column = vocab_tile * N + tl.arange(0, N)
            in_vocab = column < V
            z = project(
                x, weight, bias, 0, token, again, vocab_tile * N, V, H, stride_xn, stride_xh, stride_wv, stride_wh,
                BIAS, False, LAYOUT, EVEN_K, M, N, K,
            )  # fmt: skip
            z = final_logits(z, in_vocab[None, :], logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
            kept = scaled_by_slope(exp(z - base[:, None]), z, softcap, HAS_SOFTCAP)
            at = rank.to(tl.int64)[:, None] * exponentials_stride + column[None, :]
            kept = round_to(kept, exponentials.dtype.element_ty)
            tl.store(exponentials + at, kept, mask=again[:, None] & in_vocab[None, :])
