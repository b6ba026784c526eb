"""The corners of JAX that may move between its versions: all that this package uses of what JAX does not document.

``tests/jax_api/test_internals.py`` tries each of them on its own, to fail first, and by name, when JAX moves.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jax.experimental.buffer_callback import buffer_callback
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

__all__ = [
    "Primitive",
    "SymbolicZero",
    "ad",
    "batching",
    "buffer_callback",
    "lower_as",
    "manual_axes",
    "platforms_of",
    "replicas_of",
    "result_type",
    "sharded_dimensions",
    "tangent_zero",
    "unify",
    "vary_over",
    "varying_axes",
    "without_sharding",
]


def varying_axes(*arrays: Any) -> frozenset[str]:
    """Mesh axes over which any of ``arrays`` is known to vary: none outside ``shard_map(check_vma=True)``."""
    return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def vary_over(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """``array``, known to vary over ``axes`` too; the transpose sums over those that are new."""
    new = tuple(sorted(axes - varying_axes(array)))
    return jax.lax.pcast(array, new, to="varying") if new else array


def unify(*arrays: jax.Array) -> list[jax.Array]:
    """``arrays``, each varying over every axis that any of them varies over, as one operation needs its operands."""
    axes = varying_axes(*arrays)
    return [vary_over(array, axes) for array in arrays]


def manual_axes() -> frozenset[str]:
    """The mesh axes that ``shard_map`` has made manual here."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def result_type(operands: tuple[Any, ...], shape: tuple[int, ...], dtype: Any) -> Any:
    """The type of an unsharded result of an operation, varying as its unified ``operands`` do, from their types."""
    like = operands[0]
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec(*(None for _ in shape)))
    return like.update(shape=shape, dtype=jax.numpy.dtype(dtype), weak_type=False, sharding=sharding)


def tangent_zero(array: jax.Array) -> SymbolicZero:
    return SymbolicZero(jax.typeof(array).to_tangent_aval())


def sharded_dimensions(array: Any) -> tuple[int, ...]:
    """Dimensions of ``array`` that are known to be spread over devices here and now; none inside ``shard_map``."""
    if isinstance(array, jax.core.Tracer):  # known if the mesh's axes are explicit
        sharding = jax.typeof(array).sharding
        parts = [math.prod(sharding.mesh.shape[axis] for axis in _axes(entry)) for entry in sharding.spec]
        return tuple(i for i, count in enumerate(parts) if count > 1)
    if not isinstance(array, jax.Array):
        return ()
    shard = array.sharding.shard_shape(array.shape)
    return tuple(i for i, (whole, part) in enumerate(zip(array.shape, shard, strict=True)) if whole != part)


def without_sharding(array: jax.Array) -> jax.Array:
    """``array`` with a type that spreads no dimension over a mesh axis."""
    sharding = jax.typeof(array).sharding
    if not any(_axes(entry) for entry in sharding.spec):
        return array
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec(*(None for _ in array.shape))))


def _axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one dimension, as a ``PartitionSpec`` says it."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def lower_as(primitive: Primitive, rule: Any) -> None:
    """Compile ``primitive`` as ``rule(context, types, **params)`` says: a function of its operands, in JAX."""

    def lower(context: Any, *operands: Any, **params: Any) -> Any:
        function = rule(context, context.avals_in, **params)
        return mlir.lower_fun(function, multiple_results=primitive.multiple_results)(context, *operands)

    mlir.register_lowering(primitive, lower)


def platforms_of(context: Any) -> tuple[str, ...]:
    """The platforms that a program is being compiled for."""
    return tuple(context.module_context.platforms)


def replicas_of(context: Any) -> int:
    """How many devices would each compute the whole of an operation that is compiled here, outside ``shard_map``."""
    axes = context.module_context.axis_context
    mesh = getattr(axes, "mesh", None)
    if mesh is None:
        return getattr(axes, "num_devices", 1)
    return math.prod(size for name, size in mesh.shape.items() if name not in axes.manual_axes)
