"""Problems and their tensors as a frontend would hand them to the core: planned, allocated, poisoned."""

from __future__ import annotations

import torch
from torch import Tensor

from core_kernels import Argument, Options, Plan, Problem, launch, linear_problem, logits_problem
from core_kernels.tiles import choose_tile
from tests.support import suite_device

# No multiple of a tile, wherever the suite runs; the vocab and the hidden size span two.
TILE = choose_tile(suite_device(), torch.float32)
TOKENS, HIDDEN, VOCAB = 7, TILE.k + 4, TILE.n + 37
IGNORE = -100
POISON = -77

PLAIN = Options()
# Every buffer that an option can add.
EVERYTHING = Options(
    label_smoothing=0.1,
    lse_square_scale=0.05,
    softcap=4.0,
    logit_scale=0.5,
    return_z_loss=True,
    return_token_accuracy=True,
    return_predicted_tokens=True,
)


def linear(
    tokens: int = TOKENS,
    hidden: int = HIDDEN,
    vocab: int = VOCAB,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    class_weight: bool = True,
) -> Problem:
    return linear_problem(
        Argument("x", (tokens, hidden), dtype),
        Argument("weight", (vocab, hidden), dtype),
        Argument("labels", (tokens,), torch.int64),
        Argument("bias", (vocab,), dtype) if bias else None,
        Argument("class_weight", (vocab,), torch.float32) if class_weight else None,
    )


def logits(
    tokens: int = TOKENS, vocab: int = VOCAB, dtype: torch.dtype = torch.float32, class_weight: bool = True
) -> Problem:
    return logits_problem(
        Argument("logits", (tokens, vocab), dtype),
        Argument("labels", (tokens,), torch.int64),
        Argument("class_weight", (vocab,), torch.float32) if class_weight else None,
    )


def random_inputs(plan: Plan, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Every input of a forward plan, and the upstream gradient; the first and the last token are ignored."""
    problem = plan.problem
    n, v, h = problem.tokens, problem.vocab, problem.hidden or 0
    generator = torch.Generator().manual_seed(seed)
    per_token = plan.options.per_token
    inputs = {
        "logits": 2.0 * torch.randn(n, v, generator=generator).to(problem.dtype),
        "x": torch.randn(n, h, generator=generator).to(problem.dtype),
        "weight": 0.5 * torch.randn(v, h, generator=generator).to(problem.dtype),
        "bias": torch.randn(v, generator=generator).to(problem.dtype),
        "labels": torch.randint(0, v, (n,), generator=generator),
        "class_weight": torch.rand(v, generator=generator) + 0.5,
        "grad_loss": torch.rand(n if per_token else 1, generator=generator) + 0.2,
    }
    inputs["labels"][[0, -1]] = IGNORE
    return {name: inputs[name].to(device) for name in (*plan.inputs, "grad_loss")}


def poisoned(plan: Plan, device: torch.device, poison: float = float("nan")) -> dict[str, Tensor]:
    """Every buffer of ``plan``, full of ``poison``, or of ``POISON`` where it holds integers."""
    return {
        buffer.name: torch.full(
            buffer.shape, poison if buffer.dtype.is_floating_point else POISON, dtype=buffer.dtype, device=device
        )
        for buffer in plan.buffers
    }


def run(plan: Plan, tensors: dict[str, Tensor], poison: float = float("nan")) -> dict[str, Tensor]:
    """Launch ``plan`` with nothing but what it names; answers its buffers, poisoned before."""
    buffers = poisoned(plan, tensors["labels"].device, poison)
    launch(plan, {name: tensors[name] for name in plan.inputs} | buffers)
    return buffers


def differentiable(problem: Problem) -> tuple[str, ...]:
    return ("logits",) if problem.hidden is None else ("x", "weight", "bias") if problem.has_bias else ("x", "weight")
