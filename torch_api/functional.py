"""Cross entropy and fused linear cross entropy as functions of torch tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar
from torch.nn import _reduction

import core_kernels as core
from torch_api.autograd import PlannedLoss, applied
from torch_api.operator import cached_constant, encode, for_gradient, output_names
from torch_api.output import CrossEntropyOutput
from torch_api.parallel import Shard, is_dtensor, shard_of_dtensor, shard_of_group, to_local


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
    return_counts: bool = False,
    num_items_in_batch: int | Tensor | None = None,
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
        return_counts: also return how many tokens are valid, and how many of them are predicted right, to be summed
            over batches or devices.
        num_items_in_batch: what ``"mean"`` divides by instead, if more than 0: the number of valid tokens of the whole
            batch, of which this call has a part. An int or a scalar; the host never waits for one on a GPU.
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
    step = _step(
        _logits_step,
        *_facts({"input": input, "target": target}, {"weight": weight}),
        engine,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        logit_scale=logit_scale,
        reduction=core.Options.reduction_over(num_items_in_batch, reduction, (Tensor,), "a tensor"),
        return_z_loss=return_z_loss,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
        return_counts=return_counts,
        check_labels=check_labels,
    )
    return _run(step, num_items_in_batch, None, input, None, target, None, weight)


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
    return_counts: bool = False,
    num_items_in_batch: int | Tensor | None = None,
    process_group: Any = None,
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

    The forward pass takes statistics of each tile of logits as it is made, and may leave its exponentials behind for
    the backward pass, which otherwise projects again, one slice of the vocab at a time (``memory``). Every gradient is
    summed in float32 and rounded once (with a sharded vocab ``input``'s is the rounded sum of each shard's). Without
    gradients only the one projection is computed.

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
        return_counts: also return how many tokens are valid, and how many of them are predicted right, to be summed
            over batches or devices.
        num_items_in_batch: what ``"mean"`` divides by instead, if more than 0: the number of valid tokens of the whole
            batch, of which this call has a part. An int or a scalar; the host never waits for one on a GPU.
        process_group: ``weight`` and ``bias`` are this rank's shard of the vocab, as many rows on every rank of the
            group and in the order of the ranks. All else is the same on each of them, and so is the result, of which
            every rank takes the same gradient. A ``DTensor`` weight that is ``Shard(0)`` means the same on its own
            mesh, with uneven shards too; ``input`` and ``target`` may then be plain tensors, the same on each rank.
        memory: what the gradient may cost in scratch, on a GPU. ``"speed"``: one projection in all, with the
            exponentials of the logits kept in bfloat16, up to 4.7 GiB of them; of more, a chunk of tokens at a time,
            beside float32 gradients. ``"lean"``: statistics alone, and the logits again, a slice of the vocab at a
            time. ``"auto"``: the former up to 2 GiB, else the latter with larger slices. A number: at most so many
            bytes for the scratch of either pass. Inputs of float32 or float16, a bias and label smoothing always take
            the latter. The result is the same to rounding.
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
    input, weight, bias = map(_autocast, (input, weight, bias))
    shard = None
    if is_dtensor(weight):
        if process_group is not None:
            raise ValueError("process_group must be left out where weight is a DTensor, which has its own")
        shard = shard_of_dtensor(weight)
        input, target, bias, ce_weight = (
            to_local(name, tensor, weight, shard)
            for name, tensor in (("input", input), ("target", target), ("bias", bias), ("ce_weight", ce_weight))
        )
        weight = weight.to_local()  # type: ignore[attr-defined]
    facts = _facts({"input": input, "target": target, "weight": weight}, {"bias": bias, "ce_weight": ce_weight})
    if process_group is not None:
        shard = shard_of_group(weight, process_group)
    step = _step(
        _linear_step,
        *facts,
        engine,
        memory,
        None if shard is None else shard.shards,
        None if shard is None else shard.vocab,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        logit_scale=logit_scale,
        reduction=core.Options.reduction_over(num_items_in_batch, reduction, (Tensor,), "a tensor"),
        use_token_scaling=use_token_scaling,
        return_z_loss=return_z_loss,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
        return_counts=return_counts,
        check_labels=check_labels,
    )
    return _run(step, num_items_in_batch, shard, input, weight, target, bias, ce_weight)


Facts = tuple[str, tuple[int, ...], torch.dtype, torch.device]  # of a tensor: its name, shape, dtype and device


def _facts(required: dict[str, Any], optional: dict[str, Any]) -> list[Facts | None]:
    """What a step depends on. Tokens are left out where shapes agree, so that one step serves any number of them."""
    tensors = required | optional
    for name, tensor in tensors.items():
        if not (isinstance(tensor, Tensor) or (tensor is None and name in optional)):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if is_dtensor(tensor):  # whatever is sharded as the weight is has been made local by now
            raise ValueError(f"{name} must be a plain tensor here, got a DTensor: give its local part")
        if tensor is not None and (tensor.is_nested or tensor.layout != torch.strided):
            raise ValueError(f"{name} must be a dense tensor, got {'a nested' if tensor.is_nested else 'a sparse'} one")
    rows, target, weight = required["input"], required["target"], required.get("weight")
    agree = rows.dim() > 0 and rows.shape[-1] > 0 and rows.shape[:-1] == target.shape
    agree = agree and (weight is None or rows.shape[-1:] == weight.shape[1:])
    shapes = {"input": (-1, rows.shape[-1]), "target": (-1,)} if agree else {}
    return [
        None if t is None else (name, tuple(int(_constant(n)) for n in shapes.get(name, t.shape)), t.dtype, t.device)
        for name, t in tensors.items()
    ]


def _step(make: Callable[..., str], *arguments: Any, **options: Any) -> str:
    if torch.compiler.is_compiling():
        arguments = tuple(_constant(value) for value in arguments)
        options = {name: _constant(value) for name, value in options.items()}
    return make(*arguments, **options)


def _constant(value: Any) -> Any:
    """``value``, which the compiler, where it has seen a number change, would make a variable of its graph."""
    return guard_scalar(value) if torch.compiler.is_compiling() and isinstance(value, (int, float)) else value


@cached_constant
def _logits_step(input: Facts, target: Facts, weight: Facts | None, engine: str, **options: Any) -> str:
    problem = core.logits_problem(_argument(input), _argument(target), _argument(weight))
    return encode(core.Step("loss", problem, core.Options(**options), engine))


@cached_constant
def _linear_step(
    input: Facts,
    target: Facts,
    weight: Facts,
    bias: Facts | None,
    ce_weight: Facts | None,
    engine: str,
    memory: str | int,
    shards: int | None,
    vocab: int | None,
    **options: Any,
) -> str:
    problem = core.linear_problem(
        _argument(input), _argument(weight), _argument(target), _argument(bias), _argument(ce_weight), shards, vocab
    )
    return encode(core.Step("loss", problem, core.Options(**options), engine, memory))


def _autocast(tensor: Any) -> Any:
    """``tensor`` as autocast casts an operand of a linear layer; gradients come back in its own dtype."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    cast = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(tensor.device.type)) if cast else tensor


def _argument(facts: Facts | None) -> Any:
    return None if facts is None else core.Argument(*facts)


def _run(
    step: str,
    num_items: int | Tensor | None,
    shard: Shard | None,
    rows: Tensor,
    weight: Tensor | None,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
) -> Tensor | CrossEntropyOutput:
    if weight is not None and torch.compiler.is_compiling():
        # Of torch.func.grad's own arguments the compiler does not see that they require grad.
        rows, weight = rows.view_as(rows), weight.view_as(weight)
    tokens = rows.flatten(0, -2) if rows.dim() > 1 else rows[None]
    if weight is None and not torch.compiler.is_compiling() and _is_copied(rows):
        core.say_once(
            "cross_entropy copies its input, because the leading dimensions are not one in memory, as in "
            "logits[:, :-1]: leave the logits whole and shift the labels, with ignore_index where none is"
        )
    vectors = (None if v is None else v.contiguous() for v in (bias, class_weight))
    if weight is not None and torch.is_grad_enabled():
        wanted = tuple(name for name, tensor in (("x", rows), ("weight", weight)) if tensor.requires_grad)
        most, few, many = for_gradient(step, wanted, rows.device) if wanted else (0, step, step)
        step = few if most and tokens.shape[0] <= most else many
    results = applied(PlannedLoss)(step, shard, tokens, weight, target.contiguous(), *vectors)
    names = output_names(step)  # what it saved comes after
    output = {name: r.view(target.shape) if r.dim() else r for name, r in zip(names, results, strict=False)}
    if num_items is not None:
        share = _share(num_items, rows.device)
        output |= {name: output[name] * share for name in ("loss", "z_loss") if name in output}
    return output["loss"] if len(names) == 1 else CrossEntropyOutput(**output)


def _is_copied(rows: Tensor) -> bool:
    """Whether it takes a copy to have the leading dimensions as one; no, if a tracer has yet to know their strides."""
    sizes, strides = rows.shape[:-1], rows.stride()[:-1]
    if not all(isinstance(number, int) for number in (*sizes, *strides)) or 0 in sizes:
        return False
    leading = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size > 1]
    return any(outer != size * inner for (_, outer), (size, inner) in itertools.pairwise(leading))


def _share(num_items: int | Tensor, device: torch.device) -> float | Tensor:
    """Each item's part of the mean. Of none it is 1: a batch in which nothing is valid has loss 0.

    A scalar tensor on a CPU multiplies on any device, without a transfer to wait for.
    """
    if not isinstance(num_items, Tensor):
        return 1.0 / max(num_items, 1)
    items = num_items.full_tensor() if is_dtensor(num_items) else num_items  # type: ignore[attr-defined]
    items = (items if items.device.type == "cpu" else items.to(device)).reshape(()).float()
    return torch.where(items <= 0, 1.0, items).reciprocal()
