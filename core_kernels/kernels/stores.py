"""How a product's tile leaves: through a tensor descriptor, in slices of its columns. Device functions, no kernels.

A tile that leaves whole would take the shared memory of a pipeline stage.
"""

import triton
import triton.language as tl

from core_kernels.kernels.logits import round_to

NO_SLOT = tl.constexpr(2147483647)


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def store_rounded(matrix, row, column, tile):
    """Store a float32 tile, rounded, through a descriptor of half of its columns."""
    left, right = halves(tile)
    matrix.store([row, column], round_to(left, matrix.dtype))
    matrix.store([row, column + tile.shape[1] // 2], round_to(right, matrix.dtype))


@triton.jit
def store_rounded_transposed(matrix, row, column, tile):
    """The same into the transposed matrix."""
    left, right = halves(tile)
    matrix.store([column, row], round_to(left, matrix.dtype).T)
    matrix.store([column + tile.shape[1] // 2, row], round_to(right, matrix.dtype).T)


@triton.jit
def store_rounded_strided(matrix, row, column, tile, rows, columns, stride_row, stride_column):
    """The same by pointers, where strides allow no descriptor."""
    left, right = halves(tile)
    half: tl.constexpr = tile.shape[1] // 2
    i = row + tl.arange(0, tile.shape[0])
    j = column + tl.arange(0, half)
    at = i[:, None].to(tl.int64) * stride_row + j[None, :].to(tl.int64) * stride_column
    dtype: tl.constexpr = matrix.dtype.element_ty
    tl.store(matrix + at, round_to(left, dtype), mask=(i < rows)[:, None] & (j < columns)[None, :])
    at += tl.cast(stride_column, tl.int64) * half
    tl.store(matrix + at, round_to(right, dtype), mask=(i < rows)[:, None] & (j + half < columns)[None, :])


@triton.jit
def store_half_sums(sums, row, column, tile, rows, columns, stride, ADD: tl.constexpr):
    i = row + tl.arange(0, tile.shape[0])
    j = column + tl.arange(0, tile.shape[1])
    at = sums + i[:, None].to(tl.int64) * stride + j[None, :]
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    if ADD:
        tile += tl.load(at, mask=mask, other=0.0)
    tl.store(at, tile, mask=mask)


@triton.jit
def store_sums(sums, row, column, tile, rows, columns, stride, ADD: tl.constexpr):
    """Store a float32 tile into a row-major matrix, added to what is there if ``ADD``.

    By pointers: a sum that comes through a descriptor is waited for before anything else is done.
    """
    left, right = halves(tile)
    store_half_sums(sums, row, column, left, rows, columns, stride, ADD)
    store_half_sums(sums, row, column + tile.shape[1] // 2, right, rows, columns, stride, ADD)


@triton.jit
def store_half_rows(rows, slot, column, tile, columns, stride):
    """In halves again: these addresses are many, one a row."""
    left, right = halves(tile)
    half: tl.constexpr = tile.shape[1] // 2
    j = column + tl.arange(0, half)
    at = slot[:, None].to(tl.int64) * stride + j[None, :]
    tl.store(rows + at, left, mask=(slot < NO_SLOT)[:, None] & (j < columns)[None, :])
    tl.store(rows + at + half, right, mask=(slot < NO_SLOT)[:, None] & (j + half < columns)[None, :])


@triton.jit
def store_rows(rows, slot, column, tile, columns, stride):
    """Store each row of a float32 tile at its ``slot``, if it has one."""
    left, right = halves(tile)
    store_half_rows(rows, slot, column, left, columns, stride)
    store_half_rows(rows, slot, column + tile.shape[1] // 2, right, columns, stride)
