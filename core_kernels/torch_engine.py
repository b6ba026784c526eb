"""Runs plans with plain torch operations, for machines without a GPU: the same slices, no Triton.

Every function works on one slab of float32 logits at a time, in the plan's workspace; beside it torch allocates
temporaries: a float32 copy of ``x``, and up to three of the slab's size where options ask for them. Rows of tokens that
are not valid are zeroed on the way in, so that nothing in them reaches a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from core_kernels.options import Options
from core_kernels.plan import Plan
from core_kernels.step import SHARD_MAX, SHARD_SUM, SHARD_TARGET

Tensors = Mapping[str, Tensor]

NAN_CLASS = torch.iinfo(torch.int32).min


def run(operation: Callable[[Plan, Tensors], None], plan: Plan, tensors: Tensors) -> None:
    """Under a caller's autocast too, products are float32."""
    with torch.no_grad(), torch.autocast(tensors["labels"].device.type, enabled=False):
        operation(plan, plan.with_workspace(tensors))


def cross_entropy_loss(plan: Plan, t: Tensors) -> None:
    valid = _valid(plan, t["labels"])
    labels = _safe_labels(t["labels"], valid)
    parts = []
    for first, last in _slices(plan.problem.tokens, plan.slab):
        z = _final_logits_of_rows(plan, t, valid, first, last)
        parts.append(_RowStatistics.of(z, labels[first:last], 0, plan.options, t.get("class_weight")))
    _finish_tokens(plan, t, valid, labels, _RowStatistics.stack(parts))


def cross_entropy_gradient(plan: Plan, t: Tensors) -> None:
    valid = _valid(plan, t["labels"])
    labels = _safe_labels(t["labels"], valid)
    factors = _gradient_factors(plan, t, valid, labels)
    for first, last in _slices(plan.problem.tokens, plan.slab):
        z = _final_logits_of_rows(plan, t, valid, first, last)
        rows = [factor[first:last] for factor in factors]
        g = _logits_gradient(plan, t, z, labels[first:last], 0, *rows)
        t["grad_logits"][first:last].copy_(g.masked_fill_(~valid[first:last, None], 0.0))


def linear_loss(plan: Plan, t: Tensors) -> None:
    valid = _valid(plan, t["labels"])
    labels = _safe_labels(t["labels"], valid)
    _finish_tokens(plan, t, valid, labels, _statistics_of_columns(plan, t, valid, labels))


def linear_shard(plan: Plan, t: Tensors) -> None:
    valid = _valid(plan, t["labels"])
    rows = _statistics_of_columns(plan, t, valid, _safe_labels(t["labels"], valid))
    out = t["shard_statistics"]
    out[SHARD_MAX].copy_(_bits(rows.maximum))
    out[SHARD_SUM].copy_(_bits(rows.total))
    out[SHARD_TARGET].copy_(_bits(rows.target))
    if rows.smooth is not None:
        out[plan.step.shard_smooth].copy_(_bits(rows.smooth + rows.weight * rows.base))
    if rows.argmax is not None:  # a NaN's class is told by its sign
        out[plan.step.shard_argmax].copy_(torch.where(rows.top.isnan(), rows.argmax + NAN_CLASS, rows.argmax))


def linear_combine(plan: Plan, t: Tensors) -> None:
    valid = _valid(plan, t["labels"])
    zeros = torch.zeros_like(valid, dtype=torch.float32)
    statistics = None
    for shard in t["shard_statistics"].unbind(0):
        top, argmax = _floats(shard[SHARD_MAX]), None
        if plan.options.needs_argmax:
            argmax = shard[plan.step.shard_argmax].long()
            top = torch.where(argmax < 0, float("nan"), top)
            argmax = torch.where(argmax < 0, argmax - NAN_CLASS, argmax)
        part = _RowStatistics(
            maximum=_floats(shard[SHARD_MAX]),
            total=_floats(shard[SHARD_SUM]),
            target=_floats(shard[SHARD_TARGET]),
            argmax=argmax,
            top=top,
            smooth=_floats(shard[plan.step.shard_smooth]) if plan.options.label_smoothing > 0 else None,
            base=zeros,
            weight=0.0,
        )
        statistics = part if statistics is None else statistics.merge(part)
    assert statistics is not None
    statistics.weight = t["class_weight"].float().sum() if "class_weight" in t else float(plan.problem.vocab)
    _finish_tokens(plan, t, valid, _safe_labels(t["labels"], valid), statistics)


def linear_gradient(plan: Plan, t: Tensors) -> None:
    valid = _valid(plan, t["labels"])
    labels = _safe_labels(t["labels"], valid)
    rows = _valid_rows(t["x"], valid)
    factors = _gradient_factors(plan, t, valid, labels)
    for first, last in _slices(plan.problem.columns, plan.slab):
        z = _final_logits_of_columns(plan, t, rows, first, last)
        g = _logits_gradient(plan, t, z, labels, _class(t, first), *factors).masked_fill_(~valid[:, None], 0.0)
        if "grad_x" in t:
            weight = t["weight"][first:last].float()
            if first == 0:
                torch.mm(g, weight, out=t["grad_rows"])
            else:
                t["grad_rows"].addmm_(g, weight)
        if "grad_weight" in t:
            t["grad_weight"][first:last].copy_(g.T @ rows)
        if "grad_bias" in t:
            t["grad_bias"][first:last].copy_(g.sum(0))
    if "grad_x" in t:
        t["grad_x"].copy_(t["grad_rows"].masked_fill_(~valid[:, None], 0.0))


@dataclass
class _RowStatistics:
    """What a loss needs of each row of final logits: ``lse = maximum + log(total)``, kept apart so as not to round."""

    maximum: Tensor
    total: Tensor  # sum of exp(z - maximum)
    target: Tensor  # the label's logit, 0 where the label is in another slice
    argmax: Tensor | None
    top: Tensor  # the value at argmax: the maximum, or NaN
    smooth: Tensor | None  # sum of w_v (z_v - base)
    base: Tensor
    weight: Tensor | float  # sum of w_v

    @classmethod
    def of(
        cls, z: Tensor, labels: Tensor, first: int | Tensor, options: Options, class_weight: Tensor | None
    ) -> _RowStatistics:
        """Statistics of the classes from ``first`` that ``z`` holds; overwrites ``z``."""
        columns = z.shape[1]
        here = (labels >= first) & (labels < first + columns)
        index = (labels - first).clamp(0, columns - 1)
        target = torch.where(here, z.gather(1, index[:, None])[:, 0], 0.0)
        if options.needs_argmax:
            top, argmax = z.max(1)  # the lowest index on a tie, the first NaN
            argmax += first
        else:
            top, argmax = z.amax(1), None
        maximum = torch.where(top.isnan(), float("-inf"), top)
        base = _finite_or_zero(maximum)
        z.sub_(base[:, None])
        smooth: Tensor | None = None
        weight: Tensor | float = float(columns)
        if options.label_smoothing > 0:
            if class_weight is None:
                smooth = z.sum(1)
            else:
                smooth, weight = (z * class_weight.float()).sum(1), class_weight.float().sum()
        return cls(maximum, z.exp_().sum(1), target, argmax, top, smooth, base, weight)

    @classmethod
    def stack(cls, parts: Sequence[_RowStatistics]) -> _RowStatistics:
        """Statistics of the rows of all ``parts``, one after the other."""

        def rows(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return values[0] if values[0] is None else torch.cat(values)

        per_row: dict[str, Any] = {field.name: rows(field.name) for field in fields(cls) if field.name != "weight"}
        return cls(**per_row, weight=parts[0].weight)

    def merge(self, later: _RowStatistics) -> _RowStatistics:
        """Statistics of these columns and the ``later`` ones together."""
        maximum = torch.maximum(self.maximum, later.maximum)
        base = _finite_or_zero(maximum)
        total = self.total * (self.maximum - base).exp() + later.total * (later.maximum - base).exp()
        argmax, smooth = None, None
        if self.argmax is not None and later.argmax is not None:
            wins = (later.top > self.top) | (later.top.isnan() & ~self.top.isnan())
            argmax = torch.where(wins, later.argmax, self.argmax)
        if self.smooth is not None and later.smooth is not None:
            smooth = self.smooth + later.smooth + later.weight * (later.base - self.base)
        return _RowStatistics(
            maximum,
            total,
            self.target + later.target,
            argmax,
            torch.maximum(self.top, later.top),
            smooth,
            self.base,
            self.weight + later.weight,
        )


def _statistics_of_columns(plan: Plan, t: Tensors, valid: Tensor, labels: Tensor) -> _RowStatistics:
    rows = _valid_rows(t["x"], valid)
    statistics = None
    for first, last in _slices(plan.problem.columns, plan.slab):
        z = _final_logits_of_columns(plan, t, rows, first, last)
        class_weight = _class_weight(t, _class(t, first), last - first) if "class_weight" in t else None
        part = _RowStatistics.of(z, labels, _class(t, first), plan.options, class_weight)
        statistics = part if statistics is None else statistics.merge(part)
    assert statistics is not None
    return statistics


def _finish_tokens(plan: Plan, t: Tensors, valid: Tensor, labels: Tensor, rows: _RowStatistics) -> None:
    """Losses and metrics from each row's statistics, and what the backward pass reads."""
    options = plan.options
    log_sum = rows.total.log()
    nll = (rows.maximum - rows.target) + log_sum
    t["lse_base"].copy_(rows.maximum)
    t["log_sum"].copy_(log_sum)

    token_weight = t["class_weight"][labels].float() if "class_weight" in t else torch.ones_like(nll)
    loss = nll * token_weight
    if rows.smooth is not None:
        spread = ((rows.maximum - rows.base) + log_sum) * rows.weight - rows.smooth
        loss = (1.0 - options.label_smoothing) * loss + options.label_smoothing / plan.problem.vocab * spread
    lse = rows.maximum + log_sum
    z_loss = (options.lse_square_scale * lse) * lse  # in this order 0 times a large lse is 0, not 0 times inf
    if options.use_token_scaling:
        scale = t["token_scale"].copy_((-nll).exp())
        loss, z_loss = loss * scale, z_loss * scale
    ignored = t["labels"].long() == options.ignore_index
    missing = torch.zeros_like(nll).masked_fill_(~ignored, float("nan"))
    loss = torch.where(valid, loss, missing)
    z_loss = torch.where(valid, z_loss, missing)

    if plan.step.sums_class_weight:
        t["class_weight_sum"].copy_(t["class_weight"].float().sum())
    count = _sum_of_groups(plan, valid)
    if options.reduction == "mean":
        by_weight = _reciprocal_or_zero(_sum_of_groups(plan, torch.where(valid, token_weight, 0.0)))
        by_count = _reciprocal_or_zero(count.float())
        t["divisors"].copy_(torch.stack([by_weight, by_count], -1))
        loss, z_loss = _sum_of_groups(plan, loss) * by_weight, _sum_of_groups(plan, z_loss) * by_count
    elif options.reduction == "sum":
        loss, z_loss = _sum_of_groups(plan, loss), _sum_of_groups(plan, z_loss)
    t["loss"].copy_(loss + z_loss)
    if options.return_z_loss:
        t["z_loss"].copy_(z_loss)
    if rows.argmax is None:
        return
    correct = valid & (rows.argmax == labels)
    if options.return_token_accuracy:
        accuracy = correct if options.per_token else _sum_of_groups(plan, correct) / count.clamp(min=1)
        t["token_accuracy"].copy_(accuracy)
    if options.return_counts:
        t["num_valid"].copy_(valid if options.per_token else count)
        t["num_correct"].copy_(correct if options.per_token else _sum_of_groups(plan, correct))
    if options.return_predicted_tokens:
        t["predicted_tokens"].copy_(torch.where(valid, rows.argmax, -1))


def _gradient_factors(plan: Plan, t: Tensors, valid: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Row factors of ``dL/dz_v = target * (p_v - [v == label]) + soft * p_v - uniform * w_v``, and the row's lse."""
    options, vocab = plan.options, plan.problem.vocab
    g = t["grad_loss"].float()
    if not options.per_token:
        g = _to_tokens(plan, g)
    if options.use_token_scaling:
        g = g * t["token_scale"]
    g_z = g
    if options.reduction == "mean":
        g, g_z = g * _to_tokens(plan, t["divisors"][..., 0]), g_z * _to_tokens(plan, t["divisors"][..., 1])
    weight = t.get("class_weight")
    token_weight = 1.0 if weight is None else weight[labels].float()
    uniform = g * (options.label_smoothing / vocab)
    target = g * token_weight * (1.0 - options.label_smoothing)
    soft = uniform * (t["class_weight_sum"] if plan.step.sums_class_weight else vocab)
    if options.lse_square_scale > 0:
        soft = soft + 2.0 * options.lse_square_scale * (t["lse_base"] + t["log_sum"]) * g_z
    return soft, target, uniform, t["lse_base"], t["log_sum"]


def _logits_gradient(
    plan: Plan,
    t: Tensors,
    z: Tensor,
    labels: Tensor,
    first: int | Tensor,
    soft: Tensor,
    target: Tensor,
    uniform: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
) -> Tensor:
    """Gradient by the raw logits of the classes from ``first`` that ``z`` holds as final logits; overwrites ``z``."""
    options, columns = plan.options, z.shape[1]
    slope = None if options.softcap is None else (1.0 - (z / options.softcap).square()).mul_(options.logit_scale)
    p = z.sub_(row_max[:, None]).sub_(log_sum[:, None]).exp_()
    rest = None
    if options.label_smoothing > 0:
        weight = _class_weight(t, first, columns).float() if "class_weight" in t else 1.0
        rest = p * soft[:, None] - uniform[:, None] * weight
    elif options.lse_square_scale > 0:
        rest = p * soft[:, None]
    here = (labels >= first) & (labels < first + columns)
    index = (labels - first).clamp(0, columns - 1)
    g = p.scatter_add_(1, index[:, None], -here.to(p.dtype)[:, None]).mul_(target[:, None])
    if rest is not None:
        g.add_(rest)
    if slope is not None:
        return g.mul_(slope)
    return g if options.logit_scale == 1.0 else g.mul_(options.logit_scale)


def _final_logits_of_rows(plan: Plan, t: Tensors, valid: Tensor, first: int, last: int) -> Tensor:
    z = _slab(t, last - first, plan.problem.vocab)
    z.copy_(t["logits"][first:last]).masked_fill_(~valid[first:last, None], 0.0)
    return _scale_and_cap(z, plan.options)


def _final_logits_of_columns(plan: Plan, t: Tensors, rows: Tensor, first: int, last: int) -> Tensor:
    z = _slab(t, plan.problem.tokens, last - first)
    torch.mm(rows, t["weight"][first:last].float().T, out=z)
    if "bias" in t:
        z.add_(t["bias"][first:last].float())
    return _scale_and_cap(z, plan.options)


def _class(t: Tensors, column: int) -> int | Tensor:
    """The class of a column: on a shard of the vocab only the device knows it."""
    return t["first_class"] + column if "first_class" in t else column


def _class_weight(t: Tensors, first: int | Tensor, columns: int) -> Tensor:
    if isinstance(first, int):
        return t["class_weight"][first : first + columns]
    return t["class_weight"][first + torch.arange(columns, device=first.device)]


def _sum_of_groups(plan: Plan, per_token: Tensor) -> Tensor:
    return per_token.view(*plan.problem.groups, plan.problem.group_tokens).sum(-1)


def _to_tokens(plan: Plan, per_group: Tensor) -> Tensor:
    groups, tokens = plan.problem.groups, plan.problem.group_tokens
    return per_group.reshape(*groups, 1).expand(*groups, tokens).reshape(-1)


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def _floats(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)


def _scale_and_cap(z: Tensor, options: Options) -> Tensor:
    if options.logit_scale != 1.0:
        z.mul_(options.logit_scale)
    if options.softcap is not None:
        z.div_(options.softcap).tanh_().mul_(options.softcap)
    return z


def _slab(t: Tensors, rows: int, columns: int) -> Tensor:
    return t["slab"].view(-1)[: rows * columns].view(rows, columns)


def _slices(total: int, step: int) -> list[tuple[int, int]]:
    return [(first, min(first + step, total)) for first in range(0, total, step)]


def _valid(plan: Plan, labels: Tensor) -> Tensor:
    labels = labels.long()
    return (labels != plan.options.ignore_index) & (labels >= 0) & (labels < plan.problem.vocab)


def _safe_labels(labels: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, labels.long(), 0)


def _valid_rows(x: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid[:, None], x.float(), 0.0)


def _finite_or_zero(maximum: Tensor) -> Tensor:
    """A maximum that is safe to subtract: ``-inf - -inf`` would turn a block of masked logits into NaN."""
    return torch.where(maximum == float("-inf"), 0.0, maximum)


def _reciprocal_or_zero(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0.0, 0.0, 1.0 / divisor)


LOGITS = {"loss": cross_entropy_loss, "gradient": cross_entropy_gradient}
LINEAR = {"loss": linear_loss, "shard": linear_shard, "combine": linear_combine, "gradient": linear_gradient}
