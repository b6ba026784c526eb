"""The contenders in JAX: losses of (x, weight, labels), which return the loss and maybe predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import optax
from problems import Problem, Result

import jax_api

METRICS = {"return_token_accuracy": True, "return_predicted_tokens": True}
GRAPH = {"xla_gpu_graph_min_graph_size": 1}  # XLA records even a single launch


@dataclass
class JaxStep:
    """A compiled step and its arguments, called as users call it, without waiting for it."""

    function: Any
    arguments: tuple[jax.Array, ...]
    differentiated: bool

    @property
    def extra_mib(self) -> float:
        """What XLA plans beside arguments and results."""
        return self.function.lower(*self.arguments).compile().memory_analysis().temp_size_in_bytes / 2**20

    def __call__(self) -> Result:
        if self.differentiated:
            (loss, predicted), gradients = self.function(*self.arguments)
            return Result(loss, *gradients, predicted)
        loss, predicted = self.function(*self.arguments)
        return Result(loss, predicted=predicted)


class JaxContender:
    """Prepares problems, all of one size with one compiled program."""

    def __init__(self, loss: Callable, differentiated: bool, compiler_options: dict | None = None) -> None:
        self.differentiated = differentiated
        function = jax.value_and_grad(loss, (0, 1), has_aux=True) if differentiated else loss
        self.function = jax.jit(function, compiler_options=compiler_options)

    def __call__(self, problem: Problem) -> JaxStep:
        tensors = problem.x.detach(), problem.weight.detach(), problem.labels.int()
        return JaxStep(self.function, tuple(map(jnp.from_dlpack, tensors)), self.differentiated)


def twinhead(**options) -> Callable:
    def loss(x, weight, labels):
        out = jax_api.fused_linear_ce(x, weight, labels, **options)
        return (out, None) if isinstance(out, jax.Array) else (out.loss, out.predicted_tokens)

    return loss


def full_logits(x, weight, labels):
    """optax's loss over full logits, upcast to float32, compiled by XLA."""
    logits = (x @ weight.T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), None


def full_logits_and_metrics(x, weight, labels):
    logits = (x @ weight.T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits.argmax(-1)


def chunked(x, weight, labels, chunk: int = 4096):
    """optax's loss over the logits of some tokens at a time, computed again in the backward pass."""

    @jax.checkpoint
    def of_chunk(tokens):
        logits = (tokens[0] @ weight.T).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1]).sum()

    size = min(chunk, len(labels))
    chunks = x.reshape(-1, size, x.shape[1]), labels.reshape(-1, size)
    return jax.lax.map(of_chunk, chunks).sum() / len(labels), None


def tokamax(x, weight, labels):
    from absl import flags
    from tokamax import linear_softmax_cross_entropy_loss

    flags.FLAGS.mark_as_parsed()  # its own, which it would look for on our command line
    loss = linear_softmax_cross_entropy_loss(x, labels, weight.T, reduction="mean", implementation="xla")
    return loss, None


def training_contenders() -> dict[str, JaxContender]:
    found = {
        "twinhead jax, speed": JaxContender(twinhead(memory="speed"), True),
        "twinhead jax, speed, cuda graph": JaxContender(twinhead(memory="speed", cuda_graph=True), True, GRAPH),
        "twinhead jax, auto": JaxContender(twinhead(), True),
        "twinhead jax, lean": JaxContender(twinhead(memory="lean"), True),
        "jax, full logits": JaxContender(full_logits, True),
        "jax, lax.map and checkpoint": JaxContender(chunked, True),
    }
    if find_spec("tokamax"):
        found["tokamax"] = JaxContender(tokamax, True)
    return found


def evaluation_contenders() -> dict[str, JaxContender]:
    return {
        "twinhead jax, metrics": JaxContender(twinhead(**METRICS), False),
        "jax, full logits, metrics": JaxContender(full_logits_and_metrics, False),
    }
