"""Cross entropy and fused linear cross entropy as functions of torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import _reduction

import core_kernels as core
from torch_api.autograd import PlannedLoss
from torch_api.output import CrossEntropyOutput


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    *,
    logit_scale: float = 1.0,
    engine: str = "auto",
    check_labels: bool = False,
) -> Tensor | CrossEntropyOutput:
    r"""Cross entropy between logits and class indices, with predictions and accuracy from the same pass.

    With :math:`z = \text{logit\_scale} \cdot \text{input}`, capped to
    :math:`\text{softcap} \tanh(z / \text{softcap})` if asked, :math:`\text{lse} = \log \sum_v e^{z_v}`, class weights
    :math:`w` and smoothing :math:`e`, a token's loss is

    .. math:: (1 - e)\, w_y (\text{lse} - z_y) + \tfrac{e}{V} \sum_v w_v (\text{lse} - z_v)
              + \text{lse\_square\_scale} \cdot \text{lse}^2

    All of it is computed in float32, in one pass over the logits forward and one backward; the input is not written to.

    Args:
        input: logits ``(..., V)``, float32, bfloat16 or float16, with any strides. Classes are the last dimension.
        target: class indices ``(...)``, int32 or int64.
        weight: class weights ``(V,)``, not differentiated.
        size_average, reduce: the deprecated spelling of ``reduction``, as in ``torch.nn.functional.cross_entropy``.
        ignore_index: tokens with this label have loss 0, gradient 0 and prediction -1.
        reduction: ``"mean"`` (the token losses over the sum of the valid tokens' weights, the z-losses over their
            count), ``"sum"``, or ``"none"`` (one loss per token). Without a valid token the loss is 0.
        label_smoothing: :math:`e`, in [0, 1].
        lse_square_scale: factor of the z-loss.
        softcap: bound of the logits, greater than 0, or ``None``.
        return_z_loss: also return the z-loss, detached.
        return_token_accuracy: also return the share of valid tokens predicted right.
        return_predicted_tokens: also return the argmax per token, the lowest index on a tie.
        logit_scale: factor of the logits before the cap.
        engine: ``"triton"``, ``"torch"`` (plain operations), or ``"auto"``: the kernels wherever they run.
        check_labels: on a GPU, wait for the labels and raise on a bad one. On a CPU that is always done.

    Returns:
        The loss, float32; a :class:`CrossEntropyOutput` if any ``return_*`` flag is on.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value; the message names it.
        IndexError: a label is neither in ``[0, V)`` nor ``ignore_index``. On a GPU, where finding out would mean
            waiting, its loss is NaN and its gradient 0 instead.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]], requires_grad=True)
        >>> out = cross_entropy(logits, torch.tensor([0, 2]), return_predicted_tokens=True)
        >>> out.predicted_tokens
        tensor([0, 1])
        >>> out.loss.backward()

    References:
        Online log-sum-exp: Milakov and Gimelshein, 2018, arXiv:1805.02867. Label smoothing: Szegedy et al., 2016,
        arXiv:1512.00567. z-loss: Chowdhery et al., 2022, arXiv:2204.02311. Softcap: Gemma Team, 2024,
        arXiv:2408.00118.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    options = core.Options(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        logit_scale=logit_scale,
        reduction=reduction,
        return_z_loss=return_z_loss,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
        check_labels=check_labels,
    )
    problem = core.logits_problem(
        _argument("input", input), _argument("target", target), _optional_argument("weight", weight)
    )
    step = core.Step("loss", problem, options, engine)
    inputs = {"logits": input, "labels": target, "class_weight": weight}
    return _run(step, inputs)


def fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
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
    memory: str | int = "auto",
    engine: str = "auto",
    check_labels: bool = False,
) -> Tensor | CrossEntropyOutput:
    r"""Cross entropy of ``input @ weight.T + bias`` without ever holding the logits.

    With :math:`z = \text{logit\_scale} \cdot (x W^\top + b)`, capped to
    :math:`\text{softcap} \tanh(z / \text{softcap})` if asked, :math:`\text{lse} = \log \sum_v e^{z_v}`, class weights
    :math:`w` and smoothing :math:`e`, a token's loss is

    .. math:: (1 - e)\, w_y (\text{lse} - z_y) + \tfrac{e}{V} \sum_v w_v (\text{lse} - z_v)
              + \text{lse\_square\_scale} \cdot \text{lse}^2

    The forward pass keeps running statistics of each row of logits; the backward pass projects again, one slice of the
    vocab at a time, and sums every gradient in float32 before rounding it once. Without gradients only the one
    projection is computed.

    Args:
        input: hidden states ``(..., H)``, float32, bfloat16 or float16, with any strides. Under ``torch.autocast`` it
            is cast to autocast's dtype, and ``weight`` and ``bias`` with it.
        weight: the head's weight ``(V, H)``, of the same dtype, with any strides.
        target: class indices ``(...)``, int32 or int64.
        bias: ``(V,)``, of the same dtype.
        ce_weight: class weights ``(V,)``, not differentiated.
        ignore_index: tokens with this label have loss 0, gradient 0 and prediction -1, and their projection is skipped.
        lse_square_scale: factor of the z-loss.
        label_smoothing: :math:`e`, in [0, 1].
        reduction: ``"mean"`` (the token losses over the sum of the valid tokens' weights, the z-losses over their
            count), ``"sum"``, or ``"none"`` (one loss per token). Without a valid token the loss is 0.
        softcap: bound of the logits, greater than 0, or ``None``.
        return_z_loss: also return the z-loss, detached.
        accum_dtype: accepted for compatibility; accumulation is float32 in any case.
        use_token_scaling: multiply each token's loss by its own detached probability of the label.
        return_token_accuracy: also return the share of valid tokens predicted right.
        return_predicted_tokens: also return the argmax per token, the lowest index on a tie.
        logit_scale: factor of the logits before the cap.
        memory: how much scratch the backward pass may take: ``"lean"``, ``"auto"``, ``"speed"``, or a number of bytes
            for the workspace of either pass. The result is the same.
        engine: ``"triton"``, ``"torch"`` (plain operations), or ``"auto"``: the kernels wherever they run.
        check_labels: on a GPU, wait for the labels and raise on a bad one. On a CPU that is always done.

    Returns:
        The loss, float32; a :class:`CrossEntropyOutput` if any ``return_*`` flag is on.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value; the message names it.
        IndexError: a label is neither in ``[0, V)`` nor ``ignore_index``. On a GPU, where finding out would mean
            waiting, its loss is NaN and its gradient 0 instead.

    Example:
        >>> hidden, head = torch.randn(8, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
        >>> loss = fused_linear_cross_entropy(hidden, head, torch.randint(0, 100, (8,)))
        >>> loss.backward()
        >>> head.grad.shape
        torch.Size([100, 16])

    References:
        Projection and loss in one pass: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024,
        arXiv:2411.09009. Token scaling: Wu et al., "On the Generalization of SFT", 2025, arXiv:2508.05629.
    """
    if accum_dtype is not None and not isinstance(accum_dtype, torch.dtype):
        raise TypeError(f"accum_dtype must be a torch.dtype or None, got {accum_dtype!r}")
    options = core.Options(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        logit_scale=logit_scale,
        reduction=reduction,
        use_token_scaling=use_token_scaling,
        return_z_loss=return_z_loss,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
        check_labels=check_labels,
    )
    if isinstance(input, Tensor) and isinstance(weight, Tensor) and torch.is_autocast_enabled(input.device.type):
        # As autocast casts the operands of a linear layer; gradients come back in the tensors' own dtypes.
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = bias.to(dtype) if isinstance(bias, Tensor) else bias
    problem = core.linear_problem(
        _argument("input", input),
        _argument("weight", weight),
        _argument("target", target),
        _optional_argument("bias", bias),
        _optional_argument("ce_weight", ce_weight),
    )
    step = core.Step("loss", problem, options, engine, memory)
    inputs = {"x": input, "weight": weight, "labels": target, "bias": bias, "class_weight": ce_weight}
    return _run(step, inputs)


def _argument(name: str, tensor: Tensor) -> core.Argument:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    return core.Argument(name, tuple(tensor.shape), tensor.dtype, tensor.device)


def _optional_argument(name: str, tensor: Tensor | None) -> core.Argument | None:
    return None if tensor is None else _argument(name, tensor)


@torch.compiler.disable  # a graph break: traced through, plain operations would round differently from eager
def _run(step: core.Step, inputs: dict[str, Tensor | None]) -> Tensor | CrossEntropyOutput:
    labels = inputs["labels"]
    assert labels is not None
    if step.options.check_labels or labels.device.type == "cpu":
        core.check_labels(labels, step.problem.vocab, step.options.ignore_index, "target")
    output = CrossEntropyOutput(*PlannedLoss.apply(step, *(inputs[name] for name in step.inputs)))
    return output if step.options.returns_output else output.loss
