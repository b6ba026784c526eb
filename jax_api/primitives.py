"""Two JAX primitives: a launch, and the tangent of a loss, which exists to be transposed into a launch.

Being primitives they say themselves how they are mapped, differentiated and compiled. Under ``vmap`` a batch of tokens
over one weight becomes more tokens, before and after differentiation alike; so the weight is never tiled, and its
gradient is one sum over the batch (a ``custom_vjp`` would be asked for one gradient per batch entry).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from core_kernels import Step
from jax_api import bridge, internals, placement
from jax_api.bridge import Call
from jax_api.folding import Folding
from jax_api.internals import Primitive, ad, batching

Arrays = Mapping[str, jax.Array]

SUPPORTED = ("cpu", "cuda", "rocm")

_launch = Primitive("twinhead_launch")
_launch.multiple_results = True
_tangent = Primitive("twinhead_tangent")


def launch(call: Call, inputs: Arrays) -> dict[str, jax.Array]:
    """Run ``call`` over its step's inputs, by name; answers what it computes and saves, by name."""
    results = _bind(_launch, *(inputs[name] for name in call.step.inputs), call=call)
    return {buffer.name: result for buffer, result in zip(call.results, results, strict=True)}


def loss_tangent(call: Call, residuals: Arrays, tangents: Arrays) -> jax.Array:
    """The loss's tangent, linear in ``tangents``, given the inputs and what the loss step saved."""
    operands = (*(residuals[name] for name in _residual_names(call.step)), *tangents.values())
    return _bind(_tangent, *operands, call=call, wanted=tuple(tangents))


def _bind(primitive: Primitive, *operands: jax.Array, **parameters: Any) -> Any:
    return primitive.bind(*internals.unify(*operands), **parameters)


def _residual_names(step: Step) -> tuple[str, ...]:
    return tuple(name for name in step.gradient(()).inputs if name != "grad_loss")


# ---- types


@_launch.def_abstract_eval
def _launch_types(*operands: Any, call: Call) -> list[Any]:
    shapes = [call.shape(buffer) for buffer in call.results]
    return [internals.result_type(operands, shape.shape, shape.dtype) for shape in shapes]


@_tangent.def_abstract_eval
def _tangent_type(*operands: Any, call: Call, wanted: tuple[str, ...]) -> Any:
    loss = call.step.of_kind("loss").outputs[0]
    return internals.result_type(operands, loss.shape, bridge.jax_dtype(loss.dtype))


# ---- evaluation


@functools.lru_cache(maxsize=1024)
def _compiled(call: Call) -> Any:
    return jax.jit(functools.partial(_launch.bind, call=call))


@_launch.def_impl
def _launch_now(*operands: jax.Array, call: Call) -> Sequence[jax.Array]:
    with jax.disable_jit(False):
        return _compiled(call)(*operands)


def _compile_launch(context: Any, types: Sequence[Any], *, call: Call) -> Any:
    platforms = internals.platforms_of(context)
    if len(platforms) != 1 or platforms[0] not in SUPPORTED:
        raise NotImplementedError(
            f"twinhead compiles for one platform of {', '.join(SUPPORTED)}, and this program is for "
            f"{', '.join(platforms)}: use a loss in plain JAX there"
        )
    placement.warn_of_replicas(internals.replicas_of(context))
    return lambda *operands: bridge.run(call, platforms[0], operands)


internals.lower_as(_launch, _compile_launch)


# ---- differentiation: once, and in reverse


def _no_second_derivative(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "second derivatives of twinhead's losses are not supported: the gradient is computed by a kernel; "
        "differentiate once, or use a loss in plain JAX"
    )


def _no_forward_mode(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "forward-mode differentiation (jax.jvp, jax.jacfwd) of twinhead's losses is not supported: its kernels compute "
        "gradients; use jax.grad, jax.vjp or jax.jacrev, or a loss in plain JAX"
    )


def _transpose_tangent(
    cotangent: Any, *operands: Any, call: Call, wanted: tuple[str, ...]
) -> Sequence[jax.Array | ad.Zero | None]:
    names = _residual_names(call.step)
    residuals, tangents = dict(zip(names, operands, strict=False)), operands[len(names) :]
    unknown = tuple(name for name, t in zip(wanted, tangents, strict=True) if ad.is_undefined_primal(t))
    if isinstance(cotangent, ad.Zero):
        gradients: dict[str, Any] = {n: ad.Zero(t.aval) for n, t in zip(wanted, tangents, strict=True) if n in unknown}
    else:
        back = replace(call, step=call.step.gradient(unknown))
        results = launch(back, {**residuals, "grad_loss": cotangent})
        gradients = {name: results[f"grad_{name}"] for name in unknown}
    return [None] * len(names) + [gradients.get(name) for name in wanted]


ad.primitive_jvps[_launch] = _no_second_derivative
ad.primitive_jvps[_tangent] = _no_second_derivative
ad.primitive_transposes[_tangent] = _transpose_tangent
_tangent.def_impl(_no_forward_mode)
internals.lower_as(_tangent, _no_forward_mode)


# ---- vmap


@dataclass(frozen=True)
class _Bound:
    """A primitive with its parameters, hashed by value, so that equal ones are compiled once."""

    primitive: Primitive
    parameters: tuple[tuple[str, Any], ...]

    def __call__(self, *operands: jax.Array) -> Any:
        return _bind(self.primitive, *operands, **dict(self.parameters))


def _batch_launch(arrays: Sequence[jax.Array], dims: Sequence[int | None], *, call: Call) -> Any:
    one = call.plain()
    folding = Folding(one.step, call.step.inputs, arrays, dims)
    if folding.possible:
        results = _bind(_launch, *folding.operands(), call=replace(call, step=folding.step))
        found = {b.name: folding.unfold(b.name, r) for b, r in zip(one.results, results, strict=True)}
    else:
        results = folding.one_by_one(_Bound(_launch, (("call", one),)))
        found = {b.name: (r, 0) for b, r in zip(one.results, results, strict=True)}
    for buffer in call.results:
        if buffer.name not in found:  # nobody will read it
            found[buffer.name] = jnp.zeros_like(call.shape(buffer)), None
    return tuple(zip(*(found[buffer.name] for buffer in call.results), strict=True))


def _batch_tangent(
    arrays: Sequence[jax.Array], dims: Sequence[int | None], *, call: Call, wanted: tuple[str, ...]
) -> Any:
    names = (*_residual_names(call.step), *(f"tangent_{name}" for name in wanted))
    call = call.plain()
    folding = Folding(call.step, names, arrays, dims)
    if not folding.possible:
        return folding.one_by_one(_Bound(_tangent, (("call", call), ("wanted", wanted)))), 0
    result = _bind(_tangent, *folding.operands(), call=replace(call, step=folding.step), wanted=wanted)
    return folding.unfold("loss", result)


batching.primitive_batchers[_launch] = _batch_launch
batching.primitive_batchers[_tangent] = _batch_tangent
