"""A tile of the projection ``x @ weight.T + bias``, and how tiles are visited. Device functions, and the label's logit.

A weight is read through a tensor descriptor of its own layout where its strides allow, and by pointers where not:
``LAYOUT`` is ``"vh"``, ``"hv"`` or ``"strided"``.
"""

import triton
import triton.language as tl

from core_kernels.kernels.logits import cap_logits, multiply_add


@triton.jit
def grouped_tile(index, rows, columns, GROUP: tl.constexpr):
    """Row and column of the ``index``-th tile of a grid, in groups of ``GROUP`` rows, to reuse operands in L2."""
    per_group = GROUP * columns
    first = (index // per_group) * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + (index % per_group) % height, (index % per_group) // height


@triton.jit
def load_weight(
    weight, first_column, first_h, columns, H, stride_wv, stride_wh,
    LAYOUT: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Block (K, N) of ``weight.T``: zero past the ends."""
    if LAYOUT == "vh":
        block = weight.load([first_column, first_h]).T
    elif LAYOUT == "hv":
        block = weight.load([first_h, first_column])
    else:
        column = first_column + tl.arange(0, N)
        h = first_h + tl.arange(0, K)
        at = column[None, :].to(tl.int64) * stride_wv + h[:, None].to(tl.int64) * stride_wh
        block = tl.load(weight + at, mask=(h < H)[:, None] & (column < columns)[None, :], other=0.0)
    return block


@triton.jit
def project(
    x, weight, bias, first_rank, token, inside, first_column, columns, H, stride_xn, stride_xh, stride_wv, stride_wh,
    BIAS: tl.constexpr, PACKED: tl.constexpr, LAYOUT: tl.constexpr, EVEN_K: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One (M, N) tile of ``x @ weight.T + bias`` in float32, for the given tokens and the columns from the first.

    Rows of ``x`` are gathered, and zero where not ``inside``; or ``x`` is a descriptor of (M, K) blocks of ``PACKED``
    rows: those from ``first_rank``.
    """
    k = tl.arange(0, K)
    x_tile = x
    if not PACKED:
        x_tile = x + token[:, None] * stride_xn + k[None, :].to(tl.int64) * stride_xh
    z = tl.zeros([M, N], tl.float32)
    for start in range(0, H, K):
        if PACKED:
            a = x.load([first_rank, start])
        elif EVEN_K:
            a = tl.load(x_tile, mask=inside[:, None], other=0.0)
        else:
            a = tl.load(x_tile, mask=inside[:, None] & (start + k < H)[None, :], other=0.0)
        b = load_weight(weight, first_column, start, columns, H, stride_wv, stride_wh, LAYOUT, N, K)
        z = multiply_add(a, b, z)
        if not PACKED:
            x_tile += tl.cast(stride_xh, tl.int64) * K
    if BIAS:
        z = add_bias(z, bias, first_column + tl.arange(0, N), columns)
    return z


@triton.jit
def add_bias(z, bias, column, columns):
    return z + tl.load(bias + column, mask=column < columns, other=0.0)[None, :].to(tl.float32)


@triton.jit
def project_labels(
    x, weight, bias, labels, valid_tokens, valid_count, label_logit,
    stride_xn, stride_xh, stride_wv, stride_wh, num_tokens, H, logit_scale, softcap,
    BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_K: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of M tokens,). ``label_logit (tokens,)``: the final logit of each valid token's label, and 0.

    It is the diagonal of a product with the labels' rows, summed in the order of ``project``, so that it has the bits
    of the same logit there.
    """
    rank = tl.program_id(0) * M + tl.arange(0, M)
    inside = rank < tl.load(valid_count)
    token = tl.load(valid_tokens + rank, mask=rank < num_tokens, other=0).to(tl.int64)
    label = tl.load(labels + token, mask=inside, other=0).to(tl.int64)
    k = tl.arange(0, K)
    x_tile = x + token[:, None] * stride_xn + k[None, :].to(tl.int64) * stride_xh
    w_tile = weight + label[None, :] * stride_wv + k[:, None].to(tl.int64) * stride_wh
    z = tl.zeros([M, M], tl.float32)
    for start in range(0, H, K):
        if EVEN_K:
            a = tl.load(x_tile, mask=inside[:, None], other=0.0)
            b = tl.load(w_tile, mask=inside[None, :], other=0.0)
        else:
            a = tl.load(x_tile, mask=inside[:, None] & (start + k < H)[None, :], other=0.0)
            b = tl.load(w_tile, mask=inside[None, :] & (start + k < H)[:, None], other=0.0)
        z = multiply_add(a, b, z)
        x_tile += tl.cast(stride_xh, tl.int64) * K
        w_tile += tl.cast(stride_wh, tl.int64) * K
    i = tl.arange(0, M)
    own = tl.sum(tl.where(i[:, None] == i[None, :], z, 0.0), 1)
    if BIAS:
        own += tl.load(bias + label, mask=inside, other=0.0).to(tl.float32)
    own = cap_logits(own, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    tl.store(label_logit + token, tl.where(inside, own, 0.0), mask=rank < num_tokens)
