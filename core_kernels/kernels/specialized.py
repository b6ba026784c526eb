"""The four products on Hopper, where every operand has a descriptor: what ``statistics``, ``slab`` and ``products`` do.

Each kernel is that of the same name there, of the same arguments, less those that only pointers need. Its blocks
of A, and those that it stores, are of one of the ``PARTS`` of a tile's rows. See ``hopper``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.extra import cuda

from core_kernels.kernels.hopper import (
    columns_of,
    fold_columns,
    larger,
    load_tile,
    make_buffers,
    make_ring,
    multiply_tile,
    of_rows,
    rows_of,
    specialize,
    store_block,
    store_half,
    store_rows,
    store_sums,
    store_tile,
)
from core_kernels.kernels.logits import (
    FAR,
    cap_logits,
    correction_of,
    exp_from,
    exponent_of,
    finite_or_zero,
    round_to,
)
from core_kernels.kernels.products import count_sums, find_sum
from core_kernels.kernels.projection import add_bias, grouped_tile
from core_kernels.kernels.slab import load_rows, tile_gradient
from core_kernels.kernels.statistics import column_of, scaled_by_slope, store_smooth
from core_kernels.kernels.stores import NO_SLOT, halves


@gluon.jit
def load_projections(
    x, weight, ring, first_row, first_column, token_tiles, vocab_tiles, H, programs,
    LAYOUT: gl.constexpr, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), token_tiles * vocab_tiles, programs):
        tile, vocab_tile = grouped_tile(index, token_tiles, vocab_tiles, GROUP)
        stage, phase = load_tile(
            x, weight, ring, first_row + tile * M, first_column + vocab_tile * N, 0, 0, gl.cdiv(H, K), stage, phase,
            False, LAYOUT == "hv", K, STAGES, PARTS,
        )  # fmt: skip


@gluon.jit
def take_statistics(
    PART: gl.constexpr, ring, buffers, bias, class_weight, valid_tokens, label_logit, exponentials,
    tile_max, tile_sum, tile_smooth, tile_argmax, columns, H, first_rank, ranks, first_row, programs,
    logit_scale, softcap, count, token_tiles, vocab_tiles,
    KEEP: gl.constexpr, ARGMAX: gl.constexpr, LARGEST: gl.constexpr, CLASS_WEIGHT: gl.constexpr,
    SMOOTHING: gl.constexpr, BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    LAYOUT: gl.constexpr, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 0
    for index in range(gl.program_id(0), token_tiles * vocab_tiles, programs):
        tile, vocab_tile = grouped_tile(index, token_tiles, vocab_tiles, GROUP)
        first = tile * M
        rank = first + rows_of(PART, M, N, PARTS)
        inside = rank < count
        token = gl.load(valid_tokens + first_rank + rank, mask=inside, other=0).to(gl.int64)
        if KEEP:  # asked for before it is needed
            base = gl.load(label_logit + token, mask=inside, other=float("inf"))
        z, stage, phase = multiply_tile(
            ring, gl.cdiv(H, K), stage, phase, PART, False, LAYOUT == "hv", M, N, STAGES, PARTS
        )
        column = vocab_tile * N + columns_of(z)
        if BIAS:
            z = add_bias(z, bias, column, columns)
        z = cap_logits(z, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        if (vocab_tile + 1) * N > columns:
            z = gl.where((column < columns)[None, :], z, float("-inf"))
        at = vocab_tile.to(gl.int64) * ranks + rank
        if ARGMAX or not KEEP:
            top = gl.max(z, 1)
        if ARGMAX:
            top_column = column_of(z, top, column)
        if SMOOTHING:
            store_smooth(z, at, inside, column, column < columns, class_weight, tile_smooth, CLASS_WEIGHT)
        if KEEP:
            exponent, factor = exponent_of(base)
            total = gl.zeros_like(base)
            parts = halves(z)
            for side in gl.static_range(2):  # the second is worked on while the first is stored
                half = parts[side]
                p = exp_from(half, of_rows(exponent, half)[:, None], of_rows(factor, half)[:, None])
                total += of_rows(gl.sum(p, 1), z)
                kept = round_to(scaled_by_slope(p, half, softcap, HAS_SOFTCAP), exponentials.dtype)
                if LARGEST:
                    few = fold_columns(kept)
                    if side == 0:
                        folded = few
                    else:
                        folded = larger(folded, few)
                at_block = [first_row + first + PART * (M // PARTS), vocab_tile * N + side * (N // 2)]
                store_block(exponentials, buffers.index(PART), at_block, kept, False)
            total *= correction_of(base, exponent, factor)
            if LARGEST:
                top = of_rows(gl.max(folded.to(gl.float32), 1), z)
        else:
            base = finite_or_zero(top)
            exponent, factor = exponent_of(base)
            total = gl.sum(exp_from(z, exponent[:, None], factor[:, None]), 1) * correction_of(base, exponent, factor)
        gl.store(tile_sum + at, total, mask=inside)  # these last: a fence waits for what was stored before it
        if ARGMAX or LARGEST or not KEEP:
            gl.store(tile_max + at, top, mask=inside)
        if ARGMAX:
            gl.store(tile_argmax + at, top_column, mask=inside)
    if KEEP:
        tma.store_wait(pendings=0)


@gluon.jit
def project_statistics(
    x, weight, bias, class_weight, valid_tokens, valid_count, label_logit, exponentials,
    tile_max, tile_sum, tile_smooth, tile_argmax, columns, H, first_rank, ranks, first_row, programs,
    logit_scale, softcap,
    KEEP: gl.constexpr, ARGMAX: gl.constexpr, LARGEST: gl.constexpr, CLASS_WEIGHT: gl.constexpr,
    SMOOTHING: gl.constexpr, BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    LAYOUT: gl.constexpr, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """As ``statistics.project_statistics``; rows of ``x`` are packed."""
    ring = make_ring(x, weight, STAGES, PARTS)
    buffers = make_buffers(exponentials, PARTS) if KEEP else 0
    count = gl.minimum(gl.load(valid_count) - first_rank, ranks)
    token_tiles = gl.cdiv(count, M)
    vocab_tiles = gl.cdiv(columns, N)
    specialize(
        take_statistics,
        (
            ring, buffers, bias, class_weight, valid_tokens, label_logit, exponentials,
            tile_max, tile_sum, tile_smooth, tile_argmax, columns, H, first_rank, ranks, first_row, programs,
            logit_scale, softcap, count, token_tiles, vocab_tiles, KEEP, ARGMAX, LARGEST, CLASS_WEIGHT, SMOOTHING,
            BIAS, HAS_SCALE, HAS_SOFTCAP, LAYOUT, M, N, K, GROUP, STAGES, PARTS,
        ),
        load_projections,
        (
            x, weight, ring, first_row, 0, token_tiles, vocab_tiles, H, programs,
            LAYOUT, M, N, K, GROUP, STAGES, PARTS,
        ),
        PARTS,
    )  # fmt: skip


@gluon.jit
def rows_as_held(rows, tile):
    label, base, log_sum, soft, target, uniform = rows
    return (
        of_rows(label, tile), of_rows(base, tile), of_rows(log_sum, tile),
        of_rows(soft, tile), of_rows(target, tile), of_rows(uniform, tile),
    )  # fmt: skip


@gluon.jit
def take_gradient(
    PART: gl.constexpr, ring, buffers, bias, labels, class_weight, shard, valid_tokens,
    lse_base, saved_log_sum, row_target, row_soft, row_uniform, slab,
    columns, H, first_column, programs, logit_scale, softcap, count, token_tiles, vocab_tiles,
    CLASS_WEIGHT: gl.constexpr, SMOOTHING: gl.constexpr, Z_LOSS: gl.constexpr,
    BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_SOFTCAP: gl.constexpr, LAYOUT: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 0
    for index in range(gl.program_id(0), token_tiles * vocab_tiles, programs):
        tile, vocab_tile = grouped_tile(index, token_tiles, vocab_tiles, GROUP)
        first = tile * M
        rank = first + rows_of(PART, M, N, PARTS)
        inside = rank < count
        token = gl.load(valid_tokens + rank, mask=inside, other=0).to(gl.int64)
        rows = load_rows(  # asked for before it is needed
            token, inside, labels, shard, lse_base, saved_log_sum, row_target, row_soft, row_uniform, SMOOTHING, Z_LOSS
        )
        label_column = rows[0] - (first_column + vocab_tile * N)
        labelled = (label_column >= 0) & (label_column < N)
        exact = gl.max((labelled | (gl.abs(rows[1]) > FAR)).to(gl.int32), 0) > 0  # most tiles have no label
        z, stage, phase = multiply_tile(
            ring, gl.cdiv(H, K), stage, phase, PART, False, LAYOUT == "hv", M, N, STAGES, PARTS
        )
        parts = halves(z)
        for side in gl.static_range(2):  # the second is worked on while the first is stored
            half = parts[side]
            at_column = vocab_tile * N + side * (N // 2)
            column = first_column + at_column + columns_of(half)
            if BIAS:
                half = add_bias(half, bias, column, columns)
            g = tile_gradient(
                half, rows_as_held(rows, half), exact, column, columns, class_weight, shard,
                logit_scale, softcap, CLASS_WEIGHT, SMOOTHING, Z_LOSS, HAS_SCALE, HAS_SOFTCAP,
            )  # fmt: skip
            store_half(slab, buffers.index(PART), first + PART * (M // PARTS), at_column, g, False)
    tma.store_wait(pendings=0)


@gluon.jit
def slab_gradient(
    packed_x, weight, bias, labels, class_weight, first_class, valid_tokens, valid_count,
    lse_base, saved_log_sum, row_target, row_soft, row_uniform, slab,
    columns, H, first_column, slab_columns, programs, logit_scale, softcap,
    SHARDED: gl.constexpr, CLASS_WEIGHT: gl.constexpr, SMOOTHING: gl.constexpr, Z_LOSS: gl.constexpr,
    BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_SOFTCAP: gl.constexpr, LAYOUT: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """As ``slab.slab_gradient``."""
    ring = make_ring(packed_x, weight, STAGES, PARTS)
    buffers = make_buffers(slab, PARTS)
    count = gl.load(valid_count)
    token_tiles = gl.cdiv(count, M)
    vocab_tiles = gl.cdiv(slab_columns, N)
    shard = gl.load(first_class) if SHARDED else 0
    specialize(
        take_gradient,
        (
            ring, buffers, bias, labels, class_weight, shard, valid_tokens,
            lse_base, saved_log_sum, row_target, row_soft, row_uniform, slab,
            columns, H, first_column, programs, logit_scale, softcap, count, token_tiles, vocab_tiles,
            CLASS_WEIGHT, SMOOTHING, Z_LOSS, BIAS, HAS_SCALE, HAS_SOFTCAP, LAYOUT, M, N, K, GROUP, STAGES, PARTS,
        ),
        load_projections,
        (
            packed_x, weight, ring, 0, first_column, token_tiles, vocab_tiles, H, programs,
            LAYOUT, M, N, K, GROUP, STAGES, PARTS,
        ),
        PARTS,
    )  # fmt: skip


@gluon.jit
def load_for_weight(
    matrix, packed_x, ring, count, vocab_tiles, hidden_tiles, programs,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), vocab_tiles * hidden_tiles, programs):
        tile, hidden_tile = grouped_tile(index, vocab_tiles, hidden_tiles, GROUP)
        stage, phase = load_tile(
            matrix, packed_x, ring, tile * M, hidden_tile * N, 0, 0, gl.cdiv(count, K), stage, phase,
            True, True, K, STAGES, PARTS,
        )  # fmt: skip


@gluon.jit
def take_weight_gradient(
    PART: gl.constexpr, ring, buffers, grad_weight, label_rows, label_slot, rows_stride,
    first_column, columns, H, programs, count, vocab_tiles, hidden_tiles,
    LABELS: gl.constexpr, LAYOUT: gl.constexpr, ADD: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 0
    for index in range(gl.program_id(0), vocab_tiles * hidden_tiles, programs):
        tile, hidden_tile = grouped_tile(index, vocab_tiles, hidden_tiles, GROUP)
        total, stage, phase = multiply_tile(
            ring, gl.cdiv(count, K), stage, phase, PART, True, True, M, N, STAGES, PARTS
        )
        if LABELS:
            row = tile * M + rows_of(PART, M, N, PARTS)
            slot = gl.load(label_slot + row, mask=row < columns, other=NO_SLOT)
            if gl.min(slot, 0) < NO_SLOT:
                store_rows(label_rows, slot, slot < NO_SLOT, hidden_tile * N, total, H, rows_stride)
        first = first_column + tile * M + PART * (M // PARTS)
        if LAYOUT == "sums":
            store_sums(grad_weight, buffers.index(PART), first, hidden_tile * N, total, ADD)
        else:
            store_tile(grad_weight, buffers.index(PART), first, hidden_tile * N, total, LAYOUT == "hv")
    tma.store_wait(pendings=0)


@gluon.jit
def weight_gradient(
    matrix, packed_x, grad_weight, label_rows, label_slot, valid_count, rows_stride,
    first_rank, ranks, first_column, columns, H, programs,
    LABELS: gl.constexpr, LAYOUT: gl.constexpr, ADD: gl.constexpr, OVERLAP: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """As ``products.weight_gradient``; sums are a descriptor of blocks of a quarter of a tile's columns, and gradients
    of half of them.
    """
    if OVERLAP:
        cuda.gdc_launch_dependents()
    ring = make_ring(matrix, packed_x, STAGES, PARTS)
    buffers = make_buffers(grad_weight, PARTS)
    count = gl.maximum(gl.minimum(gl.load(valid_count) - first_rank, ranks), 0)
    vocab_tiles = gl.cdiv(columns, M)
    if ADD:
        vocab_tiles = gl.where(count > 0, vocab_tiles, 0)
    hidden_tiles = gl.cdiv(H, N)
    specialize(
        take_weight_gradient,
        (
            ring, buffers, grad_weight, label_rows, label_slot, rows_stride,
            first_column, columns, H, programs, count, vocab_tiles, hidden_tiles,
            LABELS, LAYOUT, ADD, M, N, K, GROUP, STAGES, PARTS,
        ),
        load_for_weight,
        (matrix, packed_x, ring, count, vocab_tiles, hidden_tiles, programs, M, N, K, GROUP, STAGES, PARTS),
        PARTS,
    )  # fmt: skip


@gluon.jit
def load_for_input(
    matrix, weight, ring, first_column, columns, split_tiles, splits, first_part, token_tiles, hidden_tiles,
    count, programs, SPLIT: gl.constexpr, LAYOUT: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), count, programs):
        tile, hidden_tile, _, begin, end = find_sum(
            index, token_tiles, hidden_tiles, columns, split_tiles, splits, first_part, SPLIT, M, K, GROUP
        )
        stage, phase = load_tile(
            matrix, weight, ring, tile * M, hidden_tile * N, begin, first_column + begin, gl.cdiv(end - begin, K),
            stage, phase, False, LAYOUT == "vh", K, STAGES, PARTS,
        )  # fmt: skip


@gluon.jit
def take_input_gradient(
    PART: gl.constexpr, ring, buffers, rows, columns, split_tiles, splits, first_part,
    token_tiles, hidden_tiles, count, programs, ADD: gl.constexpr, SPLIT: gl.constexpr, LAYOUT: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 0
    for index in range(gl.program_id(0), count, programs):
        _, hidden_tile, row, begin, end = find_sum(
            index, token_tiles, hidden_tiles, columns, split_tiles, splits, first_part, SPLIT, M, K, GROUP
        )
        total, stage, phase = multiply_tile(
            ring, gl.cdiv(end - begin, K), stage, phase, PART, False, LAYOUT == "vh", M, N, STAGES, PARTS
        )
        store_sums(rows, buffers.index(PART), row + PART * (M // PARTS), hidden_tile * N, total, ADD)
    tma.store_wait(pendings=0)


@gluon.jit
def input_gradient(
    matrix, weight, rows, valid_count, first_rank, ranks, first_column, columns, H,
    split_tiles, splits, first_part, programs,
    ADD: gl.constexpr, SPLIT: gl.constexpr, LAYOUT: gl.constexpr, OVERLAP: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """As ``products.input_gradient``; ``rows`` are a descriptor of blocks of a quarter of a tile's columns."""
    ring = make_ring(matrix, weight, STAGES, PARTS)
    buffers = make_buffers(rows, PARTS)
    token_tiles = gl.cdiv(gl.maximum(gl.minimum(gl.load(valid_count) - first_rank, ranks), 0), M)
    hidden_tiles = gl.cdiv(H, N)
    count = count_sums(token_tiles, hidden_tiles, split_tiles, splits, SPLIT)
    specialize(
        take_input_gradient,
        (
            ring, buffers, rows, columns, split_tiles, splits, first_part,
            token_tiles, hidden_tiles, count, programs, ADD, SPLIT, LAYOUT, M, N, K, GROUP, STAGES, PARTS,
        ),
        load_for_input,
        (
            matrix, weight, ring, first_column, columns, split_tiles, splits, first_part, token_tiles, hidden_tiles,
            count, programs, SPLIT, LAYOUT, M, N, K, GROUP, STAGES, PARTS,
        ),
        PARTS,
    )  # fmt: skip
    if OVERLAP:  # the last program to start: this launch shall not end before the one that it overlaps
        if gl.program_id(0) == gl.num_programs(0) - 1:
            cuda.gdc_wait()
