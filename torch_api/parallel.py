"""A vocab that is sharded over a process group: one small collective forward, and one of the input's size backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torch_api.operator import launch, step_of_kind

# The name since torch 2.13, where the old one warns; there is neither where torch is built without distributed.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class Shard(NamedTuple):
    """One rank's part of the vocab: its classes are those from ``first_class``, of ``vocab`` in all."""

    group: Any
    shards: int
    first_class: int
    vocab: int

    def first_class_on(self, device: torch.device) -> Tensor:
        return torch.full((1,), self.first_class, dtype=torch.int32, device=device)


def loss_over_shards(
    step: str,
    shard: Shard,
    rows: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
) -> list[Tensor]:
    """The results of the loss ``step`` over the whole vocab, on every rank.

    Each rank computes what its shard knows of every token (its maximum, sum of exponentials, argmax, and the label's
    logit if it holds it). Gathered, that is all that the loss and its metrics need.
    """
    present = [tensor for tensor in (rows, weight, labels, bias, class_weight) if tensor is not None]
    (known,) = launch([*present, shard.first_class_on(rows.device)], step_of_kind(step, "shard"))
    gathered = known.new_empty((shard.shards * known.shape[0], known.shape[1]))
    _all_gather(gathered, known, group=shard.group)
    class_weights = [] if class_weight is None else [class_weight]
    whole = [labels.view(-1), *class_weights, gathered.view(shard.shards, *known.shape)]
    return launch(whole, step_of_kind(step, "combine"))


def is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh")  # DTensor's own module takes a second to import


def shard_of_group(weight: Tensor, group: Any) -> Shard:
    """The shard that ``weight`` is, of shards that are equal, in the order of the ranks of ``group``."""
    if group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group answers with on the other ranks
        raise ValueError("process_group must have this rank in it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {group!r}")
    shards, columns = dist.get_world_size(group), weight.shape[0] if weight.dim() else 0  # a scalar is refused later
    return Shard(group, shards, dist.get_rank(group) * columns, shards * columns)


def shard_of_dtensor(weight: Any) -> Shard | None:
    """The shard of ``weight``, a ``DTensor``, that this rank has; ``None`` if it has all of it."""
    mesh, placements, vocab = weight.device_mesh, weight.placements, weight.shape[0]
    if len(placements) == 1 and placements[0].is_replicate():
        return None
    if len(placements) != 1 or not placements[0].is_shard(0):
        raise ValueError(
            "weight must be a DTensor with placements (Shard(0),) or (Replicate(),), so on a mesh of one dimension, "
            f"got {placements}: redistribute it"
        )
    shards = mesh.size()
    if (shards - 1) * -(-vocab // shards) >= vocab:  # every rank says so, or some would wait for the others
        raise ValueError(f"weight must have a row for each of {shards} ranks at least, got {vocab} rows in all")
    return Shard(mesh.get_group(), shards, mesh.get_local_rank() * -(-vocab // shards), vocab)


def to_local(name: str, tensor: Any, weight: Any, shard: Shard | None) -> Any:
    """The local part of ``tensor``, which lies as ``weight`` does if it is the bias, and whole on each rank if not."""
    if not is_dtensor(tensor):
        return tensor
    sharded = shard is not None and name == "bias"
    fits = tensor.device_mesh == weight.device_mesh and (
        tensor.placements[0].is_shard(0) if sharded else tensor.placements[0].is_replicate()
    )
    if not fits:
        wanted = "(Shard(0),)" if sharded else "(Replicate(),)"
        raise ValueError(
            f"{name} must be a DTensor on weight's mesh with placements {wanted}, got {tensor.placements} on "
            f"{tensor.device_mesh}: redistribute it"
        )
    return tensor.to_local()
