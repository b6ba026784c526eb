"""The demo's language model, trained with our loss and with the framework's own: do the curves differ?

    python benchmarks/convergence.py --out benchmarks/results/convergence.json
    python benchmarks/report.py benchmarks/results/convergence.json    # the README's section and its picture

Runs of one seed start from the same weights and see the same batches, whatever the loss and the frontend. In bf16 the
hidden states and the head's weight are rounded to it, for the head and its loss; everything else is float32.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave room on a GPU shared with torch
sys.path.append(str(Path(__file__).parent.parent / "examples"))

import numpy as np
import torch
from corpus import IGNORED, Corpus, held_out_batches, load_corpus, training_batches
from model import AdamWConfig, ModelConfig, Trainer, initial_weights
from results import Results

DTYPES = ("float32", "bfloat16")

MakeTrainer = Callable[[ModelConfig, AdamWConfig, dict[str, np.ndarray]], Trainer]


@dataclass(frozen=True)
class Setup:
    """What every run has in common."""

    model: ModelConfig
    steps: int
    batch_size: int  # windows
    held_out_batches: int
    seeds: int
    evaluations: int  # in the course of a run, beside the one before it

    @property
    def evaluated(self) -> list[int]:
        """Steps done at each evaluation."""
        return [self.steps * i // self.evaluations for i in range(self.evaluations + 1)]


SETUP = Setup(
    ModelConfig(2048, context=64, width=64, hidden=256),
    steps=400, batch_size=8, held_out_batches=16, seeds=5, evaluations=10,
)  # fmt: skip
TINY = Setup(
    ModelConfig(203, context=8, width=16, layers=1, hidden=32),
    steps=8, batch_size=4, held_out_batches=2, seeds=3, evaluations=2,
)  # fmt: skip


def torch_trainers(dtype: str) -> dict[str, MakeTrainer]:
    import torch.nn.functional as F
    from lm_torch import FUSED, TorchTrainer

    from torch_api import CrossEntropyOutput

    to = getattr(torch, dtype)

    def twinhead(weight: torch.Tensor, x: torch.Tensor, labels: torch.Tensor) -> CrossEntropyOutput:
        return FUSED(weight.to(to), x.to(to), labels)

    def framework(weight: torch.Tensor, x: torch.Tensor, labels: torch.Tensor) -> CrossEntropyOutput:
        """Full logits, upcast to float32, as language models do."""
        logits = F.linear(x.to(to), weight.to(to)).float()
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
        predicted = logits.argmax(-1).masked_fill(labels == IGNORED, -1)
        accuracy = (predicted == labels).sum() / (labels != IGNORED).sum()
        return CrossEntropyOutput(loss, token_accuracy=accuracy, predicted_tokens=predicted)

    losses = {"twinhead": twinhead, "framework": framework}
    return {name: partial(TorchTrainer, loss_fn=loss_fn) for name, loss_fn in losses.items()}


def jax_trainers(dtype: str) -> dict[str, MakeTrainer]:
    import jax
    import jax.numpy as jnp
    import optax
    from lm_jax import FUSED, JaxTrainer

    from jax_api import CrossEntropyOutput

    def twinhead(x: jax.Array, weight: jax.Array, labels: jax.Array) -> CrossEntropyOutput:
        return FUSED(x.astype(dtype), weight.astype(dtype), labels)

    def framework(x: jax.Array, weight: jax.Array, labels: jax.Array) -> CrossEntropyOutput:
        """Full logits, in float32 and not TF32 on a GPU too, or else upcast to it."""
        logits = jnp.matmul(x.astype(dtype), weight.astype(dtype).T, precision="highest").astype(jnp.float32)
        valid = labels != IGNORED
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, labels, 0))
        predicted = jnp.where(valid, logits.argmax(-1), -1)
        count = valid.sum()
        return CrossEntropyOutput(
            jnp.where(valid, losses, 0.0).sum() / count,
            token_accuracy=(predicted == labels).sum() / count,
            predicted_tokens=predicted,
        )

    losses = {"twinhead": twinhead, "framework": framework}
    return {name: partial(JaxTrainer, loss_fn=loss_fn) for name, loss_fn in losses.items()}


TRAINERS = {"torch": torch_trainers, "jax": jax_trainers}


def held_out_loss(trainer: Trainer, batches: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Nats per valid token."""
    losses = [trainer.evaluate(inputs, labels).loss for inputs, labels in batches]
    return float(np.average(losses, weights=[np.count_nonzero(labels != IGNORED) for _, labels in batches]))


def curve(make_trainer: MakeTrainer, setup: Setup, corpus: Corpus, seed: int, device: str) -> list[float]:
    """The held-out loss at each evaluation of one run."""
    model = setup.model
    trainer = make_trainer(model, AdamWConfig(setup.steps), initial_weights(model, seed))
    if (trainer.device == "cpu") != (device == "cpu"):
        raise SystemExit(f"torch runs on {device}, and JAX on {trainer.device}")
    held_out = held_out_batches(corpus.held_out, setup.held_out_batches, setup.batch_size, model.context)
    losses = [held_out_loss(trainer, held_out)]
    batches = training_batches(corpus.train, setup.steps, setup.batch_size, model.context, seed)
    for step, batch in enumerate(batches, 1):
        trainer.step(*batch)
        if step in setup.evaluated:
            losses.append(held_out_loss(trainer, held_out))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="results file, JSON")
    parser.add_argument("--frontends", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--tiny", action="store_true", help="a toy model and few steps, to see that it runs")
    parser.add_argument("--commit", help="commit of the measured code, where git cannot tell")
    arguments = parser.parse_args()

    setup = TINY if arguments.tiny else SETUP
    device = "cuda" if torch.cuda.is_available() else "cpu"
    corpus = load_corpus(setup.model.vocabulary)
    results = Results(arguments.out, device, arguments.commit, setup=asdict(setup), evaluated=setup.evaluated)
    start = time.perf_counter()
    for frontend in arguments.frontends:
        for dtype in DTYPES:
            trainers = TRAINERS[frontend](dtype)
            for seed in range(setup.seeds):
                curves = {name: curve(make, setup, corpus, seed, device) for name, make in trainers.items()}
                results.add("curves", frontend, dtype, str(seed), value=curves)
                ends = ", ".join(f"{name} {losses[-1]:.5f}" for name, losses in curves.items())
                print(f"{time.perf_counter() - start:4.0f} s  {frontend} {dtype}, seed {seed}: {ends}", flush=True)


if __name__ == "__main__":
    main()
