"""What models do to logits before the loss, as far as a fused loss can do it too.

Each step says what it changes about deferred logits, or ``None`` where only real logits will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_api.transformers.calls import SUPPORTED

if TYPE_CHECKING:
    from torch_api.transformers.deferred import Logits

Changes = dict[str, Any] | None


def times(logits: Logits, factor: Any, **options: Any) -> Changes:
    if options or isinstance(factor, bool) or not isinstance(factor, (int, float)):
        return None
    if factor == 0 or not math.isfinite(factor) or (logits.capped and factor < 0):
        return None
    return {"post": logits.post * factor} if logits.capped else {"scale": logits.scale * factor}


def over(logits: Logits, divisor: Any, **options: Any) -> Changes:
    inverse = 1.0 / divisor if isinstance(divisor, (int, float)) and divisor != 0 else None
    return times(logits, inverse, **options)


def tanh(logits: Logits, **options: Any) -> Changes:
    return None if logits.capped or options else {"capped": True}


def same(logits: Logits, **options: Any) -> Changes:
    return {}


def detach(logits: Logits) -> Changes:
    return {"grad": False}


def to_float(logits: Logits, **options: Any) -> Changes:
    return {"dtype": torch.float32}


def to(logits: Logits, *args: Any, **kwargs: Any) -> Changes:
    """A cast does not round: the loss is computed from float32 logits whatever they are cast to."""
    if (args and not isinstance(args[0], (torch.dtype, torch.device, str, int))) or "other" in kwargs:
        return None
    kwargs.pop("copy", None)
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    stays = device is None or device == logits.rows.device
    return {"dtype": dtype or logits.dtype} if stays and (dtype is None or dtype in SUPPORTED) else None


def reshape(name: str, logits: Logits, *args: Any, **kwargs: Any) -> Changes:
    """A reshape that keeps the last dimension keeps the rows, and their order."""
    shape = getattr(torch.empty(logits.shape, dtype=torch.bool, device="meta"), name)(*args, **kwargs).shape
    if not shape or shape[-1] != logits.shape[-1]:
        return None
    return {"shape": tuple(shape), "rows": logits.rows.reshape(*shape[:-1], logits.rows.shape[-1])}


def index(logits: Logits, index: Any) -> Changes:
    """An index of the tokens, which leaves the vocab alone."""
    *tokens, vocab = logits.shape
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(p, bool) or not isinstance(p, (int, slice, list, Tensor, type(...))) for p in parts):
        return None
    if any(isinstance(p, Tensor) and p.dtype == torch.uint8 for p in parts):  # a mask, of old
        return None
    dims = [p.dim() if isinstance(p, Tensor) and p.dtype == torch.bool else int(p is not ...) for p in parts]
    holes = [i for i, p in enumerate(parts) if p is ...]
    if len(holes) > 1 or sum(dims) > len(tokens) + 1:
        return None
    if (holes or sum(dims) == len(tokens) + 1) and parts[-1] is not ...:  # the last part is the vocab's
        last = parts.pop()
        if not isinstance(last, slice) or last.indices(vocab) != (0, vocab, 1):
            return None
        dims.pop()
    for i in holes:
        parts[i : i + 1] = [slice(None)] * (len(tokens) - sum(dims))
    rows = logits.rows[tuple(parts)]
    return {"shape": (*rows.shape[:-1], vocab), "rows": rows}


STEPS: dict[str, Callable[..., Changes]] = {
    "__getitem__": index,
    "clone": same,
    "contiguous": same,
    "detach": detach,
    "div": over,
    "float": to_float,
    "mul": times,
    "tanh": tanh,
    "to": to,
    **{name: partial(reshape, name) for name in ("flatten", "reshape", "squeeze", "unsqueeze", "view")},
}
