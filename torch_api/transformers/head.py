"""The model's output embeddings: their linear layer is caught where it runs, with the weight that it runs with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from torch_api.transformers.calls import name_of
from torch_api.transformers.session import Session

Linear = Callable[[Tensor, Tensor, Tensor | None], Any]  # of hidden states, weight and bias

_LATE = (
    "these logits were left out, and the weight that they need {}: look at them {}, or disable(model) before it runs"
)


@contextmanager
def intercepted(head: nn.Module, linear: Linear) -> Iterator[None]:
    """Within it the linear layer of `head` is `linear`; its own ``forward`` and hooks run as ever."""

    def wrap(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if module is not head or not args:  # replicas of DataParallel have their hooks in common
            return args
        if type(args[0]) not in (Tensor, _HeadInput):  # a DTensor has ways of its own
            return args
        return _head_input(args[0], linear), *args[1:]

    handle = head.register_forward_pre_hook(wrap)
    try:
        yield
    finally:
        handle.remove()


class _HeadInput(Tensor):
    """Hidden states on their way through the head to its linear layer."""

    linear: Linear

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            plain = tree_map_only(_HeadInput, lambda t: t.as_subclass(Tensor), (args, kwargs or {}))
        if func is F.linear and isinstance(args[0], _HeadInput):
            return _call(args[0].linear, *plain[0], **plain[1])
        result = func(*plain[0], **plain[1])
        if name_of(func) == "to" and isinstance(args[0], _HeadInput):  # hooks of the head may move its input
            return _head_input(result, args[0].linear)
        return result


def _head_input(hidden: Tensor, linear: Linear) -> _HeadInput:
    wrapped = hidden.as_subclass(_HeadInput)
    wrapped.linear = linear
    return wrapped


def _call(linear: Linear, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return linear(input, weight, bias)


@dataclass(frozen=True)
class Projection:
    """A linear layer that was not run, and the circumstances in which it would have been."""

    head: nn.Module
    session: Session
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    autocast: torch.dtype | None
    shape: torch.Size  # of the weight
    versions: tuple[int, ...]

    @classmethod
    def of(cls, head: nn.Module, session: Session, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Projection:
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return cls(head, session, hidden, weight, bias, autocast, weight.shape, _versions(weight, bias))

    @property
    def dtype(self) -> torch.dtype:
        return self.autocast or self.hidden.dtype

    def run(self, linear: Linear, hidden: Tensor) -> Any:
        """``linear(hidden, weight, bias)``, within the head's forward pass if its weight is whole nowhere else."""
        with torch.autocast(hidden.device.type, self.autocast, enabled=self.autocast is not None):
            if self.weight.shape != self.shape or self.weight.untyped_storage().size() == 0:  # ZeRO or FSDP freed it
                if not self.session.open:  # to gather it again, all ranks would have to look
                    raise RuntimeError(_LATE.format("is sharded again", "before the backward pass"))
                with intercepted(self.head, linear):
                    return self.head(hidden)
            if _versions(self.weight, self.bias) != self.versions:
                raise RuntimeError(_LATE.format("has been changed since", "before the optimizer's step"))
            return linear(hidden, self.weight, self.bias)


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(t._version for t in tensors if t is not None and not t.is_inference())
