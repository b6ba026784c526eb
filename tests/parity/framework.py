"""What plain torch makes of a case: the measure of how exact is exact enough.

Gradients by autograd, in the case's own dtype: full logits by ``F.linear``, upcast to float32, as language models do.
Losses from inputs upcast to float32 before anything else, for the contract has no rounded logits. Only valid tokens go
in, so that it has an answer wherever the contract has one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.cases import Case, Inputs


def run(case: Case, inputs: Inputs, device: torch.device) -> dict[str, Tensor]:
    """Loss, z-loss and gradients by the names that ``frontends`` gives them, float64 on the CPU."""
    arrays = {k: v.detach().clone().to(device).requires_grad_() for k, v in inputs.arrays.items()}
    loss, _ = _losses(case, inputs, arrays)
    loss.backward(inputs.upstream.to(device).reshape(loss.shape))
    gradients = {f"grad_{k}": v.grad for k, v in arrays.items()}

    loss, z_loss = _losses(case, inputs, {k: v.detach().float() for k, v in arrays.items()})
    return {k: v.double().cpu() for k, v in {"loss": loss, "z_loss": z_loss, **gradients}.items()}


def _losses(case: Case, inputs: Inputs, arrays: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    options = case.options
    device = next(iter(arrays.values())).device
    labels = inputs.labels.reshape(-1).long().to(device)
    valid = (labels != case.ignore_index) & (labels >= 0) & (labels < case.vocab)
    class_weight = torch.ones(case.vocab) if inputs.class_weight is None else inputs.class_weight
    class_weight = class_weight.to(device)

    if case.operation == "linear":
        rows = arrays["x"].reshape(-1, case.hidden)[valid]
        z = F.linear(rows, arrays["weight"], arrays.get("bias")).float()
    else:
        z = arrays["logits"].reshape(-1, case.vocab)[valid].float()
    y = labels[valid]
    z = z * options.get("logit_scale", 1.0)
    if options.get("softcap") is not None:
        z = options["softcap"] * torch.tanh(z / options["softcap"])

    ce = F.cross_entropy(
        z, y, weight=class_weight, reduction="none", label_smoothing=options.get("label_smoothing", 0.0)
    )
    z_loss = torch.zeros_like(ce)
    if options.get("lse_square_scale"):
        z_loss = options["lse_square_scale"] * z.logsumexp(1).square()
    if options.get("use_token_scaling"):
        scale = z.detach().softmax(1).gather(1, y[:, None])[:, 0]
        ce, z_loss = ce * scale, z_loss * scale

    if case.reduction == "none":
        at = valid.nonzero()[:, 0]
        zeros = torch.zeros(labels.shape, device=device)
        ce, z_loss = zeros.index_put((at,), ce), zeros.index_put((at,), z_loss)
    elif options.get("num_items_in_batch"):
        ce, z_loss = ce.sum() / options["num_items_in_batch"], z_loss.sum() / options["num_items_in_batch"]
    elif case.reduction == "sum" or not len(y):
        ce, z_loss = ce.sum(), z_loss.sum()
    else:
        ce, z_loss = ce.sum() / class_weight[y].sum(), z_loss.mean()
    return ce + z_loss, z_loss
