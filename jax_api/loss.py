"""The loss as a differentiable JAX function, over a whole vocab or over one that is sharded along a mesh axis."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax

from core_kernels import DIFFERENTIABLE
from jax_api import internals
from jax_api.bridge import Call
from jax_api.primitives import launch, loss_tangent

Arrays = dict[str, jax.Array]
Axis = str | tuple[str, ...] | None


def planned_loss(call: Call, vocab_axis: Axis, inputs: Arrays) -> Arrays:
    """The outputs of ``call`` over ``inputs``, both by name. Only ``loss`` is differentiable, once, in reverse."""
    axes = internals.varying_axes(*inputs.values())
    # Outside the differentiated function: the transpose then sums a gradient over the axes its array is the same along.
    varied = {name: internals.vary_over(inputs[name], axes) for name in DIFFERENTIABLE if name in inputs}
    return _loss(call, vocab_axis, {**inputs, **varied})


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _loss(call: Call, vocab_axis: Axis, inputs: Arrays) -> Arrays:
    return _outputs(call, _forward(call, vocab_axis, inputs))


def _forward(call: Call, vocab_axis: Axis, inputs: Arrays) -> Arrays:
    """What the loss step computes and saves. Of a sharded vocab, each device makes it of what all shards know."""
    if vocab_axis is None:
        return launch(call, inputs)
    known = launch(replace(call, step=call.step.of_kind("shard")), inputs)["shard_statistics"]
    gathered = jax.lax.all_gather(known, vocab_axis, to="invarying")
    return launch(replace(call, step=call.step.of_kind("combine")), {**inputs, "shard_statistics": gathered})


def _outputs(call: Call, results: Arrays) -> Arrays:
    return {buffer.name: results[buffer.name] for buffer in call.step.outputs}


@functools.partial(_loss.defjvp, symbolic_zeros=True)
def _loss_jvp(call: Call, vocab_axis: Axis, primals: tuple[Arrays], tangents: tuple[dict[str, Any]]) -> Any:
    inputs, wanted = primals[0], {
        name: tangent
        for name, tangent in tangents[0].items()
        if name in DIFFERENTIABLE and not isinstance(tangent, internals.SymbolicZero)
    }
    if wanted and vocab_axis is None:
        call = call.for_gradient(wanted)
    results = _forward(call, vocab_axis, inputs)
    outputs = _outputs(call, results)
    answer: dict[str, Any] = {name: internals.tangent_zero(output) for name, output in outputs.items()}
    if wanted:
        answer["loss"] = loss_tangent(call, {**inputs, **results}, wanted)
        if vocab_axis is not None:  # each shard knows its part of it
            summed = jax.lax.psum(answer["loss"], vocab_axis)
            answer["loss"] = internals.vary_over(summed, internals.varying_axes(outputs["loss"]))
    return outputs, answer
