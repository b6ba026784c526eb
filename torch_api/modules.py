"""The losses as ``nn.Module``s; constructor arguments, their order and their defaults are those of Liger-Kernel's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import core_kernels as core
from torch_api.functional import cross_entropy, fused_linear_cross_entropy
from torch_api.output import CrossEntropyOutput


class _Loss(nn.Module):
    """A loss whose options are attributes, validated when it is made."""

    engine: str
    memory: str | int = "auto"

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in core.OPTION_NAMES if hasattr(self, name)}

    def _check(self) -> None:
        """Raise on options that make no sense, whatever the tensors."""
        any_problem = core.Problem((), 1, None, torch.float32, has_bias=False, has_class_weight=False, columns=1)
        core.Step("loss", any_problem, core.Options(**self._options()), self.engine, self.memory)

    def extra_repr(self) -> str:
        defaults = core.Options()
        chosen = {name: value for name, value in self._options().items() if value != getattr(defaults, name)}
        return ", ".join(f"{name}={value!r}" for name, value in chosen.items())


class CrossEntropyLoss(_Loss):
    """:func:`cross_entropy` with its options fixed; called as ``(input, target)``, with
    ``num_items_in_batch=`` if it is known.

    Example:
        >>> loss_fn = CrossEntropyLoss(ignore_index=0, return_token_accuracy=True)
        >>> out = loss_fn(torch.randn(4, 10), torch.tensor([1, 2, 0, 9]))
        >>> out.token_accuracy.shape
        torch.Size([])
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        *,
        logit_scale: float = 1.0,
        return_counts: bool = False,
        engine: str = "auto",
        check_labels: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens
        self.logit_scale = logit_scale
        self.return_counts = return_counts
        self.engine = engine
        self.check_labels = check_labels
        self._check()

    def forward(
        self, input: Tensor, target: Tensor, *, num_items_in_batch: int | Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            num_items_in_batch=num_items_in_batch,
            engine=self.engine,
            **self._options(),
        )


class FusedLinearCrossEntropyLoss(_Loss):
    """:func:`fused_linear_cross_entropy` with its options fixed; called as ``(lin_weight, input, target, bias=None)``,
    with ``num_items_in_batch=`` if it is known.

    Example:
        >>> head = nn.Linear(16, 100)
        >>> loss_fn = FusedLinearCrossEntropyLoss(return_predicted_tokens=True)
        >>> out = loss_fn(head.weight, torch.randn(8, 16), torch.randint(0, 100, (8,)), head.bias)
        >>> out.predicted_tokens.shape
        torch.Size([8])
    """

    ce_weight: Tensor | None

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        *,
        logit_scale: float = 1.0,
        return_counts: bool = False,
        process_group: Any = None,
        memory: str | int = "auto",
        engine: str = "auto",
        check_labels: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("ce_weight", ce_weight)
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens
        self.logit_scale = logit_scale
        self.return_counts = return_counts
        self.process_group = process_group
        self.memory = memory
        self.engine = engine
        self.check_labels = check_labels
        self._check()

    def forward(
        self,
        lin_weight: Tensor,
        input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor | CrossEntropyOutput:
        return fused_linear_cross_entropy(
            input,
            lin_weight,
            target,
            bias=bias,
            ce_weight=self.ce_weight,
            accum_dtype=self.accum_dtype,
            num_items_in_batch=num_items_in_batch,
            process_group=self.process_group,
            memory=self.memory,
            engine=self.engine,
            **self._options(),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedLinearCrossEntropyLoss:
        memo[id(self.process_group)] = self.process_group  # a copy's is the same: groups cannot be copied
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new
