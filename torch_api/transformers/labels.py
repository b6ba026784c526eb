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
_EDITS = {"masked_fill", "where"}  # what changes some of them, and leaves them where they are


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
        tracked = labels.as_subclass(Labels)
        tracked.positions = torch.arange(labels.numel(), device=labels.device).view(labels.shape)
        tracked.session, tracked.total = session, labels.numel()
        return tracked

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain_args, plain_kwargs = tree_map_only(Labels, plain, (args, kwargs))
        labels = next((a for a in args if isinstance(a, Labels)), None)
        name = name_of(func)
        if labels is not None and name in _EDITS:
            edited = func(*plain_args, **plain_kwargs)
            return _tracked(edited, labels) if edited.shape == labels.shape else edited
        if labels is not None and labels is args[0] and name in _MOVES:
            moved = _tracked(func(*plain_args, **plain_kwargs), labels)
            if name == "pad":
                pad = args[1] if len(args) > 1 else kwargs["pad"]
                moved.positions = F.pad(labels.positions, pad, value=labels.total)
            else:
                moved.positions = func(labels.positions, *plain_args[1:], **plain_kwargs)
            return moved
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


def _tracked(tensor: Tensor, labels: Labels) -> Labels:
    tracked = tensor.as_subclass(Labels)
    tracked.positions, tracked.session, tracked.total = labels.positions, labels.session, labels.total
    return tracked
