"""Runs plans with the Triton kernels: which kernels, over which grids, on which buffers."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from core_kernels.engine import interpreting
from core_kernels.kernels import cross_entropy, linear, products, tokens
from core_kernels.plan import Plan
from core_kernels.step import SHARD_MAX, SHARD_SUM, SHARD_TARGET

Tensors = Mapping[str, Tensor]

TOKEN_BLOCK = 32  # tokens that one program finishes: small, so that many programs read the strips
REDUCE_BLOCK = 1024
HIDDEN_BLOCK = 1024
BIAS_BLOCK = 64

# The interpreter replaces parts of triton.language process-wide while a kernel runs, so only one may run at a time.
_INTERPRETER_LOCK = threading.RLock()


@contextlib.contextmanager
def guard(device: torch.device) -> Iterator[None]:
    """Launch on ``device``; one thread at a time where kernels are interpreted, and never a lock on a GPU."""
    if interpreting():
        with _INTERPRETER_LOCK, np.errstate(all="ignore"):  # masked lanes overflow, as they do on a GPU
            yield
    else:
        with torch.cuda.device(device):
            yield


def cross_entropy_loss(plan: Plan, t: Tensors) -> None:
    logits = t["logits"]
    _sum_class_weight(plan, t)
    cross_entropy.cross_entropy_forward[(plan.problem.tokens,)](
        logits,
        t["labels"],
        *_class_weight(t),
        *_token_buffers(plan, t),
        *logits.stride(),
        plan.problem.vocab,
        plan.options.ignore_index,
        **_logit_options(plan),
        **_loss_options(plan),
        **_metric_flags(plan),
        BLOCK=_row_block(plan),
        num_warps=8,
    )
    _reduce_tokens(plan, t)


def cross_entropy_gradient(plan: Plan, t: Tensors) -> None:
    logits = t["logits"]
    cross_entropy.cross_entropy_backward[(plan.problem.tokens,)](
        logits,
        t["labels"],
        *_class_weight(t),
        t["row_max"],
        t["log_sum"],
        t.get("token_scale"),
        t.get("divisors"),
        t["grad_loss"],
        t["grad_logits"],
        *logits.stride(),
        _group_tokens(plan),
        plan.problem.vocab,
        plan.options.ignore_index,
        **_logit_options(plan),
        **_loss_options(plan),
        **_gradient_flags(plan),
        BLOCK=_row_block(plan),
        num_warps=8,
    )


def linear_loss(plan: Plan, t: Tensors) -> None:
    _strip_statistics(plan, t)
    strips = [t.get(name) for name in ("target_logit", "strip_max", "strip_sum", "strip_smooth", "strip_argmax")]
    _finish_tokens(plan, t, t["valid_position"], strips, plan.problem.tokens, plan.strips)


def linear_shard(plan: Plan, t: Tensors) -> None:
    n = plan.problem.tokens
    _strip_statistics(plan, t)
    linear.finish_shard[(triton.cdiv(n, TOKEN_BLOCK),)](
        t["labels"],
        t["first_class"],
        t["valid_position"],
        t["target_logit"],
        t["strip_max"],
        t["strip_sum"],
        t.get("strip_smooth"),
        t.get("strip_argmax"),
        *_shard_statistics(plan, t["shard_statistics"]),
        n,
        plan.problem.columns,
        plan.strips,
        ARGMAX=plan.options.needs_argmax,
        SMOOTHING=plan.options.label_smoothing > 0,
        BLOCK=TOKEN_BLOCK,
        num_warps=1,
    )


def linear_combine(plan: Plan, t: Tensors) -> None:
    statistics = t["shard_statistics"]
    shards, rows, n = statistics.shape
    row_max, row_sum, target, smooth, argmax = _shard_statistics(plan, statistics[0])
    _finish_tokens(plan, t, None, [target, row_max, row_sum, smooth, argmax], rows * n, shards)


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


def _compact_valid_tokens(plan: Plan, t: Tensors) -> None:
    tokens.compact_valid_tokens[(1,)](
        t["labels"],
        t["valid_tokens"],
        t["valid_position"],
        t["valid_count"],
        plan.problem.tokens,
        plan.problem.vocab,
        plan.options.ignore_index,
        BLOCK=REDUCE_BLOCK,
    )


def _strip_statistics(plan: Plan, t: Tensors) -> None:
    problem, strips = plan.problem, plan.strips
    x, weight = t["x"], t["weight"]
    _compact_valid_tokens(plan, t)
    linear.strip_statistics[(triton.cdiv(problem.tokens, plan.tile.m) * strips,)](
        x,
        weight,
        t.get("bias"),
        t["labels"],
        t.get("class_weight"),
        t.get("first_class"),
        t["valid_tokens"],
        t["valid_count"],
        t["target_logit"],
        t["strip_max"],
        t["strip_sum"],
        t.get("strip_smooth"),
        t.get("strip_argmax"),
        *x.stride(),
        *weight.stride(),
        problem.tokens,
        problem.columns,
        problem.hidden,
        strips,
        **_logit_options(plan),
        SHARDED=problem.shards is not None,
        ARGMAX=plan.options.needs_argmax,
        CLASS_WEIGHT=problem.has_class_weight,
        SMOOTHING=plan.options.label_smoothing > 0,
        **_projection(plan),
    )


def _finish_tokens(
    plan: Plan, t: Tensors, valid_position: Tensor | None, statistics: list[Tensor | None], stride: int, strips: int
) -> None:
    """Losses and metrics from statistics of ``strips`` of the vocab, whose rows of tokens lie ``stride`` apart."""
    n = plan.problem.tokens
    _sum_class_weight(plan, t)
    linear.finish_tokens[(triton.cdiv(n, TOKEN_BLOCK),)](
        t["labels"],
        valid_position,
        *statistics,
        *_class_weight(t),
        *_token_buffers(plan, t),
        n,
        plan.problem.vocab,
        stride,
        strips,
        plan.options.ignore_index,
        SHARDS=valid_position is None,
        **_loss_options(plan),
        **_metric_flags(plan),
        BLOCK=TOKEN_BLOCK,
        num_warps=1,
    )
    _reduce_tokens(plan, t)


def linear_gradient(plan: Plan, t: Tensors) -> None:
    n, columns_of_all, hidden = plan.problem.tokens, plan.problem.columns, plan.problem.hidden
    _compact_valid_tokens(plan, t)
    if "grad_weight" in t:
        products.gather_valid_rows[(n, triton.cdiv(hidden, HIDDEN_BLOCK))](
            t["x"],
            t["valid_tokens"],
            t["valid_count"],
            t["valid_x"],
            *t["x"].stride(),
            hidden,
            t["valid_x"].stride(0),
            BLOCK=HIDDEN_BLOCK,
        )
    for first in range(0, columns_of_all, plan.slab):
        columns = min(plan.slab, columns_of_all - first)
        _slab_gradient(plan, t, first, columns)
        _multiply_slab(plan, t, first, columns)
    if "grad_x" in t:
        products.scatter_input_gradient[(n, triton.cdiv(hidden, HIDDEN_BLOCK))](
            t["grad_rows"], t["valid_position"], t["grad_x"], hidden, BLOCK=HIDDEN_BLOCK
        )


def _slab_gradient(plan: Plan, t: Tensors, first: int, columns: int) -> None:
    """Fill the slab with the gradient of the raw logits for ``columns`` columns from ``first``."""
    n, tile = plan.problem.tokens, plan.tile
    linear.slab_gradient[(triton.cdiv(n, tile.m) * triton.cdiv(columns, tile.n),)](
        t["x"],
        t["weight"],
        t.get("bias"),
        t["labels"],
        *_class_weight(t),
        t.get("first_class"),
        t["valid_tokens"],
        t["valid_count"],
        t["row_max"],
        t["log_sum"],
        t.get("token_scale"),
        t.get("divisors"),
        t["grad_loss"],
        t["slab"],
        *t["x"].stride(),
        *t["weight"].stride(),
        _group_tokens(plan),
        n,
        plan.problem.vocab,
        plan.problem.hidden,
        first,
        columns,
        t["slab"].stride(0),
        SHARDED=plan.problem.shards is not None,
        **_logit_options(plan),
        **_loss_options(plan),
        **_gradient_flags(plan),
        **_projection(plan),
    )


def _multiply_slab(plan: Plan, t: Tensors, first: int, columns: int) -> None:
    """Take the slab into every gradient that is wanted."""
    n, hidden, tile = plan.problem.tokens, plan.problem.hidden, plan.tile
    slab, valid_count, stride = t["slab"], t["valid_count"], t["slab"].stride(0)
    hidden_tiles = triton.cdiv(hidden, tile.n)
    if "grad_x" in t:
        products.add_input_gradient[(triton.cdiv(n, tile.m) * hidden_tiles,)](
            slab,
            t["weight"],
            t["grad_rows"],
            valid_count,
            *t["weight"].stride(),
            hidden,
            first,
            columns,
            stride,
            FIRST=first == 0,
            **_blocks(plan),
        )
    if "grad_weight" in t:
        products.weight_gradient[(triton.cdiv(columns, tile.m) * hidden_tiles,)](
            TensorDescriptor.from_tensor(slab, [tile.k, tile.m]),
            TensorDescriptor.from_tensor(t["valid_x"], [tile.k, tile.n]),
            t["grad_weight"],
            valid_count,
            *t["grad_weight"].stride(),
            hidden,
            first,
            columns,
            **_blocks(plan),
        )
    if "grad_bias" in t:
        products.bias_gradient[(triton.cdiv(columns, BIAS_BLOCK),)](
            slab, t["grad_bias"], valid_count, first, columns, stride, ROWS=BIAS_BLOCK, COLUMNS=BIAS_BLOCK
        )


def _sum_class_weight(plan: Plan, t: Tensors) -> None:
    if "class_weight_sum" in t:
        tokens.sum_class_weight[(1,)](
            t["class_weight"], t["class_weight_sum"], plan.problem.vocab, BLOCK=REDUCE_BLOCK
        )


def _reduce_tokens(plan: Plan, t: Tensors) -> None:
    if plan.options.per_token:
        return
    tokens.reduce_tokens[(math.prod(plan.problem.groups),)](
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
    )


def _class_weight(t: Tensors) -> tuple[Tensor | None, Tensor | None]:
    return t.get("class_weight"), t.get("class_weight_sum")


def _token_buffers(plan: Plan, t: Tensors) -> tuple[Tensor | None, ...]:
    """Where a token's results go: straight to the outputs, or to the workspace to be reduced from there."""
    if plan.options.per_token:
        results = t["loss"], t.get("z_loss"), t.get("token_accuracy")
    else:
        results = t["token_loss"], t["token_z_loss"], t.get("token_correct")
    counts = t.get("num_valid"), t.get("num_correct")
    return *results, *counts, t.get("predicted_tokens"), t["row_max"], t["log_sum"], t.get("token_scale")


def _group_tokens(plan: Plan) -> int:
    """How many tokens share an upstream gradient."""
    return 1 if plan.options.per_token else plan.problem.group_tokens


def _row_block(plan: Plan) -> int:
    return min(plan.tile.row, triton.next_power_of_2(plan.problem.vocab))


def _logit_options(plan: Plan) -> dict[str, Any]:
    return {
        "logit_scale": plan.options.logit_scale,
        "softcap": plan.options.softcap or 1.0,
        "HAS_SCALE": plan.options.logit_scale != 1.0,
        "HAS_SOFTCAP": plan.options.softcap is not None,
    }


def _loss_options(plan: Plan) -> dict[str, Any]:
    return {
        "smoothing": plan.options.label_smoothing,
        "lse_square_scale": plan.options.lse_square_scale,
        "TOKEN_SCALING": plan.options.use_token_scaling,
        "CLASS_WEIGHT": plan.problem.has_class_weight,
        "SMOOTHING": plan.options.label_smoothing > 0,
    }


def _metric_flags(plan: Plan) -> dict[str, Any]:
    return {
        "PER_TOKEN": plan.options.per_token,
        "Z_OUTPUT": plan.options.return_z_loss,
        "ACCURACY": plan.options.return_token_accuracy,
        "COUNTS": plan.options.return_counts,
        "PREDICTED": plan.options.return_predicted_tokens,
    }


def _gradient_flags(plan: Plan) -> dict[str, Any]:
    return {"MEAN": plan.options.reduction == "mean", "Z_LOSS": plan.options.lse_square_scale > 0}


def _blocks(plan: Plan) -> dict[str, Any]:
    tile = plan.tile
    return {
        "M": tile.m,
        "N": tile.n,
        "K": tile.k,
        "GROUP": tile.group,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _projection(plan: Plan) -> dict[str, Any]:
    assert plan.problem.hidden is not None
    return {"BIAS": plan.problem.has_bias, "EVEN_K": plan.problem.hidden % plan.tile.k == 0, **_blocks(plan)}


LOGITS = {"loss": cross_entropy_loss, "gradient": cross_entropy_gradient}
LINEAR = {"loss": linear_loss, "shard": linear_shard, "combine": linear_combine, "gradient": linear_gradient}
