"""The loss as a differentiable JAX function: one ``custom_vjp`` over the bridge, for every operation and option."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from core_kernels import Plan, plan_backward
from jax_api import bridge

Arrays = dict[str, jax.Array]

DIFFERENTIABLE = ("logits", "x", "weight", "bias")


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Wanted:
    """Names of the inputs that are being differentiated: static, though it travels with the residuals."""

    names: tuple[str, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def planned_loss(plan: Plan, transposed: frozenset[str], inputs: Arrays) -> Arrays:
    """The outputs of ``plan`` over ``inputs``, both by name. Only ``loss`` is differentiable, once, in reverse."""
    return _forward(plan, transposed, inputs)[0]


def _forward(plan: Plan, transposed: frozenset[str], inputs: Arrays) -> tuple[Arrays, Arrays]:
    results = _run(plan, transposed, inputs)
    outputs = {buffer.name: results[buffer.name] for buffer in plan.outputs}
    return outputs, {buffer.name: results[buffer.name] for buffer in plan.saved}


def _vjp_forward(plan: Plan, transposed: frozenset[str], inputs: dict[str, Any]) -> tuple[Arrays, Any]:
    wanted = _Wanted(tuple(name for name, array in inputs.items() if array.perturbed and name in DIFFERENTIABLE))
    values = {name: array.value for name, array in inputs.items()}
    outputs, saved = _forward(plan, transposed, values)
    return outputs, (wanted, values, saved)


def _vjp_backward(plan: Plan, transposed: frozenset[str], residuals: Any, cotangents: dict[str, Any]) -> tuple[Any]:
    wanted, inputs, saved = residuals
    gradients: dict[str, jax.Array | None] = dict.fromkeys(inputs)
    grad_loss = cotangents["loss"]
    if wanted.names and not isinstance(grad_loss, SymbolicZero):
        backward = plan_backward(plan, wanted.names)
        flipped = transposed | {f"grad_{name}" for name in transposed}
        results = _run(backward, flipped, {**inputs, **saved, "grad_loss": grad_loss})
        gradients.update({name.removeprefix("grad_"): gradient for name, gradient in results.items()})
    return (gradients,)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(plan: Plan, transposed: frozenset[str], inputs: Arrays) -> Arrays:
    """The bridge, with a word for those who differentiate through it: that is, a gradient of a gradient."""
    return bridge.run(plan, inputs, transposed)


def _refuse_second_derivative(plan: Plan, transposed: frozenset[str], inputs: Arrays) -> Any:
    raise NotImplementedError(
        "second derivatives of twinhead's losses are not supported: the gradient is computed by a kernel; "
        "differentiate once, or use a loss in plain JAX"
    )


planned_loss.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
_run.defvjp(_refuse_second_derivative, _refuse_second_derivative)
