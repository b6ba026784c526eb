"""The DLPack bridge: runs a plan over XLA's own buffers, inside a compiled program or out of it.

A compiled program calls back into Python with its device buffers; torch views them without a copy and launches on
XLA's stream. Nothing is allocated through torch on a GPU: workspace is declared as extra results, so it is XLA's.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.experimental.buffer_callback import buffer_callback

from core_kernels import Plan, launch

_CPU = 1  # DLPack's kDLCPU


@dataclass(frozen=True)
class PlanCallback:
    """Fills the buffers of ``plan`` with its inputs. Hashed by value on purpose: the callback is a static parameter of
    the compiled program, so equal calls share one executable.

    ``transposed`` names the tensors that JAX holds the other way round (a weight kept as ``(H, V)``).
    """

    plan: Plan
    transposed: frozenset[str]

    def __call__(self, context: Any, outputs: Sequence[Any], *inputs: Any) -> None:
        names = (*self.plan.inputs, *(buffer.name for buffer in self.plan.buffers))
        with _xla_stream(context, inputs[0], self.plan):
            tensors = {
                name: torch.from_dlpack(buffer) for name, buffer in zip(names, (*inputs, *outputs), strict=True)
            }
            launch(self.plan, {name: t.T if name in self.transposed else t for name, t in tensors.items()})


def run(plan: Plan, inputs: Mapping[str, jax.Array], transposed: frozenset[str]) -> dict[str, jax.Array]:
    """Run ``plan`` and return its outputs and saved buffers by name."""
    kept = plan.outputs + plan.saved
    shapes = {
        buffer.name: jax.ShapeDtypeStruct(
            buffer.shape[::-1] if buffer.name in transposed else buffer.shape, jax_dtype(buffer.dtype)
        )
        for buffer in plan.buffers
    }
    if plan.problem.tokens == 0:  # nothing to run, and an empty array has no buffer to hand over
        return {buffer.name: jnp.zeros_like(shapes[buffer.name]) for buffer in kept}
    call = buffer_callback(
        PlanCallback(plan, transposed), tuple(shapes.values()), vmap_method="sequential"  # never tiles the weight
    )
    results = dict(zip(shapes, call(*(inputs[name] for name in plan.inputs)), strict=True))
    return {buffer.name: results[buffer.name] for buffer in kept}


def jax_dtype(dtype: torch.dtype) -> jnp.dtype:
    return jnp.dtype(str(dtype).removeprefix("torch."))


def torch_dtype(dtype: Any) -> torch.dtype | str:
    """The torch dtype of the same name, or the name where torch has none."""
    name = getattr(dtype, "name", str(dtype))
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else name


def torch_device(arrays: Sequence[jax.Array]) -> torch.device:
    """Where a call on ``arrays`` will run: where they lie, or on the default backend if they are being traced."""
    device = next((next(iter(a.devices())) for a in arrays if not isinstance(a, jax.core.Tracer)), None)
    device = device or jax.config.jax_default_device  # type: ignore[attr-defined]
    platform = getattr(device, "platform", device) or jax.default_backend()
    if platform == "cpu":
        return torch.device("cpu")
    if platform in ("gpu", "cuda", "rocm"):
        return torch.device("cuda", getattr(device, "local_hardware_id", None) or 0)
    raise NotImplementedError(f"twinhead runs on JAX's CPU and GPU backends; this call is for the backend {platform!r}")


@contextlib.contextmanager
def _xla_stream(context: Any, buffer: Any, plan: Plan) -> Iterator[None]:
    """Torch's, hence Triton's, work goes to XLA's stream: ``Buffer.__dlpack__`` synchronises with no other."""
    kind, index = buffer.__dlpack_device__()
    if (plan.device_type == "cpu") != (int(kind) == _CPU):
        raise RuntimeError(
            f"twinhead traced this call for {plan.device_type}, JAX's default device, but its arrays are elsewhere: "
            "trace it under jax.default_device(...) of the device that holds them"
        )
    if int(kind) == _CPU:
        with _ieee_denormals():
            yield
    else:
        with torch.cuda.device(index), torch.cuda.stream(_external_stream(context.stream, index)):
            yield


@contextlib.contextmanager
def _ieee_denormals() -> Iterator[None]:
    """XLA:CPU flushes denormals on its threads and torch does not on its own: without this their bits would differ."""
    flushing = sys.float_info.min / 2 == 0.0
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushing)


@functools.lru_cache(maxsize=256)
def _external_stream(pointer: int, index: int) -> torch.cuda.ExternalStream:
    return torch.cuda.ExternalStream(pointer, device=torch.device("cuda", index))
