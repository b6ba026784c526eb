"""A mapped launch as one launch over more tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from core_kernels import KEPT, SHARED, Step
from jax_api import placement


class Folding:
    """A mapped call as one call over more tokens, in groups; possible while what all tokens share is not mapped.

    Exponentials are not kept across it: their rows are those of one call's valid tokens. ``step`` keeps none, and those
    among the arrays are left out.
    """

    def __init__(
        self, step: Step, names: Sequence[str], arrays: Sequence[jax.Array], dims: Sequence[int | None]
    ) -> None:
        given = [entry for entry in zip(names, arrays, dims, strict=True) if entry[0] not in KEPT]
        names, arrays, dims = zip(*given, strict=True)
        self.names, self.dims, self.one = names, dims, step
        self.arrays = [placement.whole(name, array) for name, array in zip(names, arrays, strict=True)]
        self.size = next(a.shape[d] for a, d in zip(arrays, dims, strict=True) if d is not None)
        self.step = replace(step, problem=step.problem.times(self.size))
        mapped = {name.removeprefix("tangent_") for name, d in zip(names, dims, strict=True) if d is not None}
        shared = mapped & set(SHARED) or {"weight", "bias"} & set(step.wanted)
        self.possible = not shared and bool(mapped & {"x", "logits", "shard_statistics"})

    def operands(self) -> list[jax.Array]:
        return [self._fold(*entry) for entry in zip(self.names, self.arrays, self.dims, strict=True)]

    def _fold(self, name: str, array: jax.Array, dim: int | None) -> jax.Array:
        name = name.removeprefix("tangent_")
        if name in SHARED:
            return array
        front = jnp.broadcast_to(array, (self.size, *array.shape)) if dim is None else jnp.moveaxis(array, dim, 0)
        if name == "shard_statistics":  # its tokens are last
            return jnp.moveaxis(front, 0, -2).reshape(*front.shape[1:-1], self.step.problem.tokens)
        return front.reshape(self.step.problem.tokens, *front.shape[2:]) if self.one.is_per_token(name) else front

    def unfold(self, name: str, result: jax.Array) -> tuple[jax.Array, int | None]:
        """The mapped result, and the dimension that is mapped."""
        if name in SHARED:
            return result, None
        if name == "shard_statistics":
            return result.reshape(*result.shape[:-1], self.size, self.one.problem.tokens), result.ndim - 1
        if self.one.is_per_token(name):
            return result.reshape(self.size, self.one.problem.tokens, *result.shape[1:]), 0
        return result, 0

    def one_by_one(self, bound: Callable[..., Any]) -> Any:
        """``bound`` of each entry in turn; what is not mapped stays where it is. Results are mapped first."""
        batch = [a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(self.arrays, self.dims, strict=True)]
        return _in_turn(bound, tuple(d is not None for d in self.dims))(*batch)


@functools.lru_cache(maxsize=1024)
def _in_turn(bound: Callable[..., Any], mapped: tuple[bool, ...]) -> Callable[..., Any]:
    """Compiled once for equal calls, which ``lax.map`` alone is not: it knows a function by its identity."""

    @jax.jit
    def run(*arrays: jax.Array) -> Any:
        def of_entry(entry: list[jax.Array | None]) -> Any:
            return bound(*(a if e is None else e for a, e in zip(arrays, entry, strict=True)))

        return jax.lax.map(of_entry, [a if m else None for a, m in zip(arrays, mapped, strict=True)])

    return run
