"""Arrays that are spread over devices outside ``shard_map``: refused where that is known, told of where it is not."""

from __future__ import annotations

import warnings
from typing import Any

import jax

from jax_api import internals


def require_whole(name: str, array: Any) -> None:
    for dimension in internals.sharded_dimensions(array):
        raise ValueError(
            f"{name} is sharded over devices in dimension {dimension}: outside jax.shard_map each device would gather "
            "it and compute the whole loss. Call the loss inside jax.shard_map, over the tokens, or with vocab_axis= "
            "over the vocab"
        )


def whole(name: str, array: jax.Array) -> jax.Array:
    """``array``, of a type that says it is not spread over devices; mesh axes of one device are no spreading."""
    require_whole(name, array)
    return internals.without_sharding(array)


def warn_of_replicas(replicas: int) -> None:
    if replicas > 1:
        warnings.warn(
            f"twinhead: outside jax.shard_map, or in it along axes that are not manual, each of the {replicas} devices "
            "of this program computes the whole loss, gathering what is sharded. Call the loss inside jax.shard_map, "
            "over the tokens, or with vocab_axis= over the vocab",
            stacklevel=3,
        )
