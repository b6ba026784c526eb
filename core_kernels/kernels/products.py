"""The products of the backward pass: a matrix over valid tokens and vocab becomes gradients of the inputs.

The matrix is a slab of logit gradients, or the kept exponentials of logits. All operands are read, and all tiles but
those of float32 sums are stored, through tensor descriptors where strides allow. The programs are as many as run at a
time, and each takes every so-many-th tile. Their loops are not flattened into one, as the projection's are: what is
done with a finished tile here would undo the pipelining. The two products of a slab are independent, so where the GPU
can (``OVERLAP``) the second starts as the first runs out of tiles.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from core_kernels.kernels.logits import multiply_add, round_to
from core_kernels.kernels.projection import grouped_tile
from core_kernels.kernels.stores import (
    NO_SLOT,
    store_rounded,
    store_rounded_strided,
    store_rounded_transposed,
    store_rows,
    store_sums,
)


@triton.jit
def weight_gradient(
    matrix, packed_x, grad_weight, label_rows, label_slot, valid_count, rows_stride,
    first_rank, ranks, first_column, columns, H, programs, stride_gv, stride_gh,
    LABELS: tl.constexpr, LAYOUT: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (programs,). ``matrix.T @ packed_x``, over ``ranks`` valid tokens from the ``first_rank``-th, into the rows
    of ``grad_weight`` from ``first_column``: rounded once, by the ``LAYOUT`` of the weight, or, with ``"sums"``, in
    float32, which may ``ADD`` to what is there.

    ``LABELS``: rows of classes that are some token's label go to ``label_rows (tokens, H)`` in float32 as well, at
    ``label_slot (V,)``. ``matrix`` and ``packed_x`` are descriptors of (K, M) and (K, N) blocks, and ``matrix`` is zero
    from the last valid token to the end of its tile, or NaN where that token's row is.
    """
    if OVERLAP:
        cuda.gdc_launch_dependents()
    count = tl.minimum(tl.load(valid_count) - first_rank, ranks)
    vocab_tiles = tl.cdiv(columns, M)
    if ADD:
        vocab_tiles = tl.where(count > 0, vocab_tiles, 0)
    hidden_tiles = tl.cdiv(H, N)
    for index in tl.range(tl.program_id(0), vocab_tiles * hidden_tiles, programs):
        tile, hidden_tile = grouped_tile(index, vocab_tiles, hidden_tiles, GROUP)
        total = tl.zeros([M, N], tl.float32)
        for start in range(0, count, K):
            a = matrix.load([start, tile * M]).T
            b = packed_x.load([start, hidden_tile * N])
            total = multiply_add(a, b, total)
        if LABELS:
            column = tile * M + tl.arange(0, M)
            slot = tl.load(label_slot + column, mask=column < columns, other=NO_SLOT)
            if tl.min(slot, 0) < NO_SLOT:
                store_rows(label_rows, slot, hidden_tile * N, total, H, rows_stride)
        row = first_column + tile * M
        if LAYOUT == "sums":
            store_sums(grad_weight, row, hidden_tile * N, total, first_column + columns, H, stride_gv, ADD)
        elif LAYOUT == "vh":
            store_rounded(grad_weight, row, hidden_tile * N, total)
        elif LAYOUT == "hv":
            store_rounded_transposed(grad_weight, row, hidden_tile * N, total)
        else:
            end = first_column + columns
            store_rounded_strided(grad_weight, row, hidden_tile * N, total, end, H, stride_gv, stride_gh)


@triton.jit
def split_from(token_tiles, split_tiles):
    """The first token tile whose sums over the vocab are made in parts."""
    return tl.maximum(token_tiles - split_tiles, 0)


@triton.jit
def count_sums(token_tiles, hidden_tiles, split_tiles, splits, SPLIT: tl.constexpr):
    """How many tiles ``input_gradient`` sums, each part of a tile counted."""
    count = token_tiles
    if SPLIT:
        first_split = split_from(token_tiles, split_tiles)
        count = first_split + (token_tiles - first_split) * splits
    return count * hidden_tiles


@triton.jit
def find_sum(
    index, token_tiles, hidden_tiles, columns, split_tiles, splits, first_part,
    SPLIT: tl.constexpr, M: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of the ``index``-th of those: its tile of tokens and of hidden units, the row where its sum goes, and the columns
    that it sums over.
    """
    first_split = token_tiles
    if SPLIT:
        first_split = split_from(token_tiles, split_tiles)
    whole = first_split * hidden_tiles
    split_count = token_tiles - first_split
    split = split_count * hidden_tiles
    is_part = index >= whole
    rank = tl.where(is_part, (index - whole) % tl.maximum(split, 1), index)
    tile, hidden_tile = grouped_tile(rank, tl.where(is_part, split_count, first_split), hidden_tiles, GROUP)
    tile = tl.where(is_part, first_split + tile, tile)
    row = tile * M
    begin = 0
    end = columns
    if SPLIT:
        part = tl.maximum(index - whole, 0) // tl.maximum(split, 1)
        row = tl.where(part > 0, first_part + ((part - 1) * split_tiles + tile - first_split) * M, row)
        per_part = tl.cdiv(tl.cdiv(columns, K), splits) * K
        begin = part * per_part
        end = tl.where(is_part, tl.minimum(begin + per_part, columns), columns)
    return tile, hidden_tile, row, begin, end


@triton.jit(do_not_specialize=["columns"])  # of one column the loop would be none, and take the memory of a fifth stage
def input_gradient(
    matrix, weight, rows, valid_count, first_rank, ranks, first_column, columns, H,
    split_tiles, splits, first_part, programs, rows_end, rows_stride, stride_wv, stride_wh,
    ADD: tl.constexpr, SPLIT: tl.constexpr, LAYOUT: tl.constexpr, OVERLAP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (programs,). ``rows (ranks, H)``: ``matrix @ weight[columns]`` in float32, for ``ranks`` valid tokens from
    the ``first_rank``-th, which may ``ADD`` to what is there.

    With ``SPLIT``, the last ``split_tiles`` token tiles are summed in ``splits`` parts of the columns, to keep all
    programs busy: the first part goes to its tokens' ``rows``, the others to those from the ``first_part``-th.
    ``matrix`` is a descriptor of (M, K) blocks; ``rows`` has ``rows_end`` rows in all.
    """
    count = tl.maximum(tl.minimum(tl.load(valid_count) - first_rank, ranks), 0)
    token_tiles = tl.cdiv(count, M)
    hidden_tiles = tl.cdiv(H, N)
    sums = count_sums(token_tiles, hidden_tiles, split_tiles, splits, SPLIT)
    for index in tl.range(tl.program_id(0), sums, programs):
        tile, hidden_tile, row, begin, end = find_sum(
            index, token_tiles, hidden_tiles, columns, split_tiles, splits, first_part, SPLIT, M, K, GROUP
        )
        total = tl.zeros([M, N], tl.float32)
        for start in range(begin, end, K):
            a = matrix.load([tile * M, start])
            first = first_column + start
            if LAYOUT == "vh":
                b = weight.load([first, hidden_tile * N])
            elif LAYOUT == "hv":
                b = weight.load([hidden_tile * N, first]).T
            else:
                column = first + tl.arange(0, K)
                h = hidden_tile * N + tl.arange(0, N)
                at = column[:, None].to(tl.int64) * stride_wv + h[None, :].to(tl.int64) * stride_wh
                mask = (column < first_column + columns)[:, None] & (h < H)[None, :]
                b = tl.load(weight + at, mask=mask, other=0.0)
            total = multiply_add(a, b, total)
        store_sums(rows, row, hidden_tile * N, total, rows_end, H, rows_stride, ADD)
    if OVERLAP:  # the last program to start: this launch shall not end before the one that it overlaps
        if tl.program_id(0) == tl.num_programs(0) - 1:
            cuda.gdc_wait()


@triton.jit
def bias_gradient(
    slab, grad_bias, valid_count, first_column, slab_columns, slab_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Grid (blocks of slab columns,). ``grad_bias[columns]``: column sums of the slab, in float32, in order."""
    count = tl.load(valid_count)
    slab_column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_slab = slab_column < slab_columns
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, count, ROWS):
        rank = start + tl.arange(0, ROWS)
        at = rank.to(tl.int64)[:, None] * slab_stride + slab_column[None, :]
        g = tl.load(slab + at, mask=(rank < count)[:, None] & in_slab[None, :], other=0.0)
        total += tl.sum(g.to(tl.float32), 0)
    tl.store(grad_bias + first_column + slab_column, round_to(total, grad_bias.dtype.element_ty), mask=in_slab)
