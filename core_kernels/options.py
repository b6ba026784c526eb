"""What a loss call computes, beside its tensors: one frozen value, validated once and shared by both frontends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

FLOAT32_TINY, FLOAT32_MAX = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127  # the kernels compute in float32
REDUCTIONS = ("none", "mean", "sum")
FLAGS = (
    "use_token_scaling",
    "return_z_loss",
    "return_token_accuracy",
    "return_predicted_tokens",
    "return_counts",
    "check_labels",
)


@dataclass(frozen=True)
class Options:
    """The options of a cross entropy, by the names that the public functions give them.

    Construction validates and normalises every field (``1`` becomes ``1.0`` where a float is meant), so equal options
    compare and hash equal, and nothing below this value has to check it again.

    Raises:
        TypeError: a field has the wrong type (a flag must be a ``bool``, a number must not be one).
        ValueError: a field has the right type and no meaning (a negative smoothing, a softcap of zero).
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    lse_square_scale: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    reduction: str = "mean"
    use_token_scaling: bool = False
    return_z_loss: bool = False
    return_token_accuracy: bool = False
    return_predicted_tokens: bool = False
    return_counts: bool = False
    check_labels: bool = False

    def __post_init__(self) -> None:
        for name in FLAGS:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, Integral):
            raise TypeError(f"ignore_index must be an int, got {self.ignore_index!r}")
        if not -(2**63) <= self.ignore_index < 2**63:
            raise ValueError(f"ignore_index must fit in 64 bits, got {self.ignore_index!r}")
        self._set("ignore_index", int(self.ignore_index))
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of 'none', 'mean' and 'sum', got {self.reduction!r}")

        self._number("label_smoothing", lambda v: 0.0 <= v <= 1.0, "between 0 and 1")
        self._number("lse_square_scale", lambda v: v >= 0.0, "finite and not negative")
        self._number("logit_scale", lambda v: v != 0.0, "finite and not 0")
        if self.softcap is not None:
            self._number("softcap", lambda v: v > 0.0, "None, or finite and greater than 0")

    def _number(self, name: str, allowed: Callable[[float], bool], wanted: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a Python number, got {value!r}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        in_float32 = number == 0.0 or FLOAT32_TINY <= abs(number) <= FLOAT32_MAX
        if not (in_float32 and allowed(number)):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
        self._set(name, number)

    def _set(self, name: str, value: int | float) -> None:
        object.__setattr__(self, name, value)

    @staticmethod
    def reduction_over(num_items: Any, reduction: str, arrays: tuple[type, ...], wanted: str) -> str:
        """The reduction to run where ``"mean"`` divides by ``num_items`` instead, if given: a sum, divided after.

        ``num_items`` may be an int, or a scalar of the types ``arrays``, which errors call ``wanted``.
        """
        if num_items is None:
            return reduction
        is_int = isinstance(num_items, int) and not isinstance(num_items, bool)
        if not (is_int or isinstance(num_items, arrays)):
            raise TypeError(f"num_items_in_batch must be an int or {wanted}, got {num_items!r}")
        shape = () if is_int else tuple(num_items.shape)
        if math.prod(shape) != 1:
            raise ValueError(f"num_items_in_batch must be one number, got shape {shape}")
        if is_int and num_items < 0:
            raise ValueError(f"num_items_in_batch must not be negative, got {num_items}")
        if reduction != "mean":
            raise ValueError(f"num_items_in_batch must be None unless reduction is 'mean', got reduction={reduction!r}")
        return "sum"

    @property
    def needs_argmax(self) -> bool:
        """Predictions, accuracy and counts share one argmax; without them it is compiled out."""
        return self.return_predicted_tokens or self.return_token_accuracy or self.return_counts

    @property
    def per_token(self) -> bool:
        return self.reduction == "none"

    @property
    def returns_output(self) -> bool:
        """Whether the call answers with a ``CrossEntropyOutput`` rather than the bare loss."""
        return self.return_z_loss or self.needs_argmax


OPTION_NAMES = tuple(field.name for field in fields(Options))
