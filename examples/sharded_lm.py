"""Train the JAX language model on a mesh of devices: tokens sharded over "data", the head's vocab over "vocab".

    python examples/sharded_lm.py                                       # all GPUs, or eight virtual CPU devices
    python examples/sharded_lm.py --vocab-shards 4                      # 2 x 4 of them
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python examples/sharded_lm.py     # another number on a CPU

While it trains, the bar shows the loss and the token accuracy of each batch, over all devices. It ends with the loss of
held-out text before and after training, on the mesh and in a plain call on one device, which are the same to rounding.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # read by the CPU backend alone

import jax
import jax.numpy as jnp
import numpy as np
import optax
from corpus import IGNORED, held_out_batches, load_corpus, training_batches
from jax.sharding import PartitionSpec as P
from lm_jax import Weights, decoder, make_optimizer
from model import AdamWConfig, ModelConfig, initial_weights
from tqdm import tqdm

from jax_api import fused_linear_ce

VOCABULARY = 4096
HELD_OUT = 32  # windows

Loss = Callable[[Weights, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # gives the loss and the token accuracy


def plain_loss(config: ModelConfig) -> Loss:
    """The mean over the valid tokens, on one device."""

    def loss(weights: Weights, inputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = decoder(config, weights, inputs)
        out = fused_linear_ce(x, weights["head.weight"], labels, return_token_accuracy=True)
        return out.loss, out.token_accuracy

    return loss


def sharded_loss(config: ModelConfig, specs: dict[str, P]) -> Loss:
    """The same mean over the tokens of a mesh's devices, each with a count of valid ones of its own."""

    @partial(jax.shard_map, in_specs=(specs, P("data"), P("data")), out_specs=P())
    def loss(weights: Weights, inputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = decoder(config, weights, inputs)
        out = fused_linear_ce(
            x, weights["head.weight"], labels, vocab_axis="vocab", reduction="sum", return_predicted_tokens=True
        )
        right = jnp.count_nonzero(out.predicted_tokens == labels)  # an ignored token's prediction is -1
        valid = jnp.count_nonzero(labels != IGNORED)
        total, right, valid = jax.lax.psum((out.loss, right, valid), "data")
        return total / valid, right / valid

    return loss


def main() -> None:
    devices = len(jax.devices())
    parser = argparse.ArgumentParser(description="Train a small language model over several devices.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8, help="windows of 128 tokens per step, over all devices")
    parser.add_argument("--vocab-shards", type=int, default=2 if devices % 2 == 0 else 1, help="of the head's weight")
    parser.add_argument("--seed", type=int, default=0, help="for the initial weights and the batches")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    if args.vocab_shards < 1 or devices % args.vocab_shards or VOCABULARY % args.vocab_shards:
        parser.error(f"--vocab-shards must divide the {devices} devices and the {VOCABULARY} classes")
    data_shards = devices // args.vocab_shards
    if args.batch_size < 1 or args.batch_size % data_shards or HELD_OUT % data_shards:
        parser.error(f"--batch-size and the {HELD_OUT} held-out windows must divide over {data_shards} devices")

    corpus = load_corpus(VOCABULARY)
    config = ModelConfig(len(corpus.vocabulary))
    mesh = jax.make_mesh((data_shards, args.vocab_shards), ("data", "vocab"))
    print(f"{jax.default_backend()} devices: {data_shards} for the tokens x {args.vocab_shards} for the vocab")

    weights = initial_weights(config, args.seed)
    specs = {name: P("vocab") if name == "head.weight" else P() for name in weights}
    loss = sharded_loss(config, specs)
    optimizer = make_optimizer(AdamWConfig(args.steps))
    evaluate = jax.jit(loss)

    @jax.jit
    def train_step(
        weights: Weights, state: optax.OptState, inputs: jax.Array, labels: jax.Array
    ) -> tuple[Weights, optax.OptState, jax.Array, jax.Array]:
        (value, accuracy), gradients = jax.value_and_grad(loss, has_aux=True)(weights, inputs, labels)
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state, value, accuracy

    held_out = held_out_batches(corpus.held_out, 1, HELD_OUT, config.context)[0]
    batches = training_batches(corpus.train, args.steps, args.batch_size, config.context, args.seed)
    with jax.set_mesh(mesh):
        weights = {name: jax.device_put(weight, specs[name]) for name, weight in weights.items()}
        state = jax.jit(optimizer.init)(weights)  # sharded as the weights are
        before, _ = evaluate(weights, *jax.device_put(held_out, P("data")))
        tokens = args.steps * args.batch_size * config.context
        with tqdm(total=tokens, desc="mesh", unit=" tok", unit_scale=True) as bar:
            for batch in batches:
                weights, state, value, accuracy = train_step(weights, state, *jax.device_put(batch, P("data")))
                # Virtual devices share the CPU's threads, and steps that queue up can keep each other from finishing.
                jax.block_until_ready(weights)
                bar.set_postfix_str(f"loss {value:.3f}, accuracy {accuracy:.1%}", refresh=False)
                bar.update(batch[1].size)
        sharded = [float(score) for score in evaluate(weights, *jax.device_put(held_out, P("data")))]
    plain = [float(score) for score in jax.jit(plain_loss(config))(jax.device_get(weights), *held_out)]

    print(f"held-out loss {before:.4f} before training, {sharded[0]:.4f} after")
    for name, here, there in zip(("loss", "accuracy"), sharded, plain, strict=True):
        print(f"held-out {name} {here:.6f} on the mesh, {there:.6f} on one device")
    if not np.allclose(sharded, plain, rtol=1e-5, atol=0):
        raise SystemExit("the two should be the same to rounding")


if __name__ == "__main__":
    main()
