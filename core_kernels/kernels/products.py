"""The products of the backward pass: a slab of logit gradients becomes gradients of ``x``, ``weight`` and ``bias``."""

import triton
import triton.language as tl

from core_kernels.kernels.linear import grouped_tile
from core_kernels.kernels.logits import multiply_add, round_to


@triton.jit
def add_input_gradient(
    slab, weight, grad_rows, valid_count, stride_wv, stride_wh, H, first_column, slab_columns, slab_stride,
    FIRST: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles * hidden tiles,). ``grad_rows (valid tokens, H) (+)= slab @ weight[columns]`` in float32."""
    count = tl.load(valid_count)
    token_tiles = tl.cdiv(count, M)
    hidden_tiles = tl.cdiv(H, N)
    index = tl.program_id(0)
    if index >= token_tiles * hidden_tiles:
        return
    tile, hidden_tile = grouped_tile(index, token_tiles, hidden_tiles, GROUP)
    rank = (tile * M + tl.arange(0, M)).to(tl.int64)
    h = hidden_tile * N + tl.arange(0, N)
    k = tl.arange(0, K)
    inside = rank < count
    in_hidden = h < H
    at = rank[:, None] * H + h[None, :]
    mask = inside[:, None] & in_hidden[None, :]
    total = tl.zeros([M, N], tl.float32)
    if not FIRST:
        total = tl.load(grad_rows + at, mask=mask, other=0.0)
    g_tile = slab + rank[:, None] * slab_stride + k[None, :]
    w_tile = weight + (first_column + k[:, None]).to(tl.int64) * stride_wv + h[None, :].to(tl.int64) * stride_wh
    for start in range(0, slab_columns, K):
        in_slab = start + k < slab_columns
        a = tl.load(g_tile, mask=inside[:, None] & in_slab[None, :], other=0.0)
        b = tl.load(w_tile, mask=in_slab[:, None] & in_hidden[None, :], other=0.0)
        total = multiply_add(a, b, total)
        g_tile += K
        w_tile += tl.cast(stride_wv, tl.int64) * K
    tl.store(grad_rows + at, total, mask=mask)


@triton.jit
def scatter_input_gradient(grad_rows, valid_position, grad_x, H, BLOCK: tl.constexpr):
    """Grid (tokens, blocks of H). ``grad_x (tokens, H)``: the valid tokens' rows, rounded once, and exact zeros."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(valid_position + token).to(tl.int64)
    g = tl.load(grad_rows + position * H + h, mask=h < tl.where(position >= 0, H, 0), other=0.0)
    tl.store(grad_x + token * H + h, round_to(g, grad_x.dtype.element_ty), mask=h < H)


@triton.jit
def gather_valid_rows(
    x, valid_tokens, valid_count, valid_x, stride_xn, stride_xh, H, row_stride, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (tokens, blocks of H). ``valid_x (tokens, H)``: the valid tokens' rows of ``x``, packed, then zeros."""
    rank = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(valid_tokens + rank).to(tl.int64)
    readable = h < tl.where(rank < tl.load(valid_count), H, 0)
    row = tl.load(x + token * stride_xn + h.to(tl.int64) * stride_xh, mask=readable, other=0.0)
    tl.store(valid_x + rank * row_stride + h, row, mask=h < H)


@triton.jit
def weight_gradient(
    slab, valid_x, grad_weight, valid_count, stride_gv, stride_gh, H, first_column, slab_columns,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (vocab tiles of the slab * hidden tiles,). ``grad_weight[columns] = slab.T @ valid_x``, rounded once.

    ``slab (tokens, slab_columns)`` and ``valid_x (tokens, H)`` are tensor descriptors, of (K, M) and (K, N) blocks.
    Both are zero from the last valid token to the end of its tile.
    """
    count = tl.load(valid_count)
    vocab_tiles = tl.cdiv(slab_columns, M)
    hidden_tiles = tl.cdiv(H, N)
    tile, hidden_tile = grouped_tile(tl.program_id(0), vocab_tiles, hidden_tiles, GROUP)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, count, K):
        a = slab.load([start, tile * M]).T
        b = valid_x.load([start, hidden_tile * N])
        total = multiply_add(a, b, total)
    slab_column = tile * M + tl.arange(0, M)
    h = hidden_tile * N + tl.arange(0, N)
    at = (first_column + slab_column).to(tl.int64)[:, None] * stride_gv + h[None, :].to(tl.int64) * stride_gh
    rounded = round_to(total, grad_weight.dtype.element_ty)
    tl.store(grad_weight + at, rounded, mask=(slab_column < slab_columns)[:, None] & (h < H)[None, :])


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
