"""Launches of the fused loss's forward pass: statistics of the projected logits, and what becomes of them."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from core_kernels.arguments import (
    Tensors,
    class_weights,
    describe,
    describe_weight,
    even_k,
    fitting,
    kernel_for,
    layout_of,
    logit_options,
    loss_options,
    metric_flags,
    projection,
    token_results,
)
from core_kernels.kernels import argmax, finish, rows, statistics, tokens
from core_kernels.kernels import projection as project
from core_kernels.launching import launching
from core_kernels.plan import Plan
from core_kernels.step import SHARD_MAX, SHARD_SUM, SHARD_TARGET
from core_kernels.tiles import Tile

TOKEN_BLOCK, PARTS_BLOCK, PARTS_WARPS = 16, 128, 8  # tokens that one program finishes, and parts it reads at a time
REDUCE_BLOCK, REDUCE_WARPS = 4096, 16  # of a single program: few, wide steps, each of which waits for memory
FOUND_ROWS, FOUND_BLOCK = 4, 1024  # tokens whose argmax one program finds, and hidden units that it takes at a time
LABEL_TOKENS = 64  # whose labels' logits one program projects, at most
HIDDEN_BLOCK = 1024


def linear_loss(plan: Plan, t: Tensors) -> None:
    keep = plan.step.keep
    prepare_tokens(plan, t)
    if keep:
        gather_rows(plan, t, t["packed_x"], 0, None, t["exponentials"])
    project_tokens(plan, t, 0, plan.problem.tokens)
    if keep or plan.options.needs_argmax:
        repair_tokens(plan, t, 0, plan.problem.tokens)
    reduce_tokens(plan, t)


def prepare_tokens(plan: Plan, t: Tensors) -> None:
    compact_valid_tokens(plan, t)
    sum_class_weight(plan, t)
    _project_labels(plan, t)


def project_tokens(plan: Plan, t: Tensors, first: int, count: int) -> None:
    """Losses and metrics of ``count`` valid tokens from the ``first``-th; and their exponentials, if there is room.

    Rows of ``x`` that exponentials are kept of are packed already, and others here, if there is room for a launch's.
    """
    problem, kept = plan.problem, t.get("exponentials")
    x, weight = t["x"], t["weight"]
    packed = t["packed_x"][:, : problem.hidden] if "packed_x" in t else None
    layout = layout_of(weight)
    tile = fitting(plan.tiles.project if kept is None else plan.tiles.keep, layout)
    if packed is None:
        tile = tile.pipelined
    parts = triton.cdiv(problem.columns, tile.n)
    rows_of_part = tile.m // tile.parts
    kernel, strides = kernel_for(tile, statistics.project_statistics, (*x.stride(), *weight.stride()))
    flags = {} if tile.specialized else {"PACKED": packed is not None, "EVEN_K": even_k(plan, tile)}
    for start in range(first, first + count, plan.ranks):
        ranks = min(plan.ranks, first + count - start)
        if kept is None and packed is not None:
            gather_rows(plan, t, packed, start, None)
        launching(kernel, (plan.tiles.programs(tile),))(
            x if packed is None else describe(packed, [rows_of_part, tile.k], tile),
            describe_weight(weight, layout, tile.n, tile.k, tile),
            t.get("bias"),
            t.get("class_weight"),
            t["valid_tokens"],
            t["valid_count"],
            t["label_logit"],
            None if kept is None else describe(kept, [rows_of_part, tile.n // 2], tile),
            *_parts(t, "tile"),
            problem.columns,
            problem.hidden,
            start,
            ranks,
            0 if kept is None else start - first,
            plan.tiles.programs(tile),
            *strides,
            **logit_options(plan),
            KEEP=kept is not None,
            ARGMAX=plan.options.needs_argmax and not plan.step.finds_argmax,
            LARGEST=plan.step.finds_argmax,
            CLASS_WEIGHT=problem.has_class_weight,
            SMOOTHING=plan.options.label_smoothing > 0,
            **flags,
            **projection(plan, tile, layout),
        )
        if plan.step.finds_argmax:
            _find_columns(plan, t, start, ranks, start - first, tile, parts)
        _finish_tokens(plan, t, t["label_logit"], _parts(t, "tile"), start, ranks, ranks, parts)


def linear_shard(plan: Plan, t: Tensors) -> None:
    problem, tile = plan.problem, plan.tiles.project.pipelined
    x, weight = t["x"], t["weight"]
    layout = layout_of(weight)
    compact_valid_tokens(plan, t)
    launching(statistics.shard_statistics, (triton.cdiv(problem.tokens, tile.m) * plan.strips,))(
        x,
        describe_weight(weight, layout, tile.n, tile.k, tile),
        t.get("bias"),
        t["labels"],
        t.get("class_weight"),
        t["first_class"],
        t["valid_tokens"],
        t["valid_count"],
        t["label_logit"],
        *_parts(t, "strip"),
        *x.stride(),
        *weight.stride(),
        problem.tokens,
        problem.columns,
        problem.hidden,
        plan.strips,
        **logit_options(plan),
        ARGMAX=plan.options.needs_argmax,
        CLASS_WEIGHT=problem.has_class_weight,
        SMOOTHING=plan.options.label_smoothing > 0,
        EVEN_K=even_k(plan, tile),
        **projection(plan, tile, layout),
    )
    launching(finish.finish_shard, (triton.cdiv(problem.tokens, TOKEN_BLOCK),))(
        t["labels"],
        t["first_class"],
        t["valid_position"],
        t["label_logit"],
        *_parts(t, "strip"),
        *_shard_statistics(plan, t["shard_statistics"]),
        problem.tokens,
        problem.columns,
        plan.strips,
        ARGMAX=plan.options.needs_argmax,
        SMOOTHING=plan.options.label_smoothing > 0,
        BLOCK=TOKEN_BLOCK,
        PARTS=PARTS_BLOCK,
        num_warps=PARTS_WARPS,
    )


def linear_combine(plan: Plan, t: Tensors) -> None:
    known = t["shard_statistics"]
    shards, rows, n = known.shape
    row_max, row_sum, target, row_smooth, row_argmax = _shard_statistics(plan, known[0])
    sum_class_weight(plan, t)
    _finish_tokens(plan, t, target, (row_max, row_sum, row_smooth, row_argmax), 0, n, rows * n, shards)
    reduce_tokens(plan, t)


def hidden_blocks(plan: Plan, block: int = HIDDEN_BLOCK) -> int:
    """Into how many programs a kernel over rows splits each."""
    assert plan.problem.hidden is not None
    return triton.cdiv(plan.problem.hidden, block)


def gather_rows(
    plan: Plan, t: Tensors, packed: Tensor, first: int, scale: Tensor | None, cleared: Tensor | None = None
) -> None:
    """Pack the rows of ``x`` of as many valid tokens as ``packed`` has room for, from the ``first``-th.

    Rows of ``cleared`` with no such token become zero.
    """
    x = t["x"]
    launching(rows.gather_rows, (packed.shape[0], hidden_blocks(plan)))(
        x,
        t["valid_tokens"],
        t["valid_count"],
        scale,
        packed,
        cleared,
        *x.stride(),
        packed.stride(0),
        0 if cleared is None else cleared.stride(0),
        first,
        plan.problem.hidden,
        0 if cleared is None else cleared.shape[1],
        SCALED=scale is not None,
        CLEAR=cleared is not None,
        BLOCK=HIDDEN_BLOCK,
    )


def compact_valid_tokens(plan: Plan, t: Tensors) -> None:
    launching(tokens.compact_valid_tokens, (1,))(
        t["labels"],
        t["valid_tokens"],
        t.get("valid_position"),
        t["valid_count"],
        plan.problem.tokens,
        plan.problem.vocab,
        plan.options.ignore_index,
        POSITION="valid_position" in t,
        BLOCK=REDUCE_BLOCK,
        num_warps=REDUCE_WARPS,
    )


def sum_class_weight(plan: Plan, t: Tensors) -> None:
    if "class_weight_sum" in t:
        launching(tokens.sum_class_weight, (1,))(
            t["class_weight"], t["class_weight_sum"], plan.problem.vocab, BLOCK=REDUCE_BLOCK, num_warps=REDUCE_WARPS
        )


def reduce_tokens(plan: Plan, t: Tensors) -> None:
    if plan.options.per_token:
        return
    launching(tokens.reduce_tokens, (math.prod(plan.problem.groups),))(
        t["labels"],
        t["token_loss"],
        t["token_z_loss"],
        t.get("token_correct"),
        t.get("class_weight"),
        t["loss"],
        t.get("z_loss"),
        t.get("token_accuracy"),
        t.get("num_valid"),
        t.get("num_correct"),
        t.get("divisors"),
        plan.problem.group_tokens,
        plan.problem.vocab,
        plan.options.ignore_index,
        MEAN=plan.options.reduction == "mean",
        Z_OUTPUT=plan.options.return_z_loss,
        ACCURACY=plan.options.return_token_accuracy,
        COUNTS=plan.options.return_counts,
        CLASS_WEIGHT=plan.problem.has_class_weight,
        BLOCK=REDUCE_BLOCK,
        num_warps=REDUCE_WARPS,
    )


def _project_labels(plan: Plan, t: Tensors) -> None:
    tile = plan.tiles.keep if "exponentials" in t else plan.tiles.project
    block = min(tile.m, LABEL_TOKENS)
    launching(project.project_labels, (triton.cdiv(plan.problem.tokens, block),))(
        t["x"],
        t["weight"],
        t.get("bias"),
        t["labels"],
        t["valid_tokens"],
        t["valid_count"],
        t["label_logit"],
        *t["x"].stride(),
        *t["weight"].stride(),
        plan.problem.tokens,
        plan.problem.hidden,
        **logit_options(plan),
        BIAS=plan.problem.has_bias,
        EVEN_K=even_k(plan, tile),
        M=block,
        K=tile.k,
        num_warps=4,
        num_stages=tile.stages,
    )


def _finish_tokens(
    plan: Plan,
    t: Tensors,
    label_logit: Tensor | None,
    parts: tuple[Tensor | None, ...],
    first: int,
    ranks: int,
    stride: int,
    count: int,
) -> None:
    """Losses and metrics of ``ranks`` tokens from the ``first``-th, from ``count`` parts of the vocab, whose rows of
    tokens lie ``stride`` apart.
    """
    launching(finish.finish_tokens, (triton.cdiv(ranks, TOKEN_BLOCK),))(
        t["labels"],
        t.get("valid_tokens"),
        t.get("valid_count"),
        label_logit,
        *parts,
        t.get("row_argmax"),
        *class_weights(t),
        *token_results(plan, t),
        plan.problem.vocab,
        first,
        ranks,
        stride,
        count,
        plan.options.ignore_index,
        SHARDS=plan.step.kind == "combine",
        RELATIVE="exponentials" in t,
        **loss_options(plan),
        **metric_flags(plan),
        BLOCK=TOKEN_BLOCK,
        PARTS=PARTS_BLOCK,
        num_warps=PARTS_WARPS,
    )


def _find_columns(plan: Plan, t: Tensors, first: int, ranks: int, first_row: int, tile: Tile, vocab_tiles: int) -> None:
    """The argmax of ``ranks`` valid tokens from the ``first``-th, whose exponentials begin at the ``first_row``."""
    exponentials = t["exponentials"]
    options = logit_options(plan)
    launching(argmax.find_columns, (triton.cdiv(ranks, FOUND_ROWS),))(
        t["x"],
        t["weight"],
        t["valid_tokens"],
        t["valid_count"],
        exponentials,
        t["tile_max"],
        t["row_argmax"],
        *t["x"].stride(),
        *t["weight"].stride(),
        exponentials.stride(0),
        plan.problem.columns,
        plan.problem.hidden,
        first,
        ranks,
        first_row,
        vocab_tiles,
        options["logit_scale"],
        HAS_SCALE=options["HAS_SCALE"],
        N=tile.n,
        ROWS=FOUND_ROWS,
        TILES=triton.next_power_of_2(vocab_tiles),
        BLOCK=FOUND_BLOCK,
    )


def repair_tokens(plan: Plan, t: Tensors, first: int, count: int) -> None:
    problem, tile = plan.problem, plan.tiles.slab.pipelined
    x, weight = t["x"], t["weight"]
    layout = layout_of(weight)
    flags = projection(plan, tile, layout)
    del flags["GROUP"]
    launching(statistics.repair_tokens, (triton.cdiv(count, tile.m),))(
        x,
        describe_weight(weight, layout, tile.n, tile.k, tile),
        t.get("bias"),
        t["labels"],
        *class_weights(t),
        t["valid_tokens"],
        t["valid_count"],
        *token_results(plan, t),
        t.get("exponentials"),
        t.get("row_argmax"),
        *x.stride(),
        *weight.stride(),
        t["exponentials"].stride(0) if "exponentials" in t else 0,
        first,
        count,
        problem.vocab,
        problem.hidden,
        plan.options.ignore_index,
        **logit_options(plan),
        **loss_options(plan),
        **metric_flags(plan),
        KEEP="exponentials" in t,
        EVEN_K=even_k(plan, tile),
        **flags,
    )


def _parts(t: Tensors, part: str) -> tuple[Tensor | None, ...]:
    return tuple(t.get(f"{part}_{name}") for name in ("max", "sum", "smooth", "argmax"))


def _shard_statistics(plan: Plan, rows: Tensor) -> tuple[Tensor | None, ...]:
    """A shard's statistics by row: maximum, sum, the label's logit, and the smoothing's sum and argmax if needed."""
    step, floats = plan.step, rows.view(torch.float32)
    return (
        floats[SHARD_MAX],
        floats[SHARD_SUM],
        floats[SHARD_TARGET],
        floats[step.shard_smooth] if plan.options.label_smoothing > 0 else None,
        rows[step.shard_argmax] if plan.options.needs_argmax else None,
    )
