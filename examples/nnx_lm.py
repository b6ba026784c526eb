"""Train a small Flax NNX language model on Python's standard library, with the fused loss and optax.

    python examples/nnx_lm.py

While it trains, the bar shows the loss and the token accuracy of each batch. It ends with a held-out passage, each
place with the token predicted for it, and with the loss and accuracy over held-out text. The loss takes the kernel of
the model's head, `(hidden, vocab)`, as it is: `weight_layout="hv"`. The logits are never held, nor computed twice for
the metrics: accuracy and predictions are outputs of the loss.
"""

import argparse

import jax
import numpy as np
from corpus import IGNORED, held_out_batches, load_corpus, next_token, passage_window, training_batches
from flax import nnx
from lm_jax import make_optimizer
from model import AdamWConfig, ModelConfig
from report import Run, console, print_passage
from tqdm import tqdm

from jax_api import CrossEntropyOutput, fused_linear_ce

VOCABULARY = 4096
HELD_OUT = 64  # windows
PASSAGE = 96  # tokens to print


class Block(nnx.Module):
    """Causal self-attention and an MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width = config.width
        self.attention_norm = nnx.RMSNorm(width, epsilon=config.norm_eps, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(config.heads, width, use_bias=False, decode=False, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(width, epsilon=config.norm_eps, rngs=rngs)
        self.up = nnx.Linear(width, config.hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(config.hidden, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Decoder(nnx.Module):
    """Token ids `(batch, length)` to hidden states `(batch, length, width)`; the head's kernel is for the loss."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.positions = nnx.Embed(config.context, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, rngs=rngs)
        self.head = nnx.Linear(config.width, config.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.tokens(ids) + self.positions(np.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@nnx.jit
def evaluate(model: Decoder, inputs: jax.Array, labels: jax.Array) -> CrossEntropyOutput:
    return fused_linear_ce(
        model(inputs),
        model.head.kernel,
        labels,
        weight_layout="hv",
        return_token_accuracy=True,
        return_predicted_tokens=True,
    )


@nnx.jit
def train_step(
    model: Decoder, optimizer: nnx.Optimizer, inputs: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Update the model once; the loss and the accuracy are those before the update."""

    def loss(model: Decoder) -> tuple[jax.Array, jax.Array]:
        out = fused_linear_ce(
            model(inputs), model.head.kernel, labels, weight_layout="hv", return_token_accuracy=True
        )
        return out.loss, out.token_accuracy

    (value, accuracy), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
    optimizer.update(model, gradients)
    return value, accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Flax NNX language model with the fused loss.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8, help="windows of 128 tokens per step")
    parser.add_argument("--seed", type=int, default=0, help="for the initial weights and the batches")
    args = parser.parse_args()
    if args.steps < 1 or args.batch_size < 1:
        parser.error("--steps and --batch-size must be at least 1")

    corpus = load_corpus(VOCABULARY)
    config = ModelConfig(len(corpus.vocabulary))
    model = Decoder(config, nnx.Rngs(args.seed))
    optimizer = nnx.Optimizer(model, make_optimizer(AdamWConfig(args.steps)), wrt=nnx.Param)
    ((held_out, held_out_labels),) = held_out_batches(corpus.held_out, 1, HELD_OUT, config.context)

    before = evaluate(model, held_out, held_out_labels)
    with tqdm(total=args.steps * args.batch_size * config.context, desc="nnx", unit=" tok", unit_scale=True) as bar:
        for inputs, labels in training_batches(corpus.train, args.steps, args.batch_size, config.context, args.seed):
            loss, accuracy = train_step(model, optimizer, inputs, labels)
            bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
            bar.update(labels.size)
    after = evaluate(model, held_out, held_out_labels)

    window = passage_window(corpus, PASSAGE)
    inputs, labels = next_token(corpus.held_out[None, window])
    run = Run("nnx", jax.default_backend(), passage=np.asarray(evaluate(model, inputs, labels).predicted_tokens[0]))
    print_passage([run], corpus.held_out_text[window], labels[0], corpus.vocabulary)

    right = np.count_nonzero(after.predicted_tokens == held_out_labels)
    valid = np.count_nonzero(held_out_labels != IGNORED)
    console.print(f"held-out loss {before.loss:.4f} before training, {after.loss:.4f} after")
    console.print(f"held-out accuracy {after.token_accuracy:.4f}: {right} of {valid} tokens predicted right")


if __name__ == "__main__":
    main()
