"""Inputs of a step, and what it must return: loss, gradients and predictions in float32; what a loop begins with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from shapes import Size
from torch import Tensor

IGNORED = -100


@dataclass
class Problem:
    """Inputs that require gradients, and int64 labels. Every contender differentiates these very tensors."""

    x: Tensor
    weight: Tensor
    labels: Tensor


class Result(NamedTuple):
    """What a step returns, as torch or JAX arrays; what it does not compute is ``None``."""

    loss: Any
    grad_x: Any = None
    grad_weight: Any = None
    predicted: Any = None


def randomness(device: str) -> tuple[torch.Generator, Callable[..., Tensor]]:
    """A generator of the same numbers in every run, and normal ones from it, by their shape."""
    generator = torch.Generator(device).manual_seed(0)
    return generator, partial(torch.randn, device=device, generator=generator)


def make_problems(size: Size, device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Problem]:
    """Random data; the same with half of the tokens ignored; and peaked data.

    Peaked labels follow Zipf's law, and hidden states point at their label's row of the weight, so that the label's
    logit is about ``log(vocab) - 0.5`` and the loss about 1.4 nats.
    """
    tokens, hidden, vocab = size
    generator, normal = randomness(device)

    x = normal(tokens, hidden).to(dtype).requires_grad_()
    weight = (normal(vocab, hidden) / hidden**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), device=device, generator=generator)
    ignored = torch.rand(tokens, device=device, generator=generator) < 0.5

    frequencies = 1 / torch.arange(1, vocab + 1, device=device)
    frequent = torch.multinomial(frequencies, tokens, replacement=True, generator=generator)
    direction = torch.nn.functional.normalize(weight.detach()[frequent].float(), dim=1)
    pointing = (math.log(vocab) - 0.5) * direction + normal(tokens, hidden)
    return {
        "random": Problem(x, weight, labels),
        "half ignored": Problem(x, weight, labels.masked_fill(ignored, IGNORED)),
        "peaked": Problem(pointing.to(dtype).requires_grad_(), weight, frequent),
    }


@torch.no_grad()
def reference(problem: Problem, rows: int = 1024) -> Result:
    """Loss, gradients and predictions in float32, a block of tokens at a time."""
    torch.backends.cuda.matmul.allow_tf32 = False
    weight = problem.weight.float()
    valid = problem.labels != IGNORED
    count = int(valid.sum())
    grad_x = torch.empty_like(problem.x, dtype=torch.float32)
    grad_weight = torch.zeros_like(weight)
    predicted = torch.full_like(problem.labels, -1)
    loss = 0.0
    for block in torch.arange(len(valid), device=valid.device).split(rows):
        x, keep = problem.x[block].float(), valid[block][:, None]
        labels = problem.labels[block, None].where(keep, 0)
        logits = x @ weight.T
        predicted[block] = logits.argmax(1).where(keep[:, 0], -1)
        log_p = logits.log_softmax(1)
        loss -= float(log_p.gather(1, labels).where(keep, 0).double().sum())
        gradient = log_p.exp_().scatter_add_(1, labels, -torch.ones_like(labels, dtype=x.dtype)).mul_(keep / count)
        grad_x[block] = gradient @ weight
        grad_weight.addmm_(gradient.T, x)
    return Result(loss / count, grad_x, grad_weight, predicted)


def products(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """The three products of a step over full shapes, on random data. All tokens count, ignored or not."""
    x, weight = problem.x.detach(), problem.weight.detach()
    logits = torch.empty(len(x), len(weight), device=x.device, dtype=x.dtype)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    return {
        "logits": lambda: torch.mm(x, weight.T, out=logits),
        "dX": lambda: torch.mm(logits, weight, out=grad_x),
        "dW": lambda: torch.mm(logits.T, x, out=grad_weight),
    }


def floor(problem: Problem) -> Callable[[], None]:
    three = products(problem).values()

    def step() -> None:
        for product in three:
            product()

    return step


def projection(problem: Problem):
    """The one product of an evaluation."""
    x, weight = problem.x.detach(), problem.weight.detach()
    out = torch.empty(len(x), len(weight), device=x.device, dtype=x.dtype)
    return lambda: torch.mm(x, weight.T, out=out)


class Start(NamedTuple):
    """What a training loop begins with: its batch, which all steps have, its weights, and how far a step goes."""

    inputs: Tensor
    labels: Tensor
    layer: Tensor
    weight: Tensor
    rate: float

    def in_float32(self) -> Start:
        return self._replace(inputs=self.inputs.float(), layer=self.layer.float(), weight=self.weight.float())


def make_start(size: Size, device: str) -> Start:
    """Random data in bf16, whose loss falls by some 3 or 4 nats in 10 steps."""
    tokens, hidden, vocab = size
    generator, normal = randomness(device)
    labels = torch.randint(vocab, (tokens,), device=device, generator=generator)
    matrices = normal(tokens, hidden), normal(hidden, hidden) / hidden**0.5, normal(vocab, hidden) / hidden**0.5
    inputs, layer, weight = (matrix.bfloat16() for matrix in matrices)
    return Start(inputs, labels, layer, weight, rate=0.5 * tokens / hidden)
