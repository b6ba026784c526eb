"""The contenders in JAX: losses of (x, weight, labels), which return the loss and maybe predictions; and loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import optax
from problems import Problem, Result, Start

import jax_api

METRICS = {"return_token_accuracy": True, "return_predicted_tokens": True}
GRAPH = {"xla_gpu_graph_min_graph_size": 1}  # XLA records even a single launch


def planned_mib(function: Any, *arguments: Any) -> float:
    """What XLA plans beside arguments and results."""
    return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes / 2**20


@dataclass
class JaxStep:
    """A compiled step and its arguments, called as users call it, without waiting for it."""

    function: Any
    arguments: tuple[jax.Array, ...]
    differentiated: bool

    @property
    def extra_mib(self) -> float:
        return planned_mib(self.function, *self.arguments)

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


class JaxLoop:
    """A training loop, a step at a time: one program, which takes the weights' memory for the new ones."""

    def __init__(self, loss_fn: Callable, compiler_options: dict | None, start: Start) -> None:
        optimizer = optax.sgd(start.rate)

        def step(weights, inputs, labels):
            def loss_of(weights):
                layer, weight = weights
                return loss_fn(jnp.tanh(inputs @ layer), weight, labels)[0]

            loss, gradients = jax.value_and_grad(loss_of)(weights)
            updates, _ = optimizer.update(gradients, optimizer.init(weights))  # SGD has no state
            return optax.apply_updates(weights, updates), loss

        self.step = jax.jit(step, donate_argnums=0, compiler_options=compiler_options)
        weights = map(jnp.from_dlpack, (start.layer, start.weight))
        self.weights = tuple(jnp.array(weight, copy=True) for weight in weights)  # XLA takes over no memory of torch's
        self.batch = jnp.from_dlpack(start.inputs), jnp.from_dlpack(start.labels.int())

    @property
    def extra_mib(self) -> float:
        return planned_mib(self.step, self.weights, *self.batch)

    def __call__(self) -> Result:
        self.weights, loss = self.step(self.weights, *self.batch)
        return Result(loss)


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


def loop_contenders() -> dict[str, Callable[[Start], JaxLoop]]:
    return {
        "twinhead jax": partial(JaxLoop, twinhead(), None),
        "twinhead jax, cuda graph": partial(JaxLoop, twinhead(cuda_graph=True), GRAPH),
        "jax, full logits": partial(JaxLoop, full_logits, None),
        "jax, full logits, cuda graph": partial(JaxLoop, full_logits, GRAPH),
    }
