"""The two losses in plain JAX, straightforwardly: JAX differentiates these, and the tests compare."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    weight: jax.Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> jax.Array:
    """Cross entropy of ``logits (..., V)``; at least one label must be valid, and none out of range."""
    vocab = logits.shape[-1]
    z = logit_scale * logits
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    valid = labels != ignore_index
    classes = jnp.where(valid, labels, 0)
    class_weight = jnp.ones(vocab) if weight is None else weight
    token_weight = jnp.where(valid, class_weight[classes], 0.0)

    lse = jax.nn.logsumexp(z, axis=-1)
    target = jnp.take_along_axis(z, classes[..., None], axis=-1)[..., 0]
    smooth = (class_weight * (lse[..., None] - z)).mean(axis=-1)
    nll = jnp.where(valid, label_smoothing * smooth, 0.0) + (1.0 - label_smoothing) * token_weight * (lse - target)
    z_loss = jnp.where(valid, lse_square_scale * lse**2, 0.0)
    if reduction == "none":
        return nll + z_loss
    if reduction == "sum":
        return (nll + z_loss).sum()
    return nll.sum() / token_weight.sum() + z_loss.sum() / valid.sum()


def fused_linear_ce(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    bias: jax.Array,
    *,
    ce_weight: jax.Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> jax.Array:
    """Cross entropy of ``x @ weight.T + bias``."""
    return cross_entropy(
        jnp.matmul(x, weight.T, precision="highest") + bias,  # the default precision is TF32 on a GPU
        labels,
        weight=ce_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        logit_scale=logit_scale,
    )
