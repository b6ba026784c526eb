"""Train one small language model on Python's standard library, in PyTorch, in JAX, or in both, and compare the two.

    python examples/train_lm.py                     # both frontends, a minute or two on two CPU cores
    python examples/train_lm.py --frontend torch    # needs no JAX

Both start from the same weights, see the same batches and use the same float32 optimizer. Their loss and token
accuracy come from the fused linear cross entropy, and so do the predicted tokens of the held-out passage printed last.
"""

import argparse
import math
import os
import statistics
import time
from pathlib import Path

import numpy as np
from corpus import (
    IGNORED,
    UNKNOWN,
    Corpus,
    held_out_batches,
    load_corpus,
    next_token,
    passage_window,
    training_batches,
)
from model import AdamWConfig, ModelConfig, Trainer, initial_weights
from report import Run, console, print_agreement, print_passage, print_runs, save_curves
from tqdm import tqdm

VOCABULARY = 4096
EVALUATIONS = 5  # in the course of a run
HELD_OUT_BATCHES, HELD_OUT_BATCH_SIZE = 4, 16
PASSAGE = 96  # tokens to print


def make_trainer(frontend: str, config: ModelConfig, adamw: AdamWConfig, weights: dict[str, np.ndarray]) -> Trainer:
    """Import one frontend, and no other, and build its model."""
    if frontend == "torch":
        from lm_torch import TorchTrainer

        return TorchTrainer(config, adamw, weights)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave room on a GPU shared with torch
    from lm_jax import JaxTrainer

    return JaxTrainer(config, adamw, weights)


def evaluate(trainer: Trainer, batches: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Mean loss and accuracy over all valid tokens of `batches`."""
    scores = [trainer.evaluate(inputs, labels) for inputs, labels in batches]
    valid = [np.count_nonzero(labels != IGNORED) for _, labels in batches]
    return (
        float(np.average([score.loss for score in scores], weights=valid)),
        float(np.average([score.accuracy for score in scores], weights=valid)),
    )


def train(frontend: str, config: ModelConfig, corpus: Corpus, steps: int, batch_size: int, seed: int) -> Run:
    """Train in one frontend, looking at the held-out text now and then, and predict the passage at the end."""
    trainer = make_trainer(frontend, config, AdamWConfig(steps), initial_weights(config, seed))
    held_out = held_out_batches(corpus.held_out, HELD_OUT_BATCHES, HELD_OUT_BATCH_SIZE, config.context)
    run = Run(frontend, trainer.device)
    seconds = []
    with tqdm(total=steps * batch_size * config.context, desc=f"{frontend:5}", unit=" tok", unit_scale=True) as bar:
        batches = training_batches(corpus.train, steps, batch_size, config.context, seed)
        for step, (inputs, labels) in enumerate(batches):
            if step % math.ceil(steps / EVALUATIONS) == 0:
                run.held_out.append((step, *evaluate(trainer, held_out)))
            start = time.perf_counter()
            scores = trainer.step(inputs, labels)
            seconds.append(time.perf_counter() - start)
            run.train.append((scores.loss, scores.accuracy))
            bar.set_postfix_str(f"loss {scores.loss:.3f}, accuracy {scores.accuracy:.1%}", refresh=False)
            bar.update(labels.size)
    run.held_out.append((steps, *evaluate(trainer, held_out)))
    run.tokens_per_second = batch_size * config.context / statistics.median(seconds)
    run.seconds = sum(seconds)
    run.passage = trainer.evaluate(*next_token(corpus.held_out[None, passage_window(corpus, PASSAGE)])).predicted[0]
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small language model with both frontends and compare them.")
    parser.add_argument("--frontend", choices=("torch", "jax", "both"), default="both")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8, help="windows of 128 tokens per step")
    parser.add_argument("--seed", type=int, default=0, help="for the initial weights and the batches")
    parser.add_argument("--plot", type=Path, default=Path("train_lm.png"), help="where the picture goes")
    args = parser.parse_args()
    if args.steps < 1 or args.batch_size < 1:
        parser.error("--steps and --batch-size must be at least 1")

    corpus = load_corpus(VOCABULARY)
    config = ModelConfig(len(corpus.vocabulary))
    uniform, unigram = math.log(config.vocabulary), corpus.unigram_entropy
    console.print(
        f"Text: Python's standard library, {len(corpus.train):,} tokens, and {len(corpus.held_out):,} held out\n"
        f"Vocabulary: {config.vocabulary:,} tokens; {np.mean(corpus.held_out == UNKNOWN):.1%} of the held-out text is "
        "not in it, and ignored\n"
    )
    frontends = ("torch", "jax") if args.frontend == "both" else (args.frontend,)
    runs = [train(frontend, config, corpus, args.steps, args.batch_size, args.seed) for frontend in frontends]

    window = passage_window(corpus, PASSAGE)
    _, labels = next_token(corpus.held_out[None, window])
    print_passage(runs, corpus.held_out_text[window], labels[0], corpus.vocabulary)
    print_runs(runs, uniform, unigram)
    save_curves(runs, uniform, unigram, args.plot)
    console.print(f"Curves: {args.plot}")
    print_agreement(runs)


if __name__ == "__main__":
    main()
