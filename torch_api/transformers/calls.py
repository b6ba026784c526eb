"""What torch hands to a tensor subclass: a function's name, and the arguments of a cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)


def name_of(func: Callable[..., Any]) -> str:
    """The function's name; of an attribute being read, the attribute's."""
    name = getattr(func, "__name__", str(func))
    return func.__self__.__name__ if name == "__get__" else name  # type: ignore[attr-defined]


@dataclass(frozen=True)
class CrossEntropyCall:
    """The arguments of a call of ``torch.nn.functional.cross_entropy``."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    options: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CrossEntropyCall:
        return _call(*args, **kwargs)

    def fits(self, logits: Tensor) -> bool:
        """Whether the classes are the last dimension of `logits`, and the target is a class index for each row."""
        shape = logits.shape
        return (
            len(shape) in (1, 2)
            and self.target.shape == shape[:-1]
            and self.target.dtype in (torch.int64, torch.int32)
            and logits.dtype in SUPPORTED
        )


def _call(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> CrossEntropyCall:
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return CrossEntropyCall(input, target, weight, options)
