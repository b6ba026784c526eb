"""The same language model in JAX: pure functions of a dict of weights; its head and loss are one `fused_linear_ce`."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from model import AdamWConfig, ModelConfig, Scores

from jax_api import CrossEntropyOutput, fused_linear_ce

Weights = dict[str, jax.Array]
# Hidden states, the head's weight and labels to the loss, the accuracy and the predictions.
Loss = Callable[[jax.Array, jax.Array, jax.Array], CrossEntropyOutput]
FUSED = partial(fused_linear_ce, return_token_accuracy=True, return_predicted_tokens=True)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def block(config: ModelConfig, weights: Weights, prefix: str, x: jax.Array) -> jax.Array:
    """Causal self-attention and an MLP, each on a normalised copy of the residual stream."""

    def linear(name: str, x: jax.Array) -> jax.Array:
        return x @ weights[f"{prefix}.{name}.weight"].T

    def norm(name: str, x: jax.Array) -> jax.Array:
        return rms_norm(x, weights[f"{prefix}.{name}.weight"], config.norm_eps)

    batch, length, width = x.shape
    qkv = linear("qkv", norm("attention_norm", x)).reshape(batch, length, 3, config.heads, -1)
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # each (batch, length, heads, width / heads)
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + linear("out", mixed.reshape(batch, length, width))
    return x + linear("down", jax.nn.gelu(linear("up", norm("mlp_norm", x)), approximate=True))


def decoder(config: ModelConfig, weights: Weights, ids: jax.Array) -> jax.Array:
    """Token ids `(batch, length)` to hidden states `(batch, length, width)`."""
    with jax.default_matmul_precision("highest"):  # float32 on a GPU too, as in torch, and not TF32
        x = weights["tokens.weight"][ids] + weights["positions.weight"][: ids.shape[1]]
        for i in range(config.layers):
            x = block(config, weights, f"blocks.{i}", x)
        return rms_norm(x, weights["norm.weight"], config.norm_eps)


def make_optimizer(adamw: AdamWConfig) -> optax.GradientTransformation:
    learning_rates = jnp.asarray(adamw.learning_rates())
    return optax.adamw(
        lambda count: learning_rates[count], *adamw.betas, eps=adamw.eps, weight_decay=adamw.weight_decay
    )


class JaxTrainer:
    """Implements `model.Trainer`, on JAX's default device."""

    def __init__(
        self, config: ModelConfig, adamw: AdamWConfig, weights: dict[str, np.ndarray], loss_fn: Loss = FUSED
    ) -> None:
        self.device = jax.default_backend()
        self.weights = {name: jnp.asarray(weight) for name, weight in weights.items()}
        optimizer = make_optimizer(adamw)
        self.optimizer_state = optimizer.init(self.weights)

        def loss(weights: Weights, inputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, CrossEntropyOutput]:
            out = loss_fn(decoder(config, weights, inputs), weights["head.weight"], labels)
            return out.loss, out

        def step(
            weights: Weights, state: optax.OptState, inputs: jax.Array, labels: jax.Array
        ) -> tuple[Weights, optax.OptState, CrossEntropyOutput]:
            (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(weights, inputs, labels)
            updates, state = optimizer.update(gradients, state, weights)
            return optax.apply_updates(weights, updates), state, out

        self._step = jax.jit(step)
        self._loss = jax.jit(loss)

    def step(self, inputs: np.ndarray, labels: np.ndarray) -> Scores:
        self.weights, self.optimizer_state, out = self._step(self.weights, self.optimizer_state, inputs, labels)
        return _scores(out)

    def evaluate(self, inputs: np.ndarray, labels: np.ndarray) -> Scores:
        _, out = self._loss(self.weights, inputs, labels)
        return _scores(out)


def _scores(out: CrossEntropyOutput) -> Scores:
    return Scores(float(out.loss), float(out.token_accuracy), np.asarray(out.predicted_tokens))
