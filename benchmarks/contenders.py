"""The contenders in torch, and which of all of them run where. JAX's are in jax_contenders.py."""

from __future__ import annotations

from collections.abc import Callable, Set
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from problems import Problem, Result
from torch import Tensor

import torch_api

# A contender prepares a problem, and answers with a function that runs one step of it.
Step = Callable[[], Result]
Prepare = Callable[[Problem], Step]
LossFn = Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]  # the loss, maybe with predictions

METRICS = {"return_token_accuracy": True, "return_predicted_tokens": True}

HALF_IGNORED = (
    "twinhead torch, speed", "twinhead torch, speed, metrics", "twinhead torch, auto", "twinhead torch, lean",
    "twinhead jax, speed", "torch eager", "torch compile", "liger", "cce", "quack",
)  # fmt: skip
SCALING = ("twinhead torch, speed", "twinhead torch, lean", "torch compile", "liger", "cce", "tokamax")


def training(loss_fn: LossFn) -> Prepare:
    def prepare(problem: Problem) -> Step:
        x, weight, labels = problem.x, problem.weight, problem.labels

        def step() -> Result:
            x.grad = weight.grad = None
            loss, predicted = _pair(loss_fn(x, weight, labels))
            loss.backward()
            return Result(loss.detach(), x.grad, weight.grad, predicted)

        return step

    return prepare


def evaluation(loss_fn: LossFn) -> Prepare:
    def prepare(problem: Problem) -> Step:
        x, weight, labels = problem.x.detach(), problem.weight.detach(), problem.labels

        @torch.no_grad()
        def step() -> Result:
            loss, predicted = _pair(loss_fn(x, weight, labels))
            return Result(loss, predicted=predicted)

        return step

    return prepare


def _pair(out: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    return (out, None) if isinstance(out, Tensor) else out


def upcast_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The usual loss of a language model: full logits, upcast to float32."""
    return F.cross_entropy((x @ weight.T).float(), labels)


def upcast_metrics(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with predictions and accuracy, from the logits at hand."""
    logits = (x @ weight.T).float()
    predicted = logits.argmax(-1)
    return F.cross_entropy(logits, labels), predicted, (predicted == labels).float().mean()


def without_accuracy(loss_fn: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> LossFn:
    """Computed, but not looked at: the predictions it follows from are."""
    return lambda x, weight, labels: loss_fn(x, weight, labels)[:2]


def twinhead(**options) -> LossFn:
    def loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out = torch_api.fused_linear_cross_entropy(x, weight, labels, **options)
        return out if isinstance(out, Tensor) else (out.loss, out.predicted_tokens)

    return loss


def chunked_by_torch(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


@cache
def liger_module() -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()


def liger(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return liger_module()(weight, x, labels)


def cce(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Apple's cut cross entropy, which by default leaves out gradients too small for bf16 to hold."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, labels)


def quack(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x, weight, labels)


def peers() -> dict[str, LossFn]:
    """Fused losses of others that are installed."""
    found: dict[str, LossFn] = {}
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["torch linear_cross_entropy"] = chunked_by_torch
    for name, package, loss_fn in (
        ("liger", "liger_kernel", liger),
        ("cce", "cut_cross_entropy", cce),
        ("quack", "quack", quack),
    ):
        if find_spec(package):
            found[name] = loss_fn
    return found


def training_contenders(skip: Set[str]) -> dict[str, Prepare]:
    found = {
        "twinhead torch, speed": training(twinhead(memory="speed")),
        "twinhead torch, speed, metrics": training(twinhead(memory="speed", **METRICS)),
        "twinhead torch, auto": training(twinhead()),
        "twinhead torch, lean": training(twinhead(memory="lean")),
        "twinhead torch, lean, metrics": training(twinhead(memory="lean", **METRICS)),
        "torch eager": training(upcast_loss),
        "torch compile": training(torch.compile(upcast_loss, dynamic=False)),
    }
    found |= {name: training(loss_fn) for name, loss_fn in peers().items()}
    if find_spec("jax") and find_spec("optax"):
        import jax_contenders

        found |= jax_contenders.training_contenders()
    return {name: prepare for name, prepare in found.items() if name not in skip}


def evaluation_contenders(skip: Set[str]) -> dict[str, Prepare]:
    found = {
        "twinhead torch": evaluation(twinhead()),
        "twinhead torch, metrics": evaluation(twinhead(**METRICS)),
        "torch eager, metrics": evaluation(without_accuracy(upcast_metrics)),
        "torch compile, metrics": evaluation(without_accuracy(torch.compile(upcast_metrics, dynamic=False))),
    }
    found |= {name: evaluation(loss_fn) for name, loss_fn in peers().items()}
    if find_spec("jax") and find_spec("optax"):
        import jax_contenders

        found |= jax_contenders.evaluation_contenders()
    return {name: prepare for name, prepare in found.items() if name not in skip}
