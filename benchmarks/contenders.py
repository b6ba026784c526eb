"""What is measured: each contender is a function of a problem that returns the loss and leaves gradients behind."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_api


@dataclass
class Problem:
    """Inputs of one step, in bf16 on the GPU, with labels that are all valid."""

    x: Tensor
    weight: Tensor
    labels: Tensor


@dataclass
class Step:
    """Loss and gradients of one run."""

    loss: float
    grad_x: Tensor
    grad_weight: Tensor


METRICS = {"return_token_accuracy": True, "return_predicted_tokens": True}

# A contender prepares a problem, and answers with a function that runs one step and returns (loss, dx, dw).
Prepare = Callable[[Problem], Callable[[], tuple]]


def torch_step(loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Prepare:
    def prepare(problem: Problem) -> Callable[[], tuple]:
        x, weight = (t.detach().clone().requires_grad_() for t in (problem.x, problem.weight))

        def step() -> tuple:
            x.grad = weight.grad = None
            loss = loss_fn(x, weight, problem.labels)
            loss.backward()
            return loss.detach(), x.grad, weight.grad

        return step

    return prepare


def torch_evaluation(loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Prepare:
    def prepare(problem: Problem) -> Callable[[], tuple]:
        @torch.no_grad()
        def step() -> tuple:
            return (loss_fn(problem.x, problem.weight, problem.labels),)

        return step

    return prepare


def upcast_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The usual loss of a language model: full logits, upcast to float32."""
    return F.cross_entropy((x @ weight.T).float(), labels)


def upcast_loss_and_metrics(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same with predictions and accuracy, from the logits at hand."""
    logits = (x @ weight.T).float()
    _accuracy = (logits.argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits, labels)


def twinhead(**options) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        out = torch_api.fused_linear_cross_entropy(x, weight, labels, **options)
        return out if isinstance(out, Tensor) else out.loss

    return loss


def liger(problem: Problem) -> Callable[[], tuple]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return torch_step(lambda x, weight, labels: loss(weight, x, labels))(problem)


def twinhead_jax(**options) -> Prepare:
    def prepare(problem: Problem) -> Callable[[], tuple]:
        import jax_api

        def loss(x, weight, labels):
            return jax_api.fused_linear_ce(x, weight, labels, **options)

        return JaxStep(problem, loss, {"xla_gpu_graph_min_graph_size": 1} if options.get("cuda_graph") else None)

    return prepare


def full_logits_jax(problem: Problem) -> Callable[[], tuple]:
    """optax's loss over full logits, upcast to float32, compiled by XLA."""
    import jax.numpy as jnp
    import optax

    def loss(x, weight, labels):
        logits = (x @ weight.T).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return JaxStep(problem, loss)


def chunked_jax(problem: Problem, chunk: int = 4096) -> Callable[[], tuple]:
    """optax's loss over the logits of some tokens at a time, computed again in the backward pass."""
    import jax
    import jax.numpy as jnp
    import optax

    def loss(x, weight, labels):
        @jax.checkpoint
        def of_chunk(tokens):
            logits = (tokens[0] @ weight.T).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1]).sum()

        size = min(chunk, len(labels))
        chunks = x.reshape(-1, size, x.shape[1]), labels.reshape(-1, size)
        return jax.lax.map(of_chunk, chunks).sum() / len(labels)

    return JaxStep(problem, loss)


def tokamax(problem: Problem) -> Callable[[], tuple]:
    from absl import flags
    from tokamax import linear_softmax_cross_entropy_loss

    flags.FLAGS.mark_as_parsed()  # its own, which it would look for on our command line
    return JaxStep(problem, lambda x, weight, labels: linear_softmax_cross_entropy_loss(
        x, labels, weight.T, reduction="mean", implementation="xla"
    ))  # fmt: skip


class JaxStep:
    """Loss and gradients, compiled; ``extra_mib`` is what XLA plans beside arguments and results."""

    def __init__(self, problem: Problem, loss: Callable, compiler_options: dict | None = None) -> None:
        import jax
        import jax.numpy as jnp

        x, weight = (jnp.from_dlpack(t.detach()) for t in (problem.x, problem.weight))
        self.arguments = x, weight, jnp.from_dlpack(problem.labels.int())
        step = jax.jit(jax.value_and_grad(loss, (0, 1)), compiler_options=compiler_options)
        self.step = step.lower(*self.arguments).compile()
        self.extra_mib = self.step.memory_analysis().temp_size_in_bytes / 2**20

    def __call__(self) -> tuple:
        value, gradients = self.step(*self.arguments)
        for result in (value, *gradients):
            result.block_until_ready()
        return value, *gradients


def training_contenders() -> dict[str, Prepare]:
    found = {
        "twinhead torch": torch_step(twinhead()),
        "twinhead torch, metrics": torch_step(twinhead(**METRICS)),
        "twinhead torch, speed": torch_step(twinhead(memory="speed")),
        "twinhead torch, lean": torch_step(twinhead(memory="lean")),
        "torch eager": torch_step(upcast_loss),
        "torch compile": torch_step(torch.compile(upcast_loss)),
    }
    if importlib.util.find_spec("liger_kernel"):
        found["liger"] = liger
    if importlib.util.find_spec("jax") and importlib.util.find_spec("optax"):
        found["twinhead jax"] = twinhead_jax()
        found["twinhead jax, cuda graph"] = twinhead_jax(cuda_graph=True)
        found["jax, full logits"] = full_logits_jax
        found["jax, lax.map and checkpoint"] = chunked_jax
        if importlib.util.find_spec("tokamax"):
            found["tokamax"] = tokamax
    return found


def evaluation_contenders() -> dict[str, Prepare]:
    return {
        "evaluation: twinhead torch": torch_evaluation(twinhead()),
        "evaluation: twinhead torch, metrics": torch_evaluation(twinhead(**METRICS)),
        "evaluation: torch eager, metrics": torch_evaluation(upcast_loss_and_metrics),
    }
