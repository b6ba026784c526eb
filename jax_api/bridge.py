"""The DLPack bridge: runs a plan over XLA's own buffers, inside a compiled program or out of it.

A compiled program calls back into Python with its device buffers; torch views them without a copy and launches on
XLA's stream. Nothing is allocated through torch on a GPU: workspace is declared as one more result, so it is XLA's.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import torch

from core_kernels import Buffer, Plan, Step, for_gradient, launch, plan
from jax_api import internals

_CPU = 1  # DLPack's kDLCPU


@dataclass(frozen=True)
class Call:
    """A step as JAX calls it. ``transposed`` names the tensors that JAX holds the other way round (a weight kept as
    ``(H, V)``); ``cuda_graph`` lets XLA record the launch and replay it.
    """

    step: Step
    transposed: frozenset[str]
    cuda_graph: bool

    def __post_init__(self) -> None:
        if not isinstance(self.cuda_graph, bool):
            raise TypeError(f"cuda_graph must be True or False, got {self.cuda_graph!r}")

    @property
    def results(self) -> tuple[Buffer, ...]:
        return self.step.results

    def for_gradient(self, wanted: Iterable[str]) -> Call:
        """The same loss where its gradient by ``wanted`` inputs will be asked for. A program is traced before it is
        known where it runs: on another platform than JAX's default it is right as well, and no more than slower.
        """
        device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
        most, few, many = for_gradient(self.step, wanted, device)
        return replace(self, step=few if self.step.problem.tokens <= most else many)

    def plain(self) -> Call:
        return replace(self, step=self.step.plain())

    def shape(self, buffer: Buffer) -> jax.ShapeDtypeStruct:
        """A buffer's shape and dtype as JAX has it."""
        flipped = buffer.name.removeprefix("grad_") in self.transposed
        return jax.ShapeDtypeStruct(buffer.shape[::-1] if flipped else buffer.shape, jax_dtype(buffer.dtype))


@dataclass(frozen=True)
class PlanCallback:
    """Fills the buffers of ``plan`` with its inputs. Hashed by value on purpose: the callback is a static parameter of
    the compiled program, so equal calls share one executable.

    ``ready`` are the GPUs where it has run, so where its kernels are compiled and loaded. Neither may happen while XLA
    records a program, which is why it runs one before that.
    """

    plan: Plan
    transposed: frozenset[str]
    ready: set[int] = field(default_factory=set, compare=False)

    def __call__(self, context: Any, outputs: Sequence[Any], *inputs: Any) -> None:
        names = (*self.plan.inputs, *(buffer.name for buffer in self.plan.allocations))
        with _xla_stream(context, inputs[0]) as device:
            if device not in self.ready and device is not None and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("XLA records twinhead's kernels before it has run them: use cuda_graph=False")
            tensors = {
                name: torch.from_dlpack(buffer) for name, buffer in zip(names, (*inputs, *outputs), strict=True)
            }
            for name in self.transposed & tensors.keys():
                tensors[name] = tensors[name].T
            launch(self.plan, tensors)
            if device is not None:
                self.ready.add(device)


def run(call: Call, platform: str, operands: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Run ``call`` on ``platform``, over its step's inputs in order; answers its results in order."""
    if call.step.problem.tokens == 0:  # nothing to run, and an empty array has no buffer to hand over
        return tuple(jnp.zeros_like(call.shape(buffer)) for buffer in call.results)
    if platform != "cpu" and not torch.cuda.is_available():
        raise RuntimeError("this program is for a GPU, and the installed torch sees none: install torch with CUDA")
    planned = plan(call.step, torch.device("cpu") if platform == "cpu" else torch.device("cuda"))
    shapes = tuple(call.shape(buffer) for buffer in planned.allocations)
    transposed = call.transposed | {f"grad_{name}" for name in call.transposed}
    callback = internals.buffer_callback(
        PlanCallback(planned, transposed), shapes, command_buffer_compatible=call.cuda_graph
    )
    return tuple(callback(*operands)[: len(call.results)])


def jax_dtype(dtype: torch.dtype) -> jnp.dtype:
    return jnp.dtype(str(dtype).removeprefix("torch."))


def torch_dtype(dtype: Any) -> torch.dtype | str:
    """The torch dtype of the same name, or the name where torch has none."""
    name = getattr(dtype, "name", str(dtype))
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else name


@contextlib.contextmanager
def _xla_stream(context: Any, buffer: Any) -> Iterator[int | None]:
    """Torch's, hence Triton's, work goes to XLA's stream: ``Buffer.__dlpack__`` synchronises with no other.

    Answers the GPU's number, or ``None`` on a CPU.
    """
    kind, index = buffer.__dlpack_device__()
    if int(kind) == _CPU:
        with _ieee_denormals():
            yield None
    else:
        with torch.cuda.device(index), torch.cuda.stream(_external_stream(context.stream, index)):
            yield index


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
