"""From statistics of parts of a row of logits (vocab tiles, strips or shards) to the token's loss and metrics."""

import triton
import triton.language as tl

from core_kernels.kernels.logits import NO_COLUMN, finite_or_zero, is_valid, merge_argmax
from core_kernels.kernels.tokens import store_token


@triton.jit
def merge_parts(
    position, valid, base, part_max, part_sum, part_smooth, part_argmax, stride, parts,
    RELATIVE: tl.constexpr, ARGMAX: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Statistics of the tokens at ``position`` over all parts, which are ``stride`` apart, in a fixed order.

    Sums are relative to their part's maximum, or ``RELATIVE`` to a ``base`` that all of a token's parts share. A NaN's
    column is offset to below 0, so that it wins over the column of the maximum, and the lowest column over others.
    """
    tops = tl.full([PARTS, BLOCK], float("-inf"), tl.float32)  # of every PARTS-th part; merged after the loop
    sums = tl.zeros([PARTS, BLOCK], tl.float32)
    smooth = tl.zeros([PARTS, BLOCK], tl.float32)
    columns = tl.full([PARTS, BLOCK], NO_COLUMN, tl.int32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        at = part.to(tl.int64)[:, None] * stride + position[None, :]
        mask = (part < parts)[:, None] & valid[None, :]
        total = tl.load(part_sum + at, mask=mask, other=0.0)
        if ARGMAX or not RELATIVE:
            top = tl.load(part_max + at, mask=mask, other=float("-inf"))
            larger = tl.maximum(tops, top)
            if not RELATIVE:
                total = total * tl.exp(top - finite_or_zero(larger))
                sums = sums * tl.exp(tops - finite_or_zero(larger))
            if ARGMAX:
                column = tl.load(part_argmax + at, mask=mask, other=NO_COLUMN)
                columns = merge_argmax(tops, columns, top, column)
            tops = larger
        sums += total
        if SMOOTHING:
            smooth += tl.load(part_smooth + at, mask=mask, other=0.0)
    row_max = tl.max(tops, 0)
    if not RELATIVE:
        base = row_max
        sums = sums * tl.exp(tops - finite_or_zero(base)[None, :])
    wins = (columns < 0) | (tops == row_max[None, :])
    return base, tl.sum(sums, 0), tl.sum(smooth, 0), tl.min(tl.where(wins, columns, NO_COLUMN), 0)


@triton.jit
def finish_tokens(
    labels, valid_tokens, valid_count, label_logit, part_max, part_sum, part_smooth, part_argmax, row_argmax,
    class_weight, class_weight_sum,
    loss, z_loss, correct, num_valid, num_correct, predicted, saved_base, saved_log_sum, token_scale,
    V, first_rank, ranks, stride, parts, ignore_index, smoothing, lse_square_scale,
    SHARDS: tl.constexpr, RELATIVE: tl.constexpr, PER_TOKEN: tl.constexpr, Z_OUTPUT: tl.constexpr,
    ACCURACY: tl.constexpr, COUNTS: tl.constexpr, PREDICTED: tl.constexpr, TOKEN_SCALING: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ranks,). Merge the parts of ``ranks`` tokens from the ``first_rank``-th, and store each one's
    loss, metrics and statistics.

    Parts are the vocab's tiles, by rank; sums ``RELATIVE`` to the label's logit, or not. With ``SHARDS`` they are the
    vocab's shards, a token at its own place; one of them has its label's logit, the others 0. The argmax is
    the parts', unless it is known by rank, as ``row_argmax``.
    """
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = rank < ranks
    position = rank.to(tl.int64)
    if SHARDS:
        token = rank
        label = tl.load(labels + token, mask=mine, other=0)
        valid = mine & is_valid(label, ignore_index, V)
        target = tl.zeros([BLOCK], tl.float32)
        for shard in range(parts):
            target += tl.load(label_logit + shard * tl.cast(stride, tl.int64) + position, mask=valid, other=0.0)
    else:
        token = tl.load(valid_tokens + first_rank + rank, mask=mine, other=0)
        label = tl.load(labels + token, mask=mine, other=0)
        valid = mine & (first_rank + rank < tl.load(valid_count))
        target = tl.load(label_logit + token, mask=valid, other=0.0)
    base, row_sum, smooth, argmax = merge_parts(
        position, valid, target, part_max, part_sum, part_smooth, part_argmax, stride, parts,
        RELATIVE, part_argmax is not None, SMOOTHING, BLOCK, PARTS,
    )  # fmt: skip
    if row_argmax is not None:
        argmax = tl.load(row_argmax + first_rank + rank, mask=valid, other=NO_COLUMN)
    store_token(
        token, mine, label, base, tl.log(row_sum), target, 0.0, smooth, argmax,
        class_weight, class_weight_sum,
        loss, z_loss, correct, num_valid, num_correct, predicted, saved_base, saved_log_sum, token_scale,
        V, ignore_index, smoothing, lse_square_scale,
        PER_TOKEN, Z_OUTPUT, ACCURACY, COUNTS, PREDICTED, TOKEN_SCALING, CLASS_WEIGHT, SMOOTHING,
    )  # fmt: skip


@triton.jit
def finish_shard(
    labels, first_class, valid_position, label_logit, strip_max, strip_sum, strip_smooth, strip_argmax,
    shard_max, shard_sum, shard_target, shard_smooth, shard_argmax, num_tokens, columns, strips,
    ARGMAX: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens,). Merge a token's strips into what this shard of the vocab knows of it, (tokens,) each.

    The argmax is a class, or a NaN's class offset to below 0; the label's logit is 0 where another shard holds it.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = token < num_tokens
    position = tl.load(valid_position + token, mask=in_range, other=-1).to(tl.int64)
    valid = position >= 0
    row_max, row_sum, smooth, argmax = merge_parts(
        position, valid, 0.0, strip_max, strip_sum, strip_smooth, strip_argmax, num_tokens, strips,
        False, ARGMAX, SMOOTHING, BLOCK, PARTS,
    )  # fmt: skip
    first = tl.load(first_class)
    column = tl.load(labels + token, mask=in_range, other=0).to(tl.int64) - first
    here = valid & (column >= 0) & (column < columns)
    tl.store(shard_max + token, row_max, mask=in_range)
    tl.store(shard_sum + token, row_sum, mask=in_range)
    tl.store(shard_target + token, tl.load(label_logit + token, mask=here, other=0.0), mask=in_range)
    if SMOOTHING:
        tl.store(shard_smooth + token, smooth, mask=in_range)
    if ARGMAX:
        tl.store(shard_argmax + token, tl.where(valid, argmax + first, NO_COLUMN), mask=in_range)
