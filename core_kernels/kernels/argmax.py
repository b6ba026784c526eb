"""The argmax of rows whose exponentials are kept: among the few columns whose rounded exponentials are the largest.

To find a maximum's column as tiles are multiplied takes three instructions an element. The largest of rounded
exponentials takes half of one, and next to no row has more than one or two columns that come near its largest.
"""

import triton
import triton.language as tl

from core_kernels.kernels.logits import NO_COLUMN

# Columns of a row whose logits are multiplied again. Where more come near, as where all logits are 0, the whole row is.
MOST_NEAR = tl.constexpr(16)


@triton.jit
def first_of(found, index, AXIS: tl.constexpr):
    return tl.min(tl.where(found, index, NO_COLUMN), AXIS)


@triton.jit
def multiply_rows(a, b, inside, stride_a, stride_b, H, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The dot product of each row of ``a`` with its row of ``b``, from pointers to them, in float32."""
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        h = (start + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
        mask = inside[:, None] & (h < H)
        left = tl.load(a[:, None] + h * stride_a, mask=mask, other=0.0)
        right = tl.load(b[:, None] + h * stride_b, mask=mask, other=0.0)
        total += left.to(tl.float32) * right.to(tl.float32)
    return tl.sum(total, 1)


@triton.jit
def find_columns(
    x, weight, valid_tokens, valid_count, exponentials, tile_max, row_argmax,
    stride_xn, stride_xh, stride_wv, stride_wh, exponentials_stride,
    columns, H, first_rank, ranks, first_row, vocab_tiles, logit_scale,
    HAS_SCALE: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ranks,). ``row_argmax`` of ``ranks`` valid tokens from the ``first_rank``-th: the column of the
    largest logit, multiplied again where there is a choice, or ``NO_COLUMN`` where too many come near. From
    ``tile_max (vocab tiles, ranks)``, the largest rounded exponential in each tile's N columns, and the exponentials
    from the ``first_row``-th row on.

    Of two logits the larger may have the smaller exponential, but by less than a step of bfloat16.
    """
    rank = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = rank < tl.minimum(tl.load(valid_count) - first_rank, ranks)
    token = tl.load(valid_tokens + first_rank + rank, mask=mine, other=0).to(tl.int64)
    tile = tl.arange(0, TILES)[:, None]
    at = tile.to(tl.int64) * ranks + rank[None, :]
    largest = tl.load(tile_max + at, mask=(tile < vocab_tiles) & mine[None, :], other=0.0).to(tl.float32)
    least = (tl.max(largest, 0).to(tl.int32, bitcast=True) - 0x10000).to(tl.float32, bitcast=True)  # a step less
    is_near = largest >= least[None, :]
    alone = tl.sum(is_near.to(tl.int32), 0) == 1
    near_tile = first_of(is_near, tile, 0)
    near = tl.zeros([ROWS], tl.int32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    argmax = tl.full([ROWS], NO_COLUMN, tl.int32)
    while tl.min(near_tile, 0) != NO_COLUMN:
        column = near_tile[:, None] * N + tl.arange(0, N)[None, :]
        inside = (near_tile != NO_COLUMN)[:, None] & (column < columns)
        row = exponentials + (first_row + rank).to(tl.int64)[:, None] * exponentials_stride
        p = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
        comes_near = inside & (p >= least[:, None])
        alone = alone & (tl.sum(comes_near.to(tl.int32), 1) == 1)
        candidate = first_of(comes_near, column, 1)
        while tl.min(candidate, 0) != NO_COLUMN:
            there = candidate != NO_COLUMN
            z = tl.zeros([ROWS], tl.float32)
            if tl.max((there & ~alone).to(tl.int32), 0) > 0:
                z = multiply_rows(
                    x + token * stride_xn, weight + candidate.to(tl.int64) * stride_wv, there & ~alone,
                    stride_xh, stride_wh, H, ROWS, BLOCK,
                )  # fmt: skip
            if HAS_SCALE:
                z = z * logit_scale
            argmax = tl.where(there & (z > top), candidate, argmax)  # and so the lowest of equal ones
            top = tl.where(there, tl.maximum(top, z), top)
            near += there.to(tl.int32)
            later = comes_near & (column > candidate[:, None]) & (near <= MOST_NEAR)[:, None]
            candidate = first_of(later, column, 1)
        later = is_near & (tile > near_tile[None, :]) & (near <= MOST_NEAR)[None, :]
        near_tile = first_of(later, tile, 0)
    tl.store(row_argmax + first_rank + rank, tl.where(near <= MOST_NEAR, argmax, NO_COLUMN), mask=mine)
