"""Runs plans with the Triton kernels. Here: where they run, and cross entropy over given logits."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
import triton

from core_kernels.arguments import (
    Tensors,
    class_weights,
    gradient_flags,
    group_tokens,
    logit_options,
    loss_options,
    metric_flags,
    token_results,
)
from core_kernels.engine import interpreting
from core_kernels.kernels import cross_entropy
from core_kernels.launching import launching, run_recorded
from core_kernels.plan import Plan
from core_kernels.tiles import Row
from core_kernels.triton_ahead import linear_loss_and_gradient
from core_kernels.triton_gradient import linear_gradient
from core_kernels.triton_loss import linear_combine, linear_loss, linear_shard, reduce_tokens, sum_class_weight

# The interpreter replaces parts of triton.language process-wide while a kernel runs, so only one may run at a time.
_INTERPRETER_LOCK = threading.RLock()


def run(operation: Callable[[Plan, Tensors], None], plan: Plan, tensors: Tensors) -> None:
    """On the tensors' device. One thread at a time where kernels are interpreted; on a GPU no lock but to load one."""
    if interpreting():
        with _INTERPRETER_LOCK, torch.no_grad(), np.errstate(all="ignore"):  # masked lanes overflow, as on a GPU
            operation(plan, plan.with_workspace(tensors))
    else:
        with torch.cuda.device(tensors["labels"].device):
            run_recorded(operation, plan, tensors)


def cross_entropy_loss(plan: Plan, t: Tensors) -> None:
    logits = t["logits"]
    sum_class_weight(plan, t)
    launching(cross_entropy.cross_entropy_forward, (plan.problem.tokens,))(
        logits,
        t["labels"],
        *class_weights(t),
        *token_results(plan, t),
        *logits.stride(),
        plan.problem.vocab,
        plan.options.ignore_index,
        **logit_options(plan),
        **loss_options(plan),
        **metric_flags(plan),
        **_row_blocks(plan, plan.tiles.forward),
    )
    reduce_tokens(plan, t)


def cross_entropy_gradient(plan: Plan, t: Tensors) -> None:
    logits = t["logits"]
    launching(cross_entropy.cross_entropy_backward, (plan.problem.tokens,))(
        logits,
        t["labels"],
        *class_weights(t),
        t["lse_base"],
        t["log_sum"],
        t.get("token_scale"),
        t.get("divisors"),
        t["grad_loss"],
        t["grad_logits"],
        *logits.stride(),
        group_tokens(plan),
        plan.problem.vocab,
        plan.options.ignore_index,
        **logit_options(plan),
        **loss_options(plan),
        **gradient_flags(plan),
        **_row_blocks(plan, plan.tiles.backward),
    )


def _row_blocks(plan: Plan, row: Row) -> dict[str, int]:
    return {"BLOCK": min(row.block, triton.next_power_of_2(plan.problem.vocab)), "num_warps": row.warps}


def _linear_loss(plan: Plan, t: Tensors) -> None:
    (linear_loss_and_gradient if plan.step.ahead else linear_loss)(plan, t)


LOGITS = {"loss": cross_entropy_loss, "gradient": cross_entropy_gradient}
LINEAR = {"loss": _linear_loss, "shard": linear_shard, "combine": linear_combine, "gradient": linear_gradient}
