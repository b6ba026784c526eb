"""The four products on Hopper, where every operand has a descriptor: what ``statistics``, ``slab`` and ``products`` do.

Each kernel is that of the same name there, of the same arguments, less the strides that only pointers need. Its blocks
of A, and those that it stores, are of one of the ``PARTS`` of a tile's rows. See ``hopper``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.extra import cuda

from core_kernels.kernels.hopper import (
    add_rows,
    load_sums,
    load_tile,
    make_buffers,
    make_ring,
    multiply_tile,
    rows_and_columns,
    specialize,
    store_rows,
    store_tile,
)
from core_kernels.kernels.products import count_sums, find_sum
from core_kernels.kernels.projection import add_bias, grouped_tile
from core_kernels.kernels.slab import tile_gradient
from core_kernels.kernels.statistics import scaled_by_slope, store_statistics
from core_kernels.kernels.stores import NO_SLOT


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
    KEEP: gl.constexpr, ARGMAX: gl.constexpr, CLASS_WEIGHT: gl.constexpr, SMOOTHING: gl.constexpr,
    BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_SOFTCAP: gl.constexpr, LAYOUT: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 0
    for index in range(gl.program_id(0), token_tiles * vocab_tiles, programs):
        tile, vocab_tile = grouped_tile(index, token_tiles, vocab_tiles, GROUP)
        z, stage, phase = multiply_tile(
            ring, gl.cdiv(H, K), stage, phase, PART, False, LAYOUT == "hv", M, N, STAGES, PARTS
        )
        row, column = rows_and_columns(z)
        first = tile * M + PART * (M // PARTS)
        rank = first + row
        column = vocab_tile * N + column
        inside = rank < count
        token = gl.load(valid_tokens + first_rank + rank, mask=inside, other=0).to(gl.int64)
        if BIAS:
            z = add_bias(z, bias, column, columns)
        p, z = store_statistics(
            z, token, inside, vocab_tile.to(gl.int64) * ranks + rank, column, columns,
            class_weight, label_logit, tile_max, tile_sum, tile_smooth, tile_argmax, logit_scale, softcap,
            KEEP, ARGMAX, CLASS_WEIGHT, SMOOTHING, HAS_SCALE, HAS_SOFTCAP,
        )  # fmt: skip
        if KEEP:
            kept = scaled_by_slope(p, z, softcap, HAS_SOFTCAP)
            store_tile(exponentials, buffers.index(PART), first_row + first, vocab_tile * N, kept, False)
    if KEEP:
        tma.store_wait(pendings=0)


@gluon.jit
def project_statistics(
    x, weight, bias, class_weight, valid_tokens, valid_count, label_logit, exponentials,
    tile_max, tile_sum, tile_smooth, tile_argmax, columns, H, first_rank, ranks, first_row, programs,
    logit_scale, softcap,
    KEEP: gl.constexpr, ARGMAX: gl.constexpr, CLASS_WEIGHT: gl.constexpr, SMOOTHING: gl.constexpr,
    BIAS: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_SOFTCAP: gl.constexpr, LAYOUT: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
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
            logit_scale, softcap, count, token_tiles, vocab_tiles, KEEP, ARGMAX, CLASS_WEIGHT, SMOOTHING,
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
        z, stage, phase = multiply_tile(
            ring, gl.cdiv(H, K), stage, phase, PART, False, LAYOUT == "hv", M, N, STAGES, PARTS
        )
        row, column = rows_and_columns(z)
        first = tile * M + PART * (M // PARTS)
        column = first_column + vocab_tile * N + column
        inside = first + row < count
        token = gl.load(valid_tokens + first + row, mask=inside, other=0).to(gl.int64)
        if BIAS:
            z = add_bias(z, bias, column, columns)
        g = tile_gradient(
            z, token, inside, column, columns,
            labels, class_weight, shard, lse_base, saved_log_sum, row_target, row_soft, row_uniform,
            logit_scale, softcap, CLASS_WEIGHT, SMOOTHING, Z_LOSS, HAS_SCALE, HAS_SOFTCAP,
        )  # fmt: skip
        store_tile(slab, buffers.index(PART), first, vocab_tile * N, g, False)
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
    matrix, packed_x, sums, ring, first_column, count, vocab_tiles, hidden_tiles, programs, ADD: gl.constexpr,
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
        if ADD:
            stage, phase = load_sums(
                sums, ring, first_column + tile * M, hidden_tile * N, stage, phase, M, N, STAGES
            )


@gluon.jit
def take_weight_gradient(
    PART: gl.constexpr, ring, buffers, grad_weight, label_rows, label_slot, rows_stride, stride_gv,
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
        first = tile * M + PART * (M // PARTS)
        row = first + rows_and_columns(total)[0]
        if LABELS:
            slot = gl.load(label_slot + row, mask=row < columns, other=NO_SLOT)
            if gl.min(slot, 0) < NO_SLOT:
                store_rows(label_rows, slot, slot < NO_SLOT, hidden_tile * N, total, H, rows_stride)
        if LAYOUT == "sums":
            if ADD:
                stage, phase = add_rows(
                    grad_weight, ring, first_column + row, row < columns, hidden_tile * N, total, H, stride_gv,
                    stage, phase, M, N, STAGES,
                )  # fmt: skip
            else:
                store_rows(grad_weight, first_column + row, row < columns, hidden_tile * N, total, H, stride_gv)
        else:
            store_tile(
                grad_weight, buffers.index(PART), first_column + first, hidden_tile * N, total, LAYOUT == "hv"
            )
    if LAYOUT != "sums":
        tma.store_wait(pendings=0)


@gluon.jit
def weight_gradient(
    matrix, packed_x, grad_weight, label_rows, label_slot, valid_count, rows_stride, stride_gv,
    first_rank, ranks, first_column, columns, H, programs, sums,
    LABELS: gl.constexpr, LAYOUT: gl.constexpr, ADD: gl.constexpr, OVERLAP: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """As ``products.weight_gradient``; ``sums``, for what is to ``ADD``, is ``grad_weight`` in (M, N / 4) blocks."""
    if OVERLAP:
        cuda.gdc_launch_dependents()
    ring = make_ring(matrix, packed_x, STAGES, PARTS)
    buffers = 0 if LAYOUT == "sums" else make_buffers(grad_weight, PARTS)
    count = gl.maximum(gl.minimum(gl.load(valid_count) - first_rank, ranks), 0)
    vocab_tiles = gl.cdiv(columns, M)
    if ADD:
        vocab_tiles = gl.where(count > 0, vocab_tiles, 0)
    hidden_tiles = gl.cdiv(H, N)
    specialize(
        take_weight_gradient,
        (
            ring, buffers, grad_weight, label_rows, label_slot, rows_stride, stride_gv,
            first_column, columns, H, programs, count, vocab_tiles, hidden_tiles,
            LABELS, LAYOUT, ADD, M, N, K, GROUP, STAGES, PARTS,
        ),
        load_for_weight,
        (
            matrix, packed_x, sums, ring, first_column, count, vocab_tiles, hidden_tiles, programs, ADD,
            M, N, K, GROUP, STAGES, PARTS,
        ),
        PARTS,
    )  # fmt: skip


@gluon.jit
def load_for_input(
    matrix, weight, sums, ring, first_column, columns, split_tiles, splits, first_part, token_tiles, hidden_tiles,
    count, programs, ADD: gl.constexpr, SPLIT: gl.constexpr, LAYOUT: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), count, programs):
        tile, hidden_tile, row, begin, end = find_sum(
            index, token_tiles, hidden_tiles, columns, split_tiles, splits, first_part, SPLIT, M, K, GROUP
        )
        stage, phase = load_tile(
            matrix, weight, ring, tile * M, hidden_tile * N, begin, first_column + begin, gl.cdiv(end - begin, K),
            stage, phase, False, LAYOUT == "vh", K, STAGES, PARTS,
        )  # fmt: skip
        if ADD:
            stage, phase = load_sums(sums, ring, row, hidden_tile * N, stage, phase, M, N, STAGES)


@gluon.jit
def take_input_gradient(
    PART: gl.constexpr, ring, rows, rows_end, rows_stride, columns, H, split_tiles, splits, first_part,
    token_tiles, hidden_tiles, count, programs, ADD: gl.constexpr, SPLIT: gl.constexpr, LAYOUT: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 0
    for index in range(gl.program_id(0), count, programs):
        _, hidden_tile, first, begin, end = find_sum(
            index, token_tiles, hidden_tiles, columns, split_tiles, splits, first_part, SPLIT, M, K, GROUP
        )
        total, stage, phase = multiply_tile(
            ring, gl.cdiv(end - begin, K), stage, phase, PART, False, LAYOUT == "vh", M, N, STAGES, PARTS
        )
        row = first + PART * (M // PARTS) + rows_and_columns(total)[0]
        if ADD:
            stage, phase = add_rows(
                rows, ring, row, row < rows_end, hidden_tile * N, total, H, rows_stride, stage, phase, M, N, STAGES
            )
        else:
            store_rows(rows, row, row < rows_end, hidden_tile * N, total, H, rows_stride)


@gluon.jit
def input_gradient(
    matrix, weight, rows, valid_count, rows_end, rows_stride,
    first_rank, ranks, first_column, columns, H, split_tiles, splits, first_part, programs, sums,
    ADD: gl.constexpr, SPLIT: gl.constexpr, LAYOUT: gl.constexpr, OVERLAP: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """As ``products.input_gradient``; ``sums``, for what is to ``ADD``, is ``rows`` in (M, N / 4) blocks."""
    ring = make_ring(matrix, weight, STAGES, PARTS)
    token_tiles = gl.cdiv(gl.maximum(gl.minimum(gl.load(valid_count) - first_rank, ranks), 0), M)
    hidden_tiles = gl.cdiv(H, N)
    count = count_sums(token_tiles, hidden_tiles, split_tiles, splits, SPLIT)
    specialize(
        take_input_gradient,
        (
            ring, rows, rows_end, rows_stride, columns, H, split_tiles, splits, first_part,
            token_tiles, hidden_tiles, count, programs, ADD, SPLIT, LAYOUT, M, N, K, GROUP, STAGES, PARTS,
        ),
        load_for_input,
        (
            matrix, weight, sums, ring, first_column, columns, split_tiles, splits, first_part,
            token_tiles, hidden_tiles, count, programs, ADD, SPLIT, LAYOUT, M, N, K, GROUP, STAGES, PARTS,
        ),
        PARTS,
    )  # fmt: skip
    if OVERLAP:  # the last program to start: this launch shall not end before the one that it overlaps
        if gl.program_id(0) == gl.num_programs(0) - 1:
            cuda.gdc_wait()
