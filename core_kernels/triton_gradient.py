"""Launches of the fused loss's backward pass: from kept exponentials, or from the vocab projected again in slabs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
from torch import Tensor

from core_kernels.arguments import (
    Tensors,
    blocks,
    class_weights,
    describe,
    describe_sums,
    describe_weight,
    fitting,
    gradient_flags,
    group_tokens,
    kernel_for,
    layout_of,
    logit_options,
    loss_options,
    projection,
)
from core_kernels.kernels import products, rows, slab
from core_kernels.launching import launching
from core_kernels.plan import LINE, Plan
from core_kernels.triton_loss import HIDDEN_BLOCK, compact_valid_tokens, gather_rows, hidden_blocks

FACTOR_BLOCK, SLOT_BLOCK = 64, 1024
SORT_BLOCK, SORT_OTHERS = 16, 512
LABEL_ROWS, LABEL_BLOCK = 16, 512
BIAS_BLOCK = 64


def linear_gradient(plan: Plan, t: Tensors) -> None:
    """From the upstream gradient and what the loss saved: the gradients of the inputs that are wanted."""
    if plan.step.ahead:
        _scale_sums(plan, t)
        return
    if plan.step.keep:
        _gradient_of_kept(plan, t)
    else:
        _gradient_by_slabs(plan, t)


def _gradient_of_kept(plan: Plan, t: Tensors) -> None:
    tokens, matrix = plan.problem.tokens, t["exponentials"][:, : plan.problem.columns]
    factor_rows(plan, t, 0, tokens)
    if "grad_weight" in t:
        packed = _packed_rows(t)
        gather_rows(plan, t, packed, 0, t["row_soft"])
        sort_labels(plan, t, 0, tokens)
        weight_gradient(plan, t, matrix, packed, t["grad_weight"], (0, tokens), label_rows=t["rows"])
        finish_label_rows(plan, t, t["rows"], t["grad_weight"], tokens, by_slot=True)
    if "grad_x" in t:
        input_gradient(plan, t, matrix, t["rows"], (0, tokens))
        finish_rows(plan, t, t["rows"], t["grad_x"], 0, tokens, kept=True, by_token=True)


def _gradient_by_slabs(plan: Plan, t: Tensors) -> None:
    tokens, packed = plan.problem.tokens, _packed_rows(t)
    overlap = plan.tiles.overlap and "grad_x" in t and "grad_weight" in t
    compact_valid_tokens(plan, t)
    factor_rows(plan, t, 0, tokens)
    gather_rows(plan, t, packed, 0, None)
    for first, matrix in _slabs(plan, t):
        _slab_gradient(plan, t, packed, matrix, first)
        if "grad_bias" in t:
            _bias_gradient(t, matrix, first)
        if "grad_weight" in t:
            weight_gradient(plan, t, matrix, packed, t["grad_weight"], (0, tokens), first, overlap)
        if "grad_x" in t:
            input_gradient(plan, t, matrix, t["rows"], (0, tokens), first, overlap)
    if "grad_x" in t:
        finish_rows(plan, t, t["rows"], t["grad_x"], 0, tokens, kept=False, by_token=True)


def _slabs(plan: Plan, t: Tensors) -> Iterator[tuple[int, Tensor]]:
    """The first column of each slab, and its place, which is the next one's too.

    A transposed weight's gradient lends no place even where it could: it cannot in the other frontend, which is to have
    the same bits.
    """
    tokens, columns, first = plan.problem.tokens, plan.problem.columns, 0
    if plan.borrowed and t["weight"].stride(1) == 1 and layout_of(t["grad_weight"]) == "vh":
        unfilled = t["grad_weight"].view(-1)
        for width in plan.borrowed:
            start = (unfilled.numel() - tokens * width) // LINE * LINE
            yield first, unfilled[start : start + tokens * width].view(tokens, width)
            first += width
    while first < columns:
        yield first, t["slab"][:, : min(plan.slab, columns - first)]
        first += plan.slab


def _packed_rows(t: Tensors) -> Tensor:
    """Where the valid tokens' rows of ``x`` go: the gradient's own place, which is filled last, if that serves."""
    return t["packed_x"][:, : t["x"].shape[1]] if "packed_x" in t else t["grad_x"]


def factor_rows(plan: Plan, t: Tensors, first: int, ranks: int) -> None:
    """Factors of the logit gradients of ``ranks`` valid tokens from the ``first``-th."""
    launching(rows.row_factors, (triton.cdiv(ranks, FACTOR_BLOCK),))(
        t["labels"],
        t["valid_tokens"],
        t["valid_count"],
        *_row_factors(t),
        t.get("label_kept"),
        t.get("label_slot"),
        t.get("label_logit"),
        t.get("exponentials"),
        t["lse_base"],
        t["log_sum"],
        t.get("token_scale"),
        t.get("divisors"),
        *class_weights(t),
        t.get("grad_loss"),
        first,
        ranks,
        group_tokens(plan),
        plan.problem.vocab,
        plan.problem.columns,
        SLOTS=SLOT_BLOCK if "label_slot" in t else 0,
        KEPT="exponentials" in t,
        **logit_options(plan),
        **loss_options(plan),
        **gradient_flags(plan),
        BLOCK=FACTOR_BLOCK,
    )


def _row_factors(t: Tensors) -> tuple[Tensor | None, ...]:
    return t["row_target"], t.get("row_soft"), t.get("row_uniform")


def sort_labels(plan: Plan, t: Tensors, first: int, ranks: int) -> None:
    launching(rows.sort_labels, (triton.cdiv(ranks, SORT_BLOCK),))(
        t["labels"],
        t["valid_tokens"],
        t["valid_count"],
        t["sorted_labels"],
        t["sorted_tokens"],
        t["label_slot"],
        first,
        ranks,
        BLOCK=SORT_BLOCK,
        OTHERS=SORT_OTHERS,
    )


def _slab_gradient(plan: Plan, t: Tensors, packed: Tensor, matrix: Tensor, first: int) -> None:
    """Fill ``matrix`` with the gradient of the raw logits for its columns of the vocab, from the ``first``."""
    problem, weight, losses = plan.problem, t["weight"], loss_options(plan)
    layout = layout_of(weight)
    tile = fitting(plan.tiles.slab, layout)
    rows_of_part = tile.m // tile.parts
    kernel, strides = kernel_for(tile, slab.slab_gradient, weight.stride())
    launching(kernel, (plan.tiles.programs(tile),))(
        describe(packed, [rows_of_part, tile.k], tile),
        describe_weight(weight, layout, tile.n, tile.k, tile),
        t.get("bias"),
        t["labels"],
        t.get("class_weight"),
        t.get("first_class"),
        t["valid_tokens"],
        t["valid_count"],
        t["lse_base"],
        t["log_sum"],
        *_row_factors(t),
        describe(matrix, [rows_of_part, tile.n // 2], tile),
        problem.columns,
        problem.hidden,
        first,
        matrix.shape[1],
        plan.tiles.programs(tile),
        *strides,
        SHARDED=problem.shards is not None,
        CLASS_WEIGHT=losses["CLASS_WEIGHT"],
        SMOOTHING=losses["SMOOTHING"],
        Z_LOSS=plan.options.lse_square_scale > 0,
        **logit_options(plan),
        **projection(plan, tile, layout),
    )


def weight_gradient(
    plan: Plan,
    t: Tensors,
    matrix: Tensor,
    packed: Tensor,
    out: Tensor,
    ranks: tuple[int, int],
    first: int = 0,
    overlap: bool = False,
    label_rows: Tensor | None = None,
    sums: bool = False,
) -> None:
    """``matrix.T @ packed`` into ``out`` from its ``first`` row on: gradients, or float32 ``sums`` over all tokens.

    ``ranks`` are the first of the valid tokens, and how many: sums of those but the first are added.
    """
    layout = "sums" if sums else layout_of(out)
    tile = fitting(plan.tiles.grad_weight, layout, out if sums else None)
    rows_of_part = tile.m // tile.parts
    kernel, strides = kernel_for(tile, products.weight_gradient, out.stride())
    launching(kernel, (plan.tiles.programs(tile),))(
        describe(matrix, [tile.k, rows_of_part], tile),
        describe(packed, [tile.k, tile.n], tile),
        describe_sums(out, tile) if sums else describe_weight(out, layout, rows_of_part, tile.n // 2, tile),
        label_rows,
        None if label_rows is None else t["label_slot"],
        t["valid_count"],
        0 if label_rows is None else label_rows.stride(0),
        *ranks,
        first,
        matrix.shape[1],
        plan.problem.hidden,
        plan.tiles.programs(tile),
        *strides,
        LABELS=label_rows is not None,
        LAYOUT=layout,
        ADD=sums and ranks[0] > 0,
        OVERLAP=overlap,
        **blocks(tile),
    )


def finish_label_rows(plan: Plan, t: Tensors, label_rows: Tensor, out: Tensor, ranks: int, by_slot: bool) -> None:
    x = t["x"]
    launching(rows.finish_label_rows, (ranks, hidden_blocks(plan, LABEL_BLOCK)))(
        x,
        t["sorted_labels"],
        t["sorted_tokens"],
        t["row_target"],
        t["row_soft"],
        t["label_kept"],
        label_rows,
        out,
        *x.stride(),
        label_rows.stride(0),
        *out.stride(),
        ranks,
        plan.problem.hidden,
        BY_SLOT=by_slot,
        ROWS=LABEL_ROWS,
        BLOCK=LABEL_BLOCK,
        num_warps=2,
    )


def input_gradient(
    plan: Plan, t: Tensors, matrix: Tensor, out: Tensor, ranks: tuple[int, int], first: int = 0, overlap: bool = False
) -> None:
    """``matrix @ weight`` over the columns of the vocab from the ``first``, added to those before, for these ranks."""
    weight = t["weight"]
    layout = layout_of(weight)
    tile = fitting(plan.tiles.grad_x, layout, out)
    kernel, others = kernel_for(tile, products.input_gradient, (out.shape[0], out.stride(0), *weight.stride()))
    launch: dict[str, Any] = {"launch_pdl": True} if overlap else {}
    launching(kernel, (plan.tiles.programs(tile),))(
        describe(matrix, [tile.m // tile.parts, tile.k], tile),
        describe_weight(weight, layout, tile.k, tile.n, tile),
        describe_sums(out, tile),
        t["valid_count"],
        *ranks,
        first,
        matrix.shape[1],
        plan.problem.hidden,
        plan.split_tiles,
        plan.splits,
        plan.first_part,
        plan.tiles.programs(tile),
        *others,
        ADD=first > 0,
        SPLIT=plan.splits > 1,
        LAYOUT=layout,
        OVERLAP=overlap,
        **blocks(tile),
        **launch,
    )


def finish_rows(
    plan: Plan, t: Tensors, sums: Tensor, out: Tensor, first: int, ranks: int, kept: bool, by_token: bool
) -> None:
    """From sums of the rows of ``x``'s gradient to ``out``, for ``ranks`` tokens from the ``first``-th."""
    weight = t["weight"]
    launching(rows.finish_rows, (ranks, hidden_blocks(plan)))(
        sums,
        weight,
        t["labels"],
        t["valid_tokens"],
        t["valid_count"],
        t["row_target"],
        t.get("row_soft"),
        out,
        sums.stride(0),
        *weight.stride(),
        first,
        plan.split_tiles,
        plan.splits,
        plan.first_part,
        plan.problem.hidden,
        SPLIT=plan.splits > 1,
        KEPT=kept,
        BY_TOKEN=by_token,
        M=plan.tiles.grad_x.m,
        BLOCK=HIDDEN_BLOCK,
    )


def _bias_gradient(t: Tensors, matrix: Tensor, first: int) -> None:
    columns = matrix.shape[1]
    launching(products.bias_gradient, (triton.cdiv(columns, BIAS_BLOCK),))(
        matrix, t["grad_bias"], t["valid_count"], first, columns, matrix.stride(0), ROWS=BIAS_BLOCK, COLUMNS=BIAS_BLOCK
    )


def _scale_sums(plan: Plan, t: Tensors) -> None:
    """Gradients that the loss computed ahead, times the upstream gradient."""
    if "grad_x" in t:
        compact_valid_tokens(plan, t)
    for name, by_rank in (("x", True), ("weight", False)):
        if f"grad_{name}" in t:
            sums, out = t[f"sum_{name}"], t[f"grad_{name}"]
            launching(rows.scale_rows, (sums.shape[0], hidden_blocks(plan)))(
                sums,
                t["valid_position"] if by_rank else None,
                t["grad_loss"],
                out,
                sums.stride(0),
                *out.stride(),
                plan.problem.hidden,
                BY_RANK=by_rank,
                BLOCK=HIDDEN_BLOCK,
            )
