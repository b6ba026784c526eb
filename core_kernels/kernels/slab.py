"""The gradient of the logits, one slice of the vocab at a time: tiles are projected again and leave as gradients."""

import triton
import triton.language as tl

from core_kernels.kernels.logits import cap_logits, logits_gradient
from core_kernels.kernels.projection import grouped_tile, project
from core_kernels.kernels.stores import store_rounded


@triton.jit
def slab_gradient(
    packed_x, weight, bias, labels, class_weight, first_class, valid_tokens, valid_count,
    lse_base, saved_log_sum, row_target, row_soft, row_uniform, slab,
    columns, H, first_column, slab_columns, programs, stride_wv, stride_wh, logit_scale, softcap,
    SHARDED: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LAYOUT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (programs,), each of which takes every ``programs``-th tile. ``slab``, a descriptor of (M, N / 2) blocks:
    gradient of the raw logits of the valid tokens for ``slab_columns`` columns from ``first_column``, rounded once,
    with the upstream gradient, which is in the row factors, already in it. The last tile's rows that are no valid token
    are zero, so that a product over tokens needs no mask.
    """
    count = tl.load(valid_count)
    token_tiles = tl.cdiv(count, M)
    vocab_tiles = tl.cdiv(slab_columns, N)
    shard = 0
    if SHARDED:  # classes are numbered as this shard's columns
        shard = tl.load(first_class)
    for index in tl.range(tl.program_id(0), token_tiles * vocab_tiles, programs, flatten=True):
        tile, vocab_tile = grouped_tile(index, token_tiles, vocab_tiles, GROUP)
        rank = tile * M + tl.arange(0, M)
        inside = rank < count
        token = tl.load(valid_tokens + rank, mask=inside, other=0).to(tl.int64)
        z = project(
            packed_x, weight, bias, tile * M, token, inside, first_column + vocab_tile * N, columns, H,
            0, 0, stride_wv, stride_wh, BIAS, True, LAYOUT, True, M, N, K,
        )  # fmt: skip
        rows = load_rows(
            token, inside, labels, shard, lse_base, saved_log_sum, row_target, row_soft, row_uniform, SMOOTHING, Z_LOSS
        )
        g = tile_gradient(
            z, rows, True, first_column + vocab_tile * N + tl.arange(0, N), columns, class_weight, shard,
            logit_scale, softcap, CLASS_WEIGHT, SMOOTHING, Z_LOSS, HAS_SCALE, HAS_SOFTCAP,
        )  # fmt: skip
        store_rounded(slab, tile * M, vocab_tile * N, g)


@triton.jit
def load_rows(
    token, inside, labels, shard, lse_base, saved_log_sum, row_target, row_soft, row_uniform,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """What the gradient of a row of logits takes of its token."""
    label = (tl.load(labels + token, mask=inside, other=-1) - shard).to(tl.int32)
    base = tl.load(lse_base + token, mask=inside, other=float("inf"))  # others have no probabilities
    log_sum = tl.load(saved_log_sum + token, mask=inside, other=0.0)
    target = tl.load(row_target + token, mask=inside, other=0.0)
    soft = target
    uniform = target
    if SMOOTHING or Z_LOSS:
        soft = tl.load(row_soft + token, mask=inside, other=0.0)
    if SMOOTHING:
        uniform = tl.load(row_uniform + token, mask=inside, other=0.0)
    return label, base, log_sum, soft, target, uniform


@triton.jit
def tile_gradient(
    z, rows, exact, column, columns, class_weight, shard, logit_scale, softcap,
    CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of raw logits, in float32; what is past the slab is not stored.

    ``exact``: whether some label may be among the columns, or some base is ``FAR``.
    """
    label, base, log_sum, soft, target, uniform = rows
    z = cap_logits(z, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    weights = class_weight
    if CLASS_WEIGHT:
        weights += shard
    return logits_gradient(
        z, exact, column[None, :], (column < columns)[None, :], label[:, None], base[:, None],
        log_sum[:, None], soft[:, None], target[:, None], uniform[:, None],
        weights, logit_scale, softcap, CLASS_WEIGHT, SMOOTHING, Z_LOSS, HAS_SCALE, HAS_SOFTCAP,
    )  # fmt: skip
