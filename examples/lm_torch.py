"""The language model in PyTorch; its head and loss are one `FusedLinearCrossEntropyLoss`."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from model import AdamWConfig, ModelConfig, Scores
from torch import nn

from torch_api import CrossEntropyOutput, FusedLinearCrossEntropyLoss

# The head's weight, hidden states and labels to the loss, the accuracy and the predictions.
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], CrossEntropyOutput]
FUSED = FusedLinearCrossEntropyLoss(return_token_accuracy=True, return_predicted_tokens=True)


class Block(nn.Module):
    """Causal self-attention and an MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.up = nn.Linear(width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.transpose(1, 3).unbind(2)  # each (batch, heads, length, width / heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Decoder(nn.Module):
    """Token ids `(batch, length)` to hidden states `(batch, length, width)`; the head's weight is for the loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.norm(self.blocks(x))


class TorchTrainer:
    """Implements `model.Trainer`, on the GPU if there is one."""

    def __init__(
        self, config: ModelConfig, adamw: AdamWConfig, weights: dict[str, np.ndarray], loss_fn: Loss = FUSED
    ) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = Decoder(config).to(self.device)
        self.model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
        self.loss_fn = loss_fn
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=adamw.betas, eps=adamw.eps, weight_decay=adamw.weight_decay
        )
        self.learning_rates = iter(adamw.learning_rates().tolist())

    def step(self, inputs: np.ndarray, labels: np.ndarray) -> Scores:
        out = self._forward(inputs, labels)
        self.optimizer.zero_grad()
        out.loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = next(self.learning_rates)
        self.optimizer.step()
        return _scores(out)

    @torch.no_grad()
    def evaluate(self, inputs: np.ndarray, labels: np.ndarray) -> Scores:
        return _scores(self._forward(inputs, labels))

    def _forward(self, inputs: np.ndarray, labels: np.ndarray) -> CrossEntropyOutput:
        x = self.model(torch.from_numpy(inputs).to(self.device, torch.int64))
        return self.loss_fn(self.model.head.weight, x, torch.from_numpy(labels).to(self.device, torch.int64))


def _scores(out: CrossEntropyOutput) -> Scores:
    return Scores(out.loss.item(), out.token_accuracy.item(), out.predicted_tokens.cpu().numpy())
