"""Enabled models in DDP and FSDP2, on two processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")

from tests.torch_api.process import on_every_rank
from tests.transformers.families import VOCAB, gradient_error, tiny_model
from tests.transformers.models import assert_left_out, expected_predictions
from torch_api.transformers import enable


def test_on_processes() -> None:
    on_every_rank(2, {check.__name__: check for check in CHECKS})


def compare(wrap: Callable[[nn.Module], nn.Module]) -> Any:
    """The enabled model's outputs, after its loss and gradients were found to be the plain model's."""
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(4, VOCAB, (2, 12))
    results = []
    for on in (True, False):
        model = tiny_model("LlamaForCausalLM")
        model = wrap(enable(model, return_predicted_tokens=True) if on else model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outputs = model(input_ids=ids, labels=ids)
            outputs.loss.backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        found = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}
        results.append((outputs, found))
    (ours, found), (theirs, expected) = results
    assert_left_out(ours.logits)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    assert gradient_error(found, expected)[0] < 1e-4
    assert torch.equal(ours.predicted_tokens, expected_predictions(theirs.logits, ids))
    return ours, theirs


def ddp() -> None:
    for more in ({}, {"find_unused_parameters": True}, {"static_graph": True}):  # it takes outputs apart
        ours, theirs = compare(lambda model, more=more: DistributedDataParallel(model, **more))
        assert torch.equal(ours.logits.detach().exp(), theirs.logits.exp())


def fsdp() -> None:
    """A head that is whole in the model's forward pass, and one that is whole in its own alone."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def shard(model: nn.Module, *parts: nn.Module) -> nn.Module:
        for part in parts:
            fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    compare(shard)
    ours, _ = compare(lambda model: shard(model, *model.model.layers, model.lm_head))
    with pytest.raises(RuntimeError, match="is sharded again: look at them before the backward pass"):
        ours.logits.exp()


CHECKS = (ddp, fsdp)
