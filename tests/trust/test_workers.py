"""Data loaders whose workers are forked and spawned while the main process trains, and which call the losses too.

A worker stays on the CPU. What a forked one may do is what torch and JAX allow after a fork: JAX nothing, and torch no
backward pass once the main process has had one on a GPU.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import jax_api
import torch_api
from tests.support import interpreting, on_gpu, suite_device
from tests.trust.process import run_well

pytestmark = pytest.mark.skipif(interpreting(), reason="of processes, whatever runs in them: plain runs have it")

BATCHES, TOKENS, HIDDEN, VOCAB = 4, 7, 10, 70
OPTIONS: dict[str, Any] = {"softcap": 6.0, "return_predicted_tokens": True}
Batch = dict[str, np.ndarray]


def batch(index: int) -> Batch:
    """Logits tied in the first rows of the weight; the first and the last token are ignored."""
    rng = np.random.default_rng(index)
    x, weight = (rng.normal(size=(n, HIDDEN)).astype(np.float32) for n in (TOKENS, VOCAB))
    weight[1] = weight[0]
    labels = rng.integers(0, VOCAB, TOKENS)
    labels[[0, -1]] = -100
    return {"x": x, "weight": weight, "labels": labels}


def by_torch(data: Batch, device: torch.device, backward: bool) -> Batch:
    x, weight, labels = (torch.from_numpy(array).to(device) for array in data.values())
    leaves = x.requires_grad_(backward), weight.requires_grad_(backward)
    out = torch_api.fused_linear_cross_entropy(x, weight, labels, **OPTIONS)
    found = {"loss": out.loss, "predicted": out.predicted_tokens}
    if backward:
        found |= dict(zip(("grad_x", "grad_weight"), torch.autograd.grad(0.7 * out.loss, leaves), strict=True))
    return {name: tensor.detach().cpu().numpy() for name, tensor in found.items()}


def by_jax(data: Batch) -> Batch:
    def loss(x: jax.Array, weight: jax.Array) -> Any:
        out = jax_api.fused_linear_ce(x, weight, jnp.asarray(data["labels"]), **OPTIONS)
        return 0.7 * out.loss, out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(data["x"], data["weight"])
    found = {"loss": out.loss, "predicted": out.predicted_tokens, "grad_x": gradients[0], "grad_weight": gradients[1]}
    return {name: np.asarray(array) for name, array in found.items()}


class Answered(Dataset):
    """Batches, with what a worker gets from them by itself."""

    def __init__(self, jax_too: bool, backward: bool) -> None:
        self.jax_too, self.backward = jax_too, backward

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> dict[str, Batch]:
        assert torch.utils.data.get_worker_info() is not None
        data = batch(index)
        answers = {"torch": by_torch(data, torch.device("cpu"), self.backward)}
        return {"data": data, **answers, **({"jax": by_jax(data)} if self.jax_too else {})}


def stay_on_the_cpu(worker: int) -> None:
    jax.config.update("jax_platforms", "cpu")


@pytest.mark.parametrize("method", ("fork", "spawn"))
def test_workers_and_the_main_process_call_at_the_same_time(method: str) -> None:
    callers = ("torch",) if method == "fork" else ("torch", "jax")
    printed = run_well(load_and_train, method, OMP_NUM_THREADS="1")
    assert printed.split() == [f"{frontend}-{index}" for index in range(BATCHES) for frontend in callers]


def load_and_train(method: str) -> None:
    torch.set_num_threads(1)  # as in a worker: products that are shared out may sum in another order
    train_on(batch(0))  # before there are workers: a fork then has a copy of what is there after a call
    spawned = method == "spawn"
    loader = DataLoader(
        Answered(jax_too=spawned, backward=spawned or not on_gpu()),
        batch_size=None,
        num_workers=1 if spawned else 2,
        multiprocessing_context=method,
        worker_init_fn=stay_on_the_cpu if spawned else None,
        timeout=100,
    )
    for index, answered in enumerate(loader):
        data = {name: np.asarray(array) for name, array in answered.pop("data").items()}
        assert_equal(data, batch(index))
        train_on(data)
        on_cpu = by_torch(data, torch.device("cpu"), backward=True)
        for frontend, answer in answered.items():
            assert_equal(answer, on_cpu)
            print(f"{frontend}-{index}")


def train_on(data: Batch) -> None:
    """In both frontends, which give the same bits."""
    assert_equal(by_jax(data), by_torch(data, suite_device(), backward=True))


def assert_equal(got: dict[str, Any], wanted: Batch) -> None:
    assert got
    for name, array in got.items():
        np.testing.assert_array_equal(np.asarray(array), wanted[name], err_msg=name)
