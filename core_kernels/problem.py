"""The shapes and dtypes of one loss call, checked once: errors name the argument, what it got and what it wants."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Argument:
    """One array argument as its frontend's user wrote it: enough to check it, in torch's terms.

    ``dtype`` is a torch dtype, or the name of one that torch does not have; ``device`` is ``None`` where the frontend
    leaves placement to its compiler (JAX).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    device: torch.device | None = None


@dataclass(frozen=True)
class Problem:
    """Sizes and dtypes of a cross entropy. ``hidden`` is ``None`` when the logits are given, not projected.

    ``shards`` is ``None`` where the vocab is whole; otherwise it lies in so many shards, of which this problem's
    weight is one, with ``columns`` classes. ``groups`` are problems side by side: each reduces its own tokens, which
    are consecutive; usually there is one, ``()``.
    """

    leading: tuple[int, ...]
    vocab: int
    hidden: int | None
    dtype: torch.dtype
    has_bias: bool
    has_class_weight: bool
    columns: int
    shards: int | None = None
    groups: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return math.prod(self.leading)

    @property
    def group_tokens(self) -> int:
        return self.tokens // max(1, math.prod(self.groups))

    def times(self, size: int) -> Problem:
        """``size`` such problems over one weight, one after the other."""
        return replace(self, leading=(size * self.tokens,), groups=(size, *self.groups))


def logits_problem(logits: Argument, labels: Argument, class_weight: Argument | None) -> Problem:
    """Check the arguments of a cross entropy over logits ``(..., V)`` and labels ``(...)``."""
    dtype = _float_dtype(logits)
    if not logits.shape:
        raise ValueError(f"{logits.name} must have shape (..., V), got a scalar")
    vocab = logits.shape[-1]
    if vocab < 1:
        raise ValueError(f"{logits.name} must have at least one class in its last dimension, got shape {logits.shape}")
    _check_labels(labels, logits)
    _check_class_weight(class_weight, vocab)
    _check_devices(logits, labels, class_weight)
    return Problem(logits.shape[:-1], vocab, None, dtype, False, class_weight is not None, vocab)


def linear_problem(
    x: Argument,
    weight: Argument,
    labels: Argument,
    bias: Argument | None,
    class_weight: Argument | None,
    shards: int | None = None,
    vocab: int | None = None,
) -> Problem:
    """Check the arguments of a fused linear cross entropy: ``x (..., H)``, ``weight (V, H)``, ``bias (V,)``.

    With ``shards``, ``weight`` and ``bias`` are one of so many shards of the vocab, which are equal unless the size of
    the ``vocab`` is given; ``class_weight`` is whole.
    """
    dtype = _float_dtype(x)
    for argument in (weight,) if bias is None else (weight, bias):
        if _float_dtype(argument) != dtype:
            raise TypeError(
                f"{argument.name} must have the dtype of {x.name}, {_name(dtype)}, got {_name(argument.dtype)}: "
                f"cast one of them"
            )
    if not x.shape:
        raise ValueError(f"{x.name} must have shape (..., H), got a scalar")
    if len(weight.shape) != 2:
        raise ValueError(f"{weight.name} must have shape (V, H), got {weight.shape}")
    columns, hidden = weight.shape
    vocab = columns * (shards or 1) if vocab is None else vocab
    if x.shape[-1] != hidden:
        raise ValueError(
            f"{weight.name} must have shape (V, {x.shape[-1]}) to match {x.name} of shape {x.shape}, got {weight.shape}"
        )
    if columns < 1 or hidden < 1:
        raise ValueError(f"{weight.name} must not be empty, got shape {weight.shape}")
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"{bias.name} must have shape ({columns},), got {bias.shape}")
    _check_labels(labels, x)
    _check_class_weight(class_weight, vocab)
    _check_devices(x, weight, labels, bias, class_weight)
    return Problem(x.shape[:-1], vocab, hidden, dtype, bias is not None, class_weight is not None, columns, shards)


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _float_dtype(argument: Argument) -> torch.dtype:
    if isinstance(argument.dtype, str) or argument.dtype not in FLOATS:
        raise TypeError(f"{argument.name} must be float32, bfloat16 or float16, got {_name(argument.dtype)}")
    return argument.dtype


def _check_labels(labels: Argument, like: Argument) -> None:
    if isinstance(labels.dtype, str) or labels.dtype not in INTEGERS:
        raise TypeError(f"{labels.name} must be int32 or int64 class indices, got {_name(labels.dtype)}")
    if labels.shape != like.shape[:-1]:
        raise ValueError(
            f"{labels.name} must have shape {like.shape[:-1]} to match {like.name} of shape {like.shape}, "
            f"got {labels.shape}"
        )


def _check_class_weight(class_weight: Argument | None, vocab: int) -> None:
    if class_weight is None:
        return
    _float_dtype(class_weight)
    if class_weight.shape != (vocab,):
        raise ValueError(f"{class_weight.name} must have shape ({vocab},), got {class_weight.shape}")


def _check_devices(first: Argument, *others: Argument | None) -> None:
    for other in others:
        if other is not None and other.device != first.device:
            raise ValueError(f"{other.name} must be on the device of {first.name}, {first.device}, got {other.device}")
