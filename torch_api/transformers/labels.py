"""Labels that remember which of the model's labels each of them is, however a loss shifts, slices and flattens them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from torch_api.functional import cross_entropy
from torch_api.transformers.calls import CrossEntropyCall, name_of
from torch_api.transformers.session import Session

# What moves labels about without changing them, which is done to their positions too.
_MOVES = {
    "__getitem__", "clone", "contiguous", "detach", "flatten", "long", "narrow", "pad", "permute", "reshape", "squeeze",
    "to", "transpose", "unsqueeze", "view",
}  # fmt: skip
_EDITS = {"masked_fill"}  # what changes some of them, and leaves them where they are


class Labels(Tensor):
    """A tensor of labels with its positions among the labels that the model was given.

    Attributes:
        positions: int64, like the labels; `total` where it is none of them.
        session: the forward pass they belong to.
        total: how many labels the model was given.
    """

    positions: Tensor
    session: Session
    total: int

    @staticmethod
    def track(labels: Tensor, session: Session) -> Labels:
        positions = torch.arange(labels.numel(), device=labels.device).view(labels.shape)
        return _tracked(labels, positions, session, labels.numel())

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain_args, plain_kwargs = tree_map_only(Labels, plain, (args, kwargs))
        labels = args[0] if args else None
        name = name_of(func)
        if isinstance(labels, Labels) and name in _MOVES | _EDITS:
            moved = func(*plain_args, **plain_kwargs)
            positions = labels.positions
            if name == "pad":
                positions = F.pad(positions, args[1] if len(args) > 1 else kwargs["pad"], value=labels.total)
            elif name in _MOVES:
                positions = func(positions, *plain_args[1:], **plain_kwargs)
            return _tracked(moved, positions, labels.session, labels.total)
        if func is F.cross_entropy:
            call = CrossEntropyCall.of(args, kwargs)
            if isinstance(call.target, Labels) and call.fits(call.input):
                if call.target.session.settings.use_token_scaling:
                    raise ValueError("use_token_scaling must be False where the loss is not fused with the head")
                return call.target.session.loss(
                    lambda **options: cross_entropy(call.input, plain(call.target), weight=call.weight, **options),
                    call.target.positions,
                    **call.options,
                )
        return func(*plain_args, **plain_kwargs)


def plain(labels: Tensor) -> Tensor:
    """The tensor itself, which no longer remembers."""
    with torch._C.DisableTorchFunctionSubclass():
        return labels.as_subclass(Tensor) if isinstance(labels, Labels) else labels


def _tracked(labels: Tensor, positions: Tensor, session: Session, total: int) -> Labels:
    tracked = labels.as_subclass(Labels)
    tracked.positions, tracked.session, tracked.total = positions, session, total
    return tracked
