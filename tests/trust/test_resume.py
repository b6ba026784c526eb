"""A training run that is killed in the middle of a step goes on from its checkpoint, with the bits of one that was not.

The head is the models' only matrix product, and they scatter nothing: a framework may sum either in another order in
another process.
"""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import core_kernels as core
from jax_api import fused_linear_ce
from tests.support import interpreting, suite_device
from tests.trust.process import run, run_well
from torch_api import fused_linear_cross_entropy

pytestmark = pytest.mark.skipif(interpreting(), reason="of processes, whatever runs in them: plain runs have it")

optax = pytest.importorskip("optax")

STEPS, SAVED = 3, 1
TOKENS, HIDDEN, VOCAB = 13, 20, 101
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "lse_square_scale": 0.01, "return_token_accuracy": True}
UPSTREAM, KEPT = 0.7, 0.8  # what multiplies the loss; of how many hidden units dropout keeps


@pytest.mark.parametrize("frontend", ("torch", "jax"))
def test_a_killed_run_goes_on_as_if_it_had_not_been(frontend: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    killed = run(train_until_killed, frontend, checkpoint)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed, whole = (line.split() for line in run_well(resume, frontend, checkpoint).splitlines())
    assert killed.stdout.split() + resumed == whole
    assert len(whole) == len(set(whole)) == STEPS  # each step changes the loss


def train_until_killed(frontend: str, checkpoint: str) -> None:
    """Save after some steps, and die in the backward pass of the next."""
    trainer = TRAINERS[frontend]()
    for step in range(SAVED):
        print(trainer.step(step), flush=True)
    trainer.save(checkpoint)

    def launch(plan: core.Plan, tensors: dict[str, torch.Tensor]) -> None:
        core.launch(plan, tensors)
        if plan.step.kind == "gradient":
            os.kill(os.getpid(), signal.SIGKILL)

    module, name = {"torch": ("torch_api.operator", "launch_plan"), "jax": ("jax_api.bridge", "launch")}[frontend]
    setattr(importlib.import_module(module), name, launch)
    trainer.step(SAVED)
    print("not killed", flush=True)


def resume(frontend: str, checkpoint: str) -> None:
    """What the steps from the checkpoint on give, and on a second line those of a run from beginning to end."""
    resumed, whole = TRAINERS[frontend](), TRAINERS[frontend]()
    resumed.load(checkpoint)
    print(*(resumed.step(step) for step in range(SAVED, STEPS)))
    print(*(whole.step(step) for step in range(STEPS)))


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of a step; the first and the last token are ignored."""
    rng = np.random.default_rng(step)
    labels = rng.integers(0, VOCAB, TOKENS)
    labels[[0, -1]] = -100
    return rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32), labels


def initial() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(STEPS)
    shapes = {"gain": (HIDDEN,), "weight": (VOCAB, HIDDEN), "bias": (VOCAB,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def bits(out: Any) -> str:
    return f"{float(out.loss).hex()}/{float(out.token_accuracy).hex()}"


class TorchTrainer:
    """With Adam, and a generator of dropout, both of which go into the checkpoint."""

    def __init__(self) -> None:
        self.model = torch.nn.ParameterDict({name: torch.from_numpy(array) for name, array in initial().items()})
        self.model.to(suite_device())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.generator = torch.Generator().manual_seed(1)

    def step(self, step: int) -> str:
        features, labels = (torch.from_numpy(array).to(suite_device()) for array in batch(step))
        kept = torch.empty(TOKENS, HIDDEN).bernoulli_(KEPT, generator=self.generator).to(suite_device())
        x = kept * torch.tanh(features * self.model["gain"])
        out = fused_linear_cross_entropy(x, self.model["weight"], labels, self.model["bias"], **OPTIONS)
        self.optimizer.zero_grad()
        (UPSTREAM * out.loss).backward()
        self.optimizer.step()
        return bits(out)

    def save(self, checkpoint: str) -> None:
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(parts | {"generator": self.generator.get_state()}, checkpoint)

    def load(self, checkpoint: str) -> None:
        parts = torch.load(checkpoint, weights_only=True)
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.generator.set_state(parts["generator"].cpu())


class JaxTrainer:
    """The same with optax's Adam and a key, in one jitted step."""

    def __init__(self) -> None:
        self.optimizer = optax.adam(0.05)
        params = jax.tree.map(jnp.asarray, initial())
        self.state = params, self.optimizer.init(params), jax.random.key_data(jax.random.key(1))
        self.update = jax.jit(self._update)

    def _update(self, state: Any, features: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        params, moments, key = state
        key, now = jax.random.split(jax.random.wrap_key_data(key))
        kept = jax.random.bernoulli(now, KEPT, (TOKENS, HIDDEN))

        def loss(params: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
            x = kept * jnp.tanh(features * params["gain"])
            out = fused_linear_ce(x, params["weight"], labels, params["bias"], **OPTIONS)
            return UPSTREAM * out.loss, out

        gradients, out = jax.grad(loss, has_aux=True)(params)
        updates, moments = self.optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments, jax.random.key_data(key)), out

    def step(self, step: int) -> str:
        self.state, out = self.update(self.state, *batch(step))
        jax.block_until_ready(self.state)
        return bits(out)

    def save(self, checkpoint: str) -> None:
        with Path(checkpoint).open("wb") as file:
            np.savez(file, *jax.tree.leaves(self.state))

    def load(self, checkpoint: str) -> None:
        with np.load(checkpoint) as arrays:
            leaves = [jnp.asarray(array) for array in arrays.values()]
        self.state = jax.tree.unflatten(jax.tree.structure(self.state), leaves)


TRAINERS: dict[str, Any] = {"torch": TorchTrainer, "jax": JaxTrainer}
