"""A mapped launch as one launch over more tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from core_kernels import Step

SHARED = ("weight", "bias", "class_weight", "class_weight_sum", "first_class")  # by all tokens, and all groups


class Folding:
    """A mapped call as one call over more tokens, in groups; possible while what all tokens share is not mapped."""

    def __init__(
        self, step: Step, names: Sequence[str], arrays: Sequence[jax.Array], dims: Sequence[int | None]
    ) -> None:
        self.names, self.arrays, self.dims, self.one = names, arrays, dims, step
        self.size = next(a.shape[d] for a, d in zip(arrays, dims, strict=True) if d is not None)
        self.step = replace(step, problem=step.problem.times(self.size))
        mapped = {name.removeprefix("tangent_") for name, d in zip(names, dims, strict=True) if d is not None}
        self.possible = not mapped & set(SHARED) and bool(mapped & {"x", "logits", "shard_statistics"})

    def operands(self) -> list[jax.Array]:
        return [self._fold(*entry) for entry in zip(self.names, self.arrays, self.dims, strict=True)]

    def _fold(self, name: str, array: jax.Array, dim: int | None) -> jax.Array:
        name = name.removeprefix("tangent_")
        if name in SHARED:
            return array
        front = jnp.broadcast_to(array, (self.size, *array.shape)) if dim is None else jnp.moveaxis(array, dim, 0)
        if name == "shard_statistics":  # its tokens are last
            return jnp.moveaxis(front, 0, -2).reshape(*front.shape[1:-1], self.step.problem.tokens)
        return front.reshape(self.step.problem.tokens, *front.shape[2:]) if self._per_token(name) else front

    def unfold(self, name: str, result: jax.Array) -> tuple[jax.Array, int | None]:
        """The mapped result, and the dimension that is mapped."""
        if name in SHARED:
            return result, None
        if name == "shard_statistics":
            return result.reshape(*result.shape[:-1], self.size, self.one.problem.tokens), result.ndim - 1
        if self._per_token(name):
            return result.reshape(self.size, self.one.problem.tokens, *result.shape[1:]), 0
        return result, 0

    def _per_token(self, name: str) -> bool:
        """Whether tokens come first; otherwise groups do."""
        if name in ("loss", "z_loss", "token_accuracy", "num_valid", "num_correct", "grad_loss"):
            return self.one.options.per_token
        return name != "divisors"

    def one_by_one(self, function: Any, results: int) -> tuple[Any, Sequence[int]]:
        """``function`` of each entry in turn; what is not mapped stays where it is."""
        batch = [None if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(self.arrays, self.dims, strict=True)]

        def of_entry(entry: Sequence[jax.Array | None]) -> Any:
            return function(*(a if e is None else e for a, e in zip(self.arrays, entry, strict=True)))

        return jax.lax.map(of_entry, batch), (0,) * results
