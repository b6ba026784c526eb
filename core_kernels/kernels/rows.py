"""Rows of ``x``, of its gradient and of labels' classes: on their way into the backward products, and out of them.

The gradient of the logits is softmax minus one-hot. Kept exponentials give the first half by products of rounded
operands; the other half is added here, in float32 and before anything is rounded, so that it cancels what it should.

A *rank* is the place of a valid token among them: ``valid_tokens`` by rank, then those that are not valid.
"""

import triton
import triton.language as tl

from core_kernels.kernels.logits import exp, gradient_coefficients, round_to
from core_kernels.kernels.products import split_from
from core_kernels.kernels.stores import NO_SLOT

NO_LABEL = tl.constexpr(2147483646)  # after all labels


@triton.jit
def gather_rows(
    x, valid_tokens, valid_count, row_soft, packed_x, cleared, stride_xn, stride_xh, packed_stride, cleared_stride,
    first_rank, H, columns,
    SCALED: tl.constexpr, CLEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (ranks, blocks of H). ``packed_x (ranks, H)``: rows of ``x`` of the valid tokens from the ``first_rank``-th,
    times ``row_soft`` if ``SCALED``; the last of them where there is none.

    Such a row's logits are then some token's own: of zeros they would be NaN where the weight is infinite. With
    ``CLEAR`` that row of ``cleared (ranks, columns)`` becomes zero: nothing stray is saved.
    """
    count = tl.load(valid_count)
    rank = tl.minimum(first_rank + tl.program_id(0), count - 1)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = rank >= 0
    token = tl.load(valid_tokens + rank, mask=valid, other=0).to(tl.int64)
    row = tl.load(x + token * stride_xn + h.to(tl.int64) * stride_xh, mask=h < tl.where(valid, H, 0), other=0.0)
    if SCALED:
        soft = tl.load(row_soft + token, mask=valid, other=0.0)
        row = round_to(row.to(tl.float32) * soft, packed_x.dtype.element_ty)
    row_of_packed = tl.program_id(0).to(tl.int64)
    tl.store(packed_x + row_of_packed * packed_stride + h, row, mask=h < H)
    if CLEAR:
        if first_rank + tl.program_id(0) >= count:
            zero = tl.zeros([BLOCK], tl.float32).to(cleared.dtype.element_ty)
            for start in range(tl.program_id(1) * BLOCK, columns, tl.num_programs(1) * BLOCK):
                column = start + tl.arange(0, BLOCK)
                tl.store(cleared + row_of_packed * cleared_stride + column, zero, mask=column < columns)


@triton.jit
def row_factors(
    labels, valid_tokens, valid_count, row_target, row_soft, row_uniform, label_kept, label_slot, label_logit,
    exponentials, lse_base, saved_log_sum, token_scale, divisors, class_weight, class_weight_sum, grad_loss,
    first_rank, ranks, group_tokens, V, columns, logit_scale, softcap, smoothing, lse_square_scale,
    SLOTS: tl.constexpr, KEPT: tl.constexpr, MEAN: tl.constexpr, TOKEN_SCALING: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ranks,). Factors of the logit gradients (tokens,) of ``ranks`` valid tokens from the
    ``first_rank``-th; ``grad_loss``, the upstream gradient, is ``None`` for 1.

    Without ``KEPT`` exponentials they are those of ``gradient_coefficients``. With them, a row's gradient is
    ``row_soft`` times what was kept, minus ``row_target`` at its label: with ``a`` and ``b`` the factors in
    ``dL/dz_v = a softmax(z)_v - b [v == label]``, ``row_soft = a exp(-log_sum)``, ``label_kept`` is what rounding made
    of the label's own exponential, and ``row_target`` makes up for it. They have the derivatives of scale and cap.

    All of ``label_slot (columns,)`` is ``NO_SLOT`` (``SLOTS`` entries at a time; 0 for none).
    """
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = (rank < ranks) & (first_rank + rank < tl.load(valid_count))
    token = tl.load(valid_tokens + first_rank + rank, mask=valid, other=0)
    label = tl.load(labels + token, mask=valid, other=0)
    base = tl.load(lse_base + token, mask=valid, other=0.0)
    log_sum = tl.load(saved_log_sum + token, mask=valid, other=0.0)
    soft, target, uniform = gradient_coefficients(
        token, label, valid, base, log_sum,
        grad_loss, group_tokens, divisors, token_scale, class_weight, class_weight_sum,
        V, smoothing, lse_square_scale, MEAN, TOKEN_SCALING, CLASS_WEIGHT, SMOOTHING, Z_LOSS,
    )  # fmt: skip
    if KEPT:
        own = tl.load(label_logit + token, mask=valid, other=0.0)
        soft = (target + soft) * exp(-log_sum)
        kept = exp(own - base)
        if HAS_SOFTCAP:
            capped = own / softcap
            slope = 1.0 - capped * capped
            target = target * slope
            kept = kept * slope
        if HAS_SCALE:
            soft = soft * logit_scale
            target = target * logit_scale
        rounded = round_to(kept, exponentials.dtype.element_ty).to(tl.float32)
        target -= soft * (kept - rounded)
        tl.store(label_kept + token, rounded, mask=valid)
    tl.store(row_target + token, target, mask=valid)
    if KEPT or SMOOTHING or Z_LOSS:
        tl.store(row_soft + token, soft, mask=valid)
    if SMOOTHING:
        tl.store(row_uniform + token, uniform, mask=valid)
    if SLOTS > 0:
        slots = tl.cdiv(columns, tl.num_programs(0))
        for start in range(0, slots, SLOTS):
            slot = start + tl.arange(0, SLOTS)
            at = tl.program_id(0) * slots + slot
            tl.store(label_slot + at, tl.full([SLOTS], NO_SLOT, tl.int32), mask=(slot < slots) & (at < columns))


@triton.jit
def load_labels(labels, valid_tokens, first_rank, rank, count):
    """Labels of valid tokens, as int32; ``NO_LABEL`` from the ``count``-th on."""
    token = tl.load(valid_tokens + first_rank + rank, mask=rank < count, other=0)
    return tl.load(labels + token, mask=rank < count, other=NO_LABEL).to(tl.int32)


@triton.jit
def sort_labels(
    labels, valid_tokens, valid_count, sorted_labels, sorted_tokens, label_slot, first_rank, ranks,
    BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ranks,). ``ranks`` valid tokens from the ``first_rank``-th, in the order of their labels, then of
    themselves; ``NO_LABEL`` after. ``label_slot``: where the first token of each label comes.

    Each token counts what comes before it. That is quadratic, has no order of arrival in it, and of as many tokens as
    plans allow takes far less than a product: one comparison a pair, but for the pairs near the diagonal.
    """
    count = tl.minimum(tl.load(valid_count) - first_rank, ranks)
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = load_labels(labels, valid_tokens, first_rank, rank, count)
    before = tl.zeros([BLOCK], tl.int32)
    near = tl.program_id(0) * BLOCK // OTHERS * OTHERS
    for start in range(0, near, OTHERS):
        label = load_labels(labels, valid_tokens, first_rank, start + tl.arange(0, OTHERS), count)
        before += tl.sum((label[None, :] < (own + 1)[:, None]).to(tl.int32), 1)
    other = near + tl.arange(0, OTHERS)
    label = load_labels(labels, valid_tokens, first_rank, other, count)
    bound = tl.where(other[None, :] < rank[:, None], (own + 1)[:, None], own[:, None])
    before += tl.sum((label[None, :] < bound).to(tl.int32), 1)
    for start in range(near + OTHERS, count, OTHERS):
        label = load_labels(labels, valid_tokens, first_rank, start + tl.arange(0, OTHERS), count)
        before += tl.sum((label[None, :] < own[:, None]).to(tl.int32), 1)
    token = tl.load(valid_tokens + first_rank + rank, mask=rank < count, other=0)
    tl.store(sorted_labels + before, own, mask=rank < ranks)
    tl.store(sorted_tokens + before, token, mask=rank < ranks)
    tl.atomic_min(label_slot + tl.where(rank < count, own, 0), before, mask=rank < count, sem="relaxed")


@triton.jit
def part_of_label(x, token, mine, row_target, row_soft, label_kept, stride_xn, stride_xh, h, H):
    """What ``finish_label_rows`` subtracts for the tokens that are ``mine``."""
    target = tl.load(row_target + token, mask=mine, other=0.0)
    soft = tl.load(row_soft + token, mask=mine, other=0.0)
    kept = tl.load(label_kept + token, mask=mine, other=0.0)
    at_x = token.to(tl.int64)[:, None] * stride_xn + h[None, :].to(tl.int64) * stride_xh
    row = tl.load(x + at_x, mask=mine[:, None] & (h < H)[None, :], other=0.0).to(tl.float32)
    packed = round_to(row * soft[:, None], x.dtype.element_ty).to(tl.float32)
    return tl.sum(row * (target - soft * kept)[:, None] + packed * kept[:, None], 0)


@triton.jit
def finish_label_rows(
    x, sorted_labels, sorted_tokens, row_target, row_soft, label_kept, label_rows, out,
    stride_xn, stride_xh, rows_stride, stride_v, stride_h, ranks, H,
    BY_SLOT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (ranks, blocks of H). Rows of ``out (V, H)``, gradients or sums of them, for classes that are a token's
    label: the sum in ``label_rows``, at the label's slot (``BY_SLOT``) or at the label itself, from which the part of
    each token with that label is subtracted, in order.

    That is its ``row_target x``, less what rounding took from its packed row, as its own exponential multiplied it.
    Most labels are of one token: the others' come ``ROWS`` at a time.
    """
    first = tl.program_id(0)
    label = tl.load(sorted_labels + first)
    before = tl.load(sorted_labels + first - 1, mask=first > 0, other=-1)
    after = tl.load(sorted_labels + first + 1, mask=first + 1 < ranks, other=-1)
    token = tl.load(sorted_tokens + first + tl.arange(0, 1))
    if (label == NO_LABEL) | (label == before):
        return
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = first if BY_SLOT else label
    total = tl.load(label_rows + at.to(tl.int64) * rows_stride + h, mask=h < H, other=0.0)
    total -= part_of_label(x, token, token >= 0, row_target, row_soft, label_kept, stride_xn, stride_xh, h, H)
    start = first + 1
    more = label == after
    while more:
        rank = start + tl.arange(0, ROWS)
        same = tl.load(sorted_labels + rank, mask=rank < ranks, other=-1) == label
        tokens = tl.load(sorted_tokens + rank, mask=same, other=0)
        total -= part_of_label(x, tokens, same, row_target, row_soft, label_kept, stride_xn, stride_xh, h, H)
        start += ROWS
        more = tl.min(same.to(tl.int32), 0) == 1
    at_out = label.to(tl.int64) * stride_v + h.to(tl.int64) * stride_h
    tl.store(out + at_out, round_to(total, out.dtype.element_ty), mask=h < H)


@triton.jit
def finish_rows(
    rows, weight, labels, valid_tokens, valid_count, row_target, row_soft, out,
    rows_stride, stride_wv, stride_wh, first_rank, split_tiles, splits, first_part, H,
    SPLIT: tl.constexpr, KEPT: tl.constexpr, BY_TOKEN: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (ranks, blocks of H). ``out``, the gradient of a row of ``x`` or a sum of it: the sum in ``rows``, and, if
    its tile is ``SPLIT``, those from the ``first_part``-th; 0 for a token that is not valid.

    Of ``KEPT`` exponentials the sum is times ``row_soft``, and the label's part, ``row_target`` times its row of the
    weight, is subtracted exactly. Rows are those of ranks from ``first_rank``; ``out`` is by rank too, or ``BY_TOKEN``.
    """
    rank = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(valid_count)
    valid = first_rank + rank < count
    token = tl.load(valid_tokens + first_rank + rank).to(tl.int64)
    mask = h < tl.where(valid, H, 0)
    total = tl.load(rows + rank * rows_stride + h, mask=mask, other=0.0)
    if SPLIT:
        first_split = split_from(tl.cdiv(count, M), split_tiles) * M
        if valid & (rank >= first_split):
            for part in range(0, splits - 1):
                at = first_part + part * tl.cast(split_tiles, tl.int64) * M + rank - first_split
                total += tl.load(rows + at * rows_stride + h, mask=mask, other=0.0)
    if KEPT:
        label = tl.load(labels + token, mask=valid, other=0).to(tl.int64)
        own = tl.load(weight + label * stride_wv + h.to(tl.int64) * stride_wh, mask=mask, other=0.0).to(tl.float32)
        soft = tl.load(row_soft + token, mask=valid, other=0.0)
        total = total * soft - own * tl.load(row_target + token, mask=valid, other=0.0)
    at_out = token if BY_TOKEN else rank
    tl.store(out + at_out * (H if BY_TOKEN else rows_stride) + h, round_to(total, out.dtype.element_ty), mask=h < H)


@triton.jit
def scale_rows(
    sums, valid_position, grad_loss, out, sums_stride, stride_row, stride_h, H,
    BY_RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, blocks of H). ``out``: a row of ``sums`` times the upstream gradient, rounded once; ``BY_RANK``, that
    of a token's rank, or 0 where it has none.
    """
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row
    if BY_RANK:
        at = tl.load(valid_position + row).to(tl.int64)
    total = tl.load(sums + at * sums_stride + h, mask=h < tl.where(at >= 0, H, 0), other=0.0) * tl.load(grad_loss)
    total = tl.where(at >= 0, total, 0.0)
    at_out = row * stride_row + h.to(tl.int64) * stride_h
    tl.store(out + at_out, round_to(total, out.dtype.element_ty), mask=h < H)
