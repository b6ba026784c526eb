"""The one operator of this package: a launch. To ``torch.compile``, to tracing and to fake tensors it is opaque.

``twinhead::launch(Tensor[] inputs, str step) -> Tensor[]`` runs a step over its inputs, in their order, and answers its
outputs and what it saves. The step is a text that says all of it but the number of tokens, so one text, and one
compiled program, serves every length.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from core_kernels import Options, Plan, Problem, Step, check_labels, plan
from core_kernels import for_gradient as step_for_gradient
from core_kernels import launch as launch_plan

_library = torch.library.Library("twinhead", "DEF")
_library.define("launch(Tensor[] inputs, str step) -> Tensor[]")

launch: Callable[[list[Tensor], str], list[Tensor]] = torch.ops.twinhead.launch.default


def cached_constant(make: Callable[..., Any]) -> Callable[..., Any]:
    """``make``, once for equal arguments, and a constant to the compiler, which does not look inside."""
    made = functools.lru_cache(maxsize=1024, typed=True)(make)

    @torch.compiler.assume_constant_result
    def constant(*arguments: Any, **keywords: Any) -> Any:
        try:
            return made(*arguments, **keywords)
        except TypeError:  # of what cannot be hashed, too: the error shall be about the argument
            return make(*arguments, **keywords)

    return constant


def encode(step: Step) -> str:
    """``step`` as text, for any number of tokens."""
    fields = asdict(step)
    fields["index_dtype"], fields["problem"]["dtype"] = map(_name, (step.index_dtype, step.problem.dtype))
    del fields["problem"]["leading"]
    return json.dumps(fields)


@functools.lru_cache(maxsize=1024)
def decode(text: str) -> Step:
    """The step that ``text`` tells of, over tokens that are yet to be counted."""
    fields = json.loads(text)
    problem = fields["problem"]
    problem |= {"leading": (-1,), "groups": tuple(problem["groups"]), "dtype": getattr(torch, problem["dtype"])}
    fields |= {"problem": Problem(**problem), "options": Options(**fields["options"])}
    fields |= {name: tuple(fields[name]) for name in ("wanted", "ahead")}
    fields |= {"index_dtype": getattr(torch, fields["index_dtype"])}
    return Step(**fields)


@cached_constant
def output_names(text: str) -> tuple[str, ...]:
    return tuple(buffer.name for buffer in decode(text).outputs)


@cached_constant
def for_gradient(text: str, wanted: tuple[str, ...], device: torch.device) -> tuple[int, str, str]:
    """Up to how many tokens which step serves the gradient that will follow, and which with more."""
    most, few, many = step_for_gradient(decode(text), wanted, device)
    return most, encode(few), encode(many)


@cached_constant
def gradient_step(text: str, wanted: tuple[str, ...]) -> str:
    return encode(decode(text).gradient(wanted))


@cached_constant
def step_of_kind(text: str, kind: str) -> str:
    return encode(decode(text).of_kind(kind))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _over_tokens(text: str, tokens: Any) -> Step:
    step = decode(text)
    return replace(step, problem=replace(step.problem, leading=(tokens,)))


@functools.lru_cache(maxsize=1024)
def _planned(text: str, tokens: int, device: torch.device) -> Plan:
    return plan(_over_tokens(text, tokens), device)


def _launch(inputs: list[Tensor], text: str) -> list[Tensor]:
    first = inputs[0]  # the rows, or one label for each: as many as there are tokens
    device = first.device
    planned = _planned(text, first.shape[0], device)
    tensors = dict(zip(planned.inputs, inputs, strict=True))
    options = planned.options
    if planned.step.kind in ("loss", "shard") and (options.check_labels or device.type == "cpu"):
        check_labels(tensors["labels"], planned.problem.vocab, options.ignore_index, "target")
    tensors["labels"] = tensors["labels"].flatten()  # they come in their own shape, to name the place of a bad one
    for buffer in planned.allocations:
        tensors[buffer.name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    launch_plan(planned, tensors)
    return [tensors[buffer.name] for buffer in planned.step.results]


def _fake_launch(inputs: list[Tensor], text: str) -> list[Tensor]:
    step = _over_tokens(text, inputs[0].shape[0])
    return [inputs[0].new_empty(buffer.shape, dtype=buffer.dtype) for buffer in step.results]


_library.impl("launch", _launch, "CPU")
_library.impl("launch", _launch, "CUDA")
torch.library.register_fake("twinhead::launch", _fake_launch, lib=_library)
