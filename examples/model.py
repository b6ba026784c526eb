"""What the two frontends share: the shape of the model, its initial weights and the settings of its optimizer."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: pre-norm, learned positions, causal attention, GELU, a head of its own."""

    vocabulary: int
    context: int = 128
    width: int = 128
    heads: int = 4
    layers: int = 2
    hidden: int = 512
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW, with a linear warm-up and a cosine decay of the learning rate to a tenth of its peak."""

    steps: int
    peak: float = 4e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def learning_rates(self) -> np.ndarray:
        """The learning rate of every step, `(steps,)` float32."""
        step = np.arange(self.steps)
        warm_up = np.minimum(1.0, (step + 1) / max(1, self.steps // 10))
        cosine = 0.55 + 0.45 * np.cos(np.pi * step / self.steps)
        return (self.peak * warm_up * cosine).astype(np.float32)


class Scores(NamedTuple):
    """What one batch gave."""

    loss: float  # nats per valid token
    accuracy: float  # the share of valid tokens predicted right
    predicted: np.ndarray  # the labels' shape; -1 where the label is ignored


class Trainer(Protocol):
    """A model in training, in one of the frontends. Inputs and labels are int32 `(batch, context)`."""

    device: str

    def step(self, inputs: np.ndarray, labels: np.ndarray) -> Scores:
        """Update the weights once; the scores are those before the update."""
        ...

    def evaluate(self, inputs: np.ndarray, labels: np.ndarray) -> Scores:
        """The scores alone, with no gradients."""
        ...


def initial_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Float32 weights for both frontends, named as in the torch module's state dict; matrices are `(out, in)`."""
    generator = np.random.default_rng(seed)

    def normal(rows: int, columns: int, scale: float) -> np.ndarray:
        return (scale * generator.standard_normal((rows, columns))).astype(np.float32)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return normal(rows, columns, gain * columns**-0.5)

    width, hidden = config.width, config.hidden
    into_stream = (2 * config.layers) ** -0.5  # so that the residual stream does not grow with the layers
    weights = {
        "tokens.weight": normal(config.vocabulary, width, 0.5),
        "positions.weight": normal(config.context, width, 0.5),
        "norm.weight": np.ones(width, np.float32),
        "head.weight": matrix(config.vocabulary, width),
    }
    for i in range(config.layers):
        weights |= {
            f"blocks.{i}.attention_norm.weight": np.ones(width, np.float32),
            f"blocks.{i}.qkv.weight": matrix(3 * width, width),
            f"blocks.{i}.out.weight": matrix(width, width, into_stream),
            f"blocks.{i}.mlp_norm.weight": np.ones(width, np.float32),
            f"blocks.{i}.up.weight": matrix(hidden, width),
            f"blocks.{i}.down.weight": matrix(width, hidden, into_stream),
        }
    return weights
