"""Launches of the fused loss that computes its gradients ahead, where the exponentials of all tokens would not fit.

They are made, used and forgotten a chunk of tokens at a time; what stays are sums in float32, which the backward pass
multiplies by the upstream gradient and rounds.
"""

from __future__ import annotations

from core_kernels.arguments import Tensors
from core_kernels.kernels import tokens
from core_kernels.launching import launching
from core_kernels.plan import Plan
from core_kernels.triton_gradient import (
    factor_rows,
    finish_label_rows,
    finish_rows,
    input_gradient,
    sort_labels,
    weight_gradient,
)
from core_kernels.triton_loss import (
    REDUCE_BLOCK,
    REDUCE_WARPS,
    gather_rows,
    prepare_tokens,
    project_tokens,
    reduce_tokens,
    repair_tokens,
)


def linear_loss_and_gradient(plan: Plan, t: Tensors) -> None:
    problem = plan.problem
    prepare_tokens(plan, t)
    if "divisors" in t:
        _mean_divisors(plan, t)
    for first in range(0, problem.tokens, plan.chunk):
        ranks = min(plan.chunk, problem.tokens - first)
        packed = t["packed_x"][:, : problem.hidden]
        gather_rows(plan, t, packed, first, None)
        project_tokens(plan, t, first, ranks)
        repair_tokens(plan, t, first, ranks)
        factor_rows(plan, t, first, ranks)
        _add_gradients(plan, t, first, ranks)
    reduce_tokens(plan, t)


def _add_gradients(plan: Plan, t: Tensors, first: int, ranks: int) -> None:
    problem = plan.problem
    matrix = t["exponentials"][:, : problem.columns]
    if "sum_x" in t:
        sums = t["sum_x"][first : first + ranks]
        input_gradient(plan, t, matrix, sums, (first, ranks))
        finish_rows(plan, t, sums, sums, first, ranks, kept=True, by_token=False)
    if "sum_weight" in t:
        packed, sums = t["packed_x"][:, : problem.hidden], t["sum_weight"]
        gather_rows(plan, t, packed, first, t["row_soft"])
        sort_labels(plan, t, first, ranks)
        weight_gradient(plan, t, matrix, packed, sums, (first, ranks), sums=True)
        finish_label_rows(plan, t, sums, sums, ranks, by_slot=False)


def _mean_divisors(plan: Plan, t: Tensors) -> None:
    launching(tokens.mean_divisors, (1,))(
        t["labels"],
        t.get("class_weight"),
        t["divisors"],
        plan.problem.tokens,
        plan.problem.vocab,
        plan.options.ignore_index,
        CLASS_WEIGHT=plan.problem.has_class_weight,
        BLOCK=REDUCE_BLOCK,
        num_warps=REDUCE_WARPS,
    )
