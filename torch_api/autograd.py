"""The one autograd Function: plans the launch, allocates what the plan lists, and lets the core fill it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_kernels import Plan, Step, launch, plan

RESULTS = ("loss", "z_loss", "token_accuracy", "predicted_tokens")


class PlannedLoss(torch.autograd.Function):
    """``apply(step, *inputs)``, inputs in the order of ``step.inputs``; answers ``RESULTS``, ``None`` if not asked."""

    @staticmethod
    def forward(ctx: Any, step: Step, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        buffers = _run(step, inputs)
        ctx.step = step
        ctx.save_for_backward(*inputs, *(buffers[buffer.name] for buffer in step.saved))

        results = {buffer.name: buffers[buffer.name] for buffer in step.outputs}
        for name, result in results.items():
            if result.dim() == 1:
                results[name] = result.view(step.problem.leading)
        ctx.mark_non_differentiable(*(result for name, result in results.items() if name != "loss"))
        return tuple(results.get(name) for name in RESULTS)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        forward = ctx.step
        wanted = [name for name, need in zip(forward.inputs, ctx.needs_input_grad[1:], strict=True) if need]
        step = forward.gradient(wanted)
        named = dict(zip(step.inputs, (*ctx.saved_tensors, grad_loss), strict=True))
        buffers = _run(step, tuple(named.values()))
        names = [output.name.removeprefix("grad_") for output in step.outputs]
        gradients = tuple(buffers[f"grad_{name}"].view(named[name].shape) for name in names)
        if torch.is_grad_enabled():  # create_graph=True
            sources = (named[name] for name in (*forward.inputs, "grad_loss"))
            gradients = _DifferentiableOnce.apply(len(names), *gradients, *sources)
        by_name = dict(zip(names, gradients, strict=True))
        return None, *(by_name.get(name) for name in forward.inputs)


class _DifferentiableOnce(torch.autograd.Function):
    """Ties gradients to what they were computed from, so that differentiating them raises instead of giving zero."""

    @staticmethod
    def forward(ctx: Any, count: int, *gradients_and_sources: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in gradients_and_sources[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "second derivatives of twinhead's losses are not supported: the gradient is computed by a kernel; "
            "differentiate once, or use a loss in plain PyTorch"
        )


def _run(step: Step, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Plan, allocate, launch; answers the buffers by name."""
    planned = plan(step, inputs[0].device)
    buffers = _allocate(planned, inputs[0].device)
    launch(planned, {**_flatten(dict(zip(step.inputs, inputs, strict=True))), **buffers})
    return buffers


def _allocate(planned: Plan, device: torch.device) -> dict[str, Tensor]:
    return {buffer.name: torch.empty(buffer.shape, dtype=buffer.dtype, device=device) for buffer in planned.buffers}


def _flatten(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """One dimension of tokens, as the core takes them; copies only what no strides can describe, and small vectors."""
    flat = {}
    for name, tensor in named.items():
        if name in ("x", "logits"):
            flat[name] = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.flatten(0, -2)
        elif name == "weight":
            flat[name] = tensor
        else:
            flat[name] = tensor.reshape(-1).contiguous()
    return flat
