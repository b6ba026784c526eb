"""Products on Hopper by warps that specialise: one loads blocks of the operands, the others multiply them.

The loading warp runs ahead, into a ring of stages in shared memory, and does not stop where a tile ends: while the
others are busy with a finished tile, the next one's first blocks arrive. The multiplying warps are one partition or two
(``PARTS``), each with its own rows of a tile. Two drift apart by up to the length of the ring, so that one's tensor
cores work while the other exponentiates.

Device functions, and their descriptors, in Gluon, which says what Triton's compiler would work out. A ring is a tuple:
blocks of A, blocks of B, barriers "loaded" and barriers "free", of a stage each. A block of A is there in parts.
"""

from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from core_kernels.kernels.logits import round_to
from core_kernels.kernels.stores import halves

# Blocks lie in shared memory as the tensor cores read them, 128 bytes a row.
BLOCK_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
SUMS_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
# Registers of a thread. Those of a single part, or of the first of two, are what is left.
LOADING_REGISTERS = gl.constexpr(24)
PART_REGISTERS = gl.constexpr(240)

# Triton 3.9 has new names.
RENAMED = gl.constexpr(hasattr(tma, "async_load"))
async_load = tma.async_load if RENAMED.value else tma.async_copy_global_to_shared
async_store = tma.async_store if RENAMED.value else tma.async_copy_shared_to_global


@gl._core.builtin
def add_of_before(sums, at, buffer, _semantic=None):
    """``async_atomic_add``, which the compiler of Triton 3.6 has and its language has not."""
    at = _semantic._convert_to_ir_values(at, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, sums.handle, at, buffer.handle)


async_add = tma.async_atomic_add if RENAMED.value else add_of_before


def describe_block(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, block, BLOCK_LAYOUT if matrix.itemsize == 2 else SUMS_LAYOUT.value)


@gluon.jit
def call(function: gl.constexpr, arguments):
    function(*arguments)


@gluon.jit
def call_part(PART: gl.constexpr, function: gl.constexpr, arguments):
    function(PART, *arguments)


@gluon.jit
def specialize(multiply: gl.constexpr, multiplied, load: gl.constexpr, loaded, PARTS: gl.constexpr):
    """``load(*loaded)`` in one warp, ``multiply(part, *multiplied)`` in eight, or in four for each of two parts."""
    if PARTS == 1:
        gl.warp_specialize([(call_part, (0, multiply, multiplied)), (call, (load, loaded))], [1], [LOADING_REGISTERS])
    else:
        gl.static_assert(PARTS == 2)
        gl.warp_specialize(
            [
                (call_part, (0, multiply, multiplied)),
                (call_part, (1, multiply, multiplied)),
                (call, (load, loaded)),
            ],
            [4, 1],
            [PART_REGISTERS, LOADING_REGISTERS],
        )


@gluon.constexpr_function
def tile_layout(N, PARTS):
    """How the registers of the warps of one part hold its rows of a tile of N columns."""
    return gl.NVMMADistributedLayout([3, 0], [8 // PARTS, 1], [16, N, 16])


@gluon.jit
def make_ring(a, b, STAGES: gl.constexpr, PARTS: gl.constexpr):
    """A ring of ``STAGES`` for the blocks of the descriptors ``a``, in parts, and ``b``."""
    a_blocks = gl.allocate_shared_memory(a.dtype, [STAGES * PARTS] + a.block_type.shape, a.layout)
    b_blocks = gl.allocate_shared_memory(b.dtype, [STAGES] + b.block_type.shape, b.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(free.index(stage), count=PARTS)
    return a_blocks, b_blocks, loaded, free


@gluon.jit
def make_buffers(matrix, PARTS: gl.constexpr):
    """What each part stores blocks of a descriptor from."""
    return gl.allocate_shared_memory(matrix.dtype, [PARTS] + matrix.block_type.shape, matrix.layout)


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next stage of the ring, and the phase of its barriers, which flips each time around."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def before(stage, STAGES: gl.constexpr):
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def load_tile(
    a, b, ring, row, column, first_a, first_b, steps, stage, phase,
    A_BY_K: gl.constexpr, B_BY_K: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Load the blocks of ``steps`` times ``K`` of what is summed over: of A from ``first_a``, of B from ``first_b``.

    ``BY_K``: the operand's rows are what is summed over, and not its columns. The first phase is 1: all is free.
    """
    a_blocks, b_blocks, loaded, free = ring
    ROWS: gl.constexpr = a.block_type.shape[1 if A_BY_K else 0]
    for step in range(steps):
        mbarrier.wait(free.index(stage), phase)
        barrier = loaded.index(stage)
        mbarrier.expect(barrier, PARTS * a.block_type.nbytes + b.block_type.nbytes)
        k = first_b + step * K
        async_load(b, [k, column] if B_BY_K else [column, k], barrier, b_blocks.index(stage))
        k = first_a + step * K
        for part in gl.static_range(PARTS):
            at = row + part * ROWS
            block = a_blocks.index(stage * PARTS + part)
            async_load(a, [k, at] if A_BY_K else [at, k], barrier, block)
        stage, phase = advance(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def multiply_tile(
    ring, steps, stage, phase, PART: gl.constexpr, A_BY_K: gl.constexpr, B_BY_K: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The sum of the products of so many blocks, in float32: ``PART`` of an (M, N) tile. The first phase is 0."""
    a_blocks, b_blocks, loaded, free = ring
    total = gl.zeros([M // PARTS, N], gl.float32, tile_layout(N, PARTS))
    for step in range(steps):
        mbarrier.wait(loaded.index(stage), phase)
        a = a_blocks.index(stage * PARTS + PART)
        b = b_blocks.index(stage)
        if A_BY_K:
            a = a.permute((1, 0))
        if not B_BY_K:
            b = b.permute((1, 0))
        total = warpgroup_mma(a, b, total, is_async=True)
        total = warpgroup_mma_wait(1, deps=(total,))  # the product before is done with its blocks
        mbarrier.arrive(free.index(before(stage, STAGES)), count=1, pred=step > 0)
        stage, phase = advance(stage, phase, STAGES)
    total = warpgroup_mma_wait(0, deps=(total,))
    mbarrier.arrive(free.index(before(stage, STAGES)), count=1, pred=steps > 0)
    return total, stage, phase


@gluon.jit
def rows_of(PART: gl.constexpr, M: gl.constexpr, N: gl.constexpr, PARTS: gl.constexpr):
    """Indices of the rows of a part of an (M, N) tile, as its registers hold them."""
    return PART * (M // PARTS) + gl.arange(0, M // PARTS, gl.SliceLayout(1, tile_layout(N, PARTS)))


@gluon.jit
def columns_of(tile):
    return gl.arange(0, tile.shape[1], gl.SliceLayout(0, tile.type.layout))


@gluon.jit
def of_rows(values, tile):
    """Values, one a row, as the registers of ``tile`` hold its rows."""
    return gl.convert_layout(values, gl.SliceLayout(1, tile.type.layout))


@gluon.jit
def larger(a, b):
    """The larger of each two bfloat16 numbers, by one instruction for two."""
    return gl.inline_asm_elementwise(
        "max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def fold_columns(tile):
    """Of each row of a bfloat16 tile the largest of every eighth column: a thread holds two neighbours of eight."""
    if tile.shape[1] == 8:
        folded = tile
    else:
        left, right = halves(tile)
        folded = fold_columns(larger(left, right))
    return folded


@gluon.jit
def store_block(matrix, buffer, at, block, ADD: gl.constexpr):
    """Store a block through a descriptor of its size and a ``buffer``, or ``ADD`` it to what is there.

    Waits until the buffer is read by the store before, and not for this one: the kernel's end must. What is added to
    memory adds, and nobody waits for it.
    """
    tma.store_wait(pendings=0)
    buffer.store(block)
    fence_async_shared()
    if ADD:
        async_add(matrix, at, buffer)
    else:
        async_store(matrix, at, buffer)


@gluon.jit
def store_half(matrix, buffer, row, column, half, TRANSPOSED: gl.constexpr):
    """Store half of a float32 tile, rounded."""
    rounded = round_to(half, matrix.dtype)
    if TRANSPOSED:
        store_block(matrix, buffer, [column, row], rounded.permute(1, 0), False)
    else:
        store_block(matrix, buffer, [row, column], rounded, False)


@gluon.jit
def store_tile(matrix, buffer, row, column, tile, TRANSPOSED: gl.constexpr):
    left, right = halves(tile)
    store_half(matrix, buffer, row, column, left, TRANSPOSED)
    store_half(matrix, buffer, row, column + tile.shape[1] // 2, right, TRANSPOSED)


@gluon.jit
def store_sums(sums, buffer, row, column, tile, ADD: gl.constexpr):
    """Store a float32 tile, in quarters of its columns, or ``ADD`` it: it is one program's, so its sums are ordered."""
    left, right = halves(tile)
    for quarter in gl.static_range(4):
        quarters = halves(left if quarter < 2 else right)
        store_block(sums, buffer, [row, column + quarter * (tile.shape[1] // 4)], quarters[quarter % 2], ADD)


@gluon.jit
def store_rows(matrix, row, inside, first_column, tile, columns, stride):
    """Store a float32 tile into the rows of a row-major matrix that are ``inside``.

    By pointers, as the registers hold it: in pieces of 32 bytes, which is what memory transfers.
    """
    column = first_column + columns_of(tile)
    at = matrix + of_rows(row, tile).to(gl.int64)[:, None] * stride + column[None, :]
    gl.store(at, tile, mask=of_rows(inside, tile)[:, None] & (column < columns)[None, :])
