"""The autograd Functions: the loss, its gradient, and how ``torch.func.vmap`` maps both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from core_kernels import DIFFERENTIABLE, KEPT, SHARED, Buffer, Step
from torch_api.operator import decode, encode, gradient_step, launch, output_names
from torch_api.parallel import Shard, loss_over_shards

# The inputs of a loss, by the core's names: of logits, and of a projection. Some may be absent.
LOGITS = ("logits", "weight", "labels", "bias", "class_weight")
LINEAR = ("x", "weight", "labels", "bias", "class_weight")


class PlannedLoss(torch.autograd.Function):
    """``apply(step, shard, *inputs)``: the step's outputs, of which the loss alone has a graph, and what it saved.

    ``step`` is the operator's text; ``shard`` is the part of the vocab that is here, or ``None`` for all of it; the
    inputs are those of ``LOGITS`` or ``LINEAR``, with rows in one dimension and labels in any, and ``None`` for
    what is absent.
    """

    @staticmethod
    def forward(
        step: str,
        shard: Shard | None,
        rows: Tensor,
        weight: Tensor | None,
        labels: Tensor,
        bias: Tensor | None,
        class_weight: Tensor | None,
    ) -> tuple[Tensor, ...]:  # one by one: the compiler counts parameters to know whether there is a ctx
        inputs = (rows, weight, labels, bias, class_weight)
        if shard is not None:
            return tuple(loss_over_shards(step, shard, *inputs))
        return tuple(launch([tensor for tensor in inputs if tensor is not None], step))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.step, ctx.shard = inputs[:2]
        ctx.save_for_backward(*inputs[2:], *output[len(output_names(ctx.step)) :])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: to read them may compute them again
        inputs, saved = tensors[: len(LINEAR)], tensors[len(LINEAR) :]
        names = LINEAR if inputs[1] is not None else LOGITS
        wanted = [need and name in DIFFERENTIABLE for need, name in zip(ctx.needs_input_grad[2:], names, strict=True)]
        if grad_loss is None or not any(wanted):
            return None, None, *(None for _ in names)
        step = gradient_step(ctx.step, tuple(name for name, want in zip(names, wanted, strict=True) if want))
        operands = [tensor for tensor in inputs if tensor is not None]
        group = None
        if ctx.shard is not None:
            operands.append(ctx.shard.first_class_on(grad_loss.device))
            group = ctx.shard.group if wanted[0] else None
        operands += [*saved, grad_loss.contiguous()]
        # The compiler knows no Function in a Function's backward, and its gradient is differentiated by nobody.
        run = PlannedGradient.forward if torch.compiler.is_compiling() else applied(PlannedGradient)
        gradients = iter(run(step, group, *operands))  # in the order of the inputs
        return None, None, *(next(gradients) if want else None for want in wanted)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], step: str, shard: Shard | None, *inputs: Tensor | None
    ) -> tuple[Any, Any]:
        names = LINEAR if inputs[1] is not None else LOGITS
        return _mapped(PlannedLoss, info.batch_size, step, shard, names, inputs, in_dims[2:])


class PlannedGradient(torch.autograd.Function):
    """``apply(step, group, *inputs)``: the outputs of a gradient step, the first of them summed over ``group``, if any.

    It is not differentiable, and says so.
    """

    @staticmethod
    def forward(step: str, group: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        gradients = launch(list(inputs), step)
        if group is not None:
            dist.all_reduce(gradients[0], group=group)
        return tuple(gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "a second derivative of twinhead's losses is not supported: differentiate once, "
            "or use a loss in plain PyTorch"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], step: str, group: Any, *inputs: Tensor) -> tuple[Any, Any]:
        return _mapped(PlannedGradient, info.batch_size, step, group, decode(step).inputs, inputs, in_dims[2:])


def applied(function: type[torch.autograd.Function]) -> Callable[..., tuple[Tensor, ...]]:
    """``function.apply``, or as much of it as this call needs: all of it takes the host longer than a few launches.

    Outside of ``torch.func`` and forward mode no default arguments need to be bound, of which there are none, and where
    nothing is differentiated nothing needs to be remembered.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return function.apply
    if not torch.is_grad_enabled():
        return function.forward
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _mapped(
    function: Any,
    size: int,
    text: str,
    where: Any,
    names: Sequence[str],
    inputs: Sequence[Tensor | None],
    dims: Sequence[int | None],
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """A mapped call: one call over more tokens, in groups, or, where what all tokens share is mapped, one by one.

    It keeps no exponentials: their rows are those of one call's valid tokens.
    """
    asked = decode(text)
    step = asked.plain()
    text = encode(step)
    given = [entry for entry in zip(names, inputs, dims, strict=True) if entry[0] not in KEPT]
    names, inputs, dims = zip(*given, strict=True)
    mapped = {name for name, dim in zip(names, dims, strict=True) if dim is not None}
    if mapped & set(SHARED) or not mapped & {"x", "logits"} or {"weight", "bias"} & set(step.wanted):
        entries = []
        for i in range(size):
            entry = [t if t is None or d is None else t.select(d, i) for t, d in zip(inputs, dims, strict=True)]
            entries.append(function.apply(text, where, *entry))
        stacked = [(torch.stack(results), 0) for results in zip(*entries, strict=True)]
        return _with_placeholders(asked, step, stacked, inputs[0])

    folded = encode(replace(step, problem=step.problem.times(size)))
    operands = [_fold(step, *entry, size) for entry in zip(names, inputs, dims, strict=True)]
    results = function.apply(folded, where, *operands)
    unfolded = [_unfold(step, *entry, size) for entry in zip(step.results, results, strict=True)]
    return _with_placeholders(asked, step, unfolded, inputs[0])


def _with_placeholders(
    asked: Step, step: Step, results: Sequence[tuple[Tensor, int | None]], like: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Results of ``step`` and their dimensions in the order that ``asked`` has, whose exponentials nobody will read."""
    found = dict(zip((buffer.name for buffer in step.results), results, strict=True))
    for buffer in asked.results:
        if buffer.name not in found:
            found[buffer.name] = like.new_zeros((), dtype=buffer.dtype).expand(1, *buffer.shape[1:]), None
    ordered = [found[buffer.name] for buffer in asked.results]
    return tuple(result for result, _ in ordered), tuple(dim for _, dim in ordered)


def _unfold(step: Step, buffer: Buffer, result: Tensor, size: int) -> tuple[Tensor, int | None]:
    if buffer.name in SHARED:
        return result, None
    return result.unflatten(0, (size, -1)) if step.is_per_token(buffer.name) else result, 0


def _fold(step: Step, name: str, tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if tensor is None or name in SHARED:
        return tensor
    front = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return front.flatten(0, 1) if step.is_per_token(name) else front.contiguous()
