"""What several kernels take alike: flags from options, blocks from tiles, a weight's descriptor, a token's results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from core_kernels.notices import say_once
from core_kernels.plan import Plan
from core_kernels.tiles import Tile, can_specialize

if can_specialize():  # here and not where it is first used: parsing in two threads can crash CPython
    from core_kernels.kernels import hopper, specialized

Tensors = Mapping[str, Tensor]
Arguments = tuple[Any, ...]


def class_weights(t: Tensors) -> tuple[Tensor | None, Tensor | None]:
    return t.get("class_weight"), t.get("class_weight_sum")


def token_results(plan: Plan, t: Tensors) -> tuple[Tensor | None, ...]:
    """Where a token's results go: straight to the outputs, or to the workspace to be reduced from there."""
    if plan.options.per_token:
        results = t["loss"], t.get("z_loss"), t.get("token_accuracy")
    else:
        results = t["token_loss"], t["token_z_loss"], t.get("token_correct")
    counts = t.get("num_valid"), t.get("num_correct")
    return *results, *counts, t.get("predicted_tokens"), t["lse_base"], t["log_sum"], t.get("token_scale")


def group_tokens(plan: Plan) -> int:
    """How many tokens share an upstream gradient."""
    return 1 if plan.options.per_token else plan.problem.group_tokens


def logit_options(plan: Plan) -> dict[str, Any]:
    return {
        "logit_scale": plan.options.logit_scale,
        "softcap": plan.options.softcap or 1.0,
        "HAS_SCALE": plan.options.logit_scale != 1.0,
        "HAS_SOFTCAP": plan.options.softcap is not None,
    }


def loss_options(plan: Plan) -> dict[str, Any]:
    return {
        "smoothing": plan.options.label_smoothing,
        "lse_square_scale": plan.options.lse_square_scale,
        "TOKEN_SCALING": plan.options.use_token_scaling,
        "CLASS_WEIGHT": plan.problem.has_class_weight,
        "SMOOTHING": plan.options.label_smoothing > 0,
    }


def metric_flags(plan: Plan) -> dict[str, Any]:
    return {
        "PER_TOKEN": plan.options.per_token,
        "Z_OUTPUT": plan.options.return_z_loss,
        "ACCURACY": plan.options.return_token_accuracy,
        "COUNTS": plan.options.return_counts,
        "PREDICTED": plan.options.return_predicted_tokens,
    }


def gradient_flags(plan: Plan) -> dict[str, Any]:
    return {"MEAN": plan.options.reduction == "mean", "Z_LOSS": plan.options.lse_square_scale > 0}


def blocks(tile: Tile) -> dict[str, Any]:
    pipeline = {"STAGES": tile.stages, "PARTS": tile.parts} if tile.specialized else {"num_stages": tile.stages}
    return {"M": tile.m, "N": tile.n, "K": tile.k, "GROUP": tile.group, "num_warps": tile.warps, **pipeline}


def projection(plan: Plan, tile: Tile, layout: str) -> dict[str, Any]:
    return {"BIAS": plan.problem.has_bias, "LAYOUT": layout, **blocks(tile)}


def even_k(plan: Plan, tile: Tile) -> bool:
    assert plan.problem.hidden is not None
    return plan.problem.hidden % tile.k == 0


def layout_of(weight: Tensor) -> str:
    """How kernels read a weight, or store its gradient: as a descriptor of its own rows, or of its columns, or by
    elements.

    A descriptor wants a row-major matrix whose rows start at multiples of 16 bytes.
    """
    for layout, matrix in (("vh", weight), ("hv", weight.T)):
        row, step = matrix.stride()
        if step == 1 and row * weight.itemsize % 16 == 0 and row > 0 and matrix.data_ptr() % 16 == 0:
            return layout
    say_once(
        "the weight is read by elements and not in blocks, which is slower: neither its rows nor its columns are "
        "contiguous with each at a multiple of 16 bytes, as a hidden size that is a multiple of 8 has them"
    )
    return "strided"


def fitting(tile: Tile, layout: str, sums: Tensor | None = None) -> Tile:
    """The tile of a product one of whose operands has this layout, and that goes to these float32 ``sums``."""
    aligned_sums = sums is None or sums.stride(0) % 4 == 0
    return tile if layout != "strided" and aligned_sums else tile.pipelined


def describe_sums(sums: Tensor, tile: Tile) -> Any:
    """Float32 sums in the blocks in which warps that specialise store them; others do by pointers."""
    return describe(sums, [tile.m // tile.parts, tile.n // 4], tile) if tile.specialized else sums


def kernel_for(
    tile: Tile, kernel: Any, by_pointers: Arguments, by_descriptors: Arguments = ()
) -> tuple[Any, Arguments]:
    """``kernel`` and what else it takes to read ``by_pointers``; or its like for Hopper, which reads ``by_descriptors``
    alone.
    """
    return (getattr(specialized, kernel.__name__), by_descriptors) if tile.specialized else (kernel, by_pointers)


def describe(matrix: Tensor, block: list[int], tile: Tile) -> Any:
    """A descriptor of blocks of ``matrix``, for a product of such a tile."""
    return (hopper.describe_block if tile.specialized else TensorDescriptor.from_tensor)(matrix, block)


def describe_weight(weight: Tensor, layout: str, columns: int, hidden: int, tile: Tile) -> Any:
    """A weight, or its gradient, in blocks of so many columns of the vocab by hidden units."""
    if layout == "strided":
        return weight
    return describe(weight, [columns, hidden], tile) if layout == "vh" else describe(weight.T, [hidden, columns], tile)
